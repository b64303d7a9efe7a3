"""A run of MLflow, and what the stages add to it."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from torch import Tensor, nn

from mnist_pipeline.common.files import read_text, sha256
from mnist_pipeline.common.params import flatten
from mnist_pipeline.common.paths import RAW
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.model.network import count_parameters
from mnist_pipeline.tracking.provenance import Provenance, uncommitted

MODEL_TAG = "model_sha256"  # a run that has it holds all of its training
DATA_TAG = "data_sha256"
BACKFILLED_TAG = "backfilled"
NOTE_TAG = "mlflow.note.content"  # the interface shows it as the run's description
DIGEST_LENGTH = 36  # characters, MLflow's limit for the digest of a dataset


class TrackedRun:
    """A run in the store, and what can be added to it."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id

    def log(
        self,
        metrics: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        """Log it all in one request."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id,
            [Metric(name, float(value), now, step) for name, value in (metrics or {}).items()],
            [Param(name, str(value)) for name, value in (params or {}).items()],
            [RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def log_start(self, provenance: Provenance, datasets: Mapping[str, Digits], model: nn.Module) -> None:
        """Log what is known at the start of a training; twice is as good as once."""
        had = self.client.get_run(self.id).data.metrics
        size = {"parameters": count_parameters(model)}
        self.log({} if size.keys() <= had.keys() else size, provenance.params)
        self.log_datasets(datasets)
        self.log_provenance(provenance)

    def log_epoch(self, row: Mapping[str, float], **others: float) -> None:
        """Log the numbers of an epoch, under its number."""
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        self.log(metrics | others, step=int(row["epoch"]))

    def log_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the epochs that the run does not have."""
        had = {point.step for point in self.client.get_metric_history(self.id, "train_loss")}
        for row in rows:
            if int(row["epoch"]) not in had:
                self.log_epoch(row)

    def log_datasets(self, datasets: Mapping[str, Digits]) -> None:
        """Log the digests of the images that a stage used, under what it used them for."""
        inputs = []
        for use, digits in datasets.items():
            digest = digits.sha256()
            described = Dataset(
                name=f"mnist-{use}",  # MLflow keeps one data set of a name and digest
                digest=digest[:DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": str(RAW.parent)}),
                profile=json.dumps({"num_rows": len(digits), "per_class": digits.per_class(), "sha256": digest}),
            )
            inputs.append(DatasetInput(described, [InputTag("mlflow.data.context", use)]))
        self.client.log_inputs(self.id, inputs)

    def log_model(self, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log the model with its signature and, at last, the digest of its file, by which later stages find the run.

        `example` is a batch of at least two normalised images: exported from one alone, the model would take no more.
        """
        model = model.cpu().eval()
        example = example.cpu()
        mlflow.models.Model.log(
            artifact_path=None,
            name="model",
            run_id=self.id,
            flavor=mlflow.pytorch,
            pytorch_model=model,
            input_example=example.numpy(),
            signature=mlflow.models.infer_signature(example.numpy(), model(example).detach().numpy()),
            serialization_format="pt2",  # torch.export's format: weights and program without pickle
            pip_requirements=[f"torch=={version('torch')}"],
        )
        self.log(tags={MODEL_TAG: sha256(path)})

    def log_provenance(self, provenance: Provenance) -> None:
        """Keep the digest of each input, and what was not committed, in files that the interface displays."""
        self.client.log_dict(self.id, asdict(provenance), f"provenance/{provenance.stage}.json")
        if patch := uncommitted():
            self.client.log_text(self.id, patch, f"provenance/{provenance.stage}.patch")

    def log_outputs(self, provenance: Provenance) -> None:
        """Keep what the stage wrote, under the paths that it has in the repository."""
        for output in map(Path, provenance.outputs):
            if output.is_dir():
                self.client.log_artifacts(self.id, str(output), str(output))
            else:
                self.client.log_artifact(self.id, str(output), str(output.parent))

    def add(
        self, provenance: Provenance, datasets: Mapping[str, Digits] | None = None, backfilled: bool = False
    ) -> None:
        """Add what a later stage read and wrote and, at last, its tags, which say that all of it is there.

        MLflow does not change a param: where a rerun has another value than the run, that stands among the tags.
        """
        had = self.client.get_run(self.id).data
        params = {name: value for name, value in provenance.params.items() if name not in had.params}
        changed = {
            name: value
            for name, value in provenance.params.items()
            if name in had.tags or had.params.get(name, str(value)) != str(value)
        }
        metrics = flatten({k: v for path in provenance.metrics for k, v in json.loads(read_text(Path(path))).items()})
        self.log(metrics, params, changed | ({NOTE_TAG: describe(metrics)} if metrics else {}))
        self.log_datasets(datasets or {})
        self.log_outputs(provenance)
        self.log_provenance(provenance)
        tags = provenance.tags() | {BACKFILLED_TAG: str(backfilled).lower()}
        self.log(tags={f"{provenance.stage}.{name}": value for name, value in tags.items()})

    def has(self, provenance: Provenance) -> bool:
        """Say whether what a later stage found, from these very inputs, is there."""
        found = self.client.get_run(self.id).data.tags.get(f"{provenance.stage}.fingerprint")
        return bool(found == provenance.fingerprint)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.id, status)


def describe(metrics: Mapping[str, Any]) -> str:
    """Say in Markdown what a test found."""
    return (
        f"**{metrics['test_accuracy']:.2%}** of {metrics['test_total']:,} test images right, "
        f"{metrics['test_misclassified']} wrong. Loss {metrics['test_loss']:.4f}, "
        f"calibration error {metrics['test_calibration_error']:.2%}, {metrics['parameters']:,} parameters."
    )
