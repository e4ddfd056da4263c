"""Does every broker × result pair keep the contract? The behaviours are qbridge's own: anybody can run them."""

from __future__ import annotations

from qbridge.testing.contracts import *  # noqa: F403 - every behaviour is a test
