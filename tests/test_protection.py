"""Who may talk to the service at all, what its answers and logs give away, and policies of plugins."""

import re
import socket
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from conftest import MODULE, PROJECT, Client, Service, body_of, serving, until

import cco_sidecar

EVENT = {"publisher": "tester", "topic": "test", "data": {}}
RESULT = body_of()


@pytest.fixture
def nobody(service: Service) -> Client:
    return Client(service.url, None)


def refused(answer: requests.Response, code: str = "REQ_007") -> bool:
    return (answer.status_code, answer.json()["code"]) == (403, code)


# -- Host


OURS = """
    localhost localhost:3001 LocalHost:3001 localhost. localhost.:3001 127.0.0.1 127.0.0.1:3001 127.1.2.3:80 [::1]
    [::1]:3001 [::ffff:127.0.0.1] [::ffff:127.8.8.8]:3001 [::FFFF:7f00:1]:3001 [0:0:0:0:0:ffff:127.0.0.1] localhost:
    127.0.0.1: [::1]: localhost:65535 localhost:1
""".split()
OF_OTHERS = """
    [::ffff:192.168.1.5] [::ffff:0:127.0.0.1] [64:ff9b::127.0.0.1] :3001 evil.example evil.example:3001
    localhost.evil.example 127.0.0.1.evil.example 127.0.0.1.nip.io localhost@evil.example evil.example@localhost
    localhost:3001:80 localhost:port localhost:0 127.0.0.1:65536 [::1]:99999 localhost:٣٠٠١ localhost::
    evil.example: localhost/evil localhost,evil.example 192.168.1.5 0.0.0.0 [::] [fe80::1] 2130706433 0x7f.1
    [localhost] [::1 ::1]
""".split()


@pytest.mark.parametrize(
    ("host", "more", "answered"),
    [
        *((host, "", True) for host in OURS),
        *((host, "", False) for host in (*OF_OTHERS, "", "localhost evil.example")),
        ("devbox.example", "devbox.example", True),
        ("DEVBOX.example:3001", "devbox.example", True),
        ("other.devbox.example", "devbox.example", False),
        ("192.168.1.5:3001", "*", True),
        ("[::ffff:192.168.1.5]:3001", "*", True),
        ("[::ffff:192.168.1.5]", "192.168.1.5", True),
        ("[fe80:0::1]", "fe80::1", True),
        ("[fe80::1]:3001", "*", True),
        ("evil.example", "*", False),
    ],
)
def test_which_hosts_are_answered(host: str, more: str, answered: bool) -> None:
    assert cco_sidecar.host_allowed(host, frozenset({"localhost", "127.0.0.1", *more.split()})) is answered


@pytest.mark.parametrize(("header", "option"), [("Host", "--allowed-host"), ("Origin", "--cors-origin")])
def test_who_is_refused_by_name_is_told_which_option_lets_it_in(service: Service, header: str, option: str) -> None:
    for path in ("/health", "/status", "/api/nothing"):
        answer = service.client().request(
            "GET", path, headers={header: "https://evil.example"[8 * (header == "Host") :]}
        )
        assert refused(answer) and f"; {option} allows more" in answer.json()["message"], answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3001", "localhost.evil.example", "192.168.1.5"])
def test_a_rebound_name_reaches_no_endpoint(service: Service, host: str) -> None:
    client = service.client()
    for method, path in [
        ("GET", "/health"),
        ("GET", "/status"),
        ("POST", "/api/results"),
        ("OPTIONS", "/status"),
        ("GET", "/api/nothing"),
    ]:
        answer = client.request(method, path, headers={"Host": host})
        assert refused(answer), (method, path)


def test_a_rebound_name_is_refused_before_the_token_is_looked_at(service: Service) -> None:
    assert refused(Client(service.url, "garbage").request("GET", "/status", headers={"Host": "evil.example"}))


def test_a_configured_host_is_answered(make_service: Callable[..., Service]) -> None:
    client = Client(make_service("--allowed-host", "devbox.example").url, None)
    assert client.request("GET", "/health", headers={"Host": "devbox.example:3001"}).status_code == 200
    assert refused(client.request("GET", "/health", headers={"Host": "evil.example"}))


# -- Origin


