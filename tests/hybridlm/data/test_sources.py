import json
import sysconfig
from pathlib import Path

import pytest

from hybridlm.data.sources import NoSuchSplit, open_source, split_source


def test_the_standard_library_is_split_by_file_with_nothing_from_site_packages():
    train, validation = open_source("stdlib", "train"), open_source("stdlib", "validation")
    share = len(validation) / (len(train) + len(validation))
    assert 0.05 < share < 0.15
    assert len(train) > 300
    texts = {validation[i] for i in range(20)}
    root = Path(sysconfig.get_paths()["stdlib"])
    own = {p.read_bytes() for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts}
    assert {text.encode() for text in texts} <= own
    assert not texts & {train[i] for i in range(len(train))}


def test_a_text_file_is_one_document_read_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\n".encode())
    documents = open_source(str(tmp_path / "a.txt"), "train")
    assert list(documents) == ["é\r\nb\n"]


def test_a_folder_is_a_document_a_file_in_order(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    assert list(open_source(str(tmp_path), "train")) == ["a.md", "b.txt"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow_folder"])
def test_tables_are_read_through_datasets(tmp_path, kind, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"]})
    path = tmp_path / f"t.{kind}"
    write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet, "arrow_folder": table.save_to_disk}
    write[kind](str(path))
    assert list(open_source(str(path), "train", "body")) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="text_column='text'"):
        open_source(str(path), "train")


def test_a_column_without_text_names_the_document(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a", None)))
    with pytest.raises(ValueError, match="document 1 has None"):
        list(open_source(str(tmp_path / "t.jsonl"), "train"))


@pytest.mark.parametrize("name", ["./nothing.txt", "/no/such/file.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(name, "train")


def test_an_empty_folder_and_a_missing_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        open_source(str(tmp_path), "train")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NoSuchSplit):
        open_source(str(tmp_path / "a.txt"), "validation")


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        list(open_source(str(tmp_path / "a.txt"), "train"))


def test_a_single_document_is_split_by_characters_and_several_by_document(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    train, validation = split_source(str(tmp_path / "one.txt"), None, 0.1)
    assert (len(train[0]), len(validation[0])) == (90, 10)
    assert train[0] + validation[0] == "0123456789" * 10
    for i in range(19):
        (tmp_path / f"{i:02d}.txt").write_text(str(i))
    train, validation = split_source(str(tmp_path), None, 0.1)
    assert (len(train), len(validation)) == (18, 2)
    assert not set(train) & set(validation)


def test_val_source_takes_the_place_of_a_split(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("val")
    train, validation = split_source(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), 0.5)
    assert (train[0], validation[0]) == ("train", "val")


def test_the_fingerprint_changes_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    before = open_source(str(path), "train").fingerprint
    path.write_text("abcd")
    assert open_source(str(path), "train").fingerprint != before


def test_a_folder_of_tables_is_read_whole_and_one_of_several_kinds_refused(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text(json.dumps({"text": str(i)}))
    assert list(open_source(str(folder), "train")) == ["0", "1", "2"]
    (folder / "README.md").write_text("about")
    with pytest.raises(ValueError, match=r"several kinds: \.jsonl, text"):
        open_source(str(folder), "train")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "{broken"), ("a.jsonl", ""), ("a.parquet", "no parquet")])
def test_a_broken_table_is_named(tmp_path, monkeypatch, name, content):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
        open_source(str(tmp_path / name), "train")
