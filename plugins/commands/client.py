"""The commands that talk to a running service: health, status, issues, context, results, events and agent.

Each is a row of COMMANDS and a function that makes one call or follows something with several. ``Client`` finds the
service and speaks for the user, ``show`` prints the answer as --format wants it, lists and contexts are printed by the
file ``_client_view.py``, and ``whole_id`` finds what a short id means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import threading
import time
import typing
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from cco_sidecar import (
    GOOD,
    NAME_IN_WORDS,
    REFUSED,
    AgentTypes,
    StartError,
    hookimpl,
    is_identifier,
    load_hooks,
    read_path,
    settings_from,
)
from cco_sidecar_plugins._program import escape_unencodable
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents.specialists import nearest_type
from cco_sidecar_plugins.agents.type_list import type_list
from cco_sidecar_plugins.commands._client import Client, NotReachable, Refused, running_types
from cco_sidecar_plugins.commands._client_view import (
    explain,
    print_event,
    random_part,
    short_id,
    show_context,
    show_list,
)
from cco_sidecar_plugins.commands._printing import cell, reader_poll, show, tell
from cco_sidecar_plugins.commands._table import (
    CLIENT_OPTIONS,
    Command,
    add_commands,
    arg,
    number,
    standard_input,
    text_or_input,
    time_ago,
)
from cco_sidecar_plugins.commands.approve import newly_asked


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, COMMANDS)


def command_health(options: argparse.Namespace) -> int:
    health = Client(options).health()
    show(options, health)
    return GOOD if health["status"] == "healthy" else REFUSED


def command_status(options: argparse.Namespace) -> int:
    return show(options, Client(options).call("GET", "/status"))


def command_issues(options: argparse.Namespace) -> int:
    query = {"state": options.state, "since": options.since, "limit": options.limit}
    return show_list(options, Client(options).call("GET", "/api/issues", query=query), "issues")


# -- contexts


def command_context_get(options: argparse.Namespace) -> int:
    query = {name: getattr(options, name) for name in ("task", "max_bytes", "max_tokens", "max_files", "since")}
    context = context_of(options, query)
    if options.output and options.format == "table":
        options.format = "json"
    with output_to(options.output):
        return explain(options, context) if options.explain else show_context(options, context)


def command_brief(options: argparse.Namespace) -> int:
    brief = context_of(options, {"task": options.task}, accept="text/markdown")
    if not isinstance(brief, str):
        raise StartError("the service makes no briefs: its plugin context/brief is not in use", REFUSED)
    print(brief, end="")
    return GOOD


def context_of(options: argparse.Namespace, query: dict[str, Any], accept: str = "application/json") -> Any:
    """The context of ISSUE and TYPE; where those were typed the other way round it is said."""
    path = f"/api/context/{quote(options.issue)}/{quote(options.type)}"
    try:
        return Client(options).call("GET", path, query=query, accept=accept)
    except Refused as refusal:
        told = running_types(options) if refusal.answer.get("code") == "AGT_002" else None
        if told and options.issue in [row["agent_type"] for row in told["agent_types"]]:
            raise Refused(refusal.status, refusal.content, "the issue comes first, then the type") from None
        raise


def command_context_refresh(options: argparse.Namespace) -> int:
    """Have contexts looked at now, and built anew where they are not as the project is; with --force in any case."""
    client, rows = Client(options), []
    for issue, agent_type in contexts_in_use(client, options.issue, options.agent_type):
        if options.force:
            clear_cache(client, issue, agent_type, missing_ok=True)
        context = client.call("GET", f"/api/context/{quote(issue)}/{quote(agent_type)}")
        facts = {"context": "current" if context["cache_hit"] else "built anew", "files": context["file_count"]}
        rows.append({"issue_id": issue, "agent_type": agent_type, **facts, "bytes": context["total_size_bytes"]})
    if not rows and (options.issue or options.agent_type):
        check_type(options, options.agent_type)
        raise StartError("no agent has worked there yet; name both --issue and --agent-type", REFUSED)
    return show(options, {"contexts": rows}, "contexts")


def contexts_in_use(client: Client, issue: str | None, agent_type: str | None) -> list[tuple[str, str]]:
    """The issue and agent type that are named; where one is not, each that agents or results are of."""
    if issue and agent_type:
        return [(issue, agent_type)]
    query = {"issue_id": issue, "agent_type": agent_type}
    found = (row for kind in ("agents", "results") for row in every(client, kind, **query))
    return list(dict.fromkeys((row["issue_id"], row["agent_type"]) for row in found))


def command_context_clear(options: argparse.Namespace) -> int:
    if options.issue and options.named_issue not in (None, options.issue):
        raise StartError(f"context clear: {options.issue} and --issue {options.named_issue} are two issues")
    issue = options.issue or options.named_issue
    if bool(issue or options.agent_type) is options.all:
        raise StartError("context clear takes an issue, --agent-type or both, or --all")
    check_type(options, options.agent_type)
    return show(options, clear_cache(Client(options), issue, options.agent_type))


def clear_cache(client: Client, issue: str | None, agent_type: str | None, *, missing_ok: bool = False) -> Any:
    path = f"/api/cache/context/{quote(issue)}" if issue else "/api/cache/all"
    try:
        return client.call("DELETE", path, query={"agent_type": agent_type})
    except Refused as error:
        if error.status != 404 or not missing_ok:
            raise


# -- results


def command_results_store(options: argparse.Namespace) -> int:
    flags = ("agent", "agent_type", "issue", "status", "files_created", "files_modified", "decisions", "metrics")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name) is not None]
    sources = [source for source in (options.file, options.input) if source is not None]
    if len(sources) > 1 or (given and sources):
        raise StartError(
            "results store takes one of FILE, --input and options of the result,"
            f" not {sources[-1]} beside {(given + sources)[0]}"
        )
    body = result_of_flags(options) if given else read_json_file(sources[0] if sources else "-")
    client = Client(options)
    project = project_of(client, options)
    body = body | {"project_id": project} if given else body
    with telling_of_a_cut(client, "results list"):
        stored = client.call("POST", "/api/results", body, key=options.idempotency_key)
    return show(options, stored)


def result_of_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The body that the options of ``results store`` say; an agent's own environment says who it is."""
    who = {name: getattr(options, name) or os.environ.get(variable) for name, variable in RESULT_VARIABLES.items()}
    missing = [f"--{name.replace('_', '-')}" for name, value in (who | {"status": options.status}).items() if not value]
    if missing:
        raise StartError(f"results store: {', '.join(missing)} must be given too, or a FILE")
    result: dict[str, Any] = {"status": options.status}
    for name, separator in (("files_created", ","), ("files_modified", ","), ("decisions", ";")):
        if (text := getattr(options, name)) is not None:
            result[name] = [item.strip() for item in text.split(separator) if item.strip()]
    if options.metrics is not None:
        result["metrics"] = read_json_argument(options.metrics, "--metrics")
    return {
        "agent_id": who["agent"],
        "agent_type": who["agent_type"],
        "issue_id": who["issue"],
        "result": result,
    }


