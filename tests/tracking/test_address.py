"""Where the store is, and that no password and no token of its address is shown, whatever form it has."""

import re
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from support.repository import Repository
from support.stores import isolated_tracking, store  # noqa: F401 (a fixture)

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.data.digits import NO_DIGITS
from mnist_pipeline.experiments.cluster import connect_cluster
from mnist_pipeline.promotion.gate import NoChampion, Verdict, look_up_champion, render_verdicts
from mnist_pipeline.tracking.address import hide_secrets, locate_store, show_address
from mnist_pipeline.tracking.registry import fetch_champion
from mnist_pipeline.tracking.store import Store, StoreError, continue_untracked, store_errors

SECRET = "s3cr3tword"
SHOWN = {
    f"http://me:{SECRET}@127.0.0.1:1": "http://127.0.0.1:1",
    f"http://{SECRET}@127.0.0.1:1": "http://127.0.0.1:1",
    f"http://me:p@{SECRET}@127.0.0.1:1": "http://127.0.0.1:1",
    f"http://me:pa/{SECRET}@127.0.0.1:1": "http://127.0.0.1:1",
    f"http://me:12/{SECRET}@127.0.0.1:1": "http://…",
    f"https://me:{SECRET}%2F%40@127.0.0.1:1/#part": "https://127.0.0.1:1",
    f"http://127.0.0.1:1/?token={SECRET}": "http://127.0.0.1:1",
    f"http://127.0.0.1:1?password=a@{SECRET}": "http://…",
    f"http://127.0.0.1:1/{SECRET}/mlflow": "http://127.0.0.1:1",
    f"http://me:{SECRET}\n@127.0.0.1:1": "http://127.0.0.1:1",
    f"http://[::1:{SECRET}": "http://…",
    f"http://me:{SECRET}@127.0.0.1:port": "http://…",
    f"postgresql://me:{SECRET}@127.0.0.1:1/runs": "postgresql://127.0.0.1:1",
    f"postgresql+psycopg2://me:pa/{SECRET}@127.0.0.1:1/runs?sslmode=require": "postgresql+psycopg2://127.0.0.1:1",
    f"mysql+pymysql://[::1]:1/runs?user=me&password={SECRET}": "mysql+pymysql://[::1]:1",
    f"mssql+pyodbc:///?odbc_connect={quote_plus(f'DRIVER=ODBC;SERVER=host;UID=me;PWD={SECRET}')}": "mssql+pyodbc://",
    f"DRIVER=ODBC;SERVER=host;UID=me;PWD={SECRET}": "…",
    f"me:{SECRET}@127.0.0.1:1": "…",
}


@pytest.mark.parametrize(("uri", "shown"), SHOWN.items(), ids=range(len(SHOWN)))
def test_of_an_address_scheme_host_and_port_are_shown(uri: str, shown: str) -> None:
    assert show_address(uri) == shown


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "sqlite:////a/mlflow.db", "./mlruns", "file:///a/mlruns"])
def test_the_path_of_a_local_store_is_shown(uri: str) -> None:
    assert show_address(uri) == uri
    assert show_address(f"{uri}?password=me") in (uri, "…", "file://")


@pytest.mark.parametrize("uri", SHOWN, ids=range(len(SHOWN)))
@pytest.mark.usefixtures("store")
def test_no_command_shows_a_secret_of_an_address(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each fails, for nothing is there: the reason that the library gives often has the address in it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with continue_untracked("this training"):
        Store()
    assert fetch_champion(tmp_path) is None
    found = look_up_champion(NO_DIGITS, 1)
    assert isinstance(found, NoChampion)
    print(render_verdicts([Verdict("beside the champion", "", found.reason, found.acceptable)]))
    said = "".join(capfd.readouterr())
    assert said.count(show_address(uri)) >= 3
    assert SECRET not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("uri", [uri for uri in SHOWN if not SHOWN[uri].startswith("http://1")])
def test_a_cluster_that_has_no_server_to_track_to_shows_no_secret(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as refused, connect_cluster("127.0.0.1:1"):
        pass
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "Invalid URL '{}': No host supplied",
        "could not translate host name to address, in {}",
        "Failed to parse: {}, port: me:pa",
        "(pyodbc.Error) login failed for user me with pass word\n{}",
    ],
)
@pytest.mark.parametrize("form", [str, repr, quote, quote_plus], ids=["plain", "repr", "quote", "quote_plus"])
@pytest.mark.parametrize("uri", SHOWN, ids=range(len(SHOWN)))
def test_no_error_shows_a_secret(uri: str, form: type, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StoreError) as failed, store_errors():
        raise RuntimeError(template.format(form(uri)))
    assert SECRET not in str(failed.value)
    assert SECRET not in hide_secrets(template.format(form(uri)))


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_REGISTRY_URI"])
def test_secrets_beside_the_address_are_hidden_too(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, f"http://me:{SECRET}@host" if variable.endswith("URI") else SECRET)
    assert hide_secrets(f"wrong credentials me:{SECRET}") == "wrong credentials me:…"


def test_addresses_of_others_are_shown_without_secrets() -> None:
    text = f"Cannot connect to proxy 'http://me:{SECRET}@proxy:3128/a', see https://host/page."
    assert hide_secrets(text) == "Cannot connect to proxy 'http://proxy:3128', see https://host"


# Where it is


@pytest.mark.parametrize(
    ("uri", "located", "database"),
    [
        (None, "sqlite:////root/mlflow.db", "/root/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:////root/mlflow.db", "/root/mlflow.db"),
        ("sqlite:///sub/runs.db?timeout=9", "sqlite:////root/sub/runs.db?timeout=9", "/root/sub/runs.db"),
        ("sqlite+pysqlite:////other/runs.db", "sqlite+pysqlite:////other/runs.db", "/other/runs.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:", None),
        ("./mlruns", "file:///root/mlruns", None),
        ("file:mlruns", "file:///root/mlruns", None),
        ("file:///other/mlruns", "file:///other/mlruns", None),
        ("http://host:5000", "http://host:5000", None),
        ("databricks", "databricks", None),
    ],
)
def test_a_relative_address_begins_at_the_repository(
    uri: str | None, located: str, database: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert locate_store(Path("/root")) == (located, database and Path(database))


def test_a_relative_address_in_a_temporary_copy_is_that_of_the_repository(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with isolated_tracking(tmp_path) as patch:
        (tmp_path / "mlflow.db").rename(tmp_path / "runs.db")
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
        patch.setenv("DVC_ROOT", str(tmp_path))
        patch.chdir(copy)
        run = Store().create_run("experiment", {})
        run.client.log_text(run.id, "kept", "note.txt")
    [found] = Repository(tmp_path, f"sqlite:///{tmp_path / 'runs.db'}").runs()
    assert found.info.run_name == "experiment"
    assert re.match(rf"file://{tmp_path}/", found.info.artifact_uri)
    assert list(copy.iterdir()) == []
