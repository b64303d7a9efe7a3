"""A file is written whole or not at all, and what a killed process left of one goes with the next write."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ROOT
from support.working_tree import git

from mnist_pipeline.common.files import files_below, write_bytes, write_text

DIE = """
import os, signal, sys
from pathlib import Path
from mnist_pipeline.common.files import write_text
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "half")
"""


@pytest.mark.parametrize("name", ["models/model.safetensors", "reports/report.md", "odd [name]*.csv"])
def test_what_a_killed_process_left_is_ignored_and_goes_with_the_next_write(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_text(path, "old")
    killed = subprocess.run([sys.executable, "-c", DIE, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_text() == "old"
    [left] = [file for file in path.parent.iterdir() if file != path]
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    git("init", "--quiet", directory=tmp_path)
    assert git("check-ignore", str(left), directory=tmp_path) == str(left)
    assert left.name not in files_below(path.parent)
    write_text(path, "new")
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(f".{path.name}")] == []
    assert path.read_text() == "new"


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = [".report.md.swp", ".report.md.~1~", ".report.mdx.12345678", "report.md.12345678"]
    for name in others:
        (tmp_path / name).touch()
    write_text(tmp_path / "report.md", "new")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "report.md"}


def test_processes_that_write_the_same_file_at_once_do_not_disturb_one_another(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                write_bytes(tmp_path / "file", content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() in contents


@pytest.mark.parametrize(("umask", "of_file", "of_directory"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_new_files_and_directories_obey_the_umask(tmp_path: Path, umask: int, of_file: int, of_directory: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "new/file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new/file").stat().st_mode) == of_file
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == of_directory
