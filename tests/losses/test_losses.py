"""Every aligned loss against the oracle, the textbook formula, and what its signature promises."""

import copy
import inspect
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, LOW, Case, Tensors, over, value_and_gradients
from torch import Tensor, nn

import nearfar
from nearfar import (
    ContrastiveLoss,
    InfoNCELoss,
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
    info_nce_loss,
    registry,
    softmax_loss,
)
from nearfar.inputs import tensor

LOSSES = {loss.function: getattr(nearfar, loss.function) for loss in registry.LOSSES}
ALIGNED = {loss.function: LOSSES[loss.function] for loss in registry.LOSSES if loss.takes("rows")}
REGIMES = ("random", "near", "twins", "offset")


def placed(case: Case, regime: str, seed: int, n: int) -> tuple[Tensors, Tensors]:
    """Data that is harmless, or rows close to each other, or all of them far from the origin."""
    x, labels = case.draw(n, 8, seed)
    if regime in ("near", "twins"):
        x = tuple(a * (0.03 if regime == "near" else 1e-4) + 1 for a in x)
    if regime == "offset":
        x = tuple(a + 100 for a in x)
    return x, labels


def rms(*tensors: Tensor) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / max(sum(t.numel() for t in tensors), 1))


def errors(found: Tensors, truth: Tensors) -> Tensors:
    return tuple(f.double() - t.double() for f, t in zip(found, truth, strict=True))


def test_every_aligned_loss_is_in_the_table() -> None:
    assert {case.function for case in CASES} == {*ALIGNED.values(), nearfar.cosine_similarity}


@pytest.mark.parametrize("regime", ["random", "near"])
@over(CASES)
def test_value_and_gradient_equal_the_oracle(case: Case, regime: str) -> None:
    x, labels = placed(case, regime, seed=1, n=9)
    value, gradients = value_and_gradients(lambda a: case.run(a, labels), x)
    true_value, true_gradients = value_and_gradients(lambda a: case.truth(a, labels), x)
    for found, true in zip((value, *gradients), (true_value, *true_gradients), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12 * float(true.abs().max()))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@over(CASES)
def test_error_is_at_most_twice_the_textbooks(case: Case, regime: str, dtype: torch.dtype) -> None:
    """Points 4 and 7 of the contract; the truth is float64, which the test above ties down.

    Errors are root mean squares over many rows, as one row can be lucky. Half a unit in the last
    place is allowed for: that is the rounding of the result itself.
    """
    values: list[Tensors] = []
    gradients: list[list[Tensors]] = []
    for seed in range(4):
        x, labels = placed(case, regime, seed, n=64)
        x = tuple(a.to(dtype) for a in x)
        value, gradient = value_and_gradients(lambda a, y=labels: case.run(a, y), x)
        book, book_gradient = value_and_gradients(lambda a, y=labels: case.schoolbook(a, y), x)
        true, true_gradient = value_and_gradients(
            lambda a, y=labels: case.run(a, y), tuple(a.double() for a in x)
        )
        assert value.dtype == torch.float32
        assert all(g.dtype == dtype for g in gradient)
        values.append((value, book, true))
        gradients += [list(g) for g in zip(gradient, book_gradient, true_gradient, strict=True)]

    for what, triples, rounding in (
        ("value", values, torch.finfo(torch.float32).eps / 2),
        ("gradient", gradients, torch.finfo(dtype).eps / 2),
    ):
        found, book, true = (tuple(column) for column in zip(*triples, strict=True))
        if "snr" in case.name and any(t.isnan().any() for t in book):
            pytest.skip("rows are so close that in low precision some are constant: 0 / 0")
        allowed = 2 * rms(*errors(book, true)) + rounding * rms(*true)
        assert rms(*errors(found, true)) <= allowed, what


@over(CASES)
def test_gradcheck(case: Case) -> None:
    torch.manual_seed(0)  # of the directions that are checked
    x, labels = case.draw(3, 3, seed=3)
    leaves = tuple(a.requires_grad_() for a in x)
    assert torch.autograd.gradcheck(lambda *a: case.run(a, labels), leaves)
    if case.streamed:
        loss = case.run(leaves, labels, "sum")
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, leaves[0], create_graph=True)
    elif case.hyper.get("temperature") != 0.001:  # where a finite difference is too coarse
        assert torch.autograd.gradgradcheck(lambda *a: case.run(a, labels), leaves)


