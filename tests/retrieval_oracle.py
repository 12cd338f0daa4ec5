"""Retrieval by sorting every reference of every query; imports nothing from src."""

import numpy as np


def distances(x, reference, distance):
    x, reference = np.asarray(x, float), np.asarray(reference, float)
    if distance == "cosine":
        lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (x, reference)]
        return 1 - (x / lengths[0]) @ (reference / lengths[1]).T
    apart = x[:, None] - reference[None]
    if distance == "snr":
        return apart.var(2) / x.var(1)[:, None]
    if distance == "manhattan" or not isinstance(distance, str):
        return np.linalg.norm(apart, ord=1 if isinstance(distance, str) else distance, axis=2)
    squares = (apart**2).sum(2)
    return np.sqrt(squares) if distance == "euclidean" else squares


def ranked(d, own):
    """The references of each query, nearest first and of equal ones by index, without its own."""
    return ranked_without(d, [[mine] for mine in own])


def ranked_without(d, left_out):
    """Likewise, without some for each query."""
    return [
        [int(j) for j in np.argsort(row, kind="stable") if j not in hidden]
        for row, hidden in zip(d, left_out, strict=True)
    ]


def figures(relevant, order, k):
    """relevant: (n, m) bool; order: what `ranked` gives. Means over queries with one to find."""
    rows = []
    for hits, places in zip(relevant, order, strict=True):
        found = [bool(hits[j]) for j in places]
        total = sum(found)
        if not total:
            continue
        row = {}
        for size in k:
            top = sum(found[:size])
            gain = sum(hit / np.log2(i + 2) for i, hit in enumerate(found[:size]))
            ideal = sum(1 / np.log2(i + 2) for i in range(min(size, total)))
            row |= {
                ("hit_rate", size): float(top > 0),
                ("recall", size): top / total,
                ("precision", size): top / size,
                ("ndcg", size): gain / ideal,
            }
        row["r_precision"] = sum(found[:total]) / total
        row["map_at_r"] = (
            sum(sum(found[: i + 1]) / (i + 1) for i in range(total) if found[i]) / total
        )
        row["mrr"] = 1 / (found.index(True) + 1)
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
