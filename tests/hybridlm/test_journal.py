import json
import os

import pytest

from hybridlm.journal import Journal, identity


def test_what_is_kept_is_not_made_again(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return value

    first = Journal(str(tmp_path / "a.json"), {"window": 8})
    assert first.once("x", lambda: make([1.5, None])) == [1.5, None]
    assert first.once("x", lambda: make("again")) == [1.5, None]
    again = Journal(str(tmp_path / "a.json"), {"window": 8})
    assert again.once("x", lambda: make("again")) == [1.5, None]
    assert again.once("y", lambda: make(2)) == 2
    assert made == [[1.5, None], 2]
    assert Journal(str(tmp_path / "a.json"), {"window": 8}).results == {"x": [1.5, None], "y": 2}


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_half_written_line_is_made_again(tmp_path, cut):
    journal = Journal(str(tmp_path / "a.json"), {})
    journal.keep("x", 1)
    journal.keep("y", 2)
    file = tmp_path / "a.json.partial.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(str(tmp_path / "a.json"), {})
    assert again.results == {"x": 1}
    again.keep("y", 3)
    assert [json.loads(line) for line in file.read_text().splitlines()][1:] == [
        {"key": "x", "value": 1},
        {"key": "y", "value": 3},
    ]


def test_a_file_cut_within_its_first_line_begins_anew(tmp_path):
    file = tmp_path / "a.json.partial.jsonl"
    file.write_text('{"comm')
    journal = Journal(str(tmp_path / "a.json"), {"window": 8})
    journal.keep("x", 1)
    assert Journal(str(tmp_path / "a.json"), {"window": 8}).results == {"x": 1}


def test_results_of_other_settings_are_refused(tmp_path):
    Journal(str(tmp_path / "a.json"), {"window": 8}).keep("x", 1)
    with pytest.raises(ValueError, match=r"a\.json\.partial\.jsonl has the results so far of a command with other settings"):
        Journal(str(tmp_path / "a.json"), {"window": 9})


@pytest.mark.parametrize("line", ["{", "[1]", '{"key": 1}'])
def test_a_file_of_another_kind_is_named(tmp_path, line):
    Journal(str(tmp_path / "a.json"), {}).keep("x", 1)
    with (tmp_path / "a.json.partial.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"a\.json\.partial\.jsonl has no results that can be read .*; delete the file"):
        Journal(str(tmp_path / "a.json"), {})


@pytest.mark.parametrize("path", [None, "-"])
def test_without_a_file_nothing_is_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    journal = Journal(path, {})
    assert journal.once("x", lambda: 1) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_identity_of_a_folder_changes_with_its_files(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_text("12")
    (tmp_path / "link").symlink_to("m")
    before = identity(str(tmp_path / "m"))
    Journal(str(tmp_path / "m" / "figures.json"), {}).keep("x", 1)
    assert identity(str(tmp_path / "link")) == before
    os.utime(tmp_path / "m" / "weights", (1, 1))
    rewritten = identity(str(tmp_path / "m"))
    assert rewritten != before
    (tmp_path / "m" / "weights").write_text("123")
    os.utime(tmp_path / "m" / "weights", (1, 1))
    assert identity(str(tmp_path / "m")) != rewritten
    assert identity(str(tmp_path / "m")) != before
    assert identity("name/hub") == "name/hub"
