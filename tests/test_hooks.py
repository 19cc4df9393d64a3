"""Plugins: every hook through a small plugin file, and what a bad plugin cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULE, PROJECT, ROOT, Service, clean_environment, end_stragglers, make_repository, until

from cco_sidecar import Hooks, HookSpecs, ResultFact, StartError

PLUGINS = {
    "wizardry": """
        @hookimpl
        def register_agent_types():
            return {"wizard": "coding", "sphinx": "architect"}
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
    "routing": """
        from cco_sidecar import NextAgent

        @hookimpl
        def next_agents(result, proposals, submission):
            kind = submission["issue_id"].partition("-")[0]
            extra = NextAgent("technical-writer", "low", "plugin: always")
            return {"added": [*proposals, extra], "removed": [], "replaced": [extra], "text": "nobody",
                    "stranger": [NextAgent("nobody-knows", "low", "?")], "halves": [{"agent_type": "wizard"}]}.get(kind)
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
            if launch.agent_type == "sphinx":
                return "echo a riddle"
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
        import cco_sidecar

        class Server(cco_sidecar.Server):
            def start_request(self, server_conn, request_conn):
                print("a server of one's own", flush=True)
                return super().start_request(server_conn, request_conn)

        @hookimpl
        def server_class(settings):
            return Server
    """,
    "reader": """
        from cco_sidecar import FileFact, Project
        from msgspec.structs import replace

        class Reader(Project):
            def look(self):
                state = super().look()
                return replace(state, files=[*state.files, FileFact("seen/by-a-plugin.py", 7, 0)])

        @hookimpl
        def project_reader(settings):
            return Reader(settings.root, settings.storage)
    """,
    "store": """
        from cco_sidecar import Storage

        class Mirrored(Storage):
            def start(self):
                super().start()
                print("a storage of one's own", flush=True)

        @hookimpl
        def backend(settings):
            return Mirrored(settings)
    """,
    # asked before all others, being loaded last
    "x_nonsense": "\n".join(
        f"@hookimpl\ndef {name}({'launch' if name == 'agent_command' else ''}):\n    return 5\n"
        for name in vars(HookSpecs)
        if name[0] != "_" and name != "permission_policy"
    ),
    "x_raising": "\n".join(
        f"@hookimpl\ndef {name}():\n    raise cco_sidecar.IssueNotFound('x') if {name!r} != 'resolve_issue' else RuntimeError('x')\n"
        for name in vars(HookSpecs)
        if name[0] != "_" and name != "permission_policy"
    ),
    "x_exits": "raise SystemExit(3)",
    "x_broken": "def context_section(:",
}


