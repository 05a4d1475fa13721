"""How commands write: plain tables, JSON, figures for people, and no noise of the libraries below."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COUNT, BYTES, FLOP = ("", " K", " M", " B", " T"), (" B", " kB", " MB", " GB", " TB"), (" FLOP", *(f" {p}FLOP" for p in "kMGT"))


def scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and the unit, a thousand of the one before it: 8.10 B, 16.2 GB."""
    value = float(f"{value:.3g}")  # first, so that 999.9 becomes 1.00 of the next unit
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    whole = power == 0 or value >= 1000
    return (f"{value:,.0f}" if whole else f"{value:#.3g}".rstrip(".")) + units[power]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Rows of cells, the headings first. `align` has `<` or `>` for each column; those after its last stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = align.ljust(len(widths), ">")
    return "\n".join("  ".join(f"{cell:{a}{n}}" for cell, a, n in zip(row, align, widths)).rstrip() for row in rows)


def json_text(content: Any) -> str:
    """NaN and infinity, which JSON has not, are errors."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(content: Any, path: str | Path) -> None:
    """`path` "-" is stdout."""
    if str(path) == "-":
        sys.stdout.write(json_text(content))
    else:
        Path(path).write_text(json_text(content), encoding="utf-8")


def quiet() -> None:
    """No bars and warnings of transformers: ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
