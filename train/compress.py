"""python -m train compress --config F [--section.field V …]: a smaller model out of a trained one, and what it kept.

MiniPuzzle (Nemotron-H, arXiv 2504.03624, section 4): what each part is worth; a grid of shapes, of which those within the budget
are cut out, scored and timed; a short distillation of the best few, and the whole one of the best. RUN/ then has
`importance.safetensors`, `search.json`, `students/` (what was cut out), `runs/` (the trainings), `summary.json`, `report/`, and
`model`, the student.
"""

import json
from pathlib import Path

from hybridlm import HybridLMConfig
from hybridlm.compress.importance import Importance
from hybridlm.compress.search import uniform_depth, uniform_width
from hybridlm.machine import machine
from hybridlm.output import json_text, quiet, table
from hybridlm.strict_yaml import parse_yaml
from train import files
from train.command_line import parse_command_line, settings_parser
from train.compress_config import CompressConfig, training
from train.compress_search import Found, Row, Work, best_candidates, open_work, side_by_side, weigh
from train.config import dump, parse
from train.optim import samples_by
from train.run import changes, last_line, lock, refuse_foreign
from train.settings import Model, RunConfig
from train.trainings import alone, to_the_end, train_all

PHASES = ("importance", "search", "short distillation", "training", "evaluation")
DISTILLED = "pruned + distilled"
COLUMNS = {
    "parameters": ",",
    "bits_per_byte": ".4f",
    "accuracy": ".4f",
    "agreement": ".4f",
    "tokens_per_second": ",.0f",
    "tokens": ",",
}


def main(argv: list[str]) -> int:
    parser = settings_parser(CompressConfig)
    parser.prog = "python -m train compress"
    parser.description = (
        "Make a smaller model out of model.init_from: search what to cut, distil, compare. Cut off, the same command goes on."
    )
    parser.add_argument("--launcher", metavar="COMMAND", help="starts the trainings, such as 'torchrun --nproc_per_node 8'")
    config, arguments = parse_command_line(argv, parser, CompressConfig)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    return to_the_end(lambda: compress(config, arguments.launcher))


def compress(config: CompressConfig, launcher: str | None = None) -> None:
    """All of it; what an earlier call has finished is not done again.

    Raises:
        ValueError: several processes, no parent, one that cannot be pruned, a budget out of reach, a directory of something else.
        ChildProcessError: a training failed.
    """
    quiet()
    alone("compress")
    with lock(Path(config.run_dir)):
        check(config)
        work = open_work(config)
        if not (work.folder / "config.yaml").exists():
            files.replace_text(work.folder / "config.yaml", dump(config))
        with work.phase("importance"):
            importance = weigh(work)
        with work.phase("search"):
            found = best_candidates(work, importance)
        with work.phase("short distillation"):
            winner = distil_shortly(work, found, launcher)
        runs = trainings(work, winner, importance)
        with work.phase("training"):
            train_all(list(runs.values()), "training", launcher)
        with work.phase("evaluation"):
            places = {"parent": work.place, "pruned": winner.folder}
            entries = side_by_side(work, places | {name: Path(run.run_dir) / "model" for name, run in runs.items()})
        write_summary(work, entries, runs)
        files.link(Path("runs") / "distilled" / "model", work.folder / "model")
    from train.compress_report import write_report  # with matplotlib, for which no other job is to wait

    write_report(work.folder)
    rows = [
        ["", *COLUMNS],
        *([name, *(f"{entry[key]:{form}}" for key, form in COLUMNS.items())] for name, entry in entries.items()),
    ]
    print(table(rows))
    print(f"done: {work.folder / 'model'}\nreport: {work.folder / 'report' / 'index.html'}")


