"""`mnist publish`: a model that a clone has before any training, and that anyone can train again."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support import DATA
from support.repository import Repository

from mnist_pipeline.common.files import read_table, sha256
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.model_file import load_model

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

PUBLISHED = "models/best.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, trained: Repository) -> Repository:
    """A repository with a published model, of a recipe with the params of the trained model."""
    repository = trained.copy(tmp_path_factory.mktemp("publish"))
    (repository.root / "experiments/best.yaml").write_text("train:\n  epochs: 2\n")
    repository.commit()
    repository.run("mnist", "study", "best", "--seeds", "1").check_returncode()
    repository.commit()
    said = repository.run("mnist", "publish", "best")
    assert f"{PUBLISHED} is written: seed 0 came out as in reports/studies/best.csv\n" in said.stdout
    return repository


def test_it_is_the_model_that_the_stage_trains_with_these_params(published: Repository) -> None:
    trained, model = published.root / "models/model.safetensors", load_model(published.root / PUBLISHED)
    assert model.origin
    assert model.origin.model_sha256 == sha256(trained)
    assert model.origin.git_commit == published.run("git", "rev-parse", "HEAD").stdout.strip()
    [row] = read_table(published.root / "reports/studies/best.csv")
    assert model.origin.figures["test_accuracy"] == float(row["test_accuracy"])
    weights, expected = model.network.state_dict(), load_model(trained).network.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    said = published.run("mnist", "info", "--model", PUBLISHED).stdout
    assert f"Seed 0 of the recipe best: {float(row['test_accuracy']):.2%} of the test images are right.\n" in said
    assert f"models/model.safetensors then has the SHA-256 {model.origin.model_sha256}.\n" in said


def test_it_reads_digits_in_a_clone_that_never_trained(published: Repository, tmp_path: Path) -> None:
    published.commit()
    published.run("git", "clone", "--quiet", str(published.root), str(tmp_path / "clone")).check_returncode()
    clone = replace(published, root=tmp_path / "clone")
    digits = load_digits(DATA, "test")
    Image.fromarray(digits.pixels[1].numpy()).resize((140, 140)).save(clone.root / "digit.png")
    said = clone.run("mnist", "predict", "digit.png").stdout
    assert said.startswith(f"Read by {PUBLISHED}:\ndigit.png: ")
    assert not (clone.root / "mlflow.db").exists()
    assert (
        "Read by models/model.safetensors:\n" in published.run("mnist", "predict", str(clone.root / "digit.png")).stdout
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "error"),
    [
        ("experiments/best.yaml", "2", "1", "reports/studies/best.csv has no row of seed 0 with the params of now: "),
        ("dvc.yaml", "desc: T", "desc: t", "dvc.yaml is not committed: "),
        (
            "reports/studies/best.csv",
            ",{digest}",
            ",0",
            "seed 0 gives another model than reports/studies/best.csv records",
        ),
    ],
)
def test_what_is_not_the_studys_model_is_not_published(
    published: Repository, tmp_path: Path, file: str, old: str, new: str, error: str
) -> None:
    repository = published.copy(tmp_path)
    path, before = repository.root / file, (repository.root / PUBLISHED).read_bytes()
    [row] = read_table(repository.root / "reports/studies/best.csv")
    text = path.read_text()
    path.write_text(text.replace(old.format(digest=row["model_sha256"]), new))
    assert path.read_text() != text
    ended = repository.run("mnist", "publish", "best")
    assert (ended.returncode, ended.stdout.splitlines()[-1][: len(error) + 7]) == (1, f"error: {error}")
    assert (repository.root / PUBLISHED).read_bytes() == before
