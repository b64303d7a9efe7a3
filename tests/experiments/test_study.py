"""Recipes and studies: valid overlays, a row for each seed, and nothing trained twice."""

import signal
from pathlib import Path

import pytest
from support import ROOT
from support.repository import Repository

from mnist_pipeline.cli import main
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_table, write_csv
from mnist_pipeline.common.params import load_params
from mnist_pipeline.experiments.recipes import overlay_of
from mnist_pipeline.experiments.study import plan
from mnist_pipeline.model.network import Net, count_parameters
from mnist_pipeline.report.studies import Study, load_studies, paired_p_value

RECIPES = sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_params_that_there_are_within_the_budget(name: str) -> None:
    params = load_params(overlay=overlay_of(name))
    assert params != load_params()
    assert count_parameters(Net(params.model)) < params.model.parameter_budget


def test_an_unknown_recipe_is_told_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=rf"experiments/worst.yaml is absent: the recipes are specification, {', '.join(RECIPES)}"
    ):
        overlay_of("worst")


def test_an_overlay_that_names_an_unknown_param_is_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "odd.yaml"
    overlay.write_text("train:\n  epoch: 3\n")
    with pytest.raises(UserError, match=r"odd.yaml: train.epoch is unknown: choose from processes, epochs"):
        load_params(overlay=overlay)


def test_a_study_plans_seed_after_seed_of_one_thread() -> None:
    plans = plan("specification", 3, validation=False)
    assert [(params.seed, params.threads, params.data.validation_size) for params in plans] == [
        (0, 1, 0),
        (1, 1, 0),
        (2, 1, 0),
    ]
    assert all(params.train == load_params().train for params in plans)


def test_a_validation_study_holds_images_out() -> None:
    assert {params.data.validation_size for params in plan("specification", 2, validation=True)} == {5000}


def test_an_interrupted_command_says_so_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mnist_pipeline.study.study", interrupt)
    monkeypatch.setattr("sys.argv", ["mnist", "study", "fast"])
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def made_up(name: str, *accuracies: float) -> Study:
    return Study(name, [{"seed": str(seed), "test_accuracy": str(value)} for seed, value in enumerate(accuracies)])


def test_a_study_says_how_its_seeds_spread() -> None:
    study = made_up("best", 0.995, 0.996, 0.997)
    assert study.seeds == [0, 1, 2]
    assert (study.mean("test_accuracy"), study.deviation("test_accuracy")) == pytest.approx((0.996, 0.001))
    assert study.summary("test_accuracy") == (
        "3 seeds, test_accuracy 99.600%, standard deviation 0.100 points, 99.50% to 99.70%"
    )


def test_two_studies_are_compared_seed_by_seed() -> None:
    study = made_up("best", *(0.996 + seed / 1e5 for seed in range(10)))
    worse = made_up("fast", *(0.995 + seed / 1e5 for seed in range(10)))
    assert paired_p_value(study, worse) == pytest.approx(2 / 2**10)  # of all signs, all alike: either way
    assert paired_p_value(study, made_up("fast", *(0.995 + seed / 1e5 for seed in range(3)))) == pytest.approx(2 / 2**3)
    assert paired_p_value(study, made_up("fast", 0.99)) == 1
    mixed = made_up("fast", *(0.996 + seed / 1e5 + (-1) ** seed / 1e4 for seed in range(10)))
    assert paired_p_value(study, mixed) > 0.5


def test_studies_on_held_out_images_are_not_among_those_that_were_tested(tmp_path: Path) -> None:
    for name in ("best", "best-validation", "specification"):
        (tmp_path / f"{name}.csv").write_text("seed,test_accuracy\n0,0.99\n")
    assert [study.name for study in load_studies(tmp_path)] == ["specification", "best"]


@pytest.mark.pipeline
def test_a_study_trains_each_seed_once(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path).init()
    (tmp_path / "experiments/quick.yaml").write_text("train:\n  averaging: 0.9\n  augmentation:\n    rotation: 5.0\n")
    assert repository.stage("download").returncode == 0
    table = tmp_path / "reports/studies/quick.csv"

    first = repository.run("mnist", "study", "quick", "--seeds", "2")
    assert first.returncode == 0, first.stdout
    rows = read_table(table)
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert "2 seeds, test_accuracy" in first.stdout
    children = {run.info.run_name: run for run in repository.runs()}
    parent = children.pop("study quick")
    assert set(children) == {"quick-0", "quick-1"}
    for row in rows:
        run = children[f"quick-{row['seed']}"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["test_accuracy"] == float(row["test_accuracy"])
        assert run.data.params["train.averaging"] == "0.9"
        assert run.info.status == "FINISHED"
    assert parent.info.status == "FINISHED"

    def again(seeds: int) -> str:
        finished = repository.run("mnist", "study", "quick", "--seeds", str(seeds))
        assert finished.returncode == 0, finished.stdout
        return finished.stdout

    def trainings() -> int:
        return len([run for run in repository.runs() if run.info.run_name.startswith("quick")])

    def figures(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [
            {name: row[name] for name in row.keys() - {"seconds", "fingerprint", "evaluation_fingerprint"}}
            for row in rows
        ]

    before = table.read_bytes()
    again(seeds=1)
    assert table.read_bytes() == before
    assert trainings() == 2

    code = tmp_path / "src/mnist_pipeline/model.py"
    code.write_text(f"{code.read_text()}# says nothing new\n")
    write_csv(table, rows[1:])
    assert "code have changed, and seed 1 comes out the same" in again(seeds=1)
    assert figures(read_table(table)) == figures(rows)
    assert trainings() == 4
    renewed = table.read_bytes()
    assert read_table(table)[1]["fingerprint"] != rows[1]["fingerprint"], "the row does not name the code of now"
    again(seeds=2)
    assert table.read_bytes() == renewed

    evaluation = tmp_path / "src/mnist_pipeline/corruptions.py"
    evaluation.write_text(f"{evaluation.read_text()}# nor this\n")
    table.write_text(table.read_text().replace(rows[0]["test_loss"], "0.5"))  # as if other code had made it
    assert "code have changed, and seed 0 differs" in again(seeds=2)
    assert figures(read_table(table)) == figures(rows)
    assert trainings() == 6


@pytest.mark.pipeline
def test_a_recipe_runs_as_an_experiment_of_dvc(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path).init()
    overlay = (
        "model:\n  channels: [4, 5, 4, 4, 4, 4]\n  bias: false\ntrain:\n  learning_rate: 0.002\n  optimizer: muon\n"
    )
    (tmp_path / "experiments/quick.yaml").write_text(overlay)
    said = repository.run("mnist", "experiment", "quick", "-S", "seed=4", MNIST_PARAMS="seed=5")
    assert said.returncode == 0, said.stdout
    (run,) = repository.runs()
    assert run.info.run_name == "quick"
    assert (run.data.params["train.learning_rate"], run.data.params["seed"]) == ("0.002", "4")
    assert (run.data.params["model.channels"], run.data.params["model.bias"]) == ("[4, 5, 4, 4, 4, 4]", "False")
    assert run.data.params["train.optimizer"] == "muon"


@pytest.mark.pipeline
def test_params_of_the_environment_stand_in_place_of_the_specifications(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path).init()
    said = repository.run("mnist", "experiment", "specification", MNIST_PARAMS="seed=4 train.epochs=1")
    assert said.returncode == 0, said.stdout
    (run,) = repository.runs()
    assert (run.data.params["seed"], run.data.params["train.epochs"]) == ("4", "1")
