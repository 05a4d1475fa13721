"""Where documents come from: the standard library, local text, JSON lines, prepared tokens, or anything that `datasets` reads."""

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.jsonl import JsonLines
from hybridlm.data.rows import BadDocument, columns, label_of, text_of
from hybridlm.data.sampler import permute
from hybridlm.data.shards import Shards

STDLIB = "stdlib"
# How `datasets` calls the readers of local files.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
END_BYTES = 4096  # of each end of a file, in its stamp
HELD_OUT_KEY = 0x5EED
PACKAGE_FILES = 20  # that a package of the standard library has at least, to be a label


@dataclass(frozen=True)
class Source:
    """Where documents come from, and what of it is their text."""

    source: str
    """`stdlib` (the Python standard library's own files, the same on every machine of one Python version), a text file (one
    document), a folder of text files (one document each), a JSONL (one document a line), JSON, CSV, Parquet or Arrow file or a
    folder of them, a folder that `save_to_disk` wrote, one that `python -m train prepare` wrote, or a dataset on the Hugging Face
    hub: `name` or `name:configuration`"""
    revision: str | None = None
    """commit, tag or branch of a hub dataset"""
    text_column: str = "text"
    """the column of the text, where there are columns"""
    template: str | None = None
    """the text instead, made of several columns: `{question}\\n{answer}`"""
    license: str | None = None
    """what is noted as the licence; default: what the dataset says of itself"""
    label_column: str | None = None
    """the column of the label, where documents are to be classified; of stdlib `package`, the folder that a file is in"""


def never() -> bool:
    return False


@dataclass(frozen=True)
class Documents:
    """Texts that are read when asked for. A process of its own can be handed them.

    Attributes:
        name: what a person calls the source.
        fingerprint: changes when the source does, or what is taken of it.
        read: the text of a number; a `BadDocument` where that one cannot be used.
        size: bytes of all, about.
        changed: whether the source is another than it was when it was opened.
        prepared: the folder that has them as tokens already.
        has_columns: whether a text is made of the columns of a row.
        label: the label of a number, where asked for, with a `BadDocument` as in `read`; a document may then be empty.
    """

    name: str
    fingerprint: str
    count: int
    read: Callable[[int], str]
    size: int = 0
    license: str | None = None
    changed: Callable[[], bool] = never
    prepared: Path | None = None
    has_columns: bool = False
    label: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.read(index)

    def __iter__(self) -> Iterator[str]:
        return (self.read(i) for i in range(self.count))

    def only(self, numbers: np.ndarray, tag: str) -> "Documents":
        """Those of these numbers, in their order. The tag tells their fingerprint from that of the whole."""
        read, size = partial(_numbered, self.read, numbers), self.size * len(numbers) // self.count
        label = None if self.label is None else partial(_numbered, self.label, numbers)
        return replace(self, fingerprint=f"{self.fingerprint}[{tag}]", count=len(numbers), read=read, size=size, label=label)


def _numbered(read: Callable[[int], str], numbers: np.ndarray, i: int) -> str:
    return read(int(numbers[i]))


def open_source(source: Source, split: str) -> Documents:
    """The documents of `source`.

    Args:
        split: `train` or `validation`. A plain file or folder has only `train`.

    Raises:
        ValueError: no such source, split or column, or nothing in it.
    """
    name, path = source.source, Path(source.source).expanduser()
    if source.template is not None:
        columns(source.template)  # a fault in it is one, whatever the source
    if name == STDLIB:
        documents = _stdlib(split, source.label_column)
    elif is_prepared(name):
        documents = _prepared(name, split)
    else:
        documents = _files(source, path, split) if path.exists() else _dataset(source, [], split)
    if not len(documents):
        raise ValueError(f"data source {name!r} ({split}) has no documents; give one that has text.")
    if (source.text_column, source.template) != (Source.text_column, None):
        what = hashlib.sha256(repr((source.text_column, source.template)).encode()).hexdigest()[:16]
        documents = replace(documents, fingerprint=f"{documents.fingerprint}[{what}]")
    if source.label_column is not None:
        if documents.label is None and (documents.prepared is None or not Shards(documents.prepared).meta.get("labels")):
            raise ValueError(
                f"data source {name!r} has no labels; leave data.label_column away, or give rows with a column for them "
                f"({', '.join(READERS)} files, hub datasets)."
            )
        what = hashlib.sha256(source.label_column.encode()).hexdigest()[:16]
        documents = replace(documents, fingerprint=f"{documents.fingerprint}[label {what}]")
    return documents if source.license is None else replace(documents, license=source.license)


