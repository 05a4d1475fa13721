"""What a page is made of: sections of tables, facts and text, apart from how they look."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybridlm.output import cell

Rows = list[dict[str, Any]]


class Shown(NamedTuple):
    """A cell that is written otherwise than its value, by which it is sorted."""

    text: str
    value: Any


@dataclass
class Text:
    text: str


@dataclass
class Table:
    """Rows under the headings `columns` (field: heading). `best`: the cells that are set off, as (number of the row, field)."""

    columns: dict[str, str]
    rows: Rows
    best: set[tuple[int, str]] = field(default_factory=set)


@dataclass
class Listing:
    """Text as it was written; its parts are plain (""), bold ("b") or marked as a difference ("mark"). Folded up or not."""

    title: str
    parts: list[tuple[str, str]]
    fold: bool = False


@dataclass
class Facts:
    values: dict[str, str]


@dataclass
class Section:
    title: str
    blocks: list[Any]


def raw(value: Any) -> Any:
    return value.value if isinstance(value, Shown) else value


def text_of(value: Any) -> str:
    return value.text if isinstance(value, Shown) else cell(value)


def leaders(rows: Rows, cells: Iterable[tuple[int, str]], pick: Callable) -> set[tuple[int, str]]:
    """Those of the cells that have the best number, by `pick` (`max` or `min`); none among equals."""
    values = {(i, name): raw(rows[i].get(name)) for i, name in cells}
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    if len(set(numbers.values())) < 2:
        return set()
    return {key for key, value in numbers.items() if value == pick(numbers.values())}


def column_leaders(rows: Rows, picks: dict[str, Callable]) -> set[tuple[int, str]]:
    return set().union(*(leaders(rows, [(i, name) for i in range(len(rows))], pick) for name, pick in picks.items()))


def short(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
