"""The model: embed -> blocks -> norm -> head; loss and generation."""

from functools import wraps
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from hybridlm.cache import HybridCache
from hybridlm.configuration import HybridLMConfig
from hybridlm.masking import build_context, find_tokens
from hybridlm.mixers import build_mixer
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import Linear, RMSNorm
from hybridlm.ops import Ops, build_ops
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.ops.distillation import Teacher
from hybridlm.pretrained import HybridLMPreTrainedModel

logger = logging.get_logger(__name__)

CPU_PIECE = 2048  # tokens of a long prompt that pass through a layer at a time: what is made of them stays small


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), in training with dropout of what is added, where configured.

    At inference a CPU takes a long input in pieces where the mixer can hand on its state.

    The state comes and goes as arguments and results of its own: re-entrant checkpointing sees gradients of no others.
    """

    def __init__(self, config: HybridLMConfig, symbol: str, ops: Ops):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, ops)
        self.mixer = build_mixer(symbol, config, ops)
        self.dropout = config.hidden_dropout

    def forward(self, x: Tensor, context: Context, *state: Tensor) -> tuple[Tensor, ...]:
        piece = max(1, CPU_PIECE // x.shape[0])
        whole = context.seq_idx is not None or context.padding is not None or x.device.type != "cpu"
        drops = self.training and self.dropout > 0
        if not context.inference or whole or x.shape[1] <= piece or not self.mixer.hands_on or drops:
            y, after = self.mixer(self.norm(x), context, state or None)
            return x + (dropout(y, self.dropout) if drops else y), *(after or ())
        out = torch.empty_like(x)
        for now in (slice(i, i + piece) for i in range(0, x.shape[1], piece)):
            y, after = self.mixer(self.norm(x[:, now]), context, state or None)
            torch.add(x[:, now], y, out=out[:, now])
            state = after or ()
        return out, *state


class HybridLMModel(HybridLMPreTrainedModel):
    """The stack without its head. `backend` as in `HybridLMForCausalLM`."""

    _keys_to_ignore_on_load_unexpected = [*HybridLMPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\.", r"^score\."]

    def __init__(self, config: HybridLMConfig, backend: str = "auto", ops: Ops | None = None):
        super().__init__(config)
        ops = ops or build_ops(backend)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, symbol, ops) for symbol in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, ops)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """The hidden states after the last norm.

        Args:
            input_ids: (b t), or `inputs_embeds` (b t d).
            attention_mask: (b s) ones for tokens and zeros for padding, over cached and new positions together. Padding may stand
                anywhere: tokens are as if it were not there, and it gives again what the token before it gave.
            seq_idx: (b t) the document of each token, rising along t. Nothing passes from one document to the next.
            past_key_values: the cache of earlier calls, which this call moves on.
            use_cache: whether to start one; by default as `config.use_cache` says, but not in training mode. A bidirectional
                model has none.
            output_hidden_states: gives what entered each layer (b t d), and what left the last norm.
            output_attentions: gives the weights (b h t s) of each attention layer; others than
                attn_implementation="eager" keep none, and warn.

        Raises:
            ValueError: an empty sequence, a token id past the vocabulary, a mask or seq_idx that breaks the above, a cache for a
                bidirectional model.
        """
        c = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        x = self.embed(input_ids) if input_ids is not None else cast(Tensor, inputs_embeds)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError("inputs_embeds must be a tensor of floating point numbers.")
        if x.dim() != 3 or x.shape[2] != c.hidden_size:
            given = x.shape if input_ids is None else x.shape[:-1]
            raise ValueError(
                f"input_ids must have shape (batch, time), inputs_embeds (batch, time, {c.hidden_size}); got {tuple(given)}."
            )
        if 0 in x.shape:
            raise ValueError(f"the input has no tokens: its shape is {tuple(x.shape[:2])}. Pass at least one row of one token.")
        attentions: list[Tensor] | None = (
            [] if (c.output_attentions if output_attentions is None else output_attentions) else None
        )
        if c.bidirectional is not None and (past_key_values is not None or use_cache):
            raise ValueError(
                "a bidirectional model has no cache: what a token gives depends on those after it. Pass all at once."
            )
        default = c.use_cache and not self.training and c.bidirectional is None
        if past_key_values is None and (default if use_cache is None else use_cache):
            past_key_values = HybridCache(len(self.layers))
        cache = past_key_values
        if cache is not None and (not isinstance(cache, HybridCache) or len(cache) != len(self.layers)):
            raise ValueError(
                f"past_key_values must be a HybridCache of {len(self.layers)} layers, as use_cache=True starts one; "
                f"got {type(cache).__name__}{f' of {len(cache)}' if isinstance(cache, HybridCache) else ''}."
            )
        if attentions is not None and c._attn_implementation == "sdpa":
            logger.warning_once('attn_implementation="sdpa" keeps no attention weights; for output_attentions take "eager".')
        tokens = find_tokens(x.shape[0], x.shape[1], attention_mask, cache)
        context = build_context(cast(HybridLMConfig, c), x, tokens, seq_idx, cache, attentions)
        wanted = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [x]
        for i, block in enumerate(self.layers):
            x, *state = block(x, context, *((cache and cache.states[i]) or ()))
            if cache is not None:
                cache.states[i] = tuple(state) or None
            if wanted:
                hidden_states.append(x)
        x = self.norm_f(x)
        if context.padding is not None and (padding := context.to(x.device).padding) is not None:
            x = padding.repeat_tokens(x, None if cache is None else cache.last)
        if cache is not None:
            cache.seen, cache.tokens, cache.last = cache.seen + x.shape[1], tokens, x[:, -1].clone()
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states[:-1], x) if wanted else None,
            attentions=tuple(attentions) if attentions else None,
        )
        return output if (c.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def embed(self, input_ids: Tensor) -> Tensor:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids must be a tensor of int64 or int32; got {kind}.")
        try:
            return self.embeddings(input_ids)
        except IndexError:
            bad = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)][0].item()
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.config.vocab_size} (vocab_size). "
                "Is this the tokenizer that the model was trained with?"
            ) from None


class Head(Linear):
    """The language-model head. Its loss is taken in here, so that what gathers sharded weights around a module sees both."""

    def __init__(self, size: int, vocabulary: int, ops: Ops):
        super().__init__(size, vocabulary, bias=False)
        self.loss, self.distance = ops.cross_entropy, ops.distillation

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        teacher: Teacher | None = None,
        temperature: float = 1.0,
        text_weight: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """hidden (b t d) -> logits (b t v), or with `targets` (b t) the nats of every position (b t)."""
        if targets is None:
            return super().forward(hidden)
        if teacher is None:
            return self.loss(hidden, self.weight, targets, z_loss=z_loss)
        distance = self.distance(hidden, self.weight, targets, teacher, temperature=temperature)
        if not text_weight:
            return distance
        return (1 - text_weight) * distance + text_weight * self.loss(hidden, self.weight, targets)


def check_targets(targets: Tensor, hidden: Tensor, count: int, among: str) -> None:
    """
    Args:
        count: numbers that a target can be, which `among` (with a place for it) calls by name.

    Raises:
        ValueError: not int64 or int32, not of the shape of `hidden` (b t d), or a number that is none of them and not IGNORE.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels and targets must be of int64 or int32; got {targets.dtype}.")
    if targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels and targets must have the shape of the input, {tuple(hidden.shape[:2])}; got {tuple(targets.shape)}."
        )
    bad = targets[((targets < 0) | (targets >= count)) & (targets != IGNORE)]
    if len(bad):
        raise ValueError(f"target {bad[0].item()} is outside the {among.format(count)}, and not {IGNORE} (no target).")


