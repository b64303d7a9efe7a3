"""What `make` does around the commands: it sets .venv up, and tells DVC where there is no git."""

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import install
import pytest
from support import ROOT

PYPROJECT = """
[build-system]
requires = ["flit-core"]
build-backend = "flit_core.buildapi"
[project]
name = "pipeline"
version = "1"
description = "A pipeline"
dependencies = [
    "torch>=2.9,<=2.14.1",
    "torchvision>=0.24,<=0.29.1",
]
scripts = { pipeline = "pipeline:main" }
"""
UNREACHABLE = "http://user:secret@127.0.0.1:9/simple"


def write_wheel(directory: Path, name: str, version: str, tag: str, files: dict[str, bytes]) -> str:
    """Write a wheel and return what a lock file says of it."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = directory / f"{stem}-{tag}.whl"
    info = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    info["WHEEL"] = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n"
    info["RECORD"] = "".join(
        f"{file},,\n" for file in [*files, *(f"{stem}.dist-info/{part}" for part in [*info, "RECORD"])]
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in {
            **files,
            **{f"{stem}.dist-info/{part}": text.encode() for part, text in info.items()},
        }.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = (stat.S_IFREG | 0o755) << 16  # uv is a program
            wheel.writestr(entry, content)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def pack(directory: Path, name: str) -> str:
    """Write the wheel of a package that is installed here."""
    package = importlib.metadata.distribution(name)
    [tag] = re.findall(r"(?m)^Tag: (.+)$", package.read_text("WHEEL") or "")[:1]
    files = {}
    for file in package.files or ():
        if ".." in file.parts:
            files[f"{name}-{package.version}.data/scripts/{file.name}"] = Path(str(file.locate())).read_bytes()
        elif ".dist-info" not in str(file) and file.suffix != ".pyc":
            files[str(file)] = Path(str(file.locate())).read_bytes()
    return write_wheel(directory, name, package.version, tag, files)


@dataclass(frozen=True)
class Project:
    """A directory with this project's Makefile and set-up."""

    root: Path
    variables: dict[str, str]

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        foreign = ("PIP_", "UV_", "TORCH", "GIT_", "MAKE", "MFLAGS")  # `make test` runs these tests
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return subprocess.Popen(
            ["make", *arguments],
            cwd=self.root,
            env=kept | {"GIT_CEILING_DIRECTORIES": str(self.root.parent)} | self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # as a terminal does, to interrupt all at once
        )

    def make(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Return make's exit code and what is printed, without make's own line about a failure."""
        process = self.start(*arguments, **variables)
        said, _ = process.communicate(timeout=300)
        return process.returncode, [line for line in said.splitlines() if not line.startswith("make: ***")]

    def lock(self, name: str, content: str) -> None:
        (self.root / f"requirements{name}.lock").write_text(content, encoding="utf-8")

    def check(self, **extras: str) -> None:
        """Check that the right packages are installed, all their files are there, and the project's command runs."""
        [packages] = (self.root / ".venv").glob("lib/python*/site-packages")
        found = list(importlib.metadata.distributions(path=[str(packages)]))
        versions = {package.name: package.version for package in found if package.name in (*PACKAGES, *extras)}
        assert versions == PACKAGES | extras
        assert [
            file for package in found for file in package.files or () if not Path(str(file.locate())).exists()
        ] == []
        command = subprocess.run([self.root / ".venv/bin/pipeline"], capture_output=True, text=True, check=True)
        assert command.stdout == "it works\n"


PACKAGES = {"first": "1", "torch": "2.14.1", "torchvision": "0.29.1", "nvidia-cublas": "13.1", "pipeline": "1"}


def write_pure_wheel(directory: Path, name: str, version: str) -> str:
    return write_wheel(directory, name, version, "py3-none-any", {f"{name.replace('-', '_')}.py": b"# a module"})


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is not set up, in a directory with a space and an accent. Its registry is a directory."""
    wheels, root = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("the projét")
    for file in ("Makefile", "install.py"):
        shutil.copy(ROOT / file, root)
    (root / "pipeline.py").write_text('"""A pipeline."""\n\n\ndef main():\n    print("it works")\n', encoding="utf-8")
    (root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    registry = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}  # uv takes pip's settings
    project = Project(root, registry | {"PIP_CONFIG_FILE": os.devnull, "UV_CACHE_DIR": str(wheels / "cache")})
    project.lock("-setup", pack(wheels, "uv") + pack(wheels, "flit-core"))
    project.lock("", "".join(write_pure_wheel(wheels, *item) for item in PACKAGES.items() if item[0] != "pipeline"))
    project.lock("-onnx", write_pure_wheel(wheels, "second", "2"))
    write_pure_wheel(wheels, "third", "3")
    project.lock("-cluster", "")
    project.lock("-dev", "")
    return project


@pytest.fixture(scope="module")
def project(fresh: Project) -> Project:
    code, said = fresh.make("setup")
    assert code == 0, said
    return fresh


@pytest.fixture
def copy(fresh: Project, tmp_path: Path) -> Project:
    """Another project that is not set up."""
    shutil.copytree(fresh.root, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv"))
    return replace(fresh, root=tmp_path / "copy")


# The set-up


@pytest.mark.pipeline
def test_a_set_up_installs_what_the_lock_names_and_a_second_one_does_nothing(project: Project) -> None:
    project.check()
    assert project.make("setup") == (0, [])


@pytest.mark.pipeline
def test_an_unreachable_registry_is_one_line_and_what_is_installed_stays(project: Project) -> None:
    registry = {"PIP_NO_INDEX": "false", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": UNREACHABLE}
    code, said = project.make("onnx", **registry, UV_HTTP_RETRIES="0")
    assert code != 0
    assert len(said) == 1
    assert re.fullmatch(
        r"error: \.venv cannot be set up: .*http://127\.0\.0\.1:9 Connection refused \(os error 111\)", said[0]
    )
    assert project.make("setup") == (0, [])
    assert project.make("onnx")[0] == 0
    project.check(second="2")


@pytest.mark.pipeline
def test_the_first_set_up_without_a_registry_is_one_line(copy: Project) -> None:
    registry = {"PIP_NO_INDEX": "false", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": UNREACHABLE}
    code, said = copy.make("setup", **registry)
    assert code != 0
    assert [line for line in said if not line.startswith("Setting up .venv")] == [said[-1]]
    assert said[-1].startswith("error: .venv cannot be set up: the package registry does not answer: ")
    assert "secret" not in said[-1]


@pytest.mark.pipeline
def test_a_package_with_another_hash_is_refused(project: Project) -> None:
    project.lock("-cluster", f"third==3 --hash=sha256:{0:064}\n")
    code, said = project.make("cluster")
    project.lock("-cluster", "")
    assert code != 0
    assert len(said) == 1
    assert "Hash mismatch for `third==3`" in said[0]


@pytest.mark.pipeline
def test_a_set_up_waits_for_another_one_and_not_for_one_that_was_killed(project: Project) -> None:
    project.lock("-cluster", "# changed\n")
    with (project.root / "install.py").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = project.start("cluster")
        assert waiting.stdout
        assert waiting.stdout.readline() == "another process is setting up .venv: waiting for it\n"
        assert waiting.poll() is None
    assert waiting.wait(60) == 0


@pytest.mark.thorough
@pytest.mark.pipeline
@pytest.mark.parametrize("seen", ["pip/__init__.py", "flit_core*", "uv*", "torch*"])
def test_a_set_up_that_was_killed_starts_again(copy: Project, seen: str) -> None:
    first = copy.start("setup")
    while not list(copy.root.glob(f".venv/lib/python*/site-packages/{seen}")):
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert copy.make("setup")[0] == 0
    copy.check()


@pytest.mark.thorough
@pytest.mark.pipeline
def test_a_moved_project_is_set_up_again(copy: Project, tmp_path: Path) -> None:
    assert copy.make("setup")[0] == 0
    moved = replace(copy, root=copy.root.rename(tmp_path / "moved"))
    assert moved.make("setup")[0] == 0
    moved.check()


@pytest.mark.thorough
@pytest.mark.pipeline
def test_another_torch_replaces_the_locks_and_stays(copy: Project, tmp_path: Path) -> None:
    write_pure_wheel(tmp_path, "torch", "2.9.0+cpu")
    code, said = copy.make("setup", f"TORCH='{tmp_path}/torch-2.9.0+cpu-py3-none-any.whl'")
    assert code == 0, said
    copy.lock("", (copy.root / "requirements.lock").read_text(encoding="utf-8") + "# changed\n")
    assert copy.make("setup")[0] == 0
    [packages] = (copy.root / ".venv").glob("lib/python*/site-packages")
    found = {package.name: package.version for package in importlib.metadata.distributions(path=[str(packages)])}
    assert found["torch"] == "2.9.0+cpu"
    assert found["torchvision"] == "0.29.1"
    assert "nvidia-cublas" not in found
    code, said = copy.make("setup", "TORCH=torch==2.8")
    assert code != 0
    assert "torch>=2.9,<=2.14.1" in said[-1]


def test_a_python_that_is_too_old_or_lacks_venv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(install.SetupError, match=r"lacks venv: install .* python3-venv$"):
        install.main([])
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(install.SetupError, match=r"^Python 3\.11 or newer is needed, .* is 3\.9: make PYTHON=…$"):
        install.main([])


# DVC and git


@pytest.fixture
def source(tmp_path: Path) -> Project:
    """The project as an archive holds it, without git."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc")
    return Project(tmp_path, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def local_config(project: Project) -> str:
    path = project.root / ".dvc/config.local"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.pipeline
def test_dvc_works_without_git_until_the_directory_becomes_a_repository(source: Project) -> None:
    assert source.make("--old-file=setup", "scm") == (0, [])
    assert "no_scm = true" in local_config(source)
    subprocess.run(["git", "init", "--quiet"], cwd=source.root, check=True)
    assert source.make("--old-file=setup", "scm") == (0, [])
    assert "no_scm" not in local_config(source)


@pytest.mark.pipeline
def test_a_repository_that_git_refuses_gets_a_warning_and_stays_one(source: Project) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=source.root, check=True)
    (source.root / ".dvc/config.local").write_text("[core]\n    no_scm = true\n", encoding="utf-8")  # as once written
    code, said = source.make("--old-file=setup", "scm", GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert code == 0
    assert len(said) == 1
    assert said[0].startswith("warning: runs get no commit, because git says: fatal: detected dubious ownership")
    assert "git config --global --add safe.directory" in said[0]
    assert "no_scm" not in local_config(source)


def test_ctrl_c_says_that_make_repro_goes_on(source: Project) -> None:
    programs = source.root / ".venv/bin"
    programs.mkdir(parents=True)
    for name, script in {"mnist": "", "dvc": "trap 'exit 255' INT; echo running; while :; do sleep 0.1; done"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    subprocess.run(["git", "init", "--quiet"], cwd=source.root, check=True)
    process = source.start("--old-file=setup", "repro")
    assert process.stdout
    while process.stdout.readline() != "running\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert "interrupted: make repro goes on from there" in said.splitlines()
    assert process.returncode != 0
