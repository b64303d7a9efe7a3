"""The same bytes on every x86-64 processor with AVX2: on this one, and on others that are emulated."""

import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from support import ROOT
from support.repository import Repository
from support.same_bits import DIGESTS, digest_results

from mnist_pipeline.common.params import load_params

OUTPUTS = [
    "models/model.safetensors",
    *(
        f"reports/{name}"
        for name in ("history.csv", "metrics.json", "predictions.csv", "calibration.csv", "robustness.csv")
    ),
]


@pytest.fixture
def as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_many_threads_as_before")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="no x86-64 processor with AVX2")
def test_this_processor_gives_the_committed_bits() -> None:
    """After a change that is meant to change the results: `cd tests && python -m support.same_bits`."""
    assert digest_results() == json.loads(DIGESTS.read_text(encoding="utf-8"))


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="qemu-x86_64 is absent: `make portable` installs it")
@pytest.mark.parametrize(("processor", "recipe"), [("Haswell", "best"), ("EPYC-Rome", "fast")])
def test_an_emulated_processor_gives_the_same_bytes(tmp_path: Path, processor: str, recipe: str) -> None:
    """Intel's first processor with AVX2 and an early one of AMD's run the stages train and evaluate."""
    params = load_params(ROOT / "params.yaml", ROOT / f"experiments/{recipe}.yaml")
    short = params.model_copy(update={"train": params.train.model_copy(update={"epochs": 1, "batch_size": 32})})
    python = Path(sys.executable).resolve()  # not the environment's link, which the emulator cannot follow
    found = []
    for emulator in ([], ["qemu-x86_64", "-cpu", processor]):
        repository = Repository.create_with_data(tmp_path / ("emulated" if emulator else "native"))
        (repository.root / "params.yaml").write_text(yaml.safe_dump(short.model_dump()), encoding="utf-8")
        for stage in ("train", "evaluate"):
            ended = repository.run(
                *emulator, str(python), f"stages/{stage}.py", PYTHONPATH=sysconfig.get_path("purelib")
            )
            assert ended.returncode == 0, ended.stdout
        found.append([(repository.root / path).read_bytes() for path in OUTPUTS])
    assert found[0] == found[1]
