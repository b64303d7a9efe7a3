"""Run the pipeline of HEAD again in a temporary clone, without any cache, and compare (`make reproduce`)."""

import hashlib
import json
import operator
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_csv, read_table, read_text, write_csv
from mnist_pipeline.common.paths import ADDED, HISTORY, LOCK, METRICS, PREDICTIONS, PROCESSORS, RAW, REPORTS
from mnist_pipeline.common.yaml_file import load_yaml
from mnist_pipeline.tracking.git import GitError, clone_repository, head_commit
from mnist_pipeline.tracking.provenance import clean_environment, get_output, processor_name

_COMPARED = [LOCK, HISTORY, METRICS]  # git holds these, so the clone has the old ones


def reproduce_commit(record: bool = False) -> None:
    """Run the whole pipeline at HEAD again; print for each output whether it is identical.

    Exit with 0 if all outputs are, otherwise with 1. With `record`, add this machine's processor to the table of those
    on which all outputs were identical.

    Raises:
        UserError: there is no commit, git cannot clone it, it lacks outputs to compare with, or its pipeline fails.
    """
    try:
        commit = head_commit()[:7]
    except GitError as error:
        raise UserError(f"there is nothing to compare with: {error}") from None
    with tempfile.TemporaryDirectory() as temporary:
        clone, committed = clone_repository(Path(temporary) / "clone"), Path(temporary) / "committed"
        for path in _COMPARED:
            if not (clone / path).is_file():
                raise UserError(f"{path} is not committed: run `make repro`, then commit {LOCK} and {REPORTS}")
            (committed / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clone / path, committed / path)
        print(f"Running the pipeline of commit {commit} again", flush=True)
        data = {"MNIST_DIR": str(RAW.resolve())} if RAW.is_dir() else {}  # saves the clone a download
        environment = data | clean_environment()
        for tracked in (clone / ADDED).glob("*.dvc"):
            addition = ADDED / tracked.stem
            get_output(addition, "HEAD", clone / addition)  # if it fails, `dvc repro` says what is missing
        if subprocess.run(["dvc", "repro", "--force"], cwd=clone, env=environment, check=False).returncode != 0:
            raise UserError(f"the pipeline of commit {commit} failed, see above")
        before, after = output_digests(committed / LOCK), output_digests(clone / LOCK)
        print(f"\nOutputs of commit {commit}, made again:")
        for output, digest in before.items():
            print(f"  {output:<26} {'identical' if after.get(output) == digest else 'DIFFERENT'}")
        if before == after:
            verdict = "identical, byte for byte"
        else:
            get_output(PREDICTIONS, "HEAD", committed / PREDICTIONS)
            verdict = describe_difference(committed, clone)
    print(f"Verdict: {verdict}")
    if record and before == after:
        record_processor(after)
    sys.exit(before != after)


def record_processor(outputs: Mapping[str, str]) -> None:
    """Add this processor to reports/processors.csv, and drop those whose outputs were others."""
    digest = hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
    new = {"processor": processor_name(), "beyond_avx2": _beyond_avx2(), "cores": os.cpu_count(), "outputs": digest}
    earlier = read_table(PROCESSORS) if PROCESSORS.exists() else []
    kept = [row for row in earlier if row["outputs"] == digest and row["processor"] != new["processor"]]
    write_csv(PROCESSORS, [*kept, new])
    print(f"{PROCESSORS} lists this processor; `make readme` carries the table into docs/trust-a-rerun.md")


def _beyond_avx2() -> str:
    """Name the wider instruction sets that this processor has and the pipeline does not use."""
    has = torch.cpu.get_capabilities()
    names = {"avx512_f": "AVX-512", "avx512_bf16": "bfloat16", "amx_tile": "AMX"}
    return ", ".join(name for key, name in names.items() if has.get(key)) or "nothing"


def output_digests(lock: Path) -> dict[str, str]:
    """Return the MD5 digest of each output in a `dvc.lock`."""
    stages = load_yaml(lock.read_text(encoding="utf-8"), lock)["stages"].values()
    return {output["path"]: output["md5"] for stage in stages for output in stage["outs"]}


def describe_difference(committed: Path, again: Path) -> str:
    """Say how much two runs differ. Other kernels may change the last bits, but rarely a prediction."""
    histories = [read_csv(directory / HISTORY) for directory in (committed, again)]
    if len(histories[0]) != len(histories[1]):
        return "different: another number of epochs"
    largest, name, epoch = max(
        (abs(first[name] - second[name]), name, int(first["epoch"]))
        for first, second in zip(*histories, strict=True)
        for name in first
    )
    accuracies = [json.loads(read_text(directory / METRICS))["test_accuracy"] for directory in (committed, again)]
    return (
        f"different. The history differs by at most {largest:.2g} ({name}, epoch {epoch}); "
        f"{_changed_predictions(committed, again)}the accuracy is {accuracies[1]:.2%} and was {accuracies[0]:.2%}"
    )


def _changed_predictions(committed: Path, again: Path) -> str:
    """Count the predictions that differ; say nothing if DVC no longer has the old ones or the images are others."""
    if not (committed / PREDICTIONS).exists():
        return ""
    tables = [read_table(directory / PREDICTIONS) for directory in (committed, again)]
    old, new = ([row["prediction"] for row in table] for table in tables)
    if len(old) != len(new):
        return ""
    return f"{sum(map(operator.ne, old, new))} of {len(old):,} predictions differ; "
