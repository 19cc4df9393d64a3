"""``cco connect`` and ``cco disconnect``: what is written for a user's own sessions, that exactly this goes again, and the
bridge by which these sessions speak with the service.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import npm
import psutil
import pytest
from conftest import MODULE, Service, clean_environment, git, make_repository, plugin, until
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import MockModel
from real_agents import TOKEN, environment, install, make_home

from cco_sidecar import StartError, default_storage

edits = plugin("_edits")
connect = plugin("connect")
KEYS, OURS = ("mcpServers", "cco"), {"command": "/bin/cco", "args": ["mcp", "ü"]}
HOOK = {"hooks": [{"type": "command", "command": "cco hook"}]}
ADDED = [
    (KEYS, OURS),
    (("hooks", "Stop", "+"), HOOK),
    (("hooks", "Stop", "+"), {**HOOK, "matcher": ""}),
    (("hooks", "Start", "+"), HOOK),
]

FILES = [
    "{}", "{}\n", "{\n}\n", '{"a": 1}', '{\n  "a": 1\n}\n', '{\n\t"a": [1, 2]\n}', '{\r\n  "a": 1\r\n}\r\n', '\ufeff{"a":1}',
    '// mine\n{\n  "a": 1, // one\n  /* two */ "b": {"c": []},\n}\n// end', '{ /* nothing */ }', '{\n    "a": {},\n\n    "mcpServers": {}\n}',
    '{"mcpServers": {"x": {"command": "y"}}, "hooks": {}}', '{"mcpServers":{"x":{}},"hooks":{"Stop":[]}}',
    '{"a": -123456789012345678901234567890, "b": []}', '{"mcpServers": {}, "a": [1.0e5, -0.0]}',
    '{\n  "hooks": {\n    "Stop": [\n      {"hooks": []},  // my own\n    ]\n  },\n  "mcpServers": {\n    "x": {}  // last\n  }\n}\n',
]  # fmt: skip


def added(text: str, additions: list[Any]) -> tuple[str, list[str]]:
    pieces = []
    for addition in additions:
        text, piece = edits.add_json(text, addition)
        pieces.append(piece)
    return text, pieces


@pytest.mark.parametrize("text", [*FILES, '{"a": 1E400}', '{"a": [-1e999]}', '{"mcpServers": {"x": 9e9999}}'])
def test_what_is_added_to_json_goes_again_and_the_bytes_are_as_before(text: str) -> None:
    after, pieces = added(text, ADDED)
    value = edits.parse(after).value
    assert value["mcpServers"]["cco"] == OURS and value["hooks"]["Stop"][-2:] == [HOOK, {**HOOK, "matcher": ""}]
    assert edits.without(value, ADDED) | {"hooks": 0, "mcpServers": 0} == edits.parse(text).value | {
        "hooks": 0,
        "mcpServers": 0,
    }
    assert ("\r\n" in after) is ("\r\n" in text) and after.count("\n") >= text.count("\n")
    assert added(after, ADDED) == (after, [""] * len(ADDED)), "twice is once"
    assert edits.take_json(after, ADDED, pieces) == text


@pytest.mark.parametrize("text", FILES)
def test_what_is_added_goes_also_where_others_wrote_since(text: str) -> None:
    after, pieces = added(text, ADDED)
    theirs = [(("mcpServers", "later"), {"z": 1}), (("hooks", "Stop", "+"), "theirs"), (("own",), [1])]
    changed, _ = added(after, theirs)
    assert edits.parse(edits.take_json(changed, ADDED, pieces)).value == edits.without(
        edits.parse(changed).value, ADDED
    )
    again = json.dumps(edits.parse(changed).value, indent=4)  # as programs write their settings anew
    assert json.loads(edits.take_json(again, ADDED, pieces)) == edits.without(json.loads(again), ADDED)
    assert edits.take_json(text, ADDED, pieces) == text, "it is gone already"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["a", "hooks", "mcpServers", "Stop", "é"]), inner, max_size=3), max_leaves=12)  # fmt: skip


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["a", "hooks", "mcpServers", "Stop"]), JSON, max_size=4),
    st.sampled_from([None, 0, 1, "\t"]),
    st.booleans(),
)
def test_any_json_is_as_before_or_refused(value: dict[str, Any], indent: Any, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert edits.parse(text).value == value
    try:
        after, pieces = added(text, ADDED)
    except edits.NotEditable:
        hooks = value.get("hooks", {})
        lists = isinstance(hooks, dict) and all(isinstance(hooks.get(name, []), list) for name in ("Stop", "Start"))
        assert not lists or not isinstance(value.get("mcpServers", {}), dict)
        return
    assert edits.take_json(after, ADDED, pieces) == text


@pytest.mark.parametrize(("text", "problem"), [
    ("", "line 1: it is no JSON"), ("{", "line 1: it is no JSON"), ("{1: 2}", "line 1: it is no member"), ('{"a": 1 "b": 2}', "line 1: a comma is missing"),
    ('{\n"a": 1,\n"a": 2}', "line 3: 'a' is there twice"), ("{} {}", "line 1: something follows"), ("[1]", "its value is of another kind"),
    ('{"mcpServers": []}', "mcpServers is of another kind"), ('{"mcpServers": {"cco": 1}}', "mcpServers.cco is there already"),
    ('{"a": nope}', "line 1: it is no JSON"), ("[" * 50_000, "it is nested too deeply"), ('{"a": "\n"}', "line 1: it is no JSON"),
    ("{'a': 1}", "line 1: it is no JSON"), ('{"hooks": {"Stop": {}}}', "hooks.Stop is of another kind"), ('{"a": 01.}', "line 1: it is no JSON"),
])  # fmt: skip
def test_json_that_cannot_be_edited_says_why(text: str, problem: str) -> None:
    with pytest.raises(edits.NotEditable, match=problem):
        added(text, ADDED)


TABLE = (("mcp_servers", "cco"), {"command": "/bin/cco", "args": ["a b", "ü"], "timeout": 3})


@pytest.mark.parametrize(
    "text", ["", "a = 1", "# mine\r\na = 1\r\n", "[b]\nc = 'd' # e\n", "[mcp_servers.x]\ny = 1\n\n\n", "\ufeffa = 1\n"]
)
def test_what_is_added_to_toml_goes_again(text: str) -> None:
    after, piece = edits.add_toml(text, TABLE)
    assert edits.tables(after)["mcp_servers"]["cco"] == TABLE[1] and after.startswith(text)
    assert edits.add_toml(after, TABLE) == (after, "")
    assert edits.take_toml(after, [TABLE], [piece]) == text
    more = after + "\n[later]\nz = 1\n"
    assert edits.tables(edits.take_toml(more, [TABLE], [piece])) == edits.without(
        edits.tables(text + "\n[later]\nz = 1\n"), [TABLE]
    )
    assert "/bin/cco" not in edits.take_toml(more.replace("timeout = 3", "timeout = 4"), [TABLE], [piece])
    for inside in (
        "enabled = false\n",
        "enabled = false",
        '\n# by codex\n[mcp_servers.cco.tools.brief]\napproval_mode = "approve"\n',
        '[mcp_servers.cco.env]\nX = "1"\n[[mcp_servers.cco.more]]\n[[mcp_servers.cco.more]]\ny = 1\n\n[later]\nz = 1\n',
    ):
        left = edits.tables(edits.take_toml(after + inside, [TABLE], [piece]))
        later = "\n[later]\nz = 1\n" if "later" in inside else ""
        assert left in (edits.tables(text + later), edits.tables(f"{text}\n[mcp_servers]\n{later}")), inside


@pytest.mark.parametrize("before", ['a = """\n%s\nb\n"""\n', "a = '''\n%s\n'''\n", '# mine\na = """\n%s # b\n"""\n'])
def test_what_only_looks_like_our_table_is_not_cut(before: str) -> None:
    after, piece = edits.add_toml(before % "[mcp_servers.cco]", TABLE)
    with pytest.raises(edits.NotEditable, match="take it away by hand"):
        edits.take_toml(after.replace("timeout = 3", "timeout = 4"), [TABLE], [piece])
    assert edits.take_toml(after, [TABLE], [piece]) == before % "[mcp_servers.cco]"


