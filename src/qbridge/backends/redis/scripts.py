"""What does Redis do for the transport in one step? The scripts, each atomic, by the server's clock.

Keys: kombu's lists, ``unacked`` and ``unacked_index`` as kombu has them, and beside them ``qbridge.claims`` (hash:
delivery tag to owner, length of what was put around the message, and the list it came from), ``qbridge.holders``
(sorted set: a consumer to the end of its lease in ms), ``qbridge.again`` (hash: delivery tag to earlier deliveries and
losses), ``qbridge.schedule`` and ``qbridge.scheduled`` (what is not due yet: times, and messages), ``qbridge.swept``
(the time of the last sweep) and ``qbridge.wake.QUEUE`` (a stream of one entry,
which idle workers wait for).

A message is never decoded and encoded again: what is put around it is taken off by its length.
Redis does not undo a script that fails half-way, so none does anything that can fail after it has popped a message, but
for a command that the account may not run, which ``qbridge check`` finds. A full server allows all commands after a
write that it allows. An empty key is none, so anybody can make something else of it: a key of ours that is of another
type is deleted, a list is left alone, and what would go there stays where it is.
"""

# long because: all scripts work on the same keys, and are put together from the same few functions.

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

# Returns true, false if there was nothing to give back, nil if it stays claimed, because its list is none now.
_RETURN = """
local function give_back(claims, unacked, index, again, tag, claim, side, lost)
    local _, length, list = string.match(claim, '^([^%z]*)%z(%d+)%z(.*)$')
    if not list then return false end  -- no claim of ours
    local held = redis.call('HGET', unacked, tag)
    if held and type(redis.pcall('LLEN', list)) ~= 'number' then return nil, list end
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

_WRONG = """
local function is_wrong(answer)  -- the error of a command that a key of another type gives
    return type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE', 1, true)
end
"""

# For keys that nobody else has to do with. Another error than that ends the script, when the command is run again.
_OURS = (
    _WRONG
    + """
local function ours(key, command, ...)
    local answer = redis.pcall(command, key, ...)
    if type(answer) ~= 'table' or not answer.err then return answer end
    -- a stream to which somebody wrote the last possible entry takes no more either
    if is_wrong(answer) or string.find(answer.err, 'exhausted', 1, true) then redis.call('DEL', key) end
    return redis.call(command, key, ...)
end
"""
)

_WAKE = (
    _OURS
    + """
local function wake(stream)
    ours(stream, 'XADD', 'MAXLEN', '1', '*', 'w', '1')
    redis.call('PEXPIRE', stream, 3600000)
end
"""
)

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

SCHEDULE = Script(
    _OURS
    + """
ours(KEYS[2], 'HSET', ARGV[1], ARGV[3])
ours(KEYS[1], 'ZADD', ARGV[2], ARGV[1])
"""
)
"""Keys: schedule, scheduled. Args: name of the entry, due in ms, entry."""

POSTPONE = Script(
    _DROP
    + _OURS
    + """
