"""Indexes of the core's tables (cco_sidecar) for what lists, stories and the ends of agents look up in them."""

from __future__ import annotations

import sqlite3

from cco_sidecar import Records, hookimpl
from cco_sidecar_plugins.storage._schema import add_to_schema

INDEXES = """
create index if not exists result_by_agent on result (project, agent_id, seq);
create index if not exists result_by_type on result (project, agent_type, seq);
create index if not exists result_by_status on result (project, status, seq);
create index if not exists agent_by_type on agent (project, type, seq);
create index if not exists agent_by_end on agent (project, ended);
"""


@hookimpl
def part_class(base: type) -> type | None:
    return type("IndexedRecords", (IndexedRecords, base), {}) if issubclass(base, Records) else None


class IndexedRecords(Records):
    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        add_to_schema(connection, INDEXES)
