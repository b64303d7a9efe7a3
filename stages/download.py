"""Download MNIST's four files to data/raw, verify them, and print how many images they hold."""

import sys

sys.path.insert(0, "src")  # this directory's package: DVC runs experiments in copies of the repository

from mnist_pipeline.common.errors import run
from mnist_pipeline.common.paths import DIGESTS, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.data.download import download, read_digests


def main() -> None:
    download(RAW, read_digests(DIGESTS))
    for part in ("train", "test"):
        digits = load_digits(RAW, part)
        print(f"{part}: {len(digits):,} images, by class from 0 to 9: {digits.per_class()}")


if __name__ == "__main__":
    run(main)
