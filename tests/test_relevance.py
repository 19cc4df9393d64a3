"""Tests of plugins/context/relevance.py: real repositories, a real SQLite file, the builder as a real process. Pure rules in
tables.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import platform
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import psutil
import pytest
from agent_harness import alive
from conftest import Service, plugin, until

import cco_sidecar
from cco_sidecar import FileFact, RankedFile, RankRequest, import_file

PLUGIN = Path(__file__).resolve().parent.parent / "plugins/context/relevance.py"
relevance, identifiers, index_file = import_file(PLUGIN), plugin("_identifiers"), plugin("_index")
ranking = plugin("_ranking")

EMPTY = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # the blob of every empty file
FILES = {
    "shop/session.py": "class SessionStore:\n    def save_cookie(self, cookie):\n        self.cookie = cookie\n",
    "shop/invoice.py": "from shop.money import round_amount\n\n\ndef total_of(lines):\n    return round_amount(sum(lines))\n",
    "shop/money.py": "PENNIES = 100\n\n\ndef round_amount(value):\n    return round(value, 2)\n",
    "shop/warehouse.py": "def shelf(number):\n    return number\n",
    "tests/test_session.py": "def test_cookie_is_saved():\n    assert True\n",
    "docs/cookies.md": "# Cookies\n\nHow a session keeps its cookie.\n",
    "pyproject.toml": '[project]\nname = "shop"\n',
}


def git(folder: Path, *arguments: str) -> str:
    return conftest.git(folder, *arguments).strip()


class Repository:
    """A folder with an index folder beside it, and requests about it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.index = folder / "project", folder / "index"
        self.root.mkdir()
        self.index.mkdir()
        self.database = self.index / "relevance.sqlite"
        git(self.root, "init", "-q", "-b", "main")

    def write(self, **files: str) -> None:
        for name, content in files.items():
            self.put(name, content)

    def put(self, name: str, content: str | bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, message: str) -> str:
        git(self.root, "add", "-A")
        git(self.root, "commit", "-q", "-m", message)
        return git(self.root, "rev-parse", "HEAD")

    def facts(self) -> list[FileFact]:
        names = [
            os.path.relpath(os.path.join(place, name), self.root)
            for place, _, names in os.walk(self.root)
            for name in names
        ]
        kept = [(name, os.lstat(self.root / name)) for name in sorted(names) if not name.startswith(".git/")]
        return [FileFact(name, facts.st_size, facts.st_mtime_ns) for name, facts in kept]

    def request(
        self, task: str = "", category: str = "coding", agent: str = "python-specialist", **more: Any
    ) -> RankRequest:
        facts: dict[str, Any] = {"files": self.facts(), "changed": [], "outputs": [], "head": self.head()} | more
        return RankRequest(
            root=str(self.root), index_folder=str(self.index), agent_type=agent, category=category, task=task, **facts
        )

    def head(self) -> str | None:
        try:
            return git(self.root, "rev-parse", "--verify", "--quiet", "HEAD")
        except subprocess.CalledProcessError:
            return None

    def rank(self, task: str = "", **more: Any) -> list[RankedFile]:
        request, project = self.request(task, **more), self.project()
        while (answer := project.rank(request)) is None and (builder := project.builder):
            builder.done.wait()
        assert answer is not None, self.state()
        assert [item.score for item in answer] == sorted((item.score for item in answer), reverse=True)
        assert all(item.reasons and len(item.reasons) <= 4 for item in answer)
        return list(answer)

    def paths(self, task: str = "", **more: Any) -> list[str]:
        return [item.path for item in self.rank(task, **more)]

    def reasons(self, task: str, path: str, **more: Any) -> list[str]:
        return next(item.reasons for item in self.rank(task, **more) if item.path == path)

    def state(self) -> dict[str, Any]:
        return dict(relevance.index_state(str(self.root), str(self.index)))

    def project(self) -> Any:
        return relevance.project_of(str(self.root), str(self.index))

    def forget(self) -> None:
        """As after a restart of the service."""
        relevance.end_project(str(self.root), str(self.index))

    def sql(self, statement: str, *parameters: Any) -> list[Any]:
        database = sqlite3.connect(self.database)
        try:
            with database:
                return database.execute(statement, parameters).fetchall()
        finally:
            database.close()


def keywords_of(repository: Repository, task: str = "", **more: Any) -> list[RankedFile]:
    """The other ranking, which serves while there is no index."""
    return list(plugin("keywords").rank_files(repository.request(task, **more)))


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Repository]:
    repository = Repository(tmp_path)
    yield repository
    repository.forget()


@pytest.fixture
def shop(empty: Repository) -> Repository:
    empty.write(**FILES)
    empty.commit("Initial commit")
    return empty


