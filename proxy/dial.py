"""The opening of a WebSocket to an upstream: one try after the other, until one is accepted.

No message has gone to anybody yet and an opening is a GET, so what `retry` allows for safe methods may be
tried again, at the next upstream. Every try ends in `Attempt.close`, which reports once: to the breaker, to
the metrics, to the pool of credentials.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from time import monotonic, time
from typing import TYPE_CHECKING, Literal, NamedTuple

import aiohttp

from proxy import answers, pool, retry
from proxy.breaker import Outcome, Pass, outcome_of_error, outcome_of_status
from proxy.context import Context, Phase
from proxy.errors import (
    Reason,
    UpstreamConnectFailed,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamRefusedUs,
    UpstreamTimeout,
)
from proxy.forward import nobody_available
from proxy.headers import RawHeaders, value_of
from proxy.routing import RESTING_STATUSES
from proxy.session import translate
from proxy.wire_connection import forbid_silent_retry

if TYPE_CHECKING:
    from proxy.core import Core
    from proxy.metrics import Metrics
    from proxy.retry import Account
    from proxy.routing import Turns
    from proxy.seat import Seat
    from proxy.targets import Target
    from proxy.upstream import Upstream

#: Bytes of one message of an upstream: SDKs set no limit, OpenAI's largest event is 15 MiB of audio, and a
#: generated image in base64 stays below this; without any limit one upstream could fill the memory of all.
UPSTREAM_MESSAGE = 64 * 2**20
#: Seconds that a side gets to answer a Close frame: less than a drain leaves for last words (1 s).
CLOSE_S = 0.75

UpstreamSocket = aiohttp.ClientWebSocketResponse[Literal[False]]


class Opening(NamedTuple):
    """What is asked of an upstream. path: the caller's, with its query."""

    path: str
    fields: Sequence[tuple[str, str]]
    protocols: Sequence[str]


class Declined(UpstreamFailed):
    """The upstream answered the opening with an ordinary status."""

    result = "status"

    def __init__(self, answered: int) -> None:
        super().__init__()
        self.answered = answered


# ── the attempts ─────────────────────────────────────────────────────────────────────────────────────────


class Dialer:
    """Finds the upstream of one session. `opening` says what is asked of a target."""

    def __init__(self, core: Core, ctx: Context, seat: Seat, opening: Callable[[Target], Opening]) -> None:
        self._ctx = ctx
        self._seat = seat
        self._opening = opening
        self._metrics = core.metrics
        self._policy = core.config.retry
        self._budget = core.retry_budget

    async def dial(self, turns: Turns[Target], first: Target) -> Attempt:
        """The first that accepts; `close` is owed. Raises UpstreamFailed, NoUpstreamAvailable."""
        account = self._budget.open()
        lost: UpstreamFailed | None = None
        target: Target | None = first
        try:
            while target is not None:
                attempt = Attempt(self._ctx, self._metrics, target)
                if attempt.admitted():
                    turns.took(target)
                    try:
                        await self._open(attempt)
                        account.give_back(reached=True)
                        return attempt
                    except UpstreamFailed as error:
                        lost = error
                    account.give_back(reached=not isinstance(lost, UpstreamConnectFailed))
                    if not self._may_go_on(attempt, lost):
                        break
                if not attempt.has_spare_key():
                    turns.rest(target, math.inf)
                target = await self._next(turns, account)
        finally:
            account.close()
        raise lost or nobody_available(turns)

    async def _open(self, attempt: Attempt) -> None:
        try:
            await attempt.open(self._opening(attempt.target))
        except BaseException:
            await attempt.close(None)
            raise

    async def _next(self, turns: Turns[Target], account: Account) -> Target | None:
        """Whom to ask instead: nobody is asked twice, but with another credential."""
        while (turn := turns.next()) is not None:
            if not account.take():
                return None
            if await self._seat.change(turn[0].upstream):
                return turn[0]
            turns.rest(turn[0], math.inf)  # full: a failover waits for no slot
        return None

    def _may_go_on(self, attempt: Attempt, error: UpstreamFailed) -> bool:
        if self._ctx.attempts >= self._policy.attempts:
            return False
        if attempt.has_spare_key():
            return True
        if isinstance(error, Declined):
            return error.answered in self._policy.statuses
        refused = isinstance(error, UpstreamRefusedUs)  # our credential is bad, and there is no other
        return not refused and retry.TABLE[retry.kind_of(error)][0] is retry.Verdict.AGAIN


