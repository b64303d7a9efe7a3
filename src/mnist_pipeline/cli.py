"""The command `mnist`. Each command imports what it needs itself, because some imports are slow."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from mnist_pipeline.common import errors
from mnist_pipeline.common.paths import BEST, MODEL, RAW

_PATH = click.Path(path_type=Path)
_model_option = click.option("--model", type=_PATH, default=MODEL, help="The model file.")
_answering_model_option = click.option(
    "--model", type=_PATH, help=f"The model file. Default: models:/mnist@champion, else {MODEL}, else {BEST}."
)
_ray_option = click.option("--ray", metavar="HOST:PORT", help="Train in the Ray cluster whose head is at this address.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mnist-pipeline")
def mnist() -> None:
    """Use, check and measure the digit classifier that `make repro` trains. Run it in the repository's root.

    A mistake ends with one line and exit code 1, a wrong option with exit code 2.
    """


@mnist.command("backfill")
def backfill_command() -> None:
    """Add to MLflow what it missed of the model here."""
    from mnist_pipeline.tracking.backfill import backfill_run

    backfill_run()


@mnist.command("check-params")
def check_params_command() -> None:
    """Check all of params.yaml, also its section `gate`, which no stage reads. `make repro` does this first."""
    from mnist_pipeline.common.params import load_params
    from mnist_pipeline.promotion.bounds import load_bounds

    load_params()
    load_bounds()


@mnist.command("reproduce")
@click.option("--record", is_flag=True, help="If all is identical, add this processor to the table in docs.")
def reproduce_command(record: bool) -> None:
    """Run the pipeline of HEAD again and compare byte for byte.

    It runs in a temporary clone, without any cache. The exit code is 0 if all outputs are identical.
    """
    from mnist_pipeline.reproduce import reproduce_commit

    reproduce_commit(record)


@mnist.command("experiment", context_settings={"ignore_unknown_options": True})
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
    help="Change a param. The environment variable may set several, separated by spaces.",
)
def experiment_command(recipe: str, arguments: tuple[str, ...], params: tuple[str, ...]) -> None:
    """Run a recipe as a DVC experiment.

    RECIPE is the name of a file in experiments/, or `specification` for params.yaml as it is. Further arguments go to
    `dvc exp run`, such as --queue, --temp or --force.
    """
    from mnist_pipeline.experiments.recipes import run_experiment

    sys.exit(run_experiment(recipe, [*(f"--set-param={param}" for param in params), *arguments]))


@mnist.command("study")
@click.argument("recipe")
@click.option("--seeds", default=10, type=click.IntRange(1), help="How many seeds: 0, 1, 2, …")
@click.option(
    "--validation", is_flag=True, help="Score on held-out training images: the seeds 0 to 5 hold out a sixth each."
)
@_ray_option
def study_command(recipe: str, seeds: int, validation: bool, ray: str | None) -> None:
    """Train a recipe from several seeds.

    RECIPE is the name of a file in experiments/, or `specification` for params.yaml as it is. The results are written
    to reports/studies/RECIPE.csv. Run the command again to resume a study that was killed.
    """
    from mnist_pipeline.experiments.study import run_study

    run_study(recipe, seeds, validation, ray)


@mnist.command("publish")
@click.argument("recipe")
def publish_command(recipe: str) -> None:
    """Train seed 0 of a study again and put its model into models/.

    The model must come out as the study's table records it, to the last byte. It is written to
    models/RECIPE.safetensors with its params, commit, data digest and test figures: `mnist info --model` shows them.
    """
    from mnist_pipeline.experiments.publish import publish_model

    publish_model(recipe)


@mnist.command("sweep")
@click.argument("space", type=_PATH)
@click.option(
    "--trials", required=True, type=click.IntRange(1), help="How many trials in all, with those of earlier calls."
)
@_ray_option
def sweep_command(space: Path, trials: int, ray: str | None) -> None:
    """Search a space of params for the best recipe.

    SPACE is a file NAME.yaml with a recipe to start from, and a range or a list of choices for each param to search.
    Trials are scored on held-out training images; hopeless ones stop early. The best recipe is written to
    experiments/NAME.yaml. Run the command again to resume a sweep that was killed.
    """
    from mnist_pipeline.experiments.sweep import run_sweep

    run_sweep(space, trials, ray)


@mnist.command("ci-report")
@click.option("--base", metavar="REV", required=True, help="The commit to compare with; all zeros mean none.")
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The output of `dvc repro`, which names the stages that ran. Without it, dvc.lock shows what changed.",
)
@click.option("--artifacts", metavar="URL", help="Where CI keeps this run's outputs and pictures.")
def ci_report_command(base: str, out: Path, log: Path | None, artifacts: str | None) -> None:
    """Compare the run in the workspace with a commit, in Markdown.

    The text suits a comment on a pull request. Pictures go into a directory beside it: NAME-pictures for NAME.md.
    """
    from mnist_pipeline.promotion.ci_report.comment import write_ci_report

    write_ci_report(base, out, log, artifacts)


@mnist.command("serve")
@click.option("--host", default="127.0.0.1", help="Where to listen.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="The port; 0 takes any free one.")
@_answering_model_option
@click.option(
    "--keep", metavar="DIR", type=_PATH, help="Keep the pictures that are read, up to 10,000, and ask what they show."
)
def serve_command(host: str, port: int, model: Path | None, keep: Path | None) -> None:
    """Serve a page to draw a digit on, and its API."""
    from mnist_pipeline.serving.service import run_service

    run_service(host, port, model, keep)


@mnist.command("drift")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_json_option
def drift_command(directory: Path, as_json: bool) -> None:
    """Compare the pictures that `mnist serve --keep DIRECTORY` kept with the test images.

    It compares how sure the network was, and which classes it read, and says whether they differ more than by chance.
    """
    from mnist_pipeline.common.params import load_params
    from mnist_pipeline.serving.drift import measure_drift, render_drift

    report = measure_drift(directory, load_params().data.classes)
    print(_to_json(asdict(report)) if as_json else render_drift(report))


@mnist.command("gate")
@_json_option
def gate_command(as_json: bool) -> None:
    """Judge the model here by the gate in params.yaml.

    Print each rule with its bound, the value found and the verdict. The exit code is 1 if the model fails.
    """
    from mnist_pipeline.promotion.gate import judge, render_verdicts

    verdicts = judge()
    passed = all(verdict.passed for verdict in verdicts)
    rules = {"passed": passed, "rules": [asdict(verdict) for verdict in verdicts]}
    print(_to_json(rules) if as_json else render_verdicts(verdicts))
    sys.exit(not passed)


@mnist.command("promote")
@click.option("--reason", default="", help="Why, for the record.", show_default=False)
@click.option("--rollback", is_flag=True, help="Undo the last promotion: the previous champion is the champion again.")
def promote_command(reason: str, rollback: bool) -> None:
    """Make the model here the champion, if it passes the gate.

    The model becomes a version of MLflow's registered model and the challenger. If it passes, it becomes
    mnist@champion, and the former champion becomes mnist@previous. If it fails, the exit code is 1. The tags of each
    version keep its history.
    """
    from mnist_pipeline.promotion.promote import promote_model, roll_back_model

    if rollback:
        roll_back_model(reason)
    else:
        promote_model(reason)


@mnist.command("add")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="The addition's name. Default: the directory's.")
@click.option("--normalize", is_flag=True, help="Bring other pictures to this form, as `mnist predict` does.")
def add_command(source: Path, name: str | None, normalize: bool) -> None:
    """Check labelled digits and add them to the training images.

    They are written to data/added/NAME, and DVC tracks them. SOURCE holds either pictures (28×28 pixels, white on
    black) in directories named as the classes, 0 to 9, or IDX files with the names of MNIST's training files. Copies
    of MNIST images are refused.
    """
    from mnist_pipeline.serving.additions import add_digits

    add_digits(source, name or source.resolve().name, normalize)


@mnist.command("predict")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_answering_model_option
@_json_option
def predict_command(files: tuple[str, ...], model: Path | None, as_json: bool) -> None:
    """Read the digit in each picture; - is standard input.

    A picture is a drawing, a scan or a photo of one digit in any colours and size, dark on light or light on dark. For
    one that cannot be read, print a line on standard error, go on with the others, and exit with 1 at the end. Without
    --model, standard error also says which model answers.
    """
    from mnist_pipeline.serving.classifier import Classifier, classify_files, find_model

    with find_model(model) as (path, source):
        classifier = Classifier(path)
    if model is None:
        print(f"Read by {errors.printable(source)}:", file=sys.stderr, flush=True)
    answers = []
    for name, prediction in classify_files(files, classifier):
        answers.append({"file": name, **asdict(prediction)})
        if not as_json:
            print(f"{errors.printable(name)}: {prediction.name} ({prediction.probability:.1%})", flush=True)
    if as_json:
        print(_to_json(answers))
    sys.exit(len(answers) < len(files))


@mnist.command("info")
@_model_option
@_json_option
def info_command(model: Path, as_json: bool) -> None:
    """Show the network layer by layer, and the file that holds it.

    If the pipeline's model file is absent, show the network that params.yaml describes.
    """
    from mnist_pipeline.serving.model_info import read_model_info, render_model_info

    found = read_model_info(model)
    print(_to_json(asdict(found)) if as_json else render_model_info(found))


@mnist.group("export")
def export_group() -> None:
    """Write the trained network in another format."""


@export_group.command("onnx")
@click.argument("path", type=_PATH)
@_model_option
@_json_option
def onnx_command(path: Path, model: Path, as_json: bool) -> None:
    """Write the trained network as ONNX, if it agrees with PyTorch.

    The input is `images` (N, 1, 28, 28) as float32: pixels scaled to 0..1, minus `mean`, divided by `std`; both are in
    the file's metadata. The output is `log_probabilities` (N, 10). Nothing is written unless ONNX Runtime and PyTorch
    predict the same for all test digits in data/raw, in batches of several sizes.
    """
    from mnist_pipeline.data.digits import load_digits

    try:
        from mnist_pipeline.serving.onnx import export_onnx
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"mnist export onnx needs {error.name}, which is absent: `make onnx` installs it"
        ) from None
    agreement = export_onnx(model, path, load_digits(RAW, "test"))
    written = errors.printable(f"{path} is written: {agreement}")
    print(_to_json({"path": str(path), **asdict(agreement)}) if as_json else written)


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2)


def main() -> None:
    """Run the command. `errors.run` ends it after a mistake or an interruption, click after a wrong option."""
    errors.run(_run_click)


def _run_click() -> None:
    """Run the command as click does, but leave Ctrl-C to `errors.run`."""
    try:
        mnist(standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
