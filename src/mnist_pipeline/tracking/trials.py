"""The runs of trials whose machine died: nobody else can close them. No stage imports this."""

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from mnist_pipeline.tracking.run import TrackedRun
from mnist_pipeline.tracking.store import Store, tolerant


def close_lost_runs(parent: str | None) -> None:
    """Close as FAILED the trainings of a study that seem to run still, once all of them have ended."""
    if parent:
        with tolerant("the end of trainings whose machine died"):
            store = Store()
            for run in store.search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and attributes.status = 'RUNNING'"):
                TrackedRun(store.client, run.info.run_id).end("FAILED")
