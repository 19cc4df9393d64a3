"""Real coding programs do an agent's whole job, their models played by tests/mock_model.py: no key, no network.

    python -m tests.real_agents [claude codex gemini opencode qwen copilot cline kilo aider]

Prints a line a program: its version, what it did, by the service's tools or by curl, how long it took; then, for those
that have tools, whether a wait of 100 seconds came to its end and a call was answered after the token had been renewed,
and whether one whose call is cut off by the end of the service hears of it from the next one and stores its result.
Exit code 0 when every one did all that it can.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it

import npm
from conftest import Service, clean_environment, end_stragglers, make_repository, marked_processes, plugin, until
from mock_model import WORK, MockModel, Step

PROGRAMS = plugin("launchers").PROGRAMS
PACKAGES = {
    "claude": "@anthropic-ai/claude-code", "codex": "@openai/codex", "gemini": "@google/gemini-cli",
    "opencode": "opencode-ai", "qwen": "@qwen-code/qwen-code", "copilot": "@github/copilot",
    "cline": "cline", "kilo": "@kilocode/cli",
}  # fmt: skip
TYPES = {  # which agent type each program is here
    "claude": "python-specialist", "codex": "rust-specialist", "gemini": "go-specialist",
    "opencode": "java-specialist", "qwen": "ruby-specialist", "copilot": "php-specialist", "cline": "kotlin-specialist",
    "kilo": "swift-specialist", "aider": "c-specialist",
}  # fmt: skip
SESSION = {  # as if the service was started by an agent: a nested claude refuses to start where it sees these
    "CLAUDECODE": "1", "CLAUDE_CODE_ENTRYPOINT": "cli", "CODEX_SANDBOX": "seatbelt", "GEMINI_CLI": "1", "OPENCODE": "1",
}  # fmt: skip
TOKEN = re.compile(r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}")
TASK = "Greet by name, the session store keeps a cookie."
REFUSABLE = ("claude", "codex", "gemini", "qwen")  # whose stop can be refused
DEAF = ("copilot", "cline")  # who hear of no event while they work
FORGETFUL = {"forgetful": [*WORK[:3], {"text": "I think that I am done."}, *WORK[3:]]}


def task_of(name: str) -> str:
    """The task of a program that is to do all that it can: one whose stop can be refused forgets its result first."""
    return f"{TASK} Follow script forgetful" if name in REFUSABLE else TASK


def install(name: str) -> Path:
    """The folder that holds the program, in the version that the table of launchers names. Skips where npm cannot."""
    if name in PACKAGES:
        return npm.install(f"{PACKAGES[name]}@{PROGRAMS[name].tried}", scripts=True)
    folder = npm.CACHE / f"{name}-{PROGRAMS[name].tried}"
    if not (folder / "bin" / name).exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "-qq", f"aider-chat=={PROGRAMS[name].tried}"], check=True)
    return folder / "bin"


def environment(home: Path, url: str, folders: list[Path]) -> dict[str, str]:
    """Made-up keys, a home of its own, and nothing of a coding session around us."""
    session = re.compile(
        "ANTHROPIC|OPENAI|GEMINI|GOOGLE|CLAUDE|CODEX|QWEN|COPILOT|OPENCODE|KILO|CLINE|GITHUB|GH_|OTEL|XDG"
    )
    kept = {name: value for name, value in clean_environment().items() if not session.match(name)}
    path = os.pathsep.join([*map(str, dict.fromkeys(folders)), os.environ["PATH"]])
    if any((folder / "opencode").exists() for folder in folders):
        settle(home / ".config/opencode")
    return kept | {
        "HOME": str(home), "PATH": path, "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "sk-ant-made-up",
        "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "sk-made-up",
        "OPENAI_MODEL": "mock-model", "AIDER_MODEL": "openai/mock-model", "GEMINI_API_KEY": "made-up",
        "GOOGLE_GEMINI_BASE_URL": url, "MOCK_KEY": "made-up", "COPILOT_PROVIDER_BASE_URL": f"{url}/v1",
        "COPILOT_MODEL": "mock-model", "OPENCODE_DISABLE_MODELS_FETCH": "1", "KILO_DISABLE_MODELS_FETCH": "1",
        "DISABLE_AUTOUPDATER": "1",
    }  # fmt: skip


def make_home(home: Path, url: str) -> Path:
    """A home in which every program finds its model at ``url``, and somebody logged in."""
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "made-up"}}
    models = {"model": "mock/mock-model", "provider": {"mock": provider | {"models": {"mock-model": {}}}}}
    codex = f'name = "mock"\nbase_url = "{url}/v1"\nenv_key = "MOCK_KEY"\nwire_api = "responses"\n'
    # Its sandbox puts an empty .git into each folder that it lets be written to while a command runs: folders of other
    # tests would lie in a repository.
    codex += "[sandbox_workspace_write]\nexclude_slash_tmp = true\nexclude_tmpdir_env_var = true\n"
    told = {"provider": "openai-compatible", "apiKey": "made-up", "model": "mock-model", "baseUrl": f"{url}/v1"}
    chosen = {"settings": told, "updatedAt": "2026-01-31T12:00:00.000Z", "tokenSource": "manual"}
    cline = {"version": 1, "lastUsedProvider": told["provider"], "providers": {told["provider"]: chosen}}
    for name, content in {
        ".codex/config.toml": f'model_provider = "mock"\nmodel = "mock-model"\n[model_providers.mock]\n{codex}',
        ".claude.json": json.dumps({"hasCompletedOnboarding": True}),
        ".gemini/settings.json": json.dumps({"security": {"auth": {"selectedType": "gemini-api-key"}}}),
        ".qwen/settings.json": json.dumps({"security": {"auth": {"selectedType": "openai"}}}),
        ".config/opencode/opencode.json": json.dumps(models),
        ".config/kilo/kilo.json": json.dumps(models),
        ".cline/data/settings/providers.json": json.dumps(cline),
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    return home


def settle(folder: Path) -> None:
    """Put into a folder of opencode's settings what it fetches at its first start there, at a minute of CPU time."""
    fetched = npm.install(f"@opencode-ai/plugin@{PROGRAMS['opencode'].tried}").parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "node_modules").symlink_to(fetched / "node_modules")
    for name in ("package.json", "package-lock.json"):  # which it compares
        shutil.copy(fetched / name, folder)


