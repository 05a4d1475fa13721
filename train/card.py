"""The model card: what a folder holds, in the words of the hub."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCardData

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.twin import active_parameters, count_parameters
from train.config import RunConfig, dump

METRICS = {"val_loss": "nats per token", "val_bits_per_byte": "bits per byte"}


def model_card(
    config: RunConfig, model: HybridLMForCausalLM, data: str, step: int, tokens: int, validation: dict[str, Any] | None
) -> str:
    """The README.md of a model folder.

    Args:
        data: what was trained on. tokens: read so far.
        validation: the last validation line of the metrics, None before the first.
    """
    name, shape = Path(config.run_dir).name, cast(HybridLMConfig, model.config)
    total, active = count_parameters(shape), active_parameters(shape)
    experts = "" if active == total else f", of which {active:,} work on a token"
    begun = f" from the weights of `{config.model.init_from}`" if config.model.init_from else ""
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hybrid", "mamba2", "nemotron_h" if shape.is_nemotron_h else "hybridlm"],
        model_name=name,
        eval_results=[
            EvalResult("text-generation", "text", data, metric, validation[metric], dataset_split="validation", metric_name=words)
            for metric, words in METRICS.items()
        ]
        if validation
        else None,
    )
    places = ("run_dir", "cache_dir")  # of this machine
    settings = "\n".join(line for line in dump(config).splitlines() if line.strip().split(":")[0] not in places)
    return f"""---
{head.to_yaml()}
---

# {name}

A language model of {total:,} parameters{experts}. Layers: `{shape.hybrid_override_pattern}`
(M Mamba-2, * attention, - FFN, E mixture of experts).

Trained with hybridlm{begun} for {step:,} of {config.train.steps:,} steps, {tokens:,} tokens
in windows of {config.data.seq_len:,}, on {data}.

## Evaluation

{evaluation(validation, data, config)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{"" if shape.is_nemotron_h else "import hybridlm  # which stock transformers cannot hold"}
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Settings

```yaml
{settings}
```
"""


def evaluation(validation: dict[str, Any] | None, data: str, config: RunConfig) -> str:
    if validation is None:
        return "Not evaluated yet."
    windows = "all windows" if config.train.val_sequences is None else f"{config.train.val_sequences:,} windows, spread evenly,"
    return (
        f"After {validation['tokens']:,} tokens, on {windows} of the validation documents of {data}, "
        "with no state carried between windows: "
        f"{validation['val_loss']:.4f} nats per token, {validation['val_bits_per_byte']:.4f} bits per byte."
    )
