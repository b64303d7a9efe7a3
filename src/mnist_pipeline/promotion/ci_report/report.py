"""What a retraining changed against a base revision, as one Markdown comment (`mnist ci-report`).

The base is what git holds of it, reports included: nothing of it is trained or pulled. GitHub shows no picture in a
comment that is not hosted somewhere, and CI hosts none. So the comment draws its curves by Mermaid and counts its
confusions in a table; charts and digits are PNG files in a directory beside it, which CI keeps as an artifact.

Names and values may come from a stranger's fork: each is written as a number or by `code`.
"""

import hashlib
import io
import math
import re
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text, sha256, write_text
from mnist_pipeline.common.params import flatten, read_sections
from mnist_pipeline.common.paths import (
    CALIBRATION,
    FIGURES,
    HISTORY,
    LOCK,
    METRICS,
    MODEL,
    PARAMS,
    PREDICTIONS,
    RAW,
    ROBUSTNESS,
    STUDIES,
)
from mnist_pipeline.common.tables import markdown_table
from mnist_pipeline.data.digits import CLASSES, load_digits
from mnist_pipeline.promotion.gate import Verdict, judge, render_verdicts
from mnist_pipeline.report.chart_style import BLUE, GREY
from mnist_pipeline.report.pictures import enlarge, write_sheet
from mnist_pipeline.report.results import ResultRow as Row
from mnist_pipeline.report.results import Results, load_results
from mnist_pipeline.report.studies import SPECIFICATION, read_study_rows
from mnist_pipeline.tracking.provenance import git
from mnist_pipeline.tracking.store import finished_runs

MARKER = "<!-- mnist ci-report -->"  # by which CI finds the comment that it updates
CHARTS = ("accuracy", "loss", "confusion_matrix", "reliability")
LISTED = 20  # mistakes of a kind in the comment, which GitHub limits to 65,536 characters
PICTURED = 100  # in a picture
LONGEST = 80  # characters of a stranger's text
STUDY = STUDIES / f"{SPECIFICATION}.csv"
COUNTS = ("test_correct", "test_misclassified")
PER_CLASS = "test_per_class_accuracy."
VALIDATION = "data.validation_size"
NONE = "–"


