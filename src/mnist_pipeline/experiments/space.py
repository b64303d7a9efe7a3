"""The space of params that a sweep searches: a YAML file, parsed into strict types."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import (
    Count,
    Params,
    Section,
    explain_errors,
    flatten,
    load_params,
    merge,
    parse_section,
)
from mnist_pipeline.common.yaml_file import describe_value, read_sections
from mnist_pipeline.experiments.recipes import find_recipe
from mnist_pipeline.experiments.trial import VALIDATION_SIZE, on_one_core
from mnist_pipeline.report.studies import SPECIFICATION

_SEARCHABLE = ("seed", "model", "train")  # sections: the images stay the same
_FIXED = ("train.processes", "model.network")  # every trial gets one process, and the same keys under `model`
_SIGNIFICANT_DIGITS = 4  # of a float that is drawn: precise enough, and short to read


class _Range(Section):
    """The limits of a number that is searched, evenly or evenly in its logarithm."""

    low: float
    high: float
    log: bool = False


class _SpaceFile(Section):
    """The recipe to start from, the folds of each trial, and a range or a list of choices for each param to search."""

    recipe: str = SPECIFICATION
    folds: Count = 1
    params: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """The params to start from, and a distribution for each param to search, by its name in DVC (`train.epochs`).

    A trial trains once for each of the `folds`, with other images held out. Optuna gets each choice as JSON text: a
    choice may be a list, and 1 differs from true.
    """

    name: str
    recipe: str
    base: Params
    folds: int
    distributions: Mapping[str, BaseDistribution]

    @property
    def size(self) -> float:
        """The number of points, infinite if a float is searched."""
        return math.prod(map(_number_of_values, self.distributions.values()))

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the params' values at a point that Optuna has drawn."""
        return {key: _param_value(distribution, drawn[key]) for key, distribution in self.distributions.items()}

    def params_at(self, values: Mapping[str, Any]) -> Params:
        """Return the base params with other values for some.

        Raises:
            ValidationError: a param does not allow its value.
        """
        sections = self.base.model_dump()
        for key, value in values.items():
            nested = reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)
            sections = merge(sections, nested)
        return type(self.base).model_validate(sections)

    def trial_params(self, values: Mapping[str, Any], fold: int = 0) -> Params:
        """Return the params of a trial's training: it takes one core and holds images out to be scored on.

        The seed says which images, so each fold has its own seed: the base's and those after it.
        """
        params = self.params_at(values)
        size = params.data.validation_size or VALIDATION_SIZE
        data = params.data.model_copy(update={"validation_size": size})
        return on_one_core(params.model_copy(update={"data": data, "seed": params.seed + fold}))


def load_space(path: Path) -> Space:
    """Read a space and check it, including the limits of each range and each choice.

    Raises:
        UserError: the file is absent or no YAML, has an unknown key, or a value that a param does not allow.
    """
    if path.stem == SPECIFICATION:
        raise UserError(f"{path}: the name {SPECIFICATION} is reserved for params.yaml as it is: choose another name")
    if not re.fullmatch(r"\w[\w-]*", path.stem):
        raise UserError(f"{path.name!r:.60} becomes the name of a recipe: use letters, digits, - and _ before .yaml")
    if not path.is_file():
        raise UserError(f"{path} is absent: it must name params to search, such as `params: {{train.epochs: [2, 4]}}`")
    file = parse_section(_SpaceFile, read_sections(path), f"{path}: ")
    try:
        base = load_params(overlay=find_recipe(file.recipe))
    except UserError as error:
        raise UserError(f"{path}: recipe: {error}") from None
    if not file.params:
        raise UserError(f"{path}: params must name what to search, such as train.learning_rate, and is empty")
    flat = flatten({section: getattr(base, section) for section in _SEARCHABLE})
    known = {key: value for key, value in flat.items() if key not in _FIXED}
    for key in file.params:
        if key not in known:
            section = key.rpartition(".")[0]
            others = [name for name in known if section and name.rpartition(".")[0] == section]
            choices = ", ".join(others or ["seed", "model.…", "train.…"])
            raise UserError(f"{path}: params.{key!r:.50} cannot be searched: choose from {choices}")
    if file.folds > 1 and "seed" in file.params:
        raise UserError(f"{path}: each of the {file.folds} folds has its own seed: take out folds or params.seed")
    distributions = {
        key: _parse_entry(entry, known[key], f"{path}: params.{key}") for key, entry in file.params.items()
    }
    space = Space(path.stem, file.recipe, base, file.folds, distributions)
    for key, distribution in distributions.items():
        for value in _values_to_check(distribution):
            try:
                space.params_at({key: value})
            except ValidationError as error:
                raise UserError(f"{path}: {explain_errors(type(base), error)}") from None
    return space


def _parse_entry(entry: object, current: object, where: str) -> BaseDistribution:
    """Return the distribution that an entry of the file describes; `current` is the param's value in the recipe."""
    is_number = type(current) in (int, float)
    match entry:
        case [_, *_]:
            return CategoricalDistribution(
                list(dict.fromkeys(json.dumps(choice, default=str, skipkeys=True) for choice in entry))
            )
        case dict() if is_number:
            limits = parse_section(_Range, entry, f"{where}.")
        case _:
            or_range = " or a range such as {low: 1, high: 9}" if is_number else ""
            raise UserError(f"{where} must be a list of choices{or_range}, and is {describe_value(entry)}")
    if not limits.low < limits.high:
        raise UserError(f"{where}.high must be above low ({limits.low:g}), and is {limits.high:g}")
    if limits.log and limits.low <= 0:
        raise UserError(f"{where}.low must be above 0 with log, and is {limits.low:g}")
    if isinstance(current, float):
        return FloatDistribution(limits.low, limits.high, log=limits.log)
    for name, limit in (("low", limits.low), ("high", limits.high)):
        if not limit.is_integer():
            raise UserError(f"{where}.{name} must be an integer, as the param is, and is {limit:g}")
    return IntDistribution(int(limits.low), int(limits.high), log=limits.log)


def _values_to_check(distribution: BaseDistribution) -> list[Any]:
    """Return all choices, or both limits of a range: if a param allows these, it allows all in between."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return [_param_value(distribution, choice) for choice in choices]
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high):
            return [low, high]
    return []


def _param_value(distribution: BaseDistribution, drawn: Any) -> Any:
    match distribution:
        case CategoricalDistribution():
            return json.loads(drawn)
        case FloatDistribution(low=low, high=high):
            return min(max(float(f"{drawn:.{_SIGNIFICANT_DIGITS}g}"), low), high)
    return drawn


def _number_of_values(distribution: BaseDistribution) -> float:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return len(choices)
        case IntDistribution(low=low, high=high):
            return high - low + 1
    return math.inf
