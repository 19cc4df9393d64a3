"""The fuzzers for as long as you like, and what the service held before and afterwards.

    python -m tests.fuzz --minutes 10
    python -m tests.fuzz --minutes 5 --only http --seed 7

Half of the time goes to raw HTTP, half to the OpenAPI document. The suite runs a short form of both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import Service, make_repository
from fuzz_api import fuzz_api
from fuzz_http import HttpFuzzer, for_minutes, start_service

# MB that memory may grow by after the warm-up: caches that fill to their bounds, allocators that do not give back
GROWTH = 32


def raw_http(service: Service, minutes: float, seed: int) -> None:
    print(HttpFuzzer(service, seed).run(for_minutes(minutes)))


def document(service: Service, minutes: float, seed: int) -> None:
    said = fuzz_api(
        service, "--max-time", str(max(1, int(60 * minutes))), "--seed", str(seed), seconds=60 * minutes + 300
    )
    print("\n".join(said.splitlines()[-12:]))


FUZZERS: dict[str, Callable[[Service, float, int], None]] = {"http": raw_http, "api": document}


def run(minutes: float, seed: int, only: str | None) -> None:
    """Raises AssertionError where a promise was broken or memory grew."""
    chosen = [only] if only else list(FUZZERS)
    with tempfile.TemporaryDirectory() as folder:
        service = start_service(Path(folder), make_repository(Path(folder) / "repository"))
        try:
            for name in chosen:
                fuzz = FUZZERS[name]
                fuzz(service, minutes / len(chosen) / 5, seed)  # the warm-up
                before = resident(service)
                fuzz(service, minutes / len(chosen) * 4 / 5, seed + 1)
                print(
                    f"{name}: memory {before:.1f} MB after a fifth of the time, {resident(service):.1f} MB at the end",
                    flush=True,
                )
                assert resident(service) < before + GROWTH
            HttpFuzzer(service, seed).settle()
        finally:
            print(f"exit code {service.stop()}")
        assert "Traceback" not in service.log


def resident(service: Service) -> float:
    return float(psutil.Process(service.info["pid"]).memory_info().rss) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FUZZERS)
    options = parser.parse_args()
    run(options.minutes, options.seed, options.only)


if __name__ == "__main__":
    main()
