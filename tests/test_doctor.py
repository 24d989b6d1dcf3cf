"""headrace doctor, before real nginx that are set up wrongly, and before a right one."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proxy import doctor, doctor_rules
from proxy.doctor_findings import Finding, Level, Report
from proxy.doctor_rules import Arrival
from tests.kit.headrace import Headrace, command, running, settings_for
from tests.kit.keys import auth_section, make_key
from tests.kit.nginx import authority, edge, plain_edge

pytestmark = pytest.mark.timeout(90)

#: What a small nginx needs to do no harm; a case may say more, or something else.
RIGHT = "proxy_http_version 1.1; proxy_buffering off; client_max_body_size 32m;"
LARGE = "client_max_body_size 32m;"
PATIENCE_S = 2.0


class Case(NamedTuple):
    """A way to set up nginx, what the doctor has to find, and nothing else; a line that it has to print."""

    problems: set[str]
    line: str
    lines: str = RIGHT
    http: str = ""
    top: str = ""


CASES = {
    "as it should be": Case(set(), ""),
    "HTTP/1.0 and buffering": Case(
        {"pace"}, "proxy_buffering off;", f"{LARGE} proxy_ignore_headers X-Accel-Buffering;"
    ),
    "compressed": Case(
        {"encoding"}, "gzip off;", RIGHT, http="gzip on; gzip_proxied any; gzip_types text/event-stream;"
    ),
    "impatient": Case({"silence"}, "proxy_read_timeout 960s;", f"{RIGHT} proxy_read_timeout 1s;"),
    "an id of its own": Case(
        {"request_id"},
        "proxy_set_header X-Request-ID $http_x_request_id;  # and no proxy_hide_header for it",
        f"{RIGHT} proxy_set_header X-Request-ID $request_id;",
    ),
    "ids dropped": Case(
        {"request_id", "headers"},
        "# no proxy_hide_header, no add_header for x-request-id",
        f"{RIGHT} proxy_hide_header X-Request-ID;",
    ),
    "fields changed": Case(
        {"headers"},
        "# no proxy_hide_header, no add_header for Cache-Control",
        f"{RIGHT} proxy_hide_header Cache-Control; add_header Cache-Control public;",
    ),
    "our fields dropped": Case(
        {"headers"},
        "# no proxy_hide_header, no add_header for x-headrace-*",
        f"{RIGHT} proxy_hide_header X-Headrace-Probe;",
    ),
    "its own error pages": Case(
        {"errors"},
        "proxy_intercept_errors off;",
        f"{RIGHT} proxy_intercept_errors on; error_page 404 /404.html;",
    ),
    "slow": Case(  # an unbuffered answer is not slowed down by nginx
        {"rate"},
        "limit_rate 0;",
        f"{LARGE} proxy_http_version 1.1; proxy_ignore_headers X-Accel-Buffering; limit_rate 8k;",
    ),
    "small": Case(
        {"body"},
        "client_max_body_size 32m;",
        RIGHT.replace("client_max_body_size 32m;", "client_max_body_size 2m;"),
    ),
    "open": Case(
        {"admin"},
        "location ~* ^/(metrics|admin|debug|healthz|readyz)(/|$) { return 404; }",
        RIGHT,
        top="location /metrics { proxy_pass http://127.0.0.1:ADMIN; }",
    ),
    "no connection is kept": Case(set(), "keepalive_timeout 75s;", RIGHT, top="keepalive_timeout 0;"),
    "a cache": Case(
        {"cache", "request_id"},
        "proxy_cache off;",
        f"{LARGE} proxy_http_version 1.1; proxy_cache events; proxy_cache_valid 200 1m;"
        " proxy_ignore_headers Cache-Control X-Accel-Buffering;",
        http="proxy_cache_path FOLDER/cache keys_zone=events:1m;",
    ),
}


async def examined(tmp_path: Path, name: str, case: Case, patience_s: float = PATIENCE_S) -> Report:
    folder = tmp_path / re.sub(r"\W", "-", name)
    folder.mkdir()
    async with running(settings_for("mock:")) as headrace:
        here = {"ADMIN": str(headrace.front.admin_port), "FOLDER": str(folder)}
        lines, http, top = case.lines, case.http, case.top
        for word, value in here.items():
            http, top = http.replace(word, value), top.replace(word, value)
        async with plain_edge(folder, headrace.port, lines, http=http, top=top) as nginx:
            return await doctor.examine(f"http://127.0.0.1:{nginx.port}", doctor.Options(patience_s))


def problems(report: Report) -> set[str]:
    return {found.check for found in report.checks if found.level is Level.PROBLEM}


@pytest.mark.alone
async def test_what_is_wrong_with_a_chain(tmp_path: Path) -> None:
    """Each nginx is wrong in one way: that is found, nothing else, and the line that mends it."""
    reports = await asyncio.gather(*(examined(tmp_path, *item) for item in CASES.items()))
    found = {name: problems(report) for name, report in zip(CASES, reports, strict=True)}
    assert found == {name: case.problems for name, case in CASES.items()}
    for case, report in zip(CASES.values(), reports, strict=True):
        assert report.healthy == (not case.problems)
        assert case.line in ["", *report.nginx()]
        assert bool(case.line) == bool(report.nginx())


@pytest.mark.alone
@pytest.mark.slow
async def test_two_proxies_in_a_row(tmp_path: Path) -> None:
    """The inner nginx keeps X-Accel-Buffering for itself; the outer one, left at its defaults, buffers."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer").mkdir()
    async with (
        running(settings_for("mock:")) as headrace,
        plain_edge(tmp_path / "inner", headrace.port, RIGHT) as inner,
        plain_edge(tmp_path / "outer", inner.port, LARGE) as outer,
    ):
        report = await doctor.examine(f"http://127.0.0.1:{outer.port}", doctor.Options(PATIENCE_S))
    assert problems(report) == {"pace"}
    (pace,) = (found for found in report.checks if found.check == "pace")
    assert "buffered" in pace.text


