"""Plugins: every hook through a small plugin file, and what a bad plugin cannot do."""

from __future__ import annotations

import ast
import asyncio
import collections
import inspect
import itertools
import json
import operator
import os
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
import pytest
from conftest import MODULE, PROJECT, ROOT, Client, Service, clean_environment, end_stragglers, make_repository, until

import cco_sidecar
from cco_sidecar import PACKAGE, NextAgent, ResultFact, Storage, bundled_class, hookimpl

Hooks: Any = bundled_class(cco_sidecar.Hooks, "_hooks", "SafeHooks")
HOOKS: dict[str, Callable[..., Any]] = Hooks.SPECS
bundled_plugins = operator.attrgetter("bundled_plugins")(sys.modules[Hooks.__module__])

PLUGINS = {
    "wizardry": """
        @hookimpl
        def register_agent_types():
            return {"wizard": "coding", "mage": "coding", "sphinx": "architect"}
    """,
    "weather": """
        @hookimpl
        def context_section(request):
            sections = {"weather": {"issue": request.issue_id, "files": len(request.project.files)}}
            if request.issue_id.startswith("rewritten-"):
                sections["previous_agent_outputs"] = []
            if request.issue_id.startswith("nonsense-"):
                sections["relevant_files"] = sections["metadata"] = 5
            return sections
    """,
    "tracker": """
        from cco_sidecar import IssueNotFound

        @hookimpl
        def resolve_issue(issue_id):
            if issue_id.startswith("gone-"):
                raise IssueNotFound(issue_id)
            if issue_id.startswith("known-"):
                return {"title": "Cookies are lost", "body": "SessionStore.save_cookie keeps nothing"}
    """,
    "ranking": """
        from pathlib import Path

        from cco_sidecar import RankedFile

        @hookimpl
        def rank_files(request):
            if request.task == "only the guide":
                names = ["docs/guide.md", "../secret.txt", "/etc/hostname", "not/there.py"]
                return [RankedFile(name, 9 - number, ["the plugin says so"]) for number, name in enumerate(names)]

        @hookimpl
        def index_state(index_folder):
            return {"state": "building" if Path(index_folder, "busy").exists() else "ready"}
    """,
    "ignored_file": """
        from pathlib import Path

        @hookimpl
        def section_files():
            return ["build/verdict.txt", "nowhere.txt", "nul\\0"]

        @hookimpl
        def context_section(request):
            file = Path(request.project.root, "build/verdict.txt")
            return {"verdict": file.read_text() if file.exists() else None}
    """,
    "search": """
        from cco_sidecar import EventBus, Filter

        @hookimpl
        def part_class(base):
            class Searching(base):
                def parse(self, text):
                    if text[:1] == "~":
                        return Filter(text, (lambda event: text[1:] in event["topic"],))
                    return super().parse(text)

            return Searching if issubclass(base, EventBus) else None
    """,
    "routing": """
        from cco_sidecar import NextAgent

        @hookimpl
        def next_agents(result, proposals, submission):
            kind = submission["issue_id"].partition("-")[0]
            extra = NextAgent("technical-writer", "low", "plugin: always")
            again = NextAgent("test-engineer", "low", "plugin: again")
            return {"added": [*proposals, extra], "repeated": [*proposals, again], "removed": [], "emptied": (), "replaced": [extra], "text": "nobody",
                    "stranger": [NextAgent("nobody-knows", "low", "?")], "mixed": [NextAgent("nobody-knows", "low", "?"), *proposals, extra],
                    "person": [extra, NextAgent("operator", "low", "?")], "halves": [{"agent_type": "wizard"}]}.get(kind)
    """,
    "policy": """
        @hookimpl
        def permission_policy(claims, permission, method, path):
            if claims.sub == "crashing":
                raise RuntimeError("no opinion")
            return {"banned": "is banned", "vetoed": False, "welcome": True, "odd": 5}.get(claims.sub)
    """,
    "launcher": """
        import sys

        @hookimpl
        def agent_command(launch):
            if launch.agent_type == "wizard":
                return [sys.executable, "-c", "import sys; print(*sys.argv[1:]); sys.exit(7)", "{agent_type}", "{issue_id}", "{task}"]
            if launch.agent_type == "mage":
                return ["echo", "so be it"]
            if launch.agent_type == "sphinx":
                return "echo a riddle"

        @hookimpl
        def agent_failure(agent, output):
            if output and "cursed" in output[0]:
                return f"a  curse\\n on {agent['agent_type']}, exit code {agent['exit_code']}"
            return {"riddle": 5, "blank": " "}.get(output[0].split()[-1]) if output else None
    """,
    "observer": """
        import json, os

        def note(kind, fact):
            with open(os.environ["NOTES"], "a") as file:
                file.write(json.dumps([kind, fact]) + "\\n")

        @hookimpl
        def result_stored(result):
            note("result_stored", result)

        @hookimpl
        def event_published(event):
            note("event_published", event)

        @hookimpl
        def agent_starting(launch, root):
            note("agent_starting", [launch.agent_id, root])

        @hookimpl
        def agent_ended(agent):
            note("agent_ended", agent)

        @hookimpl
        def startup(info):
            note("startup", info.url)

        @hookimpl
        def shutdown(info):
            note("shutdown", info.url)
    """,
    "routes": """
        from cco_sidecar import ApiError, Endpoint, PUBLISH, Route, Struct

        class Greeting(Struct):
            hello: str
            caller: str

        class Greet(Endpoint):
            permission = PUBLISH
            answers = {200: Greeting}

            async def respond(self, name):
                if name == "nobody":
                    raise ApiError("REQ_002", "Nobody is not here")
                return Greeting(name, self.claims.sub)

        @hookimpl
        def register_routes():
            return [Route("GET", "/api/greet/{name}", Greet)]
    """,
    "commands": """
        def greet(options):
            print("hello", options.name)
            return 4

        @hookimpl
        def register_commands(commands):
            command = commands.add_parser("greet", help="say hello")
            command.add_argument("name")
            command.set_defaults(run=greet)
    """,
    "server": """
        from cco_sidecar import Server

        @hookimpl
        def part_class(base):
            class Own(base):
                def start_request(self, server_conn, request_conn):
                    print("a server of one's own", flush=True)
                    return super().start_request(server_conn, request_conn)

            return Own if issubclass(base, Server) else None
    """,
    "letters": """
        from cco_sidecar import Launcher

        @hookimpl
        def part_class(base):
            if not issubclass(base, Launcher):
                return None

            class Lettered(base):
                async def files(self, running, body):
                    return await super().files(running, body) | {"letter.txt": running.row["id"].encode()}

                def may_set(self, variable):
                    return variable != "FEATURE_LETTERS" and super().may_set(variable)

            return Lettered
    """,
    "stamp": """
        from cco_sidecar import Endpoint

        @hookimpl
        def part_class(base):
            class Stamped(base):
                async def send(self, content):
                    self.set_header("X-Stamp", str(len(content)))
                    await super().send(content)

                def finished(self, status, seconds):
                    super().finished(status, seconds)
                    print("dear diary,", self.request.method, self.request.path, status, self.claims.sub, flush=True)

            return Stamped if issubclass(base, Endpoint) else None
    """,
    "issuer": """
        import jwt
        from cco_sidecar import ApiError, Claims, Tokens

        @hookimpl
        def part_class(base):
            class Trusting(base):
                def _verified(self, token):
                    try:
                        return super()._verified(token)
                    except ApiError:
                        numbers = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
                        return self.decode(token, jwt.PyJWK(numbers).key, "EdDSA", Claims)

            return Trusting if issubclass(base, Tokens) else None
    """,
    "fitting": """
        from cco_sidecar import Contexts

        @hookimpl
        def part_class(base):
            class Fitting(base):
                def fit(self, request, sections, max_bytes):
                    if request.issue_id.startswith("nothing-"):
                        sections["relevant_files"] = []
                        return True
                    return super().fit(request, sections, max_bytes)

            return Fitting if issubclass(base, Contexts) else None
    """,
    "short": """
        @hookimpl
        def context_brief(request, sections, reader):
            if request.issue_id.startswith("short-"):
                said = [output["decision"] for output in sections["previous_agent_outputs"]]
                return f"{request.task} {said} {reader.agent_type} {sorted(sections)}"
    """,
    "reader": """
        from cco_sidecar import FileFact, Project
        from msgspec.structs import replace

        @hookimpl
        def part_class(base):
            class Reader(base):
                async def state(self):
                    state = await super().state()
                    return replace(state, files=[*state.files, FileFact("seen/by-a-plugin.py", 7, 0)])

            return Reader if issubclass(base, Project) else None
    """,
    "owner": """
        from cco_sidecar import Processes

        @hookimpl
        def part_class(base):
            class Named(base):
                async def start(self, running, command):
                    command.argv.append(f"started by a plugin's owner")
                    await super().start(running, command)

            return Named if issubclass(base, Processes) else None
    """,
    "store": """
        from cco_sidecar import Storage

        @hookimpl
        def part_class(base):
            class Mirrored(base):
                def start(self):
                    super().start()
                    print("a storage of one's own", flush=True)

            return Mirrored if issubclass(base, Storage) else None
    """,
    "proxy": """
        @hookimpl
        def agent_result(agent, lines, alone):
            if agent["issue_id"].startswith("spoken-"):
                return {"status": "success", "decisions": [*lines, str(alone)], "rationale": "a plugin says so"}
    """,
    "purse": """
        from cco_sidecar import Agents, ApiError

        @hookimpl
        def part_class(base):
            class Thrifty(base):
                def describe(self, row):
                    return super().describe(row) | {"cost_usd": 0.5}

                def last_word(self, row):
                    return super().last_word(row) | {"cost_usd": 0.5}

                def admit(self, row, records):
                    if row["issue"].startswith("poor-"):
                        raise ApiError("AGT_003", "There is no money left")
                    return super().admit(row, records)

            return Thrifty if issubclass(base, Agents) else None
    """,
    # asked before all others, being loaded last
    "x_nonsense": "\n".join(
        f"@hookimpl\ndef {name}({'launch' if name == 'agent_command' else ''}):\n    return 5\n"
        for name in HOOKS
        if name != "permission_policy"
    ),
    "x_raising": "\n".join(
        f"@hookimpl\ndef {name}():\n    raise cco_sidecar.IssueNotFound('x') if {name!r} != 'resolve_issue' else RuntimeError('x')\n"
        for name in HOOKS
        if name != "permission_policy"
    ),
    "x_exits": "raise SystemExit(3)",
    "x_broken": "def context_section(:",
}


