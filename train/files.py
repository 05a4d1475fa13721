"""The file operations of a run, each through `perform`, so that tests can count them, fail them, kill at them and replay them.

A file is durable once it and the folder that names it have been synced; a rename is atomic.
"""

import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

BLOCK = 2**24


def perform(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Every operation of this module that touches the disk passes here."""
    return operation(*arguments)


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """A new file, durable but for its name (`sync`). Returns its sha256, of what was meant to be written."""
    digest = sha256()
    descriptor = perform(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for block in blocks:
            rest = memoryview(block)
            digest.update(rest)
            while rest:
                rest = rest[perform(os.write, descriptor, rest[:BLOCK]) :]
        perform(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def sha256_of(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """Of a file; `advance` is told how many bytes more have been read."""
    total = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
            advance(len(block))
    return total.hexdigest()


def write_text(path: Path, text: str) -> str:
    return write(path, [text.encode()])


def replace_text(path: Path, text: str) -> None:
    """The file has its old content or the new one, whatever happens in between."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    write_text(unfinished, text)
    rename(unfinished, path)


def make_folder(path: Path) -> None:
    """Makes the folder, and those above it that are missing, durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        perform(os.mkdir, folder)
        sync(folder.parent)


def rename(old: Path, new: Path) -> None:
    """Atomic and durable; a file of the new name is replaced."""
    perform(os.replace, old, new)
    for folder in dict.fromkeys((new.parent, old.parent)):  # in this order it has two names for a moment, never none
        sync(folder)


def link(target: Path, path: Path) -> None:
    """Points the symbolic link `path` at `target` (as it is written, relative to the link) in one rename."""
    fresh = path.with_name(f".{path.name}.new")
    if fresh.is_symlink() or fresh.exists():
        perform(os.unlink, fresh)
    perform(os.symlink, target, fresh)
    rename(fresh, path)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove(child)
        perform(os.rmdir, path)
    else:
        perform(os.unlink, path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        perform(os.fsync, descriptor)
    finally:
        os.close(descriptor)