@pytest.mark.parametrize(
    "text",
    [
        "mcp_servers = {}",
        "a = ",
        "[mcp_servers.cco]\nx = 1\n",
        "mcp_servers = 1",
        "[[mcp_servers]]\na = 1\n",
        "mcp_servers = [{}]\n",
        "[['mcp_servers']]\n[mcp_servers.x]\n",
    ],
)
def test_toml_that_cannot_be_edited_is_refused(text: str) -> None:
    with pytest.raises(edits.NotEditable):
        edits.add_toml(text, TABLE)


# -- the commands


class Desk:
    """A repository and a home of a user who types commands."""

    def __init__(self, root: Path) -> None:
        self.home, self.root = root.parent / "home", root
        self.home.mkdir()
        self.env = clean_environment(
            HOME=str(self.home), XDG_STATE_HOME=str(root.parent / "state"), CLAUDE_CONFIG_DIR=""
        )
        self.env.pop("CLAUDE_CONFIG_DIR")

    def cco(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(MODULE), *words], cwd=self.root, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Everything that is there, but for the state folder and git's own but info/exclude."""
        found = [
            path
            for base in (self.home, self.root)
            for path in base.rglob("*")
            if ".git" not in path.parts or path.name == "exclude"
        ]
        return {str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mode) for path in found}

    def linked(self, name: str) -> Desk:
        """Another work tree of the repository, in the same home."""
        other = copy.copy(self)
        other.root = self.home.parent / name
        git(self.root, "worktree", "add", "-q", "-b", name, str(other.root))
        return other

    def entry(self) -> tuple[str, list[str]]:
        """(the path by which claude finds the service's tools, the words by which it starts them)"""
        projects = json.loads((self.home / ".claude.json").read_text())["projects"]
        ((path, row),) = projects.items()
        return path, [row["mcpServers"]["cco"]["command"], *row["mcpServers"]["cco"]["args"]]


@pytest.fixture
def desk(repository: Path) -> Desk:
    return Desk(repository)


