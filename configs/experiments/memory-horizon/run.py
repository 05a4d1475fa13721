"""How far Elman's network, LSTM, GRU, Mamba, Mamba-2, attention and the hybrid remember, at equal parameters.

`python configs/experiments/memory-horizon/run.py`, from the repository's root, trains every model by `python -m train`, two at a
time with a thread each, measures all of them, and writes results.json and docs/img/memory-horizon.png beside each other;
docs/memory-horizon.md tells what came out. What is trained already is not trained again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from configs.experiments.trainings import facts, metrics, train_all
from eval import throughput
from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification
from hybridlm.output import quiet, write_json
from hybridlm.tokenizer import byte_tokenizer
from hybridlm.twin import count_parameters

HERE = Path(__file__).parent
FIGURE = HERE.parents[2] / "docs/img/memory-horizon.png"
SEEDS = 3


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        recall_lr, text_lr: learning rates, of a few that were tried with the first seed.
        extra: what its shape has beside `SHAPE`.
    """

    pattern: str
    recall_lr: float
    text_lr: float
    extra: dict[str, Any]


# States of such widths that the mixers have about the same size; the width of the FFN makes the models equal.
MODELS = {
    "Elman RNN": Recipe("r-r-", 2e-3, 5e-3, {"recurrent_size": 128}),
    "LSTM": Recipe("l-l-", 5e-3, 1e-2, {"recurrent_size": 64}),
    "GRU": Recipe("g-g-", 5e-3, 1e-2, {"recurrent_size": 72}),
    "Mamba": Recipe("m-m-", 5e-3, 1e-2, {}),
    "Mamba-2": Recipe("M-M-", 5e-3, 1e-2, {}),
    "attention": Recipe("*-*-", 3e-3, 5e-3, {}),
    "hybrid": Recipe("M-*-", 3e-3, 1e-2, {}),
}
SHAPE: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 64,
    "initializer_range": 0.06,
}  # fmt: skip
REFERENCE = "hybrid"  # whose size all have, and whose time the others get in "equal time"

# (a) Which capital stands in these small letters, so many steps before the end?
MARKED, NOISE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
LEAD = 4  # up to so many small letters before the capital
STEPS = 256  # of a training
QUESTIONS = 200  # for each number of steps
HORIZON = 0.9  # accuracy up to which a model is said to remember

# (b) Gradients, estimated with so many rows of text and random directions.
ROWS, DIRECTIONS = 4, 8

# (c) Text by byte.
TEXT = {"seq_len": 256, "global_batch": 8, "steps": 450}

# (d) Speed.
LENGTHS = (64, 256, 1024, 4096)
SPEED_TOKENS = 4096  # of a training step, whatever the length
TURNS = 3

NEW = 32


def shape(model: str, **changes: Any) -> dict[str, Any]:
    """Of the size of the reference by the width of its FFN."""
    recipe = MODELS[model]
    values = SHAPE | recipe.extra | {"hybrid_override_pattern": recipe.pattern} | changes
    wanted, size = (
        count_parameters(HybridLMConfig(**v)) for v in (SHAPE | {"hybrid_override_pattern": MODELS[REFERENCE].pattern}, values)
    )
    values["intermediate_size"] += round((wanted - size) / (2 * SHAPE["hidden_size"] * recipe.pattern.count("-")))
    return values


# (a) Recall


def steps_asked(longest: int) -> list[int]:
    return [2**i for i in range(1, longest.bit_length())]


def recall_text(rng: Random, steps: int) -> tuple[str, str]:
    """A text whose last token, the end that is set behind it, comes `steps` after its only capital; and the capital."""
    capital = rng.choice(MARKED)
    before, after = (rng.choices(NOISE, k=k) for k in (rng.randrange(LEAD), steps - 1))
    return "".join([*before, capital, *after]), capital


