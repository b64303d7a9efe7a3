"""A training kept on disk between two epochs, so that a killed one goes on where it was."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from mnist_pipeline.files import write_bytes
from mnist_pipeline.inference import Score
from mnist_pipeline.paths import CHECKPOINTS
from mnist_pipeline.training import EpochResult, Training

DESCRIPTION = "training"  # the key of the file's metadata


class Checkpoint:
    """The file of one training, named for the fingerprint of all that the training depends on.

    It lies outside the stage's outputs, which DVC deletes before a run, and at the root of the repository, which
    outlives the temporary copies that DVC runs experiments in. It holds no pickle.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path = Path(os.environ.get("DVC_ROOT", ".")) / CHECKPOINTS / f"{fingerprint}.safetensors"

    def save(self, training: Training, run_id: str | None) -> None:
        """Write a training and the id of its MLflow run, if it has one, whole or not at all."""
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
        write_bytes(self.path, safetensors.torch.save(tensors, {DESCRIPTION: json.dumps(description)}))

    def restore(self, training: Training) -> str | None:
        """Bring a training to where it was interrupted and return the id of its MLflow run.

        Without a checkpoint, or with a damaged one, which is named, return None with the training as it was. Of a group
        all restore what the leading process finds.
        """
        found = b""
        if training.group.leads and self.path.exists():
            found = self.path.read_bytes() or b"0"  # an empty file is damaged, not absent
        if not (content := training.group.send(found)):
            return None
        try:
            tensors = safetensors.torch.load(content)
            # The format: the header's length in 8 bytes, then the header, which is JSON.
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            description = json.loads(header["__metadata__"][DESCRIPTION])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            print(f"{self.path} is damaged and ignored: {' '.join(str(error).split())}")
            return None
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
        for result in description["history"]:
            scores = {part: Score(**result[part]) for part in ("training", "monitor")}
            training.history.append(EpochResult(**result | scores))
        print(f"Going on after epoch {len(training.history)}, from {self.path}")
        run_id: str | None = description["run_id"]
        return run_id

    def remove(self) -> None:
        """Forget a training that has ended well."""
        self.path.unlink(missing_ok=True)
