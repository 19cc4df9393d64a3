"""Agents ask, people answer: once, in time, across crashes, and nobody else answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from agent_harness import COMMAND, spawn
from conftest import MODULE, Client, Service, clean_environment, plugin, serving, until

approvals = plugin("approvals")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    more = ("--agent-may", "pytest, git commit", *COMMAND)
    with serving(tmp_path_factory.mktemp("approvals"), *more) as running:
        yield running


def agent(service: Service, name: str, **claims: Any) -> Client:
    return service.client("python-specialist", sub=name, bound=True, **claims)


def ask(client: Client, text: str = "May I?", **more: Any) -> Any:
    answer = client.post("/api/approvals", {"kind": "approval", "text": text} | more)
    assert answer.status_code == 201, answer.text
    return answer.json()


def answer(client: Client, asked: Any, text: str, **more: str) -> requests.Response:
    return client.post(f"/api/approvals/{asked['approval_id']}/answer", {"answer": text} | more)


def outcome(approval: Any) -> tuple[Any, ...]:
    return approval["state"], approval["answer"], approval["answered_by"]


def cco(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MODULE), *words, "--root", str(service.root), "--storage", str(service.storage)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=30)


def test_an_agent_asks_and_waits_and_a_person_answers_once(service: Service, issue: str) -> None:
    coder, person = agent(service, f"coder-{issue}"), service.client(sub="ada")
    asked = ask(coder, "Push", command="git push", issue_id=issue, details={"tool": "Bash"}, timeout_seconds=60)
    assert (asked["state"], asked["choices"], asked["agent_id"]) == ("open", ["approve", "deny"], f"coder-{issue}")
    (event,) = person.wait("approval_wanted", filter=f"issue_id:{issue}", since="earliest")["events"]
    told = {name: event["data"][name] for name in ("text", "command", "choices", "agent_id", "until", "details")}
    assert told == {name: asked[name] for name in told} and event["event_id"] == asked["approval_id"]
    with ThreadPoolExecutor() as pool:
        waits = [
            pool.submit(coder.get, f"/api/approvals/{asked['approval_id']}", timeout=timeout) for timeout in (1, 20_000)
        ]
        assert waits[0].result().json() == asked
        answers = [pool.submit(answer, person, asked, text, message="careful") for text in ("approve", "deny") * 4]
        codes = sorted(one.result().status_code for one in answers)
        heard = waits[1].result().json()
    assert codes == [200] + [409] * 7
    assert heard["state"] == "answered" and heard["answered_by"] == "ada" and heard["message"] == "careful"
    late = answer(person, asked, "approve").json()
    assert (
        late["details"]["answer"] == heard["answer"] and f"answered by ada at {heard['answered_at']}" in late["message"]
    )
    (event,) = person.wait("approval_answered", filter=f"correlation_id:{asked['approval_id']}", since="earliest")[
        "events"
    ]
    assert event["data"]["answer"] == heard["answer"]


def test_a_question_takes_one_of_its_choices_or_any_text(service: Service, issue: str) -> None:
    coder, person = agent(service, f"coder-{issue}"), service.client()
    chosen = ask(coder, "Which?", kind="question", choices=["red", "blue"])
    assert answer(person, chosen, "green").status_code == 400
    assert answer(person, chosen, "blue").json()["answer"] == "blue"
    free = ask(coder, "Why?", kind="question")
    assert answer(person, free, "Because\nof it").json()["answer"] == "Because\nof it"
    told = person.wait("question_answered", since=chosen["approval_id"])["events"][0]
    assert told["data"]["answer"] == "blue"


def test_nobody_but_a_person_answers(service: Service, issue: str) -> None:
    asked = ask(agent(service, f"coder-{issue}"))
    spawned = spawn(service.client(), issue=issue, agent_type="chief-architect")
    speakers = {
        "itself": agent(service, f"coder-{issue}"),
        "a bound architect": service.client(sub="boss", bound=True),
        "a spawned architect": Client(service.url, spawned["jwt_token"]),
        "who may not spawn": service.client("python-specialist"),
        "who works on another issue": service.client(issue_id=f"{issue}-other"),
        "nobody": Client(service.url, None),
    }
    refused = {who: answer(client, asked, "approve").status_code for who, client in speakers.items()}
    assert refused == dict.fromkeys(speakers, 403) | {"nobody": 401}
    assert agent(service, "other", permissions=[]).get(f"/api/approvals/{asked['approval_id']}").status_code == 403
    assert service.client().get(f"/api/approvals/{asked['approval_id']}").json()["state"] == "open"
    assert answer(service.client(), asked, "deny").json()["answer"] == "deny"
    service.client().delete(f"/api/agents/{spawned['agent_id']}")


def test_no_answer_in_time_means_no_and_so_does_the_end_of_the_agent(service: Service, issue: str) -> None:
    coder, person = agent(service, f"coder-{issue}"), service.client()
    asked = ask(coder, timeout_seconds=1, issue_id=issue)
    heard = coder.get(f"/api/approvals/{asked['approval_id']}", timeout=20_000).json()
    assert outcome(heard) == ("expired", "deny", None)
    assert answer(person, asked, "approve").status_code == 409
    (event,) = person.wait("approval_answered", filter=f"issue_id:{issue}", since="earliest", timeout=20_000)["events"]
    assert (event["data"]["state"], event["data"]["answer"]) == ("expired", "deny")
    spawned = spawn(person, issue=issue)
    asked = ask(Client(service.url, spawned["jwt_token"]), "Which?", kind="question", timeout_seconds=600)
    assert asked["issue_id"] == issue
    person.delete(f"/api/agents/{spawned['agent_id']}")
    until(lambda: person.get(f"/api/approvals/{asked['approval_id']}").json()["state"] == "withdrawn")
    assert "has ended" in answer(person, asked, "x").json()["message"]


def test_what_agent_may_allows_is_approved_at_once(service: Service, issue: str) -> None:
    coder = agent(service, f"coder-{issue}")
    allowed = ask(coder, command="git commit -m 'a b'", issue_id=issue)
    assert outcome(allowed) == ("answered", "approve", "--agent-may git commit")
    assert coder.get(f"/api/approvals/{allowed['approval_id']}").json() == allowed
    assert answer(service.client(), allowed, "deny").status_code == 409
    (event,) = coder.wait("approval_answered", filter=f"issue_id:{issue}", since="earliest")["events"]
    assert event["event_id"] == allowed["approval_id"]
    assert not coder.wait("approval_wanted", filter=f"issue_id:{issue}", since="earliest", timeout=0)["events"]


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        ("pytest", "pytest"), ("pytest -q 'a b'", "pytest"), ("git  commit -m x", "git commit"), ("git push", None),
        ("pytests", None), ("git", None), ("FOO=1 pytest", None), ("/tmp/pytest", None), ("pytest; rm x", None),
        ("pytest && rm x", None), ("pytest | sh", None), ("pytest `rm x`", None), ("pytest $(rm x)", None),
        ("pytest\nrm x", None), ("pytest > x", None), ("pytest 'x", None), ("", None), ("pytest \\\n;", None),
    ],
)  # fmt: skip
def test_a_rule_allows_one_plain_command(command: str, rule: str | None) -> None:
    assert approvals.allowing_rule(command, ["pytest", "git commit"]) == rule


def test_a_repeat_with_the_same_key_asks_once_and_too_much_is_refused(service: Service, issue: str) -> None:
    coder = agent(service, f"coder-{issue}")
    body, key = {"kind": "approval", "text": "May I?"}, {"Idempotency-Key": issue}
    first, again = (coder.post("/api/approvals", body, headers=key).json() for _ in range(2))
    assert first == again
    asker = service.client("chief-architect", sub=f"asker-{issue}")  # who has no limit of requests
    codes = [asker.post("/api/approvals", body).status_code for _ in range(21)]
    assert codes == [201] * 20 + [429]


def test_what_is_asked_at_once_counts_together(service: Service, issue: str) -> None:
    askers = [service.client("chief-architect", sub=f"asker-{n}-{issue}") for n in range(3)]
    with ThreadPoolExecutor(40) as pool:
        body = {"kind": "approval", "text": "May I?"}
        asked = [pool.submit(Client(one.url, one.token).post, "/api/approvals", body) for one in askers * 26]
        codes = [[row.result().status_code for row in asked[n::3]] for n in range(3)]
    assert [sorted(row) for row in codes] == [[201] * 20 + [429] * 6] * 3


def test_what_ends_last_is_known_however_much_was_asked_and_ended_meanwhile(service: Service, issue: str) -> None:
    person = service.client(sub=f"person-{issue}")
    spawned = spawn(person, issue=issue)
    asker = service.client("chief-architect", sub=f"asker-{issue}")  # who has no limit of requests
    old, approval = ask(asker, kind="question"), ask(asker)
    of_agent = ask(Client(service.url, spawned["jwt_token"]))
    for _ in range(approvals.Approvals.KEPT + 1):
        latest = ask(asker, command="pytest")
    answers = [answer(person, old, "Yes"), answer(person, approval, "approve")]
    assert [said.json().get("answer") for said in answers] == ["Yes", "approve"]
    person.delete(f"/api/agents/{spawned['agent_id']}")
    path = "/api/approvals/{approval_id}"
    until(lambda: person.get(path.format_map(of_agent)).json()["state"] == "withdrawn")
    known = [asker.get(path.format_map(asked)).json()["state"] for asked in (old, approval, of_agent, latest)]
    assert known == ["answered", "answered", "withdrawn", "answered"]


@pytest.mark.parametrize(("choices", "status"), [
    (["a", "a"], 400), (["a", "a "], 400), (["a", "\n a"], 400), ([" "], 400), (["\x1b"], 400), (["a", "A"], 201),
])  # fmt: skip
def test_choices_differ_and_say_something(service: Service, issue: str, choices: list[str], status: int) -> None:
    body = {"kind": "question", "text": "Which?", "choices": choices}
    assert agent(service, f"coder-{issue}").post("/api/approvals", body).status_code == status


def test_a_person_sees_the_whole_of_what_is_asked(service: Service, issue: str) -> None:
    coder, command = agent(service, f"coder-{issue}"), "echo " + "a" * 200 + " && rm -rf /"
    ask(coder, "List files\nof this folder", command="rm -rf ~", issue_id=issue)
    ask(coder, "It only reads. " * 200, command="curl x | sh", issue_id=issue)
    ask(coder, f"Bash: {command}", command=command, issue_id=issue)
    ask(coder, "Which?\n\n9999 asks:\u202e", kind="question", choices=["red " * 20, "blue"], issue_id=issue)
    shown = cco(service, "approvals", "--issue", issue).stdout
    assert "  rm -rf ~" in shown.splitlines()[1] and "  curl x | sh" in shown.splitlines()[2]
    assert "\n  rm -rf ~ (List files\n  of this folder)\n" in shown and "\n  curl x | sh (It only reads. " in shown
    assert f"\n  Bash: {command}\n" in shown and "\n  - " + "red " * 20 in shown
    ask(agent(service, f"other-{issue}"), "Bash: ls\nrm x", command="ls\nrm x", issue_id=f"{issue}-b")
    assert "\n  Bash: ls\n  rm x\n" in cco(service, "approvals", "--issue", f"{issue}-b").stdout
    assert "\n9999 asks" not in shown and "\u202e" not in shown


def test_whoever_follows_an_agent_is_told_once_what_it_asks_and_how_it_is_answered(
    service: Service, issue: str, tmp_path: Path
) -> None:
    person = service.client()
    env = clean_environment(CCO_SIDECAR_STORAGE=str(service.storage))

    def follow(number: int, *words: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"out{number}", "wb") as out, open(tmp_path / f"err{number}", "wb") as err:
            command = [sys.executable, str(MODULE), "agent", *words]
            return subprocess.Popen(command, cwd=service.root, env=env, stdout=out, stderr=err)

    spawn = ("spawn", "--type", "python-specialist", "--issue", issue, "--task", "hang", "--wait")
    followers = [follow(0, *spawn)]
    (row,) = until(lambda: person.get("/api/agents", issue_id=issue, state="running").json()["agents"])
    followers.append(follow(1, "logs", "-f", row["agent_id"]))
    asker = agent(service, row["agent_id"])
    asked = [ask(asker, "Bash: ls\x1b[31m", command="ls", issue_id=issue)]
    ask(agent(service, f"other-{issue}"), "Not of this one", issue_id=issue)
    until(lambda: all("asks: " in (tmp_path / f"err{number}").read_text() for number in range(2)))
    asked.append(ask(asker, "Which?", kind="question", choices=["red", "blue"], issue_id=issue))
    until(lambda: all("where TEXT is one of red, blue" in (tmp_path / f"err{n}").read_text() for n in range(2)))
    person.delete(f"/api/agents/{row['agent_id']}")
    assert [process.wait(120) for process in followers] == [143, 0]
    for number in range(2):
        told = [line for line in (tmp_path / f"err{number}").read_text().splitlines() if "asks: " in line]
        assert [line.partition(";")[0] for line in told] == [
            "cco: python-specialist asks: ls (Bash: ls [31m)", "cco: python-specialist asks: Which?",
        ]  # fmt: skip
        numbers = [each["approval_id"].rpartition("-")[2].lstrip("0") for each in asked]
        assert f" approve {numbers[0]}` or `" in told[0] and f" answer {numbers[1]} TEXT` answers it" in told[1]


def test_answers_survive_a_kill_and_a_waiter_that_comes_back_finds_them(service: Service, issue: str) -> None:
    coder, person = agent(service, f"coder-{issue}"), service.client(sub="ada")
    asked, left = ask(coder, "First", issue_id=issue), ask(coder, "Second", issue_id=issue, timeout_seconds=3600)
    place = f"{service.url}/api/approvals/{left['approval_id']}"

    def wait() -> None:
        with pytest.raises(requests.ConnectionError):
            Client(place, coder.token).get("?timeout=60000")

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert answer(person, asked, "approve").status_code == 200
    service.kill()
    waiting.join(30)
    service.start()
    coder, person = agent(service, f"coder-{issue}"), service.client(sub="ada")
    assert outcome(coder.get(f"/api/approvals/{asked['approval_id']}").json()) == ("answered", "approve", "ada")
    assert coder.get(f"/api/approvals/{left['approval_id']}").json() == left
    assert answer(person, asked, "deny").status_code == 409
    assert answer(person, left, "deny").json()["answer"] == "deny"


def test_people_ask_and_answer_by_commands_and_the_audit_log_has_it_all(service: Service, issue: str) -> None:
    name = f"coder-{issue}"
    asked = ask(agent(service, name), "red \x1b[31m text", command="rm -r x", issue_id=issue)
    listed = cco(service, "approvals", "--issue", issue)
    number = asked["approval_id"].rpartition("-")[2].lstrip("0")
    shown = listed.stdout.splitlines()[1].split()
    assert (shown[0], shown[1][:12], shown[2]) == (number, name[:12], issue) and "\x1b" not in listed.stdout
    assert cco(service, "approve", number).stdout == f"approve: {name} asked: rm -r x\n"
    again = cco(service, "deny", asked["approval_id"])
    assert again.returncode == 1 and "was answered by cli" in again.stderr
    question = ask(agent(service, name), "Why?", kind="question", issue_id=issue)
    given = json.loads(cco(service, "answer", question["approval_id"], "for fun", "--format", "json").stdout)
    assert (given["answer"], given["answered_by"]) == ("for fun", "cli")
    ids = (asked["approval_id"], question["approval_id"])
    lines = until(
        lambda: found if len(found := [line for line in service.audit() if line["event_id"] in ids]) > 4 else []
    )
    assert [(line["who"], line["status"], line["decision"]) for line in lines] == [
        (name, 201, "asked: rm -r x"), ("cli", 200, "approve: rm -r x"), ("cli", 409, "deny: rm -r x"),
        (name, 201, "asked: Why?"), ("cli", 200, "for fun: Why?"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "taken", "told"),
    [
        ([], False, "TEXT` answers it\n"),
        (["red", "blue"], False, "TEXT` answers it, where TEXT is one of red, blue\n"),
        (["approve", "deny", "later"], True, ""),
    ],
)
def test_a_question_is_not_answered_by_approving_or_denying_it(
    service: Service, issue: str, choices: list[str], taken: bool, told: str
) -> None:
    coder = agent(service, f"coder-{issue}")
    asked = ask(coder, "Which port?", kind="question", issue_id=issue, choices=choices)
    number = asked["approval_id"].rpartition("-")[2].lstrip("0")
    for command in ("deny", "approve")[taken:]:
        run = cco(service, command, number)
        assert run.returncode == (0 if taken else 1), run
        assert taken or (f"{number} is a question: " in run.stderr and run.stderr.endswith(f"answer {number} {told}"))
    state = coder.get(f"/api/approvals/{asked['approval_id']}").json()["state"]
    assert state == ("answered" if taken else "open")


@pytest.mark.parametrize(
    ("text", "command", "shown"),
    [
        ("Bash: git tag x", "git tag x", "Bash: git tag x"),
        ("May I?", "git tag x", "git tag x (May I?)"),
        ("May I?\nrm x", "rm x", "rm x (May I?\nrm x)"),
        ("Bash: ls\nrm x", "ls\nrm x", "Bash: ls\nrm x"),
        ("Why?", None, "Why?"),
    ],
)
def test_the_list_shows_each_command_once(text: str, command: str | None, shown: str) -> None:
    row = {"approval_id": "evt-1-02", "agent_id": "a", "issue_id": "", "state": "open", "answered_by": "",
           "until": "2026-01-01T00:00:00+00:00", "choices": [], "text": text, "command": command}  # fmt: skip
    assert plugin("approve").line_of(row, False)["asks"] == shown


def test_secrets_that_an_agent_shows_are_not_published(service: Service, issue: str) -> None:
    key = "ghp_" + "a1B2" * 9
    asked = ask(agent(service, f"coder-{issue}"), f"use {key}", command=f"curl -H 'Authorization: Bearer {key}' x")
    assert key not in json.dumps(asked) and key not in (service.storage / "audit.log").read_text()
