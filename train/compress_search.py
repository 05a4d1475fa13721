"""The part of `python -m train compress` that trains nothing: importance, candidates, and models side by side."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.compress import latency
from hybridlm.compress.agreement import predict, score
from hybridlm.compress.importance import Importance, measure
from hybridlm.compress.search import Candidate, Shape, candidates, grid, most_important, shape_of, within_budget
from hybridlm.compress.surgery import PARTS, Kept, check_kinds, prune
from hybridlm.data.blend import Blend
from hybridlm.data.shards import Shards
from hybridlm.journal import Journal, identity
from hybridlm.output import json_text
from hybridlm.scoring import Window, batch_arrays
from hybridlm.strict_yaml import parse_yaml
from hybridlm.timing import generate, request_dtype
from hybridlm.twin import count_parameters
from train import files
from train.compress_config import CompressConfig, axes, budget
from train.config import dump
from train.optim import samples_by
from train.setup import fetch, open_data, open_tokenizer
from train.validation import BATCH_TOKENS, HeldOut, bits_per_byte

Row = dict[str, Any]
Build = Callable[[], HybridLMForCausalLM]
SIZES = ("hidden_size", *PARTS.values())


class Found(NamedTuple):
    """What was cut out in the shape of a candidate, and its row in search.json."""

    folder: Path
    row: Row


@dataclass(frozen=True)
class Work:
    """What all phases share. Results are in `journal` as soon as they are there, so a phase that was cut off goes on."""

    config: CompressConfig
    place: Path  # of the parent
    parent: HybridLMForCausalLM
    tokenizer: PreTrainedTokenizerBase
    stream: Blend
    validation: list[Shards]
    journal: Journal

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def shape(self) -> HybridLMConfig:
        return self.parent.config  # type: ignore[return-value]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds of a phase, over all calls."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds {name}"
            self.journal.keep(key, self.journal.results.get(key, 0.0) + time.perf_counter() - start)

    def windows(self, first: int, count: int, told: str) -> Iterator[dict[str, Tensor]]:
        """Batches of training text that no training reads: windows behind the last of the longest, from the `first` on."""
        train, longest = self.config.train, max(self.config.train.steps, self.config.compress.short_steps)
        size, start = train.micro_batch or train.global_batch, longest * train.global_batch + first
        with tqdm(total=count, desc=told, unit="window", leave=False) as bar:
            for i in range(start, start + count, size):
                arrays = self.stream.batch(i, min(i + size, start + count))
                yield {name: torch.from_numpy(array).to(self.parent.device) for name, array in arrays.items()}
                bar.update(min(size, start + count - i))

    def facts(self, config: HybridLMConfig) -> Row:
        """What is known of a model by its shape."""
        memory = budget(self.config.compress, self.shape).bytes_of(config)
        sizes = {name: getattr(config, name) for name in SIZES}
        return {
            "pattern": config.hybrid_override_pattern,
            **sizes,
            "parameters": count_parameters(config),
            "memory_bytes": memory,
        }

    def cut(self, name: str, kept: Kept) -> Path:
        """The folder of the model that is left: an ordinary one, with `pruning.json`."""
        final = self.folder / "students" / name
        if not final.exists():
            unfinished = final.with_name(f".{name}.unfinished")
            unfinished.mkdir(parents=True, exist_ok=True)
            prune(self.parent, kept).save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            kept.save(unfinished, str(self.place))
            for path in (*unfinished.iterdir(), unfinished):  # to the disk, before the name says that it is there
                files.sync(path)
            files.rename(unfinished, final)
        return final

    def time_requests(self, told: str, models: Mapping[str, Build]) -> dict[str, float]:
        """Seconds of a request, of each model the median over turns that they take one after the other."""
        c = self.config.compress
        with tqdm(total=c.turns * len(models), desc=f"{told}, {c.prompt:,} in, {c.new:,} out", unit="request") as bar:
            for turn in range(c.turns):
                for name, build in models.items():
                    if (key := f"{told} {turn}: {name}") not in self.journal.results:
                        model = build().to(request_dtype(self.parent.device))  # type: ignore[arg-type]
                        generate(model, turn, min(c.prompt, 64), min(c.new, 4), 1)  # warms up
                        self.journal.keep(key, generate(model, turn, c.prompt, c.new, 1)["total"])
                    bar.update()
        return {name: median(self.journal.results[f"{told} {turn}: {name}"] for turn in range(c.turns)) for name in models}


def open_work(config: CompressConfig) -> Work:
    """
    Raises:
        ValueError: no parent, one that cannot be pruned, or settings that do not go with a compression.
    """
    if config.model.init_from is None:
        raise ValueError("model.init_from is missing: the model to compress, a folder (RUN/model) or hub name.")
    unfit = {
        "distill.logits": config.distill.logits, "data.streaming": config.data.streaming,
        "data.label_column": config.data.label_column, "data.carry_state": config.data.carry_state,
    }  # fmt: skip
    if wrong := [name for name, given in unfit.items() if given]:
        raise ValueError(f"{', '.join(wrong)}: this does not go with a compression; leave it away.")
    c, train = config.compress, config.train
    if train.precision == "fp8" and train.fp8_unfit == "stop" and "uniform" in c.compare:
        raise ValueError(
            "compress.compare: uniform cuts have sizes that do not divide by 16, at which train.precision: fp8 stops; leave "
            "uniform out, or set train.fp8_unfit: bf16."
        )
    if config.distill.teacher is not None:
        fetch(config.distill.teacher)
    if c.max_parameters is None and c.max_memory is None and c.min_speedup is None:
        raise ValueError("there is no limit to keep; set compress.max_parameters, compress.max_memory or compress.min_speedup.")
    place = Path(fetch(config.model.init_from))
    while place.is_symlink():  # RUN/model of a run that goes on would be another model by the time of the trainings
        place = place.parent / place.readlink()
    shape = HybridLMConfig.from_pretrained(place)
    check_kinds(shape)
    if "uniform" in c.compare and "-" not in shape.hybrid_override_pattern:
        raise ValueError(
            "compress.compare: uniform cuts are made to size by FFN neurons, and the parent has none; leave uniform out."
        )
    within_budget(shape, axes(c, shape), budget(c, shape))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = HybridLMForCausalLM.from_pretrained(place, backend=config.ops.backend).to(device).eval()
    tokenizer = open_tokenizer(config, None)
    stream, validation = open_data(config, tokenizer, parent.config.vocab_size, quiet=False)
    assert isinstance(stream, Blend)
    texts: Row = {"training": stream.identity(samples_by(config, config.train.steps))}
    texts["validation"] = [shards.meta["sha256"] for shards in validation]
    settings = parse_yaml(dump(config)) | {"run_dir": None, "parent": identity(str(place)), "texts": texts}
    # All else in the directory, what was cut out and trained too, is of what they were.
    remedy = (
        f"The files of {config.model.init_from} or the text have changed since: bring them back, or choose another --run_dir."
    )
    journal = Journal(f"{config.run_dir}/search.json", settings, remedy)
    return Work(config, place, parent, tokenizer, stream, validation, journal)


def weigh(work: Work) -> Importance:
    """The importance of all parts, measured or read."""
    file, c = work.folder / "importance.safetensors", work.config.compress
    if not file.exists():
        both = (("importance of layers", c.layer_samples), ("importance of parts", c.part_samples))
        texts = ((without_targets(batch) for batch in work.windows(0, count, told)) for told, count in both)
        unfinished = file.with_name(f".{file.name}.unfinished")
        measure(work.parent, *texts).save(unfinished)
        files.sync(unfinished)
        files.rename(unfinished, file)
    return Importance.load(file)


def without_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "targets"}


def best_candidates(work: Work, importance: Importance) -> list[Found]:
    """The candidates that are worth a distillation, the best first. Writes search.json.

    Raises:
        ValueError: none is within the budget, or none that was timed is fast enough.
    """
    c, parent, whole = work.config.compress, work.parent, shape_of(work.shape)
    limits, seconds = budget(c, work.shape), estimates(work) if c.min_speedup is not None else (lambda shape: 0.0)
    if c.min_speedup is not None:
        limits = replace(limits, seconds=seconds(whole) / c.min_speedup)
    chosen, funnel = candidates(work.shape, importance, axes(c, work.shape), limits, c.scored, seconds)
    texts = list(work.windows(max(c.layer_samples, c.part_samples), c.score_samples, "parent"))
    choices = [predict(parent, text)[1] for text in texts]

    def kept(shape: Shape) -> Kept:
        return most_important(work.shape, importance, shape)

    def build(shape: Shape) -> HybridLMForCausalLM:
        """Never the parent itself: for a request it may be narrowed."""
        return prune(parent, kept(shape), work.config.ops.backend)

    def scored(one: Candidate) -> tuple[Shape, Row]:
        model = build(one.shape)
        figures = work.journal.once(f"score: {one.name}", lambda: score(model, texts, choices))
        unknown = dict.fromkeys(("request_seconds", "tokens_per_second", "distilled_loss"))
        return one.shape, {"name": one.name, **work.facts(model.config), "damage": one.damage, **figures, **unknown}

    first = scored(Candidate(whole, 0.0))
    found = sorted((scored(one) for one in tqdm(chosen, desc="scoring", unit="candidate")), key=lambda one: one[1]["loss"])
    timed = [first, *found[: c.timed]]
    taken = work.time_requests("search", {row["name"]: partial(build, shape) for shape, row in timed})
    for _, row in timed:
        row |= {"request_seconds": taken[row["name"]], "tokens_per_second": (c.prompt + c.new) / taken[row["name"]]}
    speed = first[1]["tokens_per_second"]
    best = [one for one in timed[1:] if one[1]["tokens_per_second"] >= (c.min_speedup or 0.0) * speed][: c.distilled]
    if not best:
        quickest = max(row["tokens_per_second"] for _, row in timed[1:]) / speed
        raise ValueError(
            f"none of the {len(timed) - 1} timed candidates is {c.min_speedup} times as fast as the parent; the quickest is "
            f"{quickest:.3f} times. Lower compress.min_speedup, time more (compress.timed), or let the grid go further down, and "
            "choose another --run_dir: this one is of these settings."
        )
    asked = {
        "parameters": limits.parameters, "memory_bytes": limits.memory,
        "request_seconds": c.min_speedup and taken[first[1]["name"]] / c.min_speedup,
        "context": c.context, "weight_bits": c.weight_bits, "cache_bits": c.cache_bits,
    }  # fmt: skip
    content = {
        "parent": first[1] | {"name": "parent"}, "funnel": funnel | {"timed": len(timed) - 1, "kept": len(best)},
        "budget": asked, "prompt": c.prompt, "new": c.new, "candidates": [row for _, row in found],
    }  # fmt: skip
    files.replace_text(work.folder / "search.json", json_text(content))
    return [Found(work.cut(row["name"], kept(shape)), row) for shape, row in best]


def estimates(work: Work) -> Callable[[dict[str, int]], float]:
    """What a request takes a shape, by what each kind of layer takes."""
    c, device = work.config.compress, work.parent.device
    shapes = [shape_of(work.shape), *grid(work.shape, axes(c, work.shape))]
    measured = {}
    how = (c.prompt, c.new, c.turns, device, work.config.ops.backend)
    for layer in tqdm(latency.needed(shapes), desc=f"timing layers, {c.prompt:,} in, {c.new:,} out", unit="layer"):
        found = work.journal.once(f"layer {layer}", lambda: latency.measure(work.shape, layer, *how))  # noqa: B023
        measured[layer] = latency.Seconds(*found)
    return lambda shape: latency.estimate(shape, measured)


def side_by_side(work: Work, models: Mapping[str, Path]) -> dict[str, Row]:
    """Of each model its loss, accuracy and agreement with the parent on the held-out windows, its speed and its memory.

    Args:
        models: folders.
    """
    c, size = work.config.compress, work.config.data.seq_len
    held_out = HeldOut.of(work.validation, work.config)
    rows = max(1, BATCH_TOKENS // size)
    texts = []
    for some in (held_out.wanted[i : i + rows] for i in range(0, len(held_out.wanted), rows)):
        ids, targets = batch_arrays([Window(tokens, 0, 0, 0) for tokens in held_out.read(some)[1]])
        texts.append({"input_ids": ids.to(work.parent.device), "targets": targets.to(work.parent.device)})
    choices = [predict(work.parent, text)[1] for text in texts]
    shapes = {name: HybridLMConfig.from_pretrained(folder) for name, folder in models.items()}
    # A model takes the time of its shape: of those that are alike one is timed.
    alike = {name: str(work.facts(shape)) for name, shape in shapes.items()}
    first = {alike[name]: name for name in reversed([*models])}
    taken = work.time_requests("final", {name: partial(opened, work, models[name]) for name in models if name in first.values()})
    entries = {}
    for name, folder in tqdm(models.items(), desc="evaluation", unit="model"):
        found = work.journal.once(f"final: {name}", lambda: score(opened(work, folder), texts, choices))  # noqa: B023
        seconds, facts = taken[first[alike[name]]], work.facts(shapes[name])
        entries[name] = {
            "folder": str(folder), "pattern": facts["pattern"], "parameters": facts["parameters"],
            "nats_per_token": found["loss"], "bits_per_byte": bits_per_byte(found["loss"], work.validation),
            "accuracy": found["accuracy"], "agreement": found["agreement"], "memory_bytes": facts["memory_bytes"],
            "tokens_per_second": (c.prompt + c.new) / seconds, "request_seconds": seconds,
        }  # fmt: skip
    return entries


def opened(work: Work, folder: Path) -> HybridLMForCausalLM:
    return HybridLMForCausalLM.from_pretrained(folder, backend=work.config.ops.backend).to(work.parent.device).eval()
