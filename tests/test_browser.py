"""Web pages in a real browser: hostile ones read nothing and trigger nothing, friendly ones can use the whole
interface.

Chromium is driven over chromedriver's plain HTTP. The pages come from a small server on another port, under invented
host names that the browser resolves to this machine: `evil.example` is a foreign origin, and on the service's own port
it is what DNS rebinding makes of it.
"""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from chromium import Browser
from conftest import Client, Service, body_of, serving, until

NAMES = "MAP evil.example 127.0.0.1, MAP localhost.evil.example 127.0.0.1, MAP app.example 127.0.0.1"


# ---- A browser, and a server of pages
# ---------------------------------------------------------------------------------------------------


class Page(http.server.BaseHTTPRequestHandler):
    """The same empty page for every host name and path."""

    def do_GET(self) -> None:
        content = b"<!doctype html><meta charset=utf-8><title>a page</title><body>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("browser"), f"--host-resolver-rules={NAMES}")
    yield running
    running.close()


@pytest.fixture(scope="module")
def pages() -> Iterator[int]:
    """The port on which pages are served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, pages: int) -> Iterator[Service]:
    """A service that lets pages of app.example in, with something in it to steal and to destroy."""
    arguments = ["--cors-origin", f"http://app.example:{pages}", "--agent-command", "true", "--log-level", "debug"]
    with serving(tmp_path_factory.mktemp("guarded"), *arguments) as running:
        client = running.client()
        client.store(decisions=["something to steal"])
        assert client.get("/api/context/issue-1/python-specialist").status_code == 200  # now there is a cached context
        yield running


def lines_of(service: Service) -> list[str]:
    """The access log: one line for each request that was answered."""
    return re.findall(r"req-\S+ ([A-Z]+ \S+ \d{3}) ", service.log)


def state_of(service: Service) -> Any:
    """All that a request could change."""
    client = service.client()
    lists = [client.get(f"/api/{name}").json()[name] for name in ("events", "results", "agents")]
    answer = client.get("/status")
    until(lambda: answer.headers["X-Request-Id"] in service.log)  # a page's requests are counted from here
    status = answer.json()
    return lists, status["agents"], status["events"]["total_published"], status["events"]["active_subscriptions"]


# ---- Hostile pages
# ----------------------------------------------------------------------------------------------------------------------

EVENT = json.dumps({"publisher": "evil", "topic": "evil", "data": {}})
SPAWN = json.dumps({"agent_type": "python-specialist", "issue_id": "issue-1"})

# What a page may try, by fetch and its like. Each gives what the page got to see.
READ = """
const read = async (asked) => { try { const a = await asked(); return [a.type, a.status, await a.text(), [...a.headers].length] }
    catch (e) { return e.name } };