@pytest.mark.parametrize("words", [1, 4, 16])
def test_a_scan_for_few_words_reads_not_more_than_it_has_time_for(
    empty: Repository, monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    keywords, read = plugin("keywords"), list[str]()
    monkeypatch.setattr(keywords, "WORK", 10 * 100 * 24)  # ten files of a hundred bytes, and sixteen words
    monkeypatch.setattr(keywords, "read_text_file", lambda root, path, limit: read.append(path))
    empty.write(**{f"poem_{n}.txt": "x" * 100 for n in range(40)})
    keywords_of(empty, " ".join(f"word{chr(97 + n) * 3}" for n in range(words)))
    assert 0 < len(read) <= 240 // (8 + words) + 1, len(read)


def test_a_scan_ends_in_time_on_a_machine_that_is_busy(empty: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords, now, read = plugin("keywords"), itertools.count(), list[str]()
    monkeypatch.setattr(keywords, "time", SimpleNamespace(monotonic=lambda: next(now) / 5))  # each file takes 0.2 s
    monkeypatch.setattr(keywords, "read_text_file", lambda root, path, limit: read.append(path))
    empty.write(**{f"poem_{n:02}.py": f"verse{n}\n" for n in range(40)})
    ranked = keywords_of(empty, "The verse of poem 39")
    assert 0 < len(read) < 6 and len(ranked) == 40
    assert all(item.matched for item in ranked)  # by their names


# ---- Pure rules
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identifier", "words"),
    [
        ("SessionCookie", "session cookie sessioncookie"), ("save_cookie", "save cookie savecookie"), ("HTTPServer2", "http server 2 httpserver2"),
        ("word", "word"), ("__init__", "init"), ("größe", "größe"), ("x" * 100, ""), ("utf8", "utf 8 utf8"),
        ("死锁", "死锁"), ("两段锁协议", "两段 段锁 锁协 协议 两段锁协议"), ("与NEXT_Lock", "与 next lock 与nextlock"), ("支払い処理", "支払 払い い処 処理 支払い処理"),
        ("결제", "결제"), ("größeÄnderung_x", "größeänderung x größeänderungx"),
    ],
)  # fmt: skip
def test_an_identifier_is_taken_apart(identifier: str, words: str) -> None:
    assert identifiers.Splitter().text(identifier) == words


def test_the_splitter_forgets_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    splitter = identifiers.Splitter()
    monkeypatch.setattr(identifiers.Splitter, "LIMIT", 10)
    assert splitter.text(" ".join(f"word{chr(97 + n)}" for n in range(25))).split()[-1] == "wordy"
    assert len(splitter) <= 10


def test_stems_are_those_of_the_index() -> None:
    stemmer = identifiers.Stemmer()
    assert stemmer.stems(["cookies", "caching", "2", "größe"]) == {
        "cookies": "cooki",
        "caching": "cach",
        "2": "2",
        "größe": "groß",
    }
    assert stemmer.stems(["sessions", "session"]) == {"sessions": "session", "session": "session"}


@pytest.mark.parametrize(
    ("path", "kind", "indexed"),
    [
        ("src/app.py", "source", True), ("tests/test_app.py", "test", True), ("src/app_test.go", "test", True), ("a/b.spec.ts", "test", True),
        ("src/UserTest.java", "test", True), ("src/latest.py", "source", True), ("conftest.py", "test", True), ("docs/conf.py", "aux", True),
        ("examples/demo.py", "aux", True), ("setup.py", "aux", True), ("api/service.pb.go", "aux", False), ("README.md", "docs", True),
        ("LICENSE", "docs", True), ("requirements.txt", "config", True), ("config/app.yaml", "config", True), ("tests/data.json", "other", True),
        ("web/page.html", "markup", True), ("tests/page.html", "other", True), ("promql/parser.y", "source", True), ("logo.png", "other", False),
        ("vendor/lib/a.go", "other", False), ("node_modules/a/index.js", "other", False), ("dist/app.js", "other", False),
        ("app.min.js", "other", False), ("package-lock.json", "other", False), ("Cargo.lock", "other", False), ("a.js.map", "other", False),
        ("__snapshots__/a.snap", "other", False), (".env", "secret", False), ("deploy/id_rsa", "secret", False), (".env.example", "other", False),
        ("src/build/plan.py", "source", True), ("build/plan.py", "other", False), ("django/contrib/auth.py", "source", True),
        ("app/i18n/plural.ts", "source", True), ("src/locale/en.py", "aux", True), ("go.mod", "config", True), ("a/CMakeLists.txt", "config", True),
        ("Makefile.cross", "config", True), ("lib/x.gemspec", "config", True), ("app/build.gradle.kts", "config", True), ("go.sum", "other", False),
        ("src/makefile_reader.py", "source", True), ("src/makefile.py", "source", True), ("lab/plot.ipynb", "source", True), ("tests/plot.ipynb", "test", True), ("tests/CMakeLists.txt", "other", True), ("vendor/x/go.mod", "other", False),
        ("src/payroll.cob", "source", True), ("src/lexer.ml", "source", True), ("contracts/token/Token.sol", "source", True), ("t/001_base.t", "test", True),
        ("chart/templates/_helpers.tpl", "source", True), ("Directory.Packages.props", "config", True), ("dune", "config", True),
        ("app/src/main/java/com/example/demo/Cart.java", "source", True), ("x/src/commonMain/kotlin/org/samples/App.kt", "source", True),
        ("test/src/main/scala/acme/test/Probe.scala", "test", True), ("examples/a/src/main/java/acme/A.java", "aux", True),
        ("tests/SelfTest/Baselines/junit.sw.approved.txt", "other", True), ("tests/requirements.txt", "config", True), ("tests/README.md", "docs", True),
        ("e2e/__snapshots__/page.md", "other", True), ("tests/expected/page.rst", "other", True), ("docs/expected/page.rst", "docs", True),
    ],
)  # fmt: skip
def test_a_path_says_what_a_file_is(path: str, kind: str, indexed: bool) -> None:
    assert plugin("_path_kinds").classify(path) == (kind, indexed)


@pytest.mark.parametrize(
    ("language", "text", "names"),
    [
        ("python", "class A:\n    async def run(self): pass\nLIMIT: int = 3\nx == 4\n", {"A", "run", "LIMIT"}),
        ("go", "func (s *Store) Get(k string) {\n}\ntype Store struct {\n", {"Get", "Store"}),
        ("rust", "pub(crate) async fn walk() {}\nimpl X {}\nmacro_rules! say {}\npub struct Walker;", {"walk", "say", "Walker"}),
        ("typescript", "export async function load() {}\nexport const limit = 3\n  close(now) {\n  if (x) {\n", {"load", "limit", "close"}),
        ("java", "public class Cart {\n  private List<Item> items(int a) {\n", {"Cart", "items"}),
        ("c", "static int parse_line(char *text)\n{\n#define LIMIT 3\nstruct node {\n", {"parse_line", "LIMIT", "node"}),
        ("ruby", "module Shop\n  def self.total(x)\n  attr_reader :name\n", {"Shop", "total", "name"}),
        ("lua", "local function greet()\n", {"greet"}), ("markdown", "def x\n", set()),
        ("cobol", "       PROGRAM-ID. Pay-Roll.\n", {"Pay-Roll"}), ("fortran", "  PURE SUBROUTINE solve(x)\nmodule linalg\n", {"solve", "linalg"}),
        ("ocaml", "let rec walk x =\n  let y = x in\nand back = 3\n", {"walk", "back"}), ("solidity", "abstract contract Token {\n    function send(", {"Token", "send"}),
        ("ada", "   overriding procedure Publish (X : Y);\npackage body Alire.Roots is\n", {"Publish", "Alire.Roots"}), ("lisp", "(defun magit-log (x)", {"magit-log"}),
    ],
)  # fmt: skip
def test_definitions_are_found(language: str, text: str, names: set[str]) -> None:
    assert set(plugin("_definitions").definitions(language, text)) == names


@pytest.mark.parametrize(
    ("language", "text", "modules"),
    [
        ("python", "from a.b import c, d\nimport e.f\nfrom ..g import h\n", ["a/b", "a/b/c", "a/b/d", "./../g", "./../g/h", "e/f"]),
        ("typescript", "import { x } from './util.js'\nconst y = require('../y')\n", ["./util", "../y"]),
        ("go", 'import (\n\t"fmt"\n\tstore "example.com/shop/store"\n)\n', ["fmt", "example.com/shop/store"]),
        ("rust", "use crate::walk::Walker;\nmod tree;\n", ["walk/Walker", "tree"]), ("java", "import com.shop.Cart;\n", ["com/shop/Cart"]),
        ("c", '#include "list/node.h"\n', ["list/node"]), ("markdown", "import x\n", []),
    ],
)  # fmt: skip
def test_imports_are_found(language: str, text: str, modules: list[str]) -> None:
    assert plugin("_definitions").imports(language, text) == modules


def query(*texts: tuple[str, float]) -> Any:
    return plugin("_query").make_query(texts, identifiers.Stemmer())


def test_a_query_weighs_its_words() -> None:
    made = query(("Fix the cookie of SessionStore", 1.0), ("cookie cookies expire", 0.5))
    weights = {stem: round(weight, 2) for stem, (_, weight) in made.terms.items()}
    assert weights == {"cooki": 1.69, "session": 1.0, "store": 1.0, "sessionstor": 1.0, "expir": 0.5}
    assert next(iter(made.terms)) == "cooki", "the heaviest comes first"
    assert made.match.split(" OR ").count('"cookie"') == 2 and made.match.split(" OR ").count('"expire"') == 1


@pytest.mark.parametrize(
    ("texts", "words", "texts_and_pairs"),
    [
        ([("cookie of session", 1.0)], [1, 1], [1, 1]), ([("session cookie", 1.0)], [1, 1], [2, 2]),
        ([("session cookie", 1.0), ("expire", 0.5)], [2, 2], [2, 2]),
        ([("cookie of session", 1.0), ("", 0.5), ("expire", 0.3)], [2, 2], [2, 2]), ([("", 1.0), ("session cookie", 0.5)], [1, 1], [1, 1]),
    ],
)  # fmt: skip
def test_words_of_a_title_stand_twice_where_anything_else_stands_once(
    texts: list[tuple[str, float]], words: list[int], texts_and_pairs: list[int]
) -> None:
    made = query(*texts)
    for match, numbers in ((made.match, words), (made.match_with_pairs, texts_and_pairs)):
        assert [match.split(" OR ").count(word) for word in ('"session"', '"cookie"')] == numbers, match


def test_a_query_joins_neighbours_but_not_over_a_stop_word_or_the_end_of_a_sentence() -> None:
    made = query(("user bar for admin. menu", 1.0))
    assert made.runs == {"userbar"} and made.names["userbar"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("expire session cookie", ["expire session", "session cookie"]), ("cookie of session", []),
        ("SessionCookie store", ["session cookie", "sessioncookie store"]), ("read_only_file", []),
        ("cookie, session (store)", []), ("cookie\nsession", []), ("cookie: session! store? row; end", []),
        (f"session {'x' * 90} cookie", []), ("cookie b session", []), ("größe messen", ["größe messen"]),
    ],
)  # fmt: skip
def test_neighbouring_words_are_pairs(text: str, pairs: list[str]) -> None:
    assert query((text, 1.0)).pairs == pairs


