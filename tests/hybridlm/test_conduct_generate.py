"""What a program that calls `generate` of any transformers model meets here."""

from threading import Thread

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import utils as generation
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from hybridlm import HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.tokenizer import byte_tokenizer

PATTERNS = ["M-M*-M-", "MEM*-ME"]
EVERYTHING = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
GREEDY = {"do_sample": False, "max_new_tokens": 5}
both = pytest.mark.parametrize("pattern", PATTERNS)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:None of the inputs:UserWarning")


@pytest.fixture
def writer(tiny_model):
    """The tiny model, with no token that ends a text."""

    def build(pattern="M-M*-M-", eager=False, **changes):
        model = tiny_model(hybrid_override_pattern=pattern, **changes)
        model.generation_config.eos_token_id = None
        if eager:
            model.set_attn_implementation("eager")
        return model

    return build


# What comes back

WAYS = {
    "greedy": ({}, 2, 2),
    "sample": ({"do_sample": True, "num_return_sequences": 2}, 4, 4),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, 6, 4),
    "sampled beams": ({"do_sample": True, "num_beams": 3}, 6, 2),
}


@both
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_everything_asked_for_comes_back_in_shape(way, cached, pattern, writer, draw_ids):
    model, (arguments, rows, texts) = writer(pattern, eager=True), WAYS[way]
    torch.manual_seed(0)
    arguments = GREEDY | {"return_dict_in_generate": True, "use_cache": cached} | EVERYTHING | arguments
    output = model.generate(draw_ids(2, 7), **arguments)
    assert type(output) is (GenerateBeamDecoderOnlyOutput if "beams" in way else GenerateDecoderOnlyOutput)
    assert output.sequences.shape == (texts, 12)
    assert isinstance(output.past_key_values, HybridCache) if cached else output.past_key_values is None
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == 5
    for i in range(5):
        keys = 7 + i
        queries = 1 if cached and i else keys
        assert output.scores[i].shape == output.logits[i].shape == (rows, 61)
        assert [h.shape for h in output.hidden_states[i]] == [(rows, queries, 32)] * 8
        assert [a.shape for a in output.attentions[i]] == [(rows, 4, queries, keys)]
        torch.testing.assert_close(output.attentions[i][0].sum(-1), torch.ones(rows, 4, queries))
        head = model.lm_head(output.hidden_states[i][-1][:, -1])
        torch.testing.assert_close(output.logits[i], head, rtol=1e-5, atol=1e-5)


@both
@torch.no_grad()
def test_greedy_takes_the_best_of_logits_that_a_forward_gives(pattern, writer, draw_ids, relative):
    model = writer(pattern)
    output = model.generate(draw_ids(2, 7), return_dict_in_generate=True, output_logits=True, output_scores=True, **GREEDY)
    logits = torch.stack(output.logits, 1)
    assert torch.equal(logits.argmax(-1), output.sequences[:, 7:]) and torch.equal(logits, torch.stack(output.scores, 1))
    assert relative(logits, model(output.sequences).logits[:, 6:-1]) < 1e-5


@both
@torch.no_grad()
def test_a_beams_score_is_the_mean_log_probability_of_its_text(pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(2, 7)
    arguments = {"num_beams": 4, "num_return_sequences": 4, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(ids, **GREEDY | arguments)
    picked = model(output.sequences).logits.log_softmax(-1)[:, 6:-1].gather(2, output.sequences[:, 7:, None])[..., 0]
    torch.testing.assert_close(output.sequences_scores, picked.mean(1), rtol=1e-4, atol=1e-4)
    assert (output.sequences_scores.view(2, 4).diff() <= 0).all()  # the best first
    assert len(output.sequences.unique(dim=0)) == 8
    by_step = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(by_step, picked, rtol=1e-4, atol=1e-4)


@both
@torch.no_grad()
def test_sampling_follows_its_seed_and_from_one_candidate_is_greedy(pattern, writer, draw_ids):
    model, ids, texts = writer(pattern), draw_ids(2, 7), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, do_sample=True, top_k=0, max_new_tokens=12))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    greedy = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, do_sample=True, top_k=1, max_new_tokens=5), greedy)
    assert torch.equal(model.generate(ids, **GREEDY | {"num_beams": 1}), greedy)


