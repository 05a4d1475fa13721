import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hybridlm.checkpoint import load_tokenizer
from hybridlm.data import preparation
from hybridlm.data.preparation import documents_to_shards, partition, prepare, prepare_folder, tokenizer_digest
from hybridlm.data.rows import BadDocument
from hybridlm.data.shards import Shards
from hybridlm.data.sources import Documents, Source, open_source, split_source
from hybridlm.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def documents(*texts: str) -> Documents:
    return Documents("test", "|".join(texts), len(texts), texts.__getitem__)


def write(texts, folder, **settings) -> Shards:
    return documents_to_shards(documents(*texts), TOKENIZER, folder / "shards", quiet=True, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, which are empty."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def tokens(shards: Shards) -> list[int]:
    return shards.read(np.arange(len(shards))).tolist()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(preparation, "SMALLEST_PART", 20)


@pytest.fixture
def lines(tmp_path):
    """JSON lines of 40 documents, of which some are empty and some cannot be read."""
    path = tmp_path / "lines.jsonl"
    bad = {7: '{"text": 3}', 20: "{", 21: "{", 33: '{"text": ""}'}
    path.write_text("\n".join(bad.get(i, json.dumps({"text": f"document {i} é"})) for i in range(40)))
    return path


def test_tokens_come_back_with_an_end_after_each_document(tmp_path):
    shards = write(["ab", "", "é", "x"], tmp_path)
    assert tokens(shards) == [97, 98, 256, 195, 169, 256, 120, 256]
    assert shards.documents.tolist() == [[3, 1], [6, 1], [8, 0]]  # bytes after the first token
    assert shards.meta["bytes"] == 2
    assert shards.meta["largest_id"] == 256
    assert shards.meta["skipped"] == {"empty": 1}


@pytest.mark.parametrize("skip_first", [False, True])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, lines, small_parts, skip_first):
    if skip_first:  # the first part has no token then
        lines.write_text('{"text": ""}\n' * 20 + lines.read_text())
    folders = []
    for workers in (1, 3):
        folder = tmp_path / f"{workers}"
        shards = prepare(Source(str(lines)), TOKENIZER, folder, bad_documents="skip", workers=workers, quiet=True)
        folders.append(contents(folder))
        assert len(shards[0].tokens) > 5
    assert folders[0] == folders[1]
    assert all(folders[0].values())  # a part without a token leaves no file
    assert not any("unfinished" in name or "/." in name or "parts" in name for name in folders[0])


def test_the_digest_is_of_the_tokens_alone(tmp_path, monkeypatch):
    one = write(["ab", "c"], tmp_path / "one")
    other = write(["a", "bc"], tmp_path / "other")
    monkeypatch.setattr(preparation, "SMALLEST_PART", 1)
    split = Documents("another name", "x", 2, ["ab", "c"].__getitem__, size=100)
    same = documents_to_shards(split, TOKENIZER, tmp_path / "same", quiet=True, workers=1)
    assert len(same.tokens) == 2
    assert one.meta["sha256"] == same.meta["sha256"] != other.meta["sha256"]


def test_bad_documents_stop_at_the_first_or_are_counted_by_reason(tmp_path, lines, small_parts):
    source = Source(str(lines))
    for workers in (1, 2):
        with pytest.raises(BadDocument, match=r"lines\.jsonl:\d+: .*data\.bad_documents=skip"):
            prepare(source, TOKENIZER, tmp_path / "cache", workers=workers, quiet=True)
    both = prepare(source, TOKENIZER, tmp_path / "cache", bad_documents="skip", val_fraction=0.2, workers=1, quiet=True)
    found = {}
    for shards in both:
        for reason, count in shards.meta["skipped"].items():
            found[reason] = found.get(reason, 0) + count
    assert found == {"not text": 1, "malformed JSON": 2, "empty": 1}
    assert sum(shards.meta["documents"] for shards in both) == 36
    examples = [example for shards in both for example in shards.meta["skipped_examples"]]
    assert sorted(int(example.split("jsonl:")[1].split(":")[0]) for example in examples) == [8, 21, 22]


