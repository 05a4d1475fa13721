"""Data too large to keep: read, tokenised and packed while it is trained on.

The promise is weaker than that of shards. Samples come in the order of the source, not shuffled; a position alone is not enough
to come back to it, it takes the cursor that was saved with it; coming back costs what the source needs to find its place; and a
source that has changed is noticed only where a resume begins. The rest holds: documents packed end to end, each token with one
before it in its document a target exactly once an epoch, and the same global batches after a resume and on any number of ranks,
each of which reads the whole stream and takes its rows.
"""

import glob
import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridlm.data.rows import BadDocument, text_of
from hybridlm.data.shards import tokenize
from hybridlm.data.sources import READERS, Source, list_files, suffix_of
from hybridlm.ops.cross_entropy import IGNORE

if TYPE_CHECKING:  # it takes a second, and most runs need none
    import datasets

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 64


def open_streaming(source: str, revision: str | None = None) -> "datasets.IterableDataset":
    """The training split of a hub dataset (`name` or `name:configuration`) or of local tables, of which nothing is read yet.

    Raises:
        ValueError: no such dataset, or files that are no tables.
    """
    import datasets

    path = Path(source).expanduser()
    try:
        if path.exists():
            files = list_files(path)
            if len({suffix_of(p) for p in files}) != 1 or suffix_of(files[0]) not in READERS:
                raise ValueError(
                    f"data.streaming reads hub datasets, or a file or folder of one kind of {', '.join(READERS)}; "
                    f"{source!r} is none. Set data.streaming: false for it."
                )
            names = [glob.escape(str(p)) for p in files]
            return datasets.load_dataset(READERS[suffix_of(files[0])], data_files=names, split="train", streaming=True)
        name, _, configuration = source.partition(":")
        return datasets.load_dataset(name, configuration or None, split="train", revision=revision, streaming=True)
    except (datasets.exceptions.DatasetsError, OSError) as error:
        raise ValueError(f"data source {source!r} cannot be streamed: {error}") from None


@dataclass(frozen=True)
class Held:
    """A document in memory.

    Attributes:
        start: where its tokens begin in the endless stream.
        ids: (tokens) int64, with the end token.
        epoch, row: which time round, and which row of the source.
        state: of the dataset before this row, None at the start.
    """

    start: int
    ids: np.ndarray
    epoch: int
    row: int
    state: dict | None


