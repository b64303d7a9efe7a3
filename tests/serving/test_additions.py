"""Digits added to MNIST's: what must not train is refused in one line, what may trains and is tracked."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow.entities import Run
from PIL import Image
from support import DATA
from support.additions import NEW, TEST, TRAIN, write_idx, write_picture, write_pictures
from support.repository import Repository

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import Digits, read_idx
from mnist_pipeline.data.training_set import load_training_data, split
from mnist_pipeline.report.pictures import write_digit
from mnist_pipeline.serving.additions import IMAGES, LABELS, add, encode_idx, read_source
from mnist_pipeline.serving.preprocessing import normalize


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where there is the small MNIST, with forty new digits in `mine` to be added."""
    root = Repository.create(tmp_path / "repository").root
    shutil.copytree(DATA, root / "data/raw")
    write_pictures(root / "mine", NEW)
    monkeypatch.chdir(root)
    return root


def picture(pixels: object, mode: str = "L", name: str = "7/odd.png") -> Callable[[], None]:
    return lambda: write_picture(Path("mine") / name, pixels, mode)


def file(name: str, content: bytes = b"text") -> Callable[[], None]:
    def write() -> None:
        (Path("mine") / name).parent.mkdir(exist_ok=True)
        (Path("mine") / name).write_bytes(content)

    return write


def emptied() -> None:
    shutil.rmtree("mine")
    Path("mine/3").mkdir(parents=True)


def unbalanced() -> None:
    ones = TRAIN[TRAIN.labels == 1]
    for shift in (1, 2):
        for index, pixels in enumerate(torch.roll(ones.pixels, shift, dims=1)):
            write_picture(Path("mine/1") / f"{shift}-{index}.png", pixels)


def idx(digits: Digits, **files: bytes) -> Callable[[], None]:
    def write() -> None:
        shutil.rmtree("mine")
        write_idx(Path("mine"), digits)
        for name, content in files.items():
            (Path("mine") / {"images": IMAGES, "labels": LABELS}[name]).write_bytes(content)

    return write


SEVEN = TRAIN.pixels[0].numpy()
REFUSED = {
    "a test image": (picture(TEST.pixels[12]), ["no test image", "mine/7/odd.png (a copy of MNIST's test image 12)"]),
    "a test image of another label": (
        picture(TEST.pixels[12], name="0/a.png"),
        ["0/a.png (a copy of MNIST's test image 12)"],
    ),
    "a test image altered by a level": (picture(TEST.pixels[12] ^ 1), ["7/odd.png (a copy of MNIST's test image 12)"]),
    "a test image in colours that are grey": (
        picture(TEST.pixels[3], "RGB"),
        ["odd.png (a copy of MNIST's test image 3)"],
    ),
    "many test images": (
        lambda: write_pictures(Path("mine"), TEST[:80]),
        ["mine/0/005.png (a copy of MNIST's test image 5)", "and 75 more"],
    ),
    "a training image": (picture(SEVEN), ["mine/7/odd.png (a copy of MNIST's train image 0)"]),
    "a digit twice": (
        picture(NEW.pixels[0], name="9/odd.png"),
        [f"take out mine/9/odd.png (a copy of mine/{NEW.labels[0]}/000.png)"],
    ),
    "black on white": (picture(np.roll(255 - SEVEN, 2, 0)), ["white on black", "invert mine/7/odd.png"]),
    "nothing": (picture(np.zeros((28, 28), np.uint8)), ["white on black", "mine/7/odd.png"]),
    "another size": (picture(np.kron(SEVEN, np.ones((2, 2), np.uint8))), ["odd.png must", "28×28", "56×56", "--norm"]),
    "colours": (picture(np.stack([SEVEN, SEVEN, 0 * SEVEN], 2), "RGB"), ["7/odd.png", "grey", "RGB", "--normalize"]),
    "transparency": (picture(np.stack([SEVEN] * 4, 2), "RGBA"), ["7/odd.png", "grey", "RGBA", "--normalize"]),
    "16 bits": (picture(SEVEN.astype(np.uint16) * 257, "I;16"), ["7/odd.png", "I;16", "--normalize"]),
    "no picture": (file("7/notes.txt"), ["mine/7/notes.txt: this is no picture"]),
    "half a picture": (file("7/half.png", b"\x89PNG\r\n\x1a\n"), ["mine/7/half.png: "]),
    "a directory in a class": (lambda: Path("mine/7/more").mkdir(parents=True), ["mine/7/more: Is a directory"]),
    "an unknown class": (picture(SEVEN, name="seven/a.png"), ["mine/seven is unknown", "directories 0 to 9"]),
    "a class of two digits": (picture(SEVEN, name="10/a.png"), ["mine/10 is unknown"]),
    "a file among the classes": (file("labels.csv"), ["mine/labels.csv is unknown"]),
    "no pictures": (emptied, ["mine holds no pictures in directories 0 to 9, nor train-images-idx3-ubyte"]),
    "too many of a class": (unbalanced, ["training images of 1", "data.max_class_ratio allows 2 times as many"]),
    "IDX with a test image": (idx(NEW[:3] + TEST[7:8]), ["idx3-ubyte: image 3 (a copy of MNIST's test image 7)"]),
    "IDX with a label of 12": (
        idx(NEW[:3], labels=encode_idx(torch.tensor([1, 12, 3]))),
        ["train-labels-idx1-ubyte must hold labels from 0 to 9, and holds 12"],
    ),
    "IDX with a label too few": (idx(NEW[:3], labels=encode_idx(NEW.labels[:2])), ["holds 3 images", "(2,)"]),
    "IDX of another size": (idx(NEW, images=encode_idx(NEW.pixels.reshape(-1, 14, 56))), ["28×28", "(40, 14, 56)"]),
    "a damaged IDX": (idx(NEW, images=encode_idx(NEW.pixels)[:-1]), ["train-images-idx3-ubyte is damaged"]),
    "IDX without labels": (
        lambda: shutil.copy(DATA / IMAGES, "mine"),
        ["mine/train-labels-idx1-ubyte cannot be read"],
    ),
}


