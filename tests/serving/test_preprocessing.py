"""Any picture of a digit is brought to MNIST's form; the digits of MNIST themselves are the measure."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import DATA

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.serving.picture_file import MAX_PIXELS, open_image
from mnist_pipeline.serving.preprocessing import to_mnist_image

Pixels = NDArray[np.uint8]

WHITE, BLACK, RED, GREEN, NAVY, YELLOW = (
    (255, 255, 255),
    (0, 0, 0),
    (220, 30, 30),
    (30, 140, 30),
    (0, 0, 90),
    (255, 240, 0),
)


@pytest.fixture(scope="module")
def digits() -> Pixels:
    return load_digits(DATA, "test").pixels.numpy()


def enlarged(digit: Pixels, factor: int = 8) -> Pixels:
    return np.kron(digit, np.ones((factor, factor), np.uint8))


def mean_difference(picture: Image.Image, digit: Pixels) -> float:
    return float(np.abs(to_mnist_image(picture).astype(int) - digit).mean())


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(digit: Pixels, ink: tuple[int, ...], paper: tuple[int, ...]) -> Image.Image:
    """Draw a digit in one colour on another, mixed where the digit is grey."""
    amount = enlarged(digit)[..., None] / 255
    return Image.fromarray(np.rint(amount * ink + (1 - amount) * paper).astype(np.uint8))


def transparent(digit: Pixels, ink: tuple[int, ...], hidden: tuple[int, ...] = BLACK) -> Image.Image:
    """Draw a digit on a transparent background, under which the colour `hidden` lies."""
    alpha = enlarged(digit)
    colours = np.where(alpha[..., None] > 0, ink, hidden).astype(np.uint8)
    return Image.fromarray(np.dstack([colours, alpha]))


def test_a_digit_of_mnist_keeps_its_pixels(digits: Pixels) -> None:
    for digit in digits:
        assert np.abs(to_mnist_image(Image.fromarray(digit)).astype(int) - digit).max() <= 1  # 254 becomes 255


UNCHANGING = {
    "enlarged": enlarged,
    "enlarged to 420 pixels": lambda digit: enlarged(digit, 15),
    "inverted": lambda digit: 255 - digit,
    "in a corner": lambda digit: np.pad(digit, ((0, 200), (100, 0))),
    "inverted in a wide margin": lambda digit: 255 - np.pad(enlarged(digit), 60),
    "in a wide picture": lambda digit: np.pad(enlarged(digit, 2), ((0, 0), (10, 400))),
}


@pytest.mark.parametrize("change", UNCHANGING.values(), ids=UNCHANGING.keys())
def test_size_polarity_and_place_do_not_matter(digits: Pixels, change: Callable[[Pixels], Pixels]) -> None:
    for digit in digits[:20]:
        assert np.abs(to_mnist_image(Image.fromarray(change(digit))).astype(int) - digit).max() <= 1


@pytest.mark.parametrize("ink", [BLACK, WHITE, RED, YELLOW])
@pytest.mark.parametrize("hidden", [BLACK, WHITE, GREEN])
def test_ink_of_any_colour_is_found_on_a_transparent_background(
    digits: Pixels, ink: tuple[int, ...], hidden: tuple[int, ...]
) -> None:
    for digit in digits[:10]:
        assert mean_difference(transparent(digit, ink, hidden), digit) < 1


@pytest.mark.parametrize(("ink", "paper"), [(RED, GREEN), (YELLOW, WHITE), (WHITE, NAVY), (NAVY, BLACK), (BLACK, RED)])
def test_ink_of_any_colour_is_found_on_paper_of_another(
    digits: Pixels, ink: tuple[int, ...], paper: tuple[int, ...]
) -> None:
    for digit in digits[:10]:
        assert mean_difference(drawn(digit, ink, paper), digit) < 2


def floats(scale: float, offset: float) -> Callable[[Pixels], Image.Image]:
    return lambda digit: Image.fromarray(digit.astype(np.float32) * scale + offset)


def with_holes(digit: Pixels) -> Image.Image:
    picture = np.pad(digit, 5).astype(np.float32)
    picture[0, 0], picture[1, 1], picture[2, 2] = np.nan, np.inf, -np.inf
    return Image.fromarray(picture)


MODES = {
    "16 bits": lambda digit: Image.fromarray(digit.astype(np.uint16) * 257),
    "16 bits, of which 12 are used": lambda digit: Image.fromarray(4095 - digit.astype(np.uint16) * 16),
    "16 bits, big-endian": lambda digit: Image.frombytes("I;16B", (28, 28), digit.astype(">u2").tobytes()),
    "32 bits": lambda digit: Image.fromarray(digit.astype(np.int32) * 1000),
    "floats from 0 to 1": floats(1 / 255, 0),
    "large floats below zero": floats(-1e30, 0),
    "floats, some no numbers": with_holes,
    "CMYK": lambda digit: Image.fromarray(255 - digit).convert("CMYK"),
    "YCbCr": lambda digit: Image.fromarray(digit).convert("RGB").convert("YCbCr"),
    "HSV": lambda digit: Image.fromarray(digit).convert("RGB").convert("HSV"),
    "LA": lambda digit: Image.merge("LA", (Image.new("L", (28, 28), 255), Image.fromarray(digit))),
    "RGBA, all opaque": lambda digit: Image.fromarray(255 - digit).convert("RGBA"),
    "RGBX": lambda digit: Image.fromarray(digit).convert("RGBX"),
    "grey palette": lambda digit: Image.fromarray(digit).convert("P"),
    "palette and alpha": lambda digit: Image.fromarray(digit).convert("P").convert("PA"),
}


@pytest.mark.parametrize("convert", MODES.values(), ids=MODES.keys())
def test_every_mode_is_read(digits: Pixels, convert: Callable[[Pixels], Image.Image]) -> None:
    for digit in digits[:10]:
        assert mean_difference(convert(digit), digit) < 2


@pytest.mark.parametrize("ink", [BLACK, WHITE, RED])
def test_a_palette_with_a_transparent_entry_is_read(digits: Pixels, ink: tuple[int, ...]) -> None:
    picture = Image.fromarray(np.where(enlarged(digits[0]) > 127, 1, 0).astype(np.uint8), "P")
    picture.putpalette([*ink, *ink])
    loaded = open_image(encoded(picture, transparency=0))
    assert loaded.mode == "P"
    assert mean_difference(loaded, digits[0]) < 12  # grey levels are lost


def test_a_picture_of_one_bit_is_read(digits: Pixels) -> None:
    picture = Image.fromarray(enlarged(digits[0])).convert("1", dither=Image.Dither.NONE)
    assert mean_difference(picture, digits[0]) < 12  # grey levels are lost


def test_the_longer_side_becomes_20_pixels_and_the_shorter_keeps_its_ratio() -> None:
    picture = np.full((300, 400), 255, np.uint8)
    picture[50:150, 300:340] = 0  # 40 wide, 100 high
    expected = np.zeros((28, 28), np.uint8)
    expected[4:24, 10:18] = 255
    assert np.array_equal(to_mnist_image(Image.fromarray(picture)), expected)


def test_the_centre_of_mass_is_in_the_middle() -> None:
    picture = np.zeros((100, 100), np.uint8)
    picture[10:30, 10:15] = 255  # an L of 20×20: 20 pixels by 5 above, 15 by 5 beside its foot
    picture[25:30, 15:30] = 255
    placed = to_mnist_image(Image.fromarray(picture)).astype(float)
    # Its columns have mean (100·2.5 + 75·12.5) / 175 = 6.79, its rows (100·10 + 75·17.5) / 175 = 13.21.
    assert (np.flatnonzero(placed.any(axis=0))[0], np.flatnonzero(placed.any(axis=1))[0]) == (8, 1)


def test_a_digit_far_from_its_centre_of_mass_stays_whole() -> None:
    picture = np.zeros((100, 100), np.uint8)
    picture[20:80, 10:20] = 255
    picture[48:52, 10:70] = 255  # a hammer: its handle would reach beyond the right edge
    columns = np.flatnonzero(to_mnist_image(Image.fromarray(picture)).any(axis=0))
    assert (columns[0], columns[-1]) == (8, 27)


def test_edges_between_pixels_become_grey() -> None:
    picture = np.zeros((200, 200), np.uint8)
    picture[20:120, 50:102] = 255  # five pixels for one: 20 high, 10.4 wide
    columns = to_mnist_image(Image.fromarray(picture))[14]
    assert columns[columns > 0].tolist() == [255] * 10 + [102]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_by_its_exif_orientation(digits: Pixels, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(enlarged(digits[3]))
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    content = encoded(stored, "PNG", exif=exif)
    assert mean_difference(open_image(content), digits[3]) < 1
    assert mean_difference(Image.open(io.BytesIO(content)), digits[3]) < 1


def lit(light: NDArray[np.float64], digit: Pixels) -> Image.Image:
    """Light a picture of a digit; its ink takes 60% of the light."""
    ink = np.asarray(Image.fromarray(digit).resize((light.shape[1], light.shape[0]), Image.Resampling.BICUBIC)) / 255
    return Image.fromarray((light * (1 - 0.6 * ink)).clip(0, 255).astype(np.uint8))


# A shift by one pixel makes a mean difference of 16, another digit one of 40.


def test_uneven_light_makes_no_difference(digits: Pixels) -> None:
    y, x = np.mgrid[-1:1:280j, -1:1:280j]
    light = 140 + 60 * x - 30 * y - 25 * (x * x + y * y)  # ink in the light is brighter than paper in the shade
    even = [to_mnist_image(lit(np.full_like(light, 200), digit)).astype(int) for digit in digits[:50]]
    found = [to_mnist_image(lit(light, digit)) for digit in digits[:50]]
    assert np.abs(np.subtract(found, even)).mean() < 5


def test_noise_and_dust_do_not_move_a_digit(digits: Pixels) -> None:
    random = np.random.default_rng(0)
    differences = []
    for digit in digits[:20]:
        noisy = 255 - np.pad(enlarged(digit, 10), 100) + random.normal(0, 12, (480, 480))
        for top, left in random.integers(0, 478, (5, 2)):
            noisy[top : top + 2, left : left + 2] = 60
        differences.append(mean_difference(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), digit))
    assert np.mean(differences) < 6


BLANK = {
    "white": Image.new("L", (280, 280), 255),
    "black": Image.new("RGB", (28, 28)),
    "transparent": Image.new("RGBA", (280, 280)),
    "transparent over colours": Image.fromarray(
        np.dstack([np.arange(30_000).reshape(100, 100, 3) % 251, np.zeros((100, 100))]).astype(np.uint8)
    ),
    "one pixel": Image.new("RGB", (1, 1), RED),
    "one column": Image.new("L", (1, 3000), 7),
    "floats all alike": Image.new("F", (28, 28), 0.3),
    "no numbers": Image.new("F", (28, 28), float("nan")),
    "gradient": Image.linear_gradient("L"),
    "noise": Image.fromarray(np.random.default_rng(0).normal(128, 20, (300, 300)).astype(np.uint8)),
    "barely visible": Image.fromarray(np.pad(np.full((10, 10), 205, np.uint8), 9, constant_values=200)),
}


@pytest.mark.parametrize("picture", BLANK.values(), ids=BLANK.keys())
def test_a_blank_picture_is_refused(picture: Image.Image) -> None:
    with pytest.raises(UserError, match=r"^the picture holds no digit: nothing in it stands out from its background$"):
        to_mnist_image(picture)


def test_the_original_picture_is_not_changed(digits: Pixels) -> None:
    picture = Image.fromarray(enlarged(digits[0], 30))
    before = picture.tobytes()
    to_mnist_image(picture)
    assert (picture.size, picture.tobytes()) == ((840, 840), before)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"])
def test_a_picture_is_read_in_every_format_from_a_file_and_from_bytes(digits: Pixels, kind: str) -> None:
    content = encoded(Image.fromarray(enlarged(digits[0])), kind)
    picture = open_image(content)
    assert open_image(io.BytesIO(content)).tobytes() == picture.tobytes()
    assert mean_difference(picture, digits[0]) < 5


def test_a_picture_from_an_iphone_is_read(digits: Pixels) -> None:
    # pillow_heif.from_pillow(Image.fromarray(enlarged(digits[3], 4)).convert("RGB")).save("digit.heic", quality=60)
    content = Path(__file__).with_name("digit.heic").read_bytes()
    assert mean_difference(open_image(content), digits[3]) < 5


def test_only_the_first_frame_is_read(digits: Pixels) -> None:
    frames = [Image.fromarray(enlarged(digit)) for digit in digits[:3]]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert mean_difference(open_image(content), digits[0]) < 2


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(digits: Pixels) -> None:
    large = Image.fromarray(255 - np.asarray(Image.fromarray(digits[0]).resize((4000, 4000), Image.Resampling.BICUBIC)))
    picture = open_image(encoded(large, "JPEG"))
    assert picture.size == (500, 500)
    assert mean_difference(picture, digits[0]) < 12


def png_header(width: int, height: int) -> bytes:
    """Return the start of a PNG that announces this size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    checked = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


