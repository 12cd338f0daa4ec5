"""What the losses share.

The `forward` of theirs checks its arguments, regularizes and reduces; only `compute_loss` is new.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nearfar.adapters.pml.compared import Compared, Indices, Pairs
from nearfar.adapters.pml.inplace import InPlaceOfTheirs
from nearfar.adapters.pml.measures import Measure
from nearfar.adapters.pml.terms import (
    AnchorTerms,
    Each,
    LossInfo,
    TupleTerms,
    loss_info,
    reducer_of,
)
from nearfar.extras import needs
from nearfar.losses.per_pair import per_pair

with needs("pml"):
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.utils import common_functions as c_f
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

LossDict = dict[str, LossInfo]


class ByNearfar(InPlaceOfTheirs):
    """A loss of theirs."""

    divided = False  # whether the terms come with a divisor, which a DivisorReducer needs
    reducer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for reducer in _within(self.reducer):
            self.check_reducer(reducer)

    def check_reducer(self, reducer: Any) -> None:
        """Refuse a reducer that does not suit the terms of the loss.

        Raises:
            TypeError: it does not.
        """
        if isinstance(reducer, reducers.DivisorReducer) and not self.divided:
            raise TypeError(
                f"{type(self).__name__} has no divisor for a DivisorReducer, which is "
                "ProxyAnchorLoss's: take MeanReducer() or AvgNonZeroReducer()."
            )

    def reducer_of(self, part: str) -> Any:
        return reducer_of(self.reducer, part)


class WithReference:
    """A loss of a batch, whose rows may be compared with others."""

    measure: Measure

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        compared = Compared.of(embeddings, labels, ref_emb, ref_labels, self.measure)
        return self.of_compared(compared, indices_tuple)

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        """The parts of the loss; `mined` is what a miner found, None without one."""
        raise NotImplementedError


class WithoutReference:
    """A loss of a batch with labels and of nothing else."""

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> LossDict:
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        return self.of_rows(embeddings, labels, indices_tuple)

    def of_rows(self, x: Tensor, labels: Tensor, mined: Indices) -> LossDict:
        """The parts of the loss; `mined` is what a miner found, None without one."""
        raise NotImplementedError


class OfAnchors(WithReference, ByNearfar):
    """Losses of an anchor and all its pairs, of which each counts once however often it is mined.

    Attributes:
        loss: the loss of nearfar.
    """

    loss: ClassVar[Callable[..., Tensor]]

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        pairs = compared.pairs(mined, once=True)
        loss = partial(called, type(self).loss, compared, pairs, **self.settings())
        terms = AnchorTerms(loss, partial(len, compared.x), partial(every_row, loss))
        return {"loss": terms.info(self.reducer_of("loss"))}


class OfPositives(WithReference, ByNearfar):
    """Losses with a term for each positive pair, which sees the negatives of its anchor.

    Attributes:
        loss: the loss of nearfar.
    """

    loss: ClassVar[Callable[..., Tensor]]

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        pairs = compared.pairs(mined)
        loss = partial(called, type(self).loss, compared, pairs, **self.settings())
        terms = TupleTerms(
            loss,
            compared.positives if pairs is None else partial(of_anchors, pairs[0], compared.x),
            partial(each_pair, type(self).loss, self.settings(), compared, pairs, "pos"),
            pairs is not None,
        )
        return {"loss": terms.info(self.reducer_of("loss"), compared.labels)}


class HoldsProxies:
    """Comes before a loss of theirs that holds weights, `W` or `proxies`."""

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the weights to the device of the rows, and widen them; theirs also narrows them."""
        for weights in self._of_classes():
            wide = torch.promote_types(weights.dtype, dtype)
            if weights.device != device or weights.dtype != wide:
                weights.data = weights.data.to(device, wide)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(n, c) the logits of theirs, in the dtype of the weights."""
        found: Tensor = super().get_logits(self.as_wide(embeddings))  # type: ignore[misc]
        return found

    def as_wide(self, x: Tensor) -> Tensor:
        """Rows in the dtype of the weights, which are widened first where the rows are wider."""
        self.cast_types(x.dtype, x.device)
        (weights,) = self._of_classes()
        return x.to(weights.dtype)

    def _of_classes(self) -> list[nn.Parameter]:
        held = vars(self)["_parameters"]
        return [held[name] for name in ("W", "proxies") if name in held]


class AgainstProxies(WithoutReference, HoldsProxies, ByNearfar):
    """Losses of a row against the proxies of all classes; what was mined weighs the rows."""

    def each_row(self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices) -> LossInfo:
        """The losses of the rows, weighted."""
        weight = mined_weight(indices_tuple, labels, embeddings)
        loss = partial(self.against_proxies, embeddings, labels)
        if weight is None:
            terms = AnchorTerms(loss, partial(len, labels), partial(every_row, loss))
            return terms.info(self.reducer_of("loss"))
        return loss_info(*every_row(loss, weight=weight), "element")

    def against_proxies(self, x: Tensor, labels: Tensor, **how: Any) -> Tensor:
        """The loss of nearfar; `how` has a reduction and perhaps weights."""
        raise NotImplementedError


def called(
    loss: Callable[..., Tensor], compared: Compared, pairs: Pairs | None, **settings: Any
) -> Tensor:
    """A loss of nearfar over all pairs, or over those listed, whatever the labels say."""
    if pairs is not None:
        compared, settings = compared.by_list_alone(), {"pairs": pairs, **settings}
    if compared.reference is not None:
        settings["reference"] = compared.reference
    return loss(compared.x, compared.labels, **settings)


def every_row(loss: Callable[..., Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    """(n,) losses and (n,) rows."""
    losses = loss(reduction="none", **how)
    return losses, torch.arange(len(losses), device=losses.device)


def each_pair(
    loss: Callable[..., Tensor],
    settings: dict[str, Any],
    compared: Compared,
    pairs: Pairs | None,
    kind: str,
) -> Each:
    """The losses of the positive pairs or of the negative ones, "pos" or "neg", and the pairs."""
    listed = compared.every_pair() if pairs is None else pairs
    found: Any = called(partial(per_pair, loss, **settings), compared, listed)  # type: ignore[arg-type]
    losses, ends = (found.positive, listed[0]) if kind == "pos" else (found.negative, listed[1])
    return losses, tuple(ends.unbind(1)), f"{kind}_pair"


def of_anchors(listed: Tensor, x: Tensor) -> Tensor:
    """(n,) how many of some (k, 2) pairs or (k, 3) triplets each row is the anchor of."""
    return torch.bincount(listed[:, 0], minlength=len(x))


def mined_weight(
    indices_tuple: Indices, labels: Tensor, x: Tensor, *, anchors_alone: bool = False
) -> Tensor | None:
    """(n,) how often each row was mined, 1 for the most frequent; None: nothing was mined."""
    if indices_tuple is None:
        return None
    weight: Tensor = lmu.convert_to_weights(indices_tuple, labels, x.dtype, anchors_alone)
    return weight


def _within(reducer: Any) -> list[Any]:
    if isinstance(reducer, reducers.MultipleReducers):
        return [*reducer.reducers.values(), reducer.default_reducer]
    return [reducer]
