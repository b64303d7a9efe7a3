"""The run of a training under way: how it ends, how it continues, and what happens when the store fails."""

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from support.repository import Repository
from support.stores import EPOCHS, PARAMS, TRAIN, points, store  # noqa: F401 (a fixture)

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import write_text
from mnist_pipeline.common.paths import HISTORY, MODEL
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.model.network import build_model
from mnist_pipeline.tracking import run
from mnist_pipeline.tracking.run import MODEL_TAG
from mnist_pipeline.tracking.store import Store
from mnist_pipeline.tracking.training_run import TrainingRun, training_run


def track(history: Sequence[EpochResult] = (), interrupted: str | None = None) -> AbstractContextManager[TrainingRun]:
    return training_run(TRAIN, {}, build_model(PARAMS.model, seed=0), history, interrupted)


def fail(*_: object, **__: object) -> None:
    raise ConnectionError("no answer")


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_runs_status_says_how_its_training_ended(store: Repository, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), track():
        raise error
    assert [run.info.status for run in store.runs()] == [status]
    with track():
        assert store.runs()[0].info.status == "RUNNING"
    assert store.runs()[0].info.status == "FINISHED"


def test_an_interrupted_run_continues_with_the_epochs_that_it_lacks(store: Repository) -> None:
    with contextlib.suppress(KeyboardInterrupt), track() as first:
        first.log_epoch(EPOCHS[0])
        raise KeyboardInterrupt  # after the second epoch's checkpoint, before it is logged
    with track(EPOCHS, interrupted=first.id) as second:
        assert [run.info.status for run in store.runs()] == ["RUNNING"]
    [run] = store.runs()
    assert run.info.run_id == first.id == second.id
    assert run.info.status == "FINISHED"
    assert store.steps(run) == [1, 2]
    assert set(points(store, run).items()) >= {("monitor_loss", 2), ("learning_rate", 2), ("parameters", 1)}


def test_a_run_killed_in_its_first_epoch_is_taken_up_again(store: Repository) -> None:
    """There is no checkpoint yet, and so nothing but the fingerprint that tells of the run."""
    with track() as killed:
        killed.tracked = None  # nobody closes it
        [begun] = store.runs()
        assert begun.info.status == "RUNNING"
    with track() as again:
        assert again.id == begun.info.run_id
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert points(store, run)["parameters"] == 1


def test_epochs_are_not_logged_twice_if_the_checkpoint_is_lost(store: Repository) -> None:
    with contextlib.suppress(KeyboardInterrupt), track() as first:
        first.log_epoch(EPOCHS[0])
        raise KeyboardInterrupt
    with track() as second:
        for result in EPOCHS:
            second.log_epoch(result)
    [run] = store.runs()
    assert store.steps(run) == store.steps(run, "epoch_seconds") == [1, 2]


def test_a_training_closes_the_runs_that_killed_ones_of_its_workspace_left(store: Repository) -> None:
    """Runs of experiments and of other workspaces stay as they are: their trainings may go on beside this one."""
    for name, variables in {
        "dead": {},
        "experiment": {"DVC_EXP_NAME": "trial"},
        "study": {"MNIST_PARENT_RUN": "0"},
    }.items():
        with mock.patch.dict(os.environ, variables):
            Store().begin_run(replace(TRAIN, command=name))
    elsewhere = Store().begin_run(replace(TRAIN, command="elsewhere"))
    elsewhere.log(tags={"workspace": "another machine:/repository"})
    whole = Store().begin_run(replace(TRAIN, command="whole"))
    whole.log(tags={MODEL_TAG: "0" * 64})  # the store failed to close it
    with track():
        pass
    names = ["dead", "experiment", "study", "elsewhere", "whole", TRAIN.command]
    commands = {replace(TRAIN, command=name).fingerprint: name for name in names}
    statuses = {commands[run.data.tags["fingerprint"]]: run.info.status for run in store.runs()}
    assert statuses == {
        **{"dead": "KILLED", "experiment": "RUNNING", "study": "RUNNING", "elsewhere": "RUNNING", "whole": "FINISHED"},
        TRAIN.command: "FINISHED",
    }


