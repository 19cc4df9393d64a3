"""The Model Context Protocol at /mcp, as clients of each revision speak it, over HTTP with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import mcp as mcp_sdk
import psutil
import pytest
import requests
from agent_harness import COMMAND, nothing_left, spawn, state
from conftest import Client, Service, plugin, serving, until
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

__all__ = ["nothing_left"]

MODERN, OLDER = "2026-07-28", ("2025-11-25", "2025-06-18")
META = "io.modelcontextprotocol/"
ACCEPT = {"Accept": "application/json, text/event-stream"}
READING = ["brief", "context", "results", "wait_for_events", "agents"]
PAGE = 10_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("shared"), *COMMAND) as running:
        yield running


class Mcp:
    """A client of /mcp with one token. ``revision`` None says no revision, as gemini does."""

    def __init__(self, client: Client, revision: str | None = MODERN) -> None:
        self.client, self.revision, self.number = client, revision, 0

    def post(self, method: str, meta: dict[str, Any] | None = None, **params: Any) -> requests.Response:
        self.number += 1
        headers = dict(ACCEPT)
        if self.revision:
            headers["MCP-Protocol-Version"] = self.revision
        if self.revision == MODERN:
            own = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
            params["_meta"] = own | (meta or {})
            headers |= {"Mcp-Method": method}
            if name := params.get("name") or params.get("uri"):
                headers["Mcp-Name"] = name
        elif meta:
            params["_meta"] = meta
        body = {"jsonrpc": "2.0", "id": self.number, "method": method, "params": params}
        return self.client.post("/mcp", body, headers=headers, timeout=60)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        answer = self.post(method, **params)
        assert answer.status_code == 200, answer.text
        message = message_of(answer)
        assert message["id"] == self.number and "error" not in message, message
        return message["result"]  # type: ignore[no-any-return]

    def call(self, name: str, **arguments: Any) -> str:
        """The text of a tool's answer."""
        failed, text = self.outcome(name, **arguments)
        assert not failed, text
        return text

    def outcome(self, name: str, **arguments: Any) -> tuple[bool, str]:
        result = self.ask("tools/call", name=name, arguments=arguments)
        (content,) = result["content"]
        assert content["type"] == "text" and "structuredContent" not in result
        assert len(content["text"].encode()) <= PAGE
        return result["isError"], content["text"]


def message_of(answer: requests.Response) -> dict[str, Any]:
    if answer.headers["Content-Type"] != "text/event-stream":
        return answer.json()  # type: ignore[no-any-return]
    return messages_of(answer)[-1]


def messages_of(answer: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.content.decode().splitlines() if line.startswith("data: ")]


@pytest.fixture
def mcp(service: Service, issue: str) -> Mcp:
    """An architect."""
    return Mcp(service.client())


@pytest.fixture
def coder(service: Service, issue: str) -> Mcp:
    """An agent whose token is for its issue alone."""
    return Mcp(service.client("python-specialist", issue_id=issue, bound=True))


# -- the protocol


def test_each_revision_is_spoken_on_one_endpoint(service: Service) -> None:
    known = Mcp(service.client()).ask("server/discover")
    assert known["supportedVersions"] == [MODERN, *OLDER] and known["capabilities"] == {"tools": {}, "resources": {}}
    assert (known["resultType"], known["cacheScope"]) == ("complete", "private") and known["ttlMs"] > 0
    assert known["_meta"][META + "serverInfo"]["name"] == "cco-sidecar"
    for wanted, given in ((OLDER[0], OLDER[0]), (OLDER[1], OLDER[1]), ("2024-11-05", OLDER[0]), (MODERN, OLDER[0])):
        older = Mcp(service.client(), None)
        told = older.ask("initialize", protocolVersion=wanted, capabilities={}, clientInfo={"name": "c"})
        assert told["protocolVersion"] == given and told["instructions"] == known["instructions"]
        older.revision = given
        assert older.ask("ping") == {}
        listed = older.ask("tools/list")
        assert listed == {"tools": Mcp(service.client()).ask("tools/list")["tools"]}
    assert len(known["instructions"].splitlines()) == 5


