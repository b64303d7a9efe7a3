"""Give a model whose training MLflow did not see, or not whole, its run, from the stages' outputs (`make backfill`).

No run comes about when DVC restores a stage from its cache, after `dvc pull`, or in a clone with another database; and
a store that fails during a training keeps only a part of one.
"""

import subprocess

from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_csv
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import ADDED, HISTORY, MODEL, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.tracking.provenance import Provenance, trace
from mnist_pipeline.tracking.run import BACKFILLED_TAG
from mnist_pipeline.tracking.store import Store, continue_untracked


def main() -> None:
    """Complete the run of the model in the workspace; called again, add nothing."""
    if not MODEL.is_file():
        raise UserError(f"{MODEL} is absent: `dvc repro` makes it, `dvc pull` brings it")
    with continue_untracked(str(MODEL)):
        store = Store()
        if stages := missing(store, "evaluate", "report"):
            if subprocess.run(["dvc", "status", "--quiet"], check=False).returncode != 0:
                raise UserError("the outputs are not those of the params and the code here (`dvc status`): `dvc repro`")
            backfill(store, stages)
        else:
            print(f"MLflow has all of the run of {MODEL}")
        close(store)
        store.touch()


def missing(store: Store, *later: str) -> list[Provenance]:
    """Return those of train and the later stages that the run of the model here does not hold."""
    stages = [trace(stage) for stage in later]
    if found := store.run_of(MODEL):
        return [provenance for provenance in stages if not found.has(provenance)]
    return [trace("train"), *stages]


def backfill(store: Store, stages: list[Provenance]) -> None:
    """Add what stages wrote to the run of the model, which is made where there is none."""
    for provenance in tqdm(stages, desc="Adding to MLflow", unit="stage", delay=2, leave=False, disable=None):
        if provenance.stage == "train":
            add_training(store, provenance)
        elif found := store.run_of(MODEL):
            datasets = {"test": load_digits(RAW, "test")} if provenance.stage == "evaluate" else {}
            found.add(provenance, datasets, backfilled=True)
    if stages:
        print(f"Added to MLflow, from their outputs: {', '.join(provenance.stage for provenance in stages)}")


def close(store: Store) -> None:
    """Close the run of the model, which holds all of its training, where the store failed at just that."""
    if (found := store.run_of(MODEL)) and store.client.get_run(found.id).info.status == "RUNNING":
        found.end("FINISHED")


def add_training(store: Store, provenance: Provenance) -> None:
    """Make the run of a training, or complete the one that the store has a part of."""
    params = load_params()
    device = set_up_torch(params.threads)
    parts = load_training_data(RAW, ADDED, params.data, params.seed)
    example, _ = parts["monitor"][:2].tensors(params.data, device)
    network = load_model(MODEL).network
    found = store.unfinished_run_of(provenance) or store.begin_run(provenance, {})
    found.log(tags={BACKFILLED_TAG: "true"})
    found.log_start(provenance, parts, network)
    found.log_history(read_csv(HISTORY))
    found.log_outputs(provenance)
    found.log_model(network, MODEL, example)
    found.end("FINISHED")