RESULT_VARIABLES = {"agent": "AGENT_ID", "agent_type": "AGENT_TYPE", "issue": "ISSUE_ID"}


def command_results_list(options: argparse.Namespace) -> int:
    client = Client(options)
    project_of(client, options)
    query = {
        "issue_id": options.issue,
        "agent_type": options.agent_type,
        "status": options.status,
        "since": options.since,
        "limit": options.limit,
    }
    answer = client.call("GET", "/api/results", query=query)
    if not answer["results"]:
        check_type(options, options.agent_type)
    return show_list(options, answer, "results")


def command_results_get(options: argparse.Namespace) -> int:
    client = Client(options)
    if options.type is None:
        try:
            result_id = whole_id(client, "results", options.id)
        except Refused as error:
            query = {"issue_id": options.id, "limit": 1}
            if error.status == 404 and client.call("GET", "/api/results", query=query)["results"]:
                shown = client.command(f"results list --issue {options.id}")
                raise StartError(
                    f"{options.id} is an issue: name a TYPE after it; `{shown}` lists its results"
                ) from None
            raise
        return show_result(options, client, client.call("GET", f"/api/results/{quote(result_id)}"))
    query = {"issue_id": options.id, "agent_type": options.type, "limit": 1}
    found = client.call("GET", "/api/results", query=query)["results"]
    if not found:
        check_type(options, options.type)
        others = client.call("GET", "/api/results", query={"issue_id": options.id, "limit": 1000})["results"]
        names = ", ".join(dict.fromkeys(row["agent_type"] for row in others))
        there_are = f"; there are results of {names}" if names else ""
        raise StartError(f"{options.type} has stored no result on {options.id}{there_are}", REFUSED)
    return show_result(options, client, found[0])


