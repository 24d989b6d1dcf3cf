"""What the commands and the admin API do with keys: what people write, what they get to read."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import config, identity, key_order, token_commands
from proxy.errors import OperationError, StartError
from proxy.identity import KeyRecord
from proxy.key_commands import UnknownKey, create, describe, document, revoke, rotate, show, table
from proxy.key_order import KeyOrder, parse_order
from proxy.keystore import opened
from proxy.keystore.base import KeyStore

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
PEPPER = b"p" * 32
PLANS = ("basic", "pro", "enterprise")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[KeyStore]:
    async with opened(f"sqlite:{tmp_path / 'keys.db'}") as store:
        yield store


async def made(store: KeyStore, now: float = NOW, **fields: Any) -> tuple[KeyRecord, str]:
    return await create(store, PEPPER, PLANS, KeyOrder(**{"name": "n", **fields}), now)


def works(text: str, record: KeyRecord, now: float = NOW) -> bool:
    return identity.verify_key(text, {record.id: record}.get, PEPPER, now) is not None


# ── the verbs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_with_everything(store: KeyStore) -> None:
    record, text = await made(
        store,
        name=" my app ",
        plan="pro",
        models="gpt-4.1, claude-*,gpt-4.1",
        expires="30d",
        ip="10.0.0.0/8,2001:db8::1",
        budget_day="5",
        budget_month="100.50",
    )
    assert await store.get(record.id) == record
    assert works(text, record)
    assert not works(text, record, NOW + 30 * 86400)
    assert document(record, text) == {
        "id": record.id,
        "name": "my app",
        "plan": "pro",
        "models": ["gpt-4.1", "claude-*"],
        "expires": "2027-02-14T08:00:00.000Z",
        "ip": ["10.0.0.0/8", "2001:db8::1/128"],
        "budget_day": "5",
        "budget_month": "100.50",
        "created": "2027-01-15T08:00:00.000Z",
        "revoked": None,
        "secret": text,
    }
    assert text.split("_", 2)[:2] == ["hr", record.id]


async def test_a_key_with_nothing_but_a_name(store: KeyStore) -> None:
    record, text = await made(store)
    assert works(text, record, NOW + 1e9)
    assert document(record) == {
        "id": record.id,
        "name": "n",
        "plan": "basic",
        "models": [],
        "expires": None,
        "ip": [],
        "budget_day": None,
        "budget_month": None,
        "created": "2027-01-15T08:00:00.000Z",
        "revoked": None,
    }


async def test_an_id_that_exists_is_minted_again(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, _ = await made(store)
    ids = iter([taken.id, taken.id, "brandnew23"])
    monkeypatch.setattr(identity, "mint_id", lambda _: next(ids))
    record, _ = await made(store)
    assert record.id == "brandnew23"
    assert await store.get(taken.id) == taken


async def test_no_secret_is_written_anywhere(store: KeyStore, tmp_path: Path) -> None:
    record, text = await made(store)
    _, fresh = await rotate(store, PEPPER, record.id, NOW)
    stored = b"".join(read_all(tmp_path))
    assert record.id.encode() in stored
    for secret in (text.split("_", 2)[2], fresh.split("_", 2)[2]):
        assert secret.encode() not in stored


def read_all(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.iterdir()]


async def test_rotating_gives_the_same_key_another_secret(store: KeyStore) -> None:
    record, text = await made(store, name="app", models="m", expires="1h")
    changed, fresh = await rotate(store, PEPPER, record.id, NOW)
    assert changed.id == record.id
    assert works(fresh, changed)
    assert not works(text, changed)
    assert {**document(changed)} == document(record)
    assert await store.get(record.id) == changed


@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_a_key_that_has_ended_is_not_rotated(store: KeyStore, end: str) -> None:
    record, _ = await made(store, expires="1h")
    now = NOW + 3600
    if end == "revoked":
        await revoke(store, record.id, NOW)
        now = NOW
    with pytest.raises(OperationError, match=rf"^the key {record.id} is {end}: create a new one$"):
        await rotate(store, PEPPER, record.id, now)
    kept = await store.get(record.id)
    assert kept is not None
    assert kept.digest == record.digest


async def test_revoking_and_showing(store: KeyStore) -> None:
    record, text = await made(store)
    revoked = await revoke(store, record.id, NOW + 1)
    assert document(revoked)["revoked"] == "2027-01-15T08:00:01.000Z"
    assert await revoke(store, record.id, NOW + 2) == revoked
    assert await show(store, record.id) == revoked
    assert not works(text, revoked)


async def test_a_whole_key_will_do_for_its_id(store: KeyStore) -> None:
    """It has leaked, and is pasted from where it was found."""
    record, text = await made(store)
    assert await show(store, f" {text}\n") == record
    assert (await revoke(store, text, NOW)).id == record.id


async def test_an_unknown_key_is_named_with_the_nearest(store: KeyStore) -> None:
    record, _ = await made(store)
    typo = record.id[:-1] + "0"
    for verb in (show(store, typo), revoke(store, typo, NOW), rotate(store, PEPPER, typo, NOW)):
        with pytest.raises(UnknownKey) as caught:
            await verb
        assert str(caught.value) == f"unknown key '{typo}' (did you mean '{record.id}'?)"
    with pytest.raises(UnknownKey, match=r"^unknown key ''$"):
        await show(store, "hr_")


# ── what people write ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"plan": "pr0"}, "unknown plan 'pr0' (did you mean 'pro'?)"),
        ({"plan": ""}, "unknown plan ''"),
        ({"name": ""}, "name: expected 1 to 100 printable characters, got ''"),
        ({"name": "a\x1b[31m"}, "name: expected 1 to 100 printable characters, got 'a\\x1b[31m'"),
        ({"name": "n" * 101}, "name: expected 1 to 100 printable characters, got"),
        ({"ip": "10.0.0.1/8"}, "ip: expected an IP address or a network without host bits, got '10.0.0.1/8'"),
        ({"ip": "10.0.0.0/8,evil"}, "ip: expected an IP address or a network without host bits, got 'evil'"),
        ({"models": "a\nb"}, "models: expected names or patterns like gpt-4.1,claude-*, got 'a\\nb'"),
        ({"models": ["m" * 129]}, "models: expected names"),
        ({"models": [f"m{n}" for n in range(1001)]}, "models: at most 1000"),
        ({"expires": "soon"}, "expires: expected a duration like 30d, 24h, 15m or 90s, got 'soon'"),
        ({"expires": "30"}, "expires: expected a duration"),
        ({"expires": "-1d"}, "expires: expected a duration"),
        ({"expires": "0d"}, "expires: expected a duration"),
        ({"expires": "1e3d"}, "expires: expected a duration"),
        ({"expires": "36501d"}, "expires: expected a duration"),
        ({"expires": "٣d"}, "expires: expected a duration"),
        ({"expires": "2027-01-15"}, "expires: '2027-01-15' is not in the future"),
        ({"expires": "2027-13-01"}, "expires: expected 30d or 2027-01-31, got '2027-13-01'"),
        ({"expires": "9999-12-31T23:59:59-23:00"}, "expires: "),
        ({"budget_day": "-1"}, "budget_day: expected US dollars like 5 or 0.25, got '-1'"),
        ({"budget_day": "1e3"}, "budget_day: expected US dollars"),
        ({"budget_day": "1,50"}, "budget_day: expected US dollars"),
        ({"budget_day": "0.0000001"}, "budget_day: expected US dollars"),
        ({"budget_day": "NaN"}, "budget_day: expected US dollars"),
        ({"budget_day": float("inf")}, "budget_day: expected US dollars"),
        ({"budget_month": True}, "budget_month: expected US dollars"),
        ({"budget_month": "٣"}, "budget_month: expected US dollars"),
        ({"budget_month": "9" * 13}, "budget_month: expected US dollars"),
    ],
)
async def test_mistakes_are_one_line(store: KeyStore, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(OperationError) as caught:
        await made(store, **fields)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    assert await store.list_all() == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2592000), ("24h", 86400), ("15m", 900), ("90s", 90), ("2w", 1209600), (" 1.5h ", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert key_order.duration("ttl", text) == seconds
    assert key_order.expiry(text, NOW) == NOW + seconds


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2027-01-16", NOW + 16 * 3600),
        ("2027-01-15T09:00:00Z", NOW + 3600),
        ("2027-01-15T09:00:00", NOW + 3600),
        ("2027-01-15T10:00+01:00", NOW + 3600),
    ],
)
def test_dates(text: str, at: float) -> None:
    assert key_order.expiry(text, NOW) == at


@given(st.decimals(min_value=0, max_value=10**12 - 1, places=6))
def test_money_is_exact(amount: Decimal) -> None:
    text = format(amount, "f")
    assert key_order.money("budget", text) == amount
    assert str(key_order.money("budget", text)) == text


@given(st.integers(0, 10**9), st.integers(0, 99))
def test_money_of_json_numbers_is_what_was_written(dollars: int, cents: int) -> None:
    """A float's shortest text is what stood in the JSON."""
    text = f"{dollars}.{cents:02}"
    assert key_order.money("budget", json.loads(text)) == Decimal(text)


