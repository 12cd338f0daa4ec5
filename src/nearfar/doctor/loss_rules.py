"""Rules about a loss: no force, a margin out of reach, all the push on one negative."""

from collections.abc import Mapping, Sequence

from nearfar.distance import Distance, largest
from nearfar.doctor.embedding_rules import unpaired_towers
from nearfar.doctor.evidence import LOSS, Evidence, fires, known
from nearfar.doctor.finding import Finding, Missing
from nearfar.registry import PairMargin, find

RECENT = 50  # steps that count as recent
# How far apart many rows of length 1 can all be.
_MANY: dict[Distance, float] = {"euclidean": 1.41, "sqeuclidean": 2.0, "cosine": 1.0}


def dead_batch(evidence: Evidence) -> Finding | None:
    """The gradient is exactly 0, in this batch or in half of the recent steps.

    A single such step in a training run may be chance. Ten or more such steps, if they are half of
    the recent ones, waste half of the computation. The share of active tuples falls as training
    succeeds (Hermans et al., "In defense of the triplet loss", 2017, section 3), which is why
    harder ones are mined.
    """
    logged = [line for line in evidence.history if {"active_share", "loss"} <= line.keys()]
    if evidence.active is None and not logged:
        raise Missing(LOSS)
    return _dead_now(evidence) or _dead_for_long(logged[-RECENT:])


def _dead_now(evidence: Evidence) -> Finding | None:
    """No pair or tuple of the batch is active."""
    active = evidence.active
    if active is None or not len(active) or active.any():
        return None
    if evidence.broken is not None and evidence.broken.any():
        return None
    return Finding(
        "dead-batch",
        f"No force acts in any of {len(active)} rows: every gradient is 0.",
        "Similar rows coincide and dissimilar ones are beyond the margin, or no row can move.",
        _way_out(evidence),
    )


def _way_out(evidence: Evidence) -> str:
    """The smallest margin that would make one row active."""
    if "margin" not in evidence.settings:
        return "Use harder negatives, or a larger temperature; check that there are positives."
    if evidence.wakes is None:
        return "Add dissimilar rows that differ and are near, or change the margin."
    side = "below" if _pair_margin(evidence) == "cosine" else "above"
    return f"A margin {side} {evidence.wakes:.4g} would activate the closest dissimilar row."


def _dead_for_long(recent: Sequence[Mapping[str, float]]) -> Finding | None:
    """Half of the recent steps, and at least ten, have a loss of exactly 0."""
    dead = sum(line["active_share"] == 0 and line["loss"] == 0 for line in recent)
    if dead < max(len(recent) / 2, 10):
        return None
    return Finding(
        "dead-batch",
        f"In {dead} of the last {len(recent)} steps no pair or tuple was active: the loss was 0.",
        "Nothing is learned in such a step: the embeddings already satisfy the margin, or only "
        "easy negatives are left.",
        "Use a larger margin or harder negatives; or stop here, if the figures are good.",
    )


def unreachable_margin(evidence: Evidence) -> Finding | None:
    """A margin that no two rows can satisfy.

    Rows of length 1 are at most 2 apart (squared, 4), and a cosine distance is at most 2; of other
    distances there is no such limit, or none that does not depend on the dimensions. (Many
    rows cannot all be that far apart: K rows can all be at most sqrt(2 K / (K - 1)) apart, as the
    corners of a simplex are.)
    """
    margin, distance = evidence.setting("margin"), evidence.distance()
    if margin is None or distance is None or callable(distance) or distance not in _MANY:
        _refuse_unknown_loss(evidence)
        return None
    if evidence.lengths is None and distance != "cosine":
        raise Missing("embeddings")
    reach, why = largest(distance), f"{distance} distance never exceeds 2"
    if distance != "cosine" and _all_of_length_one(evidence):
        reach = 2.0 if distance == "euclidean" else 4.0
        why = f"all rows have length 1, where {distance} distance never exceeds {reach:g}"
    if margin <= reach:
        return None
    most = _MANY[distance]
    return Finding(
        "unreachable-margin",
        f"The margin is {margin:g}, but {why}.",
        "No dissimilar row can ever be far enough apart, so the loss cannot reach 0.",
        f"Use a margin below {reach:g}; many unit rows can all be at most {most:g} apart.",
    )


def idle_margin(evidence: Evidence) -> Finding | None:
    """A margin at which the loss of every dissimilar pair is 0.

    The contrastive losses push dissimilar rows until their distance exceeds the margin, the cosine
    losses until their cosine is below it: a margin of 0 or of 1, respectively, pushes nothing.
    """
    margin, compared = evidence.setting("margin"), _pair_margin(evidence)
    if margin is None or compared is None:
        _refuse_unknown_loss(evidence)
        return None
    of_cosine = compared == "cosine"
    if (margin < 1) if of_cosine else (margin > 0):
        return None
    return Finding(
        "idle-margin",
        f"The margin is {margin:g}: no {'cosine exceeds 1' if of_cosine else 'distance is less'}.",
        "Dissimilar rows are never pushed apart, so everything is pulled into one point.",
        f"Use a margin from {'0 to 0.5' if of_cosine else '0.5 to 1.4, for rows of length 1'}.",
    )


def _pair_margin(evidence: Evidence) -> PairMargin | None:
    """What the loss compares with its margin for each pair; None: no pair has a margin."""
    loss = find(evidence.loss)
    return None if loss is None else loss.pair_margin


def _refuse_unknown_loss(evidence: Evidence) -> None:
    """Called before a rule decides that it does not apply to this loss.

    Raises:
        Missing: the loss is not known.
    """
    if not evidence.loss:
        raise Missing(LOSS)


def _all_of_length_one(evidence: Evidence) -> bool:
    if evidence.settings.get("normalize", False):
        return True
    lengths = evidence.lengths
    return lengths is not None and len(lengths) > 0 and bool(((lengths - 1).abs() < 1e-3).all())


def temperature_too_low(evidence: Evidence) -> Finding | None:
    r"""For half of the anchors, one negative receives at least 99 % of the push.

    The push of a softmax loss on negative j is proportional to :math:`\exp(s_{ij} / T)`, so at a
    low temperature the nearest negative receives nearly all of it. The loss then acts like a
    triplet loss with the hardest negative, which in real data is often a false one (Wang & Liu,
    "Understanding the behaviour of contrastive loss", CVPR 2021, section 3.3). Needs 8 anchors
    whose negatives still matter, with 8 negatives or more each. Waits for a quarter of the training
    steps: on vectors, a temperature of 0.01 begins at 99 % and falls to 45 % as the network learns.
    """
    temperature = evidence.temperature()
    # With a margin, the scale is not a temperature: it is meant to single out the hardest one.
    if temperature is None or "margin" in evidence.settings:
        _refuse_unknown_loss(evidence)
        return None
    evidence.wait_until_settled()
    if fires(unpaired_towers, evidence):  # then the nearest negative is most likely the match
        return None
    held = known(evidence.held, "anchors with 8 negatives")
    if len(held) < 8 or float(held.median()) < 0.99:
        return None
    return Finding(
        "temperature-too-low",
        f"For half of {len(held)} anchors, one negative receives {float(held.median()):.1%} of the "
        f"push or more (temperature {temperature:.3g}).",
        "The loss sees only the nearest negative, which in noisy data is often a false one.",
        "Raise the temperature; 0.05 to 0.2 is usual for cosines.",
    )
