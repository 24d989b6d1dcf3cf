"""The decisions of proxy.state.redis as Lua scripts: each runs alone on the server, so each is atomic.

Times. A Lua number is a double, exact to 2^53, and nanoseconds since 1970 are 200 times that. Bucket times
are therefore pairs of whole seconds and nanoseconds (0 to 999,999,999; of a negative time the seconds are
rounded down), which `add`, `sub` and `less` keep in that form: the sums are those of proxy.bucket to the last
nanosecond. Slots and budgets need no more than microseconds: exact until the year 2255.

Every script begins with the clock: ARGV 1 and 2 are now, or -1 for the server's own TIME.
Every write carries a TTL, in milliseconds. What is written, the prefix being that of proxy.state.redis:

    bucket:HASH   string  the tat as seconds.nanoseconds
    budget:HASH   string  amount, end of the period in us
    slot:HASH     hash    OWNER:EPOCH -> places held
    owner:OWNER   hash    epoch (us of its first lease), until (us), one field a lease

A slot counts for as long as its owner's key has the same epoch and an `until` that is not over. An owner that
was silent for too long gets a new epoch with its next lease, so what it held before stays free.

A script that Redis refuses for want of memory or because it is a replica was refused at its first write, and
has changed nothing (scriptVerifyOOM and scriptVerifyWriteCommandAllow in script.c: later writes always pass).
That is why a lease's field is removed before its places, and a TTL is set before a sign of life: HDEL and
PEXPIRE are allowed when memory is full, HINCRBY and HSET are not.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """The text for EVAL, its SHA-1 for EVALSHA."""

    text: str
    sha: str


def _script(*parts: str) -> Script:
    text = "\n".join(part.strip() for part in parts)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_CLOCK = """
local now_s, now_ns = tonumber(ARGV[1]), tonumber(ARGV[2])
if now_s < 0 then
  local time = redis.call('TIME')
  now_s, now_ns = tonumber(time[1]), tonumber(time[2]) * 1000
end
local now_us = now_s * 1000000 + math.floor(now_ns / 1000)
"""

_BUCKET = """
local GIGA = 1000000000
local function add(s, ns, more_s, more_ns)
  if ns + more_ns >= GIGA then return s + more_s + 1, ns + more_ns - GIGA end
  return s + more_s, ns + more_ns
end
local function sub(s, ns, less_s, less_ns)
  if ns < less_ns then return s - less_s - 1, ns - less_ns + GIGA end
  return s - less_s, ns - less_ns
end
local function less(s, ns, than_s, than_ns)
  return s < than_s or (s == than_s and ns < than_ns)
end
-- One entry a distinct key: the tat, and what it was before this call.
local function read()
  local values, tats = redis.call('MGET', unpack(KEYS)), {}
  for i, key in ipairs(KEYS) do
    local s, ns = string.match(values[i] or '', '^(%d+)%.(%d+)$')
    s, ns = tonumber(s or 0), tonumber(ns or 0)
    tats[key] = {s = s, ns = ns, old_s = s, old_ns = ns}
  end
  return tats
end
local function write(key, tat, spare_ms)
  local s, ns = sub(tat.s, tat.ns, now_s, now_ns)
  local ttl_ms = math.max(s * 1000 + math.ceil(ns / 1000000), 0) + spare_ms
  redis.call('SET', key, string.format('%.0f.%09.0f', tat.s, tat.ns), 'PX', string.format('%.0f', ttl_ms))
end
"""

#: ARGV: now (2), spare_ms, then 4 a charge: cost, capacity. Says 1 or 0, then 2 a charge: the deficit that it
#: met, from which proxy.bucket makes the decision.
TAKE = _script(
    _CLOCK,
    _BUCKET,
    """
local tats, all, reply = read(), 1, {0}
for i, key in ipairs(KEYS) do
  local cost_s, cost_ns = tonumber(ARGV[4 * i]), tonumber(ARGV[4 * i + 1])
  local capacity_s, capacity_ns = tonumber(ARGV[4 * i + 2]), tonumber(ARGV[4 * i + 3])
  local tat = tats[key]
  local s, ns = sub(tat.s, tat.ns, now_s, now_ns)
  if s < 0 then s, ns = 0, 0 end
  reply[2 * i], reply[2 * i + 1] = s, ns
  local debt_s, debt_ns = add(capacity_s, capacity_ns, capacity_s, capacity_ns)
  if less(debt_s, debt_ns, s, ns) then s, ns = debt_s, debt_ns end
  s, ns = add(s, ns, cost_s, cost_ns)
  if less(capacity_s, capacity_ns, s, ns) then
    all = 0
    local lowest_s, lowest_ns = add(now_s, now_ns, debt_s, debt_ns)
    if less(lowest_s, lowest_ns, tat.s, tat.ns) then tat.s, tat.ns = lowest_s, lowest_ns end
  elseif cost_s + cost_ns > 0 then
    tat.s, tat.ns = add(now_s, now_ns, s, ns)
  end
