"""Figures in words: percentages, intervals, and the verdict on a run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from nearfar.plain import number

Shown = Callable[[float | None], str]
_SHARES = ("", "", "half", "a third", "a quarter", "a fifth", "a sixth", "a seventh", "an eighth")
_NONE = "–"
_SPACE = "\N{NO-BREAK SPACE}"


def percent(rate: float | None) -> str:
    """A rate as a percentage, with at most three digits and two decimals.

    >>> [percent(rate).replace("\N{NO-BREAK SPACE}", " ") for rate in (0.0232, 0.002, 0.954, 1)]
    ['2.3 %', '0.20 %', '95.4 %', '100 %']

    A rate between 0 and 1 is never rounded to either.

    >>> [percent(rate).replace("\N{NO-BREAK SPACE}", " ") for rate in (0.00001, 0.99999)]
    ['below 0.01 %', 'above 99.99 %']
    """
    if rate is None:
        return _NONE
    if 0 < rate < 0.0001:
        return f"below {percent(0.0001)}"
    if 0.9999 < rate < 1:
        return f"above {percent(0.9999)}"
    of_hundred = 100 * rate
    if rate in (0, 1):
        return f"{of_hundred:.0f}{_SPACE}%"
    return f"{of_hundred:.{2 if of_hundred < 1 or of_hundred > 99 else 1}f}{_SPACE}%"


def span(interval: Mapping[str, float] | None, shown: Shown = percent) -> str:
    """An interval as text.

    >>> span({"low": 0.019, "high": 0.028}).replace("\N{NO-BREAK SPACE}", " ")
    '1.9 to 2.8 %'

    If both ends look the same, it is one figure.

    >>> span({"low": 0.99993, "high": 0.99998}).replace("\N{NO-BREAK SPACE}", " ")
    'above 99.99 %'
    """
    if interval is None:
        return _NONE
    low, high = shown(interval["low"]), shown(interval["high"])
    if low == high:
        return high
    return f"{low.removesuffix(_SPACE + '%')} to {high}"


def verdict(test: Mapping[str, Any], findings: Sequence[Any] | None) -> str:
    """How good a run is, in one sentence.

    Args:
        test: the figures on the test pairs, as in `summary.json`.
        findings: the findings of the doctor; None if the run is older than the doctor.
    """
    learned, raw = test["learned"], test["raw"]
    at = learned["at_threshold"]
    works = (
        f"the shipped threshold accepts {percent(at['tar'])} of same pairs and "
        f"{percent(at['far'])} of different pairs"
    )
    sentence = f"{_against_raw(learned, raw)}; {works}"
    if findings:
        several = f"{len(findings)} findings" if len(findings) > 1 else "finding"
        sentence += f" – but read the doctor's {several} first"
    return sentence + "."


def _against_raw(learned: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    ours, theirs = learned["eer"], raw["eer"]
    known, raw_known = learned.get("intervals"), raw.get("intervals")
    figure = f"an equal error rate of {percent(ours)}"
    if known:
        level = f"{100 * known['level']:.0f}{_SPACE}%"
        figure += f" ({level} interval {span(known['eer'])})"
    if ours >= theirs:
        return (
            f"No better than the raw input: {figure} on unseen identities, compared with the raw "
            f"input's {percent(theirs)}"
        )
    if known is None or raw_known is None:
        few = "on too few identities for an interval"
        return f"Reaches {figure} {few}, {_relative_to_raw(ours, theirs)}"
    if known["eer"]["high"] >= raw_known["eer"]["low"]:
        return (
            f"Not clearly better than the raw input: {figure} on unseen identities, compared with "
            f"the raw input's {percent(theirs)} (interval {span(raw_known['eer'])})"
        )
    return f"Verifies unseen identities with {figure}, {_relative_to_raw(ours, theirs)}"


def _relative_to_raw(ours: float, theirs: float) -> str:
    times = round(theirs / ours) if ours else 0
    if ours and theirs / ours < 1.75:
        return f"compared with the raw input's {percent(theirs)}"
    share = _SHARES[times] if 2 <= times < len(_SHARES) else "far below"
    of = " of" if share.startswith("a") else ""
    return f"{share}{of} the raw input's {percent(theirs)}"


def decided(test: Mapping[str, Any]) -> str:
    """The errors of the shipped threshold on the test pairs, worded as in the page's script."""
    at = test["learned"]["at_threshold"]
    return (
        f"{percent(at['far'])} of different pairs are accepted (FAR), {percent(1 - at['tar'])} of "
        "same pairs are rejected (FRR)."
    )


def figures_table(test: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of figures: name, learned, interval, raw input, interval."""
    ours, theirs = _figures(test["learned"]), _figures(test["raw"])
    return [
        (name, shown(value), span(interval, shown), shown(raw), span(raw_interval, shown))
        for (name, shown, value, interval), (_, _, raw, raw_interval) in zip(
            ours, theirs, strict=True
        )
    ]


def _figures(side: Mapping[str, Any]) -> list[tuple[str, Shown, float | None, Any]]:
    known, at = side.get("intervals") or {}, side["at_threshold"]
    known_at, rates = at.get("intervals") or {}, known.get("tar_at_far") or {}
    return [
        ("AUC", partial(number, missing=_NONE), side["auc"], known.get("auc")),
        ("equal error rate", percent, side["eer"], known.get("eer")),
        *(
            (
                f"true accepts at {100 * float(far):g}{_SPACE}% false accepts",
                percent,
                tar,
                rates.get(far),
            )
            for far, tar in side["tar_at_far"].items()
        ),
        ("false accepts at the threshold", percent, at["far"], known_at.get("far")),
        ("true accepts at the threshold", percent, at["tar"], known_at.get("tar")),
    ]
