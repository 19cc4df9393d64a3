"""Agents ask a person: for approval of what they are about to do, or a question.

An agent asks (POST /api/approvals) and waits for the answer (GET /api/approvals/{id}?timeout=MS). A person answers by
``cco approve``, ``cco deny`` and ``cco answer``, or POST /api/approvals/{id}/answer. What is asked and answered are
events that the service alone publishes, and the only thing that is stored: an approval's id is that of its first event,
and its state follows from the log, which outlives a crash::

    approval_wanted, question_asked -> open -> answered    a person's answer, or that of a rule of --agent-may
                                         |---> expired     no answer in time, which means no
                                         '---> withdrawn   the agent that asked has ended

Who may answer: whoever may spawn agents, with a token that is not ``bound``. Bound are the tokens that programs hold,
those of spawned agents and of connected sessions: they ask, and never answer.

Another plugin asks so::

    approvals = approvals_of(self.sidecar)
    asked = await approvals.ask(self.claims, ApprovalRequest(kind="question", text="Which port?", timeout_seconds=300))
    answer = await approvals.wait(self.claims, asked.approval_id, 60.0, self.hang_up)  # again while it is "open"
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
import typing
import uuid
import weakref
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from cco_sidecar import (
    PUBLISH,
    READ,
    SPAWN,
    ApiError,
    Claims,
    Endpoint,
    HangUp,
    Identifier,
    NewEvent,
    Records,
    Route,
    Sidecar,
    StorageError,
    WaitQuery,
    harmless,
    hookimpl,
    iso,
    new_event,
    redaction,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.http._finished import FinishedRequest, take_down
from cco_sidecar_plugins.storage._pages import events_with

log = logging.getLogger("cco")

State = Literal["open", "answered", "expired", "withdrawn"]
Kind = Literal["approval", "question"]
APPROVE, DENY = "approve", "deny"
EVENTS = {"approval": ("approval_wanted", "approval_answered"), "question": ("question_asked", "question_answered")}
ASKED = {asked: kind for kind, (asked, _) in EVENTS.items()}
ANSWERED = {answered: kind for kind, (_, answered) in EVENTS.items()}


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("POST", "/api/approvals", AskForApproval),
        Route("GET", "/api/approvals", ListApprovals),
        Route("GET", "/api/approvals/{approval_id}", WaitForApproval),
        Route("POST", "/api/approvals/{approval_id}/answer", AnswerApproval),
    ]


# -- the wire


class ApprovalRequest(Struct, omit_defaults=True):
    """Body of POST /api/approvals: what an agent asks a person. A question may have choices, of which the answer is
    one; an approval's are approve and deny. A ``command`` that --agent-may allows is approved at once.
    """

    kind: Kind
    text: Annotated[str, Meta(min_length=1, max_length=4000)]
    command: Annotated[str, Meta(min_length=1, max_length=16_000)] | None = None
    choices: Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=20)] = []
    timeout_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 600
    issue_id: Identifier | None = None
    details: dict[str, Any] = {}


class ApprovalAnswer(Struct, omit_defaults=True):
    """Body of POST /api/approvals/{approval_id}/answer: approve or deny, one of the choices, or any text where
    there are none; ``message`` is said to the agent beside it.
    """

    answer: Annotated[str, Meta(min_length=1, max_length=4000)]
    message: Annotated[str, Meta(max_length=4000)] | None = None


class Approval(Struct):
    """What an agent asked, and what became of it. ``answer`` is null while it is open, and where a question got none;
    that of an approval is then deny. ``answered_by`` is a token's subject, or the rule of --agent-may.
    """

    approval_id: str
    kind: Kind
    state: State
    agent_id: str
    agent_type: str
    issue_id: str | None
    text: str
    command: str | None
    choices: list[str]
    details: dict[str, Any]
    asked_at: str
    until: str
    answer: str | None = None
    message: str | None = None
    answered_by: str | None = None
    answered_at: str | None = None


class ApprovalList(Struct):
    """What agents asked, newest last."""

    approvals: list[Approval]
    has_more: bool


class ApprovalListQuery(Struct):
    state: State | None = None
    issue_id: Identifier | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class ApprovalWaitQuery(Struct):
    timeout: Annotated[int, Meta(ge=0, le=300_000)] = 0


class AskForApproval(Endpoint):
    """Ask a person for approval, or a question. The answer is waited for at the id that this one names."""

    permission = PUBLISH
    body = ApprovalRequest
    status = 201
    answers = {201: Approval}
    failure = "EVT_001"
    idempotent = True

    async def respond(self, body: dict[str, Any]) -> Approval:
        request = msgspec.convert(body, ApprovalRequest)
        asked = await approvals_of(self.sidecar).ask(self.claims, request)
        said = f"{asked.answer} by {asked.answered_by}" if asked.answer else "asked"
        self.acted_on = acted_on(asked, said)
        return asked


class ListApprovals(Endpoint):
    """What agents asked, newest last; with state=open what waits for an answer."""

    permission = READ
    query_type = ApprovalListQuery
    answers = {200: ApprovalList}

    async def respond(self) -> ApprovalList:
        return approvals_of(self.sidecar).page(self.query)


class WaitForApproval(Endpoint):
    """One approval or question: at once, or when it is no longer open, for ``timeout`` milliseconds at most."""

    query_type = ApprovalWaitQuery
    answers = {200: Approval}
    problems = (404,)
    failure = "EVT_001"
    ANSWER_SECONDS = None
    refusable = False

    async def respond(self, approval_id: str) -> Approval:
        began = time.monotonic()
        approvals = approvals_of(self.sidecar)
        try:
            return await approvals.wait(self.claims, approval_id, self.query.timeout / 1000, self.hang_up)
        finally:
            self.parked = time.monotonic() - began


class AnswerApproval(Endpoint):
    """Answer an approval or a question, once. Takes no bound token: those are agents'."""

    permission = SPAWN
    body = ApprovalAnswer
    answers = {200: Approval}
    problems = (404, 409)
    failure = "EVT_001"

    async def respond(self, approval_id: str, body: dict[str, Any]) -> Approval:
        answer, approvals = msgspec.convert(body, ApprovalAnswer), approvals_of(self.sidecar)
        self.acted_on = acted_on(approvals.find(approval_id).approval, answer.answer)
        return await approvals.answer(self.claims, approval_id, answer.answer, answer.message)


