"""``cco doctor``: what it says of the programs that run agents, made up here, and of the service that runs."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import (
    MODULE,
    PROJECT,
    ROOT,
    Service,
    body_of,
    clean_environment,
    make_repository,
    marked_processes,
    plugin,
    until,
)

import cco_sidecar
from cco_sidecar import MB, import_file

doctor = import_file(ROOT / "plugins/commands/doctor.py")
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes an executable shell script that is first on PATH; there is an empty home and no key in the environment."""
    folder, home = tmp_path / "bin", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    for name in [name for name in os.environ if name.endswith(("_API_KEY", "_TOKEN", "_BASE_URL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{folder}:{SYSTEM}")
    monkeypatch.setenv("HOME", str(home))

    def write(name: str, code: str, mode: int = 0o755, first: str = "#!/bin/sh\n") -> Path:
        (folder / name).write_text(first + code)
        (folder / name).chmod(mode)
        return folder / name

    return write


def finding(root: Path, word: str) -> tuple[str, str]:
    verdict, text = doctor.examine_program(root, word)
    return verdict, text


# -- is it there, and can it be run


def test_a_program_that_is_not_there_or_cannot_be_run_is_bad(tmp_path: Path, programs: Callable[..., Path]) -> None:
    programs("plain.sh", "echo hello\n", mode=0o644)
    programs("headless.sh", "echo hello\n", first="")
    programs("lost.sh", "", first="#!/nowhere/python -u\n")
    programs("lost2.sh", "", first="#!/usr/bin/env -S -i A=1 nowhere3 -u\n")
    programs("windows.sh", "", first="#!/bin/sh\r\n")
    (tmp_path / "agent").mkdir()
    for word, said in {
        "nowhere": "is not on PATH", "./agent.sh": "is not there", "./agent": "cannot be run", "plain.sh": "is not on PATH",
        "bin/plain.sh": "chmod +x", "headless.sh": "no #! line", "lost.sh": "/nowhere/python", "lost2.sh": "nowhere3", "windows.sh": "\\r",
    }.items():  # fmt: skip
        verdict, text = finding(tmp_path, word)
        assert verdict == "bad" and said in text, (word, text)
    for word in ("sh", "/bin/sh", sys.executable, "git"):
        assert finding(tmp_path, word) == ("good", f"{word} is there and can be run")


def test_a_program_that_is_not_known_is_looked_at_and_never_run(tmp_path: Path, programs: Callable[..., Path]) -> None:
    programs("agent.sh", f"touch {tmp_path}/ran\n")
    for word in ("agent.sh", str(tmp_path / "bin/agent.sh"), "bin/agent.sh"):
        assert finding(tmp_path, word) == ("good", f"{word} is there and can be run")
    assert not (tmp_path / "ran").exists()


# -- its version


LOGGED_IN = "echo '{\"loggedIn\": true}'"


@pytest.mark.parametrize(
    ("code", "verdict", "said"),
    [
        ("echo '2.1.332 (Claude Code)'", "good", "claude 2.1.332, logged in"),
        ("echo 'WARNING: proceeding, in /tmp/v9' >&2; echo 'claude-cli 0.169.0-alpha.1'", "good", "claude 0.169.0-alpha.1, "),
        ("head -c 300 /dev/urandom | tr -d '.'; printf '\\033[2J'", "note", "of unknown version"),
        ("echo", "note", "of unknown version"),
        ("echo; echo 'Cannot find module x'; exit 3", "bad", "its --version ended with 3 and 'Cannot find module x'"),
        ("kill -9 $$", "bad", "its --version ended with -9"),
        ("head -c 10000000 /dev/zero; sleep 100", "note", "of unknown version (it does not say it in"),
        ("yes", "note", "of unknown version (it does not say it in"),
        ("trap '' TERM INT HUP; sleep 100 & sleep 100; sleep 100", "note", "of unknown version (it does not say it in"),
        ("read line; echo \"1.2.3 $line\"", "good", "claude 1.2.3, "),
        ("test -t 0 || test -t 1 || echo 1.2.4", "good", "claude 1.2.4, "),
        ("echo $CLAUDECODE$CLAUDE_CODE_ENTRYPOINT 1.2.5", "good", "claude 1.2.5, "),
        ("(setsid sleep 3 &) ; echo 1.2.6", "good", "claude 1.2.6, "),
    ],
)  # fmt: skip
def test_a_known_program_tells_its_version_or_is_ended(
    tmp_path: Path, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, code: str, verdict: str, said: str
) -> None:
    programs("claude", f'[ "$1" = auth ] && {{ {LOGGED_IN}; exit; }}\n{code}\n')
    monkeypatch.setattr(doctor, "SECONDS", 1.5 if verdict == "note" else 20.0)
    monkeypatch.setenv("CLAUDECODE", "9.9.9")
    monkeypatch.setenv("CLAUDE_CODE_ENTRYPOINT", "9.9.9")
    monkeypatch.setenv("CCO_TEST_MARK", clean_environment()["CCO_TEST_MARK"])
    began = time.monotonic()
    found = finding(tmp_path, "claude")
    assert (found[0], said in found[1]) == (verdict, True), found
    assert "\n" not in found[1] and "\0" not in found[1] and len(found[1]) < 300 and time.monotonic() - began < 60
    until(lambda: not marked_processes())


# -- is somebody logged in


@pytest.mark.parametrize(
    ("program", "says", "verdict", "text"),
    [
        ("claude", "echo '{\n  \"loggedIn\": true,\n  \"authMethod\": \"api_key\"}'", "good", "logged in, `claude auth status` says"),
        ("claude", "echo '{\n  \"loggedIn\": false,\n  \"authMethod\": \"none\"}'; exit 1", "bad", "not logged in, `claude auth status` says"),
        ("claude", "echo 'unknown command auth'; exit 1", "note", "login unknown"),
        ("claude", "sleep 100", "note", "login unknown"),
        ("codex", "echo 'WARNING: helpers' >&2; echo 'Logged in using ChatGPT'", "good", "logged in"),
        ("codex", "echo 'API key configured - ***'", "good", "logged in"),
        ("codex", "echo 'WARNING: helpers' >&2; echo 'Not logged in'; exit 1", "bad", "log in by `codex login`"),
        ("codex", "echo 'Error loading configuration: Not logged in'; exit 1", "note", "login unknown"),
        ("qwen", "echo '✓ Authentication Method: OpenAI-compatible Provider'", "good", "logged in"),
        ("qwen", "echo '✓ Authentication Method: Qwen OAuth'", "note", "login unknown"),
        ("qwen", "echo '⚠️  No authentication method configured.'", "bad", "log in by `qwen auth`"),
        ("opencode", "echo '└  0 credentials'", "note", "login unknown"),
        ("opencode", "echo '└  1 credentials'", "good", "logged in"),
        ("opencode", "echo '└  0 credentials'; echo '●  OpenAI OPENAI_API_KEY'", "good", "logged in"),
        ("gemini", "", "note", "login unknown: it cannot be asked"),
        ("goose", "", "note", "login unknown: it cannot be asked"),
        ("aider", "", "note", "login unknown: it cannot be asked"),
    ],
)  # fmt: skip
def test_a_login_is_what_the_program_says_and_else_unknown(
    tmp_path: Path,
    programs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    says: str,
    verdict: str,
    text: str,
) -> None:
    programs(
        program,
        f'[ "$1" = --version ] && {{ echo 1.2.3; exit; }}\n{says or "echo nothing but --version is asked; touch ran"}\n',
    )
    monkeypatch.setattr(doctor, "SECONDS", 1.5 if says == "sleep 100" else 20.0)
    found = finding(tmp_path, program)
    assert found[0] == verdict and found[1].startswith(f"{program} 1.2.3, ") and text in found[1], found


@pytest.mark.parametrize(
    ("program", "variable", "file", "said"),
    [
        ("codex", "CODEX_API_KEY", "", ("note", "login unknown: `codex login status` says no, but")),
        ("qwen", "OPENAI_API_KEY", "", ("note", "login unknown: `qwen auth status` says no, but")),
        ("gemini", "GEMINI_API_KEY", "", ("good", "its login was not tried:")),
        ("gemini", "", ".gemini/oauth_creds.json", ("good", "its login was not tried:")),
        ("cline", "", ".cline/data/settings/providers.json", ("good", "its login was not tried:")),
        ("copilot", "GH_TOKEN", "", ("good", "its login was not tried:")),
        ("aider", "OPENROUTER_API_KEY", "", ("good", "its login was not tried:")),
        ("cursor-agent", "CURSOR_API_KEY", "", ("good", "its login was not tried:")),
    ],
)
def test_a_key_or_a_file_is_named_and_its_content_is_not(
    tmp_path: Path,
    programs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    variable: str,
    file: str,
    said: tuple[str, str],
) -> None:
    programs(
        program,
        'echo "1.2.3 $*"; [ "$1" = --version ] || { echo "Not logged in"; echo "No authentication method"; exit 1; }',
    )
    if variable:
        monkeypatch.setenv(variable, "hush-hush")
    else:
        path = Path(os.environ["HOME"], file)
        path.parent.mkdir(parents=True)
        path.write_text("hush-hush")
    verdict, text = finding(tmp_path, program)
    assert verdict == said[0] and said[1] in text and (variable or f"~/{file}") in text and "hush" not in text


def test_every_known_program_is_looked_at_by_name(tmp_path: Path, programs: Callable[..., Path]) -> None:
    for name in doctor.launchers.PROGRAMS:
        programs(name, "echo 4.5.6")
        verdict, text = finding(tmp_path, name)
        assert verdict == "note" and text.startswith(f"{name} 4.5.6, login unknown"), text
    assert set(doctor.LOGINS) <= set(doctor.launchers.PROGRAMS)


# -- as a command


def checks(root: Path, *words: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    command = [sys.executable, str(MODULE), "doctor", "--format", "json", *words]
    ended = subprocess.run(command, cwd=root, env=clean_environment(**env), capture_output=True, text=True, timeout=60)
    assert ended.stderr == "" and ended.stdout, ended.stderr
    return ended.returncode, {row["check"]: row for row in json.loads(ended.stdout)["checks"]}


def test_the_commands_of_the_settings_are_looked_at_each_program_once(
    tmp_path: Path, repository: Path, programs: Callable[..., Path]
) -> None:
    (tmp_path / "bin/git").symlink_to("/usr/bin/git")
    environment = {
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path / "home"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    code, found = checks(repository, "--port", "0", **environment)
    assert (
        code == 0
        and found["agent command"]["verdict"] == "note"
        and "none of claude, codex" in found["agent command"]["finding"]
    )

    programs("claude", f"echo x >> {tmp_path}/asked; echo '3.2.1 \"loggedIn\": true'")
    environment["PATH"] += f":{SYSTEM}"
    code, found = checks(repository, "--port", "0", **environment)
    assert (
        code == 0
        and found["agent command"]["verdict"] == "good"
        and "the first known one on PATH" in found["agent command"]["finding"]
    )
    assert (tmp_path / "asked").read_text() == "x\nx\n"

    (repository / "cco.toml").write_text(
        'agent-command = "claude"\n[agent-commands]\ngo-specialist = ["claude", "-p", "{task}"]\nqa-engineer = ["./tester.sh"]\n'
    )
    code, found = checks(repository, "--port", "0", **environment)
    assert code == 1 and [name for name in found if name.startswith("agent")] == [
        "agent command", "agent command of go-specialist", "agent command of qa-engineer",
    ]  # fmt: skip
    assert found["agent command"] | {"check": ""} == found["agent command of go-specialist"] | {"check": ""}
    assert (
        found["agent command of qa-engineer"]["verdict"] == "bad"
        and "./tester.sh" in found["agent command of qa-engineer"]["finding"]
    )
    assert (tmp_path / "asked").read_text() == "x\n" * 4


def test_of_a_healthy_service_everything_is_good_and_nobody_is_told_to_stop_it(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service("--agent-command", sys.executable)
    where = ["--storage", str(service.storage), "--agent-command", sys.executable]
    assert service.process
    for more in ([], ["--port", service.url.rpartition(":")[2]], ["--project", "another-name"]):
        code, found = checks(repository, *where, *more)
        assert code == 0 and {row["verdict"] for row in found.values()} == {"good"}, found
        assert str(service.process.pid) in found["lock"]["finding"] and service.url in found["service"]["finding"]
        assert "stop" not in json.dumps(found)
    service.kill()
    code, found = checks(repository, *where, "--port", "0")
    assert code == 0 and found["service"]["verdict"] == "note" and found["lock"]["finding"] == "free"


def test_agents_that_outlive_their_service_are_named_and_how_they_are_ended(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service("--agent-command", f"{sys.executable} {ROOT / 'tests/sample_agent.py'}")
    where = ["--storage", str(service.storage), "--port", "0"]
    agents = [service.client().spawn(task="hang") for _ in range(2)]
    assert "agents left" not in checks(repository, *where)[1]  # the service has them
    service.kill()
    code, found = checks(repository, *where)
    row = found["agents left"]
    assert (code, row["verdict"]) == (0, "note")
    for agent in agents:
        assert f"{agent['agent_id']} (pid {agent['process_id']}, since 20" in row["finding"]
    os.kill(agents[0]["process_id"], signal.SIGKILL)
    until(lambda: agents[0]["agent_id"] not in checks(repository, *where)[1]["agents left"]["finding"])
    start, kill = re.findall("`([^`]+)`", checks(repository, *where)[1]["agents left"]["finding"])
    assert kill == f"{start} agent kill ID" and f"--storage={service.storage}" in start
    os.kill(agents[1]["process_id"], signal.SIGKILL)
    until(lambda: "agents left" not in checks(repository, *where)[1])


@pytest.mark.parametrize(
    ("command", "unit", "uncounted"),
    [("/bin/true", "usd", True), ("/bin/true", "tokens", True), ("codex", "usd", True), ("codex", "tokens", False),
     ("claude", "usd", False)],
)  # fmt: skip
def test_a_budget_that_counts_nothing_is_told(repository: Path, command: str, unit: str, uncounted: bool) -> None:
    _, found = checks(repository, "--port", "0", "--agent-command", command, f"--budget-{unit}", "1")
    told = f"{Path(command).name} does not report what it spends in {unit}: --budget-{unit} counts nothing of it"
    assert (told in found.get("settings", {}).get("finding", "")) is uncounted


@pytest.mark.parametrize(
    ("named", "by_url", "advice"),
    [(True, False, ""), (True, True, "name its certificate in SSL_CERT_FILE"), (False, False, "have it made for")],
)
def test_a_service_with_https_is_asked_too_and_whether_commands_trust_it_is_told(
    repository: Path, make_service: Callable[..., Service], tmp_path: Path, named: bool, by_url: bool, advice: str
) -> None:
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem".split()
    words += ["-addext", "subjectAltName=IP:127.0.0.1"] * named
    subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)
    service = make_service("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    _, found = checks(repository, "--storage", str(service.storage))
    assert found["service"]["verdict"] == ("good" if named else "note") and "https://" in found["service"]["finding"]
    assert by_url or advice in found["service"]["finding"], found["service"]
    words = [
        sys.executable,
        str(MODULE),
        "status",
        *(("--url", service.url) if by_url else ("--storage", str(service.storage))),
    ]
    ended = subprocess.run(words, cwd=repository, env=clean_environment(), capture_output=True, text=True)
    assert (ended.returncode == 0) is not bool(advice) and advice in ended.stderr, ended.stderr


@pytest.mark.parametrize("place", ["/proc/storage", "/dev/null/storage", "{root}/state"])
def test_a_storage_that_no_start_can_make_is_bad(repository: Path, place: str) -> None:
    named = place.format(root=repository)
    code, found = checks(repository, "--storage", named, "--port", "0")
    why = "lies inside the repository" if "{root}" in place else f"{named} cannot be made, for no folder can be made in"
    assert code == 1 and found["storage"]["verdict"] == "bad" and why in found["storage"]["finding"], found
    code, found = checks(repository, "--port", "0", XDG_STATE_HOME=named.removesuffix("/storage"))
    assert code == 1 and found["storage"]["verdict"] == "bad", found


def test_to_see_whether_a_storage_can_be_made_leaves_nothing_behind(repository: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, found = checks(repository, "--storage", str(tmp_path / "new/storage"), "--port", "0")
    assert code == 0 and found["storage"]["verdict"] == "note", found
    assert sorted(tmp_path.iterdir()) == before


WITHOUT_POWER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]  # root as others are
DENIED = {  # owner and mode of the storage, what the commands say of it
    "of another user": (65534, 0o700, "belongs to nobody (user id 65534): chown -R it to yourself"),
    "of another user, to be looked at": (65534, 0o755, "belongs to nobody (user id 65534): chown -R it to yourself"),
    "read-only": (0, 0o500, "chmod u+rwX"),
    "to be listed alone": (0, 0o400, "chmod u+rwX"),
    "not to be looked at": (0, 0o000, "chmod u+rwX"),
}


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("kind", DENIED)
def test_of_a_storage_that_is_denied_it_is_told_whose_it_is_and_what_to_do(
    repository: Path, tmp_path: Path, kind: str
) -> None:
    owner, mode, told = DENIED[kind]
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "connections.json").write_text("{}")
    (storage / "connections.json").chmod(0o600)
    os.chown(storage, owner, owner)
    os.chown(storage / "connections.json", owner, owner)
    storage.chmod(mode)
    said = {}
    for words in ("doctor", "results list", "serve --port 0"):
        command = [*WITHOUT_POWER, sys.executable, str(MODULE), *words.split(), "--storage", str(storage)]
        said[words] = subprocess.run(
            command, cwd=repository, env=clean_environment(), capture_output=True, text=True, timeout=60
        )
    storage.chmod(0o700)
    table = said["doctor"]
    assert table.returncode == 1 and table.stderr == "" and "VERDICT" in table.stdout, table
    row = next(line for line in table.stdout.splitlines() if line.startswith("storage "))
    assert " bad " in row and told in row and "Errno" not in table.stdout, table.stdout
    looked_at = mode in (0o755, 0o500)
    assert ("no sidecar runs for" if looked_at else told) in said["results list"].stderr, said
    start = said["serve --port 0"]
    assert start.returncode and ("belongs to" if owner else told) in start.stderr, start.stderr
    assert "--storage" in start.stderr and start.stderr.count("\n") == 1, start.stderr


def test_a_storage_in_which_a_token_was_made_before_the_first_start_has_lost_no_database(
    tmp_path: Path, repository: Path
) -> None:
    storage = tmp_path / "storage"
    words = [sys.executable, str(MODULE), "token", "--type", "chief-architect", "--storage", str(storage)]
    subprocess.run(words, cwd=repository, env=clean_environment(), check=True, capture_output=True)
    _, found = checks(repository, "--storage", str(storage))
    assert found["storage"] == found["storage"] | {
        "verdict": "note", "finding": "no database is there yet; the first start makes it"
    }  # fmt: skip


def test_a_database_that_is_gone_is_told(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    database = service.storage / "sidecar.db"
    database.rename(tmp_path / "aside.db")
    code, found = checks(repository, "--storage", str(service.storage))
    assert code == 1 and found["storage"]["verdict"] == "bad", found
    assert "is gone, though a service uses it: put it back" in found["storage"]["finding"]
    service.kill()
    _, found = checks(repository, "--storage", str(service.storage))
    assert found["storage"]["verdict"] == "note" and "is not there" in found["storage"]["finding"], found
    (tmp_path / "aside.db").rename(database)
    _, found = checks(repository, "--storage", str(service.storage))
    assert found["storage"]["verdict"] == "good", found


FAULTS = {  # what settings files hold, and what is told of it
    "[broken\n": ["cco.toml:1: Expected"],
    "prot = 3": ["cco.toml:1: prot: unknown option, did you mean port?"],
    'port = "x"\nmax-agents = -1\nevent-limit = 5': ["cco.toml:1: port: ", "cco.toml:2: max-agents: "],
    'tls-cert = "cert.pem"\nhost = "1.2.3.999"': ["tls-cert: needs --tls-key beside it", "'1.2.3.999' must be"],
}


@pytest.mark.parametrize("content", FAULTS)
def test_what_is_wrong_in_settings_files_is_one_finding_beside_all_others(repository: Path, content: str) -> None:
    (repository / "cco.toml").write_text(content)
    code, found = checks(repository, "--storage", str(repository.parent / "storage"))
    assert code == 1 and found["settings"]["verdict"] == "bad", found
    assert all(told in found["settings"]["finding"] for told in FAULTS[content]), found["settings"]
    assert found["git"]["verdict"] == found["plugins"]["verdict"] == "good" and "agent command" in found
    assert re.fullmatch(r"\d+ bundled: the plugins .*", found["plugins"]["finding"])


def test_a_storage_that_has_only_another_projects_results_or_agents_is_noted(
    make_service: Callable[..., Service], repository: Path
) -> None:
    service = make_service("--project", "earlier", "--agent-command", "true", "--no-synthesis")
    where = ("--storage", str(service.storage), "--port", "0")

    def found(*words: str) -> tuple[str, str]:
        row = checks(repository, *where, *words)[1]["project"]
        return row["verdict"], row["finding"]

    service.stop()
    assert found("--project", "other") == ("good", "other"), "nothing is stored"
    for path, body in (
        ("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"}),
        ("/api/results", body_of() | {"project_id": "earlier"}),
    ):
        service.start()
        assert service.client(project_id="earlier").post(path, body).status_code == 201
        service.stop()
        verdict, finding = found("--project", "other")
        assert verdict == "note" and "but of earlier: " in finding and "project in cco.toml" in finding, finding
        assert found("--project", "earlier") == ("good", "earlier")
    (repository / "cco.toml").write_text('project = "earlier"\n')
    assert found() == ("good", "earlier")
    service.storage.rename(service.storage.with_name("gone"))
    assert found("--project", "other") == ("good", "other"), "there is none"


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('[agent-commands]\ntest-enginer = "sh"\n', "cco.toml:2: agent-commands.test-enginer: unknown agent type"),
        ('[agent-may]\n"*" = ["make"]\ntest-enginer = ["make"]\n', "cco.toml:3: agent-may.test-enginer: unknown"),
        ('[agent-commands]\ntest-engineer = "sh"\n[agent-may]\n"*" = ["make"]\n', None),
    ],
)
def test_an_agent_type_that_nobody_knows_is_told_as_the_start_tells_it(
    repository: Path, table: str, told: str | None
) -> None:
    (repository / "cco.toml").write_text(table)
    _, found = checks(repository, "--storage", str(repository.parent / "storage"), "--port", "0")
    assert found["port"]["finding"] == "0, so a start takes a free one"
    if told is None:
        assert "settings" not in found
    else:
        assert found["settings"]["verdict"] == "note" and told in found["settings"]["finding"]
        assert found["settings"]["finding"].endswith("did you mean test-engineer?")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('[agent-commands]\ntest-engineer = ["sh", "--task", "{tsk}"]\n',
         "cco.toml:2: agent-commands.test-engineer: {tsk} is no placeholder and stays as it is, did you mean {task}?"),
        ('agent-command = "sh {promt}"\n',
         "cco.toml:1: agent-command: {promt} is no placeholder and stays as it is, did you mean {prompt}?"),
        ('agent-command = "claude --verbose"\n', "cco.toml:1: agent-command: claude gets no prompt: say claude alone for"),
    ],
)  # fmt: skip
def test_a_word_of_a_command_that_tells_its_agent_nothing_is_told_as_the_start_tells_it(
    repository: Path, table: str, told: str
) -> None:
    (repository / "cco.toml").write_text(table)
    _, found = checks(repository, "--storage", str(repository.parent / "storage"), "--port", "0")
    assert found["settings"]["verdict"] == "note" and found["settings"]["finding"].startswith(told), found["settings"]


def test_a_service_that_refuses_to_tell_of_its_agent_commands_is_not_said_to_have_none(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    policy = "from cco_sidecar import hookimpl\n\n\n@hookimpl\ndef permission_policy():\n    raise OSError('away')\n"
    (tmp_path / "plugins" / "policy.py").write_text(policy)
    service = make_service("--plugins", str(tmp_path / "plugins"), "--agent-command", "sh")
    _, found = checks(service.root, "--storage", str(service.storage))
    told = found["agent command"]
    assert told["verdict"] == "note" and told["finding"].startswith("the running service does not tell: 403 "), told


def test_plugins_of_ones_own_are_named_beside_the_bundled_ones(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    for name in ("house", "garden"):
        (tmp_path / "plugins" / f"{name}.py").write_text(HOOK)
    _, found = checks(repository, "--storage", str(tmp_path / "storage"), "--plugins", str(tmp_path / "plugins"))
    assert found["plugins"]["finding"].startswith("garden, house, "), found


HOOK = "from cco_sidecar import hookimpl\n\n\n@hookimpl\ndef startup():\n    pass\n"
VARIABLES = {  # variable, value, and what is told beside the file's own fault
    "CCO_SIDECAR_PORT": ("abc", ["CCO_SIDECAR_PORT: 'abc' must be", "cco.toml:1: port: "]),
    "CCO_SIDECAR_LOG_LEVEL": ("loud", ["CCO_SIDECAR_LOG_LEVEL: 'loud' must be", "cco.toml:1: port: "]),
    "CCO_SIDECAR_AGENT_COMMANDS": ("{", ["CCO_SIDECAR_AGENT_COMMANDS: '{' cannot be read"]),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_is_wrong_in_variables_is_told_with_all_others(repository: Path, variable: str) -> None:
    (repository / "cco.toml").write_text('port = "x"\n')
    value, told = VARIABLES[variable]
    code, found = checks(repository, "--storage", str(repository.parent / "storage"), **{variable: value})
    assert code == 1 and found["settings"]["verdict"] == "bad", found
    assert all(text in found["settings"]["finding"] for text in told), found["settings"]
    assert found["git"]["verdict"] == "good" and "agent command" in found


@pytest.mark.parametrize("variable", [True, False])
def test_what_a_flag_or_a_variable_takes_the_place_of_is_no_fault(repository: Path, variable: bool) -> None:
    (repository / "cco.toml").write_text('port = "x"\nmax-agents = 0.5\ntoken-ttl = "long"\n')
    values = {"port": "0", "max_agents": "3", "token_ttl": "60"}
    given = {f"CCO_SIDECAR_{name.upper()}": value for name, value in values.items()} if variable else {}
    flags = [] if variable else [text for name, value in values.items() for text in (cco_sidecar.flag_of(name), value)]
    _, found = checks(repository, "--storage", str(repository.parent / "storage"), *flags, **given)
    assert "settings" not in found, found["settings"]


# -- what can be saved of a damaged database


def overwrite(path: Path, page: int, number: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096 * number)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str], list[str]]:
    """The repository and storage of a service that has ended, and the ids of its results and events."""
    folder = tmp_path_factory.mktemp("filled")
    service = Service(make_repository(folder / "repository"), folder / "storage").start()
    client = service.client()
    for number in range(60):
        client.publish("noted", {"number": number, "load": "x" * 1500})
    results = [client.store(issue=f"issue-{number}", rationale="y" * 1500)["id"] for number in range(40)]
    events = [event["event_id"] for event in client.wait(since="earliest", timeout=0, limit=1000)["events"]]
    service.kill()
    with contextlib.closing(sqlite3.connect(service.storage / "sidecar.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return service.root, service.storage, results, events


def change_a_result(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("update result set body = '{' where seq = 3")
        database.commit()


def spoil_log(path: Path, size: int) -> None:
    log = path.with_name("sidecar.db-wal")
    log.write_bytes(b"x" * 9000)
    os.truncate(log, size)


SPOILT = {  # what happens to the database, how many of 40 results and 100 events are there afterwards, and what is told
    "its first page": (lambda path: overwrite(path, 0), 40, 100, "none was lost"),
    "a page in the middle": (
        lambda path: overwrite(path, path.stat().st_size // 8192),
        30,
        80,
        "some may be lost of: ",
    ),
    "five pages further on": (lambda path: overwrite(path, path.stat().st_size * 2 // 12288, 5), 20, 60, "lost of: "),
    "its second half": (lambda path: os.truncate(path, path.stat().st_size // 2), 0, 30, "some may be lost of: event"),
    "a result's text": (change_a_result, 39, 100, "some may be lost of: result)"),
    "its log": (lambda path: spoil_log(path, 9000), 40, 100, "some may be lost of: sidecar.db-wal"),
    "its log, which is too large to be checked": (
        lambda path: spoil_log(path, 64 * MB),
        40,
        100,
        "some may be lost of: sidecar.db-wal",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_can_be_read_of_a_damaged_database_is_saved(
    tmp_path: Path, filled: Any, make_service: Callable[..., Service], spoilt: str
) -> None:
    root, storage, results, events = filled
    shutil.copytree(storage, tmp_path / "storage")
    path = tmp_path / "storage" / "sidecar.db"
    spoil, most_results, most_events, told = SPOILT[spoilt]
    spoil(path)
    damaged = path.read_bytes()
    command = [sys.executable, str(MODULE), "doctor", "--salvage", "--root", str(root), "--storage", str(path.parent)]
    ended = subprocess.run(command, cwd=root, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "the damaged files are in" in ended.stdout, ended.stderr
    assert told in ended.stdout, ended.stdout
    (aside,) = path.parent.glob("damaged-*")
    assert (aside / path.name).read_bytes() == damaged and not (path.parent / "salvage").exists()
    service = make_service(root=root, storage=path.parent)
    client = service.client()
    assert (
        len({row["id"] for row in client.get("/api/results", limit=1000).json()["results"]} & set(results))
        >= most_results
    )
    found = client.wait(since="earliest", timeout=0, limit=1000)["events"]
    assert len(found) >= most_events and len({event["event_id"] for event in found}) == len(found)
    newest = client.publish("after")["event_id"]  # numbers go on, and a cursor of before is told from one of now
    assert newest.rpartition("-")[2] > max([event["event_id"] for event in found] or [newest]).rpartition("-")[2]
    assert client.get("/api/events/wait/noted", since=events[-1], timeout=0).status_code == 410
    assert client.get("/status").json()["storage"]["results_stored"] >= most_results


@pytest.mark.parametrize("with_log", [True, False])
def test_a_database_of_which_nothing_is_damaged_is_left_as_it_is(tmp_path: Path, filled: Any, with_log: bool) -> None:
    root, storage, *_ = filled
    shutil.copytree(storage, tmp_path / "storage")
    path = tmp_path / "storage" / "sidecar.db"
    database = sqlite3.connect(path)
    if with_log:  # a commit that only the log has, as a kill leaves it
        database.execute("delete from result where seq = 3")
        database.commit()
    before = path.read_bytes()
    command = [sys.executable, str(MODULE), "doctor", "--salvage", "--root", str(root), "--storage", str(path.parent)]
    ended = subprocess.run(command, cwd=root, env=clean_environment(), capture_output=True, text=True, timeout=60)
    after = path.read_bytes()
    database.close()  # which moves the log into the database
    assert (ended.returncode, ended.stdout) == (1, "") and "nothing is damaged of" in ended.stderr, ended
    assert after == before and not {*path.parent.glob("damaged-*"), *path.parent.glob("salvage")}


@pytest.mark.parametrize("kept", [True, False])
def test_the_reasons_of_agents_ends_and_answers_for_repeats_are_saved_where_they_are_kept(
    tmp_path: Path, kept: bool
) -> None:
    (tmp_path / "work").mkdir()
    with contextlib.closing(cco_sidecar.open_database(tmp_path / "old.db")) as database:
        if kept:
            records = plugin("repeats").AnswerRecords(database)
            records.remember("p", "s", "POST /x", "key", "digest", b"{}")
            records.add_outcome("a-1", reason="out of memory")
        else:
            database.execute("drop table agent_outcome")
    counts, unread = plugin("_salvage").rebuild(tmp_path / "old.db", tmp_path / "work")
    assert unread == []
    assert (counts["idempotency"], counts["agent_outcome"]) == (kept, kept)
    with contextlib.closing(plugin("repeats").AnswerRecords(sqlite3.connect(tmp_path / "work/new.db"))) as saved:
        assert saved.rows("select outcome from agent_outcome") == [('{"reason": "out of memory"}',)] * kept
        assert saved.rows("select answer from idempotency") == [(b"{}",)] * kept


VERSION_1 = Path(__file__).with_name("schema_1.sql").read_text()


def opened_by_version_1(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(VERSION_1)
    return database


def opened_with_plugins(path: Path) -> sqlite3.Connection:
    database = cco_sidecar.open_database(path)
    for name in ("guard", "indexes", "repeats"):
        plugin(name).part_class(cco_sidecar.Records)(database)
    return database


ORIGINS: dict[str, list[Callable[[Path], sqlite3.Connection]]] = {  # who opened the database, one after the other
    "the file alone": [cco_sidecar.open_database],
    "with plugins": [opened_with_plugins],
    "the file alone, then with plugins": [cco_sidecar.open_database, opened_with_plugins],
    "version 1": [opened_by_version_1],
    "version 1, then the file alone": [opened_by_version_1, cco_sidecar.open_database],
    "version 1, then with plugins": [opened_by_version_1, opened_with_plugins],
}
LOST_PAGES = {  # names the page
    "the first one": lambda pages: 0,
    "one of the schema's own": lambda pages: [b"CREATE TABLE meta" in page[8:] for page in pages].index(True),
}


def fill(database: sqlite3.Connection, first: int) -> None:
    """60 results, events and agents, and an answer where those are kept."""
    database.row_factory = sqlite3.Row
    for name in map(str, range(first, first + 60)):
        for table in ("event", "result", "agent"):
            columns = database.execute(
                f"select name from pragma_table_info('{table}') where \"notnull\" and name != 'seq'"
            )
            row = {column["name"]: "{}" for column in columns} | ({} if table == "event" else {"id": name})
            cco_sidecar.Records(database).insert(
                table, row | ({} if table == "agent" else {"body": b"%d" % (10**2500)})
            )
    if database.execute("select count(*) from sqlite_master where name = 'idempotency'").fetchone()[0]:
        plugin("repeats").AnswerRecords(database).remember("p", "s", "POST /x", str(first), "digest", b"{}")


@pytest.mark.parametrize(
    ("origin", "lost"),
    [(origin, "the first one") for origin in ORIGINS] + [("with plugins", "one of the schema's own")],
)
def test_a_database_whose_first_page_is_lost_is_saved_whoever_made_it(tmp_path: Path, origin: str, lost: str) -> None:
    path = tmp_path / "old.db"
    (tmp_path / "work").mkdir()
    for number, opened in enumerate(ORIGINS[origin]):
        with contextlib.closing(opened(path)) as database:
            fill(database, 60 * number)
            database.execute("pragma wal_checkpoint(truncate)")
    content = path.read_bytes()
    overwrite(path, LOST_PAGES[lost]([content[at : at + 4096] for at in range(0, len(content), 4096)]))
    counts, unread = plugin("_salvage").rebuild(path, tmp_path / "work")
    saved = 60 * len(ORIGINS[origin])
    assert [counts[table] for table in ("event", "result", "agent")] == [saved] * 3
    by_plugins = "with plugins" in origin
    assert (counts["idempotency"], unread) == ((by_plugins, []) if lost == "the first one" else (0, ["idempotency"]))


def test_a_page_of_another_schema_is_no_first_page(tmp_path: Path) -> None:
    """Tables would be read where indexes lie."""
    (tmp_path / "work").mkdir()
    with contextlib.closing(opened_by_version_1(tmp_path / "old.db")) as database:
        fill(database, 0)
    content = (tmp_path / "old.db").read_bytes()
    for number in range(0, len(content), 4096):
        if content.find(b"CREATE ", number, number + 4096) > 0:
            overwrite(tmp_path / "old.db", number // 4096)
    overwrite(tmp_path / "old.db", 0)
    with pytest.raises(cco_sidecar.StartError, match="nothing can be read of"):
        plugin("_salvage").rebuild(tmp_path / "old.db", tmp_path / "work")


def test_what_version_1_had_columns_for_is_saved_among_the_facts_about_agents(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    service.stop()
    path = service.storage / "sidecar.db"
    for file in path.parent.glob("sidecar.db*"):
        file.unlink()
    evidence = "1, '[]', null, 'birth', '[[7, \"birth\"]]', 1, 1.5, 2, 3, 4, 5.0, '[\"GET\", \"/x\", 1.5]'"
    with contextlib.closing(opened_by_version_1(path)) as database:
        fill(database, 0)
        database.executescript(f"""
            update agent set project = '{PROJECT}', issue = 'i-1', state = 'completed', started = 1.0, ended = 2.0,
              exit_code = 0, time_limit = 60.0;
            insert into agent_evidence values ('0', {evidence}), ('1', {evidence}), ('2', {evidence.replace("1.5", "'x'", 1)});
            insert into agent_outcome values ('1', '{{"cpu": 9.0, "reason": "out of memory"}}');
            update result set body = 'x' where seq = 3;
            insert or ignore into meta values ('epoch', '01234567');
        """)
    plugin("_salvage").salvage(cco_sidecar.load_settings({"root": str(service.root), "storage": str(path.parent)}, {}))
    with contextlib.closing(cco_sidecar.Records(cco_sidecar.connect_database(path, read_only=True))) as read:
        row = read.agent(PROJECT, "0")
    assert row and (row["birth"], row["ordered"], row["seen"]) == ("birth", 1, '[[7, "birth"]]')
    client = service.start().client()
    for agent, seconds in (("0", 1.5), ("1", 9.0)):
        told = client.get(f"/api/agents/{agent}/status").json()
        usage, call = told["usage"], told["last_call"]
        assert (usage["cpu_seconds"], usage["peak_memory_bytes"], usage["processes"]) == (seconds, 3, 4)
        assert (call["method"], call["path"]) == ("GET", "/x")
    assert told["reason"] == "out of memory"
    spoilt = client.get("/api/agents/2/status").json()
    assert (spoilt["usage"]["cpu_seconds"], spoilt["usage"]["processes"]) == (0.0, 4)


@pytest.mark.parametrize(("given", "next_number"), [(700, 701), (3, 43), (1 << 62, 43), ("x", 43)])
def test_the_numbers_of_events_go_on_where_all_events_are_gone(tmp_path: Path, given: object, next_number: int) -> None:
    (tmp_path / "work").mkdir()
    with contextlib.closing(cco_sidecar.open_database(tmp_path / "old.db")) as database:
        database.execute("insert into sqlite_sequence values ('event', ?)", (given,))
        database.execute("insert into position (project, subject, type, filter, seq, moved) values (1, 1, 1, 1, 42, 1)")
    plugin("_salvage").rebuild(tmp_path / "old.db", tmp_path / "work")
    with contextlib.closing(sqlite3.connect(tmp_path / "work/new.db")) as saved:
        (newest,) = saved.execute("select seq from sqlite_sequence where name = 'event'").fetchone()
        assert newest + 1 == next_number


@pytest.mark.parametrize("linked", [True, False])
def test_a_database_is_there_until_the_new_one_takes_its_place(
    tmp_path: Path, filled: Any, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    root, storage, *_ = filled
    shutil.copytree(storage, tmp_path / "storage")
    path, replace, there = tmp_path / "storage" / "sidecar.db", os.replace, []
    change_a_result(path)
    damaged = path.read_bytes()

    def look_and_replace(source: Path, target: Path) -> None:
        if target == path:
            there.append(path.exists() and path.read_bytes() == damaged)
        replace(source, target)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", look_and_replace)
    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    plugin("_salvage").salvage(cco_sidecar.load_settings({"root": str(root), "storage": str(path.parent)}, {}))
    (aside,) = path.parent.glob("damaged-*")
    assert there == [True] and (aside / path.name).read_bytes() == damaged != path.read_bytes()


KILLED_AT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import cco_sidecar
left = int(sys.argv[2])

def killing(name):
    def step(*arguments, real=getattr(os, name), **keywords):
        global left
        left -= any("storage" in str(argument) for argument in arguments)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return step

for name in ("link", "unlink", "rename", "replace", "mkdir"):
    setattr(os, name, killing(name))
sys.exit(cco_sidecar.main(sys.argv[3:]))
"""


def test_a_salvage_that_is_killed_at_any_step_loses_nothing_of_what_the_log_holds(
    tmp_path: Path, filled: Any, make_service: Callable[..., Service]
) -> None:
    root, storage, *_ = filled
    shutil.copytree(storage, tmp_path / "whole")
    with contextlib.closing(sqlite3.connect(tmp_path / "whole/sidecar.db")) as database:
        database.execute("update result set issue = 'in the log' where seq = 3")
        database.commit()
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")  # as a kill leaves it
    overwrite(tmp_path / "damaged/sidecar.db", 0)
    words = ["doctor", "--salvage", "--root", str(root), "--storage"]
    ended, asides = [], []
    while ended[-1:] != [0]:
        place = tmp_path / f"storage-{len(ended)}"
        shutil.copytree(tmp_path / "damaged", place)
        command = [sys.executable, "-c", KILLED_AT, str(MODULE.parent), str(len(ended)), *words, str(place)]
        ended.append(subprocess.run(command, cwd=root, env=clean_environment(), capture_output=True).returncode)
        if (place / "salvaged.db").exists():
            make_service(root=root, storage=place).stop()
        elif ended[-1]:
            plugin("_salvage").salvage(cco_sidecar.load_settings({"root": str(root), "storage": str(place)}, {}))
        plugin("_database").check_database(place / "sidecar.db", thorough=True)
        with contextlib.closing(sqlite3.connect(place / "sidecar.db")) as saved:
            assert saved.execute("select count(*), max(issue = 'in the log') from result").fetchall() == [(40, 1)]
        asides += [{file.name for file in folder.iterdir()} for folder in place.glob("damaged-*")]
    assert {*ended[:-1]} == {-signal.SIGKILL} and len(ended) > 6
    assert all(names >= {"sidecar.db", "sidecar.db-wal"} for names in asides)


def test_nothing_is_salvaged_of_a_storage_in_use_or_of_one_that_is_not_there(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    for storage, said in ((service.storage, f"pid {service.info['pid']}"), (tmp_path / "nowhere", "there is no")):
        command = [sys.executable, str(MODULE), "doctor", "--salvage", "--storage", str(storage)]
        ended = subprocess.run(
            command, cwd=repository, env=clean_environment(), capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 1 and said in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert service.client().publish()["published"] is True


ANSWERS = {
    b"<html>": "is no sidecar",
    b"[]": "is no sidecar",
    b'{"service": "orchestration-sidecar", "project_id": "stranger", "checks": {}}': "is not the service of this repository",
    json.dumps({"service": "orchestration-sidecar", "project_id": PROJECT, "version": "1", "checks": {"storage": "unhealthy: disk full",
                "event_bus": "healthy"}}).encode(): "is not healthy: storage: unhealthy: disk full",
}  # fmt: skip


@pytest.fixture
def pretender() -> Iterator[Any]:
    """A web server that answers everything with its ``body``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.body)  # type: ignore[attr-defined]

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("body", [*ANSWERS, None])
def test_what_answers_in_the_place_of_the_service_is_told_from_it(
    tmp_path: Path, repository: Path, pretender: Any, body: bytes | None
) -> None:
    storage, pretender.body = tmp_path / "storage", body
    storage.mkdir(mode=0o700)
    url = f"http://127.0.0.1:{pretender.server_port if body else 1}"
    info = {
        "pid": os.getpid(),
        "url": url,
        "project_id": PROJECT,
        "root": str(repository),
        "version": "1",
        "started_at": "",
    }
    (storage / "sidecar.json").write_text(json.dumps(info))
    settings = doctor.cco_sidecar.load_settings({"root": str(repository), "storage": str(storage), "project": PROJECT})
    verdict, text = doctor.examine(lambda: doctor.check_service(settings))
    assert verdict == "bad" and (ANSWERS[body] if body else "does not answer") in text, text


@pytest.mark.parametrize("holder", ["a sidecar", "another server", "nobody"])
def test_a_port_is_bad_where_a_start_on_it_fails(
    tmp_path: Path, pretender: Any, make_service: Callable[..., Service], holder: str
) -> None:
    pretender.body, root = b"<html>", make_repository(tmp_path / "here")
    port = make_service().url.rpartition(":")[2] if holder == "a sidecar" else str(pretender.server_port)
    words = ["--storage", str(tmp_path / "another"), "--port", "0" if holder == "nobody" else port]
    code, found = checks(root, *words)
    if holder == "nobody":
        assert (code, found["port"]["verdict"]) == (0, "good"), found
    else:
        start = subprocess.run([sys.executable, str(ROOT / "cco_sidecar.py"), "serve", "--root", str(root), *words],
                               env=clean_environment(), capture_output=True, text=True, timeout=60)  # fmt: skip
        assert (code, start.returncode, found["port"]["verdict"]) == (1, 1, "bad")
        assert start.stderr.strip().removeprefix("cco: ") in found["port"]["finding"]
        assert (f"by the sidecar of project {PROJECT}" in start.stderr) is (holder == "a sidecar")
        free = "`cco run` without --port takes a free one by itself"
        assert found["port"]["finding"].endswith(free)
        flags = {"root": str(root), "storage": str(tmp_path / "another")}
        settings = msgspec.structs.replace(doctor.cco_sidecar.load_settings(flags, {}), port=int(port))
        verdict, text = doctor.examine(lambda: doctor.check_port(settings))  # the default one, which nobody chose
        assert verdict == "note" and "is already taken" in text and text.endswith(free)


@pytest.mark.parametrize("name", ["日本語", "проект", "---"])
def test_of_a_folder_whose_name_makes_no_project_id_it_is_told_how_to_give_one(tmp_path: Path, name: str) -> None:
    root = make_repository(tmp_path / name)
    _, found = checks(root, "--port", "0", XDG_STATE_HOME=str(tmp_path / "state"))
    assert found["project"]["verdict"] == "note" and "--project" in found["project"]["finding"], found
    _, found = checks(root, "--port", "0", "--project", "mine", XDG_STATE_HOME=str(tmp_path / "state"))
    assert (found["project"]["verdict"], found["project"]["finding"]) == ("good", "mine")
    command = [sys.executable, str(MODULE), "--port", "0", "--storage", str(tmp_path / "storage")]
    told = f"{name!r} has no letter from a to z and no digit, so the project id is project"
    given = tmp_path / "given"
    with (
        given.open("wb") as file,
        subprocess.Popen([*command, "--project", "project"], cwd=root, env=clean_environment(), stderr=file) as service,
    ):
        try:
            until((tmp_path / "storage/sidecar.json").exists)
        finally:
            service.terminate()
    assert told not in given.read_text()
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, cwd=root, env=clean_environment(), stderr=file) as service:
        try:
            until(lambda: told in log.read_text())
        finally:
            service.terminate()
