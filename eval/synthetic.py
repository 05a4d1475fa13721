"""Recall tasks that are made on the spot, as text, so that a model with any tokenizer can be asked.

A task is a function of a random generator, a size and a depth. What the size counts (sentences of filler, pairs, …) is the task's
own; `fit` finds the size that fills a length in tokens.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
WORDS = tuple(Random(0).sample([a + v + b for a in CONSONANTS for v in VOWELS for b in CONSONANTS], 1280))
KEYS, VALUES = WORDS[::2], WORDS[1::2]
FIRST_NAMES = listed(
    "Ada Alan Alice Amir Anna Aria Ben Bella Bruno Carl Chen Clara Cora Dan Dara David Diana Dora Eden Ella Elena Emil Emma Erik "
    "Eva Felix Finn Fiona Frank Freya George Gina Grace Hana Hugo Ida Igor Ines Iris Ivan Jack Jane Jonas Julia Karl Kate Kira "
    "Lara Leo Liam Lily Linda Lucas Luna Maria Mark Maya Mila Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Petra "
    "Pia Quinn Rachel Rosa Ruth Sam Sara Simon Sofia Stella Tara Theo Tina Tom Uma Vera Victor Wanda Will Yara Yusuf Zara Zoe"
)
LAST_NAMES = listed(
    "Abbott Adams Ali Allen Bailey Baker Barnes Bauer Bell Bennett Berg Black Bosch Brooks Brown Burke Butler Campbell Carter "
    "Chang Clark Cohen Cole Cook Cooper Costa Cruz Davies Diaz Dixon Dubois Evans Ferrari Fischer Fisher Foster Fox Garcia "
    "Gibson Gray Green Hall Hansen Harris Hart Hayes Hill Holmes Howard Hughes Hunt Ito Ivanov Jensen Jones Kelly Khan Kim King "
    "Klein Kumar Larsen Lee Lewis Lopez Marsh Martin Mason Meyer Miller Moore Morgan Murphy Nelson Novak Olsen Owens Palmer Park "
    "Patel Perez Petrov Porter Price Reed Rossi Russo Sato Schmidt Silva Singh Smith Stone Tanaka Taylor Turner Wagner Walker "
    "Weber White Young"
)
ADJECTIVES = listed("brave calm clever cold dark eager fair gentle happy kind loud proud quick quiet small warm")
NOUNS = listed(
    "anchor bridge candle desert engine forest garden harbour island jacket kettle lantern mirror needle orchard pencil"
)


@dataclass(frozen=True)
class Question:
    """What a model is given, and what it should write.

    Attributes:
        answer: one text; of variable tracking, names with spaces between them.
        depth: where in the prompt the asked fact stands, 0 the beginning, 1 the end; None where that is spread.
        pairs: facts in the prompt of the kind that is asked for.
    """

    prompt: str
    answer: str
    depth: float | None
    pairs: int

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


def passkey(rng: Random, size: int, depth: float) -> Question:
    """A number in `size` sentences of filler (Mohtashami & Jaggi 2023, "Landmark Attention", arXiv 2305.16300, section 4.2)."""
    key = _number(rng, 5)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    text = _scatter([fact], [depth], size)
    start = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about it."
    )
    return Question(f"{start}\n{text}\nWhat is the pass key? The pass key is", key, depth, 1)


def needle(rng: Random, size: int, depth: float, keys: int = 4) -> Question:
    """`keys` numbers under names in filler, one of them asked (RULER's niah_multikey: Hsieh et al. 2024, arXiv 2404.06654)."""
    names = rng.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], keys)
    numbers = [_number(rng, 7) for _ in names]
    facts = [f"One of the special magic numbers for {name} is: {number}." for name, number in zip(names, numbers)]
    text = _scatter(facts, [depth, *(rng.random() for _ in names[1:])], size)
    start = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about them."
    )
    question = f"What is the special magic number for {names[0]} mentioned in the provided text?"
    prompt = f"{start}\n{text}\n{question} The special magic number for {names[0]} mentioned in the provided text is"
    return Question(prompt, numbers[0], depth, keys)


