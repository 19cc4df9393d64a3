"""The interface as an OpenAPI 3.1 document, made from the routes and the types that validate and shape what they carry.

The service answers it under /openapi.json; ``cco schema`` prints it, and writes it with a JSON Schema for each type.
What generators of clients need and Python's types do not say is in the tables below.
"""

from __future__ import annotations

import argparse
import http.client
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    ERROR_OF_STATUS,
    ERRORS,
    GOOD,
    Endpoint,
    EventType,
    Identifier,
    Route,
    StartError,
    WaitForEvents,
    __version__,
    hookimpl,
    import_file,
    routes,
)
from cco_sidecar_plugins._hooks import bundled_plugins
from cco_sidecar_plugins.commands._table import Command, add_commands, arg
from cco_sidecar_plugins.http import _answers as answers
from cco_sidecar_plugins.http._answers import answers_of, problems_of
from cco_sidecar_plugins.http.repeats import takes_keys

ErrorAnswer = answers.ErrorAnswer

DIALECT = "https://json-schema.org/draft/2020-12/schema"
COMPONENTS = "#/components/schemas/"

TAGS = {
    "context": "What an agent needs to know of the project.",
    "results": "What agents have done, and who is next.",
    "events": "Publishing, and waiting for what others publish.",
    "agents": "Agents as processes.",
    "agent-types": "Which types of agents there are.",
    "approvals": "What agents ask people.",
    "runs": "Runs of the pipeline that the service starts.",
    "issues": "Issues as people see them: how each stands, and all that happened.",
    "dashboard": "What the page asks that shows the team at work.",
    "hooks": "What coding programs ask at moments of a session.",
    "cache": "Cached contexts.",
    "auth": "Tokens.",
    "plugins": "What extends the service.",
    "service": "The service itself.",
}

# Types whose fields that are not named are kept (in a request) or may be there (in an answer).
OPEN = {
    "ContextSections", "Event", "EventSubmission", "FileEntry", "ResultBody", "ResultMetrics", "ResultSubmission",
    "StoredResult",
}  # fmt: skip
# Fields that hold an ISO 8601 time which the service wrote itself, so that it is one for certain.
MOMENTS = set(
    "answered_at asked_at ended_at expires_at first_at last_at last_modified last_output_at measured_at started_at"
    " stored_at timestamp AgentCall.at Approval.until TimelineEntry.at".split()
)
CLIENTS_MOMENTS = {"ResultSubmission.timestamp", "StoredResult.timestamp"}

