"""The keys of an identity service: fetched in the background, kept through its faults; and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import structlog
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from proxy import authenticator as authenticator_module
from proxy import config, identity, jwks, keys
from proxy.authenticator import Authenticator
from proxy.errors import InvalidCredential, InvalidToken, StartError
from proxy.jwks import Jwks
from proxy.key_commands import create, revoke, rotate
from proxy.key_order import KeyOrder
from proxy.schema import Auth
from proxy.schema import Jwt as JwtSettings
from proxy.token_commands import issue
from proxy.webtoken import SigningKey, UnknownSigningKey, issue_token
from tests.kit.headrace import until

OLD_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
NEW_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
PLANS = ("basic", "pro")
SECRET = "s3cret-of-the-house-0123456789abcdef"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def entry(key: Any, kid: str) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}


def key_set(**named: Any) -> bytes:
    return json.dumps({"keys": [entry(key, kid) for kid, key in named.items()]}).encode()


def sign(key: Any, kid: str | None, **changed: Any) -> str:
    header = {name: changed.pop(name) for name in ("jku", "x5u", "jwk") if name in changed}
    if kid is not None:
        header["kid"] = kid
    now = int(time.time())
    body = {"iss": "headrace", "aud": "headrace", "sub": "alice", "plan": "pro", "exp": now + 600, **changed}
    return jwt.encode(body, key, "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256", headers=header)


class Service:
    """An identity service; `answer` is what it does with the next request."""

    def __init__(self) -> None:
        self.url = ""
        self.requests = 0
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = self.publish(old=OLD_KEY)

    @staticmethod
    def say(body: bytes, status: int = 200, **headers: str) -> Answer:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(body=body, status=status, headers=headers)

        return answer

    def publish(self, **named: Any) -> Answer:
        self.answer = self.say(key_set(**named))
        return self.answer

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self.headers.append(dict(request.headers))
        return await self.answer(request)


@asynccontextmanager
async def served(service: Service) -> AsyncIterator[Service]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
    try:
        yield service
    finally:
        await runner.cleanup()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with served(Service()) as running:
        yield running


@asynccontextmanager
async def following(url: str, **options: Any) -> AsyncIterator[Jwks]:
    made = Jwks(url, ("RS256", "ES256"), **options)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def gate(tmp_path: Path, jwt_settings: JwtSettings | None = None) -> AsyncIterator[Authenticator]:
    auth = Auth(database=f"sqlite:{tmp_path / 'keys.db'}", jwt=jwt_settings)
    authenticator = Authenticator(auth, PLANS)
    await authenticator.start(time.time())
    try:
        yield authenticator
    finally:
        await authenticator.close()


def of_service(service: Service) -> JwtSettings:
    return JwtSettings(algorithms=("RS256", "ES256"), jwks_url=service.url)


OF_HOUSE = JwtSettings(secret=SECRET)


# ── fetching ────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_keys_are_there_after_the_start(service: Service) -> None:
    service.publish(old=OLD_KEY, curve=EC_KEY)
    async with following(service.url) as jwks:
        assert isinstance(jwks.find("old", "RS256"), SigningKey)
        assert isinstance(jwks.find("curve", "ES256"), SigningKey)
        assert jwks.find("old", "ES256") is None
        assert jwks.find("new", "RS256") is None
        assert service.requests == 1
        assert service.headers[0]["Accept-Encoding"] == "identity"


def hangs() -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    return answer


def dribbles() -> Answer:
    """Headers at once, then a byte now and then for ever."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    return answer


