"""What must every broker × result pair do? The behaviours, as tests that anybody can run against their servers.

In a test module of yours::

    from qbridge.testing.contracts import *

Each behaviour then runs on every pair of the matrix (``--qbridge-broker`` and ``--qbridge-results`` choose one). The
servers are private ones, or those that ``QBRIDGE_TEST_RABBITMQ_URL``, ``QBRIDGE_TEST_REDIS_URL``,
``QBRIDGE_TEST_POSTGRESQL_URL`` and ``QBRIDGE_TEST_MARIADB_URL`` name. To run on a pair that the matrix does not have,
override the fixtures ``broker_url`` and ``results_url`` with URLs of places that nothing else uses.
"""

from __future__ import annotations

# No __all__ here and in the modules of behaviours: one that was left out of it would never run.
from qbridge.testing.contracts.claims import *  # noqa: F403
from qbridge.testing.contracts.crashes import *  # noqa: F403
from qbridge.testing.contracts.failures import *  # noqa: F403
from qbridge.testing.contracts.round_trips import *  # noqa: F403
from qbridge.testing.contracts.sending import *  # noqa: F403
from qbridge.testing.contracts.watching import *  # noqa: F403
