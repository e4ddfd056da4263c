"""What does Redis do for the transport in one step? The scripts, each atomic, by the server's clock.

Keys: kombu's lists, ``unacked`` and ``unacked_index`` as kombu has them, and beside them ``qbridge.claims`` (hash:
delivery tag to owner, length of what was put around the message, and the list it came from), ``qbridge.holders``
(sorted set: a consumer to the end of its lease in ms), ``qbridge.again`` (hash: delivery tag to earlier deliveries and
losses), ``qbridge.schedule`` and ``qbridge.scheduled`` (what is not due yet: times, and messages), ``qbridge.swept``
(the time of the last sweep) and ``qbridge.wake.QUEUE`` (a stream of one entry,
which idle workers wait for).

A message is never decoded and encoded again: what is put around it is taken off by its length.
Redis does not undo a script that fails half-way, so none does anything that can fail after it has popped a message: the
first command of each is one that a full server allows, and after a write it allows all others.
"""

from __future__ import annotations

import hashlib
from typing import Any

from redis.exceptions import NoPermissionError, NoScriptError

__all__ = [
    "CLAIM", "GIVE_BACK", "MOVE", "POSTPONE", "PURGE", "PUT", "RENEW", "SCHEDULE", "SETTLE", "SWEEP", "TRANSFER",
    "Script", "is_forbidden",
]  # fmt: skip

# how Redis refuses a command within a script
_FORBIDDEN_INSIDE = "executing the script can't run this command"


class Script:
    """One script: sent by its digest, and whole to a server that does not know it yet."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: list[str], args: list[Any], *, whole: bool = False) -> list[Any]:
        """The words of the command.

        Args:
            keys: with the prefix, if there is one.
            args: of the script.
            whole: with the script's text instead of its digest.
        """
        head = ["EVAL", self.text] if whole else ["EVALSHA", self.digest]
        return [*head, len(keys), *keys, *args]

    def run(self, client: Any, keys: list[str], args: list[Any]) -> Any:
        """Run it and wait for its answer.

        Args:
            client: redis-py's, one that puts no prefix before keys.
            keys: as above.
            args: as above.
        """
        try:
            return client.execute_command(*self.command(keys, args))
        except NoScriptError:
            return client.execute_command(*self.command(keys, args, whole=True))


def is_forbidden(error: Exception) -> bool:
    """Tell whether an account may not run a script, or a command in it, and those before that one were done."""
    return isinstance(error, NoPermissionError) or _FORBIDDEN_INSIDE in str(error)


_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
"""

# Only the present owner of a claim settles it. Returns true if it was.
_DROP = """
local function drop(claims, unacked, index, again, tag, owner)
    local claim = redis.call('HGET', claims, tag)
    if not claim or string.sub(claim, 1, #owner + 1) ~= owner .. '\\0' then return false end
    redis.call('HDEL', claims, tag)
    redis.call('HDEL', unacked, tag)
    redis.call('ZREM', index, tag)
    redis.pcall('HDEL', again, tag)  -- what else somebody made of that key must not end it here
    return true
end
"""

_RETURN = """
local function give_back(claims, unacked, index, again, tag, claim, side, lost)
    local _, length, list = string.match(claim, '^([^%z]*)%z(%d+)%z(.*)$')
    if not list then return false end  -- no claim of ours
    local held = redis.call('HGET', unacked, tag)
    if held then redis.call('LLEN', list) end  -- what is no list ends the script before the message is taken
    redis.call('HDEL', claims, tag)
    redis.call('HDEL', unacked, tag)
    redis.call('ZREM', index, tag)
    if not held then return false end
    local before = redis.pcall('HGET', again, tag)
    local deliveries, losses = string.match(type(before) == 'string' and before or '', '^(%d+) (%d+)$')
    redis.pcall('HSET', again, tag, ((deliveries or 0) + 1) .. ' ' .. ((losses or 0) + lost))
    redis.call(side, list, string.sub(held, 2, #held - tonumber(length)))
    return true
end
"""

_WAKE = """
local function wake(stream)
    redis.call('XADD', stream, 'MAXLEN', '1', '*', 'w', '1')
    redis.call('PEXPIRE', stream, 3600000)
end
"""

