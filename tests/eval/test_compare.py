import json
import math

import numpy as np
import pytest

from eval.compare import compare, notes, table_rows
from eval.results import read_results


@pytest.fixture
def results(tmp_path):
    def read(*contents):
        for i, content in enumerate(contents):
            (tmp_path / f"{i}.json").write_text(json.dumps(content))
        return read_results([str(tmp_path / f"{i}.json") for i in range(len(contents))])

    return read


def score(model, nats, text="t"):
    n = len(nats)
    total, size = sum(nats), 100 * n
    by_document = {"nats": list(nats), "tokens": [90] * n, "bytes": [100] * n}
    figures = {"nats_per_token": total / (90 * n), "bits_per_byte": total / math.log(2) / size, "by_document": by_document}
    return {"model": model, **figures, "data": "text", "window": 8, "stride": None, "carry": False, "text_sha256": text}


def task(name, outcomes, metric="acc"):
    values = list(outcomes.values()) if isinstance(outcomes, dict) else outcomes
    return {"task": name, "metric": metric, "value": float(np.mean(values)), "shots": 0, "outcomes": outcomes}


def timed(model, seconds, prompt=16):
    median = float(np.median(seconds))
    return {
        "model": model, "prompt": prompt, "new": 4, "batch": 1, "request_seconds": median, "request_seconds_each": seconds,
        "time_to_first_token_s": None, "peak_memory_bytes": 2_000_000, "cache_bytes": 1000 if model == "a" else 3000,
    }  # fmt: skip


def by_what(content):
    return {row["what"]: row for row in content["rows"]}


def test_documents_are_paired(results):
    nats = np.linspace(50, 400, 12)
    content = compare("a", "b", results(score("a", nats), score("b", nats * 1.02)))
    (row,) = content["rows"]
    assert row["effect"] == pytest.approx(-0.02 * nats.sum() / math.log(2) / 1200)
    assert row["low"] < row["effect"] < row["high"] < 0
    assert row["p"] == row["p_holm"] == 2 / 2**12
    assert (row["pairs"], row["verdict"]) == (12, "A better")
    (row,) = compare("b", "a", results(score("a", nats), score("b", nats * 1.02)))["rows"]
    assert row["verdict"] == "B better"


def test_tokenizers_that_take_other_bytes_for_the_first_token(results):
    """Bits of a document are over the bytes of all: their differences add up to that of the two figures."""
    a, b = score("a", [100.0] * 8), score("b", [100.0] * 8)
    b["by_document"]["bytes"] = [98] * 8
    b["bits_per_byte"] *= 100 / 98
    (row,) = compare("a", "b", results(a, b))["rows"]
    assert row["effect"] == pytest.approx(a["bits_per_byte"] - b["bits_per_byte"])
    assert (row["low"], row["high"]) == pytest.approx((row["effect"], row["effect"]))
    assert row["p"] == 2 / 2**8


def test_questions_are_paired_by_their_number(results):
    right, wrong = [1] * 9 + [0] * 3, [0] * 9 + [1, 0, 0]
    keyed = {str(i): x for i, x in reversed(list(enumerate(wrong)))}  # in any order, and as an object
    a = {"model": "a", "tasks": [task("arc", right), task("gsm", [1, 0]), task("loss", [2.0] * 8, "word_perplexity")]}
    b = {"model": "b", "tasks": [task("arc", keyed), task("gsm", [1, 0, 0]), task("loss", [1.5] * 8, "word_perplexity")]}
    rows = by_what(compare("a", "b", results([a, b])))
    arc, gsm, loss = rows["arc, acc"], rows["gsm, acc"], rows["loss, word_perplexity"]
    assert arc["p"] == pytest.approx(2 * (1 + 10) / 2**10) and arc["test"] == "McNemar, exact"
    assert (arc["p_holm"], loss["p_holm"]) == pytest.approx((arc["p"], 2 * loss["p"]))  # of two tests
    assert arc["verdict"] == "A better" and arc["effect"] == pytest.approx(8 / 12)
    assert gsm["verdict"] == "not tested" and "same questions" in gsm["test"]
    assert loss["p"] == 2 / 2**8 and loss["verdict"] == "B better"


def test_a_group_of_tasks_is_one_test_of_all_its_questions(results):
    def group(model, outcomes):
        parts = [task(f"part_{i}", part) | {"asked": "group"} for i, part in enumerate(outcomes)]
        every = [x for part in outcomes for x in part]
        return {"model": model, "tasks": [task("group", every) | {"asked": "group", "outcomes": None}, *parts]}

    a, b = group("a", [[1, 1, 1], [1, 1, 1, 0]]), group("b", [[0, 0, 1], [0, 0, 0, 0]])
    (row,) = compare("a", "b", results(a, b))["rows"]
    assert (row["what"], row["pairs"], row["p"]) == ("group, acc", 7, 2 / 2**5)


