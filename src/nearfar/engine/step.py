"""The one autograd step in which every whole-batch loss runs.

An executor walks over tiles and returns per-row losses with the gradient of their weighted sum.
This step lifts and normalises the rows, calls the executor, reduces, and carries the gradient back
through the normalisation: the gradient of a scalar is finished in the forward pass; for
`reduction="none"` the backward pass walks the tiles again with the upstream gradient as weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from nearfar.engine.budget import Limits, current_limits
from nearfar.engine.closeness import Closeness, prepared
from nearfar.engine.meeting import Group, Meeting, meeting_of
from nearfar.engine.observe import force_visitors
from nearfar.engine.precision import Precision, chosen
from nearfar.engine.products import Finish
from nearfar.engine.relation import Relation
from nearfar.engine.ring import Ring
from nearfar.engine.rows import row_dots
from nearfar.engine.sides import How, sides
from nearfar.engine.together import Together, meet, whole
from nearfar.engine.where import kernels_run_on
from nearfar.inputs import batched, readable, transformed
from nearfar.reduction import (
    EACH_PAIR,
    Between,
    Reduction,
    Total,
    above_0,
    split,
    sum_dtype,
    weight_sum,
)


@dataclass(eq=False)
class Request:
    """What an executor is asked.

    Attributes:
        a: (n, d) prepared rows, times the scale where there is one. To be rounded, rows that meet
            each other are multiplied by its root, and `b` is None.
        b: (m, d) prepared columns; None where the rows meet each other.
        bias: added to every closeness.
        weight: (n,) by which each row's loss counts in the gradient; None: all by 1.
        kept: which terms count in the mean, and are not 0 in the loss; None: all.
        reduction: what becomes of the losses.
        each_pair: whether the answer shall hold one loss per listed pair, and `weight` holds one
            weight for each.
        scale: by which the closeness of rows and columns was scaled.
        bound: no product of a row and a column is larger in size than this; inf: not known.
        gradient: whether a gradient is wanted.
        finish: takes the gradient of some rows of `a`, which it may overwrite with it; None: the
            gradient of all rows is wanted at the end.
        limits: of memory.
        precision: to which rows and forces are rounded before they are multiplied; "float32": they
            are not, and float64 stays.
        learns_scale: whether the gradient of the scale is wanted, for which the forces need more
            digits: in it the largest cancel.
        together: the processes over which the comparison is spread, of which this one has the rows
            `a`; None: there are no others.
        dealt: the processes that all have all rows, and to which the tiles are dealt; None: all
            tiles are wanted.
        ring: columns that travel, in place of `b`; None: they do not.
    """

    a: Tensor
    b: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    kept: Between | None
    reduction: Total
    each_pair: bool
    scale: Tensor | float
    bound: float
    gradient: bool
    finish: Finish | None
    limits: Limits
    precision: Precision
    learns_scale: bool
    together: Together | None = None
    dealt: Together | None = None
    ring: Ring | None = None

    @property
    def columns(self) -> Tensor:
        return self.a if self.b is None else self.b

    def prepared(self, closeness: Closeness) -> tuple[Tensor, Tensor | None]:
        """Rows and columns as `Closeness.measure` wants them, rounded."""
        return prepared(closeness, self.a, self.b, self.precision)

    def aligned(self, closeness: Closeness) -> tuple[Tensor, Tensor | None]:
        """Rows and columns as `Closeness.between` wants them, rounded."""
        return (self.a, self.b) if self.precision == "float32" else self.prepared(closeness)


@dataclass(eq=False)
class Answer:
    """What an executor returns.

    Attributes:
        per_row: (n,) losses, 0 where nothing counts; of any precision.
        counts: (n,) how much each row counts in the mean: 1 or True; 0 where it has nothing to
            compare and is left out; its number of terms where the mean is over those; or one
            number, their sum. None: all 1.
        da: (n, d) gradient of sum(weight * per_row) with respect to `a`; None unless asked for,
            and where the rows are finished.
        db: likewise for the columns; None where they are the rows, and `da` holds all.
        forces: the sum of all forces: the gradient of a bias.
        learned: the gradients of the rule's own tensors.
        each_pair: whether `per_row` holds one loss per listed pair.
        by_scale: the sum of all forces times closeness, which is the scale times its gradient;
            None: that is found from `da` and `db`.
    """

    per_row: Tensor
    counts: Tensor | float | None = None
    da: Tensor | None = None
    db: Tensor | None = None
    forces: Tensor | None = None
    learned: Sequence[Tensor | None] = ()
    each_pair: bool = False
    by_scale: Tensor | None = None


Executor = Callable[[Request], Answer]


@dataclass(frozen=True, eq=False)
class ByTiles:
    """An executor that takes columns from a `Walk` alone, and so columns that travel too."""

    execute: Executor

    def __call__(self, request: Request) -> Answer:
        return self.execute(request)


# What makes an executor, once it is known which pairs are similar.
Maker = Callable[[Relation], Executor]


@dataclass(eq=False)
class _Job:
    executor: Executor
    normalize: bool
    reduction: Total
    kept: Between | None
    each_pair: bool
    weight: Tensor | None
    contained: float | Tensor | None
    limits: Limits
    precision: Precision
    gradient: bool
    together: Together | None


def run(
    executor: Maker,
    x: Tensor,
    y: Tensor | None,
    relation: Relation,
    *,
    closeness: Closeness,
    normalize: bool,
    reduction: Reduction,
    precision: Precision | None = None,
    scale: Tensor | float | None = None,
    bias: Tensor | float | None = None,
    weight: Tensor | None = None,
    learned: Sequence[Tensor] = (),
    contained: float | Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Run an executor on rows `x` and columns `y` (None: `x` itself) as one differentiable step.

    Args:
        executor: computes losses and gradients of a relation.
        x: (n, d).
        y: (m, d).
        relation: which pairs of them are similar.
        closeness: by which the executor compares them.
        normalize: whether rows and columns are scaled to length 1 first.
        reduction: see `Reduction`.
        precision: of the matrix products; None: see `chosen`.
        scale: by which the products of rows and columns are multiplied.
        bias: what is added to each.
        weight: (n,) by which each row's loss counts.
        learned: tensors of the executor's own rule that have gradients.
        contained: a scale whose root the rows contain already, which observers are not to see; a
            tensor gets a gradient.
        group: the processes that the batch is spread over; None: this one has all of it.
    """
    run_step: Callable[..., Tensor] = _run
    if torch.compiler.is_compiling():
        # The compiler takes the step as it is: it could not fuse the loop over tiles anyway. Only
        # asked for here, since a decorator would load the compiler with the library.
        run_step = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
    return run_step(
        executor,
        x,
        y,
        relation,
        closeness,
        normalize,
        reduction,
        precision,
        scale,
        bias,
        weight,
        learned,
        contained,
        group,
    )


