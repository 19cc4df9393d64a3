"""What schemathesis is told about this service: short waits, and names that exist behind names that are merely
well-formed.

Only values that are valid anyway are replaced, so what a mutation made invalid stays so.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import schemathesis

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
REQUEST_LINE = 7_000  # bytes
TASK = 500  # characters: thousands are allowed, shorter ones are quicker
KNOWN = {"agent_type": "python-specialist", "issue_id": "issue-1"}


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Whether a case fits into a request line: longer ones are refused as a whole, whatever their parameters say."""
    return len(urlencode(dict(case.query or {}), doseq=True, errors="replace")) < REQUEST_LINE


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Change a case just before it is sent."""
    if "/wait" in case.operation.path or case.operation.path == "/api/approvals/{approval_id}":
        case.query = shorten(dict(case.query or {}))
    if len(str((case.query or {}).get("task", ""))) > TASK:
        case.query = {**case.query, "task": case.query["task"][:TASK]}
    for values in (case.path_parameters, case.body):
        if isinstance(values, dict):
            values.update({name: value for name, value in KNOWN.items() if is_identifier(values.get(name))})


def shorten(query: dict[str, Any]) -> dict[str, Any]:
    """The same wait, for 20 ms at most."""
    timeout = query.get("timeout", 30_000)
    if re.fullmatch(r"\d{1,6}", str(timeout)) and 20 < int(timeout) <= 300_000:
        query["timeout"] = 20
    return query


def is_identifier(value: Any) -> bool:
    return isinstance(value, str) and bool(IDENTIFIER.fullmatch(value)) and ".." not in value
