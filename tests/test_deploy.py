"""What is shipped to run Headrace: units, image, compose, Kubernetes, the page on scale."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy import sizing
from proxy import config
from tests.kit.callers import ask, chat
from tests.kit.fleet import fleet, write
from tests.kit.headrace import ROOT, settings_for
from tests.kit.prometheus import tool

pytestmark = pytest.mark.timeout(60)

DEPLOY = ROOT / "deploy"
UNITS = DEPLOY / "systemd"
DOCKER = DEPLOY / "docker"
COMPOSE = DEPLOY / "compose"
KUBERNETES = DEPLOY / "kubernetes"
DEFAULTS = config.parse(
    "upstreams: {up: {base_url: 'mock:'}}\nmodels: {m: {upstreams: [up]}}\n", "x.yaml", {}
)
#: After the drain: error events, the last log lines and ledger rows.
LAST_WORDS_S = 10
#: What the shipped configurations ask of the environment.
ENVIRON = {
    "HEADRACE_ADMIN_TOKEN": "admin-token-of-a-test",
    "HEADRACE_PEPPER": "pepper-of-a-test-which-is-long-enough",
    "HEADRACE_REDIS_URL": "redis://127.0.0.1:6379",
    "OPENAI_API_KEY": "sk-test",
}


def printed(*words: str | Path) -> str:
    """The output of a command that has to succeed."""
    found = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────


def systemd_analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("no systemd-analyze: install the Debian package systemd")
    return found


def directives(unit: str) -> dict[str, list[str]]:
    """Name -> values of a unit file, in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about them, with a program that is there."""
    program = tmp_path / "headrace"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for file in UNITS.iterdir():
        text = file.read_text().replace("/opt/headrace/bin/headrace", str(program))
        (tmp_path / file.name).write_text(text)
    for file in UNITS.iterdir():
        # Other units of this machine are loaded too: only what is said about ours counts.
        said = printed(systemd_analyze(), "verify", tmp_path / file.name).splitlines()
        assert [line for line in said if "headrace" in line] == []


def test_the_service_is_hardened() -> None:
    """systemd's own rating, from 0 (safe) to 10."""
    unit = UNITS / "headrace.service"
    said = printed(systemd_analyze(), "security", "--offline=true", "--no-pager", unit)
    rating = re.search(r"Overall exposure level for headrace\.service: ([0-9.]+)", said)
    assert rating is not None
    assert float(rating[1]) <= 1.5


def test_the_service_lets_streams_end() -> None:
    """SIGTERM to the first process alone, and time for two generations to drain; descriptors for all."""
    service = directives("headrace.service")
    assert service["KillMode"] == ["mixed"]
    assert int(service["TimeoutStopSec"][0]) >= 2 * DEFAULTS.drain + LAST_WORDS_S
    assert int(service["LimitNOFILE"][0]) >= 2 * DEFAULTS.max_connections
    assert directives("headrace.socket")["ListenStream"] == [str(DEFAULTS.listen_address)]
    assert int(directives("headrace.socket")["Backlog"][0]) >= 1024


#: PR_SET_MDWE and PR_SET_NO_NEW_PRIVS (linux/prctl.h): what MemoryDenyWriteExecute= and NoNewPrivileges= do.
_CONFINED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(65, 1, 0, 0, 0) != 0:
    print("no MDWE before Linux 6.3", file=sys.stderr)