end
for key, tat in pairs(tats) do
  local lower = less(tat.s, tat.ns, tat.old_s, tat.old_ns)
  local higher = less(tat.old_s, tat.old_ns, tat.s, tat.ns)
  if lower or (all == 1 and higher) then write(key, tat, tonumber(ARGV[3])) end
end
reply[1] = all
return reply
""",
)

#: ARGV: now (2). Says 2 a bucket: its deficit.
PEEK = _script(
    _CLOCK,
    _BUCKET,
    """
local tats, reply = read(), {}
for i, key in ipairs(KEYS) do
  local s, ns = sub(tats[key].s, tats[key].ns, now_s, now_ns)
  if s < 0 then s, ns = 0, 0 end
  reply[2 * i - 1], reply[2 * i] = s, ns
end
return reply
""",
)

#: ARGV: now (2), spare_ms, then 4 a charge: the correction, capacity.
SETTLE = _script(
    _CLOCK,
    _BUCKET,
    """
local tats = read()
for i, key in ipairs(KEYS) do
  local delta_s, delta_ns = tonumber(ARGV[4 * i]), tonumber(ARGV[4 * i + 1])
  local capacity_s, capacity_ns = tonumber(ARGV[4 * i + 2]), tonumber(ARGV[4 * i + 3])
  local tat = tats[key]
  local full = less(tat.s, tat.ns, now_s, now_ns)
  if delta_s < 0 then
    local bound_s, bound_ns = now_s, now_ns
    if full then bound_s, bound_ns = tat.s, tat.ns end
    tat.s, tat.ns = add(tat.s, tat.ns, delta_s, delta_ns)
    if less(tat.s, tat.ns, bound_s, bound_ns) then tat.s, tat.ns = bound_s, bound_ns end
  elseif delta_s + delta_ns > 0 then
    local bound_s, bound_ns = add(capacity_s, capacity_ns, capacity_s, capacity_ns)
    bound_s, bound_ns = add(now_s, now_ns, bound_s, bound_ns)
    if less(bound_s, bound_ns, tat.s, tat.ns) then bound_s, bound_ns = tat.s, tat.ns end
    if full then tat.s, tat.ns = now_s, now_ns end
    tat.s, tat.ns = add(tat.s, tat.ns, delta_s, delta_ns)
    if less(bound_s, bound_ns, tat.s, tat.ns) then tat.s, tat.ns = bound_s, bound_ns end
  end
end
for key, tat in pairs(tats) do
  if tat.s ~= tat.old_s or tat.ns ~= tat.old_ns then write(key, tat, tonumber(ARGV[3])) end
end
""",
)

_SLOT = """
-- KEYS[1] is the caller's own owner key; its epoch, or false if it holds nothing that still counts.
local function own_epoch()
  local own = redis.call('HMGET', KEYS[1], 'epoch', 'until')
  if own[1] and tonumber(own[2]) < now_us then
    redis.call('DEL', KEYS[1])
    return false
  end
  return own[1]
end
local function sign(lease_us, ttl_ms)
  redis.call('PEXPIRE', KEYS[1], ttl_ms)
  redis.call('HSET', KEYS[1], 'until', string.format('%.0f', now_us + lease_us))
end
"""

_SWEEP = """
-- The places that living owners hold; forgets those of the others. `owners` is the prefix of owner keys.
local epochs = {}
local function living(owner, owners)
  if epochs[owner] == nil then
    local other = redis.call('HMGET', owners .. owner, 'epoch', 'until')
    epochs[owner] = other[1] and tonumber(other[2]) >= now_us and other[1]
  end
  return epochs[owner]
end
local function sweep(key, owners)
  local cells, taken = redis.call('HGETALL', key), 0
  for i = 1, #cells, 2 do
    local owner, epoch = string.match(cells[i], '^(.*):(%d+)$')
    if living(owner, owners) == epoch then
      taken = taken + tonumber(cells[i + 1])
    else
      redis.call('HDEL', key, cells[i])
    end
  end
  return taken
end
"""

#: KEYS: owner, slots. ARGV: now (2), lease_us, owner_ttl_ms, slot_ttl_ms, owner, prefix of owner keys, number
#: of the lease, then 1 a slot: its limit. Says 1 or 0.
ACQUIRE = _script(
    _CLOCK,
    _SLOT,
    _SWEEP,
    """
