"""The paths of all files, relative to the repository's root, where every stage runs."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
EXPERIMENTS = Path("experiments")  # recipes, each an overlay of the params
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
REQUIREMENTS = Path("requirements.lock")

RAW = Path("data/raw")
DIGESTS = Path("data/SHA256SUMS")
ADDED = Path("data/added")  # digits to train on in addition to MNIST; DVC tracks a directory for each addition

CHECKPOINTS = Path(".checkpoints")  # of interrupted trainings; outside all outputs, which DVC deletes

MODEL = Path("models/model.safetensors")
BEST = Path("models/best.safetensors")  # of the recipe *best*; `mnist publish` writes it, and git keeps it

REPORTS = Path("reports")
HISTORY = REPORTS / "history.csv"
METRICS = REPORTS / "metrics.json"
PREDICTIONS = REPORTS / "predictions.csv"
CALIBRATION = REPORTS / "calibration.csv"
ROBUSTNESS = REPORTS / "robustness.csv"
REPORT = REPORTS / "report.md"
PAGE = REPORTS / "report.html"
FIGURES = REPORTS / "figures"

# `mnist study`, `make diff`, `make bench` and `mnist reproduce --record` write these; no stage does.
STUDIES = REPORTS / "studies"
DIFF = REPORTS / "diff.md"
BENCH = REPORTS / "bench.json"
PROCESSORS = REPORTS / "processors.csv"


def checkpoint_path(fingerprint: str) -> Path:
    """Return the file of a training's checkpoint; it is in the repository itself when DVC runs a temporary copy."""
    return Path(os.environ.get("DVC_ROOT", ".")) / CHECKPOINTS / f"{fingerprint}.safetensors"
