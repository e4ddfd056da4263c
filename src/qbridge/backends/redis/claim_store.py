"""How does Redis keep claims? A hash per key and a sorted set of revoked tasks, by the server's clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from qbridge.backends.claims import REVOKED_FOR, Claim, Kind, Wanted
from qbridge.backends.redis.scripts import Script

__all__ = ["RedisClaims"]

_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
"""

# Somebody else may have put anything there, which must not keep who asks for others from theirs.
_ROW = (
    _NOW
    + """
local row = redis.pcall('HMGET', KEYS[1], 'holder', 'token', 'since', 'until', 'note')
local foreign = row.err and string.find(row.err, 'WRONGTYPE', 1, true)
if foreign then row = {} elseif row.err then return row end
local function number(text)
    local value = tonumber(text)
    if value and value > -2^53 and value < 2^53 then return value end
    return 0
end
local holder, token, since, ends = row[1], number(row[2]), number(row[3]), number(row[4])
"""
)

TAKE = Script(
    _ROW
    + """
if foreign then redis.call('DEL', KEYS[1]) end
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
    _ROW
    + """
if not holder then return false end
return {holder, token, now - since, ends - now, row[5] or ''}
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
local old = redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
if type(old) == 'table' and old.err and string.find(old.err, 'WRONGTYPE', 1, true) then redis.call('DEL', KEYS[1]) end
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)
"""Key: revoked. Args: id of the task, ms to remember it."""

REVOKED_SINCE = Script(
    _NOW
    + """
local ids = redis.pcall('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf')
if ids.err then
    if not string.find(ids.err, 'WRONGTYPE', 1, true) then return ids end
    ids = {}  -- somebody else's: nothing is known, until the next revocation
end
return {now, ids}
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
        try:
            return self._client.zscore(self._revoked, task_id) is not None
        except ResponseError as error:
            if "WRONGTYPE" in str(error):  # somebody else's
                return False
            raise

    def revoked_since(self, moment: int) -> tuple[list[str], int]:
        """Return what was revoked since a moment, and the next moment."""
        now, ids = REVOKED_SINCE.run(self._client, [self._revoked], [moment])
        return [_text(each) for each in ids if _is_text(each)], int(now)  # the others are no ids

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
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _is_text(value: Any) -> bool:
    return _text(value).encode() == value or isinstance(value, str)


def _claim(answer: Any) -> Claim:
    holder, token, age, left, note = answer
    return Claim(_text(holder), int(token), int(age) / 1000, int(left) / 1000, _text(note))
