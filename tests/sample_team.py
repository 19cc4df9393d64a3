"""A team in the place of coding agents: each member does what the first line of its task, a JSON object, has for its
type.

``{"python-specialist": ["crash", "success"]}``: the first of that type crashes, later ones succeed. Types that are not
named succeed. Before it does it, each appends a line to the file that TEAM_LOG names.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
from functools import partial
from pathlib import Path
from typing import Any

import sample_agent


def attempt() -> int:
    """How many of this type have worked on the issue, this one included."""
    agents = sample_agent.call(f"/agents?issue_id={os.environ['ISSUE_ID']}&limit=1000")["agents"]
    return sum(agent["agent_type"] == os.environ["AGENT_TYPE"] for agent in agents)


def report(status: str) -> None:
    """As an agent does; a type that may not store results leaves it at its last words."""
    print(f"{os.environ['AGENT_TYPE']} is done", flush=True)
    if os.environ["AGENT_TYPE"] not in ("documentation-expert", "technical-researcher"):
        sample_agent.store(
            status, files_modified=["src/main.py"], decisions=[f"{os.environ['AGENT_TYPE']} says {status}"]
        )


def silent() -> None:
    print("I forgot something\nwhat was it?")


def edit() -> None:
    """As a program does that runs no commands: it changes a file, and calls nobody."""
    with Path("src/main.py").open("a") as file:
        file.write(f"# {os.environ['AGENT_TYPE']}\n")
    print("I changed src/main.py")


def refused(way: str) -> None:
    """Changes a file, and its result is refused."""
    edit()
    try:
        if way == "invalid":
            sample_agent.store("splendid")
        elif way in ("by MCP", "invalid MCP"):
            status = "splendid" if way == "invalid MCP" else "success"
            call = {"name": "store_result", "arguments": {"status": status}}
            os.environ["SIDECAR_URL"] = os.environ["SIDECAR_URL"].removesuffix("/api")
            sample_agent.call("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
        else:
            report("success")
    except urllib.error.HTTPError as error:
        print(f"refused: {error.code}")


def crash() -> None:
    print("\x1b[31mout of luck\x1b[0m", file=sys.stderr)
    sys.exit(7)


def gate() -> None:
    """Success as soon as a file of that name is there."""
    print("at the gate", flush=True)
    while not Path(os.environ["TEAM_LOG"]).with_name("open").exists():
        time.sleep(0.02)
    report("success")


def chatter() -> None:
    """Says something, and publishes that it did, again and again."""
    for number in range(sample_agent.FOREVER):
        print(f"line {number}", flush=True)
        sample_agent.call(
            "/events/progress", {"publisher": os.environ["AGENT_ID"], "topic": "progress", "data": {"line": number}}
        )
        time.sleep(0.2)


def ask() -> None:
    """Asks a person three things, and waits at the gate."""
    asked: list[dict[str, Any]] = [
        {"kind": "question", "text": "Up or down?", "choices": ["up", "down"]},
        {"kind": "question", "text": "Which port?"},
        {"kind": "approval", "text": "Bash: git tag x", "command": "git tag x"},
    ]
    for each in asked:
        sample_agent.call("/approvals", each | {"timeout_seconds": 300})
    gate()


def half() -> None:
    """Progress with carriage returns, and a last line that ends in the middle of a character."""
    os.write(1, b"first\r\n10%\r\x1b[K20%\r\x1b(Bhalf a line \xe2\x82")
    if Path(os.environ["TEAM_LOG"]).with_name("open").exists():
        sys.exit(3)
    time.sleep(sample_agent.FOREVER)


def late() -> None:
    """Changes a file, has its result refused, and ends when the gate opens."""
    refused("invalid")
    print("waiting", flush=True)
    while not Path(os.environ["TEAM_LOG"]).with_name("open").exists():
        time.sleep(0.02)


def store_and_crash() -> None:
    report("success")
    crash()


DEEDS = {
    "silent": silent, "crash": crash, "gate": gate, "store_and_crash": store_and_crash, "chatter": chatter, "half": half,
    "ask": ask, "edit": edit, "late": late, **{way: partial(refused, way) for way in ("invalid", "by policy", "by MCP", "invalid MCP")},
    "hang": sample_agent.hang, "ignore": sample_agent.ignore, "die": sample_agent.die,
}  # fmt: skip

if __name__ == "__main__":
    line = os.environ["TASK"].partition("\n")[0]
    script = json.loads(line).get(os.environ["AGENT_TYPE"], ["success"]) if line.startswith("{") else ["success"]
    deed = script[min(attempt(), len(script)) - 1]
    with Path(os.environ["TEAM_LOG"]).open("a") as log:
        log.write(os.environ["AGENT_TYPE"] + "\n")
    if Path(os.environ["TEAM_LOG"]).with_name(f"mended-{os.environ['AGENT_TYPE']}").exists():
        deed = "success"
    DEEDS.get(deed, lambda: report(deed))()
