"""The pictures of the report."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from hybridlm.pages.charts import (
    MARKERS,
    NAME_HEIGHT,
    Chart,
    Colours,
    Rows,
    apart,
    brief,
    file_name,
    legend_below,
    lengths,
    points,
    short_name,
    thinned,
)  # fmt: skip


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
