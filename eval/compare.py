"""Which of two models is better on what: every figure with its interval, a paired test, and all tests corrected together."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from eval import paired, perplexity, throughput
from eval.generation import FIT
from eval.results import KEYS, Results, identity, with_origin

Pair = tuple[dict[str, Any], dict[str, Any]]
COLUMNS = {
    "what": "what", "a": "A", "b": "B", "effect": "A−B, or A/B", "interval": "95% interval", "pairs": "pairs", "p": "p",
    "p_holm": "p, Holm", "verdict": "verdict",
}  # fmt: skip
REPEATS = 9  # turns: all won by one model give p = 2 / 2^9, which survives the correction among a dozen tests


def measure(
    a: str, b: str, source: str, window: int, max_bytes: int | None, prompts: list[int], new: int, json_path: str | None
) -> Results:
    """Perplexity of both on the same text, and their speed in turns."""
    check_two(a, b)
    beside = None if json_path in (None, "-") else json_path
    rows = perplexity.evaluate([a, b], source, window, max_bytes=max_bytes, json_path=beside)
    timed = throughput.evaluate([a, b], prompts, [new], [1], repeats=REPEATS, twin=False)
    of = {"perplexity": rows, "throughput": timed, "accuracy": [], "longcontext": []}
    return {kind: with_origin(rows, "measured here") for kind, rows in of.items()}


def compare(a: str, b: str, results: Results, seed: int = 0) -> dict[str, Any]:
    """A row for all that both models have results of, and the `verdict` on it.

    Returns:
        `a`, `b`, `level` and `rows`: what, kind, a, b, effect (effect_of: difference or ratio), low and high (95%, of this row
        alone), pairs, test, p, p_holm (corrected over all rows with a test; None where there is none) and verdict; `unmatched`:
        results that one model alone has.

    Raises:
        ValueError: the files have nothing of one of them, or nothing of both.
    """
    check_two(a, b)
    rows: list[dict[str, Any]] = []
    unmatched: list[str] = []
    for kind, make in ROWS.items():
        pairs, alone = matched(a, b, kind, results[kind])
        rows += [{"kind": kind} | row for row in make(pairs, seed)]
        unmatched += alone
    if not rows:
        known = sorted({row["model"] for of in results.values() for row in of})
        raise ValueError(
            f"there is no result that both {a} and {b} have. The files have results of {', '.join(known) or 'no model'}"
            + (f"; of one alone: {'; '.join(unmatched)}." if unmatched else ". Give the names that they use.")
        )
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, paired.holm([row["p"] for row in tested])):
        row["p_holm"] = p
    for row in rows:
        row["verdict"] = verdict(row, row.pop("less_is_better"))
    return {"a": a, "b": b, "level": paired.LEVEL, "rows": rows, "unmatched": unmatched}


def check_two(a: str, b: str) -> None:
    """
    Raises:
        ValueError: they are one.
    """
    if identity(a) == identity(b):
        raise ValueError(f"{a} and {b} are the same model. Give two.")


def matched(a: str, b: str, kind: str, rows: list[dict[str, Any]]) -> tuple[list[Pair], list[str]]:
    """The results of the two that have the same key, and what one alone has, in words."""
    fields = KEYS[kind]
    of_a, of_b = (
        {tuple(row.get(field) for field in fields): row for row in rows if identity(row["model"]) == identity(name)}
        for name in (a, b)
    )
    both = [(of_a[key], of_b[key]) for key in of_a if key in of_b]
    alone = [
        f"{kind} of {name}: " + ", ".join(f"{field} {value}" for field, value in zip(fields, key) if value not in (None, False))
        for name, mine, other in ((a, of_a, of_b), (b, of_b, of_a))
        for key in mine
        if key not in other
    ]
    return both, alone


def outcome(what: str, a: float, b: float, *, ratio: bool = False, less_is_better: bool, **facts: Any) -> dict[str, Any]:
    """A row, without interval and test where `facts` has none."""
    effect = (a / b if b else math.inf) if ratio else a - b
    none = {"low": None, "high": None, "pairs": None, "test": None, "p": None, "p_holm": None}
    kind = {"effect": effect if math.isfinite(effect) else None, "effect_of": "ratio" if ratio else "difference"}
    return {"what": what, "a": a, "b": b, **kind, **none, "less_is_better": less_is_better, **facts}


def perplexity_rows(pairs: list[Pair], seed: int) -> Iterator[dict[str, Any]]:
    """Bits per byte, paired by document."""
    for a, b in pairs:
        what = f"bits per byte, {a.get('data', 'text')}, window {a.get('window') or 'document'}"
        yield outcome(what, a["bits_per_byte"], b["bits_per_byte"], less_is_better=True, **documents_test(a, b, seed))


def documents_test(a: dict[str, Any], b: dict[str, Any], seed: int) -> dict[str, Any]:
    if not ("by_document" in a and "by_document" in b):
        return {"test": "none: no figures by document"}
    columns = np.array(
        [x for row in (a, b) for x in (np.array(row["by_document"]["nats"]) / math.log(2), row["by_document"]["bytes"])]
    ).T
    columns = columns[(columns[:, [1, 3]] > 0).all(1)]
    if len(columns) < 2:
        return {"pairs": len(columns), "test": "none: a single document"}
    total = columns.sum(0)
    low, high = paired.bootstrap_interval(columns, paired.ratio_of_sums, seed)
    p = paired.sign_flip_p(columns[:, 0] / total[1] - columns[:, 2] / total[3], seed)
    return {"low": low, "high": high, "pairs": len(columns), "test": "signs of the documents' differences", "p": p}


def accuracy_rows(pairs: list[Pair], seed: int) -> Iterator[dict[str, Any]]:
    """Each task, paired by question; of a group of tasks the group alone, by the questions of all its tasks."""
    for a, b in asked_for(pairs):
        what = ", ".join(
            [a["task"]]
            + ([f"{a['shots']} shots"] if a.get("shots") else [])
            + [a[name] for name in ("metric", "filter") if a.get(name) not in (None, "none")]
        )
        if a["value"] is None or b["value"] is None:
            continue
        facts = questions_test(by_question(a), by_question(b), seed)
        if a.get("version") != b.get("version"):
            facts = {"test": "none: not the same version of the task"}
        if facts.get("p") is not None and not all(is_mean(row) for row in (a, b)):
            facts = {"test": "none: the metric is no mean of its outcomes"}
        yield outcome(what, a["value"], b["value"], less_is_better=less_is_better(a), **facts)


def asked_for(pairs: list[Pair]) -> list[Pair]:
    """The pairs without the tasks of a group that is among them, the group with the outcomes of its tasks."""
    groups = {a["task"] for a, _ in pairs if a.get("asked") == a["task"] and a.get("outcomes") is None}
    made = []
    for pair in pairs:
        if pair[0].get("asked") in groups and pair[0]["task"] not in groups:
            continue
        if pair[0]["task"] in groups:
            of = [p for p in pairs if all(p[0].get(f) == pair[0].get(f) for f in ("asked", "metric", "filter"))]
            pair = (pooled(pair[0], [a for a, _ in of]), pooled(pair[1], [b for _, b in of]))
        made.append(pair)
    return made


def pooled(group: dict[str, Any], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    return group | {"outcomes": {f"{row['task']} {i}": x for row in tasks for i, x in by_question(row).items()}}


def is_mean(row: dict[str, Any]) -> bool:
    outcomes = by_question(row).values()
    return math.isclose(sum(outcomes) / len(outcomes), row["value"], rel_tol=1e-6, abs_tol=1e-6)


def less_is_better(row: dict[str, Any]) -> bool:
    """As lm_eval says, where it says it; else by the name of the metric."""
    if row.get("higher_is_better") is not None:
        return not row["higher_is_better"]
    return any(word in (row.get("metric") or "") for word in ("perplexity", "bits_per_byte", "loss"))


def longcontext_rows(pairs: list[Pair], seed: int) -> Iterator[dict[str, Any]]:
    """Each task and length, the questions of all depths together."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair[0]["task"], pair[0]["length"]), []).append(pair)
    for (task, length), cells in sorted(groups.items()):
        a, b = ({f"{row['depth']} {i}": x for row in side for i, x in by_question(row).items()} for side in zip(*cells))
        means = [float(np.mean([row["accuracy"] for row in side])) for side in zip(*cells)]
        if any(x.get("questions_sha256") != y.get("questions_sha256") for x, y in cells):
            facts: dict[str, Any] = {"test": OTHERS}
        elif facts := questions_test(a, b, seed):
            means = [float(np.mean(list(side.values()))) for side in (a, b)] if facts.get("p") is not None else means
        yield outcome(f"{task}, {length:,} tokens", *means, less_is_better=False, **facts)


