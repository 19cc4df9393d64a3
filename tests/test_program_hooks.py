"""Hooks of coding programs: what sessions hear, when they may stop, whom they ask, and how an idle one is woken."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from agent_harness import COMMAND, nothing_left, spawn
from conftest import MODULE, Client, Service, clean_environment, make_repository, plugin, serving, until

__all__ = ["nothing_left"]

settings = plugin("_hook_settings")
ASK = ("--agent-approvals", "ask", "--agent-may", "git tag")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("hooks"), *ASK, *COMMAND) as running:
        yield running


# -- the table


@pytest.mark.parametrize(
    ("program", "event", "moment", "context", "refusal"),
    [
        ("claude", "PostToolUse", "tool", {"hookSpecificOutput": {"hookEventName": "PostToolUse", "additionalContext": "x"}},
         {"decision": "block", "reason": "y"}),
        ("codex", "SessionStart", "start", {"hookSpecificOutput": {"hookEventName": "SessionStart", "additionalContext": "x"}},
         {"decision": "block", "reason": "y"}),
        ("qwen", "Stop", "stop", {"hookSpecificOutput": {"hookEventName": "Stop", "additionalContext": "x"}},
         {"decision": "block", "reason": "y"}),
        ("gemini", "AfterTool", "tool", {"hookSpecificOutput": {"hookEventName": "AfterTool", "additionalContext": "x"}},
         {"decision": "deny", "reason": "y"}),
        ("copilot", "postToolUse", "tool", {"additionalContext": "x"}, {"decision": "block", "reason": "y"}),
        ("opencode", "tool", "tool", {"text": "x"}, {"decision": "block", "reason": "y"}),
        ("kilo", "start", "start", {"text": "x"}, {"decision": "block", "reason": "y"}),
    ],
)  # fmt: skip
def test_each_program_is_answered_in_its_dialect(
    program: str, event: str, moment: str, context: Any, refusal: Any
) -> None:
    dialect = settings.DIALECTS[program]
    assert (dialect.moment(event), dialect.moment("Nonsense")) == (moment, None)
    assert (dialect.context(event, "x"), dialect.refuse("y")) == (context, refusal)


def test_a_permission_is_allowed_without_words_and_denied_with_a_reason() -> None:
    allowed, denied = (settings.as_permission("PermissionRequest", may, "why") for may in (True, False))
    assert allowed["hookSpecificOutput"] == {"hookEventName": "PermissionRequest", "decision": {"behavior": "allow"}}
    assert denied["hookSpecificOutput"]["decision"] == {"behavior": "deny", "message": "why"}


def test_the_settings_of_each_program_name_its_events() -> None:
    for program, dialect in settings.DIALECTS.items():
        hooks = settings.hook_settings(program, f"cco hook {program} {{event}}", wait="cco wait", permission="ask")
        assert list(hooks) == list(dialect.events.values())
        for event, rows in hooks.items():
            commands = [hook.get("command") or hook.get("bash") for row in rows for hook in row.get("hooks", [row])]
            wanted = "ask" if event == dialect.events.get("permission") else f"cco hook {program} {event}"
            wanted += " --queue" if (program, event) == ("codex", "Stop") else ""
            assert commands[0] == wanted and len(commands) == (2 if (program, event) == ("claude", "Stop") else 1)
    assert "PermissionRequest" not in settings.hook_settings("claude", "cco hook claude")
    told = tomllib.loads("\n".join(settings.as_toml("codex")[1::2]))
    trusted = told["hooks"].pop("state")
    assert told == {"hooks": settings.agent_hooks("codex")} and len(trusted) == len(told["hooks"])
    seen = {"trusted_hash": "sha256:eb7e730bdc4962cbeb02ad3341502386e47ab2af31ab2454e09003e46e8a28b9"}
    assert trusted["/<session-flags>/config.toml:stop:0:0"] == seen, "what codex itself says of this hook"


def test_an_agents_hook_says_nothing_and_succeeds_where_the_service_is_away(tmp_path: Path) -> None:
    (tmp_path / "curl").write_text("")
    environment = {"CCO_TOKEN_FILE": str(tmp_path / "token"), "SIDECAR_URL": "http://127.0.0.1:9/api"}
    for program in settings.DIALECTS:
        line = settings.agent_call(program)
        ended = subprocess.run(
            ["sh", "-c", line], env=clean_environment(**environment), input=b"{}", capture_output=True, timeout=30
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b""), line


# -- what sessions hear


class HookSession:
    """A session of a program that calls its hooks."""

    def __init__(self, client: Client, program: str = "claude") -> None:
        self.client, self.program = client, program
        self.given = {"session_id": str(uuid.uuid4()), "cwd": "/"}

    def call(self, event: str, **more: Any) -> Any:
        answer = self.client.post(f"/api/hooks/{self.program}", self.given | {"hook_event_name": event} | more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def hears(self, event: str = "PostToolUse", **more: Any) -> str:
        return str(self.call(event, **more).get("hookSpecificOutput", {}).get("additionalContext", ""))

    def wait(self, timeout: int = 20_000) -> Any:
        return self.client.post(f"/api/hooks/{self.program}/wait?timeout={timeout}", self.given).json()


def user(service: Service, **claims: Any) -> HookSession:
    return HookSession(service.client("chief-architect", **claims))


def test_a_session_starts_with_the_brief_of_its_issue_or_with_what_the_team_does(service: Service, issue: str) -> None:
    service.client().store(issue=issue, decisions=[f"the zebra of {issue}"])
    brief = user(service, issue_id=issue).hears("SessionStart", source="startup")
    assert issue in brief and f"the zebra of {issue}" in brief and len(brief.encode()) <= 10_000
    team = user(service).hears("SessionStart", source="startup")
    assert f"python-specialist on {issue}: success. the zebra of {issue}" in team and "cco brief" in team
    assert HookSession(service.client(permissions=[])).hears("SessionStart") == ""


def test_each_session_hears_each_event_once_and_never_its_own(service: Service, issue: str) -> None:
    first, second = user(service, sub=f"user-{issue}"), user(service, sub=f"user-{issue}")
    publisher = service.client()
    publisher.publish("before", {"issue_id": issue})
    assert first.hears("SessionStart") and first.hears() == ""
    publisher.publish("news", {"issue_id": issue, "text": "one\x1b[31m\n2"})
    first.client.publish("mine", publisher=f"user-{issue}")
    assert second.hears() == "", "a session that was never seen begins now"
    heard = first.hears()
    assert heard.count("\n") == 1 and "news by tester" in heard and issue in heard and "\x1b" not in heard
    assert "mine" not in heard and "before" not in heard and first.hears() == ""
    publisher.publish("more", {"issue_id": issue})
    assert "more by tester" in second.hears("UserPromptSubmit") and "more by tester" in first.hears()


def test_what_is_too_much_for_one_answer_comes_with_the_next(service: Service, issue: str) -> None:
    session = user(service, issue_id=issue)
    session.hears()
    for number in range(20):
        service.client().publish("news", {"issue_id": issue, "text": f"<{number}> " + "ä" * 500})
    service.client().publish("elsewhere", {"issue_id": f"{issue}-other"})
    heard = [text for _ in range(12) if (text := session.hears())]
    assert all(len(text.encode()) <= 2000 for text in heard) and len(heard) > 3
    told = [line.partition("<")[2].partition(">")[0] for text in heard for line in text.splitlines()[1:]]
    assert told == [str(number) for number in range(20)]


@pytest.mark.parametrize("number", [1, 9, 17])
def test_what_comes_behind_large_events_of_others_is_heard_at_once(service: Service, issue: str, number: int) -> None:
    session = user(service, issue_id=issue)
    session.hears()
    for _ in range(number):
        service.client().publish("elsewhere", {"issue_id": f"{issue}-other", "text": "x" * 1_000_000})
    service.client().publish("news", {"issue_id": issue})
    assert "news by tester" in session.hears() and session.hears() == ""


@pytest.mark.parametrize("lines", [1, 45, 179, 180, 181, 182, 183])
def test_of_a_long_text_no_secret_is_told_that_its_cutting_divides(service: Service, issue: str, lines: int) -> None:
    """What is before it may be a secret itself, of which little is left."""
    session = user(service, issue_id=issue)
    session.hears()
    key = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *["A1b2" * 16] * lines, "-----END RSA PRIVATE KEY-----"])
    text = " ".join([key, *["ghp_" + "b1" * 18] * 4, "c " * 20_000])
    service.client().publish("news", {"issue_id": issue, "text": text})
    service.client().store(issue=issue, decisions=[text])
    heard = session.hears() + user(service).hears("SessionStart", source="startup")
    assert "news by tester" in heard and f"on {issue}: success" in heard
    assert not re.findall("A1b2|ghp|b1b1", heard)


def test_parallel_hooks_of_a_session_tell_an_event_once_also_over_a_kill(service: Service, issue: str) -> None:
    session = user(service, sub=f"user-{issue}")
    session.hears()
    service.client().publish("news", {"issue_id": issue})
    with ThreadPoolExecutor(8) as pool:
        heard = [one.result() for one in [pool.submit(user_again, session) for _ in range(8)]]
    assert sum(bool(text) for text in heard) == 1
    service.client().publish("later", {"issue_id": issue})
    service.kill()
    service.start()
    session.client.url = service.url
    assert "later" in session.hears() and session.hears() == ""


def user_again(session: HookSession) -> str:
    """The same session over a connection of its own."""
    again = HookSession(Client(session.client.url, session.client.token))
    again.given = session.given
    return again.hears()


def test_a_spawned_agent_hears_of_its_issue_and_reads_its_brief_itself(service: Service, issue: str) -> None:
    agent = spawn(service.client(), issue=issue)
    session = HookSession(Client(service.url, agent["jwt_token"]))
    assert session.hears("SessionStart", source="startup") == ""
    assert issue in session.hears("SessionStart", source="compact")
    service.client().publish("news", {"issue_id": issue})
    service.client().publish("elsewhere", {"issue_id": f"{issue}-other"})
    service.client().post("/api/approvals", {"kind": "question", "text": "Which?", "issue_id": issue})
    heard = session.hears()
    assert "news" in heard and "elsewhere" not in heard and "question_asked" not in heard


def test_a_spawned_agents_stop_is_refused_once_while_its_result_is_missing(service: Service, issue: str) -> None:
    agent = spawn(service.client(), issue=issue)
    session = HookSession(Client(service.url, agent["jwt_token"]))
    refused = session.call("Stop")
    assert refused["decision"] == "block" and "/results -d" in refused["reason"] and issue in refused["reason"]
    service.kill()
    service.start()
    session.client.url = service.url
    assert session.call("Stop") == {}
    other = HookSession(Client(service.url, spawn(service.client(), issue=issue)["jwt_token"]), "gemini")
    body = {"agent_type": "python-specialist", "issue_id": issue, "project_id": "project-abc"}
    stored = other.client.post("/api/results", body | {"agent_id": agent_of(other), "result": {"status": "success"}})
    assert stored.status_code == 201 and other.call("AfterAgent") == {}
    reader = spawn(service.client(), issue=issue, permissions=["read_context"])
    assert HookSession(Client(service.url, reader["jwt_token"])).call("Stop") == {}
    assert user(service).call("Stop") == {}


def agent_of(session: HookSession) -> str:
    import jwt

    claims = jwt.decode(str(session.client.token), options={"verify_signature": False})
    return str(claims["sub"])


def test_what_no_hook_says_is_refused_and_what_is_not_known_means_nothing(service: Service) -> None:
    session = user(service)
    assert session.call("Nonsense") == {} and session.call("Notification", session_id="") == {}
    assert session.client.post("/api/hooks/emacs", {}).status_code == 404
    assert session.client.post("/api/hooks/claude", {"session_id": "x" * 300}).status_code == 400
    assert Client(service.url, None).post("/api/hooks/claude", {}).status_code == 401


# -- permissions


def test_a_person_answers_for_a_spawned_agents_program(service: Service, issue: str) -> None:
    agent, person = spawn(service.client(), issue=issue), service.client(sub="ada")
    session = HookSession(Client(service.url, agent["jwt_token"]))

    def ask(command: str) -> Any:
        given = {"tool_name": "Bash", "tool_input": {"command": command}}
        return session.call("PermissionRequest", **given)["hookSpecificOutput"]["decision"]

    assert ask("git tag x") == {"behavior": "allow"}, "a rule allows it"
    with ThreadPoolExecutor() as pool:
        for answer, wanted in (("approve", "allow"), ("deny", "deny")):
            asking = pool.submit(ask, "git push")
            query = {"state": "open", "issue_id": issue}
            (asked,) = until(lambda query=query: person.get("/api/approvals", **query).json()["approvals"])
            assert (asked["text"], asked["command"], asked["agent_id"]) == (
                "Bash: git push",
                "git push",
                agent["agent_id"],
            )
            person.post(f"/api/approvals/{asked['approval_id']}/answer", {"answer": answer})
            assert asking.result()["behavior"] == wanted
    assert asking.result()["message"] == "Denied by ada"
    given = {"tool_name": "Bash", "tool_input": {"command": "git push"}}
    assert user(service).call("PermissionRequest", **given) == {}, "a user's own session asks its user"


@pytest.mark.parametrize(("tool", "arguments", "shown"), [
    ("Bash", {"command": "git tag x", "dangerouslyDisableSandbox": True}, '"dangerouslyDisableSandbox":true'),
    ("Bash", {"command": ["git", "tag", {"x": 1}]}, '{"x":1}'),
    ("Bash\n", {"command": "git tag x"}, "git tag x"),
    ("Write", {"command": "git tag x", "file_path": "/etc/passwd"}, '"file_path":"/etc/passwd"'),
    ("mcp__shop__buy", {"command": "git tag x"}, "git tag x"),
    ("Write", {"file_path": "a", "content": "x" * 5_000 + "end"}, "characters, whole in the details)"),
])  # fmt: skip
def test_a_rule_allows_a_shells_plain_command_alone_and_a_person_sees_all_arguments(
    tool: str, arguments: dict[str, Any], shown: str
) -> None:
    hooks = plugin("hooks")
    asked = hooks.what_is_asked(hooks.HookInput(tool_name=tool, tool_input=arguments))
    assert asked.command is None and shown in asked.text and asked.details["arguments"] == arguments
    plain = {"command": "git tag x", "description": "Tag", "timeout": 5}
    assert hooks.what_is_asked(hooks.HookInput(tool_name="Bash", tool_input=plain)).command == "git tag x"
    assert hooks.what_is_asked(hooks.HookInput(tool_name="Bash", tool_input={"command": "x" * 20_000})) is None


def test_nobody_is_asked_by_default(service: Service) -> None:
    import cco_sidecar

    assert cco_sidecar.option_table()["agent_approvals"].default == "deny"
    launchers = plugin("launchers")
    assert "--approve-for-me" not in launchers.PROGRAMS["codex"].command([]).argv
    asking = launchers.PROGRAMS["codex"].command([], asks=True).argv
    assert "--approve-for-me" in asking and "--sandbox" not in asking


# -- waking an idle session


def test_an_idle_session_is_woken_by_an_event_that_concerns_it(service: Service, issue: str) -> None:
    session = user(service, issue_id=issue)
    session.hears("SessionStart")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(session.wait)
        until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 1)
        service.client().publish("elsewhere", {"issue_id": f"{issue}-other"})
        service.client().publish("wake_up", {"issue_id": issue})
        news = waiting.result()
    assert "wake_up by tester" in news["text"] and "elsewhere" not in news["text"] and not news["over"]
    assert session.hears() == "" and session.wait(timeout=1) == {"text": "", "over": False}


def test_a_session_has_one_wait_which_its_next_hook_ends(service: Service, issue: str) -> None:
    session = user(service, issue_id=issue)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(session.wait)
        until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 1)
        again = HookSession(Client(service.url, session.client.token))
        again.given = session.given
        second = pool.submit(again.wait)
        assert first.result() == {"text": "", "over": True}
        until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 1)
        user_again(session)
        assert second.result() == {"text": "", "over": True}


def cco(service: Service, *words: str) -> list[str]:
    return [sys.executable, str(MODULE), *words, "--root", str(service.root), "--storage", str(service.storage)]


def test_commands_answer_hooks_and_wake_sessions(service: Service, issue: str) -> None:
    given = json.dumps({"session_id": issue, "hook_event_name": "SessionStart"})
    env = clean_environment()
    said = subprocess.run(
        cco(service, "hook", "claude"), input=given, capture_output=True, text=True, env=env, timeout=60
    )
    assert "A team of coding agents" in json.loads(said.stdout)["hookSpecificOutput"]["additionalContext"]
    script = f"{shlex.join(cco(service, 'wait', '--rewake'))}; echo $?"
    waiting = subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )

    def publish() -> int:
        until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 1, 60)
        return subprocess.run(cco(service, "events", "publish", "wake_up"), env=env, capture_output=True).returncode

    with ThreadPoolExecutor() as pool:
        publishing = pool.submit(publish)
        out, err = waiting.communicate(given, timeout=90)
        assert publishing.result() == 0
    assert (out, "wake_up by cli" in err) == ("2\n", True)


@pytest.mark.parametrize("field", ["session_id", "sessionId", "sessionID"])
def test_sessions_are_told_apart_by_what_their_program_calls_the_session(
    service: Service, issue: str, field: str
) -> None:
    def hook(session: str, event: str) -> str:
        done = subprocess.run(
            cco(service, "hook", "copilot", event),
            input=json.dumps({field: f"{issue}-{session}"}), capture_output=True, text=True, timeout=60,
            env=clean_environment(),
        )  # fmt: skip
        return str(json.loads(done.stdout or "{}").get("additionalContext", ""))

    for session in ("one", "other"):
        assert "A team of coding agents" in hook(session, "sessionStart")
    event = {"publisher": "somebody", "topic": "t", "data": {}}
    assert service.client().post(f"/api/events/news_of_{field.lower()}", event).status_code == 202
    for session in ("one", "other"):
        assert f"news_of_{field.lower()}" in hook(session, "postToolUse")
        assert hook(session, "postToolUse") == "", "a session hears it once"


def test_a_session_speaks_by_its_hooks_and_its_tools_in_one_name(service: Service, issue: str, tmp_path: Path) -> None:
    (tmp_path / "claude").symlink_to("/bin/sh")
    hook, bridge = (shlex.join(cco(service, *words)) for words in (["hook", "claude"], ["mcp", "claude"]))
    publish = shlex.join(cco(service, "events", "publish", "theirs"))
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call",
            "params": {"name": "publish_event", "arguments": {"event_type": "mine", "data": {}}}}  # fmt: skip
    first, then = (
        json.dumps({"session_id": issue, "hook_event_name": name}) for name in ("SessionStart", "PostToolUse")
    )
    speaking = [(first, hook), (json.dumps(call), bridge), ("", publish)]

    def run(said: list[tuple[str, str]]) -> subprocess.CompletedProcess[str]:
        script = "; ".join(f"echo {shlex.quote(given)} | {command}" for given, command in said)
        words, env = [tmp_path / "claude", "-c", script], clean_environment()
        return subprocess.run(words, capture_output=True, text=True, env=env, timeout=90)

    done = run([*speaking, (then, hook)])
    assert "mine" in json.dumps(service.client().wait("mine", since="earliest", timeout=0)), done
    heard = json.loads(done.stdout.splitlines()[-1])["hookSpecificOutput"]["additionalContext"]
    assert "theirs by cli" in heard and "mine by" not in heard, done
    service.client().publish("meanwhile")
    resumed = run([(then, hook)]).stdout
    assert "meanwhile by tester" in resumed and "theirs" not in resumed


def test_a_wait_ends_with_the_process_of_its_session(service: Service, issue: str) -> None:
    session = subprocess.Popen(["sleep", "60"])
    words = cco(service, "wait", "--rewake", "--session-pid", str(session.pid))
    waiting = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=clean_environment())
    until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 1, 60)
    session.kill()
    session.wait()
    assert waiting.wait(30) == 0


@pytest.mark.parametrize("trouble", ["no service", "no JSON", "bad settings"])
def test_a_hook_that_fails_says_nothing_and_disturbs_nobody(tmp_path: Path, trouble: str) -> None:
    (tmp_path / "cco.toml").write_text("port = 'x'\n" if trouble == "bad settings" else "")
    words = [sys.executable, str(MODULE), "hook", "claude", "--root", str(tmp_path), "--storage", str(tmp_path / "st")]
    given = b"\xff{" if trouble == "no JSON" else b'{"hook_event_name": "PostToolUse"}'
    began = time.monotonic()
    ended = subprocess.run(words, input=given, capture_output=True, env=clean_environment(), cwd=tmp_path, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b""), time.monotonic() - began


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), IndexError("none"), KeyError("session_id"), TypeError()])
def test_whatever_a_hook_meets_is_said_to_nobody_but_who_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail() -> None:
        raise error

    hook = plugin("hook")
    monkeypatch.setattr(hook, "read_hook_input", fail)
    options = argparse.Namespace(program="claude", event=None, queue=False)
    assert (hook.command_hook(options), *capsys.readouterr()) == (0, "", "")
    monkeypatch.setenv("CCO_SIDECAR_LOG_LEVEL", "debug")
    assert hook.command_hook(options) == 0
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" in told.err and type(error).__name__ in told.err


@pytest.mark.parametrize("words", ["hook codex stop --queue", "wait --program claude", "wait --queue"])
def test_a_session_outside_of_the_container_is_not_waited_for(tmp_path: Path, words: str) -> None:
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    command = [sys.executable, str(MODULE), *words.split(), "--root", str(tmp_path), "--storage", str(tmp_path / "st")]
    given = b'{"hook_event_name": "Stop", "session_id": "s-1"}'
    ended = subprocess.run([*apart, *command], input=given, capture_output=True, env=clean_environment(), timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


@pytest.mark.parametrize("words", ["hook claude", "hook codex", "wait --rewake"])
def test_a_hook_looks_for_no_service_beside_its_own(tmp_path: Path, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        known = {"CCO_SIDECAR_PORT": str(silent.getsockname()[1]), "XDG_STATE_HOME": str(tmp_path / "state")}
        command = [sys.executable, str(MODULE), *words.split(), "--root", str(make_repository(tmp_path / "app"))]
        given = b'{"hook_event_name": "PostToolUse", "session_id": "s-1"}'
        ended = subprocess.run(command, input=given, capture_output=True, env=clean_environment(**known), timeout=60)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
        with pytest.raises(BlockingIOError):
            silent.accept()
