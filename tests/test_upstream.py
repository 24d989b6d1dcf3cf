"""How an upstream is spoken to: credentials, the operator's headers and query, outbound proxy, TLS."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import traceback
from time import monotonic
from typing import Any

import msgspec
import pytest
import trustme
from yarl import URL

from proxy import schema
from proxy.breaker import Outcome
from proxy.errors import UpstreamConnectFailed, UpstreamFailed
from proxy.outgoing import Outgoing
from proxy.upstream import Exchange
from tests.kit.asking import ask, upstream, ways
from tests.kit.connect_proxy import connect_proxy
from tests.kit.lab import authority, plays, response, server_context
from tests.kit.upstreams import Call, scripted

pytestmark = pytest.mark.timeout(30)

OK = response(200, b"{}")
answers = plays(OK)


def outgoing(base_url: str = "http://up.example/v1", **settings: Any) -> Outgoing:
    section = msgspec.convert({"base_url": base_url, **settings}, schema.Upstream)
    return Outgoing(section, URL(base_url, encoded=True))


def lines_of(head: bytes) -> list[bytes]:
    """Header lines of a request, without the request line."""
    return head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]


def values_of(head: bytes, name: bytes) -> list[bytes]:
    pairs = (line.split(b": ", 1) for line in lines_of(head))
    return [pair[1] for pair in pairs if pair[0].lower() == name]


def target_of(head: bytes) -> bytes:
    return head.split(b" ", 2)[1]


# ── credentials ──────────────────────────────────────────────────────────────────────────────────────────


@ways
@pytest.mark.parametrize(
    ("auth", "name", "value"),
    [
        ("bearer", b"authorization", b"Bearer sk-1"),
        ("x-api-key", b"x-api-key", b"sk-1"),
        ("api-key", b"api-key", b"sk-1"),
    ],
)
async def test_auth_style(push: bool, auth: str, name: bytes, value: bytes) -> None:
    """The credential goes into the one field that `auth` says."""
    async with (
        scripted(answers) as there,
        upstream(there.url, push=push, api_key="sk-1", auth=auth) as up,
    ):
        assert await ask(up) == (200, b"{}")
        assert values_of(there.calls[0].head, name) == [value]
        assert there.calls[0].head.count(b"sk-1") == 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"api_key": ""}, {"api_key": "sk-1", "auth": "none"}, {"api_keys": ["sk-1"], "auth": "none"}],
)
def test_no_credential(settings: dict[str, Any]) -> None:
    """Without one, and with `auth: none`, no field of a credential goes out."""
    made = outgoing(**settings)
    assert made.own_fields(0) == ()
    assert made.lines(b"", 0) == b"Host: up.example\r\nVia: 1.1 headrace\r\nAccept-Encoding: identity\r\n"
    assert made.credentials == 1


@ways
async def test_several_credentials_in_turn(push: bool) -> None:
    """Each attempt has the next one; one that was refused rests alone; when all rest, one is taken anyway."""
    async with (
        scripted(answers) as there,
        upstream(there.url, push=push, api_keys=["k-a", "k-b", "k-c"]) as up,
    ):
        for _ in range(4):
            await ask(up, key=up.take_key(0.0))
        sent = [values_of(call.head, b"authorization")[0][-3:] for call in there.calls]
        assert sent == [b"k-a", b"k-b", b"k-c", b"k-a"]

    up.rest_key(1, None, 100.0)
    assert [up.take_key(101.0) for _ in range(4)] == [2, 0, 2, 0]
    assert up.spare_key(101.0)
    up.rest_key(0, 60.0, 101.0)
    up.rest_key(2, 20.0, 101.0)
    assert not up.spare_key(102.0)
    assert up.take_key(102.0) == 2  # its rest ends first
    assert up.spare_key(121.5)
    assert {up.take_key(200.0) for _ in range(3)} == {0, 1, 2}


@pytest.mark.parametrize("keys", [{"api_key": "k"}, {"api_keys": ["k"]}, {}])
async def test_a_single_credential_has_no_spare(keys: dict[str, Any]) -> None:
    """With one there is nothing to turn to, resting or not."""
    async with upstream("http://up.example", push=True, **keys) as up:
        assert [up.take_key(0.0), up.take_key(0.0), up.spare_key(0.0)] == [0, 0, False]
        up.rest_key(0, 60.0, 0.0)
        assert [up.take_key(1.0), up.spare_key(1.0)] == [0, False]


# ── the operator's headers ───────────────────────────────────────────────────────────────────────────────

CALLERS = (
    b"User-Agent: sdk/1\r\nanthropic-VERSION: caller\r\nX-Anthropic-Version-2: kept\r\n"
    b"Content-Type: application/json\r\nX-Quote: Anthropic-Version: kept\r\nx-tail: t\r\n"
)


def test_headers_replace_the_callers() -> None:
    """A field of the same name in any case goes, every time it is there; all others keep their bytes."""
    made = outgoing(headers={"Anthropic-Version": "ours", "X-Tail": "end", "X-New": "1"})
    lines = made.lines(CALLERS + b"ANTHROPIC-VERSION: twice\r\n", 0)
    assert lines.endswith(
        b"Anthropic-Version: ours\r\nX-Tail: end\r\nX-New: 1\r\n"
        b"User-Agent: sdk/1\r\nX-Anthropic-Version-2: kept\r\n"
        b"Content-Type: application/json\r\nX-Quote: Anthropic-Version: kept\r\n"
    )


def test_without_headers_the_callers_are_untouched() -> None:
    """Nothing is configured: the very bytes go behind the fixed lines."""
    assert outgoing().lines(CALLERS, 0).endswith(b"identity\r\n" + CALLERS)


def test_a_credential_in_headers_wins() -> None:
    """Whoever writes `headers: {authorization: …}` means that one, not a second one beside `api_key`."""
    made = outgoing(api_key="sk-1", headers={"authorization": "Special x", "VIA": "none"})
    assert made.own_fields(0) == (("authorization", "Special x"), ("VIA", "none"))
    assert b"sk-1" not in made.lines(b"", 0)
    assert b"1.1 headrace" not in made.lines(b"", 0)


# ── the operator's query ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/files", "/v1/files?api-version=2024-10-21&x=a%20b%26c"),
        ("/files?", "/v1/files?api-version=2024-10-21&x=a%20b%26c"),
        ("/files?after=%2F+z", "/v1/files?after=%2F+z&api-version=2024-10-21&x=a%20b%26c"),
        ("/files?api-version=1&limit=2", "/v1/files?limit=2&api-version=2024-10-21&x=a%20b%26c"),
        ("/files?limit=2&x&x=1", "/v1/files?limit=2&api-version=2024-10-21&x=a%20b%26c"),
        ("/files?api%2Dversion=1&a?b", "/v1/files?a?b&api-version=2024-10-21&x=a%20b%26c"),
        ("/files?xx=1&api-version2=", "/v1/files?xx=1&api-version2=&api-version=2024-10-21&x=a%20b%26c"),
    ],
)
def test_query_replaces_the_callers(path: str, target: str) -> None:
    """A parameter of the same name goes, however it is escaped; all others keep their bytes."""
    made = outgoing(query={"api-version": "2024-10-21", "x": "a b&c"})
    assert made.target(path) == target
    assert str(made.url(path)) == f"http://up.example{target}"


def test_without_query_the_target_is_untouched() -> None:
    """Nothing is configured: not a byte of the caller's query changes."""
    assert outgoing().target("/files?a=%zz&&b=+;c?d") == "/v1/files?a=%zz&&b=+;c?d"


