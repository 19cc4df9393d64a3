"""``python -m tests.benchmarks.compare CHECKOUT ...``: the processor time of a request in several checkouts.

The rates of a machine that does other work swing by a quarter, while this differs by some 2 % between two runs: enough
to see what a change is worth. The services run side by side and are asked in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import Row, row, table
from tests.benchmarks.servers import FAST, Program, Server, running_bare, running_sidecar, servers
from tests.benchmarks.throughput import GOALS, Exchange, exchanges
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import repeated, run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=__doc__)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT", help="a folder with cco_sidecar.py")
    parser.add_argument("--only", action="append", choices=[*GOALS], metavar="MEASURE", help="may be repeated")
    parser.add_argument("--no-fast", action="store_true", help="Tornado's server instead of the fast one")
    parser.add_argument("--rounds", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="N", help="of a round (default: 1)")
    options = parser.parse_args(arguments)
    print(table(rows(options)))
    return 0


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Microseconds of a request in each checkout, beside those in the first one."""
    words = "" if options.no_fast else FAST
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cco-benchmarks-")))
        root, bare = make_tree(place / "repository", 200), stack.enter_context(running_bare(words))
        services = []
        for number, checkout in enumerate(options.checkouts):
            (folder := place / str(number)).mkdir()
            program = Program((sys.executable, str(checkout.resolve() / "cco_sidecar.py")))
            service = running_sidecar(folder, *servers()[words], root=root, program=program, probed=False)
            services.append(stack.enter_context(service))
        asked = [exchanges(service, bare) for service in services]
        for name in options.only or GOALS:
            rounds = []
            for _ in range(options.rounds + 1):
                pairs = zip(services, asked, strict=True)
                rounds.append([cost(service, each[name], options.seconds) for service, each in pairs])
            first, *others = zip(*rounds[1:], strict=True)  # the first round warms up
            yield row(f"{name}{words}: {options.checkouts[0]}", first, unit="µs")
            for checkout, costs in zip(options.checkouts[1:], others, strict=True):
                yield row(f"{name}{words}: {checkout}", costs, first, unit="µs", limit_is=str(options.checkouts[0]))


def cost(service: Server, exchange: Exchange, seconds: float) -> float:
    """Microseconds of all threads' processor time for each answer at 32 connections."""
    before, began = service.processor_seconds(), time.perf_counter()
    rate = run(repeated(service.port, exchange.request, exchange.status, seconds))
    return (service.processor_seconds() - before) * 1e6 / (rate * (time.perf_counter() - began))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
