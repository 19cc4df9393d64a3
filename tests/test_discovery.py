"""The user's own agents as agent types: which files are agents, of what category, how they start, where they are proposed."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from agent_harness import nothing_left, output, spawn, state
from conftest import Service, make_repository, plugin
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_hooks import run

from cco_sidecar import AgentLaunch, NextAgent, ResultFact, load_settings

__all__ = ["nothing_left"]
discovery = plugin("discovery")
front_matter = plugin("_front_matter")
CLAUDE = "---\nname: {}\ndescription: {}\n---\nYou are one of us.\n"
CODEX = 'name = "{}"\ndescription = "{}"\ndeveloper_instructions = "Be {{brief}}."\n'


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in discovery.KINDS.values():
        monkeypatch.delenv(kind.variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# -- front matter, with PyYAML as the oracle

PIECES = ["a", "b c", " ", "\n", "\n\n", ":", ": ", "#", " #", '"', "'", "\\", "\\n", "-", "- ", "é", "\t", "|", ">", "  x",
          "{", "[", "*", "&", "!", "\\\n", "%", "''", "0", "~", "\\x41", "\\ "]  # fmt: skip
SHAPES = ["{}", '"{}"', "'{}'", "|\n {}", ">\n {}", "|-\n  {}", ">+\n  {}", ">-\n {}", "\n {}", '\n  "{}"', "|2\n   {}"]


@settings(max_examples=1500)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.sampled_from(SHAPES),
    st.sampled_from([" ", "  ", "   "]),
)
def test_what_is_read_is_what_yaml_says(text: str, shape: str, indent: str) -> None:
    field = "description: " + shape.format(text.replace("\n", "\n" + indent))
    content = f"name: x\n{field}\nmodel: m\n"
    try:
        expected = yaml.safe_load(content)["description"]
        read = front_matter.read_front_matter(f"---\n{content}---\nbody", ("name", "description"))
    except (yaml.YAMLError, ValueError, TypeError):  # either refuses; that ours takes what it should is the next test's
        return
    if isinstance(expected, str | None):
        assert read == {"name": "x", "description": expected or ""}


@settings(max_examples=300)
@example("\xa0", None, 8)
@example("\u3000x\u2003", "|", 8)
@example("x\xa0", None, 200)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=60),
       st.sampled_from([None, '"', "'", "|", ">"]), st.sampled_from([8, 40, 200]))  # fmt: skip
def test_what_pyyaml_writes_is_read(text: str, style: Any, width: int) -> None:
    content = yaml.safe_dump(
        {"description": text, "tools": ["Read", {"a": 1}]}, default_style=style, width=width, allow_unicode=True
    )
    assert front_matter.read_front_matter(f"---\n{content}---\n", ("description",)) == {"description": text}


@pytest.mark.parametrize(("text", "expected"), [
    ("no front matter", {}),
    ("", {}),
    ("---\n---\nname: x", {}),
    ("\ufeff---\r\nname: 'it''s'\r\n# a comment\r\ntools:\r\n- Read\r\n- Write\r\n...\r\nname: y", {"name": "it's"}),
    ("---\nname: x # a comment\ndescription: Use it: always #1\n---", {"name": "x", "description": "Use it: always"}),
    ("---\nname: ~\ndescription:\n---", {"name": "", "description": ""}),
    ("---\nname: 12\nhooks:\n  Stop: [{a: &b 1}]\n---", {"name": "12"}),
    ("---\nname: x\n", "line 1: the front matter has no end"),
    ("---\nname: x\nname: y\n---", "line 3: name is there twice"),
    ("---\nname: 'x\n---", "line 2: name: its quotes do not end it"),
    ("---\nname: [x]\n---", r"line 2: name: it is no text: it begins with \["),
    ("---\nname:\n- x\n---", "line 2: name: it is no text"),
    ("---\nname: &a x\n---", "line 2: name: it is no text: it begins with &"),
    ('---\nname: "\\q"\n---', r"line 2: name: \\q means nothing"),
    ('---\nname: "\\U00110000"\n---', "line 2: name: chr"),
    ("---\nname: |x\n---", "line 2: name: '|x' is no text"),
    ("---\njust words\n---", "line 2: it is no field"),
    ("---\n  name: x\n---", "line 2: it is no field"),
])  # fmt: skip
def test_front_matter_is_read_or_refused_by_line(text: str, expected: dict[str, str] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"^{expected}"):
            front_matter.read_front_matter(text, ("name", "description"))
    else:
        assert front_matter.read_front_matter(text, ("name", "description")) == expected


# -- which files are agents


def test_the_files_of_all_programs_are_agents_and_the_repository_comes_first(home: Path, tmp_path: Path) -> None:
    root = make_repository(tmp_path / "repository")
    write(root, **{
        ".claude/agents/a.md": CLAUDE.format("fixer", "Fixes Python: always"),
        ".codex/agents/b.toml": CODEX.format("rust-wizard", "Rust"),
        ".opencode/agent/docs-writer.md": "---\ndescription: Writes\nmode: subagent\n---\n",
        ".opencode/agents/plain.md": "No front matter at all.",
        ".github/agents/audit.agent.md": "---\nname: A nice title\n---\n",
        ".claude/agents/code-reviewer.md": CLAUDE.format("code-reviewer", "Reviews"),
    })  # fmt: skip
    write(home, **{
        ".claude/agents/x.md": CLAUDE.format("fixer", "another"), ".claude/agents/y.md": CLAUDE.format("my tester", "of mine"),
        ".config/opencode/agents/z.md": "", ".copilot/agents/q.agent.md": "", ".codex/agents/h.toml": CODEX.format("h", ""),
    })  # fmt: skip
    found = discovery.discover(root)
    assert {name: (agent.program, agent.place, agent.category) for name, agent in found.agents.items()} == {
        "fixer": ("claude", ".claude/agents/a.md", "coding"),
        "code-reviewer": ("claude", ".claude/agents/code-reviewer.md", "support"),
        "rust-wizard": ("codex", ".codex/agents/b.toml", "coding"),
        "docs-writer": ("opencode", ".opencode/agent/docs-writer.md", "documentation"),
        "plain": ("opencode", ".opencode/agents/plain.md", "support"),
        "audit": ("copilot", ".github/agents/audit.agent.md", "security"),
        "my-tester": ("claude", "~/.claude/agents/y.md", "qa"),
        "h": ("codex", "~/.codex/agents/h.toml", "support"),
        "z": ("opencode", "~/.config/opencode/agents/z.md", "support"),
        "q": ("copilot", "~/.copilot/agents/q.agent.md", "support"),
    }
    assert found.agents["my-tester"].own_name == "my tester"
    assert found.problems == ["~/.claude/agents/x.md is no agent: .claude/agents/a.md has its name, fixer"]


def test_odd_files_are_no_agents_and_say_why(home: Path, tmp_path: Path) -> None:
    root, secret = make_repository(tmp_path / "repository"), tmp_path / "outside.md"
    secret.write_text(CLAUDE.format("outside", "x"))
    for name, content in {
        "01.md": "No front matter.", "02.md": "---\nname: [x\n---\n", "03.md": CLAUDE.format("big", "x" * 70_000),
        "04.md": CLAUDE.format("../up", "x"), "05.md": CLAUDE.format("--flag", "x"), "06.md": CLAUDE.format("'{prompt}'", "x"),
        "07.md": CLAUDE.format("twice", "x"), "08.md": CLAUDE.format("twice", "y"), "nul.md": "\0", "notes.txt": "not asked",
    }.items():  # fmt: skip
        write(root / ".claude/agents", **{name: content})
    (root / ".claude/agents/link.md").symlink_to(secret)
    (root / ".claude/agents/folder.md").mkdir()
    os.mkfifo(root / ".claude/agents/pipe.md")
    (root / ".opencode").symlink_to(tmp_path)
    write(tmp_path / "agent", **{"elsewhere.md": "x"})
    write(root / ".codex/agents", **{"1.toml": "name = ", "2.toml": 'name = "bare"', "3.toml": "x=" + "[" * 60_000})
    for number, sign in enumerate(("{", "}", "{}"), 4):  # which are written as six signs each
        write(
            root / ".codex/agents",
            **{f"{number}.toml": f'name = "n{number}"\ndeveloper_instructions = "{sign * 18_000}"'},
        )
    found = discovery.discover(root)
    assert list(found.agents) == ["twice"]
    told = "\n".join(found.problems)
    for problem in (
        "01.md is no agent: it says no name", "02.md is no agent: line 2: name", "03.md is no agent: it has over 64 kB",
        "04.md is no agent: its name '../up'", "05.md is no agent: its name '--flag'", "06.md is no agent: its name '{prompt}'",
        "08.md is no agent: .claude/agents/07.md has its name", "nul.md is no agent: it is no text file",
        "link.md is no agent: it is no text file in this folder", "folder.md is no agent", "pipe.md is no agent",
        "elsewhere.md is no agent: it is no text file in this folder", "1.toml is no agent: Invalid value",
        "2.toml is no agent: it says no developer_instructions", "3.toml is no agent", *(f"{n}.toml is no agent: its developer_instructions need over 100 kB" for n in (4, 5, 6)),
    ):  # fmt: skip
        assert problem in told, problem
    assert len(found.problems) == 18 and "outside" not in told
    write(root / ".github/agents", **{f"{number:03}.agent.md": "" for number in range(201)})
    assert ".github/agents: only the first 200 of 201 files are read" in discovery.discover(root).problems


@pytest.mark.parametrize(("name", "description", "category"), [
    ("pytest-runner", "", "qa"), ("security-code-reviewer", "", "security"), ("backend-architect", "", "architect"),
    ("helper", "You plan the architecture", "support"), ("helper", "Implements features in Python", "coding"),
    ("helper", "Reviews and tests: runs tests, checks coverage", "qa"), ("helper", "go through it", "support"), ("go-dev", "", "coding"),
])  # fmt: skip
def test_the_category_follows_from_words(name: str, description: str, category: str) -> None:
    agent = discovery.UserAgent(agent_type=name, own_name=name, description=description, program="claude", place="x")
    assert agent.category == category


# -- how they start

SHOW = "import json, sys\nprint(json.dumps([sys.argv[0].rpartition('/')[2], *sys.argv[1:]]))\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on whose PATH each program tells how it was called; it is started before there are agents."""
    folder = tmp_path_factory.mktemp("discovery")
    (folder / "bin").mkdir()
    for name in ("claude", "codex", "opencode", "copilot"):
        (folder / "bin" / name).write_text(f"#!{sys.executable}\n{SHOW}")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    commands = json.dumps({"go-specialist": ["codex"], "ruby-specialist": ["/bin/echo", "own"]})
    env = {"PATH": path, "HOME": str(folder), "XDG_CONFIG_HOME": "", "CLAUDE_CONFIG_DIR": "", "CODEX_HOME": ""}
    running = Service(
        make_repository(folder / "repository"), folder / "storage", "--agent-commands", commands, env=env
    ).start()
    write(running.root, **{
        ".claude/agents/t.md": CLAUDE.format("Py-Tester", "Runs pytest"), ".codex/agents/r.toml": CODEX.format("rustacean", "Rust")
        + 'model = "o5"\nmodel_reasoning_effort = "low"\nsandbox_mode = "danger-full-access"\n',
        ".opencode/agent/scribe.md": "---\ndescription: docs\n---\n", ".github/agents/guard.agent.md": "---\ndescription: x\n---\n",
        ".claude/agents/rust.md": CLAUDE.format("rust-specialist", "x"), ".codex/agents/go.toml": CODEX.format("go-specialist", "x"),
        ".codex/agents/java.toml": CODEX.format("java-specialist", "x"), ".claude/agents/rb.md": CLAUDE.format("ruby-specialist", "x"),
    })  # fmt: skip
    yield running
    assert running.stop() == 0 and "Traceback" not in running.log, running.log