def _run(
    executor: Maker,
    x: Tensor,
    y: Tensor | None,
    relation: Relation,
    closeness: Closeness,
    normalize: bool,
    reduction: Reduction,
    precision: Precision | None,
    scale: Tensor | float | None,
    bias: Tensor | float | None,
    weight: Tensor | None,
    learned: Sequence[Tensor],
    contained: float | Tensor | None,
    group: Group | None,
) -> Tensor:
    _refuse_transforms()
    for visitor in force_visitors():
        visitor.begin()
    if _learned(contained):
        assert isinstance(contained, Tensor)
        learned = (*learned, contained)
    gradient = torch.is_grad_enabled() and any(map(_learned, (x, y, scale, bias, *learned)))
    total, kept = split(reduction)
    by_precision = chosen(precision, closeness.rounding, x, y)
    together = None
    if group is not None:
        meeting = meeting_of(group)
        together, relation = meet(
            meeting,
            x,
            y,
            relation,
            gradient=gradient,
            weighted=weight is not None,
            tiles=_tiles(x, y, relation, closeness, meeting),
            way=(by_precision, kernels_run_on(x.device)),
            learned=[_learned(value) for value in (scale, bias, *learned)],
        )
        gradient = together.gradient
    job = _Job(
        _made(executor, relation, together),
        normalize,
        total,
        kept,
        reduction is EACH_PAIR,
        weight if together is None else together.weight_of_rows(weight, x),
        contained,
        current_limits(),
        by_precision,
        gradient,
        together,
    )
    loss: Tensor = _Step.apply(job, x, y, scale, bias, *learned)  # type: ignore[no-untyped-call]
    return loss


