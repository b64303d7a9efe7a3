"""The pipeline in a directory of its own, shrunk to five hundred digits, as a user runs it."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from support import DATA, ROOT

PIPELINE = [
    ".dvc/config",
    ".dvc/plots",
    ".dvcignore",
    ".gitattributes",
    ".gitignore",
    "Makefile",
    "data/added/.gitignore",
    "dvc.yaml",
    "experiments",
    "params.yaml",
    "requirements.lock",
    "src",
    "stages",
]
FIRST_REPRO = ".git/first-repro.txt"  # what the `dvc repro` that trained the fixture `trained` printed
PLACES = {  # columns of MLflow's database that hold the directory of the repository
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "tags": "value",
    "model_versions": "storage_location",
}
REPORTS = [
    "calibration.csv",
    "figures",
    "history.csv",
    "metrics.json",
    "predictions.csv",
    "report.html",
    "report.md",
    "robustness.csv",
]


@dataclass(frozen=True)
class Repository:
    """A directory with the pipeline in it, and no tracking but its own, or that of the server at `uri`."""

    root: Path
    uri: str = ""

    @classmethod
    def create(cls, root: Path, uri: str = "", fresh: bool = False, **params: object) -> "Repository":
        """Copy the pipeline into a directory, with params of the given names (the first of each) set.

        MLflow's database is there, empty, unless the repository is to be as fresh as a clone.
        """
        repository = cls(root, uri)
        for name in PIPELINE:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        shutil.copy(DATA / "SHA256SUMS", root / "data")
        if not (fresh or uri):
            (root / "mlflow.db").write_bytes(empty_database())
        (root / "reports/studies").mkdir(parents=True)
        (root / "reports/studies/.gitkeep").touch()  # as a repository without studies would keep the directory
        for name, value in {"threads": 1, "epochs": 2, "batch_size": 64, **params}.items():
            repository.set_param(name, value)
        return repository

    @classmethod
    def create_with_data(cls, root: Path, uri: str = "", fresh: bool = False, **params: object) -> "Repository":
        """`create` a repository that has its data already: the train stage runs without the download."""
        repository = cls.create(root, uri, fresh, **params)
        shutil.copytree(DATA, root / "data/raw")
        return repository

    def copy(self, root: Path) -> "Repository":
        """Copy the repository as it is, caches and runs included; the copy's runs have their artifacts in the copy."""
        shutil.copytree(self.root, root, symlinks=True, dirs_exist_ok=True)
        if (root / "mlflow.db").exists():
            with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
                for table, column in PLACES.items():
                    change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
                    database.execute(change, (str(self.root), str(root)))
        return Repository(root, self.uri)

    def init(self) -> "Repository":
        """Make it a git repository with one commit."""
        self.run("git", "init", "--quiet").check_returncode()
        self.commit()
        return self

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("DVC_", "MLFLOW_", "MNIST_", "GIT_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": "src",
            "MNIST_DIR": str(DATA),
            "GIT_CEILING_DIRECTORIES": str(self.root.parent),
            **({"MLFLOW_TRACKING_URI": self.uri} if self.uri else {}),
            **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "tests"),
            **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "tests@example.com"),
        }

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[str]":
        """Start a command with what it says, errors too, in one pipe."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end and return its exit code and, as `stdout`, what it said, errors too."""
        process = self.start(*command, **variables)
        said, _ = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, said)

    def dvc(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return self.run("dvc", *arguments, **variables)

    def stage(self, name: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a stage's script without DVC."""
        return self.run(sys.executable, f"stages/{name}.py", **variables)

    def backfill(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        return self.run("mnist", "backfill", **variables)

    def commit(self) -> None:
        self.run("git", "add", "--all").check_returncode()
        self.run("git", "commit", "--quiet", "--message", "Keep").check_returncode()

    def set_param(self, key: str, value: object) -> None:
        """Set the first param of that name, as a user would in an editor."""
        path = self.root / "params.yaml"
        text, count = re.subn(rf"(?m)^( *{key}:) +\S+", rf"\1 {value}", path.read_text(encoding="utf-8"), count=1)
        assert count == 1
        path.write_text(text, encoding="utf-8")

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri or f"sqlite:///{self.root / 'mlflow.db'}")

    def runs(self) -> list[Run]:
        """Return the MLflow runs, the newest first."""
        experiment = self.client.get_experiment_by_name("mnist")
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id]))

    def steps(self, run: Run, metric: str = "train_loss") -> list[int]:
        """Return the epochs for which a run has a metric."""
        return [point.step for point in self.client.get_metric_history(run.info.run_id, metric)]


@cache
def empty_database() -> bytes:
    """Return a database with MLflow's tables, which take seconds to make, and nothing in them."""
    with tempfile.TemporaryDirectory() as directory:
        MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db").search_experiments()
        return (Path(directory) / "mlflow.db").read_bytes()


def after_an_epoch(process: "subprocess.Popen[str]", act: Callable[[], object]) -> str:
    """Do something once the first epoch is whole, and return what the process said."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("Epoch: "):
            act()
            break
    said += process.stdout.read()
    process.wait()
    return said
