"""`params.yaml`, parsed once into frozen types that refuse unknown keys and wrong values."""

import re
import textwrap
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticCustomError

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.paths import PARAMS
from mnist_pipeline.common.yaml_file import describe_value, read_sections, shorten

_CLASS_NAME = re.compile(r"\w+([ .-]+\w+|/\w+)*")  # what MLflow allows in the name of a metric
_KEY_LENGTH, _EXPLANATION_LENGTH = 40, 200  # characters in a message

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
_ClassName = Annotated[str, Field(strict=False, coerce_numbers_to_str=True, max_length=50)]


def _check_classes(names: list[str]) -> list[str]:
    if not 2 <= len(set(names)) == len(names) <= 256 or not all(map(_CLASS_NAME.fullmatch, names)):
        rule = "2 to 256 different names of letters and digits, with spaces, -, . or / only between them"
        raise PydanticCustomError("classes", rule)
    return names


class Section(BaseModel):
    """A part of the params: frozen, with strict types, known keys and finite numbers only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


_Section = TypeVar("_Section", bound=Section)


class Normalization(Section):
    """The mean and the standard deviation that normalise pixels (0 to 1): (pixel - mean) / std."""

    mean: Probability
    std: Annotated[float, Field(ge=0.001, le=1)]


class DataParams(Normalization):
    """Which images train the network, how they become its input, and the names of their classes, from label 0 on."""

    classes: Annotated[list[_ClassName], AfterValidator(_check_classes)]
    validation_size: Annotated[int, Field(ge=0)]
    max_class_ratio: Annotated[float, Field(ge=1)]

    @property
    def monitor_name(self) -> str:
        """The name of the images that monitor a training."""
        return "Validation" if self.validation_size else "Test"


class ModelParams(Section):
    """The network, and the number of parameters that it must stay under. `params_type` adds what the network takes."""

    network: str
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
    optimizer: Literal["adam", "adamw", "muon", "sgd"]
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    momentum: Probability
    weight_decay: Annotated[float, Field(ge=0, le=100)]
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Let processes that train together get the params: the type depends on the network."""
        return _restore_params, (self.model_dump(),)


def load_params(path: Path = PARAMS, overlay: Path | None = None) -> Params:
    """Load and validate the params; `overlay` overrides some of them.

    Raises:
        UserError: a file is absent, is not YAML, or has an unknown key or a wrong value.
    """
    sections = read_sections(path)
    params = _parse_params(sections, path)
    return _parse_params(merge(sections, read_sections(overlay)), overlay) if overlay else params


def params_type(sections: Mapping[str, Any]) -> type[Params]:
    """Return the type of params with this network: its class says what the section `model` holds.

    Only here `common` looks into another folder, so that a network is no more than a class and a word in the params.

    Raises:
        UserError: there is no such network, or its file is wrong.
    """
    model = sections.get("model")
    if not isinstance(model, Mapping) or not isinstance(name := model.get("network"), str):
        return Params  # which says what is wrong
    section = import_module("mnist_pipeline.model.network").network_params(name)
    return create_model("Params", __base__=Params, model=section)


def _restore_params(sections: Mapping[str, Any]) -> Params:
    return params_type(sections).model_validate(sections)


def _parse_params(sections: Mapping[str, Any], path: Path) -> Params:
    return parse_section(
        params_type(sections), {key: value for key, value in sections.items() if key != "gate"}, f"{path}: "
    )


def parse_section(section: type[_Section], content: Mapping[str, Any], where: str) -> _Section:
    """Validate the content of a section; `where` begins the message of an error.

    Raises:
        UserError: a key is unknown or a value is wrong.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise UserError(where + explain_errors(section, error)) from None


def merge(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested values; `others` override `values`."""
    both = {key: (values[key], other) for key, other in others.items() if key in values}
    nested = {
        key: merge(value, other)
        for key, (value, other) in both.items()
        if isinstance(value, Mapping) and isinstance(other, Mapping)
    }
    return {**values, **others, **nested}


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


def explain_errors(section: type[Section], error: ValidationError) -> str:
    """Say in a line which keys of a section are wrong, and what would be right; leave out the last of many."""
    errors = sorted(error.errors(include_url=False), key=lambda each: each["type"] == "missing")  # those come last
    phrases = "; ".join(_explain(section, each) for each in errors[:_EXPLANATION_LENGTH])
    return textwrap.shorten(phrases, _EXPLANATION_LENGTH, placeholder=" …")


def _explain(section: type[Section], error: ErrorDetails) -> str:
    key = ".".join(shorten(repr(str(part))[1:-1], _KEY_LENGTH) for part in error["loc"])
    found = describe_value(error["input"])
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden" | "invalid_key":
            return f"{key} is unknown: choose from {', '.join(_known_keys(section, error['loc'][:-1]))}"
        case "model_type":
            return f"{key} must be a section with keys of its own, and is {found}"
        case "bool_type":
            return f"{key} must be true or false, and is {found}"
        case "too_short" | "too_long":
            context = error["ctx"]
            wanted = context.get("min_length", context.get("max_length"))
            return f"{key} must be a list of {wanted}, and has {context['actual_length']}"
    return f"{key} must be {error['msg'].removeprefix('Input should be ')}, and is {found}"


def _known_keys(section: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    others = ["gate"] if issubclass(section, Params) and not location else []
    for key in location:
        section = cast("type[BaseModel]", section.model_fields[str(key)].annotation)
    return [*section.model_fields, *others]
