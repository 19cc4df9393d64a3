"""Each agent belongs to the sidecar that started it: the others ask that one about it, and to end it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from cco_sidecar import ApiError, Running, StorageError, log, one_line
from cco_sidecar_plugins._files import NO_JSON
from cco_sidecar_plugins.agents.end import EndedAgents
from cco_sidecar_plugins.cluster._replicated import ReplicatedStorage
from cco_sidecar_plugins.http.repeats import RepeatedAgents


class OwningAgents(EndedAgents, RepeatedAgents):
    """Asks the owner about agents of other sidecars. Which that is stands in the agent's row as ``node``."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        storage = self.storage
        assert isinstance(storage, ReplicatedStorage)
        self._storage = storage
        storage.on_revoked = self.tokens.revoked.add

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._storage.peers.answer = self._asked_by_other
        await super().start()

    def _owner(self, row: dict[str, Any]) -> str | None:
        """The node of another sidecar, which owns the agent; None for one of ours."""
        node = str(row.get("node", self._storage.node))
        return None if node == self._storage.node else node

    def check_here(self, agent_id: str) -> None:
        """Raise REQ_002 for an agent of another sidecar, which alone has what it wrote."""
        if owner := self._owner(self.find(self.settings.project, agent_id)):
            name = self._storage.peers.name_of(owner)
            raise ApiError("REQ_002", f"The files of {agent_id} are kept by {name}: ask on its machine")

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        if (owner := self._owner(row)) is None:
            return super().describe(row)
        if self._storage.peers.is_seen(owner):
            try:
                answer = self._storage.peers.ask(owner, {"describe": row["id"]}).result(1)
                if "agent_id" in (told := msgspec.json.decode(answer)):
                    return told
            except (StorageError, TimeoutError, *NO_JSON) as error:
                self._storage.peers.forget(owner)
                log.debug("agent %s: its owner does not answer: %s", row["id"], one_line(error))
        return super().describe(row)  # what the ledger alone knows

    async def end(self, agent_id: str, *, force: bool = False) -> bool:
        row = self._storage.read.agent(self.settings.project, agent_id)
        if row is None or row["ended"] or not (owner := self._owner(row)):
            return await super().end(agent_id, force=force)
        name = self._storage.peers.name_of(owner)
        try:
            answer = await asyncio.wrap_future(self._storage.peers.ask(owner, {"end": agent_id, "force": force}))
            told = msgspec.json.decode(answer)
        except (StorageError, *NO_JSON) as error:
            problem = f"{agent_id} belongs to {name}, which does not answer ({one_line(error)})"
            raise ApiError("AGT_001", problem, status=503, retry_after=5) from None
        if "ending" not in told:
            raise ApiError("AGT_001", f"{agent_id} belongs to {name}: {told.get('problem')}", status=503, retry_after=5)
        return bool(told["ending"])

    async def _asked_by_other(self, question: bytes) -> bytes:
        """The answer to another sidecar, in the client's thread."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._answer(question), self._loop))

    async def _answer(self, question: bytes) -> bytes:
        try:
            asked = msgspec.json.decode(question)
            if agent_id := asked.get("end"):
                return msgspec.json.encode({"ending": await self.end(agent_id, force=bool(asked.get("force")))})
            row = self.find(self.settings.project, asked["describe"])
            if self._owner(row):
                raise ApiError("REQ_002", "it is not mine")
            return msgspec.json.encode(await self.disk.run(self.describe, row))
        except Exception as error:  # a boundary: the other sidecar gets it
            return msgspec.json.encode({"problem": one_line(error)})

    def with_token(self, answer: bytes) -> bytes:
        told = msgspec.json.decode(super().with_token(answer))
        row = self.find(self.settings.project, told["agent_id"])
        if self._owner(row) and not row["ended"]:
            told["jwt_token"] = self.launcher.token(row)
        return msgspec.json.encode(told)

    async def begin_watch(self, running: Running) -> None:
        adopted = dict(running.row)
        try:
            await super().begin_watch(running)
        except StorageError as error:
            if adopted["state"] != "running":
                raise
            log.warning("agent %s: %s: it is watched all the same", adopted["id"], one_line(error))
            running.task = asyncio.create_task(self._watch(running))
