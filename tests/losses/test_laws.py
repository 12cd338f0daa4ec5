"""What must not change a loss, and what must change it by a known factor, on random data."""

from typing import Any

import pytest
import torch
from cases import CASES, Case, Tensors, over
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfar
from nearfar import (
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
    info_nce_loss,
    softmax_loss,
    triplet_loss,
)

few = settings(max_examples=8, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**20)
rows = st.integers(1, 6)
widths = st.integers(2, 6)
factors = st.floats(1e-3, 1e3)


def obeying(law: str) -> list[Case]:
    return [case for case in CASES if law in case.laws]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def random_rotation(d: int, seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=chance, dtype=torch.float64)).Q


def belongs_to_rows(case: Case, k: int) -> bool:
    """Whether argument k has a row for each loss, as shared negatives have not."""
    return case.shapes(7, 3)[k][0] == 7


@over(CASES)
@few
@given(seeds, rows, widths)
def test_order_of_rows_orders_the_losses(case: Case, seed: int, n: int, d: int) -> None:
    x, labels = case.draw(n, d, seed)
    order = shuffled(n, seed)
    moved = tuple(a[order] if belongs_to_rows(case, k) else a for k, a in enumerate(x))
    close(case.run(moved, tuple(y[order] for y in labels)), case.run(x, labels)[order])


@over([case for case in CASES if case.reach(1, 0, 3) == {0}])
@few
@given(seeds, st.integers(2, 6), widths)
def test_halves_of_a_batch_add_up(case: Case, seed: int, n: int, d: int) -> None:
    x, labels = case.draw(n, d, seed)

    def part(rows: slice) -> Tensor:
        mine = tuple(a[rows] if belongs_to_rows(case, k) else a for k, a in enumerate(x))
        return case.run(mine, tuple(y[rows] for y in labels), "sum")

    close(part(slice(0, n // 2)) + part(slice(n // 2, n)), case.run(x, labels, "sum"))


@over(obeying("swap"))
@few
@given(seeds, rows, widths)
def test_the_first_two_arguments_are_interchangeable(case: Case, seed: int, n: int, d: int) -> None:
    x, labels = case.draw(n, d, seed)
    close(case.run((x[1], x[0], *x[2:]), labels), case.run(x, labels))


@over(obeying("rotate"))
@few
@given(seeds, rows, widths)
def test_rotation_changes_nothing(case: Case, seed: int, n: int, d: int) -> None:
    x, labels = case.draw(n, d, seed)
    turn = random_rotation(d, seed)
    close(case.run(tuple(a @ turn for a in x), labels), case.run(x, labels))


@over(obeying("translate"))
@few
@given(seeds, rows, widths, st.floats(-100, 100))
def test_translation_changes_nothing(case: Case, seed: int, n: int, d: int, offset: float) -> None:
    x, labels = case.draw(n, d, seed)
    close(case.run(tuple(a + offset for a in x), labels), case.run(x, labels))


@over(obeying("rescale"))
@few
@given(seeds, rows, widths, factors, st.data())
def test_length_of_a_row_changes_nothing(
    case: Case, seed: int, n: int, d: int, factor: float, data: Any
) -> None:
    x, labels = case.draw(n, d, seed)
    k = data.draw(st.integers(0, len(x) - 1), "argument")
    longer = x[k].clone()
    longer[data.draw(st.integers(0, len(longer) - 1), "row")] *= factor
    close(case.run((*x[:k], longer, *x[k + 1 :]), labels), case.run(x, labels))


@over(obeying("pad"))
@few
@given(seeds, rows, widths)
def test_embedding_in_more_dimensions_changes_nothing(
    case: Case, seed: int, n: int, d: int
) -> None:
    x, labels = case.draw(n, d, seed)
    wider = tuple(torch.nn.functional.pad(a, (0, 3)) for a in x)
    close(case.run(wider, labels), case.run(x, labels))


def pairs(seed: int, n: int, d: int = 4) -> Tensors:
    chance = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, d, generator=chance, dtype=torch.float64))


@few
@given(seeds, rows, factors, st.floats(0, 10))
def test_contrastive_scales_with_the_square(seed: int, n: int, factor: float, m: float) -> None:
    x1, x2 = pairs(seed, n)
    y = torch.arange(n) % 2 == 0
    scaled = contrastive_loss(factor * x1, factor * x2, y, margin=factor * m, reduction="none")
    expected = factor**2 * contrastive_loss(x1, x2, y, margin=m, reduction="none")
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-11 * factor**2)