def acted_on(approval: Approval, said: str) -> dict[str, str]:
    """What the audit log says of it."""
    found = {"event_id": approval.approval_id, "agent_id": approval.agent_id, "issue_id": approval.issue_id or ""}
    return found | {"decision": f"{said}: {approval.command or approval.text}"[:500]}


# -- the part


class Asked(Struct):
    """An approval with what readers do not get."""

    approval: Approval
    seq: int
    deadline: float  # epoch seconds

    @property
    def state(self) -> State:
        overdue = self.approval.state == "open" and time.time() >= self.deadline
        return "expired" if overdue else self.approval.state

    def seen(self) -> Approval:
        """As readers get it now: what is overdue has expired, also before that is in the log."""
        if self.state == self.approval.state:
            return self.approval
        outcome = {"state": "expired", "answer": no_to(self.approval), "answered_at": self.approval.until}
        return msgspec.structs.replace(self.approval, **outcome)


class Approvals:
    """What agents asked, as the log says it. Everything is on the loop; each call first reads on in the log."""

    STEP = 500  # events that are read at once
    KEPT = 1000  # that are no longer open, those that ended last
    OPEN, OPEN_OF_ONE = 1000, 20  # in all, and of one asker

    def __init__(self, sidecar: Sidecar) -> None:
        self._storage, self._bus, self._agents = sidecar.storage, sidecar.bus, sidecar.agents
        self._settings, self._tokens = sidecar.settings, sidecar.tokens
        self._project = sidecar.settings.project
        self._asked: dict[str, Asked] = {}  # by id, oldest first
        self._read_to = 0
        self._asking = asyncio.Lock()  # else what is asked at once would not count together
        self._ends: set[asyncio.Task[None]] = set()

    # -- asking

    async def ask(self, claims: Claims, request: ApprovalRequest) -> Approval:
        """Publish what the holder of ``claims`` asks; it is open, or approved already where a rule allows its command.
        Raises RATE_001 where too much is open, AUTH_003 where the token may not publish.
        """
        self._tokens.check_permission(claims, PUBLISH)
        if len({harmless(choice).strip() for choice in request.choices} | {""}) <= len(request.choices):
            raise ApiError("REQ_001", "The choices must differ, and each say something", details={"path": "choices"})
        running = self._agents.active.get(claims.sub)
        issue = claims.issue_id or (running.row["issue"] if running and claims.bound else request.issue_id)
        data = {"agent_id": claims.sub, "agent_type": claims.agent_type, "issue_id": issue}
        data |= {name: getattr(request, name) for name in ("text", "command", "choices", "details", "timeout_seconds")}
        data |= {"choices": [APPROVE, DENY]} if request.kind == "approval" else {}
        data = redaction().redact_json(data)[0] | {"until": iso(time.time() + request.timeout_seconds)}
        asked, answered = EVENTS[request.kind]
        rule = self._rule(claims.agent_type, request)
        if rule:
            data |= {"state": "answered", "answer": APPROVE, "message": None, "answered_by": f"--agent-may {rule}"}
        event = self._event(answered if rule else asked, data)

        def insert(records: Records) -> Approval:
            """Runs on the writer thread."""
            seq = records.insert_event(event)
            return self._approval(event.type, seq, event.created, event.envelope["data"])

        async with self._asking:
            self._read_on()
            self._check_room(claims.sub)
            stored: Approval = await self._storage.write(insert, answers=True)
        return self.find(stored.approval_id).seen()

    def _check_room(self, subject: str) -> None:
        waiting = [asked.approval.agent_id for asked in self._asked.values() if asked.state == "open"]
        if len(waiting) >= self.OPEN or waiting.count(subject) >= self.OPEN_OF_ONE:
            raise ApiError("RATE_001", "Too much that was asked waits for an answer", retry_after=30)

    def _rule(self, agent_type: str, request: ApprovalRequest) -> str | None:
        """The rule of --agent-may that allows the command."""
        rules = typing.cast(PluginSettings, self._settings).may(agent_type)
        allowed = request.kind == "approval" and request.command is not None
        return allowing_rule(request.command or "", rules) if allowed else None

    def _event(self, event_type: str, data: dict[str, Any], correlation: str | None = None) -> NewEvent:
        submission = {"publisher": "cco-sidecar", "topic": "approvals", "priority": "high", "data": data}
        return new_event(self._project, event_type, submission | {"correlation_id": correlation})

    # -- waiting

    async def wait(self, claims: Claims, approval_id: str, seconds: float, hang_up: HangUp | None = None) -> Approval:
        """The approval when it is no longer open, or after ``seconds``, or as soon as the service stops. Raises
        REQ_002, AUTH_003 where it is neither the token's own nor one that it may read, CancelledError where the client
        hung up.
        """
        asked = self.find(approval_id)
        if asked.approval.agent_id != claims.sub:
            self._tokens.check_permission(claims, READ)
            self._tokens.check_issue(claims, asked.approval.issue_id)
        if asked.state == "open" and seconds > 0:
            left = max(0.0, min(seconds, asked.deadline - time.time()))
            since = self._bus.event_id(max(asked.seq, self._storage.read.number("floor")))
            query = WaitQuery(int(left * 1000) + 1, f"correlation_id:{approval_id}", since, 1)
            await self._bus.wait(claims, EVENTS[asked.approval.kind][1], query, hang_up or HangUp())
            asked = self.find(approval_id)
        return asked.seen()

    # -- answering

    async def answer(self, claims: Claims, approval_id: str, answer: str, message: str | None = None) -> Approval:
        """Answer for a person. Raises AUTH_003 (an agent's token), REQ_002, REQ_001: with status 409 where it was
        answered before or can be no longer.
        """
        asked = self.find(approval_id)
        approval = asked.approval
        self._tokens.check_permission(claims, SPAWN)
        self._tokens.check_issue(claims, approval.issue_id)
        if claims.bound:
            raise ApiError("AUTH_003", "An agent's token answers nothing: that is for people", details={"bound": True})
        if asked.state != "open":
            raise too_late(asked.seen())
        if approval.choices and answer not in approval.choices:
            choices = ", ".join(approval.choices)
            raise ApiError("REQ_001", f"The answer must be one of: {choices}", details={"path": "answer"})
        data = {"state": "answered", "answer": answer, "message": message, "answered_by": claims.sub}
        if (earlier := await self._end(asked, data)) is not None:
            raise too_late(earlier)
        return self.find(approval_id).seen()

    async def _end(self, asked: Asked, outcome: dict[str, Any]) -> Approval | None:
        """Publish what became of an open approval, once; what had become of it already. Raises StorageError."""
        approval = asked.approval
        names = ("agent_id", "agent_type", "issue_id", "text", "command", "choices", "details", "until")
        data = {name: getattr(approval, name) for name in names} | {"approval_id": approval.approval_id}
        event_type = EVENTS[approval.kind][1]
        event = self._event(event_type, data | redaction().redact_json(outcome)[0], approval.approval_id)

        def end(records: Records) -> Approval | None:
            """Runs on the writer thread, after every answer that came before this one."""
            name = approval.approval_id.encode()
            for row in rows_of(records, self._project, [event_type], asked.seq, records.head(), name):
                envelope = msgspec.json.decode(row["body"])
                if envelope["correlation_id"] == approval.approval_id:
                    return self._approval(event_type, row["seq"], row["created"], envelope["data"])
            records.insert_event(event)
            return None

        return await self._storage.write(end)

    async def _expire(self, asked: Asked) -> None:
        """Publish that no answer came in time."""
        await asyncio.sleep(max(0.0, asked.deadline - time.time()))
        outcome = {"state": "expired", "answer": no_to(asked.approval), "message": None, "answered_by": None}
        try:
            self._read_on()
            if asked.approval.state == "open" and await self._end(asked, outcome) is None:
                said = acted_on(asked.approval, "no answer in time")
                path, request_id = f"/api/approvals/{asked.approval.approval_id}", f"req-{uuid.uuid4()}"
                facts: dict[str, Any] = {"remote": None, "path": path, "status": 200, "acted_on": said}
                take_down(self._settings, FinishedRequest(moment=time.time(), request_id=request_id, **facts))
        except StorageError as error:  # its time is over all the same, as every reader sees
            what = getattr(error, "sqlite_errorname", error)
            log.error("approval %s: its end cannot be stored: %s", asked.approval.approval_id, what)

    # -- reading

    def find(self, approval_id: str) -> Asked:
        """Raises REQ_002 where nothing was asked by this id, or the log no longer has it."""
        self._read_on()
        if approval_id not in self._asked:
            raise ApiError("REQ_002", f"No approval {approval_id}")
        return self._asked[approval_id]

    def page(self, query: ApprovalListQuery) -> ApprovalList:
        """The newest that ``query`` asks for, newest last."""
        self._read_on()
        found = [asked.seen() for asked in self._asked.values() if query.state in (None, asked.state)]
        found = [approval for approval in found if query.issue_id in (None, approval.issue_id)]
        return ApprovalList(found[-query.limit :], len(found) > query.limit)

    def _read_on(self) -> None:
        """Take in what has come into the log."""
        read, after = self._storage.read, self._read_to
        self._read_to = read.head()
        if self._read_to == after:
            return
        rows = rows_of(read, self._project, [*ASKED, *ANSWERED], after, self._read_to)
        for row in sorted(rows, key=lambda row: int(row["seq"])):
            self._take(row["type"], row["seq"], row["created"], msgspec.json.decode(row["body"])["data"])
        for asked in self._asked.values():
            if asked.approval.state == "open" and (ended := self._ended(asked.approval.agent_id)):
                outcome = {"state": "withdrawn", "answer": no_to(asked.approval), "answered_at": iso(ended)}
                asked.approval = msgspec.structs.replace(asked.approval, **outcome)
        finished = [seen for asked in self._asked.values() if (seen := asked.seen()).state != "open"]
        if len(finished) > self.KEPT:
            finished.sort(key=lambda approval: approval.answered_at or "")  # not as asked: who asked still looks for it
            for approval in finished[: -self.KEPT]:
                del self._asked[approval.approval_id]

    def _ended(self, agent_id: str) -> float | None:
        """When a spawned agent ended; None for one that has not, and for anybody else."""
        row = self._storage.read.agent(self._project, agent_id)
        return row["ended"] if row else None

    def _take(self, event_type: str, seq: int, created: float, data: dict[str, Any]) -> None:
        approval = self._approval(event_type, seq, created, data)
        if event_type in ASKED or approval.approval_id not in self._asked:
            asked = Asked(approval, seq, created + data.get("timeout_seconds", 0))
            self._asked[approval.approval_id] = asked
            if event_type in ASKED:
                task = asyncio.create_task(self._expire(asked))
                self._ends.add(task)
                task.add_done_callback(self._ends.discard)
        elif (asked := self._asked[approval.approval_id]).approval.state == "open":
            asked.approval = msgspec.structs.replace(approval, asked_at=asked.approval.asked_at)

    def _approval(self, event_type: str, seq: int, created: float, data: dict[str, Any]) -> Approval:
        """What an event tells."""
        names = ("agent_id", "agent_type", "issue_id", "text", "command", "choices", "details", "until")
        told = {name: data[name] for name in names} | {"asked_at": iso(created)}
        if event_type in ANSWERED:
            told |= {name: data[name] for name in ("answer", "message", "answered_by")} | {"answered_at": iso(created)}
        told |= {"approval_id": data.get("approval_id") or self._bus.event_id(seq), "state": data.get("state", "open")}
        return msgspec.convert(told | {"kind": (ASKED | ANSWERED)[event_type]}, Approval)


