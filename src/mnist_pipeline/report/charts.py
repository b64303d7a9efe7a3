"""The charts of a run's results, drawn by Altair: interactive in report.html, PNG files in report.md."""

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np
from scipy.stats import binomtest

from mnist_pipeline.report.chart_style import BLUE, CHART_WIDTH, GREY, ORANGE, RED, Chart, chart_rows, style_chart
from mnist_pipeline.report.pictures import encode_png, enlarge

_LOSS_TICKS = [a * 10.0**b for b in range(-4, 2) for a in (1, 2, 5)]  # of a logarithmic axis
_MOST_NUMBERED = 20  # classes of a confusion matrix whose numbers have room
_ROW_HEIGHT = 36  # pixels, of a chart with a row of digits
_DIGIT, _LETTER = 46, 7  # pixels: side of a misclassified digit with its margin, mean width of a letter below it


def draw_learning_curve(
    history: Sequence[Mapping[str, float]], quantity: str, monitor_name: str, published: Sequence[float]
) -> Chart:
    """Draw loss or accuracy by epoch; dotted lines mark new learning rates, the pointer shows an epoch's figures.

    `published` can be empty.
    """
    titles = {f"train_{quantity}": "training", f"monitor_{quantity}": monitor_name.lower()}
    series = {title: {int(row["epoch"]): row[name] for row in history} for name, title in titles.items()}
    if published:
        series["test, published"] = dict(enumerate(published, 1))
    points = [
        {"epoch": epoch, "series": title, quantity: value}
        for title, values in series.items()
        for epoch, value in values.items()
    ]
    number = ".4f" if quantity == "loss" else ".2%"
    epochs: list[dict[str, Any]] = [  # for the tooltip; a curve can lack the last epochs
        {"epoch": epoch} | {title: format(values[epoch], number) for title, values in series.items() if epoch in values}
        for epoch in sorted({epoch for values in series.values() for epoch in values})
    ]
    steps = [
        {"epoch": row["epoch"] - 0.5, "step": f"{before['learning_rate']:g} → {row['learning_rate']:g}"}
        for before, row in pairwise(history)
        if row["learning_rate"] != before["learning_rate"]
    ]
    if quantity == "loss":
        scale, axis = alt.Scale(type="log"), alt.Axis(title="loss, nats an image", format="~g", values=_LOSS_TICKS)
    else:
        # The first epoch's training accuracy is far lower; it would flatten the rest of the chart, if there is one.
        alone = [row["train_accuracy"] for row in history if len(history) == 1]
        lowest = min([*(row["monitor_accuracy"] for row in history), *published, *alone])
        scale, axis = alt.Scale(domain=[max(0, lowest - 0.005), 1]), alt.Axis(title="accuracy", format=".1%")
    whole_numbers = alt.Axis(values=list(range(1, len(epochs) + 1, math.ceil(len(epochs) / 15))), format="d")
    margin = alt.Scale(nice=False, domain=[0.5, len(epochs) + 0.5])  # else the first points would lie on the axis
    x = alt.X("epoch:Q", title="epoch", axis=whole_numbers, scale=margin)
    chosen = alt.selection_point(fields=["series"], bind="legend", toggle="true")  # a click shows or hides a curve
    pointed = alt.selection_point(fields=["epoch"], nearest=True, on="pointerover", clear="pointerout", empty=False)
    curves = chart_rows(points).mark_line(point=True, clip=True).add_params(chosen)
    curves = curves.encode(
        x=x,
        y=alt.Y(f"{quantity}:Q", scale=scale, axis=axis),
        color=alt.Color("series:N", scale=alt.Scale(domain=list(series), range=[ORANGE, BLUE, GREY])),
        strokeDash=alt.condition("datum.series == 'test, published'", alt.value([4, 3]), alt.value([1, 0])),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
    )
    pointer = chart_rows(epochs).mark_rule(tooltip=alt.TooltipContent("data")).add_params(pointed)
    pointer = pointer.encode(x=x, opacity=alt.condition(pointed, alt.value(0.5), alt.value(0)))
    drops = chart_rows(steps).mark_rule(strokeDash=[2, 3], opacity=0.4)
    drops = drops.encode(x=x, tooltip=[alt.Tooltip("step:N", title="learning rate")])
    return style_chart(alt.layer(drops, curves, pointer), 280)


