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


def test_errors_teach():
    d, same = draw(200)
    with pytest.raises(ValueError, match="farther apart than dissimilar"):
        platt_probability(d, same, higher_is_closer=True)
    with pytest.raises(ValueError, match="prior must be"):
        isotonic_probability(d, same, higher_is_closer=False, prior=1.0)
