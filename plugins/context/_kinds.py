"""The kind of a file by its path alone, where the module's own rules are too plain: cco_sidecar has those."""

from __future__ import annotations

import fnmatch
import functools
import re

from cco_sidecar import DATA, PROSE, language_of


@functools.lru_cache(100_000)
def kind_of(path: str) -> str:
    """source, test, docs, config or other (vendored, locked and minified files too), by a file's path alone."""
    *folders, name = path.lower().split("/")
    language, stem = language_of(path), name.rpartition(".")[0]
    if MADE_NAME.search(name) or not FOREIGN_FOLDERS.isdisjoint(folders):
        return "other"
    if language == "unknown":
        return "docs" if name in ("readme", "license", "changelog", "authors") else "other"
    if language in PROSE and not fnmatch.fnmatch(name, "requirements*.txt"):
        return "docs"
    if language in DATA:
        return "config"
    camel = re.search(r"[a-z0-9]Tests?\.\w+$", path)  # UserTest.java, and not latest.py
    if not TEST_FOLDERS.isdisjoint(folders) or TEST_STEM.search(stem) or camel:
        return "test"
    return "docs" if folders and folders[0] in ("docs", "doc") else "source"


MADE_NAME = re.compile(r"(\.min\.(js|css)|-lock\.(json|yaml)|\.lock|\.map|\.snap)$")
FOREIGN_FOLDERS = frozenset({"vendor", "node_modules", "third_party"})
TEST_FOLDERS = frozenset("test tests testing spec specs __tests__ e2e testdata fixtures".split())
TEST_STEM = re.compile(r"^(test_|tests?$|conftest$)|(_tests?|_spec|\.test|\.spec|-tests?)$")