def test_all_programs_are_connected_and_everything_is_as_before(desk: Desk) -> None:
    (desk.home / ".claude.json").write_text('{"projects": {"/elsewhere": {}}, "theme": "dark"}')
    (desk.home / ".claude.json").chmod(0o640)
    (desk.root / "opencode.jsonc").write_text('// mine\n{"theme": "x"}\n')
    (desk.root / ".codex").mkdir()
    (desk.root / ".codex/hooks.json").write_text('{"hooks": {"Stop": []}} // mine')
    (desk.root / ".vscode").mkdir()
    (desk.root / ".vscode/mcp.json").write_text('{\n\t"servers": {}, // none\n}')
    git(desk.root, "add", "-A")
    git(desk.root, "commit", "-q", "-m", "settings")
    before = desk.files()
    for program in connect.PROGRAMS:
        shown = desk.cco("connect", program)
        assert "Nothing was written" in shown and "+" in shown and desk.files() == before
    for program in connect.PROGRAMS:
        written = desk.cco("connect", program, "--write")
        assert f"Written: start {program} anew" in written and "\n@@" not in written and "\n+" not in written
        (file,) = desk.home.parent.glob("state/cco-sidecar/*/connections.json")
        notes = connect.Notes(file.parent).by_program[program]
        assert notes and all(f"{connect.on_disk(desk.root, note.name).name}: written\n" in written for note in notes)
    once = desk.files()
    for program in connect.PROGRAMS:
        again = desk.cco("connect", program, "--write")
        assert f"{program} is connected" in again and "Written" not in again
    assert desk.files() == once
    assert git(desk.root, "status", "--short") == " M .codex/hooks.json\n M .vscode/mcp.json\n M opencode.jsonc\n"
    assert "git tracks opencode.jsonc" in shown_of(desk, "opencode")
    assert all("eyJ" not in content.decode(errors="replace") for content, _ in once.values()), "no token in any file"
    claude = json.loads((desk.home / ".claude.json").read_text())["projects"]
    words = claude[str(desk.root)]["mcpServers"]["cco"]["args"]
    assert claude["/elsewhere"] == {} and words[words.index("mcp") :][:4] == ["mcp", "claude", "--root", str(desk.root)]
    codex = (desk.root / ".codex/config.toml").read_text()
    assert "--storage" in codex and "--storage" not in words, "codex starts it without XDG_STATE_HOME"
    assert json.loads((desk.root / ".github/mcp.json").read_text())["mcpServers"]["cco"]["tools"] == ["*"]
    assert "sessionStart" in json.loads((desk.root / ".github/hooks/cco.json").read_text())["hooks"]
    assert connect._edits.parse((desk.root / "opencode.jsonc").read_text()).value["plugin"] == [
        (desk.root / ".cco-opencode.js").as_uri()
    ]
    rows = {
        row["check"]: row["verdict"]
        for row in json.loads(desk.cco("doctor", "--format", "json", "--port", "0").split("\n}")[0] + "\n}")["checks"]
    }
    assert [rows[f"connection of {program}"] for program in connect.PROGRAMS] == ["good"] * len(connect.PROGRAMS)
    for program in connect.PROGRAMS:
        assert f"{program}: " in desk.cco("disconnect", program)
    assert desk.files() == before and "No program is connected" in desk.cco("disconnect")


@pytest.mark.parametrize("named", [False, True])
def test_what_was_written_goes_also_where_the_storage_is_lost_and_files_that_are_empty_then(
    desk: Desk, named: bool
) -> None:
    (desk.root / ".qwen").mkdir()
    (desk.root / ".qwen/settings.json").write_text("{}")
    before = desk.files()
    programs = ("claude", "codex", "gemini", "opencode", "copilot", "cursor")
    for program in programs:
        desk.cco("connect", program, "--write")
    shutil.rmtree(desk.home.parent / "state")
    told = "".join(desk.cco("disconnect", *words) for words in ([[each] for each in programs] if named else [[]]))
    assert [f"{program}: " in told for program in programs] == [True] * len(programs)
    assert desk.files() == before and "No program is connected" in desk.cco("disconnect")


@pytest.mark.parametrize(
    ("text", "empty"), [('{"hooks": {"Stop": []}, "mcpServers": {}}', True), ('{"$schema": "x", "mcp": {}}', True),
        ("{\n}\n", True), ('{"mcp": 0}', False), ('{"mcp": false}', False), ('{"mcp": ""}', False), ("{} // mine", False),
        ('{"hooks": {"Stop": [[1]]}}', False), ('{"mcp": {"x": {}}}', False), ('{"mcp": {}, "y": {}}', False),
        ('{"mcp": {}, "z": []}', False), ('{"hooks": {"Stop": [{}]}}', False)],
)  # fmt: skip
def test_a_file_of_our_empty_containers_says_nothing(text: str, empty: bool) -> None:
    ours = [(("mcp", "cco"), {}), (("mcpServers", "cco"), {}), (("hooks", "Stop", "+"), {})]
    assert connect._edits.says_nothing("settings.json", text, ours) is empty


def shown_of(desk: Desk, program: str) -> str:
    desk.cco("disconnect", program)
    shown = desk.cco("connect", program)
    desk.cco("connect", program, "--write")
    return shown


@pytest.mark.parametrize("kind", ["the main one first", "the linked one first", "of a bare repository"])
def test_what_work_trees_share_stays_until_the_last_of_them_is_disconnected(desk: Desk, kind: str) -> None:
    """Lines of git's info/exclude, and what claude keeps by the repository and not by the work tree."""
    (desk.home / ".claude.json").write_text('{"theme": "dark"}')
    first, second, shared = desk, desk.linked("side"), desk.root
    if kind == "the linked one first":
        first, second = second, first
    elif kind == "of a bare repository":
        bare = copy.copy(desk)
        bare.root = desk.home.parent / "bare"
        git(desk.root, "clone", "-q", "--bare", ".", str(bare.root))
        first, second, shared = bare.linked("wing"), bare.linked("yard"), bare.root
    exclude = Path(git(first.root, "rev-parse", "--path-format=absolute", "--git-path", "info/exclude").strip())
    before = first.files() | second.files(), exclude.read_text()
    for tree in (first, second):
        for program in ("claude", "codex", "copilot"):
            tree.cco("connect", program, "--write")
    entry = desk.entry()
    assert entry[0] == str(shared) and entry[1][-2:] == ["--root", str(shared)]
    assert [git(tree.root, "status", "--short") for tree in (first, second)] == ["", ""]
    told = first.cco("disconnect")
    assert f"claude: ~/.claude.json stays as it is for {second.root}, another work tree of this repository" in told
    assert git(second.root, "status", "--short") == "" and desk.entry() == entry
    assert "claude is connected" in second.cco("connect", "claude"), "nothing of it is gone"
    second.cco("disconnect")
    assert (first.files() | second.files(), exclude.read_text()) == before


