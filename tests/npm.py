"""Programs and libraries from npm for the tests that need them, installed once in a cache folder of the tests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import needed

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cco-sidecar-tests"
UNREACHABLE = (
    "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH",
    "ERR_SOCKET_TIMEOUT", "ENOTCACHED",
)  # fmt: skip


def install(*packages: str, scripts: bool = False, seconds: float = 600) -> Path:
    """The folder with the commands of ``packages``, ``node_modules/.bin``; each has its version, as in ``ajv@8.20.0``.

    What is there already is taken. ``scripts`` lets packages run their own code at the installation. Skips the test
    when npm is missing or its registry cannot be reached.
    """
    assert all("@" in package[1:] for package in packages), "versions are to be exact"
    npm = needed("npm")
    kind = [*sorted(packages), sys.platform, platform.machine(), version_of(needed("node")), str(scripts)]
    place = CACHE / f"npm-{hashlib.sha256(' '.join(kind).encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with Path(f"{place}.lock").open("w") as lock:  # other test processes may want the same right now
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            with tempfile.TemporaryDirectory(prefix="npm-", dir=CACHE) as temporary:
                fill(npm, Path(temporary, "new"), packages, scripts, seconds)
                Path(temporary, "new").rename(place)
    return place / "node_modules" / ".bin"


def fill(npm: str, folder: Path, packages: tuple[str, ...], scripts: bool, seconds: float) -> None:
    folder.mkdir()
    (folder / "package.json").write_text("{}")
    options = ["--no-audit", "--no-fund", "--no-update-notifier", "--save-exact", "--fetch-retries=1"]
    options += [] if scripts else ["--ignore-scripts"]
    done = subprocess.run(
        [npm, "install", *options, *packages], cwd=folder, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-3_000:]
        if any(word in said for word in UNREACHABLE):
            pytest.skip(f"npm's registry is not reachable: {said.strip().splitlines()[0]}")
        pytest.fail(f"npm install {' '.join(packages)}: {said}")


def version_of(path: str) -> str:
    return subprocess.run([path, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout.strip()