@ways
async def test_azure(push: bool) -> None:
    """A deployment's path, `api-version` in the query and the credential in `api-key`."""
    async with (
        scripted(answers) as there,
        upstream(
            there.url.removesuffix("/v1") + "/openai/deployments/gpt-4o",
            push=push,
            api_key="azure-key",
            auth="api-key",
            query={"api-version": "2024-10-21"},
        ) as up,
    ):
        assert await ask(up, fields=b"Content-Type: application/json\r\n") == (200, b"{}")
        head = there.calls[0].head
        assert target_of(head) == b"/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
        assert values_of(head, b"api-key") == [b"azure-key"]
        assert values_of(head, b"authorization") == []
        assert values_of(head, b"host") == [f"127.0.0.1:{there.port}".encode()]


@pytest.mark.parametrize(
    ("base_url", "host"),
    [
        ("http://up.example/v1", b"up.example"),
        ("https://up.example", b"up.example"),
        ("https://up.example:8443/v1", b"up.example:8443"),
        ("http://[::1]:8080/v1", b"[::1]:8080"),
        ("http://up.example:443", b"up.example:443"),
    ],
)
def test_host(base_url: str, host: bytes) -> None:
    """Host is the authority, without the port that the scheme implies (RFC 9110 7.2)."""
    assert outgoing(base_url).lines(b"", 0).startswith(b"Host: " + host + b"\r\n")


# ── nothing comes from elsewhere ─────────────────────────────────────────────────────────────────────────


