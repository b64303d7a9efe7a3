"""What a stage's outputs come from: its inputs, params and code as it starts, and the machine that it runs on."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from mnist_pipeline.files import sha256, sha256_of_directory
from mnist_pipeline.params import flatten
from mnist_pipeline.paths import LOCK, MODEL, PIPELINE, RAW, REPORTS

OUTPUTS = [MODEL.parent, REPORTS, LOCK]  # what a run changes itself does not make the tree dirty


@dataclass(frozen=True)
class Provenance:
    """A stage and the SHA-256 of all that it reads: its params, and the files that `dvc.yaml` declares for it.

    Two stages of the same `fingerprint` have the same outputs, on the same machine.
    """

    stage: str
    command: str
    inputs: dict[str, str]
    params: str

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all of it."""
        parts = [self.command, self.params, *(f"{digest}  {path}" for path, digest in sorted(self.inputs.items()))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def tags(self) -> dict[str, str]:
        """Name it all for the tracking."""
        inputs = {f"input.{path}": digest for path, digest in self.inputs.items()}
        return {
            "stage": self.stage,
            "command": self.command,
            "params_sha256": self.params,
            "fingerprint": self.fingerprint,
            "data_sha256": self.inputs[str(RAW)],
            **inputs,
        }


def trace(stage: str, params: Mapping[str, object]) -> Provenance:
    """Take the digests of what a stage reads, before it runs: DVC takes its own when it has ended (dvc#11058)."""
    declared = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"][stage]
    return Provenance(
        stage,
        declared["cmd"],
        {path: digest(Path(path)) for path in declared["deps"]},
        hashlib.sha256(json.dumps(flatten(params), sort_keys=True).encode()).hexdigest(),
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the list of a directory's files."""
    return sha256_of_directory(path) if path.is_dir() else sha256(path)


def environment() -> dict[str, str]:
    """Describe the machine and the commit: what another run needs besides the inputs to be the same."""
    return {
        "git_commit": git("rev-parse", "--verify", "--quiet", "HEAD") or "none: not a git repository",
        "git_dirty": str(bool(git("status", "--porcelain", "--", ".", *(f":!{path}" for path in OUTPUTS)))).lower(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "mlflow": version("mlflow"),
        "processor": processor(),
    }


def git(*arguments: str) -> str:
    """Return what git says, nothing where it is not installed or this is no repository."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def processor() -> str:
    """Name the processor, by its model where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
