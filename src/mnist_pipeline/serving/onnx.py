"""A trained network in ONNX, for programs without PyTorch, written once it agrees with PyTorch on real digits."""

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
from mnist_pipeline.serving.classifier import Classifier

INPUT, OUTPUT = "images", "log_probabilities"
BATCH_SIZES = [1, 32, 1000]
TOLERANCE = 1e-4  # nats, between the log-probabilities of both


@dataclass(frozen=True)
class Agreement:
    """How far ONNX Runtime is from PyTorch: the largest difference of a log-probability (nats), other predictions."""

    digits: int
    batch_sizes: list[int]
    largest_difference: float
    other_predictions: int


def export_onnx(model: Path, path: Path, digits: Digits) -> Agreement:
    """Write a model file's network as ONNX if, run by ONNX Runtime, it predicts for all digits what PyTorch does.

    The same model gives the same bytes.

    Raises:
        UserError: a prediction differs, or a log-probability by more than TOLERANCE. Nothing is written.
    """
    classifier = Classifier(model)
    program = to_onnx(classifier, sha256(model)).SerializeToString(deterministic=True)
    agreement = compare(program, classifier, digits)
    if agreement.other_predictions or not agreement.largest_difference <= TOLERANCE:  # so that NaN fails, too
        raise UserError(
            f"{path} is not written: of {agreement.digits:,} digits ONNX Runtime reads {agreement.other_predictions} "
            f"otherwise than PyTorch, and log-probabilities differ by up to {agreement.largest_difference:.1e}, where "
            f"{TOLERANCE:.0e} is allowed"
        )
    write_bytes(path, program)
    return agreement


def to_onnx(classifier: Classifier, digest: str) -> onnx.ModelProto:
    """Return the network as ONNX: from normalised images (N, 1, 28, 28) to log-probabilities (N, 10).

    Its metadata hold what normalises the images, `mean` and `std`, and the model file's digest, `model_sha256`.
    """
    program = torch.onnx.export(
        classifier.network,
        (torch.zeros(2, 1, SIDE, SIDE),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    model = cast("torch.onnx.ONNXProgram", program).model_proto
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")  # paths of source files, among others
    normalization = classifier.normalization
    metadata = {"mean": normalization.mean, "std": normalization.std, "model_sha256": digest}
    onnx.helper.set_model_props(model, {name: str(value) for name, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(program: bytes, classifier: Classifier, digits: Digits) -> Agreement:
    """Run digits through ONNX Runtime, in batches of each of BATCH_SIZES, and through PyTorch."""
    images, _ = digits.tensors(classifier.normalization, torch.device("cpu"))
    expected = predict(classifier.network, images, max(BATCH_SIZES)).numpy()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    difference, others = 0.0, 0
    for size in BATCH_SIZES:
        batches = images.split(size)
        found = np.concatenate([session.run([OUTPUT], {INPUT: batch.numpy()})[0] for batch in batches])
        difference = max(difference, float(np.abs(found - expected).max()))
        others = max(others, int((found.argmax(axis=1) != expected.argmax(axis=1)).sum()))
    return Agreement(len(digits), BATCH_SIZES, difference, others)
