"""What agents spend: tokens and money, as their programs report them while they run, and budgets on both.

Programs report by OpenTelemetry (OTLP/JSON over HTTP) with a token that can do nothing else. The figures lie in a file
of their own in the storage, ``meter.db`` (SQLite): a row of some 100 bytes for each agent, day and model, which is
forgotten after 400 days, and 60 bytes for each record that was reported yesterday or today. It is written without
``fsync``: a power cut may cost the last moments.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

import cco_sidecar
from cco_sidecar import (
    MB,
    AgentCommand,
    Agents,
    ApiError,
    Endpoint,
    Launcher,
    Pool,
    Records,
    Route,
    Running,
    StartError,
    StorageError,
    hookimpl,
    log_once,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents._reader import lasting_token
from cco_sidecar_plugins.agents.details import heard_out
from cco_sidecar_plugins.agents.launchers import PROGRAMS, Program, default_program

log = logging.getLogger("cco")

Attributes = dict[str, Any]


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("GET", "/status", GetStatus),
        Route("POST", "/v1/logs", ReportLogs),
        Route("POST", "/v1/metrics", ReportMetrics),
        Route("POST", "/v1/traces", ReportTraces),
    ]


# -- the reports of programs


class Spent(Struct):
    """What one record of a report adds; None what it says nothing of. Cached tokens are a part of the input."""

    model: str = ""
    requests: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    denials: int | None = None


def claude_request(its: Attributes) -> Spent:
    read, written = count(its, "cache_read_tokens"), count(its, "cache_creation_tokens")
    given = count(its, "input_tokens") + read + written
    return Spent(model_of(its), 1, given, count(its, "output_tokens"), read, amount(its, "cost_usd"))


def claude_decision(its: Attributes) -> Spent | None:
    """Versions before 2.1.332 tell of refusals by a rule alone: of those that tell of none nothing is known."""
    refused = its.get("decision") == "reject"
    version = [int(part) for part in str(its.get("service.version")).split(".") if part.isdecimal()]
    return Spent(denials=int(refused)) if refused or version >= [2, 1, 332] else None


def codex_response(its: Attributes) -> Spent | None:
    if "input_token_count" not in its:  # one of the many other events of the stream
        return None
    given, said = count(its, "input_token_count"), count(its, "output_token_count")
    return Spent(model_of(its), 1, given, said, count(its, "cached_token_count"))


def codex_decision(its: Attributes) -> Spent:
    return Spent(denials=int(str(its.get("decision")).lower() in ("denied", "abort", "timed_out")))


def gemini_response(its: Attributes) -> Spent:
    said = count(its, "output_token_count") + count(its, "thoughts_token_count")
    cached = count(its, "cached_content_token_count")
    return Spent(model_of(its), 1, count(its, "input_token_count"), said, cached)


def qwen_response(its: Attributes) -> Spent:
    return msgspec.structs.replace(gemini_response(its), output_tokens=count(its, "output_token_count"))


def gemini_tool(its: Attributes) -> Spent:
    return Spent(denials=int(its.get("error_type") in REFUSED or its.get("decision") == "reject"))


REFUSED = ("policy_violation", "execution_denied")
READERS: dict[str, Callable[[Attributes], Spent | None]] = {  # by the name of the event
    "claude_code.api_request": claude_request,
    "claude_code.tool_decision": claude_decision,
    "codex.sse_event": codex_response,
    "codex.tool_decision": codex_decision,
    "gemini_cli.api_response": gemini_response,
    "gemini_cli.tool_call": gemini_tool,
    "qwen-code.api_response": qwen_response,
    "qwen-code.tool_call": gemini_tool,
}


def count(its: Attributes, name: str) -> int:
    """A number of tokens, 0 where none is given. Raises ValueError."""
    value = amount(its, name) or 0
    if value != int(value):
        raise ValueError(name)
    return int(value)


def amount(its: Attributes, name: str) -> float | None:
    """A number, which some programs write as a text. Raises ValueError for what can be none."""
    value = float(its[name]) if its.get(name) is not None else None
    if value is not None and not 0 <= value < 1e12:
        raise ValueError(name)
    return value


def model_of(its: Attributes) -> str:
    return str(its.get("model") or "")[:128]


# -- the wire: OTLP/JSON, of which only what is needed


class KeyValue(Struct):
    """An attribute of OTLP/JSON: its value is an object with one field, named after its type."""

    key: str
    value: dict[str, Any] | None = None


class Resource(Struct):
    """The program that reports."""

    attributes: list[KeyValue] = []


class LogRecord(Struct):
    """One record of a program's log."""

    attributes: list[KeyValue] = []
    body: Any = None
    eventName: str = ""
    timeUnixNano: int | str = 0
    observedTimeUnixNano: int | str = 0


