"""The comment on a retraining: what ran, what changed and by how much, for any base and any author."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from support.made_up import DATA, DIGITS, MadeUpRun
from support.repository import Repository
from support.stores import isolated_tracking
from support.tables import rows, table, tables

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.promotion.ci_report import pictures
from mnist_pipeline.promotion.ci_report.comment import code, render_comment, write_ci_report
from mnist_pipeline.promotion.ci_report.differences import Retraining
from mnist_pipeline.promotion.ci_report.pictures import write_pictures
from mnist_pipeline.promotion.ci_report.state import State, check_out
from mnist_pipeline.promotion.gate import Verdict
from mnist_pipeline.report.results import Results
from mnist_pipeline.report.studies import Study

MARKER = "<!-- mnist ci-report -->"
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
    return replace(MadeUpRun.create(directory, mistakes, epochs).results, studies=[])


def with_study(run: Retraining, rows: Sequence[dict[str, str]]) -> Retraining:
    return replace(run, after=replace(run.after, studies=[Study("specification", rows)]))


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
    report = render_comment(changed)
    assert report.startswith(f"{MARKER}\n")
    assert sections(report) == [
        "Retraining against `0123456`",
        "What ran",
        "Params",
        "Metrics",
        "Learning curves",
        "Misclassified images",
        "Gate",
    ]


def test_it_is_the_same_again(changed: Retraining) -> None:
    assert render_comment(changed) == render_comment(replace(changed))


def test_all_rows_of_a_table_have_the_same_number_of_cells(changed: Retraining) -> None:
    found = tables(render_comment(changed))
    assert len(found) == 9
    assert all({len(row) for row in one} == {len(one[0])} for one in found)


def test_the_first_row_sums_it_up(changed: Retraining) -> None:
    assert table(render_comment(changed), "Gate") == [
        ["passed", "99.00% → 98.00%, within the spread", "2 → 4", "`train`, `evaluate`"]
    ]


def test_the_gates_verdict_is_there_with_the_rules_that_fail(changed: Retraining) -> None:
    failing = [*VERDICTS, Verdict("parameters", "at most 20,000", "30,000", False)]
    report = render_comment(replace(changed, verdicts=failing))
    assert table(report, "Gate")[0][0] == "**failed**: parameters"
    assert "30,000" in report[report.index("### Gate") :]


def test_a_stage_ran_where_the_lock_differs_from_the_bases(changed: Retraining) -> None:
    assert table(render_comment(changed), "Stage") == [
        ["`train`", "**yes**", "`train.learning_rate` changed"],
        ["`evaluate`", "**yes**", "`models/model` changed"],
    ]


def test_nothing_ran_in_an_unchanged_commit(unchanged: Retraining) -> None:
    report = render_comment(unchanged)
    assert "**Nothing ran**: `dvc.lock` is the same as in the base." in report
    assert table(report, "Gate") == [["passed", "99.00% → 99.00%", "2 → 2", "nothing"]]
    assert report.count("None changed.") == 2
    assert sections(report)[-2:] == ["Metrics", "Gate"]


def test_dvcs_log_overrides_the_lock(changed: Retraining, unchanged: Retraining) -> None:
    assert "**Nothing ran**: no stage had to run." in render_comment(replace(changed, executed=[]))
    restored = rows(render_comment(replace(changed, executed=["evaluate"])))
    assert restored["`train`"] == ["no", "`train.learning_rate` changed; its outputs are committed or were cached"]
    assert restored["`evaluate`"][0] == "**yes**"
    again = rows(render_comment(replace(unchanged, executed=["train"])))
    assert again["`train`"] == ["**yes**", "no cache had its outputs"]
    assert again["`evaluate`"] == ["no", "nothing changed"]


def test_other_outputs_of_the_same_inputs_are_reported(changed: Retraining) -> None:
    report = render_comment(replace(changed, head=state(changed.head.directory, model="2")))
    assert rows(report)["`train`"][1].startswith("same inputs but other outputs")


def test_params_that_differ_are_listed(changed: Retraining) -> None:
    head = state(changed.head.directory, 0.002, "2", seed=1)
    assert table(render_comment(replace(changed, head=head)), "Param") == [
        ["`train.learning_rate`", "`0.001`", "`0.002`"],
        ["`seed`", "–", "`1`"],
    ]


def test_without_a_study_the_spread_is_the_binomial_one(changed: Retraining) -> None:
    spread = 2 * math.sqrt(2) * math.sqrt(0.985 * 0.015 / 200)
    found = rows(render_comment(changed))
    assert found["`test_accuracy`"] == ["99.00%", "98.00%", "-1.00 points", f"{100 * spread:.3f} points*", "within"]
    assert found["`test_misclassified`"] == ["2", "4", "+2", f"{200 * spread:.1f}*", "within"]
    assert found["`test_loss`"][3:] == ["", "not known"]
    assert "`test_total`" not in found


def test_with_a_study_the_spread_is_that_over_its_seeds(changed: Retraining) -> None:
    report = render_comment(with_study(changed, STUDY))
    found = rows(report)
    spread = 2 * math.sqrt(2) * 0.01  # the standard deviation of 97, 98 and 99%
    assert found["`test_accuracy`"][3:] == [f"{100 * spread:.3f} points", "within"]
    assert found["`test_misclassified`"][3:] == [f"{200 * spread:.1f}", "within"]
    assert found["`test_undisputed_accuracy`"][3].endswith("*")  # which this study did not measure
    assert "over the 3 seeds of `reports/studies/specification.csv`" in report


@pytest.mark.parametrize(("deviation", "verdict"), [(0.0036, "within"), (0.0035, "**beyond**")])
def test_a_difference_is_within_two_standard_deviations_of_a_difference(
    changed: Retraining, deviation: float, verdict: str
) -> None:
    study = [{"seed": str(step), "test_accuracy": str(0.98 + step * deviation)} for step in (-1, 0, 1)]
    report = render_comment(with_study(changed, study))
    assert rows(report)["`test_accuracy`"][-1] == verdict
    assert table(report, "Gate")[0][1] == f"99.00% → 98.00%, {verdict} the spread"


def test_the_curves_are_mermaid_charts_of_both(changed: Retraining) -> None:
    accuracy, loss = re.findall("```mermaid\n(.+?)\n```", render_comment(changed), re.DOTALL)
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


def test_the_legend_names_the_images_of_each_curve(changed: Retraining) -> None:
    head = state(changed.head.directory, 0.002, "2", **{"data.validation_size": 50})
    report = render_comment(replace(changed, head=head))
    assert "Grey: the base, on its test images; blue: this run, on its validation images." in report


def test_the_confusion_matrix_holds_both(changed: Retraining) -> None:
    matrix = table(render_comment(changed), "", "0")
    assert changed.before
    before, after = changed.before.confusion, changed.after.confusion
    for label, (_, *cells) in enumerate(matrix):
        for prediction, cell in enumerate(cells):
            old, new = before[label, prediction], after[label, prediction]
            assert cell == (f"{old} → {new}" if old != new else str(new or "·"))


def test_classes_have_their_names(tmp_path: Path, changed: Retraining) -> None:
    names = ["Coat", "T-shirt/top", *"ABCDEFGH"]
    before = replace(MadeUpRun.create(tmp_path / "before", wrong(5), classes=names).results, studies=[])
    after = replace(MadeUpRun.create(tmp_path / "after", wrong(10), classes=names).results, studies=[])
    report = render_comment(replace(changed, before=before, after=after))
    label, prediction = names[LABELS[10]], names[(LABELS[10] + 1) % 10]
    mistakes = [row for found in tables(report) if found[0][0] == "Test image" for row in found]
    assert ["10", label, f"{label} (91.0%)", f"{prediction} (60.0%)"] in mistakes
    assert [row[0] for row in table(report, "", "Coat")][:3] == ["**Coat**", "**`T-shirt/top`**", "**A**"]
    other = render_comment(replace(changed, before=changed.before, after=after))
    assert next(row[0] for row in table(other, "", "Coat")) == "**Coat**"
    assert "The base was tested on other images" in other


def test_mistakes_are_new_or_mended_the_surest_first(changed: Retraining) -> None:
    report = render_comment(changed)
    assert "**3 new, 1 mended.**" in report
    [new, mended] = [found[2:] for found in tables(report) if found[0][0] == "Test image"]
    assert [int(row[0]) for row in new] == [12, 10, 11]
    label = LABELS[12]
    assert new[0][1:] == [str(label), f"{label} ({RIGHT:.1%})", f"{(label + 1) % 10} (95.0%)"]
    label = LABELS[20]
    assert mended == [["20", str(label), f"{(label + 1) % 10} (60.0%)", f"{label} ({RIGHT:.1%})"]]


def test_mistakes_on_other_test_images_are_not_compared(changed: Retraining) -> None:
    fewer = replace(changed.after, predictions=changed.after.predictions[:-1])
    report = render_comment(replace(changed, after=fewer))
    assert "The base was tested on other images, so this report cannot tell which mistakes are new." in report


def test_mistakes_are_not_compared_with_predictions_that_dvc_lost(changed: Retraining) -> None:
    assert changed.before
    report = render_comment(replace(changed, before=replace(changed.before, predictions=[])))
    assert "DVC has the base's predictions neither in its cache nor in a remote" in report
    assert not [found for found in tables(report) if found[0][0] == "Test image"]


def test_a_run_that_is_always_wrong_fits_into_a_comment(changed: Retraining, tmp_path: Path) -> None:
    report = render_comment(replace(changed, after=results(tmp_path, wrong(*range(200)), epochs=100)))
    assert "New, the 20 most confident of 198" in report
    assert len(report) < 65_536


def test_without_a_base_the_figures_stand_alone(changed: Retraining) -> None:
    report = render_comment(replace(changed, commit="", base=None, before=None))
    assert "There is no commit to compare with." in report
    assert rows(report)["`test_accuracy`"][:2] == ["–", "98.00%"]
    assert rows(report)["`train`"] == ["**yes**", "not in the base"]
    assert all(chart.count("line") == 1 for chart in re.findall("```mermaid\n(.+?)\n```", report, re.DOTALL))


def test_a_base_without_reports_is_reported_with_the_remedy(changed: Retraining) -> None:
    report = render_comment(replace(changed, before=None))
    assert "The base has no reports to compare with: run `make repro` there and commit the outputs." in report
    assert table(report, "Param")


def test_a_base_whose_reports_are_older_is_reported(changed: Retraining) -> None:
    assert changed.base
    (changed.base.directory / "src").mkdir(exist_ok=True)
    (changed.base.directory / "src/training.py").write_text("another", encoding="utf-8")
    base = replace(changed.base, params={"train.learning_rate": 0.003})
    report = render_comment(replace(changed, base=base))
    assert "are older than the base: `train.learning_rate`, `src/training.py` changed since" in report
    (changed.base.directory / "src/training.py").unlink()
    assert "older than" not in render_comment(changed)


def test_time_and_artifacts_are_reported_if_known(changed: Retraining) -> None:
    report = render_comment(replace(changed, training_seconds=252, artifacts="https://example.com/1#artifacts"))
    assert "The training took about 4.2 minutes." in report
    assert "](<https://example.com/1#artifacts>)" in report
    assert "took" not in render_comment(changed)


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
    by_class = {**changed.after.metrics["test_per_class_accuracy"], text: 0.5}  # a class of that name
    metrics = {**changed.after.metrics, text: text, "test_per_class_accuracy": by_class}
    predictions = [{**row, "prediction": text} for row in changed.after.predictions]
    after = replace(changed.after, metrics=metrics, predictions=predictions)
    verdicts = [Verdict("git tree", "clean", text, False)]
    report = render_comment(replace(changed, head=head, after=after, verdicts=verdicts))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(report)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    blocks = "".join(token.content for token in tokens if token.type == "html_block")
    assert re.fullmatch(rf"({MARKER}\n|<details><summary>[\w ,:→]+</summary>\n|</details>\n)+", blocks)
    assert sections(report) == sections(render_comment(changed))
    assert len(report) < 65_536


def test_the_pictures_show_both_charts_and_the_digits(
    changed: Retraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "RAW", DATA)
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
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_pictures(tmp_path, changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize("revision", ["nowhere", "--help", "", "HEAD~9999999"])
def test_a_revision_that_is_not_there_ends_in_one_line(revision: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--base must be a commit that this repository has, and is [^\n]+$"):
        check_out(revision, tmp_path)


def test_the_null_revision_is_no_base(tmp_path: Path) -> None:
    assert check_out("0" * 40, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["javascript:alert(1)", "https://a b", "https://a>)|", "x"])
def test_a_wrong_address_ends_in_one_line(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--artifacts must be an address that begins with https:// or http://, and is "
    ):
        write_ci_report("HEAD", tmp_path / "report.md", artifacts=address)


# The state of a real repository


@pytest.fixture
def repository(trained: Repository, tmp_path: Path) -> Iterator[Repository]:
    """A copy of the trained repository, which is the working directory."""
    copy = trained.copy(tmp_path / "repository")
    with isolated_tracking(copy.root):
        yield copy


def check_out_head(tmp_path: Path) -> State:
    (tmp_path / "base").mkdir()
    check_out("HEAD", tmp_path / "base")
    return State.load(tmp_path / "base")


@pytest.mark.pipeline
@pytest.mark.usefixtures("repository")
def test_folders_are_hashed_as_dvc_does(tmp_path: Path) -> None:
    training = Path("src/mnist_pipeline/training")
    (training / "__pycache__").mkdir(exist_ok=True)
    (training / "__pycache__/loop.pyc").write_bytes(b"bytecode")
    assert State.load(Path()).outdated() == check_out_head(tmp_path).outdated() == []
    (training / "new.py").touch()
    (training.parent / "common/errors.py").write_text("changed")
    assert State.load(Path()).outdated() == ["src/mnist_pipeline/common", "src/mnist_pipeline/training"]


@pytest.mark.pipeline
def test_a_changed_folder_of_the_base_is_named(repository: Repository, tmp_path: Path) -> None:
    with Path("src/mnist_pipeline/evaluation/metrics.py").open("a") as file:
        file.write("# changed")
    repository.commit()
    assert check_out_head(tmp_path).outdated() == ["src/mnist_pipeline/evaluation"]


@pytest.mark.pipeline
def test_additions_that_git_does_not_hold_are_not_outdated(repository: Repository, tmp_path: Path) -> None:
    Path("data/added/mine.dvc").write_text("outs: []")
    repository.commit()
    assert check_out_head(tmp_path).outdated() == []


@pytest.mark.pipeline
def test_a_changed_bound_of_the_gate_makes_no_report_old(repository: Repository, tmp_path: Path) -> None:
    repository.set_param("margin", 0.5)
    repository.commit()
    assert check_out_head(tmp_path).outdated() == []


@pytest.mark.pipeline
@pytest.mark.usefixtures("repository")
def test_an_unchanged_commit_is_reported_twice_alike(tmp_path: Path) -> None:
    log = tmp_path / "ci-report.log"
    log.write_text("Stage 'train' didn't change, skipping\nData and pipelines are up to date.\n")
    write_ci_report("HEAD", tmp_path / "one.md")
    write_ci_report("HEAD", tmp_path / "other.md", log)
    report = (tmp_path / "one.md").read_text(encoding="utf-8")
    assert report == (tmp_path / "other.md").read_text(encoding="utf-8")
    assert "**Nothing ran**: `dvc.lock` is the same as in the base." in report
    assert report.count("None changed.") == 2
    assert "The training took about" in report
    assert "older than" not in report
    assert {path.name for path in (tmp_path / "one-pictures").iterdir()} == {
        *("accuracy.png", "loss.png", "confusion_matrix.png", "reliability.png")
    }


@pytest.mark.pipeline
@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("HEAD~1", "The base has no reports to compare with"),
        ("0" * 40, "There is no commit to compare with."),
    ],
)
def test_a_base_without_reports_or_no_base_is_reported(tmp_path: Path, base: str, line: str) -> None:
    write_ci_report(base, tmp_path / "report.md")
    assert line in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.pipeline
@pytest.mark.usefixtures("repository")
def test_a_pipeline_that_has_not_run_ends_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    Path("reports/history.csv").unlink()
    with pytest.raises(UserError, match=r"^reports/history.csv cannot be read [^\n]+$"):
        write_ci_report("HEAD", tmp_path / "report.md")
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
