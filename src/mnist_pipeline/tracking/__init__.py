"""MLflow: one run for each training, to which later stages add what they find. No other package imports it.

The store is the server that `MLFLOW_TRACKING_URI` names, else `mlflow.db` at the root of the repository. A store that
fails costs no training: the stage says in one line what is not tracked and goes on, and `make backfill` adds it later.
With `MNIST_TRACKING=required` the stage fails instead.

The module `registry` is not imported here, so that no stage depends on it.
"""

import logging
import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# By default MLflow waits minutes for a server that does not answer. So a request is given up after 13 seconds, and a
# stage, which may send one more to close what it began, loses less than 30.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")
os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")

# They import MLflow, which reads the environment as it is imported.
from mnist_pipeline.tracking.run import BACKFILLED_TAG, MODEL_TAG, TrackedRun
from mnist_pipeline.tracking.store import PARENT, Store, explain, finished_runs, prepare, tolerant
from mnist_pipeline.tracking.training import TrainingRun, study_run, training_run

__all__ = [
    "BACKFILLED_TAG",
    "MODEL_TAG",
    "PARENT",
    "Store",
    "TrackedRun",
    "TrainingRun",
    "explain",
    "finished_runs",
    "prepare",
    "study_run",
    "tolerant",
    "training_run",
]

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # of a failure, `tolerant` says all there is to say
logging.getLogger("urllib3").setLevel(logging.CRITICAL)
