"""The command line as people expect it: the nearest word for a misspelt one, help by section, options before and after.

The commands are those of the core and of every plugin's ``register_commands``. A command loads the plugin that has it
and no more of them than it takes to find that.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import io
import itertools
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jwt
import msgspec

import cco_sidecar
from cco_sidecar import (
    GOOD,
    NAME_IN_WORDS,
    PERMISSIONS,
    Settings,
    StartError,
    command_serve,
    complain,
    flag_of,
    is_identifier,
    load_hooks,
    load_settings,
    mint_token,
    option_table,
    read_bool,
    read_option,
    settings_from,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import read_sidecar_json
from cco_sidecar_plugins._hooks import SafeHooks, bundled_plugins, contains
from cco_sidecar_plugins._program import escape_unencodable
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import meant, nearest
from cco_sidecar_plugins.commands._printing import speaks_unicode
from cco_sidecar_plugins.commands._table import CLIENT_OPTIONS, FORMATS, Command, settle

SECTIONS = ("Start", "Agents and what they exchange", "Look", "Set up", "More")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What was typed, with its command as ``run``. Raises StartError."""
    parser = new_parser(words)
    options, unknown = parser.parse_known_args(words, argparse.Namespace(parser=parser))
    if unknown:
        parser.refuse(unknown)
    chosen: CommandParser = options.parser
    if chosen.commands and chosen is not parser:
        chosen.commands.look_for("")
        chosen.error(
            f"{chosen.prog.removeprefix('cco ')}: a command must follow, one of {', '.join(chosen.commands.listed())}"
        )
    check_options(options, chosen.prog, chosen.row)
    options.run = getattr(options, "run", serve)
    return options


def check_options(options: argparse.Namespace, command: str, row: Command | None) -> None:
    """Refuse what ``command`` would pass over, and settle the format."""
    formats = row.formats if row else FORMATS
    for name in (*CLIENT_OPTIONS, *option_table()):
        if row is None or name in row.options or name not in vars(options):
            continue
        flag, own = flag_of(name), own_command()
        if name not in option_table():
            raise StartError(f"{flag}: {command} starts the service; this is for the commands that talk to one")
        raise StartError(
            f"{flag}: the service decides this: start it with `{own} {flag} ...`, or set {flag[2:]} in cco.toml and"
            " start it again"
        )
    options.format = getattr(options, "format", formats[0])
    if options.format not in formats:
        raise StartError(f"--format: {options.format!r} is unknown{meant(options.format, formats)}")
    out = sys.stdout
    if options.format == "json" and isinstance(out, io.TextIOWrapper) and not speaks_unicode(out):
        out.reconfigure(encoding="ascii", errors=escape_unencodable.__name__)  # JSON has no other encodings


def serve(options: argparse.Namespace) -> int:
    """Serve; where the port is taken, say by whom."""
    try:
        return command_serve(options)
    except StartError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        from cco_sidecar_plugins.commands._health import explain_bind_error

        raise StartError(explain_bind_error(settings_from(options), error.__cause__), error.exit_code) from None


def token(options: argparse.Namespace) -> int:
    from cco_sidecar_plugins.commands._running import running_nearby, running_settings, with_secret

    for name in ("agent_id", "issue"):
        if (value := getattr(options, name)) is not None and not is_identifier(value):
            raise StartError(f"{flag_of(name)}: {value!r} {NAME_IN_WORDS}")
    ttl = None if options.ttl is None else read_option("token_ttl", "--ttl", options.ttl)
    listed = options.permissions
    permissions = None if listed is None else [name.strip() for name in listed.split(",") if name.strip()] or [listed]
    for name in permissions or ():
        if name not in PERMISSIONS:
            raise StartError(f"--permissions: {name!r} names none of {', '.join(PERMISSIONS)}")
    settings = with_running_type(with_secret(running_settings(settings_from(options))), options)
    if read_sidecar_json(settings.storage) is None and (nearby := running_nearby(settings)):
        complain(f"the token is for {settings.root}, for which no service runs; {nearby}")
    facts = {"issue_id": options.issue, "ttl": ttl, "bound": options.agent_id is not None}
    mint = functools.partial(mint_token, settings, options.type, options.agent_id, **facts)
    if permissions is not None:
        own = jwt.decode(mint(), options={"verify_signature": False})["permissions"]
        for name in permissions:
            if name not in own:
                raise StartError(f"--permissions: {options.type} has no {name}, only {', '.join(own)}")
    print(mint(permissions=permissions))
    return GOOD