def jpeg_of_scans(count: int) -> bytes:
    """Return a JPEG whose last scan comes as many times."""
    content = encoded(Image.new("L", (16, 16)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + count * content[last:-2] + content[-2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
REFUSED = {
    "empty": (b"", "no picture in a known format"),
    "text": (b"seven\n", "no picture in a known format"),
    "web page": (b"<!DOCTYPE html><html></html>", "no picture in a known format"),
    "vector graphics": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture in a known format"),
    "PostScript": (EPS, "PostScript, a program that is not run: convert it to PNG"),
    "too many pixels": (png_header(10_000, 5_001), "10,000×5,001 pixels: 1 to 50,000,000 are read"),
    "twice too many": (png_header(10_000, 10_000), "too large: up to 50,000,000 pixels are read"),
    "decompression bomb": (png_header(100_000, 100_000), "too large: up to 50,000,000 pixels are read"),
    "a side too long": (png_header(1, 20_001), "1×20,001 pixels: sides of up to 20,000 are read"),
    "an icon": (encoded(Image.new("L", (16, 16)), "ICO"), "this is no picture in a known format"),
    "a JPEG of many scans": (jpeg_of_scans(101), "more than 100 scans"),
    "header only": (png_header(28, 28), "damaged or incomplete"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_content_that_is_not_a_picture_is_refused_in_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as refused:
        open_image(content)
    assert len(str(refused.value).splitlines()) == 1


def test_as_many_pixels_as_allowed_are_read() -> None:
    assert open_image(encoded(Image.new("1", (10_000, MAX_PIXELS // 10_000)))).size == (10_000, 5000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_half_a_picture_is_refused(digits: Pixels, kind: str) -> None:
    content = encoded(Image.fromarray(enlarged(digits[0])), kind)
    with pytest.raises(UserError, match="damaged or incomplete"):
        open_image(content[: len(content) // 2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3), (3, 2000), (99, 101), (501, 499), (28, 28)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_noise_of_any_shape_is_a_digit_or_refused(shape: tuple[int, int], channels: int) -> None:
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for density in (0.001, 0.1, 0.5, 1):
            values = random.integers(0, 256, (*shape, channels), dtype=np.uint8)
            values *= random.random((*shape, 1)) < density
            try:
                pixels = to_mnist_image(Image.fromarray(values.squeeze(2) if channels == 1 else values))
            except UserError:
                continue
            assert (pixels.shape, pixels.dtype, pixels.max()) == ((28, 28), np.uint8, 255)
