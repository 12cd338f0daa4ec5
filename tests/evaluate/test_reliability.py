"""Reliability against loops over pairs, against the truth, and over all pairs of embeddings."""

import json
from collections import defaultdict
from math import log2

import numpy as np
import pytest

from nearfar.evaluate import (
    PlattProbability,
    every_pair,
    isotonic_probability,
    platt_probability,
    reliability,
)

TRUE = PlattProbability(slope=-2.0, intercept=2.0, share=0.5, prior=0.5)  # of `draw`
EDGES = (1 / 1000, 1 / 100, 1 / 10, 1 / 3, 1, 3, 10, 100, 1000)


def draw(n=4000, share=0.5, seed=0):
    random = np.random.default_rng(seed)
    same = random.random(n) < share
    return random.normal(size=n) + 2 * ~same, same


def pairs_of_identities(n=400, k=40, seed=0):
    """Scores, labels and identities, where some identities have many pairs."""
    random = np.random.default_rng(seed)
    same = random.random(n) < 0.4
    a = (k * random.random(n) ** 2).astype(int)
    b = np.where(same, a, (a + random.integers(1, k, n)) % k)
    return random.normal(size=n) + 2 * ~same + 0.01 * a, same, np.stack([a, b], 1)


def oracle(d, same, probability, groups=None):
    """Error, loss, and (claimed, seen) of the bins, by loops."""
    cells = (
        [(s, *sorted(g)) for s, g in zip(same, groups, strict=True)] if groups is not None else None
    )
    prior, rows = probability.prior, defaultdict(list)
    loss = 0.0
    weights = [1 / cells.count(cell) for cell in cells] if cells else [1.0] * len(d)
    total = {
        kind: sum(w for w, s in zip(weights, same, strict=True) if s == kind) for kind in (0, 1)
    }
    for score, is_same, weight in zip(d, same, weights, strict=True):
        line = probability.slope * score + probability.intercept
        odds = np.exp(line) * (1 - probability.share) / probability.share
        p = odds * prior / (odds * prior + 1 - prior)
        share = weight * (prior if is_same else 1 - prior) / total[int(is_same)]
        loss -= share * log2(p if is_same else 1 - p)
        rows[sum(odds >= edge for edge in EDGES)].append((share, p, bool(is_same)))
    bins = []
    for _, held in sorted(rows.items()):
        whole = sum(share for share, _, _ in held)
        claimed = sum(share * p for share, p, _ in held) / whole
        bins.append((whole, claimed, sum(share for share, _, s in held if s) / whole))
    return sum(w * abs(claimed - seen) for w, claimed, seen in bins), loss, bins


@pytest.mark.parametrize("prior", [0.5, 0.1])
@pytest.mark.parametrize("average", ["pairs", "identities"])
def test_the_figures_are_those_of_a_loop(prior, average):
    d, same, groups = pairs_of_identities()
    probability = PlattProbability(slope=-4.0, intercept=5.0, share=0.3, prior=prior)
    found = reliability(d, same, probability, groups=groups, average=average)
    known = groups.tolist() if average == "identities" else None
    error, loss, bins = oracle(d, same, probability, known)
    assert len(bins) == len(found.bins) == 10
    assert found.calibration_error == pytest.approx(error, abs=1e-12)
    assert found.log_loss == pytest.approx(loss, abs=1e-12)
    ours = [(one.share, one.claimed, one.seen) for one in found.bins]
    np.testing.assert_allclose(ours, bins, atol=1e-12)
    assert sum(one.n_similar for one in found.bins) == same.sum()
    assert sum(one.n_dissimilar for one in found.bins) == (~same).sum()
    entropy = -prior * log2(prior) - (1 - prior) * log2(1 - prior)
    assert found.log_loss_of_prior == pytest.approx(entropy)


def test_the_true_probability_holds_and_others_do_not():
    d, same = draw(100_000)
    true = reliability(d, same, TRUE)
    assert true.calibration_error < 0.005
    bold = PlattProbability(slope=-6.0, intercept=6.0, share=0.5, prior=0.5)
    assert reliability(d, same, bold).calibration_error > 0.08
    assert reliability(d, same, bold).log_loss > true.log_loss
    silent = PlattProbability(slope=0.0, intercept=0.0, share=0.5, prior=0.5)
    nothing = reliability(d, same, silent)
    assert nothing.calibration_error == pytest.approx(0, abs=1e-12)  # true, and of no use
    assert nothing.log_loss == nothing.log_loss_of_prior == 1


@pytest.mark.parametrize("fit", [platt_probability, isotonic_probability])
def test_a_fitted_probability_holds_on_other_pairs(fit):
    probability = fit(*draw(20_000), higher_is_closer=False, prior=0.5)
    assert reliability(*draw(20_000, share=0.1, seed=1), probability).calibration_error < 0.015


