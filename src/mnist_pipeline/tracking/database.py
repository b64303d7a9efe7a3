"""MLflow's database in a file, which moves with its directory."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.engine import make_url

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.tracking.address import TRACKING_URI

EXPERIMENT = "mnist"
ARTIFACTS = "mlartifacts"  # the directory of artifacts, beside the database
_ADDRESSES = {  # columns of MLflow's tables that hold addresses of artifacts
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
WORKSPACE_TAG = "workspace"


def check_place(database: Path) -> None:
    """Check that MLflow finds a database, and the artifacts beside it, where they are.

    Raises:
        UserError: it would write elsewhere. It takes `?` and `%41` in a path for parts of an address.
    """
    of_database = make_url(f"sqlite:///{database}").database
    of_artifacts = local_file_uri_to_path(database.as_uri())  # type: ignore[no-untyped-call]
    for found in (of_database, of_artifacts):
        if found != str(database):
            raise UserError(
                f"MLflow cannot use {database} (it takes that for {found}): rename the directory, "
                f"or set {TRACKING_URI} to a store in another one"
            )


def move_artifacts(database: Path, workspace: str) -> None:
    """Let addresses of artifacts begin at the database's directory: MLflow's are absolute, and directories move.

    Without this, the runs of a directory that was moved or copied would have their artifacts in the old place. Their
    `workspace` changes too, or a training that was interrupted in the old place could not go on in the new one.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        location = "SELECT artifact_location FROM experiments WHERE name = ?"
        [found] = connection.execute(location, [EXPERIMENT]).fetchone() or [""]
        old = Path(local_file_uri_to_path(found)).parent  # type: ignore[no-untyped-call]
        new = database.parent
        if old == new or not re.fullmatch(f"(/|file:).*/{ARTIFACTS}", found):
            return
        for before, after in ((f"{old}/", f"{new}/"), (f"{old.as_uri()}/", f"{new.as_uri()}/")):
            for table, column in _ADDRESSES.items():
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"  # noqa: S608 (names of ours)
                connection.execute(change, [after, len(before) + 1, len(before), before])
        moved = "UPDATE tags SET value = ? WHERE key = ? AND substr(value, ?) = ?"
        connection.execute(moved, [workspace, WORKSPACE_TAG, -len(f":{old}"), f":{old}"])


def prepare_database(database: Path) -> None:
    """Create MLflow's database if it is absent, whole or not at all: MLflow cannot continue with half of its tables.

    Raises:
        sqlite3.Error: the file is no SQLite database or cannot be written. MLflow would retry for minutes.
    """
    if not database.exists() or database.stat().st_size == 0:
        new = database.with_name(f"{database.name}.new")
        try:
            _remove_database(new)  # left by a process that was killed
            mlflow.MlflowClient(f"sqlite:///{new}").search_experiments()
            new.replace(database)
        finally:
            _remove_database(new)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def _remove_database(database: Path) -> None:
    for file in database.parent.glob(f"{database.name}*"):  # its journal too
        file.unlink()
