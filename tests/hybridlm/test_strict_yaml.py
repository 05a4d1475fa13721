import pytest

from hybridlm.strict_yaml import load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1.5", 1.5), ("-2", -2), ("1_000", 1000), ("true", True), ("null", None), ("~", None), (".5", 0.5),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("12:30", "12:30"), ("010", "010"), ("0x10", "0x10"), ("1e", "1e"),
        (".inf", float("inf")), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text, value):
    got = parse_yaml(f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


def test_an_empty_value_is_null():
    assert parse_yaml("a:\nb: 1") == {"a": None, "b": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: 1\na: 2", "'a' is given twice"), ("a: [1", "cannot be read"), ("- 1", "must hold"), ("1: 2", "is not text")],
)
def test_what_is_not_a_clean_mapping_is_an_error(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_yaml(tmp_path / "c.yaml")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no file /no/such\.yaml"):
        load_yaml("/no/such.yaml")


def test_nothing_is_ever_executed(tmp_path):
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['touch /tmp/sentinel']")
    with pytest.raises(ValueError, match="cannot be read"):
        load_yaml(tmp_path / "c.yaml")
