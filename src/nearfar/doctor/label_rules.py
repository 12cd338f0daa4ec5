"""Rules about labels and splits."""

from itertools import combinations
from math import sqrt

import torch

from nearfar.doctor.evidence import LABELS, SPLIT, Apart, Evidence, Side, known
from nearfar.doctor.finding import Finding, Missing

FEWEST_IDENTITIES = 20  # to learn from


def flipped_labels(evidence: Evidence) -> Finding | None:
    """Similar rows are farther apart than dissimilar ones.

    Fires if a random similar pair is farther apart than a dissimilar one in at least 60 % of
    comparisons, and that share is 3 standard errors above one half (Mann & Whitney, 1947). Pairs
    that share rows are not independent, so no more pairs are counted than there are rows.
    """
    apart = known(evidence.apart, LABELS)
    evidence.wait_until_settled()
    n1, n2 = len(apart.similar), len(apart.dissimilar)
    if min(n1, n2) < 2:
        raise Missing("two similar and two dissimilar pairs")
    if not (apart.similar.isfinite().all() and apart.dissimilar.isfinite().all()):
        raise Missing("finite distances")
    share = _share_farther(apart)
    most = apart.n_rows or max(n1, n2)
    n1, n2 = min(n1, most), min(n2, most)
    surprise = (share - 0.5) / sqrt((n1 + n2 + 1) / (12 * n1 * n2))
    certain = share == 1 and apart.n_rows is None  # few rows, but they all agree
    if not certain and (surprise < 3 or share < 0.6):
        return None
    sign = 1 if apart.closeness == "distance" else -1
    near, far = (float(sign * side.median()) for side in (apart.similar, apart.dissimilar))
    return Finding(
        "flipped-labels",
        f"Similar rows are farther apart than dissimilar ones in {share:.0%} of comparisons "
        f"(median {apart.closeness} {near:.4g} against {far:.4g}).",
        "Usually 0 and 1 are read the wrong way round, or two columns are swapped.",
        "Check which number marks a similar pair (similar_label), and which argument is the "
        "positive.",
    )


def _share_farther(apart: Apart) -> float:
    """How often a similar pair is farther apart than a dissimilar one."""
    ordered = apart.dissimilar.sort().values
    below = torch.searchsorted(ordered, apart.similar, right=False).double()
    not_above = torch.searchsorted(ordered, apart.similar, right=True).double()
    return float((below + not_above).sum()) / (2 * len(apart.similar) * len(ordered))


def one_kind_only(evidence: Evidence) -> Finding | None:
    """Without similar rows nothing is pulled; without dissimilar ones nothing is pushed."""
    apart = known(evidence.apart, LABELS)
    if len(apart.similar) + len(apart.dissimilar) < 2:
        raise Missing("two pairs")
    if not len(apart.dissimilar):
        means = "With nothing to push apart, the loss is smallest when every row is the same."
        return Finding("one-kind-only", "Every row is similar.", means, "Add dissimilar rows.")
    if not len(apart.similar):
        means = "With nothing to pull together, the loss only spreads the rows out."
        return Finding("one-kind-only", "Every row is dissimilar.", means, "Add similar rows.")
    return None


def few_positives(evidence: Evidence) -> Finding | None:
    """More than three quarters of the anchors have no positive.

    They are left out of the mean, so the gradient is estimated from the others alone: from a
    quarter of the anchors, its noise doubles. Batches of n random items of C equally large classes
    leave :math:`(1 - 1 / C)^{n - 1}` of the anchors without a positive, 77 % for 256 items of
    1,000 classes.
    """
    positives = known(evidence.positives, LABELS)
    if len(positives) < 8:
        raise Missing("8 anchors")
    without = int((positives == 0).sum())
    if without == len(positives) or without <= 0.75 * len(positives):  # none: one_kind_only
        return None
    return Finding(
        "few-positives",
        f"{without} of {len(positives)} anchors have no positive.",
        "Only the others are pulled: most of the batch teaches half of the task, and the gradient "
        "is noisy.",
        "Draw batches of P identities x K items (K of 2 or more), or larger batches.",
    )


