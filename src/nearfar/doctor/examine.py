"""Evidence from embeddings, a batch or a split."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from nearfar.distance import (
    Distance,
    EuclideanDistance,
    check_distance,
    length,
    scaled,
    unit,
)
from nearfar.doctor.evidence import Apart, Commonest, Evidence, Matches, Side, Spectrum
from nearfar.doctor.finding import Diagnosis
from nearfar.doctor.pushes import watch_pushes
from nearfar.doctor.rules import diagnose
from nearfar.engine.closeness import by_distance
from nearfar.engine.norms import DistanceFunction, OfFunction
from nearfar.engine.relation import within
from nearfar.inputs import ArrayLike, batch, tensor
from nearfar.labels import batch_labels, share_label
from nearfar.losses.base import unwrap
from nearfar.losses.batch import as_towers
from nearfar.reference import Reference
from nearfar.registry import LOSSES
from nearfar.spectrum import effective_rank

ROWS = 1024  # compared with each other; if there are more, whole classes are drawn by seed
TOWERS = tuple(loss.function for loss in LOSSES if loss.takes("towers"))
OF_SPLITS = ("identity-leak", "duplicates-across-splits", "few-identities")  # rules about splits


def examine(
    x: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    distance: Distance | None = None,
    **hyperparameters: Any,
) -> Diagnosis:
    r"""Look for faults in embeddings, in a batch and its loss, or in two towers.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels. None: rules about labels are not
            checked. With a two-tower loss, the (n, d) embeddings of the second tower; row i matches
            row i of `x`.
        loss: if given, rules about the loss are checked too. A whole-batch loss of nearfar over
            (x, labels), or a two-tower loss (`clip_loss`, `siglip_loss`, `info_nce_loss`), as a
            function or module; or `nearfar.batch_loss`, with `rule` as a keyword. For other losses
            use `nearfar.explain`.
        distance: the distance between embeddings. None: that of the loss, or "cosine" without one.
        hyperparameters: of the loss.

    Returns:
        A `Diagnosis`: print it, or read its findings. It also lists the rules that could not be
        checked.

    Raises:
        TypeError: a loss that takes other data or is not nearfar's, or hyperparameters without a
            loss.
        ValueError: shapes that do not match, or any error of the loss itself.

    >>> import nearfar as nf
    >>> x, labels = torch.eye(64).repeat_interleave(2, 0), torch.arange(64).repeat_interleave(2)
    >>> found = examine(x, labels, loss=nf.batch_contrastive_loss, margin=1.0)
    >>> print(found.findings[0])
    dead-batch: No force acts in any of 128 rows: every gradient is 0. Similar rows coincide and
    dissimilar ones are beyond the margin, or no row can move. Add dissimilar rows that differ and
    are near, or change the margin.
    >>> image, text = torch.eye(16), torch.eye(16).roll(1, 0)
    >>> print(examine(image, text, loss=nf.clip_loss, scale=14).findings[0].seen)
    Rows are nearer to their match than to another row's match in 47% of comparisons; chance gives
    50 %. But 100% of the rows have a mutual nearest neighbour that is not their match.

    Source: each rule names its own; see `docs/doctor.md`.
    """
    if loss is None:
        if hyperparameters:
            raise TypeError(
                f"loss must be given with its hyperparameters ({', '.join(hyperparameters)})."
            )
        rows = batch("x", x).detach()
        known = None if labels is None else batch_labels(labels, like=rows)
        return diagnose(of_embeddings(rows, known, {"distance": distance or "cosine"}))
    asked = {} if distance is None else {"distance": distance}
    function, _, settings = unwrap(loss, (), asked | hyperparameters)
    takes = _data_of(function)
    if not examined(function) or settings.get("negatives") is not None:
        raise TypeError(
            f"examine takes losses over (x, labels), or over two towers that match row by row. For "
            f"{function.__name__} over ({', '.join(takes)}) use nearfar.explain."
        )
    if labels is None:
        second = "labels" if takes[1] == "labels" else "the second tower"
        raise TypeError(f"{second} must be given with loss: {function.__name__} needs both.")
    return diagnose(of_batch(function, (x, labels), settings))


def of_batch(
    function: Callable[..., Tensor], data: Sequence[ArrayLike], settings: Mapping[str, Any]
) -> Evidence:
    """Evidence from a batch and its loss.

    Args:
        function: a loss over (x, labels), or over two towers.
        data: its two arguments.
        settings: its other arguments.
    """
    if function.__name__ in TOWERS:
        both = as_towers(**dict(zip(_data_of(function), data[:2], strict=False)))
        rows, other = (tower.detach() for tower in both)
        evidence = of_towers(rows, other, settings, _data_of(function))
    else:
        rows = batch("x", data[0]).detach()
        other = batch_labels(data[1], like=rows)
        evidence = of_embeddings(rows, other, settings)
    assert evidence.broken is not None
    with torch.no_grad():
        per_anchor = function(rows, other, **settings, reduction="none")
        value = float(function(rows, other, **settings))
    return replace(
        evidence,
        loss=function.__name__,
        broken=evidence.broken | per_anchor.isnan().cpu(),
        active=(per_anchor != 0).cpu(),
        value=value,
        collapsed_value=_collapsed_value(function, rows, other, settings),
        held=_held(evidence, function, rows, other),
    )


def examined(function: Callable[..., Tensor]) -> bool:
    """Whether `of_batch` can examine a loss, by its arguments."""
    return function.__name__ in TOWERS or _data_of(function)[1:] == ["labels"]


def _data_of(function: Callable[..., Tensor]) -> list[str]:
    """The names of the data arguments of a loss."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _collapsed_value(
    function: Callable[..., Tensor], x: Tensor, other: Tensor, settings: Mapping[str, Any]
) -> float | None:
    """What the loss would be if all embeddings were the same."""
    whole = x[x.isfinite().all(1)][:1]
    if not len(whole):
        return None

    def alike(rows: ArrayLike) -> Tensor:
        return whole.expand_as(tensor("embeddings", rows))

    others: dict[str, Any] = {}  # rows that the loss takes by keyword
    if (reference := settings.get("reference")) is not None:
        others["reference"] = Reference(alike(reference.x), reference.labels, reference.own)
    if (hard := settings.get("hard_negatives")) is not None:
        others["hard_negatives"] = alike(hard)
    if function.__name__ in TOWERS:
        other = alike(other)
    with torch.no_grad():
        return float(function(alike(x), other, **{**settings, **others}))