def write_plugins(folder: Path, plugins: dict[str, str]) -> Path:
    """Plugin files that import what each needs."""
    folder.mkdir(parents=True)
    for name, code in plugins.items():
        (folder / f"{name}.py").write_text(
            "import cco_sidecar\nfrom cco_sidecar import hookimpl\n" + textwrap.dedent(code)
        )
    return folder


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service with all of PLUGINS, the good ones and the bad ones."""
    folder = tmp_path_factory.mktemp("plugged")
    plugins = write_plugins(folder / "plugins", PLUGINS)
    repository = make_repository(folder / "repository")
    (folder / "secret.txt").write_text("outside\n")
    (repository / "AGENTS.md").write_text("Use tabs.\ntoken = ghp_" + "a1B2" * 9 + "\n")
    running = Service(
        repository, folder / "storage", "--plugins", str(plugins), env={"NOTES": str(folder / "notes")}
    ).start()
    yield running
    if running.process and running.process.poll() is None:
        running.stop()
    end_stragglers()


def notes(service: Service, kind: str) -> list[Any]:
    path = Path(service.env["NOTES"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [fact for said, fact in map(json.loads, lines) if said == kind]


def hooks_of(folder: Path, **plugins: str) -> Any:
    """Hooks with these plugins and no others."""
    hooks = Hooks([])
    hooks.load_folders([write_plugins(folder / "unit", plugins)])
    return hooks


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MODULE), *words]
    return subprocess.run(command, cwd=cwd, env=clean_environment(**env), capture_output=True, text=True, timeout=30)


# -- what plugins can add


def test_a_plugin_adds_agent_types(plugged: Service) -> None:
    wizard = plugged.client("wizard")
    assert wizard.get("/api/context/issue-1/wizard").status_code == 200
    assert wizard.get("/api/context/issue-1/warlock").json()["code"] == "AGT_002"
    assert wizard.store("wizard", issue="w-1")["next_agents"][0]["agent_type"] == "test-engineer"
    where = [f"--plugins={plugged.arguments[1]}", f"--storage={plugged.storage}"]
    minted = run("token", "--type=wizard", *where, cwd=plugged.root)
    assert minted.returncode == 0, minted.stderr


def test_a_plugin_adds_a_context_section_and_its_answer_takes_the_place_of_a_built_in_one(
    plugged: Service, issue: str
) -> None:
    client = plugged.client()
    client.store(issue=issue)
    client.store(issue=f"rewritten-{issue}")
    plain = client.get(f"/api/context/{issue}/test-engineer").json()["context"]
    assert plain["weather"]["issue"] == issue and plain["weather"]["files"] == plain["project_structure"]["total_files"]
    assert len(plain["previous_agent_outputs"]) == 1
    rewritten = client.get(f"/api/context/rewritten-{issue}/test-engineer").json()["context"]
    assert rewritten["previous_agent_outputs"] == [] and rewritten["weather"]


def test_a_section_that_is_nonsense_leaves_the_built_in_one_in_place(plugged: Service, issue: str) -> None:
    answer = plugged.client().get(f"/api/context/nonsense-{issue}/test-engineer")
    assert answer.status_code == 200, answer.text
    assert answer.json()["context"]["relevant_files"] and answer.json()["context"]["metadata"]["dependencies"]


AWAY_FOR_A_WHILE = """
import os, time
def value():
    while os.path.exists({flag!r}):
        {failure}
    return {value}
@hookimpl
def {hook}(request):
    return value()
