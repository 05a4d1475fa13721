import csv
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
import yaml

from eval.throughput import OutOfMemory

VOID = {"meta", "link", "img", "source", "br", "hr", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page loads, what it shows, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.anchors, self.ids, self.images, self.tables, self.marked = [], [], set(), [], [], []
        self.open, self.styles = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids.add(found.get("id"))
        self.loads += [found[name] for name in ("src", "srcset", "data", "action", "poster") if name in found]
        if "href" in found:
            self.anchors.append((tag, found["href"]))
        self.images += [found.get("alt")] * (tag == "img")
        self.tables += [[]] * (tag == "table")
        if tag == "tr":
            self.tables[-1] = [*self.tables[-1], []]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["style"]:
            self.styles.append(text)
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1].append(text)
        if self.open[-1:] == ["mark"]:
            self.marked.append(text)


@pytest.fixture
def report(command):
    def run(*arguments, out):
        status, said, err = command("report", *arguments, "--prompt", "4,8")
        assert status == 0, err
        page = (out / "index.html").read_text(encoding="utf-8")
        return said, page, json.loads((out / "report.json").read_text())

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time: where they are not what is tested they stay empty."""
    monkeypatch.setattr("hybridlm.pages.charts._draw", lambda chart, theme, **form: b"")


@pytest.fixture
def no_files(monkeypatch):
    monkeypatch.setattr("hybridlm.pages.page.write_png", lambda chart, folder: None)


def check_self_contained(text):
    """Nothing is loaded: pictures are data, links lead inside, and the page itself forbids all else."""
    page = Page(text)
    assert page.loads and all(value.startswith("data:image/svg+xml;base64,") for value in page.loads)
    assert all(tag == "a" and target.startswith("#") and target[1:] in page.ids for tag, target in page.anchors)
    assert not re.search(r"url\(|@import", "".join(page.styles))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in text
    script = text[text.index("<script>") :]
    assert not re.search(r"fetch|XMLHttp|import\(|https?:", script)
    return page


def test_the_page_and_the_headline(report, fake_run):
    out, text, figures = report("--run", fake_run, out=fake_run / "report")
    page = check_self_contained(text)
    assert len(page.images) == 7
    assert text.count("prefers-color-scheme: dark") == 1 + 7

    # The model's own text is text, whatever it writes.
    assert "&lt;script&gt;alert(20)&lt;/script&gt;\N{REPLACEMENT CHARACTER}&amp;amp;" in text
    assert "\0" not in text
    assert text.count("<h3>Step") == 6  # of 11; the first and the last among them
    assert "<h3>Step 0</h3>" in text and "<h3>Step 20</h3>" in text
    assert "val_fraction: 0.4" in text
    assert "Transformer twin" in text

    compared = figures["bits_per_byte"]
    assert (
        f"bits per byte: model {compared['model']:.3f} · order-3 byte model {compared['order3']:.3f} · "
        f"xz -9 per file {compared['xz']:.3f} (on the same {compared['files']} validation files)\n"
    ) in out
    assert "10,240 tokens · validation loss 2.250" in out
    assert "unfinished: step 20 of 40" in out
    assert f"Not finished: {fake_run}." in text
    assert compared["files"] == 2
    assert compared["bytes"] == len(("naïve" + (fake_run.parent / "text/4.txt").read_text(encoding="utf-8")).encode())
    assert len(figures["throughput"]) == 4
    assert figures["training_tokens_per_second"] == 9e3
    old = {
        "run", "checkpoint", "step", "steps", "finished", "tokens", "val_loss", "val_bits_per_byte", "training_tokens_per_second",
        "parameters", "bits_per_byte", "twin_fault", "throughput", "machine",
    }  # fmt: skip
    assert old <= figures.keys()
    assert compared.keys() == {"model", "order3", "xz", "files", "bytes", "window"}

    # The same as text, its pictures as files.
    written = (fake_run / "report/report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((figures/[^)]+)\)", written)
    assert len(named) == 7 and sorted(named) == sorted(f"figures/{p.name}" for p in (fake_run / "report/figures").iterdir())
    assert all((fake_run / "report" / name).read_bytes().startswith(b"\x89PNG") for name in named)
    (row,) = csv.DictReader((fake_run / "report/report.csv").open(encoding="utf-8"))
    assert (row["label"], int(row["parameters"]), float(row["val_loss"])) == ("run", figures["parameters"], 2.25)


def test_no_twin_no_samples_half_a_line(report, fake_run, tiny_model, undrawn):
    tiny_model(vocab_size=258, num_attention_heads=64, hybrid_override_pattern="M---").save_pretrained(fake_run / "model")
    (fake_run / "samples.jsonl").unlink()
    with (fake_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tok')
    _, page, figures = report("--run", fake_run, out=fake_run / "report")
    assert "No samples yet" in page
    assert "No Transformer twin" in page
    assert "larger than this hybrid" in figures["twin_fault"]
    assert figures["step"] == 20
    assert len(figures["throughput"]) == 2


@pytest.fixture
def two(fake_run, tmp_path):
    """A second run with another learning rate and model, and results of all kinds of both models, and of a third."""
    other = tmp_path / "other"
    shutil.copytree(fake_run, other, symlinks=True)
    config = yaml.safe_load((fake_run / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(other), "optim": {"lr": 0.5}}))
    names = [str(fake_run / "model"), f"{other}/model/", "elsewhere/third"]
    results = {"perplexity": [], "throughput": [], "accuracy": [], "longcontext": []}
    for i, name in enumerate(names):
        curve = [{"least": 2**k, "most": 2 ** (k + 1) - 1, "nats_per_token": 3 - k / 5 - i, "tokens": 9} for k in range(4)]
        score = {"nats_per_token": 2.0 - i / 4, "bits_per_byte": 1.5 - i / 4, "stderr": 0.1, "perplexity": 9.0, "tokens": 99}
        results["perplexity"].append({"model": name, **score, "by_context": curve, "data": "t", "window": 8, "text_sha256": "x"})
        for prompt in (16, 64):
            for suffix in ("", " (Transformer twin)"):
                speeds = {"prefill_tokens_per_second": 50.0 + i, "decode_tokens_per_second": 9.0, "time_to_first_token_s": 0.1}
                seconds = {
                    "request_seconds": (0.5 + i) * (2 if suffix else 1),
                    "peak_memory_bytes": 5e6,
                    "cache_bytes": 1000 * prompt,
                }
                results["throughput"].append(
                    {"model": name + suffix, "prompt": prompt, "new": 4, "batch": 1, **speeds, **seconds}
                )
        tasks = [{"task": "arc <b>", "metric": "acc", "value": 0.4 + i / 10, "stderr": 0.05, "questions": 9, "shots": 5}]
        tasks += [{"task": "wiki", "metric": "word_perplexity", "value": 40.0 - i, "stderr": None, "questions": 2, "shots": 0}]
        results["accuracy"].append({"model": name, "tasks": tasks})
        cells = [(length, depth) for length in (64, 128) for depth in (0.0, 0.5)]
        results["longcontext"] += [
            {"model": name, "task": "passkey", "length": n, "depth": d, "accuracy": d + i / 4, "stderr": 0.1} for n, d in cells
        ]
    for kind, content in results.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    return fake_run, other, [tmp_path / f"{kind}.json" for kind in results]


def test_runs_and_results_side_by_side(report, two, tmp_path, no_files):
    run, other, files = two
    out, text, figures = report("--run", run, other, "--results", *files, "--out", tmp_path / "out", out=tmp_path / "out")
    page = check_self_contained(text)

    # Nothing was timed: the results have it. Labels are the names of the runs, for the results too.
    assert len(figures["throughput"]) == 12
    rows = {row["label"]: row for row in figures["models"]}
    assert list(rows) == ["run", "other", "third"]
    assert rows["other"]["bits_per_byte"] == 1.25 and rows["other"]["accuracy"] == 0.5  # of tasks where more is better
    assert rows["other"]["longcontext"] == 0.5
    assert rows["other"]["written"] == pytest.approx(4 / 1.5) and rows["other"]["twin_ratio"] == pytest.approx(2)
    assert rows["run"]["parameters"] and rows["third"]["parameters"] is None and rows["third"]["val_loss"] is None
    assert set(figures["text"]["models"]) == {"run", "other"}
    assert "bits per byte: run " in out and "prompt 64: 52 tokens/s in, 9 out, 5 MB · third, Transformer twin" in out

    # Quality against speed, loss, bits, context, three heat maps, four of speed.
    assert len(page.images) == 11
    assert page.images[0].startswith("accuracy against tokens written per second")
    (overview, _, accuracy, recall, speed, differs) = page.tables
    assert overview[0][0] == "model" and [row[0] for row in overview[1:]] == ["run", "other", "third"]
    assert accuracy[0] == ["task", "run", "other", "third", "questions"]
    assert accuracy[1] == ["arc <b>, 5 shots, acc", "0.400 ± 0.050", "0.500 ± 0.050", "0.600 ± 0.050", "9"]
    assert re.findall(r'class="best"[^>]*>([^<]+)<', text[text.index('id="accuracy"') : text.index('id="long-contexts"')]) == [
        "0.600 ± 0.050",
        "38.000",
    ]
    assert recall[1] == ["passkey", "run", "0.25 ± 0.07", "0.25 ± 0.07"]
    assert len(speed) == 1 + 12
    # The settings in which the runs differ, in a table and marked in each.
    assert differs == [["what differs", "run", "other"], ["optim.lr", "–", "0.5"]]
    assert page.marked == ["optim.lr: 0.5\n"]

    written = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "| arc \\<b\\>, 5 shots, acc | 0.400 ± 0.050 | 0.500 ± 0.050 | **0.600 ± 0.050** | 9 |" in written
    assert "](figures/passkey-third.png)" in written


def test_results_alone_and_bits_where_there_is_no_accuracy(report, two, tmp_path, undrawn):
    _, _, (perplexity, throughput, *_) = two
    _, text, figures = report("--results", perplexity, throughput, "--out", tmp_path / "out", out=tmp_path / "out")
    page = check_self_contained(text)
    assert page.images[0].startswith("bits per byte against tokens written per second")
    assert figures["runs"] == [] and figures["text"] is None
    assert "Configuration" not in text and "Accuracy" not in text


def test_a_model_beside_a_run(report, fake_run, model_folder, tmp_path, undrawn):
    beside = model_folder("beside")
    measured = [{"model": str(fake_run / "model"), "prompt": 4, "new": 2, "batch": 1, "request_seconds": 1.0}]
    (tmp_path / "speed.json").write_text(json.dumps(measured))
    where = ("--results", tmp_path / "speed.json", "--out", tmp_path / "o")
    _, _, figures = report("--run", fake_run, "--model", beside, *where, out=tmp_path / "o")
    # The same weights on the same text; the run's speed is known, that of the other is measured beside its twin.
    assert figures["text"]["models"]["beside"] == pytest.approx(figures["text"]["models"]["run"])
    assert [row["model"] for row in figures["throughput"]] == [measured[0]["model"]] + [
        str(beside),
        f"{beside} (Transformer twin)",
    ] * 2


def test_what_memory_did_not_suffice_for_is_told(report, fake_run, monkeypatch, undrawn):
    def evaluate(*arguments):
        raise OutOfMemory(["model, 8 in: no room"], [])

    monkeypatch.setattr("eval.throughput.evaluate", evaluate)
    _, text, figures = report("--run", fake_run, out=fake_run / "report")
    assert figures["throughput"] == []
    assert "Not timed: 1 of 1 rows could not be measured:\nmodel, 8 in: no room" in text


def test_a_streamed_run_has_no_baselines(report, fake_run, tmp_path, undrawn):
    config = yaml.safe_load((fake_run / "config.yaml").read_text())
    config["data"]["streaming"] = True
    (fake_run / "config.yaml").write_text(yaml.safe_dump(config))
    measured = {"model": str(fake_run / "model"), "prompt": 4, "new": 2, "batch": 1, "request_seconds": 1.0}
    (tmp_path / "speed.json").write_text(json.dumps(measured))
    _, text, figures = report("--run", fake_run, "--results", tmp_path / "speed.json", out=fake_run / "report")
    assert figures["bits_per_byte"] is None
    assert "keeps no text" in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_without_a_network(report, two, tmp_path, no_files):
    """Every picture is drawn, the script runs and sorts, and on a phone nothing is wider than the screen but what scrolls."""
    _, text, _ = report("--results", *two[2][::2], two[2][3], "--out", tmp_path / "out", out=tmp_path / "out")
    (tmp_path / "frame.html").write_text(PROBE.replace("PAGE", escape(text)), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    done = subprocess.run(
        [
            CHROMIUM, *flags.split(), "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
            f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/frame.html",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout, re.S)[1])
    assert found == {
        "images": 4,
        "missing": 0,
        "tooWide": 0,
        "sorted": ["third", "other", "run"],
        "again": ["run", "other", "third"],
    }


PROBE = """<!doctype html><title>-</title><iframe style="width: 390px; height: 900px" srcdoc="PAGE"></iframe>
<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument, images = [...page.images];
  const wide = e => e.getBoundingClientRect().right > 390 && !e.closest(".wide");
  const table = page.querySelector("table"), names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  const click = () => [...table.querySelectorAll("th button")].find(b => b.textContent === "accuracy").click();
  const found = {images: images.length, missing: images.filter(i => !i.naturalWidth).length,
    tooWide: [...page.querySelectorAll("body *")].filter(wide).length};
  click(); found.sorted = names(); click(); found.again = names();
  document.title = JSON.stringify(found);
};</script>
"""


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


def test_a_classifier_is_refused_with_where_its_figures_are(command, fake_run):
    config = yaml.safe_load((fake_run / "config.yaml").read_text())
    config["data"]["label_column"] = "label"
    (fake_run / "config.yaml").write_text(yaml.safe_dump(config))
    status, out, err = command("report", "--run", fake_run)
    assert (status, out) == (2, "")
    assert "trains a classifier (data.label_column)" in err and "python -m train status" in err
