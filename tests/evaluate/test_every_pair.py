"""Every pair of labelled embeddings: the figures of a loop over identities, in bounded memory."""

import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
import torch

from nearfar import memory_budget
from nearfar.engine.budget import tile_shape
from nearfar.evaluate import (
    at_threshold,
    every_pair,
    fit_threshold,
    sample_pairs,
    verification,
)
from nearfar.evaluate.every_pair import within_bounds

FARS = (0.2, 0.05)


def distance_of(a, b, distance):
    """In float64, by the formula."""
    if distance == "cosine":
        return 1 - a @ b / np.sqrt((a @ a) * (b @ b))
    if distance == "manhattan" or not isinstance(distance, str):
        return np.linalg.norm(a - b, ord=1 if isinstance(distance, str) else distance)
    square = ((a - b) ** 2).sum()
    return square if distance == "sqeuclidean" else square**0.5


def oracle(x, labels, distance="euclidean", group=None):
    """Rates by threshold as means over identities and over pairs of identities, by loops."""
    cells = {}
    for i, j in combinations(range(len(x)), 2):
        if group is not None and group[i] == group[j] and group[i] >= 0:
            continue
        cell = tuple(sorted((labels[i], labels[j])))
        cells.setdefault(cell, []).append(distance_of(x[i], x[j], distance))
    same = [np.array(d) for (a, b), d in cells.items() if a == b]
    apart = [np.array(d) for (a, b), d in cells.items() if a != b]

    def rates(threshold):
        far = np.mean([(d <= threshold).mean() for d in apart])
        tar = np.mean([(d <= threshold).mean() for d in same])
        return far, tar

    auc = np.mean([np.mean((s[:, None] < d) + (s[:, None] == d) / 2) for s in same for d in apart])
    return auc, rates, np.sort(np.concatenate(same)), np.sort(np.concatenate(apart))