@pytest.mark.parametrize("line", ["retry budget", "retryBudget", "retry_budget", "RetryBudget"])
def test_words_that_stand_together_as_in_the_task_weigh_more(empty: Repository, line: str) -> None:
    apart = "budget\nblank\nretry\n" if " " in line else "budget\nblank\nretry\nretrybudget\n"
    texts = {f"other{number}.py": "nothing\n" * number for number in range(1, 9)}
    empty.write(**texts | {"a.py": apart, "b.py": f"{line}\nblank\n"})
    assert empty.paths("wrong retry budget")[:2] == ["b.py", "a.py"]


def test_a_query_has_an_end() -> None:
    many = " ".join(f"word{chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26))
    made = query(("first pair", 1.0), (many, 0.5), ("a later decision", 0.3))
    assert (len(made.terms), len(made.pairs), made.pairs[0]) == (
        plugin("_query").MAX_TERMS,
        plugin("_query").MAX_PAIRS,
        "first pair",
    )
    assert query(("title", 1.0), ("", 0.5), ("a later decision", 0.3)).pairs == [], "earlier agents' words are no task"


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("feat(parser): read numbers", {"parser", "read", "number"}), ("fix: read numbers", {"read", "number"}),
        ("Documentation: explain what sessions are", {"session"}), ("Explain the documentation", {"explain", "document"}),
        ("Refactor sessions\n\nExplain them", {"session", "explain"}), ("the and of", set()), ('"; drop table* NEAR(x', {"drop", "tabl", "near"}), ("\x00 \ud800 ok", {"ok"}),
    ],
)  # fmt: skip
def test_a_task_becomes_a_query(empty: Repository, task: str, words: set[str]) -> None:
    assert set(query(*plugin("_query").texts_of(empty.request(task))).terms) - {"x"} == words


@pytest.mark.parametrize(
    "task", ["Documentation: explain what skip does", "Describe skip in the docs", "Refactor skip"]
)
def test_words_of_a_title_that_name_the_kind_of_work_do_not_lead_away_from_its_subject(
    empty: Repository, task: str
) -> None:
    empty.put("docs/contributing.md", "Documentation explains. Describe and explain a refactor in the docs.\n" * 9)
    empty.put("docs/skipping.md", "Some tests are not run.\n" * 9 + "Then skip says so.\n")
    empty.write(**{f"docs/guide{number}.md": f"The part {number} of it.\n" for number in range(9)})
    for rank in (empty.rank, functools.partial(keywords_of, empty)):
        paths = [item.path for item in rank(task, agent="documentation-expert", category="documentation")]
        assert paths[0] == "docs/skipping.md", paths


@pytest.mark.parametrize(
    ("test", "source"),
    [
        ("tests/test_session.py", "shop/session.py"), ("store/get_test.go", "store/get.go"), ("a/list.spec.ts", "a/list.ts"),
        ("src/test/UserStoreTest.java", "src/main/UserStore.java"), ("spec/user_store_spec.rb", "lib/user_store.rb"),
        ("tests/test_testing.py", "shop/testing.py"),
    ],
)  # fmt: skip
def test_a_test_and_its_source_are_called_the_same(test: str, source: str) -> None:
    assert identifiers.pair_stem(test) == identifiers.pair_stem(source)


@pytest.mark.parametrize(
    ("raw", "paths", "renames"),
    [
        (":100644 100644 aaaa bbbb M\0a.py\0", ["a.py"], []),
        (":100644 000000 aaaa 0000 D\0old.py\0:000000 100644 0000 aaaa A\0new.py\0", ["old.py", "new.py"], [("old.py", "new.py")]),
        (f":100644 000000 {EMPTY} 0 D\0a\0:000000 100644 0 {EMPTY} A\0b\0", ["a", "b"], []),
        ("", [], []),
    ],
)  # fmt: skip
def test_changed_paths_and_renames_are_read(raw: str, paths: list[str], renames: list[tuple[str, str]]) -> None:
    assert index_file.changed_paths(raw) == (paths, renames)


# ---- What is relevant
# ------------------------------------------------------------------------------------------------------------


def test_the_file_that_a_task_is_about_comes_first_and_says_why(shop: Repository) -> None:
    shop.put("shop/session.py", FILES["shop/session.py"] + "    def expire(self): ...\n")
    head = shop.commit("Let the session cookie expire")
    first = shop.rank("SessionStore forgets the cookie")[0]
    assert first.path == "shop/session.py"
    said = " | ".join(first.reasons)
    assert (
        "defines SessionStore" in said
        and "text matches" in said
        and f"changed with {head[:7]} Let the session cookie expire" in said
    )


def test_relations_are_reasons(shop: Repository) -> None:
    assert "test of shop/session.py" in shop.reasons("SessionStore forgets the cookie", "tests/test_session.py")
    assert "imported by shop/invoice.py" in shop.reasons("total_of invoice lines", "shop/money.py")
    assert "name matches warehouse" in shop.reasons("warehouse is empty", "shop/warehouse.py")


@pytest.mark.parametrize(
    ("category", "agent", "first"),
    [
        ("coding", "python-specialist", "shop/session.py"), ("qa", "test-engineer", "tests/test_session.py"),
        ("documentation", "documentation-expert", "docs/cookies.md"), ("support", "code-reviewer", "docs/cookies.md"),
        ("architect", "chief-architect", "shop/session.py"), ("security", "security-auditor", "shop/session.py"),
    ],
)  # fmt: skip
def test_each_category_gets_its_kind_of_file_first(shop: Repository, category: str, agent: str, first: str) -> None:
    assert shop.paths("the session cookie", category=category, agent=agent)[0] == first


DELIVERY = {  # what all of them name in their text: the server's image
    "lib/push.py": "def push(image, server): ...\n", "Dockerfile": "FROM python\n# the image of the server\n",
    ".github/workflows/ship.yml": "jobs: {image: {server: x}}\n", "go.mod": "module image/server\n",
    "README.md": "# The server's image\n", "tests/test_push.py": "def test_image_of_the_server(): ...\n",
}  # fmt: skip


@pytest.mark.parametrize("ranking", [Repository.rank, keywords_of])
@pytest.mark.parametrize("agent", ["docker-specialist", "ci-cd-specialist", "devops-engineer", "kubernetes-helper"])
def test_who_builds_and_runs_a_project_gets_its_configuration_first(
    empty: Repository, ranking: Callable[..., list[RankedFile]], agent: str
) -> None:
    empty.write(**DELIVERY)
    for task in ("", "The image of the server is too large"):
        first = {item.path for item in ranking(empty, task, agent=agent)[:3]}
        assert first == {"Dockerfile", ".github/workflows/ship.yml", "go.mod"}, (task, first)


