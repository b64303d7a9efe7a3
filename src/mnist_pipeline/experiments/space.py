"""The space of params that a sweep searches: a YAML file, parsed into strict types."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from pydantic import ValidationError

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import (
    Params,
    Section,
    describe_value,
    explain_error,
    flatten,
    load_params,
    parse_section,
    read_sections,
)
from mnist_pipeline.experiments.recipes import overlay_of
from mnist_pipeline.experiments.trial import VALIDATION_SIZE, alone
from mnist_pipeline.report.studies import SPECIFICATION

SECTIONS = ("seed", "model", "train")  # what may be searched; the images stay the same
FIXED = ("train.processes",)  # but this, which a trial has its own of
DIGITS = 4  # significant ones of a number that is searched: enough to tell two apart, few enough to read


class Range(Section):
    """From where to where a number is searched, evenly or evenly in its logarithm."""

    low: float
    high: float
    log: bool = False


class SpaceFile(Section):
    """What the file holds: the recipe to start from, and for each param a range or a list of choices."""

    recipe: str = SPECIFICATION
    params: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """The params to start from, and those to search by the names that DVC gives them.

    A choice is searched as the JSON that it is: it may be a list, and 1 is not true.
    """

    name: str
    recipe: str
    base: Params
    distributions: Mapping[str, BaseDistribution]

    @property
    def size(self) -> float:
        """The number of points, infinite where a number is searched that is no integer."""
        return math.prod(map(count, self.distributions.values()))

    @property
    def description(self) -> dict[str, str]:
        """What is searched, as text."""
        return {key: distribution_to_json(distribution) for key, distribution in self.distributions.items()}

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the params at a point that Optuna has drawn."""
        return {key: value_of(self.distributions[key], drawn[key]) for key in self.distributions}

    def at(self, values: Mapping[str, Any]) -> Params:
        """Return the params with some values.

        Raises:
            ValidationError: a value is none that its param takes.
        """
        sections = self.base.model_dump()
        for key, value in values.items():
            *parents, name = key.split(".")
            section = sections
            for parent in parents:
                section = section[parent]
            section[name] = value
        return Params.model_validate(sections)

    def trial_at(self, values: Mapping[str, Any]) -> Params:
        """Return the params of a trial: one core, and images held out to be scored on."""
        params = self.at(values)
        size = params.data.validation_size or VALIDATION_SIZE
        return alone(params.model_copy(update={"data": params.data.model_copy(update={"validation_size": size})}))


def load_space(path: Path) -> Space:
    """Read and check a space, the ends of each range and each choice included.

    Raises:
        UserError: it is no YAML, has a key that does not belong there, or a value that its param does not take.
    """
    if not re.fullmatch(r"\w[\w-]*", path.stem) or path.stem == SPECIFICATION:
        raise UserError(f"{path}: its name becomes a recipe's, which is letters, digits, - and _, not {path.stem!r}")
    if not path.is_file():
        raise UserError(f"{path} is absent: it must name params to search, such as `params: {{train.epochs: [2, 4]}}`")
    file = parse_section(SpaceFile, read_sections(path), f"{path}: ")
    try:
        base = load_params(overlay=overlay_of(file.recipe))
    except UserError as error:
        raise UserError(f"{path}: recipe: {error}") from None
    if not file.params:
        raise UserError(f"{path}: params must name what to search, such as train.learning_rate, and is empty")
    flat = flatten({section: getattr(base, section) for section in SECTIONS})
    known = {key: value for key, value in flat.items() if key not in FIXED}
    for key in file.params:
        if key not in known:
            raise UserError(f"{path}: params.{key} is unknown: choose from {', '.join(known)}")
    distributions = {key: parse_range(entry, known[key], f"{path}: params.{key}") for key, entry in file.params.items()}
    space = Space(path.stem, file.recipe, base, distributions)
    for key, distribution in distributions.items():
        for value in ends(distribution):
            try:
                space.at({key: value})
            except ValidationError as error:
                raise UserError(
                    f"{path}: {'; '.join(explain_error(Params, each) for each in error.errors())}"
                ) from None
    return space


def parse_range(entry: object, current: object, where: str) -> BaseDistribution:
    """Return what an entry of the file stands for, of a param that has some value now.

    Raises:
        UserError: it is neither a list of choices nor, for a number, a range.
    """
    match entry:
        case [_, *_]:
            return CategoricalDistribution(list(dict.fromkeys(map(json.dumps, entry))))
        case dict() if type(current) in (int, float):
            limits = parse_section(Range, entry, f"{where}.")
        case _:
            number = " or a range such as {low: 1, high: 9}" if type(current) in (int, float) else ""
            raise UserError(f"{where} must be a list of choices{number}, and is {describe_value(entry)}")
    if not limits.low < limits.high:
        raise UserError(f"{where}.high must be above low ({limits.low:g}), and is {limits.high:g}")
    if limits.log and limits.low <= 0:
        raise UserError(f"{where}.low must be above 0 with log, and is {limits.low:g}")
    if isinstance(current, float):
        return FloatDistribution(limits.low, limits.high, log=limits.log)
    for name, end in (("low", limits.low), ("high", limits.high)):
        if not end.is_integer():
            raise UserError(f"{where}.{name} must be an integer, as the param is, and is {end:g}")
    return IntDistribution(int(limits.low), int(limits.high), log=limits.log)


def ends(distribution: BaseDistribution) -> list[Any]:
    """Return both ends of a range, or all choices."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return [value_of(distribution, choice) for choice in choices]
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high):
            return [low, high]
    return []


def value_of(distribution: BaseDistribution, drawn: Any) -> Any:
    """Return the value of a param that Optuna has drawn."""
    match distribution:
        case CategoricalDistribution():
            return json.loads(drawn)
        case FloatDistribution(low=low, high=high):
            return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)
    return drawn


def count(distribution: BaseDistribution) -> float:
    """Return how many values a distribution has."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return len(choices)
        case IntDistribution(low=low, high=high):
            return high - low + 1
    return math.inf