"""


@pytest.mark.parametrize(
    ("hook", "failure", "value"),
    [
        ("context_section", "raise OSError('the service behind it is away')", "{'weather': 'fine'}"),
        ("context_section", "time.sleep(0.05)", "{'weather': 'fine'}"),
        ("context_section", "return {'relevant_files': 7}", "{'weather': 'fine'}"),
        ("context_section", "return {'weather': object()}", "{'weather': 'fine'}"),
        ("rank_files", "return 1 / 0", "[cco_sidecar.RankedFile('src/greeting.py', 1.0, ['as the weather says'])]"),
    ],
)
def test_a_context_that_lacks_what_a_plugin_failed_to_give_says_so_and_is_not_kept(
    make_service: Callable[..., Service], tmp_path: Path, hook: str, failure: str, value: str
) -> None:
    flag = tmp_path / "away"
    flag.touch()
    code = AWAY_FOR_A_WHILE.format(flag=str(flag), failure=failure, hook=hook, value=value)
    client = make_service("--plugins", str(write_plugins(tmp_path / "more", {"theirs": code}))).client()
    path = "/api/context/issue-1/python-specialist"
    until(lambda: client.get(path).json()["context"]["metadata"]["index"] == "ready")
    lacking = client.get(path)
    assert lacking.json()["context"]["metadata"]["plugins_failed"] == ["theirs"] and "weather" not in lacking.text
    flag.unlink()
    whole = client.request("GET", path, headers={"If-None-Match": lacking.headers["ETag"]})
    assert whole.status_code == 200 and "weather" in whole.text and not whole.json()["cache_hit"]
    assert "plugins_failed" not in whole.json()["context"]["metadata"]
    assert client.get(path).json()["cache_hit"] is True


def test_a_plugin_knows_an_issue_or_that_there_is_none(plugged: Service, issue: str) -> None:
    client = plugged.client()
    gone = client.get(f"/api/context/gone-{issue}/python-specialist")
    assert (gone.status_code, gone.json()["code"]) == (404, "REQ_002")
    known = client.get(f"/api/context/known-{issue}/python-specialist").json()["context"]
    assert known["relevant_files"][0]["path"] == "src/session_store.py"
    assert client.get(f"/api/context/{issue}/python-specialist").status_code == 200


def test_a_plugin_ranks_the_files_and_cannot_name_others(plugged: Service, issue: str) -> None:
    client = plugged.client()
    files = client.get(f"/api/context/{issue}/python-specialist", task="only the guide").json()["context"][
        "relevant_files"
    ]
    assert [(file["path"], file["reasons"]) for file in files] == [("docs/guide.md", ["the plugin says so"])]
    assert (
        len(client.get(f"/api/context/{issue}/python-specialist", task="greet").json()["context"]["relevant_files"]) > 1
    )


def test_a_context_says_that_an_index_is_still_being_made_and_is_not_kept(plugged: Service, issue: str) -> None:
    client, busy = plugged.client(), plugged.storage / "index/busy"
    busy.touch()
    answers = [client.get(f"/api/context/{issue}/python-specialist", task="greet") for _ in range(2)]
    assert [(answer.json()["context"]["metadata"]["index"], answer.json()["cache_hit"]) for answer in answers] == [
        ("building", False)
    ] * 2
    busy.unlink()
    ready = client.request(
        "GET",
        f"/api/context/{issue}/python-specialist?task=greet",
        headers={"If-None-Match": answers[1].headers["ETag"]},
    )
    assert (ready.status_code, ready.json()["context"]["metadata"]["index"]) == (200, "ready")


@pytest.mark.parametrize(
    ("kind", "proposed"),
    [
        ("plain", ["test-engineer", "security-auditor"]),
        ("added", ["test-engineer", "security-auditor", "technical-writer"]),
        ("repeated", ["test-engineer", "security-auditor"]),
        ("removed", []),
        ("emptied", []),
        ("replaced", ["technical-writer"]),
        ("text", ["test-engineer", "security-auditor"]),
        ("stranger", ["test-engineer", "security-auditor"]),
        ("mixed", ["test-engineer", "security-auditor", "technical-writer"]),
        ("person", ["technical-writer"]),
        ("halves", ["test-engineer", "security-auditor"]),
    ],
)
def test_a_plugin_adds_removes_and_replaces_next_agents_but_nonsense_changes_nothing(
    plugged: Service, issue: str, kind: str, proposed: list[str]
) -> None:
    client = plugged.client()
    stored = client.store(issue=f"{kind}-{issue}")
    assert [item["agent_type"] for item in stored["next_agents"]] == proposed
    event = client.wait("agent_completed", filter=f"issue_id:{kind}-{issue}", since="earliest", timeout=0)["events"][0]
    assert event["data"]["next_agents"] == stored["next_agents"]


@pytest.mark.parametrize(
    ("subject", "status", "reason"),
    [
        ("welcome", 200, ""), ("somebody", 200, ""), ("banned", 403, "is banned"), ("vetoed", 403, "policy refuses"),
        ("odd", 403, "could not decide; the service logged why"), ("crashing", 403, "could not decide"),
    ],
)  # fmt: skip
def test_a_policy_refuses_and_one_that_fails_refuses_too(
    plugged: Service, subject: str, status: int, reason: str
) -> None:
    answer = plugged.client(sub=subject).get("/api/results")
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["code"] == "AUTH_003" and reason in answer.json()["message"]


def test_a_plugin_says_how_an_agent_runs_and_observes_its_end(plugged: Service, issue: str) -> None:
    client = plugged.client()
    body = {"agent_type": "wizard", "issue_id": issue, "task": "a {issue_id} spell"}
    agent_id = client.post("/api/agents/spawn", body).json()["agent_id"]
    ended = until(lambda: [fact for fact in notes(plugged, "agent_ended") if fact["agent_id"] == agent_id])
    facts = {"agent_id": agent_id, "agent_type": "wizard", "issue_id": issue, "state": "failed", "exit_code": 7}
    assert [facts.items() <= fact.items() for fact in ended] == [True]
    assert client.get(f"/api/agents/{agent_id}/logs").json()["text"].startswith(f"wizard {issue} a {{issue_id}} spell ")


def test_a_plugin_says_why_an_agent_cannot_work(plugged: Service, issue: str) -> None:
    """Asked while it runs it has the agent ended; what is no text is no reason. The plugin endings asks."""
    client = plugged.client()
    for task, reason in (("is cursed", "a curse on wizard, exit code "), ("a riddle", None), ("a blank", None)):
        body = {"agent_type": "wizard", "issue_id": issue, "task": task}
        spawned = client.post("/api/agents/spawn", body)
        assert spawned.status_code == 201, spawned.text
        path = f"/api/agents/{spawned.json()['agent_id']}/status"
        ended = until(lambda path=path: (found := client.get(path).json())["ended_at"] and found)
        assert ended["state"] == "failed" and (ended["reason"] or "").startswith(reason or "")
        assert bool(ended["reason"]) is bool(reason)


def test_a_plugin_brings_its_own_owner_of_agents_processes(plugged: Service, issue: str) -> None:
    client = plugged.client()
    spawned = client.spawn(issue, "wizard")
    path = f"/api/agents/{spawned['agent_id']}"
    until(lambda: client.get(f"{path}/status").json()["ended_at"])
    assert client.get(f"{path}/logs").json()["text"] == f"wizard {issue}  started by a plugin's owner\n"


def test_a_plugin_speaks_for_an_agent_that_stored_nothing(plugged: Service, issue: str) -> None:
    client, issue = plugged.client(), f"spoken-{issue}"
    agent = client.spawn(issue, "mage")["agent_id"]
    until(lambda: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    (stored,) = client.get("/api/results", issue_id=issue).json()["results"]
    assert (stored["source"], stored["agent_id"]) == ("sidecar", agent)
    assert "so be it" in stored["result"]["decisions"][0] and stored["result"]["rationale"] == "a plugin says so"
    assert [agent, str(plugged.root)] in notes(plugged, "agent_starting")


def test_a_plugin_reads_filters_in_its_own_way(plugged: Service, issue: str) -> None:
    client = plugged.client()
    for topic in ("sea food", "meat", "sea salt"):
        client.publish("menu", {"issue_id": issue}, topic=topic)
    found = client.wait("menu", filter="~sea", since="earliest", timeout=0)["events"]
    assert [event["topic"] for event in found] == ["sea food", "sea salt"]


def test_a_plugin_adds_to_answers_about_agents_and_decides_who_may_start(plugged: Service, issue: str) -> None:
    client = plugged.client()
    body = {"agent_type": "wizard", "issue_id": issue}
    agent = client.post("/api/agents/spawn", body).json()["agent_id"]
    exited = client.wait("agent_exited", filter=f"issue_id:{issue}", since="earliest", timeout=10_000)["events"][0]
    assert exited["data"]["cost_usd"] == client.get(f"/api/agents/{agent}/status").json()["cost_usd"] == 0.5
    refused = client.post("/api/agents/spawn", body | {"issue_id": f"poor-{issue}"})
    assert (refused.status_code, refused.json()["message"]) == (429, "There is no money left")


def test_a_plugin_adds_to_what_agents_are_started_with(plugged: Service, issue: str) -> None:
    asked = {"FEATURE_LETTERS": "1", "FEATURE_OTHER": "1"}
    body = {"agent_type": "wizard", "issue_id": issue, "environment": asked}
    spawned = plugged.client().post("/api/agents/spawn", body).json()
    assert spawned["environment_ignored"] == ["FEATURE_LETTERS"]
    assert (plugged.storage / "agents" / spawned["agent_id"] / "letter.txt").read_text() == spawned["agent_id"]


def test_a_command_that_is_no_list_of_words_is_passed_over(
    plugged: Service, issue: str, make_service: Callable[..., Service]
) -> None:
    fallback = json.dumps([sys.executable, "-c", "print('the configured one')"])
    service = make_service(
        "--plugins", str(plugged.arguments[1]), "--agent-command", fallback, env=plugged.env | {"NOTES": "/dev/null"}
    )
    client = service.client()
    spawned = client.post("/api/agents/spawn", {"agent_type": "sphinx", "issue_id": issue})
    assert spawned.status_code == 201, spawned.text
    path = f"/api/agents/{spawned.json()['agent_id']}"
    until(lambda: client.get(f"{path}/status").json()["ended_at"])
    assert client.get(f"{path}/logs").json()["text"] == "the configured one\n"


def test_observers_are_told_in_order_what_was_stored_and_published(plugged: Service, issue: str) -> None:
    client = plugged.client()
    stored = [client.store(issue=issue, decisions=[str(number)]) for number in range(3)]
    published = client.publish("noted", {"issue_id": issue})
    told = until(
        lambda: [fact for fact in notes(plugged, "event_published") if fact["data"].get("issue_id") == issue][3:]
    )
    assert told[0]["event_id"] == published["event_id"]
    results = [fact for fact in notes(plugged, "result_stored") if fact["issue_id"] == issue]
    assert [result["id"] for result in results] == [item["id"] for item in stored]
    assert results[0]["result"]["decisions"] == ["0"] and results[0]["project_id"] == PROJECT


def test_a_plugin_adds_endpoints_with_everything_that_ours_have(plugged: Service) -> None:
    client = plugged.client("issue-triager", sub="triager")
    answer = client.get("/api/greet/ada")
    assert answer.json() == {"hello": "ada", "caller": "triager"}
    assert answer.headers["X-Request-ID"] and answer.headers["X-RateLimit-Limit"] == "30"
    assert client.get("/api/greet/nobody").json()["code"] == "REQ_002"
    assert client.post("/api/greet/ada", {}).status_code == 405
    assert plugged.client("documentation-expert").get("/api/greet/ada").json()["code"] == "AUTH_003"


def test_a_plugin_adds_commands_and_other_plugins_cannot_break_the_command_line(plugged: Service) -> None:
    greeted = run(
        "--plugins", str(plugged.arguments[1]), "greet", "status", cwd=plugged.root
    )  # an argument that is a command of ours
    assert (greeted.returncode, greeted.stdout) == (4, "hello status\n"), greeted.stderr
    assert "say hello" in run("--help", "--plugins", str(plugged.arguments[1]), cwd=plugged.root).stdout
    assert run("greet", "ada", cwd=plugged.root).returncode == 2


def test_a_plugin_brings_its_own_server(plugged: Service) -> None:
    assert plugged.client().get("/health").status_code == 200
    assert "a server of one's own" in plugged.log


def test_a_plugin_brings_its_own_storage(plugged: Service) -> None:
    assert "a storage of one's own" in plugged.log
    stored = plugged.client().store()
    assert plugged.client().get(f"/api/results/{stored['id']}").status_code == 200


def test_a_plugin_takes_down_every_request(plugged: Service) -> None:
    client = plugged.client(sub="writer")
    client.get("/api/results/result-none")
    client.get("/nowhere")
    until(lambda: "dear diary, GET /api/results/result-none 404 writer\n" in plugged.log)
    until(lambda: "dear diary, GET /nowhere 404 \n" in plugged.log)


def test_a_plugin_knows_the_keys_of_other_issuers(plugged: Service) -> None:
    own = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"  # the other half, as RFC 8037 prints it
    key = jwt.PyJWK({"kty": "OKP", "crv": "Ed25519", "d": own, "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}).key
    claims = jwt.decode(plugged.token(), options={"verify_signature": False})
    assert Client(plugged.url, jwt.encode(claims, key, algorithm="EdDSA")).get("/status").status_code == 200
    assert Client(plugged.url, jwt.encode(claims, "k" * 32, algorithm="HS256")).get("/status").status_code == 401


def test_a_plugin_fits_contexts_into_their_budget(plugged: Service) -> None:
    answer = plugged.client().get("/api/context/nothing-1/python-specialist").json()
    assert (answer["file_count"], answer["truncated"], answer["context"]["relevant_files"]) == (0, True, [])
    assert plugged.client().get("/api/context/else-1/python-specialist").json()["file_count"] > 0


def test_a_plugin_makes_its_own_brief_and_secrets_are_redacted(plugged: Service) -> None:
    client = plugged.client()
    client.store(issue="short-1", decisions=["Tokens are kept"])
    asked = {"headers": {"Accept": "text/markdown"}, "params": {"task": "rotate ghp_" + "a1B2" * 9}}
    answer = client.request("GET", "/api/context/short-1/python-specialist", **asked)
    assert answer.text.startswith("rotate [REDACTED") and "a1B2" not in answer.text
    assert "['Tokens are kept'] chief-architect ['git_context'" in answer.text
    assert client.request("GET", "/api/context/long-1/python-specialist", **asked).text.startswith("# Brief for ")


def test_a_plugin_brings_its_own_look_at_the_repository(plugged: Service) -> None:
    context = plugged.client().get("/api/context/issue-1/python-specialist").json()["context"]
    assert "seen/by-a-plugin.py" in context["project_structure"]["files"]
    assert "src/main.py" in context["project_structure"]["files"]


def test_a_plugin_names_ignored_files_whose_change_makes_a_context_anew(
    tmp_path: Path, make_service: Callable[..., Service], repository: Path
) -> None:
    plugins = write_plugins(tmp_path / "plugins", {"ignored_file": PLUGINS["ignored_file"]})
    service = make_service("--no-watch", "--plugins", str(plugins))

    def verdict() -> Any:
        return service.client().get("/api/context/issue-1/python-specialist").json()["context"]["verdict"]

    assert verdict() is None
    for text in ("good", "bad", "GOOD"):
        (repository / "build").mkdir(exist_ok=True)
        (repository / "build/verdict.txt").write_text(text)
        assert verdict() == text
    (repository / "build/verdict.txt").unlink()
    assert verdict() is None


def test_a_plugin_sees_each_answer_before_it_is_sent(plugged: Service) -> None:
    answer = plugged.client().get("/status")
    assert int(answer.headers["X-Stamp"]) == len(answer.content)
    assert int(plugged.client().get("/nowhere").headers["X-Stamp"]) == len(plugged.client().get("/nowhere").content)


def test_plugins_are_told_of_start_and_stop(tmp_path: Path, make_service: Callable[..., Service]) -> None:
    plugins = write_plugins(
        tmp_path / "plugins", {name: PLUGINS[name] for name in ("observer", "x_nonsense", "x_raising")}
    )
    service = make_service("--plugins", str(plugins), env={"NOTES": str(tmp_path / "notes")})
    url = until(lambda: notes(service, "startup"))
    assert url == [service.url] and notes(service, "shutdown") == []
    assert service.stop() == 0
    assert notes(service, "shutdown") == url
    assert "Traceback" not in service.log


SLOW_OBSERVER = """
    import time

    @hookimpl
    def event_published(event):
        time.sleep({seconds})
        note("event_published", event["data"]["number"])

    @hookimpl
    def shutdown(info):
        note("shutdown", info.url)
