"""Every form of the command reference as a real process against a real service: its effect, its output and its exit
code.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    MODULE,
    PROJECT,
    Client,
    Service,
    body_of,
    clean_environment,
    end_stragglers,
    make_repository,
    until,
)

import cco_sidecar

AGENT = """
case "$TASK" in
  stay*) exec sleep 600;;
  stubborn*) trap '' TERM; echo deaf; while :; do sleep 0.1; done;;
  fail*) exit 3;;
  *) echo "$TASK $COLOUR $SHAPE";;
esac
"""


class Run:
    """A command that has ended."""

    def __init__(self, ended: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = ended.returncode, ended.stdout, ended.stderr

    @property
    def json(self) -> Any:
        assert self.err == ""
        return json.loads(self.out)

    @property
    def rows(self) -> list[dict[str, str]]:
        """What a CSV says."""
        return list(csv.DictReader(io.StringIO(self.out)))


class World(Service):
    """A service, and commands in its repository."""

    def cco(self, words: str, text: str = "", **more: str) -> Run:
        environment = clean_environment(CCO_SIDECAR_STORAGE=str(self.storage), **more)
        command = [sys.executable, str(MODULE), *shlex.split(words)]
        return Run(
            subprocess.run(
                command, cwd=self.root, env=environment, input=text, capture_output=True, text=True, timeout=60
            )
        )

    def spawn(self, task: str, issue: str, agent_type: str = "python-specialist") -> str:
        agent_id = str(self.client().spawn(issue, agent_type, task=task)["agent_id"])
        if task == "stubborn":
            until(lambda: self.client().get(f"/api/agents/{agent_id}/logs").json()["text"] == "deaf\n")
        return agent_id

    def agent(self, agent_id: str) -> Any:
        return self.client().get(f"/api/agents/{agent_id}/status").json()

    def latest(self, issue: str) -> Any:
        """The newest result of an issue."""
        return self.client().get("/api/results", issue_id=issue).json()["results"][-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("forms")
    limits = ("--max-agents", "200", "--max-agents-per-issue", "500", "--stop-agents", "--no-synthesis")
    command = json.dumps(["/bin/sh", "-c", AGENT])
    service = World(make_repository(folder / "repository"), folder / "storage", "--agent-command", command, *limits)
    service.start()
    yield service
    service.stop()
    end_stragglers()


@pytest.fixture
def client(world: World) -> Client:
    return world.client()


def one_line(run: Run, code: int) -> bool:
    """Whether a command said in one line why not."""
    return run.code == code and run.out == "" and run.err.count("\n") == 1 and run.err.startswith("cco: ")


# -- context


@pytest.mark.parametrize("style", ["table", "json", "yaml", "text", "csv"])
def test_context_get_prints_in_every_format(world: World, issue: str, style: str) -> None:
    run = world.cco(f"context get {issue} python-specialist --task greet --format {style}")
    assert (run.code, run.err) == (0, "")
    if style in ("json", "yaml"):
        found = run.json if style == "json" else yaml.safe_load(run.out)
        files = {file["path"]: file["content"] for file in found["context"]["relevant_files"]}
        assert found["issue_id"] == issue and files["src/main.py"] == (world.root / "src/main.py").read_text()
    elif style == "text":
        assert run.out.startswith(f"{issue} for python-specialist: ") and "==== src/main.py (" in run.out
        assert (world.root / "src/main.py").read_text() in run.out
    else:
        assert "src/main.py" in run.out and "def main" not in run.out


@pytest.mark.parametrize(
    ("style", "read"),
    [
        ("", json.loads),
        ("--format json", json.loads),
        ("--format yaml", yaml.safe_load),
        ("--format text", lambda text: {"issue_id": text.split()[0]}),
    ],
)
def test_context_get_writes_into_a_file(
    world: World, issue: str, tmp_path: Path, style: str, read: Callable[[str], Any]
) -> None:
    run = world.cco(f"context get {issue} test-engineer {style} --output {tmp_path / 'context'}")
    assert (run.code, run.out, run.err) == (0, "", "")
    assert read((tmp_path / "context").read_text())["issue_id"] == issue
    assert one_line(world.cco(f"context get {issue} test-engineer --output {tmp_path}/no/such/folder {style}"), 2)
    assert one_line(world.cco(f"context get {issue} wizard --output {tmp_path / 'never'} {style}"), 1)
    assert not (tmp_path / "never").exists()


def test_context_refresh_brings_contexts_up_to_date(world: World, client: Client, issue: str) -> None:
    named = f"context refresh --issue {issue} --agent-type test-engineer --format json"
    for words, told in (
        (named, "built anew"),
        (named, "current"),
        (f"{named} --force", "built anew"),
        (named, "current"),
    ):
        run = world.cco(words)
        assert run.code == 0
        (row,) = run.json["contexts"]
        assert (row["issue_id"], row["agent_type"], row["context"]) == (issue, "test-engineer", told)
        assert client.get(f"/api/context/{issue}/test-engineer").json()["cache_hit"] is True


def test_context_refresh_takes_what_agents_work_on_where_it_is_not_named(
    world: World, client: Client, issue: str
) -> None:
    other = f"{issue}-other"
    client.store("test-engineer", issue=issue)
    client.store("test-engineer", issue=other)
    world.spawn("look", issue)
    for words, pairs in {
        f"context refresh --issue {issue}": {(issue, "python-specialist"), (issue, "test-engineer")},
        f"context refresh --issue {issue} --force": {(issue, "python-specialist"), (issue, "test-engineer")},
        "context refresh --agent-type test-engineer": {(issue, "test-engineer"), (other, "test-engineer")},
        "context refresh": {(issue, "python-specialist"), (issue, "test-engineer"), (other, "test-engineer")},
    }.items():
        run = world.cco(f"{words} --format json")
        found = {(row["issue_id"], row["agent_type"]) for row in run.json["contexts"]}
        assert run.code == 0 and {pair for pair in found if pair[0] in (issue, other)} == pairs
        assert "--issue" not in words or found == pairs
    assert one_line(world.cco("context refresh --issue nobody-was-here"), 1)
    assert one_line(world.cco(f"context refresh --issue {issue} --agent-type wizard"), 1)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("{0}", "b:x b:y"), ("--issue {0}", "b:x b:y"), ("{0} --issue {0}", "b:x b:y"), ("{0} --agent-type {x}", "a:y b:x b:y"),
        ("--issue {0} --agent-type {y}", "a:x b:x b:y"), ("--agent-type {x}", "a:y b:y"), ("--all", ""),
    ],
)  # fmt: skip
def test_context_clear_forgets_what_it_was_told_to(
    world: World, client: Client, issue: str, words: str, left: str
) -> None:
    issues, types = {"a": issue, "b": f"{issue}-b"}, {"x": "python-specialist", "y": "test-engineer"}
    pairs = {f"{a}:{x}": f"/api/context/{issues[a]}/{types[x]}" for a in "ab" for x in "xy"}
    for path in pairs.values():
        until(lambda path=path: client.get(path).json()["cache_hit"])
    run = world.cco(f"context clear {words.format(issue, **types)} --format json")
    assert run.code == 0 and run.json["cleared"] is True and run.json["entries_removed"] >= 4 - len(left.split())
    assert [name for name, path in pairs.items() if client.get(path).json()["cache_hit"]] == left.split()


def test_context_clear_refuses_what_is_not_clear(world: World, issue: str) -> None:
    for words, code in {
        "": 2,
        f"{issue} --all": 2,
        f"--all --issue {issue}": 2,
        f"{issue} --issue another": 2,
        issue: 1,
        f"--issue {issue}": 1,
    }.items():
        assert one_line(world.cco(f"context clear {words}"), code), words


# -- results

FLAGS = (
    "results store --agent coder-1 --agent-type python-specialist --issue {issue} --project {project} --status success"
)


@pytest.mark.parametrize(
    ("more", "result"),
    [
        ("", {"status": "success"}),
        ("--files-created src/a.py,src/b.py", {"status": "success", "files_created": ["src/a.py", "src/b.py"]}),
        ("--files-modified ' c.py , d e.py,'", {"status": "success", "files_modified": ["c.py", "d e.py"]}),
        (
            "--decisions 'Use FastAPI; keep the rest; '",
            {"status": "success", "decisions": ["Use FastAPI", "keep the rest"]},
        ),
        ("--metrics '{\"tokens_used\": 15}'", {"status": "success", "metrics": {"tokens_used": 15}}),
        (
            "--files-created a --files-modified b,c --decisions 'd, e' --metrics '{}'",
            {
                "status": "success",
                "files_created": ["a"],
                "files_modified": ["b", "c"],
                "decisions": ["d, e"],
                "metrics": {},
            },
        ),
    ],
)
def test_results_store_takes_a_result_by_options(world: World, issue: str, more: str, result: dict[str, Any]) -> None:
    run = world.cco(f"{FLAGS.format(issue=issue, project=PROJECT)} {more} --format json")
    assert run.code == 0
    stored = world.latest(issue)
    assert stored["id"] == run.json["id"] and stored["result"] == result
    assert (stored["agent_id"], stored["agent_type"], stored["project_id"]) == ("coder-1", "python-specialist", PROJECT)


@pytest.mark.parametrize("words", ["--input FILE", "FILE", "-", "", "--input -", f"--project {PROJECT} FILE"])
def test_results_store_takes_a_file(world: World, issue: str, tmp_path: Path, words: str) -> None:
    body = {"agent_id": "a-1", "agent_type": "test-engineer", "issue_id": issue, "project_id": PROJECT}
    text = json.dumps(body | {"result": {"status": "partial", "decisions": [words]}})
    (tmp_path / "result.json").write_text(text)
    run = world.cco(f"results store {words.replace('FILE', str(tmp_path / 'result.json'))} --format json", text)
    assert run.code == 0 and world.latest(issue)["result"]["decisions"] == [words]


def test_results_store_knows_an_agent_by_its_environment(world: World, issue: str) -> None:
    who = {"AGENT_ID": "me-7", "AGENT_TYPE": "test-engineer", "ISSUE_ID": issue}
    assert world.cco("results store --status failed --decisions 'It does not work'", **who).code == 0
    stored = world.latest(issue)
    assert (stored["agent_id"], stored["agent_type"], stored["result"]["status"]) == ("me-7", "test-engineer", "failed")


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ("results store --status success", 2, "--agent, --agent-type, --issue"),
        ("results store --agent a --agent-type python-specialist --issue i", 2, "--status"),
        ("results store --agent a --agent-type python-specialist --issue i --status done", 2, "done"),
        ("results store --agent a --agent-type wizard --issue i --status success", 1, "AGT_002"),
        ("results store --agent a --agent-type python-specialist --issue ../i --status success", 1, "issue_id"),
        (
            "results store --agent a --agent-type python-specialist --issue i --status success --project another",
            1,
            "another",
        ),
        (
            "results store --agent a --agent-type python-specialist --issue i --status success --metrics {",
            2,
            "--metrics",
        ),
        (
            "results store --agent a --agent-type python-specialist --issue i --status success --metrics []",
            1,
            "result.metrics",
        ),
        ("results store --status success result.json", 2, "result.json"),
        ("results store --input a.json b.json", 2, "b.json"),
        ("results store --input no-such-file", 2, "no-such-file"),
        ("results store -", 2, "standard input"),
        ("results list --limit -1", 2, "-1"),
        ("results list --limit 0", 2, "0"),
        ("results list --limit 1001", 2, "1001"),
        ("results list --limit many", 2, "many"),
        ("results list --status done", 2, "done"),
        ("results list --project another", 1, "another"),
        ("results list --issue ../x", 1, "issue_id"),
        ("results list --since nothing", 1, "since"),
        ("results get nothing-at-all", 1, "404"),
        ("results get issue-none test-engineer", 1, "issue-none"),
        ("results get", 2, "ISSUE"),
        ("events publish", 2, "type"),
        ("events publish --topic t", 2, "type"),
        ("events publish --type Bad --topic t", 1, "EVT_002"),
        ("events publish ping --type pong", 2, "pong"),
        ("events publish --type ping --ttl 0", 1, "ttl_seconds"),
        ("events publish --type ping --ttl soon", 2, "soon"),
        ("events publish --type ping --data {", 2, "--data"),
        ("events publish --type ping --data []", 1, "data"),
        ("events publish --type ping --priority urgent", 2, "urgent"),
        ("events publish --input no-such-file", 2, "no-such-file"),
        ("events publish --input - --topic t", 2, "--topic"),
        ("events publish --input - --data {}", 2, "--data"),
        ("events subscribe", 2, "TYPE"),
        ("events subscribe ping --timeout -1", 2, "timeout"),
        ("events subscribe ping --timeout soon", 2, "soon"),
        ("events subscribe ping --limit 0", 2, "0"),
        ("events subscribe ping --filter a==b", 1, "EVT_002"),
        ("events subscribe ping --format yaml", 2, "yaml"),
        ("events list --since yesterday", 1, "since"),
        ("events list --limit -5", 2, "-5"),
        ("events list --type Bad", 1, "type"),
        ("agent spawn --issue i --task t", 2, "--type"),
        ("agent spawn --type wizard --issue i --task t", 1, "AGT_002"),
        ("agent spawn --type python-specialist --issue i --task t --priority urgent", 2, "urgent"),
        ("agent spawn --type python-specialist --issue i --task t --env nonsense", 2, "nonsense"),
        ("agent spawn --type python-specialist --issue i --task t --project another", 1, "another"),
        ("agent list --status done", 2, "done"),
        ("agent list --state asleep", 1, "state"),
        ("agent list --limit 0", 2, "0"),
        ("agent kill nobody-at-all", 1, "404"),
        ("agent kill nobody-at-all --force --timeout 1", 1, "404"),
        ("agent kill x --timeout -1", 2, "-1"),
        ("agent kill x --timeout nan", 2, "nan"),
        ("agent status nobody", 1, "404"),
        ("context get issue-1 python-specialist --format xml", 2, "xml"),
        ("context get issue-1 wizard", 1, "AGT_002"),
        ("token --type wizard", 2, "wizard"),
        ("token --type python-specialist --ttl 0", 2, "--ttl"),
        ("token --type python-specialist --issue ../x", 2, "issue"),
        ("token --type python-specialist --permissions fly", 2, "fly"),
        ("status --format xml", 2, "xml"),
        ("health --url http://127.0.0.1:1", 3, "127.0.0.1:1"),
        ("health --url nonsense", 2, "nonsense"),
        ("agent list --format yaml", 2, "yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    world: World, words: str, code: int, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which is quicker."""
    for name in [name for name in os.environ if name not in clean_environment()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CCO_SIDECAR_STORAGE", str(world.storage))
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    try:
        got = cco_sidecar.main(shlex.split(words))
    except SystemExit as ended:
        got = int(str(ended.code))
    said = capsys.readouterr()
    assert (got, said.out) == (code, "") and said.err.startswith("cco: ") and said.err.count("\n") == 1, said
    assert named in said.err


def test_results_list_filters_and_limits(world: World, client: Client, issue: str) -> None:
    decisions = {"success": ["Use FastAPI", "and uvicorn\nnot gunicorn"], "failed": []}
    kinds = [(kind, status) for kind in ("python-specialist", "test-engineer") for status in decisions]
    ids = [client.store(kind, status, issue, decisions=decisions[status])["id"] for kind, status in kinds]
    for words, wanted in {
        "": ids,
        "--agent-type test-engineer": ids[2:],
        "--type test-engineer": ids[2:],
        f"--project {PROJECT} --limit 1": ids[3:],
        "--limit 3": ids[1:],
        "--status success": ids[::2],
        f"--since {ids[1]}": ids[2:],
        "--since earliest --limit 2": ids[:2],
    }.items():
        run = world.cco(f"results list --issue {issue} {words} --format json")
        assert run.code == 0 and [row["id"] for row in run.json["results"]] == wanted, words
    rows = world.cco(f"results list --issue {issue} --limit 3 --format csv").rows
    assert [row["id"] for row in rows] == ids[1:]
    assert [row["decision"] for row in rows] == ["", "Use FastAPI; and uvicorn not gunicorn", ""]
    for words, shown, more in (
        ("", ids, ""),
        ("--limit 2", ids[2:], "--limit"),
        ("--since earliest --limit 1", ids[:1], ids[0]),
    ):
        run = world.cco(f"results list --issue {issue} {words} --format table")
        assert [line.split()[0] for line in run.out.splitlines()] == ["ID", *(found[-16:-8] for found in shown)]
        assert more in run.err and run.err.count("\n") == bool(more)
    assert world.cco(f"results list --issue {issue}").out.splitlines()[1].endswith("Use FastAPI; and uvicorn")


def test_results_get_gives_the_latest_of_a_type_or_one_by_its_id(world: World, client: Client, issue: str) -> None:
    ids = [client.store("test-engineer", status, issue)["id"] for status in ("failed", "success")]
    client.store("python-specialist", "success", issue)
    for words, wanted in {
        f"{issue} test-engineer": ids[1], ids[0]: ids[0], ids[0][:20]: ids[0], ids[0][-16:-8]: ids[0], ids[1][-12:]: ids[1]
    }.items():  # fmt: skip
        run = world.cco(f"results get {words} --format json")
        assert run.code == 0 and run.json["id"] == wanted
    run = world.cco("results get resu")
    assert one_line(run, 2) and "may be result-" in run.err and " more" in run.err


# -- events


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--type greeting --topic hello", {"topic": "hello", "data": {}}),
        (
            "greeting",
            {
                "topic": "general",
                "publisher": "cli",
                "priority": "normal",
                "ttl_seconds": 86400,
                "correlation_id": None,
            },
        ),
        ("greeting --type greeting --topic t", {"topic": "t"}),
        ("--type greeting --topic t --data '{\"n\": [1]}'", {"data": {"n": [1]}}),
        ("--type greeting --topic t --correlation-id session-7", {"correlation_id": "session-7"}),
        ("--type greeting --topic t --ttl 60", {"ttl_seconds": 60}),
        ("--type greeting --topic t --priority high --publisher me", {"priority": "high", "publisher": "me"}),
    ],
)
def test_events_publish_by_options(world: World, client: Client, words: str, wanted: dict[str, Any]) -> None:
    run = world.cco(f"events publish {words} --format json")
    assert run.code == 0
    event = client.get("/api/events", limit=1).json()["events"][0]
    assert (
        event["event_id"] == run.json["event_id"]
        and event["event_type"] == "greeting"
        and wanted.items() <= event.items()
    )


