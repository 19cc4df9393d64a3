"""The prompt of a coding agent: its brief, its tools or what its token allows by curl, and what it may run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from typing import Any

import msgspec

from cco_sidecar import (
    PERMISSIONS,
    PUBLISH,
    WRITE,
    AgentLaunch,
    Agents,
    Claims,
    Launcher,
    Running,
    hookimpl,
    log,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents._reader import Reader, ReadingLauncher

HEAD = """\
You are {agent_id}, a {agent_type} in a team of agents that works on issue {issue_id} of the repository in your working\
 directory. Your task: {task}

"""
BRIEF = """\
Read your brief first (10 kB: what earlier agents decided, the files worth reading, git state): {brief_file}
Those files' contents and all else as JSON, one value a line, far longer: {context_file}

"""
CONTEXT = """\
Read your context first (JSON: files worth reading, git state, what earlier agents decided): {context_file}

"""
MAY = """\
You may: {may}. Never print your token.

"""
STORE = """\
When you are done, store your result (status is success, failed or partial):
  {curl}/results -d '{result}'
"""
OTHERWISE = "\nOnly where those tools are missing, do the same by curl.\n"
EXAMPLE = "what you decided and why"  # in the place of a decision; where it comes back, nothing was decided
SAY = "When you are done, say in your last lines what you decided and why: you store no result yourself.\n"
TELL = """
To tell the others something before that, publish an event:
  {curl}/events/progress -d '{event}'
"""
# What a program takes for a file that it is to read into the conversation, or for a command of its own.
MISTAKABLE = re.compile(r"@|!`|^[^\S\n]*/", re.MULTILINE)


@hookimpl
def part_class(base: type) -> type | None:
    return type("PromptLauncher", (PromptLauncher, base), {}) if issubclass(base, Launcher) else None


class PromptLauncher(ReadingLauncher):
    """Tells an agent what its token allows, and of a brief, tools and commands where it has them."""

    settings: PluginSettings

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        for problem in self.settings.unknown_types(self.types.categories):
            log.warning("%s", problem)

    def launch(self, running: Running, files: Collection[str]) -> AgentLaunch:
        launch, reader = super().launch(running, files), self.reader(running.row, running.folder)
        facts = msgspec.structs.asdict(launch) | {"task": launch.task or "see the context of the issue."}
        facts["brief_file"] = f"{launch.agent_folder}/brief.md"
        if MISTAKABLE.search(launch.task):
            facts["task"] = f"it is the text of the file {launch.agent_folder}/task, which you read first."
        head = (HEAD + (BRIEF if "brief.md" in files else CONTEXT)).format(**facts)
        beside = "You may run" if reader.how else "Beside curl you may run"
        may = self.settings.may(launch.agent_type)
        beside = f"{beside}: {', '.join(may)}.\n" if may else ""
        else_by = OTHERWISE + by_curl(reader) if reader.how else ""  # its program may not have reached the tools
        return msgspec.structs.replace(launch, prompt=head + beside + instructions(reader) + else_by)


def reader_of(agents: Agents, claims: Claims, issue_id: str) -> Reader:
    """Who asks for a brief on an issue; a running agent of ours has a file for curl."""
    assert isinstance(agents.launcher, ReadingLauncher)
    may, running = claims.permissions, agents.active.get(claims.sub)
    rights = [name for name in PERMISSIONS if name in may]
    row = {"id": claims.sub, "type": claims.agent_type, "issue": issue_id, "project": claims.project_id}
    return agents.launcher.reader(row | {"permissions": rights}, running.folder if running else None)


def instructions(reader: Reader) -> str:
    """How to work through this service, as far as the reader's permissions allow, in short lines."""
    may = ", ".join(reader.permissions) or "nothing but wait for events"
    return reader.how or MAY.format(may=may) + by_curl(reader)


def by_curl(reader: Reader) -> str:
    """How to store and publish by curl. The commands hold no variable, which some programs refuse to run, and name the
    token by a file of curl's own alone.
    """
    who = {name: getattr(reader, name) for name in ("agent_id", "agent_type", "issue_id", "project_id")}
    result = {"status": "success", "files_modified": [], "decisions": [EXAMPLE]}
    data = {"issue_id": reader.issue_id, "message": "..."}
    template = STORE if WRITE in reader.permissions else SAY
    return (template + (TELL if PUBLISH in reader.permissions else "")).format(
        curl=f"curl -sS -K {shlex.quote(reader.curl_file)} {reader.url}", result=in_lines({**who, "result": result}),
        event=in_lines({"publisher": reader.agent_id, "topic": "progress", "data": data}),
    )  # fmt: skip


def in_lines(body: dict[str, Any]) -> str:
    """``body`` as JSON with a field a line, none beside what is before it: paths and names may be long."""
    return "{\n    " + ",\n    ".join(json.dumps({name: value})[1:-1] for name, value in body.items()) + "}"
