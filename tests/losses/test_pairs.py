"""pairs=: only listed pairs count, as often as they are listed; and means over some terms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf, nan
from typing import Any

import pair_oracle as oracle
import pytest
import torch
from allocations import Allocations
from pair_oracle import Pair, Terms
from torch import Tensor

import nearfar as nf
from nearfar import mine
from nearfar.engine import listed_pairs
from nearfar.engine.budget import tile_shape

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    loss: Loss
    terms: Terms
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *data: Any, **settings: Any) -> Tensor:
        return self.loss(*data, **self.settings, **settings)


CASES = {
    "contrastive": Case(nf.batch_contrastive_loss, oracle.contrastive),
    "hard contrastive": Case(
        nf.batch_contrastive_loss, oracle.hard_contrastive, {"select": "hard"}
    ),
    "cosine": Case(nf.batch_cosine_loss, oracle.cosine),
    "sup_con": Case(nf.sup_con_loss, oracle.sup_con),
    "decoupled": Case(nf.sup_con_loss, oracle.decoupled_sup_con, {"decoupled": True}),
    "nt_xent": Case(nf.nt_xent_loss, oracle.nt_xent),
    "nca": Case(nf.nca_loss, oracle.nca, {"scale": 2.0}),
    "multi_similarity": Case(nf.multi_similarity_loss, oracle.multi_similarity),
    "circle": Case(nf.circle_loss, oracle.circle, {"scale": 2.0}),
    "lifted": Case(nf.lifted_structure_loss, oracle.lifted),
    "lifted_pair": Case(nf.lifted_pair_loss, oracle.lifted_pair),
}
over = partial(pytest.mark.parametrize, "case")
every_case = over(CASES.values(), ids=CASES)
REDUCTIONS = ("mean", "active", (0.2, 5.2), "sum", "none")


def draw(n: int, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=chance, dtype=torch.float64) * 0.4
    return x.requires_grad_(), torch.randint(0, max(n // 3, 1), (n,), generator=chance)


def everyone(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All similar and all dissimilar pairs."""
    same, other = labels[:, None] == labels, ~torch.eye(len(labels), dtype=torch.bool)
    return (same & other).nonzero(), (~same).nonzero()


