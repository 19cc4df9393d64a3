"""Which tokens are good, what each lets its holder do, how they are made, refreshed and revoked."""

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from conftest import (
    ALL,
    MODULE,
    PROJECT,
    ROOT,
    Client,
    Service,
    body_of,
    clean_environment,
    described,
    every_route,
    good_claims,
    served,
    until,
)

import cco_sidecar

SECRET = "another secret that is long enough to sign with"
EVENT = {"publisher": "tester", "topic": "test", "data": {}}
CATEGORY_TYPES = {
    "architect": ["chief-architect"],
    "coding": ["python-specialist", "rust-specialist"],
    "qa": ["test-engineer"],
    "security": ["security-auditor"],
    "documentation": ["documentation-expert"],
    "support": ["technical-researcher"],
}
GRANTED = {
    "architect": {"read_context", "write_results", "publish_events", "spawn_agents"},
    "coding": {"read_context", "write_results", "publish_events"},
    "qa": {"read_context", "write_results", "publish_events"},
    "security": {"read_context", "write_results", "publish_events"},
    "documentation": {"read_context"},
    "support": {"read_context", "publish_events"},
}


def result(
    agent_type: str = "python-specialist", agent_id: str = "a-1", issue: str = "issue-1", project: str = PROJECT
) -> dict[str, Any]:
    return body_of(issue, agent_type=agent_type) | {"agent_id": agent_id, "project_id": project}


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def encode(part: Any) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def sign(header: Any, payload: Any, secret: str, digest: Any = hashlib.sha256) -> str:
    """A token whose every part can be nonsense, with a right signature."""
    signed = f"{encode(header)}.{encode(payload)}"
    return f"{signed}.{encode(hmac.new(secret.encode(), signed.encode(), digest).digest())}"


def refused(answer: requests.Response, code: str = "AUTH_001") -> bool:
    return (answer.status_code, answer.json()["code"]) == (cco_sidecar.ERRORS[code][0], code)


# -- attacks

HS256 = {"alg": "HS256", "typ": "JWT"}


def edited(secret: str) -> str:
    """A real token of a reader whose payload was replaced by an architect's."""
    real = jwt.encode(good_claims(agent_type="documentation-expert"), secret, algorithm="HS256")
    header, _, signature = real.split(".")
    return f"{header}.{encode(good_claims())}.{signature}"


ATTACKS: dict[str, Callable[[str], str]] = {
    "alg none": lambda s: f"{encode({'alg': 'none', 'typ': 'JWT'})}.{encode(good_claims())}.",
    "alg None with a signature": lambda s: sign({"alg": "None"}, good_claims(), s),
    "alg none, empty parts": lambda s: f"{encode({'alg': 'none'})}..",
    "alg missing": lambda s: sign({"typ": "JWT"}, good_claims(), s),
    "alg null": lambda s: sign({"alg": None}, good_claims(), s),
    "alg a list": lambda s: sign({"alg": ["HS256"]}, good_claims(), s),
    "HS384 with the right secret": lambda s: sign({"alg": "HS384", "typ": "JWT"}, good_claims(), s, hashlib.sha384),
    "HS512 with the right secret": lambda s: sign({"alg": "HS512", "typ": "JWT"}, good_claims(), s, hashlib.sha512),
    "RS256 named, HS256 made": lambda s: sign({"alg": "RS256", "typ": "JWT"}, good_claims(), s),
    "hs256 in lower case": lambda s: sign({"alg": "hs256", "typ": "JWT"}, good_claims(), s),
    "an unknown critical header": lambda s: sign(HS256 | {"crit": ["b64"], "b64": False}, good_claims(), s),
    "other key": lambda s: jwt.encode(good_claims(), SECRET, algorithm="HS256"),
    "empty key": lambda s: sign(HS256, good_claims(), ""),
    "key by header": lambda s: sign(
        HS256 | {"jwk": {"kty": "oct", "k": encode(SECRET.encode())}}, good_claims(), SECRET
    ),
    "key by file name": lambda s: sign(HS256 | {"kid": "/dev/null"}, good_claims(), ""),
    "key id of another file": lambda s: sign(
        HS256 | {"kid": "../../../../../../etc/hostname"}, good_claims(), Path("/etc/hostname").read_text()
    ),
    "key id that asks a database": lambda s: sign(HS256 | {"kid": "x' union select 'k'--"}, good_claims(), "k"),
    "key id no text": lambda s: sign(HS256 | {"kid": [1]}, good_claims(), SECRET),
    "key by URL": lambda s: sign(
        HS256 | {"jku": "http://localhost:1/keys", "x5u": "file:///dev/null"}, good_claims(), ""
    ),
    "critical no list": lambda s: sign(HS256 | {"crit": "exp"}, good_claims(), s),
    "critical empty": lambda s: sign(HS256 | {"crit": []}, good_claims(), s),
    "encrypted form": lambda s: ".".join(["e30"] * 5),
    "zero bytes": lambda s: sign(HS256, good_claims(), s) + "%00",
    "secret cut at NUL": lambda s: sign(HS256, good_claims(), s + "\0"),
    "edited payload": edited,
    "signature cut": lambda s: jwt.encode(good_claims(), s, algorithm="HS256")[:-4],
    "signature gone": lambda s: jwt.encode(good_claims(), s, algorithm="HS256").rpartition(".")[0] + ".",
    "payload a list": lambda s: sign(HS256, [], s),
    "payload a text": lambda s: sign(HS256, "text", s),
    "payload no JSON": lambda s: sign(HS256, b"{not json", s),
    "payload no UTF-8": lambda s: sign(HS256, b'{"sub": "\xff"}', s),
    "payload nested deeply": lambda s: sign(HS256, b"[" * 2_000 + b"]" * 2_000, s),
    "header no JSON": lambda s: sign(b"{", good_claims(), s),
    "two parts": lambda s: ".".join(jwt.encode(good_claims(), s, algorithm="HS256").split(".")[:2]),
    "four parts": lambda s: jwt.encode(good_claims(), s, algorithm="HS256") + ".more",
    "garbage": lambda s: "garbage",
    "dots": lambda s: "..",
    "not Base64": lambda s: "!!!.???.***",
    "oversized": lambda s: jwt.encode(good_claims(more="x" * 10_000), s, algorithm="HS256"),
    "the secret itself": lambda s: s,
}
for missing in ("sub", "agent_type", "project_id", "permissions", "exp", "iat"):
    ATTACKS[f"{missing} missing"] = lambda s, name=missing: jwt.encode(
        good_claims(**{name: None}), s, algorithm="HS256"
    )
