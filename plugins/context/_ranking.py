"""The ranking of the plugin relevance: features of files, their sum, and the reasons that an agent reads."""

from __future__ import annotations

import collections
import functools
import heapq
import math
import re
from collections.abc import Callable, Collection, Iterable

import msgspec

from cco_sidecar import RankedFile, RankRequest
from cco_sidecar_plugins.context._facts import FIRST_STAGE_KIND, MAX_RANKED, Facts, Past, Scores, module_path
from cco_sidecar_plugins.context._first_files import FIRST_FILES
from cco_sidecar_plugins.context._identifiers import pair_stem
from cco_sidecar_plugins.context._index import CHUNK_LINES, MAX_CHUNKS, Index
from cco_sidecar_plugins.context._kinds import SPOKEN_KIND, kinds_of_task, reading_of
from cco_sidecar_plugins.context._languages import spoken_by
from cco_sidecar_plugins.context._query import make_query, texts_of

FEATURES = {
    "chunk": 4.4,  # bm25 of the file's best chunk
    "hmax": 1.5,  # bm25 of the best past commit that touched it
    "recent": 1.35,  # how often and how lately it was changed
    "dirs": 1.1,  # what the best files of its folder got
    "pdir": 1.05,  # query words among its folders
    "sym": 0.65,  # bm25 of all names that it defines
    "defx": 0.6,  # a query word is a name that it defines
    "sub": 0.6,  # a query word is part of its name
    "hdoc": 0.55,  # all matching past commits together
    "pcov": 0.5,  # how much of its name the query says
    "pbase": 0.4,  # query words in its name
    "imp": 0.4,  # the best files import it
    "pair": 0.35,  # the test of a good file, the file of a good test
}
SPEAKING = ("chunk", "sym", "defx", "sub", "pdir", "pbase")  # a word of the task is in the file, or in its path

KIND_FACTORS = {  # by what reading_of says
    "coding": {"source": 1.0, "test": 0.7, "markup": 0.2, "config": 0.1, "aux": 0.08, "docs": 0.05, "other": 0.03},
    "architect": {"source": 1.0, "docs": 0.6, "config": 0.6, "markup": 0.4, "test": 0.4, "aux": 0.2, "other": 0.05},
    "infrastructure": {
        "config": 1.0,
        "markup": 0.8,
        "aux": 0.6,
        "source": 0.4,
        "docs": 0.3,
        "test": 0.15,
        "other": 0.05,
    },
    "qa": {"test": 1.0, "source": 0.25, "markup": 0.1, "config": 0.1, "aux": 0.08, "docs": 0.05, "other": 0.03},
    "security": {"source": 1.0, "config": 0.7, "markup": 0.6, "test": 0.4, "aux": 0.2, "docs": 0.1, "other": 0.05},
    "documentation": {
        "docs": 1.0,
        "source": 0.5,
        "markup": 0.25,
        "aux": 0.25,
        "config": 0.2,
        "test": 0.1,
        "other": 0.05,
    },
    "support": {"docs": 1.0, "source": 0.8, "config": 0.5, "markup": 0.5, "test": 0.3, "aux": 0.3, "other": 0.05},
}
OWN_KIND = 0.2  # from this factor on a kind is the agent's own; other files come where something speaks for them
OTHER_LANGUAGE = 0.5  # factor for code in a language that is not the specialist's

BOOSTS = {  # added after all factors: a best file scores some 5 to 10
    "named in the task": 24.0,
    "changed by an earlier agent": 10.0,  # of the same issue
    "uncommitted change": 2.0,
}
MADE_ALONG = 0.3  # of a boost for what is neither code nor a document, as expected output that was written anew

EXPLAINED = 50  # of them with words from the index
MAX_CHUNKED = 120  # of them with their best chunks


