"""The shape of a space and its neighbours against loops, and the signs of collapse."""

import json

import numpy as np
import pytest
import torch

from nearfar.engine.budget import tile_shape
from nearfar.evaluate import neighbours, shape


def draw(n=60, d=5, classes=7, seed=0):
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=chance)
    return torch.randn(n, d, generator=chance, dtype=torch.float64), labels


@pytest.mark.parametrize("tile", [(512, 1024), (7, 9)])
@pytest.mark.parametrize("multi", [False, True])
def test_alignment_and_uniformity_equal_their_formulas(tile, multi):
    x, labels = draw()
    if multi:
        labels = torch.rand(60, 4, generator=torch.Generator().manual_seed(1)) < 0.3
        near = (labels[:, None] & labels[None]).any(2)
    else:
        near = labels[:, None] == labels
    u = x / x.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(60, 60, offset=1)
    squares = (u[i] - u[j]).square().sum(1)
    with tile_shape(*tile):
        found = shape(x, labels)
    assert found.alignment == pytest.approx(float(squares[near[i, j]].mean()))
    assert found.uniformity == pytest.approx(float((-2 * squares).exp().mean().log()))


@pytest.mark.parametrize("size", [(60, 5), (5, 60)])
def test_the_spectrum_is_that_of_the_singular_values(size):
    x, _ = draw(*size)
    found = shape(x)
    spectrum = torch.linalg.svdvals(x)
    np.testing.assert_allclose(found.singular_values, spectrum, rtol=1e-9)
    p = (spectrum / spectrum.sum()).numpy()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert (found.n, found.d) == size
    norms = x.norm(dim=1).numpy()
    assert found.norms == pytest.approx((norms.min(), np.median(norms), norms.max()))


def test_signs_of_collapse():
    x, labels = draw(200, 8)
    healthy = shape(x, labels)
    assert healthy.effective_rank > 7
    assert healthy.dead_share == 0
    assert healthy.notes == ()
    line = shape(x[:, :1] * torch.ones(8), labels)
    assert line.effective_rank == pytest.approx(1, abs=1e-4)
    half = torch.cat([x[:, :4], torch.full((200, 4), 3.0)], 1)
    assert shape(half).dead_share == 0.5
    point = shape(torch.ones(50, 8) + 1e-6 * x[:50], labels[:50])
    assert point.dead_share == 1
    assert point.uniformity == pytest.approx(0, abs=1e-6)
    assert point.alignment == pytest.approx(0, abs=1e-6)


def test_zero_rows_one_row_and_few_rows_have_a_shape():
    zero = shape(torch.zeros(3, 4), [0, 0, 1])
    assert zero.dead_share == 1
    json.dumps(zero.as_dict(), allow_nan=False)
    one = shape(torch.ones(1, 4), [0])
    assert (one.alignment, one.uniformity) == (None, None)
    assert "at most 1 of 4 dimensions" in str(one)
    assert "No two rows share a label" in str(one)
    with pytest.raises(ValueError, match="at least one row"):
        shape(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"x\[1\] is not finite"):
        shape([[0.0], [float("inf")]])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_hardest_pairs_are_each_rows_hardest_each_once(distance):
    x, labels = draw(40)
    u = x / x.norm(dim=1, keepdim=True) if distance == "cosine" else x
    d = torch.cdist(u, u) if distance == "euclidean" else 1 - u @ u.T
    found = neighbours(x, labels, top=6, distance=distance)
    positives, negatives = {}, {}
    for i in range(40):
        same = [j for j in range(40) if j != i and labels[j] == labels[i]]
        other = [j for j in range(40) if labels[j] != labels[i]]
        if same:
            j = max(same, key=lambda j: d[i, j])
            positives[tuple(sorted((i, j)))] = float(d[i, j])
        j = min(other, key=lambda j: d[i, j])
        negatives[tuple(sorted((i, j)))] = float(d[i, j])
    for pairs, expected, farthest in (
        (found.hardest_positives, positives, True),
        (found.hardest_negatives, negatives, False),
    ):
        hardest = sorted(expected.items(), key=lambda item: item[1], reverse=farthest)[:6]
        assert [(pair.i, pair.j) for pair in pairs] == [pair for pair, _ in hardest]
        assert [pair.distance for pair in pairs] == pytest.approx([value for _, value in hardest])


def test_planted_label_errors_are_found_and_no_others():
    chance = torch.Generator().manual_seed(0)
    true = torch.arange(300) // 30
    x = 5 * torch.randn(10, 16, generator=chance)[true] + torch.randn(300, 16, generator=chance)
    labels = true.clone()
    wrong = torch.randperm(300, generator=chance)[:9]
    labels[wrong] = (true[wrong] + 1) % 10
    found = neighbours(x, labels)
    assert {s.index for s in found.suspects} == set(wrong.tolist())
    assert all(s.suggested == true[s.index] and s.label == labels[s.index] for s in found.suspects)
    assert "Likely label errors" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert neighbours(x, true).suspects == ()


def test_small_classes_and_single_rows_are_not_suspected():
    chance = torch.Generator().manual_seed(0)
    big, pair = torch.randn(50, 4, generator=chance), 0.01 * torch.randn(2, 4, generator=chance)
    x = torch.cat([big, 4 + pair, torch.full((1, 4), 0.1)])
    labels = torch.tensor([0] * 50 + [1, 1] + [2])
    assert neighbours(x, labels, distance="euclidean").suspects == ()


def test_multi_labels_have_hard_pairs_and_no_suspects():
    x, _ = draw(20)
    labels = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    found = neighbours(x, labels)
    assert found.hardest_negatives
    assert found.suspects == ()
