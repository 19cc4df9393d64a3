"""``python -m tests.benchmarks``: every benchmark, one table of ratios with the goal beside each, and JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import Row, table
from tests.benchmarks.pictures import FOLDER, draw

# Module -> what it measures, in the order in which they run.
MODULES = {
    "throughput": "requests a second",
    "events": "what a waiter costs, and how soon it hears",
    "context": "contexts, on trees of any size",
    "agents": "a team of agents of all types, as clients and as processes",
    "idle": "what it costs while nobody asks, and the start",
    "history": "a long history beside a short one",
    "soak": "an hour's traffic in ten minutes",
}
ONLY_WHEN_ASKED = ("soak",)


def main(arguments: list[str]) -> int:
    options = new_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what was begun is ended and removed
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    usual = [name for name in MODULES if name not in ONLY_WHEN_ASKED]
    found: list[Row] = []
    code = 0
    try:
        for name in [*(options.only or usual), *["soak"] * options.soak]:
            print(f"{name}: {MODULES[name]}", file=sys.stderr, flush=True)
            found += [measured | {"group": name} for measured in measure(name, options)]
    except KeyboardInterrupt:
        print("interrupted; what was measured until then:", file=sys.stderr)
        code = 130
    finally:
        print(table(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report(found), indent=1) + "\n")
    if options.pictures and not code:
        for file in draw(found, options.pictures):
            print(f"drew {file}", file=sys.stderr)
    return code


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
    return parser


def measure(name: str, options: argparse.Namespace) -> Iterator[Row]:
    yield from importlib.import_module(f"tests.benchmarks.{name}").rows(options.quick)


def report(rows: list[Row]) -> dict[str, Any]:
    """What the JSON holds: the machine, when, and the rows."""
    machine = {"processors": psutil.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    with contextlib.suppress(ImportError):
        import uvloop

        machine["uvloop"] = uvloop.__version__
    return {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "rows": rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
