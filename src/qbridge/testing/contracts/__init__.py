"""What must every broker × result pair do? The behaviours, as tests that anybody can run against their servers.

In a test module of yours::

    # No __all__ here and in the modules of behaviours: one that was left out of it would never run.
from qbridge.testing.contracts.round_trips import *  # noqa: F403
