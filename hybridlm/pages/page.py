"""A report as one HTML file that needs nothing else, and as Markdown beside its pictures."""

from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hybridlm.pages.blocks import Facts, Listing, Section, Table, Text, raw, text_of
from hybridlm.pages.charts import THEMES, Chart, svg_uri, write_png

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def write_page(out: Path, title: str, subtitle: str, notices: list[str], cards: dict[str, str], sections: list[Section]) -> None:
    """Writes index.html, report.md and figures/*.png into `out`."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts = (title, subtitle, notices, cards, sections)
    (out / "index.html").write_text(page(*parts), encoding="utf-8")
    (out / "report.md").write_text(markdown(*parts), encoding="utf-8")
    for chart in (chart for section in sections for block in section.blocks if isinstance(block, list) for chart in block):
        write_png(chart, out / "figures")


def page(title: str, subtitle: str, notices: list[str], cards: dict[str, str], sections: list[Section]) -> str:
    return PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        notices="".join(f'<p class="notice">{escape(notice)}</p>\n' for notice in notices),
        links="".join(f'<a href="#{anchor(section)}">{escape(section.title)}</a>' for section in sections),
        cards=pairs(cards, "<div><dd>{1}</dd><dt>{0}</dt></div>"),
        sections="\n".join(map(html_section, sections)),
    )


def html_section(section: Section) -> str:
    blocks = "\n".join(map(block, section.blocks))
    return f'<section id="{anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def pairs(values: dict[str, Any], form: str) -> str:
    return "".join(form.format(escape(name), escape(str(value))) for name, value in values.items())


def block(content: Any) -> str:
    match content:
        case Text(text):
            return f'<p class="soft">{escape(text)}</p>'
        case Table():
            return html_table(content)
        case Facts(values):
            return f'<dl class="facts">{pairs(values, "<dt>{0}</dt><dd>{1}</dd>")}</dl>'
        case Listing():
            return listing(content)
    return '<div class="charts">' + "\n".join(f"<figure>{picture(chart)}</figure>" for chart in content) + "</div>"


def picture(chart: Chart) -> str:
    light, dark = (svg_uri(chart, theme) for theme in THEMES)
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(chart.alt)}"></picture>'
    )


def html_table(table: Table) -> str:
    words = {name for name in table.columns if not any(isinstance(raw(row.get(name)), (int, float)) for row in table.rows)}
    head = "".join(f"<th{' class=text' * (name in words)}>{escape(heading)}</th>" for name, heading in table.columns.items())
    body = "".join(
        f"<tr>{''.join(html_cell(row.get(name), (i, name) in table.best) for name in table.columns)}</tr>\n"
        for i, row in enumerate(table.rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_cell(content: Any, best: bool) -> str:
    value = raw(content)
    sorted_by = f' data-value="{value}"' if isinstance(value, (int, float)) else ""
    kind = ' class="best"' if best else ' class="text"' if value is not None and not sorted_by else ""
    return f"<td{kind}{sorted_by}>{escape(text_of(content))}</td>"


def listing(content: Listing) -> str:
    text = "".join(f"<{tag}>{escape(part)}</{tag}>" if tag else escape(part) for tag, part in content.parts)
    if content.fold:
        return f"<details><summary>{escape(content.title)}</summary><pre>{text}</pre></details>"
    return (f"<h3>{escape(content.title)}</h3>" if content.title else "") + f"<pre>{text}</pre>"


def markdown(title: str, subtitle: str, notices: list[str], cards: dict[str, str], sections: list[Section]) -> str:
    """The same, for a reader of text; pictures are those in `figures/`."""
    lines = [f"# {plain(title)}", plain(subtitle), *map(plain, notices)]
    lines.append("\n".join(f"- {plain(name)}: {plain(value)}" for name, value in cards.items()))
    for section in sections:
        lines += [f"## {section.title}", *map(markdown_block, section.blocks)]
    return "\n\n".join(line for line in lines if line) + "\n"


def markdown_block(content: Any) -> str:
    match content:
        case Text(text):
            return plain(text)
        case Table():
            return markdown_table(content)
        case Facts(values):
            return "\n".join(f"- {plain(name)}: {plain(str(value))}" for name, value in values.items())
        case Listing():
            text = "".join(part for _, part in content.parts)
            fence = "`" * max(3, 1 + longest_run(text, "`"))
            return (f"### {plain(content.title)}\n\n" if content.title else "") + f"{fence}text\n{text.rstrip()}\n{fence}"
    return "\n".join(f"![{plain(chart.alt)}](figures/{chart.name}.png)" for chart in content)


def markdown_table(table: Table) -> str:
    def cells(i: int, row: dict[str, Any]) -> list[str]:
        texts = [plain(text_of(row.get(name))) for name in table.columns]
        return [f"**{text}**" if (i, name) in table.best else text for name, text in zip(table.columns, texts)]

    head = [[plain(heading) for heading in table.columns.values()], ["---"] * len(table.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + [cells(i, row) for i, row in enumerate(table.rows)])


def plain(text: str) -> str:
    """What Markdown would take for a mark is written as itself."""
    return "".join("\\" + c if c in "\\`*_[]<>|#" else " " if c == "\n" else c for c in text)


def longest_run(text: str, letter: str) -> int:
    return max((len(run) for run in "".join(c if c == letter else " " for c in text).split()), default=0)
