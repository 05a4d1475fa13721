"""Weights that a run starts from: those of any model folder, of this library, of transformers or of NVIDIA."""

import json
import re
from pathlib import Path

from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hybridlm.checkpoint import check_folder, check_shards
from train.ranks import together
from train.tensor_files import Stored, mismatch, read, stored


def load_weights(folder: str | Path, model: PreTrainedModel, group: ProcessGroup | None = None, only: str = "") -> None:
    """Fills a model with the weights of a `from_pretrained` folder on this machine, of any floating point numbers. A rank reads
    only what it has of the model, and what its parameters held is never looked at. Nothing is changed before all is checked. All
    ranks of the group must call it.

    Args:
        only: the weights whose names begin so; the others stay as they are.

    Raises:
        ValueError: no such folder, weights outside of it, or weights that do not fit: all listed.
    """
    together(group, lambda: _fill_weights(folder, model, group, only))


def _fill_weights(folder: str | Path, model: PreTrainedModel, group: ProcessGroup | None, only: str) -> None:
    got = stored_weights(folder)
    want, ignored = model.state_dict(), model._keys_to_ignore_on_load_unexpected or []
    want, got = ({name: one for name, one in some.items() if name.startswith(only)} for some in (want, got))
    got = {name: one for name, one in got.items() if name in want or not any(re.search(pattern, name) for pattern in ignored)}
    if faults := mismatch("weights", want, got, cast=True):
        raise ValueError(f"the weights of {folder} do not fit this model: {'; '.join(faults)}.")
    read(got, want, group)


def stored_weights(folder: str | Path) -> dict[str, Stored]:
    """The weights of a `from_pretrained` folder on this machine, by name.

    Raises:
        ValueError: no such folder, no weights, or weights outside of it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder} on this machine.")
    check_folder(path)
    check_shards(path)
    if (path / SAFE_WEIGHTS_NAME).exists():  # before an index, as in transformers
        return stored([path / SAFE_WEIGHTS_NAME])
    if not (index := path / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise ValueError(f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found = {file: stored([path / file]) for file in sorted(set(file_of.values()))}
    return {name: found[file][name] for name, file in file_of.items() if name in found[file]}
