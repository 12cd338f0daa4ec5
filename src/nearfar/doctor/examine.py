"""Evidence from embeddings, a batch or a split."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nearfar.distance import Distance, length, unit
from nearfar.doctor.evidence import Apart, Commonest, Evidence, Side, Spectrum
from nearfar.doctor.finding import Diagnosis
from nearfar.doctor.pushes import watch_pushes
from nearfar.doctor.rules import diagnose
from nearfar.inputs import ArrayLike, batch, tensor
from nearfar.labels import batch_labels, share_label
from nearfar.losses.shell import unwrap
from nearfar.relation import within

ROWS = 1024  # as many are compared with each other; of more, whole classes are drawn by seed


def examine(
    x: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    distance: Distance | None = None,
    **hyperparameters: Any,
) -> Diagnosis:
    r"""Look for faults in embeddings, or in a batch and its loss.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; None: rules about labels stay silent.
        loss: a whole-batch loss of nearfar's that takes (x, labels), as a function or module; with
            it, rules about the loss speak too.
        distance: what the embeddings are compared with; None: what the loss does, else "cosine".
        hyperparameters: of the loss.

    Returns:
        A `Diagnosis`: print it, or read its findings.

    Raises:
        TypeError: a loss that is not nearfar's, or hyperparameters without one.
        ValueError: shapes that do not fit, or as the loss itself.

    >>> import nearfar as nf
    >>> x, labels = torch.eye(64).repeat_interleave(2, 0), torch.arange(64).repeat_interleave(2)
    >>> print(examine(x, labels, loss=nf.batch_contrastive_loss, margin=1.0))
    ! dead-batch: No force acts in any of 128 rows: every gradient is 0. Similar rows coincide and
    dissimilar ones lie beyond the margin, or no row can move. Add dissimilar rows that differ and
    are near, or change the margin.

    Source: each rule names its own; see `docs/doctor.md`.
    """
    rows = batch("x", x).detach()
    known = None if labels is None else batch_labels(labels, like=rows)
    if loss is None:
        if hyperparameters:
            raise TypeError(f"{', '.join(hyperparameters)} belong to a loss: pass loss= too.")
        settings: dict[str, Any] = {"distance": distance or "cosine"}
        return diagnose(of_embeddings(rows, known, settings))
    if known is None:
        raise TypeError("labels must be given with loss: it is over labelled rows.")
    asked = {} if distance is None else {"distance": distance}
    function, settings = unwrap(loss, asked | hyperparameters)
    evidence = of_embeddings(rows, known, settings)
    with torch.no_grad():
        per_anchor = function(rows, known, **settings, reduction="none")
        value = float(function(rows, known, **settings))
        alike = rows[:1].expand_as(rows)
        collapsed = float(function(alike, known, **settings)) if len(rows) else 0.0
    broken = per_anchor.isnan() | ~rows.isfinite().all(1)
    return diagnose(
        replace(
            evidence,
            loss=function.__name__,
            broken=broken.cpu(),
            active=(per_anchor != 0).cpu(),
            value=value,
            collapsed_value=collapsed,
            held=_held(evidence, function, rows, known),
        )
    )


def _held(
    evidence: Evidence, loss: Callable[..., Tensor], x: Tensor, labels: Tensor
) -> Tensor | None:
    temperature = evidence.temperature()
    if temperature is None:
        return None
    x = x.clone().requires_grad_()  # a loss without gradient has no forces to show
    pushes = watch_pushes(lambda summed: summed(x, labels, **evidence.settings), loss)
    return pushes.held(temperature)


def examine_split(**sides: tuple[ArrayLike, ArrayLike]) -> Diagnosis:
    """Look for identities and items that two sides of a split share.

    Args:
        sides: each (x, identities): (n, ...) items as they were read, and (n,) whose they are.

    >>> print(examine_split(train=([[1.0], [2.0]], [0, 1]), test=([[3.0]], [1])))
    ! identity-leak: 1 of 1 identities of test are also in train ('1'). Figures measured there are
    those of a memory, and flatter. Split identities, never items or pairs.
    """
    found = {}
    for name, side in sides.items():
        if not isinstance(side, tuple | list) or len(side) != 2:
            raise TypeError(f"{name} must be a pair (x, identities), got {type(side).__name__}.")
        x, identities = side
        ids = tensor(f"{name} identities", identities).tolist()
        found[name] = Side(set(map(str, ids)), fingerprints(tensor(name, x)))
    return diagnose(Evidence(sides=found))


def of_embeddings(x: Tensor, labels: Tensor | None, settings: Mapping[str, Any]) -> Evidence:
    """What embeddings and their labels say by themselves.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids or (n, c) multi-labels.
        settings: what the loss is called with; its distance is measured.
    """
    broken = ~x.isfinite().all(1)
    evidence = Evidence(settings=settings, broken=broken.cpu())
    x = x.detach()[~broken].float()
    labels = None if labels is None else labels[~broken]
    if not len(x):
        return evidence
    evidence = replace(evidence, lengths=length(x).cpu(), spectrum=spectrum(x, labels))
    if labels is None:
        return evidence
    positives = within(labels, x).n_positives()
    chosen = _some(labels)
    x, few = x[chosen], labels[chosen]
    similar = share_label(few, few)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = _all_distances(x, settings.get("distance", "cosine"))
    apart = Apart(distances[similar & ~itself].cpu(), distances[~similar].cpu(), "distance", len(x))
    return replace(evidence, apart=apart, positives=positives.cpu(), commonest=_commonest(labels))


def fingerprints(x: Tensor) -> list[bytes]:
    """16 bytes for each item (n, ...), equal where all its bits are."""
    rows = x.detach().cpu().contiguous().flatten(1) if x.ndim > 1 else x.detach().cpu()[:, None]
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.numpy()]


def spectrum(x: Tensor, labels: Tensor | None) -> Spectrum:
    """In how many directions (n, d) embeddings spread."""
    n, d = x.shape
    n_classes = None
    if labels is not None and labels.ndim == 1:
        n_classes = len(labels.unique())  # type: ignore[no-untyped-call]
    centred = x.double() - x.double().mean(0)
    # The small one of X'X and XX' has the same spectrum, squared.
    square = centred.T @ centred if d < n else centred @ centred.T
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt().flip(0)
    # Squaring loses half of the digits: what is left of a direction below is rounding.
    values = values.masked_fill(values < 1e-7 * values[:1], 0)
    return Spectrum(values.cpu(), n, d, n_classes)


def _some(labels: Tensor) -> Tensor:
    """Rows to compare with each other: all, or those of classes drawn by seed until it is enough.

    Drawing rows one by one would leave hardly a similar pair.
    """
    generator = torch.Generator().manual_seed(0)
    n = len(labels)
    if n <= ROWS or labels.ndim == 2:
        return torch.randperm(n, generator=generator)[:ROWS].to(labels.device)
    classes, index = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    rank = torch.randperm(len(classes), generator=generator)[index.cpu()]
    order, sizes = rank.argsort(stable=True), rank.bincount()
    place = torch.arange(n) - (sizes.cumsum(0) - sizes)[rank[order]]  # within its class
    # At most 32 of a class, or a frequent one would be all there is.
    return order[place < 32][:ROWS].to(labels.device)


def _all_distances(x: Tensor, distance: Distance) -> Tensor:
    """(n, n)."""
    x = unit(x) if distance == "cosine" else x
    x = x - x.mean(0)  # or a common offset would take the digits of the differences
    euclidean = torch.cdist(x, x)
    if distance == "euclidean":
        return euclidean
    return euclidean.square() / (2 if distance == "cosine" else 1)


def _commonest(labels: Tensor) -> Commonest | None:
    if labels.ndim == 2:
        return None
    names, counts = labels.unique(return_counts=True)  # type: ignore[no-untyped-call]
    most = int(counts.argmax())
    return Commonest(f"class {int(names[most])}", int(counts[most]), len(labels))
