"""What becomes of a test whose server is not to be had: skipped on a developer's machine, failed in CI."""

from __future__ import annotations

import os
from typing import NoReturn

__all__ = ["ServerFailed", "ServerMissing", "cannot_run", "in_ci"]


class ServerFailed(RuntimeError):
    """A server did not do what it was told; the message shows its log."""


class ServerMissing(RuntimeError):
    """The programs of a server are not on this machine; the message names every way to get them."""


def in_ci() -> bool:
    """The environment variable ``CI`` says so: a missing server is then a failure."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def cannot_run(reason: str) -> NoReturn:
    """End the running test: skipped, or failed in CI.

    Args:
        reason: what is missing and what to do about it.
    """
    import pytest  # not at the top: the servers can also be run without pytest, from the command line

    if in_ci():
        pytest.fail(f"{reason} (in CI this is a failure, elsewhere a skip)", pytrace=False)
    pytest.skip(reason)
