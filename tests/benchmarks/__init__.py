"""Benchmarks: each figure beside its limit, measured in the same run, in rounds that alternate.

    python -m tests.benchmarks [--quick] [--only NAME] [--json FILE] [--soak] [--pictures]

A module of this folder that measures has a function ``rows(quick: bool) -> Iterator[Row]``, whose rows are made by
``row`` below, and stands in the table of ``__main__``. It starts what it needs in a temporary folder, and ends it.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
BARE = "bare Tornado"
COMPARE = {"<=": operator.le, ">=": operator.ge}
HEADS = ("measure", "sidecar", "limit", "ratio", "goal", "event loop held, p99 and most")


def row(
    name: str,
    ours: Sequence[float],
    limit: Sequence[float] = (),
    *,
    unit: str,
    goal: str = "",
    limit_is: str = BARE,
    held: Sequence[float] = (),
    point: tuple[str, str, int] | None = None,
) -> Row:
    """One line of the table and of the JSON.

    ``ours`` and ``limit`` are the values of the rounds, which belong together in pairs; ``unit`` is theirs ("/s",
    "ms", "MB", ...). ``goal`` speaks of the median: "ratio <= 1.3" (ours / limit), "difference <= 1.5" (ours - limit)
    or "value <= 20"; without one nothing is judged. ``held`` has the milliseconds for which the
    service's event loop let others wait meanwhile. ``point`` is where a picture shows the median: its name, the line's
    and the place on the horizontal axis.
    """
    found: Row = {"name": name, "unit": unit, **middle("", ours), "goal": goal, "met": None, "point": point}
    if limit:
        pairs = list(zip(ours, limit, strict=True))
        found |= {"limit_is": limit_is, **middle("limit_", limit)}
        found |= middle("ratio_", [mine / other for mine, other in pairs if other])
        found |= middle("difference_", [mine - other for mine, other in pairs])
    if goal:
        what, sign, bound = goal.split()
        found["met"] = COMPARE[sign](found[{"value": "median"}.get(what, f"{what}_median")], float(bound))
    if held:
        found["held_ms"] = {"p99": percentile(held, 0.99), "most": max(held)}
    return found


def middle(prefix: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of ``values``, and the least and the most of them."""
    if not values:
        return {f"{prefix}median": None, f"{prefix}spread": None}
    return {f"{prefix}median": statistics.median(values), f"{prefix}spread": [min(values), max(values)]}


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: the least value that at least ``share`` of all do not pass."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def table(rows: Iterable[Row]) -> str:
    """The rows as a table in Markdown."""
    return aligned([HEADS, *map(line, rows)])


def aligned(cells: list[tuple[str, ...]]) -> str:
    """A table in Markdown, its columns aligned for a terminal; the first of ``cells`` are its heads."""
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(HEADS))]
    cells.insert(1, tuple("-" * (width - 1) + ":" if column else "-" * width for column, width in enumerate(widths)))
    return "\n".join(
        "| "
        + " | ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(cell, widths, strict=True))
        )
        + " |"
        for cell in cells
    )


def line(found: Row) -> tuple[str, ...]:
    """The cells of a row. A ratio and a value without a limit are followed by their spread."""
    unit, limit, ratio = found["unit"], found.get("limit_median"), found.get("ratio_median")
    ours, other, quotient = figure(found["median"], unit), figure(limit, unit), figure(ratio, "")
    if limit is None:
        ours += spread(found["spread"])
    quotient += spread(found.get("ratio_spread"))
    if found["goal"].startswith("difference"):
        quotient = f"{found['difference_median']:+.2f} {unit}"
    if limit is not None and found["limit_is"] != BARE:
        other += f" ({found['limit_is']})"
    held = found.get("held_ms")
    return (
        found["name"],
        ours,
        other,
        quotient,
        goal_of(found),
        f"{held['p99']:.1f}, {held['most']:.1f} ms" if held else "",
    )


def goal_of(found: Row) -> str:
    if not found["goal"]:
        return ""
    what, sign, bound = found["goal"].split()
    bound = {"ratio": bound, "value": f"{bound} {found['unit']}", "difference": f"+{bound} {found['unit']}"}[what]
    return f"{sign} {bound}" + ("" if found["met"] else ": missed")


def figure(value: float | None, unit: str) -> str:
    """A number to three digits with its unit; empty for None."""
    if value is None:
        return ""
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f} {unit}".strip()


def spread(ends: Sequence[float] | None) -> str:
    if not ends or figure(ends[0], "") == figure(ends[1], ""):
        return ""
    return f" ({figure(ends[0], '')} to {figure(ends[1], '')})"