@pytest.mark.parametrize("ranking", [Repository.rank, keywords_of])
@pytest.mark.parametrize(
    ("title", "path"),
    [
        ("ci: {}", ".github/workflows/ship.yml"), ("{}, upgrade it to v2", "go.mod"), ("bump {}", "go.mod"), ("docs: {}", "README.md"),
        ("{} in the Dockerfile", "Dockerfile"),
    ],
)  # fmt: skip
def test_a_title_that_speaks_of_a_kind_of_file_brings_that_kind(
    empty: Repository, ranking: Callable[..., list[RankedFile]], title: str, path: str
) -> None:
    empty.write(**DELIVERY)
    before, now = (
        {item.path: item.score for item in ranking(empty, task.format("the image of the server"))}
        for task in ("{}", title)
    )
    assert now[path] / now["lib/push.py"] > 2 * before[path] / before["lib/push.py"]


@pytest.mark.parametrize("agent", ["terraform-specialist", "sql-specialist", "shell-specialist"])
def test_a_specialist_of_another_language_than_code_gets_its_files_before_all_others(
    empty: Repository, agent: str
) -> None:
    names = {"terraform": "net.tf", "sql": "net.sql", "shell": "net.sh"}
    empty.write(**dict.fromkeys([*names.values(), "net.py", "net.yml", "Makefile"], "net = 1\n"))
    for task in ("", "the net"):
        assert empty.paths(task, agent=agent)[0] == names[agent.partition("-")[0]]


@pytest.mark.parametrize("agent", ["data-scientist", "python-specialist", "machine-learning-engineer"])
def test_a_notebook_is_found_by_what_its_cells_say_and_not_by_its_pictures(empty: Repository, agent: str) -> None:
    cell = {
        "source": ["import numpy as np\n", "# broadcasting of arrays\n"],
        "outputs": [{"image/png": "broadcasting" * 900}],
    }
    empty.write(**{"lab/arrays.ipynb": json.dumps({"cells": [cell]}, indent=1), "lab/tool.py": "def copy(): ...\n"})
    assert empty.paths("Explain broadcasting of arrays", agent=agent)[0] == "lab/arrays.ipynb"
    chunks = empty.sql("select body from chunk where chunk match 'broadcasting'")
    assert len(chunks) == 1 and chunks[0][0].count("broadcasting") == 1, chunks


def test_a_specialist_gets_files_in_its_language_first(empty: Repository) -> None:
    empty.write(**{"web/cookie.ts": "export function cookie() {}\n", "core/cookie.py": "def cookie(): ...\n"})
    assert empty.paths("the cookie")[0] == "core/cookie.py"
    assert empty.paths("the cookie", agent="typescript-specialist")[0] == "web/cookie.ts"


@pytest.mark.parametrize(
    ("agent", "code", "view"),
    [
        ("rails-specialist", "app/models/cookie.rb", "app/views/basket/show.html.erb"),
        ("elixir-specialist", "lib/shop/cookie.ex", "lib/shop_web/basket/show.html.heex"),
        ("csharp-specialist", "Shop/Cookie.cs", "Shop/Views/Basket/Show.cshtml"),
        ("frontend-developer", "web/cookie.ts", "app/views/basket/show.html.eex"),
    ],
)  # fmt: skip
def test_a_page_s_template_comes_beside_the_code(empty: Repository, agent: str, code: str, view: str) -> None:
    other = {f"other/{number}{Path(code).suffix}": f"cookie{number} = {number}\n" for number in range(3)}
    empty.write(**{code: "cookie = 1\n", view: "<h1>The cookie of the basket</h1>\n"} | other)
    assert view in empty.paths("show the basket's cookie", agent=agent)[:2]


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("Look at shop/warehouse.py", "shop/warehouse.py"), ("see warehouse.py.", "shop/warehouse.py"), ("in shop.money.round_it", "shop/money.py"),
        ("shop.warehouse is slow", "shop/warehouse.py"), (r"open shop\money.py", "shop/money.py"),
        ("the version in pyproject.toml", "pyproject.toml"),
    ],
)  # fmt: skip
def test_a_file_that_is_named_comes_first(shop: Repository, task: str, path: str) -> None:
    first = shop.rank(f"{task} so that the session cookie is saved")[0]
    assert (first.path, first.reasons[0]) == (path, "named in the task")


def test_a_base_name_that_many_files_have_names_none(empty: Repository) -> None:
    empty.write(**{f"part{n}/__init__.py": f"value = {n}\n" for n in range(6)})
    assert not any("named in the task" in item.reasons for item in empty.rank("change __init__.py"))
    assert empty.rank("change part3/__init__.py")[0].path == "part3/__init__.py"


def test_uncommitted_changes_and_earlier_agents_files_are_lifted(shop: Repository) -> None:
    assert shop.rank("anything", changed=["shop/warehouse.py"])[0].reasons[0] == "uncommitted change"
    output = {
        "agent": "a",
        "agent_type": "chief-architect",
        "decision": "Round differently",
        "files_affected": ["shop/money.py", "gone.py", 7],
    }
    first = shop.rank("anything", outputs=[output])[0]
    assert (first.path, first.reasons[0]) == ("shop/money.py", "changed by an earlier agent")


@pytest.mark.parametrize("agent", ["documentation-expert", "python-specialist", "test-engineer"])
def test_what_earlier_agents_changed_comes_before_all_that_only_matches(empty: Repository, agent: str) -> None:
    empty.write(**{f"{folder}/cookie{n}{end}": "cookie of the session\n" * 9
                   for n in range(8) for folder, end in (("docs", ".md"), ("shop", ".py"), ("tests", "_test.py"))})  # fmt: skip
    work = ["docs/new.md", "shop/new.py", "tests/new_test.py"]
    empty.write(**dict.fromkeys([*work, "tests/approved/new.txt"], "other = 1\n"))
    output = {"agent": "a", "agent_type": agent, "decision": "", "files_affected": [*work, "tests/approved/new.txt"]}
    for rank in (empty.rank, functools.partial(keywords_of, empty)):
        paths = [
            item.path
            for item in rank("The cookie of the session, as in shop/cookie3.py", agent=agent, outputs=[output])
        ]
        assert paths[0] == "shop/cookie3.py" and set(paths[1:4]) == set(work), paths


@pytest.mark.parametrize(
    ("line", "task"),
    [
        ("# 两段锁协议可能会产生死锁", "修复死锁检测的错误"), ("# 支払いの処理を行う", "支払処理が失敗する"),
        ("# 결제를 처리한다", "결제가 실패한다"), ("# 缓存会在Redis里保存", "为什么Redis里的缓存丢失"),
    ],
)  # fmt: skip
def test_a_task_is_found_where_no_blank_parts_its_words(empty: Repository, line: str, task: str) -> None:
    for number, other in enumerate(
        ["# 数组与矩阵的排序", "# 注文の一覧を表示", "# 주문을 보여준다", line, "pass", "# plain"]
    ):
        empty.put(f"m{number}.py", f"{other}\n")
    assert [item.path for item in empty.rank(task) if item.matched][:1] == ["m3.py"]
    assert [item.path for item in keywords_of(empty, task) if item.matched][:1] == ["m3.py"]


@pytest.mark.parametrize("package", ["com/example/demo", "org/samples/apps", "acme/tools/test"])
def test_the_name_of_a_package_makes_no_example_of_its_source(empty: Repository, package: str) -> None:
    empty.put(f"src/main/java/{package}/Bookmarks.java", "class Bookmarks { void loading() {} }\n")
    empty.put(f"src/test/java/{package}/BookmarksTest.java", "class BookmarksTest { void loading() {} }\n")
    paths = empty.paths("Show that bookmarks are loading", agent="java-specialist")
    assert paths[0] == f"src/main/java/{package}/Bookmarks.java", paths