MISTYPED: dict[str, list[Any]] = {
    "sub": [1, [], {}, True, "", "two\nlines", "bell\a"],
    "agent_type": [1, [], True, "", "no-such-type"],
    "project_id": [1, [], True],
    "permissions": ["read_context", 1, {}, [1], [None], True],
    "exp": ["soon", "4102444800", [], True, 1e400, 1e300, -1e300],
    "iat": ["once", [], True, 4_102_444_800],
    "nbf": [4_102_444_800, "later"],
    "jti": [1],
    "iss": [1],
    "issue_id": [1, []],
    "bound": ["yes", 1],
}
for name, values in MISTYPED.items():
    for value in values:
        ATTACKS[f"{name} {value!r}"] = lambda s, name=name, value=value: sign(HS256, good_claims(**{name: value}), s)
ATTACKS["exp NaN"] = lambda s: sign(HS256, good_claims(exp=float("nan")), s)
for name in ("sub", "agent_type", "project_id", "permissions", "exp", "iat"):
    ATTACKS[f"{name} null"] = lambda s, name=name: sign(HS256, good_claims() | {name: None}, s)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_or_malformed_token_is_refused(service: Service, attack: str) -> None:
    token = ATTACKS[attack]((service.storage / "jwt.secret").read_text())
    assert refused(Client(service.url, token).get("/status"))


def test_every_refusal_of_a_token_says_the_same(service: Service) -> None:
    secret, shapes = (service.storage / "jwt.secret").read_text(), set()
    for attack in (
        "alg none",
        "other key",
        "edited payload",
        "oversized",
        "sub missing",
        "exp 'soon'",
        "garbage",
        "key by file name",
    ):
        answer = Client(service.url, ATTACKS[attack](secret)).get("/status")
        body = {name: value for name, value in answer.json().items() if name not in ("timestamp", "request_id")}
        shapes.add((json.dumps(body, sort_keys=True), answer.headers["WWW-Authenticate"], *sorted(set(answer.headers))))
    assert len(shapes) == 1


def test_the_table_of_attacks_starts_from_a_token_that_works(service: Service) -> None:
    secret = (service.storage / "jwt.secret").read_text()
    assert Client(service.url, sign(HS256, good_claims(), secret)).get("/status").status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic YTpi", "Token {}", "{}", "Bearer {} {}", "Bearer, {}", "Bearer\u00a0{}"]
)
def test_a_malformed_authorization_header_is_refused(service: Service, header: str) -> None:
    token = service.token()
    value = header.replace("{}", token).encode("latin-1")
    answer = requests.get(f"{service.url}/status", headers={"Authorization": value}, timeout=10)
    assert refused(answer)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_word_bearer_may_be_written_in_any_case(service: Service) -> None:
    for word in ("Bearer", "bearer", "BEARER"):
        assert (
            requests.get(
                f"{service.url}/status", headers={"Authorization": f"{word} {service.token()}"}, timeout=10
            ).status_code
            == 200
        )