@dataclass
class Streamed:
    """Samples by number, forwards only. Call `seek` first.

    Attributes:
        source: what it is called, and what of a row is its text.
        keep: how many samples back from the furthest read can be read, told of and come back to: a global batch, since what has
            been read of the next step may have to be left again.
    """

    source: Source
    dataset: "datasets.IterableDataset"
    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    vocab_size: int
    keep: int
    skip_bad: bool = False
    held: list[Held] = field(default_factory=list, init=False)
    furthest: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        return self.source.source

    @property
    def names(self) -> list[str]:
        return [self.name]

    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Samples start … stop - 1: `input_ids`, `targets` (-100 where the next token is of another document) and `seq_idx`.

        Each is (b t) int64.

        Raises:
            ValueError: a row without text, or a token that the model does not have.
        """
        windows = [self._window(number) for number in range(start, stop)]
        ids = np.stack([ids for ids, _ in windows])
        document = np.stack([document for _, document in windows])
        targets = np.where(document[:, 1:] == document[:, :-1], ids[:, 1:], IGNORE)
        return {"input_ids": ids[:, :-1], "targets": targets, "seq_idx": document[:, :-1]}

    def origin(self, start: int, stop: int) -> list[dict]:
        """Where samples start … stop - 1 are from: the source, and the rows with the offset of the first token of each. JSON."""

        def documents(number: int) -> list[dict[str, int]]:
            first = number * self.seq_len
            return [
                {"document": held.row, "offset": max(0, first - held.start)}
                for held in self._documents(number)
                if held.start < first + self.seq_len  # one that begins behind that has no target here
            ]

        return [{"sample": n, "source": self.name, "documents": documents(n)} for n in range(start, stop)]

    def identity(self, position: int) -> dict:
        """What decides the samples, as JSON."""
        return {"packing": "streaming", "seq_len": self.seq_len, "source": self.name}

    def changed(self, identity: dict, position: int) -> list[str]:
        """A line for each thing because of which `position` would not mean what it did in the run that saved `identity`.

        Other text under the same name is not seen here, but by `seek`, in the document at which it starts.
        """
        now = self.identity(position)
        return [f"{key}: {identity.get(key)} -> {value}" for key, value in now.items() if identity.get(key) != value]

    def cursor(self, position: int) -> dict:
        """What `seek` needs to come back to `position`, as JSON: the document in which that sample begins, and where in it."""
        held = self._documents(position)[0]
        skip = position * self.seq_len - held.start
        return {"epoch": held.epoch, "row": held.row, "state": held.state, "skip": skip, "sha256": _digest(held.ids)}

    def seek(self, position: int, cursor: dict) -> None:
        """Goes to `position`, by the `cursor` that was taken there, or {} at the start.

        Raises:
            ValueError: there is no cursor, or the source has another document there than it had.
        """
        if position and not cursor:
            raise ValueError("a streamed source is found again only by the cursor of a checkpoint, and this one has none.")
        self.held, self.furthest = [], position
        self._rows = self._read(cursor.get("epoch", 0), cursor.get("row", 0), cursor.get("state"))
        self._next = position * self.seq_len - cursor.get("skip", 0)
        if cursor and _digest(self._documents(position)[0].ids) != cursor["sha256"]:
            raise ValueError(
                f"{self.name} has another text in row {cursor['row']} than when the checkpoint was saved, or the tokenizer is "
                "another, so its place in the data means nothing here. Restore what it was, or start a new run from its model "
                "(--model.init_from)."
            )

    def summary(self, stop: int) -> list[str]:
        """A line on the source."""
        return [f"{self.name}: streamed"]

    def _documents(self, number: int) -> list[Held]:
        """The documents of a sample, from the one of its first token to that of its last target."""
        first, last = number * self.seq_len, (number + 1) * self.seq_len
        while not self.held or self.held[-1].start + len(self.held[-1].ids) <= last:
            epoch, row, state, ids = next(self._rows)
            self.held.append(Held(self._next, ids, epoch, row, state))
            self._next += len(ids)
        self.furthest = max(self.furthest, number + 1)
        # Gone is what ends before the last `keep` samples begin.
        del self.held[: max(0, self._behind((self.furthest - self.keep) * self.seq_len) - 1)]
        assert first >= self.held[0].start, f"sample {number} has gone by: {self.keep} are kept, up to {self.furthest}"
        return self.held[self._behind(first) - 1 : self._behind(last)]

    def _behind(self, position: int) -> int:
        """How many of the documents held begin at `position` or before."""
        return bisect_right(self.held, position, key=lambda held: held.start)

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a sample, and the number of the document within it, both (t + 1) int64."""
        documents = self._documents(number)
        skip = number * self.seq_len - documents[0].start
        ids = np.concatenate([held.ids for held in documents])
        document = np.repeat(np.arange(len(documents)), [len(held.ids) for held in documents])
        return ids[skip : skip + self.seq_len + 1], document[skip : skip + self.seq_len + 1]

    def _read(self, epoch: int, row: int, state: dict | None) -> Iterator[tuple[int, int, dict | None, np.ndarray]]:
        """(epoch, row, state before it, tokens) of every document with text from `row` on, epoch after epoch."""
        end, found = self.tokenizer.eos_token_id, False
        while True:
            self.dataset.load_state_dict(state or {})
            rows = self._texts(row, state)
            while some := list(islice(rows, BATCH_DOCUMENTS)):
                for (number, before, _), ids in zip(some, tokenize([text for *_, text in some], self.tokenizer), strict=True):
                    if ids:
                        found = True
                        yield epoch, number, before, self._checked(np.array([*ids, end], dtype=np.int64), number)
            if not found:
                raise ValueError(f"data source {self.name!r} has no text in it.")
            epoch, row, state, found = epoch + 1, 0, None, False

    def _texts(self, row: int, state: dict | None) -> Iterator[tuple[int, dict | None, str]]:
        """(row, state before it, text) of one epoch from `row` on."""
        import datasets
        import pyarrow

        try:
            for number, content in enumerate(self.dataset, row):
                try:
                    where = f"{self.name}, row {number}"
                    yield number, state, text_of(content, self.source.text_column, self.source.template, where)
                except BadDocument as error:
                    if not self.skip_bad:
                        raise BadDocument(
                            error.reason, f"{error} Mend it, or leave such out with data.bad_documents=skip."
                        ) from None
                    self.bad += 1
                    if self.bad & (self.bad - 1) == 0:  # the 1st, 2nd, 4th, 8th, …
                        logger.warning("skipped %d bad document(s) so far, now: %s", self.bad, error)
                state = self.dataset.state_dict()
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
            raise ValueError(f"data source {self.name!r} cannot be read: {error.__cause__ or error}.") from None

    def _checked(self, ids: np.ndarray, row: int) -> np.ndarray:
        if (wrong := ids >= self.vocab_size).any():
            raise ValueError(
                f"{self.name}: token id {ids[wrong][0]} at offset {wrong.argmax()} of row {row} is not in the model's "
                f"vocabulary (vocab_size={self.vocab_size}); set vocab_size to the tokenizer's, or take the model's own."
            )
        return ids


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