class Ranking:
    """What the words of one request say: the features of all files that have any, their sum, and the answers for agents
    of several types, for whom the kinds and languages of files count otherwise.
    """

    def __init__(self, index: Index, facts: Facts, past: Past, request: RankRequest) -> None:
        self.index, self.facts, self.past, self.request = index, facts, past, request
        self.texts, self.revision = texts_of(request), facts.revision
        self.query = make_query(self.texts, index.stemmer)
        self.features: dict[str, Scores] = {}
        self.tops = {"recent": 1.0}  # of each feature the largest; this one has shares of the project's already
        self.found: list[tuple[int, float]] = []  # chunks by their row numbers, with their ranks, best first
        self.chunks: dict[int, list[tuple[int, float]]] = {}  # of the best files of an answer: number and score
        self.all_others = False  # whether files are given that nothing speaks for, rather than none
        self.commit_of: dict[int, int] = {}  # the past commit that speaks for a file
        self.why: dict[int, dict[str, str]] = collections.defaultdict(dict)  # file -> feature -> what to say
        self.shown: dict[int, dict[str, str]] = {}  # the same of what was looked up for the best files of an answer
        self.without_task: Ranking | None = None
        self.said: dict[tuple[int, bool], list[str]] = {}  # what is said of a file, looked up or not, strongest first
        self.occurs = not request.task or self._occurs()
        self.total = self._search() if self.occurs else {}

    def holds(self, facts: Facts, past: Past, request: RankRequest) -> bool:
        """Whether another request is about the same, and no file or commit is another one by now."""
        same = self.request.task == request.task and self.texts == texts_of(request)
        return same and self.facts is facts and self.revision == facts.revision and self.past is past

    def ranked(self, request: RankRequest) -> list[RankedFile]:
        self.request = request
        if self.occurs:
            return self._answer(self.total)
        plain = msgspec.structs.replace(request, task="")  # the order without the task, and it is said
        self.without_task = ranking_of(self.without_task, self.index, self.facts, self.past, plain)
        return [msgspec.structs.replace(item, matched=False) for item in self.without_task.ranked(plain)]

    def _search(self) -> Scores:
        """The sum of all features of each file that has any."""
        total: Scores = collections.defaultdict(float)
        if self.query.terms:
            # Sorted outside of FTS5, whose own sorter carries every position along. With a limit SQLite keeps a tree of
            # the best, which took 7.6 ms in the place of 6.4 on 7,000 files.
            sql = "select rowid, bm25(chunk) as rank from chunk where chunk match ? order by rank"
            with self.index.beside(4_000, sql, self.query.match_with_pairs) as chunks:
                self._symbols()
                self._definitions()
                self._path_words()
                self._parts_of_names()
                self._commits()
                self._add(self.features, total)  # here, as the search for chunks takes longer
            self.found = chunks.result()
            self._add({"chunk": self._text()}, total)
        recent, often = self.past.by_file(self.facts)
        matching = total.keys() | often
        self._add({"recent": {id: recent[id] for id in recent.keys() & matching}}, total)
        if self.query.terms:
            self._add(self._second_stage(total), total)
        return total

    def _occurs(self) -> bool:
        """Whether a word of the task itself, not of what earlier agents decided, is in a text, name or past commit."""
        if named_files(self.request.task, self.facts):
            return True
        query = make_query(texts_of(self.request, decisions=False), self.index.stemmer)
        if any(stem in self.facts.base or stem in self.facts.folder for stem in query.terms):
            return True
        if any(any(self.facts.containing(stem)) for stem in query.terms if len(stem) >= 4):
            return True
        holding = [f"select 1 from {table} where {table} match ? limit 1" for table in ("chunk", "symbol", "message")]
        return bool(query.terms) and any(self.index.value(sql, query.match) for sql in holding)

    def _add(self, features: dict[str, Scores], total: Scores) -> None:
        """Add features to the sums of their files, and keep them."""
        for name, scores in features.items():
            top = self.tops.setdefault(name, max(scores.values(), default=0.0) or 1.0)
            weight = FEATURES[name]
            for id, score in scores.items():
                total[id] += weight * (score / top)
        self.features |= features

    def _share(self, name: str, id: int) -> float:
        """What a feature adds to the sum of a file."""
        score = self.features[name].get(id) if name in self.features else None
        return FEATURES[name] * (score / self.tops[name]) if score else 0.0

    # -- what the query alone says

    def _text(self) -> Scores:
        files, rows = self.facts.files, reversed(self.found)
        return {id: -rank for row, rank in rows if (id := row // MAX_CHUNKS) in files}

    def _symbols(self) -> None:
        sql = "select rowid, bm25(symbol) as rank from symbol where symbol match ? order by rank"
        rows = self.index.database.execute(sql, (self.query.match,)).fetchmany(2_000)
        self.features["sym"] = {id: -rank for id, rank in rows if id in self.facts.files}

    def _definitions(self) -> None:
        names = list(self.query.names)[:500]
        sql = f"select name, file, shown, number from name where name in ({','.join('?' * len(names))})"
        rows = self.index.database.execute(sql, names).fetchall()
        spread = collections.Counter(row[0] for row in rows)
        scores: Scores = collections.defaultdict(float)
        strongest: Scores = {}
        for name, id, shown, number in rows:
            if id in self.facts.files:
                score = self.query.names[name] * self.facts.rarity(spread[name]) * number / (number + 0.4)
                scores[id] += score
                if score > strongest.get(id, 0.0):
                    strongest[id] = score
                    self.why[id]["defx"] = f"defines {shown}"
        self.features["defx"] = scores

    def _path_words(self) -> None:
        facts = self.facts
        pbase: Scores = collections.defaultdict(float)
        pdir: Scores = collections.defaultdict(float)
        mass: Scores = collections.defaultdict(float)
        words: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
        for stem, (word, weight) in self.query.terms.items():
            named, inside = facts.base.get(stem), facts.folder.get(stem)
            if not named and not inside:
                continue
            rarity = facts.rarity_in_paths(stem)
            for id in named:
                pbase[id] += weight * rarity
                mass[id] += rarity
                words[id].append((-weight * rarity, word))
            if inside:
                here = set(named)
                for id in inside:
                    if id not in here:
                        pdir[id] += weight * rarity
        self.features |= {"pbase": pbase, "pdir": pdir}
        self.features["pcov"] = {id: found / facts.rarity_of_name(id) for id, found in mass.items()}
        for id, found in words.items():
            self.why[id]["pbase"] = "name matches " + ", ".join(word for _, word in sorted(found)[:3])

    def _parts_of_names(self) -> None:
        scores: Scores = collections.defaultdict(float)
        words = {stem: weight for stem, (_, weight) in self.query.terms.items() if len(stem) >= 4}
        words |= {run: 0.7 * self.query.names[run] for run in self.query.runs if len(run) >= 4 and run not in words}
        for word, weight in words.items():
            found = list(self.facts.containing(word))
            rarity = self.facts.rarity(len(found))
            for id, length in found:
                scores[id] += weight * rarity * min(1.0, len(word) / length + 0.3)
        self.features["sub"] = scores

    def _commits(self) -> None:
        sql = "select rowid, bm25(message) as rank from message where message match ? order by rank limit 150"
        rows = self.index.database.execute(sql, (self.query.match_with_pairs,)).fetchall()
        best: Scores = {}
        mass: Scores = collections.defaultdict(float)
        for commit, rank in rows:
            paths = self.past.touched.get(commit, ())
            for path in paths:
                id = self.facts.ids.get(path)
                if id is not None:
                    mass[id] += (rank / rows[0][1]) ** 2 / math.sqrt(len(paths))
                    score = -rank / len(paths) ** 0.25
                    if score > best.get(id, 0.0):
                        best[id], self.commit_of[id] = score, commit
        self.features["hmax"] = best
        self.features["hdoc"] = {id: x / (x + 1) for id, x in mass.items()}

    # -- what the best files say about others

    def _second_stage(self, first: Scores) -> dict[str, Scores]:
        files = self.facts.files
        factors = FIRST_STAGE_KIND
        stage = best_of(first, 60, lambda id: first[id] * factors.get(files[id].kind, 0.4))
        best = self._first(stage, 60)
        imported, paired = self._imports(stage, best[:8]), self._pairs(stage, best)
        return {"dirs": self._folders(stage, best), "imp": imported, "pair": paired}

    def _folders(self, stage: Scores, best: list[int]) -> Scores:
        inside: dict[str, list[float]] = collections.defaultdict(list)
        for id in best:
            inside[self.facts.files[id].path.rpartition("/")[0]].append(stage[id])
        sums = {folder: math.sqrt(sum(scores[:4])) for folder, scores in inside.items()}
        return {id: score for folder, score in sums.items() for id in self.facts.inside.get(folder)}

    def _imports(self, stage: Scores, best: list[int]) -> Scores:
        scores: Scores = collections.defaultdict(float)
        rows = self.index.database.execute(f"select id, imports from file where id in ({','.join(map(str, best))})")
        texts = dict(rows.fetchall())
        for id in best:
            importer = self.facts.files[id]
            modules = texts.get(id, "").split("\n")
            targets = dict.fromkeys(
                target
                for module in modules
                if module
                for target in self.facts.resolve(importer, module)
                if target != id
            )
            for target in targets:
                scores[target] += stage[id] / stage[best[0]] / math.sqrt(len(targets)) if stage[best[0]] else 0.0
                self.why[target].setdefault("imp", f"imported by {importer.path}")
        return scores

    def _pairs(self, stage: Scores, best: list[int]) -> Scores:
        scores: Scores = {}
        for id in best:
            file = self.facts.files[id]
            for other in self.facts.pairs.get(pair_stem(file.path)):
                mate = self.facts.files[other]
                if (file.kind == "test") != (mate.kind == "test") and stage[id] > scores.get(other, 0.0):
                    scores[other] = stage[id]
                    self.why[other]["pair"] = (
                        f"test of {file.path}" if mate.kind == "test" else f"tested by {file.path}"
                    )
        return scores

    # -- the answer

    def _answer(self, total: Scores) -> list[RankedFile]:
        files, request = self.facts.files, self.request
        reading = reading_of(request.agent_type, request.category)
        reader = reading, spoken_by(request.agent_type), kinds_of_task(request.task)
        standing_of = functools.cache(lambda kind, language: standing(kind, language, *reader))
        boosts = self._boosts()
        added = {id: sum(value for value, _ in found) for id, found in boosts.items()}
        plain = not self.query.terms
        speaking: list[Collection[int]] = [boosts, *(self.features.get(name, {}) for name in SPEAKING)]
        asked = request.task and any(speaking)
        self.all_others = not asked and not any(standing_of(file.kind, file.language)[1] for file in files.values())

        def score_of(id: int) -> float | None:
            file = files[id]
            factor, own = standing_of(file.kind, file.language)
            first = not request.task and file.path.lower() in FIRST_FILES
            if not (own or first or self.all_others or any(id in ids for ids in speaking)):
                return None
            score = total.get(id, 0.0)
            if plain:
                factor, score = factor**2, score + 0.5 / (1 + file.path.count("/"))
            return factor * score + added.get(id, 0.0)

        if plain or self.all_others or len(files) <= MAX_RANKED:
            scores = scores_of(files, score_of)
        else:
            scores = best_of(total, MAX_RANKED, score_of) | scores_of(boosts, score_of)
        best = self._first(scores, MAX_RANKED)
        self._take_chunks(best[:MAX_CHUNKED])
        self._explain(best[:EXPLAINED])
        return [
            RankedFile(
                files[id].path,
                scores[id],
                self._reasons(id, boosts.get(id, []), place < EXPLAINED),
                self._best_chunks(id) if place < MAX_CHUNKED else [],
            )
            for place, id in enumerate(best)
        ]

    def _first(self, scores: Scores, number: int) -> list[int]:
        """The best files, ties by path."""
        least = heapq.nlargest(number, scores.values())[-1] if len(scores) > number else 0.0
        return sorted(
            (id for id, score in scores.items() if score >= least),
            key=lambda id: (-scores[id], self.facts.files[id].path),
        )[:number]

    def _boosts(self) -> dict[int, list[tuple[float, str]]]:
        boosts: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
        affected = [
            path
            for output in self.request.outputs
            for path in output.get("files_affected") or ()
            if isinstance(path, str)
        ]
        for reason, paths in (
            ("named in the task", named_files(self.request.task, self.facts)),
            ("changed by an earlier agent", affected), ("uncommitted change", self.request.changed),
        ):  # fmt: skip
            ids = {self.facts.ids[path] for path in paths if path in self.facts.ids}
            along = {id for id in ids if self.facts.files[id].kind == "other" and reason != "named in the task"}
            boost = BOOSTS[reason] * min(1.0, math.sqrt(20 / max(1, len(ids - along))))
            for id in ids:
                boosts[id].append((boost * MADE_ALONG if id in along else boost, reason))
        return boosts

    def _take_chunks(self, best: list[int]) -> None:
        fresh: dict[int, list[tuple[int, float]]] = {id: [] for id in best if id not in self.chunks}
        for row, rank in self.found if fresh else ():
            if (id := row // MAX_CHUNKS) in fresh:
                fresh[id].append((row % MAX_CHUNKS, -rank))
        self.chunks |= fresh

    def _best_chunks(self, id: int) -> list[tuple[int, float]]:
        """(first line, score) of a file's chunks, best first: what matches, then what lies nearest to it."""
        file = self.facts.files[id]
        if file.bytes < 4_000 or file.chunks < 2:
            return []
        scores = dict(self.chunks[id])
        top = max(scores.values(), default=1.0)
        spread = {}
        for chunk in range(file.chunks):
            near = max(scores.get(chunk - 1, 0.0), scores.get(chunk + 1, 0.0))
            spread[chunk] = scores.get(chunk, 0.0) + 0.1 * near + 0.001 * top / (1 + chunk)
        order = sorted(spread, key=lambda chunk: (-spread[chunk], chunk))
        return [(chunk * CHUNK_LINES + 1, round(spread[chunk], 4)) for chunk in order]

    def _explain(self, best: list[int]) -> None:
        """Words for what needs a look into the index: matching text and past commits."""
        fresh = [id for id in best if id not in self.shown]
        wanted = {self.commit_of[id] for id in fresh if id in self.commit_of}
        subjects = {}
        if wanted:
            rows = self.index.database.execute(
                f"select id, hash, subject from past where id in ({','.join(map(str, wanted))})"
            )
            subjects = {id: f"{hash[:7]} {shorten(subject)}" for id, hash, subject in rows}
        best_chunks = [id * MAX_CHUNKS + self.chunks[id][0][0] for id in fresh if self.chunks[id]]
        sql = f"select rowid, body from chunk where rowid in ({','.join(map(str, best_chunks))})"
        texts = {row // MAX_CHUNKS: body for row, body in self.index.database.execute(sql).fetchall()}
        for id in fresh:
            shown = self.shown[id] = {}
            if id in self.commit_of:
                shown["hmax"] = f"changed with {subjects.get(self.commit_of[id], 'an earlier commit')}"
            if words := self._words_in(texts.get(id, "")):
                shown["chunk"] = f"text matches {', '.join(words[:3])}{self._whose_words()}"

    def _whose_words(self) -> str:
        """Of a ranking without a task: whose words its words are."""
        return "" if self.request.task else " of earlier agents' decisions"

    def _words_in(self, body: str) -> list[str]:
        body = f" {body}"  # a word begins after a space
        return [word for stem, (word, _) in self.query.terms.items() if f" {stem}" in body or f" {word}" in body]

    def _reasons(self, id: int, boosts: list[tuple[float, str]], explained: bool) -> list[str]:
        """At most four, strongest first."""
        if (id, explained) not in self.said:
            self.said[id, explained] = self._said(id, explained)
        said = self.said[id, explained]
        if said and not boosts and not self.all_others:  # most of them, for each agent type
            return said
        ordered = [*(text for _, text in sorted(boosts, key=lambda item: -item[0])), *said]
        kind = self.facts.files[id].kind
        if self.all_others:
            return [*ordered[:3], f"{kind}, as no file is of the agent's kinds and language"]
        return ordered[:4] or ["lies near files that match" if self.query.terms else f"{kind} of the project"]

    def _said(self, id: int, explained: bool) -> list[str]:
        why = self.why.get(id, {}) | (self.shown[id] if explained else {})
        said = [(self._share(name, id), text) for name, text in why.items()]
        if "chunk" not in why and (share := self._share("chunk", id)):
            said.append((share, f"text matches{self._whose_words() or ' the task'}"))
        if (recent := self._share("recent", id)) > 0.3:
            said.append((recent, "changed recently"))
        return [text for _, text in sorted(said, key=lambda item: -item[0])[:4]]


def scores_of(ids: Iterable[int], score_of: Callable[[int], float | None]) -> Scores:
    return {id: score for id in ids if (score := score_of(id)) is not None}


def best_of(total: Scores, number: int, score_of: Callable[[int], float | None]) -> Scores:
    """The scores of some files, the best ``number`` among them; None leaves a file out. None of them has a higher score
    than in ``total``, or it counts beside these: so most need not be looked at.
    """
    scores, best = dict[int, float](), list[float]()
    for id in sorted(total, key=total.__getitem__, reverse=True):
        if len(best) == number and total[id] < best[0]:
            break
        if (score := score_of(id)) is not None:
            scores[id] = score
            (heapq.heappush if len(best) < number else heapq.heappushpop)(best, score)
    return scores


def ranking_of(last: Ranking | None, index: Index, facts: Facts, past: Past, request: RankRequest) -> Ranking:
    """The ``last`` ranking where it is about the same, else a new one."""
    return last if last and last.holds(facts, past, request) else Ranking(index, facts, past, request)


def standing(
    kind: str, language: str, reading: str, spoken: tuple[str, ...], asked_for: frozenset[str]
) -> tuple[float, bool]:
    """The factor for a file's kind and language, and whether it is the agent's own: of its kinds, in its languages, or
    of a kind that it is ``asked_for``.
    """
    factors = KIND_FACTORS.get(reading, KIND_FACTORS["coding"])
    factor = factors[kind]
    if kind in asked_for:
        return max(factor, SPOKEN_KIND), True
    if spoken and kind == "markup":
        return (factors["source"], True) if language in spoken else (factor, False)
    code = kind in ("source", "test", "aux") and language != "unknown"  # or one of OWN_LANGUAGE
    if spoken and code and language not in spoken:
        return factor * OTHER_LANGUAGE, False
    return factor, factor >= OWN_KIND


def shorten(subject: str) -> str:
    return subject if len(subject) <= 60 else subject[:57].rstrip() + "..."


PATH_LIKE = re.compile(r"[\w@.+~/\\:-]+")  # one class and nothing to go back for: a task may be one long word


def named_files(task: str, facts: Facts) -> set[str]:
    """The paths that a task names: whole, by their last parts, by a base name that few have, or as dotted modules."""
    named: set[str] = set()
    for token in dict.fromkeys(PATH_LIKE.findall(task)):
        token = token.replace("\\", "/").rstrip("./:").removeprefix("./")
        if len(token) > 300 or not (re.search(r"[./]|::", token) or token.endswith("file")):
            continue
        known = [facts.files[id].path for id in facts.named.get(token.rpartition("/")[2])]
        found = [path for path in known if path == token or path.endswith("/" + token)]
        if not found:
            found = dotted_module(token, facts)
        if token in found:
            named.add(token)
        elif len(found) <= 3:
            named.update(found)
    return named


def dotted_module(token: str, facts: Facts) -> list[str]:
    """Files for ``package.module`` or ``package.module.name``; one part alone says too little."""
    parts = token.replace("::", ".").split(".")
    for end in (len(parts), len(parts) - 1):
        if end < 2:
            break
        wanted = "/" + "/".join(parts[:end])
        found = [facts.files[id] for id in facts.called.get(parts[end - 1])]
        if hits := [
            file.path for file in found if ("/" + module_path(file)).endswith(wanted) and file.language != "go"
        ]:
            return hits
    return []
