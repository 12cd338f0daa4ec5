"""A rate is a number from 0 to 1, everywhere: 5 for 5 %, -3 and NaN are refused, with what came."""

from dataclasses import replace

import pytest

from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.evaluate import (
    at_threshold,
    fit_threshold,
    isotonic_probability,
    platt_probability,
    probability_from,
    verification,
)

D, SAME = [0.1, 0.2, 0.6, 0.4, 0.7, 0.9], [True, True, True, False, False, False]
PAIRS = {"scores": D, "similar": SAME, "higher_is_closer": False}
CONFIG = TrainConfig(data="glyphs", loss="sup_con")
PLATT = {"slope": -2.0, "intercept": 1.0, "share": 0.5, "prior": 0.5}
ISOTONIC = {"knots": [0.0, 1.0], "values": [0.9, 0.1], "share": 0.5, "prior": 0.5}

TAKES_A_RATE = {
    "verification(far)": lambda rate: verification(**PAIRS, far=(0.1, rate)),
    "verification(level)": lambda rate: verification(**PAIRS, level=rate),
    "fit_threshold(far)": lambda rate: fit_threshold(**PAIRS, far=rate),
    "at_threshold(level)": lambda rate: at_threshold(**PAIRS, threshold=0.3, level=rate),
    "platt_probability(prior)": lambda rate: platt_probability(**PAIRS, prior=rate),
    "isotonic_probability(prior)": lambda rate: isotonic_probability(**PAIRS, prior=rate),
    "probability_from(prior), Platt": lambda rate: probability_from(PLATT | {"prior": rate}),
    "probability_from(share), Platt": lambda rate: probability_from(PLATT | {"share": rate}),
    "probability_from(prior), isotonic": lambda rate: probability_from(ISOTONIC | {"prior": rate}),
    "probability_from(share), isotonic": lambda rate: probability_from(ISOTONIC | {"share": rate}),
    "--far": lambda rate: replace(CONFIG, far=rate),
    "--calibration-share": lambda rate: replace(CONFIG, calibration_share=rate),
    "--test-share": lambda rate: replace(CONFIG, test_share=rate),
}


@pytest.mark.parametrize("rate", [5, 5.0, 1.0, -3, float("nan"), float("inf")])
@pytest.mark.parametrize("takes", TAKES_A_RATE.values(), ids=TAKES_A_RATE)
def test_a_number_that_is_not_a_rate_is_refused(takes, rate):
    with pytest.raises((ValueError, InputError), match=f"{rate:g}"):
        takes(rate)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_rates_are_taken(rate):
    assert verification(**PAIRS, far=(rate, 0)).tar_at_far.keys() == {rate, 0.0}
    assert platt_probability(**PAIRS, prior=rate).prior == rate
    assert probability_from(PLATT | {"prior": rate}).prior == rate


def test_the_error_knows_percentages():
    with pytest.raises(ValueError, match=r"far must hold rates from 0 to below 1, got 5; 5 % is"):
        verification(**PAIRS, far=[5])
    with pytest.raises(
        TypeError, match=r"far must be a sequence of rates, such as \(0.1, 0.01\); got 5"
    ):
        verification(**PAIRS, far=5)
