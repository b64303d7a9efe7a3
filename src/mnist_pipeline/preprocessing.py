"""Any picture of a digit as MNIST would hold it: white on black, scaled and centred in 28×28 pixels."""

import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_pipeline.errors import UserError

SIDE = 28  # pixels, of an MNIST image
BOX = 20  # pixels, of the square within it that a digit is scaled to fit
MAX_PIXELS = 50_000_000  # of a picture that is decoded at all
WORKING_SIZE = 500  # pixels, that the longer side is shrunk to before anything is computed
COARSE_SIZE = 100  # pixels, on which noise and dust are averaged away
SAMPLES = 48  # in each direction, that the background is fitted to
FAINTEST = 8  # levels of 255 that ink differs from its background
FAINT = 0.12  # of the strongest ink: paler borders, such as JPEG's ringing, do not count as the digit's extent

Array = NDArray[np.float32]


def open_image(source: Path | BinaryIO | bytes) -> Image.Image:
    """Decode the first frame of a picture in any format that Pillow reads, turned upright.

    A large JPEG is decoded at a fraction of its size, as large as `normalize` needs it.

    Raises:
        UserError: it is absent, no picture, damaged, or of more than MAX_PIXELS.
    """
    name = str(source) if isinstance(source, Path) else "the picture"
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name a picture, such as a PNG or a JPEG") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            check(image, name)
            image.draft(None, (WORKING_SIZE, WORKING_SIZE))
            image.load()
            return ImageOps.exif_transpose(image)
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"{name} is too large: at most {MAX_PIXELS:,} pixels are read") from None
        except UnidentifiedImageError:
            raise UserError(f"{name} is no picture in a format that is known: PNG and JPEG are") from None
        except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name} cannot be decoded ({reason}): is it complete?") from None


def check(image: Image.Image, name: str) -> None:
    """Refuse what should not be decoded, going by the picture's header.

    Raises:
        UserError: it has no pixels or too many, or is a program, which PostScript is.
    """
    if image.format == "EPS":
        raise UserError(f"{name} is PostScript, which is not run: convert it to PNG")
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width:,} × {image.height:,} pixels: from 1 to {MAX_PIXELS:,} pixels are read"
        )


def normalize(image: Image.Image) -> NDArray[np.uint8]:
    """Return a digit in a picture of any size, mode and colours as MNIST would hold it: (28, 28), 0 to 255.

    The digit is the ink that differs most from the background, whose light may be uneven. It is scaled to fit 20×20
    pixels with its aspect ratio, grey levels coming from anti-aliasing, and placed with its centre of mass in the
    middle of 28×28 (LeCun et al., 1998, doi:10.1109/5.726791; yann.lecun.com/exdb/mnist).

    Raises:
        UserError: nothing in the picture stands out from its background.
    """
    return place(find_ink(to_array(image)))


def to_array(image: Image.Image) -> Array:
    """Return a picture, upright and at most WORKING_SIZE, as (height, width, channels) of 0 to 255.

    Transparency is a channel like the colours, which are multiplied by it: so ink of any colour, the black of an empty
    pixel included, differs from a transparent background.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = image.convert("F")
    elif image.has_transparency_data:
        image = image.convert("RGBA").convert("RGBa")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    if image.mode != "F":
        return pixels
    pixels = np.nan_to_num(pixels, nan=0, posinf=0, neginf=0)
    low, high = float(pixels.min()), float(pixels.max())  # of a range that the mode does not tell
    return ((pixels - low) * (255 / ((high - low) or 1))).astype(np.float32)


def find_ink(pixels: Array) -> Array:
    """Return how much ink there is in each pixel (height, width) of a picture (height, width, channels), 0 for none.

    Raises:
        UserError: there is none.
    """
    difference = pixels - background(pixels)
    coarse = shrink(difference)
    # Ink that is mixed with its background by anti-aliasing lies on the line between both colours. The cube makes it
    # the line, and the direction on it, of what differs most.
    direction = np.einsum("hwc,hw->c", coarse, np.square(coarse).sum(axis=2))
    direction /= np.linalg.norm(direction) or 1
    ink, coarse_ink = difference @ direction, coarse @ direction
    peak = float(coarse_ink.max())
    if peak < max(FAINTEST, 6 * noise(coarse_ink)):
        raise UserError("the picture holds no digit: nothing in it stands out from its background")
    near = grow(coarse_ink > max(peak / 4, 5 * noise(coarse_ink)))
    rows = np.arange(ink.shape[0]) * near.shape[0] // ink.shape[0]
    columns = np.arange(ink.shape[1]) * near.shape[1] // ink.shape[1]
    found: Array = np.where(near[np.ix_(rows, columns)] & (ink > 3 * noise(ink)), ink, np.float32(0))
    return found


def background(pixels: Array) -> Array:
    """Fit a surface of second degree to each channel of a picture, leaving out what stands out from it.

    It starts from the median of the picture's border and fits again and again to the pixels near the last surface.
    """
    height, width, channels = pixels.shape
    every = (slice(None, None, -(-height // SAMPLES)), slice(None, None, -(-width // SAMPLES)))
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij", sparse=True)
    terms = np.stack(np.broadcast_arrays(1, x, y, x * x, x * y, y * y), axis=2).astype(np.float32)
    basis = terms[every].reshape(-1, 6)
    samples = pixels[every].reshape(-1, channels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    coefficients = np.zeros((6, channels), np.float32)
    coefficients[0] = np.median(border, axis=0)
    for _ in range(8):
        distance = np.abs(samples - basis @ coefficients).max(axis=1)
        kept = basis[distance <= max(1, 3 * float(np.median(distance)))]
        values = samples[distance <= max(1, 3 * float(np.median(distance)))]
        coefficients = np.linalg.lstsq(kept.T @ kept, kept.T @ values)[0]
    surface: Array = terms @ coefficients
    return surface


def noise(values: Array) -> float:
    """Estimate the standard deviation of values, most of which are zero but for noise (their median deviation)."""
    return 1.4826 * float(np.median(np.abs(values)))


def shrink(values: Array) -> Array:
    """Average (height, width, channels) over squares, so that the longer side is at most COARSE_SIZE or so."""
    factor = max(1, max(values.shape[:2]) // COARSE_SIZE)
    bands = [Image.fromarray(band).reduce(factor) for band in np.moveaxis(values, 2, 0)]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add the eight neighbours of each pixel of a mask."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def place(ink: Array) -> NDArray[np.uint8]:
    """Scale ink (height, width) to fit 20×20 and set its centre of mass in the middle of 28×28."""
    extent = ink > FAINT * ink.max()
    rows, columns = np.flatnonzero(extent.any(axis=1)), np.flatnonzero(extent.any(axis=0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(digit.shape)
    corner = []
    for axis, length in enumerate(digit.shape):
        mass = digit.sum(axis=1 - axis)
        centre = scale * float(mass @ (np.arange(length) + 0.5)) / float(mass.sum())
        # Whole pixels, as in MNIST, so that a digit's edge stays as sharp as it is.
        corner.append(min(max(round(SIDE / 2 + 0.5 - centre), 0), SIDE - math.ceil(scale * length)))
    margin = math.ceil(SIDE / scale)
    canvas = Image.fromarray(np.pad(digit, margin))
    top, left = (margin - offset / scale for offset in corner)
    window = (left, top, left + SIDE / scale, top + SIDE / scale)
    placed = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.HAMMING, box=window))
    pixels: NDArray[np.uint8] = np.rint(placed * (255 / placed.max())).clip(0, 255).astype(np.uint8)
    return pixels
