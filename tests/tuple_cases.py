"""Batches of every layout for losses over tuples, and how results are compared with the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from batch_cases import referring
from torch import Tensor

from nearfar import batch_quadruplet_loss, batch_triplet_loss, quadruplet_stats, triplet_stats

Settings = dict[str, Any]

LAYOUTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": lambda n, chance: torch.randint(0, 4, (n,), generator=chance) * 2**40 - 3,
    "two": lambda n, chance: torch.randint(0, 2, (n,), generator=chance),
    "one": lambda n, _: torch.full((n,), 5),
    "singletons": lambda n, chance: torch.randperm(n, generator=chance),
    "pairs": lambda n, _: torch.arange(n) % max(n // 2, 1),
    "one large, others alone": lambda n, _: (torch.arange(n) - n // 2).clamp(min=0),
    "multi": lambda n, chance: torch.rand(n, 4, generator=chance) < 0.3,
}
BY_CLASS = [name for name in LAYOUTS if name != "multi"]


def draw(n: int, layout: str, seed: int = 0, d: int = 3) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=chance, dtype=torch.float64)
    return x, LAYOUTS[layout](n, chance)


def drawn(how: Settings) -> bool:
    """Whether the triplets of a loss are drawn at random."""
    return how.get("select") == "distance_weighted" or "n_per_anchor" in how


def gradients(loss: Callable[..., Any], *leaves: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    """The loss, the gradient of every leaf under unequal weights, and what else is returned."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    result = loss(*leaves)
    value, *more = result if isinstance(result, tuple) else (result,)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    found = [torch.zeros_like(a) if a.grad is None else a.grad for a in leaves]
    return value.detach(), found, more


def agree(found: Any, true: Any, rtol: float = 1e-12) -> None:
    """Value and gradients to `rtol` of the largest entry, counts exactly."""
    (value, rows, counts), (true_value, true_rows, true_counts) = found, true
    for a, b in ((value, true_value), *zip(rows, true_rows, strict=True)):
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=rtol * max(size, 1))
    assert counts == true_counts


def triplets(x: Tensor, labels: Any, **how: Any) -> tuple[Any, ...]:
    """The loss, and the numbers of all and of active triplets."""
    told = referring(how)
    counted = {k: v for k, v in told.items() if k not in ("smooth", "weight", "reduction")}
    stats = triplet_stats(x, labels, **counted)
    active = stats.valid if how.get("smooth") else stats.active
    return batch_triplet_loss(x, labels, **told), stats.valid, active


def quadruplets(x: Tensor, labels: Any, **how: Any) -> tuple[Any, ...]:
    told = referring(how)
    counted = {k: v for k, v in told.items() if k not in ("weight", "reduction")}
    stats = quadruplet_stats(x, labels, **counted)
    return batch_quadruplet_loss(x, labels, **told), stats.valid, stats.active, stats.active2
