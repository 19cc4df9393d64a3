"""The README, typed: its first screen, its tour and "Where things are", in terminals, as a newcomer types them.

A ```bash block is typed. A ```console block shows a terminal: what follows `$ ` is typed, the rest is what it prints,
where `...` stands for any text, and alone in a line for any lines. Where a command goes on, as a service does, the
README says "another terminal" or "Ctrl-C" before the next command.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from conftest import ROOT, Client, Service, clean_environment, copy_project, git, make_repository, until

README = (ROOT / "README.md").read_text()
SUITE = ".venv/bin/pytest"  # the command that this test is a part of


# -- what the README has typed, and shows


class Step(NamedTuple):
    """One command. ``prose`` is what its section says since the one before; ``shown`` is None in a ```bash block."""

    section: str
    line: int
    prose: str
    typed: str
    shown: str | None

    @property
    def name(self) -> str:
        return self.typed.partition("\n")[0][:60]


def read_steps(text: str) -> list[Step]:
    """The commands of a Markdown text, in order."""
    steps: list[Step] = []
    section, prose, fence, block = "", "", None, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if fence is not None and line == "```\n":
            for typed, shown in split_block(fence, block):
                steps.append(Step(section, number - block.count("\n"), prose, typed, shown))
                prose = ""
            fence, block = None, ""
        elif fence is not None:
            block += line
        elif line.startswith("```"):
            fence = line[3:].strip()
        else:
            section, prose = (line[3:].strip(), "") if line.startswith("## ") else (section, prose + line)
    return steps


def split_block(fence: str, block: str) -> list[tuple[str, str | None]]:
    if fence == "console":
        assert block.startswith("$ "), block
        parts = [part.partition("\n") for part in re.split(r"(?m)^\$ ", block)[1:]]
        return [(typed + "\n", shown) for typed, _, shown in parts]
    return [(typed, None) for typed in split_commands(block)] if fence == "bash" else []


def split_commands(block: str) -> list[str]:
    """A script as the commands after which a shell would prompt again."""
    commands, command = [], ""
    for line in block.splitlines(keepends=True):
        command += line
        checked = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
        if checked.returncode == 0 and not checked.stderr and not command.endswith("\\\n"):
            commands.append(command)
            command = ""
    assert not command, command
    return commands


STEPS = [step for step in read_steps(README) if SUITE not in step.typed]
FIRST = [step for step in STEPS if not step.section]
TOUR = [step for step in STEPS if step.section == "Five minutes"]
PLACES = [step for step in STEPS if step.section == "Where things are"]
TYPED = FIRST + TOUR + PLACES


# -- what is the same although it is not


VARIES = [
    (r"\bresult-[0-9a-f]{13}-[0-9a-f]{16}\b", "RESULT"),
    (r"\b[0-9a-f]{32}\b", "UUID"),
    (r"\bevt-[0-9a-f]{8}-\d{12}\b", "EVENT"),
    (r"(?<=-)[0-9a-f]{12}\b", "HASH"),
    (r"(?m)^[0-9a-f]{8}(?=  )", "SHORT"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"(?m)^ {0,5}\d+\.\d\d s(?=  )", "SECONDS"),
    (r"(?<=://127\.0\.0\.1:)(?!3001\b)\d+", "PORT"),
    (r'(\bpid|"pid":) \d+', r"\1 NUMBER"),
    (r"(?<=\S) {2,}", "  "),  # columns are as wide as what is in them
]


def alike(text: str) -> str:
    """A text without what differs from run to run: ids, times, ports, process numbers, the width of columns."""
    for pattern, word in VARIES:
        text = re.sub(pattern, word, text)
    return text


