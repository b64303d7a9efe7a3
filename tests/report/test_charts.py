"""The report's charts and pictures: what they show, and that they are drawn the same each time."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont
from support import ROOT
from support.made_up import DIGITS, MISTAKES, MadeUpRun

from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.report.chart_style import Chart
from mnist_pipeline.report.charts import draw_learning_curve, draw_reliability, draw_robustness
from mnist_pipeline.report.network_charts import draw_filters

TEST = DIGITS["test"]
CHARTS = {"loss", "accuracy", "network", "filters", "confusion_matrix", "reliability", "corruptions"}
CHARTS |= {"misclassified", "studies"}
BY_CONFIDENCE = sorted(MISTAKES.items(), key=lambda mistake: -mistake[1][1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun.create(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def figures(run: MadeUpRun) -> dict[str, bytes]:
    return run.write_figures("figures")


def layers(chart: Chart) -> list[dict[str, Any]]:
    """Return the rows of each layer's data."""
    found = chart.to_dict()
    return [layer.get("data", found.get("data"))["values"] for layer in found.get("layer", [found])]


def read_picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_the_figures_are_those_that_the_report_shows(run: MadeUpRun, figures: dict[str, bytes]) -> None:
    assert {f"figures/{path}" for path in figures} == set(re.findall(r"!\[.+?\]\((.+?)\)", run.report))
    assert figures.keys() == {f"{name}.png" for name in CHARTS}


