"""The service's part of the dashboard: its files, the handover of a token, issues and their stories, runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PROJECT, Client, Service, clean_environment, copy_project, end_stragglers, make_repository

HEADERS = {
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a page of the test's own."""
    folder = tmp_path_factory.mktemp("dashboard")
    page = copy_project(folder / "program") / "plugins/http/dashboard"
    for name, text in {"index.html": "<!doctype html>", "views/own.js": "export {}", "own.css": "a{}", "own.py": "secret",
                       ".own.js": "hidden", "own..js": "dots"}.items():  # fmt: skip
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        (page / name).write_text(text)
    module = folder / "program/cco_sidecar.py"
    running = Service(make_repository(folder / "repository"), folder / "storage", module=module).start()
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log, running.log
    end_stragglers()


def cco(service: Service, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in the service's repository."""
    command = [
        sys.executable,
        str(service.module),
        *words,
        "--root",
        str(service.root),
        "--storage",
        str(service.storage),
    ]
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
        known = {"If-None-Match": answer.headers["ETag"]}
        again = nobody.request("GET", f"/dashboard{path}", headers=known)
        assert (again.status_code, again.content) == (304, b"") and HEADERS.items() <= again.headers.items()
        assert nobody.request("HEAD", f"/dashboard{path}").headers["ETag"] == answer.headers["ETag"]


@pytest.mark.parametrize("path", [
    "/own.py", "/.own.js", "/own..js", "/none.js", "/views", "/views/", "/..%2f..%2fcore.js", "/%2e%2e/mcp.js",
    "/views/..%2f..%2fx.js", "//etc/x.js", "/a%00.js", "/views/views/own.js",
])  # fmt: skip
def test_nothing_else_is_served(service: Service, path: str) -> None:
    answer = Client(service.url, None).get(f"/dashboard{path}")
    assert answer.status_code in (400, 404) and answer.json()["code"] in ("REQ_001", "REQ_002")


# -- the token


def test_a_code_is_changed_for_an_operators_token_once(service: Service) -> None:
    nobody, made = Client(service.url, None), service.client().post("/api/dashboard/code").json()
    taken = nobody.post("/api/dashboard/token", {"code": made["code"]}, headers={"Origin": service.url})
    assert taken.status_code == 200 and taken.headers["Cache-Control"] == "no-store"
    assert taken.json()["permissions"] == ["read_context", "publish_events", "spawn_agents"]
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
