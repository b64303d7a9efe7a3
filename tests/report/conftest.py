"""The few real digits of the tests stand for all of MNIST, so that their report has the published figures."""

from collections.abc import Iterator

import pytest

from mnist_pipeline.data.digits import Digits


@pytest.fixture(autouse=True, scope="module")
def as_mnist() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "is_mnist", lambda self, part: True)
        yield


@pytest.fixture
def as_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "is_mnist", lambda self, part: False)
