"""The charts of the network itself: its layers and its first filters."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from mnist_pipeline.report.architecture import Layer
from mnist_pipeline.report.chart_style import (
    BLUE,
    CHART_WIDTH,
    ORANGE,
    RED,
    Chart,
    style_chart,
)


def draw_network(steps: Sequence[Sequence[Layer]]) -> Chart:
    """Draw the network from the image down: each step as wide as its maps are, as thick as it has channels."""
    rows: list[dict[str, Any]] = []
    top = 0.0
    for step in steps:
        first, last = step[0], step[-1]
        channels, side = last.output_shape[0], (*last.output_shape, 1, 1)[1]
        parameters = sum(layer.parameters for layer in step)
        thickness = 4 + 0.7 * channels
        rows.append(
            {
                "name": first.name,
                "layers": " → ".join(layer.kind for layer in step),
                "top": top,
                "bottom": top + thickness,
                "middle": top + thickness / 2,
                "left": -side / 2,
                "right": side / 2,
                "shape": "×".join(map(str, last.output_shape)),
                "parameters": parameters,
                "sees": f"{first.receptive_field}×{first.receptive_field}",
                "kind": "convolution" if first.kernel and parameters else "pooling",
                "text": f"{first.name}: {'×'.join(map(str, last.output_shape))}\n"
                + (f"{parameters:,} parameters, " if parameters else "")
                + f"sees {first.receptive_field}×{first.receptive_field}",
            }
        )
        top += max(thickness, 28) + 8
    data = alt.Data(values=rows)
    widest = max(row["right"] for row in rows)
    y = alt.Scale(domain=[top, -12], nice=False)
    x = alt.Scale(domain=[-widest, 4.2 * widest], nice=False)
    maps = (
        alt.Chart(data)
        .mark_rect(cornerRadius=2)
        .encode(
            x=alt.X("left:Q", scale=x, axis=None),
            x2="right:Q",
            y=alt.Y("top:Q", scale=y, axis=None),
            y2="bottom:Q",
            color=alt.Color("kind:N", scale=alt.Scale(domain=["convolution", "pooling"], range=[BLUE, ORANGE])),
            tooltip=["name:N", "layers:N", "shape:N", "parameters:Q", alt.Tooltip("sees:N", title="receptive field")],
        )
    )
    words = (
        alt.Chart(data)
        .mark_text(align="left", baseline="middle", lineBreak="\n")
        .encode(x=alt.XDatum(1.15 * widest), y="middle:Q", text="text:N")
    )
    return style_chart(alt.layer(maps, words).properties(width=CHART_WIDTH, height=top + 12))


def draw_filters(weights: np.ndarray) -> Chart:
    """Draw the filters (N, height, width) of the first convolution, each in its own square."""
    count, height, width = weights.shape
    columns = min(count, 8)
    cells = [
        {
            "filter": number + 1,
            "x": number % columns * (width + 1) + column,
            "y": number // columns * (height + 1) + row,
            "weight": float(weights[number, row, column]),
        }
        for number, row, column in np.ndindex(weights.shape)
    ]
    bound = float(np.abs(weights).max())
    lines = math.ceil(count / columns)
    chart = (
        alt.Chart(alt.Data(values=cells))
        .transform_calculate(right="datum.x + 1", below="datum.y + 1")
        .mark_rect()
        .encode(
            x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, columns * (width + 1) - 1], nice=False)),
            x2="right:Q",
            y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[lines * (height + 1) - 1, 0], nice=False)),
            y2="below:Q",
            color=alt.Color(
                "weight:Q",
                scale=alt.Scale(domain=[-bound, 0, bound], range=[RED, "white", BLUE], interpolate="rgb"),
            ),
            tooltip=["filter:O", alt.Tooltip("weight:Q", format="+.3f")],
        )
    )
    side = CHART_WIDTH / (columns * (width + 1) - 1)
    return style_chart(chart.properties(width=CHART_WIDTH, height=side * (lines * (height + 1) - 1)))