def floods() -> Answer:
    """A body without end and without a length."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    return answer


def cut() -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        await response.prepare(request)
        await response.write(key_set(new=NEW_KEY))
        assert request.transport is not None
        request.transport.abort()
        return response

    return answer


FAULTS: dict[str, Callable[[], Answer]] = {
    "error": lambda: Service.say(b"down", status=500),
    "not found, with keys": lambda: Service.say(key_set(new=NEW_KEY), status=404),
    "html": lambda: Service.say(b"<html>maintenance</html>"),
    "empty": lambda: Service.say(b""),
    "no usable key": lambda: Service.say(b'{"keys": []}'),
    "deep": lambda: Service.say(b"[" * 100_000),
    "too large": lambda: Service.say(key_set(new=NEW_KEY) + b" " * 300_000),
    "gzip although not asked for": lambda: Service.say(
        gzip.compress(key_set(new=NEW_KEY)), **{"Content-Encoding": "gzip"}
    ),
    "hangs": hangs,
    "dribbles": dribbles,
    "floods": floods,
    "cut": cut,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_last_good_set_stays(service: Service, fault: str) -> None:
    """One log line when the service fails and one when it is back; no fault is held for long."""
    with structlog.testing.capture_logs() as lines:
        async with following(service.url, timeout_s=0.4) as jwks:
            service.answer = FAULTS[fault]()
            async with asyncio.timeout(5):
                assert await jwks.refetch() is False
                assert await jwks.refetch() is False
            assert jwks.failing
            assert isinstance(jwks.find("old", "RS256"), SigningKey)
            assert jwks.find("new", "RS256") is None
            service.publish(new=NEW_KEY)
            assert await jwks.refetch() is True
            assert isinstance(jwks.find("new", "RS256"), SigningKey)
            assert jwks.find("old", "RS256") is None
    ours = [line["event"] for line in lines if line["event"] != "library"]  # the flooding server's own
    assert ours == ["jwks_failed", "jwks_recovered"]


@pytest.mark.parametrize("fault", ["hangs", "html", "error"])
async def test_a_service_that_fails_at_the_start_keeps_nothing_else_from_starting(
    service: Service, fault: str
) -> None:
    service.answer = FAULTS[fault]()
    async with asyncio.timeout(5), following(service.url, timeout_s=0.3) as jwks:
        assert jwks.failing
        service.publish(old=OLD_KEY)
        assert await jwks.refetch() is True
        assert isinstance(jwks.find("old", "RS256"), SigningKey)


async def test_nobody_listens() -> None:
    async with served(Service()) as gone:
        url = gone.url
    with structlog.testing.capture_logs() as lines:
        async with following(url.replace("http://", "http://user:hunter2@")) as jwks:
            assert jwks.failing
    assert [line["host"] for line in lines] == ["127.0.0.1"]
    assert "hunter2" not in str(lines)


async def test_a_redirect_is_not_followed(service: Service) -> None:
    async with served(Service()) as elsewhere:
        elsewhere.publish(new=NEW_KEY)
        for status in (301, 302, 307, 308):
            service.answer = service.say(b"", status=status, Location=elsewhere.url)
            async with following(service.url) as jwks:
                assert jwks.find("new", "RS256") is None
        assert elsewhere.requests == 0


async def test_fetches_for_unknown_keys_are_few(service: Service) -> None:
    """Three in a row, whoever asks how often; and those who ask at once share one."""
    async with following(service.url) as jwks:
        assert await asyncio.gather(*(jwks.refetch() for _ in range(50))) == [True] * 50
        assert service.requests == 2
        assert [await jwks.refetch() for _ in range(20)] == [True, True] + [False] * 18
        assert service.requests == 4


async def test_who_leaves_does_not_stop_the_fetch_for_others(service: Service) -> None:
    async with following(service.url) as jwks:
        release = asyncio.Event()

        async def answer(_: web.Request) -> web.Response:
            await release.wait()
            return web.Response(body=key_set(new=NEW_KEY))

        service.answer = answer
        leaving, staying = (asyncio.ensure_future(jwks.refetch()) for _ in range(2))
        await until(lambda: service.requests == 2)
        leaving.cancel()
        await asyncio.wait([leaving])
        release.set()
        assert await staying is True
        assert isinstance(jwks.find("new", "RS256"), SigningKey)


async def test_closing_ends_everything(service: Service) -> None:
    before = asyncio.all_tasks()
    async with following(service.url) as jwks:
        service.answer = hangs()
        waiting = asyncio.ensure_future(jwks.refetch())
        await until(lambda: service.requests == 2)
    assert await waiting is False  # who waited is answered, not cancelled: that would mean a caller who left
    # The service's own handler of the connection that was closed.
    await until(lambda: all("proxy" not in str(task.get_coro()) for task in asyncio.all_tasks() - before))


# ── who is let in ───────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_of_the_service(service: Service, tmp_path: Path) -> None:
    service.publish(old=OLD_KEY, curve=EC_KEY)
    async with gate(tmp_path, of_service(service)) as authenticator:
        for text in (sign(OLD_KEY, "old"), sign(EC_KEY, "curve"), sign(OLD_KEY, None)):
            principal = await authenticator.identify(text, time.time())
            assert (principal.name, principal.plan) == ("jwt:headrace|alice", "pro")


async def test_a_rotated_key_is_known_with_its_first_token(service: Service, tmp_path: Path) -> None:
    """All requests with it wait for one fetch, and are served; the old key is gone with it."""
    async with gate(tmp_path, of_service(service)) as authenticator:
        service.publish(new=NEW_KEY)
        text = sign(NEW_KEY, "new")
        found = await asyncio.gather(*(authenticator.identify(text, time.time()) for _ in range(20)))
        assert {principal.plan for principal in found} == {"pro"}
        assert service.requests == 2
        with pytest.raises(InvalidToken):
            await authenticator.identify(sign(OLD_KEY, "old"), time.time())


async def test_invented_key_ids_fetch_little_and_only_the_configured_address(
    service: Service, tmp_path: Path
) -> None:
    """`kid` is no path, and `jku`, `x5u` and `jwk` are not read: the evil service sees no request."""
    async with served(Service()) as evil, gate(tmp_path, of_service(service)) as authenticator:
        evil.publish(evil=NEW_KEY)
        for kid in ("../../x", "evil", "", evil.url, "a\r\nb", "x" * 2000):
            for header in ({"jku": evil.url}, {"x5u": evil.url}, {"jwk": entry(NEW_KEY, kid)}):
                with pytest.raises(UnknownSigningKey):
                    await authenticator.identify(sign(NEW_KEY, kid, **header), time.time())
        with pytest.raises(InvalidToken):
            await authenticator.identify(sign(NEW_KEY, "old", jku=evil.url), time.time())
        assert evil.requests == 0
        assert service.requests == 1 + 3


async def test_during_an_outage_known_keys_work_and_new_ones_are_refused(
    service: Service, tmp_path: Path
) -> None:
    async with gate(tmp_path, of_service(service)) as authenticator:
        service.answer = service.say(b"", status=503)
        with pytest.raises(InvalidToken):
            await authenticator.identify(sign(NEW_KEY, "new"), time.time())
        assert (await authenticator.identify(sign(OLD_KEY, "old"), time.time())).plan == "pro"


async def test_keys_and_tokens_live_side_by_side(tmp_path: Path) -> None:
    """With a shared secret; each of them on a plan that exists."""
    async with gate(tmp_path, OF_HOUSE) as authenticator:
        now = time.time()
        pepper = keys.load_pepper(None, f"sqlite:{tmp_path / 'keys.db'}")
        store = authenticator.cache.store
        record, text = await create(store, pepper, PLANS, KeyOrder(name="n", plan="basic"), now)
        await authenticator.cache.refresh()
        assert (await authenticator.identify(text, now)).name == f"key:{record.id}"
        assert authenticator.tokens is not None
        rules = authenticator.tokens.rules
        assert (await authenticator.identify(issue_token(rules, "bob", "pro", 60, now), now)).plan == "pro"
        with pytest.raises(InvalidToken) as caught:
            await authenticator.identify(issue_token(rules, "bob", "gold", 60, now), now)
        assert caught.value.code == "invalid_token"
        authenticator.plans = ("pro",)
        with pytest.raises(InvalidCredential) as refused:
            await authenticator.identify(text, now)
        assert refused.value.code == "invalid_api_key"


async def test_unknown_malformed_revoked_expired_and_rotated_keys_are_refused_alike(tmp_path: Path) -> None:
    """One error, with the same status, code, message and headers; a token is such a text where none is
    configured."""
    async with gate(tmp_path) as authenticator:
        now = time.time()
        pepper = keys.load_pepper(None, f"sqlite:{tmp_path / 'keys.db'}")
        store = authenticator.cache.store
        gone, gone_text = await create(store, pepper, PLANS, KeyOrder(name="gone"), now)
        _, old_text = await create(store, pepper, PLANS, KeyOrder(name="old", expires="1s"), now)
        changed, changed_text = await create(store, pepper, PLANS, KeyOrder(name="changed"), now)
        await authenticator.cache.refresh()
        for text in (gone_text, old_text, changed_text):
            await authenticator.identify(text, now)
        await revoke(store, gone.id, now)
        _, fresh_text = await rotate(store, pepper, changed.id, now)
        await authenticator.cache.refresh()
        assert (await authenticator.identify(fresh_text, now)).name == f"key:{changed.id}"
        refused = []
        wrong = [None, "", "Basic YTpi", "x" * 10_000, "é", "\udcff", identity.key_text("a" * 10, "b" * 43)]
        for text in [*wrong, gone_text, old_text, changed_text, sign(OLD_KEY, "old")]:
            with pytest.raises(InvalidCredential) as caught:
                await authenticator.identify(text, now + 1.01)  # an expiry is rounded to 1 ms
            error = caught.value
            refused.append((error.status, error.code, error.message, dict(error.headers)))
        assert refused == [refused[0]] * len(refused)
        assert refused[0][:2] == (401, "invalid_api_key")


async def test_a_key_is_known_again_as_long_as_it_would_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`known` never says more than `identify`, and not longer: of a key that has expired, was revoked or
    rotated, or whose plan is gone, it knows nothing at that moment."""
    monkeypatch.setattr(authenticator_module, "_MOST_SHOWN", 4)
    async with gate(tmp_path) as authenticator:
        now = time.time()
        pepper = keys.load_pepper(None, f"sqlite:{tmp_path / 'keys.db'}")
        store = authenticator.cache.store
        made = {
            name: await create(store, pepper, PLANS, KeyOrder(name=name, plan=plan, expires=expires), now)
            for name, plan, expires in (
                ("stays", "pro", None),
                ("gone", "pro", None),
                ("changed", "pro", None),
                ("old", "pro", "1s"),
                ("basic", "basic", None),
            )
        }
        await authenticator.cache.refresh()

        async def shown(at: float) -> dict[str, bool]:
            """Who is let in; `known` is asked before and after."""
            let_in = {}
            for name, (_, text) in made.items():
                before = authenticator.known(text, at)
                try:
                    assert before in (None, await authenticator.identify(text, at))
                except InvalidCredential:
                    assert before is None
                    let_in[name] = authenticator.known(text, at) is not None
                else:
                    let_in[name] = authenticator.known(text, at) is await authenticator.identify(text, at)
            return let_in

        assert all(authenticator.known(text, now) is None for _, text in made.values())
        assert await shown(now) == dict.fromkeys(made, True)
        assert len(authenticator._shown) <= 4
        assert await shown(now + 1.01) == {**dict.fromkeys(made, True), "old": False}
        await revoke(store, made["gone"][0].id, now)
        _, fresh_text = await rotate(store, pepper, made["changed"][0].id, now)
        assert (await shown(now))["gone"]
        await authenticator.cache.refresh()
        authenticator.plans = ("pro",)
        assert await shown(now) == {
            **dict.fromkeys(made, False),
            "stays": True,
            "old": True,
        }
        assert authenticator.known(fresh_text, now) is None
        await authenticator.identify(fresh_text, now)
        assert authenticator.known(fresh_text, now) is not None
        for text in (None, "", "é", "\udcff", "x" * 10_000, fresh_text + "A", fresh_text[:-1]):
            assert authenticator.known(text, now) is None


