"""The report as a page: one accessible file with the report's text, which loads nothing and trusts no data."""

import functools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import vl_convert
from PIL import Image
from support.made_up import DIGESTS, DIGITS, PARAMS, MadeUpRun, params_with
from support.tables import table

from mnist_pipeline.report.document import render_report
from mnist_pipeline.report.page import render_page

HOSTILE = """<script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted" 'too' <!-- </style>"""
LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping", "xlink:href"}
ALL_WRONG = {index: (int(label + 1) % 10, 0.9) for index, label in enumerate(DIGITS["test"].labels)}
RUNS: dict[str, dict[str, Any]] = {
    "one epoch, no mistakes": {"epochs": 1, "mistakes": {}},
    "more epochs than published, a validation split, only mistakes": {
        "epochs": 30,
        "params": params_with("data", validation_size=50),
        "mistakes": ALL_WRONG,
    },
}

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Parsed(HTMLParser):
    """A page's elements with their attributes, and its texts with the elements that enclose them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.path: list[str] = []
        self.feed(page)
        self.close()
        assert self.path == []  # every element is closed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.path), data))

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *within: str) -> str:
        """Return the text in elements of these kinds, without what folded tables are called."""
        return " ".join(text for path, text in self.texts if set(within) & set(path) and "summary" not in path)

    @property
    def charts(self) -> dict[str, dict[str, str]]:
        """The attributes of each chart's place, by the chart's name."""
        return {found["id"]: found for found in self.all("span") if found.get("class") == "chart"}

    @property
    def specs(self) -> dict[str, Any]:
        """The charts' specifications, as the page's script reads them."""
        [place] = [place for place, (_, attributes) in enumerate(self.elements) if attributes.get("id") == "specs"]
        number = [tag for tag, _ in self.elements[:place]].count("script")
        scripts = [text for path, text in self.texts if path[-1:] == ("script",)]
        specs: dict[str, Any] = json.loads(scripts[number])
        return specs


@pytest.fixture(scope="module", autouse=True)
def bundle_once() -> Iterator[None]:
    """Bundle the charts' JavaScript once, for it takes seconds and is always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", functools.cache(vl_convert.javascript_bundle))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    created = MadeUpRun.create(tmp_path_factory.mktemp("run"))
    created.write_page()
    return created


@pytest.fixture(scope="module")
def parsed(run: MadeUpRun) -> Parsed:
    return Parsed(run.page)


def words(markdown: str) -> list[str]:
    """Return the words of a Markdown text without its marks, pictures aside."""
    text = re.sub(r"!\[.*?\]\(.*?\)", "", markdown)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r" \1 ", text)
    text = re.sub(r"(?m)^\|[ :|-]+\|$|^#+ |[*`|]", " ", text)
    return text.split()


def test_the_page_says_what_the_markdown_says(run: MadeUpRun, parsed: Parsed) -> None:
    assert parsed.text("header", "main").split() == words(run.report)
    assert [parsed.text("title")] == re.findall("^# (.+)", run.report)


def test_long_tables_are_folded(run: MadeUpRun) -> None:
    folded = re.findall(
        r"<summary>Table of (\d+) rows</summary><div class=\"table\"><table>\s*<thead>.*?<th.*?>(.*?)<", run.page, re.S
    )
    params = len(table(run.report, "Key in `params.yaml`"))
    assert folded == [("14", "Step"), ("19", "Family"), (str(params), "Key in ")]


def test_the_page_has_the_markdowns_pictures_and_their_alternative_texts(run: MadeUpRun, parsed: Parsed) -> None:
    alternatives = [alternative for alternative, _ in re.findall(r"!\[(.+?)\]\((.+?)\)", run.report)]
    assert [image["alt"] for image in parsed.all("img")] == alternatives
    assert {found["aria-label"] for found in parsed.charts.values()} == set(alternatives)
    assert all(found["role"] == "img" for found in parsed.charts.values())


