"""python -m train sweep --config F [--grid KEY=V1,V2 …] [--section.field V …]: a table of runs, trained one after another.

RUN/ then has `results.json`, `table.md`, `plot.png`, and `runs/ROW/seed-K`, each a run like any other.
"""

from pathlib import Path

from hybridlm.output import json_text, quiet
from hybridlm.strict_yaml import load_yaml
from train import files
from train.command_line import parse_command_line, settings_parser
from train.config import dump, fault_list
from train.run import changes, lock, refuse_foreign
from train.settings import RunConfig
from train.sweep_config import Row, SweepConfig, table_of_runs, with_grid
from train.sweep_report import Result, diverged_file, results, table
from train.trainings import alone, last_error, to_the_end, train_all
from train.validation import figures

# What a training says that ended by FloatingPointError (train/loop.py, train/incidents.py).
DIVERGED = ("are not both finite", "that is no spike but a new level")


def main(argv: list[str]) -> int:
    parser = settings_parser(SweepConfig)
    parser.prog = "python -m train sweep"
    parser.description = (
        "Train a table of runs, each with several seeds, and compare their last validations. The runs are those of the file and\n"
        "the flags, but for what sweep.grid, sweep.variants or --grid say. Cut off, the same command goes on; with more rows or\n"
        "seeds it trains those that are missing."
    )
    parser.add_argument(
        "--grid", metavar="KEY=V,V…", nargs="+", action="extend", default=[],
        help="values of a setting, such as optim.lr=1e-3,3e-3 or model.config.hidden_size=64,96, added to sweep.grid or in the\n"
        "place of what it says of KEY; a value with commas in brackets. seed=0,1,2 are sweep.seeds",
    )  # fmt: skip
    parser.add_argument("--launcher", metavar="COMMAND", help="starts the trainings, such as 'torchrun --nproc_per_node 8'")
    config, arguments = parse_command_line(argv, parser, SweepConfig)
    config = with_grid(config, arguments.grid)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    return to_the_end(lambda: sweep(config, arguments.launcher))


def sweep(config: SweepConfig, launcher: str | None = None) -> None:
    """All of it; what is trained already is not trained again.

    Raises:
        ValueError: several processes, faults of rows, a directory of something else or of other runs.
        ChildProcessError: a training failed, and did not just diverge.
    """
    quiet()
    alone("sweep")
    rows, folder = table_of_runs(config), Path(config.run_dir)
    with lock(folder):
        check(config, rows)
        files.replace_text(folder / "config.yaml", dump(config))
        runs = [run for row in rows for run in row.runs]
        for run in runs:
            if not Path(run.run_dir).exists():
                diverged_file(run).unlink(missing_ok=True)  # of one that somebody has deleted
        (folder / "plot.png").unlink(missing_ok=True)  # it may be of other rows
        write(config, rows)

        def ended(run: RunConfig, status: int) -> bool:
            if status == 1 and any(words in (said := last_error(run)) for words in DIVERGED):
                files.replace_text(diverged_file(run), said.removeprefix(": ") + "\n")
                status = 0
            write(config, rows)
            return status == 0

        train_all([run for run in runs if not diverged_file(run).exists()], "sweep", launcher, ended)
        found = write(config, rows)
        from train.sweep_charts import draw  # with matplotlib, for which no other job is to wait

        draw(found, unit(config), folder / "plot.png")
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"done: {folder / 'table.md'}\nplot: {folder / 'plot.png'}")


def unit(config: SweepConfig) -> str:
    return figures(config)["val_loss"]


def write(config: SweepConfig, rows: list[Row]) -> list[Result]:
    """results.json and table.md, of what is there so far."""
    folder, target = Path(config.run_dir), config.sweep.target
    found = results(rows, target)
    files.replace_text(folder / "results.json", json_text({"unit": unit(config), "target": target, "rows": found}))
    files.replace_text(folder / "table.md", table(found, unit(config), target))
    return found


def check(config: SweepConfig, rows: list[Row]) -> None:
    """
    Raises:
        ValueError: the directory is of something else, of a sweep of other runs, or a row of that name was another.
    """
    refuse_foreign(config)
    folder = Path(config.run_dir)
    if not (folder / "config.yaml").exists():
        return
    if "sweep" not in load_yaml(folder / "config.yaml"):
        raise ValueError(f"run_dir {folder} holds a run, and no sweep; choose another with --run_dir.")
    # Rows and seeds may come and go.
    if changed := [line for line in changes(config) if not line.startswith(("sweep.", "seed:"))]:
        raise ValueError(
            f"run_dir {folder} holds a sweep with other settings:\n"
            + "".join(f"  {line}\n" for line in changed)
            + "Choose another with --run_dir."
        )
    runs = [run for row in rows for run in row.runs if (Path(run.run_dir) / "config.yaml").exists()]
    others = {run.run_dir: changed for run in runs if (changed := changes(run))}
    if faults := [f"{name} was trained with other settings: {'; '.join(changed)}." for name, changed in others.items()]:
        raise ValueError(fault_list([*faults, "Give a variant that has changed another name, or choose another --run_dir."]))