@pytest.mark.parametrize("kind", ["by git", "by hand", "and another is connected after that"])
def test_what_a_removed_work_tree_left_goes_with_the_next_disconnect(desk: Desk, kind: str) -> None:
    """Its lines of git's info/exclude and claude's entry; no other repository's notes matter, whatever they hold."""
    (desk.home / ".claude.json").write_text('{"theme": "dark"}')
    elsewhere = desk.home.parent / "state/cco-sidecar/other-0123456789ab"
    elsewhere.mkdir(parents=True)
    (elsewhere / "connections.json").write_text("{")
    before, side = desk.files(), desk.linked("side")
    for program in ("claude", "codex", "copilot"):
        side.cco("connect", program, "--write")
    if kind == "by git":
        git(desk.root, "worktree", "remove", "--force", str(side.root))
    else:
        shutil.rmtree(side.root)
    if kind == "and another is connected after that":
        desk.cco("connect", "claude", "--write")
    assert desk.files() != before
    told = desk.cco("disconnect")
    assert told.count("what a work tree that was removed had left is gone") == 3 and desk.files() == before
    assert "No program is connected" in desk.cco("disconnect")


@pytest.mark.parametrize("program", ["claude", "codex", "opencode"])
def test_git_is_asked_once_for_the_work_trees_and_a_file_of_its_own_that_was_not_there_goes_again(
    desk: Desk, program: str
) -> None:
    (desk.root / ".git/info/exclude").unlink()
    before, asked = desk.files(), desk.home.parent / "asked"
    (desk.home.parent / "bin").mkdir()
    shim = desk.home.parent / "bin/git"
    shim.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexec {shutil.which("git")} "$@"\n')
    shim.chmod(0o755)
    desk.env["PATH"] = f"{shim.parent}:{desk.env['PATH']}"
    for words in (["connect", program, "--write"], ["disconnect", program]):
        asked.write_text("")
        desk.cco(*words)
        assert asked.read_text().count("worktree list") == 1
    assert desk.files() == before


