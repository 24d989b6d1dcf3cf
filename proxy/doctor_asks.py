"""How `headrace doctor` asks a chain: requests whose answers are timed byte by byte."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from multidict import CIMultiDict

from proxy.doctor_rules import Arrival

#: For whatever is not a stream, seconds.
_ANSWER_S = 20.0
#: What is read of an answer that is not a stream: nobody's front page is interesting.
_ENOUGH_BYTES = 65536


class Unreachable(Exception):
    """No HTTP came back; the text says why."""


class Answer:
    """An answer, whole or cut off. `broken`: it ended without its end; `lasted_s` until then."""

    def __init__(self) -> None:
        self.status = 0
        self.version = ""
        self.fields: Mapping[str, str] = CIMultiDict()
        self.body = b""
        self.events: list[dict[str, Any]] = []
        self.arrivals: list[Arrival] = []
        self.broken = False
        self.lasted_s = 0.0

    def json(self) -> Any:
        """None if it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None

    @property
    def error_code(self) -> str | None:
        """Of one of Headrace's JSON errors."""
        document = self.json()
        error = document.get("error") if isinstance(document, dict) else None
        return str(error["code"]) if isinstance(error, dict) and "code" in error else None


class Chain:
    """A public address, and a session of HTTP/1.1 with it. `trusted`: its certificate was verified."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, context: ssl.SSLContext, *, trusted: bool
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.context = context if parts.scheme == "https" else None
        self.trusted = trusted
        self._session = session

    async def ask(self, path: str, method: str = "GET", timeout_s: float = _ANSWER_S, **how: Any) -> Answer:
        """One request; events are timed as they arrive. Raises Unreachable if there is no answer at all."""
        answer = Answer()
        limit = aiohttp.ClientTimeout(total=timeout_s)
        began_at = monotonic()
        try:
            async with self._session.request(
                method,
                f"{self.url}{path}",
                timeout=limit,
                allow_redirects=False,
                ssl=self.context or True,
                **how,
            ) as response:
                answer.status, answer.fields = response.status, response.headers
                version = response.version
                answer.version = f"{version.major}.{version.minor}" if version else ""
                await _read(response, answer, began_at)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if not answer.status:
                raise Unreachable(_why(error)) from error
            answer.broken = True
        answer.lasted_s = monotonic() - began_at
        return answer

    async def takes_body(self, path: str, size: int) -> bool:
        """Is a body of this size not refused by its length alone? None of it is sent."""
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=self.context, server_hostname=self.host if self.context else None
        )
        try:
            writer.write(
                f"POST {urlsplit(self.url).path}{path} HTTP/1.1\r\nHost: {self.host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {size}\r\n"
                "Expect: 100-continue\r\n\r\n".encode()
            )
            async with asyncio.timeout(_ANSWER_S / 4):
                line = await reader.readline()
            return line.split(b" ")[1:2] != [b"413"]
        except (OSError, TimeoutError):
            return True  # whoever waits for the body has not refused it
        finally:
            writer.transport.abort()


@asynccontextmanager
async def opened(url: str, context: ssl.SSLContext, *, trusted: bool) -> AsyncIterator[Chain]:
    """A chain; its connections are closed at the end."""
    async with aiohttp.ClientSession(
        auto_decompress=False, headers={"User-Agent": "headrace-doctor"}
    ) as session:
        yield Chain(url, session, context, trusted=trusted)


def new_id() -> str:
    return f"doctor-{secrets.token_hex(8)}"


async def _read(response: aiohttp.ClientResponse, answer: Answer, began_at: float) -> None:
    """The body; of an event stream each event with the time at which it was complete."""
    unpack = zlib.decompressobj(31) if response.headers.get("Content-Encoding") == "gzip" else None
    streams = response.content_type == "text/event-stream"
    rest = b""
    async for data in response.content.iter_any():
        now_s = monotonic() - began_at
        text = unpack.decompress(data) if unpack is not None else data
        if len(answer.body) < _ENOUGH_BYTES:
            answer.body += text
        if streams:
            *whole, rest = (rest + text).split(b"\n\n")
            for event in whole:
                _note(event, now_s, answer)


def _note(event: bytes, now_s: float, answer: Answer) -> None:
    for line in event.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        try:
            document = msgspec.json.decode(line[6:])
        except msgspec.DecodeError:
            continue
        answer.events.append(document)
        answer.arrivals.append(Arrival(float(document.get("sent_s", 0.0)), now_s))


class Handshake(msgspec.Struct, frozen=True):
    """`refused`: why the certificate is not trusted; the rest is then unknown."""

    refused: str | None = None
    protocol: str = ""
    alpn: str | None = None
    days_left: float = 0.0


async def shake_hands(url: str, context: ssl.SSLContext) -> Handshake:
    """TLS with the best that the other side offers. Raises Unreachable."""
    parts = urlsplit(url)
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        async with asyncio.timeout(_ANSWER_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 443, ssl=context)
    except ssl.SSLCertVerificationError as error:
        return Handshake(refused=error.verify_message)
    except (OSError, TimeoutError) as error:
        raise Unreachable(_why(error)) from error
    secured = writer.get_extra_info("ssl_object")
    ends_at = ssl.cert_time_to_seconds(secured.getpeercert()["notAfter"])
    found = Handshake(None, secured.version(), secured.selected_alpn_protocol(), (ends_at - time()) / 86400)
    writer.transport.abort()
    return found


def _why(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