def no_to(approval: Approval) -> str | None:
    """The answer where nobody gives one."""
    return DENY if approval.kind == "approval" else None


def too_late(approval: Approval) -> ApiError:
    """The refusal of a second answer, which says what became of the first."""
    by = f" by {approval.answered_by}" if approval.answered_by else ""
    said = {
        "answered": f"was answered{by} at {approval.answered_at}: {approval.answer}",
        "expired": f"expired at {approval.until}: no answer came in time, which means no",
        "withdrawn": f"is no longer needed: {approval.agent_id} has ended",
    }.get(approval.state, "is open")
    details = {name: getattr(approval, name) for name in ("state", "answer", "answered_by", "answered_at")}
    return ApiError("REQ_001", f"{approval.approval_id} {said}", status=409, details=details)


def rows_of(
    records: Records, project: str, types: Sequence[str], after: int, upto: int, containing: bytes | None = None
) -> Iterator[Any]:
    """The events of some types with after < seq <= upto, type by type."""
    for event_type in types:
        seq = after
        while seq < upto:
            wanted = project, seq, upto, Approvals.STEP, event_type
            rows = events_with(records, containing, *wanted) if containing else records.events(*wanted, None)
            yield from rows
            seq = rows[-1]["seq"] if rows else upto


def allowing_rule(command: str, rules: Sequence[str]) -> str | None:
    """The rule whose words a command begins with, where it is one plain command: nothing of it is for the shell to
    start something else, to write a file or to fill in.
    """
    if re.search(r"[;&|`$<>()\\\r\n]", command):
        return None
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not close
        return None
    return next((rule for rule in rules if words[: len(rule.split())] == rule.split()), None)


PARTS: weakref.WeakKeyDictionary[Sidecar, Approvals] = weakref.WeakKeyDictionary()


def approvals_of(sidecar: Sidecar) -> Approvals:
    """The approvals of a service."""
    if sidecar not in PARTS:
        PARTS[sidecar] = Approvals(sidecar)
    return PARTS[sidecar]
