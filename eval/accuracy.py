"""How well a model answers the questions of lm-evaluation-harness' tasks."""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from yaml import YAMLError

from eval.models import open_model
from hybridlm.checkpoint import check_folder
from hybridlm.journal import Journal, identity
from hybridlm.output import quiet

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from eval.harness import Harness

# Shots as the Open LLM Leaderboard's first version took them, and where it had not the task, as lm_eval's own task has them.
PRESETS: dict[str, dict[str, int | None]] = {
    "base": {
        "mmlu": 5,
        "arc_easy": 0,
        "arc_challenge": 25,
        "hellaswag": 10,
        "winogrande": 5,
        "piqa": 0,
        "openbookqa": 0,
        "gsm8k": 5,
        "humaneval": 0,
    },
    "smoke": {"smoke_choice": 2, "smoke_text": 0, "smoke_copy": 0},
}
SMOKE = Path(__file__).parent / "tasks" / "smoke"
RESAMPLES = 1000  # for the standard error of a metric that is no mean
COLUMNS = {
    "model": "model", "task": "task", "metric": "metric", "value": "value", "stderr": "± stderr", "questions": "questions",
    "shots": "shots",
}  # fmt: skip


def evaluate(
    folders: list[str],
    names: list[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    run_code: bool = False,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """An object for each model, all asked the same: model, `tasks` (rows; `measure` tells what they hold) and the settings.

    Args:
        names: presets, tasks and groups of lm_eval, YAML files of tasks.
        limit: the first questions of each task. shots: solved examples before a question; None for the preset's or the task's.
        batch_size: questions in one pass (fewer where memory does not suffice); nothing depends on it beyond rounding.
        seed: of the examples drawn, and of what a task samples.
        run_code: whether tasks may execute what the model writes.
        json_path: beside which answers are kept until all are there, so that the same command goes on where it was stopped.

    Raises:
        ValueError: a folder without a model or tokenizer, no such task, a task that executes code, or lm_eval is missing.
        FloatingPointError: a model that gives no finite number. MemoryError: memory does not suffice for one question.
        OSError: the data of a task cannot be fetched.
    """
    check_lm_eval()
    quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for folder in folders:
        check_folder(folder)
    wanted = with_shots(names, shots)
    loaded = load(wanted, run_code)
    settings = {"limit": limit, "seed": seed, "lm_eval": version("lm_eval")}
    facts = {"tasks": wanted, "models": [identity(folder) for folder in folders]}
    journal = Journal(json_path, {"command": "accuracy"} | settings | facts)
    objects = []
    for folder in folders:
        harness = open_harness(folder, batch_size, journal)
        rows = [
            row
            for name, tasks in loaded.items()
            for row in measure(harness, name, tasks, wanted[name], limit=limit, seed=seed, run_code=run_code)
        ]
        dtype = str(harness.model.dtype).removeprefix("torch.")
        del harness  # before the next one is opened
        objects.append({"model": folder, "tasks": rows, **settings, "dtype": dtype})
    return objects


def check_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"accuracy needs lm-evaluation-harness ({error}): pip install '.[eval]'") from None


def open_harness(folder: str, batch_size: int, journal: Journal) -> "Harness":
    from eval.harness import Harness

    model, tokenizer = open_model(folder)
    return Harness(model, tokenizer, folder, batch_size, journal)


def with_shots(names: Iterable[str], shots: int | None) -> dict[str, int | None]:
    """{task: shots}, presets taken apart, each task once, with a preset's shots; None for as many as the task says."""
    wanted: dict[str, int | None] = {}
    for name in names:
        wanted |= PRESETS.get(name, {name: wanted.get(name)})
    return wanted if shots is None else dict.fromkeys(wanted, shots)


def load(wanted: dict[str, int | None], run_code: bool) -> dict[str, dict]:
    """What lm_eval loads for each name, data included.

    Raises:
        ValueError: no such task, or one that executes code without `run_code`. OSError: its data cannot be fetched.
    """
    manager = find_tasks(wanted)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    else:
        refuse_code([name for name in wanted if runs_code(manager, name)], wanted)
    loaded = {}
    for name in wanted:
        try:
            with stdout_as_stderr():
                loaded[name] = manager.load([name])
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError, YAMLError) as error:
            raise ValueError(f"{name} cannot be loaded by lm_eval: {type(error).__name__}: {error}") from error
        if not run_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded[name]["tasks"].values()):
            refuse_code([name], wanted)
    return loaded