def imbalance(evidence: Evidence) -> Finding | None:
    """One answer is right for at least 90 % of the data, so accuracy says nothing.

    A classifier that always gives that answer is right in 90 % of cases or more (Provost, Fawcett &
    Kohavi, "The case against accuracy estimation", ICML 1998). Needs 20 labels, and both kinds.
    """
    most = known(evidence.commonest, LABELS if evidence.positives is None else "class ids")
    if most.total < 20:
        raise Missing("20 labels")
    if not 0.9 * most.total <= most.count < most.total:
        return None
    return Finding(
        "imbalance",
        f"{most.count:,} of {most.total:,} labels are {most.label!r}.",
        f"Always giving that answer is right in {most.count / most.total:.1%} of cases: accuracy "
        "says nothing here, and a batch drawn at random holds few of the rest.",
        "Judge by AUC, equal error rate, or true accepts at a false-accept rate; balance batches.",
    )


def identity_leak(evidence: Evidence) -> Finding | None:
    """Fires for a single identity on two sides: figures measured there reward memorisation."""
    for (one, a), (two, b) in _two_sides(evidence):
        shared = sorted(set(a.identities) & set(b.identities))
        if shared:
            return Finding(
                "identity-leak",
                f"{len(shared)} of {len(b.identities)} identities of {two} are also in {one} "
                f"({', '.join(map(repr, shared[:3]))}{', ...' * (len(shared) > 3)}).",
                "Figures measured there reward memorisation, and flatter the network.",
                "Split identities, never items or pairs.",
            )
    return None


def duplicates_across_splits(evidence: Evidence) -> Finding | None:
    """At least one in a thousand items of a side also appears, bit for bit, on another side.

    Fewer cannot move a rate by more than a tenth of a percentage point. Barz & Denzler ("Do we
    train on test data?", 2020) find 3 to 10 % near duplicates in the test sets of CIFAR; this rule
    sees only exact ones.
    """
    sides = _two_sides(evidence)
    if not any(a.items and b.items for (_, a), (_, b) in sides):
        raise Missing("the items of a split")
    for (one, a), (two, b) in sides:
        there = set(a.items)
        shared = sum(item in there for item in b.items)
        if shared and shared >= len(b.items) / 1000:
            return Finding(
                "duplicates-across-splits",
                f"{shared:,} of {len(b.items):,} items of {two} are also in {one}, bit for bit.",
                "An item was collected twice under two names, or many items are the same blank "
                "image.",
                "Remove the copies, or give them one identity, and split again.",
            )
    return None


def few_identities(evidence: Evidence) -> Finding | None:
    """Fewer than 20 identities to learn from.

    The network learns what distinguishes these few, not what distinguishes any two identities. The
    limit of 20 is a convention: benchmarks that test on unseen classes train on 64 and more.

    Source: miniImageNet has 64 (Vinyals et al., "Matching networks for one shot learning", NeurIPS
    2016), Omniglot 964 (Lake, Salakhutdinov & Tenenbaum, Science 2015).
    """
    train = known(evidence.sides.get("train"), 'a side named "train"' if evidence.sides else SPLIT)
    n = len(set(train.identities))
    if n >= FEWEST_IDENTITIES:
        return None
    return Finding(
        "few-identities",
        f"There {'are' if n != 1 else 'is'} {n} identit{'ies' if n != 1 else 'y'} to learn from.",
        "What distinguishes these few says little about others. Neither more steps nor more items "
        "of the same identities change that.",
        "Add identities: dozens at least, better hundreds. Until then use a network that was "
        "trained on more (--encoder), or compare the raw input.",
    )


def _two_sides(evidence: Evidence) -> list[tuple[tuple[str, Side], tuple[str, Side]]]:
    if len(evidence.sides) < 2:
        raise Missing(SPLIT)
    return list(combinations(evidence.sides.items(), 2))
