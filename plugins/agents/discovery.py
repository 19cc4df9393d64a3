"""The user's own agents: the files by which claude, codex, opencode and copilot define agents become agent types.

They are looked for in the repository, then in the user's home; of two with one name the first is taken. Such an agent
is started as itself, by its own program. The files are read anew at each look, so that what has changed since the start
is used by the next spawn; a new one is known as soon as somebody names it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import (
    AgentCommand,
    AgentLaunch,
    NextAgent,
    ResultFact,
    Settings,
    harmless,
    hookimpl,
    is_identifier,
    log_once,
    one_line,
    read_text_file,
    redact,
)
from cco_sidecar_plugins._hooks import only_where
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents import launchers
from cco_sidecar_plugins.agents._agent_types import BUILT_IN
from cco_sidecar_plugins.agents._front_matter import read_front_matter
from cco_sidecar_plugins.results._routing import settled_types

LIMIT = 64 * 1024  # bytes of a file
MAX_FILES = 200  # of a folder
WORD = 100 * 1024  # bytes of one word of a command line; Linux takes 128 kB


class Kind(Struct, frozen=True):
    """Where a program looks for agents. ``home`` is its folder in the user's home, ``variable`` what moves that."""

    folders: tuple[str, ...]
    variable: str
    home: str
    in_home: tuple[str, ...]
    ending: str = ".md"
    named_by_file: bool = False


KINDS = {  # in the order in which the first of one name is taken
    "claude": Kind((".claude/agents",), "CLAUDE_CONFIG_DIR", ".claude", ("agents",)),
    "codex": Kind((".codex/agents",), "CODEX_HOME", ".codex", ("agents",), ".toml"),
    "opencode": Kind((".opencode/agent", ".opencode/agents"), "XDG_CONFIG_HOME", ".config",
                     ("opencode/agent", "opencode/agents"), named_by_file=True),
    "copilot": Kind((".github/agents",), "COPILOT_HOME", ".copilot", ("agents",), ".agent.md", named_by_file=True),
}  # fmt: skip

LANGUAGE_WORDS = {
    "python": "python py django flask fastapi pytest", "rust": "rust cargo", "go": "go golang",
    "java": "java jvm spring maven gradle", "javascript": "javascript js node nodejs react vue express",
    "typescript": "typescript ts angular nextjs react vue node nodejs", "ruby": "ruby rails",
    "php": "php laravel symfony", "csharp": "csharp c# dotnet .net", "cpp": "cpp c++", "c": "c",
    "kotlin": "kotlin android", "swift": "swift ios", "scala": "scala", "elixir": "elixir phoenix",
    "dart": "dart flutter", "haskell": "haskell",
}  # fmt: skip
CATEGORY_WORDS = {  # the first whose word stands in the name; then the one with most words in the description
    "security": """security vulnerability vulnerabilities penetration pentest pentester threat threats owasp auditor
        audit compliance hardening""",
    "qa": "test tests tester testing qa quality e2e coverage pytest validator verifier accessibility performance",
    "documentation": "documentation document documents documenter docs readme changelog tutorial tutorials writer",
    "architect": "architect architecture planner orchestrator",
    "support": """review reviewer reviews research researcher analyst product manager triage triager explain explorer
        designer advisor assistant""",
    "coding": """developer engineer specialist programmer coder implement implements implementer implementation code
        coding debug debugger refactor refactoring build builder fix fixer frontend backend fullstack database devops
        migration """
    + " ".join(LANGUAGE_WORDS.values()),
}
WORDS = {category: frozenset(words.split()) for category, words in CATEGORY_WORDS.items()}
LANGUAGES = {language: frozenset(words.split()) for language, words in LANGUAGE_WORDS.items()}
OF_NAMES_ALONE = frozenset(
    "go c swift spring express node phoenix document build fix code manager".split()
)  # else English


class UserAgent(Struct, frozen=True, kw_only=True):
    """An agent that a file defines; ``place`` is the file, below ``~`` where the user's home has it."""

    agent_type: str
    own_name: str
    description: str
    program: str
    place: str
    instructions: str = ""  # the words by which codex is made this agent
    options: dict[str, str] = {}

    @property
    def category(self) -> str:
        """By its words, never the architect's for a word of the description alone: that type may spawn others."""
        named = words_of(self.agent_type)
        if by_name := next((category for category, words in WORDS.items() if named & words), ""):
            return by_name
        told = told_words(self.description)
        counts = {category: len(told & words) for category, words in WORDS.items() if category != "architect"}
        best = max(counts, key=lambda category: counts[category])
        return best if counts[best] else "support"


