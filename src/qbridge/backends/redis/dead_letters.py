"""How are dead letters read on Redis? Their list is read in pages; single ones leave it by their value, in one step."""

from __future__ import annotations

import json
import logging
import uuid
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from redis.exceptions import ResponseError

from qbridge.backends.kept import Kept
from qbridge.backends.redis import scripts
from qbridge.backends.redis.messages import FAULTS, NO_LIST

__all__ = ["open_queue"]

logger: logging.Logger = logging.getLogger(__name__)

_PAGE = 100


@contextmanager
def open_queue(connection: Any, name: str) -> Iterator[_Queue]:
    """Open a queue of dead letters for reading; one that does not exist is empty.

    Args:
        connection: a kombu connection with our transport.
        name: of the queue.
    """
    yield _Queue(connection.default_channel, name)


class _Queue:
    def __init__(self, channel: Any, name: str) -> None:
        self._channel = channel
        self._name = name
        self._removed = 0

    def look(self) -> Iterator[Kept]:
        """Yield what is there now, oldest first: at the right end of the list."""
        for key in self._lists(self._name):
            try:
                left = int(self._channel._ours.llen(key))
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                logger.error(NO_LIST, key)  # noqa: TRY400 - where it was found says nothing
                continue
            seen = self._removed = 0
            while left > 0:
                # what arrives is pushed on the left, what we remove has moved the rest to the right
                end = -1 - (seen - self._removed)
                page = self._channel._ours.lrange(key, end - min(left, _PAGE) + 1, end)
                for raw in reversed(page):
                    seen += 1
                    kept = _opened(key, raw)
                    if kept is not None:
                        yield kept
                left = 0 if not page else left - len(page)

    def discard(self, kept: Kept) -> bool:
        """Delete a message; False if somebody else has."""
        key, raw = kept.place
        return self._counted(int(self._channel._ours.lrem(key, -1, raw)) > 0)

    def send(self, kept: Kept, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Move a message to another queue, in one step."""
        key, raw = kept.place
        message = json.loads(raw)
        number = self._channel._get_message_priority({"properties": properties}, reverse=False)
        stored = {**message["properties"], **{name: value for name, value in properties.items() if value is not None}}
        stored |= {
            "delivery_tag": str(uuid.uuid4()),  # by which deliveries are counted: they begin anew
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": number,
        }
        for name in ("content_type", "content_encoding"):  # kombu keeps them beside the properties
            stored.pop(name, None)
        sent = {
            **message,
            "headers": dict(headers),
            "properties": stored,
            "content-type": properties.get("content_type"),
            "content-encoding": properties.get("content_encoding"),
        }
        target = self._lists(queue)[self._channel.priority_steps.index(self._channel.priority(number))]
        keys = [key, target, self._channel._wake_key(queue)]
        return self._counted(bool(scripts.TRANSFER.run(self._channel._ours, keys, [raw, json.dumps(sent)])))

    def _lists(self, queue: str) -> list[str]:
        channel = self._channel
        keys: list[str] = channel._keys(*(channel._q_for_pri(queue, step) for step in channel.priority_steps))
        return keys

    def _counted(self, removed: bool) -> bool:
        self._removed += removed
        return removed


def _opened(key: str, raw: bytes) -> Kept | None:
    """Return what kombu put on the list; None if it was somebody else."""
    try:
        message = json.loads(raw)
        properties = message["properties"]
        body = message["body"]
        found = b64decode(body) if properties.get("body_encoding") == "base64" else body.encode()
        rest = {
            name: value
            for name, value in properties.items()
            if name not in ("body_encoding", "delivery_info", "delivery_tag", "delivery_mode")
        }
        rest |= {"content_type": message.get("content-type"), "content_encoding": message.get("content-encoding")}
        headers = message.get("headers") or {}
        # whoever reads letters asks both for their parts
        mappings = isinstance(headers, Mapping) and isinstance(properties, Mapping)
        return Kept((key, raw), found, headers, rest) if mappings else None
    except FAULTS:  # anybody may push anything, nested to any depth
        return None
