"""The settings of a run: the docstring under a field is its help; its type and bounds are checked by `train.config.parse`."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
settings = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True, config=settings)
class Model:
    config: str | dict[str, Any] | None = None
    """shape of the model: a file of configs/model/, or its content inline"""
    init_from: str | None = None
    """start from the weights of this model folder or hub name; its shape then stands in the place of model.config"""


@dataclass(frozen=True, config=settings)
class Ops:
    backend: Literal["auto", "eager", "fused", "naive"] = "auto"
    """implementation of the operators; auto takes the fastest that runs here"""


@dataclass(frozen=True, config=settings)
class BlendEntry:
    """A source of a blend; what is not said here is as in Data."""

    source: str
    weight: Annotated[list[Rate], BeforeValidator(lambda weight: weight if isinstance(weight, list) else [weight])]
    """share of the samples, of any scale: one number, or one for each phase"""
    revision: str | None = None
    text_column: str = "text"
    template: str | None = None
    license: str | None = None


@dataclass(frozen=True, config=settings)
class Data:
    source: str | None = "stdlib"
    """stdlib, a text, JSONL, CSV, Parquet or Arrow file, a folder of one kind, or a hub dataset (name or name:configuration)"""
    blend: Annotated[list[BlendEntry], Field(min_length=1)] | None = None
    """several sources instead of one: a list of {source, weight, revision, text_column, template, license}"""
    phases: tuple[Share, ...] = ()
    """shares of train.steps at which the next weights of the blend begin: with [0.6, 0.8] each source has three weights"""
    revision: str | None = None
    """commit, branch or tag of a hub dataset; default: the newest"""
    val_source: str | None = None
    """where validation comes from; default: the source's own validation split, else val_fraction of it"""
    val_fraction: Share = 0.1
    """share held out of a source that has no validation split: of its documents, or of the characters of a single one"""
    text_column: str = "text"
    """column that holds the text, where the source has columns"""
    template: str | None = None
    """text made of several columns instead, such as {title}: {body}"""
    label_column: str | None = None
    """trains a classifier of whole documents: the column of their labels (of stdlib: package); default: a language model"""
    license: str | None = None
    """licence of the text, for the record; default: what the dataset says"""
    bad_documents: Literal["stop", "skip"] = "stop"
    """what to do at a document that cannot be read or has no text: stop, or skip and count it"""
    tokenizer: str | None = None
    """`bytes`, or folder or hub name of a fast tokenizer; default: that of model.init_from, else bytes"""
    seq_len: Positive = 512
    """predictions in a training window, tokens"""
    packing: Literal["stream", "best-fit"] = "stream"
    """stream: documents end to end, cut where a window ends; best-fit: cut only where longer than a window, with some padding"""
    carry_state: bool = False
    """row i of each batch goes on in the text where row i of the batch before ended, and starts from the state that was left
    there, detached: gradients reach seq_len positions back, the state any number. For patterns without attention"""
    streaming: bool = False
    """read and tokenise while training, and keep nothing: for a hub dataset too large for the disk. Not shuffled"""
    workers: Annotated[int, Field(ge=0)] = 0
    """processes of each rank that read batches ahead"""
    cache_dir: str = "~/.cache/hybridlm"
    """where tokenised data is kept between runs"""


@dataclass(frozen=True, config=settings)
class Optim:
    name: Literal["adamw", "muon"] = "muon"
    """muon: for the matrices of the layers, and AdamW for embedding, head and vectors; adamw: for all"""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """peak learning rate, of both: Muon's updates are made as large as AdamW's"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """of Muon: decay of the gradient's running mean"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of AdamW: decay of the gradient's running mean"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """of AdamW: decay of the squared gradient's running mean"""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """of AdamW: added to the root of the running mean square"""
    weight_decay: Rate = 0.1
    """decoupled weight decay; none on norms, biases, A_log, D and dt_bias"""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """largest norm of the whole gradient; a larger one is scaled down to it"""
    z_loss: Rate = 0.0
    """weight of (log of the sum of exp(logits))^2 in the gradients, which keeps logits from drifting; not in the logged loss"""
    moe_bias_rate: Rate = 1e-3
    """step of the bias that balances the load of experts (no loss does); 0: it stays"""


