"""The network, 19,210 parameters in three blocks unless the params say otherwise, and the file that carries it."""

import json
from collections import OrderedDict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.data import CLASSES
from mnist_pipeline.errors import UserError
from mnist_pipeline.files import write_bytes
from mnist_pipeline.params import DataParams, ModelParams

# Element-wise dropout zeroes single activations; channel-wise, whole feature maps (Tompson et al., arXiv:1411.4280).
DROPOUT = {"element": nn.Dropout, "channel": nn.Dropout2d}

# SiLU (Hendrycks and Gimpel, arXiv:1606.08415) is x·sigmoid(x).
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}

DESCRIPTION = "model"  # the key of the file's metadata


class Net(nn.Module):
    """Map normalised images (N, 1, 28, 28) to log-probabilities (N, 10)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, c6 = params.channels
        bias, activation = params.bias, ACTIVATIONS[params.activation]

        def pool() -> nn.Module:
            return nn.MaxPool2d(params.pooling, stride=2, padding=(params.pooling - 1) // 2)

        def dropout() -> nn.Module:
            return DROPOUT[params.dropout_kind](params.dropout)

        self.block1 = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, c1, 3, padding=1, bias=bias),
                bn1=nn.BatchNorm2d(c1),
                activation1=activation(),
                conv2=nn.Conv2d(c1, c2, 3, padding=1, bias=bias),
                bn2=nn.BatchNorm2d(c2),
                activation2=activation(),
                pool1=pool(),
                dropout1=dropout(),
            )
        )
        self.block2 = nn.Sequential(
            OrderedDict(
                conv3=nn.Conv2d(c2, c3, 3, padding=1, bias=bias),
                bn3=nn.BatchNorm2d(c3),
                activation3=activation(),
                conv4=nn.Conv2d(c3, c4, 3, padding=1, bias=bias),
                bn4=nn.BatchNorm2d(c4),
                activation4=activation(),
                pool2=pool(),
                dropout2=dropout(),
            )
        )
        self.block3 = nn.Sequential(
            OrderedDict(
                conv5=nn.Conv2d(c4, c5, 3, bias=bias),
                bn5=nn.BatchNorm2d(c5),
                activation5=activation(),
                conv6=nn.Conv2d(c5, c6, 3, bias=bias),
                bn6=nn.BatchNorm2d(c6),
                activation6=activation(),
                conv7=nn.Conv2d(c6, CLASSES, 3),
                gap=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-probabilities (N, 10) of images (N, 1, 28, 28)."""
        return F.log_softmax(self.block3(self.block2(self.block1(images))), dim=1)


def build_model(params: ModelParams, seed: int) -> Net:
    """Return the network with PyTorch's default initialisation drawn from `seed`.

    Raises:
        UserError: it has `params.parameter_budget` parameters or more.
    """
    torch.manual_seed(seed)
    model = Net(params)
    parameters = count_parameters(model)
    if parameters >= params.parameter_budget:
        raise UserError(
            f"the network has {parameters:,} parameters, which is not under model.parameter_budget "
            f"({params.parameter_budget:,}): raise the budget or choose a smaller network"
        )
    return model


def count_parameters(model: nn.Module) -> int:
    """Count the learned parameters; batch normalisation's running statistics are not learned."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_model(model: nn.Module, path: Path, params: ModelParams, data: DataParams) -> None:
    """Write weights as safetensors; the metadata holds all that is needed to build and feed the network again."""
    description = {
        "architecture": params.model_dump(),
        "normalization": {"mean": data.mean, "std": data.std},
        "parameters": count_parameters(model),
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    # All under one key: safetensors writes several in an order that differs from call to call.
    write_bytes(path, safetensors.torch.save(weights, {DESCRIPTION: json.dumps(description)}))


def load_model(path: Path) -> Net:
    """Build the network that a file of `save_model` describes, and load its weights.

    Raises:
        UserError: the file is absent, damaged, or of another network.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()[DESCRIPTION])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        model = Net(ModelParams.model_validate(description["architecture"]))
        model.load_state_dict(weights)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): `dvc repro` makes it") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a model of this pipeline ({' '.join(str(error).split())})") from None
    return model.eval()
