"""Where a stage's outputs come from: its command, params, inputs and code, hashed before it runs."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import files_below, sha256, sha256_of_directory
from mnist_pipeline.common.params import Params, flatten, load_params
from mnist_pipeline.common.paths import ADDED, PIPELINE, RAW, REQUIREMENTS
from mnist_pipeline.common.yaml_file import load_yaml
from mnist_pipeline.tracking.git import commit_tags, head_commit_or_none, locate_in_repository

_IMAGES = [str(ADDED), str(RAW)]


@dataclass(frozen=True)
class Provenance:
    """What `dvc.yaml` declares for a stage: its command, params, inputs (with their SHA-256), outputs and metrics.

    Two executions of a stage with the same `fingerprint` and the same kernels (see `common.kernels`) have the same
    outputs.
    """

    stage: str
    command: str
    params: Mapping[str, object]
    inputs: Mapping[str, str]
    outputs: Sequence[str]
    metrics: Sequence[str]

    @property
    def params_sha256(self) -> str:
        """The SHA-256 of the params."""
        return _sha256_of_json(self.params)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all that the stage's outputs depend on."""
        files = [f"{digest}  {path}" for path, digest in sorted(self.inputs.items())]
        return hashlib.sha256("\n".join([self.command, self.params_sha256, *files]).encode()).hexdigest()

    @property
    def data_sha256(self) -> str:
        """The SHA-256 of the images that the stage reads."""
        return _sha256_of_json({path: self.inputs[path] for path in _IMAGES if path in self.inputs})

    def record(self) -> dict[str, object]:
        """Return all that is known about this execution of the stage."""
        return {
            **asdict(self),
            "fingerprint": self.fingerprint,
            "params_sha256": self.params_sha256,
            **commit_tags(),
        }


def trace(stage: str, params: Params | None = None, without: Collection[Path] = ()) -> Provenance:
    """Hash what a stage reads before it runs: DVC hashes only after the stage has ended (dvc#11058).

    The params are those of `params.yaml` unless others are given. Inputs that do not exist yet can be left out.

    Raises:
        UserError: an input is absent.
    """
    declared = load_yaml(PIPELINE.read_text(encoding="utf-8"), PIPELINE)["stages"][stage]
    params = params or load_params()
    # An entry with options is a mapping from its path.
    paths = {
        kind: [entry if isinstance(entry, str) else next(iter(entry)) for entry in declared.get(kind, [])]
        for kind in ("outs", "metrics", "plots")
    }
    return Provenance(
        stage,
        declared["cmd"],
        flatten({section: getattr(params, section) for section in declared["params"]}),
        {path: _sha256_of_path(Path(path)) for path in declared["deps"] if Path(path) not in without},
        [*paths["outs"], *paths["metrics"], *paths["plots"]],
        paths["metrics"],
    )


def identify_training(params: Params) -> dict[str, object]:
    """Return all that must be equal in processes that train together: values by name, SHA-256 by path."""
    provenance = trace("train", params)
    folders = [Path(path) for path in provenance.inputs if Path(path).is_dir() and path not in _IMAGES]
    code = {str(file): sha256(file) for folder in folders for file in files_below(folder).values()}
    return {
        "git_commit": head_commit_or_none(),
        str(REQUIREMENTS): sha256(REQUIREMENTS),
        "command": provenance.command,
        **provenance.params,
        **code,
        **provenance.inputs,
    }


def sha256_of_images() -> str:
    """Return the SHA-256 of all images in the workspace: the `data_sha256` of a training that would start now.

    Raises:
        UserError: a directory of images is absent.
    """
    return _sha256_of_json({path: _sha256_of_path(Path(path)) for path in _IMAGES})


def _sha256_of_path(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path} is absent: `dvc repro` makes it, `dvc pull` brings it")
    return sha256_of_directory(path) if path.is_dir() else sha256(path)


def _sha256_of_json(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those of DVC and MLflow, for a process that must not see them."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}


def get_output(path: Path, revision: str, target: Path) -> bool:
    """Copy a file or folder that DVC keeps, as a revision has it; return whether the cache or the remote holds it."""
    top, below = locate_in_repository()
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["dvc", "get", "--quiet", "--force", "--rev", revision, "--out", str(target), top, below + str(path)]
    return subprocess.run(command, env=clean_environment(), stderr=subprocess.DEVNULL, check=False).returncode == 0


def describe_machine() -> dict[str, str]:
    """Describe the machine and the versions on it: elsewhere the last bits of outputs can be others."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "mlflow": version("mlflow"),
        "processor": processor_name(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def processor_name() -> str:
    """Return the processor's model on Linux, elsewhere what Python knows about it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
