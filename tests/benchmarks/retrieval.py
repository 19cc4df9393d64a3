"""How well the service finds the files that a task needs, measured through its HTTP interface.

    python -m tests.benchmarks.retrieval --cases FILE --git-root DIR [--repos NAME,NAME] [--every N] [--budget BYTES]
    [--keywords] [--brief]

FILE holds a case a line: ``{"repo": "owner/name", "parent": COMMIT, "query": TASK, "gold": [PATHS], "gold_tests":
[PATHS], "lang": LANGUAGE}``, and optionally ``"commit"``, whose changed lines are then looked for too. DIR holds the
histories as bare git directories, DIR/owner+name or DIR/owner+name/repo. For each case the project is laid out as it
was at ``parent``, with no history after it, and a running service is asked for contexts with the task's text.

R@k is the share of the wanted files among the first k, all@10 whether all are among the first 10, MRR 1 / the rank of
the first. "files" and "lines" are the shares of the wanted files, and of the lines that the commit took away or changed
in them, that an answer of at most ``--budget`` bytes holds; "own" is the share of that answer's bytes that are of the
specialist's own kinds or spoken for: source and tests in its languages, what the task names or holds a word of, what is
uncommitted or an earlier agent changed, and without a task manifests and entry documents.

``--brief`` looks at briefs (10 kB of Markdown) instead: "brief" is the share of the wanted files that it names, "bytes"
its length; "listed" is the share that it names without its first files' neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Client, Service, clean_environment, plugin

SPECIALISTS = {
    "python": "python-specialist", "rust": "rust-specialist", "go": "go-specialist", "javascript": "javascript-specialist",
    "typescript": "typescript-specialist", "java": "java-specialist", "ruby": "ruby-specialist",
}  # fmt: skip
COLUMNS = ("R@5", "R@10", "R@20", "all@10", "MRR", "files", "lines", "own")
BRIEF_COLUMNS = ("brief", "listed", "bytes")
SPEAKING = ("named in", "text matches", "name matches", "defines", "uncommitted", "changed by an earlier", "matches ")

KEYWORDS_ONLY = Path(__file__).parents[1] / "keywords_only"


class Checkout:
    """A work tree that is moved from commit to commit and whose repository knows nothing that comes after."""

    def __init__(self, history: Path, root: Path) -> None:
        self.history, self.root, self._names = history, root, set[str]()
        root.mkdir()
        self._git("init", "-q")
        (root / ".git/objects/info/alternates").write_text(f"{history.resolve()}/objects\n")

    def move(self, commit: str) -> int:
        """Lay out ``commit``; the number of files. Blobs that the history lacks stay away."""
        (self.root / ".git/HEAD").write_text(f"{commit}\n")
        self._git("read-tree", "-m", commit)
        names = {os.fsdecode(name) for name in self._git("ls-files", "-z").split(b"\0") if name}
        for name in self._names - names:
            with contextlib.suppress(OSError):
                (self.root / name).unlink()
            for folder in (self.root / name).parents:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # fails where something is left, the root's .git at the latest
        self._git("checkout-index", "-a", "-f", "-q", check=False)
        self._git("update-index", "-q", "--refresh", check=False)
        self._names = names
        return len(names)

    def changed_lines(self, commit: str, parent: str, path: str) -> set[int]:
        """The lines of ``path`` at ``parent`` that ``commit`` removes or changes."""
        diff = self._git("diff", "-U0", "--no-ext-diff", parent, commit, "--", path).decode("utf-8", "replace")
        found: set[int] = set()
        for first, count in re.findall(r"^@@ -(\d+)(?:,(\d+))? ", diff, re.MULTILINE):
            found.update(range(int(first), int(first) + int(count or 1)))
        return found

    def _git(self, *arguments: str, check: bool = True) -> bytes:
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, check=check, capture_output=True, env=clean_environment()).stdout


def history_of(folder: Path, repository: str) -> Path:
    place = folder / repository.replace("/", "+")
    return place / "repo" if (place / "repo").is_dir() else place


def ask(client: Client, agent_type: str, task: str, **more: Any) -> Any:
    """The answer of the full ranking, once the index is ready."""
    deadline = time.monotonic() + 300
    while True:
        answer = client.get(f"/api/context/issue-1/{agent_type}", task=task[:30_000], **more)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        if body["context"]["metadata"]["index"] == "ready":
            return body
        assert time.monotonic() < deadline, "the index is not made"
        time.sleep(0.05)


def scores(paths: list[str], gold: list[str]) -> dict[str, float]:
    ranks = [number for number, path in enumerate(paths) if path in gold]
    found = {f"R@{k}": sum(rank < k for rank in ranks) / len(gold) for k in (5, 10, 20)}
    return found | {
        "all@10": float(sum(rank < 10 for rank in ranks) == len(gold)),
        "MRR": 1 / (ranks[0] + 1) if ranks else 0.0,
    }


def given_in_budget(checkout: Checkout, case: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, float]:
    """The shares of the wanted files, and of their changed lines, that an answer's files hold."""
    given = {file["path"]: file for file in files}
    result = {"files": sum(path in given for path in case["gold"]) / len(case["gold"])}
    changed = held = 0
    for path in case["gold"] if "commit" in case else []:
        lines = checkout.changed_lines(case["commit"], case["parent"], path)
        changed += len(lines)
        if file := given.get(path):
            whole = [(1, file["content"].count("\n") + 1)]
            held += sum(any(first <= line <= last for first, last in file.get("line_ranges", whole)) for line in lines)
    return result | ({"lines": held / changed} if changed else {}) | {"own": own_share(case["lang"], files)}