def split_source(source: Source, val_source: Source | None, val_fraction: float) -> tuple[Documents, Documents]:
    """Training and validation documents.

    Validation is `val_source` where given; else the source's own validation split where it has one (stdlib, prepared folders,
    hub datasets); else `val_fraction` of its documents, drawn from all over it since a source may be sorted, or, where it is a
    single document, the end of its characters.

    Raises:
        ValueError: as `open_source`; a column or template for what has no columns.
    """
    training = open_source(source, "train")
    if (source.text_column, source.template) != (Source.text_column, None) and not training.has_columns:
        raise ValueError(
            f"data source {source.source!r} is text, or tokens, without columns; leave data.text_column and data.template away "
            f"(rows are read from {', '.join(READERS)} files)."
        )
    if val_source is not None:
        return training, open_validation(val_source)
    try:
        return training, open_source(source, "validation")
    except NoSuchSplit:
        pass
    tag = f"val_fraction={val_fraction}"
    if (count := len(training)) > 1:
        held_out = np.zeros(count, dtype=bool)
        for i in range(min(count - 1, max(1, round(count * val_fraction)))):
            held_out[permute(i, count, HELD_OUT_KEY)] = True
        return training.only(np.flatnonzero(~held_out), f"train, {tag}"), training.only(np.flatnonzero(held_out), tag)
    if training.label is not None:
        raise ValueError(f"data source {source.source!r} has one document, and none to hold out; give more, or data.val_source.")
    length = len(training[0])
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise ValueError(
            f"data source {source.source!r} has {length} characters, too few to hold out data.val_fraction={val_fraction}."
        )

    def piece(start: int, stop: int) -> Documents:
        fingerprint, size = f"{training.fingerprint}[{start}:{stop}c]", training.size * (stop - start) // length
        return replace(training, fingerprint=fingerprint, size=size, read=partial(_characters, training.read, start, stop))

    return piece(0, cut), piece(cut, length)


def open_validation(val_source: Source) -> Documents:
    """What a source that was given for validation holds out of itself, or all of it."""
    try:
        return open_source(val_source, "validation")
    except NoSuchSplit:
        return open_source(val_source, "train")


def _characters(read: Callable[[int], str], start: int, stop: int, i: int) -> str:
    return read(i)[start:stop]


class NoSuchSplit(ValueError):
    """The source has no split of that name."""


def _files(source: Source, path: Path, split: str) -> Documents:
    """Local files: text, JSON lines, tables, or a folder that `save_to_disk` wrote."""
    name, files = source.source, list_files(path)
    stamp = stamp_of(path, files)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        documents = _dataset(source, [], split)
    else:
        kinds = sorted({kind if (kind := suffix_of(p)) in READERS else "text" for p in files})
        if len(kinds) > 1:
            raise ValueError(f"data source {name!r} has files of several kinds: {', '.join(kinds)}; give one kind at a time.")
        if split != "train":
            raise NoSuchSplit(f"data source {name!r} has no {split} split.")
        if kinds == [".jsonl"]:
            lines = JsonLines(files, source.text_column, source.template)
            label = None if source.label_column is None else partial(lines.label, source.label_column)
            documents = Documents(name, "", int(lines.ends[-1]), lines.read, has_columns=True, label=label)
        elif kinds in ([], ["text"]):
            documents = _text_files(name, files)
        else:
            documents = _dataset(source, files, split)
    size = documents.size or sum(file.stat().st_size for file in files)
    return replace(documents, fingerprint=f"{stamp}[{split}]", size=size, changed=partial(_differs, path, stamp))


