"""What helps tests: private servers, a TCP proxy for faults, waiting on conditions.

Importing this package opens nothing and starts nothing; import what you need from its modules:
``qbridge.testing.servers``, ``qbridge.testing.proxy``, ``qbridge.testing.waiting``.
"""

from __future__ import annotations
