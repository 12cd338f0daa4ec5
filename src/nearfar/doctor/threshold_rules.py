"""What can be wrong with a verifier and its threshold."""

from math import ceil, hypot, log, log1p, sqrt

from nearfar.doctor.evidence import TEST, Evidence, Fitted, fires, known
from nearfar.doctor.finding import Finding, Missing
from nearfar.doctor.label_rules import flipped_labels

TOO_FEW = "enough identities to tell from chance"


def no_better_than_chance(evidence: Evidence) -> Finding | None:
    """On test identities, distance tells similar pairs from others hardly better than a coin.

    Fires where a similar pair is the closer one in less than 55 % of comparisons (an AUC of 0.55),
    unless it is the farther one so often that `flipped-labels` speaks.
    """
    auc = known(known(evidence.fitted, TEST).test_auc, TEST)
    if auc >= 0.55 or fires(flipped_labels, evidence):
        return None
    return Finding(
        "no-better-than-chance",
        f"Of a similar and a different test pair, the similar one is closer {auc:.0%} "
        "of the time; a coin says 50 %.",
        "What was learned on the training identities does not carry over to others, or there was "
        "nothing to learn.",
        "Check that items of one identity have something in common that the encoder can see; then "
        "train longer, on more identities.",
    )


def no_better_than_raw_input(evidence: Evidence) -> Finding | None:
    """On test identities, the distance of the raw input tells similar pairs from others as well.

    Fires where the AUC of the embeddings is not above that of the raw input, or above it by no more
    than chance: where the interval of the difference, by Newcombe's rule from those of the two,
    holds 0. Both are of the same pairs and err together, so that the interval errs to the wide
    side. With too few identities for intervals, an AUC that is above is not judged.

    Source: Newcombe, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 1998, method 10; for AUCs, Zou & Donner, 2008.
    """
    learned, raw = known(evidence.learned_auc, TEST), known(evidence.raw_auc, TEST)
    gain = learned.value - raw.value
    if gain > 0:
        low, high = known(learned.low, TOO_FEW), known(raw.high, TOO_FEW)
        if gain > hypot(learned.value - low, high - raw.value):
            return None
    return Finding(
        "no-better-than-raw-input",
        f"On test identities the embeddings reach an AUC of {learned.value:.4f}, the raw input "
        f"{raw.value:.4f}{', which chance can explain' if gain > 0 else ''}.",
        "What was learned tells other identities apart no better than comparing the input as it "
        "is: too few identities to learn from, a training that is too short or fails, or an input "
        "that needs no learning.",
        "Train on more identities; train longer, or with another loss or learning rate; bring a "
        "network that knows such data (--encoder). Until then use the raw input's distance.",
    )


def overfit_threshold(evidence: Evidence) -> Finding | None:
    """On test identities, more is accepted than the threshold was fitted for.

    Fires at twice the rate and more, if the difference is 3 standard errors. Pairs of one identity
    depend on each other; the variance of a mean over pairs of J identities is at most
    :math:`2 p (1 - p) / J` (Hoeffding, 1948, section 5), and that bound is taken for both sides,
    with the rate p of both together. It is cautious: with 100 identities a side, a rate fitted at
    1 % must come out at 19 % to fire, and with 1,000 at 4 %.
    """
    found = known(evidence.fitted, TEST)
    if found.test_far <= 2 * found.far:
        if not _beyond_chance(found, 1.0):  # it could not be seen, whatever the rate
            raise Missing(TOO_FEW)
        return None
    if not _beyond_chance(found, found.test_far):
        return None
    return Finding(
        "overfit-threshold",
        f"The threshold was fitted to accept {found.far:.3g} of different pairs, and accepts "
        f"{found.test_far:.3g} of those of {found.test_identities} test identities.",
        "The calibration identities are fewer than it takes, or easier than the test ones.",
        "Calibrate on more identities, drawn as those that the verifier will meet.",
    )


def _beyond_chance(found: Fitted, test_far: float) -> bool:
    """Whether a test rate is above the fitted one by 3 standard errors."""
    n1 = min(found.n_identities / 2, found.n_pairs or found.n_identities)
    n2 = min(found.test_identities / 2, found.test_pairs)
    p = (n1 * found.far + n2 * test_far) / (n1 + n2)
    error = sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
    return test_far - found.far >= 3 * error


def strict_threshold(evidence: Evidence) -> Finding | None:
    """On test identities, far less is accepted than the threshold was fitted for.

    That is safe and costs true accepts. Fires at half the rate and less, if the rate lies above the
    interval of what the test identities show, and if a threshold at that rate would accept one in a
    hundred more of the similar test pairs (where that is known).
    """
    found = known(evidence.fitted, TEST)
    if found.test_far > found.far / 2:
        return None
    if known(found.test_far_high, TOO_FEW) >= found.far:
        return None
    lost = ""
    if found.test_tar is not None and found.test_tar_at_far is not None:
        if found.test_tar_at_far - found.test_tar < 0.01:
            return None
        lost = (
            f" It accepts {found.test_tar:.1%} of the similar ones, where a threshold at that rate "
            f"would accept {found.test_tar_at_far:.1%}."
        )
    return Finding(
        "strict-threshold",
        f"The threshold was fitted to accept {found.far:.3g} of different pairs, and accepts "
        f"{found.test_far:.3g} of those of {found.test_identities} test identities.{lost}",
        "The calibration identities are more alike than the test ones, or a few that are very much "
        "alike decide: pairs that are the same are rejected for it.",
        "Calibrate on more identities, drawn as those that the verifier will meet; or ask for a "
        "higher rate (--far) and look at what it accepts.",
    )


def coarse_threshold(evidence: Evidence) -> Finding | None:
    """Too few pairs of identities to fit a threshold at the rate that was asked for.

    Pairs of the same two identities are much alike, so that they count as one. None of n false
    accepts still allows a rate of up to :math:`1 - 0.05^{1 / n}`, 95 % sure, which is about 3 / n
    for many. Fires where that is above the rate, and so always for a rate of 0.

    Source: Hanley & Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 1983.
    """
    found = known(evidence.fitted, TEST)
    n = known(found.n_pairs, "the number of calibration pairs")
    largest = 1 - 0.05 ** (1 / n) if n else 1.0
    if largest <= found.far:
        return None
    advice = "No number of pairs shows a rate of 0: ask for one that you can bear (--far)."
    if found.far:
        enough = ceil(log(0.05) / log1p(-found.far))
        advice = f"Calibrate on at least {enough:,} pairs of identities, or ask for a higher rate."
    return Finding(
        "coarse-threshold",
        f"A false-accept rate of {found.far:.3g} was fitted on {n:,} pair{'s' * (n != 1)} of "
        "identities.",
        f"Even if none of them is accepted, the rate may be {largest:.2g}.",
        advice,
    )
