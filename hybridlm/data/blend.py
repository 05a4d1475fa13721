"""Several sources in one stream of samples, in shares that may change from one phase of training to the next.

Which source a sample is from, and its number there, follow from its number in the stream alone, in integers: the heaviest
source takes floor(m x its share) of the first m samples of a phase, the next one its part of what is left, and so on. So the
counts never stray from the shares by more than a few samples, and each source's own samples come in order, with no gap and no
repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from hybridlm.data.sampler import Sampler

UNIT = 2**32


def fixed_point(weights: Sequence[float]) -> list[int]:
    """Weights as whole shares of `UNIT`, so that all that follows is exact and the same on every machine."""
    total = sum(weights)
    return [round(weight / total * UNIT) for weight in weights]


def split(count: int, shares: list[int]) -> list[int]:
    """How many of the first `count` samples each source has; one more sample is one more for exactly one of them."""
    counts, left, rest = [0] * len(shares), count, sum(shares)
    # The heaviest first, which keeps the rounding of the rest smallest.
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if shares[i]:
            counts[i] = left * shares[i] // rest
            left, rest = left - counts[i], rest - shares[i]
    return counts


@dataclass(frozen=True)
class Blend:
    """Samples by number. It has no state: a position means the same in any process, and seeking costs nothing.

    Attributes:
        samplers: one a source.
        weights: for each phase, a weight for each source, of any scale.
        borders: the sample numbers at which the phases after the first begin, non-decreasing.
    """

    samplers: list[Sampler]
    weights: list[list[float]]
    borders: list[int]

    @cached_property
    def phases(self) -> list[tuple[int, list[int]]]:
        """For each phase its first sample number and the shares of the sources."""
        return list(zip([0, *self.borders], map(fixed_point, self.weights), strict=True))

    @property
    def names(self) -> list[str]:
        return [sampler.shards.meta["source"] for sampler in self.samplers]

    def counts(self, stop: int) -> list[int]:
        """How many of the samples 0 … stop - 1 are from each source."""
        ends = [*self.borders, stop]
        parts = [split(max(0, min(end, stop) - start), shares) for (start, shares), end in zip(self.phases, ends, strict=True)]
        return [sum(of_source) for of_source in zip(*parts, strict=True)]

    def where(self, number: int) -> tuple[int, int]:
        """The source of a sample, and its number there."""
        before, after = self.counts(number), self.counts(number + 1)
        return next((i, m) for i, (m, n) in enumerate(zip(before, after, strict=True)) if m != n)

    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Samples start … stop - 1, stacked: `input_ids`, `targets`, `seq_idx`, each (b t) int64; of lanes `continues` (b) too.

        Raises:
            ValueError: a token that the model does not have.
        """
        places = map(self.where, range(start, stop))
        samples = [self.samplers[source].sample(number) for source, number in places]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def origin(self, start: int, stop: int) -> list[dict]:
        """Where samples start … stop - 1 are from: the source, and the documents with the offset of the first token. JSON."""
        places = map(self.where, range(start, stop))
        return [
            {"sample": start + i, "source": self.names[source], "documents": self.samplers[source].origin(number)}
            for i, (source, number) in enumerate(places)
        ]

    def identity(self, position: int) -> dict:
        """What decided the samples before `position`, as JSON, without the sources not yet drawn from and the phases to come."""
        past = [(start, shares) for start, shares in self.phases if start < position]
        used = [i for i in range(len(self.samplers)) if any(shares[i] for _, shares in past)]
        first = self.samplers[0]
        metas = [self.samplers[i].shards.meta for i in used]
        return {
            "packing": first.packing, "seq_len": first.seq_len, "seed": first.seed,
            "sources": [{"source": meta["source"], "sha256": meta["sha256"]} for meta in metas],
            "phases": [{"first_sample": start, "shares": [shares[i] for i in used]} for start, shares in past],
        }  # fmt: skip

    def changed(self, identity: dict, position: int) -> list[str]:
        """A line for each thing because of which `position` would not mean what it did in the run that saved `identity`."""
        now = self.identity(position)
        lines = [
            f"{key}: {identity.get(key)} -> {now[key]}" for key in ("packing", "seq_len", "seed") if identity.get(key) != now[key]
        ]
        for old, new in zip_longest(identity.get("sources", []), now["sources"], fillvalue={"source": "no source", "sha256": ""}):
            if old["sha256"] != new["sha256"]:  # a name may change: the same tokens in another folder are the same
                lines.append(f"data: {old['source']} ({old['sha256'][:8]}) -> {new['source']} ({new['sha256'][:8]})")
        if not lines and identity["phases"] != now["phases"]:
            lines.append(f"weights up to sample {position}: {_spelled(identity['phases'])} -> {_spelled(now['phases'])}")
        return lines

    def cursor(self, position: int) -> dict:
        """Nothing more is needed to come back to `position`."""
        return {}

    def seek(self, position: int, cursor: dict) -> None:
        """Nothing to do: `batch` finds any sample."""

    def summary(self, stop: int) -> list[str]:
        """A line on each source: its size, and how often it is seen in `stop` samples."""
        return [
            f"{name}: {sampler.summary(count)}"
            for name, sampler, count in zip(self.names, self.samplers, self.counts(stop), strict=True)
        ]


def _spelled(phases: list[dict]) -> str:
    return ", ".join(f"{[round(s / UNIT, 4) for s in p['shares']]} from sample {p['first_sample']}" for p in phases)
