"""The results of studies: the tables in reports/studies, with a row for each seed of a recipe."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_pipeline.common.files import read_table
from mnist_pipeline.common.paths import STUDIES
from mnist_pipeline.data.digits import Digits

SPECIFICATION = "specification"  # the recipe that is `params.yaml` itself
VALIDATION_SUFFIX = "-validation"  # of a table whose scores are on held-out training images
TEST_SHA256 = "test_sha256"  # the column with the digest of the test images
MEASURES = [  # the metrics that a study keeps for each seed
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

    def is_tested_on(self, test: Digits) -> bool:
        """Return whether its figures come from these test images."""
        return [row.get(TEST_SHA256) for row in self.rows[:1]] == [test.sha256()]

    def values(self, measure: str) -> list[float]:
        """Return a measure for each seed, in the order of the seeds."""
        return [float(row[measure]) for row in sorted(self.rows, key=lambda row: int(row["seed"]))]

    def mean(self, measure: str) -> float:
        """Return a measure's mean over the seeds."""
        return statistics.mean(self.values(measure))

    def deviation(self, measure: str) -> float:
        """Return a measure's standard deviation over the seeds; for a single seed it is 0."""
        return statistics.stdev(self.values(measure)) if len(self.rows) > 1 else 0.0

    def summary(self, measure: str) -> str:
        """Describe how an accuracy varies over the seeds."""
        mean, deviation = self.mean(measure), 100 * self.deviation(measure)
        spread = f"standard deviation {deviation:.3f} points, {percent_range(self.values(measure))}"
        return f"{len(self.rows)} seeds, {measure} {mean:.3%}, {spread}"


def percent_range(shares: Sequence[float]) -> str:
    """Return the lowest and the highest share as text, or one of them if they look the same."""
    return " to ".join(dict.fromkeys((f"{min(shares):.2%}", f"{max(shares):.2%}")))


def read_study_rows(table: Path) -> list[dict[str, str]]:
    """Read a study's table; a missing table has no rows."""
    return read_table(table) if table.exists() else []


def load_studies(directory: Path = STUDIES) -> list[Study]:
    """Return the studies that were scored on the test images; the specification's comes first."""
    tables = [path for path in directory.glob("*.csv") if not path.stem.endswith(VALIDATION_SUFFIX)]
    tables.sort(key=lambda path: (path.stem != SPECIFICATION, path))
    return [Study(path.stem, read_study_rows(path)) for path in tables]


def paired_p_value(study: Study, other: Study, measure: str = "test_accuracy") -> float:
    """Return the p-value of the difference between two recipes' means, from pairs of trainings with the same seed.

    If the recipes are equal, each seed's difference could as well have the other sign. The p-value is the share of
    sign combinations whose mean difference is at least as large (Fisher's permutation test for pairs, two-sided). With
    fewer than two common seeds it is 1.
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


def recipe_table(studies: Sequence[Study]) -> list[dict[str, str]]:
    """Return a row for each study, by column: means over the seeds, and how much the accuracy varies.

    The column `p` is the `paired_p_value` against the specification's study, if there is one.
    """
    reference = next((study for study in studies if study.name == SPECIFICATION), None)
    return [
        {
            "Recipe": study.name,
            "Parameters": f"{study.mean('parameters'):,.0f}",
            "Epochs": f"{study.mean('epochs'):.0f}",
            "Seeds": f"{len(study.rows)}",
            "Test accuracy": f"**{study.mean('test_accuracy'):.3%}** ± {100 * study.deviation('test_accuracy'):.3f}",
            "Lowest to highest": percent_range(study.values("test_accuracy")),
            "Undisputed images": f"{study.mean('test_undisputed_accuracy'):.3%}",
            "Calibration error": f"{study.mean('test_calibration_error'):.2%}",
            "Minutes a training": f"{study.mean('seconds') / 60:.1f}",
            "p": f"{paired_p_value(study, reference):.3f}" if reference and study is not reference else "",
        }
        for study in studies
    ]
