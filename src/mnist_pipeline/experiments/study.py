"""Train a recipe from many seeds (`mnist study`)."""

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from mnist_pipeline.common.files import write_csv
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.paths import MODEL, RAW, STUDIES
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.experiments.pool import TrialPool, open_pool
from mnist_pipeline.experiments.recipes import find_recipe
from mnist_pipeline.experiments.trial import VALIDATION_SIZE, StudyRow, on_one_core
from mnist_pipeline.report.studies import MEASURES, TEST_SHA256, VALIDATION_SUFFIX, Study, read_study_rows
from mnist_pipeline.tracking.provenance import trace

# Columns of a study's table that say what a row was made from.
PARAMS_SHA256, _TRAINING, _EVALUATION = "params_sha256", "fingerprint", "evaluation_fingerprint"


def run_study(recipe: str, seeds: int, validation: bool, ray_address: str | None = None) -> None:
    """Train a recipe from the seeds 0, 1, 2, …; write each seed's row to the study's table as soon as it is there.

    With `validation`, training images are held out and scored, and no test image is seen.

    Rows with the current params, data and code stay. If any of these changed, one such seed is trained again: if its
    figures are the same, the other rows stay too, otherwise they are dropped.

    Each training runs in one process of one thread, as many at once as there are cores: no thread waits for another.
    With `ray_address` they run in that Ray cluster.

    Raises:
        UserError: there is no such recipe, a training failed, or the cluster cannot be used.
    """
    table = _StudyTable(recipe, seeds, validation)
    outdated = table.outdated_seeds()
    with open_pool(f"study {table.name}", ray_address) as pool:
        for row in table.train(outdated[:1], pool):
            table.renew(outdated, row)
        missing = [seed for seed in range(seeds) if seed not in table.rows]
        for row in table.train(missing, pool):
            table.add(row)
    if not (outdated or missing):
        table.write()


def seed_params(recipe: str, seeds: int, validation: bool) -> list[Params]:
    """Return the params of each seed's training."""
    params = load_params(overlay=find_recipe(recipe))
    data = params.data.model_copy(update={"validation_size": VALIDATION_SIZE if validation else 0})
    return [on_one_core(params.model_copy(update={"seed": seed, "data": data})) for seed in range(seeds)]


class _StudyTable:
    """The rows of a study by their seeds, and their file. It starts with the file's rows that have all measures."""

    def __init__(self, recipe: str, seeds: int, validation: bool) -> None:
        self.name = f"{recipe}{VALIDATION_SUFFIX if validation else ''}"
        self.path = STUDIES / f"{self.name}.csv"
        self.stages = ["train"] if validation else ["train", "evaluate"]
        self.tested = {} if validation else {TEST_SHA256: load_digits(RAW, "test").sha256()}
        self.measures = ["monitor_accuracy"] if validation else MEASURES
        in_file = {int(row["seed"]): row for row in read_study_rows(self.path)}
        self.params = seed_params(recipe, max(seeds, *(seed + 1 for seed in in_file), 0), validation)
        self.origins = [self._origin(params) for params in self.params]
        self.rows = {seed: row for seed, row in in_file.items() if {*self.measures, _TRAINING} <= row.keys()}
        if dropped := len(in_file) - len(self.rows):
            print(f"{self.path}: {dropped} rows have other measures and are dropped")

    def _origin(self, params: Params) -> StudyRow:
        """Return the columns that identify the params of a row and everything that its stages read."""
        training = trace("train", params)
        origin = {PARAMS_SHA256: training.params_sha256, _TRAINING: training.fingerprint, **self.tested}
        if "evaluate" in self.stages:
            origin[_EVALUATION] = trace("evaluate", params, without=[MODEL]).fingerprint
        return origin

    def outdated_seeds(self) -> list[int]:
        """Return the seeds whose rows were made from other params, data or code."""
        return [seed for seed, row in self.rows.items() if not self.origins[seed].items() <= row.items()]

    def train(self, seeds: Sequence[int], pool: TrialPool) -> Iterator[StudyRow]:
        """Train from some seeds and yield each one's row as soon as it is there."""

        def train_seed(seed: int) -> StudyRow:
            row = pool.run(f"{self.name}-{seed}", self.params[seed], self.stages)
            return {**(row or {}), **self.origins[seed]}  # without a row the pool is stopping: nobody reads this

        if seeds:
            yield from tqdm(pool.map(train_seed, seeds), self.name, len(seeds), unit="training", disable=None)

    def renew(self, outdated: Sequence[int], row: StudyRow) -> None:
        """Keep the outdated rows if the one that was made again has the same figures; otherwise drop them."""
        seed = int(row["seed"])
        same = _figures(row) == _figures(self.rows[seed])
        print(
            f"{self.path}: params, data or code changed, and seed {seed} {'comes out the same' if same else 'differs'}"
        )
        for other in outdated:
            if same:
                self.rows[other] |= self.origins[other]
            else:
                del self.rows[other]
        self.add(row)

    def add(self, row: StudyRow) -> None:
        """Add the row of a seed, or replace it, in the file too."""
        self.rows[int(row["seed"])] = row
        self.write()

    def write(self) -> None:
        """Write the file and print its summary."""
        rows = [self.rows[seed] for seed in sorted(self.rows)]
        write_csv(self.path, rows)
        print(f"{self.path}: {Study(self.name, rows).summary(self.measures[0])}", flush=True)


def _figures(row: StudyRow) -> StudyRow:
    """Return the columns that the same training gives again, to the last digit."""
    others = {PARAMS_SHA256, _TRAINING, _EVALUATION, TEST_SHA256, "seconds"}
    return {name: value for name, value in row.items() if name not in others}
