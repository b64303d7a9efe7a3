"""MLflow: one run for each training, to which later stages add what they find. No other module imports it."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist_pipeline.errors import UserError
from mnist_pipeline.files import sha256
from mnist_pipeline.model import count_parameters
from mnist_pipeline.params import flatten
from mnist_pipeline.provenance import Provenance, environment
from mnist_pipeline.training import EpochResult, Training

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that does not answer is given up within half a minute; MLflow's defaults take several.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")

import mlflow  # reads the environment when it is imported

EXPERIMENT = "mnist"


class Run:
    """The MLflow run of one training."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.epoch_start = time.perf_counter()

    def log_epoch(self, result: EpochResult) -> None:
        """Log an epoch's scores, its learning rate and how long it took."""
        self.log_scores(result)
        mlflow.log_metric("epoch_seconds", time.perf_counter() - self.epoch_start, step=result.epoch)
        self.epoch_start = time.perf_counter()

    def log_scores(self, result: EpochResult) -> None:
        """Log an epoch's scores and its learning rate."""
        metrics = result.row()
        mlflow.log_metrics(metrics, step=int(metrics.pop("epoch")))

    def log_model(self, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log the model with its signature, and the digest of its file, by which later stages find the run.

        `example` is a batch of at least two normalised images: exported from one alone, the model would take no more.
        """
        model = model.cpu().eval()
        example = example.cpu()
        mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=example.numpy(),
            signature=mlflow.models.infer_signature(example.numpy(), model(example).detach().numpy()),
            serialization_format="pt2",  # torch.export's format: weights and program without pickle
            pip_requirements=[f"torch=={version('torch')}"],
        )
        mlflow.set_tag("model_sha256", sha256(path))


@contextmanager
def training_run(
    params: Mapping[str, object], provenance: Provenance, training: Training, interrupted: str | None
) -> Iterator[Run]:
    """Open a run for a training and close it as the block ends: well, failed, or killed by a signal.

    It starts with the params, the number of learned parameters and where all of it comes from. The run with the id
    `interrupted` goes on; where the store has lost it, a new one begins with the epochs that the training has had.
    """
    connect()
    run_id = known(interrupted)
    with mlflow.start_run(run_id=run_id, run_name=os.environ.get("DVC_EXP_NAME")) as active:
        run = Run(active.info.run_id)
        mlflow.set_tags(environment() | provenance.tags())
        if run_id is None:
            mlflow.log_params(flatten(params))
            mlflow.log_metric("parameters", count_parameters(training.model))
            for result in training.history:
                run.log_scores(result)
        try:
            yield run
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise


def known(run_id: str | None) -> str | None:
    """Return the id of a run that the store holds, else None."""
    try:
        return run_id and mlflow.get_run(run_id).info.run_id
    except mlflow.MlflowException:
        return None


def add_to_run_of(
    model: Path,
    metrics: Mapping[str, object] | None = None,
    artifacts: Iterable[Path] = (),
) -> None:
    """Add metrics and files to the newest run that trained the model in a file, if there is one.

    The file's digest finds the run, so no stage has to write a run's id into its outputs.
    """
    connect()
    found = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.model_sha256 = '{sha256(model)}'",
        max_results=1,
        output_format="list",
    )
    if not found:
        print(f"No MLflow run trained {model}, so nothing is logged: `dvc repro --force train` makes one")
        return
    with mlflow.start_run(run_id=found[0].info.run_id):
        mlflow.log_metrics(flatten(metrics or {}))
        for artifact in artifacts:
            log = mlflow.log_artifacts if artifact.is_dir() else mlflow.log_artifact
            log(str(artifact), str(artifact.parent if artifact.is_file() else artifact))


def finished_runs(condition: str) -> list[dict[str, Any]]:
    """Return the finished runs that meet a condition in MLflow's search syntax, oldest first.

    Each is flat, under `params.…` and `metrics.…`; of a metric, the last value.
    """
    connect()
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"attributes.status = 'FINISHED' and {condition}",
        order_by=["attributes.start_time"],
        output_format="list",
    )
    return [flatten({"params": run.data.params, "metrics": run.data.metrics}) for run in runs]


def connect() -> None:
    """Choose the tracking store and make the experiment in it.

    It is the server that `MLFLOW_TRACKING_URI` names, else `mlflow.db` at the root of the repository, with the
    artifacts beside it. Both are absolute: DVC runs experiments in a temporary copy and names the original `DVC_ROOT`.

    Raises:
        UserError: MLflow cannot use it.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    artifacts = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
        artifacts = (root / "mlartifacts").as_uri()
    try:
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
        mlflow.set_experiment(EXPERIMENT)
    except mlflow.MlflowException as error:
        raise UserError(
            f"MLflow at {mlflow.get_tracking_uri()} cannot be used: {str(error).strip().splitlines()[0]}"
        ) from None
