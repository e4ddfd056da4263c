"""Sends one slow task and looks at it while it runs."""

from __future__ import annotations

import time

from longsum.tasks import bridge, slow_sum


def main() -> None:
    """Send, look, wait, look again."""
    with bridge:
        result = slow_sum.delay([1, 2, 3, 4, 5])
        print(f"ready at once: {result.ready()}")
        deadline = time.monotonic() + 60
        while not result.ready() and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"ready now: {result.ready()}, the sum is {result.get(timeout=1)}")


if __name__ == "__main__":
    main()
