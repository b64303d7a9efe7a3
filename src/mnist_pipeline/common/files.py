"""Reading files, and writing them whole or not at all."""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from mnist_pipeline.common.errors import UserError

_IGNORED = ("__pycache__", ".ipynb_checkpoints", ".DS_Store", ".*.sw?", "*~", ".*.????????")  # as in .dvcignore
_MAX_TEXT_BYTES = 100_000_000


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new one, never a part.

    The bytes reach the disk before the new name does, so this holds even if the power fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):  # another process has replaced the file meanwhile, and swept this one
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-z_]' * 8}"):  # by a process that was killed
            left.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # name the file, not the temporary one


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with equal keys as CSV; the keys are the header. The file is written whole or not at all."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_file(path: Path, max_bytes: int) -> None:
    """Check that a path leads to a regular file of limited size; reading a pipe or a device may never end.

    Raises:
        OSError: it does not.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    if found.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes:,} bytes", str(path))


def read_text(path: Path) -> str:
    """Read a stage's output.

    Raises:
        UserError: it is absent or is not UTF-8 text.
    """
    try:
        check_file(path, _MAX_TEXT_BYTES)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): `dvc repro` makes it") from None


def read_csv(path: Path) -> list[dict[str, float]]:
    """Read a table of numbers under a header as one dictionary for each row."""
    return [{name: float(value) for name, value in row.items()} for row in read_table(path)]


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a table of text under a header as one dictionary for each row."""
    return list(csv.DictReader(io.StringIO(read_text(path))))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(directory: Path) -> dict[str, Path]:
    """Return the files below a directory by their relative paths, sorted, without those that .dvcignore names."""
    files = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(fnmatch(part, pattern) for part in name.parts for pattern in _IGNORED)
    }


def sha256_of_directory(directory: Path) -> str:
    """Return the SHA-256 of the lines that `sha256sum` prints for the files below a directory."""
    lines = [f"{sha256(path)}  {name}\n" for name, path in files_below(directory).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
