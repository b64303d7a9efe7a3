"""Put the model of a study into the repository (`mnist publish`)."""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import MODEL, STUDIES
from mnist_pipeline.experiments.study import PARAMS_SHA256, seed_params
from mnist_pipeline.experiments.trial import EpochScore, Trial, run_trial
from mnist_pipeline.model.model_file import Origin, add_origin
from mnist_pipeline.report.studies import MEASURES, read_study_rows
from mnist_pipeline.tracking.git import changed_files, head_commit
from mnist_pipeline.tracking.provenance import trace


def publish_model(recipe: str) -> None:
    """Train seed 0 of a study again and write its model, with its origin, to `models/<recipe>.safetensors`.

    It is always seed 0, so that nobody picks a seed for its result.

    Raises:
        UserError: the study has no such row, or the model is not the row's; a file is not committed.
    """
    table, published = STUDIES / f"{recipe}.csv", MODEL.with_stem(recipe)
    params = seed_params(recipe, 1, validation=False)[0]
    training = trace("train", params)
    row = next((row for row in read_study_rows(table) if row["seed"] == "0"), {})
    if row.get(PARAMS_SHA256) != training.params_sha256:
        raise UserError(f"{table} has no row of seed 0 with the params of now: `mnist study {recipe}` makes it")
    if changed := changed_files():
        raise UserError(f"{changed[0]} is not committed: commit it first, for the model names its commit")
    with TemporaryDirectory() as temporary:
        model = Path(temporary) / MODEL.name
        _train(Trial(f"{recipe}-0", params, ["train"], parent=None, model=model))
        if (found := sha256(model)) != row["model_sha256"]:
            raise UserError(f"seed 0 gives another model than {table} records: `mnist study {recipe}` renews the table")
        origin = Origin(
            recipe=recipe,
            params=params.model_dump(),
            git_commit=head_commit(),
            data_sha256=training.data_sha256,
            model_sha256=found,
            figures={measure: float(row[measure]) for measure in MEASURES},
        )
        add_origin(model, published, origin)
    print(f"{published} is written: seed 0 came out as in {table}")


def _train(trial: Trial) -> None:
    with (
        tqdm(total=trial.params.train.epochs, desc=trial.name, unit="epoch", disable=None) as bar,
        closing(run_trial(trial)) as progress,
    ):
        for step in progress:
            bar.update(isinstance(step, EpochScore))