def _made(executor: Maker, relation: Relation, together: Together | None) -> Executor:
    """The executor, of the rows of all processes where tiles of these can be dealt."""
    made = executor(relation)
    if together is None:
        return made
    together.dealt = together.dealt and isinstance(made, ByTiles)
    return executor(whole(relation)) if together.dealt else made


def _tiles(
    x: Tensor, y: Tensor | None, relation: Relation, closeness: Closeness, group: Meeting
) -> int:
    """Which tiles could be dealt to processes that each have the rows of all; 0: none.

    On a CPU that takes two thirds of the work: a tile of two processes' rows serves both. Kernels
    pull their own rows from both ends instead.
    """
    met = y is None and relation.symmetric and relation.listed is None and closeness.symmetric
    if not met or not x.is_cpu or kernels_run_on(x.device) or group.over.ring or force_visitors():
        return 0
    return 1 + crc32(repr(current_limits()).encode())  # from which their shape follows


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: _Job,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor | float | None,
        bias: Tensor | float | None,
        *learned: Tensor,
    ) -> Tensor:
        # What the sum's gradient does not need, such as the labels, is not kept for it.
        later = job.reduction == "none"  # the upstream gradient is needed first
        ctx.job = job if later else None
        ctx.given = tuple(_dtype_and_shape(t) for t in (x, y, scale, bias, *learned))
        ctx.twice = y is x
        gradient = job.gradient and not later
        done = _compute(job, x, y, scale, bias, job.weight, gradient)
        weighted = done.per_row if job.weight is None else done.per_row * job.weight
        if later:
            weighted = _own(weighted, job.together)
            ctx.inputs = scale, bias
            ctx.save_for_backward(*map(_owned, (x, y, scale, bias, *learned)))
            return weighted.to(_wide(x, y))
        # A sum may be too large for the dtype of its mean.
        total, ctx.whole = weighted.sum(dtype=sum_dtype(weighted)), None
        if job.reduction == "mean":
            ctx.whole = weight_sum(job.weight, done.counts, done.per_row)
        if job.together is not None and not job.together.dealt:
            total, ctx.whole = job.together.totals(total, ctx.whole)
        if ctx.whole is not None:
            ctx.whole = above_0(ctx.whole)
            total = total / ctx.whole
            for visitor in force_visitors():
                visitor.scale(1 / ctx.whole)
        ctx.save_for_backward(*done.gradients)
        return total.to(_wide(x, y))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_transforms(upstream)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "nearfar's whole-batch losses have no second derivative: call backward() or grad() "
                "without create_graph=True, or use the loss on aligned rows, which has one."
            )
        job: _Job | None = ctx.job
        if job is None:
            # In the wide dtype up to here, so that an upstream scale can save small gradients.
            by = upstream if ctx.whole is None else upstream / ctx.whole
            gradients = [None if g is None else g * by for g in ctx.saved_tensors]
            return None, *_fitted(gradients, ctx.given, ctx.twice)
        x, y, scale, bias, *_ = ctx.saved_tensors
        scale, bias = (
            given if saved is None else saved
            for given, saved in zip(ctx.inputs, (scale, bias), strict=True)
        )
        upstream = _upstream(upstream, job.together)
        weight = upstream if job.weight is None else upstream * job.weight
        done = _compute(job, x, y, scale, bias, weight, True)
        return None, *_fitted(done.gradients, ctx.given, ctx.twice)


def _refuse_transforms(upstream: Tensor | None = None) -> None:
    """Refuse what cannot look into the step; the gradients of a scalar may come in batches."""
    if transformed() or (upstream is not None and upstream.ndim and batched(upstream)):
        raise RuntimeError(
            "nearfar's whole-batch losses compute their gradient themselves, which torch.func "
            "(vmap, grad, jvp) and batched gradients cannot look into: call backward() or "
            "torch.autograd.grad, one gradient at a time (is_grads_batched=False, and for a "
            "Jacobian vectorize=False)."
        )