def test_an_earlier_decision_is_part_of_the_query(shop: Repository) -> None:
    output = {
        "agent": "a",
        "agent_type": "chief-architect",
        "decision": "SessionStore has to forget the cookie",
        "files_affected": None,
    }
    assert shop.rank("go on", outputs=[output])[0].path == "shop/session.py"


def test_a_general_security_task_looks_where_security_is_made(empty: Repository) -> None:
    empty.write(
        **{
            "app/login.py": "def check_password(user, password): ...\n",
            "app/colour.py": "def red(): ...\n",
            "app/aaa.py": "x = 1\n",
        }
    )
    for task in ("", "Audit the code for vulnerabilities"):
        assert empty.paths(task, category="security", agent="security-auditor")[0] == "app/login.py"


def test_without_a_task_the_right_kind_and_the_lately_changed_come_first(shop: Repository) -> None:
    shop.put("shop/warehouse.py", "def shelf(number):\n    return number + 1\n")
    shop.commit("Count from one")
    ranked = shop.rank()
    assert ranked[0].path == "shop/warehouse.py" and "changed recently" in ranked[0].reasons
    assert {item.path for item in ranked} == FILES.keys() - {"docs/cookies.md"}
    assert shop.paths(category="documentation", agent="technical-writer")[0] == "docs/cookies.md"


def test_a_long_file_says_which_lines_matter(empty: Repository) -> None:
    lines = [f"filler_{n} = {n}" for n in range(400)]
    lines[220] = "def render_receipt(): ..."
    empty.put("long.py", "\n".join(lines))
    chunks = empty.rank("render_receipt")[0].chunks
    assert chunks[0][0] == 201 and len(chunks) == 8 and {first % 50 for first, _ in chunks} == {1}
    assert [score for _, score in chunks] == sorted((score for _, score in chunks), reverse=True)


def test_history_counts_by_the_name_that_a_file_has_today(shop: Repository) -> None:
    shop.put("shop/warehouse.py", "def shelf(number):\n    return number + 1\n")
    head = shop.commit("Zebras are counted from one")
    git(shop.root, "mv", "shop/warehouse.py", "shop/storehouse.py")
    shop.commit("A better name")
    assert any(head[:7] in reason for reason in shop.reasons("zebras", "shop/storehouse.py"))


# ---- What the index follows
# ------------------------------------------------------------------------------------------------------


def test_an_edit_just_before_the_call_counts(shop: Repository) -> None:
    shop.rank("zebra")
    shop.put("shop/warehouse.py", "def zebra():\n    return 1\n")
    assert shop.rank("zebra")[0].path == "shop/warehouse.py"
    shop.put("shop/warehouse.py", "def shelf():\n    return 1\n")
    assert "defines zebra" not in shop.reasons("zebra", "shop/warehouse.py")


def test_new_renamed_and_deleted_files_are_followed(shop: Repository) -> None:
    shop.rank("zebra")
    shop.put("shop/zebra.py", "def stripes(zebra): ...\n")
    assert shop.paths("zebra")[0] == "shop/zebra.py"
    os.rename(shop.root / "shop/zebra.py", shop.root / "shop/animal.py")
    assert shop.paths("stripes")[0] == "shop/animal.py" and "shop/zebra.py" not in shop.paths("zebra")
    (shop.root / "shop/animal.py").unlink()
    assert "shop/animal.py" not in shop.paths("stripes")
    assert shop.sql("select count(*) from chunk where chunk match 'stripes'") == [(0,)]
    assert shop.sql("select count(*) from name where name = 'stripes'") == [(0,)]


class CountingDict(dict[str, FileFact]):
    """Counts how often something is looked up in it."""

    looked_up = 0

    def get(self, *arguments: Any) -> Any:
        self.looked_up += 1
        return super().get(*arguments)


@pytest.mark.parametrize("change", ["edit", "edit twice", "touch", "edit and undo", "delete", "create", "rename"])
def test_a_small_change_costs_a_look_at_what_changed_alone(shop: Repository, change: str) -> None:
    for number in range(100):
        shop.put(f"more/file{number}.py", f"number = {number}\n")
    for file in shop.facts():  # old, since what has a young time stamp is looked at again
        os.utime(shop.root / file.path, ns=(1, 1))
    kept: dict[str, FileFact] = {}

    def rank() -> int:
        """How many files were compared; those that are as before are the same objects, as the project index has it."""
        files = [kept[file.path] if kept.get(file.path) == file else file for file in shop.facts()]
        kept.update((file.path, file) for file in files)
        project = relevance.project_of(str(shop.root), str(shop.index))
        known = project.facts.known = CountingDict(project.facts.known)
        shop.rank("zebra", files=files)
        return known.looked_up

    rank()
    rank()
    path = shop.root / "more/file7.py"
    if change in ("edit", "edit twice", "edit and undo"):
        path.write_text("class Zebra: ...\n")
    if change in ("edit twice", "edit and undo"):
        rank()
        path.write_text("class Stripe: ...\n" if change == "edit twice" else "number = 7\n")
    elif change == "touch":
        os.utime(path, ns=(2, 2))
    elif change == "delete":
        path.unlink()
    elif change == "create":
        (shop.root / "more/zebra.py").write_text("class Zebra: ...\n")
    elif change == "rename":
        path.rename(path.with_name("animal.py"))
    compared = rank()
    if change not in ("delete", "create", "rename"):
        assert compared <= 2
    project = relevance.project_of(str(shop.root), str(shop.index))
    assert project.index
    anew = plugin("_facts").Facts()
    anew.load(project.index)
    assert project.facts.known == anew.known and project.facts.files == anew.files
    assert {path: file.size for path, file in anew.known.items()} == {file.path: file.size for file in shop.facts()}
    ours, theirs = ({word: sorted(facts.containing(word)) for word in ("file", "animal", "zebra")}
                    for facts in (project.facts, anew))  # fmt: skip
    assert ours == theirs and project.facts.bytes == anew.bytes


@pytest.mark.parametrize("edit", ["one", "two in a tick", "of a file that is new", "of too much", "no change"])
def test_a_ranking_that_was_begun_before_git_had_answered_is_as_one_made_at_once(
    shop: Repository, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    shop.rank("zebra")
    name = "shop/animals.py" if edit == "of a file that is new" else "shop/money.py"
    if edit != "no change":
        shop.put(name, "def zebra(): ...\n")
    if edit == "two in a tick":  # of the disk's clock
        monkeypatch.setattr(index_file, "is_recent", lambda *_: True)
    if edit == "of too much":
        monkeypatch.setattr(relevance, "SMALL_UPDATE", (0, 0, 0))
    edited, times = [file for file in shop.facts() if file.path == name], os.stat(shop.root / name)
    request = shop.request("zebra", files=[])
    relevance.begin_ranking(str(shop.root), str(shop.index), edited, request)
    monkeypatch.undo()
    begun = shop.project().ranking
    assert begun.occurs == (edit in ("one", "two in a tick"))
    if edit == "two in a tick":
        shop.put(name, "def horse(): ...\n")
        os.utime(shop.root / name, ns=(0, times.st_mtime_ns))
        edited = [FileFact(name, times.st_size, times.st_mtime_ns)]
    files = [*(file for file in shop.facts() if file.path != name), *edited]
    found = shop.rank("zebra", files=files, changed=[name])
    assert (shop.project().ranking is begun) == (edit in ("one", "no change"))
    assert all(("uncommitted change" in item.reasons) == (item.path == name) for item in found)
    shop.forget()
    assert shop.rank("zebra", files=files, changed=[name]) == found


@pytest.mark.parametrize("task", ["How zebras are counted", ""])
def test_an_edit_is_indexed_while_git_is_asked_what_it_changed(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path, task: str
) -> None:
    (programs := tmp_path / "programs").mkdir()
    held, path = tmp_path / "held", "/api/context/issue-1/python-specialist"
    script = f'''case " $* " in *" diff "*) while [ -e "{held}" ]; do sleep 0.02; done;; esac\n'''
    (programs / "git").write_text(f'#!/bin/sh\n{script}exec {shutil.which("git")} "$@"\n')
    (programs / "git").chmod(0o755)
    service = make_service(env={"PATH": f"{programs}:{os.environ['PATH']}"})
    client = service.client()
    until(lambda: client.get(path).json()["context"]["metadata"]["index"] == "ready")

    def zebras() -> int:
        with contextlib.closing(sqlite3.connect(service.storage / "index/relevance.sqlite")) as index:
            return int(index.execute("select count(*) from chunk where chunk match 'zebras'").fetchone()[0])

    held.touch()
    (repository / "src/greeting.py").write_text("def count_zebras(): ...\n")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.get, path, task=task)
        try:
            until(zebras)
            assert not asked.done()
        finally:
            held.unlink()
        context = asked.result().json()["context"]
    first, (change,) = context["relevant_files"][0], context["git_context"]["uncommitted_changes"]
    assert (first["path"], change["path"], change["diff"]) == ("src/greeting.py", "src/greeting.py", "+1 -2")
    assert "uncommitted change" in first["reasons"]


