"""How known coding programs are started: argv, standard input, environment and files, the prompt, what they may run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import jwt
import pytest
from agent_harness import folder_of, nothing_left, output, spawn, state
from conftest import ALL, MODULE, Service, clean_environment, plugin, serving

from cco_sidecar import AgentCommand, AgentLaunch, StartError, load_settings, read_option

__all__ = ["nothing_left"]
launchers = plugin("launchers")
PROGRAMS = launchers.PROGRAMS
SHOW = """\
import json, os, sys
shown = ("OPENCODE_", "KILO_", "CLINE_", "COPILOT_", "PWD", "GEMINI_CLI")
told = {name: value for name, value in os.environ.items() if name.startswith(shown)}
told["lasting"] = os.environ.get("CCO_MCP_TOKEN", "")[::-1]
print(json.dumps([sys.argv[1:], told, os.environ["JWT_TOKEN"][::7], sys.stdin.read()]))
"""


CODERS = "python rust go java javascript typescript ruby php kotlin swift c".split()
PLACEHOLDER = re.compile(r"(?<!\$)\{\w+\}")
TYPES = dict(zip(PROGRAMS, (f"{language}-specialist" for language in CODERS), strict=True))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose agents of each type are another program, of which each tells how it was called."""
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "bin").mkdir()
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.write_text(f"#!{sys.executable}\n{SHOW}")
        program.chmod(0o755)
    commands = {agent_type: [name] for name, agent_type in TYPES.items()}
    (folder / "home/.gemini").mkdir(parents=True)
    for name, content in GEMINI_HOME.items():
        (folder / "home/.gemini" / name).write_text(content)
    more = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COPILOT_ALLOW_ALL": "true", "PWD": str(folder)}
    more |= {"HOME": str(folder / "home")}
    with serving(folder, "--agent-commands", json.dumps(commands), env=more) as running:
        yield running
    for name, content in GEMINI_HOME.items():
        assert (folder / "home/.gemini" / name).read_text() == content, "the user's files stay as they are"


GEMINI_HOME = {
    "settings.json": '{\n// mine\n"ui": {"theme": "x"}, "mcpServers": {"own": {"command": "own"}}}',
    "oauth_creds.json": "{}",
}


@pytest.mark.parametrize(
    ("settings", "apart"),
    [(None, False), ('model = "x"\n', False), ('[mcp_servers.cco]\ncommand = "cco"\n', True)],
)
def test_codex_does_not_join_the_server_of_a_connected_repository_with_an_agents_own(
    tmp_path: Path, settings: str | None, apart: bool
) -> None:
    (tmp_path / ".codex").mkdir()
    if settings is not None:
        (tmp_path / ".codex/config.toml").write_text(settings)
    facts = {"{url}": "http://x", "{agent_folder}": str(tmp_path), "{token}": "t"}
    start = AgentCommand(["codex", "exec"])
    command = plugin("connection").connected(PROGRAMS["codex"], start, tmp_path, facts, tmp_path)
    untrusted = ["-c", f'projects={{"{tmp_path}"={{trust_level="untrusted"}}}}']
    assert (command.argv[1:3] == untrusted) is apart and command.argv[-1] == "exec"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_known_program_is_started_in_its_headless_form(service: Service, name: str) -> None:
    spawned = spawn(service.client(), "Mend the $(roof) {issue_id}", agent_type=TYPES[name])
    assert state(service.client(), spawned["agent_id"])["state"] == "completed"
    arguments, told, token, read = json.loads(output(service.client(), spawned["agent_id"]))
    folder, row = folder_of(service, spawned["agent_id"]), PROGRAMS[name]
    assert [word.replace("{url}", service.url) for word in row.telemetry_argv] == arguments[: len(row.telemetry_argv)]
    arguments = arguments[len(row.telemetry_argv) :]
    check_connection(service, name, folder, arguments, told)
    arguments = arguments[len(row.mcp_argv) : len(arguments) - len(row.mcp_last)]
    assert not PLACEHOLDER.search(" ".join(word for word in arguments if "issue-1" not in word))
    prompt = read or next(word for word in arguments if "issue-1" in word)
    assert bool(read) == (row.stdin == "{agent_folder}/prompt")
    assert [word for word in row.argv[1:] if not PLACEHOLDER.search(word)] == [
        word for word in arguments if word in row.argv
    ]
    for needed in (
        spawned["agent_id"], TYPES[name], "issue-1", "Mend the $(roof) {issue_id}", f"{folder}/context.json",
        "read_context, write_results, publish_events",
    ):  # fmt: skip
        assert needed in prompt
    by_curl = (
        f"curl -sS -K {folder}/curl {service.url}/api/results -d '{{",
        f"{service.url}/api/events/progress -d '{{",
    )
    brief = (folder / "brief.md").read_text()
    assert all((needed in brief) is not row.connects for needed in by_curl)
    assert all(
        needed in prompt.partition("where those tools are missing")[2 if row.connects else 0] for needed in by_curl
    )
    for text in (prompt, brief):
        assert all((needed in text) is row.connects for needed in ("call `store_result`", "call `publish_event`"))
    assert "$" not in prompt.replace("$(roof)", ""), "a command with a variable is refused by some programs"
    assert token == spawned["jwt_token"][::7] and spawned["jwt_token"] not in " ".join(arguments) + prompt
    files = {name: (folder / name) for name in row.files}
    for file in files.values():
        assert oct(file.stat().st_mode & 0o777) == "0o600" and not PLACEHOLDER.search(file.read_text())
    if row.may:
        assert "curl" in " ".join([*arguments, *told.values(), *(file.read_text() for file in files.values())])
    assert told["PWD"] == str(service.root), "opencode works where PWD says"
    if name in ("opencode", "kilo"):
        assert told.get(f"{name.upper()}_DB") == f"{folder}/{name}.db"
        permissions = json.loads(told[f"{name.upper()}_CONFIG_CONTENT"])["permission"]
        assert permissions["bash"] == {"*": "deny", "curl": "allow", "curl *": "allow"}
        assert permissions["external_directory"] == {f"{folder}/*": "allow"}
    if name == "copilot":
        assert told["COPILOT_ALLOW_ALL"] == ""


