"""Networks of a user's own: a file among the networks of the pipeline, for as long as a test runs."""

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from mnist_pipeline.model import network, networks

HEAD = """\
import torch
from torch import nn
from torch.nn import functional as F
"""


@contextmanager
def network_file(directory: Path, body: str, name: str = "mine") -> Iterator[Path]:
    """Put a network's code, below the usual imports, into a file that `model.network` can name."""
    path = directory / f"{name}.py"
    path.write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
    network.network_params.cache_clear()
    with mock.patch.object(networks, "__path__", [str(directory), *networks.__path__]):
        yield path
    sys.modules.pop(f"{networks.__name__}.{name}", None)
    network.network_params.cache_clear()
