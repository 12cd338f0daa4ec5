"""Any loss of nearfar as a loss of sentence-transformers."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearfar.adapters.sentence_transformers.arguments import Told, called, told_by, wanted_by
from nearfar.adapters.sentence_transformers.columns import (
    embedded,
    embedded_in_chunks,
    rows_of,
    text_ids,
)
from nearfar.inputs import between, positive_integer, readable, switch
from nearfar.losses.base import LossModule, ProxyLossModule
from nearfar.losses.batch import item_ids


class Loss(nn.Module):
    """A loss of nearfar for `SentenceTransformerTrainer`.

    The columns of the dataset, in their order, and its label column go to the loss by the kind of
    data that it takes:

    - `InfoNCELoss`, `CLIPLoss`, `SigLIPLoss`: anchor, positive. Further columns are negatives for
      `InfoNCELoss`, and each is one for every anchor, as in `MultipleNegativesRankingLoss`.
    - `TripletLoss`: anchor, positive, negative; `QuadrupletLoss`: and a second negative.
    - `ContrastiveLoss`, `CosineLoss`: two texts and a label: bool, True = similar; or numbers from
      0 to 1, degrees of similarity, for which the loss is made with `similar_label`.
    - losses of a batch and losses of proxies: one text and a class.

    **Texts of one item.** With two towers, the positive of another anchor may be right for this one
    too. If an anchor, a positive or an id of one row is also one of the other's, then the positive
    of neither is a negative of the other. A further negative is left out for the rows that have it
    as anchor or positive. Equal embeddings never count as equal.

    Args:
        model: the `SentenceTransformer`, or a module that returns a dict with "sentence_embedding".
        loss: a module of nearfar, such as `nearfar.InfoNCELoss(temperature=0.05)`. Numbers that it
            learns are trained by the trainer, and are in no checkpoint of the model.
        ids: the label column holds the item of each row, or a list of several ids, of which two
            rows of one item have one in common. Only for losses of two towers.
        equal_texts: with two towers, equal texts are one item. False: only ids say what is.
        matryoshka_dims: lengths to which embeddings are cut, and then scaled to length 1. The loss
            is the sum of those of all lengths. None: embeddings are not cut.
        matryoshka_weights: of each length in the sum; None: 1 each.
        cached: rows of a chunk. Texts are encoded in chunks, and chunk by chunk once more in the
            backward, so that the activations of one chunk are held and not those of the batch. The
            gradients are the same. None: the batch is encoded at once.

    Attributes:
        model: as given; the trainer puts in its place what it has wrapped around it.
        criterion: the loss of nearfar.

    Raises:
        TypeError: `loss` is not a module of nearfar that takes embeddings; `model` is a name, or
            gives no embeddings, as a `CrossEncoder`.
        ValueError: options that do not fit; at the first batch, columns or labels that the loss
            does not take; on the CPU, a learned temperature or scale that is not above 0.

    >>> import nearfar, torch
    >>> loss = Loss(torch.nn.Identity(), nearfar.InfoNCELoss(temperature=0.5))
    >>> loss.compute_loss_from_embeddings([torch.eye(3), torch.eye(3)])
    tensor(0.2395)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossModule,
        *,
        ids: bool = False,
        equal_texts: bool = True,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        cached: int | None = None,
    ) -> None:
        super().__init__()
        _check_model(model)
        self._wanted = wanted_by(loss, ids=switch("ids", ids))
        if getattr(loss, "reduction", None) == "none":
            raise ValueError('the trainer wants one number: make the loss with reduction="mean".')
        if cached is not None:
            positive_integer("cached", cached)
        self.model, self.criterion, self.cached = model, loss, cached
        self.ids, self.equal_texts = ids, switch("equal_texts", equal_texts)
        self.matryoshka = _matryoshka(model, loss, matryoshka_dims, matryoshka_weights)

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the backward encodes again, which wrappers of losses have to know."""
        return self.cached is not None

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, as the trainer calls it.

        Args:
            sentence_features: of each column, what `model.preprocess` makes of its texts.
            labels: of the label column.

        Returns:
            A scalar; with `matryoshka_dims`, one for each length, whose sum the trainer takes.
        """
        columns = list(sentence_features)
        self._wanted.check(len(columns), labels)
        compared = self.equal_texts and self._wanted.of_towers
        texts = [text_ids(column) for column in columns] if compared else []
        told = self._told(labels, texts, rows_of(columns[0]) if self.ids else 0)
        if self.cached is None:
            embeddings = embedded(self.model, columns)
        else:
            embeddings = embedded_in_chunks(self.model, columns, self.cached)
        return self._at_all_lengths(embeddings, labels, told)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The loss of embedded columns, whose texts are not known: only ids tell equal items.

        Args:
            embeddings: (n, d) of each column.
            labels: of the label column.
        """
        self._wanted.check(len(embeddings), labels)
        return self._at_all_lengths(embeddings, labels, self._told(labels, [], len(embeddings[0])))

    def _told(self, labels: Tensor | None, texts: Sequence[Tensor | None], rows: int) -> Told:
        ids = None
        if self.ids and labels is not None:  # checked before they are joined with those of texts
            ids = item_ids("the label column", labels, torch.empty(rows, device=labels.device))
        return told_by(ids, texts, getattr(self.criterion, "group", None))

    def _at_all_lengths(
        self, embeddings: Sequence[Tensor], labels: Tensor | None, told: Told
    ) -> Tensor | dict[str, Tensor]:
        _check_learned(self.criterion)
        if not self.matryoshka:
            return called(self.criterion, self._wanted, embeddings, labels, told)
        losses = {}
        for dim, weight in self.matryoshka.items():
            cut = [normalize(_first(x, dim), dim=1) for x in embeddings]
            value = called(self.criterion, self._wanted, cut, labels, told)
            losses[f"loss_{dim}"] = weight * value
        return losses

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that a model card lists."""
        towers = {"ids": self.ids, "equal_texts": self.equal_texts}
        found = {"loss": repr(self.criterion), **(towers if self._wanted.of_towers else {})}
        if self.matryoshka:
            found["matryoshka_dims"] = list(self.matryoshka)
            found["matryoshka_weights"] = list(self.matryoshka.values())
        return found if self.cached is None else {**found, "cached": self.cached}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that the docstring of the loss names."""
        function = self.criterion.loss
        text = inspect.getdoc(function) or ""
        source = re.search(r"^Sources?: (.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        note = " ".join(source[1].split()).replace(" & ", " and ") if source else "See nearfar."
        return f"\n@misc{{{function.__name__},\n    note={{{note}}},\n}}\n"


def _check_model(model: object) -> None:
    wanted = "model must give an embedding of each text, as a SentenceTransformer does"
    if isinstance(model, str):
        raise TypeError(f"{wanted}: pass SentenceTransformer({model!r}).")
    if not isinstance(model, nn.Module) or isinstance(model, CrossEncoder | MultiVectorEncoder):
        raise TypeError(f"{wanted}; got {type(model).__name__}.")


def _check_learned(loss: LossModule) -> None:
    """Refuse what has been trained out of range, where reading it stalls no accelerator.

    The loss would be NaN, which the trainer logs as 0.
    """
    for name in ("temperature", "scale"):
        value = getattr(loss, name, None)
        if isinstance(value, Tensor) and readable(value) and not (value > 0).all():
            raise ValueError(
                f"{name} must be above 0, and is {value.tolist()} now: where training has made it "
                "so, give it a smaller learning rate, with the training argument "
                f"learning_rate_mapping={{'criterion.{name}': 1e-4}}."
            )


def _matryoshka(
    model: nn.Module,
    loss: LossModule,
    dims: Sequence[int] | None,
    weights: Sequence[float] | None,
) -> Mapping[int, float]:
    """The weight of each length; {}: embeddings are not cut."""
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights weigh matryoshka_dims, which are not given.")
        return {}
    if isinstance(loss, ProxyLossModule):
        raise ValueError(
            f"matryoshka_dims cut embeddings, and the proxies of {type(loss).__name__} are not "
            "cut: take a loss of a batch, such as nearfar.SupConLoss."
        )
    if not isinstance(dims, Sequence):
        raise TypeError(f"matryoshka_dims must be a list of lengths, such as [{dims}].")
    for dim in dims:
        positive_integer("matryoshka_dims", dim)
    length: Callable[[], int | None] = getattr(model, "get_embedding_dimension", lambda: None)
    known = length()
    if not dims or len(set(dims)) < len(dims) or (known and max(dims) > known):
        most = f", up to the {known} of the model" if known else ""
        raise ValueError(
            f"matryoshka_dims must be lengths of embeddings, each once{most}; got {list(dims)}."
        )
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims):
        raise ValueError(
            f"matryoshka_weights must be one for each of {len(dims)} lengths, got {len(weights)}."
        )
    for weight in weights:
        between("matryoshka_weights", weight, 0, inf)
    return dict(zip(dims, weights, strict=True))


def _first(x: Tensor, dim: int) -> Tensor:
    if dim > x.shape[1]:
        raise ValueError(f"matryoshka_dims holds {dim}, and embeddings have length {x.shape[1]}.")
    return x[:, :dim]
