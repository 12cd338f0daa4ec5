"""`forces`, `explain` and the doctor look at `batch_loss` as at any loss, beside its rule."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import nearfar as nf
from nearfar.engine.budget import tile_shape

N = 24


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator).double(), torch.arange(N) % 5


def margin_rule(tile: nf.Tile, beta: Tensor | float = 2.0) -> tuple[Tensor, Tensor]:
    near = (0.2 + tile.closeness - beta).relu() * tile.positive
    far = (0.2 + beta - tile.closeness).relu() * tile.negative
    return (near + far).sum(1), ((near + far) > 0).sum(1)


def force(tile: nf.Tile) -> Tensor:
    near = (0.2 + tile.closeness - 2 > 0) & tile.positive
    far = (0.2 + 2 - tile.closeness > 0) & tile.negative
    return near.to(tile.closeness) - far.to(tile.closeness)


def pull(d: Tensor) -> Tensor:
    return d.square()


PAIRS = nf.PairRule(pull, lambda d: (3 - d).relu())
BETA = torch.tensor(1.5, requires_grad=True, dtype=torch.float64)
RULES = [
    (margin_rule, {}),
    (margin_rule, {"learned": (BETA,)}),
    (nf.AnchorRule(margin_rule, force), {}),
    (PAIRS, {}),
    (PAIRS, {"weight": torch.arange(N)}),
]


@pytest.mark.parametrize("tile", [(3, 5), (N, N)])
@pytest.mark.parametrize(("rule", "more"), RULES)
def test_all_forces_together_are_the_gradient(rule: Any, more: dict[str, Any], tile: Any) -> None:
    x, labels = batch()
    given = {"distance": "euclidean", **more}
    leaf = x.clone().requires_grad_()
    value = nf.batch_loss(rule, leaf, labels, **given)
    (gradient,) = torch.autograd.grad(value, leaf)
    with tile_shape(*tile):
        shown = nf.forces(nf.batch_loss, rule, x, labels, k=N * N, **given)
    matrix = torch.zeros(N, N).double()
    matrix[shown.anchor, shown.other] = shown.force
    way = x[:, None] - x
    way = way / way.norm(dim=2, keepdim=True).clamp(min=1e-9)
    rebuilt = ((matrix + matrix.T)[:, :, None] * way).sum(1)
    torch.testing.assert_close(rebuilt, gradient)
    assert shown.loss == pytest.approx(value.item())
    torch.testing.assert_close(shown.closeness, (x[shown.anchor] - x[shown.other]).norm(dim=1))
    assert torch.equal(shown.similar, labels[shown.anchor] == labels[shown.other])
    assert BETA.grad is None


def test_an_explanation_names_the_rule_and_counts_as_the_loss_does() -> None:
    x, labels = batch()
    given = {"distance": "euclidean", "learned": (BETA,), "weight": torch.ones(N)}
    found = nf.explain(nf.batch_loss, margin_rule, x, labels, **given)
    # What is learned is data, as weights are.
    assert str(found).startswith(
        "batch_loss(rule=margin_rule, distance=euclidean)\n24 rows, mean loss "
    )
    assert found.mean == pytest.approx(nf.batch_loss(margin_rule, x, labels, **given).item())
    total = nf.batch_loss(margin_rule, x, labels, reduction="sum", **given).item()
    assert found.total == pytest.approx(total)
    assert found.pull == pytest.approx(
        nf.forces(nf.batch_loss, margin_rule, x, labels, **given).pull.sum().item()
    )
    said = json.loads(json.dumps(found.as_dict()))
    assert said["hyperparameters"] == {"rule": "margin_rule", "distance": "euclidean"}


def lopsided(a: Tensor, b: Tensor) -> Tensor:
    return (2 * (a[:, None] - b).relu() + (b - a[:, None]).relu()).sum(-1)


class Rule:
    def __call__(self, tile: nf.Tile) -> Tensor:
        return margin_rule(tile)[0]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (nf.AnchorRule(margin_rule), "margin_rule"),
        (PAIRS, "PairRule(pull, <lambda>)"),
        (Rule(), "Rule"),
        (partial(margin_rule, beta=1.0), "margin_rule"),
    ],
)
def test_every_rule_has_a_name(rule: Any, name: str) -> None:
    x, labels = batch()
    found = nf.explain(nf.batch_loss, rule, x, labels, similarity="cosine")
    assert found.loss == "batch_loss"
    assert found.hyperparameters == {"rule": name, "similarity": "cosine"}
    by_function = nf.explain(nf.batch_loss, rule, x, labels, distance=lopsided)
    assert by_function.hyperparameters["distance"] == "lopsided"


def test_the_doctor_sees_what_is_wrong_with_a_rule() -> None:
    """By the distance that the loss measures, or by the cosine where it measures a similarity."""
    x, labels = batch()

    def nothing(tile: nf.Tile) -> Tensor:
        return 0 * tile.closeness.sum(1)

    for seen in (
        {"distance": "sqeuclidean"},
        {"distance": "snr"},
        {"distance": "manhattan", "normalize": True},
        {"distance": 3.0},
        {"distance": lopsided},
        {"similarity": "inner_product"},
        {"similarity": "sqeuclidean"},
    ):
        by_position = nf.explain(nf.batch_loss, nothing, x, labels, **seen)
        found = nf.doctor.examine(x, labels, loss=nf.batch_loss, rule=nothing, **seen)
        for findings in (by_position.findings, found.findings):
            assert [finding.name for finding in findings] == ["dead-batch"]
        assert nf.doctor.examine(x, labels, loss=nf.batch_loss, rule=PAIRS, **seen).findings == ()
    collapsed = 1 + 1e-3 * x
    found = nf.explain(nf.batch_loss, margin_rule, collapsed, labels, distance="cosine")
    assert [finding.name for finding in found.findings] == ["collapsed-embedding"]


def test_what_is_missing_is_told() -> None:
    x, labels = batch()
    for look in (nf.forces, nf.explain):
        for data in ((x, labels), (None, x, labels)):
            with pytest.raises(TypeError, match=r"rule must be a function of a tile, .*; got \w+"):
                look(nf.batch_loss, *data, distance="euclidean")
        with pytest.raises(TypeError, match=r"batch_loss.* missing 1 required .*: 'labels'"):
            look(nf.batch_loss, margin_rule, x, distance="euclidean")
        with pytest.raises(TypeError, match=r"batch_loss takes rule, x, labels, .*; got beta"):
            look(nf.batch_loss, margin_rule, x, labels, beta=1.0)
        with pytest.raises(
            TypeError, match=r"nearfar.batch_loss, followed by a rule and its arguments"
        ):
            look(margin_rule, x, labels)
        with pytest.raises(TypeError, match=r"clip_loss.* missing 1 required .*: 'scale'"):
            look(nf.clip_loss, x, x)
    with pytest.raises(TypeError, match="by position"):
        nf.forces(nf.batch_loss, margin_rule)
    with pytest.raises(TypeError, match="labels must be given with loss: batch_loss needs both"):
        nf.doctor.examine(x, loss=nf.batch_loss, rule=margin_rule)
