"""Shape checks that speak the letters of the docstrings."""

from functools import cache

import torch
from torch import Tensor

split = cache(str.split)  # of a few constants, thousands of times


def check_shape(name: str, tensor: Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Compares a tensor's shape with its letters; a letter seen for the first time takes its size from here."""
    want, shape = split(letters), tensor.shape
    if len(shape) == len(want):
        for letter, size in zip(want, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                break
        else:
            return
    known = ", ".join(f"{k}={sizes[k]}" for k in want if k in sizes)
    raise ValueError(f"{name} must have shape ({letters}){f' with {known}' if known else ''}; got {tuple(shape)}.")


def check_shapes(*arguments: tuple[str, Tensor, str]) -> dict[str, int]:
    """Checks (name, tensor, letters) triples against each other and returns the size of each letter.

    Raises:
        ValueError: two shapes disagree, or the sequence is empty.
    """
    sizes: dict[str, int] = {}
    for name, tensor, letters in arguments:
        check_shape(name, tensor, letters, sizes)
    if sizes.get("t") == 0:
        raise ValueError(f"{arguments[0][0]} has no time steps (shape {tuple(arguments[0][1].shape)}); pass at least one token.")
    return sizes


def check_seq_idx(seq_idx: Tensor, b: int, t: int) -> None:
    check_shape("seq_idx", seq_idx, "b t", {"b": b, "t": t})
    if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx must be integers, the number of each token's document; got {seq_idx.dtype}.")
