"""`params.yaml`, parsed once into frozen types that refuse unknown keys and wrong values."""

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.paths import PARAMS

Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as DVC does (YAML 1.2); PyYAML alone reads it as text (YAML 1.1)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> object:
    """Parse YAML."""
    return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)


class Section(BaseModel):
    """A part of the params: frozen, with strict types, known keys and finite numbers only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


_Section = TypeVar("_Section", bound=Section)


class Normalization(Section):
    """The mean and the standard deviation that normalise pixels (0 to 1): (pixel - mean) / std."""

    mean: Probability
    std: Positive


class DataParams(Normalization):
    """Which images train the network, and how they become its input."""

    validation_size: Annotated[int, Field(ge=0)]
    max_class_ratio: Annotated[float, Field(ge=1)]

    @property
    def monitor_name(self) -> str:
        """The name of the images that monitor a training."""
        return "Validation" if self.validation_size else "Test"


class ModelParams(Section):
    """The network, and the number of parameters that it must stay under."""

    channels: Annotated[list[Count], Field(min_length=6, max_length=6)]
    bias: bool
    activation: Literal["relu", "silu"]
    pooling: Literal[2, 3]
    dropout: Probability
    dropout_kind: Literal["element", "channel"]
    parameter_budget: Count


class SchedulerParams(Section):
    """How the learning rate changes: it falls in steps, or it rises to its value and falls to 0 in one cycle."""

    kind: Literal["step", "one_cycle"]
    step_size: Count
    gamma: Annotated[float, Field(gt=0, le=1)]
    warm_up: Probability


class AugmentationParams(Section):
    """How far augmentation moves a training image at most, in either direction."""

    rotation: Annotated[float, Field(ge=0, le=180)]
    shift: Annotated[float, Field(ge=0, le=28)]
    scale: Probability
    shear: Probability
    clean_epochs: Annotated[int, Field(ge=0)]


class TrainParams(Section):
    """How the network is trained."""

    processes: Annotated[int, Field(ge=1, le=1024)]
    epochs: Count
    batch_size: Count
    precision: Literal["float32", "bfloat16"]
    optimizer: Literal["adam", "adamw", "muon", "sgd"]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    label_smoothing: Probability
    averaging: Probability
    scheduler: SchedulerParams
    augmentation: AugmentationParams


class EvaluateParams(Section):
    """How the network is tested."""

    batch_size: Count


class ReportParams(Section):
    """What the report shows."""

    gallery_size: Count


class Params(Section):
    """The params of the pipeline's stages: all of `params.yaml` except `gate`, which promotion reads."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    threads: Annotated[int, Field(ge=1, le=256)]
    data: DataParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    report: ReportParams


def load_params(path: Path = PARAMS, overlay: Path | None = None) -> Params:
    """Load and validate the params; `overlay` overrides some of them.

    Raises:
        UserError: a file is absent, is not YAML, or has an unknown key or a wrong value.
    """
    sections = read_sections(path)
    if overlay:
        sections = merge(sections, read_sections(overlay))
    sections.pop("gate", None)
    return parse_section(Params, sections, f"{overlay or path}: ")


def parse_section(section: type[_Section], content: Mapping[str, Any], where: str) -> _Section:
    """Validate the content of a section; `where` begins the message of an error.

    Raises:
        UserError: a key is unknown or a value is wrong.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise UserError(where + "; ".join(explain_error(section, each) for each in error.errors())) from None


def merge(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested values; `others` override `values`."""
    both = {key: (values[key], other) for key, other in others.items() if key in values}
    nested = {
        key: merge(value, other)
        for key, (value, other) in both.items()
        if isinstance(value, Mapping) and isinstance(other, Mapping)
    }
    return {**values, **others, **nested}


def read_sections(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested sections.

    Raises:
        UserError: it is absent, is not YAML, or holds something else.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is absent: restore it with `git checkout {path}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets Python's own errors through where it cannot convert a scalar.
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `train:`, and holds {describe_value(content)}")
    return content


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name nested values by their path, as DVC does: `{"train": {"epochs": 14}}` becomes `{"train.epochs": 14}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = value.model_dump() if isinstance(value, BaseModel) else value
        if isinstance(nested, Mapping):
            flat |= {f"{name}.{key}": leaf for key, leaf in flatten(nested).items()}
        else:
            flat[name] = nested
    return flat


def explain_error(section: type[Section], error: ErrorDetails) -> str:
    """Say in a phrase which key of a section is wrong, and what would be right."""
    key = ".".join(repr(str(part))[1:-1] for part in error["loc"])
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden" | "invalid_key":
            return f"{key} is unknown: choose from {', '.join(_known_keys(section, error['loc'][:-1]))}"
        case "model_type":
            return f"{key} must be a section with keys of its own, and is {describe_value(error['input'])}"
    rule = error["msg"].removeprefix("Input should be ")
    return f"{key} must be {rule}, and is {describe_value(error['input'])}"


def _known_keys(section: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    others = ["gate"] if section is Params and not location else []
    for key in location:
        section = cast("type[BaseModel]", section.model_fields[str(key)].annotation)
    return [*section.model_fields, *others]


def describe_value(value: object) -> str:
    """Describe a value as YAML writes it; if a text looks like a number, say how to write the number."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case dict():
            return "a section"
        case list():
            return "a list"
        case str():
            try:
                number = Decimal(f"{float(value):.15g}")
            except ValueError:
                return f"the text {value!r}"
            return f"the text {value!r}" + (f" (write {number:f})" if number.is_finite() else "")
    return repr(value)
