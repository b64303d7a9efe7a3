"""The registered model: one version for each model, always one champion, and a record of each move."""

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from support.stores import isolated_tracking

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, Registry
from mnist_pipeline.tracking.run import MODEL_TAG, TrackedRun
from mnist_pipeline.tracking.store import Store

MOVE = {"by": "a tester", "commit": "1" * 40, "reason": "a test, of “this”"}
READY, FAILED = LoggedModelStatus.READY, LoggedModelStatus.FAILED


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with isolated_tracking(tmp_path):
        yield Registry(Store())


def trained(registry: Registry, model: Path, *models: LoggedModelStatus, accuracy: float | None = 0.5) -> str:
    """Create the run of a model file, with a logged model for each of these statuses, and return its id."""
    client = registry.client
    run = client.create_run(registry.store.experiment_id, tags={MODEL_TAG: sha256(model)}).info.run_id
    if accuracy is not None:
        TrackedRun(client, run).log(
            {"test_accuracy": accuracy, "train_loss": 0.25}, tags={"mlflow.note.content": "**good**"}
        )
    for status in models:
        logged = client.create_logged_model(registry.store.experiment_id, "model", run)
        client.finalize_logged_model(logged.model_id, status)
    return run


def version(registry: Registry, name: str) -> ModelVersion:
    """Register a made-up model."""
    Path(name).write_text(name)
    trained(registry, Path(name), READY)
    return registry.register(Path(name))


def aliases(registry: Registry) -> dict[str, int]:
    found = registry.client.get_registered_model("mnist").aliases
    return {alias: int(number) for alias, number in found.items()}


def records(registry: Registry, number: int) -> list[dict[str, object]]:
    """Return the records of a version, in the order of MLflow's pages."""
    tags = registry.client.get_model_version("mnist", str(number)).tags
    return [json.loads(value) for _, value in sorted(tags.items())]


# A version for a model


def test_a_model_becomes_one_version(registry: Registry) -> None:
    first = version(registry, "first")
    assert registry.register(Path("first")) == first
    assert version(registry, "second").number == 2
    [found] = registry.client.search_model_versions("version_number = 1")
    assert (found.run_id, found.description) == (first.run.info.run_id, "**good**")
    assert found.source.startswith("models:/m-")


def test_a_model_that_was_trained_twice_is_one_version(registry: Registry) -> None:
    first = version(registry, "model")
    trained(registry, Path("model"), READY)
    assert registry.register(Path("model")) == first


def test_the_newest_complete_model_is_registered(registry: Registry) -> None:
    Path("model").write_text("model")
    run = trained(registry, Path("model"), READY, READY, FAILED)
    models = registry.client.search_logged_models([registry.store.experiment_id], f"source_run_id = '{run}'")
    newest = max((model for model in models if model.status == READY), key=lambda model: model.creation_timestamp)
    number = registry.register(Path("model")).number
    assert registry.client.get_model_version("mnist", str(number)).source == f"models:/{newest.model_id}"


@pytest.mark.parametrize("accuracy", [None, 0.5])
def test_an_incomplete_run_becomes_no_version(registry: Registry, accuracy: float | None) -> None:
    Path("model").write_text("model")
    trained(registry, Path("model"), FAILED, accuracy=accuracy)
    with pytest.raises(UserError, match="`make backfill`"):
        registry.register(Path("model"))
    assert registry.client.search_registered_models() == []


def test_a_model_without_a_run_becomes_no_version(registry: Registry) -> None:
    Path("model").write_text("model")
    with pytest.raises(UserError, match=r"no run of model .*`make backfill` adds it"):
        registry.register(Path("model"))


# The moves


def test_the_former_champion_is_kept(registry: Registry) -> None:
    first, second, third = (version(registry, name) for name in ("first", "second", "third"))
    for former, new in [(None, first), (first, second), (second, third)]:
        registry.challenge(new, MOVE)
        registry.promote(new, former, MOVE)
    assert aliases(registry) == {CHAMPION: 3, PREVIOUS: 2}