NEAR = """
    http://localhost http://localhost:5173 https://localhost:5173 http://127.0.0.1:8080 http://[::1]:8080
    vscode-webview://0abc123 vscode-file://vscode-app
""".split()
FAR = """
    null http:// https://evil.example http://localhost.evil.example http://evil.example/localhost
    http://localhost@evil.example http://evil.example#localhost http://127.0.0.1.evil.example ftp://localhost
    file:// javascript:alert(1) http://[::1 http://[bad] http://localhost:99999999 http://localhost:port
    chrome-extension://abcdee http://app.example https://app.example:8443 https://app.example.evil
""".split()


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        *((origin, True) for origin in (*NEAR, "https://app.example")),
        *((origin, False) for origin in ("", *FAR)),
    ],
)
def test_which_origins_may_call(origin: str, allowed: bool) -> None:
    assert cco_sidecar.origin_allowed(origin, ("https://app.example",)) is allowed


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://[::1", "http://localhost.evil.example", "http://[bad]:1"]
)
def test_a_hostile_page_is_refused_and_gets_no_cors_headers(service: Service, origin: str) -> None:
    for method, path in [
        ("GET", "/health"),
        ("GET", "/status"),
        ("POST", "/api/events/ping"),
        ("OPTIONS", "/api/results"),
    ]:
        answer = service.client().request(
            method, path, headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        )
        assert refused(answer), (method, path)
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("origin", ["http://localhost:5173", "vscode-webview://0abc123"])
def test_a_friendly_page_may_read_answers_and_errors(service: Service, origin: str) -> None:
    for client, path, status in [
        (service.client("python-specialist"), "/status", 200),
        (Client(service.url, None), "/status", 401),
    ]:
        answer = client.request("GET", path, headers={"Origin": origin})
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
    exposed = {name.strip() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
    assert exposed >= {
        "X-Request-ID",
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
        "X-Refreshed-Token",
        "Retry-After",
    }


@pytest.mark.parametrize(
    ("path", "method"), [("/api/results", "POST"), ("/api/cache/context/issue-1", "DELETE"), ("/status", "GET")]
)
def test_a_preflight_is_answered_without_a_token(nobody: Client, path: str, method: str) -> None:
    asked = {
        "Origin": "http://localhost:5173",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization",
    }
    answer = nobody.request("OPTIONS", path, headers=asked)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert method in answer.headers["Access-Control-Allow-Methods"].split(", ")
    allowed = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
    assert allowed >= {"authorization", "content-type", "idempotency-key"}


def test_a_configured_origin_may_call(make_service: Callable[..., Service]) -> None:
    client = make_service("--cors-origin", "https://app.example").client()
    answer = client.request("GET", "/status", headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
    assert refused(client.request("GET", "/status", headers={"Origin": "https://evil.example"}))


# -- headers of every answer


def test_every_answer_has_the_protective_headers(service: Service, nobody: Client) -> None:
    architect = service.client()
    answers = [
        nobody.get("/health"), nobody.get("/openapi.json"), nobody.get("/status"), nobody.get("/api/nothing"), nobody.request("PUT", "/health"),
        nobody.request("TRACE", "/health"), nobody.request("OPTIONS", "/status"), nobody.request("HEAD", "/health"), architect.get("/status"),
        architect.post("/api/results", {}), architect.post("/api/events/ping", EVENT), architect.get("/api/results/%ff"),
        architect.post("/api/events/ping", EVENT | {"data": {"text": "x" * 2_000_000}}), architect.get("/api/events/wait/x?timeout=0"),
    ]  # fmt: skip
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Request-ID"].startswith("req-")
        assert "Tornado" not in answer.headers["Server"]
    assert len({answer.headers["X-Request-ID"] for answer in answers}) == len(answers)


def test_contexts_may_be_kept_by_their_reader_only(architect: Client, issue: str) -> None:
    path = f"/api/context/{issue}/python-specialist"
    answer = architect.get(path)
    assert answer.headers["Cache-Control"] == "private, no-cache"
    again = architect.request("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["Cache-Control"] == "private, no-cache"
    assert again.headers["ETag"] == answer.headers["ETag"]
    assert architect.get(f"/api/context/{issue}/no-such-type").headers["Cache-Control"] == "no-store"


# -- the audit log


def audited(service: Service, answer: requests.Response) -> dict[str, Any]:
    """The one line about ``answer``."""
    lines = until(lambda: [line for line in service.audit() if line["request_id"] == answer.headers["X-Request-ID"]])
    assert len(lines) == 1
    return lines[0]


def test_the_audit_log_says_who_did_what_on_what_with_what_outcome(service: Service) -> None:
    client = service.client("python-specialist", sub="agent-7")
    line = audited(service, client.post("/api/results", RESULT))
    assert {
        "who": "agent-7",
        "agent_type": "python-specialist",
        "method": "POST",
        "path": "/api/results",
        "status": 201,
    }.items() <= line.items()
    assert (line["outcome"], line["code"], line["remote"]) == ("done", None, "127.0.0.1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
    line = audited(service, client.delete("/api/cache/context/issue-never-cached"))
    assert (line["outcome"], line["status"], line["code"]) == ("refused", 404, "REQ_002")


def spent(service: Service, sub: str) -> requests.Response:
    """The refusal of a subject that has used up its burst."""
    client = service.client("documentation-expert", sub=sub)
    answers = until(lambda: (answer := client.get("/api/results")).status_code == 429 and [answer])
    return answers[0]  # type: ignore[no-any-return]


def test_neither_log_tells_a_token_that_was_put_into_a_path_or_a_name(service: Service) -> None:
    client = service.client(sub="careless-7")
    token = str(client.token)
    answers = [
        client.get(f"/api/results/{token}"), client.delete(f"/api/cache/context/{token}"), client.get(f"/api/agents/{token}/logs"),
        client.post("/api/results", RESULT | {"agent_type": token}), client.get(f"/{token}"), client.get("/status", token=token),
    ]  # fmt: skip
    until(lambda: all(answer.headers["X-Request-ID"] in service.log for answer in answers))
    for log in (service.log, (service.storage / "audit.log").read_text()):
        assert token not in log and token.rpartition(".")[0] not in log
    assert audited(service, answers[1])["path"] == "/api/cache/context/[REDACTED]"


def test_no_log_tells_the_beginning_of_a_token_that_it_cuts(service: Service, nobody: Client) -> None:
    token = str(service.client(sub="careless-8", jti="x" * 32).token)
    places = range(500 - len(token), 500, 40)
    answers = [nobody.get(f"/api/context/{'a' * place}/{token}") for place in places]
    answers += [nobody.get(f"/api/context/{'a' * place}/{'/'.join([token] * 20)}") for place in places]
    answers += [service.client().get("/status", **{"a" * place + token: "1"}) for place in (20, *places)]
    until(lambda: all(answer.headers["X-Request-ID"] in service.log for answer in answers))
    told = service.log + (service.storage / "audit.log").read_text() + str([answer.headers for answer in answers])
    assert "[REDACTED]" in told and token[:20] not in told


@pytest.mark.parametrize("end", ["", "/lost", " " * 10_000, "/" + "a" * 300_000], ids=len)
def test_wherever_a_token_stands_it_is_not_told(end: str) -> None:
    token = jwt.encode({"sub": "careless-9", "jti": "x" * 300}, "s" * 32)
    for place in range(520):
        for text in ("a" * place + "/" + token + end, f"{token}/" * 30 + "a" * place + f"/{token}{end}"):
            told = cco_sidecar.without_tokens(text)
            assert (
                "eyJ" not in told[:497] and len(told) <= 520 and (token[:3] not in text[:500] or "[REDACTED]" in told)
            )
    assert cco_sidecar.without_tokens(f"/monkeyJump{end}")[:11] == "/monkeyJump"


def test_who_has_no_token_cannot_fill_the_logs_with_long_names(service: Service) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    for request in (b"GET /api/%b", b"GET /api/context/%b", b"POST /%b", b"X%b /health"):
        for letters in (b"a" * 7_000, b"eyJ" * 2_500, b"a" * 300_000):
            with socket.create_connection((host, int(port)), 30) as line:
                line.sendall(request % letters + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert line.recv(9) == b"HTTP/1.1 "
    last = service.client().get("/api/nothing").headers["X-Request-ID"]
    for log in (lambda: service.log, lambda: (service.storage / "audit.log").read_text()):
        text = until(lambda log=log: last in log() and log())
        assert max(map(len, text.splitlines())) < 2_000


def test_the_audit_log_tells_refusals_of_every_kind(service: Service, nobody: Client) -> None:
    reader = service.client("documentation-expert", sub="reader-7")
    for answer, who, code in [
        (nobody.get("/status"), None, "AUTH_001"),
        (Client(service.url, "garbage").post("/api/results", RESULT), None, "AUTH_001"),
        (reader.post("/api/results", RESULT), "reader-7", "AUTH_003"),
        (service.client(sub="stranger-7", project_id="project-xyz").get("/status"), None, "AUTH_003"),
        (nobody.request("GET", "/health", headers={"Host": "evil.example"}), None, "REQ_007"),
        (nobody.get("/api/nothing"), None, "REQ_002"),
        (nobody.request("TRACE", "/status"), None, "REQ_003"),
        (reader.post("/api/results", RESULT | {"more": "x" * 33 * 1024 * 1024}), None, "REQ_004"),
        (
            service.client(sub="coder-7").request(
                "POST", "/api/results", data="x", headers={"Content-Type": "text/plain"}
            ),
            "coder-7",
            "REQ_005",
        ),
        (
            service.client(sub="coder-7").request(
                "POST", "/api/results", json=RESULT, headers={"Content-Encoding": "gzip"}
            ),
            "coder-7",
            "REQ_005",
        ),
        (service.client(sub="coder-7").post("/api/results", {}), "coder-7", "REQ_001"),
        (spent(service, "hasty-7"), "hasty-7", "RATE_001"),
    ]:
        line = audited(service, answer)
        assert (line["who"], line["code"], line["outcome"]) == (who, code, "refused")
        assert line["reason"]


def test_reading_is_not_audited(service: Service) -> None:
    client = service.client()
    read, changed = client.get("/status"), client.post("/api/events/ping", EVENT)
    assert audited(service, changed)
    assert read.headers["X-Request-ID"] not in (service.storage / "audit.log").read_text()


def test_the_audit_log_is_for_its_owner_only(service: Service) -> None:
    assert (service.storage / "audit.log").stat().st_mode & 0o777 == 0o600
    assert service.storage.stat().st_mode & 0o777 == 0o700


# -- what must not be told


def test_neither_errors_nor_logs_give_away_tokens_paths_or_tracebacks(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "/nowhere/agent {task}")
    (service.storage / "results").mkdir()
    (service.storage / "results" / PROJECT).write_text("in the way of the results")
    architect, coder = service.client(), service.client("python-specialist")
    other = Client(service.url, str(architect.token)[:-3] + "abc")
    secret = "a-body-that-nobody-logs"
    answers = [
        other.get("/status"), Client(service.url, f"{coder.token}.more").get("/status"), coder.post("/api/agents/spawn", {"task": secret}),
        architect.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "i", "task": secret, "environment": {"KEY": secret}}),
        architect.post("/api/results", RESULT | {"result": {"status": "success", "decisions": [secret]}}),
        architect.post("/api/results", RESULT | {"issue_id": "../../etc/passwd"}), architect.get("/api/results/..%2f..%2fetc%2fpasswd"),
        architect.get("/api/agents/agent-unknown/logs"), architect.get("/api/context/i/no-such-type"),
        architect.get("/api/events/wait/x?since=garbage"),
        architect.post("/api/events/ping", EVENT | {"data": secret}), architect.request("POST", "/api/events/ping", data=secret),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} == {400, 401, 403, 404, 500}
    assert architect.post("/api/events/ping", EVENT | {"data": {"text": secret}}).status_code == 202
    folders = [str(service.root), str(service.storage), str(MODULE.parent), "/nowhere", "/etc/passwd"]
    hidden = [
        str(architect.token),
        str(coder.token),
        str(other.token),
        (service.storage / "jwt.secret").read_text().strip(),
        secret,
    ]
    for answer in answers:
        assert [word for word in [*folders, *hidden, "Traceback", 'File "'] if word in answer.text] == [], answer.text
    until(lambda: all(answer.headers["X-Request-ID"] in service.log for answer in answers))
    assert service.stop() == 0
    lines = [
        line for line in service.log.splitlines() if not line.startswith("  ")
    ]  # the banner names root and storage
    for log in ("\n".join(lines), (service.storage / "audit.log").read_text()):
        assert [word for word in [*folders, *hidden, "Traceback"] if word in log] == []
    assert [word for word in hidden if word in service.log] == [], "the banner too"


@pytest.mark.parametrize("level", ["debug", "info", "warning"])
def test_the_log_has_one_line_for_a_request_and_those_that_only_read_at_debug(
    make_service: Callable[..., Service], level: str
) -> None:
    service = make_service("--log-level", level)
    client = service.client("python-specialist", sub="agent-8")
    asked = {
        "GET /status 200": client.get("/status"),
        "HEAD /health 200": client.request("HEAD", "/health"),
        "GET /api/results/none 404": client.get("/api/results/none"),
        "POST /api/agents/spawn 403": client.post("/api/agents/spawn", {}),
        "POST /api/events/ping 202": client.post("/api/events/ping", EVENT),
    }
    told = {"debug": list(asked), "info": list(asked)[2:], "warning": []}[level]
    assert service.stop() == 0
    lines = service.log.splitlines()
    for words, answer in asked.items():
        found = [line for line in lines if answer.headers["X-Request-ID"] in line]
        assert len(found) == (words in told) and all(words in line for line in found), (words, answer.text)
    assert all((" DEBUG " in line) == (words in list(asked)[:2]) for words in told for line in lines if words in line)


# -- permission policies

POLICY = """
    import time
    from cco_sidecar import hookimpl

    @hookimpl
    def permission_policy(claims, permission, method, path):
        if path == "/status":
            return None
        if claims.sub == "asked":
            return f"{claims.agent_type} {permission} {method} {path}"
        if claims.sub == "hanging":
            time.sleep(60)
        if claims.sub == "exiting":
            raise SystemExit("enough")
        if claims.sub == "raising":
            raise RuntimeError("the policy is broken\\nin two lines")
        return {"agreeing": True, "silent": None, "refusing": False, "empty": "", "zero": 0, "number": 42, "list": [], "object": object()}[claims.sub]
"""


def plugin_folder(folder: Path, **sources: str) -> Path:
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return folder


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose policy decides by the subject of the token."""
    folder = tmp_path_factory.mktemp("guarded")
    plugins = plugin_folder(folder / "policies", strict_house=POLICY)
    with serving(folder, "--plugins", str(plugins)) as running:
        yield running


@pytest.mark.parametrize("subject", ["agreeing", "silent"])
def test_a_policy_that_agrees_changes_nothing(guarded: Service, subject: str) -> None:
    assert guarded.client(sub=subject).post("/api/events/ping", EVENT).status_code == 202


@pytest.mark.parametrize(
    "subject", ["refusing", "raising", "exiting", "empty", "zero", "number", "list", "object", "unknown-to-the-policy"]
)
def test_a_policy_that_does_not_clearly_agree_refuses(guarded: Service, subject: str) -> None:
    client = guarded.client(sub=subject)
    before = guarded.client(sub="agreeing").get("/status").json()["events"]["total_published"]
    answer = client.post("/api/events/ping", EVENT)
    assert refused(answer, "AUTH_003")
    assert "strict_house" in answer.json()["message"]
    assert client.get("/status").json()["events"]["total_published"] == before, "nothing was done"


def test_a_policys_reason_is_told(guarded: Service) -> None:
    answer = guarded.client("python-specialist", sub="asked").post("/api/results", RESULT)
    assert refused(answer, "AUTH_003")
    reason = "python-specialist write_results POST /api/results"
    assert reason in answer.json()["message"]
    assert answer.json()["details"]["policy"] == reason
    assert audited(guarded, answer)["reason"] == answer.json()["message"]


def test_a_policy_is_asked_after_the_permission_and_never_without_a_token(guarded: Service) -> None:
    answer = guarded.client("documentation-expert", sub="asked").post("/api/results", RESULT)
    assert answer.json()["details"] == {"permission": "write_results"}
    assert Client(guarded.url, None).get("/health").status_code == 200
    assert Client(guarded.url, None).get("/api/results").status_code == 401


def test_a_policy_that_hangs_refuses_and_takes_nobody_with_it(guarded: Service) -> None:
    hanging, answers = guarded.client(sub="hanging"), []
    thread = threading.Thread(target=lambda: answers.append(hanging.get("/api/results")))
    thread.start()
    looks = 0
    while thread.is_alive():
        assert Client(guarded.url, None).get("/health").status_code == 200
        assert guarded.client(sub="agreeing").get("/api/results").status_code == 200
        looks += 1
        thread.join(0.2)
    assert looks > 1 and refused(answers[0], "AUTH_003")


def test_one_refusal_among_several_policies_is_enough(make_service: Callable[..., Service], tmp_path: Path) -> None:
    template = "from cco_sidecar import hookimpl\n@hookimpl\ndef permission_policy(claims):\n    return {}\n"
    sources = {
        "a_yes": template.format("True"),
        "b_no": template.format("'not on Sundays'"),
        "c_yes": template.format("True"),
    }
    service = make_service("--plugins", str(plugin_folder(tmp_path / "policies", **sources)))
    answer = service.client().get("/status")
    assert refused(answer, "AUTH_003")
    assert "not on Sundays" in answer.json()["message"]