@dataclass(frozen=True, config=settings)
class Schedule:
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """share of train.steps over which the learning rate rises linearly to its peak"""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.2
    """share of train.steps at the end over which it falls; in between it is stable"""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """shape of the fall"""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """learning rate of the last step as a share of the peak"""
    batch_start: Positive | None = None
    """sequences in the first steps; doubles in even stages up to train.global_batch. Default: no warm-up of the batch"""
    batch_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of train.steps after which the batch is whole"""
    length_start: Positive | None = None
    """positions of the rows that windows are cut into in the first steps; doubles up to data.seq_len. Default: they stay whole"""
    length_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of train.steps after which windows are whole"""


@dataclass(frozen=True, config=settings)
class Train:
    steps: Positive = 1000
    """optimiser steps of the whole run"""
    global_batch: Positive = 16
    """sequences in a step, over all ranks together"""
    micro_batch: Positive | None = None
    """sequences in one forward pass of a rank; default: all of its share of the batch"""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """arithmetic of matrix products; weights and optimiser stay fp32. bf16 pays on GPUs and CPUs with bf16 units, fp8 on GPUs"""
    fp8_unfit: Literal["stop", "bf16"] = "stop"
    """with fp8, what to do at a linear layer whose sizes do not divide by 16: stop and name it, or leave it in bf16"""
    fp8_emulate: bool = False
    """with fp8, compute the same numbers without FP8 units, slowly: on CPUs and older GPUs"""
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: parameters, gradients and optimiser state are split over the ranks; none: each rank has all of them"""
    recompute: str = ""
    """kinds of layer, as pattern symbols, whose activations are computed again in backward instead of kept, such as M*-"""
    checkpoint_every: Positive = 500
    """steps between checkpoints; the last step always has one"""
    keep_checkpoints: Positive = 2
    """how many of the newest checkpoints stay"""
    keep_every: Positive | None = None
    """checkpoints of steps that this divides stay for good; default: none"""
    checkpoint_async: bool = True
    """write checkpoints behind the training, from a copy of the weights; false: training waits, and there is no copy"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite changes no weight, is written to incidents.jsonl, and stops the run or is skipped"""
    spike_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """skip steps whose loss is this many standard deviations above the mean of the last spike_window; default: none"""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """steps that a loss is compared with"""
    timeout: Annotated[float, Field(gt=0, le=1e7)] = 600.0
    """seconds after which a rank that gives no sign of life ends the run"""
    val_every: Positive = 250
    """steps between validations; there is one before the first step and one after the last"""
    val_sequences: Positive | None = None
    """windows of seq_len in a validation, spread evenly over the held-out text; default: all of them"""


@dataclass(frozen=True, config=settings)
class Distill:
    teacher: str | None = None
    """learn from this model, a folder or hub name: forward KL on its logits instead of the next-token loss"""
    logits: str | None = None
    """learn from the largest logits of a teacher in this folder, which `distill --write_logits` made; no teacher is in memory"""
    top_k: Positive = 64
    """entries of a token that are kept when logits are written"""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """what the logits of both are divided by; the loss is times its square"""
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the loss that is the next-token loss on the text"""
    hidden_weight: Rate = 0.0
    """weight of the mean squared difference between the hidden states of teacher and student, each divided by its own size"""


@dataclass(frozen=True, config=settings)
class Log:
    every: Positive = 10
    """steps between lines in metrics.jsonl"""
    wandb: bool = False
    """also log to Weights & Biases; offline where no key is configured"""
    wandb_project: str = "hybridlm"
    """project in Weights & Biases"""
    sample_prompt: Annotated[str, Field(max_length=10_000)] = "import "
    """text that the model continues after each validation"""
    sample_tokens: Annotated[int, Field(ge=0, le=10_000)] = 200
    """length of that sample, tokens; 0 for none"""


@dataclass(frozen=True, config=settings)
class RunConfig:
    run_dir: str
    """folder of this run: configuration, metrics, checkpoints, model"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the initial weights, the order of the data and the masks of dropout"""
    model: Model = field(default_factory=Model)
    ops: Ops = field(default_factory=Ops)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    log: Log = field(default_factory=Log)
