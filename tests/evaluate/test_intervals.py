"""Intervals: how often they hold the truth where identities differ, and what they do at 0 and 1."""

import json
from statistics import NormalDist

import numpy as np
import pytest

from nearfar.evaluate import at_threshold, verification

NORMAL = NormalDist()
FAR = (0.1, 0.02)


def truth(apart, between, within):
    """AUC, EER and TAR at each FAR of `pairs`, over the whole population of identities.

    Distances are normal around 0 (similar) and `apart`, with an offset for each identity.
    """
    similar = (between**2 + within**2) ** 0.5
    dissimilar = (2 * between**2 + within**2) ** 0.5
    auc = NORMAL.cdf(apart / (similar**2 + dissimilar**2) ** 0.5)
    eer = NORMAL.cdf(-apart / (similar + dissimilar))
    tars = [NORMAL.cdf((apart + dissimilar * NORMAL.inv_cdf(f)) / similar) for f in FAR]
    return np.array([auc, eer, *tars])


def pairs(random, n_identities, n, apart, between, within):
    """n similar and n dissimilar distances, labels, and the identities of each pair."""
    offset = random.normal(size=n_identities) * between
    same = np.arange(n) % n_identities
    a = random.integers(0, n_identities, n)
    b = (a + random.integers(1, n_identities, n)) % n_identities
    noise = random.normal(size=2 * n) * within
    d = np.concatenate([offset[same], apart + offset[a] + offset[b]]) + noise
    groups = np.concatenate([np.stack([same, same], 1), np.stack([a, b], 1)])
    return d, np.arange(2 * n) < n, groups


def coverage(repeats, design, *, resamples=150, independent=False, seed=0):
    """The share of samples whose intervals hold the truth, for each figure."""
    random, expected = np.random.default_rng(seed), truth(*design[2:])
    held = np.zeros(len(expected))
    for repeat in range(repeats):
        d, same, groups = pairs(random, *design)
        found = verification(
            d,
            same,
            higher_is_closer=False,
            far=FAR,
            groups=np.arange(len(d)) if independent else groups,
            resamples=resamples,
            seed=repeat,
        ).intervals
        spans = [found.auc, found.eer, *found.tar_at_far.values()]
        held += [span.low <= t <= span.high for span, t in zip(spans, expected, strict=True)]
    return held / repeats


# Identities, pairs of each kind, apart, between, within.
USUAL = (100, 2000, 2.0, 0.5, 0.8)
STRONG = (50, 1500, 2.0, 0.7, 0.7)


def test_intervals_hold_the_truth_and_those_of_independent_pairs_do_not():
    # At 95 %, 60 samples hold it in fewer than 52 about twice in a thousand times.
    assert (coverage(60, USUAL) > 52 / 60).all()
    assert (coverage(40, STRONG, independent=True) < 0.7).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "low", "low_in_the_tail"),
    [
        (USUAL, 0.92, 0.92),
        # Identities differ as much as pairs do, and the few closest make all false accepts.
        (STRONG, 0.90, 0.85),
        # Little, and nothing, is due to identities: on the wide side.
        ((40, 1600, 2.0, 0.2, 1.0), 0.94, 0.94),
        ((200, 2000, 2.0, 0.0, 1.0), 0.94, 0.94),
    ],
)
def test_intervals_hold_the_truth_at_about_their_nominal_rate(design, low, low_in_the_tail):
    found = coverage(250, design)
    assert (found[:-1] > low).all(), found
    assert found[-1] > low_in_the_tail, found


@pytest.mark.slow
def test_intervals_that_take_pairs_for_independent_are_far_too_narrow():
    assert (coverage(150, STRONG, independent=True) < 0.65).all()


def test_what_is_due_to_single_pairs_is_counted_no_more_than_twice():
    # Product weights alone count it three times: widths of 1.73.
    d, same, groups = pairs(np.random.default_rng(3), 200, 2000, 2.0, 0.0, 1.0)
    options = {"higher_is_closer": False, "resamples": 2000}
    by_identity = at_threshold(d, same, 1.0, groups=groups, **options).intervals.far
    by_pair = at_threshold(d, same, 1.0, groups=np.arange(len(d)), **options).intervals.far
    width = (by_identity.high - by_identity.low) / (by_pair.high - by_pair.low)
    assert 1 < width < 1.55


