"""What can be wrong with the embeddings."""

import torch
from torch import Tensor

from nearfar.doctor.evidence import METRICS, Evidence, fires, known
from nearfar.doctor.finding import Finding, Missing
from nearfar.engine.observe import Quantity
from nearfar.spectrum import effective_rank

EARLY = 10  # steps at the start of training
FEWEST_MATCHES = 16  # of two towers; fewer cannot be told from chance
FEWEST_STORED = 16  # items of a memory
# Of length, in a distance; p-norms depend on the dimensions too.
_POWER: dict[object, int] = {"euclidean": 1, "sqeuclidean": 2, "cosine": 0, "snr": 0}
_MOST = 0.9  # share of the pairs of unlabelled rows


def not_a_number(evidence: Evidence) -> Finding | None:
    """Fires for a single row that is not finite, since it makes the loss of the whole batch NaN."""
    bad = known(evidence.broken, "embeddings")
    if not bad.any():
        return None
    rows = ", ".join(str(int(row)) for row in bad.nonzero()[:5])
    return Finding(
        "not-a-number",
        f"{int(bad.sum())} of {len(bad)} rows are NaN or infinite, or their loss is (row {rows}).",
        "Finite embeddings give finite losses here, so something went wrong before the loss.",
        "Look for these rows in the data and in the encoder's output; lower the learning rate.",
    )


def collapsed_embedding(evidence: Evidence) -> Finding | None:
    r"""All embeddings are nearly the same, and the loss is stuck.

    Fires if the median distance of dissimilar pairs is below 1 % of their length (they then differ
    by less than 0.6 degrees; random directions differ by 90). Below 10 % it fires if the loss is
    also within 1 % of its value for identical embeddings: the margin of a triplet loss,
    :math:`\log N` of a softmax. That value is a stationary point at which training gets stuck
    (Schroff et al., "FaceNet", CVPR 2015, section 3.2; Xuan et al., "Hard negative examples are
    hard, but useful", ECCV 2020).

    Without labels, and within each of two towers, some pairs may be similar and rightly close: with
    two classes of equal size, every second pair is. So nine pairs in ten must be that close, which
    healthy embeddings reach only if one class has 95 % of the rows. Each tower is examined by
    itself, since two collapsed towers need not collapse to the same point.
    """
    measured = _rows_that_should_differ(evidence)
    evidence.wait_until_settled()
    stuck = _stuck(evidence)
    near = {
        of: distance
        for of, (distance, _) in measured.items()
        if distance <= (0.1 if stuck else 0.01)
    }
    if not near:
        return None
    of = " and of ".join(name for name in near if name)
    share = next(iter(measured.values()))[1]
    value = f" The loss is {evidence.value:.4g}, as for identical embeddings." if stuck else ""
    return Finding(
        "collapsed-embedding",
        f"{share}{f' of {of}' if of else ''} are at most {max(near.values()):.1%} of their length "
        f"apart.{value}",
        "The encoder gives nearly the same embedding to everything: the pull dominates, or the "
        "learning rate was too high for the hardest negatives.",
        "Lower the learning rate, begin with random or semi-hard negatives, and check that the "
        "margin pushes at all and that the input is scaled.",
    )


def _rows_that_should_differ(evidence: Evidence) -> dict[str, tuple[float, str]]:
    """How far apart they are in units of their length, by tower, and which share of the pairs is.

    Raises:
        Missing: there are no such rows, or their distances are not known.
    """
    if evidence.spread:
        return {
            of: (_quantile(evidence, distances), "Nine in ten pairs of rows")
            for of, distances in evidence.spread.items()
        }
    apart = known(evidence.apart, "embeddings")
    if len(apart.dissimilar) < 2:
        raise Missing("two dissimilar pairs")
    if apart.closeness == "logit" or not apart.dissimilar.isfinite().all():
        raise Missing("finite distances")
    distance = _in_lengths(evidence, float(apart.dissimilar.median()), apart.closeness)
    return {"": (distance, "Half of the dissimilar pairs")}


