"""A team's retraining: a better and a worse pull request, promotion and rollback.

CI's jobs run in fresh clones of a bare repository, with a directory as DVC's remote and a real `mlflow server`.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from support.additions import NEW, write_pictures
from support.promoting import BOUNDS, Story
from support.repository import Repository
from support.servers import serving
from support.tables import rows, table

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

MAKE = ("make", "--old-file=setup")  # what setup would install is installed
BASE, BETTER = 1, 2  # the versions that are promoted


def succeed(process: "subprocess.CompletedProcess[str]") -> str:
    assert process.returncode == 0, process.stdout
    return process.stdout


@dataclass(frozen=True)
class Retraining(Story):
    """Which stages each of CI's jobs ran, its comment, how its last command ended and where the aliases were then.

    The repository is the author's, who leaves the training to CI.
    """

    executed: dict[str, list[str]] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return self.repository.root.parent

    def publish(self) -> None:
        """Train the first model, and push it to an origin and to a remote that are new."""
        author, origin = self.repository, str(self.place / "origin.git")
        author.run("git", "init", "--quiet", "--bare", "--initial-branch=main", origin).check_returncode()
        author.run("git", "remote", "add", "origin", origin).check_returncode()
        author.dvc("remote", "add", "--default", "storage", str(self.place / "storage")).check_returncode()
        succeed(author.dvc("repro"))
        self.merge(author)

    def propose(self, name: str, change: Callable[[Repository], object]) -> Repository:
        """Push a branch from `main` with a change and run CI on it; return CI's clone."""
        author = self.repository
        succeed(author.run("git", "fetch", "--quiet"))
        succeed(author.run("git", "switch", "--quiet", "--create", name, "origin/main"))
        change(author)
        author.commit()
        succeed(author.run("git", "push", "--quiet", "origin", name))
        clone = self.clone(name)
        self.retrain(clone, name, "origin/main", "gate")
        return clone

    def merge(self, repository: Repository) -> None:
        """Push what a clone holds as `main`, and its outputs to the remote."""
        repository.commit()
        succeed(repository.dvc("push"))
        succeed(repository.run("git", "push", "--quiet", "origin", "HEAD:main"))

    def clone(self, name: str, branch: str = "") -> Repository:
        clone = Repository(self.place / f"ci-{name}", self.repository.uri)
        origin = str(self.place / "origin.git")
        succeed(self.repository.run("git", "clone", "--quiet", "--branch", branch or name, origin, str(clone.root)))
        return clone

    def retrain(self, clone: Repository, name: str, base: str, command: str) -> None:
        """Do what retrain.yml does, up to `mnist gate` or `mnist promote`."""
        assert "warning" not in succeed(clone.run(*MAKE, "pull"))
        said = succeed(clone.run(*MAKE, "repro"))
        (clone.root / "ci-report.log").write_text(said, encoding="utf-8")
        succeed(clone.run("mnist", "ci-report", "--base", base, "--log", "ci-report.log", "--out", "ci-report.md"))
        self.executed[name] = re.findall(r"Running stage '(\w+)'", said)
        self.comments[name] = (clone.root / "ci-report.md").read_text(encoding="utf-8")
        replace(self, repository=clone).do(name, "mnist", command)

    def verdict(self, name: str) -> str:
        """Return the gate's verdict from the comment's first row; check that the gate itself says the same."""
        failed = [rule for rule, *_, verdict in table(self.said(name), "rule") if verdict == "**failed**"]
        [[verdict, *_]] = table(self.comments[name], "Gate")
        assert verdict == (f"**failed**: {', '.join(failed)}" if failed else "passed")
        assert self.ended[name].returncode == bool(failed)
        return verdict


def add_digits(author: Repository) -> None:
    succeed(author.run("mnist", "add", str(write_pictures(author.root.parent / "mine", NEW))))
    succeed(author.dvc("push", "data/added/mine.dvc"))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retraining]:
    place = tmp_path_factory.mktemp("retraining")
    with serving(place, f"sqlite:///{place / 'server.db'}") as server:
        author = Repository.create(place / "author", server.uri, epochs=4, batch_size=16, **BOUNDS).init()
        story = Retraining(author)
        story.publish()
        story.do("base", "mnist", "promote")
        story.retrain(story.clone("unchanged", "main"), "unchanged", "HEAD", "gate")

        story.merge(story.propose("better", lambda author: author.set_param("epochs", 8)))
        story.retrain(story.clone("merged", "main"), "merged", "HEAD^", "promote")
        story.propose("worse", lambda author: author.set_param("epochs", 1))

        clone = story.propose("data", add_digits)
        clone.set_param("changed_data", "true")
        clone.commit()
        story.retrain(clone, "data allowed", "origin/main", "gate")
        story.do("rollback", "mnist", "promote", "--rollback")
        yield story


