"""Any loss of nearfar as one of pytorch-metric-learning."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.adapters.pml.base import LossDict, WithoutReference, WithReference
from nearfar.adapters.pml.compared import Compared, Indices, triplets_of
from nearfar.adapters.pml.measures import Measure
from nearfar.adapters.pml.terms import already_reduced
from nearfar.extras import needs
from nearfar.losses.base import LossModule
from nearfar.losses.own import batch_loss, with_rule
from nearfar.registry import LOSSES

with needs("pml"):
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.utils import common_functions as c_f


def as_pml(loss: Callable[..., Tensor], **hyperparameters: Any) -> nn.Module:
    r"""A loss of nearfar, as trainers and wrappers of pytorch-metric-learning take it.

    It is called `loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`, has
    the distance, margins, defaults and reduction of nearfar, and goes into `CrossBatchMemory`,
    `MultipleLosses`, `SelfSupervisedLoss`, `DistributedLossWrapper` and their trainers.

    Args:
        loss: a module, or a function with its hyperparameters: of a batch with labels, such as
            `nearfar.SupConLoss()` or `nearfar.batch_loss`; or a module that holds proxies, such as
            `nearfar.ProxySoftmaxLoss(n_classes, dim)`.
        hyperparameters: of a function, its `reduction` too, unless it is "none".

    Returns:
        A `BaseMetricLossFunction` of theirs. What a miner found becomes the pairs of the loss, or
        the triplets of a loss that takes triplets.

    Raises:
        TypeError: a loss of other data, such as two towers or aligned rows; a class in place of a
            module; hyperparameters that the function does not take.
        ValueError: reduction="none".

    >>> import torch
    >>> import nearfar as nf
    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> as_pml(nf.BatchCosineLoss(margin=0.5))(x, labels)
    tensor(0.2500)
    >>> as_pml(nf.batch_triplet_loss, margin=0.5, reduction="active")(x, labels)
    tensor(0.2380)
    """
    module = isinstance(loss, LossModule)
    function = type(loss).loss if isinstance(loss, LossModule) else loss
    row = next((row for row in LOSSES if row.function == getattr(function, "__name__", "")), None)
    if function is batch_loss:
        _check_names(batch_loss, hyperparameters)
        return _OfBatch(with_rule, hyperparameters)
    if row is None or not (row.data == "batch" or (module and row.data == "proxies")):
        raise TypeError(_refusal(loss, None if row is None else row.data))
    if module and hyperparameters:
        raise TypeError(
            f"{type(loss).__name__} holds its hyperparameters: leave out "
            f"{', '.join(hyperparameters)}, or pass the function nearfar.{row.function}."
        )
    if not module:
        _check_names(loss, hyperparameters)
    kind = _OfProxies if row.data == "proxies" else _OfBatch
    return kind(loss, hyperparameters)


def _check_names(function: Callable[..., Tensor], hyperparameters: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(x=None, labels=None, **hyperparameters)
    except TypeError as error:
        raise TypeError(f"{function.__name__}: {error}.") from None


def _refusal(loss: object, data: str | None) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    if isinstance(loss, type) and issubclass(loss, LossModule):
        return f"you passed the class: make one, {name}(...)."
    if data == "proxies":
        return (
            f"{name} takes proxies, which a module holds: pass the module, such as "
            "nearfar.ProxySoftmaxLoss(n_classes, dim)."
        )
    takes = {
        "rows": "aligned rows, and no labels of a batch",
        "towers": "two towers, and no labels of a batch",
        None: "what nearfar does not know",
    }[data]
    return (
        "loss must be one of nearfar's that takes a batch with labels, such as "
        f"nearfar.SupConLoss(), nearfar.BatchContrastiveLoss() or nearfar.batch_loss; {name} takes "
        f"{takes}."
    )


class _Wrapped(BaseMetricLossFunction):
    """A loss with its hyperparameters; regularizers of embeddings are theirs."""

    def __init__(self, loss: Callable[..., Tensor], hyperparameters: dict[str, Any]) -> None:
        super().__init__()
        if hyperparameters.get("reduction", getattr(loss, "reduction", None)) == "none":
            raise ValueError(
                'reduction="none" gives one loss per row, but a loss of pytorch-metric-learning is '
                'one number: pass another, such as "mean".'
            )
        self.loss = loss
        self.hyperparameters = hyperparameters
        shown = batch_loss if loss is with_rule else loss  # its own settings have no names
        of_call = shown.forward if isinstance(shown, nn.Module) else shown
        self.takes = frozenset(inspect.signature(of_call).parameters)

    def extra_repr(self) -> str:
        shown = "" if isinstance(self.loss, nn.Module) else self.loss.__name__
        settings = [f"{name}={value!r}" for name, value in self.hyperparameters.items()]
        return ", ".join([*filter(None, [shown]), *settings])

    def _get_name(self) -> str:
        return "as_pml"


class _OfBatch(WithReference, _Wrapped):
    measure = Measure("euclidean", normalize=False, norm=None, cosine=False, shown="")

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        data: dict[str, Any] = {}
        if mined is not None:
            compared = compared.by_list_alone()
            if "triplets" in self.takes:
                data["triplets"] = triplets_of(mined, compared.x.device)
            elif self._needs("pairs", "indices_tuple"):
                data["pairs"] = compared.pairs(mined)
        if compared.others is not None and self._needs("reference", "ref_emb"):
            data["reference"] = compared.reference
        found = self.loss(compared.x, compared.labels, **data, **self.hyperparameters)
        return {"loss": already_reduced(found)}

    def _needs(self, keyword: str, given: str) -> bool:
        if keyword not in self.takes:
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise ValueError(f"{name} takes no {keyword}: leave {given} out.")
        return True


class _OfProxies(WithoutReference, _Wrapped):
    def of_rows(self, x: Tensor, labels: Tensor, mined: Indices) -> LossDict:
        c_f.indices_tuple_not_supported(mined)
        return {"loss": already_reduced(self.loss(x, labels))}


# Their wrappers know the losses that take a reference by the name of the class.
_OfBatch.__name__ = "ContrastiveLoss"
