"""Every whole-batch loss on a batch that is split over processes, and on the whole of it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any

import batch_cases
import torch
import torch.distributed as dist
from batch_cases import Case, Data
from torch import Tensor

import nearfar
from nearfar.distributed import over
from nearfar.engine.budget import tile_shape

# How many rows each process has: with and without an equal share, and with none at all.
SIZES = {2: (5, 7), 3: (4, 0, 8), 4: (3, 3, 3, 3)}


@dataclass(frozen=True)
class Found:
    """What one process found: the value, and the gradient of everything that has one."""

    value: Tensor
    gradients: dict[str, Tensor]


def parts(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]


def split_names(case: Case, data: Data) -> set[str]:
    """The arguments of which each process has some rows; all have the whole of the others."""
    whole = {"proxies", "reference", "reference_labels", *case.learned}
    if case.anchors == "proxies":
        whole.add("weight")
    return {*data.rows, *data.others} - whole


def part(case: Case, data: Data, sizes: Sequence[int], rank: int) -> Data:
    """The data of one process."""
    names, n = split_names(case, data), sum(sizes)

    def cut(name: str, value: Tensor) -> Tensor:
        if name not in names:
            return value
        if len(value) == n:
            return value[parts(sizes)[rank]]
        return value.tensor_split(len(sizes))[rank]  # shared hard negatives, some from each

    rows = {name: cut(name, value) for name, value in data.rows.items()}
    return Data(rows, {name: cut(name, value) for name, value in data.others.items()})


def weights_of(value: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)


def derived(case: Case, data: Data, reduction: Any, by: Tensor | None = None, **more: Any) -> Found:
    """The loss and its gradients; of many losses, with unequal weights."""
    leaves = {name: a.detach().clone().requires_grad_() for name, a in data.rows.items()}
    value = case.run(data.at(**leaves), reduction, **more)
    if value.ndim:
        (value * (weights_of(value) if by is None else by)).sum().backward()
    else:
        value.backward()
    zero = torch.zeros_like
    gradients = {k: zero(a) if a.grad is None else a.grad for k, a in leaves.items()}
    return Found(value.detach(), gradients)


def on_processes(
    names: Sequence[str],
    reductions: Sequence[Any],
    dtype: torch.dtype,
    how: dict[str, Any],
    tile: tuple[int, int] | None,
) -> dict[tuple[str, Any], Found]:
    """What this process finds of every case, at every reduction."""
    with nullcontext() if tile is None else tile_shape(*tile):
        return with_group(names, reductions, dtype, over("world", **how))


def with_group(
    names: Sequence[str], reductions: Sequence[Any], dtype: torch.dtype, group: Any, d: int = 4
) -> dict[tuple[str, Any], Found]:
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes, found = SIZES[world], {}
    for name in names:
        case = by_name(name)
        data = drawn(case, dtype, d)
        for reduction in reductions:
            by = None
            if reduction == "none":
                by = weights_of(torch.empty(case.outputs(sum(sizes)), dtype=torch.float64))
                by = by if case.anchors == "proxies" else by[parts(sizes)[rank]]
            mine = part(case, data, sizes, rank)
            found[name, reduction] = derived(case, mine, reduction, by, group=group)
    return found


def _more(name: str, function: Callable[..., Tensor], **hyper: Any) -> Case:
    """A case without an oracle: here one process is the oracle of several."""
    fields = {k: hyper.pop(k) for k in list(hyper) if k in Case.__dataclass_fields__}
    return Case(name, function, "batch", function, function, hyper, **fields)


def nearest_negative(tile: nearfar.Tile) -> tuple[Tensor, Tensor]:
    """A rule of a user's own: the hinge of the nearest negative."""
    nearest = tile.closeness.masked_fill(~tile.negative, inf).amin(1)
    counts = tile.negative.any(1)
    return (2 - nearest.where(counts, 0)).relu(), counts


def squared(d: Tensor) -> Tensor:
    return d.square()


def hinge(d: Tensor) -> Tensor:
    return (3 - d).relu()


