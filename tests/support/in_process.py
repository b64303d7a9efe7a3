"""Stages and commands in the tests' own process: each start of Python, torch and MLflow would cost seconds."""

import io
import os
import runpy
import subprocess
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from unittest import mock

import mlflow

from mnist_pipeline.common import errors
from mnist_pipeline.tracking.backfill import backfill_run
from support.repository import Repository


@contextmanager
def inside(repository: Repository, **variables: str) -> Iterator[None]:
    """Work in a repository with the environment of its commands; MLflow forgets the store that it used before."""
    with mock.patch.dict(os.environ, repository.environment | variables, clear=True), chdir(repository.root):
        mlflow.set_tracking_uri(None)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)


def run_inside(
    repository: Repository, program: Callable[[], object], **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a program as a process of its own would; return its exit code and what it printed, errors too."""
    printed, code = io.StringIO(), 0
    with (
        inside(repository, **variables),
        redirect_stdout(printed),
        redirect_stderr(printed),
        mock.patch("signal.signal"),  # the tests' process keeps its own handlers
    ):
        try:
            program()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):  # Python prints a message and ends with 1
                print(end.code)
    return subprocess.CompletedProcess([], code, printed.getvalue())


def run_stage(repository: Repository, name: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Do what `Repository.stage` does."""
    script = str(repository.root / f"stages/{name}.py")
    return run_inside(repository, lambda: runpy.run_path(script, run_name="__main__"), **variables)


def run_backfill(repository: Repository, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Do what `Repository.backfill` does."""
    return run_inside(repository, lambda: errors.run(backfill_run), **variables)