def some(pairs: tuple[Tensor, Tensor], k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k pairs of each kind, in any order; some are drawn twice."""
    chance = torch.Generator().manual_seed(seed)
    near, far = (p[torch.randint(len(p), (k,), generator=chance)] for p in pairs)
    return near, far


def listed(pairs: Tensor) -> list[Pair]:
    return [(int(i), int(j)) for i, j in pairs]


def agree(found: Tensor, true: Tensor, *leaves: Tensor) -> None:
    """The same values, and the same gradients of their sum, weighted in any way."""
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10, check_dtype=False)
    by = torch.linspace(0.5, 2, found.numel(), dtype=torch.float64).view(found.shape)
    ours = torch.autograd.grad((found * by).sum(), leaves)
    theirs = torch.autograd.grad((true * by).sum(), leaves, allow_unused=True, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.fixture(params=["gathered", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the pairs are measured: one by one, or in tiles of all pairs."""
    monkeypatch.setattr(listed_pairs, "_SPARSE", 0 if request.param == "gathered" else inf)


both_ways = pytest.mark.usefixtures("way")


@both_ways
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@every_case
def test_listed_pairs_are_summed_by_definition(case: Case, reduction: Any, weighted: bool) -> None:
    x, labels = draw(11)
    pairs = some(everyone(labels), 17)
    weight = torch.linspace(0, 2, 11, dtype=torch.float64) if weighted else None
    terms = case.terms(x, x, *map(listed, pairs))
    true = oracle.reduced(terms, reduction, 11, None if weight is None else weight.tolist())
    agree(case(x, None, pairs=pairs, weight=weight, reduction=reduction), true, x)


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@every_case
def test_pairs_with_a_reference(case: Case, reduction: Any) -> None:
    if case.loss is nf.lifted_pair_loss:
        pytest.skip("a pair of a row and a reference has one anchor")
    x, labels = draw(7)
    y, others = draw(9, seed=1)
    same = labels[:, None] == others
    pairs = some((same.nonzero(), (~same).nonzero()), 12)
    terms = case.terms(x, y, *map(listed, pairs))
    found = case(x, None, pairs=pairs, reference=nf.Reference(y, None), reduction=reduction)
    agree(found, oracle.reduced(terms, reduction, 7), x, y)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@every_case
def test_a_list_of_everyone_is_the_loss_without_a_list(
    case: Case, reduction: Any, weighted: bool
) -> None:
    x, labels = draw(40)
    weight = torch.linspace(0, 2, 40) if weighted else None
    with tile_shape(7, 9):
        whole = case(x, labels, weight=weight, reduction=reduction)
        listed = case(x, labels, pairs=everyone(labels), weight=weight, reduction=reduction)
        agree(listed, whole, x)


@both_ways
def test_a_learned_temperature_gets_its_gradient() -> None:
    x, labels = draw(12)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = nf.sup_con_loss(x, None, temperature=t, pairs=everyone(labels))
    agree(found, nf.sup_con_loss(x, labels, temperature=t), x, t)


@both_ways
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_case
def test_gradcheck(case: Case, reduction: Any) -> None:
    if case is CASES["circle"]:
        pytest.skip("its weights are constant for the gradient: the oracle has the same")
    x, labels = draw(6)
    pairs = some(everyone(labels), 6)
    assert torch.autograd.gradcheck(lambda x: case(x, None, pairs=pairs, reduction=reduction), (x,))


@both_ways
@every_case
def test_the_order_of_the_list_does_not_matter(case: Case) -> None:
    x, labels = draw(12)
    near, far = some(everyone(labels), 20)
    agree(
        case(x, None, pairs=(near.flip(0), far.flip(0)), reduction="none"),
        case(x, None, pairs=(near, far), reduction="none"),
        x,
    )


@every_case
def test_every_form_of_a_list_is_the_same(case: Case) -> None:
    x, labels = draw(12)
    near, far = everyone(labels)
    true = case(x, labels, pairs=mine.FoundPairs(near, far))
    torch.testing.assert_close(case(x, labels, pairs=(near.tolist(), far.numpy())), true)
    torch.testing.assert_close(case(x, labels, pairs=(near.int(), far.to(torch.uint8))), true)
    found = mine.hard_positives(x, labels, k=11), mine.hard_negatives(x, labels, k=11)
    torch.testing.assert_close(case(x, labels, pairs=found), true)


def test_what_a_miner_finds_goes_in_as_it_is() -> None:
    x, labels = draw(20)
    found = mine.multi_similarity_pairs(x, labels)
    terms = oracle.multi_similarity(x, x, listed(found.positive), listed(found.negative))
    agree(nf.multi_similarity_loss(x, labels, pairs=found), oracle.reduced(terms, "mean", 20), x)


@both_ways
@every_case
def test_empty_lists_give_0(case: Case) -> None:
    x, _ = draw(5)
    for pairs in (([], []), (torch.zeros(0, 2, dtype=torch.int64), []), ([], [[0, 1]])):
        for reduction in ("mean", "none"):
            loss = case(x, None, pairs=pairs, reduction=reduction)
            assert loss.shape == ((5,) if reduction == "none" else ())
            assert not loss.isnan().any()
            assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()
    assert case(x, None, pairs=([], [])) == 0
    assert case(x[:0], None, pairs=([], [])) == 0


@both_ways
@pytest.mark.parametrize("by", [0.0, 1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "active", (0.5, inf)], ids=str)
@every_case
def test_finite_rows_never_give_nan(case: Case, reduction: Any, by: float) -> None:
    x, labels = draw(9)
    rows = (x.detach().float() * by).requires_grad_()
    with torch.no_grad():
        rows[3] = rows[2]
    loss = case(rows, labels, pairs=everyone(labels), reduction=reduction)
    assert not loss.isnan()
    assert not torch.autograd.grad(loss, rows)[0].isnan().any()


@both_ways
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("reduction", ["mean", "active", (0.5, inf)], ids=str)
@every_case
def test_a_row_that_is_not_finite_is_not_hidden(case: Case, reduction: Any, bad: float) -> None:
    x, labels = draw(9)
    with torch.no_grad():
        x[4] = bad
    for pairs in (None, everyone(labels)):
        assert case(x, labels, pairs=pairs, reduction=reduction).isnan()


@both_ways
@every_case
def test_memory_is_linear_in_the_number_of_pairs(case: Case) -> None:
    peaks = []
    x = torch.randn(400, 64, requires_grad=True)
    for k in (20_000, 40_000):
        chance = torch.Generator().manual_seed(0)
        row = torch.randint(400, (2 * k,), generator=chance)
        other = (row + 1 + torch.randint(399, (2 * k,), generator=chance)) % 400
        pairs = torch.stack([row, other], 1)
        with nf.memory_budget(2**20), Allocations() as made:
            case(x, None, pairs=(pairs[:k], pairs[k:])).backward()
        peaks.append(made.peak)
    assert peaks[1] <= 2.3 * peaks[0]
    assert peaks[1] < 40_000 * 2 * 150  # bytes a pair; its two rows alone are 512


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "snr", "manhattan", 3])
@both_ways
def test_every_distance_of_listed_pairs(distance: Any) -> None:
    x, labels = draw(13)
    pairs = everyone(labels)
    with tile_shape(5, 4):
        whole = nf.batch_contrastive_loss(x, labels, distance=distance)
        agree(nf.batch_contrastive_loss(x, None, pairs=pairs, distance=distance), whole, x)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@both_ways
