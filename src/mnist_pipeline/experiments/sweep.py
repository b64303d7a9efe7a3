"""Search a space of params for the highest accuracy on held-out training images (`mnist sweep`). No test image is seen.

Optuna draws the points (Tree-structured Parzen Estimator; Bergstra et al., NIPS 2011) and stops a trial whose accuracy
falls under the median of earlier trials (Golovin et al., KDD 2017). Its state is saved after each step, so a killed
sweep resumes, and a sweep with more trials builds on the earlier ones.
"""

import hashlib
import statistics
import threading
from collections.abc import Mapping
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
from mnist_pipeline.experiments.pool import TrialPool, open_pool
from mnist_pipeline.experiments.space import Space, load_space
from mnist_pipeline.experiments.trial import EpochScore, TrialError
from mnist_pipeline.report.tables import markdown_table
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.training.checkpoint import Checkpoint

_MARK = "# Found by `mnist sweep"  # begins each recipe that a sweep wrote: other files are never replaced
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)  # a trial that Optuna calls FAIL is drawn again
_NUMBER, _LOSS, _FAILURE = "number", "monitor_loss", "failure"  # what Optuna keeps of a trial besides its curve


def run_sweep(path: Path, trials: int, ray_address: str | None = None) -> None:
    """Run trials in a space until there are as many as asked for, and write the best one as a recipe.

    Raises:
        UserError: the space is wrong, the recipe's name is taken, the cluster cannot be used, or no trial succeeded.
    """
    space = load_space(path)
    recipe = EXPERIMENTS / f"{space.name}.yaml"
    if recipe.exists() and not read_text(recipe).startswith(_MARK):
        raise UserError(f"{recipe} was not written by a sweep: give {path} another name, which becomes the recipe's")
    CHECKPOINTS.mkdir(exist_ok=True)
    try:
        lock = FileLock(CHECKPOINTS / f"sweep-{space.name}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is running the sweep {space.name}: wait until it ends") from None
    with lock:
        search = _Search(space)
        total = int(min(trials, space.size))
        if total < trials:
            print(f"{path} has {total} points: each is tried once")
        left = total - len(search.ranked_trials())
        if left > 0:
            with open_pool(f"sweep {space.name}", ray_address) as pool:
                print(f"{total - left} of {total} trials with this space, data and code exist; {pool.size} run at once")
                lines = pool.map(lambda _: search.try_next_point(pool), range(left))
                for line in tqdm(lines, space.name, left, unit="trial", disable=None):
                    print(line, flush=True)
    print(search.table())
    best = search.ranked_trials()[0]
    if best.state != TrialState.COMPLETE:
        raise UserError(f"none of {total} trials succeeded, so no recipe is written")
    _write_recipe(recipe, search, best)
    print(f"{recipe} is trial {search.name_of(best)}. Next: mnist experiment {space.name}")


