import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridlm.data import preparation
from hybridlm.data.preparation import documents_to_shards
from hybridlm.data.shards import Shards, bytes_after_first, tokenize
from hybridlm.data.sources import Documents
from hybridlm.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two parts of two documents."""
    monkeypatch.setattr(preparation, "SMALLEST_PART", 6)
    texts = ["abcd", "ef", "gh", "ijklmnop"]
    documents = Documents("test", "x", 4, texts.__getitem__, size=12)
    return documents_to_shards(documents, byte_tokenizer(), tmp_path / "shards", workers=1, quiet=True).folder


def alter(folder: Path, **changes) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reading_crosses_part_files(folder):
    shards = Shards(folder)
    assert len(shards.tokens) == 2
    want = [*b"abcd", 256, *b"ef", 256, *b"gh", 256, *b"ijklmnop", 256]
    assert shards.read(np.arange(len(shards))).tolist() == want
    assert shards.read(np.array([19, 0, 7, 8])).tolist() == [want[19], want[0], want[7], want[8]]
    assert shards.documents.tolist() == [[5, 3], [8, 1], [11, 1], [20, 7]]


def test_special_strings_in_the_text_are_only_text():
    assert tokenize(["<|endoftext|>"], byte_tokenizer()) == [list(b"<|endoftext|>")]


def test_a_tokenizer_that_asks_to_truncate_and_pad_does_neither_here():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(pad_id=257)
    assert tokenize(["abc", "d"], tokenizer) == [list(b"abc"), list(b"d")]


def test_bytes_are_counted_for_tokenizers_with_longer_tokens():
    backend = Tokenizer(models.WordLevel({"naïve": 0, "a": 1, "</s>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    assert bytes_after_first("naïve a", [0, 1], tokenizer) == len(" a")


def test_a_tokenizer_that_panics_is_an_error_of_ours(monkeypatch):
    class Panic(BaseException):
        pass

    class Backend:
        no_truncation = no_padding = staticmethod(lambda: None)

        def encode_batch_fast(self, texts, add_special_tokens):
            raise Panic("index out of bounds")

    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Backend())
    with pytest.raises(ValueError, match="Panic: index out of bounds"):
        tokenize(["a"], tokenizer)


@pytest.mark.parametrize("name", ["../tokens-00000.bin", "/etc/hostname", "sub/tokens-00000.bin", "tokens-0.bin/..", "meta.json"])
def test_a_part_of_another_name_than_ours_is_refused_before_it_is_opened(folder, name):
    parts = Shards(folder).meta["parts"]
    alter(folder, parts=[parts[0] | {"file": name}, parts[1]])
    with pytest.raises(ValueError, match=r"meta\.json does not describe prepared data: parts\.0\.file"):
        Shards(folder).check()


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.npy", "meta.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} is a link that leads outside"):
        Shards(folder).check()


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.npy", "meta.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        Shards(folder).check()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "EOF"),
        ("[" * 100_000, "recursion limit"),
        ('{"format": 1}', "format"),
        ('{"tokens": NaN}', ""),
        ("[]", "should be an object"),
        ("\xff", ""),
    ],
)
def test_a_bad_meta_json_is_named(folder, content, says):
    (folder / "meta.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"meta\.json does not describe prepared data: .*{says}"):
        Shards(folder).check()


@pytest.mark.parametrize("change", [{"tokens": 21}, {"tokens": "20"}, {"documents": 5}, {"documents": -1}, {"dtype": "O"}])
def test_a_meta_json_that_does_not_fit_the_files_is_an_error(folder, change):
    alter(folder, **change)
    with pytest.raises(ValueError, match=r"Remove the folder and prepare the data again"):
        Shards(folder).check()


def test_a_part_that_was_cut_short_is_named(folder):
    path = folder / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens-00001\.bin has 22 bytes; meta\.json says 24"):
        Shards(folder).check()


def test_parts_that_have_other_tokens_together_than_the_whole_are_refused(folder):
    parts = Shards(folder).meta["parts"]
    with (folder / "tokens-00001.bin").open("ab") as file:
        file.write(b"\0\0")
    alter(folder, parts=[parts[0], parts[1] | {"tokens": parts[1]["tokens"] + 1}])
    with pytest.raises(ValueError, match=r"its parts do not have its 20 tokens together"):
        Shards(folder).check()


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00001.bin", "documents.npy"])
def test_a_flipped_bit_is_found_when_everything_is_read(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-8] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is altered: its sha256"):
        Shards(folder).verify()


@pytest.mark.parametrize(
    "table",
    [
        np.array([[5, 3], [8, 1], [7, 1], [20, 7]]),
        np.array([[5, 3], [8, 1], [9, 1], [20, 7]]),
        np.array([[-5, 3], [8, 1], [11, 1], [20, 7]]),
        np.array([[5, 3], [8, 1], [11, 1], [21, 7]]),
        np.array([[5, 3], [8, 1], [20, 7]]),
        np.array([[5, 3], [8, 1], [11, 1], [20, 7]], dtype=np.float64),
        np.array([5, 8, 11, 20]),
    ],
)
def test_a_table_of_documents_that_cannot_be_is_refused(folder, table):
    np.save(folder / "documents.npy", table)
    with pytest.raises(ValueError, match=r"documents\.npy"):
        Shards(folder).check()


class Sentinel:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["bare pickle", "array of objects"])
def test_a_pickle_in_the_place_of_the_table_is_never_run(folder, tmp_path, kind):
    sentinel = Sentinel(tmp_path / "ran")
    if kind == "bare pickle":
        (folder / "documents.npy").write_bytes(pickle.dumps(sentinel))
    else:
        np.save(folder / "documents.npy", np.array([[sentinel, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"documents\.npy is no table of documents"):
        Shards(folder).check()
    assert not (tmp_path / "ran").exists()


def test_a_border_that_was_moved_is_found_when_the_table_is_opened(folder):
    table = np.load(folder / "documents.npy")
    table[0, 0] -= 1
    np.save(folder / "documents.npy", table)
    with pytest.raises(ValueError, match=r"documents\.npy is altered: its sha256"):
        Shards(folder).check()


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"<unk>": 0, "</s>": 1, "abc": 2}, "<unk>"),
        models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("abc", -2.0), ("▁", -3.0)], 0),
    ],
)
def test_a_special_token_that_a_tokenizer_reads_out_of_text_is_an_error(model):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenize(["abc xyz"], tokenizer)[0][0] == 2
    with pytest.raises(ValueError, match="reads '</s>' in a text as its special token"):
        tokenize(["abc", "abc </s>"], tokenizer)


def test_a_byte_of_a_character_counts_as_one(monkeypatch):
    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", -1.0) for i in range(256))]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    (ids,) = tokenize(["é"], tokenizer)
    assert bytes_after_first("é", ids, tokenizer) == 1


def test_the_name_of_the_unknown_in_a_text_is_only_unknown():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "abc": 2}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenize(["abc <unk> xyz"], tokenizer) == [[2, 0, 0]]
