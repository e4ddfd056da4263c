"""The servers from a terminal: ``python -m qbridge.testing.servers install|run [NAME ...]``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from qbridge.testing.servers import SERVERS, ServerFailed, ServerMissing, obtain
from qbridge.testing.servers.install import install


def main(arguments: Sequence[str] | None = None) -> int:
    """Install or run servers.

    Returns:
        The exit code: 0 if it did what it was told.
    """
    parser = argparse.ArgumentParser(prog="python -m qbridge.testing.servers", description=__doc__)
    orders = parser.add_subparsers(dest="order", required=True)
    for order, explanation in (
        ("install", "install what is missing (root on Debian or Ubuntu)"),
        ("run", "run private servers until Ctrl-C, and print their URLs"),
    ):
        added = orders.add_parser(order, help=explanation)
        added.add_argument("servers", nargs="*", metavar="NAME", help=f"{', '.join(SERVERS)}; none named: all")
    chosen = parser.parse_args(arguments)
    names: list[str] = chosen.servers or list(SERVERS)
    for name in names:
        if name not in SERVERS:
            parser.error(f"there is no server {name!r}; there are {', '.join(SERVERS)}")
    try:
        if chosen.order == "install":
            install(names)
        else:
            _run(names)
    except (ServerMissing, ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(names: Sequence[str]) -> None:
    with ExitStack() as open_servers:
        for name in names:
            server = obtain(SERVERS[name])
            open_servers.callback(server.close)
            print(f"{server.environment_variable}={server.url}", flush=True)
        print("Running until Ctrl-C.", file=sys.stderr, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    raise SystemExit(main())
