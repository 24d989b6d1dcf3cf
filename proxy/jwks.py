"""The public keys of an identity service, fetched in the background.

The last good set stays while the service is down, sends nonsense or answers slowly. A token that names an
unknown key makes one fetch, which all requests that arrive meanwhile share, and a few more in a row at most:
whoever invents key ids cannot turn Headrace against the service.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp
import structlog

from proxy import bucket, tasks
from proxy.webtoken import Algorithm, KeyRing, SigningKey, parse_jwks

#: Seconds between two fetches; providers ask for minutes to hours.
_INTERVAL_S = 300.0
#: Seconds until the next try after a failure.
_RETRY_S = 10.0
#: Of one fetch, from the first packet to the last.
_TIMEOUT_S = 5.0
#: A set of a hundred RSA keys of 4096 bits has 80 KB.
_MAX_BYTES = 256 * 1024
#: Fetches that unknown key ids may cause: three in a row, then one in 10 s.
_UNKNOWN_PER_MINUTE, _UNKNOWN_BURST = 6.0, 3


class Jwks:
    """A SigningKeys that follows `url`. Times are seconds of the loop's clock."""

    def __init__(self, url: str, algorithms: tuple[Algorithm, ...], timeout_s: float = _TIMEOUT_S) -> None:
        self.failing = False
        self._url = url
        self._host = urlsplit(url).hostname  # for the log: the rest may hold a password
        self._algorithms = algorithms
        self._timeout_s = timeout_s
        self._ring = KeyRing()
        self._unknown_tat_ns = 0
        self._fetching: asyncio.Task[bool] | None = None
        self._task: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    def find(self, kid: str | None, algorithm: Algorithm) -> SigningKey | None:
        """Among the keys of the last good set."""
        return self._ring.find(kid, algorithm)

    async def start(self) -> None:
        """Returns after the first fetch, good or bad: an identity service that is down keeps nothing else
        from being served."""
        self._session = aiohttp.ClientSession(
            # identity, and no decoding: what arrives is what is counted against the limit.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            trust_env=False,
        )
        await self._fetch()
        self._task = tasks.spawn(self._follow(), "jwks")

    async def close(self) -> None:
        """Ends the background work and its connection."""
        running = [task for task in (self._task, self._fetching) if task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        if self._session is not None:
            await self._session.close()

    async def refetch(self) -> bool:
        """Because of an unknown key id: True if the set is now fresh, False if it failed or is too early.

        Who leaves while waiting does not stop the fetch for the others.
        """
        if self._fetching is None:
            now = asyncio.get_running_loop().time()
            self._unknown_tat_ns, decision = bucket.take(
                self._unknown_tat_ns, _UNKNOWN_PER_MINUTE, _UNKNOWN_BURST, 1, now
            )
            if not decision.allowed:
                return False
            self._fetching = tasks.spawn(self._fetch(), "jwks refetch")
            self._fetching.add_done_callback(self._fetched)
        fetching = self._fetching
        await asyncio.wait([fetching])
        return not fetching.cancelled() and fetching.result()

    def _fetched(self, _: asyncio.Task[bool]) -> None:
        self._fetching = None

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S if self.failing else _INTERVAL_S)
            await self._fetch()

    async def _fetch(self) -> bool:
        """Never raises."""
        try:
            self._ring = parse_jwks(await self._body(), self._algorithms)
        except Exception as error:  # whatever is published there: if this ended, no new key would ever arrive
            self._note(error)
            return False
        self._note(None)
        return True

    async def _body(self) -> bytes:
        assert self._session is not None
        # A redirect could lead anywhere: the address is configured, and is asked for as it stands.
        async with self._session.get(self._url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"answered {response.status}")
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > _MAX_BYTES:
                    raise ValueError(f"is larger than {_MAX_BYTES} bytes")
            return bytes(body)

    def _note(self, error: Exception | None) -> None:
        """One line for each change of state, not for each try."""
        if (error is not None) == self.failing:
            return
        self.failing = error is not None
        log = structlog.get_logger()
        if error is None:
            log.info("jwks_recovered", host=self._host, keys=len(self._ring))
        else:
            # Our own words; of the client's only the kind, for its text may quote the answer.
            why = str(error) if type(error) is ValueError else type(error).__name__
            log.error("jwks_failed", host=self._host, why=why, keys=len(self._ring))