@pytest.mark.parametrize(("agent_type", "words"), [
    ("Py-Tester", ["claude", "--agent", "Py-Tester", "-p"]),
    ("rustacean", ["codex", "exec", "-c", 'developer_instructions="Be \\u007bbrief\\u007d."', "-c", 'model="o5"', "-c",
                   'model_reasoning_effort="low"', "--sandbox", "workspace-write"]),
    ("scribe", ["opencode", "run", "--agent", "scribe"]),
    ("guard", ["copilot", "--agent", "guard"]),
    ("rust-specialist", ["claude", "--agent", "rust-specialist"]),  # a built-in type: its usual program is this one
    ("go-specialist", ["codex", "exec", "-c", 'developer_instructions="Be \\u007bbrief\\u007d."']),
    ("java-specialist", ["claude", "-p"]),  # and of this one another
    ("ruby-specialist", ["own"]),
])  # fmt: skip
def test_an_agent_is_started_as_itself_without_a_restart(service: Service, agent_type: str, words: list[str]) -> None:
    spawned = spawn(service.client(), agent_type=agent_type)
    assert state(service.client(), spawned["agent_id"])["state"] == "completed"
    said = output(service.client(), spawned["agent_id"]).strip()
    if words == ["own"]:
        assert said == "own"
        return
    called = json.loads(said)
    at = called.index(words[1])  # words of the plugin meter may come before
    assert called[:1] + called[at : at + len(words) - 1] == words
    for word in called:
        if word.startswith("developer_instructions="):
            assert tomllib.loads(word) == {"developer_instructions": "Be {brief}."}