ours(KEYS[6], 'HGET', ARGV[3])  -- both can be written, before the message is dropped
ours(KEYS[5], 'ZRANGE', 0, 0)
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
ours(claims, 'HGET', '')  -- a key of another type is found before anything is done: kombu's end the script
redis.call('HGET', unacked, '')
redis.call('ZRANGE', index, 0, 0)
ours(holders, 'ZRANGE', 0, 0)
local late = {}
for number = 7, 5 + 2 * settled, 2 do
    if not drop(claims, unacked, index, again, ARGV[number], ARGV[number + 1]) then
        late[#late + 1] = ARGV[number]
    end
end
local flags = 6 + 2 * settled
local names = ours(schedule, 'ZRANGEBYSCORE', '-inf', now, 'LIMIT', 0, 100)
if #names > 0 then ours(scheduled, 'HDEL', '') end  -- a write that a full server allows: then it allows LPUSH
for _, name in ipairs(names) do
    local entry = redis.call('HGET', scheduled, name)
    local list, stream, message = string.match(entry or '', '^([^%z]*)%z([^%z]*)%z(.*)$')
    if list and type(redis.pcall('LPUSH', list, message)) ~= 'number' then
        redis.call('ZADD', schedule, now + 5000, name)  -- its list is none now, which costs nobody else a claim
    else
        redis.call('ZREM', schedule, name)
        redis.call('HDEL', scheduled, name)
        -- an entry that somebody else made must not have any key deleted
        if list and string.find(stream, 'qbridge.wake.', 1, true) then pcall(wake, stream) end
    end
end
local function named(message)
    local properties = cjson.decode(message).properties
    local info = properties.delivery_info
    return properties.delivery_tag, info and info.exchange, info and info.routing_key
end
local seconds = clock[1] .. '.' .. string.format('%06d', tonumber(clock[2]))
local items, kept, wrong, skipped = {}, false, {}, {}
for first = 8, #KEYS, queues do
    local took = true
    while took and #items < limit do
        took = false
        for number = first, first + queues - 1 do
            local message = #items < limit and not skipped[number] and redis.pcall('RPOP', KEYS[number])
            if type(message) == 'table' then  -- an error: what was popped before it is for the caller
                skipped[number] = true
                if is_wrong(message) then
                    wrong[#wrong + 1] = KEYS[number]
                elseif #items == 0 then
                    redis.call('RPOP', KEYS[number])
                end
            elseif message then
                took = true
                local fine, tag, exchange, key = pcall(named, message)
                if not fine then  -- half a surrogate pair, which Python reads, and plain Celery writes
                    local whole = string.gsub(message, '\\\\u[dD][89a-fA-F]%x%x', '\\\\u001a')
                    fine, tag, exchange, key = pcall(named, whole)
                end
                if not fine or type(tag) ~= 'string' or tag == '' or string.find(tag, '\\26', 1, true) then
                    -- the same each time, so that its deliveries are counted; copies may be held at once
                    tag, exchange, key = redis.sha1hex(message), nil, nil
                    if redis.call('HEXISTS', claims, tag) == 1 then tag = tag .. '/' .. owner .. '/' .. #items end
                end
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
            end
        end
    end
end
if kept then redis.call('ZADD', holders, now + lease, holder) end
local due = redis.call('ZRANGE', schedule, 0, 0, 'WITHSCORES')[2]
return {now, due or '', late, items, wrong}
"""
)
"""Keys: holders, claims, unacked, index, again, schedule, scheduled, then the lists, step by step, a list per queue.

Args: holder, owner, lease in ms, most messages, number of queues, number of settled claims, tag and owner of each, and
for each list 1 if its messages are acknowledged. Answers: now, next due, tags that were not the caller's any more,
messages, and which of the lists are none. Of each message: its list's number, itself, the tag that it goes by, and its
earlier deliveries and losses. The tag is its own, or one that was made for it if Redis could read none in it.
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
local late, wrong = {}, nil
for number = 2, #ARGV, 2 do
    local tag, owner = ARGV[number], ARGV[number + 1]
    local claim = redis.call('HGET', KEYS[1], tag)
    if claim and string.sub(claim, 1, #owner + 1) == owner .. '\\0' then
        local given, list = give_back(KEYS[1], KEYS[2], KEYS[3], KEYS[4], tag, claim, ARGV[1], 0)
        if given == nil then wrong = list end
    else
        late[#late + 1] = tag
    end
end
if wrong then redis.call('LLEN', wrong) end  -- its error is the answer, once all others are back
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
local last = redis.pcall('GET', KEYS[6])
last = type(last) == 'string' and tonumber(last) or 0  -- anything else says nothing, and is written over
redis.call('SET', KEYS[6], now)
local gone, held, taken = {}, {}, 0
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
        local holder = string.match(all[number + 1], '^([^%z/]*)')
        local lost = gone[holder]
        if lost then
            local given = give_back(claims, KEYS[3], KEYS[4], KEYS[5], all[number], all[number + 1], 'RPUSH', lost)
            if given then taken = taken + 1 end
            if given == nil then held[holder] = true end
        end
    end
    for holder in pairs(gone) do
        if not held[holder] then redis.call('ZREM', holders, holder) end
    end
end
return taken
"""
)
"""Keys: holders, claims, unacked, index, again, swept. Answers: how many messages were taken over.

After a gap between sweeps, in which nobody could renew either, every holder has a full lease first. A holder whose
lease ended at 0 has said goodbye, which is no loss. A holder stays listed while something of it cannot be taken over.
"""

PURGE = Script("""
local count = 0
for number = 3, #KEYS do
    local length = redis.pcall('LLEN', KEYS[number])
    if type(length) == 'number' then count = count + length end  -- else it is no list: to be removed all the more
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
