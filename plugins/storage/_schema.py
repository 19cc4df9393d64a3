"""What plugins have in the database beside the schema of cco_sidecar."""

from __future__ import annotations

import sqlite3


def add_to_schema(connection: sqlite3.Connection, script: str) -> None:
    """Make what is not there yet, all or nothing; a connection for reading, which is opened later, finds it."""
    if not connection.execute("pragma query_only").fetchone()[0]:
        connection.executescript(f"begin immediate; {script} commit;")
