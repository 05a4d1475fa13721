"""Opening a model folder: what is checked before and after transformers reads it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

LOADING_FAULTS = {"missing_keys": "missing", "unexpected_keys": "unknown", "mismatched_keys": "of another shape"}


def check_folder(folder: str | Path, subfolder: str = "") -> None:
    """
    Raises:
        ValueError: `folder` is on this machine and no model folder, or can be no name on the hub.
    """
    path = Path(folder).expanduser()
    if path.exists() and not (path / subfolder / "config.json").is_file():
        where = Path(folder) / subfolder
        raise ValueError(f"{where} is no checkpoint folder: it has no config.json. A run keeps its newest model in RUN/model.")
    if (path / subfolder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter_config.json, which could name other weights; merge the adapter into its model first."
        )
    if not path.exists() and (str(folder).startswith((".", "/", "~")) or str(folder).count("/") != 1):
        raise ValueError(f"there is no checkpoint folder {folder}. A run keeps its newest model in RUN/model.")


def check_shards(folder: str | Path, subfolder: str = "", variant: str | None = None, **download: Any) -> None:
    """Checks the index of sharded weights before anything that it names is opened.

    Args:
        folder: a folder, or a name on the hub, of which the index (of the `variant`) is fetched; `download` as in `cached_file`.

    Raises:
        ValueError: it is no index, or names a file outside the folder: by `..`, by an absolute path or through a link.
    """
    path = Path(folder).expanduser() / subfolder
    if Path(folder).expanduser().exists():
        indexes = sorted(path.rglob("*.safetensors.index*.json"))
    else:
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        name = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json") if variant else SAFE_WEIGHTS_INDEX_NAME
        found = cached_file(str(folder), name, subfolder=subfolder, **download, **missing)
        indexes = [] if found is None else [Path(found)]
        path = indexes[0].parent if indexes else path
    for index in indexes:
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
            content["metadata"].keys()
            outside = [name for name in names if not _is_inside(path, name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights: {type(error).__name__}: {error}.") from None
        if outside:
            raise ValueError(f"{index} names files outside its folder, which are not opened: {', '.join(map(repr, outside))}.")


def _is_inside(folder: Path, name: str) -> bool:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    roots = [folder.resolve()]
    # In the hub's own cache the files of a snapshot are links to the blobs beside.
    roots += [(parent.parent / "blobs").resolve() for parent in folder.parents if parent.name == "snapshots"]
    return any((folder / name).resolve().is_relative_to(root) for root in roots)


def weight_faults(info: dict[str, Any]) -> list[str]:
    """What transformers' loading report says did not fit, all of it."""
    return [f"{kind}: {', '.join(sorted(map(str, info[key])))}" for key, kind in LOADING_FAULTS.items() if info[key]]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        ValueError: there is none, or two of its tokens share an id.
    """
    path = Path(folder).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.exists() else folder, trust_remote_code=False)
        ids = Counter(tokenizer.get_vocab().values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a broken tokenizer.json fails in many ways, the panic of tokenizers' Rust among them
        raise ValueError(
            f"{folder} has no tokenizer that can be read (tokenizer.json): {type(error).__name__}: {error}"
        ) from None
    if shared := sorted(i for i, count in ids.items() if count > 1):
        raise ValueError(
            f"the tokenizer of {folder} gives several tokens one id (such as {shared[0]}); no text could be read back."
        )
    return tokenizer