def show_result(options: argparse.Namespace, client: Client, result: dict[str, Any]) -> int:
    """A result as it is stored; a table also has whom routing proposed, as long as its event is retained."""
    if options.format == "table":
        query = {"timeout": 0, "since": "earliest", "filter": f"result_id:{result['id']}"}
        for event in client.call("GET", "/api/events/wait/agent_completed", query=query)["events"]:
            proposed = [f"{each['agent_type']} ({each['priority']})" for each in event["data"]["next_agents"]]
            result |= {"next": ", ".join(proposed) or "nobody"}
    return show(options, result)


# -- events


def command_events_publish(options: argparse.Namespace) -> int:
    event = event_of_file(options) if options.input is not None else event_of_flags(options)
    if options.type and options.named_type not in (None, options.type):
        raise StartError(f"events publish: {options.type} and --type {options.named_type} are two types")
    event_type = options.type or options.named_type or event.get("event_type")
    if not event_type:
        raise StartError("events publish: the event's type must be given, as TYPE, --type or event_type in the file")
    body = {"publisher": options.publisher or os.environ.get("AGENT_ID") or "cli", "topic": "general"} | event
    client = Client(options)
    with telling_of_a_cut(client, f"events list --type {event_type}"):
        published = client.call("POST", f"/api/events/{quote(str(event_type))}", body, key=options.idempotency_key)
    return show(options, published)


def event_of_file(options: argparse.Namespace) -> dict[str, Any]:
    for name in ("topic", "data", "publisher", "correlation_id", "ttl", "priority"):
        if getattr(options, name) is not None:
            raise StartError(f"events publish takes --input or --{name.replace('_', '-')}, not both")
    event = read_json_file(options.input)
    if not isinstance(event, dict):
        raise StartError(f"{options.input} must hold a JSON object")
    return event


def event_of_flags(options: argparse.Namespace) -> dict[str, Any]:
    fields = {
        "topic": options.topic,
        "priority": options.priority,
        "ttl_seconds": options.ttl,
        "correlation_id": options.correlation_id,
    }
    return {"data": read_json_argument(options.data or "{}", "--data")} | {
        name: value for name, value in fields.items() if value is not None
    }


def command_events_subscribe(options: argparse.Namespace) -> int:
    """Print events as they come; with --continuous for ever, with --limit so many; none comes twice. A service that
    stops answers before the time is up: what is left of it is waited for at the next one.
    """
    client, cursor, left = Client(options), options.since, options.limit or math.inf
    end_with_reader()
    path, patience, timeout = f"/api/events/wait/{quote(options.type)}", 0.0, 0
    deadline = time.monotonic() + (math.inf if options.continuous else options.timeout / 1000)
    while True:  # the first answer comes at once: with its cursor nothing is missed while the service is away
        query = {"timeout": timeout, "filter": options.filter, "since": cursor, "limit": int(min(left, 100))}
        answer = call_again(client, path, patience, query, timeout / 1000 + 30)
        for event in answer["events"]:
            print_event(options, event)
        sys.stdout.flush()
        cursor, left = answer["scanned_to"], left - len(answer["events"])
        patience = max(0.0, deadline - time.monotonic())
        timeout = math.ceil(min(options.timeout or 1000, 1000 * patience))  # 0 with --continuous would not wait at all
        if left <= 0 or (answer["events"] and not options.continuous and not answer["more_available"]):
            return GOOD
        if patience == 0 and not answer["events"]:
            retained = "; --since earliest shows what is retained" if options.since == "latest" else ""
            unit = ", as --timeout counts milliseconds" if 0 < options.timeout < 1000 else ""
            tell(f"cco: no event came within {options.timeout} ms{unit}{retained}\n")
            return REFUSED


def command_events_list(options: argparse.Namespace) -> int:
    terms = options.issue and f"issue_id:{options.issue}", options.filter
    query = {
        "type": options.type,
        "topic": options.topic,
        "filter": ",".join(filter(None, terms)),
        "since": options.since,
        "limit": options.limit,
        "dead": "true" if options.dead else None,
    }
    return show_list(options, Client(options).call("GET", "/api/events", query=query), "events")


# -- agents


def command_agent_spawn(options: argparse.Namespace) -> int:
    pairs = [item.partition("=") for item in options.env or []]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise StartError(f"--env: {bad[0]!r} must be NAME=VALUE")
    client = Client(options)
    project_of(client, options)
    if options.wait:
        check_logs(client)
    body = {"agent_type": options.type, "issue_id": options.issue, "task": options.task, "priority": options.priority}
    body |= {"environment": {name: value for name, _, value in pairs}, "context_requirements": options.require or []}
    with telling_of_a_cut(client, f"agent list --issue {options.issue}"):
        spawned = client.call("POST", "/api/agents/spawn", body, key=options.idempotency_key)
    if not options.wait:
        shown = {} if options.format in ("json", "yaml", "csv") else {"jwt_token": "(shown by --format json)"}
        return show(options, spawned | shown)
    return follow_agent(client, options, spawned["agent_id"])


