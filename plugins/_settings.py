"""The options that only plugins read, and settings files, read with care: their size and depth have bounds, and each
problem is told with its line.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import ipaddress
import itertools
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    CATEGORIES,
    MB,
    Option,
    Settings,
    StartError,
    flag_of,
    is_identifier,
    iso,
    log,
    one_line,
    option_table,
    read_bool,
    read_choice,
    read_command,
    read_list,
    read_match,
    read_number,
    read_option,
    read_path,
    read_text,
)
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins._words import did_you_mean


def read_budget(value: Any) -> dict[str, float]:
    """By "issue" and "day" how much may be spent: ``5/issue,20/day``; an amount alone holds for both."""
    items = read_list(str(value) if isinstance(value, (int, float)) else value)
    if not items or not all(re.fullmatch(r"(?=.*[1-9])\d{1,12}(\.\d{1,9})?(/issue|/day)?", item) for item in items):
        raise ValueError("must be amounts above 0, for each issue and each day: 5, or 5/issue,20/day")
    pairs = [item.partition("/") for item in items]
    return {span: float(amount) for amount, _, given in pairs for span in ([given] if given else ["issue", "day"])}


def read_agent_may(value: Any) -> dict[str, tuple[str, ...]]:
    """Commands by agent type, "*" for every type: a list, or a TOML table of lists. Each is the beginning of a command,
    in words that no shell and no program's list of rules reads otherwise.
    """
    table = value if isinstance(value, dict) else {"*": value}
    may = {name: read_list(commands) for name, commands in table.items() if name == "*" or is_identifier(name)}
    word = r"[\w./][\w./:@+-]*"
    for command in itertools.chain(*may.values()):
        if len(command) > 200 or not re.fullmatch(rf"(?a:{word}( -{{0,2}}{word}(=[\w./:@+-]+)?)*)", command):
            raise ValueError(f"must be commands in plain words, separated by commas, which {command!r} is not")
    if len(may) < len(table) or not all(may.values()):
        raise ValueError("must name commands, for all agents or by agent type")
    return may


read_subject_token = read_match(r"[A-Za-z0-9_-]{1,64}", "must be 1 to 64 letters, digits, '_' or '-'")


AGENT_CATEGORIES = [name for name, category in CATEGORIES.items() if not category.people]


def read_agent_types(value: Any) -> dict[str, str]:
    """More agent types with their categories: a TOML table, or ``name=category`` separated by commas."""
    pairs = value.items() if isinstance(value, dict) else (each.partition("=")[::2] for each in read_list(value))
    table = dict(pairs)
    for name, category in table.items():
        if not is_identifier(name):
            raise ValueError(f"must be NAME=CATEGORY with the name of an agent type, which {name!r} is not")
        if category not in list(CATEGORIES):
            raise ValueError(
                f"must be NAME=CATEGORY with a category of {', '.join(AGENT_CATEGORIES)}, which {category!r} is not"
            )
    return table


def read_agent_commands(value: Any) -> dict[str, tuple[str, ...]]:
    """Commands of some agent types: a TOML table, or a JSON object."""
    try:
        table = value if isinstance(value, dict) else json.loads(read_text(value))
    except ValueError as error:
        raise ValueError(f"cannot be read as a JSON object: {error}") from None
    if not isinstance(table, dict) or not all(map(is_identifier, table)):
        raise ValueError("must be an object of agent types and commands")
    return {name: read_command(command) for name, command in table.items()}


class PluginOption(Option, frozen=True):
    """An option that only the plugin ``plugin`` reads: without that plugin the start is refused where it is given."""

    plugin: str = ""


def option(default: Any, read: Callable[[Any], Any], help: str, metavar: str = "VALUE", plugin: str = "") -> Any:
    """A field of PluginSettings."""
    return msgspec.field(default_factory=PluginOption(default, read, help, metavar, plugin))


class PluginSettings(Settings, frozen=True, eq=False, kw_only=True):
    """The core's options and those of the bundled plugins; the module makes its settings of this class."""

    agent_command: tuple[str, ...] | None = option(
        None,
        read_command,
        "command that runs an agent, with {task}, {prompt} and their like, or a known one's name",
        "CMD",
    )
    tls_cert: Path | None = option(None, read_path, "certificate chain (PEM): serve HTTPS", "FILE", "tls")
    tls_key: Path | None = option(None, read_path, "private key of --tls-cert (PEM)", "FILE", "tls")
    event_retention: int = option(86_400, read_number(1, 31_536_000), "how long events are kept", "SECONDS", "guard")
    event_limit: int = option(100_000, read_number(1, 1_000_000_000), "how many events are kept", "N", "guard")
    log_level: str = option(
        "info", read_choice("debug", "info", "warning", "error"), "debug, info, warning or error", "LEVEL"
    )
    log_format: str = option("text", read_choice("text", "json"), "text or json, on stderr", "FORMAT")
    storage_limit_mb: int = option(
        2000,
        read_number(1, 100_000_000),
        "how large the storage may become; what is to be stored is refused then",
        "MB",
        "guard",
    )
    request_timeout: int = option(
        60, read_number(1, 3600), "how long a request's head, and then its body, may take", "SECONDS", "strict"
    )
    max_connections: int = option(
        10_000, read_number(1, 1_000_000), "connections open at once, as far as the system allows", "N", "strict"
    )
    no_watch: bool = option(
        False, read_bool, "no file watcher; every request looks at the disk anyway", plugin="project_index"
    )
    no_fast: bool = option(False, read_bool, "HTTP/1.1 is served by Tornado's own server", plugin="fast")
    max_unsent_mb: int = option(
        256,
        read_number(1, 65_536),
        "memory for answers that clients have not read yet, a quarter of it for one token",
        "MB",
        "unsent",
    )
    jwt_public_key: Path | None = option(
        None,
        read_path,
        "public key (PEM: RSA, P-256 or Ed25519) of an issuer whose tokens are taken beside our own",
        "FILE",
        "issuers",
    )
    agent_types: dict[str, str] = option({}, read_agent_types, "more agent types, NAME=CATEGORY", "LIST", "specialists")
    agent_context_tokens: int = option(
        50_000, read_number(500, 2_500_000), "size of a spawned agent's context file, at 4 bytes each", "N", "brief"
    )
    agent_commands: dict[str, tuple[str, ...]] = option(
        {}, read_agent_commands, "commands of some agent types: a JSON object", "JSON"
    )
    issue_files: tuple[str, ...] = option(
        ("issues", "docs/issues", ".github/issues", "todo", ".beads", "issues.json", "issues.jsonl", "gh"),
        read_list,
        "places where issues are written down: folders, exports as JSON, and gh, GitHub's program",
        "PLACE",
    )
    agent_retention: int = option(
        604_800,
        read_number(1, 31_536_000),
        "how long an ended agent's context and output are kept",
        "SECONDS",
        "keeper",
    )
    agent_retention_mb: int = option(
        500, read_number(1, 1_000_000), "how much of these is kept, the latest first", "MB", "keeper"
    )
    agent_environment: tuple[str, ...] = option(
        (),
        read_list,
        "variables that agents get although they may run other code or mark a session",
        "NAME",
        "environment",
    )
    agent_may: dict[str, tuple[str, ...]] = option(
        {},
        read_agent_may,
        "commands that agents may run unasked, such as 'pytest, git commit'; by agent type in a settings file",
        "COMMANDS",
        "launchers",
    )
    agent_approvals: str = option(
        "deny",
        read_choice("ask", "deny"),
        "an agent's question for permission: ask a person, or deny it",
        "CHOICE",
        "hooks",
    )
    no_synthesis: bool = option(False, read_bool, "no result is stored in the name of an agent that stored none")
    max_agents_per_issue: int = option(
        50, read_number(1, 1_000_000), "spawns on one issue, ended ones included", "N", "limits"
    )
    max_depth: int = option(4, read_number(1, 100), "how deep agents may spawn agents", "N", "limits")
    budget_usd: dict[str, float] = option(
        {},
        read_budget,
        "what agents may cost, such as 5/issue,20/day; when it is spent no more are started",
        "USD",
        "meter",
    )
    budget_tokens: dict[str, float] = option(
        {},
        read_budget,
        "tokens that agents may use, such as 2000000/issue, without those read from a cache",
        "N",
        "meter",
    )
    backend: str | None = option(
        None, read_text, "servers of the log that sidecars on many machines share: nats://host:4222,...", "URLS", "nats"
    )
    nats_creds: Path | None = option(None, read_path, "credentials file for --backend", "FILE", "nats")
    nats_tls_ca: Path | None = option(
        None, read_path, "certificates that --backend's servers are checked by", "FILE", "nats"
    )
    nats_tls_cert: Path | None = option(None, read_path, "our certificate for --backend", "FILE", "nats")
    nats_tls_key: Path | None = option(None, read_path, "private key of --nats-tls-cert", "FILE", "nats")
    nats_domain: str | None = option(None, read_subject_token, "JetStream domain", "NAME", "nats")
    nats_replicas: int = option(
        0, read_number(0, 5), "servers that keep the log; 0 is three in a cluster of servers, else one", "N", "nats"
    )
    nats_prefix: str = option(
        "cco", read_subject_token, "what names of streams and subjects begin with", "NAME", "nats"
    )
    nats_synced: bool = option(
        False,
        read_bool,
        "the servers have sync_interval: always, so that what they confirm outlives a loss of power",
        plugin="nats",
    )
    nats_timeout: int = option(
        10,
        read_number(1, 300),
        "how long a write waits for the log, an election of its servers say, before it is refused",
        "SECONDS",
        "nats",
    )
    nats_snapshot_entries: int = option(
        10_000, read_number(1, 10_000_000), "entries of the log after which a snapshot takes their place", "N", "nats"
    )

    def __post_init__(self) -> None:
        """Raises StartError where an option is given without the one that it needs, or names what cannot be."""
        needs = {"tls_cert": "tls_key", "tls_key": "tls_cert", "nats_tls_key": "nats_tls_cert"}
        # A file may hold the rest for a backend that a variable names at some machines, and not for agents' commands.
        typed = [name for name in option_table() if name.startswith("nats_") and ":" not in self.where(name)]
        needs |= {name: "backend" for name in typed if name not in needs}
        for name, other in needs.items():
            if getattr(self, name) != option_table()[name].default and not getattr(self, other):
                refuse(f"{self.where(name)}: needs {flag_of(other)} beside it")
        for name, (known, form) in NAMED.items():
            value = getattr(self, name)
            for text in (value,) if isinstance(value, str) else value:
                if not known(text):
                    refuse(f"{self.where(name)}: {text!r} must be {form}")

    def where_of(self, name: str, key: str) -> str:
        """Where a table's option has ``key``, for messages: its line in a settings file, else as ``where``."""
        file, _, place = self.where(name).partition(":")
        option = place.rpartition(" ")[2]
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # it may have changed since
            text, table = tables(self.root / file)
            if isinstance(table.get(option), dict):
                return f"{file}:{line_of(text, option, key)}: {option}.{key}"
        return self.where(name)

    def command_of(self, agent_type: str) -> tuple[str, ...] | None:
        return self.agent_commands.get(agent_type, self.agent_command)

    def log_handler(self) -> logging.Handler:
        from cco_sidecar_plugins._program import LogLines

        handler = LogLines(sys.stderr)
        if self.log_format == "json":
            handler.setFormatter(JsonFormatter())
        return handler

    def may(self, agent_type: str) -> tuple[str, ...]:
        """The beginnings of commands that agents of a type may run unasked."""
        return tuple(command for kind in ("*", agent_type) for command in self.agent_may.get(kind, ()))

    def unknown_types(self, known: Collection[str]) -> list[str]:
        """A problem for each agent type that is not ``known`` in the tables that are by type."""
        tables: dict[str, Collection[str]] = {"agent_may": self.agent_may, "agent_commands": self.agent_commands}
        return [
            f"{self.where_of(option, name)}: unknown agent type {name}{did_you_mean(name, known)}"
            for option, table in tables.items()
            for name in table
            if name not in {"*", *known}
        ]

    @classmethod
    def read_files(cls, root: Path) -> dict[str, tuple[str, Any, Path]]:
        """By option (where it is set, value, root), from pyproject.toml and cco.toml, which wins. Raises StartError."""
        given: dict[str, tuple[str, Any, Path]] = {}
        for file in ("pyproject.toml", "cco.toml"):
            for key, (where, value) in read_file(root / file).items():
                name = key.replace("-", "_")
                try:
                    check_key(file, key, where, value)
                    if (faults := FAULTS.get()) is not None and name not in faults.given:
                        read_option(name, where, value, root)  # else read where it has a say
                except StartError as error:
                    refuse(str(error))
                else:
                    given[name] = where, value, root
        return given


