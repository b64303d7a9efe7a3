"""A run after a training, a later stage in an edited tree, and a stage whose model has no run."""

import contextlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import mlflow
import pytest
import torch
from mlflow.entities import Run
from support import DATA, ROOT
from support.repository import Repository
from support.stores import (
    EPOCHS,
    EVALUATE,
    PARAMS,
    TESTED,
    TRAIN,
    artifacts,
    files_in,
    isolated_tracking,
    points,
    store,  # noqa: F401 (a fixture)
)
from support.working_tree import git

from mnist_pipeline.common.files import sha256, write_csv, write_json, write_text
from mnist_pipeline.common.params import flatten
from mnist_pipeline.common.paths import FIGURES, HISTORY, METRICS, MODEL
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model, save_model
from mnist_pipeline.model.network import build_model
from mnist_pipeline.model.networks.convolutional import Net
from mnist_pipeline.tracking.provenance import Provenance, describe_machine
from mnist_pipeline.tracking.store import Store
from mnist_pipeline.tracking.training_run import training_run

NONE = DATA / "absent"  # no additions


@dataclass(frozen=True)
class Scenario:
    """What a training, a later stage in an edited tree, and a stage without a run leave behind."""

    store: Repository
    copy: Path
    parts: dict[str, Digits]
    run: Run
    count: int
    printed: str
    model: Net

    @property
    def logged_model(self) -> Path:
        [directory] = self.store.root.glob("mlartifacts/models/*/artifacts")
        return directory


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """Work in a copy of a repository, as `dvc exp run --temp` does."""
    store, copy = Repository(tmp_path_factory.mktemp("root")), tmp_path_factory.mktemp("copy")
    (copy / "code.py").write_text("committed\n")
    shutil.copy(ROOT / "params.yaml", copy)
    git("init", "--quiet", directory=copy)
    git("add", "--all", directory=copy)
    git("commit", "--quiet", "--message", "Begin", directory=copy)
    parts = load_training_data(DATA, NONE, PARAMS.data.model_copy(update={"validation_size": 50}), seed=0)
    model = build_model(PARAMS.model, seed=0)
    with isolated_tracking(store.root) as patch:
        patch.chdir(copy)
        patch.setenv("DVC_ROOT", str(store.root))
        with training_run(TRAIN, parts, model, [], None) as tracked:
            for result in EPOCHS:
                tracked.log_epoch(result)
            write_csv(HISTORY, [result.row() for result in EPOCHS])
            save_model(model, MODEL, PARAMS.model, PARAMS.data)
            tracked.log_model(model, MODEL, example=torch.randn(2, 1, 28, 28))

        (copy / "code.py").write_text("edited\n")
        write_json(METRICS, TESTED)
        write_text(FIGURES / "curves.png", "made up")
        parts["test"] = load_digits(DATA, "test")
        Store().add_to_run_of(MODEL, EVALUATE, {"test": parts["test"]})

        write_text(Path("models/unknown"), "of no run")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            Store().add_to_run_of(Path("models/unknown"), EVALUATE)
        [run] = store.runs()
        yield Scenario(store, copy, parts, run, len(store.runs()), printed.getvalue(), load_model(MODEL).network)


def test_a_run_has_its_stages_params(scenario: Scenario) -> None:
    assert scenario.run.data.params == {
        "seed": "0",
        "threads": "1",
        "train.learning_rate": "0.001",
        "train.optimizer": "adam",
        "evaluate.batch_size": "1000",
    }


def test_a_later_stages_other_value_of_a_param_becomes_a_tag(scenario: Scenario) -> None:
    assert scenario.run.data.tags["threads"] == "2"
    assert "seed" not in scenario.run.data.tags


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("learning_rate", [0.001, 0.0005]),
        ("train_loss", [0.5, 0.25]),
        ("train_accuracy", [250 / 300, 280 / 300]),
        ("monitor_loss", [0.25, 0.125]),
        ("monitor_accuracy", [0.95, 0.975]),
    ],
)
def test_a_run_has_each_epochs_metrics(scenario: Scenario, metric: str, values: list[float]) -> None:
    history = scenario.store.client.get_metric_history(scenario.run.info.run_id, metric)
    assert [(point.step, point.value) for point in history] == list(enumerate(values, start=1))


def test_a_run_has_the_parameter_count_and_how_long_an_epoch_took(scenario: Scenario) -> None:
    assert scenario.run.data.metrics["parameters"] == 19_210
    assert 0 <= scenario.run.data.metrics["epoch_seconds"] < 60


