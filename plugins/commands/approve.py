"""The commands ``cco approvals``, ``approve``, ``deny`` and ``answer``: what agents ask, and a person's answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from cco_sidecar import GOOD, REFUSED, StartError, hookimpl
from cco_sidecar_plugins.commands._client import Client, Refused
from cco_sidecar_plugins.commands._printing import cell, print_fitted, show
from cco_sidecar_plugins.commands._table import Command, add_commands, arg, number, text_or_input


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, COMMANDS)


def command_approvals(options: argparse.Namespace) -> int:
    """Print what waits for an answer; with --all also what was answered."""
    query = {"state": None if options.all else "open", "issue_id": options.issue, "limit": options.limit}
    answer = Client(options).call("GET", "/api/approvals", query=query)
    if options.format != "table":
        return show(options, answer, "approvals" if options.format == "csv" else None)
    lines = [list(line_of(row, options.all).values()) for row in answer["approvals"]]
    columns = ["id", "by", "issue", "until", *(["state"] if options.all else []), "asks", "choices"]
    cut = print_fitted(columns, lines, whole=("id",), spare=("issue",))
    for at, row in enumerate(answer["approvals"]):
        if row["state"] == "open" and (at in cut or "\n" in asks(row)):  # nobody is to approve what the table hides
            choices = "".join(f"\n- {choice}" for choice in row["choices"] if row["kind"] == "question")
            print(f"\n{number_of(row['approval_id'])} asks:")
            print("\n".join(f"  {cell(line)}" for line in (asks(row) + choices).splitlines()))
    return GOOD


def asks(row: dict[str, Any]) -> str:
    """What is asked: the command first, whatever else the agent says of it."""
    said: str = row["text"]
    return f"{row['command']} ({said})" if row["command"] and not said.endswith(f": {row['command']}") else said


def line_of(row: dict[str, Any], with_state: bool) -> dict[str, str]:
    state = row["state"] + (f": {row['answer']} by {row['answered_by']}" if row["answered_by"] else "")
    return {
        "id": number_of(row["approval_id"]), "by": row["agent_id"], "issue": row["issue_id"] or "-",
        "until": time_left(row["until"]), **({"state": state} if with_state else {}),
        "asks": asks(row), "choices": "|".join(row["choices"]) or "any text",
    }  # fmt: skip


def number_of(approval_id: str) -> str:
    """What is enough to type of an id: its number, without zeros."""
    return approval_id.rpartition("-")[2].lstrip("0")


def time_left(until: str) -> str:
    left = int((datetime.fromisoformat(until) - datetime.now(UTC)).total_seconds())
    return "over" if left <= 0 else f"{left} s" if left < 120 else f"{left // 60} min"


def command_approve(options: argparse.Namespace) -> int:
    return answer_with(options, "approve", decides=True)


def command_deny(options: argparse.Namespace) -> int:
    return answer_with(options, "deny", decides=True)


def command_answer(options: argparse.Namespace) -> int:
    return answer_with(options, options.text)


def answer_with(options: argparse.Namespace, answer: str, *, decides: bool = False) -> int:
    """Give the answer; ``decides`` refuses where that is none of the choices: a question wants words, not leave."""
    client = Client(options)
    asked = approval_named(client, options.id)
    approval_id = asked["approval_id"]
    if decides and asked["state"] == "open" and answer not in asked["choices"]:
        raise StartError(f"{number_of(approval_id)} is a question: {how_to_answer(client, asked)}", REFUSED)
    body = {"answer": answer} | ({"message": options.message} if options.message else {})
    done = client.call("POST", f"/api/approvals/{approval_id}/answer", body)
    if options.format != "table":
        return show(options, done)
    print(cell(f"{done['answer']}: {done['agent_id']} asked: {done['command'] or done['text']}"))
    return GOOD


def how_to_answer(client: Client, asked: dict[str, Any]) -> str:
    number = number_of(asked["approval_id"])
    if asked["kind"] == "approval":
        return f"`{client.command(f'approve {number}')}` or `{client.command(f'deny {number}')}` answers it"
    choices = f", where TEXT is one of {', '.join(map(cell, asked['choices']))}" if asked["choices"] else ""
    return f"`{client.command(f'answer {number} TEXT')}` answers it{choices}"


def newly_asked(client: Client, agent: dict[str, Any], told: set[str], read: Callable[..., Any]) -> Iterator[str]:
    """What an agent asks a person, since it waits for that, and how it is answered. ``told`` is what was told before;
    ``read`` gets a path and a query. A policy may keep it from us, and the service may have no approvals.
    """
    try:
        asked = read("/api/approvals", {"state": "open", "issue_id": agent["issue_id"]})["approvals"]
    except Refused as error:
        if error.status in (403, 404):
            return
        raise
    for row in asked:
        if row["agent_id"] == agent["agent_id"] and row["approval_id"] not in told:
            told.add(row["approval_id"])
            yield f"{agent['agent_type']} asks: {asks(row)}; {how_to_answer(client, row)}"


def approval_named(client: Client, text: str) -> dict[str, Any]:
    """What ``text`` names: a whole id, or its number. Raises StartError."""
    known: list[dict[str, Any]] = client.call("GET", "/api/approvals", query={"limit": 1000})["approvals"]
    found = [row for row in known if text in (row["approval_id"], number_of(row["approval_id"]))]
    if not found:
        raise StartError(
            f"nobody asked {text!r}: `{client.command('approvals')}` lists what waits for an answer", REFUSED
        )
    return found[-1]


ID_ARGUMENT = arg("id", metavar="ID", help="its number, or its whole id")
MESSAGE_ARGUMENT = arg(
    "--message", type=text_or_input, metavar="TEXT", help="what the agent is told beside it, - for standard input"
)
SECTION = "Agents and what they exchange"

COMMANDS = {
    "approvals": Command("list what agents ask", command_approvals, [
        arg("--all", action="store_true", help="also what was answered or is over"),
        arg("--issue", metavar="ID", help="of this issue"),
        arg("--limit", type=number(1, 1000), metavar="N", help="how many at most, 1 to 1000 (default: 100)")],
        section=SECTION),
    "approve": Command("allow what an agent asks for", command_approve, [ID_ARGUMENT, MESSAGE_ARGUMENT],
                       section=SECTION),
    "deny": Command("refuse what an agent asks for", command_deny, [ID_ARGUMENT, MESSAGE_ARGUMENT], section=SECTION),
    "answer": Command("answer an agent's question", command_answer, [
        ID_ARGUMENT, arg("text", type=text_or_input, metavar="TEXT",
            help="one of its choices, or any text where it has none, - for standard input"),
        MESSAGE_ARGUMENT], section=SECTION),
}  # fmt: skip
