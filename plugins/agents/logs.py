"""What an agent wrote, from any place on: ``GET /api/agents/{agent_id}/logs``."""

from __future__ import annotations

import itertools
import typing
from typing import Annotated, Any

from msgspec import Meta, Struct

from cco_sidecar import REDACTED, AgentEndpoint, ApiError, Route, hookimpl, redact
from cco_sidecar_plugins.agents.keeper import NotingAgents, StampedOutput, WholeOutput, output_of

TAIL = 512 * 1024  # how far back the last lines are looked for
LONGEST_WORD = 32 * 1024  # longer than any secret that is known by its form
SIGNS = "".join(map(chr, range(33, 127)))  # of ASCII, a byte each

MOMENT = "[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\\.[0-9]{1,3})?)?Z?)?"
SINCE = rf"^([0-9]{{1,15}}|{MOMENT})\Z"
SINCE_IN_WORDS = "must be an offset, such as a next_offset, or a time, such as 2026-01-31T12:00:00Z"


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/agents/{agent_id}/logs", GetAgentLogs)]


class LogQuery(Struct):
    tail: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    since: Annotated[str, Meta(pattern=SINCE)] = "0"
    timestamps: bool = False


class GetAgentLogs(AgentEndpoint):
    """What an agent wrote."""

    query_type = LogQuery
    answers = {200: "AgentLogs"}

    async def respond(self, agent_id: str) -> dict[str, Any]:
        row, agents = self.find(agent_id), self.sidecar.agents
        typing.cast(NotingAgents, agents).check_here(agent_id)
        folder = self.sidecar.settings.storage / "agents" / agent_id
        if row["ended"] and row["pid"] is not None and not folder.exists():
            raise ApiError("REQ_002", f"The output of {agent_id} is no longer kept (--agent-retention)")
        output = output_of(agents, agent_id)
        return {"agent_id": agent_id} | await agents.disk.run(log_answer, output, self.query, row["ended"] is not None)


def log_answer(output: WholeOutput, query: LogQuery, is_whole: bool) -> dict[str, Any]:
    """The output from an offset or moment on, at most a megabyte, or its last lines; ``is_whole`` where nothing more
    will be written. Blocks, as all below do.
    """
    if query.tail is not None and query.since == "0":
        start = offset_of_tail(output, query.tail)
    elif query.since.isdigit():
        start = min(int(query.since), output.size())
    elif isinstance(output, StampedOutput):
        start = output.offset_of(query.since)
    else:
        raise ApiError("REQ_001", "since: when lines were written is known of agents that the keeper ran alone")
    offset, text, following = read(output, query, start)
    head = text.rstrip(SIGNS)  # the last word, of which more may follow: half a secret has no form
    held_back = len(text) - len(head)
    if (not is_whole or output.size() - following > 3) and held_back < LONGEST_WORD:
        text, following = head, following - held_back
    begin = max(0, offset - LONGEST_WORD)
    place, before, _ = read(output, query, begin, offset - begin)
    return {
        "text": redact_after(before if place == begin else "", text), "next_offset": following, "offset": offset,
    }  # fmt: skip


def read(output: WholeOutput, query: LogQuery, start: int, number: int | None = None) -> tuple[int, str, int]:
    if not query.timestamps:
        return output.read(start, number=number)
    if not isinstance(output, StampedOutput):
        raise ApiError("REQ_001", "timestamps: when lines were written is known of agents that the keeper ran alone")
    return output.read(start, number=number, timestamps=True)


def offset_of_tail(output: WholeOutput, number: int) -> int:
    """The offset at which the last ``number`` lines begin."""
    asked = max(0, output.size() - TAIL)
    offset, content = output.content(asked, TAIL)
    position = len(content) - content.endswith(b"\n")
    for _ in range(number):
        position = content.rfind(b"\n", 0, position)
        if position < 0:
            return offset if offset == 0 or offset > asked else offset + content.find(b"\n") + 1
    return offset + position + 1


def redact_after(before: str, content: str) -> str:
    """``content`` without the secrets that it holds, nor the rest of one that begins in the text ``before`` it."""
    alone, whole = redact(content)[0], redact(before + content)[0]
    if whole == redact(before)[0] + alone:
        return alone
    pairs = zip(reversed(alone), reversed(whole), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return REDACTED + alone[len(alone) - same :].removeprefix(REDACTED)
