"""What can be wrong with a verifier and its threshold."""

from math import sqrt

from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Finding


def no_better_than_chance(evidence: Evidence) -> Finding | None:
    """On test identities, distance tells similar pairs from others hardly better than a coin.

    Fires where a similar pair is the closer one in less than 55 % of comparisons (an AUC of 0.55);
    below 40 % the labels are turned round, and `flipped-labels` says so.
    """
    found = evidence.fitted
    if found is None or found.test_auc is None or not 0.4 < found.test_auc < 0.55:
        return None
    return Finding(
        "no-better-than-chance",
        f"Of a similar and a different test pair, the similar one is closer {found.test_auc:.0%} "
        "of the time; a coin says 50 %.",
        "What was learned on the training identities does not carry over to others, or there was "
        "nothing to learn.",
        "Check that items of one identity have something in common that the encoder can see; then "
        "train longer, on more identities.",
    )


def overfit_threshold(evidence: Evidence) -> Finding | None:
    """On test identities, more is accepted than the threshold was fitted for.

    Fires at twice the rate and more, if the difference is 3 standard errors. Pairs of one identity
    depend on each other; the variance of a mean over pairs of J identities is at most
    :math:`2 p (1 - p) / J` (Hoeffding, 1948, section 5), and that bound is taken for both sides,
    with the rate p of both together. It is cautious: with 100 identities a side, a rate fitted at
    1 % must come out at 19 % to fire, and with 1,000 at 4 %.
    """
    found = evidence.fitted
    if found is None or found.test_far <= 2 * found.far:
        return None
    n1 = min(found.n_identities / 2, found.n_pairs or found.n_identities)
    n2 = min(found.test_identities / 2, found.test_pairs)
    p = (n1 * found.far + n2 * found.test_far) / (n1 + n2)
    error = sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
    if found.test_far - found.far < 3 * error:
        return None
    return Finding(
        "overfit-threshold",
        f"The threshold was fitted to accept {found.far:.3g} of different pairs, and accepts "
        f"{found.test_far:.3g} of those of {found.test_identities} test identities.",
        "The calibration identities are fewer than it takes, or easier than the test ones.",
        "Calibrate on more identities, drawn as those that the verifier will meet.",
    )


def coarse_threshold(evidence: Evidence) -> Finding | None:
    """Too few dissimilar pairs to fit a threshold at the rate that was asked for.

    None of n false accepts still allows a rate of up to 3 / n (95 %; Hanley & Lippman-Hand, "If
    nothing goes wrong, is everything all right?", JAMA 1983), so a rate needs 3 / far pairs.
    """
    found = evidence.fitted
    if found is None or not found.n_pairs or not found.far or found.n_pairs * found.far >= 3:
        return None
    return Finding(
        "coarse-threshold",
        f"A false-accept rate of {found.far:.3g} was fitted on {found.n_pairs:,} dissimilar pairs.",
        f"Even if none of them is accepted, the rate may be {3 / found.n_pairs:.2g}.",
        f"Calibrate on at least {3 / found.far:,.0f} dissimilar pairs, or ask for a higher rate.",
    )
