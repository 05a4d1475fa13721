import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data import jsonl
from hybridlm.data.jsonl import JsonLines, line_spans
from hybridlm.data.rows import BadDocument


@settings(max_examples=100, deadline=None)
@given(
    content=st.lists(st.sampled_from([b"\n", b" ", b"\r", b"{}", b"ab", b"\t\n", b"\n\n", b"\xff"])).map(b"".join),
    block=st.integers(1, 9),
)
def test_lines_are_found_whatever_the_blocks_they_are_read_in(tmp_path_factory, content, block):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK", block)
        spans = line_spans(path)
    want = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [(int(number), content[start:stop]) for start, stop, number in spans] == want


def test_documents_run_through_the_files_and_blank_lines_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c.jsonl").write_text('{"text": "é"}')
    lines = JsonLines([tmp_path / f"{name}.jsonl" for name in "abc"], "text", None)
    assert lines.ends.tolist() == [2, 2, 3]
    assert [lines.read(i) for i in range(3)] == ["one", "two", "é"]


BAD = {
    "malformed JSON": ['{"text": "a"', '{"text": NaN,}', '{"text": %s}' % ("9" * 5000), '{"a": ' * 100_000, "\ufeff{}", "}"],
    "invalid UTF-8": [b'{"text": "\xff"}'],
    "not an object": ["[1]", '"text"', "null", "NaN", "3"],
    "missing field": ["{}", '{"Text": "a"}'],
    "null": ['{"text": null}'],
    "not text": ['{"text": 3}', '{"text": ["a"]}', '{"text": NaN}', '{"text": {"text": "a"}}'],
    "invalid Unicode": ['{"text": "\\ud800"}'],
}


@pytest.mark.parametrize(("reason", "line"), [(reason, line) for reason, lines in BAD.items() for line in lines])
def test_a_bad_line_is_named_by_file_and_line_with_its_reason(tmp_path, reason, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"text": "z"}\n')
    lines = JsonLines([path], "text", None)
    with pytest.raises(BadDocument, match=r"a\.jsonl:3: ") as raised:
        lines.read(1)
    assert raised.value.reason == reason
    assert (lines.read(0), lines.read(2)) == ("a", "z")


def test_a_template_reads_several_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "why", "a": 1}) + "\n" + json.dumps({"q": "why"}))
    lines = JsonLines([path], "text", "{q}? {a}")
    assert lines.read(0) == "why? 1"
    with pytest.raises(BadDocument, match=r"a\.jsonl:2: there is no 'a'; its fields are 'q'"):
        lines.read(1)
