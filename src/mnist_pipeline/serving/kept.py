"""Pictures that `mnist serve --keep` keeps: to check the answers, to train on them, and to see how they differ.

A picture lies in `unlabelled` until somebody labels it, then in a directory named as its class, where `mnist add` finds
it. Each is a PNG of the 28×28 pixels that the network got; its text says when it was read, by which model, and with
which probabilities.
"""

import json
import re
import secrets
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file
from mnist_pipeline.serving.classifier import Prediction

UNLABELLED = "unlabelled"
_MAX_PICTURES = 10_000  # each takes a block of the disk, usually 4 KB
_MAX_BYTES = 100_000  # of one picture's file
_TEXT = "answer"  # the key of the PNG's text


@dataclass(frozen=True)
class KeptPicture:
    """A picture that was kept: the label that somebody gave it, if any, and the probability of each class."""

    label: int | None
    probabilities: list[float]


def directory_of(name: str) -> str:
    """Return the name of the directory for a class: a directory's name cannot have a slash."""
    return name.replace("/", "-")


class KeptPictures:
    """The pictures in a directory, which is made if it is absent.

    With `_MAX_PICTURES` in it, each new picture takes the place of the oldest without a label.

    Raises:
        UserError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, classes: Sequence[str]) -> None:
        self._directory = directory
        self._lock = Lock()
        self._labels = [directory_of(name) for name in classes]
        try:
            (directory / UNLABELLED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot keep pictures ({error.strerror}): name another directory") from None
        self._unlabelled = deque(sorted(path.stem for path in (directory / UNLABELLED).glob("*.png")))
        self._count = sum(1 for _ in directory.glob("*/*.png"))

    def add(self, pixels: NDArray[np.uint8], answer: Prediction, model: str) -> str | None:
        """Keep a picture (28, 28); return its name, or None if there is no room."""
        time = datetime.now(UTC)
        name = f"{time:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"
        text = PngImagePlugin.PngInfo()
        text.add_text(_TEXT, json.dumps({"time": time.isoformat(), "model": model, **vars(answer)}))
        with self._lock:
            if self._count >= _MAX_PICTURES:
                if not self._unlabelled:
                    return None
                self._path(self._unlabelled.popleft()).unlink(missing_ok=True)
                self._count -= 1
            try:
                Image.fromarray(pixels).save(self._path(name), pnginfo=text)
            except OSError as error:
                print(f"warning: a picture cannot be kept ({error})", file=sys.stderr, flush=True)
                return None
            self._unlabelled.append(name)
            self._count += 1
        return name

    def label(self, name: str, label: int) -> bool:
        """Give a picture its label, or another one; return whether there are such a picture and such a label."""
        if not re.fullmatch(r"[\w.-]+", name) or label not in range(len(self._labels)):
            return False
        with self._lock:
            found = [path for place in (UNLABELLED, *self._labels) if (path := self._path(name, place)).exists()]
            if found:
                target = self._path(name, self._labels[label])
                target.parent.mkdir(exist_ok=True)
                found[0].rename(target)
                if name in self._unlabelled:
                    self._unlabelled.remove(name)
        return bool(found)

    def _path(self, name: str, place: str = UNLABELLED) -> Path:
        return self._directory / place / f"{name}.png"


def read_kept_pictures(directory: Path, classes: Sequence[str]) -> Iterator[KeptPicture]:
    """Yield the kept pictures in a directory, by name.

    Raises:
        UserError: a picture is damaged, or was read by a model of other classes.
    """
    labels = {directory_of(name): label for label, name in enumerate(classes)}
    for path in sorted(directory.glob("*/*.png"), key=lambda path: path.name):
        try:
            check_file(path, _MAX_BYTES)
            with Image.open(path, formats=["PNG"]) as picture:
                probabilities = json.loads(picture.info[_TEXT])["probabilities"]
            if len(probabilities) != len(classes):
                raise ValueError(f"its model knows {len(probabilities)} classes")
            yield KeptPicture(labels.get(path.parent.name), [float(probability) for probability in probabilities])
        except (OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a picture that `mnist serve --keep` kept ({error})") from None