def test_the_base_is_promoted(story: Retraining) -> None:
    succeed(story.ended["base"])
    assert story.after["base"] == {"champion": BASE}


def test_nothing_runs_for_an_unchanged_commit_and_the_comment_says_so(story: Retraining) -> None:
    assert story.executed["unchanged"] == []
    assert "**Nothing ran**: `dvc.lock` is the same as in the base." in story.comments["unchanged"]
    assert story.verdict("unchanged") == "passed"


def test_a_better_param_is_reported_with_what_it_changed(story: Retraining) -> None:
    comment = story.comments["better"]
    assert story.executed["better"] == ["train", "evaluate", "report"]
    assert table(comment, "Param") == [["`train.epochs`", "`4`", "`8`"]]
    assert rows(comment)["`test_accuracy`"][2].startswith("+")
    assert rows(comment)["`test_misclassified`"][2].startswith("-")
    assert story.verdict("better") == "passed"
    assert story.after["better"] == {"champion": BASE}  # a pull request promotes nothing


def test_a_merged_change_is_promoted_without_training_it_again(story: Retraining) -> None:
    assert story.executed["merged"] == []
    assert story.ended["merged"].returncode == 0, story.said("merged")
    assert story.after["merged"] == {"champion": BETTER, "previous": BASE}


def test_a_worse_param_fails_and_the_champion_stays(story: Retraining) -> None:
    assert story.executed["worse"] == ["train", "evaluate", "report"]
    assert rows(story.comments["worse"])["`test_accuracy`"][2].startswith("-")
    assert "beside the champion" in story.verdict("worse")
    assert story.after["worse"] == story.after["merged"]


def test_other_data_train_anew_and_are_refused(story: Retraining) -> None:
    assert story.executed["data"] == ["train", "evaluate", "report"]
    assert rows(story.comments["data"])["`train`"] == ["**yes**", "`data/added` changed"]
    assert story.verdict("data") == "**failed**: data"


def test_other_data_pass_if_the_params_allow_them(story: Retraining) -> None:
    assert story.executed["data allowed"] == []  # no stage reads the gate's bounds
    assert rows(story.said("data allowed"))["data"] == ["any", f"other than version {BETTER}'s", "passed"]
    assert story.verdict("data allowed") == "passed"


def test_a_rollback_brings_the_former_champion_back(story: Retraining) -> None:
    succeed(story.ended["rollback"])
    assert story.after["rollback"] == {"champion": BASE}


@pytest.mark.parametrize("side", ["HEAD", "MERGE_HEAD"])
def test_two_branches_that_both_trained_merge_as_the_page_says(trained: Repository, tmp_path: Path, side: str) -> None:
    repository = trained.copy(tmp_path / "repository")
    branch = repository.run("git", "branch", "--show-current").stdout.strip()
    repository.run("git", "branch", "other").check_returncode()
    for name, key, value in (("other", "learning_rate", 0.01), (branch, "epochs", 1)):
        repository.run("git", "checkout", "--quiet", name).check_returncode()
        repository.dvc("checkout").check_returncode()
        repository.set_param(key, value)
        succeed(repository.dvc("repro"))
        repository.commit()
    merged = repository.run("git", "merge", "other")
    assert "CONFLICT" in merged.stdout
    succeed(repository.run("git", "checkout", side, "--", "dvc.lock", "reports"))
    assert repository.run("git", "diff", "--name-only", "--diff-filter=U", "--", "params.yaml").stdout == ""
    succeed(repository.dvc("repro"))
    repository.run("git", "add", "--all").check_returncode()
    repository.run("git", "commit", "--quiet", "--no-edit").check_returncode()
    assert repository.dvc("status", "--quiet").returncode == 0
    lock = yaml.safe_load((repository.root / "dvc.lock").read_text(encoding="utf-8"))
    params = lock["stages"]["train"]["params"]["params.yaml"]["train"]
    assert (params["epochs"], params["learning_rate"]) == (1, 0.01)
