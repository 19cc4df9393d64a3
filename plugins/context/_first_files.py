"""The files that say what a project is: its manifests, and the documents that newcomers read first."""

from cco_sidecar import TYPE_BY_MANIFEST

ENTRY_DOCUMENTS = (
    "readme.md readme.rst readme.txt readme contributing.md architecture.md agents.md claude.md cmakelists.txt".split()
)
FIRST_FILES = frozenset(name.lower() for name in (*ENTRY_DOCUMENTS, *TYPE_BY_MANIFEST))
