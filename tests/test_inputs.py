"""What may be passed in, and what is said about the rest: the argument, what came, the fix."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import nearfar
from nearfar import (
    InfoNCELoss,
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
    cosine_similarity,
    info_nce_loss,
    mine,
    quadruplet_loss,
    softmax_loss,
    triplet_loss,
)
from nearfar.distance import between_rows, check_distance, largest, length, unit
from nearfar.inputs import above_zero, embeddings, lift, tensor, vector
from nearfar.registry import LOSSES

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([True, False, True, False])
D = X[:, 0].abs()

# Every argument that holds rows: its name, and the loss with that argument replaced.
ROWS: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "contrastive x1": ("x1", lambda bad: contrastive_loss(bad, X, Y)),
    "contrastive x2": ("x2", lambda bad: contrastive_loss(X, bad, Y)),
    "similarity x1": ("x1", lambda bad: cosine_similarity(bad, X)),
    "similarity x2": ("x2", lambda bad: cosine_similarity(X, bad)),
    "cosine x1": ("x1", lambda bad: cosine_loss(bad, X)),
    "cosine x2": ("x2", lambda bad: cosine_loss(X, bad)),
    "triplet anchor": ("anchor", lambda bad: triplet_loss(bad, X, X)),
    "triplet positive": ("positive", lambda bad: triplet_loss(X, bad, X)),
    "triplet negative": ("negative", lambda bad: triplet_loss(X, X, bad)),
    "quadruplet anchor": ("anchor", lambda bad: quadruplet_loss(bad, X, X, X)),
    "quadruplet positive": ("positive", lambda bad: quadruplet_loss(X, bad, X, X)),
    "quadruplet negative": ("negative", lambda bad: quadruplet_loss(X, X, bad, X)),
    "quadruplet negative2": ("negative2", lambda bad: quadruplet_loss(X, X, X, bad)),
    "info_nce query": ("query", lambda bad: info_nce_loss(bad, X)),
    "info_nce positive": ("positive", lambda bad: info_nce_loss(X, bad)),
    "info_nce negatives": ("negatives", lambda bad: info_nce_loss(X, X, bad)),
    "softmax logits": ("logits", lambda bad: softmax_loss(bad, [0, 1, 2, 0])),
    "distances": ("d", lambda bad: contrastive_loss_from_distance(bad, Y)),
}
MATRICES = [key for key in ROWS if key not in ("softmax logits", "distances")]
LATER = [key for key in MATRICES if ROWS[key][0] not in ("x1", "anchor", "query", "negatives")]


def complaint(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("key", ROWS)
@pytest.mark.parametrize(
    ("bad", "came"),
    [
        ("rows", "str 'rows'"),
        ([["a", "b"]] * 4, "list [['a'"),
        (None, "NoneType None"),
        ({1: 2}, "dict {1: 2}"),
        (np.array([object()] * 4), "dtype object"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "dtype datetime64"),
    ],
)
def test_not_numbers(key: str, bad: Any, came: str) -> None:
    if bad is None and key == "info_nce negatives":
        return  # there it means the other rows
    name, loss = ROWS[key]
    message = complaint(TypeError, lambda: loss(bad))
    assert_says(message, f"{name} must be a tensor or an array of numbers", came)


def test_a_list_that_is_no_rectangle() -> None:
    message = complaint(TypeError, lambda: cosine_similarity([[1.0, 2.0], [3.0]], X))
    assert_says(message, "x1 must be", "list [[1.0, 2.0], [3.0]]")


def test_a_list_of_tensors_that_are_learned_is_not_cut_off_in_silence() -> None:
    learned = [row.clone().requires_grad_() for row in X]
    message = complaint(TypeError, lambda: cosine_similarity(learned, X))
    assert_says(message, "x1 must be a tensor", "stack")


@pytest.mark.parametrize("key", ROWS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_not_real(key: str, dtype: torch.dtype) -> None:
    name, loss = ROWS[key]
    shape = (4,) if key == "distances" else (4, 3)
    message = complaint(TypeError, lambda: loss(torch.ones(shape, dtype=dtype)))
    assert_says(message, f"{name} must hold real numbers", f"got {dtype}")


@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 3, 1, 1)])
def test_not_a_matrix(key: str, shape: tuple[int, ...]) -> None:
    name, loss = ROWS[key]
    message = complaint(ValueError, lambda: loss(torch.ones(shape)))
    if name == "negatives":
        assert_says(message, "negatives must have shape (m, 3)", "(4, m, 3)", f"got {shape}")
    else:
        assert_says(message, f"{name} must have shape (n, d)", f"got {shape}")
        assert (f"pass {name}[None]" in message) is (len(shape) == 1)


@pytest.mark.parametrize("key", [*MATRICES, "softmax logits"])
def test_rows_without_numbers(key: str) -> None:
    name, loss = ROWS[key]
    message = complaint(ValueError, lambda: loss(torch.ones(4, 0)))
    assert_says(message, name, "(4, 0)")


@pytest.mark.parametrize("key", LATER)
@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (1, 3), (4, 1), (0, 3)])
def test_shapes_that_differ(key: str, shape: tuple[int, int]) -> None:
    """(1, 3) and (4, 1) too, which torch would broadcast without a word."""
    name, loss = ROWS[key]
    first = {"x2": "x1", "positive": "query" if "nce" in key else "anchor"}.get(name, "anchor")
    message = complaint(ValueError, lambda: loss(torch.ones(shape)))
    assert_says(message, f"{name} must have the shape of {first}, (4, 3)", f"got {shape}")


@pytest.mark.parametrize("key", LATER)
def test_devices_that_differ(key: str) -> None:
    name, loss = ROWS[key]
    message = complaint(ValueError, lambda: loss(X.to("meta")))
    assert_says(message, f"{name} is on meta", "on cpu")
    assert_says(message, f"pass torch.as_tensor({name}, device='cpu')")


@pytest.mark.parametrize("shape", [(5, 2), (4, 5, 2), (3, 5, 3), (1, 5, 3), (4, 5, 1)])
def test_negatives_that_do_not_fit(shape: tuple[int, ...]) -> None:
    message = complaint(ValueError, lambda: info_nce_loss(X, X, torch.ones(shape)))
    assert_says(message, "negatives must have", "3", f"got {shape}")


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 3)])
def test_negatives_on_another_device(shape: tuple[int, ...]) -> None:
    elsewhere = torch.ones(shape, device="meta")
    message = complaint(ValueError, lambda: info_nce_loss(X, X, elsewhere))
    assert_says(message, "negatives is on meta", "on cpu", "device='cpu'")


@pytest.mark.parametrize("shape", [(), (4,), (4, 3, 1)])
def test_logits_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    message = complaint(ValueError, lambda: softmax_loss(torch.ones(shape), [0] * 4))
    assert_says(message, "logits must have shape (n, c)", f"got {shape}")


@pytest.mark.parametrize("shape", [(), (4, 1), (4, 3)])
def test_distances_that_are_no_vector(shape: tuple[int, ...]) -> None:
    message = complaint(ValueError, lambda: contrastive_loss_from_distance(torch.ones(shape), Y))
    assert_says(message, "d must have shape (n,)", f"got {shape}")
    assert ("Pass d.squeeze(1)." in message) is (shape == (4, 1))


def test_negative_distances() -> None:
    d = torch.tensor([0.0, 1.0, -0.5, -2.0])
    message = complaint(ValueError, lambda: contrastive_loss_from_distance(d, Y))
    assert_says(message, "d must hold distances, 0 or more", "d[2] is -0.5", "1 - similarity")


# Hyperparameters.

MARGINS: dict[str, tuple[str, Callable[[Any], Tensor], float]] = {
    "contrastive": ("margin", lambda m: contrastive_loss(X, X, Y, margin=m), 0),
    "distances": ("margin", lambda m: contrastive_loss_from_distance(D, Y, margin=m), 0),
    "triplet": ("margin", lambda m: triplet_loss(X, X, X, margin=m), 0),
    "quadruplet": ("margin", lambda m: quadruplet_loss(X, X, X, X, margin=m), 0),
    "quadruplet 2": ("margin2", lambda m: quadruplet_loss(X, X, X, X, margin2=m), 0),
    "cosine": ("margin", lambda m: cosine_loss(X, X, Y, margin=m), -1),
    "smoothing": (
        "label_smoothing",
        lambda m: softmax_loss(X, [0, 1, 2, 0], label_smoothing=m),
        0,
    ),
}


IDS = [0, 0, 1, 1]
DATA: dict[str, tuple[Any, ...]] = {
    "contrastive_loss": (X, X, Y),
    "contrastive_loss_from_distance": (D, Y),
    "triplet_loss": (X, X, X),
    "quadruplet_loss": (X, X, X, X),
    "info_nce_loss": (X, X),
    "clip_loss": (X, X),
    "siglip_loss": (X, X),
    "proxy_softmax_loss": (X, X, IDS),
}
FUNCTIONS = [getattr(nearfar, loss.function) for loss in LOSSES]
FUNCTIONS += [nearfar.triplet_stats, nearfar.quadruplet_stats]
FUNCTIONS += [f for f in vars(mine).values() if inspect.isfunction(f)]
NEEDED = inspect.Parameter.empty
SWITCHES = [
    (function, name, parameters)
    for function in FUNCTIONS
    for parameters in [inspect.signature(function).parameters]
    for name, parameter in parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(
    ("function", "name", "parameters"),
    SWITCHES,
    ids=[f"{function.__name__}-{name}" for function, name, _ in SWITCHES],
)
def test_switches_are_true_or_false(function: Any, name: str, parameters: Any) -> None:
    """Else "no" would be true, and None false."""
    needed = {"scale": 10.0, "bias": -5.0, "temperature": 0.1, "margin": 0.1}
    how = {k: needed[k] for k in needed.keys() & parameters if parameters[k].default is NEEDED}
    call = partial(function, *DATA.get(function.__name__, (X, IDS)), **how)
    for bad in ("no", "l2", None, 0, 1, torch.tensor(True)):
        message = complaint(TypeError, lambda bad=bad: call(**{name: bad}))
        assert message == f"{name} must be True or False, got {bad!r}."
    for value in (True, False):
        if function is not mine.uniform_pairs:  # which draws
            told, plain = (vars_of(call(**{name: v})) for v in (np.bool_(value), value))
            assert all(torch.equal(a, b) for a, b in zip(told, plain, strict=True))


def vars_of(found: Any) -> list[Tensor]:
    """All tensors of what a loss or miner returns."""
    parts = [found] if isinstance(found, Tensor) else vars(found).values()
    return [torch.as_tensor(part) for part in parts]


@pytest.mark.parametrize("key", MARGINS)
@pytest.mark.parametrize("bad", [-1.5, float("nan"), float("inf"), -float("inf"), "1", None, True])
def test_hyperparameters_out_of_range(key: str, bad: Any) -> None:
    name, loss, lowest = MARGINS[key]
    message = complaint(ValueError, lambda: loss(bad))
    assert_says(message, f"{name} must be a number", f"{lowest:g}", f"got {bad!r}")
    assert loss(lowest).isfinite()
    assert loss(np.float32(lowest)).isfinite()
    assert torch.equal(loss(1), loss(1.0))


@pytest.mark.parametrize("key", ["cosine", "smoothing"])
def test_hyperparameters_above_1(key: str) -> None:
    name, loss, _ = MARGINS[key]
    assert loss(1).isfinite()
    assert_says(complaint(ValueError, lambda: loss(1.001)), name, "to 1", "got 1.001")


@pytest.mark.parametrize("bad", [0, 0.0, -0.07, float("nan"), float("inf"), "0.07", None, True])
def test_temperature_out_of_range(bad: Any) -> None:
    for loss in (
        lambda: info_nce_loss(X, X, temperature=bad),
        lambda: InfoNCELoss(temperature=bad)(X, X),
    ):
        message = complaint(ValueError, loss)
        assert_says(message, "temperature must be a number above 0", f"got {bad!r}")


@pytest.mark.parametrize("shape", [(2,), (0,), (2, 1)])
def test_temperature_is_one_number(shape: tuple[int, ...]) -> None:
    message = complaint(ValueError, lambda: info_nce_loss(X, X, temperature=torch.ones(shape)))
    assert_says(message, "temperature must be one number", f"got shape {shape}")


def test_a_temperature_tensor_is_not_read() -> None:
    """Reading it would stall a GPU; on the meta device it cannot be read at all."""
    assert above_zero("temperature", torch.ones((), device="meta")).device.type == "meta"


class _Mps(TorchFunctionMode):
    """What would be moved to MPS stays here; float64 is refused, as there."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.to and args[1] == torch.device("mps"):
            assert args[0].dtype is not torch.float64
            return args[0]
        return func(*args, **(kwargs or {}))


