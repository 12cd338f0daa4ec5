"""Check the structure of the JSON files of a run."""

from collections.abc import Mapping
from typing import Any

# A form is a word for a value, [form] for a list, or a mapping from the keys of an object to forms.
# A key that ends in "?" may be missing or null. ANY_KEY stands for all keys; ANY_RATE stands for
# all keys too, which must be rates and whose values may be null.
TEXT, WHOLE, NUMBER, RATE = "text", "a whole number", "a finite number", "a rate"
ANY_KEY, ANY_RATE = "*", "0.*"
LARGEST = 1.7976931348623157e308  # the largest float
_SPAN = {"low": NUMBER, "high": NUMBER}
_INTERVALS = {"level": RATE, "auc": _SPAN, "eer": _SPAN, "tar_at_far": {ANY_RATE: _SPAN}}
_GAIN = {
    "auc": NUMBER,
    "eer": NUMBER,
    "tar_at_far": {ANY_RATE: NUMBER},
    "intervals?": _INTERVALS,
}
_FIGURES = {
    "auc": RATE,
    "eer": RATE,
    "tar_at_far": {ANY_RATE: RATE},
    "intervals?": _INTERVALS,
    "at_threshold": {"far": RATE, "tar": RATE, "intervals?": {"far": _SPAN, "tar": _SPAN}},
}
_BIN = {
    "least": NUMBER,
    "most?": NUMBER,
    "n_similar": WHOLE,
    "n_dissimilar": WHOLE,
    "share": RATE,
    "claimed": RATE,
    "seen": RATE,
    "interval?": _SPAN,
}
SUMMARY: Mapping[str, Any] = {
    "versions": {},
    "data": {"sha256": TEXT, "dtype?": TEXT},
    "split": {"train": [TEXT], "calibration": [TEXT], "test": [TEXT]},
    "calibration?": {"eer": RATE, "n_identity_pairs?": WHOLE},
    "test": {
        "n_identities": WHOLE,
        "n_similar": WHOLE,
        "n_dissimilar": WHOLE,
        "n_identity_pairs?": WHOLE,
        "fitted_far": RATE,
        "learned": _FIGURES,
        "raw": {"distance?": TEXT, **_FIGURES},
        "gain?": {"before": _GAIN, **_GAIN},
        "reliability?": {
            "prior": RATE,
            "calibration_error": RATE,
            "log_loss": NUMBER,
            "log_loss_of_prior": NUMBER,
            "bins": [_BIN],
        },
    },
    "encoder?": {
        "name": TEXT,
        "library": TEXT,
        "weights": TEXT,
        "weights_sha256": TEXT,
        "licence": TEXT,
    },
    "findings?": [{"name": TEXT, "seen": TEXT, "means": TEXT, "advice": TEXT, "step?": WHOLE}],
    "not_asked?": {ANY_KEY: [TEXT]},
}
FITTED: Mapping[str, Any] = {
    "distance": TEXT,
    "threshold": NUMBER,
    "raw_threshold": NUMBER,
    "far": RATE,
    "raw_distance?": TEXT,
    "probability?": {
        "slope": NUMBER,
        "intercept": NUMBER,
        "share": RATE,
        "prior": RATE,
        "low": RATE,
        "high": RATE,
    },
}
ENCODER_FILES: Mapping[str, Any] = {"files": {ANY_KEY: TEXT}}
METRICS: Mapping[str, Any] = {"step": WHOLE, "loss": NUMBER, ANY_KEY: NUMBER}


def misfit(value: Any, form: Any, name: str = "") -> str:
    """What is wrong with a value, phrased to follow a colon; empty if nothing is.

    >>> misfit({"a": {"b": 2}}, {"a": {"b": RATE}})
    'a.b is not a rate'
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        return next(filter(None, (misfit(item, form[0], name) for item in value)), "")
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            return f"{name or 'it'} is not an object"
        wrong = (_of_key(value, key, inner, name) for key, inner in form.items())
        return next(filter(None, wrong), "")
    return "" if _fits(value, form) else f"{name} is not {form}"


def _of_key(value: Mapping[str, Any], key: str, form: Any, name: str) -> str:
    if key in (ANY_KEY, ANY_RATE):
        return next(filter(None, (_of_any(*item, key, form, name) for item in value.items())), "")
    plain = key.removesuffix("?")
    if plain != key and value.get(plain) is None:
        return ""
    inner = f"{name}.{plain}".lstrip(".")
    return misfit(value[plain], form, inner) if plain in value else f"it has no {inner!r}"


def _of_any(key: str, value: Any, kind: str, form: Any, name: str) -> str:
    """What is wrong with a key, or its value, that stands for ANY_KEY or ANY_RATE."""
    inner = f"{name}.{key}".lstrip(".")
    if kind == ANY_KEY:
        return misfit(value, form, inner)
    try:
        rate = float(key)
    except ValueError:
        return f"{inner} is not named by a rate"
    if not 0 <= rate <= 1:
        return f"{inner} is not named by a rate"
    return "" if value is None else misfit(value, form, inner)


def _fits(value: Any, form: str) -> bool:
    if form == TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if form == WHOLE:
        return isinstance(value, int) and 0 <= value < 2**63
    return 0 <= value <= 1 if form == RATE else -LARGEST <= value <= LARGEST