@pytest.mark.alone
async def test_how_long_until_the_cut(tmp_path: Path) -> None:
    """It names the seconds after which the chain cuts; heartbeats that are rarer do not help."""
    report = await examined(tmp_path, "impatient", CASES["impatient"], 10)
    assert problems(report) == {"silence", "heartbeat"}
    for name in ("silence", "heartbeat"):
        (found,) = (each for each in report.checks if each.check == name)
        seconds = float(found.text.partition("cut after ")[2].split()[0])
        assert 0.9 <= seconds <= 1.9


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────


async def run_doctor(*words: str, **environ: str) -> tuple[int, list[str], list[str]]:
    async with command("doctor", *words, environ=environ) as process:
        code = await process.ended(60)
    return code, process.out, process.err


@pytest.mark.alone
async def test_the_shipped_edge_is_healthy(tmp_path: Path) -> None:
    """Through the shipped configuration, over TLS, with a key: nothing to complain about."""
    key = await make_key(tmp_path)
    settings = settings_for("mock:", auth=auth_section(tmp_path))
    async with running(settings) as headrace, edge(tmp_path, [headrace.port] * 2) as nginx:
        with authority().cert_pem.tempfile() as ca:
            words = (f"https://localhost:{nginx.port}/v1", "--key", key, "--patience", "2")
            code, out, err = await run_doctor(*words, SSL_CERT_FILE=ca)
            assert (code, err) == (0, []), out
            assert {line.split()[0] for line in out[:-2]} == {"ok"}
            checks = [line.split()[1] for line in out[:-2]]
            assert len(checks) == len(set(checks)) == 15
            assert out[-1] == f"https://localhost:{nginx.port}: no problems, no hints"
        # Nobody vouches for the certificate any more: said, and the key stays here.
        asked = len(headrace.log_lines())
        code, out, _ = await run_doctor(*words, "--json")
        document = json.loads("\n".join(out))
        assert code == 1
        found = {each["check"]: each["level"] for each in document["checks"]}
        assert [name for name, level in found.items() if level == "problem"] == ["tls"]
        assert found["chat"] == "hint"
        assert (document["healthy"], document["problems"], document["hints"]) == (False, 1, 1)
        lines = headrace.log_lines()[asked:]
        assert len(lines) > 5
        assert all(line["key_id"] is None for line in lines)


async def test_a_report_of_problems(tmp_path: Path) -> None:
    """Exit code 1, a line for the problem, the line for nginx."""
    async with (
        running(settings_for("mock:")) as headrace,
        plain_edge(tmp_path, headrace.port, CASES["small"].lines) as nginx,
    ):
        code, out, err = await run_doctor(f"http://127.0.0.1:{nginx.port}", "--patience", "0")
    assert (code, err) == (1, [])
    assert "problem  body       bodies of 32 MiB are refused (413), of 1024 KiB taken" in out
    assert "    client_max_body_size 32m;" in out
    assert not any("silence" in line for line in out)


@pytest.mark.parametrize(
    ("top", "word"),
    [
        ("location = /health { return 200 welcome; }", "/health"),
        ("location = /health { return 503; }", "503"),
    ],
)
async def test_an_address_without_headrace(tmp_path: Path, top: str, word: str) -> None:
    """Something else that answers there is not examined any further."""
    async with plain_edge(tmp_path, 9, top=top) as nginx:
        report = await doctor.examine(f"http://127.0.0.1:{nginx.port}", doctor.Options(0))
    assert problems(report) == {"reach"}
    assert word in report.checks[-1].text


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "http://no.such.host.invalid"])
async def test_nobody_there(url: str) -> None:
    """No answer at all is one finding."""
    report = await doctor.examine(url, doctor.Options(0))
    assert [found.check for found in report.checks] == ["reach"]
    assert not report.healthy