async def test_time_does_not_tell_which_ids_exist(tmp_path: Path) -> None:
    """An unknown id, a known one with another secret, a revoked key that was shown before: the same work."""
    async with gate(tmp_path) as authenticator:
        now = time.time()
        pepper = keys.load_pepper(None, f"sqlite:{tmp_path / 'keys.db'}")
        store = authenticator.cache.store
        valid, valid_text = await create(store, pepper, PLANS, KeyOrder(name="valid"), now)
        gone, gone_text = await create(store, pepper, PLANS, KeyOrder(name="gone"), now)
        await authenticator.cache.refresh()
        for text in (valid_text, gone_text):
            await authenticator.identify(text, now)
        await revoke(store, gone.id, now)
        await authenticator.cache.refresh()
        texts = {
            "unknown": identity.key_text("a" * 10, "b" * 43),
            "wrong": identity.key_text(valid.id, "b" * 43),
            "revoked": gone_text,
        }
        took = dict.fromkeys(texts, 1.0)
        for _ in range(60):  # the fastest of many, in turns: what else this machine does is in none of them
            for name, text in texts.items():
                began = time.perf_counter()
                for _ in range(50):
                    assert authenticator.known(text, now) is None
                    with contextlib.suppress(InvalidCredential):
                        await authenticator.identify(text, now)
                took[name] = min(took[name], time.perf_counter() - began)
        assert max(took.values()) < 1.5 * min(took.values()), took


