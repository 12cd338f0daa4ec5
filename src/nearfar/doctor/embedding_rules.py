"""What can be wrong with the embeddings."""

import torch

from nearfar.doctor.evidence import SETTLED, Evidence
from nearfar.doctor.finding import Finding
from nearfar.spectrum import effective_rank

EARLY = 10  # steps that say how it began
_POWER = {"euclidean": 1, "sqeuclidean": 2, "cosine": 0}  # of the length, in a distance


def not_a_number(evidence: Evidence) -> Finding | None:
    """One such row is one too many: it makes the whole batch's loss NaN."""
    bad = evidence.broken
    if bad is None or not bad.any():
        return None
    rows = ", ".join(str(int(row)) for row in bad.nonzero()[:5])
    return Finding(
        "not-a-number",
        f"{int(bad.sum())} of {len(bad)} rows are NaN or infinite, or their loss is (row {rows}).",
        "For finite embeddings no loss here is NaN.",
        "Look for these rows in the data and in the encoder's output; lower the learning rate.",
    )


def collapsed_embedding(evidence: Evidence) -> Finding | None:
    r"""Everything in one place, so that the loss stays where it is.

    Fires where the median distance of dissimilar rows is below 1 % of their length (they then
    differ by less than 0.6 degrees, where random directions differ by 90). Below 10 % it fires if
    the loss is also within 1 % of what it is for identical embeddings: the margin of a triplet
    loss, :math:`\log N` of a softmax. That value is a stationary point in which training gets
    stuck (Schroff et al., "FaceNet", CVPR 2015, section 3.2; Xuan et al., "Hard negative examples
    are hard, but useful", ECCV 2020).
    """
    apart = evidence.apart
    if apart is None or evidence.progress < SETTLED or len(apart.dissimilar) < 2:
        return None
    if apart.closeness == "logit" or not apart.dissimilar.isfinite().all():
        return None
    distance = _in_lengths(evidence, float(apart.dissimilar.median()))
    stuck = _stuck(evidence)
    if distance > (0.1 if stuck else 0.01):
        return None
    value = f" The loss is {evidence.value:.4g}, as for identical embeddings." if stuck else ""
    return Finding(
        "collapsed-embedding",
        f"Half of the dissimilar rows are apart by at most {distance:.1%} of their length.{value}",
        "The encoder gives nearly the same embedding to everything: the pull wins, or the "
        "learning rate was too high for the hardest negatives.",
        "Lower the learning rate, begin with random or semi-hard negatives, check that the margin "
        "pushes at all and that the input is scaled.",
    )


def _in_lengths(evidence: Evidence, measured: float) -> float:
    """A distance or similarity of rows as Euclidean distance, in units of their length."""
    assert evidence.apart is not None
    scale = _length(evidence)
    if evidence.apart.closeness == "similarity":  # a cosine, or a product; negated
        return _chord(1 + measured / scale**2)
    distance = str(evidence.settings.get("distance", "cosine"))
    measured /= scale ** _POWER[distance]
    if distance == "euclidean":
        return measured
    return float(max(measured, 0.0) ** 0.5) if distance == "sqeuclidean" else _chord(measured)


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
    r"""The embeddings spread in few of their dimensions.

    The effective rank is :math:`\exp(-\sum_k p_k \log p_k)` with
    :math:`p_k = \sigma_k / \sum \sigma` (Roy & Vetterli, EUSIPCO 2007; Garrido et al., "RankMe",
    ICML 2023), of the rows less their mean. It cannot exceed d, nor n - 1, and a loss that brings
    each of C classes to a point leaves C - 1 (Papyan et al., PNAS 2020). Fires below a tenth of the
    smallest of those, never if that is below 10; trained runs of every loss here have half of it.

    Source: Jing et al., "Understanding dimensional collapse in contrastive self-supervised
    learning", ICLR 2022.
    """
    found = evidence.spectrum
    if found is None or evidence.progress < SETTLED:
        return None
    room = min(found.d, found.n - 1, (found.n_classes or found.n) - 1)
    total = float(found.values.sum())
    if not 0 < total < torch.inf:
        return None
    rank = effective_rank(found.values)
    if rank >= room / 10:
        return None
    energy = found.values.square().cumsum(0) / found.values.square().sum()
    most = int((energy < 0.99).sum()) + 1
    return Finding(
        "dimensional-collapse",
        f"{found.n} rows of {found.d} numbers have effective rank {rank:.1f} of {room} there could "
        f"be; {most} direction{'s' * (most > 1)} hold{'s' * (most == 1)} 99 % of the variance.",
        "Most of the embedding is unused, so identities that differ elsewhere cannot be told "
        "apart.",
        "Push more (more negatives, a lower temperature, a larger margin), lower the weight decay, "
        "or use a smaller embedding.",
    )


def exploding_norms(evidence: Evidence) -> Finding | None:
    """Embeddings that grow and grow.

    A loss on directions cannot shorten a row: its gradient stands at right angles to it, so every
    step makes it longer and the next one turn it less. Healthy runs here grow up to threefold; at
    tenfold a step turns a row a hundredth as far as it did (the gradient falls with the length, and
    so does the turn of a given step). Compares the mean length in the last ten steps with that in
    the first ten.

    Source: Wang et al., "NormFace", ACM Multimedia 2017, section 3; Draganov et al., "On the
    importance of embedding norms in self-supervised learning", ICML 2025.
    """
    norms = [line["embedding_norm"] for line in evidence.history if "embedding_norm" in line]
    if len(norms) < 2 * EARLY:
        return None
    first, last = sum(norms[:EARLY]) / EARLY, sum(norms[-EARLY:]) / EARLY
    if last < 10 * first:
        return None
    return Finding(
        "exploding-norms",
        f"The mean length of the embeddings rose from {first:.3g} to {last:.3g}.",
        "Where only directions count, rows that are long hardly turn any more; where lengths "
        "count, training diverges.",
        "Lower the learning rate, raise the weight decay, or bound the length (normalise, or "
        "penalise it).",
    )
