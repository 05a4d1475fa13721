"""The model card: what a folder holds, in the words of the hub."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCardData

from hybridlm import HybridLMConfig
from hybridlm.classification import AnyModel
from hybridlm.pattern import SYMBOLS
from hybridlm.twin import active_parameters, count_parameters
from train.config import RunConfig, dump
from train.validation import figures


def model_card(config: RunConfig, model: AnyModel, data: str, step: int, tokens: int, validation: dict[str, Any] | None) -> str:
    """The README.md of a model folder.

    Args:
        data: what was trained on. tokens: read so far.
        validation: the last validation line of the metrics, None before the first.
    """
    name, shape = Path(config.run_dir).name, cast(HybridLMConfig, model.config)
    idle = count_parameters(shape) - active_parameters(shape)
    total = sum(p.numel() for p in model.parameters())
    active, labels = total - idle, "" if config.data.label_column is None else f" into {shape.num_labels} labels"
    experts = "" if active == total else f", of which {active:,} work on a token"
    begun = f" from the weights of `{config.model.init_from}`" if config.model.init_from else ""
    teacher = config.distill.teacher or config.distill.logits
    begun += f", distilled from `{teacher}`," if teacher else ""
    task, auto, what = ("text-classification", "SequenceClassification", "A classifier") if labels else (
        "text-generation", "CausalLM", "A language model"
    )  # fmt: skip
    legend = ", ".join(f"{symbol} {kind}" for symbol, kind in SYMBOLS.items() if symbol in shape.hybrid_override_pattern)
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[
            "hybrid",
            *["mamba2"] * ("M" in shape.hybrid_override_pattern),
            "nemotron_h" if shape.is_nemotron_h else "hybridlm",
        ],
        model_name=name,
        eval_results=[
            EvalResult(task, "text", data, metric, validation[metric], dataset_split="validation", metric_name=words)
            for metric, words in figures(config).items()
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

{what}{labels} of {total:,} parameters{experts}. Layers: `{shape.hybrid_override_pattern}`
({legend}).

Trained with hybridlm{begun} for {step:,} of {config.train.steps:,} steps, {tokens:,} tokens
in windows of {config.data.seq_len:,}, on {data}.

## Evaluation

{evaluation(validation, data, config)}

## Use

```python
from transformers import AutoModelFor{auto}, AutoTokenizer
{"" if shape.is_nemotron_h else "import hybridlm  # which stock transformers cannot hold"}
model = AutoModelFor{auto}.from_pretrained(folder)
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
    of_text = config.data.label_column is None
    chosen = "spread evenly" if of_text else "drawn once"
    windows = "all windows" if config.train.val_sequences is None else f"{config.train.val_sequences:,} windows, {chosen},"
    return (
        f"After {validation['tokens']:,} tokens, on {windows} of the validation documents of {data}, "
        + ("with no state carried between windows: " if of_text else "each by itself: ")
        + ", ".join(f"{validation[name]:.4f} {unit}" for name, unit in figures(config).items())
        + "."
    )