@over([case for case in CASES if "reduction" in case.takes])
def test_reductions_agree(case: Case) -> None:
    x, labels = case.draw(5, 4)
    rows = case.run(x, labels, "none")
    assert rows.shape == (5,)
    assert torch.equal(case.run(x, labels, "sum"), rows.sum())
    assert torch.equal(case.run(x, labels, "mean"), rows.sum() / 5)
    assert torch.equal(case.function(*x, *labels, **case.keywords), rows.sum() / 5)


# Weights.

OF_ROWS = [f for f in ALIGNED.values() if f is not info_nce_loss]  # whose weights are of queries
WEIGHTED = [case for case in CASES if case.function in OF_ROWS]
RANGES: list[Any] = ["active", (0.3, math.inf), (0.3, 2.0)]
each_of_rows = pytest.mark.parametrize("function", OF_ROWS, ids=lambda f: f.__name__)


@over(WEIGHTED)
def test_a_weight_of_k_counts_a_row_k_times(case: Case) -> None:
    """The mean divides by the weights of the terms that count, whatever these are."""
    x, labels = case.draw(10, 4, seed=4)
    weight = torch.tensor([0.0, 1, 3, 0.5, 2, 0, 1, 1, 0.25, 7], dtype=torch.float64)
    rows = case.run(x, labels)
    torch.testing.assert_close(case.run(x, labels, weight=weight), rows * weight)
    torch.testing.assert_close(case.run(x, labels, "sum", weight=weight), (rows * weight).sum())
    for chosen in ("mean", *RANGES):
        low, high = {"mean": (-1.0, math.inf), "active": (0.0, math.inf)}.get(chosen, chosen)
        inside = (rows > low) & (rows < high)
        whole = weight[inside].sum()
        true = (rows * weight)[inside].sum() / (whole if whole > 0 else 1)
        torch.testing.assert_close(case.run(x, labels, chosen, weight=weight), true)
    ones = case.run(x, labels, "mean", weight=torch.ones(10))
    torch.testing.assert_close(ones, case.run(x, labels, "mean"))
    assert case.run(x, labels, "mean", weight=[0.0] * 10) == 0
    whole_numbers = torch.tensor([0, 1, 3, 2, 2, 0, 1, 1, 4, 7])
    again = tuple(a.repeat_interleave(whole_numbers, 0) for a in (*x, *labels))
    repeated = case.run(again[: len(x)], again[len(x) :], "mean")
    torch.testing.assert_close(case.run(x, labels, "mean", weight=whole_numbers), repeated)


@over(WEIGHTED)
def test_a_weight_is_data(case: Case) -> None:
    """It has no gradient, and scales that of its row, and the second one too."""
    x, labels = case.draw(3, 3, seed=3)
    weight = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    leaves = tuple(a.requires_grad_() for a in x)
    torch.manual_seed(0)

    def run(*a: Tensor) -> Tensor:
        return case.run(a, labels, "mean", weight=weight)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    run(*leaves).backward()
    assert weight.grad is None
    low = tuple(a.detach().half() for a in x)
    assert case.run(low, labels, "mean", weight=weight).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
@each_of_rows
def test_weights_inside_a_graph_and_of_a_module(function: Any) -> None:
    case = next(case for case in CASES if case.function is function)
    x, labels = case.draw(4, 3, dtype=torch.float32)
    weight = torch.tensor([0.0, 1, 2, 0.5])
    expected = case.run(x, labels, "mean", weight=weight)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, labels, "mean", weight=weight), expected)
    module = shell_of(case.function)(**case.keywords)
    torch.testing.assert_close(module(*x, *labels, weight=weight), expected)
    stacked = tuple(torch.stack([a, 2 * a]) for a in x)
    of_each = torch.func.vmap(lambda *a: case.run(a, labels, "mean", weight=weight))(*stacked)
    torch.testing.assert_close(of_each[0], expected)


@each_of_rows
def test_a_weight_out_of_range_is_refused(function: Any) -> None:
    case = next(case for case in CASES if case.function is function)
    x, labels = case.draw(4, 3)
    for bad, message in (
        ([1.0, 2.0], r"weight must have shape \(4,\), one weight per row"),
        ([1.0, 1, 1, -1], r"weight must be 0 or more; weight\[3\] is -1"),
        ([True] * 4, "weight must hold real numbers"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            case.run(x, labels, weight=bad)
    assert case.run(x, labels, "mean", weight=[1.0, math.nan, 1, 1]).isnan()


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_a_weighted_softmax_keeps_its_digits(size: float) -> None:
    """By torch's formula, and near 0 by the gaps between logits."""
    logits = size * torch.eye(4, 5, dtype=torch.float64)
    weight = torch.tensor([1.0, 0, 2, 3], dtype=torch.float64)
    rows = softmax_loss(logits, torch.arange(4), reduction="none", weight=weight)
    true = math.log1p(4 * math.exp(-size))
    assert rows.tolist() == pytest.approx([w * true for w in weight.tolist()], rel=1e-12)
    assert softmax_loss(logits, torch.arange(4), weight=weight).item() == pytest.approx(true)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "snr", "manhattan", 3])
