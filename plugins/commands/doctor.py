"""The command ``doctor``: what most often keeps the service from working, and what to do about each.

Unless ``--salvage`` is given it leaves nothing changed. It starts no conversation and needs no network. Of a known
coding command line it runs ``--version`` and, where there is one, the command that tells whether somebody is logged in.
What a program does not tell is unknown here.
"""

from __future__ import annotations

import argparse
import errno
import functools
import http.client
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
import typing
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import tornado.netutil
from msgspec import Struct

import cco_sidecar
from cco_sidecar import (
    GOOD,
    MB,
    REFUSED,
    AgentTypes,
    Records,
    Server,
    Settings,
    StartError,
    StorageError,
    hookimpl,
    option_table,
    settings_from,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import explained, read_sidecar_json, what_denies
from cco_sidecar_plugins._settings import PluginSettings, collected_faults
from cco_sidecar_plugins._trust import own_certificate
from cco_sidecar_plugins.agents import launchers
from cco_sidecar_plugins.commands import _salvage
from cco_sidecar_plugins.commands._client import (
    Client,
    NotAnswering,
    NotReachable,
    Refused,
    is_own,
    loaded_plugins,
    opener_trusting,
    service_url,
    told_types,
)
from cco_sidecar_plugins.commands._health import about_certificate, ask_health, explain_bind_error, read_health
from cco_sidecar_plugins.commands._printing import show
from cco_sidecar_plugins.commands._running import is_held, running_service, running_settings, start_it
from cco_sidecar_plugins.commands._table import CLIENT_OPTIONS, Command, add_commands, arg
from cco_sidecar_plugins.context._git_facts import git_prefix
from cco_sidecar_plugins.context._watcher import folder_limit
from cco_sidecar_plugins.storage._database import check_database, check_places
from cco_sidecar_plugins.storage._log import REPLICA
from cco_sidecar_plugins.storage._recovery import misplaced_results

log = logging.getLogger("cco")

Finding = tuple[str, str]  # good, note or bad; what was found


@hookimpl
def register_commands(commands: Any) -> None:
    options = (*CLIENT_OPTIONS, *option_table())  # it says whether a start with these would do
    add_commands(commands, {
        "doctor": Command("check what the service needs, and say what to do", command_doctor, options=options,
            section="Look", arguments=[arg("--salvage", action="store_true",
                help="make a new database of what can be read of a damaged one, which is kept aside")]),
    })  # fmt: skip


@hookimpl
def part_class(settings: Settings, base: type) -> None:
    if issubclass(base, Server):
        told = nameless(settings)
        log.warning("%s", told) if told else None


def nameless(settings: Settings) -> str:
    """What to do where nothing in the folder's name can be in a project id, so that the id is as that of all such; ""
    where one was given.
    """
    name, project = Path(settings.root).name, settings.project
    if "project" in settings.places or re.search("[a-z0-9]", name.lower()):
        return ""
    shared = f"{name!r} has no letter from a to z and no digit, so the project id is {project}, as for all such folders"
    return f"{shared}: give it one of its own by --project, or project in cco.toml, which begins a new storage"


def command_doctor(options: argparse.Namespace) -> int:
    """Check what the service needs, say what to do; exit code 1 where something is wrong."""
    if options.salvage:
        print(_salvage.salvage(running_settings(settings_from(options))))
        return GOOD
    with collected_faults(option_table().keys() & vars(options)) as faults:
        return examine_all(options, faults)


def examine_all(options: argparse.Namespace, faults: list[str]) -> int:
    """Print a finding for each check; ``faults`` has what is wrong in settings, which is passed over."""
    settings, away = running_settings(settings_from(options)), asked_once(options)
    findings: dict[str, Finding] = {}
    if faults:
        findings["settings"] = "bad", f"{'; '.join(faults)}; no start goes on with that, the checks below do without it"
    elif told := warnings_of(typing.cast(PluginSettings, settings)):
        findings["settings"] = "note", "; ".join(told)
    checks: dict[str, Callable[[], str]] = {name: partial(check, settings) for name, check in DOCTOR_CHECKS.items()}
    checks["plugins"] = partial(check_plugins, options, away)
    known = told_by(away, options)
    findings |= {name: known.get(name) or examine(check) for name, check in checks.items()}
    try:
        findings |= examine_agents(settings.root, agent_programs(options, typing.cast(PluginSettings, settings), away))
    except Refused as error:
        findings["agent command"] = "note", f"the running service does not tell: {error}"
    findings |= ({} if away else examine_log(options)) | examine_left_agents(settings)
    with suppress(ImportError):  # its file may be gone
        try:
            findings |= import_module("cco_sidecar_plugins.commands.connect").findings(settings)
        except OSError as error:
            findings["connections"] = "bad", explained(error)
    rows = [{"check": name, "verdict": verdict, "finding": finding} for name, (verdict, finding) in findings.items()]
    show(options, {"checks": rows}, "checks")
    return REFUSED if any(row["verdict"] == "bad" for row in rows) else GOOD


def asked_once(options: argparse.Namespace) -> NotReachable | None:
    """Why nobody answers; None where somebody does. Asked for each check anew, one that hangs takes a minute."""
    try:
        Client(options).health()
    except NotReachable as error:
        return error
    except StartError:  # which the checks tell
        pass
    return None


def told_by(away: NotReachable | None, options: argparse.Namespace) -> dict[str, Finding]:
    """The findings that follow where the repository's own service lets us wait."""
    if not isinstance(away, NotAnswering) or service_url(getattr(options, "url", None), os.environ.get("SIDECAR_URL")):
        return {}
    return {"service": ("bad", str(away)), "port": ("note", "taken by the running service, which does not answer")}


def warnings_of(settings: PluginSettings) -> list[str]:
    """What the next start will warn of in settings, but for programs, which have findings of their own."""
    commands = [(settings.where_of("agent_commands", name), each) for name, each in settings.agent_commands.items()]
    if settings.agent_command:
        commands.append((settings.where("agent_command"), settings.agent_command))
    amiss = (f"{where}: {problem}" for where, words in commands for problem in launchers.words_amiss(words))
    uncounted: list[str] = []
    with suppress(ImportError):  # its file may be gone
        uncounted = import_module("cco_sidecar_plugins.agents.meter").uncounted(settings)
    return unknown_types(settings) + list(dict.fromkeys(amiss)) + uncounted


def unknown_types(settings: PluginSettings) -> list[str]:
    """What the next start will warn of in tables that are by agent type."""
    if not (settings.agent_commands or settings.agent_may):
        return []
    log.setLevel(logging.ERROR)  # of the plugins their own check tells
    try:
        return settings.unknown_types(AgentTypes(cco_sidecar.load_hooks(settings), settings).categories)
    except StartError:  # likewise
        return []


def examine(check: Callable[[], str]) -> Finding:
    try:
        finding = check()
    except StartError as error:
        return "bad", str(error)
    except OSError as error:
        return "bad", explained(error)
    return ("note", finding[6:]) if finding.startswith("note: ") else ("good", finding)


def check_storage(settings: Settings) -> str:
    if settings.storage.resolve().is_relative_to(settings.root):
        raise StartError(f"{settings.storage} lies inside the repository, where no secret may lie: name another folder")
    if not settings.storage.exists():
        try_to_make(settings.storage)
        return "note: not there yet; the first start makes it"
    facts = settings.storage.lstat()
    others = hasattr(os, "geteuid") and facts.st_uid != os.geteuid()
    if others or not os.access(settings.storage, os.R_OK | os.W_OK | os.X_OK):
        raise StartError(f"{what_denies(settings.storage)}, or use another --storage")
    if hasattr(os, "geteuid") and facts.st_mode & 0o022:
        raise StartError(f"{settings.storage} must be yours alone: chown it to yourself and chmod 700 it")
    database, in_use = database_of(settings), is_held(settings)
    check_database(database, thorough=True, in_use=in_use)
    check_places(settings.storage)
    if wrong := list(itertools.islice(misplaced_results(settings.storage), 5)):
        raise StartError(f"in {settings.storage}: {'; '.join(wrong)}")
    free = shutil.disk_usage(settings.storage).free
    if free < 100 * MB:
        raise StartError(f"only {free // MB} MB are free on the disk of {settings.storage}: make room")
    if not database.exists():
        return missing_database(database, in_use=in_use)
    found = f"{settings.storage}, {KINDS[database.name]} sound, {free // MB} MB free"
    if hasattr(os, "geteuid") and facts.st_mode & 0o077:
        return f"note: {found}; others can read it, until the next start or token"
    return found


def try_to_make(storage: Path) -> None:
    """Make a folder where the storage's first one will be, and remove it. Raises StartError where that cannot be."""
    above = next(folder for folder in storage.parents if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".cco-doctor-", dir=above).cleanup()
    except OSError as error:
        because = f"no folder can be made in {above} ({error.strerror})"
        raise StartError(f"{storage} cannot be made, for {because}: use another --storage or XDG_STATE_HOME") from None


KINDS = {cco_sidecar.Storage.FILE: "database", REPLICA: "replica of the log"}


def missing_database(database: Path, *, in_use: bool) -> str:
    """What the next start does without it. Raises StartError where a service uses it."""
    is_replica = database.name == REPLICA  # the log has all that it had
    if in_use:
        put_back = "" if is_replica else "put it back, or "
        raise StartError(f"{database} is gone, though a service uses it: {put_back}start the service again")
    if not is_replica and {path.name for path in database.parent.iterdir()} <= {"jwt.secret", "lock"}:
        return "note: no database is there yet; the first start makes it"  # a token made the one, a look the other
    makes = "it of the log" if is_replica else "an empty one, unless you put the old one back"
    return f"note: {database} is not there; the next start makes {makes}"


def database_of(settings: Settings) -> Path:
    """Where many machines share a log the replica of it: the options say so, or the storage, which has no other."""
    own, replica = settings.storage / cco_sidecar.Storage.FILE, settings.storage / REPLICA
    shared = typing.cast(PluginSettings, settings).backend
    return replica if shared or (replica.exists() and not own.exists()) else own


def check_secret(settings: Settings) -> str:
    path = settings.storage / "jwt.secret"
    if settings.jwt_secret:
        return "given by configuration"
    if not path.exists():
        return "note: not there yet; the first start or token makes it"
    if hasattr(os, "geteuid") and path.stat().st_mode & 0o077:
        raise StartError(f"others can read {path}: chmod 600 it, or delete it to end all tokens")
    cco_sidecar.make_or_read_secret(path)
    return "there, for you alone"


@functools.lru_cache(1)  # of one that is held it is known after a second
def check_lock(settings: Settings) -> str:
    if not is_held(settings):
        return "free"
    if info := running_service(settings):
        return f"held by the running service, pid {info.pid}, as it should be"
    return "note: held by a process that has not announced itself; it may be starting: look again in a moment"


def check_service(settings: Settings) -> str:
    """What the service that runs for this repository says of itself."""
    info = read_sidecar_json(settings.storage)
    if not info:
        return f"note: none runs for {settings.root}; {start_it(settings)}"
    if not psutil.pid_exists(info.pid):
        return f"note: none runs; the last one, pid {info.pid}, ended without a word: a start puts everything right"
    try:
        health = read_health(ask_health(info.url, 5)[1])
        if not health:
            raise LookupError
        if health["project_id"] != info.project_id or info.instance_id not in ("", health.get("instance_id")):
            raise StartError(f"what answers on {info.url} is not the service of this repository, pid {info.pid}")
        wrong = [
            f"{name}: {text}" for name in ("storage", "event_bus") if (text := health["checks"][name]) != "healthy"
        ]
        version = health["version"]
    except (OSError, http.client.HTTPException) as error:
        raise StartError(f"pid {info.pid} does not answer on {info.url}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise StartError(f"what answers on {info.url} is no sidecar") from None
    if wrong:
        raise StartError(f"the running service, pid {info.pid}, is not healthy: {'; '.join(wrong)}")
    but = ""
    if version != cco_sidecar.__version__:
        but += f"; it is version {version}, this command is {cco_sidecar.__version__}"
    if untrusted := distrust_of(info.url, settings.storage):
        but += f"; commands do not trust it here ({untrusted.verify_message}): {about_certificate(untrusted)}"
    return f"{'note: ' if but else ''}pid {info.pid} on {info.url} is healthy{but}"


def distrust_of(url: str, storage: Path) -> ssl.SSLCertVerificationError | None:
    """Why clients in this environment do not take the certificate of who serves ``url``, if it has one."""
    with suppress(OSError):  # what else may be wrong was asked for before
        try:
            opener_trusting(True, *own_certificate(storage)).open(f"{url}/health", timeout=5).close()
        except urllib.error.URLError as error:
            return error.reason if isinstance(error.reason, ssl.SSLCertVerificationError) else None
    return None


def check_port(settings: Settings) -> str:
    if info := running_service(settings):
        return f"the running service listens on {info.url}"
    try:
        for listener in tornado.netutil.bind_sockets(settings.port, settings.host):
            listener.close()
    except OSError as error:
        problem = explain_bind_error(settings, error)
        if error.errno != errno.EADDRINUSE:
            raise StartError(problem) from None
        problem += "; `cco run` without --port takes a free one by itself"
        if "port" in settings.places:
            raise StartError(problem) from None
        return f"note: {problem}"  # the default one is another repository's, as it may be
    return f"{settings.host} port {settings.port} is free" if settings.port else "0, so a start takes a free one"


def check_project(settings: Settings) -> str:
    problem = nameless(settings) or others_alone(settings)
    return f"note: {problem}" if problem else settings.project


def others_alone(settings: Settings) -> str:
    """What to do where the storage has results and agents, and none of the project: of a copy under another name, say;
    "" where it is not so.
    """
    try:
        place = f"{database_of(settings).as_uri()}?mode=ro"
        with closing(sqlite3.connect(place, uri=True, timeout=5)) as connection:
            question = "select project from result union select project from agent order by project"
            stored = [row[0] for row in connection.execute(question)]
    except (OSError, sqlite3.Error):  # which the check of the storage tells
        return ""
    if not stored or settings.project in stored:
        return ""
    others = ", ".join(stored[:5])
    return (
        f"of {settings.project} the storage has nothing, but of {others}: --project, or project in cco.toml, names it"
    )


def check_git(settings: Settings) -> str:
    if not shutil.which("git"):
        return "note: git is not installed: where .gitignore may exclude files there are no contexts; install it"
    try:
        prefix = git_prefix(settings.root)
    except cco_sidecar.GitError as error:
        raise StartError(f"no context can be made of {settings.root}: {error}") from None
    if prefix is None:
        return f"note: {settings.root} is no git repository; `git init` gives it history"
    return f"repository at {settings.root}"


def check_watcher(settings: Settings) -> str:
    folders, watched = sum(1 for _ in os.walk(settings.root)), folder_limit()
    if folders > watched:
        return (
            f"note: {folders} folders, watched are {watched} at most; contexts stay fresh by the look at the disk that"
            " each request takes"
        )
    return f"{folders} folder{'s' * (folders != 1)} of {watched} that may be watched"


def examine_log(options: argparse.Namespace) -> dict[str, Finding]:
    """How the running service stands to the servers of its log; nothing where it shares none."""
    try:
        told = Client(options).call("GET", "/status")["storage"].get("cluster")
    except StartError:  # which the checks of the service and of the plugins tell
        return {}
    if told is None:
        return {}
    if told["problem"]:
        return {"log": ("bad", told["problem"])}
    if told["away"]:
        names = ", ".join(told["away"])
        return {
            "log": (
                "note",
                f"of its servers these are away, or not up to date: {names}; the loss of another one may stop writing."
                " One whose disk was full stays so until it is started again",
            )
        }
    return {"log": ("good", f"connected to {told['connected_to']}, and none of its servers is known to be away")}


def examine_left_agents(settings: Settings) -> dict[str, Finding]:
    """The agents that a service left running, and how they are ended; nothing where one has them, or there are none."""
    try:
        database = database_of(settings)
        if not database.exists() or is_held(settings):
            return {}
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            connection.row_factory = sqlite3.Row
            rows = Records(connection).unfinished_agents(settings.project)
    except (OSError, sqlite3.Error, StorageError):  # which the check of the storage tells
        return {}
    living = [row for row in rows if row["birth"] and cco_sidecar.birth_of(row["pid"]) == row["birth"]]
    if not living:
        return {}
    names = [f"{row['id']} (pid {row['pid']}, since {cco_sidecar.iso(row['started'])})" for row in living]
    more = [f"{len(names) - 5} more"] if len(names) > 5 else []
    command = own_command(settings)
    how = f"`{command}` goes on with what is left, and `{command} agent kill ID` then ends one"
    return {"agents left": ("note", f"of a service that has ended: {', '.join([*names[:5], *more])}; {how}")}


def check_plugins(options: argparse.Namespace, away: NotReachable | None) -> str:
    if away and getattr(options, "url", None):
        raise away
    try:
        loaded, whose = loaded_plugins(options, ask=not away)
    except Refused as error:
        if error.status == 401:  # as every other command would hear
            raise StartError(f"the running service does not tell: {error}") from None
        return f"note: the running service does not tell: {error}"
    faulty = [f"{plugin.name}: {plugin.problem}" for plugin in loaded if plugin.faulty]
    if faulty:
        raise StartError(f"the next start refuses {'; '.join(faulty)}")
    wrong = [f"skipped {plugin.name}: {plugin.problem}" for plugin in loaded if plugin.problem]
    wrong += [
        f"{plugin.name} failed {plugin.failures} time{'s' * (plugin.failures != 1)}, last: {plugin.failure}"
        for plugin in loaded
        if plugin.failure
    ]
    if wrong:
        return f"note: {'; '.join(wrong)}"
    own = [plugin.name for plugin in loaded if is_own(plugin)]
    number = sum(plugin.source != "built in" for plugin in loaded) - len(own)
    return f"{', '.join([*own, f'{number} bundled'])}: the plugins {whose}"


DOCTOR_CHECKS: dict[str, Callable[[Settings], str]] = {
    "storage": check_storage, "secret": check_secret, "lock": check_lock, "service": check_service, "port": check_port,
    "project": check_project, "git": check_git, "watcher": check_watcher,
}  # fmt: skip


# ---- The programs that run agents
# ----------------------------------------------------------------------------------------------


class Login(Struct, frozen=True):
    """How a program's login shows: a variable that holds a key, a file below the home, or the words of a command
    (``yes``, ``no``).
    """

    variables: str = ""
    files: str = ""
    command: str = ""
    yes: str = ""
    no: str = ""


# Seen with claude 2.1.197, codex 0.169.0, gemini 0.61.0, opencode 1.18.33, qwen 0.15.10, copilot 1.0.102, cline 3.0.65
# and kilo 7.7.7, without a network.
LOGINS = {
    "claude": Login(
        command="auth status", yes=r'"loggedIn": true', no=r'"loggedIn": false',
    ),
    "codex": Login(
        "CODEX_API_KEY", command="login status", yes=r"^(Logged in|API key configured)", no=r"^Not logged in",
    ),
    "gemini": Login("GEMINI_API_KEY", ".gemini/oauth_creds.json"),
    # has models that need none
    "opencode": Login(command="auth list", yes=r"[1-9]\d* (credential|environment variable)|_API_KEY"),
    "kilo": Login(command="auth list", yes=r"[1-9]\d* (credential|environment variable)|_API_KEY"),
    "cline": Login(files=".cline/data/settings/providers.json"),
    "aider": Login("ANTHROPIC_API_KEY OPENAI_API_KEY GEMINI_API_KEY OPENROUTER_API_KEY DEEPSEEK_API_KEY",
        ".aider/oauth-keys.env"),
    "qwen": Login(
        "OPENAI_API_KEY", command="auth status", yes=r"\u2713 Authentication Method: (?!Qwen OAuth)",
        no=r"No authentication method|\(Incomplete\)",
    ),  # its own OAuth has ended
    "cursor-agent": Login("CURSOR_API_KEY"),
    "copilot": Login("COPILOT_GITHUB_TOKEN GH_TOKEN GITHUB_TOKEN COPILOT_PROVIDER_BASE_URL"),
}  # fmt: skip
SESSION = (
    "CLAUDECODE",
    "CLAUDE_CODE_ENTRYPOINT",
    "CLAUDE_CODE_SSE_PORT",
    "CODEX_SANDBOX",
    "CODEX_THREAD",
)  # marks of one around us


class AgentPrograms(typing.NamedTuple):
    """The first words of the commands that run agents; ``where`` says whose configuration that is."""

    default: str | None
    configured: bool
    of_types: dict[str, str]
    where: str


def agent_programs(options: argparse.Namespace, settings: PluginSettings, away: NotReachable | None) -> AgentPrograms:
    """Those of the running service; where none runs, or options say others, those of the next start. Raises Refused."""
    try:
        told = None if away or vars(options).keys() & {"agent_command", "agent_commands"} else told_types(options)
    except Refused:
        raise
    except StartError:  # which the checks of the service tell
        told = None
    if told:
        default = told["default_program"]
        rows = {row["agent_type"]: row["program"] for row in told["agent_types"] if row["program"] != default}
        return AgentPrograms(default, told["configured"], rows, "for the running service")
    of_types = {agent_type: command[0] for agent_type, command in settings.agent_commands.items()}
    return AgentPrograms(launchers.default_program(settings), settings.agent_command is not None, of_types, "here")


def examine_agents(root: Path, programs: AgentPrograms) -> dict[str, Finding]:
    """A finding for each command that runs agents."""
    default, where = programs.default, programs.where
    commands = {"agent command": default} if default else {}
    commands |= {f"agent command of {agent_type}": program for agent_type, program in programs.of_types.items()}
    words = list(dict.fromkeys(commands.values()))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = dict(zip(words, threads.map(partial(examine_program, root), words), strict=True))
    findings = {name: found[program] for name, program in commands.items()}
    if not default:
        known = ", ".join(launchers.PROGRAMS)
        none = (
            f"none is configured {where}, and none of {known} is on PATH: install one, or start the service with"
            " --agent-command"
        )
        findings = {"agent command": ("note", none)} | findings
    elif not programs.configured:
        verdict, finding = findings["agent command"]
        findings["agent command"] = (
            verdict,
            f"{finding}; it is the first known one on PATH, for none is configured {where}",
        )
    return findings


def examine_program(root: Path, word: str) -> Finding:
    """Whether what a command calls ``word`` can run and, of a known program, which version it is and whether somebody
    is logged in.
    """
    try:
        path = launchers.find_program(word, root)
    except PermissionError as error:
        return "bad", f"{word} is {error.strerror}"
    except FileNotFoundError:
        return "bad", f"{word} is not {launchers.place_of(word)}{launchers.how_to_have(word, root)}"
    name = Path(word).stem
    if name not in launchers.PROGRAMS:
        problem = refused_by_the_system(path)
        return ("bad", f"{word} {problem}") if problem else ("good", f"{word} is there and can be run")
    verdict, version = examine_version(path)
    if verdict == "bad":
        return verdict, f"{word} {version}"
    worse, told = examine_login(path, name)
    return max(verdict, worse, key=["good", "note", "bad"].index), f"{word} {version}, {told}"


def refused_by_the_system(path: str) -> str:
    """Why a file that may be executed will not be, as far as its first line tells; empty where nothing speaks against
    it. Only known programs are run here: another may begin to work whatever it is told."""
    with open(path, "rb") as file:
        head = file.readline(1024)
    if not head.startswith(b"#!"):
        plain = sys.platform == "linux" and not head.startswith(b"\x7fELF") and b"\0" not in head
        return "has no #! line that says what runs it" if plain else ""
    words = re.split(
        r"[ \t]+", head[2:].decode("utf-8", "replace").strip(" \t\n")
    )  # a carriage return belongs to the name
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return (
        ""
        if words and shutil.which(words[0])
        else f"begins with {head.decode('utf-8', 'replace').strip(chr(10))!r}, which is not there"
    )


def examine_version(path: str) -> Finding:
    try:
        code, said = ask_program(path, "--version")
    except OSError as error:
        return "bad", f"cannot be run: {error.strerror}"
    if code is None:
        return "note", f"of unknown version (it does not say it in {SECONDS:.0f} s and {MAX_OUTPUT // MB} MB)"
    if code:
        return "bad", f"does not work: its --version ended with {code}" + (
            f" and {first_line(said)!r}" if said.strip() else ""
        )
    found = re.search(r"(?<![\w.])\d+\.\d+(\.\d+)?([-.+]\w+)*", said)
    return ("good", found[0][:40]) if found else ("note", "of unknown version")


def examine_login(path: str, name: str) -> Finding:
    """Whether somebody is logged in, as far as the program tells."""
    login = LOGINS.get(name, Login())
    held = [f"{variable} is set" for variable in login.variables.split() if os.environ.get(variable)]
    held += [f"~/{file} is there" for file in login.files.split() if (Path.home() / file).is_file()]
    if not login.command:
        return (
            ("good", f"its login was not tried: {held[0]}") if held else ("note", "login unknown: it cannot be asked")
        )
    shown = f"`{name} {login.command}`"
    try:
        code, said = ask_program(path, *shlex.split(login.command))
    except OSError:  # --version says so
        return "note", "login unknown"
    if code is not None and re.search(login.yes, said, re.MULTILINE):
        return "good", f"logged in, {shown} says"
    if code is not None and login.no and re.search(login.no, said, re.MULTILINE):
        if held:  # of which that command does not know, in some versions
            return "note", f"login unknown: {shown} says no, but {held[0]}"
        return "bad", f"not logged in, {shown} says; log in by {launchers.PROGRAMS[name].log_in}"
    return "note", f"login unknown: {shown} does not tell"


SECONDS = 10.0  # Node programs take 0.5 to 4 s, on a busy machine 8
MAX_OUTPUT = MB


def ask_program(path: str, *words: str) -> tuple[int | None, str]:
    """(exit code, what it printed); no code where it had to be ended, for time or for its output. Nothing of it is left
    running. It has no terminal, no input and an empty folder. Blocks. Raises OSError where it cannot be started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SESSION)}
    environment |= {"NO_COLOR": "1", "LC_ALL": "C.UTF-8", "TERM": "dumb"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [path, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + SECONDS
        try:
            while (
                process.poll() is None
                and time.monotonic() < deadline
                and os.fstat(output.fileno()).st_size <= MAX_OUTPUT
            ):
                time.sleep(0.02)
            code = process.poll()
        finally:
            end_group(process)
        output.seek(0)
        return code, output.read(MAX_OUTPUT).decode("utf-8", "replace")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started in its session's group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except AttributeError:  # Windows
        process.kill()
    except (ProcessLookupError, PermissionError):  # all have ended
        pass
    process.wait()


def first_line(text: str) -> str:
    return next((line.strip()[:100] for line in text.splitlines() if line.strip()), "")
