"""The network that the params describe: the class Net in the file in `networks/` that `model.network` names."""

import inspect
import pkgutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import create_model
from torch import nn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import ModelParams
from mnist_pipeline.common.yaml_file import describe_value
from mnist_pipeline.data.digits import DIGITS
from mnist_pipeline.model import networks

_REASON_LENGTH = 300  # characters of an error that are shown


@contextmanager
def network_errors(name: str) -> Iterator[None]:
    """Turn any error inside the block into a UserError that names the network's file and, if it is there, the line."""
    try:
        yield
    except (UserError, OSError):  # a full disk is not the network's fault
        raise
    except Exception as error:
        file = str(Path(networks.__path__[0], f"{name}.py"))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        place = f"networks/{name}.py" + (f", line {lines[-1]}" if lines else "")
        reason = " ".join(str(error).split())[:_REASON_LENGTH]
        raise UserError(f"{place}: {type(error).__name__}: {reason}") from None


def _find_class(name: str) -> Any:
    known = sorted(module.name for module in pkgutil.iter_modules(networks.__path__))
    if name not in known:
        raise UserError(f"model.network must be {' or '.join(known)}, and is {describe_value(name)}")
    with network_errors(name):
        return import_module(f"{networks.__name__}.{name}").Net


@cache
def network_params(name: str) -> type[ModelParams]:
    """Return the type of the section `model` for a network: with what its class takes besides the number of classes.

    Raises:
        UserError: there is no such network, or its file is wrong.
    """
    with network_errors(name):
        taken = list(inspect.signature(_find_class(name), eval_str=True).parameters.values())[1:]
        fields: Any = {
            each.name: (each.annotation, ... if each.default is each.empty else each.default) for each in taken
        }
        return create_model("ModelParams", __base__=ModelParams, **fields)


def make_network(params: ModelParams, classes: int) -> nn.Module:
    """Return the network with weights drawn from torch's global generator.

    Raises:
        UserError: its class refuses the params.
    """
    with network_errors(params.network):
        network: nn.Module = _find_class(params.network)(
            classes, **params.model_dump(exclude={*ModelParams.model_fields})
        )
        return network


def build_model(params: ModelParams, seed: int, classes: int = len(DIGITS)) -> nn.Module:
    """Return the network with PyTorch's default initialisation drawn from `seed`.

    Raises:
        UserError: it has `params.parameter_budget` parameters or more, or its class refuses the params.
    """
    with torch.device("meta"):  # without memory: a large network would fill it, or take minutes to initialise
        parameters = count_parameters(make_network(params, classes))
    if parameters >= params.parameter_budget:
        raise UserError(
            f"the network has {parameters:,} parameters, which is not under model.parameter_budget "
            f"({params.parameter_budget:,}): raise the budget or choose a smaller network"
        )
    torch.manual_seed(seed)
    return make_network(params, classes)


def count_parameters(model: nn.Module) -> int:
    """Count the learned parameters, without the running statistics of batch normalisation."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
