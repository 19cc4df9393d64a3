"""Identifiers taken apart into words, their stems, and the names of files, for the plugin relevance of cco_sidecar."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable

from cco_sidecar_plugins._patterns import late_pattern

IDENTIFIER = re.compile(r"\w+")
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


# Chinese, Japanese and Korean put no blank between words, or join particles to them.
UNSPACED = "\u3005\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
SCRIPTS = re.compile(f"([{UNSPACED}]+)|([^_{UNSPACED}]+)")


def parts_of(identifier: str) -> list[str]:
    """Its words in lower case; where nothing parts them, each two letters that stand together."""
    if identifier.isascii():
        return [part.lower() for part in PARTS.findall(identifier)]
    parts = list[str]()
    for unspaced, spaced in SCRIPTS.findall(identifier):
        parts += [unspaced[start : start + 2] for start in range(max(1, len(unspaced) - 1))] if unspaced else []
        parts += parts_of(spaced) if spaced.isascii() else [spaced.lower()]
    return parts


class Splitter(dict[str, str]):
    """Identifier -> its words in lower case, for a compound also all of them as one; remembers what it has seen."""

    LIMIT = 200_000
    LONGEST = 80  # characters; longer ones are encoded data

    def __missing__(self, identifier: str) -> str:
        parts = parts_of(identifier) if len(identifier) <= self.LONGEST else []
        if len(self) >= self.LIMIT:
            self.clear()
        found = self[identifier] = " ".join([*parts, run_together(identifier)] if len(parts) > 1 else parts)
        return found

    def text(self, text: str) -> str:
        return " ".join(map(self.__getitem__, IDENTIFIER.findall(text)))


class Stemmer:
    """The stems of words as SQLite's porter tokenizer makes them, so that ours are always the same as the index's."""

    LIMIT = 100_000

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            "create virtual table word using fts5 (body, tokenize = 'porter unicode61');"
            "create virtual table stem using fts5vocab (word, instance);"
        )

    def stems(self, words: Iterable[str]) -> dict[str, str]:
        """Word -> stem, for words that Splitter gives."""
        with self._lock:
            words = list(words)
            if len(self._known) > self.LIMIT:
                self._known.clear()
            if unknown := [word for word in dict.fromkeys(words) if word not in self._known]:
                self._known |= {word: word for word in unknown}
                self._database.execute("begin")
                self._database.executemany("insert into word (rowid, body) values (?, ?)", enumerate(unknown))
                self._known |= {
                    unknown[row]: stem
                    for row, stem in self._database.execute('select doc, term from stem where "offset" = 0')
                }
                self._database.execute("rollback")
            return {word: self._known[word] for word in words}


def bare_stem(path: str) -> str:
    """The base name without endings and punctuation; of ``__init__.py`` and the like the folder's: what a file is
    called.
    """
    folder, _, name = path.rpartition("/")
    stem = name.partition(".")[0] if name[0] != "." else name[1:]
    if stem in ("__init__", "index", "mod", "lib", "main", "__main__") and folder:
        stem = folder.rpartition("/")[2]
    return stem


def run_together(name: str) -> str:
    """Its letters and digits alone, in lower case."""
    return "".join(re.findall(r"[^\W_]+", name)).lower()


TEST_AFFIX = late_pattern(
    r"^tests?[._-](?=.)|(?<=.)[._-](tests?|spec)(?=\.|$)|^Test(?=[A-Z])|(?<=[a-z0-9])(Tests?|TestCase|Spec|IT)(?=\.|$)"
)


def pair_stem(path: str) -> str:
    """What a source file and its test are both called."""
    folder, _, name = path.rpartition("/")
    return run_together(bare_stem(f"{folder}/{TEST_AFFIX.sub('', name, count=1)}"))