@few
@given(seeds, rows, factors, st.floats(0, 10), st.booleans())
def test_triplet_scales(seed: int, n: int, factor: float, m: float, swap: bool) -> None:
    x1, x2 = pairs(seed, n)
    x3 = x2.flip(1)
    scaled = triplet_loss(
        factor * x1, factor * x2, factor * x3, margin=factor * m, swap=swap, reduction="none"
    )
    expected = factor * triplet_loss(x1, x2, x3, margin=m, swap=swap, reduction="none")
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-11 * factor)


def on_pairs(name: str, x1: Tensor, x2: Tensor, y: Any, **how: Any) -> Tensor:
    """Any of the losses that take pair labels."""
    if name == "from_distance":
        d = (x1 - x2).norm(dim=1)
        return contrastive_loss_from_distance(d, y, margin=3.0, reduction="none", **how)
    if name == "cosine":
        return cosine_loss(x1, x2, y, margin=-0.5, reduction="none", **how)
    return contrastive_loss(x1, x2, y, margin=3.0, reduction="none", **how)


labelled = pytest.mark.parametrize("name", ["contrastive", "from_distance", "cosine"])


@labelled
@few
@given(seeds, rows, st.sampled_from([torch.int64, torch.uint8, torch.float32, torch.float64]))
def test_every_spelling_of_a_label_means_the_same(
    name: str, seed: int, n: int, dtype: torch.dtype
) -> None:
    x1, x2 = pairs(seed, n)
    similar = shuffled(n, seed) % 2 == 0
    expected = on_pairs(name, x1, x2, similar)
    ones_similar, zeros_similar = similar.to(dtype), (~similar).to(dtype)
    assert torch.equal(on_pairs(name, x1, x2, ones_similar, similar_label=1), expected)
    assert torch.equal(on_pairs(name, x1, x2, zeros_similar, similar_label=0), expected)
    assert torch.equal(on_pairs(name, x1, x2, similar, similar_label=1), expected)


@labelled
@few
@given(seeds, rows, st.floats(0, 1))
def test_degrees_are_linear_between_the_ends(name: str, seed: int, n: int, degree: float) -> None:
    x1, x2 = pairs(seed, n)
    degrees = torch.full((n,), degree, dtype=torch.float64)
    similar = on_pairs(name, x1, x2, torch.ones(n, dtype=torch.bool))
    dissimilar = on_pairs(name, x1, x2, torch.zeros(n, dtype=torch.bool))
    mixed = on_pairs(name, x1, x2, degrees, similar_label=1)
    close(mixed, degree * similar + (1 - degree) * dissimilar)
    close(on_pairs(name, x1, x2, 1 - degrees, similar_label=0), mixed)


@few
@given(seeds, rows, widths, st.sampled_from([0.0, 0.1, 1.0]))
def test_names_of_classes_mean_nothing(seed: int, n: int, c: int, smoothing: float) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=chance, dtype=torch.float64)
    target = torch.randint(c, (n,), generator=chance)
    new_name = shuffled(c, seed)
    renamed = torch.empty_like(logits)
    renamed[:, new_name] = logits
    how: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
    close(softmax_loss(renamed, new_name[target], **how), softmax_loss(logits, target, **how))


@few
@given(seeds, rows, widths, st.floats(-1e3, 1e3), st.sampled_from([0.0, 0.1, 1.0]))
def test_a_constant_on_all_logits_changes_nothing(
    seed: int, n: int, c: int, offset: float, smoothing: float
) -> None:
    logits = torch.randn(n, c, generator=torch.Generator().manual_seed(seed)).double()
    target = torch.arange(n) % c
    how: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
    close(softmax_loss(logits + offset, target, **how), softmax_loss(logits, target, **how))


