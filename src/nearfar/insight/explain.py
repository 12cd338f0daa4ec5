"""What a loss does to each row, in numbers and words."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from math import exp, inf, isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearfar.distance import length
from nearfar.doctor.evidence import Apart, Evidence
from nearfar.doctor.examine import examined, of_batch, of_embeddings
from nearfar.doctor.finding import Finding
from nearfar.doctor.pushes import FEWEST
from nearfar.doctor.rules import diagnose
from nearfar.engine.observe import Measured, watch
from nearfar.inputs import ArrayLike, batch, tensor
from nearfar.insight.forces import forces, way
from nearfar.labels import batch_labels
from nearfar.losses.base import unwrap
from nearfar.registry import find
from nearfar.tabulate import Table

if TYPE_CHECKING:
    from rich.console import Group

_SHOWN = 20  # rows that a printed table shows by default


@dataclass(frozen=True)
class Row:
    """One pair or tuple; for a whole batch, an anchor and another row that it acts on.

    Attributes:
        index: the row in the data; for a whole batch, the row of the anchor.
        label: "similar", "dissimilar" or a degree; None for tuples, whose roles imply it.
        measured: the distances or similarities that the loss sees, by name.
        loss: the loss of the row; None for a pair of a whole batch, where only anchors have one.
        forces: for each measured value, how hard the row is pulled together (> 0) or pushed apart
            (< 0): the derivative of its loss with respect to how far apart it is. 0 at distance 0,
            where no direction is defined.
        reading: the same in words.
        other: for a whole batch, the row that the anchor acts on.
    """

    index: int
    label: str | None
    measured: Mapping[str, float]
    loss: float | None
    forces: Mapping[str, float]
    reading: str
    other: int | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table, and renders in terminals and notebooks.

    Attributes:
        loss: the name of the loss.
        hyperparameters: what it was called with.
        rows: one `Row` per pair or tuple; for a whole batch, the strongest forces.
        n: how many rows (pairs, tuples, anchors) the loss is over.
        total: the sum of the losses.
        mean: their mean, which training minimises by default.
        active_share: share of the rows with a force of at least a millionth of the strongest;
            nothing is learned from the others.
        pull: the sum of all pulls.
        push: the sum of all pushes.
        findings: what looks wrong, with evidence and advice; empty if nothing does.
        limit: how many rows to print; `rows` has them all.
    """

    loss: str
    hyperparameters: Mapping[str, Any]
    rows: tuple[Row, ...]
    n: int
    total: float
    mean: float
    active_share: float
    pull: float
    push: float
    findings: tuple[Finding, ...]
    limit: int = _SHOWN

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN, which JSON lacks, becomes None."""
        plain = _without_nan(asdict(self))
        assert isinstance(plain, dict)
        del plain["limit"]  # concerns printing only
        return plain

    def __str__(self) -> str:
        found = [f"! {finding}" for finding in self.findings]
        return "\n".join([self._title(), "", self._table().plain(), *self._more(), *found])

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        found = [Text.assemble((f"! {f.name}: ", "bold yellow"), f.text) for f in self.findings]
        more = [Text(line, "dim") for line in self._more()]
        return Group(Text(self._title(), "bold"), self._table().rich(), *more, *found)

    def _repr_html_(self) -> str:
        found = [f"<li><b>{escape(f.name)}</b>: {escape(f.text)}</li>" for f in self.findings]
        more = "".join(f"<p>{escape(line)}</p>" for line in self._more())
        advice = f"<ul>{''.join(found)}</ul>" if found else ""
        return f"<p><b>{escape(self._title())}</b></p>{self._table().html()}{more}{advice}"

    def _title(self) -> str:
        settings = ", ".join(f"{k}={_setting(v)}" for k, v in self.hyperparameters.items())
        return (
            f"{self.loss}({settings})\n{self.n} rows, loss {self.mean:.4g} per row "
            f"(sum {self.total:.4g}), {self.active_share:.0%} active, "
            f"pull {self.pull:.4g}, push {self.push:.4g}"
        )

    def _table(self) -> Table:
        first = self.rows[0] if self.rows else Row(0, None, {}, 0.0, {}, "")
        labelled = () if first.label is None else ("label",)
        costs = () if first.loss is None else ("loss",)
        another = () if first.other is None else ("other",)
        header = ("row", *another, *labelled, *first.measured, *costs, "force", "reading")
        return Table(header, [_cells(row) for row in self.rows[: self.limit]])

    def _more(self) -> list[str]:
        hidden = len(self.rows) - self.limit
        return [f"... and {hidden} more rows; a larger limit shows them"] if hidden > 0 else []


def explain(loss: Callable[..., Tensor], *data: ArrayLike, **hyperparameters: Any) -> Explanation:
    r"""Show what a loss does to each row: its distances, its loss, its force, and why.

    The loss itself is run and differentiated, so what is shown is what trains. For row i with a
    distance :math:`d_i`, the force is :math:`\partial \ell_i / \partial d_i` (for a similarity, the
    negative of the derivative): above 0 it pulls together, below 0 it pushes apart.

    For a whole-batch loss, the strongest forces are shown; `nearfar.forces` has more.

    Args:
        loss: one of nearfar's losses, as a function or a module.
        data: the data arguments of the loss: embeddings, distances, labels.
        hyperparameters: its keyword arguments; those of a module are already set.

    Returns:
        An `Explanation`: print it, or read its rows, totals and findings.

    Raises:
        TypeError: `loss` is not one of nearfar's losses.
        ValueError: any error of the loss itself.

    >>> from nearfar import contrastive_loss_from_distance
    >>> print(explain(contrastive_loss_from_distance, [0.5, 0.3, 1.5], [True, False, False]))
    contrastive_loss_from_distance(margin=1)
    3 rows, loss 0.2467 per row (sum 0.74), 67% active, pull 1, push 1.4
    <BLANKLINE>
    row  label       distance    loss  force     reading
    ---  ----------  --------  ------  --------  ----------------------------------
      0  similar       0.5000  0.2500  pull 1    similar but apart: pulled together
      1  dissimilar    0.3000  0.4900  push 1.4  too close: pushed apart
      2  dissimilar    1.5000  0.0000  none      far enough apart: no penalty

    Source: the gradient of any contrastive loss is a weighted sum over pairs (Wang et al.,
    "Multi-Similarity Loss", CVPR 2019, section 3).
    """
    function, settings = unwrap(loss, hyperparameters)
    with watch() as record:
        per_row = function(*data, **settings, reduction="none")
        if not record:
            return _explain_batch(function, data, settings)
        derivatives = torch.autograd.grad(per_row.sum(), [m.values for m in record])
    seen = _Seen.of(per_row, record, derivatives)
    relations = [_relation(seen, role) for role in seen.measured]
    readings = _readings(seen)
    labels = _labels(seen)
    rows = tuple(
        Row(
            index,
            labels[index],
            {r.name: r.values[index] for r in relations},
            cost,
            {r.name: r.forces[index] for r in relations},
            readings[index],
        )
        for index, cost in enumerate(seen.per_row.tolist())
    )
    forces = torch.cat([f.flatten() for f in seen.forces.values()])
    return Explanation(
        loss=function.__name__,
        hyperparameters=_plain(settings),
        rows=rows,
        n=len(rows),
        total=float(seen.per_row.sum()),
        mean=float(seen.per_row.sum()) / max(len(rows), 1),
        active_share=float(seen.active.sum()) / max(len(rows), 1),
        pull=float(forces.clamp(min=0).sum()),
        push=float((-forces).clamp(min=0).sum()),
        findings=diagnose(_evidence(function, data, settings, seen)).findings,
    )


def _explain_batch(
    function: Callable[..., Tensor], data: tuple[ArrayLike, ...], settings: dict[str, Any]
) -> Explanation:
    """The strongest forces of a whole-batch loss, and the totals over all forces."""
    shown = forces(function, *data, k=_SHOWN, **settings)
    with torch.no_grad():
        total = float(function(*data, **settings, reduction="sum"))
    acting = shown.pull + shown.push
    n = len(acting)
    active = int((acting > 1e-6 * acting.max()).sum()) if n else 0
    columns = (shown.anchor, shown.other, shown.similar, shown.closeness, shown.force)
    rows = tuple(
        Row(
            anchor,
            "similar" if similar else "dissimilar",
            {"closeness": closeness},
            None,
            {"closeness": force},
            _read_force(similar, force),
            other,
        )
        for anchor, other, similar, closeness, force in zip(
            *(column.tolist() for column in columns), strict=True
        )
    )
    return Explanation(
        loss=function.__name__,
        hyperparameters=_plain(settings),
        rows=rows,
        n=n,
        total=total,
        mean=shown.loss,
        active_share=active / max(n, 1),
        pull=float(shown.pull.sum()),
        push=float(shown.push.sum()),
        findings=diagnose(_batch_evidence(function, data, settings, acting)).findings,
    )


def _batch_evidence(
    function: Callable[..., Tensor],
    data: tuple[ArrayLike, ...],
    settings: dict[str, Any],
    acting: Tensor,
) -> Evidence:
    """Evidence from a whole batch.

    Args:
        function: the loss, over (x, labels), two towers, or (x, proxies, labels).
        data: its data arguments.
        settings: its other arguments.
        acting: (n,) the sum of the absolute forces of each anchor.
    """
    if examined(function):
        evidence = of_batch(function, data, settings)
    else:
        x = batch("x", data[0])
        evidence = of_embeddings(x, batch_labels(data[-1], like=x), settings)
    return replace(evidence, loss=function.__name__, broken=acting.isnan(), active=acting > 0)


def _read_force(similar: bool, force: float) -> str:
    if similar:
        return (
            "similar but apart: pulled together" if force > 0 else "close enough: pushed slightly"
        )
    return "too close: pushed apart" if force < 0 else "dissimilar: pulled"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are single values; keywords that hold data are left out."""
    values = {
        k: v.item() if isinstance(v, Tensor) and not v.ndim else v for k, v in settings.items()
    }
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | str)}


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a loss on aligned rows did.

    Attributes:
        measured: what it measured, by role.
        forces: for each of `measured`, the force on it: > 0 pulls together, < 0 pushes apart.
        per_row: (n,) the losses.
        active: (n,) bool, whether any force acts in the row.
    """

    measured: Mapping[str, Measured]
    forces: Mapping[str, Tensor]
    per_row: Tensor
    active: Tensor

    @classmethod
    def of(
        cls, per_row: Tensor, record: list[Measured], derivatives: tuple[Tensor, ...]
    ) -> "_Seen":
        measured, forces = {}, {}
        for m, derivative in zip(record, derivatives, strict=True):
            values = m.values.detach().cpu()
            force = derivative.cpu() if m.closeness == "distance" else -derivative.cpu()
            if m.closeness == "distance":
                force = force.masked_fill(values == 0, 0)  # no direction, so no gradient either
            similar = None if m.similar is None else m.similar.cpu()
            measured[str(m.role)] = Measured(m.role, m.closeness, values, similar)
            forces[str(m.role)] = force + 0.0  # no -0
        strongest = torch.stack(
            [f.abs().reshape(len(f), f[:1].numel()).sum(1) for f in forces.values()]
        ).amax(0)
        # A softmax force is never exactly 0; a millionth of the strongest teaches nothing.
        active = strongest > 1e-6 * strongest.max() if len(strongest) else strongest > 0
        return cls(measured, forces, per_row.detach().cpu(), active)

    def similar_and_not(self) -> tuple[Tensor, Tensor]:
        """How far apart the similar and the dissimilar rows are (similarities negated)."""
        if "pair" in self.measured:
            pair = self.measured["pair"]
            assert pair.similar is not None
            similar = pair.similar if pair.similar.dtype is torch.bool else pair.similar >= 0.5
            return pair.values[similar], pair.values[~similar]
        sign = 1 if self.measured["positive"].closeness == "distance" else -1
        near, far = (sign * self.measured[role].values for role in ("positive", "negative"))
        return near, far[far < inf]


def _evidence(
    function: Callable[..., Tensor],
    data: tuple[ArrayLike, ...],
    settings: dict[str, Any],
    seen: _Seen,
) -> Evidence:
    listed = settings.get("negatives") is not None or any(part is not None for part in data[2:])
    if examined(function) and not listed:  # two towers
        return replace(of_batch(function, data, settings), active=seen.active)
    rows = tensor("data", data[0])
    closeness = next(iter(seen.measured.values())).closeness
    embedded = rows.ndim == 2 and closeness != "logit"
    name = function.__name__
    return Evidence(
        loss=name,
        settings=settings,
        apart=Apart(*seen.similar_and_not(), closeness),
        lengths=length(rows.detach().double()).cpu() if embedded else None,
        broken=seen.per_row.isnan(),
        active=seen.active,
        wakes=_wakes(name, seen),
        held=_held(seen),
    )


def _wakes(name: str, seen: _Seen) -> float | None:
    """The margin at which the first row would become active."""
    near, apart = seen.similar_and_not()
    if "pair" in seen.measured:
        apart = apart[apart > 0]  # at distance 0 no margin gives a direction
    elif apart.shape == near.shape:
        apart = apart - near
    if not len(apart):
        return None
    listed = find(name)
    of_cosine = listed is not None and listed.pair_margin == "cosine"
    return 1 - float(apart.min()) if of_cosine else float(apart.min())


def _held(seen: _Seen) -> Tensor | None:
    """The largest share of its push that one negative receives, for rows whose negatives matter.

    None: no row has enough negatives.
    """
    push = seen.forces.get("negative")
    if push is None or push.ndim != 2 or not push.shape[1]:
        return None
    others = (seen.measured["negative"].values > -inf).sum(1)
    if not (others >= FEWEST).any():
        return None
    contested = (seen.per_row > 0.05) & (others >= FEWEST)  # elsewhere the push is negligible
    return -push.min(1).values[contested] / -push.sum(1)[contested]


@dataclass(frozen=True)
class _Relation:
    """One measured column of the table."""

    name: str
    values: list[float]
    forces: list[float]


def _relation(seen: _Seen, role: str) -> _Relation:
    """A column for a relation; for many negatives, the nearest and the total push on all."""
    measure, force = seen.measured[role], seen.forces[role]
    kind = measure.closeness
    names = {
        "pair": kind,
        "positive": f"{kind} to positive",
        "negative": f"{kind} to negative",
        "second negative": f"{kind} between negatives",
    }
    if measure.values.ndim == 1:
        return _Relation(names[role], measure.values.tolist(), force.tolist())
    nearest = measure.values.max(1).values if measure.values.shape[1] else force.sum(1) - inf
    return _Relation(f"largest {names[role]}", nearest.tolist(), force.sum(1).tolist())


def _labels(seen: _Seen) -> list[str | None]:
    pair = seen.measured.get("pair")
    if pair is None or pair.similar is None:
        return [None] * len(seen.per_row)
    if pair.similar.dtype is torch.bool:
        return ["similar" if similar else "dissimilar" for similar in pair.similar.tolist()]
    return [f"{degree:.3g} similar" for degree in pair.similar.tolist()]


def _readings(seen: _Seen) -> list[str]:
    """What happens to each row, in words."""
    losses = seen.per_row.tolist()
    if "pair" in seen.measured:
        pair = seen.measured["pair"]
        assert pair.similar is not None
        degrees, forces = pair.similar.double().tolist(), seen.forces["pair"].tolist()
        of_pairs = zip(pair.values.tolist(), degrees, forces, losses, strict=True)
        return [_read_pair(*row) for row in of_pairs]
    near, far = seen.measured["positive"], seen.measured["negative"]
    if near.closeness == "distance":
        second = seen.measured.get("second negative", far).values.tolist()
        of_tuples = zip(near.values.tolist(), far.values.tolist(), second, losses, strict=True)
        return [_read_tuple(*row) for row in of_tuples]
    others = far.values
    if not others.shape[1]:
        return ["no negatives: nothing to compare" for _ in losses]
    nearest = others.max(1)
    of_softmax = zip(
        near.values.tolist(), nearest.values.tolist(), nearest.indices.tolist(), losses, strict=True
    )
    what = "class" if near.closeness == "logit" else "negative"
    return [_read_softmax(what, *row) for row in of_softmax]


def _read_pair(d: float, degree: float, force: float, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if d == 0:
        if degree == 1:
            return "identical: nothing to pull"
        return "identical but dissimilar: no direction to push in" if loss else "identical"
    if degree == 1:
        return "similar but apart: pulled together"
    if degree == 0:
        return "too close: pushed apart" if force else "far enough apart: no penalty"
    if not force:
        return "as far apart as its degree requires: at rest"
    return "too far for its degree: pulled" if force > 0 else "too close for its degree: pushed"


def _read_tuple(near: float, far: float, second: float, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if loss == 0:
        return "negative far enough away: no penalty"
    if far <= near:
        return "negative nearer than the positive: wrong order"
    if second <= near:
        return "two negatives nearer to each other than the positive pair"
    return "right order, but within the margin"


def _read_softmax(what: str, near: float, far: float, nearest: int, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if far == -inf:
        return "no negatives: nothing to compare"
    if far > near:
        return f"{what} {nearest} is closer: wrong one picked (p = {exp(-loss):.3g})"
    if far == near:
        return f"{what} {nearest} is equally close (p = {exp(-loss):.3g})"
    return f"right one picked (p = {exp(-loss):.3g})"


def _cells(row: Row) -> tuple[str, ...]:
    label = () if row.label is None else (row.label,)
    values = tuple(f"{value:.4f}" for value in row.measured.values())
    pull = sum(max(force, 0.0) for force in row.forces.values())
    push = sum(max(-force, 0.0) for force in row.forces.values())
    force = ", ".join(way(f) for f in (pull, -push) if f)
    cost = () if row.loss is None else (f"{row.loss:.4f}",)
    other = () if row.other is None else (str(row.other),)
    return (str(row.index), *other, *label, *values, *cost, force or "none", row.reading)


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and (isnan(value) or value in (inf, -inf)) else value