def with_running_type(settings: Settings, options: argparse.Namespace) -> Settings:
    """The settings with the type's category as the running service has it, which a flag or plugin there may say."""
    from cco_sidecar_plugins.commands._client import running_types

    if read_sidecar_json(settings.storage) is None:  # none runs
        return settings
    told = running_types(options) or {"agent_types": []}
    found = {row["agent_type"]: row["category"] for row in told["agent_types"] if row["agent_type"] == options.type}
    known = typing.cast(PluginSettings, settings)
    return msgspec.structs.replace(known, agent_types=known.agent_types | found) if found else settings


def add_token_options(parser: CommandParser) -> None:
    parser.add_argument("--type", required=True, help="agent type, for example python-specialist")
    parser.add_argument("--agent-id", help="bind the token to this id")
    parser.add_argument("--issue", help="good for this issue only")
    parser.add_argument("--ttl", metavar="SECONDS", help="life (default: --token-ttl)")
    parser.add_argument("--permissions", metavar="LIST", help="narrow to these, separated by commas")


def command_plugins(options: argparse.Namespace) -> int:
    """What the running service says of its plugins; where none runs, or options name others, what would be loaded."""
    from cco_sidecar_plugins.commands._client import is_own, loaded_plugins
    from cco_sidecar_plugins.commands._printing import show

    if options.hooks:
        return show_hooks(options)
    found, whose = loaded_plugins(options, files_too=True)
    rows = [
        {
            "plugin": item.name,
            "source": item.source,
            "hooks": " ".join(item.hooks),
            "problem": item.problem or item.failure,
        }
        for item in sorted(found, key=lambda plugin: (not is_own(plugin), plugin.source, plugin.name))
    ]
    show(options, {"of": whose, "plugins": rows}, "plugins")
    if options.format == "table":
        print(f"(the plugins {whose})")
    return GOOD


def show_hooks(options: argparse.Namespace) -> int:
    from cco_sidecar_plugins.commands._hook_manual import manual, print_manual
    from cco_sidecar_plugins.commands._printing import show

    told = manual()
    if options.format != "table":
        return show(options, told, "hooks")
    print_manual(told)
    return GOOD


OWN_COMMANDS = {
    "serve": Command("serve the repository (the default)", serve, options=option_table(), section="Start"),
    "token": Command("print a token, and nothing else", token, section="Set up",
        options=(*CLIENT_OPTIONS, "token_ttl", "agent_types")),
    "plugins": Command("list the plugins and where they come from", command_plugins, section="Set up"),
}  # fmt: skip


# -- the parsers


def new_parser(words: Sequence[str] = ()) -> CommandParser:
    """The parser of ``cco`` itself; ``words`` say which settings, and with them which plugins, there are."""
    parser = CommandParser(prog="cco")
    parser.row = OWN_COMMANDS["serve"]
    parser.add_argument("--version", action="version", version=f"cco {cco_sidecar.__version__}")
    parser.take_shared_options()
    commands = parser.add_group()
    commands.more = load_commands(commands, words)
    for name, row in OWN_COMMANDS.items():
        shown = [option_parser()] if name == "serve" else []
        command = commands.add_parser(name, help=row.help, description=row.help, parents=shown)
        if name == "token":
            add_token_options(command)
        if name == "plugins":
            command.add_argument("--hooks", action="store_true", help="what plugins can do: each hook, its arguments")
        settle(command, row, commands)
    return parser


