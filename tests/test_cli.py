"""The command line: every command against a running service, as people and scripts use it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.server
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from urllib.parse import urlsplit

import jwt
import psutil
import pytest
from conftest import (
    MODULE,
    PROJECT,
    ROOT,
    Service,
    body_of,
    clean_environment,
    end_stragglers,
    every_command,
    git,
    make_repository,
    marked_processes,
    plugin,
    until,
)

import cco_sidecar
from cco_sidecar import default_storage, import_file

AGENT = """
import os, sys, time
print("working on", os.environ["TASK"], flush=True)
if os.environ["TASK"].startswith("slow"):
    while not os.path.exists(os.environ["TEST_GATE"]):
        time.sleep(0.02)
if os.environ["TASK"].startswith("copy"):
    os.write(1, open(os.environ["TASK"].split()[1], "rb").read())
    os._exit(0)
print("done", flush=True)
sys.exit(int(os.environ["TASK"].split()[-1]))
"""


class Here(Service):
    """A service on the storage that its repository has by default, so that commands find it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.state = folder / "state"
        root = make_repository(folder / "repository")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.state))
            storage = default_storage(root, PROJECT)
        storage.parent.mkdir(parents=True)
        super().__init__(root, storage, "--agent-command", json.dumps([sys.executable, "-c", AGENT]), *arguments)

    def environment(self, **more: str) -> dict[str, str]:
        return clean_environment(XDG_STATE_HOME=str(self.state), COLUMNS="200", **more)

    def run(self, *words: str, cwd: Path | None = None, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """A command as a process, by default from a subfolder of the repository."""
        command = [sys.executable, str(MODULE), *words]
        place = cwd or self.root / "src"
        return subprocess.run(
            command, cwd=place, env=self.environment(**env), input=text, capture_output=True, text=True, timeout=40
        )

    def follow(self, *words: str) -> tuple[subprocess.Popen[bytes], Callable[[], list[str]]]:
        """A command that goes on, and the lines that it has printed so far."""
        command = [sys.executable, "-u", str(MODULE), *words]
        output = self.storage.parent / f"follow-{time.monotonic_ns()}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment(), stdout=file, stderr=subprocess.DEVNULL
            )
        return process, lambda: output.read_text().splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    running = Here(tmp_path_factory.mktemp("here"), "--log-level", "debug")
    running.start()
    yield running
    running.stop()
    end_stragglers()


