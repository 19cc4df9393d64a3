"""The harness: the real service as a real process on port 0, a real git repository, and requests over HTTP."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jwt
import psutil
import pytest
import requests

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "cco_sidecar.py"
MARK = (
    f"test-{uuid.uuid4()}"  # every process that the tests start, and what those start, carries this in its environment
)
PROJECT = "project-abc"
DOCUMENTED_RESULT = {
    "status": "success",
    "files_created": [
        {"path": "src/api.py", "size": 4096, "language": "python", "checksum": "sha256:abc123..."},
        {"path": "tests/test_api.py", "size": 2048, "language": "python", "checksum": "sha256:def456..."},
    ],
    "files_modified": [{"path": "requirements.txt", "diff": "+1 -0", "changes": ["Added fastapi==0.104.0"]}],
    "files_deleted": [],
    "decisions": [
        "Implemented REST API with FastAPI",
        "Added comprehensive test suite",
        "Used Pydantic models for validation",
    ],
    "metrics": {
        "execution_time_ms": 4500,
        "tokens_used": 15000,
        "test_coverage": 92.3,
        "lines_of_code": 250,
        "complexity_score": 3.2,
    },
    "artifacts": {
        "api_documentation": "# API Documentation\n\n## Endpoints\n...",
        "test_report": "All tests passing (15/15)",
        "performance_report": "API responds in <50ms",
    },
    "errors": [],
    "warnings": ["Consider adding rate limiting to endpoints", "Missing OpenAPI tags on 2 endpoints"],
    "next_steps": ["Security audit required", "Load testing recommended"],
}  # the field ``result`` of a result, as the reference shows it
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a suite in the background: what it starts shall take Ctrl-C as in a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
ALL = ["read_context", "write_results", "publish_events", "spawn_agents"]


def plugin(name: str) -> Any:
    """The module of a bundled plugin."""
    import cco_sidecar

    (file,) = (ROOT / "plugins").rglob(f"{name}.py")
    return cco_sidecar.import_file(file)


def every_route() -> list[Any]:
    """The routes of the module and of some small plugins."""
    import cco_sidecar

    rows = [plugin(name).register_routes() for name in ("result_list", "plugin_list", "renewal", "clearing", "end")]
    return list({(row.method, row.path): row for row in [*cco_sidecar.routes(), *itertools.chain(*rows)]}.values())


def every_command() -> dict[str, Any]:
    """Every command and group with its parser, walked out of the parser itself; the empty name is the program's own."""
    top = plugin("_command_line").new_parser()
    assert top.commands and not top.commands.look_for("")
    found = {"": top} | top.commands.choices
    for name, parser in top.commands.choices.items():
        found |= {f"{name} {word}": inner for word, inner in parser.commands.choices.items()} if parser.commands else {}
    return found


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(cases: dict[str, tuple[Any, Any]]) -> Any:
    """Parameters ``given`` and ``expected`` out of ``{"what it is about": (given, expected)}``."""
    return pytest.mark.parametrize(("given", "expected"), cases.values(), ids=cases.keys())


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of ``condition``; fails when there is none in time."""
    begin = time.monotonic()
    while True:
        if value := condition():
            return value
        waited = time.monotonic() - begin
        assert waited < seconds, f"not within {seconds} s: {condition}"
        time.sleep(max(0.01, min(waited / 10, 0.05)))  # what is long in coming is looked for less often


def git_alone(folder: Path) -> str:
    """A PATH on which git is and nothing else."""
    (folder / "git-alone").mkdir()
    (folder / "git-alone/git").symlink_to(str(shutil.which("git")))
    return str(folder / "git-alone")


# Each service that the tests start would compile the plugins anew, at half a second of work, where bytecode is not
# written. It is kept beside the tests' own folders, so that nothing is written into a checkout.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir(), f"cco-tests-bytecode-{os.getuid()}"))


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without what could steer the service, plus ``more`` and the mark."""
    hidden = ("CCO_", "JWT_TOKEN", "SIDECAR_URL", "AGENT_ID", "PROJECT_ID", "GIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"CCO_TEST_MARK": MARK, "PYTHONPATH": ""} | more


def pytest_configure() -> None:
    from forkserver import Forkserver, Popen
    from hypothesis import HealthCheck, settings

    # How long an example takes says only how busy the machine is.
    settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    subprocess.Popen = Popen  # type: ignore[misc] - which subprocess.run takes too
    Forkserver(MODULE, clean_environment())


def needed(program: str) -> str:
    """Where a program is; without it the test is skipped."""
    return shutil.which(program) or pytest.skip(f"{program} is not installed")


def copy_project(folder: Path) -> Path:
    """A copy of what the package is made of, so that nothing is written into the checkout."""
    folder.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "cco_sidecar.py", "plugins", "vendor_schemas", "LICENSE", "README.md"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=developer", "-c", "user.email=developer@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True, env=clean_environment()
    ).stdout


