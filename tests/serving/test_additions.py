"""`mnist add`: digits that must not train are refused in one line; the others train and DVC tracks them."""

import json
import os
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
from support import DATA, ROOT
from support.additions import IMAGES, LABELS, NEW, TEST, TRAIN, write_idx, write_picture, write_pictures
from support.clothes import CLOTHES
from support.repository import Repository

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.data.digits import Digits, read_part
from mnist_pipeline.report.pictures import enlarge, write_png
from mnist_pipeline.serving.additions import add_digits, encode_idx, read_labelled_digits
from mnist_pipeline.serving.preprocessing import to_mnist_image


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: it has the small MNIST and, in `mine`, forty new digits to add."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data/added").mkdir(parents=True)
    (tmp_path / "data/raw").symlink_to(DATA)
    write_pictures(tmp_path / "mine", NEW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(pixels: object, mode: str = "L", name: str = "7/odd.png") -> Callable[[], None]:
    return lambda: write_picture(Path("mine") / name, pixels, mode)


def file(name: str, content: bytes = b"text") -> Callable[[], None]:
    def write() -> None:
        (Path("mine") / name).parent.mkdir(exist_ok=True)
        (Path("mine") / name).write_bytes(content)

    return write


def empty() -> None:
    shutil.rmtree("mine")
    Path("mine/3").mkdir(parents=True)


def many_ones() -> None:
    ones = TRAIN[TRAIN.labels == 1]
    for shift in (1, 2):
        for index, pixels in enumerate(torch.roll(ones.pixels, shift, dims=1)):
            write_picture(Path("mine/1") / f"{shift}-{index}.png", pixels)


def idx(digits: Digits, images: bytes | None = None) -> Callable[[], None]:
    def write() -> None:
        shutil.rmtree("mine")
        write_idx(Path("mine"), digits)
        if images is not None:
            (Path("mine") / IMAGES).write_bytes(images)

    return write


def special(name: str, place: Callable[[Path], object]) -> Callable[[], None]:
    def put() -> None:
        (Path("mine") / name).parent.mkdir(exist_ok=True)
        place(Path("mine") / name)

    return put


def sparse(path: Path) -> None:
    """Make a file of a terabyte that takes no space."""
    path.touch()
    os.truncate(path, 10**12)


SEVEN = TRAIN.pixels[0].numpy()
REFUSED = {
    "a test image": (picture(TEST.pixels[12]), ["must be new", "mine/7/odd.png (a copy of test image 12)"]),
    "a test image with another label": (
        picture(TEST.pixels[12], name="0/a.png"),
        ["0/a.png (a copy of test image 12)"],
    ),
    "a test image altered by a level": (picture(TEST.pixels[12] ^ 1), ["7/odd.png (a copy of test image 12)"]),
    "a test image as JPEG": (picture(TEST.pixels[12], name="7/odd.jpg"), ["odd.jpg (a copy of test image 12)"]),
    "a test image in colours that are grey": (
        picture(TEST.pixels[3], "RGB"),
        ["odd.png (a copy of test image 3)"],
    ),
    "many test images": (
        lambda: write_pictures(Path("mine"), TEST[:80]),
        ["mine/0/005.png (a copy of test image 5)", "and 75 more"],
    ),
    "a training image": (picture(SEVEN), ["mine/7/odd.png (a copy of train image 0)"]),
    "a digit twice": (
        picture(NEW.pixels[0], name="9/odd.png"),
        [f"take out mine/9/odd.png (a copy of mine/{NEW.labels[0]}/000.png)"],
    ),
    "black on white": (picture(np.roll(255 - SEVEN, 2, 0)), ["white on black", "invert mine/7/odd.png"]),
    "nothing": (picture(np.zeros((28, 28), np.uint8)), ["white on black", "mine/7/odd.png"]),
    "another size": (
        picture(np.kron(SEVEN, np.ones((2, 2), np.uint8))),
        ["odd.png: the picture must have 28×28 grey pixels", "56×56", "--normalize"],
    ),
    "colours": (picture(np.stack([SEVEN, SEVEN, 0 * SEVEN], 2), "RGB"), ["7/odd.png: ", "grey", "RGB", "--normalize"]),
    "transparency": (picture(np.stack([SEVEN] * 4, 2), "RGBA"), ["7/odd.png: ", "grey", "RGBA", "--normalize"]),
    "16 bits": (picture(SEVEN.astype(np.uint16) * 257, "I;16"), ["7/odd.png: ", "I;16", "--normalize"]),
    "no picture": (file("7/notes.txt"), ["mine/7/notes.txt: this is no picture"]),
    "half a picture": (file("7/half.png", b"\x89PNG\r\n\x1a\n"), ["mine/7/half.png: "]),
    "a directory in a class": (lambda: Path("mine/7/more").mkdir(parents=True), ["mine/7/more: Is a directory"]),
    "a pipe": (special("7/odd.png", os.mkfifo), ["mine/7/odd.png: Not a regular file"]),
    "a device": (special("7/odd.png", lambda path: path.symlink_to("/dev/zero")), ["odd.png: Not a regular file"]),
    "a terabyte": (special("7/odd.png", sparse), ["mine/7/odd.png: Larger than 200,000,000 bytes"]),
    "IDX in a pipe": (special(IMAGES, os.mkfifo), [f"mine/{IMAGES} cannot be read (Not a regular file)"]),
    "IDX of a terabyte": (special(IMAGES, sparse), [f"mine/{IMAGES} cannot be read (Larger than 784,001,024 bytes)"]),
    "a name of two lines": (file("7/two\nlines\x1b[31m.png"), [r"mine/7/two\nlines\x1b[31m.png: this is no picture"]),
    "a copy with a name of two lines": (
        picture(TEST.pixels[12], name="7/two\nlines.png"),
        [r"mine/7/two\nlines.png (a copy of test image 12)"],
    ),
    "an unknown class": (picture(SEVEN, name="10/a.png"), ["mine/10 is unknown", "directories 0 to 9"]),
    "a file among the classes": (file("labels.csv"), ["mine/labels.csv is unknown"]),
    "no pictures": (empty, ["mine has no pictures in directories 0 to 9, and no train-images-idx3-ubyte"]),
    "too many of a class": (many_ones, ["training images of 1", "data.max_class_ratio allows 2 times as many"]),
    "IDX with a test image": (idx(NEW[:3] + TEST[7:8]), ["idx3-ubyte: image 3 (a copy of test image 7)"]),
    "a damaged IDX": (idx(NEW, images=encode_idx(NEW.pixels)[:-1]), ["train-images-idx3-ubyte is damaged"]),
    "IDX without labels": (
        lambda: shutil.copy(DATA / IMAGES, "mine"),
        ["mine/train-labels-idx1-ubyte cannot be read"],
    ),
}


def refusal(name: str = "mine", normalize: bool = False) -> str:
    """Return the one line that refuses an addition; assert that nothing is left behind."""
    before = sorted(Path("data").rglob("*"))
    with pytest.raises(UserError) as refused:
        add_digits(Path("mine"), name, normalize)
    assert sorted(Path("data").rglob("*")) == before
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("spoil", "fragments"), REFUSED.values(), ids=REFUSED.keys())
def test_digits_that_must_not_train_are_refused_in_one_line(spoil: Callable[[], object], fragments: list[str]) -> None:
    spoil()
    message = refusal()
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.usefixtures("workspace")
def test_the_reports_pictures_of_misread_test_images_are_refused() -> None:
    shutil.rmtree("mine")
    write_png(Path("mine/7/12.png"), enlarge(TEST.pixels[12].numpy()))
    assert "112×112" in refusal()
    assert "mine/7/12.png (a copy of test image 12)" in refusal(normalize=True)