def scaled_hinge(d: Tensor, by: Tensor) -> Tensor:
    return by * (3 - d).relu()


def scaled_square(d: Tensor, by: Tensor) -> Tensor:
    return d.square() / by


def own(x: Tensor, labels: Tensor, by: Tensor | None = None, **how: Any) -> Tensor:
    """`batch_loss` with the rule among the keywords."""
    learned = () if by is None else (by,)
    return nearfar.batch_loss(how.pop("rule"), x, labels, learned=learned, **how)


def drawn_triplets(x: Tensor, labels: Tensor, **how: Any) -> Tensor:
    chance = torch.Generator().manual_seed(7)
    return nearfar.batch_triplet_loss(x, labels, generator=chance, **how)


triplet, quadruplet = nearfar.batch_triplet_loss, nearfar.batch_quadruplet_loss
pairs, mean = nearfar.PairRule(squared, hinge), nearfar.PairRule(squared, hinge, balanced=False)
learned = nearfar.PairRule(scaled_square, scaled_hinge)
MORE = [
    *(_more(f"triplet-{d}", triplet, distance=d) for d in ("euclidean", "cosine", "snr")),
    _more("triplet-smooth", triplet, margin=0.0, smooth=True),
    _more("triplet-swap", triplet, swap=True),
    _more("triplet-weighted", triplet, weighted=True),
    _more("triplet-multi", triplet, multi=True),
    _more("triplet-reference", triplet, reference="self"),
    *(
        _more(f"triplet-{how}", triplet, select=how)
        for how in ("hard", "semihard", "easy_positive")
    ),
    _more("triplet-drawn", drawn_triplets, n_per_anchor=3),
    _more("triplet-by-weight", drawn_triplets, select="distance_weighted"),
    _more("quadruplet", quadruplet),
    _more("quadruplet-hard", quadruplet, select="hard"),
    _more("quadruplet-weighted", quadruplet, weighted=True, distance="sqeuclidean"),
    _more("n_pair", nearfar.n_pair_loss),
    _more("n_pair-weighted", nearfar.n_pair_loss, weighted=True, similarity="sqeuclidean"),
    _more("overlap", nearfar.batch_contrastive_loss, margin=9.0, select="hard"),
    _more("rule", own, rule=nearest_negative, distance="euclidean"),
    _more("rule-pairs", own, rule=pairs, distance="euclidean", weighted=True),
    _more("rule-mean", own, rule=mean, distance="manhattan", reference="set"),
    _more("rule-learned", own, rule=learned, distance="euclidean", by=2.0, learned=("by",)),
]
EVERY = {case.name: case for case in [*batch_cases.CASES, *MORE]}


def by_name(name: str) -> Case:
    return EVERY[name]


def drawn(case: Case, dtype: torch.dtype, d: int = 4) -> Data:
    return case.draw(12, d).to(dtype)


def joined(
    case: Case, data: Data, found: Sequence[Found], reduction: Any, replicas: str = "averaged"
) -> Found:
    """What the processes found, as one process would have: of rows, all of them in order.

    What all have whole must be the same on all, so that a trainer's mean leaves it as it is; that
    of rows must be as many times as large as there are processes.
    """
    split, first = split_names(case, data), found[0]
    each = reduction == "none" and case.anchors != "proxies"
    of_rows, of_whole = (len(found), 1) if replicas == "averaged" else (1, 1 / len(found))
    if each:  # the trainer derives the mean over processes of what each makes of its losses
        of_rows, of_whole = 1, 1 / len(found)
    value = torch.cat([one.value for one in found]) if each else first.value
    gradients = {}
    for name in first.gradients:
        of_each = [one.gradients[name] for one in found]
        if name in split:
            gradients[name] = torch.cat(of_each) / of_rows
        else:
            assert all(torch.equal(other, of_each[0]) for other in of_each), name
            gradients[name] = of_each[0] / of_whole
    if not each:
        assert all(torch.equal(one.value, value) for one in found)
    return Found(value, gradients)