def refusal(name: str = "mine", normalize: bool = False) -> str:
    """Return the line in which an addition is refused, and see that it left nothing behind."""
    before = sorted(Path("data").rglob("*"))
    with pytest.raises(UserError) as refused:
        add(Path("mine"), name, normalize)
    assert sorted(Path("data").rglob("*")) == before
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("spoil", "fragments"), REFUSED.values(), ids=REFUSED.keys())
def test_what_must_not_train_is_refused_in_one_line(spoil: Callable[[], object], fragments: list[str]) -> None:
    spoil()
    message = refusal()
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.usefixtures("place")
def test_the_reports_pictures_of_misread_test_images_are_refused() -> None:
    shutil.rmtree("mine")
    write_digit(Path("mine/7/12.png"), TEST.pixels[12].numpy())
    assert "112×112" in refusal()
    assert "mine/7/12.png (a copy of MNIST's test image 12)" in refusal(normalize=True)


@pytest.mark.usefixtures("place")
def test_a_picture_that_holds_no_digit_is_not_normalised() -> None:
    write_picture(Path("mine/7/odd.png"), np.full((60, 60), 200, np.uint8))
    assert "mine/7/odd.png: the picture holds no digit" in refusal(normalize=True)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["", "..", "a/b", "v1.2", "with space", ".hidden"])
def test_a_name_that_could_be_no_directorys_is_refused(name: str) -> None:
    assert "choose a --name" in refusal(name)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("taken", [IMAGES, ""])
def test_a_name_that_is_taken_is_refused(taken: str) -> None:
    write_idx(Path("data/added/mine"), NEW[:1]) if taken else Path("data/added/mine.dvc").write_text("outs: []")
    assert "data/added/mine is there: choose another --name" in refusal()


@pytest.mark.usefixtures("place")
def test_what_was_added_before_is_not_added_again() -> None:
    write_idx(Path("data/added/first"), NEW[5:6])
    label = int(NEW.labels[5])
    assert f"mine/{label}/005.png (a copy of data/added/first: image 0)" in refusal()


@pytest.mark.usefixtures("place")
def test_a_directory_that_is_not_there_is_a_wrong_option() -> None:
    assert CliRunner().invoke(mnist, ["add", "absent"]).exit_code == 2


def test_pictures_are_read_class_by_class_in_the_order_of_their_names(tmp_path: Path) -> None:
    digits, names = read_source(write_pictures(tmp_path / "mine", NEW), normalize=False)
    order = torch.argsort(NEW.labels, stable=True)
    assert digits.sha256() == NEW[order].sha256()
    assert names[0] == str(tmp_path / f"mine/0/{int(order[0]):03}.png")


def test_idx_files_are_read_as_they_are(tmp_path: Path) -> None:
    digits, names = read_source(write_idx(tmp_path / "mine", NEW), normalize=False)
    assert digits.sha256() == NEW.sha256()
    assert len(names) == 40


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_idx_files_are_written_as_mnists_are(name: str) -> None:
    assert encode_idx(read_idx(DATA / name)) == (DATA / name).read_bytes()


