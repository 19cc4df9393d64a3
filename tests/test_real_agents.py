"""Real coding programs, from npm, do an agent's whole job and run whole pipelines. Their models are played."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import npm
import pytest
from conftest import MODULE, Service, git, make_repository, plugin, until
from mock_model import WORK, MockModel
from real_agents import FORGETFUL, REFUSABLE, TASK, TOKEN, Workshop, environment, install, make_home, settle, task_of

NAMES = ["claude", "codex", "gemini", "opencode"]


@pytest.fixture(scope="module")
def model() -> Iterator[MockModel]:
    scripts = {
        "git": [{"sh": "git tag {issue}"}, {"sh": "git branch {issue}"}, {"sh": "git tag"}, {"text": "done"}],
        "nod": [{"text": "done"}],
        "beyond": [{"sh": "git tag {issue}", "beyond": "the sandbox"}, *WORK[3:]],
    }
    with MockModel(scripts | FORGETFUL) as running:
        yield running


@pytest.fixture(scope="module")
def workshop(model: MockModel) -> Iterator[Workshop]:
    """One service for all, started as if from a session of a coding program."""
    npm.CACHE.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=npm.CACHE) as folder,  # gemini takes no settings from below /tmp
        Workshop(Path(folder), NAMES, model, "--agent-may", "git tag") as running,
    ):
        yield running


@pytest.mark.parametrize("name", NAMES)
def test_a_real_program_does_the_whole_job(workshop: Workshop, name: str) -> None:
    """It hears at a tool's end of an event that came meanwhile, and its stop is refused while its result is missing."""
    done = workshop.run(name, task_of(name))
    assert (done.heard, done.refused) == (True, name in REFUSABLE), done.output
    assert (done.agent["state"], done.agent["exit_code"], done.agent["reason"]) == ("completed", 0, None), done.output
    assert done.read and done.wrote and done.tools, workshop.model.turns
    (result,) = done.results
    assert (result["result"]["status"], result["agent_type"]) == ("success", done.agent["agent_type"])
    assert [event["publisher"] for event in done.events] == [done.agent["agent_id"]]
    assert done.leaks == []
    figures = [done.agent[figure] for figure in ("model", "requests", "input_tokens", "output_tokens", "denials")]
    if name == "opencode":
        assert figures == [None] * 5 and done.agent["cost_usd"] is None
    else:  # claude knows prices, and before 2.1.332 tells of few denials
        assert figures[0] and all(figure > 0 for figure in figures[1:4]), done.agent
        assert (done.agent["cost_usd"] or 0) > 0 if name == "claude" else done.agent["cost_usd"] is None
        assert figures[4] in ((None, 0) if name == "claude" else (0,))


@pytest.mark.parametrize("name", ["claude", "gemini"])
def test_a_real_program_runs_what_it_may_and_nothing_else(workshop: Workshop, name: str) -> None:
    done = workshop.run(name, "Follow script git")
    issue = done.agent["issue_id"]
    assert done.agent["state"] == "completed", done.output
    assert issue in git(workshop.service.root, "tag").split()
    assert issue not in git(workshop.service.root, "branch"), "nobody allowed git branch"


