"""The commands that talk to a running service: health, status, context, results, events and agent.

Each is a row of COMMANDS and a function that makes one call or follows something with several. ``Client`` finds the service and
speaks for the user, ``show`` prints the answer as --format wants it; both are the module's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

from cco_sidecar import GOOD, REFUSED, Client, Command, NotReachable, StartError, add_commands, arg, cell, hookimpl, show


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, COMMANDS)


def command_health(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("GET", "/health"))


def command_status(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("GET", "/status"))


# -- contexts and results


def command_context_get(options: argparse.Namespace) -> int:
    query = {name: getattr(options, name) for name in ("task", "max_bytes", "max_tokens", "max_files", "since")}
    context = Client(options).call("GET", f"/api/context/{quote(options.issue)}/{quote(options.type)}", query=query)
    if options.explain:
        return explain(options, context)
    if options.format == "json":
        return show(options, context)
    files = [
        {**{name: file.get(name) for name in ("path", "size", "language", "score")}, "why": ", ".join(file.get("reasons", []))}
        for file in context["context"]["relevant_files"]
    ]
    return show(options, {"files": files}, "files")


def explain(options: argparse.Namespace, context: dict[str, Any]) -> int:
    """The ranking: in which order, why, and how much of each file was given; the sums follow on stderr."""
    files = context["context"]["relevant_files"]
    rows = [
        {"rank": rank, "score": file.get("score"), "path": file["path"], "given": given_of(file), "why": "; ".join(file.get("reasons", []))}
        for rank, file in enumerate(files, 1)
    ]
    show(options, {"files": rows}, "files")
    cut = f"cut ({context['truncation_strategy']})" if context["truncated"] else "nothing left out"
    total = context["context"]["project_structure"]["total_files"]
    sizes = f"{context['total_size_bytes']:,} bytes, about {context['estimated_tokens']:,} tokens"
    metadata = context["context"]["metadata"]
    matched = "; no word of the task occurs" if metadata["task_matched"] is False else ""
    sys.stderr.write(f"{len(files)} of {total} files, {sizes}, {cut}; index {metadata['index']}{matched}\n")
    return GOOD


def given_of(file: dict[str, Any]) -> str:
    """How much of a file a context holds."""
    if not file.get("truncated"):
        return "whole"
    ranges = [f"{first}-{last}" for first, last in file.get("line_ranges", [])]
    return f"lines {', '.join(ranges)}" if ranges else "beginning"


def command_context_clear(options: argparse.Namespace) -> int:
    if (options.issue is None) is not options.all:
        raise StartError("context clear takes an issue or --all")
    return show(options, Client(options).call("DELETE", "/api/cache/all" if options.all else f"/api/cache/context/{quote(options.issue)}"))


def command_results_store(options: argparse.Namespace) -> int:
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text("utf-8", "replace")
    except OSError as error:
        raise StartError(f"{options.file}: {error.strerror}") from None
    body = read_json_argument(text, options.file)
    return show(options, Client(options).call("POST", "/api/results", body, key=options.idempotency_key))


def command_results_list(options: argparse.Namespace) -> int:
    query = {"issue_id": options.issue, "agent_type": options.type, "status": options.status, "since": options.since, "limit": options.limit}
    answer = Client(options).call("GET", "/api/results", query=query)
    if options.format == "json":
        return show(options, answer)
    names = ("id", "issue_id", "agent_type", "agent_id", "stored_at")
    rows = [{**{name: row[name] for name in names}, "status": row["result"]["status"]} for row in answer["results"]]
    return show(options, {"results": rows}, "results")


def command_results_get(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("GET", f"/api/results/{quote(options.id)}"))


# -- events


def command_events_publish(options: argparse.Namespace) -> int:
    client = Client(options)
    publisher = options.publisher or os.environ.get("AGENT_ID") or "cli"
    body = {"publisher": publisher, "topic": options.topic, "data": read_json_argument(options.data, "--data"), "priority": options.priority}
    body |= {"ttl_seconds": options.ttl} if options.ttl is not None else {}
    body |= {"correlation_id": options.correlation_id} if options.correlation_id else {}
    return show(options, client.call("POST", f"/api/events/{quote(options.type)}", body, key=options.idempotency_key))


def command_events_subscribe(options: argparse.Namespace) -> int:
    """Print events as they come; with --continuous for ever, going on from a cursor, so none comes twice."""
    client, cursor = Client(options), options.since
    while True:
        query = {"timeout": options.timeout, "filter": options.filter, "since": cursor, "limit": 100}
        try:
            answer = client.call("GET", f"/api/events/wait/{quote(options.type)}", query=query, timeout=options.timeout / 1000 + 30)
        except NotReachable as error:
            if not options.continuous or cursor in ("latest", "earliest"):
                raise
            sys.stderr.write(f"cco: {error}; trying again\n")  # a restart of the service must not end a follower
            time.sleep(1)
            continue
        for event in answer["events"]:
            print_event(options, event)
        sys.stdout.flush()
        cursor = answer["scanned_to"]
        if not options.continuous and not answer["more_available"]:
            return GOOD if answer["events"] or not answer.get("timeout") else REFUSED


def print_event(options: argparse.Namespace, event: dict[str, Any]) -> None:
    row = [event[name] for name in ("timestamp", "event_id", "event_type", "publisher", "topic")] + [json.dumps(event["data"], ensure_ascii=False)]
    if options.format == "json":
        print(json.dumps(event, ensure_ascii=False))
    elif options.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerow(row)
    else:
        print("  ".join(map(cell, row)))


def command_events_list(options: argparse.Namespace) -> int:
    query = {"type": options.type, "topic": options.topic, "since": options.since, "limit": options.limit, "dead": "true" if options.dead else None}
    answer = Client(options).call("GET", "/api/events", query=query)
    if options.format != "json":
        names = ("event_id", "timestamp", "event_type", "publisher", "topic")
        rows = [{**{name: event[name] for name in names}, "data": json.dumps(event["data"], ensure_ascii=False)} for event in answer["events"]]
        answer = {"events": rows}
    return show(options, answer, "events")


# -- agents


def command_agent_spawn(options: argparse.Namespace) -> int:
    client = Client(options)
    pairs = [item.partition("=") for item in options.env or []]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise StartError(f"--env: {bad[0]!r} must be NAME=VALUE")
    body = {"agent_type": options.type, "issue_id": options.issue, "task": options.task, "priority": options.priority}
    body |= {"environment": {name: value for name, _, value in pairs}, "context_requirements": options.require or []}
    spawned = client.call("POST", "/api/agents/spawn", body, key=options.idempotency_key)
    if not options.wait:
        return show(options, spawned)
    return follow_agent(client, options, spawned["agent_id"])


def follow_agent(client: Client, options: argparse.Namespace, agent_id: str) -> int:
    """Show an agent's output on stderr until it ends, then its status; the agent's own exit code."""
    offset = 0
    sys.stderr.write(f"{agent_id} started\n")
    while True:
        status = client.call("GET", f"/api/agents/{agent_id}/status")
        logs = client.call("GET", f"/api/agents/{agent_id}/logs", query={"since": offset})
        sys.stderr.write(logs["text"])
        sys.stderr.flush()
        offset = logs["next_offset"]
        if status["ended_at"]:
            break
        time.sleep(0.3)
    sys.stderr.write(f"{agent_id} {status['state']}\n")
    show(options, status)
    code = status["exit_code"]
    return (128 - code if code < 0 else code) if code is not None else GOOD if status["state"] == "completed" else REFUSED


def command_agent_list(options: argparse.Namespace) -> int:
    answer = Client(options).call("GET", "/api/agents", query={"state": options.state, "issue_id": options.issue, "limit": options.limit})
    if options.format != "json":
        names = ("agent_id", "issue_id", "state", "exit_code", "pid", "started_at", "ended_at")
        answer = {"agents": [{name: row[name] for name in names} for row in answer["agents"]]}
    return show(options, answer, "agents")


def command_agent_status(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("GET", f"/api/agents/{quote(options.id)}/status"))


def command_agent_logs(options: argparse.Namespace) -> int:
    """Print an agent's output; with --follow until it ends, also across a restart of the service."""
    client, path = Client(options), f"/api/agents/{quote(options.id)}"
    wanted = {"timestamps": "true" if options.timestamps else None}
    logs = client.call("GET", f"{path}/logs", query=wanted | {"tail": options.tail, "since": options.since})
    if options.format == "json" and not options.follow:
        return show(options, logs)
    ended = None
    while True:
        sys.stdout.write(logs["text"])
        sys.stdout.flush()
        if not options.follow or (ended and not logs["text"]):
            return GOOD
        time.sleep(0 if logs["text"] else 0.3)
        try:
            ended = client.call("GET", f"{path}/status")["ended_at"]  # asked first: what it wrote before its end is then in the log
            following = client.call("GET", f"{path}/logs", query=wanted | {"since": logs["next_offset"]})
        except NotReachable as error:
            sys.stderr.write(f"cco: {error}; trying again\n")
            logs["text"] = ""
            time.sleep(1)
            continue
        if following["offset"] > logs["next_offset"]:
            sys.stderr.write(f"cco: {following['offset'] - logs['next_offset']} bytes were rotated away before they were read\n")
        logs = following


