"""Studies: a row for each seed, and nothing trained twice."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.stores import isolated_tracking
from support.trials import MadeUpTrials, repository_with_data, wait_for

from mnist_pipeline.cli import main
from mnist_pipeline.common.files import read_table, write_csv
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.experiments import study as study_module
from mnist_pipeline.experiments.study import run_study, seed_params


def test_each_seed_trains_in_one_thread_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = seed_params("specification", 3, validation=False)
    assert [params.seed for params in plan] == [0, 1, 2]
    assert {(params.threads, params.data.validation_size) for params in plan} == {(1, 0)}
    assert all(params.train == load_params().train for params in plan)


def test_a_validation_study_holds_images_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {params.data.validation_size for params in seed_params("best", 2, validation=True)} == {10_000}


def test_an_interrupted_command_says_so_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(study_module, "run_study", interrupt)
    monkeypatch.setattr("sys.argv", ["mnist", "study", "fast"])
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"


# What a study does with its rows; the trainings are made up


class QuickStudy:
    """Studies of a recipe `quick` in a repository that is the working directory."""

    table = Path("reports/studies/quick.csv")

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repository_with_data(root)
        monkeypatch.chdir(root)
        monkeypatch.delenv("DVC_ROOT", raising=False)
        self.monkeypatch = monkeypatch
        self.set_recipe(averaging=0.9)

    def set_recipe(self, **params: object) -> None:
        Path("experiments/quick.yaml").write_text(yaml.safe_dump({"train": params}))

    def run(self, seeds: int, shift: float = 0.0, validation: bool = False) -> list[str]:
        """Run the study; return the names of the trials that it ran."""

        def accuracy(params: Params) -> float:
            return 0.9 + params.seed / 100 + shift

        made_up = MadeUpTrials(accuracy)
        self.monkeypatch.setattr(study_module, "open_pool", made_up.open_pool)
        run_study("quick", seeds, validation)
        return [trial.name for trial in made_up.trials]

    @property
    def rows(self) -> list[dict[str, str]]:
        return read_table(self.table)

    @property
    def accuracies(self) -> list[str]:
        return [row["test_accuracy"] for row in self.rows]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QuickStudy:
    return QuickStudy(tmp_path, monkeypatch)


def change_code(path: str) -> None:
    code = Path("src/mnist_pipeline") / path
    code.write_text(f"{code.read_text()}# says nothing new\n")


def test_a_study_has_the_columns_of_the_committed_tables(quick: QuickStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.run(2) == ["quick-0", "quick-1"]
    assert quick.accuracies == ["0.9", "0.91"]
    tables = list((ROOT / "reports/studies").glob("*.csv"))
    assert tables
    assert {tuple(read_table(table)[0]) for table in tables} == {tuple(quick.rows[0])}
    assert "quick.csv: 2 seeds, test_accuracy 90.500%" in capsys.readouterr().out


def test_a_validation_study_has_a_table_of_its_own_without_test_scores(quick: QuickStudy) -> None:
    assert quick.run(1, validation=True) == ["quick-validation-0"]
    [row] = read_table(Path("reports/studies/quick-validation.csv"))
    assert row["monitor_accuracy"] == "0.9"
    assert not any(name.startswith("test_") for name in row)


def test_rows_that_are_there_are_not_made_again(quick: QuickStudy, capsys: pytest.CaptureFixture[str]) -> None:
    quick.run(2)
    before = quick.table.read_bytes()
    assert quick.run(1) == quick.run(2) == []
    assert quick.table.read_bytes() == before
    assert "2 seeds" in capsys.readouterr().out.splitlines()[-1]
    assert quick.run(3) == ["quick-2"]


def test_a_gap_is_filled(quick: QuickStudy) -> None:
    quick.run(3)
    whole = quick.accuracies
    write_csv(quick.table, quick.rows[2:])
    assert quick.run(1) == ["quick-0"]
    assert quick.run(2) == ["quick-1"]
    assert quick.accuracies == whole


def test_rows_of_params_that_give_other_figures_are_dropped(
    quick: QuickStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.run(2)
    quick.set_recipe(averaging=0.8)
    assert quick.run(1, shift=-0.1) == ["quick-0"]
    assert quick.accuracies == ["0.8"]
    assert "params, data or code changed, and seed 0 differs" in capsys.readouterr().out


def test_rows_without_all_measures_are_dropped(quick: QuickStudy, capsys: pytest.CaptureFixture[str]) -> None:
    quick.run(2)
    write_csv(quick.table, [{k: v for k, v in row.items() if k != "test_calibration_error"} for row in quick.rows])
    assert quick.run(1) == ["quick-0"]
    assert len(quick.rows) == 1
    assert "2 rows have other measures and are dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "columns"),
    [
        ("model/network.py", {"fingerprint", "evaluation_fingerprint"}),
        ("evaluation/corruptions.py", {"evaluation_fingerprint"}),
    ],
)
def test_after_a_change_of_code_one_seed_that_comes_out_the_same_speaks_for_all(
    code: str, columns: set[str], quick: QuickStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.run(3)
    before = quick.rows
    change_code(code)
    assert quick.run(1) == ["quick-0"]
    assert "params, data or code changed, and seed 0 comes out the same" in capsys.readouterr().out
    for row, former in zip(quick.rows, before, strict=True):
        assert {name for name in row if row[name] != former[name]} - {"seconds"} == columns
    assert quick.run(3) == []


def test_after_a_change_of_code_that_changes_a_seed_all_are_made_again(
    quick: QuickStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.run(3)
    change_code("model/network.py")
    assert quick.run(2, shift=-0.1) == ["quick-0", "quick-1"]
    assert "params, data or code changed, and seed 0 differs" in capsys.readouterr().out
    assert quick.accuracies == ["0.8", "0.81"]


# The real thing


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_study_whose_process_is_killed_goes_on(seeds: int, tmp_path: Path) -> None:
    repository = repository_with_data(tmp_path, fresh=False, epochs=10, batch_size=16)
    (tmp_path / "experiments/quick.yaml").write_text("train:\n  averaging: 0.9\n  augmentation:\n    rotation: 5.0\n")
    driver = repository.start("mnist", "study", "quick", "--seeds", str(seeds))
    wait_for(lambda: len(list(tmp_path.glob(".checkpoints/*.safetensors"))) == min(seeds, os.cpu_count() or 1))
    driver.kill()
    driver.wait()
    with isolated_tracking(tmp_path):
        run_study("quick", seeds, validation=False)
    rows = read_table(tmp_path / "reports/studies/quick.csv")
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(seeds)]
    children = {run.info.run_name: run for run in repository.runs()}
    parent = children.pop("study quick")
    assert parent.info.status == "FINISHED"
    assert set(children) == {f"quick-{seed}" for seed in range(seeds)}
    for row in rows:
        run = children[f"quick-{row['seed']}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["train.averaging"] == "0.9"
        assert run.data.metrics["test_accuracy"] == float(row["test_accuracy"])
        assert repository.steps(run) == list(range(1, 11))  # each once: it went on from its checkpoint
    assert [path.name for path in tmp_path.glob(".checkpoints/*")] == []
