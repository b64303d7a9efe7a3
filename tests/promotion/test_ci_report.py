"""The comment on a retraining: what ran, what changed and by how much, whatever the base is and whoever wrote it."""

import json
import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from support import DATA
from support.made_up import DATA, DIGITS, MadeUpRun
from support.repository import Repository
from support.tables import rows, table, tables

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.promotion.ci_report.report import (
    MARKER,
    Retraining,
    State,
    check_out,
    code,
    render_report,
    write_pictures,
)
from mnist_pipeline.promotion.gate import Verdict
from mnist_pipeline.report.results import Results

LABELS = DIGITS["test"].labels.tolist()
RIGHT = 0.91  # the probability of a right prediction of a made-up run
VERDICTS = [Verdict("test accuracy", "at least 90.00%", "98.00%", True)]
STUDY = [{"seed": str(seed), "test_accuracy": accuracy} for seed, accuracy in enumerate(("0.97", "0.98", "0.99"))]


def wrong(*places: int, probability: float = 0.6) -> dict[int, tuple[int, float]]:
    """Take these images for the digit after theirs."""
    return {place: ((LABELS[place] + 1) % 10, probability) for place in places}


def stages(learning_rate: float = 0.001, model: str = "1") -> dict[str, Any]:
    """Return what `dvc.lock` would have of two stages."""
    return {
        "train": {
            "cmd": "python stages/train.py",
            "deps": [{"path": "src/training.py", "md5": "a"}],
            "params": {"params.yaml": {"train": {"learning_rate": learning_rate}}},
            "outs": [{"path": "models/model", "md5": model}],
        },
        "evaluate": {
            "cmd": "python stages/evaluate.py",
            "deps": [{"path": "models/model", "md5": model}],
            "outs": [{"path": "reports/metrics.json", "md5": model}],
        },
    }


def state(directory: Path, learning_rate: float = 0.001, model: str = "1", **params: object) -> State:
    return State(directory, {"train.learning_rate": learning_rate, **params}, stages(learning_rate, model))


