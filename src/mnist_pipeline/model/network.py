"""The network: three blocks of convolutions, with 19,210 parameters unless the params say otherwise."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import ModelParams
from mnist_pipeline.data.digits import CLASSES

# Element-wise dropout zeroes single activations; channel-wise, whole feature maps (Tompson et al., arXiv:1411.4280).
_DROPOUT = {"element": nn.Dropout, "channel": nn.Dropout2d}

# SiLU (Hendrycks and Gimpel, arXiv:1606.08415) is x·sigmoid(x).
_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Net(nn.Module):
    """Map normalised images (N, 1, 28, 28) to log-probabilities (N, 10)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, c6 = params.channels
        bias, activation = params.bias, _ACTIVATIONS[params.activation]

        def pool() -> nn.Module:
            return nn.MaxPool2d(params.pooling, stride=2, padding=(params.pooling - 1) // 2)

        def dropout() -> nn.Module:
            return _DROPOUT[params.dropout_kind](params.dropout)

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
    """Count the learned parameters, without the running statistics of batch normalisation."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
