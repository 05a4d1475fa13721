import json
import os

import pytest

from train import prepare
from train.__main__ import main


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"question {i}", "a": i}) for i in range(20)) + "\n{broken\n")
    return path


def test_it_writes_a_folder_and_says_what_is_in_it_and_what_to_type_next(tmp_path, lines, run_main):
    out = tmp_path / "out"
    arguments = ["prepare", "--source", lines, "--out", out, "--template", "{q}: {a}", "--license", "mit"]
    status, text, _ = run_main(main, *arguments, "--bad_documents", "skip", "--workers", 1)
    assert status == 0
    rows = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines() if "  " in line}
    metas = [json.loads((out / split / "meta.json").read_text()) for split in ("train", "validation")]
    assert rows["documents"] == [str(meta["documents"]) for meta in metas] == ["18", "2"]
    assert rows["tokens"] == [str(meta["tokens"]) for meta in metas]
    assert rows["bytes per token"] == ["1.000", "1.000"]
    assert rows["licence"] == ["mit", "mit"]
    assert f"skipped: {lines}:21: malformed JSON" in text
    assert "B/s over" in text
    assert text.splitlines()[-1].endswith(f"--data.source {out} --data.tokenizer {out}/tokenizer")


def test_given_again_it_reads_every_file_and_says_so(tmp_path, lines, run_main):
    arguments = ["prepare", "--source", lines, "--out", tmp_path / "out", "--template", "{q}", "--bad_documents", "skip"]
    assert run_main(main, *arguments)[0] == 0
    status, text, _ = run_main(main, *arguments)
    assert status == 0
    assert text.count("every file has the sha256") == 2
    assert "B/s" not in text
    part = tmp_path / "out" / "train" / "tokens-00000.bin"
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    status, _, err = run_main(main, *arguments)
    assert status == 2
    assert "tokens-00000.bin is altered" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--template", "{q}"], "lines.jsonl:21: malformed JSON"),
        (["--template", "{q!r}"], "the brace at character 0"),
        (["--template", "{q}", "--val_fraction", "1.5"], "--val_fraction must lie between 0 and 1; got 1.5"),
        (["--template", "{q}", "--workers", "0"], "--workers must be at least 1; got 0"),
        (["--template", "{q}", "--text_column", "a"], "not allowed with argument"),
        (["--templat", "{q}"], "unrecognized arguments"),
        (["--tokenizer", "no/such/folder"], "no/such/folder has no tokenizer"),
    ],
)
def test_bad_input_ends_with_2_and_says_what(tmp_path, lines, run_main, flags, says):
    status, _, err = run_main(main, "prepare", "--source", lines, "--out", tmp_path / "out", *flags)
    assert status == 2
    assert says in err


def test_ctrl_c_ends_with_1_and_what_is_finished_stays(tmp_path, lines, run_main, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_folder", interrupt)
    status, _, err = run_main(main, "prepare", "--source", lines, "--out", tmp_path / "out")
    assert status == 1
    assert "the same command goes on" in err


def test_a_process_that_dies_ends_with_1(tmp_path, lines, run_main, monkeypatch):
    monkeypatch.setattr("hybridlm.data.preparation.SMALLEST_PART", 100)
    monkeypatch.setattr("hybridlm.data.parts.tokenize", lambda *_: os._exit(9))
    status, _, err = run_main(main, "prepare", "--source", lines, "--template", "{q}", "--out", tmp_path / "out", "--workers", 2)
    assert status == 1
    assert "died with exit code 9" in err


def test_a_run_takes_the_folder_as_its_source(tmp_path, lines, run_main, make_config):
    from train.setup import build_model, build_tokenizer, open_data

    out = tmp_path / "out"
    run_main(main, "prepare", "--source", lines, "--out", out, "--template", "{q}", "--bad_documents", "skip")
    config = make_config(data__source=str(out))
    tokenizer = build_tokenizer(config, build_model(config))
    assert tokenizer.name_or_path == str(out / "tokenizer")
    stream, validation = open_data(config, tokenizer, 258, quiet=True)
    assert [stream.samplers[0].shards.folder, *(shards.folder for shards in validation)] == [out / "train", out / "validation"]


def test_no_speed_is_told_of_what_was_begun_before(tmp_path, lines, run_main, monkeypatch):
    arguments = ["prepare", "--source", lines, "--out", tmp_path / "out", "--template", "{q}", "--bad_documents", "skip"]
    monkeypatch.setattr("hybridlm.data.preparation.SMALLEST_PART", 100)
    with monkeypatch.context() as patch:
        patch.setattr("hybridlm.data.preparation.finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run_main(main, *arguments)[0] == 1
    status, text, _ = run_main(main, *arguments)
    assert status == 0
    assert "B/s" not in text
