import re
from random import Random

import pytest

from eval.synthetic import TASKS, exact, fit, phonebook, questions, recall, training_texts

NAMES = list(TASKS)
LENGTH = 900


def count(text):
    return len(text)


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_in_the_prompt_and_questions_fill_the_length(name):
    made = questions(name, TASKS[name], count, LENGTH, 0.5, 10, 0)
    assert len({q.text for q in made}) == 10
    for q in made:
        assert 0.85 * LENGTH < count(q.text) <= LENGTH
        assert TASKS[name].score(q.answer, f" {q.answer}\nAnd so on.") == 1
        assert all(word in q.prompt for word in q.answer.split())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_questions_and_training_has_none_of_them(name):
    task, length = TASKS[name], 700
    first, again, other = (questions(name, task, count, length, 0.5, 10, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    sizes = [task.smallest, fit(name, task, count, length) * 9 // 10]
    texts = list(training_texts(name, task, sizes, count, length, 20, 0))
    assert max(map(count, texts)) <= length
    assert texts == list(training_texts(name, task, sizes, count, length, 20, 0))
    assert not {q.prompt.split("|")[0] for q in first} & {text.split("|")[0] for text in texts}
    if task.has_queries:  # more is asked as long as there is room
        assert min(map(count, texts)) > 0.9 * length


@pytest.mark.parametrize("name", [name for name in NAMES if TASKS[name].has_depth])
def test_depth_is_where_the_asked_fact_stands(name):
    places = []
    for depth in (0.0, 0.5, 1.0):
        q = questions(name, TASKS[name], count, 2000, depth, 1, 0)[0]
        asked = q.answer if name != "mqar" else f"{q.prompt.split()[-1]} {q.answer}"
        assert q.depth == depth
        places.append(q.prompt.index(asked) / len(q.prompt))
    assert places[0] < 0.2 < places[1] < 0.7 < places[2]


def test_phonebook_has_two_shots_of_other_names():
    q = TASKS["phonebook"].make(Random(0), 5, 0.25)
    book, asked = q.prompt.split("\n\n")
    lines = book.split("\n")
    assert len(lines) == 5
    assert [line in lines for line in asked.split("\n")] == [True, True, False]
    assert f"{asked.split(chr(10))[-1]} {q.answer}" == lines[1]
    assert re.fullmatch(r"[A-Z][a-z]+: \d{3}", phonebook(Random(0), 3, 0, digits=3, last_names=()).prompt.split("\n")[0])


def test_variables_of_the_chain_alone_are_the_answer():
    q = TASKS["variables"].make(Random(0), 30, 0.0)
    value = re.search(r"assigned the value (\d+)", q.prompt)[1]
    found, facts = [], re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", q.prompt)
    for name, source in facts:  # an assignment stands behind the one that it is made from
        if source in [value, *found]:
            found.append(name)
    assert sorted(found) == sorted(q.answer.split())
    assert len(facts) == 2 * len(found)


def test_copying_asks_for_the_letters_in_order():
    q = TASKS["copying"].make(Random(0), 40, 0.0)
    assert re.findall(r"(?<= )[a-p](?= )|^[a-p](?= )", q.prompt.split("\n")[1] + " ") == q.answer.split()


@pytest.mark.parametrize(
    ("text", "right"), [(" 123", 1), ("123. Remember", 1), ("1234", 0), ("12", 0), ("x 123", 0), ("", 0), ("123a", 0)]
)
def test_exact(text, right):
    assert exact("123", text) == right


def test_recall_is_the_share_that_was_found():
    assert recall("A B C D", "A, D and C.") == 0.75


def test_lengths_that_a_task_does_not_fit():
    with pytest.raises(ValueError, match=r"passkey cannot be asked in 20 tokens; its shortest question has about 2\d\d\."):
        questions("passkey", TASKS["passkey"], count, 20, 0.0, 1, 0)
    with pytest.raises(ValueError, match=r"mqar cannot fill 1,000,000 tokens; its longest question has about 5,1\d\d\."):
        questions("mqar", TASKS["mqar"], count, 10**6, 0.0, 1, 0)