def log_model(root: Path, interrupt: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log a made-up model; with `interrupt`, be killed after that request."""
    write_text(root / HISTORY, "made up")
    write_text(root / MODEL, "made up")
    monkeypatch.setattr(run, "_save_model", lambda model, directory, *_: write_text(directory / "MLmodel", "made up"))
    request = getattr(MlflowClient, interrupt) if interrupt else None

    def die(*arguments: object, **options: object) -> None:
        assert request
        request(*arguments, **options)
        raise SystemExit

    with monkeypatch.context() as patch, track(EPOCHS) as tracked:
        if interrupt:
            patch.setattr(MlflowClient, interrupt, die)
        with contextlib.suppress(SystemExit):
            tracked.log_model(build_model(PARAMS.model, seed=0), MODEL, torch.zeros(2, 1, 28, 28))
        if interrupt:
            tracked.tracked = None


@pytest.mark.parametrize(
    "interrupt", ["create_logged_model", "log_model_artifact", "finalize_logged_model", "log_outputs"]
)
def test_a_training_killed_while_it_logs_its_model_has_one_model_in_the_end(
    store: Repository, interrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_model(store.root, interrupt, monkeypatch)
    log_model(store.root, None, monkeypatch)
    [found] = store.runs()
    [logged] = store.client.search_logged_models([found.info.experiment_id])
    assert logged.status == LoggedModelStatus.READY
    assert [output.model_id for output in found.outputs.model_outputs] == [logged.model_id]
    assert found.info.status == "FINISHED"
    assert MODEL_TAG in found.data.tags
    assert set(points(store, found).values()) == {1, 2}


@pytest.mark.parametrize("fate", ["lost", "deleted"])
def test_a_new_run_with_all_epochs_replaces_one_that_is_gone(store: Repository, fate: str) -> None:
    gone = "0" * 32
    if fate == "deleted":
        with track() as tracked:
            gone = str(tracked.id)
        store.client.delete_run(gone)
    with track(EPOCHS, interrupted=gone):
        pass
    [run] = store.runs()
    assert run.info.run_id != gone
    assert store.steps(run) == [1, 2]


def test_a_training_goes_on_silently_after_one_warning(
    store: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with track() as tracked:
        tracked.log_epoch(EPOCHS[0])
        [begun] = store.runs()
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        tracked.log_epoch(EPOCHS[1])
        monkeypatch.undo()
        tracked.log_epoch(EPOCHS[1])
        tracked.log_model(build_model(PARAMS.model, seed=0), MODEL, torch.zeros(2, 1, 28, 28))
    [line] = capsys.readouterr().err.splitlines()
    assert "(no answer), so this training after epoch 1 is not tracked" in line
    assert tracked.id == begun.info.run_id
    [run] = store.runs()
    assert store.steps(run) == [1]
    assert run.info.status == "RUNNING"


@pytest.mark.parametrize("interrupted", [None, "0" * 32])
@pytest.mark.usefixtures("store")
def test_a_training_whose_run_cannot_begin_keeps_its_old_id(
    capsys: pytest.CaptureFixture[str], interrupted: str | None
) -> None:
    Path("mlflow.db").write_text("no database " * 99)
    with track(interrupted=interrupted) as tracked:
        tracked.log_epoch(EPOCHS[0])
    [line] = capsys.readouterr().err.splitlines()
    assert "mlflow.db is no SQLite database: move it away, and a new one is made), so this training is not" in line
    assert tracked.id == interrupted


@pytest.mark.usefixtures("store")
def test_a_training_ends_if_required_tracking_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    with track() as tracked:
        tracked.log_epoch(EPOCHS[0])
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(UserError, match="after epoch 1"):
            tracked.log_epoch(EPOCHS[1])


@pytest.mark.parametrize("method", ["log_batch", "log_inputs"], ids=["an epoch", "the start"])
def test_a_signal_during_a_request_closes_the_run_as_killed(
    store: Repository, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def train() -> None:
        with track() as tracked:
            monkeypatch.setattr(MlflowClient, method, interrupt)
            tracked.log_epoch(EPOCHS[0])

    if method == "log_inputs":
        monkeypatch.setattr(MlflowClient, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.undo()
    assert [run.info.status for run in store.runs()] == ["KILLED"]


def test_a_failing_store_does_not_hide_what_stopped_a_training(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    monkeypatch.setattr(MlflowClient, "set_terminated", fail)
    with pytest.raises(KeyboardInterrupt), track():
        raise KeyboardInterrupt
