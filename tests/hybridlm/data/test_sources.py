import json
import os
import pickle
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.data.rows import BadDocument
from hybridlm.data.sources import NoSuchSplit, Source, open_source, split_source


def test_the_standard_library_is_split_by_file_with_nothing_from_site_packages():
    train, validation = open_source(Source("stdlib"), "train"), open_source(Source("stdlib"), "validation")
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
    documents = open_source(Source(str(tmp_path / "a.txt")), "train")
    assert list(documents) == ["é\r\nb\n"]


def test_a_folder_is_a_document_a_file_in_order(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    assert list(open_source(Source(str(tmp_path)), "train")) == ["a.md", "b.txt"]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "arrow_folder"])
def test_tables_are_read_through_datasets(tmp_path, kind):
    import datasets

    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"]})
    path = tmp_path / f"t.{kind}"
    write = {"json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet, "arrow_folder": table.save_to_disk}
    write[kind](str(path))
    assert list(open_source(Source(str(path), text_column="body"), "train")) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="text_column='text'"):
        open_source(Source(str(path)), "train")


def test_a_row_without_text_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(str(tmp_path / "t.parquet"))
    documents = open_source(Source(str(tmp_path / "t.parquet")), "train")
    with pytest.raises(BadDocument, match=r"t\.parquet, row 1: 'text' is null"):
        list(documents)


def test_a_template_makes_the_text_of_a_row(tmp_path):
    import datasets

    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"q": ["why", "how"], "n": [1, 2], "z": [0, 0]}).to_parquet(path)
    documents = open_source(Source(path, template="{q}: {n}"), "train")
    assert list(documents) == ["why: 1", "how: 2"]
    assert documents.fingerprint != open_source(Source(path, template="{q} {n}"), "train").fingerprint
    with pytest.raises(ValueError, match=r"has the columns \['q', 'n', 'z'\]; data\.template='\{q\}\{a\}' asks for a"):
        open_source(Source(path, template="{q}{a}"), "train")
    with pytest.raises(ValueError, match="the brace at character 0"):
        open_source(Source("stdlib", template="{q!r}"), "train")


def test_json_lines_are_read_a_document_a_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert list(open_source(Source(str(tmp_path / "t.jsonl"), text_column="body"), "train")) == ["one", "two"]


