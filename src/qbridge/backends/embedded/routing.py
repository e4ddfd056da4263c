"""Which queues does an exchange give a message to? The rules of AMQP's direct, topic and fanout exchanges."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["EXCHANGE_TYPES", "ExchangeMissing", "matches"]

EXCHANGE_TYPES = frozenset({"direct", "topic", "fanout"})


class ExchangeMissing(LookupError):
    """A message was sent to an exchange that nobody declared."""


def matches(kind: str, binding_key: str, routing_key: str) -> bool:
    """Does a message sent with ``routing_key`` go to a queue bound with ``binding_key``?

    Args:
        kind: type of the exchange.
        binding_key: for ``topic``: words between dots, ``*`` for one word, ``#`` for any number of them, none included.
        routing_key: the message's.
    """
    if kind == "fanout":
        return True
    if kind == "topic":
        return _topic_matches(tuple(binding_key.split(".")), tuple(routing_key.split(".")))
    return binding_key == routing_key


@lru_cache(maxsize=1024)
def _topic_matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(_topic_matches(rest, words[start:]) for start in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and _topic_matches(rest, words[1:])