def test_a_session_of_claude_speaks_with_the_service_of_its_work_tree_or_else_of_the_one_that_was_connected(
    desk: Desk, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", desk.env["XDG_STATE_HOME"])
    side = desk.linked("side")
    side.cco("connect", "claude", "--write")

    def told_in(tree: Desk) -> str:
        call = {"name": "store_result", "arguments": {"issue_id": "tree-1", "status": "success"}}
        message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(desk.entry()[1], cwd=tree.root, env=desk.env, **streams) as bridge:
            assert bridge.stdin and bridge.stdout
            bridge.stdin.write(message + "\n")
            bridge.stdin.flush()
            return bridge.stdout.readline()  # before its input ends, after which it gives answers some seconds

    def count_of(service: Service) -> int:
        return len(service.client().get("/api/results", issue_id="tree-1").json()["results"])

    assert f"no sidecar runs for {side.root}; " in told_in(side) and f"no sidecar runs for {desk.root}; " in told_in(
        desk
    )
    main = make_service(root=desk.root, storage=default_storage(desk.root, "greeter"))
    assert "Stored as" in told_in(side) and "Stored as" in told_in(desk) and count_of(main) == 2
    own = make_service(root=side.root, storage=default_storage(side.root, "greeter"))
    assert "Stored as" in told_in(side) and (count_of(main), count_of(own)) == (2, 1)
    own.process.kill()
    own.process.wait()
    assert "Stored as" in told_in(side) and count_of(main) == 3, "the killed one is still announced"


def test_a_hook_of_codex_speaks_with_the_service_of_its_work_tree_or_else_of_the_one_that_was_connected(
    desk: Desk, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(desk.home))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    del desk.env["XDG_STATE_HOME"]
    desk.cco("connect", "codex", "--write")
    side = desk.linked("side")
    (row,) = json.loads((desk.root / ".codex/hooks.json").read_text())["hooks"]["SessionStart"]
    line = row["hooks"][0]["command"]
    main = make_service(root=desk.root, storage=default_storage(desk.root, "greeter"))

    def calls(tree: Desk) -> int:
        given = json.dumps({"hook_event_name": "SessionStart", "session_id": "s", "cwd": str(tree.root)})
        subprocess.run(line, shell=True, input=given, cwd=tree.root, env=desk.env, text=True, check=True)
        return main.log.count(" POST /api/hooks/codex 200 ")

    assert (calls(desk), calls(side)) == (1, 2)
    own = make_service(root=side.root, storage=default_storage(side.root, "greeter"))
    assert (calls(side), own.log.count(" POST /api/hooks/codex 200 "), calls(desk)) == (2, 1, 3)


def test_what_the_user_wrote_meanwhile_stays_and_what_cannot_be_edited_is_refused(desk: Desk) -> None:
    for program in ("gemini", "codex"):
        desk.cco("connect", program, "--write")
    settings = desk.root / ".gemini/settings.json"
    settings.write_text(settings.read_text().replace("{\n", '{\n  "ui": {"theme": "x"}, // mine\n', 1))
    config = desk.root / ".codex/config.toml"
    config.write_text("model = 'x'  # mine\n" + config.read_text())
    desk.cco("disconnect")
    assert (
        connect._edits.parse(settings.read_text()).value["ui"] == {"theme": "x"} and "// mine" in settings.read_text()
    )
    assert "cco" not in settings.read_text() and config.read_text().strip() == "model = 'x'  # mine"
    for content, problem in (
        (b'{"mcpServers": 5}', "another kind"),
        (b"{\n,}", "line 2: it is no"),
        (b"\xff{}", "not UTF-8"),
    ):
        settings.write_bytes(content)
        assert problem in desk.cco("connect", "gemini", "--write", code=2) and settings.read_bytes() == content
    settings.unlink()
    settings.symlink_to(desk.home / "other.json")
    assert "leads out of the repository" in desk.cco("connect", "gemini", "--write", code=2)
    settings.unlink()
    os.mkfifo(settings)
    assert "no regular file" in desk.cco("connect", "gemini", code=2)


@pytest.mark.parametrize("broken", [("gemini",), ("codex",), ("gemini", "codex"), ("qwen",)])
def test_a_file_that_cannot_be_edited_keeps_no_other_program_connected(desk: Desk, broken: tuple[str, ...]) -> None:
    files = {"gemini": ".gemini/settings.json", "codex": ".codex/config.toml", "qwen": ".qwen/settings.json"}
    for program in files:
        desk.cco("connect", program, "--write")
    whole = {program: (desk.root / files[program]).read_bytes() for program in broken}
    for program in broken:
        (desk.root / files[program]).write_bytes(b"[\n")
    for _ in range(2):
        said = desk.cco("disconnect", code=2)
        assert [f"{program}: {files[program]} cannot be edited" in said for program in broken] == [True] * len(broken)
        assert [(desk.root / files[program]).exists() for program in files] == [program in broken for program in files]
    for program in broken:
        (desk.root / files[program]).write_bytes(whole[program])
        if os.geteuid():
            (desk.root / files[program]).parent.chmod(0o500)
    if os.geteuid():
        said = desk.cco("disconnect", code=1)
        assert [program for program in files if f"{program}: " in said] == [name for name in files if name in broken]
    for program in broken:
        (desk.root / files[program]).parent.chmod(0o700)
    desk.cco("disconnect")
    assert "No program is connected" in desk.cco("disconnect")
    assert not [name for name in files.values() if (desk.root / name).exists()]


@pytest.mark.parametrize(("program", "name", "text"), [
    ("gemini", ".gemini/settings.json", '{"mcpServers": {"cco": {"command": "my-own"}}}\n'),
    ("cursor", ".cursor/mcp.json", '// mine\n{"mcpServers": {"cco": {"url": "https://example.com"}}}'),
    ("codex", ".codex/config.toml", '["mcp_servers"."cco"]\ncommand = "my-own"\n'),
])  # fmt: skip
def test_a_server_of_the_users_own_that_has_our_name_stays(desk: Desk, program: str, name: str, text: str) -> None:
    (desk.root / name).parent.mkdir()
    (desk.root / name).write_text(text)
    assert "is there already, with another value; nothing was written" in desk.cco("connect", program, code=2)
    assert "is there already" in desk.cco("connect", program, "--write", code=2)
    assert "is not connected" in desk.cco("disconnect", program)
    assert (desk.root / name).read_text() == text


@pytest.mark.parametrize(("program", "name"), [
    ("copilot", ".github/hooks/cco.json"), ("opencode", ".cco-opencode.js"), ("kilo", ".cco-kilo.js"),
])  # fmt: skip
def test_a_file_of_hooks_goes_as_a_whole_or_stays_where_somebody_wrote_in_it(
    desk: Desk, program: str, name: str
) -> None:
    file = desk.root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("my own")
    assert "is there already, with another content" in desk.cco("connect", program, "--write", code=2)
    assert "is not connected" in desk.cco("disconnect", program) and file.read_text() == "my own"
    file.unlink()
    desk.cco("connect", program, "--write")
    made = file.read_text()
    file.write_text(made + "// mine")
    assert f"{name} cannot be edited: it was changed since" in desk.cco("disconnect", code=2)
    assert file.read_text() == made + "// mine"
    file.write_text(made)
    (notes,) = desk.root.parent.glob("state/cco-sidecar/*/connections.json")
    notes.unlink()
    desk.cco("disconnect", program)
    assert not file.exists(), "also without its notes"


@pytest.mark.parametrize("program", ["claude", "codex", "vscode"])
def test_a_program_that_is_not_installed_is_connected_and_said_to_be_missing(
    desk: Desk, tmp_path: Path, program: str
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "git").symlink_to(str(shutil.which("git")))
    desk.env["PATH"] = str(programs)
    missing = f"Note: {program} is not on PATH; "
    assert (missing in desk.cco("connect", program)) is (program != "vscode")
    assert (missing in desk.cco("connect", program, "--write")) is (program != "vscode")
    assert finding_of(desk, program)[0] == "good"
    assert (f"; {program} itself is not on PATH" in finding_of(desk, program)[1]) is (program != "vscode")
    (programs / program).symlink_to("/bin/true")
    assert missing not in desk.cco("connect", program)
    assert "PATH" not in finding_of(desk, program)[1]


def finding_of(desk: Desk, program: str) -> tuple[str, str]:
    """(verdict, finding) of doctor on a program's connection, whatever it says of the rest."""
    row = findings_of(desk)[f"connection of {program}"]
    return row["verdict"], row["finding"]


def findings_of(desk: Desk) -> dict[str, dict[str, str]]:
    words = [sys.executable, str(MODULE), "doctor", "--format", "json", "--port", "0"]
    told = subprocess.run(words, cwd=desk.root, env=desk.env, capture_output=True, text=True).stdout
    return {row["check"]: row for row in json.loads(told)["checks"]}


def test_copilot_is_told_in_the_one_file_that_it_reads(desk: Desk) -> None:
    (desk.root / ".mcp.json").write_text('{"mcpServers": {}}')  # beside it the other one is not read
    before = desk.files()
    assert "Note: copilot reads them where you trust the folder" in desk.cco("connect", "copilot", "--write")
    assert '"cco"' in (desk.root / ".mcp.json").read_text() and not (desk.root / ".github/mcp.json").exists()
    desk.cco("disconnect")
    assert desk.files() == before


def test_programs_that_are_connected_at_once_are_all_noted_and_a_file_that_changes_meanwhile_is_left(
    desk: Desk,
) -> None:
    (desk.root / ".gemini").mkdir()
    (desk.root / ".gemini/settings.json").symlink_to("settings.json")
    assert "no regular file" in desk.cco("connect", "gemini", "--write", code=2), "a link to itself"
    (desk.root / ".gemini/settings.json").unlink()
    before = desk.files()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda program: desk.cco("connect", program, "--write"), ("cursor", "vscode", "copilot")))
    (notes,) = desk.root.parent.glob("state/cco-sidecar/*/connections.json")
    assert sorted(json.loads(notes.read_text())) == ["copilot", "cursor", "vscode"]
    desk.cco("disconnect")
    assert desk.files() == before
    file = desk.root / ".cursor/mcp.json"
    file.parent.mkdir()
    for now in ("{}", '{"a": 1}', None):  # what is there when it is written, instead of what was read
        file.write_text(now) if now else file.unlink()
        with pytest.raises(StartError, match="was changed meanwhile"):
            connect.apply(SimpleNamespace(root=desk.root), [connect.Change(".cursor/mcp.json", file, "{ }", "ours")])
        assert (file.read_text() if file.exists() else None) == now


