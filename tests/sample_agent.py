"""A stand-in for a coding agent. The first word of its task says what it does; it uses the standard library alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

FOREVER = 600
SLEEPER = [sys.executable, "-c", f"import time; time.sleep({FOREVER})"]


def call(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the service with the token of the moment."""
    token = Path(os.environ["CCO_TOKEN_FILE"]).read_text()
    request = urllib.request.Request(os.environ["SIDECAR_URL"] + path, None if body is None else json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def store(status: str = "success", **result: Any) -> dict[str, Any]:
    who = {name.lower(): os.environ[name] for name in ("AGENT_ID", "AGENT_TYPE", "ISSUE_ID", "PROJECT_ID")}
    return call("/results", who | {"result": {"status": status, **result}})


def succeed() -> None:
    print("done")


def fail() -> None:
    print("something went wrong", file=sys.stderr)
    sys.exit(3)


def hang() -> None:
    print("hanging", flush=True)
    time.sleep(FOREVER)


def family() -> None:
    """Children and a grandchild, all of whom sleep."""
    shell = f"{SLEEPER[0]} -c 'import time; time.sleep({FOREVER})' & wait"
    subprocess.Popen(["/bin/sh", "-c", shell])
    subprocess.Popen(SLEEPER)
    print("family", flush=True)
    time.sleep(FOREVER)


def escape() -> None:
    """A grandchild in a session of its own whose parent is gone."""
    start = f"import subprocess, sys; subprocess.Popen({SLEEPER!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-c", start], check=True)
    print("escaped", flush=True)


def escape_and_hang() -> None:
    escape()
    time.sleep(FOREVER)


def ignore() -> None:
    """Not to be moved by SIGTERM, nor is its child."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep({FOREVER})"])
    time.sleep(0.3)
    print("ignoring", flush=True)
    while True:
        time.sleep(FOREVER)


def write() -> None:
    for number in range(20_000):
        print(f"line {number}")


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def report() -> None:
    """Its arguments, environment and working directory."""
    print(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}))


def store_and_hang() -> None:
    store()
    print("stored", flush=True)
    time.sleep(FOREVER)


def watch_token() -> None:
    """The service is asked again and again with what is in the token file."""
    tokens = set()
    until = time.monotonic() + 5
    while time.monotonic() < until and len(tokens) < 3:
        call(f"/results?issue_id={os.environ['ISSUE_ID']}")
        tokens.add(Path(os.environ["CCO_TOKEN_FILE"]).read_text())
        time.sleep(0.3)
    print(f"{len(tokens)} tokens")


def work() -> None:
    """The whole day of an agent: context, progress, result."""
    issue, agent_type = os.environ["ISSUE_ID"], os.environ["AGENT_TYPE"]
    context = call(f"/context/{issue}/{agent_type}")["context"]
    injected = json.loads(Path(os.environ["CCO_CONTEXT_FILE"]).read_text())["context"]
    seen = {"files": len(context["relevant_files"]), "injected": sorted(injected), "branch": context["git_context"]["branch"]}
    earlier = [output["decision"] for output in context["previous_agent_outputs"]]
    call("/events/progress", {"publisher": os.environ["AGENT_ID"], "topic": "progress", "data": {"issue_id": issue, "seen": seen}})
    stored = store(files_modified=["src/main.py"], decisions=[f"{agent_type} has worked"], rationale=f"after {earlier}")
    print(f"stored {stored['id']}")


if __name__ == "__main__":
    globals()[os.environ["TASK"].split()[0]]()