_Given = tuple[torch.dtype, torch.Size] | None


def _dtype_and_shape(value: Tensor | float | None) -> _Given:
    return (value.dtype, value.shape) if isinstance(value, Tensor) else None


def _fitted(
    gradients: Sequence[Tensor | None], given: tuple[_Given, ...], twice: bool
) -> Iterator[Tensor | None]:
    """The gradients of x, y and so on, in the dtypes and shapes of what they belong to.

    What does not fit becomes infinite, by which a loss scaler knows that a step is to be skipped.
    Where y is x itself, their gradients are added up before they are rounded.
    """
    dx, dy, *others = gradients
    if twice and dx is not None and dy is not None:
        dx, dy = dx.add_(dy), None
    for gradient, meant in zip((dx, dy, *others), given, strict=True):
        if gradient is None or meant is None:
            yield None
        else:
            dtype, shape = meant
            gradient = gradient.to(dtype)
            yield gradient if gradient.shape == shape else gradient.reshape(shape)


def _owned(value: Tensor | float | None) -> Tensor | None:
    """A tensor to be saved. Clones memory torch does not own (NumPy): it may be overwritten."""
    if not isinstance(value, Tensor) or value.untyped_storage().resizable():
        return value if isinstance(value, Tensor) else None
    return value.clone()


@dataclass(eq=False)
class _Computed:
    """Per-row losses, how much each counts, and the gradients of x, y, scale, bias and the rest."""

    per_row: Tensor
    counts: Tensor | float | None
    gradients: Sequence[Tensor | None] = ()


def _compute(
    job: _Job,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | float | None,
    bias: Tensor | float | None,
    weight: Tensor | None,
    gradient: bool,
) -> _Computed:
    """Losses and gradients, in the dtype computed in."""
    together = job.together
    with _full_precision(x.device.type):  # autograd is off, as in every Function
        rings = together is not None and together.over.ring and isinstance(job.executor, ByTiles)
        how = How(_wide(x, y), job.normalize, scale, _learned(scale), rings)
        # Rounded rows times a scale would be other rows than those rounded without it, and kernels
        # take half the time where both ends are the same rows.
        kernels = kernels_run_on(x.device) and how.wide is torch.float32
        at_both_ends = y is None and (job.precision != "float32" or kernels)
        both = sides(x, y, how, together, at_both_ends=at_both_ends)
        answer = job.executor(
            Request(
                both.a,
                both.b,
                None if bias is None else _scalar(bias, both.a),
                weight,
                job.kept,
                job.reduction,
                job.each_pair,
                _shown_scale(scale, job.contained),
                _bound(scale, job.precision) if job.normalize else inf,
                gradient,
                both.finish,
                job.limits,
                job.precision,
                _learned(scale) or _learned(job.contained),
                None if together is None or together.dealt else together,
                together if together is not None and together.dealt else None,
                both.ring,
            )
        )
        if job.each_pair and not answer.each_pair:
            raise TypeError(
                "per_pair takes losses that are a sum over pairs or triplets. A pair of this loss "
                'has no loss of its own; reduction="none" gives that of each anchor.'
            )
        finite = both.finite or job.each_pair  # a pair only answers for its own rows
        per_row = answer.per_row if finite else _with_nan(answer, *both.seen)
        if not gradient:
            return _Computed(per_row, answer.counts)
        dx, dy, dscale = both.back(answer.da, answer.db)
        if answer.by_scale is not None and isinstance(scale, Tensor):
            by_scale = answer.by_scale
            dscale = (by_scale if together is None else together.total(by_scale)) / scale
        dbias = answer.forces if _learned(bias) else None
        gradients = [dx, dy, dscale, dbias, *answer.learned]
        if _learned(job.contained):
            assert isinstance(job.contained, Tensor)
            gradients.append(_of_contained(job.contained, (x, dx), (y, dy), together))
        if together is not None:
            each = job.reduction == "none" and not together.shared_rows
            gradients = _of_all(gradients, together, each=each)
        return _Computed(per_row, answer.counts, gradients)