def draw_confusion_matrix(confusion: np.ndarray, classes: Sequence[str]) -> Chart:
    """Draw how often each label (row) was predicted as each class (column); only mistakes have colour."""
    errors = confusion - np.diag(confusion.diagonal())
    cells = [
        {
            "label": classes[label],
            "prediction": classes[prediction],
            "images": int(confusion[label, prediction]),
            "errors": int(errors[label, prediction]),
            "text": str(confusion[label, prediction] or "·"),
        }
        for label, prediction in np.ndindex(confusion.shape)
    ]
    angle = 0 if max(map(len, classes)) < 3 else -45
    base = chart_rows(cells).encode(
        x=alt.X("prediction:O", title="predicted", sort=None, axis=alt.Axis(labelAngle=angle)),
        y=alt.Y("label:O", sort=None),
        tooltip=["label:O", "prediction:O", "images:Q"],
    )
    largest = max(int(errors.max()), 1)
    shade = alt.Opacity("errors:Q", scale=alt.Scale(domain=[0, largest], range=[0, 0.75]), legend=None)
    right = alt.condition("datum.label == datum.prediction", alt.value(0.6), alt.value(1.0))
    colour = base.mark_rect(color=RED).encode(opacity=shade)
    numbers = [base.mark_text().encode(text="text:N", opacity=right)] if len(classes) <= _MOST_NUMBERED else []
    return style_chart(alt.layer(colour, *numbers), CHART_WIDTH - 60)


def draw_reliability(calibration: Sequence[Mapping[str, float]]) -> Chart:
    """Draw accuracy by confidence, with Wilson's 95% intervals and the diagonal where both are equal."""
    rows = []
    for row in calibration:
        images = round(row["images"])
        interval = binomtest(round(row["accuracy"] * images), images).proportion_ci(method="wilson")
        rows.append({**row, "lowest": interval.low, "highest": interval.high})
    percent = alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
    unit = alt.Scale(domain=[0, 1])
    ideal = chart_rows([{"ideal": 0}, {"ideal": 1}]).mark_line(strokeDash=[4, 3], color=GREY, strokeWidth=1)
    ideal = ideal.encode(x=alt.X("ideal:Q", scale=unit), y=alt.Y("ideal:Q", scale=unit))
    base = chart_rows(rows).encode(
        x=alt.X("confidence:Q", title="confidence (mean of its bin)", axis=percent, scale=unit),
        tooltip=[
            alt.Tooltip("images:Q", format=","),
            alt.Tooltip("confidence:Q", format=".2%"),
            alt.Tooltip("accuracy:Q", format=".2%"),
        ],
    )
    intervals = base.mark_rule(opacity=0.4).encode(y="lowest:Q", y2="highest:Q")
    legend = alt.Legend(title="images", tickCount=3)
    bins = base.mark_circle(color=BLUE, opacity=1).encode(
        y=alt.Y("accuracy:Q", title="accuracy", axis=percent, scale=unit),
        size=alt.Size("images:Q", scale=alt.Scale(type="log", range=[20, 400]), legend=legend),
    )
    return style_chart(alt.layer(ideal, intervals, bins), 340)


def draw_robustness(
    rows: Sequence[Mapping[str, Any]], means: Mapping[str, float], examples: Mapping[str, np.ndarray]
) -> Chart:
    """Draw how far each corruption lowers the accuracy from that of the uncorrupted images, the first row.

    `means` are the mean accuracies of the families; `examples` has digits (N, 28, 28) for the start of each row. The
    chart sorts the rows by family, then by accuracy.
    """
    shown = [rows[0], *sorted(rows[1:], key=lambda row: (row["family"], -row["accuracy"]))]
    data, lines = [], []
    for row in shown:
        digits = np.pad(examples[row["corruption"]], [(0, 0), (0, 0), (1, 1)])  # a gap between the digits
        data.append({**row, "uncorrupted": rows[0]["accuracy"], "digits": _picture_url(np.hstack(list(digits)))})
    for family, mean in means.items():
        names = [row["corruption"] for row in shown if row["family"] == family]
        lines.append({"family": family, "mean": mean, "first": names[0], "last": names[-1]})
    lowest = min(row["accuracy"] for row in shown)
    pictures = "min(0.42 * width, 166)"  # pixels, as wide as a row's height allows
    numbers = f"({pictures} + 54)"  # right edge of the numbers between pictures and axis
    ticks = [tick / 20 for tick in range(21) if tick / 20 > lowest]
    y = alt.Y("corruption:N", title=None, sort=None, axis=alt.Axis(domain=False, ticks=False))
    x = alt.X(
        "accuracy:Q",
        scale=alt.Scale(domain=[lowest, 1], range=[{"expr": f"{numbers} + 16"}, {"expr": "width"}], nice=False),
        axis=alt.Axis(title="accuracy", titleAnchor="end", format=".0%", values=ticks, domain=False),
    )
    families = alt.Scale(domain=[rows[0]["family"], *means], range=[GREY, BLUE, ORANGE])
    colour = alt.Color("family:N", scale=families, legend=alt.Legend(values=[*means]))
    base = chart_rows(data).encode(
        y=y,
        tooltip=[
            "corruption:N",
            alt.Tooltip("accuracy:Q", format=".2%"),
            alt.Tooltip("loss:Q", format=".4f"),
            alt.Tooltip("calibration_error:Q", title="calibration error", format=".2%"),
        ],
    )
    images = base.mark_image(align="left", height=_ROW_HEIGHT - 4, width=alt.ExprRef(pictures))
    averages = chart_rows(lines).mark_rule(strokeDash=[4, 3])
    averages = averages.encode(
        x="mean:Q",
        y=alt.Y("first:N", sort=None),
        y2="last:N",
        color=colour,
        tooltip=["family:N", alt.Tooltip("mean:Q", format=".2%")],
    )
    layers = [
        images.encode(x=alt.value(0), url="digits:N"),
        base.mark_rule(opacity=0.4).encode(x=x, x2="uncorrupted:Q"),
        averages,
        base.mark_circle(size=70, opacity=1).encode(x=x, color=colour),
        base.mark_text(align="right").encode(x=alt.value({"expr": numbers}), text=alt.Text("accuracy:Q", format=".2%")),
    ]
    return style_chart(alt.layer(*layers), _ROW_HEIGHT * len(shown))