@pytest.mark.parametrize("words", ["--input FILE", "--input -", "greeting --input FILE", "--type greeting --input -"])
def test_events_publish_takes_a_file(world: World, client: Client, tmp_path: Path, words: str) -> None:
    event = {"publisher": "file", "topic": "t", "data": {"words": words}, "priority": "low", "own": 1}
    event |= {"event_type": "greeting"} if words.startswith("--input") else {}
    (tmp_path / "event.json").write_text(json.dumps(event))
    run = world.cco(
        f"events publish {words.replace('FILE', str(tmp_path / 'event.json'))} --format json", json.dumps(event)
    )
    assert run.code == 0
    assert event.items() <= client.get("/api/events", type="greeting", limit=1).json()["events"][0].items()


def test_a_file_whose_type_is_another_is_refused(world: World) -> None:
    event = json.dumps({"event_type": "one", "topic": "t", "data": {}})
    assert one_line(world.cco("events publish two --input -", event), 1)
    assert one_line(world.cco("events publish --input -", "[]"), 2) and one_line(
        world.cco("events publish --input -", "{}"), 2
    )


def test_events_subscribe_in_its_forms(world: World, client: Client, issue: str) -> None:
    ids = [client.publish("forms", {"issue_id": issue, "n": n})["event_id"] for n in range(5)]
    since = f"--since earliest --filter issue_id:{issue}"
    for style in ("", "--format text", "--format table", "--format csv"):
        run = world.cco(f"events subscribe forms {since} {style}")
        assert run.code == 0 and [line.replace(",", " ").split()[1] for line in run.out.splitlines()] == ids
    for words, wanted in {
        "--limit 2": ids[:2],
        "--limit 9": ids,
        "--continuous --limit 5": ids,
        "--timeout 100": ids,
        "--limit 5 --timeout 0": ids,
    }.items():
        run = world.cco(f"events subscribe forms {since} {words} --format json")
        assert (
            run.code == 0
            and [json.loads(line)["event_id"] for line in run.out.splitlines()] == wanted
            and run.err == ""
        )
    began = time.monotonic()
    run = world.cco("events subscribe never-published --timeout 300")
    said = (
        "cco: no event came within 300 ms, as --timeout counts milliseconds; --since earliest shows what is retained\n"
    )
    assert (run.code, run.out, run.err) == (1, "", said) and time.monotonic() - began >= 0.3


