"""What do signing and encryption cost per message? Alone, in microseconds of CPU, and on the whole way over Redis.

Alone: what a sender does to a message and a worker to take it apart again, what a worker does to store a result and a
caller to read it, and what is looked at without keys too. On the whole way: a bridge with keys against the same bridge
without, one after the other in alternating order, as ``overhead.py`` does it.

::

    python bench/locked.py --csv bench/results/locked-0.1.0.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import overhead
from kombu.transport.virtual import Message

import qbridge
from qbridge import BridgeConfig, WorkerConfig
from qbridge.serialization.keys import new_key, read_key
from qbridge.serialization.limits import refuse_excess
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import Letter, lock_letter, unlock_letter
from qbridge.serialization.locked_results import lock_result, unlock_result

SIGN, HIDE = new_key("sign"), new_key("hide")
KEYS: dict[str, Any] = {
    "signed": {"signing_keys": [SIGN]},
    "encrypted": {"signing_keys": [SIGN], "encryption_keys": [HIDE]},
}
HEADER = ["version", "what", "keys", "body_bytes", "runs", "min", "median", "max", "unit"]


def headers() -> dict[str, Any]:
    """The headers of an ordinary task."""
    with qbridge.Bridge(BridgeConfig(broker="embedded://")) as bridge:
        app: Any = bridge.celery
        made: dict[str, Any] = app.amqp.as_task_v2("f" * 36, "shop.tasks.pay", argsrepr="", kwargsrepr="").headers
    return made


def micro(action: Callable[[], Any], runs: int = 15, loops: int = 300) -> list[float]:
    """Microseconds of CPU per call, once per run."""
    found = []
    for _ in range(runs):
        began = time.process_time()
        for _ in range(loops):
            action()
        found.append((time.process_time() - began) / loops * 1e6)
    return found


def alone() -> list[list[str]]:
    """Measure the parts."""
    rows = []
    plain = headers()
    for size in (300, 10_000, 100_000):
        body = json.dumps([[["x" * 90] * (size // 100)], {}, {}]).encode()
        payload = {"body": body.decode(), "headers": plain, "properties": {"delivery_tag": "1"}}
        message: Any = Message(payload, channel=_Channel())
        message.content_type = "application/json"
        rows.append(row("look at limits", "none", size, micro(lambda m=message: refuse_excess(m, 1_048_576)), "us"))
        for name, encrypting in (("signed", False), ("encrypted", True)):
            lock = Lock([read_key(SIGN)], [read_key(HIDE)] if encrypting else [])
            letter = Letter(body, "application/json", "utf-8", plain, "f" * 36, "reply")
            sent = lock_letter(lock, "task", letter)
            value = {"result": ["x" * 90] * (size // 100), "traceback": None, "children": []}
            stored = lock_result(lock, "f" * 36, "SUCCESS", value, json.dumps)
            for what, action in {
                "send": lambda lock=lock, letter=letter: lock_letter(lock, "task", letter),
                "receive": lambda lock=lock, sent=sent: unlock_letter(lock, "task", sent),
                "store result": lambda lock=lock, value=value: lock_result(
                    lock, "f" * 36, "SUCCESS", value, json.dumps
                ),
                "read result": lambda lock=lock, stored=stored: unlock_result(lock, "f" * 36, "SUCCESS", stored),
            }.items():
                rows.append(row(what, name, size, micro(action), "us"))
    return rows


class _Channel:
    def decode_body(self, body: Any, encoding: Any) -> Any:
        return body


def whole(repetitions: int, messages: int) -> list[list[str]]:
    """Measure send, receive and round trip with keys against those without."""
    rows = []
    with ExitStack() as stack:
        found = overhead.urls(stack, {"redis"})
        for name, keys in KEYS.items():
            tag = f"{time.time_ns():x}"
            sides = []
            for serialization in ({}, keys):
                config = BridgeConfig(
                    broker=found["redis"], results=found["redis"], worker=WorkerConfig(prefetch=4),
                    serialization=serialization,
                )  # fmt: skip
                sides.append(overhead.typed_side(config, f"q{len(sides)}-{tag}"))
            for what in ("submit", "round trip"):
                ratios = [ratio(what, sides, repetition, messages) for repetition in range(repetitions)]
                rows.append(row(what, name, 50, ratios, "ratio"))
            for side in sides:
                side.app.close()
    return rows


def ratio(what: str, sides: list[Any], repetition: int, messages: int) -> float:
    """CPU time of one repetition with keys, over that without."""
    spent: dict[int, float] = {}
    for number in (0, 1) if repetition % 2 else (1, 0):
        side = sides[number]
        if what == "submit":
            spent[number] = overhead.timed(lambda side=side: [side.send(n) for n in range(messages)])[1]
            with side.app.connection_for_write() as connection:
                connection.default_channel.queue_purge(side.queue)
        else:
            with overhead.worker(side):
                side.get(side.send(1))
                spent[number] = overhead.timed(
                    lambda side=side: [side.get(side.send(n)) for n in range(messages // 5)]
                )[1]
    return spent[1] / spent[0]


def row(what: str, keys: str, size: int, found: list[float], unit: str) -> list[str]:
    """One line of the table."""
    low, middle, high = min(found), statistics.median(found), max(found)
    digits = 3 if unit == "ratio" else 1
    cells = [f"{value:.{digits}f}" for value in (low, middle, high)]
    return [qbridge.__version__, what, keys, str(size), str(len(found)), *cells, unit]


def main() -> int:
    """Measure and print; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    table = alone() + whole(options.repetitions, options.messages)
    for cells in [HEADER, *table]:
        print(" ".join(f"{cell:>14}" for cell in cells))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *table])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
