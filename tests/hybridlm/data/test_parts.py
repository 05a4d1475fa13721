import json
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data import parts
from hybridlm.data.parts import batches, pieces
from hybridlm.data.sources import Documents
from hybridlm.tokenizer import byte_tokenizer


def write(texts: list[str], folder: Path) -> dict[str, bytes]:
    """The files of one part with these documents."""
    (folder / "parts").mkdir(parents=True)
    documents = Documents("test", "", len(texts), texts.__getitem__)
    parts.write_part(documents, [range(len(texts))], byte_tokenizer(), np.dtype("<u2"), folder, False, 0, lambda n: None)
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_part_is_tokens_a_table_and_what_tells_of_them(tmp_path):
    files = write(["ab", "", "é"], tmp_path)
    assert sorted(files) == ["00000.json", "00000.npy", "tokens-00000.bin"]
    assert np.frombuffer(files["tokens-00000.bin"], "<u2").tolist() == [97, 98, 256, 195, 169, 256]
    assert np.load(tmp_path / "parts" / "00000.npy", allow_pickle=False).tolist() == [[3, 1], [6, 1]]
    told = json.loads(files["00000.json"])
    assert (told["tokens"], told["largest_id"], told["skipped"]) == (6, 256, {"empty": 1})


def test_a_giant_document_is_tokenised_in_pieces_as_if_it_were_whole(tmp_path, monkeypatch):
    text = "".join(f"line {i} é\n" for i in range(60))
    whole = write([text, "b"], tmp_path / "whole")
    monkeypatch.setattr(parts, "PIECE", 16)
    monkeypatch.setattr(parts, "BATCH", 40)
    calls = []
    real = parts.tokenize
    monkeypatch.setattr(parts, "tokenize", lambda texts, t: calls.append(sum(map(len, texts))) or real(texts, t))
    in_pieces = write([text, "b"], tmp_path / "pieces")
    assert whole == in_pieces
    assert max(calls) < 40 + 16


@pytest.mark.parametrize("text", ["", "a", "ab\n" * 20, "x" * 50, "\n" * 40, "long line without an end " * 4 + "\n"])
def test_pieces_are_the_text_and_end_behind_a_line_where_one_is_near(monkeypatch, text):
    monkeypatch.setattr(parts, "PIECE", 16)
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(1 <= len(piece) <= 16 for piece in cut)
    for piece in cut[:-1]:
        assert piece.endswith("\n") or ("\n" not in piece[8:] and len(piece) == 16)


def test_batches_are_bounded_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(parts, "BATCH", 5)
    stretches = [("abc", 0), ("de", 5), ("f", 1), ("ghijklmno", 9), ("p", 1)]
    assert list(batches(iter(stretches))) == [stretches[:2], stretches[2:4], stretches[4:]]
