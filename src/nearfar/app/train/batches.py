"""Batches for training: balanced items or pairs, and augmentation of images."""

from collections.abc import Iterator, Sequence
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from nearfar.app.data.items import Pairs
from nearfar.app.train.split import rows_within


def balanced_items(
    identity: Tensor, chosen: Tensor, *, n_identities: int, n_items: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches of P identities x K items: (P * K,) rows, grouped by identity.

    Identities are drawn in random order until P of them have several items. Up to P identities with
    a single item that are drawn on the way are added at the end, once each, as dissimilar examples;
    repeated, such an item would be similar to itself.

    Args:
        identity: (n,) int64, the identity of each item.
        chosen: (i,) the identities to draw from.
        n_identities: P; all of `chosen` if there are fewer.
        n_items: K; an identity with several, but fewer, items repeats some.
        generator: for random choices.
    """
    rows_of = [(identity == i).nonzero()[:, 0] for i in chosen]
    several = torch.tensor([len(rows) > 1 for rows in rows_of])
    while True:
        order = torch.randperm(len(rows_of), generator=generator)
        is_several = several[order]
        before = is_several.cumsum(0) - is_several.long()  # identities with several items
        picked = order[is_several & (before < n_identities)]
        alone = order[~is_several & (before < n_identities)][:n_identities]
        yield torch.cat(
            [_sample(rows_of[int(i)], n_items, generator) for i in picked]
            + [rows_of[int(i)] for i in alone]
        )


def balanced_pairs(
    pairs: Pairs, chosen: Tensor, *, n_pairs: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches of (n_pairs,) rows of pairs within the chosen identities, half similar."""
    rows = rows_within(pairs, chosen)
    similar = pairs.is_similar()[rows]
    near, far = rows[similar], rows[~similar]
    n_near = min(n_pairs // 2, len(near))
    n_far = min(n_pairs // 2, len(far))
    while True:
        yield torch.cat([_sample(near, n_near, generator), _sample(far, n_far, generator)])


def similar_pairs(
    pairs: Pairs, chosen: Tensor, *, n_pairs: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches of one similar pair from each of n_pairs identities, so no two rows match."""
    rows = rows_within(pairs, chosen)
    rows = rows[pairs.is_similar()[rows]]
    identity = pairs.items.identity[pairs.a[rows]]
    rows_of = [rows[identity == i] for i in identity.unique()]  # type: ignore[no-untyped-call]
    while True:
        picked = torch.randperm(len(rows_of), generator=generator)[:n_pairs]
        yield torch.cat([_sample(rows_of[int(i)], 1, generator) for i in picked])


def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images, (n, c, h, w), by up to 6 %, scale by up to 10 %, rotate by up to 10 degrees.

    New pixels at the edges repeat the edge, which suits any background colour.
    """
    n = len(x)
    angle, scale, right, down = torch.rand(4, n, generator=generator) * 2 - 1
    angle, scale = angle * pi / 18, 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # The grid spans 2 units, so that a shift of 0.12 is 6 % of the side.
    rows = [torch.stack([cos, -sin, 0.12 * right], 1), torch.stack([sin, cos, 0.12 * down], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def _sample(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of the rows at random; if there are fewer, all are repeated equally often."""
    rounds: Sequence[Tensor] = [
        torch.randperm(len(rows), generator=generator) for _ in range(-(-n // len(rows)))
    ]
    return rows[torch.cat([*rounds])[:n]]
