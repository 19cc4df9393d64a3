"""The service's part of the dashboard: its files, the handover of a token, issues and their stories, runs."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import psutil
import pytest
from conftest import (
    PROJECT,
    Client,
    Service,
    body_of,
    clean_environment,
    copy_project,
    end_stragglers,
    git,
    make_repository,
    marked_processes,
    plugin,
    serving,
    until,
)
from markdown_it import MarkdownIt

import cco_sidecar
from cco_sidecar import ApiError, Records, connect_database

HEADERS = {
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip
AGENT = """
import os, time
print(os.environ['TASK'], flush=True)
time.sleep(60 if 'sleep' in os.environ['TASK'] else float(os.environ.get('TEST_SECONDS', '0')))
"""
HOSTILE = (
    "<script>alert(1)</script> [x](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "``````\n# a heading\n\n<img src=x onerror=alert(1)>\n``` | a | cell | `",
    "\x1b]0;title\x07\x1b[31mred \u202e reversed\u0000 \r\n- [ ] a list",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a page of the test's own."""
    folder = tmp_path_factory.mktemp("dashboard")
    page = copy_project(folder / "program") / "plugins/http/dashboard"
    for name, text in {"index.html": "<!doctype html>", "views/own.js": "export {}", "own.css": "a{}", "own.py": "secret",
                       ".own.js": "hidden", "own..js": "dots"}.items():  # fmt: skip
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        (page / name).write_text(text)
    module, repository = folder / "program/cco_sidecar.py", make_repository(folder / "repository")
    (repository / "issues").mkdir()
    (repository / "issues/77-login.md").write_text("# The login <b>fails</b>\n\nNobody comes in.\n")
    (repository / ".claude/agents").mkdir(parents=True)  # takes nobody's name
    (repository / ".claude/agents/operator.md").write_text("---\nname: operator\ndescription: x\n---\nWork\n")
    command = json.dumps([sys.executable, "-c", AGENT])
    with serving(folder, "--agent-command", command, module=module, root=repository) as running:
        yield running
    end_stragglers()


def cco(service: Service, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in the service's repository."""
    where = [f"--root={service.root}", f"--storage={service.storage}"]
    command = [sys.executable, str(service.module), *words, *where]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=service.root, env=clean_environment(BROWSER="true"), timeout=60
    )
    return ended.returncode, ended.stdout, ended.stderr


def operator(service: Service, **claims: Any) -> Client:
    return service.client("operator", **claims)


# -- the page