"""


@pytest.mark.parametrize(("seconds", "heard"), [(0.2, [0, 1, 2]), (60, [])])
def test_observers_hear_before_the_stop_what_they_have_not_heard_and_hold_it_up_for_seconds_at_most(
    tmp_path: Path, make_service: Callable[..., Service], seconds: float, heard: list[int]
) -> None:
    code = textwrap.dedent(PLUGINS["observer"].partition("@hookimpl")[0]) + textwrap.dedent(
        SLOW_OBSERVER.format(seconds=seconds)
    )
    plugins = write_plugins(tmp_path / "plugins", {"slow": code})
    service = make_service("--plugins", str(plugins), env={"NOTES": str(tmp_path / "notes")})
    for number in range(3):
        service.client().publish("noted", {"number": number})
    assert service.stop() == 0
    assert notes(service, "event_published") == heard and notes(service, "shutdown") == [service.url]
    lines = (tmp_path / "notes").read_text().splitlines()
    assert json.loads(lines[-1])[0] == "shutdown"
    assert ("observers are too slow" in service.log) is not bool(heard)


EXERCISED = {
    "register_agent_types": test_a_plugin_adds_agent_types,
    "context_section": test_a_plugin_adds_a_context_section_and_its_answer_takes_the_place_of_a_built_in_one,
    "section_files": test_a_plugin_names_ignored_files_whose_change_makes_a_context_anew,
    "resolve_issue": test_a_plugin_knows_an_issue_or_that_there_is_none,
    "rank_files": test_a_plugin_ranks_the_files_and_cannot_name_others,
    "index_state": test_a_context_says_that_an_index_is_still_being_made_and_is_not_kept,
    "next_agents": test_a_plugin_adds_removes_and_replaces_next_agents_but_nonsense_changes_nothing,
    "permission_policy": test_a_policy_refuses_and_one_that_fails_refuses_too,
    "agent_command": test_a_plugin_says_how_an_agent_runs_and_observes_its_end,
    "agent_failure": test_a_plugin_says_why_an_agent_cannot_work,
    "result_stored": test_observers_are_told_in_order_what_was_stored_and_published,
    "event_published": test_observers_are_told_in_order_what_was_stored_and_published,
    "agent_ended": test_a_plugin_says_how_an_agent_runs_and_observes_its_end,
    "register_routes": test_a_plugin_adds_endpoints_with_everything_that_ours_have,
    "register_commands": test_a_plugin_adds_commands_and_other_plugins_cannot_break_the_command_line,
    "context_brief": test_a_plugin_makes_its_own_brief_and_secrets_are_redacted,
    "part_class": test_a_plugin_adds_to_what_agents_are_started_with,
    "agent_result": test_a_plugin_speaks_for_an_agent_that_stored_nothing,
    "agent_starting": test_a_plugin_speaks_for_an_agent_that_stored_nothing,
    "startup": test_plugins_are_told_of_start_and_stop,
    "shutdown": test_plugins_are_told_of_start_and_stop,
}


def test_every_hook_is_exercised_here_and_explained() -> None:
    assert set(EXERCISED) == set(HOOKS)
    for name, function in HOOKS.items():
        assert function.__doc__ and inspect.cleandoc(function.__doc__).endswith("."), name
        assert any(f"def {name}(" in code for plugin, code in PLUGINS.items() if not plugin.startswith("x_")), name


def test_the_example_of_each_hook_does_what_it_says(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    (tmp_path / "plugins").mkdir()
    plugins = Path(shutil.copy(ROOT / "plugins/examples/_every_hook.py", tmp_path / "plugins/examples.py")).parent
    service = make_service("--plugins", str(plugins), "--log-level", "info")
    (repository / "issues").mkdir()
    (repository / "issues/issue-1.md").write_text("Cookies are lost.")
    client = service.client()
    assert client.get("/api/greet/ada").json() == {"hello": "ada"}
    assert client.get("/status").headers["X-Checksum"] and "a request comes" in service.log
    assert "security-auditor" not in str(client.store(issue="issue-1")["next_agents"])
    context = client.get("/api/context/issue-1/translator", task="src/main.py", max_bytes=5000).json()
    assert context["context"]["release"] == {"frozen": True} and context["context"]["metadata"]["index"] == "building"
    brief = client.request("GET", "/api/context/issue-1/translator", headers={"Accept": "text/markdown"}).text
    assert brief.startswith("# issue-1\n\nYou may: read_context, ")
    assert client.publish("noted")["published"] is True
    (repository / "FROZEN").touch()
    assert "frozen" in client.post("/api/events/noted", {}).json()["message"]
    plugin = next(row for row in client.get("/api/plugins").json()["plugins"] if row["name"] == "examples")
    assert (plugin["hooks"], plugin["failures"], plugin["problem"]) == (sorted(EXERCISED), 0, None)
    assert run("greet", "--plugins", str(plugins), cwd=repository).stdout == "hello\n"
    assert service.stop() == 0 and "stopped" in service.log and "plugin examples" not in service.log
    assert f"the state lies in {service.storage}" in service.log
    assert list(service.storage.parent.rglob("jwt.secret")) == [service.storage / "jwt.secret"]


# -- what a bad plugin cannot do


def test_plugins_that_raise_or_answer_nonsense_are_logged_and_the_service_is_healthy(plugged: Service) -> None:
    client = plugged.client()
    assert client.get("/health").json()["status"] == "healthy"
    client.store(issue="logged-1")
    client.get("/api/context/logged-1/python-specialist")
    raising = (
        "register_agent_types context_section rank_files next_agents result_stored part_class startup event_published"
    )
    for hook in raising.split():  # observers are told in a thread of their own
        until(lambda hook=hook: f"plugin x_raising: {hook}: " in plugged.log)
    for hook in "register_agent_types context_section rank_files next_agents part_class register_routes".split():
        assert f"plugin x_nonsense: {hook}: " in plugged.log, hook


@pytest.mark.parametrize("table", [{"x": "wizard"}, {"a..b": "qa"}, {"x": None}, ["x"], "x"], ids=str)
def test_agent_types_that_are_none_are_logged_and_passed_over_by_the_core_too(
    table: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Ours:
        @cco_sidecar.hookimpl
        def register_agent_types(self) -> Any:
            return table

    hooks = cco_sidecar.Hooks([cco_sidecar.ReferenceRules()])
    hooks.register(Ours(), "ours")
    settings = cco_sidecar.load_settings({"root": str(ROOT)}, {})
    types = cco_sidecar.AgentTypes(hooks, settings).categories
    assert "plugin ours: register_agent_types: " in caplog.text
    assert types["qa-engineer"] == "qa" and not {"x", "a..b"} & types.keys()


NONSENSE = {  # what no JSON says, as the body of a function
    "cyclic": "x = []; x.append(x); return x",
    "cyclic_through_two": "x = {}; x['y'] = [{'x': x}]; return x",
    "deep": "x = []\nfor _ in range(200_000): x = [x]\nreturn x",
    "just_too_deep": """import msgspec
def nested(number):
    x = 1
    for _ in range(number): x = {'x': x}
    return x
def fits(number):
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(nested(number))))
    except RecursionError:
        return False
least, most = 1, 200_000
while most - least > 1:
    middle = (least + most) // 2
    least, most = (middle, most) if fits(middle) else (least, middle)
return nested(least - 60)""",
    "none_as_key": "return {None: 1}",
    "tuples_as_keys": "return {(1, 2): 1}",
    "digits": "return 10 ** 5000",
    "surrogate": r"return 'caf\ud800'",
    "surrogate_as_key": r"return {'\ud800': 1}",
    "generator": "return (number for number in range(3))",
    "function": "return print",
    "complex": "return 1j",
    "iterates_badly": "class X:\n def __iter__(self): raise SystemExit\nreturn X()",
    "shown_badly": "class X:\n def __repr__(self): raise MemoryError\n __str__ = __repr__\nreturn X()",
    "equal_to_nothing": "class X:\n def __eq__(self, other):\n  while True: pass\n __hash__ = None\nreturn X()",
    "half_json": "import msgspec\nreturn msgspec.Raw(b'{nonsense')",
    "exits": "raise SystemExit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "leaves": "raise GeneratorExit",
    "recurses": "def again(): return again()\nagain()",
    "no_memory": "raise MemoryError",
    "own": "class Own(BaseException):\n def __str__(self): raise SystemExit\nraise Own",
}
EVERYWHERE = """
    from cco_sidecar import *

    def value():
{body}

    @hookimpl
    def context_section(request):
        return {{"{name}": value()}}

    @hookimpl
    def resolve_issue(issue_id):
        return {{"title": value()}}

    @hookimpl
    def rank_files(request):
        return [RankedFile(value(), 1.0)]

    @hookimpl
    def index_state():
        return {{"state": value()}}

    @hookimpl
    def next_agents(proposals):
        return [*proposals, NextAgent("technical-writer", "low", value())]

    @hookimpl
    def agent_command(launch):
        return ["true", value()]

    @hookimpl
    def permission_policy(claims):
        if claims.sub == "{name}":
            return value()