def test_an_array_of_float64_fits_a_device_without_it() -> None:
    with _Mps():
        found = tensor("weight", np.array([1.0, 0.5]), device=torch.device("mps"))
    assert found.equal(torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("bad", ["l2", "Euclidean", "", None, 0.5, 0, -inf, nan, True, [2.0]])
def test_unknown_distance(bad: Any) -> None:
    for loss in (
        lambda: contrastive_loss(X, X, Y, distance=bad),
        lambda: triplet_loss(X, X, X, distance=bad),
        lambda: quadruplet_loss(X, X, X, X, distance=bad),
        lambda: between_rows(X, X, bad),
        lambda: largest(bad),
        lambda: check_distance(bad),
    ):
        message = complaint(ValueError, loss)
        assert_says(message, "distance must be one of 'euclidean', 'sqeuclidean', 'cosine', 'snr'")
        assert_says(message, "'manhattan', or a number p of at least 1 for the p-norm")
        assert_says(message, f"got {bad!r}")


@pytest.mark.parametrize("bad", ["average", "Mean", "", None, 1])
def test_unknown_reduction(bad: Any) -> None:
    for loss in (
        lambda: contrastive_loss(X, X, Y, reduction=bad),
        lambda: contrastive_loss_from_distance(D, Y, reduction=bad),
        lambda: cosine_loss(X, X, reduction=bad),
        lambda: triplet_loss(X, X, X, reduction=bad),
        lambda: quadruplet_loss(X, X, X, X, reduction=bad),
        lambda: info_nce_loss(X, X, reduction=bad),
        lambda: softmax_loss(X, [0, 1, 2, 0], reduction=bad),
    ):
        message = complaint(ValueError, loss)
        assert_says(message, 'reduction must be "mean", "active", "sum", "none"', f"got {bad!r}")


def test_hyperparameters_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        contrastive_loss(X, X, Y, 2.0)  # type: ignore[misc]


# What the helpers make of good input.


def test_tensors_pass_through_untouched() -> None:
    assert tensor("x", X) is X


def test_lists_take_the_default_dtype() -> None:
    assert tensor("x", [[1.0, 2.0]]).dtype is torch.float32
    assert tensor("x", [[1, 2]]).dtype is torch.int64
    assert tensor("x", [True]).dtype is torch.bool
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert tensor("x", [[0.1]]).item() == 0.1
        assert lift("x", torch.ones(1, dtype=torch.uint8)).dtype is torch.float64
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.parametrize("code", [">f4", ">f8", ">i8", "<f4", "=f2"])
def test_arrays_of_either_byte_order(code: str) -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]], dtype=code)
    assert tensor("x", array).tolist() == array.tolist()
    assert tensor("x", array[::-1, ::-1]).tolist() == array[::-1, ::-1].tolist()


