"""The label convention, and what is said to whoever breaks it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar import (
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
    softmax_loss,
)
from nearfar.labels import (
    batch_labels,
    blend,
    class_ids,
    listed_rows,
    pair_labels,
    share_label,
)

THREE = torch.zeros(3, 2)
INTEGERS = [
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def complains(error: type[Exception], *parts: str) -> Any:
    """Expect an error whose message holds every part, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(_escaped, parts)))


def _escaped(part: str) -> str:
    return "".join(f"\\{c}" if c in r".()[]?*+|^$\{}" else c for c in part)


# Labels of pairs.


@pytest.mark.parametrize(
    "y", [[True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])]
)
@pytest.mark.parametrize("similar_label", [None, 1])
def test_bool_is_the_convention(y: Any, similar_label: Any) -> None:
    similar = pair_labels(y, like=THREE, similar_label=similar_label)
    assert similar.dtype is torch.bool
    assert similar.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_numbers_mean_what_similar_label_says(dtype: torch.dtype) -> None:
    y = torch.tensor([0, 1, 1], dtype=dtype)
    one = pair_labels(y, like=THREE, similar_label=1)
    zero = pair_labels(y, like=THREE, similar_label=0)
    assert one.dtype is zero.dtype is torch.bool
    assert one.tolist() == [False, True, True]
    assert zero.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_degrees_run_from_0_to_1(dtype: torch.dtype) -> None:
    y = torch.tensor([0.0, 0.25, 1.0], dtype=dtype)
    assert pair_labels(y, like=THREE, similar_label=1).tolist() == [0, 0.25, 1]
    assert pair_labels(y, like=THREE, similar_label=0).tolist() == [1, 0.75, 0]


def test_blend_takes_one_term_or_mixes_both() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert blend(torch.tensor([True, False]), a, b).tolist() == [1, 20]
    assert blend(torch.tensor([1.0, 0.25]), a, b).tolist() == [1, 15.5]


def test_nothing_leaks_from_the_term_not_taken() -> None:
    """A distance whose square overflows belongs to one term only when the label is bool."""
    far = torch.tensor([torch.inf])
    assert blend(torch.tensor([False]), far, torch.tensor([0.0])).item() == 0


@pytest.mark.parametrize("y", [[0, 1, 1], [0.0, 1.0, 0.5], np.array([0, 1, 1], dtype=np.uint8)])
def test_numbers_alone_are_refused_and_both_spellings_shown(y: Any) -> None:
    spellings = ("similar_label=1", "similar_label=0", "y == 1", "y == 0")
    with complains(TypeError, "y holds numbers", *spellings):
        contrastive_loss(THREE, THREE, y)
    with complains(TypeError, "y holds numbers", *spellings):
        contrastive_loss_from_distance(torch.ones(3), y)
    with complains(TypeError, "y holds numbers", *spellings):
        cosine_loss(THREE, THREE, y)


def test_bool_with_0_as_similar_contradicts_itself() -> None:
    with complains(ValueError, "y is bool", "True always means similar", "Drop", "~y"):
        contrastive_loss(THREE, THREE, [True, False, True], similar_label=0)


@pytest.mark.parametrize("similar_label", [2, -1, True, False, "1", 0.5])
def test_similar_label_is_0_or_1(similar_label: Any) -> None:
    for y in ([0, 1, 1], [True, False, True]):
        with complains(ValueError, "similar_label must be 0, 1 or None", repr(similar_label)):
            contrastive_loss(THREE, THREE, y, similar_label=similar_label)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float64], ids=str)
def test_numbers_out_of_range_are_named(dtype: torch.dtype) -> None:
    y = torch.tensor([0, 2, 3]).to(dtype)
    with complains(ValueError, "y must", "0", "1", "y[1] is 2", "2 of 3 entries"):
        contrastive_loss(THREE, THREE, y, similar_label=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.1])