def test_a_command_of_the_users_own_runs_all_agents(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **{".claude/agents/t.md": CLAUDE.format("py-tester", "Runs pytest")})
    launch = AgentLaunch(
        agent_id="a",
        agent_type="py-tester",
        issue_id="i",
        task="",
        context_file="",
        agent_folder=str(tmp_path),
        prompt="p",
    )
    given = load_settings({"root": str(tmp_path)})
    for configured, first in (
        (("sandbox", "{prompt}"), ""),
        (("sandbox",), ""),
        (("codex",), "claude"),
        (("claude",), "claude"),
    ):
        command = discovery.agent_command(msgspec.structs.replace(launch, configured=configured), given)
        assert (command.argv[0] if command else "") == first
    monkeypatch.setenv("PATH", "")
    assert discovery.agent_command(launch, given) is None


def test_the_table_says_where_types_come_from(service: Service) -> None:
    words = "agent types --format json --agent-types mine=qa,scribe=coding"
    told = run(*words.split(), cwd=service.root, HOME=str(service.root))
    rows = {row["agent_type"]: row for row in json.loads(told.stdout)["agent_types"]}
    assert (rows["Py-Tester"]["from"], rows["Py-Tester"]["category"]) == (".claude/agents/t.md", "qa")
    assert (rows["scribe"]["from"], rows["scribe"]["category"]) == (".opencode/agent/scribe.md", "coding")
    assert (rows["mine"]["from"], rows["python-specialist"]["from"]) == ("settings", "built in")