def test_a_field_of_a_record_is_an_array_too() -> None:
    """Its stride is no multiple of its item size, which torch cannot express."""
    records = np.zeros(4, dtype=[("tag", "u1"), ("row", "f4", (3,))])
    records["row"] = X.numpy()
    assert torch.equal(tensor("x", records["row"]), X)


@pytest.mark.parametrize(
    ("dtype", "computes_in"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
    ],
    ids=str,
)
def test_losses_compute_in_at_least_float32(dtype: torch.dtype, computes_in: torch.dtype) -> None:
    (x,) = embeddings(x=torch.ones(2, 3, dtype=dtype))
    assert x.dtype is computes_in
    assert vector("d", torch.ones(2, dtype=dtype)).dtype is computes_in


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_lift_makes_every_bad_number_nan(bad: float) -> None:
    lifted = lift("x", torch.tensor([1.0, bad, 2.0]))
    assert lifted.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_that_do_not_fit_are_infinite(dtype: torch.dtype) -> None:
    """A loss scaler skips a step for them; the largest number of the dtype would hide it."""
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    largest_number = torch.finfo(dtype).max
    by = torch.tensor([2 * largest_number, -2 * largest_number, largest_number]).double()
    (lift("x", x) * by).sum().backward()
    assert x.grad.tolist() == [torch.inf, -torch.inf, largest_number]