def test_of_pictures_the_others_alone_are_normalised(tmp_path: Path) -> None:
    write_picture(tmp_path / "7/a.png", NEW.pixels[0])
    write_digit(tmp_path / "7/b.png", NEW.pixels[0].numpy())  # black on white, enlarged
    digits, _ = read_source(tmp_path, normalize=True)
    assert torch.equal(digits.pixels[0], NEW.pixels[0])
    assert np.array_equal(digits.pixels[1], normalize(Image.open(tmp_path / "7/b.png")))
    assert not torch.equal(digits.pixels[0], digits.pixels[1])


# What trains


@pytest.mark.parametrize("validation_size", [0, 50])
def test_without_additions_the_data_are_mnists_alone(params: Params, tmp_path: Path, validation_size: int) -> None:
    (tmp_path / ".gitignore").write_text("*")
    data = params.data.model_copy(update={"validation_size": validation_size})
    parts = load_training_data(DATA, tmp_path, data, seed=0)
    expected = split(TRAIN, 50, seed=0) if validation_size else (TRAIN, TEST)
    assert [part.sha256() for part in parts.values()] == [part.sha256() for part in expected]


@pytest.mark.parametrize("validation_size", [0, 50])
def test_additions_train_and_change_no_image_that_monitors(
    params: Params, tmp_path: Path, validation_size: int
) -> None:
    write_idx(tmp_path / "b", NEW[:10])
    write_idx(tmp_path / "a", NEW[10:])
    data = params.data.model_copy(update={"validation_size": validation_size})
    parts = load_training_data(DATA, tmp_path, data, seed=0)
    training, monitor = split(TRAIN, 50, seed=0) if validation_size else (TRAIN, TEST)
    assert parts["monitor"].sha256() == monitor.sha256()
    assert parts["train"].sha256() == (training + NEW[10:] + NEW[:10]).sha256()


@pytest.mark.parametrize("part", [TEST, TRAIN])
@pytest.mark.parametrize("validation_size", [0, 50])
def test_a_copy_that_lies_among_the_additions_does_not_train(
    params: Params, tmp_path: Path, part: Digits, validation_size: int
) -> None:
    write_idx(tmp_path / "mine", NEW[:3] + part[9:10])
    data = params.data.model_copy(update={"validation_size": validation_size})
    with pytest.raises(UserError, match=r"mine: image 3 \(a copy of MNIST's (test|train) image 9\)$"):
        load_training_data(DATA, tmp_path, data, seed=0)


def test_an_addition_that_is_tracked_and_absent_is_not_passed_over(params: Params, tmp_path: Path) -> None:
    (tmp_path / "mine.dvc").write_text("outs: []")
    with pytest.raises(UserError, match=r"mine/train-images-idx3-ubyte cannot be read .*dvc pull"):
        load_training_data(DATA, tmp_path, params.data, seed=0)


def test_what_is_no_addition_is_not_passed_over(params: Params, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match="notes/train-images-idx3-ubyte cannot be read"):
        load_training_data(DATA, tmp_path, params.data, seed=0)


# The pipeline


