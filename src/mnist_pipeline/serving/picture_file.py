"""Open a file that should be a picture, whatever it holds."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pi_heif
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_pipeline.common.errors import UserError

MAX_BYTES = 200_000_000  # of a picture's file
MAX_PIXELS = 50_000_000  # larger pictures are not decoded; Pillow holds each pixel in up to 4 bytes
_MAX_SIDE = 20_000  # pixels: a picture of one column costs ten times as much memory for each pixel
_MAX_SCANS = 100  # of a JPEG: it is decoded once for each of its scans, which may hold nothing
# Not every format that Pillow reads: some are decoded in Python, or hold other files whose size nothing limits. An icon
# is decoded before its size is known. EPS is here only to say why it is refused.
_WANTED = ["AVIF", "BMP", "EPS", "GIF", "HEIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
_LARGE_ENOUGH = (500, 500)  # pixels: a JPEG that is larger is decoded at a fraction of its size
pi_heif.register_heif_opener()  # iPhones take such pictures
Image.init()
PICTURE_FORMATS = [name for name in _WANTED if name in Image.OPEN]


@contextmanager
def name_in_errors(name: object) -> Iterator[None]:
    """Turn errors about a file inside the block into a UserError that begins with its name."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def open_image(source: BinaryIO | bytes) -> Image.Image:
    """Decode the first frame of a picture in one of PICTURE_FORMATS, turned upright.

    A large JPEG is decoded at a fraction of its size, but no smaller than `to_mnist_image` needs it.

    Raises:
        UserError: it is not a picture, is damaged or too large.
    """
    content = source if isinstance(source, bytes) else source.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"the picture's file is too large: up to {MAX_BYTES:,} bytes are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
            if image.format == "EPS":
                raise UserError("the picture is PostScript, a program that is not run: convert it to PNG")
            _check_size(*image.size)
            if image.format == "JPEG" and content.count(b"\xff\xda") > _MAX_SCANS:
                raise UserError(f"the picture has more than {_MAX_SCANS} scans: save it as a baseline JPEG or as PNG")
            image.draft(None, _LARGE_ENOUGH)
            image.load()
            _check_size(*image.im.size)  # a header may say less
            ImageOps.exif_transpose(image, in_place=True)
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"the picture is too large: up to {MAX_PIXELS:,} pixels are read") from None
        except UnidentifiedImageError:
            raise UserError("this is no picture in a known format, such as PNG or JPEG") from None
        except Exception as error:  # damaged bytes lead Pillow's decoders to errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the picture is damaged or incomplete: it cannot be decoded ({reason})") from None
    return image


def _check_size(width: int, height: int) -> None:
    """Raise a UserError if a picture of these sides is not to be decoded."""
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"the picture has {width:,}×{height:,} pixels: 1 to {MAX_PIXELS:,} are read")
    if max(width, height) > _MAX_SIDE:
        raise UserError(f"the picture has {width:,}×{height:,} pixels: sides of up to {_MAX_SIDE:,} are read")