@pytest.mark.parametrize("url", ["ftp://example.org", "https://", "http:///v1"])
async def test_no_url(url: str) -> None:
    code, out, err = await run_doctor(url)
    assert (code, out) == (1, [])
    assert "expected a URL such as" in err[0]


async def test_plain_http_from_afar() -> None:
    """Only on this machine itself plain HTTP is no problem."""
    async with running(settings_for("mock:", listen="127.0.0.2:0")) as headrace:
        report = await doctor.examine(f"http://127.0.0.2:{headrace.port}", doctor.Options(0))
    assert problems(report) == {"tls"}


# ── with a key ───────────────────────────────────────────────────────────────────────────────────────────


async def chatted(headrace: Headrace, tmp_path: Path, lines: str, **options: Any) -> Finding:
    async with plain_edge(tmp_path, headrace.port, lines) as nginx:
        url = f"http://127.0.0.1:{nginx.port}"
        report = await doctor.examine(url, doctor.Options(0, **options))
    (found,) = (each for each in report.checks if each.check == "chat")
    return found


@pytest.mark.parametrize(
    ("lines", "level", "word"),
    [
        (RIGHT, Level.OK, "m at up: first event after"),
        (f'{RIGHT} proxy_set_header Authorization "";', Level.PROBLEM, "drops the Authorization field"),
        (f"{RIGHT} proxy_hide_header X-Headrace-Upstream;", Level.PROBLEM, "x-headrace-* is dropped"),
    ],
)
async def test_a_chat(tmp_path: Path, lines: str, level: Level, word: str) -> None:
    """A real stream of the key's first model, and what can be wrong with it."""
    key = await make_key(tmp_path)
    async with running(settings_for("mock:", auth=auth_section(tmp_path))) as headrace:
        found = await chatted(
            headrace, tmp_path, lines, key=key, model="m" if level is Level.PROBLEM else None
        )
    assert (found.level, word in found.text) == (level, True), found


async def test_a_key_that_is_none(tmp_path: Path) -> None:
    """It has no models to try."""
    await make_key(tmp_path)
    async with running(settings_for("mock:", auth=auth_section(tmp_path))) as headrace:
        found = await chatted(headrace, tmp_path, RIGHT, key="hr_wrong")
    assert found.level is Level.PROBLEM


# ── a chain that fails at some of it ─────────────────────────────────────────────────────────────────────


def said(status: str, body: str, *fields: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields])
    return f"{head}\r\n\r\n{body}".encode()


HEALTH = said("200 OK", '{"status": "ok"}')
MODELS = said("200 OK", '{"data": [{"id": "m"}]}')
NOT_NOW = said("503 Busy", '{"error": {"code": "overloaded"}}')
EVENTS = "Content-Type: text/event-stream"


async def before(answers: dict[str, bytes], otherwise: bytes) -> Report:
    """What is found before a chain that answers paths so; nothing: the connection breaks."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                answer = answers.get(head.split()[1].partition(b"?")[0].decode(), otherwise)
                if head.startswith(b"POST") and b"100-continue" not in head:
                    await reader.read(2**16)
                writer.write(answer)
                if not answer:
                    break
        writer.transport.abort()

    async with await asyncio.start_server(served, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await doctor.examine(f"http://127.0.0.1:{port}", doctor.Options(0.5, "key"))


async def test_a_chain_that_breaks_off() -> None:
    """Whatever is asked of it but /health: each question is a finding of its own, none is the end."""
    report = await before({"/health": HEALTH}, b"")
    found = [each for each in report.checks if each.level is Level.PROBLEM]
    assert {each.check for each in found} == {"reach", "pace", "rate", "silence", "heartbeat", "request_id"}
    assert [each.text.partition(":")[0] for each in found if each.check == "reach"] == [
        "a request got no answer"
    ] * 4
    assert any(each.text == "bodies of 32 MiB are taken" for each in report.checks)  # nobody has refused one


async def test_a_chain_that_is_busy() -> None:
    report = await before({"/health": HEALTH, "/v1/models": MODELS}, NOT_NOW)
    text = {found.check: found.text for found in report.checks}
    assert text["pace"] == "the test stream was answered with 503 overloaded"
    assert text["chat"] == "a chat with m was answered with 503 overloaded"
    assert text["silence"] == "not tried: too many such streams at the moment"
    assert text["cache"] == "the health stream could not be read twice"


async def test_a_chat_that_breaks_off() -> None:
    """Of an event stream only what is one of our events is looked at."""
    stream = said("200 OK", "data: {nonsense\n\ndata: {}\n\n", EVENTS)
    report = await before({"/health": HEALTH, "/v1/models": MODELS}, stream)
    text = {found.check: found.text for found in report.checks}
    assert text["chat"].startswith("a chat with m broke off after 0.")
    assert "only 1 of" in text["pace"]


async def test_a_certificate_that_nobody_vouches_for() -> None:
    """Found, and all further questions are asked without the key."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert("localhost").configure_cert(context)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context) as server:
        found, _, trusted = await doctor._tls(f"https://localhost:{server.sockets[0].getsockname()[1]}")
    assert ([each.check for each in found], trusted) == (["tls"], False)


