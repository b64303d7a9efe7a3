"""The look that all charts share, and the PNG file of a chart."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from PIL import Image

from mnist_pipeline.report.pictures import write_png

Chart = alt.Chart | alt.LayerChart | alt.FacetChart

CHART_WIDTH = 460  # pixels, of a PNG; on the page a chart fills its column
# Colours of training, monitoring, the specification's figures and mistakes; all are clear on white and on black.
ORANGE, BLUE, GREY, RED = "#c2782e", "#3f87d9", "#8c8c8c", "#e0522d"
_FONT = "Liberation Sans"  # comes with vl-convert
_NO_FONTS = Path(__file__).parent / "templates" / "no-fonts.conf"
_INK = "currentColor"  # the page's text colour, light or dark; black in a PNG
_TEXT = {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_AXIS = {"domainColor": _INK, "tickColor": _INK, "domainOpacity": 0.5, "tickOpacity": 0.5}


def chart_rows(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """Start a chart from rows of data."""
    return alt.Chart(alt.Data(values=rows))


def style_chart(chart: Chart, height: float) -> Chart:
    """Set a chart's height in pixels, and the width and look that all charts share."""
    styled: Chart = chart.properties(width=CHART_WIDTH, height=height).configure(
        font=_FONT,
        background="transparent",
        axis={**_TEXT, **_AXIS, "grid": False, "titlePadding": 8},
        legend={**_TEXT, "orient": "top", "title": None},
        view={"stroke": None},
        text={"color": _INK, "fontSize": 12},
        rule={"color": _INK},
    )
    return styled


def write_chart(path: Path, chart: Chart) -> None:
    """Write a chart as PNG on white. It uses 64 colours, which are enough."""
    with _without_system_fonts():
        drawn = vl_convert.vegalite_to_png(chart.to_dict() | {"background": "white"}, scale=2)
    write_png(path, Image.open(io.BytesIO(drawn)).convert("RGB").quantize(64))


@contextmanager
def _without_system_fonts() -> Iterator[None]:
    """Let vl-convert find no fonts but its own: it would prefer the system's, which draw other bytes.

    It looks for fonts once, when a process draws its first chart.
    """
    before = os.environ.get("FONTCONFIG_FILE")
    os.environ["FONTCONFIG_FILE"] = str(_NO_FONTS)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FONTCONFIG_FILE"]
        else:
            os.environ["FONTCONFIG_FILE"] = before