PUT = Script(
    _WAKE
    + """
wake(KEYS[2])  -- first: what an account may not do ends the script before anything is sent
redis.call('LPUSH', KEYS[1], ARGV[1])
if ARGV[2] then
    for number = 3, #KEYS do redis.call('PEXPIRE', KEYS[number], ARGV[2]) end
end
"""
)
"""Keys: list, wake, [lists that expire]. Args: message, [ms to expire]."""

TRANSFER = Script(
    _WAKE
    + """
if not redis.call('LPOS', KEYS[1], ARGV[1]) then return 0 end
wake(KEYS[3])  -- first, as above
redis.call('LPUSH', KEYS[2], ARGV[2])
redis.call('LREM', KEYS[1], -1, ARGV[1])
return 1
"""
)
"""Keys: list, list that it goes to, its wake. Args: item of the list, what it becomes. Answers: 1 if it was there."""

SCHEDULE = Script("""
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
""")
"""Keys: schedule, scheduled. Args: name of the entry, due in ms, entry."""

POSTPONE = Script(
    _DROP
    + """
redis.call('HGET', KEYS[6], ARGV[3])  -- a key of another type ends the script before the message is dropped
redis.call('ZRANGE', KEYS[5], 0, 0)
if drop(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2]) then
    redis.call('HSET', KEYS[6], ARGV[3], ARGV[5])
    redis.call('ZADD', KEYS[5], ARGV[4], ARGV[3])
end
"""
)
"""Keys: claims, unacked, index, again, schedule, scheduled. Args: tag, owner, then as for scheduling."""

CLAIM = Script(
    _NOW
    + _DROP
    + _WAKE
    + """
local holders, claims, unacked, index, again, schedule, scheduled =
    KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local holder, owner, lease, limit, queues = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local settled = tonumber(ARGV[6])
local late = {}
for number = 7, 5 + 2 * settled, 2 do
    if not drop(claims, unacked, index, again, ARGV[number], ARGV[number + 1]) then
        late[#late + 1] = ARGV[number]
    end
end
local flags = 6 + 2 * settled
for _, name in ipairs(redis.call('ZRANGEBYSCORE', schedule, '-inf', now, 'LIMIT', 0, 100)) do
    redis.call('ZREM', schedule, name)
    local entry = redis.call('HGET', scheduled, name)
    if entry then
        local list, stream, message = string.match(entry, '^([^%z]*)%z([^%z]*)%z(.*)$')
        redis.call('LPUSH', list, message)
        redis.call('HDEL', scheduled, name)
        wake(stream)
    end
end
redis.call('HGET', claims, '')  -- a key of another type ends the script before a message is popped
redis.call('HGET', unacked, '')
redis.call('ZRANGE', index, 0, 0)
redis.call('ZRANGE', holders, 0, 0)
local seconds = clock[1] .. '.' .. string.format('%06d', tonumber(clock[2]))
local items, kept = {}, false
for first = 8, #KEYS, queues do
    local took = true
    while took and #items < limit do
        took = false
        for number = first, first + queues - 1 do
            local message = #items < limit and redis.call('RPOP', KEYS[number])
            if message then
                took = true
                local fine, tag, exchange, key = pcall(function()
                    local properties = cjson.decode(message).properties
                    local info = properties.delivery_info
                    return properties.delivery_tag, info and info.exchange, info and info.routing_key
                end)
                if fine and type(tag) == 'string' and tag ~= '' then
                    local before = redis.pcall('HGET', again, tag)
                    if type(before) ~= 'string' then before = '' end
                    if ARGV[flags + number - 7] == '1' then
                        if type(exchange) ~= 'string' then exchange = '' end
                        if type(key) ~= 'string' then key = '' end
                        local ending = ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(key) .. ']'
                        redis.call('HSET', unacked, tag, '[' .. message .. ending)
                        redis.call('ZADD', index, seconds, tag)
                        redis.call('HSET', claims, tag, owner .. '\\0' .. #ending .. '\\0' .. KEYS[number])
                        kept = true
                    elseif before ~= '' then
                        redis.pcall('HDEL', again, tag)
                    end
                    items[#items + 1] = {number - 8, message, tag, before}
                else
                    items[#items + 1] = {number - 8, message, '', ''}
                end
            end
        end
    end
end
if kept then redis.call('ZADD', holders, now + lease, holder) end
local due = redis.call('ZRANGE', schedule, 0, 0, 'WITHSCORES')[2]
return {now, due or '', late, items}
"""
)
"""Keys: holders, claims, unacked, index, again, schedule, scheduled, then the lists, step by step, a list per queue.

Args: holder, owner, lease in ms, most messages, number of queues, number of settled claims, tag and owner of each, and
for each list 1 if its messages are acknowledged. Answers: now, next due, tags that were not the caller's any more,
messages.
"""

