"""What came out of a sweep: a row of figures for each row of runs, from what these have written, and the table of it."""

import json
import math
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from train.settings import RunConfig
from train.sweep_config import Row, as_text, short_names
from train.trainings import is_done

Result = dict[str, Any]
NEVER = math.inf  # seconds to a loss that was not reached; in JSON "never"


def diverged_file(run: RunConfig) -> Path:
    """Beside the folder of a run that diverged; it holds what the run said. Without it the run would be tried again."""
    return Path(f"{run.run_dir}.diverged")


def results(rows: list[Row], target: float | None) -> list[Result]:
    """JSON. Losses are in the unit of `val_loss`; `seconds` are of training, without validation and saving."""
    found = [result(row, target) for row in rows]
    if best := best_of(found):
        for entry in found:
            shared = [
                entry["runs"][seed]["val_loss"] - run["val_loss"]
                for seed, run in best["runs"].items()
                if entry["runs"][seed]["val_loss"] is not None
            ]
            entry["difference"], entry["difference_stderr"] = spread(shared)
    return found


def result(row: Row, target: float | None) -> Result:
    runs = {str(run.seed): outcome(run, target) for run in row.runs}
    done = [run for run in runs.values() if run["state"] == "done"]
    loss, error = spread([run["val_loss"] for run in done])
    bits = [run["val_bits_per_byte"] for run in done if run["val_bits_per_byte"] is not None]
    reached = [NEVER if run["seconds_to_target"] == "never" else run["seconds_to_target"] for run in done]
    until = median(reached) if target is not None and reached else None
    return {
        "name": row.name, "settings": row.settings, "parameters": row.parameters,
        "tokens": done[0]["tokens"] if done else None,
        "val_loss": loss, "stderr": error, "val_bits_per_byte": mean(bits) if bits else None,
        "seconds": median(run["seconds"] for run in done) if done else None,
        "seconds_to_target": "never" if until == NEVER else until, "difference": None, "difference_stderr": None, "runs": runs,
    }  # fmt: skip


def outcome(run: RunConfig, target: float | None) -> Result:
    """Of one training: `state` is done, diverged or unfinished; only one that is done has figures."""
    lines = read(Path(run.run_dir) / "metrics.jsonl")
    validations = [line for line in lines if "val_loss" in line]
    curve = [line for line in validations if math.isfinite(line["val_loss"])]
    state = "done" if is_done(run) else "unfinished"
    if diverged_file(run).exists() or (state == "done" and curve[-1:] != validations[-1:]):
        state = "diverged"
    last = curve[-1] if state == "done" else {}
    reached = None if target is None else tokens_to(curve, target)
    return {
        "state": state, "tokens": last.get("tokens"), "val_loss": last.get("val_loss"),
        "val_bits_per_byte": last.get("val_bits_per_byte"),
        "seconds": seconds(lines, math.inf) if state == "done" else None,
        "seconds_to_target": None if target is None else "never" if reached is None else seconds(lines, reached),
        "validations": [[line["step"], line["val_loss"]] for line in curve],
        "validated_on": validated_on(run) if state == "done" else None,
    }  # fmt: skip


def validated_on(run: RunConfig) -> Result:
    """What the last loss is of; `sha256` of the tokens of each validation set."""
    state = json.loads((Path(run.run_dir) / "model").resolve().with_name("state.json").read_text(encoding="utf-8"))
    return {"sha256": state["validation"], "seq_len": run.data.seq_len, "val_sequences": run.train.val_sequences}


def tokens_to(curve: list[dict[str, Any]], target: float) -> float | None:
    """Until the loss is at the target, on the line from the validation before to the first that is; None: none is."""
    below = next((i for i, line in enumerate(curve) if line["val_loss"] <= target), None)
    if not below:
        return None if below is None else curve[0]["tokens"]
    before, after = curve[below - 1], curve[below]
    share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
    return before["tokens"] + share * (after["tokens"] - before["tokens"])


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics; one that is not written to its end yet does not count."""
    texts = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def seconds(lines: list[dict[str, Any]], tokens: float) -> float:
    """Of training, until so many tokens: what the logged speeds add up to."""
    total, before = 0.0, 0
    for line in lines:
        if "tokens_per_second" in line:
            total += max(0, min(line["tokens"], tokens) - before) / line["tokens_per_second"]
            before = line["tokens"]
    return total


def spread(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error, which takes two values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return (mean(values) if values else None), error


def best_of(found: list[Result]) -> Result | None:
    """That of the least mean, among those of which every run came to its end; none where runs were validated on other tokens
    or windows than each other."""
    done = [run for entry in found for run in entry["runs"].values() if run["state"] == "done"]
    if any(run["validated_on"] != done[0]["validated_on"] for run in done):
        return None
    whole = [entry for entry in found if all(run["state"] == "done" for run in entry["runs"].values())]
    return min(whole, key=lambda entry: entry["val_loss"], default=None)


def table(found: list[Result], unit: str, target: float | None) -> str:
    """Markdown, the best mean in bold.

    Args:
        unit: of the losses.
    """
    names = short_names(list(found[0]["settings"]))
    best = best_of(found)
    optional = {
        "bits/byte": any(entry["val_bits_per_byte"] is not None for entry in found),
        "− best": best is not None and len(found) > 1,
        f"seconds to {target}": target is not None,
    }
    head = [*names.values(), "parameters", unit, "− best", "bits/byte", "seconds", f"seconds to {target}"]
    lines = [head]
    for entry in found:
        loss = figure(entry["val_loss"], entry["stderr"])
        cells = [shown(entry["settings"][name]) for name in names]
        cells.append("-" if entry["parameters"] is None else f"{entry['parameters']:,}")
        cells.append(f"**{loss}**" if entry is best else told(loss, [run["state"] for run in entry["runs"].values()]))
        cells.append("" if entry is best else figure(entry["difference"], entry["difference_stderr"], "+"))
        cells.append("-" if entry["val_bits_per_byte"] is None else f"{entry['val_bits_per_byte']:.4f}")
        cells += [duration(entry["seconds"]), duration(entry["seconds_to_target"])]
        lines.append(cells)
    kept = [i for i, name in enumerate(head) if optional.get(name, True)]
    lines = [[line[i] for i in kept] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def told(loss: str, states: list[str]) -> str:
    """The mean of those that are done, and what became of the others."""
    if states.count("diverged") == len(states):
        return "diverged"
    others = {"diverged": states.count("diverged"), "to come": states.count("unfinished")}
    missing = [f"{count} of {len(states)} {what}" for what, count in others.items() if count]
    return ", ".join([loss, *missing] if loss != "-" else missing)


def figure(value: float | None, error: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def duration(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown(value: Any) -> str:
    """A setting; text in which Markdown would see signs of its own stands between backticks."""
    text = as_text(value)
    return f"`{text}`" if set(text) & set("*_|`") else text