local lease_us, owner_ttl_ms, slot_ttl_ms, owner, owners, lease = unpack(ARGV, 3, 8)
local epoch, wanted = own_epoch(), {}
for i = 2, #KEYS do
  local key, limit = KEYS[i], tonumber(ARGV[i + 7])
  wanted[key] = (wanted[key] or 0) + 1
  local taken = wanted[key]
  for _, places in ipairs(redis.call('HVALS', key)) do taken = taken + tonumber(places) end
  -- Who still lives is asked only where it decides.
  if taken > limit and sweep(key, owners) + wanted[key] > limit then
    if epoch then sign(lease_us, owner_ttl_ms) end
    return 0
  end
end
epoch = epoch or string.format('%.0f', now_us)
redis.call('HSET', KEYS[1], 'epoch', epoch, 'lease:' .. lease, '')
sign(lease_us, owner_ttl_ms)
for i = 2, #KEYS do
  redis.call('HINCRBY', KEYS[i], owner .. ':' .. epoch, 1)
  redis.call('PEXPIRE', KEYS[i], slot_ttl_ms)
end
return 1
""",
)

#: KEYS: owner, the slots of all leases in a row. ARGV: owner, then 2 a lease: its number, how many slots.
#: A lease that is not there (released, never granted, of an earlier epoch) costs nobody anything.
RELEASE = _script(
    """
local epoch, at = redis.call('HGET', KEYS[1], 'epoch'), 2
for i = 2, #ARGV, 2 do
  local places = tonumber(ARGV[i + 1])
  if epoch and redis.call('HDEL', KEYS[1], 'lease:' .. ARGV[i]) == 1 then
    for j = at, at + places - 1 do
      if redis.call('HINCRBY', KEYS[j], ARGV[1] .. ':' .. epoch, -1) <= 0 then
        redis.call('HDEL', KEYS[j], ARGV[1] .. ':' .. epoch)
      end
    end
  end
  at = at + places
end
""",
)

#: KEYS: owner, slots whose TTL begins again. ARGV: now (2), lease_us, owner_ttl_ms, slot_ttl_ms.
RENEW = _script(
    _CLOCK,
    _SLOT,
    """
if own_epoch() then
  sign(ARGV[3], ARGV[4])
  for i = 2, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[5]) end
end
""",
)

#: KEYS: slots. ARGV: now (2), prefix of owner keys. Says 1 a slot.
PEEK_SLOTS = _script(
    _CLOCK,
    _SWEEP,
    """
local reply = {}
for i, key in ipairs(KEYS) do reply[i] = sweep(key, ARGV[3]) end
return reply
""",
)

_BUDGET = """
-- What is spent, and when that period ends: the later one of the stored and the caller's.
local function period(key, ends_us)
  local spent, stored_us = string.match(redis.call('GET', key) or '', '^(%d+) (%d+)$')
  if not spent or tonumber(stored_us) <= now_us or tonumber(stored_us) < ends_us then
    return {spent = 0, ends_us = ends_us}
  end
  return {spent = tonumber(spent), ends_us = tonumber(stored_us)}
end
local function write(key, total, spare_ms)
  local ttl_ms = math.max(math.ceil((total.ends_us - now_us) / 1000), 0) + spare_ms
  local value = string.format('%.0f %.0f', total.spent, total.ends_us)
  redis.call('SET', key, value, 'PX', string.format('%.0f', ttl_ms))
end
"""

#: ARGV: now (2), spare_ms, then 3 a budget: amount, limit, ends_us. Says 1 or 0 a budget.
SPEND = _script(
    _CLOCK,
    _BUDGET,
    """
local totals, all, reply = {}, true, {}
for i, key in ipairs(KEYS) do
  local amount, limit = tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  totals[key] = totals[key] or period(key, tonumber(ARGV[3 * i + 3]))
  totals[key].spent = totals[key].spent + amount
  reply[i] = totals[key].spent <= limit and 1 or 0
  all = all and reply[i] == 1
end
if all then
  for key, total in pairs(totals) do write(key, total, tonumber(ARGV[3])) end
end
return reply
""",
)

#: ARGV: now (2), spare_ms, the most that is kept, then 2 a budget: amount, ends_us.
SETTLE_SPEND = _script(
    _CLOCK,
    _BUDGET,
    """
for i, key in ipairs(KEYS) do
  local amount, ends_us = tonumber(ARGV[2 * i + 3]), tonumber(ARGV[2 * i + 4])
  local total = period(key, ends_us)
  if now_us < total.ends_us and total.ends_us == ends_us then
    total.spent = math.min(math.max(total.spent + amount, 0), tonumber(ARGV[4]))
    write(key, total, tonumber(ARGV[3]))
  end
end
""",
)

#: ARGV: now (2). Says 1 a budget.
PEEK_SPEND = _script(
    _CLOCK,
    _BUDGET,
    """
local reply = {}
for i, key in ipairs(KEYS) do reply[i] = period(key, 0).spent end
return reply
""",
)
