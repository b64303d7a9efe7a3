"""The command `mnist`: what people and make do beside the pipeline. Slow imports stand where they are used."""

from pathlib import Path

import click

from mnist_pipeline import errors
from mnist_pipeline.paths import MODEL


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mnist-pipeline")
def mnist() -> None:
    """Use, check and measure the digit classifier that `make repro` trains, from the repository's root.

    A mistake ends in one line and exit code 1, a wrong option in exit code 2.
    """


@mnist.command()
def backfill() -> None:
    """Give MLflow the run of outputs that DVC restored, or that it missed."""
    from mnist_pipeline.backfill import main

    main()


@mnist.command()
def reproduce() -> None:
    """Train the committed commit again and compare byte for byte.

    It runs in a temporary clone, without any cache. The exit code is 0 if all outputs are identical.
    """
    from mnist_pipeline.reproduce import main

    main()


@mnist.command()
def bench() -> None:
    """Time an epoch beside the plain loop and measure memory: reports/bench.json."""
    from mnist_pipeline.bench import main

    main()


@mnist.command()
def dropout() -> None:
    """Collect the runs of `make dropout`: reports/dropout.csv."""
    from mnist_pipeline.study import main

    main()


@mnist.command()
@click.option("--host", default="127.0.0.1", help="address to listen at")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0: any that is free")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help=f"model file instead of MLflow's models:/mnist@champion or, where there is none, {MODEL}",
)
def serve(host: str, port: int, model: Path | None) -> None:
    """Serve a page to draw a digit on, and its API."""
    from mnist_pipeline.service import serve

    serve(host, port, model)


@mnist.command()
def readme() -> None:
    """Carry the results of the last runs into README.md."""
    from mnist_pipeline.readme import main

    main()


def main() -> None:
    """Run the command; see `errors.run` for how a mistake ends it."""
    errors.run(mnist)
