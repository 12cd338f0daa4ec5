"""Losses of one's own: each rule against plain torch over the full matrix, and what is refused."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocations import Allocations
from batch_cases import LAYOUTS, Data, gradients, multi_labels, near, random_classes
from torch import Tensor, nn

import nearfar as nf
from nearfar.engine.budget import tile_shape

EUCLIDEAN, COSINE = {"distance": "euclidean"}, {"similarity": "cosine"}
N = 13


# The rules.


def pull(tile: nf.Tile) -> Tensor:
    """As short as a rule can be: one loss per anchor, no counts."""
    return (tile.closeness * tile.positive).sum(1)


def margin(tile: nf.Tile, beta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """A number per anchor and one for all, and the mean is over what costs something."""
    beyond = tile.closeness - beta[tile.rows, None]
    near = (alpha + beyond).relu() * tile.positive
    far = (alpha - beyond).relu() * tile.negative
    return (near + far).sum(1), (near > 0).sum(1) + (far > 0).sum(1)


def softmax(tile: nf.Tile, temperature: float | Tensor = 0.2) -> tuple[Tensor, Tensor]:
    """The supervised contrastive loss."""
    logits, everyone = tile.closeness / temperature, tile.positive | tile.negative
    n_positives = tile.positive.sum(1)
    counts = (n_positives > 0) & everyone.any(1)
    log_sum = logits.masked_fill(~everyone & counts[:, None], -torch.inf).logsumexp(1)
    mean = (logits * tile.positive).sum(1) / n_positives.clamp(min=1)
    return log_sum - mean, counts


def triplets(tile: nf.Tile) -> tuple[Tensor, Tensor]:
    d, valid = tile.closeness, tile.positive[:, :, None] & tile.negative[:, None]
    short = (d[:, :, None] - d[:, None] + 1).relu()
    return (short * valid).sum((1, 2)), valid.sum((1, 2))


def halves(tile: nf.Tile) -> tuple[Tensor, Tensor]:
    """Counts that are no whole numbers, and losses where nothing counts."""
    return (tile.closeness * tile.negative).square().mean(1), tile.positive.sum(1) / 4


def soft(tile: nf.Tile, *learned: Tensor) -> Tensor:
    scale, per_anchor = learned or (torch.tensor(2.0), None)
    far = (-scale * tile.closeness).exp() * tile.negative
    near = tile.closeness.square() * tile.positive
    loss = (near + far).sum(1)
    return loss if per_anchor is None else loss * per_anchor[tile.rows]


def soft_force(tile: nf.Tile, *learned: Tensor) -> Tensor:
    scale, per_anchor = learned or (torch.tensor(2.0), None)
    far = -scale * (-scale * tile.closeness).exp() * tile.negative
    force = 2 * tile.closeness * tile.positive + far
    return force if per_anchor is None else force * per_anchor[tile.rows, None]


def square(d: Tensor) -> Tensor:
    return d.square()


def hinge(d: Tensor, m: float | Tensor = 1.5) -> Tensor:
    return (m - d).relu().square()


def with_slope(term: Callable[..., Tensor], slope: Callable[[Tensor], Tensor]) -> Any:
    return lambda d: (term(d), slope(d))


def exponential(d: Tensor) -> tuple[Tensor, Tensor]:
    """Its own derivative, in the same memory."""
    powers = d.exp()
    return powers, powers


def itself(d: Tensor) -> Tensor:
    return d


def constant(d: Tensor) -> tuple[Tensor, Tensor]:
    """Of whole numbers, and one number seen as many."""
    return d.new_ones((), dtype=torch.int64).expand_as(d), d.new_zeros(()).expand_as(d)


SLOPED = with_slope(hinge, lambda d: -2 * (1.5 - d).relu())
DOUBLED = with_slope(square, lambda d: 2 * d)


@dataclass(frozen=True)
class Own:
    """A rule, what it sees, and its learned tensors by name: "" a number, "n" a number per row."""

    name: str
    rule: Any
    seen: dict[str, str] = field(default_factory=lambda: EUCLIDEAN)
    learned: dict[str, str] = field(default_factory=dict)


RULES = [
    Own("pull", pull),
    Own("margin", margin, learned={"beta": "n", "alpha": ""}),
    Own("margin-cosine", margin, {"distance": "cosine"}, {"beta": "n", "alpha": ""}),
    Own("softmax", softmax, COSINE),
    Own("softmax-learned", softmax, COSINE, {"temperature": ""}),
    Own("softmax-raw", softmax, {"similarity": "inner_product"}),
    Own("triplets", triplets),
    Own("halves", halves, {"distance": "sqeuclidean"}),
    Own("soft", nf.AnchorRule(soft)),
    Own("soft-force", nf.AnchorRule(soft, soft_force)),
    Own("soft-learned", nf.AnchorRule(soft, soft_force), learned={"scale": "", "each": "n"}),
    Own("pairs", nf.PairRule(square, hinge)),
    Own("pairs-all", nf.PairRule(square, hinge, balanced=False)),
    Own("pairs-slope", nf.PairRule(DOUBLED, SLOPED)),
    Own("pairs-slope-all", nf.PairRule(DOUBLED, SLOPED, balanced=False)),
    Own("pairs-mixed", nf.PairRule(square, SLOPED), {"distance": "sqeuclidean"}),
    Own("pairs-learned", nf.PairRule(lambda d, m: d**2, hinge), learned={"m": ""}),
    Own(
        "pairs-learned-all",
        nf.PairRule(lambda d, m: (d**2, None), hinge, balanced=False),
        learned={"m": ""},
    ),
    Own("pairs-itself", nf.PairRule(itself, exponential), COSINE),
    Own("pairs-constant", nf.PairRule(square, constant), {"distance": "cosine"}),
    Own("pairs-zero", nf.PairRule(exponential, torch.zeros_like)),
]


def named(name: str) -> Own:
    return next(own for own in RULES if own.name == name)


by_name = attrgetter("name")
each = pytest.mark.parametrize("own", RULES, ids=by_name)


# The truth: plain torch over the full matrix.


def draw(own: Own, n: int = N, setting: str = "", seed: int = 0, layout: str = "random") -> Data:
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    make = multi_labels if "multi" in setting else LAYOUTS[layout]
    rows, others = {"x": normal(n, 4)}, {"labels": make(n, chance)}
    for name, shape in own.learned.items():
        rows[name] = 0.5 + normal(*([n] if shape else [])).abs() / 2
    if "reference" in setting:
        rows["reference"], others["reference_labels"] = normal(n + 3, 4), make(n + 3, chance)
    if "own" in setting:
        others["reference_own"] = torch.randperm(n + 3, generator=chance)[:n]
        others["reference_own"][::3] = -1
    if "weight" in setting:
        others["weight"] = torch.arange(n, dtype=torch.float64) % 4 / 2
    return Data(rows, others)


def run(own: Own, data: Data, reduction: str = "mean", **more: Any) -> Tensor:
    rows, others = data.rows, data.others
    reference = None
    if "reference" in rows:
        given = rows["reference"], others["reference_labels"], others.get("reference_own")
        reference = nf.Reference(*given)
    given = {**own.seen, "learned": tuple(rows[name] for name in own.learned), **more}
    given |= {"weight": others.get("weight"), "reference": reference, "reduction": reduction}
    return nf.batch_loss(own.rule, rows["x"], others["labels"], **given)


def whole(own: Own, data: Data) -> SimpleNamespace:
    """The comparison of all rows with all columns, as one tile."""
    a, labels = data.rows["x"], data.others["labels"]
    b, others = data.rows.get("reference"), data.others.get("reference_labels")
    itself = torch.arange(len(a))
    if b is None:
        b, others = a, labels
    else:
        itself = data.others.get("reference_own", torch.full((len(a),), -1))
    one_id = labels.ndim == 1
    same = labels[:, None] == others if one_id else (labels[:, None] & others).any(-1)
    apart = itself[:, None] != torch.arange(len(b))
    what = next(iter(own.seen.values()))
    if what == "cosine":
        a, b = (t / t.norm(dim=1, keepdim=True) for t in (a, b))
    squares = (a[:, None] - b).square().sum(-1).where(apart, 1)
    closeness = {
        "euclidean": lambda: squares.sqrt(),
        "sqeuclidean": lambda: squares,
        "cosine": lambda: a @ b.T if own.seen is COSINE else (1 - a @ b.T).where(apart, 1),
        "inner_product": lambda: a @ b.T,
    }[what]()
    rows, columns = (slice(0, len(t)) for t in (a, b))
    return SimpleNamespace(
        rows=rows,
        columns=columns,
        closeness=closeness,
        positive=same & apart,
        negative=~same & apart,
    )


def truth(own: Own, data: Data, reduction: str = "mean") -> Tensor:
    tile = whole(own, data)
    learned = [data.rows[name] for name in own.learned]
    weight = data.others.get("weight", torch.ones(len(tile.closeness), dtype=torch.float64))
    if isinstance(own.rule, nf.PairRule):
        found = [term(tile.closeness, *learned) for term in (own.rule.positive, own.rule.negative)]
        found = [term[0] if isinstance(term, tuple) else term for term in found]
        sums = [
            t.double().where(kind, 0).sum(1) for t, kind in zip(found, kinds(tile), strict=True)
        ]
        if reduction == "mean":
            return mean_of_pairs(own.rule, sums, [kind.sum(1) for kind in kinds(tile)], weight)
        loss = sums[0] + sums[1]
    else:
        rule = own.rule.loss if isinstance(own.rule, nf.AnchorRule) else own.rule
        found = rule(tile, *learned)
        loss, counts = found if isinstance(found, tuple) else (found, torch.ones_like(found))
        loss = loss.where(counts > 0, 0) + 0 * data.rows["x"].sum()  # a rule may use no row
        if reduction == "mean":
            total = (weight * counts).sum()
            return (weight * loss).sum() / torch.where(total > 0, total, 1)
    weighted = weight * loss
    return weighted.sum() if reduction == "sum" else weighted


def kinds(tile: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return tile.positive, tile.negative


def mean_of_pairs(
    rule: nf.PairRule, sums: list[Tensor], counts: list[Tensor], weight: Tensor
) -> Tensor:
    totals = [(weight * loss).sum() for loss in sums]
    pairs = [(weight * count).sum() for count in counts]
    if not rule.balanced:
        return sum(totals) / max(sum(pairs), 1)
    return sum(total / (1 if n == 0 else n) for total, n in zip(totals, pairs, strict=True))


REDUCTIONS = ("mean", "sum", "none")
SETTINGS = ("", "weight", "multi", "reference", "reference own weight", "reference own multi")


@pytest.mark.parametrize("setting", SETTINGS)
@each
def test_value_and_every_gradient_equal_plain_torch(own: Own, setting: str) -> None:
    """In one block, and in many."""
    data = draw(own, setting=setting, seed=1)
    for reduction in REDUCTIONS:
        expected = gradients(partial(truth, own, reduction=reduction), data)
        near(gradients(partial(run, own, reduction=reduction), data), expected, 1e-11)
        with tile_shape(3, 4):
            near(gradients(partial(run, own, reduction=reduction), data), expected, 1e-11)


@pytest.mark.parametrize("layout", ["one class", "singletons", "pairs"])
@each
def test_labels_of_every_kind(own: Own, layout: str) -> None:
    """One class has no negatives, and rows alone in their class no positives."""
    for n in (0, 1, 2, 7):
        data = draw(own, n, layout=layout)
        for reduction in REDUCTIONS:
            expected = gradients(partial(truth, own, reduction=reduction), data)
            near(gradients(partial(run, own, reduction=reduction), data), expected, 1e-11)


@pytest.mark.parametrize("own", [own for own in RULES if own.rule is not triplets], ids=by_name)
def test_positives_that_are_few(own: Own) -> None:
    """In a larger tile they are listed, not masked; and a small budget makes more tiles of it."""
    data = draw(own, 160, layout="pairs")
    expected = gradients(partial(truth, own), data)
    near(gradients(partial(run, own), data), expected, 1e-11)
    with nf.memory_budget(2**16):
        near(gradients(partial(run, own), data), expected, 1e-11)


def test_the_margin_loss_equals_loops() -> None:
    """By the formula, pair by pair."""
    own = named("margin")
    data = draw(own, seed=3, setting="weight")

    def loops(d: Data) -> Tensor:
        x, beta, alpha = d.rows["x"], d.rows["beta"], d.rows["alpha"]
        labels, weight = d.others["labels"].tolist(), d.others["weight"].tolist()
        total, active = torch.zeros(()).double(), 0.0
        for i in range(N):
            for j in range(N):
                distance = (x[i] - x[j]).norm()
                sign = 1 if labels[i] == labels[j] else -1
                if i != j and alpha + sign * (distance - beta[i]) > 0:
                    total = total + weight[i] * (alpha + sign * (distance - beta[i]))
                    active += weight[i]
        return total / active

    near(gradients(partial(run, own), data), gradients(loops, data), 1e-11)


def half_square(tile: nf.Tile) -> tuple[Tensor, Tensor]:
    return tile.closeness.square().sum(1) / 2, tile.positive.any(1)


@pytest.mark.parametrize(
    "rule",
    [
        lambda tile: tile.closeness.sum(1),  # the derivative is one 1, seen as a whole tile
        lambda tile: tile.closeness[:, 0],
        lambda tile: tile.closeness.amin(1),
        lambda tile: tile.positive.sum(1),
        nf.AnchorRule(half_square, lambda tile: tile.closeness),  # where nothing counts too
        nf.AnchorRule(half_square, lambda tile: tile.closeness[:, :].detach()),
    ],
)
def test_what_a_rule_returns_may_be_the_closeness_or_one_number_seen_as_many(rule: Any) -> None:
    """Of a reference, in which no row is compared with itself."""
    own = Own("", rule)
    for setting in ("reference", "reference weight"):
        data = draw(own, setting=setting)
        data.rows["reference"][3] = data.rows["x"][2] + 1e-9  # its distance is repaired
        for reduction in REDUCTIONS:
            expected = gradients(partial(truth, own, reduction=reduction), data)
            near(gradients(partial(run, own, reduction=reduction), data), expected, 1e-11)


@each
def test_gradcheck(own: Own) -> None:
    """Of the rows, and of a number per anchor and one for all."""
    data = draw(own, 5, seed=2)
    names, leaves = zip(*data.rows.items(), strict=True)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    for reduction in ("none", "mean"):

        def of(*given: Tensor, r: str = reduction) -> Tensor:
            return run(own, data.at(**dict(zip(names, given, strict=True))), r)

        assert torch.autograd.gradcheck(of, leaves)


def test_a_learned_number_per_class_gets_the_gradients_of_its_anchors() -> None:
    own = named("margin")
    data = draw(own, 8)
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0])
    beta = torch.tensor([1.2, 0.7, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    data = Data({**data.rows, "beta": beta.detach()[labels]}, {"labels": labels})
    for reduction in REDUCTIONS:
        of_anchors = gradients(partial(truth, own, reduction=reduction), data)[1]["beta"]
        expected = torch.zeros(4).double().index_add(0, labels, of_anchors)
        _, found = gradients(
            lambda d, r=reduction: run(own, data.at(beta=d.rows["beta"][labels]), r),
            Data({"beta": beta}, {}),
        )
        torch.testing.assert_close(found["beta"], expected)
        assert expected.any()


# The losses of the library, written as rules.


@pytest.mark.parametrize("setting", ["", "reference own", "multi"])
@pytest.mark.parametrize(
    ("own", "shipped"),
    [
        (Own("", nf.PairRule(square, hinge)), partial(nf.batch_contrastive_loss, margin=1.5)),
        (Own("", softmax, COSINE), partial(nf.sup_con_loss, temperature=0.2)),
        (Own("", triplets), nf.batch_triplet_loss),
    ],
    ids=["contrastive", "sup_con", "triplet"],
)
def test_a_rule_gives_what_the_loss_of_the_library_gives(
    own: Own, shipped: Callable[..., Tensor], setting: str
) -> None:
    data = draw(own, setting=setting, seed=4)

    def ours(d: Data, reduction: str) -> Tensor:
        told = {k: v for k, v in d.others.items() if k.startswith("reference_")}
        rows = {"reference": d.rows["reference"], **told} if told else {}
        reference = nf.Reference(*rows.values()) if rows else None
        return shipped(d.rows["x"], d.others["labels"], reference=reference, reduction=reduction)

    for reduction in REDUCTIONS:
        expected = gradients(partial(ours, reduction=reduction), data)
        near(gradients(partial(run, own, reduction=reduction), data), expected, 1e-11)


# What torch puts around a loss.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each
def test_low_precision_is_computed_in_float32(own: Own, dtype: torch.dtype) -> None:
    data = draw(own)
    low = data.at(**{k: v.to(dtype) for k, v in data.rows.items() if k not in own.learned})
    for reduction in REDUCTIONS:
        value, found = gradients(partial(run, own, reduction=reduction), low)
        single = low.at(**{k: v.float() for k, v in low.rows.items()})
        wide, expected = gradients(partial(run, own, reduction=reduction), single)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-6)
        for name, gradient in found.items():
            assert gradient.dtype == low.rows[name].dtype
            step = max(torch.finfo(gradient.dtype).eps, 1e-6)
            off = (gradient.double() - expected[name].double()).abs().max()
            assert off <= 2 * step * expected[name].abs().max()


@each
def test_no_grad_gives_the_value_alone(own: Own) -> None:
    data = draw(own)
    leaves = data.at(**{k: v.clone().requires_grad_() for k, v in data.rows.items()})
    for reduction in REDUCTIONS:
        expected = run(own, data, reduction)
        assert not expected.requires_grad
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                found = run(own, leaves, reduction)
            assert torch.equal(found, expected)
            assert not found.requires_grad


@each
def test_a_graph_may_be_walked_twice(own: Own) -> None:
    data = draw(own)
    leaves = [v.requires_grad_() for v in data.rows.values()]
    for reduction in REDUCTIONS:
        loss = run(own, data, reduction).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(2 * loss, leaves)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(b, 2 * a)


@each
def test_a_row_that_is_not_finite_makes_the_loss_nan(own: Own) -> None:
    """Also of a rule that does not look at it."""
    for bad in (torch.nan, torch.inf):
        data = draw(own, setting="weight")
        data.rows["x"][4, 1] = bad
        for reduction in REDUCTIONS:
            assert run(own, data, reduction).isnan().all()


def test_counts_may_add_up_to_less_than_one() -> None:
    x = torch.randn(6, 3)
    counts = torch.tensor([0.1, 0.2, 0, 0, 0.1, 0])
    loss = nf.batch_loss(lambda tile: (counts, counts), x, torch.arange(6), **EUCLIDEAN)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_an_infinite_loss_stays_infinite() -> None:
    x = torch.randn(4, 2)
    loss = nf.batch_loss(lambda tile: tile.positive.sum(1) / 0.0, x, [0, 0, 1, 1], **EUCLIDEAN)
    assert loss == torch.inf


def test_an_anchor_that_does_not_count_moves_no_row() -> None:
    """Whatever its loss is: 0 / 0, whose derivative is NaN too."""

    def mean_of_negatives(tile: nf.Tile) -> tuple[Tensor, Tensor]:
        counts = tile.negative.sum(1)
        return (tile.closeness * tile.negative).sum(1) / counts, counts > 0

    def slope(tile: nf.Tile) -> Tensor:
        return tile.negative / tile.negative.sum(1, keepdim=True)

    for rule in (mean_of_negatives, nf.AnchorRule(mean_of_negatives, slope)):
        x = torch.randn(3, 2, requires_grad=True)
        loss = nf.batch_loss(rule, x, [0, 0, 0], **EUCLIDEAN)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_compiles_without_error() -> None:
    """A number that a graph cannot read, how many pairs there are of a kind, keeps its digits."""
    own = named("pairs")
    torch._dynamo.reset()
    data = draw(own)
    value, expected = gradients(partial(run, own), data)
    again, found = gradients(torch.compile(partial(run, own), backend="eager"), data)
    assert torch.equal(again, value)
    assert torch.equal(found["x"], expected["x"])


def test_a_second_derivative_is_refused_in_words() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    loss = nf.batch_loss(pull, x, [0, 0, 1, 1], **EUCLIDEAN)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


# Memory.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["margin", "soft-force", "pairs", "pairs-learned"])
def test_memory_is_linear_in_the_batch(name: str, reduction: str) -> None:
    """No N x N matrix, be it of single bytes."""
    own, n, budget = named(name), 1300, 2**20
    data = draw(own, n, layout="pairs")
    data = data.at(**{k: v.float().requires_grad_() for k, v in data.rows.items()})
    known = [*data.rows.values(), *data.others.values()]
    with nf.memory_budget(budget), Allocations(*known) as allocations:
        run(own, data, reduction).sum().backward()
    assert allocations.largest < budget
    assert allocations.peak < 1.5 * budget < n * n


def test_nothing_is_kept_once_the_gradient_is_known() -> None:
    own = named("margin")
    data = draw(own, 64)
    leaves = data.at(**{k: v.requires_grad_() for k, v in data.rows.items()})
    known = [*data.rows.values(), *data.others.values()]
    with Allocations(*known) as allocations:
        loss = run(own, leaves)
        loss.backward()
    del loss
    for leaf in leaves.rows.values():
        leaf.grad = None
    gc.collect()
    assert allocations.living() == []


# What is refused.


def batch(rule: Any, **more: Any) -> Tensor:
    x, labels = torch.randn(6, 3, requires_grad=True), [0, 0, 1, 1, 2, 2]
    return nf.batch_loss(rule, x, labels, **{"distance": "euclidean", **more})


def test_what_the_rule_sees_must_be_said_once() -> None:
    x = torch.randn(4, 2)
    for seen in ({}, {**EUCLIDEAN, **COSINE}):
        with pytest.raises(TypeError, match=r"needs either distance .* or similarity .*; got dist"):
            nf.batch_loss(pull, x, [0, 0, 1, 1], **seen)
    with pytest.raises(ValueError, match=r"distance must be one of 'euclidean', .*; got 'dot'"):
        batch(pull, distance="dot")
    with pytest.raises(
        ValueError, match=r"similarity must be one of 'inner_product', .*; got 'dot'"
    ):
        batch(pull, distance=None, similarity="dot")
    with pytest.raises(ValueError, match=r"reduction must be .* got 'avg'"):
        batch(pull, reduction="avg")


@pytest.mark.parametrize("rule", ["margin", 0.5, None, torch.ones(2)])
def test_a_rule_is_something_that_can_be_called(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"rule must be a function of a tile, .*; got \w+\."):
        batch(rule)
    with pytest.raises(TypeError, match=r"rule must be a function of a tile, .*; got \w+\."):
        batch(nf.AnchorRule(rule))
    for terms in ((rule, square), (square, rule)):
        with pytest.raises(TypeError, match=r"must be functions of a tensor, .*; got \w+\."):
            batch(nf.PairRule(*terms))


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (1.0, "float"),
        (None, "NoneType"),
        ([torch.ones(6)] * 2, "list"),
        ((torch.ones(6), 1), "(Tensor, int)"),
        ((torch.ones(6),) * 3, "(Tensor, Tensor, Tensor)"),
    ],
)
def test_a_rule_that_returns_something_else_is_told_what(found: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=r"losses, one per anchor, or two, losses and") as error:
        batch(lambda tile: found)
    assert str(error.value).endswith(f"; got {kind}.")
    with pytest.raises(TypeError, match="the loss of each pair, or losses and deriv") as error:
        batch(nf.PairRule(square, lambda d: found))
    assert str(error.value).endswith(f"; got {kind}.")
    if not isinstance(found, tuple):
        with pytest.raises(TypeError, match="one derivative for each distance or") as error:
            batch(nf.AnchorRule(pull, lambda tile: found))
        assert str(error.value).endswith(f"; got {kind}.")


def test_a_rule_that_returns_another_shape_is_told_which() -> None:
    with pytest.raises(ValueError, match=r"of shape \(6,\); got \(\)\. Sum over the columns, or"):
        batch(lambda tile: tile.closeness.sum())
    with pytest.raises(ValueError, match=r"of shape \(6,\); got \(6, 6\)\. Sum over the columns"):
        batch(lambda tile: tile.closeness)
    with pytest.raises(ValueError, match=r"of shape \(6,\); got \(6,\) and \(6, 6\)\."):
        batch(lambda tile: (tile.closeness.sum(1), tile.positive))
    with pytest.raises(ValueError, match=r"force must return .* of shape \(6, 6\); got \(6,\)\."):
        batch(nf.AnchorRule(pull, pull))
    for term in (torch.mean, torch.max, lambda d: (d, d.sum()), lambda d: d.new_zeros(2)):
        with pytest.raises(
            ValueError, match=r"a term of a PairRule must .* of shape \(6, 6\); got"
        ):
            batch(nf.PairRule(square, term))
    with pytest.raises(ValueError, match=r"like the one it is given, of shape \(6, 6\); got \(6,"):
        batch(nf.PairRule(lambda d, m: d.sum(1), lambda d, m: m - d), learned=[torch.ones(())])


@pytest.mark.parametrize("learned", [torch.ones(3), 0.5, [0.5], (torch.ones(3), None)])
def test_learned_are_tensors(learned: Any) -> None:
    with pytest.raises(TypeError, match=r"a sequence of tensors, such as \(beta,\); got \w|\(T"):
        batch(margin, learned=learned)


def test_a_tensor_that_would_get_no_gradient_is_refused() -> None:
    """A module's parameter that the rule takes from around it, where it would stay as it is."""
    beta = nn.Parameter(torch.tensor(0.5))
    rules = [
        lambda tile: ((beta - tile.closeness).relu() * tile.negative).sum(1),
        nf.AnchorRule(lambda tile: tile.closeness.sum(1) * beta.exp(), soft_force),
        nf.PairRule(square, lambda d: (beta - d).relu()),
        nf.PairRule(square, lambda d: torch.ones_like(d) * beta),
    ]
    for rule in rules:
        with pytest.raises(ValueError, match=r"uses a tensor of shape \(\) that requires a grad"):
            batch(rule)
    with pytest.raises(ValueError, match=r"of shape \(\) .* as one of learned=\(\.\.\.\)"):
        batch(
            nf.PairRule(lambda d, m: d * m, lambda d, m: (beta - d).relu()),
            learned=[torch.ones(())],
        )
    with torch.no_grad():
        assert batch(rules[0]) >= 0
    detached = batch(lambda tile: ((beta.detach() - tile.closeness).relu() * tile.negative).sum(1))
    assert detached.requires_grad


