"""The command `mnist`: what people and make do beside the pipeline. Slow imports stand where they are used."""

import json
import sys
from pathlib import Path
from typing import BinaryIO, cast

import click

from mnist_pipeline.common import errors
from mnist_pipeline.common.paths import MODEL, RAW

model_option = click.option("--model", type=click.Path(path_type=Path), default=MODEL, help="The model's file.")
ray_option = click.option(
    "--ray", metavar="HOST:PORT", help="Train in the Ray cluster with this head, instead of one process a core here."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mnist-pipeline")
def mnist() -> None:
    """Use, check and measure the digit classifier that `make repro` trains, from the repository's root.

    A mistake ends in one line and exit code 1, a wrong option in exit code 2.
    """


@mnist.command()
def backfill() -> None:
    """Give MLflow the run of outputs that DVC restored, or that it missed."""
    from mnist_pipeline.tracking.backfill import main

    main()


@mnist.command()
def reproduce() -> None:
    """Train the committed commit again and compare byte for byte.

    It runs in a temporary clone, without any cache. The exit code is 0 if all outputs are identical.
    """
    from mnist_pipeline.reproduce import main

    main()


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
    help="Another value of a param; in the variable, several with spaces between them.",
)
def experiment(recipe: str, arguments: tuple[str, ...], params: tuple[str, ...]) -> None:
    """Run a recipe as an experiment of DVC.

    RECIPE is one of experiments/, or `specification` for params.yaml as it is. Further arguments go to `dvc exp run`,
    such as --queue, --temp or --force.
    """
    from mnist_pipeline.experiments.recipes import run_experiment

    sys.exit(run_experiment(recipe, [*(f"--set-param={param}" for param in params), *arguments]))


@mnist.command()
@click.argument("recipe")
@click.option("--seeds", default=10, type=click.IntRange(1), help="How many: 0, 1, 2, …")
@click.option("--validation", is_flag=True, help="Score on 5,000 training images held out, not on the test images.")
@ray_option
def study(recipe: str, seeds: int, validation: bool, ray: str | None) -> None:
    """Train a recipe from several seeds: reports/studies/RECIPE.csv.

    RECIPE is one of experiments/, or `specification` for params.yaml as it is. A study that was killed goes on.
    """
    from mnist_pipeline.experiments.study import study

    study(recipe, seeds, validation, ray)


@mnist.command()
@click.argument("space", type=click.Path(path_type=Path))
@click.option("--trials", required=True, type=click.IntRange(1), help="How many in all, those of an earlier call too.")
@ray_option
def sweep(space: Path, trials: int, ray: str | None) -> None:
    """Search a space of params for the best recipe: experiments/NAME.yaml, where SPACE is NAME.yaml.

    SPACE names a recipe to start from and, for params, ranges or lists of choices. Trials are scored on training images
    held out, hopeless ones stopped early. A sweep that was killed goes on.
    """
    from mnist_pipeline.experiments.sweep import sweep

    sweep(space, trials, ray)


@mnist.command()
@click.option("--base", metavar="REV", required=True, help="The commit to compare with; all zeros: none.")
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `dvc repro` printed, which tells what ran; without it dvc.lock tells what differs from the base.",
)
@click.option("--artifacts", metavar="URL", help="Where CI keeps this run's outputs and pictures.")
def ci_report(base: str, out: Path, log: Path | None, artifacts: str | None) -> None:
    """Write what the workspace's run changed against a commit, as Markdown for a pull request's comment.

    Pictures go into a directory beside FILE: FILE's name without its ending, and -pictures.
    """
    from mnist_pipeline.promotion.ci_report.comment import write_ci_report

    write_ci_report(base, out, log, artifacts)


@mnist.command()
@click.option("--host", default="127.0.0.1", help="Where to listen.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any that is free.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help=f"The model's file, instead of MLflow's models:/mnist@champion or, where there is none, {MODEL}.",
)
def serve(host: str, port: int, model: Path | None) -> None:
    """Serve a page to draw a digit on, and its API."""
    from mnist_pipeline.serving.service import serve

    serve(host, port, model)


@mnist.command()
@json_option
def gate(as_json: bool) -> None:
    """Judge the model here by the gate of params.yaml: exit code 0 if it passes, 1 if it fails.

    Each rule is listed with its bound, what was found, and the verdict.
    """
    from mnist_pipeline.promotion.gate import judge, render_verdicts

    verdicts = judge()
    passed = all(verdict.passed for verdict in verdicts)
    if as_json:
        print(json.dumps({"passed": passed, "rules": [vars(verdict) for verdict in verdicts]}, indent=2))
    else:
        print(render_verdicts(verdicts))
    sys.exit(not passed)


@mnist.command()
@click.option("--reason", default="", help="Why, for the record.", show_default=False)
@click.option("--rollback", is_flag=True, help="Undo the last promotion: the previous champion is the champion again.")
def promote(reason: str, rollback: bool) -> None:
    """Make the model here MLflow's models:/mnist@champion, if the gate passes.

    It becomes a version of the registered model and the challenger; when the gate passes, the champion, and the former
    champion the previous one. If it fails, the exit code is 1. Each version's tags tell what became of it.
    """
    from mnist_pipeline.promotion.promote import promote_model, roll_back

    if rollback:
        roll_back(reason)
    else:
        promote_model(reason)