class Faults(list[str]):
    """What is wrong in settings; of the options in ``given`` a flag or a variable has the say, whatever files hold."""

    def __init__(self, given: Iterable[str]) -> None:
        super().__init__()
        self.given = set(given)


FAULTS: contextvars.ContextVar[Faults | None] = contextvars.ContextVar("FAULTS", default=None)


@contextlib.contextmanager
def collected_faults(flags: Collection[str] = ()) -> Iterator[list[str]]:
    """Meanwhile settings are made without what is wrong in files and variables, or does not go together: all of it is
    here. ``flags`` are the options that were typed.
    """
    faults = Faults(flags)
    token, taken = FAULTS.set(faults), dict[str, str]()
    for name in option_table():
        variable = f"CCO_SIDECAR_{name.upper()}"
        if variable in os.environ and name not in flags:
            try:
                read_option(name, variable, os.environ[variable])
                faults.given.add(name)
            except StartError as error:
                faults.append(str(error))
                taken[variable] = os.environ.pop(variable)
    try:
        yield faults
    finally:
        os.environ |= taken
        FAULTS.reset(token)


def refuse(problem: str) -> None:
    """Raises StartError, unless faults are collected."""
    if (faults := FAULTS.get()) is None:
        raise StartError(problem)
    if problem not in faults:  # settings are read more than once
        faults.append(problem)


