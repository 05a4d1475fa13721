import pytest
import torch

from hybridlm.cache import HybridCache


@pytest.fixture
def cache():
    """Three rows; a layer with two states, one with none, one with one; the value of an element is its row."""
    made = HybridCache(3)
    rows = torch.arange(1.0, 4.0)
    made.states = [(rows[:, None].expand(3, 2), rows[:, None, None].expand(3, 2, 2)), None, (rows[:, None].expand(3, 4),)]
    return made


def rows(cache):
    """The row that each row of each state came from, checked to be one and the same in all of it."""
    seen = {tuple(t.flatten(1).T.unique(dim=0).flatten().tolist()) for s in cache.states if s is not None for t in s}
    assert len(seen) == 1 and cache.states[1] is None
    return list(seen.pop())


def test_reordering_takes_row_beam_idx_i_to_row_i(cache):
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert rows(cache) == [3, 1, 1]


def test_repeating_keeps_copies_side_by_side(cache):
    cache.batch_repeat_interleave(2)
    assert rows(cache) == [1, 1, 2, 2, 3, 3]


def test_selecting_keeps_the_rows_named(cache):
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert rows(cache) == [3, 2]


def test_bytes_are_those_of_the_tensors(tiny_model):
    assert HybridCache(7).nbytes() == 0
    cache = tiny_model()(torch.zeros(2, 9, dtype=torch.long), use_cache=True).past_key_values
    mamba = 2 * 3 * (48 + 2 * 2 * 5) + 2 * 6 * 8 * 5  # conv: b k-1 d; ssm: b h p n
    attention = 2 * 2 * 2 * 9 * 8  # k and v: b heads t head_dim
    assert cache.nbytes() == 4 * (3 * mamba + attention)


@pytest.mark.parametrize("pattern", ["M-", "rlgm-"])
def test_a_recurrent_state_does_not_grow(pattern, tiny_model):
    model = tiny_model(hybrid_override_pattern=pattern)
    caches = [model(torch.zeros(1, t, dtype=torch.long), use_cache=True).past_key_values for t in (1, 2, 9, 40)]
    assert len({cache.nbytes() for cache in caches}) == 1
    for cache in caches:  # and no state is a view that keeps more alive
        held = [t.untyped_storage().nbytes() for state in [*cache.states, (cache.last,)] if state is not None for t in state]
        assert sum(held) == cache.nbytes() + cache.last.nbytes


def test_a_cache_counts_what_it_has_seen(tiny_model):
    model = tiny_model()
    cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    ("training", "asked", "configured", "given"),
    [(False, None, True, True), (False, None, False, False), (True, None, True, False), (True, True, True, True),
     (False, False, True, False), (False, True, False, True)],
)  # fmt: skip
def test_a_cache_is_started_as_the_config_says_and_not_in_training(training, asked, configured, given, tiny_model):
    model = tiny_model(use_cache=configured).train(training)
    output = model(torch.zeros(1, 5, dtype=torch.long), use_cache=asked)
    assert (output.past_key_values is not None) == given


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_keys_are_written_where_there_is_room_and_moved_when_there_is_none(mode, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern="M*-").double(), draw_ids(2, 200)
    with mode():
        whole = model(ids).logits
        cache = model(ids[:, :5], use_cache=True).past_key_values
        keys, states, logits = set(), set(), []
        for i in range(5, 200):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
            keys.add(cache.states[1][0].data_ptr())
            states.add(cache.states[0][1].data_ptr())
        torch.testing.assert_close(torch.cat(logits, 1), whole[:, 5:], rtol=1e-9, atol=1e-9)
    assert 1 < len(keys) < 6 and len(states) == 1


@pytest.mark.parametrize("pattern", ["M*-", "rlgm-"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(pattern, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).double(), draw_ids(1, 9)
    with torch.inference_mode():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], past_key_values=cache)
    with torch.no_grad():
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits[:, 5:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [7, 9])  # one token behind the cache, and three
@pytest.mark.parametrize("pattern", ["M*-", "rlgm-"])
def test_gradients_behind_a_cache_with_room_leave_it_as_it_is(pattern, t, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).double(), draw_ids(1, t)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:6], past_key_values=cache)
    before = [tuple(t.clone() for t in state or ()) for state in cache.states]
    held = list(cache.states)
    logits = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 6:], rtol=1e-9, atol=1e-9)
    logits.sum().backward()
    for state, copy in zip(held, before):
        assert all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(state or (), copy, strict=True))


@torch.no_grad()
def test_the_room_for_more_keys_does_not_count(tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern="M*-"), draw_ids(2, 9)
    at_once, in_pieces = model(ids, use_cache=True).past_key_values, model(ids[:, :4], use_cache=True).past_key_values
    model(ids[:, 4:], past_key_values=in_pieces)
    assert in_pieces.states[1][0].shape[2] > 9 and in_pieces.nbytes() == at_once.nbytes()