def some(n_identities=12, seed=0, d=5):
    """Rows of identities of very different sizes, in no order."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([[i] * (2 + i % 4) for i in range(n_identities)] + [[0] * 20, [99]])
    labels = random.permutation(labels)
    x = random.normal(size=(100, d))[labels] + 0.6 * random.normal(size=(len(labels), d))
    return x, labels


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "manhattan", 3.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_figures_are_those_of_a_loop_over_identities(distance, grouped):
    x, labels = some()
    group = np.random.default_rng(1).integers(-1, 3, len(x)) if grouped else None
    auc, rates, same, apart = oracle(x, labels, distance, group)
    pairs = every_pair(x, labels, distance=distance, never_within=group)
    assert (pairs.n_similar, pairs.n_dissimilar) == (len(same), len(apart))
    found = pairs.verification(far=FARS)
    assert found.auc == pytest.approx(auc, abs=1e-12)
    assert found.n_trials == len(meetings(labels, group))
    for threshold in (same[3], same[-4], apart[40]):
        at = pairs.at_threshold(float(threshold) + 1e-9)
        assert (at.far, at.tar) == pytest.approx(rates(threshold + 1e-9), abs=1e-12)
    for far in FARS:
        threshold = pairs.fit_threshold(far=far)
        assert rates(threshold - 1e-9)[0] <= far
        looser = apart[np.searchsorted(apart, threshold - 1e-9)]
        assert rates(looser + 1e-9)[0] > far
    # Between any two distances the curve holds what the threshold there does.
    every = np.unique(np.concatenate([same, apart]))
    every = every[np.append(True, np.diff(every) > 1e-6)]
    for threshold in (every[1:] + every[:-1]) / 2:
        place = np.searchsorted(found.curve.threshold, threshold, side="right") - 1
        far, tar = rates(threshold)
        assert found.curve.tar[place] == pytest.approx(tar, abs=1e-9)
        low, high = found.curve.far[place : place + 2]  # a step holds the pairs up to the next one
        assert low - 1e-9 <= far <= high + 1e-9


def test_a_distance_that_is_another_from_each_end_has_no_pairs():
    x, labels = some()
    with pytest.raises(ValueError, match=r"'manhattan', or a number .* one distance; got 'snr'"):
        every_pair(x, labels, distance="snr")


def meetings(labels, group):
    return {
        tuple(sorted((labels[i], labels[j])))
        for i, j in combinations(range(len(labels)), 2)
        if labels[i] != labels[j] and (group is None or group[i] != group[j] or group[i] < 0)
    }


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_streamed_and_given_pairs_have_the_same_figures(distance):
    x, labels = some(40, seed=2)
    pairs = every_pair(x, labels, distance=distance)
    a, b = np.triu_indices(len(x), k=1)
    d = np.array([distance_of(x[i], x[j], distance) for i, j in zip(a, b, strict=True)])
    groups, same = np.stack([labels[a], labels[b]], 1), labels[a] == labels[b]
    given = {"higher_is_closer": False, "groups": groups, "average": "identities"}
    ours, theirs = pairs.verification(far=FARS), verification(d, same, far=FARS, **given)
    assert (ours.auc, ours.eer) == pytest.approx((theirs.auc, theirs.eer), abs=1e-9)
    assert ours.tar_at_far == pytest.approx(theirs.tar_at_far)
    assert ours.best_accuracy.value == pytest.approx(theirs.best_accuracy.value)
    assert ours.best_f1.value == pytest.approx(theirs.best_f1.value)
    assert ours.intervals.n_identities == theirs.intervals.n_identities == 40
    for side in ("low", "high"):
        one, other = (getattr(f.intervals.auc, side) for f in (ours, theirs))
        assert one == pytest.approx(other, abs=1e-3)
    threshold = fit_threshold(d, same, far=0.05, **given)
    assert pairs.fit_threshold(far=0.05) == pytest.approx(threshold, abs=1e-6)
    ours, theirs = pairs.at_threshold(threshold), at_threshold(d, same, threshold, **given)
    assert ours.far == pytest.approx(theirs.far)
    assert ours.intervals.far.high == pytest.approx(theirs.intervals.far.high, abs=1e-6)
    near, far = pairs.hardest(5)
    assert [p.distance for p in near] == pytest.approx(np.sort(d[~same])[:5], abs=1e-5)
    assert [p.distance for p in far] == pytest.approx(np.sort(d[same])[::-1][:5], abs=1e-5)
    assert all(labels[p.a] != labels[p.b] for p in near)
    assert all(labels[p.a] == labels[p.b] for p in far)


def test_tiles_and_the_order_of_rows_change_nothing():
    x, labels = some(40, seed=3)
    whole = every_pair(x, labels)
    expected = whole.verification(far=FARS)
    order = np.random.default_rng(0).permutation(len(x))
    for shape in ((7, 11), (64, 5), (1000, 1000)):
        with tile_shape(*shape):
            pairs = every_pair(x[order], labels[order] * 7 + 3)
            found = pairs.verification(far=FARS)
            assert found.auc == pytest.approx(expected.auc, abs=1e-9)
            assert found.eer == pytest.approx(expected.eer, abs=1e-9)
            assert found.intervals.auc.low == pytest.approx(expected.intervals.auc.low, abs=1e-6)
            assert pairs.fit_threshold(far=0.1) == pytest.approx(whole.fit_threshold(far=0.1))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_search_for_a_threshold_may_round_distances_differently(distance, dtype, monkeypatch):
    x, labels = some(40, seed=3)
    pairs = every_pair(x.astype(dtype), labels, distance=distance)
    fars = np.linspace(0, 0.999999, 60)
    expected = [pairs.fit_threshold(far=far) for far in fars]
    generator, dissimilar = torch.Generator().manual_seed(0), pairs._dissimilar

    def rounded_differently():
        for part in dissimilar():
            up = torch.rand(len(part.distance), generator=generator) < 0.5
            infinity = torch.where(up, torch.inf, -torch.inf).to(part.distance.dtype)
            yield replace(part, distance=part.distance.nextafter(infinity))

    monkeypatch.setattr(pairs, "_dissimilar", rounded_differently)
    found = [pairs.fit_threshold(far=far) for far in fars]
    assert found == pytest.approx(expected, rel=1e-6)


def test_at_a_rate_of_nearly_one_the_threshold_is_below_the_farthest_pair():
    x, labels = some()
    pairs = every_pair(x, labels, distance="euclidean")
    threshold = pairs.fit_threshold(far=1 - 1e-12)
    farthest = max(float(part.distance.max()) for part in pairs._dissimilar())
    assert threshold == np.nextafter(farthest, -np.inf)


def test_equal_distances_count_half_and_stay_together():
    x = np.array([[0.0], [0], [1], [1], [1], [2]])
    labels = [0, 0, 0, 1, 1, 1]
    auc, rates, _, _ = oracle(x, labels)
    pairs = every_pair(x, labels, distance="euclidean")
    assert pairs.verification().auc == pytest.approx(auc)
    threshold = pairs.fit_threshold(far=0.5)
    assert 0 < threshold < 1
    assert pairs.at_threshold(1.0).far == pytest.approx(rates(1.0)[0])


def test_a_rate_is_never_above_one():
    for n in (3, 5, 6, 7, 10, 11, 13):
        labels = np.repeat(np.arange(12), n)
        x = np.random.default_rng(n).normal(size=(len(labels), 3))
        at = every_pair(x, labels, distance="euclidean").at_threshold(100.0)
        assert (at.far, at.tar) == pytest.approx((1.0, 1.0))
        assert max(at.far, at.tar) <= 1


def test_perfect_verification_has_a_threshold_among_the_dissimilar():
    labels = np.repeat(np.arange(30), 3)
    x = np.eye(30)[labels]
    pairs = every_pair(x, labels, distance="euclidean")
    found = pairs.verification()
    assert (found.auc, found.eer) == (1.0, 0.0)
    assert pairs.fit_threshold(far=0.01) == pytest.approx(2**0.5, abs=1e-6)
    assert pairs.at_threshold(pairs.fit_threshold(far=0.01)).far == 0.0


# One identity of many items must not make the figures.
def crowded(random_items=300):
    random = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(100), 4), np.full(random_items, 100)])
    x = random.normal(size=(101, 16))[labels] + 0.1 * random.normal(size=(len(labels), 16))
    x[labels == 100] = random.normal(size=(random_items, 16))
    return x, labels


def test_one_identity_does_not_make_the_figures():
    x, labels = crowded()
    found = every_pair(x, labels).verification()
    assert found.auc > 0.98  # of 100 good identities; by pairs it is a coin's
    assert found.intervals.n_identities == 101
    a, b, same = sample_pairs(labels, 8000, seed=0)
    counts = np.bincount(labels[a[same]])
    assert len(counts) == 101
    assert (counts[:100] == 6).all()  # all there are
    parties = np.bincount(np.concatenate([labels[a[~same]], labels[b[~same]]]))
    assert parties[100] < 3 * parties[:100].mean()


@pytest.mark.parametrize(
    ("far", "k", "enough"), [(0.01, 78, True), (0.01, 77, False), (0.001, 246, True)]
)
def test_a_rate_is_given_wherever_pairs_of_identities_are_enough(far, k, enough):
    labels = np.repeat(np.arange(k), 2)
    x = np.random.default_rng(0).normal(size=(len(labels), 4))
    found = every_pair(x, labels).verification(far=(far,), resamples=100)
    assert found.n_trials == k * (k - 1) // 2
    assert (found.tar_at_far[far] is not None) == enough
    assert ("pairs of identities" in str(found)) != enough


def test_more_items_than_are_compared_are_drawn_evenly():
    sizes = [1000, 50, 20, *[3] * 200]
    identity = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = within_bounds(identity, 0, 700)
    kept = torch.bincount(identity[rows])
    assert 600 < len(rows) <= 700
    assert kept[0] == kept[1]  # as many as of any other
    assert (kept[3:] == 3).all()
    assert torch.equal(rows, within_bounds(identity, 0, 700))
    assert not torch.equal(rows, within_bounds(identity, 1, 700))
    few = within_bounds(identity, 0, 100)  # fewer than two of each
    assert 90 < len(few) <= 100
    assert torch.bincount(identity[few]).max() == 2
    assert len(within_bounds(identity, 0)) == len(identity)
    crowd = torch.zeros(5000, dtype=torch.long)  # 12 million similar pairs
    assert len(within_bounds(crowd, 0)) < 2900


NORMAL = NormalDist()


def coverage(repeats, sizes, between, within, seed=0):
    """The share of samples whose intervals hold the truth, for AUC, EER and TAR at two rates.

    The distance of two items of one identity is |a - b| of what differs within identities, plus
    an offset of the identity; that of two identities is larger by 2 and has the offsets of both.
    So it cannot come from embeddings: the pairs are given.
    """
    random = np.random.default_rng(seed)
    a, b = np.triu_indices(sum(sizes), k=1)
    who = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.stack([who[a], who[b]], 1)
    same = who[a] == who[b]
    similar, dissimilar = (between**2 + within**2) ** 0.5, (2 * between**2 + within**2) ** 0.5
    apart = 2.0
    fars = (0.1, 0.02)
    expected = np.array(
        [
            NORMAL.cdf(apart / (similar**2 + dissimilar**2) ** 0.5),
            NORMAL.cdf(-apart / (similar + dissimilar)),
            *(NORMAL.cdf((apart + dissimilar * NORMAL.inv_cdf(f)) / similar) for f in fars),
        ]
    )
    held = np.zeros(len(expected))
    for repeat in range(repeats):
        offset = between * random.normal(size=len(sizes))
        d = within * random.normal(size=len(a)) + np.where(
            same, offset[who[a]], apart + offset[who[a]] + offset[who[b]]
        )
        found = verification(
            d,
            same,
            higher_is_closer=False,
            far=fars,
            groups=groups,
            average="identities",
            resamples=200,
            seed=repeat,
        ).intervals
        spans = [found.auc, found.eer, *found.tar_at_far.values()]
        held += [s.low <= t <= s.high for s, t in zip(spans, expected, strict=True)]
    return held / repeats


def test_intervals_over_all_pairs_hold_the_truth():
    sizes = [2 + i % 5 for i in range(80)]
    assert (coverage(60, sizes, 0.5, 0.8) > 52 / 60).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "between", "within", "low"),
    [
        ([2 + i % 5 for i in range(80)], 0.5, 0.8, (0.92, 0.92, 0.92, 0.90)),
        ([6] * 79 + [120], 0.5, 0.8, (0.92, 0.92, 0.92, 0.90)),  # one with many items
        ([4] * 80, 0.7, 0.7, (0.92, 0.92, 0.90, 0.83)),
        ([4] * 80, 0.0, 1.0, (0.92, 0.92, 0.92, 0.92)),
    ],
)
def test_intervals_over_all_pairs_hold_it_at_about_their_nominal_rate(sizes, between, within, low):
    found = coverage(240, sizes, between, within)
    assert (found >= low).all(), found


def test_memory_does_not_grow_with_the_pairs():
    # 3,640 items: 6.6 million pairs, whose distances alone are 26 MB, and 130 with their labels.
    program = """
