"""`mnist export onnx`: another program gets the network that PyTorch runs, or nothing."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from support import DATA, ROOT

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.serving.onnx import TOLERANCE, export_onnx

CONVERT = "mnist_pipeline.serving.onnx.convert_to_onnx"


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(DATA, "test")


@pytest.fixture(scope="module")
def exported(trained_model: Path, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    export_onnx(trained_model, path, digits)
    return path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> Path:
    """The current directory, with the test digits. The conversion, which takes seconds, is not repeated."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CONVERT, lambda model, digest: onnx.load(exported))
    return tmp_path


def mnist_export(*arguments: object) -> Result:
    return CliRunner().invoke(mnist, ["export", "onnx", *map(str, arguments)])


def test_it_takes_images_in_batches_of_any_size(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported)
    (images,), (log_probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 1, 28, 28])
    assert (log_probabilities.name, log_probabilities.shape) == ("log_probabilities", ["batch", 10])


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_program_that_follows_the_metadata_reads_digits_as_pytorch_does(
    exported: Path, trained_model: Path, digits: Digits, params: Params, size: int
) -> None:
    session = onnxruntime.InferenceSession(exported)
    metadata = session.get_modelmeta().custom_metadata_map
    pixels = digits.pixels.numpy()[:, None].astype(np.float32)
    images = ((pixels / 255 - float(metadata["mean"])) / float(metadata["std"])).astype(np.float32)
    found = [session.run(None, {"images": batch})[0] for batch in np.split(images, range(size, len(images), size))]
    tensors, _ = digits.tensors(params.data, torch.device("cpu"))
    expected = predict(load_model(trained_model).network, tensors, batch_size=100).numpy()
    assert np.abs(np.concatenate(found) - expected).max() <= TOLERANCE


def test_its_metadata_name_the_model_and_no_path(exported: Path, trained_model: Path) -> None:
    model = onnx.load(exported)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {"mean": "0.1307", "std": "0.3081", "model_sha256": sha256(trained_model)}
    content = exported.read_bytes()
    assert b".py" not in content
    assert str(ROOT).encode() not in content


def test_it_is_one_valid_file(exported: Path) -> None:
    assert list(exported.parent.iterdir()) == [exported]
    onnx.checker.check_model(onnx.load(exported, load_external_data=False), full_check=True)


def test_the_same_model_gives_the_same_bytes(exported: Path, trained_model: Path, digits: Digits) -> None:
    again = exported.parent.with_name("again") / "model.onnx"
    export_onnx(trained_model, again, digits)
    assert again.read_bytes() == exported.read_bytes()


def test_it_says_what_it_compared(repository: Path, exported: Path, trained_model: Path) -> None:
    result = mnist_export("model.onnx", "--model", trained_model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(
        "model.onnx is written: ONNX Runtime predicts the same as PyTorch for 200 of 200 test digits, in batches of "
        "1, 32, 1000; log-probabilities differ by at most "
    )
    assert "(1e-04 is allowed)" in result.stdout
    assert (repository / "model.onnx").read_bytes() == exported.read_bytes()


@pytest.mark.usefixtures("repository")
def test_it_is_json_for_programs(trained_model: Path) -> None:
    comparison = json.loads(mnist_export("model.onnx", "--model", trained_model, "--json").stdout)
    assert 0 < comparison.pop("largest_difference") <= TOLERANCE
    assert comparison == {
        "path": "model.onnx",
        "digits": 200,
        "batch_sizes": [1, 32, 1000],
        "other_predictions": 0,
        "tolerance": TOLERANCE,
    }


@pytest.fixture
def other_network(repository: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion gone wrong: the biases of the last convolution are reversed."""
    model = onnx.load(exported)
    (bias,) = (weights for weights in model.graph.initializer if weights.name == "block3.conv7.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias)[::-1].copy() + 5, bias.name))
    monkeypatch.setattr(CONVERT, lambda network, digest: model)


@pytest.mark.usefixtures("other_network")
def test_a_network_with_other_predictions_is_not_written(repository: Path, trained_model: Path) -> None:
    (repository / "older.onnx").write_bytes(b"as it was")
    for name in ("model.onnx", "older.onnx"):
        result = mnist_export(name, "--model", trained_model)
        assert isinstance(result.exception, UserError)
        message = str(result.exception)
        assert re.match(rf"{name} is not written: ONNX .* as PyTorch for 1?\d?\d of 200 test digits", message)
        assert len(message.splitlines()) == 1
    assert sorted(path.name for path in repository.iterdir()) == ["data", "older.onnx"]
    assert (repository / "older.onnx").read_bytes() == b"as it was"


def test_a_difference_above_the_tolerance_is_refused_even_if_all_predictions_are_equal(
    repository: Path, trained_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_pipeline.serving.onnx.TOLERANCE", 1e-12)
    result = mnist_export("model.onnx", "--model", trained_model)
    assert isinstance(result.exception, UserError)
    assert "is not written: ONNX Runtime predicts the same as PyTorch for 200 of 200 " in str(result.exception)
    assert not (repository / "model.onnx").exists()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("models/model.safetensors", "`make repro` makes it"), ("data/raw/t10k", "`dvc repro download`")],
)
def test_a_missing_file_is_named(repository: Path, trained_model: Path, missing: str, reason: str) -> None:
    if missing.startswith("data"):
        (repository / "data/raw").unlink()
    result = mnist_export("model.onnx", *(["--model", trained_model] if missing.startswith("data") else []))
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(missing)
    assert reason in str(result.exception)


@pytest.mark.parametrize("absent", ["onnx", "onnxruntime"])
def test_without_onnx_the_error_says_how_to_get_it(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mnist_pipeline.serving.onnx")
    monkeypatch.setitem(sys.modules, absent, None)
    result = mnist_export("model.onnx")
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"mnist export onnx needs {absent}, which is absent: `make onnx` installs it"


def test_a_path_that_cannot_be_written_is_named(repository: Path, trained_model: Path) -> None:
    (repository / "file").write_text("", encoding="utf-8")
    result = mnist_export("file/model.onnx", "--model", trained_model)
    assert isinstance(result.exception, OSError)
    assert "file/model.onnx" in str(result.exception)