def write_plugins(folder: Path, plugins: dict[str, str]) -> Path:
    """Plugin files that import what each needs."""
    folder.mkdir(parents=True)
    for name, code in plugins.items():
        (folder / f"{name}.py").write_text("import cco_sidecar\nfrom cco_sidecar import hookimpl\n" + textwrap.dedent(code))
    return folder


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service with all of PLUGINS, the good ones and the bad ones."""
    folder = tmp_path_factory.mktemp("plugged")
    plugins = write_plugins(folder / "plugins", PLUGINS)
    repository = make_repository(folder / "repository")
    (folder / "secret.txt").write_text("outside\n")
    (repository / "AGENTS.md").write_text("Use tabs.\ntoken = ghp_" + "a1B2" * 9 + "\n")
    running = Service(repository, folder / "storage", "--plugins", str(plugins), env={"NOTES": str(folder / "notes")}).start()
    yield running
    if running.process and running.process.poll() is None:
        running.stop()
    end_stragglers()


def notes(service: Service, kind: str) -> list[Any]:
    path = Path(service.env["NOTES"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [fact for said, fact in map(json.loads, lines) if said == kind]


def hooks_of(folder: Path, **plugins: str) -> Hooks:
    """Hooks with these plugins and no others."""
    hooks = Hooks([])
    hooks.load([(write_plugins(folder / "unit", plugins), True)])
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
    minted = run("token", "--type", "wizard", "--plugins", str(plugged.arguments[1]), "--storage", str(plugged.storage), cwd=plugged.root)
    assert minted.returncode == 0, minted.stderr


def test_a_plugin_adds_a_context_section_and_its_answer_takes_the_place_of_a_built_in_one(plugged: Service, issue: str) -> None:
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


def test_a_plugin_knows_an_issue_or_that_there_is_none(plugged: Service, issue: str) -> None:
    client = plugged.client()
    gone = client.get(f"/api/context/gone-{issue}/python-specialist")
    assert (gone.status_code, gone.json()["code"]) == (404, "REQ_002")
    known = client.get(f"/api/context/known-{issue}/python-specialist").json()["context"]
    assert known["relevant_files"][0]["path"] == "src/session_store.py"
    assert client.get(f"/api/context/{issue}/python-specialist").status_code == 200


def test_a_plugin_ranks_the_files_and_cannot_name_others(plugged: Service, issue: str) -> None:
    client = plugged.client()
    files = client.get(f"/api/context/{issue}/python-specialist", task="only the guide").json()["context"]["relevant_files"]
    assert [(file["path"], file["reasons"]) for file in files] == [("docs/guide.md", ["the plugin says so"])]
    assert len(client.get(f"/api/context/{issue}/python-specialist", task="greet").json()["context"]["relevant_files"]) > 1


def test_a_context_says_that_an_index_is_still_being_made_and_is_not_kept(plugged: Service, issue: str) -> None:
    client, busy = plugged.client(), plugged.storage / "index/busy"
    busy.touch()
    answers = [client.get(f"/api/context/{issue}/python-specialist", task="greet") for _ in range(2)]
    assert [(answer.json()["context"]["metadata"]["index"], answer.json()["cache_hit"]) for answer in answers] == [("building", False)] * 2
    busy.unlink()
    ready = client.request("GET", f"/api/context/{issue}/python-specialist?task=greet", headers={"If-None-Match": answers[1].headers["ETag"]})
    assert (ready.status_code, ready.json()["context"]["metadata"]["index"]) == (200, "ready")


@pytest.mark.parametrize(
    ("kind", "proposed"),
    [
        ("plain", ["test-engineer", "security-auditor"]),
        ("added", ["test-engineer", "security-auditor", "technical-writer"]),
        ("removed", []),
        ("replaced", ["technical-writer"]),
        ("text", ["test-engineer", "security-auditor"]),
        ("stranger", ["test-engineer", "security-auditor"]),
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
        ("odd", 403, "policy refuses"), ("crashing", 403, "could not decide"),
    ],
)  # fmt: skip
def test_a_policy_refuses_and_one_that_fails_refuses_too(plugged: Service, subject: str, status: int, reason: str) -> None:
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
    assert client.get(f"/api/agents/{agent_id}/logs").json()["text"] == f"wizard {issue} a {{issue_id}} spell\n"


def test_a_command_that_is_no_list_of_words_is_passed_over(plugged: Service, issue: str, make_service: Callable[..., Service]) -> None:
    fallback = json.dumps([sys.executable, "-c", "print('the configured one')"])
    service = make_service("--plugins", str(plugged.arguments[1]), "--agent-command", fallback, env=plugged.env | {"NOTES": "/dev/null"})
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
    told = until(lambda: [fact for fact in notes(plugged, "event_published") if fact["data"].get("issue_id") == issue][3:])
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
    greeted = run("--plugins", str(plugged.arguments[1]), "greet", "status", cwd=plugged.root)  # an argument that is a command of ours
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


def test_a_plugin_brings_its_own_look_at_the_repository(plugged: Service) -> None:
    context = plugged.client().get("/api/context/issue-1/python-specialist").json()["context"]
    assert "seen/by-a-plugin.py" in context["project_structure"]["files"]
    assert "src/main.py" in context["project_structure"]["files"]


def test_plugins_are_told_of_start_and_stop(tmp_path: Path, make_service: Callable[..., Service]) -> None:
    plugins = write_plugins(tmp_path / "plugins", {name: PLUGINS[name] for name in ("observer", "x_nonsense", "x_raising")})
    service = make_service("--plugins", str(plugins), env={"NOTES": str(tmp_path / "notes")})
    url = until(lambda: notes(service, "startup"))
    assert url == [service.url] and notes(service, "shutdown") == []
    assert service.stop() == 0
    assert notes(service, "shutdown") == url
    assert "Traceback" not in service.log


EXERCISED = {
    "register_agent_types": test_a_plugin_adds_agent_types,
    "context_section": test_a_plugin_adds_a_context_section_and_its_answer_takes_the_place_of_a_built_in_one,
    "resolve_issue": test_a_plugin_knows_an_issue_or_that_there_is_none,
    "rank_files": test_a_plugin_ranks_the_files_and_cannot_name_others,
    "index_state": test_a_context_says_that_an_index_is_still_being_made_and_is_not_kept,
    "next_agents": test_a_plugin_adds_removes_and_replaces_next_agents_but_nonsense_changes_nothing,
    "permission_policy": test_a_policy_refuses_and_one_that_fails_refuses_too,
    "agent_command": test_a_plugin_says_how_an_agent_runs_and_observes_its_end,
    "result_stored": test_observers_are_told_in_order_what_was_stored_and_published,
    "event_published": test_observers_are_told_in_order_what_was_stored_and_published,
    "agent_ended": test_a_plugin_says_how_an_agent_runs_and_observes_its_end,
    "register_routes": test_a_plugin_adds_endpoints_with_everything_that_ours_have,
    "register_commands": test_a_plugin_adds_commands_and_other_plugins_cannot_break_the_command_line,
    "server_class": test_a_plugin_brings_its_own_server,
    "project_reader": test_a_plugin_brings_its_own_look_at_the_repository,
    "backend": test_a_plugin_brings_its_own_storage,
    "startup": test_plugins_are_told_of_start_and_stop,
    "shutdown": test_plugins_are_told_of_start_and_stop,
}


def test_every_hook_is_exercised_here_and_explained() -> None:
    specified = {name: function for name, function in vars(HookSpecs).items() if hasattr(function, "cco_sidecar_spec")}
    assert set(EXERCISED) == set(specified)
    for name, function in specified.items():
        assert function.__doc__ and function.__doc__.strip().endswith("."), name
        assert any(f"def {name}(" in code for plugin, code in PLUGINS.items() if not plugin.startswith("x_")), name


# -- what a bad plugin cannot do


def test_plugins_that_raise_or_answer_nonsense_are_logged_and_the_service_is_healthy(plugged: Service) -> None:
    client = plugged.client()
    assert client.get("/health").json()["status"] == "healthy"
    client.store(issue="logged-1")
    client.get("/api/context/logged-1/python-specialist")
    until(lambda: "plugin x_raising: event_published" in plugged.log)
    for hook in ("register_agent_types", "context_section", "rank_files", "next_agents", "result_stored", "server_class", "backend", "startup"):
        assert f"plugin x_raising: {hook}: " in plugged.log, hook
    for hook in ("register_agent_types", "context_section", "rank_files", "next_agents", "server_class", "backend", "register_routes"):
        assert f"plugin x_nonsense: {hook}: " in plugged.log, hook


def test_a_plugin_that_cannot_be_loaded_is_named_and_skipped(plugged: Service) -> None:
    banner = until(lambda: plugged.log if "Stop:" in plugged.log else "")
    assert "Skipped:  x_broken (SyntaxError" in banner and "Skipped:  x_exits (SystemExit: 3)" in banner
    listed = run("plugins", "--plugins", str(plugged.arguments[1]), "--format", "json", cwd=plugged.root)
    rows = {row["plugin"]: row for row in json.loads(listed.stdout)["plugins"]}
    assert set(rows) >= {*PLUGINS, "house_rules", "built-in:RoutingRules"}
    assert rows["x_broken"]["problem"].startswith("SyntaxError") and rows["x_broken"]["hooks"] == ""
    assert rows["observer"] == {
        "plugin": "observer", "source": str(Path(plugged.arguments[1]) / "observer.py"), "problem": None,
        "hooks": "agent_ended event_published result_stored shutdown startup",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "named"), [("@hookimpl\ndef context_sektion(request): pass", "context_sektion"), ("@hookimpl\ndef startup(inpho): pass", "inpho")]
)
def test_a_hook_or_argument_that_does_not_exist_stops_the_start_with_one_line(repository: Path, tmp_path: Path, code: str, named: str) -> None:
    plugins = write_plugins(tmp_path / "plugins", {"misspelt": code})
    ended = run("--plugins", str(plugins), "--storage", str(tmp_path / "storage"), cwd=repository)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and named in ended.stderr, ended.stderr
    assert not (tmp_path / "storage").exists()


def test_a_folder_of_plugins_that_is_not_there_stops_the_start(repository: Path) -> None:
    ended = run("--plugins", "nowhere", cwd=repository)
    assert ended.returncode == 2 and "nowhere is not a folder" in ended.stderr and ended.stderr.count("\n") == 1


def test_of_two_plugins_with_one_name_the_second_is_named_and_skipped(tmp_path: Path) -> None:
    hooks = Hooks([])
    first = write_plugins(tmp_path / "first", {"twin": "@hookimpl\ndef startup(info):\n    return 'first'"})
    second = write_plugins(tmp_path / "second", {"twin": "@hookimpl\ndef startup(info):\n    return 'second'"})
    hooks.load([(first, True), (second, True)])
    assert list(hooks.ask("startup", info=None)) == [("twin", "first")]
    assert [bool(plugin.problem) for plugin in hooks.loaded] == [False, True]


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
    monkeypatch.setattr(Hooks, "TIMEOUT", 0.02)
    caplog.set_level("WARNING", "cco")
    hooks = hooks_of(tmp_path, hanging=HANGING, prompt="@hookimpl\ndef next_agents(proposals):\n    return [*proposals, 'prompt']")
    module = sys.modules["cco_sidecar_plugins.hanging"]
    facts: dict[str, Any] = {"result": ResultFact("x", "qa", "success"), "proposals": [], "history": [], "language": "", "submission": {}}
    try:
        for _ in range(Hooks.MAX_STUCK + 2):
            assert list(hooks.ask("next_agents", **facts)) == [("prompt", ["prompt"])]
        assert len(module.calls) == Hooks.MAX_STUCK
        assert "no answer within" in caplog.text and f"{Hooks.MAX_STUCK} earlier calls have not come back" in caplog.text
        assert "could not decide" in str(hooks.refusal(claims=None, permission=None, method="GET", path="/"))
    finally:
        module.gate.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "plugin-hanging"])
    assert ("hanging", []) in list(hooks.ask("next_agents", **facts))


def test_a_slow_observer_holds_nobody_up_and_what_it_misses_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "cco")
    monkeypatch.setattr(Hooks, "MAX_UNTOLD", 3)
    code = "import threading\ngate = threading.Event()\nseen = []\n@hookimpl\ndef startup(info):\n    seen.append(info)\n    gate.wait(30)"
    hooks = hooks_of(tmp_path, slow_observer=code)
    module = sys.modules["cco_sidecar_plugins.slow_observer"]
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
    distribution(site, "acme_cco", "from cco_sidecar import hookimpl\n\n@hookimpl\ndef register_agent_types():\n    return {'coyote': 'qa'}\n")
    distribution(site, "ruin_cco", None)
    listed = run("plugins", "--format", "json", cwd=repository, PYTHONPATH=str(site))
    rows = {row["plugin"]: row for row in json.loads(listed.stdout)["plugins"]}
    assert rows["acme"] == {"plugin": "acme", "source": "entry point acme_cco", "hooks": "register_agent_types", "problem": None}
    assert rows["ruin"]["problem"].startswith("ModuleNotFoundError")
    types = run("agent", "types", "--format", "csv", cwd=repository, PYTHONPATH=str(site)).stdout
    assert "\ncoyote,qa," in types
    none = run("plugins", "--no-plugins", "--format", "json", cwd=repository, PYTHONPATH=str(site)).stdout
    assert {row["source"] for row in json.loads(none)["plugins"]} == {"built in"}


def test_a_plugin_shares_our_classes_although_we_run_as_a_script(repository: Path, tmp_path: Path) -> None:
    code = "import sys\nprint(cco_sidecar is sys.modules['__main__'], file=sys.stderr)"
    listed = run("plugins", "--plugins", str(write_plugins(tmp_path / "plugins", {"same": code})), cwd=repository)
    assert listed.returncode == 0 and listed.stderr == "True\n"


def test_a_dangling_link_among_a_repositorys_own_plugins_is_no_obstacle(tmp_path: Path) -> None:
    folder = write_plugins(tmp_path / "plugins", {"ours": ""})
    (folder / "gone.py").symlink_to(tmp_path / "nowhere")
    (folder / "theirs.py").write_text("raise SystemExit('never run')")
    hooks = Hooks([])
    hooks.load([(folder, False)])
    assert [plugin.name for plugin in hooks.loaded] == ["ours"]


# -- the bundled plugins


def test_the_projects_own_rules_for_agents_are_a_section_with_secrets_redacted(plugged: Service, service: Service, issue: str) -> None:
    rules = plugged.client().get(f"/api/context/{issue}/python-specialist").json()["context"]["house_rules"]
    assert [rule["path"] for rule in rules] == ["AGENTS.md"]
    assert rules[0]["content"].startswith("Use tabs.\n") and "ghp_" not in rules[0]["content"]
    assert "house_rules" not in service.client().get(f"/api/context/{issue}/python-specialist").json()["context"]


def test_every_bundled_plugin_loads_and_is_named_in_a_test() -> None:
    hooks = Hooks([])
    hooks.load([(ROOT / "plugins", False)])
    bundled = {path.stem for path in (ROOT / "plugins").glob("[!_.]*.py")}
    assert {plugin.name for plugin in hooks.loaded if plugin.hooks and not plugin.problem} >= bundled
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in bundled if name not in tests] == []


def test_hooks_that_fail_to_load_leave_no_half_module_behind(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nonexistent"):
        hooks_of(tmp_path, bad="@hookimpl\ndef nonexistent(): pass")
    hooks = Hooks([])
    hooks.load([(write_plugins(tmp_path / "more", {"half": "value = 1\nraise ValueError('half way')"}), True)])
    assert "cco_sidecar_plugins.half" not in sys.modules
    assert [plugin.problem for plugin in hooks.loaded] == ["ValueError: half way"]
