"""Add to MLflow what it missed of the model in the workspace, from the stages' outputs (`make backfill`).

A training has no run, or a part of one, if DVC restored it from its cache, if it came by `dvc pull` or a clone, or if
the store failed.
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
from mnist_pipeline.tracking.store import Store, continue_untracked


def backfill_run() -> None:
    """Complete the run of the model in the workspace; a second call adds nothing.

    Raises:
        UserError: an output is absent, or outputs differ from those of the present params and code.
    """
    if not MODEL.is_file():
        raise UserError(f"{MODEL} is absent: `dvc repro` makes it, `dvc pull` brings it")
    with continue_untracked(str(MODEL)):
        store = Store(patient=True)
        if stages := missing_stages(store, "evaluate", "report"):
            if subprocess.run(["dvc", "status", "--quiet"], check=False).returncode != 0:
                raise UserError("the outputs are not those of the params and the code here (`dvc status`): `dvc repro`")
            add_stages(store, stages)
        else:
            print(f"MLflow has all of the run of {MODEL}")
        found = store.run_of(MODEL)
        if found and store.client.get_run(found.id).info.status == "RUNNING":  # the store failed to close it
            found.close("FINISHED")


def missing_stages(store: Store, *later: str) -> list[Provenance]:
    """Return those of train and the `later` stages that the model's run lacks."""
    stages = [trace(stage) for stage in later]
    if found := store.run_of(MODEL):
        return [provenance for provenance in stages if not found.has_stage(provenance)]
    return [trace("train"), *stages]


def add_stages(store: Store, stages: list[Provenance]) -> None:
    """Add what stages wrote to the model's run; the stage train creates or completes that run."""
    for provenance in tqdm(stages, desc="Adding to MLflow", unit="stage", delay=2, leave=False, disable=None):
        if provenance.stage == "train":
            _add_training(store, provenance)
        elif found := store.run_of(MODEL):
            datasets = {"test": load_digits(RAW, "test")} if provenance.stage == "evaluate" else {}
            found.add_stage(provenance, datasets, backfilled=True)
    if stages:
        print(f"Added to MLflow, from their outputs: {', '.join(provenance.stage for provenance in stages)}")


def _add_training(store: Store, provenance: Provenance) -> None:
    params = load_params()
    device = set_up_torch(params.threads)
    parts = load_training_data(RAW, ADDED, params.data, params.seed)
    example, _ = parts["monitor"][:2].tensors(params.data, device)
    network = load_model(MODEL).network
    run = store.unfinished_run_of(provenance) or store.begin_run(provenance)
    run.log_start(provenance, parts, network)
    run.log_history(read_csv(HISTORY))
    run.log_end(provenance, network, MODEL, example)
    run.close("FINISHED")
