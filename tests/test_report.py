"""The report: every table whole, every figure computed, the checklist evaluated on the run."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import pytest
import torch

from mnist_pipeline.architecture import Layer, describe
from mnist_pipeline.data import Digits, load_digits
from mnist_pipeline.evaluation import measure, predictions
from mnist_pipeline.files import write_csv, write_json
from mnist_pipeline.model import build_model
from mnist_pipeline.params import Params
from mnist_pipeline.reporting import Results, draw_figures, load_results, render_report

MISTAKES = {30: (8, 0.6), 5: (3, 0.95), 100: (7, 0.8)}  # test image: what it is taken for, with what probability
REQUIREMENTS = [
    "Parameter constraint",
    "MNIST dataset",
    "CNN architecture",
    "Batch normalisation",
    "High performance",
    "Modern techniques",
    "Fast training",
    "Documentation",
]


@pytest.fixture
def training(small_data: Path) -> Digits:
    return load_digits(small_data, "train")


@pytest.fixture
def test(small_data: Path) -> Digits:
    return load_digits(small_data, "test")


@pytest.fixture
def layers(params: Params) -> list[Layer]:
    return describe(build_model(params.model, seed=0))


def results_of(
    directory: Path, labels: torch.Tensor, mistakes: Mapping[int, tuple[int, float]], epochs: int = 3
) -> Results:
    """Write what the stages would of these mistakes, all else right with a probability of 0.91, and read it again."""
    probabilities = torch.full((len(labels), 10), 0.01)
    probabilities[range(len(labels)), labels] = 0.91
    for index, (prediction, probability) in mistakes.items():
        probabilities[index] = (1 - probability) / 9
        probabilities[index, prediction] = probability
    history = [
        {
            "epoch": epoch,
            "learning_rate": 0.001 if epoch < 3 else 0.0005,
            "train_loss": 0.5 / epoch,
            "train_accuracy": 1 - 0.25 / epoch,
            "monitor_loss": 0.4 / epoch,
            "monitor_accuracy": 1 - 0.125 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    metrics = measure(probabilities.log(), labels) | {"parameters": 19_210, "model_bytes": 81_432}
    write_csv(directory / "history.csv", history)
    write_json(directory / "metrics.json", metrics)
    write_csv(directory / "predictions.csv", predictions(probabilities.log(), labels))
    return load_results(*(directory / name for name in ("history.csv", "metrics.json", "predictions.csv")))


@pytest.fixture
def results(tmp_path: Path, test: Digits) -> Results:
    return results_of(tmp_path, test.labels, MISTAKES)


@pytest.fixture
def report(params: Params, training: Digits, test: Digits, layers: list[Layer], results: Results) -> str:
    return render_report(params, training, test, layers, results)


def tables(markdown: str) -> list[list[list[str]]]:
    """Return each table's rows of cells."""
    runs = groupby(markdown.splitlines(), key=lambda line: line.startswith("|"))
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for is_table, lines in runs
        if is_table
    ]


