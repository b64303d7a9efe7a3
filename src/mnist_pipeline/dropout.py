"""Collect the runs of the dropout study (`make dropout`) into one table."""

from mnist_pipeline.errors import UserError
from mnist_pipeline.files import write_csv
from mnist_pipeline.paths import DROPOUT
from mnist_pipeline.tracking import finished_runs

COLUMNS = {
    "dropout_kind": "params.model.dropout_kind",
    "seed": "params.seed",
    "validation_accuracy": "metrics.monitor_accuracy",
    "validation_loss": "metrics.monitor_loss",
    "test_accuracy": "metrics.test_accuracy",
    "test_loss": "metrics.test_loss",
}


def main() -> None:
    """Write a row for each kind of dropout and seed that was trained with a validation split."""
    runs = finished_runs("params.`data.validation_size` = '5000'")
    newest = {(found["params.model.dropout_kind"], int(found["params.seed"])): found for found in runs}
    rows = [{name: found[column] for name, column in COLUMNS.items()} for _, found in sorted(newest.items())]
    if not rows:
        raise UserError("MLflow holds no finished run with data.validation_size 5000: make dropout")
    write_csv(DROPOUT, rows)
    print(f"{DROPOUT}: {len(rows)} runs")
