"""The smallest useful implementation of every hook, in the order of Asks, Tells and Parts: to be copied into
a plugin of your own. This file is not loaded; a test runs all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from cco_sidecar import (
    AgentCommand,
    AgentLaunch,
    Claims,
    CommandParser,
    ContextRequest,
    Endpoint,
    Launcher,
    NextAgent,
    RankedFile,
    RankRequest,
    ResultFact,
    Route,
    Sections,
    Server,
    Settings,
    SidecarInfo,
    Storage,
    hookimpl,
    log,
)  # fmt: skip
from cco_sidecar_plugins.agents._reader import Reader


@hookimpl
def register_agent_types(settings: Settings) -> dict[str, str]:
    return {"translator": "documentation"}


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    return {"release": {"frozen": request.project.git.branch == "main"}}


@hookimpl
def section_files() -> list[str]:
    return ["coverage.xml"]


@hookimpl
def resolve_issue(issue_id: str, settings: Settings) -> dict[str, Any] | None:
    file = Path(settings.root, "issues", issue_id + ".md")
    return {"title": issue_id, "body": file.read_text()} if file.exists() else None


@hookimpl
def rank_files(request: RankRequest) -> list[RankedFile] | None:
    return [RankedFile(file.path, 1.0) for file in request.files if file.path in request.task]


@hookimpl
def index_state(root: str, index_folder: str) -> dict[str, Any] | None:
    return {"state": "ready" if Path(index_folder, "mine.db").exists() else "building"}


@hookimpl
def next_agents(
    result: ResultFact,
    proposals: list[NextAgent],
    history: list[ResultFact],
    language: str,
    submission: dict[str, Any],
    settings: Settings,
) -> list[NextAgent]:
    return [item for item in proposals if item.agent_type != "security-auditor"]


@hookimpl
def permission_policy(claims: Claims, permission: str | None, method: str, path: str) -> bool | str | None:
    return "the project is frozen" if Path("FROZEN").exists() and method != "GET" else None


@hookimpl
def context_brief(request: ContextRequest, sections: Sections, reader: Reader) -> str | None:
    return f"# {request.issue_id}\n\nYou may: {', '.join(reader.permissions)}"


@hookimpl
def agent_command(launch: AgentLaunch, settings: Settings) -> list[str] | AgentCommand | None:
    return ["my-agent", "--task", "{task}"] if launch.agent_type == "translator" else None


@hookimpl
def agent_failure(agent: dict[str, Any], output: list[str], folder: str) -> str | None:
    return "the licence has expired" if "licence expired" in output and agent["exit_code"] == 3 else None


@hookimpl
def agent_result(agent: dict[str, Any], lines: list[str], folder: str, root: str, alone: bool) -> dict[str, Any] | None:
    return {"status": "partial", "decisions": lines[-1:]}


@hookimpl
def register_routes() -> list[Route]:
    class Greet(Endpoint):
        async def respond(self, name: str) -> dict[str, str]:
            return {"hello": name}

    return [Route("GET", "/api/greet/{name}", Greet)]


@hookimpl
def register_commands(commands: argparse._SubParsersAction[CommandParser]) -> None:
    def greet(options: argparse.Namespace) -> int:
        print("hello")
        return 0

    commands.add_parser("greet", help="say hello").set_defaults(run=greet)


@hookimpl
def result_stored(result: dict[str, Any]) -> None:
    print("stored", result["id"], file=sys.stderr)


@hookimpl
def event_published(event: dict[str, Any]) -> None:
    print(event["event_type"], event["data"], file=sys.stderr)


@hookimpl
def agent_starting(launch: AgentLaunch, root: str) -> None:
    print("starting", launch.agent_id, file=sys.stderr)


@hookimpl
def agent_ended(agent: dict[str, Any]) -> None:
    print(agent["agent_id"], agent["state"], file=sys.stderr)


@hookimpl
def startup(info: SidecarInfo) -> None:
    print("listening on", info.url, file=sys.stderr)


@hookimpl
def shutdown(info: SidecarInfo) -> None:
    print("stopped", file=sys.stderr)


@hookimpl
def part_class(settings: Settings, base: Any) -> type | None:
    class Told(base):  # type: ignore[misc]
        def start(self) -> None:
            super().start()
            log.info("the state lies in %s", settings.storage)

    class Logged(base):  # type: ignore[misc]
        def start_request(self, server_conn: object, request_conn: Any) -> Any:
            log.info("a request comes")
            return super().start_request(server_conn, request_conn)

    class Welcoming(base):  # type: ignore[misc]
        async def files(self, running: Any, body: Any) -> Any:
            return await super().files(running, body) | {"welcome.txt": b"Welcome to the team"}

    class Signed(base):  # type: ignore[misc]
        async def send(self, content: bytes) -> None:
            self.set_header("X-Checksum", hashlib.sha256(content).hexdigest())
            await super().send(content)

    own = {Storage: Told, Server: Logged, Launcher: Welcoming, Endpoint: Signed}
    return next((mine for part, mine in own.items() if issubclass(base, part)), None)
