"""Rows to compare a batch with, instead of the batch itself."""

from dataclasses import dataclass
from typing import Protocol

from nearfar.inputs import ArrayLike


@dataclass(frozen=True, eq=False)
class Reference:
    r"""Embeddings that a batch is compared with, and their labels.

    A loss that takes `reference=` compares each row of the batch with these rows instead of the
    other rows of the batch: with the embeddings of earlier batches, with those of a slowly moving
    copy of the network, or with a gallery. Rows that share a label are similar.

    An item is never compared with itself. If the reference also holds rows of the batch, pass their
    indices as `own`; rows of equal values are not assumed to be the same item.

    Args:
        x: (m, d) embeddings, of the same width and on the same device as the batch. They get a
            gradient if they require one.
        labels: (m,) class ids, or (m, c) bool multi-labels, of the same kind as the labels of the
            batch. None only if the batch has no labels either, as in `mine.hard_negatives`.
        own: (n,) integers, which row of the reference is row i of the batch itself, -1 for none.
            None: the reference holds no row of the batch.

    >>> import torch
    >>> from nearfar import sup_con_loss
    >>> x = torch.tensor([[1.0, 0], [0.6, 0.8]])
    >>> earlier = torch.tensor([[0.8, 0.6], [0, 1], [-1, 0]])
    >>> sup_con_loss(x, [0, 1], reference=Reference(earlier, [0, 1, 1]), temperature=0.5)
    tensor(1.2488)
    >>> both = Reference(torch.cat([x, earlier]), [0, 1, 0, 1, 1], own=[0, 1])
    >>> sup_con_loss(x, [0, 1], reference=both, temperature=0.5)
    tensor(1.5878)
    """

    x: ArrayLike
    labels: ArrayLike | None
    own: ArrayLike | None = None


class ReferenceLike(Protocol):
    """What losses and miners read of a `Reference` or a `MemoryBank`."""

    @property
    def x(self) -> ArrayLike: ...
    @property
    def labels(self) -> ArrayLike | None: ...
    @property
    def own(self) -> ArrayLike | None: ...


def check_reference(reference: object) -> None:
    """Refuse anything without rows and labels, such as bare embeddings."""
    if not all(hasattr(reference, name) for name in ("x", "labels", "own")):
        raise TypeError(
            "reference must hold rows and their labels: pass "
            f"reference=nearfar.Reference(x, labels); got {type(reference).__name__}."
        )
