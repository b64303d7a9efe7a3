"""A recipe trained from many seeds (`mnist study`)."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from mnist_pipeline.common.files import write_csv
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.paths import MODEL, STUDIES
from mnist_pipeline.experiments.places import open_place, workers
from mnist_pipeline.experiments.recipes import overlay_of
from mnist_pipeline.experiments.trial import VALIDATION_SIZE, Row, Trial, alone
from mnist_pipeline.report.studies import MEASURES, VALIDATION_SUFFIX, Study, read_study_rows
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.training_run import close_lost_runs, study_run

# Columns of a study's table: what a row is made from, or what one seed has shown to give the same row.
PARAMS, FINGERPRINT, EVALUATION = "params_sha256", "fingerprint", "evaluation_fingerprint"


def study(name: str, seeds: int, validation: bool, ray: str | None = None) -> None:
    """Train a recipe from the seeds 0, 1, 2, … and write each one's row to the study's table as soon as it is there.

    With `validation` it trains on some images less and scores on those; the test images are not looked at. A row that
    is there, of the same params, data and code, is not made again. Where data or code have changed since, one seed is
    trained again: if every figure of it comes out the same, so should the others', and their rows stay.

    One process a core, each of one thread: they do more than one process of several threads. With `ray` they run in
    the cluster at that address.
    """
    table = STUDIES / f"{name}{VALIDATION_SUFFIX if validation else ''}.csv"
    stages = ["train"] if validation else ["train", "evaluate"]
    measures = ["monitor_accuracy"] if validation else MEASURES
    known = {row["seed"]: row for row in read_study_rows(table)}
    trials = {
        str(params.seed): params for params in plan(name, max(seeds, *(int(seed) + 1 for seed in known), 0), validation)
    }
    origins = {seed: origin(params, stages) for seed, params in trials.items()}
    rows = {
        seed: row
        for seed, row in known.items()
        if row.get(PARAMS) == origins[seed][PARAMS] and {*measures, FINGERPRINT} <= row.keys()
    }
    changed = [seed for seed, row in rows.items() if not origins[seed].items() <= row.items()]
    if len(rows) < len(known):
        print(f"{table}: {len(known) - len(rows)} rows are of other params or measures, and go")

    def write() -> None:
        ordered = [rows[seed] for seed in trials if seed in rows]
        write_csv(table, ordered)
        print(f"{table}: {Study(name, ordered).summary(measures[0])}", flush=True)

    with open_place(ray) as place, study_run(f"study {table.stem}") as parent:
        with workers(place) as pool:

            def train(seed: str) -> Row:
                row = pool.run(Trial(f"{table.stem}-{seed}", trials[seed], stages, parent))
                return {**(row or {}), **origins[seed]}

            def train_all(seeds: Sequence[str]) -> Iterable[tuple[str, Row]]:
                found = pool.map(train, seeds)
                return tqdm(found, desc=table.stem, total=len(seeds), unit="training", disable=None if seeds else True)

            for seed, row in train_all(changed[:1]):
                same = figures(row) == figures(rows[seed])
                print(
                    f"{table}: data or code have changed, and seed {seed} {'comes out the same' if same else 'differs'}"
                )
                for other in changed:
                    if same:
                        rows[other] |= origins[other]
                    else:
                        del rows[other]
                rows[seed] = row
                write()
            left = [seed for seed in list(trials)[:seeds] if seed not in rows]
            for seed, row in train_all(left):
                rows[seed] = row
                write()
            if not (changed or left):
                write()
        close_lost_runs(parent)


def origin(params: Params, stages: Sequence[str]) -> Row:
    """Name what a row is made from, as columns of a study's table: params, and all that its stages read."""
    training = trace("train", params)
    names = {PARAMS: training.params_sha256, FINGERPRINT: training.fingerprint}
    return names | (
        {EVALUATION: trace("evaluate", params, without=[MODEL]).fingerprint} if "evaluate" in stages else {}
    )


def figures(row: Row) -> Row:
    """Return what the same training gives again, to the last digit."""
    return {name: value for name, value in row.items() if name not in {PARAMS, FINGERPRINT, EVALUATION, "seconds"}}


def plan(name: str, seeds: int, validation: bool) -> list[Params]:
    """Return the params of a study's trainings; the recipe `specification` is `params.yaml` as it is."""
    params = load_params(overlay=overlay_of(name))
    data = params.data.model_copy(update={"validation_size": VALIDATION_SIZE if validation else 0})
    return [alone(params.model_copy(update={"seed": seed, "data": data})) for seed in range(seeds)]