def _held(
    evidence: Evidence, loss: Callable[..., Tensor], x: Tensor, other: Tensor
) -> Tensor | None:
    temperature = evidence.temperature()
    if temperature is None:
        return None
    x = x.clone().requires_grad_()  # a loss without gradient has no forces to show
    pushes = watch_pushes(lambda summed: summed(x, other, **evidence.settings), loss)
    return pushes.held(temperature)


def examine_split(**sides: tuple[ArrayLike, ArrayLike]) -> Diagnosis:
    """Look for identities and items that two sides of a split share, and for too few identities.

    Args:
        sides: for each side (x, identities): the (n, ...) items, and the (n,) identity of each.
            Name the side to learn from `train`.

    Raises:
        TypeError: a side that is not such a pair.
        ValueError: fewer than two sides.

    >>> items, ids = torch.arange(20.0)[:, None], torch.arange(20)
    >>> print(examine_split(train=(items, ids), test=([[30.0]], [1])))
    ! identity-leak: 1 of 1 identities of test are also in train ('1'). Figures measured there
    reward memorisation, and flatter the network. Split identities, never items or pairs.
    """
    if len(sides) < 2:
        raise ValueError(
            f"examine_split compares sides of a split: give at least two, as in train=(x, ids), "
            f"test=(x, ids); got {len(sides)}."
        )
    found = {}
    for name, side in sides.items():
        if not isinstance(side, tuple | list) or len(side) != 2:
            raise TypeError(f"{name} must be a pair (x, identities), got {type(side).__name__}.")
        x, identities = side
        ids = tensor(f"{name} identities", identities).tolist()
        found[name] = Side(set(map(str, ids)), fingerprints(tensor(name, x)))
    diagnosis = diagnose(Evidence(sides=found))
    # The other rules do not concern a split.
    asked = {what: names for what, names in diagnosis.not_asked.items() if names[0] in OF_SPLITS}
    return replace(diagnosis, not_asked=asked)


def of_embeddings(x: Tensor, labels: Tensor | None, settings: Mapping[str, Any]) -> Evidence:
    """Evidence from embeddings and their labels alone.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids or (n, c) multi-labels.
        settings: the arguments of the loss, whose distance is used.
    """
    broken = ~x.isfinite().all(1)
    evidence = Evidence(settings=settings, broken=broken.cpu())
    x = x.detach()[~broken].float()
    labels = None if labels is None else labels[~broken]
    if not len(x):
        return evidence
    evidence = replace(evidence, lengths=length(x).cpu(), spectrum=spectrum(x, labels))
    distance = settings.get("distance", "cosine")
    if "distance" in settings:  # without, these are cosines
        (x,) = scaled(distance, settings.get("normalize", False), x)
    if labels is None:
        return replace(evidence, spread={"": _spread(x, distance)})
    positives = within(labels, x).n_positives()
    chosen = _some(labels)
    x, few = x[chosen], labels[chosen]
    similar = share_label(few, few)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = _all_distances(x, distance)
    apart = Apart(distances[similar & ~itself].cpu(), distances[~similar].cpu(), "distance", len(x))
    return replace(evidence, apart=apart, positives=positives.cpu(), commonest=_commonest(labels))


