"""The pictures of the report on a compression."""

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hybridlm.pages.charts import MARKERS, Chart, Colours, Rows, legend_below, points, short_name
from hybridlm.pattern import SYMBOLS

SHOWN_BY_SYMBOL = 16  # layers; of more there is no room for a symbol below each
WIDE = 2.0  # times its smallest value: an axis with more is logarithmic
FLOOR = 1e-4  # of the largest of a layer: what matters less is drawn there
GRID = np.linspace(0, 1, 101)  # on which curves of different lengths meet
KINDS = "M*-E"  # in the order of their colours; any other has the colour after these


def funnel(stages: dict[str, int]) -> Chart:
    def draw(axes: Axes, colours: Colours) -> None:
        drawn = axes.barh(list(stages), np.log10(1.0 + np.array(list(stages.values()))), height=0.6, color=colours[0])
        axes.bar_label(drawn, [f"{count:,}" for count in stages.values()], padding=4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xticks([])
        axes.margins(x=0.15)
        axes.set(title="From the grid to the winner", xlabel="candidates, logarithmic")

    told = ", ".join(f"{name}: {count:,}" for name, count in stages.items())
    return Chart("funnel", f"Candidates at each stage of the search. {told}", draw, 2.4)


def validation_curves(runs: dict[str, Rows], field: str, unit: str, levels: dict[str, float], since: float) -> Chart:
    """Validations of each training against its tokens; `levels` are dashed lines. From the share `since` of the tokens on."""
    most = max(row["tokens"] for rows in runs.values() for row in rows)
    late = {name: [row for row in rows if row["tokens"] >= since * most] for name, rows in runs.items()}

    def draw(axes: Axes, colours: Colours) -> None:
        for (name, rows), style in zip(late.items(), styles(colours)):
            if rows:
                axes.plot(*points(rows, "tokens", field), label=short_name(name), ms=3.5, **style)
        for (name, value), dashes in zip(levels.items(), cycle(["--", ":"])):
            axes.axhline(value, color=colours[5], ls=dashes, lw=1.2, label=short_name(name))
        values = [row[field] for rows in late.values() for row in rows] + list(levels.values())
        spread_out(axes, values)
        axes.set(xlabel="tokens after the pruning", ylabel=unit)
        axes.set_title(f"The last {1 - since:.0%} of the tokens" if since else "Validation after the pruning")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        legend_below(axes, 3)

    alt = f"Validation in {unit} against the tokens trained after the pruning, of {', '.join(runs)}"
    name = "learning-late" if since else "learning"
    return Chart(name, alt + (", the end" if since else ""), draw, 3.2 + 0.2 * (len(runs) + len(levels)))


def trade_off(
    name: str, title: str, rows: Rows, named: dict[str, dict[str, Any]], x: str, unit: str, more_is_better: bool
) -> Chart:
    """Loss before any distillation against `x`: a dot for each of `rows`, a line along the best of them, marks for the `named`.

    What was distilled for a short time has a hollow mark at the loss that it had then, a thread above it.
    """
    every = [*rows, *named.values()]

    def draw(axes: Axes, colours: Colours) -> None:
        axes.plot(*columns(rows, x, "loss"), "o", ms=3.5, color=colours[-1], alpha=0.55, mew=0, label="candidates")
        edge = columns(best_edge(rows, x, more_is_better), x, "loss")
        axes.plot(*edge, color=colours[0], lw=1.2, label="none is better in both")
        tuned = [row for row in rows if row.get("distilled_loss") is not None]
        for row in tuned:
            axes.plot([row[x]] * 2, [row["loss"], row["distilled_loss"]], color=colours[0], lw=0.6, ls=":")
        if tuned:
            hollow: dict[str, Any] = {"mfc": "none", "mec": colours[0], "ms": 5}
            axes.plot(*columns(tuned, x, "distilled_loss"), "o", **hollow, label="after the short distillation")
        for (label, row), marker, colour in reversed([*zip(named.items(), "*sD^v", (*colours[1:5], colours[5]))]):
            axes.plot(row[x], row["loss"], marker, ms=11 if marker == "*" else 7, color=colour, label=label)
        spread_out(axes, [value for row in every for key in ("loss", "distilled_loss") if (value := row.get(key)) is not None])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
        axes.set(title=title, xlabel=unit, ylabel="nats per token")
        legend_below(axes, 3)

    told = "; ".join(f"{label}: {row['loss']:.3f} at {row[x]:,.0f}" for label, row in named.items())
    return Chart(name, f"{title}: nats per token before any distillation against {unit}. {told}", draw, 3.8 + 0.2 * len(named))


def best_edge(rows: Rows, x: str, more_is_better: bool) -> Rows:
    """Those of the rows than which none is better both in `x` and in loss, in the order of `x`."""
    edge: Rows = []
    for row in sorted(rows, key=lambda row: (-row[x] if more_is_better else row[x], row["loss"])):
        if not edge or row["loss"] < edge[-1]["loss"]:
            edge.append(row)
    return sorted(edge, key=lambda row: row[x])


def layer_importance(importance: np.ndarray, pattern: str) -> Chart:
    """A bar for each layer, in the colour of its kind. What is not above 0 has none."""
    known = importance[importance > 0]
    low, high = (known.min(), known.max()) if len(known) else (0.1, 1.0)

    def draw(axes: Axes, colours: Colours) -> None:
        for symbol in dict.fromkeys(pattern):
            layers, name = of_kind(pattern, symbol), SYMBOLS.get(symbol, symbol)
            axes.bar(layers, importance[layers], width=0.8, color=colours[kind_colour(symbol)], label=name)
        logarithmic(axes)
        axes.set_ylim(low / 2, 2 * high)
        if len(pattern) <= SHOWN_BY_SYMBOL:
            axes.set_xticks(range(len(pattern)), [f"{i}\n{symbol}" for i, symbol in enumerate(pattern)])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.margins(x=0.02)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.3), ncols=3, borderaxespad=0, columnspacing=1.2)
        axes.set(title="Layers", xlabel="layer, from the input", ylabel="importance")

    told = ", ".join(f"{i} {symbol} {value:.3g}" for i, (symbol, value) in enumerate(zip(pattern, importance)))
    return Chart("layers", f"Importance of each layer. {told}", draw, 3.4)


