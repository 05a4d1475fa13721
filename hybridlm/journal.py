"""Results so far, on disk: a command that was interrupted goes on where it stopped."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

SUFFIX = ".partial.jsonl"


class Journal:
    """One line of `FILE.partial.jsonl` for each result, written as soon as it is there; without a file nothing is kept.

    Args:
        path: where the command will write its figures; None or "-" for none.
        command: what the results depend on (JSON): results of other settings are not taken for these.
        remedy: what to do where there are such.

    Raises:
        ValueError: the file has results of a command with other settings, or is none of ours.
    """

    def __init__(
        self,
        path: str | None,
        command: dict[str, Any],
        remedy: str = "Finish that one, give another --json, or delete the file.",
    ):
        self.remedy = remedy
        self.results: dict[str, Any] = {}
        self.file = None if path in (None, "-") else Path(f"{path}{SUFFIX}")
        self.head = {"command": json.loads(json.dumps(command))}
        if self.file is not None and self.file.exists():
            self._read()

    def _read(self) -> None:
        assert self.file is not None
        text = self.file.read_text(encoding="utf-8")
        try:
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            self.results = {line["key"]: line["value"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} has no results that can be read ({error!r}); delete the file.") from None
        if lines and lines[0] != self.head:
            raise ValueError(f"{self.file} has the results so far of a command with other settings. {self.remedy}")
        whole = text[: text.rfind("\n") + 1]  # the last line may be half written
        if whole != text:
            os.truncate(self.file, len(whole.encode()))

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What the journal has for `key`, else what `make` gives (JSON), which is then kept."""
        if key not in self.results:
            self.keep(key, make())
        return self.results[key]

    def keep(self, key: str, value: Any) -> None:
        self.results[key] = value
        if self.file is not None:
            new = not self.file.exists() or not self.file.stat().st_size
            with self.file.open("a", encoding="utf-8") as file:
                for line in [self.head] * new + [{"key": key, "value": value}]:
                    file.write(json.dumps(line) + "\n")


def identity(name: str) -> str:
    """Changes when the files of a model folder do: by their names, sizes and times. Of a name on the hub, the name.

    Results are no part of a model, and may lie beside it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file() and not path.name.endswith(SUFFIX))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]
