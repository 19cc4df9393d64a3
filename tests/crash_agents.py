"""Kill the service again and again while it spawns agents: every process there is belongs to an agent that the ledger
says is running.

    python -m tests.crash_agents --kills 100

Two spawners never stop (agents that sleep, that have families, and that leave daemons which shed everything); SIGKILL
at random moments of a spawn; while the service is dead some agents are killed and one row of the ledger is given a
stranger's process number. After each restart the ledger, the processes, the tokens and the strangers are checked. The
suite runs a short form of this.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import requests

sys.path.insert(0, str(Path(__file__).parent))

from agent_harness import COMMAND, NAP, alive, daemons_left, keepers
from conftest import Client, Service, end_stragglers, make_repository, marked_processes, until

TASKS = ("hang", "hang", "family", "escape_and_hang", "vanish_and_hang", "succeed", "vanish")
KEPT = 10  # agents that are left running from round to round


class CrashAgents:
    """A service that is killed, its spawners, and what they know."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        options = ("--max-agents", "1000", "--max-agents-per-issue", "1000000", "--token-ttl", "600")
        self.service = Service(
            make_repository(folder / "repository"), folder / "storage", *COMMAND, *options, env={"NAP": NAP}
        )
        self.random = random.Random(seed)
        self.spawning, self.over = threading.Event(), False
        self.asked = 0
        self.confirmed: set[str] = set()
        self.ordered: set[str] = set()  # whose end was ordered, which a crash does not undo
        self.counts: collections.Counter[str] = collections.Counter()
        self.strangers = [subprocess.Popen(["/bin/sleep", "3600"], env={}, start_new_session=True) for _ in range(2)]

    def run(self, kills: int) -> dict[str, Any]:
        """Kill ``kills`` times; what was counted. Raises AssertionError."""
        self.service.start()
        threads = [threading.Thread(target=self._spawn, args=(number,), daemon=True) for number in range(2)]
        self.spawning.set()
        for thread in threads:
            thread.start()
        try:
            for _ in range(kills):
                self._crash_once()
            self._finish(threads)
        finally:
            self._end_spawners(threads)
            if self.service.process and self.service.process.poll() is None:
                self.service.stop()
            end_stragglers()
            for daemon in daemons_left():
                daemon.kill()
            for stranger in self.strangers:
                stranger.kill()
                stranger.wait()
        return {"kills": kills, "asked": self.asked, "confirmed": len(self.confirmed)} | dict(
            sorted(self.counts.items())
        )

    def _spawn(self, number: int) -> None:
        """One spawn after another, for as long as the service takes any."""
        chooser = random.Random(number)
        while not self.over:
            self.spawning.wait()
            body = {"agent_type": "python-specialist", "issue_id": f"issue-{number}", "task": chooser.choice(TASKS)}
            self.asked += 1
            try:
                answer = self.service.client(sub=f"spawner-{number}").post("/api/agents/spawn", body)
                assert answer.status_code == 201, answer.text
                self.confirmed.add(answer.json()["agent_id"])
            except requests.RequestException:
                time.sleep(0.02)

    def _crash_once(self) -> None:
        before = len(self.confirmed)
        until(lambda: len(self.confirmed) > before + 2, 60)
        time.sleep(self.random.uniform(0, 0.1))  # the random moment is the point here
        self.service.kill()
        rows = self._rows()
        self.counts["rows cut off before their process was known"] += sum(
            row["state"] == "starting" for row in rows.values()
        )
        killed, forged = self._harm({agent_id: row for agent_id, row in rows.items() if row["state"] == "running"})
        self.spawning.clear()
        self.service.start()
        self._check(rows, killed, forged)
        self.spawning.set()

    def _rows(self) -> dict[str, dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.service.storage / "sidecar.db")) as database:
            database.row_factory = sqlite3.Row
            return {
                row["id"]: dict(row)
                for row in database.execute("select * from agent where state in ('starting', 'running')")
            }

    def _harm(self, running: dict[str, dict[str, Any]]) -> tuple[set[str], set[str]]:
        """While the service is dead: kill the first processes of some agents; give one of these rows a stranger's
        number.
        """
        killed = set(self.random.sample(sorted(running), min(2, len(running))))
        for agent_id in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(running[agent_id]["pid"])
                if process.environ().get("AGENT_ID") == agent_id:
                    process.kill()
                    until(lambda process=process: not alive([process]))
        forged = set(sorted(killed)[:1])
        with contextlib.closing(sqlite3.connect(self.service.storage / "sidecar.db")) as database, database:
            for agent_id in forged:
                database.execute("update agent set pid = ? where id = ?", (self.strangers[0].pid, agent_id))
        return killed, forged

    def _check(self, rows: dict[str, dict[str, Any]], killed: set[str], forged: set[str]) -> None:
        client = self.service.client()
        for agent_id in killed:
            ended = until(lambda agent_id=agent_id: (found := self._status(client, agent_id))["ended_at"] and found)
            assert ended["state"] in (("killed",) if agent_id in self.ordered else ("failed", "completed")), ended
            assert ended["exit_code"] is not None, ended  # their keeper has gone on
        for agent_id in set(rows) - killed:  # living ones go on
            found = until(
                lambda agent_id=agent_id: (now := self._status(client, agent_id))["state"] != "starting" and now
            )
            self.counts["adopted" if found["state"] == "running" else "gone"] += 1
            assert found["state"] != "lost" or found["pid"] is None, found  # but where it never had a process
        self.counts["killed meanwhile"] += len(killed)
        until(lambda: self._processes_are_those_of_running_agents(client))
        for stranger in self.strangers:
            assert stranger.poll() is None, "a stranger was killed"
        for agent in self._running(client):
            token = until(lambda agent=agent: self._token(agent["agent_id"]))
            assert Client(self.service.url, token).get("/status").status_code == 200
        for agent in self._running(client)[:-KEPT]:
            assert client.delete(f"/api/agents/{agent['agent_id']}").status_code == 202
            self.ordered.add(agent["agent_id"])

    def _status(self, client: Client, agent_id: str) -> dict[str, Any]:
        answer = client.get(f"/api/agents/{agent_id}/status")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def _token(self, agent_id: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.service.storage / "agents" / agent_id / "token").read_text()
        return ""

    def _running(self, client: Client) -> list[dict[str, Any]]:
        return client.get("/api/agents", state="running", limit=1000).json()["agents"]  # type: ignore[no-any-return]

    def _processes_are_those_of_running_agents(self, client: Client) -> bool:
        """Each agent that runs has its process, and each process its agent; daemons are no more than the agents that
        make some.
        """
        running = {agent["agent_id"]: agent for agent in self._running(client)}
        found = collections.Counter(
            environment["AGENT_ID"] for environment in self._environments() if "AGENT_ID" in environment
        )
        makers = sum(agent["task"] == "vanish_and_hang" for agent in running.values())
        return set(found) == set(running) and len(daemons_left()) <= makers

    def _environments(self) -> list[dict[str, str]]:
        found = []
        for process in marked_processes():
            with contextlib.suppress(psutil.Error):
                found.append(process.environ())
        return found

    def _end_spawners(self, threads: list[threading.Thread]) -> None:
        self.over = True
        self.spawning.set()
        for thread in threads:
            thread.join(30)

    def _finish(self, threads: list[threading.Thread]) -> None:
        self._end_spawners(threads)
        client = self.service.client()
        missing = [
            agent_id for agent_id in self.confirmed if client.get(f"/api/agents/{agent_id}/status").status_code != 200
        ]
        assert not missing, f"confirmed and forgotten: {missing}"
        until(lambda: client.get("/status").json()["agents"]["active"] == len(self._running(client)))
        for agent in self._running(client):
            client.delete(f"/api/agents/{agent['agent_id']}")
        until(lambda: client.get("/status").json()["agents"]["active"] == 0, 60)
        assert (
            not [environment for environment in self._environments() if "AGENT_ID" in environment]
            and not daemons_left()
        ), "processes were left"
        assert self.service.stop() == 0, self.service.log
        until(lambda: not keepers(self.service))
        assert "Traceback" not in self.service.log, self.service.log
        self.counts["processes left"] = 0
        self.counts["strangers killed"] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found = CrashAgents(Path(folder), seed=options.seed).run(options.kills)
        print(f"{time.monotonic() - began:.0f} s:", ", ".join(f"{name} {number}" for name, number in found.items()))


if __name__ == "__main__":
    main()