def test_near_rows_keep_their_distance(distance: Any) -> None:
    x, _ = draw(8)
    rows = x.detach()[:1].repeat(8, 1) + 1e-3 * x.detach()
    rows, wide = rows.float(), rows.float().double()
    pairs = torch.arange(8).view(4, 2), torch.zeros(0, 2, dtype=torch.int64)
    found, true = (
        nf.batch_contrastive_loss(v, None, pairs=pairs, distance=distance, squared=False)
        for v in (rows, wide)
    )
    torch.testing.assert_close(found.double(), true, rtol=2e-4, atol=0)


def test_many_pairs_are_measured_in_tiles_and_few_are_gathered() -> None:
    x = torch.randn(300, 4, requires_grad=True)
    made = []
    for k in (1000, 2000):  # of 90,000 pairs
        row = torch.arange(k) % 300
        pairs = torch.stack([row, (row + 1) % 300], 1)
        with Allocations(x) as found:
            nf.batch_contrastive_loss(x, None, pairs=(pairs, [])).backward()
        made.append(found.largest)
    assert made[0] < 90_000 <= made[1]


def test_a_tile_rule_sees_only_the_listed_pairs() -> None:
    x, labels = draw(12)
    near, far = (p.unique(dim=0) for p in some(everyone(labels), 20))

    def margin(tile: nf.Tile) -> Tensor:
        d = tile.closeness
        return (d * tile.positive).sum(1) + ((1 - d).relu() * tile.negative).sum(1)

    with tile_shape(5, 4):
        found = nf.batch_loss(margin, x, None, distance="euclidean", pairs=(near, far))
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    true = (d[tuple(near.T)].sum() + (1 - d[tuple(far.T)]).relu().sum()) / 12
    agree(found, true, x)


@both_ways
def test_forces_shows_the_listed_pairs_alone() -> None:
    x, labels = draw(12)
    near, far = (p.unique(dim=0) for p in some(everyone(labels), 10))
    for loss in (nf.sup_con_loss, nf.batch_contrastive_loss, nf.nt_xent_loss):
        shown = nf.forces(loss, x, labels, pairs=(near, far), k=100)
        pairs = {(int(i), int(j)) for i, j in torch.cat([near, far])}
        acting = shown.force.abs() > 0
        seen = zip(shown.anchor[acting].tolist(), shown.other[acting].tolist(), strict=True)
        assert set(seen) <= pairs
        assert int(acting.sum()) >= len(near)
        similar = set(listed(near))
        for i, j, is_similar in zip(
            shown.anchor.tolist(), shown.other.tolist(), shown.similar.tolist(), strict=True
        ):
            assert is_similar == ((i, j) in similar)
        assert "pull" in str(nf.explain(loss, x, labels, pairs=(near, far)))


# Each pair by itself.


@both_ways
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["contrastive", "cosine", "nt_xent"])
def test_per_pair_is_the_loss_of_each_pair(name: str, weighted: bool) -> None:
    x, labels = draw(12)
    near, far = some(everyone(labels), 20)
    weight = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    terms = CASES[name].terms(x, x, listed(near), listed(far))
    by = weight if weighted else torch.ones(12, dtype=torch.float64)
    true = torch.stack([t * by[i] for t, i, _ in terms])
    found = nf.per_pair(
        CASES[name].loss, x, labels, pairs=(near, far), weight=weight if weighted else None
    )
    agree(torch.cat([found.positive, found.negative]), true, x)
    assert len(found.positive) == 20
    assert len(found.negative) == (0 if name == "nt_xent" else 20)