os.umask(0o077)
os.execv(sys.argv[1], sys.argv[1:])
"""


async def test_the_units_lines_work(tmp_path: Path) -> None:
    """ExecStart serves with workers, confined as the unit confines it; ExecReload reaches it."""
    (start,), (reload,) = (directives("headrace.service")[name] for name in ("ExecStart", "ExecReload"))
    prefix = "/opt/headrace/bin/headrace "
    assert start == f"{prefix}serve -c /etc/headrace/headrace.yaml"
    confined = f'set -- {shlex.join([sys.executable, "-c", _CONFINED])} "$@"'
    async with fleet(tmp_path, {**settings_for("mock:"), "workers": 2}, before=confined) as it:
        await it.settle(2)
        assert (await ask(it.port, chat())).status == 200
        assert it.file.with_name("headrace.db").stat().st_mode & 0o077 == 0
        settings = {**yaml.safe_load(it.file.read_text()), "admin": f"127.0.0.1:{it.admin_port}"}
        elsewhere = tmp_path / "same.yaml"  # `reload` is told the address by its configuration
        write(elsewhere, settings)
        words = reload.removeprefix(prefix).replace("/etc/headrace/headrace.yaml", str(elsewhere)).split()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *words), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
        assert (process.returncode, said.decode().strip()) == (0, "reloaded: True")


# ── the image ────────────────────────────────────────────────────────────────────────────────────────────

#: Folders of the image, which are somewhere else on the machine that runs the tests.
_FOLDERS = ("/opt/headrace", "/etc/headrace", "/var/lib/headrace", "/src")


class Instruction:
    """A line of the Dockerfile."""

    def __init__(self, line: str) -> None:
        self.name, _, self.rest = line.partition(" ")

    def words(self, root: Path) -> list[str]:
        """Of a RUN, CMD or ENTRYPOINT, with the image's folders under `root`."""
        words = json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)
        return [moved(word, root) for word in words]


def moved(path: str, root: Path) -> str:
    for folder in _FOLDERS:
        if path == folder or path.startswith(f"{folder}/"):
            return f"{root}{path}"
    return path


def instructions() -> list[Instruction]:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    return [Instruction(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture
def image() -> Iterator[Path]:
    """A folder that another user may read: tmp_path is the tester's own."""
    with tempfile.TemporaryDirectory(prefix="headrace-image-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def user() -> tuple[int, int]:
    """Who the image runs as; the tester, if that may not become somebody else."""
    uid, gid = map(int, line_of("USER").rest.split(":"))
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)  # a number that nobody else has here
    return (uid, gid) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def as_user() -> list[str]:
    """Words before a command that make it run as that user."""
    if os.geteuid() != 0:
        return []
    uid, gid = user()
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]


def base_python() -> str:
    """The image's `python`: one that its user may run, too (a tester's own may lie in a home)."""
    for found in (sys.executable, "/usr/bin/python3"):
        able = [*as_user(), found, "-c", "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"]
        if subprocess.run(able, capture_output=True, check=False).returncode == 0:
            return found
    pytest.skip("no Python 3.11 with venv for every user: install the Debian package python3-venv")


def built(root: Path) -> None:
    """Runs the Dockerfile's lines, with the folders moved and this machine's Python as the base image."""
    folder = root
    for each in instructions():
        if each.name == "WORKDIR":
            folder = Path(moved(each.rest, root))
            folder.mkdir(parents=True, exist_ok=True)
        elif each.name == "COPY" and not each.rest.startswith("--from"):
            *sources, target = each.rest.split()
            copied([ROOT / source for source in sources], Path(moved(target, root)), folder)
        elif each.name == "RUN":
            words = each.words(root)
            if os.geteuid() != 0:  # the one line that gives a folder away
                words = [word for word in words if word not in ("-o", "-g", "10001")]
            words[0] = base_python() if words[0] == "python" else words[0]
            folder.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{each.rest}: {done.stdout}{done.stderr}"


def copied(sources: list[Path], target: Path, folder: Path) -> None:
    target = target if target.is_absolute() else folder / target
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            continue
        goal = target if target.suffix else target / source.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, goal)


