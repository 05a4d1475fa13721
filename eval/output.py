"""Rows of figures as a table."""

from typing import Any

from hybridlm.output import cell, table


def rows_table(rows: list[dict[str, Any]], columns: dict[str, str], align: str = "<") -> str:
    """Rows under the headings `columns` (field: heading); `align` as in `hybridlm.output.table`."""
    return table([list(columns.values()), *([cell(row[field]) for field in columns] for row in rows)], align)