def test_a_plain_hinge_at_distance_0_has_no_gradient(distance: Any) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x.clone()
    for pos_margin in (0.0, 0.2):
        leaf = x.clone().requires_grad_()
        how: dict[str, Any] = {"distance": distance, "squared": False, "pos_margin": pos_margin}
        loss = contrastive_loss(leaf, other, [True, False, True, False], **how, reduction="none")
        assert loss.tolist() == [0, 1, 0, 1]
        (first,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        assert not first.any()
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), leaf)
            assert second.isfinite().all()
    d = torch.zeros(2, requires_grad=True)
    contrastive_loss_from_distance(d, [True, False], squared=False, reduction="sum").backward()
    assert d.grad.tolist() == [0, -1]


# The worked examples, to the digit.


@pytest.mark.parametrize("similar_label", [None, 1, 0])
def test_example_of_four_pairs_at_margin_0(similar_label: Any) -> None:
    x1 = torch.tensor([[0.0, 1, 4], [7, 2, 1], [2, 1, 4], [1, 2, 0]], requires_grad=True)
    x2 = torch.tensor([[0.0, 2, 1], [0, 2, 1], [3, 0, 1], [1, 2, 0]], requires_grad=True)
    y = {None: [False, False, False, True], 1: [0, 0, 0, 1], 0: [1, 1, 1, 0]}[similar_label]
    how: dict[str, Any] = {"margin": 0.0, "similar_label": similar_label}
    assert contrastive_loss(x1, x2, y, **how, reduction="none").tolist() == [0, 0, 0, 0]
    mean = contrastive_loss(x1, x2, y, **how)
    mean.backward()
    assert mean.item() == 0
    assert not x1.grad.any()
    assert not x2.grad.any()
    # With every pair called similar the loss is the squared distance: 10, 49, 11, 0.
    squares = contrastive_loss(x1, x2, [True] * 4, margin=0.0, reduction="none")
    torch.testing.assert_close(squares.detach(), torch.tensor([10.0, 49, 11, 0]))
    assert squares[1].item() == 49
    assert squares[3].item() == 0


def test_example_of_given_distances() -> None:
    d = torch.tensor([0.5, 0.3, 1.5], dtype=torch.float64)
    zero_similar = contrastive_loss_from_distance(d, [0, 1, 1], similar_label=0, reduction="none")
    one_similar = contrastive_loss_from_distance(d, [1, 0, 0], similar_label=1, reduction="none")
    assert zero_similar.tolist() == pytest.approx([0.25, 0.49, 0], abs=1e-15)
    assert torch.equal(zero_similar, one_similar)


def test_example_of_cosines() -> None:
    x1, x2 = torch.tensor([[0.0, 1, 0, 9, 1]]), torch.tensor([[3.0, 0, 0, 9, 0]])
    assert round(nearfar.cosine_similarity(x1, x2).item(), 4) == 0.9372
    assert round(cosine_loss(x1, x2).item(), 4) == 0.0628
    east = torch.tensor([[2.0, 0.0]])
    for other, cost in (([[5.0, 0.0]], 0), ([[0.0, 3.0]], 1), ([[-1.0, 0.0]], 2)):
        assert cosine_loss(east, other).item() == cost


def test_example_of_info_nce() -> None:
    query = np.array([[-0.83483301, -0.16904167, 0.52390721]])
    positive = np.array([[-0.83455951, -0.16862266, 0.52447767]])
    negatives = np.array(
        [
            [0.70374682, -0.18682394, -0.68544673],
            [0.15465702, 0.32303224, 0.93366556],
            [0.53043332, -0.83523217, -0.14500935],
            [0.68285685, -0.73054075, 0.00409143],
            [0.76652431, 0.61500886, 0.18494479],
        ]
    )
    how: dict[str, Any] = {"temperature": 0.07, "normalize": False}
    easy = info_nce_loss(query, positive, negatives, **how).item()
    assert easy == pytest.approx(4.9068650660314756e-05, rel=0, abs=1e-12)
    # The naive formula, from which that number comes, is off in the twelfth digit; 40 digits say:
    assert easy == pytest.approx(4.906865066019994890054939859744e-05, rel=1e-13, abs=0)
    negatives[:2] = positive
    hard = info_nce_loss(query, positive, negatives, **how).item()
    assert hard == pytest.approx(1.0986122899985278, rel=0, abs=1e-12)