@dataclass(frozen=True)
class Story:
    """What each command said, the outputs after some, and the runs."""

    steps: dict[str, "subprocess.CompletedProcess[str]"] = field(default_factory=dict)
    outputs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    def said(self, name: str) -> str:
        return self.steps[name].stdout

    def executed(self, name: str) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.said(name))

    def trained(self, name: str) -> int:
        """Return how many images a run says that it trained on."""
        [used] = [used.dataset for used in self.runs[name].inputs.dataset_inputs if used.dataset.name == "mnist-train"]
        return int(json.loads(used.profile)["num_rows"])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Add digits, share them, add a leak by hand and take everything back, in this order."""
    place = tmp_path_factory.mktemp("additions")
    first, clone = Repository.create(place / "first", epochs=1).init(), Repository(place / "clone")
    mine = write_pictures(place / "mine", NEW)
    story = Story()

    def keep(name: str, process: "subprocess.CompletedProcess[str]") -> None:
        story.steps[name] = process
        names = ("dvc.lock", "reports/history.csv", "reports/report.md")
        story.outputs[name] = {name: path.read_bytes() for name in names if (path := first.root / name).exists()}
        story.runs[name] = first.runs()[0]

    keep("before", first.dvc("repro"))
    first.commit()
    keep("add", first.run("mnist", "add", str(mine)))
    keep("git status", first.run("git", "status", "--porcelain"))
    keep("status", first.dvc("status"))
    keep("after", first.dvc("repro"))
    keep("status after", first.dvc("status"))
    first.commit()
    keep("trial", first.dvc("exp", "run", "--temp", "-n", "trial", "-S", "train.learning_rate=0.002"))
    keep("study", first.run("mnist", "study", "specification", "--seeds", "1"))
    (first.root / "reports/studies/specification.csv").unlink()  # it would change the report
    keep("reproduce", first.run("mnist", "reproduce"))

    first.dvc("remote", "add", "--default", "storage", str(place / "storage")).check_returncode()
    first.dvc("push").check_returncode()
    first.commit()
    first.run("git", "clone", "--quiet", str(first.root), str(clone.root)).check_returncode()
    keep("clone without the digits", clone.dvc("repro"))
    keep("pull", clone.dvc("pull"))
    keep("status of the clone", clone.dvc("status"))

    write_idx(first.root / "data/added/leak", TEST[5:6])
    keep("leak", first.dvc("repro"))
    shutil.rmtree(first.root / "data/added/leak")
    keep("remove", first.dvc("remove", "--outs", "data/added/mine.dvc"))
    keep("without", first.dvc("repro"))
    return story


SUCCEEDING = [
    *("before", "add", "status", "after", "trial", "study", "reproduce", "pull", "status of the clone"),
    *("remove", "without"),
]


@pytest.mark.pipeline
@pytest.mark.parametrize("name", SUCCEEDING)
def test_the_command_succeeds(story: Story, name: str) -> None:
    assert story.steps[name].returncode == 0, story.said(name)


@pytest.mark.pipeline
def test_an_addition_is_counted_and_tracked_by_dvc_alone(story: Story) -> None:
    assert f"data/added/mine: 40 images; of each class from 0 to 9: {NEW.per_class()}" in story.said("add")
    assert story.said("git status") == "?? data/added/mine.dvc\n"


@pytest.mark.pipeline
def test_an_addition_reruns_the_training_and_what_follows(story: Story) -> None:
    assert re.search(r"train:\s+changed deps:\s+modified:\s+data/added", story.said("status"))
    assert story.executed("after") == ["train", "evaluate", "report"]
    assert "Data and pipelines are up to date." in story.said("status after")
    assert story.outputs["after"]["reports/history.csv"] != story.outputs["before"]["reports/history.csv"]


@pytest.mark.pipeline
@pytest.mark.parametrize(("name", "images"), [("before", 300), ("after", 340), ("trial", 340), ("study", 340)])
def test_a_run_names_all_images_that_trained(story: Story, name: str, images: int) -> None:
    assert story.trained(name) == images


@pytest.mark.pipeline
def test_the_digest_of_the_data_tells_runs_with_an_addition(story: Story) -> None:
    digests = {name: story.runs[name].data.tags["data_sha256"] for name in ("before", "after", "trial")}
    assert digests["after"] == digests["trial"] != digests["before"]


@pytest.mark.pipeline
def test_the_report_says_how_many_were_added(story: Story) -> None:
    assert b"added" not in story.outputs["before"]["reports/report.md"]
    assert b"| of these added to MNIST's | 40 | 0 |" in story.outputs["after"]["reports/report.md"]
    assert b"| `data/added/mine/train-images-idx3-ubyte` |" in story.outputs["after"]["reports/report.md"]


@pytest.mark.pipeline
def test_the_commit_with_an_addition_is_reproduced(story: Story) -> None:
    assert "Verdict: identical" in story.said("reproduce")


@pytest.mark.pipeline
def test_a_clone_trains_not_without_the_addition_and_pulls_it(story: Story) -> None:
    assert story.steps["clone without the digits"].returncode != 0
    assert "missing data 'source': data/added/mine" in story.said("clone without the digits")
    assert "train" not in story.executed("clone without the digits")
    assert "Data and pipelines are up to date." in story.said("status of the clone")


@pytest.mark.pipeline
def test_a_leak_put_there_by_hand_ends_the_training_in_one_line(story: Story) -> None:
    assert story.steps["leak"].returncode != 0
    assert re.findall("(?m)^error: .*$", story.said("leak")) == [
        "error: no image may train twice, and no test image at all: take out "
        "data/added/leak: image 0 (a copy of MNIST's test image 5)"
    ]
    assert "Traceback" not in story.said("leak")


@pytest.mark.pipeline
def test_an_addition_that_is_removed_leaves_no_trace(story: Story) -> None:
    assert story.outputs["without"] == story.outputs["before"]
    assert "train" not in story.executed("without")
