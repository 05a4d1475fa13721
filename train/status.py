"""python -m train status RUN [--json]: where a run stands, from its files alone. Nothing is written."""

import argparse
import json
import math
import shlex
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.output import BYTES, COUNT, scaled, table, write_json
from hybridlm.strict_yaml import load_yaml
from train import checkpoint
from train.run import is_locked

SEVERAL = {
    "sweep": "runs/*/seed-*",
    "compress": "runs/*",
}  # jobs made of runs, by a section of their settings, and where those are
SILENT = 10  # seconds without a sign after which a rank is said to be silent; they give one twice a second
BAR, WIDTH = 24, 66  # characters


def main(argv: list[str]) -> int:
    text = "Where a run stands, from its files alone. Nothing is written."
    parser = argparse.ArgumentParser(prog="python -m train status", description=text, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run (run_dir)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    content = look(arguments.run)
    write_json(content, "-") if arguments.json else print(page(content))
    return 0


def look(run: Path) -> dict[str, Any]:
    """All that the page shows: steps, tokens, bytes, seconds, nats per token.

    `state` is running (someone holds the lock), done, stopped, never started, or broken: `fault` says why no run goes on from it.

    Raises:
        ValueError: no folder, or not one of a run.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}.")
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} is no run directory: it has no config.yaml. Give the run_dir of a run.")
    settings, unread = _settings(run / "config.yaml")
    if job := next((job for job in SEVERAL if job in settings), None):
        raise ValueError(f"{run} holds several runs; give one of {run / SEVERAL[job]}.")
    now, metrics = time.time(), run / "metrics.jsonl"
    plan, fault = ({}, unread) if unread else _plan(settings)
    steps = plan.get("steps")
    lines, unreadable = _read_lines(metrics)
    incidents, _ = _read_lines(run / "incidents.jsonl")
    saved = [one for number, folder in reversed(checkpoint.folders(run)) if (one := _checkpoint(folder, number, now)) is not None]
    newest = next((one for one in saved if not one["faults"]), None)
    if fault is None and saved and newest is None:
        fault = "no checkpoint is whole: restore one, or begin again with another --run_dir"
    running = is_locked(run)
    if running or fault:
        state = "running" if running else "broken"
    elif newest and newest["step"] >= plan["steps"]:
        state = "done"
    else:
        state = "stopped" if lines or newest else "never started"
    step, speed = max([line["step"] for line in lines] + [newest["step"] if newest else 0]), _last(lines, "tokens_per_second")
    left = (plan["steps"] - step) * plan["global_batch"] * plan["seq_len"] / speed if plan and speed else None
    content = {
        "run": str(run),
        "state": state,
        "fault": fault,
        "owner": _read_object(run / "owner.json") if running else None,
        "step": step,
        "steps": steps,
        "loss_unit": "nats/document" if plan.get("classifies") else "nats/token",
        "tokens": _last(lines, "tokens"),
        "loss": _last(lines, "loss"),
        "validations": [
            {k: line[k] for k in ("step", "val_loss", "val_accuracy") if k in line}
            for line in lines
            if _is_number(line.get("val_loss"))
        ],
        "tokens_per_second": speed,
        "seconds_left": left if _is_number(left) else None,
        "last_line_seconds": now - metrics.stat().st_mtime if lines else None,
        "unreadable_lines": unreadable,
        "checkpoint": newest,
        "not_whole": [one for one in saved if one["faults"]],
        "unfinished": sorted(p.name for p in (run / "checkpoints").glob(".step-*.unfinished")),
        "incidents": dict(Counter(str(line.get("kind")) for line in incidents)),
        "last_incident": incidents[-1] if incidents else None,
        "ranks": _ranks(run, now),
        "disk_free_bytes": shutil.disk_usage(run).free,
    }
    return content | {"next": _next(content)}


def _settings(file: Path) -> tuple[dict[str, Any], str | None]:
    """What the file says; or nothing, and why it cannot be read."""
    try:
        return load_yaml(file), None
    except ValueError as error:
        return {}, str(error)


def _plan(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """`steps`, `global_batch`, `seq_len` and whether it is a classifier that is trained (`classifies`); or nothing, and what is
    wrong with the settings."""
    try:
        plan: dict[str, Any] = {"steps": config["train"]["steps"], "global_batch": config["train"]["global_batch"]}
        plan["seq_len"] = config["data"]["seq_len"]
    except (KeyError, TypeError) as error:
        return {}, f"config.yaml is not the settings of a run ({error})"
    if wrong := [f"{name} is {value!r}" for name, value in plan.items() if not (_is_count(value) and value > 0)]:
        return {}, f"config.yaml is not the settings of a run ({', '.join(wrong)})"
    return plan | {"classifies": config["data"].get("label_column") is not None}, None


def _is_number(value: Any) -> bool:
    """One that a run can have written. What is left of a broken file may be an integer that no float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _objects(texts: list[str]) -> Iterator[dict[str, Any] | None]:
    """What each text holds, None where that is no object; null in the place of NaN and infinity."""
    for text in texts:
        try:
            value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else None


def _read_object(file: Path) -> dict[str, Any] | None:
    return next(_objects([file.read_text(errors="replace")])) if file.is_file() else None


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects with a step, and how many lines hold none: one cut off by a kill, or being written now, or worse."""
    texts = file.read_text(errors="replace").splitlines() if file.is_file() else []
    good = [line for line in _objects(texts) if line is not None and _is_count(line.get("step"))]
    return good, len(texts) - len(good)


def _last(lines: list[dict[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if _is_number(line.get(key))), None)


def _checkpoint(folder: Path, step: int, now: float) -> dict[str, Any] | None:
    try:
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        age = now - folder.stat().st_mtime
        faults = checkpoint.validate(folder)
    except FileNotFoundError:
        return None
    return {"step": step, "bytes": size, "age_seconds": age, "faults": faults} if folder.exists() else None


def _ranks(run: Path, now: float) -> list[dict[str, Any]]:
    """By rank: what its file says, and the seconds since its last sign by this machine's clock."""
    found = [_read_object(file) for file in (run / "ranks").glob("rank-*.json")]
    ranks = [one for one in found if one and _is_count(one.get("rank")) and _is_count(one.get("step"))]
    ahead = max((one["step"] for one in ranks), default=0)
    for one in ranks:
        one["silent_seconds"] = now - one["time"] if _is_number(one.get("time")) else None
        one["steps_behind"] = ahead - one["step"]
    return sorted(ranks, key=lambda one: one["rank"])


def _next(c: dict[str, Any]) -> str | None:
    """The command that comes next; None where a person must mend something first."""
    run, launch = shlex.quote(c["run"]), "accelerate launch" if len(c["ranks"]) > 1 else "python"
    go_on = f"{launch} -m train --config {run}/config.yaml"
    report = None if c["loss_unit"] == "nats/document" else f"python -m eval report --run {run}"  # it is on language models
    after = {"running": f"tail -f {run}/metrics.jsonl", "done": report}
    return None if c["state"] == "broken" else after.get(c["state"], go_on)


def page(c: dict[str, Any]) -> str:
    """The same as a person reads it, on 80 columns."""
    parts = {
        "run": [c["run"]],
        "state": [_state(c)],
        "progress": [_progress(c)],
        "loss": [f"{c['loss']:.4f} {c['loss_unit']}"] if c["loss"] is not None else [],
        "validation": [_validation(c["validations"])] if c["validations"] else [],
        "speed": [_speed(c)] if c["tokens_per_second"] else [],
        "checkpoint": [*_saved(c)],
        "incidents": [*_incidents(c)],
        "metrics": [f"{c['unreadable_lines']} line(s) of metrics.jsonl cannot be read"] if c["unreadable_lines"] else [],
        "disk": [_disk(c)],
    }
    rows = []
    for name, texts in parts.items():
        lines = [line for text in texts for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)]
        rows += list(zip([name, *[""] * len(lines)], lines))
    found = [table(rows, "<<"), _rank_table(c) if c["ranks"] else None, f"next  {c['next']}" if c["next"] else None]
    return "\n\n".join(text for text in found if text)


