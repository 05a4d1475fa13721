"""What a run starts from: its model, tokenizer, data and logger."""

import copy
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from tokenizers import processors
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification, fp8
from hybridlm.checkpoint import check_folder, load_tokenizer
from hybridlm.classification import AnyModel
from hybridlm.configuration import CLASSIFIER
from hybridlm.data.blend import Blend
from hybridlm.data.labelled import Labelled
from hybridlm.data.lanes import Lanes
from hybridlm.data.packing import BestFit
from hybridlm.data.preparation import cache_folder, documents_to_shards, prepare
from hybridlm.data.sampler import Sampler
from hybridlm.data.shards import Shards
from hybridlm.data.sources import NoSuchSplit, Source, is_prepared, open_source, open_validation
from hybridlm.data.streaming import Streamed, open_streaming
from hybridlm.ops.precision import cpu_has_bf16
from hybridlm.strict_yaml import parse_yaml
from hybridlm.tokenizer import byte_tokenizer
from train import launch, sharding
from train.config import SOURCE_SETTINGS, blend_weights, differences, dump
from train.loader import Stream
from train.optim import batch_size, row_length, samples_by
from train.settings import BlendEntry, Data, RunConfig
from train.top_logits import taught
from train.weights import load_weights

logger = logging.getLogger(__name__)

# What matrix products are taken in; fp8 narrows the inputs of some further.
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def build_model(
    config: RunConfig,
    start_from: Path | None = None,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    labels: list[str] | None = None,
) -> AnyModel:
    """The model of the run, in fp32 and training mode, with its first weights or those of `model.init_from`; where a checkpoint,
    `start_from`, is going to fill them, with anything.

    Args:
        labels: of a classifier, as `read_labels` gives them. Where `model.init_from` has others, or none, only its backbone is
            taken.
        mesh: the ranks that share it (train.sharding), and `group`, the same over gloo; None: it is whole.

    Raises:
        ValueError: no such folder, weights that do not fit, or attention in a model whose states are to be carried on.
    """
    folder = None
    if start_from is not None:
        folder = str(start_from / "model")
    elif config.model.init_from is not None:
        folder = fetch(config.model.init_from)
    if config.model.init_from is not None:
        assert folder is not None
        shape = HybridLMConfig.from_pretrained(folder)
    else:
        assert isinstance(config.model.config, dict)
        shape = HybridLMConfig.from_strict_dict(config.model.config)
    if config.data.carry_state and "*" in shape.hybrid_override_pattern:
        raise ValueError(
            f"data.carry_state: the pattern {shape.hybrid_override_pattern!r} has attention (*), whose keys and values would "
            "grow with every step without end; take a pattern without it, or set data.carry_state: false."
        )
    has_head = shape.architectures == [CLASSIFIER] and shape.label_names == labels
    if labels is not None:
        shape.id2label, shape.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    kind = HybridLMForCausalLM if labels is None else HybridLMForSequenceClassification
    with torch.device("meta"):
        model: AnyModel = kind(shape, backend=config.ops.backend).train()
    if config.train.precision == "fp8":
        unfit, emulate = config.train.fp8_unfit, config.train.fp8_emulate
        fp8.convert(model, device, unfit=unfit, emulate=emulate, ranks=1 if mesh is None else mesh.size())
    sharding.recompute(model, config.train.recompute)
    if mesh is not None:
        sharding.shard(model, mesh, COMPUTE[config.train.precision])
    model.to_empty(device=device)
    if start_from is None and (folder is None or labels is not None):
        sharding.initialise(model, config.seed)
    if folder is not None and labels is None:
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if folder is not None and start_from is None:
        load_weights(folder, model, group, only="" if labels is None or has_head else "backbone.")
    return model


def fetch(name: str) -> str:
    """The model folder of this name, on this machine: one of the hub is downloaded.

    Raises:
        ValueError: there is no such folder, or it is none of a model.
    """
    check_folder(name)
    local = Path(name).expanduser()
    return str(local) if local.exists() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])


def read_labels(config: RunConfig, start_from: Path | None, quiet: bool) -> list[str] | None:
    """The labels of the training documents, in the order of their numbers; None in the run of a language model. Prepares the
    data, which `open_data` then finds ready.

    Raises:
        ValueError: no such data, or no labels in it.
    """
    if config.data.label_column is None:
        return None
    ((training, _),) = prepare_entries(config.data, open_tokenizer(config, start_from), quiet)
    return training.meta["labels"]


def check_shape(start_from: Path, model: AnyModel) -> None:
    """
    Raises:
        ValueError: the checkpoint is of another architecture, though its tensors may have the same sizes.
    """
    kept, names = HybridLMConfig.from_pretrained(start_from / "model"), HybridLMConfig.__annotations__
    before, after = ({name: getattr(config, name) for name in (*names, "label_names")} for config in (kept, model.config))
    if lines := list(differences(before, after)):
        raise ValueError(
            f"{start_from} is of another model:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "Give the run its settings, or pass --allow-config-change to go on with these."
        )


