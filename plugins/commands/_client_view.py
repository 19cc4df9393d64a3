"""What the client commands print: contexts, and lists of results, events and agents."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from typing import Any

from cco_sidecar import GOOD, language_of
from cco_sidecar_plugins._words import counted
from cco_sidecar_plugins.commands._pipeline_plan import told_once
from cco_sidecar_plugins.commands._printing import cell, duration, print_fitted, show, tell, yaml_lines
from cco_sidecar_plugins.context._withheld import is_secret

# -- contexts


def show_context(options: argparse.Namespace, context: dict[str, Any]) -> int:
    if options.format in ("yaml", "text"):
        sys.stdout.write("".join(yaml_lines(context)) if options.format == "yaml" else context_text(context))
        return GOOD
    if options.format == "json":
        return show(options, context)
    files = [
        {
            **{name: file.get(name) for name in ("path", "size", "language", "score")},
            "why": ", ".join(file.get("reasons", [])),
        }
        for file in context["context"]["relevant_files"]
    ]
    return show_files(options, files)


def explain(options: argparse.Namespace, context: dict[str, Any]) -> int:
    """The ranking: in which order, why, and how much of each file was given; the sums follow on stderr."""
    rows = [
        {
            "rank": rank,
            "score": file.get("score"),
            "path": file["path"],
            "given": given_of(file),
            "why": "; ".join(file.get("reasons", [])),
        }
        for rank, file in enumerate(context["context"]["relevant_files"], 1)
    ]
    if options.format in ("yaml", "text"):
        options.format = "json" if options.format == "yaml" else "table"  # JSON is YAML
    show_files(options, rows)
    metadata = context["context"]["metadata"]
    matched = "; no word of the task occurs" if metadata["task_matched"] is False else ""
    failed = metadata.get("plugins_failed", [])
    absent = f"; without what plugins could not give: {', '.join(failed)}" if failed else ""
    tell(f"{sums_of(context)}; index {metadata['index']}{matched}{absent}\n")
    return GOOD


def show_files(options: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    if rows or options.format != "table":
        return show(options, {"files": rows}, "files")
    print("(none: no file has changed since that answer)" if options.since else "(none: no file here could be given)")
    return GOOD


def context_text(context: dict[str, Any]) -> str:
    """A context for reading: the sums, git's state, what was decided, then each file with its content."""
    git, outputs = context["context"]["git_context"], context["context"]["previous_agent_outputs"]
    lines = [f"{context['issue_id']} for {context['agent_type']}: {sums_of(context)}"]
    lines += (
        [f"git: branch {git['branch']}, {counted(len(git['uncommitted_changes']), 'uncommitted change')}"]
        if git["branch"]
        else []
    )
    lines += [f"commit {commit['hash'][:10]}: {first_line(commit['message'])}" for commit in git["recent_commits"][:5]]
    lines += [
        f"{output['agent_type']} ({output['status']}): {output['decision'] or 'no decision told'}" for output in outputs
    ]
    for file in context["context"]["relevant_files"]:
        lines += [
            "",
            f"==== {file['path']} ({'; '.join([given_of(file), *file.get('reasons', [])])})",
            file["content"].rstrip("\n"),
        ]
    text = "\n".join(lines)
    return "".join(character if character.isprintable() or character in "\n\t" else " " for character in text) + "\n"


def sums_of(context: dict[str, Any]) -> str:
    """How much of the project a context holds."""
    files, structure = context["context"]["relevant_files"], context["context"]["project_structure"]
    sizes = f"{context['total_size_bytes']:,} bytes, about {context['estimated_tokens']:,} tokens"
    how = f"cut ({context['truncation_strategy']})" if context["truncated"] else "nothing cut"
    missing = "" if context.get("unchanged_files") else missing_of(context)
    return f"{len(files)} of {structure['total_files']} files, {sizes}, {how}{missing}"


def missing_of(context: dict[str, Any]) -> str:
    """How many files of the project a context does not hold, and why."""
    given, structure = context["context"]["relevant_files"], context["context"]["project_structure"]
    paths = set(structure["files"]) - {file["path"] for file in given}
    secret = {path for path in paths if is_secret(path)}
    unknown = {path for path in paths - secret if language_of(path) == "unknown"}
    others = structure["total_files"] - len(given) - len(secret) - len(unknown)
    chosen = f"not chosen for {context['agent_type']}{' or cut' if context['truncated'] else ''}"
    counts = {"may hold credentials": len(secret), "in no known language": len(unknown), chosen: others}
    told = [f"{number} {why}" for why, number in counts.items() if number > 0]
    return f"; left out: {', '.join(told)}" if told else ", nothing left out"


def given_of(file: dict[str, Any]) -> str:
    """How much of a file a context holds."""
    if not file.get("truncated"):
        return "whole"
    ranges = [f"{first}-{last}" for first, last in file.get("line_ranges", [])]
    return f"lines {', '.join(ranges)}" if ranges else "beginning"


