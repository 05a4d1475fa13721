import json
import shutil
import sys
from functools import partial
from statistics import mean

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install '.[eval]'")
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from eval import accuracy
from eval.tasks.smoke import make

ROW = {
    "task", "metric", "filter", "value", "stderr", "higher_is_better", "questions", "shots", "version", "outcomes", "asked",
}  # fmt: skip


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """Reading all of lm_eval's tasks takes a quarter of a minute."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")


@pytest.fixture
def ask(command, model_folder):
    """Asks one model; gives the rows of `--json -`."""
    folder = model_folder()

    def run(tasks, *arguments):
        status, out, err = command("accuracy", "--model", folder, "--tasks", tasks, "--json", "-", *arguments)
        assert status == 0, err
        return json.loads(out)["tasks"]

    return run


@pytest.fixture
def yaml(tmp_path):
    """A task file that changes smoke_choice."""

    def write(text, name="mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"include: {accuracy.SMOKE / 'choice.yaml'}\ntask: {name}\n{text}")
        return path

    return write


def test_figures_are_those_of_lm_eval(command, model_folder, tmp_path):
    folder, figures = model_folder(), tmp_path / "figures.json"
    status, table, err = command("accuracy", "--model", folder, "--tasks", "smoke", "--seed", 3, "--limit", 8, "--json", figures)
    assert status == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "figures.json"}
    found = json.loads(figures.read_text())
    assert found.keys() == {"model", "tasks", "limit", "seed", "lm_eval", "dtype"}
    wanted = accuracy.with_shots(["smoke"], None)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    for row in found["tasks"]:
        assert row.keys() == ROW
        loaded = accuracy.load({row["task"]: None}, False)[row["task"]]
        accuracy.prepare(loaded["tasks"][row["task"]], wanted[row["task"]], 3)
        result = lm_eval.evaluator.evaluate(theirs, loaded, limit=8, bootstrap_iters=10)["results"][row["task"]]
        assert row["value"] == pytest.approx(result[f"{row['metric']},none"], rel=1e-6)
        stderr = result[f"{row['metric']}_stderr,none"]
        assert row["stderr"] == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-6))
        assert row["questions"] == len(row["outcomes"])
        if row["task"] != "smoke_text":
            assert row["value"] == mean(row["outcomes"].values())
    assert [(row["task"], row["metric"], row["shots"]) for row in found["tasks"]] == [
        ("smoke_choice", "acc", 2), ("smoke_choice", "acc_norm", 2), ("smoke_text", "bits_per_byte", 0),
        ("smoke_copy", "exact_match", 0),
    ]  # fmt: skip
    assert 0 < found["tasks"][0]["value"] < 1
    assert len(table.splitlines()) == 5


def test_several_models_give_a_list(command, model_folder, tmp_path):
    folders, figures = [model_folder("a"), model_folder("b")], tmp_path / "figures.json"
    status, table, err = command(
        "accuracy", "--model", *folders, "--tasks", "smoke_choice", "--limit", 2, "--json", figures
    )  # fmt: skip
    assert status == 0, err
    one, other = json.loads(figures.read_text())
    assert (one["model"], other["model"]) == tuple(map(str, folders))
    assert one["tasks"] == other["tasks"]  # the same examples are drawn for both
    assert len(table.splitlines()) == 5


def test_limit_and_shots(ask, yaml):
    (row, _) = ask("smoke_choice", "--limit", 3, "--shots", 1)
    assert (row["questions"], row["shots"], list(row["outcomes"])) == (3, 1, ["0", "1", "2"])
    (row, _) = ask(yaml("num_fewshot: 0"), "--limit", 3, "--shots", 1)
    assert row["shots"] == 0  # a task that says so keeps to it
    (row, _) = ask(yaml("num_fewshot: 3", "other"), "--limit", 3)
    assert row["shots"] == 3


@pytest.mark.parametrize("names", [["smoke", "smoke_choice"], ["smoke_choice", "smoke"]])
def test_shots_of_a_preset_hold_for_a_task_that_is_named_as_well(names):
    assert accuracy.with_shots(names, None) == accuracy.PRESETS["smoke"]
    assert set(accuracy.with_shots(names, 1).values()) == {1}


def test_the_seed_draws_the_examples():
    def context(seed):
        (task,) = accuracy.load({"smoke_choice": 2}, False)["smoke_choice"]["tasks"].values()
        accuracy.prepare(task, 2, seed)
        task.build_all_requests(limit=1)
        return task.instances[0].args[0]

    assert context(0) == context(0)
    assert len({context(seed) for seed in range(4)}) > 1


def test_a_group_has_a_row_and_its_tasks_too(command, model_folder, tmp_path, monkeypatch):
    tasks, figures = tmp_path / "tasks", tmp_path / "figures.json"
    shutil.copytree(accuracy.SMOKE, tasks)
    (tasks / "group.yaml").write_text("group: both\ntask: [smoke_choice, smoke_copy]\naggregate_metric_list: [{metric: acc}]\n")
    monkeypatch.setattr(accuracy, "SMOKE", tasks)
    asked = "both,smoke_choice"
    status, table, err = command("accuracy", "--model", model_folder(), "--tasks", asked, "--limit", 3, "--json", figures)
    assert status == 0, err
    rows = json.loads(figures.read_text())["tasks"]
    assert [row["task"] for row in rows] == ["smoke_choice", "smoke_choice", "smoke_copy", "both", "smoke_choice", "smoke_choice"]
    assert [row["asked"] for row in rows] == ["both"] * 4 + ["smoke_choice"] * 2
    assert (rows[3]["questions"], rows[3]["value"], rows[3]["outcomes"]) == (6, rows[0]["value"], None)
    assert len(table.splitlines()) == 4  # of the group only its own row


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("smoke_choise", "there is no task 'smoke_choise'. Did you mean smoke_choice? There are the presets base and smoke"),
        ("smokes", "Did you mean smoke?"),
        ("no/such.yaml", "there is no file no/such.yaml"),
        ("base", "humaneval executes what the model writes, on this machine and with your rights. Give --run-code where "),
        ("base", "or --tasks mmlu,arc_easy,arc_challenge,hellaswag,winogrande,piqa,openbookqa,gsm8k."),
    ],
)
def test_tasks_that_there_are_not(command, model_folder, tasks, message):
    status, out, err = command("accuracy", "--model", model_folder(), "--tasks", tasks)
    assert (status, out) == (2, "")
    assert message in err


def test_code_is_run_when_asked_for(command, model_folder, ask, yaml):
    task = yaml("unsafe_code: true")
    status, _, err = command("accuracy", "--model", model_folder(), "--tasks", f"smoke_choice,{task}")
    assert status == 2
    assert f"{task} executes what the model writes" in err
    assert "or --tasks smoke_choice." in err
    assert ask(task, "--limit", 2, "--run-code")[0]["questions"] == 2


def test_a_group_with_a_task_that_runs_code_is_refused(command, model_folder, tmp_path, monkeypatch):
    tasks = tmp_path / "tasks"
    shutil.copytree(accuracy.SMOKE, tasks)
    (tasks / "unsafe.yaml").write_text("include: choice.yaml\ntask: smoke_unsafe\nunsafe_code: true\n")
    (tasks / "group.yaml").write_text("group: both\ntask: [smoke_choice, smoke_unsafe]\n")
    monkeypatch.setattr(accuracy, "SMOKE", tasks)
    status, _, err = command("accuracy", "--model", model_folder(), "--tasks", "both", "--limit", 1)
    assert status == 2
    assert "error: both executes what the model writes" in err


def test_a_file_that_is_no_task(command, model_folder, yaml):
    status, _, err = command("accuracy", "--model", model_folder(), "--tasks", yaml("output_type: guess"))
    assert status == 2
    assert "mine.yaml cannot be loaded by lm_eval: ValueError: Got invalid output_type 'guess'" in err


def test_more_examples_than_there_are(command, model_folder):
    status, _, err = command("accuracy", "--model", model_folder(), "--tasks", "smoke_choice", "--shots", 5)
    assert status == 2
    assert "error: smoke_choice: " in err


def test_lm_eval_is_missing(command, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = command("accuracy", "--model", model_folder(), "--tasks", "smoke")
    assert status == 2
    assert "pip install '.[eval]'" in err


def test_an_interrupted_command_goes_on(command, model_folder, tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    run = partial(command, "accuracy", "--model", model_folder(), "--tasks", "smoke_text,smoke_choice", "--limit", 3, "--json")
    assert run(figures)[0] == 0
    whole = figures.read_text()
    measure = accuracy.measure

    def stop(harness, name, *args, **kwargs):
        if name == "smoke_choice":
            raise MemoryError("none left")
        return measure(harness, name, *args, **kwargs)

    figures.unlink()
    monkeypatch.setattr(accuracy, "measure", stop)
    status, _, err = run(figures)
    assert status == 1
    assert "the same command goes on from there" in err
    monkeypatch.setattr(accuracy, "measure", measure)
    partial_file = tmp_path / "figures.json.partial.jsonl"
    lines = partial_file.read_text().splitlines()
    assert len(lines) == 4  # the command, and three questions
    changed = [json.loads(line) for line in lines]
    changed[1]["value"] = [0.0]  # what is there is taken
    partial_file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert run(figures)[0] == 0
    assert not partial_file.exists()
    before, after = (json.loads(text)["tasks"] for text in (whole, figures.read_text()))
    assert before[0]["value"] > after[0]["value"]
    assert before[1:] == after[1:]


def test_the_questions_are_made_from_the_licence():
    for name, rows in make.make((accuracy.SMOKE.parents[2] / "LICENSE").read_text()).items():
        assert rows == [json.loads(line) for line in (accuracy.SMOKE / name).read_text().splitlines()]
        for row in rows:
            if "choices" in row:
                assert len(set(row["choices"])) == 4