@pytest.mark.parametrize("revision", [MODERN, *OLDER, None])
def test_a_notification_is_taken_and_not_answered(service: Service, revision: str | None) -> None:
    headers = ACCEPT | ({"MCP-Protocol-Version": revision} if revision else {})
    body = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    answer = service.client().post("/mcp", body, headers=headers)
    assert (answer.status_code, answer.content) == (202, b"")


def modern(method: str = "tools/call", name: str | None = "agents", **more: Any) -> dict[str, Any]:
    meta = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
    params = {"name": name, "_meta": meta} if name else {"_meta": meta}
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params} | more


def older(method: str = "tools/call", **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}


GOOD = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "agents"}
V25 = {"MCP-Protocol-Version": OLDER[0]}
LACKING = modern()["params"] | {"_meta": {META + "protocolVersion": MODERN}}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "said"),
    [
        (b"", {}, 400, -32700, "not JSON"),
        (b"{", {}, 400, -32700, "not JSON"),
        (b"\xff", {}, 400, -32700, "not JSON"),
        (b"[" * 100_000, {}, 400, -32600, "Batches"),
        (b'{"params": ' + b"[" * 100_000, {}, 400, -32700, "nested too deeply"),
        ([older()], V25, 400, -32600, "Batches"),
        (b"3", {}, 400, -32600, "Expected"),
        ({"id": 1, "method": "ping"}, {}, 400, -32600, "jsonrpc"),
        ({"jsonrpc": "AAA", "id": 1, "method": "ping"}, {}, 400, -32600, "jsonrpc"),
        ({"jsonrpc": "2.0", "id": 1, "result": {}}, V25, 400, -32600, "method"),
        (older() | {"id": None}, {}, 400, -32600, "id"),
        (older() | {"id": 1.5}, {}, 400, -32600, "id"),
        (older() | {"params": []}, {}, 400, -32600, "params"),
        (older(_meta=3), {}, 400, -32602, "_meta"),
        (older(name="no"), V25, 200, -32602, "Unknown tool: no"),
        (older(name="breif"), {}, 200, -32602, "did you mean brief?"),
        (older(name={}), {}, 200, -32602, "Unknown tool"),
        (older(name="agents", arguments=[]), {}, 200, -32602, "arguments"),
        (older("prompts/list"), V25, 200, -32601, "prompts/list"),
        (older("server/discover"), {}, 200, -32601, "server/discover"),
        (older("resources/read", uri="cco://no"), {}, 200, -32602, "not found"),
        (older("ping"), {"MCP-Protocol-Version": "2025-03-26"}, 400, -32022, "Unsupported"),
        (older("ping"), {"MCP-Protocol-Version": "1900-01-01"}, 400, -32022, "Unsupported"),
        (older("ping"), {"MCP-Protocol-Version": MODERN}, 400, -32602, "clientCapabilities"),
        (modern(), {}, 400, -32020, "MCP-Protocol-Version is missing"),
        (modern(), GOOD | V25, 400, -32020, "MCP-Protocol-Version"),
        (modern(), {"MCP-Protocol-Version": MODERN}, 400, -32020, "Mcp-Method is missing"),
        (modern(), GOOD | {"Mcp-Method": "tools/list"}, 400, -32020, "Mcp-Method"),
        (modern(), GOOD | {"Mcp-Name": "brief"}, 400, -32020, "Mcp-Name"),
        (modern(), GOOD | {"Mcp-Name": "=?base64?!?="}, 400, -32020, "Mcp-Name"),
        (modern(params=LACKING), GOOD, 400, -32602, "clientCapabilities"),
        (modern("initialize", None), GOOD | {"Mcp-Method": "initialize"}, 404, -32601, "initialize"),
        (modern("no", None), GOOD | {"Mcp-Method": "no"}, 404, -32601, "Method not found: no"),
        (modern(name="no"), GOOD | {"Mcp-Name": "no"}, 400, -32602, "Unknown tool: no"),
    ],
)  # fmt: skip
def test_what_is_no_good_message_is_told_so(
    service: Service, body: Any, headers: dict[str, str], status: int, code: int, said: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = ACCEPT | {"Content-Type": "application/json"} | headers
    answer = service.client().request("POST", "/mcp", data=content, headers=headers)
    told = answer.json()
    assert (answer.status_code, told["error"]["code"]) == (status, code), told
    assert said in told["error"]["message"] and told["jsonrpc"] == "2.0"
    assert told.get("id") == (7 if isinstance(body, dict) and code != -32600 else None)
    if code == -32022:
        assert told["error"]["data"] == {
            "supported": [MODERN, *OLDER],
            "requested": headers["MCP-Protocol-Version"],
        }


def test_a_name_in_base64_is_read(service: Service) -> None:
    headers = ACCEPT | GOOD | {"Mcp-Name": "=?base64?YWdlbnRz?="}
    assert service.client().post("/mcp", modern(), headers=headers).status_code == 200


def test_what_is_refused_before_it_is_a_message_is_an_error_of_the_api(service: Service) -> None:
    client = service.client()
    for method, headers, allowed in (
        ("GET", {}, "OPTIONS, POST"),  # no stream is offered
        ("GET", {"Last-Event-ID": '["of-another", true, {}]'}, "OPTIONS, POST"),
        ("DELETE", {}, "GET, HEAD, OPTIONS, POST"),
    ):
        answer = client.request(method, "/mcp", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (405, "REQ_003")
        assert answer.headers["Allow"] == allowed
    for headers, status, code in (
        ({"Host": "evil.example"}, 403, "REQ_007"),
        ({"Origin": "https://evil.example"}, 403, "REQ_007"),
        ({"Authorization": "Bearer no"}, 401, "AUTH_001"),
        ({"Content-Type": "text/plain"}, 415, "REQ_005"),
    ):
        answer = client.request("POST", "/mcp", data="{}", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    answer = client.request("POST", "/mcp", data=b" " * (33 * 1024 * 1024))
    assert (answer.status_code, answer.json()["code"]) == (413, "REQ_004")
    page = client.request("OPTIONS", "/mcp", headers={"Origin": "http://localhost:6274"})
    assert {"MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"} <= set(
        page.headers["Access-Control-Allow-Headers"].split(", ")
    )


# -- the tools


def test_tools_are_those_that_the_token_allows(service: Service) -> None:
    def names(agent_type: str, **claims: Any) -> list[str]:
        return [tool["name"] for tool in Mcp(service.client(agent_type, **claims)).ask("tools/list")["tools"]]

    assert names("chief-architect") == list(plugin("mcp").TOOLS)
    coding = set(names("python-specialist"))
    assert coding == {*READING, "store_result", "publish_event"} & coding | coding - {"spawn_agent"}
    assert {"store_result", "publish_event"} <= coding and "spawn_agent" not in coding
    assert not {"store_result", "publish_event"} & set(names("documentation-expert"))
    assert "wait_for_events" in names("python-specialist", permissions=[])
    assert "brief" not in names("python-specialist", permissions=[])
    failed, text = Mcp(service.client("python-specialist")).outcome("spawn_agent", agent_type="test-engineer")
    assert failed and text == "AUTH_003: This token lacks the permission spawn_agents"


def test_each_tool_is_described_as_every_program_takes_it(mcp: Mcp) -> None:
    for tool in mcp.ask("tools/list")["tools"]:
        jsonschema.Draft202012Validator.check_schema(tool["inputSchema"])
        text = json.dumps(tool["inputSchema"])
        assert not any(f'"{word}"' in text for word in ("$ref", "anyOf", "oneOf", "pattern", "null")), text
        assert all(field["description"] for field in tool["inputSchema"]["properties"].values()), tool["name"]
        hints = tool["annotations"]  # under which codex runs it unasked
        assert hints["readOnlyHint"] is (tool["name"] in READING) and hints["openWorldHint"] is False
        assert hints["readOnlyHint"] or hints["destructiveHint"] is False


def test_an_agent_works_through_tools_alone(service: Service, mcp: Mcp, coder: Mcp, issue: str) -> None:
    first = coder.call("brief")
    assert first.startswith(f"# Brief for `python-specialist` on `{issue}`") and "call `store_result`" in first
    assert "curl" not in first.lower(), "whoever has the tool has the others, too"
    assert "src/session_store.py" in coder.call("context", task="session store")
    assert coder.call("context", file="src/session_store.py", first_line=2, last_line=2).splitlines()[1:] == [
        "    def save_cookie(self, cookie):",
        "[lines 2-2 of 4]",
    ]
    assert json.loads(coder.call("context", section="metadata"))["project_type"] == "python"
    done = {"status": "success", "decisions": ["a cookie"], "files_modified": ["src/main.py"], "idempotency_key": "k"}
    first, second = coder.call("store_result", **done), coder.call("store_result", **done)
    assert "test-engineer (high)" in first and "before, by the first call" in second
    (result_id,) = {text.split()[2].rstrip(".") for text in (first, second)}
    assert "a cookie" in coder.call("brief") and result_id in coder.call("results")
    assert json.loads(coder.call("results", result_id=result_id))["result"]["files_modified"] == ["src/main.py"]
    assert "It woke: nobody" in coder.call("publish_event", event_type="progress", data={"message": "half"})
    events = mcp.call("wait_for_events", filter=f"issue_id:{issue}", timeout_seconds=0).splitlines()
    told = [json.loads(line) for line in events[1:]]
    assert [event["event_type"] for event in told] == ["agent_completed", "progress"]
    assert told[1]["data"] == {"message": "half", "issue_id": issue} and told[1]["topic"] == "progress"
    assert "No event came" in mcp.call("wait_for_events", filter=f"issue_id:{issue}", timeout_seconds=0)
    until(lambda: service.audit()[-1]["path"] == "/mcp/publish_event")
    lines = [line for line in service.audit() if line["issue_id"] == issue]
    assert [(line["path"], line["outcome"], line["result_id"]) for line in lines] == [
        ("/mcp/store_result", "done", result_id),
        ("/mcp/store_result", "done", result_id),
        ("/mcp/publish_event", "done", None),
    ]


def test_an_agent_is_started_and_looked_at(service: Service, mcp: Mcp, issue: str) -> None:
    asked = {"agent_type": "python-specialist", "issue_id": issue, "task": "print hello", "idempotency_key": issue}
    first, second = mcp.call("spawn_agent", **asked), mcp.call("spawn_agent", **asked)
    agent_id = first.split()[1].rstrip(":")
    assert second.split()[1] == agent_id and "eyJ" not in first + second
    state(service.client(), agent_id)
    assert agent_id in mcp.call("agents", issue_id=issue) and "1 agent." in mcp.call("agents", issue_id=issue)
    assert json.loads(mcp.call("agents", agent_id=agent_id))["agent_id"] == agent_id


def test_each_of_two_agents_on_an_issue_reads_its_own_task(service: Service, mcp: Mcp, issue: str) -> None:
    tasks = ["hang for the cookie of SessionStore", "hang for the words of greet"]
    tokens = [spawn(service.client(), task, issue)["jwt_token"] for task in tasks]

    def told(token: str) -> list[str]:
        agent, path = Client(service.url, token), f"/api/context/{issue}/python-specialist"
        tools = Mcp(agent)
        (resource,) = tools.ask("resources/list")["resources"]
        (content,) = tools.ask("resources/read", uri=resource["uri"])["contents"]
        asked = agent.request("GET", path, headers={"Accept": "text/markdown"})
        return [tools.call("brief"), content["text"], asked.text, tools.call("brief", issue_id=issue)]

    for token, own, other in zip(tokens, tasks, reversed(tasks), strict=True):
        assert all(own in text and other not in text for text in told(token))
    assert tasks[1] in mcp.call("brief", issue_id=issue, agent_type="python-specialist")


def test_a_spawned_agent_leaves_out_its_issue(service: Service, issue: str) -> None:
    started = spawn(service.client(), "hang", issue)
    agent = Mcp(Client(service.url, started["jwt_token"]))
    assert f"on `{issue}`" in agent.call("brief")
    (resource,) = agent.ask("resources/list")["resources"]
    (content,) = agent.ask("resources/read", uri=resource["uri"])["contents"]
    assert content["mimeType"] == "text/markdown" and content["text"] == agent.call("brief")
    assert "Stored as" in agent.call("store_result", status="partial")
    row = service.client().get("/api/results", issue_id=issue).json()["results"][-1]
    assert (row["agent_id"], row["agent_type"]) == (started["agent_id"], "python-specialist")
    shown = json.loads(agent.call("agents", agent_id=started["agent_id"]))["last_call"]
    assert (shown["method"], shown["path"]) == ("POST", "/mcp/agents")
    assert Mcp(service.client()).ask("resources/list")["resources"] == []
    (template,) = Mcp(service.client()).ask("resources/templates/list")["resourceTemplates"]
    uri = template["uriTemplate"].replace("{issue_id}", issue)
    assert issue in Mcp(service.client()).ask("resources/read", uri=uri)["contents"][0]["text"]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("brief", {}, "REQ_001: issue_id is missing"),
        ("brief", {"issue_id": "a b"}, "issue_id"),
        ("brief", {"issue_id": "i", "agent_type": "wizard"}, "AGT_002: Unknown agent type wizard"),
        ("context", {"issue_id": "i", "section": "no"}, "section must be one of project_structure"),
        ("context", {"issue_id": "i", "file": "../../etc/passwd"}, "REQ_002: ../../etc/passwd is no text file"),
        ("context", {"issue_id": "i", "file": ".git/config"}, "REQ_002"),
        ("context", {"issue_id": "i", "file": "src/main.py", "first_line": 9}, "src/main.py has 3 lines"),
        ("context", {"issue_id": "i", "page": 2}, "There is no page 2 of 1 - at `$.page`"),
        ("store_result", {"issue_id": "i"}, "missing required field `status`"),
        ("store_result", {"issue_id": "i", "status": "great"}, "'great' is none of failed, partial, success - at `$.status`"),
        ("store_result", {"issue_id": "i", "status": "failed", "decisions": [1]}, "at `$.decisions[0]`"),
        ("store_result", {"issue_id": "i", "status": "failed", "decision": "a"}, "did you mean decisions?"),
        ("publish_event", {"event_type": "Loud"}, "at `$.event_type`"),
        ("publish_event", {"event_type": "agent_exited"}, "AUTH_003: The service publishes agent_exited, not this token"),
        ("publish_event", {"event_type": "a", "data": 1}, "at `$.data`"),
        ("publish_event", {"event_type": "a", "idempotency_key": ""}, "at `$.idempotency_key`"),
        ("wait_for_events", {"timeout_seconds": 301}, "<= 300.0 - at `$.timeout_seconds`"),
        ("wait_for_events", {"event_type": "A"}, "EVT_002: event_type"),
        ("wait_for_events", {"filter": "a b"}, "EVT_002: Invalid filter"),
        ("wait_for_events", {"since": "evt-00000000-000000000001"}, "EVT_003"),
        ("results", {"result_id": "no"}, "REQ_002: No result no"),
        ("results", {"limit": 0}, "at `$.limit`"),
        ("agents", {"agent_id": "no"}, "REQ_002: No agent no"),
        ("spawn_agent", {"issue_id": "i", "agent_type": "wizard"}, "AGT_002"),
        ("spawn_agent", {"issue_id": "i", "agent_type": "test-engineer", "environment": {"A B": ""}}, "environment"),
    ],
)  # fmt: skip
def test_an_error_of_a_tool_names_the_argument(mcp: Mcp, name: str, arguments: dict[str, Any], said: str) -> None:
    failed, text = mcp.outcome(name, **arguments)
    assert failed and said in text, text


def test_a_token_for_an_issue_or_a_name_stays_with_them(service: Service, coder: Mcp, issue: str) -> None:
    for name, arguments in (
        ("brief", {"issue_id": "other"}),
        ("store_result", {"issue_id": "other", "status": "success"}),
        ("publish_event", {"event_type": "a", "data": {"issue_id": "other"}}),
        ("results", {"issue_id": "other"}),
        ("agents", {"issue_id": "other"}),
    ):
        failed, text = coder.outcome(name, **arguments)
        assert failed and text == f"AUTH_003: This token is for issue {issue} only", text
    until(
        lambda: (
            ("/mcp/agents", 403, "refused") in [(row["path"], row["status"], row["outcome"]) for row in service.audit()]
        )
    )


def test_a_person_is_asked_and_answers(service: Service, coder: Mcp, issue: str) -> None:
    person = service.client()
    for asked, answer, said in (
        ({"text": "Which port?", "choices": ["1", "2"]}, {"answer": "2", "message": "not 1"}, "answered: 2\nnot 1"),
        ({"text": "May I?", "command": "rm -r build"}, {"answer": "deny"}, "answered: deny"),
    ):
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(coder.call, "ask_human", **asked)
            (open_one,) = until(
                lambda: person.get("/api/approvals", state="open", issue_id=issue).json()["approvals"]
            )  # fmt: skip
            assert open_one["text"] == asked["text"] and open_one["command"] == asked.get("command")
            path = f"/api/approvals/{open_one['approval_id']}"
            assert person.post(f"{path}/answer", answer).status_code == 200
            assert said in told.result(30)
        assert said in coder.call("ask_human", approval_id=open_one["approval_id"])
    assert "which means no" in coder.call("ask_human", text="And now?", command="rm -r .", timeout_seconds=1)
    assert coder.outcome("ask_human") == (True, "REQ_001: text is missing: what is asked - at `$.text`")
    assert "AUTH_003" in Mcp(service.client("documentation-expert")).outcome("ask_human", text="a")[1]


def test_null_is_no_argument_and_what_a_program_adds_is_passed_over(coder: Mcp) -> None:
    assert "0 results" in coder.call("results", issue_id=None, status=None, wait_for_previous=True)


def test_calls_have_the_limits_of_the_api_and_what_programs_ask_by_themselves_has_none(service: Service) -> None:
    reader = Mcp(service.client("documentation-expert"))
    for _ in range(10):
        reader.ask("tools/list")
    told = until(lambda: (found := reader.outcome("agents"))[0] and found[1])
    assert told.startswith("RATE_001: Too many requests. Please wait")
    assert reader.client.get("/status").status_code == 429


def test_a_policy_is_asked_for_what_a_tool_does_and_what_has_begun_is_done(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/frozen.py").write_text(
        "from cco_sidecar import hookimpl\n@hookimpl\ndef permission_policy(claims, method, path):\n"
        "    frozen = claims.agent_type == 'test-engineer' and path == '/api/results' and method == 'POST'\n"
        "    return 'frozen' if frozen else None\n"
        f"@hookimpl\ndef next_agents():\n    import os, time\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
    )
    service = make_service("--plugins", str(tmp_path / "plugins"))
    tester, coder = Mcp(service.client("test-engineer")), service.client("python-specialist")
    done = {"issue_id": "i", "status": "success"}
    assert tester.outcome("store_result", **done) == (True, "AUTH_003: Refused by policy: frozen")
    assert "0 results" in tester.call("results")
    with contextlib.closing(http.client.HTTPConnection(service.url.removeprefix("http://"))) as hangs_up:
        headers = {"Authorization": f"Bearer {coder.token}", "Content-Type": "application/json", **ACCEPT}
        hangs_up.request("POST", "/mcp", json.dumps(older(name="store_result", arguments=done)), headers)
        until((tmp_path / "begun").exists)
        assert service.process
        connections = psutil.Process(service.process.pid).net_connections
        port = hangs_up.sock.getsockname()[1]
    until(lambda: port not in [row.raddr.port for row in connections("tcp") if row.raddr])
    (tmp_path / "go").touch()
    until(lambda: service.client().get("/api/results", issue_id="i").json()["results"])


# -- pages


def test_what_is_long_comes_in_pages_and_nothing_is_lost(mcp: Mcp, coder: Mcp, issue: str) -> None:
    decisions = [f"decision {number}: " + "ä" * 900 for number in range(20)] + ["ö" * 25_000]
    coder.call("store_result", status="success", decisions=decisions)
    text, number = mcp.call("results", issue_id=issue), 1
    while f"page={number + 1} goes on" in text:
        number += 1
        text += "\n" + mcp.call("results", issue_id=issue, page=number)
    assert number > 5 and all(f"decision {row}: " in text for row in range(20)) and text.count("ö") == 25_000
    assert mcp.outcome("results", issue_id=issue, page=number + 1)[0]
    for size in (3_000, 4_000, 5_000, 30_000, 10):
        coder.call("publish_event", event_type="long", data={"text": "y" * size})
    took = [mcp.call("wait_for_events", event_type="long", filter=f"issue_id:{issue}") for _ in range(4)]
    assert [text.count("y" * 1000) // 1 for text in took[:2]] == [7, 5]
    assert "[page 1 of" in took[2] and took[2].count("y") < 10_000 and '"yyyyyyyyyy"' in took[3]
    since = took[2].rpartition("since=")[2].partition(",")[0]
    rest = mcp.call("wait_for_events", event_type="long", filter=f"issue_id:{issue}", since=since, limit=1, page=2)
    assert rest.count("y") > 5_000


# -- waiting


def stream(mcp: Mcp, message_id: str | int = 1, **arguments: Any) -> requests.Response:
    """The beginning of a wait's answer."""
    meta = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}, "progressToken": "p"}
    body = modern(name="wait_for_events") | {"id": message_id}
    body["params"] = {"name": "wait_for_events", "arguments": arguments, "_meta": meta}
    headers = {"Authorization": f"Bearer {mcp.client.token}"} | ACCEPT | GOOD | {"Mcp-Name": "wait_for_events"}
    return requests.post(f"{mcp.client.url}/mcp", json=body, headers=headers, stream=True, timeout=30)