WORDS = {  # of a type, of a field of a type, of a field or parameter of any type: the most specific counts
    "AgentStatistics": "Agents, counted since the storage was made.",
    "Commit": "A commit of the project.",
    "FileEntry": "A file that a result created, changed or deleted.",
    "PluginList": "The plugins of the service.",
    "ResultBody": "What an agent did.",
    "ResultMetrics": "Figures that an agent measured itself.",
    "SpawnRequest": "Body of POST /api/agents/spawn.",
    "StorageStatistics": "What is stored and cached.",
    "EventStatistics": "Events, counted since the storage was made.",
    "AgentStatistics.active": "Agents that are starting or running.",
    "AgentStatistics.completed": "Agents that ended with exit code 0.",
    "AgentStatistics.failed": "Agents that failed, reached their time limit or were lost.",
    "AgentStatistics.killed": "Agents that were ended on demand.",
    "AgentStatistics.spawned_total": "All of them, those that are active too.",
    "AgentStatistics.by_type": "The active ones by agent type.",
    "AgentStatistics.avg_execution_time_ms": "Of the agents that have ended.",
    "EventStatistics.total_published": "Events that were stored.",
    "EventStatistics.total_delivered": "Events in answers to polls; one that two readers got counts twice.",
    "EventStatistics.active_subscriptions": "Polls that wait right now.",
    "EventStatistics.queue_depth": "Retained events that no poll has got yet, whether or not somebody waits.",
    "EventStatistics.avg_delivery_time_ms": "From publishing to the answer, of the last 1000 deliveries since the start"
    " to polls that were waiting already; 0 where there are none.",
    "EventStatistics.dead_letter_queue_size": "Events that expired before any poll got them.",
    "HealthChecks.storage": "healthy, or what is wrong: a write to the storage.",
    "HealthChecks.event_bus": "healthy, or what is wrong: a waiter that is woken.",
    "HealthChecks.memory_usage_mb": "Resident memory of the service.",
    "HealthChecks.cpu_usage_percent": "Of one core, since the check before.",
    "HealthChecks.active_agents": "Agents that are starting or running.",
    "HealthChecks.event_queue_size": "Retained events that no poll has got yet, whether or not somebody waits.",
    "HealthChecks.disk_space_available_mb": "Free space where the storage lies.",
    "watching": "full where the system tells all changes of files; else files are looked at, and it says why.",
    "Health.status": "unhealthy, with 503, where storage or event_bus is not healthy.",
    "Health.uptime_seconds": "Since the service started.",
    "instance_id": "Names this run of the service.",
    "StorageStatistics.context_cache_entries": "Contexts in memory.",
    "StorageStatistics.context_cache_bytes": "Their size.",
    "StorageStatistics.results_stored": "All results.",
    "StorageStatistics.total_size_mb": "Size of the storage on disk.",
    "StorageStatistics.cache_hit_rate": "Share of contexts that came from memory, since the start.",
    "StorageStatistics.limit_mb": "What --storage-limit-mb says.",
    "StorageStatistics.full": "The last body to be stored was refused.",
    "PerformanceStatistics.avg_response_time_ms": "Mean of the requests of the last minute.",
    "PerformanceStatistics.p95_response_time_ms": "95 of 100 requests took no longer.",
    "PerformanceStatistics.p99_response_time_ms": "99 of 100 requests took no longer.",
    "PerformanceStatistics.requests_per_second": "Over the last minute.",
    "PerformanceStatistics.errors_per_minute": "Answers with a status of 400 or more.",
    "PerformanceStatistics.protocols": "What is spoken, and by which server.",
    "PerformanceStatistics.unsent_bytes": "Of answers that wait for their clients.",
    "Context.context": "What the agent needs to know.",
    "Context.truncated": "Whether files, or parts of what was found, were left out.",
    "Context.truncation_strategy": "How it was cut.",
    "Context.total_size_bytes": "Size of `context` as JSON.",
    "Context.estimated_tokens": "The same at 4 bytes a token.",
    "Context.file_count": "Relevant files that it has.",
    "Context.cache_hit": "Whether it was built before.",
    "Context.since": "The answer from which on changes are given; null where it is not known any more.",
    "Context.unchanged_files": "Files that were left out, as they have not changed since.",
    "Context.removed_files": "Files that the earlier answer had and that belong to the context no more.",
    "ContextSections.project_structure": "Its files and folders.",
    "ContextSections.relevant_files": "Files worth reading, best first.",
    "ContextSections.git_context": "The state of git.",
    "ContextSections.previous_agent_outputs": "What earlier agents decided on the issue, oldest first.",
    "ContextSections.metadata": "Facts on the project.",
    "RelevantFile.path": "Relative to the project's root.",
    "RelevantFile.content": "The text, whole unless `truncated`; secrets are redacted.",
    "RelevantFile.size": "Bytes on disk.",
    "RelevantFile.language": "The programming language.",
    "RelevantFile.score": "How well it suits task and agent; higher is better.",
    "RelevantFile.reasons": "Why it is there.",
    "RelevantFile.truncated": "Whether only parts are given.",
    "RelevantFile.redactions": "Secrets in it that were replaced.",
    "RelevantFile.line_ranges": "First and last line of each part.",
    "AgentStatus.state": "Where its process stands.",
    "AgentStatus.exit_code": "Null while it runs, and where nobody knows.",
    "AgentStatus.signal": "The signal that ended it.",
    "AgentStatus.pid": "Its process.",
    "AgentStatus.reason": "Why it could not work, where that is known.",
    "AgentStatus.output_tail": "The last lines that it wrote.",
    "AgentStatus.parent": "The agent that spawned it.",
    "AgentStatus.result_status": "Of its newest result.",
    "AgentStatus.depth": "1 where no agent spawned it, else one more than its parent's.",
    "AgentStatus.run_seconds": "How long it has run.",
    "Spawned.spawned": "Always true: a failure is an error.",
    "Spawned.process_id": "The process that was started.",
    "Spawned.context_injected": "Whether a file with its context was made.",
    "Spawned.jwt_token": "The agent's token.",
    "EventPublished.event_id": "The event's id; ids sort in the order of publishing.",
    "EventPublished.published": "Always true: the event is on disk.",
    "EventPublished.subscriber_count": "How many subjects that are.",
    "Event.event_id": "The event's id; ids sort in the order of publishing.",
    "WaitAnswer.timeout": "True where the time was over before anything came.",
    "ResultStored.id": "The result's id.",
    "ResultStored.stored": "Always true: the result is on disk.",
    "ResultStored.event_published": "Always true: its agent_completed event is stored with it.",
    "ResultStored.event_id": "The id of that event.",
    "NextAgent.priority": "Who goes first.",
    "NextAgent.reason": "The rule that proposes it.",
    "CacheCleared.entries_removed": "Contexts that were forgotten.",
    "CacheCleared.bytes_freed": "Their size.",
    "ContextQuery.task": "What is to be done; ranks the files.",
    "ContextQuery.max_bytes": "Size of the JSON answer at most.",
    "ContextQuery.max_tokens": "The same in tokens, estimated at 4 bytes each; the smaller one counts.",
    "ContextQuery.max_files": "Relevant files at most.",
    "ContextQuery.since": "ETag of an earlier answer: give only the files that changed since.",
    "WaitQuery.timeout": "Milliseconds to wait.",
    "WaitQuery.filter": "For example issue_id:issue-123,status:!failed",
    "WaitQuery.since": "An event id, a cursor, earliest, latest, or a time (UTC).",
    "EventQuery.since": "As for a wait; without it the newest.",
    "ResultQuery.id": "Only results whose id holds this text.",
    "ResultQuery.since": "The id of a result, earliest, or a time (UTC): the ones after it.",
    "AgentQuery.id": "Only agents whose id holds this text.",
    "AgentQuery.status": "States in groups, as /status counts them.",
    "AgentQuery.since": "The id of an agent, earliest, or a time (UTC): the ones after it.",
    "EndQuery.force": "SIGKILL at once, without grace.",
    "CacheQuery.agent_type": "Only this agent type's contexts.",
    "LogQuery.tail": "Only the last lines.",
    "LogQuery.since": "From a next_offset on, or from a time (UTC).",
    "LogQuery.timestamps": "Each line after the time at which it began to arrive.",
    "EventQuery.type": "Only events of this type.",
    "EventQuery.topic": "Only events of this topic.",
    "EventQuery.filter": "Only events that it matches, as for a wait.",
    "EventQuery.dead": "List the dead letters: what expired before it was delivered to anybody. Needs spawn_agents.",
    "ResultQuery.issue_id": "Only results on this issue.",
    "ResultQuery.agent_type": "Only results of this agent type.",
    "ResultQuery.status": "Only results with this status.",
    "AgentQuery.state": "Only agents in this state.",
    "AgentQuery.agent_type": "Only agents of this type.",
    "AgentQuery.issue_id": "Only agents on this issue.",
    "agent_id": "The agent's name, which is its token's subject.",
    "agent_type": "What kind of agent, for example python-specialist.",
    "issue_id": "The issue or task, for example issue-123. Any issue may begin somewhere: it need not be known before.",
    "project_id": "The project, which is the token's.",
    "result_id": "The result's id.",
    "event_type": "The kind of event, for example agent_completed.",
    "ResultSubmission.result": "What was done.",
    "ResultSubmission.timestamp": "When, by the agent's clock; kept as it is.",
    "ResultBody.status": "How it went; decides who is proposed next.",
    "files_created": "Paths, or entries with more about each file.",
    "files_modified": "Paths, or entries with more about each file.",
    "files_deleted": "Paths, or entries with more about each file.",
    "decisions": "What was decided, for the agents that follow.",
    "rationale": "Why.",
    "metrics": "Figures; more of them may be given.",
    "artifacts": "Anything else that is worth keeping, by name.",
    "errors": "What went wrong.",
    "warnings": "What others should look at.",
    "next_steps": "What is left to do.",
    "FileEntry.path": "Relative to the project's root.",
    "FileEntry.size": "Bytes.",
    "FileEntry.language": "The programming language.",
    "FileEntry.checksum": "For example sha256:…",
    "FileEntry.diff": "For example +10 -5.",
    "FileEntry.changes": "What was changed, in words.",
    "execution_time_ms": "Milliseconds.",
    "tokens_used": "Tokens of the model.",
    "test_coverage": "Percent.",
    "lines_of_code": "Lines.",
    "complexity_score": "On the agent's own scale.",
    "publisher": "Who publishes: the token's subject, where the token is bound to one.",
    "topic": "What it is about, for example implementation.",
    "data": "Anything; filters look into it.",
    "EventSubmission.event_type": "The same as in the path, where it is given.",
    "correlation_id": "Ties events together.",
    "ttl_seconds": "How long the event may be delivered.",
    "EventSubmission.priority": "For readers to heed.",
    "task": "What is to be done.",
    "context_requirements": "The sections of the context that the agent needs; all of them where none is named.",
    "context_tokens": "Size of its context file at most, at 4 bytes each; else that of --agent-context-tokens.",
    "environment": "More variables for the agent; those that would change the service's own are passed over.",
    "SpawnRequest.priority": "Given to the agent.",
    "SpawnRequest.permissions": "Narrows what the agent's token allows.",
    "issue_only": "The agent's token works on this issue only.",
    "model": "The model that it asks most; null, as all that follows, where its program does not report it.",
    "requests": "Requests to models.",
    "input_tokens": "Tokens that models read, those from a cache among them.",
    "output_tokens": "Tokens that models wrote.",
    "cached_tokens": "Of the input those that came from a cache.",
    "cost_usd": "US dollars, where the program knows prices.",
    "denials": "Uses of a tool that the program's own rules refused.",
    "next_cursor": "Goes on behind the last item: the next request's `since`.",
    "has_more": "Whether there are more: older ones, or later ones where `since` was given.",
    "scanned_to": "Up to here everything has been looked at; as good a cursor.",
    "more_available": "Whether there are more right now.",
    "missed": "Told once where retention has passed the position that was remembered.",
    "storage_path": "Where it lies on the service's machine.",
    "next_agents": "Who should work on the issue next; empty when it is done.",
    "subscribers_notified": "The subjects whose waiting polls this event woke.",
    "webhook_url": "The path that tells the agent's status.",
    "environment_ignored": "The given variables that were passed over.",
    "ErrorAnswer.error": "The status in words.",
    "ErrorAnswer.code": "What happened, for programs.",
    "message": "What happened, for people.",
    "RpcMessage.jsonrpc": "The version of JSON-RPC.",
    "RpcMessage.method": "What is asked, for example tools/call.",
    "RpcMessage.id": "Names the request in its answer; a notification has none and gets no answer.",
    "RpcMessage.params": "What the method takes.",
    "ApprovalRequest.kind": "An approval is answered by approve or deny, a question by a choice or any text.",
    "ApprovalRequest.text": "What is asked, for a person.",
    "ApprovalRequest.command": "The command that is to be run; one that --agent-may allows is approved at once.",
    "ApprovalRequest.choices": "The answers that a question takes; any text where there are none.",
    "ApprovalRequest.timeout_seconds": "How long an answer is waited for; none means no.",
    "ApprovalRequest.details": "More for whoever answers, such as the tool.",
    "ApprovalAnswer.answer": "approve or deny, one of the choices, or any text where there are none.",
    "ApprovalAnswer.message": "What the agent is told beside it.",
    "ApprovalListQuery.state": "Only those in this state.",
    "ApprovalListQuery.issue_id": "Only those on this issue.",
    "ApprovalWaitQuery.timeout": "How long to wait for an answer, in milliseconds.",
    "approval_id": "Names what was asked; it is the id of its event.",
    "HookInput.hook_event_name": "The moment, in the program's words.",
    "HookInput.session_id": "The session.",
    "HookInput.source": "Why a session starts.",
    "HookInput.tool_name": "The tool for which permission is asked.",
    "HookInput.tool_input": "What it is to do.",
    "HookInput.tool_use_id": "Names its call.",
    "HookQuery.event": "The moment, where the program does not say it in the body.",
    "NewsQuery.timeout": "How long to wait for an event, in milliseconds.",
    "AgentCall.method": "The request's method.",
    "AgentCall.path": "The request's path, without tokens.",
    "AgentCall.at": "When it came.",
    "age_seconds": "Seconds since then.",
    "AgentEnding.ending": "Whether its end was ordered now; false where it has ended before.",
    "AgentEnding.state": "Where its process stands at this moment.",
    "AgentList.agents": "Newest last.",
    "AgentLogs.text": "The output from `offset` on.",
    "AgentLogs.offset": "Bytes of output before `text`.",
    "AgentLogs.next_offset": "Bytes of output up to the end of `text`: the next request's `since`.",
    "AgentStatus.started_at": "When it was started.",
    "AgentStatus.ended_at": "When it ended; null while it runs.",
    "AgentStatus.state_age_seconds": "Seconds since its start, or since its end where it has ended.",
    "AgentStatus.usage": "What its processes use; null before the first measurement.",
    "AgentStatus.last_output_at": "When it last wrote; null where it has not.",
    "AgentStatus.last_output_age_seconds": "Seconds since then.",
    "AgentStatus.last_call": "The last request with its token; null where there was none.",
    "AgentTypeList.agent_types": "By category, then by name.",
    "AgentTypeList.default_program": "Runs the types without a command of their own; null where there is none.",
    "AgentTypeList.configured": "Whether `default_program` comes from the settings.",
    "TypeFacts.category": "What kind of work: it decides permissions and limits.",
    "TypeFacts.permissions": "What its agents' tokens allow.",
    "TypeFacts.per_minute": "Requests a minute; null: no limit.",
    "TypeFacts.from": "Who adds the type: built in, settings, a file of the repository, or a plugin.",
    "AgentUsage.cpu_seconds": "Processor time in all.",
    "AgentUsage.memory_bytes": "Resident memory.",
    "AgentUsage.peak_memory_bytes": "The largest `memory_bytes` that was measured.",
    "AgentUsage.processes": "How many live.",
    "AgentUsage.measured_at": "When that was.",
    "CacheCleared.cleared": "Always true: nothing that is cached is 404.",
    "GitChange.path": "Relative to the project's root.",
    "GitChange.status": "What became of the file.",
    "GitChange.diff": "For example +10 -5: lines; null for untracked and binary files and those that cannot be read.",
    "GitChange.conflict": "Whether git could not merge the file, which may hold its marks of conflict.",
    "ChangedFile.path": "Relative to the project's root.",
    "ChangedFile.status": "What became of the file since; from missing on it is why the difference does not show it.",
    "ResultDiff.files": "Those that the result names.",
    "ResultDiff.diff": "Unified, as git prints it; secrets are redacted.",
    "ResultDiff.truncated": "Whether files, or the end of `diff`, were left out.",
    "ResultDiff.base": "What is compared, in words.",
    "ResultDiff.reason": "Why there is no difference.",
    "Commit.hash": "Its abbreviated name.",
    "Commit.message": "The first line of its message.",
    "Commit.author": "Its author's name.",
    "Commit.timestamp": "When it was committed; null where git can read no date.",
    "Commit.files_changed": "Relative to the project's root; empty where they are not known.",
    "GitState.branch": "The branch that is checked out; null where none is.",
    "GitState.recent_commits": "Newest first.",
    "GitState.uncommitted_changes": "Staged or not.",
    "GitState.in_progress": "What git waits to go on with, such as `merge of other` or `bisect from main`.",
    "GitState.remote": "Its name; null where there is none.",
    "GitState.remote_url": "Without user info.",
    "timestamp": "When the service answered.",
    "Context.timestamp": "When it was built.",
    "Event.timestamp": "When the event was stored.",
    "ResultStored.timestamp": "When the result was stored.",
    "StoredResult.id": "The result's id.",
    "StoredResult.stored_at": "When it was stored.",
    "StoredResult.result": "What was done.",
    "StoredResult.timestamp": "When, by the agent's clock; as it was posted.",
    "ResultList.results": "Newest last.",
    "Event.priority": "For readers to heed.",
    "EventList.events": "Newest last.",
    "WaitAnswer.events": "Oldest first; empty where the time was over.",
    "MissedEvents.position": "Where the reader stood.",
    "MissedEvents.floor": "The oldest position that is left.",
    "Health.service": "What answers: orchestration-sidecar.",
    "version": "The service's version.",
    "Health.checks": "What was tried and measured.",
    "PreviousOutput.agent": "The agent's id.",
    "PreviousOutput.timestamp": "When its result was stored.",
    "PreviousOutput.decision": "Its decisions, joined by semicolons.",
    "PreviousOutput.files_affected": "Paths that it created, changed or deleted.",
    "PreviousOutput.status": "How its work went.",
    "ProjectMetadata.project_type": "By the manifests, for example python.",
    "ProjectMetadata.dependencies": "Names, in their order.",
    "ProjectMetadata.dependency_versions": "The versions that the manifests ask for, by name.",
    "ProjectMetadata.python_version": "The versions of Python that the project asks for.",
    "ProjectMetadata.test_coverage": "Percent of lines, by the newest report.",
    "ProjectMetadata.last_build_status": "success or failed, by the newest report of tests.",
    "ProjectMetadata.last_build_time": "When that report was written.",
    "ProjectMetadata.security_scan_status": "passed or failed, by reports of scanners.",
    "ProjectMetadata.redactions": "Secrets in the context that were replaced.",
    "ProjectMetadata.index": "ready, or building: until then files are ranked by less.",
    "ProjectStructure.root": "The folder, on the service's machine.",
    "ProjectStructure.files": "Relative to the project's root.",
    "ProjectStructure.directories": "Relative to the project's root.",
    "ProjectStructure.total_files": "All files, also those that `files` leaves out.",
    "ProjectStructure.total_size_bytes": "Of all files.",
    "RelevantFile.last_modified": "Of the file on disk.",
    "RelevantFile.checksum": "Of `content`, for example sha256:…",
    "Refreshed.token": "With the same identity and permissions.",
    "expires_at": "When the token expires.",
    "DashboardCode.expires_at": "When the code expires.",
    "Spawned.state": "running; of a repeat for an agent that has ended, how it did.",
    "SpentStatistics.by_issue": "By issue id.",
    "SpentStatistics.by_day": "By day, for example 2026-01-31.",
    "Status.agents": "Counts and times of agents.",
    "Status.storage": "What is stored and cached.",
    "Status.events": "Counts and times of events.",
    "Status.performance": "Requests of the last minute.",
    "Status.spent": "What models cost, as far as programs report it.",
    "StorageStatistics.cluster": "With --backend: the log that is shared with other sidecars.",
    "run_id": "The run's id.",
    "RunQuery.issue_id": "Only runs on this issue.",
    "RunRequest.task": "What is to be done; without it what is known of the issue.",
    "RunRequest.type": "The first agent; without it chief-architect.",
    "RunRequest.until": "Stop when this agent type or category has succeeded.",
    "RunRequest.rounds": "Agents started at most; without it 12.",
    "RunRequest.retries": "A type that fails more often in a row ends it; without it 3.",
    "RunRequest.timeout": "Time limit of each agent in seconds.",
    "RunRequest.restart": "Begin anew, whatever has been done on the issue.",
    "IssueQuery.state": "Only issues that stand so.",
    "IssueQuery.issue_id": "Only this issue.",
    "IssueQuery.since": "A next_cursor, or earliest: what comes after it; also what has moved since then.",
    "TimelineQuery.since": "A next_cursor, or earliest; without it from the beginning.",
    "ExportQuery.format": "The form of the file; without it Accept says so.",
    "TimelineEntry.at": "When.",
    "TimelineEntry.kind": "What happened.",
    "TimelineEntry.id": "The same as long as it is told.",
    "TimelineEntry.title": "What happened, in a line.",
    "CodeSubmission.code": "The code that `cco dashboard` has put behind the page's address.",
    "AgentCounts.active": "Agents that are starting or running.",
    "AgentCounts.ended": "Agents that have ended.",
    "Approval.kind": "An approval is answered by approve or deny, a question by a choice or any text.",
    "Approval.state": "Where it stands: expired where no answer came in time, withdrawn where its agent ended.",
    "Approval.text": "What is asked.",
    "Approval.command": "The command that is to be run; null where it is none.",
    "Approval.choices": "The answers that a question takes; any text where there are none.",
    "Approval.details": "More for whoever answers, such as the tool.",
    "Approval.until": "How long an answer is waited for.",
    "Approval.answer": "What was answered; null while it is open, and where a question got no answer.",
    "Approval.message": "What the agent is told beside the answer.",
    "asked_at": "When it was asked.",
    "answered_by": "The subject of the token that answered, or the rule of --agent-may.",
    "answered_at": "When it was answered.",
    "ApprovalList.approvals": "Newest last.",
    "ClusterPeer.node": "Its name among the sidecars.",
    "ClusterPeer.url": "Where it answers.",
    "applied": "The log's last entry that is in its replica.",
    "ClusterStatistics.backend": "The kind of log: nats.",
    "ClusterStatistics.servers": "What --backend names, without credentials.",
    "ClusterStatistics.connected_to": "The server that is spoken with; null where none is.",
    "ClusterStatistics.away": "The log's servers that are away or not up to date, as their leader says.",
    "ClusterStatistics.problem": "Why nothing can be written; null where nothing is known to be in the way.",
    "ClusterStatistics.stream": "The log's name.",
    "ClusterStatistics.replicas": "How many servers keep it.",
    "ClusterStatistics.synced": "What --nats-synced says.",
    "ClusterStatistics.lag": "Entries of the log that are not in the replica yet.",
    "ClusterStatistics.node": "This sidecar's name among the others.",
    "ClusterStatistics.peers": "The other sidecars.",
    "ClusterStatistics.differs": "What is different from a sidecar alone.",
    "DashboardCode.code": "Opens the dashboard once.",
    "DashboardFacts.root_name": "The name of the project's folder.",
    "DashboardFacts.started_at": "When the service was started.",
    "DashboardFacts.agent_types": "The types of agents that can be spawned.",
    "DashboardFacts.permissions": "What the token allows.",
    "DashboardFacts.limits": "What bounds the work.",
    "DashboardFacts.routes_missing": "Routes that the page works with and this service lacks.",
    "FileCounts.created": "Files that were created.",
    "FileCounts.modified": "Files that were changed.",
    "FileCounts.deleted": "Files that were deleted.",
    "title": "What is to be done, in a line; null where nothing is known.",
    "source": "Where the issue is written down; null where it is not known.",
    "Issue.state": "How it stands.",
    "IssueItem.state": "How it stands.",
    "working": "The agents that work on it now.",
    "latest_result": "Null where there is none.",
    "waiting_for_people": "What agents asked and nobody has answered yet.",
    "run": "The latest run that the service has started on it; null where there is none.",
    "tokens": "Tokens that its agents used, as budgets count them; null where no program reports them.",
    "first_at": "When its first event, agent or result came.",
    "last_at": "When its last event, agent or result came.",
    "Issue.body": "The text of what is to be done.",
    "Issue.agents": "Its newest agents, newest last.",
    "Issue.results": "Its newest results, newest last.",
    "IssueItem.agents": "How many work on it, and how many did.",
    "IssueItem.results": "How many were stored.",
    "IssueList.issues": "Those that something happened on last at the end.",
    "IssueRun.state": "How it stands.",
    "KeyValue.key": "The attribute's name.",
    "KeyValue.value": "An object with one field, named after the value's type.",
    "LatestResult.status": "How the work went.",
    "LatestResult.stored_at": "When it was stored.",
    "LoadedPlugin.name": "Its name.",
    "LoadedPlugin.source": "Where it comes from.",
    "LoadedPlugin.hooks": "The hooks that it implements.",
    "LoadedPlugin.problem": "Why it is not in use; null where it is.",
    "LoadedPlugin.faulty": "Whether its author must mend it before the service starts again.",
    "LoadedPlugin.failures": "How often one of its hooks went wrong.",
    "LoadedPlugin.failure": "What went wrong last; null where nothing did.",
    "LogRecord.body": "The record's text, or another value.",
    "attributes": "Facts by name.",
    "LogRecord.eventName": "What the record is about.",
    "LogRecord.timeUnixNano": "When it happened, in nanoseconds since 1970.",
    "LogRecord.observedTimeUnixNano": "When it was seen, in nanoseconds since 1970.",
    "NamedType.name": "The agent type.",
    "NamedType.category": "What kind of work: it decides permissions and limits.",
    "News.text": "What the session is to hear; empty where nothing came.",
    "News.over": "Whether it need not ask again.",
    "OperatorToken.token": "A token of the type operator.",
    "OperatorToken.permissions": "What it allows.",
    "PluginList.plugins": "Those that are not in use, too.",
    "ResourceLogs.resource": "The program that reports.",
    "ResourceLogs.scopeLogs": "Its records, by part of the program.",
    "RpcFailure.jsonrpc": "The version of JSON-RPC.",
    "RpcFailure.error": "Its `code` and `message`.",
    "RpcFailure.id": "Names the request that failed.",
    "RunDetails.lines": "The last lines that it printed, oldest first.",
    "RunEnding.ending": "Whether its end was ordered now; false where it has ended before.",
    "RunEnding.state": "How it stands at this moment.",
    "RunList.runs": "Newest last.",
    "RunRequest.pause": "Seconds to wait after an agent that failed, twice as long after the next; without it 5.",
    "ScopeLogs.logRecords": "Oldest first.",
    "ServiceLimits.max_agents": "Agents that run at once.",
    "ServiceLimits.max_agents_per_issue": "Agents in all on an issue.",
    "ServiceLimits.agent_timeout_seconds": "How long an agent may run.",
    "ServiceLimits.storage_limit_mb": "Size of the storage; null where it has no limit of its own.",
    "ServiceLimits.event_limit": "Events that are kept.",
    "ServiceLimits.event_retention_seconds": "How long events are kept.",
    "ServiceLimits.budgets": "What may be spent: by unit, then by issue and day.",
    "TimelineEntry.depth": "1 where no agent spawned it, else one more than its parent's.",
    "TimelineEntry.parent": "Who spawned it.",
    "TimelineEntry.permissions": "What its token allows.",
    "TimelineEntry.status": "How the work went.",
    "TimelineEntry.files": "How many files the result names.",
    "TimelineEntry.approval_kind": "approval or question.",
    "TimelineEntry.text": "What is asked.",
    "TimelineEntry.command": "The command that is to be run; null where it is none.",
    "TimelineEntry.state": "How the agent ended, or what became of what was asked.",
    "TimelineEntry.answer": "What was answered; null where nothing was.",
    "TimelineEntry.exit_code": "Null where nobody knows.",
    "TimelineEntry.signal": "The signal that ended it.",
    "TimelineEntry.reason": "Why it could not work, where that is known.",
    "TimelineEntry.duration_seconds": "How long it ran.",
    "TimelineEntry.cpu_seconds": "Processor time in all.",
    "TimelineEntry.peak_memory_bytes": "Resident memory at its most.",
    "TimelineEntry.output_tail": "The last lines that it wrote.",
    "TimelinePage.entries": "Oldest first.",
    "WorkingAgent.state": "Where its process stands.",
    "Run.state": "How it stands.",
    "Run.started_at": "When it was started.",
    "Run.ended_at": "When it ended; null while it goes on.",
    "Run.exit_code": "As that of `cco run`; null while it goes on, and where nobody knows.",
    "Run.reason": "What it said at its end.",
    "Run.started_by": "The subject of the token that started it.",
    "RunDetails.state": "How it stands.",
    "RunDetails.started_at": "When it was started.",
    "RunDetails.ended_at": "When it ended; null while it goes on.",
    "RunDetails.exit_code": "As that of `cco run`; null while it goes on, and where nobody knows.",
    "RunDetails.reason": "What it said at its end.",
    "RunDetails.started_by": "The subject of the token that started it.",
    "program": "The coding program, for example claude.",
    "request_id": "Names the request in the service's log; also in X-Request-ID.",
    "details": "More for programs, by code.",
    "retry_after_seconds": "When to try again; also in Retry-After.",
    "limit": "How many at most, 1 to 1000.",
    "ErrorAnswer.limit": "Requests a minute.",
}

HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-ID": ("Names the request in the service's log.", {"type": "string", "pattern": "^req-"}),
    "X-Ignored": ("Parameters and fields of the request that are unknown here.", {"type": "string"}),
    "X-RateLimit-Limit": ("Requests a minute; absent where there is no limit.", {"type": "integer", "minimum": 1}),
    "X-RateLimit-Remaining": ("Requests that would be answered right now.", {"type": "integer", "minimum": 0}),
    "X-RateLimit-Reset": (
        "When all of them will be there again, in seconds since 1970.",
        {"type": "integer", "minimum": 0},
    ),
    "X-Refreshed-Token": (
        "A token in place of the one that was sent, in the last five minutes of its life.",
        {"type": "string"},
    ),
    "Idempotent-Replay": (
        "There, and true, where this is the first answer again.",
        {"type": "string", "enum": ["true"]},
    ),
    "ETag": ("Names this state of the context, for If-None-Match and `since`.", {"type": "string", "pattern": '^W/"'}),
    "Allow": ("The methods of this path.", {"type": "string"}),
    "Retry-After": ("Seconds until a repeat may succeed.", {"type": "integer", "minimum": 0}),
    "WWW-Authenticate": ("How to authenticate.", {"type": "string", "enum": ["Bearer"]}),
    "Accept-Encoding": ("What a body may be encoded with.", {"type": "string", "enum": ["identity"]}),
}
REQUIRED_HEADERS = {"X-Request-ID", "ETag", "Allow", "WWW-Authenticate"}
OF_TOKENS = ("X-Ignored", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-Refreshed-Token")
OF_STATUS = {401: ["WWW-Authenticate"], 405: ["Allow"], 415: ["Accept-Encoding"], 429: ["Retry-After"],
             503: ["Retry-After"]}  # fmt: skip

EVERYWHERE = (400, 403, 404, 405, 408, 413, 414, 431, 500, 503)
MORE_CODES = {  # that ERRORS has under another status
    404: {"AGT_002": "Unknown agent type"},
    409: {"REQ_001": "It was answered before, can be no longer, or goes on already"},
    414: {"REQ_004": "Request line too long"},
    431: {"REQ_004": "Headers too large"},
}
NOT_MODIFIED = 304
ALSO: dict[str, dict[str, Any]] = {  # other forms of an endpoint's answer
    "GetContext": {
        "text/markdown": {"schema": {"type": "string", "description": "The brief: 10 kB at most, short lines."}}
    },
    "ExportIssue": {"text/markdown": {"schema": {"type": "string", "description": "The same to read."}}},
    "AnswerMcp": {
        "text/event-stream": {"schema": {"type": "string", "description": "Signs of life, then the answer."}}
    },
}


@hookimpl
def register_routes() -> list[Route]:
    return [DOCUMENT]


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "schema": Command("print the OpenAPI document", command_schema, [
            arg("--write", metavar="DIR", help="write it and the JSON Schemas there")], section="Set up"),
    })  # fmt: skip


