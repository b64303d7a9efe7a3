"""Write the report and draw its figures."""

from mnist_pipeline.architecture import describe
from mnist_pipeline.backfill import backfill, missing
from mnist_pipeline.data import load_digits
from mnist_pipeline.errors import run
from mnist_pipeline.files import write_text
from mnist_pipeline.model import load_model
from mnist_pipeline.params import load_params
from mnist_pipeline.paths import FIGURES, HISTORY, METRICS, MODEL, PREDICTIONS, RAW, REPORT
from mnist_pipeline.provenance import trace
from mnist_pipeline.reporting import draw_figures, load_results, render_report
from mnist_pipeline.tracking import Store, tolerant


def main() -> None:
    params = load_params()
    provenance = trace("report")
    training, test = load_digits(RAW, "train"), load_digits(RAW, "test")
    layers = describe(load_model(MODEL))
    results = load_results(HISTORY, METRICS, PREDICTIONS)
    draw_figures(FIGURES, results, test, params)
    write_text(REPORT, render_report(params, training, test, layers, results))
    with tolerant("the report"):
        store = Store()
        backfill(store, missing(store, "evaluate"))
        store.add_to_run_of(MODEL, provenance)


if __name__ == "__main__":
    run(main)