def check(config: CompressConfig) -> None:
    """
    Raises:
        ValueError: the directory is of another compression, or of something else; settings that no training will take.
    """
    parent = Model(init_from=config.model.init_from)
    for steps in (config.train.steps, config.compress.short_steps):  # found out now, and not after the search
        parse(parse_yaml(dump(training(config, "run", parent, config.model.init_from, steps))))
    refuse_foreign(config)
    folder = Path(config.run_dir)
    if (folder / "config.yaml").exists() and (changed := changes(config)):
        raise ValueError(
            f"run_dir {folder} holds a compression with other settings:\n"
            + "".join(f"  {line}\n" for line in changed)
            + "Choose another with --run_dir."
        )


def distil_shortly(work: Work, found: list[Found], launcher: str | None) -> Found:
    """The candidate with the least validation loss after `compress.short_steps`; the losses go to search.json."""
    if len(found) == 1:
        return found[0]
    steps, file = work.config.compress.short_steps, work.folder / "search.json"
    runs = [distillation(work, f"short-{one.row['name']}", one.folder, steps) for one in found]
    train_all(runs, "short distillation", launcher)
    content = json.loads(file.read_text(encoding="utf-8"))
    for one, run in zip(found, runs):
        line = last_line(Path(run.run_dir) / "metrics.jsonl", "val_loss")
        assert line is not None
        one.row["distilled_loss"] = line["val_loss"]
    rows = {one.row["name"]: one.row for one in found}
    content["candidates"] = [rows.get(row["name"], row) for row in content["candidates"]]
    files.replace_text(file, json_text(content))
    return min(found, key=lambda one: one.row["distilled_loss"])


def distillation(work: Work, name: str, begin: Path, steps: int | None = None) -> RunConfig:
    teacher = work.config.distill.teacher or str(work.place)
    return training(work.config, str(work.folder / "runs" / name), Model(init_from=str(begin)), teacher, steps)


def trainings(work: Work, winner: Found, importance: Importance) -> dict[str, RunConfig]:
    """What is trained for equally many tokens, by the names of the report."""
    compare, begin, size = work.config.compress.compare, winner.folder, winner.row["parameters"]

    def plain(name: str, model: Model) -> RunConfig:
        return training(work.config, str(work.folder / "runs" / name), model)

    runs = {DISTILLED: distillation(work, "distilled", begin)}
    if "parent" in compare:
        runs = {"parent trained on": plain("parent", Model(init_from=str(work.place)))} | runs
    if "cross-entropy" in compare:
        runs["pruned + cross-entropy"] = plain("cross-entropy", Model(init_from=str(begin)))
    if "scratch" in compare:
        shape = HybridLMConfig.from_pretrained(begin)
        values = {name: getattr(shape, name) for name in HybridLMConfig.__annotations__}
        changed = {name: value for name, value in values.items() if value != getattr(HybridLMConfig, name)}
        runs["from scratch"] = plain("scratch", Model(config=changed))
    if "uniform" in compare:
        for name, cut in {"uniform depth": uniform_depth, "uniform width": uniform_width}.items():
            slug = name.replace(" ", "-")
            runs[f"{name} + distilled"] = distillation(work, slug, work.cut(slug, cut(work.shape, importance, size)))
    return runs


def write_summary(work: Work, entries: dict[str, Row], runs: dict[str, RunConfig]) -> None:
    """summary.json: the parent, the student, and all models of the report."""
    c = work.config.compress
    tokens = samples_by(work.config, work.config.train.steps) * work.config.data.seq_len
    for name, entry in entries.items():
        entry["tokens"] = tokens if name in runs else 0
    state = work.place.resolve().parent / "state.json"  # where the parent is the model of a run
    names = [name for name in entries if name.startswith("parent")] + [name for name in entries if not name.startswith("parent")]
    summary = {
        "parent": entries["parent"], "student": entries[DISTILLED], "models": {name: entries[name] for name in names},
        "parent_tokens": json.loads(state.read_text())["tokens"] if state.exists() else None, "distillation_tokens": tokens,
        "prompt": c.prompt, "new": c.new, "batch": 1, "context": c.context,
        "seconds": {phase: work.journal.results.get(f"seconds {phase}") for phase in PHASES},
        "machine": machine(),
    }  # fmt: skip
    files.replace_text(work.folder / "summary.json", json_text(summary))