@pytest.mark.parametrize("tasks", [["", "", ""], ["zebras", "horses", ""], ["zebras", "zebras", "zebras"]])
def test_agents_that_ask_together_after_an_edit_all_get_it(
    make_service: Callable[..., Service], repository: Path, tasks: list[str]
) -> None:
    service = make_service()
    client, path = service.client(), "/api/context/issue-1/python-specialist"
    until(lambda: client.get(path).json()["context"]["metadata"]["index"] == "ready")

    def lines_of(task: str) -> Any:
        answer = client.get(path, task=task) if task else client.get(path)
        assert answer.status_code == 200, answer.text
        files = {file["path"]: file for file in answer.json()["context"]["relevant_files"]}
        return files["src/greeting.py"]["content"]

    with ThreadPoolExecutor() as pool:
        for number in range(10):
            (repository / "src/greeting.py").write_text(f"def count_zebras(): return {number}\n")
            told = list(pool.map(lines_of, tasks * 2))
            assert [f"return {number}" in content for content in told] == [True] * len(told)
    assert "Traceback" not in service.log


def test_a_touched_file_with_the_same_content_keeps_its_rows(shop: Repository) -> None:
    shop.rank("zebra")
    before = shop.sql("select id, hash, mtime_ns from file where path = ?", b"shop/money.py")
    os.utime(shop.root / "shop/money.py", ns=(1, 1))
    shop.rank("zebra")
    after = shop.sql("select id, hash, mtime_ns from file where path = ?", b"shop/money.py")
    assert after[0][:2] == before[0][:2] and after[0][2] == 1 != before[0][2]


def test_new_commits_are_added_and_those_out_of_reach_dropped(shop: Repository) -> None:
    shop.rank("zebra")
    git(shop.root, "checkout", "-q", "-b", "side")
    shop.put("shop/warehouse.py", "x = 1\n")
    shop.commit("Giraffes on the side")
    assert any("Giraffes" in reason for reason in shop.reasons("giraffes", "shop/warehouse.py"))
    git(shop.root, "checkout", "-q", "main")
    shop.put("shop/warehouse.py", "x = 2\n")
    shop.commit("Hippos on main")
    assert not any("Giraffes" in reason for reason in shop.reasons("giraffes", "shop/warehouse.py"))
    assert sorted(subject for (subject,) in shop.sql("select subject from past")) == [
        "Hippos on main",
        "Initial commit",
    ]
    assert shop.sql("select count(*) from message") == [(2,)]


def test_a_commit_message_cannot_forge_a_commit(shop: Repository) -> None:
    first = shop.head()
    shop.put("shop/money.py", "y = 1\n")
    second = shop.commit(f"Subject \x01{'f' * 40}\x02zebra\x02\x02:1 1 a b M\x02 and more")
    shop.rank("zebra")
    assert {hash for (hash,) in shop.sql("select hash from past")} == {first, second}
    assert shop.sql("select number, paths from past where hash = ?", second) == [(1, b"shop/money.py")]


def test_no_git_at_all_is_no_obstacle(shop: Repository) -> None:
    assert shop.paths("session cookie", head=None)[0] == "shop/session.py"
    assert shop.state()["commits"] == 0


def test_the_index_survives_a_restart(shop: Repository) -> None:
    shop.rank("zebra")
    inode = shop.database.stat().st_ino
    shop.forget()
    assert shop.project().rank(shop.request("session cookie"))[0].path == "shop/session.py", (
        "at once: nothing is to be built"
    )
    assert shop.database.stat().st_ino == inode


# ---- Files that are odd
# ----------------------------------------------------------------------------------------------------------


def test_odd_names_are_names(empty: Repository) -> None:
    odd = [
        "new\nline_zebra.py",
        os.fsdecode(b"zebra-\xff.py"),
        "zebra with blanks.py",
        "zebrä.py",
        "'zebra'\".py",
        ".zebra.py",
    ]
    for name in odd:
        empty.put(name, "def zebra(): ...\n")
    empty.commit("Odd zebras")
    empty.forget()
    assert set(empty.paths("zebra")) == set(odd)
    os.remove(empty.root / odd[1])
    assert set(empty.paths("zebra")) == set(odd) - {odd[1]}


