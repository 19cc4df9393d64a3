"""Who works next: the rules as a table, what holds for every sequence of results, and the same over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Client, Service, until
from hypothesis import given, settings
from hypothesis import strategies as st

from cco_sidecar import AGENT_TYPES, PROPOSALS, NextAgent, ReferenceRules, ResultFact, bundled_class

Rules = bundled_class(ReferenceRules, "results/_routing", "ReferenceRules")

CATEGORY = {name: category for category, names in AGENT_TYPES.items() for name in names.split()}
SHORT = {
    "arch": "chief-architect", "py": "python-specialist", "rust": "rust-specialist", "test": "test-engineer", "perf": "performance-engineer",
    "sec": "security-auditor", "doc": "documentation-expert", "sup": "issue-triager",
}  # fmt: skip
STATUS = {"+": "success", "-": "failed", "~": "partial", "!": "failed", "?": "partial"}
SILENT = {"!": {"result": {"artifacts": {"reported_by": "pipeline"}}}, "?": {"source": "sidecar", "result": {}}}


def routed(sequence: str, language: str = "python", rules: type[ReferenceRules] = Rules) -> list[list[NextAgent]]:
    """The proposals after each result of "py+ test-": an agent type's short name and how it ended."""
    history: list[ResultFact] = []
    answers = []
    for word in sequence.split():
        agent_type = SHORT[word[:-1]]
        result = ResultFact(agent_type, CATEGORY[agent_type], STATUS[word[-1]])
        said = [SILENT.get(word[-1], {"result": {"artifacts": {}}})] if rules is Rules else []
        proposals = rules().next_agents(result, [], history, language, *said)
        history.append(
            ResultFact(result.agent_type, result.category, result.status, [item.agent_type for item in proposals])
        )
        answers.append(proposals)
    return answers


def shown(proposals: list[NextAgent]) -> str:
    """ "test:high sec:medium" """
    short = {name: key for key, name in SHORT.items()}
    return " ".join(f"{short.get(item.agent_type, item.agent_type)}:{item.priority}" for item in proposals)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        # one result
        ("arch+", "py:high test:medium"),
        ("arch-", ""),
        ("arch~", ""),
        ("py+", "test:high sec:medium"),
        ("py-", "py:high"),
        ("py~", "py:medium"),
        ("test+", "doc:low sec:medium"),
        ("test-", "py:high"),
        ("test~", "py:medium"),
        ("sec+", "doc:low"),
        ("sec-", "py:high"),
        ("sec~", "py:medium"),
        ("doc+", ""),
        ("doc-", ""),
        ("sup+", ""),
        ("sup-", ""),
        # the usual way to the end
        ("arch+ py+", "test:high sec:medium"),
        ("arch+ py+ test+", "doc:low"),
        ("arch+ py+ test+ sec+", ""),
        ("arch+ py+ test+ sec+ doc+", ""),
        ("py+ sec+", "doc:low"),
        ("py+ sec+ test+", ""),
        # repair goes to the coding type that last worked on the issue, successful or not
        ("rust+ test-", "rust:high"),
        ("rust+ py+ test-", "py:high"),
        ("rust+ py- test-", "py:high"),
        ("rust+ sec-", "rust:high"),
        ("rust+ test~", "rust:medium"),
        # what passed before the last code change has not passed
        ("py+ test+ py+", "test:high sec:medium"),
        ("py+ test- py+", "test:high sec:medium"),
        ("py+ test- py+ test+", "doc:low"),
        ("py+ test+ sec- py+", "test:high sec:medium"),
        ("py+ test+ sec+ doc+ py+ test+", "doc:low"),
        # what passed after it has, also through a failure that changed no code
        ("py+ sec+ test- test+", "doc:low"),
        ("py+ test+ doc+ sec- sec+", ""),
        ("py+ sec+ doc+ test- test+", ""),
        # partial work of a coder is a code change as well as a failure
        ("py+ test+ sec+ py~ test+", "doc:low sec:medium"),
        # nobody is named twice between two changes or failures
        ("arch+ arch+", ""),
        ("test+ perf+", ""),
        ("test+ sec+", ""),
        ("py+ test- test-", "py:high"),
        # the third failure in a row of one type goes to the architect
        ("py- py-", "py:high"),
        ("py- py- py-", "arch:high"),
        ("arch+ py- py- py-", "arch:high"),  # although the design was a success
        ("arch+ py- py- py- arch+", "py:high test:medium"),
        ("py~ py~ py~", "arch:medium"),
        ("py- py~ py-", "arch:high"),
        ("py- py- py- py-", "py:high"),
        ("py- py- py+ py-", "py:high"),
        ("py- py- py+ py- py- py-", "arch:high"),
        ("py- rust- py-", "py:high"),
        ("py- rust- py- rust- py-", "arch:high"),
        ("py- test- py- sec- py-", "arch:high"),
        ("py- py- py- arch+", "py:high test:medium"),
        # who ended without a result of its own has found nothing that a coder could repair
        ("py+ test!", "test:high"),
        ("py+ test?", "test:medium"),
        ("py+ test! test! test! test!", "test:high"),
        ("py+ test+ sec!", "sec:high"),
        ("py+ perf?", "perf:medium"),
        ("py+ test! test-", "py:high"),
        ("py+ test! test+", "doc:low sec:medium"),
        ("py!", "py:high"),
        ("py! py? py!", "arch:high"),
        ("arch!", ""),
    ],
)
def test_the_rules_propose(sequence: str, expected: str) -> None:
    assert shown(routed(sequence)[-1]) == expected


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ("arch+ py+ test+ sec+ doc+", ""),
        ("py+ sec+ test+", "doc:low"),
        ("py+ test+ py+", "test:high sec:medium"),
        ("rust+ py+ test-", "py:high"),
        ("py+ test+ sec+ py~ test+", "doc:low sec:medium"),
        # proposed before, and has not worked yet
        ("arch+ arch+", "py:high test:medium"),
        ("test+ sec+", "doc:low"),
        ("py+ sec+ doc+ test+", ""),
        # a third failure is one more
        ("py- py- py-", "py:high"),
        ("py~ py~ py~", "py:medium"),
    ],
)
def test_the_module_alone_proposes_nobody_who_has_passed(sequence: str, expected: str) -> None:
    assert shown(routed(sequence, rules=ReferenceRules)[-1]) == expected


