"""How each known coding program runs an agent, and how it says that it cannot: one row a program."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from cco_sidecar import (
    AgentCommand,
    AgentLaunch,
    AgentTypes,
    Contexts,
    Hooks,
    Launcher,
    Tokens,
    hookimpl,
    log_once,
    write_file,
)
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import did_you_mean
from cco_sidecar_plugins.agents._hook_settings import as_json, as_module, as_toml

log = logging.getLogger("cco")

DECIDING = {"launchers", "discovery"}  # the plugins whose commands are those of the table
UNASKED = ("curl",)  # what every agent may run: it calls the service


class Program(Struct, frozen=True, kw_only=True):
    """A program in its headless form, in which it edits files unasked and runs the commands that it is told.

    ``argv``, ``stdin`` and ``environment`` are those of an AgentCommand. Variables that the program must not have are
    empty in ``environment``; the marks of a session around us are withheld from every agent. ``files`` are written into
    the agent's folder. A word ``{may}`` of argv becomes one word for each command that it may run, as ``may`` says it
    to the program; in ``environment`` and ``files`` these are joined by commas. ``may`` is None where the program has
    no such list. ``asking`` has the words in the place of ``{asking}``, by whether a person is asked for permission.

    ``logged_out`` is a pattern of what it writes where nobody is logged in, and ``logged_out_codes`` the exit codes by
    which it then ends: None where it goes on for minutes. ``offline`` is what it writes where it reaches no model, and
    ``refused``, with what was answered as its group, how a line begins where the model refuses or fails until it gives
    up or is ended. This is its last line, but for those that begin with ``follows``, a pattern, at most so many.

    While a pattern is searched for the whole service waits: no two parts of one may take the same letters.

    ``telemetry`` and ``telemetry_argv``, words behind its name, have it report what it spends to the plugin meter;
    ``{url}`` there is the service's. Empty where it tells nothing that is understood there.

    ``mcp_apart`` is (a file of the project, a text, words that stand first where the file has the text).
    ``mcp_argv``, words behind its name, ``mcp_last``, words at its end, ``mcp_environment`` and ``mcp_files`` connect
    it to the service's tools: see the plugin connection. Objects are written as JSON; one in the environment is joined
    to what is there.
    """

    tried: str  # the version, empty for a program that was not to be had
    argv: Sequence[str]
    log_in: str  # how somebody logs in
    logged_out: str
    logged_out_codes: tuple[int | None, ...] = (1,)
    offline: str = ""
    refused: str = ""
    follows: tuple[str, int] = ("", 0)
    stdin: str = ""
    environment: dict[str, str] = {}
    files: dict[str, str] = {}
    may: Callable[[str], str] | None = None
    asking: dict[bool, Sequence[str]] = {}
    telemetry: dict[str, str] = {}
    telemetry_argv: Sequence[str] = ()
    mcp_argv: Sequence[str] = ()
    mcp_apart: tuple[str, str, Sequence[str]] = ("", "", ())
    mcp_last: Sequence[str] = ()
    mcp_environment: dict[str, Any] = {}
    mcp_files: dict[str, Any] = {}

    @property
    def connects(self) -> bool:
        """Whether it is known how it finds the service's tools."""
        return bool(self.mcp_argv or self.mcp_environment)

    @property
    def stores(self) -> bool:
        """Whether it is known to be able to store a result, by a tool or by curl."""
        return self.connects or self.may is not None

    def command(self, commands: Iterable[str], asks: bool = False) -> AgentCommand:
        """How an agent is started that may run ``commands``."""
        rules = [self.may(command) for command in commands] if self.may else []
        lists: dict[str, Sequence[str]] = {"{may}": rules, "{asking}": self.asking.get(asks, ())}
        argv = [word for part in self.argv for word in lists.get(part, [part])]
        told = {name: value.replace("{may}", ", ".join(rules)) for name, value in self.environment.items()}
        return AgentCommand(argv, self.stdin, told)

    def write_files(self, folder: Path, commands: Iterable[str]) -> None:
        for name, content in self.files.items():
            rules = ", ".join(map(self.may, commands)) if self.may else ""
            write_file(folder / name, content.replace("{may}", rules).encode())

    def failure(self, name: str, code: int | None, lines: Sequence[str], ended: bool) -> Iterator[str]:
        """Why the program, which is called ``name``, wrote these last ``lines``, none of which is blank or ends with
        a blank; ``code`` is None while it runs, and ``ended`` says that it was not to end so.
        """
        text = "\n".join(lines)
        if code in self.logged_out_codes and re.search(self.logged_out, text, re.MULTILINE):
            yield f"{name} is not logged in: {self.log_in}"
        if code != 0 and self.offline and re.search(self.offline, text, re.MULTILINE):
            yield f"{name} does not reach its model: is there a network?"
        if self.refused and code is not None and (ended or code in self.logged_out_codes):
            last, at_most = self.follows
            for line in reversed(lines[-at_most - 1 :]):
                if found := re.match(self.refused, line):
                    yield f"its model refused or failed: {found[found.lastindex or 0]}"
                if found or not re.match(last, line):
                    return


