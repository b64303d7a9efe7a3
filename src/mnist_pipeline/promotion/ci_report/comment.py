"""Write what a retraining changed against a base commit, as a Markdown comment with pictures (`mnist ci-report`).

The base is read as it was committed, with its reports: nothing is trained or pulled for it. GitHub shows a picture in
a comment only if it is hosted somewhere, and CI hosts none. So Mermaid draws the comment's curves, and a table counts
its confusions. Charts and digits are PNG files in a directory beside the comment, which CI keeps as an artifact.

Names and values may come from an untrusted fork: the template writes each as a number or through the filter `code`.
"""

import math
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import jinja2

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text, sha256, write_text
from mnist_pipeline.common.paths import MODEL, PREDICTIONS, RAW, STUDIES
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.promotion.ci_report.differences import PER_CLASS, Retraining
from mnist_pipeline.promotion.ci_report.pictures import write_pictures
from mnist_pipeline.promotion.ci_report.state import State, check_out
from mnist_pipeline.promotion.gate import judge
from mnist_pipeline.report.chart_style import BLUE, GREY
from mnist_pipeline.report.tables import markdown_table
from mnist_pipeline.tracking.provenance import get_output
from mnist_pipeline.tracking.store import finished_runs

_MAX_CODE_LENGTH = 80  # characters
_MOST_MISTAKES = 20  # of each kind; GitHub allows a comment of 65,536 characters


def write_ci_report(base: str, out: Path, log: Path | None = None, artifacts: str | None = None) -> None:
    """Write the comment that compares the workspace with the revision `base`, and a directory of pictures beside it.

    `log` holds the output of `dvc repro`; `artifacts` is the address where CI keeps the outputs of this run.

    Raises:
        UserError: the revision does not exist, the pipeline has not run, or `artifacts` is not an http(s) address.
    """
    if artifacts and not re.fullmatch(r"https?://[^\s<>|`]+", artifacts):
        raise UserError(f"--artifacts must be an address that begins with https:// or http://, and is {artifacts!r}")
    head = State.load(Path())
    after = head.read_results().with_studies_on(load_digits(RAW, "test"))
    with tempfile.TemporaryDirectory() as temporary:
        commit = check_out(base, directory := Path(temporary))
        base_state, before = State.load(directory) if commit else None, None
        if base_state:
            with suppress(UserError):
                before = base_state.read_results(get_output(PREDICTIONS, commit, directory / PREDICTIONS))
        executed = re.findall(r"^Running stage '([^']+)'", read_text(log), re.MULTILINE) if log else None
        run = Retraining(commit, base_state, head, before, after, judge(), executed, _training_seconds(), artifacts)
        text = render_comment(run)
        write_pictures(out.with_name(f"{out.stem}-pictures"), run)
        write_text(out, text)


def render_comment(run: Retraining) -> str:
    """Render the comment; the same input gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_pipeline.promotion.ci_report", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (Markdown; `code` escapes)
    )
    environment.filters |= {
        "code": code,
        "name": _format_name,
        "difference": _format_difference,
        "value": _format_value,
    }
    metrics = run.changed_metrics()
    text = environment.get_template("comment.md.j2").render(
        run=run,
        stages=run.executions(),
        metrics=metrics,
        by_class=[metric for metric in metrics if metric.name.startswith(PER_CLASS)],
        curves=[_curve_chart("accuracy", run), _curve_chart("loss", run)],
        colours=[GREY, BLUE] if run.before else [BLUE],
        mistakes=run.changed_mistakes(),
        most_mistakes=_MOST_MISTAKES,
        study_file=STUDIES / f"{run.study.name}.csv",
    )
    return re.sub(r"(?m)(^\|.+\|\n)+", lambda table: _pad_table(table[0]), text)


def code(value: object) -> str:
    """Write a value as a code span; no character in the value can end the span or its table cell."""
    text = "".join(
        character if character.isprintable() and character not in "`|\\" else "�" for character in str(value)
    )
    return f"`{text[: _MAX_CODE_LENGTH - 1] + '…' if len(text) > _MAX_CODE_LENGTH else text or ' '}`"


def _format_name(name: str) -> str:
    """Write the name of a class as it is, if it is a short word or number."""
    return name if name.isalnum() and len(name) <= _MAX_CODE_LENGTH else code(name)


def _pad_table(rows: str) -> str:
    """Align the columns of a Markdown table, so that it also reads well in a terminal."""
    header, *body = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows.splitlines()]
    return f"{markdown_table(header, body)}\n"


def _format_value(value: object, name: str) -> str:
    """Format a metric's value: a count as an integer, a loss in nats, a share as a percentage."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if "loss" in name else f"{value:.2%}"
    return "–" if value is None else code(value)


def _format_difference(value: float | None, name: str, sign: str = "", extra_digits: int = 0) -> str:
    """Format a difference of two values of a metric, with `extra_digits` more decimal places than the values have."""
    if value is None:
        return ""
    if "accuracy" in name or "error" in name:
        return f"{100 * value:{sign}.{2 + extra_digits}f} points"
    return f"{value:{sign},.{(4 if 'loss' in name else 0) + extra_digits}f}"


def _curve_chart(quantity: str, run: Retraining) -> dict[str, object]:
    """Return the chart of the monitor's accuracy or loss: title, range, and a line for the base and for this run."""
    scale, title = (100, "accuracy, %") if quantity == "accuracy" else (1, "loss, nats an image")
    histories = [results.history for results in (run.before, run.after) if results]
    lines = [[scale * row[f"monitor_{quantity}"] for row in history] for history in histories]
    values = [value for line in lines for value in line]
    low, high = (math.floor(min(values)), 100) if quantity == "accuracy" else (0, math.ceil(100 * max(values)) / 100)
    return {"title": title, "low": low, "high": high, "epochs": max(map(len, lines)), "lines": lines}


def _training_seconds() -> float | None:
    """Estimate the training's duration as epochs × seconds of the last epoch; None if MLflow fails or lacks the run."""
    if not MODEL.is_file():
        return None
    try:
        runs = finished_runs(f"tags.model_sha256 = '{sha256(MODEL)}' and metrics.epoch_seconds > 0")
    except UserError:
        return None
    return int(runs[-1]["params.train.epochs"]) * float(runs[-1]["metrics.epoch_seconds"]) if runs else None
