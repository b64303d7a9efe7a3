"""Save a training after each epoch, so that a killed one can go on from there."""

import json
import os
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mnist_pipeline.common.files import write_bytes
from mnist_pipeline.common.paths import checkpoint_path
from mnist_pipeline.common.scores import EpochResult, Score
from mnist_pipeline.training.loop import Training

_DESCRIPTION = "training"  # the key of the file's metadata
_DAMAGE = (safetensors.SafetensorError, KeyError, TypeError, ValueError)  # what reading a damaged file raises


class Checkpoint:
    """The file of one training. Its name is the fingerprint of all that the training depends on; it holds no pickle.

    DVC deletes a stage's outputs before it runs the stage, so the file is not one of them.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path = checkpoint_path(fingerprint)

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
            tensors, description = _parse(self.path.read_bytes())
        except _DAMAGE as error:
            print(f"{self.path} is damaged and ignored: {' '.join(str(error).split())}")
            return None
        run_id = _apply(training, tensors, description)
        print(f"Going on after epoch {len(training.history)}, from {self.path}")
        return run_id

    def finish(self) -> None:
        """Delete the file of a training that has ended, unless DVC runs it.

        DVC still has to take the outputs. If it is killed meanwhile, it runs the stage again, which then goes on from
        the file. The evaluate stage deletes it: DVC runs that when it has the outputs.
        """
        if "DVC_ROOT" not in os.environ:
            self.remove()

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def history(self) -> list[EpochResult]:
        """Return the epochs that the file holds: none if it is absent or damaged."""
        try:
            history: list[EpochResult] = _parse(self.path.read_bytes())[1]["history"]
            return history
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
    """Set a training to the state that `dump_training` returned; return the id of its MLflow run."""
    return _apply(training, *_parse(content))


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata: the header's length in 8 bytes, then the header in JSON (safetensors' format).

    A damaged file raises one of `_DAMAGE`.
    """
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"][_DESCRIPTION])
    history = [
        EpochResult(**result | {part: Score(**result[part]) for part in ("training", "monitor")})
        for result in description["history"]
    ]
    return tensors, {name: description[name] for name in ("run_id", "param_groups")} | {"history": history}


def _apply(training: Training, tensors: dict[str, Tensor], description: dict[str, Any]) -> str | None:
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
    for optimizer, state, groups in zip(training.optimizers, states, description["param_groups"], strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    training.history.extend(description["history"])
    run_id: str | None = description["run_id"]
    return run_id