@pytest.mark.usefixtures("workspace")
def test_a_picture_without_a_digit_is_refused() -> None:
    write_picture(Path("mine/7/odd.png"), np.full((60, 60), 200, np.uint8))
    assert "mine/7/odd.png: the picture holds no digit" in refusal(normalize=True)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("name", ["", "..", "a/b", "v1.2", "with space"])
def test_a_name_with_other_characters_is_refused(name: str) -> None:
    assert "choose a --name" in refusal(name)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("taken", [IMAGES, ""])
def test_a_name_that_is_taken_is_refused(taken: str) -> None:
    write_idx(Path("data/added/mine"), NEW[:1]) if taken else Path("data/added/mine.dvc").write_text("outs: []")
    assert "data/added/mine exists: choose another --name" in refusal()


@pytest.mark.usefixtures("workspace")
def test_a_digit_that_was_added_before_is_refused() -> None:
    write_idx(Path("data/added/first"), NEW[5:6])
    label = int(NEW.labels[5])
    assert f"mine/{label}/005.png (a copy of data/added/first: image 0)" in refusal()


@pytest.mark.usefixtures("workspace")
def test_a_directory_that_is_absent_is_a_wrong_option() -> None:
    assert CliRunner().invoke(mnist, ["add", "absent"]).exit_code == 2


