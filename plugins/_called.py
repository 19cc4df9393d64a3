"""How this program was called, for messages of cco_sidecar's plugins that name a next command."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from cco_sidecar import Settings, clean_text, flag_of


def own_command(settings: Settings | None = None) -> str:
    """What was typed, as short as it can be; of ``settings``, a command for their service."""
    program = sys.argv[0] or "cco_sidecar.py"
    words = [program] if Path(program).name in ("cco", "cco.exe") else [sys.executable, program]
    if shutil.which(name := Path(words[0]).name) == os.path.abspath(words[0]):
        words[0] = name
    words = ["uv", "run", words[-1]] if "UV" in os.environ else words
    said = [each for each in ("root", "project", "storage") if settings and ":" not in settings.places.get(each, ":")]
    return clean_text(shlex.join([*words, *(f"{flag_of(each)}={getattr(settings, each)}" for each in said)]))