def test_a_metric_that_is_no_mean_is_not_tested(results):
    a, b = task("f1", [1] * 9) | {"value": 0.7}, task("f1", [0] * 9)
    (row,) = compare("a", "b", results({"model": "a", "tasks": [a]}, {"model": "b", "tasks": [b]}))["rows"]
    assert (row["verdict"], row["test"], row["low"]) == ("not tested", "none: the metric is no mean of its outcomes", None)


def test_depths_are_pooled(results):
    def cells(model, outcomes):
        shared = {"model": model, "task": "passkey"}
        return [
            shared | {"length": length, "depth": depth, "accuracy": sum(o) / len(o), "outcomes": o}
            for length in (64, 128)
            for depth, o in zip((0.0, 0.5), outcomes)
        ]

    a, b = cells("a", ([1, 1, 1], [1, 0.5, 1])), cells("b", ([0, 0, 1], [0, 0, 0]))
    rows = by_what(compare("a", "b", results(a, b)))
    assert list(rows) == ["passkey, 64 tokens", "passkey, 128 tokens"]
    row = rows["passkey, 64 tokens"]
    assert (row["a"], row["b"], row["pairs"]) == (pytest.approx(5.5 / 6), pytest.approx(1 / 6), 6)
    assert row["test"].startswith("signs") and row["p"] == 2 / 2**5  # one of six is a tie
    assert row["verdict"] == "no difference shown"

    a[0]["questions_sha256"], b[0]["questions_sha256"] = "x", "y"
    row = by_what(compare("a", "b", results(a, b)))["passkey, 64 tokens"]
    assert row["verdict"] == "not tested" and "same questions" in row["test"]


def test_speed_is_a_ratio_of_what_was_timed_in_turns(results):
    slow = [2.0, 4.0, 3.0, 6.0, 5.0, 4.5, 3.5, 2.5]
    fast = [x / 2 for x in slow]
    rows = by_what(compare("a", "b", results([timed("a", fast), timed("b", slow)])))
    row = rows["s of a request, 16 in, 4 out"]
    assert row["effect"] == pytest.approx(0.5) == row["low"] == row["high"]  # whatever slowed a turn slowed both
    assert row["p"] == 2 / 2**8 and row["verdict"] == "A better"
    assert rows["cache, MB, 16 in, 4 out"]["verdict"] == "A better"
    assert rows["peak memory, MB, 16 in, 4 out"]["verdict"] == "not tested"

    # Each runs as many sequences as fit: the seconds of each of them are compared.
    rooms = {"fit_memory_bytes": 1e9}
    first = {"time_to_first_token_s": 1.0, "time_to_first_token_s_each": [1.0] * 8}
    fits = [timed("a", slow) | rooms | first | {"batch": 8, "cache_bytes": 8000}]
    fits.append(timed("b", fast) | rooms | first | {"batch": 2, "cache_bytes": 6000})
    rows = by_what(compare("a", "b", results(fits)))
    row = rows["s of a request, 16 in, 4 out, batch fit, each sequence"]
    assert row["effect"] == pytest.approx(2 / 8 * 2) == row["high"] and row["verdict"] == "A better"
    row = rows["s to the first token, 16 in, 4 out, batch fit, each sequence"]
    assert row["effect"] == pytest.approx(2 / 8) == row["high"] and row["verdict"] == "A better"
    row = rows["cache, MB, 16 in, 4 out, batch fit, each sequence"]
    assert row["effect"] == pytest.approx(1000 / 3000) and row["verdict"] == "A better"
    assert len(rows) == 3  # the memory was given
    with pytest.raises(ValueError, match="no result that both"):  # of another memory
        compare("a", "b", results(fits[:1], [fits[1] | {"fit_memory_bytes": 2e9}]))

    content = compare("a", "b", results([timed("a", fast)], [timed("b", slow)]))
    row = by_what(content)["s of a request, 16 in, 4 out"]
    assert row["verdict"] == "not tested" and row["low"] is None
    assert "Not tested, they were not timed in turns, by one command: 1 row(s)." in notes(content)


def test_a_cache_in_another_precision_is_no_merit(results):
    rows = by_what(compare("a", "b", results([timed("a", [1.0]) | {"dtype": "x"}, timed("b", [1.0]) | {"dtype": "y"}])))
    row = rows["cache, MB, 16 in, 4 out"]
    assert (row["verdict"], row["test"]) == ("not tested", "none: not in the same precision")


def test_small_differences_are_shown(results):
    nats = np.linspace(50, 400, 12)
    (row,) = table_rows(compare("a", "b", results(score("a", nats), score("b", nats * 1.0001)))["rows"])
    assert row["verdict"] == "A better" and float(row["effect"]) == pytest.approx(-0.000325, abs=1e-6)


def test_a_verdict_waits_for_the_correction(results):
    tasks = lambda x: [task(name, [x] * 6 + [0]) for name in ("one", "two")]  # noqa: E731
    rows = compare("a", "b", results([{"model": "a", "tasks": tasks(1)}, {"model": "b", "tasks": tasks(0)}]))["rows"]
    assert [(row["p"], row["p_holm"]) for row in rows] == [(2 / 2**6, 4 / 2**6)] * 2
    assert {row["verdict"] for row in rows} == {"no difference shown"}


