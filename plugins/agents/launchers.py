"""How each known coding program runs an agent: one row a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cco_sidecar import AgentCommand, AgentLaunch, hookimpl, known_command, write_file

UNASKED = ("curl",)  # what every agent may run: it calls the service


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program in its headless form, in which it edits files unasked and runs the commands that it is told.

    ``argv``, ``stdin`` and ``environment`` are those of an AgentCommand. Variables that the program must not have are
    empty in ``environment``; the marks of a session around us are withheld from every agent. ``files`` are written into
    the agent's folder. A word ``{may}`` of argv becomes one word for each command that it may run, as ``may`` says it
    to the program; in ``environment`` and ``files`` these are joined by commas. ``may`` is None where the program has
    no such list.
    """

    tried: str  # the version, empty for a program that was not to be had
    argv: Sequence[str]
    stdin: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    may: Callable[[str], str] | None = None

    def command(self, commands: Sequence[str]) -> AgentCommand:
        """How an agent is started that may run ``commands``."""
        rules = [self.may(command) for command in commands] if self.may else []
        argv = [word for part in self.argv for word in (rules if part == "{may}" else [part])]
        told = {name: value.replace("{may}", ", ".join(rules)) for name, value in self.environment.items()}
        return AgentCommand(argv, self.stdin, told)

    def write_files(self, folder: Path, commands: Sequence[str]) -> None:
        for name, content in self.files.items():
            rules = ", ".join(map(self.may, commands)) if self.may else ""
            write_file(folder / name, content.replace("{may}", rules).encode())


GEMINI_POLICY = """\
[[rule]]
toolName = "run_shell_command"
commandPrefix = [{may}]
decision = "allow"
priority = 100
"""
# The last rule that matches decides. Its own tools read and edit in the repository without being asked.
OPENCODE_PERMISSIONS = """\
{"permission": {"bash": {"*": "deny", {may}}, "edit": "allow", "external_directory": {"{agent_folder}/*": "allow"}}}"""

PROGRAMS = {
    "claude": Program(
        tried="2.1.197",
        argv=["claude", "-p", "{prompt}", "--permission-mode", "acceptEdits", "--add-dir", "{agent_folder}",
              "--allowedTools", "{may}"],
        may="Bash({} *)".format,
    ),
    "codex": Program(
        tried="0.169.0",
        argv=["codex", "exec", "--sandbox", "workspace-write", "-c", "sandbox_workspace_write.network_access=true",
              "--skip-git-repo-check", "{prompt}"],
    ),
    "gemini": Program(
        tried="0.61.0",
        argv=["gemini", "--skip-trust", "--approval-mode", "auto_edit", "--policy", "{agent_folder}/policy.toml",
              "--include-directories", "{agent_folder}", "-p", "{prompt}"],
        files={"policy.toml": GEMINI_POLICY},
        may=json.dumps,
    ),
    "opencode": Program(  # an argument with blanks reaches its model quoted; agents that share a database lock it
        tried="1.18.33",
        argv=["opencode", "run"],
        stdin="{agent_folder}/prompt",
        environment={"OPENCODE_CONFIG_CONTENT": OPENCODE_PERMISSIONS, "OPENCODE_PERMISSION": "",
                     "OPENCODE_DB": "{agent_folder}/opencode.db"},
        may=lambda command: f'{json.dumps(command)}: "allow", {json.dumps(command + " *")}: "allow"',
    ),
    "aider": Program(
        tried="0.86.2",
        argv=["aider", "--yes-always", "--no-check-update", "--no-detect-urls", "--no-gitignore",
              "--message", "{prompt}"],
    ),
    "goose": Program(tried="", argv=["goose", "run", "--no-session", "-t", "{prompt}"]),
    "qwen": Program(
        tried="0.15.10",
        argv=["qwen", "{prompt}", "--approval-mode", "auto-edit", "--add-dir", "{agent_folder}",
              "--allowed-tools", "{may}"],
        may="run_shell_command({})".format,
    ),
    "cursor-agent": Program(tried="", argv=["cursor-agent", "-p", "--force", "--trust", "{prompt}"]),
    "copilot": Program(
        tried="1.0.102",
        argv=["copilot", "--no-ask-user", "--allow-all-urls", "--add-dir", "{agent_folder}",
              "--allow-tool", "write", "{may}", "-p", "{prompt}"],
        environment={"COPILOT_ALLOW_ALL": ""},
        may="shell({}:*)".format,
    ),
}  # fmt: skip
KNOWN = {name: program.command(UNASKED) for name, program in PROGRAMS.items()}


@hookimpl
def agent_command(launch: AgentLaunch) -> AgentCommand | None:
    command = known_command(launch.configured, KNOWN)
    if not isinstance(command, AgentCommand):
        return None
    program = PROGRAMS[command.argv[0]]
    program.write_files(Path(launch.agent_folder), UNASKED)
    return command