def rows(markdown: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cells."""
    return {first: rest for table in tables(markdown) for first, *rest in table}


def met(markdown: str) -> dict[str, bool]:
    return {name: mark == "x" for mark, name in re.findall(r"^- \[([x ])\] \*\*(.+?)\*\*: \S", markdown, re.MULTILINE)}


def test_the_report_has_its_sections(report: str) -> None:
    assert re.findall("^#+ (.+)$", report, re.MULTILINE) == [
        "MNIST digit classification with 19,210 parameters",
        "Results",
        "Data",
        "Architecture",
        "Configuration",
        "Training log",
        "Learning curves",
        "Test performance",
        "Misclassified digits",
        "Requirements",
    ]


def test_all_rows_of_a_table_have_the_same_number_of_cells(report: str) -> None:
    assert len(tables(report)) == 9
    for table in tables(report):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(":?---:?", cell) for cell in table[1])


def test_every_table_stands_apart_from_the_text(report: str) -> None:
    around = re.findall(r"(.*)\n((?:\|.*\n)+)(.*)", report)
    assert len(around) == 9
    assert all(before == "" and after == "" for before, _, after in around)


def test_the_results_stand_beside_the_published_ones(report: str) -> None:
    found = rows(report)
    assert found["Final test accuracy"] == ["98.50%", "99.43%"]
    assert found["Best test accuracy"] == ["95.83% (epoch 3)", "99.43% (epoch 14)"]
    assert found["Test accuracy after epoch 1"] == ["87.50%", "98.26%"]
    assert found["Test loss, first to last epoch"] == ["0.4000 → 0.1333", "0.0541 → 0.0170"]
    assert found["Misclassified test images"] == ["3 of 200", "57 of 10,000"]
    assert found["Parameters"] == ["19,210", "19,210"]
    assert found["Weights, 4 bytes each"] == ["75 KiB", "about 75 KB"]


def test_a_validation_split_is_named_as_such(
    params: Params, training: Digits, test: Digits, layers: list[Layer], results: Results
) -> None:
    data = params.data.model_copy(update={"validation_size": 50})
    found = rows(render_report(params.model_copy(update={"data": data}), training, test, layers, results))
    assert found["of these held out for validation"] == ["50", "0"]
    assert found["Best validation accuracy"][0] == "95.83% (epoch 3)"
    assert "Validation accuracy" in found["Epoch"]
    assert "Final test accuracy" in found


def test_the_data_are_counted(report: str, test: Digits) -> None:
    assert "| Training images | 300 | 60,000 |" in report
    assert "| Test images | 200 | 10,000 |" in report
    assert "| Training share of all images | 60.0% | 85.7% |" in report
    assert f"| Test images | {' | '.join(str(int((test.labels == digit).sum())) for digit in range(10))} |" in report


def test_the_layers_stand_with_their_parameters(report: str) -> None:
    found = rows(report)
    assert found["conv1"][1:] == ["1×28×28 → 6×28×28", "3×3", "1", "60 + 12 = 72", "72", "3×3"]
    assert found["conv2"][4:] == ["550 + 20 = 570", "570", "5×5"]
    assert found["pool1"][1:] == ["10×28×28 → 10×14×14", "2×2", "0", "0", "0", "6×6"]
    assert found["conv4"][4:] == ["2610 + 36 = 2646", "2646", "14×14"]
    assert found["conv7"][1:5] == ["24×3×3 → 10×1×1", "3×3", "0", "2170"]
    assert found["**Total**"][4:6] == ["**19,210**", "**19,210**"]
    assert "1 → 6 → 10 → 16 → 18 → 32 → 24 → 10" in report


def test_the_blocks_shares_are_computed(report: str) -> None:
    found = rows(report)
    assert found["block1"] == ["642", "3.3%", "642", "3.3%"]
    assert found["block2"] == ["4,134", "21.5%", "4,134", "21.5%"]
    assert found["block3"] == ["14,434", "75.1%", "14,434", "75.1%"]


def test_every_param_is_listed(report: str) -> None:
    found = rows(report)
    assert found["`seed`"] == ["0"]
    assert found["`model.dropout_kind`"] == ["element"]
    assert found["`train.scheduler.gamma`"] == ["0.5"]
    assert found["`report.gallery_size`"] == ["60"]


def test_the_log_has_a_row_for_each_epoch(report: str) -> None:
    [log] = [table for table in tables(report) if table[0][0] == "Epoch"]
    assert [row[0] for row in log[2:]] == ["1", "2", "3"]
    assert log[2][1:] == ["0.001", "0.5000", "75.00%", "0.4000", "87.50%", "0.0541", "98.26%"]
    assert log[4][1] == "0.0005"


def test_progress_is_told_by_learning_rate(report: str) -> None:
    found = rows(report)
    assert found["Accuracy in epochs 1 to 2, learning rate 0.001"] == ["87.50% to 93.75%", "98.26% to 98.73%"]
    assert found["Accuracy in epochs 3 to 3, learning rate 0.0005"] == ["95.83% to 95.83%", "99.03% to 99.03%"]
    assert found["Loss reduction"] == ["66.7%", "68.6%"]


def test_epochs_beyond_the_published_ones_stand_alone(
    params: Params, training: Digits, test: Digits, layers: list[Layer], tmp_path: Path
) -> None:
    markdown = render_report(params, training, test, layers, results_of(tmp_path, test.labels, MISTAKES, epochs=15))
    assert rows(markdown)["14"][-2:] == ["0.0170", "99.43%"]
    assert rows(markdown)["15"][-2:] == ["", ""]
    assert met(markdown)["Fast training"] is False


def test_right_images_are_counted_by_class(report: str, test: Digits, results: Results) -> None:
    [by_class] = [table for table in tables(report) if table[0] == ["Class", "Images", "Right", "Accuracy"]]
    wrong = [int(test.labels[index]) for index in MISTAKES]
    for digit, row in enumerate(by_class[2:12]):
        images = int((test.labels == digit).sum())
        right = images - wrong.count(digit)
        assert row == [str(digit), str(images), str(right), f"{right / images:.2%}"]
    assert by_class[12] == ["**All**", "**200**", "**197**", "**98.50%**"]


def test_misclassified_images_come_by_confidence(results: Results) -> None:
    assert [(row["index"], row["prediction"]) for row in results.misclassified] == [(5, 3), (100, 7), (30, 8)]
    assert [row["probability"] for row in results.misclassified] == [0.95, 0.8, 0.6]


def test_misclassified_images_of_the_same_confidence_come_in_file_order(tmp_path: Path, test: Digits) -> None:
    sure = {index: (int(test.labels[index] + 1) % 10, 0.9999999) for index in (150, 20, 70)}
    assert [row["index"] for row in results_of(tmp_path, test.labels, sure).misclassified] == [20, 70, 150]


def test_the_confusion_matrix_counts_labels_by_prediction(results: Results, test: Digits) -> None:
    assert results.confusion.sum() == 200
    assert results.confusion.trace() == 197
    for index, (prediction, _) in MISTAKES.items():
        assert results.confusion[test.labels[index], prediction] == 1


def test_the_most_frequent_confusion_is_named_first(
    params: Params, training: Digits, test: Digits, layers: list[Layer], tmp_path: Path
) -> None:
    fours = (test.labels == 4).nonzero().flatten()[:4].tolist()
    two = int((test.labels == 2).nonzero()[0])
    results = results_of(tmp_path, test.labels, dict.fromkeys(fours, (9, 0.9)) | {two: (7, 0.9)})
    markdown = render_report(params, training, test, layers, results)
    assert "Most frequent confusions: 4 taken for 9 (4×), 2 taken for 7 (1×)." in markdown


@pytest.mark.parametrize(("gallery_size", "shown"), [(60, "all"), (3, "all"), (2, "the first 2")])
def test_the_report_says_how_many_misclassified_digits_it_shows(
    params: Params, training: Digits, test: Digits, layers: list[Layer], results: Results, gallery_size: int, shown: str
) -> None:
    gallery = params.report.model_copy(update={"gallery_size": gallery_size})
    markdown = render_report(params.model_copy(update={"report": gallery}), training, test, layers, results)
    assert f"3 of 200 test images; {shown} of them here" in markdown


def test_a_run_like_the_published_one_meets_every_requirement(
    params: Params, training: Digits, test: Digits, layers: list[Layer], tmp_path: Path
) -> None:
    all_training = Digits(training.pixels[:1].expand(60_000, 28, 28), training.labels.repeat(200))
    all_test = Digits(test.pixels[:1].expand(10_000, 28, 28), test.labels.repeat(50))
    mistakes = {index: (int(all_test.labels[index] + 1) % 10, 0.9) for index in range(57)}
    results = results_of(tmp_path, all_test.labels, mistakes, epochs=14)
    markdown = render_report(params, all_training, all_test, layers, results)
    assert met(markdown) == dict.fromkeys(REQUIREMENTS, True)
    assert rows(markdown)["Misclassified test images"] == ["57 of 10,000", "57 of 10,000"]
    assert rows(markdown)["Final test accuracy"] == ["99.43%", "99.43%"]


def test_a_run_of_few_images_and_many_mistakes_does_not_meet_theirs(
    params: Params, training: Digits, test: Digits, layers: list[Layer], tmp_path: Path
) -> None:
    mistakes = {index: (int(test.labels[index] + 1) % 10, 0.9) for index in range(20)}
    markdown = render_report(params, training, test, layers, results_of(tmp_path, test.labels, mistakes))
    unmet = {"MNIST dataset", "High performance", "Fast training"}
    assert met(markdown) == {name: name not in unmet for name in REQUIREMENTS}


def test_a_budget_that_the_network_exceeds_is_not_met(
    params: Params, training: Digits, test: Digits, layers: list[Layer], results: Results
) -> None:
    tight = params.model_copy(update={"model": params.model.model_copy(update={"parameter_budget": 19_210})})
    assert met(render_report(tight, training, test, layers, results))["Parameter constraint"] is False


def test_every_figure_of_the_report_is_drawn_and_drawn_the_same_again(
    params: Params, test: Digits, results: Results, report: str, tmp_path: Path
) -> None:
    for directory in ("figures", "again"):
        draw_figures(tmp_path / directory, results, test, params)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert {f"figures/{name}" for name in drawn} == set(re.findall(r"!\[.+\]\((.+)\)", report))
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in drawn.values())
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == drawn


def test_a_run_without_mistakes_is_reported(
    params: Params, training: Digits, test: Digits, layers: list[Layer], tmp_path: Path
) -> None:
    results = results_of(tmp_path, test.labels, mistakes={}, epochs=1)
    markdown = render_report(params, training, test, layers, results)
    assert rows(markdown)["Misclassified test images"][0] == "0 of 200"
    assert "0 of 200 test images; all of them here" in markdown
    assert "Most frequent confusions" not in markdown
    draw_figures(tmp_path / "figures", results, test, params)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3
