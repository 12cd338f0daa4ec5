"""What can be wrong with labels and splits."""

from itertools import combinations
from math import sqrt

import torch

from nearfar.doctor.evidence import SETTLED, Apart, Evidence
from nearfar.doctor.finding import Finding


def flipped_labels(evidence: Evidence) -> Finding | None:
    """Similar rows are farther apart than dissimilar ones.

    Fires where a random similar pair is the farther one in at least 60 % of comparisons and this
    is 3 standard errors above one half (Mann & Whitney, 1947). Pairs that share rows are not
    independent, so no more of them are counted than there are rows.
    """
    apart = evidence.apart
    if apart is None or evidence.progress < SETTLED:
        return None
    n1, n2 = len(apart.similar), len(apart.dissimilar)
    if min(n1, n2) < 2 or not (
        apart.similar.isfinite().all() and apart.dissimilar.isfinite().all()
    ):
        return None
    share = _share_farther(apart)
    most = apart.n_rows or max(n1, n2)
    n1, n2 = min(n1, most), min(n2, most)
    surprise = (share - 0.5) / sqrt((n1 + n2 + 1) / (12 * n1 * n2))
    certain = share == 1 and apart.n_rows is None  # few rows, but all of them agree
    if not certain and (surprise < 3 or share < 0.6):
        return None
    sign = 1 if apart.closeness == "distance" else -1
    near, far = (float(sign * side.median()) for side in (apart.similar, apart.dissimilar))
    return Finding(
        "flipped-labels",
        f"Similar rows are farther apart than dissimilar ones in {share:.0%} of comparisons "
        f"(median {apart.closeness} {near:.4g} against {far:.4g}).",
        "Usually 0 and 1 are read the wrong way round, or two columns are swapped.",
        "Check what marks a similar pair (similar_label), and which argument is the positive.",
    )


def _share_farther(apart: Apart) -> float:
    """The share of (similar, dissimilar) pairs of pairs where the similar one is the farther."""
    ordered = apart.dissimilar.sort().values
    below = torch.searchsorted(ordered, apart.similar, right=False).double()
    not_above = torch.searchsorted(ordered, apart.similar, right=True).double()
    return float((below + not_above).sum()) / (2 * len(apart.similar) * len(ordered))


def one_kind_only(evidence: Evidence) -> Finding | None:
    """Without similar rows nothing is pulled, without dissimilar ones nothing is pushed."""
    apart = evidence.apart
    if apart is None or len(apart.similar) + len(apart.dissimilar) < 2:
        return None
    if not len(apart.dissimilar):
        means = "With nothing to push apart, the loss is smallest when every row is the same."
        return Finding("one-kind-only", "Every row is similar.", means, "Add dissimilar rows.")
    if not len(apart.similar):
        means = "With nothing to pull together, the loss only spreads the rows out."
        return Finding("one-kind-only", "Every row is dissimilar.", means, "Add similar rows.")
    return None


def few_positives(evidence: Evidence) -> Finding | None:
    """More than three quarters of the anchors have no positive.

    They are left out of the mean, so that the others are all there is to estimate a gradient from:
    with a quarter of them its noise doubles. Batches of n random items of C even classes leave
    :math:`(1 - 1 / C)^{n - 1}` of the anchors without one, 77 % for 256 items of 1,000 classes.
    """
    positives = evidence.positives
    if positives is None or len(positives) < 8:
        return None
    without = int((positives == 0).sum())
    if without == len(positives) or without <= 0.75 * len(positives):  # of none, one_kind_only says
        return None
    return Finding(
        "few-positives",
        f"{without} of {len(positives)} anchors have no positive.",
        "Only the others are pulled to anything: most of the batch teaches half of the task, and "
        "the gradient is noisy.",
        "Draw batches of P identities x K items (K of 2 or more), or larger ones.",
    )


def imbalance(evidence: Evidence) -> Finding | None:
    """One answer is right for at least 90 % of the data, so that accuracy says nothing.

    A classifier that always gives it is then at 90 % or more (Provost, Fawcett & Kohavi, "The case
    against accuracy estimation", ICML 1998). Needs 20 labels, and both kinds.
    """
    most = evidence.commonest
    if most is None or most.total < 20 or not 0.9 * most.total <= most.count < most.total:
        return None
    return Finding(
        "imbalance",
        f"{most.count:,} of {most.total:,} labels are {most.label!r}.",
        f"Always answering so is right in {most.count / most.total:.1%} of cases: accuracy says "
        "nothing here, and a batch drawn at random holds few of the rest.",
        "Judge by AUC, equal error rate, or true accepts at a false-accept rate; balance batches.",
    )


def identity_leak(evidence: Evidence) -> Finding | None:
    """One identity on two sides is enough: its figures are those of a memory."""
    for (one, a), (two, b) in combinations(evidence.sides.items(), 2):
        shared = sorted(set(a.identities) & set(b.identities))
        if shared:
            return Finding(
                "identity-leak",
                f"{len(shared)} of {len(b.identities)} identities of {two} are also in {one} "
                f"({', '.join(map(repr, shared[:3]))}{', ...' * (len(shared) > 3)}).",
                "Figures measured there are those of a memory, and flatter.",
                "Split identities, never items or pairs.",
            )
    return None


def duplicates_across_splits(evidence: Evidence) -> Finding | None:
    """At least one in a thousand items of a side is, bit by bit, also on another one.

    Fewer cannot move a rate by more than a tenth of a percent. Barz & Denzler ("Do we train on
    test data?", 2020) find 3 to 10 % of near duplicates in the test sets of CIFAR; this rule sees
    exact ones only.
    """
    for (one, a), (two, b) in combinations(evidence.sides.items(), 2):
        known = set(a.items)
        shared = sum(item in known for item in b.items)
        if shared and shared >= len(b.items) / 1000:
            return Finding(
                "duplicates-across-splits",
                f"{shared:,} of {len(b.items):,} items of {two} are also in {one}, bit by bit.",
                "One item was collected twice under two names, or a blank one stands for many.",
                "Remove the copies, or give them one identity, and split again.",
            )
    return None
