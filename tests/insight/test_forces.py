"""`forces` shows what the loss does: its forces rebuild the gradient, and its top k are the top."""

from functools import partial

import pytest
import torch
from torch import Tensor

import nearfar as nf


def batch(n: int = 40, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 9, (n,), generator=generator)


LOSSES = [
    (nf.sup_con_loss, {}),
    (nf.sup_con_loss, {"decoupled": True, "reduction": "sum"}),
    (nf.nt_xent_loss, {}),
    (nf.multi_similarity_loss, {}),
    (nf.circle_loss, {"scale": 8.0}),
    (nf.batch_cosine_loss, {}),
]


@pytest.mark.parametrize(("loss", "keywords"), LOSSES)
def test_all_forces_together_are_the_gradient(loss, keywords):
    x, labels = batch()
    unit = torch.nn.functional.normalize(x, dim=1).requires_grad_()
    value = loss(unit, labels, **keywords)
    (gradient,) = torch.autograd.grad(value, unit)
    shown = nf.forces(loss, unit, labels, k=40 * 40, **keywords)
    assert shown.loss == pytest.approx(value.item())
    # Above 0 a force raises the similarity of the two: it is minus the derivative by it.
    matrix = torch.zeros(40, 40, dtype=torch.float64)
    by_distance = loss is nf.batch_cosine_loss
    matrix[shown.anchor, shown.other] = shown.force
    rebuilt = -(matrix + matrix.T) @ unit.detach()
    along = (rebuilt * unit.detach()).sum(1, keepdim=True)  # normalisation takes this part away
    torch.testing.assert_close(rebuilt - along * unit.detach(), gradient, atol=1e-9, rtol=1e-9)
    value_of = 1 - unit @ unit.T if by_distance else unit @ unit.T
    torch.testing.assert_close(shown.closeness, value_of[shown.anchor, shown.other].detach())
    assert torch.equal(shown.similar, labels[shown.anchor] == labels[shown.other])
    torch.testing.assert_close(shown.pull, matrix.clamp(min=0).sum(1))
    torch.testing.assert_close(shown.push, -matrix.clamp(max=0).sum(1))


@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (64, 64)])
def test_the_strongest_are_the_strongest_whatever_the_tile(tile):
    x, labels = batch()
    everything = nf.forces(nf.sup_con_loss, x, labels, k=40 * 40)
    with nf.engine.budget.tile_shape(*tile):
        few = nf.forces(nf.sup_con_loss, x, labels, k=5)
    torch.testing.assert_close(few.force, everything.force[:5])
    assert torch.equal(few.anchor, everything.anchor[:5])
    assert torch.equal(few.other, everything.other[:5])


def test_two_towers_proxies_and_modules():
    x, labels = batch()
    y = x.flip(0)
    clip = nf.forces(nf.CLIPLoss(scale=5.0), x, y, k=1600)
    assert torch.equal(clip.similar, clip.anchor == clip.other)
    assert (clip.force[clip.similar] > 0).all()
    assert (clip.force[~clip.similar] < 0).all()
    siglip = nf.forces(nf.siglip_loss, x, y, scale=5.0, bias=-3.0, k=1)
    cosines = torch.nn.functional.cosine_similarity(x[siglip.anchor], y[siglip.other])
    torch.testing.assert_close(siglip.closeness, cosines)
    anchors = nf.forces(nf.proxy_anchor_loss, x, x[:9], labels)
    assert anchors.pull.shape == (9,)


def test_the_forces_of_info_nce_are_its_probabilities():
    """By the similarity to a negative, the derivative is its probability over the temperature."""
    x, _ = batch()
    query, positive, hard = x[:9], x[9:18], x[18:21]
    shown = nf.forces(
        nf.info_nce_loss, query, positive, k=200, temperature=0.5, hard_negatives=hard
    )
    unit = torch.nn.functional.normalize(x, dim=1)
    cosine = unit[:9] @ unit[9:21].T  # the hard negatives are columns 9 to 11
    force = (torch.eye(9, 12, dtype=torch.float64) - (cosine / 0.5).softmax(1)) / 0.5 / 9
    torch.testing.assert_close(shown.force, force[shown.anchor, shown.other])
    torch.testing.assert_close(shown.closeness, cosine[shown.anchor, shown.other])
    assert len(shown.force) == 9 * 12
    with pytest.raises(TypeError, match=r"For info_nce_loss on aligned rows use nearfar\.explain"):
        nf.forces(nf.info_nce_loss, query, positive, hard)


def test_distances_are_shown_as_distances():
    x, labels = batch()
    shown = nf.forces(nf.batch_contrastive_loss, x, labels, margin=3.0, k=3)
    torch.testing.assert_close(shown.closeness, (x[shown.anchor] - x[shown.other]).norm(dim=1))
    assert "anchor" in str(shown)


