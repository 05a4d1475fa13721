"""What a person or a script sees of a command: a table, JSON, and no noise of the libraries below."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging


def quiet() -> None:
    """No bars and warnings of transformers: ours say what is going on."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def write_json(content: Any, path: str | Path) -> None:
    """`path` "-" is stdout. NaN and infinity, which JSON has not, are errors."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows under the headings `columns` (field: heading); the first column to the left, the others to the right."""
    cells = [list(columns.values())] + [[cell(row[field]) for field in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]) for line in cells
    )


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
