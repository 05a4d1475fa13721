from itertools import pairwise

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from eval import generation
from eval.generation import FIT, fit, memory_errors, prepare, request
from hybridlm.timing import generate
from hybridlm.twin import transformer_twin

SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_model_stays(monkeypatch):
    monkeypatch.setattr(generation, "_model", None)


def linear(fixed, each, cache=1, limit=10**9):
    """Bytes of a batch, and what was asked; past `limit` sequences there is no memory."""
    asked = []

    def run(batch):
        asked.append(batch)
        if batch > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return (fixed + each * batch if isinstance(each, int) else fixed + each(batch)), cache

    return run, asked


def test_no_batch_far_beyond_what_ran_is_tried():
    """Of two sequences nothing shows but their cache; of the next ones much."""
    run, asked = linear(100, lambda batch: 0 if batch <= 2 else 1000 * batch)
    best, most, notes = fit(10**6, run)
    assert 900 <= best <= 999 and most <= 8 * best and not notes
    assert all(later <= 8 * earlier for earlier, later in pairwise(asked))
    assert fit(1000, linear(100, 0, cache=0)[0])[0] >= 900  # no cache, and nothing more is held


def test_between_what_runs_and_what_does_not():
    run, asked = linear(700, lambda batch: 20 * batch**2)
    best, _, _ = fit(6700, run)
    assert 700 + 20 * best**2 <= 6700 < 700 + 20 * (1.1 * best + 1) ** 2
    assert len(asked) <= 8
    run, asked = linear(0, lambda batch: batch**3)  # from what ran each time far too many would follow
    assert fit(40**3, run)[0] >= 36 and len(asked) <= 10


def test_the_last_note_tells_what_was_taken():
    for memory in range(1000, 3000, 50):
        run, asked = linear(0, lambda batch: 30 * batch + batch**2)
        best, _, notes = fit(memory, run)
        if asked[-1] > best:  # the one before the last was taken
            assert notes[-1].endswith(f"going on with {best}")


@pytest.mark.parametrize("memory", [1100, 1199])
def test_the_batch_that_fits_is_computed_and_tried(memory):
    run, asked = linear(100, 100)
    assert fit(memory, run) == (10, 10, [])
    assert asked == [1, 2, 10]


def test_a_sequence_takes_its_cache_at_least():
    run, _ = linear(100, 0, cache=50)  # what is held does not show it
    assert fit(1100, run) == (21, 21, [])


def test_what_takes_too_much_is_made_less():
    run, asked = linear(0, lambda batch: 10 * batch + batch**2)  # grows faster than from one to two
    best, most, notes = fit(1100, run)
    assert 10 * best + best**2 <= 1100 < 10 * 1.3 * best + (1.3 * best) ** 2
    assert most == max(asked) > best
    assert len(notes) >= 1 and notes[0].startswith(f"a batch of {most} takes 0.00 GiB; going on with ")


def test_more_is_tried_where_a_sequence_takes_less_than_the_second():
    run, _ = linear(100, lambda batch: 100 + 10 * batch if batch > 1 else 20)
    best, _, notes = fit(1200, run)
    assert 90 <= best <= 100 and not notes


def test_halved_when_memory_runs_out():
    run, asked = linear(100, 100, limit=6)
    assert fit(1100, run) == (5, 10, ["a batch of 10 ran out of memory; going on with 5"])
    assert asked == [1, 2, 10, 5]
    assert fit(1100, linear(100, 100, limit=1)[0])[0] == 1


def test_not_even_one_fits():
    with pytest.raises(MemoryError, match=r"one sequence takes 0.00 GiB, more than the 0.00 GiB of --memory"):
        fit(150, linear(100, 100)[0])
    with pytest.raises(RuntimeError, match="can't allocate"):
        fit(1100, linear(0, 0, limit=0)[0])


def test_another_error_is_no_lack_of_memory():
    def run(batch):
        if batch > 1:
            raise RuntimeError("shapes")
        return 1, 1

    with pytest.raises(RuntimeError, match="shapes"):
        fit(100, run)
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes")
    with pytest.raises(MemoryError, match=r"^CUDA out$"), memory_errors():
        raise torch.OutOfMemoryError("CUDA out\nof memory")


def test_a_batch_that_fits_of_a_model(tiny_model, tmp_path, monkeypatch):
    """The requests by which it is found end where the real one does."""
    asked = []

    def watched(seed, prompt, new, batch, before):
        asked.append((prompt, new, batch))
        return 100 + 100 * batch, 50

    monkeypatch.setattr(generation, "run_watched", watched)
    tiny_model().save_pretrained(tmp_path)
    found = prepare(str(tmp_path), None, 9, 3, FIT, 1100)
    assert (found["batch"], found["asked_batch"], found["notes"], found["peak_memory_bytes"]) == (10, 10, [], 1100)
    assert found["weight_bytes"] == sum(p.nbytes for p in tiny_model().parameters())
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert asked == [(10, 2, 1), (10, 2, 2), (10, 2, 10), (9, 3, 10)]
    prepare(str(tmp_path), None, 9, 1, FIT, 1100)
    assert asked[4:6] == [(9, 1, 1), (9, 1, 2)]


def test_the_twin_is_built(tiny_config):
    twin = transformer_twin(tiny_config())
    prepare("", twin, 3, 2, 1, None)
    assert generation._model.config.hybrid_override_pattern == twin.hybrid_override_pattern
    assert request(1, 5, 4, 2)["cache_bytes"] == 2 * 4 * twin.hybrid_override_pattern.count("*") * 2 * 2 * 8 * (5 + 3)


def test_stock_models_keep_their_own_cache(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**SMALL, **shape, num_hidden_layers=2)).save_pretrained(tmp_path)
    prepare(str(tmp_path), None, 9, 3, 2, None)
    assert type(generation._model).__module__.startswith("transformers.")
    assert request(1, 9, 3, 2)["cache_bytes"] == 4 * 2 * 2 * 2 * 8 * (9 + 2)
    shape = {"hidden_size": 16, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    mamba = Mamba2ForCausalLM(Mamba2Config(**SMALL, **shape, num_hidden_layers=1)).eval()
    assert generate(mamba, 1, 9, 3, 2)["cache_bytes"] >= 4 * 2 * (4 * 8 * 4)


def test_a_seed_draws_the_twin(tiny_config):
    drawn = []
    for seed in (3, 3, 4):
        prepare("", transformer_twin(tiny_config()), 3, 1, 1, None, seed)
        drawn.append(generation._model.lm_head.weight.detach())
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_positions_that_end(tmp_path):
    GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=8, n_layer=1, n_head=1, n_positions=16)).save_pretrained(tmp_path)
    prepare(str(tmp_path), None, 14, 3, 1, None)
    with pytest.raises(ValueError, match="cannot read 15 tokens and write 3: its positions end before"):
        prepare(str(tmp_path), None, 15, 3, 1, None)


def test_a_model_that_gives_no_numbers_is_not_timed(tiny_model, monkeypatch):
    def broken(*args):
        model = tiny_model()
        torch.nn.init.constant_(model.backbone.layers[3].mixer.o_proj.weight, torch.inf)
        return model

    monkeypatch.setattr(generation, "load", broken)
    with pytest.raises(FloatingPointError, match=r"weight backbone\.layers\.\d\.mixer\.\w+\.weight has numbers that are not"):
        prepare("here", None, 3, 2, 1, None)