def is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def find_tasks(names: Iterable[str]) -> "TaskManager":
    """Knows the names, by reading as few of lm_eval's folders of tasks as possible: reading all takes a quarter of a minute.

    Raises:
        ValueError: no such task or file.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    registered = [name for name in names if not is_file(name)]
    for name in names:
        if is_file(name) and not Path(name).is_file():
            raise ValueError(f"there is no file {name}; --tasks takes names of tasks, presets, and YAML files.")
    folders = [path for path in Path(lm_eval.tasks.__path__[0]).iterdir() if path.is_dir()]
    near = [str(folder) for folder in folders if any(name.startswith(folder.name) for name in registered)]
    manager = TaskManager(include_path=[str(SMOKE), *near], include_defaults=False)
    if set(registered) <= set(manager.all_tasks):
        return manager
    print("looking through all tasks of lm_eval …", file=sys.stderr)
    manager = TaskManager(include_path=str(SMOKE))
    for name in registered:
        if name not in manager.task_index:
            nearest = get_close_matches(name, [*PRESETS, *manager.all_tasks], n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(
                f"there is no task {name!r}.{hint} There are the presets {' and '.join(PRESETS)}, the {len(manager.all_tasks):,} "
                "names that `lm-eval ls tasks` lists, and YAML files."
            )
    return manager


def runs_code(manager: "TaskManager", name: str) -> bool:
    """Told before the task is loaded: that may be what executes code first."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(name, resolve_func=False) if is_file(name) else manager.task_index[name].cfg
    return bool((config or {}).get("unsafe_code"))


def refuse_code(refused: list[str], wanted: Iterable[str]) -> None:
    """
    Raises:
        ValueError: there is something to refuse.
    """
    if refused:
        others = ",".join(name for name in wanted if name not in refused)
        raise ValueError(
            f"{', '.join(refused)} executes what the model writes, on this machine and with your rights. Give --run-code where "
            f"that can do no harm{f', or --tasks {others}' if others else ''}."
        )


@contextlib.contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """lm_eval and datasets print to stdout, which is for the figures."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def measure(
    harness: "Harness", name: str, loaded: dict, shots: int | None, *, limit: int | None, seed: int, run_code: bool
) -> list[dict[str, Any]]:
    """A row for each metric of a task, of each task of a group, and of the group.

    Returns:
        task; asked (the name that was asked for); metric; filter (what was done with the text before, "none" for nothing); value;
        stderr (None where there is none); higher_is_better; questions; shots; version (of the task); outcomes: {number of the
        question: what it adds to the metric}, mostly 0 or 1, what a comparison of two models pairs; None for a group.
    """
    import lm_eval.evaluator

    for task in loaded["tasks"].values():
        prepare(task, shots, seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a bootstrap here needs no processes
    try:
        with stdout_as_stderr():
            found: Any = lm_eval.evaluator.evaluate(
                harness, loaded, limit=limit, bootstrap_iters=RESAMPLES, confirm_run_unsafe_code=run_code
            )
    except (AssertionError, ValueError) as error:  # how lm_eval says that shots are too many, for instance
        raise ValueError(f"{name}: {error}") from error
    return [row | {"asked": name} for task in found["results"] for row in task_rows(found, task)]


def prepare(task: Any, shots: int | None, seed: int) -> None:
    """As lm_eval's own command: a task that says it has no examples keeps to that."""
    said = task.get_config("num_fewshot")
    if said is None or (shots is not None and said != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=seed)


def task_rows(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    result = found["results"][task]
    rows = []
    for key in result:
        metric, _, way = key.partition(",")
        if not way or metric.endswith("_stderr"):
            continue
        samples = found["samples"].get(task)
        rows.append(
            {
                "task": task,
                "metric": metric,
                "filter": way,
                "value": plain(result[key]),
                "stderr": plain(result.get(f"{metric}_stderr,{way}")),
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                "questions": result["sample_len"],
                "shots": found["n-shot"].get(task),
                "version": found["versions"].get(task),
                "outcomes": samples and {s["doc_id"]: plain(s[metric]) for s in samples if s["filter"] == way and metric in s},
            }
        )
    return rows


def plain(value: Any) -> Any:
    """As JSON has it; what is no number is None."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(part) for part in value]
    if isinstance(value, (int, float, np.number)):
        number = value.item() if isinstance(value, np.number) else value
        return number if np.isfinite(number) else None
    return None if value is None or value == "N/A" else str(value)


def table_rows(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for: of a group its own rows, where it has some."""
    rows = []
    for one in objects:
        grouped = {row["asked"] for row in one["tasks"] if row["task"] == row["asked"]}
        for row in one["tasks"]:
            if row["task"] == row["asked"] or row["asked"] not in grouped:
                way = "" if row["filter"] == "none" else f" ({row['filter']})"
                rows.append(row | {"model": one["model"], "metric": row["metric"] + way})
    return rows
