"""Copies of items, identities that are likely one, and identities that are likely two."""

import torch
from torch import Tensor

from nearfar.app.audit.findings import Finding
from nearfar.app.audit.judge import Judged
from nearfar.app.data.items import Items
from nearfar.distance import unit
from nearfar.evaluate import nearest

NEAR = 0.01  # of the usual cosine distance within an identity: 10 times as near
# Two identities are likely one if so large a share of the items of both is likest the other (chance
# gives one half), or of the items of one; and at least so many.
MIXED, MOVED, FEWEST_MIXED = 0.35, 0.75, 3
SMALLEST_HALF = 3
NEARER = 0.05  # share of the identities that are nearer to either half than the other half


def duplicates(items: Items, x: Tensor, judged: Judged) -> list[Finding]:
    """Items that are equal bit for bit, and pairs of two identities that nearly are.

    Args:
        items: the items.
        x: (n, d) their features as they are.
        judged: by these features.
    """
    first: dict[bytes, int] = {}
    found, pairs = [], set()
    for row, mark in enumerate(items.content.fingerprints()):
        before = first.setdefault(mark, row)
        if before == row:
            continue
        if items.identity[before] == items.identity[row]:
            found.append(_pair(items, "duplicate", row, before, "equal", drop=True))
        else:
            pairs.add((before, row))
            found.append(_pair(items, "shared", row, before, "equal"))
    usual = judged.own_distance[judged.own_distance.isfinite()]
    limit = NEAR * float(usual.median()) if len(usual) else 0.0
    near = nearest(x, k=1, distance="cosine")
    rows = (near.distances[:, 0] <= limit).nonzero()[:, 0]
    for row in rows.tolist():
        other = int(near.indices[row, 0])
        pair = (min(row, other), max(row, other))
        if items.identity[row] != items.identity[other] and pair not in pairs:
            pairs.add(pair)
            distance = float(near.distances[row, 0])
            found.append(_pair(items, "shared", *pair, f"cosine distance {distance:.2g}"))
    return found


def _pair(
    items: Items, what: str, row: int, other: int, detail: str, *, drop: bool = False
) -> Finding:
    own, suggested = (items.identities[int(items.identity[i])] for i in (row, other))
    return Finding(
        what,
        items.names[row],
        own,
        suggested if own != suggested else "",
        None,
        items.names[other],
        detail,
        drop,
    )


def merged(items: Items, judged: Judged) -> list[Finding]:
    """Pairs of identities whose items are about as often likest the other as their own.

    All items of a small identity may be likest a large one, and none of that likest the small one.
    """
    doubt = (judged.margin > 0).nonzero()[:, 0]
    n = len(items.identities)
    size = items.identity.bincount(minlength=n)
    code = items.identity[doubt] * n + judged.suggested[doubt]
    pairs, first, count = _counted(code)
    known = dict(zip(pairs.tolist(), count.tolist(), strict=True))
    found = []
    for pair, row, times in zip(pairs.tolist(), doubt[first].tolist(), count.tolist(), strict=True):
        a, b = divmod(pair, n)
        back = known.get(b * n + a, 0)
        if a > b and back > 0:  # seen with its two identities the other way round
            continue
        told = int(size[a] + size[b])
        moved = max(times / int(size[a]), back / int(size[b]))
        mixed = (times + back) / told
        is_one = moved >= MOVED or (back > 0 and mixed >= MIXED)
        if is_one and times + back >= FEWEST_MIXED:
            found.append(
                Finding(
                    "merge",
                    items.names[row],
                    items.identities[a],
                    items.identities[b],
                    min(1.0, max(moved, 2 * mixed)),
                    items.names[int(judged.other[row])],
                    f"{times + back} of {told} items are likest the other",
                )
            )
    return sorted(found, key=lambda one: -(one.confidence or 0))


def _counted(code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct codes, the first place of each, and how often each comes."""
    distinct, place, count = code.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    first = torch.full((len(distinct),), len(code)).scatter_reduce(
        0, place, torch.arange(len(code)), "amin"
    )
    return distinct, first, count


def two_in_one(items: Items, x: Tensor, kept: Tensor) -> list[Finding]:
    """Identities whose two halves are less alike than either is to other identities.

    Args:
        items: the items.
        x: (n, d) features that were not learned from these labels, which would pull both together.
        kept: (n,) bool, which items count: a few of a wrong label would pass for a half.
    """
    z = unit(x.float() - x.float().mean(0))
    n = len(items.identities)
    centre = unit(torch.zeros(n, z.shape[1]).index_add_(0, items.identity, z))
    order = items.identity.argsort(stable=True)
    order = order[kept[order]]
    found = []
    sizes = items.identity[kept].bincount(minlength=n).tolist()
    for number, rows in enumerate(torch.split(order, sizes)):
        if len(rows) < 2 * SMALLEST_HALF:
            continue
        second = _halves(z[rows])
        if min(int(second.sum()), int((~second).sum())) < SMALLEST_HALF:
            continue
        ends = unit(torch.stack([z[rows[~second]].mean(0), z[rows[second]].mean(0)]))
        nearer = (ends @ centre.T > ends[0] @ ends[1]).sum(1) - 1  # less its own identity
        share = float(nearer.min()) / max(n - 1, 1)
        if int(nearer.min()) >= 2 and share >= NEARER:
            detail = (
                f"{int((~second).sum())} + {int(second.sum())} items; {int(nearer.min())} other "
                "identities are nearer to each half than the other half"
            )
            name, other = (items.names[int(rows[half][0])] for half in (~second, second))
            found.append(Finding("split", name, items.identities[number], "", None, other, detail))
    return found


def _halves(z: Tensor) -> Tensor:
    """(m,) bool: which of two clusters each row is in, from the direction of most variance."""
    away = z - z.mean(0)
    direction = torch.linalg.eigh(away @ away.T)[1][:, -1]
    second: Tensor = direction > 0
    for _ in range(10):
        if second.all() or not second.any():
            break
        ends = torch.stack([z[~second].mean(0), z[second].mean(0)])
        second = torch.cdist(z, ends).argmin(1) == 1
    return second
