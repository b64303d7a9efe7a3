"""A run of MLflow, and what the stages add to it."""

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.tracking.context.registry import resolve_tags
from torch import Tensor, nn

from mnist_pipeline.common.files import files_below, read_text, sha256
from mnist_pipeline.common.params import flatten
from mnist_pipeline.common.paths import RAW
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.model.network import count_parameters
from mnist_pipeline.tracking.git import commit_tags, uncommitted_patch
from mnist_pipeline.tracking.provenance import Provenance

MODEL_TAG = "model_sha256"  # a run with this tag holds all of its training
DATA_TAG = "data_sha256"
FINGERPRINT_TAG = "fingerprint"
_BACKFILLED_TAG = "backfilled"  # the stages that a backfill added
_NONE = "none"
NOTE_TAG = "mlflow.note.content"  # MLflow's pages show it as the run's description
DATASET_DIGEST_LENGTH = 36  # characters, MLflow's limit

_Values = Mapping[str, Any] | None
_Datasets = Mapping[str, Digits]  # by what a stage used them for


class TrackedRun:
    """A run in the store."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id
        self._epochs: set[int] = set()  # that the run is known to have

    def log(
        self,
        metrics: _Values = None,
        params: _Values = None,
        tags: _Values = None,
        step: int = 0,
        run: Run | None = None,
    ) -> None:
        """Log metrics, params and tags in one request; with `run`, link the metrics to its model and its images."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id,
            [Metric(name, float(value), now, step, **_links(run, name)) for name, value in (metrics or {}).items()],
            [Param(name, str(value)) for name, value in (params or {}).items()],
            [RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def log_start(
        self, provenance: Provenance, datasets: _Datasets, model: nn.Module, machine: Mapping[str, str] | None = None
    ) -> None:
        """Log what is known when a training starts; a second call renews the commit and the provenance.

        `machine` is None in a backfill: nothing tells what machine trained the model.
        """
        known = self.client.get_run(self.id).data.metrics
        self.log({} if "parameters" in known else {"parameters": count_parameters(model)}, provenance.params)
        self.log_datasets(datasets)
        kernels = {"kernels": machine["kernels"]} if machine else {}
        self.log(tags={_BACKFILLED_TAG: _NONE if machine else provenance.stage, **kernels, **commit_tags()})
        self._log_provenance(provenance, machine=machine)

    def log_epoch(self, row: Mapping[str, float], **others: float) -> None:
        """Log the numbers of an epoch, unless the run has them."""
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        if (epoch := int(row["epoch"])) not in self._epochs:
            self.log(metrics | others, step=epoch)
            self._epochs.add(epoch)

    def log_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the epochs that the run does not have yet."""
        self._epochs |= {point.step for point in self.client.get_metric_history(self.id, "train_loss")}
        for row in rows:
            self.log_epoch(row)

    def log_datasets(self, datasets: _Datasets) -> None:
        """Log the digests of the images that a stage used."""
        inputs = []
        for use, digits in datasets.items():
            digest = digits.sha256()
            dataset = Dataset(
                name=f"mnist-{use}",  # MLflow merges datasets with the same name and digest
                digest=digest[:DATASET_DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": str(RAW.parent)}),
                profile=json.dumps({"num_rows": len(digits), "per_class": digits.per_class(), "sha256": digest}),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", use)]))
        self.client.log_inputs(self.id, inputs)

    def log_end(self, provenance: Provenance, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log what a training wrote, its model, and last the digest of the model's file: later stages search for it.

        `example` is a batch of at least two normalised images: a model exported with one image would accept no more.
        """
        self._log_outputs(provenance)
        self._log_model(model, example)
        self._link_metrics()
        self.log(tags={MODEL_TAG: sha256(path)})

    def _log_model(self, model: nn.Module, example: Tensor) -> None:
        """Log the model, unless an interrupted training has done so; complete what it began."""
        run = self.client.get_run(self.id)
        models = self.logged_models(run.info.experiment_id)
        logged = (
            models[0]
            if models
            else self.client.create_logged_model(
                run.info.experiment_id, "model", self.id, resolve_tags(), run.data.params
            )
        )
        if logged.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as temporary:
                directory = Path(temporary) / "model"
                _save_model(model, directory, example, mlflow.models.Model("model", self.id, model_id=logged.model_id))
                for name, file in files_below(directory).items():
                    self.client.log_model_artifact(logged.model_id, str(file), name.rpartition("/")[0] or None)
            self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        if logged.model_id not in _model_ids(run):
            self.client.log_outputs(self.id, [LoggedModelOutput(logged.model_id, max(self._epochs, default=0))])

    def logged_models(self, experiment_id: str) -> list[LoggedModel]:
        """Return the models that the run has logged: complete ones first, then the newest."""
        newest_first = [{"field_name": "creation_timestamp", "ascending": False}]
        of_run = f"source_run_id = '{self.id}'"
        found = self.client.search_logged_models([experiment_id], of_run, order_by=newest_first)
        return sorted(found, key=lambda model: model.status != LoggedModelStatus.READY)

    def _link_metrics(self) -> None:
        """Link the last value of each metric to the model.

        MLflow stores a value with the same time and step once, so the run's history gets no second point.
        """
        run = self.client.get_run(self.id)
        histories = [self.client.get_metric_history(self.id, name) for name in run.data.metrics]
        last = [max(history, key=lambda point: (point.step, point.timestamp)) for history in histories]
        self.client.log_batch(
            self.id,
            [Metric(point.key, point.value, point.timestamp, point.step, **_links(run, point.key)) for point in last],
        )

    def add_stage(self, provenance: Provenance, datasets: _Datasets | None = None, backfilled: bool = False) -> None:
        """Add what a later stage read and wrote, and last its tags: they mark it as complete.

        MLflow does not change a param. If a rerun has another value than the run, that value becomes a tag.
        """
        self.log_datasets(datasets or {})
        run = self.client.get_run(self.id)
        known = run.data
        params = {name: value for name, value in provenance.params.items() if name not in known.params}
        changed = {
            name: value
            for name, value in provenance.params.items()
            if name in known.tags or known.params.get(name, str(value)) != str(value)
        }
        metrics = flatten({k: v for path in provenance.metrics for k, v in json.loads(read_text(Path(path))).items()})
        new = {name: value for name, value in metrics.items() if known.metrics.get(name) != value}
        self.log(new, params, changed | ({NOTE_TAG: _summarize(metrics)} if metrics else {}), run=run)
        self._log_outputs(provenance)
        self._log_provenance(provenance, backfilled=backfilled)
        others = known.tags.get(_BACKFILLED_TAG, _NONE).split(", ")
        stages = [stage for stage in others if stage not in (_NONE, provenance.stage)] + backfilled * [provenance.stage]
        tags = {f"{provenance.stage}.{FINGERPRINT_TAG}": provenance.fingerprint}
        self.log(tags={_BACKFILLED_TAG: ", ".join(stages) or _NONE, **tags})

    def _log_provenance(self, provenance: Provenance, **others: object) -> None:
        """Log all that is known of a stage, and what is not committed, as files that MLflow's pages display."""
        self.client.log_dict(self.id, provenance.record() | others, f"provenance/{provenance.stage}.json")
        if patch := uncommitted_patch():
            self.client.log_text(self.id, patch, f"provenance/{provenance.stage}.patch")

    def _log_outputs(self, provenance: Provenance) -> None:
        for output in map(Path, provenance.outputs):
            for name, file in files_below(output).items() if output.is_dir() else [("", output)]:
                self.client.log_artifact(self.id, str(file), (output / name).parent.as_posix())

    def has_stage(self, provenance: Provenance) -> bool:
        """Return whether the run has all of a later stage, from these very inputs."""
        found = self.client.get_run(self.id).data.tags.get(f"{provenance.stage}.{FINGERPRINT_TAG}")
        return bool(found == provenance.fingerprint)

    def close(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.id, status)


def _summarize(metrics: Mapping[str, Any]) -> str:
    return (
        f"**{metrics['test_accuracy']:.2%}** of {metrics['test_total']:,} test images right, "
        f"{metrics['test_misclassified']} wrong. Loss {metrics['test_loss']:.4f}, "
        f"calibration error {metrics['test_calibration_error']:.2%}, {metrics['parameters']:,} parameters."
    )


def _model_ids(run: Run) -> list[str]:
    return [output.model_id for output in run.outputs.model_outputs] if run.outputs else []


def _links(run: Run | None, metric: str) -> dict[str, str]:
    """Return the options that link a metric to a run's model, and to the images that the metric is named after."""
    if run is None or not (models := _model_ids(run)):
        return {}
    links = {"model_id": models[-1]}
    for used in run.inputs.dataset_inputs if run.inputs else []:
        if metric.startswith(f"{used.tags[0].value}_"):
            links |= {"dataset_name": used.dataset.name, "dataset_digest": used.dataset.digest}
    return links


def _save_model(model: nn.Module, directory: Path, example: Tensor, description: mlflow.models.Model) -> None:
    """Save a model as MLflow reads it: weights and program in torch.export's format, without pickle."""
    model, example = model.cpu().eval(), example.cpu()
    mlflow.pytorch.save_model(
        model,
        directory,
        mlflow_model=description,
        input_example=example.numpy(),
        signature=mlflow.models.infer_signature(example.numpy(), model(example).detach().numpy()),
        serialization_format="pt2",
        pip_requirements=[f"torch=={version('torch')}"],
    )
    [file] = directory.rglob("*.pt2")
    program = torch.export.load(file)
    program.example_inputs = None  # torch pickles them
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the files of this machine
    torch.export.save(program, file)
    description.model_size_bytes = sum(file.stat().st_size for file in files_below(directory).values())
    description.save(directory / "MLmodel")
