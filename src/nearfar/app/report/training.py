"""Charts of a training run: distances, forces, and figures over its steps."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from nearfar.app.report.chart import (
    DIFFERENT,
    KINDS,
    ROWS,
    SAME,
    Datum,
    Plot,
    data,
    rule,
    short,
    signal,
    spec,
)
from nearfar.app.report.study import Study
from nearfar.app.report.words import percent
from nearfar.app.train.record import Array
from nearfar.tabulate import Table

BINS = 48
FEW = alt.Axis(tickCount=10)
POINTS = 500  # per line


def distances(study: Study) -> Plot:
    """Histograms of same and different pairs at each moment of training."""
    course, threshold = study.course, study.results.thresholds.learned
    edges = np.linspace(0, max(float(course.distance.max()), threshold, 1e-6) * 1.001, BINS + 1)
    rows = [
        row
        for moment, found in enumerate(course.distance)
        for kind, wanted in (("same", course.similar), ("different", ~course.similar))
        for row in _histogram(found[wanted], edges, kind, moment)
    ]
    last = len(course.step) - 1
    bars = (
        alt.Chart(ROWS)
        .transform_filter("datum.moment == moment")
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X(
                "from:Q", title=f"{study.results.distance} distance", scale=_tight(edges), axis=FEW
            ),
            x2="to:Q",
            y2=alt.Y2Datum(0),
            y=alt.Y("share:Q", title="share of pairs", axis=alt.Axis(format="%")).stack(None),
            color=alt.Color("kind:N", scale=KINDS),
        )
    )
    layers = [bars, rule("threshold")]
    if study.margin is not None:
        layers.append(_named_line(study.margin, "margin"))
    chart = alt.layer(*layers).add_params(signal("moment", last), signal("threshold", threshold))
    return Plot(
        "distances",
        "Distances of same and different pairs",
        "Pairs of calibration identities, which the network was not trained on. Training should "
        "move the two histograms apart; where they overlap, no threshold separates the "
        "pairs. The dashed line is the threshold"
        + (", the dotted one the margin of the loss." if study.margin is not None else "."),
        f"Two histograms of distances. At the end, same pairs lie around "
        f"{np.median(course.distance[-1][course.similar]):.3f} and different pairs around "
        f"{np.median(course.distance[-1][~course.similar]):.3f}; the threshold is {threshold:.4f}.",
        Table(
            ("step", "median, same", "median, different", "AUC", "equal error rate"),
            [
                (
                    str(step),
                    f"{np.median(found[course.similar]):.4f}",
                    f"{np.median(found[~course.similar]):.4f}",
                    f"{auc:.4f}",
                    percent(eer),
                )
                for step, found, auc, eer in zip(
                    course.step, course.distance, course.auc, course.eer, strict=True
                )
            ],
        ),
        spec(chart, rows),
    )


def forces(study: Study) -> Plot:
    """The force of the loss on each pair of a batch, against the distance of the pair."""
    course = study.course
    kinds = np.where(course.force_similar, "same", "different")
    rows = [
        {"moment": moment, "distance": short(d), "force": short(f), "kind": str(kind)}
        for moment in range(len(course.step))
        for d, f, kind in zip(
            course.force_distance[moment], course.force[moment], kinds, strict=True
        )
    ]
    zero = alt.Chart(data([{"y": 0}])).mark_rule(color="currentColor", opacity=0.5)
    points = (
        alt.Chart(ROWS)
        .transform_filter("datum.moment == moment")
        .mark_circle(size=22, opacity=0.65)
        .encode(
            x=alt.X(
                "distance:Q", title=f"{study.results.distance} distance", scale=_zero(), axis=FEW
            ),
            y=alt.Y("force:Q", title="push  ←  force  →  pull", axis=alt.Axis(format=".4~g")),
            color=alt.Color("kind:N", scale=KINDS),
        )
    )
    chart = alt.layer(zero.encode(y="y:Q"), points)
    active = (np.abs(course.force) > 1e-6 * np.abs(course.force).max(1, keepdims=True)).mean(1)
    return Plot(
        "forces",
        "Force against distance",
        f"The force of the {study.config.loss} loss on the pairs of one training batch. Pairs "
        "above the line are pulled together, pairs below it are pushed apart, and no force acts "
        "on pairs on the line. If every pair is on the line, nothing is learned.",
        f"A cloud of points. At the end, a force acts on {percent(float(active[-1]))} of the pairs "
        "shown.",
        Table(
            ("step", "pairs with a force", "strongest pull", "strongest push"),
            [
                (
                    str(step),
                    percent(float(share)),
                    f"{max(0.0, float(force.max())):.3g}",
                    f"{max(0.0, -float(force.min())):.3g}",
                )
                for step, share, force in zip(course.step, active, course.force, strict=True)
            ],
        ),
        spec(chart.add_params(signal("moment", len(course.step) - 1)), rows),
    )


def progress(study: Study) -> list[Plot]:
    """Loss, active share, figures and norms over the steps."""
    course = study.course
    figures = [
        {"step": int(step), "value": short(rate), "kind": kind}
        for kind, rates in (("equal error rate", course.eer), ("1 − AUC", 1 - course.auc))
        for step, rate in zip(course.step, rates, strict=True)
    ]
    return [
        _metric(study, "loss", "Loss", "What training minimises, of each batch."),
        _metric(
            study,
            "active_share",
            "Active share",
            "Share of the terms in a batch that are still non-zero. Near 0, nothing is learned.",
        ),
        Plot(
            "figures",
            "Errors on calibration identities",
            "If the error rises again while the loss falls, the network is memorising the "
            "training identities.",
            f"Two lines. The equal error rate goes from {percent(course.eer[0])} to "
            f"{percent(course.eer[-1])}.",
            Table(
                ("step", "equal error rate", "AUC"),
                [
                    (str(step), percent(eer), f"{auc:.4f}")
                    for step, eer, auc in zip(course.step, course.eer, course.auc, strict=True)
                ],
            ),
            _lines(figures, "error", [SAME, DIFFERENT]),
        ),
        _metric(
            study,
            "gradient_norm",
            "Length of the gradient",
            "Spikes or steady growth mean that the learning rate is too high; 0 means that nothing "
            "is learned.",
        ),
    ]


def _metric(study: Study, name: str, title: str, caption: str) -> Plot:
    lines = [line for line in study.metrics if name in line]
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(POINTS, len(lines))).round().astype(int))
    rows = [
        {"step": lines[i]["step"], "value": short(lines[i][name]), "kind": title} for i in chosen
    ]
    few = np.unique(np.linspace(0, len(lines) - 1, min(12, len(lines))).round().astype(int))
    return Plot(
        name.replace("_", "-"),
        title,
        caption,
        f"A line from {rows[0]['value']:g} at step {rows[0]['step']} to {rows[-1]['value']:g} at "
        f"step {rows[-1]['step']}.",
        Table(
            ("step", title.lower()),
            [(str(lines[i]["step"]), f"{lines[i][name]:.4g}") for i in few],
        ),
        _lines(rows, title.lower(), [SAME]),
    )


def _lines(rows: Sequence[Datum], title: str, colours: list[str]) -> dict[str, object]:
    several = len(colours) > 1
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(range=colours),
        sort=None,
        legend=alt.Legend() if several else None,
    )
    mark = alt.Chart(ROWS).mark_line(strokeWidth=1.5, point=several)
    return spec(
        mark.encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6)),
            y=alt.Y(
                "value:Q", title=title, axis=alt.Axis(tickCount=5, format=".4~g"), scale=_zero()
            ),
            color=colour,
        ),
        rows,
        height=190,
    )


def _histogram(distance: Array, edges: Array, kind: str, moment: int) -> list[Datum]:
    counts, _ = np.histogram(distance, edges)
    return [
        {
            "moment": moment,
            "kind": kind,
            "from": short(edges[i]),
            "to": short(edges[i + 1]),
            "share": short(count / len(distance)),
        }
        for i, count in enumerate(counts)
        if count
    ]


def _named_line(at: float, name: str) -> Any:
    line = alt.Chart(data([{"at": at, "name": name}])).encode(x="at:Q")
    return alt.layer(
        line.mark_rule(color="currentColor", strokeDash=[1, 4], strokeWidth=2),
        line.mark_text(color="currentColor", align="left", dx=5, y=8).encode(text="name:N"),
    )


def _tight(edges: Array) -> alt.Scale:
    return alt.Scale(domain=[0, short(edges[-1])], nice=False)


def _zero() -> alt.Scale:
    return alt.Scale(zero=True)