# The module shells.


def shell_of(function: Any) -> type[nn.Module]:
    return next(
        shell
        for name in nearfar.losses.__all__
        if inspect.isclass(shell := getattr(nearfar, name)) and shell.loss is function
    )


@pytest.mark.parametrize("name", ALIGNED)
def test_function_and_shell_have_one_signature(name: str) -> None:
    parameters = inspect.signature(ALIGNED[name]).parameters.values()
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    # These follow the data: the function takes them by name, and so does `forward`.
    of_call = {"hard_negatives", "ids", "hard_ids", "weight"}
    keyword_only = [p for p in keyword_only if p.name not in of_call]
    assert list(inspect.signature(shell_of(ALIGNED[name])).parameters.values()) == keyword_only
    assert keyword_only[-1].name == "reduction"
    data = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in data)
    defaults = {p.name: p.default for p in keyword_only}
    module = shell_of(ALIGNED[name])()
    assert {key: getattr(module, key) for key in defaults} == defaults


@over([case for case in CASES if case.function in ALIGNED.values()])
def test_shell_equals_function_also_when_copied(case: Case) -> None:
    x, labels = case.draw(4, 3)
    module = shell_of(case.function)(**case.keywords, reduction="none")
    expected = case.run(x, labels)
    assert torch.equal(module(*x, *labels), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*x, *labels), expected)
    assert torch.equal(copy.deepcopy(module)(*x, *labels), expected)
    assert not module.state_dict()
    for key, value in case.keywords.items():
        assert f"{key}={value!r}" in repr(module)


def test_a_module_says_what_is_passed_in_each_call() -> None:
    for module, how, call in (
        (
            nearfar.CircleLoss,
            {"weight": [1.0]},
            "weight in each call: loss(x, labels, weight=weight)",
        ),
        (
            nearfar.SupConLoss,
            {"reference": None, "pairs": None},
            "pairs, reference in each call: loss(x, labels, pairs=pairs, reference=reference)",
        ),
        (
            nearfar.TripletLoss,
            {"anchor": 0},
            "anchor in each call: loss(anchor, positive, negative)",
        ),
    ):
        with pytest.raises(TypeError, match=re.escape(f" Pass {call}.")):
            module(**how)
    with pytest.raises(TypeError, match=r"; got weights\.$"):
        nearfar.CircleLoss(weights=1)


def test_shell_repr_and_unknown_hyperparameter() -> None:
    assert repr(ContrastiveLoss(margin=2.0)) == (
        "ContrastiveLoss(margin=2.0, pos_margin=0.0, distance='euclidean', normalize=False, "
        "squared=True, similar_label=None, reduction='mean')"
    )
    with pytest.raises(TypeError, match=r"ContrastiveLoss takes margin, .* by name; got 2.0 alone"):
        shell_of(contrastive_loss)(2.0)
    with pytest.raises(TypeError, match=r"ContrastiveLoss takes margin, .*; got margins"):
        ContrastiveLoss(margins=2.0)


def test_shell_takes_data_by_name() -> None:
    (x1, x2), (y,) = CASES[0].draw(4, 3)
    assert torch.equal(ContrastiveLoss()(x1=x1, x2=x2, y=y), contrastive_loss(x1, x2, y))


INFO_NCE = [case for case in CASES if case.function is info_nce_loss]


@over(INFO_NCE)
def test_learned_temperature_gets_the_oracles_gradient(case: Case) -> None:
    x, _ = case.draw(5, 4)
    learned = torch.tensor(case.hyper.get("temperature", 0.07), dtype=torch.float64)
    learned.requires_grad_()
    case.run(x, (), "sum", temperature=learned).backward()
    reference = learned.detach().clone().requires_grad_()
    rows = [[list(r.unbind()) if r.ndim == 1 else [*map(list, r)] for r in a] for a in x]
    kept = {key: value for key, value in case.hyper.items() if key != "temperature"}
    sum(case.oracle(*rows, temperature=reference, **kept)).backward()
    torch.testing.assert_close(learned.grad, reference.grad, rtol=1e-11, atol=0)


