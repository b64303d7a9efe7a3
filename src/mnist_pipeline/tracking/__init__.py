"""Tracking: MLflow's runs and registry, provenance, and progress on the console. No other folder imports MLflow.

The store is the server that `MLFLOW_TRACKING_URI` names, otherwise `mlflow.db` in the repository's root. If the store
fails, the training goes on: the stage says in one line what is not tracked, and `make backfill` adds it later. With
`MNIST_TRACKING=required` the stage fails instead.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow looks when it is imported