def test_the_licence_is_the_one_given_else_the_one_of_the_dataset(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a"]})
    table.info.license = "mit"
    table.save_to_disk(str(tmp_path / "t"))
    assert open_source(Source(str(tmp_path / "t")), "train").license == "mit"
    assert open_source(Source(str(tmp_path / "t"), license="apache-2.0"), "train").license == "apache-2.0"
    assert open_source(Source("stdlib"), "validation").license == "PSF-2.0"
    (tmp_path / "a.txt").write_text("a")
    assert open_source(Source(str(tmp_path / "a.txt")), "train").license is None


@pytest.mark.parametrize("name", ["./nothing.txt", "/no/such/file.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(Source(name), "train")


def test_an_empty_folder_and_a_missing_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        open_source(Source(str(tmp_path)), "train")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NoSuchSplit):
        open_source(Source(str(tmp_path / "a.txt")), "validation")


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-8 at byte 2"):
        list(open_source(Source(str(tmp_path / "a.txt")), "train"))


def test_a_single_document_is_split_by_characters_and_several_by_document(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    train, validation = split_source(Source(str(tmp_path / "one.txt")), None, 0.1)
    assert (len(train[0]), len(validation[0])) == (90, 10)
    assert train[0] + validation[0] == "0123456789" * 10
    for i in range(19):
        (tmp_path / f"{i:02d}.txt").write_text(str(i))
    train, validation = split_source(Source(str(tmp_path)), None, 0.1)
    assert (len(train), len(validation)) == (18, 2)
    assert not set(train) & set(validation)


def test_documents_are_held_out_from_all_over_a_sorted_source(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(1000)))
    train, validation = split_source(Source(str(tmp_path / "t.jsonl")), None, 0.1)
    held_out = sorted(int(text) for text in validation)
    assert sorted([*held_out, *map(int, train)]) == list(range(1000))
    assert len(held_out) == 100
    assert all(5 <= sum(low <= i < low + 250 for i in held_out) <= 45 for low in range(0, 1000, 250))
    assert [int(text) for text in validation] == held_out  # read in the order of the file
    again = split_source(Source(str(tmp_path / "t.jsonl")), None, 0.1)
    assert list(again[1]) == list(validation)
    assert (
        len(
            {train.fingerprint, validation.fingerprint, split_source(Source(str(tmp_path / "t.jsonl")), None, 0.2)[0].fingerprint}
        )
        == 3
    )


def test_one_document_at_least_is_left_to_train_on(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    train, validation = split_source(Source(str(tmp_path)), None, 0.99)
    assert (len(train), len(validation)) == (1, 1)


def test_the_splits_of_a_saved_dataset_have_fingerprints_of_their_own(tmp_path):
    import datasets

    splits = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "t"))
    train, validation = split_source(Source(str(tmp_path / "t")), None, 0.1)
    assert (train[0], validation[0]) == ("train", "validation")
    assert train.fingerprint != validation.fingerprint


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_a_source_knows_that_it_was_changed(tmp_path, change):
    (tmp_path / "a.txt").write_text("a")
    documents = open_source(Source(str(tmp_path)), "train")
    assert not documents.changed()
    if change == "removed":
        (tmp_path / "a.txt").unlink()
    else:
        (tmp_path / {"edited": "a.txt", "added": "b.txt"}[change]).write_text("new")
    assert documents.changed()


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_documents_can_be_handed_to_a_process_that_is_not_forked(tmp_path, kind):
    import datasets

    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": ["abc", "d"]}).to_parquet(str(path))
    else:
        path.write_text('{"text": "abc"}\n{"text": "d"}')
    train, _ = split_source(Source(str(path)), None, 0.5)
    assert list(pickle.loads(pickle.dumps(train))) == list(train)


def test_val_source_takes_the_place_of_a_split(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("val")
    train, validation = split_source(Source(str(tmp_path / "a.txt")), Source(str(tmp_path / "b.txt")), 0.5)
    assert (train[0], validation[0]) == ("train", "val")


def test_the_fingerprint_changes_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    before = open_source(Source(str(path)), "train").fingerprint
    path.write_text("abcd")
    assert open_source(Source(str(path)), "train").fingerprint != before


def test_a_folder_of_tables_is_read_whole_and_one_of_several_kinds_refused(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text(json.dumps({"text": str(i)}))
    assert list(open_source(Source(str(folder)), "train")) == ["0", "1", "2"]
    (folder / "README.md").write_text("about")
    with pytest.raises(ValueError, match=r"several kinds: \.jsonl, text"):
        open_source(Source(str(folder)), "train")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("b.csv", "text\n"), ("a.parquet", "no parquet"), ("a.json", ""), ("b.json", "{")]
)
def test_a_broken_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
        open_source(Source(str(tmp_path / name)), "train")


def test_names_that_look_like_patterns_are_names(tmp_path):
    for name in ("x1", "x[1]"):
        (tmp_path / f"{name}.csv").write_text(f"text\nfrom {name}\n")
    assert list(open_source(Source(str(tmp_path)), "train")) == ["from x1", "from x[1]"]


def test_a_table_that_was_edited_is_read_anew_though_its_time_is_the_same(tmp_path):
    file = tmp_path / "t.csv"
    for text in ("old", "a newer one"):
        file.write_text(f"text\n{text}\n")
        os.utime(file, ns=(10**18, 10**18))
        assert list(open_source(Source(str(file)), "train")) == [text]


@pytest.mark.parametrize("edit", ["name", "content"])
def test_files_of_one_size_and_time_are_told_apart(tmp_path, edit):
    stamps = []
    for folder, name, text in (("a", "1.txt", "cats"), ("b", "2.txt" if edit == "name" else "1.txt", "dogs")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("cats" if edit == "name" else text)
        os.utime(tmp_path / folder / name, ns=(10**18, 10**18))
        stamps.append(open_source(Source(str(tmp_path / folder)), "train").fingerprint)
    assert stamps[0] != stamps[1]


def test_a_csv_is_text(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n007,NA\n1,None\n2,\n")
    source = Source(str(tmp_path / "t.csv"))
    assert list(open_source(source, "train")) == ["NA", "None", ""]
    assert list(open_source(replace(source, template="{id}"), "train")) == ["007", "1", "2"]


def test_validation_is_what_its_source_holds_out_else_all_of_it(tmp_path):
    import datasets

    def saved(**splits):
        folder = tmp_path / "-".join(splits)
        datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [text]}) for name, text in splits.items()}).save_to_disk(
            folder
        )
        return Source(str(folder))

    both = saved(train="to train on", validation="to validate with")
    assert [list(d) for d in split_source(both, both, 0.1)] == [["to train on"], ["to validate with"]]
    assert list(split_source(both, saved(validation="held out"), 0.1)[1]) == ["held out"]
    assert list(split_source(both, saved(train="all of it"), 0.1)[1]) == ["all of it"]


@pytest.mark.parametrize("settings", [{"template": "Q: {question}"}, {"text_column": "body"}])
def test_columns_of_what_has_none_are_an_error(tmp_path, settings):
    (tmp_path / "a.txt").write_text("one. two. three.")
    for name in (str(tmp_path / "a.txt"), "stdlib"):
        with pytest.raises(ValueError, match=r"without columns; leave data\.text_column and data\.template away"):
            split_source(Source(name, **settings), None, 0.1)


@pytest.mark.parametrize("name", ["B.JSONL", "b.ndjson"])
def test_the_kind_of_a_file_is_told_by_its_suffix_in_any_case(tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(open_source(Source(str(tmp_path / name)), "train")) == ["one", "two"]


def test_a_link_that_would_be_passed_over_is_an_error(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "same.txt").symlink_to("a.txt")
    assert list(open_source(Source(str(tmp_path / "texts")), "train")) == ["a", "a"]
    (tmp_path / "texts" / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="more is a link to a folder or to nothing"):
        open_source(Source(str(tmp_path / "texts")), "train")
