"""The threshold of a gallery, on strangers drawn anew, and against counting."""

from itertools import combinations

import numpy as np
import pytest
import torch

from nearfar.app.errors import InputError
from nearfar.app.gallery.answers import posterior
from nearfar.app.gallery.strangers import OpenSet, Strangers, Tail
from nearfar.app.train.calibration import Calibration
from nearfar.evaluate import every_pair

FAR = 0.05


def people(random, n, items, d=32, noise=0.5):
    """(n, items, d): identities around a sphere, some of them nearer to all others."""
    centre = random.normal(size=(n, d)) + 0.3 * random.gamma(1, 1, size=(n, 1))
    x = centre[:, None] + noise * random.normal(size=(n, items, d))
    return (x / np.linalg.norm(x, axis=2, keepdims=True)).astype(np.float32)


def calibration(random, n, items=4):
    x = torch.from_numpy(people(random, n, items).reshape(n * items, -1))
    return Calibration(x, torch.arange(n).repeat_interleave(items))


def taken(random, threshold, m, items=1, n_queries=400):
    """The share of strangers within the threshold of somebody in a gallery of m identities."""
    gallery = people(random, m, items).reshape(m * items, -1)
    queries = people(random, n_queries, 1)[:, 0]
    return ((1 - queries @ gallery.T).min(1) <= threshold).mean()


def simulated(n_calibration, m, items=1, draws=8):
    """The rate on fresh strangers, of thresholds fitted to one draw each; and what was said."""
    rates, said = [], []
    for seed in range(draws):
        random = np.random.default_rng(seed)
        strangers = Strangers.of(calibration(random, n_calibration), "cosine", items)
        said.append(strangers.open_set(m, m * items, FAR))
        rates.append(taken(random, said[-1].threshold, m, items))
    return np.mean(rates), np.std(rates) / draws**0.5, said


@pytest.mark.parametrize(
    ("n_calibration", "m", "how"),
    [
        (200, 10, "measured"),
        (200, 150, "measured"),
        (200, 1000, "extrapolated"),
        (60, 1000, "extrapolated"),
        (200, 5000, "extrapolated"),
    ],
)
def test_as_many_strangers_are_taken_for_somebody_as_was_asked_for(n_calibration, m, how):
    rate, error, said = simulated(n_calibration, m)
    assert {one.how for one in said} == {how}
    assert rate <= FAR + 2.5 * error
    if how == "measured":
        assert rate >= FAR - 2.5 * error - 0.01


def test_several_items_of_each_identity_count():
    rate, error, _ = simulated(200, 100, items=3)
    assert rate <= FAR + 2.5 * error


def test_a_threshold_of_pairs_is_wrong_by_the_size_of_the_gallery():
    far, rates = 0.001, []
    for seed in range(3):
        random = np.random.default_rng(seed)
        known = calibration(random, 200)
        of_pairs = every_pair(known.x, known.identity, distance="cosine").fit_threshold(far=far)
        rates += [taken(random, of_pairs, 100) for _ in range(10)]
        fitted = Strangers.of(known, "cosine", 1)
        assert fitted.open_set(100, 100, far).threshold < of_pairs
        assert fitted.open_set(100, 100, FAR).threshold < fitted.open_set(10, 10, FAR).threshold
    # Some are near many others, so it is less than 1 - (1 - far)^100, nearly 100 times as often.
    assert 20 * far < np.mean(rates) < 100 * far


def test_the_expected_share_is_found():
    """Queries for enrolled identities, nearest to their own and within the threshold."""
    random = np.random.default_rng(1)
    m = 500
    said = Strangers.of(calibration(random, 200), "cosine", 1).open_set(m, m, FAR)
    both = people(random, m, 2)
    d = 1 - both[:, 1] @ both[:, 0].T
    found = (d.argmin(1) == np.arange(m)) & (d.min(1) <= said.threshold)
    assert said.detected == pytest.approx(found.mean(), abs=0.05)
    assert 0.5 < said.detected < 1


def test_the_measured_rate_is_that_of_all_galleries():
    """Of every choice of m of the strangers, by counting."""
    random = np.random.default_rng(2)
    strangers = Strangers.of(calibration(random, 8, items=1), "cosine", 1)
    x = strangers.distances
    at = np.quantile(x, 0.3)
    for m in (1, 2, 5):
        counted = [
            np.mean([min(row[list(some)]) <= at for some in combinations(range(7), m)]) for row in x
        ]
        np.testing.assert_allclose(strangers._taken(np.full(8, at), m), counted, atol=1e-12)


