"""Sends work to both pools and shows where it ran."""

from __future__ import annotations

import time

from work import bridge, digest, fetch


def main() -> None:
    """Eight of each."""
    with bridge:
        began = time.monotonic()
        cpu = digest.send_many([(f"text {n}",) for n in range(8)])
        io = fetch.send_many([(f"https://example.org/{n}",) for n in range(8)])
        digests = [result.get(timeout=30) for result in cpu]
        pages = [result.get(timeout=30) for result in io]
        print(
            f"cpu: {len({where.value for where in digests})} values from {len({w.process for w in digests})} processes"
        )
        print(f"io: {len({w.thread for w in pages})} threads of {len({w.process for w in pages})} process")
        print(f"all in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