def test_per_pair_of_a_module_and_of_a_rule() -> None:
    x, labels = draw(12)
    pairs = some(everyone(labels), 20)
    of_module = nf.per_pair(nf.BatchContrastiveLoss(margin=2.0), x, None, pairs=pairs)
    of_function = nf.per_pair(nf.batch_contrastive_loss, x, None, margin=2.0, pairs=pairs)
    rule = nf.PairRule(lambda d: d**2, lambda d: (2 - d).relu() ** 2)
    of_rule = nf.per_pair(nf.batch_loss, rule, x, None, distance="euclidean", pairs=pairs)
    for other in (of_module, of_rule):
        torch.testing.assert_close(other.positive, of_function.positive)
        torch.testing.assert_close(other.negative, of_function.negative)


def test_what_has_no_loss_of_a_pair_is_refused() -> None:
    x, labels = draw(6)
    with pytest.raises(TypeError, match="A pair of this loss has no loss of its own"):
        nf.per_pair(nf.sup_con_loss, x, labels, pairs=everyone(labels))
    with pytest.raises(TypeError, match="per_pair needs the pairs"):
        nf.per_pair(nf.batch_contrastive_loss, x, labels)


def test_per_pair_takes_labels_by_name_or_none_at_all() -> None:
    x, labels = draw(6)
    pairs = everyone(labels)
    true = nf.per_pair(nf.batch_cosine_loss, x, labels, pairs=pairs)
    for found in (
        nf.per_pair(nf.batch_cosine_loss, x, labels=labels, pairs=pairs),
        nf.per_pair(nf.batch_cosine_loss, x, pairs=pairs),
    ):
        assert torch.equal(found.positive, true.positive)
        assert torch.equal(found.negative, true.negative)
    with pytest.raises(ValueError, match="share no label"):
        nf.per_pair(nf.batch_cosine_loss, x, labels=torch.arange(6), pairs=pairs)
    with pytest.raises(TypeError, match="returns the loss of each pair: leave reduction out"):
        nf.per_pair(nf.batch_cosine_loss, x, pairs=pairs, reduction="sum")
    with pytest.raises(TypeError, match="needs the embeddings by position"):
        nf.per_pair(nf.batch_cosine_loss, pairs=pairs)


def test_per_pair_refuses_a_rule_of_anchors() -> None:
    x, labels = draw(6)
    how = {"distance": "euclidean", "pairs": everyone(labels)}

    def rule(tile: nf.Tile) -> Tensor:
        return (tile.closeness * tile.positive).sum(1)

    for more in ({}, {"weight": torch.ones(6)}):
        with pytest.raises(TypeError, match="A pair of this loss has no loss of its own"):
            nf.per_pair(nf.batch_loss, rule, x, labels, **how, **more)


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("balanced", [True, False])
def test_a_rule_with_a_learned_margin_over_a_list(balanced: bool, reduction: Any) -> None:
    """Repeated pairs, and pairs of both kinds, count as often as they are listed."""
    x, labels = draw(11)
    near, far = some(everyone(labels), 17)
    far = torch.cat([far, near[:2]])
    margin = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0, 2, 11, dtype=torch.float64)

    def pull(d: Tensor, m: Tensor) -> Tensor:
        return d**2

    def push(d: Tensor, m: Tensor) -> Tensor:
        return (m - d).relu() ** 2

    rule = nf.PairRule(pull, push, balanced=balanced)
    how = {"distance": "euclidean", "learned": (margin,), "pairs": (near, far)}
    found = nf.batch_loss(rule, x, None, weight=weight, reduction=reduction, **how)
    d = [(x[p[:, 0]] - x[p[:, 1]]).norm(dim=1) for p in (near, far)]
    kinds = ("similar", "dissimilar") if balanced else ("pair", "pair")
    losses = torch.cat([pull(d[0], margin), push(d[1], margin)])
    rows = torch.cat([near, far])[:, 0].tolist()
    named = [kinds[0]] * len(near) + [kinds[1]] * len(far)
    terms = list(zip(losses, rows, named, strict=True))
    agree(found, oracle.reduced(terms, reduction, 11, weight.tolist()), x, margin)
    each = nf.per_pair(nf.batch_loss, rule, x, None, **how)
    agree(torch.cat([each.positive, each.negative]), losses, x, margin)


