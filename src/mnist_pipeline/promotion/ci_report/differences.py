"""What a retraining changed: which stages ran and why, the params, the metrics with their spread, the mistakes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mnist_pipeline.common.params import flatten
from mnist_pipeline.promotion.ci_report.state import State, changed_names, stage_inputs
from mnist_pipeline.promotion.gate import Verdict
from mnist_pipeline.report.results import ResultRow, Results
from mnist_pipeline.report.studies import SPECIFICATION, Study

PER_CLASS = "test_per_class_accuracy."
_COUNTS = ("test_correct", "test_misclassified")


@dataclass(frozen=True)
class Execution:
    """A stage: did it run, is it in the base, which inputs changed, and are the outputs the same?"""

    name: str
    ran: bool
    in_base: bool
    changed_inputs: Sequence[str]
    same_outputs: bool


@dataclass(frozen=True)
class MetricDifference:
    """A metric's value in the base and in this run (None if absent), and the difference if both are numbers.

    19 times in 20, two runs that differ only in their seeds differ by less than `spread` (None if unknown). It comes
    from the seeds of the specification's study or, if `binomial`, from the number of test images.
    """

    name: str
    before: object
    after: object
    difference: float | None
    spread: float | None
    binomial: bool


@dataclass(frozen=True)
class Retraining:
    """This run beside its base. Without a base, `commit` is empty and `base` None.

    `before` is None if the base has no results; `executed`, the stages that DVC ran, is None without DVC's log.
    """

    commit: str
    base: State | None
    head: State
    before: Results | None
    after: Results
    verdicts: Sequence[Verdict] = ()
    executed: Sequence[str] | None = None
    training_seconds: float | None = None
    artifacts: str | None = None

    @property
    def study(self) -> Study:
        """The specification's study; without rows if there is none."""
        return next((study for study in self.after.studies if study.name == SPECIFICATION), Study(SPECIFICATION, []))

    def executions(self) -> list[Execution]:
        """Return whether each stage ran: by `executed` or, if that is None, by what changed in `dvc.lock`."""
        found = []
        for name, stage in self.head.stages.items():
            before = self.base.stages.get(name) if self.base else None
            changed = [] if before is None else changed_names(stage_inputs(before), stage_inputs(stage))
            same_outputs = before is not None and _outputs(before) == _outputs(stage)
            ran = bool(changed) or not same_outputs if self.executed is None else name in self.executed
            found.append(Execution(name, ran, before is not None, changed, same_outputs))
        return found

    def changed_params(self) -> list[str]:
        """Return the names of the params that differ from the base's."""
        return changed_names(self.base.params if self.base else {}, self.head.params)

    def changed_metrics(self) -> list[MetricDifference]:
        """Return the metrics that differ from the base's; the spread is 2√2 standard deviations of a single run."""
        before, after = flatten(self.before.metrics) if self.before else {}, flatten(self.after.metrics)
        found = []
        for name in changed_names(before, after):
            old, new = before.get(name), after.get(name)
            difference = new - old if isinstance(old, int | float) and isinstance(new, int | float) else None
            deviation = None if difference is None else self._standard_deviation(name, (before[name] + after[name]) / 2)
            spread = None if deviation is None else 2 * math.sqrt(2) * deviation
            binomial = spread is not None and not self._is_studied(name)
            found.append(MetricDifference(name, old, new, difference, spread, binomial))
        return found

    def confusions(self) -> list[list[tuple[int, int]]]:
        """Return the confusion matrix, label by prediction, as counts (base, this run); equal if nothing is known."""
        before = after = self.after.confusion.tolist()
        if self.before and self.before.predictions and self.before.classes == self.after.classes:
            before = self.before.confusion.tolist()
        return [list(zip(*counts, strict=True)) for counts in zip(before, after, strict=True)]

    def changed_mistakes(self) -> dict[str, list[tuple[ResultRow, ResultRow]]] | None:
        """Return both predictions of each image that only this run (`new`) or only the base (`mended`) reads wrong.

        The most confident mistakes come first. Return None if the base has no results on the same labels.
        """
        if not self.before or _labels(self.before) != _labels(self.after):
            return None
        old, new = ({row["index"]: row for row in results.predictions} for results in (self.before, self.after))
        return {
            "new": [(old[row["index"]], row) for row in self.after.misclassified if _is_right(old[row["index"]])],
            "mended": [(row, new[row["index"]]) for row in self.before.misclassified if _is_right(new[row["index"]])],
        }

    def _standard_deviation(self, name: str, value: float) -> float | None:
        """Return the deviation over the study's seeds, or the binomial error of a share of images; None if unknown."""
        total = self.after.metrics["test_total"]
        if name in _COUNTS:
            share = self._standard_deviation("test_accuracy", value / total)
            return None if share is None else total * share
        if self._is_studied(name):
            return self.study.deviation(name)
        if "accuracy" not in name:
            return None
        images = total
        if name.startswith(PER_CLASS):
            images = self.after.confusion.sum(axis=1)[self.after.classes.index(name.removeprefix(PER_CLASS))]
        return math.sqrt(value * (1 - value) / float(images))

    def _is_studied(self, name: str) -> bool:
        rows = self.study.rows
        return len(rows) > 1 and ("test_accuracy" if name in _COUNTS else name) in rows[0]


def _outputs(stage: dict[str, Any]) -> dict[str, object]:
    return {path["path"]: path.get("md5") for path in stage.get("outs", [])}


def _labels(results: Results) -> dict[float, str]:
    return {row["index"]: row["label"] for row in results.predictions}


def _is_right(row: ResultRow) -> bool:
    return bool(row["prediction"] == row["label"])