def _state(c: dict[str, Any]) -> str:
    if c["state"] == "running":
        owner = c["owner"] or {}
        who = f", process {owner['pid']} on {owner['host']}" if owner.keys() >= {"pid", "host"} else ""
        since = f"; last line {_duration(c['last_line_seconds'])} ago" if c["last_line_seconds"] is not None else ""
        return f"running{who}{since}"
    if c["state"] == "broken":
        return f"broken: {c['fault']}"
    again = c["step"] - (c["checkpoint"]["step"] if c["checkpoint"] else 0)
    lost = f"; not saved: the last {again:,} steps, which will be run again" if again > 0 else ""
    return c["state"] + (lost if c["state"] == "stopped" else "")


def _progress(c: dict[str, Any]) -> str:
    tokens = f", {scaled(c['tokens'], COUNT)} tokens" if c["tokens"] else ""
    if c["steps"] is None:
        return f"step {c['step']:,}{tokens}"
    done = min(c["step"], c["steps"])
    bar = "#" * (BAR * done // c["steps"])
    return f"[{bar:.<{BAR}}] {100 * done // c['steps']}%, step {c['step']:,} of {c['steps']:,}{tokens}"


def _validation(found: list[dict[str, Any]]) -> str:
    last, best = found[-1], min(found, key=lambda one: one["val_loss"])
    right = f", accuracy {last['val_accuracy']:.4f}," if _is_number(last.get("val_accuracy")) else ""
    text = f"{last['val_loss']:.4f}{right} at step {last['step']:,}"
    if len(found) > 1:
        text += f", {last['val_loss'] - found[-2]['val_loss']:+.4f} since step {found[-2]['step']:,}"
    return text + (f"; best {best['val_loss']:.4f} at {best['step']:,}" if best["step"] != last["step"] else "; the best so far")


def _speed(c: dict[str, Any]) -> str:
    left = f", {_duration(c['seconds_left'])} left at that speed" if (c["seconds_left"] or 0) > 0 and c["state"] != "done" else ""
    return f"{c['tokens_per_second']:,.0f} tokens/s{left}"


def _saved(c: dict[str, Any]) -> Iterator[str]:
    if (one := c["checkpoint"]) is not None:
        yield f"step {one['step']:,}, {_duration(one['age_seconds'])} old, {scaled(one['bytes'], BYTES)}, whole"
    else:
        yield "none" if not c["not_whole"] else "none that is whole"
    for one in c["not_whole"]:
        more = f" and {len(one['faults']) - 2} more faults" if len(one["faults"]) > 2 else ""
        yield f"step {one['step']:,} is not whole: {'; '.join(one['faults'][:2])}{more}"
    if c["unfinished"]:
        yield f"{', '.join(c['unfinished'])}: a save {'under way' if c['state'] == 'running' else 'that was cut off'}"


def _incidents(c: dict[str, Any]) -> Iterator[str]:
    if (last := c["last_incident"]) is None:
        yield "none"
        return
    yield ", ".join(f"{count:,} {kind}" for kind, count in c["incidents"].items())
    place = last.get("first_layer")
    where = ""
    if isinstance(place, dict):
        where = f", first in {place.get('kind')}" + (f" (layer {place['layer']})" if place.get("layer") is not None else "")
    again = ", not repeatable: suspect the hardware" if last.get("repeatable") is False else ""
    yield f"last: {last.get('kind')} at step {last['step']:,}{where}{again}"


def _disk(c: dict[str, Any]) -> str:
    size, free = c["checkpoint"]["bytes"] if c["checkpoint"] else 0, c["disk_free_bytes"]
    return f"{scaled(free, BYTES)} free" + (f": not enough for a checkpoint of {scaled(size, BYTES)}" if free < size else "")


def _rank_table(c: dict[str, Any]) -> str:
    rows = [("rank", "host", "state", "step", "memory", "last sign", "")]
    for one in c["ranks"]:
        silent, behind = one["silent_seconds"], one["steps_behind"]
        is_silent = c["state"] == "running" and one.get("state") == "running" and silent is not None and silent > SILENT
        remarks = ([f"{behind:,} behind"] if behind else []) + (["silent"] if is_silent else [])
        sign = f"{_duration(max(0.0, silent))} ago" if silent is not None else "?"
        rows.append(
            (
                str(one["rank"]),
                str(one.get("host"))[:16],
                str(one.get("state"))[:30],
                f"{one['step']:,}",
                scaled(one["memory_bytes"], BYTES) if _is_count(one.get("memory_bytes")) else "?",
                sign,
                ", ".join(remarks),
            )
        )
    return table(rows, "><<>>><")


def _duration(seconds: float) -> str:
    """Two units at most: 45 s, 3 min, 2 h 05 min, 3 d 04 h."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours == 0:
        return f"{minutes} min" if minutes else f"{int(seconds)} s"
    return f"{hours} h {minutes % 60:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"