@pytest.mark.parametrize("name", ["claude", "gemini"])
def test_a_task_cannot_have_a_real_program_read_a_file_into_the_conversation(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret.txt").write_text("the quick brown fox")
    before = len(workshop.model.requests)
    done = workshop.run(name, f"See @{tmp_path}/secret.txt and @../home/.claude.json")
    traffic = "\n".join(workshop.model.requests[before:])
    assert done.agent["state"] == "completed" and "in a team of agents" in traffic
    assert "the quick brown fox" not in traffic and "hasCompletedOnboarding" not in traffic


OWN = {  # an agent of the user's own, with a word that reaches its model
    "claude": (".claude/agents/c.md", "---\nname: own-claude\ndescription: |\n  Of our own\n---\nBe a quokka.\n"),
    "codex": (".codex/agents/c.toml", 'name = "own-codex"\ndeveloper_instructions = """Be a {quokka}\n"quokka"."""\n'),
    "opencode": (".opencode/agent/own-opencode.md", "---\ndescription: Of our own\n---\nBe a quokka.\n"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_real_program_is_an_agent_of_the_users_own(workshop: Workshop, name: str) -> None:
    path, content = OWN[name]
    (workshop.service.root / path).parent.mkdir(parents=True)
    (workshop.service.root / path).write_text(content)
    if name == "opencode":
        settle(workshop.service.root / ".opencode")
    before = len(workshop.model.requests)
    done = workshop.run(name, "Follow script nod", agent_type=f"own-{name}")
    assert done.agent["state"] == "completed", done.output
    assert "quokka" in "\n".join(workshop.model.requests[before:])


@pytest.mark.parametrize("kind", ["claude", "codex", "mixed"])
def test_real_programs_run_the_whole_pipeline(tmp_path: Path, model: MockModel, kind: str) -> None:
    repository, before = make_repository(tmp_path / "repository"), len(model.requests)
    mixed = '[agent-commands]\nchief-architect = "gemini"\npython-specialist = "codex"\ntest-engineer = "opencode"\n'
    (repository / "cco.toml").write_text(
        f'agent-command = "{kind}"\n' if kind != "mixed" else f'agent-command = "claude"\n{mixed}'
    )
    names = [kind] if kind != "mixed" else NAMES
    env = environment(make_home(tmp_path / "home", model.url), model.url, [install(name) for name in names])
    words = ["run", "--issue", "issue-1", "--task", TASK, "--storage", str(tmp_path / "storage"), "--format", "json"]
    ended = subprocess.run(
        [sys.executable, str(MODULE), *words], cwd=repository, env=env, capture_output=True, text=True, timeout=240
    )
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    agents = [line for line in told if line["event"] == "agent_ended"]
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert {"chief-architect", "python-specialist", "test-engineer", "security-auditor"} <= {
        row["agent_type"] for row in agents
    }
    assert all((row["state"], row["status"]) == ("completed", "success") for row in agents), agents
    assert not TOKEN.search("\n".join(model.requests[before:]) + ended.stdout + ended.stderr)


def test_a_person_allows_codex_what_its_sandbox_does_not(tmp_path: Path, model: MockModel) -> None:
    with Workshop(tmp_path, ["codex"], model, "--agent-approvals", "ask") as workshop, ThreadPoolExecutor() as pool:
        running = pool.submit(workshop.run, "codex", "Follow script beyond")
        person = workshop.service.client()
        (asked,) = until(lambda: person.get("/api/approvals", state="open").json()["approvals"], 60)
        assert asked["command"] == f"git tag {asked['issue_id']}"
        person.post(f"/api/approvals/{asked['approval_id']}/answer", {"answer": "approve"})
        done = running.result()
        assert done.agent["state"] == "completed", done.output
        assert git(workshop.service.root, "tag").split() == [asked["issue_id"]]


def test_a_session_of_claude_hears_what_the_team_does_and_is_woken_by_an_event(
    tmp_path: Path, model: MockModel
) -> None:
    service = Service(make_repository(tmp_path / "repository"), tmp_path / "storage").start()
    where = ["--root", str(service.root), "--storage", str(service.storage)]
    hook, wait = (shlex.join([sys.executable, str(MODULE), *words, *where]) for words in (["hook", "claude"], ["wait", "--rewake"]))  # fmt: skip
    hooks = plugin("_hook_settings").hook_settings("claude", hook, wait=wait)
    (tmp_path / "settings.json").write_text(json.dumps({"hooks": hooks}))
    words = ["-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"]
    env = environment(make_home(tmp_path / "home", model.url), model.url, [install("claude")])
    client, before = service.client(), len(model.requests)
    session = subprocess.Popen(
        [install("claude") / "claude", *words, "--settings", tmp_path / "settings.json"],
        cwd=service.root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert session.stdin
        content = {"type": "user", "message": {"role": "user", "content": "In a team of agents, Follow script nod"}}
        session.stdin.write(json.dumps(content) + "\n")
        session.stdin.flush()
        until(lambda: client.get("/status").json()["events"]["active_subscriptions"], 90)
        until(lambda: "A team of coding agents works on this repository" in "\n".join(model.requests[before:]), 60)
        turns = len(model.turns)
        client.publish("wake_up", {"message": "look at the zebra"})
        until(lambda: len(model.turns) > turns, 60)
        assert "look at the zebra" in "\n".join(model.requests[before:])
    finally:
        session.kill()
        session.communicate()
        until(lambda: not client.get("/status").json()["events"]["active_subscriptions"])  # its wait ends with it
        assert service.stop() == 0


# -- the user's own sessions

TELL = {"tool": "store_result", "sh": "sleep 2",  # until the program has its tools
        "arguments": '{"issue_id": "own-1", "status": "success", "decisions": ["mine"], "idempotency_key": "own-{name}"}'}  # fmt: skip
HEADLESS = {
    "claude": [
        "claude",
        "--settings",
        '{"disableAllHooks": true}',
        "--allowedTools",
        "mcp__cco",
        "Bash(sleep *)",
        "-p",
    ],
    "gemini": ["gemini", "--approval-mode", "yolo", "-p"],
}  # codex, copilot and opencode: test_connect


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts}


def test_real_sessions_are_connected_use_a_tool_and_are_disconnected() -> None:
    scripts = {
        name: [{**TELL, "arguments": TELL["arguments"].replace("{name}", name)}] * 4 + [{"text": "DONE"}]
        for name in HEADLESS
    }
    npm.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=npm.CACHE) as temporary, MockModel(scripts) as model:
        folder = Path(temporary)
        home, repository = make_home(folder / "home", model.url), make_repository(folder / "repository")
        (home / ".gemini/trustedFolders.json").write_text(json.dumps({str(repository): "TRUST_FOLDER"}))
        (repository / ".gemini").mkdir()
        (repository / ".gemini/settings.json").write_text('{\n  // mine\n  "ui": {"hideTips": true}\n}\n')
        env = environment(home, model.url, [install(name) for name in HEADLESS]) | {"PWD": str(repository)}
        service = Service(repository, folder / "storage", env=env).start()

        def run(words: list[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                words, cwd=repository, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
            )

        def cco(*words: str) -> str:
            done = run([sys.executable, str(MODULE), *words, "--storage", str(service.storage)])
            assert done.returncode == 0, done.stderr
            return done.stdout

        try:
            before = contents(repository)
            for name in HEADLESS:
                cco("connect", name, "--write")
            status = git(repository, "status", "--short")
            assert status == "?? .gemini/\n", "what was made is excluded; what the user has not committed is as it was"
            commands = [[*words, f"Follow script {name}"] for name, words in HEADLESS.items()]
            with ThreadPoolExecutor() as threads:
                said = list(threads.map(run, commands))
            results = service.client().get("/api/results", issue_id="own-1").json()["results"]
            who = sorted(row["agent_id"].rpartition("-")[0] for row in results)
            assert who == [f"session-{name}" for name in HEADLESS], [
                (done.stdout[-500:], done.stderr[-500:]) for done in said
            ]
            told = "".join([*model.requests, service.log, *(done.stdout + done.stderr for done in said)])
            assert not TOKEN.search(told)
            cco("disconnect")
            assert contents(repository) == before
            claude = json.loads((home / ".claude.json").read_text())  # which claude itself writes anew
            assert "cco" not in json.dumps(claude["projects"][str(repository)].get("mcpServers", {}))
        finally:
            assert service.stop() == 0, service.log