def test_what_the_task_says_is_better(results):
    tasks = lambda x: [task("t", [x] * 8, "loss_of_hair") | {"higher_is_better": True}]  # noqa: E731
    (row,) = compare("a", "b", results([{"model": "a", "tasks": tasks(1)}, {"model": "b", "tasks": tasks(0)}]))["rows"]
    assert row["verdict"] == "A better"


def test_as_many_questions_are_not_the_same_ones(results):
    a, b = ({"model": name, "tasks": [task("t", {str(i): 1 for i in numbers})]} for name, numbers in (("a", "012"), ("b", "123")))
    (row,) = compare("a", "b", results(a, b))["rows"]
    assert row["verdict"] == "not tested" and "same questions" in row["test"]


def test_versions_of_a_task_are_not_mixed(results):
    a, b = ({"model": name, "tasks": [task("arc", [x] * 9) | {"version": v}]} for name, x, v in (("a", 1, 1), ("b", 0, 2)))
    (row,) = compare("a", "b", results(a, b))["rows"]
    assert (row["verdict"], row["test"]) == ("not tested", "none: not the same version of the task")


def test_what_a_file_has_twice_counts_once(results):
    """A task and the group that it belongs to were asked for."""
    twice = [task("arc", [1, 0]) | {"asked": "arc"}, task("arc", [1, 0]) | {"asked": "group"}]
    content = compare("a", "b", results([{"model": name, "tasks": twice} for name in "ab"]))
    assert [row["what"] for row in content["rows"]] == ["arc, acc"]


def test_one_model_is_not_measured_with_itself(command, model_folder, monkeypatch):
    monkeypatch.setattr("eval.compare.perplexity.evaluate", None)
    folder = model_folder()
    status, _, err = command("compare", folder, f"{folder}/", "--data", "stdlib")
    assert (status, "are the same model" in err) == (2, True)


def test_what_one_alone_has_is_told(results):
    content = compare("a", "b", results([score("a", [1.0, 2.0]), score("b", [1.0, 2.0]), score("a", [3.0], "other")]))
    assert [row["verdict"] for row in content["rows"]] == ["no difference shown"]
    assert "perplexity of a: text_sha256 other, window 8" in notes(content)


def test_a_difference_of_zero_and_the_table(results):
    (row,) = table_rows(compare("a", "b", results(score("a", [7.0] * 4), score("b", [7.0] * 4)))["rows"])
    assert (row["effect"], row["p"], row["verdict"]) == ("+0", "1", "no difference shown")
    assert row["interval"] == "+0 … +0"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([score("a", [1.0]), score("c", [1.0])], "have results of a, c; of one alone: perplexity of a"),
        ([score("a", [1.0], "x"), score("b", [1.0], "y")], "no result that both a and b have"),
    ],
)
def test_nothing_in_common(results, contents, message):
    with pytest.raises(ValueError, match=message):
        compare("a", "b", results(*contents))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no results: it is not an object with a `model`"),
        ('[{"model": 3}]', "holds no results: it is not an object with a `model`"),
        ('{"model": "a", "loss": 1}', "no results of a kind known here: its rows have loss, model"),
    ],
)
def test_files_that_are_no_results(command, tmp_path, text, message):
    (tmp_path / "f.json").write_text(text)
    status, _, err = command("compare", "a", "b", "--results", tmp_path / "f.json")
    assert status == 2
    assert message in err and "f.json" in err


def test_other_faults(command, tmp_path):
    (tmp_path / "f.json").write_text(json.dumps(score("a", [1.0])))
    for arguments, message in [
        (("a", "./a", "--results", tmp_path / "f.json"), "are the same model"),
        (("a", "b", "--results", tmp_path / "none.json"), "cannot be read"),
        (("a", "b", "--results", tmp_path / "f.json", tmp_path / "f.json"), "Give one of the two"),
        ((tmp_path / "no", "b"), "there is no checkpoint folder"),
    ]:
        status, _, err = command("compare", *arguments)
        assert status == 2
        assert message in err


def test_two_models_are_measured_in_turns(command, model_folder, tiny_model, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.compare.REPEATS", 2)
    a, b = model_folder("a"), model_folder("b")
    tiny_model(vocab_size=258, hybrid_override_pattern="M-M-").save_pretrained(b)
    arguments = ("compare", a, b, "--data", text_folder, "--window", 16, "--prompt", "8", "--new", 2)
    status, out, err = command(*arguments, "--json", tmp_path / "c.json")
    assert status == 0, err
    content = json.loads((tmp_path / "c.json").read_text())
    kinds = {row["kind"] for row in content["rows"]}
    assert kinds == {"perplexity", "throughput"}
    assert content["rows"][0]["pairs"] == 4  # documents; the one of a single byte has nothing to predict
    assert f"A: {a}\nB: {b}\n" in out