def test_data_that_was_prepared_with_gaps_is_not_taken_where_gaps_are_an_error(tmp_path, lines):
    prepare(Source(str(lines)), TOKENIZER, tmp_path / "cache", bad_documents="skip", quiet=True)
    with pytest.raises(ValueError, match=r"prepared without \d bad documents \(.*lines\.jsonl:8"):
        prepare(Source(str(lines)), TOKENIZER, tmp_path / "cache", quiet=True)


def test_prepared_data_is_used_again_and_a_changed_source_prepared_anew(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    source = Source(str(tmp_path / "a.txt"))
    first, held_out = prepare(source, TOKENIZER, tmp_path / "cache", quiet=True)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again, _ = prepare(source, TOKENIZER, tmp_path / "cache", quiet=True)
    assert again.folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp
    assert len(tokens(first)) + len(tokens(held_out)) == 32
    (tmp_path / "a.txt").write_text("abcd" * 10)
    assert prepare(source, TOKENIZER, tmp_path / "cache", quiet=True)[0].folder != first.folder


def test_a_licence_is_noted_without_preparing_anew(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    name = str(tmp_path / "a.txt")
    first, _ = prepare(Source(name), TOKENIZER, tmp_path / "cache", quiet=True)
    again, _ = prepare(Source(name, license="mit"), TOKENIZER, tmp_path / "cache", quiet=True)
    assert (first.meta["license"], again.meta["license"]) == (None, "mit")
    assert again.folder == first.folder


def test_what_is_finished_is_kept_after_a_failure_and_never_done_twice(tmp_path, small_parts):
    read: list[int] = []
    broken = True

    def text(i: int) -> str:
        read.append(i)
        if broken and i == 7:
            raise OSError("disk")
        return f"document {i}"

    source = Documents("test", "x", 10, text, size=100)
    folder = tmp_path / "shards"
    with pytest.raises(OSError, match="disk"):
        documents_to_shards(source, TOKENIZER, folder, workers=1, quiet=True)
    assert not folder.exists()
    broken = False
    shards = documents_to_shards(source, TOKENIZER, folder, workers=1, quiet=True)
    assert read == [*range(8), *range(6, 10)]
    assert shards.meta["documents"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shards.lock", "shards"]
    whole = documents_to_shards(source, TOKENIZER, tmp_path / "whole" / "shards", workers=1, quiet=True)
    assert contents(folder) == contents(whole.folder)


def test_parts_of_an_edited_source_are_never_mixed_in(tmp_path, small_parts):
    def failing(i: int) -> str:
        if i == 9:
            raise OSError("disk")
        return "old"

    with pytest.raises(OSError, match="disk"):
        documents_to_shards(Documents("t", "old", 10, failing, size=100), TOKENIZER, tmp_path / "s", workers=1, quiet=True)
    new = Documents("t", "new", 10, ["new"].__mul__(10).__getitem__, size=100)
    shards = documents_to_shards(new, TOKENIZER, tmp_path / "s", workers=1, quiet=True)
    assert tokens(shards) == [*b"new", 256] * 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [".s.lock", "s"]


def test_a_source_that_is_edited_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    source = open_source(Source(str(path)), "train")
    path.write_text("abcd")
    with pytest.raises(ValueError, match="was changed while it was read"):
        documents_to_shards(source, TOKENIZER, tmp_path / "s", quiet=True)
    assert not (tmp_path / "s").exists()


def fork_and_kill(lines: Path, cache: Path, count: int) -> int:
    """Prepares in a child that kills itself before its `count`-th fsync; its exit status."""
    child = os.fork()
    if child == 0:
        left, real = [count], os.fsync

        def fsync(descriptor):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        prepare(Source(str(lines)), TOKENIZER, cache, bad_documents="skip", workers=1, quiet=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path, lines, small_parts):
    prepare(Source(str(lines)), TOKENIZER, tmp_path / "whole", bad_documents="skip", workers=1, quiet=True)
    assert fork_and_kill(lines, tmp_path / "killed", 13) == -signal.SIGKILL
    (done,) = (tmp_path / "killed").glob(".*/parts")
    assert len(list(done.glob("*.json"))) == 4
    stamps = {path.name: path.stat().st_mtime_ns for path in done.parent.glob("tokens-*")}
    prepare(Source(str(lines)), TOKENIZER, tmp_path / "killed", bad_documents="skip", workers=2, quiet=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / done.parent.name.split("-")[0][1:]).iterdir()}
    assert len([name for name, stamp in stamps.items() if after[name] == stamp]) == 4


@pytest.mark.faults
def test_killed_before_any_write_reaches_the_disk_it_goes_on_to_the_same_bytes(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(preparation, "SMALLEST_PART", 200)
    prepare(Source(str(lines)), TOKENIZER, tmp_path / "whole", bad_documents="skip", workers=1, quiet=True)
    want, killed = contents(tmp_path / "whole"), 0
    for count in range(1, 100):
        status = fork_and_kill(lines, tmp_path / f"{count}", count)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        prepare(Source(str(lines)), TOKENIZER, tmp_path / f"{count}", bad_documents="skip", workers=1, quiet=True)
        assert contents(tmp_path / f"{count}") == want, count
    assert killed > 15


def test_a_second_process_waits_for_the_first_and_finds_it_ready(tmp_path, capsys):
    first = FileLock(tmp_path / ".shards.lock")
    first.acquire()
    got = []
    second = threading.Thread(target=lambda: got.append(documents_to_shards(documents("ab"), TOKENIZER, tmp_path / "shards")))
    second.start()
    while "waiting" not in capsys.readouterr().out:
        assert second.is_alive()
        time.sleep(0.01)
    write(["ab"], tmp_path / "other")
    (tmp_path / "other" / "shards").rename(tmp_path / "shards")
    stamp = (tmp_path / "shards" / "meta.json").stat().st_mtime_ns
    first.release()
    second.join()
    assert tokens(got[0]) == [97, 98, 256]
    assert (tmp_path / "shards" / "meta.json").stat().st_mtime_ns == stamp


def test_empty_data_and_a_tokenizer_without_an_end_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"2 document\(s\) and no text in them \(empty: 2\)"):
        write(["", ""], tmp_path)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="end token"):
        documents_to_shards(documents("a"), plain, tmp_path / "s", quiet=True)


@pytest.mark.parametrize(("count", "size"), [(1, 0), (7, 5), (1000, 2**20), (1000, 2**30), (3, 2**40), (100, 2**24 + 1)])
def test_parts_cover_the_documents_once_and_are_of_reasonable_size(count, size):
    parts = partition(Documents("t", "x", count, lambda i: "", size=size))
    assert [i for part in parts for i in part] == list(range(count))
    assert len(parts) <= 1 + preparation.PARTS or size > preparation.PARTS * preparation.LARGEST_PART
    assert all(size * len(part) / count >= preparation.SMALLEST_PART for part in parts[:-1])


def test_the_tokenizer_is_told_by_what_decides_the_tokens(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(loaded) == tokenizer_digest(TOKENIZER)
    loaded.add_tokens(["new"])
    assert tokenizer_digest(loaded) != tokenizer_digest(TOKENIZER)


def test_a_prepared_folder_is_a_source_with_its_own_splits(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(10):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i} é")
    folder = tmp_path / "out"
    made = prepare_folder(split_source(Source(str(tmp_path / "texts"), license="mit"), None, 0.1), TOKENIZER, folder, quiet=True)
    source = Source(str(folder))
    for shards, again in zip(made, prepare(source, load_tokenizer(folder / "tokenizer"), tmp_path / "cache", quiet=True)):
        assert shards.folder == again.folder
    assert not (tmp_path / "cache").exists()
    texts = [*open_source(source, "train"), *open_source(source, "validation")]
    assert sorted(texts) == [f"document {i} é" for i in range(10)]
    assert open_source(source, "train").license == "mit"
    (tmp_path / "other.txt").write_text("abc")
    _, validation = prepare(Source(str(tmp_path / "other.txt")), TOKENIZER, tmp_path / "cache", val_source=source, quiet=True)
    assert validation.folder == folder / "validation"
    other = byte_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"prepared with another tokenizer; its own is .*out/tokenizer"):
        prepare(source, other, tmp_path / "cache", quiet=True)
    with pytest.raises(ValueError, match="is prepared already"):
        prepare_folder(split_source(source, None, 0.1), TOKENIZER, tmp_path / "again", quiet=True)


def test_a_folder_that_was_not_prepared_to_the_end_is_no_source(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    prepare_folder(split_source(Source(str(tmp_path / "a.txt")), None, 0.1), TOKENIZER, tmp_path / "out", quiet=True)
    (tmp_path / "out" / "validation" / "meta.json").unlink()
    with pytest.raises(ValueError, match="not prepared to the end"):
        prepare(Source(str(tmp_path / "out")), TOKENIZER, tmp_path / "cache", quiet=True)


def test_a_folder_inside_its_source_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    with pytest.raises(ValueError, match="lies inside the source"):
        prepare_folder(split_source(Source(str(tmp_path)), None, 0.1), TOKENIZER, tmp_path / "out", quiet=True)


def test_a_folder_with_other_things_or_other_data_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    source, out = Source(str(tmp_path / "a.txt")), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no prepared data"):
        prepare_folder(split_source(source, None, 0.1), TOKENIZER, out, quiet=True)
    (out / "thesis.tex").unlink()
    prepare_folder(split_source(source, None, 0.1), TOKENIZER, out, quiet=True)
    (tmp_path / "a.txt").write_text("abcd" * 10)
    before = contents(out)
    with pytest.raises(ValueError, match=r"train was prepared otherwise: fingerprint \(the source has changed since"):
        prepare_folder(split_source(source, None, 0.1), TOKENIZER, out, quiet=True)
    assert contents(out) == before


def test_of_two_that_prepare_one_folder_the_second_does_not_take_the_data_of_the_first_for_its_own(tmp_path):
    ours, theirs = documents("ours"), documents("theirs")
    documents_to_shards(theirs, TOKENIZER, tmp_path / "train", quiet=True)  # while ours waited for the lock
    with pytest.raises(ValueError, match="prepared otherwise: fingerprint"):
        documents_to_shards(ours, TOKENIZER, tmp_path / "train", quiet=True)


def test_a_folder_that_is_its_source_and_a_cache_inside_one_are_refused(tmp_path):
    for i in (0, 1):
        (tmp_path / f"train-{i}.jsonl").write_text('{"text": "one"}\n')
    source, before = Source(str(tmp_path)), sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="lies inside the source"):
        prepare_folder(split_source(source, None, 0.5), TOKENIZER, tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"data\.cache_dir .* lies inside the source"):
        prepare(source, TOKENIZER, tmp_path / "cache", quiet=True)
    assert sorted(tmp_path.iterdir()) == before


def test_ids_past_65535_are_kept_though_there_are_few_tokens(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 70_000, "</s>": 1}, "a")), eos_token="</s>"
    )
    assert tokens(documents_to_shards(documents("a"), tokenizer, tmp_path / "shards", quiet=True)) == [70_000, 1]


def test_what_is_prepared_can_be_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    write(["one"], tmp_path)

    def read_only(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(preparation, "only_one", read_only)
    assert len(write(["one"], tmp_path)) == 4


def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "tokens-00000.bin")

    monkeypatch.setattr(preparation, "write_part", full)
    with pytest.raises(OSError, match=r"No space left on device; what is finished of .* is kept, and the same command goes on"):
        write(["one"], tmp_path)


def test_a_folder_named_train_that_holds_other_things_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(preparation, "write", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="train is no prepared data; give a new or empty folder"):
        prepare_folder((documents("one"), documents("two")), TOKENIZER, tmp_path / "out", quiet=True)