def write_recall_texts(file: Path, longest: int, tokens: int) -> None:
    """So many that none is read twice; steps are as often between 2 and 4 as between 256 and 512."""
    if file.exists():
        return
    rng, left = Random("training"), 1.2 * tokens
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        while left > 0:
            text, capital = recall_text(rng, round(2 * (longest / 2) ** rng.random()))
            out.write(json.dumps({"text": text, "label": capital}) + "\n")
            left -= len(text) + 1


def recall_config(out: Path, model: str, seed: int, longest: int, clip: float = 1.0) -> dict[str, Any]:
    """What `python -m train` is given: windows of twice the longest text, and of at least 4,096 tokens together in a step."""
    length = 2 * longest
    batch = max(1, 4096 // length)
    unclipped = "" if clip == 1 else "-unclipped"
    return {
        "run_dir": str(out / f"recall-{longest}{unclipped}" / f"{slug(model)}-{seed}"),
        "seed": seed,
        "model": {"config": shape(model)},
        "data": {
            "source": str(out / f"recall-{longest}.jsonl"), "label_column": "label", "val_fraction": 0.02, "seq_len": length,
            "cache_dir": str(out / "cache"),
        },
        "optim": {"name": "adamw", "lr": MODELS[model].recall_lr, "weight_decay": 0.01, "clip": clip},
        "schedule": {"warmup": 0.1, "decay": 0.3, "decay_type": "linear"},
        "train": {"steps": STEPS, "global_batch": batch, "checkpoint_every": STEPS, "val_every": STEPS},
        "log": {"every": 1},
    }  # fmt: skip


@torch.no_grad()
def recalled(folder: Path, steps: int) -> float:
    """The share of the same `QUESTIONS` for every model that the one in `folder` answers right."""
    model = HybridLMForSequenceClassification.from_pretrained(folder).eval()
    asked = [recall_text(Random(f"question {steps} {i}"), steps) for i in range(QUESTIONS)]
    right = 0
    for length in {len(text) for text, _ in asked}:
        texts, capitals = zip(*(one for one in asked if len(one[0]) == length))
        chosen = torch.cat([model(part).logits for part in torch.cat([*map(tokens, texts)]).split(16)]).argmax(-1)
        right += sum(model.config.label_names[i] == capital for i, capital in zip(chosen.tolist(), capitals, strict=True))
    return right / QUESTIONS


def tokens(text: str) -> Tensor:
    """(1 t) with the end, where the class is read."""
    tokenizer = byte_tokenizer()
    return torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])


def recall(out: Path, longest: int) -> list[dict[str, Any]]:
    """Accuracies of all models; from further back than 512, of the first seed alone."""
    plan = [(model, seed, 1.0) for seed in range(SEEDS if longest == 512 else 1) for model in MODELS]
    if longest == 512:
        plan += [(model, seed, 1e9) for seed in range(SEEDS) for model in ("Elman RNN", "LSTM")]
    write_recall_texts(out / f"recall-{longest}.jsonl", longest, STEPS * max(4096, 2 * longest))
    folders = train_all([recall_config(out, model, seed, longest, clip) for model, seed, clip in plan])
    rows = []
    for (model, seed, clip), folder in zip(plan, tqdm(folders, desc="asking", unit=" models")):
        lines = [line for line in metrics(folder) if "loss" in line]
        known = {"model": model, "seed": seed, "clip": clip == 1, "largest_gradient": max(line["grad_norm"] for line in lines)}
        for steps in steps_asked(longest):
            rows.append({**known, "steps_back": steps, "accuracy": recalled(folder / "model", steps), **facts(folder)})
    return rows


def horizon(accuracies: dict[int, float]) -> int:
    """The most steps up to which all are answered as `HORIZON` says; 0 for none."""
    reached = 0
    for steps in sorted(accuracies):
        if accuracies[steps] < HORIZON:
            break
        reached = steps
    return reached


# (b) What a token that long ago still changes


