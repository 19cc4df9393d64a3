"""Readers: for whom a prompt or a brief says how to work through this service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import ContextQuery, Launcher


class Reader(Struct, frozen=True):
    """The reader of a brief: who it is, what its token allows, and by what it calls the service."""

    agent_id: str
    agent_type: str
    issue_id: str
    project_id: str
    permissions: tuple[str, ...]
    url: str
    curl_file: str  # curl's configuration with its token
    how: str = ""  # how it works through the service, where that is not by curl


class BriefQuery(ContextQuery):
    """The parameters of a brief, which gives the contents of no files."""

    reader: Reader | None = None  # type: ignore[misc]
    max_files: int = 0


def brief_query(query: ContextQuery, reader: Reader) -> BriefQuery:
    """The parameters of the brief for ``reader`` in the place of the context that ``query`` asks for."""
    return BriefQuery(**msgspec.structs.asdict(query) | {"reader": reader, "max_files": 0})


class ReadingLauncher(Launcher):
    """The base of launchers that write for readers."""

    def reader(self, row: dict[str, Any], folder: Path | None) -> Reader:
        """The agent of a ledger's row as a reader; without a folder, somebody with a token alone."""
        who, may = (row["id"], row["type"], row["issue"], row["project"]), tuple(row["permissions"])
        return Reader(*who, may, self.url, str(folder / "curl") if folder else "CURL_FILE")


def lasting_token(launcher: Launcher, row: dict[str, Any]) -> str:
    """A token for as long as its agent may live, for a program that reads it once."""
    return launcher.token(row, int(row["time_limit"]) + 60)