def is_address(host: str) -> bool:
    """Whether a host that looks like an address is one; a name always is."""
    if ":" not in host and not re.fullmatch(r"[0-9.]+", host):
        return True
    try:
        socket.inet_aton(host) if ":" not in host else ipaddress.IPv6Address(host)
    except (OSError, ValueError):
        return False
    return True


def is_host_name(text: str) -> bool:
    return bool(re.fullmatch(r"(?a)\*|[\w-]+(\.[\w-]+)*\.?|[0-9a-fA-F:.]+", text)) and is_address(text)


def is_origin(text: str) -> bool:
    """As browsers send it: no path, not even a slash."""
    return bool(re.fullmatch(r"null|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+", text))


NAMED = {  # options that name hosts: whether a text can be one, and what it has to be
    "host": (is_address, "a host name or an address"),
    "allowed_host": (is_host_name, "a host name or an address, without a scheme, a port and brackets"),
    "cors_origin": (is_origin, "like https://host or https://host:port, in small letters and without a path"),
}


def check_key(file: str, key: str, where: str, value: Any) -> None:
    """Raises StartError for a key of a settings file that is no option, and for a table that holds options."""
    known = sorted(name.replace("_", "-") for name in option_table() if name != "root")
    place = "in [tool.cco-sidecar] itself" if file == "pyproject.toml" else "in no table, before the first one"
    if key == "root":
        raise StartError(f"{where}: is where settings files lie, so none sets it: use --root or CCO_SIDECAR_ROOT")
    if key.replace("_", "-") not in known:
        close = did_you_mean(key, known)
        raise StartError(f"{where}: unknown option{close or f'; options stand {place}' * isinstance(value, dict)}")
    for inner in value if isinstance(value, dict) else ():
        if inner.replace("_", "-") in known:
            raise StartError(f"{where}: {inner} is an option, which stands {place}")


