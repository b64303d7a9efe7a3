"""The report: its tables are complete, its figures computed, and the checklist is checked on the run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.made_up import DIGESTS, DIGITS, MISTAKES, MadeUpRun, params_with
from support.tables import rows, table, tables
from torch import nn

from mnist_pipeline.data.digits import NO_DIGITS, Digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.disputed import DISPUTED, disputed_images
from mnist_pipeline.report.document import draw_charts, render_report
from mnist_pipeline.report.studies import TEST_SHA256

TEST = DIGITS["test"]
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun.create(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run: MadeUpRun) -> str:
    return run.report


@pytest.fixture(scope="module")
def as_many() -> dict[str, Digits]:
    """As many images as MNIST has; all of a part are the same."""
    training = DIGITS["train"]
    return {
        "train": Digits(training.pixels[:1].expand(60_000, 28, 28), training.labels.repeat(200)),
        "added": NO_DIGITS,
        "test": Digits(TEST.pixels[:1].expand(10_000, 28, 28), TEST.labels.repeat(50)),
    }


def one_off(*places: int, digits: Digits = TEST) -> dict[int, tuple[int, float]]:
    """Take each of these images for the next digit."""
    return {place: (int(digits.labels[place] + 1) % 10, 0.9) for place in places}


def met(markdown: str) -> dict[str, bool]:
    return {name: {"yes": True, "**no**": False}[mark] for name, mark, _ in table(markdown, "Requirement")}


def test_the_report_has_its_sections(report: str) -> None:
    assert re.findall("^#+ (.+)$", report, re.MULTILINE) == [
        "MNIST digit classification with 19,210 parameters",
        "Results",
        "Data",
        "Architecture",
        "Learning curves",
        "Training log",
        "Test performance",
        "Calibration",
        "Robustness",
        "Recipes",
        "Misclassified images",
        "First-layer filters",
        "Requirements",
        "Configuration",
        "Digests",
    ]


def test_all_rows_of_a_table_have_the_same_number_of_cells(report: str) -> None:
    assert len(tables(report)) == 16
    for found in tables(report):
        assert {len(row) for row in found} == {len(found[0])}
        assert all(re.fullmatch(":?---:?", cell) for cell in found[1])


def test_every_table_is_set_apart_from_the_text(report: str) -> None:
    around = re.findall(r"(.*)\n((?:\|.*\n)+)(.*)", report)
    assert len(around) == 16
    assert all(before == "" and after == "" for before, _, after in around)


def test_the_results_are_beside_the_published_ones(report: str) -> None:
    found = rows(report)
    assert found["Final test accuracy"] == ["98.50%", "99.43%"]
    assert found["Best test accuracy"] == ["95.83% (epoch 3)", "99.43% (epoch 14)"]
    assert found["Test accuracy after epoch 1"] == ["87.50%", "98.26%"]
    assert found["Test loss, first to last epoch"] == ["0.4000 → 0.1333", "0.0541 → 0.0170"]
    assert found["Misclassified test images"] == ["3 of 200", "57 of 10,000"]
    assert found["Parameters"] == ["19,210", "19,210"]
    assert found["Weights, 4 bytes each"] == ["75 KiB", "about 75 KB"]


def test_a_validation_split_is_named_as_such(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, params=params_with("data", validation_size=50)).report
    found = rows(report)
    assert found["of these held out for validation"] == ["50", "0"]
    assert found["Best validation accuracy"][0] == "95.83% (epoch 3)"
    assert "Validation accuracy" in found["Epoch"]
    assert "Final test accuracy" in found
    assert "on the training images and the validation images, and the published loss on the test images" in report
    assert "test images only monitor" not in report


def test_the_data_are_counted(report: str) -> None:
    assert "| Training images | 300 | 60,000 |" in report
    assert "| Test images | 200 | 10,000 |" in report
    assert "| Training share of all images | 60.0% | 85.7% |" in report
    assert [row[2] for row in table(report, "Class", "Training images")] == [str(n) for n in TEST.per_class()]


def test_the_layers_are_listed_with_their_parameters(report: str) -> None:
    found = rows(report)
    assert found["conv1"][1:] == ["1×28×28 → 6×28×28", "3×3", "1", "60 + 12 = 72", "72", "3×3"]
    assert found["conv2"][4:] == ["550 + 20 = 570", "570", "5×5"]
    assert found["pool1"][1:] == ["10×28×28 → 10×14×14", "2×2", "0", "0", "0", "6×6"]
    assert found["conv4"][4:] == ["2610 + 36 = 2646", "2646", "14×14"]
    assert found["conv7"][1:5] == ["24×3×3 → 10×1×1", "3×3", "0", "2170"]
    assert found["**Total**"][4:6] == ["**19,210**", "**19,210**"]
    assert "1 → 6 → 10 → 16 → 18 → 32 → 24 → 10" in report


def test_the_shares_of_the_blocks_are_computed(report: str) -> None:
    found = rows(report)
    assert found["block1"] == ["642", "3.3%", "642", "3.3%"]
    assert found["block2"] == ["4,134", "21.5%", "4,134", "21.5%"]
    assert found["block3"] == ["14,434", "75.1%", "14,434", "75.1%"]


def test_every_param_that_makes_numbers_is_listed(report: str) -> None:
    found = {key.strip("`"): value for key, value in table(report, "Key in `params.yaml`")}
    sections = {key.split(".")[0] for key in found}
    assert sections == {"seed", "threads", "data", "model", "train", "evaluate", "report"}  # the gate makes none
    assert found["seed"] == "0"
    assert found["model.dropout_kind"] == "element"
    assert found["train.scheduler.gamma"] == "0.5"
    assert found["report.gallery_size"] == "60"


def test_every_file_is_listed_with_its_digest(report: str) -> None:
    assert table(report, "File") == [[f"`{path}`", f"`{digest}`"] for path, digest in DIGESTS.items()]


def test_the_log_has_a_row_for_each_epoch(report: str) -> None:
    log = table(report, "Epoch")
    assert [row[0] for row in log] == ["1", "2", "3"]
    assert log[0][1:] == ["0.001", "0.5000", "75.00%", "0.4000", "87.50%", "0.0541", "98.26%"]
    assert log[2][1] == "0.0005"


def test_progress_is_grouped_by_learning_rate(report: str) -> None:
    found = rows(report)
    assert found["Accuracy in epochs 1 to 2, learning rate 0.001"] == ["87.50% to 93.75%", "98.26% to 98.73%"]
    assert found["Accuracy in epoch 3, learning rate 0.0005"] == ["95.83%", "99.03%"]
    assert found["Loss reduction"] == ["66.7%", "68.6%"]


def test_epochs_beyond_the_published_ones_have_no_published_figures(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, epochs=15).report
    assert rows(report)["14"][-2:] == ["0.0170", "99.43%"]
    assert rows(report)["15"][-2:] == ["", ""]
    assert met(report)["Fast training"] is False


def test_right_images_are_counted_by_class(report: str) -> None:
    by_class = table(report, "Class", "Images")
    wrong = [int(TEST.labels[index]) for index in MISTAKES]
    for digit, row in enumerate(by_class[:10]):
        images = int((TEST.labels == digit).sum())
        right = images - wrong.count(digit)
        assert row == [str(digit), str(images), str(right), f"{right / images:.2%}"]
    assert by_class[10] == ["**All**", "**200**", "**197**", "**98.50%**"]


def test_the_calibration_is_listed_bin_by_bin_with_its_error(report: str) -> None:
    assert table(report, "Mean probability") == [
        ["60.00%", "1", "0.00%"],
        ["80.00%", "1", "0.00%"],
        ["91.00%", "197", "100.00%"],
        ["95.00%", "1", "0.00%"],
    ]
    error = (0.6 + 0.8 + 0.95 + 197 * 0.09) / 200
    assert f"over 15 bins of equal width, is **{error:.2%}**" in report


def test_each_corruption_is_listed_with_its_scores_after_the_uncorrupted_images(run: MadeUpRun, report: str) -> None:
    none, *corrupted, geometric, non_geometric = table(report, "Family")
    loss, error = (run.results.metrics[f"test_{name}"] for name in ("loss", "calibration_error"))
    assert none == ["uncorrupted", "none", "98.50%", f"{loss:.4f}", f"{error:.2%}"]
    assert [row[:2] for row in corrupted] == [[corruption.family, corruption.name] for corruption in CORRUPTIONS]
    assert corrupted[1][2:] == ["94.00%", "0.3000", "1.10%"]
    assert geometric == ["**geometric**", "**mean**", "**92.50%**", "**0.4500**", "**1.25%**"]  # of numbers 0 to 5
    assert non_geometric == ["**non-geometric**", "**mean**", "**84.50%**", "**1.2500**", "**2.05%**"]  # 6 to 15


def test_each_recipe_has_its_accuracy_on_corrupted_images(report: str) -> None:
    assert table(report, "Corrupted test images") == [["specification", "**92.50%** ± 0.00", "**84.50%** ± 0.00"]]


def test_misclassified_images_are_sorted_by_confidence(run: MadeUpRun) -> None:
    misclassified = run.results.misclassified
    assert [(row["index"], row["prediction"]) for row in misclassified] == [(5, "3"), (100, "7"), (30, "8")]
    assert [row["probability"] for row in misclassified] == [0.95, 0.8, 0.6]


def test_misclassified_images_of_the_same_confidence_are_in_file_order(tmp_path: Path) -> None:
    run = MadeUpRun.create(tmp_path, one_off(150, 20, 70))
    assert [row["index"] for row in run.results.misclassified] == [20, 70, 150]


def test_a_misclassified_digit_is_listed_with_its_label_and_prediction(report: str) -> None:
    assert table(report, "Test image")[0] == ["5", str(int(TEST.labels[5])), "3", "95.0%", ""]


def test_added_digits_are_counted_and_the_data_are_no_longer_mnist(tmp_path: Path, as_many: dict[str, Digits]) -> None:
    added = DIGITS["train"][:40]
    report = MadeUpRun.create(tmp_path, {}, digits=as_many | {"added": added}).report
    assert "| Training images | 60,040 | 60,000 |" in report
    assert "| of these added to MNIST's | 40 | 0 |" in report
    assert [row[2] for row in table(report, "Class", "Training images")] == [str(n) for n in added.per_class()]
    assert met(report)["MNIST dataset"] is False


def test_a_run_without_additions_does_not_mention_them(report: str) -> None:
    assert "added" not in report


def test_the_confusion_matrix_counts_labels_by_prediction(run: MadeUpRun) -> None:
    confusion = run.results.confusion
    assert confusion.sum() == 200
    assert confusion.trace() == 197
    for index, (prediction, _) in MISTAKES.items():
        assert confusion[TEST.labels[index], prediction] == 1


def test_the_most_frequent_confusion_is_named_first(tmp_path: Path) -> None:
    fours = (TEST.labels == 4).nonzero().flatten()[:4].tolist()
    two = int((TEST.labels == 2).nonzero()[0])
    report = MadeUpRun.create(tmp_path, dict.fromkeys(fours, (9, 0.9)) | {two: (7, 0.9)}).report
    assert "Most frequent confusions: 4 taken for 9 (4×), 2 taken for 7 (1×)." in report


@pytest.mark.parametrize(("gallery_size", "shown"), [(3, "all"), (2, "the first 2")])
def test_the_report_says_how_many_misclassified_digits_it_shows(tmp_path: Path, gallery_size: int, shown: str) -> None:
    report = MadeUpRun.create(tmp_path, params=params_with("report", gallery_size=gallery_size)).report
    assert f"3 of 200 test images; {shown} of them are here" in report
    assert len(table(report, "Test image")) == min(gallery_size, 3)


def test_the_images_whose_label_is_disputed_are_marked(tmp_path: Path, as_many: dict[str, Digits]) -> None:
    test = as_many["test"]
    mistakes = one_off(*DISPUTED, 0, 946, 948, digits=test)
    report = MadeUpRun.create(tmp_path, mistakes, digits=as_many, disputed=disputed_images(test)).report
    marks = {int(row[0]): row[-1] for row in table(report, "Test image")}
    assert len(marks) == 18
    assert {image for image, mark in marks.items() if mark == "disputed"} == {*DISPUTED}
    assert {mark for image, mark in marks.items() if image not in DISPUTED} == {""}
    assert "disputed the labels of 15 test images" in report
    assert f"On the other 9,985 images the accuracy is {9982 / 9985:.2%}." in report


@pytest.mark.usefixtures("as_other_data")
def test_no_label_of_other_images_is_disputed(tmp_path: Path, as_many: dict[str, Digits]) -> None:
    report = MadeUpRun.create(tmp_path, one_off(*DISPUTED, digits=as_many["test"]), digits=as_many).report
    assert "disputed" not in report


def test_a_run_like_the_published_one_meets_every_requirement(tmp_path: Path, as_many: dict[str, Digits]) -> None:
    mistakes = one_off(*range(57), digits=as_many["test"])
    report = MadeUpRun.create(tmp_path, mistakes, epochs=14, digits=as_many).report
    assert met(report) == dict.fromkeys(REQUIREMENTS, True)
    assert rows(report)["Misclassified test images"] == ["57 of 10,000", "57 of 10,000"]
    assert rows(report)["Final test accuracy"] == ["99.43%", "99.43%"]


def test_a_run_with_few_images_and_many_mistakes_fails_their_requirements(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, one_off(*range(20))).report
    unmet = {"MNIST dataset", "High performance", "Fast training"}
    assert met(report) == {name: name not in unmet for name in REQUIREMENTS}


def test_a_network_over_its_budget_fails_the_parameter_constraint(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, params=params_with("model", parameter_budget=19_210)).report
    assert met(report)["Parameter constraint"] is False


def test_a_run_without_mistakes_is_reported(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, mistakes={}, epochs=1).report
    assert rows(report)["Misclassified test images"][0] == "0 of 200"
    assert "0 of 200 test images; all of them are here" in report
    assert "Most frequent confusions" not in report
    assert table(report, "Mean probability") == [["91.00%", "200", "100.00%"]]


CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.mark.usefixtures("as_other_data")
def test_other_data_are_reported_by_their_names_and_without_what_belongs_to_mnist(tmp_path: Path) -> None:
    run = MadeUpRun.create(tmp_path, classes=CLOTHES)
    results = run.results.with_studies_on(TEST[1:])
    report = render_report(run.params, run.digits, run.model, results, DIGESTS)
    assert report.startswith("# Classification of images in 10 classes with 19,210 parameters\n")
    assert [row[0] for row in table(report, "Class", "Images")] == [*CLOTHES, "**All**"]
    assert {tuple(row[1:3]) for row in table(report, "Test image")} == {
        (CLOTHES[TEST.labels[place]], CLOTHES[prediction]) for place, (prediction, _) in MISTAKES.items()
    }
    assert " taken for " in report
    assert not re.search("published|disputed|Recipes", report, re.IGNORECASE)
    assert rows(report)["MNIST dataset"] == ["**no**", "300 training and 200 test images of other data"]
    assert {"High performance", "Fast training"}.isdisjoint(met(report))
    charts = draw_charts(results, run.model, run.params, run.digits)
    curves = [layer["encoding"] for layer in charts["loss"].to_dict()["layer"] if "color" in layer["encoding"]]
    assert curves[0]["color"]["scale"]["domain"] == ["training", "test"]
    assert "studies" not in charts


@pytest.mark.usefixtures("as_other_data")
def test_a_study_on_these_images_is_reported_whatever_they_are(tmp_path: Path) -> None:
    run = MadeUpRun.create(tmp_path)
    [study] = run.results.studies
    others = replace(study, rows=[row | {TEST_SHA256: TEST[:-1].sha256()} for row in study.rows])
    older = replace(study, rows=[{name: row[name] for name in row if name != TEST_SHA256} for row in study.rows])
    results = replace(run.results, studies=[others, study, older, replace(study, rows=[])]).with_studies_on(TEST)
    assert results.studies == [study]
    report = render_report(run.params, run.digits, run.model, results, DIGESTS)
    assert "Undisputed images" not in report
    assert table(report, "Recipe")[0][0] == "specification"


PERCEPTRON = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10), nn.LogSoftmax(1))


def test_a_network_of_another_kind_is_reported(tmp_path: Path) -> None:
    run = MadeUpRun.create(tmp_path)
    vars(run)["model"] = PERCEPTRON
    assert [row[0] for row in table(run.report, "Step")] == ["0", "1", "3", "**Total**"]
    assert table(run.report, "Step")[1] == ["1", "Linear → ReLU", "784 → 16", "", "", "12560", "28×28"]
    assert "First-layer filters" not in run.report
    assert "filters" not in run.charts
    assert "| Published |" not in run.report
    assert "| Published test loss |" in run.report  # the data are MNIST's
    unmet = {name for name, is_met in met(run.report).items() if not is_met}
    assert unmet >= {"CNN architecture", "Batch normalisation", "Modern techniques", "Documentation"}
    assert rows(run.report)["CNN architecture"][1] == "0 convolutions in 1 block"
    assert rows(run.report)["Modern techniques"][1] == "none of the specification's"


def test_one_epoch_is_one(tmp_path: Path) -> None:
    report = MadeUpRun.create(tmp_path, epochs=1).report
    assert "1 epochs" not in report
    assert rows(report)["Accuracy in epoch 1, learning rate 0.001"] == ["87.50%", "98.26%"]
