"""The command `mnist`: what people and make do beside the pipeline. Slow imports stand where they are used."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from mnist_pipeline.common import errors
from mnist_pipeline.common.paths import MODEL, RAW

_PATH = click.Path(path_type=Path)
_model_option = click.option("--model", type=_PATH, default=MODEL, help="The model file.")
_ray_option = click.option("--ray", metavar="HOST:PORT", help="Train in the Ray cluster with this head, not here.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mnist-pipeline")
def mnist() -> None:
    """Use, check and measure the digit classifier that `make repro` trains. Run it in the repository's root.

    The exit code is 1 after a mistake, which is explained in one line, and 2 after a wrong option.
    """


@mnist.command()
def backfill() -> None:
    """Give MLflow the run of outputs that it has missed."""
    from mnist_pipeline.tracking.backfill import backfill_run

    backfill_run()


@mnist.command()
def reproduce() -> None:
    """Train the committed commit again and compare byte for byte.

    It runs in a temporary clone, without any cache. The exit code is 0 if all outputs are identical.
    """
    from mnist_pipeline.reproduce import reproduce_commit

    reproduce_commit()


@mnist.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-S",
    "--set-param",
    "params",
    metavar="KEY=VALUE",
    multiple=True,
    envvar="MNIST_PARAMS",
    show_envvar=True,
    help="Change a param. The variable may hold several, separated by spaces.",
)
def experiment(recipe: str, arguments: tuple[str, ...], params: tuple[str, ...]) -> None:
    """Run a recipe as a DVC experiment.

    RECIPE is one of experiments/, or `specification` for params.yaml as it is. Further arguments go to `dvc exp run`,
    such as --queue, --temp or --force.
    """
    from mnist_pipeline.experiments.recipes import run_experiment

    sys.exit(run_experiment(recipe, [*(f"--set-param={param}" for param in params), *arguments]))


@mnist.command()
@click.argument("recipe")
@click.option("--seeds", default=10, type=click.IntRange(1), help="How many: 0, 1, 2, …")
@click.option("--validation", is_flag=True, help="Score on 5,000 held-out training images, not on the test images.")
@_ray_option
def study(recipe: str, seeds: int, validation: bool, ray: str | None) -> None:
    """Train a recipe from several seeds: reports/studies/RECIPE.csv.

    RECIPE is one of experiments/, or `specification` for params.yaml as it is. A study that was killed goes on.
    """
    from mnist_pipeline.experiments.study import run_study

    run_study(recipe, seeds, validation, ray)


@mnist.command()
@click.argument("space", type=_PATH)
@click.option("--trials", required=True, type=click.IntRange(1), help="How many in all, earlier calls included.")
@_ray_option
def sweep(space: Path, trials: int, ray: str | None) -> None:
    """Search a space of params for the best recipe.

    SPACE, a file NAME.yaml, names a recipe to start from, and ranges or lists of choices for params. The best recipe
    is written to experiments/NAME.yaml. Trials are scored on held-out training images; hopeless ones stop early. A
    sweep that was killed goes on.
    """
    from mnist_pipeline.experiments.sweep import run_sweep

    run_sweep(space, trials, ray)


@mnist.command()
@click.option("--base", metavar="REV", required=True, help="The commit to compare with; all zeros: none.")
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `dvc repro` printed: it tells which stages ran. Otherwise dvc.lock tells what differs from the base.",
)
@click.option("--artifacts", metavar="URL", help="Where CI keeps this run's outputs and pictures.")
def ci_report(base: str, out: Path, log: Path | None, artifacts: str | None) -> None:
    """Compare the run in the workspace with a commit, in Markdown.

    The text is meant for a comment on a pull request. Pictures go into a directory beside FILE. Its name is FILE's
    without the ending, and -pictures.
    """
    from mnist_pipeline.promotion.ci_report.comment import write_ci_report

    write_ci_report(base, out, log, artifacts)


@mnist.command()
@click.option("--host", default="127.0.0.1", help="Where to listen.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any free one.")
@click.option("--model", type=_PATH, help=f"The model file. Default: models:/mnist@champion or, if none, {MODEL}.")
def serve(host: str, port: int, model: Path | None) -> None:
    """Serve a page to draw a digit on, and its API."""
    from mnist_pipeline.serving.service import run_service

    run_service(host, port, model)


@mnist.command()
@_json_option
def gate(as_json: bool) -> None:
    """Judge the model here by the gate of params.yaml.

    Each rule is listed with its bound, what was found, and the verdict. The exit code is 1 if the model fails.
    """
    from mnist_pipeline.promotion.gate import judge, render_verdicts

    verdicts = judge()
    passed = all(verdict.passed for verdict in verdicts)
    rules = {"passed": passed, "rules": [asdict(verdict) for verdict in verdicts]}
    print(_to_json(rules) if as_json else render_verdicts(verdicts))
    sys.exit(not passed)


@mnist.command()
@click.option("--reason", default="", help="Why, for the record.", show_default=False)
@click.option("--rollback", is_flag=True, help="Undo the last promotion: the previous champion is the champion again.")
def promote(reason: str, rollback: bool) -> None:
    """Make the model here the champion, if it passes the gate.

    It becomes a version of MLflow's registered model and the challenger. If it passes, it becomes mnist@champion, and
    the former champion the previous one; if not, the exit code is 1. The tags of each version keep its history.
    """
    from mnist_pipeline.promotion.promote import promote_model, roll_back

    if rollback:
        roll_back(reason)
    else:
        promote_model(reason)


@mnist.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="The addition's name. Default: the directory's.")
@click.option("--normalize", is_flag=True, help="Bring other pictures to MNIST's form, as `mnist predict` does.")
def add(source: Path, name: str | None, normalize: bool) -> None:
    """Check labelled digits and add them to the training images.

    They are written to data/added/NAME, and DVC tracks them. SOURCE is a directory. It holds directories 0 to 9 with
    pictures, white on black, 28×28 pixels; or IDX files with the names of MNIST's training images. A copy of an image
    of MNIST, above all of a test image, is refused.
    """
    from mnist_pipeline.serving.additions import add_digits

    add_digits(source, name or source.resolve().name, normalize)


@mnist.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_model_option
@_json_option
def predict(files: tuple[str, ...], model: Path, as_json: bool) -> None:
    """Read the digit in each picture; - is standard input.

    A picture is a drawing, a scan or a photo of one digit in any colours and size, dark on light or light on dark. If
    one cannot be read, it gets a line on standard error, the others are read all the same, and the exit code is 1.
    """
    from mnist_pipeline.serving.classifier import Classifier, classify_files

    answers = []
    for name, prediction in classify_files(files, Classifier(model)):
        answers.append({"file": name, **asdict(prediction)})
        if not as_json:
            print(f"{name}: {prediction.digit} ({prediction.probability:.1%})", flush=True)
    if as_json:
        print(_to_json(answers))
    sys.exit(len(answers) < len(files))


@mnist.command()
@_model_option
@_json_option
def info(model: Path, as_json: bool) -> None:
    """Show the network layer by layer, and the file that holds it.

    While the pipeline's model file is absent, it is the network that params.yaml describes.
    """
    from mnist_pipeline.serving.model_info import read_model_info, render_model_info

    found = read_model_info(model)
    print(_to_json(asdict(found)) if as_json else render_model_info(found))


@mnist.group()
def export() -> None:
    """Write the trained network in another format."""


@export.command()
@click.argument("path", type=_PATH)
@_model_option
@_json_option
def onnx(path: Path, model: Path, as_json: bool) -> None:
    """Write the trained network as ONNX, if it agrees with PyTorch.

    The input is `images` (N, 1, 28, 28) as float32: pixels scaled to 0..1, minus `mean`, divided by `std`; both are in
    the file's metadata. The output is `log_probabilities` (N, 10). First, ONNX Runtime has to read all test digits of
    data/raw as PyTorch does, in batches of several sizes.
    """
    from mnist_pipeline.data.digits import load_digits
    from mnist_pipeline.serving.onnx import export_onnx

    agreement = export_onnx(model, path, load_digits(RAW, "test"))
    print(_to_json({"path": str(path), **asdict(agreement)}) if as_json else f"{path} is written: {agreement}")


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2)


def main() -> None:
    """Run the command; `errors.run` tells how a mistake or an interruption ends it, click how a wrong option does."""
    errors.run(_run_click)


def _run_click() -> None:
    """Run the command as click itself would, except that Ctrl-C is not a mistake but an interruption."""
    try:
        mnist(standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
