"""Executors for GPUs, by Triton kernels; imported only where one is used.

Which comparisons they take is written here and nowhere else: `takes`. All others run in plain torch
on the same device.
"""

import torch

from nearfar.engine.closeness import Closeness
from nearfar.engine.observe import force_visitors
from nearfar.engine.relation import Relation
from nearfar.engine.step import Request
from nearfar.engine.where import kernels_run_on

# Programs that own rows measure them again for each 128 of their numbers: distances of longer rows
# are measured sooner in plain torch.
_LONGEST = 512


def takes(request: Request, closeness: Closeness, relation: Relation) -> bool:
    """Whether kernels run a comparison.

    They take rows of float32 and less, on the devices of `kernels_run_on`; inner products;
    Euclidean and cosine distances of rows of up to 512 numbers; labels of every kind. They do not
    take float64, listed pairs, ids of items, other distances, columns that travel between
    processes, or a loss that somebody observes.
    """
    if closeness.kernel != "product" and request.a.shape[1] > _LONGEST:
        return False
    return (
        request.ring is None
        and kernels_run_on(request.a.device)
        and request.a.dtype is torch.float32
        and closeness.kernel is not None
        and relation.listed is None
        and relation.items is None
        and not force_visitors()
    )


def takes_every_tuple(request: Request, closeness: Closeness, relation: Relation) -> bool:
    """Whether kernels run a loss over all triplets or quadruplets: only by class ids."""
    labels = relation.row_labels
    by_class = labels is not None and labels.ndim == 1 and relation.n > 0 and relation.m > 0
    return by_class and takes(request, closeness, relation)