class Attempt:
    """One try at one upstream: what it takes, and gives back in `close`."""

    def __init__(self, ctx: Context, metrics: Metrics, target: Target) -> None:
        self.target = target
        self.line = Line(target.upstream)
        self._ctx = ctx
        self._metrics = metrics
        self._leave: Pass | None = None
        self._key = 0
        self._refused = False
        self._outcome = Outcome.NEUTRAL
        self._result = "cancelled"

    def admitted(self) -> bool:
        """Whether its breaker lets it pass. If so, `close` is owed."""
        upstream = self.target.upstream
        self._key = upstream.take_key(monotonic())
        self._leave = upstream.breaker.admit(monotonic())
        if self._leave is None:
            return False
        upstream.in_flight += 1
        return True

    async def open(self, opening: Opening) -> None:
        """Raises UpstreamFailed."""
        ctx, target = self._ctx, self.target
        ctx.attempts += 1
        ctx.phase = Phase.FIRST_BYTE
        ctx.upstream = target.upstream.name
        if target.label is not None:
            ctx.model = target.label
        if not ctx.committed:  # else the time until now was the caller's own
            ctx.sent_at = monotonic()
        try:
            await self.line.open(opening, self._key)
        except UpstreamFailed as error:
            self._failed(error)
            raise
        ctx.reached_upstream = True
        self._result = "ok"
        self._outcome = Outcome.OK

    def has_spare_key(self) -> bool:
        """Its credential was refused, and the same upstream may be asked with another one."""
        return self._refused and self.target.upstream.spare_key(monotonic())

    async def close(self, reason: Reason | None) -> None:
        """reason: what the session ended for; None: there was none."""
        upstream, now = self.target.upstream, monotonic()
        assert self._leave is not None
        upstream.in_flight -= 1
        upstream.breaker.record(self._leave, self._outcome, now)
        if self._outcome is Outcome.OK and reason in (Reason.UPSTREAM_CUT, Reason.UPSTREAM_STALL):
            upstream.breaker.record(self._leave, Outcome.FAILURE, now)
        if self._result == "ok" and reason is not None:
            self._result = _RESULTS.get(reason, "ok")
        self._metrics.upstream_attempts.add((upstream.name, self._result))
        await self.line.close()

    def _failed(self, error: UpstreamFailed) -> None:
        upstream = self.target.upstream
        self._result = error.result
        self._ctx.reached_upstream |= not isinstance(error, UpstreamConnectFailed)
        self._outcome = outcome_of_error(error)
        status = self.line.status
        if isinstance(error, Declined):
            self._outcome = outcome_of_status(status, upstream.settings.breaker.statuses)
        if status in RESTING_STATUSES:
            self._refused = True
            after = retry.parse_retry_after(value_of(self.line.fields, b"retry-after"), None, time())
            upstream.rest_key(self._key, after, monotonic())


#: The label of an attempt whose session ended for this; all others are ok.
_RESULTS = {
    Reason.UPSTREAM_CUT: "reset",
    Reason.UPSTREAM_ERROR: "reset",
    Reason.UPSTREAM_STALL: "timeout",
    Reason.CLIENT_GONE: "cancelled",
}


# ── the connection to an upstream ────────────────────────────────────────────────────────────────────────


class Line:
    """One WebSocket to an upstream, on a connection of its own: a pooled one might have died unnoticed, and
    an opening is never worth the doubt."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.status = 0  # of its answer, once there is one; and its fields
        self.fields: RawHeaders = ()
        self.socket: UpstreamSocket  # once it is open
        self._is_open = False
        self._transport: asyncio.Transport | None = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self, opening: Opening, key: int) -> None:
        """key: from `take_key`. Raises UpstreamFailed; `close` is owed in any case."""
        timeouts = self.upstream.timeouts
        self._session = session = self._make_session()
        try:
            async with asyncio.timeout(timeouts.connect + timeouts.first_byte):
                self.socket = await session.ws_connect(
                    self.upstream.url(opening.path),
                    headers=self._merged(opening.fields, key),
                    protocols=opening.protocols,
                    proxy=self.upstream.settings.proxy,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                    autoclose=False,
                    autoping=False,
                    max_msg_size=UPSTREAM_MESSAGE + 1,  # aiohttp refuses what is as large as its limit
                    decode_text=False,
                )
        except aiohttp.WSServerHandshakeError as error:
            answers.refuse_unusable(error.status)
            raise (Declined(error.status) if error.status >= 400 else UpstreamInvalid()) from None
        except aiohttp.ClientError as error:  # aiohttp's own timeouts are of this kind as well
            raise translate(error) from error
        except TimeoutError:
            raise UpstreamTimeout from None
        except (OSError, ValueError) as error:
            raise translate(error) from error
        self._is_open = True

    async def close(self) -> None:
        """Ends the connection; the Close frame has been sent before, if there was a session."""
        if self._is_open and not self.socket.closed:
            await self.socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)
        if self._transport is not None and self._transport.get_write_buffer_size():
            self._transport.abort()  # a close would wait for an upstream that takes nothing
        if self._session is not None:
            await self._session.close()

    def _make_session(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self.upstream.tls, socket_factory=pool.make_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=pool.exact_timeout(self.upstream.timeouts.connect),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            middlewares=(self._look,),
            max_line_size=65536,
            max_field_size=65536,
        )
        forbid_silent_retry(session)
        return session

    async def _look(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """`ws_connect` has no way to forbid redirects, and would send the credential after them."""
        response = await handler(request)
        self.status, self.fields = response.status, response.raw_headers
        if 300 <= response.status < 400:
            response.close()
            raise UpstreamInvalid
        if response.connection is not None:
            self._transport = response.connection.transport
        return response

    def _merged(self, fields: Sequence[tuple[str, str]], key: int) -> list[tuple[str, str]]:
        """The operator's fields replace the caller's."""
        own = self.upstream.own_fields(key)
        replaced = {name.lower() for name, _ in own}
        return [*own, ("Via", "1.1 headrace"), *(each for each in fields if each[0].lower() not in replaced)]
