"""The kind of a file (source, test, docs and their like) by its path alone, for the plugin relevance of cco_sidecar."""

from __future__ import annotations

import re

from cco_sidecar import DATA, PROSE, language_of
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._kinds import is_build_file, is_test_data, telling_folders
from cco_sidecar_plugins.context._withheld import is_secret

MARKUP = frozenset("html css sql protobuf graphql terraform shell powershell".split())
OWN_LANGUAGE = (".y", ".yy", ".g4", ".peg", ".pest", ".ipynb", ".tpl")  # source in a language of its own
TEST_FOLDERS = frozenset(
    "test tests testing __tests__ spec specs e2e testdata test-data test_data testsuite fixtures __snapshots__ mocks"
    " __mocks__ playground t xt".split()
)
AUX_FOLDERS = frozenset(
    """doc docs documentation website site example examples demo demos sample samples bench benches benchmark
    benchmarks tools scripts script ci extras changelog changelogs release licenses locale locales migrations .github
    .gitlab .circleci""".split()
)
FOREIGN_FOLDERS = frozenset(
    "vendor vendored third_party third-party node_modules bower_components dist out target deps .venv venv"
    " site-packages".split()
)
TEST_NAME = late_pattern(r"^(test_|tests?\.|conftest\.)|([._-](tests?|spec))\.[a-z]+$", re.IGNORECASE)
TEST_CLASS = late_pattern(r"[a-z0-9](Tests?|TestCase|Spec|IT)\.(java|kt|kts|cs|scala|groovy|swift|php)$")
MADE_NAME = late_pattern(
    r"\.d\.ts$|\.pb\.(go|cc|h)$|_pb2(_grpc)?\.pyi?$|[._-]generated[._]|^zz_generated|^generated_.*\.(go|py|js|ts)$|\.g\.(dart|cs)$",
    re.IGNORECASE,
)
SETUP_NAMES = frozenset(
    "setup.py noxfile.py conf.py tasks.py __version__.py version.py version.go version.rb version.ts version.js".split()
)
DATA_NAME = late_pattern(
    r"\.(map|snap|lock|svg|csv|tsv|po|pot)$|[.-]lock\.(json|ya?ml)$|^(go\.sum|npm-shrinkwrap\.json)$|\.min\.(js|css)$",
    re.IGNORECASE,
)
PICTURE = late_pattern(r"(?<=\").{2000,}(?=\")")  # and other output in a notebook, which is one line of it
PLAIN_NAMES = frozenset("readme license changelog changes contributing authors news history todo".split())


def classify(path: str) -> tuple[str, bool]:
    """(kind, whether its content is worth indexing) by the path alone; kinds are those of KIND_FACTORS, and secret."""
    name, folders = path.rpartition("/")[2], telling_folders(path)
    places = set(folders)
    language = language_of(path)
    if is_secret(path):
        return "secret", False
    if FOREIGN_FOLDERS & places or path.startswith("build/"):  # deeper down a folder called build may well be source
        return "other", False
    if DATA_NAME.search(name):
        return "other", False
    if is_build_file(name):
        return ("other" if TEST_FOLDERS & places else "config"), True
    if language in PROSE or (language == "unknown" and name.lower() in PLAIN_NAMES):
        if name.startswith("requirements"):
            return "config", True
        return ("other" if is_test_data(folders, name) else "docs"), True
    if language in DATA:
        return ("other" if TEST_FOLDERS & places else "config"), True
    if language == "unknown" and not name.endswith(OWN_LANGUAGE):
        return "other", False
    made = bool(MADE_NAME.search(name))
    if TEST_FOLDERS & places or TEST_NAME.search(name) or TEST_CLASS.search(name):
        return ("other" if language in MARKUP else "test"), not made
    if made or AUX_FOLDERS & places or name in SETUP_NAMES:
        return "aux", not made or name.endswith(".d.ts")
    return ("markup" if language in MARKUP else "source"), True
