"""Changes to a working tree, and what git says there."""

import subprocess
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path], None]


def git(*arguments: str, directory: Path | None = None) -> str:
    """Run git in a directory, or here; return what it prints."""
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def edit(path: str, old: str, new: str) -> Change:
    def change(repository: Path) -> None:
        text = (repository / path).read_text(encoding="utf-8")
        assert old in text
        (repository / path).write_text(text.replace(old, new), encoding="utf-8")

    return change


def write(path: str) -> Change:
    def change(repository: Path) -> None:
        (repository / path).parent.mkdir(exist_ok=True)
        (repository / path).write_text("written")

    return change


def append(path: str) -> Change:
    """Append a comment to a file."""

    def change(root: Path) -> None:
        with (root / path).open("a", encoding="utf-8") as file:
            file.write("# changed\n")

    return change
