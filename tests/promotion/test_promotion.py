"""A model's way to the champion's place on a real `mlflow server`, and back, with deaths and rivals on the way."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from support import DATA, ROOT
from support.promoting import BOUNDS, Story
from support.repository import Repository
from support.servers import Server, free_port, mlflow_at, say_rest, serving  # noqa: F401 (a fixture)
from support.tables import rows

from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model

pytestmark = pytest.mark.pipeline

DYING = ROOT / "tests/support/dying.py"
BASE, WORSE, BETTER = 1, 2, 3  # the versions that the story registers
REQUESTS = 8  # that change the registry, in the promotion of a model that is no version yet, where there is a champion


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("server")
    with serving(directory, f"sqlite:///{directory / 'server.db'}") as server:
        root = tmp_path_factory.mktemp("promotion")
        story = Story(Repository.create(root, server.uri, batch_size=16, **BOUNDS).init())
        story.train("base", epochs=6)
        story.do("base", "mnist", "promote", "--reason", "the first")
        story.do("again", "mnist", "promote")
        story.train("worse", epochs=1)
        story.do("gate of the worse", "mnist", "gate")
        story.do("worse", "mnist", "promote")
        story.train("better", epochs=7)
        story.do("better", "mnist", "promote", "--reason", "an epoch more")
        story.do("rollback", "mnist", "promote", "--rollback", "--reason", "was better")
        story.do("second rollback", "mnist", "promote", "--rollback")
        yield story


def test_the_first_model_becomes_the_champion(story: Story) -> None:
    assert story.ended["base"].returncode == 0, story.said("base")
    assert story.said("base").endswith(f"\nversion {BASE} of mnist is the champion\n")
    assert story.after["base"] == {"champion": BASE}
    assert rows(story.said("base"))["beside the champion"][1].startswith("none yet in MLflow at http://127.0.0.1:")


def test_promoting_the_champion_changes_nothing_and_says_so(story: Story) -> None:
    assert story.ended["again"].returncode == 0
    assert story.said("again") == f"version {BASE} of mnist is the champion already\n"
    assert story.after["again"] == story.after["base"]


def test_a_worse_model_fails_and_the_champion_stays(story: Story) -> None:
    for name in ("gate of the worse", "worse"):
        assert story.ended[name].returncode == 1
        assert rows(story.said(name))["beside the champion"][-1] == "**failed**"
        assert rows(story.said(name))["dvc status"][-1] == "passed"
    refusal = f"error: the gate failed: version {WORSE} of mnist is the challenger, version {BASE} the champion"
    assert story.said("worse").splitlines()[-1] == refusal
    assert story.after["gate of the worse"] == {"champion": BASE}
    assert story.after["worse"] == {"champion": BASE, "challenger": WORSE}


def test_a_better_model_is_promoted_and_the_former_champion_kept(story: Story) -> None:
    assert story.ended["better"].returncode == 0, story.said("better")
    assert story.after["better"] == {"champion": BETTER, "previous": BASE}
    assert rows(story.said("better"))["data"] == ["the champion's", f"version {BASE}'s", "passed"]


def test_a_rollback_brings_the_former_champion_back(story: Story) -> None:
    assert story.ended["rollback"].returncode == 0
    assert story.said("rollback") == f"version {BASE} of mnist is the champion again\n"
    assert story.after["rollback"] == {"champion": BASE}


def test_nothing_is_undone_twice(story: Story) -> None:
    assert story.ended["second rollback"].returncode == 1
    assert story.said("second rollback") == "error: mnist has no previous champion: there is nothing to undo\n"
    assert story.after["second rollback"] == story.after["rollback"]


def test_a_version_tells_what_became_of_it(story: Story) -> None:
    became = {number: [record["became"] for record in story.records(number)] for number in (BASE, WORSE, BETTER)}
    assert became == {
        BASE: ["challenger", "champion", "previous", "champion"],
        WORSE: ["challenger"],
        BETTER: ["challenger", "champion", "withdrawn"],
    }
    assert str(story.records(WORSE)[0]["gate"]).startswith("failed: test accuracy")
    promoted = story.records(BETTER)[1]
    run = story.repository.client.get_run(story.repository.client.get_model_version("mnist", str(BETTER)).run_id or "")
    assert promoted.pop("metrics") == {
        name: run.data.metrics[name] for name in ("parameters", "test_accuracy", "test_calibration_error", "test_loss")
    }
    assert promoted == {
        "became": "champion",
        "instead_of": f"version {BASE}",
        "by": "tests",
        "commit": story.commits["better"],
        "reason": "an epoch more",
        "gate": "passed",
    }


def test_the_champion_predicts_as_the_models_file_does(
    story: Story,
    mlflow_at: Callable[[str], None],
    params: Params,
) -> None:
    story.repository.client.set_registered_model_alias("mnist", "champion", str(BETTER))
    mlflow_at(story.repository.uri)
    images, _ = load_digits(DATA, "test").tensors(params.data, torch.device("cpu"))
    expected = predict(load_model(story.repository.root / "models/model.safetensors"), images, 200)
    found = torch.from_numpy(mlflow.pyfunc.load_model("models:/mnist@champion").predict(images.numpy()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("requests", range(1, REQUESTS + 2))
def test_a_promotion_that_dies_leaves_one_champion_and_is_finished_by_another(story: Story, requests: int) -> None:
    story.settle(BASE, {BASE, WORSE})
    ended = story.repository.run(sys.executable, str(DYING), str(requests))
    assert ended.returncode == 0, ended.stdout
    died, before, after = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert died == {"ended": -9 if requests <= REQUESTS else 0}
    assert before["champion"] in {str(BASE), after["champion"]}
    assert after == {"champion": after["champion"], "previous": str(BASE)}
    assert int(after["champion"]) > WORSE
    [run] = {version.run_id for version in versions_beside(story, {BASE, WORSE})}
    assert run == story.repository.runs()[0].info.run_id


def versions_beside(story: Story, numbers: set[int]) -> list[mlflow.entities.model_registry.ModelVersion]:
    found = story.repository.client.search_model_versions("name = 'mnist'")
    return [version for version in found if int(version.version) not in numbers]


def test_of_two_promotions_at_once_one_wins(story: Story, tmp_path: Path) -> None:
    story.settle(WORSE, {BASE, WORSE})
    copy = Repository(tmp_path / "copy", story.repository.uri)
    shutil.copytree(story.repository.root, copy.root)
    copy.run("git", "checkout", "--quiet", story.commits["base"]).check_returncode()
    copy.dvc("checkout").check_returncode()
    processes = [repository.start("mnist", "promote") for repository in (copy, story.repository)]
    said = [say_rest(process) for process in processes]
    [new] = [int(version.version) for version in versions_beside(story, {BASE, WORSE})]
    ended = {
        number: (process.returncode, text) for number, process, text in zip((BASE, new), processes, said, strict=True)
    }
    found = story.aliases()
    code, text = ended.pop(found["champion"])
    assert (code, text.splitlines()[-1].split(" the champion")[0]) == (0, f"version {found['champion']} of mnist is")
    [(other, (code, text))] = ended.items()
    assert found["previous"] in {WORSE, other}
    assert code == 0 or f"another promotion came between, and version {found['champion']} is the champion" in text


def test_while_the_server_is_down_no_model_passes(story: Story) -> None:
    alone = Repository(story.repository.root, f"http://127.0.0.1:{free_port()}")
    judged, promoted = alone.run("mnist", "gate"), alone.run("mnist", "promote")
    assert judged.returncode == promoted.returncode == 1
    failing = {rule: row[1] for rule, row in rows(judged.stdout).items() if row[-1] == "**failed**"}
    assert failing.keys() == {"beside the champion", "data"}
    for reason in failing.values():
        assert reason.startswith(f"MLflow at {alone.uri} failed (")
    [line] = promoted.stdout.splitlines()
    assert line.startswith(f"error: MLflow at {alone.uri} failed (")
