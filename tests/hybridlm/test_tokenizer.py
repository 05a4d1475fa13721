import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hybridlm.tokenizer import END, PAD, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = ["", " ", "a", "  two  spaces , and .", "don't", "\r\n\t\0", "日本語 ü é", "e\u0301", "🏳️‍🌈", "\ufeffbom", "a\u2028b"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_and_come_back(text):
    ids = TOKENIZER(text).input_ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_any_text_is_its_bytes_and_comes_back(text):
    assert TOKENIZER(text).input_ids == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == text


@settings(deadline=None, max_examples=50)
@given(st.binary())
def test_any_bytes_decode_as_utf8_with_replacement_at_worst(raw):
    tokens = TOKENIZER.convert_ids_to_tokens(list(raw))
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    assert bytes(back[token] for token in tokens) == raw
    assert TOKENIZER.decode(list(raw)) == raw.decode(errors="replace")


def test_a_long_text_is_one_token_a_byte():
    raw = bytes(random.Random(0).randrange(128) for _ in range(20_000))
    assert TOKENIZER(raw.decode()).input_ids == list(raw)


def test_the_specials_are_256_and_257():
    assert len(TOKENIZER) == 258
    assert (TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.pad_token_id) == (256, 256, 257)
    assert TOKENIZER.convert_ids_to_tokens([256, 257]) == [END, PAD]
    assert TOKENIZER.decode([97, 256, 98, 257], skip_special_tokens=True) == "ab"
    assert TOKENIZER.decode([97, 256]) == f"a{END}"


def test_special_strings_in_text_can_be_read_as_plain_bytes():
    text = f"a{END}b{PAD}"
    assert TOKENIZER(text, split_special_tokens=True).input_ids == list(text.encode())


def test_padding_stands_on_the_left():
    batch = TOKENIZER(["abc", "d"], padding=True)
    assert batch.input_ids == [[97, 98, 99], [257, 257, 100]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


def test_it_loads_with_autotokenizer_and_none_of_our_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    assert not any("hybridlm" in file.read_text() for file in tmp_path.iterdir())
    text = "naïve  text\n"
    assert loaded(text).input_ids == list(text.encode()) and loaded.decode(list(text.encode())) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (256, 257, "left")