def test_degrees_out_of_range_are_named(bad: float) -> None:
    for similar_label in (0, 1):
        with complains(ValueError, "y must lie between 0 and 1", f"y[2] is {bad:.4g}"[:11]):
            contrastive_loss(THREE, THREE, [0.0, 1.0, bad], similar_label=similar_label)


def test_minus_1_and_1_are_refused() -> None:
    with complains(ValueError, "y must be 0 or 1", "y[0] is -1"):
        cosine_loss(THREE, THREE, [-1, 1, 1], similar_label=1)


def test_complex_labels_are_refused() -> None:
    with complains(TypeError, "y must be bool, or numbers from 0 to 1", "complex64"):
        pair_labels(torch.ones(3, dtype=torch.complex64), like=THREE, similar_label=1)


# Shape, length and device, the same for every kind of label.


@pytest.mark.parametrize("labels", [torch.ones(3, 1).bool(), torch.ones(3, 1).long()])
def test_a_column_of_labels_is_told_to_squeeze(labels: Tensor) -> None:
    with complains(ValueError, "y must have shape (n,)", "got (3, 1)", "y.squeeze(1)"):
        pair_labels(labels, like=THREE, similar_label=1)
    with complains(ValueError, "target must have shape (n,)", "(3, 1)", "target.squeeze(1)"):
        softmax_loss(THREE, labels)


@pytest.mark.parametrize("shape", [(), (3, 2), (1, 3), (3, 1, 1)])
def test_labels_have_one_dimension(shape: tuple[int, ...]) -> None:
    for labels in (torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.int64)):
        with complains(ValueError, "y must have shape (n,)", f"got {shape}"):
            contrastive_loss(THREE, THREE, labels, similar_label=1)
        with complains(ValueError, "target must have shape (n,)", f"got {shape}"):
            softmax_loss(THREE, labels)


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_there_is_one_label_a_row(n: int) -> None:
    parts = ("must have one entry per row", f"{n} labels for 3 rows")
    with complains(ValueError, "y ", *parts):
        contrastive_loss(THREE, THREE, torch.ones(n, dtype=torch.bool))
    with complains(ValueError, "y ", *parts):
        contrastive_loss_from_distance(torch.ones(3), torch.ones(n, dtype=torch.bool))
    with complains(ValueError, "target ", *parts):
        softmax_loss(THREE, torch.zeros(n, dtype=torch.int64))
    with complains(ValueError, "labels ", *parts):
        batch_labels(torch.zeros(n, 5, dtype=torch.bool), like=THREE)


def test_labels_are_where_the_data_is() -> None:
    parts = ("is on meta", "on cpu", "device='cpu'")
    with complains(ValueError, "y ", *parts):
        contrastive_loss(THREE, THREE, torch.ones(3, dtype=torch.bool, device="meta"))
    with complains(ValueError, "target ", *parts):
        softmax_loss(THREE, torch.zeros(3, dtype=torch.int64, device="meta"))
    with complains(ValueError, "labels ", *parts):
        batch_labels(torch.zeros(3, 2, dtype=torch.bool, device="meta"), like=THREE)


@pytest.mark.parametrize("labels", [["a", "b", "a"], np.array(["a", "b", "a"])])
def test_text_is_told_how_to_become_numbers(labels: Any) -> None:
    with complains(TypeError, "y holds text", "np.asarray(y) == 'same'"):
        contrastive_loss(THREE, THREE, labels)
    with complains(TypeError, "target must be", "return_inverse=True"):
        softmax_loss(THREE, labels)


@pytest.mark.parametrize("nothing", [[], np.array([], dtype=bool), torch.zeros(0).bool()])
def test_no_labels_for_no_rows(nothing: Any) -> None:
    """An empty list has no type; with no rows there is nothing for it to be wrong about."""
    empty = torch.zeros(0, 2)
    assert contrastive_loss(empty, empty, nothing).item() == 0
    assert softmax_loss(empty, nothing if isinstance(nothing, list) else []).item() == 0