def test_the_former_champion_may_come_back(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    for former, new in [(None, first), (first, second), (second, first)]:
        registry.promote(new, former, MOVE)
    assert aliases(registry) == {CHAMPION: 1, PREVIOUS: 2}


def test_a_challenger_does_not_replace_the_champion(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    registry.promote(first, None, MOVE)
    registry.challenge(second, MOVE)
    assert aliases(registry) == {CHAMPION: 1, CHALLENGER: 2}


def test_a_promotion_keeps_another_versions_challenger_alias(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    registry.challenge(second, MOVE)
    registry.promote(first, None, MOVE)
    assert aliases(registry) == {CHAMPION: 1, CHALLENGER: 2}


def test_a_rollback_undoes_a_promotion_once(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    registry.promote(first, None, MOVE)
    registry.promote(second, first, MOVE)
    registry.roll_back(second, first, MOVE)
    assert aliases(registry) == {CHAMPION: 1}


def test_a_rollback_after_an_unfinished_move_only_removes_an_alias(registry: Registry) -> None:
    first = version(registry, "first")
    registry.promote(first, None, MOVE)
    registry.client.set_registered_model_alias("mnist", PREVIOUS, "1")
    before = records(registry, 1)
    registry.roll_back(first, first, MOVE)
    assert aliases(registry) == {CHAMPION: 1}
    assert records(registry, 1) == before


def test_a_promotion_judged_against_a_former_champion_moves_nothing(registry: Registry) -> None:
    first, second, third = (version(registry, name) for name in ("first", "second", "third"))
    registry.promote(first, None, MOVE)
    registry.promote(second, first, MOVE)
    for judged_by in (first, None):
        with pytest.raises(UserError, match="another promotion came between, and version 2 is the champion"):
            registry.promote(third, judged_by, MOVE)
    assert aliases(registry) == {CHAMPION: 2, PREVIOUS: 1}
    assert records(registry, 3) == []


def test_a_promotion_reports_that_another_overtook_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    move = MlflowClient.set_registered_model_alias

    def overtake(client: MlflowClient, name: str, alias: str, number: str) -> None:
        move(client, name, alias, number)
        move(client, name, alias, str(second.number))

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overtake)
    with pytest.raises(UserError, match="another promotion came between, and version 2 is the champion"):
        registry.promote(first, None, MOVE)


def test_there_is_one_champion_at_every_moment(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    registry.promote(first, None, MOVE)
    seen = [aliases(registry)]
    for name in ("set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag"):

        def watched(*arguments: object, request: object = getattr(MlflowClient, name)) -> None:
            request(*arguments)
            seen.append(aliases(registry))

        monkeypatch.setattr(MlflowClient, name, watched)
    registry.challenge(second, MOVE)
    registry.promote(second, first, MOVE)
    registry.roll_back(second, first, MOVE)
    assert [number for number, after in pairwise(found[CHAMPION] for found in seen) if number != after] == [1, 2]
    assert len(seen) > 10


def test_each_move_is_recorded_on_its_versions(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    registry.challenge(first, MOVE | {"gate": "passed"})
    registry.promote(first, None, MOVE)
    registry.promote(second, first, MOVE)
    registry.roll_back(second, first, MOVE)
    known = MOVE | {"metrics": {"test_accuracy": 0.5}}
    assert records(registry, 1) == [
        {"became": "challenger", "gate": "passed", **known},
        {"became": "champion", "instead_of": "none", **known},
        {"became": "previous", "successor": "version 2", **known},
        {"became": "champion", "instead_of": "version 2", **known},
    ]
    assert records(registry, 2) == [
        {"became": "champion", "instead_of": "version 1", **known},
        {"became": "withdrawn", "successor": "version 1", **known},
    ]


def test_only_one_promotion_runs_at_a_time(registry: Registry) -> None:
    entered = threading.Event()

    def enter() -> None:
        with Registry(registry.store).lock():
            entered.set()

    other = threading.Thread(target=enter)
    with registry.lock():
        other.start()
        assert not entered.wait(0.2)
    other.join(20)
    assert entered.is_set()