@ways
async def test_no_cookies_no_redirects_no_environment(push: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cookie is not sent back, a redirect is an answer, a proxy in the environment is nobody's business."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    away = response(307, b"{}", "Location: /elsewhere", "Set-Cookie: a=1; Path=/")
    async with scripted(plays(away)) as there, upstream(there.url, push=push) as up:
        assert [await ask(up), await ask(up)] == [(307, b"{}")] * 2
        assert len(there.calls) == 2
        assert values_of(there.calls[1].head, b"cookie") == []


@ways
@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
@pytest.mark.parametrize("ending", [Call.close, Call.reset], ids=["fin", "rst"])
async def test_nothing_is_sent_twice(push: bool, method: str, ending: Any) -> None:
    """An upstream that reads a request and closes has been asked exactly once: aiohttp's own second try of
    idempotent methods is off, on a new connection and on a kept one."""

    async def script(call: Call) -> None:
        if there.calls[0] is call or len(there.calls) == 2:
            ending(call)
        else:
            raise AssertionError(f"asked {len(there.calls)} times")

    async with scripted(script) as there, upstream(there.url, push=push) as up:
        with pytest.raises(UpstreamFailed):
            await ask(up, method=method)
        assert len(there.calls) == 1
        with pytest.raises(UpstreamFailed):
            await ask(up, method=method)
        assert len(there.calls) == 2


@ways
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_nothing_is_sent_twice_on_a_kept_connection(push: bool, method: str) -> None:
    """The same where the connection has served before."""

    async def script(call: Call) -> None:
        if len(there.calls) == 1:
            await call.send(OK)
        else:
            call.close()

    async with scripted(script) as there, upstream(there.url, push=push) as up:
        await ask(up, method=method)
        with pytest.raises(UpstreamFailed):
            await ask(up, method=method)
        assert len(there.calls) == 2
        assert there.connections == 1


# ── whether it is asked ──────────────────────────────────────────────────────────────────────────────────


async def test_available() -> None:
    """Healthy, not ejected, not full: all three."""
    settings = {"max_in_flight": 2, "breaker": {"failures": 1, "cool_down": 5.0}}
    async with upstream("http://up.example", push=True, **settings) as up:
        assert up.available(0.0)
        up.in_flight = 2
        assert [up.available(0.0), up.ready(0.0)] == [False, True]
        up.in_flight = 1
        assert up.available(0.0)
        up.healthy = False
        assert [up.available(0.0), up.ready(0.0)] == [False, False]
        up.healthy = True
        leave = up.breaker.admit(10.0)
        assert leave is not None
        up.breaker.record(leave, Outcome.FAILURE, 10.0)
        assert [up.available(11.0), up.available(15.0)] == [False, True]


async def test_without_a_limit_it_is_never_full() -> None:
    """No `max_in_flight`: the machine's slots decide."""
    async with upstream("http://up.example", push=True) as up:
        up.in_flight = 10**6
        assert up.available(0.0)


# ── outbound proxy ───────────────────────────────────────────────────────────────────────────────────────


@ways
@pytest.mark.parametrize("user", ["", "me:p%40ss"])
async def test_a_tunnel(push: bool, user: str) -> None:
    """https through a proxy: one CONNECT a connection, verified TLS inside, its credential only outside."""
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            scripted(answers, tls=server_context()) as there,
            connect_proxy() as proxy,
            upstream(there.url, push=push, ca_file=ca_file, proxy=proxy.url(user), api_key="sk-1") as up,
        ):
            assert [await ask(up), await ask(up)] == [(200, b"{}")] * 2
            assert up.connections() == (0, 1)
            (head,) = proxy.heads
            assert head.startswith(f"CONNECT localhost:{there.port} HTTP/1.1\r\n".encode())
            expected = [b"Basic bWU6cEBzcw=="] if user else []  # me:p@ss
            assert values_of(head, b"proxy-authorization") == expected
            assert b"sk-1" not in head
            for call in there.calls:
                assert target_of(call.head) == b"/v1/chat/completions"
                assert values_of(call.head, b"proxy-authorization") == []
            assert [there.connections, proxy.tunnels] == [1, 1]


