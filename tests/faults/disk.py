"""A model of a disk that loses its power: what may be on it afterwards, by what has been synced and what has not.

The content of a file is safe once the file has been synced, a name once its folder has. Of the rest anything may have reached the
disk: a file's bytes in part, as zeros or not at all; of the changes to a folder any, in their order. A rename within a
folder is one change; into another folder it is two, and either may be lost.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = tuple[Any, ...]


@dataclass(eq=False)
class File:
    content: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    entries: dict[str, Any] = field(default_factory=dict)  # File, Folder, or the target of a link
    synced: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)  # name -> what it names now, None where it is gone

    def change(self, change: dict[str, Any]) -> None:
        self.entries = after(self.entries, change)
        self.pending.append(change)


def after(entries: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in (entries | change).items() if node is not None}


def recorder(log: list[Event]) -> Callable[..., Any]:
    """A `files.perform` that also appends what it did to `log`, in the order in which it was done."""
    one_at_a_time = threading.Lock()

    def record(operation: Callable[..., Any], *arguments: Any) -> Any:
        with one_at_a_time:
            result = operation(*arguments)
            if operation in (os.write, os.fsync):  # the path that the descriptor is open at
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                log.append((operation.__name__, path, *(bytes(data[:result]) for data in arguments[1:])))
            else:
                log.append((operation.__name__, *arguments))
            return result

    return record


class Disk:
    """The folder `root`, empty and synced at first."""

    def __init__(self, root: Path):
        self.root, self.top = root, Folder()

    def find(self, path: Path) -> Any:
        node: Any = self.top
        for name in path.relative_to(self.root).parts:
            node = node.entries[name]
        return node

    def apply(self, event: Event) -> None:
        kind, *arguments = event
        if kind == "write":
            self.find(arguments[0]).content += arguments[1]
        elif kind == "fsync" and arguments[0].name == "metrics.jsonl":
            pass  # its lines are appended past `perform`: it is not on this disk
        elif kind == "fsync":
            node = self.find(arguments[0])
            if isinstance(node, File):
                node.synced = node.content
            else:
                node.synced, node.pending = node.entries, []
        elif kind == "replace":
            old, new = arguments
            source, target, node = self.find(old.parent), self.find(new.parent), self.find(old)
            if source is target:
                source.change({old.name: None, new.name: node})
            else:
                target.change({new.name: node})
                source.change({old.name: None})
        else:
            path = arguments[1] if kind == "symlink" else arguments[0]
            folder = self.find(path.parent)
            if kind == "open" and path.name in folder.entries:
                folder.entries[path.name].content = b""  # O_TRUNC
            else:
                made = {"open": File, "mkdir": Folder, "symlink": lambda: str(arguments[0])}.get(kind, lambda: None)
                folder.change({path.name: made()})


def survivors(folder: Folder, names: Callable, content: Callable, prefix: str = "") -> Iterator[tuple[str, bytes | str | None]]:
    """(path, content) of all that is there after a loss of power; a link has its target, a folder None.

    Args:
        names: which of the pending changes of a folder reached the disk. content: what an unsynced file holds.
    """
    entries = folder.synced
    for change in names(folder.pending):
        if all(name in entries for name, node in change.items() if node is None):  # else it follows on one that was lost
            entries = after(entries, change)
    for name, node in sorted(entries.items()):
        if isinstance(node, Folder):
            yield prefix + name, None
            yield from survivors(node, names, content, f"{prefix}{name}/")
        elif isinstance(node, File):
            yield prefix + name, node.content if node.content == node.synced else content(node)
        else:
            yield prefix + name, node


def ways(rng) -> dict[str, tuple[Callable, Callable]]:
    """How a disk may look: for each way, what `survivors` asks for."""

    def every(pending):
        return pending

    def some(pending):
        return [change for change in pending if rng.random() < 0.5]

    def torn(file):
        return file.content[: rng.randrange(len(file.content))] if file.content else b""

    def zeros(file):
        return bytes(len(file.content))

    def any_of_these(file):
        return rng.choice([torn, zeros, lambda file: file.synced, lambda file: file.content])(file)

    return {
        "nothing unsynced": (lambda pending: [], lambda file: file.synced),
        "names without content": (every, lambda file: file.synced),
        "torn": (every, torn),
        "zeros": (every, zeros),
        "everything": (every, lambda file: file.content),
        **{f"some {i}": (some, any_of_these) for i in range(4)},
    }


def lay_out(state: list[tuple[str, bytes | str | None]], folder: Path) -> None:
    folder.mkdir()
    for name, content in state:
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).symlink_to(content)
