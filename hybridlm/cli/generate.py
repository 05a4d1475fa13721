"""Continues a text, word by word."""

import sys
import time

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from hybridlm.checkpoint import load_tokenizer
from hybridlm.modeling import HybridLMForCausalLM
from hybridlm.output import quiet

# Whatever generation_config.json says: one text, its tokens as the model has them.
PLAIN: dict = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
LONGEST_PROMPT = 1_000_000  # characters: a file given by mistake is an error, not hours of reading


def read_prompt(text: str) -> str:
    """The prompt itself, or for "-" what stdin holds.

    Raises:
        ValueError: too long, or not UTF-8.
    """
    if text == "-":
        if sys.stdin is None:
            raise ValueError("there is no stdin to read the prompt from.")
        try:
            text = sys.stdin.read(LONGEST_PROMPT + 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is no text: {error}.") from None
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has more than {LONGEST_PROMPT:,} characters; give its end.")
    if any("\ud800" <= c <= "\udfff" for c in text):  # what the shell hands over for bytes that are no UTF-8
        raise ValueError("the prompt is not UTF-8.")
    return text


class Stream(TextStreamer):
    """Writes words as they are complete (a character of several bytes never comes in parts), and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


def generate(
    folder: str, prompt: str, max_new: int, *, temperature: float | None = None, top_k: int | None = None,
    top_p: float | None = None, seed: int | None = None, backend: str = "auto", dtype: str = "auto",
) -> None:  # fmt: skip
    """Writes the continuation to stdout and its speed to stderr; greedy without a temperature.

    Raises:
        ValueError: no model or tokenizer there, or nothing to start from.
        KeyboardInterrupt: after what there was is written.
    """
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if device == "cuda" else torch.float32}
    model = HybridLMForCausalLM.from_pretrained(folder, backend=backend, dtype=dtypes[dtype]).to(device)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    if seed is not None:
        torch.manual_seed(seed)
    # Spelled out: transformers would otherwise sample among 50 tokens.
    sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0} if temperature else {}
    stream = Stream(tokenizer)
    start = time.perf_counter()
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new,
            do_sample=bool(sampling),
            **PLAIN,
            streamer=stream,
            **sampling,
        )
    except KeyboardInterrupt:
        stream.end()
        raise
    finally:
        if stream.times:
            print(speed(stream.times, start), file=sys.stderr)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's tokens; for an empty one, the token that begins a text or, where there is none, ends the one before."""
    if ids := tokenizer(prompt)["input_ids"]:
        return ids
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if not starts:
        raise ValueError("the prompt is empty, and the tokenizer has no token to begin a text with; give a prompt.")
    return starts[:1]


def speed(times: list[float], start: float) -> str:
    first, rest = times[0] - start, len(times) - 1
    rate = f", then {rest / (times[-1] - times[0]):,.1f} tokens/s" if rest else ""
    return f"{len(times):,} token{'s' * (rest > 0)}: the first after {first:.2f} s{rate}"
