"""A model's way to the champion's place and back, with deaths and rivals on the way."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from support import DATA, ROOT
from support.dying import dying_requests
from support.promoting import BOUNDS, Story
from support.repository import Repository
from support.servers import free_port, say_rest, serving
from support.stores import isolated_tracking
from support.tables import rows

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.promotion import promote
from mnist_pipeline.promotion.gate import Verdict, judge
from mnist_pipeline.promotion.promote import promote_model, roll_back_model
from mnist_pipeline.tracking.run import MODEL_TAG, TrackedRun
from mnist_pipeline.tracking.store import Store

MODEL = Path("models/model.safetensors")
DYING = ROOT / "tests/support/dying.py"
METRICS = {"test_accuracy": 0.5, "test_loss": 1.5, "test_calibration_error": 0.125, "parameters": 19_210.0}
REQUESTS = 8  # that change the registry, in the promotion of a model that is no version yet, if there is a champion


@dataclass(frozen=True)
class Workspace:
    """A directory with a model's file, a registry of its own, and a gate that decides as it is told to."""

    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def train(self, name: str) -> str:
        """Write a model's file and log its run; return the run's id."""
        MODEL.parent.mkdir(exist_ok=True)
        MODEL.write_text(name, encoding="utf-8")
        store = Store()
        run = store.client.create_run(store.experiment_id, tags={MODEL_TAG: sha256(MODEL)}).info.run_id
        TrackedRun(store.client, run).log(METRICS)
        model = store.client.create_logged_model(store.experiment_id, "model", run)
        store.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(run)

    def promote(self, reason: str = "", passed: bool = True) -> str:
        """Promote the model; return the last line that is printed."""
        self.patch.setattr(promote, "judge", lambda: [Verdict("test accuracy", "at least 90.00%", "95.00%", passed)])
        promote_model(reason)
        return self.capsys.readouterr().out.splitlines()[-1]

    def aliases(self) -> dict[str, int]:
        found = MlflowClient().get_registered_model("mnist").aliases
        return {alias: int(number) for alias, number in found.items()}

    def records(self, number: int) -> list[dict[str, object]]:
        tags = MlflowClient().get_model_version("mnist", str(number)).tags
        return [json.loads(value) for _, value in sorted(tags.items())]


@pytest.fixture
def workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Workspace]:
    with isolated_tracking(tmp_path) as patch:
        patch.setenv("GIT_COMMITTER_NAME", "tests")
        patch.setenv("GIT_COMMITTER_EMAIL", "tests@example.com")
        yield Workspace(patch, capsys)


def test_models_are_promoted_refused_and_rolled_back(workspace: Workspace) -> None:
    workspace.train("first")
    assert workspace.promote() == "version 1 of mnist is the champion"
    assert workspace.aliases() == {"champion": 1}

    workspace.train("worse")
    refusal = "the gate failed: version 2 of mnist is the challenger, version 1 the champion"
    with pytest.raises(UserError, match=f"^{refusal}$"):
        workspace.promote(passed=False)
    assert workspace.aliases() == {"champion": 1, "challenger": 2}

    workspace.train("better")
    workspace.capsys.readouterr()
    assert workspace.promote() == "version 3 of mnist is the champion, version 1 the previous one"
    assert workspace.aliases() == {"champion": 3, "previous": 1}

    roll_back_model("the first was better")
    assert workspace.capsys.readouterr().out == "version 1 of mnist is the champion again\n"
    assert workspace.aliases() == {"champion": 1}
    with pytest.raises(UserError, match=r"^mnist has no previous champion: there is nothing to undo$"):
        roll_back_model("")

    became = {number: [record["became"] for record in workspace.records(number)] for number in (1, 2, 3)}
    assert became == {
        1: ["challenger", "champion", "previous", "champion"],
        2: ["challenger"],
        3: ["challenger", "champion", "withdrawn"],
    }
    assert workspace.records(2)[0]["gate"] == "failed: test accuracy"


def test_a_version_tells_who_promoted_it_why_and_with_which_metrics(workspace: Workspace) -> None:
    workspace.train("first")
    workspace.promote("it is the first")
    assert workspace.records(1)[1] == {
        "became": "champion",
        "instead_of": "none",
        "by": "tests",
        "commit": "none: fatal: not a git repository (or any of the parent directories): .git",
        "reason": "it is the first",
        "gate": "passed",
        "metrics": METRICS,
    }


def test_promoting_the_champion_changes_nothing_and_says_so(workspace: Workspace) -> None:
    workspace.train("first")
    workspace.promote()
    before = workspace.records(1)
    assert workspace.promote(passed=False) == "version 1 of mnist is the champion already"
    assert (workspace.aliases(), workspace.records(1)) == ({"champion": 1}, before)


class Died(BaseException):
    """Nothing that a program catches."""


