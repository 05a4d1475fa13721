"""The report on a compression, of made-up files in the forms that `python -m train compress` writes."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from hybridlm.pattern import evenly_dispersed
from train.compress_charts import best_edge
from train.compress_report import WHAT, cards, headline, layers, read, write_report

TRAINED = [name for name in WHAT if name not in ("parent", "pruned")]


def row(name, pattern, parameters, loss, seconds=None, **fields):
    """A candidate of the search."""
    sizes = {"hidden_size": 192, "intermediate_size": 288, "mamba_num_heads": 4, "num_key_value_heads": 2}
    figures = {"memory_bytes": 2.5 * parameters, "damage": loss - 1.4, "accuracy": 0.7 - loss / 10, "agreement": 1.3 - loss / 3}
    speed = {"request_seconds": seconds, "tokens_per_second": seconds and 128 / seconds, "distilled_loss": None}
    return {"name": name, "pattern": pattern, "parameters": parameters, "loss": loss} | sizes | figures | speed | fields


def write_search(folder, pattern, scored=60, **budget):
    rng = np.random.default_rng(0)
    candidates = []
    for i in range(scored):
        depth = len(pattern) - int(rng.integers(0, len(pattern) // 3 + 1))
        parameters = int(1e6 * depth / len(pattern) * rng.uniform(0.55, 0.85))
        loss = 1.4 + 3.0 * (1 - parameters / 1e6) ** 2 * rng.uniform(0.5, 4) + 0.01 * i
        fields = {"seconds": parameters / 4e6 * rng.uniform(0.9, 1.3)} if i < 16 else {}
        fields |= {"distilled_loss": 1.35 + 0.1 * loss} if i < 4 else {}
        candidates.append(row(f"{depth} layers, {288 - i} neurons", pattern[:depth], parameters, loss, **fields))
    limits = {
        "parameters": None,
        "memory_bytes": None,
        "request_seconds": None,
        "context": 4096,
        "weight_bits": 16,
        "cache_bits": 16,
    }
    content = {
        "parent": row("parent", pattern, 10**6, 1.4, 0.31, damage=0, agreement=1.0),
        "funnel": {"grid": 12_345, "within_budget": 800, "scored": scored, "timed": 16, "kept": 4},
        "budget": limits | budget, "prompt": 1024, "new": 128, "candidates": candidates,
    }  # fmt: skip
    (folder / "search.json").write_text(json.dumps(content))
    return content


def entry(search, name, bits, parameters, tokens, seconds):
    pattern = search["parent" if name.startswith("parent") else "candidates"]
    pattern = pattern["pattern"] if isinstance(pattern, dict) else pattern[0]["pattern"]
    figures = {"nats_per_token": bits * 0.7, "bits_per_byte": bits, "accuracy": 0.6, "agreement": 0.85}
    speed = {"tokens_per_second": 128 / seconds, "request_seconds": seconds, "memory_bytes": 2.5 * parameters}
    return {"folder": f"models/{name}", "pattern": pattern, "parameters": parameters, "tokens": tokens} | figures | speed


def write_summary(folder, search, names=tuple(WHAT)):
    small, whole = search["candidates"][0]["parameters"], search["parent"]["parameters"]
    models = {}
    for i, name in enumerate(names):
        size, seconds = (whole, 0.32) if name.startswith("parent") else (small, 0.2)
        models[name] = entry(search, name, 1.9 + 0.01 * i, size, 2_000_000 * (name in TRAINED), seconds)
    content = {
        "parent": models["parent"], "student": models["pruned + distilled"], "models": models, "parent_tokens": 400_000_000,
        "distillation_tokens": 2_000_000, "prompt": 1024, "new": 128, "batch": 1, "context": 4096,
        "seconds": {"importance": 12.5, "search": 90.0, "distillation": 1234.5},
        "machine": {"CPU": "some CPU", "cores": 2, "torch": "2.13.0", "date": "2026-11-22T08:00+00:00"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(content))
    return content


def write_importance(folder, pattern):
    rng = np.random.default_rng(1)
    sizes = {"M": 8, "*": 4, "-": 384}
    tensors = {f"parts.{i}": rng.lognormal(0, 1 + i % 3, sizes[symbol]) for i, symbol in enumerate(pattern)}
    tensors |= {"layers": rng.lognormal(-3, 1.5, len(pattern)), "channels": rng.lognormal(0, 0.7, 192)}
    save_file(tensors, folder / "importance.safetensors")


def write_trainings(folder, names=TRAINED):
    for i, name in enumerate(names):
        run = folder / "runs" / name.replace(" + ", "-").replace(" ", "-")
        run.mkdir(parents=True)
        lines = []
        for step in range(0, 101, 10):
            bits = 1.9 + 0.01 * i + (6.0 if name == "from scratch" else 1.0) * np.exp(-step / 15)
            lines.append({"step": step, "tokens": 20_000 * step, "val_loss": 0.7 * bits, "val_bits_per_byte": bits})
            lines.append({"step": step + 1, "tokens": 20_000 * (step + 1), "loss": 2.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')


def write_all(folder, pattern="M-M*-M-"):
    search = write_search(folder, pattern, parameters=800_000)
    write_summary(folder, search)
    write_importance(folder, pattern)
    write_trainings(folder)
    return search


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time: where they are not what is tested they stay empty."""
    monkeypatch.setattr("hybridlm.pages.charts._draw", lambda chart, theme, **form: b"")


