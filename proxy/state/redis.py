"""The store of several machines: counters in Redis, exact over all workers of all of them.

One Lua script a decision (proxy.state.lua), on one clock: the server's own TIME, whatever `now` says. Redis 6
or newer, or Valkey. Redis Cluster is not supported: one decision touches keys of several hash slots. What
stands in Redis is lost with it: limits begin anew, and requests in flight have no place any more.

- Bucket decisions are those of proxy.bucket to the nanosecond. Amounts of budgets are exact up to 2^52, which
  in micro-dollars is 4.5 billion dollars; what is more is cut there.
- Names are hashed and keys begin with `headrace:`; Redis sees no credential, and an ACL user may be held to
  `~headrace:*`. The hash hides names from the eye, not from somebody who can guess them.
- A state is one owner, with a random name of its own. It gives signs of life by `renew` and `acquire`; if it
  was silent for `lease_s`, its slots are free again.
- Every verb ends within `budget_s` (proxy.state.link) or raises StoreUnavailable. Then it may have happened:
  a charge stays taken until its bucket refills. A slot does not: leases whose acquire or release was cut off
  are remembered, and released by the next `renew` that gets through. Of those at most 10,000: more, and the
  owner goes on under a new name, the old one's slots being free after `lease_s`.
- A caller that is cancelled cuts off nothing. Its verb goes on; a lease that comes too late is given back.

Microseconds a call on the same machine, with its task (best of 20 runs of 1,000; 2-core VM with other work,
Python 3.11, Redis 7.0, redis-py 8.1 without hiredis). About 22 of them are the server's:

    take 1 / 3 buckets              97 / 136      settle 1             81
    acquire and release 1 / 3       151 / 168     acquire, refused     79
    spend 2 budgets                 101           settle_spend 2       84
    peek 3 / peek_slots 3           106 / 84      renew                63
    take 3, 32 callers at once      107, that is 9,400 a second
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from redis.exceptions import ResponseError

from proxy import bucket
from proxy.state import lua
from proxy.state.errors import StoreUnavailable
from proxy.state.link import Link

if TYPE_CHECKING:
    from proxy.bucket import Decision
    from proxy.state import Charge, Lease, Slot, Spend

T = TypeVar("T")

PREFIX = "headrace:"
_GIGA = 1_000_000_000
#: Times are cut here (292 years): more than any capacity, and sums of a few still are exact in Lua.
_LONGEST_NS = 2**63
_MOST = 2**52
#: A key outlives what it says by this much, so that no rounding of milliseconds ends it too soon.
_SPARE_MS = 1000
#: The same with a caller's clock, of which Redis knows nothing: it may stand still for a whole test.
_SPARE_CALLERS_MS = 3_600_000
#: TTL of a slot's places; the owners that hold some begin it anew in each quarter of it.
_SLOT_TTL_S = 3600
_MOST_DOUBTS = 10_000
#: Doubtful leases that one `renew` clears: a millisecond or two of the server.
_DOUBTS_AT_ONCE = 500
_REMEMBERED = 8192


class Held(msgspec.Struct, frozen=True):
    """Slots of this store: a number within its owner, unique for as long as the owner has its name."""

    names: tuple[str, ...]
    owner: str
    number: int


class RedisState:
    """proxy.state.State on Redis.

    url: redis://, rediss:// or unix://, with user, password and database as redis-py reads them.
    budget_s: the longest that any verb takes. lease_s: the longest silence of an owner.
    connections: more verbs than that at once wait for each other, within their budget.
    callers_clock: believe the callers' `now` in place of Redis's TIME. For tests, which move time by hand.
    Errors: ValueError for a url that cannot be read. Nothing is connected before the first verb.
    """

    near = None

    def __init__(
        self,
        url: str,
        budget_s: float = 0.05,
        lease_s: float = 5.0,
        connections: int = 32,
        callers_clock: bool = False,
    ) -> None:
        self._link = Link(url, budget_s, connections)
        self._lease_us = int(lease_s * 1e6)
        self._callers_clock = callers_clock
        self._spare_ms = _SPARE_CALLERS_MS if callers_clock else _SPARE_MS
        self._owner_ttl_ms = self._lease_us // 1000 + self._spare_ms
        self._numbers = itertools.count(1)
        self._key = lru_cache(maxsize=_REMEMBERED)(_key)
        self._touched_s = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        """As an owner that nobody has heard of."""
        self._owner = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}"
        self._owner_key = f"{PREFIX}owner:{self._owner}"
        self._held: dict[int, Held] = {}
        self._doubts: dict[int, Held] = {}

    # ── buckets ──────────────────────────────────────────────────────────────────────────────────

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        args = [*self._clock(now), self._spare_ms]
        for charge in charges:
            interval, capacity, _ = bucket.terms(charge.rate_per_minute, charge.burst, 0.0)
            args += (*_pair(charge.amount * interval), *_pair(capacity))
        if not charges:
            return []
        names = [charge.bucket_id for charge in charges]
        answer = await self._ask(lua.TAKE, "bucket", names, args, _integers(1 + 2 * len(charges)))
        return _decisions(charges, answer[1:])

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        if not charges:
            return []
        names = [charge.bucket_id for charge in charges]
        deficits = await self._ask(lua.PEEK, "bucket", names, self._clock(now), _integers(2 * len(charges)))
        return _decisions(charges, deficits)

    async def settle(self, charges: Sequence[Charge], now: float) -> None:
        args = [*self._clock(now), self._spare_ms]
        for charge in charges:
            interval, capacity, _ = bucket.terms(charge.rate_per_minute, charge.burst, 0.0)
            args += (*_pair(charge.amount * interval), *_pair(capacity))
        if charges:
            await self._ask(lua.SETTLE, "bucket", [charge.bucket_id for charge in charges], args, _nothing)

    # ── slots ────────────────────────────────────────────────────────────────────────────────────

    async def acquire(self, slots: Sequence[Slot], now: float) -> Held | None:
        held = Held(tuple([slot.name for slot in slots]), self._owner, next(self._numbers))
        task = self._link.start(self._acquire(held, [slot.limit for slot in slots], now))
        try:
            granted = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda _: self._give_back(held))
            raise
        if isinstance(granted, StoreUnavailable):
            raise granted
        return held if granted else None

    async def release(self, lease: Lease) -> None:
        assert isinstance(lease, Held)
        if self._held.pop(lease.number, None) is lease:
            await self._link.call(self._release([lease]))

    def release_later(self, lease: Lease) -> None:
        """As `release`, but by the next `renew` that gets through: while Redis is known to be gone."""
        assert isinstance(lease, Held)
        if self._held.pop(lease.number, None) is lease:
            self._doubt([lease])

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        if not names:
            return []
        args = [*self._clock(now), f"{PREFIX}owner:"]
        return await self._ask(lua.PEEK_SLOTS, "slot", names, args, _integers(len(names)))

    async def renew(self, now: float) -> None:
        await self._link.call(self._renew(now))

    async def _acquire(self, held: Held, limits: Sequence[int], now: float) -> bool:
        args = [*self._clock(now), self._lease_us, self._owner_ttl_ms, _SLOT_TTL_S * 1000]
        args += [held.owner, f"{PREFIX}owner:", held.number, *limits]
        try:
            granted = await self._link.run(lua.ACQUIRE, self._keys_of([held]), args, _integer)
        except ResponseError:  # refused as a whole: nothing is held
            raise
        except BaseException:
            self._doubt([held])
            raise
        if granted:
            self._held[held.number] = held
        return bool(granted)

    def _give_back(self, held: Held) -> None:
        """What came too late for its caller."""
        if self._held.pop(held.number, None) is held:
            self._link.start(self._release([held]))

    async def _release(self, leases: Sequence[Held]) -> None:
        """Idempotent, and known to be done when it returns. All of one owner."""
        args: list[int | str] = [leases[0].owner]
        for held in leases:
            args += (held.number, len(held.names))
        try:
            await self._link.run(lua.RELEASE, self._keys_of(leases), args, _nothing)
        except BaseException:
            self._doubt(leases)
            raise

    async def _renew(self, now: float) -> None:
        if doubts := list(itertools.islice(self._doubts.values(), _DOUBTS_AT_ONCE)):
            await self._release(doubts)
            for held in doubts:
                self._doubts.pop(held.number, None)
        touched_s, names = time.monotonic(), set[str]()
        if due := touched_s > self._touched_s + _SLOT_TTL_S / 4:
            names.update(*[held.names for held in self._held.values()])
        keys = [self._owner_key, *[self._key("slot", name) for name in names]]
        args = [*self._clock(now), self._lease_us, self._owner_ttl_ms, _SLOT_TTL_S * 1000]
        await self._link.run(lua.RENEW, keys, args, _nothing)
        if due:
            self._touched_s = touched_s

    def _keys_of(self, leases: Sequence[Held]) -> list[str]:
        slots = [self._key("slot", name) for held in leases for name in held.names]
        return [f"{PREFIX}owner:{leases[0].owner}", *slots]

    def _doubt(self, leases: Iterable[Held]) -> None:
        self._doubts.update({held.number: held for held in leases if held.owner == self._owner})
        if len(self._doubts) > _MOST_DOUBTS:
            self._begin()

    # ── budgets ──────────────────────────────────────────────────────────────────────────────────

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        args = [*self._clock(now), self._spare_ms]
        for spend in spends:
            args += (_cut(spend.amount), _cut(spend.limit), _ends_us(spend))
        if not spends:
            return []
        names = [spend.name for spend in spends]
        within = await self._ask(lua.SPEND, "budget", names, args, _integers(len(spends)))
        return [answer == 1 for answer in within]

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None:
        args = [*self._clock(now), self._spare_ms, _MOST]
        for spend in spends:
            args += (_cut(spend.amount), _ends_us(spend))
        if spends:
            await self._ask(lua.SETTLE_SPEND, "budget", [spend.name for spend in spends], args, _nothing)

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        if not names:
            return []
        return await self._ask(lua.PEEK_SPEND, "budget", names, self._clock(now), _integers(len(names)))

    # ── the store itself ─────────────────────────────────────────────────────────────────────────

    async def probe(self) -> None:
        """Whether decisions would be taken: a write, so that a replica and a full memory say no.

        Errors: StoreUnavailable.
        """
        await self._link.call(self._link.command(("SET", f"{PREFIX}probe", 1, "PX", _SPARE_MS), _ok))

    async def close(self) -> None:
        """Frees all slots of this owner; if Redis is gone, the end of its lease will."""
        await self._link.start(self._link.command(("DEL", self._owner_key), _integer))
        await self._link.close()

    async def _ask(
        self,
        script: lua.Script,
        kind: str,
        names: Sequence[str],
        args: Sequence[int | str],
        read: Callable[[Any], T],
    ) -> T:
        keys = [self._key(kind, name) for name in names]
        return await self._link.call(self._link.run(script, keys, args, read))

    def _clock(self, now: float) -> list[int | str]:
        """What a script begins with."""
        return list(divmod(int(now * 1e9), _GIGA)) if self._callers_clock else [-1, 0]


def _key(kind: str, name: str) -> str:
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{PREFIX}{kind}:{digest}"


def _integers(count: int) -> Callable[[Any], list[int]]:
    def read(answer: Any) -> list[int]:
        if type(answer) is list and len(answer) == count and {*map(type, answer)} == {int}:
            return answer
        raise ValueError("not the integers of a script")

    return read


def _integer(answer: Any) -> int:
    if type(answer) is int:
        return answer
    raise ValueError("not an integer")


def _nothing(answer: Any) -> None:
    if answer is not None:
        raise ValueError("not the end of a script")


def _ok(answer: Any) -> None:
    if answer != b"OK":
        raise ValueError("not an OK")


def _pair(time_ns: int) -> tuple[int, int]:
    """Seconds and nanoseconds, as the scripts count; of a negative time the seconds are rounded down."""
    return divmod(min(max(time_ns, -_LONGEST_NS), _LONGEST_NS), _GIGA)


def _decisions(charges: Sequence[Charge], deficits: Sequence[int]) -> list[Decision]:
    """A deficit is the tat of a clock that shows 0: only the difference of the two counts."""
    return [
        bucket.take(
            deficits[2 * at] * _GIGA + deficits[2 * at + 1],
            charge.rate_per_minute,
            charge.burst,
            charge.amount,
            0.0,
        )[1]
        for at, charge in enumerate(charges)
    ]


def _cut(amount: int) -> int:
    return min(max(amount, -_MOST), _MOST)


def _ends_us(spend: Spend) -> int:
    return _cut(int(spend.resets_at * 1e6))