def words_of(text: str) -> set[str]:
    return set(re.findall(r"(?:c\+\+|c#|\.net|[a-z0-9]+)", text.lower()))


def told_words(description: str) -> set[str]:
    """The words of a description's beginning, without those that are also plain English."""
    return words_of(description[:500]) - OF_NAMES_ALONE


class Found(Struct):
    """The agents by type, and a line for each file that is none."""

    agents: dict[str, UserAgent] = {}
    problems: list[str] = []


def discover(root: Path, *, in_home: bool = True) -> Found:
    """The agents of a repository and, ``in_home``, of the user. Blocks."""
    found = Found()
    for base, folder, shown, program in places(root, in_home):
        try:
            names = sorted(name for name in os.listdir(base / folder) if name.endswith(KINDS[program].ending))
        except OSError:  # the usual case: there is none
            continue
        if len(names) > MAX_FILES:
            found.problems.append(f"{shown}: only the first {MAX_FILES} of {len(names)} files are read")
        for name in names[:MAX_FILES]:
            place = harmless(f"{shown}/{name}")
            try:
                agent = read_agent(base, f"{folder}/{name}", program, place)
                if first := found.agents.get(agent.agent_type):
                    raise ValueError(f"{first.place} has its name, {agent.agent_type}")
                found.agents[agent.agent_type] = agent
            except (ValueError, RecursionError) as error:  # tomllib raises both
                found.problems.append(f"{place} is no agent: {one_line(error)}")
    return found


def places(root: Path, in_home: bool) -> Iterator[tuple[Path, str, str, str]]:
    """(folder that no file may lie outside of, folder below it, how messages call that, program)."""
    for program, kind in KINDS.items():
        yield from ((root, folder, folder, program) for folder in kind.folders)
    for program, kind in KINDS.items() if in_home else ():
        base = Path(os.environ.get(kind.variable) or Path(os.path.expanduser("~")) / kind.home)
        if base.is_absolute():
            base, shown = Path(os.path.realpath(base)), f"~/{kind.home}"
            yield from ((base, folder, f"{shown}/{folder}", program) for folder in kind.in_home)


def read_agent(base: Path, path: str, program: str, place: str) -> UserAgent:
    """Raises ValueError where the file defines no agent."""
    if not (read := read_text_file(str(base), path, LIMIT)):
        raise ValueError("it is no text file in this folder")
    text, _, cut = read
    if cut:
        raise ValueError(f"it has over {LIMIT // 1024} kB")
    kind, name = KINDS[program], path.rpartition("/")[2]
    if kind.ending == ".toml":
        import tomllib  # here alone: where no file is TOML the start does without

        fields = {
            key: value for key, value in tomllib.loads(text.removeprefix("\ufeff")).items() if isinstance(value, str)
        }
    else:
        fields = read_front_matter(text, ("name", "description"))
    own = name.removesuffix(kind.ending) if kind.named_by_file else fields.get("name", "")
    agent_type = own.replace(" ", "-")
    if not own:
        raise ValueError("it says no name")
    if not is_identifier(agent_type):
        raise ValueError(f"its name {own[:50]!r} cannot be an agent type's")
    instructions = fields.get("developer_instructions", "") if program == "codex" else ""
    if program == "codex" and not instructions.strip():
        raise ValueError("it says no developer_instructions")
    if len(in_toml(instructions).encode()) > WORD:
        raise ValueError(f"its developer_instructions need over {WORD // 1024} kB on a command line")
    return UserAgent(
        agent_type=agent_type, own_name=own, description=fields.get("description", ""), program=program, place=place,
        instructions=instructions, options={key: fields[key] for key in CODEX_OPTIONS if key in fields},
    )  # fmt: skip


CODEX_OPTIONS = ("model", "model_reasoning_effort")  # of its files; what it may do is for the launcher to say


@hookimpl
def register_agent_types(settings: Settings) -> dict[str, str]:
    found = discover(settings.root)
    for problem in found.problems:
        log_once(problem)
    return {name: agent.category for name, agent in found.agents.items() if name not in BUILT_IN}