@dataclass(frozen=True)
class State:
    """A revision, or the workspace: its directory, its params by name, and the stages of its `dvc.lock`."""

    directory: Path
    params: Mapping[str, object]
    stages: Mapping[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "State":
        """Read a directory, in which either file may be absent."""
        params, lock = directory / PARAMS, directory / LOCK
        return cls(
            directory,
            flatten(read_sections(params)) if params.is_file() else {},
            yaml.safe_load(read_text(lock)).get("stages", {}) if lock.is_file() else {},
        )

    def load_results(self) -> Results:
        """Read what the stages wrote.

        Raises:
            UserError: a file is absent.
        """
        return load_results(
            *(self.directory / path for path in (HISTORY, METRICS, PREDICTIONS, CALIBRATION, ROBUSTNESS, STUDIES))
        )

    def outdated(self) -> list[str]:
        """Name the inputs that are no longer what the stages read: the reports here belong to an earlier state."""
        recorded = {name: value for stage in self.stages.values() for name, value in inputs(stage).items()}
        files = {name: md5(self.directory / name) for name in recorded if (self.directory / name).is_file()}
        return [name for name, value in ({**self.params, **files}).items() if recorded.get(name, value) != value]


@dataclass(frozen=True)
class Retraining:
    """All that the report says: `commit` and `base` are empty, or `before` alone, where there is none.

    `executed` are the stages that DVC said it ran, where that is known.
    """

    commit: str
    base: State | None
    head: State
    before: Results | None
    after: Results
    verdicts: Sequence[Verdict] = ()
    executed: Sequence[str] | None = None
    study: Sequence[Mapping[str, str]] = ()
    training_seconds: float | None = None
    artifacts: str | None = None


def write_ci_report(base: str, out: Path, log: Path | None = None, artifacts: str | None = None) -> None:
    """Write the report on the workspace against a revision, and its pictures into a directory beside it.

    `log` is what `dvc repro` printed, `artifacts` the address of what CI keeps of this run.

    Raises:
        UserError: there is no such revision, the pipeline has not run, or the address is none.
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
        retraining = Retraining(
            commit,
            known,
            head,
            before,
            after,
            judge(),
            re.findall(r"^Running stage '([^']+)'", read_text(log), re.MULTILINE) if log else None,
            read_study_rows(STUDY),
            training_seconds(),
            artifacts,
        )
        text = render_report(retraining)
        write_pictures(out.with_name(f"{out.stem}-pictures"), retraining)
        write_text(out, text)


def check_out(revision: str, directory: Path) -> str:
    """Extract a revision's files into a directory; return its commit, nothing for git's null revision.

    The null revision is all zeros: to CI, what a branch was before it was first pushed.

    Raises:
        UserError: there is no such revision.
    """
    if re.fullmatch("0{40,}", revision):
        return ""
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    if not commit:
        raise UserError(f"--base must be a commit that this repository has, and is {revision!r}: `git fetch` brings it")
    archive = subprocess.run(["git", "archive", "--format=tar", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, [member for member in tar if member.isfile()], filter="data")
    return commit


def training_seconds() -> float | None:
    """Return about how long the model here took to train, its last epoch's time for each, where MLflow saw it."""
    if not MODEL.is_file():
        return None
    runs = finished_runs(f"tags.model_sha256 = '{sha256(MODEL)}' and metrics.epoch_seconds > 0")
    return int(runs[-1]["params.train.epochs"]) * float(runs[-1]["metrics.epoch_seconds"]) if runs else None


def render_report(found: Retraining) -> str:
    """Return the report: of an equal argument the same text."""
    same = found.before is not None and found.before == found.after
    base = f"against {code(found.commit[:7])}" if found.commit else "without a base"
    sections = [
        f"{MARKER}\n## Retraining {base}",
        *render_summary(found),
        "### What ran",
        *render_executions(found),
        "### Params",
        *render_params(found),
        "### Metrics",
        *render_metrics(found),
        *([] if same else ["### Learning curves", *render_curves(found)]),
        *([] if same else ["### Misclassified digits", *render_confusions(found), *render_mistakes(found)]),
        "### Gate",
        render_verdicts([replace(verdict, value=code(verdict.value)) for verdict in found.verdicts]),
    ]
    return "\n\n".join(sections) + "\n"


def render_summary(found: Retraining) -> list[str]:
    """Say it in one row; then what the base lacks, how long it took and where the rest is."""
    failed = [verdict.rule for verdict in found.verdicts if not verdict.passed]
    accuracy = f"{found.after.metrics['test_accuracy']:.2%}"
    mistakes = f"{found.after.metrics['test_misclassified']:,}"
    if found.before:
        accuracy = f"{found.before.metrics['test_accuracy']:.2%} → {accuracy}"
        mistakes = f"{found.before.metrics['test_misclassified']:,} → {mistakes}"
        accuracy += "".join(f", {row.verdict} the spread" for row in differences(found) if row.name == "test_accuracy")
    ran = ", ".join(code(stage.name) for stage in executions(found) if stage.ran)
    gate = f"**failed**: {', '.join(failed)}" if failed else "passed"
    lines = [
        markdown_table(
            ["Gate", "Test accuracy", "Misclassified", "Ran"], [[gate, accuracy, mistakes, ran or "nothing"]]
        ),
    ]
    if found.base is None:
        lines.append("There is no commit to compare with.")
    elif found.before is None:
        lines.append("The base has no reports to compare with: `make repro` in it, then commit what it wrote.")
    elif outdated := found.base.outdated():
        lines.append(
            f"The base's reports are older than the base: {listed(outdated)} changed since. `make repro` in it, then "
            "commit what it wrote."
        )
    if found.training_seconds:
        lines.append(f"The training took about {found.training_seconds / 60:.1f} minutes.")
    if found.artifacts:
        lines.append(f"[Charts side by side, the digits as pictures, and all outputs](<{found.artifacts}>)")
    return lines


@dataclass(frozen=True)
class Execution:
    """A stage, whether it ran, and why."""

    name: str
    ran: bool
    reason: str


def executions(found: Retraining) -> list[Execution]:
    """Say what ran: what DVC said it did or, where that is not known, what `dvc.lock` has other than the base's."""
    stages = []
    for name, stage in found.head.stages.items():
        known = found.base.stages.get(name) if found.base else None
        differing = changed(inputs(known), inputs(stage)) if known else []
        as_before = known is not None and not differing and outputs(known) == outputs(stage)
        ran = not as_before if found.executed is None else name in found.executed
        if known is None:
            reason = "not in the base"
        elif differing:
            reason = f"{listed(differing)} changed" + ("" if ran else "; its outputs are committed, or from a cache")
        elif not as_before:
            reason = "other outputs of the same inputs: another processor, or other versions"
        else:
            reason = "its outputs were in no cache" if ran else "nothing changed"
        stages.append(Execution(name, ran, reason))
    return stages


def inputs(stage: Mapping[str, Any]) -> dict[str, object]:
    """Return what an entry of `dvc.lock` holds of a stage's command, params and files, by their names."""
    params = [flatten(values) for values in stage.get("params", {}).values()]
    files = {file["path"]: file.get("md5") for file in stage.get("deps", [])}
    return {"cmd": stage.get("cmd"), **{name: value for values in params for name, value in values.items()}, **files}


def outputs(stage: Mapping[str, Any]) -> dict[str, object]:
    """Return what an entry of `dvc.lock` holds of a stage's outputs, by their names."""
    return {file["path"]: file.get("md5") for file in stage.get("outs", [])}


def md5(path: Path) -> str:
    """Return a file's MD5, by which `dvc.lock` knows it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Name what differs between two mappings."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def render_executions(found: Retraining) -> list[str]:
    """Say of each stage whether it ran, and why; or that none did."""
    stages = executions(found)
    if not any(stage.ran for stage in stages):
        lock = (
            "`dvc.lock` is the base's" if found.base and found.base.stages == found.head.stages else "no stage had to"
        )
        return [f"**Nothing ran**: {lock}."]
    rows = [[code(stage.name), "**yes**" if stage.ran else "no", stage.reason] for stage in stages]
    return [markdown_table(["Stage", "Ran", "Because"], rows)]


def render_params(found: Retraining) -> list[str]:
    """List the params that differ from the base's."""
    if found.base is None:
        return ["All are new."]
    before, after = found.base.params, found.head.params
    rows = [
        [code(name), *(code(params[name]) if name in params else NONE for params in (before, after))]
        for name in changed(before, after)
    ]
    return [markdown_table(["Param", "Base", "This run"], rows) if rows else "None changed."]


@dataclass(frozen=True)
class Difference:
    """A metric before and after, its difference and spread, as text, and whether the one is within the other."""

    name: str
    before: str
    after: str
    difference: str = ""
    spread: str = ""
    verdict: str = ""


def differences(found: Retraining) -> list[Difference]:
    """Return the metrics that differ, and how far two runs that differ by their seeds alone would be apart.

    Of two such runs, 19 in 20 are less than 2√2 standard deviations of a single run apart.
    """
    before = flatten(found.before.metrics) if found.before else {}
    after = flatten(found.after.metrics)
    rows = []
    for name in changed(before, after):
        old, new = before.get(name), after.get(name)
        row = Difference(name, value_of(name, old), value_of(name, new))
        if isinstance(old, int | float) and isinstance(new, int | float):
            row = replace(row, difference=amount(name, new - old, "+"), verdict="not known")
            if (deviation := standard_deviation(name, (old + new) / 2, found)) is not None:
                spread = 2 * math.sqrt(2) * deviation
                verdict = "within" if abs(new - old) <= spread else "**beyond**"
                mark = "" if over_seeds(name, found.study) else "*"
                row = replace(row, spread=amount(name, spread, more=1) + mark, verdict=verdict)
        rows.append(row)
    return rows


def standard_deviation(name: str, value: float, found: Retraining) -> float | None:
    """Return a metric's standard deviation over the study's seeds or, for a share of images, its binomial error.

    Of a loss, or of the calibration error, nothing is known without a study.
    """
    total = found.after.metrics["test_total"]
    if name in COUNTS:
        share = standard_deviation("test_accuracy", value / total, found)
        return None if share is None else total * share
    if over_seeds(name, found.study):
        return statistics.stdev(float(row[name]) for row in found.study)
    if "accuracy" not in name:
        return None
    images = found.after.confusion.sum(axis=1)[int(name[-1])] if name.startswith(PER_CLASS) else total
    return math.sqrt(value * (1 - value) / float(images))


def over_seeds(name: str, study: Sequence[Mapping[str, str]]) -> bool:
    """Say whether a study knows the spread of a metric."""
    return len(study) > 1 and ("test_accuracy" if name in COUNTS else name) in study[0]


def value_of(name: str, value: object) -> str:
    """Write a metric's value: a count whole, a loss in nats, a share as a percentage."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if "loss" in name else f"{value:.2%}"
    return NONE if value is None else code(value)


def amount(name: str, value: float, sign: str = "", more: int = 0) -> str:
    """Write how far two values of a metric are apart, to as many places as they have and some more."""
    if "accuracy" in name or "error" in name:
        return f"{100 * value:{sign}.{2 + more}f} points"
    return f"{value:{sign},.{(4 if 'loss' in name else 0) + more}f}"


def render_metrics(found: Retraining) -> list[str]:
    """List the metrics that differ from the base's, those of single classes folded, and say what their spread is."""
    rows = differences(found)
    if not rows:
        return ["None changed."]
    by_class = [row for row in rows if row.name.startswith(PER_CLASS)]
    lines = [metrics_table([row for row in rows if row not in by_class])]
    if by_class:
        lines.append(folded("By class", metrics_table(by_class)))
    sources = [f"of the {len(found.study)} seeds of `{STUDY}`"] if len(found.study) > 1 else []
    if any(row.spread.endswith("*") for row in rows):
        sources.append("\\*: of a share of images, by the binomial distribution")
    if found.before and sources:
        lines.append(
            "Two runs that differ by their seeds alone are within the spread of each other 19 times in 20: 2√2 "
            f"standard deviations ({'; '.join(sources)})."
        )
    return lines


def metrics_table(rows: Sequence[Difference]) -> str:
    """Return the table of some metrics."""
    return markdown_table(
        ["Metric", "Base", "This run", "Difference", "Spread", "Difference is"],
        [[code(row.name), row.before, row.after, row.difference, row.spread, row.verdict] for row in rows],
    )


def render_curves(found: Retraining) -> list[str]:
    """Draw both runs' accuracy and loss on the images that monitor a training."""
    monitors = ["validation" if state.params.get(VALIDATION) else "test" for state in (found.base, found.head) if state]
    legend = f"By epoch, on the {monitors[-1]} images."
    if found.before:
        legend = f"By epoch. Grey: the base, on its {monitors[0]} images; blue: this run, on its {monitors[1]} images."
    return [legend, *(draw_curves(quantity, found) for quantity in ("accuracy", "loss"))]


def draw_curves(quantity: str, found: Retraining) -> str:
    """Draw the monitor's loss or accuracy by Mermaid (mermaid.js.org/syntax/xyChart.html); a line ends with its run."""
    scale, title = (100, "accuracy, %") if quantity == "accuracy" else (1, "loss, nats an image")
    histories = [results.history for results in (found.before, found.after) if results]
    curves = [[scale * row[f"monitor_{quantity}"] for row in history] for history in histories]
    values = [value for curve in curves for value in curve]
    low, high = (math.floor(min(values)), 100) if quantity == "accuracy" else (0, math.ceil(100 * max(values)) / 100)
    colours = ", ".join([GREY, BLUE][-len(curves) :])
    return "\n".join(
        [
            "```mermaid",
            f'%%{{init: {{"themeVariables": {{"xyChart": {{"plotColorPalette": "{colours}"}}}}}}}}%%',
            "xychart-beta",
            f'    x-axis "epoch" {list(range(1, max(map(len, curves)) + 1))}',
            f'    y-axis "{title}" {low:g} --> {high:g}',
            *(f"    line [{', '.join(f'{value:.4g}' for value in curve)}]" for curve in curves),
            "```",
        ]
    )


def render_confusions(found: Retraining) -> list[str]:
    """Count how often each digit is taken for each, by both runs where they differ."""
    after = found.after.confusion.tolist()
    before = found.before.confusion.tolist() if found.before else after
    rows = [
        [
            f"**{label}**",
            *(f"{old} → {new}" if old != new else str(new or "·") for old, new in zip(*counts, strict=True)),
        ]
        for label, counts in enumerate(zip(before, after, strict=True))
    ]
    both = ": base → this run where they differ" if found.before else ""
    return [
        folded(
            f"Confusion matrix, label by row, prediction by column{both}",
            markdown_table(["", *map(str, range(CLASSES))], rows),
        )
    ]


def compare_mistakes(found: Retraining) -> dict[str, list[tuple[Row, Row]]] | None:
    """Return the rows before and after of the images that are newly wrong and of those that are mended.

    The surest mistakes come first. Return None where there are no two runs on images of the same labels.
    """
    before = found.before.predictions if found.before else []
    if [row["label"] for row in before] != [row["label"] for row in found.after.predictions]:
        return None
    pairs = list(zip(before, found.after.predictions, strict=True))
    new_mistakes = [(old, new) for old, new in pairs if right(old) and not right(new)]
    mended = [(old, new) for old, new in pairs if not right(old) and right(new)]
    return {
        "new": sorted(new_mistakes, key=lambda pair: -pair[1]["probability"]),
        "mended": sorted(mended, key=lambda pair: -pair[0]["probability"]),
    }


def right(row: Row) -> bool:
    """Say whether a prediction is right."""
    return row["prediction"] == row["label"]


def render_mistakes(found: Retraining) -> list[str]:
    """List the mistakes that are new and those that are mended."""
    mistakes = compare_mistakes(found)
    if mistakes is None:
        return ["The base was tested on other images: no mistake can be told to be new."] if found.before else []
    lines = [f"**{len(mistakes['new']):,} new, {len(mistakes['mended']):,} mended.**"]
    for kind, pairs in mistakes.items():
        if not pairs:
            continue
        shown = pairs[:LISTED]
        rows = [
            [f"{new['index']:.0f}", f"{new['label']:.0f}"]
            + [f"{row['prediction']:.0f} ({row['probability']:.1%})" for row in (old, new)]
            for old, new in shown
        ]
        head = ["Test image", "Label", "Base", "This run"]
        rest = f", the surest {LISTED} of {len(pairs):,}" if len(pairs) > LISTED else ""
        lines.append(folded(f"{kind.capitalize()}{rest}", markdown_table(head, rows)))
    return lines


def folded(summary: str, content: str) -> str:
    """Fold Markdown under a summary of our own words."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def listed(names: Sequence[str]) -> str:
    """List names, the first few of many."""
    shown = ", ".join(map(code, names[:4]))
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def code(value: object) -> str:
    """Write what may be a stranger's as a code span, which nothing in it can end, nor the table cell around it."""
    text = "".join(
        character if character.isprintable() and character not in "`|\\" else "�" for character in str(value)
    )
    return f"`{text[: LONGEST - 1] + '…' if len(text) > LONGEST else text or ' '}`"


def write_pictures(directory: Path, found: Retraining) -> None:
    """Fill a directory with both runs' charts, side by side, and the new and the mended mistakes, as PNG files."""
    shutil.rmtree(directory, ignore_errors=True)
    states = {"base": found.base, "this run": found.head}
    for name in CHARTS:
        files = {title: state.directory / FIGURES / f"{name}.png" for title, state in states.items() if state}
        pictures = [(title, Image.open(file)) for title, file in files.items() if file.is_file()]
        if pictures:
            write_sheet(directory / f"{name}.png", pictures, columns=2)
    mistakes = compare_mistakes(found)
    if mistakes:
        test = load_digits(RAW, "test")
        for kind, pairs in mistakes.items():
            wrong = [old if kind == "mended" else new for old, new in pairs[:PICTURED]]
            if wrong:
                captions = [f"{row['index']:.0f}: {row['label']:.0f} as {row['prediction']:.0f}" for row in wrong]
                digits = [enlarge(test.pixels[int(row["index"])].numpy()) for row in wrong]
                write_sheet(directory / f"{kind}.png", list(zip(captions, digits, strict=True)), columns=10)