const json = {'Content-Type': 'application/json'};
const bearer = {Authorization: `Bearer ${token}`};
"""
UNSEEN = ["TypeError", ["opaque", 0, "", 0]]
FETCHES = {
    "a public answer": "fetch(url + '/health')",
    "a public answer without its origin": "fetch(url + '/openapi.json', {mode: 'no-cors'})",
    "a public answer and no referrer": "fetch(url + '/health', {referrerPolicy: 'no-referrer'})",
    "an answer with a stolen token": "fetch(url + '/api/results', {headers: bearer})",
    "a context with a stolen token": "fetch(url + '/api/context/issue-1/python-specialist', {headers: bearer})",
    "a stolen token that no-cors takes away": "fetch(url + '/api/results', {headers: bearer, mode: 'no-cors'})",
    "an answer with cookies": "fetch(url + '/api/results', {credentials: 'include'})",
    "a poll": "fetch(url + '/api/events/wait/done?timeout=0', {headers: bearer})",
    "an event as plain text": "fetch(url + '/api/events/evil', {method: 'POST', body: event, headers: {'Content-Type': 'text/plain'}})",
    "an event as plain text, unseen": "fetch(url + '/api/events/evil', {method: 'POST', body: event, mode: 'no-cors'})",
    "an event without a type": "fetch(url + '/api/events/evil', {method: 'POST', body: new Blob([event]), mode: 'no-cors'})",
    "an event of nobody": "fetch(url + '/api/events/evil', {method: 'POST', body: event, mode: 'no-cors', referrerPolicy: 'no-referrer'})",
    "an event that outlives the page": "fetch(url + '/api/events/evil', {method: 'POST', body: event, mode: 'no-cors', keepalive: true})",
    "an event as JSON with a stolen token": "fetch(url + '/api/events/evil', {method: 'POST', body: event, headers: {...bearer, ...json}})",
    "a result as a form": "fetch(url + '/api/results', {method: 'POST', body: new URLSearchParams({status: 'success'}), mode: 'no-cors'})",
    "a result in parts": "fetch(url + '/api/results', {method: 'POST', body: new FormData(), mode: 'no-cors'})",
    "an agent": "fetch(url + '/api/agents/spawn', {method: 'POST', body: spawn, mode: 'no-cors'})",
    "an agent with a stolen token": "fetch(url + '/api/agents/spawn', {method: 'POST', body: spawn, headers: {...bearer, ...json}})",
    "a fresh token": "fetch(url + '/api/auth/refresh', {method: 'POST', headers: bearer})",
    "the cache with a stolen token": "fetch(url + '/api/cache/context/issue-1', {method: 'DELETE', headers: bearer})",
    "the whole cache by another method": "fetch(url + '/api/cache/all', {method: 'POST', headers: {'X-HTTP-Method-Override': 'DELETE'}})",
    "a method of its own": "fetch(url + '/api/results', {method: 'PUT', body: event})",
    "from a worker": """new Promise((settled, failed) => { const worker = new Worker(URL.createObjectURL(new Blob([
        `fetch('${url}/health').then(a => a.text()).then(postMessage, () => postMessage(null))`])));
        worker.onmessage = m => m.data === null ? failed(new TypeError()) : settled(new Response(m.data)) })""",
}  # fmt: skip


def reached(service: Service, before: int) -> list[str]:
    """What the service was asked since: at least once, or the test would prove nothing."""
    return until(lambda: lines_of(service)[before:])  # type: ignore[no-any-return]


def harmless(lines: list[str]) -> bool:
    """Everything was refused, apart from reading what anybody may read."""
    return all(re.fullmatch(r"(\S+ \S+ 40[13])|(GET (/health|/openapi.json) 200)", line) for line in lines)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example"])
def test_a_hostile_page_reads_nothing_and_triggers_nothing(
    browser: Browser, pages: int, guarded: Service, host: str
) -> None:
    before = state_of(guarded)
    browser.open(f"http://{host}:{pages}/")
    for name, script in FETCHES.items():
        seen = len(lines_of(guarded))
        facts = {"url": guarded.url, "token": guarded.token(), "event": EVENT, "spawn": SPAWN}
        assert browser.run(f"{READ} return await read(() => {script})", **facts) in UNSEEN, name
        assert harmless(reached(guarded, seen)), (name, lines_of(guarded)[seen:])
    assert state_of(guarded) == before


ELEMENT = """
return await new Promise(settled => { const it = Object.assign(document.createElement(tag), facts);
    it.onload = () => settled('loaded'); it.onerror = () => settled('error'); document.body.append(it); })"""
INCLUSIONS = {
    "a script": ("script", {"src": "/health"}),
    "a module": ("script", {"src": "/openapi.json", "type": "module"}),
    "a script that tells its origin": ("script", {"src": "/health", "crossOrigin": "anonymous"}),
    "a picture": ("img", {"src": "/health"}),
    "a style sheet": ("link", {"href": "/openapi.json", "rel": "stylesheet"}),
    "a sound": ("audio", {"src": "/health"}),
    "a script behind a token": ("script", {"src": "/api/results"}),
}


@pytest.mark.parametrize("name", INCLUSIONS)
def test_answers_cannot_be_included_in_a_hostile_page(
    browser: Browser, pages: int, guarded: Service, name: str
) -> None:
    tag, facts = INCLUSIONS[name]
    browser.open(f"http://evil.example:{pages}/")
    seen = len(lines_of(guarded))
    full = {key: guarded.url + value if key in ("src", "href") else value for key, value in facts.items()}
    assert browser.run(ELEMENT, tag=tag, facts=full) == "error"
    assert harmless(reached(guarded, seen))


CHANNELS = {
    "an event stream": """return await new Promise(settled => { const it = new EventSource(url + '/api/events/wait/done');
        it.onerror = () => settled(it.readyState === EventSource.CLOSED ? 'closed' : 'again'); it.onmessage = () => settled('read') })""",
    "a web socket": """return await new Promise(settled => { const it = new WebSocket(url.replace('http', 'ws') + '/api/events/wait/done');
        it.onopen = () => settled('open'); it.onclose = () => settled('closed') })""",
    "a beacon": "return navigator.sendBeacon(url + '/api/events/evil', new Blob([event], {type: 'text/plain'})) && 'closed'",
    "a module of JSON": "return await import(url + '/openapi.json', {with: {type: 'json'}}).then(() => 'read', () => 'closed')",
}


@pytest.mark.parametrize("name", CHANNELS)
def test_a_hostile_page_opens_no_channel(browser: Browser, pages: int, guarded: Service, name: str) -> None:
    before, seen = state_of(guarded), len(lines_of(guarded))
    browser.open(f"http://evil.example:{pages}/")
    assert browser.run(CHANNELS[name], url=guarded.url, event=EVENT) == "closed"
    until(lambda: [line for line in lines_of(guarded)[seen:] if line.endswith(" 403")])
    assert state_of(guarded) == before


FRAME = """
return await new Promise(settled => { const it = document.createElement('iframe'); it.onload = () => settled([it.contentDocument === null]);
    it.src = url + path; document.body.append(it); })"""


def test_no_answer_is_shown_in_a_frame(browser: Browser, pages: int, guarded: Service) -> None:
    browser.open(f"http://evil.example:{pages}/")
    seen = len(lines_of(guarded))
    assert browser.run(FRAME, url=guarded.url, path="/health") == [True]
    assert harmless(reached(guarded, seen)) and "checks" not in browser.frame_source(0)
    assert (
        "checks" in requests.get(guarded.url + "/health", timeout=10).text
    )  # which is what the frame would have shown


# The fields of a form of type text/plain are sent as name=value: together they are JSON.
FORM = """
const {inside, enctype} = facts, name = event.slice(0, -1) + ', "x": "', value = '"}';
const form = `<form method=post enctype="${enctype}" action="${url}/api/events/evil"><input type=hidden></form>`;
const script = `const i = document.forms[0][0]; i.name = ${JSON.stringify(name)}; i.value = ${JSON.stringify(value)}; document.forms[0].submit()`;
const frame = document.createElement('iframe');
if (inside) frame.sandbox = 'allow-forms allow-scripts';
frame.srcdoc = `${form}<script>${script}<` + `/script>`;
document.body.append(frame);
"""


@pytest.mark.parametrize("enctype", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize("inside", [False, True], ids=["of its own origin", "without an origin"])
def test_a_form_that_a_hostile_page_sends_is_refused(
    browser: Browser, pages: int, guarded: Service, inside: bool, enctype: str
) -> None:
    before, seen = state_of(guarded), len(lines_of(guarded))
    browser.open(f"http://evil.example:{pages}/")
    browser.run(FORM, url=guarded.url, event=EVENT, facts={"inside": inside, "enctype": enctype})
    until(lambda: "POST /api/events/evil 403" in lines_of(guarded)[seen:])
    assert state_of(guarded) == before


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example"])
def test_a_rebound_name_reads_nothing_and_triggers_nothing(browser: Browser, guarded: Service, host: str) -> None:
    """The page's own name now means this machine: its requests are of one origin, so only the Host header gives it
    away.
    """
    before, port = state_of(guarded), guarded.url.rpartition(":")[2]
    browser.open(f"http://{host}:{port}/health")
    assert browser.run("return [location.host, document.body.innerText.includes('REQ_007')]") == [
        f"{host}:{port}",
        True,
    ]
    for name, script in FETCHES.items():
        seen = len(lines_of(guarded))
        facts = {"url": "", "token": guarded.token(), "event": EVENT, "spawn": SPAWN}
        if name == "from a worker":
            facts["url"] = f"http://{host}:{port}"
        answer = browser.run(f"{READ} return await read(() => {script})", **facts)
        assert name == "from a worker" or answer[1] == 403, (name, answer)
        assert "REQ_007" in answer[2], (name, answer)
        assert {line.rpartition(" ")[2] for line in reached(guarded, seen)} == {"403"}, name
    assert state_of(guarded) == before


def test_what_hostile_pages_wanted_to_destroy_is_still_there(guarded: Service) -> None:
    assert guarded.client().delete("/api/cache/context/issue-1").json()["entries_removed"] == 1
    assert guarded.client().get("/api/context/issue-1/python-specialist").status_code == 200


# ---- Friendly pages
# ---------------------------------------------------------------------------------------------------------------------

CALL = """
const whole = {Authorization: `Bearer ${token}`, ...headers}, answer = await fetch(url + path, {method, headers: whole, ...facts});
const text = await answer.text();
return [answer.status, text ? JSON.parse(text) : null, Object.fromEntries(answer.headers)];
"""


class PageClient:
    """Requests by a page in the browser with one token."""

    def __init__(
        self, browser: Browser, service: Service, agent_type: str = "python-specialist", **claims: Any
    ) -> None:
        self.browser, self.url, self.token = browser, service.url, service.token(agent_type, **claims)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Status, body, and the headers that the page may see."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        facts = {} if body is None else {"body": json.dumps(body)}
        if facts:
            headers |= {"Content-Type": "application/json"}
        return self.browser.run(
            CALL, url=self.url, path=path, method=method, token=self.token, headers=headers, facts=facts
        )


@pytest.mark.parametrize("origin", ["http://localhost", "http://127.0.0.1", "http://app.example"])
def test_a_friendly_page_can_use_the_interface(
    browser: Browser, pages: int, guarded: Service, issue: str, origin: str
) -> None:
    browser.open(f"{origin}:{pages}/")
    page, architect = PageClient(browser, guarded), PageClient(browser, guarded, "chief-architect")
    assert page("GET", "/health")[0] == page("GET", "/status")[0] == 200
    stored = body_of(issue) | {"agent_id": "page-1"}
    status, first, seen = page("POST", "/api/results", stored, Idempotency_Key=issue)
    assert status == 201 and "idempotent-replay" not in seen
    status, again, seen = page("POST", "/api/results", stored, Idempotency_Key=issue)
    assert (status, again, seen["idempotent-replay"]) == (201, first, "true")
    (result,) = page("GET", f"/api/results?issue_id={issue}")[1]["results"]
    assert page("GET", f"/api/results/{result['id']}")[1] == result
    assert (
        page("POST", "/api/events/hello", {"publisher": "page", "topic": "test", "data": {"issue_id": issue}})[0] == 202
    )
    _, poll, _ = page("GET", f"/api/events/wait/*?timeout=20000&filter=issue_id:{issue}")
    assert [event["event_type"] for event in poll["events"]] == ["agent_completed", "hello"]
    _, context, seen = page("GET", f"/api/context/{issue}/python-specialist")
    assert [output["agent"] for output in context["context"]["previous_agent_outputs"]] == ["page-1"]
    assert page("GET", f"/api/context/{issue}/python-specialist", If_None_Match=seen["etag"])[:2] == [304, None]
    assert page("DELETE", f"/api/cache/context/{issue}")[1]["entries_removed"] == 1
    status, spawned, _ = architect("POST", "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": issue})
    assert status == 201
    until(lambda: architect("GET", f"/api/agents/{spawned['agent_id']}/status")[1]["state"] == "completed")


def test_a_friendly_page_reads_the_headers_meant_for_it_and_its_refusals(
    browser: Browser, pages: int, guarded: Service
) -> None:
    browser.open(f"http://localhost:{pages}/")
    page, expiring = PageClient(browser, guarded), PageClient(browser, guarded, exp=int(time.time()) + 200)
    _, _, seen = page("GET", "/status")
    assert (
        seen["x-ratelimit-limit"] == "60"
        and int(seen["x-ratelimit-remaining"]) < 60
        and int(seen["x-ratelimit-reset"]) > 0
    )
    assert re.fullmatch(r"req-\S+", seen["x-request-id"]) and "server" not in seen
    assert Client(guarded.url, expiring("GET", "/status")[2]["x-refreshed-token"]).get("/status").status_code == 200
    beside = Client(guarded.url, page.token)

    def refused() -> Any:
        """What the page is told once its allowance is used up beside it: a page that is slow never would."""
        until(lambda: beside.get("/status").status_code == 429)
        return (found := page("GET", "/status"))[0] == 429 and found

    _, refusal, seen = until(refused)
    assert (refusal["code"], seen["retry-after"]) == ("RATE_001", str(refusal["retry_after_seconds"]))
    page.token = "garbage"
    status, refusal, _ = page("GET", "/status")
    assert (status, refusal["code"]) == (401, "AUTH_001")
    unknown = browser.run(f"{READ} return await read(() => fetch(url + '/nowhere'))", url=guarded.url, token="")
    assert unknown[:2] == ["cors", 404] and json.loads(unknown[2])["code"] == "REQ_002"


def test_an_editors_web_view_may_call(guarded: Service) -> None:
    """A browser cannot pretend to be one: the bytes that it sends, by hand."""
    origin, address = (
        "vscode-webview://1f0tq8bohaeh5vjqr6mqm4pl3b4u8kqsr0pprtm1e3ltmqvhvl3m",
        guarded.url.removeprefix("http://"),
    )
    host, port = address.split(":")
    head = f"{{}} /status HTTP/1.1\r\nHost: {address}\r\nOrigin: {origin}\r\nConnection: close\r\n"
    preflight = "Access-Control-Request-Method: GET\r\nAccess-Control-Request-Headers: authorization\r\n\r\n"
    for request, first in [
        (head.format("OPTIONS") + preflight, "HTTP/1.1 204 No Content"),
        (head.format("GET") + f"Authorization: Bearer {guarded.token()}\r\n\r\n", "HTTP/1.1 200 OK"),
    ]:
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(request.encode())
            answer = b"".join(iter(lambda: line.recv(65_536), b"")).decode()
        assert answer.startswith(first) and f"Access-Control-Allow-Origin: {origin}\r\n" in answer


def test_a_page_of_an_origin_that_was_not_named_stays_out(browser: Browser, pages: int, service: Service) -> None:
    browser.open(f"http://app.example:{pages}/")
    script = f"{READ} return await read(() => fetch(url + '/health'))"
    assert browser.run(script, url=service.url, token="") == "TypeError"
    assert harmless(reached(service, 0))
