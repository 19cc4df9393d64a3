"""What of the environment reaches an agent: neither variables by which a request would run other code or lead traffic
elsewhere, nor marks of the session that the service was started from. A variable that cannot be one is named.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

import cco_sidecar
from cco_sidecar import ApiError, Launcher, Route, SpawnRequest, hookimpl
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins._settings import PluginSettings


@hookimpl
def part_class(base: type) -> type | None:
    return type("EnvironmentLauncher", (EnvironmentLauncher, base), {}) if issubclass(base, Launcher) else None


@hookimpl
def register_routes() -> list[Route]:
    return [Route("POST", "/api/agents/spawn", SpawnAgent)]


class SpawnAgent(cco_sidecar.SpawnAgent):
    """Start an agent as a real process, with its context in a file and a token of its own."""

    async def _read_body(self) -> None:
        """Raises REQ_001, which names a variable that is wrong."""
        try:
            await super()._read_body()
        except ApiError as error:
            place = (error.details or {}).get("path")
            if place not in ("environment", "environment[...]"):
                raise
            path = bad_variable(msgspec.json.decode(self.upload)["environment"])
            message = error.message.replace(f"`$.{place}`", f"`$.{path}`")
            raise ApiError(error.code, message, details={"path": path}) from None

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        for name, value in (body.get("environment") or {}).items():  # no program can be started with these
            if re.search(r"[\x00-\x20\x7f]", name):
                raise ApiError("REQ_001", "environment: a name holds a blank or a control character")
            if len(f"{name}={value}".encode("utf-8", "surrogatepass")) >= 128 * 1024:  # Linux has room for so much
                raise ApiError("REQ_001", "environment: a variable with its name has at most 128 KiB")
        return await super().respond(body)


def bad_variable(environment: Any) -> str:
    """The path of what is wrong in the ``environment`` of a request."""
    (shape,) = (row.type for row in msgspec.structs.fields(SpawnRequest) if row.name == "environment")
    for name, value in environment.items() if isinstance(environment, dict) else ():
        try:
            msgspec.convert({name: value}, shape)
        except msgspec.ValidationError:
            return f"environment.{name[:128]}" if name.isidentifier() else f"environment[{json.dumps(name[:128])}]"
    return "environment"


class EnvironmentLauncher(Launcher):
    """Tells variables by their names, which are read in capitals."""

    settings: PluginSettings

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        marks = [name for name in self.inherited if SESSION_MARKERS.fullmatch(name.upper())]
        for name in marks:
            if not self.allowed(name.upper()):
                del self.inherited[name]

    def allowed(self, variable: str) -> bool:
        return variable in {name.upper() for name in self.settings.agent_environment}

    def may_set(self, variable: str) -> bool:
        return self.allowed(variable) or UNSAFE_VARIABLES.fullmatch(variable) is None


# What a request may not set: it would run other code or lead an agent's traffic elsewhere. Read without blanks and
# in capitals. The project's own switches and addresses, and credentials, pass.
UNSAFE_VARIABLES = late_pattern(r"""(?xs)
    (?!((APP|FEATURE|TESTS?|VITE|NEXT_PUBLIC|REACT_APP)_.*|(?!CCO_).*_(VERSION|TOKEN|KEY|(REDIRECT|CALLBACK)_UR[IL]))$)(
    # where programs, libraries, plugins and settings are found; the paths of data pass
    (?!(.*_)?(DATA|DATABASE|DB|LOGS?|FILE|INPUT|OUTPUT|UPLOADS?|STATIC|MEDIA|BASE|URL|API|MODEL|REPORTS?|KEY)_PATHS?$).*PATHS?
    |.*(PATHEXT|HOME|LIBS?|APPDATA|USERPROFILE|SYSTEMROOT|BASEDIR)|AWS_.*_(PATH|FILE|PROCESS)|(CONFIG_|.*(INIT|PASS))FILE
    |(.+CONF|.*_CONFIG|[A-Z]+CONFIG|.+_(LIB|LIBRAR(Y|IES)|(?<!SETTINGS_)MODULES?|PLUGINS?|DRIVERS|HOOKS|ICD))(_.*)?
    |.*(?<!S)RC(_?FILE(NAME)?)?|(VIM|EX|LUA_)INIT.*|TERM(CAP|INFO.*)|GLIBC_TUNABLES
    # shells, programs that are started for somebody, and what is put before and behind them
    |ENV|BASH.*|.*SHELL|COMSPEC|PS[0-4]|IFS|ZDOTDIR|.*(FCEDIT|EDITOR|PAGER|BROWSER|ASKPASS|[RS]SH)|VISUAL|LESS(OPEN|CLOSE|KEY.*)
    |.*(COMMAND|CMD|PROG|PROGRAM|EXEC|EXECUTABLE|BINARY|BIN|WRAPPER|LAUNCHER|RUNNER|LINKER|COMPILER|PRELOAD|RUNPARAM)
    |.*(FLAGS|ARGS|OPT|OPTS|OPTIONS)(_.*)?|GHCRTS|MAKEFILES|C?MAKE|YACC|AWK|TAR|DMD|LDC2?|GDC|GHC|(P4)?DIFF|MERGE
    |(HOST|BUILD_?)?(CC|CXX|CPP|LD|AR|AS|NM|FC|F77|F90|RANLIB|STRIP|OBJ(C|CXX|COPY|DUMP)|READELF)(_FOR_.*)?
    |JAVAC?|NODE|RUBY|PERL|PHP|(.*_)?PYTHON[23]?
    # interpreters and git, but for what says who writes and in what manner
    |GIT_(?!(AUTHOR|COMMITTER)_).*|GO(?!(OS|ARCH|MAXPROCS|GC|MEMLIMIT|AL|OGLE)$)[A-Z0-9]+|RUST(?!_(LOG|BACKTRACE|ENV)).*
    |(PYTHON|DOTNET_|TCL)(?!_?ENV).*|NODE_(?!(ENV|DEBUG|NO_WARNINGS)$).*|PERL(5|IO|_MM).*
    # traffic: names of hosts, proxies, certificates, mirrors, and the interfaces of others
    |HOSTALIASES|LOCALDOMAIN|PG(HOST|SERVICE|SYSCONF).*|.*PROXY|SSL.*|.*(CA_BUNDLE|CA_CERTS?|CA_?FILE|_CERT)
    |(VAULT|NOMAD|.*_HTTP)_ADDR|.*(AGENT|COLLECTOR|DOWNLOAD|REMOTE)_(HOST|URL)
    |(?!(API|BACKEND|SERVER|(.*_)?SERVICE)_).+_(API_BASE|BASE_UR[IL]|API_(UR[IL]|HOST)|ENDPOINTS?|MIRRORS?|DIST|UNIVERSE_DOMAIN)(_.*)?
    |(ANTHROPIC|OPENAI|AZURE|GOOGLE|GEMINI|VERTEX|AWS|OLLAMA|LM_?STUDIO|LLAMA|VLLM|MISTRAL|DATABRICKS|HF|WATSONX|KIRO|TABNINE
        |LANG[A-Z]+|OPIK|PHOENIX|POSTHOG|STATSD|GH|GITHUB|GITLAB|DOCKER)_(.*_)?(BASE|UR[IL]|HOST|SOCKET|HEADERS|CONTEXT)
    # programs that take in code or settings by many names
    |(CCO_SIDECAR|LD|DYLD|OPENSSL|XDG|SSH|SUDO|CMAKE|S?CCACHE|DISTCC|GCC|COMPILER|MAVEN|CARGO|ELECTRON|TS_NODE|BUN|DENO|RUBYGEMS
        |GEM|BUNDLER?|COMPOSER|PHP_INI|R|JULIA|ERL|N?VIM|PYTEST|COVERAGE|CORECLR|COR|COMPLUS|YARN|PIP[A-Z]*|UV|POETRY|PDM|CONDA
        |MAMBA|COREPACK|HOMEBREW|NIX|PYENV|RBENV|NVM|OTEL|CLAUDE|CODEX|GEMINI_CLI|OPENCODE|AIDER|GOOSE|QWEN|CURSOR|COPILOT|AMP
        |LITELLM|CLINE|KILO)_.*)
    """)
# What programs that run agents, git for its hooks, make, node and systemd leave for what they start: an agent of
# ours would be taken for theirs. How to log in, where settings are, and what the desktop and terminal say is
# inherited.
SESSION_MARKERS = late_pattern(
    r"""
    CLAUDECODE|CLAUDE_(?!CONFIG_DIR$|CODE_(OAUTH_TOKEN$|USE_|SKIP_)).*|CODEX_(?!(HOME|API_KEY)$).*|CURSOR_(?!API_KEY$).*
    |((OPENCODE|GEMINI(_CLI)?|QWEN(_CODE)?|GOOSE|COPILOT|AMP|AIDER|CLINE|KILO|AUGMENT|ANTIGRAVITY|CRUSH|KIRO|ROO|JUNIE|DEVIN|REPLIT|DROID
        |FACTORY|TRAE|QODER|WARP|WINDSURF|(AI_)?AGENT)(_|$)|(CONTINUE|(AMAZON_)?Q|ZED)_)
      (ACTIVE|AGENT|CALLER|CLI|CLIENT|CODE|DROID|IDE_.*|PID|RUN_.*|SANDBOX.*|SERVER_.*|TERMINAL
        |(.*_)?(SESSION|THREAD|TRACE|CONVERSATION|TASK).*)?
    |(?!(XDG|.*TERM|.*DESKTOP)_).*_(SESSION|THREAD|CONVERSATION)_ID|ROO_(?!.*_(KEY|TOKEN)$).*|SANDBOX
    |GIT_(DIR|(IMPLICIT_)?WORK_TREE|INDEX_FILE|PREFIX|(ALTERNATE_)?OBJECT_DIRECTOR(Y|IES)|COMMON_DIR|GRAFT_FILE|SHALLOW_FILE
      |QUARANTINE_PATH|REFLOG_ACTION|INTERNAL_.*|PUSH_OPTION_.*)
    |NOTIFY_SOCKET|(LISTEN|WATCHDOG|MEMORY_PRESSURE)_.*|INVOCATION_ID|JOURNAL_STREAM|(MAIN|MANAGER|SYSTEMD_EXEC_)PID
    |M(AKE)?FLAGS|MAKE(LEVEL|OVERRIDES|_TERM.*)|NODE_(CHANNEL_.*|UNIQUE_ID)|VSCODE_(IPC_HOOK.*|PID)
    """,
    re.VERBOSE,
)
