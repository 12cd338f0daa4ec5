"""The pulls and pushes of a whole-batch loss, without holding the matrix of all pairs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.closeness import Tile
from nearfar.engine.meeting import Group, meeting_of, over_processes
from nearfar.engine.observe import watch_forces
from nearfar.inputs import ArrayLike, lift, tensor
from nearfar.insight.readings import way
from nearfar.losses.base import error_of_all, unwrap
from nearfar.losses.own import Rule
from nearfar.plain import number
from nearfar.registry import find
from nearfar.tabulate import Table


@dataclass(frozen=True, eq=False)
class Forces:
    """The strongest forces of a loss on a batch, and the total forces of each anchor.

    A force is the derivative of the loss with respect to how far apart the anchor and the other row
    are: above 0 it pulls them together, below 0 it pushes them apart. Forces are directed: each
    comes from the terms of its anchor. Two rows that are both anchors have a force in each
    direction.

    With `group`, they are the forces of this process's anchors on the rows of all processes.

    Attributes:
        anchor: (k,) int64, the row that exerts the force; strongest force first. With `group`, its
            index in the batch of its own process; a proxy's among all proxies.
        other: (k,) int64, the row it acts on (of the reference or the other tower, if there is
            one; the indices of hard negatives follow those of the tower). With `group`, a row of a
            batch has its index in the batch of all processes.
        similar: (k,) bool, whether the two are a positive pair.
        closeness: (k,) their distance; for losses on similarities, their similarity.
        force: (k,) > 0 pulls, < 0 pushes.
        pull: (n,) for each anchor, the sum of its pulls.
        push: (n,) for each anchor, the sum of its pushes, 0 or above.
        loss: the loss itself; with `group`, that of all processes.
        n_of_all: with `group`, how many anchors all processes have; None without.
    """

    anchor: Tensor
    other: Tensor
    similar: Tensor
    closeness: Tensor
    force: Tensor
    pull: Tensor
    push: Tensor
    loss: float
    n_of_all: int | None = None

    def __str__(self) -> str:
        rows = zip(
            self.anchor.tolist(),
            self.other.tolist(),
            self.similar.tolist(),
            self.closeness.tolist(),
            self.force.tolist(),
            strict=True,
        )
        cells = [
            (str(a), str(o), "yes" if s else "no", number(c), way(f)) for a, o, s, c, f in rows
        ]
        table = Table(("anchor", "other", "similar", "closeness", "force"), cells)
        pull, push = float(self.pull.sum()), float(self.push.sum())
        totals = f"pull {pull:.4g}, push {push:.4g}"
        loss, own = f"loss {self.loss:.4g}", f"{len(self.pull)} anchors"
        if self.n_of_all is not None:
            loss += f" over {self.n_of_all} anchors of all processes"
            own = f"the {own} of this process"
        return f"{loss}, {totals} over {own}; the strongest:\n{table.plain()}"


def forces(
    loss: Callable[..., Tensor], *data: ArrayLike | Rule, k: int = 10, **hyperparameters: Any
) -> Forces:
    r"""The strongest pulls and pushes of a whole-batch loss, and their totals per anchor.

    The loss is run once and shows its forces tile by tile, :math:`\partial L / \partial d_{ij}`
    with its reduction. The matrix is never stored.

    Args:
        loss: one of nearfar's losses over a whole batch, two towers or proxies, as a function or a
            module; or `nearfar.batch_loss`.
        data: the data arguments of the loss. For `batch_loss`, its rule comes first. With `group`,
            a process may have no rows.
        k: how many of the strongest forces to keep.
        hyperparameters: its keyword arguments; those of a module are already set. Any reduction but
            "none".

    Returns:
        `Forces`.

    Raises:
        TypeError: `loss` is not one of nearfar's losses, or is one on aligned rows: use `explain`.
        ValueError: any error of the loss itself; reduction="none"; without `group`, no rows, or
            nothing to compare them with; symmetric InfoNCE with hard negatives, or quadruplets with
            a mean over some of their terms, each of which makes two comparisons.

    >>> from nearfar import sup_con_loss
    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.5, 0.9]])
    >>> print(forces(sup_con_loss, x, [0, 0, 1, 1], k=3, temperature=0.5))
    loss 0.4312, pull 0.6788, push 0.6788 over 4 anchors; the strongest:
    anchor  other  similar  closeness  force
    ------  -----  -------  ---------  ----------
         1      0  yes         0.8000  pull 0.242
         2      3  yes         0.8742  pull 0.215
         1      2  no          0.6000  push 0.173

    Source: Wang et al., "Multi-Similarity Loss", CVPR 2019, section 3: general pair weighting.
    """
    reduction = hyperparameters.pop("reduction", getattr(loss, "reduction", "mean"))
    with error_of_all(loss, hyperparameters):
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
        if reduction == "none":
            raise ValueError(
                'reduction must be "mean" or "sum": forces act on one number, not many.'
            )
    return forces_of(*unwrap(loss, data, hyperparameters), k=k, reduction=reduction)


def forces_of(
    function: Callable[..., Tensor],
    data: tuple[ArrayLike, ...],
    settings: dict[str, Any],
    *,
    k: int,
    reduction: str = "mean",
) -> Forces:
    """The forces of a loss, its data and its settings, from `unwrap`."""
    group = settings.get("group")
    strongest = _Strongest(k)
    with torch.inference_mode(False), watch_forces(strongest):
        with error_of_all(function, settings):
            first, others = _arguments(data, may_be_empty=group is not None)
        value = function(first, *others, **settings, reduction=reduction)
    if not strongest.begun:
        raise TypeError(
            "forces takes losses that compare all rows of a batch, such as sup_con_loss or "
            f"clip_loss. For {function.__name__} on aligned rows use nearfar.explain."
        )
    loss = float(value.detach())
    if group is not None:
        found = strongest.result(len(first), loss)
        before, n_of_all = _anchors(len(found.pull), group=group)
        known = find(function.__name__)
        if known is not None and known.anchors == "proxies":  # of which each process has a share
            found = replace(found, anchor=found.anchor + before)
        return replace(found, n_of_all=n_of_all)
    if not strongest.best:
        raise ValueError("forces needs at least one pair: there is nothing to compare with.")
    return strongest.result(len(first), loss)


@over_processes
def _anchors(n: int, *, group: Group | None) -> tuple[int, int]:
    """How many anchors the processes before this one have, of which it has n, and how many all."""
    if group is None:
        return 0, n
    processes = meeting_of(group).processes
    told = [of_each for (of_each,) in processes.tell([n])]
    return sum(told[: processes.rank]), sum(told)


def _arguments(
    data: tuple[ArrayLike, ...], *, may_be_empty: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The data as tensors, the rows with a gradient: a loss without one has no forces to show."""
    if not data:
        raise TypeError("forces needs the data by position, as in forces(loss, x, labels).")
    first, *others = (_normal(f"argument {i}", value) for i, value in enumerate(data))
    if first is None or not (len(first) or may_be_empty):
        raise ValueError("forces needs at least one row: the batch is empty.")
    return lift("argument 0", first.detach()).detach().requires_grad_(), others