def waiting(service: Service) -> int:
    return int(service.client().get("/status").json()["events"]["active_subscriptions"])


def test_a_wait_begins_its_answer_at_once_and_shows_that_it_lives(service: Service, mcp: Mcp, issue: str) -> None:
    with stream(mcp, event_type="ping", filter=f"issue_id:{issue}", timeout_seconds=300) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["X-Accel-Buffering"] == "no" and "Content-Length" not in answer.headers
        lines = answer.iter_lines(decode_unicode=True)
        assert next(lines) == "event: begin"
        event = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
        assert event["method"] == "notifications/progress" and event["params"]["progressToken"] == "p"
        service.client().publish("ping", {"issue_id": issue})
        result = json.loads(next(line for line in lines if line.startswith("data: "))[6:])["result"]
        assert issue in result["content"][0]["text"] and result["isError"] is False


def test_who_hangs_up_misses_nothing(service: Service, mcp: Mcp, issue: str) -> None:
    before = waiting(service)
    answer = stream(mcp, event_type="ping", filter=f"issue_id:{issue}", timeout_seconds=300)
    until(lambda: waiting(service) == before + 1)
    answer.close()
    until(lambda: waiting(service) == before)
    service.client().publish("ping", {"issue_id": issue})
    assert issue in mcp.call("wait_for_events", event_type="ping", filter=f"issue_id:{issue}")


