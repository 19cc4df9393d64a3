"""The hooks of coding programs: which moments each tells of, how it is answered, and how it calls cco_sidecar.

A program runs a command at certain moments of a session, gives it JSON on standard input, and reads JSON from its
standard output. DIALECTS has one row a program. ``cco hook PROGRAM`` is such a command; a spawned agent has curl in its
place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from msgspec import Struct

Answer = dict[str, Any]


def as_context(event: str, text: str) -> Answer:
    return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": text}}


def as_block(reason: str) -> Answer:
    return {"decision": "block", "reason": reason}


def as_denial(reason: str) -> Answer:
    return {"decision": "deny", "reason": reason}


def as_permission(event: str, allowed: bool, message: str) -> Answer:
    """claude and codex; codex refuses a message beside allow."""
    decision = {"behavior": "allow"} if allowed else {"behavior": "deny", "message": message}
    return {"hookSpecificOutput": {"hookEventName": event, "decision": decision}}


class Dialect(Struct, frozen=True, kw_only=True):
    """The words of one program.

    ``events`` has its names for our moments: the start of a session, a prompt of the user, a tool's end, the end of a
    turn (``stop``), and a question for permission. What is missing there it does not tell of, or takes no answer to.
    ``context`` makes the answer that gives the model a text, ``refuse`` the one by which a turn goes on, ``permit`` the
    one that allows or denies what permission was asked for. ``second`` is the program's unit of a hook's time limit.
    ``settings`` is the file of a repository that has hooks under the key ``hooks``, or the module of a program that is
    in MODULAR, which its settings name.
    """

    events: dict[str, str]
    settings: str
    context: Callable[[str, str], Answer] = as_context
    refuse: Callable[[str], Answer] = as_block
    permit: Callable[[str, bool, str], Answer] = as_permission
    second: int = 1
    handler: Callable[[str, int], Answer] = lambda command, limit: {
        "hooks": [{"type": "command", "command": command, "timeout": limit}]
    }

    def moment(self, event: str) -> str | None:
        """The moment that the program calls ``event``."""
        return next((moment for moment, name in self.events.items() if name == event), None)


CLAUDE = {
    "start": "SessionStart", "prompt": "UserPromptSubmit", "tool": "PostToolUse", "stop": "Stop",
    "permission": "PermissionRequest",
}  # fmt: skip
MODULAR = ("opencode", "kilo")  # have a module in the place of hooks
DIALECTS = {
    "claude": Dialect(events=CLAUDE, settings=".claude/settings.local.json"),
    "codex": Dialect(events=CLAUDE, settings=".codex/hooks.json"),
    "qwen": Dialect(
        events={name: CLAUDE[name] for name in ("start", "prompt", "tool", "stop")}, settings=".qwen/settings.json",
        second=1000,
    ),
    "gemini": Dialect(
        events={"start": "SessionStart", "prompt": "BeforeAgent", "tool": "AfterTool", "stop": "AfterAgent"},
        settings=".gemini/settings.json", refuse=as_denial, second=1000,
    ),
    "copilot": Dialect(
        events={"start": "sessionStart", "prompt": "userPromptSubmitted", "tool": "postToolUse", "stop": "agentStop"},
        settings=".github/hooks/cco.json",
        context=lambda event, text: {"additionalContext": text},
        handler=lambda command, limit: {"type": "command", "bash": command, "timeoutSec": limit},
    ),
    **{name: Dialect(
        events={"start": "start", "tool": "tool"}, context=lambda event, text: {"text": text},
        settings=f".cco-{name}.js",
    ) for name in MODULAR},
}  # fmt: skip
QUICK, PATIENT, WAITING = 10, 900, 86_400  # seconds that a program gives a hook: at once, for a person, for an event


def hook_settings(program: str, command: str, *, wait: str = "", permission: str = "") -> dict[str, Any]:
    """What stands under ``hooks`` in a program's settings, by its events. ``command`` is a line for a shell, in which
    ``{event}`` becomes the event's name. ``permission`` is the line that asks a person for permission, where one is to
    be asked. ``wait`` is the one that waits for an event while the session is idle: claude alone has a hook for it; of
    codex the hook of a turn's end starts it, by ``--queue`` behind ``command``.

    hook_settings("claude", "cco hook claude", wait="cco wait --rewake")  # for a user's own session
    """
    dialect, hooks = DIALECTS[program], {}
    for moment, event in dialect.events.items():
        line, limit = (permission, PATIENT) if moment == "permission" else (command, QUICK)
        line += " --queue" if (program, moment) == ("codex", "stop") and wait else ""
        if line:
            hooks[event] = [dialect.handler(line.replace("{event}", event), limit * dialect.second)]
    if wait and program == "claude":
        waiting = {"type": "command", "command": wait, "asyncRewake": True, "timeout": WAITING}
        hooks["Stop"].append({"hooks": [waiting]})
    return hooks


# What opencode and kilo have in the place of hooks: a module of JavaScript, named under "plugin". At a tool's
# end the text is appended to what the tool said. A failure costs nothing but the text.
OPENCODE_PLUGIN = """\
import { execFile } from "node:child_process"
const call = (hook_event_name, session_id) => new Promise((done) => {
  const child = execFile("/bin/sh", ["-c", COMMAND], { timeout: 10000 }, (error, said) => {
    try { done((!error && JSON.parse(said).text) || "") } catch { done("") }
  })
  child.stdin.on("error", () => {})
  child.stdin.end(JSON.stringify({ hook_event_name, session_id }))
})
export const Sidecar = async () => ({
  event: async ({ event }) => { if (event.type === "session.created") await call("start", event.properties.info.id) },
  "tool.execute.after": async (input, output) => {
    const text = await call("tool", input.sessionID)
    if (text && Array.isArray(output.content)) output.content.push({ type: "text", text })  // of an MCP server's tool
    else if (text) output.output += "\\n\\n" + text
  },
})
"""


def opencode_plugin(command: str) -> str:
    """The module that runs ``command``, a line for a shell, at its moments."""
    return OPENCODE_PLUGIN.replace("COMMAND", json.dumps(command))


# How a spawned agent's program calls: its token in a file that curl reads, and nothing printed where anything fails.
AGENT_CALL = (
    'curl -sf {patience} -K "${CCO_TOKEN_FILE%token}curl" --data-binary @-'
    ' "$SIDECAR_URL/hooks/{program}?event={event}" || :'
)
AT_ONCE = "-m 5"
PATIENTLY = f"-m {PATIENT - 20} --retry 30 --retry-delay 2 --retry-all-errors"  # also across a restart of the service


def agent_call(program: str, patience: str = AT_ONCE) -> str:
    return AGENT_CALL.replace("{program}", program).replace("{patience}", patience)


def agent_hooks(program: str) -> dict[str, Any]:
    """``hook_settings`` of a spawned agent."""
    return hook_settings(program, agent_call(program), permission=agent_call(program, PATIENTLY))


def as_json(program: str) -> str:
    """A file of settings with the hooks of a spawned agent."""
    return json.dumps({"hooks": agent_hooks(program)}, indent=1)


def as_module(program: str) -> str:
    """The same for a program that has a module in the place of hooks."""
    return opencode_plugin(agent_call(program).replace("?event={event}", ""))


def as_toml(program: str) -> list[str]:
    """The same as words for codex: ``-c hooks.EVENT=[...]``, in TOML, whose strings are those of JSON here. It runs no
    hook that its user has not looked at: these alone are named as looked at, by their hashes. Its option
    ``--dangerously-bypass-hook-trust`` would also run those that somebody has put into the repository.
    """

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    hooks = agent_hooks(program)
    trusted = {f"/<session-flags>/config.toml:{snake_case(event)}:0:0": rows for event, rows in hooks.items()}
    state = {key: {"trusted_hash": hook_hash(key.split(":")[1], rows[0])} for key, rows in trusted.items()}
    return [
        word for event, rows in (hooks | {"state": state}).items() for word in ("-c", f"hooks.{event}={toml(rows)}")
    ]


def snake_case(event: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", event).lower()


def hook_hash(event: str, row: dict[str, Any]) -> str:
    """What codex 0.169 and 0.171 know a hook by; where another version counts otherwise, it does not run it."""
    hooks = [hook | {"async": False} for hook in row["hooks"]]
    content = json.dumps({"event_name": event, "hooks": hooks}, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
