"""The model: embed -> blocks -> norm -> head; initialisation, loss and generation."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hybridlm.cache import HybridCache, State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers import MIXERS
from hybridlm.mixers.attention import rotary
from hybridlm.mixers.context import Context
from hybridlm.mixers.mamba2 import GatedNorm, Mamba2
from hybridlm.ops import Ops, build_ops
from hybridlm.ops.checks import check_seq_idx
from hybridlm.ops.cross_entropy import IGNORE


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: HybridLMConfig, symbol: str, ops: Ops):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MIXERS[symbol](config, ops)
        for name in ("out_proj", "o_proj", "down_proj"):
            if hasattr(self.mixer, name):
                getattr(self.mixer, name).into_residual = True  # starts smaller, see _init_weights

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State | None]:
        y, state = self.mixer(self.norm(x), context, state)
        return x + y, state


class HybridLMPreTrainedModel(PreTrainedModel):
    config_class = HybridLMConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be rolled back, which assisted generation would do

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of every weight there is (facts in Mamba-2's and Nemotron-H's own code)."""
        c = self.config
        if isinstance(module, (nn.Linear, nn.Embedding)):
            into_residual = c.rescale_prenorm_residual and getattr(module, "into_residual", False)
            init.normal_(module.weight, std=c.initializer_range / (math.sqrt(c.num_hidden_layers) if into_residual else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = 1 / math.sqrt(c.conv_kernel)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Mamba2):
            heads = module.dt_bias.shape
            init.copy_(module.A_log, torch.empty(heads).uniform_(1, 16).log())
            init.ones_(module.D)
            low, high = math.log(c.time_step_min), math.log(c.time_step_max)
            dt = torch.empty(heads).uniform_(low, high).exp().clamp(min=c.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        elif isinstance(module, (nn.RMSNorm, GatedNorm)):
            init.ones_(module.weight)


class HybridLMModel(HybridLMPreTrainedModel):
    def __init__(self, config: HybridLMConfig, backend: str = "auto", ops: Ops | None = None):
        super().__init__(config)
        ops = ops or build_ops(backend)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, symbol, ops) for symbol in config.hybrid_override_pattern)
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
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
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        """The hidden states after the last norm.

        Args:
            input_ids: (b t), or `inputs_embeds` (b t d).
            attention_mask: (b s) ones for tokens and zeros for padding, over cached and new positions together. Padding
                stands before the tokens of a row, or, without a cache, after them.
            seq_idx: (b t) the document of each token, rising along t. Nothing passes from one document to the next.
            past_key_values: the cache of earlier calls; `use_cache` starts one.

        Raises:
            ValueError: an empty sequence, a token id past the vocabulary, a mask or seq_idx that breaks the above.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        x = self.embed(input_ids) if input_ids is not None else cast(Tensor, inputs_embeds)
        if 0 in x.shape:
            raise ValueError(f"the input has no tokens: its shape is {tuple(x.shape[:2])}. Pass at least one row of one token.")
        if use_cache and past_key_values is None:
            past_key_values = HybridCache(len(self.layers))
        cache: Any = past_key_values
        context = self.context(x, attention_mask, seq_idx, cache)
        hidden_states = [x]
        for i, block in enumerate(self.layers):
            x, state = block(x, context, cache.states[i] if cache else None)
            if cache:
                cache.states[i] = state
            if output_hidden_states:
                hidden_states.append(x)
        if cache:
            cache.seen += x.shape[1]
            if attention_mask is not None and (padding := attention_mask[:, -1] == 0).any():
                cache.forget(padding)
        x = self.norm_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embeddings(input_ids)
        except IndexError:
            bad = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)][0].item()
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.config.vocab_size} (vocab_size). "
                "Is this the tokenizer that the model was trained with?"
            ) from None

    def context(self, x: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None, cache: HybridCache | None) -> Context:
        """Padding is a document of its own, so that one mechanism keeps it, and packed documents, apart."""
        b, t = x.shape[:2]
        past = cache.seen if cache else 0
        rotation = None
        if self.config.rope_theta is not None and "*" in self.config.hybrid_override_pattern:
            # Only differences of positions matter, so neither documents nor padding need positions of their own.
            positions = torch.arange(past, past + t, device=x.device)[None]
            rotation = rotary(positions, self.config.head_dim, self.config.rope_theta)
        keys = None  # (b s): a query looks at keys of its own kind only
        if attention_mask is not None and seq_idx is not None:
            raise ValueError("pass attention_mask (padding) or seq_idx (packed documents), not both; padding can be a document.")
        if seq_idx is not None:
            if past:
                raise ValueError(f"seq_idx does not go with a cache that has seen {past} positions; start a new cache.")
            check_seq_idx(seq_idx, b, t)
            if (seq_idx.diff() < 0).any():
                raise ValueError("seq_idx must never fall along a row: it numbers the documents in their order.")
            if (seq_idx[:, 0] == seq_idx[:, -1]).all():
                seq_idx = None  # every row is one document
            keys = seq_idx
        elif attention_mask is not None:
            if tuple(attention_mask.shape) != (b, past + t):
                raise ValueError(
                    f"attention_mask must have shape ({b}, {past + t}): {past} cached and {t} new positions; "
                    f"got {tuple(attention_mask.shape)}."
                )
            if not attention_mask.all():
                keys = attention_mask.bool().long()
                starts, ends = (keys.diff() > 0).sum(-1), (keys.diff() < 0).sum(-1)
                if (starts + keys[:, 0] > 1).any() or (cache is not None and ends.any()):
                    raise ValueError(
                        "padding must stand before the tokens of a row (or, without a cache, after them); got an attention_mask "
                        "with zeros elsewhere. Pad on the left (tokenizer.padding_side = 'left')."
                    )
                seq_idx = (keys[:, past:].diff(prepend=keys[:, past : past + 1]) != 0).cumsum(-1) if t > 1 else None
        if keys is None:
            if past and t > 1:
                mask = torch.ones(t, past + t, dtype=torch.bool, device=x.device).tril(past)[None, None]
                return Context(mask=mask, rotary=rotation)
            return Context(rotary=rotation)
        mask = (keys[:, past:, None] == keys[:, None, :]).tril(past)[:, None]
        return Context(seq_idx=seq_idx, mask=mask, rotary=rotation)


class HybridLMForCausalLM(HybridLMPreTrainedModel, GenerationMixin):
    """The language model. `backend` picks the operators (`auto`, `eager`, `naive`) and is never saved."""

    def __init__(self, config: HybridLMConfig, backend: str = "auto"):
        super().__init__(config)
        self.ops = build_ops(backend)
        self.backbone = HybridLMModel(config, ops=self.ops)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (b t v) in fp32; a loss where asked for. `HybridLMModel.forward` tells what the other arguments mean.

        Args:
            labels: (b t) as everywhere in transformers: `input_ids`, with -100 where no loss is wanted. The label at t+1 is
                the target at t. Gives the mean loss (nats per target) beside the logits.
            targets: (b t) the target *at* each position, -100 for none. Gives `loss` (b t), nats of every position, and no
                logits: the head and its loss run in blocks, so that training never holds all logits.
            logits_to_keep: the last so many positions (0: all), or their indices.
        """
        if labels is not None and targets is not None:
            raise ValueError("pass labels (shifted here) or targets (one at each position), not both.")
        outputs = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if targets is not None:
            self.check_targets(targets)
            loss = self.ops.cross_entropy(hidden, self.lm_head.weight, targets)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep]).float()
        if labels is not None:
            if labels.shape[1] < 2:
                raise ValueError("labels need at least two positions: the label at t + 1 is the target at t.")
            self.check_targets(labels)
            nll = self.ops.cross_entropy(hidden[:, :-1], self.lm_head.weight, labels[:, 1:])
            loss = nll.sum() / (labels[:, 1:] != IGNORE).sum()
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return output if return_dict else output.to_tuple()

    def check_targets(self, targets: Tensor) -> None:
        bad = targets[((targets < 0) | (targets >= self.config.vocab_size)) & (targets != IGNORE)]
        if len(bad):
            raise ValueError(
                f"target {bad[0].item()} is outside the vocabulary of {self.config.vocab_size} (vocab_size), "
                f"and not {IGNORE} (no target)."
            )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves the cache to forward
