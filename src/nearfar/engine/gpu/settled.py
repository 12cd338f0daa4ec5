"""Anchors of a loss of log-sum-exps on a GPU: what is found of each, its loss, how it acts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.gpu.kernels.log_sums import Pulls
from nearfar.engine.gpu.language import kernel
from nearfar.engine.log_sum_rule import (
    BothWays,
    Exponent,
    LogSum,
    LogSumRule,
    Settled,
    one_or_all,
    settle,
)
from nearfar.engine.precision import up_to_float16
from nearfar.engine.relation import Relation
from nearfar.engine.slices import part
from nearfar.engine.step import Answer, Request
from nearfar.engine.together import Together
from nearfar.reduction import Between

# (n,) of each anchor: "top" and "far" are the log-sum-exp of its negatives in two parts, "near" is
# that of its positives, relative to "top" where a rule sums both together, "total" their sum.
Found = dict[str, Tensor]


@dataclass(eq=False)
class Anchors:
    """What is known of anchors before anything is compared.

    Attributes:
        counts: (n,) see `LogSumRule`.
        weight: (n,) how much each counts; None: all 1.
        number: (n,) of positives, at least 1, or one number.
        both: they are rows and columns; None: they are rows.
    """

    counts: Tensor | None
    weight: Tensor | None
    number: Tensor | float
    both: BothWays | None = None

    @classmethod
    def of(
        cls,
        rule: LogSumRule,
        relation: Relation,
        weight: Tensor | None,
        *,
        both: BothWays | None = None,
    ) -> "Anchors":
        counts, number = rule.counts(relation), None
        if not relation.one_positive:
            number = relation.n_positives().clamp(min=1).double()
        if both is not None:
            counts, weight, number = (
                None if t is None else both.spread(t) for t in (counts, weight, number)
            )
        return cls(counts, weight, 1.0 if number is None else number, both)

    def part(self, at: slice) -> "Anchors":
        """Some of the anchors."""
        number = self.number
        return Anchors(
            None if self.counts is None else part(self.counts, at),
            None if self.weight is None else part(self.weight, at),
            part(number, at) if isinstance(number, Tensor) else number,
        )


def joined(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) the log-sum-exp of all parts: what is finite of its top, and the rest."""
    highest = top.amax(0)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    return highest.double(), (total * (top - highest).exp()).sum(0, dtype=torch.float64).log()


def add_others(found: Found, n: int, both: BothWays, together: Together) -> None:
    """Add what the rows of other processes are to the columns, which come after n rows."""
    top = found["top"][n:]
    highest = together.largest(top)
    shift = top - highest
    for name in ("far", "near"):
        if name in found:  # log-sum-exps relative to the top
            own = (found[name][n:] + shift).exp()
            found[name] = torch.cat([found[name][:n], together.total(own).log()])
    found["top"] = torch.cat([found["top"][:n], highest])
    if "total" in found:  # each column has one positive, which is a row
        found["total"] = both.spread(found["total"][:n])


def function(exponent: Exponent | None) -> tuple[Any, tuple[float, ...]]:
    """An exponent as kernels take it: the function, and its numbers."""
    if exponent is None:
        return None, (0.0,)
    return kernel(exponent.kernel), tuple(map(float, exponent.numbers))


@dataclass(eq=False)
class _Positives:
    """The positives of each anchor; see `Positives`."""

    values: Tensor
    of: Tensor | float
    near: Tensor | None
    other: None = None


def settled(rule: LogSumRule, found: Found, anchors: Anchors, kept: Between | None) -> Settled:
    """The losses, from what was collected."""
    number = anchors.number
    positives = _Positives(found.get("total", found["far"]), number, found.get("near"))
    if rule.with_positives:
        _sum_one_or_all(found, number)
        rule = one_or_all(rule)
    logs = LogSum(found["far"], found["top"])
    given = anchors.counts, anchors.weight, kept
    return settle(rule, logs, positives, *given, both=anchors.both)


