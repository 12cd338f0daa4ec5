"""Losses of log-sum-exps on a GPU: which kernels compute one, and in which order.

No sum is taken in an order that could change, so the bits of a result do not either.
"""

from dataclasses import replace
from typing import Literal

from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu import row_owners, strips, tiles
from nearfar.engine.gpu.comparison import SHORT, Comparison
from nearfar.engine.gpu.settled import Anchors, add_others, answer, pulls, settled
from nearfar.engine.log_sum_rule import BothWays, LogSumRule
from nearfar.engine.precision import NARROW
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Request


def run(
    rule: LogSumRule, closeness: Closeness, relation: Relation, request: Request, *, both: bool
) -> Answer:
    """The losses of a rule for every row, or with `both` for every row and every column."""
    structure = _structure(rule, closeness, relation, request, both=both)
    compared = Comparison(request, closeness, relation, wide=structure != "row owners")
    ways = BothWays(relation.n, request.together) if both else None
    anchors = Anchors.of(rule, relation, request.weight, both=ways)
    if structure == "strips":
        return strips.run(rule, compared, anchors)
    way = tiles if structure == "tiles" else row_owners
    found = way.collect(rule, compared, both=both)
    if ways is not None and request.together is not None:
        add_others(found, relation.n, ways, request.together)
    if rule.per_positive:
        done = row_owners.terms(rule, compared, compared.rows, found, anchors)
    else:
        done = settled(rule, found, anchors, request.kept)
    known = answer(rule, anchors, request, [done])
    if not request.gradient:
        return known
    acting = pulls(rule, found, done, anchors.weight)
    da, db, by_scale = way.gradient(rule, compared, acting, both=both)
    return replace(known, da=da, db=db, by_scale=by_scale)


def _structure(
    rule: LogSumRule, closeness: Closeness, relation: Relation, request: Request, *, both: bool
) -> Literal["row owners", "tiles", "strips"]:
    """How a loss is computed, with rows and columns N, rows of length d.

    - "row owners": short rows and all distances. No tile leaves the chip. 6 to 8 N^2 d; with other
      columns the gradient of each side takes its own products, 8 to 12 N^2 d. Rows in several
      chunks are multiplied again for each.
    - "tiles": inner products where both sides are anchors, and wide rows in 16 bits. The rule
      follows on the product of a tile; forces are written, a strip of rows at a time, and
      multiplied by cuBLAS. 8 N^2 d, and nothing is stored between the passes but sums. Only for
      rules simple enough to find room beside a product: a log-sum-exp of the closeness itself, and
      the sum of the positives.
    - "strips": inner products of wide rows in all other cases. A strip of products is stored and
      read once for the sums and once for the forces. 6 N^2 d.
    """
    wide = request.a.shape[1] > SHORT
    if closeness.kernel != "product" or rule.both_ends or not (wide or both):
        return "row owners"
    simple = rule.sums_positives and rule.far is None
    if both:
        matched = relation.match is not None and relation.first is None
        by_diagonal = relation.row_labels is None and not matched
        fits = simple and by_diagonal and not rule.with_positives
        return "tiles" if fits else "row owners"
    return "tiles" if simple and request.precision in NARROW else "strips"
