"""The page to draw a digit on, in a real browser: mouse, finger and keyboard, small and large screens."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, FileChooser, Page, Route, expect
from support import DATA
from support.browser import browser, page  # noqa: F401 (fixtures)
from support.clothes import CLOTHES, write_clothes_model
from support.running import running

from mnist_pipeline.common.files import sha256
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.serving.classifier import Classifier

pytestmark = pytest.mark.pipeline

Pixels = NDArray[np.uint8]
INVITATION = "Write one digit, as large as you like."


@pytest.fixture(scope="module")
def address(trained_model: Path) -> Iterator[str]:
    with running(trained_model) as address:
        yield address


@pytest.fixture(scope="module")
def digits(trained_model: Path) -> dict[int, Pixels]:
    """Return for each class the test digit that the model reads with the highest probability."""
    classifier, found = Classifier(trained_model), dict[int, tuple[float, Pixels]]()
    test = load_digits(DATA, "test")
    for pixels, label in zip(test.pixels.numpy(), test.labels.tolist(), strict=True):
        probability = classifier.classify(pixels).probabilities[label]
        if probability > found.get(label, (0.5,))[0]:
            found[label] = probability, pixels
    return {label: pixels for label, (_, pixels) in found.items()}


@pytest.fixture
def draw_page(page: Page, address: str) -> Page:
    page.goto(address)
    return page


def strokes(pixels: Pixels) -> Iterator[tuple[float, float, float]]:
    """Yield each row's stretches of ink: begin, end and row, in pixels of the digit."""
    for row, ink in enumerate(pixels > 100):
        edges = np.flatnonzero(np.diff(ink, prepend=False, append=False))
        for begin, end in edges.reshape(-1, 2):
            yield begin + 0.5, end - 0.5, row + 0.5