def line_of(name: str) -> Instruction:
    """The last one with this name."""
    return [each for each in instructions() if each.name == name][-1]


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_the_images_lines_work(image: Path) -> None:
    """Installed and started as in the image, by its user: it serves, and its health check says so."""
    built(image)
    file = image / "etc/headrace/headrace.yaml"
    text = file.read_text()
    for port in (":8080", ":9464"):
        assert text.count(port) == 1
        text = text.replace(port, ":0")
    for folder in _FOLDERS:
        text = text.replace(f"sqlite:{folder}", f"sqlite:{image}{folder}")
    file.write_text(text)
    environ = {"PATH": f"{image}/opt/headrace/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **ENVIRON}
    process = await asyncio.create_subprocess_exec(
        *(*as_user(), *line_of("ENTRYPOINT").words(image), *line_of("CMD").words(image)),
        cwd=moved(line_of("WORKDIR").rest, image),
        env=environ,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            ports = await announced(process)
            assert (await ask(ports[0], chat(model="echo"))).status == 401  # anybody could reach it
            healthy = line_of("HEALTHCHECK").rest.partition("CMD ")[2]
            words = [word.replace("9464", str(ports[1])) for word in json.loads(healthy)]
            check = await asyncio.create_subprocess_exec(*as_user(), *words, env=environ)
            assert await check.wait() == 0
            process.terminate()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    made = image / "var/lib/headrace/headrace.db"
    assert made.stat().st_uid == user()[0]


async def announced(process: asyncio.subprocess.Process) -> list[int]:
    """The ports of both listeners."""
    assert process.stderr is not None
    said, found = "", []
    while len(found) < 2:
        line = (await process.stderr.readline()).decode()
        assert line, f"ended before it served: {said}"
        said += line
        found = [
            int(port) for port in re.findall(r"^  (?:data |admin)  ?http://\S*:(\d+)/", said, re.MULTILINE)
        ]
    return found


def test_the_image_is_small_and_nobodys() -> None:
    """Two stages, not root, a health check; what is copied is let through, and nothing else."""
    stages = [each.rest for each in instructions() if each.name == "FROM"]
    assert len(stages) == 2
    assert len({stage.split()[0] for stage in stages}) == 1, "the environment's Python has to be the image's"
    assert all(":" in stage for stage in stages)
    assert int(line_of("USER").rest.split(":")[0]) > 0
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    copies = [
        each.rest.split()[:-1] for each in instructions() if each.name == "COPY" and "--" not in each.rest
    ]
    assert {f"!{source}" for sources in copies for source in sources} == {
        line for line in ignored if line.startswith("!")
    }
    assert "*" in ignored


def test_the_image_installs_from_the_lock() -> None:
    """With hashes, and nothing else: no dependency that is not locked, no tool to build with."""
    installs = [each.rest for each in instructions() if each.name == "RUN" and "pip install" in each.rest]
    assert len(installs) == 2
    assert installs[0].endswith(" --require-hashes -r requirements.lock")
    assert installs[1].endswith(" --no-deps --no-build-isolation .")


# ── compose ──────────────────────────────────────────────────────────────────────────────────────────────


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return document


def test_compose_has_the_schema() -> None:
    """The Compose Specification's own, as check-jsonschema carries it."""
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    printed(*checker, COMPOSE / "compose.yaml")


def test_composes_files_are_there() -> None:
    """What is mounted and built exists; no image floats; published are the edge and what is on loopback."""
    document = compose()
    for name, service in document["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            known = (COMPOSE / source).exists() if source.startswith(".") else source in document["volumes"]
            assert known, (name, volume)
        if "build" in service:
            context = COMPOSE / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d", service["image"]), service["image"]
        for port in service.get("ports", ()):
            assert name == "nginx" or port.startswith("127.0.0.1:")
        assert service["restart"] == "unless-stopped"
    for name in ("headrace-1", "headrace-2"):
        service = document["services"][name]
        assert int(service["stop_grace_period"].rstrip("s")) >= DEFAULTS.drain + LAST_WORDS_S
        assert service["ulimits"]["nofile"] >= 2 * DEFAULTS.max_connections


def test_composes_configuration_is_valid(tmp_path: Path) -> None:
    """With the secret where a test may write it; nginx's addresses are those that it believes."""
    secret = tmp_path / "admin_token"
    secret.write_text("token")
    text = (COMPOSE / "headrace.yaml").read_text().replace("/run/secrets/admin_token", str(secret))
    settings = config.parse(text, "headrace.yaml", ENVIRON)
    (network,) = compose()["networks"]["inside"]["ipam"]["config"]
    assert [network["subnet"]] == list(settings.trusted_proxies)
    assert settings.limits.store.startswith("redis://redis:")
    needed = {name for name in re.findall(r"\${(\w+)", text) if name.isupper()}
    assert needed <= set(compose()["services"]["headrace-1"]["environment"])


def test_composes_edge_is_the_shipped_one() -> None:
    """With the nodes' names in place of the ports, and nothing else changed."""
    _, _, script = compose()["services"]["nginx"]["command"]
    shipped = ROOT / "nginx" / "headrace.conf"
    sed = script.partition(" > ")[0].replace("/etc/nginx/shipped.conf", str(shipped))
    changed = printed("sh", "-ec", sed).splitlines()
    different = [
        (old.strip(), new.strip())
        for old, new in zip(shipped.read_text().splitlines(), changed, strict=True)
        if old != new
    ]
    rest = " max_fails=3 fail_timeout=5s;"
    assert different == [
        (f"server 127.0.0.1:808{at}{rest}", f"server headrace-{at + 1}:8080{rest}") for at in range(2)
    ]


def test_composes_prometheus_is_the_shipped_one(tmp_path: Path) -> None:
    """With other targets and the token; promtool takes it."""
    ours = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    shipped = yaml.safe_load((ROOT / "grafana" / "prometheus.yml").read_text())
    (job,), (shipped_job,) = ours["scrape_configs"], shipped["scrape_configs"]
    assert job.pop("authorization") == {"credentials_file": "/run/secrets/admin_token"}
    targets = job.pop("static_configs")[0]["targets"]
    shipped_job.pop("static_configs")
    assert ours == shipped
    assert {target.partition(":")[0] for target in targets} <= set(compose()["services"])
    shutil.copy(COMPOSE / "prometheus.yml", tmp_path)
    shutil.copytree(ROOT / "grafana" / "rules", tmp_path / "rules")
    printed(tool("promtool"), "check", "config", "--syntax-only", tmp_path / "prometheus.yml")


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────

_NO_MANIFESTS = {"kustomization.yaml", "adapter.yaml"}


def manifests() -> dict[str, dict[str, Any]]:
    """kind/name -> object, of everything that is applied."""
    files = sorted(file for file in KUBERNETES.iterdir() if file.name not in _NO_MANIFESTS)
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    found = {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}
    assert len(found) == len(documents)
    return found


MANIFESTS = manifests()
NODE = MANIFESTS["StatefulSet/headrace"]["spec"]["template"]
POD = NODE["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_kubernetes_schema(name: str) -> None:
    """Strict: a key that Kubernetes does not know is a mistake."""
    document = MANIFESTS[name]
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**document, "specs": {}}, kubernetes_validate.latest_version(), strict=True
        )


def test_everything_is_applied() -> None:
    """kustomization.yaml forgets no file."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        file.name for file in KUBERNETES.iterdir() if file.name not in _NO_MANIFESTS
    )


def test_manifests_speak_of_the_same_pods() -> None:
    """Selectors, ports, targets and claims name what there is."""
    labels = NODE["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    state = MANIFESTS["StatefulSet/headrace"]["spec"]
    assert state["selector"]["matchLabels"] == labels
    assert MANIFESTS["PodDisruptionBudget/headrace"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["NetworkPolicy/headrace"]["spec"]["podSelector"]["matchLabels"] == labels
    assert f"Service/{state['serviceName']}" in MANIFESTS
    for name in ("Service/headrace", "Service/headrace-nodes"):
        assert MANIFESTS[name]["spec"]["selector"] == labels
        assert {port["targetPort"] for port in MANIFESTS[name]["spec"]["ports"]} <= set(ports)
    target = MANIFESTS["HorizontalPodAutoscaler/headrace"]["spec"]["scaleTargetRef"]
    assert f"{target['kind']}/{target['name']}" in MANIFESTS
    assert "replicas" not in state, "an apply would undo the autoscaler"
    volumes = {each["name"] for each in POD["volumes"]}
    volumes |= {each["metadata"]["name"] for each in state["volumeClaimTemplates"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    assert CONTAINER["envFrom"][0]["secretRef"]["name"] == "headrace"


def test_pods_end_in_order() -> None:
    """preStop, then the drain, then the last words; probes ask what is answered without a token."""
    settings = in_kubernetes()
    command = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    assert POD["terminationGracePeriodSeconds"] >= int(command[1]) + settings.drain + LAST_WORDS_S
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"admin"}
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


def in_kubernetes() -> config.Config:
    """The configuration of the manifests, with what their secret has."""
    secret = MANIFESTS["Secret/headrace"]["stringData"]
    text = MANIFESTS["ConfigMap/headrace"]["data"]["headrace.yaml"]
    assert set(re.findall(r"\${(\w+)}", text)) == set(secret) == set(ENVIRON)
    return config.parse(text, "headrace.yaml", ENVIRON)


def test_kubernetes_configuration_is_valid() -> None:
    """Headrace takes it; the listeners are the container's ports, the ledger lies on its volume."""
    settings = in_kubernetes()
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert (settings.listen_address.port, settings.admin_address.port) == (ports["data"], ports["admin"])
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert settings.ledger.database.startswith(f"sqlite:{mounts['ledger']}/")
    assert settings.worker_count == int(CONTAINER["resources"]["requests"]["cpu"])


def test_autoscaling_asks_for_a_metric_that_is_there() -> None:
    """The adapter's rule makes the one that the autoscaler wants, from one that Headrace has."""
    (wanted,) = MANIFESTS["HorizontalPodAutoscaler/headrace"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((KUBERNETES / "adapter.yaml").read_text())["rules"]["custom"]
    name = wanted["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert re.fullmatch(rule["name"]["matches"], name)
    assert name == "headrace_streams_active"


# ── scale ────────────────────────────────────────────────────────────────────────────────────────────────

COSTS = sizing.Costs(chunk_us=10, request_us=500, stream_kib=40, idle_mib=50, source="a test")


def test_sizing_is_arithmetic() -> None:
    """CPU of chunks and requests at 70 % of a core; memory of streams and processes."""
    assert sizing.streams_a_core(COSTS, 50) == 1400
    assert sizing.cores(COSTS, sizing.Load(1400, 50, 0)) == pytest.approx(1)
    assert sizing.cores(COSTS, sizing.Load(0, 50, 1400)) == pytest.approx(1)
    assert sizing.cores(COSTS, sizing.Load(1400, 50, 1400)) == pytest.approx(2)
    assert sizing.memory_mib(COSTS, sizing.Load(2048, 1, 0)) == pytest.approx(2 * 50 + 80)


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    """The table in the middle comes from the file, the rest stays; a run of a part makes none."""
    first_bytes = {"ttfb_p50_us": 700, "ttfb_p99_us": 1400, "ttfb_500_p99_us": 3100}
    costs = dict(zip(("chunk_400_us", "request_us", "stream_kib", "idle_mib"), COSTS[:4], strict=True))
    figures = {name: {"median": value} for name, value in {**costs, **first_bytes}.items()}
    machine = {"cpu": "a processor", "python": "3.13"}
    document = {"when": "2026-11-21T00:00:00", "machine": machine, "rounds": 3}
    results = tmp_path / "baseline.json"

    def made(peers: dict[str, Any]) -> str:
        results.write_text(json.dumps({**document, "peers": peers}))
        return sizing.page(sizing.PAGE.read_text(), results)

    whole = made({"headrace-full": {"figures": figures}})
    assert "| 50 | 1,400 | 105 MiB |" in whole
    assert "1,400 a second and core" in whole
    assert "| 500 and more streams at once | 3.1 ms to the first byte at 500 (p99) |" in whole
    assert "116 a second: 0.1% of a core" in whole
    none = sizing.page(whole, tmp_path / "none")
    assert "No figures yet" in none
    assert none == sizing.page(sizing.PAGE.read_text(), tmp_path / "none")
    for missing in figures:
        part = {name: figure for name, figure in figures.items() if name != missing}
        assert made({"headrace-full": {"figures": part}}) == none
    assert made({"nginx": {"figures": figures}}) == none


def test_the_page_is_up_to_date() -> None:
    """After a new baseline: `python -m deploy.sizing`; without one the page says that there are none."""
    assert sizing.page(sizing.PAGE.read_text()) == sizing.PAGE.read_text()
