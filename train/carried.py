"""The states of recurrent layers between the batches of a run whose rows go on in the text (data.carry_state).

Truncated back-propagation through time (Williams & Peng 1990; Mikolov et al. 2010): a state is handed on, its gradient is not.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridlm.cache import HybridCache, State
from train.tensor_files import Part, Stored

PREFIX = "carried."  # of their names in a checkpoint: carried.<layer>.<which of the layer's>


class Carried:
    """What the rows of this rank were left with. In a run that carries nothing, it changes nothing and has nothing to save.

    Args:
        rows: of each micro-batch of this rank, one after the other (train.optim.micro_batches). global_batch: those of all ranks.

    Attributes:
        states: of each layer, (rows of this rank, …) detached; None before the first step and in layers that have none.
    """

    def __init__(self, layers: int, rows: list[range], global_batch: int):
        self.sizes, self.whole = [len(one) for one in rows], global_batch
        self.count = sum(self.sizes)
        self.states: list[State | None] = [None] * layers
        self.left: list[HybridCache] = []  # of each micro-batch, where its last pass ended

    def hand_on(self, i: int, batch: dict) -> dict:
        """What the model reads of micro-batch i: `continues` gives way to a cache that begins with the states of the last step,
        and with zeros in rows that do not go on. May be asked for any number of times in a step."""
        if "continues" not in batch:
            return batch
        del self.left[i:]
        cache = HybridCache(len(self.states))
        own = slice(sum(self.sizes[:i]), sum(self.sizes[: i + 1]))
        for layer, state in enumerate(self.states):
            if state is not None:
                cache.states[layer] = tuple(only(batch["continues"], t[own]) for t in state)
                cache.seen = 1  # or more: how many matters to attention alone
        self.left.append(cache)
        return {name: value for name, value in batch.items() if name != "continues"} | {"past_key_values": cache}

    def advance(self) -> None:
        """Takes over the states that the last pass over the batch has left, once a step.

        Also where the step changed no weight, for its text has been read. A row with a number in any layer that is not finite
        begins anew from zeros: else all that comes after would be lost with it.
        """
        layers = [[cache.states[i] for cache in self.left] for i in range(len(self.states))]
        states = [tuple(torch.cat(t).detach() for t in zip(*parts)) if parts and parts[0] else None for parts in layers]
        every = [t for state in states for t in state or ()]
        if every:
            finite = torch.stack([t.flatten(1).isfinite().all(1) for t in every]).all(0)
            self.states = [state and tuple(only(finite, t) for t in state) for state in states]
        self.left = []

    def parts(self) -> dict[str, Part]:
        """The states by name, as this rank's rows of those of the global batch."""
        return {f"{PREFIX}{i}.{k}": self.part(t) for i, state in enumerate(self.states) for k, t in enumerate(state or ())}

    def part(self, rows: Tensor) -> Part:
        return Part(rows, (self.whole, *rows.shape[1:]), self.count < self.whole)

    def unfit(self, kept: Mapping[str, Stored]) -> list[str]:
        """What keeps the states of a checkpoint, by name, from being those of this run."""
        others = sorted({one.shape[0] for one in kept.values()} - {self.whole})
        return [f"states are carried on of {rows} rows, and train.global_batch is {self.whole}" for rows in others]

    def make_room(self, kept: Mapping[str, Stored], device: torch.device) -> dict[str, Part]:
        """What the states of a checkpoint are to be read into; it is what the rows go on from."""
        rooms: list[list[Tensor]] = [[] for _ in self.states]
        for name in sorted(kept):
            one, layer = kept[name], int(name.split(".")[1])
            assert isinstance(one.dtype, torch.dtype)
            rooms[layer].append(torch.empty(self.count, *one.shape[1:], dtype=one.dtype, device=device))
        self.states = [tuple(room) or None for room in rooms]
        return self.parts()


def only(rows: Tensor, state: Tensor) -> Tensor:
    """The state (b …) of the rows (b) that are True; zeros for the others, whatever they held."""
    return torch.where(rows.reshape(-1, *[1] * (state.dim() - 1)), state, torch.zeros((), dtype=state.dtype, device=state.device))