normalized = pytest.mark.parametrize("normalize", [True, False])


@normalized
@few
@given(seeds, rows, st.integers(0, 5))
def test_shared_negatives_equal_their_copies(normalize: bool, seed: int, n: int, m: int) -> None:
    query, positive = pairs(seed, n)
    negatives = pairs(seed + 1, m)[0]
    how: dict[str, Any] = {"temperature": 0.3, "normalize": normalize, "reduction": "none"}
    copies = negatives.expand(n, m, 4)
    close(
        info_nce_loss(query, positive, negatives, **how),
        info_nce_loss(query, positive, copies, **how),
    )


@normalized
@few
@given(seeds, rows)
def test_in_batch_negatives_are_the_other_rows(normalize: bool, seed: int, n: int) -> None:
    query, positive = pairs(seed, n)
    how: dict[str, Any] = {"temperature": 0.3, "normalize": normalize, "reduction": "none"}
    spelled_out = torch.stack([positive[torch.arange(n) != i] for i in range(n)])
    close(
        info_nce_loss(query, positive, **how),
        info_nce_loss(query, positive, spelled_out, **how),
    )


@few
@given(seeds, rows)
def test_info_nce_is_the_softmax_of_its_similarities(seed: int, n: int) -> None:
    query, positive = pairs(seed, n)
    logits = query @ positive.T / 0.3
    close(
        info_nce_loss(query, positive, temperature=0.3, normalize=False),
        softmax_loss(logits, torch.arange(n)),
    )


@over([case for case in CASES if case.function is info_nce_loss])
@few
@given(seeds, rows, factors)
def test_temperature_divides_similarities(case: Case, seed: int, n: int, factor: float) -> None:
    """Without normalisation, rows `factor` longer at temperature `factor`^2 cost the same."""
    x, _ = case.draw(n, 4, seed)
    plain = case.run(x, (), normalize=False, temperature=0.4)
    longer = tuple(factor * a for a in x)
    close(case.run(longer, (), normalize=False, temperature=0.4 * factor**2), plain)
    as_tensor = torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(case.run(x, (), normalize=False, temperature=as_tensor), plain)


@few
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_adding_100_changes_no_euclidean_distance(seed: int, n: int, d: int) -> None:
    """Point 8 of the contract; mistake 7: the fast |a|^2 + |b|^2 - 2ab form is off by 1.0 here."""
    chance = torch.Generator().manual_seed(seed)
    x1, x2 = torch.nn.functional.normalize(torch.randn(2, n, d, generator=chance), dim=-1)
    moved1, moved2 = x1 + 100, x2 + 100
    similar = torch.ones(n, dtype=torch.bool)
    at_origin = contrastive_loss(
        moved1 - 100, moved2 - 100, similar, reduction="none"
    )  # the rounding of `x + 100` itself is not the loss's doing
    moved = contrastive_loss(moved1, moved2, similar, reduction="none")
    torch.testing.assert_close(moved.sqrt(), at_origin.sqrt(), rtol=1e-4, atol=0)


@few
@given(seeds, rows, widths)
def test_cosine_loss_is_one_minus_cosine_similarity(seed: int, n: int, d: int) -> None:
    x1, x2 = pairs(seed, n, d)
    close(cosine_loss(x1, x2, reduction="none"), 1 - nearfar.cosine_similarity(x1, x2))


@few
@given(seeds, rows, st.floats(0, 3))
def test_smooth_triplet_lies_just_above_the_hinge(seed: int, n: int, margin: float) -> None:
    x1, x2 = pairs(seed, n)
    how: dict[str, Any] = {"margin": margin, "reduction": "none"}
    hinge = triplet_loss(x1, x2, x2.flip(1), **how)
    smooth = triplet_loss(x1, x2, x2.flip(1), smooth=True, **how)
    assert ((smooth > hinge) & (smooth <= hinge + 0.6931471805599454)).all()