def refusal(work: Callable[[], object]) -> str:
    """The text of the one error that it may raise."""
    try:
        work()
    except OperationError as error:
        return str(error)
    return ""


@given(st.text())
def test_any_text_is_read_or_is_one_error(text: str) -> None:
    for read in (
        lambda: key_order.duration("x", text),
        lambda: key_order.expiry(text, NOW),
        lambda: key_order.money("x", text),
        lambda: key_order.networks([text]),
        lambda: key_order.model_names([text]),
        lambda: key_order.known_plan(text, PLANS),
        lambda: key_order.id_of(text),
    ):
        assert refusal(read).isprintable()


# ── the admin API ───────────────────────────────────────────────────────────────────────────────────────


async def test_an_order_as_json(store: KeyStore) -> None:
    """Lists and numbers as well as the text of the flags; null is as good as nothing."""
    body = {
        "name": "app",
        "models": ["a,1", "b-*"],
        "ip": ["10.0.0.1", "10.0.0.2,10.0.0.1"],
        "budget_day": 0.1,
        "budget_month": 7,
        "expires": None,
    }
    record, _ = await create(store, PEPPER, PLANS, parse_order(body), NOW)
    shown = document(record)
    assert (shown["models"], shown["ip"]) == (["a,1", "b-*"], ["10.0.0.1/32", "10.0.0.2/32"])
    assert (shown["budget_day"], shown["budget_month"], shown["expires"]) == ("0.1", "7", None)
    msgspec.json.encode(shown)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (None, "expected a JSON object"),
        ([], "expected a JSON object"),
        ({}, "Object missing required field name"),
        ({"name": 5}, "name: Expected str, got int"),
        ({"name": None}, "name: Expected str, got null"),
        ({"name": "n", "modles": []}, "unknown field 'modles' (did you mean 'models'?)"),
        ({"name": "n", "secret": "mine"}, "unknown field 'secret'"),
        ({"name": "n", "models": [1]}, "models[0]: Expected str, got int"),
        ({"name": "n", "budget_day": []}, "budget_day: Expected "),
    ],
)
def test_a_body_that_is_no_order(body: object, text: str) -> None:
    with pytest.raises(OperationError) as caught:
        parse_order(body)
    assert str(caught.value).startswith(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(_JSON | st.dictionaries(st.sampled_from([*KeyOrder.__struct_fields__]), _JSON))
def test_any_json_is_an_order_or_one_error(body: object) -> None:
    assert "\n" not in refusal(lambda: key_order.draft(parse_order(body), "pro", NOW))


# ── what people read ────────────────────────────────────────────────────────────────────────────────────


async def test_the_secret_stands_alone_on_the_last_line(store: KeyStore) -> None:
    record, text = await made(store, models="a,b", budget_day="1")
    lines = describe(record, text).splitlines()
    assert lines[-1] == text
    assert lines[-2] == "Keep the secret now: it cannot be shown again."
    assert f"id            {record.id}" in lines
    assert "models        a, b" in lines
    assert "budget day    1" in lines
    assert "expires       -" in lines
    assert describe(record).splitlines() == lines[:-2]


async def test_the_table(store: KeyStore) -> None:
    """Aligned, one line a key, neither digests nor secrets."""
    assert table([], NOW) == "no keys yet: headrace keys create --name NAME"
    one, _ = await made(store, name="a long name", plan="enterprise", expires="1h", ip="10.0.0.0/8")
    two, _ = await made(store, NOW + 1, name="b", models="gpt-4.1,claude-*", budget_month="0.10")
    three, _ = await made(store, NOW + 2, name="c")
    await revoke(store, three.id, NOW)
    lines = table(await store.list_all(), NOW + 3600).splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["ID", "NAME", "PLAN", "STATE", "EXPIRES", "MODELS", "IP", "DAY USD", "MONTH USD"],
        [one.id, "a long name", "enterprise", "expired", "2027-01-15T09:00", "all", "10.0.0.0/8", "-", "-"],
        [two.id, "b", "basic", "live", "never", "gpt-4.1,claude-*", "any", "-", "0.10"],
        [three.id, "c", "basic", "revoked", "never", "all", "any", "-", "-"],
    ]
    starts = [[cell.start() for cell in re.finditer(r"(?<!\S)(?<!\S )\S", line)] for line in lines]
    assert starts == [starts[0]] * 4


