"""The model card: what a folder holds, in the words of the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCardData

from hybridlm import HybridLMConfig
from hybridlm.classification import AnyModel
from hybridlm.pattern import SYMBOLS
from hybridlm.twin import active_parameters, count_parameters
from train.config import dump
from train.settings import RunConfig
from train.validation import figures

# Of a language model, and of a classifier: the task, and how the Auto class goes on.
TASKS = (("text-generation", "CausalLM"), ("text-classification", "SequenceClassification"))


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
    (task, auto), what = TASKS[bool(labels)], "A classifier" if labels else "A language model"
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=tags(shape),
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

{what}{labels} of {total:,} parameters{experts}. {layers(shape)}

Trained with hybridlm{begun} for {step:,} of {config.train.steps:,} steps, {tokens:,} tokens
in windows of {config.data.seq_len:,}, on {data}.

## Evaluation

{evaluation(validation, data, config)}

## Use

{usage(shape, auto)}

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


def merged_card(shape: HybridLMConfig, kind: str, name: str, total: int, merged: Sequence[str]) -> str:
    """The README.md of a folder whose weights are the mean of several.

    Args:
        kind: the class of the model. total: parameters. merged: what the models are called.
    """
    names = "\n".join(f"- `{one}`" for one in merged)
    task, auto = TASKS[kind.endswith("ForSequenceClassification")]
    head = ModelCardData(library_name="transformers", pipeline_tag=task, tags=[*tags(shape), "merge"], model_name=name)
    return f"""---
{head.to_yaml()}
---

# {name}

The plain mean of the weights of {len(merged)} models of {total:,} parameters, made with hybridlm. {layers(shape)}

Merged:

{names}

## Evaluation

Not evaluated yet.

## Use

{usage(shape, auto)}
"""


def tags(shape: HybridLMConfig) -> list[str]:
    family = "nemotron_h" if shape.is_nemotron_h else "hybridlm"
    return ["hybrid", *["mamba2"] * ("M" in shape.hybrid_override_pattern), family]


def layers(shape: HybridLMConfig) -> str:
    legend = ", ".join(f"{symbol} {kind}" for symbol, kind in SYMBOLS.items() if symbol in shape.hybrid_override_pattern)
    return f"Layers: `{shape.hybrid_override_pattern}`\n({legend})."


def usage(shape: HybridLMConfig, auto: str) -> str:
    """How to open it with `AutoModelFor{auto}`."""
    return f"""```python
from transformers import AutoModelFor{auto}, AutoTokenizer
{"" if shape.is_nemotron_h else "import hybridlm  # which stock transformers cannot hold"}
model = AutoModelFor{auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
