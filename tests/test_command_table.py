"""Every command of the command line, walked out of the parser: typed bare, typed wrong, asked for help, written to any
kind of output.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import yaml
from conftest import MODULE, Service, clean_environment, end_stragglers, every_command, make_repository, plugin, until

import cco_sidecar
from cco_sidecar import option_parser, option_table

Cco = Callable[..., tuple[int, str, str]]

command_line = plugin("_command_line")
CLIENT_OPTIONS = command_line.CLIENT_OPTIONS

PARSERS = every_command()
COMMANDS = sorted(name for name, parser in PARSERS.items() if not parser.commands)
CLIENTS = [name for name in COMMANDS if (row := PARSERS[name].row) and "max_agents" not in row.options]
LISTED = [name for name in PARSERS if name and (row := PARSERS[name].row) and row.help]
STARTING = {"", "serve", "demo", "run-service"}  # which do their work when typed bare


@pytest.fixture
def cco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cco:
    """A command run in this process, in a folder without a service: (exit code, stdout, stderr)."""
    for name in [
        name for name in os.environ if name.startswith(("CCO_", "JWT_TOKEN", "SIDECAR_URL", "AGENT_ID", "PROJECT_ID"))
    ]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        code = cco_sidecar.main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def refusal(answer: tuple[int, str, str]) -> str:
    """The one line of a command that was used wrongly."""
    code, out, err = answer
    assert (code, out) == (2, "") and err.startswith("cco: ") and err.count("\n") == 1, answer
    return err


def own_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]


def slip(word: str) -> str:
    """``word`` with two letters in the wrong order."""
    places = [
        place for place in range(len(word) - 1) if word[place] != word[place + 1] and word[place : place + 2].isalpha()
    ]
    place = places[len(places) // 2]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def filled(name: str) -> list[str]:
    """The words of a command with everything that it requires."""
    words = name.split()
    for action in PARSERS[name]._actions:
        if action.required and action.dest != "help":
            value = str(next(iter(action.choices))) if action.choices else "1"
            words += [action.option_strings[0], value] if action.option_strings else [value]
    return words


# -- typed bare


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in STARTING])
def test_a_command_without_arguments_does_its_work_or_says_in_one_line_what_is_missing(name: str, cco: Cco) -> None:
    code, out, err = cco(*name.split())
    assert code in (0, 1, 2, 3), err
    assert (out and not err) if code < 2 else (err.startswith("cco: ") and err.count("\n") == 1 and not out), (
        code,
        out,
        err,
    )
    if PARSERS[name].commands:
        assert code == 2 and all(word in err for word in PARSERS[name].commands.choices), err


def test_every_command_has_its_row_in_the_readme() -> None:
    chapter = (Path(MODULE).parent / "README.md").read_text().partition("\n## Command line\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (`cco.*?) \|", chapter.replace("\\|", ""))
    for name in sorted(set(COMMANDS) - {"", "demo-agent", "run-service"}):  # which `cco demo` and `cco run` start
        group, _, word = name.rpartition(" ")
        of_group = [row for row in rows if f"`cco {group or word}" in row]
        assert any(re.search(rf"`(cco )?({group} )?{word}\b", row) for row in of_group), name


@pytest.mark.parametrize("name", option_table())
def test_every_option_has_its_row_with_its_default_in_a_readme(name: str) -> None:
    pages = "".join((Path(MODULE).parent / page).read_text() for page in ("README.md", "plugins/README.md"))
    tables = re.findall(r"(?m)^\| option \| default \| meaning \|\n(?:\|.*\n)+", pages)
    (row,) = re.findall(rf"(?m)^\|.*`{cco_sidecar.flag_of(name)}[ `].*\|$", "".join(tables))
    default = option_table()[name].default
    values = default if isinstance(default, tuple) else [] if isinstance(default, bool) else [default]
    assert [value for value in values if isinstance(value, int | str) and f"`{value}`" not in row] == [], row


# -- typed wrong


@pytest.mark.parametrize("name", LISTED)
def test_a_misspelt_command_is_told_the_right_one(name: str, cco: Cco) -> None:
    *group, word = name.split()
    for wrong in (slip(word), word[:-1] + word[-1] * 2, word.upper()):
        line = refusal(cco(*group, wrong))
        assert line.startswith(f"cco: {' '.join([*group, wrong])}: no such command, did you mean {name}? ("), line


def test_a_subcommand_without_its_group_is_told_the_whole(cco: Cco) -> None:
    assert "did you mean agent spawn?" in refusal(cco("spawn"))
    assert "did you mean events publish?" in refusal(cco("pubilsh"))
    assert "; there are kill, list, " in refusal(cco("agent", "xyzzy"))
    assert "; there are agent, answer, " in refusal(cco("xyzzy"))
    assert "did you mean help?" in refusal(cco("hepl"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("connect", "required: PROGRAM (claude, codex, gemini, opencode, kilo, qwen, copilot, vscode, cursor)"),
        ("agent logs", "required: ID (agent id, enough of its beginning or end, or its type)"),
        ("agent kill", "agent kill takes one of ID, --issue and --all"),
        ("agent kill a-1 --all", "agent kill takes one of ID, --issue and --all"),
        ("context get i-1", "required: TYPE (agent type)"),
        ("context get", "required: ISSUE, TYPE (see cco context get --help)"),
        ("token", "required: --type (agent type, for example python-specialist) (see cco token --help)"),
    ],
)
def test_the_one_argument_that_is_missing_is_explained(words: str, told: str, cco: Cco) -> None:
    assert told in refusal(cco(*words.split()))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ps", ", did you mean agent list?"),
        ("list", ", did you mean agent list, events list or results list?"),
        ("ui", ", did you mean dashboard?"),
        ("issue i-1", "; cco export ISSUE shows its whole story, cco results list --issue ISSUE what was done"),
        ("init", "; nothing is to be set up"),
        ("shutdown", "; the service stops on Ctrl-C"),
        ("agent ls", ", did you mean agent list?"),
        ("agent start", ", did you mean agent spawn?"),
        ("agent stop", ", did you mean agent kill?"),
        ("results show", ", did you mean results get?"),
        ("events tail", ", did you mean events subscribe?"),
        ("run issue-1 --task x", "; did you mean --issue issue-1?"),
        ("token python-specialist", "; did you mean --type python-specialist?"),
        ("agent spawn rust-specialist --issue i", "; did you mean --type rust-specialist?"),
        (".", ", did you mean --root .?"),
        ("serve ..", ", did you mean --root ..?"),
        ("agent list --json", ", did you mean --format json?"),
        ("results list -n 3", ", did you mean --limit?"),
        ("-p 3002", ", did you mean --port?"),
        ("serve --verbose", ", did you mean --log-level debug?"),
        ('events publish deployed {"version":7}', ", did you mean --data?"),
    ],
)
def test_how_other_programs_call_what_we_have_is_told_as_ours(words: str, told: str, cco: Cco) -> None:
    assert told in refusal(cco(*words.split()))


def test_help_is_shown_also_where_it_is_asked_for_as_a_command(cco: Cco) -> None:
    for words in ([], ["agent"], ["context", "get"], ["wait"], ["run"]):
        code, out, err = cco("help", *words)
        assert (code, err) == (0, "") and out == cco(*words, "--help")[1]
    assert cco("help", "agent", "--format", "json")[1] == cco("agent", "help")[1] == cco("agent", "--help")[1]
    assert "no such command" in refusal(cco("help", "xyzzy"))


def test_the_help_lists_what_people_type_in_one_order_and_every_argument_is_explained(cco: Cco) -> None:
    names = [line.split()[0] for line in cco("--help")[1].splitlines() if re.match(r"  \w", line)]
    assert not {"hook", "wait", "mcp"} & set(names) and {"connect", "run", "agent"} <= set(names)
    for words in (["schema"], ["connect"], ["context", "get"]):
        cco(*words, "--help")
        assert names == [line.split()[0] for line in cco("--help")[1].splitlines() if re.match(r"  \w", line)]
    for name in ("schema", "connect", "xyzzy"):  # the plugins that have the first two are loaded first
        assert command_line.new_parser([name]).format_help() == command_line.new_parser().format_help()
    unexplained = [
        (name, action.dest) for name, parser in PARSERS.items() if not parser.commands
        for action in parser._actions if action.help is None
    ]  # fmt: skip
    assert unexplained == []
    for name in ("context get", "brief", "results list", "events subscribe"):
        formats = PARSERS[name].row.formats
        said = " ".join(cco(*name.split(), "--help")[1].split())
        assert f"--format {'|'.join(formats)}" in said and (f"(default: {formats[0]})" in said) is bool(formats[1:])
    assert "cco: start: no such command, did you mean serve? (" in refusal(cco("start"))
    assert "cco: version: no such command, did you mean --version? (" in refusal(cco("version"))
    assert "cco: stop: no such command; the service stops on Ctrl-C" in refusal(cco("stop"))
    assert "cco: restart: no such command; end the service by Ctrl-C" in refusal(cco("restart"))
    assert "cco: upgrade: no such command; bring its folder up to date" in refusal(cco("upgrade"))
    assert "cco: audit: no such command; audit.log in the storage" in refusal(cco("audit"))
    assert "cco: tour: no such command, did you mean demo? (" in refusal(cco("tour"))
    for far in ("wand", "gate", "cargo"):  # most of their letters are those of wait, get and agent
        assert "did you mean" not in refusal(cco(far)), far
    assert "cco: pipeline: no such command, did you mean run? (" in refusal(cco("pipeline"))
    assert "cco: browse: no such command, did you mean dashboard? (" in refusal(cco("browse"))
    assert "cco: client: no such command; the plugin client adds agent, brief, " in refusal(cco("client"))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_misspelt_option_is_told_the_right_one(name: str, cco: Cco) -> None:
    right = [action.option_strings[-1] for action in own_options(PARSERS[name])]
    shared = [cco_sidecar.flag_of(option) for option in (*CLIENT_OPTIONS, *option_table())]
    options = [*right, *(shared if name in ("", "token", "results list") else ("--port", "--root"))]
    for number, option in enumerate(options):
        if option in (
            "--no-plugins",
            "--help",
        ):  # whose letters in another order may be another option, or that shows help
            continue
        forms = [slip(option)], [f"{slip(option)}=1"], [slip(option), "3002"]
        for words in forms if name == "" else (forms[number % 3],):  # they are read alike whatever the command is
            line = refusal(cco(*name.split(), *words))
            assert line.startswith(f"cco: {slip(option)}: unknown option, did you mean {option}? (see cco"), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("events list --issues x", ", did you mean --issue?"),
        ("agent list --event x", ""),
        ("health --agent x", ""),
        ("results list --cache x", ""),
        ("brief --tas x", ", did you mean --task?"),
        ("results store --type x", ", did you mean --agent-type?"),
        ("context clear --type x", ", did you mean --agent-type?"),
        ("context refresh --type x", ", did you mean --agent-type?"),
        ("agent list --agent-type x", ", did you mean --type?"),
        ("token --agent-type x", ", did you mean --type?"),
        ("events list --agent-type x", ", did you mean --filter agent_type:TYPE?"),
        ("events subscribe --agent x", ", did you mean --filter agent_id:ID?"),
        ("events list --status x", ", did you mean --filter status:STATUS?"),
        ("status -f json", ", did you mean --format?"),
    ],
)
def test_an_option_is_not_taken_for_the_beginning_of_one_that_the_command_refuses(
    words: str, told: str, cco: Cco
) -> None:
    *command, flag, _ = words.split()
    assert refusal(cco(*words.split())) == f"cco: {flag}: unknown option{told} (see cco {' '.join(command)} --help)\n"


@pytest.mark.parametrize(
    "words",
    [
        "results store",
        "events publish --input -",
        "brief i1 go-specialist --task -",
        "run --issue i1 --task -",
        "mcp x",
    ],
)
def test_who_waits_for_standard_input_on_a_terminal_says_so(words: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command, said = [sys.executable, str(MODULE), *words.split()], tmp_path / "said"
    environment = clean_environment(XDG_STATE_HOME=str(tmp_path / "state"))
    with said.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=errors, cwd=tmp_path, env=environment
        )
    os.close(theirs)
    try:
        until(
            lambda: said.read_text().endswith(
                "by standard input; Ctrl-D ends it\n" if "mcp" in words else "type it here; Ctrl-D ends it\n"
            )
        )
        os.write(ours, b"\x04")
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_too_many_is_one_line(name: str, cco: Cco) -> None:
    line = refusal(cco(*filled(name), *["surplus"] * 5))
    assert f"'surplus': cco {name} takes no such argument" in line


CHOICES = [(name, action) for name in COMMANDS for action in PARSERS[name]._actions if action.choices]


@pytest.mark.parametrize("words", [
    "agent list --type ?", "agent logs ID --since ?", "agent list --issue ?", "results list --issue ?", "results get i1 ?", "events list --issue ?",
    "events publish ?", "events publish x --correlation-id ?", "events subscribe x --filter ?", "context get i1 python-specialist --task ?",
    "context clear --issue ?", "agent spawn --type python-specialist --issue i1 --task ?", "agent spawn --type x --issue i1 --env A=?",
    "results store --issue i1 --agent a --agent-type x --status success --decisions ?", "run --issue i1 --task ?", "token --type ?",
])  # fmt: skip
def test_an_argument_that_is_not_utf_8_is_one_line_before_anything_is_sent(words: str, cco: Cco) -> None:
    assert "UTF-8" in refusal(cco(*words.replace("?", "\udcff").split()))


NUMBERS = [
    (name, action.option_strings[-1])
    for name in COMMANDS
    for action in PARSERS[name]._actions
    if getattr(action.type, "__qualname__", "").startswith("number.")
]


@pytest.mark.parametrize("number", ["٣٠", "３０", "३०", "²", "1_0", "+5", "1e2", " 7", "0x1", "nan", "-1", "9" * 6000])
def test_numbers_are_written_in_the_digits_0_to_9(number: str, cco: Cco) -> None:
    assert len(NUMBERS) > 12 and {"--tail", "--ttl", "--rounds", "--limit"} <= {option for _, option in NUMBERS}
    for name, option in NUMBERS:
        assert f"{option}: {number!r} is not a" in refusal(cco(*filled(name), f"{option}={number}")), (name, option)
    for option in ("--port", "--max-agents", "--token-ttl"):
        assert f"{option}: {number!r}"[:200] in refusal(cco("serve", f"{option}={number}"))


@pytest.mark.parametrize("url", [
    "ftp://127.0.0.1:1", "file:///etc/passwd", "ws://localhost:1", "127.0.0.1:3001", "http://", "http:///x", "http://127.0.0.1:99999",
    "http://127.0.0.1:٣٠٠١", "http://[::1", "http://a b", "http://x?y=1", "http://me:secret@localhost:1", "javascript:alert(1)",
])  # fmt: skip
def test_a_url_that_is_none_of_a_service_is_refused_before_anything_is_sent(
    url: str, cco: Cco, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["health"], ["events", "list"], ["agent", "status", "some-agent"]):
        assert refusal(cco(*words, "--url", url)).startswith("cco: --url: ")
    monkeypatch.setenv("SIDECAR_URL", url)
    assert refusal(cco("status")).startswith("cco: SIDECAR_URL: ")


@pytest.mark.parametrize("words", [
    "events publish", "events publish a --type b", "events publish a --data {", "events publish a --data 1e999", "events publish a --input none.json",
    "results store --status success", "results store none.json", "results store", "results store x --input y", "agent spawn --type t --issue i --env nonsense",
    "context clear", "agent status a/b", "agent logs ..", "agent kill a?b", "agent status .", "results get a%2Fb", "agent status é", "agent logs a..b",
    *(f"results store --issue i --agent a --agent-type t --status success --metrics {metrics}"
      for metrics in ('{"a":NaN}', '[Infinity]', '{"a":{"b":[-Infinity]}}', '{"a":1e400}', '-1e999', "{")),
])  # fmt: skip
def test_wrong_use_is_told_where_no_service_runs_too(words: str, cco: Cco) -> None:
    refusal(cco(*words.split()))


@pytest.mark.parametrize("listed", [",,,", "", " , ", ",", " "])
def test_a_token_without_any_permission_is_refused(listed: str, cco: Cco) -> None:
    line = refusal(cco("token", "--type", "qa-engineer", "--permissions", listed))
    assert line.startswith(f"cco: --permissions: {listed!r} names none of read_context, ")


FAULTS = {  # settings that only together, or only on this machine, are at fault: where that is said to be
    "tls-cert = 'cert.pem'": "cco.toml:2: tls-cert: ",
    "tls-key = 'key.pem'": "cco.toml:2: tls-key: ",
    "tls-cert = 'none.pem'\ntls-key = 'none.pem'": "cco.toml:2: tls-cert: ",
    "storage = 'state'": "cco.toml:2: storage: ",
    "storage = '/dev/null/state'": "cco.toml:2: storage: ",
    "plugins = ['nowhere']": "cco.toml:2: plugins: ",
    "jwt-public-key = 'none.pem'": "cco.toml:2: jwt-public-key: ",
    "jwt-public-key = 'none.pem'\nno-plugins = true": "cco.toml:2: jwt-public-key: ",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_between_settings_names_the_line_the_variable_or_the_flag(
    text: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("CCO_SIDECAR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(repository.parent / "state"))
    monkeypatch.chdir(repository)
    settings = tomllib.loads(text)
    name = next(iter(settings))

    def start(*words: str) -> str:
        assert cco_sidecar.main(["--port", "0", *words]) in (1, 2)
        return capsys.readouterr().err.splitlines()[-1].removeprefix("cco: ")

    (repository / "cco.toml").write_text(f"# ours\n{text}\n")
    assert FAULTS[text] in start()
    (repository / "cco.toml").unlink()
    for key, value in settings.items():
        said = "true" if value is True else value[0] if isinstance(value, list) else value
        monkeypatch.setenv("CCO_SIDECAR_" + key.replace("-", "_").upper(), said)
    assert f"CCO_SIDECAR_{name.replace('-', '_').upper()}: " in start()
    value = settings[name]
    assert f"--{name}: " in start(f"--{name}", value[0] if isinstance(value, list) else value)


@pytest.mark.parametrize(("name", "code"), [("cco.toml", 2), ("pyproject.toml", 0)])
@pytest.mark.parametrize(
    "kind", ["a pipe", "no end", "huge", "a deep key", "a deep table", "deep brackets", "a number"]
)
def test_a_settings_file_that_is_none_is_one_line(
    name: str, code: int, kind: str, cco: Cco, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="cco")  # an earlier command in this process may have lowered it
    path = Path(name)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "no end":
        path.symlink_to("/dev/zero")
    else:
        dots = "a" + ".a" * 20_000
        texts = {"huge": "# x\n" * 300_000, "a deep key": f"{dots} = 1", "a deep table": f"[{dots}]"}
        path.write_text((texts | {"deep brackets": "a = " + "[" * 100_000, "a number": f"tool = {'9' * 6000}"})[kind])
    given, out, err = cco("token", "--type", "qa-engineer")
    assert given == code and bool(out) == (code == 0)
    (line,) = err.splitlines() if code else caplog.messages
    assert line.removeprefix("cco: ").startswith(name), line


@pytest.mark.parametrize(("name", "action"), CHOICES, ids=lambda value: value if isinstance(value, str) else value.dest)
def test_a_wrong_choice_is_told_the_nearest_one(name: str, action: argparse.Action, cco: Cco) -> None:
    for right in map(str, action.choices or ()):
        words = [*action.option_strings[-1:], slip(right)]
        assert f"'{slip(right)}' is unknown, did you mean {right}?" in refusal(cco(*name.split(), *words)), right


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in STARTING])
def test_a_wrong_format_is_told_the_nearest_one(name: str, cco: Cco) -> None:
    row = PARSERS[name].row
    for right in row.formats if row else ():
        for words in (["--format", slip(right), *filled(name)], [*filled(name), "--format", slip(right)]):
            assert f"--format: '{slip(right)}' is unknown, did you mean {right}?" in refusal(cco(*words))


# -- options before and after


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in STARTING])
def test_connection_options_are_taken_before_between_and_after(name: str) -> None:
    words = filled(name)
    for place in range(len(name.split()) + 1):
        line = [*words[:place], "--url", "u", "--format", "f", "--root", "r", "--storage=s", *words[place:]]
        options, unknown = command_line.new_parser(line).parse_known_args(line)
        assert unknown == [] and [getattr(options, name) for name in ("url", "format", "root", "storage")] == [
            "u",
            "f",
            "r",
            "s",
        ], line
        assert options.parser.prog == f"cco {name}"
    line = ["--url", "first", *words, "--url", "last"]
    assert command_line.new_parser(line).parse_known_args(line)[0].url == "last"


@pytest.mark.parametrize("name", CLIENTS)
def test_what_only_the_running_service_decides_is_refused_with_what_to_do_instead(name: str, cco: Cco) -> None:
    row = PARSERS[name].row
    decided = [action for action in option_parser()._actions if action.dest not in (row.options if row else ())]
    assert len(decided) > 20
    for action in decided if name in ("token", "results list") else decided[::9]:
        given = [*action.option_strings, *([] if action.nargs == 0 else ["5"])]
        told = cco_sidecar.flag_of(action.dest)
        for words in ([*given, *filled(name)], [*filled(name), *given]):
            line = refusal(cco(*words))
            assert (
                line.startswith(f"cco: {told}: the service decides this: ") and f"set {told[2:]} in cco.toml" in line
            ), line


def test_what_is_for_clients_is_refused_by_the_service(cco: Cco) -> None:
    for words in (["--url", "http://127.0.0.1:1"], ["serve", "--format", "json"], ["--url", "x", "serve"]):
        assert "starts the service; this is for the commands that talk to one" in refusal(cco(*words))


# -- help


def test_help_is_one_screen_with_every_command_in_its_section(cco: Cco) -> None:
    code, out, err = cco("--help")
    assert (code, err) == (0, "") and len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 86
    for name in (name for name in LISTED if PARSERS[name].row.section):
        first, *second = name.split()
        assert re.search(rf"^  {first} .*{''.join(second)}", out, re.MULTILINE), name
    assert "More:" not in out and "demo-agent" not in out and "run-service" not in out and "--max-agents" not in out


@pytest.mark.parametrize("name", LISTED)
def test_the_help_of_a_command_fits_a_screen_and_shows_its_own_arguments_first(name: str, cco: Cco) -> None:
    code, out, err = cco(*name.split(), "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: cco {name} ")
    if name == "serve":
        assert all(re.search(rf"^  {cco_sidecar.flag_of(option)}\b", out, re.MULTILINE) for option in option_table())
        return
    assert len(out.splitlines()) <= (34 if name == "run" else 24), out
    if not PARSERS[name].commands:
        places = [action.metavar for action in PARSERS[name]._actions if not action.option_strings]
        assert all(f" {place}" in out.splitlines()[0].replace("[", "") for place in places), out
        shown = [out.index(action.option_strings[-1]) for action in own_options(PARSERS[name])]
        assert out.count("--url URL") == 1 and all(
            place < out.index("Connection: --url URL, --format ") for place in shown
        )
        assert "--max-agents" not in out


# -- standard streams of any kind

SPOKEN = 'greeting = "grüße → naïve 😀"\n\n# Ω\n'
NAMES = ["ISSUE-é", "→ naïve 😀", "Ω"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a file and a result that no encoding but Unicode can write."""
    folder = tmp_path_factory.mktemp("spoken")
    agent = [sys.executable, "-c", "import sys; sys.stdout.buffer.write('→ naïve 😀\\n'.encode())"]
    options = ("--agent-command", json.dumps(agent), "--no-synthesis")
    running = Service(make_repository(folder / "repository"), folder / "storage", *options).start()
    (running.root / "grüße.py").write_text(SPOKEN, "utf-8")
    client = running.client()
    client.store(issue="i-1", decisions=NAMES, agent_notes="→")
    client.publish("noted", {"text": "→ naïve 😀 é"}, topic="Ωmega-é")
    spawned = client.spawn("i-1", task="→")["agent_id"]
    until(lambda: client.get(f"/api/agents/{spawned}/status").json()["ended_at"])
    running.env["AGENT"] = spawned
    yield running
    running.stop()
    end_stragglers()