def test_a_token_is_read_from_its_header_only(service: Service) -> None:
    token = service.token()
    nobody = Client(service.url, None)
    assert refused(nobody.get("/status", access_token=token, token=token))
    assert refused(nobody.request("GET", "/status", cookies={"token": token}))


def test_an_expired_token_says_when_it_ended(service: Service) -> None:
    now = int(time.time())
    answer = service.client(iat=now - 7200, exp=1_763_456_400).get("/status")
    assert refused(answer, "AUTH_002")
    assert answer.json()["details"] == {"token_expired": True, "expiry_time": "2025-11-18T09:00:00Z"}


def test_a_token_that_worked_stops_working_when_it_expires(service: Service) -> None:
    client = service.client(exp=int(time.time()) + 2)
    assert client.get("/status").status_code == 200
    until(lambda: client.get("/status").status_code == 401)
    assert refused(client.get("/status"), "AUTH_002")


def test_the_clock_of_an_issuer_may_be_a_minute_ahead(service: Service) -> None:
    now = int(time.time())
    assert service.client(iat=now + 50).get("/status").status_code == 200
    assert refused(service.client(iat=now + 90).get("/status"))
    assert refused(service.client(iat=now - 100, exp=now - 2).get("/status"), "AUTH_002")


def test_a_forged_expired_token_is_forged_rather_than_expired(service: Service) -> None:
    token = jwt.encode(good_claims(exp=1), SECRET, algorithm="HS256")
    answer = Client(service.url, token).get("/status")
    assert refused(answer)
    assert "details" not in answer.json()