def test_pictures_are_read_class_by_class_in_the_order_of_their_names(tmp_path: Path) -> None:
    digits, names = read_labelled_digits(write_pictures(tmp_path / "mine", NEW), normalize=False)
    order = torch.argsort(NEW.labels, stable=True)
    assert digits.sha256() == NEW[order].sha256()
    assert names[0] == str(tmp_path / f"mine/0/{int(order[0]):03}.png")


def test_idx_files_are_read_as_they_are(tmp_path: Path) -> None:
    digits, names = read_labelled_digits(write_idx(tmp_path / "mine", NEW), normalize=False)
    assert digits.sha256() == NEW.sha256()
    assert len(names) == 40


def test_idx_files_are_written_as_mnists_are() -> None:
    digits = read_part(DATA, "train")
    assert encode_idx(digits.pixels) == (DATA / IMAGES).read_bytes()
    assert encode_idx(digits.labels) == (DATA / LABELS).read_bytes()


def test_only_pictures_that_do_not_have_mnists_form_are_normalised(tmp_path: Path) -> None:
    write_picture(tmp_path / "7/a.png", NEW.pixels[0])
    write_png(tmp_path / "7/b.png", enlarge(NEW.pixels[0].numpy()))  # black on white, enlarged
    digits, _ = read_labelled_digits(tmp_path, normalize=True)
    assert torch.equal(digits.pixels[0], NEW.pixels[0])
    assert np.array_equal(digits.pixels[1], to_mnist_image(Image.open(tmp_path / "7/b.png")))
    assert not torch.equal(digits.pixels[0], digits.pixels[1])


# The pipeline


@dataclass(frozen=True)
class Story:
    """A repository; for each step in it the process that ended, some outputs after it, and the newest run."""

    repository: Repository
    steps: dict[str, "subprocess.CompletedProcess[str]"] = field(default_factory=dict)
    outputs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    def keep(self, name: str, process: "subprocess.CompletedProcess[str]") -> None:
        files = {name: self.repository.root / name for name in ("dvc.lock", "reports/history.csv", "reports/report.md")}
        self.steps[name] = process
        self.outputs[name] = {name: path.read_bytes() for name, path in files.items() if path.exists()}
        self.runs[name] = self.repository.runs()[0]

    def said(self, name: str) -> str:
        return self.steps[name].stdout

    def executed(self, name: str) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.said(name))

    def trained_images(self, name: str) -> int:
        """Return how many training images the newest run records."""
        [used] = [used.dataset for used in self.runs[name].inputs.dataset_inputs if used.dataset.name == "mnist-train"]
        return int(json.loads(used.profile)["num_rows"])