def list_files(path: Path) -> list[Path]:
    """The files of a folder and of those in it, in the order of their names; or the one file.

    Raises:
        ValueError: a link that would be passed over.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("*"))
    if broken := next((p for p in found if p.is_symlink() and not p.is_file()), None):
        raise ValueError(f"{broken} is a link to a folder or to nothing, which is not followed; put there what it stands for.")
    return [p for p in found if p.is_file()]


def suffix_of(path: Path) -> str:
    """As in READERS."""
    return {".ndjson": ".jsonl"}.get(path.suffix.lower(), path.suffix.lower())


def stamp_of(root: Path, files: list[Path]) -> str:
    """Changes with the names, sizes, times and ends of the files. An archive may give all of its files one time."""
    stats = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns, _ends(p)) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(END_BYTES)
        file.seek(max(0, path.stat().st_size - END_BYTES))
        return hashlib.sha256(first + file.read(END_BYTES)).hexdigest()


def _differs(path: Path, stamp: str) -> bool:
    try:
        return stamp_of(path, list_files(path)) != stamp
    except OSError:  # it is no longer there
        return True


def _stdlib(split: str, label_column: str | None) -> Documents:
    """The .py files in which Python itself is written; a tenth of them, by a hash of their path, is validation.

    With the label `package`, the outermost folder that a file is in: those of the packages of at least PACKAGE_FILES files, of
    which three tenths, by the same hash, are validation: a tenth would be too few to tell models apart.

    Raises:
        ValueError: another label.
    """
    if label_column not in (None, "package"):
        raise ValueError(f"data source {STDLIB!r} has the label 'package' alone; got data.label_column={label_column!r}.")
    root = Path(sysconfig.get_paths()["stdlib"])
    keyed = []
    for folder, inner, names in os.walk(root):
        # Not walked into: what is installed there can be twenty times the library.
        inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__")]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            keyed.append((hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), path))
    if label_column is not None:
        keyed = [(key, path) for key, path in keyed if path.parent != root and _is_text(path)]
        sizes = Counter(package(root, path) for _, path in keyed)
        keyed = [(key, path) for key, path in keyed if sizes[package(root, path)] >= PACKAGE_FILES]
    held_out = 1 if label_column is None else 3  # tenths
    # In the order of the hash, so that any run of files is a fair sample.
    chosen = [path for key, path in sorted(keyed) if (int(key[:8], 16) % 10 < held_out) == (split == "validation")]
    files = [p for p in chosen if _is_text(p)]
    size = sum(file.stat().st_size for file in files)
    documents = _text_files(f"{STDLIB} ({split})", files)
    label = None if label_column is None else partial(_package, root, files)
    return replace(documents, fingerprint=stamp_of(root, files), size=size, license="PSF-2.0", label=label)


def package(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0]


def _package(root: Path, files: list[Path], i: int) -> str:
    return package(root, files[i])


def _is_text(path: Path) -> bool:
    """A few test files of the standard library are in other encodings, or empty, on purpose."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(data)


def _text_files(name: str, paths: list[Path]) -> Documents:
    return Documents(name, "", len(paths), partial(_text, paths))


def _text(paths: list[Path], i: int) -> str:
    try:
        return paths[i].read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{paths[i]}: invalid UTF-8 at byte {error.start}; convert the file to UTF-8, or leave it out."
        raise BadDocument("invalid UTF-8", message) from None


def is_prepared(source: str) -> bool:
    return any((Path(source).expanduser() / split / "meta.json").exists() for split in ("train", "validation"))


