"""Shards in which a token tells its place: the token at position p is p."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest


@dataclass
class Numbered:
    documents: np.ndarray
    folder: Path
    name: str = "numbered"
    first: int = 0
    asked: list[int] = field(default_factory=list)

    @property
    def meta(self):
        return {"source": self.name, "sha256": f"{self.name} {self.documents[:, 0].tolist()[:99]}", "tokens": len(self)}

    def __len__(self):
        return int(self.documents[-1, 0])

    def read(self, positions):
        self.asked.append(len(positions))
        assert (positions >= 0).all() and (positions < len(self)).all()
        return positions + self.first

    @property
    def predicted(self):
        """Every token that has one before it in its document."""
        starts = {0, *self.documents[:-1, 0].tolist()}
        return [self.first + p for p in range(len(self)) if p not in starts]


@pytest.fixture
def numbered(tmp_path):
    """Shards of documents of these lengths (tokens, with the end token)."""

    def make(lengths, **settings):
        ends = np.cumsum(lengths)
        return Numbered(np.stack([ends, np.ones_like(ends)], axis=-1), tmp_path, **settings)

    return make


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
