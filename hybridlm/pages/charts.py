"""How pictures of reports are drawn: each twice, for a light and for a dark page, as SVG inside it, and as a PNG beside it."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# After Okabe & Ito, whose colours the colour-blind tell apart; the last is for what is no model.
THEMES = {
    "light": {
        "ink": "#2b2f36", "faint": "#d5d8dd", "paper": "#ffffff",
        "colours": ("#0072b2", "#d55e00", "#009e73", "#b0578d", "#a8820a", "#2b2f36", "#8a9099"),
    },
    "dark": {
        "ink": "#d9dce1", "faint": "#3a3f47", "paper": "#16181c",
        "colours": ("#56b4e9", "#e69f00", "#2fbf93", "#cc79a7", "#f0e442", "#d9dce1", "#8a9099"),
    },
}  # fmt: skip
MARKERS = "osD^vPX"
POINTS = 400  # of a curve; longer ones are averaged down to as many
LABEL = 34  # characters of a name in a picture
NAME_HEIGHT = 12.5  # points
WIDTH = 4.8  # inches: text stays readable on a phone
Colours = tuple[str, ...]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A picture: `draw` is given axes and colours; `name` is that of its file, `alt` says what it shows. Height in inches."""

    name: str
    alt: str
    draw: Callable[[Axes, Colours], None]
    height: float = 3.0


def svg_uri(chart: Chart, theme: str) -> str:
    """A data: URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(_draw(chart, theme, format="svg", transparent=True)).decode()


def write_png(chart: Chart, folder: Path) -> Path:
    path = folder / f"{chart.name}.png"
    path.write_bytes(_draw(chart, "light", format="png", dpi=160))
    return path


def _draw(chart: Chart, theme: str, **form: Any) -> bytes:
    values = THEMES[theme]
    ink, faint = values["ink"], values["faint"]
    style: Any = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": faint, "xtick.color": ink, "ytick.color": ink,
        "grid.color": faint, "grid.linewidth": 0.6, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 3,
        "ytick.major.size": 0, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "lines.markersize": 5, "svg.hashsalt": "report",
        "axes.facecolor": "none", "figure.facecolor": values["paper"], "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, chart.height), layout="constrained")
        chart.draw(figure.subplots(), tuple(values["colours"]))
        file = io.BytesIO()
        figure.savefig(file, metadata={"Date": None} if form["format"] == "svg" else None, **form)
    return file.getvalue()


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near the wanted ones, in the same order, no two of them closer than `gap`, none above 1."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    for below, i in pairwise(order):
        placed[i] = max(placed[i], placed[below] + gap)
    ceiling = 1.0
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def lengths(axes: Axes, values: set[int]) -> None:
    """A logarithmic axis on which the values themselves stand, as many as there is room for."""
    ticks = sorted(values)
    ticks = ticks[:: -(-len(ticks) // 8)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [brief(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def legend_below(axes: Axes, entries: int) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=1 if entries > 2 else 2, borderaxespad=0)


def brief(length: int) -> str:
    """Powers of two as they are spoken of: 65,536 is 64k."""
    return f"{length // 1024:,}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def short_name(name: str, length: int = LABEL) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def file_name(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-").lower()


def points(rows: Rows, x: str, y: str) -> tuple[list, list]:
    rows = sorted((row for row in rows if row.get(y) is not None), key=lambda row: row[x])
    return [row[x] for row in rows], [row[y] for row in rows]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list, list]:
    """A curve of at most POINTS points: the means of as many stretches of it."""
    if len(x) <= POINTS:
        return list(x), list(y)
    return tuple([float(part.mean()) for part in np.array_split(np.asarray(values), POINTS)] for values in (x, y))  # type: ignore[return-value]