def variables(rng: Random, size: int, depth: float, chains: int = 2, hops: int = 4) -> Question:
    """Chains of assignments in filler: which variables have the value of one (RULER's vt: Hsieh et al. 2024, arXiv 2404.06654).

    The assignments of a chain stand in their order at random places, so that `depth` has no say.
    """
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(chains * (hops + 1))]
    values = rng.sample(range(10000, 100000), chains)
    facts, depths = [], []
    for value, start in zip(values, range(0, len(names), hops + 1)):
        chain = names[start : start + hops + 1]
        facts += [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
        depths += sorted(rng.random() for _ in chain)
    head = "Memorize and track the chains of variable assignment hidden in the following text."
    question = f"Find all variables that are assigned the value {values[0]} in the text above."
    end = f"{hops + 1} variables are assigned the value {values[0]}, they are:"
    text = _scatter(facts, depths, size)
    prompt = f"{head}\n{text}\nQuestion: {question} Answer: According to the chains of variable assignment, {end}"
    return Question(prompt, " ".join(names[: hops + 1]), None, chains)


def phonebook(
    rng: Random,
    size: int,
    depth: float,
    queries: int = 3,
    digits: int = 7,
    first_names: tuple[str, ...] = FIRST_NAMES,
    last_names: tuple[str, ...] = LAST_NAMES,
) -> Question:
    """`size` names with their numbers, two of them asked and answered, then a third is asked (Jelassi et al. 2024, arXiv
    2402.01032; Waleffe et al. 2024, arXiv 2406.07887).

    Args:
        queries: names asked, all but the last answered.
        last_names: () for names of one word.
    """
    names = [f"{a} {b}" for a in first_names for b in last_names] or first_names
    chosen = rng.sample(names, size)
    numbers = {name: _number(rng, digits) for name in chosen}
    asked = _asked(rng, chosen, depth, queries)
    book, answered = ([f"{name}: {numbers[name]}" for name in part] for part in (chosen, asked[:-1]))
    return Question("\n".join([*book, "", *answered, f"{asked[-1]}:"]), numbers[asked[-1]], depth, size)


def mqar(rng: Random, size: int, depth: float, queries: int = 3, pool: int = len(KEYS)) -> Question:
    """Multi-query associative recall: `size` words each before another, then some of them again (Arora et al. 2023, "Zoology",
    arXiv 2312.04927, section 4).

    Args:
        queries: keys asked, all but the last answered.
        pool: keys, and values, that are drawn from.
    """
    chosen = rng.sample(KEYS[:pool], size)
    value = {key: rng.choice(VALUES[:pool]) for key in chosen}
    asked = _asked(rng, chosen, depth, queries)
    shown, answered = ("".join(f" {key} {value[key]}" for key in keys) for keys in (chosen, asked[:-1]))
    return Question(f"{shown} |{answered} {asked[-1]}", value[asked[-1]], depth, size)


def copying(rng: Random, size: int, depth: float, symbols: int = 8) -> Question:
    """`symbols` letters among `size` dots, to be repeated in their order (selective copying: Gu & Dao 2023, arXiv 2312.00752,
    section 3.1). `depth` has no say."""
    letters = rng.choices("abcdefghijklmnop", k=symbols)
    row = ["."] * (size + symbols)
    for place, letter in zip(sorted(rng.sample(range(len(row)), symbols)), letters):
        row[place] = letter
    return Question(f"The letters without the dots.\n{' '.join(row)}\nThe letters:", " ".join(letters), None, symbols)


def _number(rng: Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _scatter(facts: list[str], depths: list[float], size: int) -> str:
    """`size` sentences of filler with each fact at its depth."""
    sentences = [FILLER[i % len(FILLER)] for i in range(size)]
    for depth, fact in sorted(zip(depths, facts), key=lambda pair: pair[0], reverse=True):
        sentences.insert(round(depth * size), fact)
    return " ".join(sentences)


def _asked(rng: Random, chosen: list[str], depth: float, queries: int) -> list[str]:
    """`queries` of the keys: in rounds of all, each in a random order, and last the one at `depth`. That is not in the first."""
    last = chosen[round(depth * (len(chosen) - 1))]
    others = [key for key in chosen if key != last]
    before: list[str] = []
    while len(before) < queries - 1:
        keys = others if len(before) < len(others) else chosen
        before += rng.sample(keys, len(keys))
    return [*before[: queries - 1], last]


def exact(answer: str, text: str) -> float:
    """1 if the text begins with the answer and does not go on with it, else 0."""
    return float(re.match(re.escape(answer) + r"(?![^\W_])", text.strip()) is not None)


def recall(answer: str, text: str) -> float:
    """The share of the answer's words that are in the text, as RULER's string_match_all."""
    words = answer.split()
    return sum(word in text for word in words) / len(words)


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        make: (rng, size, depth) -> Question.
        smallest, largest: sizes that it can be asked for.
        has_depth: whether a depth makes a difference.
        has_queries: whether `make` takes `queries` too, of which there may be any number.
        score: how right a text is, from 0 to 1: (answer, text).
    """

    make: Callable[..., Question]
    smallest: int
    largest: int
    has_depth: bool = True
    has_queries: bool = False
    score: Callable[[str, str], float] = exact


LONGEST_FILLER = 10**7  # sentences
TASKS = {
    "passkey": Task(passkey, 1, LONGEST_FILLER),
    "needle": Task(needle, 1, LONGEST_FILLER),
    "variables": Task(variables, 1, LONGEST_FILLER, has_depth=False, score=recall),
    "phonebook": Task(phonebook, 3, len(FIRST_NAMES) * len(LAST_NAMES), has_queries=True),
    "mqar": Task(mqar, 3, len(KEYS), has_queries=True),
    "copying": Task(copying, 1, LONGEST_FILLER, has_depth=False),
}


def fit(name: str, task: Task, count: Callable[[str], int], length: int) -> int:
    """The largest size with which a question and its answer have about `length` tokens, as `count` counts them, and not more.

    Raises:
        ValueError: the shortest question is longer.
    """

    def tokens(size: int) -> int:
        return count(task.make(Random(0), size, 0.5).text)

    if (least := tokens(task.smallest)) > length:
        raise ValueError(f"{name} cannot be asked in {length:,} tokens; its shortest question has about {least:,}.")
    high = task.smallest
    while high < task.largest and tokens(high) < length:
        high = min(2 * high, task.largest)
    return task.smallest + bisect_right(range(task.smallest, high + 1), length, key=tokens) - 1


def questions(
    name: str, task: Task, count: Callable[[str], int], length: int, depth: float | None, number: int, seed: int
) -> list[Question]:
    """The same for the same arguments; each has at most `length` tokens with its answer, and not many fewer.

    Raises:
        ValueError: shorter than the shortest question, or longer than the longest.
    """
    made = []
    size = fit(name, task, count, length)
    if size == task.largest and (most := count(task.make(Random(0), size, 0.5).text)) < length:
        raise ValueError(f"{name} cannot fill {length:,} tokens; its longest question has about {most:,}.")
    for i in range(number):
        key = f"question {seed} {name} {length} {depth} {i}"
        smaller = (task.make(Random(key), n, 0.5 if depth is None else depth) for n in range(size, task.smallest - 1, -1))
        question = next((q for q in smaller if count(q.text) <= length), None)
        if question is None:
            raise ValueError(f"{name} cannot always be asked in {length:,} tokens; give a few more.")
        made.append(question)
    return made


def training_texts(
    name: str, task: Task, sizes: Sequence[int], count: Callable[[str], int], length: int, number: int, seed: int
) -> Iterator[str]:
    """Questions with their answers, of random sizes and depths, to train on; where several things can be asked in one text, as
    many as there is room for. They are drawn apart from those of `questions`, whatever the seeds.

    Raises:
        ValueError: the sizes do not fit in `length` tokens.
    """
    room: dict[int, int] = {}  # for queries, by size
    for i in range(number):
        rng = Random(f"training {seed} {name} {length} {i}")
        size, depth = rng.choice(sizes), rng.random()
        state = rng.getstate()

        def make(queries: int, size: int = size, depth: float = depth, rng: Random = rng, state: Any = state) -> str:
            rng.setstate(state)
            return (task.make(rng, size, depth, queries=queries) if task.has_queries else task.make(rng, size, depth)).text

        most = length if task.has_queries else 1
        if size not in room:
            room[size] = bisect_right(range(1, most + 1), length, key=lambda queries: count(make(queries)))
        text = next((text for text in map(make, range(room[size], 0, -1)) if count(text) <= length), None)
        if text is None:
            raise ValueError(f"{name} of size {size} has more than {length:,} tokens; give more, or smaller sizes.")
        yield text
