"""What the launcher asks for, held against the run's configuration, which decides.

`accelerate launch` hands its settings on in environment variables. Those that would change a run behind its configuration are an
error.
"""

from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from time import monotonic, sleep
from uuid import uuid4

import torch
from torch import distributed

from train.settings import RunConfig

# Variable -> its value, in lower case, where nobody asks for anything, and what any other value asks for.
NEUTRAL = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "a parallelism_config"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "a dynamo_backend"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient_accumulation_steps (set train.micro_batch)"),
}
SHARDED = "ACCELERATE_USE_FSDP"
READ = (
    *NEUTRAL, SHARDED, "ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING",
)  # fmt: skip


def take(environment: MutableMapping[str, str]) -> dict[str, str]:
    """What the launcher asks for, in lower case. Afterwards the environment asks Accelerate neither to shard the model, which is
    done here (train/sharding.py), with a policy of our own, nor for what `check` refuses: it would look for that before."""
    asked = {name: environment[name].lower() for name in READ if name in environment}
    for name in (SHARDED, *NEUTRAL):
        environment.pop(name, None)
    return asked


def check(config: RunConfig, asked: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: launcher and configuration disagree; all points in one message.
    """
    train, faults = config.train, []
    precision = asked.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also what it says where nobody chose
    if precision not in ("no", train.precision):
        faults.append(f"mixed_precision is {precision} and train.precision {train.precision}")
    for name, (neutral, words) in NEUTRAL.items():
        if asked.get(name, neutral) != neutral:
            faults.append(f"it asks for {words}, which this program does not use")
    if asked.get(SHARDED) == "true":
        if asked.get("FSDP_VERSION") != "2":
            faults.append(f"fsdp_version is {asked.get('FSDP_VERSION', '1')}; this program has FSDP2 alone: fsdp_version: 2")
        if train.sharding != "fsdp2":
            faults.append(f"it asks for FSDP, and train.sharding is {train.sharding}")
        if asked.get("FSDP_OFFLOAD_PARAMS") == "true":
            faults.append("it asks for fsdp_offload_params, which this program does not do")
        if asked.get("FSDP_ACTIVATION_CHECKPOINTING") == "true" and not train.recompute:
            faults.append("it asks for fsdp_activation_checkpointing, and train.recompute names no kind of layer")
    if faults:
        raise ValueError(
            "the launcher and the run's configuration disagree:\n"
            + "".join(f"  {fault}\n" for fault in faults)
            + "Change the launcher's file (configs/accelerate/ has ones that agree) or the setting of the run."
        )


def join(environment: Mapping[str, str], timeout: timedelta) -> None:
    """Joins the process group of a launch by torchrun, before Accelerate would, which shares out GPUs in turns.

    torchrun keeps one store for a start and its restarts (torch 2.13). What ranks of an earlier start left there is taken for
    addresses of this one: they cannot connect, or wait for each other. So the ranks of this start first agree on a part of the
    store of their own. The number of the restart does not tell starts apart: an agent that was itself replaced counts anew.
    """
    devices, here = torch.cuda.device_count(), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < devices < here:
        raise ValueError(
            f"the launcher has started {here} ranks on this machine, which has {devices} GPU(s); start one for each "
            f"(--nproc_per_node {devices}, --num_processes)."
        )
    ranks = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or ranks == 1:
        return
    rank, address = int(environment["RANK"]), (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    store = distributed.TCPStore(*address, ranks, is_master=False, timeout=timeout)
    start = distributed.PrefixStore(meet(store, rank, ranks, timeout), store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=start, rank=rank, world_size=ranks, timeout=timeout)


def meet(store: distributed.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that all ranks of this start get and no other start has, whatever earlier ones have left in the store.

    Each rank leaves a word of its own; rank 0 answers it with the name, and once more where the word was an earlier start's.

    Raises:
        TimeoutError: a rank did not come.
    """
    own = uuid4().hex
    if rank:
        store.set(f"word/{rank}", own)
        try:
            store.wait([f"answer/{own}"], timeout)
        except distributed.DistStoreError:
            raise TimeoutError(f"rank 0 did not answer rank {rank} within {timeout.total_seconds():g} s.") from None
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    missing, until = set(range(1, ranks)), monotonic() + timeout.total_seconds()
    while missing:
        for other in list(missing):
            if store.check([f"{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", own)
        if monotonic() > until:
            raise TimeoutError(f"rank(s) {sorted(missing)} of {ranks} did not come within {timeout.total_seconds():g} s.")
        sleep(0.05)
    return own


def told(environment: Mapping[str, str]) -> str:
    """Who started this process, in words."""
    starters = {"ACCELERATE_MIXED_PRECISION": "accelerate launch", "TORCHELASTIC_RUN_ID": "torchrun"}
    by = next((words for variable, words in starters.items() if variable in environment), "python")
    if "TORCHELASTIC_RESTART_COUNT" not in environment:
        return by
    restart, most = (environment[f"TORCHELASTIC_{name}"] for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return f"{by}, restart {restart} of at most {most}"
