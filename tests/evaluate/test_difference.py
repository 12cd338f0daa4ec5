"""Differences of two scores: by a bootstrap by hand, and how often intervals hold the truth."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from nearfar import evaluate as ev
from nearfar.evaluate import difference, tally

NORMAL = NormalDist()
FAR = (0.1, 0.02)


def truth(apart, between, within):
    """AUC, EER and TAR at each FAR of one score of `pairs`, over all identities there might be."""
    similar = (between**2 + within**2) ** 0.5
    dissimilar = (2 * between**2 + within**2) ** 0.5
    auc = NORMAL.cdf(apart / (similar**2 + dissimilar**2) ** 0.5)
    eer = NORMAL.cdf(-apart / (similar + dissimilar))
    tars = [NORMAL.cdf((apart + dissimilar * NORMAL.inv_cdf(f)) / similar) for f in FAR]
    return np.array([auc, eer, *tars])


def pairs(random, n_identities, n, a, b, common=0.7):
    """(2, 2n) distances by scores a and b, labels, and the identities of each pair.

    A score is (apart, between, within): distances are normal around 0 (similar) and `apart`, with
    an offset of each identity. A share of each variance is `common` to both scores.
    """

    def correlated(size):
        shared, own = random.normal(size=size), random.normal(size=(2, size))
        return common**0.5 * shared + (1 - common) ** 0.5 * own

    offsets, noises = correlated(n_identities), correlated(2 * n)
    same = np.arange(n) % n_identities
    i = random.integers(0, n_identities, n)
    j = (i + random.integers(1, n_identities, n)) % n_identities
    scores = [
        np.concatenate([between * o[same], apart + between * (o[i] + o[j])]) + within * noise
        for o, noise, (apart, between, within) in zip(offsets, noises, (a, b), strict=True)
    ]
    groups = np.concatenate([np.stack([same, same], 1), np.stack([i, j], 1)])
    return np.stack(scores), np.arange(2 * n) < n, groups


def compare(d, same, groups, **more):
    options = {"higher_is_closer": False, "far": FAR, "groups": groups, **more}
    return difference(*d, same, **options)


def spans(found):
    """(k,) differences and (k, 2) the ends of their intervals."""
    known = found.intervals
    ends = [known.auc, known.eer, *known.tar_at_far.values()]
    values = [found.auc, found.eer, *found.tar_at_far.values()]
    return np.array(values), np.array([(end.low, end.high) for end in ends])


GOOD, FAIR = (2.0, 0.5, 0.8), (1.7, 0.5, 0.8)


# -- against a bootstrap by hand -------------------------------------------------------------------


def figures_by_hand(d, same, weight, far):
    """AUC, EER, and TAR at a rate between two points of the curve, by a walk over thresholds."""
    false, true = [0.0], [0.0]
    for threshold in np.unique(d):
        near = d <= threshold
        false.append(max(false[-1], weight[near & ~same].sum() / weight[~same].sum()))
        true.append(max(true[-1], weight[near & same].sum() / weight[same].sum()))
    false, true = np.array(false), np.array(true)
    auc = sum((false[1:] - false[:-1]) * (true[1:] + true[:-1]) / 2)
    k = next(k for k in range(len(false)) if false[k] >= 1 - true[k])
    share = (1 - true[k - 1] - false[k - 1]) / (false[k] - false[k - 1] + true[k] - true[k - 1])
    eer = false[k - 1] + share * (false[k] - false[k - 1])
    k = next(k for k in range(len(false)) if false[k] > far)
    tar = true[k - 1] + (far - false[k - 1]) / (false[k] - false[k - 1]) * (true[k] - true[k - 1])
    return auc, eer, tar


def test_the_interval_is_that_of_a_paired_bootstrap_over_identities():
    n, resamples, far = 32, 100, 0.137
    d, same, groups = pairs(np.random.default_rng(0), n, 240, GOOD, FAIR)
    d = d.round(2)
    found = compare(d, same, groups, far=(far,), resamples=resamples, seed=5)

    def apart(weight):
        a, b = (figures_by_hand(score, same, weight, far) for score in d)
        return np.array(a) - np.array(b)

    drawn = np.random.default_rng([5, 3]).poisson(1.0, (resamples, n))
    i, j = groups.T
    resampled = [apart(np.where(i == j, w[i], w[i] + w[j] - 1.0)) for w in drawn]
    variance = np.var(resampled, axis=0, ddof=1) * n * (n - 1) / ((n - 2) * (n - 3))
    half = student.ppf(0.975, n - 1) * variance**0.5
    values, ends = spans(found)
    assert values[:2] == pytest.approx(apart(np.ones(len(same)))[:2])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * half, rtol=2e-4)
    np.testing.assert_allclose(ends.mean(1), values, atol=1e-12)


def test_both_scores_have_the_weights_of_the_same_identities(monkeypatch):
    """However many steps a score has, and however its identities are dealt with in parts."""
    monkeypatch.setattr(tally, "_AT_A_TIME", 16)
    random = np.random.default_rng(0)
    fine, same = random.permutation(400) / 1.0, np.arange(400) < 200
    groups = random.integers(0, 40, (400, 1)).repeat(2, 1)
    few, many = (
        next(iter(tally.replicates(tally.tally_of(d, same, groups, "pairs"), 10, 0)))
        for d in (fine // 100, fine)
    )
    for coarse, exact in zip(few, many, strict=True):
        np.testing.assert_allclose(coarse, exact[:, 99::100], atol=1e-12)


# -- how often they hold the truth -----------------------------------------------------------------


def coverage(repeats, n_identities, n, a, b, common=0.7, resamples=150):
    """The share of samples whose intervals hold the true difference, for each figure."""
    random, true = np.random.default_rng(0), truth(*a) - truth(*b)
    held = np.zeros(len(true))
    for repeat in range(repeats):
        sample = pairs(random, n_identities, n, a, b, common)
        _, ends = spans(compare(*sample, resamples=resamples, seed=repeat))
        held += (ends[:, 0] <= true) & (true <= ends[:, 1])
    return held / repeats


def test_intervals_hold_the_truth():
    # At 95 %, 60 samples hold it in fewer than 53 about five times in a thousand.
    assert (coverage(60, 100, 2000, GOOD, FAIR) > 52 / 60).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "design",
    [
        (100, 2000, GOOD, FAIR),
        (100, 2000, GOOD, GOOD),
        (50, 1500, (2.0, 0.7, 0.7), (1.7, 0.7, 0.7)),
        (40, 1600, (2.0, 0.2, 1.0), (1.8, 0.2, 1.0)),
        (200, 2000, (2.0, 0.0, 1.0), (1.8, 0.0, 1.0)),
        (100, 2000, (4.0, 0.5, 0.8), (3.5, 0.5, 0.8)),
        (50, 1500, (5.0, 0.5, 0.8), (4.5, 0.5, 0.8)),
        (100, 2000, (4.0, 0.5, 0.8), (1.0, 0.5, 0.8), 0.3),
        (100, 2000, (2.5, 0.5, 0.8), (2.4, 0.5, 0.8), 0.95),
    ],
    ids=[
        "usual",
        "equally good",
        "identities as different as pairs",
        "little due to identities",
        "nothing due to identities",
        "few errors",
        "hardly any error",
        "far apart",
        "nearly the same score",
    ],
)
def test_intervals_hold_the_truth_at_about_their_nominal_rate(design):
    found = coverage(250, *design)
    assert (found >= 0.93).all(), found


def test_what_both_scores_share_cancels():
    d, same, groups = pairs(np.random.default_rng(0), 60, 1500, GOOD, FAIR, common=0.95)
    found = compare(d, same, groups)
    apart, a, b = (of.intervals.auc for of in (found, found.a, found.b))
    assert apart.high - apart.low < 0.5 * np.hypot(a.high - a.low, b.high - b.low)


# -- laws ------------------------------------------------------------------------------------------


@pytest.fixture
def sample():
    return pairs(np.random.default_rng(1), 50, 1500, GOOD, FAIR)


def test_exchanging_the_scores_changes_the_signs(sample):
    d, same, groups = sample
    (values, ends), (other, other_ends) = (
        spans(compare(given, same, groups)) for given in (d, d[::-1])
    )
    np.testing.assert_allclose(values, -other, atol=1e-12)
    np.testing.assert_allclose(ends, -other_ends[:, ::-1], atol=1e-12)


@pytest.mark.parametrize("average", ["pairs", "identities"])
def test_a_score_does_not_differ_from_itself_or_from_its_order(sample, average):
    d, same, groups = sample
    far = (0.1,)
    for other in (d[0], np.exp(d[0])):
        found = compare((d[0], other), same, groups, average=average, far=far)
        values, ends = spans(found)
        assert not values.any()
        np.testing.assert_allclose(ends, 0, atol=1e-9)
    found = compare((d[0], -d[0]), same, groups, higher_is_closer=(False, True), far=far)
    assert not spans(found)[0].any()


def test_the_figures_are_those_of_verification(sample):
    d, same, groups = sample
    found = compare(d, same, groups, level=0.9, seed=3)
    options = {"higher_is_closer": False, "far": FAR, "level": 0.9, "seed": 3}
    for score, of in zip(d, (found.a, found.b), strict=True):
        assert of == ev.verification(score, same, groups=groups, **options)
    assert found.auc == found.a.auc - found.b.auc
    assert found.tar_at_far[0.1] == found.a.tar_at_far[0.1] - found.b.tar_at_far[0.1]
    assert found.intervals.level == 0.9


def test_without_errors_the_width_is_that_of_as_many_identities_without_an_error():
    d, same, groups = pairs(np.random.default_rng(0), 50, 2000, (100.0, 0.1, 0.1), (90.0, 0.1, 0.1))
    values, ends = spans(compare(d, same, groups))
    assert not values.any()
    t = student.ppf(0.975, 49)
    np.testing.assert_allclose(ends[:, 1], t**2 / (50 + t**2), rtol=1e-3)
    np.testing.assert_allclose(ends[:, 0], -ends[:, 1])


def test_one_score_without_errors_is_compared_by_both_intervals():
    d, same, groups = pairs(np.random.default_rng(0), 50, 2000, (100.0, 0.1, 0.1), FAIR)
    found = compare(d, same, groups)
    a, b, apart = found.a.intervals.eer, found.b.intervals.eer, found.intervals.eer
    eer = found.b.eer
    assert found.a.eer == 0
    assert apart.low == pytest.approx(-eer - (b.high - eer))
    assert apart.high == pytest.approx(-eer + (a.high**2 + (eer - b.low) ** 2) ** 0.5)


def test_no_difference_is_beyond_one():
    d, same, groups = pairs(np.random.default_rng(0), 50, 2000, (100.0, 0.1, 0.1), FAIR)
    found = compare((d[0], -d[0]), same, groups)
    assert (found.auc, found.intervals.auc.high) == (1.0, 1.0)
    assert found.intervals.auc.low < 1.0


# -- what is printed and stored --------------------------------------------------------------------


def test_results_are_shown_and_stored(sample):
    d, same, groups = sample
    found = compare(d, same, groups, far=(0.1, 0.001))
    held = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert held["auc"] == found.auc
    assert held["a"] == json.loads(json.dumps(found.a.as_dict()))
    assert held["tar_at_far"] == {"0.1": found.tar_at_far[0.1], "0.001": None}
    assert held["intervals"]["auc"] == vars(found.intervals.auc)
    assert held["intervals"]["tar_at_far"]["0.001"] is None
    assert "too few: needs 30,000 dissimilar pairs, has 1,500" in str(found)
    assert found.table().header == ("figure", "a", "b", "a - b", "95% interval")
    without = compare(d, same, None)
    assert without.intervals is None
    assert without.as_dict()["intervals"] is None
    assert without.table().rows[0][-1] == "-"


# -- two sets of embeddings ------------------------------------------------------------------------


def embeddings(n_identities=40):
    random = np.random.default_rng(0)
    labels = np.arange(5 * n_identities) % n_identities
    x = random.normal(size=(n_identities, 6))[labels] + random.normal(size=(len(labels), 6))
    return x, x + random.normal(size=x.shape), labels


def test_embeddings_are_compared_as_their_pairs_are():
    x, y, labels = embeddings()
    camera = np.arange(len(labels)) % 3
    sides = [ev.every_pair(z, labels, never_within=camera) for z in (x, y)]
    ours = sides[0].difference(sides[1], far=(0.1,))
    i, j = np.triu_indices(len(x), 1)
    i, j = (rows[camera[i] != camera[j]] for rows in (i, j))
    units = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    theirs = difference(
        *(1 - (unit[i] * unit[j]).sum(1) for unit in units),
        labels[i] == labels[j],
        higher_is_closer=False,
        far=(0.1,),
        groups=np.stack([labels[i], labels[j]], 1),
        average="identities",
    )
    (values, ends), (other, other_ends) = spans(ours), spans(theirs)
    np.testing.assert_allclose(values, other, atol=1e-9)
    np.testing.assert_allclose(ends, other_ends, atol=2e-3)  # the bins of the curves differ
    assert ours.intervals.auc.low > 0


@pytest.mark.parametrize("change", ["fewer", "labels", "camera", "no camera"])
def test_embeddings_of_other_items_are_refused(change):
    x, y, labels = embeddings()
    camera = np.arange(len(x)) // 40 % 2
    first = ev.every_pair(x, labels, never_within=camera)
    kept = slice(0, -1 if change == "fewer" else None)
    other = {"labels": labels[::-1].copy() if change == "labels" else labels}
    if change != "no camera":
        other["never_within"] = 1 - camera if change == "camera" else camera
    second = ev.every_pair(y[kept], **{name: given[kept] for name, given in other.items()})
    with pytest.raises(ValueError, match="other must be made from the same labels, never_within"):
        first.difference(second)


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ("scores_a", ValueError, r"scores_a\[3\] is not finite"),
        ("scores_b", ValueError, r"scores_b\[3\] is not finite"),
        ("shape", ValueError, r"scores_b and similar must be of equal shape"),
        ("average", TypeError, "needs groups="),
        ("level", ValueError, "level must"),
        ("far", ValueError, "far must hold rates"),
    ],
)
def test_errors_teach(sample, which, error, message):
    (a, b), same, groups = sample
    if which.startswith("scores"):
        (a if which == "scores_a" else b)[3] = np.nan
    if which == "shape":
        b = b[:-1]
    wrong = {
        "average": {"groups": None, "average": "identities"},
        "level": {"level": 95},
        "far": {"far": (5,)},
    }
    with pytest.raises(error, match=message):
        compare((a, b), same, **{"groups": groups, **wrong.get(which, {})})


def test_tensors_are_taken_as_arrays_are(sample):
    d, same, groups = sample
    expected = compare(d, same, groups)
    given = (torch.from_numpy(array) for array in (d, same, groups))
    assert compare(*given) == expected


@pytest.mark.parametrize("wrong", [None, (False,), (False, 1), "yes"])
def test_the_direction_of_scores_must_be_said(wrong):
    with pytest.raises(TypeError, match="higher_is_closer must be True for similarities or False"):
        ev.difference([0.1, 0.9], [0.1, 0.9], [True, False], higher_is_closer=wrong)