def report(folder):
    write_report(folder)
    return (folder / "report" / "report.md").read_text(), (folder / "report" / "index.html").read_text()


def table_rows(text, heading):
    """The lines of the first Markdown table whose head begins with `heading`, split."""
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_all_that_there_is(tmp_path, undrawn):
    search = write_all(tmp_path)
    text, page = report(tmp_path)
    assert re.findall(r"^## (.*)", text, re.M) == [
        "Side by side",
        "Learning",
        "The search",
        "What matters",
        "How it was measured",
    ]
    assert "Not there" not in text
    share = search["candidates"][0]["parameters"] / 1e6
    told = f"# {1 - share:.0%} fewer parameters, 1.60 times the tokens per second, 1.0% more bits per byte"
    assert text.startswith(f"{told} than the parent trained on as many tokens\n")
    assert f"- parameters: \N{MINUS SIGN}{100 * (1 - share):.1f} %" in text
    assert "- tokens/s, prompt 1,024 in, 128 out: 1.60 ×" in text
    assert "- bits per byte, beside the parent trained on as many tokens: +1.0 %" in text
    assert "- tokens of distillation, 0.50% of those of the parent's training: 2M" in text
    rows = table_rows(text, "model")
    assert [cells[0] for cells in rows] == list(WHAT)
    assert rows[1] == ["parent trained on", "M-M\\*-M-", "1M", "1.910", "0.600", "0.850", "400", "0.32", "2.50 MB", "2M"]
    assert [cells[0] for cells in table_rows(text, "stage")] == ["grid", "within budget", "scored", "timed", "kept"]
    assert table_rows(text, "stage")[0][1] == "12,345"
    candidates = table_rows(text, "candidate")
    assert len(candidates) == 20 and candidates[0][0] == f"**{search['candidates'][0]['name']}**"
    assert [cells[0].strip("*") for cells in candidates] == [row["name"] for row in search["candidates"][:20]]
    assert [cells[-1] == "-" for cells in candidates] == [False] * 4 + [True] * 16
    assert "uniform depth and uniform width, which the search did not score" not in text  # they have the winner's shape here
    assert "- budget: parameters: 800,000" in text and "| distillation | 1,234.5 |" in text and "- CPU: some CPU" in text
    figures = {"funnel", "learning", "learning-late", "loss-parameters", "loss-tokens-per-second", "layers"}
    parts = ("heads-of-mamba-2", "key-value-groups", "neurons-of-ffn")
    figures |= {f"{kind}-{name}" for name in parts for kind in ("spread", "sorted")} | {"sorted-channels"}
    assert {file.stem for file in (tmp_path / "report" / "figures").iterdir()} == figures
    assert all(f"(figures/{name}.png)" in text for name in figures) and page.count("<figure>") == len(figures)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridlm.pages.page.svg_uri", lambda chart, theme: "data:,")  # one of three drawings is enough
    write_all(tmp_path)
    write_report(tmp_path)
    files = list((tmp_path / "report" / "figures").iterdir())
    assert len(files) == 13 and all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_search_without_trainings(tmp_path, undrawn):
    search = write_search(tmp_path, "M-M*-M-")
    search["candidates"][0] |= {"loss": 1.54, "tokens_per_second": None}
    (tmp_path / "search.json").write_text(json.dumps(search))
    text, _ = report(tmp_path)
    assert (
        "10.0% more loss before distillation than the parent\n" in text.splitlines(keepends=True)[0]
        and "times the tokens" not in text
    )
    assert "- loss, not distilled, beside the parent: +10.0 %" in text
    for name in ("summary.json", "runs/\\*/metrics.jsonl", "importance.safetensors"):
        assert name in text.split("## ")[0], name
    assert re.findall(r"^## (.*)", text, re.M) == ["The search", "How it was measured"]
    assert "Not in the pictures: uniform depth and uniform width" in text and "- budget: none" in text