def test_events_subscribe_with_a_limit_goes_on_until_it_has_so_many(world: World, client: Client, issue: str) -> None:
    begin = client.publish("begin")["event_id"]
    words = f"events subscribe * --filter issue_id:{issue} --continuous --limit 3 --format json --since {begin}"
    command = [sys.executable, "-u", str(MODULE), *words.split()]
    environment = clean_environment(CCO_SIDECAR_STORAGE=str(world.storage))
    with subprocess.Popen(command, cwd=world.root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for number in range(4):
            published = client.publish("step", {"issue_id": issue, "n": number})["event_id"]
            if number < 3:
                assert json.loads(process.stdout.readline())["event_id"] == published
        assert process.wait(120) == 0 and process.stdout.read() == ""


def test_events_list_filters_limits_and_begins_at_a_time(world: World, client: Client, issue: str) -> None:
    kind = f"kind-{issue}"
    old = [client.publish(kind, topic=topic)["event_id"] for topic in ("a", "b", "a")]
    second = int(time.time())
    until(lambda: int(time.time()) > second + 1)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    new = [client.publish(kind, topic=topic)["event_id"] for topic in ("b", "a")]
    everything = old + new
    for words, wanted in {
        "": everything, "--topic a": [old[0], old[2], new[1]], "--limit 2": new, f"--since {moment}": new, f"--since {old[1]}": everything[2:],
        "--since earliest --limit 2": old[:2], f"--since {moment.replace('Z', '+00:00')} --topic b": new[:1], "--since latest": [],
    }.items():  # fmt: skip
        run = world.cco(f"events list --type {kind} {words} --format json")
        assert run.code == 0 and [event["event_id"] for event in run.json["events"]] == wanted, words
    run = world.cco(f"events list --type {kind} --limit 4")
    assert [line.split()[0] for line in run.out.splitlines()] == ["EVENT_ID", *everything[1:]] and "newest 4" in run.err
    assert [row["event_id"] for row in world.cco(f"events list --type {kind} --format csv").rows] == everything


# -- agents


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("", "look  \n"), ("--project " + PROJECT, "look  \n"), ("--priority low", "look  \n"), ("--priority normal", "look  \n"),
        ("--priority high", "look  \n"), ("--env COLOUR=red", "look red \n"), ("--env COLOUR=red --env SHAPE=a=b", "look red a=b\n"),
    ],
)  # fmt: skip
def test_agent_spawn_starts_an_agent(world: World, client: Client, issue: str, more: str, told: str) -> None:
    run = world.cco(f"agent spawn --type python-specialist --issue {issue} --task look {more} --format json")
    assert run.code == 0
    agent_id = run.json["agent_id"]
    until(lambda: world.agent(agent_id)["state"] == "completed")
    assert (
        world.agent(agent_id)["issue_id"] == issue and client.get(f"/api/agents/{agent_id}/logs").json()["text"] == told
    )


