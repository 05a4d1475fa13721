"""Where documents come from: the standard library, local text, or anything that `datasets` reads."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

STDLIB = "stdlib"
# How `datasets` calls the readers of local files.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


@dataclass(frozen=True)
class Documents:
    """Texts that are read when asked for.

    Attributes:
        name: what a person calls the source.
        fingerprint: changes when the source does.
    """

    name: str
    fingerprint: str
    count: int
    read: Callable[[int], str]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.read(index)

    def __iter__(self) -> Iterator[str]:
        return (self.read(i) for i in range(self.count))

    def part(self, start: int, stop: int) -> "Documents":
        read, tag = self.read, f"{self.fingerprint}[{start}:{stop}]"
        return replace(self, fingerprint=tag, count=stop - start, read=lambda i: read(start + i))


def open_source(source: str, split: str, text_column: str = "text") -> Documents:
    """The documents of `source`.

    Args:
        source: `stdlib` (the Python standard library's own files, the same on every machine of one Python version), a text file
            (one document), a folder of text files (one document each), a JSONL, JSON, CSV, Parquet or Arrow file or a folder of
            them, a folder that `save_to_disk` wrote, or a dataset on the Hugging Face hub: `name` or `name:configuration`.
        split: `train` or `validation`. A plain file or folder has only `train`.
        text_column: the column of the text, where there are columns.

    Raises:
        ValueError: no such source, split or column, or nothing in it.
    """
    path = Path(source).expanduser()
    if source == STDLIB:
        documents = _stdlib(split)
    elif path.exists() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        kinds = sorted({p.suffix if p.suffix in READERS else "text" for p in files})
        if len(kinds) > 1:
            raise ValueError(f"data source {source!r} has files of several kinds: {', '.join(kinds)}; give one kind at a time.")
        if split != "train":
            raise NoSuchSplit(f"data source {source!r} has no {split} split.")
        text = kinds in ([], ["text"])
        documents = _text_files(source, path, files) if text else _dataset(source, files, split, text_column)
    else:
        documents = _dataset(source, [], split, text_column)
    if not len(documents):
        raise ValueError(f"data source {source!r} ({split}) has no documents; give one that has text.")
    return documents


def split_source(
    source: str, val_source: str | None, val_fraction: float, text_column: str = "text"
) -> tuple[Documents, Documents]:
    """Training and validation documents.

    Validation is `val_source` where given; else the source's own validation split where it has one (stdlib, hub datasets); else
    the last `val_fraction` of its documents, or, where it is a single document, of its characters.
    """
    training = open_source(source, "train", text_column)
    if val_source is not None:
        return training, open_source(val_source, "validation" if val_source == STDLIB else "train", text_column)
    try:
        return training, open_source(source, "validation", text_column)
    except NoSuchSplit:
        pass
    if len(training) > 1:
        first = len(training) - max(1, round(len(training) * val_fraction))
        return training.part(0, first), training.part(first, len(training))
    text = training[0]
    cut = int(len(text) * (1 - val_fraction))
    if not 0 < cut < len(text):
        raise ValueError(
            f"data source {source!r} has {len(text)} characters, too few to hold out data.val_fraction={val_fraction}."
        )

    def piece(start: int, stop: int) -> Documents:
        return replace(training, fingerprint=f"{training.fingerprint}[{start}:{stop}c]", read=lambda _: text[start:stop])

    return piece(0, cut), piece(cut, len(text))


class NoSuchSplit(ValueError):
    """The source has no split of that name."""


def _stdlib(split: str) -> Documents:
    """The .py files in which Python itself is written; a tenth of them, by a hash of their path, is validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    keyed = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts):
            keyed.append((hashlib.sha256(name.encode()).hexdigest(), path))
    # In the order of the hash, so that any run of files is a fair sample.
    chosen = [path for key, path in sorted(keyed) if (int(key[:8], 16) % 10 == 0) == (split == "validation")]
    return _text_files(f"{STDLIB} ({split})", root, [p for p in chosen if _is_text(p)])


def _is_text(path: Path) -> bool:
    """A few test files of the standard library are in other encodings, or empty, on purpose."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(data)


def _text_files(name: str, root: Path, paths: list[Path]) -> Documents:
    stats = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]

    def read(i: int) -> str:
        try:
            return paths[i].read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{paths[i]} is not UTF-8 text: {error}. Convert it, or leave it out of {name!r}.") from None

    return Documents(name, fingerprint, len(paths), read)


def _dataset(source: str, files: list[Path], split: str, text_column: str) -> Documents:
    """Table files, a folder that `save_to_disk` wrote, or a name on the hub (`name`, or `name:configuration`)."""
    import datasets  # takes a second, and most runs of the tools need none
    import pyarrow

    path = Path(source).expanduser()
    like_a_file = path.suffix in READERS or path.suffix in (".txt", ".md", ".py")
    if not path.exists() and (like_a_file or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"data source {source!r} does not exist (looked for {path.absolute()}).")
    name, _, configuration = source.partition(":")
    try:
        if files:
            table = datasets.load_dataset(READERS[files[0].suffix], data_files=[str(file) for file in files], split="train")
        elif path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            if split not in splits:
                raise NoSuchSplit(f"data source {source!r} has the splits {sorted(splits)}, not {split!r}.")
            table = splits[split]
        else:
            names = datasets.get_dataset_split_names(name, configuration or None)
            if split not in names:
                raise NoSuchSplit(f"data source {source!r} has the splits {names}, not {split!r}.")
            table = datasets.load_dataset(name, configuration or None, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"data source {source!r} is no local file or folder, and the hub has no such dataset, or cannot be reached: {error}"
        ) from None
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, StopIteration, OSError) as error:
        raise ValueError(f"data source {source!r} cannot be read: {error.__cause__ or error or 'it is empty'}.") from None
    if text_column not in table.column_names:
        raise ValueError(
            f"data source {source!r} has the columns {table.column_names}; data.text_column={text_column!r} is none."
        )

    def read(i: int) -> str:
        text = table[i][text_column]
        if not isinstance(text, str):
            raise ValueError(f"data source {source!r}: document {i} has {text!r} in column {text_column!r}, which is no text.")
        return text

    return Documents(source, table._fingerprint, len(table), read)