def _quantile(evidence: Evidence, distances: Tensor) -> float:
    """The distance that nine in ten do not exceed."""
    if not len(distances) or not distances.isfinite().all():
        raise Missing("two finite rows")
    rank = max(int(_MOST * len(distances) + 0.5), 1)
    return _in_lengths(evidence, float(distances.kthvalue(rank).values), "distance")


def _in_lengths(evidence: Evidence, measured: float, closeness: Quantity) -> float:
    """A distance or similarity of rows as Euclidean distance, in units of their length."""
    scale = _length(evidence)
    if closeness == "similarity":  # a cosine, or a product; negated
        return _chord(1 + measured / scale**2)
    distance = evidence.distance() or "cosine"
    if distance not in _POWER:
        raise Missing("Euclidean distances")
    measured /= scale ** _POWER[distance]
    if distance == "euclidean":
        return measured
    return _chord(measured) if distance == "cosine" else float(max(measured, 0.0) ** 0.5)


def _chord(cosine_distance: float) -> float:
    return float(max(2 * cosine_distance, 0.0) ** 0.5)


def _length(evidence: Evidence) -> float:
    """The typical length of an embedding; where there are only distances, the margin."""
    if evidence.lengths is None:
        return evidence.setting("margin") or 1.0
    normalized = evidence.settings.get("normalize", False)
    return 1.0 if normalized else max(float(evidence.lengths.median()), 1e-30)


def _stuck(evidence: Evidence) -> bool:
    value, collapsed = evidence.value, evidence.collapsed_value
    return None not in (value, collapsed) and abs(value - collapsed) <= 0.01 * abs(collapsed)  # type: ignore[operator,arg-type]


def dimensional_collapse(evidence: Evidence) -> Finding | None:
    r"""The embeddings use few of their dimensions.

    The effective rank is :math:`\exp(-\sum_k p_k \log p_k)` with
    :math:`p_k = \sigma_k / \sum \sigma` (Roy & Vetterli, EUSIPCO 2007; Garrido et al., "RankMe",
    ICML 2023), computed after the mean row is subtracted. It cannot exceed d or n - 1, and a loss
    that brings each of C classes to a point leaves C - 1 (Papyan et al., PNAS 2020). Fires below a
    tenth of the smallest of those, and does not apply if that is 10 or less; healthy runs of every
    loss here reach half of it. Of two towers, the one of lower rank is examined.

    Source: Jing et al., "Understanding dimensional collapse in contrastive self-supervised
    learning", ICLR 2022.
    """
    found = known(evidence.spectrum, "embeddings")
    evidence.wait_until_settled()
    room = min(found.d, found.n - 1, (found.n_classes or found.n) - 1)
    if room <= 10:
        raise Missing("more than 10 dimensions, rows and classes")
    total = float(found.values.sum())
    if total == 0:  # rows are all the same: left to collapsed_embedding
        return None
    if not total < torch.inf:
        raise Missing("finite distances")
    rank = effective_rank(found.values)
    if rank >= room / 10:
        return None
    energy = found.values.square().cumsum(0) / found.values.square().sum()
    most = int((energy < 0.99).sum()) + 1
    of = f" in {found.of}" if found.of else ""
    unsure = " That is fine if there are so few classes." if found.n_classes is None else ""
    return Finding(
        "dimensional-collapse",
        f"{found.n} rows of {found.d} numbers{of} have effective rank {rank:.1f} of a possible "
        f"{room}; {most} direction{'s hold' if most > 1 else ' holds'} 99 % of the variance.",
        "Most of the embedding is unused, so identities that differ there cannot be told "
        f"apart.{unsure}",
        "Push more (more negatives, a lower temperature, a larger margin), lower the weight decay, "
        "or use a smaller embedding.",
    )


