"""Write the report and draw its figures."""

from mnist_pipeline.architecture import describe
from mnist_pipeline.data import load_digits
from mnist_pipeline.errors import run
from mnist_pipeline.files import write_text
from mnist_pipeline.model import load_model
from mnist_pipeline.params import load_params
from mnist_pipeline.paths import FIGURES, HISTORY, METRICS, MODEL, PREDICTIONS, RAW, REPORT
from mnist_pipeline.reporting import draw_figures, load_results, render_report
from mnist_pipeline.tracking import add_to_run_of


def main() -> None:
    params = load_params()
    training, test = load_digits(RAW, "train"), load_digits(RAW, "test")
    layers = describe(load_model(MODEL))
    results = load_results(HISTORY, METRICS, PREDICTIONS)
    draw_figures(FIGURES, results, test, params)
    write_text(REPORT, render_report(params, training, test, layers, results))
    add_to_run_of(MODEL, artifacts=[HISTORY, REPORT, FIGURES])


if __name__ == "__main__":
    run(main)
