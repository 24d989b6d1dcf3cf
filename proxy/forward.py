"""The attempts of one request: whom to ask, whether again, after how long.

Until `ctx.committed` an attempt may fail and another one be made; from the first byte of the upstream's
answer on there is only one way: to the end, or to a visible break. What may be tried again is `retry`'s to
say, who is next `routing`'s.
"""

from __future__ import annotations

import asyncio
import math
import random
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import web

from proxy import answers, retry
from proxy.attempt import Answered, Attempt
from proxy.breaker import soonest_s
from proxy.context import Context, Phase
from proxy.errors import (
    Draining,
    HeadraceError,
    Killed,
    NoUpstreamAvailable,
    Reason,
    UpstreamConnectFailed,
    UpstreamDeadline,
    UpstreamFailed,
    UpstreamTimeout,
)
from proxy.pipe import TIMER_SLACK_S
from proxy.preamble import leading
from proxy.session import translate
from proxy.tasks import spawn
from proxy.wire import HELD_LIMIT

if TYPE_CHECKING:
    from proxy.attempt import Job
    from proxy.core import Core
    from proxy.deliver import Delivery
    from proxy.routing import Turns
    from proxy.seat import Seat
    from proxy.targets import Target
    from proxy.upstream import Exchange


#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_FIRST_BYTE, _AGAIN = Phase.FIRST_BYTE, retry.Verdict.AGAIN