def jacobian_norms(model: HybridLMForSequenceClassification, ids: Tensor) -> Tensor:
    """(t) the Frobenius norm of dh_T/dx_i for the input x_i of every position, h_T what the last norm gives at the last one: the
    root of the mean over rows and directions, since of a normal v the square of v^T J is that of J on average."""
    x = model.backbone.embeddings(ids).detach().requires_grad_()
    h = model.backbone(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
    generator = torch.Generator().manual_seed(0)
    squares = x.new_zeros(ids.shape)
    for _ in range(DIRECTIONS):
        v = torch.randn(h.shape, generator=generator, dtype=h.dtype)
        (gradient,) = torch.autograd.grad(h, x, v, retain_graph=True)
        squares += gradient.square().sum(-1)
    return (squares / DIRECTIONS).mean(0).sqrt()


def gradients(folders: dict[tuple[str, int], Path]) -> list[dict[str, Any]]:
    """Of each model at its first weights and after learning to recall, for letters and for the capital, so many steps back."""
    longest = 512  # in fp64: what has vanished is still told from nothing
    texts = [recall_text(Random(f"gradient {i}"), longest + 1)[0][-longest:] for i in range(ROWS)]
    ids = torch.cat([tokens(text) for text in texts])
    rows = []
    for (model, seed), folder in tqdm(folders.items(), desc="gradients", unit=" models"):
        trained = HybridLMForSequenceClassification.from_pretrained(folder / "model").eval().double()
        torch.manual_seed(seed)
        versions = {"first weights": HybridLMForSequenceClassification(trained.config).eval().double(), "trained": trained}
        for factor in (0.5, 1.5) if model == "Elman RNN" else ():  # the textbook's picture
            torch.manual_seed(seed)
            versions[f"first weights, W_hh x {factor}"] = scaled = (
                HybridLMForSequenceClassification(trained.config).eval().double()
            )
            for block in scaled.backbone.layers[::2]:
                block.mixer.cell.weight_hh.data *= factor
        for version, network in versions.items():
            norms = jacobian_norms(network, ids).tolist()
            for steps in steps_asked(longest):
                row = {"model": model, "seed": seed, "weights": version, "steps_back": steps, "letter": norms[-1 - steps]}
                if version == "trained":
                    with_capital = torch.cat(
                        [tokens(recall_text(Random(f"gradient {i}"), steps)[0][-steps:]) for i in range(ROWS)]
                    )
                    row["capital"] = jacobian_norms(network, with_capital)[0].item()
                rows.append(row)
    return rows


# (c) Text


def text_config(out: Path, source: str, model: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "run_dir": str(out / f"text-{Path(source).stem}" / f"{slug(model)}-{seed}-{steps}"),
        "seed": seed,
        "model": {"config": shape(model, **({"rope_theta": 10000.0} if model == "attention" else {}))},
        "data": {"source": source, "seq_len": TEXT["seq_len"], "cache_dir": str(out / "cache")},
        "optim": {"name": "adamw", "lr": MODELS[model].text_lr},
        "schedule": {"warmup": 0.05, "decay": 0.5, "decay_type": "linear"},
        "train": {
            "steps": steps, "global_batch": TEXT["global_batch"], "checkpoint_every": steps, "val_every": steps,
            "val_sequences": 128,
        },
        "log": {"every": 20, "sample_tokens": 0},
    }  # fmt: skip


def text(out: Path, source: str, in_equal_time: bool) -> list[dict[str, Any]]:
    """Loss on held-out text at equal tokens; and of the first seed, in the time that the reference took for these."""
    plan = [(model, seed) for seed in range(SEEDS) for model in MODELS]
    folders = train_all([text_config(out, source, model, seed, TEXT["steps"]) for model, seed in plan])
    speeds: dict[str, list[float]] = {}
    for (model, _), folder in zip(plan, folders):
        speeds.setdefault(model, []).append(statistics.median(l["tokens_per_second"] for l in metrics(folder) if "loss" in l))
    speed = {model: statistics.median(values) for model, values in speeds.items()}
    rows = [("tokens", *run, folder) for run, folder in zip(plan, folders)]
    if in_equal_time:
        steps = {model: int(TEXT["steps"] * speed[model] / speed[REFERENCE]) for model in MODELS}
        timed = train_all([text_config(out, source, model, 0, steps[model]) for model in MODELS])
        rows += [("time", model, 0, folder) for model, folder in zip(MODELS, timed)]
    return [
        {"model": model, "seed": seed, "equal": equal, "val_loss": metrics(folder)[-1]["val_loss"],
         "tokens_per_second": speed[model], **facts(folder)}
        for equal, model, seed, folder in rows
    ]  # fmt: skip


# (d) Speed


def training_speed() -> list[dict[str, Any]]:
    """Tokens per second of forward and backward with one thread, the models in turns; median of `TURNS`."""
    models = {name: HybridLMForCausalLM(HybridLMConfig(**shape(name))).train() for name in MODELS}
    seconds: dict[tuple[str, int], list[float]] = {}
    turns = [(length, turn, name) for length in LENGTHS for turn in range(TURNS + 1) for name in MODELS]
    for length, turn, name in tqdm(turns, desc="training speed", unit=" steps"):
        ids = torch.randint(256, (SPEED_TOKENS // length, length), generator=torch.Generator().manual_seed(turn))
        start = time.perf_counter()
        models[name](ids, targets=ids).loss.mean().backward()
        if turn:  # the first one warms up
            seconds.setdefault((name, length), []).append(time.perf_counter() - start)
    return [
        {"model": name, "length": length, "tokens_per_second": SPEED_TOKENS / statistics.median(found), "seconds": found}
        for (name, length), found in seconds.items()
    ]


def generation_speed(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """As `python -m eval throughput`, of one sequence."""
    found = throughput.evaluate([str(folder / "model") for folder in folders.values()], [*LENGTHS], [NEW], [1], twin=False)
    names = {str(folder / "model"): name for name, folder in folders.items()}
    kept = ("prompt", "prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes")
    return [{"model": names[row["model"]], **{key: row[key] for key in kept}} for row in found]


def slug(model: str) -> str:
    return model.lower().replace(" ", "-")


def averaged(rows: list[dict[str, Any]], key: tuple[str, ...], value: str) -> dict[tuple, tuple[float, float]]:
    """Mean over the rows that share a key, and the standard deviation of them (0 of a single one)."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if value in row:
            groups.setdefault(tuple(row[k] for k in key), []).append(row[value])
    return {k: (statistics.mean(g), statistics.stdev(g) if len(g) > 1 else 0.0) for k, g in groups.items()}


# What came out


def horizons(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Of each model, for each of its seeds in their order, as `horizon` has it."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row["clip"]:
            found.setdefault((row["model"], row["seed"]), {})[row["steps_back"]] = row["accuracy"]
    return {model: [horizon(of_seed) for (name, _), of_seed in sorted(found.items()) if name == model] for model in MODELS}


def recall_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, a column for each number of steps, and the horizon of each seed."""
    clipped = [row for row in rows if row["clip"]]
    asked = sorted({row["steps_back"] for row in clipped})
    found, reached = averaged(clipped, ("model", "steps_back"), "accuracy"), horizons(rows)
    lines = [f"| steps back | {' | '.join(map(str, asked))} | horizon |", "|---" * (len(asked) + 2) + "|"]
    for model in MODELS:
        cells = [
            with_spread(*found[model, steps], 2) if len(reached[model]) > 1 else f"{found[model, steps][0]:.2f}"
            for steps in asked
        ]
        lines.append(f"| {model} | {' | '.join(cells)} | {', '.join(map(str, reached[model]))} |")
    return "\n".join(lines)


def with_spread(mean: float, spread: float, digits: int) -> str:
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def clipping_table(rows: list[dict[str, Any]]) -> str:
    """The largest gradient norm that a step met, and the accuracy over all steps back, with and without clipping."""
    lines = ["| | largest gradient | accuracy |", "|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows if not row["clip"]):
        for clip in (True, False):
            these = [row for row in rows if (row["model"], row["clip"]) == (model, clip)]
            largest = [f"{max(row['largest_gradient'] for row in these if row['seed'] == seed):,.0f}" for seed in range(SEEDS)]
            right = [f"{statistics.mean(row['accuracy'] for row in these if row['seed'] == seed):.2f}" for seed in range(SEEDS)]
            lines.append(f"| {model}, {'clipped to 1' if clip else 'not clipped'} | {', '.join(largest)} | {', '.join(right)} |")
    return "\n".join(lines)


def gradient_table(rows: list[dict[str, Any]]) -> str:
    asked = (2, 16, 64, 256, 512)
    columns = (("first weights", "letter"), ("trained", "letter"), ("trained", "capital"))
    lines = ["| steps back | " + " | ".join(map(str, asked)) + " |", "|---" * (len(asked) + 1) + "|"]
    of = {what: averaged(rows, ("model", "weights", "steps_back"), what) for what in ("letter", "capital")}
    for model in MODELS:
        for weights, what in columns:
            cells = [f"{of[what][model, weights, steps][0]:.1e}" for steps in asked]
            lines.append(f"| {model}, {weights}{', the capital' * (what == 'capital')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text_table(rows: list[dict[str, Any]]) -> str:
    found, tokens_read = averaged(rows, ("model", "equal"), "val_loss"), averaged(rows, ("model", "equal"), "tokens")
    parameters, speed = averaged(rows, ("model",), "parameters"), averaged(rows, ("model",), "tokens_per_second")
    of_all = {model: [f"{parameters[model,][0]:,.0f}", with_spread(*found[model, "tokens"], 3)] for model in MODELS}
    head = ["", "parameters", "nats/byte at equal tokens"]
    if ("hybrid", "time") in found:
        head += ["training tokens/s", "tokens in equal time", "nats/byte in equal time"]
        for model, cells in of_all.items():
            of_time = f"{tokens_read[model, 'time'][0] / 1e6:.2f}M"
            cells += [f"{speed[model,][0]:,.0f}", of_time, f"{found[model, 'time'][0]:.3f}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {model} | {' | '.join(cells)} |" for model, cells in of_all.items())])


def speed_table(training: list[dict[str, Any]], generation: list[dict[str, Any]]) -> str:
    found = {
        "training": {(row["model"], row["length"]): row["tokens_per_second"] for row in training},
        "reading": {(row["model"], row["prompt"]): row["prefill_tokens_per_second"] for row in generation},
        "writing": {(row["model"], row["prompt"]): row["decode_tokens_per_second"] for row in generation},
    }
    head = [f"{what}, {length:,}" for what in found for length in (LENGTHS[0], LENGTHS[-1])]
    lines = [f"| tokens/s | {' | '.join(head)} | cache, kB |", "|---" * (len(head) + 2) + "|"]
    cache = {row["model"]: row["cache_bytes"] for row in generation if row["prompt"] == LENGTHS[-1]}
    for model in MODELS:
        cells = [f"{of[model, length]:,.0f}" for of in found.values() for length in (LENGTHS[0], LENGTHS[-1])]
        lines.append(f"| {model} | {' | '.join(cells)} | {cache[model] / 1e3:,.0f} |")
    return "\n".join(lines)


STYLES = dict(zip(MODELS, (
    ("#d55e00", "o"), ("#e69f00", "s"), ("#b8860b", "^"), ("#009e73", "D"), ("#56b4e9", "v"), ("#5b616b", "X"), ("#0072b2", "P"),
)))  # fmt: skip


def lines_against(axes: Any, found: dict[tuple[str, int], tuple[float, float]], **style: Any) -> None:
    for model, (colour, marker) in STYLES.items():
        points = sorted((x, *value) for (name, x), value in found.items() if name == model)
        x, means, spreads = zip(*points)
        axes.errorbar(
            x, means, spreads if any(spreads) else None, color=colour, marker=marker, ms=5, capsize=2, label=model, **style
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({x for _, x in found})
    axes.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
    axes.grid(alpha=0.3)


def draw(results: dict[str, Any], path: Path) -> None:
    """Six panels: recall; gradients before and after; text; speed of training and of writing."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    recalled_rows = [row for row in results["recall"] if row["clip"]]
    lines_against(panels[0], averaged(recalled_rows, ("model", "steps_back"), "accuracy"))
    panels[0].set(title="a capital that many steps back", xlabel="steps back", ylabel="accuracy", ylim=(-0.03, 1.05))
    for axes, weights, what, title in (
        (panels[1], "first weights", "letter", "gradient at the first weights"),
        (panels[2], "trained", "capital", "gradient after training, at the capital"),
    ):
        of = [row for row in results["gradients"] if row["weights"] == weights]
        lines_against(axes, averaged(of, ("model", "steps_back"), what))
        axes.set(title=title, xlabel="steps back", ylabel="|dh_T / dx_(T-k)|", yscale="log", ylim=(1e-9, 1e3))
    for factor, line in ((0.5, ":"), (1.5, "--")):
        of = [row for row in results["gradients"] if row["weights"] == f"first weights, W_hh x {factor}"]
        points = sorted((steps, mean) for (steps,), (mean, _) in averaged(of, ("steps_back",), "letter").items())
        panels[1].plot(*zip(*points), color=STYLES["Elman RNN"][0], ls=line, lw=1)
        panels[1].annotate(f"W_hh × {factor}", points[2], fontsize=8, xytext=(3, 3), textcoords="offset points")
    found = averaged(results["text"], ("model", "equal"), "val_loss")
    places = range(len(MODELS))
    for shift, equal, alpha in ((-0.2, "tokens", 1.0), (0.2, "time", 0.5)):
        means, spreads = zip(*(found[model, equal] for model in MODELS))
        colours = [STYLES[model][0] for model in MODELS]
        panels[3].bar([p + shift for p in places], means, 0.38, yerr=spreads, color=colours, alpha=alpha, capsize=2)
    every = [mean for mean, _ in found.values()]
    panels[3].set(title="loss on text: equal tokens (full), equal time (pale)", ylabel="nats/byte",
                  ylim=(min(every) - 0.1, max(every) + 0.1))  # fmt: skip
    panels[3].set_xticks(places, MODELS, rotation=30, ha="right", fontsize=8)
    panels[3].grid(alpha=0.3, axis="y")
    lines_against(panels[4], averaged(results["training_speed"], ("model", "length"), "tokens_per_second"))
    panels[4].set(title="training speed", xlabel="length", ylabel="tokens/s", yscale="log")
    lines_against(panels[5], averaged(results["generation_speed"], ("model", "prompt"), "decode_tokens_per_second"))
    panels[5].set(title="writing speed behind a prompt", xlabel="prompt", ylabel="tokens/s")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(MODELS))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/memory-horizon"), help="folder of texts and runs")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--longest", type=int, default=512, help="recall alone, from up to so many steps back, such as 4096")
    part.add_argument("--text", help="the losses on text alone, on this file")
    given = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes in which generation is timed
    if given.text:
        rows = text(given.out, given.text, in_equal_time=False)
        write_json({"text": rows}, HERE / f"{Path(given.text).stem}.json")
        print(text_table(rows))
        return
    rows = recall(given.out, given.longest)
    if given.longest != 512:
        write_json({"recall": rows}, HERE / f"recall-{given.longest}.json")
        print(recall_table(rows))
        return
    on_text = text(given.out, "stdlib", in_equal_time=True)
    trained = {
        (model, seed): Path(recall_config(given.out, model, seed, 512)["run_dir"]) for model in MODELS for seed in range(SEEDS)
    }
    texts = {model: Path(text_config(given.out, "stdlib", model, 0, TEXT["steps"])["run_dir"]) for model in MODELS}
    results = {
        "recall": rows, "gradients": gradients(trained), "text": on_text, "training_speed": training_speed(),
        "generation_speed": generation_speed(texts),
    }  # fmt: skip
    write_json(results, HERE / "results.json")
    draw(results, FIGURE)
    tables = (recall_table(rows), clipping_table(rows), gradient_table(results["gradients"]), text_table(on_text))
    print("\n\n".join([*tables, speed_table(results["training_speed"], results["generation_speed"])]))


if __name__ == "__main__":
    main()