class GetOpenAPI(Endpoint):
    """This interface as an OpenAPI 3.1 document."""

    public = True
    answers = {200: dict[str, Any]}

    async def respond(self) -> dict[str, Any]:
        settings = self.application.settings
        if "openapi" not in settings:
            settings["openapi"] = openapi([route for route, _ in self.application.served])
        return settings["openapi"] | {"servers": [server(f"{self.request.protocol}://{self.request.host}")]}


DOCUMENT = Route("GET", "/openapi.json", GetOpenAPI)


def command_schema(options: argparse.Namespace) -> int:
    bundled = map(import_file, bundled_plugins("def register_routes("))
    rows = [*routes(), *(row for module in bundled for row in module.register_routes())]
    table = list({(row.method, row.path): row for row in rows}.values())
    documents = {"openapi.json": openapi(table)}
    schemas = describe_types(shapes_of(table))
    for shape in shapes_of(table):
        documents[f"{shape.__name__}.schema.json"] = alone(shape.__name__, schemas)
    if options.write is None:
        print(json.dumps(documents["openapi.json"], indent=2))
        return GOOD
    if not options.write:
        raise StartError("--write: must name a folder")
    folder = Path(options.write)
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    print(f"{len(documents)} documents written to {folder}")
    return GOOD


def openapi(table: list[Route]) -> dict[str, Any]:
    """The document of these routes, without the page's, which are for browsers. Takes 20 ms."""
    table = [row for row in table if not row.path.startswith("/dashboard")]
    paths: dict[str, Any] = {}
    for row in table:
        paths.setdefault(row.path, {})[row.method.lower()] = describe_operation(row)
    statuses = sorted({status for row in table for status in refusals_of(row.endpoint)})
    known = [tag for tag in TAGS if tag in {tag_of(row.path) for row in table}]
    tags = dict.fromkeys([*known, *(tag_of(row.path) for row in table)])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Orchestration Sidecar",
            "version": __version__,
            "description": "Coordinates coding agents in a repository. Answers have an X-Request-ID and are JSON unless"
            " a response says otherwise.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [server("http://localhost:3001")],
        "tags": [{"name": tag, **({"description": TAGS[tag]} if tag in TAGS else {})} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": describe_types(shapes_of(table)),
            "responses": {name_of(status): describe_refusal(status) for status in statuses},
            "headers": {name: describe_header(name) for name in HEADERS},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "Spawned agents find theirs in $JWT_TOKEN.",
                }
            },
        },
        "security": [{"bearer": []}],
    }


