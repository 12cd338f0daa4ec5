"""Shared parts of the charts in a report: their style, axes, and specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from nearfar.tabulate import Table

# Each has a contrast of at least 3:1 with both the light and the dark page.
SAME, DIFFERENT, RAW = "#3d7fc4", "#cf6a2c", "#848b98"
KINDS = alt.Scale(domain=["same", "different"], range=[SAME, DIFFERENT])
SOURCES = alt.Scale(domain=["learned", "raw input"], range=[SAME, RAW])
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
Datum = Mapping[str, Any]
# Filled in after the chart is built, since altair copies and validates data row by row.
ROWS = alt.NamedData(name="rows")


@dataclass(frozen=True)
class Plot:
    """A chart, with a description and a table for readers who cannot see it.

    Attributes:
        name: identifier, unique in the page.
        title: what the chart shows.
        caption: how to read the chart.
        description: the chart in words.
        table: the most important numbers of the chart.
        spec: the Vega-Lite specification.
    """

    name: str
    title: str
    caption: str
    description: str
    table: Table
    spec: dict[str, Any]


def spec(chart: Any, rows: Sequence[Datum], height: int = 260) -> dict[str, Any]:
    """The specification of a chart of `ROWS`, as wide as its container, in the page's colours."""
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
            font=FONT,  # the font of the page, with which Vega measures text
            axis=alt.AxisConfig(**axis),
            legend=alt.LegendConfig(**legend),
            view=alt.ViewConfig(stroke=None),
            autosize=alt.AutoSizeParams(type="fit", contains="padding", resize=True),
        )
        .to_dict()
    )
    del drawn["$schema"]  # a URL, which an offline page should not hold
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


def data(rows: Sequence[Datum]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def rule(signal: str) -> alt.Chart:
    """A dashed vertical line at the value of a signal of the page."""
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
    """Round to the digits that a screen can show, to keep the file small."""
    return float(f"{value:.{digits}g}")
