"""What a stage's outputs come from: its inputs, params and code as it starts, and the commit they belong to."""

import hashlib
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, sha256_of_directory
from mnist_pipeline.common.params import Params, flatten, load_params, load_yaml
from mnist_pipeline.common.paths import ADDED, LOCK, MODEL, PARAMS, PIPELINE, RAW, REPORTS, REQUIREMENTS

OUTPUTS = [f":!{path}" for path in (MODEL.parent, REPORTS, LOCK)]  # what a run itself changes makes no tree dirty
DATA = [ADDED, RAW]  # the images
TITLE_LENGTH = 120  # characters; MLflow's tables hold 250
NO_COMMIT = "none: not a commit of a git repository"


@dataclass(frozen=True)
class Provenance:
    """What `dvc.yaml` declares for a stage: its command, params, inputs (with their SHA-256), outputs and metrics.

    Two stages of the same `fingerprint` have the same outputs, on the same machine.
    """

    stage: str
    command: str
    params: Mapping[str, object]
    inputs: Mapping[str, str]
    outputs: Sequence[str]
    metrics: Sequence[str]

    @property
    def params_sha256(self) -> str:
        """The SHA-256 of the params, as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.params, sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all that the stage's outputs depend on."""
        files = [f"{digest}  {path}" for path, digest in sorted(self.inputs.items())]
        return hashlib.sha256("\n".join([self.command, self.params_sha256, *files]).encode()).hexdigest()

    @property
    def data_sha256(self) -> str:
        """The digest of the images that it reads."""
        return sha256_of_data({path: self.inputs[path] for path in map(str, DATA) if path in self.inputs})

    def tags(self) -> dict[str, str]:
        """Name what identifies the stage's execution; the single inputs are too many for tags."""
        return {
            "command": self.command,
            "fingerprint": self.fingerprint,
            "params_sha256": self.params_sha256,
            **commit(),
        }


def trace(stage: str, params: Params | None = None, without: Collection[Path] = ()) -> Provenance:
    """Hash what a stage reads before it runs: DVC hashes only after it has ended (dvc#11058).

    The params are those of `params.yaml` unless others are given. Inputs that do not exist yet can be left out.
    """
    declared = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"][stage]
    params = params or load_params()
    return Provenance(
        stage,
        declared["cmd"],
        flatten({section: getattr(params, section) for section in declared["params"]}),
        {path: digest(Path(path)) for path in declared["deps"] if Path(path) not in without},
        [path for kind in ("outs", "metrics", "plots") for path in _paths_of(declared.get(kind, []))],
        _paths_of(declared.get("metrics", [])),
    )


def _paths_of(entries: Sequence[str | Mapping[str, object]]) -> list[str]:
    """Return the paths in a list of `dvc.yaml`, where an entry with options is a mapping of its path."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def identify_training(params: Params) -> dict[str, object]:
    """Name everything that must be equal in processes that train together; files by their SHA-256."""
    provenance = trace("train", params)
    return {
        "git_commit": commit()["git_commit"],
        str(REQUIREMENTS): sha256(REQUIREMENTS),
        "command": provenance.command,
        **provenance.params,
        **provenance.inputs,
    }


def sha256_of_data(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of the digests of directories of images by their paths, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the list of a directory's files.

    Raises:
        UserError: it is absent.
    """
    if not path.exists():
        raise UserError(f"{path} is absent: `dvc repro` makes it, `dvc pull` brings it")
    return sha256_of_directory(path) if path.is_dir() else sha256(path)


def commit() -> dict[str, str]:
    """Name the commit, and say whether anything but outputs differs from it."""
    if not (head := git("rev-parse", "--verify", "--quiet", "HEAD").strip()):
        return {"git_commit": NO_COMMIT, "git_dirty": "unknown"}
    return {"git_commit": head, "git_dirty": str(bool(git("status", "--porcelain", "--", ".", *OUTPUTS))).lower()}


def title() -> str:
    """Name what is about to run, for people: the commit, and the params, or anything else, that differ from it."""
    found = commit()
    if found["git_commit"] == NO_COMMIT:
        return "no commit"
    params, known = flatten(load_params().model_dump()), committed_params()
    changed = [f"{key}={value}" for key, value in params.items() if known.get(key, value) != value]
    if found["git_dirty"] == "true" and not changed:
        changed = ["changed"]
    return textwrap.shorten(" ".join([found["git_commit"][:7], *changed]), TITLE_LENGTH, placeholder=" …")


def committed_params() -> dict[str, object]:
    """Return the commit's params by their names, none where its file does not hold any."""
    try:
        return flatten(cast("dict[str, Any]", load_yaml(git("show", f"HEAD:./{PARAMS}"))))
    except (yaml.YAMLError, AttributeError):
        return {}


def uncommitted() -> str:
    """Return what differs from the commit, outputs and new files of over a megabyte aside, as a patch."""
    if commit()["git_commit"] == NO_COMMIT:
        return ""
    diff = ["diff", "--no-color", "--no-ext-diff"]
    listed = git("ls-files", "--others", "--exclude-standard", "-z", "--", ".", *OUTPUTS).split("\0")
    new = [path for path in listed if path and Path(path).stat().st_size < 1_000_000]
    patches = [git(*diff, "--no-index", "--", os.devnull, path) for path in new]
    return git(*diff, "HEAD", "--", ".", *OUTPUTS) + "".join(patches)


def git(*arguments: str) -> str:
    """Return what git says, nothing where it is not installed or this is no repository."""
    try:
        process = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return process.stdout.decode(errors="replace")


def clean_environment() -> dict[str, str]:
    """Return the variables for a process that shall know nothing of the DVC and the MLflow around it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}


def environment() -> dict[str, str]:
    """Describe the machine: what another run needs besides the inputs to be the same."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "mlflow": version("mlflow"),
        "processor": processor(),
    }


def processor() -> str:
    """Name the processor, by its model where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
