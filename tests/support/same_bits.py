"""Train a few steps of each recipe and evaluate one network, in short, and digest what comes out.

`cd tests && python -m support.same_bits` writes the digests that the tests compare with.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from mnist_pipeline.common.params import load_params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.evaluation.metrics import evaluate
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.model_file import TrainedModel
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.checkpoint import dump_training
from mnist_pipeline.training.loop import start_training, train

HERE = Path(__file__).parent
DIGESTS = HERE / "same_bits.json"
RECIPES = ["specification", "best", "fast", "tiny"]
SHORT = {"epochs": 4, "batch_size": 32}  # 40 steps on the 300 training digits


def digest_results() -> dict[str, str]:
    """Return the SHA-256 of each recipe's training, with all its state, and of an evaluation."""
    found = {}
    root = HERE.parent.parent
    for recipe in RECIPES:
        overlay = root / "experiments" / f"{recipe}.yaml"
        params = load_params(root / "params.yaml", overlay if overlay.exists() else None)
        device = set_up_torch(threads=1)  # beside other tests, several threads would wait for one another
        training, test = (load_digits(HERE / "digits", part) for part in ("train", "test"))
        short = params.train.model_copy(update=SHORT)
        state = start_training(build_model(params.model, seed=0), short)
        list(train(state, training.tensors(params.data, device), test.tensors(params.data, device), short, seed=0))
        found[recipe] = hashlib.sha256(dump_training(state)).hexdigest()
        if recipe == "best":
            evaluation = evaluate(TrainedModel(state.network, params.data), test, 100, device)
            found["evaluation"] = hashlib.sha256(json.dumps(asdict(evaluation)).encode()).hexdigest()
    return found


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digest_results(), indent=2) + "\n", encoding="utf-8")
