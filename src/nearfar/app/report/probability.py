"""Whether the probability of "same" holds on test identities, and what the prior does to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, log10
from typing import Any

import altair as alt

from nearfar.app.report.chart import KINDS, ROWS, SAME, Datum, Plot, data, short, spec
from nearfar.app.report.study import Study
from nearfar.app.report.words import percent, span
from nearfar.evaluate import PlattProbability
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.tabulate import Table

RATES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
RATIOS = (1000, 100, 10, 1, 1 / 10, 1 / 100, 1 / 1000)
PRIORS = (0.5, 0.1, 0.01, 0.001)
END = 8.0  # log-odds at which the axes end: 0.03 % and 99.97 %
DECADES = 4  # likelihood ratios are drawn from 1 / 10,000 to 10,000


@dataclass(frozen=True)
class Probabilities:
    """What a report says about the probability of "same".

    Attributes:
        said: how well it holds, in words.
        figures: the charts.
        priors: the probability at a few distances, for a few shares of same pairs.
    """

    said: str
    figures: tuple[Plot, Plot]
    priors: Table


def probabilities(study: Study) -> Probabilities | None:
    """None if the run was trained before runs had a probability."""
    found, probability = study.test.get("reliability"), study.results.probability
    if found is None or probability is None:
        return None
    return Probabilities(
        _said(found),
        (_reliability(found), _ratios(found)),
        _priors(probability, study.results.thresholds.learned),
    )


def _said(found: Mapping[str, Any]) -> str:
    loss = f"{found['log_loss']:.3f} bits, where saying nothing costs 1 and a perfect answer 0."
    known = [held for held in found["bins"] if held.get("interval")]
    if not known:
        return (
            "Too few test identities to tell whether the probability holds: at least "
            f"{FEWEST_IDENTITIES} are needed. Its log loss is {loss}"
        )
    error = 100 * found["calibration_error"]
    off = sum(not h["interval"]["low"] <= h["claimed"] <= h["interval"]["high"] for h in known)
    worst = max(known, key=lambda held: abs(held["claimed"] - held["seen"]))
    return (
        f"On test identities, if half of all pairs are the same, the probability is wrong by "
        f"{error:.1f} percentage points on average (expected calibration "
        f"error). It is outside the interval in {off} of the {len(known)} groups that have one. It "
        f"is most wrong at likelihood ratios {_between(worst)}: {percent(worst['claimed'])} "
        f"claimed, {percent(worst['seen'])} seen. Its log loss is {loss}"
    )


def _reliability(found: Mapping[str, Any]) -> Plot:
    rows = [_point(held) for held in found["bins"]]
    ticks = {rate: round(_log_odds(rate), 4) for rate in RATES}
    labels = "".join(
        f"abs(datum.value - {at}) < 0.001 ? '{100 * rate:g} %' : " for rate, at in ticks.items()
    )
    axis = alt.Axis(values=list(ticks.values()), labelExpr=labels + "''")
    scale = alt.Scale(domain=[-END - 0.4, END + 0.4], nice=False)
    x = alt.X("x:Q", title="probability claimed", scale=scale, axis=axis)
    y = alt.Y("y:Q", title="share that is the same", scale=scale, axis=axis)
    ends: list[Datum] = [{"x": -END, "y": -END}, {"x": END, "y": END}]
    agree = alt.Chart(data(ends)).mark_line(
        color="currentColor", strokeDash=[5, 4], strokeWidth=1.5, opacity=0.6
    )
    bars = (
        alt.Chart(ROWS)
        .transform_filter("isValid(datum.low)")
        .mark_rule(color=SAME, strokeWidth=2)
        .encode(x=x, y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q")
    )
    dots = alt.Chart(ROWS).mark_point(filled=True, size=70, color=SAME, opacity=1)
    return Plot(
        "reliability",
        "Does the probability hold?",
        "Test pairs in groups of similar probability, as it would be if half of all pairs were the "
        "same. Each dot is a group: the probability claimed, and the share that is in fact the "
        "same. On the dashed line they agree; above it the probability is too low, below it too "
        "high. Bars are 95 % intervals; a group with too few identities has none. The scales are "
        "stretched at both ends, where 99 % and 99.9 % are very different.",
        "Dots from the lower left to the upper right. " + "; ".join(_words(h) for h in rows) + ".",
        Table(
            (
                "likelihood ratio",
                "same pairs",
                "different pairs",
                "claimed",
                "the same",
                "interval",
            ),
            [
                (
                    _between(held),
                    f"{held['n_similar']:,}",
                    f"{held['n_dissimilar']:,}",
                    percent(held["claimed"]),
                    percent(held["seen"]),
                    span(held.get("interval")),
                )
                for held in found["bins"]
            ],
        ),
        spec(alt.layer(agree.encode(x=x, y=y), bars, dots.encode(x=x, y=y)), rows, height=320),
    )


def _ratios(found: Mapping[str, Any]) -> Plot:
    prior = found["prior"]
    shares = {
        "same": [held["share"] * held["seen"] / prior for held in found["bins"]],
        "different": [held["share"] * (1 - held["seen"]) / (1 - prior) for held in found["bins"]],
    }
    rows = [
        {**_sides(held), "share": short(share), "kind": kind}
        for kind, of_kind in shares.items()
        for held, share in zip(found["bins"], of_kind, strict=True)
    ]
    labels = "".join(
        f"datum.value == {at} ? '{_ratio(10.0**at)}' : " for at in range(1 - DECADES, DECADES)
    )
    axis = alt.Axis(values=list(range(1 - DECADES, DECADES)), labelExpr=labels + "''")
    scale = alt.Scale(domain=[-DECADES, DECADES], nice=False)
    bars = (
        alt.Chart(ROWS)
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X("from:Q", title="likelihood ratio", scale=scale, axis=axis),
            x2="to:Q",
            y=alt.Y("share:Q", title="share of pairs", axis=alt.Axis(format="%")).stack(None),
            y2=alt.Y2Datum(0),
            color=alt.Color("kind:N", scale=KINDS),
        )
    )
    return Plot(
        "ratios",
        "How strong is the evidence?",
        "The likelihood ratios of same and of different test pairs. A ratio of 1 says nothing. At "
        "100, such a distance is a hundred times as likely for same pairs as for different ones; "
        "at 1/100 it is the other way round. The bars at both ends also hold all that lies "
        "beyond.",
        "Two histograms: different pairs on the left, same pairs on the right.",
        Table(
            ("likelihood ratio", "of same pairs", "of different pairs"),
            [
                (_between(held), percent(same), percent(different))
                for held, same, different in zip(
                    found["bins"], shares["same"], shares["different"], strict=True
                )
            ],
        ),
        spec(bars, rows, height=320),
    )


def _priors(probability: PlattProbability, threshold: float) -> Table:
    """The probability at the threshold, and where the likelihood ratio is a power of ten."""
    least, most = probability.limits
    at_even = log(probability.share / (1 - probability.share)) - probability.intercept
    distances = [threshold]
    if probability.slope:
        distances += [
            (log(ratio) + at_even) / probability.slope for ratio in RATIOS if least < ratio < most
        ]
    rows = []
    for distance in sorted(d for d in distances if d >= 0):
        ratio = probability.likelihood_ratio([distance]).item()
        beliefs = [_belief(replace(probability, prior=prior), distance) for prior in PRIORS]
        mark = ", the threshold" * (distance == threshold)
        rows.append((f"{distance:.4f}{mark}", _ratio(ratio), *beliefs))
    shares = [f"if {100 * prior:g} % are the same" for prior in PRIORS]
    return Table(("distance", "likelihood ratio", *shares), rows)


def _belief(probability: PlattProbability, distance: float) -> str:
    return percent(probability([distance]).item())


def _point(held: Mapping[str, Any]) -> Datum:
    ends = held.get("interval") or {}
    return {
        "x": short(_log_odds(held["claimed"])),
        "y": short(_log_odds(held["seen"])),
        **{name: short(_log_odds(end)) for name, end in ends.items()},
        "claimed": held["claimed"],
        "seen": held["seen"],
    }


def _words(row: Datum) -> str:
    return f"claimed {percent(row['claimed'])}, seen {percent(row['seen'])}"


def _log_odds(rate: float) -> float:
    """Log-odds, but not beyond the ends of the axes."""
    rate = min(max(rate, 1e-12), 1 - 1e-12)
    return min(max(log(rate / (1 - rate)), -END), END)


def _sides(held: Mapping[str, Any]) -> dict[str, float]:
    """Where the bar of a bin begins and ends, as decimal logarithms."""
    least, most = held["least"], held.get("most")
    return {
        "from": short(log10(least)) if least else -DECADES,
        "to": short(log10(most)) if most else DECADES,
    }


def _between(held: Mapping[str, Any]) -> str:
    least, most = held["least"], held.get("most")
    if most is None:
        return f"above {_ratio(least)}"
    return f"{_ratio(least)} to {_ratio(most)}" if least else f"below {_ratio(most)}"


def _ratio(ratio: float) -> str:
    """A likelihood ratio, below 1 as a fraction.

    >>> [_ratio(ratio) for ratio in (1234.5, 2.34, 1, 1 / 3, 0.00081)]
    ['1,234', '2.3', '1', '1/3', '1/1,235']
    """
    if ratio < 1 and (inverse := _ratio(1 / ratio)) != "1":
        return f"1/{inverse}"
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