@pytest.fixture
def cco(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """A command run in this process, which is quicker: (exit code, stdout, stderr)."""
    caplog.set_level("ERROR", "cco")  # what the commands set themselves, taken back afterwards
    for name in [
        name for name in os.environ if name.startswith(("CCO_", "JWT_TOKEN", "SIDECAR_URL", "AGENT_ID", "PROJECT_ID"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(here.state))
    monkeypatch.chdir(here.root / "src")

    def run(*words: str, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        try:
            code = cco_sidecar.main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# -- every command in every format

RESULT = body_of("cli-1")
EXAMPLES = {  # what follows a command's name; {result} and {agent} are ids that exist
    "token": "--type python-specialist",
    "doctor": "",
    "schema": "",
    "plugins": "",
    "health": "",
    "status": "",
    "issues": "--since earliest",
    "context get": "cli-1 test-engineer --task greet --max-files 3",
    "context refresh": "--issue cli-1 --agent-type test-engineer",
    "context clear": "--all",
    "results store": "-",
    "results list": "--issue cli-1 --status success",
    "results get": "{result}",
    "events publish": """noted --topic t --data '{"issue_id": "cli-1"}' --priority high""",
    "events subscribe": "agent_completed --since earliest --filter issue_id:cli-1",
    "events list": "--type agent_completed --issue cli-1 --filter status:success --limit 300",
    "agent spawn": "--type python-specialist --issue cli-1 --task 'exit 0' --env A=b",
    "agent list": "",
    "agent status": "{agent}",
    "agent logs": "{agent} --tail 5",
    "agent kill": "{agent}",
    "agent types": "",
}
TOLD_ELSEWHERE = {"brief", "serve", "demo", "demo-agent", "run", "run-service", "connect", "disconnect", "mcp"}
TOLD_ELSEWHERE |= {"approvals", "approve", "deny", "answer", "hook", "wait", "dashboard", "export"}
GROUPS = {name for name, parser in every_command().items() if name and parser.commands}
KEYS = {  # what a table and its CSV show, and what JSON has beyond it
    "health": "checks.storage", "status": "agents.active", "context get": "path", "results list": "issue_id", "results get": "result.status",
    "events list": "event_id", "agent list": "state", "issues": "issue_id", "agent status": "output_tail", "agent types": "category", "plugins": "hooks",
    "doctor": "verdict", "agent spawn": "agent_id", "results store": "event_id", "events publish": "subscribers_notified",
}  # fmt: skip


def test_every_command_has_an_example_here() -> None:
    assert set(every_command()) - {""} == set(EXAMPLES) | TOLD_ELSEWHERE | GROUPS


def test_our_commands_are_there_whatever_the_settings_say(
    here: Here, tmp_path: Path, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--no-plugins", "health"], ["health", "--no-plugins"], ["health", "--plugins", str(tmp_path)]):
        assert cco(*words)[::2] == (0, "")
    (tmp_path / "cco.toml").write_text("prot = 1")
    monkeypatch.chdir(tmp_path)
    assert cco("health", "--url", here.url)[0] == 0
    assert cco("health") == (
        2,
        "",
        cco("token", "--type", "test-engineer")[2],
    )  # the settings are wrong, not the command
    assert cco("context", "get", "--help")[1].startswith("usage: cco context get")


@pytest.mark.parametrize("more", [(), ("--explain",)])
def test_a_context_without_files_says_so(
    here: Here, cco: Callable[..., tuple[int, str, str]], more: tuple[str, ...]
) -> None:
    words = ("context", "get", "cli-1", "python-specialist", *more)
    assert cco(*words, "--max-files", "0")[:2] == (0, "(none: no file here could be given)\n")
    assert json.loads(cco(*words[:4], "--max-files", "0", "--format", "json")[1])["context"]["relevant_files"] == []
    etag = here.client().get("/api/context/cli-1/python-specialist").headers["ETag"]
    assert cco(*words, "--since", etag)[:2] == (0, "(none: no file has changed since that answer)\n")


@pytest.mark.parametrize(
    ("left_out", "cut", "said"),
    [
        (["a.py"], False, "cut; left out: 1 not chosen for test-engineer"),
        (["a.py"], True, "cut (files); left out: 1 not chosen for test-engineer or cut"),
        ([".env", "logo.xyz"], False, "cut; left out: 1 may hold credentials, 1 in no known language"),
        ([], False, "cut, nothing left out"),
    ],
)
def test_how_many_files_a_context_does_not_hold_is_said_with_the_reason(
    left_out: list[str], cut: bool, said: str
) -> None:
    names = ["given.py", *left_out]
    context = {
        "agent_type": "test-engineer", "truncated": cut, "truncation_strategy": "files", "total_size_bytes": 5,
        "estimated_tokens": 1, "context": {
            "relevant_files": [{"path": "given.py"}],
            "project_structure": {"files": names, "total_files": len(names)},
        },
    }  # fmt: skip
    assert plugin("_client_view").sums_of(context).endswith(said)


def test_a_context_is_explained_by_rank_score_share_and_reasons(cco: Callable[..., tuple[int, str, str]]) -> None:
    words = ("context", "get", "cli-1", "python-specialist", "--task", "session cookie of src/main.py", "--explain")
    code, out, err = cco(*words)
    assert code == 0 and out.split()[:5] == ["RANK", "SCORE", "PATH", "GIVEN", "WHY"]
    first, second = out.splitlines()[1:3]
    assert re.fullmatch(r"1 +[\d.]+ +src/main\.py +whole +named in the task.*", first) and re.match(
        r"2 +[\d.]+ +src/session_store\.py", second
    )
    sums = re.fullmatch(
        r"(\d+) of (\d+) files, [\d,]+ bytes, about [\d,]+ tokens, nothing cut; left out: (.*); index ready\n", err
    )
    assert sums and len(out.splitlines()) - 1 == int(sums[1])
    left_out = dict(reversed(part.split(" ", 1)) for part in sums[3].split(", "))
    assert int(sums[2]) - int(sums[1]) == sum(map(int, left_out.values())), err
    code, out, err = cco(*words, "--max-tokens", "700", "--format", "json")
    assert (
        code == 0 and set(json.loads(out)["files"][0]) == {"rank", "score", "path", "given", "why"} and "cut (" in err
    )
    code, out, err = cco(*words[:4], "--task", "zzqqx wwvvk", "--explain")
    assert code == 0 and "  no word of the task occurs; " in out.splitlines()[1]
    assert err.endswith("; index ready; no word of the task occurs\n")


@pytest.fixture(scope="module")
def ids(here: Here) -> dict[str, str]:
    client = here.client()
    result = client.store(issue="cli-1")["id"]
    agent = client.spawn("cli-1", task="exit 0")["agent_id"]
    until(lambda: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    return {"result": result, "agent": agent}


@pytest.mark.parametrize("style", ["table", "json", "csv"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_command_prints_what_it_was_asked_for_and_nothing_else(
    name: str, style: str, cco: Callable[..., tuple[int, str, str]], ids: dict[str, str]
) -> None:
    if name == "context clear":
        cco("context", "get", "cli-1", "test-engineer")
    arguments = EXAMPLES[name].replace("{result}", ids["result"]).replace("{agent}", ids["agent"])
    words = [*name.split(), *shlex.split(arguments)]
    code, out, err = cco(*words, "--format", style, text=json.dumps(RESULT))
    if (name, style) == ("agent logs", "csv"):
        assert (code, out) == (2, "") and "--format: 'csv' is unknown" in err
        return
    assert (code, err) == (0, ""), (out, err)
    if name == "token":
        assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", out)
    elif name == "agent logs" and style != "json":
        assert out == "working on exit 0\ndone\n"
    elif name == "events subscribe" and style == "json":
        assert {json.loads(line)["event_type"] for line in out.splitlines()} == {"agent_completed"}
    elif name == "events subscribe":
        assert out and all("agent_completed" in line for line in out.splitlines()) and ids["result"] in out
    elif style == "json" or name == "schema":
        assert isinstance(json.loads(out), dict)
    elif style == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1
        assert KEYS.get(name, "") in [cell for row in rows for cell in (*row, "")]
    else:
        head, *lines = out.splitlines()
        assert head == head.upper() and lines and not any(line.endswith(" ") for line in lines)
        assert KEYS.get(name, "").lower() in out.lower()


def test_a_table_of_one_thing_leaves_out_what_is_null(
    cco: Callable[..., tuple[int, str, str]], ids: dict[str, str]
) -> None:
    words = ["agent", "status", ids["agent"]]
    told = json.loads(cco(*words, "--format", "json")[1])
    assert told["signal"] is None and told["exit_code"] == 0
    fields = [line.split()[0] for line in cco(*words)[1].splitlines()]
    assert "signal" not in fields and "exit_code" in fields
    shown = cco(*words)[1].splitlines()
    column = shown[0].index("VALUE")
    at = next(number for number, line in enumerate(shown) if line.startswith("output_tail"))
    assert [line[column:] for line in shown[at : at + 2]] == told["output_tail"] == ["working on exit 0", "done"]
    assert not shown[at + 1][:column].strip()
    assert ["signal", ""] in list(csv.reader(io.StringIO(cco(*words, "--format", "csv")[1])))


def test_a_list_with_nothing_in_it_says_so(cco: Callable[..., tuple[int, str, str]]) -> None:
    for name in ("results", "events"):
        assert cco(name, "list", "--issue", "nowhere") == (0, "(none)\n", "")
    assert cco("results", "list", "--issue", "nowhere", "--format", "csv") == (0, "", "")
    code, out, _ = cco("results", "list", "--issue", "nowhere", "--format", "json")
    assert code == 0 and json.loads(out) == {"results": [], "next_cursor": None, "has_more": False}


def test_the_issues_are_listed_with_how_each_stands(
    here: Here, cco: Callable[..., tuple[int, str, str]], ids: dict[str, str]
) -> None:
    here.client().store(issue="cli-failed", status="failed")
    listed = json.loads(cco("issues", "--format", "json")[1])
    assert listed == here.client().get("/api/issues").json() and listed["issues"][-1]["issue_id"] == "cli-failed"
    head, *rows = cco("issues", "--state", "failed", "--limit", "1")[1].splitlines()
    assert head.split() == ["ISSUE_ID", "STATE", "WORKING", "RESULTS", "LAST_AT", "TITLE"]
    assert [row.split()[:4] for row in rows] == [["cli-failed", "failed", "-", "1"]]
    code, _, err = cco("issues", "--state", "faild")
    assert code == 2 and "did you mean failed?" in err
    for state in get_args(import_file(ROOT / "plugins/agents/_story_issues.py").IssueState):
        assert cco("issues", "--state", state)[0] == 0


@pytest.mark.parametrize(
    "words", ["export cli-1 -o {path}", "export cli-1 --output {path}", "context get cli-1 qa-engineer -o {path}"]
)
def test_what_is_printed_is_written_into_a_file(
    tmp_path: Path, cco: Callable[..., tuple[int, str, str]], ids: dict[str, str], words: str
) -> None:
    code, _, err = cco(*words.format(path=tmp_path / "file").split())
    assert (code, err) == (0, "") and "cli-1" in (tmp_path / "file").read_text()


def test_what_an_agent_says_cannot_steer_the_terminal(here: Here, cco: Callable[..., tuple[int, str, str]]) -> None:
    here.client().publish("noted", {"text": "\x1b[2J\x07"}, topic="\x1b]0;owned\x07")
    for words in (["events", "list", "--type", "noted"], ["events", "subscribe", "noted", "--since", "earliest"]):
        code, out, _ = cco(*words)
        assert code == 0 and "owned" in out and not re.search(r"[\x00-\x09\x0b-\x1f]", out)


# -- exit codes


def test_exit_codes_tell_good_refused_wrong_use_and_not_reachable_apart(here: Here, tmp_path: Path) -> None:
    good = here.run("health", "--format", "json")
    assert good.returncode == 0 and json.loads(good.stdout)["project_id"] == PROJECT and good.stderr == ""
    refused = here.run("results", "get", "result-unknown")
    assert refused.returncode == 1 and re.fullmatch(r"cco: 404 REQ_002: .+\n", refused.stderr) and refused.stdout == ""
    wrong = here.run("agent", "status")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    away = here.run("health", cwd=make_repository(tmp_path / "other"))
    assert away.returncode == 3 and away.stderr.count("\n") == 1 and "start it with" in away.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("agent spawn --type python-specialist --issue a..b --task x", "cco: 400 REQ_001: issue_id: must be letters"),
        ("events publish ping --topic x --ttl 0", "cco: 400 EVT_002: ttl_seconds: Expected `float` >= 1.0"),
        (
            "results store --agent a..b --agent-type python-specialist --issue i --status success",
            "cco: 400 REQ_001: agent_id: must be letters",
        ),
    ],
)
def test_a_field_that_the_service_refuses_is_named_first(
    cco: Callable[..., tuple[int, str, str]], words: str, said: str
) -> None:
    code, _, err = cco(*words.split())
    assert code > 0 and err.startswith(said) and " - at `" not in err, err


@pytest.mark.parametrize("details", ["text", ["path"], 5, None, {"path": 1}, {}])
def test_a_refusal_whose_details_are_none_of_ours_is_told(details: object) -> None:
    content = json.dumps({"code": "BAD", "message": "Not this one", "details": details}).encode()
    assert str(plugin("_client").Refused(418, content)) == "418 BAD: Not this one"


# -- finding the service, and being somebody


def test_the_service_is_found_from_any_folder_of_the_repository_whatever_its_project_is_called(
    here: Here, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("", "docs", "src"):
        monkeypatch.chdir(here.root / place)
        _, out, _ = cco("health", "--format", "json")
        assert json.loads(out)["project_id"] == PROJECT != here.root.name


def test_a_url_and_a_token_are_enough_where_there_is_no_repository(
    here: Here, tmp_path: Path, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, token, _ = cco("token", "--type", "documentation-expert")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("JWT_TOKEN", token.strip())
    for url in (here.url, here.url + "/api/"):
        assert cco("results", "list", "--url", url)[0] == 0
    code, _, err = cco("events", "publish", "noted", "--url", here.url)
    assert code == 1 and "403 AUTH_003" in err
    monkeypatch.setenv("SIDECAR_URL", here.url + "/api")  # what an agent's environment says
    assert cco("status")[0] == 0
    monkeypatch.delenv("JWT_TOKEN")
    code, _, err = cco("status")
    assert code == 1 and "401 AUTH_001" in err and "; no token was given: set JWT_TOKEN to one that `cco token`" in err


def test_who_has_another_secret_than_the_service_is_told_so(
    here: Here, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCO_SIDECAR_JWT_SECRET", "of another team, and of more than thirty-two characters")
    code, _, err = cco("status")
    assert code == 1 and "401 AUTH_001" in err and "; the service signs with another secret" in err
    monkeypatch.setenv("JWT_TOKEN", "given by somebody")
    code, _, err = cco("status")
    assert code == 1 and "401 AUTH_001" in err and "secret" not in err and err.count("\n") == 1


REFUSED_TOKENS: dict[str, tuple[str, list[str], str]] = {  # by the token: the code, a command that hears it, the doctor
    "expired": ("401 AUTH_002", ["status"], "bad"),
    "given by somebody": ("401 AUTH_001", ["results", "list"], "bad"),
    "without the permission": ("403 AUTH_003", ["events", "publish", "noted"], "note"),
    "of another agent's issue": ("403 AUTH_003", ["results", "store", "-"], "note"),
}


@pytest.mark.parametrize("kind", REFUSED_TOKENS)
def test_of_a_refused_token_it_is_told_that_it_is_the_one_of_the_variable_and_what_to_do(
    here: Here, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    told, words, verdict = REFUSED_TOKENS[kind]
    asked = ["--type", "python-specialist", "--issue", "another"]
    if kind == "without the permission":
        asked = ["--type", "chief-architect", "--permissions", "read_context"]
    token = cco("token", *asked)[1].strip()
    if kind == "expired":
        secret = next(here.state.rglob("jwt.secret")).read_text().strip()
        claims = jwt.decode(token, options={"verify_signature": False})
        token = jwt.encode(claims | {"exp": 1_700_000_000}, secret, "HS256")
    monkeypatch.setenv("JWT_TOKEN", "nonsense" if kind == "given by somebody" else token)
    code, _, err = cco(*words, text=json.dumps(RESULT))
    advice = (
        "; the token is the one of the variable JWT_TOKEN: unset it, or set it to what `cco token --type TYPE` prints"
    )
    assert code == 1 and told in err and err.endswith(f"{advice}\n"), err
    found = {row["check"]: row for row in json.loads(cco("doctor", "--format", "json")[1])["checks"]}["plugins"]
    assert found["verdict"] == verdict and found["finding"].endswith(advice), found
    _, _, err = cco(*words, "--url", here.url, text=json.dumps(RESULT))
    assert told in err and "JWT_TOKEN: set it to what" in err and err.endswith(" where that service runs\n"), err
    monkeypatch.setenv("AGENT_ID", "a-1")  # who is not told how to have more than was given to it
    _, _, err = cco(*words, text=json.dumps(RESULT))
    assert told in err and err.endswith("; the token is the agent's own\n"), err


def test_a_token_made_on_the_command_line_is_what_it_was_asked_to_be(
    here: Here, cco: Callable[..., tuple[int, str, str]]
) -> None:
    words = "token --type python-specialist --agent-id py-1 --issue i-1 --ttl 60 --permissions read_context"
    _, out, _ = cco(*words.split())
    claims = jwt.decode(out.strip(), (here.storage / "jwt.secret").read_text(), algorithms=["HS256"])
    assert (claims["sub"], claims["agent_type"], claims["issue_id"], claims["project_id"]) == (
        "py-1",
        "python-specialist",
        "i-1",
        PROJECT,
    )
    assert claims["permissions"] == ["read_context"] and claims["exp"] - claims["iat"] == 60
    first, second = (
        jwt.decode(cco("token", "--type", "test-engineer")[1].strip(), options={"verify_signature": False})["sub"]
        for _ in range(2)
    )
    assert re.fullmatch(r"cli-test-engineer-\w+", first) and first != second


def test_a_token_can_be_made_before_the_first_start(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "repository")
    command = [sys.executable, str(MODULE), "token", "--type", "chief-architect"]
    environment = clean_environment(XDG_STATE_HOME=str(tmp_path / "state"))
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0 and ended.stderr == "" and ended.stdout.count(".") == 2
    (secret,) = (tmp_path / "state").rglob("jwt.secret")
    assert secret.stat().st_mode & 0o777 == 0o600 and git(root, "status", "--porcelain") == ""


# -- results and events


def test_a_result_is_stored_from_a_file_once_per_key(
    here: Here, tmp_path: Path, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(RESULT | {"issue_id": issue}))
    answers = [
        json.loads(cco("results", "store", str(file), "--idempotency-key", issue, "--format", "json")[1])
        for _ in range(2)
    ]
    assert answers[0] == answers[1] and answers[0]["stored"] is True
    assert len(here.client().get("/api/results", issue_id=issue).json()["results"]) == 1
    file.write_text(json.dumps(RESULT | {"issue_id": issue, "extra": 1}))
    code, _, err = cco("results", "store", str(file), "--idempotency-key", issue)
    assert code == 1 and "422 REQ_006" in err


def test_a_result_file_may_be_as_large_as_a_result_and_one_that_is_not_there_is_said(
    tmp_path: Path, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    file = tmp_path / "large.json"
    file.write_text(json.dumps(RESULT | {"issue_id": issue, "log": "x" * (17 << 20)}))
    assert cco("results", "store", str(file))[0] == 0
    assert cco("results", "store", str(tmp_path / "gone.json")) == (
        2,
        "",
        f"cco: {tmp_path / 'gone.json'}: No such file or directory\n",
    )


INPUTS = {  # what takes - for standard input, and where the text is then found
    "agent spawn --type python-specialist --issue {issue} --wait --task -": ("agent list --issue {issue}", "task"),
    "events publish noted --data -": ("events list --filter issue_id:{issue}", "data"),
    "events publish noted --topic {issue} --data=-": ("events list --topic {issue}", "data"),
    "results store --issue {issue} --agent a --agent-type test-engineer --status success --decisions -": (
        "results list --issue {issue}",
        "result",
    ),
}


@pytest.mark.parametrize("words", INPUTS)
def test_a_dash_stands_for_standard_input_where_a_text_is_wanted(
    words: str, here: Here, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    text = json.dumps({"issue_id": issue, "note": "Grüße"}) if "--data" in words else "exit 0\nfür alle; exit 0"
    code, _, err = cco(*words.format(issue=issue).split(), text=text + "\n")
    assert code == 0, err
    listed, field = INPUTS[words]
    rows = next(iter(json.loads(cco(*listed.format(issue=issue).split(), "--format", "json")[1]).values()))
    found = rows[-1][field]
    if field == "result":
        assert found["decisions"] == text.split("; ")
    else:
        assert found == (json.loads(text) if field == "data" else text)


def test_standard_input_is_read_once_and_must_be_text(here: Here, cco: Callable[..., tuple[int, str, str]]) -> None:
    store = "results store --issue i --agent a --agent-type test-engineer --status success --decisions - --metrics=-"
    for twice in (store, "answer 1 - --message -"):
        assert cco(*twice.split(), text="{}") == (2, "", "cco: - stands for standard input, which can be read once\n")
    code, written, err = cco(*"context get i test-engineer --format json --task - --output -".split(), text="write")
    assert code == 0 and json.loads(written)["context"], err
    command = [sys.executable, str(MODULE), "brief", "i", "test-engineer", "--task", "-"]
    done = subprocess.run(
        command, cwd=here.root, env=here.environment(), input=b"caf\xe9", capture_output=True, timeout=40
    )
    assert done.returncode == 2 and done.stderr.startswith(b"cco: --task: standard input is no text in UTF-8")


def test_a_part_of_an_id_that_may_be_several_names_them(
    here: Here, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    agents = []
    for _ in range(2):
        spawn = f"agent spawn --type rust-specialist --issue {issue} --format json --task"
        agents.append(json.loads(cco(*spawn.split(), "exit 0")[1])["agent_id"])
    for words in (["agent", "status"], ["agent", "logs"], ["agent", "kill"]):
        code, _, err = cco(*words, "rust-specialist-")
        assert code == 2 and all(agent in err for agent in agents) and err.endswith(": type more of it\n"), err
        code, _, err = cco(*words, agents[0][-3:])
        assert code == 2 and agents[0] in err and ": type more of it, 4 characters at least" in err, err
    assert json.loads(cco("agent", "status", agents[0][-8:], "--format", "json")[1])["agent_id"] == agents[0]
    until(lambda: all(here.client().get(f"/api/agents/{agent}/status").json()["ended_at"] for agent in agents))
    code, _, err = cco("results", "get", "z")
    assert code == 1 and err.startswith("cco: 404 REQ_002: "), err


def test_a_type_names_its_agent_that_runs_else_its_newest(
    here: Here, tmp_path: Path, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    client, gates = here.client(), [tmp_path / name for name in ("never", "first", "second")]

    def started(gate: Path) -> str:
        more = {"agent_type": "swift-specialist", "task": "slow 0", "environment": {"TEST_GATE": str(gate)}}
        return str(client.spawn(issue, **more)["agent_id"])

    def has_ended(agent: str) -> bool:
        return client.get(f"/api/agents/{agent}/status").json()["ended_at"] is not None

    def meant(words: str) -> str:
        code, out, err = cco(*words.split(), "swift-specialist", "--format", "json")
        assert code == 0, err
        return str(json.loads(out)["agent_id"])

    stuck, early, late = map(started, gates)
    for words in ("agent status", "agent logs", "agent kill"):  # several run
        code, _, err = cco(*words.split(), "swift-specialist")
        assert code == 2 and all(agent in err for agent in (early, late, stuck)), err
    gates[1].touch()
    gates[2].touch()
    until(lambda: has_ended(early) and has_ended(late))
    assert [meant(f"agent {word}") for word in ("status", "logs", "kill")] == [stuck] * 3
    until(lambda: has_ended(stuck))
    assert [meant(f"agent {word}") for word in ("status", "logs", "kill")] == [late] * 3


@pytest.mark.parametrize("words", ["results get", "agent status", "agent logs", "agent kill"])
def test_an_id_that_names_nothing_is_told_where_ids_are_listed(
    words: str, cco: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cco(*words.split(), "nothing-here")
    kind = words.split()[0]
    assert (code, out) == (1, "") and re.fullmatch(
        rf"cco: 404 REQ_002: .* nothing-here; `.* {kind} list` lists.*\n", err
    )


@pytest.mark.parametrize("command", [["context", "get"], ["brief"], ["context", "get", "--explain"]])
def test_an_issue_and_a_type_the_other_way_round_are_told(
    command: list[str], cco: Callable[..., tuple[int, str, str]]
) -> None:
    told = "cco: 404 AGT_002: Unknown agent type issue-7; `cco agent types` lists them"
    assert cco(*command, "test-engineer", "issue-7") == (1, "", f"{told}; the issue comes first, then the type\n")
    assert cco(*command, "issue-8", "issue-7") == (1, "", f"{told}\n")


@pytest.mark.parametrize(
    "words",
    ["results get i-1 TYPE", "results list --agent-type TYPE", "agent list --type TYPE", "context get i-1 TYPE",
     "context refresh --agent-type TYPE", "context clear --agent-type TYPE", "agent spawn --issue i-1 --type TYPE",
     "brief i-1 TYPE", "token --type TYPE"],
)  # fmt: skip
def test_every_command_tells_of_a_misspelt_agent_type_which_one_is_near(
    words: str, cco: Callable[..., tuple[int, str, str]]
) -> None:
    task = ["--task", "x"] if words.startswith("agent spawn") else []
    code, _, err = cco(*words.replace("TYPE", "tset-engineer").split(), *task)
    assert code in (1, 2) and "Unknown agent type tset-engineer, did you mean test-engineer?" in err, err


def test_a_known_agent_type_that_did_nothing_is_not_called_unknown(cco: Callable[..., tuple[int, str, str]]) -> None:
    said = (1, "", "cco: ux-designer has stored no result on nowhere\n")
    assert cco("results", "get", "nowhere", "ux-designer") == said
    assert cco("results", "list", "--agent-type", "ux-designer") == (0, "(none)\n", "")
    assert cco("agent", "list", "--type", "ux-designer") == (0, "(none)\n", "")


def test_an_issue_in_the_place_of_a_result_is_told_as_one(
    here: Here, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    here.client().store(issue=issue)
    code, _, err = cco("results", "get", issue)
    assert (
        code == 2 and f"{issue} is an issue: name a TYPE after it; `" in err and f"results list --issue {issue}`" in err
    )
    assert cco("results", "get", issue, "python-specialist")[0] == 0
    code, _, err = cco("results", "get", issue, "ux-designer")
    assert code == 1 and err.endswith(f"no result on {issue}; there are results of python-specialist\n"), err


def test_a_result_for_people_says_whom_routing_proposed(
    here: Here, cco: Callable[..., tuple[int, str, str]], issue: str
) -> None:
    stored = [here.client().store(agent_type, issue=issue) for agent_type in ("python-specialist", "test-engineer")]
    stored.append(here.client().store("documentation-expert", issue=issue))
    nexts = ["test-engineer (high), security-auditor (medium)", "documentation-expert (low)", "nobody"]
    for result, said in zip(stored, nexts, strict=True):
        assert re.search(rf"^next +{re.escape(said)}$", cco("results", "get", result["id"])[1], re.MULTILINE)
        as_stored = json.loads(cco("results", "get", result["id"], "--format", "json")[1])
        assert "next" not in as_stored and as_stored == here.client().get(f"/api/results/{result['id']}").json()


def test_events_are_published_as_the_agent_that_the_environment_names(
    here: Here, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, issue: str
) -> None:
    monkeypatch.setenv("AGENT_ID", "agent-7")
    data = json.dumps({"issue_id": issue})
    assert cco("events", "publish", "named", "--data", data, "--ttl", "60", "--correlation-id", "c-1")[0] == 0
    (event,) = here.client().wait("named", filter=f"issue_id:{issue}", since="earliest", timeout=0)["events"]
    assert (event["publisher"], event["ttl_seconds"], event["correlation_id"], event["topic"]) == (
        "agent-7",
        60,
        "c-1",
        "general",
    )


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers as it is told, and notes what it is asked, and with which token."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        status, content = self.server.answer if self.path == "/health" else self.server.work()
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.elsewhere}{self.path}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who reads no more than it must
            self.wfile.write(content)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def stranger() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        server.asked, server.elsewhere = [], server.server_port  # type: ignore[attr-defined]
        server.work = lambda: (200, b'{"results": [], "has_more": false}')  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


HEALTH = {"service": "orchestration-sidecar", "status": "healthy", "project_id": PROJECT, "instance_id": "this run"}
OTHERS: dict[str, tuple[int, bytes]] = {
    "another project": (200, json.dumps(HEALTH | {"project_id": "project-xyz"}).encode()),
    "another run": (200, json.dumps(HEALTH | {"instance_id": "another run"}).encode()),
    "an earlier version": (200, json.dumps({key: HEALTH[key] for key in HEALTH if key != "instance_id"}).encode()),
    "an unhealthy one": (503, json.dumps(HEALTH | {"project_id": "project-xyz", "status": "unhealthy"}).encode()),
    "another program": (200, json.dumps(HEALTH | {"service": "something"}).encode()),
    "a list": (200, b"[1]"),
    "a page": (200, b"<html>"),
    "a page that is not there": (404, b"<html>"),
    "nothing": (500, b""),
    "a page elsewhere": (302, b""),
    "a page that has moved for good": (308, json.dumps(HEALTH | {"project_id": "project-xyz"}).encode()),
    "depths": (200, b"[" * 100_000),
    "depths in an object": (200, b'{"service":' * 20_000),
    "an error of depths": (403, b'{"code":' * 20_000),
    "an error of its own": (403, b'{"code": "E1", "message": "go away"}'),
    "an error of no type": (403, b'{"code": ["AUTH_001"], "message": 5}'),
    "much": (200, b" " * 30_000_000 + json.dumps(HEALTH).encode()),
    "other types": (200, json.dumps(HEALTH | {"project_id": {"a": 1}, "instance_id": [1]}).encode()),
    "a long number": (200, b'{"service": ' + b"1" * 50_000 + b"}"),
    "bytes": (200, b"\xff\xfe\x00"),
    "a project that steers terminals": (200, json.dumps(HEALTH | {"project_id": "\x1b[31m\nx"}).encode()),
}
ASKING = [
    ["results", "list"],
    ["events", "publish", "noted"],
    ["agent", "kill", "a-1"],
    ["status"],
    ["run", "--issue", "i"],
]


@pytest.mark.parametrize("who", OTHERS)
def test_whoever_has_the_port_of_a_killed_service_gets_no_token(
    tmp_path: Path, repository: Path, stranger: Any, who: str, cco: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stranger.answer = OTHERS[who]
    url, storage = f"http://127.0.0.1:{stranger.server_port}", tmp_path / "storage"
    storage.mkdir(mode=0o700)
    info = {"pid": 1, "url": url, "project_id": PROJECT, "root": str(repository), "version": "1", "started_at": ""}
    (storage / "sidecar.json").write_text(json.dumps(info | {"instance_id": "this run"}))
    monkeypatch.chdir(repository)
    asking = ASKING if who in ("another project", "another run", "a page elsewhere", "much") else ASKING[-2:]
    for words in asking[:-1]:
        code, out, err = cco(*words, "--storage", str(storage))
        assert (code, out, err.count("\n")) == (3, "", 1) and "it was sent no token" in err and "start" in err
        assert len(err) < 600 and ("another run of project" in err) == (who in ("another run", "an earlier version"))
    if who in ("another run", "an earlier version"):  # of a URL nobody knows which run answers there
        return
    monkeypatch.setenv("JWT_TOKEN", cco("token", "--type", "chief-architect", "--storage", str(storage))[1].strip())
    monkeypatch.setenv("SIDECAR_URL", f"{url}/api")
    for words in asking:
        code, out, err = cco(*words)
        assert (code, out) == (3, "") and "it was sent no token" in err
    assert stranger.asked and set(stranger.asked) == {("/health", None)}


@pytest.mark.parametrize("how", ["--url", "SIDECAR_URL", "a token of its own", "another storage"])
def test_a_session_whose_token_is_refused_sends_no_other_projects(
    tmp_path: Path, repository: Path, stranger: Any, how: str, cco: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where an address was given, though a service runs for the repository that we are in, and where another service
    runs for the repository by now.
    """
    stranger.answer = (200, json.dumps(HEALTH | {"project_id": "foreign"}).encode())
    stranger.work = lambda: (401, b'{"code": "AUTH_001", "message": "no", "error": "unauthorized"}')
    url, state, words, sent = f"http://127.0.0.1:{stranger.server_port}", tmp_path / "state", ["mcp", "claude"], {""}
    if how == "another storage":
        first, then = (default_storage(repository, name).name for name in ("foreign", "mine"))
        info = {"pid": 1, "url": url, "root": str(repository), "version": "1", "started_at": "", "instance_id": ""}

        def announce(name: str, project: str) -> None:
            (state / "cco-sidecar" / name / "sidecar.json").write_text(json.dumps(info | {"project_id": project}))

        def moved() -> tuple[int, bytes]:
            (state / "cco-sidecar" / first).rename(state / "cco-sidecar" / then)
            announce(then, "mine")
            return 401, b"{}"

        (state / "cco-sidecar" / first).mkdir(mode=0o700, parents=True)
        announce(first, "foreign")
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        stranger.work, words, sent = moved, [*words, "--root", str(repository)], {"foreign"}
    elif how == "--url":
        words += ["--url", url]
    else:
        monkeypatch.setenv("SIDECAR_URL", url)
    if how == "a token of its own":
        token = jwt.encode({"project_id": "foreign"}, "x" * 32)
        monkeypatch.setenv("JWT_TOKEN", token)
        sent = {"foreign"}
    code, out, err = cco(*words, text='{"jsonrpc": "2.0", "id": 1, "method": "tools/call"}\n')
    assert (code, err) == (0, "") and json.loads(out)["error"]["code"] == -32000
    tokens = [given.removeprefix("Bearer").strip() for path, given in stranger.asked if path == "/mcp"]
    project_of = plugin("_client").project_of
    assert tokens and {project_of(token) for token in tokens} == sent, tokens


def test_health_of_a_service_that_does_not_work_is_shown_whole(
    stranger: Any, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = {"storage": "unhealthy: " + "x" * 300, "event_bus": "unhealthy"}
    stranger.answer = (503, json.dumps(HEALTH | {"status": "unhealthy", "checks": checks}).encode())
    url = f"http://127.0.0.1:{stranger.server_port}"
    code, out, err = cco("health", "--url", url, "--format", "json")
    assert (code, err) == (1, "") and json.loads(out)["checks"] == checks


ENDLESS = {  # what begins an answer, and what goes on until the asker is gone
    "a body in drips": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
    "a header in drips": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "heads": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "silence": (b"", b""),
}


@pytest.mark.parametrize("how", ENDLESS)
def test_a_stranger_that_never_ends_is_given_up(how: str, stranger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    def answer(handler: Any) -> None:
        begin, more = ENDLESS[how]
        handler.wfile.write(begin)
        while not given_up.wait(0.05):
            handler.wfile.write(more)
        handler.close_connection = True

    monkeypatch.setattr(Stranger, "do_GET", answer)
    with pytest.raises(TimeoutError, match="no answer within"):
        plugin("_health").ask_health(f"http://127.0.0.1:{stranger.server_port}", 0.5)
    given_up.set()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_follows_no_redirect(
    tmp_path: Path, repository: Path, stranger: Any, status: int, cco: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of whoever answered /health well: only the request itself is sent elsewhere."""
    seen: list[str] = []

    def answer(handler: Any) -> None:
        seen.append(handler.path)
        content = json.dumps(HEALTH).encode()
        handler.send_response(200 if handler.path == "/health" else status)
        handler.send_header("Location", "/elsewhere")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    for method in ("do_GET", "do_POST"):
        monkeypatch.setattr(Stranger, method, answer)
    monkeypatch.setenv("JWT_TOKEN", "t")
    monkeypatch.setenv("SIDECAR_URL", f"http://127.0.0.1:{stranger.server_port}/api")
    assert cco("results", "list")[0] == cco("events", "publish", "noted")[0] == 1
    assert set(seen) == {"/health", "/api/results", "/api/events/noted"}


@pytest.mark.parametrize("status", [200, 503])
def test_the_service_that_was_announced_gets_the_token_healthy_or_not(
    tmp_path: Path, repository: Path, stranger: Any, status: int, cco: Callable[..., tuple[int, str, str]]
) -> None:
    stranger.answer = (status, json.dumps(HEALTH).encode())
    (tmp_path / "storage").mkdir(mode=0o700)
    info = {"pid": 1, "url": f"http://127.0.0.1:{stranger.server_port}", "project_id": PROJECT, "root": "/"}
    info |= {"version": "1", "started_at": "", "instance_id": "this run"}
    (tmp_path / "storage/sidecar.json").write_text(json.dumps(info))
    code, _, err = cco("results", "list", "--root", str(repository), "--storage", str(tmp_path / "storage"))
    assert code == 0, err
    (health, none), (path, token) = stranger.asked
    assert (health, none) == ("/health", None) and path.startswith("/api/results") and token.startswith("Bearer eyJ")


def test_a_service_of_another_project_on_the_port_of_a_killed_one_gets_no_token(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    here = Here(tmp_path / "here")
    here.start()
    here.kill()
    port = here.url.rpartition(":")[2]
    other = make_service("--port", port, "--project", "project-xyz")
    assert other.url == here.url
    asked = here.run("results", "list")
    assert asked.returncode == 3 and "project-xyz" in asked.stderr and asked.stderr.count("\n") == 1
    assert "/api/results" not in other.log


def test_only_an_address_that_was_given_may_lack_its_https(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.start()
    here.kill()
    with socket.create_server(("127.0.0.1", int(here.url.rpartition(":")[2]))) as taken:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # it was shut down
                while True:
                    taken.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            found, given = here.run("events", "list"), here.run("events", "list", "--url", here.url, JWT_TOKEN="x")
        finally:
            taken.shutdown(socket.SHUT_RDWR)
            thread.join()
    for asked, advised in ((found, False), (given, True)):
        assert asked.returncode == 3 and "start the service with" in asked.stderr, asked.stderr
        assert ("HTTPS" in asked.stderr) is advised, asked.stderr


def test_a_follower_goes_on_over_a_restart_and_never_repeats_or_misses(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.start()
    follower, lines = here.follow(
        "events", "subscribe", "counted", "--continuous", "--since", "earliest", "--format", "json"
    )

    def numbers() -> list[int]:
        return [json.loads(line)["data"]["number"] for line in lines()]

    try:
        for number in (1, 2):
            here.client().publish("counted", {"number": number})
        until(lambda: numbers() == [1, 2])
        here.kill()
        here.start()
        here.client().publish("counted", {"number": 3})
        until(lambda: numbers()[-1] == 3)
        assert here.stop() == 0
        here.start()
        here.client().publish("counted", {"number": 4})
        until(lambda: numbers()[-1] == 4)
        assert numbers() == [1, 2, 3, 4] and follower.poll() is None
    finally:
        follower.kill()
        follower.wait()
        here.stop()


# -- agents


@pytest.mark.parametrize("code", [0, 9])
def test_waiting_for_an_agent_ends_with_its_exit_code_and_shows_its_output(here: Here, code: int, issue: str) -> None:
    spawn = f"agent spawn --type python-specialist --issue {issue} --wait --format json --task"
    ended = here.run(*spawn.split(), f"exit {code}")
    assert ended.returncode == code, ended.stderr
    status = json.loads(ended.stdout)
    assert (status["exit_code"], status["state"]) == (code, "failed" if code else "completed")
    assert f"working on exit {code}\ndone\n" in ended.stderr


@pytest.mark.parametrize(("words", "code"), [
    ("agent spawn --type python-specialist --issue full --wait --task 'exit 0'", 0),
    ("agent spawn --type python-specialist --issue full --wait --task 'exit 9'", 9),
    ("events list --limit 1", 0), ("context get full python-specialist --explain", 0),
])  # fmt: skip
def test_what_is_said_beside_the_output_changes_nothing_where_its_disk_is_full(
    here: Here, words: str, code: int
) -> None:
    for _ in range(2):
        here.client().publish("note")
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, str(MODULE), *shlex.split(words)],
            cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, stderr=full, text=True, timeout=40,
        )  # fmt: skip
    assert ended.returncode == code and ended.stdout.count("\n") > 1


@pytest.mark.parametrize(
    "words", ["events subscribe never --continuous", "events subscribe later --timeout 300000", "logs"]
)
def test_what_follows_ends_with_its_reader_though_there_is_nothing_to_write(
    here: Here, words: str, issue: str, tmp_path: Path
) -> None:
    gate, client = tmp_path / "gate", here.client()
    agent = client.spawn(issue, task="slow 0", environment={"TEST_GATE": str(gate)})["agent_id"]
    asked = f"GET /api/agents/{agent}/logs" if words == "logs" else f"GET /api/events/wait/{words.split()[2]}"
    command = ["agent", "logs", agent, "--follow"] if words == "logs" else words.split()
    before = here.log.count(asked)
    with subprocess.Popen(
        [sys.executable, str(MODULE), *command], cwd=here.root, env=here.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as following:  # fmt: skip
        try:
            assert following.stdout and following.stderr
            until(lambda: here.log.count(asked) > before)  # one poll is answered at once, the next one waits
            following.stdout.close()
            assert following.wait(20) == 0 and following.stderr.read() == ""
        finally:
            gate.touch()
            following.kill()


@pytest.mark.parametrize(
    ("written", "shown"),
    [(b"half a line", "half a line\n"), (b"cut in two \xe2\x82", "cut in two \n"), (b"10%\r20%\r", "10%\n20%\n"),
     (b"", " 0\n"), (b"whole\n", "whole\n"), (b"z" * 1_500_000, "z\n")],
)  # fmt: skip
def test_an_awaited_agents_last_line_is_a_line_of_its_own(here: Here, written: bytes, shown: str, issue: str) -> None:
    work = here.storage.parent / f"{issue}.bytes"
    work.write_bytes(written)
    words = ["agent", "spawn", "--type", "python-specialist", "--issue", issue, "--task", f"copy {work} 0", "--wait"]
    ended = here.run(*words)
    assert ended.returncode == 0, ended.stderr
    before, _, after = ended.stderr.rpartition("python-specialist-")
    assert after.endswith(" completed\n") and before.endswith(shown)  # read with \r and \r\n as line ends
    assert before.count("z") >= written.count(b"z")


WAITING = ["agent", "spawn", "--type", "python-specialist", "--issue", "waited", "--task", "slow 0", "--wait"]


def test_a_wait_for_an_agent_that_is_cut_short_says_that_it_goes_on_and_how_to_see_it(
    here: Here, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    waiting = subprocess.Popen(
        [sys.executable, str(MODULE), *WAITING, "--env", f"TEST_GATE={gate}"],
        cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiting.stderr
    agent = waiting.stderr.readline().split()[0]
    try:
        assert waiting.stderr.readline() == "working on slow 0\n"
        waiting.send_signal(signal.SIGINT)
        shown, said = waiting.communicate(timeout=60)
        assert (waiting.returncode, shown) == (130, "") and f"cco: {agent} goes on: " in said
        words = re.findall(r"`[^`]+ (agent [^`]+)`", said)
        assert [each.split()[1] for each in words] == ["logs", "kill"]
        assert here.run("agent", "status", agent, "--format", "json").stdout.count('"state": "running"') == 1
        gate.touch()
        assert here.run(*words[0].split()).stdout == "working on slow 0\ndone\n"
    finally:
        gate.touch()
        waiting.kill()
        waiting.communicate()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_wait_for_an_agent_goes_on_when_the_service_starts_again(tmp_path: Path, end: str) -> None:
    here, gate, said = Here(tmp_path), tmp_path / "gate", tmp_path / "said"
    here.start()
    with said.open("w") as file:
        waiting = subprocess.Popen(
            [sys.executable, str(MODULE), *WAITING, "--env", f"TEST_GATE={gate}"],
            cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    try:
        until(lambda: "working on slow 0" in said.read_text())
        getattr(here, end)()
        until(lambda: "trying again" in said.read_text())
        here.start()
        gate.touch()
        shown, _ = waiting.communicate(timeout=30)
        assert waiting.returncode == 0, said.read_text()
        assert said.read_text().count("trying again") == 1 and "\ndone\n" in said.read_text()
        assert "output_tail" not in shown and "completed" in shown
    finally:
        gate.touch()
        waiting.kill()
        waiting.communicate()
        here.stop()


@pytest.mark.parametrize("words", [["--timeout", "60000"], ["--continuous", "--limit", "1"]])
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_wait_for_an_event_goes_on_when_the_service_starts_again(tmp_path: Path, end: str, words: list[str]) -> None:
    here, said = Here(tmp_path, "--log-level", "debug"), tmp_path / "said"
    client = here.start().client()
    command = [sys.executable, str(MODULE), "events", "subscribe", "late", *words, "--format", "json"]
    with said.open("w") as file:
        waiting = subprocess.Popen(
            command, cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        until(lambda: "GET /api/events/wait/late" in here.log)  # its first poll was answered, the second one waits
        until(lambda: client.get("/status").json()["events"]["active_subscriptions"] == 1)
        getattr(here, end)()
        until(lambda: "trying again" in said.read_text())
        published = here.start().client().publish("late")["event_id"]
        shown, _ = waiting.communicate(timeout=30)
        assert (waiting.returncode, json.loads(shown)["event_id"]) == (0, published), said.read_text()
        assert said.read_text().count("\n") == 1
    finally:
        waiting.kill()
        waiting.communicate()
        here.stop()


def test_a_wait_for_an_agent_whose_service_stays_away_ends_and_says_that_the_agent_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, gate = Here(tmp_path), tmp_path / "gate"
    here.start()
    client = plugin("client")
    monkeypatch.setattr(client, "PATIENCE", 0)
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: here.kill()))
    monkeypatch.setenv("XDG_STATE_HOME", str(here.state))
    monkeypatch.chdir(here.root)
    try:
        assert cco_sidecar.main([*WAITING, "--env", f"TEST_GATE={gate}"]) == 3
        agent, *_, last = capsys.readouterr().err.split("\n", 1)
        agent = agent.split()[0]
        assert f"{agent} goes on, unless " in last and f" agent logs -f {agent[-12:-4]}`" in last
    finally:
        gate.touch()
        here.stop()
        end_stragglers()


def test_the_log_of_a_running_agent_is_followed_to_its_end_and_an_agent_is_killed(
    here: Here, tmp_path: Path, issue: str
) -> None:
    client = here.client()
    agent = client.spawn(issue, task="slow 0", environment={"TEST_GATE": str(tmp_path / "gate")})["agent_id"]
    follower, lines = here.follow("agent", "logs", agent, "-f")
    reader, parts = here.follow("agent", "logs", agent, "-f", "--format", "json")
    until(lambda: lines() == ["working on slow 0"] and parts())
    assert follower.poll() is None
    (tmp_path / "gate").touch()
    assert follower.wait(120) == 0 and lines() == ["working on slow 0", "done"]
    assert reader.wait(120) == 0
    assert "".join(json.loads(part)["text"] for part in parts()) == "working on slow 0\ndone\n"

    stamped = here.run(
        "agent", "logs", agent, "--timestamps", "--since", "2020-01-01", "--tail", "1"
    ).stdout.splitlines()
    assert [re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]{12}Z (.*)", line)[1] for line in stamped] == [
        "working on slow 0",
        "done",
    ]

    stuck = client.spawn(issue, task="slow 0", environment={"TEST_GATE": str(tmp_path / "never")})["agent_id"]
    killed = here.run("agent", "kill", stuck, "--format", "json")
    assert killed.returncode == 0 and json.loads(killed.stdout)["ending"] is True
    assert until(lambda: client.get(f"/api/agents/{stuck}/status").json()["ended_at"])
    assert client.get(f"/api/agents/{stuck}/status").json()["state"] == "killed"


# -- doctor, schema, demo


def test_the_doctor_finds_a_healthy_installation_good(here: Here, cco: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cco("doctor", "--format", "json")
    checks = {row["check"]: row for row in json.loads(out)["checks"]}
    assert list(checks) == [*"storage secret lock service port project git watcher plugins".split(), "agent command"]
    assert {name for name, row in checks.items() if row["verdict"] != "good"} <= {
        "agent command"
    }  # that depends on the machine
    assert code == (1 if checks["agent command"]["verdict"] == "bad" else 0)
    assert here.url in checks["port"]["finding"] and str(here.process and here.process.pid) in checks["lock"]["finding"]


def test_the_doctor_finds_what_is_wrong_and_says_what_to_do(
    tmp_path: Path, here: Here, cco: Callable[..., tuple[int, str, str]]
) -> None:
    plain, storage, plugins = tmp_path / "plain", tmp_path / "storage", tmp_path / "plugins"
    for folder in (plain, storage, plugins):
        folder.mkdir()
    storage.chmod(0o775)
    (plugins / "broken.py").write_text("def (")
    (storage / "jwt.secret").write_text("x" * 40)
    (storage / "jwt.secret").chmod(0o644)
    words = ["doctor", "--root", str(plain), "--storage", str(storage), "--plugins", str(plugins), "--format", "json"]
    code, out, _ = cco(*words, "--port", here.url.rpartition(":")[2])
    checks = {row["check"]: row for row in json.loads(out)["checks"]}
    assert code == 1 and {name for name, row in checks.items() if row["verdict"] == "bad"} - {"agent command"} == {
        "storage",
        "secret",
        "port",
    }
    assert "chmod 700" in checks["storage"]["finding"] and "chmod 600" in checks["secret"]["finding"]
    assert PROJECT in checks["port"]["finding"] and "--port 0" in checks["port"]["finding"]
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        _, out, _ = cco(*words, "--port", str(stranger.getsockname()[1]))
    (row,) = [row for row in json.loads(out)["checks"] if row["check"] == "port"]
    assert row["verdict"] == "bad" and "--port 0" in row["finding"] and "sidecar of" not in row["finding"], row
    assert checks["git"]["verdict"] == "note" and "git init" in checks["git"]["finding"]
    assert checks["plugins"]["verdict"] == "note" and "broken" in checks["plugins"]["finding"]
    storage.chmod(0o755)
    with contextlib.closing(cco_sidecar.open_database(storage / "sidecar.db")):
        _, out, _ = cco(*words, "--port", "0")
    (row,) = [row for row in json.loads(out)["checks"] if row["check"] == "storage"]
    assert row["verdict"] == "note" and row["finding"].endswith("; others can read it, until the next start or token")
    (storage / "sidecar.db").write_bytes(b"rubbish " * 100)
    assert "damaged" in cco(*words, "--port", "0")[1]
    assert (storage / "sidecar.db").read_bytes() == b"rubbish " * 100


def test_the_schemas_in_the_repository_are_those_of_the_code(
    tmp_path: Path, cco: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cco("schema", "--write", str(tmp_path / "schemas"))
    assert (code, err) == (0, "")
    written = {path.name: path.read_text() for path in (tmp_path / "schemas").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "vendor_schemas").iterdir()}
    assert out.startswith(f"{len(written)} documents")
    assert sorted(written) == sorted(kept)
    assert [name for name in written if written[name] != kept[name]] == [], (
        "run: python cco_sidecar.py schema --write vendor_schemas"
    )
    assert json.loads(cco("schema")[1]) == json.loads(written["openapi.json"])


def fingerprint(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_demonstration_runs_into_no_time_limit_and_leaves_no_trace(tmp_path: Path, repository: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before, processes = fingerprint(repository), {process.pid for process in marked_processes()}
    environment = clean_environment(TMPDIR=str(temporary), XDG_STATE_HOME=str(tmp_path / "state"))
    command = [sys.executable, str(MODULE), "demo"]
    ended = subprocess.run(command, cwd=repository / "src", env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""  # each wait that is not answered in time ends it, or is told here
    for said in (
        "spawned as a real process",
        "test-engineer woke",
        "next: test-engineer",
        "killed with SIGKILL",
        "1 result",
        "done",
    ):
        assert said in ended.stdout, said
    assert fingerprint(repository) == before and git(repository, "status", "--porcelain") == ""
    assert list(temporary.iterdir()) == [] and not (tmp_path / "state").exists()
    until(lambda: {process.pid for process in marked_processes()} <= processes)


def test_a_demonstration_whose_agent_reports_nothing_says_so(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(method: str, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"events": [] if "wait" in path else {"active_subscriptions": 1}, "process_id": 1}

    demo = plugin("demo").Demo(repository, tmp_path)
    monkeypatch.setattr(demo, "_start_service", lambda: SimpleNamespace(url="http://localhost", call=call))
    with pytest.raises(cco_sidecar.StartError, match="the agent reported nothing within 50 s"):
        demo.run()


def test_a_demonstration_whose_service_had_to_be_killed_says_so(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = plugin("demo").Demo(repository, tmp_path)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as service:
        assert service.stdout and service.stdout.readline()
        monkeypatch.setattr(demo, "END_SECONDS", 0.1)
        monkeypatch.setattr(demo, "_service", service)
        demo.end()
    assert "was killed" in capsys.readouterr().err and service.returncode


@pytest.mark.skipif(sys.platform == "win32", reason="no signal comes from another process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
@pytest.mark.parametrize("words", ["wait --session-pid PID", "agent logs --follow", "demo"])
def test_a_command_that_is_interrupted_says_nothing_and_leaves_nothing(
    here: Here, tmp_path: Path, words: str, number: signal.Signals
) -> None:
    client = here.client()
    if words.startswith("agent"):
        gate = {"TEST_GATE": str(tmp_path / "gate")}
        spawned = client.spawn("cut", "test-engineer", task="slow 0", environment=gate)
        words += f" {spawned['agent_id']}"
        # For a moment after exec a process has no environment yet.
        until(lambda: spawned["process_id"] in [process.pid for process in marked_processes()])

    def waits() -> bool:
        return client.get("/status").json()["events"]["active_subscriptions"] > 0

    until(lambda: not waits())
    before = {process.pid for process in marked_processes()}
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", str(MODULE), *words.replace("PID", str(os.getpid())).split()],  # with an option it is no fork
        cwd=here.root, env=here.environment(TMPDIR=str(tmp_path)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        until(waits) if words.startswith("wait") else process.stdout.readline()
        process.send_signal(number)
        assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 128 + number)
        assert not list(tmp_path.glob("cco-demo-*"))
        until(lambda: {process.pid for process in marked_processes()} <= before)
    finally:
        process.kill()
        process.communicate()
        (tmp_path / "gate").touch()


def test_a_demonstration_that_is_interrupted_ends_an_agent_that_would_not_end_by_itself(here: Here) -> None:
    def with_a_suspended_agent() -> tuple[subprocess.Popen[str], psutil.Process] | None:
        command = [sys.executable, str(MODULE), "demo"]
        demo = subprocess.Popen(command, cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, text=True)
        assert demo.stdout
        pid = next(int(found[1]) for line in demo.stdout if (found := re.search(r"as a real process, pid (\d+)", line)))
        with contextlib.suppress(psutil.NoSuchProcess):
            (agent := psutil.Process(pid)).suspend()
            ends = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            if until(lambda: (now := agent.status()) in ends and now) == psutil.STATUS_STOPPED:
                return demo, agent
        demo.communicate(timeout=120)  # it has worked before we came
        return None

    demo, agent = until(with_a_suspended_agent)
    try:
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=120)
        assert demo.returncode == 143 and not agent.is_running()
    finally:
        demo.kill()
        demo.communicate()
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()


SLOW_POLICY = """
import time
from pathlib import Path
from cco_sidecar import hookimpl

@hookimpl
def permission_policy(claims, permission, method, path):  # for cco_sidecar
    if method == "POST":
        Path(__file__).with_name("asked").touch()
        while not Path(__file__).with_name("gate").exists():
            time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("agent spawn --type python-specialist --issue cut", "agent list --issue cut"),
        ("events publish cut", "events list --type cut"),
        ("results store --agent a --agent-type python-specialist --issue cut --status success", "results list"),
    ],
)
def test_a_change_that_is_interrupted_says_how_to_see_what_became_of_it(tmp_path: Path, words: str, shown: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/slow.py").write_text(SLOW_POLICY)
    here = Here(tmp_path, "--plugins", str(tmp_path / "ours"))
    here.start()
    command = subprocess.Popen(
        [sys.executable, str(MODULE), *words.split()],
        cwd=here.root, env=here.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until((tmp_path / "ours/asked").exists)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 130 and re.search(rf"done all the same: `[^`]+ {shown}` shows it\n$", said), said
    finally:
        (tmp_path / "ours/gate").touch()
        command.kill()
        command.communicate()
        here.stop()
        end_stragglers()


@pytest.mark.parametrize("lock", ["its file is there", "its file was deleted"])
def test_a_service_that_is_stopped_is_not_called_missing(tmp_path: Path, lock: str) -> None:
    here = Here(tmp_path)
    here.start()
    assert here.process
    if "deleted" in lock:  # the folder's own stays
        (here.storage / "lock").unlink()
    os.kill(here.process.pid, signal.SIGSTOP)
    words = ("health", "agent list", "results get abcd", "run --issue i --task x", "doctor --format json")
    try:
        with ThreadPoolExecutor() as threads:  # each waits ten seconds
            *asked, doctor = threads.map(lambda each: here.run(*each.split(), cwd=here.root), words)
    finally:
        os.kill(here.process.pid, signal.SIGCONT)
        here.stop()
    what_to_do = (
        f"{here.url} does not answer: no answer within 10 seconds; pid {here.process.pid} is stopped: `kill -CONT"
    )
    for command in asked:
        assert command.returncode == 3 and what_to_do in command.stderr, command.stderr
    checks = {row["check"]: row for row in json.loads(doctor.stdout)["checks"]}
    assert checks["service"]["verdict"] == "bad" and what_to_do in checks["service"]["finding"], checks
    assert checks["port"] == {
        "check": "port", "verdict": "note", "finding": "taken by the running service, which does not answer",
    }  # fmt: skip
    assert "that the next start would load" in checks["plugins"]["finding"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A service of the file alone; the commands that ask it are those of the installation."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "plugins").mkdir()
    running = Here(folder)
    running.module = Path(shutil.copy(MODULE, folder))
    running.start()
    yield running
    running.stop()
    end_stragglers()


@pytest.mark.parametrize(
    "words",
    [
        "agent list", "results list", "events list", "agent kill --all", "agent logs abcd", "approvals", "export i",
        "agent spawn --type python-specialist --issue i --task x --wait", "run --issue i --task x", "results get abcd",
        "agent types --url {url}", "context clear --all",
    ],
)  # fmt: skip
def test_a_command_that_needs_plugins_says_that_the_service_has_none(alone: Here, words: str) -> None:
    asked = alone.run(*words.format(url=alone.url).split(), cwd=alone.root)
    assert asked.returncode == 1 and asked.stderr.count("\n") == 1, asked
    assert "this service runs without plugins: end it, and start it with `" in asked.stderr, asked.stderr
    assert alone.client().get("/status").json()["agents"]["spawned_total"] == 0


def test_a_command_whose_plugin_the_service_lacks_says_how_its_plugins_are_listed(tmp_path: Path) -> None:
    lacking = shutil.copytree(
        ROOT / "plugins", tmp_path / "plugins", ignore=shutil.ignore_patterns("logs.py", "runs.py")
    )
    here = Here(tmp_path)
    here.module = Path(shutil.copy(MODULE, lacking.parent))
    here.start()
    try:
        asked = here.run(*"agent spawn --type python-specialist --issue i --task x --wait".split(), cwd=here.root)
        assert asked.returncode == 1 and "this service lacks the plugin for it: `" in asked.stderr, asked.stderr
        assert not here.client().get("/api/agents").json()["agents"]
    finally:
        here.stop()


def test_the_doctor_asks_a_service_that_hangs_once(tmp_path: Path, cco: Callable[..., tuple[int, str, str]]) -> None:
    root, storage = make_repository(tmp_path / "repository"), tmp_path / "storage"
    storage.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as silent, cco_sidecar.instance_lock(storage):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        info = {"pid": os.getpid(), "url": url, "project_id": PROJECT, "version": "1", "started_at": ""}
        (storage / "sidecar.json").write_text(json.dumps(info | {"root": str(root)}))
        _, out, _ = cco("doctor", "--root", str(root), "--storage", str(storage), "--format", "json")
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    (finding,) = [row["finding"] for row in json.loads(out)["checks"] if row["check"] == "service"]
    assert f"{url} does not answer" in finding and f"`kill -9 {os.getpid()}` ends it" in finding


@pytest.mark.parametrize("where", ["as usual", "another address", "TLS"])
def test_a_service_whose_storage_was_removed_is_told_of(tmp_path: Path, where: str) -> None:
    more = {"CCO_SIDECAR_HOST": "127.0.0.2"} if where == "another address" else {}
    if where == "TLS":
        more = {"CCO_SIDECAR_TLS_CERT": str(tmp_path / "cert.pem"), "CCO_SIDECAR_TLS_KEY": str(tmp_path / "key.pem")}
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", "key.pem"]
        subprocess.run([*words, "-out", "cert.pem"], cwd=tmp_path, check=True, capture_output=True)
    here = Here(tmp_path)
    here.env = more
    here.start()
    until(lambda: "Ctrl-C" in here.log)  # a start that is not yet over would fail
    known = more | {"CCO_SIDECAR_PORT": str(urlsplit(here.url).port), "CCO_SIDECAR_PROJECT": PROJECT}
    try:
        # Until all of it is gone the service may write a file of it again.
        until(lambda: shutil.rmtree(here.storage, ignore_errors=True) or not here.storage.exists())
        for words in (["status"], ["agent", "list"], ["events", "list"]):
            asked = here.run(*words, cwd=here.root, **known)
            assert asked.returncode == 3 and f"answers on {here.url}: its storage is elsewhere" in asked.stderr
    finally:
        here.stop()


@pytest.mark.parametrize("words", ["status", "agent list", "results list"])
def test_another_repositorys_service_of_the_same_name_is_left_alone(here: Here, tmp_path: Path, words: str) -> None:
    other, port = make_repository(tmp_path / here.root.name), str(urlsplit(here.url).port)
    asked = here.run(*words.split(), cwd=other, CCO_SIDECAR_PORT=port, CCO_SIDECAR_PROJECT=PROJECT)
    assert asked.returncode == 3 and f"no sidecar runs for {other}; start it with `" in asked.stderr
    assert "answers on" not in asked.stderr


@pytest.mark.parametrize("words", ["agent list", "results list", "events list"])
def test_a_word_too_many_is_told_the_option_that_takes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert cco_sidecar.main([*words.split(), "issue-1"]) == 2
    assert ", did you mean --issue issue-1 or --type issue-1? (see" in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_is_no_error(here: Here) -> None:
    process = subprocess.Popen(
        [sys.executable, str(MODULE), "agent", "types"],
        cwd=here.root,
        env=here.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(120), said) == (0, b"")


# -- what the running service alone knows

TYPES_OF_A_PLUGIN = """
from cco_sidecar import hookimpl

@hookimpl
def register_agent_types():
    return {"wizard": "coding"}
"""


@pytest.fixture
def knowing(tmp_path: Path) -> Iterator[Here]:
    """A service whose flags say which types there are and what runs them."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/magic.py").write_text(TYPES_OF_A_PLUGIN)
    script = tmp_path / "my agent.sh"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o700)
    running = Here(tmp_path, "--plugins", str(tmp_path / "ours"), "--agent-types", "tester=qa,go-specialist=support",
                   "--agent-command", json.dumps([str(script)]),
                   "--agent-commands", json.dumps({"tester": "no-such-program"}))  # fmt: skip
    yield running.start()
    running.stop()
    end_stragglers()


def test_commands_ask_the_running_service_for_the_agent_types_and_programs_that_its_flags_add(knowing: Here) -> None:
    """The plugin type_list tells them."""
    listed = knowing.run("agent", "types", "--format", "json")
    rows = {row["agent_type"]: row for row in json.loads(listed.stdout)["agent_types"]}
    wanted = {"wizard": ("coding", "a plugin"), "tester": ("qa", "settings"), "go-specialist": ("support", "settings")}
    assert {name: (rows[name]["category"], rows[name]["from"]) for name in wanted} == wanted
    for name, (category, _) in wanted.items():
        made = knowing.run("token", "--type", name)
        assert (made.returncode, made.stderr) == (0, "")
        claims = jwt.decode(made.stdout.strip(), options={"verify_signature": False})
        assert claims["permissions"] == list(cco_sidecar.CATEGORIES[category].permissions)
    agents = {row["check"]: row for row in json.loads(knowing.run("doctor", "--format", "json").stdout)["checks"]}
    assert agents["agent command"]["finding"].endswith("my agent.sh is there and can be run")
    assert "no-such-program is not on PATH" in agents["agent command of tester"]["finding"]
    knowing.stop()
    assert "Unknown agent type wizard" in knowing.run("token", "--type", "wizard").stderr
    assert "wizard" not in knowing.run("agent", "types").stdout


@pytest.mark.parametrize(
    ("agent_type", "permissions", "said"),
    [
        (
            "python-specialist",
            "spawn_agents",
            "python-specialist has no spawn_agents, only read_context, write_results,",
        ),
        ("documentation-expert", "read_context,write_results", "documentation-expert has no write_results, only read"),
        ("technical-researcher", "publish_events, spawn_agents", "technical-researcher has no spawn_agents, only read"),
        ("python-specialist", "read_context,publish_events", ""),
    ],
)
def test_a_token_is_not_made_with_a_permission_that_its_type_lacks(
    agent_type: str, permissions: str, said: str, cco: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cco("token", "--type", agent_type, "--permissions", permissions)
    assert (code, bool(out)) == ((2, False) if said else (0, True)), err
    assert err.startswith(f"cco: --permissions: {said}") if said else err == ""


POLICIES = {  # what each answers to every request, and what the refusal says of it
    "fails": ("{}[0]", "the policy fails could not decide"),
    "says_no": ('"nobody may"', "nobody may"),
    "odd": ("[1]", "the policy odd could not decide"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_plugins_are_listed_also_where_one_of_them_refuses_everybody(tmp_path: Path, name: str) -> None:
    answer, said = POLICIES[name]
    refusing = Here(tmp_path)
    (refusing.root / "cco.toml").write_text('plugins = ["../ours"]\n')
    (tmp_path / "ours").mkdir()
    policy = f"from cco_sidecar import hookimpl\n\n@hookimpl\ndef permission_policy():\n    return {answer}\n"
    (tmp_path / f"ours/{name}.py").write_text(policy)
    refusing.start()
    listed = refusing.run("plugins", "--format", "json")
    assert (listed.returncode, listed.stderr) == (0, "")
    told = json.loads(listed.stdout)
    assert (
        told["of"].startswith("that the next start would load; the running service refuses to tell")
        and said in told["of"]
    )
    assert any(row["plugin"] == name and row["hooks"] == "permission_policy" for row in told["plugins"])
    for words in (["status"], ["plugins", "--url", refusing.url]):
        refused = refusing.run(*words, JWT_TOKEN=refusing.run("token", "--type", "chief-architect").stdout.strip())
        assert refused.returncode == 1 and said in refused.stderr, refused
        assert "JWT_TOKEN" not in refused.stderr, "another token would be refused too"
    refusing.stop()


@pytest.mark.parametrize(
    "words", ["mcp claude", "results store -", "events publish x --data -", "wait --program claude"]
)
def test_standard_input_that_cannot_be_read_is_told_as_that(here: Here, tmp_path: Path, words: str) -> None:
    with (tmp_path / "written").open("wb") as only_written:
        run = subprocess.run(
            [sys.executable, str(MODULE), *words.split()], cwd=here.root, env=here.environment(),
            stdin=only_written, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == "cco: standard input cannot be read: Bad file descriptor\n"


def test_lists_that_are_longer_than_a_page_are_read_to_their_end(
    here: Here, cco: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, issue = here.client(), f"pages-{time.monotonic_ns()}"
    ids = [client.store(agent_type, issue=issue)["id"] for agent_type in ("test-engineer", *["qa-engineer"] * 4)]
    monkeypatch.setattr(plugin("client"), "PAGE", 2)
    code, out, _ = cco("context", "refresh", "--issue", issue, "--format", "json")
    assert code == 0
    assert {row["agent_type"] for row in json.loads(out)["contexts"]} == {"test-engineer", "qa-engineer"}
    assert json.loads(cco("results", "get", ids[0][-16:-6], "--format", "json")[1])["id"] == ids[0]
    code, _, error = cco("results", "get", "result")
    assert code == 2 and ids[-1] in error and " more" in error


def test_of_results_and_agents_only_those_are_listed_whose_id_holds_a_text(here: Here) -> None:
    """A command finds what a short id means, however many results and agents there are."""
    client, issue = here.client(), f"parts-{time.monotonic_ns()}"
    results = [client.store("test-engineer", issue=issue)["id"] for _ in range(3)]
    agent = client.spawn(issue, "test-engineer")["agent_id"]

    def listed(kind: str, **query: Any) -> list[str]:
        rows = client.get(f"/api/{kind}", **query).json()[kind]
        return [row["id" if kind == "results" else "agent_id"] for row in rows]

    for text in (results[1], results[1][-12:], results[1][3:-3]):
        assert listed("results", id=text) == [results[1]]
        assert listed("results", id=text, issue_id=issue, since="earliest", limit=1) == [results[1]]
        assert listed("results", id=text, issue_id="elsewhere") == []
    assert listed("results", id="result-", issue_id=issue, limit=2) == results[1:]
    assert listed("agents", id=agent[-9:-1]) == listed("agents", id=agent, agent_type="test-engineer") == [agent]
    assert listed("agents", id="nobody") == listed("results", id=agent) == []
    assert client.get("/api/results", id="a%").status_code == client.get("/api/agents", id="").status_code == 400
