"""Search a space of params for the highest accuracy on held-out images (`mnist sweep`). No test image is seen.

Optuna draws the points (Tree-structured Parzen Estimator; Bergstra et al., NIPS 2011) and stops a trial whose curve is
under the median of those before it (Golovin et al., KDD 2017). All that it knows is on disk after each step, so a sweep
that was killed goes on, and with more trials it goes further.
"""

import hashlib
import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text, write_text
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import CHECKPOINTS, EXPERIMENTS
from mnist_pipeline.common.tables import markdown_table
from mnist_pipeline.experiments.places import Workers, open_place, workers
from mnist_pipeline.experiments.space import Space, load_space
from mnist_pipeline.experiments.trial import Point, Trial, TrialError
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.training_run import close_lost_runs, study_run
from mnist_pipeline.training.checkpoint import Checkpoint

MARK = "# Found by `mnist sweep"  # begins the overlay of a winner: what does not begin so is not ours to replace
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)  # Optuna's FAIL is of a point that is drawn once more
NUMBER, LOSS, FAILURE = "number", "monitor_loss", "failure"  # what is kept of a trial besides its curve

optuna.logging.set_verbosity(optuna.logging.ERROR)


def sweep(path: Path, trials: int, ray: str | None = None) -> None:
    """Run trials in a space, until there are as many as asked for, and write the winner as a recipe.

    Raises:
        UserError: the space is wrong, the recipe's name is taken, the cluster cannot be used, or no trial ended well.
    """
    space = load_space(path)
    winner = EXPERIMENTS / f"{space.name}.yaml"
    if winner.exists() and not read_text(winner).startswith(MARK):
        raise UserError(
            f"{winner} is there and no sweep's winner: give {path} another name, which becomes the recipe's"
        )
    with alone_at(space):
        search = Search(space)
        total = int(min(trials, space.size))
        if total < trials:
            print(f"{path} has {total} points: each is tried once")
        left = total - len(search.ended())
        if left > 0:
            with open_place(ray) as place, study_run(f"sweep {space.name}") as parent:
                print(
                    f"{total - left} of {total} trials are there, of this space, data and code; {place[0]} run at once"
                )
                with workers(place) as pool:
                    said = pool.map(lambda _: search.run_trial(pool, parent), range(left))
                    for _, line in tqdm(said, desc=space.name, total=left, unit="trial", disable=None):
                        print(line, flush=True)
                close_lost_runs(parent)
    print(search.table())
    if not (complete := [trial for trial in search.ended() if trial.state == TrialState.COMPLETE]):
        raise UserError(f"none of {total} trials ended well, so there is no winner")
    best = max(complete, key=lambda trial: (trial.value, -trial.user_attrs[LOSS]))
    write_winner(winner, space, search, best)
    print(f"{winner} is trial {search.name_of(best)}. Next: mnist experiment {space.name}")


