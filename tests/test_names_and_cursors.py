"""Identifiers and cursors against plain models: whatever text comes, it is one of ours or a clear refusal, and never a
path or a 5xx.
"""

from __future__ import annotations

import http.client
import json
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from conftest import PROJECT, Client, Service, body_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cco_sidecar import ApiError, check_identifier  # isort: skip

SHARED = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
    derandomize=True,
)
LETTERS = string.ascii_letters + string.digits
NEARLY = (
    st.text(alphabet="aZ09._-/\\%~ \n\0é١", max_size=12)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from([".", "..", "a..b", "a" * 128, "a" * 129, "../../x"])
)


def is_identifier(text: str) -> bool:
    """The contract in plain words."""
    return (
        1 <= len(text) <= 128
        and text[0] in LETTERS
        and all(sign in LETTERS + "._-" for sign in text)
        and ".." not in text
    )


def is_event_type(text: str) -> bool:
    signs = string.ascii_lowercase + string.digits + "_.-"
    return text == "*" or (
        1 <= len(text) <= 64 and text[0] in string.ascii_lowercase and all(sign in signs for sign in text)
    )


def accepted(name: str, text: str) -> bool:
    try:
        check_identifier(name, text)
    except ApiError as error:
        assert error.status == 400
        return False
    return True


@settings(max_examples=500)
@given(NEARLY)
@example("a\n")
@example("\uff41")
def test_names_in_paths_are_what_the_contract_says(text: str) -> None:
    assert accepted("issue_id", text) is is_identifier(text)
    assert accepted("event_type", text) is is_event_type(text)


PATHS = [
    "/api/context/{}/python-specialist",
    "/api/context/issue-1/{}",
    "/api/results/{}",
    "/api/agents/{}/status",
    "/api/agents/{}/logs",
]


@SHARED
@given(st.sampled_from(PATHS), NEARLY, st.sampled_from(["", "/", "%", "~"]))
def test_any_text_in_a_path_is_a_name_or_is_refused(
    service: Service, architect: Client, path: str, text: str, safe: str
) -> None:
    line = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=20)  # other clients tidy paths up
    line.request("GET", path.format(quote(text, safe=safe)), headers={"Authorization": f"Bearer {architect.token}"})
    answer = line.getresponse()
    content = json.loads(answer.read())
    line.close()
    assert answer.status in ((200, 404) if is_identifier(text) else (400, 404)), content
    assert answer.status == 200 or content["code"] in ("REQ_001", "REQ_002", "AGT_002"), content


FIELDS = ["agent_id", "agent_type", "issue_id", "project_id"]


@SHARED
@given(st.sampled_from(FIELDS), NEARLY)
def test_any_text_in_a_result_is_a_name_or_is_refused_and_nothing_is_written_elsewhere(
    service: Service, architect: Client, field: str, text: str
) -> None:
    answer = architect.post("/api/results", body_of() | {field: text})
    good = is_identifier(text) and field in ("agent_id", "issue_id")  # no agent type or project of such a name is known
    assert answer.status_code == 201 if good else answer.status_code in (400, 403), answer.text
    folders = {
        path.relative_to(service.storage / "results").parts[0] for path in (service.storage / "results").rglob("*.json")
    }
    assert folders <= {PROJECT}
    assert not [
        path
        for path in service.storage.parent.iterdir()
        if path not in (service.storage, service.root, service.log_path)
    ]


# ---- Cursors
# ----------------------------------------------------------------------------------------------------------------------------


def events_after(client: Client, cursor: str, **more: Any) -> list[str]:
    answer = client.get("/api/events", since=cursor, type="cursor-test", limit=1000, **more)
    assert answer.status_code == 200, answer.text
    return [event["event_id"] for event in answer.json()["events"]]


@settings(SHARED, max_examples=15)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(0, 1000), st.integers(1, 5))
def test_every_cursor_is_exclusive_and_none_repeats_or_skips(
    service: Service, architect: Client, ours: list[bool], pick: int, limit: int
) -> None:
    new = [architect.publish("cursor-test" if own else "other")["event_id"] for own in ours]
    known = events_after(architect, "earliest")
    assert [id for id in known if id in new] == [id for id, own in zip(new, ours, strict=True) if own]
    cursor = sorted({*known, *new})[pick % len({*known, *new})]
    expected = [id for id in known if id > cursor]
    assert events_after(architect, cursor) == expected
    seen: list[str] = []
    while True:
        answer = architect.wait("cursor-test", since=cursor, timeout=0, limit=limit)
        seen += [event["event_id"] for event in answer["events"]]
        assert len(answer["events"]) <= limit and answer["more_available"] is (len(seen) < len(expected))
        cursor = answer["scanned_to"]
        if not answer["more_available"]:
            break
    assert seen == expected
    assert events_after(architect, cursor) == events_after(architect, "latest") == []


SIGN = st.characters(codec="utf-8", exclude_characters="\r\n")
ALTERATIONS = st.one_of(
    st.integers(0, 24).map(lambda at: lambda whole: whole[:at]),
    st.builds(lambda at, sign: lambda whole: whole[:at] + sign + whole[at + 1 :], st.integers(0, 24), SIGN),
    st.builds(lambda at, sign: lambda whole: whole[:at] + sign + whole[at:], st.integers(0, 25), SIGN),
    st.integers(0, 10**20).map(lambda seq: lambda whole: f"{whole[:12]}-{seq:012d}"),
    st.text(SIGN, max_size=140).map(lambda text: lambda whole: text),
)


@SHARED
@given(ALTERATIONS, st.sampled_from(["/api/events", "/api/events/wait/cursor-test?timeout=0"]))
def test_a_cursor_that_was_altered_is_refused_or_means_the_same(
    service: Service, architect: Client, alter: Callable[[str], str], path: str
) -> None:
    whole = architect.publish("cursor-test")["event_id"]
    altered = alter(whole)
    answer = architect.get(path, since=altered)
    if answer.status_code == 200:  # none at all, or one of this store within what there is, however many noughts
        assert altered in ("", "earliest", "latest") or (
            altered[:13] == whole[:13] and 0 <= int(altered[13:]) <= int(whole[13:])
        )
    else:
        assert (answer.status_code, answer.json()["code"]) in ((400, "REQ_001"), (410, "EVT_003")), answer.text
