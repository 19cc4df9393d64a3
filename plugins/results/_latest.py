"""The latest result of an agent."""

from __future__ import annotations

from typing import Any

from cco_sidecar import Records

LATEST = "select id, status from result where project = ? and agent_id = ? order by seq desc limit 1"


def latest_result(read: Records, project: str, agent_id: str) -> dict[str, Any]:
    """Its ``result_id`` and ``result_status``, null where it stored none."""
    rows = read.rows(LATEST, project, agent_id)
    return dict(zip(("result_id", "result_status"), rows[0] if rows else (None, None), strict=True))