SETTLE = Script(
    _DROP
    + """
local late = {}
for number = 1, #ARGV, 2 do
    if not drop(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[number], ARGV[number + 1]) then
        late[#late + 1] = ARGV[number]
    end
end
return late
"""
)
"""Keys: claims, unacked, index, again. Args: tag and owner of each. Answers: those that were others' by then."""

GIVE_BACK = Script(
    _RETURN
    + """
local late = {}
for number = 2, #ARGV, 2 do
    local tag, owner = ARGV[number], ARGV[number + 1]
    local claim = redis.call('HGET', KEYS[1], tag)
    if claim and string.sub(claim, 1, #owner + 1) == owner .. '\\0' then
        give_back(KEYS[1], KEYS[2], KEYS[3], KEYS[4], tag, claim, ARGV[1], 0)
    else
        late[#late + 1] = tag
    end
end
return late
"""
)
"""Keys: as for settling. Args: LPUSH or RPUSH, tag and owner of each. Answers: likewise."""

MOVE = Script(
    _NOW
    + """
local kept = {}
for number = 4, #ARGV, 2 do
    local tag, owner = ARGV[number], ARGV[number + 1]
    local claim = redis.call('HGET', KEYS[2], tag)
    if claim and string.sub(claim, 1, #owner + 1) == owner .. '\\0' then
        redis.call('HSET', KEYS[2], tag, ARGV[2] .. '/0' .. string.sub(claim, #owner + 1))
        kept[#kept + 1] = tag
    end
end
if #kept > 0 then redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[2]) end
redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[1])
return #kept
"""
)
"""Keys: holders, claims. Args: old holder, new holder, lease in ms, tag and owner of each. Answers: how many moved.

The old holder has said goodbye then: what it holds beside these is for others.
"""

RENEW = Script(
    _NOW
    + """
local known = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
for number = 3, #ARGV do redis.call('ZADD', KEYS[2], 'XX', clock[1], ARGV[number]) end
return known and 1 or 0
"""
)
"""Keys: holders, index. Args: holder, lease in ms, tags held (so that plain workers do not think them abandoned)."""

SWEEP = Script(
    _NOW
    + _RETURN
    + """
local holders, claims = KEYS[1], KEYS[2]
local last = tonumber(redis.call('GET', KEYS[6]) or 0)
redis.call('SET', KEYS[6], now)
local gone, taken = {}, 0
local all = redis.call('ZRANGE', holders, 0, -1, 'WITHSCORES')
for number = 1, #all, 2 do
    local holder, ended = all[number], tonumber(all[number + 1])
    local lease = tonumber(string.match(holder, ':(%d+)$') or 30000)
    if ended == 0 then
        gone[holder] = 0
    elseif now < last or now - last > math.max(lease / 2, 1500) then
        redis.call('ZADD', holders, now + lease, holder)
    elseif ended <= now then
        gone[holder] = 1
    end
end
if next(gone) then
    local all = redis.call('HGETALL', claims)
    for number = 1, #all, 2 do
        local lost = gone[string.match(all[number + 1], '^([^%z/]*)')]
        if lost then
            if give_back(claims, KEYS[3], KEYS[4], KEYS[5], all[number], all[number + 1], 'RPUSH', lost) then
                taken = taken + 1
            end
        end
    end
    for holder in pairs(gone) do redis.call('ZREM', holders, holder) end
end
return taken
"""
)
"""Keys: holders, claims, unacked, index, again, swept. Answers: how many messages were taken over.

After a gap between sweeps, in which nobody could renew either, every holder has a full lease first. A holder whose
lease ended at 0 has said goodbye, which is no loss.
"""

PURGE = Script("""
local count = 0
for number = 3, #KEYS do
    count = count + redis.call('LLEN', KEYS[number])
    redis.call('DEL', KEYS[number])
    local start = KEYS[number] .. '\\0'
    for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
        if string.sub(name, 1, #start) == start then
            redis.call('ZREM', KEYS[1], name)
            redis.call('HDEL', KEYS[2], name)
            count = count + 1
        end
    end
end
return count
""")
"""Keys: schedule, scheduled, lists. Answers: how many messages there were, those not due yet with them."""