def make_repository(folder: Path) -> Path:
    """A small Python project with two commits: a copy, since git takes six processes to make it."""
    shutil.copytree(first_repository(), folder, ignore=shutil.ignore_patterns("*.sample"), dirs_exist_ok=True)
    git(folder, "update-index", "-q", "--refresh")  # which knows files by their inodes
    return folder


def outside_repositories(folder: Path) -> Path:
    """``folder``, for a test that needs a place around which nothing looks like a repository."""
    around = [place / ".git" for place in folder.resolve().parents if os.path.lexists(place / ".git")]
    assert not around, f"{around[0]} lies around the folders of tests, as sandboxes leave it: remove it, or set TMPDIR"
    return folder


@functools.cache
def first_repository() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cco-tests-repository-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # which processes of xdist leave out
    for name, content in {
        "src/main.py": "def main():\n    return greet('world')\n",
        "src/greeting.py": "def greet(name):\n    return f'hello {name}'\n",
        "src/session_store.py": "class SessionStore:\n    def save_cookie(self, cookie):\n        self.cookie = cookie\n",
        "tests/test_main.py": "def test_main():\n    assert True\n",
        "docs/guide.md": "# Guide\n\nHow to greet.\n",
        "README.md": "# A project\n",
        "pyproject.toml": '[project]\nname = "sample"\nrequires-python = ">=3.11"\ndependencies = ["fastapi>=0.100", "pydantic"]\n',
        ".gitignore": "build/\n*.log\n.env\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "Initial commit")
    (folder / "src/greeting.py").write_text("def greet(name):\n    return f'Hello, {name}!'\n")
    git(folder, "commit", "-q", "-a", "-m", "Greet politely")
    git(folder, "remote", "add", "origin", "https://someone:password@github.com/org/project")
    return folder


class Client:
    """Requests with one token."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url, self.token = url, token
        self.session = requests.Session()
        self.session.trust_env = False

    def request(self, method: str, path: str, **keywords: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers |= keywords.pop("headers", {})
        return self.session.request(
            method, self.url + path, headers=headers, timeout=keywords.pop("timeout", 30), **keywords
        )

    def get(self, path: str, **params: Any) -> requests.Response:
        return self.request("GET", path, params=params)

    def post(self, path: str, body: Any = None, **keywords: Any) -> requests.Response:
        return self.request("POST", path, json=body, **keywords)

    def delete(self, path: str) -> requests.Response:
        return self.request("DELETE", path)

    def end(self, agent: dict[str, Any]) -> None:
        """Have a spawned agent end: by an order; alone, where there is none, by a signal to its process."""
        if Service.module != MODULE:
            os.kill(agent["process_id"], signal.SIGTERM)
        else:
            assert self.delete(f"/api/agents/{agent['agent_id']}").status_code == 202

    def wait(self, event_type: str = "*", **params: Any) -> Any:
        answer = self.get(f"/api/events/wait/{event_type}", **params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def publish(self, event_type: str = "ping", data: dict[str, Any] | None = None, **more: Any) -> Any:
        body = {"publisher": "tester", "topic": "test", "data": data or {}} | more
        answer = self.post(f"/api/events/{event_type}", body)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def spawn(self, issue: str = "issue-1", agent_type: str = "python-specialist", **more: Any) -> Any:
        answer = self.post("/api/agents/spawn", {"agent_type": agent_type, "issue_id": issue} | more)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def store(
        self, agent_type: str = "python-specialist", status: str = "success", issue: str = "issue-1", **result: Any
    ) -> Any:
        answer = self.post("/api/results", body_of(issue, status, agent_type, **result))
        assert answer.status_code == 201, answer.text
        return answer.json()


def body_of(
    issue: str = "issue-1", status: str = "success", agent_type: str = "python-specialist", **result: Any
) -> dict[str, Any]:
    """A result as agents post it."""
    who = {"agent_id": f"{agent_type}-1", "agent_type": agent_type, "issue_id": issue, "project_id": PROJECT}
    return who | {"result": {"status": status, **result}}


def good_claims(**change: Any) -> dict[str, Any]:
    """The six claims of the reference, changed; None leaves one out."""
    claims = {"sub": "someone", "agent_type": "chief-architect", "project_id": PROJECT, "permissions": ALL}
    claims |= {"iat": int(time.time()), "exp": int(time.time()) + 3600} | change
    return {name: value for name, value in claims.items() if value is not None}


class Service:
    """One running service. ``stop`` and ``kill`` end it; ``start`` starts it again on the same storage."""

    module = MODULE  # what a service runs unless its test says otherwise
    options: tuple[str, ...] = ()  # and with these, beside those of CCO_TEST_OPTIONS, such as "--no-fast"
    without: frozenset[str] = frozenset()  # options that the module does not have: alone it never watches
    backend = ""  # URL of the NATS server on which each storage has a log of its own
    by_url: ClassVar[dict[str, Service]] = {}

    def __init__(
        self, root: Path, storage: Path, *arguments: str, module: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.root, self.storage, self.arguments, self.env = root, storage, arguments, env or {}
        self.module = module or Service.module
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = storage.parent / f"{storage.name}.log"

    @property
    def command(self) -> list[str]:
        where = ["--root", str(self.root), "--storage", str(self.storage), "--port", "0", "--project", PROJECT]
        if Service.backend:
            where += ["--backend", Service.backend, "--nats-prefix", hashlib.md5(bytes(self.storage)).hexdigest()]
        options: Sequence[str] = Service.options if self.module == Service.module else ()
        options = [*options, *(each for each in self.arguments if each not in Service.without)]
        return [sys.executable, str(self.module), "serve", *where, *options]

    def start(self) -> Service:
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, cwd=self.root, env=clean_environment(**self.env)
            )
        until(self._announced, 120)  # without bytecode it is compiled first
        return self

    def _announced(self) -> bool:
        assert self.process and self.process.poll() is None, self.log
        try:
            self.info = json.loads((self.storage / "sidecar.json").read_text())
        except (OSError, ValueError):
            return False
        Service.by_url[self.info["url"]] = self
        return bool(self.info["pid"] == self.process.pid)

    @property
    def url(self) -> str:
        return str(self.info["url"])

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def audit(self) -> list[dict[str, Any]]:
        """The lines of its audit log; the last one may still be being written."""
        whole, _, _ = (self.storage / "audit.log").read_text(errors="replace").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def token(self, agent_type: str = "chief-architect", **claims: Any) -> str:
        """A token with the six claims of the reference, signed with the storage's secret."""
        who = {"sub": f"{agent_type}-{uuid.uuid4().hex[:8]}", "agent_type": agent_type}
        return jwt.encode(good_claims(**who | claims), (self.storage / "jwt.secret").read_text(), algorithm="HS256")

    def client(self, agent_type: str = "chief-architect", **claims: Any) -> Client:
        return Client(self.url, self.token(agent_type, **claims))

    def stop(self) -> int:
        """End it by SIGTERM; its exit code. What it may wait for takes up to 15 s, on a busy machine somewhat longer."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait(60)


@pytest.fixture(scope="module")
def default_port() -> Iterator[int]:
    """3001 for one module of one test process at a time; skipped where something else holds it."""
    import fcntl

    with (Path(tempfile.gettempdir()) / f"cco-sidecar-tests-{os.getuid()}-port-3001.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 3001)) == 0:
                pytest.skip("port 3001 is taken by something else")
        yield 3001


# These promises hold for the lone file too. A test that is about what a plugin adds says so by
# @pytest.mark.needs_plugin("reason").
ALONE = "reference results routing events agents tokens limits errors context end_to_end".split()
# Files some of whose tests are about what any storage promises: @pytest.mark.any_storage has them done on NATS too.
ANY_STORAGE = "events storage agents tokens reference".split()

ATTACKED = "malformed fuzz".split()  # both HTTP servers


def described(rows: Iterable[Any]) -> list[Any]:
    """Parameters of a test; what is about a plugin's endpoint needs that plugin."""
    mark = pytest.mark.needs_plugin("http/openapi makes the document, the lists are plugins")
    table = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [pytest.param(*row, marks=mark) if any(map(OF_PLUGINS.search, row)) else pytest.param(*row) for row in table]


def served(names: Iterable[str], setup: str) -> list[str]:
    """Those of ``names`` that this set-up has."""
    return [name for name in names if setup == "with plugins" or not OF_PLUGINS.search(name)]


OF_PLUGINS = re.compile(
    r"openapi|^plugins$|/api/plugins|auth/refresh|^refresh$|cache/all|^clear whole cache$|cache/context/issue-1[?]"
    r"|^end agent$|/api/agents/agent-1([?]force|$)|^list |^get result$|/api/(results|events|agents)(\?|$|/result-)"
)


@pytest.fixture(scope="module", autouse=True)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """ "with plugins"; "alone": services then run a copy of the module that nothing lies beside; "Tornado's server" in
    the place of the plugin fast; "on NATS".
    """
    chosen = getattr(request, "param", "with plugins")
    Service.options = ("--no-fast",) if chosen == "Tornado's server" else ()
    if chosen != "alone":
        Service.options += tuple(os.environ.get("CCO_TEST_OPTIONS", "").split())
    else:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "plugins").mkdir()  # else those would be found that `pip install -e` has copied somewhere
        Service.module, Service.without = Path(shutil.copy(MODULE, folder)), frozenset({"--no-watch"})
    with contextlib.ExitStack() as stack:
        if chosen == "alone":
            from forkserver import Forkserver

            stack.callback(Forkserver(Service.module, clean_environment()).close)
        if chosen == "on NATS":
            from cluster import servers

            Service.backend = stack.enter_context(servers(tmp_path_factory.mktemp("nats"))).url
        yield chosen
    Service.module, Service.options, Service.backend, Service.without = MODULE, (), "", frozenset()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.removeprefix("test_")
    chosen = ["with plugins"] if name in ANY_STORAGE else []
    if name in ALONE and {"service", "make_service"} & set(metafunc.fixturenames):
        chosen = ["with plugins", "alone"]
    elif name in ATTACKED and {"service", "make_service", "hurried", "fuzzed"} & set(metafunc.fixturenames):
        chosen = ["with plugins", "Tornado's server"]
    if metafunc.definition.get_closest_marker("any_storage"):
        assert name in ANY_STORAGE, "a module's service would start anew between tests with and without the mark"
        chosen.append("on NATS")
    if chosen:
        metafunc.parametrize("setup", chosen, indirect=True, scope="module")