def _prepared(source: str, split: str) -> Documents:
    """Documents whose tokens are there already; read as text, they are decoded."""
    folder = Path(source).expanduser() / split
    if not (folder / "meta.json").exists() or not (folder.parent / "tokenizer").is_dir():
        raise ValueError(f"data source {source!r} is not prepared to the end; give the same `python -m train prepare` again.")
    shards = Shards(folder).check()
    meta = shards.meta
    read = partial(_decoded, shards, load_tokenizer(folder.parent / "tokenizer"))
    fingerprint = f"{meta['sha256'][:16]}"
    return Documents(source, fingerprint, meta["documents"], read, meta["bytes"], meta["license"], prepared=folder)


def _decoded(shards: Shards, tokenizer: Any, i: int) -> str:
    start = shards.documents[i - 1, 0] if i else 0
    ids = shards.read(np.arange(start, shards.documents[i, 0] - 1))
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _dataset(source: Source, files: list[Path], split: str) -> Documents:
    """Table files, a folder that `save_to_disk` wrote, or a name on the hub (`name`, or `name:configuration`)."""
    import datasets  # takes a second, and most runs of the tools need none
    import pyarrow

    path = Path(source.source).expanduser()
    like_a_file = suffix_of(path) in (".txt", ".md", ".py", *READERS)
    if not path.exists() and (like_a_file or source.source.startswith((".", "/", "~")) or source.source.count("/") > 1):
        raise ValueError(f"data source {source.source!r} does not exist (looked for {path.absolute()}).")
    name, _, configuration = source.source.partition(":")
    try:
        if files:
            # Escaped, since a name is taken for a pattern. The stamp is in the name under which `datasets` keeps what it read,
            # for it goes by path and time alone. What a CSV has is text: 007, NA and an empty field mean themselves.
            reader, names = READERS[suffix_of(files[0])], [glob.escape(str(file)) for file in files]
            wanted = wanted_columns(source)
            as_text = {"keep_default_na": False, "converters": dict.fromkeys(wanted, str)} if reader == "csv" else {}
            table = datasets.load_dataset(reader, stamp_of(path, files), data_files=names, split="train", **as_text)
        elif path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            if split not in splits:
                raise NoSuchSplit(f"data source {source.source!r} has the splits {sorted(splits)}, not {split!r}.")
            table = splits[split]
        else:
            names = datasets.get_dataset_split_names(name, configuration or None, revision=source.revision)
            if split not in names:
                raise NoSuchSplit(f"data source {source.source!r} has the splits {names}, not {split!r}.")
            table = datasets.load_dataset(name, configuration or None, split=split, revision=source.revision)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"data source {source.source!r} is no local file or folder, and the hub has no such dataset, or cannot be reached: "
            f"{error}"
        ) from None
    except NoSuchSplit:
        raise
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, StopIteration, OSError, ValueError) as error:
        why = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"data source {source.source!r} cannot be read: {why}.") from None
    wanted = wanted_columns(source)
    setting = f"data.text_column={source.text_column!r}" if source.template is None else f"data.template={source.template!r}"
    setting += "" if source.label_column is None else f" with data.label_column={source.label_column!r}"
    if missing := [column for column in wanted if column not in table.column_names]:
        raise ValueError(
            f"data source {source.source!r} has the columns {table.column_names}; {setting} asks for {', '.join(missing)}."
        )
    table = table.select_columns(list(dict.fromkeys(wanted)))
    read = partial(_row, table, source)
    label = None
    if source.label_column is not None:
        kind = table.features[source.label_column]
        label = partial(_label, table, source, kind.names if isinstance(kind, datasets.ClassLabel) else None)
    license, size = table.info.license or None, table.data.nbytes
    return Documents(source.source, table._fingerprint, len(table), read, size, license, has_columns=True, label=label)


def wanted_columns(source: Source) -> list[str]:
    of_text = [source.text_column] if source.template is None else columns(source.template)
    return of_text if source.label_column is None else [*of_text, source.label_column]


def _label(table: Any, source: Source, names: list[str] | None, i: int) -> str:
    assert source.label_column is not None
    return label_of(table[i], source.label_column, names, f"{source.source}, row {i}")


def _row(table: Any, source: Source, i: int) -> str:
    return text_of(table[i], source.text_column, source.template, f"{source.source}, row {i}")
