"""The space of a sweep: it is checked before anything starts, and its points become params."""

from pathlib import Path

import pytest
from support import ROOT

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import load_params
from mnist_pipeline.experiments.space import load_space


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params:\n  train.rate: [1]\n", "'train.rate' cannot be searched: choose from train.epochs, .*train.l"),
        (
            "params:\n  data.validation_size: [1]\n",
            "'data.validation_size' cannot be searched: choose from seed, model",
        ),
        ("params:\n  train.processes: [1]\n", "'train.processes' cannot be searched"),
        (
            "params:\n  train.epochs: [2026-01-01]\n",
            "train.epochs must be a valid integer, and is the text '2026-01-01'",
        ),
        ("params:\n  train.epochs: [{1: 2}, 3]\n", "train.epochs must be a valid integer, and is a section"),
        ("params:\n  seed: [1]\n  seed: [2]\n", 'line 3 cannot be read .*duplicate key "seed"'),
        ("params:\n  seed: &a [1, *a]\n", "line 2 cannot be read .*alias"),
        ("params:\n  train.epochs: {low: '1e-3', high: 2}\n", r"epochs.low must be .* the text '1e-3' \(write 0.001\)"),
        ("params:\n  train.epochs: {low: 1.5, high: 2}\n", "epochs.low must be an integer, as the param is"),
        ("params:\n  train.epochs: {low: 0, high: 2}\n", "train.epochs must be greater than or equal to 1, and is 0"),
        ("params:\n  train.epochs: {low: 2, high: 2}\n", r"epochs.high must be above low \(2\), and is 2"),
        ("params:\n  train.epochs: {lo: 2, high: 3}\n", "lo is unknown: choose from low, high, log; .*low is missing"),
        ("params:\n  model.dropout: {low: 0, high: 0.1, log: true}\n", "dropout.low must be above 0 with log"),
        ("params:\n  model.dropout: {low: 0, high: 1.0}\n", "model.dropout must be less than 1, and is 1.0"),
        ("params:\n  model.dropout: 0.1\n", r"must be a list of choices or a range such as .*, and is 0.1"),
        ("params:\n  train.optimizer: {low: 1, high: 2}\n", "train.optimizer must be a list of choices, and is a sec"),
        ("params:\n  train.optimizer: [adam, lion]\n", "train.optimizer must be 'adam', .* and is the text 'lion'"),
        ("recipe: worst\nparams:\n  seed: [1]\n", "experiments/worst.yaml is absent: the recipes are specification"),
        ('recipe: "a\\nb"\nparams:\n  seed: [1]\n', r"experiments/a\\nb.yaml is absent: the recipes are specification"),
        ("recipes: best\nparams:\n  seed: [1]\n", "recipes is unknown: choose from recipe, folds, params"),
        ("params: {}\n", "params must name what to search"),
        ("folds: 0\nparams:\n  train.epochs: [1]\n", "folds must be greater than or equal to 1, and is 0"),
        ("folds: 2\nparams:\n  seed: [1]\n", "each of the 2 folds has its own seed: take out folds or params.seed"),
        ("- 1\n", "must hold sections"),
    ],
)
def test_a_wrong_space_is_an_error_of_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    space = write(tmp_path / "odd.yaml", text)
    with pytest.raises(UserError, match=said) as error:
        load_space(space)
    assert str(error.value).startswith(str(space))
    assert str(error.value).isprintable()
    assert len(str(error.value)) - len(str(tmp_path)) < 250


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("specification.yaml", "the name specification is reserved for params.yaml as it is: choose another name"),
        ("two words.yaml", "'two words.yaml' becomes the name of a recipe: use letters, digits, - and _"),
        ("two\nlines.yaml", r"'two\\nlines.yaml' becomes the name of a recipe"),
    ],
)
def test_a_space_needs_a_name_that_a_recipe_can_have(name: str, said: str, tmp_path: Path) -> None:
    space = write(tmp_path / name, "params:\n  seed: [1, 2]\n")
    with pytest.raises(UserError, match=said):
        load_space(space)


def test_a_space_keeps_types_and_starts_from_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = """
recipe: best
params:
  train.learning_rate: {low: 0.003, high: 0.03, log: true}
  train.epochs: {low: 2, high: 4}
  model.dropout: {low: 0, high: 0.2}
  model.bias: [true, false]
  model.channels: [[4, 4, 4, 4, 4, 4], [5, 5, 5, 5, 5, 5]]
"""
    space = load_space(write(tmp_path / "wide.yaml", text))
    drawn = {"train.learning_rate": 0.0123456, "train.epochs": 3, "model.dropout": 0.0, "model.bias": "false"}
    values = space.values(drawn | {"model.channels": "[5, 5, 5, 5, 5, 5]"})
    params = space.trial_params(values)
    assert (params.train.learning_rate, params.train.epochs, params.model.bias) == (0.01235, 3, False)
    assert params.model.channels == [5] * 6
    assert (params.threads, params.train.processes, params.data.validation_size) == (1, 1, 10_000)
    best = load_params(overlay=Path("experiments/best.yaml"))
    assert params.train.augmentation == best.train.augmentation
