"""Measure how many calls a second a tracking store answers."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.entities import Metric
from tqdm import tqdm

from mnist_pipeline.tracking.address import TRACKING_URI
from mnist_pipeline.tracking.database import prepare_database
from mnist_pipeline.tracking.store import configure_mlflow

CALLS = 200  # of each kind
_METRICS = 6  # that a training logs after each epoch


def measure_tracking_stores() -> dict[str, dict[str, float]]:
    """Measure a new SQLite database and, if `MLFLOW_TRACKING_URI` names one, a server."""
    with tempfile.TemporaryDirectory() as temporary:
        database = Path(temporary) / "mlflow.db"
        configure_mlflow()
        prepare_database(database)
        found = {"SQLite in the process": _calls_a_second(f"sqlite:///{database}")}
    if uri := os.environ.get(TRACKING_URI):
        found[f"the server at `{TRACKING_URI}`"] = _calls_a_second(uri)
    return found


def _calls_a_second(uri: str) -> dict[str, float]:
    """Return how many runs a second a store begins and ends, and metrics it logs, one by one and in batches."""
    client = mlflow.MlflowClient(uri)
    name = "bench"
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id = client.create_run(experiment_id).info.run_id

    def begin_and_end() -> None:
        client.set_terminated(client.create_run(experiment_id).info.run_id)

    def one_by_one() -> None:
        for number in range(_METRICS):
            client.log_metric(run_id, f"metric_{number}", 0.5)

    def in_a_batch() -> None:
        client.log_batch(run_id, [Metric(f"metric_{number}", 0.5, 0, 0) for number in range(_METRICS)])

    try:
        return {
            "runs": _rate(begin_and_end, CALLS),
            "metrics one by one": _METRICS * _rate(one_by_one, CALLS // _METRICS),
            "metrics in batches": _METRICS * _rate(in_a_batch, CALLS),
        }
    finally:
        client.delete_experiment(experiment_id)


def _rate(call: Callable[[], object], calls: int) -> float:
    """Return how many calls a second succeed, one after the other."""
    start = time.perf_counter()
    for _ in tqdm(range(calls), desc="Tracking", leave=False, disable=None):
        call()
    return calls / (time.perf_counter() - start)
