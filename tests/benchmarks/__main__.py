"""``python -m tests.benchmarks``: every benchmark, one table of ratios with the goal beside each, and JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import HEADS, Row, table
from tests.benchmarks.pictures import FOLDER, draw
from tests.benchmarks.servers import ROOT

# Module -> what it measures, in the order in which they run.
MODULES = {
    "throughput": "requests a second",
    "events": "what a waiter costs, and how soon it hears",
    "context": "contexts, on trees of any size",
    "agents": "a team of agents of all types, as clients and as processes",
    "idle": "what it costs while nobody asks, and the start",
    "history": "a long history beside a short one",
    "rivals": "the same work by NATS JetStream and Redis",
    "cluster": "sidecars that share a log on NATS JetStream",
    "soak": "an hour's traffic in ten minutes",
}
ONLY_WHEN_ASKED = ("soak",)
README = ROOT / "README.md"
IN_FULL = ROOT / "tests/benchmarks/README.md"


def main(arguments: list[str]) -> int:
    parser = new_parser()
    options = parser.parse_args(arguments)
    if options.readme and options.only:
        parser.error("--readme goes with all rows: its counts are of those that miss their goals")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what was begun is ended and removed
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    found: list[Row] = [row for file in options.taken_from for row in json.loads(file.read_text())["rows"]]
    try:
        for row in () if found else measured(options):
            found.append(row)
    except KeyboardInterrupt:
        return 130
    finally:
        print(table(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report(found), indent=1) + "\n")
    for file in draw(found, options.pictures) if options.pictures else []:
        print(f"drew {file}", file=sys.stderr)
    if options.readme:
        README.write_text(in_readme(README.read_text(), found))
        IN_FULL.write_text(in_full(IN_FULL.read_text(), found))
    return 0


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """The rows of the modules that are asked for; all that they make lies in one temporary folder."""
    names = options.only or [name for name in MODULES if name not in ONLY_WHEN_ASKED or getattr(options, name)]
    with tempfile.TemporaryDirectory(prefix="cco-benchmarks-", ignore_cleanup_errors=True) as folder:
        before, tempfile.tempdir = tempfile.gettempdir(), folder
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder, "bytecode"))
        try:
            for name in names:
                began = time.monotonic()
                for row in importlib.import_module(f"tests.benchmarks.{name}").rows(options.quick):
                    yield row | {"group": name}
                print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        finally:
            tempfile.tempdir = before


def in_readme(text: str, rows: list[Row]) -> str:
    """The README with the rows that users decide by, in the table of its chapter Performance."""
    return with_table(text, [row for row in rows if row["name"] in DECIDING], rows)


def in_full(text: str, rows: list[Row]) -> str:
    """The README of the benchmarks with all rows that have a goal, and the rivals', and below those of a shared log."""
    before, chapter, after = text.partition("\n## Many machines\n")
    judged = [row for row in rows if row["goal"] or row.get("group") == "rivals"]
    shared = [row for row in rows if row.get("group") == "cluster"]
    return with_table(before, judged, rows) + chapter + with_table(after, shared)


def with_table(text: str, rows: list[Row], judged: list[Row] | None = None) -> str:
    """``text`` with these rows in its first table of rows, and in words how many goals of ``judged`` are missed. As it
    is where there are no rows.
    """
    if not rows:
        return text
    text = re.sub(TABLE, lambda _: table(rows) + "\n", text, count=1)
    goals = [row["met"] for row in judged or [] if row["goal"]]
    return re.sub(MISSED, f"{goals.count(False)} of {len(goals)} goals are missed", text) if goals else text


TABLE = rf"\| {HEADS[0]} +\| +{HEADS[1]} .*\n(?:\|.*\n)+"
MISSED = r"\d+ of \d+ goals are missed"
DECIDING = (  # met or missed
    "GET /health, fast server",
    "GET a cached context of 100 kB, fast server",
    "POST a result, fast server",
    "POST an event, fast server",
    "memory a parked waiter, of 5,000, fast server",
    "publish to a waiter's answer, p50, fast server",
    "2,000 woken waiters answered, fast server",
    "a publish beside 5,000 who wait for other things, fast server",
    "100 files: a new context",
    "7,000 files: a new context",
    "7,000 files: a new context after an edit",
    "7,000 files: a cached context",
    "7,000 files: most memory of the service",
    "50,000 files: a new context after an edit",
    "50,000 files: a cached context",
    "123 agents of all types at once: requests that succeed",
    "123 agents of all types at once: context, p99",
    "123 agents of all types at once: event, p99",
    "119 spawned agents that succeed",
    "start to the first answer, installed",
    "idle, installed: resident memory",
    "idle for 60 s: one core's share",
    "start on a log of 1,000,000 events",
    "durable publishes, fast server, beside NATS",
    "a durable publish to its receiver, fast server, beside NATS",
)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, in under a minute")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=[*MODULES],
        help=f"one of {', '.join(MODULES)}; may be repeated",
    )
    parser.add_argument("--soak", action="store_true", help="an hour's traffic in ten minutes too")
    parser.add_argument("--pictures", type=Path, nargs="?", const=FOLDER, metavar="DIR",
                        help="draw how cost grows with waiters and with files (default: the README's pictures)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--from", type=Path, action="append", default=[], metavar="FILE", dest="taken_from",
                        help="take the rows of such a file instead of measuring; may be repeated")  # fmt: skip
    parser.add_argument("--readme", action="store_true", help="put the rows into both READMEs")
    return parser


def report(rows: list[Row]) -> dict[str, Any]:
    """What the JSON holds: the machine, when, and the rows."""
    machine = {"processors": psutil.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    with contextlib.suppress(ImportError):
        import uvloop

        machine["uvloop"] = uvloop.__version__
    return {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "rows": rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