def by_question(row: dict[str, Any]) -> dict[str, float]:
    """Outcomes by the number of the question; none where they are no numbers."""
    found = row.get("outcomes") or {}
    pairs = dict(found.items() if isinstance(found, dict) else enumerate(found))
    return {str(key): x for key, x in pairs.items()} if all(isinstance(x, (int, float)) for x in pairs.values()) else {}


def questions_test(a: dict[Any, float], b: dict[Any, float], seed: int) -> dict[str, Any]:
    """Right and wrong answers by McNemar's exact test, shares of a question by the signs of their differences."""
    if not (a and b):
        return {"test": "none: no outcomes by question that are numbers"}
    if a.keys() != b.keys():
        return {"test": OTHERS}
    columns = np.array([[a[key], b[key]] for key in a], dtype=np.float64)
    if len(columns) < 2:
        return {"pairs": len(columns), "test": "none: a single question"}
    low, high = paired.bootstrap_interval(columns, paired.difference_of_means, seed)
    facts = {"low": low, "high": high, "pairs": len(columns)}
    if np.isin(columns, (0, 1)).all():
        return facts | {"test": "McNemar, exact", "p": paired.mcnemar_p(*columns.T)}
    return facts | {"test": "signs of the questions' differences", "p": paired.sign_flip_p(columns[:, 0] - columns[:, 1], seed)}


