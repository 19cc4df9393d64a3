"""Reads a project's own files for metadata and reports: what is missing, huge or not of its kind tells nothing."""

from __future__ import annotations

import configparser
import logging
import sqlite3
import stat
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cco_sidecar import MB, one_line

log = logging.getLogger("cco_sidecar")

REPORTS = (  # files that tell about a project and may be ignored by git, so they are looked for by name
    ".coverage", "coverage.xml", "coverage/coverage-summary.json", "coverage/lcov.info", "lcov.info", "junit.xml",
    "test-results.xml", "reports/junit.xml", "build/test-results.xml", "bandit.json", "results.sarif",
    ".python-version",
)  # fmt: skip

NOT_OF_ITS_KIND = (
    OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError,
    configparser.Error, sqlite3.Error, ElementTree.ParseError,
)  # fmt: skip


def parsed(path: Path, parse: Callable[[str], Any], default: Any = None) -> Any:
    """What ``parse`` makes of a file's text, ``default`` where it is missing, huge or not of its kind. Blocks."""
    try:
        facts = path.stat()
        if facts.st_size > 16 * MB or not stat.S_ISREG(facts.st_mode):
            return default
        return parse(path.read_text("utf-8", "replace"))
    except FileNotFoundError:
        return default
    except NOT_OF_ITS_KIND as error:
        log.debug("%s tells nothing: %s", path.name, one_line(error))
        return default