def test_a_connection_is_taken_away_where_git_fails(desk: Desk) -> None:
    desk.cco("connect", "cursor", "--write")
    desk.cco("connect", "gemini", "--write")
    with (desk.root / ".git/config").open("a") as config:
        config.write("[broken\n")
    desk.cco("disconnect")
    assert not (desk.root / ".cursor").exists() and not (desk.root / ".gemini").exists()
    assert "No program is connected" in desk.cco("disconnect")


def test_a_connection_is_taken_away_without_its_notes(desk: Desk) -> None:
    (desk.root / ".cursor").mkdir()
    (desk.root / ".cursor/mcp.json").write_text('{"mcpServers": {"x": {}}}')
    desk.cco("connect", "cursor", "--write")
    assert "did you mean cursor?" in desk.cco("connect", "curser", code=2)
    (notes,) = desk.root.parent.glob("state/cco-sidecar/*/connections.json")
    assert notes.stat().st_mode & 0o777 == 0o600
    notes.unlink()
    assert "cursor: " in desk.cco("disconnect", "cursor")
    assert json.loads((desk.root / ".cursor/mcp.json").read_text()) == {"mcpServers": {"x": {}}}
    for content in (b"{", b'{"cursor": [{"name": "\xff"}]}', b"[" * 100_000):
        notes.write_bytes(content)
        assert "cannot be read" in desk.cco("connect", "cursor", code=2)


def test_doctor_names_the_connections_whose_notes_are_lost(desk: Desk) -> None:
    programs = ("cursor", "gemini", "opencode", "claude")
    for program in programs:
        desk.cco("connect", program, "--write")
    (desk.root / ".vscode").mkdir()
    (desk.root / ".vscode/mcp.json").write_text('{"servers": {"cco": {"command": "mine"}}}')  # the user's own
    before = desk.files()
    (notes,) = desk.root.parent.glob("state/cco-sidecar/*/connections.json")
    notes.unlink()
    for program in programs:
        verdict, finding = finding_of(desk, program)
        assert verdict == "note" and "no longer noted in the storage: " in finding
        assert f"connect {program} --write` notes it" in finding and f"disconnect {program}` takes it away" in finding
    with pytest.raises(KeyError):
        finding_of(desk, "vscode")
    desk.cco("connect", "cursor", "--write")
    assert finding_of(desk, "cursor")[0] == "good" and desk.files() == before
    desk.cco("disconnect", "gemini")
    with pytest.raises(KeyError):
        finding_of(desk, "gemini")


@pytest.mark.parametrize("content", ["", '{"claude": [', "[]"])
def test_doctor_names_notes_of_another_work_tree_that_cannot_be_read_beside_all_else(desk: Desk, content: str) -> None:
    side = desk.linked("side")
    side.cco("connect", "claude", "--write")
    (notes,) = desk.root.parent.glob("state/cco-sidecar/*/connections.json")
    desk.cco("connect", "cursor", "--write")
    notes.write_text(content)
    told = findings_of(desk)
    assert told["connections"]["verdict"] == "bad" and f"{notes} cannot be read" in told["connections"]["finding"]
    assert "storage" in told and told["connection of cursor"]["verdict"] == "good"


# -- the bridge


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("bridge")
    running = Service(make_repository(folder / "repository"), folder / "storage").start()
    yield running
    assert running.stop() == 0 and "Traceback" not in running.log, running.log


MODERN = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}