async def test_what_is_wrong_with_a_configuration_is_said_at_the_start(tmp_path: Path) -> None:
    """Keys of another pepper, a short secret: warnings. A public key as a secret: an error."""
    url = f"sqlite:{tmp_path / 'keys.db'}"
    with structlog.testing.capture_logs() as lines:
        async with gate(tmp_path, OF_HOUSE) as authenticator:
            await create(authenticator.cache.store, b"other", PLANS, KeyOrder(name="n"), time.time())
    assert lines == []
    with structlog.testing.capture_logs() as lines:
        async with gate(tmp_path, JwtSettings(secret="short")):
            pass
    assert [line["event"] for line in lines] == ["keys_of_another_pepper", "jwt_secret_is_short"]
    pem = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"
    with pytest.raises(StartError, match=r"auth\.jwt\.secret: is a public key"):
        Authenticator(Auth(database=url, jwt=JwtSettings(secret=pem)), PLANS)


async def test_a_token_of_the_command_is_let_in(tmp_path: Path) -> None:
    text = "auth: {jwt: {secret: " + SECRET + "}}\nupstreams: {local: {base_url: 'mock:'}}"
    settings = config.parse(text, "test", {})
    async with gate(tmp_path, settings.auth.jwt) as authenticator:
        issued = issue(settings, "bob", "pro", "24h", time.time())
        principal = await authenticator.identify(issued, time.time() + 86_000)
        assert (principal.name, principal.plan) == ("jwt:headrace|bob", "pro")


async def test_a_service_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again without anybody's token."""
    monkeypatch.setattr(jwks, "_RETRY_S", 0.05)
    service = Service()
    service.answer = service.say(b"", 503)
    async with served(service), following(service.url) as found:
        assert found.failing
        service.answer = service.publish(old=OLD_KEY)
        await until(lambda: not found.failing)
        assert service.requests > 1