def test_intervals_need_thirty_identities_in_the_bin():
    d, same, groups = pairs_of_identities(3000, 60)
    found = reliability(d, same, TRUE, groups=groups, average="identities")
    held = [one for one in found.bins if one.interval]
    assert len(held) >= 6
    for one in held:
        assert one.interval.low - 1e-12 <= one.seen <= one.interval.high
    assert any(one.interval is None for one in found.bins)  # of few pairs
    assert not any(one.interval for one in reliability(d, same, TRUE).bins)
    d, same, groups = pairs_of_identities(3000, 29)
    few = reliability(d, same, TRUE, groups=groups)
    assert not any(one.interval for one in few.bins)


def clustered(k, seed):
    """Pairs of k identities, whose distances also differ between identities."""
    random = np.random.default_rng(seed)
    a, b = np.triu_indices(k, k=1)
    own = np.repeat(np.arange(k), 4)
    groups = np.stack([np.append(a, own), np.append(b, own)], 1)
    same = np.arange(len(groups)) >= len(a)
    offset = random.normal(size=k) / 2
    d = random.normal(size=len(groups)) + 2 * ~same + offset[groups].mean(1)
    return d, same, groups


def test_intervals_hold_the_share_of_many_identities():
    d, same, groups = clustered(800, 0)
    truth = {one.least: one.seen for one in reliability(d, same, TRUE).bins}
    inside = []
    for seed in range(1, 41):
        d, same, groups = clustered(60, seed)
        found = reliability(d, same, TRUE, groups=groups, resamples=200)
        spans = [(one.interval, truth[one.least]) for one in found.bins if one.interval]
        inside += [span.low <= seen <= span.high for span, seen in spans]
    assert len(inside) > 200
    assert np.mean(inside) > 0.9


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_all_pairs_have_the_figures_of_given_ones(distance):
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), random.integers(2, 6, 40))
    x = random.normal(size=(40, 6))[labels] + random.normal(size=(len(labels), 6))
    pairs = every_pair(x, labels, distance=distance)
    a, b = np.triu_indices(len(x), k=1)
    d, same = np.linalg.norm(x[a] - x[b], axis=1), labels[a] == labels[b]
    if distance == "cosine":
        rows = x / np.linalg.norm(x, axis=1, keepdims=True)
        d = 1 - (rows[a] * rows[b]).sum(1)
    how = {"groups": np.stack([labels[a], labels[b]], 1), "average": "identities"}
    ours = pairs.fit_probability(prior=0.2)
    theirs = platt_probability(d, same, higher_is_closer=False, prior=0.2, **how)
    at = np.linspace(0, d.max(), 9)
    assert ours(at).tolist() == pytest.approx(theirs(at).tolist(), rel=1e-5)
    assert ours.limits == pytest.approx(theirs.limits)
    one, other = pairs.reliability(theirs), reliability(d, same, theirs, **how)
    assert one.calibration_error == pytest.approx(other.calibration_error, abs=1e-6)
    assert one.log_loss == pytest.approx(other.log_loss, abs=1e-6)
    for mine, given in zip(one.bins, other.bins, strict=True):
        assert (mine.n_similar, mine.n_dissimilar) == (given.n_similar, given.n_dissimilar)
        assert (mine.interval is None) == (given.interval is None)
        if given.interval:
            assert mine.interval.low == pytest.approx(given.interval.low, abs=1e-6)
            assert mine.interval.high == pytest.approx(given.interval.high, abs=1e-6)


def test_pairs_the_wrong_way_round_give_the_prior():
    labels = np.arange(40) % 2
    x = np.arange(40)[:, None] // 2 + 100.0 * (np.arange(40)[:, None] % 4 // 2)
    probability = every_pair(x, labels, distance="euclidean").fit_probability(prior=0.3)
    assert probability.slope == 0
    assert probability([0.0, 50.0]).tolist() == pytest.approx([0.3, 0.3])


def test_it_prints_and_becomes_json():
    found = reliability(*draw(2000), TRUE)
    assert "calibration error 0.0" in str(found)
    assert "0.333 to 1" in str(found)
    top = reliability([0.0, 1.0], [True, False], PlattProbability(-20.0, 10.0, 0.5, 0.5))
    held = json.loads(json.dumps(top.as_dict(), allow_nan=False))
    assert [one["most"] for one in held["bins"]] == [0.001, None]
    with pytest.raises(TypeError, match="needs groups"):
        reliability(*draw(20), TRUE, average="identities")
    with pytest.raises(ValueError, match="both True and False"):
        reliability([0.1], [True], TRUE)
