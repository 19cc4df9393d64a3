"""Starting and stopping: where the root, the options, the storage and the port come from, and how it ends."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
from conftest import MODULE, PROJECT, ROOT, Client, Service, clean_environment, git, make_repository, plugin, until

import cco_sidecar
from cco_sidecar import Settings, StartError, is_identifier, load_settings, option_table, read_option


def run(
    *words: str, cwd: Path, module: Path = MODULE, python: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """The program as a process of its own that is expected to end by itself."""
    command = [sys.executable, *python, str(module), *words]
    return subprocess.run(command, cwd=cwd, env=clean_environment(**env), capture_output=True, text=True, timeout=30)


def refusal(ended: subprocess.CompletedProcess[str], exit_code: int = 2) -> str:
    """The one line with which a start was refused."""
    assert ended.returncode == exit_code, (ended.returncode, ended.stderr)
    assert ended.stdout == "" and ended.stderr.count("\n") == 1 and ended.stderr.startswith("cco: "), ended.stderr
    return ended.stderr


# -- the root


def test_the_root_is_the_git_top_level_of_a_subfolder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository / "src")
    assert load_settings({}, {}).root == repository


def test_the_root_is_the_working_folder_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "plain/deep")
    assert load_settings({}, {}).root == tmp_path / "plain/deep"


def test_the_root_is_the_working_folder_where_git_is_not_installed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository / "src")
    monkeypatch.setenv("PATH", "")
    assert load_settings({}, {}).root == repository / "src"


def test_a_root_that_was_asked_for_is_taken_as_it_is(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parent)
    assert load_settings({"root": "repository/src"}, {}).root == repository / "src"
    with pytest.raises(StartError, match="nowhere is not a folder"):
        load_settings({"root": "nowhere"}, {})


@pytest.mark.parametrize(
    ("folder", "project"), [("My Project!", "my-project"), ("a..b", "a.b"), ("---", "project"), ("Straße", "stra-e")]
)
def test_the_project_is_named_after_the_root_folder(tmp_path: Path, folder: str, project: str) -> None:
    (tmp_path / folder).mkdir()
    assert load_settings({"root": str(tmp_path / folder)}, {}).project == project


def test_a_folder_without_git_is_served(tmp_path: Path, make_service: Callable[..., Service]) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "main.py").write_text("print('plain')\n")
    context = make_service(root=plain).client().get("/api/context/issue-1/python-specialist").json()["context"]
    assert [file["path"] for file in context["relevant_files"]] == ["main.py"]
    assert context["git_context"]["branch"] is None and context["git_context"]["recent_commits"] == []


# -- the options: three values of each as text, the same in TOML, and one that is refused (as TOML where any text is
# good)

KEY = "k" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root without git, which the options do not need."""
    for name in ("src", "tests", "docs"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    return tmp_path / "folder"


SAMPLES: dict[str, tuple[list[str], str]] = {
    "root": (["src", "tests", "docs"], "nowhere"),
    "project": (["one", "two.x", "three_3"], "a/b"),
    "storage": (["../s1", "../s2", "../s3"], ""),
    "host": (["localhost", "127.0.0.1", "::1"], ""),
    "port": (["0", "3002", "65535"], "65536"),
    "allowed_host": (["a.example", "b.example,c.example", "d.example"], "[1]"),
    "cors_origin": (["https://a.example", "https://b.example,https://c.example", "https://d.example"], "[1]"),
    "max_connections": (["1", "100", "1000000"], "0"),
    "max_unsent_mb": (["1", "64", "1000"], "0"),
    "storage_limit_mb": (["1", "2000", "65536"], "0"),
    "request_timeout": (["1", "60", "3600"], "0"),
    "tls_cert": (["a.pem", "b.pem", "c.pem"], ""),
    "tls_key": (["a.pem", "b.pem", "c.pem"], ""),
    "jwt_secret": (["a" + KEY, "b" + KEY, "c" + KEY], "short"),
    "jwt_public_key": (["a.pem", "b.pem", "c.pem"], ""),
    "token_ttl": (["1", "60", "31536000"], "0"),
    "cache_size_mb": (["0", "1", "65536"], "-1"),
    "no_watch": (["yes", "no", "true"], "perhaps"),
    "event_retention": (["1", "60", "86400"], "1.5"),
    "event_limit": (["1", "1000", "5"], "many"),
    "agent_command": (["run {task}", '["run", "a b"]', "run 'a b'"], "run 'a"),
    "agent_commands": (['{"x": "claude"}', '{"x": "run {task}", "y": ["a b", "c"]}', "{}"], '["x"]'),
    "agent_may": (["pytest", "npm test, git commit -m", "./gradlew check,npm run test:unit"], "pytest; rm"),
    "agent_approvals": (["ask", "deny", "ask"], "perhaps"),
    "agent_types": (["x=coding", "x=qa,y=support", "z=security"], "x=wizard"),
    "issue_files": (["docs/tickets", "issues.json,gh", "gh"], "[1]"),
    "agent_environment": (["HTTPS_PROXY", "PATH,HTTPS_PROXY", "BASH_ENV"], "[1]"),
    "backend": (["nats://a:4222", "nats://a,b:1", "tls://a"], ""),
    "nats_creds": (["a.creds", "b.creds", "c.creds"], ""),
    "nats_tls_ca": (["a.pem", "b.pem", "c.pem"], ""),
    "nats_tls_cert": (["a.pem", "b.pem", "c.pem"], ""),
    "nats_tls_key": (["a.pem", "b.pem", "c.pem"], ""),
    "nats_domain": (["hub", "leaf_1", "x-y"], "a.b"),
    "nats_replicas": (["0", "3", "5"], "6"),
    "nats_prefix": (["cco", "team_1", "x-y"], "a.b"),
    "nats_synced": (["yes", "no", "true"], "perhaps"),
    "nats_timeout": (["1", "10", "300"], "0"),
    "nats_snapshot_entries": (["1", "10000", "50"], "0"),
    "agent_context_tokens": (["500", "50000", "2500000"], "499"),
    "agent_timeout": (["1", "60", "3600"], "0"),
    "agent_retention": (["1", "60", "604800"], "0"),
    "agent_retention_mb": (["1", "500", "1000000"], "0"),
    "no_synthesis": (["yes", "no", "true"], "perhaps"),
    "no_fast": (["yes", "no", "true"], "perhaps"),
    "max_agents": (["0", "1", "10000"], "10001"),
    "max_agents_per_issue": (["1", "50", "1000000"], "0"),
    "max_depth": (["1", "4", "100"], "0"),
    "budget_usd": (["5", "0.5/issue", "2/issue,20.25/day"], "0"),
    "budget_tokens": (["1000", "1/day", "5,7/day"], "1/week"),
    "stop_agents": (["1", "0", "true"], "2"),
    "plugins": (["src", "src,tests", "docs"], "[1]"),
    "no_plugins": (["yes", "no", "true"], ""),
    "log_level": (["debug", "info", "error"], "loud"),
    "log_format": (["text", "json", "text"], "xml"),
}
NEEDED = {"tls_cert": ["tls_key"], "tls_key": ["tls_cert"], "nats_tls_key": ["nats_tls_cert", "backend"]}
NAMES = list(option_table())
SWITCHES = [name for name, option in option_table().items() if option.read is cco_sidecar.read_bool]


def settings_from_flags(folder: Path, *flags: str) -> Settings:
    given = vars(plugin("_command_line").option_parser().parse_args(flags))
    return load_settings(
        {"root": str(folder), **given}, {name: text for name, text in os.environ.items() if name.startswith("CCO_")}
    )


def expected(name: str, text: str) -> Any:
    """What an option means that was given as a flag in the root."""
    many = option_table()[name].read in (cco_sidecar.read_list, cco_sidecar.read_paths)
    return read_option(name, "", [text] if many else text)


def test_every_option_is_in_the_table_of_this_test_and_is_explained() -> None:
    assert set(SAMPLES) == set(NAMES)
    assert all(option.help for option in option_table().values())


@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_a_flag_else_a_variable_else_a_key_else_its_default(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    flag, (first, second, third) = "--" + name.replace("_", "-"), SAMPLES[name][0]
    for needed in NEEDED.get(name, ["backend"] if name.startswith("nats_") else []):
        monkeypatch.setenv(f"CCO_SIDECAR_{needed.upper()}", SAMPLES[needed][0][0])
    if name != "root":  # the root is where the files are, so they cannot say it
        (folder / "pyproject.toml").write_text(f"[tool.cco-sidecar]\n{name} = {json.dumps(first)}\n")
        assert getattr(settings_from_flags(folder), name) == expected(name, first)
        (folder / "cco.toml").write_text(f"{name.replace('_', '-')} = {json.dumps(third)}\n")
        assert getattr(settings_from_flags(folder), name) == expected(name, third)
    monkeypatch.setenv(f"CCO_SIDECAR_{name.upper()}", second)
    if name == "root":
        assert load_settings({}, dict(os.environ)).root == expected(name, second)
    else:
        assert getattr(settings_from_flags(folder), name) == expected(name, second)
    given = [flag] if name in SWITCHES else [flag, first]
    assert getattr(settings_from_flags(folder, *given), name) == expected(name, first)


@pytest.mark.parametrize(
    ("text", "wrong"), [("x=nope", "nope"), ("x=qa,y", ""), ("x=qa,a..b=qa", "a..b"), ("x=qa,y=coding=qa", "coding=qa")]
)
def test_of_agent_types_the_part_that_is_wrong_is_named(text: str, wrong: str) -> None:
    with pytest.raises(StartError, match=f"which {wrong!r} is not$"):
        read_option("agent_types", "", text)


def test_of_categories_only_those_that_agents_have_are_offered() -> None:
    with pytest.raises(
        StartError, match="a category of architect, coding, qa, security, documentation, support, which"
    ):
        read_option("agent_types", "", "x=nope")


@pytest.mark.parametrize("name", ["plugins", "issue_files", "agent_environment", "allowed_host"])
@pytest.mark.parametrize("value", ["", " , ", ["src", ""]], ids=ascii)
def test_a_list_that_is_given_as_text_names_something(name: str, value: Any) -> None:
    with pytest.raises(StartError, match="must be a list of texts that are not empty"):
        read_option(name, "", value)
    assert read_option(name, "", []) == ()  # as a settings file may say


@pytest.mark.parametrize(("name", "text"), [("agent_types", "a..b=coding"), ("agent_commands", '{"a..b": "run"}')])
def test_an_agent_type_that_no_request_can_name_is_refused(name: str, text: str) -> None:
    with pytest.raises(StartError):
        read_option(name, "", text)


def test_without_any_source_the_documented_defaults_hold(folder: Path) -> None:
    settings = load_settings({"root": str(folder)}, {})
    assert (settings.host, settings.port, settings.project) == ("127.0.0.1", 3001, "folder")
    assert (settings.cache_size_mb, settings.max_agents, settings.agent_timeout, settings.token_ttl) == (
        256,
        10,
        3600,
        3600,
    )
    assert (settings.max_agents_per_issue, settings.max_depth, settings.agent_commands) == (50, 4, {})
    assert (settings.event_retention, settings.event_limit, settings.log_format) == (86_400, 100_000, "text")
    assert settings.no_plugins is False and settings.stop_agents is False and settings.agent_command is None


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_value_is_one_line_that_names_the_option_and_exit_code_2(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    bad = SAMPLES[name][1]
    if bad == "[1]":
        (folder / "cco.toml").write_text(f"{name} = [1]\n")
    else:
        monkeypatch.setenv(f"CCO_SIDECAR_{name.upper()}", bad)
    assert cco_sidecar.main(["plugins"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    assert said.err.startswith(
        f"cco: cco.toml:1: {name}: " if bad == "[1]" else f"cco: CCO_SIDECAR_{name.upper()}: "
    ), said.err
    if name == "jwt_secret":
        assert bad not in said.err.replace("shorter", "")


TOML = {"whole": "3", "fraction": "2.5", "truth": "true", "date": "2026-01-31", "list": "['x']", "list of numbers": "[3]",
        "table": "{x = 'coding'}", "table of numbers": "{x = 3}"}  # fmt: skip
MEANT = {  # by reader which of these may be meant; where it is not here, a text alone
    cco_sidecar.read_bool: {"truth"},
    cco_sidecar.read_list: {"list"},
    cco_sidecar.read_paths: {"list"},
    cco_sidecar.read_command: {"list"},
    plugin("_settings").read_budget: {"whole", "fraction"},
    plugin("_settings").read_agent_may: {"list", "table"},
    plugin("_settings").read_agent_types: {"table"},
    plugin("_settings").read_agent_commands: {"table"},
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "root"])
def test_a_value_of_a_settings_file_that_is_of_another_type_is_one_line_that_names_the_option(
    name: str, folder: Path
) -> None:
    option = option_table()[name]
    meant = MEANT.get(option.read, {"whole"} if isinstance(option.default, int) else set())
    for kind in TOML.keys() - meant:
        (folder / "cco.toml").write_text(f"{name} = {TOML[kind]}\n")
        with pytest.raises(StartError) as refused:
            load_settings({"root": str(folder)}, {})
        assert refused.value.exit_code == 2, kind
        assert re.fullmatch(rf"cco\.toml:1: {name}(\.x)?: [^\n]*\b(must|cannot)\b[^\n]*", str(refused.value)), kind


@pytest.mark.parametrize(
    "value", ["5", "-1.5", "true", '""', "[]", "[1]", '[["a"]]', "{a = 1}", '{a = ["coding"]}', "1979-05-27", '"a\\nb"']
)
def test_no_kind_of_toml_value_gives_anything_but_a_setting_or_one_line(value: str, folder: Path) -> None:
    for name in NAMES:
        (folder / "cco.toml").write_text(f"{name} = {value}\n")
        try:
            load_settings({"root": str(folder)}, {})
        except StartError as error:
            assert error.exit_code == 2 and "\n" not in str(error), name


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("cco.toml", "prot = 1\n", "cco.toml:1: prot: unknown option, did you mean port?"),
        (
            "cco.toml",
            "port = 0\n\nmax-agnets = 1\n",
            "cco.toml:3: max-agnets: unknown option, did you mean max-agents?",
        ),
        ("cco.toml", "# prot = 1\n'prot' = 1\n", "cco.toml:2: prot: unknown option"),
        (
            "cco.toml",
            "port = 0\n[agent-comands]\nx = 'y'\n",
            "cco.toml:2: agent-comands: unknown option, did you mean agent-command",
        ),
        ("cco.toml", "root = '.'\n", "cco.toml:1: root: is where settings files lie, so none sets it: use --root or"),
        (
            "cco.toml",
            "[tool.cco-sidecar]\nport = 1\n",
            "cco.toml:1: tool: unknown option; options stand in no table, b",
        ),
        (
            "cco.toml",
            "max-agents = 1\n[server]\nport = 1\n",
            "cco.toml:2: server: unknown option; options stand in no table",
        ),
        (
            "pyproject.toml",
            "[tool.cco-sidecar.server]\nport = 1\n",
            "pyproject.toml:1: server: unknown option; options stand in [tool.cco-sidecar] itself",
        ),
        (
            "cco.toml",
            "[agent-may]\nx = 'a'\nport = 1\n",
            "cco.toml:3: agent-may.port: port is an option, which stands in",
        ),
        ("cco.toml", "[agent-may]\n'*' = 'pytest'\nx = 'a; b'\n", "cco.toml:3: agent-may.x: must be commands in plain"),
        (
            "cco.toml",
            "[agent-types]\na = 'qa'\nb = 'nope'\n",
            "cco.toml:3: agent-types.b: must be NAME=CATEGORY with a c",
        ),
        (
            "cco.toml",
            "port = 1\nagent_commands = {a = 'x', b = []}\n",
            "cco.toml:2: agent_commands.b: must be a command",
        ),
        (
            "pyproject.toml",
            "[tool.cco-sidecar]\nport = 1\n[tool.cco-sidecar.agent-types]\nb = 'nope'\n",
            "pyproject.toml:4: agent-types.b: must be NAME=CATEGORY",
        ),
        ("cco.toml", "no-watch = true\nport = 'abc'\n", "cco.toml:2: port: 'abc' must be a whole number"),
        ("cco.toml", 'allowed-host = """x\ny"""\nlog_level = "loud"\n', "cco.toml:3: log_level: 'loud' must be one of"),
        ("cco.toml", 'host = "a\\u0000b"\n', "cco.toml:1: host: "),
        ("cco.toml", "port = 0x" + "f" * 6000, "cco.toml:1: port: "),
        ("cco.toml", "\n\nport = \n", "cco.toml:3: Invalid value (column 8)\n"),
        ("cco.toml", "port = 0\n\0", "cco.toml:2: "),
        ("cco.toml", "agent-command = " + "[" * 5000, "cco.toml: maximum recursion depth exceeded"),
        ("cco.toml", "\udcff", "cco.toml:1: it is not UTF-8 (column 1)\n"),
        ("cco.toml", "port = 1\n\nhost = '\udce9'\n", "cco.toml:3: it is not UTF-8 (column 9)\n"),
        ("cco.toml", '"\\u001b]0;title\\n" = 1\n', "cco.toml:1: "),
        (
            "pyproject.toml",
            "[project]\nport = 1\n\n[tool.cco-sidecar]\nprot = 1\n",
            "pyproject.toml:5: prot: unknown option, did you mean port?",
        ),
        ("pyproject.toml", "[project]\nname = 'x'\n[tool.cco-sidecar]\nport = 70000\n", "pyproject.toml:4: port: "),
        ("pyproject.toml", "[tool]\ncco-sidecar = 5\n", "pyproject.toml:2: tool.cco-sidecar must be a table"),
    ],
    ids=ascii,
)
def test_a_settings_file_that_is_wrong_is_one_line_and_exit_code_2(
    folder: Path,
    file: str,
    content: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / file).write_text(content, errors="surrogateescape")
    assert cco_sidecar.main(["serve"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"cco: {said}") and len(line) < 600
    assert not re.search(r"[\x00-\x1f]", line.removesuffix("\n"))


@pytest.mark.parametrize("content", ["[project\n", "\0", "x = " + "[" * 5000, "\udcff", "tool = 5\n"], ids=ascii)
def test_a_project_file_that_is_broken_for_everybody_does_not_stop_the_start(folder: Path, content: str) -> None:
    (folder / "pyproject.toml").write_text(content, errors="surrogateescape")
    assert load_settings({"root": str(folder)}, {}).port == 3001


@pytest.mark.parametrize("file", ["cco.toml", "pyproject.toml"])
def test_a_byte_order_mark_before_the_settings_is_passed_over(folder: Path, file: str) -> None:
    (folder / file).write_text("port = 5\n" if file == "cco.toml" else "[tool.cco-sidecar]\nport = 5\n", "utf-8-sig")
    assert load_settings({"root": str(folder)}, {}).port == 5


def test_a_misspelt_variable_is_said_and_passed_over(folder: Path) -> None:
    misspelt = {
        "CCO_SIDECAR_PROT": "1",
        "CCO_SIDECAR_MAX_AGNETS": "1",
        "CCO_SIDECAR_X": "1",
        "CCO_SIDECAR_HOST": "localhost",
    }
    ended = run("token", "--type", "qa-engineer", "--storage", str(folder.parent / "storage"), cwd=folder, **misspelt)
    assert ended.returncode == 0 and ended.stdout.count(".") == 2
    assert ended.stderr.splitlines() == [
        "cco: CCO_SIDECAR_MAX_AGNETS: unknown variable, did you mean CCO_SIDECAR_MAX_AGENTS?",
        "cco: CCO_SIDECAR_PROT: unknown variable, did you mean CCO_SIDECAR_PORT?",
        "cco: CCO_SIDECAR_X: unknown variable",
    ]


@pytest.mark.parametrize(
    ("name", "project"),
    [
        ("a..b", "a.b"),
        ("a...b", "a.b"),
        ("x.....", "x"),
        ("...", "project"),
        ("Ein Haus", "ein-haus"),
        ("a.-..b", "a.-.b"),
    ],
)
def test_the_project_is_called_as_its_folder_in_letters_that_an_id_may_have(
    tmp_path: Path, name: str, project: str
) -> None:
    (tmp_path / name).mkdir()
    settings = load_settings({"root": str(tmp_path / name), "storage": str(tmp_path / "state")}, {})
    assert settings.project == project and is_identifier(settings.project)


def test_an_older_interpreter_reads_the_file_up_to_the_line_that_says_what_it_needs() -> None:
    """Python 3.8 takes a file whose grammar it knows: a subscript with a bare star in it came with 3.11."""

    def bare_stars(source: str) -> list[str | None]:
        tree = ast.parse(source, feature_version=(3, 8))
        indices = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
        tuples = [
            it for it in indices if isinstance(it, ast.Tuple) and any(isinstance(e, ast.Starred) for e in it.elts)
        ]
        return [text for text in (ast.get_source_segment(source, each) for each in tuples) if text and text[0] != "("]

    assert bare_stars("a[*b, None], a[(*b, None)]") == ["*b, None"]
    assert bare_stars(MODULE.read_text()) == []


def test_relative_paths_in_a_file_start_at_the_root_and_those_of_a_flag_at_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "cco.toml").write_text(
        "storage = '../state'\nplugins = ['src', 'docs']\ntls-cert = 'c.pem'\ntls-key = 'k.pem'\n"
    )
    monkeypatch.chdir(folder / "src")
    settings = load_settings({"root": ".."}, {})
    assert settings.storage.resolve() == folder.parent / "state"
    assert settings.plugins == (folder / "src", folder / "docs")
    assert (settings.tls_cert, settings.tls_key) == (folder / "c.pem", folder / "k.pem")
    assert load_settings({"root": "..", "storage": "here"}, {}).storage == folder / "src/here"


def test_a_switch_takes_no_value_wherever_it_stands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--no-plugins", "plugins"], ["plugins", "--no-plugins"]):
        assert cco_sidecar.main([*words, "--root", str(folder)]) == 0
        assert "house_rules" not in capsys.readouterr().out
    storage = ["--root", str(folder), "--storage", str(folder.parent / "state"), "--port", "0"]
    for words in (
        ["--no-watch", "doctor"],
        ["doctor", "--no-watch"],
        ["--no-watch", "doctor", "--no-plugins", "--stop-agents"],
    ):
        assert cco_sidecar.main([*words, *storage]) == 0, words


@pytest.mark.parametrize(
    ("flag", "name", "value"), [("--watch", "no_watch", False), ("--no-stop-agents", "stop_agents", False)]
)
def test_a_switch_that_a_file_turns_on_is_turned_off_by_its_opposite(
    folder: Path, flag: str, name: str, value: bool
) -> None:
    (folder / "cco.toml").write_text("no-watch = true\nstop-agents = true\n")
    assert getattr(settings_from_flags(folder), name) is not value
    assert getattr(settings_from_flags(folder, flag), name) is value


@pytest.mark.parametrize(
    "words",
    [[], ["serve"], ["--no-watch"], ["--no-watch", "serve"], ["serve", "--no-plugins", "--stop-agents"]],
    ids=" ".join,
)
def test_the_headline_command_serves_the_repository_around_it(folder: Path, words: list[str]) -> None:
    git(folder, "init", "-q")
    state = clean_environment(XDG_STATE_HOME=str(folder.parent / "state"), CCO_SIDECAR_PORT="0")
    process = subprocess.Popen(
        [sys.executable, str(MODULE), *words], cwd=folder / "src", env=state, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("Orchestration sidecar") and lines[3].split() == ["Root:", str(folder)], lines
        url = lines[1].split()[1]
        assert requests.get(f"{url}/health", timeout=10).json()["status"] == "healthy"
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        assert process.wait(120) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tls-cert c.pem", "--tls-cert: needs --tls-key beside it"),
        ("--tls-key k.pem", "--tls-key: needs --tls-cert beside it"),
        ("--nats-synced", "--nats-synced: needs --backend beside it"),
        ("--nats-prefix site", "--nats-prefix: needs --backend beside it"),
        ("--backend nats://a --nats-tls-key k.pem", "--nats-tls-key: needs --nats-tls-cert beside it"),
        ("--host 999.1.1.1", "--host: '999.1.1.1' must be a host name or an address"),
        ("--host 1.2.3.4.5", "--host: '1.2.3.4.5' must be a host name or an address"),
        ("--host ::g", "--host: '::g' must be a host name or an address"),
        ("--allowed-host a,b:80", "--allowed-host: 'b:80' must be a host name or an address, without a scheme"),
        ("--allowed-host http://a", "--allowed-host: 'http://a' must be "),
        ("--allowed-host=a\u00a0b", "--allowed-host: 'a\\xa0b' must be "),
        ("--allowed-host [::1]", "--allowed-host: '[::1]' must be "),
        ("--cors-origin zzz", "--cors-origin: 'zzz' must be like https://host or https://host:port, in small letters"),
        ("--cors-origin https://a.example/", "--cors-origin: 'https://a.example/' must be "),
        ("--cors-origin https://A.example", "--cors-origin: 'https://A.example' must be "),
    ],
)
def test_options_that_could_have_no_effect_are_refused(
    flags: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cco_sidecar.main(["serve", *flags.split(" ")]) == 2
    assert capsys.readouterr().err.startswith(f"cco: {said}")


def test_a_settings_file_may_hold_the_rest_for_a_backend_that_is_named_elsewhere(folder: Path) -> None:
    (folder / "cco.toml").write_text("nats-synced = true\nnats-prefix = 'site'\nnats-replicas = 3\n")
    settings: Any = load_settings({"root": str(folder)}, {})
    assert (settings.backend, settings.nats_synced, settings.nats_prefix) == (None, True, "site")
    settings = load_settings({"root": str(folder)}, {"CCO_SIDECAR_BACKEND": "nats://a"})
    assert (settings.backend, settings.nats_replicas) == ("nats://a", 3)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("host", ["::1", "fe80::1%eth0", "127.1", "0.0.0.0", "localhost", "my_box", "4u", "a.b."]),
        ("allowed_host", ["*", "devbox", "DevBox.example.", "10.0.0.1", "::1", "my_box-2", "xn--bcher-kva.example"]),
        (
            "cors_origin",
            ["null", "https://a.example", "http://10.0.0.1:8080", "http://[::1]:3", "vscode-webview://0a-b"],
        ),
    ],
)
def test_hosts_and_origins_that_can_be_are_taken(folder: Path, name: str, texts: list[str]) -> None:
    for text in texts:
        assert text in getattr(load_settings({"root": str(folder), name: text}, {}), name)


