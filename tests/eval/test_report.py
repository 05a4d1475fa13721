import json
import re

import pytest


@pytest.fixture
def report(command):
    def run(folder):
        status, out, err = command("report", "--run", folder, "--prompt", "4,8")
        assert status == 0, err
        return (
            out,
            (folder / "report/index.html").read_text(encoding="utf-8"),
            json.loads((folder / "report/report.json").read_text()),
        )

    return run


def test_the_page_and_the_headline(report, fake_run):
    out, page, figures = report(fake_run)

    # Self-contained: what it shows is inside it.
    assert not re.search(r"""(src|srcset|href)\s*=\s*["'](?!data:)""", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page and "<script" not in page
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="[^"]+"', page)) == 6
    assert page.count("prefers-color-scheme: dark") == 1 + 6

    # The model's own text is text, whatever it writes.
    assert "&lt;script&gt;alert(20)&lt;/script&gt;\N{REPLACEMENT CHARACTER}&amp;amp;" in page
    assert "\0" not in page
    assert page.count("<h3>Step") == 6  # of 11; the first and the last among them
    assert "<h3>Step 0</h3>" in page and "<h3>Step 20</h3>" in page
    assert "val_fraction: 0.4" in page
    assert "Transformer twin" in page

    compared = figures["bits_per_byte"]
    assert (
        f"bits per byte: model {compared['model']:.3f} · order-3 byte model {compared['order3']:.3f} · "
        f"xz -9 per file {compared['xz']:.3f} (on the same {compared['files']} validation files)\n"
    ) in out
    assert "10,240 tokens · validation loss 2.250" in out
    assert "unfinished: step 20 of 40" in out
    assert "not finished" in page
    assert compared["files"] == 2
    assert compared["bytes"] == len(("naïve" + (fake_run.parent / "text/4.txt").read_text(encoding="utf-8")).encode())
    assert len(figures["throughput"]) == 4
    assert figures["training_tokens_per_second"] == 9e3


def test_no_twin_no_samples_half_a_line(report, fake_run, tiny_model):
    tiny_model(vocab_size=258, num_attention_heads=64, hybrid_override_pattern="M---").save_pretrained(fake_run / "model")
    (fake_run / "samples.jsonl").unlink()
    with (fake_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tok')
    _, page, figures = report(fake_run)
    assert "No samples yet" in page
    assert "No Transformer twin" in page
    assert figures["step"] == 20
    assert len(figures["throughput"]) == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.yaml", "is no run directory: it has no config.yaml"),
        ("model", "has no checkpoint yet"),
        ("metrics.jsonl", "has no metrics yet"),
    ],
)
def test_what_is_no_run_or_not_far_enough(command, fake_run, missing, message):
    (fake_run / missing).unlink()
    status, out, err = command("report", "--run", fake_run)
    assert (status, out) == (2, "")
    assert message in err


def test_a_config_of_something_else(command, fake_run):
    (fake_run / "config.yaml").write_text("- 1\n")
    status, _, err = command("report", "--run", fake_run)
    assert status == 2
    assert "lacks the sections" in err


def test_a_single_huge_document_is_cut():
    from eval.report import first_documents

    assert first_documents(["abc", "de", "f"], 5) == ["abc", "de"]
    assert first_documents(["abc", "def", "g"], 5) == ["abc"]
    assert first_documents(["aïï", "b"], 4) == ["aï"]
