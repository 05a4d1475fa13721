import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridlm.data import shards as shards_module
from hybridlm.data.shards import prepare, tokenize
from hybridlm.data.sources import Documents, open_source
from hybridlm.tokenizer import byte_tokenizer


def documents(*texts: str) -> Documents:
    return Documents("test", "|".join(texts), len(texts), lambda i: texts[i])


def test_tokens_come_back_with_an_end_after_each_document(tmp_path):
    shards = prepare(documents("ab", "", "é"), byte_tokenizer(), tmp_path, quiet=True)
    assert shards.read(np.arange(len(shards))).tolist() == [97, 98, 256, 195, 169, 256]
    assert shards.documents.tolist() == [[3, 1], [6, 1]]  # the empty one is left out; bytes after the first token
    assert shards.meta["bytes"] == 2
    assert shards.meta["largest_id"] == 256


def test_reading_crosses_shard_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 5)
    shards = prepare(documents("abcd", "efghijklmnop", "q"), byte_tokenizer(), tmp_path, quiet=True)
    assert len(shards.tokens) == 4
    want = [*b"abcd", 256, *b"efghijklmnop", 256, *b"q", 256]
    assert shards.read(np.arange(len(shards))).tolist() == want
    assert shards.read(np.array([19, 0, 7])).tolist() == [want[19], want[0], want[7]]


def test_special_strings_in_the_text_are_only_text():
    assert tokenize(["<|endoftext|>"], byte_tokenizer()) == [list(b"<|endoftext|>")]


def test_prepared_data_is_used_again_and_a_changed_source_prepared_anew(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    source = str(tmp_path / "a.txt")
    first = prepare(open_source(source, "train"), byte_tokenizer(), tmp_path / "cache", quiet=True)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = prepare(open_source(source, "train"), byte_tokenizer(), tmp_path / "cache", quiet=True)
    assert again.folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp
    (tmp_path / "a.txt").write_text("abcd")
    assert prepare(open_source(source, "train"), byte_tokenizer(), tmp_path / "cache", quiet=True).folder != first.folder


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path):
    def read(i):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        prepare(Documents("test", "x", 1, read), byte_tokenizer(), tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_empty_data_and_a_tokenizer_without_an_end_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        prepare(documents("", ""), byte_tokenizer(), tmp_path, quiet=True)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="end token"):
        prepare(documents("a"), plain, tmp_path, quiet=True)


def test_bytes_are_counted_for_tokenizers_with_longer_tokens(tmp_path):
    backend = Tokenizer(models.WordLevel({"naïve": 0, "a": 1, "</s>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    shards = prepare(documents("naïve a"), tokenizer, tmp_path, quiet=True)
    assert shards.documents.tolist() == [[3, len(" a")]]


def test_the_digest_is_of_the_tokens_alone(tmp_path):
    one = prepare(documents("ab", "c"), byte_tokenizer(), tmp_path, quiet=True)
    same = prepare(Documents("another name", "x", 2, lambda i: ["ab", "c"][i]), byte_tokenizer(), tmp_path, quiet=True)
    other = prepare(documents("a", "bc"), byte_tokenizer(), tmp_path, quiet=True)
    assert one.meta["sha256"] == same.meta["sha256"] != other.meta["sha256"]