def draw(page: Page, pixels: Pixels) -> None:
    """Draw a digit (28, 28) with the mouse."""
    box = page.locator("#pad").bounding_box()
    assert box
    unit = box["width"] / 28
    for begin, end, row in strokes(pixels):
        page.mouse.move(box["x"] + begin * unit, box["y"] + row * unit)
        page.mouse.down()
        page.mouse.move(box["x"] + end * unit, box["y"] + row * unit)
        page.mouse.up()


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((200, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def shares(page: Page) -> list[str]:
    return page.locator("#bars .share").all_inner_texts()


def expect_digit(page: Page, digit: int) -> None:
    expect(page.locator("#verdict")).to_have_text(re.compile(rf"^(This is|Probably|Perhaps) an? {digit}\b"))


def expect_nothing(page: Page) -> None:
    expect(page.locator("#verdict")).to_have_text(INVITATION)
    assert shares(page) == [""] * 10
    assert page.locator("[aria-current=true]").count() == 0


def test_it_says_which_model_answers(draw_page: Page, trained_model: Path) -> None:
    said = f"{trained_model} · 19,210 parameters · SHA-256 {sha256(trained_model)[:12]} ·"
    expect(draw_page.locator("#model")).to_have_text(said)
    expect_nothing(draw_page)


@pytest.mark.parametrize("digit", [0, 3])
def test_a_digit_that_is_drawn_is_read(draw_page: Page, digits: dict[int, Pixels], digit: int) -> None:
    draw(draw_page, digits[digit])
    expect_digit(draw_page, digit)
    winner = draw_page.locator("[aria-current=true]")
    assert winner.count() == 1
    assert winner.locator(".digit").inner_text() == str(digit)
    expect(draw_page.locator("#problem")).to_have_text("")


def test_the_probabilities_move_while_drawing(draw_page: Page, digits: dict[int, Pixels]) -> None:
    seen = set()
    for rows in (12, 16, 28):
        draw(draw_page, digits[3][:rows])
        draw_page.wait_for_timeout(500)
        seen.add(tuple(shares(draw_page)))
    assert len(seen) == 3
    assert all(re.fullmatch(r"\d+\.\d%", share) for share in shares(draw_page))
    bar = draw_page.locator("[aria-current=true] .bar")
    assert 0.2 < float(bar.evaluate("bar => bar.style.getPropertyValue('--probability')")) <= 1


def test_it_shows_the_picture_that_the_network_gets(draw_page: Page, digits: dict[int, Pixels]) -> None:
    draw(draw_page, digits[7])
    expect_digit(draw_page, 7)
    seen = draw_page.locator("#seen")
    assert seen.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [28, 28]
    assert seen.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    expect(seen).to_have_attribute("alt", re.compile("network"))


def test_clear_and_undo_work(draw_page: Page, digits: dict[int, Pixels]) -> None:
    draw(draw_page, digits[0])
    expect_digit(draw_page, 0)
    draw_page.get_by_role("button", name="Clear").click()
    expect_nothing(draw_page)

    draw(draw_page, digits[0])
    expect_digit(draw_page, 0)
    before = draw_page.locator("#seen").get_attribute("src")
    draw_page.get_by_role("button", name="Undo").click()
    expect(draw_page.locator("#seen")).not_to_have_attribute("src", before or "")
    for _ in strokes(digits[0]):
        draw_page.keyboard.press("Control+z")
    expect_nothing(draw_page)


class HeldRequests:
    """The requests of a page; each waits until a test lets it go on."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.routes: list[Route] = []
        page.route("**/predict", lambda route: self.routes.append(route))  # noqa: PLW0108 (Playwright marks it)

    def wait(self, count: int) -> Route:
        """Wait until there are so many requests; return the last one."""
        while len(self.routes) < count:
            self.page.wait_for_timeout(20)
        return self.routes[count - 1]


def test_one_request_at_a_time_and_the_last_drawing_wins(draw_page: Page, digits: dict[int, Pixels]) -> None:
    held = HeldRequests(draw_page)
    draw(draw_page, digits[6])
    first_stroke = held.wait(1)
    draw_page.wait_for_timeout(300)
    assert len(held.routes) == 1
    first_stroke.continue_()
    held.wait(2).continue_()
    expect_digit(draw_page, 6)
    assert len(held.routes) == 2


def test_an_answer_about_a_cleared_drawing_is_dropped(draw_page: Page, digits: dict[int, Pixels]) -> None:
    held = HeldRequests(draw_page)
    draw(draw_page, digits[3])
    asked = held.wait(1)
    draw_page.get_by_role("button", name="Clear").click()
    with draw_page.expect_response("**/predict"):
        asked.continue_()
    draw_page.wait_for_timeout(200)
    expect_nothing(draw_page)


def upload(page: Page, name: str, content: bytes) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open image").click()
    chooser.value.set_files({"name": name, "mimeType": "application/octet-stream", "buffer": content})


def test_an_image_can_be_opened(draw_page: Page, digits: dict[int, Pixels]) -> None:
    for digit in (2, 7):
        upload(draw_page, "digit.png", png(digits[digit]))
        expect_digit(draw_page, digit)
    drawn = "pad => new Set(pad.getContext('2d').getImageData(0, 0, pad.width, pad.height).data).size"
    assert draw_page.locator("#pad").evaluate(drawn) > 10  # it shows the picture
    draw_page.get_by_role("button", name="Clear").click()
    expect_nothing(draw_page)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(draw_page: Page, digits: dict[int, Pixels], kind: str) -> None:
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        if (bytes) data.items.add(new File([new Uint8Array(bytes)], "digit.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
        document.body.dispatchEvent(new (kind === "drop" ? DragEvent : ClipboardEvent)(kind, options));
    }"""
    draw_page.evaluate(give, [kind, list(png(digits[8]))])
    expect_digit(draw_page, 8)
    draw_page.evaluate(give, [kind, None])
    expect(draw_page.locator("#problem")).to_have_text(re.compile("no image"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a letter", "no picture"), pytest.param(bytes(5_000_001), "5,000,000 bytes", marks=pytest.mark.thorough)],
)
def test_a_file_that_cannot_be_read_gets_one_line(
    draw_page: Page, digits: dict[int, Pixels], content: bytes, problem: str
) -> None:
    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    upload(draw_page, "letter.txt", content)
    expect(draw_page.get_by_role("alert")).to_have_text(re.compile(problem))
    assert shares(draw_page) == [""] * 10

    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    expect(draw_page.get_by_role("alert")).to_have_text("")


def test_a_service_that_ended_gets_one_line(browser: Browser, address: str, digits: dict[int, Pixels]) -> None:
    page = browser.new_page()
    page.goto(address)
    page.route("**/predict", lambda route: route.abort())
    draw(page, digits[3])
    expect(page.get_by_role("alert")).to_have_text(re.compile("does not answer"))
    page.close()


def test_the_keyboard_reaches_everything_and_shows_the_focus(draw_page: Page, digits: dict[int, Pixels]) -> None:
    reached = []
    for _ in range(4):
        draw_page.keyboard.press("Tab")
        focused = draw_page.locator(":focus")
        reached.append(focused.inner_text())
        assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    assert reached == ["Undo", "Clear", "Open image…", "API"]

    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    draw_page.get_by_role("button", name="Clear").focus()
    draw_page.keyboard.press("Enter")
    expect_nothing(draw_page)
    choosers: list[FileChooser] = []
    draw_page.on("filechooser", lambda chooser: choosers.append(chooser))  # noqa: PLW0108 # it refuses a method
    draw_page.get_by_role("button", name="Open image").focus()
    for _ in range(30):  # a browser opens nothing if it comes to a key press seconds too late
        draw_page.keyboard.press("Space")
        draw_page.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files({"name": "digit.png", "mimeType": "image/png", "buffer": png(digits[3])})
    expect_digit(draw_page, 3)


def test_a_screen_reader_says_which_digit_is_read(draw_page: Page, digits: dict[int, Pixels]) -> None:
    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    status = draw_page.get_by_role("status")
    expect(status).to_have_attribute("aria-live", "polite")
    expect(status).to_have_text(re.compile("3"))
    assert draw_page.get_by_role("list", name="Probabilities").get_by_role("listitem").count() == 10


@pytest.mark.parametrize("width", [360, *(pytest.param(width, marks=pytest.mark.thorough) for width in (768, 1400))])
def test_it_fits_every_screen(draw_page: Page, digits: dict[int, Pixels], width: int) -> None:
    draw_page.set_viewport_size({"width": width, "height": 800})
    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    assert draw_page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#pad", "#clear", "#seen", "#bars"):
        box = draw_page.locator(name).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert draw_page.locator("#pad").evaluate("pad => pad.width / pad.clientWidth") == pytest.approx(1, abs=0.02)


@pytest.mark.thorough
def test_a_finger_draws_and_does_not_scroll(browser: Browser, address: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 500}, has_touch=True, device_scale_factor=3)
    page = context.new_page()
    page.goto(address)
    box = page.locator("#pad").bounding_box()
    assert box
    assert page.locator("#pad").evaluate("pad => pad.width") == pytest.approx(3 * box["width"], abs=2)
    touch = page.context.new_cdp_session(page)
    middle = box["x"] + box["width"] / 2
    for share in np.linspace(0.8, 0.2, 12):
        kind = "touchStart" if share == 0.8 else "touchMove"
        points = [{"x": middle, "y": box["y"] + float(share) * box["height"]}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect_digit(page, 1)
    assert page.evaluate("scrollY") == 0
    context.close()


def brightness(page: Page, script: str) -> float:
    """Return the mean of the red, green and blue that a script returns."""
    red, green, blue = page.evaluate(script)
    return float(red + green + blue) / 3


def test_it_is_dark_if_the_user_prefers_dark(draw_page: Page, digits: dict[int, Pixels]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    ink = """(() => {
        const { width, height } = pad;
        const pixels = pad.getContext("2d").getImageData(0, 0, width, height).data;
        const inked = pixels.findIndex((value, i) => i % 4 === 3 && value === 255);
        return [...pixels.slice(inked - 3, inked)];
    })()"""
    draw(draw_page, digits[3])
    expect_digit(draw_page, 3)
    assert (brightness(draw_page, ground) > 230, brightness(draw_page, ink) < 60) == (True, True)
    draw_page.emulate_media(color_scheme="dark")
    draw_page.wait_for_timeout(500)
    expect_digit(draw_page, 3)
    assert (brightness(draw_page, ground) < 60, brightness(draw_page, ink) > 200) == (True, True)


def test_bars_do_not_move_if_the_user_prefers_no_motion(draw_page: Page) -> None:
    duration = "getComputedStyle(document.querySelector('.bar')).transitionDuration"
    assert draw_page.evaluate(duration) == "0.16s"
    draw_page.emulate_media(reduced_motion="reduce")
    assert draw_page.evaluate(duration) == "0s"


def test_a_model_of_other_classes_shows_their_names_and_reads_pictures_only(page: Page, tmp_path: Path) -> None:
    with running(write_clothes_model(tmp_path)) as address:
        page.goto(address)
        expect(page.locator("h1")).to_have_text("Show an image")
        expect(page.locator("#verdict")).to_have_text("Open, drop or paste an image.")
        assert page.locator("#bars .digit").all_inner_texts() == CLOTHES
        assert not page.locator("#clear").is_visible()
        page.locator("#pad").click()  # draws nothing
        upload(page, "image.png", png(np.full((28, 28), 90, np.uint8)))
        winner = page.locator("[aria-current=true] .digit")
        expect(winner).to_have_count(1)
        expect(page.locator("#verdict")).to_have_text(re.compile(re.escape(winner.inner_text())))


def test_the_page_asks_what_a_kept_picture_shows(
    page: Page, trained_model: Path, digits: dict[int, Pixels], tmp_path: Path
) -> None:
    with running(trained_model, keep=tmp_path) as address:
        page.goto(address)
        draw(page, digits[3])
        page.get_by_role("button", name="8", exact=True).click()
        expect(page.locator("#thanks")).to_have_text("Thank you.")
        assert [path.parent.name for path in tmp_path.glob("*/*.png")] == ["8"]  # once, not at each stroke
        page.locator("#clear").click()
        expect(page.locator("#question")).to_be_hidden()


def test_without_keeping_it_asks_nothing(draw_page: Page, digits: dict[int, Pixels]) -> None:
    draw(draw_page, digits[3])
    draw_page.wait_for_timeout(1500)
    expect_digit(draw_page, 3)
    expect(draw_page.locator("#question")).to_be_hidden()
