"""Which columns and labels a loss wants, and how it is called with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nearfar.engine.meeting import Group, Over, processes_of
from nearfar.engine.processes import Split
from nearfar.engine.relation import repeat_in
from nearfar.losses.base import LossModule
from nearfar.registry import LOSSES

Labels = Literal["none", "ids", "needed", "optional"]
_BY_FUNCTION = {loss.function: loss for loss in LOSSES}
_ROLES = ("anchor", "positive", "negative", "negative2")
_PAIR = ("text", "other text")


@dataclass(frozen=True)
class Wanted:
    """What a loss takes of a batch.

    Attributes:
        loss: its name.
        roles: what the columns are, in their order.
        more: whether further columns of negatives may follow.
        labels: whether there is a label column, and if it holds ids of items.
    """

    loss: str
    roles: tuple[str, ...]
    labels: Labels
    more: bool = False

    @property
    def of_towers(self) -> bool:
        """Whether each anchor is compared with the positives of others."""
        return self.labels in ("none", "ids") and len(self.roles) == 2

    def check(self, columns: int, labels: Tensor | None) -> None:
        """Refuse a batch that does not fit, and say which loss or change would."""
        fewest = len(self.roles)
        fits = columns == fewest or (self.more and columns > fewest)
        if not fits:
            self._refuse(columns, labels, _instead(columns, labels))
        if labels is None and self.labels in ("ids", "needed"):
            name = "an integer column" if self.labels == "ids" else "a column"
            self._refuse(columns, labels, f"Call {name} of the dataset 'label'.")
        if labels is not None and self.labels == "ids" and not _whole(labels.dtype):
            fix = "Number them, with dataset.class_encode_column."
            self._refuse(columns, labels, f"Ids of items are integers. {fix}")
        if labels is not None and self.labels == "none":
            fix = "Leave it out with dataset.remove_columns."
            if self.of_towers:
                fix = (
                    "If it says which item a row is, pass ids=True to Loss; if it says how similar "
                    "the columns are, take nearfar.ContrastiveLoss or nearfar.CosineLoss; else "
                    "leave it out with dataset.remove_columns."
                )
            self._refuse(columns, labels, fix)

    def _refuse(self, columns: int, labels: Tensor | None, fix: str) -> None:
        more = " and any number of columns of negatives" if self.more else ""
        label = {
            "none": "no label column",
            "ids": "a label column of ids",
            "needed": "a label column",
            "optional": "a label column or none",
        }[self.labels]
        given = "no label column" if labels is None else f"a label column of {labels.dtype}"
        raise ValueError(
            f"{self.loss} takes {_counted(len(self.roles))} ({', '.join(self.roles)}){more}, and "
            f"{label}; the batch has {_counted(columns)}, and {given}. {fix}"
        )


def _whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _counted(columns: int) -> str:
    return f"{columns} column{'s' if columns != 1 else ''} of inputs"


def _instead(columns: int, labels: Tensor | None) -> str:
    """What to do about a number of columns that does not fit."""
    fitting = {
        (1, True): "nearfar.SupConLoss or another loss of a batch",
        (2, True): "nearfar.ContrastiveLoss or nearfar.CosineLoss",
        (2, False): "nearfar.InfoNCELoss or nearfar.CLIPLoss(scale=20.0)",
        (3, False): "nearfar.InfoNCELoss or nearfar.TripletLoss",
        (4, False): "nearfar.InfoNCELoss or nearfar.QuadrupletLoss",
    }.get((columns, labels is not None))
    take = f"take {fitting}, or " if fitting else ""
    fix = f"{take}choose columns in their order with dataset.select_columns."
    return fix[0].upper() + fix[1:]


def wanted_by(loss: nn.Module, *, ids: bool) -> Wanted:
    """What a loss takes.

    Raises:
        TypeError: `loss` is not a module of nearfar that takes embeddings.
        ValueError: ids for a loss that takes none.
    """
    known = _BY_FUNCTION.get(loss.loss.__name__) if isinstance(loss, LossModule) else None
    if known is None or known.function in ("contrastive_loss_from_distance", "softmax_loss"):
        raise TypeError(
            "loss must be a module of nearfar that takes embeddings, such as nearfar.InfoNCELoss() "
            f"or nearfar.SupConLoss(); got {loss!r}."
        )
    name = type(loss).__name__
    if known.data == "towers":
        more = known.function == "info_nce_loss"
        return Wanted(name, _ROLES[:2], "ids" if ids else "none", more)
    if ids:
        raise ValueError(
            f"ids=True is for losses of two towers, such as nearfar.InfoNCELoss; {name} goes by "
            "its columns or labels alone."
        )
    if known.data != "rows":
        return Wanted(name, ("text",), "needed")
    return {
        "contrastive_loss": Wanted(name, _PAIR, "needed"),
        "cosine_loss": Wanted(name, _PAIR, "optional"),
        "triplet_loss": Wanted(name, _ROLES[:3], "none"),
        "quadruplet_loss": Wanted(name, _ROLES, "none"),
    }[known.function]


@dataclass(frozen=True)
class Told:
    """Which rows are of one item.

    Attributes:
        ids: (n, k) of each row, see `nearfar.info_nce_loss`; None: all rows are different items.
        hard_ids: (m,) of the negatives.
    """

    ids: Tensor | None = None
    hard_ids: Tensor | None = None


def told_by(ids: Tensor | None, texts: Sequence[Tensor | None], group: Group | None = None) -> Told:
    """What ids and texts say.

    Mostly they say that all rows differ. This is found out at once, before the encoder runs: then
    an accelerator waits for little, and compares the rows as if there were no ids.

    Args:
        ids: (n, k) of the rows; None: not given.
        texts: (n,) ids of the texts of each column, or None for a column; []: not compared.
        group: the processes that have the rows of the batch.
    """
    ids = _side_by_side([ids, *texts[:2]])
    if ids is None:
        return Told()
    unknown = torch.full(ids.shape[:1], -1, device=ids.device)
    hard = [unknown if text is None else text for text in texts[2:]]
    hard_ids = torch.cat(hard) if hard else None
    every = ids
    if hard_ids is not None:
        every = torch.cat([ids, hard_ids[:, None].expand(-1, ids.shape[1])])
    if group is not None:
        processes = processes_of(group if isinstance(group, Over) else Over(group))
        sizes = [size for (size,) in processes.tell([len(every)])]
        every = Split(processes, sizes).gather(every)
    return Told(ids, hard_ids) if repeat_in(every) else Told()


def called(
    loss: Callable[..., Tensor],
    wanted: Wanted,
    embeddings: Sequence[Tensor],
    labels: Tensor | None,
    told: Told,
) -> Tensor:
    """The loss of a batch that fits.

    Args:
        loss: a module of nearfar.
        wanted: what it takes.
        embeddings: (n, d) of each column.
        labels: of the label column.
        told: which rows are of one item, for losses of two towers.
    """
    if not wanted.of_towers:
        given = embeddings if labels is None else [*embeddings, labels]
        return loss(*given)
    anchor, positive, *negatives = embeddings
    if not negatives:
        return loss(anchor, positive, ids=told.ids)
    of_all = {"hard_negatives": torch.cat(negatives), "hard_ids": told.hard_ids}
    return loss(anchor, positive, ids=told.ids, **of_all)


def _side_by_side(ids: Sequence[Tensor | None]) -> Tensor | None:
    """(n, k) all ids of each row; None: there are none."""
    given = [x[:, None] if x.ndim == 1 else x for x in ids if x is not None]
    return torch.cat(given, 1) if given else None
