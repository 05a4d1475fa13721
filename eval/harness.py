"""lm-evaluation-harness asks, a model of ours or any other answers: with the scores of its own `hf` model, and less work."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from hashlib import sha256
from itertools import chain, groupby, islice
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from eval.models import Finite, broken_part, check_vocabulary, in_batches
from hybridlm import HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.journal import Journal

LOGITS_AT_A_TIME = 1024  # positions of a model of ours whose logits exist together
Request = tuple[Any, list[int], list[int]]  # as lm_eval has tokenised it: (key, context, continuation)
Answer = tuple[float, bool]  # the continuation's log-likelihood in nats, and whether it is the greedy one


class Harness(HFLM):
    """What lm_eval asks for answers, around a model that is open already.

    Tokens, cuts at the model's length and scores are lm_eval's own. A model of ours reads the context of several answers once.

    Args:
        name: what errors call the model, and under what the journal keeps its answers.
        at_a_time: questions in one pass, and answers; fewer where memory does not suffice.
        journal: has the answers of a run that was interrupted; gets these, question by question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        at_a_time: int = 8,
        journal: Journal | None = None,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=sys.maxsize)  # batches are cut here
        self.name, self.at_a_time, self.journal = name, at_a_time, journal or Journal(None, {})
        self.ours = isinstance(model, HybridLMForCausalLM)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[Answer]:
        """
        Raises:
            ValueError: an answer that has no token, or more than the model takes, or one that is not in its vocabulary.
            FloatingPointError: a log-likelihood that is no finite number. MemoryError: there is too little for one question.
        """
        return self._answer(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """As `loglikelihood`, of whole texts."""
        return self._answer(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """As `loglikelihood`, what the model writes."""
        return self._answer(requests, self._generate)

    def _answer(self, requests: list, run: Callable[..., list]) -> list:
        """What the journal has, else what `run` gives, long questions first."""
        kind = run.__name__.strip("_")
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), requests[i].args[0]))
        questions = [list(same) for _, same in groupby(order, key=lambda i: requests[i].args[0])]
        keys = [f"{self.name} {digest(kind, [requests[i].args for i in question])}" for question in questions]
        found = self.journal.results
        left = [(key, question) for key, question in zip(keys, questions) if key not in found]
        done = len(requests) - sum(len(question) for _, question in left)
        with tqdm(total=len(requests), initial=done, desc=f"{self.name}: {kind}", unit=" requests") as bar:
            while left:
                now, left = left[: self.at_a_time], left[self.at_a_time :]
                answers = iter(run([requests[i] for _, question in now for i in question], disable_tqdm=True))
                for key, question in now:
                    self.journal.keep(key, list(islice(answers, len(question))))
                    bar.update(len(question))
        answer_of = {i: answer for key, question in zip(keys, questions) for i, answer in zip(question, found[key])}
        return [tuple(a) if isinstance(a := answer_of[i], list) else a for i in range(len(requests))]

    def _in_batches(self, run: Callable[[list], list], items: list) -> Iterator[Any]:
        done = 0
        for batch, results in in_batches(run, items, self.at_a_time):
            done += len(batch)
            if done < len(items):
                self.at_a_time = len(batch)  # no more have gone into memory
            yield from results

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Called by all that lm_eval scores. Requests that read the same go together."""
        self._check(requests)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._read_once(request), []).append(i)
        score = self._score if self.ours else self._score_stock
        answers = self._in_batches(score, [[requests[i] for i in group] for group in groups.values()])
        answer_of = dict(zip(chain.from_iterable(groups.values()), answers))
        for i, request in enumerate(requests):
            if not math.isfinite(answer_of[i][0]):
                context, continuation = self._split(request)
                ids = torch.tensor([context + continuation[:-1]], device=self.device)
                raise FloatingPointError(
                    f"{self.name} gives a log-likelihood that is no finite number ({answer_of[i][0]}): "
                    f"{broken_part(self.model, ids)}."
                )
        return [answer_of[i] for i in range(len(requests))]

    def _check(self, requests: list[Request]) -> None:
        for key, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{self.name} takes answers of 1 to {self.max_length} tokens, and one has {len(continuation)}: "
                    f"{str(key)[:200]}"
                )
        check_vocabulary(max(max(context + continuation) for _, context, continuation in requests), self.model, self.name)

    def _split(self, request: Request) -> tuple[list[int], list[int]]:
        """Context and continuation, the beginning cut off where both are longer than the model takes."""
        _, context, continuation = request
        return (context + continuation)[-(self.max_length + 1) : -len(continuation)], continuation

    def _read_once(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the requests of a group share: to a model of ours the context, if that is worth it; to others all that is read."""
        context, continuation = self._split(request)
        return tuple(context), () if self.ours and len(context) > 1 else tuple(continuation[:-1])

    def _score_stock(self, groups: list[list[Request]]) -> list[Answer]:
        return super()._loglikelihood_tokens([request for group in groups for request in group], disable_tqdm=True)

    @torch.no_grad()
    def _score(self, groups: list[list[Request]]) -> list[Answer]:
        """Contexts, one a group, are read into a cache; from its rows then all continuations, as many at a time."""
        cache = self._read([self._split(group[0])[0] for group in groups])
        rows = [(row, continuation) for row, group in enumerate(groups) for _, _, continuation in group]
        starts = range(0, len(rows), len(groups))
        return [answer for start in starts for answer in self._continue(cache, rows[start : start + len(groups)])]

    def _read(self, contexts: list[list[int]]) -> HybridCache:
        """Padding stands on the left, so that each row ends with its last token."""
        cache = HybridCache(self.model.config.num_hidden_layers)
        length = max(map(len, contexts))
        ids = torch.tensor([[0] * (length - len(c)) + c for c in contexts], device=self.device)
        tokens = torch.tensor([[0] * (length - len(c)) + [1] * len(c) for c in contexts], device=self.device)
        self.model.backbone(ids, tokens, past_key_values=cache)
        return cache

    def _continue(self, cache: HybridCache, rows: list[tuple[int, list[int]]]) -> list[Answer]:
        """Padding stands on the right, where nothing before it can see it; no one goes on from there.

        Args:
            rows: of each continuation, the row of `cache` that it goes on from, and its tokens.
        """
        branch = copy(cache)
        branch.batch_select_indices(torch.tensor([row for row, _ in rows]))  # copies
        hidden = branch.last[:, None]  # type: ignore[index]
        targets = pad_sequence([torch.tensor(tokens) for _, tokens in rows], batch_first=True, padding_value=-1).to(self.device)
        if targets.shape[1] > 1:
            after = self.model.backbone(targets[:, :-1].clamp(min=0), past_key_values=branch).last_hidden_state
            hidden = torch.cat([hidden, after], dim=1)
        real = targets >= 0
        nats, greedy = self._targets(hidden[real], targets[real])
        lengths = real.sum(1).tolist()
        return [(n.sum().item(), bool(g.all())) for n, g in zip(nats.split(lengths), greedy.split(lengths))]

    def _targets(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states (n d), the log-likelihood (n) of each target (n) in fp64, and whether nothing is likelier."""
        parts = []
        for h, target in zip(hidden.split(LOGITS_AT_A_TIME), targets.split(LOGITS_AT_A_TIME)):
            logits = self.model.lm_head(h).float().log_softmax(-1)
            parts.append((logits.gather(1, target[:, None])[:, 0].double(), logits.argmax(-1) == target))
        return torch.cat([nats for nats, _ in parts]), torch.cat([greedy for _, greedy in parts])

    def _generate(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        most = max(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests)
        if most >= self.max_length:
            raise ValueError(
                f"the task lets a model write {most} tokens, and {self.name} takes {self.max_length} with the question."
            )
        return list(self._in_batches(partial(super().generate_until, disable_tqdm=True), requests))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        check_vocabulary(int(context.max()), self.model, self.name)
        watch = LogitsProcessorList([Finite(self.model, self.name)])
        return super()._model_generate(context, max_length, stop, logits_processor=watch, **kwargs)


def digest(kind: str, arguments: list) -> str:
    return sha256(json.dumps([kind, arguments], default=str).encode()).hexdigest()[:16]