STORE = '{"status": "success", "decisions": ["waited"]}'
SCRIPTS: dict[str, list[Step]] = {
    "long": [
        {"tool": "wait_for_events", "arguments": '{"event_type": "never", "timeout_seconds": 100}'},
        {"tool": "store_result", "arguments": STORE},
        {"text": "done"},
    ],
}


@dataclass
class Outcome:
    """What became of one agent."""

    agent: dict[str, Any]
    results: list[dict[str, Any]]
    events: list[dict[str, Any]]
    wrote: bool  # the file that it was to write
    read: bool  # its context reached the model
    heard: bool  # of an event that came while it worked
    refused: bool  # its stop
    leaks: list[str]  # where its token was seen
    seconds: float
    output: str
    tools: bool  # it called the service by its tools alone


class Workshop:
    """A service whose agents are real programs, and the model and home that they find."""

    def __init__(self, folder: Path, names: list[str], model: MockModel, *arguments: str) -> None:
        self.model, self.folder = model, folder
        self.env = environment(make_home(folder / "home", model.url), model.url, [install(name) for name in names])
        commands = json.dumps({TYPES[name]: [name] for name in names})
        self.env |= SESSION
        self.service = Service(
            make_repository(folder / "repository"),
            folder / "storage",
            "--agent-commands",
            commands,
            "--log-level",
            "debug",
            *arguments,
            env=self.env,
        )

    def __enter__(self) -> Workshop:
        self.service.start()
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.service.client().get("/api/agents", state="running").json()["agents"]:
            self.service.client().delete(f"/api/agents/{agent['agent_id']}")
        code = self.service.stop()
        end_stragglers()
        assert code == 0, self.service.log

    def run(self, name: str, task: str = TASK, seconds: float = 300, agent_type: str = "") -> Outcome:
        """Let a program work on an issue of its own until it ends."""
        client, began, before = self.service.client(), time.monotonic(), len(self.model.requests)
        (self.service.root / "hello.py").unlink(missing_ok=True)
        body = {"agent_type": agent_type or TYPES[name], "issue_id": f"{name}-{before}", "task": task}

        def publish(script: str, step: int) -> None:
            """Somebody looks at each turn at the files that it has made at home, and has something to say at one."""
            seen.update(token_files(self.folder / "home", started["jwt_token"]) if started else ())
            if step == 2:
                data = {"issue_id": body["issue_id"], "message": "look at the zebra"}
                client.publish("review_wanted", data)

        seen, started = set[str](), dict[str, str]()
        self.model.before_turn = publish
        started |= (spawned := client.post("/api/agents/spawn", body).json())
        path = f"/api/agents/{spawned['agent_id']}"
        while not (agent := client.get(f"{path}/status").json())["ended_at"] and time.monotonic() < began + seconds:
            seen.update(token_holders(spawned["jwt_token"]))
            time.sleep(0.1)
        self.model.before_turn = lambda script, step: None
        seen.update(token_files(self.folder / "home", spawned["jwt_token"]))
        output = client.get(f"{path}/logs").json()["text"]
        traffic = "\n".join(self.model.requests[before:])
        told = {"traffic": traffic, "output": output, "log": self.service.log}
        results = client.get("/api/results", issue_id=body["issue_id"]).json()["results"]
        return Outcome(
            agent,
            [row for row in results if row["agent_id"] == spawned["agent_id"] and row.get("source") != "sidecar"],
            client.get("/api/events", type="progress", limit=1000).json()["events"][-1:],
            (self.service.root / "hello.py").exists(),
            "src/session_store.py" in traffic,
            "look at the zebra" in traffic,
            "You have not stored your result yet" in traffic,
            sorted(seen | {where for where, text in told.items() if TOKEN.search(text)}),
            time.monotonic() - began,
            output,
            self.service.log.count(f" {spawned['agent_id']} -\n") > 1
            and not re.search(rf" (?:GET|POST) /api/(?!hooks)\S+ .* {spawned['agent_id']} ", self.service.log),
        )


