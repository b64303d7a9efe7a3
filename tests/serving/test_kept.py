"""`mnist serve --keep` and `mnist drift`: what is kept, for how long, and how it differs from the test images."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image
from support import DATA, ROOT

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import write_csv
from mnist_pipeline.common.paths import PREDICTIONS
from mnist_pipeline.data.digits import DIGITS, load_digits
from mnist_pipeline.serving import kept as kept_module
from mnist_pipeline.serving.additions import read_labelled_digits
from mnist_pipeline.serving.classifier import Classifier, Prediction
from mnist_pipeline.serving.drift import measure_drift
from mnist_pipeline.serving.kept import KeptPictures, read_kept_pictures
from mnist_pipeline.serving.service import ServedModel, create_app

BLANK = np.zeros((28, 28), np.uint8)


def answer(digit: int = 3, probability: float = 0.7) -> Prediction:
    probabilities = [(1 - probability) / 9] * 10
    probabilities[digit] = probability
    return Prediction(digit, probability, probabilities, str(digit))


@pytest.fixture
def service(trained_model: Path, tmp_path: Path) -> TestClient:
    served = ServedModel(source="a file", sha256="0" * 64, parameters=1)
    app = create_app(Classifier(trained_model), served, kept=KeptPictures(tmp_path / "kept", DIGITS))
    return TestClient(app, base_url="http://localhost")


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    path = tmp_path / "digit.png"
    Image.fromarray(load_digits(DATA, "test").pixels[0].numpy()).resize((140, 140)).save(path)
    return path.read_bytes()


def test_a_picture_is_kept_labelled_relabelled_and_added(service: TestClient, picture: bytes, tmp_path: Path) -> None:
    assert service.get("/healthz").json()["keeps"] is True
    found = [service.post("/predict", content=picture).json() for _ in range(2)]
    first, second = (tmp_path / f"kept/unlabelled/{read['kept']}.png" for read in found)
    told = json.loads(Image.open(first).info["answer"])
    assert told["probabilities"] == found[0]["probabilities"]
    assert (told["model"], told["time"][:2]) == ("0" * 64, "20")
    for label in (4, 7):
        assert service.put(f"/kept/{first.stem}?label={label}").status_code == 204
        assert (tmp_path / f"kept/{label}/{first.name}").exists()
    digits, names = read_labelled_digits(tmp_path / "kept", normalize=False)
    assert (digits.labels.tolist(), names) == ([7], [str(tmp_path / f"kept/7/{first.name}")])
    assert second.exists()
    assert sorted(read.label or 0 for read in read_kept_pictures(tmp_path / "kept", DIGITS)) == [0, 7]


@pytest.mark.parametrize(
    "send",
    [
        lambda service, picture: service.post("/predict?draft=true", content=picture),
        lambda service, picture: service.post("/predict", content=picture, headers={"Sec-Fetch-Site": "cross-site"}),
        lambda service, picture: service.post("/predict", content=b"no picture"),
    ],
)
def test_drafts_other_sites_pictures_and_no_pictures_are_not_kept(
    send: Callable[[TestClient, bytes], object], service: TestClient, picture: bytes, tmp_path: Path
) -> None:
    send(service, picture)
    assert list(tmp_path.glob("kept/*/*")) == []


@pytest.mark.parametrize(
    "address", ["nothing?label=1", "..%2f..%2fdigit?label=1", "{name}?label=10", "{name}?label=-1"]
)
def test_only_a_kept_picture_gets_one_of_the_labels(
    address: str, service: TestClient, picture: bytes, tmp_path: Path
) -> None:
    name = service.post("/predict", content=picture).json()["kept"]
    assert service.put(f"/kept/{address.format(name=name)}").status_code == 404
    assert [path.parent.name for path in tmp_path.glob("kept/*/*")] == ["unlabelled"]


def test_the_oldest_without_a_label_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "_MAX_PICTURES", 3)
    names = [KeptPictures(tmp_path, DIGITS).add(BLANK, answer(), "") for _ in range(3)]
    kept = KeptPictures(tmp_path, DIGITS)  # as after a restart
    assert kept.label(str(names[0]), 5)
    fourth = kept.add(BLANK, answer(), "")
    assert {path.stem for path in tmp_path.glob("*/*.png")} == {names[0], names[2], fourth}
    assert all(kept.label(str(name), 5) for name in (names[2], fourth))
    assert kept.add(BLANK, answer(), "") is None


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(UserError, match=r"kept cannot keep pictures \(.*\): name another directory$"):
        KeptPictures(tmp_path / "kept", DIGITS)


def keep(directory: Path, answers: Sequence[Prediction]) -> None:
    kept = KeptPictures(directory, DIGITS)
    for each in answers:
        kept.add(BLANK, each, "")


@pytest.fixture
def tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """The answers for some test images, whose table is in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    answers = [answer(image % 10, 0.9991 if image % 4 else 0.85) for image in range(200)]
    table = [
        {"index": image, "label": each.digit, "prediction": each.digit, "probability": each.probability}
        for image, each in enumerate(answers)
    ]
    write_csv(PREDICTIONS, table)
    return answers


def test_pictures_like_the_test_images_do_not_drift(tested: list[Prediction]) -> None:
    keep(Path("kept"), tested[::3])
    report = measure_drift(Path("kept"), DIGITS)
    assert report.pictures == 67
    for drift in (report.probabilities, report.classes):
        assert drift.distance < drift.chance < 0.3


def test_other_pictures_drift(tested: list[Prediction]) -> None:
    keep(Path("kept"), [answer(1, 0.45) for _ in range(50)])
    report = measure_drift(Path("kept"), DIGITS)
    assert (report.probabilities.distance, report.classes.distance) == pytest.approx((1.0, 0.9))
    result = CliRunner().invoke(mnist, ["drift", "kept"])
    assert result.output.splitlines()[0] == "50 kept pictures, 0 with a label"
    assert "below 50%" in result.output
    assert result.output.count("more than chance makes") == 2
    assert json.loads(CliRunner().invoke(mnist, ["drift", "kept", "--json"]).output)["pictures"] == 50


@pytest.mark.usefixtures("tested")
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "kept has no pictures: `mnist serve --keep kept` keeps those that it reads"),
        (b"", "kept/3/a.png is not a picture that"),
    ],
)
def test_without_kept_pictures_there_is_no_drift(content: bytes | None, error: str) -> None:
    Path("kept/3").mkdir(parents=True)
    if content is not None:
        Path("kept/3/a.png").write_bytes(content)
    with pytest.raises(UserError, match=f"^{error}"):
        measure_drift(Path("kept"), DIGITS)
