"""safetensors files of a model that ranks may share: written by all ranks at once, and read by each for its own part.

FSDP2 cuts a tensor along its first dimension as torch.chunk does: each rank has ceil(rows / ranks) rows, the last ones fewer or
none. Of a tensor that every rank has whole, that of rank 0 is written. Either way what a rank gives to a file is one stretch of
elements.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, Work
from torch.distributed.tensor import DTensor, Shard

from train import files
from train.ranks import digest, together

FILE_BYTES = 5_000_000_000  # that tensors are gathered into a file for, as transformers' save_pretrained does
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What a rank has of a tensor.

    Attributes:
        local: this rank's rows. shape: of the whole. shared: whether each rank has rows of its own; else all have all.
    """

    local: Tensor
    shape: tuple[int, ...]
    shared: bool

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.local.element_size()

    def stretch(self, rank: int, ranks: int) -> tuple[int, int]:
        """The elements (first, last + 1) that a rank gives to the file."""
        if not self.shared:
            return (0, self.size) if rank == 0 else (0, 0)
        rows, width = self.shape[0], prod(self.shape[1:])
        chunk = -(-rows // ranks)
        return min(rank * chunk, rows) * width, min((rank + 1) * chunk, rows) * width


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet. `dtype` is its name in safetensors where torch's is not known here."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


def local(tensor: Tensor) -> Tensor:
    """The storage of a parameter, buffer or optimiser state on this rank, without gradient."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return getattr(tensor, "_tensor", tensor)  # torchao's wrapper of a weight that FSDP2 gathers in FP8


def part(tensor: Tensor) -> Part:
    shared = isinstance(tensor, DTensor)
    assert not shared or tuple(tensor.placements) == (Shard(0),), tensor.placements  # type: ignore[attr-defined]
    return Part(local(tensor), tuple(tensor.shape), shared)


def place(group: ProcessGroup | None) -> tuple[int, int]:
    """(rank, ranks) in a group; None is this process alone."""
    return (group.rank(), group.size()) if group is not None else (0, 1)


def split(parts: Mapping[str, Part], name: str) -> StateDictSplit:
    """Which tensors come into which file: NAME.safetensors, or NAME-00001-of-000NN.safetensors of FILE_BYTES at most."""
    return split_state_dict_into_shards_factory(
        parts,  # type: ignore[arg-type]
        get_storage_size=lambda part: part.nbytes,
        filename_pattern=name + "{suffix}.safetensors",
        max_shard_size=FILE_BYTES,
    )


def shard_index(shards: StateDictSplit) -> bytes:
    """The file that says which tensor is in which of several files."""
    return json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=2).encode()


def fingerprint(parts: Mapping[str, Part], group: ProcessGroup | None) -> str:
    """The sha256 of names, shapes, dtypes and digests of tensors: the same for any number of ranks that share them. All ranks
    of the group must call it."""
    rank, ranks = place(group)
    names = sorted(parts)
    sums = []
    for name in names:
        first, end = parts[name].stretch(rank, ranks)
        sums.append(digest(parts[name].local, first).cpu() if end > first else torch.zeros((), dtype=torch.int64))
    total = torch.stack(sums)
    if group is not None:
        distributed.all_reduce(total, group=group)
    table = [[name, parts[name].shape, DTYPES[parts[name].local.dtype], value] for name, value in zip(names, total.tolist())]
    return sha256(json.dumps(table).encode()).hexdigest()


def write(folder: Path, content: Mapping[str, Mapping[str, Part]], group: ProcessGroup | None) -> dict[str, str]:
    """Writes files of tensors, by name, into a folder that is there. Each is written by one rank, to which the others send their
    parts of one tensor after the other: no rank holds more than its own parts and one whole tensor. All ranks of the group
    must call it.

    Returns:
        The sha256 of each file.

    Raises:
        OSError, RanksError: on all ranks, where one of them failed.
    """
    names, (_, ranks) = list(content), place(group)
    buffers: list[Tensor] = []  # one
    together(group, lambda: buffers.append(torch.empty(_most_received(content, group), dtype=torch.uint8)))
    digests: dict[str, str] = {}
    for first in range(0, len(names), ranks):
        at_once = {name: content[name] for name in names[first : first + ranks]}
        for written in together(group, lambda: _write_one_each(folder, at_once, buffers[0], group)):  # noqa: B023
            digests |= written
    return digests


def _most_received(content: Mapping[str, Mapping[str, Part]], group: ProcessGroup | None) -> int:
    """Bytes of the largest tensor that this rank has to gather."""
    rank, ranks = place(group)
    parts = [one for name in list(content)[rank::ranks] for one in content[name].values()]
    return max((one.nbytes for one in parts if one.stretch(rank, ranks) != (0, one.size)), default=0)


def _write_one_each(
    folder: Path, content: Mapping[str, Mapping[str, Part]], buffer: Tensor, group: ProcessGroup | None
) -> dict[str, str]:
    """File i is written by rank i. What a rank sends to others is sent whatever happens to its own."""
    rank, ranks = place(group)
    sending: list[Work | None] = []
    for owner, tensors in enumerate(content.values()):
        for tag, (_, one) in enumerate(in_order(tensors)):
            first, end = one.stretch(rank, ranks)
            if owner != rank and end > first:
                sending.append(distributed.isend(flat(one.local), group=group, group_dst=owner, tag=tag))
    digests = {}
    try:
        for name in list(content)[rank : rank + 1]:
            blocks = _safetensors(content[name], buffer, group)
            try:
                digests[name] = files.write(folder / name, blocks)
            finally:
                for _ in blocks:  # of a file that could not be written: else those who send would wait for ever
                    pass
    finally:
        _wait(sending)
    return digests


def _safetensors(tensors: Mapping[str, Part], buffer: Tensor, group: ProcessGroup | None) -> Iterator[bytes | memoryview]:
    """A safetensors file in blocks, each good until the next. The library's own writer copies all tensors into one and keeps
    Python, and so the training beside it, waiting meanwhile.
    """
    yield header(tensors)
    for tag, (_, one) in enumerate(in_order(tensors)):
        yield _gather(one, buffer, tag, group).numpy().data


def header(tensors: Mapping[str, Part]) -> bytes:
    """What a safetensors file begins with; the bytes of its tensors follow, `in_order`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in in_order(tensors):
        entries[name] = {"dtype": DTYPES[one.local.dtype], "shape": list(one.shape), "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_order(tensors: Mapping[str, Part]) -> list[tuple[str, Part]]:
    """The widest first, so that each stays aligned to its own width."""
    return sorted(tensors.items(), key=lambda item: (-item[1].local.element_size(), item[0]))


def _gather(one: Part, buffer: Tensor, tag: int, group: ProcessGroup | None) -> Tensor:
    """The bytes of a whole tensor: the rank's own, or in `buffer`."""
    rank, ranks = place(group)
    stretches = [one.stretch(i, ranks) for i in range(ranks)]
    own, width = flat(one.local), one.local.element_size()
    if stretches[rank] == (0, one.size):
        assert len(own) == one.nbytes, "a part of a tensor, and no group to get the others from"
        return own
    receiving: list[Work | None] = []
    for other, (first, end) in enumerate(stretches):
        into = buffer[first * width : end * width]
        if other == rank and end > first:
            into.copy_(own)
        elif end > first:
            receiving.append(distributed.irecv(into, group=group, group_src=other, tag=tag))
    _wait(receiving)
    return buffer[: one.nbytes]


def _wait(works: list[Work | None]) -> None:
    for work in works:
        assert work is not None  # which it is on a rank outside of the group
        work.wait()


def flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU, in the order of its elements."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def stored(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files, by name.

    Raises:
        ValueError: one of them is none.
    """
    found = {}
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                found[name] = Stored(path, tuple(header.get_shape()), dtypes.get(header.get_dtype(), header.get_dtype()))
    return found


def mismatch(what: str, want: Mapping[str, Tensor], got: Mapping[str, Stored], cast: bool = False) -> list[str]:
    """A line for the tensors that are missing, one for those that are unknown, and one for each of another shape or dtype. With
    `cast` any floating point number will do for another."""
    faults = [f"{what} missing {sorted(want.keys() - got.keys())}"] if want.keys() - got.keys() else []
    if got.keys() - want.keys():
        faults.append(f"{what} unknown {sorted(got.keys() - want.keys())}")
    for name in sorted(want.keys() & got.keys()):
        wanted, came = (tuple(want[name].shape), want[name].dtype), (got[name].shape, got[name].dtype)
        floats = isinstance(came[1], torch.dtype) and came[1].is_floating_point and wanted[1].is_floating_point
        if wanted[0] != came[0] or not (wanted[1] == came[1] or (cast and floats)):
            faults.append(f"{what} {name}: wanted {wanted}, got {came}")
    return faults


@torch.no_grad()
def read(sources: Mapping[str, Stored], targets: Mapping[str, Tensor | Part], group: ProcessGroup | None) -> None:
    """Fills tensors of these names, sharded or whole, from their files: of each only the rows that this rank has. What they held
    is never looked at.

    Raises:
        ValueError: a file cannot be read any more.
    """
    rank, ranks = place(group)
    for path in sorted({sources[name].path for name in targets}):
        with _opened(path) as file:
            for name in (name for name in targets if sources[name].path == path):
                target = targets[name]
                one = target if isinstance(target, Part) else part(target)
                if not one.shared:
                    one.local.copy_(file.get_tensor(name))
                    continue
                width = prod(one.shape[1:])
                first, end = one.stretch(rank, ranks)
                assert one.local.numel() == end - first, "a part of a tensor, and not the group that has the others"
                if end > first:
                    one.local.copy_(file.get_slice(name)[first // width : end // width])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