@pytest.mark.parametrize("requests", range(1, REQUESTS + 2))
def test_a_promotion_that_dies_leaves_one_champion_and_is_finished_by_another(
    workspace: Workspace, requests: int
) -> None:
    def die() -> None:
        raise Died

    base = workspace.train("base")
    workspace.promote()
    candidate = workspace.train("candidate")
    with pytest.MonkeyPatch.context() as patch:
        for name, method in dying_requests(requests, die).items():
            patch.setattr(MlflowClient, name, method)
        if requests <= REQUESTS:
            with pytest.raises(Died):
                workspace.promote()
        else:
            workspace.promote()
    assert workspace.aliases()["champion"] in (1, 2)
    workspace.promote()
    assert workspace.aliases() == {"champion": 2, "previous": 1}
    versions = MlflowClient().search_model_versions("name = 'mnist'")
    assert {int(version.version): version.run_id for version in versions} == {1: base, 2: candidate}


# Real processes


@pytest.fixture(scope="module")
def committed(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A trained and committed repository whose model meets the bounds of its gate."""
    repository = trained.copy(tmp_path_factory.mktemp("committed"))
    repository.set_param("lowest_accuracy", 0.0)
    repository.set_param("largest_calibration_error", 1.0)
    repository.commit()
    return repository


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_promotion_that_is_killed_is_finished_by_another(committed: Repository, params: Params) -> None:
    ended = committed.run(sys.executable, str(DYING), "5")
    assert ended.returncode == 0, ended.stdout
    died, before, after = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert died == {"ended": -9}
    assert before == {"challenger": "1"}
    assert after == {"champion": "1"}

    images, _ = load_digits(DATA, "test").tensors(params.data, torch.device("cpu"))
    with isolated_tracking(committed.root):
        Store()
        champion = mlflow.pyfunc.load_model("models:/mnist@champion")
        predicted = torch.from_numpy(champion.predict(images.numpy()))
        torch.testing.assert_close(predicted, predict(load_model(MODEL).network, images, 200))


@pytest.mark.pipeline
def test_while_the_server_is_down_no_model_passes(committed: Repository) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with isolated_tracking(committed.root) as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        failing = {verdict.rule: verdict.value for verdict in judge() if not verdict.passed}
        assert failing.keys() == {"beside the champion", "data"}
        for reason in failing.values():
            assert reason.startswith(f"MLflow at {address} failed (")
        with pytest.raises(UserError, match=rf"^MLflow at {address} failed \([^\n]+$"):
            promote_model("")


# On a real server

BASE, WORSE = 1, 2  # the versions that the story registers


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("server")
    with serving(directory, f"sqlite:///{directory / 'server.db'}") as server:
        root = tmp_path_factory.mktemp("promotion")
        story = Story(Repository.create(root, server.uri, batch_size=16, **BOUNDS).init())
        story.train("base", epochs=6)
        story.do("base", "mnist", "promote", "--reason", "the first")
        story.train("worse", epochs=1)
        story.do("worse", "mnist", "promote")
        story.train("better", epochs=7)
        yield story


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_worse_model_fails_on_a_server(story: Story) -> None:
    assert rows(story.said("base"))["beside the champion"][1].startswith("none yet in MLflow at http://127.0.0.1:")
    assert story.said("base").endswith(f"\nversion {BASE} of mnist is the champion\n")
    assert story.ended["worse"].returncode == 1
    assert rows(story.said("worse"))["beside the champion"][-1] == "**failed**"
    assert rows(story.said("worse"))["dvc status"][-1] == "passed"
    assert story.after == {"base": {"champion": BASE}, "worse": {"champion": BASE, "challenger": WORSE}}


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.parametrize("requests", [1, 5, REQUESTS])
def test_a_promotion_that_is_killed_is_finished_on_a_server(story: Story, requests: int) -> None:
    story.settle(BASE, {BASE, WORSE})
    ended = story.repository.run(sys.executable, str(DYING), str(requests))
    assert ended.returncode == 0, ended.stdout
    died, before, after = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert died == {"ended": -9}
    assert before["champion"] in {str(BASE), after["champion"]}
    assert after == {"champion": after["champion"], "previous": str(BASE)}
    assert versions_beside(story, {BASE, WORSE}) == [int(after["champion"])]


def versions_beside(story: Story, numbers: set[int]) -> list[int]:
    found = story.repository.client.search_model_versions("name = 'mnist'")
    return [number for version in found if (number := int(version.version)) not in numbers]


@pytest.mark.pipeline
@pytest.mark.thorough
def test_one_of_two_promotions_at_once_wins(story: Story, tmp_path: Path) -> None:
    story.settle(WORSE, {BASE, WORSE})
    copy = Repository(tmp_path / "copy", story.repository.uri)
    shutil.copytree(story.repository.root, copy.root)
    copy.run("git", "checkout", "--quiet", story.commits["base"]).check_returncode()
    copy.dvc("checkout").check_returncode()
    processes = [repository.start("mnist", "promote") for repository in (copy, story.repository)]
    said = [say_rest(process) for process in processes]
    [new] = versions_beside(story, {BASE, WORSE})
    ended = {
        number: (process.returncode, text) for number, process, text in zip((BASE, new), processes, said, strict=True)
    }
    found = story.aliases()
    code, text = ended.pop(found["champion"])
    assert (code, text.splitlines()[-1].split(" the champion")[0]) == (0, f"version {found['champion']} of mnist is")
    [(other, (code, text))] = ended.items()
    assert found["previous"] in {WORSE, other}
    assert code == 0 or f"another promotion came between, and version {found['champion']} is the champion" in text