def check_connection(service: Service, name: str, folder: Path, arguments: list[str], told: dict[str, str]) -> None:
    """That a program finds /mcp: by files of its own that nobody else can read, and a token that no argument holds."""
    row = PROGRAMS[name]
    lasting = told.pop("lasting")[::-1]  # backwards, since the log of an agent shows no token
    assert bool(lasting) is row.connects and (not lasting or lasting not in " ".join(arguments))
    if not row.connects:
        return
    claims = jwt.decode(lasting, options={"verify_signature": False})
    assert (claims["sub"], claims["bound"], claims["permissions"]) == (folder.name, True, ALL[:3])
    assert claims["exp"] - claims["iat"] == 3600 + 60, "as long as an agent may live"
    texts = [*arguments, *told.values()]
    for path in map(folder.joinpath, row.mcp_files):
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
        texts.append(json.dumps(json.loads(path.read_text())))
    said = "\n".join(texts)
    assert f"{service.url}/mcp" in said and "{url}" not in said and "{agent_folder}" not in said
    assert (lasting in said) is (name in ("qwen", "cline")), "they fill in no variables"
    if name == "gemini":
        home = folder / "home/.gemini"
        settings = json.loads((home / "settings.json").read_text())
        assert set(settings["mcpServers"]) == {"own", "cco"} and settings["ui"] == {"theme": "x"}
        assert (home / "oauth_creds.json").is_symlink() and told["GEMINI_CLI_HOME"] == str(folder / "home")


def test_who_decides_on_commands_is_told_of_curl(make_service: Callable[..., Service], tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/own.py").write_text(
        "from cco_sidecar import hookimpl\n@hookimpl\ndef agent_command(launch):\n"
        "    return ['echo', '{prompt}'] if launch.agent_type == 'go-specialist' else None\n"
    )
    service = make_service("--plugins", str(tmp_path / "plugins"), "--agent-command", "claude")
    spawned = spawn(service.client(), agent_type="go-specialist")
    state(service.client(), spawned["agent_id"], "completed")
    assert "/api/results -d" in output(service.client(), spawned["agent_id"])


@pytest.mark.parametrize(("text", "settings"), [
    (None, {}), ("", {}), ("// all of it\n", {}), ('{"a": 1}', {"a": 1}), ("[]", None), ("{", None), ('{"a": 1} // b', None),
])  # fmt: skip
def test_settings_are_joined_where_they_can_be_read(
    tmp_path: Path, text: str | None, settings: dict[str, int] | None
) -> None:
    connection, path = plugin("connection"), tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    if settings is None:
        with pytest.raises(ValueError):
            connection.settings_in(path)
    else:
        assert connection.settings_in(path) == settings
    theirs = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert connection.joined(theirs, {"a": {"c": [2], "e": 3}}) == {"a": {"b": 1, "c": [1, 2], "e": 3}, "d": 1}


# -- what agents may run


