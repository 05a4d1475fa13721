"""How ranks share a model, fully sharded (FSDP2); what of it is computed again in backward; first weights that depend on neither.

`fully_shard` splits every parameter along its first dimension over the ranks, with its gradient and its optimiser state, and
gathers a group of parameters while its modules run.
"""

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.classification import AnyModel
from hybridlm.mixers.moe import MoE
from hybridlm.modeling import Block
from train.tensor_files import local


def shard(model: AnyModel, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shards `model` over the ranks of `mesh` (one dimension), in groups that are gathered and freed one after the other.

    The matrices of products are gathered in `compute`, as autocast would round them, everything else, A_log, D, dt_bias, the
    convolution, norms, routers and the embedding, in fp32. What a rank keeps of weights and optimiser state is fp32, and in fp32
    gradients are summed over the ranks.
    """
    narrow, wide = (
        partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
        for dtype in (compute, torch.float32)
    )
    for block in blocks(model):
        # Each piece would gather the weights anew, and ranks whose inputs differ in shape have other numbers of pieces.
        block.mixer.hands_on = False  # type: ignore[assignment]
        if isinstance(block.mixer, MoE):
            # Ranks may call other experts than each other, so these come with the block.
            wide(block.norm)
            wide(block.mixer.gate)
            narrow(block)
        else:
            narrow([module for module in block.modules() if isinstance(module, nn.Linear)])
            wide(block)
    wide(model.backbone.embeddings)
    narrow(model.head)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(GatherBytes())
    # Of results that are views, which nothing here writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Else what is the root's own would stay gathered after a pass without backward, and parameters() would give other tensors.
    wide(model, reshard_after_forward=True)


class GatherBytes(DefaultAllGather):
    """gloo knows no FP8, but bytes."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Work | None:
        return super().__call__(output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), group, async_op)


def scale_weights(model: nn.Module) -> None:
    """Takes the scales of all weights that are gathered in FP8, as they are now, in one message; else each weight would take its
    own when it is gathered. All ranks must call it where the weights have changed."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The ranks that share the model; None where it is whole."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def blocks(model: AnyModel) -> Iterable[Block]:
    return model.backbone.layers  # type: ignore[return-value]


def recompute(model: AnyModel, kinds: str) -> None:
    """Has the blocks of these kinds (pattern symbols) keep only their input, and compute the rest again in backward."""
    for symbol, block in zip(model.config.hybrid_override_pattern, blocks(model), strict=True):
        block.gradient_checkpointing = symbol in kinds
        block._gradient_checkpointing_func = partial(  # type: ignore[assignment]
            checkpoint, use_reentrant=False, preserve_rng_state=model.config.has_dropout
        )


@torch.no_grad()
def initialise(model: AnyModel, seed: int) -> None:
    """Gives every parameter and buffer its first value, on whatever device it is.

    Each module draws from a generator of its own, seeded by its name, on the CPU: the weights depend neither on the number of
    ranks nor on how they share the model. Where they do, each draws a part of the modules and sends the others their rows.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)  # its modules are as they were before any wrapper
    targets = dict(chain(model.named_parameters(), model.named_buffers()))
    modules = [(name, module) for name, module in twin.named_modules() if [*own_tensors(module)]]
    mesh = mesh_of(model)
    rank, ranks = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    for first in range(0, len(modules), ranks):
        at_once = modules[first : first + ranks]  # each rank draws one of them
        for owner, (name, module) in enumerate(at_once):
            if owner == rank or [*module.buffers(recurse=False)]:  # buffers are not shared: each rank has them
                module.to_empty(device="cpu", recurse=False)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "little"))
                    twin._init_weights(module)
        for owner, (name, module) in enumerate(at_once):
            for key, value in own_tensors(module):
                put(targets[f"{name}.{key}"], value, owner)
            module.to_empty(device="meta", recurse=False)


def put(target: Tensor, whole: Tensor, source: int) -> None:
    """Fills a parameter or buffer with `whole`, of which that of the rank `source` counts."""
    if isinstance(target, DTensor):
        here = torch.empty(target.shape, device=target.device) if whole.is_meta else whole.to(target.device)
        part = distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=source)
        local(target).copy_(part.to_local())
    else:
        target.copy_(whole)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that are the module's own, not of modules in it."""
    return chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
