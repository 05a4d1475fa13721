"""Recall of small hybrids, Mamba-2 and Transformers against the number of pairs in the text.

`python configs/experiments/recall/run.py`, from the repository's root, trains every model by `python -m train`, two at a time
with a thread each, and asks all of them the same questions; docs/recall.md tells what came out. What is trained already is not
trained again.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from configs.experiments.trainings import facts, train_all
from eval.longcontext import accuracy, ask, most_tokens
from eval.models import open_model
from eval.synthetic import FIRST_NAMES, TASKS, Question, Task, exact, mqar, phonebook, training_texts
from hybridlm import HybridLMConfig
from hybridlm.checkpoint import load_tokenizer
from hybridlm.output import quiet, write_json
from hybridlm.tokenizer import END, PAD, with_specials
from hybridlm.twin import count_parameters

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "results.json", HERE.parents[2] / "docs/img/recall.png"
POOL = 32  # keys and values, or names, that texts are made of
QUESTIONS = 200  # of each number of pairs


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        lr, init: learning rate and initializer_range: of a few that were tried, those with which it learned soonest.
        phases: shares of the training at which other texts begin; kinds: which of the experiment's are those of each phase. In
            texts of two pairs attention finds out soonest how to look something up; Mamba-2 learns to get by without in these.
    """

    pattern: str
    lr: float
    init: float
    phases: tuple[float, ...]
    kinds: tuple[int, ...]

    def share(self, kind: int) -> float:
        """Of the training, in texts of this kind."""
        ends = (*self.phases, 1.0)
        return sum(end - start for start, end, k in zip((0.0, *self.phases), ends, self.kinds) if k == kind)


MODELS = {
    "hybrid": Recipe("M-*-", 5e-3, 0.08, (0.35, 0.5, 0.65), (0, 1, 2, 3)),
    "Mamba-2": Recipe("M-M-", 1e-2, 0.05, (0.65,), (2, 3)),
    "Transformer": Recipe("*-*-", 3e-3, 0.08, (0.6, 0.75, 0.85), (0, 1, 2, 3)),
}
# A state of 4 rows for each channel: so small that what it cannot hold shows at few pairs; with 16, thirty pairs are no trouble.
# With biases in attention a head can look one token back whatever stands there.
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "attention_bias": True, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Texts of `length` tokens, their end among them, with these numbers of pairs."""

    length: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        texts: what is trained on. The length of the last ones is a multiple of each.
        pairs: what is asked.
        steps, batch: of a training; a sequence is as long as the last texts. seeds: trainings of each model.
        models: how each is trained.
    """

    task: Task
    texts: tuple[Texts, ...]
    pairs: tuple[int, ...]
    steps: int
    batch: int
    seeds: int
    models: dict[str, Recipe]

    @property
    def length(self) -> int:
        return self.texts[-1].length


EXPERIMENTS = {
    "mqar": Experiment(
        task=replace(TASKS["mqar"], make=partial(mqar, pool=POOL), smallest=2, largest=POOL),
        texts=(Texts(16, (2, 3)), Texts(32, (2, 4, 6)), Texts(64, (4, 8, 15)), Texts(128, (4, 8, 16, 30))),
        pairs=(2, 4, 8, 16, 30),
        steps=1500,
        batch=8,
        seeds=3,
        models=MODELS,
    ),
    "phonebook": Experiment(
        task=replace(
            TASKS["phonebook"],
            make=partial(phonebook, digits=2, first_names=FIRST_NAMES[:POOL], last_names=()),
            smallest=2,
            largest=POOL,
        ),
        texts=(Texts(12, (2,)), Texts(24, (2, 3)), Texts(48, (4, 8)), Texts(96, (4, 8, 16))),
        pairs=(2, 4, 8, 16),
        steps=2000,
        batch=11,
        seeds=1,
        models=MODELS | {"Mamba-2": replace(MODELS["Mamba-2"], phases=(0.3, 0.6), kinds=(1, 2, 3))},
    ),
}


def config(pattern: str, vocab_size: int) -> dict[str, Any]:
    """The shape of a model as large as the pure Mamba-2 by the width of its FFN, with RoPE where nothing else tells the order."""
    shape = SHAPE | {"vocab_size": vocab_size, "hybrid_override_pattern": pattern}
    if "M" not in pattern:
        shape["rope_theta"] = 10000.0
    size, wanted = (
        count_parameters(HybridLMConfig(**shape | {"hybrid_override_pattern": p})) for p in (pattern, MODELS["Mamba-2"].pattern)
    )
    shape["intermediate_size"] += round((wanted - size) / (2 * SHAPE["hidden_size"] * pattern.count("-")))
    return shape


