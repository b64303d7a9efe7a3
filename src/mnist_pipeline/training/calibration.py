"""Give a network that learned smoothed labels back its confidence."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.model.inference import predict

_LOWEST, _HIGHEST, _HALVINGS = 0.1, 10.0, 40  # the factors tried, and how closely the best is found
_TOLERANCE = 1e-3  # nats


def calibrate(network: nn.Module, digits: tuple[Tensor, Tensor], batch_size: int) -> None:
    """Multiply the network's last layer by the factor that gives images (N, 1, 28, 28) and labels (N,) the lowest loss.

    No prediction changes, only its probability. The factor is one over the temperature of Guo et al., arXiv:1706.04599.

    Raises:
        UserError: more than a log-softmax follows the last layer, so the factor cannot be put into its weights.
    """
    images, labels = digits
    found = predict(network, images, batch_size)
    factor = _best_factor(found, labels)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for parameter in layers[-1].parameters() if layers else ():
            parameter.mul_(factor)
    expected = F.log_softmax(factor * found[:batch_size], dim=1)
    if not torch.allclose(predict(network, images[:batch_size], batch_size), expected, atol=_TOLERANCE, rtol=0.01):
        raise UserError(
            "train.label_smoothing needs a network whose last convolution or linear layer gives what log_softmax takes"
        )


def _best_factor(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the factor on log-probabilities (N, classes) that gives the labels (N,) the lowest cross-entropy.

    The loss is convex in the factor: its slope, the mean score minus the label's, is 0 at the best.
    """
    scores = log_probabilities.double()
    wanted = scores.gather(1, labels.unsqueeze(1)).mean()
    low, high = _LOWEST, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = ((middle * scores).softmax(dim=1) * scores).sum(dim=1).mean() - wanted
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low + high) / 2