def draw_misclassified(rows: Sequence[Mapping[str, Any]], images: np.ndarray, disputed: Collection[int]) -> Chart:
    """Draw misclassified test images, each above its label and prediction; the pointer shows the probability.

    `rows` has `index`, `label`, `prediction` and `probability` of each image (28, 28); those in `disputed` are marked.
    """
    longest = max(len(f"{row['label']}→{row['prediction']}") for row in rows)
    columns = max(CHART_WIDTH // max(_LETTER * longest, _DIGIT), 2)
    data = [
        {
            **row,
            "column": place % columns,
            "row": place // columns,
            "picture": _picture_url(image),
            "read": f"{row['label']}→{row['prediction']}",
            "label is": "disputed" if row["index"] in disputed else "undisputed",
        }
        for place, (row, image) in enumerate(zip(rows, images, strict=True))
    ]
    base = chart_rows(data).encode(
        x=alt.X("column:O", axis=None, scale=alt.Scale(domain=list(range(columns)))),
        y=alt.Y("row:O", axis=None),
        tooltip=[
            alt.Tooltip("index:Q", title="test image"),
            "label:N",
            "prediction:N",
            alt.Tooltip("probability:Q", format=".1%"),
            *(["label is:N"] if disputed else []),
        ],
    )
    side = alt.ExprRef(f"min({_DIGIT}, width / {columns}) - 6")
    pictures = base.mark_image(width=side, height=side).encode(url="picture:N")
    words = base.mark_text(dy=_DIGIT / 2 + 4, limit=CHART_WIDTH / columns).encode(text="read:N")
    if disputed:
        colours = alt.Scale(domain=["undisputed", "disputed"], range=["currentColor", ORANGE])
        legend = alt.Legend(values=["disputed"], labelExpr="'label ' + datum.label")
        words = words.encode(color=alt.Color("label is:N", scale=colours, legend=legend))
    return style_chart(alt.layer(pictures, words), (_DIGIT + 22) * math.ceil(len(rows) / columns))


def _picture_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_png(enlarge(pixels))).decode()}"


def draw_studies(accuracies: Mapping[str, Sequence[float]], published: Sequence[float]) -> Chart:
    """Draw each seed's accuracy as a point, each recipe's mean as a tick, and a line at the last published accuracy.

    `published` can be empty.
    """
    points = [
        {"recipe": name, "seed": seed, "accuracy": value}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    shown = [*published[-1:], *(value for values in accuracies.values() for value in values)]
    domain = [max(0, min(shown) - 0.0005), min(1, max(shown) + 0.0005)]
    x = alt.X("accuracy:Q", title="test accuracy", scale=alt.Scale(domain=domain), axis=alt.Axis(format=".2%"))
    base = chart_rows(points).encode(y=alt.Y("recipe:N", title=None, sort=list(accuracies)))
    seeds = base.mark_circle(size=70, color=BLUE, opacity=0.5).encode(
        x=x, tooltip=["recipe:N", "seed:Q", alt.Tooltip("accuracy:Q", format=".2%")]
    )
    means = base.mark_tick(thickness=3, size=28, color=RED).encode(
        x=alt.X("mean(accuracy):Q"), tooltip=["recipe:N", alt.Tooltip("mean(accuracy):Q", format=".3%")]
    )
    line = chart_rows([{"accuracy": value} for value in published[-1:]]).encode(x=x)
    layers = [line.mark_rule(strokeDash=[4, 3], color=GREY), seeds, means]
    return style_chart(alt.layer(*layers), 44 * len(accuracies))
