"""The report's page in a real browser: on screens, with a pointer, on paper, and without scripts."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from support.browser import browser, page  # noqa: F401 (fixtures)
from support.made_up import DIGITS, MISTAKES, MadeUpRun

pytestmark = pytest.mark.pipeline

CHARTS = ["loss", "accuracy", "network", "filters", "confusion_matrix", "reliability", "corruptions"]
CHARTS += ["misclassified", "studies"]
A4 = 718  # pixels between the margins of a sheet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun.create(tmp_path_factory.mktemp("run"), epochs=5)


@pytest.fixture(scope="module")
def address(run: MadeUpRun) -> str:
    return run.write_page().as_uri()


@pytest.fixture
def report(page: Page, address: str) -> Page:
    page.set_viewport_size({"width": 1400, "height": 900})
    page.goto(address)
    expect(page.locator(".chart svg")).to_have_count(len(CHARTS))
    return page


@pytest.fixture
def unscripted(browser: Browser, address: str) -> Iterator[Page]:
    """Open the page in a browser that runs no JavaScript."""
    with browser.new_context(java_script_enabled=False, viewport={"width": 1400, "height": 900}) as context:
        opened = context.new_page()
        opened.goto(address)
        yield opened


def width_of(report: Page) -> int:
    """Return the width of the page, including what it scrolls."""
    return int(report.evaluate("document.documentElement.scrollWidth"))


def colour_of(found: Locator, name: str = "color") -> str:
    return str(found.evaluate(f"element => getComputedStyle(element)['{name}']"))


def opacities(report: Page) -> list[float]:
    """Return the opacities of the lines of the accuracy chart, in ascending order."""
    curves = report.locator("#accuracy .mark-line path[stroke]")
    return sorted(curves.evaluate_all("paths => paths.map(path => Number(path.getAttribute('opacity') ?? 1))"))


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_every_chart_is_drawn_on_any_screen(page: Page, address: str, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(address)
    for name in CHARTS:
        box = page.locator(f"#{name} svg").bounding_box()
        assert box, name
        assert 300 < box["width"] <= width, name
        assert box["x"] + box["width"] <= width, name
    assert width_of(page) == width
    assert page.locator(".table").evaluate_all("tables => tables.every(table => table.clientWidth <= innerWidth)")


def test_a_dark_screen_gets_a_dark_page_with_light_charts_and_digits(report: Page) -> None:
    text, digit = report.locator("#accuracy svg text").first, report.locator("#misclassified svg image").first
    looks = {}
    for scheme in ("light", "dark"):
        report.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        ink = colour_of(report.locator("body"))
        assert colour_of(text, "fill") == ink
        looks[scheme] = (ink, colour_of(report.locator("body"), "backgroundColor"), colour_of(digit, "filter"))
    light, dark = ([int(number) for number in re.findall(r"\d+", looks[scheme][1])] for scheme in looks)
    assert min(light) > 200
    assert max(dark) < 50
    assert [look[2] for look in looks.values()] == ["none", "invert(1)"]


def test_a_pointer_over_a_curve_shows_the_epochs_figures(report: Page) -> None:
    chart = report.locator("#accuracy svg")
    box = chart.bounding_box()
    assert box
    chart.hover(position={"x": box["width"] - 10, "y": box["height"] / 2})  # the last epoch of 14, published alone
    tooltip = report.locator("#vg-tooltip-element")
    expect(tooltip).to_be_visible()
    assert " ".join(tooltip.inner_text().split()) == "epoch 14 test, published 99.43%"
    chart.hover(position={"x": 85, "y": box["height"] / 2})
    expect(tooltip).to_contain_text("75.00%")
    assert " ".join(tooltip.inner_text().split()) == "epoch 1 test 87.50% test, published 98.26% training 75.00%"
    report.mouse.move(5, 5)
    expect(tooltip).to_be_hidden()


def test_a_pointer_over_a_cell_of_the_confusion_matrix_shows_its_number_of_images(report: Page, run: MadeUpRun) -> None:
    report.locator("#confusion_matrix .role-mark text").nth(9 * 10 + 9).hover()
    said = report.locator("#vg-tooltip-element").inner_text().split()
    assert said == ["label", "9", "prediction", "9", "images", str(run.results.confusion[9, 9])]


def test_a_click_on_the_legend_fades_the_other_curves(report: Page) -> None:
    assert opacities(report) == [1, 1, 1]
    legend = report.locator("#accuracy .role-legend-label text").get_by_text("training", exact=True)
    faded = report.locator("#accuracy .mark-line path[opacity='0.1']")
    legend.click()
    expect(faded).to_have_count(2)
    assert opacities(report) == [0.1, 0.1, 1]
    legend.click()
    expect(faded).to_have_count(0)


def test_every_chart_keeps_its_description_for_screen_readers(report: Page, run: MadeUpRun) -> None:
    descriptions = {str(report.locator(f"#{name}").get_attribute("aria-label")) for name in CHARTS}
    assert len(descriptions) == len(CHARTS)
    assert all(f"![{words}](figures/" in run.report for words in descriptions)


def test_every_section_is_reached_from_the_navigation(report: Page) -> None:
    report.emulate_media(reduced_motion="reduce")  # a click while the page still moves may miss
    for link in report.locator("nav a").all():
        expect(link).to_be_in_viewport(ratio=1)
        name = str(link.get_attribute("href"))
        link.click()
        expect(report.locator(f"{name} h2")).to_be_in_viewport(ratio=1)


def test_a_pointer_over_a_misclassified_digit_shows_what_it_was_taken_for(report: Page) -> None:
    digits = report.locator("#misclassified svg image")
    expect(digits).to_have_count(len(MISTAKES))
    digits.first.hover()
    said = " ".join(report.locator("#vg-tooltip-element").inner_text().split())
    assert said == f"test image 5 label {DIGITS['test'].labels[5]} prediction 3 probability 95.0% label is undisputed"


def test_without_scripts_the_charts_are_images_in_their_places(unscripted: Page) -> None:
    images = unscripted.locator("noscript img")
    expect(images).to_have_count(len(CHARTS))
    for image in images.all():
        box = image.bounding_box()
        assert box
        assert 300 < box["width"] < 600
        assert int(image.evaluate("image => image.naturalWidth")) > 900
    beginnings = unscripted.locator("h2, noscript img").evaluate_all("all => all.map(one => one.offsetLeft)")
    assert beginnings.count(beginnings[0]) == len(beginnings) - 1  # all but that of the accuracy, right of the loss
    assert width_of(unscripted) == 1400


def test_a_dark_screen_prints_all_of_the_page_black_on_white(report: Page, tmp_path: Path) -> None:
    report.emulate_media(color_scheme="dark")
    report.set_viewport_size({"width": A4, "height": 1000})
    report.emulate_media(media="print")
    expect(report.locator("nav")).to_be_hidden()
    assert max(int(number) for number in re.findall(r"\d+", colour_of(report.locator("body")))) < 100
    assert colour_of(report.locator("#misclassified svg image").first, "filter") == "none"
    assert width_of(report) == A4
    cut = report.locator(".table").evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth).length")
    assert cut == 0
    pages = report.pdf(path=tmp_path / "report.pdf", format="A4").count(b"/Type /Page\n")
    assert 5 < pages < 20
