"""Charts of the errors of each threshold, ROC and DET, with a point that follows the slider."""

import altair as alt
import numpy as np
import torch

from nearfar.app.report.chart import (
    ROWS,
    SOURCES,
    Datum,
    Plot,
    data,
    false_accepts,
    short,
    signal,
    spec,
)
from nearfar.app.report.study import DistanceResult, Study
from nearfar.app.report.words import percent
from nearfar.app.train.record import Array
from nearfar.tabulate import Table

TICKS = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)


def roc(study: Study) -> Plot:
    least = 1 / study.n_trials
    rows = [row for name, found in _both(study) for row in curve_rows(found, name, least)]
    tar = alt.Y(
        "tar:Q",
        title="true accepts, of same pairs",
        axis=alt.Axis(format="~%"),
        scale=alt.Scale(domain=[0, 1], nice=False),
    )
    lines = (
        alt.Chart(ROWS)
        .mark_line(strokeWidth=2, interpolate="step-after")
        .encode(
            x=false_accepts(least), y=tar, color=alt.Color("of:N", scale=SOURCES), order="far:Q"
        )
    )
    chart = alt.layer(lines, _point(f"max(far, {least})", "1 - frr").encode(x="x:Q", y="y:Q"))
    return Plot(
        "roc",
        "ROC: true accepts for each false-accept rate",
        "Each point is a threshold. Higher is better, and further left is stricter; the scale of "
        "false accepts is logarithmic. The dot is the threshold of the slider.",
        f"Two rising curves. At 1 % false accepts, the embeddings accept "
        f"{_tar(study.learned)} of same pairs and the raw input {_tar(study.raw)}.",
        _rates(study),
        spec(chart.add_params(*_signals(study)), rows, height=300),
    )


def det(study: Study) -> Plot:
    rows: list[Datum] = [
        {"x": short(_probit(far)), "y": short(_probit(1 - tar)), "of": name}
        for name, found in _both(study)
        for far, tar in _points(found)
        if 0 < far < 1 and 0 < tar < 1
    ]
    shown = [row[axis] for row in rows for axis in ("x", "y")]
    low, high = (min(shown), max(shown)) if shown else (-3.0, 0.0)
    ends = [low - 0.1, max(min(high, 0.9), low + 1)]
    scale = alt.Scale(domain=ends, nice=False)
    ticks = [tick for tick in TICKS if ends[0] <= _probit(tick) <= ends[1]]
    labels = "".join(
        f"abs(datum.value - {_probit(tick):.4f}) < 0.001 ? '{100 * tick:g} %' : " for tick in ticks
    )
    axis = alt.Axis(values=[round(_probit(tick), 4) for tick in ticks], labelExpr=labels + "''")
    lines = (
        alt.Chart(ROWS)
        .mark_line(strokeWidth=2, clip=True)
        .encode(
            x=alt.X("x:Q", title="false accepts", scale=scale, axis=axis),
            y=alt.Y("y:Q", title="false rejects", scale=scale, axis=axis),
            color=alt.Color("of:N", scale=SOURCES),
            order="x:Q",
        )
    )
    place = f"clamp(quantileNormal(clamp({{}}, 1e-5, 1 - 1e-5)), {ends[0]}, {ends[1]})"
    point = _point(place.format("far"), place.format("frr")).encode(x="x:Q", y="y:Q")
    return Plot(
        "det",
        "DET: the two errors against each other",
        "The same thresholds, shown by their two error rates. Nearer to the lower left corner is "
        "better. Normally distributed distances give straight lines on these scales.",
        f"Two falling curves. They cross the diagonal at the equal error rates, "
        f"{percent(study.learned.figures['eer'])} for the embeddings and "
        f"{percent(study.raw.figures['eer'])} for the raw input.",
        _rates(study),
        spec(alt.layer(lines, point).add_params(*_signals(study)), rows, height=300),
    )


def curve_rows(found: DistanceResult, name: str, least: float) -> list[Datum]:
    """The ROC curve for a plot whose axis of false accepts starts at `least`."""
    return [
        {"far": short(max(far, least)), "tar": short(tar), "of": name}
        for far, tar in _points(found)
    ]


def _both(study: Study) -> list[tuple[str, DistanceResult]]:
    return [("learned", study.learned), ("raw input", study.raw)]


def _points(found: DistanceResult) -> list[tuple[float, float]]:
    """(far, tar) along the curve."""
    return list(zip(found.far.tolist(), found.tar.tolist(), strict=True))


def _deviates(rates: Array) -> Array:
    deviates: Array = torch.special.ndtri(torch.from_numpy(rates).clamp(1e-5, 1 - 1e-5)).numpy()
    return deviates


def _probit(rate: float) -> float:
    return float(_deviates(np.array([rate], dtype=np.float64))[0])


def _point(x: str, y: str) -> alt.Chart:
    drawn: alt.Chart = (
        alt.Chart(data([{}]))
        .transform_calculate(x=x, y=y)
        .mark_point(filled=True, size=110, color="currentColor", opacity=1)
    )
    return drawn


def _signals(study: Study) -> list[alt.Parameter]:
    at = study.test["learned"]["at_threshold"]
    return [signal("far", at["far"]), signal("frr", 1 - at["tar"])]


def _tar(found: DistanceResult) -> str:
    rate = found.figures["tar_at_far"].get("0.01")
    return "an unknown share" if rate is None else percent(rate)


def _rates(study: Study) -> Table:
    """The true-accept rates of both curves at a few false-accept rates."""

    def rate(found: DistanceResult, far: float) -> str:
        reached = found.tar[found.far <= far]
        return percent(float(reached.max()) if len(reached) else 0.0)

    rows = [
        (percent(far), rate(study.learned, far), rate(study.raw, far))
        for far in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
        if far * study.n_trials >= 1
    ]
    return Table(("false accepts at most", "true accepts, learned", "true accepts, raw"), rows)