def test_the_same_run_gets_the_same_figures_and_keeps_none_of_an_earlier_run(
    figures: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("learning_curves.png", "old/old.png"):
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_text("of an earlier run")
    assert MadeUpRun.create(tmp_path).write_figures("again") == figures


def test_a_misclassified_digit_is_drawn_pixel_by_pixel_black_on_white(run: MadeUpRun) -> None:
    pictures, words = layers(run.charts["misclassified"])
    assert [(row["index"], row["read"]) for row in words] == [
        (index, f"{TEST.labels[index]}→{prediction}") for index, (prediction, _) in BY_CONFIDENCE
    ]
    for row, (index, _) in zip(pictures, BY_CONFIDENCE, strict=True):
        enlarged = 255 - np.kron(TEST.pixels[index].numpy(), np.ones((4, 4), dtype=np.uint8))
        assert (read_picture(row["picture"]) == enlarged).all()


def test_a_learning_curve_shows_both_parts_and_the_published_test(run: MadeUpRun) -> None:
    _, curves, pointer = layers(run.charts["accuracy"])
    assert [row for row in curves if row["epoch"] == 2] == [
        {"epoch": 2, "series": "training", "accuracy": 0.875},
        {"epoch": 2, "series": "test", "accuracy": 0.9375},
        {"epoch": 2, "series": "test, published", "accuracy": 0.9873},
    ]
    assert pointer[1] == {"epoch": 2, "training": "87.50%", "test": "93.75%", "test, published": "98.73%"}
    assert pointer[3] == {"epoch": 4, "test, published": "99.21%"}
    assert [row["epoch"] for row in pointer] == list(range(1, 15))


def test_a_learning_curve_names_a_validation_split(run: MadeUpRun) -> None:
    _, curves, _ = layers(draw_learning_curve(run.results.history, "loss", "Validation", [0.1]))
    assert {row["series"] for row in curves} == {"training", "validation", "test, published"}


@pytest.mark.parametrize("published", [[], [0.98, 0.99]])
@pytest.mark.parametrize("quantity", ["loss", "accuracy"])
def test_a_single_epoch_is_drawn_beside_the_axis_and_inside_the_frame(
    run: MadeUpRun, quantity: str, published: list[float]
) -> None:
    [epoch] = run.results.history[:1]
    chart = draw_learning_curve([epoch], quantity, "Test", published).to_dict()
    curves = next(layer["encoding"] for layer in chart["layer"] if "color" in layer["encoding"])
    first, last = curves["x"]["scale"]["domain"]
    assert first < 1 < last
    if quantity == "accuracy":
        assert curves["y"]["scale"]["domain"][0] < epoch["train_accuracy"]


def test_a_learning_curve_marks_where_the_learning_rate_falls(run: MadeUpRun) -> None:
    [step] = layers(run.charts["loss"])[0]
    assert step == {"epoch": 2.5, "step": "0.001 → 0.0005"}


def test_the_confusion_matrix_shows_every_pair_and_colours_only_the_mistakes(run: MadeUpRun) -> None:
    [cells, _] = layers(run.charts["confusion_matrix"])
    shown = {(cell["label"], cell["prediction"]): cell for cell in cells}
    wrong = {(str(int(TEST.labels[index])), str(prediction)) for index, (prediction, _) in MISTAKES.items()}
    assert len(shown) == 100
    assert {pair for pair, cell in shown.items() if cell["errors"]} == wrong
    assert sum(cell["images"] for cell in cells) == 200
    assert shown["0", "1"]["text"] == "·"


@pytest.mark.parametrize(
    ("images", "accuracy", "interval"),
    [(10, 0.5, (0.2366, 0.7634)), (1, 0.0, (0, 0.7935)), (100, 0.99, (0.9455, 0.9982)), (1, 1.0, (0.2065, 1))],
)
def test_reliability_has_wilsons_intervals(images: int, accuracy: float, interval: tuple[float, float]) -> None:
    chart = draw_reliability([{"images": images, "confidence": 0.6, "accuracy": accuracy}])
    [row] = layers(chart)[1]
    assert (row["lowest"], row["highest"]) == pytest.approx(interval, abs=1e-4)


def test_the_corruptions_are_sorted_by_family_and_accuracy_after_the_uncorrupted_images(run: MadeUpRun) -> None:
    rotation, *others = run.results.robustness
    rows = [run.results.uncorrupted, rotation | {"accuracy": 0.5}, *others]
    names = [corruption.name for corruption in CORRUPTIONS]
    means = {"geometric": 0.85, "non-geometric": 0.845}
    drawn, _, lines, *_ = layers(draw_robustness(rows, means, dict.fromkeys(["none", *names], TEST.pixels[:1].numpy())))
    assert [row["corruption"] for row in drawn] == ["none", *names[1:6], names[0], *names[6:]]
    assert [row["accuracy"] for row in drawn[:2]] == [0.985, 0.94]
    assert lines == [
        {"family": "geometric", "mean": 0.85, "first": names[1], "last": names[0]},
        {"family": "non-geometric", "mean": 0.845, "first": names[6], "last": names[-1]},
    ]


def test_the_chart_of_corruptions_has_the_mean_of_each_family(run: MadeUpRun) -> None:
    means = layers(run.charts["corruptions"])[2]
    assert [row["mean"] for row in means] == pytest.approx([0.925, 0.845])


def test_the_chart_of_corruptions_shows_the_first_test_images_under_each(run: MadeUpRun) -> None:
    shown = {row["corruption"]: read_picture(row["digits"]) for row in layers(run.charts["corruptions"])[0]}
    for name, digits in [("none", TEST), *((corruption.name, corruption.apply(TEST)) for corruption in CORRUPTIONS)]:
        first = np.hstack(list(np.pad(digits.pixels[:5].numpy(), [(0, 0), (0, 0), (1, 1)])))
        assert (shown[name] == 255 - np.kron(first, np.ones((4, 4), dtype=np.uint8))).all(), name


def test_the_network_is_drawn_with_the_parameters_of_its_steps(run: MadeUpRun) -> None:
    [steps, _] = layers(run.charts["network"])
    assert sum(step["parameters"] for step in steps) == 19_210
    assert [step["name"] for step in steps if step["kind"] == "pooling"] == ["pool1", "pool2", "gap"]
    assert steps[0]["text"] == "conv1: 6×28×28\n72 parameters, sees 3×3"
    tops, bottoms = ([step[edge] for step in steps] for edge in ("top", "bottom"))
    assert all(bottom < top for bottom, top in zip(bottoms, tops[1:], strict=False))


def test_a_filter_is_drawn_weight_by_weight() -> None:
    weights = np.arange(10 * 9, dtype=np.float32).reshape(10, 3, 3)
    [cells] = layers(draw_filters(weights))
    shown = {(cell["x"], cell["y"]): cell["weight"] for cell in cells}
    assert len(shown) == 90
    assert [shown[x, 0] for x in (0, 1, 2, 4)] == [0, 1, 2, 9]  # a row of the first, then the second
    assert [shown[0, y] for y in (0, 1, 2, 4)] == [0, 3, 6, 72]  # a column of the first, then the ninth


DRAW = """
import sys
from pathlib import Path
import vl_convert
from mnist_pipeline.report.chart_style import chart_rows, style_chart, write_chart
chart = style_chart(chart_rows([{"a": "gate", "b": 1}]).mark_bar().encode(x="a:N", y="b:Q"), 100)
if sys.argv[1] == "chart.png":
    write_chart(Path(sys.argv[1]), chart)
else:
    Path(sys.argv[1]).write_bytes(vl_convert.vegalite_to_png(chart.to_dict()))
"""


def test_a_font_of_the_system_changes_no_chart(tmp_path: Path) -> None:
    """The system's font is another one under the same name, so a chart drawn with it differs."""
    found = TTFont(io.BytesIO(cast("ImageFont.FreeTypeFont", ImageFont.load_default(10)).font_bytes))
    for name in found["name"].names:
        if name.nameID in (1, 16):  # the family
            name.string = "Liberation Sans"
    for system in ("with font", "without"):  # each has these fonts alone, whatever is installed here
        (tmp_path / system).mkdir()
        fonts = f"<fontconfig><dir>{tmp_path / system}</dir></fontconfig>"
        (tmp_path / f"{system}.conf").write_text(f'<?xml version="1.0"?>{fonts}')
    found.save(tmp_path / "with font/font.ttf")

    def draw(system: str, name: str) -> bytes:
        environment = {"FONTCONFIG_FILE": str(tmp_path / f"{system}.conf"), "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-c", DRAW, name], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / name).read_bytes()

    assert draw("with font", "plain.png") != draw("without", "plain.png")
    assert draw("with font", "chart.png") == draw("without", "chart.png")