@both
@torch.no_grad()
def test_several_beams_may_start_from_embeddings(pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(2, 7)
    arguments = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **arguments)
    assert torch.equal(from_embeddings, model.generate(ids, **arguments)[:, 7:])


# Where a text starts and ends


@both
@torch.no_grad()
def test_without_a_prompt_it_starts_from_the_first_token(pattern, writer):
    model = writer(pattern)
    assert torch.equal(model.generate(**GREEDY), model.generate(torch.tensor([[1]]), **GREEDY))
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(**GREEDY)


@both
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_a_text_stops_at_its_end_and_is_padded_while_the_others_go_on(cached, pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(2, 7)
    free = model.generate(ids, use_cache=cached, do_sample=False, max_new_tokens=10)[:, 7:]
    step = next(i for i in range(1, 8) if free[0, i] not in free[0, :i] and free[0, i] not in free[1])
    for end in (free[0, step].item(), [free[0, step].item(), 2]):
        text = model.generate(ids, use_cache=cached, do_sample=False, max_new_tokens=10, eos_token_id=end, pad_token_id=0)[:, 7:]
        assert torch.equal(text[0, : step + 1], free[0, : step + 1]) and (text[0, step + 1 :] == 0).all()
        assert torch.equal(text[1], free[1])
    alone = model.generate(ids[:1], do_sample=False, max_new_tokens=10, eos_token_id=free[0, step].item())
    assert alone.shape == (1, 7 + step + 1)


@both
@torch.no_grad()
def test_lengths_are_kept(pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(2, 7)
    assert model.generate(ids, max_length=11, do_sample=False).shape == (2, 11)
    assert model.generate(ids, max_new_tokens=4, max_length=None, do_sample=False).shape == (2, 11)
    first = model.generate(ids, do_sample=False, max_new_tokens=1)[0, -1].item()
    ended = {"eos_token_id": first, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 6}
    assert model.generate(ids[:1], **ended).shape == (1, 8)
    longer = model.generate(ids[:1], **ended, min_new_tokens=3)
    assert longer.shape[1] >= 7 + 3 and first not in longer[0, 7:10]


@torch.no_grad()
def test_the_callers_processors_and_criteria_are_asked(writer, draw_ids):
    model, seen = writer(), []

    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    def stop_at_ten(ids, scores, **kwargs):
        seen.append(ids.shape[1])
        return torch.full((ids.shape[0],), ids.shape[1] >= 10)

    text = model.generate(
        draw_ids(2, 7),
        max_new_tokens=9,
        do_sample=False,
        logits_processor=LogitsProcessorList([only_seven]),
        stopping_criteria=StoppingCriteriaList([stop_at_ten]),
    )
    assert seen == [8, 9, 10] and text.shape == (2, 10) and (text[:, 7:] == 7).all()


def test_the_settings_of_generation_are_saved_with_the_model(writer, draw_ids, tmp_path):
    model = writer()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=[3, 4], pad_token_id=5)
    model.save_pretrained(tmp_path)
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.max_new_tokens, loaded.eos_token_id, loaded.pad_token_id) == (3, [3, 4], 5)


# Streams


