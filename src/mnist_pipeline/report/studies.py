"""What studies found: the tables in reports/studies, a row for each seed of a recipe."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_pipeline.common.files import read_table
from mnist_pipeline.common.paths import STUDIES

SPECIFICATION = "specification"  # the name of `params.yaml` as it is, among recipes
VALIDATION_SUFFIX = "-validation"  # ends the name of a table whose scores are those of held-out training images
MEASURES = [  # what a study keeps of each seed's metrics
    "test_accuracy",
    "test_undisputed_accuracy",
    "test_loss",
    "test_calibration_error",
    "test_corrupted_geometric_accuracy",
    "test_corrupted_non_geometric_accuracy",
    "parameters",
]


@dataclass(frozen=True)
class Study:
    """A recipe's trainings, one row for each seed."""

    name: str
    rows: Sequence[dict[str, str]]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in ascending order."""
        return sorted(int(row["seed"]) for row in self.rows)

    def values(self, measure: str) -> list[float]:
        """Return a measure of each seed, in the order of the seeds."""
        return [float(row[measure]) for row in sorted(self.rows, key=lambda row: int(row["seed"]))]

    def mean(self, measure: str) -> float:
        """Return a measure's mean over the seeds."""
        return statistics.mean(self.values(measure))

    def deviation(self, measure: str) -> float:
        """Return a measure's standard deviation over the seeds, 0 of a single one."""
        return statistics.stdev(self.values(measure)) if len(self.rows) > 1 else 0.0

    def summary(self, measure: str) -> str:
        """Say in a phrase how an accuracy spreads over the seeds."""
        values = self.values(measure)
        return (
            f"{len(values)} seeds, {measure} {self.mean(measure):.3%}, standard deviation "
            f"{100 * self.deviation(measure):.3f} points, {min(values):.2%} to {max(values):.2%}"
        )


def read_study_rows(table: Path) -> list[dict[str, str]]:
    """Read a study's table as it is, nothing where there is none."""
    return read_table(table) if table.exists() else []


def load_studies(directory: Path = STUDIES) -> list[Study]:
    """Return the studies that were tested, the specification's first."""
    tables = [path for path in sorted(directory.glob("*.csv")) if not path.stem.endswith(VALIDATION_SUFFIX)]
    studies = [Study(path.stem, read_study_rows(path)) for path in tables]
    return sorted(studies, key=lambda study: study.name != SPECIFICATION)


def paired_p_value(study: Study, other: Study, measure: str = "test_accuracy") -> float:
    """Return how likely a difference in means as large would be, by chance, between two studies of the same seeds.

    Under the hypothesis that the recipes are equal, each seed's difference is as likely one way as the other: of all
    ways to flip their signs, it is the share with as large a mean (Fisher's permutation test for pairs, both sides).
    One seed tells nothing: 1.
    """
    from scipy.stats import permutation_test  # slow to import

    values, others = (dict(zip(each.seeds, each.values(measure), strict=True)) for each in (study, other))
    common = sorted(values.keys() & others.keys())
    if len(common) < 2:
        return 1.0
    found = permutation_test(
        ([values[seed] for seed in common], [others[seed] for seed in common]),
        lambda first, second, axis: np.mean(first - second, axis=axis),
        permutation_type="samples",
        vectorized=True,
    )
    return float(found.pvalue)


def recipe_table(studies: Sequence[Study]) -> list[list[str]]:
    """Return a table, its header first, of what studies found: means over the seeds, accuracies with their spread.

    The last column is `paired_p_value` against the specification's study, where there is one.
    """
    columns = ["Recipe", "Parameters", "Epochs", "Seeds", "Test accuracy", "Lowest to highest", "Undisputed images"]
    columns += ["Calibration error", "Minutes a training", "p"]
    rows = []
    reference = next((study for study in studies if study.name == SPECIFICATION), None)
    for study in studies:
        accuracies = study.values("test_accuracy")
        p_value = f"{paired_p_value(study, reference):.3f}" if reference and study is not reference else ""
        rows.append(
            [
                study.name,
                f"{study.mean('parameters'):,.0f}",
                f"{study.mean('epochs'):.0f}",
                f"{len(study.rows)}",
                f"**{study.mean('test_accuracy'):.3%}** ± {100 * study.deviation('test_accuracy'):.3f}",
                f"{min(accuracies):.2%} to {max(accuracies):.2%}",
                f"{study.mean('test_undisputed_accuracy'):.3%}",
                f"{study.mean('test_calibration_error'):.2%}",
                f"{study.mean('seconds') / 60:.1f}",
                p_value,
            ]
        )
    return [columns, *rows]
