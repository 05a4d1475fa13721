"""What is known of a teacher's predictions."""

from typing import NamedTuple

from torch import Tensor


class Whole(NamedTuple):
    """All: hidden states (b t e) after the last norm, and the weight (v e) of the head. Its logits are made block by block."""

    hidden: Tensor
    weight: Tensor


class TopK(NamedTuple):
    """The k largest log-probabilities of each position, at the temperature of the loss: which tokens (b t k) int, all different,
    and how likely each is (b t k). What they leave of 1 is one class more, "the rest", of all other tokens together. Where they
    are all of the vocabulary, or rounding makes them more than 1, they leave nothing and are scaled to 1."""

    ids: Tensor
    log_probs: Tensor


Teacher = Whole | TopK
