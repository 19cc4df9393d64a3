"""An issue's story as one file, which a reader needs no service for: JSON, or Markdown in which nothing is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from cco_sidecar import MB, Pool, Records, clean_text, harmless, redact, redaction
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.agents._story_timeline import Timeline
from cco_sidecar_plugins.commands._pipeline_plan import PART, told_once, whole_task
from cco_sidecar_plugins.results.result_list import ResultQuery
from cco_sidecar_plugins.storage._pages import page

ENTRIES, BYTES = 20_000, 24 * MB  # of a timeline at most; results have as many bytes, and one at least
LONG = MB  # bytes of a result, above which only JSON holds it as it was stored
EXPORTS = Pool("exports", 1, 120)  # one at a time: each takes many times the memory of what it tells


def read_briefs(folders: dict[str, Path]) -> dict[str, str]:
    """By agent the brief that it got, where that is still there, without the storage's place. Blocks."""
    found = {agent: content_of(folder / "brief.md").decode("utf-8", "replace") for agent, folder in folders.items()}
    storages = {agent: str(folder.parents[1]) for agent, folder in folders.items()}
    return {agent: text.replace(storages[agent], "STORAGE") for agent, text in found.items() if text}


def whole_story(read: Records, project: str, story: dict[str, Any], *facts: Any) -> bytes:
    """The file's content. ``story`` has the issue, its agents, approvals and briefs; ``facts`` are those of a Timeline,
    and the format. Blocks.
    """
    *made_with, wanted = facts
    entries, more = whole_timeline(Timeline(read, *made_with))
    left_out = [f"the timeline after its first {len(entries)} entries"] if more else []
    results, more = whole_results(read, project, story["issue_id"])
    left_out += [f"the results after the first {len(results)}"] if more else []
    del story["task"], story["results"]  # the newest ones: all are told below
    story = redaction().redact_json(msgspec.json.decode(msgspec.json.encode(story | {"left_out": left_out})))[0]
    # Each by itself, as the interpreter does nothing else while a long text is decoded or looked through.
    happened, stored = ([redaction().redact_json(item)[0] for item in items] for items in (entries, results))
    if wanted == "json":
        return b"".join(json_pieces(story, timeline=happened, results=stored))
    stored = [msgspec.json.decode(msgspec.json.encode(row)) for row in stored]
    shown = told_once(stored)
    over = {row["id"] for row in stored} - {row["id"] for row in shown}
    entries = msgspec.json.decode(msgspec.json.encode(happened))
    story |= {"timeline": [entry for entry in entries if entry["id"] not in over], "results": shown}
    return ("\n".join(markdown_lines(story)) + "\n").encode("utf-8", "replace")


def json_pieces(story: dict[str, Any], **lists: list[Any]) -> Iterator[bytes]:
    """The story as indented JSON with these lists at its end."""
    yield msgspec.json.format(msgspec.json.encode(story), indent=2).removesuffix(b"\n}")
    for name, items in lists.items():
        yield b',\n  "%b": [' % name.encode()
        for number, item in enumerate(items):
            text = msgspec.json.format(msgspec.json.encode(item), indent=2)
            yield (b",\n    " if number else b"\n    ") + text.replace(b"\n", b"\n    ")
        yield b"\n  ]" if items else b"]"
    yield b"\n}\n"


def whole_timeline(timeline: Timeline) -> tuple[list[dict[str, Any]], bool]:
    """Every entry, each once, and whether there are more than fit."""
    since, more, size, seen = "earliest", True, 0, dict[str, Any]()
    while more and len(seen) < ENTRIES and size < BYTES:
        part = timeline.page(since, 1000)
        for entry in part["entries"]:
            seen.setdefault(f"{entry['kind']} {entry['id']}", entry)
            size += len(msgspec.json.encode(entry))
        since, more = part["next_cursor"], part["has_more"]
    return list(seen.values()), more


def whole_results(read: Records, project: str, issue_id: str) -> tuple[list[Raw], bool]:
    """Every result, and whether there are more than fit."""
    query, more, size, found = ResultQuery(issue_id=issue_id, since="earliest", limit=100), True, 0, list[Raw]()
    while more and size < BYTES:
        rows, more = page(read, "result", "select id, body from result", project, query, {"issue": issue_id})
        found += [Raw(row["body"]) for row in rows]
        size += sum(len(row["body"]) for row in rows)
        query.since = rows[-1]["id"] if rows else query.since
    return found, more


# -- Markdown: what others wrote stands in code, which has no markup


def visible(text: str) -> str:
    """Text in which no sign turns the direction of what follows, or hides: such a sign is given by its number."""
    return UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


UNSEEN = late_pattern("[\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")


def code(text: Any) -> str:
    """One line as a span of code, whatever it holds."""
    words = visible(harmless("" if text is None else str(text))).strip() or "-"
    fence = "`" * (longest_run(words) + 1)
    blank = " " if words[0] == "`" or words[-1] == "`" else ""
    return f"{fence}{blank}{words}{blank}{fence}"


def block(text: str) -> list[str]:
    """Lines in a block of code, whose fence is longer than any in them."""
    fence = "`" * max(3, longest_run(text) + 1)
    lines = visible(clean_text(text)).replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return [fence, *(line if line.isprintable() else harmless(line) for line in lines), fence]


def longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def quoted(value: Any) -> list[str]:
    """A JSON value in a block of code."""
    return block(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def markdown_lines(story: dict[str, Any]) -> Iterator[str]:
    yield from (f"# Issue {code(story['issue_id'])}", "", code(story["title"] or "without a title"), "")
    yield f"Project {code(story['project_id'])}, state **{story['state']}**, {story['first_at']} to {story['last_at']}."
    yield f"Exported {story['exported_at']} by the orchestration sidecar {story['version']}."
    if story["cost_usd"] is not None or story["tokens"] is not None:
        yield f"Spent: {story['cost_usd'] or 0} US dollars, {story['tokens'] or 0} tokens."
    yield from (f"Left out: {words}." for words in story["left_out"])
    yield from ("", "## Task", "", *block(story["body"] or "(none is known)"))
    if number := sum(1 for agent in story["agents"] if other_task(agent, story)):
        yield from ("", f"Agents that got another task: {number}. It is told with each of them.")
    yield from ("", "## Timeline", "", "| time (UTC) | what | who | |", "|---|---|---|---|")
    for entry in story["timeline"]:
        who = entry["agent_id"] or entry.get("publisher")
        yield f"| {entry['at']} | {entry['kind']} | {cell(who)} | {cell(told(entry))} |"
    yield from ("", "## Results")
    for result in story["results"]:
        content = msgspec.json.encode(result)
        yield from result_lines(msgspec.json.decode(content), len(content))
    yield from ("", "## Agents")
    for agent in story["agents"]:
        yield from agent_lines(agent, other_task(agent, story), story["briefs"].get(agent["agent_id"]))
    yield from ("", "## What people were asked")
    for row in story["approvals"]:
        asked = f"{row['asked_at']}, {code(row['agent_id'])}, {row['state']}"
        yield from ("", f"{asked}: {code(answered(row))}", "")
        yield from block("\n".join(part for part in (row["command"], row["text"]) if part))
    yield from ("", "## Events, proposals and ends in full")
    for entry in story["timeline"]:
        if entry["kind"] in ("event", "routing", "ended"):
            yield from ("", f"{entry['at']} {entry['kind']} {code(entry['id'])}", "", *quoted(entry))


def told(entry: dict[str, Any]) -> str:
    """What a row of the table says: the title, and what a reader asks next."""
    data = entry["data"] if isinstance(entry.get("data"), dict) else {}
    task, _, part = (entry.get("task") or "").partition(PART)
    more = {
        "spawned": part or task,  # an issue's agents may have had different ones
        "result": entry.get("reason") or next(iter(entry.get("decisions") or []), None),
        "ended": entry.get("reason") or (f"exit code {entry['exit_code']}" if entry.get("exit_code") else None),
        "event": data.get("message") or ": ".join(str(data[name]) for name in ("state", "reason") if data.get(name)),
        "approval": answered(entry),
    }.get(entry["kind"])
    line = " ".join(str(more or "").split())
    return f"{entry['title']}: {line[:160]}{'…' if line[160:] else ''}" if line else str(entry["title"])


def answered(asked: dict[str, Any]) -> str:
    """What became of a question, by whom and when, as far as that is known."""
    whose = [f"by {asked['answered_by']}"] if asked.get("answered_by") else []
    when = [f"at {asked['answered_at']}"] if asked.get("answered_at") else []
    return " ".join([str(asked.get("answer") or asked.get("state") or ""), *whose, *when])


def cell(text: Any) -> str:
    """One line as code in a table, whose columns a bar would end; some readers take two backslashes before it for one
    that is no escape.
    """
    return re.sub(r"\\(?=\\*\|)", r"\\ ", code(text)).replace("|", "\\|")


def other_task(agent: dict[str, Any], story: dict[str, Any]) -> str:
    """What an agent was to do; "" where that is the issue's task, whole or with more beside it."""
    task, body = (whole_task(str(text or "")).strip() for text in (agent["task"], story["body"]))
    return "" if f"\n{task}\n" in f"\n{body}\n" or (body and body in task) else task


def agent_lines(agent: dict[str, Any], task: str, brief: str | None) -> Iterator[str]:
    yield from ("", f"### {code(agent['agent_id'])}", "")
    how = agent["state"] if agent["exit_code"] is None else f"{agent['state']}, exit code {agent['exit_code']}"
    yield f"{code(agent['agent_type'])}, {how}, {agent['started_at']} to {agent['ended_at'] or 'now'}."
    if task:
        yield from ("", "Task:", "", *block(task))
    used = {name: agent[name] for name in ("model", "requests", "input_tokens", "output_tokens", "cost_usd")}
    if any(value is not None for value in used.values()):
        yield from ("", "Used:", "", *quoted(used))
    if agent["reason"]:
        yield from ("", "Why it could not work:", "", *block(agent["reason"]))
    if agent["output_tail"]:
        yield from ("", "Last lines:", "", *block("\n".join(agent["output_tail"])))
    yield from ("", "Brief:", "", *block(redact(brief)[0])) if brief else ("", "Its brief is not kept here.")


def result_lines(result: dict[str, Any], size: int) -> Iterator[str]:
    body = result["result"]
    yield from ("", f"### {code(result['id'])}", "")
    yield f"{code(result['agent_id'])} ({code(result['agent_type'])}), {body['status']}, {result['stored_at']}."
    for decision in body.get("decisions") or []:
        yield f"- {code(decision)}"
    if size > LONG:
        yield from ("", f"As it was stored it has {size:,} bytes: the export as JSON holds it.")
    else:
        yield from ("", "As it was stored:", "", *quoted(result))