def check_logs(client: Client) -> None:
    """Raises Refused where agents' output cannot be read: one that is started could not be waited for."""
    try:
        client.call("GET", "/api/agents/none/logs")
    except Refused as refusal:
        if refusal.unserved or refusal.status != 404:
            raise


def follow_agent(client: Client, options: argparse.Namespace, agent_id: str) -> int:
    """Show an agent's output on stderr until it ends, then its status; the agent's own exit code. Where that is cut
    short it is said that the agent goes on.
    """
    shown, ended = (client.command(f"agent {word} {short_id(agent_id)}") for word in ("logs -f", "kill"))
    try:
        status = shown_to_its_end(client, agent_id)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of a pipe
            tell(f"\ncco: {agent_id} goes on: `{shown}` shows it again, `{ended}` ends it\n")
        raise
    except NotReachable as error:
        later = f"{agent_id} goes on, unless it is stopped by --stop-agents: later `{shown}` shows it again"
        raise NotReachable(f"{error}; {later}") from None
    show(options, {name: value for name, value in status.items() if name != "output_tail" or options.format != "table"})
    code = GOOD if status["state"] == "completed" else status["exit_code"] or REFUSED
    return 128 - code if code < 0 else code


def shown_to_its_end(client: Client, agent_id: str) -> dict[str, Any]:
    """Show an agent's output on stderr until it ends; its status."""
    offset, text = 0, f"{agent_id} started\n"
    questions = Questions(client, PATIENCE)
    tell(text)
    while True:
        status = call_again(client, f"/api/agents/{agent_id}/status", PATIENCE)
        logs = call_again(client, f"/api/agents/{agent_id}/logs", PATIENCE, {"since": offset})
        tell(logs["text"])
        text = questions.tell(status, logs["text"] or text)
        offset, text = logs["next_offset"], logs["text"] or text
        if status["ended_at"] and not logs["text"]:  # an answer holds a megabyte at most
            break
        time.sleep(0 if logs["text"] else 0.3)
    because = f": {status['reason']}" if status.get("reason") else ""
    tell(f"{'' if text.endswith(chr(10)) else chr(10)}{agent_id} {status['state']}{because}\n")
    return status


def end_with_reader() -> None:
    """Have this command end once nobody reads its output any more, as ``tail -f`` does. Else the next write shows it,
    for which there may be nothing for hours.
    """

    def end(until_it_goes: Callable[[], object]) -> None:
        until_it_goes()
        os._exit(GOOD)  # as where a write shows it

    if poll := reader_poll():
        threading.Thread(target=end, args=[poll], daemon=True).start()


PATIENCE = 10.0  # seconds


class Questions:
    """What an agent asks people, told on stderr once each: it waits for the answers."""

    PAUSE = 1.0  # seconds between two looks

    def __init__(self, client: Client, patience: float) -> None:
        self._client, self._patience, self._told, self._next = client, patience, set[str](), 0.0

    def tell(self, agent: dict[str, Any], shown: str) -> str:
        """Tell what is new, after output that ends as ``shown`` does; how it ends now."""
        if agent["ended_at"] or time.monotonic() < self._next:
            return shown
        self._next = time.monotonic() + self.PAUSE
        for words in newly_asked(self._client, agent, self._told, self._read):
            tell(f"{'' if shown.endswith(chr(10)) else chr(10)}cco: {cell(words)}\n")
            shown = "\n"
        return shown

    def _read(self, path: str, query: dict[str, Any]) -> Any:
        return call_again(self._client, path, self._patience, query)


def call_again(
    client: Client,
    path: str,
    patience: float,
    query: dict[str, Any] | None = None,
    timeout: float = 60,
) -> Any:
    """The answer to a GET, which is repeated while the service is not reachable: it may be starting again. That is said
    once. Raises NotReachable after ``patience`` seconds.
    """
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            return client.call("GET", path, query=query, timeout=timeout)
        except NotReachable as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                how_long = "" if patience == math.inf else f" for {patience:.3g} s"
                tell(f"cco: {error}; trying again{how_long}\n")
            told = True
            time.sleep(0.2)


def command_agent_list(options: argparse.Namespace) -> int:
    query = {"state": options.state, "status": options.status, "agent_type": options.type, "issue_id": options.issue}
    query |= {"since": options.since, "limit": options.limit}
    answer = Client(options).call("GET", "/api/agents", query=query)
    if not answer["agents"]:
        check_type(options, options.type)
    return show_list(options, answer, "agents")


