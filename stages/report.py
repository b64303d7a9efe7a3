"""Write the report as Markdown and as a web page, and draw its figures."""

import sys

sys.path.insert(0, "src")  # this directory's package: DVC runs experiments in copies of the repository

from mnist_pipeline.common import paths
from mnist_pipeline.common.errors import run
from mnist_pipeline.common.files import sha256, write_text
from mnist_pipeline.common.params import load_params
from mnist_pipeline.data.digits import FILES, load_digits
from mnist_pipeline.data.training_set import load_additions
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.report.document import draw_charts, render_report, write_figures
from mnist_pipeline.report.page import render_page
from mnist_pipeline.report.results import load_results
from mnist_pipeline.tracking.backfill import add_stages, missing_stages
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import Store, continue_untracked


def main() -> None:
    params = load_params()
    provenance = trace("report")
    digits = {part: load_digits(paths.RAW, part) for part in ("train", "test")}
    digits["added"] = load_additions(paths.ADDED, paths.RAW, params.data)
    model = load_model(paths.MODEL).network
    tables = paths.HISTORY, paths.METRICS, paths.PREDICTIONS, paths.CALIBRATION, paths.ROBUSTNESS, paths.STUDIES
    results = load_results(*tables).with_studies_on(digits["test"])
    charts = draw_charts(results, model, params, digits)
    write_figures(paths.FIGURES, charts)
    files = [*(paths.RAW / file for file in FILES), *sorted(paths.ADDED.glob("*/*")), paths.MODEL]
    report = render_report(params, digits, model, results, {str(path): sha256(path) for path in files})
    write_text(paths.REPORT, report)
    write_text(paths.PAGE, render_page(report, paths.REPORT.parent, charts))
    with continue_untracked("the report"):
        add_stages(store := Store(), missing_stages(store, "evaluate"))
        store.add_to_run_of(paths.MODEL, provenance)


if __name__ == "__main__":
    run(main)
