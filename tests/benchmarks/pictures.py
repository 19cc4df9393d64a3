"""Pictures of how cost grows, drawn of the rows that have a point: small SVG files, the same bytes for the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks import Row, figure

FOLDER = Path(__file__).parent / "pictures"
# Seen on a white page and on a dark one: the background is the page's, and each colour has a contrast of 3 to both.
INK = "#757a80"
COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#a371f7")


class Picture(NamedTuple):
    title: str
    across: str


PICTURES = {
    "waiters": Picture("One publish wakes all waiters: milliseconds until ...", "waiters"),
    "contexts": Picture("A context of 100 kB: milliseconds until it is answered", "files in the repository"),
}


def draw(rows: Iterable[Row], folder: Path = FOLDER) -> list[Path]:
    """Draw each picture that ``rows`` have points of; the files."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for found in rows:
        if found.get("point"):
            picture, name, across = found["point"]
            lines.setdefault(picture, {}).setdefault(name, []).append((across, found["median"]))
    return [draw_one(PICTURES[name], lines[name], folder / f"{name}.svg") for name in PICTURES if name in lines]


def draw_one(picture: Picture, lines: dict[str, list[tuple[int, float]]], file: Path) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.15g}")
    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "cco",  # the same ids every time
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(settings):
        frame = Figure(figsize=(8, 3.6), layout="constrained")
        axes = frame.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel=picture.across)
        axes.set_title(picture.title, loc="left", fontsize=11)
        for points, colour in zip(lines.values(), COLOURS, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker="o", markersize=4)
        ends = {name: max(points) for name, points in lines.items()}
        heights = apart([up for _, up in ends.values()], *axes.get_ylim())
        for (name, (across, up)), height, colour in zip(ends.items(), heights, COLOURS, strict=False):
            axes.annotate(f"{name}: {figure(up, 'ms')}", (across, height), (9, 0), color=colour, va="center",
                          xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
        axes.set_xticks(sorted({across for points in lines.values() for across, _ in points}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        frame.set_facecolor("none")
        axes.set_facecolor("none")
        FigureCanvasSVG(frame).print_svg(file, metadata={"Date": None, "Creator": None})
    return file


def apart(values: list[float], least: float, most: float, gap: float = 0.085) -> list[float]:
    """Places of ``values`` on a logarithmic axis from ``least`` (0) to ``most`` (1), moved until each two are ``gap``
    from each other.
    """
    places = [math.log(value / least) / math.log(most / least) for value in values]
    before = -gap
    for number in sorted(range(len(places)), key=places.__getitem__):
        before = places[number] = max(places[number], before + gap)
    return places
