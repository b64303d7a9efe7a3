"""The gate: is the model in the workspace good enough, and traced well enough, to become the champion?"""

import json
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import METRICS, RAW
from mnist_pipeline.data.digits import DIGITS, Digits, load_digits
from mnist_pipeline.model.inference import predict, score
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.promotion.bounds import GateParams, load_bounds
from mnist_pipeline.report.tables import markdown_table
from mnist_pipeline.tracking.address import hide_secrets, store_address
from mnist_pipeline.tracking.git import GitError, changed_files
from mnist_pipeline.tracking.provenance import sha256_of_images
from mnist_pipeline.tracking.registry import ModelVersion, find_champion

_VALUE_LENGTH = 160  # characters, so that a row of the table stays readable


@dataclass(frozen=True)
class Verdict:
    """A rule's bound and the value found, both as text, and whether the value passes."""

    rule: str
    bound: str
    value: str
    passed: bool


@dataclass(frozen=True)
class Candidate:
    """What the gate knows about the model here, with uncommitted files and stages that are not up to date."""

    accuracy: float
    parameters: int
    calibration_error: float
    data_sha256: str
    changed_files: Sequence[str]
    changed_stages: Sequence[str]


@dataclass(frozen=True)
class Champion:
    """What the gate knows about the champion; its accuracy is on the test images of the workspace."""

    name: str
    accuracy: float
    data_sha256: str


@dataclass(frozen=True)
class NoChampion:
    """Why there is no champion to compare with, and whether that is acceptable: only if there is none yet."""

    reason: str
    acceptable: bool


def judge() -> list[Verdict]:
    """Judge the model in the workspace by the section `gate` of the params.

    Raises:
        UserError: the section is wrong, or a file that the pipeline makes is absent or damaged.
    """
    bounds, params = load_bounds(), load_params()
    champion = look_up_champion(load_digits(RAW, "test"), params.evaluate.batch_size, params.data.classes)
    return decide(bounds, _look_at_candidate(), champion)


def decide(bounds: GateParams, candidate: Candidate, champion: Champion | NoChampion) -> list[Verdict]:
    """Return the verdict of each rule."""

    def at_most(rule: str, bound: float, value: float, form: str) -> Verdict:
        return Verdict(rule, f"at most {bound:{form}}", f"{value:{form}}", value <= bound)

    def unchanged(rule: str, bound: str, changed: Sequence[str]) -> Verdict:
        value = textwrap.shorten(", ".join(changed), _VALUE_LENGTH, placeholder=" …")
        return Verdict(rule, bound, value or "clean", not changed)

    accuracy, lowest = candidate.accuracy, bounds.lowest_accuracy
    return [
        Verdict("test accuracy", f"at least {lowest:.2%}", f"{accuracy:.2%}", accuracy >= lowest),
        at_most("parameters", bounds.largest_parameter_count, candidate.parameters, ","),
        at_most("calibration error", bounds.largest_calibration_error, candidate.calibration_error, ".3%"),
        *_compare_with_champion(bounds, candidate, champion),
        unchanged("git tree", "clean, outputs aside", candidate.changed_files),
        unchanged("dvc status", "clean", candidate.changed_stages),
    ]


def _compare_with_champion(
    bounds: GateParams, candidate: Candidate, champion: Champion | NoChampion
) -> Sequence[Verdict]:
    """Return the verdicts that need a champion; they fail if the champion cannot be read."""
    accuracy = ("beside the champion", f"at most {100 * bounds.margin:.2f} points worse on the same test images")
    data = ("data", "any" if bounds.changed_data else "the champion's")
    if isinstance(champion, NoChampion):
        return [Verdict(*rule, champion.reason, champion.acceptable) for rule in (accuracy, data)]
    better = round(candidate.accuracy - champion.accuracy, 9)  # floats: 0.995 - 0.993 is more than 0.002
    same = candidate.data_sha256 == champion.data_sha256
    comparison = f"{100 * better:+.2f} points: {champion.name} has {champion.accuracy:.2%}"
    return [
        Verdict(*accuracy, comparison, better >= -bounds.margin),
        Verdict(*data, f"{'' if same else 'other than '}{champion.name}'s", same or bounds.changed_data),
    ]


def _look_at_candidate() -> Candidate:
    try:
        metrics = json.loads(read_text(METRICS))
        measured = float(metrics["test_accuracy"]), int(metrics["parameters"]), float(metrics["test_calibration_error"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{METRICS} is not a file that the evaluate stage wrote: run `dvc repro`") from None
    return Candidate(
        *measured,
        sha256_of_images(),
        _changed_files(),
        _stale_stages(),
    )


# If a command fails, its error stands in the list, so that a failure does not count as clean.


def _changed_files() -> list[str]:
    try:
        return changed_files()
    except GitError as error:
        return [f"git failed: {error}"]


def _stale_stages() -> list[str]:
    process = subprocess.run(["dvc", "status", "--json"], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        return [f"dvc failed: {hide_secrets(' '.join(process.stderr.split()))}"]
    return list(json.loads(process.stdout))


def look_up_champion(digits: Digits, batch_size: int, classes: Sequence[str] = DIGITS) -> Champion | NoChampion:
    """Return the registry's champion with its accuracy on these test images, or why there is none to compare with."""
    try:
        if (version := find_champion()) is None:
            return NoChampion(f"none yet in MLflow at {store_address()}", acceptable=True)
        return Champion(str(version), _accuracy_of(version, digits, batch_size, classes), version.data_sha256)
    except UserError as error:
        return NoChampion(str(error), acceptable=False)


def _accuracy_of(version: ModelVersion, digits: Digits, batch_size: int, classes: Sequence[str]) -> float:
    """Return a version's accuracy on these images: from its run if that tested the same images, else test it now."""
    if version.tested_on(digits):
        return version.metrics["test_accuracy"]
    with TemporaryDirectory() as directory:
        champion = load_model(version.download_model(Path(directory)))
    if champion.classes != classes:
        raise UserError(f"{version} has other classes: only another MLflow store can have another champion")
    images, labels = digits.tensors(champion.normalization, torch.device("cpu"))
    return score(predict(champion.network, images, batch_size), labels).accuracy


def render_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a Markdown table."""
    rows = [(each.rule, each.bound, each.value, "passed" if each.passed else "**failed**") for each in verdicts]
    return markdown_table(["rule", "bound", "value", "verdict"], rows)
