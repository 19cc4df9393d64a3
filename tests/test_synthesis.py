"""Results in the name of agents that stored none, over HTTP with real processes; and what stays of ended agents."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_harness import COMMAND, folder_of, nothing_left, output, says, spawn, state
from conftest import PROJECT, Client, Service, body_of, git, make_repository, plugin, serving, until

import cco_sidecar

__all__ = ["nothing_left"]

_retention = plugin("agents/_retention")

GIT = "git -c user.name=agent -c user.email=agent@example.com -c commit.gpgsign=false"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("shared"), *COMMAND) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(service: Service) -> Iterator[None]:
    """The shared repository as it was made."""
    start = git(service.root, "rev-parse", "HEAD").strip()
    yield
    git(service.root, "reset", "-q", "--hard", start)
    git(service.root, "clean", "-qfd")


def results_of(client: Client, agent_id: str) -> list[dict[str, Any]]:
    found = client.get("/api/results", limit=1000).json()["results"]
    return [row for row in found if row["agent_id"] == agent_id]


def after(client: Client, task: str, issue: str, **environment: str) -> dict[str, Any]:
    """The one result of an agent that has ended with exit code 0."""
    agent_id = spawn(client, task, issue, environment=environment)["agent_id"]
    assert state(client, agent_id)["exit_code"] == 0, output(client, agent_id)
    (stored,) = results_of(client, agent_id)
    return stored


def files_of(stored: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    created, modified, deleted = (
        stored["result"].get(f"files_{kind}", []) for kind in ("created", "modified", "deleted")
    )
    return created, modified, deleted


def test_an_agent_that_ends_well_and_stores_none_gets_a_result_that_says_whose_it_is(
    service: Service, architect: Client, issue: str
) -> None:
    stored = after(
        architect, "edit", issue, EDIT="echo new > src/new.py", SAY="I greet politely.\nBecause it is kind.\n"
    )
    agent_id = stored["agent_id"]
    assert (stored["source"], stored["issue_id"], stored["agent_type"]) == ("sidecar", issue, "python-specialist")
    assert stored["result"]["status"] == "partial"
    assert stored["result"]["decisions"] == ["I greet politely.", "Because it is kind."]
    assert "stored no result" in stored["result"]["rationale"] and stored["result"].get("warnings", []) == []
    assert files_of(stored) == (["src/new.py"], [], [])
    exited = architect.wait("agent_exited", since="earliest", filter=f"issue_id:{issue}", timeout=20_000)["events"]
    told = architect.wait("agent_completed", since="earliest", filter=f"issue_id:{issue}", timeout=20_000)["events"]
    assert exited[0]["data"]["result_id"] == told[0]["data"]["result_id"] == stored["id"]
    assert (told[0]["data"]["status"], told[0]["publisher"]) == ("partial", agent_id) and told[0]["data"]["next_agents"]
    assert told[0]["event_id"] < exited[0]["event_id"]
    status = architect.get(f"/api/agents/{agent_id}/status").json()
    assert (status["result_id"], status["result_status"]) == (stored["id"], "partial")
    written = service.storage / "results" / PROJECT / issue / "python-specialist.json"
    assert json.loads(written.read_text())["id"] == stored["id"]
    context = architect.get(f"/api/context/{issue}/test-engineer").json()["context"]
    assert context["previous_agent_outputs"][0]["files_affected"] == ["src/new.py"]


@pytest.mark.parametrize(
    ("edit", "created", "modified", "deleted"),
    [
        ("true", [], [], []),
        ("echo x >> src/main.py; echo y > 'a b.txt'; mkdir -p deep/er; echo z > deep/er/ü.py", ["a b.txt", "deep/er/ü.py"], ["src/main.py"], []),
        ("rm src/main.py; chmod +x src/greeting.py", [], ["src/greeting.py"], ["src/main.py"]),
        (f"echo x > new.py; {GIT} add -A; {GIT} commit -qm one; echo y >> src/main.py; {GIT} commit -qam two", ["new.py"], ["src/main.py"], []),
        (f"echo x > new.py; {GIT} add new.py; {GIT} mv src/main.py src/moved.py", ["new.py", "src/moved.py"], [], ["src/main.py"]),
        ("echo x > build.log; mkdir build; echo x > build/out", [], [], []),
        (f"echo x >> src/main.py; {GIT} stash -q; {GIT} stash pop -q; echo y > b.py; {GIT} checkout -q -b other", ["b.py"], ["src/main.py"], []),
        ("echo x > f; rm f; echo x >> src/main.py; git checkout -q src/main.py; ln -s nowhere link", ["link"], [], []),
    ],
    ids=["nothing", "plain", "deleted, mode", "committed", "staged, moved", "ignored", "stash, branch", "undone, link"],
)  # fmt: skip
def test_its_files_are_what_differs_between_its_start_and_its_end(
    architect: Client, issue: str, edit: str, created: list[str], modified: list[str], deleted: list[str]
) -> None:
    stored = after(architect, "edit", issue, EDIT=edit)
    assert files_of(stored) == (created, modified, deleted)
    assert stored["result"].get("warnings", []) == []


@pytest.mark.parametrize(
    ("edit", "created", "modified", "deleted", "named"),
    [
        ("echo x > own.py", ["own.py"], [], [], ""),
        ("echo x >> draft.md; echo x >> src/main.py", [], ["draft.md", "src/main.py"], [], "draft.md, src/main.py"),
        (f"{GIT} add -A; {GIT} commit -qm all", [], [], [], ""),
        ("rm draft.md; git checkout -q src/main.py docs/guide.md", ["docs/guide.md"], ["src/main.py"], ["draft.md"],
         "docs/guide.md, draft.md, src/main.py"),
        ("git stash -q -u; git stash pop -q; touch draft.md src/main.py; cp draft.md d; mv d draft.md", [], [], [], ""),
        ("chmod +x draft.md", [], ["draft.md"], [], "draft.md"),
    ],
    ids=["untouched", "added to", "committed", "undone", "rewritten as it was", "other rights"],
)  # fmt: skip
def test_what_the_user_had_changed_before_is_the_agents_only_where_it_changed_again_and_is_named(
    service: Service,
    architect: Client,
    issue: str,
    edit: str,
    created: list[str],
    modified: list[str],
    deleted: list[str],
    named: str,
) -> None:
    (service.root / "draft.md").write_text("the user's\n")
    (service.root / "src/main.py").write_text("the user's\n")
    (service.root / "docs/guide.md").unlink()
    stored = after(architect, "edit", issue, EDIT=edit)
    assert files_of(stored) == (created, modified, deleted)
    wanted = [f"Changed already, and not committed, before the agent began: {named}"] if named else []
    assert stored["result"].get("warnings", []) == wanted


def test_what_was_written_after_an_agents_end_is_not_its_own(tmp_path: Path) -> None:
    synthesis = plugin("agents/synthesis")
    root = make_repository(tmp_path / "whole")
    head = git(root, "rev-parse", "HEAD").strip()
    (tmp_path / "beginning.json").write_text(json.dumps({"head": head}))
    (root / "new.py").write_text("x")
    (root / "src/main.py").write_text("x")
    (root / "docs/guide.md").unlink()
    facts = {"lines": [], "folder": str(tmp_path), "root": str(root), "alone": True}
    now = synthesis.agent_result(agent={"ended_at": cco_sidecar.iso()}, **facts)
    assert files_of({"result": now}) == (["new.py"], ["src/main.py"], ["docs/guide.md"]) and not now["warnings"]
    soon = synthesis.agent_result(agent={"ended_at": cco_sidecar.iso(time.time() - 3)}, **facts)
    assert files_of({"result": soon}) == files_of({"result": now})
    counted = "Written in the 15 s after the agent's end, and counted as its own"
    assert soon["warnings"] == [f"{counted}: docs/guide.md, new.py, src/main.py"]
    later = synthesis.agent_result(agent={"ended_at": cco_sidecar.iso(time.time() - 60)}, **facts)
    assert files_of({"result": later}) == ([], [], [])
    (warning,) = later["warnings"]
    assert warning == "Written after the agent's end, by whom is not known: docs/guide.md, new.py, src/main.py"
    assert not plugin("_pipeline_plan").is_idle(later)


@pytest.mark.parametrize("other", ["hang", "succeed"])
def test_where_another_agent_ran_meanwhile_its_files_are_not_known_and_that_is_said(
    service: Service, architect: Client, issue: str, other: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = spawn(
        architect, "wait", issue, environment={"TEST_GATE": str(gate), "TEST_THEN": "edit", "EDIT": "echo x > mine.py"}
    )
    says(architect, first["agent_id"], "waiting")
    second = spawn(architect, other, issue)
    if other == "succeed":
        state(architect, second["agent_id"])
    gate.touch()
    state(architect, first["agent_id"])
    (stored,) = results_of(architect, first["agent_id"])
    assert files_of(stored) == ([], [], []) and stored["result"]["decisions"] == ["waiting", "edited"]
    assert stored["result"]["warnings"] == ["Which files it changed is not known: other agents worked at the same time"]
    architect.delete(f"/api/agents/{second['agent_id']}")
    state(architect, second["agent_id"])
    assert files_of(after(architect, "edit", issue, EDIT="echo y > mine2.py"))[0] == ["mine2.py"]


ESC = "\x1b"


@pytest.mark.parametrize(
    ("say", "decisions"),
    [
        (f"{ESC}[1;32mDone{ESC}[0m: {ESC}]8;;http://x{ESC}\\link{ESC}]8;;{ESC}\\ is blue\n", ["Done: link is blue"]),
        ("10 %\r50 %\rReady.\n\n   \n---\n```\n", ["Ready."]),
        ("Twice\nonce\nTwice\n", ["once", "Twice"]),
        (f"key gh{ESC}[0mp_{'a1B2' * 9}\nalso gl{ESC}[1mpat-{'a1B2' * 5}\n", None),
        ("".join(f"line {number}\n" for number in range(200)), [f"line {number}" for number in range(195, 200)]),
        ("x" * 3000 + "\n", ["x" * 500]),
        ("exec\nls\ncodex\nI greet.\ntokens used\n2,250\nI greet.\nPolitely.\n", ["I greet.", "Politely."]),
        ("I counted them:\ntokens used\n2,250\n", ["I counted them:", "tokens used", "2,250"]),
        ("", []),
        ("no end of line", ["no end of line"]),
        ("gr\udc80\udcff\x00\x07ün\n", None),
    ],
    ids=["escapes", "carriage returns", "twice", "secrets", "many", "long", "codex", "no codex", "nothing", "open", "not UTF-8"],
)  # fmt: skip
def test_its_decisions_are_its_last_lines_as_a_terminal_shows_them_without_secrets(
    architect: Client, issue: str, say: str, decisions: list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "said").write_bytes(os.fsencode(say))
    stored = after(architect, "edit", issue, EDIT=f"cat {tmp_path}/said", SAY="")
    said = stored["result"].get("decisions", [])
    assert said == decisions if decisions is not None else len(said) in (1, 2)
    assert "a1B2a1B2" not in str(stored) and ESC not in str(stored)


@pytest.mark.parametrize("shown", ['"$CCO_BRIEF_FILE"', "prompt", "task", '"$CCO_BRIEF_FILE" prompt task'])
def test_what_an_agent_was_told_and_shows_again_is_no_decision_of_its_own(
    architect: Client, issue: str, shown: str
) -> None:
    edit = f'cd "$(dirname "$CCO_CONTEXT_FILE")"; cat {shown}; echo'
    stored = after(architect, "edit", issue, EDIT=edit, SAY="I greet.\n")
    assert stored["result"]["decisions"] == ["I greet."]
    assert "edit" in output(architect, stored["agent_id"])


@pytest.mark.parametrize(
    ("task", "more"),
    [("fail", {}), ("die", {}), ("work", {}), ("edit", {"agent_type": "documentation-expert"}),
     ("edit", {"agent_type": "customer-support"}), ("edit", {"permissions": ["read_context", "publish_events"]})],
    ids=str,
)  # fmt: skip
def test_nobody_speaks_for_an_agent_that_failed_stored_its_own_or_may_store_none(
    architect: Client, issue: str, task: str, more: dict[str, Any]
) -> None:
    agent_id = spawn(architect, task, issue, **more)["agent_id"]
    ended = state(architect, agent_id)
    assert [row.get("source") for row in results_of(architect, agent_id)] == ([None] if task == "work" else [])
    assert (ended["result_id"] is None) == (task != "work")


def test_nobody_speaks_for_an_agent_that_was_ended(architect: Client, issue: str) -> None:
    agent_id = spawn(architect, "hang", issue)["agent_id"]
    architect.delete(f"/api/agents/{agent_id}")
    assert state(architect, agent_id)["state"] == "killed" and results_of(architect, agent_id) == []


def test_a_client_cannot_pass_a_result_off_as_the_services(architect: Client, issue: str) -> None:
    body = body_of(issue)
    answer = architect.post("/api/results", body | {"source": "sidecar"})
    assert (answer.status_code, answer.json()["code"], answer.json()["details"]) == (
        403,
        "AUTH_003",
        {"path": "source"},
    )
    assert architect.post("/api/results", body | {"source": "mine"}).status_code == 201


def test_it_can_be_turned_off(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--no-synthesis")
    architect = service.client()
    agent_id = spawn(architect, "succeed")["agent_id"]
    assert state(architect, agent_id)["result_id"] is None and results_of(architect, agent_id) == []


@pytest.mark.parametrize("kind", ["no repository", "no commit", "a subfolder"])
def test_other_kinds_of_roots(make_service: Callable[..., Service], tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    if kind == "a subfolder":
        root = make_repository(tmp_path / "whole") / "src"
        (tmp_path / "whole/outside.txt").write_text("x")
    root.mkdir(exist_ok=True)
    (root / "there.py").write_text("x")
    if kind == "no commit":
        git(root, "init", "-q")
    architect = make_service(*COMMAND, root=root).client()
    stored = after(architect, "edit", "issue-1", EDIT="echo y > new.py; echo y >> there.py")
    if kind == "no repository":
        assert files_of(stored) == ([], [], [])
        assert stored["result"]["warnings"] == ["Which files it changed is not known: there is no git repository"]
    else:
        assert files_of(stored) == (["new.py"], ["there.py"], [])


def test_what_submodules_hide_is_not_taken_for_nothing(make_service: Callable[..., Service], tmp_path: Path) -> None:
    root, inner = make_repository(tmp_path / "whole"), make_repository(tmp_path / "inner")
    git(root, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "inner")
    git(root, "commit", "-qm", "a submodule")
    architect = make_service(*COMMAND, root=root).client()
    stored = after(architect, "edit", "issue-1", EDIT="echo y > inner/new.py")
    assert files_of(stored) == ([], [], []) and not plugin("_pipeline_plan").is_idle(stored["result"])
    assert stored["result"]["warnings"] == ["Whether it changed files in the submodules without a commit is not known"]
    committed = f"cd inner; {GIT} add -A; {GIT} commit -qm new"
    assert files_of(after(architect, "edit", "issue-1", EDIT=committed)) == ([], ["inner"], [])


@pytest.mark.parametrize("place", ["part/inner", "part/deep/inner", "elsewhere/inner"])
@pytest.mark.parametrize("registered", [True, False])
def test_submodules_below_a_root_that_is_below_the_repositorys_top_are_told(
    make_service: Callable[..., Service], tmp_path: Path, place: str, registered: bool
) -> None:
    top, inner = make_repository(tmp_path / "whole"), make_repository(tmp_path / "inner")
    (top / "part").mkdir()
    (top / "part/a.txt").write_text("x\n")
    git(top, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), place)
    git(top, "add", "-A")
    if not registered:
        git(top, "rm", "-q", "--cached", ".gitmodules")
        (top / ".gitmodules").unlink()
    git(top, "commit", "-qm", "a submodule")
    architect = make_service(*COMMAND, root=top / "part").client()
    warnings = after(architect, "edit", "issue-1", EDIT="echo y >> a.txt")["result"].get("warnings", [])
    told = "Whether it changed files in the submodules without a commit is not known"
    assert warnings == ([told] if place.startswith("part") else [])


@pytest.mark.parametrize("written", ["", "{", "[]", '{"changed": 5}', '{"head": "--output=/tmp/x"}', None, "fifo"])
def test_what_an_agent_does_to_the_note_of_its_beginning_costs_it_its_files_alone(
    architect: Client, issue: str, written: str | None
) -> None:
    note = '"$(dirname "$CCO_TOKEN_FILE")/beginning.json"'
    change = (
        f"rm {note}"
        if written is None
        else f"rm {note}; mkfifo {note}"
        if written == "fifo"
        else f"echo '{written}' > {note}"
    )
    stored = after(architect, "edit", issue, EDIT=f"{change}; echo x > new.py")
    assert files_of(stored) == ([], [], []) and stored["result"]["decisions"] == ["edited"]
    (warning,) = stored["result"]["warnings"]
    assert warning.startswith("Which files it changed is not known: ") and "/agents/" not in warning


# -- never two, never none


SLOW = """
import time
from cco_sidecar import hookimpl