def test_length_and_unit_of_short_and_long_rows() -> None:
    for size in (1e-15, 1e-10, 1.0, 1e10, 1e15):
        x = torch.tensor([[3.0, 4.0]]) * (size / 5)
        torch.testing.assert_close(length(x), x.double().norm(dim=1).float(), rtol=2e-7, atol=0)
        torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8]]))
    assert unit(torch.tensor([[0.0, 0.0], [1e-30, 0.0]])).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [1e20, torch.finfo(torch.float32).max])
def test_the_largest_numbers_have_a_direction(size: float) -> None:
    """The square of their length overflows; with an infinite length the cosine would be 0."""
    huge = torch.full((1, 4), size)
    torch.testing.assert_close(cosine_similarity(huge, huge), torch.ones(1))


@pytest.mark.parametrize("name", ["euclidean", "sqeuclidean", "cosine"])
def test_distances_by_name(name: Any) -> None:
    d = between_rows(X, X.flip(0), name)
    truth = {
        "euclidean": (X - X.flip(0)).norm(dim=1),
        "sqeuclidean": (X - X.flip(0)).norm(dim=1) ** 2,
        "cosine": 1 - torch.nn.functional.cosine_similarity(X, X.flip(0)),
    }[name]
    torch.testing.assert_close(d, truth)
    assert (d <= largest(name)).all()
    assert largest(name) == (2 if name == "cosine" else float("inf"))


def test_public_names() -> None:
    assert set(nearfar.losses.__all__) <= set(nearfar.__all__)
    assert "cosine_similarity" in nearfar.__all__
    assert all(hasattr(nearfar, name) for name in nearfar.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", nearfar.__version__)
