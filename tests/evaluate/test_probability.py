"""Calibrated probabilities against scikit-learn, against the truth, and through JSON."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from nearfar.evaluate import isotonic_probability, platt_probability, probability_from

BOTH = pytest.mark.parametrize("fit", [isotonic_probability, platt_probability])


def draw(n=4000, share=0.5, seed=0):
    random = np.random.default_rng(seed)
    same = random.random(n) < share
    return random.normal(size=n) + 2 * ~same, same


def true_probability(d, share):
    odds = share / (1 - share) * np.exp((d - 2) ** 2 / 2 - d**2 / 2)
    return odds / (1 + odds)


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_probability_is_that_of_the_data(fit, share):
    d, same = draw(20_000, share)
    at = np.linspace(-1, 3, 9)
    found = fit(d, same, higher_is_closer=False)(at)
    np.testing.assert_allclose(found, true_probability(at, share), atol=0.06)


@BOTH
def test_a_prior_moves_it_to_the_share_of_similar_pairs_in_use(fit):
    d, same = draw(20_000)
    at = np.linspace(0, 2, 5)
    found = fit(d, same, higher_is_closer=False, prior=0.01)(at)
    np.testing.assert_allclose(found, true_probability(at, 0.01), atol=0.03)
    assert torch.allclose(
        fit(d, same, higher_is_closer=False, prior=same.mean())(at),
        fit(d, same, higher_is_closer=False)(at),
    )


@BOTH
def test_it_never_falls_as_pairs_get_closer_and_is_never_certain(fit):
    d = np.concatenate([np.linspace(0, 1, 50), np.linspace(2, 3, 50)])
    same = d < 1.5  # told apart without error
    found = fit(d, same, higher_is_closer=False)(np.linspace(-5, 10, 200))
    assert (found.diff() <= 0).all()
    assert ((found > 0) & (found < 1)).all()


@BOTH
def test_similarities_are_negated_distances(fit):
    d, same = draw()
    distances = fit(d, same, higher_is_closer=False)
    similarities = fit(-d, same, higher_is_closer=True)
    assert torch.allclose(distances(d), similarities(-d))


@BOTH
def test_json_and_back(fit):
    d, same = draw(200)
    probability = fit(d, same, higher_is_closer=False, prior=0.3)
    again = probability_from(json.loads(json.dumps(probability.as_dict(), allow_nan=False)))
    assert again == probability
    assert torch.equal(again(d), probability(d))


def test_isotonic_equals_scikit_learn():
    d, same = draw(500)
    low, high = 1 / ((~same).sum() + 2), (same.sum() + 1) / (same.sum() + 2)
    theirs = IsotonicRegression(y_min=low, y_max=high, increasing=False, out_of_bounds="clip")
    at = np.linspace(-4, 6, 101)
    expected = theirs.fit(d, same).predict(at)
    found = isotonic_probability(d, same, higher_is_closer=False)(at)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_platt_minimises_its_own_loss():
    d, same = draw(300)
    target = np.where(same, (same.sum() + 1) / (same.sum() + 2), 1 / ((~same).sum() + 2))

    def loss(weights):
        z = weights[0] * d + weights[1]
        return np.mean(np.logaddexp(0, z) - target * z)

    best = minimize(loss, [0.0, 0.0], tol=1e-12)
    found = platt_probability(d, same, higher_is_closer=False)
    assert (found.slope, found.intercept) == pytest.approx(tuple(best.x), abs=1e-3)


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_likelihood_ratio_depends_on_no_share(fit, share):
    d, same = draw(40_000, share)
    at = np.linspace(0, 1.5, 4)
    true = np.exp((at - 2) ** 2 / 2 - at**2 / 2)
    for prior in (None, 0.01):
        found = fit(d, same, higher_is_closer=False, prior=prior).likelihood_ratio(at)
        np.testing.assert_allclose(found, true, rtol=0.3)


def test_no_ratio_is_larger_than_so_many_pairs_can_show():
    """Told apart without error: it could be chance once in as many pairs as there are."""
    d = np.concatenate([np.linspace(0, 1, 50), np.linspace(2, 3, 200)])
    found = platt_probability(d, d < 1.5, higher_is_closer=False)
    assert found.limits == pytest.approx((200 / 201 / 50, 51 * 200 / 50))
    assert found.likelihood_ratio([-50.0, 50.0]).tolist() == pytest.approx(found.limits[::-1])
    assert found([50.0]).item() == pytest.approx(1 / 202)
    assert found([-50.0]).item() == pytest.approx(51 / 52)


@BOTH
def test_an_identity_with_many_pairs_counts_once(fit):
    d, same = draw(200)
    groups = np.stack([np.arange(200), np.arange(200) + 1000 * ~same], 1)
    how = {"higher_is_closer": False, "average": "identities"}
    once = fit(d, same, groups=groups, **how)
    again = np.append(np.arange(200), [7] * 50)  # 50 more pairs of the same two, equally far apart
    often = fit(d[again], same[again], groups=groups[again], **how)
    assert once.as_dict() == fit(d, same, higher_is_closer=False).as_dict()
    at = np.linspace(-1, 3, 9)
    assert torch.allclose(often(at), once(at), atol=1e-6)
    assert often.share == pytest.approx(once.share)
    assert not torch.allclose(fit(d[again], same[again], higher_is_closer=False)(at), once(at))


def test_errors_teach():
    d, same = draw(200)
    with pytest.raises(ValueError, match="farther apart than dissimilar"):
        platt_probability(d, same, higher_is_closer=True)
    with pytest.raises(ValueError, match="prior must be"):
        isotonic_probability(d, same, higher_is_closer=False, prior=1.0)
    with pytest.raises(TypeError, match="needs groups"):
        platt_probability(d, same, higher_is_closer=False, average="identities")