def test_agent_list_groups_filters_and_limits(world: World, client: Client, issue: str) -> None:
    tasks = {
        "done": "python-specialist",
        "fail now": "python-specialist",
        "stay\nhere": "test-engineer",
        "fail too": "test-engineer",
    }
    ids = [world.spawn(task, issue, agent_type) for task, agent_type in tasks.items()]
    until(lambda: [world.agent(agent_id)["state"] for agent_id in ids] == ["completed", "failed", "running", "failed"])
    assert client.post("/api/results", body_of(issue, "partial") | {"agent_id": ids[0]}).status_code == 201
    for words, wanted in {
        "": ids, "--status active": ids[2:3], "--status completed": ids[:1], "--status failed": [ids[1], ids[3]], "--type test-engineer": ids[2:],
        "--status failed --type test-engineer": ids[3:], "--state running": ids[2:3], "--limit 2": ids[2:], f"--since {ids[0]} --limit 1": ids[1:2],
    }.items():  # fmt: skip
        run = world.cco(f"agent list --issue {issue} {words} --format json")
        assert run.code == 0 and [row["agent_id"] for row in run.json["agents"]] == wanted, words
    rows = world.cco(f"agent list --issue {issue} --format csv").rows
    assert [(row["agent_id"], row["task"], row["result_status"]) for row in rows] == [
        (ids[0], "done", "partial"), (ids[1], "fail now", ""), (ids[2], "stay here", ""), (ids[3], "fail too", "")
    ]  # fmt: skip
    run = world.cco(f"agent list --issue {issue}", COLUMNS="80")
    head, *lines = run.out.splitlines()
    assert (
        head.split() == ["ID", "AGENT_TYPE", "ISSUE_ID", "STATE", "RESULT", "TIME", "TASK"]
        and max(map(len, [head, *lines])) <= 80
    )
    assert [line.split()[0] for line in lines] == [agent_id[-12:-4] for agent_id in ids]
    ends = [r"completed  partial +\d+\.\d s  done", r"failed 3   - +\d+\.\d s  fail now", r"running    - .*  stay"]
    assert all(re.search(f"  {end}$", line) for end, line in zip(ends, lines[:3], strict=True)), lines
    client.delete(f"/api/agents/{ids[2]}")