def test_later_stages_add_the_metrics_of_their_files(scenario: Scenario) -> None:
    found = {name: value for name, value in scenario.run.data.metrics.items() if name.startswith("test")}
    assert found == {name: value for name, value in flatten(TESTED).items() if name != "parameters"}


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("stage", "train"),
        ("fingerprint", TRAIN.fingerprint),
        ("data_sha256", TRAIN.data_sha256),
        ("git_dirty", "false"),
        ("backfilled", "none"),
        ("kernels", "AVX2"),
        ("evaluate.fingerprint", EVALUATE.fingerprint),
    ],
)
def test_tags_say_where_a_run_comes_from(scenario: Scenario, tag: str, value: str) -> None:
    assert scenario.run.data.tags[tag] == value


def test_tags_name_the_commit_the_workspace_and_the_model(scenario: Scenario) -> None:
    tags = scenario.run.data.tags
    assert tags["git_commit"] == git("rev-parse", "HEAD", directory=scenario.copy)
    assert tags["workspace"] == f"{platform.node()}:{scenario.store.root}"
    assert tags["model_sha256"] == sha256(scenario.copy / MODEL)
    assert "dvc_experiment" not in tags


@pytest.mark.parametrize(("use", "images"), [("train", 250), ("monitor", 50), ("test", 200)])
def test_a_run_names_the_images_that_it_used(scenario: Scenario, use: str, images: int) -> None:
    [dataset] = [found.dataset for found in scenario.run.inputs.dataset_inputs if found.tags[0].value == use]
    digest = scenario.parts[use].sha256()
    assert dataset.digest == digest[:36]
    assert json.loads(dataset.profile) == {
        "num_rows": images,
        "per_class": scenario.parts[use].per_class(),
        "sha256": digest,
    }


def test_each_dataset_has_its_use_as_its_only_tag(scenario: Scenario) -> None:
    tags = [[(tag.key, tag.value) for tag in found.tags] for found in scenario.run.inputs.dataset_inputs]
    assert sorted(tags) == [[("mlflow.data.context", use)] for use in ("monitor", "test", "train")]


def test_a_run_keeps_outputs_under_their_paths_and_a_patch_only_of_an_edited_tree(scenario: Scenario) -> None:
    outputs = {str(MODEL), str(HISTORY), str(METRICS), str(FIGURES / "curves.png")}
    of_stages = {f"provenance/{name}" for name in ("train.json", "evaluate.json", "evaluate.patch")}
    assert files_in(artifacts(scenario.run)) == outputs | of_stages
    for output in outputs:
        assert (artifacts(scenario.run) / output).read_bytes() == (scenario.copy / output).read_bytes()


@pytest.mark.parametrize("provenance", [TRAIN, EVALUATE], ids=lambda provenance: provenance.stage)
def test_a_run_keeps_all_that_is_known_of_each_stage(scenario: Scenario, provenance: Provenance) -> None:
    kept = json.loads((artifacts(scenario.run) / f"provenance/{provenance.stage}.json").read_text(encoding="utf-8"))
    is_training = provenance is TRAIN
    assert kept == asdict(provenance) | {
        "fingerprint": provenance.fingerprint,
        "params_sha256": provenance.params_sha256,
        "git_commit": scenario.run.data.tags["git_commit"],
        "git_dirty": "false" if is_training else "true",
        **({"machine": describe_machine()} if is_training else {"backfilled": False}),
    }


def test_the_patch_says_what_was_edited(scenario: Scenario) -> None:
    patch = (artifacts(scenario.run) / "provenance/evaluate.patch").read_text(encoding="utf-8")
    assert patch.endswith("-committed\n+edited\n")


def test_a_model_without_a_run_is_reported_and_not_logged(scenario: Scenario) -> None:
    assert "models/unknown" in scenario.printed
    assert len(scenario.printed.splitlines()) == 1
    assert scenario.count == 1


def test_everything_is_kept_at_the_root_that_dvc_names(scenario: Scenario) -> None:
    assert {path.name for path in scenario.store.root.iterdir()} - {"mlflow.db.lock"} == {"mlflow.db", "mlartifacts"}
    assert {path.name for path in scenario.copy.iterdir()} == {".git", "code.py", "params.yaml", "models", "reports"}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_logged_model_predicts_as_the_weights_do(scenario: Scenario, count: int) -> None:
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))
    predicted = mlflow.pyfunc.load_model(str(scenario.logged_model)).predict(images.numpy())
    assert torch.allclose(torch.as_tensor(predicted), predict(scenario.model, images, count), atol=1e-5)


def test_the_logged_model_belongs_to_the_run(scenario: Scenario) -> None:
    [logged] = scenario.store.client.search_logged_models([scenario.run.info.experiment_id])
    assert logged.source_run_id == scenario.run.info.run_id
    assert logged.name == "model"