def results(directory: Path, mistakes: Mapping[int, tuple[int, float]], epochs: int = 3) -> Results:
    return MadeUpRun.create(directory, mistakes, epochs).results


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Retraining:
    """Another learning rate: images 10 to 12 are newly wrong, 20 is mended, 5 is wrong as before."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    return Retraining(
        commit="0123456789abcdef",
        base=state(before),
        head=state(after, 0.002, "2"),
        before=results(before, wrong(5, 20)),
        after=results(after, wrong(5, 10, 11) | wrong(12, probability=0.95), epochs=2),
        verdicts=VERDICTS,
    )


@pytest.fixture
def unchanged(changed: Retraining) -> Retraining:
    assert changed.base
    assert changed.before
    return replace(changed, head=changed.base, after=changed.before)


def sections(report: str) -> list[str]:
    return re.findall("^#+ (.+)$", report, re.MULTILINE)


def test_it_begins_with_its_marker_and_has_its_sections(changed: Retraining) -> None:
    report = render_report(changed)
    assert report.startswith(MARKER)
    assert sections(report) == [
        "Retraining against `0123456`",
        "What ran",
        "Params",
        "Metrics",
        "Learning curves",
        "Misclassified digits",
        "Gate",
    ]


def test_it_is_the_same_again(changed: Retraining) -> None:
    assert render_report(changed) == render_report(replace(changed))


def test_all_rows_of_a_table_have_the_same_number_of_cells(changed: Retraining) -> None:
    found = tables(render_report(changed))
    assert len(found) == 9
    assert all({len(row) for row in one} == {len(one[0])} for one in found)


def test_one_row_says_it_all(changed: Retraining) -> None:
    assert table(render_report(changed), "Gate") == [
        ["passed", "99.00% → 98.00%, within the spread", "2 → 4", "`train`, `evaluate`"]
    ]


def test_the_gates_verdict_is_there_with_the_rules_that_fail(changed: Retraining) -> None:
    failing = [*VERDICTS, Verdict("parameters", "at most 20,000", "30,000", False)]
    report = render_report(replace(changed, verdicts=failing))
    assert table(report, "Gate")[0][0] == "**failed**: parameters"
    assert "30,000" in report[report.index("### Gate") :]


def test_a_stage_ran_where_the_lock_differs_from_the_bases(changed: Retraining) -> None:
    assert table(render_report(changed), "Stage") == [
        ["`train`", "**yes**", "`train.learning_rate` changed"],
        ["`evaluate`", "**yes**", "`models/model` changed"],
    ]


def test_of_an_unchanged_commit_nothing_ran(unchanged: Retraining) -> None:
    report = render_report(unchanged)
    assert "**Nothing ran**: `dvc.lock` is the base's." in report
    assert table(report, "Gate") == [["passed", "99.00% → 99.00%", "2 → 2", "nothing"]]
    assert report.count("None changed.") == 2
    assert sections(report)[-2:] == ["Metrics", "Gate"]


def test_what_dvc_says_stands_above_the_lock(changed: Retraining, unchanged: Retraining) -> None:
    assert "**Nothing ran**: no stage had to." in render_report(replace(changed, executed=[]))
    restored = rows(render_report(replace(changed, executed=["evaluate"])))
    assert restored["`train`"] == ["no", "`train.learning_rate` changed; its outputs are committed, or from a cache"]
    assert restored["`evaluate`"][0] == "**yes**"
    again = rows(render_report(replace(unchanged, executed=["train"])))
    assert again["`train`"] == ["**yes**", "its outputs were in no cache"]
    assert again["`evaluate`"] == ["no", "nothing changed"]


def test_other_outputs_of_the_same_inputs_are_told(changed: Retraining) -> None:
    report = render_report(replace(changed, head=state(changed.head.directory, model="2")))
    assert rows(report)["`train`"][1].startswith("other outputs of the same inputs")


def test_params_that_differ_are_listed(changed: Retraining) -> None:
    head = state(changed.head.directory, 0.002, "2", seed=1)
    assert table(render_report(replace(changed, head=head)), "Param") == [
        ["`train.learning_rate`", "`0.001`", "`0.002`"],
        ["`seed`", "–", "`1`"],
    ]


def test_without_a_study_the_spread_is_the_binomial_one(changed: Retraining) -> None:
    spread = 2 * math.sqrt(2) * math.sqrt(0.985 * 0.015 / 200)
    found = rows(render_report(changed))
    assert found["`test_accuracy`"] == ["99.00%", "98.00%", "-1.00 points", f"{100 * spread:.3f} points*", "within"]
    assert found["`test_misclassified`"] == ["2", "4", "+2", f"{200 * spread:.1f}*", "within"]
    assert found["`test_loss`"][3:] == ["", "not known"]
    assert "`test_total`" not in found


def test_with_a_study_the_spread_is_that_over_its_seeds(changed: Retraining) -> None:
    report = render_report(replace(changed, study=STUDY))
    found = rows(report)
    spread = 2 * math.sqrt(2) * 0.01  # the standard deviation of 97, 98 and 99%
    assert found["`test_accuracy`"][3:] == [f"{100 * spread:.3f} points", "within"]
    assert found["`test_misclassified`"][3:] == [f"{200 * spread:.1f}", "within"]
    assert found["`test_undisputed_accuracy`"][3].endswith("*")  # which this study did not measure
    assert "of the 3 seeds of `reports/studies/specification.csv`" in report


@pytest.mark.parametrize(("deviation", "verdict"), [(0.0036, "within"), (0.0035, "**beyond**")])
def test_a_difference_is_within_two_standard_deviations_of_a_difference(
    changed: Retraining, deviation: float, verdict: str
) -> None:
    study = [{"test_accuracy": str(0.98 + step * deviation)} for step in (-1, 0, 1)]
    report = render_report(replace(changed, study=study))
    assert rows(report)["`test_accuracy`"][-1] == verdict
    assert table(report, "Gate")[0][1] == f"99.00% → 98.00%, {verdict} the spread"


def test_the_curves_are_mermaid_charts_of_both(changed: Retraining) -> None:
    accuracy, loss = re.findall("```mermaid\n(.+?)\n```", render_report(changed), re.DOTALL)
    assert accuracy.splitlines()[1:] == [
        "xychart-beta",
        '    x-axis "epoch" [1, 2, 3]',
        '    y-axis "accuracy, %" 87 --> 100',
        "    line [87.5, 93.75, 95.83]",
        "    line [87.5, 93.75]",
    ]
    assert loss.splitlines()[3:] == [
        '    y-axis "loss, nats an image" 0 --> 0.4',
        "    line [0.4, 0.2, 0.1333]",
        "    line [0.4, 0.2]",
    ]
    settings = json.loads(accuracy.splitlines()[0].removeprefix("%%{init: ").removesuffix("}%%"))
    assert len(settings["themeVariables"]["xyChart"]["plotColorPalette"].split(", ")) == 2


def test_curves_on_other_images_are_named(changed: Retraining) -> None:
    head = state(changed.head.directory, 0.002, "2", **{"data.validation_size": 50})
    report = render_report(replace(changed, head=head))
    assert "Grey: the base, on its test images; blue: this run, on its validation images." in report


def test_the_confusion_matrix_holds_both(changed: Retraining) -> None:
    matrix = table(render_report(changed), "", "0")
    assert changed.before
    before, after = changed.before.confusion, changed.after.confusion
    for label, (_, *cells) in enumerate(matrix):
        for prediction, cell in enumerate(cells):
            old, new = before[label, prediction], after[label, prediction]
            assert cell == (f"{old} → {new}" if old != new else str(new or "·"))


def test_mistakes_are_new_or_mended_the_surest_first(changed: Retraining) -> None:
    report = render_report(changed)
    assert "**3 new, 1 mended.**" in report
    [new, mended] = [found[2:] for found in tables(report) if found[0][0] == "Test image"]
    assert [int(row[0]) for row in new] == [12, 10, 11]
    label = LABELS[12]
    assert new[0][1:] == [str(label), f"{label} ({RIGHT:.1%})", f"{(label + 1) % 10} (95.0%)"]
    label = LABELS[20]
    assert mended == [["20", str(label), f"{(label + 1) % 10} (60.0%)", f"{label} ({RIGHT:.1%})"]]


def test_of_other_test_images_no_mistake_is_new(changed: Retraining) -> None:
    fewer = replace(changed.after, predictions=changed.after.predictions[:-1])
    report = render_report(replace(changed, after=fewer))
    assert "The base was tested on other images: no mistake can be told to be new." in report


def test_a_run_that_is_always_wrong_fits_into_a_comment(changed: Retraining, tmp_path: Path) -> None:
    report = render_report(replace(changed, after=results(tmp_path, wrong(*range(200)), epochs=100)))
    assert "New, the surest 20 of 198" in report
    assert len(report) < 65_536


def test_without_a_base_the_figures_stand_alone(changed: Retraining) -> None:
    report = render_report(replace(changed, commit="", base=None, before=None))
    assert "There is no commit to compare with." in report
    assert rows(report)["`test_accuracy`"][:2] == ["–", "98.00%"]
    assert rows(report)["`train`"] == ["**yes**", "not in the base"]
    assert all(chart.count("line") == 1 for chart in re.findall("```mermaid\n(.+?)\n```", report, re.DOTALL))


def test_a_base_without_reports_is_told_with_what_would_be_right(changed: Retraining) -> None:
    report = render_report(replace(changed, before=None))
    assert "The base has no reports to compare with: `make repro` in it, then commit what it wrote." in report
    assert table(report, "Param")


def test_a_base_whose_reports_are_of_an_earlier_state_is_told(changed: Retraining) -> None:
    assert changed.base
    (changed.base.directory / "src").mkdir(exist_ok=True)
    (changed.base.directory / "src/training.py").write_text("another", encoding="utf-8")
    base = replace(changed.base, params={"train.learning_rate": 0.003})
    report = render_report(replace(changed, base=base))
    assert "are older than the base: `train.learning_rate`, `src/training.py` changed since" in report
    (changed.base.directory / "src/training.py").unlink()
    assert "older than" not in render_report(changed)


def test_time_and_artifacts_are_told_where_they_are_known(changed: Retraining) -> None:
    report = render_report(replace(changed, training_seconds=252, artifacts="https://example.com/1#artifacts"))
    assert "The training took about 4.2 minutes." in report
    assert "](<https://example.com/1#artifacts>)" in report
    assert "took" not in render_report(changed)


HOSTILE = [
    "a|b",
    "a\\|b",
    "`|`",
    "``` <script>alert(1)</script>",
    "line\n\n# heading\n| x |",
    "</details><img src=x>",
    "[link](https://example.com)",
    "@someone <!-- mnist -->",
    "\u202egpj.exe",
    "",
    " ",
    "x" * 200_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_ends_neither_its_code_span_nor_its_cell(text: str) -> None:
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = markdown.parse(f"| a | b |\n| --- | --- |\n| {code(text)} | c |")
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    assert [[child.type for child in cell] for cell in cells[2:]] == [["code_inline"], ["text"]]
    assert len(code(text)) <= 82
    assert code(text).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_names_and_values_leave_the_report_as_it_is(changed: Retraining, text: str) -> None:
    train = {**stages()["train"], "cmd": text, "deps": [{"path": text, "md5": text}]}
    head = State(changed.head.directory, {text: text}, {text: train, "train": train})
    after = replace(changed.after, metrics={**changed.after.metrics, text: text})
    verdicts = [Verdict("git tree", "clean", text, False)]
    report = render_report(replace(changed, head=head, after=after, verdicts=verdicts))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(report)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    blocks = "".join(token.content for token in tokens if token.type == "html_block")
    assert re.fullmatch(rf"({MARKER}\n|<details><summary>[\w ,:→]+</summary>\n|</details>\n)+", blocks)
    assert sections(report) == sections(render_report(changed))
    assert len(report) < 65_536


def test_the_pictures_show_both_charts_and_the_digits(
    changed: Retraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ci_report, "RAW", DATA)
    assert changed.base
    for one in (changed.base, changed.head):
        (one.directory / "reports/figures").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), "white").save(one.directory / "reports/figures/loss.png")
    (tmp_path / "mended.png").touch()  # of an earlier report
    write_pictures(tmp_path, changed)
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "mended.png", "new.png"}
    sizes = {path.stem: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes["loss"] > (600, 200)
    assert sizes["new"][0] > 3 * 28 * 4
    pictures = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_pictures(tmp_path, changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == pictures


@pytest.mark.parametrize("revision", ["nowhere", "--help", "", "HEAD~9999999"])
def test_a_revision_that_is_not_there_ends_in_one_line(revision: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--base must be a commit that this repository has, and is [^\n]+$"):
        check_out(revision, tmp_path)


def test_the_null_revision_is_no_base(tmp_path: Path) -> None:
    assert check_out("0" * 40, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["javascript:alert(1)", "https://a b", "https://a>)|", "x"])
def test_an_address_that_is_none_ends_in_one_line(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--artifacts must be an address that begins with https://, and is "):
        ci_report.write_ci_report("HEAD", tmp_path / "report.md", artifacts=address)


@dataclass(frozen=True)
class Report:
    """What the command said and wrote."""

    process: "subprocess.CompletedProcess[str]"
    text: str
    pictures: set[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Commit a run, then another of fewer epochs, and report on each against what came before."""
    repository = Repository.create(tmp_path_factory.mktemp("repository")).init()
    found: dict[str, Report] = {}

    def report(name: str, *arguments: str) -> None:
        out = repository.root / "ci-report.md"
        out.unlink(missing_ok=True)
        process = repository.run("mnist", "ci-report", "--out", "ci-report.md", *arguments)
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        found[name] = Report(process, text, {path.name for path in repository.root.glob("ci-report-pictures/*")})

    def repro() -> None:
        process = repository.dvc("repro")
        process.check_returncode()
        (repository.root / "ci-report.log").write_text(process.stdout, encoding="utf-8")

    report("before any run", "--base", "HEAD")
    repro()
    repository.commit()
    report("unchanged", "--base", "HEAD")
    repro()
    report("unchanged by its log", "--base", "HEAD", "--log", "ci-report.log")
    repository.set_param("epochs", "1")
    repro()
    report("by its log", "--base", "HEAD", "--log", "ci-report.log")
    repository.commit()
    report("changed", "--base", "HEAD~1", "--artifacts", "https://example.com/artifacts")
    report("again", "--base", "HEAD~1", "--artifacts", "https://example.com/artifacts")
    report("against a base without reports", "--base", "HEAD~2")
    report("against nothing", "--base", "0" * 40)
    report("against a revision that is not there", "--base", "HEAD~3")
    return found


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["unchanged", "unchanged by its log"])
def test_of_an_unchanged_commit_the_command_says_that_nothing_ran(story: dict[str, Report], name: str) -> None:
    assert story[name].process.returncode == 0, story[name].process.stdout
    assert "**Nothing ran**" in story[name].text
    assert story[name].text.count("None changed.") == 2


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["changed", "by its log"])
def test_a_changed_param_is_reported_with_all_that_followed(story: dict[str, Report], name: str) -> None:
    found = story[name]
    assert found.process.returncode == 0, found.process.stdout
    assert [row[:2] for row in table(found.text, "Stage")] == [
        ["`download`", "no"],
        ["`train`", "**yes**"],
        ["`evaluate`", "**yes**"],
        ["`report`", "**yes**"],
    ]
    assert table(found.text, "Param") == [["`train.epochs`", "`2`", "`1`"]]
    assert "`test_loss`" in rows(found.text)
    assert "The training took about" in found.text
    assert "older than" not in found.text
    assert {"accuracy.png", "loss.png", "confusion_matrix.png", "reliability.png"} <= found.pictures
    assert "new.png" in found.pictures or "**0 new" in found.text


@pytest.mark.pipeline
def test_the_command_writes_the_same_again(story: dict[str, Report]) -> None:
    assert story["again"].text == story["changed"].text != ""


@pytest.mark.pipeline
def test_a_base_without_reports_and_none_are_reported(story: dict[str, Report]) -> None:
    assert "The base has no reports to compare with" in story["against a base without reports"].text
    assert "There is no commit to compare with." in story["against nothing"].text


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("before any run", "error: reports/history.csv cannot be read"),
        ("against a revision that is not there", "error: --base must be a commit that this repository has"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(story: dict[str, Report], name: str, line: str) -> None:
    found = story[name]
    assert found.process.returncode == 1
    assert found.process.stdout.startswith(line)
    assert found.process.stdout.count("\n") == 1
    assert found.text == ""