GEMINI_POLICY = """\
[[rule]]
toolName = "run_shell_command"
commandPrefix = [{may}]
decision = "allow"
priority = 100
"""
# The last rule that matches decides. Its own tools read and edit in the repository without being asked.
OPENCODE_PERMISSIONS = """\
{"permission": {"bash": {"*": "deny", {may}}, "edit": "allow", "external_directory": {"{agent_folder}/*": "allow"}},
 "plugin": ["file://{agent_folder}/hooks.mjs"]}"""

LASTING = "CCO_MCP_TOKEN"  # the variable with the token of programs that read it once
WAITS_MS = 330_000  # longer than any tool takes
CLINE_SERVERS = ".cline/data/settings/cline_mcp_settings.json"


def server(**facts: Any) -> dict[str, Any]:
    return {"mcpServers": {"cco": facts}}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def like_opencode(name: str, tried: str) -> Program:
    """opencode, or a program made from it: an argument with blanks reaches its model quoted, and agents that share a
    database lock it.
    """
    variable = name.upper()
    return Program(
        tried=tried,
        argv=[name, "run", "--print-logs", "--log-level", "ERROR"],
        stdin="{agent_folder}/prompt",
        environment={f"{variable}_CONFIG_CONTENT": OPENCODE_PERMISSIONS, f"{variable}_PERMISSION": "",
                     f"{variable}_DB": f"{{agent_folder}}/{name}.db"},
        files={"hooks.mjs": as_module(name)},
        mcp_environment={f"{variable}_CONFIG_CONTENT": {"mcp": {"cco": {
            "type": "remote", "url": "{url}/mcp", "headers": bearer(f"{{env:{LASTING}}}"), "oauth": False,
            "enabled": True, "timeout": WAITS_MS}}}},
        may=lambda command: f'{json.dumps(command)}: "allow", {json.dumps(command + " *")}: "allow"',
        log_in=f"`{name} auth login`",
        logged_out=r"^(\x1b\[\d+m)+Error: .*(?i:api[ -]key|unauthori[sz]ed|authenticat)",
        offline=r"(^timestamp=\S* level=ERROR (?>.*?Cannot connect to API: ).*\n?){2}\Z"
                r"|^(\x1b\[\d+m)+Error: .*Cannot connect to API",
        refused=r'timestamp=\S* level=ERROR (?>.*? error\.error="AI_)\w+: ((?:[^"\\]|\\.)+)"\Z'
                r"|\x1b\[91m\x1b\[1mError: \x1b\[0m(.+)",
        follows=("Error message: ", 1),  # of a parser, about what is no JSON
    )  # fmt: skip


