import pytest

from hybridlm.data.rows import BadDocument, columns, parse_template, text_of

ROW = {"q": "why?", "n": 3, "x": 0.5, "yes": True, "none": None, "list": [1], "nan": float("nan"), "two words": "w", "b": "{q}"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}", "why?"),
        ("Q: {q}\nA: {n}", "Q: why?\nA: 3"),
        ("{{{q}}} {{}}", "{why?} {}"),
        ("{x}{yes}{two words}", "0.5Truew"),
        ("{b}", "{q}"),  # what is put in is not read again
        ("é{q}é", "éwhy?é"),
    ],
)
def test_a_template_is_filled_in(template, text):
    assert text_of(ROW, "text", template, "here") == text


def test_the_columns_of_a_template():
    assert columns("{a} {{b}} {c}{a}") == ["a", "c", "a"]


@pytest.mark.parametrize("template", ["{q:>1000000000}", "{q.__class__}", "{q!r}", "{}", "{", "a}", "{q[0]}", "{{q}", "{q}}"])
def test_any_other_use_of_braces_is_an_error_that_shows_it(template):
    with pytest.raises(ValueError, match=r"the brace at character \d+"):
        parse_template(template)


def test_a_template_without_a_column_is_an_error():
    with pytest.raises(ValueError, match="every document would be the same"):
        parse_template("{{a}}")


@pytest.mark.parametrize(
    ("template", "reason", "says"),
    [
        ("{other}", "missing field", "here: there is no 'other'; its fields are 'q', 'n', 'x'"),
        ("{none}", "null", "here: 'none' is null"),
        ("{list}", "not text", r"here: 'list' is \[1\]"),
        ("{nan}", "not text", "here: 'nan' is nan"),
    ],
)
def test_a_value_that_has_no_text_names_the_row(template, reason, says):
    with pytest.raises(BadDocument, match=says) as raised:
        text_of(ROW, "text", template, "here")
    assert raised.value.reason == reason


def test_a_column_must_be_text_where_there_is_no_template():
    assert text_of(ROW, "q", None, "here") == "why?"
    with pytest.raises(BadDocument, match="'n' is 3, which is no text"):
        text_of(ROW, "n", None, "here")


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(BadDocument, match="here: half of a surrogate pair at character 1"):
        text_of({"text": "a\ud800"}, "text", None, "here")


def test_a_long_value_is_cut_short_in_the_message():
    with pytest.raises(BadDocument) as raised:
        text_of({"text": [0] * 10_000}, "text", None, "here")
    assert len(str(raised.value)) < 150
