"""Makes the questions of the smoke tasks from LICENSE, and gives them to lm_eval: `python eval/tasks/smoke/make.py`."""

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTEXT, ANSWER, QUESTIONS, SHOTS = 120, 32, 32, 4
WORDS_SHOWN = 4


def splits(files: dict[str, str], **metadata: Any) -> dict[str, Any]:
    """What lm_eval calls for a task's documents: {split: dataset}, from {split: file beside this one}."""
    from datasets import Dataset

    return {split: Dataset.from_list([json.loads(line) for line in (HERE / name).open()]) for split, name in files.items()}


def choices(text: str, rng: random.Random) -> list[dict[str, Any]]:
    """Which of four stretches of the text goes on from the one before."""
    starts = range(0, len(text) - CONTEXT - ANSWER, (len(text) - CONTEXT - ANSWER) // (QUESTIONS + SHOTS))
    rows = []
    for start in list(starts)[: QUESTIONS + SHOTS]:
        true = start + CONTEXT
        others = [true + len(text) * part // 4 for part in (1, 2, 3)]
        answers = [text[at % (len(text) - ANSWER) :][:ANSWER] for at in (true, *others)]
        order = rng.sample(range(4), 4)
        rows.append({"text": text[start:true], "choices": [answers[i] for i in order], "answer": order.index(0)})
    return rows


def copies(text: str, rng: random.Random) -> list[dict[str, str]]:
    """Words said twice, the last one once."""
    words = sorted({word for word in text.split() if word.isalpha() and len(word) > 4})
    drawn = [rng.sample(words, WORDS_SHOWN + 1) for _ in range(QUESTIONS // 2)]
    return [{"text": "".join(f"{word}: {word}\n" for word in shown) + f"{last}:", "answer": last} for *shown, last in drawn]


def make(license_text: str) -> dict[str, list[dict[str, Any]]]:
    """{file: its rows}, always the same of the same text."""
    text, rng = " ".join(license_text.split()), random.Random(0)
    asked = choices(text, rng)
    paragraphs = [" ".join(part.split()) for part in license_text.split("\n\n")]
    long = [{"text": part} for part in paragraphs if len(part) > 200][: QUESTIONS // 2]
    return {"choice.jsonl": asked[SHOTS:], "shots.jsonl": asked[:SHOTS], "text.jsonl": long, "copy.jsonl": copies(text, rng)}


if __name__ == "__main__":
    for name, rows in make((HERE.parents[2] / "LICENSE").read_text()).items():
        (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