"""


def test_what_no_json_says_costs_a_plugin_its_own_contribution_and_one_line(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    plugins = {
        name: EVERYWHERE.format(name=name, body=textwrap.indent(body.replace("; ", "\n"), " " * 8))
        for name, body in NONSENSE.items()
    }
    plugins["large"] = "@hookimpl\ndef context_section(request):\n    return {'large': ['x' * 1000] * 12_000}"
    plugins["large_facts"] = plugins["large"].replace("'large'", "'metadata'").replace("['x'", "{'x': ['x'").replace(
        "12_000}", "12_000}}"
    )  # fmt: skip
    plugins["fine"] = (
        "@hookimpl\ndef context_section(request):\n    return {'fine': {1: {2}, 'n': float('nan'), 'b': b'x'}}"
    )
    command = ("--agent-command", json.dumps([sys.executable, "-c", "print('configured')"]))
    service = make_service("--plugins", str(write_plugins(tmp_path / "more", plugins)), *command)
    client = service.client()
    answer = client.get("/api/context/issue-1/python-specialist", timeout=60)
    assert answer.status_code == 200, answer.text
    for name in plugins.keys() - {"fine"}:
        assert service.log.count(f"plugin {name}: context_section: ") == 1, name
    context = answer.json()["context"]
    assert context["fine"] == {"1": [2], "n": None, "b": "eA=="} and context["relevant_files"]
    assert not set(context) & {*NONSENSE, "large"} and "x" not in context["metadata"]
    assert client.store(issue="issue-2")["next_agents"][-1]["agent_type"] == "security-auditor"
    spawned = client.post("/api/agents/spawn", {"agent_type": "chief-architect", "issue_id": "issue-1"}, timeout=60)
    assert spawned.status_code == 201, spawned.text
    for name in ("cyclic", "surrogate", "exits"):
        refused = service.client(sub=name).get("/api/results")
        assert refused.status_code == 403 and f"{name} could not decide" in refused.json()["message"]
    for name in NONSENSE:
        for hook in ("resolve_issue", "rank_files", "next_agents", "agent_command"):
            assert f"plugin {name}: {hook}: " in service.log, (name, hook)
    assert "Traceback" not in service.log and client.get("/health").json()["status"] == "healthy"


def test_a_ranking_is_as_long_as_the_project_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hooks, "TIMEOUT", 60.0)  # reading it takes half a second of processor time
    chunks, reasons = [(51 * number, 1.5) for number in range(5)], ["text matches greet", "changed recently"]
    ranked = [cco_sidecar.RankedFile(f"src/\udcff{number}.py", 1.0, reasons, chunks) for number in range(40_000)]

    class Ours:
        @cco_sidecar.hookimpl
        def rank_files(self) -> list[cco_sidecar.RankedFile]:
            return ranked

    for kind in (cco_sidecar.Hooks, Hooks):
        hooks = kind([])
        hooks.register(Ours(), "ours")
        assert hooks.first("rank_files") == ranked


def test_a_part_that_is_long_in_the_making_is_named_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"
    code = f"    import os, time\n    while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n    raise KeyboardInterrupt"
    hooks = hooks_of(tmp_path, slow=f"@hookimpl\ndef part_class(settings):\n{code}")
    monkeypatch.setattr(Hooks, "TIMEOUT", 0.05)
    with ThreadPoolExecutor(1) as threads:
        part = threads.submit(hooks.part, Storage, None)
        try:
            until(lambda: caplog.messages.count("plugin slow: part_class: no answer yet, which is waited for") > 1)
        finally:
            gate.touch()
        assert part.result(5) is Storage
    assert caplog.messages[-1] == "plugin slow: part_class: KeyboardInterrupt (slow.py:7)"


def test_no_answer_is_no_fault_of_any_hook(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = hooks_of(tmp_path, silent="\n".join(f"@hookimpl\ndef {name}(): pass" for name in HOOKS))
    for name in HOOKS:
        assert list(hooks.ask(name)) == []
    assert hooks.refusal() is None
    said = "plugin silent: part_class gave no class for any part"  # which is a hint, not a fault
    assert [message.partition(";")[0] for message in caplog.messages] == [said]
    assert not any(plugin.problem or plugin.failure for plugin in hooks.loaded)


def test_many_calls_at_once_are_no_hanging_plugin(tmp_path: Path) -> None:
    hooks = hooks_of(tmp_path, slow="@hookimpl\ndef permission_policy():\n    import time\n    time.sleep(0.2)")
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(hooks.refusal, claims=None, permission=None, method="", path="") for _ in range(24)]
        assert {future.result() for future in asked} == {None}


INTRUDERS = {
    "sleeps": "import time\ntime.sleep(600)",
    "replaces": "import sys\nsys.stdout = sys.stderr = None",
    "handles": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "exits": "import sys\nsys.exit(0)",
    "interrupts": "raise KeyboardInterrupt",
}


def test_an_import_that_blocks_or_changes_the_process_costs_the_plugin_alone(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    hook = "\n@hookimpl\ndef context_section(request):\n    return {__name__.rpartition('.')[2]: 1}"
    plugins = write_plugins(tmp_path / "more", {name: code + hook for name, code in INTRUDERS.items()})
    service = make_service("--plugins", str(plugins))
    context = service.client().get("/api/context/issue-1/python-specialist").json()["context"]
    assert context.keys() & INTRUDERS.keys() == {"replaces"}
    for name in INTRUDERS.keys() - context.keys():
        assert service.log.count(f"plugin {name} is skipped: ") == 1, name
    assert service.stop() == 0


@pytest.mark.parametrize(
    "code", ["threading.Event().wait()", "os.read(os.pipe()[0], 1)", "while time.monotonic() < end: pass"]
)
def test_an_import_that_does_not_end_is_given_up_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    monkeypatch.setattr(Hooks, "TIMEOUT", 2.0)  # which is enough for the other one beside a busy thread
    code = f"import os, threading, time\nend = time.monotonic() + 5\n{code}"
    hooks = hooks_of(tmp_path, blocked=code, other="@hookimpl\ndef shutdown(info):\n    return 1")
    problem = "TimeoutError: its import has not ended within 2 s"
    assert [plugin.problem for plugin in hooks.loaded] == [problem, None] and hooks.faults() == []
    assert caplog.messages == [f"plugin blocked is skipped: {problem}"]
    assert list(hooks.ask("shutdown", info=None)) == [("other", 1)]


def test_a_plugin_that_cannot_be_loaded_is_named_and_skipped(plugged: Service) -> None:
    banner = until(lambda: plugged.log if "Stop:" in plugged.log else "")
    assert "Skipped:  x_broken (SyntaxError: invalid syntax (x_broken.py:3))" in banner
    assert "Skipped:  x_exits (SystemExit: 3 (x_exits.py:3))" in banner
    listed = run("plugins", "--plugins", str(plugged.arguments[1]), "--format", "json", cwd=plugged.root)
    rows = {row["plugin"]: row for row in json.loads(listed.stdout)["plugins"]}
    assert set(rows) >= {*PLUGINS, "house_rules", "built-in:ReferenceRules"}
    assert rows["x_broken"]["problem"].startswith("SyntaxError") and rows["x_broken"]["hooks"] == ""
    assert rows["observer"] == {
        "plugin": "observer", "source": str(Path(plugged.arguments[1]) / "observer.py"), "problem": None,
        "hooks": "agent_ended agent_starting event_published result_stored shutdown startup",
    }  # fmt: skip


HOOK_IS_PLAIN = "a hook is a plain function that returns its answer; it runs in a thread and may block"
FAULTS = {
    "def context_sektion(request): pass": "there is no hook 'context_sektion', did you mean context_section?",
    "def on_result_stored(result): pass": "there is no hook 'on_result_stored', did you mean result_stored?",
    "def xyz(): pass": "there is no hook 'xyz'",
    "def context_section(req): pass": "context_section takes request; it has no argument 'req', did you mean request?",
    "def startup(inpho): pass": "startup takes info; it has no argument 'inpho', did you mean info?",
    "def next_agents(result, proposal: list): pass":
        "next_agents takes result, proposals, history, language, submission, settings; it has no argument 'proposal', did you mean proposals?",
    "def register_routes(application): pass": "register_routes takes nothing; it has no argument 'application'",
    "def startup(**facts): pass": "startup takes info; it has no argument '**facts'",
    "def startup(*facts): pass": "startup takes info; it has no argument '*facts'",
    "def startup(*, context): pass": "startup takes info; it has no argument 'context'",
    "async def startup(info): pass": f"startup is async: {HOOK_IS_PLAIN}",
    "async def next_agents(proposals): yield 1": f"next_agents is async: {HOOK_IS_PLAIN}",
    "def result_stored(result): yield": f"result_stored yields: {HOOK_IS_PLAIN}",
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS)
def test_an_author_hears_what_is_wrong_with_a_hook_and_nothing_of_the_plugin_is_used(tmp_path: Path, code: str) -> None:
    good = "@hookimpl\ndef shutdown(info):\n    return 1\n"
    hooks = hooks_of(tmp_path, faulty=f"{good}@hookimpl\n{code}", other=good)
    assert hooks.faults() == [f"plugin faulty: {FAULTS[code]}"]
    assert list(hooks.ask("shutdown", info=None)) == [("other", 1)]


@pytest.mark.parametrize(
    "code",
    [
        "def next_agents(proposals, _seen=[]):\n    return proposals",
        "def next_agents(*, proposals, language='none'):\n    return [*proposals, cco_sidecar.NextAgent('a', 'low', language)]",
        "def next_agents(proposals=None, result=None):\n    return [*proposals, cco_sidecar.NextAgent('a', 'low', result)]",
        "def anything(proposals):\n    return proposals\nanything = hookimpl(specname='next_agents')(anything)",
    ],
)
def test_a_hook_gets_what_it_names_however_it_takes_it(tmp_path: Path, code: str) -> None:
    hooks = hooks_of(tmp_path, good=f"{'' if 'specname' in code else '@hookimpl'}\n{code}")
    assert hooks.faults() == []
    first, facts = NextAgent("first", "low", "P"), {"history": [], "language": "L", "submission": {}}
    answer = next(hooks.ask("next_agents", result="R", proposals=[first], **facts))[1]
    assert [item.reason for item in answer] in (["P"], ["P", "L"], ["P", "R"])


@pytest.mark.parametrize(
    "code", [next(iter(FAULTS)), "def context_section(req): pass", "async def startup(info): pass"]
)
def test_a_faulty_plugin_stops_the_start_with_one_line(repository: Path, tmp_path: Path, code: str) -> None:
    plugins = write_plugins(tmp_path / "plugins", {"faulty": f"@hookimpl\n{code}"})
    ended = run("--plugins", str(plugins), "--storage", str(tmp_path / "storage"), cwd=repository)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"cco: plugin faulty: {FAULTS[code]}\n")
    assert not (tmp_path / "storage").exists()


PARTS = (
    cco_sidecar.Agents, cco_sidecar.AgentTypes, cco_sidecar.Contexts, cco_sidecar.Endpoint, cco_sidecar.EventBus,
    cco_sidecar.Launcher, cco_sidecar.Processes, cco_sidecar.Project, cco_sidecar.Records, cco_sidecar.Results,
    cco_sidecar.Server, cco_sidecar.Storage, cco_sidecar.Tokens,
)  # fmt: skip


def private_names(derived: type) -> set[str]:
    """The private attributes that a class itself sets, on itself or on its objects."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(derived))).body
    assert isinstance(node, ast.ClassDef)
    on_class = {place.id for each in node.body for place in places_of(each) if isinstance(place, ast.Name)}
    assigned = [place for each in ast.walk(node) for place in places_of(each) if isinstance(place, ast.Attribute)]
    on_objects = {place.attr for place in assigned if ast.unparse(place.value) == "self"}
    return {name for name in on_class | on_objects if re.match("_[a-z]", name)}


def places_of(node: ast.AST) -> list[ast.expr]:
    """What a statement gives a value."""
    if isinstance(node, ast.AnnAssign):
        return [node.target] if node.value else []
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [place for target in targets for place in getattr(target, "elts", [target])]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_no_two_plugins_keep_different_things_of_a_part_under_one_name(part: type, tmp_path: Path) -> None:
    """They derive one class, each without a look at the others."""
    options = {"backend": "nats://127.0.0.1:1", "tls_cert": "x", "tls_key": "x", "storage": str(tmp_path)}
    settings = cco_sidecar.load_settings(options, {})
    whole = cco_sidecar.load_hooks(settings).part(part, settings)
    written = [each for each in whole.__mro__ if vars(sys.modules[each.__module__]).get(each.__qualname__) is each]
    names = {each: private_names(each) for each in written if each.__module__ not in ("builtins", "cco_sidecar")}
    for one, other in itertools.combinations(names, 2):
        if not issubclass(one, other) and not issubclass(other, one):
            assert not names[one] & names[other], (one, other)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return None", ""),
        ("return 5", "part_class: TypeError: a class is wanted, or None, and int was returned (odd.py:3)"),
        ("return dict", "part_class: TypeError: dict is not derived from Storage (odd.py:3)"),
        ("raise ValueError('no disk')", "part_class: ValueError: no disk (odd.py:5)"),
        ("raise SystemError", "part_class: SystemError (odd.py:5)"),
    ],
)
def test_a_part_that_cannot_be_made_leaves_the_cores_own_in_place_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, said: str
) -> None:
    hooks = hooks_of(tmp_path, odd=f"@hookimpl\ndef part_class():\n    {code}")
    caplog.set_level("WARNING", "cco")
    for base in (Storage, cco_sidecar.EventBus, cco_sidecar.Endpoint):
        assert hooks.part(base, None) is base
    assert caplog.messages == ([f"plugin odd: {said}"] if said else [])


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("base.__name__ == 'Eventbus'", True),
        ("base.__qualname__ == 'Event Bus'", True),
        ("base is dict", True),
        ("None", True),
        ("issubclass(base, EventBus)", False),
        ("issubclass(base, (Launcher, Processes))", False),
        ("base / 2", False),  # is told as a failure
    ],
)
def test_a_plugin_that_had_no_class_for_any_part_is_named_at_the_start(
    make_service: Callable[..., Service], tmp_path: Path, check: str, said: bool
) -> None:
    code = f"@hookimpl\ndef part_class(base):\n    return type('Mine', (base,), {{}}) if {check} else None"
    names = "from cco_sidecar import EventBus, Launcher, Processes\n"
    service = make_service("--plugins", str(write_plugins(tmp_path / "own", {"own": names + code})))
    assert service.stop() == 0
    assert ("plugin own: part_class gave no class for any part; " in service.log) is said
    assert ("plugin own: part_class: TypeError" in service.log) is ("/" in check)


def test_a_part_stops_the_start_with_a_line_of_its_own(tmp_path: Path, repository: Path) -> None:
    code = "@hookimpl\ndef part_class():\n    raise cco_sidecar.StartError('the cluster is not reachable')"
    plugins = write_plugins(tmp_path / "plugins", {"cluster": code})
    ended = run("--plugins", str(plugins), "--storage", str(tmp_path / "storage"), "--port", "0", cwd=repository)
    assert (ended.returncode, ended.stderr) == (2, "cco: the cluster is not reachable\n")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("nowhere", "cco.toml:1: plugins: {}/nowhere is not a folder"),
        ("misspelt", "there is no hook 'startupp', did you mean startup?"),
        ("argument", "startup takes info; it has no argument 'x'"),
    ],
)
def test_a_faulty_plugin_in_the_settings_stops_no_command_but_the_start(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service], setting: str, problem: str
) -> None:
    write_plugins(tmp_path / "misspelt", {"misspelt": "@hookimpl\ndef startupp(info): pass"})
    write_plugins(tmp_path / "argument", {"argument": "@hookimpl\ndef startup(x): pass"})
    service = make_service()
    (repository / "cco.toml").write_text(
        f'plugins = ["{tmp_path / setting}"]\nstorage = "{service.storage}"\nproject = "{PROJECT}"\n'
    )
    problem = problem.format(tmp_path)
    for words in (
        ["results", "list"],
        ["status"],
        ["token", "--type", "qa-engineer"],
        ["agent", "types"],
        ["plugins"],
        ["--help"],
        ["health"],
    ):
        ended = run(*words, cwd=repository)
        warned = ["", f"plugin {setting}: {problem}\n"]
        assert ended.returncode == 0 and ended.stdout and ended.stderr in warned, (words, ended.stderr)
        if words[0] == "token":
            assert (
                service.client()
                .request("GET", "/status", headers={"Authorization": f"Bearer {ended.stdout.strip()}"})
                .ok
            )
    assert problem not in run("plugins", cwd=repository).stdout  # of the service that runs
    assert service.stop() == 0
    listed = run("plugins", cwd=repository)
    assert (listed.returncode, listed.stderr) == (0, "") and problem in listed.stdout
    started = run(cwd=repository)
    assert (started.returncode, started.stderr) == (2, f"cco: plugin {setting}: {problem}\n")


