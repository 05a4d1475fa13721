"""The picture of a sweep: the losses of its rows, and how they came about."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hybridlm.pages.charts import THEMES, short_name
from train.compress_charts import spread_out, styles
from train.sweep_config import short_names
from train.sweep_report import Result, best_of, shown

THEME = THEMES["light"]
COLOURS, INK, FAINT = tuple(THEME["colours"]), THEME["ink"], THEME["faint"]


def draw(found: list[Result], unit: str, path: Path) -> None:
    """A PNG. Left the last validation loss of each row: mean, standard error, small dots for the seeds; right the validations."""
    style: Any = {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlesize": 11, "text.parse_math": False,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "axes.axisbelow": True, "axes.grid": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, max(3.6, 1.4 + 0.34 * len(found))), layout="constrained")
        left, right = figure.subplots(1, 2)
        last_losses(left, found, unit)
        curves(right, found, unit)
        figure.savefig(path, dpi=140)


def label(entry: Result) -> str:
    return short_name(", ".join(shown(value).strip("`") for value in entry["settings"].values()), 44)


def last_losses(axes: Axes, found: list[Result], unit: str) -> None:
    best = best_of(found)
    if best:
        axes.axvline(best["val_loss"], color=COLOURS[-1], ls="--", lw=1)
    for place, (entry, look) in enumerate(zip(found, styles(COLOURS))):
        seeds = [run["val_loss"] for run in entry["runs"].values() if run["val_loss"] is not None]
        axes.plot(seeds, [place] * len(seeds), "o", ms=3, color=look["color"], alpha=0.4, mew=0)
        if seeds:
            mark = {"color": look["color"], "marker": look["marker"]}
            axes.errorbar(entry["val_loss"], place, xerr=entry["stderr"], ms=6, capsize=4, lw=1.5, **mark)
        states = [run["state"] for run in entry["runs"].values()]
        if "diverged" in states:
            text = f"{states.count('diverged')} of {len(states)} diverged"
            where = axes.transData if seeds else axes.get_yaxis_transform()
            at = (entry["val_loss"] if seeds else 0.5, place + (0.38 if seeds else 0))
            axes.text(*at, text, transform=where, ha="center", va="center", color=COLOURS[-2], size=8)
    axes.set_yticks(range(len(found)), [label(entry) for entry in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    names = short_names(list(found[0]["settings"]))
    axes.set(title="Last validation, ± standard error over seeds", xlabel=unit, ylabel=", ".join(names.values()))


def curves(axes: Axes, found: list[Result], unit: str) -> None:
    """Means over seeds, from the least to the greatest shaded; without the validation before the first step."""
    drawn = []
    for entry, look in zip(found, styles(COLOURS)):
        by_step: dict[int, list[float]] = {}
        for run in entry["runs"].values():
            for step, loss in run["validations"]:
                by_step.setdefault(step, []).append(loss)
        steps = sorted(step for step in by_step if step > 0)
        if steps:
            low, middle, high = ([of(by_step[step]) for step in steps] for of in (min, mean, max))
            axes.plot(steps, middle, ms=4, lw=1.5, **look)
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)
            drawn += low + high
    if drawn:
        spread_out(axes, drawn)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(title="On the way: mean and range over seeds", xlabel="steps", ylabel=unit)