# Class ids.


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_class_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """Mistake 6: labels of a small dtype, used as indices, run out of numbers."""
    largest = torch.iinfo(dtype).max
    given = torch.tensor([largest, 0, largest - 1, largest], dtype=dtype)
    ids = class_ids(given, like=torch.zeros(4, 1))
    assert ids.dtype is torch.int64
    assert share_label(ids, ids).tolist() == [
        [True, False, False, True],
        [False, True, False, False],
        [False, False, True, False],
        [True, False, False, True],
    ]


@pytest.mark.parametrize("first", [2**24, 2**53, 2**62])
def test_large_class_ids_stay_apart(first: int) -> None:
    """Mistake 6: labels cast to float32 collide above 2^24, to float64 above 2^53."""
    listed = [first, first + 1, first + 2]
    for labels in (listed, np.array(listed), np.array(listed, dtype=np.uint64)):
        assert class_ids(labels, like=THREE).unique().tolist() == listed


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_softmax_reads_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """More rows than uint8 can count, and more classes than int8 can."""
    logits = torch.randn(300, 120)
    target = torch.arange(300) % 120
    found = softmax_loss(logits, target.to(dtype), reduction="none")
    assert torch.equal(found, softmax_loss(logits, target, reduction="none"))


@pytest.mark.parametrize(
    "labels", [[0.0, 1.0, 2.0], [True, False, True], torch.ones(3, dtype=torch.complex64)]
)
def test_class_ids_are_integers(labels: Any) -> None:
    with complains(TypeError, "target must be class ids of an integer dtype", "got torch.", "long"):
        softmax_loss(THREE, labels)


@pytest.mark.parametrize("bad", [-1, 2, -100])
def test_class_ids_out_of_range_are_named(bad: int) -> None:
    expected = ("target must be a class id from 0 to 1", f"target[1] is {bad}", "1 of 3")
    with complains(ValueError, *expected):
        softmax_loss(THREE, [0, bad, 1])


def test_a_class_id_beyond_int64_is_named_as_given() -> None:
    with complains(ValueError, "target must be", "target[0] is 18446744073709551615"):
        softmax_loss(THREE, np.array([2**64 - 1, 0, 1], dtype=np.uint64))


# Labels of a whole batch.


def test_batch_labels_are_ids_or_bool_multi_labels() -> None:
    assert batch_labels([5, 7, 5], like=THREE).tolist() == [5, 7, 5]
    multi = np.array([[True, False], [True, True], [False, True]])
    assert torch.equal(batch_labels(multi, like=THREE), torch.from_numpy(multi))
    with complains(TypeError, "labels of shape (n, c)", "bool", "torch.int64", "labels.bool()"):
        batch_labels(multi.astype(np.int64), like=THREE)
    with complains(TypeError, "labels.squeeze(1)"):  # as bool, all but class 0 would be one
        batch_labels(torch.tensor([[5], [7], [0]]), like=THREE)
    with complains(ValueError, "labels must have shape (n,)", "got (3, 2, 1)"):
        batch_labels(multi[..., None], like=THREE)


def test_multi_labels_are_similar_where_they_share_one() -> None:
    rows = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
    columns = torch.tensor([[True, True, True], [False, False, True], [False, True, False]])
    assert share_label(rows, columns).tolist() == [
        [True, False, False],
        [False, False, False],
        [True, False, True],
    ]


def test_a_list_on_the_host_is_checked_for_any_device() -> None:
    with complains(ValueError, "exclude must hold rows from 0 to 4", "exclude[1] is [5, 0]"):
        listed_rows("exclude", [[0, -1], [5, 0]], 2, 5, torch.device("meta"))
    assert listed_rows("exclude", [[0, -1], [4, 0]], 2, 5, torch.device("meta")).is_meta