@pytest.mark.parametrize(
    ("task", "words", "state", "signal"),
    [
        ("stay", "", "killed", 15),
        ("stay", "--timeout 20", "killed", 15),
        ("stay", "--force", "killed", 9),
        ("stay", "--force --timeout 20", "killed", 9),
        ("stubborn", "--force --timeout 4", "killed", 9),
    ],
)  # fmt: skip
def test_agent_kill_ends_an_agent(world: World, issue: str, task: str, words: str, state: str, signal: int) -> None:
    agent_id = world.spawn(task, issue)
    run = world.cco(f"agent kill {agent_id} {words} --format json")
    assert run.code == 0 and run.json["agent_id"] == agent_id
    if "--timeout" in words:
        assert (run.json["state"], run.json["signal"]) == (state, signal)
    else:
        assert run.json["ending"] is True
    until(lambda: world.agent(agent_id)["ended_at"])
    assert (world.agent(agent_id)["state"], world.agent(agent_id)["signal"]) == (state, signal)
    again = world.cco(f"agent kill {agent_id} {words} --format json")
    assert again.code == 0 and again.json.get("ending", False) is False


def test_agent_kill_says_when_the_end_does_not_come_in_time(world: World, issue: str) -> None:
    agent_id = world.spawn("stubborn", issue)
    run = world.cco(f"agent kill {agent_id} --timeout 0.2")
    assert one_line(run, 1) and f"{agent_id} is still running after 0.2 s" in run.err
    assert world.cco(f"agent kill {agent_id} --force --timeout 20").code == 0
    assert world.agent(agent_id)["ended_at"]