def check_state(
    start_from: Path, state: dict[str, Any], config: RunConfig, stream: Stream, held_out: list[str], allow_config_change: bool
) -> None:
    """
    Args:
        state: of the checkpoint. held_out: the sha256 of the validation tokens, by source.

    Raises:
        ValueError: the run cannot go on from there with this data, these phases or this length.
    """
    step, samples = state["step"], state["samples"]
    if changed := stream.changed(state["identity"], samples):
        raise ValueError(
            f"{start_from} is of a run with other data, so its place there means nothing here:\n"
            + "".join(f"  {line}\n" for line in changed)
            + "Restore what it was, or start a new run from its model (--model.init_from)."
        )
    if config.data.phases and samples != samples_by(config, step):
        raise ValueError(
            f"data.phases are counted in steps, and the {step} so far were of other batches than these settings say "
            f"(train.global_batch {config.train.global_batch}, schedule.batch_start, schedule.batch_warmup, train.steps); "
            "restore them, or start a new run from its model (--model.init_from)."
        )
    if state["validation"] != held_out and not allow_config_change:
        raise ValueError(
            f"{start_from} was validated on other text than there is now, so losses would not compare. Restore it, or pass "
            "--allow-config-change."
        )
    if step > config.train.steps:
        raise ValueError(f"{start_from} is past train.steps ({config.train.steps}); raise train.steps to go on.")


def open_tokenizer(config: RunConfig, start_from: Path | None) -> PreTrainedTokenizerBase:
    name, data = config.data.tokenizer, config.data
    if name is None and config.model.init_from is not None:
        name = str(start_from / "model") if start_from else config.model.init_from
    if name is None and (source := data.blend[0].source if data.blend else data.source) and is_prepared(source):
        name = str(Path(source).expanduser() / "tokenizer")
    return byte_tokenizer() if name in (None, "bytes") else load_tokenizer(name)


