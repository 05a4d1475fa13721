"""The report as one HTML file that needs nothing else: no network, no script."""

from html import escape
from string import Template
from typing import Any

from eval import charts
from eval.output import cell
from eval.throughput import TWIN

SAMPLES = 6  # steps whose samples are shown
THROUGHPUT = {
    "model": "model", "prompt": "prompt", "new": "new tokens", "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s", "time_to_first_token_s": "first token, s",
    "peak_memory_mb": "peak memory, MB", "cache_mb": "cache, MB",
}  # fmt: skip
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1c1f24; --soft: #5b616b; --line: #d5d8dd; --paper: #ffffff; --card: #f4f5f7; --accent: #005a8e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #a3a9b3; --line: #3a3f47; --paper: #16181c; --card: #20242a; --accent: #7cc4ef; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, dt { color: var(--soft); }
.notice { padding: .5rem .75rem; border-left: 4px solid var(--accent); background: var(--card); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.cards dd { margin: 0; font-size: 1.45rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.cards dt { font-size: .85rem; }
dl.cards div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.charts { display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem; margin: 1rem 0 1.5rem; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .85rem; max-width: 30rem; }
img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; margin: .4rem 0 1rem; font-size: .8rem;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre b { color: var(--accent); font-weight: 650; }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem; }
dl.machine { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dl.machine dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } pre, tr, .cards div { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="soft">$subtitle</p>
$notice
</header>
<main>
<dl class="cards">$cards</dl>
<h2>Learning</h2>
<div class="charts">
<figure>$loss</figure>
<figure>$bits<figcaption>$bits_note</figcaption></figure>
</div>
<h2>Speed and memory</h2>
<p>$speed_note</p>
<div class="charts">$speed</div>
<div class="wide"><table>$speed_table</table></div>
<h2>What it writes</h2>
$samples
<h2>Configuration</h2>
<pre>$config</pre>
<h2>Machine</h2>
<p class="soft">On which this report was made, and its speed and memory measured.</p>
<dl class="machine">$machine</dl>
</main>
</body>
</html>
""")


def page(report: dict[str, Any], training: list[dict], validation: list[dict], samples: list[dict], config_text: str) -> str:
    """HTML of the report; `report` is what report.json has, the lists are lines of the run's metrics and samples."""
    compared = report["bits_per_byte"]
    bars = {"this model": compared["model"], "order-3 bytes": compared["order3"], "xz -9": compared["xz"]}
    rows = [row | {"model": "Transformer twin" if row["model"].endswith(TWIN) else "hybrid"} for row in report["throughput"]]
    rows = [
        row | {field.replace("bytes", "mb"): row[field] / 1e6 for field in ("peak_memory_bytes", "cache_bytes")} for row in rows
    ]
    series: dict[str, list[dict]] = {}
    for row in rows:
        series.setdefault(row["model"], []).append(row)
    speed = {
        "prefill_tokens_per_second": ("Reading the prompt", "tokens per second"),
        "decode_tokens_per_second": ("Writing, after the prompt", "tokens per second"),
        "peak_memory_bytes": ("Peak memory", "B"),
        "cache_bytes": ("Cache at the end", "B"),
    }
    return PAGE.substitute(
        title=escape(report["run"]),
        subtitle=escape(
            f"Step {report['step']:,} of {report['steps']:,} · checkpoint {report['checkpoint']} · {report['machine']['date']}"
        ),
        notice="" if report["finished"] else '<p class="notice">This run is not finished: these are the figures so far.</p>',
        cards="".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in cards(report).items()),
        loss=charts.loss_curve(training, validation),
        bits=charts.bits_per_byte(bars),
        bits_note=escape(
            f"On the first {compared['files']} validation document(s), {compared['bytes']:,} bytes, the same for all three. The "
            "order-3 model counts the bytes of all the training text (Witten–Bell); xz compresses each document as a file of its "
            f"own. The model, in windows of {compared['window']:,} tokens and no state carried over, is not charged for a "
            "document's first token."
        ),
        speed_note=escape(speed_note(report)),
        speed="".join(f"<figure>{charts.against_prompt(series, field, *words)}</figure>" for field, words in speed.items()),
        speed_table=html_table(rows, THROUGHPUT),
        samples="".join(sample(row) for row in pick(samples)) or '<p class="soft">No samples yet.</p>',
        config=escape(config_text),
        machine="".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in report["machine"].items()),
    )


def cards(report: dict[str, Any]) -> dict[str, str]:
    speed = report["training_tokens_per_second"]
    return {
        "parameters": short(report["parameters"]),
        "tokens seen": short(report["tokens"]),
        "validation loss, nats/token": "–" if report["val_loss"] is None else f"{report['val_loss']:.3f}",
        "validation loss, bits/byte": "–" if report["val_loss"] is None else f"{report['val_bits_per_byte']:.3f}",
        "training tokens/s, median": "–" if speed is None else short(speed),
    }


def speed_note(report: dict[str, Any]) -> str:
    rows = report["throughput"]
    text = (
        f"One request at a time on random tokens, {rows[0]['new']} tokens written, {rows[0]['dtype']} on the "
        f"{rows[0]['device'].upper()}; medians. Memory is over what the process had before the model."
    )
    if report["twin_fault"] is None:
        return text + " The Transformer twin has the same width, depth and number of parameters, and random weights."
    return f"{text} No Transformer twin beside it: {report['twin_fault']}"


def short(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def pick(samples: list[dict]) -> list[dict]:
    """Those of SAMPLES steps, evenly apart, the first and the last among them."""
    steps = sorted({row["step"] for row in samples})
    if len(steps) > SAMPLES:
        steps = [steps[round(i * (len(steps) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
    return sorted((row for row in samples if row["step"] in steps), key=lambda row: row["step"])


def sample(row: dict[str, Any]) -> str:
    prompt, text = printable(row["prompt"]), printable(row["text"]).removeprefix(printable(row["prompt"]))
    return f"<h3>Step {row['step']:,}</h3><pre><b>{escape(prompt)}</b>{escape(text)}</pre>"


def printable(text: str) -> str:
    """An untrained model writes control characters, which have no place in HTML."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def html_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in columns.values())
    body = "".join("<tr>" + "".join(f"<td>{escape(cell(row[field]))}</td>" for field in columns) + "</tr>" for row in rows)
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
