"""Dependencies and versions out of manifests: what the file really says, in any of its forms, and never a secret."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Service, git, plugin, table, until

manifests = plugin("metadata")
ProjectFiles = plugin("_parsing").ProjectFiles
MakeService = Callable[..., Service]
Contents = dict[str, str | bytes]


def write(folder: Path, files: Contents) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("manifest", "content", "kind", "expected"),
    [
        (
            "pyproject.toml",
            '[project]\ndependencies = ["FastAPI[all]>=0.100,<1; python_version > \'3\'", "uvicorn"]\n'
            '[project.optional-dependencies]\ntest = ["pytest~=8.0"]\n[dependency-groups]\ndev = ["ruff", {include-group = "x"}]\n',
            "python",
            {"fastapi": ">=0.100,<1", "uvicorn": "", "pytest": "~=8.0", "ruff": ""},
        ),
        (
            "pyproject.toml",
            '[tool.poetry.dependencies]\npython = "^3.11"\nrequests = "^2"\nnumpy = {version = "1.26"}\n'
            '[tool.poetry.group.dev.dependencies]\nmypy = "*"\n',
            "python",
            {"requests": "^2", "numpy": "1.26", "mypy": "*"},
        ),
        (
            "setup.cfg",
            "[options]\ninstall_requires =\n    click>=8\n    rich\n[options.extras_require]\ntest =\n    pytest\n",
            "python",
            {"click": ">=8", "rich": "", "pytest": ""},
        ),
        (
            "requirements.txt",
            "# comment\n-r other.txt\n--index-url https://example.com\nflask==3.0.0  # web\n\nhttps://example.com/a.whl\nattrs\n",
            "python",
            {"flask": "==3.0.0", "attrs": ""},
        ),
        (
            "package.json",
            '{"dependencies": {"react": "^18"}, "devDependencies": {"@types/node": "20"}, "peerDependencies": {"vue": "3"}}',
            "javascript",
            {"react": "^18", "@types/node": "20", "vue": "3"},
        ),
        (
            "Cargo.toml",
            '[package]\nname = "x"\n[dependencies]\nserde = { version = "1.0", features = ["derive"] }\ntokio = "1"\n'
            '[dev-dependencies]\nlocal = { path = "x" }\n',
            "rust",
            {"serde": "1.0", "tokio": "1", "local": ""},
        ),
        (
            "go.mod",
            "module example.com/me\n\ngo 1.22\n\nrequire github.com/a/b v1.2.3\nrequire (\n\tgolang.org/x/net v0.1.0\n"
            "\tgithub.com/c/d v2.0.0 // indirect\n)\nreplace (\n\tgithub.com/e/f v1.0.0 => ../f\n)\n",
            "go",
            {"github.com/a/b": "v1.2.3", "golang.org/x/net": "v0.1.0"},
        ),
        (
            "pom.xml",
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><dependencies><dependency><groupId>org.x</groupId>'
            "<artifactId>y</artifactId><version>2.1</version></dependency></dependencies></project>",
            "java",
            {"org.x:y": "2.1"},
        ),
        (
            "Gemfile",
            "source 'https://rubygems.org'\ngem 'rails', '~> 7.1'\ngem \"puma\"\n# gem 'no'\n",
            "ruby",
            {"rails": "~> 7.1", "puma": ""},
        ),
        ("DESCRIPTION", "Package: x\nDepends:\n    R (>= 4.1)\nImports: cli (>= 3.6), R6\nVignetteBuilder: no\n", "unknown", {"cli": ">= 3.6", "R6": ""}),
        ("DESCRIPTION", "Imports: a (>= 1),\n    b.c\n    ,d( < 2 ),e f, g (x, R (>= 4)\nSuggests:\n    h\n", "unknown", {"a": ">= 1", "b.c": "", "d": "< 2", "h": ""}),
        ("Project.toml", 'name = "X"\n[deps]\nTables = "bd36"\nPrintf = "de08"\n[compat]\nTables = "1.9"\njulia = "1"\n', "unknown", {"Tables": "1.9", "Printf": ""}),
        ("fpm.toml", '[dependencies]\njson = {git = "https://x/y"}\nblas = "*"\n[dev-dependencies]\ntest = "1"\n', "unknown", {"json": "", "blas": "*", "test": "1"}),
        ("alire.toml", '[[depends-on]]\naaa = "~0.3"\n[[depends-on]]\nspdx = "^26"\n', "unknown", {"aaa": "~0.3", "spdx": "^26"}),
        ("shard.yml", "name: x\ndependencies:\n  crystal-pg:\n    github: a/b\n    version: ~> 0.2\n  db:\n    github: a/db\ntargets:\n  no:\n    main: a\n", "unknown", {"crystal-pg": "~> 0.2", "db": ""}),
        ("elm.json", '{"dependencies": {"direct": {"elm/core": "1.0.4"}, "indirect": {"elm/json": "1"}}, "test-dependencies": {}}', "unknown", {"elm/core": "1.0.4"}),
        ("Chart.yaml", 'name: x\ndependencies:\n  - name: redis\n    version: "17.x"\n    repository: https://a\n  - name: own\n', "unknown", {"redis": "17.x", "own": ""}),
        ("build.zig.zon", '.{ .name = .x, .dependencies = .{ .diffz = .{ .url = "https://a", .hash = "b" }, .@"k-f" = .{ .path = "c" } }, .paths = .{""} }', "unknown", {"diffz": "", "k-f": ""}),
        ("cpanfile", "requires 'Moo', '2.0';\nrequires \"Plack\";\n# requires 'No';\non test => sub {\n  requires 'Test::More' => '>= 1';\n};\n", "unknown", {"Moo": "2.0", "Plack": "", "Test::More": ">= 1"}),
        ("project.clj", '(defproject shop "1.0"\n  :dependencies [[org.clojure/clojure "1.12"]\n [ring "1.15"]])', "unknown", {"org.clojure/clojure": "1.12", "ring": "1.15"}),
        ("deps.edn", '{:deps {org.clojure/clojure {:mvn/version "1.12"}}}', "unknown", {"org.clojure/clojure": "1.12"}),
        ("versions.tf", 'terraform {\n  required_providers {\n    aws = {\n      source  = "hashicorp/aws"\n      version = ">= 6"\n    }\n    own = { source = "acme/own" }\n  }\n}\n', "unknown", {"hashicorp/aws": ">= 6", "acme/own": ""}),
        ("versions.tf", 'a = {\n  version = "~> 5.0"\n  # source = "no"\n  source  = "hashicorp/aws"\n}\nb = {\n  configuration_aliases = [b.c]\n  source = "x/b" }\nc = { source = "x/c", version = "1" }\n', "unknown", {"hashicorp/aws": "~> 5.0", "x/b": "", "x/c": "1"}),
        ("Chart.yaml", "dependencies:\n- name: redis\n  tags:\n    - cache\n    - name: no\n  version: 17.x\n- name: own\n  version: \"\"\n", "unknown", {"redis": "17.x", "own": ""}),
        ("cpanfile", "requires 'A', 1.2;\nrequires 'B' => 0.98;\nrequires 'C', v5.10;\nrequires 'D', '';\nrequires 'E' => undef;\n\n  requires 'F' , \"== 2\";\n", "unknown", {"A": "1.2", "B": "0.98", "C": "v5.10", "D": "", "E": "", "F": "== 2"}),
        ("deps.edn", '{:deps {a.b/c-d  {:mvn/version "1"}\n e {:mvn/version "2"} f {:git/url "x"}}}', "unknown", {"a.b/c-d": "1", "e": "2"}),
        ("rebar.config", '{erl_opts, [debug_info, {d, x}]}.\n{deps, [\n  % {no, "1"},\n  recon, {cowboy, "2.9.0"},\n  {jsx, {git, "https://a/b", {tag, "v3"}}}, {ranch, ".*", {git, "x", {branch, "m"}}}\n]}.\n{profiles, [{test, [{deps, [{meck, "0.9"}]}]}]}.\n', "unknown", {"recon": "", "cowboy": "2.9.0", "jsx": "", "ranch": ".*", "meck": "0.9"}),
        ("MODULE.bazel", 'module(name = "own", version = "1")\nbazel_dep(name = "rules_go", version = "0.41.0")\nbazel_dep(\n    name = "gazelle",\n    version = "0.33",\n)\nbazel_dep(name = "local", dev_dependency = True)\n# bazel_dep(name = "no")\n', "unknown", {"rules_go": "0.41.0", "gazelle": "0.33", "local": ""}),
        ("flake.nix", '{ inputs.nixpkgs.url = "github:NixOS/nixpkgs";\n inputs = {\n  utils.url = "github:a/utils";\n  home = {\n    url = "github:b/home";\n    inputs.nixpkgs.follows = "nixpkgs";\n  };\n  # no.url = "x";\n }; }', "unknown", {"nixpkgs": "github:NixOS/nixpkgs", "utils": "github:a/utils", "home": "github:b/home"}),
        ("requirements.yml", "---\nroles:\n  - src: geerlingguy.java\n    version: '1.9'\n  - name: nginx\n    src: https://a/b\n  - plain.role\ncollections:\n  - name: community.general\n    version: \">=3\"  # new\n", "unknown", {"geerlingguy.java": "1.9", "nginx": "", "plain.role": "", "community.general": ">=3"}),
        ("collections/requirements.yml", "collections:\n- ansible.posix\n", "unknown", {"ansible.posix": ""}),
        ("pyproject.toml", "this is [not toml", "python", {}),
        ("package.json", "[1, 2", "javascript", {}),
        ("pom.xml", "<project>", "java", {}),
        ("go.mod", b"\xff\xfe\x00".decode("latin-1"), "go", {}),
        ("elm.json", "[1]", "unknown", {}), ("Project.toml", "deps = 3", "unknown", {}), ("Chart.yaml", "dependencies: {}", "unknown", {}),
    ],
)  # fmt: skip
def test_dependencies_come_from_the_manifest(
    tmp_path: Path, manifest: str, content: str, kind: str, expected: dict[str, str]
) -> None:
    write(tmp_path, {manifest: content})
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected
    assert plugin("_first_files").project_type(tmp_path, []) == kind


def some(number: int, ending: str, folder: str = "src") -> list[str]:
    return [f"{folder}/{at}{ending}" for at in range(number)]


KINDS_OF_PROJECT: dict[str, tuple[list[str], str]] = {
    "C# and a package.json for its end-to-end tests": (["package.json", *some(9, ".cs"), "pages/a.js", "e2e/a.ts", "e2e/b.ts"], "csharp"),
    "Clojure and a package.json": (["package.json", *some(5, ".clj"), "bench.js"], "clojure"),
    "shell and a package.json": (["package.json", *some(2, ".sh"), *some(9, ".bats", "test")], "shell"),
    "Go and requirements of its documents": (["requirements.txt", "go.mod", *some(5, ".go"), "conf.py"], "go"),
    "Swift and a Gemfile for CocoaPods": (["Gemfile", "Package.swift", *some(9, ".swift"), "fastlane/a.rb"], "swift"),
    "C++ and a Package.swift": (["CMakeLists.txt", "Package.swift", *some(9, ".cpp"), "a.swift"], "cpp"),
    "PHP and assets": (["composer.json", "package.json", *some(9, ".php"), *some(3, ".js")], "php"),
    "Rust that Python installs": (["pyproject.toml", "Cargo.toml", *some(9, ".rs"), *some(5, ".py"), *some(20, ".py", "tests")], "rust"),
    "Python with an extension in Rust": (["pyproject.toml", "Cargo.toml", *some(9, ".py"), *some(5, ".rs")], "python"),
    "Python with an extension in C": (["pyproject.toml", "CMakeLists.txt", *some(9, ".py"), *some(5, ".c")], "python"),
    "C that CMake builds": (["CMakeLists.txt", *some(5, ".c"), *some(2, ".cpp"), *some(9, ".h")], "c"),
    "OCaml with stubs in C": (["dune-project", *some(5, ".ml"), *some(9, ".c")], "ocaml"),
    "Python with many pages": (["pyproject.toml", *some(2, ".py"), *some(30, ".html")], "python"),
    "pages and a Gemfile for Jekyll": (["Gemfile", *some(5, ".html"), *some(2, ".css")], "html"),
    "Terraform and a script": (["requirements.txt", *some(20, ".tf"), "deploy.py"], "terraform"),
    "notebooks": (["requirements.txt", *some(9, ".ipynb"), "a.html"], "python"),
    "TypeScript without a tsconfig in the root": (["package.json", *some(5, ".ts"), *some(4, ".js")], "typescript"),
    "TypeScript with examples": (["tsconfig.json", "package.json", *some(2, ".ts"), *some(5, ".js")], "typescript"),
    "JavaScript whose types are checked": (["tsconfig.json", "package.json", "a.ts", *some(5, ".js")], "javascript"),
    "Java that Gradle builds by Kotlin": (["build.gradle.kts", *some(5, ".java"), "settings.gradle.kts"], "java"),
    "a small project in Java that Gradle builds by Kotlin": (["build.gradle.kts", "settings.gradle.kts", "src/main/java/com/x/Application.java", "src/test/java/com/x/ApplicationTests.java"], "java"),
    "Java in a package that is called test": (["pom.xml", *some(40, ".java", "src/main/java/com/acme/test"), *some(5, ".ts"), "a.js"], "java"),
    "templates of a chart and a script": ([*some(9, ".tpl", "templates"), "a.py"], "python"),
    "Scala that Maven builds": (["pom.xml", *some(5, ".scala"), "a.java"], "scala"),
    "a manifest and no source yet": (["Cargo.toml", "README.md"], "rust"),
    "a manifest and tests": (["setup.py", "pyproject.toml", *some(2, ".py", "tests")], "python"),
    "tests alone": (some(2, ".rs", "tests"), "rust"),
    "hardware with more tests than source": ([*some(5, ".v"), *some(9, ".s", "tests")], "verilog"),
}  # fmt: skip


@table(KINDS_OF_PROJECT)
def test_the_kind_of_a_project_is_what_it_is_written_in(tmp_path: Path, given: list[str], expected: str) -> None:
    write(tmp_path, dict.fromkeys(given, ""))
    assert plugin("_first_files").project_type(tmp_path, given) == expected


@pytest.mark.needs_plugin("results/proposals and metadata go by manifests")
@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["package.json", *some(5, ".cs"), "site.js"], "csharp"),
        (["requirements.txt", "docs/conf.py", *some(5, ".go")], "go"),
        (["Gemfile", *some(5, ".swift"), "fastlane/lane.rb"], "swift"),
    ],
)
def test_a_manifest_for_tools_decides_neither_the_kind_of_a_project_nor_its_coder(
    make_service: MakeService, tmp_path: Path, files: list[str], kind: str
) -> None:
    root = tmp_path / "project"
    write(root, dict.fromkeys(files, "text\n"))
    git(root, "init", "-q")
    git(root, "add", "-A")
    client = make_service(root=root).client()
    context = client.get("/api/context/issue-1/chief-architect").json()["context"]
    assert context["metadata"]["project_type"] == kind
    assert client.store("chief-architect")["next_agents"][0]["agent_type"] == f"{kind}-specialist"


def test_manifests_that_are_called_as_their_packages_are_read_too(tmp_path: Path) -> None:
    cabal = (
        "name: shell\nlibrary\n  if impl(ghc < 8)\n    build-depends:\n      semigroups\n  build-depends:\n    -- no, comment\n"
        "    aeson >= 1.4 && < 2,\n    base\n  exposed-modules: A, B\ntest-suite t\n  build-depends: shell, text ^>= 2\n"
    )
    opam = 'opam-version: "2.0"\ndepends: [\n  "dune" {>= "3.18"}\n  "lwt" {>= "6"}\n  "odoc" {with-doc}\n]\nconflicts: [\n  "no"\n]\n'
    files = {"shell.cabal": cabal, "lwt_ppx.opam": opam, "lwt.opam": "", "deep/b.opam": 'depends: [\n "no"\n]\n'}
    write(tmp_path, files)
    assert manifests.read_dependencies(ProjectFiles(tmp_path, list(files))) == {
        "semigroups": "", "aeson": ">= 1.4 && < 2", "base": "", "text": "^>= 2", "dune": ">= 3.18", "odoc": "",
    }  # fmt: skip


@table({
    "on one line": ('depends: ["ocaml" "dune" {>= "2"}]\nconflicts: [\n "evil" {= "1"}\n]\n', {"ocaml": "", "dune": ">= 2"}),
    "a bracket in quotes": ('depends: [ "a" {build & = "]"} "b" ]\n"c"', {"a": "= ]", "b": ""}),
    "bounds on lines of their own": ('depends: [\n "a" {>= "2" &\n   < "3"}\n "b"\n {with-test & != "4"}\n]\n', {"a": ">= 2 < 3", "b": "!= 4"}),
    "one of several": ('depends: [ ("a" | "b" {= "1"}) ("c" | "d") {>= "2"} ]\n', {"a": "", "b": "= 1", "c": "", "d": ""}),
    "comments": ('depends: [\n "a" # no ] "x"\n (* "y" ] *)\n "b" ("c")\n # "z"\n]\n', {"a": "", "b": "", "c": ""}),
    "no end": ('depends: [\n "a" "b" {>= "', {"a": "", "b": ""}),
    "none": ('build: [\n "a"\n]\n', {}),
})  # fmt: skip
def test_dependencies_of_an_opam_file(tmp_path: Path, given: str, expected: dict[str, str]) -> None:
    write(tmp_path, {"x.opam": given})
    assert manifests.read_dependencies(ProjectFiles(tmp_path, ["x.opam"])) == expected


@table({
    "a blank line": ("test-suite t\n  build-depends:\n      base\n\n    , hspec >= 2\n \n  main-is: a\n", {"base": "", "hspec": ">= 2"}),
    "no deeper line": ("  build-depends: base\n\n  other-modules: A, B\n", {"base": ""}),
    "libraries of one package": ("  build-depends: foo:{a,b} ^>=1, bar:c > 2\n", {"foo": "^>=1", "bar": "> 2"}),
    "carriage returns": ("  Build-Depends: a\r\n\r\n    , b\r\n  main-is: a, c\r\n", {"a": "", "b": ""}),
})  # fmt: skip
def test_dependencies_of_a_cabal_file(tmp_path: Path, given: str, expected: dict[str, str]) -> None:
    write(tmp_path, {"x.cabal": given})
    assert manifests.read_dependencies(ProjectFiles(tmp_path, ["x.cabal"])) == expected


@table({
    "one a line": ('requires "nim >= 1.6.0"\nrequires "chronicles#head"\n# requires "no"\n', {"chronicles": "#head"}),
    "several": ('requires "a >= 1 & < 2",\n  "b", "c ~= 3"\nrequires: "d"\n', {"a": ">= 1 & < 2", "b": "", "c": "~= 3", "d": ""}),
    "an older form, and an address": ('requires("a >= 1, b")\nrequires "https://x.org/u/c#1"', {"a": ">= 1", "b": "", "c": "#1"}),
})  # fmt: skip
def test_dependencies_of_a_nimble_file(tmp_path: Path, given: str, expected: dict[str, str]) -> None:
    write(tmp_path, {"x.nimble": given})
    assert manifests.read_dependencies(ProjectFiles(tmp_path, ["x.nimble"])) == expected


OPENINGS = {
    "x.opam": ("depends: [\n", 'depends: ["a" {'), "x.cabal": ("build-depends:\n", "build-depends: a\n  "),
    "DESCRIPTION": ("Depends:\n", "Depends: a ("), "Project.toml": ("[deps]\n",), "fpm.toml": ("[dependencies]\n",),
    "alire.toml": ("[[depends-on]]\n",), "shard.yml": ("dependencies:\n", "dependencies:\n  a: "),
    "elm.json": ('{"dependencies":',), "Chart.yaml": ("dependencies:\n", "dependencies:\n- "),
    "build.zig.zon": (".a = .{", '.@"'), "cpanfile": ("requires 'a', ", "requires '"), "project.clj": ("[a ", '[a "'),
    "deps.edn": ("a {:mvn/version ", 'a {:mvn/version "'), "versions.tf": ("a = {", 'a = { source = "', "={" + "\n" * 998),
    "x.nimble": ("requires ", 'requires "a", ', 'requires "'), "rebar.config": ("{deps, [", '{deps, [{a, "', "{deps,"),
    "MODULE.bazel": ("bazel_dep(\n", 'bazel_dep(name = "a",\n'), "flake.nix": ("inputs.", "a = {", 'a.url = "', "a.url "),
    "requirements.yml": ("roles:\n- ", "- name: "), "roles/requirements.yml": (), "collections/requirements.yml": (),
}  # fmt: skip
PARTS = ("a", "a b ", "a, ", " ", "\n", "  a\n", "[", "{", "(", "]", '"', "'", '\\"', "<", "(*", "#", ":{", ".", "=", "- ")  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_long_manifests_take_time_in_proportion_to_their_length(tmp_path: Path, name: str) -> None:
    def seconds(read: Callable[[], Any]) -> float:
        started = time.thread_time()
        read()
        return time.thread_time() - started

    def dependencies() -> Any:
        return rare.rare_dependencies(ProjectFiles(tmp_path, [name]))

    rare, size = plugin("_rare_manifests"), 200_000
    assert set(OPENINGS) == {*rare.BY_NAME, *(f"x{end}" for end in rare.BY_ENDING)}
    by_letter = min(seconds(lambda: [letter[0] for letter in re.finditer("(?s).", "a" * size)]) for _ in range(5))
    for part in (*OPENINGS[name], *PARTS):
        for begin in ("", *OPENINGS[name]):
            write(tmp_path, {name: begin + part * (size // len(part))})
            assert any(seconds(dependencies) < 4 * by_letter for _ in range(3)), (begin, part)


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({".python-version": "3.12.1\n"}, "3.12.1"),
        ({"pyproject.toml": '[project]\nrequires-python = ">=3.11,<4"\n'}, "3.11"),
        ({".python-version": "3.13", "pyproject.toml": '[project]\nrequires-python = ">=3.11"\n'}, "3.13"),
        ({"setup.cfg": "[options]\npython_requires = >=3.9\n"}, "3.9"),
        ({"setup.py": "setup(python_requires='>=3.8')\n"}, "3.8"),
        ({"main.py": "x"}, None),
        ({"pyproject.toml": "["}, None),
    ],
)
def test_the_python_version_comes_from_the_project(tmp_path: Path, files: Contents, version: str | None) -> None:
    write(tmp_path, files)
    assert manifests.read_python_version(ProjectFiles(tmp_path)) == version


REQUIREMENTS: dict[str, tuple[Contents, dict[str, str]]] = {
    "UTF-8 with a mark": ({"requirements.txt": "\ufeffflask==3.0\nattrs\n"}, {"flask": "==3.0", "attrs": ""}),
    "UTF-16 of PowerShell": ({"requirements.txt": "flask==3.0\r\nsix\r\n".encode("utf-16")}, {"flask": "==3.0", "six": ""}),
    "big-endian UTF-16 without a mark": ({"requirements.txt": "flask==3.0\nsix\n".encode("utf-16-be")}, {"flask": "==3.0", "six": ""}),
    "UTF-32": ({"requirements.txt": "flask\n".encode("utf-32")}, {"flask": ""}),
    "Latin-1 in a comment": ({"requirements.txt": b"# caf\xe9\nflask\n"}, {"flask": ""}),
    "hashes on continued lines": (
        {"requirements.txt": "a==1 \\\n    --hash=sha256:0a \\\n    --hash=sha256:0b\nb==2 --hash=sha256:0c\n"},
        {"a": "==1", "b": "==2"},
    ),
    "a name and its bound on two lines": ({"requirements.txt": "a\\\n>=1,\\\r\n<2\n"}, {"a": ">=1,<2"}),
    "a comment is never continued": ({"requirements.txt": "# a \\\nb\n"}, {"b": ""}),
    "options of one requirement": ({"requirements.txt": 'a>=1 --global-option="x" --config-settings k=v\n'}, {"a": ">=1"}),
    "blanks, parentheses and extras": (
        {"requirements.txt": "A [x, y] >= 1.0 , != 1.5.* ; python_version < '4'\nb (>=2)\nc===1!2.0+local\n"},
        {"a": ">=1.0,!=1.5.*", "b": ">=2", "c": "===1!2.0+local"},
    ),
    "names that look like options": (
        {"requirements.txt": "typing-extensions>=4\nfoo-e\njson-rpc --hash=sha256:0a\nx-c==1 ; extra == '-r'\n"},
        {"typing-extensions": ">=4", "foo-e": "", "json-rpc": "", "x-c": "==1"},
    ),
    "one line a marker": (
        {"requirements.txt": 'numpy<2; python_version<"3.9"\nnumpy>=2; python_version>="3.9"\n'},
        {"numpy": "<2 || >=2"},
    ),
    "what is no requirement": (
        {"requirements.txt": "PASSWORD=hunter22\n<html>\nthis is prose\n./local\nlib/x.whl\n-e .\n-e ../y\n--pre\n-i https://x\nok\n"},
        {"ok": ""},
    ),
    "URLs": (
        {
            "requirements.txt": "a @ https://host/a.whl ; python_version > '3'\n-e git+https://host/b.git@v1#egg=B&subdirectory=x\n"
            "git+ssh://git@host/c.git#subdirectory=y&egg=c[extra]\nhttps://host/d.zip\n--editable=e@git+https://host/e\n"
        },
        {"a": "@ https://host/a.whl", "b": "@ git+https://host/b.git@v1", "c": "@ git+ssh://host/c.git", "e": "@ git+https://host/e"},
    ),
    "included files, from where the including one lies": (
        {"requirements.txt": "-r requirements/dev.txt\n", "requirements/dev.txt": "--requirement=base.txt\npytest\n-rmore.txt # x\n",
         "requirements/base.txt": "flask>=2\n-r ../requirements.txt\n", "requirements/more.txt": "mypy\n"},
        {"flask": ">=2", "pytest": "", "mypy": ""},
    ),
    "constraints bound what is required": (
        {"requirements.txt": "-c limits.txt\na\nb>=2\n", "limits.txt": "a==1\nb==2\nunused==3\n"},
        {"a": "==1", "b": ">=2"},
    ),
    "variables in bounds": (
        {"requirements.txt": "a==${A_VERSION}\nb>=1,<$MAX\nc (~= {{ cookiecutter.c }}) ; python_version > '3'\nd[x]!=%(d)s\nPASSWORD=${SECRET}\n${NAME}==1\ne<2\n"},
        {"a": "", "b": "", "c": "", "d": "", "e": "<2"},
    ),
    "names that mean one package": (
        {"requirements.txt": "Zope.Interface>=5\n-c limits.txt\nruamel_yaml\nA--_.b\na-b>=2\n-e git+https://host/x#egg=Py_Yaml\n", "limits.txt": "ruamel.yaml==1\n"},
        {"zope-interface": ">=5", "ruamel-yaml": "==1", "a-b": ">=2", "py-yaml": "@ git+https://host/x"},
    ),
    "a file that includes itself, and one that is not there": ({"requirements.txt": "-r ./requirements.txt\n-r no.txt\na\n"}, {"a": ""}),
}  # fmt: skip


@table(REQUIREMENTS)
def test_requirements_are_read_as_pip_reads_them(tmp_path: Path, given: Contents, expected: dict[str, str]) -> None:
    write(tmp_path, given)
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected


PYTHON: dict[str, tuple[Contents, dict[str, str]]] = {
    "Poetry's alternatives": (
        {"pyproject.toml": '[tool.poetry.dependencies]\na = [{version = "<2", python = "<3.9"}, {version = "^2", python = ">=3.9"}]\n'
         'b = ["^1", "^3"]\nc = [{git = "https://host/c"}]\n'},
        {"a": "<2 || ^2", "b": "^1 || ^3", "c": ""},
    ),
    "Poetry's groups, old and new, and python": (
        {"pyproject.toml": '[tool.poetry.dependencies]\npython = "^3.11"\n[tool.poetry.dev-dependencies]\nblack = "*"\n'
         '[tool.poetry.group.docs.dependencies]\npython = ">=3.12"\nSphinx = {version = "^7", optional = true}\n[tool.poetry.group.empty]\noptional = true\n'},
        {"black": "*", "sphinx": "^7"},
    ),
    "groups that include groups": (
        {"pyproject.toml": '[dependency-groups]\ntest = ["pytest>=8", {include-group = "lint"}]\nlint = ["ruff", {include-group = "test"}]\nnone = []\n'},
        {"pytest": ">=8", "ruff": ""},
    ),
    "odd groups beside good ones": (
        {"pyproject.toml": '[project]\ndependencies = ["a>=1", 5, "b"]\noptional-dependencies = ["x"]\n[dependency-groups]\nbad = "pytest"\n'
         'good = ["ruff", {include-group = 5}, ["y"]]\n[tool.poetry]\ngroup = 3\ndependencies = {c = 5, d = true, e = {version = 7}}\n'},
        {"a": ">=1", "b": "", "ruff": "", "c": "", "d": "", "e": ""},
    ),
    "the project's bound before a group's": (
        {"pyproject.toml": '[project]\ndependencies = ["pytest"]\n[dependency-groups]\ntest = ["pytest>=8"]\nlast = ["pytest>=9"]\n'},
        {"pytest": ">=8"},
    ),
    "dependencies in another file": (
        {"pyproject.toml": '[project]\ndynamic = ["dependencies"]\n[tool.setuptools.dynamic]\ndependencies = {file = "reqs/run.in"}\n'
         'optional-dependencies.test = {file = ["reqs/test.in", "no.in"]}\n', "reqs/run.in": "a>=1\n", "reqs/test.in": "b\n"},
        {"a": ">=1", "b": ""},
    ),
    "uv and PDM": (
        {"pyproject.toml": '[tool.uv]\ndev-dependencies = ["a>=1"]\n[tool.pdm.dev-dependencies]\ntest = ["b"]\n'}, {"a": ">=1", "b": ""}
    ),
    "Poetry 2 beside PEP 621": (
        {"pyproject.toml": '[project]\ndependencies = ["Typing_Extensions>=4", "a.b"]\n[tool.poetry.dependencies]\ntyping-extensions = {source = "x"}\nA_B = "^2"\n'},
        {"typing-extensions": ">=4", "a-b": "^2"},
    ),
    "one name in several manifests": (
        {"pyproject.toml": '[project]\ndependencies = ["my.pkg"]\n', "setup.cfg": "[options]\ninstall_requires = My-Pkg>=2\n", "setup.py": "setup(install_requires=['MY_PKG'])",
         "requirements.txt": "my_pkg==3\n"},
        {"my-pkg": ">=2"},
    ),
    "names of one Poetry table": ({"pyproject.toml": '[tool.poetry.dependencies]\nx_y = "^1"\n"x.y" = "^2"\n'}, {"x-y": "^1"}),
    "PDM's editable ones": (
        {"pyproject.toml": '[tool.pdm.dev-dependencies]\na = ["-e file:///${PROJECT_ROOT}/sub#egg=Sub_One", "--editable git+https://u:p@host/x.git@main#subdirectory=y&egg=two", "-e ./here"]\n'
         '[project]\ndependencies = ["git+https://host/z#egg=three[x]"]\n[dependency-groups]\nb = ["-e ../four#egg=four"]\n'},
        {"sub-one": "@ file:///${PROJECT_ROOT}/sub", "two": "@ git+https://host/x.git@main", "three": "@ git+https://host/z", "four": "@ ../four#egg=four"},
    ),
    "setup.py": (
        {"setup.py": "from setuptools import setup\nsetup(name='x', install_requires=['Foo_Bar>=1', \"b; python_version < '4'\"], extras_require={'t': ['c~=2.0'], 'u': 'd\\n  e'})\n"},
        {"foo-bar": ">=1", "b": "", "c": "~=2.0", "d": "", "e": ""},
    ),
    "setup.py that calls the module's, with a text and a tuple": (
        {"setup.py": '\ufeffimport setuptools\nsetuptools.setup(install_requires="""\na>=1\nb\n""", extras_require=dict(t=["no"]) or {}, **{"x": 1})\n'}, {"a": ">=1", "b": ""}
    ),
    "setup.py with variables": (
        {"setup.py": "TESTS = ('t1', 't2')\nREQ = ['a', 'b>=2']\nCHANGED = ['no1']\nCHANGED.append('no2')\nif 1: MORE = ['no3']\n"
         "setup(install_requires=REQ, extras_require={'t': TESTS, 'c': CHANGED, 'm': MORE, 'n': NONE})\n"},
        {"a": "", "b": ">=2", "t1": "", "t2": ""},
    ),
    "setup.py's options in a dictionary": (
        {"setup.py": "options = dict(install_requires=['a'])\noptions2 = {'extras_require': {'t': ['b']}, **options}\nsetup(**options2)\n"}, {"a": "", "b": ""}
    ),
    "setup.py is not run": (
        {"setup.py": "open('ran', 'w')\n'''install_requires=['doc']'''\n# install_requires=['comment']\nsetup(install_requires=['a', f'{x}', read('y'), 5, 'b'] )\nother(install_requires=['no'])\n"},
        {"a": "", "b": ""},
    ),
    "setup.py of Python 2": ({"setup.py": "print 'x'\nsetup(install_requires=['a'])\n", "requirements.txt": "b\n"}, {"b": ""}),
    "setup.py that computes": ({"setup.py": "setup(install_requires=open('r').read().split(), extras_require=extras())\n"}, {}),
    "a mark and CRLF": ({"pyproject.toml": '\ufeff[project]\r\ndependencies = ["a"]\r\n'}, {"a": ""}),
    "setup.cfg names files": (
        {"setup.cfg": "[options]\ninstall_requires = file: a.txt, sub/b.txt\n[options.extras_require]\ntest = file:\n    c.txt\n",
         "a.txt": "# x\na>=1\n", "sub/b.txt": "b\n", "c.txt": "c\n"},
        {"a": ">=1", "b": "", "c": ""},
    ),
    "setup.cfg on one line, doubled, with comments": (
        {"setup.cfg": "[options]\ninstall_requires = a>=1; b\ninstall_requires =\n    a>=2\n    # no\n    c%%d\n    e; python_version<'3'\n[options]\nx = %(y\n"},
        {"a": ">=2", "e": ""},
    ),
    "setup.cfg's extras": (
        {"setup.cfg": "[options.extras_require]\none = a>=1\ntwo =\n    b\n    c[x]~=3.0\n"}, {"a": ">=1", "b": "", "c": "~=3.0"}
    ),
    "an unusable file hides no other": (
        {"pyproject.toml": "[", "setup.cfg": "no section\n", "requirements.txt": "a\n", "package.json": "{", "go.mod": b"\0", "Gemfile": "gem 'b'\n"},
        {"a": "", "b": ""},
    ),
}  # fmt: skip


@table(PYTHON)
def test_dependencies_of_python_projects(tmp_path: Path, given: Contents, expected: dict[str, str]) -> None:
    write(tmp_path, given)
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected
    assert not (tmp_path / "ran").exists()


@table({
    "an upper bound first": (">3.8.1,<4", "3.8"),
    "blanks": ("< 3.13 , >= 3.9", "3.9"),
    "upper bounds only": ("<4,!=3.9.*", None),
    "a series": ("==3.11.*", "3.11"),
    "compatible": ("~=3.10.2", "3.10.2"),
    "the higher of two": (">=3.8,>=3.10,<4", "3.10"),
    "excluded series": (">=3.8,!=3.8.*,!=3.9.*", "3.10"),
    "an excluded major version": (">=3.5,!=3.*", "4"),
    "an excluded version below a series": (">=3.8.1,!=3.8.1.*,!=3.8.2.*", "3.8.3"),
    "a series of the major version alone": (">=3,!=3.*,!=4.0.*", "4.1"),
    "Python 2 as well": ("!=3.0.*, !=3.1.*, >=2.7", "2.7"),
    "the major version alone": (">=3", "3"),
    "a beta": (">=3.15.0b1", "3.15.0b1"),
    "nothing": ("", None),
    "anything": ("*", None),
})  # fmt: skip
def test_the_python_version_is_the_lowest_that_is_allowed(tmp_path: Path, given: str, expected: str | None) -> None:
    for name, content in {
        "pyproject.toml": f'[project]\nrequires-python = "{given}"\n',
        "setup.cfg": f"[options]\n# python_requires = >=2.5\npython_requires = {given}\n",
        "setup.py": f"# python_requires='>=2.5'\nsetup(**{{'python_requires': \"{given}\"}})\n",
    }.items():
        write(tmp_path, {name: content})
        assert manifests.read_python_version(ProjectFiles(tmp_path)) == expected, name
        (tmp_path / name).unlink()


@table({
    "Poetry's caret": ('"^3.9"', "3.9"),
    "Poetry's tilde": ('"~3.12"', "3.12"),
    "either": ('"^3.12 || ~3.9"', "3.9"),
    "blanks for and": ('">=3.10 <3.14"', "3.10"),
    "a list": ('["^3.11", "^3.10"]', "3.10"),
    "either of anything": ('">=3.9 || *"', None),
    "no text": ("3", None),
})  # fmt: skip
def test_poetry_says_the_python_version_too(tmp_path: Path, given: str, expected: str | None) -> None:
    write(tmp_path, {"pyproject.toml": f"[tool.poetry.dependencies]\npython = {given}\n"})
    assert manifests.read_python_version(ProjectFiles(tmp_path)) == expected


@table({
    "PyPy": ("pypy3.9-7.3.11\n", "3.9"),
    "uv": ("cpython@3.13\n", "3.13"),
    "free threads": ("3.14t", "3.14t"),
    "a comment": ("# ours\n\n3.12.1 3.11\n", "3.12.1"),
    "UTF-16": ("3.12\r\n".encode("utf-16"), "3.12"),
    "an environment of a version": ("3.12.1/envs/web", "3.12.1"),
    "an environment": ("web-3.12\n", None),
    "another distribution": ("miniconda3-22.11.1-1\n", None),
    "PyPy as uv writes it": ("pypy@3.11\n", "3.11"),
    "GraalPy with Python's number": ("graalpy3.11-24.1\n", "3.11"),
    "PyPy's own number": ("pypy-7.3.12\n", None),
    "GraalPy's own number": ("graalpy-community-24.0.1\n", None),
    "GraalPy's own number without a dash": ("graalpy24.1\n", None),
    "Jython": ("jython-2.7.3\n", None),
    "MicroPython": ("micropython-1.20.0\n", None),
    "Stackless": ("stackless-3.7.5\n", None),
    "Pyston": ("pyston-2.3.5\n", None),
    "Cinder": ("cinder-3.10-dev\n", None),
    "IronPython": ("ironpython-3.4\n", None),
    "Anaconda": ("anaconda3-2024.02\n", None),
    "Node's number": ("20.11.0\n", None),
    "no number of a Python": ("1.5.2\n", None),
    "a secret": ("ghp_" + "a1B2" * 9 + "\n", None),
    "nothing": ("", None),
})  # fmt: skip
def test_the_pinned_python_is_a_version(tmp_path: Path, given: str | bytes, expected: str | None) -> None:
    write(tmp_path, {".python-version": given})
    assert manifests.read_python_version(ProjectFiles(tmp_path)) == expected


PACKAGES = {
    "null sections": ({"dependencies": None, "devDependencies": {"a": "1"}, "peerDependencies": None}, {"a": "1"}),
    "sections of the wrong type": ({"dependencies": ["a"], "devDependencies": "b", "optionalDependencies": 5, "peerDependencies": {"c": "3"}}, {"c": "3"}),
    "versions of the wrong type": ({"dependencies": {"a": None, "b": 1, "c": ["1"], "d": {"version": "2"}, "e": "5"}}, dict.fromkeys("abcd", "") | {"e": "5"}),
    "optional ones override, peers do not": (
        {"dependencies": {"a": "1", "b": "1"}, "optionalDependencies": {"a": "2"}, "peerDependencies": {"b": ">=1", "c": "*"}},
        {"a": "2", "b": "1", "c": "*"},
    ),
    "a number of thousands of digits elsewhere": ({"version": "HUGE", "dependencies": {"a": "1"}}, {"a": "1"}),
    "half a surrogate pair and control characters": ({"dependencies": {"a\ud800": "1", "b\n": "1", "": "1", "c": "\udfff", "d": "1\t2"}}, {"c": "", "d": ""}),
    "aliases and workspaces": ({"dependencies": {"a": "npm:@scope/b@^1", "c": "workspace:*", "d": "file:../d"}}, {"a": "npm:@scope/b@^1", "c": "workspace:*", "d": "file:../d"}),
    "not an object": ([1, 2], {}),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@table(PACKAGES)
def test_dependencies_of_a_package_json(tmp_path: Path, given: Any, expected: dict[str, str], encoding: str) -> None:
    text = json.dumps(given).replace('"HUGE"', "9" * 5000)
    write(tmp_path, {"package.json": text.encode(encoding)})
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected


POM = '<dependency><groupId>{0}</groupId><artifactId>{1}</artifactId>{2}</dependency>'  # fmt: skip
OTHERS: dict[str, tuple[Contents, dict[str, str]]] = {
    "Cargo's target tables": (
        {"Cargo.toml": "[target.'cfg(unix)'.dependencies]\nnix = \"0.29\"\n[target.x86_64-pc-windows-msvc.dev-dependencies]\nwinapi = {version = \"0.3\"}\n"
         "[target.'cfg(windows)'.build-dependencies]\nwinres = \"1\"\n"},
        {"nix": "0.29", "winapi": "0.3", "winres": "1"},
    ),
    "Cargo's workspaces and renamed crates": (
        {"Cargo.toml": '[dependencies]\nserde = {workspace = true}\nold = {package = "rand", version = "0.7"}\nhere = {path = "here"}\nlog.workspace = true\n'
         '[workspace.dependencies]\nserde = {version = "1.0"}\nlog = "0.4"\nunused = "2"\n'},
        {"serde": "1.0", "rand": "0.7", "here": "", "log": "0.4", "unused": "2"},
    ),
    "Cargo's odd tables": (
        {"Cargo.toml": 'dependencies = 5\ntarget = {a = 1, b = {dependencies = {c = 3, d = ["1"], e = "2"}}}\nworkspace = "x"\n'},
        {"c": "", "d": "1", "e": "2"},
    ),
    "go.mod's blocks": (
        {"go.mod": 'module m\n\ngo 1.22\ntoolchain go1.22.1\nrequire(\n\t"a.com/b" v1.0.0 // indirect\n\tc.com/d/v2 v2.1.0 // used directly\n'
         '\te v0.1.0 //indirect; why\n)\nrequire f.com/g v0.0.0-20200101000000-abcdefabcdef\n'},
        {"c.com/d/v2": "v2.1.0", "f.com/g": "v0.0.0-20200101000000-abcdefabcdef"},
    ),
    "go.mod's other lines": (
        {"go.mod": "module m\nrequire a.com/b v1.0.0\nreplace a.com/b v1.0.0 => ../b\nexclude c.com/d v1.0.0\nretract v1.0.1\ntool e.com/f\n"
         "replace (\n\tg.com/h v1.0.0 => i.com/j v2.0.0\n)\nexclude (\n\tk.com/l v1.0.0\n)\n"},
        {"a.com/b": "v1.0.0"},
    ),
    "go.mod's comments": (
        {"go.mod": "module m\n// require c.com/d v1.0.0\nrequire e.com/f v1.0.0\r\n"}, {"e.com/f": "v1.0.0"}
    ),
    "a pom without a namespace": ({"pom.xml": f"<project><dependencies>{POM.format('g', 'a', '<version>1</version>')}</dependencies></project>"}, {"g:a": "1"}),
    "a pom of another namespace, prefixed": (
        {"pom.xml": '<p:project xmlns:p="http://maven.apache.org/POM/4.1.0"><p:dependencies><p:dependency><p:groupId>g</p:groupId>'
         "<p:artifactId>a</p:artifactId></p:dependency></p:dependencies></p:project>"},
        {"g:a": ""},
    ),
    "what a pom's plugins and management need is no dependency": (
        {"pom.xml": f"<project><build><plugins><plugin><dependencies>{POM.format('p', 'p', '')}</dependencies></plugin></plugins></build>"
         f"<dependencyManagement><dependencies>{POM.format('g', 'a', '<version>7</version>')}{POM.format('x', 'x', '<version>1</version>')}</dependencies>"
         f"</dependencyManagement><dependencies>{POM.format('g', 'a', '')}</dependencies>"
         f"<profiles><profile><dependencies>{POM.format('g', 'b', '')}</dependencies></profile></profiles></project>"},
        {"g:a": "7", "g:b": ""},
    ),
    "a pom's properties": (
        {"pom.xml": '<?xml version="1.0" encoding="ISO-8859-1"?><project><parent><groupId>org.p</groupId><version>9</version></parent>'
         "<properties><v>1.${minor}</v><minor>2</minor><loop>${loop}${loop}</loop></properties><dependencies>"
         + POM.format("${project.groupId}", "a", "<version>${v}</version>") + POM.format("g", "b", "<version>${project.version}</version>")
         + POM.format("g", "c", "<version>${parent.knows}</version>") + POM.format("g", "d", "<version>${loop}</version>") + "</dependencies></project>"},
        {"org.p:a": "1.2", "g:b": "9", "g:c": "", "g:d": ""},
    ),
    "a pom with entities": (
        {"pom.xml": f"<!DOCTYPE project [<!ENTITY a 'b'>]><project><dependencies>{POM.format('&a;', 'c', '')}</dependencies></project>"}, {}
    ),
    "a page in a pom's place": ({"pom.xml": f"<html><dependencies>{POM.format('a', 'c', '')}</dependencies></html>"}, {}),
    "gems with parentheses": ({"Gemfile": "gem('a')\ngem ( \"b\" , '~> 1.0' )\ngem(\"c\", \">= 1\", '< 2', require: false)\n"}, {"a": "", "b": "~> 1.0", "c": ">= 1, < 2"}),
    "gems in groups and blocks": (
        {"Gemfile": "group :test do\n  gem 'a', '1' # why\nend\ngroup(:x) { gem 'b'; gem 'c' }\nplatforms :ruby do gem 'd' end\n=begin\ngem 'no'\n=end\n  # gem 'no'\n"},
        {"a": "1", "b": "", "c": "", "d": ""},
    ),
    "gems on several lines, with options": (
        {"Gemfile": "gem 'a',\n  '~> 3',\n  path: 'x'\ngem 'b', require: 'y'\ngem 'c', :git => 'https://host/c'\ngem 'd', 'x' => 1\ngem 'e', ['>= 1', '< 2']\ngem 'f', \"#{V}\"\n"},
        {"a": "~> 3", "b": "", "c": "", "d": "", "e": ">= 1, < 2", "f": ""},
    ),
    "gems in Ruby's other quotes": (
        {"Gemfile": "gem %q(a), '1'\ngem %Q[b], %q{~> 2.0}, \">= 2.1\"\ngem %<c-d>\ngem(%|e|, require: false)\ngem %q(f g)\n"},
        {"a": "1", "b": "~> 2.0, >= 2.1", "c-d": "", "e": ""},
    ),
    "gems as symbols": ({"Gemfile": "gem :a\ngem(:b_c, '~> 1')\ngem :'d-e', '2', group: :test\ngem :f => 'no'\n"}, {"a": "", "b_c": "~> 1", "d-e": "2"}),
    "nothing after the end of a Gemfile": ({"Gemfile": "gem 'a'\n# __END__\n  __END__\ngem 'b'\r\n__END__\r\ngem 'no'\n=begin\n"}, {"a": "", "b": ""}),
    "the end of a Gemfile in a comment": ({"Gemfile": "=begin\n__END__\ngem 'no'\n=end\ngem 'a'\n__END__\n"}, {"a": ""}),
    "a Gemfile that ends at once": ({"Gemfile": "__END__\ngem 'no'\n"}, {}),
    "Gradle": (
        {"build.gradle": "dependencies {\n  implementation 'g:a:1.0'\n  testImplementation(\"g:b\")\n  api platform('g:c:2')\n  compileOnly group: 'x', name: 'y', version: '3'\n"
         "  implementation project(':z')\n  // implementation 'n:o:1'\n  runtimeOnly \"g:d:$v\"\n  classpath 'p:q:1'\n}\n", "build.gradle.kts": 'dependencies { \n  kapt("g:e:5")\n}'},
        {"g:a": "1.0", "g:b": "", "g:c": "2", "x:y": "3", "g:d": "", "g:e": "5"},
    ),
    "Gradle's block in a line": (
        {"build.gradle": "dependencies { implementation 'g:a:1'; api(\"g:b:2\") ; kapt libs.c }\nif (x) {runtimeOnly 'g:d:$v'}\nx.implementation 'no:no:1'\n"
         "configurations { implementation.extendsFrom(libs.no) }\n", "gradle/libs.versions.toml": '[libraries]\nc = "g:c:3"\nno = "no:no:1"\n'},
        {"g:a": "1", "g:b": "2", "g:c": "3", "g:d": ""},
    ),
    "several dependencies in one call of Gradle": (
        {"build.gradle": "dependencies {\n  implementation 'g:a:1', 'g:b:2@jar',\n    project(':no'), \"g:c:$v\"\n  api platform('g:d:4'), libs.e, [group: 'g', name: 'f', version: '6']\n"
         "  compileOnly([group: 'g', name: 'h', version: '8'], [group: 'g', name: 'i'])\n  runtimeOnly(files('no.jar'), 'g:j:10') { because('x', 'no:no:1') }\n}\n",
         "gradle/libs.versions.toml": '[libraries]\ne = "g:e:5"\n'},
        {"g:a": "1", "g:b": "2", "g:c": "", "g:d": "4", "g:e": "5", "g:f": "6", "g:h": "8", "g:i": "", "g:j": "10"},
    ),
    "Composer": ({"composer.json": '{"require": {"php": ">=8", "ext-json": "*", "a/b": "^1"}, "require-dev": {"c/d": "2"}}'}, {"a/b": "^1", "c/d": "2"}),
}  # fmt: skip


MAVEN = "<project><parent><groupId>g</groupId><artifactId>top</artifactId><version>1</version></parent>{}</project>"
MODULES: dict[str, tuple[Contents, dict[str, str]]] = {
    "Maven's modules, their versions from the parent that names them": (
        {"pom.xml": "<project><groupId>g</groupId><artifactId>top</artifactId><version>1</version><properties><v>3</v></properties><dependencyManagement>"
         f"<dependencies>{POM.format('x', 'managed', '<version>2</version>')}</dependencies></dependencyManagement>"
         "<modules><module>core</module><module>apps/web</module><module>../outside</module></modules></project>",
         "core/pom.xml": MAVEN.format(f"<artifactId>core</artifactId><dependencies>{POM.format('x', 'managed', '')}"
                                      f"{POM.format('x', 'property', '<version>${v}</version>')}</dependencies>"),
         "apps/web/pom.xml": MAVEN.format(f"<artifactId>web</artifactId><dependencies>{POM.format('g', 'core', '<version>1</version>')}</dependencies>"
                                          "<modules><module>api/other.xml</module></modules>"),
         "apps/web/api/other.xml": f"<project><artifactId>api</artifactId><dependencies>{POM.format('y', 'z', '<version>${v}</version>')}</dependencies></project>",
         "samples/pom.xml": MAVEN.format(f"<dependencies>{POM.format('no', 'module', '')}</dependencies>")},
        {"x:managed": "2", "x:property": "3", "y:z": ""},
    ),
    "Maven's modules that name one another": (
        {"pom.xml": MAVEN.format("<artifactId>a</artifactId><modules><module>b</module></modules>"),
         "b/pom.xml": MAVEN.format("<artifactId>b</artifactId><modules><module>..</module><module>../b</module></modules>"
                                   f"<dependencies>{POM.format('x', 'y', '')}</dependencies>")},
        {"x:y": ""},
    ),
    "a .NET solution with central versions": (
        {"App.sln": "", "Directory.Packages.props": '<Project><ItemGroup><PackageVersion Include="Central" Version="1.2" /><PackageVersion Include="Unused" '
         'Version="9" /><GlobalPackageReference Include="Everywhere" Version="4" /></ItemGroup></Project>',
         "Directory.Build.props": '<Project><ItemGroup><PackageReference Include="Shared" Version="$(V)" /></ItemGroup></Project>',
         "src/App/App.csproj": '\ufeff<Project Sdk="Microsoft.NET.Sdk"><ItemGroup><PackageReference Include="Central" /><PackageReference Include="Own">'
         '<Version>[2,3)</Version></PackageReference><PackageReference Update="Central" Version="7" /><ProjectReference Include="../Lib/Lib.csproj" />'
         "</ItemGroup></Project>",
         "src/Lib/Lib.fsproj": '<Project><ItemGroup><PackageReference Include="Central" VersionOverride="1.3" /></ItemGroup></Project>',
         "src/Old/packages.config": '<packages><package id="Old" version="5.0" targetFramework="net48" /></packages>'},
        {"Central": "1.3", "Everywhere": "4", "Old": "5.0", "Own": "[2,3)", "Shared": ""},
    ),
    "an old .NET project with a namespace": (
        {"App.vbproj": '<Project xmlns="http://schemas.microsoft.com/developer/msbuild/2003"><ItemGroup><PackageReference Include="A;B" Version="1" />'
         "</ItemGroup></Project>"},
        {"A": "1", "B": "1"},
    ),
    "a .NET sample deep in another program": (
        {"requirements.txt": "flask", "tests/data/x/App.csproj": '<Project><ItemGroup><PackageReference Include="A" /></ItemGroup></Project>'}, {"flask": ""},
    ),
    "npm's workspaces": (
        {"package.json": '{"name": "top", "workspaces": ["./packages/*", "site/", "!packages/old"], "devDependencies": {"eslint": "9", "core": "workspace:*"}}',
         "packages/core/package.json": '{"name": "core", "dependencies": {"zod": "3"}}', "packages/old/package.json": '{"dependencies": {"no": "1"}}',
         "packages/core/fixture/package.json": '{"dependencies": {"no": "2"}}', "site/package.json": '{"dependencies": {"core": "1", "vue": "3"}}'},
        {"eslint": "9", "zod": "3", "vue": "3"},
    ),
    "what Cargo excludes": (
        {"Cargo.toml": '[workspace]\nmembers = ["crates/*", "deep/**", "old/kept"]\nexclude = ["crates/x", "./deep/a", "old", 5]\n',
         "crates/x/Cargo.toml": '[dependencies]\nno = "1"\n', "crates/y/Cargo.toml": '[dependencies]\ny = "1"\n',
         "deep/a/b/c/Cargo.toml": '[dependencies]\nno = "1"\n', "deep/ab/Cargo.toml": '[dependencies]\nab = "1"\n',
         "old/kept/Cargo.toml": '[dependencies]\nkept = "1"\n'},
        {"y": "1", "ab": "1", "kept": "1"},
    ),
    "what melos ignores": (
        {"pubspec.yaml": "name: top\n", "melos.yaml": "packages:\n  - packages/**\nignore: ['packages/**/example']\n",
         "packages/a/pubspec.yaml": "dependencies:\n  http: ^1.2.0\n", "packages/a/example/pubspec.yaml": "dependencies:\n  no: ^1.0.0\n"},
        {"http": "^1.2.0"},
    ),
    "what pnpm takes out": (
        {"package.json": "{}", "pnpm-workspace.yaml": "packages: ['p/*', '!p/no']\n",
         "p/a/package.json": '{"dependencies": {"a": "1"}}', "p/no/package.json": '{"dependencies": {"no": "1"}}'},
        {"a": "1"},
    ),
    "pnpm's workspaces": (
        {"package.json": '{"name": "top", "dependencies": {"a": "1"}}', "b/c/d/package.json": '{"dependencies": {"e": "2"}}', "f/package.json": "[",
         "pnpm-workspace.yaml": "packages:  # all\n  - 'b/**' # deep\n  # - g\n  - f\n\ncatalog:\n  - h\n", "h/package.json": '{"dependencies": {"no": "1"}}'},
        {"a": "1", "e": "2"},
    ),
    "Cargo's members": (
        {"Cargo.toml": '[workspace]\nmembers = ["crates/*"]\n[workspace.dependencies]\nserde = "1"\n',
         "crates/a/Cargo.toml": '[package]\nname = "a"\n[dependencies]\nserde.workspace = true\ntokio = "1.2"\n',
         "crates/b/Cargo.toml": '[package]\nname = "b"\n[dependencies]\na = { path = "../a" }\n', "else/Cargo.toml": '[dependencies]\nno = "1"\n'},
        {"serde": "1", "tokio": "1.2"},
    ),
    "mix": (
        {"mix.exs": 'defmodule A.MixProject do\n  def project do\n    [app: :a, dialyzer: [plt: {:no_warn, "x"}], deps: deps()]\n  end\n\n  defp deps do\n    [\n'
         '      {:phoenix, "~> 1.7"}, # {:no, "1"}\n      {:git_diff,\n       github: "o/git_diff", ref: "d4"},\n      {:core, in_umbrella: true},\n'
         '      {:hex_core, ">= 0.1.0", only: :test}\n    ]\n  end\n\n  defp aliases, do: [{:no, "2"}]\nend\n'},
        {"phoenix": "~> 1.7", "git_diff": "", "hex_core": ">= 0.1.0"},
    ),
    "an umbrella of mix": (
        {"mix.exs": 'def project, do: [apps_path: "apps", deps: deps()]\ndefp deps, do: [{:a, "1"}]\n',
         "apps/web/mix.exs": 'defp deps do\n  [{:b, "2"}, {:c, [path: "../c"]}]\nend\n', "web/mix.exs": 'defp deps, do: [{:no, "1"}]\n'},
        {"a": "1", "b": "2", "c": ""},
    ),
    "Gradle's projects and its version catalog": (
        {"settings.gradle.kts": 'rootProject.name = "top"\n// include(":no")\n/* include(":no") */\nincludeBuild("no")\ninclude(":app",\n    ":libs:core")\ninclude(":moved")\n'
         'project(":moved").projectDir = file("else/where")\n',
         "gradle/libs.versions.toml": '[versions]\nokhttp = "4.12"\nrich = {strictly = "[1,2)", prefer = "1.5"}\n[libraries]\nokhttp = {module = "com.squareup:okhttp", version.ref = "okhttp"}\n'
         'junit-api = "org.junit:api:5.10"\nrich_one = {group = "a", name = "rich", version.ref = "rich"}\nunused = "no:no:1"\nodd = 5\n[bundles]\ntesting = ["junit-api", "odd"]\n',
         "app/build.gradle.kts": 'exclude("**/*.kt")\ndependencies {\n  implementation(project(":libs:core"))\n  implementation(libs.okhttp)\n  testImplementation(libs.bundles.testing)\n}\n',
         "libs/core/build.gradle": "dependencies {\n  api libs.rich.one\n  api libs.nobody.knows\n  implementation 'x:y:2'\n}\n",
         "else/where/build.gradle": "dependencies { \n runtimeOnly platform(libs.junit.api.get())\n kapt 'k:apt:1' }", "no/build.gradle": "dependencies {\n api 'no:no:1'\n}"},
        {"com.squareup:okhttp": "4.12", "org.junit:api": "5.10", "a:rich": "[1,2)", "x:y": "2", "k:apt": "1"},
    ),
    "Gradle's comments, statements in one line and odd bundles": (
        {"settings.gradle": "include('a', // why\n  'b')\ninclude 'c'; include 'd' // include 'no'\n",
         "gradle/libs.versions.toml": '[libraries]\nx = "g:x:1"\n[bundles]\nodd = 5\ngood = ["x", 5]\n', "a/build.gradle": "dependencies {\n  api libs.bundles.good\n}",
         "b/build.gradle": 'maven { url "https://h/x" }\ndependencies {\n  api "g:b:1"\n}', "c/build.gradle": "dependencies {\n  api libs.bundles.odd\n  api 'g:c:1'\n}",
         "d/build.gradle": 'dependencies {\n  api "g:d:1" // "\n  /* "\n  api "no:no:1"\n*/}', "no/build.gradle": "dependencies {\n  api 'no:no:1'\n}"},
        {"g:x": "1", "g:b": "1", "g:c": "1", "g:d": "1"},
    ),
    "Gradle's other catalogs": (
        {"settings.gradle.kts": 'include("app")\ndependencyResolutionManagement {\n  versionCatalogs {\n    create("tools") {\n      from(files("gradle/tools.toml"))\n    }\n'
         '    // create("no") { from(files("gradle/tools.toml")) }\n    named {from(rootProject.layout.files(\'./named.toml\'))}\n    create("gone") { from(files("gone.toml")) }\n  }\n}\n',
         "gradle/libs.versions.toml": '[libraries]\nx = "g:x:1"\n', "gradle/tools.toml": '[libraries]\nlint-api = "g:lint:2"\n', "named.toml": '[libraries]\nn = "g:n:3"\n',
         "app/build.gradle.kts": "dependencies {\n  api(libs.x)\n  api(tools.lint.api)\n  api(platform(named.n))\n  api(gone.x)\n  api(no.lint.api)\n}\n"},
        {"g:x": "1", "g:lint": "2", "g:n": "3"},
    ),
    "Groovy's settings of Gradle": (
        {"settings.gradle": "include ':a', \"b\"\ninclude 'c'; project(':c').projectDir = new File(settingsDir, '../outside')\n",
         "build.gradle": "allprojects { }\n", "a/build.gradle": "dependencies {\n  api 'g:a:1'\n}", "b/build.gradle": "dependencies {\n  api 'g:b:$v'\n}"},
        {"g:a": "1", "g:b": ""},
    ),
    "Go's workspace": (
        {"go.work": "go 1.22\n\nuse (\n\t./api // why\n\t\"./tools/gen\"\n)\nuse .\nuse ../outside\n",
         "go.mod": "module example.com/top\n\nrequire (\n\texample.com/api v0.0.0\n\ta.com/b v1.0.0\n)\n",
         "api/go.mod": "module example.com/api\nrequire c.com/d v1.2.0\n", "tools/gen/go.mod": 'module "example.com/gen"\nrequire e.com/f v1.3.0 // indirect\nrequire g.com/h v2.0.0\n',
         "else/go.mod": "module no\nrequire no.com/no v1.0.0\n"},
        {"a.com/b": "v1.0.0", "c.com/d": "v1.2.0", "g.com/h": "v2.0.0"},
    ),
    "Go's workspace without a module in its root": (
        {"go.work": "use ./api\n", "api/go.mod": "module example.com/api\nrequire c.com/d v1.2.0\n"}, {"c.com/d": "v1.2.0"},
    ),
    "packages without a name, and what they need": (
        {"package.json": '{"dependencies": {"None": "1", "null": "2"}}', "Cargo.toml": '[package]\nname = 5\n[dependencies]\nNone = "1"\n5 = "2"\n',
         "pubspec.yaml": "dependencies:\n  None: 1.0.0\n"},
        {"None": "1", "null": "2", "5": "2"},
    ),
    "pub's workspace": (
        {"pubspec.yaml": "name: top\nenvironment:\n  sdk: ^3.6.0\nworkspace:\n  - packages/core\n  - packages/ui # why\ndev_dependencies:\n  lints: any\n",
         "packages/core/pubspec.yaml": "name: core\ndependencies:\n  # the web\n  http: ^1.2.0 # why\n  path: '>=1.8.0 <2.0.0'\n  own:\n    hosted: https://host.example\n    version: ^2.0.0\n",
         "packages/ui/pubspec.yaml": "name: ui\ndependencies:\n  core: any\n  flutter:\n    sdk: flutter\n  side: {path: ../side}\n", "packages/no/pubspec.yaml": "dependencies:\n  no: 1.0.0\n"},
        {"lints": "any", "http": "^1.2.0", "path": ">=1.8.0 <2.0.0", "own": "^2.0.0", "flutter": "", "side": ""},
    ),
    "pub's workspace in brackets, names in quotes": (
        {"pubspec.yaml": "name: top\nworkspace: [core, 'ui']\n", "core/pubspec.yaml": "name: 'core'\ndependencies:\n  http: ^1.2.0\n",
         "ui/pubspec.yaml": "name: \"ui\"\ndependencies:\n  core: any\n", "no/pubspec.yaml": "dependencies:\n  no: 1.0.0\n"},
        {"http": "^1.2.0"},
    ),
    "dependencies of a pubspec in braces": (
        {"pubspec.yaml": "name: top\nworkspace: [core]\ndependencies: {http: ^1.2.0, path: '>=1.8.0 <2.0.0', # no: 1.0.0\n  own: {hosted: {name: own, url: https://host.example},\n    version: \"^2.0.0\"}, core: any}\nname_of: {no: 1.0.0}\n",
         "core/pubspec.yaml": "name: core\ndependencies:\n  far: {hosted: https://host.example, version: ^3.0.0} # why\n  near: {version: '4.0.0', path: ../near}\n  side: {path: ../side}\ndev_dependencies: {}\n"},
        {"http": "^1.2.0", "path": ">=1.8.0 <2.0.0", "own": "^2.0.0", "far": "^3.0.0", "near": "4.0.0", "side": ""},
    ),
    "melos' packages": (
        {"pubspec.yaml": "name: top\ndependencies:\n  melos: ^6.0.0\n", "melos.yaml": "name: top\npackages:\n  - 'packages/**'\n",
         "packages/a/b/pubspec.yaml": "name: b\ndependencies:\n  http: ^1.2.0\n"},
        {"melos": "^6.0.0", "http": "^1.2.0"},
    ),
    "sbt": (
        {"build.sbt": 'resolvers += "x" at "https://h/x"; libraryDependencies += "u.v" % "w" % "1"\nlibraryDependencies += "org.typelevel" %% "cats-core" % "2.10.0"\nlibraryDependencies ++= Seq(\n  "org.scalatest" %%% "scalatest" % "3.2" % Test, // "no" % "no" % "1"\n'
         '  "a.b" % "c" % version\n)\n/* "no" % "no" % "2" */\n', "project/Dependencies.scala": 'val x = "d.e" %% "f" % "4"\n', "project/plugins.sbt": 'addSbtPlugin("no" % "no" % "1")\n'},
        {"org.typelevel:cats-core": "2.10.0", "org.scalatest:scalatest": "3.2", "u.v:w": "1", "a.b:c": "", "d.e:f": "4"},
    ),
    "the projects of a build.sbt": (
        {"build.sbt": 'lazy val core = project\nlazy val `web-ui` = (project in file("ui")).dependsOn(core)\nval `to-ols` : Project = ( project)\nlazy val root = project.in(file("."))\n'
         'lazy val out = project.in(file("../out"))\n// lazy val no = project\nval other = projects\nlibraryDependencies += "a" % "top" % "1"\n',
         "core/build.sbt": 'libraryDependencies += "a" %% "core" % "2"\n', "ui/build.sbt": 'libraryDependencies += "a" %%% "ui" % v\n',
         "to-ols/build.sbt": 'libraryDependencies += "a" % "tools" % "3"\n', "no/build.sbt": '"no" % "no" % "1"\n', "other/build.sbt": '"no" % "no" % "2"\n'},
        {"a:top": "1", "a:core": "2", "a:ui": "", "a:tools": "3"},
    ),
    "Swift's packages": (
        {"Package.swift": 'let package = Package(dependencies: [\n  .package(url: "https://user:word@host.example/vapor/vapor.git", from: "4.0.0"),\n  .package(\n    name: "X",\n'
         '    url: "git@host.example:o/swift-nio",\n    .upToNextMinor(from: "2.0.0")),\n  .package(url: "https://h/a/range", "1.0.0"..<"2.0.0"),\n  .package(url: "https://h/a/b", branch: "main"),\n'
         '  .package(url: "https://h/a/old", .exact("1.2.3")),\n  .package(path: "../local"),\n  // .package(url: "https://h/a/no", from: "1.0.0"),\n])\n'},
        {"vapor": "from: 4.0.0", "swift-nio": "from: 2.0.0", "range": "1.0.0..<2.0.0", "b": "branch: main", "old": "exact: 1.2.3"},
    ),
}  # fmt: skip


@table(MODULES)
def test_dependencies_of_a_project_s_modules(tmp_path: Path, given: Contents, expected: dict[str, str]) -> None:
    write(tmp_path, given)
    assert manifests.read_dependencies(ProjectFiles(tmp_path, given)) == expected


@table(MODULES)
def test_a_manifest_that_others_name_counts_once(tmp_path: Path, given: Contents, expected: dict[str, str]) -> None:
    write(tmp_path, given)
    size = sum((tmp_path / name).stat().st_size for name in given)
    files = ProjectFiles(tmp_path, given, size + 1)
    assert manifests.read_dependencies(files) == expected and files.parsed(next(iter(given)), lambda file: True)


def test_a_module_that_cannot_be_read_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = "<modules><module>bad</module><module>ignored</module><module>../outside</module><module>good</module></modules>"
    good = f"<project><dependencies>{POM.format('x', 'y', '')}</dependencies></project>"
    write(tmp_path / "outside", {"pom.xml": good.replace("<groupId>x", "<groupId>no")})
    root = tmp_path / "root"
    contents: Contents = {"pom.xml": f"<project>{modules}</project>", "bad/pom.xml": "<project>", "good/pom.xml": good}
    write(root, contents | {"ignored/pom.xml": good.replace("<groupId>x", "<groupId>no")})
    with caplog.at_level(logging.WARNING, "cco"):
        assert manifests.read_dependencies(ProjectFiles(root, contents)) == {"x:y": ""}
    assert sorted(record.getMessage().split(": ")[1] for record in caplog.records) == ["left out"] * 3


@pytest.mark.parametrize("name", ["pom.xml", "package.json", "App.csproj"])
def test_manifests_of_modules_are_read_up_to_a_size_that_all_have_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    numbers = range(10)
    modules = "".join(f"<module>m{number}</module>" for number in numbers)
    contents: Contents = {
        "pom.xml": f"<project><modules>{modules}</modules></project>",
        "package.json": '{"workspaces": ["*"]}',
    }
    contents = {name: contents.get(name, "<Project/>")}
    for number in numbers:
        dependency = POM.format("x", f"y{number}", "")
        contents[f"m{number}/{name}"] = {
            "pom.xml": f"<project><dependencies>{dependency}</dependencies></project>" + " " * 1000,
            "package.json": json.dumps({"dependencies": {f"y{number}": "1"}}) + " " * 1000,
            "App.csproj": f'<Project><PackageReference Include="y{number}"/></Project>' + " " * 1000,
        }[name]
    contents[".python-version"] = "3.12"
    write(tmp_path, contents)
    monkeypatch.setattr(manifests, "ALL_MANIFESTS", 5_000)
    project = SimpleNamespace(root=str(tmp_path), digest=name, files=[SimpleNamespace(path=path) for path in contents])
    with caplog.at_level(logging.WARNING, "cco"):
        facts = manifests.read_manifests(project)
    found = facts["dependencies"]
    assert facts["python_version"] == "3.12"
    assert [each[-1] for each in found] == ["0", "1", "2", "3", "4"][: len(found)] and len(found) in (4, 5)
    assert len(caplog.records) == 1 and "further manifests" in caplog.text


@pytest.mark.parametrize("given", [files for files, _ in (MODULES | OTHERS).values()], ids=[*MODULES, *OTHERS])
def test_manifests_are_parsed_again_only_where_one_of_them_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Contents
) -> None:
    parsed, read_dependencies = list[None](), manifests.read_dependencies

    def read(files: Any) -> Any:
        parsed.append(None)
        return read_dependencies(files)

    def parses(*more: str) -> bool:
        before, files = len(parsed), {*(name for name in given if (tmp_path / name).exists()), *more}
        found = manifests.facts_of(ProjectFiles(tmp_path, files))["dependency_versions"]
        assert found == read_dependencies(ProjectFiles(tmp_path, files))
        return len(parsed) > before

    monkeypatch.setattr(manifests, "read_dependencies", read)
    write(tmp_path, given | {"source.py": "x = 1\n"})
    assert parses()
    until(lambda: not parses())  # until then a change could have the same time
    assert not parses("source.py")
    changed = 0
    for name, content in given.items():
        write(tmp_path, {name: ""})
        changed += parses()
        (tmp_path / name).unlink()
        changed += parses()
        write(tmp_path, {name: content})
        until(lambda: not parses())
    assert changed >= 2


@table(MODULES)
def test_of_a_project_s_modules_only_the_changed_ones_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Contents, expected: dict[str, str]
) -> None:
    read, read_whole = list[str](), ProjectFiles._read

    def noted(files: Any, name: str, limit: int) -> bytes | None:
        if (tmp_path / name).parent != tmp_path and (tmp_path / name).exists():
            read.append(name)
        content: bytes | None = read_whole(files, name, limit)
        return content

    def dependencies() -> dict[str, str]:
        found: dict[str, str] = manifests.facts_of(ProjectFiles(tmp_path, given))["dependency_versions"]
        return found

    monkeypatch.setattr(ProjectFiles, "_read", noted)
    monkeypatch.setattr(plugin("_parsing"), "is_recent", lambda moment, now: False)
    write(tmp_path, given)
    assert dependencies() == manifests.presentable(expected)
    for name in list(dict.fromkeys(read)):
        read.clear()
        write(tmp_path, {name: bytes((tmp_path / name).read_bytes() + b"\n")})
        assert dependencies() == manifests.presentable(expected)
        inherits = set(read) - {name}
        assert name in read and all(name.endswith("pom.xml") and each.startswith(name[:-7]) for each in inherits)


@pytest.mark.parametrize("is_young", [True, False])
def test_a_manifest_that_was_changed_this_moment_is_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_young: bool
) -> None:
    parsing, parsed = plugin("_parsing"), list[None]()
    facts = parsing.while_unchanged(lambda files: {"found": files.parsed("a", lambda _: parsed.append(None))})
    write(tmp_path, {"a": "x"})
    monkeypatch.setattr(parsing, "is_recent", lambda moment, now: is_young)
    for _ in range(3):
        facts(ProjectFiles(tmp_path))
    assert len(parsed) == (3 if is_young else 1)


def test_a_manifest_that_could_not_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing = plugin("_parsing")
    facts = parsing.while_unchanged(lambda files: {"found": files.parsed("a", lambda file: file.text())})
    write(tmp_path, {"a": "x"})
    monkeypatch.setattr(parsing, "is_recent", lambda moment, now: False)
    with monkeypatch.context() as failing:
        failing.setattr(ProjectFiles, "_check", lambda *_: os.read(-1, 1))
        assert facts(ProjectFiles(tmp_path)) == {"found": None}
    assert facts(ProjectFiles(tmp_path)) == {"found": "x"}


def test_what_one_project_may_read_is_not_told_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing = plugin("_parsing")
    facts = parsing.while_unchanged(lambda files: {"found": files.parsed("a", lambda file: file.text())})
    monkeypatch.setattr(parsing, "is_recent", lambda moment, now: False)
    write(tmp_path, {"one/a": "x", "two/b": ""})
    (tmp_path / "two/a").symlink_to(tmp_path / "one/a")
    assert facts(ProjectFiles(tmp_path / "one")) == {"found": "x"}
    assert facts(ProjectFiles(tmp_path / "two")) == {"found": None}, "it lies outside"


@table(OTHERS)
def test_dependencies_of_other_languages(tmp_path: Path, given: Contents, expected: dict[str, str]) -> None:
    write(tmp_path, given)
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected


# -- what never gets out


SECRET = "Zk9wQ7rT4xLm"


@pytest.mark.parametrize(
    "userinfo", [f"user:{SECRET}", SECRET, f"user:p@{SECRET}", f"user:p/{SECRET}", f"user:p w{SECRET}", f":{SECRET}", f"u:{SECRET}?x#y", f"oauth2:{SECRET}%40"]
)  # fmt: skip
def test_credentials_in_urls_of_dependencies_stay_out(tmp_path: Path, userinfo: str) -> None:
    url = f"https://{userinfo}@host.example/a/b.git"
    write(
        tmp_path,
        {
            "requirements.txt": f"--index-url {url}\nr1 @ {url}\n-e git+{url}@v1#egg=r2\nr3@{url} ; python_version > '3'\n",
            "pyproject.toml": f'[project]\ndependencies = ["p1 @ {url}"]\n[tool.poetry.dependencies]\np2 = "{url}"\np3 = {{git = "{url}"}}\n',
            "setup.cfg": f"[options]\ninstall_requires =\n    s1 @ {url}\n",
            "package.json": json.dumps({"dependencies": {"n1": f"git+{url}", "n2": url, "n3": f"{url}#semver:^1"}}),
            "Cargo.toml": f'[dependencies]\nc1 = {{git = "{url}"}}\nc2 = "{url}"\n',
            "Gemfile": f"gem 'g1', git: '{url}'\ngem 'g2', '{url}'\n",
        },
    )
    found = manifests.read_dependencies(ProjectFiles(tmp_path))
    assert SECRET not in str(found)
    assert {"r1", "r2", "p1", "p2", "p3", "s1", "n1", "n2", "n3", "c1", "c2", "g1", "g2"} <= set(found)
    assert found["n1"] == "git+https://host.example/a/b.git"


@pytest.mark.parametrize(
    ("url", "left"),
    [
        (f"https://host/a.tgz?token={SECRET}", "https://host/a.tgz"),
        (f"https://host/a.tgz?x=1&sig={SECRET}#v1", "https://host/a.tgz#v1"),
        (f"https://host/a.tgz#access_token={SECRET}", "https://host/a.tgz"),
        ("git+https://host:8443/a.git@feature/x", "git+https://host:8443/a.git@feature/x"),
        ("https://host:8080/@scope/a/-/a-1.tgz", "https://host:8080/@scope/a/-/a-1.tgz"),
        ("git+ssh://git@host/a.git#semver:^1", "git+ssh://host/a.git#semver:^1"),
        ("^1.0", "^1.0"),
    ],
)
def test_what_is_no_credential_stays(tmp_path: Path, url: str, left: str) -> None:
    write(tmp_path, {"package.json": json.dumps({"dependencies": {"a": url}})})
    assert manifests.read_dependencies(ProjectFiles(tmp_path)) == {"a": left}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("requirements.txt", "outside==1\n"),
        ("Gemfile", "gem 'outside'\n"),
        ("package.json", '{"dependencies": {"outside": "1"}}'),
        (".python-version", "3.1.4\n"),
        ("setup.cfg", "[options]\ninstall_requires = outside\npython_requires = >=3.1\n"),
    ],
)
@pytest.mark.parametrize("way", ["file", "folder", "relative", "chain"])
def test_links_that_leave_the_root_are_not_followed(tmp_path: Path, name: str, content: str, way: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(tmp_path / "elsewhere", {name: content})
    target = tmp_path / "elsewhere" / name
    if way == "folder":
        (root / "sub").symlink_to(tmp_path / "elsewhere")
        target = Path("sub") / name
    elif way == "relative":
        target = Path("..") / "elsewhere" / name
    elif way == "chain":
        (root / "first").symlink_to(target)
        target = Path("first")
    (root / name).symlink_to(target)
    assert (manifests.read_dependencies(ProjectFiles(root)), manifests.read_python_version(ProjectFiles(root))) == (
        {},
        None,
    )


def test_links_inside_the_root_are_followed_but_not_to_secrets_or_git(tmp_path: Path) -> None:
    write(tmp_path, {"deps/all.txt": "a==1\n", ".env": "b==2\n", ".git/description": "c==3\n", "loop.txt": ""})
    link = tmp_path / "requirements.txt"
    for target, expected in (
        ("deps/all.txt", {"a": "==1"}),
        (".env", {}),
        (".git/description", {}),
        ("requirements.txt", {}),
    ):
        link.symlink_to(target)
        assert manifests.read_dependencies(ProjectFiles(tmp_path)) == expected, target
        link.unlink()


@pytest.mark.parametrize(
    "include", ["-r ../out.txt", "-r {outside}", "-c ../out.txt", "-r link.txt", "-r sub/../../out.txt", "-r .env"]
)
def test_includes_stay_in_the_root(tmp_path: Path, include: str) -> None:
    root = tmp_path / "root"
    write(tmp_path, {"out.txt": "outside==1\n", "root/.env": "outside==1\n"})
    (root / "link.txt").symlink_to(tmp_path / "out.txt")
    line = include.format(outside=tmp_path / "out.txt")
    write(
        root,
        {
            "requirements.txt": f"{line}\nours\n",
            "setup.cfg": f"[options]\ninstall_requires = file: {line.split()[1]}\n",
        },
    )
    assert manifests.read_dependencies(ProjectFiles(root)) == {"ours": ""}


@pytest.mark.parametrize("name", ["requirements.txt", "package.json", ".python-version"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert (
        manifests.read_dependencies(ProjectFiles(tmp_path)),
        manifests.read_python_version(ProjectFiles(tmp_path)),
    ) == ({}, None)


# -- odd facts


HOSTILE: Contents = {
    "package.json": '{"dependencies": ' + "[" * 100_000,
    "pyproject.toml": "a = " + "[" * 100_000,
    "Cargo.toml": "[dependencies]\nx = " + "9" * 5000 + "\n",
    "composer.json": b"\xff\xfe\x00",
    "pom.xml": "<project>" + "<dependencies>" * 100_000,
    "setup.cfg": "install_requires = a\n",
}


def test_an_odd_manifest_costs_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, HOSTILE | {"requirements.txt": "flask\n"})
    with caplog.at_level(logging.WARNING, "cco"):
        for _ in range(2):
            assert manifests.read_dependencies(ProjectFiles(tmp_path)) == {"flask": ""}
    told = sorted(record.getMessage().split(":")[0].rpartition("/")[2] for record in caplog.records)
    assert told == sorted(HOSTILE)


def test_a_context_gives_all_other_facts_beside_odd_manifests(make_service: MakeService, repository: Path) -> None:
    write(
        repository,
        HOSTILE | {"requirements.txt": "flask @ https://user:Zk9wQ7rT4xLm@host/x.whl\n-r ignored/more.txt\n"},
    )
    write(
        repository,
        {"go.mod": "require a.com/b v1\n", ".gitignore": "ignored/\ngo.mod\n", "ignored/more.txt": "django\n"},
    )
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "Manifests")
    answer = make_service().client().get("/api/context/issue-1/python-specialist")
    assert answer.status_code == 200, answer.text
    context = answer.json()["context"]
    assert context["metadata"]["dependency_versions"] == {"flask": "@ https://host/x.whl"}
    assert context["git_context"]["recent_commits"][0]["message"] == "Manifests"
    assert "requirements.txt" in context["project_structure"]["files"]


N = 300_000
SLOW: Contents = {
    "requirements.txt": "\n" * N + "a @ git+https://h/x#&" + "#&" * N + "\n" + " \\\n" * N,
    ".python-version": "\n" * N,
    "pyproject.toml": "a" + ".a" * N + " = 1\n",
    "Cargo.toml": "a = {b" + ' . "c"' * N + " = 1}\n",
    "setup.cfg": "[options]\ninstall_requires = " + ";" * N + "\nx = 1\na" + " " * N + "b\n",
    "setup.py": "python_requires=[],\n" * 50_000 + "x = (" + "{" * 90,
    "go.mod": "/*" * N,
    "build.gradle": "api 'a:b'" + ", 'a:b'" * (N // 7) + "\napi 'a:b'" + " " * N + "\napi 'a:b'," + "(" * N + "\napi" + "[" * N + "a" * N
    + "/*" * N + "\n" * N,
    "Gemfile": "=begin\n" * (N // 4) + "\n" * N,
    "pom.xml": "<project><properties><a>" + "${a}" * (N // 2) + "</a></properties><dependencies>"
    + POM.format("${a}${a}${a}", "a", "") * 1000 + "</dependencies></project>",
    "settings.gradle": "include " + "':a', " * (N // 6) + "\ninclude" + " (" * N + "project('a').projectDir = " + " new" * (N // 4)
    + "a{" * N + "a { from(" * (N // 9) + "a" * N + "create('a') { from (" + "a." * N,
    "go.work": "use (\n" + "./a\n" * (N // 4) + "(" * N,
    "pubspec.yaml": "dependencies:\n" + " " * N + "\n" + "  a: # \n" * (N // 8) + "workspace:\n" + "- **\n" * 100_000
    + "dev_dependencies: {" + "a" * N + "{ a: '" * (N // 6) + " # " * N + "{" * N,
    "build.sbt": '"a" %' + " " * N + "val a" * N + "val a = (" * (N // 9) + 'file("' * (N // 6) + '"' * N + "/*" * N,
    "Package.swift": ".package(" + " " * N + ".package(url: \"" * (N // 15) + "/*" * N,
    "mix.exs": "defp deps\n" * 50_000 + "{:a," + " " * N + "{:a" * N,
    "App.csproj": "<Project><ItemGroup>" + '<PackageReference Include="' + ";" * N + '"/></ItemGroup></Project>',
    "pnpm-workspace.yaml": "packages:\n" + "- " + "*a" * 50_000 + "\n" + "- **\n" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_no_manifest_keeps_a_thread_busy(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"package.json": "{}"} | {name: SLOW[name]})
    listed = frozenset({name, "package.json", *(f"{'a/' * 90}{number}/package.json" for number in range(1000))})
    started = time.thread_time()
    manifests.read_dependencies(ProjectFiles(tmp_path, listed))
    manifests.read_python_version(ProjectFiles(tmp_path, listed))
    assert time.thread_time() - started < 4


TIRING = """
import resource, sys
from pathlib import Path
from test_metadata import ProjectFiles, manifests
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
print(len(manifests.read_dependencies(ProjectFiles(Path(sys.argv[1])))))
"""


@table({
    "a long name and a line's end": ({"pyproject.toml": f"[project]\ndependencies = [\"{'a' * 500_000}\\nb\"]"}, 0),
    "a long blank and a line's end": ({"pyproject.toml": f"[project]\ndependencies = [\"a{' ' * 500_000}x\\nb\"]"}, 0),
    "colons that may be of a port": ({"requirements.txt": f"a @ https://a:{':' * 900}.git@\n" * 1_000}, 1),
})  # fmt: skip
def test_a_manifest_that_is_made_to_tire_the_reader_is_read_like_others(
    tmp_path: Path, given: Contents, expected: int
) -> None:
    write(tmp_path, given)
    command = [sys.executable, "-c", TIRING, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", f"its limit of the processor's time has ended it? {done.stderr}"