def contents(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Find a file's content, and the files in it, if it is a zip archive, and in those."""
    yield name, content
    if zipfile.is_zipfile(archive := io.BytesIO(content)):
        with zipfile.ZipFile(archive) as opened:
            for member in opened.namelist():
                yield from contents(f"{name}/{member}", opened.read(member))


def test_the_logged_model_contains_no_pickle_and_no_path_of_this_machine(scenario: Scenario) -> None:
    files = [file for file in scenario.logged_model.rglob("*") if file.is_file()]
    found = dict(pair for file in files for pair in contents(file.name, file.read_bytes()))
    assert any("weight" in name for name in found)
    assert [name for name in found if name.endswith((".pkl", ".pickle"))] == []
    assert [name for name, content in found.items() if content.startswith(b"\x80")] == []  # how each pickle begins
    places = [
        str(ROOT),
        str(scenario.store.root),
        str(scenario.copy),
        sys.prefix,
        sys.base_prefix,
        tempfile.gettempdir(),
    ]
    assert [name for name, content in found.items() if any(place.encode() in content for place in places)] == []


def test_the_logged_model_has_the_last_metrics_on_the_images_they_were_measured_on(scenario: Scenario) -> None:
    experiments = [scenario.run.info.experiment_id]
    [logged] = scenario.store.client.search_logged_models(experiments, "metrics.test_accuracy > 0.98")
    assert scenario.store.client.search_logged_models(experiments, "metrics.test_accuracy > 0.99") == []
    values = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in logged.metrics}
    assert len(values) == len(logged.metrics)
    assert {name: value for name, (value, _, _) in values.items()} == scenario.run.data.metrics
    for use in ("train", "monitor", "test"):
        dataset = (f"mnist-{use}", scenario.parts[use].sha256()[:36])
        assert {on for name, (_, *on) in values.items() if name.startswith(f"{use}_") if tuple(on) != dataset} == set()
    assert values["learning_rate"][1:] == values["parameters"][1:] == (None, None)


def test_a_metric_of_the_model_is_no_second_point_in_the_runs_history(scenario: Scenario) -> None:
    counts = points(scenario.store, scenario.run)
    assert {name for name, count in counts.items() if count > 1} == set(EPOCHS[0].row()) - {"epoch"} | {"epoch_seconds"}
    assert set(counts.values()) == {1, len(EPOCHS)}


def test_a_run_is_named_for_its_commit(scenario: Scenario) -> None:
    assert scenario.run.info.run_name == git("rev-parse", "HEAD", directory=scenario.copy)[:7]


def test_a_runs_description_is_its_test_result(scenario: Scenario) -> None:
    assert scenario.run.data.tags["mlflow.note.content"] == (
        "**98.50%** of 200 test images right, 3 wrong. Loss 0.0500, calibration error 1.25%, 19,210 parameters."
    )


# Each of these has a store of its own


def test_a_run_is_named_for_its_dvc_experiment(store: Repository) -> None:
    with mock.patch.dict(os.environ, DVC_EXP_NAME="trial"):
        Store().begin_run(TRAIN)
    [run] = store.runs()
    assert run.info.run_name == run.data.tags["dvc_experiment"] == "trial"


@pytest.mark.usefixtures("store")
def test_a_run_has_a_stage_after_it_was_added_from_the_same_inputs() -> None:
    write_json(METRICS, TESTED)
    write_text(FIGURES / "curves.png", "made up")
    run = Store().begin_run(TRAIN)
    assert not run.has_stage(EVALUATE)
    run.add_stage(EVALUATE)
    assert run.has_stage(EVALUATE)
    assert not run.has_stage(replace(EVALUATE, inputs={str(MODEL): "3" * 64}))
    assert not run.has_stage(replace(EVALUATE, stage="report"))


@pytest.mark.usefixtures("store")
def test_a_stage_that_was_added_in_part_is_missing() -> None:
    run = Store().begin_run(TRAIN)
    write_json(METRICS, TESTED)
    with pytest.raises(FileNotFoundError):
        run.add_stage(EVALUATE)  # there are no figures
    assert not run.has_stage(EVALUATE)


def test_a_tag_follows_a_param_that_a_rerun_sets_back(store: Repository) -> None:
    write_json(METRICS, TESTED)
    write_text(FIGURES / "curves.png", "made up")
    run = Store().begin_run(TRAIN)
    for size in (1000, 500, 1000):
        run.add_stage(replace(EVALUATE, params={"evaluate.batch_size": size}))
    [found] = store.runs()
    assert found.data.params["evaluate.batch_size"] == "1000"
    assert found.data.tags["evaluate.batch_size"] == "1000"


def test_the_test_images_are_named_even_if_they_also_monitored_the_training(store: Repository) -> None:
    run = Store().begin_run(TRAIN)
    run.log_datasets(load_training_data(DATA, NONE, PARAMS.data, seed=0))
    run.log_datasets({"test": load_digits(DATA, "test")})
    [found] = store.runs()
    assert {used.tags[0].value for used in found.inputs.dataset_inputs} == {"train", "monitor", "test"}
