import io

import pytest
import torch
from transformers import GenerationConfig

from hybridlm import HybridLMForCausalLM
from hybridlm.__main__ import main
from hybridlm.cli.generate import LONGEST_PROMPT, prompt_ids
from hybridlm.tokenizer import byte_tokenizer

PROMPT = "naïve "


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model(vocab_size=258).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, prompt=PROMPT):
        status = main(["generate", folder, "--prompt", prompt, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def expected(folder, new, **sampling):
    """The continuation by hand."""
    model, tokenizer = HybridLMForCausalLM.from_pretrained(folder), byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(5)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=bool(sampling), **sampling)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_streams_what_generate_gives(run, folder):
    status, out, err = run("--max-new", 60)
    assert (status, out) == (0, expected(folder, 60) + "\n")
    assert err.startswith("60 tokens: the first after ")
    assert err.rstrip().endswith("tokens/s")


def test_sampling_streams_what_generate_gives(run, folder):
    """So hot that all 258 tokens are in play: transformers' own default of 50 would show."""
    sampled = run("--max-new", 60, "--temperature", 20, "--seed", 5)[1]
    assert sampled == expected(folder, 60, temperature=20.0, top_k=0, top_p=1.0) + "\n"
    assert sampled == run("--max-new", 60, "--temperature", 20, "--seed", 5)[1] != run("--max-new", 60)[1]
    narrowed = run("--max-new", 60, "--temperature", 20, "--top-k", 3, "--top-p", 0.8, "--seed", 5)[1]
    assert narrowed == expected(folder, 60, temperature=20.0, top_k=3, top_p=0.8) + "\n"
    assert run("--max-new", 60, "--temperature", 20, "--top-k", 1, "--seed", 5)[1] == run("--max-new", 60)[1]


def test_text_comes_word_by_word_and_a_character_whole(run, monkeypatch):
    """A model that writes a fixed text, of which what has been printed is looked at before each token."""
    text = "über Ω 漢字 end"
    tokens, printed, out = list(text.encode()), [], io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    forward = HybridLMForCausalLM.forward

    def scripted(self, *args, **kwargs):
        printed.append(out.getvalue())
        output = forward(self, *args, **kwargs)
        output.logits = torch.nn.functional.one_hot(torch.tensor([[tokens[len(printed) - 1]]]), 258).float()
        return output

    monkeypatch.setattr(HybridLMForCausalLM, "forward", scripted)
    assert run("--max-new", len(tokens))[0] == 0
    assert out.getvalue() == text + "\n"
    assert all(text.startswith(so_far) for so_far in printed)
    assert {"über ", "über Ω ", "über Ω 漢"} <= set(printed)


def test_ctrl_c_leaves_what_was_written(run, folder, monkeypatch):
    whole, forward, calls = expected(folder, 60), HybridLMForCausalLM.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HybridLMForCausalLM, "forward", interrupted)
    status, out, err = run("--max-new", 60)
    assert status == 130
    assert out == expected_prefix(whole, out) and len(out) > 5
    assert err.startswith("19 tokens: ") or err.startswith("20 tokens: ")
    assert err.endswith("interrupted\n")


def expected_prefix(whole, out):
    """`out` if it is how `whole` begins; its last character may have been cut."""
    return out if out.endswith("\n") and whole.startswith(out[:-1].rstrip("�")) else whole


def test_the_prompt_may_come_from_stdin(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run("--max-new", 20, prompt="-")[1] == run("--max-new", 20)[1]


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (io.StringIO("x" * (LONGEST_PROMPT + 1)), "more than 1,000,000 characters"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"), "is no text"),
        (io.StringIO("a\udcff"), "not UTF-8"),
    ],
)
def test_what_is_no_prompt_is_refused(stdin, message, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin)
    status, out, err = run(prompt="-")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err


def test_an_empty_prompt_starts_from_the_token_that_begins_a_text(run):
    assert run("--max-new", 5, prompt="")[0] == 0
    tokenizer = byte_tokenizer()
    assert prompt_ids(tokenizer, "") == [256]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(tokenizer, "")


def test_dtype_and_backend_reach_the_model(run, monkeypatch):
    seen = []
    generate = HybridLMForCausalLM.generate

    def spy(self, *args, **kwargs):
        seen.append((self.dtype, self.ops.backends["ssd"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(HybridLMForCausalLM, "generate", spy)
    run("--max-new", 1)
    run("--max-new", 1, "--dtype", "bf16", "--backend", "naive")
    assert seen[1] == (torch.bfloat16, "naive")
    assert seen[0] == (torch.bfloat16 if torch.cuda.is_available() else torch.float32, "eager")
    status, _, err = run("--backend", "nonsense")
    assert status == 2 and "nonsense" in err


def test_a_folder_without_a_tokenizer_is_told(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_without_a_stdin_the_error_says_so(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert run(prompt="-")[::2] == (2, "error: there is no stdin to read the prompt from.\n")


def test_a_generation_config_for_other_ways_does_not_stand_in_the_way(run, folder):
    greedy = run("--max-new", 20)[1]
    GenerationConfig(num_beams=4, num_return_sequences=3, repetition_penalty=5.0).save_pretrained(folder)
    assert run("--max-new", 20)[:2] == (0, greedy)