class Forwarding:
    """One request on its way through the upstreams."""

    __slots__ = (
        "_account",
        "_beat_at",
        "_budget",
        "_ctx",
        "_delivery",
        "_lost",
        "_may_have_reached",
        "_metrics",
        "_policy",
        "_reached",
        "_seat",
        "_server_errors",
        "_stale",
        "_streams",
        "_total_at",
        "_turns",
        "_verdict",
    )

    def __init__(self, core: Core, ctx: Context, delivery: Delivery, seat: Seat) -> None:
        self._ctx = ctx
        self._delivery = delivery
        self._seat = seat
        self._metrics = core.metrics
        self._policy = core.config.retry
        self._streams = core.config.streams
        self._budget = core.retry_budget
        self._verdict = _AGAIN  # of all failures so far: NO stays NO
        self._lost: tuple[UpstreamFailed, Target] | None = None  # the last failure
        self._stale = False  # this request has already been repeated because of a stale connection
        self._reached = False
        self._may_have_reached = 0  # attempts of the public way that are under way: it cannot tell
        self._server_errors = 0
        self._account: retry.Account
        self._turns: Turns[Target]
        self._total_at: float
        self._beat_at: float

    async def run(self, job: Job, turns: Turns[Target], first: Target) -> web.StreamResponse:
        """Returns when the last byte has gone to the caller; raises HeadraceError if nothing has."""
        self._set_out(job, turns, first)
        target: Target | None = first
        fresh = False
        try:
            while target is not None:
                attempt = self._begin(job, target, fresh=fresh)
                if attempt is not None and (response := await self._try(job, attempt)) is not None:
                    return response
                target, fresh = await self._whom(failed=attempt is not None)
            return self._last()
        except HeadraceError as error:
            failure = error
        except asyncio.CancelledError:
            if self._ctx.stopped is None:
                raise  # the caller has left
            failure = _stopped(self._ctx.stopped)
        finally:
            self._account.close()
        if not self._delivery.started:
            raise failure
        return await self._delivery.break_off(failure)

    def _set_out(self, job: Job, turns: Turns[Target], first: Target) -> None:
        delivery, now = self._delivery, monotonic()
        self._turns = turns
        self._total_at = delivery.total_at = now + first.upstream.timeouts.total
        delivery.reshape = job.reshape
        self._beat_at = math.inf
        if job.wants_stream:
            delivery.wraps = self._streams.wrap_json
            self._beat_at = now + (self._streams.commit_after or math.inf)
        self._account = self._budget.open()  # from here on `run` owes its end

    # ── one after the other ──────────────────────────────────────────────────────────────────────────────

    async def _whom(self, *, failed: bool) -> tuple[Target | None, bool]:
        """Who is asked next, and whether on a fresh connection; None: nobody any more. failed: the last one
        was asked; else its breaker let nothing pass."""
        if failed:
            assert self._lost is not None
            target = self._lost[1]
            self._is_with(target)
            if self._ctx.committed or self._verdict is retry.Verdict.NO:
                return None, False
            if self._verdict is retry.Verdict.FRESH and await self._may_repeat(target):
                return target, True
        return await self._next(), False

    async def _may_repeat(self, target: Target) -> bool:
        """At once, on a fresh connection. Of two that raced, the slot of one has been given back."""
        if monotonic() >= self._total_at or not self._account.take():
            return False
        return await self._seat.change(target.upstream)

    async def _next(self) -> Target | None:
        """Whom to ask instead, once it may be asked; None: nobody, or there is no budget or time for it."""
        found = None
        try:
            found = await self._find()
        finally:
            if found is None:
                self._account.give_back(reached=False)  # what it took was for nothing
        return found

    async def _find(self) -> Target | None:
        while (turn := self._turns.next()) is not None:
            target, at = turn
            if max(at, monotonic()) >= self._total_at or not self._account.take():
                return None
            if await self._seat.change(target.upstream):
                await self._pause(at, target)
                return target
            self._turns.rest(target, math.inf)  # full: a failover waits for no slot
        return None

    async def _pause(self, until: float, target: Target) -> None:
        while (now := monotonic()) < until:
            await asyncio.sleep(min(until, self._beat_at) - now)
            if monotonic() >= self._beat_at:
                await self._beat(target)

    def _last(self) -> web.StreamResponse:
        """The last upstream answer passes as it is."""
        if self._lost is None:
            raise nobody_available(self._turns)
        error, target = self._lost
        if not isinstance(error, Answered):
            raise error
        if self._delivery.started:
            raise answers.late_refusal(error.answer.status)
        return self._delivery.pass_on(error.answer, target)

    # ── one attempt ──────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, job: Job, target: Target, *, fresh: bool = False) -> Attempt | None:
        """None: its breaker does not let it pass."""
        attempt = Attempt(job, target, self._metrics, monotonic(), fresh=fresh)
        if not attempt.admitted:
            self._turns.rest(target, math.inf)
            return None
        ctx = self._ctx
        self._turns.took(target)
        ctx.attempts += 1
        ctx.phase = _FIRST_BYTE
        self._is_with(target)
        return attempt

    def _is_with(self, target: Target) -> None:
        self._ctx.upstream = target.upstream.name
        if target.label is not None:
            self._ctx.model = target.label

    async def _try(self, job: Job, attempt: Attempt) -> web.StreamResponse | None:
        """None: it has failed, and `_lost` says how."""
        ctx = self._ctx
        try:
            if job.hedge_after_s is None:
                await self._open(job, attempt)
            else:
                attempt = await self._race(job, attempt)  # the other one it has closed itself
            ctx.first_byte_at = monotonic()
            try:
                delivery, exchange, target = self._delivery, attempt.exchange, attempt.target
                response = delivery.at_once(exchange, target)
                return response if response is not None else await delivery.answer(exchange, target)
            except UpstreamFailed as error:
                self._lose(job, attempt, error)
                return None
            finally:
                if ctx.reason is not None:  # also of a caller that left when it had it all
                    attempt.delivered(ctx.reason)
        except UpstreamFailed:
            return None  # `_open` has taken it down
        finally:
            attempt.close()

    async def _open(self, job: Job, attempt: Attempt) -> None:
        """Returns with the first byte of an answer that is the caller's. Raises UpstreamFailed."""
        ctx, exchange = self._ctx, attempt.exchange
        try:
            pushes = exchange.pushes
            if not pushes:
                self._may_have_reached += 1
            if not exchange.send_now():
                await self._send(exchange, attempt.upstream.timeouts.connect)
            if pushes:
                self._reached = True
            ctx.reached_upstream = True
            if ctx.sent_at is None:
                ctx.sent_at = exchange.last_at  # what came before is our own doing
            await exchange.arrival(1, self._wait_until(attempt, exchange.last_at, self._beat_at))
            held, _ = exchange.look()
            if not held or leading(held):  # an end, a preamble or a moment has come, of which it tells
                await self._first_byte(attempt)
            self._has_answered(attempt)
            if exchange.status >= 400 and exchange.status in self._policy.statuses:  # it has no others
                await attempt.refuse(self._total_at)
        except UpstreamFailed as error:
            self._lose(job, attempt, error)
            raise

    def _has_answered(self, attempt: Attempt) -> None:
        """Raises UpstreamRefusedUs and UpstreamInvalid for what is never passed on."""
        attempt.answered()
        self._reached = self._ctx.reached_upstream = True
        self._account.give_back(reached=True)
        status = attempt.exchange.status
        if status >= 500:
            self._server_errors += 1
            self._ctx.given_up = self._server_errors > 1
        answers.refuse_unusable(status)

    def _lose(self, job: Job, attempt: Attempt, error: UpstreamFailed) -> None:
        """Takes down what a failed attempt means for the next one."""
        attempt.failed(error)
        self._lost = error, attempt.target
        reached = not isinstance(error, UpstreamConnectFailed)
        self._account.give_back(reached=reached)
        self._may_have_reached -= not attempt.exchange.pushes
        self._reached = self._reached or reached
        self._ctx.reached_upstream = self._reached or self._may_have_reached > 0  # the other of two that race
        now, attempts = monotonic(), self._ctx.attempts
        failure = attempt.failure(job, error, stale_before=self._stale)
        verdict = retry.may_retry(failure, attempts, self._policy)
        if self._verdict is not retry.Verdict.NO:  # of two that raced, one may still be generating
            self._verdict = verdict
        self._stale = self._stale or verdict is retry.Verdict.FRESH
        left_s = self._total_at - now
        wait_s = retry.wait_s(failure, attempts - 1, self._policy, random.random, left_s)
        self._turns.rest(attempt.target, math.inf if wait_s is None else now + wait_s)

    # ── until the first byte ─────────────────────────────────────────────────────────────────────────────

    async def _send(self, exchange: Exchange, connect_s: float) -> None:
        left_s = self._total_at - monotonic()
        try:
            if connect_s < left_s:
                await exchange.send()
            else:  # only then: it costs 8 us
                async with asyncio.timeout(left_s):
                    await exchange.send()
        except HeadraceError:
            raise
        except TimeoutError:
            raise UpstreamDeadline from None
        except Exception as error:
            raise translate(error) from error

    async def _first_byte(self, attempt: Attempt) -> None:
        """Waits for the answer's own first byte; meanwhile, and only for streams, keeps the caller warm."""
        exchange = attempt.exchange
        first_byte_s = attempt.upstream.timeouts.first_byte
        preamble = 0  # bytes
        beats = True
        while True:
            beat_at = self._beat_at if beats else math.inf
            until = self._wait_until(attempt, exchange.asked_at, beat_at)
            if await exchange.hold(preamble + 1, until):
                held, end = exchange.look()
                preamble = leading(held, preamble)
                if preamble < len(held) or end is not None or preamble >= HELD_LIMIT:
                    return
                continue
            now = monotonic() + TIMER_SLACK_S
            if now >= self._total_at:
                raise UpstreamDeadline
            if now >= exchange.asked_at + first_byte_s:  # an upload that its caller still sends moves it
                raise UpstreamTimeout
            if beats and now >= self._beat_at:  # the other of two that race may have beaten
                # With a head that is no stream's 200 would be a lie, if it has not been told already.
                beats = self._delivery.started or not _is_no_stream(exchange)
                if beats:
                    await self._beat(attempt.target)

    def _wait_until(self, attempt: Attempt, asked_at: float, beat_at: float) -> float:
        """The first of three moments (`min` takes 0.1 us more)."""
        moment = asked_at + attempt.upstream.timeouts.first_byte
        if self._total_at < moment:
            moment = self._total_at
        return beat_at if beat_at < moment else moment

    async def _beat(self, target: Target) -> None:
        self._beat_at = monotonic() + (self._streams.heartbeat or math.inf)
        await self._delivery.keep_warm(target)

    # ── two at once ──────────────────────────────────────────────────────────────────────────────────────

    async def _race(self, job: Job, first: Attempt) -> Attempt:
        """Asks a second upstream too if the first is slow; who answers first stays, the other is closed."""
        tasks = {spawn(self._outcome(job, first), "attempt"): first}
        won: Attempt | None = None
        try:
            done, _ = await asyncio.wait(tasks, timeout=job.hedge_after_s)
            if not done and (hedge := await self._hedge(job, first.target)) is not None:
                tasks[spawn(self._outcome(job, hedge), "hedge")] = hedge
            won = await _first_to_answer(tasks)
            self._is_with(won.target)
            return won
        finally:
            for task, attempt in tasks.items():
                if attempt is not won:
                    task.cancel()
                    attempt.close()
            self._seat.keep(None if won is None else won.upstream)

    async def _outcome(self, job: Job, attempt: Attempt) -> Exception | None:
        """The failure as a value: nobody may be left to take an exception."""
        try:
            await self._open(job, attempt)
        except (HeadraceError, ConnectionError) as error:  # a caller that leaves is a ConnectionError
            return error
        return None

    async def _hedge(self, job: Job, first: Target) -> Attempt | None:
        """An attempt at another upstream of the same model, if there is one, and budget and a slot for it."""
        turn = self._turns.next()
        if turn is None or self._turns.asked(turn[0]) or self._ctx.attempts >= self._policy.attempts:
            return None
        target = turn[0]
        if target.fallback != first.fallback or not job.replayable:
            return None  # being slow is no reason for another model
        self._account.give_back(reached=True)
        if not self._account.take():
            return None
        hedge = self._begin(job, target) if await self._seat.add(target.upstream) else None
        if hedge is None:
            self._account.give_back(reached=False)
            self._seat.keep(None)
        return hedge


def _is_no_stream(exchange: Exchange) -> bool:
    return exchange.answered and not answers.is_event_stream(exchange.status, exchange.fields)


async def _first_to_answer(tasks: dict[asyncio.Task[Exception | None], Attempt]) -> Attempt:
    """Raises the last failure if all fail."""
    waiting = set(tasks)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.result()
            if error is None:
                return tasks[task]
        if not waiting:
            assert error is not None
            raise error


def nobody_available(turns: Turns[Target]) -> NoUpstreamAvailable:
    """Everything is open: with the time until the first of them lets a request pass."""
    return NoUpstreamAvailable(soonest_s([each.upstream.breaker for each in turns.all()], monotonic()))


def _stopped(reason: Reason) -> HeadraceError:
    """A cancellation that carries a reason (drain, kill) becomes that error."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    return Draining() if reason is Reason.DRAINED else Killed()
