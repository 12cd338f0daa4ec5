"""What every chart of a report shares: its look, and how it is handed to the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from nearfar.tabulate import Table

# Each has a contrast of at least 3 to 1 with white and with the dark page.
SAME, DIFFERENT, RAW = "#3d7fc4", "#cf6a2c", "#848b98"
KINDS = alt.Scale(domain=["same", "different"], range=[SAME, DIFFERENT])
SOURCES = alt.Scale(domain=["learned", "raw input"], range=[SAME, RAW])
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
Row = Mapping[str, Any]
# Put into the chart once it is made: altair copies and checks what it is given, row by row.
ROWS = alt.NamedData(name="rows")


@dataclass(frozen=True)
class Figure:
    """A chart with all that a reader needs who cannot see it.

    Attributes:
        name: unique in the page.
        title: what it shows.
        caption: how to read it.
        description: what can be seen in it, in words.
        table: the numbers behind it, or those that matter.
        spec: the chart in Vega-Lite.
    """

    name: str
    title: str
    caption: str
    description: str
    table: Table
    spec: dict[str, Any]


def spec(chart: Any, rows: Sequence[Row], height: int = 260) -> dict[str, Any]:
    """A chart of `ROWS` as wide as its place, in the page's own colours."""
    axis: dict[str, Any] = {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "gridOpacity": 0.12,
        "titleFontWeight": 500,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titlePadding": 8,
    }
    legend: dict[str, Any] = {
        "labelColor": "currentColor",
        "labelFontSize": 12,
        "orient": "top",
        "title": None,
        "symbolOpacity": 1,
    }
    drawn: dict[str, Any] = (
        chart.properties(width="container", height=height, background="transparent")
        .configure(
            font=FONT,  # as the page's, by name: Vega measures words with it
            axis=alt.AxisConfig(**axis),
            legend=alt.LegendConfig(**legend),
            view=alt.ViewConfig(stroke=None),
            autosize=alt.AutoSizeParams(type="fit", contains="padding", resize=True),
        )
        .to_dict()
    )
    del drawn["$schema"]  # an address, though nobody would follow it
    drawn["datasets"] = {**drawn.get("datasets", {}), ROWS.name: rows}
    return drawn


def false_accepts(least: float) -> alt.X:
    """The logarithmic axis of a ROC curve, from `least` to 1, over a field `far`."""
    return alt.X(
        "far:Q",
        title="false accepts, of different pairs",
        scale=alt.Scale(type="log", domain=[least, 1], nice=False),
        axis=alt.Axis(
            format="~%", values=[mark for mark in (1e-4, 1e-3, 0.01, 0.1, 1.0) if mark >= least]
        ),
    )


def data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def rule(signal: str) -> alt.Chart:
    """A dashed vertical line where a signal of the page stands."""
    drawn: alt.Chart = (
        alt.Chart(data([{}]))
        .transform_calculate(at=signal)
        .mark_rule(color="currentColor", strokeDash=[5, 4], strokeWidth=1.5)
        .encode(x=alt.X("at:Q"))
    )
    return drawn


def signal(name: str, value: float) -> alt.Parameter:
    return alt.param(name=name, value=value)


def short(value: float, digits: int = 4) -> float:
    """As many digits as a screen can show, to keep the file small."""
    return float(f"{value:.{digits}g}")
