import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.scoring import Score, score, windows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HybridLMConfig(
        vocab_size=60, hidden_size=32, hybrid_override_pattern="M*-", num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=8,
    )  # fmt: skip
    return HybridLMForCausalLM(config).eval()


DOCUMENTS = [np.arange(37) % 60, np.array([5]), np.array([7, 8]), np.arange(50, 20, -1)]


def test_windows_predict_every_token_but_the_first_of_a_document_once():
    predicted = [w[1:] for w in windows(DOCUMENTS, 8)]
    assert np.concatenate(predicted).tolist() == np.concatenate([d[1:] for d in DOCUMENTS]).tolist()
    assert max(map(len, predicted)) == 8


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_score_is_the_loss_of_each_window_by_itself(model, batch_size):
    result = score(model, DOCUMENTS, 8, bytes=100, batch_size=batch_size)
    want = []
    for window in windows(DOCUMENTS, 8):
        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            want.append(cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item())
    np.testing.assert_allclose(result.nats, want, atol=1e-4)
    assert result.tokens.sum() == 36 + 1 + 29
    assert result.bits_per_byte == pytest.approx(sum(want) / np.log(2) / 100, abs=1e-5)


def test_carrying_the_state_equals_one_long_window(model):
    carried = score(model, DOCUMENTS, 8, bytes=1, carry=True)
    whole = score(model, DOCUMENTS, 1000, bytes=1)
    assert carried.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-5)
    assert score(model, DOCUMENTS, 8, bytes=1).nats_per_token != pytest.approx(whole.nats_per_token, abs=1e-5)


def test_the_standard_error_is_that_of_a_mean_where_windows_are_equal():
    nats = np.array([1.0, 2.0, 4.0, 3.0])
    assert Score(nats, np.ones(4, dtype=int), 1).stderr == pytest.approx(nats.std(ddof=1) / 2)
    assert Score(nats[:1], np.ones(1, dtype=int), 1).stderr is None


def test_the_model_is_left_in_the_mode_it_was_in(model):
    model.train()
    score(model, DOCUMENTS, 8, bytes=1)
    assert model.training
    model.eval()


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(ValueError, match="no document has two tokens"):
        score(model, [np.array([3])], 8, bytes=1)


def test_only_a_carried_state_is_kept(model, monkeypatch):
    started = []

    class Counted(HybridCache):
        def __init__(self, layers):
            super().__init__(layers)
            started.append(self)

    for module in ("modeling", "scoring"):
        monkeypatch.setattr(f"hybridlm.{module}.HybridCache", Counted)
    score(model, DOCUMENTS, 8, bytes=100)
    assert started == []
    score(model, DOCUMENTS, 8, bytes=100, carry=True)
    assert len(started) == len(DOCUMENTS)