PROGRAMS = {
    "claude": Program(
        tried="2.1.332",
        argv=["claude", "-p", "{prompt}", "--permission-mode", "acceptEdits", "--add-dir", "{agent_folder}",
              "--settings", "{agent_folder}/hooks.json", "--allowedTools", "{may}"],
        files={"hooks.json": as_json("claude")},
        may="Bash({} *)".format,
        log_in="`claude auth login`, or a key in ANTHROPIC_API_KEY",
        logged_out=r"^(Not logged in|Invalid API key|OAuth token|Failed to authenticate|API Error: 40[13]\b)",
        offline=r"^(API Error: )?(Connection error|Unable to connect to API)",
        refused=r"API Error: (.+)|(Credit balance is too low)\Z",
        telemetry={"CLAUDE_CODE_ENABLE_TELEMETRY": "1", "OTEL_LOGS_EXPORTER": "otlp"},
        mcp_argv=["--mcp-config", "{agent_folder}/mcp.json"],
        mcp_last=["mcp__cco"],  # of --allowedTools: all tools of the server
        mcp_files={"mcp.json": server(  # versions before 2.1.332 do not run a headersHelper again
            type="http", url="{url}/mcp", headers=bearer(f"${{{LASTING}}}"), alwaysLoad=True)},
    ),
    "codex": Program(
        tried="0.171.0",
        # A snapshot of the shell is a file in its home, with the token, that others may read.
        argv=["codex", "exec", "{asking}", "-c", "sandbox_workspace_write.network_access=true",
              "-c", "features.shell_snapshot=false", *as_toml("codex"), "--skip-git-repo-check", "{prompt}"],
        asking={False: ["--sandbox", "workspace-write"], True: ["--approve-for-me"]},  # which has the same sandbox
        log_in="`codex login`, or a key in CODEX_API_KEY",
        logged_out=r"^ERROR: unexpected status 401",
        offline=r"^ERROR: Reconnecting\.\.\. waiting for network\Z",  # and waits for ever
        refused=r"ERROR: ((?:exceeded retry limit|unexpected status|stream disconnected|We.re currently|\{.type).+)",
        telemetry_argv=["-c", "otel.exporter.otlp-http.endpoint={url}/v1/logs",
                        "-c", "otel.exporter.otlp-http.protocol=json"],
        mcp_argv=["-c", f'mcp_servers.cco={{url="{{url}}/mcp", bearer_token_env_var="{LASTING}",'
                        f' default_tools_approval_mode="approve", tool_timeout_sec={WAITS_MS // 1000},'
                        ' required=true, startup_timeout_sec=60}'],  # else its first turn may come before the tools
        # It would join the server of `cco connect`, which has our name, with ours, and refuse that.
        mcp_apart=(".codex/config.toml", "mcp_servers.cco", ["-c", 'projects={{root}={trust_level="untrusted"}}']),
    ),
    "gemini": Program(
        tried="0.61.0",
        argv=["gemini", "--skip-trust", "--approval-mode", "auto_edit", "--policy", "{agent_folder}/policy.toml",
              "--include-directories", "{agent_folder}", "-p", "{prompt}"],
        files={"policy.toml": GEMINI_POLICY},
        may=json.dumps,
        log_in="`gemini` by hand, or a key in GEMINI_API_KEY",
        logged_out=r"\b[Aa]uth(entication)?\b",
        logged_out_codes=(41,),
        refused=r"(?:Attempt (?:[3-9]|\d\d) failed\b|Error when talking to Gemini API ).*Error: (.+)",
        follows=(r"\s|\}|An unexpected critical error occurred", 40),  # the trace
        telemetry={
            "GEMINI_TELEMETRY_ENABLED": "true", "GEMINI_TELEMETRY_TARGET": "local",
            "GEMINI_TELEMETRY_OTLP_ENDPOINT": "{url}", "GEMINI_TELEMETRY_OTLP_PROTOCOL": "http",
            "GEMINI_TELEMETRY_LOG_PROMPTS": "false"},
        # It takes settings of the system from files of root alone: so it gets a home with the user's settings and ours.
        mcp_environment={"GEMINI_CLI_HOME": "{agent_folder}/home"},
        mcp_files={"home/.gemini/settings.json": server(
            httpUrl="{url}/mcp", headers=bearer(f"${LASTING}"), trust=True, timeout=WAITS_MS)
            | json.loads(as_json("gemini"))},
    ),
    "opencode": like_opencode("opencode", "1.18.33"),
    "aider": Program(  # without a login it waits five minutes for a browser; with a wrong key it ends with 0
        tried="0.86.2",
        argv=["aider", "--yes-always", "--no-check-update", "--no-detect-urls", "--no-gitignore",
              "--input-history-file", "{agent_folder}/aider.input", "--chat-history-file", "{agent_folder}/aider.md",
              "--read", "{agent_folder}/task", "--message", "{prompt}"],
        log_in="a key of its model's provider, such as ANTHROPIC_API_KEY",
        logged_out=r"^(No LLM model was specified and no API keys were provided|litellm\.AuthenticationError)",
        logged_out_codes=(None, 0),
        refused=r"litellm\.(\w+Error: .+)|(Empty response received from LLM.+)",
        follows=("(?!Retrying)", 3),
    ),
    "goose": Program(
        tried="",
        argv=["goose", "run", "--no-session", "-t", "{prompt}"],
        log_in="`goose configure`",
        logged_out="No provider configured",
    ),
    "qwen": Program(
        tried="0.24.4",
        argv=["qwen", "{prompt}", "--approval-mode", "auto-edit", "--add-dir", "{agent_folder}",
              "--allowed-tools", "{may}"],
        files={"hooks.json": as_json("qwen")},
        environment={"QWEN_CODE_SYSTEM_DEFAULTS_PATH": "{agent_folder}/hooks.json"},
        may="run_shell_command({})".format,
        log_in="`qwen auth`",
        logged_out=r"^(No auth type is selected|\[API Error: 401)",
        offline=r"^\[API Error: Connection error",
        refused=r"(?:Retrying in [^\[]*: )?\[API Error: (?!401|Connection error)(.+)\]\Z",
        follows=(r"Operation cancelled\.\Z", 1),
        telemetry={
            "QWEN_TELEMETRY_ENABLED": "true", "QWEN_TELEMETRY_TARGET": "local", "QWEN_TELEMETRY_OTLP_ENDPOINT": "{url}",
            "QWEN_TELEMETRY_OTLP_PROTOCOL": "http", "QWEN_TELEMETRY_LOG_PROMPTS": "false"},
        # It fills in no variables here. Without its tool_search it shows its model all tools at once.
        mcp_argv=["--mcp-config", "{agent_folder}/mcp.json"],
        mcp_last=["--exclude-tools", "tool_search"],
        mcp_files={"mcp.json": server(httpUrl="{url}/mcp", headers=bearer("{token}"), trust=True, timeout=WAITS_MS)},
    ),
    "cursor-agent": Program(
        tried="",
        argv=["cursor-agent", "-p", "--force", "--trust", "{prompt}"],
        log_in="`cursor-agent login`, or a key in CURSOR_API_KEY",
        logged_out="Authentication required",
    ),
    "copilot": Program(
        tried="1.0.102",
        argv=["copilot", "--no-ask-user", "--allow-all-urls", "--add-dir", "{agent_folder}",
              "--allow-tool", "write", "{may}", "-p", "{prompt}"],
        environment={"COPILOT_ALLOW_ALL": ""},
        may="shell({}:*)".format,
        mcp_argv=["--additional-mcp-config", "@{agent_folder}/mcp.json", "--allow-tool", "cco"],
        mcp_files={"mcp.json": server(
            type="http", url="{url}/mcp", headers=bearer(f"${{{LASTING}}}"), tools=["*"], timeout=WAITS_MS)},
        log_in="`copilot login`, or a token in COPILOT_GITHUB_TOKEN",
        logged_out=r"^(Error: No authentication information found|Authentication failed)",
        refused=r"Failed to get response from the AI model; .*Last error: (.+)|([45]\d\d [A-Z].+)",
        follows=(r"[A-Z]\w+ {2,}", 6),  # the figures
    ),
    "cline": Program(  # without a network it says nothing for a minute
        tried="3.0.65",
        argv=["cline", "{prompt}"],
        log_in="`cline auth`",
        logged_out=r"^(\x1b\[\d+m)*error:(\x1b\[\d+m)* .*(?i:api[ -]key|unauthori[sz]ed|authenticat)",
        offline=r"^(\x1b\[\d+m)*error:(\x1b\[\d+m)* Cannot connect to API",
        refused=r"\x1b\[31merror:\x1b\[0m (?!error: )(.+)",
        follows=(r"Error message: |(Deprecation)?Warning: |\s+at ", 20),  # of a parser, and of its libraries
        mcp_environment={"CLINE_MCP_SETTINGS_PATH": f"{{agent_folder}}/home/{CLINE_SERVERS}"},
        mcp_files={f"home/{CLINE_SERVERS}": server(
            transport={"type": "streamableHttp", "url": "{url}/mcp", "headers": bearer("{token}")},
            timeout=WAITS_MS // 1000)},
    ),
    "kilo": like_opencode("kilo", "7.7.7"),
}  # fmt: skip

# Among the first lines, since what an agent runs may say the same. opencode and kilo print their help alone.
REFUSED_OPTION = late_pattern(
    r"\A(?:.*\n){0,5}?(?:\x1b\[31merror:\x1b\[0m )?"
    r"((?:error: )(?:unknown|unexpected|invalid|option|Invalid command) .*|Unknown arguments?: .*"
    r"|(?:opencode|kilo) run \[message\.\.\])"
    r"|^(aider: error: unrecognized arguments: .*)\Z",
    re.MULTILINE,
)

# What ends any program. That its output was lost says our keeper itself.
LACKING = late_pattern(
    r"No space left on device|database or disk is full|JavaScript heap out of memory|^MemoryError\b.*", re.MULTILINE
)


def known_name(configured: Sequence[str] | None) -> str:
    """The known program that runs agents: where no command is configured the first on PATH; "" where a command of the
    user's own does, or none is there.
    """
    if configured is None:
        return next(filter(shutil.which, PROGRAMS), "")
    return configured[0] if len(configured) == 1 and configured[0] in PROGRAMS else ""


def program_near(name: str, root: Path) -> str:
    """The end of a message that ``name`` is not there: what may have been meant, a file in the repository's ``root`` or
    a known program, where there is one.
    """
    if os.path.isfile(root / name):
        return f", did you mean ./{name}?"
    return "" if name in PROGRAMS else did_you_mean(name, PROGRAMS)


def how_to_have(name: str, root: Path) -> str:
    """The end of a message that the program ``name`` is not there: what to do."""
    close = program_near(name, root)
    return f"{f'{close} Else' if close else ':'} install it, or give another --agent-command"


def find_program(word: str, root: Path, path: str | None = None) -> str:
    """The file that a command's first word names, as a shell in ``root`` would find it, with this PATH or else ours.
    Raises FileNotFoundError, or PermissionError where it is there and cannot be run, with what to do.
    """
    says_where = bool(os.path.dirname(word))
    found = shutil.which(str(root / word) if says_where else word, path=path)
    if found is None:
        reason = errno.EACCES if says_where and os.path.exists(root / word) else errno.ENOENT
        problem = os.strerror(reason)
        if reason == errno.EACCES:
            problem = "a folder, which cannot be run" if os.path.isdir(root / word) else NOT_EXECUTABLE
        elif not os.path.isabs(word):
            problem = f"not {place_of(word)}{'' if says_where else how_to_have(word, root)}"
        raise OSError(reason, problem, word)
    return os.path.abspath(found)


NOT_EXECUTABLE = "there and cannot be run: chmod +x it, or name the program that runs it"


def place_of(word: str) -> str:
    """Where a program is looked for that a command calls ``word``."""
    seen = "at the path that the command gives" if os.path.isabs(word) else "there, seen from the repository's root"
    return seen if os.path.dirname(word) else "on PATH"


def default_program(settings: PluginSettings) -> str | None:
    """What runs agents whose type has no command of its own, None where nothing does."""
    return settings.agent_command[0] if settings.agent_command else known_name(None) or None


@hookimpl
def part_class(base: type) -> type | None:
    return type("KnowingLauncher", (KnowingLauncher, base), {}) if issubclass(base, Launcher) else None


class KnowingLauncher(Launcher):
    """Says also of the known programs where there is no command, and at the start what is wrong with one. Notes which
    of them an agent's command starts.
    """

    HOW_TO_HAVE_ONE = (
        f"{Launcher.HOW_TO_HAVE_ONE}, set agent-command in cco.toml, or put a program on PATH that is known here, such"
        " as claude or codex"
    )

    def __init__(
        self, contexts: Contexts, tokens: Tokens, types: AgentTypes, hooks: Hooks, settings: PluginSettings
    ) -> None:
        super().__init__(contexts, tokens, types, hooks, settings)
        problems = [
            f"{settings.where_of('agent_commands', name)}: {problem}"
            for name, command in settings.agent_commands.items()
            for problem in problems_of(command, settings.root, f"agent of the type {name}")
        ]
        if settings.agent_command:
            who = "agent of a type without a command of its own" if settings.agent_commands else "agent"
            where = settings.where("agent_command")
            problems += [f"{where}: {problem}" for problem in problems_of(settings.agent_command, settings.root, who)]
        for problem in dict.fromkeys(problems):
            log.warning("%s", problem)
        for name, command in settings.agent_commands.items():
            tell_unheard(command, settings.may(name))
        tell_unheard(settings.agent_command or None, any(settings.agent_may.values()))

    def _prepare(self, launch: AgentLaunch, files: dict[str, bytes]) -> AgentCommand:
        command = super()._prepare(launch, files)
        words = programs_in(command, launch.configured)
        theirs = {row.plugin for row in self.hooks.implementations["agent_command"]} - DECIDING
        if (name := known_name(launch.configured)) and PROGRAMS[name].stores and not theirs:
            words.append(STORES)
        write_file(Path(launch.agent_folder, NOTED), " ".join(words).encode())
        return command


NOTED = "program"  # a file in the agent's folder: the service may be started again before the agent ends
STORES = "stores"  # the last word in it, where the only program was started in a form in which it can store a result


def words_noted(folder: Path) -> list[str]:
    return content_of(folder / NOTED, 1000).decode("utf-8", "replace").split()


def storing_program(folder: Path) -> str:
    """The program that ran the agent of this folder, where it is known that it can store a result, else ""."""
    name, *more = words_noted(folder) or [""]
    return name if more == [STORES] else ""


def programs_in(command: AgentCommand, configured: Sequence[str] | None) -> list[str]:
    """The known programs that a command starts: its first word, or those that the words of the user's own name."""
    if (name := os.path.basename(command.argv[0])) in PROGRAMS:
        return [name]
    words = " ".join(configured or ())
    return [name for name in PROGRAMS if re.search(rf"(?<!\w){name}(?!\w)", words)]


def tell_unheard(configured: Sequence[str] | None, may: Collection[str] | bool) -> None:
    """Warn, once for each program, where it cannot be started with a list of what it ``may`` run."""
    name = known_name(configured)
    if may and name and PROGRAMS[name].may is None:
        log_once(f"{name} takes no list of commands: it hears of --agent-may by {{prompt}} alone")
    elif may and configured and not name and not any(word in " ".join(configured) for word in TELLING):
        own = os.path.basename(configured[0])
        log_once(f"{own} is started in your own words: it hears of --agent-may by {{prompt}} alone")


TELLING = ("{prompt}", "{agent_folder}/prompt")  # what holds the list of the commands


def problems_of(command: Sequence[str], root: Path, who: str) -> Iterator[str]:
    """What keeps a configured command from running in ``root`` the agents that ``who`` says, and words_amiss."""
    word, name = command[0], os.path.basename(command[0])
    shown = name if os.path.isabs(word) else word  # no paths of the machine in the log
    try:
        if "{" not in word:
            find_program(word, root)
    except PermissionError as error:
        yield f"no {who} can be started: {shown} is {error.strerror}"
    except FileNotFoundError:
        yield f"no {who} can be started: {shown} is not {place_of(word)}{program_near(name, root)}"
    yield from words_amiss(command)


def words_amiss(command: Sequence[str]) -> Iterator[str]:
    """Why its agents would not be told what a configured command is to tell them."""
    name = os.path.basename(command[0])
    if name in PROGRAMS and list(command) != [name] and not any(holder in " ".join(command) for holder in PLACEHOLDERS):
        yield f"{name} gets no prompt: say {name} alone for its headless form, or put {{prompt}} among your own words"
    plain = [part for part in command if not re.search(r"\s", part)]  # others may be programs of their own
    for braced in re.findall(r"(?<!\$)\{\w+\}", " ".join(plain)):
        if braced not in PLACEHOLDERS:
            yield f"{braced} is no placeholder and stays as it is{did_you_mean(braced, PLACEHOLDERS)}"


PLACEHOLDERS = [f"{{{name}}}" for name in AgentLaunch.__struct_fields__ if name != "configured"]


@hookimpl
def agent_command(launch: AgentLaunch, settings: PluginSettings) -> AgentCommand | None:
    if not (name := known_name(launch.configured)):
        return None
    program, may = PROGRAMS[name], settings.may(launch.agent_type)
    tell_unheard(launch.configured, may)
    program.write_files(Path(launch.agent_folder), UNASKED + may)
    return program.command(UNASKED + may, settings.agent_approvals == "ask")


@hookimpl
def agent_failure(agent: dict[str, Any], output: list[str], folder: str) -> str | None:
    """What its program says. A command of the user's own may start any of them where it names none: its success is
    believed then.
    """
    code, lines = agent["exit_code"], [line for each in output if (line := each.rstrip())]
    noted = words_noted(Path(folder))
    names = [name for name in PROGRAMS if name in noted]
    if code == 0 and (agent["result_id"] or not names):
        return None
    ended = agent["state"] in ("failed", "timeout")
    reasons = [next(PROGRAMS[name].failure(name, code, lines, ended), "") for name in names or PROGRAMS]
    if any(reasons):
        return "; or ".join(dict.fromkeys(filter(None, reasons)))  # opencode and kilo speak alike
    if refused := REFUSED_OPTION.search("\n".join(output)) if code in (1, 2) else None:
        return f"its version does not take its options ({(refused[1] or refused[2])[:200]})"
    lacking = LACKING.search("\n".join(lines[-60:])) if ended else None  # below it may stand a trace
    return f"its last lines say: {lacking[0]}" if lacking else None
