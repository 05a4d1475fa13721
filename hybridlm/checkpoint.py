"""Opening a model folder, with errors that say what is wrong with it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybridlm.modeling import HybridLMForCausalLM


def load_model(folder: str | Path, *, backend: str = "auto", dtype: torch.dtype = torch.float32) -> HybridLMForCausalLM:
    """A model from a folder that `save_pretrained` wrote (ours or a stock `nemotron_h` one), or by its name on the hub.

    Raises:
        ValueError: no model there, or weights that are missing, unknown or of another shape: all of them listed.
    """
    path = Path(folder).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint folder: it has no config.json. A run keeps its newest model in RUN/model.")
    if not path.exists() and (str(folder).startswith((".", "/", "~")) or str(folder).count("/") != 1):
        raise ValueError(f"there is no checkpoint folder {folder}. A run keeps its newest model in RUN/model.")
    try:
        loaded: Any = HybridLMForCausalLM.from_pretrained(
            path if path.exists() else str(folder),
            backend=backend,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            ignore_mismatched_sizes=True,  # so that they are all listed below
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is no checkpoint: {error}") from None
    model, info = loaded
    faults = [f"{kind}: {sorted(map(str, info[key]))}" for key, kind in LOADING_FAULTS.items() if info[key]]
    if faults:
        raise ValueError(f"the weights of {folder} do not fit its config.json; {'; '.join(faults)}.")
    return model.eval()


LOADING_FAULTS = {"missing_keys": "missing", "unexpected_keys": "unknown", "mismatched_keys": "of another shape"}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(Path(folder).expanduser() if Path(folder).expanduser().exists() else folder)
    except Exception as error:  # a broken tokenizer.json fails in many ways
        raise ValueError(
            f"{folder} has no tokenizer that can be read (tokenizer.json): {type(error).__name__}: {error}"
        ) from None
