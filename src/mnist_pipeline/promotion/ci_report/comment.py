"""Write what a retraining changed against a base commit, as a Markdown comment with pictures (`mnist ci-report`).

The base is read as it was committed, with its reports: nothing is trained or pulled for it. GitHub shows a picture in
a comment only if it is hosted somewhere, and CI hosts none. So Mermaid draws the comment's curves, and a table counts
its confusions. Charts and digits are PNG files in a directory beside the comment, which CI keeps as an artifact.

Names and values may come from a stranger's fork: the template writes each as a number or through the filter `code`.
"""

import math
import re
import tempfile
from pathlib import Path

import jinja2

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text, sha256, write_text
from mnist_pipeline.common.paths import MODEL, STUDIES
from mnist_pipeline.common.tables import markdown_table
from mnist_pipeline.promotion.ci_report.differences import PER_CLASS, Retraining
from mnist_pipeline.promotion.ci_report.pictures import write_pictures
from mnist_pipeline.promotion.ci_report.state import State, check_out
from mnist_pipeline.promotion.gate import judge
from mnist_pipeline.report.chart_style import BLUE, GREY
from mnist_pipeline.tracking.store import finished_runs

_LONGEST = 80  # characters of a stranger's text
_MOST_MISTAKES = 20  # of each kind; GitHub allows a comment of 65,536 characters


def write_ci_report(base: str, out: Path, log: Path | None = None, artifacts: str | None = None) -> None:
    """Write the comment that compares the workspace with the revision `base`, and a directory of pictures beside it.

    `log` is what `dvc repro` printed, `artifacts` the address where CI keeps the outputs of this run.

    Raises:
        UserError: the revision does not exist, the pipeline has not run, or `artifacts` is no address.
    """
    if artifacts and not re.fullmatch(r"https?://[^\s<>|`]+", artifacts):
        raise UserError(f"--artifacts must be an address that begins with https://, and is {artifacts!r}")
    head = State.load(Path())
    after = head.load_results()
    with tempfile.TemporaryDirectory() as temporary:
        commit = check_out(base, Path(temporary))
        known = State.load(Path(temporary)) if commit else None
        try:
            before = known.load_results() if known else None
        except UserError:
            before = None
        executed = re.findall(r"^Running stage '([^']+)'", read_text(log), re.MULTILINE) if log else None
        run = Retraining(commit, known, head, before, after, judge(), executed, _training_seconds(), artifacts)
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
    environment.filters |= {"amount": _write_amount, "code": code, "measure": _write_measure}
    metrics = run.changed_metrics()
    text = environment.get_template("comment.md.j2").render(
        run=run,
        stages=run.executions(),
        metrics=metrics,
        by_class=[metric for metric in metrics if metric.name.startswith(PER_CLASS)],
        curves=[_curves("accuracy", run), _curves("loss", run)],
        colours=[GREY, BLUE] if run.before else [BLUE],
        mistakes=run.mistakes(),
        most_mistakes=_MOST_MISTAKES,
        study_file=STUDIES / f"{run.study.name}.csv",
    )
    return re.sub(r"(?m)(^\|.+\|\n)+", lambda table: _pad_table(table[0]), text)


def code(value: object) -> str:
    """Write a value, a stranger's perhaps, as a code span that nothing in it can end, nor the table cell around it."""
    text = "".join(
        character if character.isprintable() and character not in "`|\\" else "�" for character in str(value)
    )
    return f"`{text[: _LONGEST - 1] + '…' if len(text) > _LONGEST else text or ' '}`"


def _pad_table(rows: str) -> str:
    """Make rows whose cells stand between `|` a Markdown table that reads well in a terminal, too."""
    header, *body = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows.splitlines()]
    return f"{markdown_table(header, body)}\n"


def _write_measure(value: object, name: str) -> str:
    """Write a metric's value: a count whole, a loss in nats, a share as a percentage."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if "loss" in name else f"{value:.2%}"
    return "–" if value is None else code(value)


def _write_amount(value: float | None, name: str, sign: str = "", more: int = 0) -> str:
    """Write how far two values of a metric are apart, with as many decimal places as they have and `more`."""
    if value is None:
        return ""
    if "accuracy" in name or "error" in name:
        return f"{100 * value:{sign}.{2 + more}f} points"
    return f"{value:{sign},.{(4 if 'loss' in name else 0) + more}f}"


def _curves(quantity: str, run: Retraining) -> dict[str, object]:
    """Return the title, the range and the lines (the base's, then this run's) of the monitor's accuracy or loss."""
    scale, title = (100, "accuracy, %") if quantity == "accuracy" else (1, "loss, nats an image")
    histories = [results.history for results in (run.before, run.after) if results]
    lines = [[scale * row[f"monitor_{quantity}"] for row in history] for history in histories]
    values = [value for line in lines for value in line]
    low, high = (math.floor(min(values)), 100) if quantity == "accuracy" else (0, math.ceil(100 * max(values)) / 100)
    return {"title": title, "low": low, "high": high, "epochs": max(map(len, lines)), "lines": lines}


def _training_seconds() -> float | None:
    """Estimate how long the model's training took: its epochs times the last one's seconds; None if MLflow lacks it."""
    if not MODEL.is_file():
        return None
    runs = finished_runs(f"tags.model_sha256 = '{sha256(MODEL)}' and metrics.epoch_seconds > 0")
    return int(runs[-1]["params.train.epochs"]) * float(runs[-1]["metrics.epoch_seconds"]) if runs else None
