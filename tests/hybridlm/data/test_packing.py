import errno
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data import packing
from hybridlm.data.packing import BestFit, best_fit, open_index, pieces

LENGTHS = [5, 1, 12, 3, 33, 2, 17, 16, 9, 8, 1, 40]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 40), data=st.data())
def test_best_fit_fills_windows_as_a_search_for_the_least_room_does(size, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, size), max_size=60)), dtype=np.int64)
    windows = best_fit(lengths, size)
    used = np.bincount(windows, lengths) if len(lengths) else np.array([])
    assert (used > 0).all() and (used <= size).all()
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        least = min((room for room in rooms if room >= length), default=None)
        if least is not None:
            rooms.remove(least)
        rooms.append((size if least is None else least) - length)
    assert sorted(size - used) == sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), seq_len=st.integers(1, 50))
def test_pieces_hold_each_prediction_once_and_are_as_few_as_can_be(lengths, seq_len):
    ends = np.cumsum(lengths)
    starts, sizes = pieces(ends, seq_len)
    targets = Counter(t for start, size in zip(starts, sizes, strict=True) for t in range(start + 1, start + size + 1))
    firsts = {0, *ends.tolist()}
    assert targets == Counter(t for t in range(ends[-1]) if t not in firsts)
    assert len(starts) == sum(-(-(length - 1) // seq_len) for length in lengths)
    assert len(sizes) == 0 or (sizes.min() > 0 and sizes.max() <= seq_len)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 100])
def test_every_epoch_has_each_document_offset_as_a_target_exactly_once(numbered, seq_len):
    shards = numbered(LENGTHS)
    sampler = BestFit(shards, seq_len, 3, 5000)
    for epoch in range(3):
        samples = [sampler.sample(n) for n in range(epoch * sampler.windows, (epoch + 1) * sampler.windows)]
        seen = Counter(t for sample in samples for t in sample["targets"].tolist() if t >= 0)
        assert seen == Counter(shards.predicted)


def test_a_document_that_fits_is_in_one_window_and_documents_do_not_mix(numbered):
    shards = numbered(LENGTHS)
    sampler, starts = BestFit(shards, 16, 0, 5000), np.cumsum([0, *LENGTHS])
    homes = {}
    for number in range(sampler.windows):
        sample = sampler.sample(number)
        predicts = sample["targets"] >= 0
        assert np.array_equal(sample["targets"][predicts], sample["input_ids"][predicts] + 1)
        of_document = np.searchsorted(starts, sample["input_ids"], side="right") - 1
        for piece in np.unique(sample["seq_idx"][predicts]):
            assert len(set(of_document[sample["seq_idx"] == piece])) == 1
        assert (np.diff(sample["seq_idx"]) >= 0).all() and sample["seq_idx"][0] == 0
        for document in set(of_document[predicts].tolist()):
            homes.setdefault(document, []).append(number)
    assert {len(homes[i]) for i, length in enumerate(LENGTHS) if 1 < length <= 17} == {1}
    assert [len(homes[i]) for i, length in enumerate(LENGTHS) if length > 17] == [2, 3]


def test_padding_is_an_end_token_in_a_document_of_its_own_without_targets(numbered):
    sample = BestFit(numbered([4, 3]), 8, 0, 5000).sample(0)
    assert sample["input_ids"].tolist() == [0, 1, 2, 4, 5, 3, 3, 3]
    assert sample["targets"].tolist() == [1, 2, 3, 5, 6, -100, -100, -100]
    assert sample["seq_idx"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_the_origin_of_a_window_names_its_pieces_and_no_padding(numbered):
    sampler = BestFit(numbered([4, 3, 12]), 8, 0, 5000)
    origins = [sampler.origin(n) for n in range(sampler.windows)]
    assert json.loads(json.dumps(origins)) == origins
    pieces = sorted((piece["document"], piece["offset"]) for origin in origins for piece in origin)
    assert pieces == [(0, 0), (1, 0), (2, 0), (2, 8)]


def test_the_order_is_another_in_each_epoch_and_for_each_seed(numbered):
    shards = numbered([3] * 200)
    a, b = BestFit(shards, 4, 0, 5000), BestFit(shards, 4, 1, 5000)
    first, second = ([a.window(n) for n in range(start, start + a.windows)] for start in (0, a.windows))
    assert sorted(first) == sorted(second) == list(range(a.windows))
    assert first != second
    assert first != [b.window(n) for n in range(b.windows)]


def test_the_index_is_made_once_and_for_each_window_length(numbered, monkeypatch):
    BestFit(numbered(LENGTHS), 16, 0, 5000)
    BestFit(numbered(LENGTHS), 8, 0, 5000)
    files = sorted(p.name for p in numbered(LENGTHS).folder.iterdir())
    assert files == ["best-fit-16.npy", "best-fit-8.npy"]
    monkeypatch.setattr(packing, "make_index", lambda *a: pytest.fail("made again"))
    assert isinstance(BestFit(numbered(LENGTHS), 16, 1, 5000).index, np.memmap)


def moved(row, columns, by):
    def damage(index):
        index[row, columns] += by
        return index

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(moved(1, 3, 1), id="a piece begins elsewhere"),
        pytest.param(moved(2, 8, -1), id="a piece is shorter"),
        pytest.param(lambda i: np.concatenate([i[:, :-1], i[:, -2:-1]], axis=1), id="a piece twice and one never"),
        pytest.param(lambda i: i[:, [1, 0, *range(2, i.shape[1])]], id="windows out of order"),
        pytest.param(lambda i: i[:, :-1], id="a piece too few"),
        pytest.param(moved(0, slice(None), 1), id="no first window"),
        pytest.param(moved(0, -1, 2), id="a window left out"),
        pytest.param(moved(0, slice(6, None), -1), id="a window too full"),
        pytest.param(lambda i: i.astype("f8"), id="no integers"),
    ],
)
def test_an_index_that_is_not_of_these_documents_is_an_error_that_names_the_file(numbered, damage):
    shards = numbered(LENGTHS)
    BestFit(shards, 16, 0, 5000)
    file = shards.folder / "best-fit-16.npy"
    np.save(file, damage(np.load(file)))
    with pytest.raises(ValueError, match=r"best-fit-16\.npy is not the index of these documents.*delete it"):
        BestFit(shards, 16, 0, 5000)


@pytest.mark.parametrize("content", [b"", b"no index", pickle.dumps([1]), None])
def test_a_file_that_is_no_index_is_an_error_that_names_it(numbered, content):
    shards = numbered(LENGTHS)
    BestFit(shards, 16, 0, 5000)
    file = shards.folder / "best-fit-16.npy"
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    with pytest.raises(ValueError, match=r"best-fit-16\.npy cannot be read"):
        BestFit(shards, 16, 0, 5000)


def test_an_index_that_cannot_be_written_leaves_nothing_behind(numbered, monkeypatch):
    shards = numbered(LENGTHS)

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        open_index(shards.documents[:, 0], 16, shards.folder / "index.npy")
    assert list(shards.folder.iterdir()) == []


def test_an_index_that_cannot_be_written_is_worked_out_at_each_start(numbered, monkeypatch, caplog):
    shards = numbered([5, 3, 9, 2])
    wanted = BestFit(numbered([5, 3, 9, 2]), 6, 0, 5000).index.copy()
    (shards.folder / "best-fit-6.npy").unlink()

    def read_only(*arguments):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packing.np, "save", read_only)
    assert (BestFit(shards, 6, 0, 5000).index == wanted).all()
    assert "Read-only file system" in caplog.text
    assert not [*shards.folder.iterdir()]
