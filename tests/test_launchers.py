"""How known coding programs are started: argv, standard input, environment and files, the prompt, what they may run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from agent_harness import folder_of, nothing_left, output, spawn, state
from conftest import Service, make_repository, plugin

__all__ = ["nothing_left"]
launchers = plugin("launchers")
PROGRAMS = launchers.PROGRAMS
SHOW = """\
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith(("OPENCODE_", "COPILOT_"))}
print(json.dumps([sys.argv[1:], told, os.environ["JWT_TOKEN"][::7], sys.stdin.read()]))
"""


CODERS = "python rust go java javascript typescript ruby php kotlin swift".split()
TYPES = dict(zip(PROGRAMS, (f"{language}-specialist" for language in CODERS), strict=False))


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
    more = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COPILOT_ALLOW_ALL": "true"}
    running = Service(
        make_repository(folder / "repository"), folder / "storage", "--agent-commands", json.dumps(commands), env=more
    ).start()
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_known_program_is_started_in_its_headless_form(service: Service, name: str) -> None:
    spawned = spawn(service.client(), "Mend the $(roof) {issue_id}", agent_type=TYPES[name])
    assert state(service.client(), spawned["agent_id"])["state"] == "completed"
    arguments, told, token, read = json.loads(output(service.client(), spawned["agent_id"]))
    folder, row = folder_of(service, spawned["agent_id"]), PROGRAMS[name]
    assert "{" not in " ".join(word for word in arguments if "issue-1" not in word)
    prompt = read or next(word for word in arguments if "issue-1" in word)
    assert bool(read) == (row.stdin == "{agent_folder}/prompt")
    assert [word for word in row.argv[1:] if "{" not in word] == [word for word in arguments if word in row.argv]
    for needed in (
        spawned["agent_id"], TYPES[name], "issue-1", "Mend the $(roof) {issue_id}", f"{folder}/context.json",
        "read_context, write_results, publish_events", f"curl -sS -K {folder}/curl {service.url}/api/results -d '{{",
        f"{service.url}/api/events/progress -d '{{",
    ):  # fmt: skip
        assert needed in prompt
    assert "$" not in prompt.replace("$(roof)", ""), "a command with a variable is refused by some programs"
    assert token == spawned["jwt_token"][::7] and spawned["jwt_token"] not in " ".join(arguments) + prompt
    files = {name: (folder / name) for name in row.files}
    assert all(oct(file.stat().st_mode & 0o777) == "0o600" and "{" not in file.read_text() for file in files.values())
    if row.may:
        assert "curl" in " ".join([*arguments, *told.values(), *(file.read_text() for file in files.values())])
    if name == "opencode":
        assert told.get("OPENCODE_DB") == f"{folder}/opencode.db"
        permissions = json.loads(told["OPENCODE_CONFIG_CONTENT"])["permission"]
        assert permissions["bash"] == {"*": "deny", "curl": "allow", "curl *": "allow"}
        assert permissions["external_directory"] == {f"{folder}/*": "allow"}
    if name == "copilot":
        assert told["COPILOT_ALLOW_ALL"] == ""


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


def test_the_commands_of_the_prompt_work_as_they_stand(make_service: Callable[..., Service]) -> None:
    """An agent that runs the two lines that begin with curl; the file that they name goes with the agent."""
    code = "import re, subprocess, sys; [subprocess.run(line, shell=True, check=True) for line in re.findall('curl .*', sys.argv[1])]"
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", code, "{prompt}"]))
    client = service.client()
    spawned = spawn(client)
    assert state(client, spawned["agent_id"])["state"] == "completed", output(client, spawned["agent_id"])
    (result,) = client.get("/api/results", issue_id="issue-1").json()["results"]
    assert (result["agent_id"], result["result"]["decisions"]) == (spawned["agent_id"], ["what you decided and why"])
    assert [event["event_type"] for event in client.get("/api/events", type="progress").json()["events"]] == [
        "progress"
    ]
    assert not (folder_of(service, spawned["agent_id"]) / "curl").exists()
