"""The application that the contracts are about: its tasks, the values they take, and its worker.

Worker processes load it without the contracts themselves, which need pytest.
"""

from __future__ import annotations

__all__ = ["READY"]

READY = "QBRIDGE_TEST_WORKER_READY"
"""Environment variable with the file that a worker makes once it consumes; its content is the node's name."""
