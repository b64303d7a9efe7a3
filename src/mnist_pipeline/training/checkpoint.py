"""Save a training after each epoch, so that a killed one can go on from there."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mnist_pipeline.common.files import write_bytes
from mnist_pipeline.common.paths import CHECKPOINTS
from mnist_pipeline.common.scores import EpochResult, Score
from mnist_pipeline.training.loop import Training

_DESCRIPTION = "training"  # the key of the file's metadata
_DAMAGE = (safetensors.SafetensorError, KeyError, TypeError, ValueError)  # what reading a damaged file raises


class Checkpoint:
    """The file of one training. Its name is the fingerprint of all that the training depends on; it holds no pickle.

    DVC deletes a stage's outputs before it runs the stage, so the file is not one of them. It lies at the root of the
    repository itself, because DVC runs experiments in temporary copies.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path = Path(os.environ.get("DVC_ROOT", ".")) / CHECKPOINTS / f"{fingerprint}.safetensors"

    def save(self, training: Training, run_id: str | None) -> None:
        """Write a training and the id of its MLflow run, if it has one. The file is written whole or not at all."""
        write_bytes(self.path, dump_training(training, run_id))

    def restore(self, training: Training) -> str | None:
        """Set a training to where it was interrupted; return the id of its MLflow run.

        If there is no checkpoint, or a damaged one, which is reported, the training stays as it is.
        """
        if not self.path.exists():
            return None
        try:
            run_id = load_training(training, self.path.read_bytes())
        except _DAMAGE as error:
            print(f"{self.path} is damaged and ignored: {' '.join(str(error).split())}")
            return None
        print(f"Going on after epoch {len(training.history)}, from {self.path}")
        return run_id

    def remove(self) -> None:
        """Delete the file; a finished training no longer needs it."""
        self.path.unlink(missing_ok=True)

    def history(self) -> list[EpochResult]:
        """Return the epochs that the file holds: none if it is absent or damaged."""
        try:
            return _history(_description(self.path.read_bytes()))
        except (OSError, *_DAMAGE):
            return []


def dump_training(training: Training, run_id: str | None = None) -> bytes:
    """Return a training and the id of its MLflow run as the content of a safetensors file."""
    optimizers = [optimizer.state_dict() for optimizer in training.optimizers]
    tensors = {f"model/{name}": tensor for name, tensor in training.model.state_dict().items()}
    if training.average:
        tensors |= {f"average/{name}": tensor for name, tensor in training.average.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer["state"].items():
            found = {name: tensor for name, tensor in state.items() if tensor is not None}
            tensors |= {f"optimizer/{number}/{index}/{name}": tensor for name, tensor in found.items()}
    description = {
        "run_id": run_id,
        "history": [asdict(result) for result in training.history],
        "param_groups": [optimizer["param_groups"] for optimizer in optimizers],
    }
    return safetensors.torch.save(tensors, {_DESCRIPTION: json.dumps(description)})


def load_training(training: Training, content: bytes) -> str | None:
    """Set a training to the state that `dump_training` returned; return the id of its MLflow run.

    Raises:
        SafetensorError, KeyError, TypeError, ValueError: the content cannot be read; the training stays as it is.
    """
    tensors = safetensors.torch.load(content)
    description = _description(content)
    history, run_id, groups = _history(description), description["run_id"], description["param_groups"]
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in training.optimizers]
    for name, tensor in tensors.items():
        match name.split("/"):
            case ["model" | "average" as part, key]:
                weights[part][key] = tensor
            case ["optimizer", number, index, key]:
                states[int(number)].setdefault(int(index), {})[key] = tensor
    training.model.load_state_dict(weights["model"])
    if training.average:
        training.average.load_state_dict(weights["average"])
    for optimizer, state, group in zip(training.optimizers, states, groups, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": group})
    training.history.extend(history)
    return str(run_id) if run_id else None


def _description(content: bytes) -> dict[str, Any]:
    """Read the metadata. A safetensors file starts with its header's length in 8 bytes and the header as JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description: dict[str, Any] = json.loads(header["__metadata__"][_DESCRIPTION])
    return description


def _history(description: dict[str, Any]) -> list[EpochResult]:
    return [
        EpochResult(**result | {part: Score(**result[part]) for part in ("training", "monitor")})
        for result in description["history"]
    ]
