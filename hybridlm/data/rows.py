"""A row to a text: one column, or a template over several (`{question}\\n{answer}`).

The template is not `str.format`'s, whose fields can reach into objects and ask for any width.
"""

import math
import re
from functools import cache
from typing import Any

PIECE = re.compile(r"\{\{|\}\}|\{(\w[\w -]*)\}|[{}]")
COLUMNS_SHOWN = 20


class BadDocument(ValueError):
    """A document that cannot be used.

    Args:
        reason: what is wrong, in the words by which such documents are counted.
        message: where, and what came.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@cache
def parse_template(template: str) -> list[tuple[str, str | None]]:
    """(text before, column) of each substitution; the last has no column.

    Raises:
        ValueError: a brace that is neither `{column}` nor doubled, or no column at all.
    """
    parts: list[tuple[str, str | None]] = []
    text, at = "", 0
    for match in PIECE.finditer(template):
        text, at = text + template[at : match.start()], match.end()
        if match[0] in ("{{", "}}"):
            text += match[0][0]
        elif match[1]:
            parts.append((text, match[1]))
            text = ""
        else:
            raise ValueError(
                f"data.template {template!r}: the brace at character {match.start()} ({template[match.start() :][:20]!r}) is "
                "no {column}; write {{ and }} for braces of the text."
            )
    if not parts:
        raise ValueError(f"data.template {template!r} has no {{column}}, so that every document would be the same.")
    return [*parts, (text + template[at:], None)]


def columns(template: str) -> list[str]:
    return [column for _, column in parse_template(template) if column is not None]


def text_of(row: dict[str, Any], text_column: str, template: str | None, where: str) -> str:
    """The text of a row: its column's, or the template filled in.

    Args:
        where: the row, in the words of an error.

    Raises:
        BadDocument: a field that is missing, null, or of a kind that has no text.
    """
    if template is None:
        value = _field(row, text_column, where)
        if not isinstance(value, str):
            raise BadDocument("not text", f"{where}: {text_column!r} is {_shown(value)}, which is no text.")
        text = value
    else:
        parts = parse_template(template)
        text = "".join(before + (_filled(row, column, where) if column else "") for before, column in parts)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadDocument("invalid Unicode", f"{where}: half of a surrogate pair at character {error.start}.") from None
    return text


def label_of(row: dict[str, Any], column: str, names: list[str] | None, where: str) -> str:
    """The label of a row, as text: that of a string, an integer or true and false.

    Args:
        names: what integers stand for (the ClassLabel of `datasets`, where -1 is no label).

    Raises:
        BadDocument: it has none.
    """
    value = _field(row, column, where)
    if value == "":
        raise BadDocument("no label", f"{where}: {column!r} is empty.")
    if not isinstance(value, str | int) or (names is not None and not (isinstance(value, int) and 0 <= value < len(names))):
        raise BadDocument("no label", f"{where}: {column!r} is {_shown(value)}, which is no label.")
    return str(value) if names is None else names[int(value)]


def _filled(row: dict[str, Any], column: str, where: str) -> str:
    value = _field(row, column, where)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadDocument("not text", f"{where}: {column!r} is {_shown(value)}; a template takes text, numbers, true and false.")
    return str(value)


def _field(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        known = ", ".join(map(repr, list(row)[:COLUMNS_SHOWN])) or "none"
        raise BadDocument("missing field", f"{where}: there is no {column!r}; its fields are {known}.")
    if row[column] is None:
        raise BadDocument("null", f"{where}: {column!r} is null.")
    return row[column]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