def server(url: str) -> dict[str, str]:
    return {"url": url, "description": "The service of one repository."}


# -- operations


def describe_operation(row: Route) -> dict[str, Any]:
    endpoint = row.endpoint
    words = prose(endpoint.__doc__ or endpoint.__name__)
    needs = [f"Needs the permission `{endpoint.permission}`."] if endpoint.permission else []
    operation: dict[str, Any] = {
        "operationId": endpoint.__name__[0].lower() + endpoint.__name__[1:],
        "tags": [tag_of(row.path)],
        "summary": re.split(r"(?<=\w)[.;:]\s|\.$", words, maxsplit=1)[0],
        "description": "\n\n".join([words, *needs]),
        "parameters": [*in_path(row), *in_query(endpoint), *in_header(endpoint)],
        "responses": describe_answers(endpoint),
    }
    if endpoint.body:
        content = {"application/json": {"schema": reference_to(endpoint.body)}}
        operation["requestBody"] = {"description": summary_of(endpoint.body), "required": True, "content": content}
    if endpoint.public:
        operation["security"] = []
    if endpoint.permission:
        operation["x-permission"] = endpoint.permission
    return operation


def tag_of(path: str) -> str:
    return path.split("/")[2] if path.startswith("/api/") else "service"


def describe_answers(endpoint: type[Endpoint]) -> dict[str, Any]:
    """By status: the endpoint's own answers, and the refusals, which are the same everywhere."""
    described: dict[str, Any] = {}
    metered = () if endpoint.public else OF_TOKENS
    replay = ("Idempotent-Replay",) if takes_keys(endpoint) else ()
    etag = ("ETag",) if NOT_MODIFIED in problems_of(endpoint) else ()
    refusals = refusals_of(endpoint)
    for status, shape in answers_of(endpoint).items():
        schema: dict[str, Any] = (
            reference_to(shape) if is_struct(shape) else {"type": "object", "additionalProperties": True}
        )
        if status in refusals:
            schema = {"oneOf": [schema, reference_to(ErrorAnswer)]}
        words = summary_of(shape) if is_struct(shape) else http.client.responses[status]
        headers = headers_of("X-Request-ID", *metered, *replay, *etag, *OF_STATUS.get(status, ()))
        text = {endpoint.content_type: {"schema": {"type": "string"}}}
        content = (text if shape is str else {"application/json": {"schema": schema}}) | ALSO.get(endpoint.__name__, {})
        described[str(status)] = {"description": words, "headers": headers}
        described[str(status)] |= {"content": content} if shape is not None else {}
    if etag:
        described[str(NOT_MODIFIED)] = {
            "description": "What If-None-Match names is how things are.",
            "headers": headers_of("X-Request-ID", *metered, *etag),
        }  # fmt: skip
    for status in sorted(refusals):
        described.setdefault(str(status), {"$ref": f"#/components/responses/{name_of(status)}"})
    return described


