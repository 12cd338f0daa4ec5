"""What `explain` says is what the loss does; its findings fire where they should, only there."""

import json

import numpy as np
import pytest
import torch
from allocations import Allocations
from torch import Tensor

import nearfar as nf


def finding_names(explanation: nf.Explanation) -> list[str]:
    return [finding.name for finding in explanation.findings]


def clusters(n_classes: int = 8, noise: float = 0.3, d: int = 6) -> Tensor:
    """(n_classes, 4, d) items around well-separated centres: healthy embeddings."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(n_classes, 1, d, generator=generator)
    return centres + noise * torch.randn(n_classes, 4, d, generator=generator)


def healthy_pairs() -> tuple[Tensor, Tensor, Tensor]:
    x = clusters()
    x1 = torch.cat([x[:, 0], x[:, 1]])
    x2 = torch.cat([x[:, 2], x[:, 3].roll(1, 0)])
    return x1, x2, torch.arange(16) < 8


def healthy_tuples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = clusters()
    return x[:, 0], x[:, 1], x[:, 2].roll(1, 0), x[:, 3].roll(3, 0)


def test_force_is_the_derivative_and_turns_into_the_gradient_of_the_embeddings():
    x1, x2, y = healthy_pairs()
    x1 = x1.double().requires_grad_()
    x2 = x2.double()
    loss = nf.contrastive_loss(x1, x2, y, margin=5.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x1)
    rows = nf.explain(nf.contrastive_loss, x1, x2, y, margin=5.0).rows
    force = torch.tensor([row.forces["distance"] for row in rows], dtype=torch.float64)
    away = torch.nn.functional.normalize(x1.detach() - x2, dim=1)
    torch.testing.assert_close(force[:, None] * away, gradient, rtol=1e-9, atol=1e-9)
    assert {row.reading for row in rows if row.label == "similar"} == {
        "similar but apart: pulled together"
    }


def test_every_reading_of_a_pair():
    d = torch.tensor([0.0, 0.5, 0.3, 1.5, 0.0])
    y = torch.tensor([True, True, False, False, False])
    rows = nf.explain(nf.contrastive_loss_from_distance, d, y).rows
    assert [
        (row.reading, round(row.forces["distance"], 4), round(row.loss, 4)) for row in rows
    ] == [
        ("identical: nothing to pull", 0.0, 0.0),
        ("similar but apart: pulled together", 1.0, 0.25),
        ("too close: pushed apart", -1.4, 0.49),
        ("far enough apart: no penalty", 0.0, 0.0),
        ("identical but dissimilar: no direction to push in", 0.0, 1.0),
    ]


def test_what_a_margin_for_similar_pairs_and_a_plain_hinge_do_is_read_as_such():
    d = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.3, 1.5, 0.0])
    y = torch.tensor([True, True, True, True, False, False, False])
    how = {"pos_margin": 0.5, "squared": False}
    found = nf.explain(nf.contrastive_loss_from_distance, d, y, **how)
    assert [(row.reading, round(row.forces["distance"], 4)) for row in found.rows] == [
        ("identical: nothing to pull", 0.0),
        ("similar and near: no penalty", 0.0),
        ("similar and near: no penalty", 0.0),
        ("similar but apart: pulled together", 1.0),
        ("too close: pushed apart", -1.0),
        ("far enough apart: no penalty", 0.0),
        ("identical but dissimilar: no direction to push in", 0.0),
    ]
    assert str(found).startswith("contrastive_loss_from_distance(pos_margin=0.5, squared=False)\n")
    assert (found.pull, found.push) == (1.0, 1.0)


@pytest.mark.parametrize("distance", ["snr", "manhattan", 3])
def test_losses_by_other_distances_are_explained(distance):
    x1, x2, y = healthy_pairs()
    anchor, positive, negative, negative2 = healthy_tuples()
    weight = torch.linspace(0.5, 2, len(y))
    for loss, data, settings in (
        (nf.contrastive_loss, (x1, x2, y), {"margin": 15.0, "weight": weight}),
        (nf.contrastive_loss, (x1, x2, y), {"margin": 1.5, "normalize": True}),
        (nf.triplet_loss, (anchor, positive, negative), {"margin": 15.0}),
        (nf.quadruplet_loss, (anchor, positive, negative, negative2), {"margin2": 15.0}),
    ):
        found = nf.explain(loss, *data, distance=distance, **settings)
        assert finding_names(found) == []
        assert found.hyperparameters["distance"] == distance
        losses = loss(*data, distance=distance, **settings, reduction="none")
        torch.testing.assert_close(torch.tensor([row.loss for row in found.rows]), losses)


def test_totals_are_those_of_the_loss():
    x1, x2, y = healthy_pairs()
    explanation = nf.explain(nf.contrastive_loss, x1, x2, y, margin=5.0)
    none = nf.contrastive_loss(x1, x2, y, margin=5.0, reduction="none")
    assert explanation.total == pytest.approx(none.sum().item())
    assert explanation.mean == pytest.approx(none.mean().item())
    assert explanation.active_share == pytest.approx((none > 0).float().mean().item())
    signed = [row.forces["distance"] for row in explanation.rows]
    assert explanation.pull == pytest.approx(sum(f for f in signed if f > 0))
    assert explanation.push == pytest.approx(-sum(f for f in signed if f < 0))


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        (nf.contrastive_loss, healthy_pairs()),
        (nf.cosine_loss, healthy_pairs()),
        (nf.triplet_loss, healthy_tuples()[:3]),
        (nf.quadruplet_loss, healthy_tuples()),
        (nf.info_nce_loss, (*healthy_tuples()[:2], healthy_tuples()[2][:, None])),
        (nf.softmax_loss, (6.0 * torch.eye(5), torch.arange(5))),
    ],
)
def test_healthy_data_is_left_in_peace_and_shows_everywhere(loss, data):
    # A margin that some healthy rows still violate, so that something is learned.
    settings = {"margin": 5.0} if loss in (nf.contrastive_loss, nf.triplet_loss) else {}
    settings = {"margin2": 9.0} if loss is nf.quadruplet_loss else settings
    explanation = nf.explain(loss, *data, **settings)
    assert finding_names(explanation) == []
    assert explanation.loss == loss.__name__
    assert len(explanation.rows) == len(data[0])
    assert explanation.active_share > 0
    assert explanation.rows[0].reading in str(explanation)
    assert "<table>" in explanation._repr_html_()
    json.dumps(explanation.as_dict(), allow_nan=False)


def test_a_module_is_explained_with_its_own_hyperparameters():
    x1, x2, y = healthy_pairs()
    ours = nf.explain(nf.ContrastiveLoss(margin=5.0), x1, x2, y)
    assert ours == nf.explain(nf.contrastive_loss, x1, x2, y, margin=5.0)


def test_learned_temperature_and_numpy_and_low_precision():
    query, positive = healthy_tuples()[:2]
    learned = nf.InfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.2)))
    assert nf.explain(learned, query, positive).hyperparameters["temperature"] == pytest.approx(0.2)
    x1, x2, y = healthy_pairs()
    from_numpy = nf.explain(nf.contrastive_loss, x1.numpy(), x2.numpy(), np.asarray(y), margin=5.0)
    assert from_numpy == nf.explain(nf.contrastive_loss, x1, x2, y, margin=5.0)
    assert len(nf.explain(nf.contrastive_loss, x1.half(), x2.half(), y).rows) == 16


def test_explaining_leaves_the_training_untouched():
    x1, x2, y = healthy_pairs()
    x1.requires_grad_()
    with torch.no_grad():
        nf.explain(nf.contrastive_loss, x1, x2, y)
    assert x1.grad is None
    assert not nf.contrastive_loss(x1.detach(), x2, y).requires_grad


def test_many_rows_print_short():
    explanation = nf.explain(
        nf.contrastive_loss_from_distance, torch.rand(1000), torch.arange(1000) % 2 == 0
    )
    assert "... and 980 more rows; a larger limit shows them" in str(explanation)
    assert len(explanation.rows) == 1000


def test_no_rows():
    none = torch.zeros(0, dtype=torch.bool)
    explanation = nf.explain(nf.contrastive_loss, torch.zeros(0, 3), torch.zeros(0, 3), none)
    assert explanation.rows == ()
    assert explanation.mean == 0.0
    assert "0 rows" in str(explanation)


# -- findings: each fires on a fault, with its evidence -------------------------------------------


def test_nothing_active_names_the_smallest_margin():
    x1 = torch.tensor([[0.0, 1, 4], [7, 2, 1], [2, 1, 4], [1, 2, 0]])
    x2 = torch.tensor([[0.0, 2, 1], [0, 2, 1], [3, 0, 1], [1, 2, 0]])
    y = torch.tensor([False, False, False, True])
    explanation = nf.explain(nf.contrastive_loss, x1, x2, y, margin=0.0)
    assert finding_names(explanation) == ["dead-batch", "idle-margin"]
    assert "A margin above 3.162" in explanation.findings[0].advice
    # ... and the advice is right: just above it one row is active, at it none.
    assert nf.explain(nf.contrastive_loss, x1, x2, y, margin=3.1622).active_share == 0
    assert nf.explain(nf.contrastive_loss, x1, x2, y, margin=3.1624).active_share == 0.25


def test_nothing_active_for_triplets_and_cosines():
    anchor, positive, negative = healthy_tuples()[:3]
    gap = nf.explain(nf.triplet_loss, anchor, positive, negative, margin=0.0)
    (finding,) = gap.findings
    margin = float(finding.advice.split()[3])
    assert nf.explain(
        nf.triplet_loss, anchor, positive, negative, margin=margin * 1.01
    ).active_share
    apart = nf.explain(nf.cosine_loss, torch.eye(2), torch.eye(2).flip(0), [False, False])
    assert "dead-batch" in finding_names(apart)
    assert "A margin below 0 would" in apart.findings[0].advice


@pytest.mark.parametrize("loss", [nf.contrastive_loss, nf.cosine_loss])
def test_flipped_labels(loss):
    x1, x2, y = healthy_pairs()
    assert "flipped-labels" in finding_names(nf.explain(loss, x1, x2, ~y))
    few = [0, 1, 8, 9]
    assert "flipped-labels" in finding_names(nf.explain(loss, x1[few], x2[few], ~y[few]))


def test_swapped_roles():
    anchor, positive, negative = healthy_tuples()[:3]
    assert finding_names(nf.explain(nf.triplet_loss, anchor, negative, positive)) == [
        "flipped-labels"
    ]
    assert "flipped-labels" in finding_names(
        nf.explain(nf.info_nce_loss, anchor, negative, positive[:, None])
    )


def test_untrained_embeddings_do_not_look_flipped():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        x1, x2 = torch.randn(2, 64, 8, generator=generator)
        explanation = nf.explain(nf.contrastive_loss, x1, x2, torch.arange(64) < 32, margin=5.0)
        assert finding_names(explanation) == []


def test_margin_out_of_reach():
    x1, x2, y = healthy_pairs()
    far = nf.explain(nf.contrastive_loss, x1, x2, y, margin=3.0, distance="cosine")
    assert finding_names(far) == ["unreachable-margin"]
    assert "cosine distance never exceeds 2" in far.findings[0].seen
    u1, u2 = (torch.nn.functional.normalize(x) for x in (x1, x2))
    assert "unreachable-margin" in finding_names(
        nf.explain(nf.contrastive_loss, u1, u2, y, margin=2.5)
    )
    assert finding_names(nf.explain(nf.contrastive_loss, u1, u2, y, margin=1.9)) == []


@pytest.mark.parametrize("loss", [nf.contrastive_loss, nf.cosine_loss])
def test_collapsed_pairs(loss):
    x1, x2, y = healthy_pairs()
    close1, close2 = 1 + 1e-4 * x1, 1 + 1e-4 * x2
    assert "collapsed-embedding" in finding_names(nf.explain(loss, close1, close2, y))


def test_collapsed_softmax_and_sharp_softmax():
    query, positive = healthy_tuples()[:2]
    assert "collapsed-embedding" in finding_names(
        nf.explain(nf.info_nce_loss, 1 + 1e-4 * query, 1 + 1e-4 * positive)
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(32, 8, generator=generator)
    positive = query + torch.randn(32, 8, generator=generator)
    sharp = nf.explain(nf.info_nce_loss, query, positive, temperature=0.001)
    assert "temperature-too-low" in finding_names(sharp)
    assert finding_names(nf.explain(nf.info_nce_loss, query, positive, temperature=0.1)) == []


def test_one_kind_only_and_not_a_number():
    x1, x2, _ = healthy_pairs()
    assert "one-kind-only" in finding_names(nf.explain(nf.cosine_loss, x1, x2))
    x1[3, 0] = torch.inf
    bad = nf.explain(nf.contrastive_loss, x1, x2, torch.arange(16) < 8)
    assert bad.findings[0].name == "not-a-number"
    assert "(row 3)" in bad.findings[0].seen
    assert "not a number" in bad.rows[3].reading
    assert bad.as_dict()["rows"][3]["loss"] is None


def test_errors_teach():
    x1, x2, y = healthy_pairs()
    with pytest.raises(TypeError, match="leave reduction out"):
        nf.explain(nf.contrastive_loss, x1, x2, y, reduction="mean")
    with pytest.raises(TypeError, match="nearfar's losses"):
        nf.explain(torch.nn.functional.mse_loss, x1, x2)
    with pytest.raises(TypeError, match=r"takes x1, x2, y, margin, .*; got m, marge\."):
        nf.explain(nf.ContrastiveLoss(margin=2.0), x1, x2, y, m=1.0, marge=1.0)
    of_0_1 = r"got reference_labels. Pass reference=nearfar.Reference\(x, labels, own\)"
    for look in (nf.explain, nf.doctor.examine):
        loss = {"loss": nf.sup_con_loss} if look is nf.doctor.examine else {}
        with pytest.raises(TypeError, match=of_0_1):
            look(*(() if loss else (nf.sup_con_loss,)), x1, y, **loss, reference_labels=y)
    with pytest.raises(TypeError, match="similar_label"):
        nf.explain(nf.contrastive_loss, x1, x2, y.int())


def test_a_whole_batch_shows_its_strongest_forces():
    x = clusters().flatten(0, 1)
    labels = torch.arange(8).repeat_interleave(4)
    explanation = nf.explain(nf.SupConLoss(temperature=0.5), x, labels)
    assert explanation.n == 32
    assert explanation.mean == pytest.approx(nf.sup_con_loss(x, labels, temperature=0.5).item())
    strongest = nf.forces(nf.sup_con_loss, x, labels, temperature=0.5, k=1)
    first = explanation.rows[0]
    assert (first.index, first.other) == (strongest.anchor.item(), strongest.other.item())
    assert "other" in str(explanation)
    json.dumps(explanation.as_dict(), allow_nan=False)
    apart = nf.explain(nf.batch_contrastive_loss, 100 * torch.eye(4), [0, 1, 2, 3])
    assert finding_names(apart) == ["dead-batch", "one-kind-only"]


def test_a_list_is_told_and_what_is_as_by_default_is_not():
    x, labels = clusters().flatten(0, 1), torch.arange(8).repeat_interleave(4)
    pairs = nf.mine.violating_pairs(x, labels, neg_margin=3.0)
    many = len(pairs.positive) + len(pairs.negative)
    found = nf.explain(nf.batch_contrastive_loss, x, labels, margin=3.0, pairs=pairs)
    mean = nf.batch_contrastive_loss(x, labels, margin=3.0, pairs=pairs).item()
    assert str(found).startswith(
        f"batch_contrastive_loss(margin=3)\n32 rows over {many} listed pairs, mean loss {mean:.4g} "
    )
    triplets = nf.mine.violating_triplets(x, labels, margin=9.0)[:7]
    found = nf.explain(nf.batch_triplet_loss, x, None, triplets=triplets)
    assert str(found).startswith("batch_triplet_loss()\n32 rows over 7 listed triplets, mean loss ")
    reference = nf.Reference(torch.cat([x, x + 1]).tolist(), torch.cat([labels, labels]))
    pairs = ([[0, 60], [1, 61], [2, 5]], [])
    found = nf.explain(nf.sup_con_loss, x, None, pairs=pairs, reference=reference)
    assert found.listed == "3 listed pairs"
    assert json.loads(json.dumps(found.as_dict()))["listed"] == "3 listed pairs"


BATCHES = [
    (nf.sup_con_loss, {"temperature": 0.5}),
    (nf.batch_triplet_loss, {"margin": 5.0}),
    (nf.multi_similarity_loss, {}),
]


@pytest.mark.parametrize(("loss", "settings"), BATCHES)
def test_a_whole_batch_has_the_findings_of_the_doctor(loss, settings):
    x, labels = clusters().flatten(0, 1), torch.arange(8).repeat_interleave(4)
    assert finding_names(nf.explain(loss, x, labels, **settings)) == []
    one_place = nf.explain(loss, 1 + 1e-4 * x, labels, **settings)
    assert finding_names(one_place) == ["collapsed-embedding"]
    alone = nf.explain(loss, x, torch.arange(32), **settings)
    assert "one-kind-only" in finding_names(alone)


def test_items_against_proxies_have_them_too():
    x, labels = clusters().flatten(0, 1), torch.arange(8).repeat_interleave(4)
    proxies = x[::4]
    healthy = nf.explain(nf.proxy_softmax_loss, x, proxies, labels, scale=10.0)
    assert finding_names(healthy) == []
    collapsed = nf.explain(nf.proxy_softmax_loss, 1 + 1e-4 * x, proxies, labels, scale=10.0)
    assert finding_names(collapsed) == ["collapsed-embedding"]
    bad = x.clone()
    bad[3, 0] = torch.nan
    broken = nf.explain(nf.proxy_softmax_loss, bad, proxies, labels, scale=10.0)
    assert finding_names(broken) == ["not-a-number"]


def test_a_decoupled_loss_with_nothing_to_compare_has_no_force() -> None:
    """The log-sum-exp of no negatives has no derivative; the loss, which is 0, has."""
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    found = nf.explain(nf.info_nce_loss, x, x.flip(1), decoupled=True)
    assert (found.mean, found.rows) == (0, ())
    assert "nan" not in str(found)
    listed = nf.explain(nf.info_nce_loss, x, x.flip(1), x[:0], decoupled=True)
    assert listed.rows[0].loss == 0
    assert "nan" not in str(listed)


def test_info_nce_in_the_batch_is_shown_as_what_it_is_two_towers() -> None:
    """Its strongest forces, as those of the CLIP loss; also in both directions."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 6, generator=generator).unbind()
    found = nf.explain(nf.info_nce_loss, x, y, temperature=0.2)
    assert found == nf.explain(nf.info_nce_loss, x, y, None, temperature=0.2)
    assert {row.label for row in found.rows} == {"similar", "dissimilar"}
    both = nf.explain(nf.InfoNCELoss(temperature=0.2, symmetric=True), x, y)
    clip = nf.explain(nf.clip_loss, x, y, scale=5.0)
    assert both.rows == clip.rows
    assert (both.mean, both.total, both.pull) == (clip.mean, clip.total, clip.pull)
    with pytest.raises(ValueError, match="leave symmetric out"):
        nf.explain(nf.info_nce_loss, x, y, symmetric=True, hard_negatives=x)


def test_explaining_two_towers_holds_no_matrix_of_all_pairs() -> None:
    n = 4000
    x, y = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(0)).unbind()
    with nf.memory_budget(2**20), Allocations(x, y) as seen:
        nf.explain(nf.info_nce_loss, x, y)
    assert seen.largest < n * n  # bytes; the matrix has four times as many
