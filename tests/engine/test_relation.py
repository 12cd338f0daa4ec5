"""Who is positive and who is negative for whom, against comparing every pair of labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batch_cases import LAYOUTS, PLAIN, multi_labels, over
from batch_oracle import Pairs, who
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfar
from nearfar import clip_loss, info_nce_loss, siglip_loss, sup_con_loss
from nearfar.engine.pair_sets import Diagonal, Listed, Masked, OneEach
from nearfar.engine.relation import Relation, across, matched, within
from nearfar.losses.batch import as_batch, as_towers, row_weight
from nearfar.reference import Reference

few = settings(max_examples=40, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**20)
CPU = torch.device("cpu")


def as_masks(pairs: Pairs, m: int) -> tuple[Tensor, Tensor]:
    positive, negative = (torch.zeros(len(pairs), m, dtype=torch.bool) for _ in range(2))
    for i, (near, far) in enumerate(pairs):
        positive[i, near] = True
        negative[i, far] = True
    return positive, negative


def assert_relation(relation: Relation, pairs: Pairs, chance: torch.Generator) -> None:
    """The same counts, and the same masks however the matrix is cut."""
    expected = as_masks(pairs, relation.m)
    assert relation.n_positives().tolist() == [len(near) for near, _ in pairs]
    assert relation.n_negatives().tolist() == [len(far) for _, far in pairs]
    n, m = relation.n, relation.m
    cuts = [(slice(0, n), slice(0, m))]
    for _ in range(6):
        ends = [sorted(torch.randint(0, k + 1, (2,), generator=chance).tolist()) for k in (n, m)]
        cuts.append(tuple(slice(*pair) for pair in ends))
    for rows, columns in cuts:
        block = relation.block(rows, columns)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        assert block.shape == shape
        for found, whole in zip(block.masks(), expected, strict=True):
            assert found.dtype == torch.bool
            assert torch.equal(found, whole[rows, columns])
        for mask in (block.similar, block.hidden):
            assert mask is None or mask.shape == shape


def labels_of(layout: str, n: int, chance: torch.Generator) -> Tensor:
    return (multi_labels if layout == "multi" else LAYOUTS[layout])(n, chance)


@pytest.mark.parametrize("layout", [*LAYOUTS, "multi"])
@few
@given(seeds, st.integers(0, 9))
def test_within_a_batch(layout: str, seed: int, n: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    labels = labels_of(layout, n, chance)
    assert_relation(within(labels, torch.zeros(n, 1)), who(labels), chance)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("layout", ["random", "one class", "singletons", "multi"])
@few
@given(seeds, st.integers(0, 7), st.integers(0, 7))
def test_against_a_reference(layout: str, declared: bool, seed: int, n: int, m: int) -> None:
    """With any rows declared, in any order, one perhaps twice, or under another label by now."""
    chance = torch.Generator().manual_seed(seed)
    labels, others = (labels_of(layout, k, chance) for k in (n, m))
    own = torch.randint(-1, m, (n,), generator=chance) if declared else None
    relation = across(labels, torch.zeros(n, 1), torch.zeros(m, 1), others, own)
    assert_relation(relation, who(labels, others, own), chance)


@few
@given(seeds, st.integers(0, 9), st.integers(0, 9))
def test_between_two_towers(seed: int, n: int, m: int) -> None:
    """With more columns than rows, as with hard negatives, and the other way round."""
    pairs = [([i] if i < m else [], [j for j in range(m) if j != i]) for i in range(n)]
    assert_relation(matched(n, m, CPU), pairs, torch.Generator().manual_seed(seed))


@few
@given(seeds, st.integers(1, 9))
def test_a_reference_that_is_the_batch_is_the_batch(seed: int, n: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    labels = LAYOUTS["random"](n, chance)
    x = torch.zeros(n, 1)
    assert_relation(across(labels, x, x, labels, torch.arange(n)), who(labels), chance)


@pytest.mark.parametrize("declared", [None, False, True])
def test_few_positives_are_listed_as_the_masks_say(declared: bool | None) -> None:
    """In blocks large enough for that, with rows of classes the reference does not know."""
    chance = torch.Generator().manual_seed(3)
    labels, others = torch.randint(-60, 60, (2, 300), generator=chance) * 2**55
    labels[:3] = 7
    if declared is None:
        relation, others, own = within(labels, torch.zeros(300, 1)), labels, torch.arange(300)
    else:
        own = torch.randint(-1, 300, (300,), generator=chance) if declared else None
        relation = across(labels, torch.zeros(300, 1), torch.zeros(300, 1), others, own)
    for rows, columns in (
        (slice(0, 300), slice(0, 300)),
        (slice(0, 130), slice(37, 300)),
        (slice(101, 300), slice(0, 133)),
    ):
        similar = labels[rows, None] == others[columns]
        if own is not None:
            itself = own[rows, None] == torch.arange(300)[columns]
            similar &= ~itself
        block = relation.block(rows, columns)
        assert isinstance(block.positives, Listed)
        assert torch.equal(torch.stack(block.positives.indices(), 1), similar.nonzero())
        assert torch.equal(block.masks()[0], similar)
        assert torch.equal(block.masks()[1], ~similar if own is None else ~(similar | itself))


@pytest.mark.parametrize("offset", [-2, 0, 1, 3])
def test_marks_do_the_same_in_every_form(offset: int) -> None:
    """To a tile, its sums and its forces, whether a diagonal, a list or a mask."""
    shape = (4, 5)
    chance = torch.Generator().manual_seed(offset + 2)
    tile, by_row, by_column = (torch.randn(s, generator=chance) for s in (shape, 4, 5))
    diagonal = Diagonal(shape, offset, CPU)
    mask = diagonal.mask()
    assert torch.equal(mask, torch.eye(9, 9).bool()[: shape[0], :].roll(offset, 1)[:, :5])
    forms = [diagonal, Listed(shape, *mask.nonzero(as_tuple=True)), Masked(mask)]
    if mask.sum(1).eq(1).all():
        forms.append(OneEach(shape, mask.nonzero()[:, 1]))
    for marks in forms:
        assert torch.equal(marks.mask(), mask)
        assert torch.equal(torch.stack(marks.indices(), 1), mask.nonzero())
        taken = marks.take(tile)
        for dim, size in ((0, 5), (1, 4)):
            sums = torch.ones(size)
            marks.add_sums(taken, sums, dim)
            torch.testing.assert_close(sums, 1 + tile.where(mask, 0).sum(dim))
        filled = tile.clone()
        marks.fill(filled, 9.0)
        assert torch.equal(filled, tile.masked_fill(mask, 9.0))
        for column, more in ((None, by_row[:, None]), (by_column, by_row[:, None] + by_column)):
            pulled = tile.clone()
            marks.add(pulled, by_row, column)
            torch.testing.assert_close(pulled, tile + more.expand(shape).where(mask, 0))


def test_counts_of_many_multi_labels() -> None:
    """Enough of them to be counted in blocks."""
    chance = torch.Generator().manual_seed(0)
    labels = multi_labels(2100, chance)
    relation = within(labels, torch.zeros(2100, 1))
    share = labels.double() @ labels.double().T > 0
    share.fill_diagonal_(False)
    assert torch.equal(relation.n_positives(), share.sum(1))


def test_counts_of_a_batch_too_large_for_one_mask() -> None:
    labels = torch.arange(300) % 7
    relation = within(labels, torch.zeros(300, 1))
    similar = labels[:, None] == labels
    similar.fill_diagonal_(False)
    assert torch.equal(relation.n_positives(), similar.sum(1))


def test_an_own_row_with_another_label_does_not_reduce_the_positives() -> None:
    """In a relation too large for one mask, where positives are counted from sorted labels."""
    n, m = 300, 400
    labels, others = torch.arange(n) % 10, torch.arange(m) % 10
    others[:5] = 11  # of rows 0 to 4, which have another label here
    own = torch.arange(n)
    relation = across(labels, torch.zeros(n, 1), torch.zeros(m, 1), others, own)
    similar = labels[:, None] == others
    similar[own, own] = False
    assert torch.equal(relation.n_positives(), similar.sum(1))


def test_a_row_is_not_similar_to_itself_even_with_labels_of_its_own() -> None:
    block = within([4, 4, 5], torch.zeros(3, 1)).block(slice(0, 3), slice(0, 3))
    positive, negative = block.masks()
    assert not positive.diagonal().any()
    assert not negative.diagonal().any()
    nothing = torch.zeros(3, 2, dtype=torch.bool)  # without any label, not even similar to oneself
    positive, negative = within(nothing, torch.zeros(3, 1)).block(slice(0, 3), slice(0, 3)).masks()
    assert not positive.any()
    assert torch.equal(negative, ~torch.eye(3, dtype=torch.bool))


# What is said about anything else: the argument, what came, the fix.

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LABELS = [0, 0, 1, 1]

# (what is raised, every word the message must hold, the call)
MESSAGES: dict[str, tuple[type[Exception], tuple[str, ...], Callable[[], Any]]] = {
    "x is a vector": (
        ValueError,
        ("x must have shape (n, d)", "got (3,)", "x[None]"),
        lambda: as_batch(X[0], [0], None, "mean"),
    ),
    "x is text": (TypeError, ("x must be",), lambda: as_batch("abc", [0], None, "mean")),
    "x is bool": (
        TypeError,
        ("x must hold real numbers", "torch.bool"),
        lambda: as_batch(X > 0, LABELS, None, "mean"),
    ),
    "x is complex": (
        TypeError,
        ("x must hold real numbers", "torch.complex64"),
        lambda: as_batch(X.to(torch.complex64), LABELS, None, "mean"),
    ),
    "x has no columns": (
        ValueError,
        ("x must have at least one column", "(4, 0)"),
        lambda: as_batch(X[:, :0], LABELS, None, "mean"),
    ),
    "too few labels": (
        ValueError,
        ("labels must have one entry per row", "3 labels for 4 rows"),
        lambda: as_batch(X, [0, 1, 2], None, "mean"),
    ),
    "float labels": (
        TypeError,
        ("labels must be class ids of an integer dtype", "torch.float32", "labels.long()"),
        lambda: as_batch(X, [0.0, 1.0, 2.0, 3.0], None, "mean"),
    ),
    "bool labels of one dimension": (
        TypeError,
        ("labels must be class ids", "torch.bool"),
        lambda: as_batch(X, [True] * 4, None, "mean"),
    ),
    "multi-labels of numbers": (
        TypeError,
        ("multi-labels and must be bool", "torch.int64", "labels.bool()"),
        lambda: as_batch(X, [[0, 1]] * 4, None, "mean"),
    ),
    "labels of three dimensions": (
        ValueError,
        ("labels must have shape (n,)", "(4, 1, 1)"),
        lambda: as_batch(X, torch.zeros(4, 1, 1, dtype=torch.long), None, "mean"),
    ),
    "a reference of rows alone": (
        TypeError,
        ("reference must hold rows and their labels", "nearfar.Reference(x, labels)", "Tensor"),
        lambda: sup_con_loss(X, LABELS, reference=X),
    ),
    "a reference of names": (
        TypeError,
        ("nearfar.Reference(x, labels)", "got dict"),
        lambda: sup_con_loss(X, LABELS, reference={"x": X, "labels": LABELS}),
    ),
    "reference without labels": (
        TypeError,
        ("reference.labels must have a label for each row of the reference",),
        lambda: as_batch(X, LABELS, Reference(X, None), "mean"),
    ),
    "reference of another width": (
        ValueError,
        ("reference.x must have rows of length 3", "(4, 2)"),
        lambda: as_batch(X, LABELS, Reference(X[:, :2], LABELS), "mean"),
    ),
    "reference that is a vector": (
        ValueError,
        ("reference.x must have shape", "(3,)"),
        lambda: as_batch(X, LABELS, Reference(X[0], [0]), "mean"),
    ),
    "too few labels of the reference": (
        ValueError,
        ("reference.labels must have one entry per row", "1 labels for 4 rows"),
        lambda: as_batch(X, LABELS, Reference(X, [0]), "mean"),
    ),
    "labels of two kinds": (
        ValueError,
        ("labels and reference.labels must be of the same kind", "(4,)", "(4, 2)"),
        lambda: as_batch(X, LABELS, Reference(X, [[True, False]] * 4), "mean"),
    ),
    "multi-labels of two widths": (
        ValueError,
        ("must be of the same kind", "(4, 3)", "(4, 2)"),
        lambda: as_batch(X, [[True] * 3] * 4, Reference(X, [[True] * 2] * 4), "mean"),
    ),
    "self out of range": (
        ValueError,
        ("reference.own must be a row of the reference, 0 to 3, or -1", "reference.own[1] is 4"),
        lambda: as_batch(X, LABELS, Reference(X, LABELS, [0, 4, 1, 2]), "mean"),
    ),
    "self below -1": (
        ValueError,
        ("or -1 for none", "reference.own[2] is -2"),
        lambda: as_batch(X, LABELS, Reference(X, LABELS, [0, 1, -2, 2]), "mean"),
    ),
    "self of floats": (
        TypeError,
        ("reference.own must be", "torch.float32"),
        lambda: as_batch(X, LABELS, Reference(X, LABELS, [0.0] * 4), "mean"),
    ),
    "too few selves": (
        ValueError,
        ("reference.own must have one entry per row", "3", "4 rows"),
        lambda: as_batch(X, LABELS, Reference(X, LABELS, [0, 1, 2]), "mean"),
    ),
    "towers of two lengths": (
        ValueError,
        ("second must have the shape of first, (4, 3)", "got (3, 3)"),
        lambda: as_towers(first=X, second=X[:3]),
    ),
    "towers of two widths": (
        ValueError,
        ("positive must have the shape of query, (4, 3)", "got (4, 2)"),
        lambda: info_nce_loss(X, X[:, :2]),
    ),
    "one weight per class": (
        ValueError,
        ("weight must have shape (4,)", "got (2,)", "class_weight[labels]"),
        lambda: row_weight([1.0, 2.0], X),
    ),
    "a single weight": (ValueError, ("weight must have shape", "got ()"), lambda: row_weight(2, X)),
    "a weight below 0": (
        ValueError,
        ("weight", "must be 0 or more", "-0.5"),
        lambda: row_weight([1, 1, -0.5, 1], X),
    ),
    "a bool weight": (
        TypeError,
        ("weight must hold real numbers", "torch.bool"),
        lambda: row_weight([True] * 4, X),
    ),
    "proxies of another width": (
        ValueError,
        ("proxies must have rows of length 3", "(2, 4)"),
        lambda: nearfar.proxy_nca_loss(X, torch.ones(2, 4), LABELS),
    ),
    "a class without a proxy": (
        ValueError,
        ("labels must be a class id from 0 to 0", "labels[2] is 1"),
        lambda: nearfar.proxy_anchor_loss(X, torch.ones(1, 3), LABELS),
    ),
    "a class below 0": (
        ValueError,
        ("labels must be a class id from 0 to 8", "labels[0] is -1"),
        lambda: nearfar.proxy_softmax_loss(X, torch.ones(9, 3), [-1, 0, 1, 2]),
    ),
    "an unknown distance": (
        ValueError,
        ("distance must be one of 'euclidean', 'sqeuclidean', 'cosine'", "'l2'"),
        lambda: nearfar.lifted_structure_loss(X, LABELS, distance="l2"),
    ),
    "negatives twice": (
        ValueError,
        ("hard_negatives", "leave negatives out"),
        lambda: info_nce_loss(X, X, X, hard_negatives=X),
    ),
    "hard negatives of another width": (
        ValueError,
        ("hard_negatives must have rows of length 3", "(2, 2)"),
        lambda: info_nce_loss(X, X, hard_negatives=torch.ones(2, 2)),
    ),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_an_error_names_the_argument_what_came_and_the_fix(what: str) -> None:
    error, words, call = MESSAGES[what]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_two_devices_are_refused_in_words() -> None:
    elsewhere = torch.empty(4, 3, device="meta")
    for call in (
        lambda: clip_loss(X, elsewhere, scale=1.0),
        lambda: siglip_loss(elsewhere, X, scale=1.0, bias=0.0),
        lambda: sup_con_loss(X, LABELS, reference=Reference(elsewhere, LABELS)),
    ):
        with pytest.raises(ValueError, match=r"is on .*; they must be on the same device: pass"):
            call()


@over(PLAIN)
def test_the_public_functions_check_their_data(case: Any) -> None:
    """Each array in turn without its second dimension."""
    data = case.draw(4)
    for name, array in data.rows.items():
        if array.ndim == 2:
            with pytest.raises(ValueError, match=rf"^{name}(\.x)? must have shape") as raised:
                case.run(data.at(**{name: array[0]}))
            assert "(4,)" in str(raised.value)


def test_row_weight_is_in_the_precision_of_the_loss() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for weight in ([1, 2, 3, 4], np.ones(4), torch.ones(4, dtype=torch.float16)):
            assert row_weight(weight, X.to(dtype)).dtype == torch.float32
    assert row_weight([1, 2, 3, 4], X.double()).dtype == torch.float64
    assert row_weight(None, X) is None
    assert not row_weight(torch.ones(4, requires_grad=True), X).requires_grad