def of_towers(x: Tensor, y: Tensor, settings: Mapping[str, Any], names: Sequence[str]) -> Evidence:
    """Evidence from two towers alone.

    Args:
        x: (n, d) embeddings of the first.
        y: (n, d) embeddings of the second; row i matches row i of `x`.
        settings: the arguments of the loss.
        names: the caller's names for the two.
    """
    broken = ~(x.isfinite().all(1) & y.isfinite().all(1))
    evidence = Evidence(settings=settings, broken=broken.cpu())
    x, y = x.detach()[~broken].float(), y.detach()[~broken].float()
    if not len(x):
        return evidence
    both = dict(zip(names, (x, y), strict=False))
    spectra = [replace(spectrum(rows, None), of=name) for name, rows in both.items()]
    return replace(
        evidence,
        lengths=length(torch.cat([x, y])).cpu(),
        spread={name: _spread(rows, "cosine") for name, rows in both.items()},
        spectrum=min(spectra, key=lambda found: effective_rank(found.values)),
        matches=_matches(x, y),
    )


def _spread(x: Tensor, distance: Distance | DistanceFunction) -> Tensor:
    """The distance between every two rows."""
    x = x[_drawn(len(x)).to(x.device)]
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return _all_distances(x, distance)[first, second].cpu()


def _matches(x: Tensor, y: Tensor) -> Matches:
    chosen = _drawn(len(x)).to(x.device)
    closeness = unit(x[chosen]) @ unit(y[chosen]).T  # (n, n), row i matches column i
    n = len(closeness)
    match = closeness.diagonal()[:, None]
    # Against the other rows' matches, in both directions; a tie counts half.
    nearer = sum(
        float((match > others).sum() + (match == others).sum() / 2) - n / 2
        for others in (closeness, closeness.T)
    )
    there, back = closeness.argmax(1), closeness.argmax(0)
    rows = torch.arange(n, device=x.device)
    elsewhere = (back[there] == rows) & (there != rows)
    return Matches(n, nearer / max(2 * n * (n - 1), 1), float(elsewhere.float().mean()))


def fingerprints(x: Tensor) -> list[bytes]:
    """16 bytes for each item (n, ...); equal for items that are equal bit for bit."""
    rows = x.detach().cpu().contiguous().flatten(1) if x.ndim > 1 else x.detach().cpu()[:, None]
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.numpy()]


def spectrum(x: Tensor, labels: Tensor | None) -> Spectrum:
    """The singular values of (n, d) embeddings, after the mean row is subtracted."""
    n, d = x.shape
    n_classes = None
    if labels is not None and labels.ndim == 1:
        n_classes = len(labels.unique())  # type: ignore[no-untyped-call]
    centred = x.double() - x.double().mean(0)
    # The smaller of X'X and XX' has the same spectrum, squared.
    square = centred.T @ centred if d < n else centred @ centred.T
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt().flip(0)
    # Squaring loses half of the digits: values below this are rounding errors.
    values = values.masked_fill(values < 1e-7 * values[:1], 0)
    return Spectrum(values.cpu(), n, d, n_classes)


def _some(labels: Tensor) -> Tensor:
    """Rows to compare with each other: all, or those of enough classes drawn by seed.

    Drawing rows one by one would leave hardly any similar pairs.
    """
    n = len(labels)
    if n <= ROWS or labels.ndim == 2:
        return _drawn(n).to(labels.device)
    generator = torch.Generator().manual_seed(0)
    classes, index = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    rank = torch.randperm(len(classes), generator=generator)[index.cpu()]
    order, sizes = rank.argsort(stable=True), rank.bincount()
    place = torch.arange(n) - (sizes.cumsum(0) - sizes)[rank[order]]  # within its class
    # At most 32 per class, so that a frequent class does not crowd out the others.
    return order[place < 32][:ROWS].to(labels.device)


def _drawn(n: int) -> Tensor:
    """Rows to compare with each other, drawn by seed if there are many."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:ROWS]


def _all_distances(x: Tensor, distance: Distance | DistanceFunction) -> Tensor:
    """(n, n); those of a row to itself have no meaning."""
    known = None if callable(distance) else check_distance(distance)
    if known not in get_args(EuclideanDistance):
        closeness = OfFunction(distance) if callable(distance) else by_distance(distance)
        rows, _ = closeness.prepare(x, None)
        return closeness.measure(rows, rows)[0]
    x = unit(x) if known == "cosine" else x
    x = x - x.mean(0)  # with a large common offset, the differences would lose precision
    euclidean = torch.cdist(x, x)
    if known == "euclidean":
        return euclidean
    return euclidean.square() / (2 if known == "cosine" else 1)


def _commonest(labels: Tensor) -> Commonest | None:
    if labels.ndim == 2:
        return None
    names, counts = labels.unique(return_counts=True)  # type: ignore[no-untyped-call]
    most = int(counts.argmax())
    return Commonest(f"class {int(names[most])}", int(counts[most]), len(labels))
