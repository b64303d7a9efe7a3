"""The section `gate` of the params. No stage reads it: new bounds need no new training."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mnist_pipeline.common.params import Count, Section, parse_section
from mnist_pipeline.common.paths import PARAMS
from mnist_pipeline.common.yaml_file import read_sections

_Share = Annotated[float, Field(ge=0, le=1)]


class GateParams(Section):
    """What a model must be to become the champion."""

    lowest_accuracy: _Share
    largest_parameter_count: Count
    largest_calibration_error: _Share
    margin: _Share
    changed_data: bool


class _GateSection(Section):
    gate: GateParams


def load_bounds(path: Path = PARAMS) -> GateParams:
    """Load and validate the section `gate` of the params.

    Raises:
        UserError: the file is absent or no YAML, or the section has a key or a value that does not belong there.
    """
    section = {name: values for name, values in read_sections(path).items() if name == "gate"}
    return parse_section(_GateSection, section, f"{path}: ").gate