# -- lists: everything of a row for programs, a line of it for people


def show_list(options: argparse.Namespace, answer: dict[str, Any], name: str) -> int:
    """Print the list ``name``: JSON and CSV hold everything, a table what fits; beside it stderr says when there are
    more.
    """
    record, line = LISTS[name]
    if options.format == "json":
        return show(options, answer)
    if options.format == "csv":
        return show(options, {name: [record(row) for row in answer[name]]}, name)
    lines = [line(row) for row in (told_once(answer[name]) if name == "results" else answer[name])]
    columns = list(lines[0]) if lines else []
    print_fitted(columns, [list(row.values()) for row in lines], whole=columns[:1], spare=SPARE)
    if answer["has_more"]:
        sys.stdout.flush()
        older = "older ones exist: --limit N shows more, --since earliest begins with the oldest"
        later = f"there are more: --since {answer['next_cursor']} goes on from here"
        tell(f"cco: {later if options.since else f'these are the newest {len(lines)}, {older}'}\n")
    return GOOD


def result_record(row: dict[str, Any]) -> dict[str, Any]:
    files = {
        name: "; ".join(map(path_of, row["result"].get(name) or []))
        for name in ("files_created", "files_modified", "files_deleted")
    }
    names = ("id", "issue_id", "agent_type", "agent_id", "stored_at")
    facts = {"status": row["result"]["status"], "decision": decision_of(row)}
    return {name: row[name] for name in names} | facts | files


def result_line(row: dict[str, Any]) -> dict[str, str]:
    names = {name: row[name] for name in ("issue_id", "agent_type")}
    facts = {"status": row["result"]["status"], "stored_at": row["stored_at"]}
    return {"id": short_id(row["id"]), **names, **facts, "decision": first_line(decision_of(row))}


def decision_of(row: dict[str, Any]) -> str:
    return "; ".join(map(str, row["result"].get("decisions") or []))


def path_of(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["path"])


def event_record(event: dict[str, Any]) -> dict[str, Any]:
    return event_line(event) | {name: event[name] for name in ("correlation_id", "priority", "ttl_seconds")}


def event_line(event: dict[str, Any]) -> dict[str, str]:
    names = ("event_id", "timestamp", "event_type", "publisher", "topic")
    return {name: event[name] for name in names} | {"data": json.dumps(event["data"], ensure_ascii=False)}


def print_event(options: argparse.Namespace, event: dict[str, Any]) -> None:
    row = [event[name] for name in ("timestamp", "event_id", "event_type", "publisher", "topic")]
    row.append(json.dumps(event["data"], ensure_ascii=False))
    if options.format == "json":
        print(json.dumps(event, ensure_ascii=False))
    elif options.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerow(row)
    else:
        print("  ".join(map(cell, row)))


def agent_record(row: dict[str, Any]) -> dict[str, Any]:
    names = "agent_id issue_id state exit_code pid started_at ended_at agent_type signal result_id result_status"
    return {name: row.get(name) for name in (*names.split(), "parent", "depth", "task", "run_seconds")}


def agent_line(row: dict[str, Any]) -> dict[str, str]:
    code = f" {row['exit_code']}" if row["exit_code"] else ""
    names = {name: row[name] for name in ("agent_type", "issue_id")}
    facts = {"state": row["state"] + code, "result": row.get("result_status") or "-", "started_at": row["started_at"]}
    facts["time"] = duration(row.get("run_seconds", 0)) if row["pid"] else "-"
    return {"id": short_id(row["agent_id"]), **names, **facts, "task": first_line(row.get("task") or "")}


def issue_record(row: dict[str, Any]) -> dict[str, Any]:
    names = "issue_id state title source results waiting_for_people cost_usd tokens first_at last_at"
    working = "; ".join(agent["agent_id"] for agent in row["working"])
    return {name: row[name] for name in names.split()} | {"working": working, "agents": sum(row["agents"].values())}


def issue_line(row: dict[str, Any]) -> dict[str, str]:
    working = ", ".join(agent["agent_type"] for agent in row["working"])
    facts = {
        "state": row["state"],
        "working": working or "-",
        "results": str(row["results"]),
        "last_at": row["last_at"],
    }
    return {"issue_id": row["issue_id"], **facts, "title": first_line(row["title"] or "")}


def short_id(text: str) -> str:
    """What is enough to type of an id: the beginning of its random part."""
    return random_part(text)[:8]


def random_part(text: str) -> str:
    return text.rpartition("-")[2]


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


SPARE = ("timestamp", "stored_at", "started_at", "last_at", "time", "issue_id", "result")  # left out in this order

Row = dict[str, Any]
LISTS: dict[str, tuple[Callable[[Row], Row], Callable[[Row], dict[str, str]]]] = {  # list: its rows in CSV, in a table
    "results": (result_record, result_line),
    "events": (event_record, event_line),
    "agents": (agent_record, agent_line),
    "issues": (issue_record, issue_line),
}