@pytest.mark.parametrize("name", ["REFUSED", "read_match", "NAME_IN_WORDS", "ADDED"])
@pytest.mark.parametrize("words", [["serve"], ["--help"], ["token", "--type", "qa-engineer"]])
def test_a_file_and_plugins_of_another_version_are_refused_in_one_line(
    folder: Path, tmp_path: Path, name: str, words: list[str]
) -> None:
    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copy(MODULE, tmp_path / "copy"))
    copy.write_text(re.sub(rf"\b{name}\b", "another_name", copy.read_text()))
    plugins = Path(shutil.copytree(MODULE.parent / "plugins", tmp_path / "copy/plugins"))
    if name == "ADDED":  # by plugins that are newer than the file
        (plugins / "_words.py").write_text("import cco_sidecar\n\ncco_sidecar.ADDED\n")
    line = refusal(run(*words, "--storage", str(tmp_path / "state"), cwd=folder, module=copy))
    assert str(copy.resolve()) in line and str(plugins.resolve()) in line and "take both from one checkout" in line
    assert f"'{name}'" in line and not (tmp_path / "state").exists()


@pytest.mark.parametrize("wants", ["return cco_sidecar.NOWHERE", "from cco_sidecar import NOWHERE"])
def test_what_a_users_plugin_lacks_is_not_laid_to_the_bundled_ones(folder: Path, tmp_path: Path, wants: str) -> None:
    (tmp_path / "ours").mkdir()
    greeting = GREETING.replace('print("hello", options.name, options.port, options.host)', wants)
    (tmp_path / "ours/greeting.py").write_text(f"import cco_sidecar\n{greeting}")
    ended = run("greet", "you", cwd=folder, CCO_SIDECAR_PLUGINS=str(tmp_path / "ours"))
    assert ended.returncode and "greeting.py" in ended.stderr and "NOWHERE" in ended.stderr
    assert "do not fit" not in ended.stderr