def command_agent_status(options: argparse.Namespace) -> int:
    client = Client(options)
    return show(options, client.call("GET", f"/api/agents/{quote(whole_id(client, 'agents', options.id))}/status"))


def command_agent_logs(options: argparse.Namespace) -> int:
    """Print an agent's output; with --follow until it ends, also across a restart of the service, as JSON each part on
    a line of its own.
    """
    client = Client(options)
    path = f"/api/agents/{quote(whole_id(client, 'agents', options.id))}"
    wanted = {"timestamps": "true" if options.timestamps else None}
    logs = client.call("GET", f"{path}/logs", query=wanted | {"tail": options.tail, "since": options.since})
    if options.format == "json" and not options.follow:
        return show(options, logs)
    end_with_reader()
    ended, text, questions = None, "\n", Questions(client, math.inf)
    while True:
        if options.format != "json":
            sys.stdout.write(logs["text"])
        elif logs["text"]:
            sys.stdout.write(json.dumps(logs) + "\n")
        sys.stdout.flush()
        text = logs["text"] or text
        if not options.follow or (ended and not logs["text"]):
            return GOOD
        time.sleep(0 if logs["text"] else 0.3)
        status = call_again(client, f"{path}/status", math.inf)
        text = questions.tell(status, text)
        ended = status["ended_at"]  # asked first: what it wrote before its end is then in the log
        following = call_again(client, f"{path}/logs", math.inf, wanted | {"since": logs["next_offset"]})
        if following["offset"] > logs["next_offset"]:
            tell(f"cco: {following['offset'] - logs['next_offset']} bytes were rotated away before they were read\n")
        logs = following


def command_agent_kill(options: argparse.Namespace) -> int:
    """Order the end of an agent, or of all that run; with --timeout wait for it, and print what became of each."""
    if sum((options.id is not None, options.issue is not None, options.all)) != 1:
        raise StartError("agent kill takes one of ID, --issue and --all")
    client = Client(options)
    if options.id is not None:
        ordered = order_ends(client, options, [whole_id(client, "agents", options.id)])
    else:
        ordered = dict[str, Any]()
        for _ in range(LOOKS):  # who is ended may have started others meanwhile
            running = every(client, "agents", status="active", issue_id=options.issue)
            if not (new := [row["agent_id"] for row in running if row["agent_id"] not in ordered]):
                break
            ordered |= order_ends(client, options, new)
    told = list(ordered.values())
    if options.timeout is not None:
        deadline = time.monotonic() + options.timeout
        told = [ended_by(client, agent_id, deadline, options.timeout) for agent_id in ordered]
    if options.id is not None:
        return show(options, told[0])
    answer = {"agents": told, "has_more": False}
    return show(options, answer, "agents") if options.timeout is None else show_list(options, answer, "agents")


LOOKS = 10  # for agents that run: beside a `cco run`, which starts the next one, there are always new ones


def order_ends(client: Client, options: argparse.Namespace, agents: list[str]) -> dict[str, Any]:
    """The answer to each order, the oldest agent first. Raises StartError for the first refusal, behind all others."""
    told, refusals = dict[str, Any](), list[StartError]()
    for agent_id in agents:
        try:
            query = {"force": "true" if options.force else None}
            told[agent_id] = client.call("DELETE", f"/api/agents/{quote(agent_id)}", query=query)
        except StartError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return told


def ended_by(client: Client, agent_id: str, deadline: float, seconds: float) -> dict[str, Any]:
    """An agent's status after its end. Raises StartError where it goes on until the deadline, ``seconds`` after its
    order.
    """
    while not (status := client.call("GET", f"/api/agents/{quote(agent_id)}/status"))["ended_at"]:
        if time.monotonic() > deadline:
            raise StartError(
                f"{agent_id} is still {status['state']} after {seconds:g} s; --force leaves it no grace", REFUSED
            )
        time.sleep(0.05)
    return dict(status)


def command_agent_types(options: argparse.Namespace) -> int:
    """Those of the running service; where none runs, or options say others, those that the next start would have."""
    if (told := running_types(options)) is None:
        settings = typing.cast(PluginSettings, settings_from(options))
        told = msgspec.to_builtins(type_list(AgentTypes(load_hooks(settings), settings).categories, settings))
    rows = [{**row, "permissions": " ".join(row["permissions"])} for row in told["agent_types"]]
    return show(options, {"agent_types": rows}, "agent_types")


# -- what they share