def test_distances_are_those_to_the_nearest_of_a_few_items():
    random = np.random.default_rng(3)
    known = calibration(random, 6, items=3)
    strangers = Strangers.of(known, "cosine", 3)  # all items of each
    d = (1 - known.x @ known.x.T).numpy().reshape(18, 6, 3)
    right = np.sort([np.delete(row.min(1), i // 3) for i, row in enumerate(d)], axis=1)
    order = np.lexsort(np.round(right, 4).T)
    again = np.lexsort(np.round(strangers.distances, 4).T)
    np.testing.assert_allclose(strangers.distances[again], right[order], atol=1e-6)
    own = [np.delete(row[i // 3], i % 3).min() for i, row in enumerate(d)]
    np.testing.assert_allclose(np.sort(strangers.own), np.sort(own), atol=1e-6)


def test_items_of_one_group_are_not_compared():
    random = np.random.default_rng(4)
    known = calibration(random, 10, items=2)
    groups = torch.arange(20) % 2  # the items of an identity are of two
    strangers = Strangers.of(Calibration(known.x, known.identity, groups), "cosine", 2)
    assert np.isinf(strangers.own).sum() == 0
    d = (1 - known.x @ known.x.T).numpy()
    other = groups.numpy()[:, None] != groups.numpy()
    nearest = np.where(other & (known.identity[:, None] != known.identity).numpy(), d, np.inf)
    np.testing.assert_allclose(
        np.sort(strangers.distances[:, 0]), np.sort(nearest.min(1)), atol=1e-6
    )


def test_the_tail_continues_a_power_law():
    """Of strangers uniform in a ball, F(t) is t to its dimension: known far below any distance."""
    random = np.random.default_rng(5)
    distances = np.sort(random.random((400, 300)) ** (1 / 6) * (1 + random.random((400, 1))), 1)
    weight = np.full(400, 1 / 400)
    strangers = Strangers(distances, weight, np.full(400, np.inf), 400, 1.0)
    assert strangers.probability is None  # no identity has two items
    tail = Tail.of(strangers)
    assert tail.power == pytest.approx(6, rel=0.2)
    assert tail.power < 6
    scale = tail.scale / (30 / 301) ** (1 / 6)  # what the 30th of 300 says of a probe's ball
    for rate in (1e-2, 1e-3, 1e-5):
        at = scale * rate ** (1 / 6)
        assert tail.taken(at, 1).mean() == pytest.approx(rate, rel=0.1 + 0.5 * (rate < 1e-3))


@pytest.mark.parametrize(("items", "of_calibration"), [(1, 4), (5, 8), (20, 21), (20, 5)])
def test_the_probability_of_nobody_is_the_share_of_strangers(items, of_calibration):
    """However many items an identity has, fewer of which calibration identities may have."""
    m, said, strange = 50, [], []
    for seed in range(4):
        random = np.random.default_rng(seed)
        x = people(random, 200, of_calibration, noise=0.9).reshape(200 * of_calibration, -1)
        known = Calibration(
            torch.from_numpy(x), torch.arange(200).repeat_interleave(of_calibration)
        )
        strangers = Strangers.of(known, "cosine", items)
        both = people(random, m, items + 1, noise=0.9)
        gallery = both[:, :items].reshape(m * items, -1)
        queries = np.concatenate([both[:, items], people(random, m, 1, noise=0.9)[:, 0]])
        nearest = np.sort((1 - queries @ gallery.T).reshape(2 * m, m, items).min(2), 1)
        for i, row in enumerate(nearest):
            ratios = strangers.probability.likelihood_ratio(row[:20]).numpy()
            said.append(posterior(ratios, strangers.as_many(m, m * items), 0.5)[1])
            strange.append(i >= m)
    for part in np.array_split(np.argsort(said), 4):
        assert np.mean(np.array(said)[part]) == pytest.approx(
            np.mean(np.array(strange)[part]), abs=0.15
        )
    assert np.mean(said) == pytest.approx(0.5, abs=0.06)


def test_the_curve_of_single_items_is_nearly_that_of_every_pair():
    known = calibration(np.random.default_rng(6), 60, items=2)
    one = Strangers.of(known, "cosine", 1).probability
    right = every_pair(known.x, known.identity, distance="cosine").fit_probability()
    at = [0.0, 0.2, 0.4, 0.6, 0.8]
    ratios = (one.likelihood_ratio(at).log(), right.likelihood_ratio(at).log())
    np.testing.assert_allclose(*ratios, atol=0.3)


@pytest.mark.parametrize(("n", "finds"), [(5, ""), (24, "8 %"), (25, "8 %"), (1000, "8.1 %")])
def test_figures_are_as_fine_as_the_calibration_identities_allow(n, finds):
    said = OpenSet(0.1, 0.01, 50, "extrapolated", n, 0.081)
    assert str(said).partition("; finds ")[2].removesuffix(" of those enrolled") == finds
    if n >= 25:  # 300 pairs, of which 0.01 are 3
        assert not said.warning
    else:
        n_pairs = {5: 10, 24: 276}[n]
        assert f"{n} calibration identities are {n_pairs} different pairs, and" in said.warning
        assert "a rate of 0.01 needs about 300. Train on more" in said.warning


def test_too_few_identities_are_refused():
    with pytest.raises(InputError, match="the run has 4 calibration identities"):
        Strangers.of(calibration(np.random.default_rng(0), 4), "cosine", 1)