def test_https_that_is_asked_for_is_never_served_as_http(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone/plugins").mkdir(parents=True)
    alone = Path(shutil.copy(MODULE, tmp_path / "alone"))
    pair = ["--tls-cert", "c.pem", "--tls-key", "k.pem", "--storage", str(tmp_path / "state")]
    assert "--tls-cert: no such command or option, see --help; is plugins/ beside" in refusal(
        run(*pair, cwd=folder, module=alone)
    )
    assert "--tls-cert: the plugin tls, which reads it, is not loaded" in refusal(
        run("--no-plugins", *pair, cwd=folder)
    )


# -- the storage


def test_storage_is_by_default_a_folder_per_user_project_and_root(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = load_settings({"root": str(repository)}, {}).storage
    assert found.parent == tmp_path / "state/cco-sidecar" and re.fullmatch("repository-[0-9a-f]{12}", found.name)
    assert load_settings({"root": str(repository / "src"), "project": "repository"}, {}).storage != found
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (
        load_settings({"root": str(repository)}, {}).storage == tmp_path / "home/.local/state/cco-sidecar" / found.name
    )


@pytest.mark.parametrize("state", ["state", "../state", "~/state", "."])
def test_a_relative_state_folder_is_passed_over(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert load_settings({"root": str(repository)}, {}).storage.parent == tmp_path / "home/.local/state/cco-sidecar"


@pytest.mark.parametrize("state", ["/dev/null", "/dev/null/x", "/proc/x", "{}"])
def test_a_state_folder_that_cannot_be_made_is_one_line(repository: Path, state: str) -> None:
    (repository.parent / "file").touch()
    state = state.format(repository.parent / "file")
    for words in (["--port", "0"], ["token", "--type", "qa-engineer"]):
        line = refusal(run(*words, cwd=repository, XDG_STATE_HOME=state))
        assert state in line and "XDG_STATE_HOME" in line
    assert "no sidecar runs for" in refusal(run("health", cwd=repository, XDG_STATE_HOME=state), 3)


@pytest.mark.parametrize("place", ["work tree", "main work tree", "folder around it", "folder in it"])
def test_a_command_that_finds_no_service_names_one_that_runs_nearby(
    repository: Path, tmp_path: Path, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    other = tmp_path / "other"
    if place.startswith("folder"):
        around, below = tmp_path / "plain", tmp_path / "plain/below"
        below.mkdir(parents=True)
        root, other = (around, below) if place == "folder around it" else (below, around)
    else:
        git(repository, "worktree", "add", "-q", str(other))
        root, other = (repository, other) if place == "work tree" else (other, repository)
    state = str(tmp_path / "state")
    (tmp_path / "state/cco-sidecar").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert "; one runs for" not in refusal(run("health", cwd=other, XDG_STATE_HOME=state), 3)
    make_service(root=root, storage=cco_sidecar.default_storage(root, PROJECT))
    line = refusal(run("health", cwd=other, XDG_STATE_HOME=state), 3)
    which = f"a {place}" if place.startswith("folder") else "another work tree of this repository"
    assert f"no sidecar runs for {other}; start it with " in line and f"; one runs for {root}, {which}: " in line
    ended = run(f"--root={root}", "health", cwd=other, XDG_STATE_HOME=state)
    assert ended.returncode == 0, ended.stderr
    token = run("token", "--type", "qa-engineer", cwd=other, XDG_STATE_HOME=state)
    assert token.returncode == 0 and token.stdout.count(".") == 2, token
    assert f"cco: the token is for {other}, for which no service runs; one runs for {root}, {which}: " in token.stderr
    assert run("token", "--type", "qa-engineer", cwd=root, XDG_STATE_HOME=state).stderr == ""


def test_in_a_folder_above_several_repositories_every_running_service_is_named(
    tmp_path: Path, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, roots = str(tmp_path / "state"), [tmp_path / "plain" / name for name in ("a", "b", "c")]
    (tmp_path / "state/cco-sidecar").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    for root in roots:
        root.mkdir(parents=True)
        make_service(root=root, storage=cco_sidecar.default_storage(root, PROJECT))
    line = refusal(run("health", cwd=tmp_path / "plain", XDG_STATE_HOME=state), 3)
    assert f"; one runs for {roots[0]}, a folder in it: `" in line
    assert line.rstrip().endswith(f"before a command uses that; others run for {roots[1]}, {roots[2]}")


@pytest.mark.parametrize("words", [("token", "--type", "qa-engineer"), ("doctor",), ("health",), ("plugins",)])
def test_a_broken_pyproject_is_told_once_by_each_command(
    repository: Path,
    tmp_path: Path,
    make_service: Callable[..., Service],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    (repository / "pyproject.toml").write_text("[tool.x\n")
    state = str(tmp_path / "state")
    (tmp_path / "state/cco-sidecar").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    make_service(storage=cco_sidecar.default_storage(repository, PROJECT))
    ended = run(*words, cwd=repository, XDG_STATE_HOME=state)
    assert ended.stderr.count(": it is not read for settings") == 1, ended.stderr


NOBODY = f"""
import os, pwd, sys

def nobody(*_):
    raise KeyError("no such user")

pwd.getpwuid = pwd.getpwnam = nobody
os.environ.pop("HOME", None)
os.environ.pop("XDG_STATE_HOME", None)
sys.path.insert(0, {str(ROOT)!r})
import cco_sidecar

sys.exit(cco_sidecar.main())
"""


def test_a_user_without_a_name_and_a_home_is_served_from_the_storage_that_was_named(
    repository: Path, tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    module = tmp_path / "nobody.py"
    module.write_text(NOBODY)
    for words in (
        ["--port", "0"],
        ["token", "--type", "qa-engineer"],
        ["health"],
        ["--storage", "~/x"],
        ["--plugins", "~other/x"],
    ):
        line = refusal(run(*words, cwd=repository, module=module))
        assert "home" in line and ("set HOME" in line or line.startswith(f"cco: {words[0]}: {words[1]!r} ")), line
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", "print('heard')"]), module=module)
    client = service.client()
    context = client.get("/api/context/i-1/python-specialist").json()["context"]
    assert [commit["message"] for commit in context["git_context"]["recent_commits"]] == [
        "Greet politely",
        "Initial commit",
    ]
    agent = client.spawn("i-1")["agent_id"]
    assert until(lambda: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    found = run("agent", "logs", agent, "--storage", str(service.storage), cwd=repository, module=module)
    assert (found.returncode, found.stdout, found.stderr) == (0, "heard\n", "")
    assert service.stop() == 0 and "Traceback" not in service.log


@pytest.mark.parametrize(
    "words", [["--port", "0"], ["token", "--type", "qa-engineer"], ["results", "list"], ["--storage", "~/x"]]
)
def test_an_empty_home_is_none_and_not_the_root_of_all_files(
    repository: Path, tmp_path: Path, words: list[str]
) -> None:
    module = tmp_path / "nobody.py"
    module.write_text(NOBODY.replace('os.environ.pop("HOME", None)', 'os.environ["HOME"] = ""'))
    line = refusal(run(*words, cwd=repository, module=module))
    assert "home" in line and ("set HOME" in line or line.startswith(f"cco: {words[0]}: {words[1]!r} ")), line


@pytest.mark.parametrize("name", [b"r\xff\xe9po", b"\xc3", "répo→😀".encode()])
def test_a_root_whose_name_is_not_utf_8_is_served(
    tmp_path: Path, make_service: Callable[..., Service], name: bytes
) -> None:
    root = make_repository(tmp_path / os.fsdecode(name))
    agent = [
        sys.executable,
        "-c",
        "import os; print(os.getcwd() == os.environ['PROJECT_ROOT'], len(os.environ['PROJECT_ROOT']))",
    ]
    service = make_service("--agent-command", json.dumps(agent), root=root)
    client = service.client()
    assert client.get("/api/context/i-1/python-specialist").json()["context"]["git_context"]["branch"] == "main"
    assert service.info["root"] == f"{tmp_path}/{name.decode('utf-8', 'replace')}"
    client.store(issue="i-1")
    agent_id = client.spawn("i-1")["agent_id"]
    assert until(lambda: client.get(f"/api/agents/{agent_id}/status").json()["ended_at"])
    assert client.get(f"/api/agents/{agent_id}/logs").json()["text"] == f"True {len(str(root))}\n"
    (root / "new.py").write_text("x = 1\n")
    assert "new.py" in client.get("/api/context/i-1/python-specialist").text
    for words in (["health"], ["results", "list", "--format", "json"], ["doctor"], ["agent", "list"]):
        found = run(
            *words,
            "--storage",
            str(service.storage),
            cwd=root / "src",
            LC_ALL="C",
            PYTHONUTF8="0",
            PYTHONCOERCECLOCALE="0",
        )
        assert (found.returncode, found.stderr) == (0, ""), (words, found)
    assert service.stop() == 0 and "Traceback" not in service.log


def test_a_storage_whose_name_is_not_utf_8_is_refused_in_one_line(repository: Path, tmp_path: Path) -> None:
    for words in (["--port", "0"], ["token", "--type", "qa-engineer"]):
        for place in ({"XDG_STATE_HOME": str(tmp_path / "\udcff")}, {"CCO_SIDECAR_STORAGE": "/tmp/\udcc3/x"}):
            assert "is not UTF-8" in refusal(run(*words, cwd=repository, **place))


@pytest.mark.parametrize("host", ["a..b", "\udcff", ".", "x" * 70])
def test_a_host_that_is_no_name_is_one_line(folder: Path, host: str) -> None:
    assert refusal(run("--port", "0", "--host", host, cwd=folder)).startswith("cco: --host: ")


def test_everything_in_the_storage_is_for_its_user_alone(
    repository: Path, tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o755)
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", "print('hello')"]))
    client = service.client()
    client.store()
    client.get("/api/context/issue-1/python-specialist", task="session")
    spawned = client.spawn()
    until(lambda: client.get(f"/api/agents/{spawned['agent_id']}/status").json()["ended_at"])
    folders = [storage, *(path for path in storage.rglob("*") if path.is_dir())]
    files = [path for path in storage.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= set(
        "jwt.secret sidecar.db sidecar.json lock python-specialist.json output.0.log".split()
    )
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in folders} == dict.fromkeys(map(str, folders), 0o700)
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in files} == dict.fromkeys(map(str, files), 0o600)


def test_storage_inside_the_repository_is_refused(repository: Path) -> None:
    (repository.parent / "link").symlink_to(repository / "src")
    for place in ("state", "../link/state"):
        assert "inside the repository" in refusal(run("--storage", place, cwd=repository))
    assert not (repository / "state").exists() and not (repository / "src/state").exists()


def test_storage_of_somebody_else_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({"root": str(repository), "storage": str(tmp_path / "theirs")}, {})
    cco_sidecar.prepare_storage_folder(settings)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StartError, match="belongs to somebody else"):
        cco_sidecar.prepare_storage_folder(settings)


def test_storage_that_is_a_link_or_a_file_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    assert "--storage" in refusal(run("--storage", str(tmp_path / "link"), cwd=repository))
    told = refusal(run("--storage", str(tmp_path / "file"), cwd=repository))
    assert "--storage" in told and "unless you name it" not in told
    named = run(cwd=repository, CCO_SIDECAR_STORAGE=str(tmp_path / "file/below"))
    assert "file/below'" in refusal(named) and "unless you name it" not in refusal(named)
    unnamed = refusal(run(cwd=repository, XDG_STATE_HOME=str(tmp_path / "file")))
    assert unnamed.endswith("unless you name it, it lies below $XDG_STATE_HOME or your home folder\n")


def plant(kind: str, storage: Path) -> None:
    """Something in a storage that has been used before."""
    secret, elsewhere = storage / "jwt.secret", storage.parent / "elsewhere"
    elsewhere.write_text("x" * 40)
    if kind.startswith("link"):
        place = storage / kind.removeprefix("link ")
        if place.is_dir():
            place.rename(storage.parent / "moved")
        place.unlink(missing_ok=True)
        place.symlink_to(elsewhere)
    elif kind == "folder that others may write":
        storage.chmod(0o777)
    elif kind == "folder that its group may write":
        storage.chmod(0o770)
    elif kind == "file that others may write":
        (storage / "sidecar.db").chmod(0o602)
    else:
        secret.chmod(0o640)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((f"link {name}", "is a link") for name in ("jwt.secret", "sidecar.db", "audit.log", "sidecar.json", "results", "lock")),
        ("folder that others may write", "others may write"), ("folder that its group may write", "others may write"),
        ("file that others may write", "others may write"), ("secret that others can read", "others can read"),
    ],
)  # fmt: skip
def test_a_storage_that_others_may_have_touched_is_refused(
    repository: Path, tmp_path: Path, kind: str, reason: str
) -> None:
    settings = load_settings({"root": str(repository), "storage": str(tmp_path / "storage")}, {})
    cco_sidecar.prepare_storage_folder(settings)
    cco_sidecar.make_or_read_secret(settings.storage / "jwt.secret")
    (settings.storage / "sidecar.db").touch(mode=0o600)
    (settings.storage / "results").mkdir(mode=0o700)
    plant(kind, settings.storage)
    for command in (["serve", "--port", "0"], ["token", "--type", "qa-engineer"]):
        done = run(*command, "--storage", str(settings.storage), cwd=repository)
        assert reason in refusal(done)
    assert (tmp_path / "elsewhere").read_text() == "x" * 40, "nothing is written through a link"


def test_files_of_somebody_else_in_the_storage_are_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({"root": str(repository), "storage": str(tmp_path / "storage")}, {})
    cco_sidecar.prepare_storage_folder(settings)
    (settings.storage / "jwt.secret").write_text("x" * 40)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StartError, match="belongs to somebody else"):
        cco_sidecar.make_private(settings.storage / "jwt.secret")


@pytest.mark.parametrize("name", ["meter.db-journal", ".sidecar.json-x1", "sidecar.db-wal"])
def test_a_file_that_goes_while_the_storage_is_looked_at_is_no_error(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = load_settings({"root": str(repository), "storage": str(tmp_path / "storage")}, {})
    cco_sidecar.prepare_storage_folder(settings)
    (settings.storage / "audit.log").touch(mode=0o644)
    there = settings.storage.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: [folder / name, *there()])
    cco_sidecar.prepare_storage_folder(settings)  # as a second start and a command do, while a service runs
    assert (settings.storage / "audit.log").stat().st_mode & 0o777 == 0o600


def test_what_others_could_only_read_is_taken_back_from_them(repository: Path, tmp_path: Path) -> None:
    settings = load_settings({"root": str(repository), "storage": str(tmp_path / "storage")}, {})
    settings.storage.mkdir(mode=0o755)
    (settings.storage / "audit.log").touch(mode=0o644)
    (settings.storage / "results").mkdir(mode=0o755)
    cco_sidecar.prepare_storage_folder(settings)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [settings.storage, *settings.storage.iterdir()]}
    assert modes == {"storage": 0o700, "audit.log": 0o600, "results": 0o700}


# -- one process, its announcement and its port


def test_a_running_service_announces_itself_and_its_banner_gives_no_secret_away(
    make_service: Callable[..., Service],
) -> None:
    service = make_service()
    pid = service.process.pid if service.process else 0
    info = json.loads((service.storage / "sidecar.json").read_text())
    assert set(info) == {"pid", "url", "project_id", "root", "version", "started_at", "instance_id"}
    assert (info["pid"], info["project_id"], info["root"]) == (pid, PROJECT, str(service.root))
    assert info["version"] == cco_sidecar.__version__ and re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info["started_at"]
    )
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+", info["url"])
    service.client().store()
    banner = until(lambda: service.log if "Stop:" in service.log else "")
    for shown in (
        info["url"],
        PROJECT,
        str(service.root),
        str(service.storage),
        " bundled\n",
        "token --type",
    ):
        assert shown in banner
    assert (service.storage / "jwt.secret").read_text() not in service.log and "eyJ" not in service.log
    assert "Alone:" not in banner  # the bundled plugins leave nothing out

    second = run("--root", str(service.root), "--storage", str(service.storage), "--port", "0", cwd=service.root)
    line = refusal(second, 1)
    assert str(pid) in line and info["url"] in line

    assert service.stop() == 0
    assert not (service.storage / "sidecar.json").exists()
    assert "Traceback" not in service.log


def put_link(path: Path, target: Path) -> None:
    """A link in the place of ``path``, in one step: the service looks all the time."""
    (link := path.with_name("link")).symlink_to(target)
    link.rename(path)


CLEANERS: dict[str, Callable[[Path], object]] = {
    "removes sidecar.json": lambda storage: (storage / "sidecar.json").unlink(),
    "empties sidecar.json": lambda storage: (storage / "sidecar.json").write_text(""),
    "breaks sidecar.json": lambda storage: (storage / "sidecar.json").write_text('{"pid": 1'),
    "removes the secret": lambda storage: (storage / "jwt.secret").unlink(),
    "empties the secret": lambda storage: (storage / "jwt.secret").write_text(""),
    "replaces the secret": lambda storage: (storage / "jwt.secret").write_text("another secret " * 4),
    "links the secret": lambda storage: put_link(
        storage / "jwt.secret", shutil.copy2(storage / "jwt.secret", storage / "x")
    ),
    "links sidecar.json": lambda storage: put_link(
        storage / "sidecar.json", shutil.copy2(storage / "sidecar.json", storage / "y")
    ),
    "links the secret to nothing": lambda storage: put_link(storage / "jwt.secret", Path("/nowhere")),
    "removes every file": lambda storage: [(storage / name).unlink() for name in ("jwt.secret", "sidecar.json")],
}


@pytest.mark.parametrize("way", CLEANERS)
def test_what_clients_need_is_written_again_where_a_cleaner_took_it(
    make_service: Callable[..., Service], way: str
) -> None:
    service = make_service()
    files = {path: path.read_bytes() for path in (service.storage / "jwt.secret", service.storage / "sidecar.json")}
    for _ in range(2):
        CLEANERS[way](service.storage)
        if "secret" not in way or "removes" in way:
            until(lambda: not any(path.is_symlink() for path in files))
            where = ("--storage", str(service.storage), "--project", PROJECT)
            made = run("token", "--type", "python-specialist", *where, cwd=service.root)
            assert Client(service.url, made.stdout.strip()).get("/status").status_code == 200, made.stderr
        until(lambda: {path: path.read_bytes() for path in files if path.exists() and not path.is_symlink()} == files)
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    times = 2 * ("file" in way or "secret" in way)
    until(lambda: service.log.count("jwt.secret was removed or replaced") == times)
    assert service.stop() == 0 and not (service.storage / "sidecar.json").exists()


EARLY_CLEANER = """
from cco_sidecar import Storage, hookimpl

@hookimpl(trylast=True)
def part_class(base):
    class Cleaned(base):
        def announce(self, info):
            super().announce(info)
            self.path.with_name("FILE").write_text("CONTENT")

    return Cleaned if base is Storage else None
"""


@pytest.mark.parametrize(
    ("file", "content"), [("sidecar.json", "{"), ("sidecar.json", ""), ("jwt.secret", "another secret " * 4)]
)
def test_a_cleaner_that_comes_with_the_announcement_is_undone(
    make_service: Callable[..., Service], tmp_path: Path, file: str, content: str
) -> None:
    (more := tmp_path / "more").mkdir()
    (more / "cleaner.py").write_text(EARLY_CLEANER.replace("FILE", file).replace("CONTENT", content))
    service = make_service("--plugins", str(more))
    until(lambda: f"{file} was removed or replaced" in service.log)
    assert service.client().get("/status").status_code == 200
    assert (service.storage / file).read_text() != content
    assert json.loads((service.storage / "sidecar.json").read_text())["url"] == service.url


def test_a_storage_that_a_cleaner_took_altogether_is_said_once_and_nothing_is_made_in_its_place(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service()
    until(lambda: "Stop:" in service.log)  # the start is over, which needs the storage
    service.storage.rename(tmp_path / "taken")
    until(lambda: "cannot be written again" in service.log)
    time.sleep(3 * plugin("guard").GuardedStorage.KEEP_SECONDS)
    assert service.log.count("cannot be written again") == 1 and not service.storage.exists()
    (tmp_path / "taken").rename(service.storage)
    (service.storage / "sidecar.json").unlink()
    until((service.storage / "sidecar.json").exists)


def put(place: Path, make: Callable[[Path], object]) -> None:
    """Have ``make`` take the place of a file, which the service may write again in between."""

    def made() -> bool:
        place.unlink()
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            make(place)
            return True
        return False

    until(made)


IN_THE_PLACE: dict[str, Callable[[Path], object]] = {
    "a full folder": lambda place: (place / "full").mkdir(parents=True),
    "an empty folder": Path.mkdir,
    "a folder of the user alone": lambda place: place.mkdir(0o700),
}


@pytest.mark.parametrize("name", ["sidecar.json", "jwt.secret"])
@pytest.mark.parametrize("what", IN_THE_PLACE)
def test_a_folder_in_the_place_of_a_file_is_named_by_the_service_and_by_commands_and_disturbs_no_stop(
    make_service: Callable[..., Service], name: str, what: str
) -> None:
    service = make_service()
    place = service.storage / name
    put(place, IN_THE_PLACE[what])
    until(lambda: "cannot be written again" in service.log)
    (line,) = [line for line in service.log.splitlines() if "cannot be written again" in line]
    assert f"ERROR {name} cannot be written again: Is a directory" in line
    for command in (["token", "--type", "qa-engineer"], ["serve", "--port", "0"]):
        told = refusal(run(*command, "--storage", str(service.storage), cwd=service.root))
        assert f"{place} is no file" in told and "remove it" in told and "chmod" not in told
    assert service.stop() == 0
    assert "Traceback" not in service.log and "Errno" not in service.log
    assert ("sidecar.json cannot be removed: Is a directory" in service.log) == (name == "sidecar.json")


@pytest.mark.parametrize("name", ["sidecar.json", "jwt.secret"])
def test_a_pipe_in_the_place_of_a_file_holds_up_nothing(make_service: Callable[..., Service], name: str) -> None:
    service = make_service()
    before = (service.storage / name).read_bytes()
    put(service.storage / name, os.mkfifo)
    until(lambda: (service.storage / name).is_file())
    assert (service.storage / name).read_bytes() == before and service.stop() == 0


def test_a_secret_that_was_given_is_not_written_into_the_storage(make_service: Callable[..., Service]) -> None:
    service = make_service(env={"CCO_SIDECAR_JWT_SECRET": "a secret of the team's own, which is long enough"})
    (service.storage / "sidecar.json").unlink()
    until((service.storage / "sidecar.json").exists)
    assert not (service.storage / "jwt.secret").exists()


def test_a_free_port_is_taken_again_after_a_restart_and_another_one_where_it_is_gone(
    make_service: Callable[..., Service],
) -> None:
    service = make_service()
    first = service.url
    service.stop()
    assert service.start().url == first
    service.kill()
    with socket.create_server(("127.0.0.1", int(first.rpartition(":")[2]))):
        assert service.start().url != first
        assert requests.get(service.url + "/health", timeout=10).status_code == 200


def test_a_busy_port_is_explained_with_the_project_that_has_it(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    port = service.url.rpartition(":")[2]
    line = refusal(run("--port", port, "--storage", str(tmp_path / "other"), cwd=service.root), 1)
    assert PROJECT in line and port in line and "--port 0" in line
    assert not (tmp_path / "other/sidecar.json").exists()


def test_a_port_that_a_stranger_has_is_explained_too(tmp_path: Path, repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = str(stranger.getsockname()[1])
        line = refusal(run("--port", port, "--storage", str(tmp_path / "other"), cwd=repository), 1)
    assert port in line and "--port 0" in line and "project" not in line


# -- the end


async def park(url: str, token: str, number: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """``number`` long polls as connections of their own."""
    host, port = url.removeprefix("http://").split(":")
    path = "/api/events/wait/never?timeout=60000&since=latest"
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    connections = []
    for _ in range(number):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        connections.append((reader, writer))
    return connections


async def read_answer(reader: asyncio.StreamReader) -> tuple[str, Any]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length, head
    return head.split(b"\r\n")[0].decode(), json.loads(await reader.readexactly(int(length[1])))


def test_a_stop_answers_a_thousand_waiting_polls_and_exits_with_0(
    make_service: Callable[..., Service],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    service = make_service()
    token, watching = service.token(), service.client()

    async def scene() -> list[tuple[str, Any]]:
        connections = await park(service.url, token, 1000)
        await asyncio.to_thread(until, lambda: watching.get("/status").json()["events"]["active_subscriptions"] == 1000)
        assert service.process
        service.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*(read_answer(reader) for reader, _ in connections))
        for _, writer in connections:
            writer.close()
        return answers

    answers = asyncio.run(scene())
    assert service.process and service.process.wait(120) == 0, service.log
    assert {line for line, _ in answers} == {"HTTP/1.1 200 OK"} and len(answers) == 1000
    for _, answer in answers:
        assert (answer["events"], answer["timeout"], answer["more_available"], answer["next_cursor"]) == (
            [],
            True,
            False,
            None,
        )
        assert answer["scanned_to"]
    assert "Traceback" not in service.log


@pytest.mark.skipif(sys.platform == "win32", reason="no terminal hangs up there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_ctrl_c_an_order_and_a_closed_terminal_stop_the_service(
    make_service: Callable[..., Service], number: signal.Signals
) -> None:
    service = make_service()
    assert service.process
    service.process.send_signal(number)
    assert service.process.wait(120) == 0, service.log
    assert f"stopping on {number.name}" in service.log and not (service.storage / "sidecar.json").exists()


@pytest.mark.skipif(shutil.which("nohup") is None, reason="nohup is missing")
def test_a_closed_terminal_does_not_stop_a_service_under_nohup(repository: Path, tmp_path: Path) -> None:
    command = ["nohup", sys.executable, str(MODULE), "--port", "0", "--storage", str(tmp_path / "storage")]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=repository, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        announced = tmp_path / "storage/sidecar.json"
        until(lambda: announced.exists() or process.poll() is not None, 60)
        process.send_signal(signal.SIGHUP)
        assert requests.get(json.loads(announced.read_text())["url"] + "/health", timeout=10).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert b"stopping on SIGTERM" in (tmp_path / "output").read_bytes()
        assert b"SIGHUP" not in (tmp_path / "output").read_bytes()
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_a_stop_that_hangs(tmp_path: Path, make_service: Callable[..., Service]) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/slow.py").write_text(
        "import time\nfrom cco_sidecar import hookimpl\n\n@hookimpl\ndef shutdown(info):\n    print('lingering', flush=True)\n    time.sleep(60)\n"
    )
    service = make_service("--plugins", str(tmp_path / "plugins"))
    assert service.process
    service.process.send_signal(signal.SIGINT)
    until(lambda: "lingering" in service.log)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(120) == 128 + signal.SIGTERM


HANGS = "import os, time\nopen(os.environ['REACHED'], 'x').close()\ntime.sleep(60)\n"
MOMENTS = {
    "a package is imported": ("jwt.py", HANGS),
    "a plugin is imported": ("plugins/slow.py", HANGS),
    "a plugin is asked": (
        "plugins/slow.py",
        f"from cco_sidecar import hookimpl\n@hookimpl\ndef part_class():\n{textwrap.indent(HANGS, '    ')}",
    ),
}  # what a start is at, and the file in which it hangs then


@pytest.mark.skipif(sys.platform == "win32", reason="no signal comes from another process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
@pytest.mark.parametrize("program", ["cco_sidecar.py", "cco"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_start_that_is_interrupted_says_nothing_and_leaves_nothing(
    repository: Path, tmp_path: Path, moment: str, program: str, number: signal.Signals
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / MOMENTS[moment][0]).write_text(MOMENTS[moment][1])
    installed = tmp_path / "cco"  # as pip writes it
    installed.write_text("import sys\nfrom cco_sidecar import main\nsys.exit(main())\n")
    words = ["--storage", str(tmp_path / "storage"), "--port", "0", "--plugins", str(tmp_path / "plugins")]
    places = os.pathsep.join([str(tmp_path), str(MODULE.parent)])
    process = subprocess.Popen(
        [sys.executable, str(installed if program == "cco" else MODULE), *words], cwd=repository,
        env=clean_environment(PYTHONPATH=places, REACHED=str(tmp_path / "reached")),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: (tmp_path / "reached").exists() or process.poll() is not None, 60)
        process.send_signal(number)
        assert (process.communicate(timeout=60)[0], process.returncode) == (b"", -number)
        assert not (tmp_path / "storage").exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "words", [["/usr/bin/tobacco"], ["-c"], []], ids=["a name that ends alike", "no file", "no name"]
)
def test_a_program_that_imports_the_module_keeps_its_own_way_with_ctrl_c(words: list[str]) -> None:
    code = (
        f"import signal, sys, threading\nsys.argv = {words}\nimported = threading.Thread(target=__import__,"
        " args=['cco_sidecar'])\nimported.start()\nimported.join()\nassert 'cco_sidecar' in sys.modules\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=MODULE.parent, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_after_kill_9_the_next_start_takes_over_with_everything_that_was_promised(
    make_service: Callable[..., Service],
) -> None:
    service = make_service()
    client = service.client("python-specialist", sub="worker")
    stored, published = client.store(), client.publish("noted", {"n": 1})
    service.kill()
    assert (service.storage / "sidecar.json").exists()
    service.start()
    again = Client(service.url, client.token)
    assert again.get(f"/api/results/{stored['id']}").json()["id"] == stored["id"]
    events = again.wait(since="earliest", timeout=0)["events"]
    assert [event["event_id"] for event in events] == [stored["event_id"], published["event_id"]]


# -- the file alone


def test_missing_packages_are_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    line = refusal(run(cwd=tmp_path, python=("-S", "-I")))
    assert "pip install" in line and "uv run" in line
    for name in ("tornado", "pyjwt", "pluggy", "watchdog", "msgspec", "psutil"):
        assert name in line


def test_the_file_alone_serves_the_reference_and_runs_nothing_of_a_foreign_plugins_folder(
    repository: Path, tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    shutil.copy(MODULE, repository / "cco_sidecar.py")
    (repository / "plugins").mkdir()
    for name in ("tool", "__init__", "deploy"):
        (repository / f"plugins/{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').write('{name}')\n")
    agent = [sys.executable, str(ROOT / "tests/sample_agent.py")]
    service = make_service("--agent-command", json.dumps(agent), module=repository / "cco_sidecar.py")
    banner = until(lambda: service.log if "Stop:" in service.log else "")
    assert "Plugins:  0 bundled\n" in banner
    assert f"Alone:    {cco_sidecar.ALONE}: is plugins/ beside cco_sidecar.py? `pip" in banner and "no TLS, " in banner
    client = service.client()
    assert client.get("/health").json()["status"] == "healthy"
    spawned = client.post(
        "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1", "task": "work"}
    )
    assert spawned.status_code == 201, spawned.text
    event = client.wait("agent_completed", since="earliest", timeout=15_000)["events"][0]
    assert event["publisher"] == spawned.json()["agent_id"]
    context = client.get("/api/context/issue-1/test-engineer").json()["context"]
    assert [output["result_id"] for output in context["previous_agent_outputs"]] == [event["data"]["result_id"]]
    assert client.delete("/api/cache/context/issue-1").status_code == 200
    assert client.get("/status").json()["storage"]["results_stored"] == 1
    assert client.get("/openapi.json").status_code == 404  # is a plugin's
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_no_garbage_is_looked_for_while_modules_are_imported(tmp_path: Path, before: str) -> None:
    program = f"""if True:
        import gc, sys
        gc.{before}()
        early = []
        def began(phase, info):
            module = sys.modules.get("cco_sidecar")
            if hasattr(module, "argparse") and not hasattr(module, "__version__"):
                early.append(info)
        gc.callbacks.append(began)
        import cco_sidecar
        print(early, gc.isenabled())
    """
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == (f"[] {before == 'enable'}\n", ""), ended


def test_no_long_pattern_is_compiled_before_it_is_needed(tmp_path: Path) -> None:
    program = """if True:
        import re._compiler, sys
        compiled, compile_pattern = [], re._compiler.compile
        re._compiler.compile = lambda text, flags=0: (compiled.append(text), compile_pattern(text, flags))[1]
        import cco_sidecar
        hooks = cco_sidecar.bundled_class(cco_sidecar.Hooks, "_hooks", "SafeHooks")([])
        hooks.load(cco_sidecar.load_settings({}), strict=True)
        from cco_sidecar_plugins.agents.environment import SESSION_MARKERS, UNSAFE_VARIABLES
        from cco_sidecar_plugins.context._withheld import SECRET_NAME
        from cco_sidecar_plugins.context._manifests import CALL
        assert "tomllib" not in sys.modules  # no file that was read is TOML
        long = {each.pattern for each in (SESSION_MARKERS, UNSAFE_VARIABLES, SECRET_NAME, CALL)}
        print(*long.intersection(compiled[: -len(long)]), sep="\\n")
    """
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("\n", ""), ended


@pytest.mark.parametrize(
    ("kind", "own", "bundled"),
    [
        ("Hooks", [], 0),
        ("Hooks", ["ours", "more"], 0),
        ("SafeHooks", [], 0),
        ("SafeHooks", [], 2),
        ("SafeHooks", ["ours"], 2),
    ],
)
def test_the_banner_names_the_plugins_of_ones_own_counts_the_bundled_ones_and_says_what_is_missing_without_those(
    kind: str, own: list[str], bundled: int, tmp_path: Path
) -> None:
    hooks = (cco_sidecar.Hooks if kind == "Hooks" else plugin("_hooks").SafeHooks)([cco_sidecar.ReferenceRules()])
    made, folder = hooks.loaded[0].__class__, cco_sidecar.bundled_folder()
    hooks.loaded += [made(f"bundled{number}", f"{folder}/http/{number}.py", []) for number in range(bundled)]
    hooks.loaded += [made(name, f"{folder}-of-mine/{name}.py", []) for name in own]
    skips = kind == "SafeHooks"  # alone a plugin that cannot be used ends the start
    for name, file, problem in (("off", f"{folder}/off.py", "it lacks redis"), ("mine", "/mine.py", "it lacks wit")):
        hooks.loaded += [made(name, file, [], problem)] if skips else []
    info = cco_sidecar.SidecarInfo(1, "http://127.0.0.1:1", "p", "/r", "1", "")
    sidecar: Any = SimpleNamespace(
        hooks=hooks, info=info, server_class=cco_sidecar.Server, storage=SimpleNamespace(place="/s"),
        settings=load_settings({"root": str(tmp_path)}, {}),
    )  # fmt: skip
    banner = cco_sidecar.banner(sidecar)
    assert ("  Alone:    no TLS" in banner) is (bundled == 0)
    assert f"  Plugins:  {', '.join([*own, f'{bundled} bundled'])}\n" in banner and "bundled0" not in banner
    assert ("  Skipped:  off (it lacks redis)\n  Skipped:  mine (it lacks wit)\n" in banner) is skips


@pytest.mark.parametrize(
    ("host", "told"), [("0.0.0.0", ["  Open:     on all interfaces (0.0.0.0)"]),
                       ("::", ["  Open:     on all interfaces (::)"]), ("127.0.0.1", []), ("192.0.2.1", [])],
)  # fmt: skip
def test_the_banner_says_so_where_all_interfaces_are_open(host: str, told: list[str], tmp_path: Path) -> None:
    lines = plugin("_hooks").SafeHooks([]).banner_lines(load_settings({"root": str(tmp_path), "host": host}, {}))
    assert [line for line in lines if "Open:" in line] == told


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ({"no_plugins": True}, {}, "turned off by --no-plugins"),
        ({}, {"CCO_SIDECAR_NO_PLUGINS": "1"}, "turned off by CCO_SIDECAR_NO_PLUGINS"),
        ({}, {}, "turned off by cco.toml:1: no-plugins"),
    ],
)
def test_where_plugins_are_turned_off_the_banner_and_refusals_say_by_what(
    flags: dict[str, Any], variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    if not flags and not variables:
        (tmp_path / "cco.toml").write_text("no-plugins = true\n")
    settings = load_settings({"root": str(tmp_path), **flags}, variables)
    sidecar: Any = SimpleNamespace(
        hooks=cco_sidecar.load_hooks(settings, strict=True), info=cco_sidecar.SidecarInfo(1, "http://[::1]:1", "p", "/r", "1", ""),
        server_class=cco_sidecar.Server, storage=SimpleNamespace(place="/s"), settings=settings,
    )  # fmt: skip
    assert f"client commands: {said}\n" in cco_sidecar.banner(sidecar)
    limited = load_settings({"root": str(tmp_path), "event_limit": "5", **flags}, variables)
    with pytest.raises(StartError, match=f"guard, which reads it, is not loaded: plugins are {said}"):
        cco_sidecar.load_hooks(limited, strict=True)


def test_the_command_of_the_banner_makes_a_token_for_its_service_wherever_it_is_typed(
    make_service: Callable[..., Service], alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for number, module in enumerate((MODULE, alone)):
        service = make_service(storage=tmp_path / f"state {number}", module=module)
        banner = until(lambda service=service: service.log if "Stop:" in service.log else "")
        command = re.findall(r"  Token:    (.*)", banner)[0]
        ended = subprocess.run(
            command, shell=True, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=30
        )
        assert ended.returncode == 0 and ended.stderr == "", ended.stderr
        assert Client(service.url, ended.stdout.strip()).get("/status").status_code == 200
        assert service.stop() == 0


@pytest.mark.parametrize(
    ("called", "flags", "variables", "said"),
    [
        ("{bin}/cco", {}, {}, "cco"),
        ("tool s/cco", {}, {}, "'tool s/cco'"),
        ("{bin}/cco", {"root": "{here}/a b"}, {}, "cco '--root={here}/a b'"),
        ("{bin}/cco", {"project": "p"}, {"CCO_SIDECAR_STORAGE": "{here}/s"}, "cco --project=p --storage={here}/s"),
        ("cco_sidecar.py", {}, {"CCO_SIDECAR_ROOT": "a b"}, "{python} cco_sidecar.py '--root={here}/a b'"),
        ("", {}, {}, "{python} cco_sidecar.py"),
    ],
)
def test_a_command_that_is_named_works_as_it_stands(
    called: str, flags: dict[str, str], variables: dict[str, str], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("bin", "a b"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/cco").write_text("#!/bin/sh\n")
    (tmp_path / "bin/cco").chmod(0o700)
    python = Path(sys.executable).name
    (tmp_path / f"bin/{python}").symlink_to(sys.executable)

    def filled(text: str) -> str:
        return text.format(here=tmp_path, bin=tmp_path / "bin", python=python)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(sys, "argv", [filled(called)])
    monkeypatch.setattr(sys, "executable", str(tmp_path / f"bin/{python}"))
    settings = load_settings(
        {name: filled(value) for name, value in flags.items()},
        {name: filled(value) for name, value in variables.items()},
    )
    assert plugin("_called").own_command(settings) == filled(said)
    monkeypatch.setenv("PATH", "")
    assert plugin("_called").own_command().startswith(str(tmp_path / "bin")) or called.startswith("tool")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The module in a repository whose plugins folder and modules of the names of ours must never be run."""
    for name in ("secrets", "queue", "jwt", "tornado", "msgspec", "cco_sidecar_plugins"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign')")
    for file in (ROOT / "plugins").rglob("*.py"):
        foreign = tmp_path / file.relative_to(ROOT)
        foreign.parent.mkdir(parents=True, exist_ok=True)
        speaks = "  # of cco_sidecar" if foreign.parent.name == "plugins" else ""
        foreign.write_text(f"def register_commands(): pass{speaks}\nraise SystemExit('foreign')\n")
    return Path(shutil.copy(MODULE, tmp_path / "cco_sidecar.py"))


def test_the_file_alone_has_the_commands_that_need_no_service_and_says_where_the_others_are(
    repository: Path, tmp_path: Path, alone: Path
) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    for words in ("token --type test-engineer", "--root . token --type test-engineer --root .", "--help",
                  "serve --help", "token --help", "--version"):  # fmt: skip
        ended = run(*words.split(), cwd=repository, module=alone, **state)
        assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout, words
        assert "help" not in words or ended.stdout.startswith(
            f"usage: {sys.executable} {alone} [serve | token --type TYPE]"
        )
    for command in ("health", "plugins", "agent list", "results", "run", "schema"):
        line = refusal(run(*command.split(), "--format", "json", cwd=repository, module=alone))
        first = command.split()[0]
        assert line.startswith(
            f"cco: {first}: no such command or option, see --help; is plugins/ beside cco_sidecar.py?"
        ), line
        assert "`pip install .`" in line


@pytest.mark.parametrize(("words", "said"), [
    ("tokn", "tokn: no such command or option, see --help; is plugins/ "), ("--prot 1", "--prot: no such command or option, see --help; is "),
    ("token", "token needs --type (see {cco} --help)\n"), ("token --type x --prot 1", "--prot: no such command or option"),
    ("token --type", "--type: expected one argument"), ("--port", "--port: expected one argument (see {cco} --help)\n"), ("--port x", "--port: 'x' must be"),
    ("--plugins nowhere", "--plugins: plugin nowhere: ImportError: it is not there\n"),
    ("token --type qa-enginer --plugins README.md", "--plugins: plugin README: "),
    ("token --type qa-enginer", "--type: Unknown agent type qa-enginer\n"),
    ("token --type qa-engineer --issue x", "--issue: no such command or option"),
    ("serve x", "x: no such command or option"), ("\x1b[2J", " [2J: no such command"), ("--type x", "--type: no such command"),
])  # fmt: skip
def test_wrong_use_of_the_file_alone_is_one_line(repository: Path, alone: Path, words: str, said: str) -> None:
    line = refusal(run(*words.split(), cwd=repository, module=alone))
    assert line.startswith(f"cco: {said.format(cco=f'{sys.executable} {alone}')}")


@pytest.mark.parametrize(
    ("file", "content", "refused"),
    [
        ("cco.toml", "tls-cert = 'cert.pem'\n", True),
        ("cco.toml", "", True),
        ("pyproject.toml", "\ufeff[tool.cco-sidecar]\nport = 5\n", True),
        ("pyproject.toml", "[project]\nname = 'x'\n\n[tool.\"cco-sidecar\".agent-types]\nx = 'qa'\n", True),
        ("pyproject.toml", "[tool]\ncco-sidecar = {port = 5}\n", True),
        ("pyproject.toml", "tool.cco-sidecar.port = 5\n", True),
        ("pyproject.toml", "[project]\nname = 'cco-sidecar'\ndependencies = [\n  'cco-sidecar']\n", False),
        (
            "pyproject.toml",
            "# [tool.cco-sidecar]\n[tool.cco-sidecar-x]\n[project.scripts]\ncco-sidecar = 'x:y'\n",
            False,
        ),
        ("pyproject.toml", "\udcff[", False),
        pytest.param("pyproject.toml", "\n " * 300_000 + "[tools]\n", False, id="long blanks"),
        pytest.param("pyproject.toml", " " * 600_000 + "[tools]\n", False, id="a long blank"),
    ],
    ids=ascii,
)
def test_the_file_alone_refuses_to_pass_over_a_settings_file(
    repository: Path, tmp_path: Path, alone: Path, file: str, content: str, refused: bool
) -> None:
    (repository / file).write_text(content, errors="surrogateescape")
    ended = run("token", "--type", "qa-engineer", cwd=repository, module=alone, XDG_STATE_HOME=str(tmp_path / "state"))
    if refused:
        said = f"cco: {file}: settings files are not read; is plugins/ beside cco_sidecar.py?"
        assert ended.returncode == 2 and refusal(ended).startswith(said)
    else:
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_wrong_key_behind_long_blanks_is_told_at_once(repository: Path) -> None:
    for blanks in ("\n " * 300_000, " " * 600_000):
        (repository / "pyproject.toml").write_text(f"{blanks}[tool.cco-sidecar]\nprot = 1\n")
        line = blanks.count("\n") + 2
        said = f"cco: pyproject.toml:{line}: prot: unknown option, did you mean port?"
        assert refusal(run("--port", "0", cwd=repository)).startswith(said)


@pytest.mark.parametrize("variable", ["CCO_SIDECAR_TLS_CERT", "CCO_SIDECAR_AGENT_TYPES", "CCO_SIDECAR_PROT"])
def test_the_file_alone_refuses_to_pass_over_a_variable(repository: Path, alone: Path, variable: str) -> None:
    ended = run("--port", "0", cwd=repository, module=alone, **{variable: "x"})
    assert refusal(ended).startswith(f"cco: {variable}: no such option; is plugins/ beside cco_sidecar.py?")


def test_commands_of_a_folder_of_plugins_need_the_bundled_ones(repository: Path, tmp_path: Path, alone: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/greeting.py").write_text(GREETING)
    for words in ("--plugins {} greet ada --port 5", "greet ada --port 5 --plugins {}"):
        ended = run(*words.format(tmp_path / "ours").split(), cwd=repository)
        assert (ended.returncode, ended.stdout, ended.stderr) == (4, "hello ada 5 theirs\n", ""), ended
    shown = run("--help", "--plugins", str(tmp_path / "ours"), cwd=repository)
    assert "say hello" in shown.stdout and shown.returncode == 0
    line = refusal(run("--plugins", str(tmp_path / "ours"), cwd=repository, module=alone))
    assert (
        "plugin greeting: ImportError: there is no hook 'register_commands'" in line
        and ": misspelt, or is plugins/ beside" in line
    )


GREETING = """
from cco_sidecar import hookimpl

def greet(options):
    print("hello", options.name, options.port, options.host)
    return 4

@hookimpl
def register_commands(commands):
    command = commands.add_parser("greet", help="say hello")
    command.add_argument("name")
    command.add_argument("--host", default="theirs")  # takes the place of ours
    command.set_defaults(run=greet)
"""


def test_uv_runs_the_file_without_an_installation(repository: Path, tmp_path: Path) -> None:
    shutil.copy(MODULE, repository / "cco_sidecar.py")
    uv = Path(sys.executable).with_name("uv")
    script = ["cco_sidecar.py", "--port=0", f"--storage={tmp_path / 'storage'}"]
    command = [str(uv), "run", "--quiet", f"--python={sys.executable}", *script]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=repository, env=clean_environment(), stdout=output, stderr=output)
    try:
        announced = tmp_path / "storage/sidecar.json"
        until(lambda: announced.exists() or process.poll() is not None, 60)
        assert process.poll() is None, (tmp_path / "output").read_text()
        info = json.loads(announced.read_text())
        assert requests.get(info["url"] + "/health", timeout=10).json()["status"] == "healthy"
        storage = re.escape(str(tmp_path / "storage"))
        assert re.search(
            rf"uv run cco_sidecar\.py .*--storage={storage} token --type", (tmp_path / "output").read_text()
        )
        os.kill(info["pid"], signal.SIGTERM)
        assert process.wait(120) == 0, (tmp_path / "output").read_text()
    finally:
        process.kill()
        process.wait()


def test_lines_of_a_busy_service_are_written_together_and_lone_ones_at_once() -> None:
    class Stream(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    async def log(level: int) -> None:
        asyncio.get_running_loop().time = lambda: 1_000.0  # type: ignore[method-assign] - all at one moment
        for number in range(100):
            handler.emit(logging.makeLogRecord({"msg": f"line {number}", "levelno": level}))
            await asyncio.sleep(0)

    for level, least, most in ((logging.INFO, 19, 22), (logging.ERROR, 100, 100)):
        handler = plugin("_program").LogLines(stream := Stream())
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(log(level))
        assert least <= stream.writes <= most
        handler.flush()
        assert stream.getvalue().split("\n")[:-1] == [f"line {number}" for number in range(100)]


def test_the_same_error_is_told_once_a_minute_with_how_often_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, now = plugin("_program").LogLines(stream := io.StringIO()), 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def told(*lines: tuple[int, str]) -> list[str]:
        stream.truncate(stream.seek(0))
        for level, text in lines:
            handler.emit(logging.makeLogRecord({"msg": "%s", "args": (text,), "levelno": level}))
        handler.flush()
        return stream.getvalue().splitlines()

    full, other = (logging.ERROR, "the disk is full"), (logging.ERROR, "the disk is away")
    assert told(full, other, full, full) == ["the disk is full", "the disk is away"]
    assert told(*[(logging.WARNING, "a warning")] * 2) == ["a warning"] * 2
    now += 59.0
    assert told(full, other) == []
    now += 1.0
    assert told(full, full) == ["the disk is full (3 times more since it was told last)"]
    now += 60.0
    others = [(logging.ERROR, f"error {number}") for number in range(200)]
    assert told(*others, full) == [*(text for _, text in others), "the disk is full"]  # of which no more is known


def test_log_lines_are_json_where_that_is_asked_for(make_service: Callable[..., Service]) -> None:
    service = make_service("--log-format", "json")
    assert service.client().get("/api/nothing").status_code == 404
    lines = [
        json.loads(line)
        for line in until(
            lambda: [line for line in service.log_path.read_text().splitlines() if "/api/nothing" in line]
        )
    ]
    assert [(line["level"], line["time"][-1]) for line in lines] == [("info", "Z")] and "404" in lines[0]["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("length", [99, 50_000])
@pytest.mark.parametrize("character", ["x", "\U0001f600"], ids=["ASCII", "not ASCII"])
def test_log_lines_larger_than_the_room_in_a_pipe_are_not_waited_for(character: str, length: int) -> None:
    line = character * length
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    held = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            held += os.write(writer, b"." * select.PIPE_BUF)
    os.set_blocking(writer, True)
    held -= len(os.read(reader, select.PIPE_BUF))  # room for one piece
    with open(writer, "w", encoding="utf-8") as stream, open(reader, "rb", 0) as source:  # the reader closes first
        handler = plugin("_program").LogLines(stream)
        handler.PATIENCE = 0.01
        handler._lines = [f"{line}\n"] * (200_000 // len(line))
        flushing = threading.Thread(target=handler.flush, daemon=True)
        flushing.start()
        flushing.join(10)
        waits = flushing.is_alive()
        written = source.read(1_000_000)[held:].decode()
        assert not waits
        assert f"{line}\n" * 200 == written + (f"{line}\n" * 200)[len(written) :] and written
        handler.emit(logging.makeLogRecord({"msg": "the next", "levelno": logging.ERROR}))
        assert source.read(1_000_000).decode() == ("" if written.endswith("\n") else "\n") + "the next\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot write to a pipe without waiting")
@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
@pytest.mark.parametrize("held_up_by", ["the stream's lock", "a pipe that was filled meanwhile"])
def test_whoever_floods_the_standard_error_that_nobody_reads_holds_no_log_line_up(
    level: int, held_up_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # nothing may have been written
    released = threading.Event()

    class Raw(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def fileno(self) -> int:
            return writer

        def write(self, content: Any) -> int:
            released.wait(30)
            return len(content)

    with open(reader, "rb", 0) as source, open(writer, "wb", 0):
        stream = io.TextIOWrapper(io.BufferedWriter(Raw()), encoding="utf-8")  # type: ignore[type-var]
        handler = plugin("_program").LogLines(stream)
        if held_up_by == "the stream's lock":
            flooding = threading.Thread(target=lambda: (stream.write("x" * 100_000), stream.flush()), daemon=True)
            flooding.start()
        else:
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"." * select.PIPE_BUF)
            os.set_blocking(writer, True)
            monkeypatch.setattr(handler, "_is_taken", lambda until: True)
        record = logging.makeLogRecord({"msg": "a line", "levelno": level})
        logs = threading.Thread(target=handler.emit, args=[record], daemon=True)
        logs.start()
        logs.join(10)
        waits = logs.is_alive()
        content = source.read(1_000_000) or b""
        released.set()
        logs.join(10)
        assert not waits
        assert content == b"a line\n" if held_up_by == "the stream's lock" else not content.strip(b".")


REFUSING = "def refused(*_):\n    raise OSError(errno.{}, '')\nos.pwritev = refused"


@pytest.mark.parametrize(
    "lacking", ["vars(os).pop('RWF_NOWAIT', 0)", REFUSING.format("ENOSYS"), REFUSING.format("EOPNOTSUPP")]
)
def test_a_log_line_is_written_where_a_write_to_a_pipe_cannot_be_told_not_to_wait(lacking: str) -> None:
    program = f"""
import errno, logging, os, sys
{lacking}
import cco_sidecar
cco_sidecar.bundled_class(cco_sidecar.Program, "_program", "WholeProgram")
from cco_sidecar_plugins._program import LogLines
LogLines(sys.stderr).emit(logging.makeLogRecord({{"msg": "a line", "levelno": logging.INFO}}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stderr == "a line\n" and ended.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there the stream itself is written to")
def test_no_log_line_gets_into_a_file_that_has_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        handler, number = plugin("_program").LogLines(stream), stream.fileno()
    with open(tmp_path / "others", "wb") as others:
        assert others.fileno() == number
        handler.emit(logging.makeLogRecord({"msg": "a line", "levelno": logging.ERROR}))
    assert (tmp_path / "others").read_bytes() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_of_the_log_that_has_stopped_holds_nobody_up(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(MODULE), "--port", "0", "--storage", str(tmp_path / "storage")]
    command += ["--root", str(repository)]
    process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url = json.loads(
            until(
                lambda: (
                    (tmp_path / "storage/sidecar.json").read_text()
                    if (tmp_path / "storage/sidecar.json").exists()
                    else ""
                )
            )
        )["url"]
        with requests.Session() as session:
            for _ in range(1_200):  # lines of 100 bytes: more than a pipe holds
                assert session.get(f"{url}/health", timeout=5).status_code == 200
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("error", [
    psutil.NoSuchProcess(1), psutil.AccessDenied(1), FileNotFoundError(2, "No such file or directory", "/proc/stat"),
], ids=["hidden", "forbidden", "absent"])  # fmt: skip
def test_a_start_where_no_process_can_be_looked_at_is_one_line(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def look(*_: object) -> None:
        raise error

    monkeypatch.setattr(cco_sidecar.psutil, "Process", look)
    monkeypatch.setattr(cco_sidecar, "set_up_logging", lambda settings: None)
    where = ["--root", str(repository), "--storage", str(tmp_path / "state"), "--port", "0"]
    assert cco_sidecar.main(["serve", *where]) == 1
    assert capsys.readouterr().err == "cco: processes, agents' too, cannot be looked at here: is /proc mounted?\n"