def own_share(language: str, files: list[dict[str, Any]]) -> float:
    """The share of the files' bytes that are of the specialist's own kinds or spoken for."""
    classify, spoken_by = plugin("_path_kinds").classify, plugin("_languages").spoken_by
    spoken = spoken_by(SPECIALISTS.get(language, "python-specialist"))
    sizes = {True: 0, False: 1e-9}
    for file in files:
        kind = classify(file["path"])[0]
        own = file["language"] in spoken and kind in ("source", "test")
        own = own or any(reason.startswith(SPEAKING) for reason in file["reasons"])
        sizes[own] += len(file["content"].encode())
    return sizes[True] / sum(sizes.values())


def named_in_brief(client: Client, agent_type: str, task: str, gold: list[str]) -> dict[str, float]:
    """What share of the wanted files the brief names, once the index is ready."""
    ask(client, agent_type, task, max_files=0)
    headers, params = {"Accept": "text/markdown"}, {"task": task[:30_000]}
    answer = client.request("GET", f"/api/context/issue-1/{agent_type}", headers=headers, params=params)
    assert answer.status_code == 200 and len(answer.content) <= 10_000, answer.text
    _, _, text = answer.content.decode().partition("## Files worth reading")
    lines = text.partition("\n## ")[0].split("\n")
    listed = {path for line in lines if line.startswith("- ") for path in re.findall("`([^`]+)`", line)[:1]}
    named = {path for line in lines for path in re.findall("`([^`]+)`", line)}
    share = {
        name: sum(path in found for path in gold) / len(gold) for name, found in (("brief", named), ("listed", listed))
    }
    return share | {"bytes": float(len(answer.content))}


def measure(
    cases: list[dict[str, Any]], history: Path, work: Path, budget: int, arguments: list[str], brief: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """(target, scores) of each case of one repository."""
    checkout = Checkout(history, work / "project")
    checkout.move(cases[0]["parent"])
    service = Service(work / "project", work / "storage", "--log-level", "warning", *arguments).start()
    try:
        client = service.client()
        for case in cases:
            checkout.move(case["parent"])
            for target, gold in (
                ("source", case["gold"]),
                ("tests", case["gold_tests"]),
                ("everything", case["gold"] + case["gold_tests"]),
            ):
                if not gold or (target == "everything" and not case["gold"]):
                    continue
                agent_type = (
                    "test-engineer" if target == "tests" else SPECIALISTS.get(case["lang"], "python-specialist")
                )
                began = time.perf_counter()
                if brief:
                    found = named_in_brief(client, agent_type, case["query"], gold)
                    yield target, found | {"seconds": time.perf_counter() - began}
                    continue
                files = ask(client, agent_type, case["query"])["context"]["relevant_files"]
                found = scores([file["path"] for file in files], gold) | {"seconds": time.perf_counter() - began}
                if target == "source":
                    excerpts = ask(client, agent_type, case["query"], max_bytes=budget)["context"]["relevant_files"]
                    found |= given_in_budget(checkout, case, excerpts)
                yield target, found
    finally:
        service.stop()


def row(name: str, found: list[dict[str, float]], columns: Sequence[str]) -> str:
    means = []
    for column in columns:
        values = [item[column] for item in found if column in item]
        means.append(f"{sum(values) / len(values):.3f}" if values else "-")
    return f"| {name} | {len(found)} | {' | '.join(means)} | {1000 * statistics.median(item['seconds'] for item in found):.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.retrieval", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--git-root", type=Path, required=True)
    parser.add_argument("--repos", default="", help="only these, comma-separated")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth case of a repository")
    parser.add_argument("--budget", type=int, default=100_000, help="bytes of the answers whose contents are looked at")
    parser.add_argument("--brief", action="store_true", help="what the briefs name")
    parser.add_argument("--keywords", action="store_true", help="the ranking while there is no index")
    options = parser.parse_args()
    cases = [json.loads(line) for line in options.cases.read_text("utf-8").splitlines()]
    wanted = set(options.repos.split(",")) - {""}
    found: dict[str, list[dict[str, float]]] = {"source": [], "everything": [], "tests": []}
    columns = BRIEF_COLUMNS if options.brief else COLUMNS
    print(
        f"| repository, target | cases | {' | '.join(columns)} | answer p50 ms |\n|---|" + "---:|" * (len(columns) + 2)
    )
    for repository in dict.fromkeys(case["repo"] for case in cases if not wanted or case["repo"] in wanted):
        own = [case for case in cases if case["repo"] == repository][:: options.every]
        here: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as work:
            arguments = ["--plugins", str(KEYWORDS_ONLY)] if options.keywords else []
            for target, result in measure(
                own, history_of(options.git_root, repository), Path(work), options.budget, arguments, options.brief
            ):
                found[target].append(result)
                here += [result] if target == "source" else []
        if here:
            print(row(f"{repository}, source", here, columns), flush=True)
    for target, results in found.items():
        if results:
            print(row(f"all, {target}", results, columns), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
