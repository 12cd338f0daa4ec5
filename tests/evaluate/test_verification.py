"""The figures against scikit-learn, torchmetrics and by hand, and the pairs they are taken on."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    det_curve,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import binary_auroc, binary_eer

from nearfar.evaluate import at_threshold, fit_threshold, sample_pairs, verification


def scores(seed=0, n=400, levels=None):
    """Distances, similar pairs a little closer; with `levels`, full of ties."""
    random = np.random.default_rng(seed)
    same = random.random(n) < 0.4
    d = random.normal(size=n) + 1.2 * ~same
    return (d if levels is None else np.round(d * levels) / levels), same


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_figures_equal_scikit_learn(levels):
    d, same = scores(levels=levels, n=2000)
    found = verification(d, same, higher_is_closer=False, far=(0.5, 0.1, 0.03))
    assert found.auc == pytest.approx(roc_auc_score(same, -d))
    assert (found.n_similar, found.n_dissimilar) == (same.sum(), (~same).sum())
    for far, tar in found.tar_at_far.items():
        best = max(
            np.mean(d[same] <= t) for t in [-np.inf, *d] if np.mean(d[~same] <= t) <= far + 1e-12
        )
        assert tar == best
    false_accept, true_accept, threshold = roc_curve(same, -d, drop_intermediate=False)
    np.testing.assert_allclose(found.curve.far, false_accept[1:])
    np.testing.assert_allclose(found.curve.tar, true_accept[1:])
    np.testing.assert_allclose(found.curve.threshold, -threshold[1:])
    # The EER is where the curve, straight between its points, meets the other diagonal.
    points = np.stack([false_accept - found.eer, true_accept - (1 - found.eer)], 1)
    before, after = points[:-1], points[1:]
    on_line = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) < 1e-12
    between = ((before <= 1e-12) & (after >= -1e-12)).all(1)
    assert (on_line & between).any()


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_best_accuracy_and_f1_are_those_of_the_best_threshold_scikit_learn_finds(levels):
    d, same = scores(levels=levels)
    found = verification(d, same, higher_is_closer=False)
    for best, figure in ((found.best_accuracy, balanced_accuracy_score), (found.best_f1, f1_score)):
        assert best.value == pytest.approx(max(figure(same, d <= t) for t in np.unique(d)))
        assert best.value == pytest.approx(figure(same, d <= best.threshold))


def test_figures_equal_torchmetrics():
    d, same = scores(n=3000)
    found = verification(d, same, higher_is_closer=False)
    # It squashes scores outside 0 to 1 by itself; ranks lie inside already, and keep the order.
    rank = torch.from_numpy(1 - np.argsort(np.argsort(d)) / len(d))
    target = torch.from_numpy(same).long()
    assert found.auc == pytest.approx(float(binary_auroc(rank, target)), abs=1e-6)
    # It takes the nearest point of the curve instead of the point between.
    assert found.eer == pytest.approx(float(binary_eer(rank, target)), abs=1e-3)


def test_the_det_curve_is_scikit_learns_on_normal_axes():
    d, same = scores()
    far, frr = verification(d, same, higher_is_closer=False).curve.det()
    false_accept, false_reject, _ = det_curve(same, -d)
    normal = torch.distributions.Normal(0.0, 1.0)
    points = set(
        zip(normal.cdf(far).numpy().round(9), normal.cdf(frr).numpy().round(9), strict=True)
    )
    inside = (false_accept > 0) & (false_accept < 1) & (false_reject > 0) & (false_reject < 1)
    theirs = zip(false_accept[inside].round(9), false_reject[inside].round(9), strict=True)
    assert set(theirs) <= points


def test_similarities_are_negated_distances():
    d, same = scores()
    turned = verification(-d, same, higher_is_closer=True)
    straight = verification(d, same, higher_is_closer=False)
    assert (turned.auc, turned.eer, turned.tar_at_far) == (
        straight.auc,
        straight.eer,
        straight.tar_at_far,
    )
    assert turned.best_f1.threshold == -straight.best_f1.threshold
    threshold = fit_threshold(-d, same, higher_is_closer=True, far=0.05)
    assert threshold == -fit_threshold(d, same, higher_is_closer=False, far=0.05)
    assert at_threshold(-d, same, threshold, higher_is_closer=True).far <= 0.05


def test_too_few_dissimilar_pairs_are_reported_instead_of_a_number():
    d = np.arange(4500.0)
    same = d < 500
    found = verification(d, same, higher_is_closer=False, far=(0.1, 0.01, 0.001, 0.0))
    assert found.tar_at_far == {0.1: 1.0, 0.01: 1.0, 0.001: None, 0.0: None}
    assert "too few: needs 30,000 dissimilar pairs, has 4,000" in str(found)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["tar_at_far"] == {"0.1": 1.0, "0.01": 1.0, "0.001": None, "0": None}
    assert plain["dissimilar_needed"] == {"0.1": 300, "0.01": 3000, "0.001": 30000, "0": None}
    just = verification(d[:3500], same[:3500], higher_is_closer=False, far=(0.01,))
    assert just.tar_at_far == {0.01: 1.0}
    one_less = verification(d[1:3499], same[1:3499], higher_is_closer=False, far=(0.01,))
    assert one_less.tar_at_far == {0.01: None}


@pytest.mark.parametrize(
    ("d", "eer"),
    [
        ([0.1, 0.2, 0.8, 0.9], 0.0),  # similar ones first: perfect
        ([0.8, 0.9, 0.1, 0.2], 1.0),  # the wrong way round
        ([0.1, 0.8, 0.2, 0.9], 0.5),
        ([0.5, 0.5, 0.5, 0.5], 0.5),  # all tied: a coin
    ],
)
def test_equal_error_rate_by_hand(d, eer):
    found = verification(d, [True, True, False, False], higher_is_closer=False)
    assert found.eer == pytest.approx(eer)


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("far", [0.0, 0.01, 0.1, 0.29, 0.5])
def test_the_threshold_is_the_loosest_that_keeps_the_rate(levels, far):
    d, same = scores(levels=levels)
    threshold = fit_threshold(d, same, higher_is_closer=False, far=far)
    assert np.mean(d[~same] <= threshold) <= far
    looser = np.nextafter(threshold, np.inf)
    assert np.mean(d[~same] <= looser) > far


def test_the_rate_is_not_lost_to_rounding():
    d, same = np.arange(200.0), np.arange(200) < 100  # 0.29 * 100 is 28.999999999999996
    threshold = fit_threshold(d, same, higher_is_closer=False, far=0.29)
    assert np.sum(d[~same] <= threshold) == 29


def test_at_threshold_by_hand():
    d, same = [0.1, 0.3, 0.2, 0.9, 0.3], [True, True, False, False, False]
    found = at_threshold(d, same, 0.3, higher_is_closer=False)
    assert (found.tar, found.far) == (1.0, pytest.approx(2 / 3))
    assert found.accuracy == pytest.approx((1 + 1 / 3) / 2)


@pytest.mark.parametrize("counts", [(2, 3, 5, 1, 4), (9,) * 30, (2, 2), (40, 2, 1)])
def test_sampled_pairs_are_distinct_and_as_labelled(counts):
    identity = torch.from_numpy(
        np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    )
    every = list(combinations(range(len(identity)), 2))
    n_similar = sum(identity[a] == identity[b] for a, b in every)
    a, b, similar = sample_pairs(identity, 200, seed=3)
    assert torch.equal(identity[a] == identity[b], similar)
    pairs = {frozenset(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)}
    assert len(pairs) == len(a)  # distinct, also the other way round
    assert {len(pair) for pair in pairs} == {2}
    assert similar.sum() == min(100, n_similar)
    assert (~similar).sum() == min(100, len(every) - n_similar)


def test_sampled_pairs_follow_the_seed_and_cover_everything():
    identity = torch.arange(60) // 3
    first, again, other = (sample_pairs(identity, 40, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    seen = {
        (a, b)
        for seed in range(40)
        for a, b in zip(*(c.tolist() for c in sample_pairs(identity, 40, seed)[:2]), strict=True)
        if identity[a] == identity[b]
    }
    assert len(seen) == 60  # every similar pair is drawn by some seed


def test_8000_pairs_of_many_items_are_quick_and_balanced():
    a, _, similar = sample_pairs(torch.arange(26_000) // 20, 8000, seed=0)
    assert (len(a), int(similar.sum())) == (8000, 4000)
    # A huge identity does not need its pairs listed.
    _, _, similar = sample_pairs(torch.arange(200_000) // 100_000, 1000, seed=0)
    assert int(similar.sum()) == 500


def test_errors_teach():
    with pytest.raises(ValueError, match="both True and False"):
        verification([1.0, 2.0], [True, True], higher_is_closer=False)
    with pytest.raises(TypeError, match="must be bool"):
        verification([1.0, 2.0], [1, 0], higher_is_closer=False)
    with pytest.raises(ValueError, match=r"scores\[1\] is not finite"):
        verification([1.0, float("nan")], [True, False], higher_is_closer=False)
    with pytest.raises(ValueError, match="equal shape"):
        verification([1.0, 2.0, 3.0], [True, False], higher_is_closer=False)
    with pytest.raises(ValueError, match="far must be"):
        fit_threshold([1.0, 2.0], [True, False], higher_is_closer=False, far=1.0)