import resource, torch
from nearfar.evaluate import every_pair
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(k):
    labels = torch.arange(k).repeat_interleave(14)
    x = torch.randn(len(labels), 32, generator=torch.Generator().manual_seed(0))
    pairs = every_pair(x, labels)
    pairs.verification(resamples=100)
    pairs.at_threshold(pairs.fit_threshold(far=0.01))
run(100)
before = peak()
run(260)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 90


def test_a_small_budget_is_kept_and_gives_the_same_figures():
    x, labels = some(40, seed=4)
    expected = every_pair(x, labels).verification().auc
    with memory_budget(2**16):
        assert every_pair(x, labels).verification().auc == pytest.approx(expected, abs=1e-9)


def test_errors_teach():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="no similar pair"):
        every_pair(x, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="no dissimilar pair"):
        every_pair(x, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="no similar pair"):
        every_pair(x, [0, 0, 1, 1], never_within=[0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"x\[2\] is not finite"):
        every_pair(x.index_fill(0, torch.tensor([2]), torch.nan), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="distance must be one of"):
        every_pair(x, [0, 0, 1, 1], distance="manhatten")
    pairs = every_pair(torch.eye(4), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="far must be"):
        pairs.fit_threshold(far=5)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        pairs.at_threshold(float("nan"))
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        at_threshold([0.1, 0.2], [True, False], float("nan"), higher_is_closer=False)
    with pytest.raises(ValueError, match="n must be a number of pairs, 1 or more, got -1"):
        pairs.hardest(-1)
    with pytest.raises(TypeError, match="needs groups"):
        verification([0.1, 0.2], [True, False], higher_is_closer=False, average="identities")
    with pytest.raises(ValueError, match="average must be"):
        verification([0.1, 0.2], [True, False], higher_is_closer=False, average="macro")
