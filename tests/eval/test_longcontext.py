import json
import os
from random import Random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig

import eval.longcontext
from eval.longcontext import accuracy, ask
from eval.models import open_model
from eval.synthetic import TASKS, Question, exact
from hybridlm.tokenizer import byte_tokenizer


@pytest.fixture
def longcontext(command):
    def run(*arguments):
        return command("longcontext", *map(str, arguments))

    return run


class Parrot(torch.nn.Module):
    """Answers with what stands behind the last word's first occurrence, and notes the shapes that it was asked in."""

    device = torch.device("cpu")
    config = PreTrainedConfig(vocab_size=258)

    def __init__(self):
        super().__init__()
        self.shapes = []

    def generate(self, ids, max_new_tokens, **kwargs):
        self.shapes.append(tuple(ids.shape))
        rows = []
        for row in ids.tolist():
            text = bytes(row).decode()
            word = text.split()[-1]
            answer = f" {text.split()[text.split().index(word) + 1]} and more"[:max_new_tokens]
            rows.append(row + list(answer.encode()))
        return torch.tensor(rows)


def test_answers_are_scored_in_the_order_of_the_questions():
    asked = [Question("a 11 b 22 a", "11", 0, 2), Question("a 1 b", "9", 0, 1), Question("a 33 b 44 b", "44", 1, 2)]
    asked[1] = Question("a 1 b 2 b", "9", 1, 2)
    model = Parrot()
    assert ask(model, byte_tokenizer(), asked, exact, 8, "parrot") == [1, 0, 1]
    assert sorted(model.shapes) == [(1, 9), (2, 11)]
    assert ask(model, byte_tokenizer(), asked, exact, 1, "parrot") == [1, 0, 1]


def test_an_answer_that_goes_on_is_wrong():
    asked = [Question("a 11 b 113 b", "11", 1, 2), Question("a 11 b 113 a", "11", 0, 2)]
    assert ask(Parrot(), byte_tokenizer(), asked, exact, 8, "parrot") == [0, 1]


def test_a_prompt_behind_the_last_position(longcontext, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    status, _, err = longcontext("--model", tmp_path, "--tasks", "mqar", "--lengths", 120, "--questions", 1)
    assert status == 2
    assert "has no positions for a prompt of 1" in err and "(its limit: 64)" in err


def test_accuracy_has_the_binomial_error():
    figures = accuracy([1.0, 0.0, 0.0, 1.0])
    assert figures == {"accuracy": 0.5, "stderr": pytest.approx((0.5 * 0.5 / 4) ** 0.5)}


def test_rows_of_ours_and_of_a_stock_model(longcontext, opened, model_folder, stock_folder, tmp_path):
    alive = opened(eval.longcontext)
    ours, path, plot = model_folder(), tmp_path / "a.json", tmp_path / "a.png"
    status, out, err = longcontext(
        "--model", ours, stock_folder, "--tasks", "mqar,copying", "--lengths", "120,200", "--depths", "0,1", "--questions", 2,
        "--json", path, "--plot", plot,
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads(path.read_text())
    cells = [(row["task"], row["length"], row["depth"]) for row in rows]
    assert cells[:6] == cells[6:]
    assert cells[:6] == [("mqar", n, d) for n in (120, 200) for d in (0, 1)] + [("copying", n, None) for n in (120, 200)]
    assert [row["model"] for row in rows] == [str(ours)] * 6 + [str(stock_folder)] * 6
    assert [row["questions_sha256"] for row in rows[:6]] == [row["questions_sha256"] for row in rows[6:]]
    assert all(len(row["outcomes"]) == row["questions"] == 2 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "a.md").read_text().splitlines()) == 2 + len(rows)
    assert "mqar" in out
    assert alive == [0, 0]  # one at a time is in memory


@torch.no_grad()
def test_what_is_written_is_what_the_model_finds_likeliest(model_folder):
    model, tokenizer = open_model(str(model_folder()))
    q = TASKS["mqar"].make(Random(0), 4, 0.5)
    ids = list(q.prompt.encode())
    for _ in range(len(q.answer) + 1):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = []
    ask(model, tokenizer, [q], lambda answer, text: said.append(text) or 0.0, 1, "tiny")
    likeliest = tokenizer.decode(ids[len(q.prompt.encode()) :], skip_special_tokens=True)
    assert said[0].startswith(likeliest)
    assert len(likeliest) > 0


def test_no_number_names_the_layer(longcontext, tiny_model, model_folder):
    folder, model = model_folder(), tiny_model(vocab_size=258)
    torch.nn.init.constant_(model.backbone.layers[2].mixer.out_proj.weight, torch.nan)
    model.save_pretrained(folder)
    status, out, err = longcontext("--model", folder, "--tasks", "mqar", "--lengths", 120, "--questions", 1)
    assert (status, out) == (1, "")
    assert "writes with logits that are no numbers: its weight backbone.layers.2.mixer.out_proj.weight has" in err


def test_a_stopped_command_goes_on(longcontext, model_folder, tmp_path, monkeypatch):
    folder, path = model_folder(), tmp_path / "a.json"
    kept = (folder / "model.safetensors").stat().st_mtime_ns
    arguments = ("--model", folder, "--tasks", "mqar", "--lengths", "120", "--depths", "0,1", "--questions", 1, "--json", path)
    asked = []

    def fails(model, tokenizer, made, *rest):
        if asked:
            raise MemoryError("no more")
        asked.append(made)
        return [1.0]

    monkeypatch.setattr("eval.longcontext.ask", fails)
    status, _, err = longcontext(*arguments)
    assert status == 1
    assert "goes on from there" in err
    monkeypatch.setattr("eval.longcontext.ask", lambda *a: [0.0])
    (folder / "model.safetensors").touch()
    status, _, err = longcontext(*arguments)
    assert (status, "of a command with other settings" in err) == (2, True)  # the model may be another
    os.utime(folder / "model.safetensors", ns=(kept, kept))
    assert longcontext(*arguments)[0] == 0
    assert [row["accuracy"] for row in json.loads(path.read_text())] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "passkeys"], "there is no task 'passkeys'. Did you mean passkey?"),
        (["--lengths", "9"], "passkey cannot be asked in 9 tokens; its shortest question has about"),
        (["--tasks", "mqar", "--lengths", "99999"], "mqar cannot fill 99,999 tokens; its longest question has about"),
        (["--depths", "1.5"], "must be numbers from 0 to 1; got '1.5'"),
        (["--plot", "x.pdf"], "must end in .png; got 'x.pdf'"),
    ],
)
def test_bad_input(longcontext, model_folder, arguments, message):
    status, out, err = longcontext("--model", model_folder(), *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_training_texts(command, tmp_path):
    path = tmp_path / "texts.jsonl"
    options = ("--tasks", "mqar,passkey", "--length", "400", "--documents", "6", "--seed", "3")
    assert command("recall-texts", *options, "--out", str(path))[0] == 0
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert ["|" in text for text in texts] == [True, False] * 3
    assert max(len(text) for text in texts) <= 400
    status, _, err = command("recall-texts", "--tasks", "mqarr", "--out", str(path))
    assert (status, "Did you mean mqar?" in err) == (2, True)
