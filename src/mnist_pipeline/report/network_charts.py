"""The charts of the network itself: its layers and its first filters."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from mnist_pipeline.model.architecture import Layer
from mnist_pipeline.report.chart_style import BLUE, CHART_WIDTH, GREY, ORANGE, RED, Chart, chart_rows, style_chart

_MOST_CHANNELS = 100  # that make a step thicker


def square(side: int | str | None) -> str:
    """Write the size of a square by its side; a text is a size already."""
    return f"{side}×{side}" if isinstance(side, int) else side or ""


def draw_network(steps: Sequence[Sequence[Layer]]) -> Chart:
    """Draw the network from the image down: each step as wide as its maps, as thick as it has channels."""
    rows: list[dict[str, Any]] = []
    top = 0.0
    for step in steps:
        first, last = step[0], step[-1]
        channels, side = (*last.output_shape, 1, 1)[:2]
        parameters = sum(layer.parameters for layer in step)
        shape, sees = "×".join(map(str, last.output_shape)), square(first.receptive_field)
        counted = f"{parameters:,} parameters, " if parameters else ""
        thickness = 4 + 0.7 * min(channels, _MOST_CHANNELS)
        is_convolution, is_pooling = first.kernel and parameters, "Pool" in first.kind
        rows.append(
            {
                "name": first.name,
                "layers": " → ".join(layer.kind for layer in step),
                "top": top,
                "bottom": top + thickness,
                "middle": top + thickness / 2,
                "left": -side / 2,
                "right": side / 2,
                "shape": shape,
                "parameters": parameters,
                "sees": sees,
                "kind": "convolution" if is_convolution else "pooling" if is_pooling else "other layer",
                "text": f"{first.name}: {shape}\n{counted}{f'sees {sees}' if sees else ''}",
            }
        )
        top += max(thickness, 28) + 8
    widest = max(row["right"] for row in rows)
    x = alt.X("left:Q", scale=alt.Scale(domain=[-widest, 4.2 * widest], nice=False), axis=None)
    y = alt.Y("top:Q", scale=alt.Scale(domain=[top, -12], nice=False), axis=None)
    colours = {"convolution": BLUE, "pooling": ORANGE, "other layer": GREY}
    shown = [kind for kind in colours if kind in {row["kind"] for row in rows}]
    colour = alt.Color("kind:N", scale=alt.Scale(domain=shown, range=[colours[kind] for kind in shown]))
    seen = alt.Tooltip("sees:N", title="receptive field")
    base = chart_rows(rows)
    maps = base.mark_rect(cornerRadius=2).encode(
        x=x,
        x2="right:Q",
        y=y,
        y2="bottom:Q",
        color=colour,
        tooltip=["name:N", "layers:N", "shape:N", "parameters:Q", seen],
    )
    words = base.mark_text(align="left", baseline="middle", lineBreak="\n")
    words = words.encode(x=alt.XDatum(1.15 * widest), y="middle:Q", text="text:N")
    return style_chart(alt.layer(maps, words), top + 12)


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
    right, bottom = columns * (width + 1) - 1, math.ceil(count / columns) * (height + 1) - 1
    shades = alt.Scale(domain=[-bound, 0, bound], range=[RED, "white", BLUE], interpolate="rgb")
    chart = chart_rows(cells).transform_calculate(right="datum.x + 1", below="datum.y + 1").mark_rect()
    chart = chart.encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, right], nice=False)),
        x2="right:Q",
        y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[bottom, 0], nice=False)),
        y2="below:Q",
        color=alt.Color("weight:Q", scale=shades),
        tooltip=["filter:O", alt.Tooltip("weight:Q", format="+.3f")],
    )
    return style_chart(chart, CHART_WIDTH / right * bottom)