def test_learned_temperature_is_state() -> None:
    module = InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.07)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    other = InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.5)))
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == module.temperature.item()
    restored = pickle.loads(pickle.dumps(module))
    x, _ = INFO_NCE[0].draw(4, 3)
    for copied in (other, restored, copy.deepcopy(module)):
        assert torch.equal(copied(*x), module(*x))


# Docstrings.


@pytest.mark.parametrize("name", [*LOSSES, "cosine_similarity"])
def test_docstring_is_complete(name: str) -> None:
    doc = inspect.getdoc(getattr(nearfar, name)) or ""
    for part in (".. math::", "\nArgs:\n", "\nReturns:\n", "\nRaises:\n", "\n>>> ", "\nSource: "):
        assert part in doc, part
    described = doc.partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    for parameter in inspect.signature(getattr(nearfar, name)).parameters:
        assert f"    {parameter}: " in described, parameter
    assert doc.partition("\n")[0].endswith(".")


# What may be passed in.


@over(CASES)
def test_numpy_and_lists_give_what_tensors_give(case: Case) -> None:
    x, labels = case.draw(4, 3, dtype=torch.float32)
    expected = case.run(x, labels)
    from_numpy = case.run(tuple(a.numpy() for a in x), tuple(y.numpy() for y in labels))
    assert isinstance(from_numpy, Tensor)
    assert torch.equal(from_numpy, expected)
    from_lists = case.run(tuple(a.tolist() for a in x), tuple(y.tolist() for y in labels))
    assert torch.equal(from_lists, expected)


@over(CASES)
def test_backwards_and_read_only_arrays(case: Case) -> None:
    x, labels = case.draw(4, 3)
    backwards = tuple(np.ascontiguousarray(a.numpy()[::-1])[::-1] for a in x)
    read_only = tuple(a.numpy().copy() for a in x)
    for array in read_only:
        array.flags.writeable = False
    for arrays in (backwards, read_only):
        assert torch.equal(case.run(arrays, labels), case.run(x, labels))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool"])
def test_numpy_memory_is_shared(dtype: str) -> None:
    array = np.ones((4, 3), dtype)
    read_only = array.view()
    read_only.flags.writeable = False
    for given in (array, array[::2, 1:], array.T, read_only):
        shared = tensor("x", given)
        assert shared.data_ptr() == given.ctypes.data
        assert np.shares_memory(shared.numpy(), array)
    assert not read_only.flags.writeable


@over(CASES)
def test_inputs_are_left_alone(case: Case) -> None:
    x, labels = case.draw(4, 3, dtype=torch.float32)
    before = [a.clone() for a in (*x, *labels)]
    value_and_gradients(lambda a: case.run(a, labels), x)
    case.run(x, labels)
    assert all(torch.equal(a, b) for a, b in zip((*x, *labels), before, strict=True))


@over([case for case in CASES if len(case.shapes(1, 1)) > 1])
def test_dtypes_may_differ_between_arguments(case: Case) -> None:
    """NumPy users pass float64 arrays together with float32 tensors."""
    x, labels = case.draw(4, 3, dtype=torch.float32)
    for k in range(len(x)):
        mixed = tuple(a.double().numpy() if i == k else a for i, a in enumerate(x))
        torch.testing.assert_close(case.run(mixed, labels), case.run(x, labels), check_dtype=False)


@pytest.mark.parametrize("y", [np.array([0.0, 0.5, 1.0]), torch.tensor([0, 0.5, 1]).double()])
def test_labels_do_not_decide_the_dtype_of_the_loss(y: Any) -> None:
    x = torch.ones(3, 2, dtype=torch.float16)
    assert contrastive_loss(x, x, y, similar_label=1).dtype == torch.float32
    assert cosine_loss(x, x, y, similar_label=0).dtype == torch.float32


# What torch puts around a loss.


@over(CASES)
def test_autocast_changes_nothing(case: Case) -> None:
    x, labels = case.draw(6, 5, dtype=torch.float32)
    plain, gradients = value_and_gradients(lambda a: case.run(a, labels), x)

    def under_autocast(a: Tensors) -> Tensor:  # backward runs outside, as torch asks for
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(a, labels)

    cast, cast_gradients = value_and_gradients(under_autocast, x)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert all(torch.equal(a, b) for a, b in zip(cast_gradients, gradients, strict=True))