def run_config(out: Path, name: str, model: str, seed: int, vocab_size: int) -> dict[str, Any]:
    """What `python -m train` is given."""
    e, recipe = EXPERIMENTS[name], EXPERIMENTS[name].models[model]
    return {
        "run_dir": str(out / name / f"{model.lower()}-{seed}"),
        "seed": seed,
        "model": {"config": config(recipe.pattern, vocab_size) | {"initializer_range": recipe.init}},
        "data": {
            "blend": [
                {
                    "source": str(out / name / f"{t.length}.jsonl"),
                    "weight": [float(k == kind) for k in recipe.kinds],
                }
                for kind, t in enumerate(e.texts)
                if kind in recipe.kinds
            ],
            "phases": list(recipe.phases),
            "val_fraction": 0.1,
            "tokenizer": str(out / name / "tokenizer"),
            "seq_len": e.length,
            "cache_dir": str(out / "cache"),
        },
        "optim": {"name": "adamw", "lr": recipe.lr, "weight_decay": 0.01},
        "schedule": {"warmup": 0.12, "decay": 0.3, "decay_type": "linear", "min_lr_ratio": 0.02},
        "train": {
            "steps": e.steps, "global_batch": e.batch, "checkpoint_every": e.steps, "val_every": e.steps, "val_sequences": 16,
        },
        "log": {"every": 50, "sample_tokens": 0},
    }  # fmt: skip


def write_texts(out: Path, name: str) -> None:
    """The texts of each length, so many that none is read twice, and a tokenizer for which a word is a token."""
    e, folder = EXPERIMENTS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer").exists():
        return
    tokenizer = word_tokenizer(training_texts(name, e.task, [e.task.largest], len, 10**5, 30, 1))
    count = partial(most_tokens, [tokenizer])
    for kind, t in enumerate(e.texts):
        share = max(recipe.share(kind) for recipe in e.models.values())
        number = math.ceil(share * e.steps * e.batch * e.length / t.length / 0.9)  # a tenth is held out
        texts = training_texts(name, e.task, t.sizes, count, t.length - 1, number, 0)
        bar = tqdm(texts, desc=f"{name}: {t.length} tokens", total=number, unit=" texts")
        lines = [json.dumps({"text": text}) + "\n" for text in bar]
        (folder / f"{t.length}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")


def word_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """The words of `texts`, with the space before and the colon after them, and numbers of two digits: nothing else, so that the
    model is small."""
    backend = Tokenizer(models.WordLevel(unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+:?| ?\d{1,2}| ?[^\s\p{L}\d]|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[END, PAD], show_progress=False))
    return with_specials(backend)


def questions(task: Task, pairs: int, number: int) -> list[Question]:
    """The same for every model; the asked pair stands anywhere."""
    made = []
    for i in range(number):
        rng = Random(f"question {pairs} {i}")
        made.append(task.make(rng, pairs, rng.random()))
    return made


def answers(folder: str, name: str, pairs: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each number of pairs, of the model in this folder."""
    quiet()
    torch.set_num_threads(1)
    model, tokenizer = open_model(folder)
    rows = []
    for size in pairs:
        outcomes = ask(model, tokenizer, questions(EXPERIMENTS[name].task, size, QUESTIONS), exact, 50, folder)
        rows.append({"pairs": size, **accuracy(outcomes), "questions": QUESTIONS})
    return rows


def results(out: Path) -> list[dict[str, Any]]:
    """Trains and asks every model; what is done already is not done again."""
    plan = [(name, model, seed) for name, e in EXPERIMENTS.items() for seed in range(e.seeds) for model in MODELS]
    for name in EXPERIMENTS:
        write_texts(out, name)
    sizes = {name: len(load_tokenizer(str(out / name / "tokenizer"))) for name in EXPERIMENTS}
    folders = train_all([run_config(out, name, model, seed, sizes[name]) for name, model, seed in plan])
    rows = []
    for (name, model, seed), folder in zip(plan, tqdm(folders, desc="asking", unit=" models")):
        for row in answers(str(folder / "model"), name, EXPERIMENTS[name].pairs):
            rows.append({"task": name, "model": model, "pattern": MODELS[model].pattern, "seed": seed, **row, **facts(folder)})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Mean accuracy over seeds and its standard error, from the spread between the seeds, by task, model and pairs."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["model"], row["pairs"]), []).append(row)
    return {
        key: (mean(r["accuracy"] for r in group), stdev(r["accuracy"] for r in group) / len(group) ** 0.5)
        if len(group) > 1
        else (group[0]["accuracy"], group[0]["stderr"])
        for key, group in found.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each task and model, a column for each number of pairs."""
    found = summary(rows)
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        pairs = sorted({row["pairs"] for row in rows if row["task"] == task})
        lines += [f"| {task}, pairs | {' | '.join(map(str, pairs))} |", "|---" * (len(pairs) + 1) + "|"]
        for model in MODELS:
            cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in (found[task, model, n] for n in pairs)]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against pairs, a line for each model, side by side for the tasks."""
    found, tasks = summary(rows), list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.2 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        pairs = sorted({row["pairs"] for row in rows if row["task"] == task})
        for model, colour, marker, size in zip(MODELS, ("#0072b2", "#d55e00", "#5b616b"), "os^", (10, 6, 5)):
            means, errors = zip(*(found[task, model, n] for n in pairs))
            label = f"{model} ({MODELS[model].pattern})"
            axes.errorbar(pairs, means, errors, color=colour, marker=marker, ms=size, capsize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(pairs, [str(n) for n in pairs])
        axes.set(title=task, xlabel="pairs in the text", ylabel="accuracy", ylim=(-0.03, 1.05))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(MODELS))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of texts and runs")
    out = parser.parse_args(argv).out
    rows = results(out)
    write_json({"rows": rows}, RESULTS)
    draw(rows, FIGURE)
    print(table(rows))


if __name__ == "__main__":
    main()
