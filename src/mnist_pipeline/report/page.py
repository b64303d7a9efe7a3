"""The report as one self-contained HTML file with interactive charts."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from mnist_pipeline.report.chart_style import Chart

_MOST_ROWS = 12  # of a table that is read; a longer one is folded, since people look things up in it


def render_page(report: str, directory: Path, charts: Mapping[str, Chart]) -> str:
    """Render a Markdown report as a page. The report's images are files under `directory`.

    An image named like a chart becomes that chart; without JavaScript it stays an image.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")

    def render_image(renderer: RendererHTML, tokens: Sequence[Token], place: int, *_: Any) -> str:
        path = directory / str(tokens[place].attrs["src"])
        words = escape(tokens[place].content)
        content = base64.b64encode(path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{content}" alt="{words}">'
        if path.stem not in charts:
            return image
        chart = f'<span class="chart" id="{path.stem}" role="img" aria-label="{words}"></span>'
        return f"{chart}<noscript>{image}</noscript>"

    markdown.add_render_rule("image", render_image)
    markdown.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    title, introduction, *sections = re.split(r"^##? (.+)\n", report, flags=re.MULTILINE)[1:]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_pipeline.report"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        title=title,
        introduction=Markup(markdown.render(introduction)),  # noqa: S704 (escaped by markdown-it)
        sections=[
            {"id": heading.lower().replace(" ", "-"), "title": heading, "body": _fold_tables(markdown.render(body))}
            for heading, body in zip(sections[::2], sections[1::2], strict=True)
        ],
        specs={name: chart.to_dict() | {"width": "container"} for name, chart in charts.items()},
        vega=Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),  # noqa: S704 (Vega's own code)
    )


def _fold_tables(section: str) -> Markup:
    """Fold the long tables of a rendered section."""

    def fold(table: re.Match[str]) -> str:
        rows = table[0].count("<tr>") - 1
        is_long = rows > _MOST_ROWS
        return f"<details><summary>Table of {rows} rows</summary>{table[0]}</details>" if is_long else table[0]

    return Markup(re.sub(r'<div class="table">.*?</div>', fold, section, flags=re.DOTALL))  # noqa: S704 (see above)
