import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install '.[eval]'")
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel

from eval.accuracy import load, prepare
from eval.harness import Harness
from eval.models import open_model
from hybridlm.journal import Journal
from hybridlm.tokenizer import byte_tokenizer


def request(*args):
    return SimpleNamespace(args=args, task_name="test")


LONG = "A sentence that is read once, whatever is asked about it."
ANSWERS = [
    *((LONG, answer) for answer in ("yes", "no", "n", "why not?", "y")),
    *((LONG + " And another one.", answer) for answer in (" a", " bc")),
    *(("x", answer) for answer in ("yz", "zy")),  # contexts of one token
    *(("", answer) for answer in ("nothing before", "it")),
    ("a space ", "goes to the answer"),
]


KINDS = ["loglikelihood", "loglikelihood_rolling", "generate_until"]


def same(found, wanted):
    """Texts exactly, log-likelihoods up to the rounding of another batch."""
    if isinstance(wanted[0], tuple):
        return [g for _, g in found] == [g for _, g in wanted] and same([n for n, _ in found], [n for n, _ in wanted])
    return found == (wanted if isinstance(wanted[0], str) else pytest.approx(wanted, rel=1e-6))


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch):
    """As `eval.accuracy.evaluate` has it."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)


@pytest.fixture
def harness(model_folder):
    """Around our tiny model; `weights` is called with it first."""

    def build(at_a_time=3, journal=None, weights=lambda model: None):
        model, tokenizer = open_model(str(model_folder()))
        weights(model)
        return Harness(model, tokenizer, "tiny", at_a_time, journal)

    return build


@pytest.fixture
def smoke():
    """Requests of the smoke tasks: {kind: list}."""

    def build(limit):
        found = {}
        for name, shots in (("smoke_choice", 2), ("smoke_text", 0), ("smoke_copy", 0)):
            (task,) = load({name: shots}, False)[name]["tasks"].values()
            prepare(task, shots, 0)
            task.build_all_requests(limit=limit)
            found[task.instances[0].request_type] = task.instances
        return found

    return build


@pytest.mark.parametrize("length", [None, 150])
@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_same_scores_as_lm_evals_own_model(kind, length, model_folder, stock_folder, smoke):
    """`length` cuts contexts off at the left, and texts into windows."""
    folder = str(model_folder() if kind == "ours" else stock_folder)
    model, tokenizer = open_model(folder)
    ours = Harness(model, tokenizer, kind, 3)
    ours._max_length = length
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4, max_length=length)
    assert type(theirs.model).__module__.startswith("transformers.")
    asked = smoke(5)
    choices = [*asked["loglikelihood"], *(request(*pair) for pair in ANSWERS)]
    found, wanted = ours.loglikelihood(choices), theirs.loglikelihood(choices, disable_tqdm=True)
    difference = max(abs(a - b) for (a, _), (b, _) in zip(found, wanted, strict=True))
    print(f"{kind}: {len(choices)} log-likelihoods, {difference:.1e} nats apart at most")
    assert difference < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    texts = [*asked["loglikelihood_rolling"], request(LONG * 4)]
    rolled = ours.loglikelihood_rolling(texts)
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6)
    written = ours.generate_until(asked["generate_until"])
    assert written == theirs.generate_until(asked["generate_until"], disable_tqdm=True)
    assert any(written)


def test_the_greedy_answer_is_told(harness):
    lm = harness()
    ids = torch.tensor([list(LONG.encode())])
    with torch.no_grad():
        best = lm.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=[])[0, len(LONG) :].tolist()
    pairs = [best, best[:1], [*best[:2], (best[2] + 1) % 256], [(best[0] + 1) % 256, *best[1:]]]
    found = lm._loglikelihood_tokens([(None, list(LONG.encode()), tokens) for tokens in pairs])
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_the_context_of_several_answers_is_read_once(harness):
    lm = harness()
    read = []
    lm.model.backbone.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    lm.loglikelihood([request(LONG, answer) for answer in ("yes", "no", "not", "n")])
    assert read == [(1, len(LONG)), (1, 2), (1, 1), (1, 2)]  # an answer's last token is never read, that of "n" not at all
    read.clear()
    lm.loglikelihood([request(LONG + end, answer) for end in "ab" for answer in ("yes", "no", "not", "n")])
    assert read == [(2, len(LONG) + 1), (2, 2), (2, 2), (2, 2), (2, 2)]
    read.clear()
    harness_of_one = Harness(lm.model, lm.tokenizer, "tiny", 1)
    harness_of_one.loglikelihood([request("a" * length, "b") for length in (3, 9, 6)])
    assert read == [(1, 9), (1, 6), (1, 3)]  # the longest first: what does not fit into memory is known at once


def test_contexts_of_different_lengths_are_told_apart(harness):
    """What one reads before its last token may be another's context."""
    asked = [(None, [97], [98, 99]), (None, [97, 98], [100])]
    found = harness()._loglikelihood_tokens(asked)
    alone = [answer for one in asked for answer in harness()._loglikelihood_tokens([one])]
    assert same(found, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_memory_halves_the_batch(harness, smoke, kind, capsys):
    requests = smoke(5)[kind]
    wanted = getattr(harness(), kind)(requests)
    lm = harness(at_a_time=8)

    def refuse(_, args, kwargs):
        if len(args[0] if args else kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too much")

    lm.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    found = getattr(lm, kind)(requests)
    assert same(found, wanted)
    out = capsys.readouterr().out
    assert out.count("not enough memory for a batch of ") <= 3  # it is remembered
    assert lm.at_a_time == 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_names_the_layer(harness, smoke, kind):
    lm = harness(weights=lambda model: torch.nn.init.constant_(model.backbone.layers[2].mixer.out_proj.weight, torch.nan))
    with pytest.raises(FloatingPointError, match=r"tiny .*: its weight backbone\.layers\.2\.mixer\.out_proj\.weight has numbers"):
        getattr(lm, kind)(smoke(1)[kind])


def test_no_number_behind_a_context_that_is_cut_off_names_the_layer(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=8, n_layer=1, n_head=1, n_positions=16)).eval()
    torch.nn.init.constant_(model.transformer.h[0].mlp.c_proj.weight, 3e38)
    lm = Harness(model, byte_tokenizer(), "tiny")
    with pytest.raises(FloatingPointError, match=r"that is not finite is that of transformer\."):
        lm.loglikelihood([request("a" * 40, "b")])


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_stopped(harness, smoke, kind, tmp_path):
    requests = smoke(5)[kind]
    wanted = getattr(harness(), kind)(requests)
    figures = tmp_path / "figures.json"
    lm = harness(journal=Journal(figures, {}))
    keep = lm.journal.keep

    def keep_three(key, value):
        if len(lm.journal.results) == 3:
            raise KeyboardInterrupt
        keep(key, value)

    lm.journal.keep = keep_three
    with pytest.raises(KeyboardInterrupt):
        getattr(lm, kind)(requests)
    again = harness(journal=Journal(figures, {}))
    new = []
    again.journal.keep = lambda key, value: (new.append(key), Journal.keep(again.journal, key, value))
    found = getattr(again, kind)(requests)
    assert same(found, wanted)
    assert len(new) == 2  # of five questions three were answered
    done = harness(journal=Journal(figures, {}))
    done._model = None
    assert getattr(done, kind)(requests) == found


def test_answers_that_a_model_cannot_take(harness):
    lm = harness()
    lm._max_length = 10
    with pytest.raises(ValueError, match="tiny takes answers of 1 to 10 tokens, and one has 11"):
        lm.loglikelihood([request("a", "b" * 11)])
    with pytest.raises(ValueError, match="and one has 0"):
        lm.loglikelihood([request("a", "")])
    with pytest.raises(ValueError, match="lets a model write 10 tokens, and tiny takes 10 with the question"):
        lm.generate_until([request("a", {"max_gen_toks": 10, "until": ["b"]})])


def test_a_token_past_the_vocabulary_is_named(model_folder):
    model, tokenizer = open_model(str(model_folder(vocab_size=120)))
    lm = Harness(model, tokenizer, "tiny")
    for ask in (lambda: lm.loglikelihood([request("ab", "z")]), lambda: lm.generate_until([request("z", {"until": ["b"]})])):
        with pytest.raises(ValueError, match="the tokenizer of tiny gives token id 122"):
            ask()
