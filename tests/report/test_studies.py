"""The tables of studies: how seeds spread, and how two recipes compare."""

from pathlib import Path

import pytest
from support import ROOT

from mnist_pipeline.report.studies import MEASURES, Study, load_studies, paired_p_value


def study_of(name: str, *accuracies: float) -> Study:
    return Study(name, [{"seed": str(seed), "test_accuracy": str(value)} for seed, value in enumerate(accuracies)])


def test_a_study_says_how_its_seeds_spread() -> None:
    study = study_of("best", 0.995, 0.996, 0.997)
    assert study.seeds == [0, 1, 2]
    assert (study.mean("test_accuracy"), study.deviation("test_accuracy")) == pytest.approx((0.996, 0.001))
    assert study.summary("test_accuracy") == (
        "3 seeds, test_accuracy 99.600%, standard deviation 0.100 points, 99.50% to 99.70%"
    )


def test_two_studies_are_compared_seed_by_seed() -> None:
    study = study_of("best", *(0.996 + seed / 1e5 for seed in range(10)))
    worse = study_of("fast", *(0.995 + seed / 1e5 for seed in range(10)))
    assert paired_p_value(study, worse) == pytest.approx(2 / 2**10)  # of all signs, all alike: either way
    assert paired_p_value(study, study_of("fast", *(0.995 + seed / 1e5 for seed in range(3)))) == pytest.approx(
        2 / 2**3
    )
    assert paired_p_value(study, study_of("fast", 0.99)) == 1
    mixed = study_of("fast", *(0.996 + seed / 1e5 + (-1) ** seed / 1e4 for seed in range(10)))
    assert paired_p_value(study, mixed) > 0.5


def test_studies_on_held_out_images_are_left_out(tmp_path: Path) -> None:
    for name in ("best", "best-validation", "specification"):
        (tmp_path / f"{name}.csv").write_text("seed,test_accuracy\n0,0.99\n")
    assert [study.name for study in load_studies(tmp_path)] == ["specification", "best"]


def test_the_committed_tables_have_every_measure_of_every_seed() -> None:
    studies = load_studies(ROOT / "reports/studies")
    assert studies[0].name == "specification"
    for study in studies:
        assert study.seeds == list(range(len(study.rows)))
        assert all(len(study.values(measure)) == len(study.rows) for measure in [*MEASURES, "epochs", "seconds"])
