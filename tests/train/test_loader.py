import json
import os
import signal
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlm.data.blend import Blend
from hybridlm.data.packing import BestFit
from hybridlm.data.preparation import documents_to_shards
from hybridlm.data.sampler import Sampler
from hybridlm.data.sources import Documents
from hybridlm.tokenizer import byte_tokenizer
from train.loader import Stage, batches
from train.loop import train
from train.objective import next_token_loss
from train.optim import micro_batches


def blend(folder, sampler, weights=((1, 2), (2, 1))):
    """Two sources of 60 tokens, twelve windows of five, in which each pair of neighbours is another."""
    letters = "".join(map(chr, range(40, 97)))
    sources = [[letters[:20], letters[20:24], letters[24:]], [letters[:39:-1], letters[39:30:-1], letters[30::-1]]]
    shards = [
        documents_to_shards(
            Documents(f"s{i}", f"s{i}", len(texts), texts.__getitem__), byte_tokenizer(), folder / f"s{i}", quiet=True
        )
        for i, texts in enumerate(sources)
    ]
    return Blend([sampler(s, 5, 1, 258) for s in shards], [list(w) for w in weights], [48])


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def global_batches(stream, plan, first=0, global_batch=12):
    """The global batches, put together from those of all ranks, of a plan of (ranks, workers, steps)."""
    out = []
    for ranks, workers, steps in plan:
        of_ranks = []
        for rank in range(ranks):
            rows = micro_batches(global_batch, 2 if ranks == 3 else None, rank, ranks)
            of_ranks.append(list(batches(stream, first, [Stage(rows, global_batch, steps)], workers)))
        for step in zip(*of_ranks, strict=True):
            parts = [micro for rank in step for micro in rank]
            out.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        first += steps * global_batch
    return out


@pytest.mark.parametrize("sampler", [Sampler, BestFit])
def test_ranks_workers_and_resumes_change_nothing_in_the_global_batches(tmp_path, sampler):
    stream = blend(tmp_path, sampler)
    whole = global_batches(stream, [(1, 0, 12)])
    assert all(tensor.dtype == torch.int64 and tensor.shape == (12, 5) for tensor in whole[0].values())
    for plan in ([(2, 0, 12)], [(3, 0, 12)], [(4, 0, 12)], [(1, 2, 12)], [(1, 0, 1), (4, 0, 4), (3, 2, 3), (2, 0, 4)]):
        assert_same(global_batches(blend(tmp_path, sampler), plan), whole)


@pytest.mark.parametrize("first", [0, 1, 31, 48, 60])
def test_a_run_that_begins_at_any_sample_sees_what_the_whole_one_saw_from_there(tmp_path, first):
    stream = blend(tmp_path, Sampler)
    whole = global_batches(stream, [(1, 0, 80)], global_batch=1)
    assert_same(global_batches(stream, [(1, 2, 80 - first)], first=first, global_batch=1), whole[first:])


@pytest.mark.parametrize(("sampler", "windows"), [(Sampler, 12), (BestFit, 12)])
def test_over_three_epochs_with_resumes_on_other_ranks_no_token_is_missing_and_none_repeated(tmp_path, sampler, windows):
    stream = blend(tmp_path, sampler, ((1, 1), (1, 1)))
    seen = Counter()
    plan = [(1, 0, 1), (3, 0, 2), (2, 2, 1), (4, 0, 2)]
    for batch in global_batches(stream, plan):
        pairs = zip(batch["input_ids"].ravel().tolist(), batch["targets"].ravel().tolist(), strict=True)
        seen.update((a, b) for a, b in pairs if b != -100)
    assert stream.counts(6 * 12) == [3 * windows, 3 * windows]
    expected = Counter()
    for source in stream.samplers:
        tokens = source.shards.read(np.arange(60)).tolist()
        expected.update({(a, b): 3 for a, b in pairwise(tokens) if a != 256})
    assert seen == expected


def test_the_random_numbers_of_the_run_are_left_alone(tmp_path):
    stream = blend(tmp_path, Sampler)
    for workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert len(list(batches(stream, 0, [Stage([range(4)], 4, 3)], workers))) == 3
        assert torch.equal(torch.get_rng_state(), before)


def test_without_workers_a_step_is_read_when_it_is_asked_for():
    taken = []

    @dataclass
    class Noting:
        def batch(self, start, stop):
            taken.append((start, stop))
            return {"input_ids": np.zeros((1, 1), dtype=np.int64)}

    steps = batches(Noting(), 100, [Stage([range(2, 4), range(4, 6)], 8, 5)], 0)
    next(steps)
    assert taken == [(102, 104), (104, 106)]
    next(steps)
    assert taken[2:] == [(110, 112), (112, 114)]


@dataclass
class Telling:
    """A stream that tells which process reads it, or fails at a sample."""

    fails_at: int = 10**9

    def batch(self, start, stop):
        if start >= self.fails_at:
            raise ValueError("a damaged token")
        return {"input_ids": np.array([[os.getpid(), os.getsid(0), start]])}


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    steps = batches(Telling(), 0, [Stage([range(1)], 1, 10_000)], 2)
    worker = int(next(steps)[0]["input_ids"][0, 0])
    assert worker != os.getpid()
    with pytest.raises(RuntimeError, match=r"worker .*(killed|exited)"):
        os.kill(worker, signal.SIGKILL)
        for _ in range(10_000):
            next(steps)


def test_an_error_in_a_worker_is_the_same_error_here():
    steps = batches(Telling(fails_at=3), 0, [Stage([range(1)], 1, 10)], 1)
    assert [int(next(steps)[0]["input_ids"][0, 2]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="a damaged token"):
        next(steps)


def test_a_signal_to_the_group_or_to_each_process_does_not_reach_the_workers():
    steps = batches(Telling(), 0, [Stage([range(1)], 1, 1000)], 1)
    process, session, _ = next(steps)[0]["input_ids"][0].tolist()
    assert session == process != os.getsid(0)
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGINT)
    assert [int(step[0]["input_ids"][0, 2]) for step in steps] == list(range(1, 1000))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("kind", ["blend", "streaming"])
def test_a_run_cut_off_ends_as_the_whole_one_whatever_its_data(make_config, tmp_path, kind):
    for i, letters in enumerate(("abcdef ", "uvwxyz ")):
        lines = (json.dumps({"text": letters * (3 + 5 * n % 17)}) for n in range(40))
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / f"{i}.jsonl") for i in range(2)]
    settings = {
        "blend": {
            "data__source": None,
            "data__blend": [{"source": files[0], "weight": [2, 1]}, {"source": files[1], "weight": [0, 1]}],
            "data__phases": [0.5], "data__packing": "best-fit", "data__workers": 1,
        },
        "streaming": {"data__source": files[0], "data__streaming": True, "data__val_source": files[1]},
    }[kind]  # fmt: skip
    runs = [make_config(run_dir=str(tmp_path / name), log__sample_tokens=0, **settings) for name in ("whole", "cut")]
    calls = iter(range(99))

    def cut(model, batch):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    train(runs[0])
    with pytest.raises(KeyboardInterrupt):
        train(runs[1], loss=cut)
    train(runs[1])
    whole, again = ([json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()] for run in runs)
    assert [line["loss"] for line in whole if "loss" in line] == [line["loss"] for line in again if "loss" in line]
    assert len([line for line in whole if "val_loss" in line]) == 3
    assert all(("val_loss_by_source" in line) == (kind == "blend") for line in whole if "val_loss" in line)