def refusals_of(endpoint: type[Endpoint]) -> set[int]:
    """The statuses under which an endpoint answers with an error."""
    beyond = {401, 429} - ({401, 429} if endpoint.public else set()) | ({415} if endpoint.body else set())
    beyond |= {422} if takes_keys(endpoint) else set()
    return {*EVERYWHERE, *beyond, *problems_of(endpoint)} - {NOT_MODIFIED}


def describe_refusal(status: int) -> dict[str, Any]:
    codes = {code: words for code, (usual, words) in ERRORS.items() if usual == status} | MORE_CODES.get(status, {})
    return {
        "description": "; ".join(f"{words} ({code})" for code, words in codes.items()) or http.client.responses[status],
        "headers": headers_of("X-Request-ID", *OF_TOKENS, *OF_STATUS.get(status, ())),
        "content": {"application/json": {"schema": reference_to(ErrorAnswer)}},
    }


def name_of(status: int) -> str:
    """For example TooManyRequests. Not http.client's names, which differ between versions of Python."""
    return ERROR_OF_STATUS.get(status, f"status_{status}").title().replace("_", "")


def headers_of(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def describe_header(name: str) -> dict[str, Any]:
    words, schema = HEADERS[name]
    return {"description": words, **({"required": True} if name in REQUIRED_HEADERS else {}), "schema": schema}


# -- parameters


def in_path(row: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", row.path):
        schema = refined(msgspec.json.schema(EventType if name == "event_type" else Identifier))
        words = WORDS.get(name, name)
        if row.endpoint is WaitForEvents:
            schema["pattern"] = rf"^(\*|{schema['pattern'][1:-1]})$"
            words += " `*` is any."
        yield parameter(name, "path", words, schema)


def in_query(endpoint: type[Endpoint]) -> Iterator[dict[str, Any]]:
    shape = endpoint.query_type
    if shape is None:
        return
    for name, schema in msgspec.json.schema(shape)["$defs"][shape.__name__].get("properties", {}).items():
        default = schema.pop("default", None)
        if "anyOf" in schema:  # absent is null: in a query there is no other way to say it
            (schema,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
        schema = refined(schema)
        words = schema.pop("description", None) or words_for(shape.__name__, name)
        shown = {} if default in (None, "") else {"default": default}
        yield parameter(name, "query", words, schema | shown)


def in_header(endpoint: type[Endpoint]) -> Iterator[dict[str, Any]]:
    if takes_keys(endpoint):
        schema = {"type": "string", "pattern": "^[ -~]{1,255}$"}
        words = "A repeat with the same key and body gives the first answer again, for 24 hours."
        yield parameter("Idempotency-Key", "header", words, schema)
    if NOT_MODIFIED in problems_of(endpoint):
        words = "The ETag of an earlier answer: 304 where it still holds."
        yield parameter("If-None-Match", "header", words, {"type": "string"})


def parameter(name: str, place: str, words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "description": words, "schema": schema}


# -- types


def shapes_of(table: Iterable[Route]) -> list[type[msgspec.Struct]]:
    """The types of bodies and answers, by name."""
    found = {
        shape for row in table for shape in (*answers_of(row.endpoint).values(), row.endpoint.body) if is_struct(shape)
    }
    return sorted(found | {ErrorAnswer}, key=lambda shape: shape.__name__)


def is_struct(shape: Any) -> bool:
    return isinstance(shape, type) and issubclass(shape, msgspec.Struct)


def reference_to(shape: Any) -> dict[str, Any]:
    return {"$ref": COMPONENTS + shape.__name__}


def summary_of(shape: Any) -> str:
    return prose(shape.__doc__ or words_for(shape.__name__, shape.__name__)).partition("\n\n")[0]


def prose(docstring: str) -> str:
    """A docstring's paragraphs, each in one line: how the source breaks its lines is not a part of the interface."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(docstring)).replace("``", "`")


def describe_types(shapes: list[type[msgspec.Struct]]) -> dict[str, Any]:
    """A schema by name for these types and those within them."""
    _, schemas = msgspec.json.schema_components(shapes, ref_template=COMPONENTS + "{name}")
    for name, schema in schemas.items():
        describe_fields(name, schema)
    schemas["ErrorAnswer"]["properties"]["code"]["enum"] = list(ERRORS)
    return {name: refined(schemas[name]) for name in sorted(schemas)}


def describe_fields(name: str, schema: dict[str, Any]) -> None:
    schema["description"] = prose(schema.get("description") or words_for(name, name))
    if name in OPEN:
        schema["additionalProperties"] = True
    for field in [field for field, value in schema["properties"].items() if value.get("type") == "null"]:
        del schema["properties"][field]  # it has nothing to say, and some generators have no type for it
    for field, value in schema["properties"].items():
        # Generators take a field with a default for one that is always there, in what is sent as in what comes.
        default = value.pop("default", None)
        words = value.pop("description", None) or words_for(name, field)
        if words and default not in (None, "", [], {}):
            words += f" Default: {json.dumps(default)}."
        if words:
            value["description"] = words
        if {field, f"{name}.{field}"} & MOMENTS and f"{name}.{field}" not in CLIENTS_MOMENTS:
            (value["anyOf"][0] if "anyOf" in value else value)["format"] = "date-time"


def words_for(shape: str, field: str) -> str:
    return WORDS.get(f"{shape}.{field}", WORDS.get(field, ""))


def refined(schema: Any) -> Any:
    """A schema in the words of ECMA 262 and JSON Schema: patterns, types beside enums, objects that hold anything."""
    if isinstance(schema, list):
        return [refined(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    better = {
        key: refined(value) for key, value in schema.items()
    }  # the properties of an object go this way too: a field may be named `pattern`
    if isinstance(better.get("pattern"), str):
        better["pattern"] = better["pattern"].replace(
            r"\Z", "$"
        )  # ECMA's end; Python's `$` would let a last newline pass
        better.setdefault("type", "string")
    if isinstance(better.get("enum"), list) and all(isinstance(value, str) for value in better["enum"]):
        better.setdefault("type", "string")
    if better.get("type") == "object" and not better.keys() & {"properties", "additionalProperties"}:
        better["additionalProperties"] = True
    if better.get("type") == "array" and not better.keys() & {"items", "prefixItems"}:
        better["items"] = {}
    if better.get("items") is False and better.get("maxItems") == len(better.get("prefixItems", ())):
        # Says nothing that maxItems does not, but some generators want a schema here, and one that is no boolean.
        kinds = better["prefixItems"]
        better["items"] = kinds[0] if kinds.count(kinds[0]) == len(kinds) else {}
    if isinstance(better.get("description"), str):
        better["description"] = better["description"].replace("``", "`")
    return better


def alone(name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a type as a document of its own, with the types within it."""
    needed, todo = set(), [name]
    while todo:
        if (current := todo.pop()) not in needed:
            needed.add(current)
            todo += re.findall(rf'"{COMPONENTS}(\w+)"', json.dumps(schemas[current]))
    text = json.dumps({key: schemas[key] for key in sorted(needed)}).replace(COMPONENTS, "#/$defs/")
    return {"$schema": DIALECT, "$ref": f"#/$defs/{name}", "$defs": json.loads(text)}