def _sum_one_or_all(found: Found, number: Tensor | float) -> None:
    """Join the sums of the negatives and the positives, but where an anchor has one positive.

    Then "far" is what the shares of the anchor's terms are of, and "near" is 0 where the positives
    are not summed.
    """
    if not isinstance(number, Tensor):
        found["near"] = torch.zeros_like(found["far"])
        return
    alone, every = number == 1, torch.logaddexp(found["far"], found["near"])
    found["far"], found["near"] = torch.where(alone, found["far"], every), (~alone).to(every.dtype)


def answer(rule: LogSumRule, anchors: Anchors, request: Request, done: Sequence[Settled]) -> Answer:
    """What the losses of the anchors, in one part or several, come to; without a gradient."""
    loss, counts = torch.cat([some.loss for some in done]), anchors.counts
    if request.kept is not None:
        counts = torch.cat([some.counts for some in done if some.counts is not None])
    elif counts is not None:
        counts = counts[: len(loss)]  # a row counts as it does as a column
    learned = [torch.cat([some.by_own[0] for some in done]).sum()] if rule.learned else []
    return Answer(loss, counts, learned=learned)


def limits(kept: Between | None) -> tuple[float, float]:
    """Between which losses count, as kernels take it."""
    return (0.0, 0.0) if kept is None else (kept.low, kept.high)


def known(found: Found, weight: Tensor | None, **by: Tensor) -> Pulls:
    """The numbers of the anchors as kernels take them."""
    one = torch.ones_like(found["far"]) if weight is None else weight
    given = {"top": found["top"], "rest": found["far"], "weight": one, **by}
    single = {name: t.to(torch.float32).contiguous() for name, t in given.items()}
    return Pulls(**{name: single.get(name) for name in Pulls._fields})


def pulls(rule: LogSumRule, found: Found, done: Settled, weight: Tensor | None) -> Pulls:
    """How hard each anchor acts."""
    if rule.per_positive:
        return known(found, weight, by_far=done.by_logs)
    by = {"by_far": done.by_logs}
    if rule.near is not None:
        near = found["near"].masked_fill(found["near"] == -torch.inf, torch.inf)
        return known(found, None, **by, near=near, by_near=done.by_positives)
    if rule.with_positives:
        by["by_near"] = done.by_logs * found["near"]
    return known(found, None, **by, by_total=done.by_positives)


def spread(of_rows: Pulls, together: Together) -> Pulls:
    """How hard the rows of all processes act, from what is known of this one's."""
    names = [name for name, values in of_rows._asdict().items() if values is not None]
    rows = torch.stack([getattr(of_rows, name) for name in names], 1)
    every = together.of_rows(rows).to(rows.dtype).unbind(1)
    by_name = {name: t.contiguous() for name, t in zip(names, every, strict=True)}
    return Pulls(**{name: by_name.get(name) for name in Pulls._fields})


def scale_for(dtype: torch.dtype, *sides: Pulls | None) -> Tensor | None:
    """A power of two that brings the forces of anchors into the range of float16.

    None for other dtypes, which need no scale. The exponents are the closeness itself.
    """
    if dtype is not torch.float16:
        return None
    strength = [
        by.abs().amax()
        for of in sides
        if of is not None
        for by in (of.by_far, of.by_near, of.by_total)
        if by is not None and by.numel()
    ]
    return up_to_float16(2 * torch.stack(strength)) if strength else None  # of both ends


def of_sides(pulls: Pulls, n: int) -> tuple[Pulls, Pulls]:
    """How hard n rows act, and the columns after them."""
    rows, columns = (
        Pulls(*(None if t is None else t[at] for t in pulls))
        for at in (slice(0, n), slice(n, None))
    )
    return rows, columns


def pull_settings(
    rule: LogSumRule, kept: Between | None, of_rows: Pulls | None, of_columns: Pulls | None
) -> dict[str, Any]:
    """What kernels have to know of a rule, and of who its anchors are, to compute its forces."""
    return {
        "far_fn": function(rule.far)[0],
        "near_fn": function(rule.near)[0],
        "term": kernel(rule.term),
        "KEPT": kept is not None,
        "TOGETHER": rule.with_positives,
        "BY_I": of_rows is not None,
        "BY_J": of_columns is not None,
    }
