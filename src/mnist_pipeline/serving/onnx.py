"""A trained network in ONNX, for programs without PyTorch. It is written only if it agrees with PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime
import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, write_bytes
from mnist_pipeline.data.digits import SIDE, Digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import TrainedModel, load_model

TOLERANCE = 1e-4  # nats: the largest difference allowed between ONNX Runtime's and PyTorch's log-probabilities
_INPUT, _OUTPUT = "images", "log_probabilities"
_BATCH_SIZES = [1, 32, 1000]


@dataclass(frozen=True)
class Agreement:
    """How ONNX Runtime's answers differ from PyTorch's: in log-probabilities (nats) and in predictions."""

    digits: int
    batch_sizes: list[int]
    largest_difference: float
    other_predictions: int
    tolerance: float

    def __str__(self) -> str:
        same = self.digits - self.other_predictions
        return (
            f"ONNX Runtime predicts the same as PyTorch for {same:,} of {self.digits:,} test digits, in batches of "
            f"{', '.join(map(str, self.batch_sizes))}; log-probabilities differ by at most "
            f"{self.largest_difference:.1e} ({self.tolerance:.0e} is allowed)"
        )


def export_onnx(model_file: Path, path: Path, digits: Digits) -> Agreement:
    """Write a model file's network as ONNX, if ONNX Runtime agrees with PyTorch on all digits.

    The same model gives the same bytes.

    Raises:
        UserError: a prediction differs, or a log-probability by more than TOLERANCE. Nothing is written.
    """
    model = load_model(model_file)
    program = convert_to_onnx(model, sha256(model_file)).SerializeToString(deterministic=True)
    agreement = _compare_with_pytorch(program, model, digits)
    if agreement.other_predictions or not agreement.largest_difference <= TOLERANCE:  # NaN fails, too
        raise UserError(f"{path} is not written: {agreement}")
    write_bytes(path, program)
    return agreement


def convert_to_onnx(model: TrainedModel, digest: str) -> onnx.ModelProto:
    """Convert the network to ONNX: from normalised images (N, 1, 28, 28) to log-probabilities (N, 10).

    The metadata hold the normalisation, `mean` and `std`, and the model file's digest, `model_sha256`.
    """
    program = torch.onnx.export(
        model.network,
        (torch.zeros(2, 1, SIDE, SIDE),),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes={_INPUT: {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    converted = cast("torch.onnx.ONNXProgram", program).model_proto
    graph = converted.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")  # paths of source files, among others
    metadata = {"mean": model.normalization.mean, "std": model.normalization.std, "model_sha256": digest}
    onnx.helper.set_model_props(converted, {name: str(value) for name, value in metadata.items()})
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _compare_with_pytorch(program: bytes, model: TrainedModel, digits: Digits) -> Agreement:
    images, _ = digits.tensors(model.normalization, torch.device("cpu"))
    expected = predict(model.network, images, max(_BATCH_SIZES)).numpy()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    difference, others = 0.0, 0
    for size in _BATCH_SIZES:
        found = np.concatenate([session.run([_OUTPUT], {_INPUT: part.numpy()})[0] for part in images.split(size)])
        difference = max(difference, float(np.abs(found - expected).max()))
        others = max(others, int((found.argmax(axis=1) != expected.argmax(axis=1)).sum()))
    return Agreement(len(digits), _BATCH_SIZES, difference, others, TOLERANCE)