SPECIALISTS = """python rust go java javascript typescript ruby php csharp cpp c kotlin swift scala elixir dart haskell perl
    shell sql vue svelte graphql terraform""".split()


@pytest.mark.parametrize(
    ("language", "specialist"),
    [
        *((name, f"{name}-specialist") for name in SPECIALISTS),
        ("html", "fullstack-developer"),
        ("cobol", "fullstack-developer"),
        ("unknown", "fullstack-developer"),
    ],
)
def test_the_projects_language_says_who_writes_the_code(language: str, specialist: str) -> None:
    assert CATEGORY[specialist] == "coding"
    for sequence in ("arch+", "test-", "sec-"):
        assert routed(sequence, language)[-1][0].agent_type == specialist


def test_every_row_of_the_table_is_about_a_known_category_and_known_types() -> None:
    for rule, who, _, _ in PROPOSALS:
        work, outcome = rule.split("-")
        assert work.replace("architecture", "architect") in AGENT_TYPES and outcome in ("success", "failure")
        assert who in CATEGORY or who.startswith("the ")


def test_proposals_of_plugins_that_came_before_are_kept() -> None:
    earlier = [NextAgent("technical-writer", "low", "house-rule: a note")]
    for rules in (ReferenceRules, Rules):
        found = rules().next_agents(ResultFact("python-specialist", "coding", "success"), earlier, [], "python")
        assert [item.agent_type for item in found] == ["technical-writer", "test-engineer", "security-auditor"]
        failures = [ResultFact("python-specialist", "coding", "failed")] * 3
        found = rules().next_agents(failures[0], earlier, failures[1:], "python")
        next_one = "chief-architect" if rules is Rules else "python-specialist"
        assert [item.agent_type for item in found] == ["technical-writer", next_one]


RESULTS = st.lists(st.tuples(st.sampled_from(sorted(SHORT)), st.sampled_from("+-~")), min_size=1, max_size=12)


@pytest.mark.parametrize("rules", [Rules, ReferenceRules], ids=["with plugins", "alone"])
@settings(max_examples=300)
@given(results=RESULTS)
def test_following_every_proposal_with_success_comes_to_an_end(
    rules: type[ReferenceRules], results: list[tuple[str, str]]
) -> None:
    sequence = [name + mark for name, mark in results]
    answers = routed(" ".join(sequence), rules=rules)
    short = {name: key for key, name in SHORT.items()}
    waiting = [item.agent_type for proposals in answers for item in proposals]
    steps = 0
    while waiting:
        sequence.append(short[waiting.pop(0)] + "+")
        waiting += [item.agent_type for item in routed(" ".join(sequence), rules=rules)[-1]]
        steps += 1
        assert steps <= (10 if rules is Rules else 12) * (len(results) + 2), sequence


@settings(max_examples=300)
@given(RESULTS)
def test_nobody_is_proposed_twice_or_after_having_passed(results: list[tuple[str, str]]) -> None:
    passed: set[str] = set()
    proposed: set[str] = set()
    for (name, mark), proposals in zip(results, routed(" ".join(name + mark for name, mark in results)), strict=True):
        coding = CATEGORY[SHORT[name]] == "coding"
        if coding and mark != "-":  # a code change
            passed, proposed = set(), set()
        if mark != "+":
            proposed = set()
        elif not coding:
            passed.add(SHORT[name])
        names = [item.agent_type for item in proposals]
        assert len(names) == len(set(names))
        anew = (
            {"chief-architect"} if coding and mark != "+" else set()
        )  # after the third failure, although the design was a success
        assert not set(names) & (passed - anew | proposed)
        proposed |= set(names)


