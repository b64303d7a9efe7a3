"""Predict log-probabilities for images, and score them."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import deterministic
from tqdm import tqdm

from mnist_pipeline.common.scores import Score

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt(3)


def set_up_torch(threads: int) -> torch.device:
    """Make torch deterministic with a fixed number of CPU threads; return the GPU if there is one, else the CPU.

    Say so in a line if the kernels are not those of `common.kernels`. Source: PyTorch's notes on reproducibility.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms also imports the compiler: 1 s
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing reads it; filling takes time
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if torch.cuda.is_available():
        _warn("on a GPU", "; to use the processor, set CUDA_VISIBLE_DEVICES to nothing")
        return torch.device("cuda")
    if (found := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        _warn(f"with kernels for {found}", "; they are the committed ones on x86-64 processors with AVX2")
    return torch.device("cpu")


def _warn(where: str, advice: str) -> None:
    print(f"warning: {where} the last bits of the results may differ from the committed ones{advice}", file=sys.stderr)


def _keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next step: to get them anew costs a fifth of a training's time."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has mallopt
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 2**30)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


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