def throughput_rows(pairs: list[Pair], seed: int) -> Iterator[dict[str, Any]]:
    """Seconds of a request and memory, as A / B; seconds paired by turn."""
    for a, b in pairs:
        shape = f"{a['prompt']:,} in, {a['new']:,} out" + (f", batch {a['sequences']}" if a["sequences"] != 1 else "")
        if a["sequences"] == FIT:
            a, b, shape = per_sequence(a), per_sequence(b), f"{shape}, each sequence"
        for field, name in SECONDS.items():
            if a.get(field) and b.get(field):
                facts = turns_test(a, b, field, seed)
                yield outcome(f"{name}, {shape}", a[field], b[field], ratio=True, less_is_better=True, **facts)
        for field, name in BYTES.items():
            if a.get(field) and b.get(field):
                alike = a.get("dtype") == b.get("dtype")
                once = "none: measured once" if alike else "none: not in the same precision"
                facts = {"test": EXACT if alike and field == "cache_bytes" else once}
                yield outcome(f"{name}, {shape}", a[field] / 1e6, b[field] / 1e6, ratio=True, less_is_better=True, **facts)


def per_sequence(row: dict[str, Any]) -> dict[str, Any]:
    """A model that ran as many sequences at a time as it has room for: seconds and cache of each; the memory was given."""
    n, lists = row["batch"], [f"{field}{TURNS}" for field in SECONDS]
    shares = {field: row[field] / n for field in (*SECONDS, "cache_bytes") if row.get(field)}
    each = {field: [seconds / n for seconds in row[field]] for field in lists if row.get(field)}
    return row | shares | each | {"peak_memory_bytes": None}


def turns_test(a: dict[str, Any], b: dict[str, Any], field: str, seed: int) -> dict[str, Any]:
    """Medians of what was timed in turns: only then did whatever else the machine was doing hit both alike."""
    turns = [np.array(row.get(f"{field}{TURNS}", []), dtype=np.float64) for row in (a, b)]
    if len(turns[0]) != len(turns[1]) or len(turns[0]) < 2:
        return {"test": "none: not two turns or more of each"}
    if a["file"] != b["file"]:
        return {"pairs": len(turns[0]), "test": "none: they were not timed in turns, by one command"}
    columns = np.stack(turns, axis=1)
    low, high = paired.bootstrap_interval(columns, paired.ratio_of_medians, seed)
    p = paired.sign_flip_p(np.log(columns[:, 0] / columns[:, 1]), seed)
    return {"low": low, "high": high, "pairs": len(columns), "test": "signs of the turns' log ratios", "p": p}


OTHERS = "none: they were not asked the same questions"
EXACT = "exact: computed from shapes"
SECONDS = {"time_to_first_token_s": "s to the first token", "request_seconds": "s of a request"}
BYTES = {"peak_memory_bytes": "peak memory, MB", "cache_bytes": "cache, MB"}
TURNS = "_each"
ROWS = {
    "perplexity": perplexity_rows, "accuracy": accuracy_rows, "longcontext": longcontext_rows, "throughput": throughput_rows,
}  # fmt: skip


def verdict(row: dict[str, Any], less_is_better: bool) -> str:
    shown = row["test"] == EXACT and row["a"] != row["b"] if row["p"] is None else row["p_holm"] < paired.LEVEL
    if row["p"] is None and row["test"] != EXACT:
        return "not tested"
    if not shown:
        return "no difference shown"
    return "A better" if (row["a"] < row["b"]) == less_is_better else "B better"


def table_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the table shows them."""
    shown = []
    for row in rows:
        style = ".3f" if row["effect_of"] == "ratio" else "+.3g"
        texts = {
            "a": f"{row['a']:.4g}",
            "b": f"{row['b']:.4g}",
            "effect": "-"
            if row["effect"] is None
            else f"{row['effect']:{style}}" + (" ×" if row["effect_of"] == "ratio" else ""),
            "interval": "-" if row["low"] is None else f"{row['low']:{style}} … {row['high']:{style}}",
            "p": "-" if row["p"] is None else f"{row['p']:.2g}",
            "p_holm": "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
        }
        shown.append(row | texts)
    return shown


def notes(content: dict[str, Any]) -> str:
    """What stands below the table: who is who, how to read it, and why a row has no test."""
    tested = sum(row["p"] is not None for row in content["rows"])
    lines = [f"A: {content['a']}", f"B: {content['b']}"]
    if tested:
        lines.append(
            f"Verdicts: p below {content['level']} after Holm's correction over the {tested} row(s) with a p. Each interval is "
            "of its row alone. An × is A / B."
        )
    reasons = Counter(row["test"].removeprefix("none: ") for row in content["rows"] if row["verdict"] == "not tested")
    lines += [f"Not tested, {reason}: {count} row(s)." for reason, count in reasons.items()]
    if content["unmatched"]:
        lines.append(f"Left out, as one model alone has it: {'; '.join(content['unmatched'])}.")
    return "\n".join(lines)
