"""MLflow's calls end in time, whatever holds them up."""

import time

import pytest
from mlflow import MlflowClient
from support.stores import store  # noqa: F401 (a fixture)

from mnist_pipeline.tracking import client
from mnist_pipeline.tracking.client import Deadline
from mnist_pipeline.tracking.store import Store, StoreError, store_errors

SECONDS = 0.5
ENOUGH = 30  # seconds; the call would take 60


@pytest.fixture(autouse=True)
def _half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SECONDS", SECONDS)


def test_a_call_returns_what_the_function_does() -> None:
    assert Deadline(patient=False).call(divmod, 7, 2) == (3, 1)


@pytest.mark.parametrize("error", [ValueError("wrong"), TimeoutError("its own"), KeyboardInterrupt()], ids=repr)
def test_a_call_raises_what_the_function_does(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        Deadline(patient=False).call(fail)
    assert raised.value is error


@pytest.mark.parametrize("patient", [False, True])
def test_a_stage_gives_all_calls_together_what_a_command_gives_each(patient: bool) -> None:
    deadline = Deadline(patient)
    deadline.call(time.sleep, SECONDS / 5)
    assert (deadline.seconds == SECONDS) == patient
    assert patient or deadline.seconds <= SECONDS * 4 / 5


def test_when_the_time_is_up_nothing_is_called_any_more() -> None:
    deadline = Deadline(patient=False)
    calls: list[int] = []
    with pytest.raises(TimeoutError):
        deadline.call(time.sleep, 2 * SECONDS)
    with pytest.raises(TimeoutError):
        deadline.call(calls.append, 1)
    assert calls == []


@pytest.mark.parametrize("failing", ["connect", "ask"])
@pytest.mark.usefixtures("store")
def test_a_store_that_hangs_ends_in_one_line(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        time.sleep(60)

    monkeypatch.setattr(MlflowClient, "__init__" if failing == "connect" else "get_experiment_by_name", hang)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"^MLflow at \S+ failed \(it took more than 0\.5 seconds\)$"), store_errors():
        Store()
    assert time.monotonic() - begin < ENOUGH
