"""Read YAML as DVC does, and say in a line what is wrong with it."""

import math
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from mnist_pipeline.common.errors import UserError

_MAX_BYTES = 50_000  # of a file of params; more would take seconds to parse
_MAX_DEPTH = 50  # of sections and lists in one another
_VALUE_LENGTH, _PROBLEM_LENGTH = 50, 100  # characters in a message


class _Composer(Composer):
    """Refuses anchors and aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if event.anchor is not None:
            problem = "an anchor or alias, & or *, is not allowed in params"
            raise ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Constructor(SafeConstructor):
    """Names the line of a value that cannot be constructed: ruamel.yaml lets Python's own errors through there."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # an error if Python refuses to write so many digits
            return value
        except YAMLError:
            raise
        except Exception:
            kind = str(node.tag).rpartition(":")[2]
            problem = f"{shorten(repr(node.value), _VALUE_LENGTH)} is not of the type {kind}"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark) from None


def load_yaml(text: str, name: object, anchors: bool = True) -> Any:
    """Parse YAML as DVC does (YAML 1.2, by ruamel.yaml). `name` begins the message of an error.

    Raises:
        UserError: the text is not YAML, or it has an anchor or alias although `anchors` forbids it.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.max_depth = _Constructor, _MAX_DEPTH
    if not anchors:
        yaml.Composer = _Composer
    try:
        constructor, _ = yaml.get_constructor_parser(text)
        return constructor.get_single_data()
    except Exception as error:  # ruamel.yaml lets Python's own through for some escapes and directives
        place = getattr(error, "problem_mark", None) or yaml.reader
        line = text.count("\n", 0, getattr(error, "position", place.index)) + 1
        message = str(error).partition("\n")[0] if isinstance(error, YAMLError) else "not YAML 1.2"
        problem = getattr(error, "problem", None) or message
        raise UserError(
            f"{name}, line {line} cannot be read ({shorten(problem, _PROBLEM_LENGTH)}): "
            "write each key once, as `key: value`, indented with spaces"
        ) from None


def read_sections(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested sections.

    Raises:
        UserError: it is absent, is not YAML, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} must be a file, and is a directory or device")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path} must be at most {_MAX_BYTES:,} bytes long, and has {size:,}")
        content = load_yaml(path.read_text(encoding="utf-8"), path, anchors=False)
    except FileNotFoundError:
        raise UserError(f"{path} is absent: restore it with `git checkout {path}`") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `train:`, and holds {describe_value(content)}")
    return content


def describe_value(value: object) -> str:
    """Describe a value in a few words, as YAML writes it; if a text looks like a number, say how to write that."""
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
            text = f"the text {shorten(repr(value), _VALUE_LENGTH)}"
            try:
                number = float(value)
            except ValueError:
                return text
            return f"{text} (write {number:.15g})" if math.isfinite(number) else text
    return shorten(repr(value), _VALUE_LENGTH)


def shorten(text: str, length: int) -> str:
    """Return a text, or its beginning and an ellipsis if it is longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
