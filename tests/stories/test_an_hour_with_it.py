"""Who follows docs/an-hour-with-it.md sees what the page says, and ends where they began."""

import re
import sys

import pytest
import yaml
from PIL import Image
from support import DATA, ROOT
from support.repository import Repository

from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.data.digits import load_digits

PAGE = (ROOT / "docs/an-hour-with-it.md").read_text(encoding="utf-8")
STEPS = re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)  # commands and what they print
# A training on few digits ends before any pause does: this `timeout` waits for an epoch instead.
TIMEOUT = """#!{python}
import glob, os, signal, subprocess, sys, time
child = subprocess.Popen(sys.argv[4:], start_new_session=True)
while child.poll() is None and not glob.glob(".checkpoints/*"):
    time.sleep(0.05)
os.killpg(child.pid, signal.SIGINT)
sys.exit(child.wait())
"""

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]


@pytest.fixture(scope="module")
def repository(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose gate lets a network pass that has seen few digits, and three digits that someone drew."""
    repository = trained.copy(tmp_path_factory.mktemp("hour") / "repository")
    repository.run("git", "branch", "--move", "main").check_returncode()
    path = repository.root / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["gate"] |= {"lowest_accuracy": 0.05, "largest_calibration_error": 1.0, "margin": 1.0}
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    repository.commit()
    drawn = load_digits(DATA, "train")[:3]
    for place, (pixels, label) in enumerate(zip(drawn.pixels.rot90(2, dims=(1, 2)), drawn.labels, strict=True)):
        picture = repository.root / f"kept/{label}/{place}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(picture)
    scripts = repository.root / ".venv/bin"  # git ignores it
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n', encoding="utf-8")
    (scripts / "timeout").write_text(TIMEOUT.format(python=sys.executable), encoding="utf-8")
    (scripts / "timeout").chmod(0o755)
    return repository


@pytest.mark.parametrize(("commands", "shown"), STEPS, ids=[commands.splitlines()[0] for commands, _ in STEPS])
def test_a_step_prints_what_the_page_shows(repository: Repository, commands: str, shown: str) -> None:
    printed = " ".join(repository.run("bash", "-c", f"source .venv/bin/activate\n{commands}").stdout.split())
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    expected = ".*".join(re.escape(line).replace("…", ".*") for line in lines)
    assert re.search(expected, printed), printed


def test_the_way_back_leads_to_where_one_began(repository: Repository, trained: Repository) -> None:
    assert repository.run("git", "status", "--short").stdout == ""
    assert sha256(repository.root / MODEL) == sha256(trained.root / MODEL)