def load_commands(commands: Commands, words: Sequence[str]) -> Iterator[None]:
    """Add commands, those of one plugin a step: first of the bundled ones, whatever --no-plugins says, which is about
    the service, and of these first those that have one of ``words``, so that no others are loaded; then of all others.
    """
    names = [f'"{word}"'.encode() for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
    for file in sorted(
        bundled_plugins("def register_commands("), key=lambda file: not any(contains(file, name) for name in names)
    ):
        hooks, before = SafeHooks([]), set(commands.choices)
        hooks.load_files([file])
        collections.deque(hooks.ask("register_commands", commands=commands), 0)
        commands.by_plugin[file.stem] = commands.choices.keys() - before
        yield
    with contextlib.suppress(StartError):  # the settings cannot be read: what there is must do
        flags, _ = option_parser().parse_known_args(words)
        collections.deque(load_hooks(load_settings(vars(flags))).ask("register_commands", commands=commands), 0)
    yield


@functools.cache
def option_parser() -> cco_sidecar.CommandParser:
    """The core's, and for each switch its opposite, for what a settings file or a variable says otherwise."""
    parser = cco_sidecar.option_parser()
    for name in [name for name, option in option_table().items() if option.read is read_bool]:
        flag = flag_of(name)
        opposite = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")
        if opposite not in map(flag_of, option_table()):  # --plugins is taken
            parser.add_argument(
                opposite,
                dest=name,
                action="store_const",
                const=False,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
    return parser


@functools.cache
def shared_options() -> list[argparse.Action]:
    """What every command reads, before and after it, and refuses unless its row names it; no help but that of serve
    shows it.
    """
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--url", default=argparse.SUPPRESS)
    own.add_argument("--format", default=argparse.SUPPRESS)
    actions = [copy.copy(action) for action in (*option_parser()._actions, *own._actions)]
    for action in actions:
        action.help = argparse.SUPPRESS
    return actions


class CommandParser(cco_sidecar.CommandParser):
    """Names the nearest right word where the core's parser only says that one is wrong."""

    commands: Commands | None = None  # where it is a group
    row: Command | None = None  # where it comes from a table

    def __init__(self, **keywords: Any) -> None:
        formatter = functools.partial(argparse.HelpFormatter, max_help_position=32)
        own = {
            "formatter_class": formatter,
            "allow_abbrev": False,
            "conflict_handler": "resolve",
        }  # its own option wins
        super().__init__(**{**own, **keywords})

    def add_group(self) -> Commands:
        """Have commands follow it."""
        made = self.add_subparsers(action=Commands, title="commands", metavar="COMMAND", prog=self.prog)
        self.commands = typing.cast(Commands, made)
        return self.commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = list(args)
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stdout).write(message)  # argparse passes over what it cannot write

    def error(self, message: str) -> typing.NoReturn:
        if "arguments are required" in message and not self.commands:
            self.refuse_flags(self.words)  # one that is there misspelt is why it is missing
            takes_words = any(not action.option_strings for action in self._actions)
            missing = message.rpartition(": ")[2]
            names = {"/".join(action.option_strings) or action.metavar: action for action in self._actions}
            if missing in names:  # it alone
                message += f" ({names[missing].help})"
            if self.words and not takes_words and not self.words[0].startswith("-"):
                message += f"; did you mean {missing.partition(',')[0]} {self.words[0]}?"
        super().error(message)

    def refuse(self, words: Sequence[str]) -> typing.NoReturn:
        """Say of the first of ``words``, which nothing takes, what may have been meant."""
        self.refuse_flags(words)
        is_data = words[0].startswith("{") and "--data" in self._option_string_actions
        is_root = self.row is OWN_COMMANDS["serve"] and os.path.isdir(words[0])
        flags = [flag for flag in ("--issue", "--type") if flag in self._option_string_actions]
        named = " or ".join(f"{flag} {words[0]}" for flag in flags if not words[0].startswith("-"))
        other = "--data" if is_data else f"--root {words[0]}" if is_root else named
        hint = f", did you mean {other}?" if other else ""
        self.error(f"{words[0]!r}: {self.prog} takes no such argument{hint}")

    def refuse_flags(self, words: Sequence[str]) -> None:
        for flag in [word.partition("=")[0] for word in words if word.startswith("-")]:
            if flag not in self._option_string_actions:
                # What the command refuses may be misspelt too; else --issue would mean the service's --issue-files.
                refused = [each for each in shared_options() if self.row and each.dest not in self.row.options]
                names = {name for each in refused for name in each.option_strings}
                farther = {name for name in names if abs(len(name) - len(flag)) > 1}
                known = self._option_string_actions.keys() - farther
                others = [other for other in OTHER_FLAGS.get(flag, ()) if other.partition(" ")[0] in known]
                hint = f", did you mean {others[0]}?" if others else meant(flag, known)
                self.error(f"{flag}: unknown option{hint}")

    def take_shared_options(self) -> None:
        """Read our options too, except where the command has one of the same name."""
        for action in shared_options():
            if not self._option_string_actions.keys() & set(action.option_strings):
                self._add_action(action)

    def format_help(self) -> str:
        if self.commands:
            self.commands.look_for("")
        return overview(self.commands) if self.commands and self.prog == "cco" else super().format_help()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices and not isinstance(action, Commands):
            raise argparse.ArgumentError(action, f"{value!r} is unknown{meant(str(value), map(str, action.choices))}")


class Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """The commands of ``cco`` or of a group. Plugins are asked for theirs when a word is none of those that are
    there.
    """

    more: Iterator[None]  # each step adds some

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.by_plugin: dict[str, set[str]] = {}  # the names that a bundled plugin added

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Parse the rest by the parser of its first word, on top of what was said before it."""
        word, *rest = values
        if word == "help" and not self.look_for(word):
            word, *rest = [*itertools.takewhile(lambda each: not each.startswith("-"), rest), "--help"]
            if not rest:
                parser.parse_args([word])
        if not self.look_for(word):
            parser.refuse_flags(parser.words[: -len(values)])  # whose value ``word`` is
            parser.error(
                f"{f'{parser.prog} {word}'.removeprefix('cco ')}: no such command{self.hint(word, parser.prog)}"
            )
        namespace.parser = chosen = self.choices[word]
        chosen.take_shared_options()
        _, unknown = chosen.parse_known_args(rest, namespace)
        if unknown:
            chosen.refuse(unknown)

    def look_for(self, word: str) -> bool:
        """Whether there is such a command, in a plugin that was not asked so far if need be."""
        return word in self.choices or any(word in self.choices for _ in self.more)

    def hint(self, word: str, after: str) -> str:
        """How a message goes on that refuses ``word``."""
        if after == "cco" and word in OTHER_WORDS:
            return OTHER_WORDS[word]
        known = ["help", *(choice.dest for choice in self._choices_actions)]
        names = {name: f"{after} {name}".removeprefix("cco ") for name in known}
        for group, parser in self.choices.items():
            names = {name: f"{group} {name}" for name in parser.commands.listed()} | names if parser.commands else names
        same = next((ours for ours, others in SAME_WORDS.items() if word in others and ours in self.choices), "")
        if close := same or nearest(word, names):
            return f", did you mean {names[close]}?"
        if added := [name for name in self.listed() if name in self.by_plugin.get(word, ())]:
            return f", did you mean {added[0]}?" if not added[1:] else f"; the plugin {word} adds {', '.join(added)}"
        if after == "cco" and os.path.isdir(word):
            return f", did you mean --root {word}?"
        return f"; there are {', '.join(self.listed())}"

    def listed(self) -> list[str]:
        """The names that people type, in the same order whichever plugin was asked first."""
        names = [choice.dest for choice in self._choices_actions]
        return sorted(name for name in names if (row := self.choices[name].row) is None or row.section)


UPGRADE = "; bring its folder up to date, pip install . there, end the service and start it again"
OTHER_WORDS = {  # how other programs call what we have
    "start": ", did you mean serve?",
    "stop": "; the service stops on Ctrl-C, or on SIGTERM to its pid, which cco doctor tells",
    "shutdown": "; the service stops on Ctrl-C, or on SIGTERM to its pid, which cco doctor tells",
    "restart": "; end the service by Ctrl-C, or by SIGTERM to its pid, which cco doctor tells, and start it again",
    "upgrade": UPGRADE,
    "update": UPGRADE,
    "audit": "; audit.log in the storage, which cco doctor tells, says who did what",
    "tour": ", did you mean demo?",
    "version": ", did you mean --version?",
    "up": ", did you mean serve?",
    "init": "; nothing is to be set up: cco serves the repository around it, and cco doctor checks what it needs",
    "ps": ", did you mean agent list?",
    "ls": ", did you mean agent list?",
    "list": ", did you mean agent list, events list or results list?",
    "issue": "; cco export ISSUE shows its whole story, cco results list --issue ISSUE what was done",
    "ui": ", did you mean dashboard?",
    "open": ", did you mean dashboard?",
}
SAME_WORDS = {  # the same in a group
    "list": ("ls", "ps"),
    "spawn": ("start", "run", "create", "new"),
    "kill": ("stop", "delete", "rm", "cancel", "end"),
    "status": ("show", "info"),
    "get": ("show", "cat"),
    "subscribe": ("wait", "tail", "watch", "follow"),
    "publish": ("send", "emit"),
}
OTHER_FLAGS = {  # what is meant, the first of these that the command takes
    "--json": ("--format json",),
    "--csv": ("--format csv",),
    "--yaml": ("--format yaml",),
    "-n": ("--limit",),
    "-p": ("--port",),
    "-v": ("--log-level debug",),
    "--verbose": ("--log-level debug",),
    "--debug": ("--log-level debug",),
    "--type": ("--agent-type",),
    "--agent-type": ("--filter agent_type:TYPE", "--type"),  # of events --type is another one
    "--agent": ("--filter agent_id:ID",),
    "--agent-id": ("--filter agent_id:ID",),
    "--status": ("--filter status:STATUS",),
}


def overview(commands: Commands) -> str:
    """The help of ``cco`` itself: every command, by section, on one screen."""
    sections: dict[str, list[str]] = {section: [] for section in SECTIONS}
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    for name in commands.listed():
        parser = commands.choices[name]
        parts = f": {', '.join(parser.commands.listed())}" if parser.commands else ""
        lines = textwrap.wrap(f"{helps[name]}{parts}", 79, initial_indent=f"  {name:10} ", subsequent_indent=" " * 13)
        sections[parser.row.section if parser.row else SECTIONS[-1]] += lines
    body = "\n\n".join("\n".join([f"{section}:", *lines]) for section, lines in sections.items() if lines)
    return OVERVIEW.format(body)


OVERVIEW = """\
usage: cco [COMMAND] [OPTIONS]

Orchestration sidecar: lets a team of coding agents work on the repository around it.

{}

cco COMMAND --help explains one. Before or after any: --url URL, --root DIR,
--format table|json|csv. The service's options (cco serve --help) are variables
CCO_SIDECAR_<NAME> too, and keys of cco.toml or [tool.cco-sidecar] in pyproject.toml.
Exit codes: 0 good, 1 refused, 2 wrong use, 3 not reachable, 130 Ctrl-C, 143 SIGTERM.
"""