def test_streamers_say_the_text_as_it_comes(writer, capsys):
    tokenizer, model = byte_tokenizer(), writer(vocab_size=258)
    prompt = tokenizer("def f(", return_tensors="pt").input_ids
    # ASCII alone, for the streamers hold back a character that is not whole.
    arguments = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [*range(33), *range(127, 258)]}
    text = tokenizer.decode(model.generate(prompt, **arguments)[0, 6:])
    assert len(text) == 12
    model.generate(prompt, **arguments, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip("\n") == text
    model.generate(prompt, **arguments, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip("\n") == "def f(" + text
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=model.generate, args=(prompt,), kwargs=arguments | {"streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


# Caches


@both
@pytest.mark.parametrize("kind", ["static", "dynamic", "offloaded", "offloaded_static", "quantized"])
def test_another_kind_of_cache_is_not_taken_and_that_is_said(kind, pattern, writer, draw_ids, monkeypatch):
    model, ids, warnings = writer(pattern), draw_ids(2, 7), []
    monkeypatch.setattr(generation.logger, "warning_once", warnings.append)
    output = model.generate(ids, cache_implementation=kind, return_dict_in_generate=True, **GREEDY)
    assert type(output.past_key_values) is HybridCache
    assert any("cache_implementation" in w and kind in w and "ignored" in w for w in warnings)
    assert torch.equal(output.sequences, model.generate(ids, **GREEDY))


@both
def test_a_configuration_without_a_cache_generates_without_one(pattern, writer, draw_ids):
    model, ids = writer(pattern, use_cache=False), draw_ids(2, 7)
    without = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    with_cache = model.generate(ids, return_dict_in_generate=True, use_cache=True, **GREEDY)
    assert without.past_key_values is None and type(with_cache.past_key_values) is HybridCache
    assert torch.equal(without.sequences, with_cache.sequences)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_guessing_ahead_is_refused(how, writer, draw_ids):
    """It would take tokens back, which a recurrent state cannot."""
    arguments = {"assistant_model": writer()} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        writer().generate(draw_ids(1, 7), **GREEDY, **arguments)


def test_a_cache_of_the_callers_is_filled_and_not_mixed_with_another_kind(writer, draw_ids):
    model, ids, cache = writer(), draw_ids(2, 7), HybridCache(7)
    output = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert output.past_key_values is cache and cache.get_seq_length() == 11  # the last token was never read
    assert torch.equal(output.sequences, model.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, past_key_values=HybridCache(7), cache_implementation="static", **GREEDY)


@both
@torch.no_grad()
def test_guidance_reads_its_second_text_with_a_cache_of_its_own(pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(1, 7)
    guided = GREEDY | {"guidance_scale": 2.0, "negative_prompt_ids": draw_ids(1, 4, seed=1)}
    texts = [model.generate(ids, use_cache=cached, **guided) for cached in (True, False)]
    assert torch.equal(*texts) and not torch.equal(texts[0], model.generate(ids, **GREEDY))


# The model's mode


@both
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_a_model_in_training_generates_the_same(reentrant, pattern, writer, draw_ids):
    model, ids = writer(pattern), draw_ids(2, 7)
    expected = model.generate(ids, **GREEDY)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert torch.equal(output.sequences, expected) and model.training and not output.logits[0].requires_grad


def test_an_argument_that_nobody_takes_is_an_error(writer, draw_ids):
    for name in ("token_type_ids", "max_new_token"):
        with pytest.raises(ValueError, match=name):
            writer().generate(draw_ids(1, 3), **GREEDY, **{name: 5})


@torch.no_grad()
def test_a_text_stops_at_a_string(tiny_model):
    model, tokenizer = tiny_model(vocab_size=258), byte_tokenizer()
    ids = torch.tensor([tokenizer("def f(")["input_ids"]])
    text = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 6:]
    third = tokenizer.decode(text[2:3])
    stopped = model.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=[third], tokenizer=tokenizer)[0, 6:]
    assert stopped.tolist() == text[: text.tolist().index(text[2].item()) + 1].tolist()


def test_continuous_batching_is_refused(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(1, 5)
    with pytest.raises(ValueError, match="no place for a recurrent state"):
        model.generate(ids, max_new_tokens=3, cache_implementation="paged")
    with pytest.raises(ValueError, match="no place for a recurrent state"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=3)