async def test_nothing_that_is_read_shows_a_digest(store: KeyStore) -> None:
    record, text = await made(store)
    for shown in (table([record], NOW), describe(record), json.dumps(document(record))):
        assert text.split("_", 2)[2] not in shown
        assert "digest" not in shown
        assert record.pepper_id not in shown.replace(record.id, "")


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


def settings(auth: str) -> config.Config:
    return config.parse(f"auth: {auth}\nupstreams: {{local: {{base_url: 'mock:'}}}}", "test", {})


HOUSE = "{jwt: {secret: s3cret-of-the-house-0123456789abcdef, plan_claim: tier}}"


def test_an_issued_token_is_three_words() -> None:
    text = token_commands.issue(settings(HOUSE), "bob", "pro", "24h", NOW)
    assert re.fullmatch(r"ey[\w-]+\.ey[\w-]+\.[\w-]{43}", text)


@pytest.mark.parametrize(
    ("auth", "subject", "plan", "ttl", "text"),
    [
        (
            "{}",
            "bob",
            "pro",
            "24h",
            "auth.jwt: tokens can be issued only with algorithms: [HS256] and a secret",
        ),
        (
            "{jwt: {algorithms: [RS256], jwks_url: 'http://127.0.0.1/x'}}",
            *("bob", "pro", "24h"),
            "auth.jwt: tokens can be issued only with algorithms: [HS256] and a secret",
        ),
        (HOUSE, "bob", "prp", "24h", "unknown plan 'prp' (did you mean 'pro'?)"),
        (HOUSE, "", "pro", "24h", "subject: a subject has 1 to 255 characters"),
        (HOUSE, "b" * 256, "pro", "24h", "subject: a subject has 1 to 255 characters"),
        (HOUSE, "bob", "pro", "forever", "ttl: expected a duration like 30d, 24h, 15m or 90s, got 'forever'"),
    ],
)
def test_no_token_without_a_reason(auth: str, subject: str, plan: str, ttl: str, text: str) -> None:
    with pytest.raises(OperationError) as caught:
        token_commands.issue(settings(auth), subject, plan, ttl, NOW)
    assert str(caught.value) == text


async def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="does not exist: make it"):
        async with opened(f"sqlite:{tmp_path / 'nowhere' / 'keys.db'}"):
            pass