def unloadable(folder: Path) -> dict[str, str]:
    """Writes files that are no plugins; what is said of each."""
    folder.mkdir()
    texts = {
        "exits": "import sys\nsys.exit('enough')",
        "exits_well": "raise SystemExit",
        "broken": "x = 1\n\ndef f(:\n",
        "indented": "if True:\nx = 1\n",
        "raises": "def deep():\n    raise KeyError('a\\nb')\ndeep()\n",
        "lacking": "import a_package_that_nobody_has\n",
        "needy": "raise ImportError('it needs a compiler')\n",
        "reads": "open('/nowhere/at/all')\n",
        "mute": "class Bad(Exception):\n    def __str__(self):\n        raise ValueError('x')\nraise Bad",
        "leaves": "raise GeneratorExit",
        "interrupts": "raise KeyboardInterrupt",
        "asks": "def ask():\n    raise KeyboardInterrupt('no terminal')\nask()\n",
        "aborts": "class Abort(KeyboardInterrupt):\n    pass\n\nraise Abort('by the user')\n",
        "unmarked": "def startup(info):\n    return 1\n",
        "empty": "",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "nul.py").write_bytes(b"x = 1\n\0\n")
    (folder / "latin.py").write_bytes("x = 'h\u00e9'\n".encode("latin-1"))
    (folder / "folder.py").mkdir()
    (folder / "gone.py").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.py")
    no_hook = "it has no hook: @hookimpl marks them; the name of a file that only helps begins with _"
    return {
        "exits": "SystemExit: enough (exits.py:2)", "exits_well": "SystemExit (exits_well.py:1)",
        "broken": "SyntaxError: invalid syntax (broken.py:3)",
        "indented": "IndentationError: expected an indented block after 'if' statement on line 1 (indented.py:2)",
        "raises": "KeyError: 'a\\nb' (raises.py:2)", "lacking": "ModuleNotFoundError: No module named 'a_package_that_nobody_has' (lacking.py:1)",
        "needy": "it needs a compiler", "reads": "FileNotFoundError: No such file or directory (reads.py:1)",
        "mute": "Bad: its message cannot be had (ValueError) (mute.py:4)", "leaves": "GeneratorExit (leaves.py:1)",
        "interrupts": "KeyboardInterrupt (interrupts.py:1)", "asks": "KeyboardInterrupt: no terminal (asks.py:2)",
        "aborts": "Abort: by the user (aborts.py:4)",
        "unmarked": no_hook, "empty": no_hook,
        "nul": "source code string cannot contain null bytes", "latin": "xe9",
        "folder": "it is no file", "gone": "it is not there", "pipe": "it is no file",
    }  # fmt: skip


def test_ctrl_c_during_an_import_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    command = [sys.executable, str(MODULE), "plugins", "--root", str(tmp_path), "--plugins", str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.parametrize(("words", "hook"), [
    ("token --type python-specialist", "register_agent_types"),
    ("token --type python-specialist", "part_class"),
    ("agent types", "register_agent_types"),
])  # fmt: skip
def test_ctrl_c_while_a_plugin_is_asked_ends_the_command(
    tmp_path: Path, repository: Path, words: str, hook: str
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nfrom cco_sidecar import hookimpl\n@hookimpl\n"
        f"def {hook}():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    storage = ["--storage", str(tmp_path / "storage"), "--plugins", str(tmp_path)]
    command = [sys.executable, str(MODULE), *words.split(), *storage]
    ended = subprocess.run(command, cwd=repository, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_what_cannot_be_loaded_is_one_line_without_a_path_and_the_others_are_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "cco")
    wanted = unloadable(tmp_path / "plugins")
    (tmp_path / "plugins" / "_helper.py").write_text("raise SystemExit('never imported')")
    (tmp_path / "plugins" / "zz_good.py").write_text(
        "from cco_sidecar import hookimpl\n@hookimpl\ndef startup(info):\n    return info"
    )
    hooks = Hooks([])
    hooks.load_folders([tmp_path / "plugins"])
    said = {plugin.name: plugin.problem for plugin in hooks.loaded}
    assert {name: said[name] for name, problem in wanted.items() if problem not in str(said[name])} == {}
    assert said["zz_good"] is None and "_helper" not in said and hooks.faults() == []
    assert [
        text for text in [*map(str, said.values()), *caplog.messages] if "\n" in text or str(tmp_path) in text
    ] == []
    assert list(hooks.ask("startup", info=1)) == [("zz_good", 1)]


def test_in_the_folder_beside_the_module_only_files_that_speak_of_us_are_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Hooks.__module__], "bundled_folder", lambda: tmp_path / "plugins")
    unloadable(tmp_path / "plugins")
    write_plugins(tmp_path / "plugins/room", {"ours": "", "_helper": ""})
    (tmp_path / "plugins/ours.py").write_text("import cco_sidecar\n")
    found = [path.relative_to(tmp_path).as_posix() for path in bundled_plugins()]
    assert found == ["plugins/ours.py", "plugins/room/ours.py"]


@pytest.mark.parametrize(
    "code",
    [
        "print('hello')",
        "import io, sys\nsys.stdout = sys.stderr = io.StringIO()",
        "import sys\nsys.stdout = None",
        "import sys\nsys.stdout.write('x' * 100_000)\nsys.exit(0)",
    ],
)
def test_what_a_plugin_does_to_standard_output_when_it_is_imported_reaches_nobody(
    repository: Path, tmp_path: Path, code: str
) -> None:
    plugins = write_plugins(tmp_path / "plugins", {"noisy": f"{code}\n@hookimpl\ndef startup(info): pass"})
    words = ["--plugins", str(plugins), "--storage", str(tmp_path / "storage")]
    assert re.fullmatch(
        r"[\w-]+\.[\w-]+\.[\w-]+\n", run("token", "--type", "qa-engineer", *words, cwd=repository).stdout
    )
    listed = run("plugins", "--format", "json", *words, cwd=repository)
    row = next(row for row in json.loads(listed.stdout)["plugins"] if row["plugin"] == "noisy")
    assert row["hooks"] == ("" if "exit" in code else "startup")


FAILING = """
    def deeper(info):
        return {}[info]

    @hookimpl
    def startup(info):
        import json
        if info == 1:
            json.loads("no")
        return deeper(info)

    @hookimpl
    def permission_policy(claims):
        raise SystemExit(5)
"""


def test_a_failing_hook_is_logged_with_its_own_line_and_the_traceback_at_debug(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = hooks_of(tmp_path, failing=FAILING)
    caplog.set_level("DEBUG", "cco")
    for number in (1, 2):
        assert list(hooks.ask("startup", info=number)) == []
    assert hooks.refusal(claims=None, permission=None, method="GET", path="/")
    lines = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in lines] == [
        "plugin failing: startup: JSONDecodeError: Expecting value: line 1 column 1 (char 0) (failing.py:11)",
        "plugin failing: startup: KeyError: 2 (failing.py:5)",
        "plugin failing: permission_policy: SystemExit: 5 (failing.py:16)",
    ]
    assert not any(record.exc_info for record in lines)
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "DEBUG"] == [True] * 3
    assert [(plugin.failures, plugin.failure) for plugin in hooks.loaded] == [
        (3, lines[-1].getMessage().removeprefix("plugin failing: "))
    ]