# -- where they are proposed


def test_an_agent_of_the_repository_takes_the_place_of_a_built_in_type_and_says_why(service: Service) -> None:
    client = service.client()
    assert client.store("python-specialist", issue="routed")["next_agents"][0] == {
        "agent_type": "Py-Tester", "priority": "high", "reason": "coding-success: validation of the implementation; "
        ".claude/agents/t.md says pytest, tester, so it takes the place of test-engineer",
    }  # fmt: skip
    after = client.store("Py-Tester", issue="routed")["next_agents"]
    assert "test-engineer" not in str(after) and after[0]["agent_type"] == "scribe"


def test_an_agent_that_nobody_has_named_yet_is_proposed(service: Service) -> None:
    write(service.root, **{".claude/agents/new.md": CLAUDE.format("newcomer", "Runs all tests with pytest, for QA")})
    try:
        proposed = service.client().store("python-specialist", issue="routed-anew")["next_agents"]
    finally:
        (service.root / ".claude/agents/new.md").unlink()
    assert proposed[0]["agent_type"] == "newcomer"


def fact(agent_type: str, category: str, status: str = "success") -> ResultFact:
    return ResultFact(agent_type, category, status)


CODED, TESTED = fact("python-specialist", "coding"), fact("test-engineer", "qa")


@pytest.mark.parametrize(("files", "history", "language", "wanted"), [
    ({"a": "Runs tests"}, [], "python", ["a", "security-auditor"]),
    ({"a": "Runs Java tests with Maven"}, [], "python", ["test-engineer", "security-auditor"]),
    ({"a": "Runs Java tests", "b": "Writes tests"}, [], "python", ["b", "security-auditor"]),
    ({"a": "Runs tests", "b": "Runs tests, measures coverage"}, [], "python", ["b", "security-auditor"]),
    ({"a": "Looks for vulnerabilities"}, [], "python", ["test-engineer", "a"]),
    ({"a": "Runs tests"}, [TESTED], "python", ["test-engineer", "security-auditor"]),  # which the issue knows already
    ({"a": "Runs tests"}, [fact("a", "qa")], "python", ["security-auditor"]),
    ({"a": "Measures performance"}, [], "python", ["test-engineer", "security-auditor"]),  # another kind of qa
    ({}, [], "python", ["test-engineer", "security-auditor"]),
])  # fmt: skip
def test_who_is_proposed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], history: list[ResultFact], language: str,
    wanted: list[str],
) -> None:  # fmt: skip
    write(tmp_path, **{f".claude/agents/{name}.md": CLAUDE.format(name, text) for name, text in files.items()})
    write(
        home, **{".claude/agents/mine.md": CLAUDE.format("tester", "Runs tests, pytest, coverage")}
    )  # never a surprise
    write(tmp_path, **{"bin/claude": ""})
    (tmp_path / "bin/claude").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    given = load_settings({"root": str(tmp_path)})
    proposals = [NextAgent("test-engineer", "high", "why"), NextAgent("security-auditor", "medium", "why")]
    result = fact("security-auditor", "security") if history == [fact("a", "qa")] else CODED
    assert discovery.may_have_agents({"settings": given}) == bool(files)  # else nobody asks
    answer = discovery.next_agents(result, proposals, history, language, given)
    assert [item.agent_type for item in (proposals if answer is None else answer)] == wanted
    other = msgspec.structs.replace(given, agent_command=("sandbox", "{prompt}"))
    assert discovery.next_agents(result, proposals, history, language, other) is None
    monkeypatch.setenv("PATH", "")
    assert discovery.next_agents(result, proposals, history, language, given) is None