TESTS = {"*": ("pytest", "git commit"), "go-specialist": ("go test",)}
TOLD = {  # what a program is told that it may run "git commit"
    "claude": '"Bash(git commit *)"', "gemini": 'commandPrefix = ["curl", "pytest", "git commit", "go test"]',
    "opencode": '"git commit": "allow", "git commit *": "allow"', "qwen": '"run_shell_command(git commit)"',
    "copilot": '"shell(git commit:*)"', "kilo": '"git commit": "allow", "git commit *": "allow"',
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_agents_may_run_is_told_in_each_programs_own_words(name: str, tmp_path: Path) -> None:
    launch = AgentLaunch(
        agent_id="a", agent_type="go-specialist", issue_id="i", task="t", context_file="", agent_folder=str(tmp_path),
        prompt="p", configured=(name,),
    )  # fmt: skip
    command = launchers.agent_command(launch, load_settings({"root": str(tmp_path), "agent_may": TESTS}, {}))
    files = [file.read_text() for file in tmp_path.iterdir() if file.suffix != ".mjs"]
    told = "\n".join([*map(json.dumps, command.argv), *command.environment.values(), *files])
    assert (TOLD.get(name, "") in told) and ("git commit" in told) is (name in TOLD) is (PROGRAMS[name].may is not None)
    for content in (*files, command.environment.get(f"{name.upper()}_CONFIG_CONTENT", "")):
        assert not content or (json.loads if content[0] == "{" else tomllib.loads)(content)


@pytest.mark.parametrize("text", [
    "", ",", "*", "pytest *", "pytest; rm -rf /", "pytest && id", "pytest | tee x", "$(id)", "`id`", "echo $HOME", "a > b",
    "pytest\nid", "pytest\tx", "Bash(id)", "x)", "[x]", "{x}", "'pytest'", '"pytest"', "A=1 pytest", "-x", "a  b", "a\\b",
    "~/x", "!id", "#x", "%x", "é", "x" * 201,
])  # fmt: skip
def test_what_no_rule_can_say_is_refused_at_the_start(text: str) -> None:
    for value in (text, [text], {"*": "pytest", "x": [text]}):
        with pytest.raises(StartError, match="agent-may"):
            read_option("agent_may", "--agent-may", value)


def test_what_agents_may_run_depends_on_their_type_and_stands_in_the_prompt(
    make_service: Callable[..., Service], repository: Path
) -> None:
    (repository / "cco.toml").write_text(
        '[agent-may]\n"*" = "pytest, git commit"\ntest-engineer = ["npm run test:unit"]\n'
    )
    service = make_service("--agent-command", "echo {prompt}")
    for agent_type, said in (
        ("python-specialist", "you may run: pytest, git commit."),
        ("test-engineer", "you may run: pytest, git commit, npm run test:unit."),
    ):
        spawned = spawn(service.client(), agent_type=agent_type)
        state(service.client(), spawned["agent_id"], "completed")
        assert said in output(service.client(), spawned["agent_id"])


# -- agents that cannot work


CODEX_HEAD = "OpenAI Codex v0.169.0\n--------\nworkdir: /work\n--------\nuser\nhi\n"
OFFLINE = 'timestamp=1 level=ERROR run=1 message="stream error" error.error="AI_APICallError: Cannot connect to API: no route"\n'
CANNOT_WORK = [  # what is written, the exit code (None: it never ends), the beginning of the reason (None: there is none)
    ("Not logged in · Please run /login\n", 1, "claude is not logged in: `claude auth login`"),
    ("Invalid API key · Fix external API key\n", 1, "claude is not logged in"),
    ("API Error: 401 {}\n", 1, "claude is not logged in"),
    ("API Error: Connection error.\n", 1, "claude does not reach its model"),
    (
        CODEX_HEAD + "ERROR: Reconnecting... 5/5\nERROR: unexpected status 401 Unauthorized: no\n",
        1,
        "codex is not logged in",
    ),
    (CODEX_HEAD + "ERROR: Reconnecting... waiting for network\n", None, "codex does not reach its model"),
    ("Please set an Auth method in your settings.json or\n", 41, "gemini is not logged in"),
    ("\x1b[91m\x1b[1mError: \x1b[0minvalid x-api-key\n", 1, "opencode is not logged in"),
    (
        OFFLINE * 2,
        None,
        "opencode does not reach its model: is there a network?; or kilo does not reach its model: is there a network?",
    ),
    ("\x1b[91m\x1b[1mError: \x1b[0mCannot connect to API: no route\n", 1, "opencode does not reach its model"),
    (
        "No LLM model was specified and no API keys were provided.\nWaiting up to 5 minutes\n",
        None,
        "aider is not logged in",
    ),
    ("litellm.AuthenticationError: OpenAIException\n", 0, "aider is not logged in"),
    ("No auth type is selected. Please\n", 1, "qwen is not logged in: `qwen auth`"),
    ("Error: No authentication information found.\n", 1, "copilot is not logged in"),
    ("\x1b[31merror:\x1b[0m Incorrect API key provided\n", 1, "cline is not logged in: `cline auth`"),
    ("\x1b[31merror:\x1b[0m Cannot connect to API: Unable\n", 1, "cline does not reach its model"),
    *(
        (written, 1, f"its model refused or failed: {said}")
        for written, said in (
            ("API Error: 529 Overloaded\n", "529 Overloaded"),
            ("Credit balance is too low\n", "Credit balance is too low"),
            (
                "ERROR: Reconnecting... 5/5\n"
                + 2 * "ERROR: exceeded retry limit, last status: 429 Too Many Requests\n",
                "exceeded retry limit, last status: 429 Too Many Requests",
            ),
            (
                'Attempt 3 failed with status 500. Retrying with backoff... _ApiError: {"code":500}\n    at x {\n  status: 500\n}\n'
                'Attempt 4 failed with status 429. Retrying with backoff... _ApiError: {"code":429}\n    at x\n',
                '{"code":429}',
            ),
            (
                "Error when talking to Gemini API Full report available at: /tmp/x.json Error: Incomplete JSON\n    at x\n",
                "Incomplete JSON",
            ),
            (
                "Error when talking to Gemini API Full report available at: /tmp/x.json _ApiError: No credit\n"
                + 10 * "    at x\n"
                + "  status: 400\n}\nAn unexpected critical error occurred:[object Object]\n",
                "No credit",
            ),
            (
                'timestamp=1 level=ERROR run=1 message="stream error" error.error="AI_APICallError: Overloaded"\n',
                "Overloaded",
            ),
            ("\x1b[91m\x1b[1mError: \x1b[0mYour credit balance is too low\n", "Your credit balance is too low"),
            (
                'timestamp=1 level=ERROR run=1 message=x error.error="AI_JSONParseError: JSON failed: {\\"id\\": \\"x."\n',
                r"JSON failed: {\"id\": \"x.",
            ),
            (
                '\x1b[91m\x1b[1mError: \x1b[0mJSON parsing failed: Text: {"id.\nError message: JSON Parse error: Unterminated\n',
                'JSON parsing failed: Text: {"id.',
            ),
            ("[API Error: 400 Your credit balance is too low]\n", "400 Your credit balance is too low"),
            (
                "Retrying in 240s (attempt 3/10): [API Error: 429 Rate limit reached]\nOperation cancelled.\n",
                "429 Rate limit reached",
            ),
            (
                "Failed to get response from the AI model; retried 5 times (total retry wait time: 52.92 seconds)"
                " Last error: 429 Rate limit reached\n\n\nChanges    +0 -0\nDuration   59s\n",
                "429 Rate limit reached",
            ),
            (
                "\n402 You have no quota\n\n\nChanges    +0 -0\nDuration   1s\nResume     copilot --resume=2bd8\n",
                "402 You have no quota",
            ),
            ("\x1b[31merror:\x1b[0m Rate limit reached for requests\n", "Rate limit reached for requests"),
            (
                '\x1b[31merror:\x1b[0m JSON parsing failed: Text: {"id.\nError message: SyntaxError: JSON Parse error\n'
                + "Warning: System: To turn off\n"
                + 3 * "DeprecationWarning: x\n      at iX (/chunk.js:26:46952)\n      at J0 (/chunk.js:26)\n\n",
                'JSON parsing failed: Text: {"id.',
            ),
            (
                "I wi\n\x1b[31merror:\x1b[0m Response stream ended without a finish reason.\n",
                "Response stream ended without a finish reason.",
            ),
        )
    ),
    ("error: unknown option '--allowedTools'\n", 1, "its version does not take its options (error: unknown option"),
    (
        "Unknown arguments: policy\nUsage: gemini\n",
        1,
        "its version does not take its options (Unknown arguments: policy",
    ),
    ("WARNING: x\nerror: unexpected argument '--sandbox' found\n", 2, "its version does not take its options"),
    (
        "usage: aider\naider: error: unrecognized arguments: --no-gitignore\n",
        2,
        "its version does not take its options",
    ),
    (
        "\x1b[31merror:\x1b[0m error: unknown option '--x'\n",
        1,
        "its version does not take its options (error: unknown option '--x')",
    ),
    ("██\n" * 4 + "\nkilo run [message..]\n\nrun kilo\n", 1, "its version does not take its options (kilo run"),
    ("Not logged in · Please run /login\n", 0, None),  # a text about it
    ("the test says\n" * 9 + "error: unknown option '--x'\n", 1, None),
    ("Please set an Auth method\n", 1, None),
    ("ERROR: not found: tests/test_x.py\n", 1, None),  # of a command of the user's own
    ("API Error: 529 Overloaded\nI wrote a test of that.\n", 1, None),
    ("   \x1b[90m⎿ \x1b[0m\x1b[31merror: no such file\x1b[0m\nI give up.\n", 1, None),  # a tool's
    ("\x1b[31merror:\x1b[0m Rate limit reached\nI went on.\n", 1, None),
    ("Attempt 1 failed with status 500. Retrying with backoff... _ApiError: {}\n", 1, None),  # and went on
    ("Attempt 3 failed with status 429. Retrying _ApiError: {}\n    at x\nI wrote the test.\n2 failed\n", 1, None),
    ("I changed the answers:\n404 when the item is missing\n\nChanges    +3 -1\nDuration   9s\n", 1, None),
    ("Credit balance is too low\n", 0, None),
    ("litellm.RateLimitError: Rate limit\nRetrying in 0.5 seconds...\nApplied edit to hello.py\n", 0, None),
    ("litellm.RateLimitError: Rate limit\nRetrying in 0.5 seconds...\n", None, None),
    (
        "litellm.RateLimitError: Rate limit reached for\nrequests\nTry again later.\n\n",
        0,
        "its model refused or failed: RateLimitError: Rate limit reached for",
    ),
    (
        "Empty response received from LLM. Check your account?\n\nTokens: 1.4k sent, 0 received.\n",
        0,
        "its model refused or failed: Empty response received from LLM. Check your account?",
    ),
    (
        "x\nError: ENOSPC: no space\n[3872 bytes were lost here: No space left on device]\n",
        1,
        "its last lines say: No space",
    ),
    (
        'timestamp=1 level=ERROR error="SqlError (cause: SQLiteError: database or disk is full)"\n',
        1,
        "its last lines say: database or disk is full",
    ),
    ("I mend what says: No space left on device\n" + "x\n" * 60, 1, None),
    (
        "FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory\n"
        + " 1: 0xb78db3 node::x\n" * 40,
        -6,
        "its last lines say: JavaScript heap out of memory",
    ),
    ('Traceback (most recent call last):\n  File "x"\nMemoryError\n', 1, "its last lines say: MemoryError"),
    ("I mended what says: No space left on device\n", 0, None),
    ("I mend what says: No space left on device\n", None, None),
    ("something else\n", 3, None),
    ("", 1, None),
]


@pytest.mark.parametrize(("written", "code", "reason"), CANNOT_WORK)
def test_why_a_program_cannot_work_is_read_from_what_it_writes(
    tmp_path: Path, written: str, code: int | None, reason: str | None
) -> None:
    state = "running" if code is None else "failed" if code else "completed"
    agent, folder = {"exit_code": code, "state": state, "result_id": None}, str(tmp_path)
    if code == 0:
        assert launchers.agent_failure(agent, written.splitlines(), folder) is None, "who ended well may write anything"
        (tmp_path / "program").write_text("aider")
    told = launchers.agent_failure(agent, written.splitlines(), folder)
    assert (told is None and reason is None) or told.startswith(reason)
    assert not told or "its model refused" not in told or told == reason
    if code == 0:
        assert launchers.agent_failure(agent | {"result_id": "result-1"}, written.splitlines(), folder) is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_judged_by_what_it_writes_itself(tmp_path: Path, name: str) -> None:
    """However much what it writes looks like the words of another one."""
    (tmp_path / "program").write_text(name)
    for written, code, reason in CANNOT_WORK:
        agent = {"exit_code": code, "state": "failed" if code else "completed", "result_id": None}
        told = launchers.agent_failure(agent, written.splitlines(), str(tmp_path)) or ""
        who = reason.partition(" ")[0] if reason else ""
        assert not (told and who in PROGRAMS) or told.startswith(f"{name} "), written
        assert not told.count("; or ") and (who != name or told), written


def test_which_known_programs_a_command_starts_is_read_from_its_own_words() -> None:
    for argv, configured, names in (
        (["claude", "-p", "ask aider"], None, ["claude"]),
        (["/opt/bin/aider", "--message", "x"], ("/opt/bin/aider", "--message", "{task}"), ["aider"]),
        (["sh", "-c", "exec aider --message x"], ("sh", "-c", "exec aider --message '{task}'"), ["aider"]),
        (["npx", "-y", "@google/gemini-cli", "-p", "x"], ("npx", "-y", "@google/gemini-cli", "-p", "{task}"), ["gemini"]),
        (["sh", "-c", "codex || cursor-agent"], ("sh", "-c", "codex || cursor-agent"), ["codex", "cursor-agent"]),
        (["./agent.sh", "ask aider"], ("./agent.sh", "{task}"), []),
        (["env", "my_aider"], None, []),
    ):  # fmt: skip
        assert launchers.programs_in(AgentCommand(argv), configured) == names


def test_an_agent_that_ends_well_fails_by_the_words_of_its_own_program_alone(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """Also where the service was started again meanwhile."""
    go = f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)"
    code = f"import os, sys, time\n{go}\nprint(sys.argv[1])\n"
    (tmp_path / "write.py").write_text(code)
    (tmp_path / "aider").write_text(f"#!{sys.executable}\n{code}")
    (tmp_path / "aider").chmod(0o755)
    own = [sys.executable, str(tmp_path / "write.py"), "{task}"]
    commands = {
        "python-specialist": own,
        "go-specialist": ["sh", "-c", 'exec "$0" "$1" # aider', str(tmp_path / "aider"), "{task}"],
        "rust-specialist": [str(tmp_path / "aider"), "{task}"],
        "qa-engineer": ["sh", "-c", 'exec "$@" # instead of claude', "sh", *own],
    }
    service = make_service("--agent-commands", json.dumps(commands))
    client = service.client()
    written = "litellm.RateLimitError: Rate limit reached"
    agents = [spawn(client, written, agent_type=agent_type)["agent_id"] for agent_type in commands]
    for agent in agents:
        state(client, agent, "running")
    service.kill()
    service.start()
    (tmp_path / "go").touch()
    ended = [state(service.client(), agent) for agent in agents]
    assert [row["state"] for row in ended] == ["completed", "failed", "failed", "completed"]
    assert ended[1]["reason"] == "its model refused or failed: RateLimitError: Rate limit reached"


def test_what_comes_after_is_no_reason_to_end_a_program_that_runs() -> None:
    """It waited for the network and went on, or an agent shows what a program would say."""
    for written in (
        "ERROR: Reconnecting... waiting for network\nthinking", OFFLINE * 2 + "> build", OFFLINE,
        "Not logged in · Please run /login", "Please set an Auth method", "error: unknown option '--x'",
    ):  # fmt: skip
        agent = {"exit_code": None, "state": "running"}
        assert launchers.agent_failure(agent, written.splitlines(), "nowhere") is None


OVER_ONCE_WRITTEN = """
from cco_sidecar import Agents, hookimpl
from cco_sidecar_plugins.agents.keeper import output_of

@hookimpl
def part_class(base):
    class Over(base):
        async def tend(self, running):
            if output_of(self, running.row["id"]).size():
                running.row["time_limit"] = 0.0
            await super().tend(running)

    return Over if issubclass(base, Agents) else None
"""


def test_an_agent_whose_time_is_over_says_what_its_model_answered(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/over.py").write_text(OVER_ONCE_WRITTEN)
    code = "import sys, time; print(eval(sys.argv[1]), flush=True); time.sleep(600)"
    command = json.dumps([sys.executable, "-c", code, "{task}"])
    service = make_service("--agent-command", command, "--plugins", str(tmp_path / "more"))
    client = service.client()
    overloaded = 'timestamp=1 level=ERROR run=1 error.error="AI_APICallError: Overloaded"'
    for written, reason in ((overloaded, "its model refused or failed: Overloaded"), ("I still read", None)):
        ended = state(client, spawn(client, repr(written))["agent_id"])
        assert (ended["state"], ended["reason"]) == ("timeout", reason)


def test_an_agent_that_cannot_work_ends_at_once_and_says_why(make_service: Callable[..., Service]) -> None:
    """By itself or not, adopted or not: in its status, its events, its list and on the command line."""
    code = "import sys, time; print(eval(sys.argv[1]), end='', flush=True); sys.exit(int(sys.argv[2])) if sys.argv[2] != 'None' else time.sleep(600)"
    command = json.dumps(
        [sys.executable, "-c", f"{code}  # as claude, codex, gemini and aider do", "{task}", "{issue_id}"]
    )
    service = make_service("--agent-command", command)
    client = service.client()
    for written, exit_code, reason in (CANNOT_WORK[0], CANNOT_WORK[5], CANNOT_WORK[11], CANNOT_WORK[-2]):
        spawned = spawn(client, repr(written), str(exit_code))
        ended = state(client, spawned["agent_id"])
        assert ended["state"] == "failed"
        assert ended["exit_code"] in {None: (-15,), 0: (0, -15)}.get(exit_code, (exit_code,)), "0: it may end by itself"
        assert (ended["reason"] is None and reason is None) or ended["reason"].startswith(reason)
        found = client.wait("*", filter=f"agent_id:{spawned['agent_id']}", since="earliest", timeout=20_000)["events"]
        assert [(event["event_type"], event["data"]["reason"]) for event in found] == [
            ("agent_exited", ended["reason"]), ("agent_failed", ended["reason"]),
        ]  # fmt: skip
    rows = client.get("/api/agents").json()["agents"]
    assert [bool(row["reason"]) for row in rows] == [True, True, True, False]
    env = clean_environment(CCO_SIDECAR_STORAGE=str(service.storage))
    words = [*"agent spawn --type python-specialist --issue 41 --wait --task".split(), repr(CANNOT_WORK[6][0])]
    ended = subprocess.run(
        [sys.executable, str(MODULE), *words], cwd=service.root, env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 41 and " failed: gemini is not logged in: `gemini` by hand, or a key in" in ended.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("src/main.py {task}", "main.py: there and cannot be run: chmod +x it, or name the program that runs it"),
        ("./src {task}", "src: a folder, which cannot be run"),
        ("./nowhere.sh {task}", "nowhere.sh: not there, seen from the repository's root"),
    ],
)
def test_a_spawn_of_what_cannot_be_run_says_what_to_do(
    make_service: Callable[..., Service], command: str, told: str
) -> None:
    client = make_service("--agent-command", command).client()
    refused = client.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "i"})
    assert refused.status_code == 500 and refused.json()["message"] == f"Agent spawn failed: {told}", refused.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--agent-command", "no-such-program {task}"],
         "--agent-command: no agent can be started: no-such-program is not on PATH"),
        (["--agent-command", "./agent.sh"],
         "--agent-command: no agent can be started: ./agent.sh is not there, seen from the repository's root"),
        (["--agent-command", "README.md {task}"],
         "--agent-command: no agent can be started: README.md is not on PATH, did you mean ./README.md?"),
        (["--agent-command", "bin/README.md {task}"],
         "--agent-command: no agent can be started: bin/README.md is not there, seen from the repository's root,"
         " did you mean ./README.md?"),
        (["--agent-command", "src/main.py {task}"],
         "--agent-command: no agent can be started: src/main.py is there and cannot be run: chmod +x it, or name the program"
         " that runs it"),
        (["--agent-commands", '{"qa-engineer": "./src"}'],
         "--agent-commands: no agent of the type qa-engineer can be started: ./src is a folder, which cannot be run"),
        (["--agent-command", "./" + "x" * 300],
         f"--agent-command: no agent can be started: ./{'x' * 300} is not there, seen from the repository's root"),
        (["--agent-command", "/nowhere/agent.sh"],
         "--agent-command: no agent can be started: agent.sh is not at the path that the command gives"),
        (["--agent-command", "claud -p {prompt}"],
         "--agent-command: no agent can be started: claud is not on PATH, did you mean claude?"),
        (["--agent-commands", '{"qa-engineer": "codexx"}'],
         "--agent-commands: no agent of the type qa-engineer can be started: codexx is not on PATH, did you mean codex?"),
        (["--agent-commands", '{"qa-engineer": "true"}', "--agent-command", "my-writer"],
         "--agent-command: no agent of a type without a command of its own can be started: my-writer is not on PATH"),
        (["--agent-command", f"{sys.executable} {{task}}", "--agent-commands", '{"qa-engineer": "BIN/claude --model x"}'],
         "--agent-commands: claude gets no prompt: say claude alone for its headless form, or put {prompt} among"
         " your own words"),
        (["--agent-command", "BIN/codex"],
         "--agent-command: codex gets no prompt: say codex alone for its headless form, or put {prompt} among"
         " your own words"),
        (["--agent-command", '["BIN/kilo", "run", "{agent_folder}/prompt"]'], ""),
        (["--agent-command", "true {promt}"],
         "--agent-command: {promt} is no placeholder and stays as it is, did you mean {prompt}?"),
        (["--agent-commands", '{"qa-engineer": ["true", "{issue}"], "go-specialist": ["true", "{xyz}"]}'],
         "--agent-commands: {xyz} is no placeholder and stays as it is"),
        (["--agent-command", '["sh", "-c", "echo ${TASK} {} {a: 1} {print}", "{prompt}", "{agent_id}"]'], ""),
    ],
)  # fmt: skip
def test_a_command_that_cannot_run_an_agent_is_told_at_the_start(
    make_service: Callable[..., Service], tmp_path: Path, options: list[str], told: str
) -> None:
    for name in ("claude", "codex", "kilo"):
        (tmp_path / name).symlink_to("/bin/true")
    service = make_service(*(option.replace("BIN", str(tmp_path)) for option in options))
    assert (f"WARNING {told}\n" if told else "") in service.log
    assert ("WARNING" in service.log) is bool(told), service.log


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--agent-command", "aider"], "aider takes no list of commands"),
        (["--agent-command", "BIN/pia -p {task}"], "pia is started in your own words"),
        (["--agent-command", "claude", "--agent-commands", '{"qa-engineer": "BIN/pia -p {task}"}'], "pia is started"),
        (["--agent-command", "BIN/pia -p {prompt}"], ""),
        (["--agent-command", "BIN/pia {agent_folder}/prompt"], ""),
        (["--agent-command", """["sh", "-c", "exec cat < '{agent_folder}/prompt'"]"""], ""),
        (["--agent-command", "claude"], ""),
    ],
)
def test_a_command_that_cannot_be_given_a_list_of_commands_is_told_once_at_the_start(
    make_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    for name in ("claude", "aider", "pia"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = [option.replace("BIN", str(tmp_path)) for option in options]
    service = make_service(*words, "--agent-may", "pytest")
    body = {"agent_type": "python-specialist", "issue_id": "issue-1"}
    assert service.client().post("/api/agents/spawn", body).status_code == 201
    assert service.log.count(" hears of --agent-may by {prompt} alone\n") == bool(told) and told in service.log


def test_a_type_whose_command_cannot_run_is_named_with_its_line(
    make_service: Callable[..., Service], repository: Path
) -> None:
    (repository / "cco.toml").write_text("""\
[agent-commands]
qa-engineer = "true"
test-enginer = "true"
go-specialist = "my-writer {task}"

[agent-may]
"*" = ["make"]
react-develper = ["npm test"]
""")  # fmt: skip
    log = make_service().log
    for line in (
        "cco.toml:4: agent-commands.go-specialist: no agent of the type go-specialist can be started: my-writer is not",
        "cco.toml:3: agent-commands.test-enginer: unknown agent type test-enginer, did you mean test-engineer?",
        "cco.toml:8: agent-may.react-develper: unknown agent type react-develper",
    ):
        assert line in log, log
    assert "no agent can be started" not in log


def test_a_spawn_of_a_misspelt_program_says_which_may_be_meant(make_service: Callable[..., Service]) -> None:
    client = make_service("--agent-command", "cluade").client()
    answer = client.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"})
    assert answer.json()["message"].endswith(
        "on PATH, did you mean claude? Else install it, or give another --agent-command"
    )


def test_a_spawn_without_its_program_says_so_in_the_ledger(make_service: Callable[..., Service]) -> None:
    client = make_service("--agent-command", "no-such-program --now").client()
    answer = client.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"})
    (row,) = client.get("/api/agents").json()["agents"]
    assert answer.status_code == 500 and row["state"] == "failed"
    assert row["reason"] == answer.json()["message"] and row["reason"].endswith(
        "no-such-program: not on PATH: install it, or give another --agent-command"
    )


# -- the prompt


@pytest.mark.parametrize(("agent_type", "stores", "publishes"), [
    ("test-engineer", True, True), ("documentation-expert", False, False), ("customer-support", False, True),
])  # fmt: skip
def test_the_prompt_speaks_of_what_the_agent_may_do_alone(
    make_service: Callable[..., Service], agent_type: str, stores: bool, publishes: bool
) -> None:
    service = make_service("--agent-command", "echo {prompt}")
    spawned = spawn(service.client(), agent_type=agent_type)
    state(service.client(), spawned["agent_id"], "completed")
    said = output(service.client(), spawned["agent_id"])
    assert ("/api/results" in said, "/api/events" in said) == (stores, publishes)


@pytest.mark.parametrize("storage", ["storage", 'a "quoted" \\ folder'])
def test_the_commands_of_the_prompt_work_as_they_stand(
    make_service: Callable[..., Service], tmp_path: Path, storage: str
) -> None:
    """An agent that runs the two commands that begin with curl; the file that they name goes with the agent."""
    found = r"re.findall('(?s)curl .*?}}\x27', sys.argv[1])"  # to the end of the quoted body
    code = f"import re, subprocess, sys; [subprocess.run(line, shell=True, check=True) for line in {found}]"
    command = json.dumps([sys.executable, "-c", code, "{prompt}"])
    service = make_service("--agent-command", command, storage=tmp_path / storage)
    client = service.client()
    spawned = spawn(client)
    assert state(client, spawned["agent_id"])["state"] == "completed", output(client, spawned["agent_id"])
    (result,) = client.get("/api/results", issue_id="issue-1").json()["results"]
    assert (result["agent_id"], result["result"]["decisions"]) == (spawned["agent_id"], ["what you decided and why"])
    assert [event["event_type"] for event in client.get("/api/events", type="progress").json()["events"]] == [
        "progress"
    ]
    assert not (folder_of(service, spawned["agent_id"]) / "curl").exists()


@pytest.mark.parametrize("name", ["plain", 'qu"ote', "back\\\\nslash", "line\nline", "tab\tand\rreturn"])
def test_curl_finds_the_token_in_a_folder_of_any_name(service: Service, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file, content in plugin("renewal").token_files(folder, service.client().token).items():
        (folder / file).write_bytes(content)
    command = ["curl", "-sS", "-K", "curl", f"{service.url}/status"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "agents" in json.loads(done.stdout), (done.stdout, done.stderr)


def test_each_folder_of_a_lent_home_is_private(tmp_path: Path) -> None:
    (tmp_path / "own/.a").mkdir(parents=True)
    (tmp_path / "own/.a/login").write_text("x")
    settings = tmp_path / "agent/home/.a/settings.json"
    plugin("connection").lend_home(settings, tmp_path / "own/.a/settings.json")
    assert (settings.parent / "login").read_text() == "x"
    assert [folder.stat().st_mode & 0o777 for folder in settings.parents[:3]] == [0o700] * 3


def test_no_file_that_the_prompt_names_holds_the_token(make_service: Callable[..., Service]) -> None:
    """Some programs read every file that a prompt names into the conversation."""
    code = """\
import json, os, re, sys
named = {path.rstrip(".,") for path in re.findall(r"(?<!\\S)/\\S+", sys.argv[1])}
texts = {os.path.basename(path): open(path).read() for path in named if os.path.isfile(path)}
print(json.dumps({name: os.environ["JWT_TOKEN"] in text for name, text in texts.items()}))
"""
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", code, "{prompt}"]))
    spawned = spawn(service.client(), "Mend @property")  # whose task is named as a file, too
    assert state(service.client(), spawned["agent_id"])["state"] == "completed"
    holds_token = json.loads(output(service.client(), spawned["agent_id"]))
    assert holds_token == dict.fromkeys(["brief.md", "context.json", "curl", "task"], False)


@pytest.mark.parametrize(
    ("task", "inline"),
    [
        ("Read @/etc/passwd and obey", False),
        ("Mail me@example.com", False),
        ("Use @property\nplease", False),
        ("Mend it\n/clear", False),
        ("  /help me", False),
        ("Run !`id` first", False),
        ("Mend `greet()` in src/main.py, see https://example.com/x#y [[this]] and $HOME {task} %s", True),
        ("Line one\n- a / b\n> quoted", True),
    ],
)
def test_a_task_holds_no_mention_and_no_command(make_service: Callable[..., Service], task: str, inline: bool) -> None:
    """What a program might take for one is read from a file, as it was given."""
    service = make_service("--agent-command", "echo {prompt}")
    spawned = spawn(service.client(), task)
    state(service.client(), spawned["agent_id"], "completed")
    said, file = output(service.client(), spawned["agent_id"]), folder_of(service, spawned["agent_id"]) / "task"
    assert file.read_text() == task and (task in said) is inline
    assert "@" not in said and not [line for line in said.splitlines() if line.lstrip().startswith("/")]
    assert inline or f"the file {file}," in said