def token_holders(token: str) -> list[str]:
    """Processes of the agents that have the token among their arguments."""
    found = []
    for process in marked_processes():
        try:
            found += [f"argv of {process.name()}"] if token in " ".join(process.cmdline()) else []
        except psutil.Error:  # it has just ended
            continue
    return found


def token_files(home: Path, token: str) -> list[str]:
    """Files below the home that hold the token."""
    words = ["grep", "-rlF", "--exclude-dir=node_modules", token, str(home)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return [f"~/{Path(line).relative_to(home)}" for line in found.stdout.splitlines()]


def main(names: list[str]) -> int:
    bad = 0
    print(
        f"{'program':9} {'version':9} {'state':10} {'read':5} {'wrote':6} {'event':6} {'result':7} {'heard':6} {'refused':8} {'token':6} {'tools':6}"
        " seconds"
    )
    for name in names or list(TYPES):
        with (
            tempfile.TemporaryDirectory(dir=npm.CACHE) as folder,  # gemini takes no settings from below /tmp
            MockModel(FORGETFUL) as model,
            Workshop(Path(folder), [name], model) as workshop,
        ):
            done = workshop.run(name, task_of(name))
            event = any(event["publisher"] == done.agent["agent_id"] for event in done.events)
            cells = [done.read, done.wrote, event, bool(done.results), done.heard or name in DEAF, not done.leaks]
            cells.insert(5, done.refused is (name in REFUSABLE))
            words = ["yes" if cell else "no" for cell in cells]
            # aider runs no commands
            good = done.agent["state"] == "completed" and all(
                [*cells, done.tools] if name != "aider" else (done.wrote, not done.leaks)
            )
            bad += not good
            print(
                f"{name:9} {PROGRAMS[name].tried:9} {done.agent['state']:10} {words[0]:5} {words[1]:6} {words[2]:6}"
                f" {words[3]:7} {'yes' if done.heard else 'no':6} {'once' if done.refused else 'no':8}"
                f" {'kept' if cells[-1] else 'LEAKED':6} {'yes' if done.tools else 'no':6} {done.seconds:.1f}",
                flush=True,
            )
            if not good:
                print(done.agent["reason"], done.leaks, done.output[-2000:], model.turns, file=sys.stderr)
    with_tools = [name for name in names or list(TYPES) if PROGRAMS[name].connects]
    return 1 if bad + wait_long(with_tools) + be_cut_off(with_tools) else 0


def wait_long(names: list[str]) -> int:
    """How many of the programs do not wait for 100 seconds and go on with a new token; all wait at once."""
    if not names:  # aider alone has no tools to wait with
        return 0
    bad, longest = 0, 240.0
    with (
        tempfile.TemporaryDirectory() as folder,
        MockModel(SCRIPTS) as model,
        Workshop(Path(folder), names, model, "--token-ttl", "60") as workshop,
        ThreadPoolExecutor(len(names)) as pool,
    ):
        running = {name: pool.submit(workshop.run, name, "Follow script long", longest) for name in names}
        for name, result in running.items():
            done = result.result()
            log = [line for line in workshop.service.log.splitlines() if f" {done.agent['agent_id']} " in line]
            waited = any(" POST /mcp/wait_for_events 200 " in line for line in log) and done.seconds > 100
            renewed = len(done.results) == 1 and not done.leaks
            bad += not (waited and renewed)
            print(
                f"{name:9} waited {'yes' if waited else 'NO':4} renewed {'yes' if renewed else 'NO':4} {done.seconds:.1f}"
            )
            if not (waited and renewed):
                print(done.agent, done.leaks, done.output[-2000:], log, file=sys.stderr)
    return bad


def be_cut_off(names: list[str]) -> int:
    """How many of the programs do not go on where the service is killed during a call, and started again."""
    if not names:
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with (
        tempfile.TemporaryDirectory(dir=npm.CACHE) as folder,
        MockModel(SCRIPTS) as model,
        Workshop(Path(folder), names, model, "--port", port) as workshop,
    ):
        service, agents = workshop.service, {}
        for name in names:
            body = {"agent_type": TYPES[name], "issue_id": name, "task": "Follow script long"}
            agents[name] = service.client().post("/api/agents/spawn", body).json()["agent_id"]
        until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == len(names), 90)
        service.kill()
        killed = time.monotonic()
        service.start()
        bad, waiting = 0, dict(agents)
        while waiting and time.monotonic() < killed + 60:
            time.sleep(0.2)
            for name, agent_id in list(waiting.items()):
                if service.client().get(f"/api/agents/{agent_id}/status").json()["ended_at"]:
                    del waiting[name]
                    results = service.client().get("/api/results", issue_id=name).json()["results"]
                    went_on = [row.get("source") for row in results] == [None]
                    bad += not went_on
                    print(f"{name:9} cut off, went on {'yes' if went_on else 'NO':4} {time.monotonic() - killed:.1f}")
        for name in waiting:
            print(f"{name:9} cut off, went on NO", agents[name], workshop.service.log[-2000:], file=sys.stderr)
        return bad + len(waiting)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
