"""n_pair_loss: the first two rows of each class, as in its paper."""

import pytest
import torch
from torch import Tensor

import nearfar as nf


def draw(n: int = 20, d: int = 4) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=chance, dtype=torch.float64).requires_grad_()
    return x, torch.randint(0, 8, (n,), generator=chance)


def truth(x: Tensor, labels: Tensor, temperature: float, normalize: bool) -> dict[int, Tensor]:
    """The loss of each anchor."""
    rows = list(x / x.norm(dim=1, keepdim=True) if normalize else x)
    classes = sorted(set(labels.tolist()))
    members = [[i for i, c in enumerate(labels.tolist()) if c == name] for name in classes]
    pairs = [(m[0], m[1]) for m in members if len(m) > 1]
    found = {}
    for anchor, positive in pairs:
        s = torch.stack([rows[anchor] @ rows[other] / temperature for _, other in pairs])
        found[anchor] = s.logsumexp(0) - rows[anchor] @ rows[positive] / temperature
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_by_definition(normalize: bool, temperature: float) -> None:
    x, labels = draw()
    settings = {"normalize": normalize, "temperature": temperature}
    true = truth(x, labels, **settings)
    assert 3 <= len(true) < 8
    terms = torch.stack(list(true.values()))
    weight = torch.linspace(0, 2, 20, dtype=torch.float64)
    by = weight[list(true)]
    low, high = terms.detach().quantile(torch.tensor([0.2, 0.8], dtype=terms.dtype)).tolist()
    inside = (terms > low) & (terms < high)
    whole = torch.zeros(20, dtype=torch.float64).index_put((torch.tensor(list(true)),), terms)
    for expected, how in (
        (terms.mean(), {}),
        (terms.sum(), {"reduction": "sum"}),
        (whole, {"reduction": "none"}),
        (whole * weight, {"reduction": "none", "weight": weight}),
        ((terms * by).sum() / by.sum(), {"weight": weight}),
        (terms[inside].mean(), {"reduction": (low, high)}),
    ):
        loss = nf.n_pair_loss(x, labels, **settings, **how)
        torch.testing.assert_close(loss, expected)
        up = torch.linspace(1, 2, loss.numel(), dtype=torch.float64).view_as(loss)
        ours, theirs = (
            torch.autograd.grad((value * up).sum(), x, retain_graph=True)[0]
            for value in (loss, expected)
        )
        torch.testing.assert_close(ours, theirs)


def test_a_learned_temperature_and_a_module() -> None:
    x, labels = draw()
    t = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss = nf.NPairLoss(temperature=t)
    loss(x, labels).backward()
    assert t.grad is not None
    assert torch.autograd.gradcheck(lambda t: nf.n_pair_loss(x, labels, temperature=t), (t,))


def test_without_two_classes_of_two_rows() -> None:
    x, _ = draw(4)
    assert nf.n_pair_loss(x, [0, 1, 2, 3]) == 0
    assert nf.n_pair_loss(x, [0, 0, 1, 2]) == 0  # no negative
    assert nf.n_pair_loss(x[:0], []) == 0
    assert nf.n_pair_loss(x, [0, 1, 2, 3], reduction="none").tolist() == [0, 0, 0, 0]


def test_forces_show_the_rows_themselves() -> None:
    x, labels = draw()
    true = truth(x, labels, 1.0, True)
    shown = nf.forces(nf.n_pair_loss, x, labels, k=100)
    acting = shown.force != 0
    assert set(shown.anchor[acting].tolist()) == set(true)
    assert shown.loss == pytest.approx(nf.n_pair_loss(x, labels).item())
    near = labels[shown.anchor[acting]] == labels[shown.other[acting]]
    assert torch.equal(near, shown.similar[acting])
    assert "pull" in str(nf.explain(nf.n_pair_loss, x, labels))


def test_multi_labels_are_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"labels must"):
        nf.n_pair_loss(torch.ones(2, 2), [[True, False], [True, True]])