def exploding_norms(evidence: Evidence) -> Finding | None:
    """The embeddings keep growing.

    A loss on directions cannot shorten a row: its gradient is orthogonal to the row, so every step
    makes the row longer, and the next step turns it less. In healthy runs here lengths grow up to
    threefold. At tenfold, a step turns a row a hundredth as far as at first: the gradient falls
    with the length, and so does the angle that a given step turns. Compares the mean length in the
    last ten steps with that in the first ten.

    Source: Wang et al., "NormFace", ACM Multimedia 2017, section 3; Draganov et al., "On the
    importance of embedding norms in self-supervised learning", ICML 2025.
    """
    norms = [line["embedding_norm"] for line in evidence.history if "embedding_norm" in line]
    if len(norms) < 2 * EARLY:
        raise Missing(f"{2 * EARLY} steps with embedding_norm" if evidence.history else METRICS)
    first, last = sum(norms[:EARLY]) / EARLY, sum(norms[-EARLY:]) / EARLY
    if last < 10 * first:
        return None
    return Finding(
        "exploding-norms",
        f"The mean length of the embeddings rose from {first:.3g} to {last:.3g}.",
        "If only directions count, long rows hardly turn any more; if lengths count, training is "
        "diverging.",
        "Lower the learning rate, raise the weight decay, or bound the length (normalise it, or "
        "penalise it).",
    )


def stale_memory(evidence: Evidence) -> Finding | None:
    """The rows of a memory no longer say where the network puts their items.

    Fires if a stored row is on average more than half as far from the present embedding of its item
    as from that of another item (cosine distances). In 24 runs on vectors here (two losses, six
    optimizers or learning rates, memories of 8 and of 32 batches of 32 rows), that share was at
    most 0.2 after a quarter of the steps; with 128 batches of 8 rows it was 0.4 to 0.7.

    Source: Wang et al., "Cross-batch memory for embedding learning", CVPR 2020, section 3.2, which
    calls it feature drift.
    """
    drift = evidence.drift
    if drift is None:  # no memory
        return None
    evidence.wait_until_settled()
    if drift.n < FEWEST_STORED:
        raise Missing(f"{FEWEST_STORED} items that are stored and encoded again")
    if not drift.mean > drift.apart / 2:
        return None
    return Finding(
        "stale-memory",
        f"Stored rows, {drift.age:.0f} additions old on average, are at cosine distance "
        f"{drift.mean:.2g} from the present embeddings of their items; those of other items are at "
        f"{drift.apart:.2g}.",
        "The network changes faster than the memory is renewed, so the loss compares with what the "
        "network no longer gives.",
        "Use a smaller memory, larger batches or a lower learning rate, begin later (warm_up), or "
        "store rows of a slow copy of the network (nearfar.momentum_update).",
    )


def unpaired_towers(evidence: Evidence) -> Finding | None:
    r"""Rows of two towers are hardly nearer to their own match than to another row's match.

    Fires if they are nearer in less than 55 % of comparisons (an AUC of 0.55), or in no more than
    chance explains: up to two standard errors, :math:`1 / \sqrt{12 n}` each (Mann & Whitney, 1947),
    above one half. A loss over such towers ends at :math:`\log n`, where no row is nearer.

    If at least 80 % of the rows have a mutual nearest neighbour in the other tower that is not
    their match, the towers agree with each other but their rows are in different orders. With
    random similarities, half of the rows have such a neighbour.
    """
    found = evidence.matches
    if found is None:  # one tower: nothing to pair
        return None
    evidence.wait_until_settled()
    if found.n < FEWEST_MATCHES:
        raise Missing(f"{FEWEST_MATCHES} matches")
    chance = 0.5 + max(0.05, 2 / (12 * found.n) ** 0.5)
    if found.nearer >= chance or fires(collapsed_embedding, evidence):  # collapsed: all are near
        return None
    shuffled = found.elsewhere >= 0.8
    stuck = f" The loss is {evidence.value:.4g}, as if all were the same." * _stuck(evidence)
    order = (
        f" But {found.elsewhere:.0%} of the rows have a mutual nearest neighbour that is not their "
        "match."
    )
    return Finding(
        "unpaired-towers",
        f"Rows are nearer to their match than to another row's match in {found.nearer:.0%} of "
        f"comparisons; chance gives 50 %.{order * shuffled}{stuck}",
        "The towers agree with each other, but their rows are in different orders."
        if shuffled
        else "One tower was shuffled without the other, or nothing was learned yet.",
        "Check that row i of both towers is one pair: how the data is shuffled, sorted, filtered "
        "and gathered.",
    )
