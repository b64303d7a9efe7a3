"""One digit is read among what surrounds it in real pictures; what is no digit is refused."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from support import DATA

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.paths import BEST
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.serving.classifier import Classifier
from mnist_pipeline.serving.preprocessing import to_mnist_image

HEIGHT, WIDTH = 360, 440
PAPER, PEN = 215, 50
Scene = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def written(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    """Write in pen on paper: ink from 0 to 1 becomes brightness."""
    return PAPER - (PAPER - PEN) * ink


def drawn(draw: Callable[[ImageDraw.ImageDraw], None]) -> NDArray[np.float64]:
    """Return which pixels are drawn: 0 to 1."""
    image = Image.new("L", (WIDTH, HEIGHT))
    draw(ImageDraw.Draw(image))
    return np.asarray(image) / 255


def lines(draw: ImageDraw.ImageDraw, slant: int = 0, upright: bool = False) -> None:
    for at in range(-20, 500, 28):
        ends = [(at, 0), (at + slant, HEIGHT)] if upright else [(0, at), (WIDTH, at + slant)]
        draw.line(ends, fill=255, width=2)


def squares(draw: ImageDraw.ImageDraw) -> None:
    lines(draw, slant=6)
    lines(draw, slant=-6, upright=True)


def half_in_shade(light: NDArray[np.float64]) -> NDArray[np.float64]:
    y, x = np.indices(light.shape)
    return np.where(y > 250 - 0.4 * x, 0.45, 1) * light


def neighbours(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    """Put the ends of two other digits at the picture's edges."""
    others = np.zeros_like(ink)
    others[60:220, :20] = others[150:190, -26:] = 1
    return np.maximum(ink, others)


def with_axes(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    frame = drawn(lambda draw: draw.rectangle((80, 30, 380, 330), outline=255, width=2))
    ticks = drawn(lambda draw: [draw.line((72, y, 80, y), fill=255, width=2) for y in range(60, 330, 60)] and None)
    return np.maximum(np.maximum(frame, ticks), ink)


def on_a_page(photo: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.pad(0.6 * photo, 90, constant_values=255)


def on_a_dark_table(sheet: NDArray[np.float64]) -> NDArray[np.float64]:
    page = Image.fromarray(np.pad(sheet, 20, constant_values=40)).rotate(
        8, Image.Resampling.BILINEAR, True, fillcolor=40
    )
    return np.asarray(page)


def with_a_margin(draw: ImageDraw.ImageDraw) -> None:
    lines(draw)
    draw.line([(60, 0), (60, HEIGHT)], fill=255, width=2)


def beside_the_table(page: NDArray[np.float64]) -> NDArray[np.float64]:
    page = page.copy()
    page[:, 400:] = page[330:] = 70
    return page


SCENES: dict[str, Scene] = {
    "plain paper": written,
    "ruled paper": lambda ink: np.minimum(written(ink), 215 - 70 * drawn(lines)),
    "ruled paper, turned": lambda ink: np.minimum(written(ink), 215 - 70 * drawn(lambda draw: lines(draw, slant=30))),
    "ruled paper with a margin": lambda ink: np.minimum(written(ink), 215 - 70 * drawn(with_a_margin)),
    "squared paper": lambda ink: np.minimum(written(ink), 215 - 60 * drawn(squares)),
    "a blackboard with lines": lambda ink: np.maximum(40 + 190 * ink, 40 + 60 * drawn(lines)),
    "the edge of the paper": lambda ink: beside_the_table(written(ink)),
    "a sheet, turned, on a table": lambda ink: on_a_dark_table(written(ink)),
    "a hard shadow": lambda ink: half_in_shade(written(ink)),
    "neighbours at the edge": lambda ink: written(neighbours(ink)),
    "a figure with axes": lambda ink: 255 - 235 * with_axes(ink),
    "a grey photo on a page": lambda ink: on_a_page(written(ink)),
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(BEST)


def photo(brightness: NDArray[np.float64]) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 2, brightness.shape)
    return Image.fromarray((brightness + noise).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_a_digit_is_read_among_what_surrounds_it(classifier: Classifier, scene: Scene) -> None:
    digits = load_digits(DATA, "test")
    read = []
    for pixels in digits.pixels.numpy()[:10]:
        ink = np.zeros((HEIGHT, WIDTH))
        ink[80:248, 130:298] = np.asarray(Image.fromarray(pixels).resize((168, 168), Image.Resampling.BICUBIC)) / 255
        read.append(classifier.classify(to_mnist_image(photo(scene(ink)))).digit)
    assert read == digits.labels[:10].tolist()


@pytest.mark.parametrize("blur", [0, 6])
@pytest.mark.parametrize("invert", [False, True])
def test_a_digit_without_a_margin_is_read(classifier: Classifier, blur: int, invert: bool) -> None:
    digits = load_digits(DATA, "test")
    read = []
    for pixels in digits.pixels.numpy()[:10]:
        rows, columns = (np.flatnonzero((pixels > 60).any(axis=axis)) for axis in (1, 0))
        digit = Image.fromarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        tight = digit.resize((digit.width * 9, digit.height * 9), Image.Resampling.BICUBIC)
        levels = np.asarray(tight.filter(ImageFilter.GaussianBlur(blur)))
        read.append(classifier.classify(to_mnist_image(Image.fromarray(255 - levels if invert else levels))).digit)
    assert read == digits.labels[:10].tolist()


@pytest.mark.parametrize("width", [4, 10, 30])
@pytest.mark.parametrize("ends", [(110, 310, 310, 110), (200, 60, 200, 340)], ids=["slanted", "upright"])
def test_a_straight_stroke_is_no_frame(ends: tuple[int, ...], width: int) -> None:
    stroke = 255 - 255 * drawn(lambda draw: draw.line(ends, fill=255, width=width))
    assert to_mnist_image(Image.fromarray(stroke.astype(np.uint8))).max() == 255


def under_a_lamp(light: NDArray[np.float64]) -> NDArray[np.float64]:
    y, x = np.indices(light.shape)
    return (0.5 + 0.5 * np.exp(-((x - 200) ** 2 + (y - 150) ** 2) / 110**2)) * light


NO_DIGIT = {
    "blank paper": np.full((HEIGHT, WIDTH), PAPER),
    "blank paper in a shadow": half_in_shade(np.full((HEIGHT, WIDTH), PAPER)),
    "blank ruled paper": 215 - 60 * drawn(lines),
    "blank squared paper": 215 - 60 * drawn(squares),
    "an empty box": 215 - 160 * drawn(lambda draw: draw.rectangle((130, 80, 300, 250), outline=255, width=4)),
    "blank paper under a lamp": under_a_lamp(np.full((HEIGHT, WIDTH), PAPER)),
    "a fingertip on blank paper": 215 - 60 * drawn(lambda draw: draw.ellipse((380, 120, 480, 200), fill=255)),
}


@pytest.mark.parametrize("brightness", NO_DIGIT.values(), ids=NO_DIGIT.keys())
def test_paper_without_a_digit_is_refused(brightness: NDArray[np.float64]) -> None:
    with pytest.raises(UserError, match="the picture holds no digit"):
        to_mnist_image(photo(brightness))


@pytest.mark.parametrize("place", [np.hstack, np.vstack])
def test_more_than_one_digit_is_refused(place: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    with pytest.raises(UserError, match="more than one digit: cut out one"):
        to_mnist_image(Image.fromarray(np.pad(place(load_digits(DATA, "test").pixels.numpy()[:2]), 20)))