def check_type(options: argparse.Namespace, agent_type: str | None) -> None:
    """Raises StartError where the running service knows no agent type of this name. What a former type left behind is
    found all the same, so commands call this where nothing is found.
    """
    told = running_types(options) if agent_type else None
    names = [row["agent_type"] for row in told["agent_types"]] if told else []
    if agent_type and names and agent_type not in names:
        raise StartError(f"Unknown agent type {agent_type}{nearest_type(agent_type, names)}", REFUSED)


@contextlib.contextmanager
def telling_of_a_cut(client: Client, words: str) -> Iterator[None]:
    """While a request is made that changes something: where Ctrl-C cuts it, say what shows what became of it."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of a pipe
            tell(f"\ncco: it may have been done all the same: `{client.command(words)}` shows it\n")
        raise


def whole_id(client: Client, kind: str, text: str) -> str:
    """The id of an agent or result that ``text`` names: itself, else the only one that begins or ends with it.

    What follows the type in an agent's id, and the time in a result's, counts as a beginning too. A type names its
    agent that runs, where none does its newest. Raises Refused (404) where nothing is named so, StartError where
    several are.
    """
    try:
        client.call("GET", f"/api/{kind}/{quote(text)}" + ("/status" if kind == "agents" else ""))
        return text
    except Refused as error:
        if error.status != 404:
            raise
        field = "agent_id" if kind == "agents" else "id"
        rows = [row for row in every(client, kind, id=text) if is_part(text, row[field])]
        own = [row for row in rows if kind == "agents" and row["agent_type"] == text]
        chosen = [row for row in own if not row["ended_at"]] or own[-1:] or rows
        found = [row[field] for row in chosen]
        if not found:
            known = client.command(f"{'agent' if kind == 'agents' else kind} list")
            raise Refused(error.status, error.content, f"`{known}` lists them") from None
    if len(found) > 1 or len(text) < SHORTEST_ID:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        least = f", {SHORTEST_ID} characters at least" if len(text) < SHORTEST_ID else ""
        raise StartError(f"{text!r} may be {', '.join(found[-3:])}{more}: type more of it{least}")
    return found[0]


def is_part(text: str, name: str) -> bool:
    return name.startswith(text) or name.endswith(text) or random_part(name).startswith(text)


SHORTEST_ID = 4  # characters, as git has it
PAGE = 1000


def every(client: Client, kind: str, **query: Any) -> Iterator[dict[str, Any]]:
    """All rows of a list that the query asks for, page by page from the earliest on."""
    cursor, more = "earliest", True
    while more:
        page = client.call("GET", f"/api/{kind}", query=query | {"since": cursor, "limit": PAGE})
        yield from page[kind]
        cursor, more = page["next_cursor"], page["has_more"]


def project_of(client: Client, options: argparse.Namespace) -> str:
    """The project of the service. Raises StartError where --project says another one."""
    wanted = getattr(options, "project", None)
    project = client.project or (client.call("GET", "/health")["project_id"] if wanted else "")
    if wanted and wanted != project:
        raise StartError(f"--project: {client.url} serves {project}, not {wanted}", REFUSED)
    return project or str(client.call("GET", "/health")["project_id"])


@contextlib.contextmanager
def output_to(path: str | None) -> Iterator[None]:
    """Have what is printed written into the file at ``path``, where one is given and it is not ``-``."""
    if path in (None, "-"):
        yield
        return
    try:
        with (
            open(read_path(path), "w", encoding="utf-8", errors=escape_unencodable.__name__) as file,
            contextlib.redirect_stdout(file),
        ):
            yield
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None


def quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def read_json_file(path: str) -> Any:
    """The JSON in a file, or on standard input for ``-``."""
    try:
        content = standard_input() if path == "-" else read_path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise StartError(f"{path}: {getattr(error, 'strerror', error)}") from None
    return read_json_argument(content, "standard input" if path == "-" else path)


def read_json_argument(text: str | bytes, what: str) -> Any:
    """The JSON in ``text``, whose bytes may be UTF-8, UTF-16 or UTF-32, whatever the locale is."""
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise StartError(f"{what} is not JSON: {error}") from None


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number there")
    return value


def part_of_id(text: str) -> str:
    if not is_identifier(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id, which {NAME_IN_WORDS}")
    return text


# -- the table

ISSUE_OPTION = arg("--issue", metavar="ID", help="of this issue")
FILTER_ARGUMENT = arg("--filter", metavar="F", help="for example status:failed,issue_id:issue-123")
TYPE_OPTION = arg("--agent-type", metavar="TYPE", help="of this agent type")
KEY_ARGUMENT = arg("--idempotency-key", metavar="KEY", help="a repeat with the same key does nothing twice")
TASK_ARGUMENT = arg("--task", type=text_or_input, help="what is to be done, - for standard input")
LIMIT_ARGUMENT = arg("--limit", type=number(1, 1000), metavar="N", help="how many at most, 1 to 1000 (default: 100)")
SINCE_OPTION = arg("--since", type=time_ago, metavar="TIME|ID", help="after this one, since a time, or 1h ago")
AGENT_ARGUMENT = arg("id", type=part_of_id, metavar="ID", help="agent id, enough of its beginning or end, or its type")
PRIORITIES = ("low", "normal", "high", "critical")
STATUSES = ("success", "failed", "partial")
ISSUE_STATES = ("open", "working", "waiting", "failed", "done", "idle")

COMMANDS = {
    "health": Command("ask whether the service works", command_health, section="Look"),
    "status": Command("show what happened so far", command_status, section="Look"),
    "issues": Command("list the issues and how each stands, newest last", command_issues, [
        arg("--state", choices=ISSUE_STATES, help="which stand so"), SINCE_OPTION, LIMIT_ARGUMENT],
        section="Look"),
    "context": Command("contexts of agents", section="Agents and what they exchange"),
    "context get": Command("show a context, its files with the reason for each", command_context_get, [
        arg("issue", metavar="ISSUE", help="issue id"), arg("type", metavar="TYPE", help="agent type"),
        TASK_ARGUMENT,
        arg("-o", "--output", metavar="PATH", help="write it there, as JSON unless --format says otherwise"),
        arg("--max-bytes", type=number(0), metavar="N", help="how large it may be (default: 10 MB)"),
        arg("--max-tokens", type=number(0), metavar="N", help="at 4 bytes each"),
        arg("--max-files", type=number(0), metavar="N", help="how many files may be in it (default: 50)"),
        arg("--since", metavar="ETAG", help="only files that changed since that answer"),
        arg("--explain", action="store_true", help="the ranking: scores, reasons, how much of each file is given")],
        formats=("table", "json", "yaml", "text", "csv")),
    "context refresh": Command("bring contexts up to date", command_context_refresh, [
        arg("--issue", metavar="ID", help="of this issue (default: all that agents worked on)"),
        arg("--agent-type", metavar="TYPE", help="of this agent type (default: all that worked there)"),
        arg("--force", action="store_true", help="build them anew in any case")]),
    "brief": Command("show a context as 10 kB of Markdown, with what you may do", command_brief, [
        arg("issue", metavar="ISSUE", help="issue id"), arg("type", metavar="TYPE", help="agent type"),
        TASK_ARGUMENT],
        formats=("text",), section="Agents and what they exchange"),
    "context clear": Command("forget cached contexts", command_context_clear, [
        arg("issue", nargs="?", metavar="ISSUE", help="of this issue"),
        arg("--issue", dest="named_issue", metavar="ID", help="the same"), TYPE_OPTION,
        arg("--all", action="store_true", help="of all issues and agent types")]),
    "results": Command("results of agents", section="Agents and what they exchange"),
    "results store": Command("store a result, from a JSON file or by options", command_results_store, [
        arg("file", nargs="?", metavar="FILE", help="JSON file, - for standard input (the default)"),
        arg("--input", metavar="FILE", help="the same"),
        arg("--agent", metavar="ID", help="who did it (default: $AGENT_ID)"),
        arg("--agent-type", metavar="TYPE", help="(default: $AGENT_TYPE)"),
        arg("--issue", metavar="ID", help="(default: $ISSUE_ID)"),
        arg("--status", choices=STATUSES, help="how it ended"),
        arg("--files-created", metavar="A,B", help="new files"),
        arg("--files-modified", metavar="A,B", help="changed files"),
        arg("--decisions", type=text_or_input, metavar="'A; B'", help="what was decided, - for standard input"),
        arg("--metrics", type=text_or_input, metavar="JSON", help="any numbers, - for standard input"), KEY_ARGUMENT]),
    "results list": Command("list the newest results, newest last", command_results_list, [
        ISSUE_OPTION, arg("--agent-type", "--type", metavar="TYPE", help="of this agent type"),
        arg("--status", choices=STATUSES, help="which ended so"), SINCE_OPTION, LIMIT_ARGUMENT]),
    "results get": Command("show one result, or the latest of an agent type on an issue", command_results_get, [
        arg("id", type=part_of_id, metavar="ID|ISSUE",
            help="result id, or enough of its beginning or end; the issue before TYPE"),
        arg("type", nargs="?", metavar="TYPE", help="agent type")]),
    "events": Command("events between agents", section="Agents and what they exchange"),
    "events publish": Command("publish an event", command_events_publish, [
        arg("type", nargs="?", metavar="TYPE", help="event type"),
        arg("--type", dest="named_type", metavar="TYPE", help="the same"),
        arg("--topic", help="(default: general)"),
        arg("--data", type=text_or_input, metavar="JSON", help="(default: {}), - for standard input"),
        arg("--publisher", help="who says it (default: $AGENT_ID, else cli)"),
        arg("--correlation-id", metavar="ID", help="of events that belong together"),
        arg("--ttl", type=number(0, kind=float), metavar="SECONDS", help="how long it is kept"),
        arg("--priority", choices=PRIORITIES, help="(default: normal)"),
        arg("--input", metavar="FILE", help="the whole event from a JSON file, - for standard input"),
        KEY_ARGUMENT]),
    "events subscribe": Command("wait for events; exit code 1 when none came in time", command_events_subscribe, [
        arg("type", metavar="TYPE", help="event type, * for any"),
        FILTER_ARGUMENT,
        arg("--since", type=time_ago, default="latest", metavar="TIME|CURSOR",
            help="an event id, a time, 1h for an hour ago, earliest, or latest (the default)"),
        arg("--timeout", type=number(0), default=30_000, metavar="MS",
            help="how long to wait, in milliseconds (default: 30000)"),
        arg("--limit", type=number(1, 1_000_000_000), metavar="N", help="end after so many"),
        arg("--continuous", action="store_true", help="go on for ever, never repeating")],
        formats=("table", "json", "csv", "text")),
    "events list": Command("list the newest retained events, newest last", command_events_list, [
        arg("--type", help="of this event type"), arg("--topic", help="of this topic"), ISSUE_OPTION, FILTER_ARGUMENT,
        arg("--since", type=time_ago, metavar="TIME|CURSOR",
            help="since a time such as 2026-01-31T12:00:00Z, or 1h ago, or after an event"),
        LIMIT_ARGUMENT,
        arg("--dead", action="store_true", help="the dead letters instead")]),
    "agent": Command("agents as processes", section="Agents and what they exchange"),
    "agent types": Command("list the agent types", command_agent_types, options=(*CLIENT_OPTIONS, "agent_types")),
    "agent spawn": Command("start an agent", command_agent_spawn, [
        arg("--type", required=True, help="agent type, one of those that cco agent types lists"),
        arg("--issue", required=True, help="issue id, any name"),
        arg("--task", default="", type=text_or_input, help="what it is to do, - for standard input"),
        arg("--env", action="append", metavar="NAME=VALUE", help="a variable of its environment"),
        arg("--require", action="append", metavar="SECTION", help="only these sections of the context"),
        arg("--priority", default="normal", choices=("low", "normal", "medium", "high", "critical"),
            help="(default: normal)"),
        arg("--wait", action="store_true", help="show its output, end with its exit code"), KEY_ARGUMENT]),
    "agent list": Command("list the newest agents, newest last", command_agent_list, [
        arg("--status", choices=("active", "completed", "failed"), help="failed holds timeout and lost too"),
        arg("--state", help="one state exactly"), arg("--type", help="of this agent type"), ISSUE_OPTION,
        SINCE_OPTION, LIMIT_ARGUMENT]),
    "agent status": Command("show one agent", command_agent_status, [AGENT_ARGUMENT]),
    "agent logs": Command("show what an agent wrote", command_agent_logs, [
        AGENT_ARGUMENT, arg("--tail", type=number(0), metavar="LINES", help="only so many at the end"),
        arg("--since", type=time_ago, metavar="OFFSET|TIME",
            help="only what it wrote after so many bytes, or since a time, such as 5m ago"),
        arg("--timestamps", action="store_true", help="each line after its time"),
        arg("-f", "--follow", action="store_true", help="until it ends")],
        formats=("text", "table", "json")),
    "agent kill": Command("end an agent and everything that it started", command_agent_kill, [
        arg("id", nargs="?", type=part_of_id, metavar="ID",
            help="agent id, enough of its beginning or end, or its type"),
        arg("--issue", metavar="ID", help="all that run on this issue"),
        arg("--all", action="store_true", help="all that run"),
        arg("--force", action="store_true", help="at once, without grace"),
        arg("--timeout", type=number(0, 1_000_000, float), metavar="SECONDS", help="wait so long for its end")]),
}  # fmt: skip