# -- started as themselves


@hookimpl(tryfirst=True)
def agent_command(launch: AgentLaunch, settings: PluginSettings) -> AgentCommand | None:
    """The command of an agent that a file defines. None where the settings have a command of their own, which may
    confine agents, or where a built-in type's name is meant and another program runs agents.
    """
    agent = discover(settings.root).agents.get(launch.agent_type)
    usual = launchers.known_name(launch.configured)
    chosen = launch.agent_type in settings.agent_commands or launch.agent_type in BUILT_IN
    if agent is None or not usual or (chosen and agent.program != usual):
        return None
    command = launchers.agent_command(msgspec.structs.replace(launch, configured=(agent.program,)), settings)
    assert command
    at = 2 if agent.program in ("codex", "opencode") else 1  # behind their subcommand
    argv = list(command.argv)
    return msgspec.structs.replace(command, argv=argv[:at] + as_itself(agent) + argv[at:])


def as_itself(agent: UserAgent) -> list[str]:
    """The words by which its program becomes the agent."""
    if agent.program != "codex":
        return ["--agent", agent.own_name]
    told = {"developer_instructions": agent.instructions} | agent.options
    return [word for name, value in told.items() for word in ("-c", f"{name}={in_toml(value)}")]


def in_toml(text: str) -> str:
    """``text`` in TOML's quotes. Braces are escaped, which would be placeholders."""
    written = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return written.replace("{", "\\u007b").replace("}", "\\u007d")


# -- proposed where they fit


def may_have_agents(facts: dict[str, Any]) -> bool:
    """Whether the repository has a folder in which agents could be. Looks at a few names."""
    root = str(facts["settings"].root)
    return any(os.path.lexists(f"{root}/{folder}") for kind in KINDS.values() for folder in kind.folders)


@hookimpl
@only_where(may_have_agents)
def next_agents(
    result: ResultFact,
    proposals: list[NextAgent],
    history: list[ResultFact],
    language: str,
    settings: PluginSettings,
) -> list[NextAgent] | None:
    """A built-in type gives way to an agent of the repository that fits. An issue that has worked with the built-in one
    keeps it; an agent that is settled is proposed no more.
    """
    if not launchers.known_name(settings.agent_command):
        return None
    own = list(discover(settings.root, in_home=False).agents.values())
    own = [agent for agent in own if agent.agent_type not in BUILT_IN and shutil.which(agent.program)]
    if not own:
        return None
    used, settled = {fact.agent_type for fact in (*history, result)}, settled_types([*history, result])
    chosen = []
    for item in proposals:
        keeps = item.agent_type in used or item.agent_type not in BUILT_IN
        agent, words = (None, []) if keeps else fitting(own, item.agent_type, language, settings.agent_types)
        if agent is None:
            chosen.append(item)
        elif agent.agent_type not in settled or BUILT_IN[item.agent_type] == "architect":
            why = f"{item.reason}; {agent.place} says {', '.join(words)}, so it takes the place of {item.agent_type}"
            chosen.append(NextAgent(agent.agent_type, item.priority, redact(why)[0]))
    return chosen


def fitting(
    own: list[UserAgent], built_in: str, language: str, categories: dict[str, str]
) -> tuple[UserAgent | None, list[str]]:
    """The agent that fits best in the place of a built-in type, and the words of it that say so."""
    category = BUILT_IN[built_in]
    wanted = LANGUAGES.get(built_in.removesuffix("-specialist"), WORDS[category] & ROLES.get(built_in, WORDS[category]))
    best: tuple[UserAgent | None, list[str]] = (None, [])
    for agent in sorted(own, key=lambda agent: agent.agent_type):
        if categories.get(agent.agent_type, agent.category) != category:
            continue
        words = words_of(agent.agent_type) | told_words(agent.description)
        spoken = {name for name, theirs in LANGUAGES.items() if words & theirs}
        fits = sorted(words & wanted)
        if len(fits) > len(best[1]) and (not spoken or language in spoken or language not in LANGUAGES):
            best = agent, fits
    return best


ROLES = {
    "test-engineer": frozenset("test tests tester testing qa pytest coverage".split()),
    "documentation-expert": frozenset("documentation document documents documenter docs readme writer".split()),
}