@pytest.fixture(scope="module")
def added(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Add digits after a first training, and train on them."""
    directory = tmp_path_factory.mktemp("additions")
    story = Story(trained.copy(directory / "first"))
    repository = story.repository
    story.keep("before", repository.run("git", "status", "--porcelain"))
    story.keep("add", repository.run("mnist", "add", str(write_pictures(directory / "mine", NEW))))
    story.keep("git status", repository.run("git", "status", "--porcelain"))
    story.keep("after", repository.dvc("repro"))
    repository.commit()
    return story


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["add", "after"])
def test_a_command_succeeds(added: Story, name: str) -> None:
    assert added.steps[name].returncode == 0, added.said(name)


@pytest.mark.pipeline
@pytest.mark.thorough
def test_an_addition_is_counted_and_only_dvc_tracks_it(added: Story) -> None:
    assert f"data/added/mine: 40 images; by class, 0 to 9: {NEW.per_class(10)}" in added.said("add")
    assert added.said("git status") == "?? data/added/mine.dvc\n"


@pytest.mark.pipeline
@pytest.mark.thorough
def test_an_addition_reruns_the_training_and_what_follows(added: Story) -> None:
    assert added.executed("after") == ["train", "evaluate", "report"]
    assert added.outputs["after"]["reports/history.csv"] != added.outputs["before"]["reports/history.csv"]


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_run_records_all_training_images(added: Story) -> None:
    assert (added.trained_images("before"), added.trained_images("after")) == (300, 340)
    digests = {name: added.runs[name].data.tags["data_sha256"] for name in ("before", "after")}
    assert digests["after"] != digests["before"]


@pytest.mark.pipeline
@pytest.mark.thorough
def test_the_report_says_how_many_were_added(added: Story) -> None:
    assert b"added" not in added.outputs["before"]["reports/report.md"]
    assert b"| of these added | 40 |\n" in added.outputs["after"]["reports/report.md"]
    assert b"| `data/added/mine/train-images-idx3-ubyte` |" in added.outputs["after"]["reports/report.md"]


@pytest.fixture(scope="module")
def shared(added: Story, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Try out, reproduce and share what was added, add a leak by hand and take everything back, in this order."""
    directory = tmp_path_factory.mktemp("shared")
    repository, clone = added.repository, Repository(directory / "clone")
    story = Story(repository, dict(added.steps), dict(added.outputs), dict(added.runs))
    story.keep("status", repository.dvc("status"))
    story.keep("trial", repository.dvc("exp", "run", "--temp", "-n", "trial", "-S", "train.learning_rate=0.002"))
    story.keep("study", repository.run("mnist", "study", "specification", "--seeds", "1"))
    (repository.root / "reports/studies/specification.csv").unlink()  # it would change the report
    story.keep("reproduce", repository.run("mnist", "reproduce"))

    repository.dvc("remote", "add", "--default", "storage", str(directory / "storage")).check_returncode()
    repository.dvc("push").check_returncode()
    repository.commit()
    repository.run("git", "clone", "--quiet", str(repository.root), str(clone.root)).check_returncode()
    story.keep("clone without the digits", clone.dvc("repro"))
    story.keep("pull", clone.dvc("pull"))
    story.keep("status of the clone", clone.dvc("status"))

    write_idx(repository.root / "data/added/leak", TEST[5:6])
    story.keep("leak", repository.dvc("repro"))
    shutil.rmtree(repository.root / "data/added/leak")
    story.keep("remove", repository.dvc("remove", "--outs", "data/added/mine.dvc"))
    story.keep("without", repository.dvc("repro"))
    return story


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["status", "trial", "study", "reproduce", "pull", "status of the clone", "remove", "without"]
)
def test_a_later_command_succeeds(shared: Story, name: str) -> None:
    assert shared.steps[name].returncode == 0, shared.said(name)


@pytest.mark.pipeline
@pytest.mark.thorough
def test_trials_and_studies_train_on_an_addition(shared: Story) -> None:
    assert (shared.trained_images("trial"), shared.trained_images("study")) == (340, 340)
    assert shared.runs["trial"].data.tags["data_sha256"] == shared.runs["after"].data.tags["data_sha256"]


@pytest.mark.pipeline
@pytest.mark.thorough
def test_the_commit_with_an_addition_is_reproduced(shared: Story) -> None:
    assert "Verdict: identical" in shared.said("reproduce")


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_clone_does_not_train_without_the_addition_and_can_pull_it(shared: Story) -> None:
    assert shared.steps["clone without the digits"].returncode != 0
    assert "missing data 'source': data/added/mine" in shared.said("clone without the digits")
    assert "train" not in shared.executed("clone without the digits")
    for status in ("status", "status of the clone"):
        assert "Data and pipelines are up to date." in shared.said(status)


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_test_image_that_was_added_by_hand_ends_the_training_in_one_line(shared: Story) -> None:
    assert shared.steps["leak"].returncode != 0
    assert re.findall("(?m)^error: .*$", shared.said("leak")) == [
        "error: added images must be new, not copies of those in data/raw or of each other: take out "
        "data/added/leak: image 0 (a copy of test image 5)"
    ]
    assert "Traceback" not in shared.said("leak")


@pytest.mark.pipeline
@pytest.mark.thorough
def test_an_addition_that_is_removed_leaves_no_trace(shared: Story) -> None:
    assert shared.outputs["without"] == shared.outputs["before"]
    assert "train" not in shared.executed("without")


def test_pictures_of_other_classes_lie_in_directories_of_their_names(tmp_path: Path) -> None:
    for name, label in (("T-shirt-top", 0), ("Ankle boot", 2)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.fromarray(NEW.pixels[label].numpy()).save(tmp_path / "mine" / name / "a.png")
    digits, _ = read_labelled_digits(tmp_path / "mine", normalize=False, classes=CLOTHES)
    assert digits.labels.tolist() == [2, 0]
    assert torch.equal(digits.pixels, NEW.pixels[[2, 0]])
    (tmp_path / "mine/7").mkdir()
    with pytest.raises(UserError, match="directories named T-shirt-top, Trouser, Ankle boot with pictures"):
        read_labelled_digits(tmp_path / "mine", normalize=False, classes=CLOTHES)