def test_the_page_is_served_without_a_token_and_holds_every_header(service: Service) -> None:
    nobody = Client(service.url, None)
    kinds = {"": "text/html", "/": "text/html", "/index.html": "text/html", "/views/own.js": "text/javascript",
             "/own.css": "text/css"}  # fmt: skip
    for path, kind in kinds.items():
        answer = nobody.get(f"/dashboard{path}")
        assert answer.status_code == 200 and answer.headers["Content-Type"] == f"{kind}; charset=utf-8", path
        assert HEADERS.items() <= answer.headers.items()
        policy = dict(part.split(None, 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        tag = answer.headers["ETag"]
        opaque = tag.removeprefix("W/")
        for known in (tag, "*", opaque, f'"other", {tag}', f'{opaque},"other"'):
            again = nobody.request("GET", f"/dashboard{path}", headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"") and HEADERS.items() <= again.headers.items(), known
        for known in ('"other"', f'{tag[:-1]}y"', f'"x{opaque[1:]}', opaque.strip('"')):
            again = nobody.request("GET", f"/dashboard{path}", headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (200, answer.content), known
        assert nobody.request("HEAD", f"/dashboard{path}").headers["ETag"] == answer.headers["ETag"]


@pytest.mark.parametrize("path", [
    "/own.py", "/.own.js", "/own..js", "/none.js", "/views", "/views/", "/..%2f..%2fcore.js", "/%2e%2e/mcp.js",
    "/views/..%2f..%2fx.js", "//etc/x.js", "/a%00.js", "/views/views/own.js",
])  # fmt: skip
def test_nothing_else_is_served(service: Service, path: str) -> None:
    answer = Client(service.url, None).get(f"/dashboard{path}")
    assert answer.status_code in (400, 404) and answer.json()["code"] in ("REQ_001", "REQ_002")


# -- the token


def test_who_opens_the_services_address_in_a_browser_is_told_where_the_page_is(service: Service) -> None:
    anybody = Client(service.url, None)
    for method in ("GET", "POST"):
        answer = anybody.request(method, "/", headers={"Accept": "text/html"})
        assert (answer.status_code, answer.json()["code"]) == (404, "REQ_002")
        assert answer.json()["message"].startswith("Nothing is here: `cco dashboard` opens the page"), answer.text
    assert anybody.request("GET", "/other").json()["message"] == "No such path, and no plugin in use adds it"


@pytest.mark.parametrize("paths", [["/status", "/openapi.json"], ["/status"], []])
def test_the_services_address_names_the_description_only_where_it_is_served(paths: list[str]) -> None:
    application = SimpleNamespace(served=[(SimpleNamespace(path=path), None) for path in paths])
    door = SimpleNamespace(request=SimpleNamespace(path="/"), application=application)
    told = plugin("dashboard").FrontDoor.refusal(door).message
    assert ("/openapi.json" in told) is ("/openapi.json" in paths)


def test_a_code_is_changed_for_an_operators_token_once(service: Service) -> None:
    nobody, made = Client(service.url, None), service.client().post("/api/dashboard/code").json()
    taken = nobody.post("/api/dashboard/token", {"code": made["code"]}, headers={"Origin": service.url})
    assert taken.status_code == 200 and taken.headers["Cache-Control"] == "no-store"
    assert taken.json()["permissions"] == ["read_context", "publish_events", "spawn_agents"]
    claims = jwt.decode(taken.json()["token"], options={"verify_signature": False})
    assert taken.json()["expires_at"] == cco_sidecar.iso(claims["exp"])
    person = Client(service.url, taken.json()["token"])
    facts = person.get("/api/dashboard").json()
    assert (facts["project_id"], facts["root_name"], facts["instance_id"]) == (
        PROJECT, "repository", service.info["instance_id"],
    )  # fmt: skip
    assert {"name": "python-specialist", "category": "coding"} in facts["agent_types"]
    assert "operator" not in {row["name"] for row in facts["agent_types"]}
    fresh = person.post("/api/auth/refresh").json()["token"]
    assert Client(service.url, fresh).get("/api/dashboard").json()["permissions"] == taken.json()["permissions"]
    for code in (made["code"], "x" * 43, "' or 1=1 --"):
        refused = nobody.post("/api/dashboard/token", {"code": code})
        assert refused.status_code == 401 and "`cco dashboard`" in refused.json()["message"]
    for body in ({}, {"code": ""}, {"code": 1}, {"code": "x" * 201}):
        assert nobody.post("/api/dashboard/token", body).status_code == 400


def test_a_code_that_comes_twice_ends_the_token_that_it_gave(service: Service) -> None:
    nobody, code = Client(service.url, None), service.client().post("/api/dashboard/code").json()["code"]
    thief = Client(service.url, nobody.post("/api/dashboard/token", {"code": code}).json()["token"])
    assert thief.get("/api/dashboard").status_code == 200
    assert nobody.post("/api/dashboard/token", {"code": code}).status_code == 401
    assert thief.get("/api/dashboard").status_code == thief.post("/api/auth/refresh").status_code == 401


TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0BB9 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0
   1: 0100007F:D431 0100007F:0BB9 01 00000000:00000000 02:00000A9C 00000000  1001        0 2 1 0 20 4 30 10 -1
   2: 0100007F:0BB9 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 3 1 0 20 4 30 10 -1
   3: 0000000000000000FFFF00000100007F:D432 0000000000000000FFFF00000100007F:0BB9 01 0:0 00:0 00000000  1002 0 4 1
"""


@pytest.mark.parametrize(("port", "users"), [(0xD431, {1001}), (0xD432, {1002}), (0xD433, set()), (0, set())])
def test_the_user_of_a_connection_is_found_in_the_systems_table(port: int, users: set[int]) -> None:
    assert plugin("dashboard").owners(TABLE, port, 3001) == users


AS_NOBODY = """
import encodings.idna, http.client, json, os, sys
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", "/api/dashboard/token", json.dumps({"code": sys.argv[2]}), {"Content-Type": "application/json"})
print(os.getuid(), connection.getresponse().status)
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="tells whose a connection is")
def test_another_user_of_the_machine_cannot_use_a_code_that_was_seen_in_the_list_of_processes(service: Service) -> None:
    code = service.client().post("/api/dashboard/code").json()["code"]
    command = [sys.executable, "-S", "-c", AS_NOBODY, service.url.rpartition(":")[2], code]
    user, status = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=30).stdout.split()
    assert status == ("200" if int(user) == os.getuid() else "403")
    if status == "403":  # and it is not used up by that
        assert Client(service.url, None).post("/api/dashboard/token", {"code": code}).status_code == 200


def test_pages_of_other_origins_get_no_token(service: Service) -> None:
    code = service.client().post("/api/dashboard/code").json()["code"]
    for origin in ("http://127.0.0.1:1", "http://localhost", "https://evil.example", "null", "vscode-webview://a"):
        answer = Client(service.url, None).post("/api/dashboard/token", {"code": code}, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "REQ_007"), origin
    assert Client(service.url, None).post("/api/dashboard/token", {"code": code}).status_code == 200


def test_an_agents_token_makes_no_code_and_a_narrow_one_makes_a_narrow_one(service: Service) -> None:
    assert service.client(bound=True).post("/api/dashboard/code").status_code == 403
    assert service.client("python-specialist").post("/api/dashboard/code").status_code == 403
    maker = service.client(permissions=["read_context", "spawn_agents"], issue_id="issue-1")
    code = maker.post("/api/dashboard/code").json()["code"]
    taken = Client(service.url, None).post("/api/dashboard/token", {"code": code}).json()
    assert taken["permissions"] == ["read_context", "spawn_agents"]
    person = Client(service.url, taken["token"])
    assert person.get("/api/context/issue-1/python-specialist").status_code == 200
    assert person.delete("/api/cache/context/issue-2").status_code == 403


def test_an_operator_is_no_agent(service: Service) -> None:
    person = operator(service)
    spawned = person.post("/api/agents/spawn", {"agent_type": "operator", "issue_id": "i-1"})
    assert (spawned.status_code, spawned.json()["code"]) == (400, "AGT_002") and "for people" in spawned.text
    assert person.get("/api/context/i-1/operator").status_code == 404
    body = {"agent_id": "a", "agent_type": "python-specialist", "issue_id": "i-1", "project_id": PROJECT}
    refused = person.post("/api/results", body | {"result": {"status": "success"}})
    assert (refused.status_code, refused.json()["code"]) == (403, "AUTH_003")
    unknown = service.client().post("/api/results", body | {"agent_type": "operator", "result": {"status": "success"}})
    assert (unknown.status_code, unknown.json()["code"]) == (400, "AGT_002")
    assert person.publish("note", {"text": "hello"})["published"]
    assert "operator" not in cco(service, "agent", "types")[1]
    assert cco(service, "token", "--type", "operator")[1].startswith("eyJ")
    assert "operator" in cco(service, "run", "--issue", "i-1", "--task", "x", "--until", "operator")[2]


def test_the_command_prints_an_address_that_opens_the_page(service: Service) -> None:
    code, out, err = cco(service, "dashboard", "--no-open")
    url, advice = out.splitlines()
    assert (code, err) == (0, "") and url.startswith(f"{service.url}/dashboard#code=") and "once" in advice
    taken = Client(service.url, None).post("/api/dashboard/token", {"code": url.partition("=")[2]})
    assert taken.status_code == 200
    told = json.loads(cco(service, "dashboard", "--format", "json")[1])
    assert told["opened"] is True and told["url"].startswith(service.url)
    for text in (service.log, (service.storage / "audit.log").read_text()):
        assert url.partition("=")[2] not in text and taken.json()["token"] not in text


@pytest.mark.parametrize("browser", [" ", '"%s', "/no/such/browser %s", "false", "&", "sh -c 'read x; exit 1' %s"])
def test_the_address_is_told_whatever_the_browser_is(service: Service, browser: str) -> None:
    options, environ = ["--root", service.root, "--storage", service.storage], clean_environment(BROWSER=browser)
    command = [sys.executable, service.module, "dashboard", *map(str, options)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environ, cwd=service.root, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline().startswith(f"{service.url}/dashboard#code=")  # also while a browser goes on
        process.stdin.close()
        out, err = process.stdout.read(), process.stderr.read()
    assert (process.returncode, err) == (0, "") and "once" in out


# -- issues and their stories


@pytest.fixture(scope="module")
def told(service: Service) -> Client:
    """An architect who has told a story on the issue i-story: a result, an agent, events, and an answered question."""
    architect = service.client()
    architect.store(issue="i-story", decisions=["Use OAuth", *HOSTILE], files_created=["a.py", "b`.py"])
    agent = architect.spawn("i-story", "test-engineer", task="# Test the login\n" + HOSTILE[0])["agent_id"]
    assert architect.wait("agent_exited", since="earliest", filter=f"agent_id:{agent}", timeout=20_000)["events"]
    architect.publish("note", {"issue_id": "i-story", "text": HOSTILE[2], "__proto__": {"a": 1}, "big": 10**30})
    architect.publish("note", {"issue_id": ["i-story", "i-other"], "text": "both"})
    asked = architect.post("/api/approvals", {"kind": "question", "text": HOSTILE[1], "issue_id": "i-story"}).json()
    architect.post(f"/api/approvals/{asked['approval_id']}/answer", {"answer": "yes"})
    return architect


def test_a_timeline_tells_each_happening_once_in_pages_of_any_size(told: Client) -> None:
    whole = told.get("/api/issues/i-story/timeline", limit=1000).json()
    kinds = [entry["kind"] for entry in whole["entries"]]
    assert kinds == ["result", "routing", "spawned", "result", "routing", "ended", "event", "event", "approval"]
    assert len({entry["id"] for entry in whole["entries"]}) == len(kinds) and whole["has_more"] is False
    result, routing, spawned, *_, ended, note, both, approval = whole["entries"]
    assert result["decisions"][0] == "Use OAuth" and result["files"] == {"created": 2, "modified": 0, "deleted": 0}
    assert routing["next_agents"][0]["agent_type"] == "test-engineer" and routing["next_agents"][0]["reason"]
    assert spawned["task"].startswith("# Test the login") and spawned["parent"].startswith("chief-architect")
    assert (ended["state"], ended["exit_code"]) == ("completed", 0) and ended["output_tail"][0] == "# Test the login"
    assert note["data"]["__proto__"] == {"a": 1} and both["data"]["text"] == "both"
    assert (approval["state"], approval["answer"], approval["text"]) == ("answered", "yes", HOSTILE[1])
    assert not any(character in entry["title"] for entry in whole["entries"] for character in "\x1b\n\x07")
    for limit in (1, 2, 4):
        found, since, more = [], "earliest", True
        while more:
            page = told.get("/api/issues/i-story/timeline", limit=limit, since=since).json()
            assert len(page["entries"]) <= limit
            found, since, more = found + page["entries"], page["next_cursor"], page["has_more"]
        assert found == whole["entries"]
    told.publish("later", {"issue_id": "i-story"})
    (later,) = told.get("/api/issues/i-story/timeline", since=whole["next_cursor"]).json()["entries"]
    assert later["event_type"] == "later"


def test_what_the_log_has_forgotten_is_told_by_ledger_and_results(service: Service, told: Client) -> None:
    timeline = plugin("stories").Timeline
    settings: Any = SimpleNamespace(project=PROJECT, event_retention=-10)
    with closing(Records(connect_database(service.storage / "sidecar.db", read_only=True))) as read:
        entries = timeline(read, settings, "i-story", {}, str).page("earliest", 1000)["entries"]
    twice = [name for name, number in Counter(entry["id"] for entry in entries).items() if number == 2]
    assert sorted(name.partition("-")[0] for name in twice) == ["ended", "routing", "routing"]
    (approval,) = (entry for entry in entries if entry["kind"] == "approval")
    assert (approval["state"], approval["answer"]) == ("answered", "yes"), "found in the log"


def test_ends_that_the_ledger_alone_tells_are_in_their_order(service: Service) -> None:
    client = operator(service)
    agents = [client.spawn("i-ends", environment={"TEST_SECONDS": "60"})["agent_id"] for _ in range(3)]
    for agent in agents[::-1]:
        client.delete(f"/api/agents/{agent}")
        until(lambda agent=agent: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    settings: Any = SimpleNamespace(project=PROJECT, event_retention=-10)
    found, since, more = list[str](), "earliest", True
    with closing(Records(connect_database(service.storage / "sidecar.db", read_only=True))) as read:
        while more:
            page = plugin("stories").Timeline(read, settings, "i-ends", {}, str).page(since, 1)
            found += [entry["agent_id"] for entry in page["entries"] if entry["kind"] == "ended"]
            since, more = page["next_cursor"], page["has_more"]
    assert found == [agent for agent in agents[::-1] for _ in range(2)], "by the log, and by the ledger"


def ends_by_page(database: Path, issue: str, since: str, limit: int) -> list[list[str]]:
    """Whose ends each page tells, when the log has forgotten them."""
    settings: Any = SimpleNamespace(project=PROJECT, event_retention=-10)
    pages, more = list[list[str]](), True
    with closing(Records(connect_database(database, read_only=True))) as read:
        while more and len(pages) < 100:
            page = plugin("stories").Timeline(read, settings, issue, {}, str).page(since, limit)
            pages.append([entry["agent_id"] for entry in page["entries"] if entry["kind"] == "ended"])
            since, more = page["next_cursor"], page["has_more"]
        assert plugin("stories").Timeline(read, settings, issue, {}, str).page(since, limit)["entries"] == []
    return pages


def test_an_end_is_told_once_whatever_its_moment_and_whoever_else_ends_in_it(service: Service, tmp_path: Path) -> None:
    client = operator(service)
    agents = [client.spawn("i-moments")["agent_id"] for _ in range(8)]
    for agent in agents:
        until(lambda agent=agent: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    rounded_down = [at for at in (1.795e9 + step * 1.37e-5 for step in range(3000)) if math.ceil(at * 1e6) / 1e6 < at]
    moments = [*rounded_down[:4], math.nextafter(rounded_down[3], math.inf), *[1.795e9 + 5] * 3]
    with (
        closing(sqlite3.connect(service.storage / "sidecar.db")) as source,
        closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
    ):
        source.backup(copy)
        copy.execute("delete from event")
        for agent, moment in zip(agents, moments, strict=True):
            copy.execute("update agent set ended = ? where id = ?", (moment, agent))
        copy.commit()
    for limit in (1, 2, 3, 1000):
        pages = ends_by_page(tmp_path / "copy.db", "i-moments", "earliest", limit)
        assert [agent for page in pages for agent in page] == agents, limit


def test_an_end_that_is_recorded_behind_a_later_one_is_told_also_when_the_log_has_forgotten_it(
    service: Service, tmp_path: Path
) -> None:
    client = operator(service)
    agents = [client.spawn("i-border")["agent_id"] for _ in range(3)]
    for agent in agents:
        until(lambda agent=agent: client.get(f"/api/agents/{agent}/status").json()["ended_at"])
    with (
        closing(sqlite3.connect(service.storage / "sidecar.db")) as source,
        closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
    ):
        source.backup(copy)
        copy.execute("delete from event where type = 'agent_exited' and cast(body as text) like ?", (f"%{agents[0]}%",))
        copy.execute("update agent set ended = ended - 1 where id = ?", (agents[0],))
        copy.commit()
    with closing(Records(connect_database(tmp_path / "copy.db", read_only=True))) as read:
        settings: Any = SimpleNamespace(project=PROJECT, event_retention=86_400)
        page = plugin("stories").Timeline(read, settings, "i-border", {}, str).page("earliest", 1000)
    assert {entry["agent_id"] for entry in page["entries"] if entry["kind"] == "ended"} == {*agents[1:]}
    later = ends_by_page(tmp_path / "copy.db", "i-border", page["next_cursor"], 1000)
    assert agents[0] in itertools.chain.from_iterable(later)


def test_how_an_issue_stands(service: Service, told: Client) -> None:
    told.store("documentation-expert", issue="i-done")
    told.store("python-specialist", issue="i-idle")
    told.store("python-specialist", "failed", issue="i-failed")
    told.post("/api/approvals", {"kind": "question", "text": "Which?", "issue_id": "i-waiting"})
    agent = operator(service).spawn("i-working", environment={"TEST_SECONDS": "60"})["agent_id"]
    states = {row["issue_id"]: row for row in told.get("/api/issues", limit=1000).json()["issues"]}
    assert {name: row["state"] for name, row in states.items()}.items() >= {
        "i-done": "done", "i-idle": "idle", "i-failed": "failed", "i-waiting": "waiting", "i-working": "working",
        "77": "open",
    }.items()  # fmt: skip
    assert (states["77"]["title"], states["77"]["source"]) == ("The login <b>fails</b>", "issues/77-login.md")
    assert states["i-story"]["title"] == "Test the login" and states["i-waiting"]["waiting_for_people"] == 1
    (working,) = states["i-working"]["working"]
    assert working["agent_id"] == agent and states["i-working"]["agents"] == {"active": 1, "ended": 0}
    listed = told.get("/api/issues", state="working").json()["issues"]
    assert [row["issue_id"] for row in listed] == ["i-working"]
    found, since, more = [], "earliest", True
    while more:
        page = told.get("/api/issues", limit=2, since=since).json()
        found, since, more = found + page["issues"], page["next_cursor"], page["has_more"]
    assert [row["issue_id"] for row in found] == list(states)
    for name in ("../../etc/passwd", "*", "x" * 200, "<b>", "a\nb", ""):  # an event may call anything an issue
        told.publish("note", {"issue_id": name})
    told.publish("note", {"issue_id": "i-idle"})
    assert [row["issue_id"] for row in told.get("/api/issues", since=since).json()["issues"]] == ["i-idle"]
    assert "write_results" in told.get("/api/issues/i-working/timeline").json()["entries"][0]["permissions"]
    brief = told.get("/api/issues/i-working/export", format="json").json()["briefs"][agent]
    assert "STORAGE/agents/" in brief and str(service.storage) not in brief  # a colleague need not know where it lies
    told.delete(f"/api/agents/{agent}")
    whole = told.get("/api/issues/77").json()
    assert whole["body"].startswith("# The login") and whole["agents"] == whole["results"] == []


@pytest.mark.parametrize("query", [
    {"since": "x"}, {"since": "1-nan"}, {"since": "e1.r2"}, {"limit": 0}, {"limit": 1001}, {"since": "x" * 300},
])  # fmt: skip
def test_bad_pages_are_refused(told: Client, query: dict[str, Any]) -> None:
    for path in ("/api/issues", "/api/issues/i-story/timeline"):
        answer = told.get(path, **query)
        assert (answer.status_code, answer.json()["details"]["path"]) == (400, next(iter(query))), path
    assert told.get("/api/issues/i-none").status_code == told.get("/api/issues/i-none/timeline").status_code == 404
    assert told.get("/api/issues/i-none/export").status_code == 404
    assert told.get("/api/issues/i-story/export", format="html").status_code == 400


def test_files_of_impossible_times_are_paged_over(service: Service, told: Client) -> None:
    for name, moment in {"81-early.md": -5000, "82-late.md": 2**33 + 2**32, "83-now.md": time.time()}.items():
        (service.root / "issues" / name).write_text("# A title\n")
        os.utime(service.root / "issues" / name, (moment, moment))
    until(lambda: {"81", "82"} <= {row["issue_id"] for row in told.get("/api/issues", limit=1000).json()["issues"]})
    found, since, more = [], "earliest", True
    while more:
        page = told.get("/api/issues", limit=1, since=since).json()
        found, since, more = found + [row["issue_id"] for row in page["issues"]], page["next_cursor"], page["has_more"]
    assert {"81", "82", "83", "i-story"} <= {*found} and len({*found}) == len(found)


def test_a_token_for_one_issue_sees_that_one(service: Service, told: Client) -> None:
    narrow = operator(service, issue_id="i-other")
    assert (
        narrow.get("/api/issues").json()["issues"] == [] == told.get("/api/issues", issue_id="i-other").json()["issues"]
    )
    for path in ("", "/timeline", "/export"):
        assert narrow.get(f"/api/issues/i-story{path}").status_code == 403
    listed = operator(service, issue_id="i-story").get("/api/issues").json()["issues"]
    assert [row["issue_id"] for row in listed] == ["i-story"]


def test_an_export_is_read_without_the_service_and_nothing_in_it_is_markup(
    service: Service, told: Client, tmp_path: Path
) -> None:
    secret = "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5"
    told.publish("note", {"issue_id": "i-story", "text": f"token {secret}"})
    answer = told.request("GET", "/api/issues/i-story/export", headers={"Accept": "text/markdown"})
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="i-story.md"'
    tokens = MarkdownIt("commonmark").enable("table").parse(answer.text)
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_block", "hr", "blockquote_open"}, kinds
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
    for text in ("alert(1)", "evil.example", "a heading", "a list"):
        assert text in answer.text
        assert not [token for token in inline if token.type == "text" and text in token.content], text
    assert not [character for character in answer.text if ord(character) < 32 and character != "\n"]
    assert "`success: Use OAuth`" in answer.text and answer.text.index("## Results") < answer.text.index("## Agents")
    story = told.get("/api/issues/i-story/export").json()
    assert story["left_out"] == [] and secret not in json.dumps(story) + answer.text
    assert {"timeline", "agents", "results", "approvals", "briefs", "body"} <= story.keys()
    assert list(story["briefs"]) == [story["agents"][0]["agent_id"]]
    target = tmp_path / "story.md"
    assert cco(service, "export", "i-story", "--output", str(target))[0] == 0
    assert target.read_text().startswith("# Issue `i-story`")
    code, out, _ = cco(service, "export", "i-story", "--format", "json")
    assert code == 0 and json.loads(out)["issue_id"] == "i-story"
    assert cco(service, "export", "no-such")[0] == 1 and cco(service, "export", "../x")[0] == 2


def test_a_row_of_an_exports_timeline_says_what_a_reader_asks_next() -> None:
    shown = plugin("_story_export").told
    ended = {"state": "failed", "reason": "test-engineer gave no verdict"}
    answer = {"answer": "approve", "state": "answered", "answered_by": "ann", "answered_at": "2026-01-02T03:04:05Z"}
    for kind, facts, words in (
        ("event", {"data": ended}, ": failed: test-engineer gave no verdict"),
        ("event", {"data": {"message": "half done", "state": "x"}}, ": half done"),
        ("event", {"data": ["odd"]}, ""),
        ("result", {"status": "failed", "reason": "no compiler", "decisions": ["Use C"]}, ": no compiler"),
        ("result", {"status": "success", "decisions": ["Use C"]}, ": Use C"),
        ("approval", answer, ": approve by ann at 2026-01-02T03:04:05Z"),
        ("approval", {"state": "open", "answer": None, "answered_by": None}, ": open"),
        ("spawned", {"task": "x" * 500 + "\n\nYour part: qa-success: review"}, ": qa-success: review"),
        ("spawned", {"task": "Greet the user"}, ": Greet the user"),
    ):
        assert shown({"kind": kind, "title": "it", **facts}) == f"it{words}"


def test_a_failed_result_in_a_timeline_has_its_reason(architect: Client) -> None:
    for status, errors in (("failed", ["no compiler"]), ("partial", [{"line": 3}]), ("success", ["a warning"])):
        architect.store(status=status, issue="i-reasons", errors=errors, decisions=["Use C"])
    entries = architect.get("/api/issues/i-reasons/timeline").json()["entries"]
    reasons = [entry.get("reason") for entry in entries if entry["kind"] == "result"]
    assert reasons == ["no compiler", '{"line": 3}', None]


def test_an_export_tells_what_each_agent_was_to_do(told: Client) -> None:
    for task in ("succeed at once", "succeed again\n\n# and | more"):
        told.spawn("i-tasks", task=task)
    text = told.get("/api/issues/i-tasks/export", format="markdown").text
    assert text.startswith("# Issue `i-tasks`\n\n`succeed at once`\n")  # which the issue began with
    assert re.findall(r"`started: (.*)` \|$", text, re.MULTILINE) == [
        "succeed at once", r"succeed again # and \| more",
    ]  # fmt: skip
    told.spawn("i-tasks", task="succeed at once\n\nYour part: to test it")
    assert "another task: 1." in text and "\nTask:\n\n```\nsucceed again\n\n# and | more\n```\n" in text
    assert "another task: 1." in told.get("/api/issues/i-tasks/export", format="markdown").text


@pytest.mark.parametrize(("text", "shown"), [
    ("a|b", r"`a\|b`"), (r"a\|<b>", r"`a\ \|<b>`"), (r"\\|", r"`\ \ \|`"), ("a\\", r"`a\`"), ("`|``", r"``` `\|`` ```"),
    ("\u202ea\u061cb\x1b[0m\n", "`<U+202E>a<U+061C>b [0m`"), ("\n ", "`-`"), (None, "`-`"),
])  # fmt: skip
def test_no_text_ends_its_cell_or_turns_what_follows(text: str | None, shown: str) -> None:
    export = plugin("_story_export")
    assert export.cell(text) == shown
    assert export.block(f"{text}\u2066\u00e9\t\u0007")[1:-1][-1].endswith("<U+2066>\u00e9     ")


def test_a_large_result_is_told_of_in_markdown_and_whole_in_json(service: Service, told: Client) -> None:
    told.store(issue="i-large", decisions=["small"])
    told.store(issue="i-large", decisions=["large"], artifacts={"text": "x" * 2**20})
    text = told.get("/api/issues/i-large/export", format="markdown").text
    assert len(text) < 100_000 and "`small`" in text and "`large`" in text and "1,048," in text
    results = told.get("/api/issues/i-large/export").json()["results"]
    assert [len(row["result"].get("artifacts", {"text": ""})["text"]) for row in results] == [0, 2**20]


def test_a_list_reads_no_more_bodies_than_it_answers(
    service: Service, told: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, bodies = plugin("_pages"), list[int]()
    monkeypatch.setattr(pages, "PAGE_BYTES", 1)

    class Counted(Records):
        def rows(self, sql: str, *values: Any) -> Any:
            found = super().rows(sql, *values)
            bodies.extend(len(row["body"]) for row in found if "body" in row.keys())  # noqa: SIM118
            return found

    query = SimpleNamespace(since="", limit=100)
    with closing(Counted(connect_database(service.storage / "sidecar.db", read_only=True))) as read:
        rows, more = pages.page(read, "result", "select id, body from result", PROJECT, query, {"issue": "i-story"})
    assert (len(rows), more, len(bodies)) == (1, True, 1)


# -- what an agent got, and what it changed

PEM = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n" * 8 + "-----END PRIVATE KEY-----\n"


def test_the_difference_of_a_result_shows_what_changed_and_says_what_is_left_out(
    service: Service, told: Client
) -> None:
    token = "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5"
    for name, text in {
        "src/main.py": f"def main():\n    return '{token}'\n", "new <b>.py": "x = 1", "notes.txt": PEM, "build/out": "1",
        ".env": "PASSWORD=hunter2hunter2", "data.bin": "a\0b",
    }.items():  # fmt: skip
        (service.root / name).parent.mkdir(exist_ok=True)
        (service.root / name).write_text(text)
    (service.root / "README.md").unlink()
    (service.root / "link").symlink_to("/etc/passwd")
    named = {"src/main.py": "modified", "new <b>.py": "added", "notes.txt": "added", "build/out": "ignored",
             ".env": "secret", "data.bin": "binary", "README.md": "deleted", "docs/guide.md": "unchanged",
             "../x": "outside", "/etc/passwd": "outside", "link": "binary", "src": "missing", ":(top)*": "missing",
             "--output=x": "missing", "a\x00b": "outside", "none.py": "missing"}  # fmt: skip
    stored = told.store(issue="i-diff", files_modified=list(named), files_created=[{"path": "none.py"}])
    answer = told.get(f"/api/results/{stored['id']}/diff").json()
    assert {file["path"]: file["status"] for file in answer["files"]} == named
    assert "+++ b/new <b>.py\n@@ -0,0 +1,1 @@\n+x = 1\n\\ No newline at end of file\n" in answer["diff"]
    assert "-    return greet('world')" in answer["diff"] and "deleted file" in answer["diff"]
    assert "[REDACTED]" in answer["diff"] and token not in answer["diff"] and "MIIEvQ" not in answer["diff"]
    assert "root:" not in answer["diff"] and "hunter2" not in answer["diff"]
    assert "the last commit before the agent began" in answer["base"] and answer["truncated"] is False
    (service.root / "new <b>.py").write_text("x = 1\n" * 400_000)
    answer = told.get(f"/api/results/{stored['id']}/diff").json()
    assert answer["truncated"] is True and len(answer["diff"]) <= 1024 * 1024 and answer["diff"].endswith("\n")
    nothing = told.store(issue="i-diff")
    assert "names no files" in told.get(f"/api/results/{nothing['id']}/diff").json()["reason"]
    assert told.get("/api/results/no-such/diff").status_code == 404


def test_a_difference_names_the_files_that_had_uncommitted_changes_when_the_agent_began(
    make_service: Callable[..., Service],
) -> None:
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", "import time; time.sleep(600)"]))
    architect, root = service.client("chief-architect"), service.root
    for name in ("src/main.py", "new.py"):
        (root / name).write_text("written before\n")
    agent = architect.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "i-mixed"}).json()
    for name in ("src/main.py", "new.py", "src/greeting.py"):
        (root / name).write_text("written by the agent\n")
    client = service.client("python-specialist", sub=agent["agent_id"])
    names = ["src/main.py", "new.py", "src/greeting.py", "README.md"]
    body = body_of("i-mixed", files_modified=names) | {"agent_id": agent["agent_id"]}
    stored = client.post("/api/results", body).json()
    answer = client.get(f"/api/results/{stored['id']}/diff").json()
    assert answer["base"].endswith("; changed already, and not committed, before it began: src/main.py, new.py"), answer
    architect.end(agent)


def test_a_difference_shows_nothing_out_of_a_folder_that_a_file_was_or_is(tmp_path: Path) -> None:
    root, inner = make_repository(tmp_path / "root"), make_repository(tmp_path / "inner")
    git(root, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "inner")
    for name in ("was/.env", "was/id_rsa", "is"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"the word of {name}\n")
    git(root, "add", "-f", "-A")
    git(root, "commit", "-q", "-m", "Files and folders")
    base = git(root, "rev-parse", "HEAD").strip()
    git(root, "rm", "-q", "-r", "was", "is")
    (root / "is").mkdir()
    for name in ("was", "is/secret.key", "is/note.txt"):
        (root / name).write_text(f"the word of {name}\n")
    (root / "inner/README.md").write_text("other\n")
    git(root / "inner", "commit", "-q", "-a", "-m", "A change")
    git(root, "config", "diff.submodule", "diff")
    diff = plugin("diff")
    named = ["was", "is", "is/note.txt", "inner"]
    changed = dict(diff.statuses(root, base, named))
    assert changed == {"was": "added", "is": "deleted", "is/note.txt": "added", "inner": "modified"}
    text = "".join(diff.shown(root, base, named))
    assert [word for word in ("was", "is", "is/note.txt") if f"the word of {word}\n" in text] == named[:3]
    assert text.count("the word of") == 3 and "+Subproject commit" in text and "diff failed" not in text


def test_the_brief_of_an_agent_stays_readable(service: Service, told: Client) -> None:
    (agent,) = told.get("/api/issues/i-story").json()["agents"]
    answer = told.get(f"/api/agents/{agent['agent_id']}/brief")
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8" and "Test the login" in answer.text
    assert operator(service, issue_id="i-other").get(f"/api/agents/{agent['agent_id']}/brief").status_code == 403
    brief = service.storage / "agents" / agent["agent_id"] / "brief.md"
    content = brief.read_bytes()
    for replace in (brief.unlink, lambda: brief.symlink_to("/etc/passwd")):
        replace()
        answer = told.get(f"/api/agents/{agent['agent_id']}/brief")
        assert answer.status_code == 404 and "got no brief" in answer.json()["message"]
    brief.unlink()
    brief.write_bytes(content)
    assert told.get("/api/agents/no-such/brief").status_code == 404


# -- runs


def sleeping_run(person: Client, issue: str) -> tuple[dict[str, Any], str]:
    """A run whose first agent goes on, and that agent."""
    started = person.post("/api/runs", {"issue_id": issue, "task": "sleep a while"})
    assert (started.status_code, started.json()["state"]) == (202, "running"), started.text
    until(lambda: person.get("/api/agents", issue_id=issue, state="running").json()["agents"], 30)
    (agent,) = person.get("/api/agents", issue_id=issue).json()["agents"]
    assert agent["parent"] == f"run-{started.json()['run_id']}"
    return started.json(), agent["agent_id"]


def test_records_of_runs_that_cannot_be_read_are_named_and_hide_no_other(make_service: Callable[..., Service]) -> None:
    service = make_service()
    told = {"run_id": "r-1", "issue_id": "i-1", "state": "failed", "started_at": "2026-01-01T00:00:00.000Z"}
    folder = service.storage / "runs" / PROJECT
    folder.mkdir(parents=True)
    whole = json.dumps(told).encode()
    for name, content in {"half": whole[:20], "bytes": whole.replace(b"r-1", b"\xff"), "deep": b"[" * 100_000,
                          "empty": b"", "other": b"[1]", "r-1": whole}.items():  # fmt: skip
        (folder / f"{name}.json").write_bytes(content)
    assert [run["run_id"] for run in operator(service).get("/api/runs").json()["runs"]] == ["r-1"]
    passed_over = re.findall(r"runs: (\w+)\.json is passed over", service.log)
    assert sorted(passed_over) == ["bytes", "deep", "empty", "half", "other"]


def test_a_run_takes_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    pipeline = plugin("pipeline")
    monkeypatch.setattr(pipeline, "add_commands", lambda commands, table: found.update(table))
    pipeline.register_commands(commands=None)
    options = {names[0].removeprefix("--").replace("-", "_") for names, _ in found["run"].arguments}
    fields = {field.removesuffix("_id") for field in plugin("runs").RunRequest.__struct_fields__}
    assert options - fields == {"patience", "until_eof"}, "of a lost service, which ends its runs"
    assert fields - options == {"agent_command", "max_agents"}, "refused, as the service has its own"


def test_a_run_is_started_with_all_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, started = plugin("runs"), []
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **how: started.append(command))
    settings = SimpleNamespace(storage=tmp_path, project=PROJECT, root=tmp_path, plugins=(), agent_types={})
    asked = {"task": "x", "type": "y", "until": "coding", "rounds": 1, "retries": 2, "pause": 3, "timeout": 4}

    async def scene() -> None:
        runs = module.Runs(SimpleNamespace(settings=settings))
        await runs.loaded
        run = module.Run("r-1", "i-1", "running", "")
        runs._process(run, module.RunRequest(issue_id="i-1", restart=True, **asked))

    asyncio.run(scene())
    assert {"--issue=i-1", "--restart", *(f"--{name}={value}" for name, value in asked.items())} <= set(started[0])
    assert module.RunRequest.__struct_fields__[1:-3] == tuple(asked)


def test_a_run_works_through_an_issue_and_what_it_prints_is_kept(service: Service, told: Client) -> None:
    person = operator(service)
    run = person.post("/api/runs", {"issue_id": "i-run", "task": HOSTILE[0], "rounds": 1}).json()
    until(lambda: person.get(f"/api/runs/{run['run_id']}").json()["state"] != "running", 30)
    ended = person.get(f"/api/runs/{run['run_id']}").json()
    assert (ended["state"], ended["exit_code"]) == ("failed", 1) and "--rounds 1" in ended["reason"]
    assert any("chief-architect started" in line for line in ended["lines"])
    item = person.get("/api/issues/i-run").json()
    assert item["run"] == {"run_id": run["run_id"], "state": "failed"} and len(item["agents"]) == 1
    assert item["state"] == "failed" and str(service.root) not in json.dumps(ended)
    kinds = [entry["title"] for entry in person.get("/api/issues/i-run/timeline").json()["entries"]]
    assert {"pipeline_started", "pipeline_ended"} <= set(kinds)
    assert [row["run_id"] for row in person.get("/api/runs", issue_id="i-run").json()["runs"]] == [run["run_id"]]
    until(lambda: not list((service.storage / "runs").rglob("*.token")))


def test_a_run_is_stopped_with_its_agents_and_there_is_one_at_a_time(service: Service) -> None:
    person = operator(service)
    body = {"issue_id": "i-many", "task": "x", "rounds": 1}
    with ThreadPoolExecutor(4) as at_once:
        answers = list(at_once.map(lambda _: operator(service).post("/api/runs", body), range(4)))
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    run, agent = sleeping_run(person, "i-stop")
    assert person.get("/api/issues/i-stop").json()["state"] == "working"
    again = person.post("/api/runs", {"issue_id": "i-stop", "task": "x"})
    assert (again.status_code, again.json()["details"]["run_id"]) == (409, run["run_id"])
    assert operator(service, issue_id="i-other").delete(f"/api/runs/{run['run_id']}").status_code == 403
    assert service.client(bound=True).delete(f"/api/runs/{run['run_id']}").status_code == 403
    assert [person.delete(f"/api/runs/{run['run_id']}").status_code for _ in range(2)] == [202, 202]
    until(lambda: person.get(f"/api/runs/{run['run_id']}").json()["state"] == "stopped", 30)
    assert person.get(f"/api/agents/{agent}/status").json()["state"] == "killed"
    until(lambda: person.delete(f"/api/runs/{run['run_id']}").json()["ending"] is False)


def test_a_run_may_be_stopped_before_it_has_a_process_and_counts_from_its_beginning(tmp_path: Path) -> None:
    runs, ended = plugin("runs"), []
    tokens = SimpleNamespace(revoked=SimpleNamespace(add=ended.append))
    storage = SimpleNamespace(write_behind=lambda _: asyncio.get_running_loop().create_future())
    settings = SimpleNamespace(storage=tmp_path, project=PROJECT, root=tmp_path)
    types = SimpleNamespace(categories={"operator": "operator"})
    parts = {"tokens": tokens, "storage": storage, "agents": SimpleNamespace(active={}), "agent_types": types}
    sidecar = SimpleNamespace(settings=settings, **parts)
    claims = SimpleNamespace(sub="somebody", agent_type="operator", issue_id=None)

    class Slow(runs.Runs):  # type: ignore[misc]
        AT_ONCE = 2
        may_start = threading.Event()

        def _token(self, *_: Any) -> str:
            return "token"

        def _process(self, *_: Any) -> Any:
            assert self.may_start.wait(30)
            return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def act() -> tuple[Any, ...]:
        part = Slow(sidecar)
        await part.loaded
        starts = [asyncio.ensure_future(part.start(claims, runs.RunRequest(name))) for name in ("one", "two", "three")]
        with pytest.raises(ApiError, match="2 runs go on already"):
            await starts.pop()
        (one, two), stopped = part.known, [part.stop(name) for name in part.known]
        part.may_start.set()
        await asyncio.gather(*starts)
        async with asyncio.timeout(30):
            while len(ended) < 2:
                await asyncio.sleep(0.01)
        return stopped, [part.known[name].state for name in (one, two)], [part.stop(one), part.stop(two)]

    assert asyncio.run(act()) == ([True, True], ["stopped", "stopped"], [False, False])


def test_records_of_runs_that_cannot_be_read_take_no_answer_down_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs, read, problems = plugin("runs"), plugin("runs").Runs._read_all, [TimeoutError(), OSError("the disk is away")]
    folder = tmp_path / "runs" / PROJECT
    (folder / "odd.json").mkdir(parents=True)
    (folder / "half.json").write_bytes(b'{"run_id": "\xff')

    def read_at_last(part: Any) -> Any:
        if problems:
            raise problems.pop()
        return read(part)

    class Parts:
        settings = SimpleNamespace(storage=tmp_path, project=PROJECT, root=tmp_path)

    async def act() -> None:
        sidecar = Parts()
        for _ in range(2):
            with pytest.raises(OSError):
                await runs.runs_of(sidecar)
        part = await runs.runs_of(sidecar)
        assert part.known == {} and part is await runs.runs_of(sidecar)

    monkeypatch.setattr(runs.Runs, "_read_all", read_at_last)
    asyncio.run(act())
    told = caplog.text
    assert "odd.json is passed over" in told and "half.json" in told


@pytest.mark.parametrize(("body", "status"), [
    ({"issue_id": "../x"}, 400), ({"issue_id": "i", "task": "a\0b"}, 400), ({"issue_id": "i", "task": " "}, 400),
    ({"issue_id": "i", "until": "nobody"}, 400), ({"issue_id": "i", "until": "operator"}, 400),
    ({"issue_id": "i", "type": "operator"}, 400), ({"issue_id": "i", "rounds": 0}, 400), ({"task": "x"}, 400),
    ({"issue_id": "i", "agent_command": "rm -rf /"}, 400), ({"issue_id": "i", "max_agents": 3}, 400),
])  # fmt: skip
def test_bad_runs_are_refused(service: Service, body: dict[str, Any], status: int) -> None:
    person = operator(service)
    assert person.post("/api/runs", body).status_code == status
    good = {"issue_id": "i-none", "task": "x"}
    assert service.client(bound=True).post("/api/runs", good).status_code == 403
    assert operator(service, issue_id="i-other").post("/api/runs", good).status_code == 403
    assert service.client("python-specialist").post("/api/runs", good).status_code == 403
    assert person.get("/api/runs/no-such").status_code == person.delete("/api/runs/no-such").status_code == 404
    assert operator(service, issue_id="i-other").get("/api/runs").json()["runs"] == []


def test_a_run_ends_with_its_service_and_its_agents_go_on(service: Service) -> None:
    killed, first = sleeping_run(operator(service), "i-killed")
    tokens = service.storage / "runs" / PROJECT
    holders = [Client(service.url, (tokens / f"{killed['run_id']}.token").read_text())]
    assert holders[0].get("/api/agents").status_code == 200
    holders.append(service.client(sub="run-unrecorded"))  # the crash came before its record
    (tokens / "unrecorded.token").write_text(str(holders[1].token))
    (tokens / "odd.token").mkdir()
    processes = [process for process in marked_processes() if "--until-eof" in process.cmdline()]
    assert processes
    service.kill()
    until(lambda: not any(map(psutil.Process.is_running, processes)), 20)
    service.start()
    assert [holder.get("/api/agents").status_code for holder in holders] == [401, 401]
    until(lambda: [path.name for path in tokens.glob("*.token")] == ["odd.token"])
    until(lambda: "odd.token cannot be removed" in service.log)
    (tokens / "odd.token").rmdir()
    person = operator(service)
    ended = person.get(f"/api/runs/{killed['run_id']}").json()
    assert ended["state"] == "stopped" and "goes on from there" in ended["reason"]
    until(lambda: person.get(f"/api/agents/{first}/status").json()["state"] == "running")
    stopped, second = sleeping_run(person, "i-stopped")
    holders.append(Client(service.url, (tokens / f"{stopped['run_id']}.token").read_text()))
    assert service.stop() == 0
    assert not [process for process in marked_processes() if "--until-eof" in process.cmdline()]
    service.start()
    assert [holder.get("/api/agents").status_code for holder in holders] == [401, 401, 401]
    person = operator(service)
    assert person.get(f"/api/runs/{stopped['run_id']}").json()["reason"].startswith("The service stopped")
    for agent in (first, second):
        assert person.delete(f"/api/agents/{agent}").status_code == 202
    until(lambda: not person.get("/api/agents", status="active").json()["agents"])


def test_the_commands_that_the_page_shows_are_commands() -> None:
    folder = Path(cco_sidecar.__file__).parent / "plugins/http/dashboard"
    text = "".join(file.read_text() for file in folder.rglob("*.js"))
    shown = re.findall(r"""(["'`])(cco [a-z-][^\n]*?)(?<!\\)\1[,)]""", text)
    assert len(shown) >= 8
    for _, words in shown:
        typed = re.sub(r"\$\{.*\}", "issue-1", words).replace("\\'", "'")
        plugin("_command_line").parse(shlex.split(typed)[1:])