def kind(case: Case) -> tuple[Any, ...]:
    """Cases of one kind take the same way through the code but for numbers."""
    shapes = tuple(map(len, case.shapes(1, 1)))
    switches = tuple(v for v in case.hyper.values() if isinstance(v, str | bool))
    return case.function, shapes, switches, [y.dtype.is_floating_point for y in case.labels(1)]


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
@over(list({str(kind(case)): case for case in CASES}.values()))
def test_compiles_without_a_graph_break(case: Case) -> None:
    torch._dynamo.reset()
    x, labels = case.draw(4, 3, dtype=torch.float32)
    compiled = torch.compile(case.run, fullgraph=not case.streamed, backend="eager")
    value, gradients = value_and_gradients(lambda a: case.run(a, labels), x)
    again, again_gradients = value_and_gradients(lambda a: compiled(a, labels), x)
    # To rounding: softmax_loss looks at its value, and where it cannot it takes another formula;
    # and where a row is used twice, its gradients may add up in another order.
    torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again_gradients, gradients, rtol=1e-6, atol=1e-7)


@over([case for case in CASES if not case.streamed])
def test_vmap_and_grad(case: Case) -> None:
    """Over a stack of embeddings, as of an ensemble, with one set of labels."""
    _, labels = case.draw(4, 3)
    each = [case.draw(4, 3, seed)[0] for seed in range(3)]
    stacked = tuple(torch.stack(together) for together in zip(*each, strict=True))

    def loss(*x: Tensor) -> Tensor:
        return case.run(x, labels, "sum")

    values = torch.func.vmap(loss)(*stacked)
    torch.testing.assert_close(values, torch.stack([loss(*x) for x in each]))
    gradients = torch.func.vmap(torch.func.grad(loss))(*stacked)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(loss)(*x) for x in each]))


@over([case for case in CASES if case.function is not nearfar.softmax_loss])
def test_lists_beside_float64_keep_their_digits(case: Case) -> None:
    """Embeddings and degrees of similarity: by way of float32, 0.1 would be off by 1e-9."""
    x, labels = case.draw(6, 3)
    labels = tuple(y.double() * 0.3 if y.is_floating_point() else y for y in labels)
    expected = case.run(x, labels)
    if len(x) > 1:
        for k in range(len(x)):
            given = (*x[:k], x[k].tolist(), *x[k + 1 :])
            assert torch.equal(case.run(given, labels), expected)
    assert torch.equal(case.run(x, tuple(y.tolist() for y in labels)), expected)


def test_a_row_without_direction_is_at_cosine_distance_1() -> None:
    x1 = torch.tensor([[0.0, 0], [3, 4], [0, 0]], requires_grad=True)
    x2 = torch.tensor([[3.0, 4], [0, 0], [0, 0]], requires_grad=True)
    loss = nearfar.cosine_loss(x1, x2, reduction="none")
    torch.testing.assert_close(loss, torch.ones(3))
    for gradient in torch.autograd.grad(loss.sum(), (x1, x2)):
        torch.testing.assert_close(gradient, torch.zeros(3, 2))


@over(CASES)
def test_arguments_are_left_as_they_are(case: Case) -> None:
    x, labels = case.draw(5, 3, dtype=torch.float32)
    given = [a.clone() for a in (*x, *labels)]
    value_and_gradients(lambda a: case.run(a, labels), x)
    assert all(torch.equal(a, b) for a, b in zip((*x, *labels), given, strict=True))


@over(CASES)
def test_no_grad_gives_the_same_bits(case: Case) -> None:
    x, labels = case.draw(4, 3, dtype=torch.float32)
    with_graph = case.run(tuple(a.clone().requires_grad_() for a in x), labels)
    with torch.no_grad():
        without = case.run(x, labels)
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


def test_softmax_keeps_its_digits_near_0() -> None:
    """log(1 + 2/e^2) and log(1 + 2/e^40); the second is 0 by the textbook formula."""
    logits = torch.tensor([[2.0, 0, 0], [0, 40, 0]], dtype=torch.float64)
    found = softmax_loss(logits, [0, 1], reduction="none").tolist()
    assert found == pytest.approx(
        [math.log1p(2 * math.exp(-2)), math.log1p(2 * math.exp(-40))], rel=1e-13, abs=0
    )


def test_the_second_derivative_at_distance_0_is_finite() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    other = torch.ones(3, 4)
    other[1] += 1
    (gradient,) = torch.autograd.grad(
        nearfar.contrastive_loss(x, other, [True] * 3), x, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second[1], torch.full((4,), 2 / 3))
    assert not second[[0, 2]].any()  # a convention, as for the first derivative