def _own(per_row: Tensor, together: Together | None) -> Tensor:
    """The losses that this process returns, of those that it has."""
    if together is None:
        return per_row
    if together.dealt:
        return per_row[together.rows.own]
    return together.of_rows(per_row) if together.shared_rows else per_row


def _upstream(upstream: Tensor, together: Together | None) -> Tensor:
    """The gradient of the losses that this process has, from that of those that it returned."""
    if together is None:
        return upstream
    if together.dealt:
        return together.of_rows(upstream).to(upstream.dtype)
    return upstream[together.rows.own] if together.shared_rows else upstream


def _of_contained(
    scale: Tensor,
    rows: tuple[Tensor, Tensor | None],
    columns: tuple[Tensor | None, Tensor | None],
    together: Together | None,
) -> Tensor:
    """The gradient of a scale whose root rows and columns contain, from theirs."""
    found = scale.new_zeros((), dtype=sum_dtype(rows[0]))
    shared = [together.shared_rows, together.columns is None] if together else [False, False]
    for (side, gradient), everywhere in zip((rows, columns), shared, strict=True):
        if side is not None and gradient is not None:
            dots = row_dots(side.to(gradient.dtype), gradient).sum(dtype=found.dtype)
            # What is whole on every process counts once in the sum over them.
            found += dots / together.processes.size if together and everywhere else dots
    return found / (2 * scale.detach().reshape(()))


def _of_all(
    gradients: list[Tensor | None], together: Together, *, each: bool
) -> list[Tensor | None]:
    """The gradients over all processes, as the trainer's mean or sum of them wants them."""
    of_split, of_shared = together.scale_of_gradients(each=each)
    dx, dy, dscale, *others = gradients
    by_x = of_shared if together.shared_rows else of_split
    by_y = of_shared if together.columns is None else of_split
    found = [dscale, *(None if g is None else together.total(g) for g in others)]
    return [
        None if dx is None else dx.mul_(by_x),
        None if dy is None else dy.mul_(by_y),
        *(None if g is None else g * of_shared for g in found),
    ]


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A tensor of one number, filled in where it is none: a copy would stall an accelerator."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like)
    return like.new_full((), float(value))


def _with_nan(answer: Answer, x: Tensor, y: Tensor | None) -> Tensor:
    """The losses, NaN where a row is not finite, even if it had nothing to compare.

    A finite loss would come with a gradient of NaN: 0 times the row.
    """
    per_row, columns = answer.per_row, x if y is None else y
    if y is None and answer.counts is None and x.shape[0] > 1:  # all were compared with all
        return per_row
    if y is not None and not _surely_finite(x):
        per_row = per_row + (x * 0).sum(1)
    return per_row if _surely_finite(columns) else per_row + (columns * 0).sum()


def _surely_finite(x: Tensor) -> bool:
    """Whether all are known to be finite."""
    return readable(x) and isfinite(x.sum().item())


def _wide(x: Tensor, y: Tensor | None) -> torch.dtype:
    """The dtype computed in and returned: float32, or float64 where a tower has it."""
    double = x.dtype is torch.float64 or (y is not None and y.dtype is torch.float64)
    return torch.float64 if double else torch.float32


def _full_precision(device: str) -> AbstractContextManager[object]:
    """No autocast: it would round the products to half precision. Entering it is not free."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _shown_scale(scale: Tensor | float | None, contained: Tensor | float | None) -> Tensor | float:
    """By what a similarity was multiplied, in the step or before it."""
    if scale is not None:
        return scale
    if contained is None:
        return 1.0
    return contained.detach().reshape(()) if isinstance(contained, Tensor) else contained


def _bound(scale: Tensor | float | None, precision: Precision) -> float:
    """How large a product of unit rows can be; inf where it is not known."""
    longer = 1.0 if precision == "float32" else 1.01  # rounded, the rows may be
    if isinstance(scale, Tensor):
        return longer * abs(scale.item()) if readable(scale) else inf
    return longer if scale is None else longer * abs(scale)


def _learned(value: Tensor | float | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