def read_file(path: Path) -> dict[str, tuple[str, Any]]:
    """(where it is set, value) by key of our table in a settings file, {} without a file. Raises StartError."""
    try:
        text, table = tables(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", one_line(error))
        problem = f"{path.name}:{found[2]}: {found[1]} ({found[3]})" if found else f"{path.name}: {one_line(error)}"
        if path.name == "cco.toml":
            refuse(problem)
        else:  # the project's own file, not ours to judge
            warn_once(path, problem)
        return {}
    if not isinstance(table, dict):
        refuse(f"{path.name}:{line_of(text, 'cco-sidecar')}: tool.cco-sidecar must be a table")
        return {}
    return {key: (place_of(path.name, text, key, value), value) for key, value in table.items()}


@functools.cache
def warn_once(path: Path, problem: str) -> None:
    """Say what is wrong with a settings file, which a command may read again, for the running service for example."""
    log.warning("%s: it is not read for settings", problem)


def place_of(file: str, text: str, key: str, value: Any) -> str:
    """Where an option is set: file, line and key, in a table those of the first part that is refused."""
    parts = value if isinstance(value, dict) and key.replace("-", "_") in option_table() else {}
    for name, part in parts.items():
        try:
            option_table()[key.replace("-", "_")].read({name: part})
        except (ValueError, RecursionError):
            return f"{file}:{line_of(text, key, name)}: {key}.{name}"
    return f"{file}:{line_of(text, key)}: {key}"


def tables(path: Path) -> tuple[str, Any]:
    """The text and our table of a settings file. Raises what is wrong with it."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(MB + 1)
    if len(content) > MB:
        raise ValueError("it has over 1 MB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        column = error.start - content.rfind(b"\n", 0, error.start)
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"it is not UTF-8 (at line {line}, column {column})") from None
    if DEEP_KEY.search(text):
        raise ValueError("a key has over 100 parts")
    import tomllib  # here alone: where no file is TOML the start does without

    table = tomllib.loads(text)
    return text, table.get("tool", {}).get("cco-sidecar", {}) if path.name == "pyproject.toml" else table


KEY_PART = r"(?:[\w-]++|\"[^\"\n]*+\"|'[^'\n]*+')"
# tomllib's time grows by the square of a key's parts.
DEEP_KEY = late_pattern(rf"(?<![\w-]){KEY_PART}(?:\s*+\.\s*+{KEY_PART}){{100}}")


def line_of(text: str, *keys: str) -> int:
    """The number of the line of a settings file that sets the last of ``keys``, each of which stands in the table of
    the one before it; 1 where it cannot be found.
    """
    found = re.search(r"^[ \t]*+\[[ \t]*+tool[ \t]*+\.[ \t]*+[\"']?cco-sidecar", text, re.MULTILINE)
    for key in keys:
        setting = re.compile(rf"^[^#\n]*?(?<![\w-]){re.escape(key)}[\"']?\s*[=.\]]", re.MULTILINE)
        found = setting.search(text, found.start() if found else 0)
    return text.count("\n", 0, found.end()) + 1 if found else 1


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": iso(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(line | ({"traceback": self.formatException(record.exc_info)} if record.exc_info else {}))
