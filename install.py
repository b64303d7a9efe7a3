"""Set up .venv for `make`: pip installs uv, and uv installs what the lock files name. A second call installs nothing.

    python3 install.py [cluster] [onnx] [dev]

TORCH=… in the environment replaces the lock file's torch; its value is what `uv pip install` takes.
"""

from __future__ import annotations  # an older Python must read this file to say that it is too old

import ast
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
STAMP = VENV / "installed"  # says what is installed: nothing while a set-up works, and after one that was killed
SETUP, PIPELINE, PROJECT = "requirements-setup.lock", "requirements.lock", "pyproject.toml"
EXTRAS = {name: [f"requirements-{name}.lock"] for name in ("cluster", "onnx", "dev")}
EXTRAS["dev"] += EXTRAS["cluster"] + EXTRAS["onnx"]  # the tests need them
# uv does not read pip's settings; these variables tell it the same.
PIP_SETTINGS = {
    "cert": "SSL_CERT_FILE",
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "no-index": "UV_OFFLINE",
    "trusted-host": "UV_INSECURE_HOST",
}


class SetupError(Exception):
    """What went wrong, in one line."""


def main(extras: list[str]) -> None:
    """Install what is missing. One process at a time does this; the others wait for it."""
    files = [SETUP, PIPELINE, PROJECT, *dict.fromkeys(file for extra in extras for file in EXTRAS[extra])]
    _check_python()
    installed = _read_stamp()
    if _missing(installed, _wanted(files, installed)):
        with _lock():
            _install(files)


def _read_stamp() -> dict[str, str]:
    """Return what is installed: the digest of each file, the directory of .venv, and the other torch, if any."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
        return stamp if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def _wanted(files: list[str], installed: dict[str, str]) -> dict[str, str]:
    """Return what the stamp must say. A torch that was chosen once stays."""
    digests = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in files}
    return {"directory": str(ROOT), "torch": os.environ.get("TORCH", installed.get("torch", "")), **digests}


def _missing(installed: dict[str, str], wanted: dict[str, str]) -> set[str]:
    return {name for name, value in wanted.items() if installed.get(name) != value}


def _check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036
        found = f"{sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(f"Python 3.11 or newer is needed, {found}: make PYTHON=…")
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"{sys.executable} lacks venv: install the system's package for it, such as python3-venv")


@contextmanager
def _lock() -> Iterator[None]:
    """Lock this file. The kernel releases the lock when this process and those that it started have ended."""
    with Path(__file__).open("r+b") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is setting up .venv: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(files: list[str]) -> None:
    installed = _read_stamp()
    wanted = _wanted(files, installed)
    if {"directory", "torch"} & _missing(installed, wanted):  # a new clone or a moved one, or a killed set-up
        size = "" if wanted["torch"] else ": minutes and, with torch's CUDA libraries, 6 GB of disk"
        print(f"Setting up .venv{size}", flush=True)
        # .venv's own Python, which may be the first on the PATH, cannot make .venv again.
        _run([os.path.realpath(sys.executable), "-m", "venv", "--clear", VENV])
        installed = {}
    missing = _missing(installed, wanted)
    if not missing:  # another process was quicker
        return
    [packages] = VENV.glob("lib/python*/site-packages")
    before = packages.stat().st_mtime_ns
    _write_stamp({"torch": wanted["torch"]})
    try:
        _install_missing(missing, wanted["torch"])
    except BaseException:
        if packages.stat().st_mtime_ns == before:  # nothing has been changed
            _write_stamp(installed or {"torch": wanted["torch"]})
        raise
    _write_stamp(installed | wanted)


def _install_missing(missing: set[str], torch: str) -> None:
    if SETUP in missing:
        _run([PYTHON, "-m", "pip", "install", "--retries=2", "--require-hashes", "--requirement", SETUP])
    install: list[str | Path] = [VENV / "bin/uv", "pip", "install", "--python", PYTHON, "--build-constraints", SETUP]
    settings = _uv_settings()
    if locks := sorted(file for file in missing - {SETUP} if file.endswith(".lock")):
        text = "".join((ROOT / file).read_text(encoding="utf-8") for file in locks)
        if torch:
            text = re.sub(r"(?m)^(torch|torchvision|triton|nvidia-.*|cuda-.*)==.*\n( .*\n)*", "", text)
        (VENV / "requirements.txt").write_text(text, encoding="utf-8")
        hashes = ["--no-deps", "--require-hashes", "--require-build-hashes"]
        _run([*install, *hashes, "--requirement", VENV / "requirements.txt"], settings)
    if torch and PIPELINE in missing:
        bounds = re.findall(r'"(torch(?:vision)?>=.*?)"', (ROOT / PROJECT).read_text(encoding="utf-8"))
        _run([*install, *bounds, *shlex.split(torch)], settings)
    if PROJECT in missing:
        _run([*install, "--no-deps", "--offline", "--no-build-isolation", "--editable", ROOT], settings)


def _write_stamp(content: dict[str, str]) -> None:
    new = STAMP.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    new.replace(STAMP)


def _uv_settings() -> dict[str, str]:
    """Return variables for uv: what pip's configuration says of the registry, and a cache that can be written."""
    settings = {"UV_SYSTEM_CERTS": "true"}
    found = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    for section in ("global", "install", ":env:"):  # the last one counts
        for name, value in re.findall(rf"(?m)^{section}\.([\w-]+)=(.*)$", found):
            if name in PIP_SETTINGS:
                words = ast.literal_eval(value).split()
                settings[PIP_SETTINGS[name]] = ("," if name == "find-links" else " ").join(words)
    cache = subprocess.run(
        [VENV / "bin/uv", "cache", "dir"], capture_output=True, text=True, check=False
    ).stdout.strip()
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        usable = os.access(cache, os.W_OK)
    except OSError:
        usable = False
    return settings if usable else settings | {"UV_CACHE_DIR": str(VENV / "cache")}


def _run(command: Sequence[str | Path], settings: dict[str, str] | None = None) -> None:
    """Run a command and pass on what it says about its progress; if it fails, raise its error in one line."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=(settings or {}) | os.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        close_fds=False,  # the lock lasts as long as the command
    )
    said: list[str] = []
    large: set[str] = set()
    for line in process.stdout or said:
        progress = re.match(r" *(Downloading|Downloaded|Prepared|Installed) (\S+)(.*\d\d\.\d ?M)?", line)
        if progress is None:
            said.append(line)
        elif progress[3] or progress[2] in large or not progress[1].startswith("Down"):
            large.add(progress[2])
            print(line, end="", flush=True)
    if process.wait() != 0:
        raise SetupError(f".venv cannot be set up: {_in_one_line(said)}")


def _in_one_line(said: list[str]) -> str:
    """Return an error without warnings and hints, and with only the scheme, the host and the port of an address."""
    text = "".join(said)
    reason = ["the package registry does not answer"] if "connection broken by" in text else []
    text = re.sub(r"(?ims)\A.*?^error: ", "", text, count=1).split("\nhint: ")[0]
    lines = [
        line for line in (re.sub(r"^\s*(cause: |ERROR: )?", "", line).strip() for line in text.splitlines()) if line
    ]
    text = ": ".join(dict.fromkeys([*reason, *lines[:2], *lines[-1:]]))
    return re.sub(r"(\w+://)(?:\S*@)?([^/?\s]*)\S*", r"\1\2", text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SetupError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: make setup goes on from there", file=sys.stderr)
        sys.exit(130)
