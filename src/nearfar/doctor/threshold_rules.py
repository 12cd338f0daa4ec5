"""Rules about a verifier, its threshold and its probability."""

from math import ceil, hypot, log, log1p, sqrt

from nearfar.doctor.evidence import PROBABILITY, TEST, Claim, Evidence, Fitted, fires, known
from nearfar.doctor.finding import Finding, Missing
from nearfar.doctor.label_rules import flipped_labels

TOO_FEW = "enough identities to tell from chance"


def no_better_than_chance(evidence: Evidence) -> Finding | None:
    """On test identities, distance separates similar from dissimilar pairs hardly above chance.

    Fires if a similar pair is closer than a dissimilar one in less than 55 % of comparisons (an AUC
    of 0.55), unless it is farther so often that `flipped-labels` fires.
    """
    auc = known(known(evidence.fitted, TEST).test_auc, TEST)
    if auc >= 0.55 or fires(flipped_labels, evidence):
        return None
    return Finding(
        "no-better-than-chance",
        f"A similar test pair is closer than a dissimilar one in {auc:.0%} of comparisons; chance "
        "gives 50 %.",
        "What was learned on the training identities does not carry over to others, or there was "
        "nothing to learn.",
        "Check that items of one identity have something in common that the encoder can see; then "
        "train longer, on more identities.",
    )


def no_better_than_raw_input(evidence: Evidence) -> Finding | None:
    """On test identities, the distance of the raw input separates the pairs as well.

    Fires if the AUC of the embeddings is not above that of the raw input, or is above it by no more
    than chance explains: if the interval of the difference, computed by Newcombe's rule from the
    two intervals, contains 0. Both AUCs are measured on the same pairs, so their errors are
    correlated and the interval is conservatively wide. With too few identities for intervals, an
    AUC that is above is not judged.

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
        "On other identities, what was learned is no better than comparing the raw input: there "
        "are too few identities to learn from, training was too short or failed, or the input "
        "needs no learning.",
        "Train on more identities; train longer, or with another loss or learning rate; use a "
        "network trained on this kind of data (--encoder). Until then use the raw input's "
        "distance.",
    )


def overfit_threshold(evidence: Evidence) -> Finding | None:
    """On test identities, more pairs are accepted than the threshold was fitted for.

    Fires above twice the fitted rate, if the difference is at least 3 standard errors. Pairs of one
    identity are not independent. The variance of a mean over pairs of J identities is at most
    :math:`2 p (1 - p) / J` (Hoeffding, 1948, section 5); that bound is used for both sides, with p
    the rate over both. The rule is cautious: with 100 identities per side, a threshold fitted at
    1 % must accept 19 % for it to fire, and with 1,000 identities 4 %.
    """
    found = known(evidence.fitted, TEST)
    if found.test_far <= 2 * found.far:
        if not _beyond_chance(found, 1.0):  # no rate could be told from chance
            raise Missing(TOO_FEW)
        return None
    if not _beyond_chance(found, found.test_far):
        return None
    return Finding(
        "overfit-threshold",
        f"The threshold was fitted to accept {found.far:.3g} of different pairs, but accepts "
        f"{found.test_far:.3g} of those of {found.test_identities} test identities.",
        "There are too few calibration identities, or they are easier than the test identities.",
        "Calibrate on more identities, drawn like those the verifier will meet.",
    )


def _beyond_chance(found: Fitted, test_far: float) -> bool:
    """Whether a test rate is above the fitted one by 3 standard errors."""
    n1 = min(found.n_identities / 2, found.n_pairs or found.n_identities)
    n2 = min(found.test_identities / 2, found.test_pairs)
    p = (n1 * found.far + n2 * test_far) / (n1 + n2)
    error = sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
    return test_far - found.far >= 3 * error


def strict_threshold(evidence: Evidence) -> Finding | None:
    """On test identities, far fewer pairs are accepted than the threshold was fitted for.

    That is safe, but costs true accepts. Fires at half the fitted rate or less, if the fitted rate
    lies above the interval of the measured one, and if a threshold at the fitted rate would accept
    at least one percentage point more of the similar test pairs (where that is known).
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
            f" It accepts {found.test_tar:.1%} of the similar ones; a threshold at the fitted rate "
            f"would accept {found.test_tar_at_far:.1%}."
        )
    return Finding(
        "strict-threshold",
        f"The threshold was fitted to accept {found.far:.3g} of different pairs, but accepts "
        f"{found.test_far:.3g} of those of {found.test_identities} test identities.{lost}",
        "The calibration identities are more alike than the test identities, or a few very similar "
        "ones decide the threshold. It rejects same pairs that it could accept.",
        "Calibrate on more identities, drawn like those the verifier will meet; or ask for a "
        "higher rate (--far) and look at what it accepts.",
    )


def overconfident_probability(evidence: Evidence) -> Finding | None:
    """On test identities, a likelihood ratio is much nearer to 1 than was claimed.

    A likelihood ratio says how many times as likely a distance is for same pairs as for different
    ones. Test pairs are sorted into bins by their ratio. Fires if the ratio claimed in some bin is
    3 times as far from 1 as the interval of the one seen there allows. A ratio that claims too
    little is on the safe side, and is not judged; nor are bins with too few identities for an
    interval.
    """
    claims = [claim for claim in known(evidence.claims, PROBABILITY) if claim.seen.low is not None]
    if not claims:
        raise Missing(TOO_FEW)
    worst = max(claims, key=_overstated)
    if _overstated(worst) < 3:
        return None
    claimed, seen = (_odds(rate) for rate in (worst.claimed, worst.seen.value))
    kinds = ("same", "different")
    if claimed < 1:
        claimed, seen, kinds = 1 / claimed, 1 / seen, kinds[::-1]
    return Finding(
        "overconfident-probability",
        f"Distances said to be {claimed:,.3g} times as likely for {kinds[0]} pairs as for "
        f"{kinds[1]} ones are {seen:,.3g} times as likely on test identities.",
        "The probability is more certain than it may be: there are too few calibration identities, "
        "they are easier than the test identities, or the curve does not fit them.",
        "Calibrate on more identities, drawn like those the verifier will meet; until then use the "
        "decision, not the probability.",
    )


def _overstated(claim: Claim) -> float:
    """How many times as far from 1 the claimed ratio is as the nearest end of its interval."""
    claimed = _odds(claim.claimed)
    if claimed > 1:
        return claimed / _odds(known(claim.seen.high, TOO_FEW))
    return _odds(known(claim.seen.low, TOO_FEW)) / claimed


def _odds(rate: float) -> float:
    rate = min(max(rate, 1e-12), 1 - 1e-12)  # so that there is something to divide by
    return rate / (1 - rate)


def coarse_threshold(evidence: Evidence) -> Finding | None:
    """Too few pairs of identities to fit a threshold at the requested rate.

    Pairs of the same two identities are much alike, so they count as one. If none of n pairs is
    accepted, the rate may still be as high as :math:`1 - 0.05^{1 / n}` with 95 % confidence, which
    is about 3 / n for large n. Fires if that is above the requested rate, and so always for a rate
    of 0.

    Source: Hanley & Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 1983.
    """
    found = known(evidence.fitted, TEST)
    n = known(found.n_pairs, "the number of calibration pairs")
    largest = 1 - 0.05 ** (1 / n) if n else 1.0
    if largest <= found.far:
        return None
    advice = "No number of pairs shows a rate of 0: ask for one you can tolerate (--far)."
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
