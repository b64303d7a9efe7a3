"""What watches a training: MLflow's runs and registry, provenance, and the console. No other folder imports MLflow.

The store is the server that `MLFLOW_TRACKING_URI` names, else `mlflow.db` at the root of the repository. When the store
fails, the training goes on: the stage says in one line what is not tracked, and `make backfill` adds it later. With
`MNIST_TRACKING=required` the stage fails instead.
"""