@pytest.mark.parametrize(("words", "states"), [
    ("--issue ISSUE --timeout 20", {"killed", "running"}), ("--issue ISSUE", {"killed", "running"}),
    ("--all --force --timeout 20 --format table", {"killed"}),
])  # fmt: skip
def test_agent_kill_ends_all_agents_of_an_issue_or_all_that_run(
    world: World, issue: str, words: str, states: set[str]
) -> None:
    agents = [world.spawn("stay", issue) for _ in range(2)]
    other = world.spawn("stay", f"{issue}-2")
    run = world.cco(f"agent kill {words.replace('ISSUE', issue)} {'' if '--format' in words else '--format json'}")
    assert run.code == 0, run.err
    if "table" in words:
        assert run.out.count("killed") == 3 and all(agent[-12:-4] in run.out for agent in [*agents, other])
    else:
        assert [row["agent_id"] for row in run.json["agents"]] == agents
    until(lambda: all(world.agent(agent)["ended_at"] for agent in agents))
    assert {world.agent(agent)["state"] for agent in [*agents, other]} == states
    assert world.cco("agent kill --all --timeout 20").code == 0 and world.agent(other)["state"] == "killed"
    assert world.cco("agent kill --all").out == "(none)\n"


@pytest.mark.parametrize("part", [slice(None), slice(-12, -4), slice(-12, None), slice(-6, None), slice(0, -4)])
def test_an_agent_is_named_by_enough_of_its_id(world: World, issue: str, part: slice) -> None:
    agent_id = world.spawn("look", issue)
    until(lambda: world.agent(agent_id)["ended_at"])
    assert world.cco(f"agent status {agent_id[part]} --format json").json["agent_id"] == agent_id
    assert world.cco(f"agent logs {agent_id[part]}").out == "look  \n"
    assert world.cco(f"agent kill {agent_id[part]} --format json").json["ending"] is False


