"""What a machine of the cluster checks and fetches before it trains: it must train the same as the driver would."""

import hashlib
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import ADDED, CHECKPOINTS, PIPELINE, REQUIREMENTS
from mnist_pipeline.tracking.address import TRACKING_URI, show_address
from mnist_pipeline.tracking.git import head_commit_or_none
from mnist_pipeline.tracking.provenance import sha256_of_images

ANSWER_SECONDS = 5  # within which a server must answer


def identify_repository() -> dict[str, str]:
    """Return what must be equal on two machines, besides params and data, for them to train the same."""
    files = [PIPELINE, *sorted(file for directory in ("src", "stages") for file in Path(directory).rglob("*.py"))]
    lines = "".join(f"{sha256(file)}  {file.as_posix()}\n" for file in files)
    return {
        "commit": head_commit_or_none(),
        "code's SHA-256": hashlib.sha256(lines.encode()).hexdigest(),
        f"{REQUIREMENTS}'s SHA-256": sha256(REQUIREMENTS) if REQUIREMENTS.exists() else "none: it is absent",
    }


def identify_images() -> str:
    """Return the SHA-256 of all images, empty if some are absent."""
    try:
        return sha256_of_images()
    except UserError:
        return ""


def prepare_node(node: str, repository: Mapping[str, str], images: str, tracking_uri: str) -> None:
    """Check that this machine has the driver's repository and reaches MLflow; fetch the images if they differ.

    Errors begin with `node`, the machine's description.

    Raises:
        UserError: the machine cannot train the same as the driver.
    """
    found = identify_repository()
    if differences := [
        f"its {what} is {found.get(what)}, the driver's {value}"
        for what, value in repository.items()
        if found.get(what) != value
    ]:
        raise UserError(f"{node} is refused: {'; '.join(differences)}: use the same commit and `make setup` on both")
    _check_server(node, tracking_uri)
    CHECKPOINTS.mkdir(exist_ok=True)
    with FileLock(CHECKPOINTS / "data.lock"):  # DVC refuses to run twice at once
        _fetch_images(node, images)


def _check_server(node: str, uri: str) -> None:
    parts = urlsplit(shown := show_address(uri))
    try:
        address = (parts.hostname, parts.port or socket.getservbyname(parts.scheme))
        socket.create_connection(address, ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{node} does not reach MLflow at {shown} ({error}): {TRACKING_URI} must name a server that it reaches"
        ) from None


def _fetch_images(node: str, expected: str) -> None:
    """Pull the images from DVC's remote, unless those with the expected digest are there."""
    if identify_images() == expected:
        return
    added = sorted(map(str, ADDED.glob("*.dvc")))
    command = [sys.executable, "-m", "dvc", "pull", "--quiet", "download", *added]
    pull = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if pull.returncode != 0:
        lines = pull.stdout.splitlines()
        why = next((line for line in lines if line.startswith("ERROR")), (lines or [f"exit code {pull.returncode}"])[0])
        raise UserError(f"{node} lacks the data, and `dvc pull` failed ({why}): run `dvc push` where it is")
    if (found := identify_images()) != expected:
        raise UserError(f"{node} is refused: its data's SHA-256 is {found}, the driver's {expected}")
