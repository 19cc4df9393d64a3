"""The types of a context's sections: what plugins give is held to them, and the OpenAPI document tells them."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from cco_sidecar import BYTES_PER_TOKEN, Change, GitContext, json_size


class ProjectStructure(Struct):
    """The project's files as git lists them; the totals are true even where the lists were cut."""

    root: str
    files: list[str]
    directories: list[str]
    total_files: int
    total_size_bytes: int


class RelevantFile(Struct, omit_defaults=True):
    """A file in a context. ``checksum`` is of ``content``; ``size`` and ``last_modified`` are of the file on disk.

    ``truncated`` content is the parts of the file that ``line_ranges`` name (first and last line, from 1), each under a
    line that says so, or without ``line_ranges`` the beginning of the file.
    """

    path: str
    content: str
    last_modified: str
    size: int
    language: str
    checksum: str
    score: float | UnsetType = UNSET
    reasons: list[str] = []
    truncated: bool = False
    redactions: int = 0
    line_ranges: list[tuple[int, int]] = []


class GitChange(Change, omit_defaults=True):
    """An uncommitted change; `diff` is "+added -removed" lines, null for untracked and binary files."""

    conflict: bool = False


class GitState(GitContext, omit_defaults=True):
    """Null and empty where there is no repository."""

    uncommitted_changes: list[GitChange]  # type: ignore[assignment]
    in_progress: str | None = None


SECTION_TYPES: dict[str, Any] = {  # the reference's, in its order
    "project_structure": ProjectStructure,
    "relevant_files": list[RelevantFile],
    "git_context": GitState,
    "previous_agent_outputs": list[dict[str, Any]],
    "metadata": dict[str, Any],
}


def measured(context: dict[str, Any]) -> dict[str, Any]:
    """A context of which parts were taken away, with the figures of what is left."""
    sections, size = context["context"], json_size(context["context"])
    counts = {"total_size_bytes": size, "estimated_tokens": -(-size // BYTES_PER_TOKEN)}
    return context | counts | {"file_count": len(sections.get("relevant_files", []))}