class UnhappyError(Exception):
    pass


def unhappy(*_: Any) -> Tensor:
    raise UnhappyError("of the rule")


@pytest.mark.parametrize(
    "rule",
    [
        unhappy,
        nf.AnchorRule(unhappy),
        nf.AnchorRule(pull, unhappy),
        nf.PairRule(unhappy, square),
        nf.PairRule(square, unhappy),
    ],
)
def test_an_exception_of_the_rule_is_passed_on(rule: Any) -> None:
    with pytest.raises(UnhappyError, match=r"^of the rule$"):
        batch(rule)
    for reduction in REDUCTIONS:
        with pytest.raises(UnhappyError, match=r"^of the rule$"):
            batch(rule, reduction=reduction).sum().backward()


@pytest.mark.parametrize("changed", ["x", "beta", "alpha"])
def test_what_is_changed_before_the_backward_pass_is_refused_by_torch(changed: str) -> None:
    """With "none" the rule runs again there; a loss that is one number has its gradient."""
    own = named("margin")
    data = draw(own)
    leaves = data.at(**{k: v.clone().requires_grad_() for k, v in data.rows.items()})
    for reduction in REDUCTIONS:
        loss = run(own, leaves, reduction).sum()
        with torch.no_grad():
            leaves.rows[changed].add_(0.1)
        if reduction == "none":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_a_rule_leaves_the_closeness_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="in-place operation"):
        batch(lambda tile: tile.closeness.mul_(2).sum(1))


def test_names_of_classes_are_the_rules_own_to_look_up() -> None:
    """By the rows of the tile, which say which anchors these are."""
    labels = random_classes(N, torch.Generator().manual_seed(0))
    x, seen = torch.randn(N, 3), torch.zeros(N, dtype=torch.int64)

    def look(tile: nf.Tile) -> Tensor:
        assert (tile.columns.start, tile.columns.stop) == (0, N)
        seen[tile.rows] += labels[tile.rows]
        return pull(tile)

    with tile_shape(4, 4):
        nf.batch_loss(look, x, labels, **EUCLIDEAN)
    assert torch.equal(seen, labels)
