"""The query that the plugin relevance makes of a task and of what earlier agents decided."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Iterator, Set

from msgspec import Struct

from cco_sidecar import RankRequest
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._identifiers import IDENTIFIER, Splitter, Stemmer, parts_of, run_together
from cco_sidecar_plugins.context._stop_words import STOP_WORDS, WORK_WORDS

MAX_TERMS = 64
MAX_PAIRS = 24  # adjacent words of a task that are looked for as phrases
BODY = 1_500  # characters of a task's text after its title
DECISIONS = 5  # of the newest results

SECURITY_WORDS = """auth authentication authorization login password passwd credential token session cookie jwt oauth
    permission role access
    crypto encrypt decrypt hash hmac sign verify certificate tls ssl secret key random csrf cors xss sanitize escape
    validate injection
    upload request header redirect deserialize pickle yaml eval exec shell subprocess path traversal middleware admin"""
GENERAL_WORDS = frozenset(  # say that something is to be looked at, not what
    """audit review check scan analyze analyse assess inspect look find security secure vulnerability vulnerabilities
    risk threat model code
    codebase repository repo project application app whole entire full complete general file files source issue issues
    report""".split()
)

COMMIT_TYPE = late_pattern(
    r"^\s*(?:feat|feature|fix|bug|chore|refactor|perf|docs?|tests?|build|ci|style|revert)(?:\(([^)]*)\))?!?:\s*",
    re.IGNORECASE,
)


class Query(Struct):
    """``terms``: stem -> (word, weight), heaviest first; ``names``: what a definition may be called -> weight."""

    terms: dict[str, tuple[str, float]]
    names: dict[str, float]
    runs: set[str]
    pairs: list[str]  # adjacent words of the task, as they stand in indexed text

    @property
    def match(self) -> str:
        """For FTS5."""
        return self._match_with([])

    @property
    def match_with_pairs(self) -> str:
        """The same for texts: words that stand together, as in the task, weigh more."""
        return self._match_with(self.pairs)

    def _match_with(self, more: list[str]) -> str:
        """A title's words stand twice, which doubles their weight in bm25(), where anything else has a single one."""
        title = [word for word, weight in self.terms.values() if weight >= 1]
        others = [word for word, weight in self.terms.values() if weight < 1] + more
        return " OR ".join(f'"{word}"' for word in (*title, *(title if others else ()), *others))


def make_query(texts: Iterable[tuple[str, float]], stemmer: Stemmer) -> Query:
    """The query of (text, weight of each word in it), the task's title and body first."""
    texts = list(texts)
    query = query_without(WORK_WORDS, texts, stemmer)
    return query if query.terms else query_without(frozenset(), texts, stemmer)


def query_without(work_words: Set[str], texts: list[tuple[str, float]], stemmer: Stemmer) -> Query:
    """The same without ``work_words`` of the title."""
    pairs = list(dict.fromkeys(pair for text, _ in texts[:2] for pair in adjacent_words(text)))[:MAX_PAIRS]
    words: dict[str, float] = collections.defaultdict(float)
    names: dict[str, float] = {}
    runs: set[str] = set()
    for place, (text, weight) in enumerate(texts):
        passed_over = STOP_WORDS if place else STOP_WORDS | work_words
        before: list[str] = []
        for token in re.findall(r"\w+|[.!?:;\n]", text):
            parts = [part for part in parts_of(token) if len(part) > 1 or not part.isascii()]
            content = [part for part in parts if part not in passed_over]
            if not content or len(token) > Splitter.LONGEST:
                before = []
                continue
            whole = run_together(token)
            for word in content if len(parts) == 1 else [*content, whole]:
                words[word] += weight
            names[whole] = max(names.get(whole, 0.0), weight)
            before = [*before[-2:], whole]
            for length in (2, 3):
                if len(before) >= length:
                    runs.add(joined := "".join(before[-length:]))
                    names[joined] = max(names.get(joined, 0.0), 0.7 * weight)
    stems = stemmer.stems(words)
    terms: dict[str, tuple[str, float]] = {}
    for word, weight in words.items():
        stem = stems[word]
        terms[stem] = (terms[stem][0] if stem in terms else word, weight + (terms[stem][1] if stem in terms else 0.0))
    damped = {stem: (word, 1 + math.log(weight) if weight > 1 else weight) for stem, (word, weight) in terms.items()}
    heaviest = sorted(damped.items(), key=lambda item: -item[1][1])[:MAX_TERMS]
    return Query(dict(heaviest), names, runs, pairs)


def adjacent_words(text: str) -> Iterator[str]:
    """The pairs of neighbouring words in ``text``, within identifiers too, as Splitter writes them; none with a
    stop-word between or in it, none across punctuation or a line's end.
    """
    last = ""
    for token in re.findall(r"\w+|[.!?:;,()\n]", text):
        parts = parts_of(token)
        for word in parts if len(token) <= Splitter.LONGEST else ():
            known = word not in STOP_WORDS and (len(word) > 1 or not word.isascii())
            if known and last:
                yield f"{last} {word}"
            last = word if known else ""
        if not parts or len(token) > Splitter.LONGEST:
            last = ""
        elif last and len(parts) > 1:
            last = run_together(token)  # which follows the parts in indexed text


def texts_of(request: RankRequest, decisions: bool = True) -> list[tuple[str, float]]:
    """The texts that a request is about, with the weight of their words: its task and earlier agents' ``decisions``."""
    task = request.task.strip()
    title, _, body = task.partition("\n")
    scope = COMMIT_TYPE.match(title)
    if scope:
        title = f"{scope[1] or ''}\n{title[scope.end() :]}"
    texts = [(title[:BODY], 1.0), (body[:BODY], 0.5)]
    for output in request.outputs[-DECISIONS:] if decisions else ():
        texts.append((str(output.get("decision") or "")[:BODY], 0.3))
    words = {part for token in IDENTIFIER.findall(task) for part in parts_of(token)}
    if request.category == "security" and words <= STOP_WORDS | GENERAL_WORDS:
        texts.append((SECURITY_WORDS, 0.5))
    return texts
