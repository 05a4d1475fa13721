import json
from collections import Counter

import numpy as np
import pytest

from hybridlm.data.labelled import Labelled
from hybridlm.data.preparation import numbered, prepare
from hybridlm.data.shards import Shards
from hybridlm.data.sources import PACKAGE_FILES, Source, split_source
from hybridlm.tokenizer import byte_tokenizer

ROWS = [("", "b"), ("cat", "a"), ("a dog that is longer than a window", "b"), *((f"text {i}", "ab"[i % 2]) for i in range(17))]
END = 256


def write_rows(path, rows=ROWS, **more):
    path.write_text("".join(json.dumps({"text": text, "label": label} | more) + "\n" for text, label in rows))
    return path


def prepared(path, tmp_path, **settings):
    return prepare(Source(str(path), label_column="label"), byte_tokenizer(), tmp_path / "cache", quiet=True, **settings)


def decoded(shards):
    ids = shards.read(np.arange(len(shards)))
    texts = [bytes(part[:-1].tolist()).decode() for part in np.split(ids, shards.documents[:-1, 0])]
    return list(zip(texts, (shards.meta["labels"][i] for i in shards.labels)))


def test_each_document_keeps_its_label_also_where_it_is_empty(tmp_path):
    both = prepared(write_rows(tmp_path / "rows.jsonl"), tmp_path)
    assert sorted([*decoded(both[0]), *decoded(both[1])]) == sorted(ROWS)
    assert [shards.meta["documents"] for shards in both] == [18, 2]


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "class_label"])
def test_labels_of_tables(kind, tmp_path):
    import datasets

    rows = [{"text": f"text {i}", "label": ("007", "NA")[i % 2] if kind == "csv" else i % 2 == 0} for i in range(9)]
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / ("folder" if kind in ("arrow", "class_label") else f"rows.{kind}")
    if kind == "class_label":
        names = datasets.ClassLabel(names=["yes", "no"])
        table = datasets.Dataset.from_list([row | {"label": i % 2} for i, row in enumerate(rows)])
        table = table.cast_column("label", names)
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(kind, table.save_to_disk)(str(path))
    training, _ = prepared(path, tmp_path)
    expected = {"csv": ["007", "NA"], "class_label": ["no", "yes"]}.get(kind, ["False", "True"])
    assert training.meta["labels"] == (sorted(expected, key=lambda name: name != "007") if kind == "csv" else expected)
    first = {"csv": "007", "class_label": "yes"}.get(kind, "True")
    assert all(label == (first if int(text[5:]) % 2 == 0 else ({*expected} - {first}).pop()) for text, label in decoded(training))


def test_labels_are_in_the_order_of_numbers_then_of_words():
    names, of_document = numbered(["b", "10", "9", "-1", "b", "B"])
    assert names == ["-1", "9", "10", "B", "b"] and of_document.tolist() == [4, 2, 1, 0, 4, 3]


@pytest.mark.parametrize("label", [None, "", 1.5, ["a"]])
def test_a_document_without_a_label_is_a_bad_one(label, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, ("the last", label)])
    with pytest.raises(ValueError, match=r"rows.jsonl:21: 'label' is .*bad_documents=skip"):
        prepared(path, tmp_path)
    both = prepared(path, tmp_path, bad_documents="skip")
    assert sum(shards.meta["documents"] for shards in both) == 20
    assert sum(sum(shards.meta["skipped"].values()) for shards in both) == 1


def test_the_labels_are_part_of_what_the_data_is(tmp_path):
    digests = set()
    for i, rows in enumerate((ROWS, [(text, "b" if label == "a" else "a") for text, label in ROWS])):
        path = write_rows(tmp_path / f"{i}.jsonl", rows)
        digests.add(prepared(path, tmp_path)[0].meta["sha256"])
    assert len(digests) == 2


def test_altered_labels_are_found(tmp_path):
    training, _ = prepared(write_rows(tmp_path / "rows.jsonl"), tmp_path)
    np.save(training.folder / "labels.npy", 1 - training.labels)
    with pytest.raises(ValueError, match=r"labels.npy is altered"):
        Shards(training.folder).check()


def test_text_has_no_labels_and_the_standard_library_one_kind(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"has no labels; leave data\.label_column away"):
        split_source(Source(str(tmp_path / "a.txt"), label_column="label"), None, 0.1)
    with pytest.raises(ValueError, match=r"has the label 'package' alone; got data\.label_column='label'"):
        split_source(Source("stdlib", label_column="label"), None, 0.1)


def test_files_of_the_standard_library_are_labelled_by_their_package():
    training, validation = split_source(Source("stdlib", label_column="package"), None, 0.1)
    counts = [Counter(documents.label(i) for i in range(len(documents))) for documents in (training, validation)]
    every = counts[0] + counts[1]
    assert min(every.values()) >= PACKAGE_FILES and {"test", "encodings", "asyncio"} <= every.keys() and "json" not in every
    assert 0.25 < len(validation) / (len(training) + len(validation)) < 0.35
    number = next(i for i in range(len(training)) if training.label(i) == "tkinter")
    assert "tkinter" in training[number] or "Tk" in training[number]


@pytest.fixture
def sampler(tmp_path):
    training, _ = prepared(write_rows(tmp_path / "rows.jsonl"), tmp_path)
    return Labelled(training, 16, seed=3, vocab_size=258, names=training.meta["labels"])


def test_every_epoch_has_each_document_once_with_its_label_at_its_end(sampler):
    names = sampler.shards.meta["labels"]
    whole = sorted((text.encode()[:15] if len(text) > 15 else text.encode(), label) for text, label in decoded(sampler.shards))
    orders = []
    for epoch in range(3):
        seen = []
        for number in range(epoch * sampler.windows, (epoch + 1) * sampler.windows):
            sample = sampler.sample(number)
            assert all(len(array) == 16 for array in sample.values()) and (np.diff(sample["seq_idx"]) >= 0).all()
            for piece in range(len(sampler.chosen(number))):
                ids, targets = (sample[name][sample["seq_idx"] == piece] for name in ("input_ids", "targets"))
                assert ids[-1] == END and (targets[:-1] == -100).all()
                seen.append((bytes(ids[:-1].tolist()), names[targets[-1]]))
            padding = sample["seq_idx"] == len(sampler.chosen(number))
            assert (sample["targets"][padding] == -100).all() and (sample["input_ids"][padding] == END).all()
        assert sorted(seen) == whole
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_a_sample_follows_from_its_number_alone(sampler):
    again = Labelled(sampler.shards, 16, seed=3, vocab_size=258, names=sampler.names)
    for number in (7, 0, 31):
        assert all(np.array_equal(a, b) for a, b in zip(sampler.sample(number).values(), again.sample(number).values()))
    assert [one["document"] for one in sampler.origin(2)] == sampler.chosen(2).tolist()


def test_how_many_documents_are_cut_is_known(sampler):
    long = sum(len(text) + 1 > 16 for text, _ in decoded(sampler.shards))
    assert sampler.cut == long == 1
