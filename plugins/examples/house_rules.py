"""A context section with the rules that a project has written down for its coding agents.

Projects keep them under several names (AGENTS.md, CLAUDE.md, ...); an agent that is started here gets them in its
context as ``house_rules``: ``[{"path": "AGENTS.md", "content": "..."}]``, in the order of FILES, each cut to 32 kB at a
line end.
"""

from pathlib import Path
from typing import Any

from cco_sidecar import ContextRequest, hookimpl, read_text_file, redact

FILES = ("AGENTS.md", "CLAUDE.md", "GEMINI.md", "CONVENTIONS.md", ".cursorrules", ".github/copilot-instructions.md")
LIMIT = 32 * 1024


@hookimpl
def context_section(request: ContextRequest) -> dict[str, Any] | None:
    """The rules that are there; no section where a project has none."""
    listed = set(FILES).intersection(file.path for file in request.project.files)
    rules = []
    for path in FILES:
        found = read_text_file(request.project.root, path, LIMIT) if path in listed else None
        if found:
            rules.append({"path": str(Path(path).as_posix()), "content": redact(found[0])[0]})
    return {"house_rules": rules} if rules else None
