"""How well a model finds again what it has read: synthetic tasks over length and depth."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from eval.models import Finite, check_vocabulary, in_batches, open_model
from eval.synthetic import TASKS, Question, fit, questions, training_texts
from hybridlm.arguments import check_names
from hybridlm.checkpoint import check_folder, load_tokenizer
from hybridlm.data.shards import tokenize
from hybridlm.journal import Journal, identity
from hybridlm.output import cell, quiet
from hybridlm.tokenizer import byte_tokenizer

COLUMNS = {
    "model": "model", "task": "task", "length": "length", "depth": "depth", "accuracy": "accuracy", "stderr": "± stderr",
    "questions": "questions",
}  # fmt: skip
BEYOND = 3  # tokens generated after as many as the answer has: whether it ends there shows in what follows
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


def evaluate(
    folders: list[str],
    tasks: list[str],
    lengths: list[int],
    depths: list[float],
    number: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each model, task, length and depth. All models are asked the same questions.

    Args:
        lengths: tokens of a question with its answer; where tokenizers differ, of that which needs the most.
        number: questions of each row.
        json_path: beside which results are kept until all are there, so that the same command goes on where it was stopped.

    Raises:
        ValueError: a folder without a model or tokenizer; a task that there is not, or that a length does not fit.
        FloatingPointError: logits that are no numbers. MemoryError: memory does not suffice for one question.
    """
    check_names("task", tasks, TASKS)
    quiet()
    for folder in folders:
        check_folder(folder)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    count = partial(most_tokens, tokenizers)
    cells = [(t, n, d) for t in tasks for n in lengths for d in (depths if TASKS[t].has_depth else [None])]
    bar = tqdm(cells, desc="making questions", unit=" sets")
    asked = {(t, n, d): questions(t, TASKS[t], count, n, d, number, seed) for t, n, d in bar}
    facts = {key: {"questions": number, "questions_sha256": digest(made)} for key, made in asked.items()}
    models = [identity(folder) for folder in folders]
    journal = Journal(json_path, {"command": "longcontext", "models": models, "questions": [*facts.values()]})
    rows = []
    with tqdm(total=len(folders) * len(cells) * number, desc="asking", unit=" questions") as asking:
        for folder in folders:
            model, tokenizer = open_model(folder)
            for task, length, depth in cells:
                key = (task, length, depth)
                ask_these = partial(ask, model, tokenizer, asked[key], TASKS[task].score, batch_size, folder)
                outcomes = journal.once(f"{folder} {task} {length} {depth}", ask_these)
                asking.update(number)
                figures = accuracy(outcomes) | facts[key] | {"outcomes": outcomes}
                rows.append({"model": folder, "task": task, "length": length, "depth": depth, **figures})
            del model, ask_these  # before the next one is opened
    return rows


def most_tokens(tokenizers: Sequence[PreTrainedTokenizerBase], text: str) -> int:
    return max(len(tokenize([text], tokenizer)[0]) for tokenizer in tokenizers)


def digest(made: list[Question]) -> str:
    return sha256("\0".join(question.text for question in made).encode()).hexdigest()[:16]


def accuracy(outcomes: list[float]) -> dict[str, float]:
    """Their mean and its standard error; of right and wrong alone that is the binomial one."""
    mean = sum(outcomes) / len(outcomes)
    return {"accuracy": mean, "stderr": math.sqrt(sum((x - mean) ** 2 for x in outcomes)) / len(outcomes)}


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Question],
    score: Callable[[str, str], float],
    batch_size: int,
    name: str,
) -> list[float]:
    """How right what the model writes, greedily, is for each question, from 0 to 1.

    Questions of equal length are asked together, so that none is padded.

    Raises:
        ValueError: a token id past the model's vocabulary, or a prompt longer than the model's position embedding.
        FloatingPointError: logits that are no numbers. MemoryError: memory does not suffice for one question.
    """
    prompts = tokenize([question.prompt for question in asked], tokenizer)
    check_vocabulary(max(max(ids) for ids in prompts), model, name)
    answers = tokenize([f" {question.answer}" for question in asked], tokenizer)
    groups = defaultdict(list)
    for i, (ids, answer) in enumerate(zip(prompts, answers)):
        groups[len(ids), len(answer)].append(i)
    outcomes = [0.0] * len(asked)
    for (length, new), numbers in groups.items():
        run = partial(write, model, tokenizer, prompts, new + BEYOND, name)
        try:
            for batch, texts in in_batches(run, numbers, batch_size):
                for i, text in zip(batch, texts):
                    outcomes[i] = score(asked[i].answer, text)
        except IndexError:
            limit = getattr(model.config, "max_position_embeddings", None)
            raise ValueError(f"{name} has no positions for a prompt of {length:,} tokens (its limit: {limit}).") from None
    return outcomes


@torch.inference_mode()
def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new: int, name: str, batch: list[int]
) -> list[str]:
    """What follows these prompts, all of one length."""
    ids = torch.tensor([prompts[i] for i in batch], device=model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=pad,
        logits_processor=LogitsProcessorList([Finite(model, name)]), **GREEDY,
    )  # fmt: skip
    return tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)


def documents(tasks: list[str], length: int, number: int, tokenizer: str, seed: int) -> Iterator[dict[str, str]]:
    """Texts to train on, of at most `length` tokens, the tasks in turn; their sizes are powers of two apart.

    Args:
        tokenizer: `bytes`, or a folder or hub name.

    Raises:
        ValueError: a task that there is not, or that the length does not fit.
    """
    check_names("task", tasks, TASKS)
    count = partial(most_tokens, [byte_tokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer)])
    series = []
    for name in tasks:
        task = TASKS[name]
        most = fit(name, task, count, length) * 9 // 10  # texts of one size are not all of one length
        sizes = [task.smallest << i for i in range((most // task.smallest).bit_length())] or [task.smallest]
        series.append(training_texts(name, task, sizes, count, length, number, seed))
    for i in range(number):
        yield {"text": next(series[i % len(tasks)])}


def write_documents(path: str, tasks: list[str], length: int, number: int, tokenizer: str, seed: int) -> None:
    """`documents` as JSON lines. `Raises` as it does."""
    lines = tqdm(documents(tasks, length, number, tokenizer, seed), total=number, desc="writing", unit=" documents")
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """A heat map of accuracy over length and depth for each model and task, as PNG, and the table beside it, as Markdown."""
    from matplotlib.figure import Figure

    models, tasks = (list(dict.fromkeys(row[field] for row in rows)) for field in ("model", "task"))
    figure = Figure(figsize=(1 + 3.6 * len(tasks), 0.6 + 2.4 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(tasks), squeeze=False)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            cells = {
                (row["depth"], row["length"]): row["accuracy"] for row in rows if (row["model"], row["task"]) == (model, task)
            }
            depths, lengths = (list(dict.fromkeys(key[k] for key in cells)) for k in (0, 1))
            values = [[cells[depth, length] for length in lengths] for depth in depths]
            axes = grid[i][j]
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:g}" for depth in depths])
            axes.set(title=f"{task}: {'/'.join(Path(model).parts[-2:])}", xlabel="length, tokens", ylabel="depth")
    figure.colorbar(image, ax=grid.ravel().tolist(), label="accuracy")
    figure.savefig(path, dpi=120)
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *([cell(row[field]) for field in COLUMNS] for row in rows)]
    Path(path).with_suffix(".md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