def spread_within_layers(name: str, of: str, parts: dict[int, np.ndarray], depth: int, colour: int) -> Chart:
    """Of each layer's parts over their largest: thin from the least to the most, thick the middle 80%, a dot for the median.

    Args:
        parts: of one kind, by the number of the layer, of `depth` in all.
    """
    thick = float(np.clip(250 / depth, 2, 9))
    found = np.array([np.quantile(relative(values), (0, 0.1, 0.5, 0.9, 1)) for values in parts.values()])

    def draw(axes: Axes, colours: Colours) -> None:
        axes.vlines(list(parts), found[:, 0], found[:, 4], color=colours[colour], lw=1)
        axes.vlines(list(parts), found[:, 1], found[:, 3], color=colours[colour], lw=thick, alpha=0.75)
        axes.plot(list(parts), found[:, 2], "o", ms=min(5, thick), color=colours[5], mew=0)
        logarithmic(axes)
        axes.set_xlim(-0.5, depth - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set(title=f"{of[0].upper()}{of[1:]}, by layer", xlabel="layer, from the input", ylabel="of the layer's largest")

    middle = ", ".join(f"{layer}: {row[2]:.2g}" for layer, row in zip(parts, found))
    return Chart(f"spread-{name}", f"Importance of {of} over the largest of their layer. Median of layer {middle}", draw, 3.2)


def sorted_curves(name: str, of: str, layers: Iterable[np.ndarray], colour: int) -> Chart:
    """A thin line for each layer, its parts from the most to the least important; a thick one for the median of the layers."""
    curves = [relative(np.sort(values)[::-1]) for values in layers]
    at = [np.interp(GRID, np.linspace(0, 1, len(curve)), curve) for curve in curves]

    def draw(axes: Axes, colours: Colours) -> None:
        few = max(map(len, curves)) <= SHOWN_BY_SYMBOL
        thin: dict[str, Any] = {"color": colours[colour], "marker": "o" if few else None, "ms": 3}
        for curve in curves:
            alone: dict[str, Any] = {"lw": 1.8} if len(curves) == 1 else {"lw": 0.8, "alpha": max(0.2, min(0.7, 5 / len(curves)))}
            axes.plot(np.linspace(0, 100, len(curve)), curve, **thin, **alone)
        if len(curves) > 1:
            axes.plot([], [], lw=0.8, color=colours[colour], label=f"each of {len(curves)} layers")
            axes.plot(100 * GRID, np.median(at, axis=0), color=colours[5], lw=2, label="median of the layers")
            legend_below(axes, 2)
        logarithmic(axes)
        axes.set_ylim(top=1.3)
        axes.set(title=f"{of[0].upper()}{of[1:]}, sorted", xlabel="from the most important, %", ylabel="of the largest")

    return Chart(f"sorted-{name}", f"Importance of {of} over the largest, from the most to the least important", draw, 3.2)


def relative(values: np.ndarray) -> np.ndarray:
    """Over the largest, no less than FLOOR; all FLOOR where nothing is above 0."""
    largest = values.max()
    return np.clip(values / largest, FLOOR, None) if largest > 0 else np.full(len(values), FLOOR)


def kind_colour(symbol: str) -> int:
    return KINDS.find(symbol) % (len(KINDS) + 1)


def of_kind(pattern: str, symbol: str) -> list[int]:
    """The numbers of its layers."""
    return [i for i, other in enumerate(pattern) if other == symbol]


def styles(colours: Colours) -> Iterator[dict[str, Any]]:
    """As many as are wanted: colours and marks differ, and after six of them the dashes."""
    for i, (colour, marker) in enumerate(zip(cycle(colours[:5]), cycle(MARKERS[:6]))):
        yield {"color": colour, "marker": marker, "ls": ("-", "--", ":")[i // 5 % 3]}


def spread_out(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis where the values lie far apart, with plain numbers."""
    if min(values) > 0 and max(values) > WIDE * min(values):
        logarithmic(axes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))


def logarithmic(axes: Axes) -> None:
    """With plain numbers, and marks only beside them."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def columns(rows: Rows, *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]