def shows(shown: str, printed: str) -> bool:
    """Whether a command printed what the README shows of it."""
    pattern = ""
    for line in alike(shown).splitlines():
        pattern += r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + "\n"
    return re.fullmatch(pattern, alike(printed)) is not None


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a-0123456789ab  running  pid 12\n", "a-ba9876543210  running  pid 4567\n", True),
        ('"pid": 12,\n', '"pid": 4567,\n', True),
        ("ID             STATE\na-0123456789ab  up\n", "ID              STATE\na-ba9876543210  up\n", True),
        ("  1.36 s  listens on http://127.0.0.1:4000\n", " 12.01 s  listens on http://127.0.0.1:51234\n", True),
        ("evt-c8a9e7f3-000000000002\n", "evt-0a000000-000000000017\n", True),
        ("at 2026-11-23T00:03:29Z\n", "at 2027-01-01T10:00:00Z\n", True),
        ("first\n...\nlast\n", "first\nlast\n", True),
        ("first\n...\nlast\n", "first\nany\nmore\nlast\n", True),
        ('{"id": "...", "stored": true}\n', '{"id": "x", "stored": true}\n', True),
        ("", "", True),
        ("", "a word\n", False),
        ("one\n", "one\ntwo\n", False),
        ("one\ntwo\n", "two\none\n", False),
        ("one two\n", "one  two\n", False),
        ("ID  STATE  TIME\n", "ID  TIME  STATE\n", False),
        ("ID  STATE\n", "ID  STATE  TIME\n", False),
        ("  indented\n", "indented\n", False),
        ("3 files\n", "4 files\n", False),
        ("rapid 1\n", "rapid 2\n", False),
        ("http://127.0.0.1:3001\n", "http://127.0.0.1:3002\n", False),
        ("first\n...\nlast\n", "first\nlast\nmore\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_only_what_differs_from_run_to_run_may_differ(shown: str, printed: str, same: bool) -> None:
    assert shows(shown, printed) is same


def test_a_block_is_split_where_a_shell_would_prompt_again() -> None:
    script = "cat > a <<'EOF'\nif x\nEOF\n# a word\nif true; then\n  b \\\n    c\nfi\nd && \\\n  e\n"
    commands = ["cat > a <<'EOF'\nif x\nEOF\n", "# a word\n", "if true; then\n  b \\\n    c\nfi\n", "d && \\\n  e\n"]
    assert split_commands(script) == commands
    text = "# T\nword\n```bash\na\nb\n```\nmore\n\n## S\n```console\n$ c\none\n$ d\n```\n```\n$ e\n```\n"
    assert read_steps(text) == [
        Step("", 4, "# T\nword\n", "a\n", None), Step("", 4, "", "b\n", None),
        Step("S", 11, "", "c\n", "one\n"), Step("S", 11, "", "d\n", ""),
    ]  # fmt: skip


# -- files that are there for a while (before the terminals, which the end of a make_service would end too)


def test_token_and_pipe_last_as_the_agent_and_sidecar_json_as_the_service(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "sleep 60")
    body = {"agent_type": "python-specialist", "issue_id": "issue-1"}
    spawned = service.client().post("/api/agents/spawn", body).json()
    folder = service.storage / "agents" / spawned["agent_id"]
    assert {"context.json", "pid", "token", "header", "output.pipe"} <= {path.name for path in folder.iterdir()}
    assert service.client().delete(f"/api/agents/{spawned['agent_id']}").status_code == 202
    until(lambda: not {path.name for path in folder.iterdir()} & {"token", "header", "output.pipe"})
    service.kill()
    assert (service.storage / "sidecar.json").exists()
    service.start()
    assert service.stop() == 0 and not (service.storage / "sidecar.json").exists()


# -- somebody at their terminals


class Terminal:
    """A bash in a terminal of its own."""

    PROMPT = re.compile(rb"\x02(\d+)\x03")  # the exit code of what was typed
    PROMPT_OR_BUSY = re.compile(PROMPT.pattern + rb"|(?<=  Stop:     Ctrl-C\n)")

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._said, self.busy = b"", False
        self._ours, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[1] &= ~termios.OPOST  # line ends stay as they are
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        termios.tcsetwinsize(theirs, (50, 160))
        own = {"PS1": "\x02$?\x03", "PS2": "", "HISTFILE": "/dev/null", "VIRTUAL_ENV_DISABLE_PROMPT": "1"}
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"], cwd=folder, env=environment | own,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        threading.Thread(target=self._read, daemon=True).start()
        self._finish(0, 10)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while chunk := os.read(self._ours, 65_536):
                self._said += chunk

    def type(self, text: str, seconds: float = 60) -> tuple[int | None, str]:
        """The exit code of a command, None where it goes on, and what it printed until then."""
        before = len(self._said)
        os.write(self._ours, text.encode())
        return self._finish(before, seconds)

    def press_ctrl_c(self) -> int | None:
        return self.type("\x03", 15)[0]

    def _finish(self, before: int, seconds: float) -> tuple[int | None, str]:
        ends = self.PROMPT if self.busy else self.PROMPT_OR_BUSY
        try:
            end = until(lambda: ends.search(self._said, before), seconds)
        except AssertionError:
            pytest.fail(f"no prompt within {seconds} s, but:\n{self._said[before:].decode()}")
        self.busy = end[1] is None
        return None if self.busy else int(end[1]), self._said[before : end.start()].decode()

    def close(self) -> None:
        if self.busy:
            self.press_ctrl_c()
        os.write(self._ours, b"exit\n")
        self._bash.wait(10)
        os.close(self._ours)


class Reader:
    """Somebody who types the README in an empty home, in order, in as many terminals as it says."""

    UNREACHABLE = re.compile("NewConnectionError|ConnectTimeoutError|ProxyError|NameResolutionError")

    def __init__(self, folder: Path) -> None:
        self.home, self.project, self.machine = folder / "home", folder / "home/sidecar", folder / "machine"
        for made in (self.home, self.machine, folder / "tmp"):
            made.mkdir()
        copy_project(self.project)
        self.repository = make_repository(folder / "repository")
        self.environment = self._environment(folder)
        self.terminals = [Terminal(self.project, self.environment)]
        self._read: dict[Step, tuple[int | None, str]] = {}
        self._gave_up = ""

    def _environment(self, folder: Path) -> dict[str, str]:
        """This environment in another home: no cco, the tests' Python, pip's settings, a machine to copy to."""
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin/python3")
        (programs / "ssh").write_text(f"#!/bin/sh\n# ssh MACHINE COMMAND\ncd '{self.machine}' && exec sh -c \"$2\"\n")
        (programs / "ssh").chmod(0o700)
        path = [place for place in os.environ["PATH"].split(os.pathsep) if not shutil.which("cco", path=place)]
        home, config = Path.home(), Path.home() / ".config/pip/pip.conf"
        own = {"HOME": str(self.home), "TMPDIR": str(folder / "tmp"), "PATH": os.pathsep.join([str(programs), *path])}
        own |= {"PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(home / ".cache/pip"))}
        own |= {"PIP_CONFIG_FILE": str(config)} if config.exists() else {}
        hidden = ("VIRTUAL_ENV", "XDG_", "PYTHON", "PROMPT_COMMAND", "PS")
        return {name: value for name, value in clean_environment(**own).items() if not name.startswith(hidden)}

    def read(self, wanted: Step) -> tuple[int | None, str]:
        """What came of a step of the README. What stands before it is typed first."""
        for step in TYPED[: TYPED.index(wanted) + 1]:
            if self._gave_up:
                pytest.skip(self._gave_up)
            if step not in self._read:
                self._read[step] = self._follow(step)
        return self._read[wanted]

    def _follow(self, step: Step) -> tuple[int | None, str]:
        for terminal in self.terminals:
            if terminal.busy and "Ctrl-C" in step.prose:
                assert terminal.press_ctrl_c() == 0
        if "another terminal" in step.prose:
            self.terminals.append(Terminal(self.project, self.environment))
        here = self.terminals[-1]
        assert not here.busy, f"README.md:{step.line} does not say where, or that Ctrl-C ends the command before"
        typed = step.typed.replace("REPOSITORY", str(self.repository))
        code, printed = here.type(typed, 300 if "pip install" in typed else 60)
        if code and self.UNREACHABLE.search(printed):
            self._gave_up = "the package registry is not reachable"
            pytest.skip(self._gave_up)
        return code, printed.replace(str(self.home), "/home/you")

    def storage(self, home: Path | None = None) -> Path:
        """The tour's storage."""
        return next(((home or self.home) / ".local/state/cco-sidecar").glob("greeter-*"))

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, default_port: int) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


def check(reader: Reader, step: Step) -> None:
    code, printed = reader.read(step)
    where = f"README.md:{step.line}: {step.typed}"
    assert not code, f"{where}ends with {code}:\n{printed}"
    if step.shown is not None and not shows(step.shown, printed):
        difference = "\n".join(difflib.ndiff(alike(step.shown).splitlines(), alike(printed).splitlines()))
        pytest.fail(f"{where}prints something else:\n{printed}\n{difference}")


# -- the first screen and the tour


def test_the_first_command_serves_the_repository_on_the_default_port(reader: Reader, default_port: int) -> None:
    code, printed = reader.read(FIRST[0])
    assert code is None, printed
    health = requests.get(f"http://127.0.0.1:{default_port}/health", timeout=10).json()
    assert health["status"] == "healthy" and health["project_id"] == reader.repository.name


def test_ci_types_both_commands_of_the_first_screen() -> None:
    script = (ROOT / ".ci/run").read_text()
    function = re.search(r"(?ms)^readme_command\(\).*?^\}$", script)
    assert function and "serve=$(readme_command 1) suite=$(readme_command 2)" in script
    both = f"{function[0]}\nreadme_command 1; readme_command 2"
    taken = subprocess.run(["bash", "-c", both], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    typed = [step.typed for step in read_steps(README) if not step.section]
    assert taken == "".join(typed) and len(typed) == 2 and typed[1].endswith(f"&& {SUITE}\n")
    assert "pip install" not in script


@pytest.mark.parametrize("step", FIRST + TOUR, ids=lambda step: step.name)
def test_the_tour_prints_what_the_readme_shows(reader: Reader, step: Step) -> None:
    check(reader, step)


# -- where things are


def test_every_file_of_the_storage_is_in_the_table_and_for_its_owner_alone(reader: Reader) -> None:
    reader.read(TOUR[-1])
    table = README[README.index("| in the storage |") :].partition("\n\n")[0]
    names = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    storage = reader.storage()
    found = {str(path.relative_to(storage)): path for path in storage.rglob("*")}
    files = [name for name, path in found.items() if path.is_file()]
    assert [name for name in files if not any(is_named(name, row) for row in names)] == [], "not in the README's table"
    absent = [row for row in names if not any(is_named(name, row) for name in files)]
    replica = ["replica.db", "replica.db-wal", "replica.db-shm", "node"]
    assert absent == [
        *replica,
        "tls/",
        "connections.json",
        "audit.log.N",
        "runs/PROJECT/ID.json",
        "pipelines/",
        "empty.git/",
        "connections.lock",
    ], "what comes of more than the tour"
    told = set(re.findall(r"`([\w.]+)`", table))
    for name in files:
        assert not name.startswith("agents/") or re.sub(r"\d+", "N", found[name].name) in told, name
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (storage, *found.values())}
    assert modes == {(True, 0o700), (False, 0o600)}


def is_named(name: str, row: str) -> bool:
    """Whether a file of the storage is one of those that a name in the table stands for."""
    pattern = re.sub(r"\b[A-Z]+\b", "[^/]+", re.escape(row))
    return re.fullmatch(pattern + (".+" if row.endswith("/") else ""), name) is not None


REMOVAL = next(number for number, step in enumerate(PLACES) if step.typed.startswith("rm "))


@pytest.fixture(scope="module")
def known(reader: Reader) -> dict[str, Any]:
    """What the tour's service knew before anything was moved, and a token of it."""
    reader.read(TOUR[-1])
    token = new_token(reader, reader.home / "greeter")
    return state("http://127.0.0.1:3001", token) | {"token": token}


def new_token(reader: Reader, root: Path) -> str:
    command = [str(reader.project / ".venv/bin/cco"), "token", "--type", "chief-architect"]
    return subprocess.check_output(command, cwd=root, env=reader.environment, text=True).strip()


def state(url: str, token: str) -> dict[str, Any]:
    def ask(path: str) -> Any:
        answer = Client(url, token).get(path)
        assert answer.ok, answer.text
        return answer.json()

    agents = {agent["agent_id"]: (agent["state"], agent["exit_code"]) for agent in ask("/api/agents")["agents"]}
    logs = {agent: ask(f"/api/agents/{agent}/logs")["text"] for agent in agents}
    results, events = ask("/api/results")["results"], ask("/api/events")["events"]
    return {"results": results, "events": events, "agents": agents, "logs": logs}


@contextlib.contextmanager
def served(reader: Reader, root: Path, home: Path) -> Iterator[dict[str, Any]]:
    """A service for a repository in somebody's home, on a free port; what its sidecar.json says."""
    command = [str(reader.project / ".venv/bin/cco"), "--root", str(root), "--port", "0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=reader.environment | {"HOME": str(home)}, **quiet)
    try:
        announced = reader.storage(home) / "sidecar.json"
        until(lambda: process.poll() is not None or announced.exists())
        yield json.loads(announced.read_text())
    finally:
        process.terminate()
        assert process.wait(120) == 0


@pytest.mark.parametrize("step", PLACES[:REMOVAL], ids=lambda step: step.name)
def test_a_repository_is_moved_as_the_readme_says(reader: Reader, known: dict[str, Any], step: Step) -> None:
    check(reader, step)


@pytest.mark.parametrize("home", ["home", "machine"])
def test_what_was_moved_knows_all_that_it_knew(reader: Reader, known: dict[str, Any], home: str) -> None:
    reader.read(PLACES[REMOVAL - 1])
    with served(reader, reader.home / "moved/greeter", getattr(reader, home)) as info:
        assert info["project_id"] == "greeter"
        assert state(info["url"], known["token"]) | {"token": known["token"]} == known
        assert len(known["results"]) == len(known["agents"]) == 1 and len(known["events"]) >= 2


def test_a_renamed_repository_keeps_its_state_by_its_project_id(reader: Reader, known: dict[str, Any]) -> None:
    reader.read(PLACES[REMOVAL - 1])
    renamed = reader.machine / "welcome"
    shutil.copytree(reader.home / "moved/greeter", renamed)
    (renamed / "cco.toml").write_text('project = "greeter"\n')
    digits = hashlib.sha256(os.fsencode(renamed)).hexdigest()[:12]
    reader.storage(reader.machine).rename(reader.storage(reader.machine).parent / f"greeter-{digits}")
    with served(reader, renamed, reader.machine) as info:
        assert state(info["url"], known["token"]) | {"token": known["token"]} == known


def test_a_missing_secret_and_index_are_made_anew_and_all_tokens_end(reader: Reader, known: dict[str, Any]) -> None:
    reader.read(PLACES[REMOVAL - 1])
    storage = reader.storage()
    (storage / "jwt.secret").unlink()
    shutil.rmtree(storage / "index")
    with served(reader, reader.home / "moved/greeter", reader.home) as info:
        assert Client(info["url"], known["token"]).get("/api/results").status_code == 401
        token = new_token(reader, reader.home / "moved/greeter")
        assert state(info["url"], token)["results"] == known["results"]
        assert Client(info["url"], token).get("/api/context/issue-1/test-engineer").ok
    assert list((storage / "index").iterdir())


@pytest.mark.parametrize("step", PLACES[REMOVAL:], ids=lambda step: step.name)
def test_everything_is_removed_as_the_readme_says(reader: Reader, step: Step) -> None:
    check(reader, step)


def test_nothing_else_was_written(reader: Reader) -> None:
    reader.read(PLACES[-1])
    states = reader.home / ".local/state/cco-sidecar"
    assert [folder.name.rpartition("-")[0] for folder in states.iterdir()] == [reader.repository.name]
    others = (reader.project, states, reader.home / ".rustup")  # pip asks a rustc on PATH for its version
    files = [path for path in reader.home.rglob("*") if path.is_file()]
    assert [path for path in files if not any(map(path.is_relative_to, others))] == []
    assert list((reader.home.parent / "tmp").iterdir()) == []
    assert git(reader.repository, "status", "--porcelain") == ""


@pytest.mark.parametrize(("agent_type", "code"), [("python-specialist", 1), ("documentation-expert", 0)])
def test_the_tours_agent_fails_with_a_last_line_of_its_own_where_its_result_is_not_stored(
    tmp_path: Path, agent_type: str, code: int
) -> None:
    script = re.findall(r"(?s)cat > agent\.sh <<'EOF'\n(.*?)\nEOF\n", README)[0]
    (tmp_path / "context.json").write_text('{"context": {"relevant_files": []}}')
    (tmp_path / "header").write_text("Authorization: Bearer none")
    names = {"CCO_CONTEXT_FILE": "context.json", "CCO_HEADER_FILE": "header", "SIDECAR_URL": "nothing://nobody"}
    names["AGENT_TYPE"] = agent_type
    ended = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=clean_environment(**names), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=30,
    )  # fmt: skip
    lines = ended.stdout.splitlines()
    assert ended.returncode == code
    if code:
        assert lines[-1] == "I stored no result" and lines[-2].startswith("curl: "), ended.stdout


@pytest.mark.parametrize(("manual", "name"), [("README.md", "agent.sh"), ("plugins/README.md", "team.sh")])
def test_an_agent_of_the_manual_whose_result_is_refused_has_failed(
    make_service: Callable[..., Service], tmp_path: Path, manual: str, name: str
) -> None:
    (script,) = re.findall(rf"(?ms)^cat > \S*{name} <<'EOF'\n(.*?)^EOF$", (ROOT / manual).read_text())
    (tmp_path / name).write_text(script)
    service = make_service("--agent-command", f"sh {tmp_path / name}", "--no-synthesis")
    body = {"agent_type": "python-specialist", "issue_id": "i", "permissions": ["read_context"]}
    agent_id = service.client().post("/api/agents/spawn", body).json()["agent_id"]
    status = until(lambda: (now := service.client().get(f"/api/agents/{agent_id}/status").json())["ended_at"] and now)
    assert status["state"] == "failed" and status["exit_code"] > 0, status
    assert service.client().get("/status").json()["storage"]["results_stored"] == 0