def test_a_summary_with_some_of_the_models(tmp_path, undrawn):
    search = write_search(tmp_path, "M-M*-M-")
    write_summary(tmp_path, search, ["parent", "pruned", "pruned + distilled"])
    (tmp_path / "search.json").unlink()
    text, _ = report(tmp_path)
    assert "than the parent\n" in text.splitlines(keepends=True)[0]
    assert "the model “from scratch”" in text and "the model “pruned”" not in text
    assert [cells[0] for cells in table_rows(text, "model")] == ["parent", "pruned", "pruned + distilled"]


def test_118_layers(tmp_path, undrawn):
    pattern = evenly_dispersed(118, 10)
    write_all(tmp_path, pattern)
    text, _ = report(tmp_path)
    assert layers(pattern) == "118: 54 M, 54 -, 10 *"
    assert table_rows(text, "model")[0][1] == "118: 54 M, 54 -, 10 \\*"
    assert f"parent\n{pattern}\n" in text  # folded up, below the table


def test_the_winner_and_the_uniform_baselines_in_the_search(tmp_path, undrawn):
    search = write_all(tmp_path)
    search["candidates"][7]["name"] = "uniform depth, 5 layers"
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("uniform depth + distilled", "uniform width + distilled"):
        summary["models"][name]["parameters"] = 1
    won = search["candidates"][5]
    summary["student"] |= {name: won[name] for name in ("pattern", "parameters")}
    (tmp_path / "search.json").write_text(json.dumps(search))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text, _ = report(tmp_path)
    assert "Not in the pictures: uniform width, which" in text
    assert f"uniform depth: {search['candidates'][7]['loss']:.3f} at" in text
    assert f"winner: {won['loss']:.3f} at" in text and f"**{won['name']}**" in text  # not the first, but what became the student


def test_layers_that_do_not_matter_and_importance_of_another_model(tmp_path, undrawn):
    write_search(tmp_path, "M-M*-M-")
    save_file({"layers": np.array([1, 0, 2, -1, 3, 4, 5.0])}, tmp_path / "importance.safetensors")
    text, _ = report(tmp_path)
    assert "Without a bar, since they are not above 0: layers 1, 3." in text and "sorted-" not in text
    save_file({"layers": np.ones(3), "channels": np.ones(8)}, tmp_path / "importance.safetensors")
    text, _ = report(tmp_path)
    assert "figures/layers.png" not in text and "figures/sorted-channels.png" in text


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(ValueError, match=r"has nothing to report on: neither search\.json nor summary\.json is there"):
        write_report(tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json is no JSON"):
        write_report(tmp_path)


def test_more_parameters_and_less_loss_are_called_so(tmp_path):
    search = write_search(tmp_path, "M-M*-M-")
    search["candidates"] = [row("bigger", "M-", 1_250_000, 1.26)]
    (tmp_path / "search.json").write_text(json.dumps(search))
    assert headline(read(tmp_path)) == "25% more parameters, 10.0% less loss before distillation than the parent"
    assert list(cards(read(tmp_path)).values()) == ["+25.0 %", "\N{MINUS SIGN}10.0 %"]


def test_the_edge_of_what_is_best():
    rows = [{"x": x, "loss": loss} for x, loss in ((1, 5), (2, 3), (3, 4), (4, 2), (2, 6))]
    assert [row["x"] for row in best_edge(rows, "x", False)] == [1, 2, 4]
    assert [row["x"] for row in best_edge(rows, "x", True)] == [4]
