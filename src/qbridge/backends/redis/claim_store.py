"""How does Redis keep claims? A hash per key and a sorted set of revoked tasks, by the server's clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from qbridge.backends.claims import REVOKED_FOR, Claim, Kind, Wanted
from qbridge.backends.redis.scripts import Script

__all__ = ["RedisClaims"]

_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
"""

TAKE = Script(
    _NOW
    + """
local row = redis.call('HMGET', KEYS[1], 'holder', 'token', 'since', 'until', 'note')
local holder, token, since, ends = row[1], tonumber(row[2] or 0), tonumber(row[3] or 0), tonumber(row[4] or 0)
local note = row[5] or ''
local wanted, lease = ARGV[1], tonumber(ARGV[2])
local mine = holder == wanted
local free = ends <= now or ARGV[5] == '*' or holder == ARGV[5]
if not holder or mine or (free and now - since >= tonumber(ARGV[4])) then
    if not mine then token, since, note = token + 1, now, '' end
    if ARGV[3] ~= '' then note = ARGV[3] end
    holder, ends = wanted, now + lease
    redis.call('HSET', KEYS[1], 'holder', holder, 'token', token, 'since', since, 'until', ends, 'note', note)
    redis.call('PEXPIRE', KEYS[1], math.max(lease, tonumber(ARGV[6])))
end
return {holder, token, now - since, ends - now, note}
"""
)
"""Key: of the claim. Args: holder, lease in ms, note, running in ms, over, ms to keep it. Answers: the claim."""

LOOK = Script(
    _NOW
    + """
local row = redis.call('HMGET', KEYS[1], 'holder', 'token', 'since', 'until', 'note')
if not row[1] then return false end
return {row[1], tonumber(row[2]), now - tonumber(row[3]), tonumber(row[4]) - now, row[5]}
"""
)
"""Key: of the claim. Answers: the claim, or nothing."""

RELEASE = Script("""
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('HSET', KEYS[1], 'until', 0) end
""")
"""Key: of the claim. Args: holder."""

REVOKE = Script(
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)
"""Key: revoked. Args: id of the task, ms to remember it."""

REVOKED_SINCE = Script(
    _NOW
    + """
return {now, redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf')}
"""
)
"""Key: revoked. Args: moment in ms. Answers: now, ids."""


class RedisClaims:
    """Claims beside the results in Redis (see ``qbridge.backends.claims.ClaimStore``).

    Args:
        backend: our Redis result backend: its client, its prefix, how long results are kept.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        prefix = bytes(backend.task_keyprefix).removesuffix(b"celery-task-meta-").decode()
        self._prefix = f"{prefix}qbridge-"
        self._keep = int(float(backend.expires or 86400.0) * 1000)

    def take(self, kind: Kind, wanted: Sequence[Wanted]) -> list[Claim]:
        """Claim what is free, and extend what the holder has."""
        calls = [
            (
                [self._key(kind, each.key)],
                [each.holder, _ms(each.lease), each.note, _ms(each.running), each.over, self._keep],
            )
            for each in wanted
        ]
        if len(calls) == 1:
            return [_claim(TAKE.run(self._client, *calls[0]))]
        try:
            return self._take_all(calls, whole=False)
        except NoScriptError:  # the server does not know the script yet: none of them did anything
            return self._take_all(calls, whole=True)

    def _take_all(self, calls: Sequence[tuple[list[str], list[Any]]], *, whole: bool) -> list[Claim]:
        with self._client.pipeline(transaction=False) as pipe:
            for number, (keys, args) in enumerate(calls):
                pipe.execute_command(*TAKE.command(keys, args, whole=whole and not number))
            return [_claim(answer) for answer in pipe.execute()]

    def look(self, kind: Kind, key: str) -> Claim | None:
        """Return a claim, ended or not."""
        answer = LOOK.run(self._client, [self._key(kind, key)], [])
        return None if answer is None else _claim(answer)

    def release(self, kind: Kind, key: str, holder: str) -> None:
        """End a claim, if the holder has it."""
        RELEASE.run(self._client, [self._key(kind, key)], [holder])

    def revoke(self, task_id: str) -> None:
        """Note that a task is revoked."""
        REVOKE.run(self._client, [self._revoked], [task_id, _ms(max(REVOKED_FOR, self._keep / 1000))])

    def is_revoked(self, task_id: str) -> bool:
        """Whether a task is revoked."""
        return self._client.zscore(self._revoked, task_id) is not None

    def revoked_since(self, moment: int) -> tuple[list[str], int]:
        """Return what was revoked since a moment, and the next moment."""
        now, ids = REVOKED_SINCE.run(self._client, [self._revoked], [moment])
        return [_text(each) for each in ids], int(now)

    @property
    def _client(self) -> Any:
        return self._backend.client

    @property
    def _revoked(self) -> str:
        return f"{self._prefix}revoked"

    def _key(self, kind: Kind, key: str) -> str:
        return f"{self._prefix}{kind}-{key}"


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _claim(answer: Any) -> Claim:
    holder, token, age, left, note = answer
    return Claim(_text(holder), int(token), int(age) / 1000, int(left) / 1000, _text(note))