class ScopeLogs(Struct):
    """The records of one part of a program."""

    logRecords: list[LogRecord] = []


class ResourceLogs(Struct):
    """The records of one program."""

    resource: Resource | None = None
    scopeLogs: list[ScopeLogs] = []


class LogsReport(Struct):
    """A report of a coding program: logs by OTLP/JSON (opentelemetry.proto.collector.logs.v1)."""

    resourceLogs: Annotated[list[ResourceLogs], Meta(description="the records, by program and scope")] = []


class ReportLogs(Endpoint):
    """Count what an agent's program reports of its model, as OTLP/JSON. Takes a running agent's own token alone."""

    body = LogsReport
    max_body = 8 * MB
    failure = "STR_001"
    aside = True

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        agents = self.sidecar.agents
        running, meter = agents.active.get(self.claims.sub), meter_of(agents)
        if running is None or not self.claims.bound or not isinstance(meter, SpendMeter):
            raise ApiError("AUTH_003", "What is spent is reported with the own token of an agent that runs")
        row = running.row
        with heard_out(agents, row["id"]):
            rejected, warnings = await meter.pool.run(meter.take, row["id"], row["issue"], body)
        for data in warnings:
            log.warning("%(percent)d %% of the %(unit)s of this %(span)s are spent: %(spent)s of %(budget)s", data)
            event = {"publisher": "cco-sidecar", "topic": "coordination", "data": data}
            await self.sidecar.bus.publish(row["project"], "budget_warning", event)
        problem = {"rejectedLogRecords": rejected, "errorMessage": "they hold figures that are none"}
        return {"partialSuccess": problem} if rejected else {}


class GetStatus(cco_sidecar.GetStatus):
    """What happened so far, counted and timed."""

    async def respond(self) -> dict[str, Any]:
        spent = await self.sidecar.agents.disk.run(meter_of(self.sidecar.agents).statistics)
        return await super().respond() | {"spent": spent}


class OtherReport(Struct):
    """A report of a coding program that is not needed here: metrics or traces by OTLP/JSON."""


class ReportMetrics(Endpoint):
    """Metrics of an agent's program, of which nothing is kept. Some programs cannot be told to leave them out."""

    body = OtherReport
    max_body = 8 * MB
    aside = True

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        return {}


class ReportTraces(ReportMetrics):
    """Traces of an agent's program, of which nothing is kept."""


def records_of(body: dict[str, Any]) -> list[tuple[str, Attributes, bytes]]:
    """(event, attributes, digest) of each record that a reader knows. The digest is empty where it has no time, so that
    nobody could tell a repeat from another record.
    """
    found = []
    report = msgspec.convert(body, LogsReport)
    for part in report.resourceLogs:
        common = plain(part.resource.attributes) if part.resource else {}
        for record in itertools.chain.from_iterable(scope.logRecords for scope in part.scopeLogs):
            its = common | plain(record.attributes)
            text = record.body.get("stringValue") if isinstance(record.body, dict) else None
            names = (str(text), str(its.get("event.name")), record.eventName)
            event = next((name for name in names if name in READERS), None)
            if event:
                timed = record.timeUnixNano not in (0, "0", "") or "event.timestamp" in its
                content = msgspec.json.encode(record, order="deterministic") if timed else b""
                found.append((event, its, hashlib.sha256(content).digest()[:16] if timed else b""))
    return found


def plain(attributes: list[KeyValue]) -> Attributes:
    """Attributes by name, with values of text, number or truth."""
    return {item.key: next(iter(item.value.values()), None) for item in attributes if item.value}


# -- the figures