def own_tokens(tmp_path: Path, project: str = PROJECT) -> cco_sidecar.Tokens:
    """Tokens without a service around it."""
    settings = cco_sidecar.load_settings(
        {"root": str(tmp_path), "project": project, "storage": str(tmp_path / "s"), "jwt_secret": SECRET}, {}
    )
    hooks = types.SimpleNamespace(ask=lambda *_, **__: [("test", {"qa-engineer": "qa"})])
    tokens = cco_sidecar.Tokens(settings, cco_sidecar.AgentTypes(hooks, settings))  # type: ignore[arg-type]
    tokens.load_secret()
    return tokens


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signature was checked."""
    seen, decode = [], jwt.decode
    monkeypatch.setattr(
        jwt,
        "decode",
        lambda token, *arguments, **keywords: (seen.append(token), decode(token, *arguments, **keywords))[1],
    )
    return seen


def code_of(tokens: cco_sidecar.Tokens, token: str) -> str | None:
    try:
        tokens.verify(f"Bearer {token}")
    except cco_sidecar.ApiError as error:
        return error.code
    return None


def test_a_signature_is_checked_once_until_expiry_or_revocation(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = own_tokens(tmp_path)
    one, two = (tokens.mint(name, "qa-engineer", ttl=60) for name in ("one", "two"))
    assert [code_of(tokens, token) for token in (one, two) * 100] == [None] * 200
    assert decoded == [one, two]
    tokens.revoked.add("one")
    assert (code_of(tokens, one), code_of(tokens, two)) == ("AUTH_001", None)
    clock = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: clock)
    assert code_of(tokens, two) == "AUTH_002"


def test_forged_tokens_are_not_remembered_and_good_ones_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = own_tokens(tmp_path)
    for number in range(100):
        assert code_of(tokens, tokens.mint(f"agent-{number}", "qa-engineer")) is None
        assert code_of(tokens, f"{number}.forged.token") == "AUTH_001"
    known = tokens._read.cache_info()
    assert known.currsize == 100 and known.maxsize == 4_000


# -- projects

REQUESTS = {
    "get context": ("GET", "/api/context/issue-1/python-specialist", None),
    "store result": ("POST", "/api/results", result()),
    "list results": ("GET", "/api/results", None),
    "get result": ("GET", "/api/results/result-1", None),
    "wait": ("GET", "/api/events/wait/ping?timeout=0", None),
    "publish": ("POST", "/api/events/ping", EVENT),
    "spawn": ("POST", "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"}),
    "agent status": ("GET", "/api/agents/agent-1/status", None),
    "end agent": ("DELETE", "/api/agents/agent-1", None),
    "clear cache": ("DELETE", "/api/cache/context/issue-1", None),
    "clear whole cache": ("DELETE", "/api/cache/all", None),
    "refresh": ("POST", "/api/auth/refresh", None),
    "plugins": ("GET", "/api/plugins", None),
    "status": ("GET", "/status", None),
    "health": ("GET", "/health", None),
    "openapi": ("GET", "/openapi.json", None),
}
PUBLIC = {"health", "openapi"}
NEEDED = {
    "get context": "read_context",
    "store result": "write_results",
    "list results": "read_context",
    "get result": "read_context",
    "agent status": "read_context",
    "publish": "publish_events",
    "spawn": "spawn_agents",
    "end agent": "spawn_agents",
    "clear whole cache": "spawn_agents",
    "plugins": "spawn_agents",
}


def test_the_table_of_requests_has_every_route() -> None:
    found = []
    for method, path, _ in REQUESTS.values():
        found += [
            (row.method, row.path)
            for row in every_route()
            if row.method == method
            and row.matched(path.partition("?")[0])
            and row.path.count("{") == path_names(row.path, path)
        ]
    assert sorted(set(found)) == sorted((row.method, row.path) for row in every_route())


def path_names(pattern: str, path: str) -> int:
    """How many parts of ``path`` differ from those of ``pattern``: a literal part is no name."""
    return sum(one != other for one, other in zip(pattern.split("/"), path.partition("?")[0].split("/"), strict=True))


@pytest.mark.parametrize("name", described(REQUESTS))
def test_a_token_is_needed_everywhere_but_for_health_and_the_description(service: Service, name: str) -> None:
    method, path, body = REQUESTS[name]
    answer = Client(service.url, None).request(method, path, json=body)
    assert answer.status_code == 200 if name in PUBLIC else refused(answer)


@pytest.mark.parametrize("name", described(REQUESTS))
def test_a_token_of_another_project_is_refused(service: Service, name: str) -> None:
    method, path, body = REQUESTS[name]
    answer = service.client(project_id="project-xyz").request(method, path, json=body)
    assert answer.status_code == 200 if name in PUBLIC else refused(answer, "AUTH_003")


def test_a_body_of_another_project_is_refused(service: Service) -> None:
    architect = service.client()
    assert refused(architect.post("/api/results", result(project="project-xyz")), "AUTH_003")
    assert refused(architect.post("/api/events/ping", EVENT | {"project_id": "project-xyz"}), "AUTH_003")
    spawn = {"agent_type": "python-specialist", "issue_id": "issue-1", "project_id": "project-xyz"}
    assert refused(architect.post("/api/agents/spawn", spawn), "AUTH_003")


# -- permissions


def lacking(answer: requests.Response) -> str | None:
    """The permission that a refusal names; None where there was no such refusal."""
    if answer.status_code != 403:
        return None
    assert answer.json()["code"] == "AUTH_003"
    permission = str(answer.json()["details"]["permission"])
    assert permission in answer.json()["message"]
    return permission


@pytest.mark.parametrize(
    ("category", "agent_type"), [(category, name) for category, names in CATEGORY_TYPES.items() for name in names]
)
def test_each_category_may_do_what_its_row_says(setup: str, service: Service, category: str, agent_type: str) -> None:
    for name in served(REQUESTS, setup):
        method, path, body = REQUESTS[name]
        answer = service.client(agent_type).request(method, path, json=body)
        needed = NEEDED.get(name)
        assert lacking(answer) == (needed if needed and needed not in GRANTED[category] else None), name
        assert answer.status_code != 401


@pytest.mark.needs_plugin("agents/logs and agents/agent_list read them")
@pytest.mark.parametrize("path", ["/api/agents", "/api/agents/agent-1/logs"])
def test_lists_and_logs_of_agents_need_what_reading_one_needs(service: Service, path: str) -> None:
    assert lacking(service.client("python-specialist", permissions=["write_results"]).get(path)) == "read_context"
    assert refused(Client(service.url, None).get(path))
    assert refused(service.client(issue_id="issue-1").get("/api/agents", issue_id="issue-2"), "AUTH_003")


@pytest.mark.needs_plugin("events/event_list lists them")
def test_dead_letters_need_an_architect(service: Service) -> None:
    assert service.client().get("/api/events", dead="true").status_code == 200
    assert lacking(service.client("python-specialist").get("/api/events", dead="true")) == "spawn_agents"


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["read_context"],
        ["write_results"],
        ["publish_events"],
        ["read_context", "publish_events"],
        ["no-such-permission"],
    ],
)
def test_a_tokens_own_list_only_narrows(setup: str, service: Service, own: list[str]) -> None:
    for agent_type, category in [
        ("chief-architect", "architect"),
        ("python-specialist", "coding"),
        ("documentation-expert", "documentation"),
    ]:
        for name in served(NEEDED, setup):
            needed, (method, path, body) = NEEDED[name], REQUESTS[name]
            answer = service.client(agent_type, permissions=own).request(method, path, json=body)
            assert lacking(answer) == (None if needed in set(own) & GRANTED[category] else needed), (agent_type, name)


def test_every_built_in_type_has_a_category_with_a_row_here() -> None:
    assert set(cco_sidecar.AGENT_TYPES) == set(CATEGORY_TYPES) == set(GRANTED)
    for category, examples in CATEGORY_TYPES.items():
        assert set(examples) <= set(cco_sidecar.AGENT_TYPES[category].split())


def test_no_agent_type_is_named_twice_and_the_plugin_specialists_brings_them_to_a_hundred() -> None:
    more = cco_sidecar.import_file(ROOT / "plugins/agents/specialists.py").register_agent_types(
        cco_sidecar.load_settings({}, {})
    )
    names = [name for names in cco_sidecar.AGENT_TYPES.values() for name in names.split()]
    assert len([*names, *more]) == len({*names, *more}) >= 100
    assert set(more.values()) <= set(GRANTED) and more["devops-engineer"] == "coding"
    languages = cco_sidecar.LANGUAGES.values()
    assert not more.keys() & {f"{name}-specialist" for name in languages}  # routing knows those of the module alone


@pytest.mark.needs_plugin("agents/specialists adds them")
def test_a_type_of_the_plugin_specialists_may_do_what_its_category_may(service: Service) -> None:
    assert (
        service.client("devops-engineer").post("/api/results", result(agent_type="devops-engineer")).status_code == 201
    )
    assert lacking(service.client("ux-designer").post("/api/results", result(agent_type="ux-designer")))
    meant = {
        "devops-enginer": "devops-engineer", "djnago": "django-specialist", "chief-architct": "chief-architect",
        "architct": "chief-architect, cloud-architect or database-architect", "frontend": "frontend-developer",
        "security": "security-auditor, api-security-auditor or security-engineer",
        "tester": "test-engineer, accessibility-tester or penetration-tester",
    }  # fmt: skip
    for name, right in meant.items():
        misspelt = service.client("devops-engineer").post("/api/results", result(agent_type=name))
        said = f"Unknown agent type {name}, did you mean {right}?"
        assert (misspelt.status_code, misspelt.json()["message"]) == (400, said)


# -- bound tokens and tokens for one issue


def test_a_bound_token_speaks_only_for_itself(service: Service) -> None:
    def bound() -> Client:
        return service.client("python-specialist", sub="agent-9", bound=True)

    assert bound().post("/api/results", result(agent_id="agent-9")).status_code == 201
    assert refused(bound().post("/api/results", result(agent_id="agent-8")), "AUTH_003")
    assert refused(bound().post("/api/results", result(agent_id="agent-9", agent_type="rust-specialist")), "AUTH_003")
    assert bound().post("/api/events/ping", EVENT | {"publisher": "agent-9"}).status_code == 202
    assert refused(bound().post("/api/events/ping", EVENT | {"publisher": "agent-8"}), "AUTH_003")


def test_a_token_that_is_not_bound_may_speak_for_others(service: Service) -> None:
    client = service.client("python-specialist", sub="agent-9")
    assert client.post("/api/results", result(agent_id="agent-8", agent_type="rust-specialist")).status_code == 201
    assert client.post("/api/events/ping", EVENT | {"publisher": "agent-8"}).status_code == 202


def test_a_token_for_one_issue_works_on_no_other(setup: str, service: Service, issue: str) -> None:
    client = service.client(issue_id=issue)
    other = f"{issue}-other"
    assert client.get(f"/api/context/{issue}/python-specialist").status_code == 200
    assert client.get(f"/api/context/{issue}/test-engineer").status_code == 200, "whatever the type"
    assert client.post("/api/results", result(issue=issue)).status_code == 201
    assert client.post("/api/events/ping", EVENT | {"data": {"issue_id": issue}}).status_code == 202
    assert client.post("/api/events/ping", EVENT).status_code == 202
    for answer in (
        client.get(f"/api/context/{other}/python-specialist"),
        client.post("/api/results", result(issue=other)),
        client.post("/api/events/ping", EVENT | {"data": {"issue_id": other}}),
        client.post("/api/events/ping", EVENT | {"data": {"issue_id": [issue, other]}}),
        client.post("/api/events/ping", EVENT | {"data": {"issue_id": {"id": other}}}),
        client.post("/api/events/ping", EVENT | {"issue_id": other}),
        client.post("/api/events/ping", EVENT | {"issue_id": [issue, other], "data": {"issue_id": issue}}),
        client.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": other}),
        *([client.get("/api/results", issue_id=other)] if setup == "with plugins" else []),
        client.delete(f"/api/cache/context/{other}"),
        *([client.delete("/api/cache/all")] if setup == "with plugins" else []),
    ):
        assert refused(answer, "AUTH_003"), answer.request.url
    assert client.delete(f"/api/cache/context/{issue}").status_code == 200


@pytest.mark.needs_plugin("http/repeats answers them")
def test_a_token_for_one_issue_gets_no_answer_again_that_another_token_of_its_subject_got(
    service: Service, issue: str
) -> None:
    wide, narrow = service.client(sub=f"twin-{issue}"), service.client(sub=f"twin-{issue}", issue_id=issue)
    key = {"Idempotency-Key": issue}
    for path, body in (
        ("/api/results", result(issue=f"{issue}-other")),
        ("/api/events/ping", EVENT | {"data": {"issue_id": f"{issue}-other"}}),
    ):
        first = wide.post(path, body, headers=key)
        assert wide.post(path, body, headers=key).json() == first.json()
        assert refused(narrow.post(path, body, headers=key), "AUTH_003")


# What only the service knows, and the one type of them that the reference's example publishes.
OF_THE_SERVICE = {"agent_exited": False, "agent_failed": False, "agent_completed": True} | dict.fromkeys(
    ("approval_wanted", "approval_answered", "question_asked", "question_answered"), False
)
SPEAKERS: dict[str, tuple[str, dict[str, Any]]] = {  # those that may store a result in anybody's name come first
    "architect": ("chief-architect", {}),
    "coder": ("python-specialist", {}),
    "tester, narrowed": ("test-engineer", {"permissions": ["publish_events", "write_results"]}),
    "an agent": ("python-specialist", {"sub": "a-1", "bound": True}),
    "for one issue": ("chief-architect", {"issue_id": "issue-1"}),
    "writes no results": ("security-auditor", {"permissions": ["publish_events"]}),
    "its type writes none": ("technical-researcher", {}),
}


@pytest.mark.parametrize("who", SPEAKERS)
def test_what_the_service_tells_of_agents_nobody_forges(service: Service, who: str) -> None:
    agent_type, claims = SPEAKERS[who]
    event = {"publisher": claims.get("sub", "tester"), "topic": "coordination", "data": {"issue_id": "issue-1"}}
    for event_type, in_the_reference in OF_THE_SERVICE.items():
        answer = service.client(agent_type, **claims).post(f"/api/events/{event_type}", event)
        if in_the_reference and who in list(SPEAKERS)[:3]:
            assert answer.status_code == 202
        else:
            assert refused(answer, "AUTH_003") and answer.json()["details"] == {"event_type": event_type}


# -- refreshing


@pytest.mark.needs_plugin("tokens/renewal renews them")
def test_a_token_near_its_end_is_refreshed_with_every_answer(service: Service) -> None:
    now = int(time.time())
    for life, due in [(200, True), (299, True), (310, False), (3600, False)]:
        client = service.client(
            "python-specialist", sub=f"agent-{life}", iat=now - 1000, exp=now + life, permissions=["read_context"]
        )
        for answer in (
            client.get("/status"),
            client.post("/api/results", {}),
            client.get("/api/agents/agent-unknown/status"),
        ):
            assert ("X-Refreshed-Token" in answer.headers) == due, (life, answer.status_code)
        if due:
            assert Client(service.url, answer.headers["X-Refreshed-Token"]).get("/status").status_code == 200
    assert "X-Refreshed-Token" not in Client(service.url, None).get("/status").headers


@pytest.mark.needs_plugin("tokens/renewal renews them")
def test_a_refreshed_token_has_the_same_identity_and_life_and_never_more(service: Service, issue: str) -> None:
    now = int(time.time())
    own = {"sub": "agent-5", "permissions": ["read_context", "publish_events"], "issue_id": issue, "bound": True}
    client = service.client("python-specialist", iat=now - 700, exp=now + 100, **own)
    answer = client.post("/api/auth/refresh")
    assert answer.status_code == 200
    claims = claims_of(answer.json()["token"])
    assert {name: claims[name] for name in own} == own
    assert (claims["agent_type"], claims["project_id"]) == ("python-specialist", PROJECT)
    assert claims["exp"] - claims["iat"] == 800
    assert abs(claims["iat"] - time.time()) < 5
    assert answer.json()["expires_at"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(claims["exp"]))
    again = Client(service.url, answer.json()["token"])
    assert again.get(f"/api/context/{issue}/python-specialist").status_code == 200
    assert refused(again.get("/api/context/issue-other/python-specialist"), "AUTH_003")
    assert lacking(again.post("/api/results", result(agent_id="agent-5", issue=issue))) == "write_results"


@pytest.mark.needs_plugin("tokens/renewal renews them")
@pytest.mark.parametrize("own", [[], ["read_context"], ["spawn_agents"], [*ALL, "more"]])
def test_refreshing_never_widens_permissions(service: Service, own: list[str]) -> None:
    answer = service.client("python-specialist", permissions=own).post("/api/auth/refresh")
    assert set(claims_of(answer.json()["token"])["permissions"]) == set(own) & GRANTED["coding"]


@pytest.mark.needs_plugin("tokens/renewal renews them")
def test_an_expired_token_cannot_be_refreshed(service: Service) -> None:
    assert refused(service.client(exp=int(time.time()) - 1).post("/api/auth/refresh"), "AUTH_002")


@pytest.mark.needs_plugin("tokens/renewal renews them")
def test_the_lives_of_refreshed_tokens_do_not_grow(service: Service) -> None:
    now, client = int(time.time()), service.client(iat=int(time.time()) - 50, exp=int(time.time()) + 50)
    for _ in range(5):
        client.token = client.post("/api/auth/refresh").json()["token"]
    claims = claims_of(str(client.token))
    assert claims["exp"] - claims["iat"] <= 101
    assert claims["exp"] <= now + 110


# -- the command line


def token_command(repository: Path, storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = [f"--root={repository}", f"--storage={storage}", f"--project={PROJECT}"]
    command = [sys.executable, str(MODULE), "token", *where, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=30)


def printed_token(*arguments: Any) -> str:
    """The token on stdout, which has nothing else."""
    done = token_command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n")
    return done.stdout.strip()


def test_a_printed_token_works_once_the_service_runs(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    token = printed_token(repository, storage, "--type", "python-specialist")
    claims = claims_of(token)
    assert {"sub", "agent_type", "project_id", "permissions", "exp", "iat", "jti", "iss"} <= set(claims)
    assert claims["sub"].startswith("cli-python-specialist-")
    assert claims["exp"] - claims["iat"] == 3600
    assert set(claims["permissions"]) == GRANTED["coding"]
    assert "bound" not in claims and "issue_id" not in claims
    assert storage.stat().st_mode & 0o777 == 0o700
    assert (storage / "jwt.secret").stat().st_mode & 0o777 == 0o600
    service = make_service(storage=storage)
    assert Client(service.url, token).get("/status").status_code == 200
    more = printed_token(repository, storage, "--type", "python-specialist")
    assert Client(service.url, more).get("/status").status_code == 200
    assert claims_of(more)["sub"] != claims["sub"]

    words = "--type python-specialist --agent-id agent-3 --issue issue-3 --ttl 120"
    bound = printed_token(repository, storage, *words.split())
    claims = claims_of(bound)
    assert (claims["sub"], claims["issue_id"], claims["bound"], claims["exp"] - claims["iat"]) == (
        "agent-3",
        "issue-3",
        True,
        120,
    )
    client = Client(service.url, bound)
    assert client.post("/api/results", result(agent_id="agent-3", issue="issue-3")).status_code == 201
    assert refused(client.post("/api/results", result(agent_id="agent-4", issue="issue-3")), "AUTH_003")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--type", "no-such-type"], [], ["--type", "python-specialist", "--ttl", "0"], ["--type", "python-specialist", "--ttl", "soon"],
        ["--type", "python-specialist", "--agent-id", "../etc"], ["--type", "python-specialist", "--issue", "a b"],
        ["--type", "python-specialist", "--permissions", "everything"], ["--type", "python-specialist", "--jwt-secret", "short"],
    ],
    ids=lambda arguments: " ".join(arguments),
)  # fmt: skip
def test_a_token_that_cannot_be_made_is_one_line_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    try:
        code: Any = cco_sidecar.main(
            ["token", "--root", str(tmp_path), "--storage", str(tmp_path / "storage"), *arguments]
        )
    except SystemExit as end:
        code = end.code
    output = capfd.readouterr()
    assert (code, output.out) == (2, "")
    assert output.err.startswith("cco: ") and output.err.count("\n") == 1


def test_many_first_users_agree_on_one_secret(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path
) -> None:
    where = [f"--root={repository}", f"--storage={tmp_path / 'storage'}", f"--project={PROJECT}"]
    command = [sys.executable, str(MODULE), "token", *where, "--type=chief-architect"]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
        for _ in range(4)
    ]
    service = make_service(storage=tmp_path / "storage")
    tokens = [racer.communicate(timeout=30)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    secret = (service.storage / "jwt.secret").read_text()
    assert len(secret.encode()) >= 32
    for token in tokens:
        assert jwt.decode(token, secret, algorithms=["HS256"])["project_id"] == PROJECT
        assert Client(service.url, token).get("/status").status_code == 200
    assert [path.name for path in service.storage.iterdir() if path.name.startswith(".jwt")] == [], "no leftovers"


def test_secrets_of_two_storages_differ(repository: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cco_sidecar.make_or_read_secret(Path(tmp_path, name))
    assert Path(tmp_path, "one").read_text() != Path(tmp_path, "two").read_text()


def test_a_configured_secret_signs(make_service: Callable[..., Service], repository: Path) -> None:
    service = make_service("--jwt-secret", SECRET)
    assert Client(service.url, jwt.encode(good_claims(), SECRET, algorithm="HS256")).get("/status").status_code == 200
    assert not (service.storage / "jwt.secret").exists()
    assert SECRET not in service.log


# -- revocation


@pytest.mark.any_storage
def test_the_token_of_an_ended_agent_is_refused_for_good(make_service: Callable[..., Service], setup: str) -> None:
    service = make_service("--agent-command", "sleep 60")
    architect = service.client()
    agents = [architect.spawn() for _ in range(2)]
    ended, living = (Client(service.url, agent["jwt_token"]) for agent in agents)
    assert ended.get("/status").status_code == living.get("/status").status_code == 200
    clients = [ended]
    if setup != "alone":
        clients.append(Client(service.url, ended.post("/api/auth/refresh").json()["token"]))
        assert clients[1].get("/status").status_code == 200
    architect.end(agents[0])
    assert architect.wait("agent_exited", filter=f"agent_id:{agents[0]['agent_id']}", timeout=15_000)["events"]
    if setup != "alone":
        assert not (service.storage / "agents" / agents[0]["agent_id"] / "token").exists()
    for client in clients:
        assert refused(client.get("/status"))
        assert setup == "alone" or refused(client.post("/api/auth/refresh"))
        assert "X-Refreshed-Token" not in client.get("/status").headers
    assert living.get("/status").status_code == 200, "nobody else's"
    service.kill()
    service.start()
    assert refused(Client(service.url, ended.token).get("/status"))
    assert Client(service.url, living.token).get("/status").status_code == 200
    service.client().end(agents[1])
    until(lambda: Client(service.url, living.token).get("/status").status_code == 401)


@pytest.mark.needs_plugin("tokens/renewal renews them in their files")
def test_the_token_file_of_a_running_agent_is_renewed_before_it_expires(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "sleep 600", "--token-ttl", "8")
    spawned = service.client().spawn()
    path = service.storage / "agents" / spawned["agent_id"] / "token"
    assert path.read_text() == spawned["jwt_token"]
    assert path.stat().st_mode & 0o777 == 0o600
    first = claims_of(spawned["jwt_token"])
    second = until(lambda: (text := path.read_text()) != spawned["jwt_token"] and text)
    renewed = claims_of(second)
    assert renewed["iat"] < first["exp"]
    same = ("sub", "agent_type", "project_id", "permissions", "bound")
    assert {name: renewed[name] for name in same} == {name: first[name] for name in same}
    until(lambda: time.time() > first["exp"])
    assert refused(Client(service.url, spawned["jwt_token"]).get("/status"), "AUTH_002")
    until(lambda: Client(service.url, path.read_text()).get("/status").status_code == 200)
    until(lambda: path.read_text() != second)
    assert service.client().delete(f"/api/agents/{spawned['agent_id']}").status_code == 202
    until(lambda: not path.exists())


@pytest.mark.parametrize("secret", ["", "x" * 31, "  " + "x" * 31 + "\n"])
def test_a_secret_that_is_too_short_to_sign_with_ends_the_start_and_stays(tmp_path: Path, secret: str) -> None:
    path = tmp_path / "jwt.secret"
    path.write_text(secret)
    with pytest.raises(cco_sidecar.StartError, match="shorter than 32 bytes"):
        cco_sidecar.make_or_read_secret(path)
    assert path.read_text() == secret


@pytest.mark.parametrize("agent_type", ["python-specialist", "test-engineer", "chief-architect"])
def test_nobody_stores_a_result_as_if_the_service_had(service: Service, agent_type: str) -> None:
    client = service.client(agent_type)
    answer = client.post("/api/results", result(agent_type, issue=f"forged-{agent_type}") | {"source": "sidecar"})
    assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003"), answer.text
    answer = client.post("/api/results", result(agent_type, issue=f"own-{agent_type}") | {"source": "me"})
    assert answer.status_code == 201, answer.text