def _normal(name: str, value: ArrayLike | None) -> Tensor | None:
    """A tensor, copied if it was made in inference mode, since that has no gradient."""
    if value is None:  # an omitted argument, such as listed negatives
        return None
    x = tensor(name, value)
    return x.clone() if x.is_inference() else x


_KINDS = (torch.int64, torch.int64, torch.bool, torch.float32, torch.float32)


class _Strongest:
    """Keeps the k strongest forces of all tiles, and sums the forces of each anchor."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.best: list[Tensor] = []  # anchor, other, similar, closeness, pull
        self.pull = self.push = torch.zeros(0)
        self.begun = False

    def begin(self) -> None:
        if self.begun:
            raise ValueError(
                "one comparison of rows and columns can be shown, and symmetric=True with "
                "hard_negatives makes two: leave symmetric out. So does a mean over some "
                'quadruplets: pass reduction="sum".'
            )
        self.begun = True

    def tile(self, n_anchors: int, tile: Tile, pull: Tensor) -> None:
        if not self.best:
            self.pull, self.push = pull.new_zeros(n_anchors), pull.new_zeros(n_anchors)
        self.pull[tile.rows] += pull.clamp(min=0).sum(1)
        self.push[tile.rows] -= pull.clamp(max=0).sum(1)
        strong = pull.abs().flatten().topk(min(self.k, pull.numel())).indices
        i, j = strong // pull.shape[1], strong % pull.shape[1]
        anchor, other = i + tile.rows.start, j + tile.columns.start
        found = [anchor, other, tile.positive[i, j], tile.closeness[i, j], pull[i, j]]
        if self.best:
            found = [torch.cat(both) for both in zip(self.best, found, strict=True)]
        order = found[4].abs().argsort(descending=True, stable=True)[: self.k]
        self.best = [column[order] for column in found]

    def scale(self, by: Tensor | float) -> None:
        self.pull, self.push = self.pull * by, self.push * by
        if self.best:
            self.best[4] = self.best[4] * by

    def result(self, n_rows: int, loss: float) -> Forces:
        if not self.best:  # no tile was shown: there are no rows, or nothing to compare them with
            self.pull = self.push = torch.zeros(n_rows)
            self.best = [torch.zeros(0, dtype=kind) for kind in _KINDS]
        acting = self.best[4] != 0
        anchor, other, similar, closeness, force = (column[acting].cpu() for column in self.best)
        pull, push = self.pull.cpu(), self.push.cpu()
        return Forces(anchor, other, similar, closeness, force, pull, push, loss)