class _Search:
    """Optuna's study of one space, with one state of data, code and other params; its database is in `.checkpoints`."""

    def __init__(self, space: Space) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.lock = threading.Lock()
        identity = f"{trace('train', space.trial_params({})).fingerprint} {dict(space.distributions)} {space.folds}"
        database = CHECKPOINTS / f"sweep-{space.name}.db"
        try:
            self.study = optuna.create_study(
                study_name=hashlib.sha256(identity.encode()).hexdigest(),
                storage=f"sqlite:///{database}",
                direction="maximize",
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, Alembic's or the disk's
            raise UserError(f"{database} cannot be used ({str(error).splitlines()[0]}): move it away") from None
        self.study.pruner = optuna.pruners.MedianPruner()
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):  # a killed process left it
            self.study.enqueue_trial(trial.params, trial.user_attrs)
            self.study.tell(trial.number, state=TrialState.FAIL)

    def ranked_trials(self) -> list[FrozenTrial]:
        """Return the trials that have ended, the best first: by accuracy, then by loss."""

        def rank(trial: FrozenTrial) -> tuple[bool, float, float]:
            return trial.state != TrialState.COMPLETE, -(trial.value or 0), trial.user_attrs.get(_LOSS, 0)

        return sorted(self.study.get_trials(deepcopy=False, states=_ENDED), key=rank)

    def name_of(self, trial: FrozenTrial | optuna.Trial) -> str:
        """Return a trial's name, in MLflow too. A trial that is run again keeps it."""
        return f"{self.space.name}-{trial.user_attrs[_NUMBER]}"

    def draw_trial(self) -> optuna.Trial:
        """Draw the next point: one that was left running, otherwise a new one.

        It depends only on the seed, the number of draws and the earlier trials, so a resumed sweep does not repeat its
        first draws.
        """
        sampler: type[optuna.samplers.BaseSampler] = optuna.samplers.TPESampler
        while True:
            drawn = self.study.get_trials(deepcopy=False)
            tried = [self.space.values(trial.params) for trial in drawn if trial.state in (*_ENDED, TrialState.RUNNING)]
            seed = np.random.SeedSequence([self.space.base.seed, len(drawn)])
            self.study.sampler = sampler(seed=int(seed.generate_state(1)[0]))  # type: ignore[call-arg]
            trial = self.study.ask(dict(self.space.distributions))
            if self.space.values(trial.params) not in tried:
                if _NUMBER not in trial.user_attrs:
                    trial.set_user_attr(_NUMBER, len({other.user_attrs.get(_NUMBER) for other in drawn} - {None}))
                return trial
            self.study.tell(trial, state=TrialState.FAIL)
            sampler = optuna.samplers.RandomSampler  # in a small space, TPE draws the best point over and over

    def try_next_point(self, pool: TrialPool) -> str:
        """Run the next trial, fold after fold, and say in a line how it ended."""
        with self.lock:
            trial = self.draw_trial()
        rows: list[Mapping[str, str]] = []
        try:
            while len(rows) < self.space.folds and (row := self._train_fold(trial, len(rows), pool)):
                rows.append(row)
        except TrialError as error:  # for example, its loss diverged: Optuna learns to avoid the point
            with self.lock:
                trial.set_user_attr(_FAILURE, str(error))
                return self._end(trial, TrialState.PRUNED)
        complete = len(rows) == self.space.folds
        if pool.stopping.is_set() and not complete:
            return f"{self.name_of(trial)} is interrupted"
        with self.lock:
            if not complete:
                return self._end(trial, TrialState.PRUNED)
            trial.set_user_attr(_LOSS, statistics.mean(float(row[_LOSS]) for row in rows))
            accuracy = statistics.mean(float(row["monitor_accuracy"]) for row in rows)
            return self._end(trial, TrialState.COMPLETE, accuracy)

    def _train_fold(self, trial: optuna.Trial, fold: int, pool: TrialPool) -> Mapping[str, str] | None:
        """Train a trial's point on a fold and return the row; None if it is hopeless or the pool is stopping.

        The trial keeps the row: if the sweep dies before the last fold, it goes on after this one.
        """
        key = f"fold {fold}"
        if row := trial.user_attrs.get(key):
            return dict(row)
        params = self.space.trial_params(self.space.values(trial.params), fold)
        # Schedules of different lengths cannot be compared half way: a longer one is lower there and higher at the end.
        comparable = "train.epochs" not in self.space.distributions
        reported = set()

        def is_hopeless(score: EpochScore) -> bool:
            if score.epoch in reported:  # its node died and it runs again
                return False
            reported.add(score.epoch)
            with self.lock:
                trial.report(score.accuracy, fold * params.train.epochs + score.epoch)
                return comparable and score.epoch < params.train.epochs and trial.should_prune()

        name = self.name_of(trial) + (f"-fold-{fold}" if self.space.folds > 1 else "")
        row = pool.run(name, params, ["train"], is_hopeless)
        if row:
            with self.lock:
                trial.set_user_attr(key, row)
        elif not pool.stopping.is_set():
            Checkpoint(trace("train", params).fingerprint).remove()
        return row

    def _end(self, trial: optuna.Trial, state: TrialState, accuracy: float | None = None) -> str:
        ended = self.study.tell(trial, accuracy, state)
        values = ", ".join(f"{key} {value}" for key, value in self.space.values(ended.params).items())
        return f"{self.name_of(trial)}: {_outcome(ended)} ({values})"

    def table(self) -> str:
        """Return a Markdown table of all trials, the best first."""
        header = ["trial", "validation accuracy", "loss", *self.space.distributions, "end"]
        rows = []
        for trial in self.ranked_trials():
            complete = trial.state == TrialState.COMPLETE
            scores = [f"{trial.value:.2%}", f"{trial.user_attrs[_LOSS]:.4f}"] if complete else ["", ""]
            values = map(str, self.space.values(trial.params).values())
            rows.append([self.name_of(trial), *scores, *values, "" if complete else _outcome(trial)])
        return markdown_table(header, rows)


def _outcome(trial: FrozenTrial) -> str:
    if _FAILURE in trial.user_attrs:
        return str(trial.user_attrs[_FAILURE])
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.2%}, loss {trial.user_attrs[_LOSS]:.4f}"
    epoch, accuracy = max(trial.intermediate_values.items())  # epochs count on from fold to fold
    return f"stopped after epoch {epoch} at {accuracy:.2%}"


def _write_recipe(path: Path, search: _Search, best: FrozenTrial) -> None:
    """Write the params of a trial that differ from `params.yaml`."""
    space, trials = search.space, len(search.ranked_trials())
    overlay = _differing(space.params_at(space.values(best.params)).model_dump(), load_params().model_dump())
    images = space.trial_params({}).data.validation_size
    folds = f" in each of {space.folds} folds" if space.folds > 1 else ""
    score = f"{_outcome(best)}, on {images:,} images held out{folds}; {trials} trials from the recipe {space.recipe}"
    write_text(path, f"{_MARK} {space.name}`: {score}.\n{yaml.safe_dump(overlay, sort_keys=False)}")


def _differing(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _differing(value, others[key]) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != others[key]
    }
