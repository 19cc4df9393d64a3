"""The files that say what a project is: its manifests, and the documents that newcomers read first."""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cco_sidecar import FileFact, language_of, run_git, split_z
from cco_sidecar_plugins.context._kinds import kind_of
from cco_sidecar_plugins.context._withheld import own_files, own_module

TYPE_BY_MANIFEST = {
    "pyproject.toml": "python", "setup.py": "python", "setup.cfg": "python", "requirements.txt": "python",
    "Cargo.toml": "rust", "go.mod": "go", "pom.xml": "java", "build.gradle": "java", "build.gradle.kts": "kotlin",
    "Gemfile": "ruby", "composer.json": "php", "mix.exs": "elixir", "pubspec.yaml": "dart", "Package.swift": "swift",
    "tsconfig.json": "typescript", "package.json": "javascript", "CMakeLists.txt": "cpp", "dune-project": "ocaml",
}  # fmt: skip
RELATED = {  # languages that have the same manifests
    "javascript": ("typescript",), "java": ("kotlin", "scala"), "kotlin": ("java", "scala"), "cpp": ("c",),
}  # fmt: skip
BESIDE = frozenset("html css sql protobuf graphql terraform".split())  # what is there in many files beside a program
ENTRY_DOCUMENTS = "readme.md readme.rst readme.txt readme contributing.md architecture.md agents.md claude.md".split()
FIRST_FILES = frozenset(name.lower() for name in (*ENTRY_DOCUMENTS, *TYPE_BY_MANIFEST))


def project_type(root: Path, names: Sequence[str]) -> str:
    """The language that the project is written in, else "unknown". Blocks."""
    declared = [language for manifest, language in TYPE_BY_MANIFEST.items() if os.path.isfile(f"{root}/{manifest}")]
    return written_in(tuple(declared), tuple(names or names_of(root)))


def names_of(root: Path) -> list[str]:
    """The files that git tracks, without those of the service that runs."""
    names, this = split_z(run_git(root, "ls-files", "-z")), own_module(str(root))
    near = (this, f"{this[: this.rfind('/') + 1]}plugins/")
    there = [name for name in names if name.startswith(near) and (root / name).is_file()]
    own = own_files(str(root), [FileFact(name, (root / name).stat().st_size, 0) for name in there])
    return [name for name in names if name not in own]


@functools.lru_cache(2)  # an edit changes no name
def written_in(declared: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Of the languages whose manifests are there the one with the most source files, unless another has more than four
    times as many (one of BESIDE sixteen times), as many a manifest is there for tools alone; then that of most source
    files. Tests count where there is nothing else, and notebooks are Python.
    """
    of_kind: dict[str, Counter[str]] = {"source": Counter(), "test": Counter()}
    for name in names:
        if name.endswith(".ipynb"):
            of_kind["source"]["python"] += 1
        elif (counts := of_kind.get(kind_of(name))) is not None and not name.endswith(".h"):  # .h is C++ too
            counts[language_of(name)] += 1
    for counts in of_kind.values():
        del counts["unknown"]  # a template of any language
    counts = of_kind["source"] or of_kind["test"]
    if "typescript" in declared and 4 * counts["typescript"] >= counts["javascript"]:
        del counts["javascript"]  # is checked and built with it
    own = [*declared, *(related for language in declared for related in RELATED.get(language, ()))]
    most = max(own, key=counts.__getitem__, default="unknown")
    others = (count / 4 if language in BESIDE else count for language, count in counts.items())
    return most if 4 * counts[most] >= max(others, default=0) else counts.most_common(1)[0][0]
