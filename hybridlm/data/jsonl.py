"""JSON lines, one document a line, found by number through an index of where each line begins.

`datasets` reads such files too, but stops at the first bad line without naming it.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.data.rows import BadDocument, label_of, text_of

BLOCK = 2**24  # bytes read at a time for the index


@dataclass(frozen=True)
class JsonLines:
    """The lines of some files, in order; blank ones are no documents.

    Read anew for each document, not mapped: a mapped file that another program cuts short kills the process that reads it.
    """

    paths: list[Path]
    text_column: str
    template: str | None

    @cached_property
    def spans(self) -> list[np.ndarray]:
        """Of each file (lines, 3) int64: first byte, byte behind the last, and number of the line, counted from 1."""
        return [line_spans(path) for path in self.paths]

    @cached_property
    def ends(self) -> np.ndarray:
        """How many documents there are up to the end of each file."""
        return np.cumsum([len(spans) for spans in self.spans])

    def read(self, i: int) -> str:
        """
        Raises:
            BadDocument: named by file and line.
        """
        row, where = self.row(i)
        return text_of(row, self.text_column, self.template, where)

    def label(self, column: str, i: int) -> str:
        """As `read`, of its label."""
        row, where = self.row(i)
        return label_of(row, column, None, where)

    def row(self, i: int) -> tuple[dict[str, Any], str]:
        """The row, and where it stands in the words of an error."""
        file = int(np.searchsorted(self.ends, i, side="right"))
        start, stop, number = map(int, self.spans[file][i - self.ends[file]])
        with self.paths[file].open("rb") as lines:
            lines.seek(start)
            line = lines.read(stop - start)
        where = f"{self.paths[file]}:{number}"
        return _object(line, where), where


def line_spans(path: Path) -> np.ndarray:
    """(lines, 3) int64, as in `JsonLines.spans`."""
    starts, firsts = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]  # of each line: where it begins, and its first byte
    size, at_start = 0, True
    with path.open("rb") as file:
        while len(block := np.frombuffer(file.read(BLOCK), np.uint8)):
            begin = np.flatnonzero(block == ord("\n")) + 1
            begin = np.concatenate([[0], begin]) if at_start else begin
            at_start = bool(len(begin)) and begin[-1] == len(block)
            begin = begin[:-1] if at_start else begin
            starts.append(begin + size)
            firsts.append(block[begin])
            size += len(block)
        start, first = np.concatenate(starts), np.concatenate(firsts)
        stop = np.append(start[1:] - 1, size - at_start)[: len(start)]
        keep = first != ord("\n")
        for i in np.flatnonzero(np.isin(first, list(b" \t\r\v\f"))):  # only these can be blank and not empty
            file.seek(start[i])
            keep[i] = bool(file.read(stop[i] - start[i]).strip())
    return np.stack([start, stop, np.arange(1, len(start) + 1)], axis=1)[keep]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadDocument("invalid UTF-8", f"{where}: invalid UTF-8 at byte {error.start} of the line.") from None
    except RecursionError:
        raise BadDocument("malformed JSON", f"{where}: malformed JSON: nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits among them
        raise BadDocument("malformed JSON", f"{where}: malformed JSON: {error}.") from None
    if not isinstance(row, dict):
        raise BadDocument("not an object", f"{where}: a JSON object is wanted, {{…}}; got {type(row).__name__}.")
    return row