class HybridLMForCausalLM(HybridLMPreTrainedModel, GenerationMixin):
    """The language model. `backend` picks the operators (`auto`, `eager`, `fused`, `naive`) and is never saved."""

    def __init__(self, config: HybridLMConfig, backend: str = "auto"):
        super().__init__(config)
        if config.bidirectional is not None:
            raise ValueError(
                f"bidirectional={config.bidirectional!r} is for classification (data.label_column): a language model would see "
                "the tokens that it is to predict. Set bidirectional: null, or open a classifier with "
                "AutoModelForSequenceClassification."
            )
        self.ops = build_ops(backend)
        self.backbone = HybridLMModel(config, ops=self.ops)
        self.lm_head = Head(config.hidden_size, config.vocab_size, self.ops)
        self.post_init()

    @property
    def head(self) -> nn.Linear:
        """What comes after the backbone, whatever the task."""
        return self.lm_head

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        if value.bias is not None:
            raise ValueError("the language-model head has no bias; give a linear layer without one.")
        with torch.device("meta"):
            self.lm_head = Head(value.in_features, value.out_features, self.ops)
        self.lm_head.weight = value.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        targets: Tensor | None = None,
        teacher: Teacher | None = None,
        temperature: float = 1.0,
        text_weight: float = 0.0,
        z_loss: float = 0.0,
        past_key_values: HybridCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (b t v) in fp32; a loss where asked for. `HybridLMModel.forward` tells what the other arguments mean.

        Args:
            labels: (b t) as everywhere in transformers: `input_ids`, with -100 where no loss is wanted. The label at t+1 is
                the target at t. Gives the mean loss (nats per target) beside the logits.
            num_items_in_batch: what the loss of `labels` is divided by, instead of the number of its own targets: the targets of
                all calls whose gradients are summed.
            targets: (b t) the target *at* each position, -100 for none. Gives `loss` (b t), nats of every position, and no
                logits: the head and its loss run in blocks, so that training never holds all logits.
            teacher: beside `targets`, makes `loss` the distance from this teacher's predictions at `temperature` wherever there
                is a target (ops.distillation), with a share of `text_weight` of the nats of the targets themselves.
            z_loss: beside `targets`, weight of the squared logarithm of the sum of exp(logits) in the gradients; `loss` stays the
                nats of the targets (ops.cross_entropy).
            logits_to_keep: the last so many positions (0: all), or their indices.
        """
        if labels is not None and targets is not None:
            raise ValueError("pass labels (shifted here) or targets (one at each position), not both.")
        if teacher is not None and targets is None:
            raise ValueError("pass targets beside teacher: where they are -100, nothing is learned from it either.")
        if z_loss and (targets is None or teacher is not None):
            raise ValueError("z_loss is for the loss of targets; pass them, and no teacher.")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be a number of positions, 0 for all, or their indices; got {logits_to_keep}.")
        outputs = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if targets is not None:
            check_targets(targets, hidden, self.config.vocab_size, "vocabulary of {} (vocab_size)")
            loss = self.lm_head(hidden, targets, teacher, temperature, text_weight, z_loss)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if labels is None:
                logits = self.lm_head(hidden[:, keep]).float()
            else:
                check_targets(labels, hidden, self.config.vocab_size, "vocabulary of {} (vocab_size)")
                every = self.lm_head(hidden).float()
                loss, logits = self.label_loss(every, labels, num_items_in_batch), every[:, keep]
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def label_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
        if labels.shape[1] < 2:
            raise ValueError("labels need at least two positions: the label at t + 1 is the target at t.")
        targets = labels[:, 1:].to(logits.device)
        items = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        nats = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten().long(), ignore_index=IGNORE, reduction="sum")
        return nats / torch.as_tensor(items, device=nats.device).clamp(min=1)  # no target at all: 0

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As transformers' own, which would meet an empty prompt or a mask of another shape later, or not at all.

        Raises:
            ValueError: either of them.
        """
        prompts = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
        prompt, mask = next((p for p in prompts if p is not None), None), kwargs.get("attention_mask")
        if prompt is not None and 0 in prompt.shape[:2]:
            raise ValueError(
                f"the prompt has no tokens: its shape is {tuple(prompt.shape[:2])}. Pass at least one row of one token."
            )
        cached = kwargs.get("past_key_values") is not None  # then the mask is over its positions, too
        shape = getattr(mask, "shape", type(mask).__name__)
        if prompt is not None and mask is not None and not cached and shape != prompt.shape[:2]:
            raise ValueError(f"attention_mask must be a tensor of shape {tuple(prompt.shape[:2])}; got {shape}.")
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks for inputs_embeds in its signature
    def prepare_inputs_for_generation(self, *args, **kwargs):  # type: ignore[override]
        for name in ("tokenizer", "assistant_tokenizer"):  # `generate` hands them on after its stop_strings have read them
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args, **kwargs):
        """
        Raises:
            ValueError: always.
        """
        raise ValueError("continuous batching (cache_implementation='paged') has no place for a recurrent state; use generate.")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Called by `generate`, which knows no cache for these states."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache(self.config.num_hidden_layers)