@mnist.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Of the addition, instead of the directory's.")
@click.option("--normalize", is_flag=True, help="Bring other pictures to MNIST's form, as `mnist predict` does.")
def add(source: Path, name: str | None, normalize: bool) -> None:
    """Check labelled digits and add them to those that train: data/added/NAME, tracked by DVC.

    SOURCE is a directory that holds pictures, white on black and of 28×28 pixels, in directories 0 to 9; or IDX files,
    named as those of MNIST's training images are. A copy of one of MNIST's images, above all of a test image, is
    refused.
    """
    from mnist_pipeline.serving.additions import add

    add(source, name or source.resolve().name, normalize)


@mnist.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@model_option
@json_option
def predict(files: tuple[str, ...], model: Path, as_json: bool) -> None:
    """Read the digit in each picture: a drawing, a scan or a photo of one digit; - is standard input.

    Any colours and size will do, dark on light or light on dark. A picture that cannot be read gets a line on standard
    error, the others are answered all the same, and the exit code is 1.
    """
    from mnist_pipeline.serving.classifier import Classifier
    from mnist_pipeline.serving.preprocessing import normalize, open_image

    classifier = Classifier(model)
    answers = []
    for file in files:
        name = click.format_filename(file)
        try:
            with click.open_file(file, "rb") as picture:
                prediction = classifier.classify(normalize(open_image(cast("BinaryIO", picture))))
        except (errors.UserError, OSError) as error:
            print(f"error: {name}: {getattr(error, 'strerror', error)}", file=sys.stderr, flush=True)
            continue
        answers.append({"file": name, **vars(prediction)})
        if not as_json:
            print(f"{name}: {prediction.digit} ({prediction.probability:.1%})", flush=True)
    if as_json:
        print(json.dumps(answers, indent=2))
    if len(answers) < len(files):
        sys.exit(1)


@mnist.command()
@model_option
@json_option
def info(model: Path, as_json: bool) -> None:
    """Show the network layer by layer, and which model file holds it.

    Without the model file of the pipeline it is the network that params.yaml describes.
    """
    from dataclasses import asdict

    from mnist_pipeline.common.files import sha256
    from mnist_pipeline.common.params import Normalization, load_params
    from mnist_pipeline.model.network import Net
    from mnist_pipeline.report.architecture import list_layers
    from mnist_pipeline.serving.classifier import Classifier

    if model == MODEL and not model.exists():
        params = load_params()
        network, normalization, digest = (
            Net(params.model),
            Normalization(mean=params.data.mean, std=params.data.std),
            None,
        )
    else:
        classifier = Classifier(model)
        network, normalization, digest = classifier.network, classifier.normalization, sha256(model)
    layers = list_layers(network)
    total = sum(layer.parameters for layer in layers)
    if as_json:
        description = {
            "model": str(model) if digest else None,
            "sha256": digest,
            "normalization": normalization.model_dump(include={"mean", "std"}),
            "parameters": total,
            "layers": [asdict(layer) for layer in layers],
        }
        print(json.dumps(description, indent=2))
        return
    print(
        f"{model}: SHA-256 {digest}" if digest else f"{model} is absent: this is the network of params.yaml, untrained"
    )
    print(
        f"Pixels from 0 to 1 are normalised by mean {normalization.mean:g}, standard deviation {normalization.std:g}.\n"
    )
    rows = [("layer", "kind", "output", "parameters", "receptive field")]
    rows += [
        (
            f"{layer.block}.{layer.name}",
            layer.kind,
            "×".join(map(str, layer.output_shape)),
            f"{layer.parameters:,}",
            str(layer.receptive_field),
        )
        for layer in layers
    ]
    rows += [("total", "", "", f"{total:,}", "")]
    for name, kind, shape, parameters, field in rows:
        print(f"{name:<18}  {kind:<17}  {shape:<8}  {parameters:>10}  {field:>15}".rstrip())


@mnist.group()
def export() -> None:
    """Write the trained network in another format."""


@export.command()
@click.argument("path", type=click.Path(path_type=Path))
@model_option
@json_option
def onnx(path: Path, model: Path, as_json: bool) -> None:
    """Write the trained network as ONNX, once it agrees with PyTorch.

    It takes `images` (N, 1, 28, 28) as float32, pixels scaled to 0..1, less `mean`, divided by `std`, both of which are
    in the file's metadata, and gives `log_probabilities` (N, 10). Before it is written, ONNX Runtime reads all test
    digits of data/raw with it, in batches of several sizes, as PyTorch does.
    """
    from dataclasses import asdict

    from mnist_pipeline.data.digits import load_digits
    from mnist_pipeline.serving.onnx import TOLERANCE, export_onnx

    agreement = export_onnx(model, path, load_digits(RAW, "test"))
    if as_json:
        print(json.dumps({"path": str(path), **asdict(agreement), "tolerance": TOLERANCE}, indent=2))
        return
    print(
        f"{path} is written: ONNX Runtime reads all {agreement.digits:,} test digits as PyTorch does, in batches of "
        f"{', '.join(map(str, agreement.batch_sizes))}; log-probabilities differ by {agreement.largest_difference:.1e} "
        f"at most ({TOLERANCE:.0e} is allowed)"
    )


def main() -> None:
    """Run the command; see `errors.run` for how a mistake or an interruption ends it, click for a wrong option."""
    errors.run(command)


def command() -> None:
    """Run the command as click does by itself, but for Ctrl-C, which click ends like a mistake."""
    try:
        mnist(standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