def build_tokenizer(config: RunConfig, model: AnyModel, start_from: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; the model's configuration takes its special ids.

    Raises:
        ValueError: it has more tokens than the model has embeddings.
    """
    tokenizer = open_tokenizer(config, start_from)
    if (needed := max(tokenizer.get_vocab().values()) + 1) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path or 'bytes'} has token ids up to {needed - 1} and the model only "
            f"vocab_size={model.config.vocab_size}; set vocab_size to at least {needed}."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, key, getattr(tokenizer, key))
        if isinstance(model, HybridLMForCausalLM):
            setattr(model.generation_config, key, getattr(tokenizer, key))
    return tokenizer


def closing(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> PreTrainedTokenizerBase:
    """A tokenizer that makes of a text what a classifier was trained on: its tokens, as many as a window has room for, and the
    end, at which the class is read. What a text has of the names of special tokens is text."""
    closed, end = copy.deepcopy(tokenizer), tokenizer.eos_token
    special = [(end, tokenizer.eos_token_id)]
    closed.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=special)
    closed.split_special_tokens = closed.init_kwargs["split_special_tokens"] = True  # what is saved is what is in init_kwargs
    closed.model_max_length, closed.padding_side, closed.truncation_side = seq_len, "right", "right"
    return closed


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, quiet: bool) -> tuple[Stream, list[Shards]]:
    """The stream of training samples, and the validation shards of each source.

    Raises:
        ValueError: no such data, nothing in it to predict, a token id that the model does not have, or `distill.logits` that are
            of something else.
    """
    stream: Stream
    if config.data.streaming:
        stream, validation = open_streamed(config, tokenizer, vocab_size, quiet)
    else:
        stream, validation = open_blend(config, tokenizer, vocab_size, quiet)
    for shards in validation:
        _check_vocabulary(shards, vocab_size)
        if config.data.label_column is None and len(shards) == 2 * len(shards.documents):
            raise ValueError(
                f"the validation documents of {shards.meta['source']} have one token each, so there is nothing to predict; "
                "give longer ones (data.val_source), or hold out more (data.val_fraction)."
            )
    if config.distill.logits is not None:
        assert isinstance(stream, Blend)
        stream = taught(stream, config, vocab_size)
    return stream, validation


def open_blend(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, quiet: bool) -> tuple[Blend, list[Shards]]:
    """The training samples of one source or several, and their validation shards."""
    data = config.data
    pairs = prepare_entries(data, tokenizer, quiet)
    for shards, _ in pairs:
        _check_vocabulary(shards, vocab_size)
    packed: Callable[..., Sampler] = {"stream": Sampler, "best-fit": BestFit}[data.packing]
    if data.carry_state:
        packed = partial(Lanes, lanes=config.train.global_batch)
    if data.label_column is not None:
        packed = partial(Labelled, names=pairs[0][0].meta["labels"])
        packed(pairs[0][1], data.seq_len, config.seed, vocab_size)  # has the validation no other labels?
    samplers = [packed(shards, data.seq_len, config.seed, vocab_size) for shards, _ in pairs]
    borders = [samples_by(config, round(share * config.train.steps)) for share in data.phases]
    # With data.val_source all sources come with the same validation.
    validation = list({shards.folder: shards for _, shards in pairs}.values())
    return Blend(samplers, blend_weights(data) or [[1.0]], borders), validation


def prepare_entries(data: Data, tokenizer: PreTrainedTokenizerBase, quiet: bool) -> list[tuple[Shards, Shards]]:
    """The training and validation shards of each source."""
    single = {key: getattr(data, key) for key in ("source", *SOURCE_SETTINGS)}
    entries = data.blend or [BlendEntry(**single, weight=[1.0])]
    sources = [Source(one.source, one.revision, one.text_column, one.template, one.license, data.label_column) for one in entries]
    return [
        prepare(
            source, tokenizer, Path(data.cache_dir).expanduser(), val_source=held_out(data), val_fraction=data.val_fraction,
            bad_documents=data.bad_documents, quiet=quiet,
        )
        for source in sources
    ]  # fmt: skip


def held_out(data: Data) -> Source | None:
    return (
        None
        if data.val_source is None
        else Source(data.val_source, None, data.text_column, data.template, None, data.label_column)
    )


def open_streamed(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, quiet: bool
) -> tuple[Streamed, list[Shards]]:
    """The training samples of a source that is not kept, and the validation shards, which are."""
    data = config.data
    assert data.source is not None
    source = Source(data.source, data.revision, data.text_column, data.template, data.license)
    stream = Streamed(
        source, open_streaming(data.source, data.revision), tokenizer, data.seq_len, vocab_size,
        keep=config.train.global_batch, skip_bad=data.bad_documents == "skip",
    )  # fmt: skip
    try:
        documents = open_validation(val_source) if (val_source := held_out(data)) else open_source(source, "validation")
    except NoSuchSplit:
        raise ValueError(f"data.streaming holds nothing out of {data.source}; set data.val_source.") from None
    cache_dir = Path(data.cache_dir).expanduser()
    folder = cache_folder(documents, tokenizer, cache_dir)
    return stream, [documents_to_shards(documents, tokenizer, folder, data.bad_documents, quiet=quiet)]


def _check_vocabulary(shards: Shards, vocab_size: int) -> None:
    if shards.meta["largest_id"] >= vocab_size:
        raise ValueError(
            f"{shards.meta['source']} has token id {shards.meta['largest_id']}, past the vocabulary of the model "
            f"(vocab_size={vocab_size}); set vocab_size to the tokenizer's, or take the model's own tokenizer."
        )


def describe(
    config: RunConfig,
    model: AnyModel,
    stream: Stream,
    validation: list[Shards],
    accelerator: Accelerator,
    machines: int,
    step: int,
) -> None:
    """Prints what is about to run; every setting is in RUN/config.yaml."""
    batch = config.train.global_batch * config.data.seq_len
    samples = samples_by(config, config.train.steps)
    print(f"model       {sum(p.numel() for p in model.parameters()):,} parameters, {model.config.hybrid_override_pattern}")
    for line in stream.summary(samples):
        print(f"data        {line}")
    print(f"validation  {sum(map(len, validation)):,} tokens")
    first = batch_size(config, 1) * config.data.seq_len
    rising = f", the first of {first:,}" if first < batch else ""
    if (length := row_length(config, 1)) < config.data.seq_len:
        rising += f", in rows of {length:,} at first"
    print(f"training    {config.train.steps:,} steps of {batch:,} tokens{rising}")
    if (teacher := config.distill.teacher or config.distill.logits) is not None:
        print(f"loss        forward KL from {teacher}, temperature {config.distill.temperature:g}")
    ranks, device = accelerator.num_processes, accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"machine     {ranks} process(es) on {machines} machine(s), {name}, {config.train.precision}")
    shares = sharding.mesh_of(model) is not None
    held = f"each rank has 1/{ranks} of weights, gradients and optimiser state" if shares else "each rank has the whole model"
    again = config.train.recompute
    print(f"sharding    {held}; computed again in backward: {again or 'nothing'}")
    if config.train.precision == "fp8":
        print(f"fp8         {'emulated, ' * config.train.fp8_emulate}{fp8.summary(model)}")
    print(f"launcher    {launch.told(os.environ)}; timeout {config.train.timeout:g} s")
    print(f"operators   {', '.join(f'{op} {name}' for op, name in model.ops.backends.items())}")
    print(f"run         {config.run_dir}" + (f", going on from step {step}" if step else ""), flush=True)
    if config.train.precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        logger.warning("this CPU has no bf16 units: train.precision=bf16 rounds as bf16 does and is no faster than fp32 here.")


def start_wandb(accelerator: Accelerator, config: RunConfig) -> None:
    if config.log.wandb:
        import wandb

        mode = "online" if wandb.login(prompt=False) else "offline"
        where = {"dir": config.run_dir, "mode": mode, "name": Path(config.run_dir).name}
        accelerator.init_trackers(config.log.wandb_project, parse_yaml(dump(config)), {"wandb": where})
        print(
            f"wandb       {mode}"
            + ("" if mode == "online" else f" (no key is configured); later: wandb sync {config.run_dir}/wandb/…")
        )
