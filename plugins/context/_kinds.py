"""The kind of a file by its path alone, where the module's own rules are too plain: cco_sidecar has those. And which
kinds an agent's type and its task speak of.
"""

from __future__ import annotations

import fnmatch
import functools
import re

from cco_sidecar import DATA, PROSE, language_of
from cco_sidecar_plugins._patterns import late_pattern


@functools.lru_cache(400_000)  # more than a project has files: as all are gone through in order, less never hits
def kind_of(path: str) -> str:
    """source, test, docs, config or other (vendored, locked and minified files too), by a file's path alone."""
    folders, name = telling_folders(path), path.rpartition("/")[2].lower()
    language, stem = language_of(path), name.rpartition(".")[0]
    if MADE_NAME.search(name) or not FOREIGN_FOLDERS.isdisjoint(folders):
        return "other"
    if is_build_file(name):
        return "config"
    if name.endswith((".ipynb", ".tpl")):
        return "source"
    if language == "unknown":
        return "docs" if name in ("readme", "license", "changelog", "authors") else "other"
    if language in PROSE and not fnmatch.fnmatch(name, "requirements*.txt"):
        return "other" if is_test_data(folders, name) else "docs"
    if language in DATA:
        return "config"
    camel = re.search(r"[a-z0-9]Tests?\.\w+$", path)  # UserTest.java, and not latest.py
    if not TEST_FOLDERS.isdisjoint(folders) or TEST_STEM.search(stem) or camel:
        return "test"
    return "docs" if folders and folders[0] in ("docs", "doc") else "source"


def telling_folders(path: str) -> list[str]:
    """The folders above a file, in lower case; below src/main/java they are parts of a package's name, be it
    com.example.demo.test, and tell nothing.
    """
    return SOURCE_ROOT.split(path.lower(), maxsplit=1)[0].split("/")[:-1]


SOURCE_ROOT = late_pattern(r"(?<=src/)\w{0,30}main/(java|kotlin|scala|groovy|clojure)/")  # of Maven and Gradle
MADE_NAME = late_pattern(r"(\.min\.(js|css)|-lock\.(json|yaml)|\.lock|\.map|\.snap)$")
FOREIGN_FOLDERS = frozenset({"vendor", "node_modules", "third_party"})
TEST_FOLDERS = frozenset("test tests testing spec specs __tests__ e2e testdata fixtures".split())
TEST_STEM = late_pattern(r"^(test_|tests?$|conftest$)|(_tests?|_spec|\.test|\.spec|-tests?)$")
BUILD_NAME = late_pattern(  # how a project is built and run, and what it needs, in a language of its own
    r"^(docker|container|make|rake|gem|pip|proc|vagrant|jenkins|caddy|pod|brew|just)file([.-].+)?$|^go\.(mod|work)$"
    r"|^cmakelists\.txt$|^meson\.build$|^configure\.ac$|^(build|workspace)$|^dune(-project)?$"
    r"|\.(bazel|dockerfile|mk|cmake|gemspec|podspec|rockspec|gradle|gradle\.kts|sbt|cabal|csproj|props|targets|nimble|opam"
    r"|gpr|hcl|tfvars)$",
    re.IGNORECASE,
)


def is_build_file(name: str) -> bool:
    """Whether a base name is that of a BUILD_NAME, and not of code: makefile.py is a module."""
    own = language_of(name) in ("unknown", "text", "dockerfile", "makefile", "kotlin")
    return own and bool(BUILD_NAME.search(name))


def is_test_data(folders: list[str], name: str) -> bool:
    """Whether a text is what tests read or compare with, such as samples and expected output, and no document."""
    if DATA_STEM.search(name) or ("docs" not in folders and not DATA_FOLDERS.isdisjoint(folders)):
        return True
    tests = TEST_FOLDERS.intersection(folders)
    plain = name.endswith(".txt") and tests - {"spec", "specs"}  # in these it may well be a specification
    return bool(plain or (tests and not EXPECTED_FOLDERS.isdisjoint(folders)))


DATA_STEM = late_pattern(
    r"\.(approved|received|verified|golden|snap|snapshot|expected|baseline)\.[a-z]+$", re.IGNORECASE
)
DATA_FOLDERS = frozenset(
    "fixture fixtures __fixtures__ testdata test-data test_data golden goldens __snapshots__".split()
)
EXPECTED_FOLDERS = frozenset(
    "approved baseline baselines cassettes expected expectations snapshots".split()
)  # in tests


SPOKEN_KIND = 0.7  # the least weight of a kind that the task speaks of
BUILDERS = frozenset("build ci cloud devops docker kubernetes mlops network observability platform site".split())


def reading_of(agent_type: str, category: str) -> str:
    """Whose order of kinds an agent of the type reads by: its category's, or that of who builds and runs a project."""
    return "infrastructure" if category == "coding" and agent_type.partition("-")[0] in BUILDERS else category


def kinds_of_task(task: str) -> frozenset[str]:
    """The kinds of file that a task's title speaks of: "ci: fail early", "Upgrade to v4" are about config."""
    title = task.strip().partition("\n")[0]
    return frozenset(kind for kind, pattern in TASK_KINDS.items() if pattern.search(title))


TASK_KINDS = {
    "config": late_pattern(
        r"\b(ci|workflows?|dependabot|docker(file)?|makefile|cmake|gemfile|deps?|dependenc(y|ies)|bump)\b"
        r"|\b(upgrade|update)\b.* to v?\d",
        re.IGNORECASE,
    ),
    "docs": late_pattern(r"\b(docs?|documentation|readme|changelog)\b", re.IGNORECASE),
}