@contextmanager
def alone_at(space: Space) -> Generator[None]:
    """Hold the sweeps of a name for the block.

    Raises:
        UserError: another process has them.
    """
    CHECKPOINTS.mkdir(exist_ok=True)
    try:
        with FileLock(CHECKPOINTS / f"sweep-{space.name}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"the sweep {space.name} is under way in another process: wait for it") from None


class Search:
    """Optuna's study of one space with the same data, code and other params, in a database beside the checkpoints."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.lock = threading.Lock()
        base = trace("train", space.trial_at({})).fingerprint
        fingerprint = hashlib.sha256(json.dumps([base, space.description]).encode()).hexdigest()
        database = CHECKPOINTS / f"sweep-{space.name}.db"
        try:
            self.study = optuna.create_study(
                storage=f"sqlite:///{database}", study_name=fingerprint, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # whatever SQLAlchemy, Alembic and the disk raise
            raise UserError(f"{database} cannot be used ({str(error).splitlines()[0]}): move it away") from None
        self.study.pruner = optuna.pruners.MedianPruner()
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):  # when a process before us was killed
            self.study.enqueue_trial(trial.params, trial.user_attrs)
            self.study.tell(trial.number, state=TrialState.FAIL)

    def ended(self) -> list[FrozenTrial]:
        """Return the trials that are done, by their numbers."""
        ended = self.study.get_trials(deepcopy=False, states=ENDED)
        return sorted(ended, key=lambda trial: int(trial.user_attrs[NUMBER]))

    def name_of(self, trial: FrozenTrial | optuna.Trial) -> str:
        """Return a trial's name, also in MLflow, which it keeps when it is run again."""
        return f"{self.space.name}-{trial.user_attrs[NUMBER]}"

    def draw(self) -> optuna.Trial:
        """Draw the next point: one that was left running, else one that no trial has.

        What is drawn depends on the seed, the number of draws and the trials before it alone: a sweep that was killed
        does not draw again what it drew first.
        """
        sampler: type[optuna.samplers.BaseSampler] = optuna.samplers.TPESampler
        while True:
            before = self.study.get_trials(deepcopy=False)
            others = [trial for trial in before if trial.state in (*ENDED, TrialState.RUNNING)]
            seed = np.random.SeedSequence([self.space.base.seed, len(before)])
            self.study.sampler = sampler(seed=int(seed.generate_state(1)[0]))  # type: ignore[call-arg]
            trial = self.study.ask(dict(self.space.distributions))
            if self.space.values(trial.params) not in [self.space.values(other.params) for other in others]:
                if NUMBER not in trial.user_attrs:
                    trial.set_user_attr(NUMBER, len({other.user_attrs.get(NUMBER) for other in before} - {None}))
                return trial
            self.study.tell(trial, state=TrialState.FAIL)
            sampler = optuna.samplers.RandomSampler  # where points are few, the best is drawn over and over

    def run_trial(self, pool: Workers, parent: str | None) -> str:
        """Run the next trial and say in a line what came of it."""
        with self.lock:
            trial = self.draw()
        params = self.space.trial_at(self.space.values(trial.params))
        seen = set()
        comparable = "train.epochs" not in self.space.distributions  # a longer schedule lies lower, and ends higher

        def hopeless(point: Point) -> bool:
            if point.epoch in seen:  # its node died, and it runs again
                return False
            seen.add(point.epoch)
            with self.lock:
                trial.report(point.accuracy, point.epoch)
                return comparable and point.epoch < params.train.epochs and trial.should_prune()

        try:
            row = pool.run(Trial(self.name_of(trial), params, ["train"], parent), hopeless)
        except TrialError as error:  # such as one that diverges: Optuna avoids where it was
            with self.lock:
                trial.set_user_attr(FAILURE, str(error))
                return self.end(trial, TrialState.PRUNED)
        if pool.stopping.is_set() and row is None:
            return f"{self.name_of(trial)} is interrupted"
        with self.lock:
            if row is None:
                Checkpoint(trace("train", params).fingerprint).remove()
                return self.end(trial, TrialState.PRUNED)
            trial.set_user_attr(LOSS, float(row[LOSS]))
            return self.end(trial, TrialState.COMPLETE, float(row["monitor_accuracy"]))

    def end(self, trial: optuna.Trial, state: TrialState, accuracy: float | None = None) -> str:
        """Keep how a trial ended, and say it."""
        ended = self.study.tell(trial, accuracy, state)
        values = ", ".join(f"{key} {value}" for key, value in self.space.values(ended.params).items())
        return f"{self.name_of(trial)}: {outcome(ended)} ({values})"

    def table(self) -> str:
        """Return a table in Markdown of all trials, the best first."""
        header = ["trial", "validation accuracy", "loss", *self.space.distributions, "end"]
        rows = []
        for trial in sorted(self.ended(), key=lambda one: (one.state != TrialState.COMPLETE, -(one.value or 0))):
            complete = trial.state == TrialState.COMPLETE
            scores = [f"{trial.value:.2%}", f"{trial.user_attrs[LOSS]:.4f}"] if complete else ["", ""]
            values = map(str, self.space.values(trial.params).values())
            rows.append([self.name_of(trial), *scores, *values, "" if complete else outcome(trial)])
        return markdown_table(header, rows)


def outcome(trial: FrozenTrial) -> str:
    """Say how a trial ended."""
    if FAILURE in trial.user_attrs:
        return str(trial.user_attrs[FAILURE])
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.2%}, loss {trial.user_attrs[LOSS]:.4f}"
    epoch, accuracy = max(trial.intermediate_values.items())
    return f"stopped after epoch {epoch} at {accuracy:.2%}"


def write_winner(path: Path, space: Space, search: Search, best: FrozenTrial) -> None:
    """Write the params of a trial as a recipe: what differs from `params.yaml`."""
    images = space.trial_at({}).data.validation_size
    overlay = difference(space.at(space.values(best.params)).model_dump(), load_params().model_dump())
    said = (
        f"{outcome(best)}, on {images:,} images held out; {len(search.ended())} trials from the recipe {space.recipe}"
    )
    write_text(path, f"{MARK} {space.name}`: {said}.\n{yaml.safe_dump(overlay, sort_keys=False)}")


def difference(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values that differ from others of the same names."""
    return {
        key: difference(value, others[key]) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != others[key]
    }
