"""Keywords: the module's ranking by a task's words, made better; it serves until the index of ``relevance`` is ready.

Words are taken apart, shortened to their stems and weighed by BM25. Files count for more that the task names, that an
earlier agent changed or that have an uncommitted change.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator

from cco_sidecar import (
    FileFact,
    RankedFile,
    RankRequest,
    hookimpl,
    language_of,
    read_text_file,
)
from cco_sidecar_plugins.context._first_files import FIRST_FILES
from cco_sidecar_plugins.context._identifiers import parts_of
from cco_sidecar_plugins.context._kinds import SPOKEN_KIND, kind_of, kinds_of_task, reading_of
from cco_sidecar_plugins.context._languages import spoken_by
from cco_sidecar_plugins.context._stop_words import NO_MATCH, STOP_WORDS, WORK_WORDS

WORDS, WORK = 48, 1_500_000_000  # words of a task; bytes times words that are scanned, in about a second
READING_SECONDS = 1.0  # also on a machine that is busy, as while the index is built: a hook has five in all
READING = 8  # as many words could be looked for in the time in which a file is read
MOST = 400  # files that are ranked; to sort all of a large project would hold up all threads
MAX_FILE = 400_000  # what is longer is data


@hookimpl
def rank_files(request: RankRequest) -> list[RankedFile]:
    """Files without a word of the task come last, in the order without a task, and only those that are the agent's own
    (where no word occurs, manifests and entry documents too; where nothing is the agent's own either, all). Each
    request scans the texts anew, so there is nothing to keep fresh. Only listed files are read, never through a
    link. (`git grep`, once a word, takes several times as long and reads what is to be left alone.)
    """
    weights = weights_of(request)
    order = order_without_task(request.files, weights)
    shares = matches(request, order)
    best = max((sum(share for share, _ in found) for found in shares.values()), default=1.0)
    named = named_files(order, request.task)
    matched = shares.keys() | named
    touched = {path for output in request.outputs for path in output.get("files_affected", [])}
    scores = {path: weights[kind_of(path)] * sum(share for share, _ in found) for path, found in shares.items()}
    for bonus, paths, reason in (
        (3.0, named, "named in the task"),
        (0.6, set(request.changed), "uncommitted change"),
        (1.2, touched, "changed by an earlier agent"),
    ):
        for path in order.keys() & paths:
            weight = weights["other"] if kind_of(path) == "other" else 1.0
            scores[path] = scores.get(path, 0.0) + weight * bonus * best
            shares[path].append((bonus * best, reason))
    least = min(scores.values()) if matched else 1.0  # files without a score stay below it
    first = set() if matched else {path for path in order if path.lower() in FIRST_FILES}
    own = {path for path in order if is_own(path, request, weights)}
    all_others = not (own or matched)  # rather than nothing
    plain = "{}, as no file is of the agent's kinds and language" if all_others else "{} of the project"
    given = order if all_others else shares.keys() | own | first
    scores = {path: scores.get(path, 0.0) + least * order[path] for path in given}
    unmatched = [NO_MATCH] if request.task and not matched else []
    ranked = []
    for path in heapq.nsmallest(MOST, scores, key=lambda path: (-scores[path], path)):
        why = [reason for _, reason in sorted(shares.get(path, ()), reverse=True)[:4]]
        reasons = [*unmatched, *(why or [plain.format(kind_of(path))])]
        ranked.append(RankedFile(path, scores[path], reasons, matched=path in matched))
    return ranked


def matches(request: RankRequest, order: Iterable[str]) -> dict[str, list[tuple[float, str]]]:
    """Path, and (share of the score, reason) of each word that the file holds. The first in order are read
    first.
    """
    words = task_words(request.task, WORDS)
    strengths: dict[str, dict[str, float]] = {stem: {} for stem in words}
    sizes = {file.path: file.size for file in request.files if file.size <= MAX_FILE}
    mean, left = (sum(sizes.values()) + 1) / max(1, len(sizes)), WORK // (READING + len(words))
    end = time.monotonic() + READING_SECONDS
    for path in order if words else ():
        left -= sizes.get(path, 0)
        is_read = path in sizes and left > 0 and time.monotonic() < end
        found = read_text_file(request.root, path, MAX_FILE) if is_read else None
        text, name = found[0].lower() if found else "", os.path.splitext(path.lower())[0]
        for stem, holding in strengths.items():
            count = text.count(stem)
            if strength := count / (count + 0.4 + 0.8 * len(text) / mean) + 1.5 * (stem in name):
                holding[path] = strength
    shares = collections.defaultdict[str, list[tuple[float, str]]](list)
    for stem, holding in strengths.items():
        rarity = math.log(1 + len(sizes) / (1 + len(holding)))
        for path, strength in holding.items():
            shares[path].append((strength * rarity, f"matches {words[stem]}"))
    return shares


OWN_KIND = 0.4  # from this weight on a kind is the agents' own


WEIGHTS = {  # how much a file's kind counts for the agents of a category, and for those who build and run a project
    "coding": {"source": 1.0, "test": 0.7, "config": 0.2, "docs": 0.1, "other": 0.05},
    "architect": {"source": 1.0, "docs": 0.6, "config": 0.6, "test": 0.4, "other": 0.05},
    "qa": {"test": 1.0, "source": 0.7, "config": 0.2, "docs": 0.05, "other": 0.05},
    "security": {"source": 1.0, "config": 0.7, "test": 0.4, "docs": 0.1, "other": 0.05},
    "documentation": {"docs": 1.0, "source": 0.6, "config": 0.2, "test": 0.1, "other": 0.05},
    "support": {"docs": 1.0, "source": 0.8, "config": 0.5, "test": 0.3, "other": 0.05},
    "infrastructure": {"config": 1.0, "source": 0.4, "docs": 0.3, "test": 0.15, "other": 0.05},
}


def weights_of(request: RankRequest) -> dict[str, float]:
    """How much a file's kind counts for the agent and its task."""
    weights = WEIGHTS[reading_of(request.agent_type, request.category)]
    return weights | {kind: max(weights[kind], SPOKEN_KIND) for kind in kinds_of_task(request.task)}


def is_own(path: str, request: RankRequest, weights: dict[str, float]) -> bool:
    """Whether a file is of the agent's own kinds and, for a language's specialist, in its language; or of a kind that
    its task speaks of.
    """
    spoken, kind = spoken_by(request.agent_type), kind_of(path)
    in_language = not spoken or language_of(path) in spoken or kind in kinds_of_task(request.task)
    return weights[kind] >= OWN_KIND and in_language


def order_without_task(files: list[FileFact], weights: dict[str, float]) -> dict[str, float]:
    """Path and score, best first: the agent's kinds of file, manifests, entry documents; new and shallow ones first."""
    newest = max((file.mtime_ns for file in files), default=1) or 1
    scores = {}
    for file in files:
        weight = max(weights[kind_of(file.path)], 0.88 if file.path.lower() in FIRST_FILES else 0.0)
        scores[file.path] = weight * (0.5 * file.mtime_ns / newest + 0.1 / (1 + file.path.count("/")))
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def named_files(paths: Iterable[str], task: str) -> set[str]:
    """Those of ``paths`` that a task's text names: by path, or by a base name with an ending."""
    words = {"/" + word.rstrip(".") for word in re.findall(r"[\w.@+/-]+", task)}
    ends = {word.rpartition("/")[2] for word in words if "." in word.rpartition("/")[2]}
    known = [f"/{path}" for path in paths if path.rpartition("/")[2] in ends]
    return {path[1:] for path in known if any(path.endswith(word) or word.endswith(path) for word in words)}


def task_words(task: str, number: int) -> dict[str, str]:
    """Stem and word of what a task is about: the words of its beginning, then the most frequent ones."""
    beginning = task[:200].partition("\n")[0]
    words = [*content_words(beginning), *dict(collections.Counter(content_words(task)).most_common())]
    found: dict[str, str] = {}
    for word in words:
        found.setdefault(next((word[: -len(end)] for end in ENDINGS if word[4:].endswith(end)), word), word)
    subject = {stem: word for stem, word in found.items() if word not in WORK_WORDS}
    return dict(itertools.islice((subject or found).items(), number))


ENDINGS = ("ies", "ing", "es", "ed", "s")
SUBWORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def content_words(text: str) -> Iterator[str]:
    """The words of a text in lower case, identifiers as written and in their parts, without STOP_WORDS."""
    for token in re.findall(r"\w+", text):
        parts = SUBWORD.findall(token) if token.isascii() else parts_of(token)
        for word in dict.fromkeys(part.lower() for part in (token, *parts)):
            if word not in STOP_WORDS and (1 if not word.isascii() else 2) <= len(word) <= 80:  # longer is encoded data
                yield word
