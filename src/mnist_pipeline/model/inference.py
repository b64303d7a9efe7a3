"""Predict log-probabilities for images, and score them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mnist_pipeline.common.scores import Score


def set_up_torch(threads: int) -> torch.device:
    """Make torch deterministic with a fixed number of CPU threads; return the GPU if there is one, else the CPU.

    Source: PyTorch's notes on reproducibility.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block, dropout is off, batch normalisation uses its running statistics, and no gradient is kept."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the network's log-probabilities (N, 10) for images (N, 1, 28, 28), on their device."""
    batches = tqdm(images.split(batch_size), desc="Predicting", unit="batch", delay=2, leave=False, disable=None)
    with evaluation_mode(model):
        return torch.cat([model(batch) for batch in batches])


def score(log_probabilities: Tensor, labels: Tensor) -> Score:
    """Score log-probabilities (N, 10) against labels (N,)."""
    loss = F.nll_loss(log_probabilities.double(), labels).item()
    correct = int((log_probabilities.argmax(dim=1) == labels).sum())
    return Score(loss, correct, len(labels))
