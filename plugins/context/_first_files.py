"""The files that say what a project is: its manifests, and the documents that newcomers read first."""

from collections.abc import Sequence
from pathlib import Path

from cco_sidecar import main_language, run_git, split_z

TYPE_BY_MANIFEST = {
    "pyproject.toml": "python", "setup.py": "python", "setup.cfg": "python", "requirements.txt": "python",
    "Cargo.toml": "rust", "go.mod": "go", "pom.xml": "java", "build.gradle": "java", "build.gradle.kts": "kotlin",
    "Gemfile": "ruby", "composer.json": "php", "mix.exs": "elixir", "pubspec.yaml": "dart", "Package.swift": "swift",
    "tsconfig.json": "typescript", "package.json": "javascript",
}  # fmt: skip
ENTRY_DOCUMENTS = (
    "readme.md readme.rst readme.txt readme contributing.md architecture.md agents.md claude.md cmakelists.txt".split()
)
FIRST_FILES = frozenset(name.lower() for name in (*ENTRY_DOCUMENTS, *TYPE_BY_MANIFEST))


def project_type(root: Path, names: Sequence[str]) -> str:
    """By the first manifest that is there, else the language of most files, else "unknown". Blocks."""
    for manifest, language in TYPE_BY_MANIFEST.items():
        if (root / manifest).is_file():
            return language
    return main_language(tuple(names or split_z(run_git(root, "ls-files", "-z"))))
