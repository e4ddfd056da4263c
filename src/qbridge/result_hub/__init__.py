"""How does a caller wait for a result: any number of threads and event loops, one thread that asks the backend."""

from __future__ import annotations

from qbridge.result_hub.hub import ResultHub

__all__ = ["ResultHub"]
