import json
import logging
from itertools import pairwise

import datasets
import numpy as np
import pytest

from hybridlm.data import streaming
from hybridlm.data.sources import Source
from hybridlm.data.streaming import Streamed, open_streaming
from hybridlm.tokenizer import byte_tokenizer
from train.loader import Stage, batches
from train.optim import micro_batches

LETTERS = "".join(map(chr, range(33, 127)))
TEXTS = [LETTERS[:7], "", LETTERS[7:8], LETTERS[8:41], LETTERS[41:43], LETTERS[43:60]]
STREAM = [t for text in TEXTS if text for t in [*text.encode(), 256]]  # 65 tokens an epoch


@pytest.fixture(autouse=True)
def small_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def make(kind="jsonl", texts=TEXTS, files=2):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        for i in range(files):
            part = texts[i * len(texts) // files : (i + 1) * len(texts) // files]
            if kind == "jsonl":
                (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
            else:
                datasets.Dataset.from_dict({"text": part}).to_parquet(str(folder / f"{i}.parquet"))
        return str(folder)

    return make


def opened(folder, *, seq_len=5, keep=12, vocab_size=258, skip_bad=False, start=True):
    dataset = open_streaming(folder)
    stream = Streamed(Source("s"), dataset, byte_tokenizer(), seq_len, vocab_size, keep, skip_bad)
    if start:
        stream.seek(0, {})
    return stream


def expected(number, seq_len):
    """The sample as it is in the endless stream of documents."""
    tokens = STREAM * 20
    window = tokens[number * seq_len : (number + 1) * seq_len + 1]
    targets = [-100 if a == 256 else b for a, b in pairwise(window)]
    seq_idx = np.cumsum([0] + [int(token == 256) for token in window[:-2]]).tolist()
    return {"input_ids": window[:-1], "targets": targets, "seq_idx": seq_idx}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seq_len", [1, 5, 16, 150])
def test_samples_tile_the_documents_in_the_order_of_the_source_epoch_after_epoch(write, kind, seq_len):
    stream = opened(write(kind), seq_len=seq_len)
    for first in range(0, 4 * 65 // seq_len, 4):
        batch = stream.batch(first, first + 4)
        assert {(array.shape, array.dtype.name) for array in batch.values()} == {((4, seq_len), "int64")}
        for row in range(4):
            assert {name: array[row].tolist() for name, array in batch.items()} == expected(first + row, seq_len)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("position", [0, 1, 6, 12, 13, 14, 26, 31])  # 13 samples of 5 are one epoch
def test_a_resume_goes_on_with_the_sample_at_which_it_was_cut_off(write, kind, position):
    before = opened(write(kind), keep=40)
    if position:
        before.batch(0, position)
    cursor = json.loads(json.dumps(before.cursor(position)))
    stream = opened(write(kind), keep=40, start=False)
    stream.seek(position, cursor)
    batch = stream.batch(position, position + 20)
    for row in range(20):
        assert {name: array[row].tolist() for name, array in batch.items()} == expected(position + row, 5)
    assert stream.origin(position, position + 20) == before.origin(position, position + 20)
    cursor = stream.cursor(position + 20)
    assert {**cursor, "state": 0} == {**before.cursor(position + 20), "state": 0}  # two states may mean the same row
    stream.seek(position + 20, json.loads(json.dumps(cursor)))  # and again, from a resumed one
    batch = stream.batch(position + 20, position + 21)
    assert {name: array[0].tolist() for name, array in batch.items()} == expected(position + 20, 5)


def test_any_number_of_ranks_sees_the_same_global_batches_and_may_change_at_a_resume(write):
    folder = write()
    cursor, position, rows = {}, 0, []
    for ranks, steps in [(1, 2), (3, 3), (2, 1), (4, 3)]:
        of_ranks, cursors = [], []
        for rank in range(ranks):
            stream = opened(folder, start=False)
            stream.seek(position, cursor)
            own = list(batches(stream, position, [Stage(micro_batches(12, None, rank, ranks), 12, steps)], 0))
            of_ranks.append([np.concatenate([micro["targets"] for micro in step]) for step in own])
            cursors.append(stream.cursor(position + steps * 12))
        rows += [row for step in zip(*of_ranks, strict=True) for part in step for row in part.tolist()]
        position += steps * 12
        assert all(c == cursors[0] for c in cursors)
        cursor = json.loads(json.dumps(cursors[0]))
    assert rows == [expected(number, 5)["targets"] for number in range(9 * 12)]


def test_a_position_can_be_saved_after_the_next_step_was_read_but_not_one_long_gone(write):
    stream = opened(write(), keep=12)
    stream.batch(0, 12)
    ready = stream.cursor(12)
    stream.batch(12, 24)
    assert stream.cursor(12) == ready
    assert [line["sample"] for line in stream.origin(12, 24)] == list(range(12, 24))
    stream.batch(24, 60)
    with pytest.raises(AssertionError, match="sample 12 has gone by"):
        stream.batch(12, 13)


def test_what_has_gone_by_is_not_kept_in_memory(write):
    stream = opened(write(), keep=12)
    for first in range(0, 1200, 12):
        stream.batch(first, first + 12)
        assert sum(len(held.ids) for held in stream.held) < 12 * 5 + 2 * len(STREAM)


def test_the_origin_names_the_rows_and_where_in_them_the_sample_begins(write):
    stream = opened(write())
    origin = stream.origin(0, 4)
    assert json.loads(json.dumps(origin)) == origin
    assert origin[0] == {"sample": 0, "source": "s", "documents": [{"document": 0, "offset": 0}]}
    assert origin[1]["documents"] == [{"document": 0, "offset": 5}, {"document": 2, "offset": 0}]
    assert origin[2]["documents"] == [{"document": 3, "offset": 0}]
    assert stream.origin(13, 14)[0]["documents"] == [{"document": 0, "offset": 0}]  # the second epoch


def test_another_text_in_the_row_of_the_cursor_is_an_error(write):
    stream = opened(write())
    stream.batch(0, 5)
    cursor = stream.cursor(5)
    assert cursor["row"] == 3
    changed = opened(write(texts=[*TEXTS[:3], "other " * 6, *TEXTS[4:]]), start=False)
    with pytest.raises(ValueError, match="another text in row 3 than when the checkpoint was saved"):
        changed.seek(5, cursor)


def test_a_position_without_a_cursor_is_an_error(write):
    with pytest.raises(ValueError, match="found again only by the cursor"):
        opened(write(), start=False).seek(5, {})


def test_the_identity_tells_what_is_other(write):
    stream = opened(write())
    identity = json.loads(json.dumps(stream.identity(7)))
    assert stream.changed(identity, 7) == []
    assert opened(write(), seq_len=6).changed(identity, 7) == ["seq_len: 5 -> 6"]
    assert stream.changed({"packing": "stream", "seq_len": 5, "seed": 0, "sources": []}, 7) == [
        "packing: stream -> streaming", "source: None -> s",
    ]  # fmt: skip


def test_a_row_without_text_stops_or_is_skipped_and_counted(write, caplog):
    folder = write(texts=["ab", None, "cd", None, None, "ef"], files=1)
    with pytest.raises(ValueError, match=r"row 1: 'text' is null.*data.bad_documents=skip"):
        opened(folder).batch(0, 1)
    with caplog.at_level(logging.WARNING):
        batch = opened(folder, skip_bad=True, seq_len=9).batch(0, 1)
    assert batch["input_ids"].tolist() == [[*b"ab", 256, *b"cd", 256, *b"ef", 256]]
    assert "skipped 1 bad document(s) so far, now: s, row 1: 'text' is null" in caplog.text
    assert "skipped 2 bad" in caplog.text and "skipped 3 bad" not in caplog.text


def test_a_source_without_any_text_is_an_error_and_no_endless_search(write):
    with pytest.raises(ValueError, match="'s' has no text"):
        opened(write(texts=["", ""], files=1)).batch(0, 1)


def test_a_resume_at_the_last_document_goes_on_into_the_next_epoch(write):
    stream = opened(write(texts=["abcdefgh"], files=1), seq_len=3)
    stream.batch(0, 2)
    fresh = opened(write(texts=["abcdefgh"], files=1), seq_len=3, start=False)
    fresh.seek(2, stream.cursor(2))
    assert fresh.batch(2, 5)["input_ids"].tolist() == [[*b"gh", 256], [*b"abc"], [*b"def"]]


def test_a_token_past_the_vocabulary_names_its_place(write):
    with pytest.raises(ValueError, match=r"s: token id 256 at offset 3 of row 0 .*vocab_size=256"):
        opened(write(texts=["abc", "de"], files=1), vocab_size=256).batch(0, 1)


def test_a_broken_table_and_what_is_no_table_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt' is none. Set data.streaming: false"):
        open_streaming(str(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match="'s' cannot be read"):
        opened(str(tmp_path / "b.jsonl")).batch(0, 1)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else a machine without a network asks again and again
    with pytest.raises(ValueError, match="'no/such' cannot be streamed"):
        open_streaming("no/such")


def test_a_stream_is_counted_by_no_epochs(write):
    assert opened(write()).summary(9) == ["s: streamed"]


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path):
    for name in ("x1", "x[1]"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"from {name}"}) + "\n")
    assert [row["text"] for row in open_streaming(str(tmp_path))] == ["from x1", "from x[1]"]