@pytest.mark.parametrize("raised", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("kind", [cco_sidecar.Hooks, Hooks], ids=["alone", "with plugins"])
def test_a_plugin_that_raises_what_is_no_exception_ends_no_thread(kind: Any, raised: type[BaseException]) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Bad:
        @cco_sidecar.hookimpl
        def next_agents(self) -> None:
            raise raised

        @cco_sidecar.hookimpl
        def permission_policy(self) -> None:
            raise raised

        @cco_sidecar.hookimpl
        def result_stored(self) -> None:
            raise raised

    class Good:
        @cco_sidecar.hookimpl
        def result_stored(self, result: dict[str, str]) -> None:
            told.put(result["id"])

    hooks = kind([])
    for plugin in (Good(), Bad()):
        hooks.register(plugin, type(plugin).__name__)
    assert list(hooks.ask("next_agents")) == []
    assert hooks.refusal() == "the policy Bad could not decide; the service logged why"
    for name in ("one", "two"):
        hooks.tell("result_stored", result={"id": name})
    assert [told.get(timeout=15), told.get(timeout=15)] == ["one", "two"]


DECIDES = {"no plain data": object(), "a number": 3, "a list": [True], "no": False}


@pytest.mark.parametrize("verdict", DECIDES.values(), ids=DECIDES)
def test_alone_a_policy_that_answers_no_text_refuses(verdict: object) -> None:
    class Odd:
        @cco_sidecar.hookimpl
        def permission_policy(self) -> object:
            return verdict

    hooks = cco_sidecar.Hooks([])
    hooks.register(Odd(), "Odd")
    undecided = "the policy Odd could not decide; the service logged why"
    assert hooks.refusal() == ("the policy Odd refuses" if verdict is False else undecided)


UNFIT = {  # answers that are of no use, by hook
    "next_agents": [
        [NextAgent(5, "low", "x")],  # type: ignore[arg-type]
        [NextAgent("qa-engineer", "at once", "x")],  # type: ignore[arg-type]
        [NextAgent("qa-engineer", "low", "caf\ud800")],
        [{"agent_type": "qa-engineer"}],
        "qa-engineer",
    ],
    "rank_files": [
        [cco_sidecar.RankedFile("a.py", "best")],  # type: ignore[arg-type]
        [cco_sidecar.RankedFile("a.py", 1.0, [5])],  # type: ignore[list-item]
        [cco_sidecar.RankedFile("a.py", 1.0, ["caf\ud800"])],
        ["a.py"],
        3,
    ],
    "agent_command": [
        *("true", ["true", 5], [], ["tr\0ue"], ["caf\ud800"]),
        cco_sidecar.AgentCommand(["true"], stdin=5),  # type: ignore[arg-type]
        cco_sidecar.AgentCommand(["true"], stdin="nul\0"),
        *(cco_sidecar.AgentCommand(["true"], environment=given) for given in ({"A": "nul\0"}, {"A=B": ""}, {"": ""})),
    ],
    "context_section": [{"x": object()}, {"x": "caf\ud800"}, ["x"], {(1, 2): 1}],
}


@pytest.mark.parametrize("kind", [cco_sidecar.Hooks, Hooks], ids=["alone", "with plugins"])
@pytest.mark.parametrize("hook", UNFIT)
def test_an_answer_of_another_type_is_logged_and_passed_over(
    hook: str, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter(UNFIT[hook])
    hooks = kind([])
    hooks.register(types.SimpleNamespace(**{hook: cco_sidecar.hookimpl(lambda: next(answers))}), "odd")
    for answer in UNFIT[hook]:
        caplog.clear()
        assert hooks.first(hook) is None, answer
        assert caplog.text.count(f"plugin odd: {hook}: ") == 1, answer


def test_alone_no_plugins_nonsense_fails_a_request(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    code = """
        from cco_sidecar import *

        @hookimpl
        def next_agents(proposals):
            return [NextAgent(None, 5, {})]

        @hookimpl
        def rank_files(request):
            return [RankedFile(file.path, "best") for file in request.files]

        @hookimpl
        def agent_command(launch):
            return [5]
    """
    alone = tmp_path / "alone"
    (alone / "plugins").mkdir(parents=True)
    module = shutil.copy(MODULE, alone)
    configured = json.dumps([sys.executable, "-c", "print('configured')"])
    arguments = ("--plugins", str(write_plugins(tmp_path / "more", {"odd": code})), "--agent-command", configured)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "module", Path(module))
        patch.setattr(Service, "without", frozenset({"--no-watch"}))
        service = make_service(*arguments)
    client = service.client()
    assert client.store(issue="odd-1")["next_agents"]
    context = client.get("/api/context/odd-1/python-specialist")
    assert context.status_code == 200 and context.json()["context"]["relevant_files"], context.text
    spawned = client.post("/api/agents/spawn", {"agent_type": "chief-architect", "issue_id": "odd-1"})
    assert spawned.status_code == 201, spawned.text
    for hook in ("next_agents", "rank_files", "agent_command"):
        assert f"plugin odd: {hook}: ValidationError: " in service.log, service.log
    assert "Traceback" not in service.log


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_policies_that_hang_refuse_and_the_log_says_so(calls: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each has an end of its own with plugins; without them the requests wait no longer than for any plugin."""
    hang = threading.Event()

    class Hanging:
        @cco_sidecar.hookimpl
        def permission_policy(self) -> None:
            hang.wait(60)

    async def ask() -> list[BaseException | None]:
        hooks = cco_sidecar.Hooks([])
        hooks.register(Hanging(), "hanging")
        hooks.pool = cco_sidecar.Pool("asks", 2, 0.1)
        request = types.SimpleNamespace(method="GET", path="/status")
        sidecar = types.SimpleNamespace(hooks=hooks)
        facts = {"permission": None, "request": request, "request_id": "req-1", "claims": None, "sidecar": sidecar}
        endpoint: Any = types.SimpleNamespace(**facts)
        checks = (cco_sidecar.check_policies(endpoint) for _ in range(calls))
        return await asyncio.gather(*checks, return_exceptions=True)

    try:
        refusals: list[Any] = asyncio.run(ask())
    finally:
        hang.set()
    assert [(error.code, error.status) for error in refusals] == [("AUTH_003", 403)] * calls
    assert all("not decided in time" in error.message for error in refusals)
    assert caplog.text.count("req-1: the policies have not decided in time") == calls


@pytest.mark.parametrize("category", ["codingg", "Coding", ""])
def test_a_category_that_there_is_not_is_told_with_those_that_there_are(
    tmp_path: Path, repository: Path, caplog: pytest.LogCaptureFixture, category: str
) -> None:
    code = f"@hookimpl\ndef register_agent_types():\n    return {{'coyote': {category!r}}}"
    folder = write_plugins(tmp_path / "plugins", {"ours": code})
    settings = cco_sidecar.load_settings({"root": str(repository), "plugins": [str(folder)]}, {})
    cco_sidecar.AgentTypes(cco_sidecar.load_hooks(settings), settings)
    assert f"plugin ours: register_agent_types: ValidationError: {category!r} is none of " in caplog.text
    assert all(name in caplog.text for name in cco_sidecar.CATEGORIES) and "Invalid enum" not in caplog.text


def test_plugins_shows_what_the_running_service_loaded_and_what_failed_there(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    code = "@hookimpl\ndef register_agent_types():\n    raise ValueError('out of types')"
    folder = write_plugins(tmp_path / "plugins", {"good": PLUGINS["routing"], "failing": code, "broken": "def ("})
    service = make_service("--plugins", str(folder))
    (folder / "good.py").unlink()
    write_plugins(tmp_path / "later", {"later": PLUGINS["routing"]})
    where = ["--storage", str(service.storage), "--project", PROJECT]

    def rows(*words: str) -> tuple[str, dict[str, Any]]:
        listed = run("plugins", *where, *words, "--format", "json", cwd=repository)
        assert (listed.returncode, listed.stderr) == (0, "")
        answer = json.loads(listed.stdout)
        return answer["of"], {row["plugin"]: row["problem"] for row in answer["plugins"]}

    assert rows()[1]["plugin_list"] is None  # by which they are listed

    whose, found = rows()
    assert whose == f"of the service that runs on {service.url}"
    assert found["good"] is None and found["http2"] is None and "later" not in found
    assert found["failing"] == "register_agent_types: ValueError: out of types (failing.py:5)"
    assert found["broken"] == "SyntaxError: invalid syntax (broken.py:3)"
    assert run("plugins", *where, cwd=repository).stdout.endswith(
        f"\n(the plugins of the service that runs on {service.url})\n"
    )
    assert list(found)[:3] == ["broken", "failing", "good"]  # one's own come first
    whose, found = rows("--plugins", str(tmp_path / "later"))
    assert whose == "that the next start would load" and "later" in found and "good" not in found
    assert set(rows("--no-plugins")[1]) == {name for name in found if name.startswith("built-in:")}

    for kind, status in {"chief-architect": 200, "python-specialist": 403, "documentation-expert": 403}.items():
        assert service.client(kind, permissions=None if status == 200 else ["read_context"]).get(
            "/api/plugins"
        ).status_code in (status, 401)
    assert service.client("documentation-expert").get("/api/plugins").json()["code"] == "AUTH_003"
    service.kill()
    whose, found = rows()
    assert whose == "that the next start would load" and "failing" not in found
    refused = run("plugins", "--url", service.url, cwd=repository)
    assert refused.returncode == 3 and refused.stdout == ""


def test_the_example_of_the_readme_is_a_plugin_that_does_what_is_said(
    tmp_path: Path, repository: Path, make_service: Callable[..., Service]
) -> None:
    chapter = (ROOT / "README.md").read_text().partition("\n## Hooks\n")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", chapter, re.S)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "example.py").write_text(code)
    service = make_service("--plugins", str(tmp_path / "plugins"))
    client = service.client()
    proposed = client.store(issue="code-1")["next_agents"]
    assert {"security-auditor", "performance-engineer"} <= {item["agent_type"] for item in proposed}
    assert "security-auditor" not in str(client.store(issue="docs-1")["next_agents"])
    assert client.get("/api/context/code-1/python-specialist").json()["context"]["release"] == {
        "frozen": True,
        "branch": "main",
    }
    refused = service.client("operator").get("/api/plugins")
    assert refused.status_code == 403 and "only the architect starts and ends agents" in refused.json()["message"]
    assert service.client("operator").get("/api/agents").status_code == client.get("/api/plugins").status_code == 200


def test_the_example_of_routing_goes_by_what_the_agent_wrote(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    chapter = (ROOT / "plugins/README.md").read_text().partition("\n## Your own plugins\n")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", chapter, re.S)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "example.py").write_text(code)
    service = make_service("--plugins", str(tmp_path / "plugins"))
    again, routed = "coding-failure: another attempt", "house rule: a flaky test is the tester's"
    cases = {"flaky": (["the test is flaky"], routed), "other": (["x"], again), "none": ([], again)}
    for issue, (decisions, reason) in cases.items():
        stored = service.client().store(issue=issue, status="failed", decisions=decisions)
        assert [each["reason"] for each in stored["next_agents"]] == [reason], issue
    assert [each["reason"] for each in service.client().store(issue="absent", status="failed")["next_agents"]] == [
        again
    ]
    assert "plugin example" not in service.log


def test_the_chapter_on_your_own_plugins_names_every_hook() -> None:
    chapter = (ROOT / "plugins/README.md").read_text().partition("\n## Your own plugins\n")[2].partition("\n## ")[0]
    assert {name for name in EXERCISED if f"`{name}`" not in chapter} == set()


def test_the_example_of_every_hook_has_all_its_arguments() -> None:
    module = cco_sidecar.import_file(ROOT / "plugins/examples/_every_hook.py")
    for name, spec in Hooks.SPECS.items():
        shown, wanted = (inspect.signature(one).parameters for one in (getattr(module, name), spec))
        assert list(shown) == list(wanted)[1:], name


def test_the_manual_of_hooks_has_every_argument_and_the_fields_of_what_hooks_get(tmp_path: Path) -> None:
    printed = run("plugins", "--hooks", cwd=tmp_path).stdout
    for name, spec in Hooks.SPECS.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}("))
        assert all(f"{each}: " in line for each in list(inspect.signature(spec).parameters)[1:]), line
    for kind in (cco_sidecar.Claims, cco_sidecar.ContextRequest, cco_sidecar.NextAgent, cco_sidecar.AgentLaunch):
        fields = printed.partition(f"\n{kind.__name__}: ")[2].partition("\n\n")[0]
        assert [line.partition(":")[0].strip() for line in fields.splitlines()[1:]] == [*kind.__struct_fields__], kind
    assert "\nPriority: One of high, medium, low.\n" in printed
    assert "msgspec" not in printed and max(map(len, printed.splitlines())) < 1500, "a type says nothing of its base"
    listed = json.loads(run("plugins", "--hooks", "--format", "json", cwd=tmp_path).stdout)
    assert [row["hook"] for row in listed["hooks"]] == [*Hooks.SPECS]
    shown = [text for row in listed["hooks"] for text in (*row["takes"], row["returns"])]
    shown += [text for row in listed["types"] for text in row["fields"]]
    ours = {name: vars(cco_sidecar).get(name) for name in re.findall(r"\b[A-Z]\w+", " ".join(shown))}
    plain = {
        name for name, kind in ours.items() if kind is not getattr(typing, name, None) and not inspect.isclass(kind)
    }
    assert plain == {"Argv", "CategoryName", "Environment", "Identifier", "Priority", "Sections", "Text"}
    assert plain <= {row["type"] for row in listed["types"]}


def test_of_two_plugins_with_one_name_the_second_is_named_and_skipped(tmp_path: Path) -> None:
    hooks = Hooks([])
    first = write_plugins(tmp_path / "first", {"twin": "@hookimpl\ndef startup(info):\n    return 'first'"})
    second = write_plugins(tmp_path / "second", {"twin": "@hookimpl\ndef startup(info):\n    return 'second'"})
    hooks.load_folders([first, second])
    assert list(hooks.ask("startup", info=None)) == [("twin", "first")]
    assert [plugin.problem for plugin in hooks.loaded] == [None, "another plugin has this name"]


def test_a_module_that_two_entry_points_name_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cco_sidecar.import_file(
        write_plugins(tmp_path / "ours", {"one": "@hookimpl\ndef startup(info):\n    return 'one'"}) / "one.py"
    )
    entries = [
        types.SimpleNamespace(name=name, value=name, load=lambda: module) for name in ("one", "again", "once_more")
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    hooks = Hooks([])
    hooks.load_folders([])
    assert list(hooks.ask("startup", info=None)) == [("one", "one")]
    assert [plugin.problem for plugin in hooks.loaded] == [None, "it is loaded as one", "it is loaded as one"]


def test_of_a_module_its_hooks_alone_are_looked_at(tmp_path: Path) -> None:
    class Nosy(Hooks.MANAGER):  # type: ignore[name-defined, misc]
        def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
            looked_at.append(name)
            return super().parse_hookimpl_opts(plugin, name)

    class NosyHooks(Hooks):
        MANAGER = Nosy

    looked_at: list[str] = []
    text = "import os, re, json\nHELP = TEXT = 'text'\n@hookimpl\ndef startup(info):\n    return help\n"
    hooks = NosyHooks([])
    hooks.load_folders(
        [write_plugins(tmp_path / "ours", {"large": text + "@hookimpl\ndef shutdown(info):\n    return HELP\n"})]
    )
    assert {name for name in looked_at if name[:2] != "__"} == {"startup", "shutdown"}
    assert hooks.loaded[0].hooks == ["shutdown", "startup"]


HANGING = """
    import threading
    gate = threading.Event()
    calls = []

    @hookimpl
    def next_agents(proposals):
        calls.append(1)
        gate.wait(30)
        return proposals

    @hookimpl
    def permission_policy(claims):
        gate.wait(30)
"""


def test_a_plugin_that_hangs_is_left_behind_and_after_some_calls_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Hooks, "TIMEOUT", 0.5)  # which is enough for the prompt one on a busy machine
    caplog.set_level("WARNING", "cco")
    hooks = hooks_of(tmp_path, hanging=HANGING, prompt="@hookimpl\ndef next_agents(proposals):\n    return proposals")
    module = sys.modules["cco_sidecar_user_plugins.hanging"]
    facts: dict[str, Any] = {
        "result": ResultFact("x", "qa", "success"),
        "proposals": [],
        "history": [],
        "language": "",
        "submission": {},
    }
    try:
        for _ in range(Hooks.MAX_STUCK + 2):
            assert list(hooks.ask("next_agents", **facts)) == [("prompt", [])]
        assert len(module.calls) == Hooks.MAX_STUCK
        assert (
            "no answer within" in caplog.text and f"{Hooks.MAX_STUCK} earlier calls have not come back" in caplog.text
        )
        assert "could not decide" in str(hooks.refusal(claims=None, permission=None, method="GET", path="/"))
    finally:
        module.gate.set()
    until(lambda: ("hanging", []) in list(hooks.ask("next_agents", **facts)))  # whatever thread its calls were in


def test_who_asks_a_plugin_that_hangs_waits_and_nobody_else(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    hanging = {
        f"hangs_in_{hook}": f"import time\n@hookimpl\ndef {hook}({fact}):\n    time.sleep(60)\n"
        for hook, fact in (("next_agents", "result"), ("resolve_issue", "issue_id"), ("agent_command", "launch"))
    }
    command = ("--agent-command", json.dumps([sys.executable, "-c", "print('done')"]))
    service = make_service("--plugins", str(write_plugins(tmp_path / "more", hanging)), *command)
    architect = service.client()

    def ask(number: int) -> list[int]:
        client, issue = service.client(), f"issue-{number}"
        body = {"agent_type": "chief-architect", "issue_id": issue, "agent_id": "x", "project_id": PROJECT}
        spawned = {"agent_type": "chief-architect", "issue_id": issue}
        return [
            client.post("/api/results", body | {"result": {"status": "success"}}).status_code,
            client.get(f"/api/context/{issue}/chief-architect").status_code,
            client.post("/api/agents/spawn", spawned).status_code,
        ]

    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(ask, number) for number in range(10)]
        looks = 0
        while not all(future.done() for future in asked):
            for path in ("/status", "/api/agents", "/api/results", "/health"):
                assert architect.get(path).status_code == 200
            looks += 1
    assert looks > 2 and [future.result() for future in asked] == [[201, 200, 201]] * 10
    assert service.stop() == 0, "in less than the minute for which they hang"


@pytest.mark.parametrize("failures", [1, 2, 5])
def test_a_pool_works_on_after_the_system_had_no_room_for_a_thread(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    start = threading.Thread.start
    left = failures

    def limited(thread: threading.Thread) -> None:
        nonlocal left
        if thread.name == "crowded" and left:
            left -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scene() -> None:
        pool = cco_sidecar.Pool("crowded", 1, 5)
        for _ in range(failures):
            with pytest.raises(RuntimeError, match="can't start"):
                await pool.run(lambda: 1)
        assert await asyncio.gather(*(pool.run(lambda: 1) for _ in range(4))) == [1] * 4

    monkeypatch.setattr(cco_sidecar, "FREE_THREADS", collections.deque(maxlen=0))  # also none of an earlier test
    monkeypatch.setattr(threading.Thread, "start", limited)
    asyncio.run(scene())


def test_a_pool_gives_up_what_hangs_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    code = """
import asyncio, os, sys, time
from cco_sidecar import Pool
os.mkfifo(sys.argv[1])
hung, other, began = Pool("hung", 2, 0.2), Pool("other", 2, 5), time.monotonic()
def fail(): raise KeyError("x")
async def main():
    waits = [hung.run(open, sys.argv[1]) for _ in range(2)] + [hung.run(time.sleep, 60), hung.run(print, "never")]
    print(*[type(error).__name__ for error in await asyncio.gather(*waits, return_exceptions=True)])
    print(await asyncio.gather(*(other.run(sum, [number, 1]) for number in range(5))))
    print(*await asyncio.gather(other.run(fail), return_exceptions=True))
asyncio.run(main())
print(time.monotonic() - began < 30)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join(["TimeoutError"] * 4), "[1, 2, 3, 4, 5]", "'x'", "True"]


def test_a_slow_observer_holds_nobody_up_and_what_it_misses_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "cco")
    monkeypatch.setattr(Hooks, "MAX_UNTOLD", 3)
    code = "import threading\ngate = threading.Event()\nseen = []\n@hookimpl\ndef startup(info):\n    seen.append(info)\n    gate.wait(30)"
    hooks = hooks_of(tmp_path, slow_observer=code)
    module = sys.modules["cco_sidecar_user_plugins.slow_observer"]
    hooks.tell("startup", info=0)
    until(lambda: module.seen == [0])
    for number in range(1, 6):
        hooks.tell("startup", info=number)
    assert module.seen == [0] and caplog.text.count("was not told") == 2
    module.gate.set()
    until(lambda: module.seen == [0, 1, 2, 3])


# -- where plugins come from


def distribution(folder: Path, name: str, code: str | None) -> None:
    """An installed package with an entry point."""
    if code is not None:
        (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cco_sidecar]\n{name.removesuffix('_cco')} = {name}\n")


def test_plugins_of_installed_packages_are_found_and_a_broken_one_is_skipped(repository: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    distribution(
        site,
        "acme_cco",
        "from cco_sidecar import hookimpl\n\n@hookimpl\ndef register_agent_types():\n    return {'coyote': 'qa'}\n",
    )
    distribution(site, "ruin_cco", None)
    listed = run("plugins", "--format", "json", cwd=repository, PYTHONPATH=str(site))
    rows = {row["plugin"]: row for row in json.loads(listed.stdout)["plugins"]}
    assert rows["acme"] == {
        "plugin": "acme",
        "source": "entry point acme_cco",
        "hooks": "register_agent_types",
        "problem": None,
    }
    assert rows["ruin"]["problem"].startswith("ModuleNotFoundError")
    types = run("agent", "types", "--format", "csv", cwd=repository, PYTHONPATH=str(site)).stdout
    assert "\ncoyote,qa," in types
    none = run("plugins", "--no-plugins", "--format", "json", cwd=repository, PYTHONPATH=str(site)).stdout
    assert {row["source"] for row in json.loads(none)["plugins"]} == {"built in"}


def test_a_plugin_shares_our_classes_although_we_run_as_a_script(repository: Path, tmp_path: Path) -> None:
    code = "import sys\nprint(cco_sidecar is sys.modules['__main__'], file=sys.stderr)"
    folder = write_plugins(tmp_path / "plugins", {"same": code})
    command = [sys.executable, "-u", str(MODULE), "plugins", "--plugins", str(folder)]  # by an interpreter of its own
    listed = subprocess.run(command, cwd=repository, env=clean_environment(), capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stderr == "True\n"


# -- the bundled plugins


def test_the_projects_own_rules_for_agents_are_a_section_with_secrets_redacted(
    plugged: Service, service: Service, issue: str
) -> None:
    rules = plugged.client().get(f"/api/context/{issue}/python-specialist").json()["context"]["house_rules"]
    assert [rule["path"] for rule in rules] == ["AGENTS.md"]
    assert rules[0]["content"].startswith("Use tabs.\n") and "ghp_" not in rules[0]["content"]
    assert "house_rules" not in service.client().get(f"/api/context/{issue}/python-specialist").json()["context"]


def test_every_bundled_plugin_loads_and_is_named_in_a_test() -> None:
    hooks = Hooks([])
    hooks.load_files(bundled_plugins())
    bundled = {path.stem for path in (ROOT / "plugins").glob("*/[!_.]*.py")}
    assert {plugin.name for plugin in hooks.loaded if plugin.hooks and not plugin.problem} >= bundled
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in bundled if name not in tests] == []


def test_hooks_that_fail_to_load_leave_no_half_module_behind(tmp_path: Path) -> None:
    hooks = Hooks([])
    hooks.load_folders([write_plugins(tmp_path / "more", {"half": "value = 1\nraise ValueError('half way')"})])
    assert "cco_sidecar_user_plugins.half" not in sys.modules
    assert [plugin.problem for plugin in hooks.loaded] == ["ValueError: half way (half.py:4)"]


def test_a_bundled_hook_that_waits_for_nothing_is_called_where_it_is_asked() -> None:
    asking, quick = threading.get_ident(), sys.modules[Hooks.__module__].waits_for_nothing
    called: dict[str, int] = {}

    def state_of(name: str, module: str) -> types.ModuleType:
        def index_state() -> dict[str, Any]:
            called[name] = threading.get_ident()
            return {"state": "ready"}

        index_state.__module__, plugin = module, types.ModuleType(name)
        vars(plugin)["index_state"] = hookimpl(index_state if name == "unmarked" else quick(index_state))
        return plugin

    hooks = Hooks([])
    for name, module in (("bundled", PACKAGE), ("unmarked", PACKAGE), ("somebodys", "users")):
        hooks.register(state_of(name, f"{module}.{name}"), name)
    assert dict(hooks.ask("index_state", root="", index_folder="")).keys() == {"bundled", "unmarked", "somebodys"}
    assert [name for name in called if called[name] == asking] == ["bundled"]