def test_an_agent_is_named_by_its_type_of_which_the_newest_is_meant(world: World, issue: str) -> None:
    for _ in range(2):
        agent_id = world.spawn("look", issue, "elixir-specialist")
        assert world.cco("agent status elixir-specialist --format json").json["agent_id"] == agent_id
        until(lambda agent_id=agent_id: world.agent(agent_id)["ended_at"])
        assert world.cco("agent logs elixir-specialist").out == "look  \n"


def test_what_names_several_agents_or_too_little_names_none(world: World, issue: str) -> None:
    ids = [world.spawn("look", issue) for _ in range(2)]
    for command in ("status", "logs", "kill"):
        run = world.cco(f"agent {command} python-specialist-")
        assert one_line(run, 2) and all(agent_id in run.err for agent_id in ids)
        run = world.cco(f"agent {command} {ids[0][-3:]}")
        assert one_line(run, 2) and ids[0] in run.err and "4 characters at least" in run.err
        assert one_line(world.cco(f"agent {command} no/such"), 2)


def test_the_newest_of_more_than_a_hundred_are_shown_and_the_rest_is_mentioned(
    world: World, client: Client, issue: str
) -> None:
    agents = [world.spawn("fail" if number % 2 else "go", issue) for number in range(152)]
    results = [client.store("python-specialist", issue=issue)["id"] for _ in range(110)]
    events = [client.publish(f"of-{issue}")["event_id"] for _ in range(110)]
    shown = {
        f"agent list --issue {issue}": [agent_id[-12:-4] for agent_id in agents],
        f"results list --issue {issue}": [result_id[-16:-8] for result_id in results],
        f"events list --type of-{issue}": events,
    }
    for words, ids in shown.items():
        run = world.cco(words)
        assert [line.split()[0] for line in run.out.splitlines()][1:] == ids[-100:] and run.code == 0
        assert run.err.count("\n") == 1 and "newest 100" in run.err and "--limit" in run.err
        run = world.cco(f"{words} --limit 1000")
        assert [line.split()[0] for line in run.out.splitlines()][1:] == ids and run.err == ""
        assert world.cco(f"{words} --format csv").err == world.cco(f"{words} --format json").err == ""
    newest = world.spawn("stay", issue)
    assert world.cco("agent list").out.splitlines()[-1].startswith(newest[-12:-4])
    assert world.cco("agent list --status active --limit 1").out.splitlines()[-1].startswith(newest[-12:-4])