# What is refused.


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 1]], r"pairs must be what a miner found .*, or \(similar, dissimilar\)"),
        (torch.zeros(4, 2), r"pairs must be what a miner found .* got Tensor"),
        (([[0, 1]],) * 4, r"got tuple of 4\..* pass \(torch.stack\(\[a1, p\], 1\), torch.stack\("),
        (
            ([[0, 1.5]], []),
            r"^pairs\[0\], the similar ones, must be row indices of an integer dtype",
        ),
        (([], [[True, False]]), r"^pairs\[1\], the dissimilar ones, must be row indices"),
        (([[0, 1, 2]], []), r"must have shape \(k, 2\).* got \(1, 3\)"),
        (([0, 1], []), r"must have shape \(k, 2\).* got \(2,\)"),
        (
            ([[0, 6]], []),
            r"^pairs\[0\], the similar ones: entry 0 is \[0, 6\], whose other row is not in the "
            r"batch, which has rows 0 to 5 \(1 of 1\)\.$",
        ),
        (
            ([], [[0, 1], [-1, 2]]),
            r"entry 1 is \[-1, 2\], whose anchor is not in the batch.*1 of 2",
        ),
        (
            ([[2, 2]], []),
            r"entry 0 is \[2, 2\], whose other row is the anchor itself \(1 of 1\)\.$",
        ),
        (
            ([[0, 2], [0, 1]], []),
            r"^pairs\[0\], the similar ones: entry 1 is \[0, 1\], whose rows share no label "
            r"\(1 of 2\)\. Pass labels=None if",
        ),
        (([], [[0, 2]]), r"^pairs\[1\], the dissimilar ones: entry 0 .* whose rows share a label"),
        (
            mine.FoundPairs(torch.tensor([[0, 1]]), torch.zeros(0, 2, dtype=torch.long)),
            r"^pairs\.positive, the similar ones: entry 0 is \[0, 1\]",
        ),
    ],
)
@every_case
def test_bad_pairs_are_refused(case: Case, pairs: Any, message: str) -> None:
    x, labels = torch.randn(6, 3), [0, 1, 0, 1, 0, 1]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        case(x, labels, pairs=pairs)
    assert "\n" not in str(caught.value)


def test_labels_are_needed_without_pairs() -> None:
    x = torch.randn(6, 3)
    for case in CASES.values():
        with pytest.raises(TypeError, match="labels must say which rows are similar"):
            case(x, None)
    with pytest.raises(TypeError, match=r"reference\.labels must be given if labels are"):
        nf.sup_con_loss(x, [0] * 6, pairs=([[0, 1]], []), reference=nf.Reference(x, None))
    own = nf.Reference(x, None, own=torch.arange(6))
    with pytest.raises(ValueError, match="whose other row is the anchor itself"):
        nf.sup_con_loss(x, None, pairs=([[1, 1]], []), reference=own)
    found = mine.hard_negatives(x[:3], None)
    with pytest.raises(ValueError, match="were found for 3 rows, and the batch has 6"):
        nf.sup_con_loss(x, None, pairs=([], found))


def test_own_of_a_reference_is_checked_with_a_list_too() -> None:
    """Else -2 is a row from the end, and 6 no row at all."""
    x = torch.randn(3, 2)
    for own in ([0, 1, 6], [0, -2, 1]):
        against = nf.Reference(torch.randn(6, 2), [0, 1, 2, 0, 1, 2], own=own)
        for labels in ([0, 1, 2], None):
            with pytest.raises(ValueError, match=r"reference\.own must be a row of the reference"):
                nf.sup_con_loss(x, labels, pairs=([[0, 3]], []), reference=against)
            with pytest.raises(ValueError, match=r"reference\.own must be a row of the reference"):
                nf.batch_triplet_loss(x, labels, triplets=[[0, 3, 1]], reference=against)
    nowhere = nf.Reference(torch.randn(0, 2), None)
    with pytest.raises(ValueError, match=r"not in the reference, which is empty \(1 of 1\)"):
        nf.sup_con_loss(x, None, pairs=([[0, 0]], []), reference=nowhere)


def test_the_list_may_change_before_the_backward_pass() -> None:
    x, labels = draw(8)
    near, far = everyone(labels)
    loss = nf.sup_con_loss(x, None, pairs=(near, far), reduction="none").sum()
    (true,) = torch.autograd.grad(loss, x, retain_graph=True)
    near.zero_()
    far.zero_()
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, true)
