import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.scoring import batch_arrays, nll, windows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HybridLMConfig(
        vocab_size=60, hidden_size=32, hybrid_override_pattern="M*-", num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=8,
        initializer_range=0.3,
    )  # fmt: skip
    return HybridLMForCausalLM(config).eval()


DOCUMENTS = [np.arange(37) % 60, np.array([5]), np.array([7, 8]), np.array([], dtype=int), np.arange(50, 20, -1)]
EVERY_PREDICTION = [(d, i) for d, ids in enumerate(DOCUMENTS) for i in range(1, len(ids))]


def predicted(found):
    """(document, place) of each prediction that counts."""
    made = [(w.document, DOCUMENTS[w.document].tolist().index(t)) for w in found for t in w.ids[1 + w.skip :].tolist()]
    return made


@pytest.mark.parametrize(("size", "stride"), [(8, None), (None, None), (8, 3), (8, 1), (8, 8), (100, 7)])
def test_windows_predict_every_token_but_the_first_of_a_document_once(size, stride):
    found = list(windows(DOCUMENTS, size, stride))
    assert predicted(found) == EVERY_PREDICTION
    longest = max(len(w.ids) - 1 for w in found)
    assert longest == (36 if size in (None, 100) else size)


def test_windows_without_a_stride_lie_end_to_end():
    assert [len(w.ids) - 1 for w in windows(DOCUMENTS, 8)] == [8, 8, 8, 8, 4, 1, 8, 8, 8, 5]
    assert all(w.skip == 0 for w in windows(DOCUMENTS, 8))


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_a_sliding_window_keeps_what_is_left_of_its_length_as_context(stride):
    found = [w for w in windows(DOCUMENTS, 8, stride) if w.document == 0]
    assert found[0].skip == 0
    assert all(w.skip == 8 - stride for w in found[1:])
    assert all(np.array_equal(w.ids, DOCUMENTS[0][i * stride :][: len(w.ids)]) for i, w in enumerate(found))


def test_the_loss_is_that_of_each_window_by_itself(model):
    every = list(windows(DOCUMENTS, 8, 5))
    ids, targets = batch_arrays(every)
    nats = nll(model, ids, targets)
    for row, window in zip(nats, every):
        alone = torch.from_numpy(window.ids)[None]
        with torch.no_grad():
            want = cross_entropy(model(alone[:, :-1]).logits[0], alone[0, 1:], reduction="none")
        torch.testing.assert_close(row[: len(want)], want, atol=1e-5, rtol=1e-5)
        assert not row[len(want) :].any()


def test_a_carried_state_makes_windows_one_long_pass(model):
    whole = nll(model, *batch_arrays(list(windows(DOCUMENTS[:1], None))))
    cache = HybridCache(model.config.num_hidden_layers)
    carried = [nll(model, *batch_arrays([window]), cache) for window in windows(DOCUMENTS[:1], 8)]
    torch.testing.assert_close(torch.cat(carried, dim=1), whole, atol=1e-5, rtol=1e-5)
    cut = [nll(model, *batch_arrays([window])) for window in windows(DOCUMENTS[:1], 8)]
    assert (torch.cat(cut, dim=1) - whole).abs().max() > 1e-3


def test_no_state_is_kept_that_nobody_carries(model, monkeypatch):
    started = []

    class Counted(HybridCache):
        def __init__(self, layers):
            super().__init__(layers)
            started.append(self)

    for module in ("modeling", "scoring"):
        monkeypatch.setattr(f"hybridlm.{module}.HybridCache", Counted)
    nll(model, *batch_arrays(list(windows(DOCUMENTS, 8))))
    assert started == []