class Bridge:
    """``cco mcp`` as a program starts it."""

    def __init__(self, service: Service, *options: str, **variables: str) -> None:
        options = options or ("--root", str(service.root), "--storage", str(service.storage))
        words = [sys.executable, str(MODULE), "mcp", "claude", *options]
        environ = clean_environment(**variables)
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True)

    def send(self, message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(
            (message if isinstance(message, str) else json.dumps({"jsonrpc": "2.0"} | message)) + "\n"
        )
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def call(self, method: str, **params: Any) -> Any:
        self.send({"id": 1, "method": method, "params": params})
        return self.read()

    def tool(self, name: str, **arguments: Any) -> str:
        return str(self.call("tools/call", name=name, arguments=arguments)["result"]["content"][0]["text"])

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(120) == 0


@pytest.fixture
def bridge(service: Service) -> Iterator[Bridge]:
    running = Bridge(service)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_session_works_through_the_bridge_in_both_eras_and_answers_no_approval(
    service: Service, bridge: Bridge
) -> None:
    old = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    assert bridge.call("initialize", **old)["result"]["protocolVersion"] == "2025-06-18"
    bridge.send({"method": "notifications/initialized"})
    tools = bridge.call("tools/list")["result"]["tools"]
    assert {"brief", "store_result", "spawn_agent", "ask_human"} <= {tool["name"] for tool in tools}
    assert bridge.call("server/discover", _meta=MODERN)["result"]["resultType"] == "complete"
    told = bridge.call("tools/call", _meta=MODERN, name="brief", arguments={"issue_id": "b-1"})["result"]
    assert "b-1" in told["content"][0]["text"]
    assert "Stored as" in bridge.tool(
        "store_result", issue_id="b-1", status="success", decisions=["through the bridge"]
    )
    (result,) = service.client().get("/api/results", issue_id="b-1").json()["results"]
    assert result["agent_type"] == "session" and result["agent_id"].startswith("session-claude-")
    bridge.send(
        {
            "id": 7,
            "method": "tools/call",
            "params": {"name": "wait_for_events", "arguments": {"event_type": "bell", "timeout_seconds": 60}},
        }
    )
    service.client().publish("bell", {"n": 1})
    answer = bridge.read()
    assert answer["id"] == 7 and '"n":1' in answer["result"]["content"][0]["text"].replace(" ", "")
    bridge.send("no json")
    assert bridge.read()["error"]["code"] == -32700
    assert bridge.call("no/method")["error"]["code"] == -32601
    bridge.end()


def test_a_sessions_token_is_of_its_own_kind_and_ends(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    monkeypatch.delenv("JWT_TOKEN", raising=False)
    bridge = plugin("_mcp_bridge")
    options = argparse.Namespace(program="codex", root=str(service.root), storage=str(service.storage))
    client = bridge.SessionClient(options)
    claims = jwt.decode(client.token, options={"verify_signature": False})
    assert (claims["agent_type"], claims["bound"], claims["exp"] - claims["iat"]) == ("session", True, 3600)
    asked = (
        service.client("python-specialist")
        .post("/api/approvals", {"kind": "approval", "text": "May I?", "command": "rm x"})
        .json()
    )
    refused = client_of(service, client.token).post(
        f"/api/approvals/{asked['approval_id']}/answer", {"answer": "approve"}
    )
    assert (refused.status_code, refused.json()["code"]) == (403, "AUTH_003")
    first, client._made = client.token, client._made - 3600
    client.open(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}', bridge.headers_of({})).close()
    assert client.token != first


def client_of(service: Service, token: str) -> Any:
    from conftest import Client

    return Client(service.url, token)


def test_a_session_goes_on_when_the_service_was_started_again(service: Service, bridge: Bridge) -> None:
    assert bridge.call("ping")["result"] == {}
    service.stop()
    assert "no sidecar runs" in bridge.call("tools/call", name="agents", arguments={})["error"]["message"]
    service.start()  # on another port
    assert bridge.call("ping")["result"] == {}
    bridge.end()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CUT = [
    b"",
    b"HTT",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
    STREAM,
    STREAM + b"b\r\n: waiting\n\n\r\n",
    STREAM + b'18\r\ndata: {"jsonrpc":"2.0","\r\n',
    STREAM + b'18\r\ndata: {"json',
]
BROKEN = {  # answers that come whole
    "half an object": b'{"id": "a", ',
    "no object": b"5",
    "no text": b'{"id": "\xff"}',
    "what is nested too deep": b"[" * 100_000,
}
CUT += [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content) for content in BROKEN.values()]
CUT += [STREAM + b"%x\r\ndata: %b\n\r\n0\r\n\r\n" % (len(content) + 7, content) for content in BROKEN.values()]
CUT += [b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000]


def test_a_request_whose_answer_is_cut_or_broken_is_answered(service: Service) -> None:
    """A session waits for each answer: a service may be killed before it gives one, within it, and while a wait shows
    that it lives.
    """
    health = service.client().get("/health").content
    healthy = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(health), health)
    answered = b'data: {"id": "a", "result": "whole"}\n'
    whole = STREAM + b"%x\r\n%b\r\n" % (len(answered), answered)  # but for the stream's end
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        bridge = Bridge(service, "--url", url, JWT_TOKEN=service.token())
        for cut, reset in [(cut, reset) for cut in (*CUT, whole) for reset in (False, True)]:
            bridge.send({"id": "a", "method": "tools/call", "params": {"name": "agents"}})
            told, answer = None, healthy
            while answer != cut:  # a client makes sure who answers before it sends
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as asked:
                    answer = healthy if asked.readline().startswith(b"GET /health ") else cut
                    head = list(iter(asked.readline, b"\r\n"))
                    asked.read(sum(int(line.split()[1]) for line in head if line.lower().startswith(b"content-length")))
                    connection.sendall(answer)
                    if answer == whole:
                        told = bridge.read()
                    if reset and answer == cut:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if cut == whole:
                assert told == {"id": "a", "result": "whole"}
                continue
            told = bridge.read()  # and not a second answer to the one before
            assert told["id"] == "a" and told["error"]["code"] == -32000, (cut, told)
            refused = b" 403 " in cut and told["error"]["message"].startswith("403")
            assert refused or "look whether what you asked for was done" in told["error"]["message"], (cut, reset, told)
        until(lambda: psutil.Process(bridge.process.pid).num_threads() == 1)
        assert bridge.process.stdin and bridge.process.stdout
        bridge.process.stdin.close()
        assert bridge.process.stdout.read() == "", "what was answered is not answered again"
        assert bridge.process.wait(120) == 0


def test_a_request_during_which_the_service_is_killed_is_answered(service: Service, bridge: Bridge) -> None:
    arguments = {"event_type": "never", "timeout_seconds": 60}
    bridge.send({"id": 7, "method": "tools/call", "params": {"name": "wait_for_events", "arguments": arguments}})
    until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"])
    service.kill()
    told = bridge.read()
    service.start()
    assert told["id"] == 7 and "ended before it had answered" in told["error"]["message"]
    assert bridge.call("ping")["result"] == {}
    bridge.end()