# ── what behaviour means ─────────────────────────────────────────────────────────────────────────────────


def arrivals(*late_ms: float, gap_s: float = 0.2) -> list[Arrival]:
    """Events that were sent at a rhythm and came so much later."""
    return [Arrival(at * gap_s, at * gap_s + late / 1000) for at, late in enumerate(late_ms)]


@pytest.mark.parametrize(
    ("late_ms", "level", "word"),
    [
        ([20] * 10, Level.OK, "0 ms between"),
        ([20, 60, 20, 90, 20, 20, 40, 20, 20, 20], Level.OK, "70 ms between"),
        ([20, 20, 400, 200, 20, 20, 20, 20, 20, 20], Level.OK, "380 ms between"),  # a pause on the way
        ([1820 - 200 * at for at in range(10)], Level.PROBLEM, "buffered to the end"),
        ([420, 220, 20] * 3 + [20], Level.PROBLEM, "arrived together"),
        ([20] * 9, Level.PROBLEM, "only 9 of 10"),
        ([], Level.PROBLEM, "only 0 of 10"),
    ],
)
def test_pace(late_ms: list[float], level: Level, word: str) -> None:
    found = doctor_rules.pace(arrivals(*late_ms), 10)
    assert (found.level, word in found.text) == (level, True), found


@pytest.mark.parametrize(
    ("late_ms", "level"),
    [
        ([20, 30, 20], Level.OK),
        ([900, 500, 20], Level.OK),
        ([20, 400, 800], Level.PROBLEM),
        ([20], Level.PROBLEM),
    ],
)
def test_rate(late_ms: list[float], level: Level) -> None:
    assert doctor_rules.rate(arrivals(*late_ms), 20_000).level is level


@pytest.mark.parametrize(
    ("days", "protocol", "alpn", "levels"),
    [
        (60, "TLSv1.3", "h2", ["ok"]),
        (60, "TLSv1.2", None, ["hint"]),
        (3, "TLSv1.3", "h2", ["hint"]),
        (3, "TLSv1.1", "http/1.1", ["problem", "hint", "hint"]),
    ],
)
def test_certificate(days: float, protocol: str, alpn: str | None, levels: list[str]) -> None:
    assert [found.level.value for found in doctor_rules.certificate(days, protocol, alpn)] == levels


@pytest.mark.parametrize(
    ("found", "level", "word"),
    [
        (doctor_rules.headers({}), Level.PROBLEM, "dropped on the way: Content-Type, Cache-Control, x-"),
        (doctor_rules.http_version("1.0", kept=True), Level.PROBLEM, "HTTP/1.0"),
        (doctor_rules.http_version("2", kept=True), Level.OK, "HTTP/2"),
        (doctor_rules.cached([1.0, None]), Level.HINT, "could not be read twice"),
        (doctor_rules.cached([1.0, 1.0]), Level.PROBLEM, "out of a cache"),
    ],
)
def test_rules(found: Finding, level: Level, word: str) -> None:
    assert (found.level, word in found.text) == (level, True), found


def test_lines_are_printed_once() -> None:
    """Two findings with the same cure: one line."""
    report = Report("u", [doctor_rules.silence(1, 2), doctor_rules.heartbeat(1, 2, 1)])
    assert report.nginx() == ["proxy_read_timeout 960s;"]
    assert report.text().endswith("u: 2 problems, no hints")


@pytest.mark.parametrize("tool", ["doctor", "top"])
def test_the_tools_are_islands(tool: str) -> None:
    """They would do as well without a server's code beside them."""
    for file in Path(doctor.__file__).parent.glob(f"{tool}*.py"):
        imported = re.findall(r"^from proxy(?:\.(\w+))? import (\w+)", file.read_text(), re.MULTILINE)
        assert all((package or name).startswith(tool) for package, name in imported), (file.name, imported)