# Files by how long they take, so that no test process works through a long one at the end while the others have nothing.
LONGEST_FIRST = """pipeline real_agents connect command_table context agents start fuzz cluster_faults storage agent_trust
    cluster openapi hooks dashboard forms cli synthesis http2 dashboard_service events brief limits malformed
    storage_limit unsent project_index tokens mcp isolation doctor crash fast inotify meter errors tls readme browser""".split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excepted = [
        item
        for item in items
        if item.get_closest_marker("needs_plugin")
        and getattr(item, "callspec", None)  # its parameters
        and item.callspec.params.get("setup") == "alone"  # type: ignore[attr-defined]
    ]
    if excepted:
        config.hook.pytest_deselected(items=excepted)
        items[:] = [item for item in items if item not in excepted]
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


@pytest.fixture
def make_service(tmp_path: Path, repository: Path) -> Iterator[Callable[..., Service]]:
    """A factory of services for one test: ``make_service("--max-agents", "2", root=..., storage=..., env={...})``."""
    started: list[Service] = []

    def make(*arguments: str, root: Path | None = None, storage: Path | None = None, **keywords: Any) -> Service:
        service = Service(root or repository, storage or tmp_path / "storage", *arguments, **keywords)
        started.append(service)
        return service.start()

    yield make
    for service in started:
        if service.process and service.process.poll() is None:
            service.stop()
    end_stragglers()


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, root: Path | None = None, **more: Any) -> Iterator[Service]:
    """A service in ``folder``, of a new repository where no ``root`` is given, which ends without a fault."""
    running = Service(root or make_repository(folder / "repository"), folder / "storage", *arguments, **more).start()
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.fixture(scope="module")
def service(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests of a module, which keep apart by issue ids and token subjects."""
    with serving(tmp_path_factory.mktemp("shared")) as running:
        yield running
    end_stragglers()


@pytest.fixture
def architect(service: Service) -> Client:
    return service.client("chief-architect")


@pytest.fixture
def coder(service: Service) -> Client:
    return service.client("python-specialist")


@pytest.fixture
def issue() -> str:
    """An issue id of its own for each test."""
    return f"issue-{uuid.uuid4().hex[:8]}"


def marked_processes() -> list[psutil.Process]:
    """Living processes that carry the mark of this run."""
    from forkserver import Forkserver

    found = []
    ours = [os.getpid(), *(server.process.pid for server in Forkserver.of.values() if server.process)]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.pid not in ours
                and process.environ().get("CCO_TEST_MARK") == MARK
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def end_stragglers() -> None:
    """End what agents a stopped service rightly left running."""
    for process in marked_processes():
        with contextlib.suppress(psutil.Error):
            if "serve" not in process.cmdline() and process.name() != "nats-server":
                process.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return fail_skipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return fail_skipped(report)


def fail_skipped(report: Any) -> Any:
    """Where CI is set nothing is skipped: what is missing there is a failure."""
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, which CI forbids: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def what_the_log_shows() -> Iterator[None]:
    """A command that a test runs in this process sets how much its log shows. The next test starts as a process does."""
    levels = {name: logging.getLogger(name).level for name in ("cco", "asyncio", "tornado")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """No process of the tests is left. A fixture, since what a hook of pytest raises in one of several test processes
    fails nothing.
    """
    from forkserver import Forkserver

    yield
    for server in list(Forkserver.of.values()):
        server.close()
    if first_repository.cache_info().currsize:
        shutil.rmtree(first_repository())
    with contextlib.suppress(AssertionError):
        until(lambda: not marked_processes())
    left = []
    for process in marked_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(process.cmdline())
            process.kill()
    assert not left, f"processes were left: {left}"