def test_intervals_of_a_threshold_hold_its_rates():
    random, held = np.random.default_rng(1), np.zeros(2)
    apart, between, within = STRONG[2:]
    far = NORMAL.cdf((0.8 - apart) / (2 * between**2 + within**2) ** 0.5)
    tar = NORMAL.cdf(0.8 / (between**2 + within**2) ** 0.5)
    for repeat in range(80):
        d, same, groups = pairs(random, *STRONG)
        found = at_threshold(
            d, same, 0.8, higher_is_closer=False, groups=groups, resamples=150, seed=repeat
        ).intervals
        spans = (found.far, far), (found.tar, tar)
        held += [span.low <= t <= span.high for span, t in spans]
    assert (held / 80 > 0.86).all()


def test_the_same_seed_gives_the_same_intervals_whatever_identities_are_called():
    d, same, groups = pairs(np.random.default_rng(0), 40, 400, 2.0, 0.5, 1.0)
    options = {"higher_is_closer": False, "far": FAR}
    first = verification(d, same, groups=groups, **options)
    assert first == verification(d, same, groups=groups, **options)
    assert first == verification(d, same, groups=groups + 2**40, **options)
    swapped = verification(d, same, groups=groups[:, ::-1], **options)
    assert swapped.intervals.auc.low == pytest.approx(first.intervals.auc.low, abs=1e-12)
    assert first.intervals != verification(d, same, groups=groups, seed=1, **options).intervals
    assert first.intervals.auc.low < first.auc < first.intervals.auc.high
    plain = json.loads(json.dumps(first.as_dict(), allow_nan=False))
    assert plain["intervals"]["n_identities"] == 40
    assert "95% interval" in str(first)


def test_perfect_verification_has_intervals_of_some_width():
    # No error among 50 identities: the upper end is what as many trials without one would say.
    d, same, groups = pairs(np.random.default_rng(0), 50, 500, 100.0, 0.1, 0.1)
    found = verification(d, same, higher_is_closer=False, groups=groups)
    assert found.eer == 0.0
    assert found.intervals.eer.low == 0.0
    assert 0.03 < found.intervals.eer.high < 0.1


def test_a_perfect_auc_has_the_interval_of_a_perfect_rate_despite_rounding():
    # The sum of these weights makes it 1 - 1e-16, and bins of the curve hold pairs of both kinds.
    d, same, groups = pairs(np.random.default_rng(0), 50, 1700, 100.0, 0.1, 0.1)
    options = {"groups": groups, "average": "identities"}
    found = verification(d, same, higher_is_closer=False, **options)
    assert found.auc == pytest.approx(1.0, abs=1e-12)
    assert found.intervals.auc.low == pytest.approx(1 - found.intervals.eer.high)
    assert found.intervals.auc.high == pytest.approx(1.0)


def test_a_wider_level_is_a_wider_interval():
    d, same, groups = pairs(np.random.default_rng(0), 40, 400, 2.0, 0.5, 1.0)
    narrow, wide = (
        verification(d, same, higher_is_closer=False, groups=groups, level=level).intervals.auc
        for level in (0.8, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def test_few_identities_have_figures_but_no_intervals():
    d, same, groups = pairs(np.random.default_rng(0), 29, 400, 2.0, 0.5, 1.0)
    assert verification(d, same, higher_is_closer=False, groups=groups).intervals is None
    assert at_threshold(d, same, 1.0, higher_is_closer=False, groups=groups).intervals is None


def test_errors_teach():
    d, same = [1.0, 2.0, 3.0], [True, False, False]
    with pytest.raises(ValueError, match=r"groups must have shape \(3, 2\)"):
        verification(d, same, higher_is_closer=False, groups=[1, 2])
    with pytest.raises(TypeError, match="identities as integers"):
        verification(d, same, higher_is_closer=False, groups=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="level must be"):
        verification(d, same, higher_is_closer=False, level=95)
    with pytest.raises(ValueError, match="resamples must be"):
        verification(d, same, higher_is_closer=False, resamples=10)
