"""The pictures of the report: each drawn twice, for a light and for a dark page, as SVG inside it, and as a PNG beside it."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

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


def loss_curves(runs: dict[str, tuple[Rows, Rows]]) -> Chart:
    """Of each named run its logged steps and its validations."""

    def draw(axes: Axes, colours: Colours) -> None:
        single = len(runs) == 1
        for (name, (training, validation)), colour in zip(runs.items(), cycle(colours[:6])):
            label = "training" if single else short_name(name)
            axes.plot(*thinned(*points(training, "tokens", "loss")), color=colour, lw=1, alpha=0.6, label=label)
            dots: dict = {"color": colours[1], "label": "validation"} if single else {"color": colour}
            axes.plot(*points(validation, "tokens", "val_loss"), marker="o", ms=3.5, **dots)
        axes.set(title="Loss" if single else "Loss (dots: validation)", xlabel="tokens seen", ylabel="nats per token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()

    return Chart("loss", f"Training and validation loss in nats per token, against tokens seen, of {', '.join(runs)}", draw)


def bits_per_byte(models: dict[str, float], baselines: dict[str, float]) -> Chart:
    bars = models | baselines

    def draw(axes: Axes, colours: Colours) -> None:
        fill = [colours[0]] * len(models) + [colours[-1]] * len(baselines)
        drawn = axes.barh([short_name(name) for name in bars], list(bars.values()), height=0.6, color=fill)
        axes.bar_label(drawn, fmt="%.2f", padding=4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.margins(x=0.12)
        axes.set(title="Bits per byte (less is better)", xlabel="bits per byte of validation text")

    values = ", ".join(f"{name}: {value:.2f}" for name, value in bars.items())
    return Chart("bits-per-byte", f"Bits per byte of validation text: {values}", draw, 1.2 + 0.36 * max(5, len(bars)))


def against_prompt(series: dict[str, Rows], field: str, title: str, unit: str) -> Chart:
    """A line for each named list of throughput rows; a name that ends in TWIN is dashed, in the colour of the one before it."""

    def draw(axes: Axes, colours: Colours) -> None:
        for name, rows, style in styled(series, colours):
            axes.plot(*points(rows, "prompt", field), label=short_name(name), **style)
        lengths(axes, {row["prompt"] for rows in series.values() for row in rows})
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=" " if unit == "B" else "", unit=unit if unit == "B" else ""))
        axes.set(title=title, xlabel="prompt, tokens", ylabel="bytes" if unit == "B" else unit)
        axes.margins(y=0.15)
        legend_below(axes, len(series))

    alt = f"{title} ({unit}) against the length of the prompt, for {' and '.join(series)}"
    return Chart(field.replace("_", "-"), alt, draw, 2.8 + 0.2 * len(series))


def by_context(series: dict[str, Rows]) -> Chart:
    def draw(axes: Axes, colours: Colours) -> None:
        for name, rows, style in styled(series, colours):
            axes.plot(*points(rows, "least", "nats_per_token"), label=short_name(name), **style)
        lengths(axes, {row["least"] for rows in series.values() for row in rows})
        axes.set(title="Loss by length of context", xlabel="tokens before it, at least", ylabel="nats per token")
        legend_below(axes, len(series))

    alt = f"Nats per token against the number of tokens that a prediction is made from, for {' and '.join(series)}"
    return Chart("loss-by-context", alt, draw, 2.8 + 0.2 * len(series))


def quality_against_speed(models: Rows, quality: str, speed: str, less_is_better: bool) -> Chart:
    """Rows of `label`, `speed`, `quality` and, hollow at the same height, `twin_speed` (None where there is no twin).

    Names stand in a column beside the picture, a thread to each dot: dots may lie close together, names must not.
    """
    height = max(3.4, 1.6 + 0.2 * len(models))
    points_high = 72 * (height - 1.0)  # of the axes, about

    def draw(axes: Axes, colours: Colours) -> None:
        heights = [row["quality"] for row in models]
        margin = 0.15 * ((max(heights) - min(heights)) or abs(heights[0]) or 1.0)
        low, high = min(heights) - margin, max(heights) + margin
        right = 1.1 * max(max(row["speed"], row["twin_speed"] or 0) for row in models)
        axes.set(xlim=(0, right), ylim=(high, low) if less_is_better else (low, high))
        shares = [(row["quality"] - low) / (high - low) for row in models]
        places = apart([1 - share if less_is_better else share for share in shares], NAME_HEIGHT / points_high)
        for i, (row, place) in enumerate(zip(models, places)):
            colour, marker = colours[i % 6], MARKERS[i % len(MARKERS)]
            if row["twin_speed"] is not None:
                axes.plot([row["speed"], row["twin_speed"]], [row["quality"]] * 2, color=colour, lw=1, ls=":")
                axes.plot(row["twin_speed"], row["quality"], marker, mfc="none", mec=colour, ms=7)
            axes.plot(row["speed"], row["quality"], marker, color=colour, ms=7)
            axes.annotate(
                short_name(row["label"], 20), (row["speed"], row["quality"]), (1.04, place), textcoords="axes fraction",
                va="center", fontsize=9, color=colour, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.7},
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        up = " (up is better)" if less_is_better else ""
        axes.set(title=f"{quality.capitalize()} against speed", xlabel=speed, ylabel=quality + up)

    values = "; ".join(f"{row['label']}: {row['quality']:.3g} at {row['speed']:.3g}" for row in models)
    return Chart("quality-against-speed", f"{quality} against {speed}. {values}", draw, height)


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


def heat_map(task: str, model: str, rows: Rows) -> Chart:
    """Accuracy over length and depth, the number in each cell; a cell without a figure stays empty."""
    across, down = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows}, key=str)
    grid = np.full((len(down), len(across)), np.nan)
    for row in rows:
        grid[down.index(row["depth"]), across.index(row["length"])] = row["accuracy"]

    def draw(axes: Axes, colours: Colours) -> None:
        axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "#ffffff" if value < 0.55 else "#16181c"
                axes.text(x, y, f"{value:.2f}".removeprefix("0"), ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(across)), [brief(length) for length in across])
        axes.set_yticks(range(len(down)), [f"{depth:.0%}" if isinstance(depth, (int, float)) else "any" for depth in down])
        axes.grid(False)
        axes.set(title=f"{task}: {short_name(model)}", xlabel="length, tokens", ylabel="depth")

    alt = f"Accuracy in {task} of {model}, over the length of the text and the depth of what is asked for"
    return Chart(f"{file_name(task)}-{file_name(model)}", alt, draw, 1.3 + 0.33 * len(down))


def styled(series: dict[str, Rows], colours: Colours) -> Iterator[tuple[str, Rows, dict[str, Any]]]:
    models = [name for name in series if not name.endswith(TWIN_LABEL)]
    for name, rows in series.items():
        i = models.index(name.removesuffix(TWIN_LABEL)) if name.removesuffix(TWIN_LABEL) in models else 0
        style: dict[str, Any] = {"color": colours[i % 6], "marker": MARKERS[i % len(MARKERS)]}
        yield name, rows, style | ({"ls": "--", "mfc": "none"} if name.endswith(TWIN_LABEL) else {})


TWIN_LABEL = ", Transformer twin"


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