def test_a_wait_that_its_client_cancels_takes_no_event(service: Service, issue: str) -> None:
    old = Mcp(service.client(), OLDER[0])
    before, arguments = waiting(service), {"event_type": "ping", "filter": f"issue_id:{issue}"}
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(old.call, "wait_for_events", timeout_seconds=300, **arguments)
        until(lambda: waiting(service) == before + 1)
        other = Mcp(service.client(), OLDER[0])
        for client in (other.client, old.client):  # of another token nobody is cancelled
            note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
            headers = {"Authorization": f"Bearer {client.token}"}
            assert requests.post(f"{service.url}/mcp", json=note, headers=headers, timeout=30).status_code == 202
            assert client is old.client or waiting(service) == before + 1
        assert told.result(30) == "The client has cancelled this call."
    service.client().publish("ping", {"issue_id": issue})
    assert issue in old.call("wait_for_events", **arguments)


def test_who_is_revoked_while_waiting_hears_nothing(service: Service, issue: str) -> None:
    agent, before = spawn(service.client(), issue=issue), waiting(service)
    holders = [Client(service.url, agent["jwt_token"]) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        told = pool.submit(Mcp(holders[0]).outcome, "wait_for_events", event_type=f"ping.{issue}", timeout_seconds=300)
        polled = pool.submit(holders[1].get, f"/api/events/wait/ping.{issue}", timeout=300_000)
        body = {"hook_event_name": "Stop", "session_id": "s"}
        woken = pool.submit(holders[2].post, "/api/hooks/claude/wait?timeout=300000", body, timeout=60)
        until(lambda: waiting(service) == before + 3)
        service.client().delete(f"/api/agents/{agent['agent_id']}")
        until(lambda: Client(service.url, agent["jwt_token"]).get("/status").status_code == 401)
        service.client().publish(f"ping.{issue}", {"issue_id": issue})
        assert told.result(30) == (True, "AUTH_001: This token was revoked")
        assert [one.result(30).json()["code"] for one in (polled, woken)] == ["AUTH_001"] * 2


def test_a_stop_answers_who_waits(make_service: Callable[..., Service]) -> None:
    service = make_service()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(Mcp(service.client()).call, "wait_for_events", timeout_seconds=300)
        until(lambda: waiting(service) == 1)
        assert service.stop() == 0
        assert told.result(30).startswith("No event came")


def test_who_was_cut_off_by_the_end_of_the_service_is_answered_by_the_next_one(
    make_service: Callable[..., Service],
) -> None:
    """Programs ask again by the id that began the answer, and wait for ever where nobody answers that."""

    def asked_again(place: str) -> requests.Response:
        return service.client().request("GET", "/mcp", headers={"Last-Event-ID": place, "Accept": "text/event-stream"})

    service, places = make_service(), {}
    for message_id in (7, "call-\u00fc", "x" * 5_000):
        with stream(Mcp(service.client()), message_id, timeout_seconds=300) as answer:
            lines = answer.iter_lines(decode_unicode=True)
            if next(lines) == "event: begin":
                places[message_id] = next(lines).removeprefix("id: ")
    assert list(places) == [7, "call-\u00fc"], "no head could bear the third"
    assert [asked_again(place).status_code for place in places.values()] == [405, 405], (
        "nothing of this process is resumed"
    )
    service.kill()
    service.start()
    for message_id, place in places.items():
        answer = asked_again(place)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream")
        (message,) = messages_of(answer)
        assert message["id"] == message_id and message["result"]["isError"] is True
        assert "ended before it had answered" in message["result"]["content"][0]["text"]


# -- the official SDK's client, which speaks 2026-07-28 and begins 2025-11-25 by a handshake; it offers 2025-06-18 to nobody


@pytest.mark.parametrize(("mode", "revision"), [("auto", MODERN), (MODERN, MODERN), ("legacy", OLDER[0])])
def test_the_official_client_does_an_agents_whole_work(service: Service, issue: str, mode: str, revision: str) -> None:
    asyncio.run(whole_work(service, issue, mode, revision))


async def whole_work(service: Service, issue: str, mode: str, revision: str) -> None:
    token = service.token("python-specialist", issue_id=issue, bound=True)
    signs: list[float] = []

    async def alive(progress: float, total: float | None, message: str | None) -> None:
        signs.append(progress)

    async with (
        create_mcp_http_client({"Authorization": f"Bearer {token}"}) as http,
        mcp_sdk.Client(streamable_http_client(f"{service.url}/mcp", http_client=http), mode=mode) as client,
    ):
        assert client.protocol_version == revision
        if mode != MODERN:  # which asks nothing before the first request
            assert client.server_info and client.server_info.name == "cco-sidecar"
            assert "store_result" in (client.instructions or "")
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools["store_result"].input_schema["required"] == ["status"]
        assert [resource.uri for resource in (await client.list_resources()).resources] == ["cco://brief"]
        assert (await client.list_resource_templates()).resource_templates[0].uri_template == "cco://brief/{issue_id}"
        (read,) = (await client.read_resource(f"cco://brief/{issue}")).contents
        (shown,) = (await client.call_tool("brief")).content
        assert issue in read.text == shown.text
        stored = await client.call_tool("store_result", {"status": "success", "decisions": ["it is done"]})
        assert not stored.is_error and "Stored as" in stored.content[0].text
        wrong = await client.call_tool("store_result", {"status": "fine"})
        assert wrong.is_error and "$.status" in wrong.content[0].text
        waits = {"event_type": "ping", "timeout_seconds": 60}
        async with asyncio.TaskGroup() as tasks:
            before = await asyncio.to_thread(waiting, service)
            told = tasks.create_task(client.call_tool("wait_for_events", waits, progress_callback=alive))
            while not (signs if mode == "auto" else await asyncio.to_thread(waiting, service) > before):
                await asyncio.sleep(0.1)
            await asyncio.to_thread(service.client().publish, "ping", {"issue_id": issue})
        assert issue in told.result().content[0].text
        with pytest.raises(mcp_sdk.MCPError, match="Unknown tool"):
            await client.call_tool("no")
        with pytest.raises(mcp_sdk.MCPError, match="Resource not found"):
            await client.read_resource("cco://no")