def test_what_is_no_text_is_ranked_by_its_path_only(empty: Repository, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("def zebra(): ...\n")
    empty.put("huge.py", "def zebra(): ...\n" * 30_000)
    empty.put("binary.py", b"zebra\0" * 10)
    empty.put("machine.py", "zebra = '" + "z " * 10_000 + "'\n")
    empty.put("vendor/lib.py", "def zebra(): ...\n")
    empty.put(".env", "zebra=1\n")
    empty.put("plain.py", "def zebra(): ...\n")
    (empty.root / "link.py").symlink_to(tmp_path / "outside.py")
    (empty.root / "folder").symlink_to(tmp_path)
    os.mkfifo(empty.root / "pipe.py")
    paths = empty.paths(
        "zebra", files=[*empty.facts(), FileFact("folder/outside.py", 17, 1), FileFact("gone.py", 17, 1)]
    )
    assert paths[0] == "plain.py" and ".env" not in paths
    assert set(paths) >= {"huge.py", "binary.py", "link.py", "pipe.py"} and "vendor/lib.py" not in paths
    found = empty.sql("select path from file join chunk on file.id = chunk.rowid / 4096 where chunk match 'zebra'")
    assert found == [(b"plain.py",)]


def test_a_file_that_becomes_binary_leaves_the_index(shop: Repository) -> None:
    shop.rank("zebra")
    shop.put("shop/session.py", b"\0\1\2")
    assert shop.paths("SessionStore save_cookie")[0] != "shop/session.py"


# ---- Building, damage, failure
# ---------------------------------------------------------------------------------------------------


def many(repository: Repository, number: int = 300) -> None:
    for n in range(number):
        repository.put(f"pack{n % 7}/module_{n}.py", f"def number_{n}():\n    return 'zebra'\n" * 30)


def test_the_first_build_of_many_files_is_a_child_and_the_answer_meanwhile_not_now(empty: Repository) -> None:
    many(empty)
    head = empty.commit("Many files")
    request = empty.request("number_123")
    assert relevance.rank_files(request) is None
    assert empty.state()["state"] == "building" and head
    child = psutil.Process(empty.project().builder.process.pid)
    child.suspend()
    assert relevance.rank_files(request) is None, "the same builder goes on"
    child.resume()
    until(lambda: not alive([child]))
    assert empty.state()["state"] == "building", "until a ranking has taken up what was built"
    answer = until(lambda: relevance.rank_files(request))
    assert answer[0].path == "pack4/module_123.py" and "defines number_123" in answer[0].reasons
    state = empty.state()
    assert (state["name"], state["state"], state["files"], state["commits"], state["error"]) == (
        "relevance",
        "ready",
        300,
        1,
        None,
    )
    assert state["bytes"] > 100_000 and state["seconds"] > 0
    assert stat.S_IMODE(empty.database.stat().st_mode) == 0o600


def test_a_builder_that_is_killed_leaves_an_index_that_is_completed(empty: Repository) -> None:
    many(empty, 900)
    assert empty.project().rank(empty.request("number_123")) is None
    project = empty.project()
    until(lambda: empty.database.exists() and empty.database.stat().st_size > 0)
    project.builder.process.kill()
    until(project.builder.done.is_set)
    assert empty.project().rank(empty.request("number_123")) is None, "it waits before it tries again"
    assert empty.state()["state"] == "absent" and "builder ended" in empty.state()["error"]
    project._retry_at = 0.0
    assert empty.paths("number_123")[0] == "pack4/module_123.py"
    assert empty.sql("select count(*) from file") == [(900,)] and empty.sql("pragma integrity_check") == [("ok",)]
    assert empty.state()["error"] is None


def test_a_builder_ends_with_its_parent(empty: Repository) -> None:
    request: dict[str, Any] = {"root": str(empty.root), "index": str(empty.database), "head": None, "files": []}
    blocked = sqlite3.connect(empty.database)
    try:
        blocked.execute("begin exclusive")
        command = [sys.executable, "-P", str(PLUGIN), "build", str(cco_sidecar.__file__)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert child.stdin
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        child.stdin.close()
        assert child.wait(20) == 3
    finally:
        blocked.close()


def test_shutdown_ends_the_builder(empty: Repository) -> None:
    many(empty, 900)
    assert empty.project().rank(empty.request("x")) is None
    child = empty.project().builder.process
    empty.forget()
    assert child.poll() is not None


def test_of_two_services_of_a_repository_each_has_its_own_index(
    shop: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = shop.project(), relevance.project_of(str(shop.root), str(tmp_path / "elsewhere"))
    monkeypatch.setattr(relevance, "Project", None)  # none is made where there is one
    assert here is shop.project() is not elsewhere
    relevance.end_project(str(shop.root), str(tmp_path / "elsewhere"))
    relevance.end_project(str(shop.root), str(tmp_path / "elsewhere"))
    assert here is shop.project() and shop.paths("session cookie") and elsewhere.rank(shop.request("session")) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    path.write_bytes(b"this is no database at all\n" * 1000)


def spoil(path: Path) -> None:
    with open(path, "r+b") as file:
        for page in range(2, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(os.urandom(4096))


def age(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("pragma user_version = 999")
    database.close()


def replace(path: Path) -> None:
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("create table something_else (x)")
    database.close()


@pytest.mark.parametrize("harm", [truncate, scribble, spoil, age, replace])
def test_a_harmed_index_is_made_anew(shop: Repository, harm: Callable[[Path], None]) -> None:
    shop.rank("zebra")
    shop.forget()
    for suffix in ("-wal", "-shm"):
        Path(f"{shop.database}{suffix}").unlink(missing_ok=True)
    harm(shop.database)
    first = shop.project().rank(shop.request("session cookie"))
    answer = first if first is not None else shop.rank("session cookie")
    assert answer[0].path == "shop/session.py"
    assert shop.sql("pragma user_version") == [(index_file.SCHEMA_VERSION,)] and shop.sql("pragma integrity_check") == [
        ("ok",)
    ]


def without_chunks(index: Any) -> None:
    index.database.execute("drop table chunk")


def without_symbols(index: Any) -> None:
    index.database.execute("drop table symbol")


def closed(index: Any) -> None:
    index._second.close()


@pytest.mark.parametrize("harm", [without_chunks, without_symbols, closed])
def test_a_search_that_fails_in_one_of_two_threads_is_waited_for_and_the_index_made_anew(
    shop: Repository, harm: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.rank("zebra")
    harm(shop.project().index)
    in_thread, close = index_file.in_thread, index_file.Index.close
    searches, waited_for = list[Any](), list[bool]()

    def seen_in_thread(*call: Any) -> Any:
        searches.append(in_thread(*call))
        return searches[-1]

    def seen_close(index: Any) -> None:
        waited_for.append(searches[-1].done())
        close(index)

    monkeypatch.setattr(index_file, "in_thread", seen_in_thread)
    monkeypatch.setattr(index_file.Index, "close", seen_close)
    assert shop.project().rank(shop.request("session cookie")) is None
    assert len(searches) == 1 and waited_for == [True]
    assert shop.rank("session cookie")[0].path == "shop/session.py"


def test_an_index_that_disappears_is_made_anew(shop: Repository) -> None:
    shop.rank("zebra")
    shop.database.unlink()
    assert shop.paths("session cookie")[0] == "shop/session.py" and shop.database.exists()


def test_an_index_that_stays_locked_is_replaced(shop: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance.Project, "PATIENCE", 0.01)
    shop.rank("zebra")
    blocker = sqlite3.connect(shop.database, isolation_level=None)
    blocker.execute("begin immediate")
    shop.put("shop/new.py", "def zebra(): ...\n")
    shop.put("shop/money.py", "def zebra(): ...\n")
    edited = [file for file in shop.facts() if file.path == "shop/money.py"]
    shop.project().begin(edited, shop.request("zebra", files=[]))  # counts for nothing: no request waits two times
    answers = [shop.project().rank(shop.request("zebra")) for _ in range(4)]
    assert answers[:3] == [None] * 3 and "shop/new.py" in [file.path for file in answers[-1][:2]]
    blocker.close()


def test_a_folder_that_cannot_be_written_is_an_error_in_the_state_and_no_exception(
    shop: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    shop.index.rmdir()
    shop.index.write_text("a file where the folder should be")
    for _ in range(3):
        assert relevance.rank_files(shop.request("zebra")) is None
    assert shop.state()["state"] == "absent" and shop.state()["error"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    shop.index.unlink()
    shop.index.mkdir()
    shop.project()._retry_at = 0.0
    assert shop.paths("session cookie")[0] == "shop/session.py"


def test_a_large_change_is_left_to_the_builder(shop: Repository) -> None:
    shop.rank("zebra")
    many(shop)
    assert shop.project().rank(shop.request("number_7")) is None
    assert shop.paths("number_7")[0] == "pack0/module_7.py"


def test_two_services_share_an_index(shop: Repository) -> None:
    shop.rank("zebra")
    other = relevance.Project(str(shop.root), str(shop.index))
    try:
        shop.put("shop/new.py", "def zebra(): ...\n")
        assert other.rank(shop.request("zebra"))[0].path == "shop/new.py"
        assert shop.rank("zebra")[0].path == "shop/new.py"
        (shop.root / "shop/new.py").unlink()
        assert "shop/new.py" not in shop.paths("zebra")
        assert "shop/new.py" not in [item.path for item in other.rank(shop.request("zebra"))]
        assert shop.sql("select count(*) from file") == [(len(FILES),)]
    finally:
        other.end()


def test_many_threads_and_several_projects_at_once(tmp_path: Path) -> None:
    repositories = []
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        repositories.append(Repository(tmp_path / str(n)))
        repositories[n].write(**FILES)
        repositories[n].put(f"own/zebra_{n}.py", "def zebra(): ...\n")
    try:
        together = threading.Barrier(9)

        def ask(n: int) -> tuple[int, str]:
            together.wait()
            return n % 3, repositories[n % 3].rank("zebra")[0].path

        with ThreadPoolExecutor(9) as pool:
            assert set(pool.map(ask, range(9))) == {(n, f"own/zebra_{n}.py") for n in range(3)}
    finally:
        for repository in repositories:
            repository.forget()


def test_an_empty_project_has_an_answer(empty: Repository) -> None:
    assert empty.rank("anything") == [] and empty.rank() == []


def test_a_task_of_any_text_has_an_answer(shop: Repository) -> None:
    odd = ("\0", "\ud800", '"' * 100, "( ) * ^ : - AND OR NOT NEAR", "a.b.c/../../etc/passwd", "\n\n\n", "日本語の説明")
    for task in (*odd, "ß" * 2000, "a" * 30_000, "x_" * 10_000, "a.b/" * 7_000, "Aa" * 15_000, "a " * 15_000):
        shop.rank(task)


# ---- Precision: files of others only where something speaks for them
# ----------------------------------------------------------------------------------------------------------------

MIXED = {
    "app/orders.py": "def place(order):\n    return order\n", "app/stock.py": "def reserve(item):\n    return item\n",
    "tests/test_orders.py": "def test_place():\n    pass\n", "web/basket.ts": "export const basket = 1\n",
    "web/Menu.vue": "<template>menu</template>\n", "svc/main.go": "package main\nfunc voucher() {}\n",
    "deploy/values.yaml": "replicas: 2\n", "docs/guide.md": "How to order.\n", "docs/conf.py": "project = 'shop'\n",
    "README.md": "A shop.\n", "pyproject.toml": "[project]\n", "styles/site.css": "a { color: red }\n", "data.csv": "1,2\n",
}  # fmt: skip
PYTHON = {"app/orders.py", "app/stock.py", "tests/test_orders.py"}


@pytest.fixture
def mixed(empty: Repository) -> Repository:
    empty.write(**MIXED)
    empty.commit("Initial commit")
    return empty


@pytest.mark.parametrize(
    ("agent", "category", "given"),
    [
        ("python-specialist", "coding", PYTHON), ("go-specialist", "coding", {"svc/main.go"}),
        ("vue-specialist", "coding", {"web/basket.ts", "web/Menu.vue", "styles/site.css"}),
        ("rust-specialist", "coding", set(MIXED)), ("chief-architect", "architect", set(MIXED) - {"data.csv"}),
        ("fullstack-developer", "coding", PYTHON | {"web/basket.ts", "web/Menu.vue", "svc/main.go", "styles/site.css"}),
        ("test-engineer", "qa", PYTHON | {"web/basket.ts", "web/Menu.vue", "svc/main.go"}),
    ],
)  # fmt: skip
def test_without_a_task_only_own_kinds_manifests_and_entry_documents_come(
    mixed: Repository, agent: str, category: str, given: set[str]
) -> None:
    assert set(mixed.paths(agent=agent, category=category)) == given | {"README.md", "pyproject.toml"}


@pytest.mark.parametrize(
    ("task", "more", "also"),
    [
        ("place an order", {}, {"docs/guide.md"}), ("voucher", {}, {"svc/main.go"}), ("replicas", {}, {"deploy/values.yaml"}),
        ("the basket", {}, {"web/basket.ts"}), ("reserve as in web/Menu.vue", {}, {"web/Menu.vue", "web/basket.ts"}),
        ("reserve", {"changed": ["styles/site.css"]}, {"styles/site.css"}),
        ("reserve", {"outputs": [{"decision": "", "files_affected": ["svc/main.go"]}]}, {"svc/main.go"}),
        ("reserve", {"outputs": [{"decision": "The basket counts", "files_affected": []}]}, {"web/basket.ts"}),
        ("zanzibar", {}, {"README.md", "pyproject.toml"}),
    ],
)  # fmt: skip
def test_files_of_others_come_where_something_speaks_for_them(
    mixed: Repository, task: str, more: dict[str, Any], also: set[str]
) -> None:
    assert set(mixed.paths(task, **more)) == PYTHON | also


@pytest.mark.parametrize("number", [1, 5, 60, 400])
def test_the_best_files_are_the_same_where_not_all_are_looked_at(number: int) -> None:
    dice = random.Random(number)
    total = {id: float(dice.randrange(50)) for id in range(300)}  # many have the same
    factors = {id: dice.choice((1.0, 1.0, 0.5, 0.05, None)) for id in total}
    boosts = dict.fromkeys(dice.sample(sorted(total), 10), 30.0)
    asked = set()

    def score_of(id: int) -> float | None:
        asked.add(id)
        return None if factors[id] is None else factors[id] * total[id] + boosts.get(id, 0.0)

    found = ranking.best_of(total, number, score_of) | ranking.scores_of(boosts, score_of)
    looked_at = len(asked)
    every = ranking.scores_of(total, score_of)
    least = sorted(every.values(), reverse=True)[:number][-1]
    assert {id: score for id, score in found.items() if score >= least} == {
        id: score for id, score in every.items() if score >= least
    }
    assert number > 60 or looked_at < len(total)


@pytest.mark.parametrize("watch", [[], ["--no-watch"]], ids=["watched", "not watched"])
@pytest.mark.parametrize("way", ["written", "replaced", "written beside a new file"])
def test_an_edit_that_keeps_size_and_time_shows_in_the_ranking(
    make_service: Callable[..., Service], way: str, watch: list[str]
) -> None:
    service = make_service(*watch)
    client, path = service.client(), service.root / "src/birds.py"

    def written(text: str, place: Path = path) -> Path:
        place.write_text(f"{text} = 1\n")
        os.utime(place, ns=(1, 1_600_000_000_000_000_000))
        return place

    def matching(word: str) -> list[str]:
        context = client.get("/api/context/issue-1/python-specialist", task=word).json()["context"]
        assert context["metadata"]["index"] == "ready"
        return [file["path"] for file in context["relevant_files"] if f"text matches {word}" in file["reasons"]]

    written("heron")
    assert (matching("heron"), matching("zebra"), matching("camel")) == (["src/birds.py"], [], [])
    if way == "replaced":
        written("zebra", service.root / "src/birds.new").replace(path)
    else:
        written("zebra")
    if "beside" in way:
        (service.root / "src/nests.py").write_text("")
    assert (matching("heron"), matching("zebra")) == ([], ["src/birds.py"])
    written("camel")  # once more
    assert (matching("zebra"), matching("camel")) == ([], ["src/birds.py"])


# -- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other heaps")
def test_the_threads_of_a_busy_service_share_two_heaps(make_service: Callable[..., Service]) -> None:
    service = make_service()

    def ask(number: int) -> int:
        return (
            service.client().get(f"/api/context/issue-{number}/python-specialist", task=f"greet {number}").status_code
        )

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(48))) == {200}
    assert threads_heaps(service.info["pid"]) <= 2  # without the plugin heaps a dozen


def threads_heaps(pid: int) -> int:
    """How many heaps glibc has beside the first: each lies in 64 MB of its own, of which the rest cannot be read."""
    rows = [line.split()[:2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    places = [(*(int(end, 16) for end in place.split("-")), may) for place, may in rows]
    size = 64 << 20
    return sum(
        first % size == 0 and last == begin and end == first + size and may == "---p"
        for (first, last, _), (begin, end, may) in itertools.pairwise(places)
    )