def test_errors_teach():
    x, labels = batch()
    with pytest.raises(
        TypeError, match=r"For contrastive_loss on aligned rows use nearfar\.explain"
    ):
        nf.forces(nf.contrastive_loss, x, x, labels > 3)
    for none in ({"loss": nf.SupConLoss(reduction="none")}, {"reduction": "none"}):
        with pytest.raises(ValueError, match='reduction must be "mean" or "sum"'):
            nf.forces(none.pop("loss", nf.sup_con_loss), x, labels, **none)
    with pytest.raises(TypeError, match=r"sup_con_loss takes x, labels, .*; got temp\."):
        nf.forces(nf.sup_con_loss, x, labels, temp=0.1)
    with pytest.raises(ValueError, match="k must be"):
        nf.forces(nf.sup_con_loss, x, labels, k=0)
    with pytest.raises(ValueError, match="k must be"):
        nf.forces(nf.sup_con_loss, x, labels, k=True)


def test_a_positive_pair_of_quadruplets_is_shown_once():
    """Two terms pull it; their sum is shown."""
    x, labels = batch(n=20, d=3)
    d = (x[:, None] - x).norm(dim=2).requires_grad_()
    same = labels[:, None] == labels
    near, far = same & ~torch.eye(20, dtype=torch.bool), ~same
    loss = 0.0
    for i, j in near.nonzero().tolist():
        for k in far[i].nonzero().flatten().tolist():
            others = (far[k] & far[i]).nonzero().flatten().tolist()
            for m in others:
                loss += (d[i, j] - d[i, k] + 1).relu() + (d[i, j] - d[k, m] + 0.5).relu()
    (expected,) = torch.autograd.grad(loss, d)
    shown = nf.forces(nf.batch_quadruplet_loss, x, labels, k=20 * 20, reduction="sum")
    pairs = list(zip(shown.anchor.tolist(), shown.other.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    found = torch.zeros(20, 20, dtype=torch.float64)
    found[shown.anchor, shown.other] = shown.force
    assert shown.loss == pytest.approx(loss.item())
    torch.testing.assert_close(found[near], expected[near])
    torch.testing.assert_close(found + found.T, expected + expected.T)


def test_one_comparison_at_a_time():
    x, _ = batch()
    with pytest.raises(ValueError, match="one comparison"):
        nf.forces(nf.info_nce_loss, x[:9], x[9:18], hard_negatives=x[18:20], symmetric=True)


def twice(x: Tensor, labels: Tensor) -> Tensor:
    return 2 * nf.sup_con_loss(x, labels)


@pytest.mark.parametrize(
    "loss", [twice, partial(nf.sup_con_loss, temperature=0.1), nf.triplet_stats, torch.nn.ReLU()]
)
def test_only_losses_of_nearfar_are_accepted(loss):
    """A function that calls one is refused: its own forces could not be told from the loss's."""
    x, labels = batch()
    for look in (nf.forces, nf.explain):
        with pytest.raises(
            TypeError, match=r"one of nearfar's losses itself.*followed by its arguments"
        ):
            look(loss, x, labels)


def test_the_reduction_counts():
    x, labels = batch()
    total = nf.forces(nf.sup_con_loss, x, labels, k=3, reduction="sum")
    mean = nf.forces(nf.sup_con_loss, x, labels, k=3)
    n = total.loss / mean.loss
    assert n == pytest.approx(int(((labels[:, None] == labels).sum(1) > 1).sum()))
    torch.testing.assert_close(total.force, n * mean.force)
    module = nf.forces(nf.SupConLoss(reduction="sum"), x, labels, k=3)
    torch.testing.assert_close(module.force, total.force)
    with torch.inference_mode():
        torch.testing.assert_close(nf.forces(nf.sup_con_loss, x, labels, k=3).force, mean.force)


def test_nothing_to_compare_with_has_no_forces():
    x, labels = batch()
    nothing = nf.Reference(x[:0], labels[:0])
    with pytest.raises(ValueError, match="nothing to compare with"):
        nf.forces(nf.sup_con_loss, x, labels, reference=nothing)


def test_forces_takes_whatever_the_loss_takes():
    x, labels = batch()
    whole = (8 * x).round().long()
    by_hand = nf.forces(nf.sup_con_loss, whole.float(), labels, k=3)
    torch.testing.assert_close(nf.forces(nf.sup_con_loss, whole, labels, k=3).force, by_hand.force)
    with torch.inference_mode():
        shown = nf.forces(nf.clip_loss, x.clone(), x.flip(0), k=3, scale=5.0)
    torch.testing.assert_close(
        shown.force, nf.forces(nf.clip_loss, x, x.flip(0), k=3, scale=5.0).force
    )
    for wrong in (2.5, "3"):
        with pytest.raises(ValueError, match="integer of at least 1"):
            nf.forces(nf.sup_con_loss, x, labels, k=wrong)
    with pytest.raises(ValueError, match="the batch is empty"):
        nf.forces(nf.sup_con_loss, x[:0], labels[:0])
    with pytest.raises(TypeError, match="by position"):
        nf.forces(nf.sup_con_loss, x=x, labels=labels)