@ways
@pytest.mark.parametrize("user", ["", "me:p%40ss"])
async def test_absolute_form(push: bool, user: str) -> None:
    """http through a proxy: the whole URL in the request line, the proxy's credential in each request."""
    async with (
        scripted(answers) as there,
        connect_proxy() as proxy,
        upstream(there.url, push=push, proxy=proxy.url(user), query={"v": "1"}) as up,
    ):
        assert [await ask(up, "/a?b=%2F"), await ask(up, "/a?b=%2F")] == [(200, b"{}")] * 2
        assert len(proxy.heads) == 2
        for head in proxy.heads:
            assert target_of(head) == f"{there.url}/a?b=%2F&v=1".encode()
            expected = [b"Basic bWU6cEBzcw=="] if user else []
            assert values_of(head, b"proxy-authorization") == expected
            assert values_of(head, b"host") == [f"127.0.0.1:{there.port}".encode()]
        assert there.connections == 1


@ways
@pytest.mark.parametrize("fault", ["refuses", "hangs", "closes"])
async def test_a_proxy_that_opens_no_tunnel(push: bool, fault: str) -> None:
    """No tunnel, no request: a failure to connect, in time, and its password is in no traceback."""
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            scripted(answers, tls=server_context()) as there,
            connect_proxy() as proxy,
            upstream(
                there.url,
                push=push,
                ca_file=ca_file,
                proxy=proxy.url("me:hush"),
                timeouts={"connect": 0.3},
                api_key="sk-1",
            ) as up,
        ):
            proxy.hang = fault == "hangs"
            proxy.refusal = b"407 Proxy Authentication Required" if fault == "refuses" else b""
            proxy.closes = fault == "closes"
            began = monotonic()
            # aiohttp's public client does not say that it was the proxy who closed.
            with pytest.raises(
                UpstreamConnectFailed if push or fault != "closes" else UpstreamFailed
            ) as caught:
                await ask(up)
            assert monotonic() - began < 3.0
            text = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(up)
            assert "hush" not in text
            assert "aHVzaA" not in text
            assert "sk-1" not in text
            assert there.calls == []
            assert up.connections() == (0, 0)


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────


def certificate(kind: str) -> ssl.SSLContext:
    """A server's side of TLS, with something wrong."""
    issuer = trustme.CA() if kind == "other authority" else authority()
    name = "elsewhere.example" if kind == "other host" else "localhost"
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    issued = issuer.issue_cert(name, not_after=past if kind == "expired" else None)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issued.configure_cert(context)
    return context


@ways
@pytest.mark.parametrize("kind", ["other authority", "other host", "expired", "public authorities"])
async def test_a_wrong_certificate(push: bool, kind: str) -> None:
    """A failure to connect, so that another upstream may be asked: not a byte of a request went."""
    with authority().cert_pem.tempfile() as ca_file:
        private = {} if kind == "public authorities" else {"ca_file": ca_file}
        async with (
            scripted(answers, tls=certificate(kind)) as there,
            upstream(there.url, push=push, api_key="sk-1", **private) as up,
        ):
            with pytest.raises(UpstreamConnectFailed):
                await ask(up)
            assert there.calls == []
            assert up.connections() == (0, 0)


@ways
async def test_a_private_authority(push: bool) -> None:
    """What `ca_file` signed is believed."""
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            scripted(answers, tls=server_context()) as there,
            upstream(there.url, push=push, ca_file=ca_file) as up,
        ):
            assert await ask(up) == (200, b"{}")
            assert isinstance(up.tls, ssl.SSLContext)
            assert up.tls.verify_mode is ssl.CERT_REQUIRED
            assert up.tls.check_hostname


@ways
async def test_a_server_that_speaks_no_tls(push: bool) -> None:
    """Plain HTTP behind https://: a failure to connect."""

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with upstream(f"https://127.0.0.1:{port}", push=push) as up:
            with pytest.raises(UpstreamConnectFailed):
                await ask(up)
    finally:
        server.close()


@ways
async def test_a_handshake_that_hangs(push: bool) -> None:
    """TLS counts into timeouts.connect."""
    held = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with upstream(f"https://127.0.0.1:{port}", push=push, timeouts={"connect": 0.2}) as up:
            began = monotonic()
            with pytest.raises(UpstreamConnectFailed):
                await ask(up)
            assert 0.19 <= monotonic() - began < 2.0
    finally:
        held.set()
        server.close()


# ── for whoever writes requests himself ───────────────────────────────────────────────────────────────────


async def test_url_and_own_fields() -> None:
    """Where a path is, and what goes along that is not the caller's."""
    async with upstream(
        "https://up.example:8443/v1",
        push=True,
        api_keys=["a", "b"],
        headers={"OpenAI-Beta": "realtime=v1"},
        query={"api-version": "1"},
    ) as up:
        assert str(up.url("/realtime?model=m")) == "https://up.example:8443/v1/realtime?model=m&api-version=1"
        assert up.own_fields(1) == [("Authorization", "Bearer b"), ("OpenAI-Beta", "realtime=v1")]
        assert type(up.own_fields(1)[1][1]) is str


