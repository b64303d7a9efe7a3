"""What a tracking store bears (`make bench`). No stage imports this."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.entities import Metric
from tqdm import tqdm

from mnist_pipeline.tracking.store import URI, prepare

CALLS = 200  # of a kind
METRICS = 6  # that a training logs after each epoch


def tracking_stores() -> dict[str, dict[str, float]]:
    """Return how many calls a second a new SQLite database bears and, if `MLFLOW_TRACKING_URI` names one, a server."""
    with tempfile.TemporaryDirectory() as temporary:
        database = Path(temporary) / "mlflow.db"
        prepare(database)
        found = {"SQLite in the process": calls_a_second(f"sqlite:///{database}")}
    if uri := os.environ.get(URI):
        found[f"the server at `{URI}`"] = calls_a_second(uri)
    return found


def calls_a_second(uri: str) -> dict[str, float]:
    """Return how many runs a second a store begins and ends, and how many metrics it takes, singly and in batches."""
    client = mlflow.MlflowClient(uri)
    name = "bench"
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id = client.create_run(experiment_id).info.run_id

    def begin_and_end() -> None:
        client.set_terminated(client.create_run(experiment_id).info.run_id)

    def one_by_one() -> None:
        for number in range(METRICS):
            client.log_metric(run_id, f"metric_{number}", 0.5)

    def in_a_batch() -> None:
        client.log_batch(run_id, [Metric(f"metric_{number}", 0.5, 0, 0) for number in range(METRICS)])

    try:
        return {
            "runs": rate(begin_and_end),
            "metrics one by one": METRICS * rate(one_by_one, CALLS // METRICS),
            "metrics in batches": METRICS * rate(in_a_batch),
        }
    finally:
        client.delete_experiment(experiment_id)


def rate(call: Callable[[], object], calls: int = CALLS) -> float:
    """Return how many calls are done in a second, one after the other."""
    start = time.perf_counter()
    for _ in tqdm(range(calls), desc="Tracking", leave=False, disable=None):
        call()
    return calls / (time.perf_counter() - start)