def command_agent_kill(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("DELETE", f"/api/agents/{quote(options.id)}"))


# -- what they share


def quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def read_json_argument(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StartError(f"{what} is not JSON: {error}") from None


# -- the table

ISSUE_ARGUMENT = arg("issue", metavar="ISSUE", help="issue id")


KEY_ARGUMENT = arg("--idempotency-key", metavar="KEY", help="a repeat with the same key does nothing twice")


LIMIT_ARGUMENT = arg("--limit", type=int, metavar="N", help="how many at most")

COMMANDS = {
    "health": Command("ask whether the service works", command_health),
    "status": Command("show what happened so far", command_status),
    "context": Command("contexts of agents"),
    "context get": Command("show a context, its files with the reason for each", command_context_get, [
        ISSUE_ARGUMENT, arg("type", metavar="TYPE", help="agent type"), arg("--task", help="what is to be done"),
        arg("--max-bytes", type=int, metavar="N"), arg("--max-tokens", type=int, metavar="N", help="at 4 bytes each"),
        arg("--max-files", type=int, metavar="N"), arg("--since", metavar="ETAG", help="only files that changed since that answer"),
        arg("--explain", action="store_true", help="the ranking, with scores, reasons and how much of each file is given")]),
    "context clear": Command("forget cached contexts", command_context_clear, [
        arg("issue", nargs="?", metavar="ISSUE"), arg("--all", action="store_true", help="of all issues")]),
    "results": Command("results of agents"),
    "results store": Command("store a result from a JSON file, or - for standard input", command_results_store, [
        arg("file", nargs="?", default="-", metavar="FILE"), KEY_ARGUMENT]),
    "results list": Command("list results, newest last", command_results_list, [
        arg("--issue"), arg("--type"), arg("--status"), arg("--since", metavar="ID"), LIMIT_ARGUMENT]),
    "results get": Command("show one result", command_results_get, [arg("id", metavar="ID")]),
    "events": Command("events between agents"),
    "events publish": Command("publish an event", command_events_publish, [
        arg("type", metavar="TYPE"), arg("--topic", default="general"), arg("--data", default="{}", metavar="JSON"),
        arg("--publisher", help="who says it (default: $AGENT_ID, else cli)"), arg("--correlation-id"),
        arg("--ttl", type=float, metavar="SECONDS"),
        arg("--priority", default="normal", choices=("low", "normal", "high", "critical")), KEY_ARGUMENT]),
    "events subscribe": Command("wait for events; exit code 1 when none came in time", command_events_subscribe, [
        arg("type", metavar="TYPE", help="event type, * for any"), arg("--filter", help="for example issue_id:issue-123"),
        arg("--since", default="latest", metavar="CURSOR", help="an event id, earliest, or latest (the default)"),
        arg("--timeout", type=int, default=30_000, metavar="MS"),
        arg("--continuous", action="store_true", help="go on for ever, never repeating")]),
    "events list": Command("list retained events, newest last", command_events_list, [
        arg("--type"), arg("--topic"), arg("--since", metavar="CURSOR"), LIMIT_ARGUMENT,
        arg("--dead", action="store_true", help="the dead letters instead")]),
    "agent spawn": Command("start an agent", command_agent_spawn, [
        arg("--type", required=True, help="agent type"), arg("--issue", required=True, help="issue id"),
        arg("--task", default="", help="what it is to do"), arg("--env", action="append", metavar="NAME=VALUE"),
        arg("--require", action="append", metavar="SECTION", help="only these sections of the context"),
        arg("--priority", default="normal", choices=("low", "normal", "medium", "high", "critical")),
        arg("--wait", action="store_true", help="show its output, end with its exit code"), KEY_ARGUMENT]),
    "agent list": Command("list agents, newest last", command_agent_list, [arg("--state"), arg("--issue"), LIMIT_ARGUMENT]),
    "agent status": Command("show one agent", command_agent_status, [arg("id", metavar="ID")]),
    "agent logs": Command("show what an agent wrote", command_agent_logs, [
        arg("id", metavar="ID"), arg("--tail", type=int, metavar="LINES"), arg("--since", metavar="OFFSET|TIME"),
        arg("--timestamps", action="store_true", help="each line after its time"), arg("-f", "--follow", action="store_true")]),
    "agent kill": Command("end an agent and everything that it started", command_agent_kill, [arg("id", metavar="ID")]),
}  # fmt: skip