def test_every_chart_has_its_place_and_its_specification(run: MadeUpRun, parsed: Parsed) -> None:
    assert parsed.specs.keys() == parsed.charts.keys() == run.charts.keys()
    for name, chart in run.charts.items():
        assert parsed.specs[name] == json.loads(json.dumps(chart.to_dict())) | {"width": "container"}


def test_the_page_loads_nothing_from_elsewhere(parsed: Parsed) -> None:
    loaded = {value for _, attributes in parsed.elements for name, value in attributes.items() if name in LOADING}
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert {link["href"] for link in parsed.all("link")} == {"data:,"}
    assert not {"base", "iframe", "object", "embed"} & {tag for tag, _ in parsed.elements}
    styles = [parsed.text("style"), *(attributes.get("style", "") for _, attributes in parsed.elements)]
    assert not re.search(r"url\(|@import", " ".join(styles))


def test_its_links_lead_to_its_sections_or_to_other_sites(parsed: Parsed) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    inner = [link["href"] for link in parsed.all("a") if not link["href"].startswith("https://")]
    assert inner == [f"#{section['id']}" for section in parsed.all("section")]
    assert set(inner) <= {f"#{name}" for name in ids}


def test_it_is_not_too_large_to_send(run: MadeUpRun) -> None:
    assert len(run.page.encode()) < 3_000_000


def test_the_same_run_gets_the_same_page(run: MadeUpRun, tmp_path: Path) -> None:
    again = MadeUpRun.create(tmp_path)
    assert render_page(again.report, run.directory, again.charts) == run.page


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_every_kind_of_run_gets_its_charts_and_page(case: dict[str, Any], tmp_path: Path) -> None:
    run = MadeUpRun.create(tmp_path, **case)
    parsed = Parsed(run.page)
    assert parsed.text("header", "main").split() == words(run.report)
    assert parsed.specs.keys() == run.charts.keys()
    assert len(parsed.all("img")) == len(run.charts)
    for name in run.charts:
        with Image.open(tmp_path / f"figures/{name}.png") as image:
            assert len(image.convert("RGB").getcolors(100)) > 2, name


# Text that would be code


def check_harmless(page: str) -> Parsed:
    """Check that a page has only the scripts, styles and links of its frame, its charts and its text."""
    parsed = Parsed(page)
    assert len(parsed.all("script")) == 3
    assert len(parsed.all("style")) == 2
    assert not {name for _, attributes in parsed.elements for name in attributes if name.startswith("on")}
    assert all(re.match("#|https://", link["href"]) for link in parsed.all("a"))
    return parsed


def test_hostile_text_anywhere_in_the_report_is_shown_as_text(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "known.png")
    report = (
        f"# Title {HOSTILE}\n\nIntroduction {HOSTILE}\n\n## Heading {HOSTILE}\n\n[link](javascript:alert(3))\n\n"
        f"| {HOSTILE} |\n| --- |\n| `{HOSTILE}` |\n\n![{HOSTILE}](known.png)\n![{HOSTILE} again](other.png)\n"
    )
    (tmp_path / "other.png").write_bytes((tmp_path / "known.png").read_bytes())
    chart = alt.Chart(alt.Data(values=[{"text": HOSTILE}])).mark_text().encode(text="text:N")
    parsed = check_harmless(render_page(report, tmp_path, {"known": chart}))
    assert parsed.text("header", "main").count(HOSTILE) == 5
    assert parsed.text("title") == f"Title {HOSTILE}"
    assert [image["alt"] for image in parsed.all("img")] == [HOSTILE, f"{HOSTILE} again"]
    assert parsed.charts["known"]["aria-label"] == HOSTILE
    assert parsed.specs["known"]["data"]["values"] == [{"text": HOSTILE}]


def test_a_file_with_a_hostile_name_is_shown_as_text(run: MadeUpRun) -> None:
    report = render_report(PARAMS, DIGITS, run.model, run.results, DIGESTS | {f"data/raw/{HOSTILE}": "3" * 64})
    found = check_harmless(render_page(report, run.directory, run.charts))
    assert f"data/raw/{HOSTILE}" in found.text("main")