@hookimpl
def next_agents(result, proposals):
    time.sleep(1)
"""


def test_a_result_that_an_agent_sent_at_its_last_moment_is_the_only_one(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/slow.py").write_text(SLOW)
    architect = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins")).client()
    for number in range(3):
        agent_id = spawn(architect, "store_at_last", f"issue-{number}")["agent_id"]
        ended = state(architect, agent_id)
        (stored,) = results_of(architect, agent_id)
        assert "source" not in stored and (ended["result_id"], ended["result_status"]) == (stored["id"], "success")


KILLER = """
import os, signal
from pathlib import Path
from cco_sidecar import hookimpl

def die():
    mark = Path(os.environ["MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
BEFORE = KILLER + "\n@hookimpl\ndef next_agents(result):\n    die()\n"
AFTER = KILLER + "\n@hookimpl\ndef result_stored(result):\n    die()\n"


@pytest.mark.parametrize("code", [BEFORE, AFTER, ""], ids=["before its commit", "after its commit", "before its end"])
def test_a_kill_of_the_service_makes_no_result_two_and_none_lost(
    make_service: Callable[..., Service], tmp_path: Path, code: str
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/killer.py").write_text(code or KILLER + "\n@hookimpl\ndef startup():\n    pass\n")
    service = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins"), env={"MARK": str(tmp_path / "mark")})
    gate = tmp_path / "gate"
    environment = {"TEST_GATE": str(gate), "TEST_THEN": "edit", "EDIT": "echo x > new.py"}
    agent_id = spawn(service.client(), "wait", environment=environment)["agent_id"]
    says(service.client(), agent_id, "waiting")
    if not code:
        service.kill()
    gate.touch()
    assert service.process
    until(lambda: service.process.poll() is not None)
    service.start()
    architect = service.client()
    ended = state(architect, agent_id)
    (stored,) = results_of(architect, agent_id)
    assert (stored["source"], ended["result_id"], ended["state"]) == ("sidecar", stored["id"], "completed")
    assert files_of(stored) == (["new.py"], [], [])
    told = architect.wait("agent_exited", since="earliest", timeout=20_000)["events"]
    assert [event["data"]["result_id"] for event in told] == [stored["id"]]


# -- what stays of ended agents


def test_an_ended_agents_folder_goes_after_a_while_and_all_else_stays(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--agent-retention", "1")
    architect = service.client()
    living, ended = spawn(architect, "hang")["agent_id"], spawn(architect, "succeed")["agent_id"]
    state(architect, ended)
    until(lambda: not folder_of(service, ended).exists())
    answer = architect.get(f"/api/agents/{ended}/logs")
    assert (answer.status_code, answer.json()["code"]) == (404, "REQ_002")
    assert "no longer kept (--agent-retention)" in answer.json()["message"]
    status = architect.get(f"/api/agents/{ended}/status").json()
    assert (status["state"], status["output_tail"], status["result_status"]) == ("completed", [], "partial")
    assert results_of(architect, ended)
    assert output(architect, living) == "hanging\n" and (folder_of(service, living) / "context.json").exists()
    architect.delete(f"/api/agents/{living}")
    state(architect, living)


@pytest.mark.parametrize(
    ("ages", "oldest", "limit", "left"),
    [({"a": 10, "b": 20, "c": 30}, 25, 10**9, "ab"), ({"a": 10, "b": 20, "c": 30}, 99, 2500, "ab"), ({"a": 10}, 99, 500, ""),
     ({"a": 10, "b": 20, "x": 999}, 5, 0, "x"), ({"x": 1, "a": 5, "y": 9}, 99, 1000, "axy"), ({}, 1, 1, "")],
    ids=str,
)  # fmt: skip
def test_folders_of_ended_agents_are_kept_by_age_and_size_and_those_of_living_ones_always(
    tmp_path: Path, ages: dict[str, int], oldest: int, limit: int, left: str
) -> None:
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ("token" if name in "xy" else "output.log")).write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    plugin("_retention").prune_folders(tmp_path, 1000 - oldest, limit)
    assert "".join(sorted(path.name for path in tmp_path.iterdir())) == left


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), TimeoutError(), OSError(5, "I/O error")])
def test_a_disk_that_refuses_what_ended_agents_left_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: OSError
) -> None:
    looks: list[Any] = []

    def refusing(*arguments: Any) -> None:
        looks.append(arguments)
        raise fault

    async def some_looks() -> None:
        pruning = asyncio.create_task(_retention.prune_for_ever(tmp_path, settings))
        while len(looks) < 3:
            await asyncio.sleep(0)
        pruning.cancel()

    settings: Any = SimpleNamespace(agent_retention=0, agent_retention_mb=1)
    monkeypatch.setattr(_retention, "prune_folders", refusing)
    cco_sidecar.log_once.cache_clear()
    asyncio.run(some_looks())
    (said,) = [record.getMessage() for record in caplog.records if "is not pruned" in record.getMessage()]
    assert said.endswith(str(fault) or "TimeoutError")


def test_a_folder_that_vanishes_while_it_is_looked_at_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / f"agent-{number}" for number in range(3)]
    for folder in folders:
        folder.mkdir()
    exists = Path.exists

    def vanishing(path: Path) -> bool:
        if path.parent == folders[1]:
            folders[1].rmdir()
        return exists(path)

    monkeypatch.setattr(Path, "exists", vanishing)
    _retention.prune_folders(tmp_path, time.time() + 60, 10**9)
    assert list(tmp_path.iterdir()) == []
