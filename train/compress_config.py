"""The settings of `python -m train compress`: those of the distillation, a run like any other, and what comes before it."""

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hybridlm import HybridLMConfig
from hybridlm.compress.search import AXES, Budget, default_axis
from hybridlm.twin import count_parameters
from train.settings import Distill, Model, Positive, RunConfig, settings

Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sizes = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Comparison = Literal["parent", "cross-entropy", "scratch", "uniform"]


@dataclass(frozen=True, config=settings)
class Compress:
    max_parameters: Limit | None = None
    """most parameters of the student: up to 1 a share of the parent's, above it their number"""
    max_memory: Limit | None = None
    """most bytes of weights and cache of one sequence of `context` tokens: up to 1 a share of the parent's, above it bytes"""
    min_speedup: Limit | None = None
    """least speed of a request of `prompt` and `new` tokens, measured on this machine, as a multiple of the parent's"""
    context: Positive = 65536
    """tokens of the sequence whose cache counts"""
    weight_bits: Positive = 16
    """of a weight, where memory is counted"""
    cache_bits: Positive = 16
    """of a value in the cache, where memory is counted; states are fp32"""
    prompt: Positive = 65536
    """tokens that a timed request reads"""
    new: Positive = 1024
    """tokens that it writes"""
    turns: Positive = 3
    """requests of each model that are timed, in turns with the others"""
    mamba_layers: Sizes | None = None
    """numbers of Mamba-2 layers in the grid; default: the parent's, down to two thirds"""
    attention_layers: Sizes | None = None
    """numbers of attention layers; default likewise"""
    ffn_layers: Sizes | None = None
    """numbers of FFN layers; default likewise"""
    mamba_num_heads: Sizes | None = None
    """numbers of Mamba heads, the same of each group; default: the parent's, and 7/8, 3/4, 5/8, 1/2 of it"""
    num_key_value_heads: Sizes | None = None
    """numbers of key-value heads, each with its query heads; default likewise"""
    intermediate_size: Sizes | None = None
    """numbers of FFN neurons; default likewise, in multiples of 16"""
    hidden_size: Sizes | None = None
    """numbers of channels of the residual stream; default: the parent's alone"""
    layer_samples: Positive = 128
    """windows of training text by which the importance of layers is measured"""
    part_samples: Positive = 1024
    """windows by which that of heads, groups, neurons and channels is measured"""
    score_samples: Positive = 128
    """windows on which a candidate is scored"""
    scored: Positive = 400
    """candidates, of least predicted damage, that are cut out and scored"""
    timed: Positive = 130
    """candidates, of least loss, that are timed"""
    distilled: Positive = 3
    """candidates, of least loss among those fast enough, that are distilled for `short_steps` to find the best"""
    short_steps: Positive = 100
    """steps of that short distillation; the winner then begins again from what was cut out"""
    compare: tuple[Comparison, ...] = ("parent", "cross-entropy", "scratch", "uniform")
    """what is trained beside the student for as many tokens: the parent; what was cut out, without a teacher; the student's shape
    from scratch; and, with the teacher, uniform cuts of depth and of width to the student's size"""


@dataclass(frozen=True, config=settings)
class CompressConfig(RunConfig):
    run_dir: str
    """folder of this compression: what the search found, trainings, report, student"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the order of the data, of the search and of all trainings"""
    compress: Compress = field(default_factory=Compress)


def axes(config: Compress, parent: HybridLMConfig) -> dict[str, list[int]]:
    """The grid."""
    return {axis: getattr(config, axis) or default_axis(parent, axis) for axis in AXES}


def budget(config: Compress, parent: HybridLMConfig) -> Budget:
    """What the settings leave, in numbers."""
    unlimited = Budget(context=config.context, weight_bits=config.weight_bits, cache_bits=config.cache_bits)

    def limit(asked: float | None, of_parent: float) -> float | None:
        return asked * of_parent if asked is not None and asked <= 1 else asked

    return replace(
        unlimited,
        parameters=limit(config.max_parameters, count_parameters(parent)),
        memory=limit(config.max_memory, unlimited.bytes_of(parent)),
    )


def training(
    config: CompressConfig, run_dir: str, begin: Model, teacher: str | None = None, steps: int | None = None
) -> RunConfig:
    """One of the trainings: the settings of the distillation, from another beginning, with a teacher or without."""
    values: dict[str, Any] = {name: value for name, value in vars(config).items() if name in RunConfig.__dataclass_fields__}
    distill = replace(config.distill, teacher=teacher) if teacher else Distill()
    train = config.train if steps is None else replace(config.train, steps=steps)
    data = replace(config.data, tokenizer=config.data.tokenizer or config.model.init_from)
    return RunConfig(**values | {"run_dir": run_dir, "model": begin, "distill": distill, "train": train, "data": data})
