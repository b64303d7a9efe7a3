"""Run the pipeline of HEAD again in a temporary clone, without any cache, and compare (`make reproduce`)."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_csv
from mnist_pipeline.common.params import load_yaml
from mnist_pipeline.common.paths import ADDED, HISTORY, LOCK, PREDICTIONS, RAW, REPORTS
from mnist_pipeline.tracking.git import GitError, clone_repository, head_commit, locate_in_repository
from mnist_pipeline.tracking.provenance import clean_environment

_COMPARED = [LOCK, HISTORY, PREDICTIONS]  # git holds these, so the clone has the old ones


def reproduce_commit() -> None:
    """Run the whole pipeline at HEAD again; print for each output whether it is identical.

    Exit with 0 if all outputs are, otherwise with 1.

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
            addition, (top, below) = ADDED / tracked.stem, locate_in_repository()
            get = ["dvc", "get", "--quiet", "--rev", "HEAD", "--out", str(clone / addition), top, below + str(addition)]
            subprocess.run(get, env=environment, check=False)  # if it fails, `dvc repro` says what is missing
        if subprocess.run(["dvc", "repro", "--force"], cwd=clone, env=environment, check=False).returncode != 0:
            raise UserError(f"the pipeline of commit {commit} failed, see above")
        before, after = output_digests(committed / LOCK), output_digests(clone / LOCK)
        print(f"\nOutputs of commit {commit}, made again:")
        for output, digest in before.items():
            print(f"  {output:<26} {'identical' if after.get(output) == digest else 'DIFFERENT'}")
        verdict = "identical, byte for byte" if before == after else describe_difference(committed, clone)
    print(f"Verdict: {verdict}")
    sys.exit(before != after)


def output_digests(lock: Path) -> dict[str, str]:
    """Return the MD5 digest of each output in a `dvc.lock`."""
    stages = load_yaml(lock.read_text(encoding="utf-8"), lock)["stages"].values()
    return {output["path"]: output["md5"] for stage in stages for output in stage["outs"]}


def describe_difference(committed: Path, again: Path) -> str:
    """Say how much two runs differ. Another processor may change the last bits, but rarely a prediction."""
    histories = [read_csv(directory / HISTORY) for directory in (committed, again)]
    predictions = [read_csv(directory / PREDICTIONS) for directory in (committed, again)]
    if any(len(first) != len(second) for first, second in (histories, predictions)):
        return "different: another number of epochs or of test images"
    largest, name, epoch = max(
        (abs(first[name] - second[name]), name, int(first["epoch"]))
        for first, second in zip(*histories, strict=True)
        for name in first
    )
    changed = sum(first["prediction"] != second["prediction"] for first, second in zip(*predictions, strict=True))
    accuracies = [sum(row["prediction"] == row["label"] for row in rows) / len(rows) for rows in predictions]
    return (
        f"different. The history differs by at most {largest:.2g} ({name}, epoch {epoch}); "
        f"{changed} of {len(predictions[0]):,} predictions differ; "
        f"the accuracy is {accuracies[1]:.2%} and was {accuracies[0]:.2%}"
    )
