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
from mnist_pipeline.tracking.git import uncommitted_patch
from mnist_pipeline.tracking.provenance import Provenance

MODEL_TAG = "model_sha256"  # a run with this tag holds all of its training
DATA_TAG = "data_sha256"
BACKFILLED_TAG = "backfilled"
NOTE_TAG = "mlflow.note.content"  # MLflow's pages show it as the run's description
DATASET_DIGEST_LENGTH = 36  # characters, MLflow's limit

_Values = Mapping[str, Any] | None
_Datasets = Mapping[str, Digits]  # by what a stage used them for


class TrackedRun:
    """A run in the store."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id

    def log(self, metrics: _Values = None, params: _Values = None, tags: _Values = None, step: int = 0) -> None:
        """Log metrics, params and tags in one request."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id,
            [Metric(name, float(value), now, step) for name, value in (metrics or {}).items()],
            [Param(name, str(value)) for name, value in (params or {}).items()],
            [RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def log_start(self, provenance: Provenance, datasets: _Datasets, model: nn.Module) -> None:
        """Log what is known when a training starts; a second call changes nothing."""
        known = self.client.get_run(self.id).data.metrics
        self.log({} if "parameters" in known else {"parameters": count_parameters(model)}, provenance.params)
        self.log_datasets(datasets)
        self._log_provenance(provenance)

    def log_epoch(self, row: Mapping[str, float], **others: float) -> None:
        """Log the numbers of an epoch."""
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        self.log(metrics | others, step=int(row["epoch"]))

    def log_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the epochs that the run does not have yet."""
        known = {point.step for point in self.client.get_metric_history(self.id, "train_loss")}
        for row in rows:
            if int(row["epoch"]) not in known:
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

    def add_stage(self, provenance: Provenance, datasets: _Datasets | None = None, backfilled: bool = False) -> None:
        """Add what a later stage read and wrote, and last its tags: they mark it as complete.

        MLflow does not change a param. If a rerun has another value than the run, that value becomes a tag.
        """
        known = self.client.get_run(self.id).data
        params = {name: value for name, value in provenance.params.items() if name not in known.params}
        changed = {
            name: value
            for name, value in provenance.params.items()
            if name in known.tags or known.params.get(name, str(value)) != str(value)
        }
        metrics = flatten({k: v for path in provenance.metrics for k, v in json.loads(read_text(Path(path))).items()})
        self.log(metrics, params, changed | ({NOTE_TAG: _summarize(metrics)} if metrics else {}))
        self.log_datasets(datasets or {})
        self._log_outputs(provenance)
        self._log_provenance(provenance)
        tags = provenance.tags() | {BACKFILLED_TAG: str(backfilled).lower()}
        self.log(tags={f"{provenance.stage}.{name}": value for name, value in tags.items()})

    def _log_provenance(self, provenance: Provenance) -> None:
        """Log the digest of each input, and what is not committed, as files that MLflow's pages display."""
        self.client.log_dict(self.id, asdict(provenance), f"provenance/{provenance.stage}.json")
        if patch := uncommitted_patch():
            self.client.log_text(self.id, patch, f"provenance/{provenance.stage}.patch")

    def _log_outputs(self, provenance: Provenance) -> None:
        for output in map(Path, provenance.outputs):
            if output.is_dir():
                self.client.log_artifacts(self.id, str(output), str(output))
            else:
                self.client.log_artifact(self.id, str(output), str(output.parent))

    def has_stage(self, provenance: Provenance) -> bool:
        """Return whether the run has all of a later stage, from these very inputs."""
        found = self.client.get_run(self.id).data.tags.get(f"{provenance.stage}.fingerprint")
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
