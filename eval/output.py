"""Rows of figures as a table."""

from typing import Any

from hybridlm.output import table


def rows_table(rows: list[dict[str, Any]], columns: dict[str, str], align: str = "<") -> str:
    """Rows under the headings `columns` (field: heading); `align` as in `hybridlm.output.table`."""
    return table([list(columns.values()), *([cell(row[field]) for field in columns] for row in rows)], align)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