class Meter:
    """What is known where nothing is counted."""

    FIGURES = ("model", "requests", "input_tokens", "output_tokens", "cached_tokens", "cost_usd", "denials")

    def figures(self, agent_id: str) -> dict[str, Any]:
        """By FIGURES, null where the agent's program does not report it; ``cached_tokens`` are among the input."""
        return dict.fromkeys(self.FIGURES)

    def statistics(self) -> dict[str, Any]:
        """The sums of figures by issue and by day."""
        return {"by_issue": {}, "by_day": {}}

    def close(self) -> None:
        """The service ends."""


class SpendMeter(Meter):
    """Figures by agent, day and model, and budgets of issues and days. Its methods block for a moment."""

    FILE = "meter.db"
    WARN_AT = 0.8
    SHOWN = 100  # issues, and days, in the statistics
    KEPT = timedelta(days=400)
    SCHEMA = """
    create table if not exists spent (
      agent text not null, issue text not null, day text not null, model text not null, requests integer not null,
      input_tokens integer, output_tokens integer, cached_tokens integer, cost_usd real, denials integer,
      primary key (agent, day, model)) without rowid;
    create index if not exists spent_by_issue on spent (issue);
    create index if not exists spent_by_day on spent (day);
    create table if not exists seen (
      agent text not null, digest blob not null, day text not null, primary key (agent, digest)) without rowid;
    create index if not exists seen_by_day on seen (day);
    create table if not exists warned (budget text primary key, day text not null) without rowid;
    """
    SUMS = ", ".join(f"sum({name})" for name in Meter.FIGURES[1:]).replace("sum(cost_usd)", "round(sum(cost_usd), 6)")
    MAIN_MODEL = "select model from spent where agent = ?1 and model != '' group by model order by sum(requests) desc"
    BUDGETS = {"usd": "sum(cost_usd)", "tokens": "sum(input_tokens - coalesce(cached_tokens, 0) + output_tokens)"}

    def __init__(self, settings: PluginSettings) -> None:
        self._budgets = {"usd": settings.budget_usd, "tokens": settings.budget_tokens}
        path = settings.storage / self.FILE
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # -wal and -shm take this mode too
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._lock, self.pool = threading.Lock(), Pool("meter", 2, 20)
        self._check_owner()
        self._db.executescript(f"pragma journal_mode = wal; pragma synchronous = normal; {self.SCHEMA}")

    def _check_owner(self) -> None:
        """Raises sqlite3.DatabaseError where another program made the database, or a newer version of this one."""
        tables = {name for (name,) in self._db.execute("select name from sqlite_master where type = 'table'")}
        marks = [self._db.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if any(marks) or not tables <= {"spent", "seen", "warned"}:
            self._db.close()
            raise sqlite3.DatabaseError("a newer version of this program made it, or another program")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def take(self, agent_id: str, issue_id: str, report: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Add the records of a report, each once: how many are refused, and the warnings of budgets. Raises
        StorageError.
        """
        rejected, today = 0, day_of(datetime.now(UTC))
        try:
            with self._lock, self._db:
                self._db.execute("begin immediate")
                self._forget()
                for event, its, digest in records_of(report):
                    try:
                        spent = READERS[event](its)
                    except (ValueError, TypeError, OverflowError):
                        rejected += 1
                        continue
                    if spent is not None and self._is_new(agent_id, digest, today):
                        self._add(agent_id, issue_id, today, spent)
                return rejected, list(self._warnings(issue_id, today))
        except sqlite3.Error as error:
            raise StorageError(error) from None

    def _is_new(self, agent_id: str, digest: bytes, today: str) -> bool:
        if not digest:
            return True
        return self._db.execute("insert or ignore into seen values (?, ?, ?)", (agent_id, digest, today)).rowcount == 1

    def _add(self, agent_id: str, issue_id: str, today: str, spent: Spent) -> None:
        figures = msgspec.structs.asdict(spent)
        columns = ("agent", "issue", "day", *figures)
        added = ", ".join(
            f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in [*figures][1:]
        )
        self._db.execute(
            f"insert into spent ({', '.join(columns)}) values ({', '.join('?' * len(columns))})"
            f" on conflict do update set {added}",
            (agent_id, issue_id, today, *figures.values()),
        )

    def _forget(self) -> None:
        now = datetime.now(UTC)
        self._db.execute("delete from seen where day < ?", (day_of(now - timedelta(days=1)),))
        for table in ("spent", "warned"):
            self._db.execute(f"delete from {table} where day < ?", (day_of(now - self.KEPT),))

    # -- budgets

    def _spent(self, issue_id: str, today: str) -> Iterator[tuple[str, str, float, float]]:
        """(unit, "issue" or "day", spent, budget) of each budget that concerns the issue now."""
        for unit, budgets in self._budgets.items():
            for span, budget in budgets.items():
                question = f"select coalesce({self.BUDGETS[unit]}, 0) from spent where {span} = ?"
                (spent,) = self._db.execute(question, (issue_id if span == "issue" else today,)).fetchone()
                yield unit, span, round(spent, 6), budget

    def _warnings(self, issue_id: str, today: str) -> Iterator[dict[str, Any]]:
        for unit, span, spent, budget in self._spent(issue_id, today):
            which = issue_id if span == "issue" else today
            if spent >= self.WARN_AT * budget:
                name = f"{unit} {budget} {span} {which}"
                if self._db.execute("insert or ignore into warned values (?, ?)", (name, today)).rowcount:
                    facts = {"unit": unit, "span": span, "spent": spent, "budget": budget}
                    where = {"issue_id": which} if span == "issue" else {"day": which}
                    yield facts | where | {"percent": int(100 * spent / budget)}

    def check_budget(self, issue_id: str) -> None:
        """Raise AGT_003 where no agent may be started on the issue, since a budget is spent."""
        try:
            with self._lock:
                found = list(self._spent(issue_id, day_of(datetime.now(UTC))))
        except sqlite3.Error as error:
            raise StorageError(error) from None
        for unit, span, spent, budget in found:
            if spent >= budget:
                whose = f"issue {issue_id}" if span == "issue" else "this day (UTC)"
                amounts = f"{spent:g} of {budget:g} {'USD' if unit == 'usd' else 'tokens'}"
                raise ApiError("AGT_003", f"The budget of {whose} is spent: {amounts}; --budget-{unit} allows no more")

    # -- asking

    def figures(self, agent_id: str) -> dict[str, Any]:
        question = f"select ({self.MAIN_MODEL} limit 1), {self.SUMS} from spent where agent = ?1"
        rows = self._rows(question, agent_id)
        return dict(zip(self.FIGURES, rows[0], strict=True)) if rows else super().figures(agent_id)

    def of_issues(self, issues: Collection[str]) -> dict[str, tuple[float | None, int | None]]:
        """(US dollars, tokens as budgets count them) of those issues on which something was spent."""
        question = (
            f"select issue, round({self.BUDGETS['usd']}, 6), {self.BUDGETS['tokens']} from spent"
            " where issue in (select value from json_each(?)) group by issue"
        )
        rows = self._rows(question, json.dumps(list(issues)))
        return {issue: (usd, tokens) for issue, usd, tokens in rows}

    def statistics(self) -> dict[str, Any]:
        return {f"by_{span}": self._by(span) for span in ("issue", "day")}

    def _by(self, span: str) -> dict[str, Any]:
        """The figures of the latest issues or days, by their names."""
        question = f"select {span}, {self.SUMS} from spent group by {span} order by max(day) desc, {span} limit ?"
        rows = self._rows(question, self.SHOWN)
        return {name: dict(zip(self.FIGURES[1:], figures, strict=True)) for name, *figures in rows}

    def _rows(self, question: str, *values: Any) -> list[Any]:
        """No rows where the file is damaged: an agent's end is recorded, and issues are listed, all the same."""
        try:
            with self._lock:
                return self._db.execute(question, values).fetchall()
        except sqlite3.Error as error:
            log.error("meter: %s", error)
            return []


def day_of(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d")


# -- agents with what they spend, and programs that are told to report


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Launcher):
        return type("MeteredLauncher", (MeteredLauncher, base), {})
    return type("MeteredAgents", (MeteredAgents, base), {}) if issubclass(base, Agents) else None


class MeteredAgents(Agents):
    """Knows what agents spend, and starts none whose budget is spent."""

    settings: PluginSettings
    meter = Meter()  # until the storage folder is there

    async def start(self) -> None:
        self.meter = open_meter(self.settings)  # before the first await: requests are answered from then on
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        self.meter.close()

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        return super().describe(row) | self.meter.figures(row["id"])

    def last_word(self, row: dict[str, Any]) -> dict[str, Any]:
        return super().last_word(row) | self.meter.figures(row["id"])

    def admit(self, row: dict[str, Any], records: Records) -> dict[str, Any]:
        answer = super().admit(row, records)
        if isinstance(self.meter, SpendMeter):
            self.meter.check_budget(row["issue"])
        return answer


def meter_of(agents: Agents) -> Meter:
    return agents.meter if isinstance(agents, MeteredAgents) else Meter()


def open_meter(settings: PluginSettings) -> Meter:
    """A SpendMeter; one that counts nothing where its file is damaged. Raises StartError where a budget needs it."""
    try:
        return SpendMeter(settings)
    except (sqlite3.Error, OSError) as error:  # a folder may be in its place
        why = error.strerror if isinstance(error, OSError) else error
        if settings.budget_usd or settings.budget_tokens:
            raise StartError(f"{settings.storage / SpendMeter.FILE}: {error}; move it away to count anew", 1) from None
        log.warning("plugin meter: nothing that agents spend is counted: %s: %s", SpendMeter.FILE, why)
        return Meter()


class MeteredLauncher(Launcher):
    """Known programs report to us, unless the user has them report elsewhere. Says at the start which do not."""

    settings: PluginSettings

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        for problem in uncounted(self.settings):
            log_once(problem)

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        command = await super().command(running, files, asked)
        # It lasts, since a program reads it once, and can do nothing but report.
        token = lasting_token(self, running.row | {"permissions": []})
        return reporting(command, self.url.removesuffix("/api"), token, budgets_of(self.settings))


def budgets_of(settings: PluginSettings) -> dict[str, Any]:
    return {"usd": settings.budget_usd, "tokens": settings.budget_tokens}


def uncounted(settings: PluginSettings) -> list[str]:
    """Which budgets do not hold for the programs that the settings name. Blocks."""
    if not any(budgets_of(settings).values()):
        return []
    words = [default_program(settings), *(command[0] for command in settings.agent_commands.values())]
    names = dict.fromkeys(program_name(word) for word in words if word)
    return [
        problem for name in names for problem in warnings_of(name, reports(PROGRAMS.get(name)), budgets_of(settings))
    ]


def program_name(word: str) -> str:
    return re.sub(r"\.(exe|cmd)$", "", Path(word).name)


def reports(program: Program | None) -> bool:
    return bool(program and (program.telemetry or program.telemetry_argv))


def warnings_of(name: str, reporting: bool, budgets: dict[str, Any]) -> list[str]:
    counted = {"tokens": reporting, "usd": reporting and name in PRICED}
    return [
        f"{name} does not report what it spends in {unit}: --budget-{unit} counts nothing of it"
        for unit, budget in budgets.items() if budget and not counted[unit]
    ]  # fmt: skip


def reporting(command: AgentCommand, url: str, token: str, budgets: dict[str, Any]) -> AgentCommand:
    """The command of an agent whose program then reports to ``url`` with ``token``, which no argument holds."""
    name = program_name(command.argv[0])
    program = PROGRAMS.get(name)
    if program and any(variable in command.environment for variable in ELSEWHERE):
        program = None
    for problem in warnings_of(name, reports(program), budgets):
        log_once(problem)
    if not program or not reports(program):
        return command
    common = {
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"{url}/v1/logs", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/json",
        "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization=Bearer {token}",
    }  # fmt: skip
    told = {name: value.replace("{url}", url) for name, value in program.telemetry.items()}
    argv = [command.argv[0], *(word.replace("{url}", url) for word in program.telemetry_argv), *command.argv[1:]]
    compressed = ("OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_LOGS_COMPRESSION")
    kept = {name: value for name, value in command.environment.items() if name not in compressed}
    return msgspec.structs.replace(command, argv=argv, environment=kept | common | told)


PRICED = ("claude",)  # they report money, the others tokens alone

# Where one of these is set the user has reports sent elsewhere already.
ELSEWHERE = (
    "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "OTEL_LOGS_EXPORTER", "GEMINI_TELEMETRY_ENABLED",
    "GEMINI_TELEMETRY_OUTFILE", "QWEN_TELEMETRY_ENABLED", "QWEN_TELEMETRY_OUTFILE",
)  # fmt: skip