def test_a_cancellation_passes_by_all_that_waits_and_overtakes_no_call(service: Service, bridge: Bridge) -> None:
    """Of the calls that are cancelled one waits, one has not reached the service, and one has no room; none of them
    takes an event.
    """

    def waits() -> int:
        return int(service.client().get("/status").json()["events"]["active_subscriptions"])

    def wait(number: int) -> None:
        arguments = {"event_type": f"bell-{number}", "timeout_seconds": 60}
        bridge.send(
            {"id": number, "method": "tools/call", "params": {"name": "wait_for_events", "arguments": arguments}}
        )

    def cancel(number: int) -> None:
        bridge.send({"method": "notifications/cancelled", "params": {"requestId": number}})

    until(lambda: not waits())
    for number in range(64):
        wait(number)
    until(lambda: waits() == 64)
    wait(64)
    cancel(64)
    for number in range(1, 64):
        cancel(number)
    assert {bridge.read()["id"] for _ in range(63)} == set(range(1, 64))
    for number in range(100, 110):
        wait(number)
        cancel(number)
    until(
        lambda: psutil.Process(bridge.process.pid).num_threads() == 2
    )  # the second hands on what nobody has cancelled
    assert waits() == 1
    service.client().publish("bell-0")
    answers = [bridge.read()]
    while answers[-1]["id"] != 0:
        answers.append(bridge.read())
    assert all("cancelled" in told["result"]["content"][0]["text"] for told in answers[:-1]), answers
    for number in (1, 64, 100):
        service.client().publish(f"bell-{number}", {"n": number})
        told = bridge.tool("wait_for_events", event_type=f"bell-{number}", timeout_seconds=0)
        assert f'"n":{number}' in told.replace(" ", ""), told
    bridge.end()


def test_of_more_calls_than_there_is_room_for_the_last_is_told_so(service: Service, bridge: Bridge) -> None:
    arguments = {"event_type": "never", "timeout_seconds": 60}
    call = {"method": "tools/call", "params": {"name": "wait_for_events", "arguments": arguments}}
    for number in range(1_001):
        bridge.send(call | {"id": number})
    told = bridge.read()
    assert told["id"] == 1_000 and "1000 calls are under way" in told["error"]["message"]
    assert bridge.call("ping")["result"] == {}, "which needs no service"
    for number in reversed(range(1_000)):  # so that few answers come, which nobody reads
        bridge.send({"method": "notifications/cancelled", "params": {"requestId": number}})
    until(lambda: psutil.Process(bridge.process.pid).num_threads() == 1)
    bridge.end()


@pytest.mark.parametrize("value", ['"\\ud83d"', "1e999", "NaN"])
def test_a_refusal_of_what_the_service_cannot_read_has_the_requests_id(bridge: Bridge, value: str) -> None:
    """Programs cut texts within a character, and write what is no JSON elsewhere."""
    bridge.send(f'{{"jsonrpc": "2.0", "id": "mine", "method": "tools/call", "params": {{"arguments": {value}}}}}')
    told = bridge.read()
    assert told["id"] == "mine" and told["error"]["code"] == -32700
    bridge.end()


def test_a_session_that_begins_before_the_service_has_its_tools_when_it_runs(service: Service, bridge: Bridge) -> None:
    service.stop()
    modern = {"_meta": MODERN}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("initialize", {"protocolVersion": "2025-06-18"}),
        ("ping", {}),
        ("tools/list", {}),
        ("server/discover", modern),
        ("tools/list", modern),
    ]
    without = [bridge.call(method, **params)["result"] for method, params in asked]
    bridge.send({"method": "notifications/initialized"})  # is not answered
    for method, params in [("resources/read", {"uri": "cco://brief"}), ("tools/list", {"_meta": 1}), ("nothing", {})]:
        assert "no sidecar runs" in bridge.call(method, **params)["error"]["message"], method
    service.start()
    assert [bridge.call(method, **params)["result"] for method, params in asked] == without
    assert "Published as evt-" in bridge.tool("publish_event", event_type="begun", topic="t", data={})
    bridge.end()


# -- real programs

HEADLESS = {
    "codex": ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-hook-trust"],
    "copilot": ["copilot", "--trust-folder", "--allow-all-tools", "-p"],
    "opencode": ["opencode", "run"],
}


def test_real_sessions_use_a_tool_and_hear_of_an_event_by_their_hooks() -> None:
    step = {"tool": "store_result", "sh": "sleep 2"}  # until the program has its tools
    scripts = {
        name: [step | {"arguments": json.dumps({"issue_id": name, "status": "success", "idempotency_key": name})}] * 4
        for name in HEADLESS
    }
    npm.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=npm.CACHE) as temporary, MockModel(scripts) as model:
        home, root = make_home(Path(temporary, "home"), model.url), make_repository(Path(temporary, "repository"))
        with (home / ".codex/config.toml").open("a") as file:
            file.write(f'\n[projects."{root}"]\ntrust_level = "trusted"\n')
        env = environment(home, model.url, [install(name) for name in HEADLESS]) | {"PWD": str(root)}
        service = Service(root, Path(temporary, "storage"), env=env).start()

        def run(words: list[str]) -> str:
            done = subprocess.run(
                words, cwd=root, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        def cco(*words: str) -> str:
            return run([sys.executable, str(MODULE), *words, "--storage", str(service.storage)])

        def publish(script: str, number: int) -> None:
            if number == 1:
                service.client().publish("review_wanted", {"message": f"a zebra for {script}"})

        try:
            before = tree(root)
            for name in HEADLESS:
                cco("connect", name, "--write")
            assert git(root, "status", "--short") == ""
            model.before_turn = publish
            with ThreadPoolExecutor() as threads:
                said = list(threads.map(run, [[*words, f"Follow script {name}"] for name, words in HEADLESS.items()]))
            for name in HEADLESS:
                (result,) = service.client().get("/api/results", issue_id=name).json()["results"]
                assert result["agent_id"].startswith(f"session-{name}-"), said
                asked = [body for body in model.requests if f"Follow script {name}" in body]
                assert any(f"a zebra for {name}" in body for body in asked), service.log
            assert not TOKEN.search("".join([*model.requests, service.log, *said]))
            cco("disconnect")
            assert tree(root) == before and git(root, "status", "--short") == ""
        finally:
            assert service.stop() == 0, service.log


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if ".git" not in path.parts or path.name == "exclude"
    }