@pytest.mark.parametrize(
    ("agent_type", "status", "rules"),
    [
        (
            "chief-architect",
            "success",
            {"python-specialist": "architecture-success", "test-engineer": "architecture-success"},
        ),
        ("python-specialist", "success", {"test-engineer": "coding-success", "security-auditor": "coding-success"}),
        ("python-specialist", "failed", {"python-specialist": "coding-failure"}),
        ("test-engineer", "success", {"documentation-expert": "qa-success", "security-auditor": "qa-success"}),
        ("test-engineer", "failed", {"python-specialist": "qa-failure"}),
        ("security-auditor", "success", {"documentation-expert": "security-success"}),
        ("security-auditor", "failed", {"python-specialist": "security-failure"}),
    ],
)
def test_the_reason_names_the_rule(
    service: Service, issue: str, agent_type: str, status: str, rules: dict[str, str]
) -> None:
    stored = service.client(agent_type).store(agent_type, status, issue)
    assert {item["agent_type"]: item["reason"].partition(":")[0] for item in stored["next_agents"]} == rules
    assert all(item["reason"].partition(": ")[2] for item in stored["next_agents"])


def test_the_completed_event_tells_waiters_the_same_proposals(architect: Client, issue: str) -> None:
    stored = architect.store("python-specialist", issue=issue)
    (event,) = architect.wait("agent_completed", filter=f"issue_id:{issue}", timeout=20_000)["events"]
    assert event["data"]["next_agents"] == stored["next_agents"] != []


def test_issues_are_routed_apart(architect: Client, issue: str) -> None:
    for _ in range(3):
        architect.store("python-specialist", "failed", issue)
    assert (
        architect.store("python-specialist", "failed", f"{issue}-other")["next_agents"][0]["agent_type"]
        == "python-specialist"
    )


def test_an_issue_that_is_done_proposes_nobody(architect: Client, issue: str) -> None:
    """Follow every proposal over HTTP, first come first served, until nobody is left."""
    waiting, worked = ["chief-architect"], []
    while waiting:
        worked.append(waiting.pop(0))
        waiting += [item["agent_type"] for item in architect.store(worked[-1], issue=issue)["next_agents"]]
        assert len(worked) < 20, worked
    assert {"chief-architect", "python-specialist", "test-engineer", "security-auditor", "documentation-expert"} == set(
        worked
    )


@pytest.mark.needs_plugin("results/_routing counts failures")
def test_the_history_survives_a_kill(make_service) -> None:  # type: ignore[no-untyped-def]
    service = make_service()
    for _ in range(2):
        service.client().store("rust-specialist", "failed")
    service.kill()
    service.start()
    assert service.client().store("rust-specialist", "failed")["next_agents"][0]["agent_type"] == "chief-architect"


SLOW = """
import time
from pathlib import Path
from cco_sidecar import hookimpl
from cco_sidecar_plugins._hooks import SafeHooks

SafeHooks.TIMEOUT = 60.0

@hookimpl
def next_agents(submission):
    if submission["issue_id"] == "slow":
        Path("BEGUN").touch()
        until = time.monotonic() + 30
        while not Path("GO").exists() and time.monotonic() < until:
            time.sleep(0.01)
"""


@pytest.mark.needs_plugin("results/proposals asks beside the writer thread")
def test_a_plugin_that_is_long_about_who_is_next_holds_up_no_other_issue(make_service, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/slow.py").write_text(
        SLOW.replace("BEGUN", str(tmp_path / "begun")).replace("GO", str(tmp_path / "go"))
    )
    service = make_service("--plugins", str(tmp_path / "rules"))
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(service.client().store, issue="slow") for _ in range(2)]
        until((tmp_path / "begun").exists)
        assert service.client().store(issue="quick")["stored"]
        assert not any(storing.done() for storing in slow)
        (tmp_path / "go").touch()
        assert all(storing.result()["next_agents"] for storing in slow)
    assert len(service.client().get("/api/results", issue_id="slow").json()["results"]) == 2


PLAIN_DATA = """
from cco_sidecar import hookimpl

@hookimpl
def next_agents(submission):
    writer = {"agent_type": "technical-writer", "priority": "low", "reason": "said as plain data"}
    answers = {"plain": [writer], "number": 5, "half": [{"agent_type": "technical-writer"}], "text": "nobody"}
    answers |= {"unknown": [writer | {"agent_type": "no-such-type"}], "odd": [writer | {"priority": "urgent"}]}
    return answers.get(submission["issue_id"])
"""


def test_a_rules_answer_may_be_plain_data_and_what_proposes_nobody_changes_nothing(make_service, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/plain.py").write_text(PLAIN_DATA)
    client = make_service("--plugins", str(tmp_path / "rules")).client()
    for issue in ("number", "half", "text", "unknown", "odd"):
        assert [item["agent_type"] for item in client.store(issue=issue)["next_agents"]] == [
            "test-engineer",
            "security-auditor",
        ]
    said = {"agent_type": "technical-writer", "priority": "low", "reason": "said as plain data"}
    assert client.store(issue="plain")["next_agents"] == [said]
