"""Who follows docs/make-it-yours.md gets other data, other networks, a param and a metric through all stages."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support import DATA, ROOT
from support.repository import Repository
from support.tables import rows, table

from mnist_pipeline.data.digits import FILES, Digits, load_digits
from mnist_pipeline.serving.additions import encode_idx

PAGE = (ROOT / "docs/make-it-yours.md").read_text(encoding="utf-8")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt"]

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]


def blocks(language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository beside a directory of other images: digits below 7, turned by a quarter, that stand for clothes."""
    root = tmp_path_factory.mktemp("yours")
    (root / "images").mkdir()
    for part, (images, labels) in {"train": FILES[:2], "test": FILES[2:]}.items():
        digits = load_digits(DATA, part)
        kept = Digits(digits.pixels.rot90(dims=(1, 2)), digits.labels)[digits.labels < len(CLASSES)]
        (root / "images" / images).write_bytes(encode_idx(kept.pixels))
        (root / "images" / labels).write_bytes(encode_idx(kept.labels))
    repository = Repository.create(root / "repository", fresh=True)
    for study in (ROOT / "reports/studies").glob("*.csv"):  # MNIST's
        (repository.root / "reports/studies" / study.name).write_bytes(study.read_bytes())
    return repository.init()


def set_section(repository: Repository, block: str) -> None:
    """Change `params.yaml` as a block of the page does; a section `model` is replaced as a whole."""
    path = repository.root / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, values in yaml.safe_load(block).items():
        params[name] = values if name == "model" else params[name] | values
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def repro(repository: Repository) -> str:
    """Run the pipeline and return the report."""
    done = repository.dvc("repro", MNIST_DIR="../images")
    assert done.returncode == 0, done.stdout
    return (repository.root / "reports/report.md").read_text(encoding="utf-8")


def metrics_of(repository: Repository) -> dict[str, object]:
    found: dict[str, object] = json.loads((repository.root / "reports/metrics.json").read_text(encoding="utf-8"))
    return found


def test_other_images_train_and_their_names_are_shown(repository: Repository) -> None:
    digests, moments, _ = blocks("sh")
    assert repository.run("sh", "-c", digests).returncode == 0
    data, _, _ = blocks("yaml")
    set_section(repository, data)
    said = repository.run("sh", "-c", moments).stdout
    set_section(repository, f"data:\n{said}")
    report = repro(repository)
    assert report.startswith("# Classification of images in 7 classes with 18,559 parameters\n")
    assert [row[0] for row in table(report, "Class", "Images")][:-1] == CLASSES
    assert list(metrics_of(repository)["test_per_class_accuracy"]) == CLASSES  # type: ignore[call-overload]
    predictions = (repository.root / "reports/predictions.csv").read_text(encoding="utf-8").splitlines()
    assert {line.split(",")[1] for line in predictions[1:]} == set(CLASSES)
    assert rows(report)["MNIST dataset"][0] == "**no**"
    assert not re.search("published|disputed|Recipes|digit", report.replace("MNIST digit", ""))

    image = repository.root / "shirt.png"
    Image.fromarray(load_digits(repository.root / "data/raw", "test").pixels[0].numpy()).save(image)
    assert re.fullmatch(
        rf"Read by models/model.safetensors:\nshirt.png: ({'|'.join(CLASSES)}) \(\d+\.\d%\)\n",
        repository.run("mnist", "predict", "shirt.png").stdout,
    )
    image.unlink()
    if find_spec("onnxruntime"):
        assert "ONNX Runtime predicts the same" in repository.run("mnist", "export", "onnx", "model.onnx").stdout
        (repository.root / "model.onnx").unlink()


@pytest.mark.parametrize(("place", "parameters"), [(0, "25,351"), (1, "6,819")])
def test_another_network_is_a_file_and_a_word(repository: Repository, place: int, parameters: str) -> None:
    path = re.findall(r"`(src/mnist_pipeline/model/networks/\w+\.py)`:", PAGE)[place]
    (repository.root / path).write_text(blocks("python")[place], encoding="utf-8")
    set_section(repository, blocks("yaml")[1 + place])
    report = repro(repository)
    assert report.startswith(f"# Classification of images in 7 classes with {parameters} parameters\n")
    assert rows(report)["Documentation"] == ["yes", f"this report accounts for {parameters} of {parameters} parameters"]
    assert ("First-layer filters" in report) == (Path(path).stem == "residual")


def test_another_param_and_another_metric_reach_the_gate(repository: Repository) -> None:
    for change in blocks("diff"):
        (repository.root / "change.diff").write_text(change, encoding="utf-8")
        if "params.yaml" in change:  # `set_section` has rewritten it
            set_section(repository, "train:\n  longest_gradient: 1.0\n")
        applied = repository.run("git", "apply", "--exclude=params.yaml", "change.diff")
        assert applied.returncode == 0, applied.stdout
        (repository.root / "change.diff").unlink()
    report = repro(repository)
    assert rows(report)["`train.longest_gradient`"] == ["1.0"]
    assert metrics_of(repository)["test_top_2_accuracy"] >= metrics_of(repository)["test_accuracy"]  # type: ignore[operator]
    set_section(repository, "gate:\n  lowest_accuracy: 0.1\n  largest_calibration_error: 1.0\n")
    repository.commit()
    judged = repository.run("mnist", "gate")
    assert judged.returncode == 0, judged.stdout