def test_the_credential_is_in_no_text() -> None:
    """Neither repr nor str of what holds it."""
    section = msgspec.convert({"base_url": "http://up.example"}, schema.Upstream)
    section = msgspec.structs.replace(section, api_key=schema.Secret("sk-1"))
    made = Outgoing(section, URL("http://up.example"))
    assert "sk-1" not in f"{made!r}{made}{section!r}"
    assert ("Authorization", "Bearer sk-1") in made.own_fields(0)


async def test_the_credential_is_not_in_an_exchange() -> None:
    """Its text is of no use to anybody, and what it sends holds the credential."""
    async with upstream("http://127.0.0.1:9", push=True, api_key="sk-1") as up:
        exchange = up.exchange("POST", "/x", b"", b"{}")
        assert "sk-1" not in f"{exchange!r}{exchange}"
        assert b"Bearer sk-1" in exchange._head  # type: ignore[attr-defined] # of the wire
        exchange.close()


def test_the_first_lines_are_kept() -> None:
    """They are the same as made anew, for each method, path and credential; and no more are kept than the
    newest, whatever callers ask for."""
    made = outgoing(api_keys=["a", "b"], query={"v": "1"})
    asked = [
        (method, path, key) for method in ("GET", "PUT") for path in ("/x", "/x?v=2&w=3") for key in (0, 1)
    ]
    for _ in range(2):
        assert [made.opening(*each) for each in asked] == [made._opening(*each) for each in asked]
    assert len({made.opening(*each) for each in asked}) == len(asked)
    for number in range(1000):
        assert made.opening("GET", f"/x/{number}", 0).startswith(b"GET /v1/x/%d?v=1 HTTP/1.1\r\n" % number)
    assert made.opening.cache_info().currsize < 100  # type: ignore[attr-defined] # functools.lru_cache's


# ── waiting for an answer ────────────────────────────────────────────────────────────────────────────────


async def waited_s(exchange: Exchange, wait_s: float) -> float:
    """How long a wait without an answer takes."""
    began = monotonic()
    assert not await exchange.hold(1, began + wait_s)
    return monotonic() - began


async def test_waits_have_one_timer() -> None:
    """All waits on a connection, of one exchange and of the next: none ends before its moment or long after
    it, in whatever order longer and shorter ones come, and whether or not an earlier one was left."""
    quiet = asyncio.Event()

    async def script(call: Call) -> None:
        if len(there.calls) > 1:
            await quiet.wait()
        await call.send(OK)

    async with scripted(script) as there, upstream(f"http://127.0.0.1:{there.port}", push=True) as up:
        first = up.exchange("POST", "/x", b"", b"{}")
        await first.send()
        assert await first.hold(1, monotonic() + 0.15)  # its timer is still there when the next one waits
        first.close()
        exchange = up.exchange("POST", "/x", b"", b"{}")
        assert exchange.send_now()
        assert 0.29 < await waited_s(exchange, 0.3) < 1.0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchange.hold(1, monotonic() + 0.05), 0.02)
        await asyncio.sleep(0.1)  # it rings, and nobody waits
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchange.hold(1, monotonic() + 60), 0.02)
        for wait_s in (0.05, 0.2, 0.01, 0.1):
            assert wait_s - 0.01 < await waited_s(exchange, wait_s) < wait_s + 0.7
        waiting = asyncio.ensure_future(exchange.hold(1, monotonic() + 60))
        quiet.set()
        assert await asyncio.wait_for(waiting, 5)
        connection = exchange._protocol  # type: ignore[attr-defined] # of the wire
        exchange.close()
        connection.ring_at(monotonic() + 0.01)
        await asyncio.sleep(0.05)  # and now there is nobody
        assert connection._alarm is None
        assert (there.connections, up.connections()) == (1, (0, 1))


async def test_a_timer_ends_with_its_connection() -> None:
    """It would keep the connection for as long as an upstream may take to answer."""
    silent = scripted(plays(Call.close))
    async with silent as there, upstream(f"http://127.0.0.1:{there.port}", push=True) as up:
        exchange = up.exchange("POST", "/x", b"", b"{}")
        await exchange.send()
        with pytest.raises(UpstreamFailed):
            await exchange.hold(1, monotonic() + 3600)
        alarm = exchange._protocol._alarm  # type: ignore[attr-defined] # of the wire
        assert alarm.cancelled()
        exchange.close()
