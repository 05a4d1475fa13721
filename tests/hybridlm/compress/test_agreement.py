import pytest
import torch

from hybridlm.compress.agreement import predict, score
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.ops.cross_entropy.eager import block_rows


@pytest.fixture
def models(tiny_model):
    """A parent, and one that is much like it; of so many words that the logits of a text are no one block."""
    vocabulary = 9001
    parent, child = (tiny_model(vocab_size=vocabulary, hybrid_override_pattern="M-*-", hidden_size=8) for _ in range(2))
    with torch.no_grad():
        for p in child.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    assert block_rows(vocabulary) < 300
    return parent, child


def texts():
    """Packed and plain; of the first so many targets that they are two blocks, and the second has less than one."""
    rng = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(9001, shape, generator=rng)} for shape in ((3, 150), (2, 20))]
    batches[1]["seq_idx"] = torch.arange(20).expand(2, 20) // 7
    for batch in batches:
        batch["targets"] = torch.randint(9001, batch["input_ids"].shape, generator=rng)
        batch["targets"][0, ::5] = IGNORE
        batch["targets"][1, 3:] = IGNORE if len(batch["targets"]) == 2 else batch["targets"][1, 3:]
    return batches


@torch.no_grad()
def at_once(model, batch):
    """Log-probabilities of the targets, and choices, from all logits."""
    wanted = batch["targets"] != IGNORE
    logits = model(batch["input_ids"], seq_idx=batch.get("seq_idx")).logits[wanted]
    return -logits.double().log_softmax(-1).gather(1, batch["targets"][wanted][:, None])[:, 0], logits.argmax(-1)


def test_predictions_are_those_of_all_logits_at_once(models):
    for batch in texts():
        nats, choices = predict(models[0], batch)
        expected, most_likely = at_once(models[0], batch)
        torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
        assert choices.equal(most_likely) and nats.dtype == torch.float64 and nats.shape == ((batch["targets"] != IGNORE).sum(),)


def test_scores(models):
    parent, child = models
    batches = texts()
    for batch in batches:  # some tokens are guessed right
        guesses = child(batch["input_ids"], seq_idx=batch.get("seq_idx")).logits.argmax(-1)
        batch["targets"][:, 1::4] = guesses[:, 1::4].where(batch["targets"][:, 1::4] != IGNORE, IGNORE)
    found = score(child, batches, [predict(parent, batch)[1] for batch in batches])
    nats, choices = (torch.cat(some) for some in zip(*(at_once(child, batch) for batch in batches)))
    targets = torch.cat([batch["targets"][batch["targets"] != IGNORE] for batch in batches])
    parents = torch.cat([at_once(parent, batch)[1] for batch in batches])
    assert found["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found["accuracy"] == (choices == targets).double().mean() and found["accuracy"] > 0.2
    assert found["agreement"] == (choices == parents).double().mean() and 0.1 < found["agreement"] < 0.99
    alone = score(parent, batches, [predict(parent, batch)[1] for batch in batches])
    assert alone["agreement"] == 1
    assert score(parent, batches[:1], [predict(child, batches[0])[1]])["agreement"] < 1


def test_of_each_batch_there_is_what_the_parent_says(models):
    with pytest.raises(ValueError, match="shorter"):
        score(models[0], texts(), [predict(models[0], texts()[0])[1]])
