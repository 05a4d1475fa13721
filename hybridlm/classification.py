"""Classification of whole documents: the backbone, one vector a document, and a linear layer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from hybridlm.configuration import CLASSIFIER, HybridLMConfig
from hybridlm.mixers.parts import Linear
from hybridlm.modeling import HybridLMForCausalLM, HybridLMModel, check_targets
from hybridlm.ops import build_ops
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.pretrained import HybridLMPreTrainedModel


class HybridLMForSequenceClassification(HybridLMPreTrainedModel):
    """Which of `config.num_labels` kinds a document is of. `backend` as in `HybridLMForCausalLM`.

    A causal model is read at the last token of a document, the only one that has seen all of it. A bidirectional one is read at
    the mean over its tokens: each of them has seen all of it, but from the middle, and none from both ends.
    """

    accepts_loss_kwargs = False  # no num_items_in_batch: the Trainer then takes the mean of `labels` as it is

    def __init__(self, config: HybridLMConfig, backend: str = "auto"):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        if self.num_labels < 2:
            raise ValueError(f"a classifier needs at least two labels; got num_labels={config.num_labels}.")
        config.architectures = [CLASSIFIER]
        self.ops = build_ops(backend)
        self.backbone = HybridLMModel(config, ops=self.ops)
        self.score = Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @property
    def head(self) -> nn.Linear:
        """What comes after the backbone, whatever the task."""
        return self.score

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Logits (b labels) in fp32 of each row. `HybridLMModel.forward` tells what the other arguments mean.

        Args:
            labels: (b) the class of each row. Gives the mean loss (nats) beside the logits.
            targets: (b t) for packed documents: the class of each *at* its last token, -100 elsewhere. Gives `loss` (b t), nats
                of each target and 0 where there is none, and logits (targets labels), row by row.

        Raises:
            ValueError: both labels and targets, or of another shape or class; a row without tokens; packed documents without
                targets.
        """
        if labels is not None and targets is not None:
            raise ValueError("pass labels (one a row) or targets (one a document, at its last token), not both.")
        if seq_idx is not None and targets is None:
            raise ValueError("packed documents (seq_idx) are classified where targets says; pass a row a document instead.")
        outputs = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden, loss = outputs.last_hidden_state, None
        if attention_mask is not None and not attention_mask.any(dim=1).all():  # of the right shape, or none came here
            raise ValueError("a row has no tokens: attention_mask is 0 all along it. Pass at least one token a row.")
        if targets is not None:
            check_targets(targets, hidden, self.num_labels, "{} labels (num_labels)")
        pooled = (
            self.of_rows(hidden, attention_mask) if targets is None else self.of_targets(hidden, attention_mask, seq_idx, targets)
        )
        logits = self.score(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets is not None:
            wanted = targets != IGNORE
            nats = cross_entropy(logits, targets[wanted].long(), reduction="none")
            loss = torch.zeros(targets.shape, dtype=nats.dtype, device=nats.device).masked_scatter(wanted, nats)
        elif labels is not None:
            if labels.shape != logits.shape[:1]:
                raise ValueError(f"labels must have shape ({len(logits)},), one a row; got {tuple(labels.shape)}.")
            check_targets(labels[:, None], logits[:, None], self.num_labels, "{} labels (num_labels)")
            if (labels == IGNORE).any():
                raise ValueError(f"labels must name the class of every row; got {IGNORE} (no target).")
            loss = cross_entropy(logits, labels.long())
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def of_rows(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """hidden (b t d) -> (b d): one vector of each row."""
        if self.config.bidirectional is None:
            return hidden[:, -1]  # padding gives again what the token before it gave
        tokens = torch.ones_like(hidden[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return means(hidden[tokens], tokens.sum(1))

    def of_targets(self, hidden: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None, targets: Tensor) -> Tensor:
        """hidden (b t d) -> (targets d): one vector of each document that has a target."""
        wanted = targets != IGNORE
        if self.config.bidirectional is None:
            return hidden[wanted]
        begins = torch.zeros_like(wanted)
        begins[:, 0] = True
        if seq_idx is not None:
            begins[:, 1:] |= seq_idx.diff() != 0
        number = (begins.flatten().cumsum(0) - 1).view_as(wanted)  # of the document of each position, over all rows
        tokens = torch.ones_like(wanted) if attention_mask is None else attention_mask.bool()
        return means(hidden[tokens], number[tokens].bincount())[number[wanted]]


AnyModel = HybridLMForCausalLM | HybridLMForSequenceClassification  # a backbone and a head: what is trained


def means(x: Tensor, lengths: Tensor) -> Tensor:
    """x (tokens d), of documents one behind the other -> (documents d): the mean over each, taken in fp32 at least. Each is
    summed by itself, so that none changes another's."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.segment_reduce(wide, "mean", lengths=lengths).to(x.dtype)
