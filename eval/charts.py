"""The pictures of the report: each drawn twice, for a light and for a dark page, as SVG inside the page."""

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

# Okabe & Ito's colours, which the colour-blind tell apart: ours, the other, the third.
THEMES = {
    "light": {"ink": "#2b2f36", "faint": "#d5d8dd", "colours": ("#0072b2", "#d55e00", "#8a9099")},
    "dark": {"ink": "#d9dce1", "faint": "#3a3f47", "colours": ("#56b4e9", "#e69f00", "#8a9099")},
}
Colours = tuple[str, str, str]


def picture(draw: Callable[[Axes, Colours], None], alt: str, height: float = 3.0) -> str:
    """HTML of a chart; `draw` is given axes and colours. Height in inches, the width is 4.8: text stays readable on a phone."""
    light, dark = (_data_uri(draw, theme, height) for theme in THEMES.values())
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )


def _data_uri(draw: Callable[[Axes, Colours], None], theme: dict[str, Any], height: float) -> str:
    ink = theme["ink"]
    style: Any = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": theme["faint"], "xtick.color": ink, "ytick.color": ink,
        "grid.color": theme["faint"], "grid.linewidth": 0.6, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 3,
        "ytick.major.size": 0, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5, "svg.hashsalt": "report",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        draw(figure.subplots(), theme["colours"])
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def loss_curve(training: list[dict], validation: list[dict]) -> str:
    def draw(axes: Axes, colours: Colours) -> None:
        axes.plot(*_points(training, "tokens", "loss"), color=colours[0], lw=1, alpha=0.6, label="training")
        axes.plot(*_points(validation, "tokens", "val_loss"), color=colours[1], marker="o", ms=3.5, label="validation")
        axes.set(title="Loss", xlabel="tokens seen", ylabel="nats per token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()

    return picture(draw, "Training and validation loss in nats per token, against tokens seen")


def bits_per_byte(bars: dict[str, float]) -> str:
    def draw(axes: Axes, colours: Colours) -> None:
        drawn = axes.barh(list(bars), list(bars.values()), height=0.6, color=[colours[0]] + [colours[2]] * (len(bars) - 1))
        axes.bar_label(drawn, fmt="%.2f", padding=4)
        axes.invert_yaxis()
        axes.grid(False)
        axes.margins(x=0.12)
        axes.set(title="Bits per byte (less is better)", xlabel="bits per byte of validation text")

    values = ", ".join(f"{name}: {value:.2f}" for name, value in bars.items())
    return picture(draw, f"Bits per byte of validation text: {values}")


def against_prompt(series: dict[str, list[dict]], field: str, title: str, unit: str) -> str:
    """A line for each named list of throughput rows."""

    def draw(axes: Axes, colours: Colours) -> None:
        prompts = sorted({row["prompt"] for rows in series.values() for row in rows})
        for (name, rows), colour, marker in zip(series.items(), colours, "os"):
            axes.plot(*_points(rows, "prompt", field), color=colour, marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(prompts, [f"{prompt:,}" for prompt in prompts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=" " if unit == "B" else "", unit=unit if unit == "B" else ""))
        axes.set(title=title, xlabel="prompt, tokens", ylabel="bytes" if unit == "B" else unit)
        axes.margins(y=0.15)
        axes.legend()

    return picture(draw, f"{title} ({unit}) against the length of the prompt, for {' and '.join(series)}")


def _points(rows: list[dict], x: str, y: str) -> tuple[list, list]:
    rows = [row for row in rows if row.get(y) is not None]
    return [row[x] for row in rows], [row[y] for row in rows]