def spoken_commands(service: Service) -> dict[str, list[str]]:
    result = service.client().get("/api/results", issue_id="i-1").json()["results"][-1]["id"]
    commands = {
        "token": ["token", "--type", "qa-engineer"], "plugins": ["plugins"], "types": ["agent", "types"], "schema": ["schema"], "help": ["--help"],
        "logs": ["agent", "logs", service.env["AGENT"]],
    }  # fmt: skip
    commands |= {f"list-{style}": ["results", "list", "--format", style] for style in ("table", "json", "csv")}
    commands |= {f"get-{style}": ["results", "get", result, "--format", style] for style in ("table", "json", "csv")}
    context = ["context", "get", "i-1", "python-specialist", "--task", "grüße →", "--format"]
    commands |= {f"context-{style}": [*context, style] for style in ("json", "yaml", "text")}
    commands |= {f"events-{style}": ["events", "list", "--format", style] for style in ("table", "json", "csv")}
    where = ["--root", str(service.root), "--storage", str(service.storage)]
    return {name: [sys.executable, str(MODULE), *where, *words] for name, words in commands.items()}


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "cp437": {"PYTHONIOENCODING": "cp437", "PYTHONUTF8": "0"},
    "utf-16": {"PYTHONIOENCODING": "utf-16"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_output_that_the_encoding_does_not_have_is_escaped_and_json_stays_json(spoken: Service, encoding: str) -> None:
    unicode = encoding.startswith("utf")
    for name, command in spoken_commands(spoken).items():
        if encoding != "C" and name not in ("get-json", "get-table", "context-yaml", "events-json", "logs"):
            continue
        ended = subprocess.run(command, env=clean_environment(**ENCODINGS[encoding]), capture_output=True, timeout=40)
        assert (ended.returncode, ended.stderr) == (0, b"") and ended.stdout, (name, ended.stderr)
        text = ended.stdout.decode("ascii" if encoding == "C" else encoding)
        if name in ("get-json", "events-json"):
            answer = json.loads(ended.stdout)
            assert answer["result"]["decisions"] == NAMES if name == "get-json" else "→ naïve 😀 é" in str(answer)
        elif name in ("context-json", "context-yaml"):
            answer = json.loads(ended.stdout) if name == "context-json" else yaml.safe_load(text)
            contents = {file["path"]: file["content"] for file in answer["context"]["relevant_files"]}
            assert contents["grüße.py"] == SPOKEN, contents
        elif name in ("get-table", "get-csv", "logs"):
            assert ("→" if unicode else "\\u2192") in text, text
            assert ("naïve" if encoding not in ("ascii", "C") else "na\\u00efve") in text, text


ASCII_LOCALE = ENCODINGS["C"]


@pytest.mark.parametrize(
    "words", ["events publish noted --data TEXT", "events publish noted --input FILE", "events publish noted --input -"]
)
@pytest.mark.parametrize("locale", [ASCII_LOCALE, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii:strict"}])
def test_what_is_typed_or_read_is_utf_8_in_any_locale(
    spoken: Service, tmp_path: Path, words: str, locale: dict[str, str]
) -> None:
    topic, data = f"grüße-→😀-{len(locale)}", {"text": "Ωmega é 日本 😀"}
    text = json.dumps(data if "TEXT" in words else {"data": data}, ensure_ascii=False)
    file = tmp_path / "grüße →.json"
    file.write_text(text, "utf-8")
    told = [{"TEXT": text, "FILE": str(file)}.get(word, word) for word in words.split()]
    told += ["--topic", topic] if "TEXT" in words else ["--format", "json"]
    where = ["--root", str(spoken.root), "--storage", str(spoken.storage)]
    ended = subprocess.run(
        [sys.executable, str(MODULE), *where, *told],
        env=clean_environment(**locale), input=text.encode(), capture_output=True, timeout=40,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, b""), ended.stderr
    latest = spoken.client().get("/api/events", type="noted").json()["events"][-1]
    assert (latest["data"], latest["topic"]) == (data, topic if "TEXT" in words else "general")


@pytest.mark.parametrize("locale", [ASCII_LOCALE, {"PYTHONIOENCODING": "cp1252"}])
def test_output_files_are_utf_8_whatever_the_terminal_is(
    spoken: Service, tmp_path: Path, locale: dict[str, str]
) -> None:
    for style in ("json", "yaml", "text", "csv"):
        path = tmp_path / f"größe-{style}"
        command = spoken_commands(spoken)["context-text"][:-1]
        ended = subprocess.run(
            [*command, style, "--output", str(path)], env=clean_environment(**locale), capture_output=True, timeout=40
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b""), ended.stderr
        assert "grüße" in path.read_text("utf-8") and (style == "csv" or "naïve 😀" in path.read_text("utf-8")), style


@pytest.mark.parametrize(
    "words",
    [
        "agent statüs",
        "health --förmat json",
        "health --format →",
        "--pört 1",
        "agent status ünknown",
        "grüße",
        "token --type x --agent-id größe",
    ],
)
def test_refusals_show_what_was_typed_in_any_locale(tmp_path: Path, words: str) -> None:
    environment = clean_environment(XDG_STATE_HOME=str(tmp_path / "s"), **ASCII_LOCALE)
    ended = subprocess.run(
        [sys.executable, str(MODULE), *words.split()], cwd=tmp_path, env=environment, capture_output=True, timeout=40
    )
    said = ended.stderr.decode("ascii")
    assert ended.returncode == 2 and said.count("\n") == 1 and "\\udc" not in said, said
    odd = next(word for word in words.split() if not word.isascii())
    assert odd.encode("ascii", "backslashreplace").decode() in said, said


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("kind", [">/dev/full", ">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_output_that_cannot_be_written_is_one_line_and_exit_code_1(spoken: Service, kind: str, unbuffered: str) -> None:
    reason = "No space left on device" if "full" in kind else "Bad file descriptor"
    commands = spoken_commands(spoken)
    names = ("token", "plugins", "types", "schema", "list-csv", "get-json", "help")
    for name in names if (kind, unbuffered) == (">/dev/full", "") else ("token", "list-csv"):
        line = f"exec {shlex.join(commands[name])} {kind}"
        ended = subprocess.run(
            ["sh", "-c", line], env=clean_environment(PYTHONUNBUFFERED=unbuffered), capture_output=True, timeout=40
        )
        assert ended.returncode == 1, (name, ended)
        assert ended.stderr.decode() == ("" if "2>" in kind else f"cco: output cannot be written: {reason}\n"), name


@pytest.mark.parametrize("kind", ["2>/dev/full", "2>&-"])
def test_a_refusal_that_nobody_hears_keeps_its_exit_code(tmp_path: Path, kind: str) -> None:
    for words, code in {"agnet": 2, "--prot 1": 2, "health": 3, "token --type x": 2, "--version": 0}.items():
        line = f"exec {shlex.join([sys.executable, str(MODULE)])} {words} {kind}"
        ended = subprocess.run(
            ["sh", "-c", line],
            cwd=tmp_path,
            env=clean_environment(XDG_STATE_HOME=str(tmp_path / "s")),
            capture_output=True,
        )
        assert (ended.returncode, ended.stderr) == (code, b""), words


@pytest.mark.parametrize(
    "kind", [">/dev/full", ">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>/dev/full", "| true"]
)
def test_a_service_serves_whatever_becomes_of_its_output(tmp_path: Path, repository: Path, kind: str) -> None:
    storage = tmp_path / "storage"
    agent = json.dumps([sys.executable, "-c", "print('heard')"])
    options = ["--port=0", f"--storage={storage}", f"--agent-command={agent}", "--log-level=debug"]
    words = [sys.executable, str(MODULE), *options]
    line = f"exec {shlex.join(words)} {kind}" if "|" not in kind else f"{shlex.join(words)} {kind}"
    process = subprocess.Popen(
        ["sh", "-c", line], cwd=repository, env=clean_environment(PYTHONIOENCODING="ascii"), stderr=subprocess.DEVNULL
    )
    until(lambda: (storage / "sidecar.json").exists() or process.poll() is not None)
    assert process.poll() is None
    info = json.loads((storage / "sidecar.json").read_text())
    try:
        assert requests.get(info["url"] + "/health", timeout=10).json()["status"] == "healthy"
        service = Service(repository, storage)
        service.info = info
        client = service.client(project_id="repository")
        spawned = client.spawn("i-1")["agent_id"]
        ended = until(lambda: (status := client.get(f"/api/agents/{spawned}/status").json())["ended_at"] and status)
        assert (ended["state"], ended["exit_code"]) == ("completed", 0)
        assert client.get(f"/api/agents/{spawned}/logs").json()["text"] == "heard\n"
        numbers = [Path(f"/proc/{info['pid']}/fd/{number}") for number in range(3)] if sys.platform == "linux" else []
        held = [os.readlink(number) for number in numbers]
        assert not any(each.startswith((str(storage), "anon_inode:", "socket:")) for each in held), held
    finally:
        os.kill(info["pid"], signal.SIGTERM)
        assert process.wait(120) == 0
    assert not (storage / "sidecar.json").exists()
