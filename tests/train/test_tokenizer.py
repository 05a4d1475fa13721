import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hybridlm.data.sources import Documents
from hybridlm.tokenizer import END, PAD, byte_tokenizer
from train.__main__ import main
from train.tokenizer import bytes_per_token, train_tokenizer

TEXTS = [
    " ".join(random.Random(i).choices(["the", "cat", "sät", "1234", "on", "\n    mat", "(x);", "日本"], k=80)) for i in range(20)
]
DOCUMENTS = Documents("test", "x", len(TEXTS), TEXTS.__getitem__)
TOKENIZER = train_tokenizer(DOCUMENTS, 280)


@settings(deadline=None, max_examples=80)
@given(st.text())
def test_any_text_comes_back_exactly(text):
    ids = TOKENIZER(text, split_special_tokens=True).input_ids
    assert TOKENIZER.decode(ids) == text
    assert all(token < 278 for token in ids)


@pytest.mark.parametrize(
    "text", ["the cat", "  two  spaces ", "\r\n\t\0", "e\u0301 हिन्दी", "🏳️‍🌈", "\ufeffbom\u2028b", f"a{END}b", "1" * 99]
)
def test_text_as_it_occurs_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER(text, split_special_tokens=True).input_ids) == text


def test_it_has_the_bytes_the_merges_and_the_specials_of_the_byte_tokenizer():
    assert len(TOKENIZER) == 280
    assert (TOKENIZER.eos_token, TOKENIZER.bos_token, TOKENIZER.pad_token, TOKENIZER.padding_side) == (END, END, PAD, "left")
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (278, 279)
    assert len(TOKENIZER("the cat").input_ids) == 2
    assert len(TOKENIZER("1234").input_ids) == 4  # a token a digit


def test_a_text_without_enough_pairs_gives_fewer_tokens():
    assert len(train_tokenizer(Documents("t", "x", 1, ["ab"].__getitem__), 1000)) == 259


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match=r"at least 258, .*; got 257"):
        train_tokenizer(DOCUMENTS, 257)


def test_the_command_writes_a_folder_that_autotokenizer_opens(tmp_path, run_main):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text)
    status, out, _ = run_main(main, "tokenizer", "--source", folder, "--out", tmp_path / "tokenizer", "--vocab_size", 280)
    assert status == 0
    assert f"{tmp_path}/tokenizer: 280 tokens, " in out and "bytes per held-out token" in out
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.decode(loaded(TEXTS[0]).input_ids) == TEXTS[0]
    assert run_main(main, "prepare", "--source", folder, "--out", tmp_path / "o", "--tokenizer", tmp_path / "tokenizer")[0] == 0
    status, _, err = run_main(main, "tokenizer", "--source", folder, "--out", tmp_path / "tokenizer", "--vocab_size", 280)
    assert status == 2
    assert "exists and is not an empty folder" in err


def test_what_is_held_out_teaches_it_nothing(tmp_path, run_main):
    rows = [f'{{"text": "document {i} {"zq" * 50 * held_out}"}}' for i, held_out in enumerate(held_out_of(10))]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert run_main(main, "tokenizer", "--source", tmp_path / "t.jsonl", "--out", tmp_path / "t", "--vocab_size", 300)[0] == 0
    assert "zq" not in AutoTokenizer.from_pretrained(tmp_path / "t").get_vocab()


def held_out_of(count: int) -> list[bool]:
    from hybridlm.data.sampler import permute
    from hybridlm.data.sources import HELD_OUT_KEY

    return [i == permute(0, count, HELD_OUT_KEY) for i in range(count)]


@pytest.mark.faults
def test_another_process_trains_the_same_tokenizer():
    script = (
        "from hybridlm.data.sources import Source, open_source\n"
        "from train.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(open_source(Source('stdlib'), 'validation'), 1000).backend_tokenizer.to_str())"
    )
    root = Path(__file__).parents[2]
    outputs = {subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1


def test_an_empty_held_out_document_is_no_error():
    tokenizer = byte_tokenizer()
    assert bytes_per_token(Documents("empty", "", 1, [""].__getitem__), tokenizer) == 0
    assert bytes_per_token(Documents("three", "", 1, ["abc"].__getitem__), tokenizer) == 1
