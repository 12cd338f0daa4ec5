"""What a whole-batch loss allocates and keeps, measured tensor by tensor.

Every bound here would be broken by one N x N matrix, be it of single bytes.
"""

import re
from collections.abc import Callable
from math import inf
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from allocations import Allocations
from batch_cases import CASES, PLAIN, Case, Data, over
from torch import Tensor

import nearfar
from nearfar import memory_budget
from nearfar.engine import log_sums, products
from nearfar.engine.budget import tile_shape

N, D, BUDGET = 2048, 16, 2**20


def large(case: Case, *, n: int = N) -> Data:
    """As many classes as rows, where there are proxies; float32, asking for gradients."""
    d = (
        2 * D // (1 + max(case.sub_centers, 1))
    )  # rows and proxies together hold as much as elsewhere
    data = case.draw(n, d, dtype=torch.float32)
    if case.kind == "proxies":
        proxies = data.rows["x"].flip(0)
        if case.sub_centers:
            proxies = torch.stack([proxies.roll(i, 0) for i in range(case.sub_centers)], 1)
        data = data.at(proxies=proxies)
        data.others["labels"] = torch.arange(n) * 7 % n
    return data.at(**{k: a.clone().requires_grad_() for k, a in data.rows.items()})


def size_of(*tensors: Tensor) -> int:
    return sum(a.nbytes for a in tensors)


def spent(case: Case, data: Data, reduction: str, *, backward: bool = True) -> Allocations:
    known = [*data.rows.values(), *data.others.values()]
    with memory_budget(BUDGET), Allocations(*known) as allocations:
        loss = case.run(data, reduction)
        if backward:
            loss.sum().backward()
    return allocations


def assert_linear(allocations: Allocations, data: Data) -> None:
    """The budget, plus a few copies of the rows, and of one number per row."""
    rows = size_of(*data.rows.values())
    besides = 8 * rows + 40 * 8 * N
    assert allocations.peak <= BUDGET + besides
    assert allocations.largest <= max(BUDGET, rows)
    assert BUDGET + besides < N * N, "the bound would miss a matrix of bytes"


# Its memory also grows with the number of similar pairs: the last test.
OF_POSITIVES = nearfar.lifted_pair_loss
VARIED = [
    case
    for case in CASES
    if (case in PLAIN and case.function is not OF_POSITIVES)
    or case.name
    in (
        "batch_contrastive-multi-labels",
        "batch_contrastive-reference-self",
        "batch_contrastive-9.0-sqeuclidean",
        "batch_contrastive-6.0-manhattan",
        "batch_contrastive-2.5-snr",
        "lifted_structure-1.5",
        "batch_contrastive-1.2-cosine",
        "clip-decoupled-weighted",
        "info_nce-symmetric",
        "info_nce-hard",
        "nt_xent-multi-labels",
        "sup_con-multi-labels",
        "sup_con-reference-self",
        "sup_con-0.01",
        "lifted_structure-sqeuclidean",
        "proxy_softmax-angle",
        "proxy_softmax-sub_centers-angle",
        "proxy_nca-sub_centers",
    )
]


@pytest.mark.slow
@over(VARIED)
def test_peak_memory_is_linear_in_the_batch(case: Case) -> None:
    data = large(case)
    assert_linear(spent(case, data, "mean"), data)


# One of those that run in the same executor.
EXECUTORS = [
    case
    for case in PLAIN
    if case.name.partition("-")[0]
    not in ("batch_cosine", "multi_similarity", "circle", "lifted_structure", "proxy_nca")
    and case.function is not OF_POSITIVES
]


@pytest.mark.slow
@over(EXECUTORS)
def test_peak_memory_of_a_loss_a_row(case: Case) -> None:
    """Its backward pass walks the tiles again."""
    data = large(case)
    assert_linear(spent(case, data, "none"), data)


@over(EXECUTORS)
def test_peak_memory_without_gradient_is_lower(case: Case) -> None:
    data = large(case)
    with torch.no_grad():
        value_only = spent(case, data, "mean", backward=False)
    assert value_only.peak <= BUDGET + 3 * size_of(*data.rows.values()) + 20 * 8 * N


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_peak_memory_where_every_distance_is_repaired(distance: Any) -> None:
    """Rows so close that no digit of |a|^2 + |b|^2 - 2ab is left."""
    case = PLAIN[0]
    assert "distance" in case.takes
    data = large(case)
    near = 1 + 1e-4 * data.rows["x"].detach()
    data = data.at(x=near.requires_grad_())
    with memory_budget(BUDGET), Allocations(near) as allocations:
        case.run(data, "mean", distance=distance).backward()
    assert_linear(allocations, data)


class Kept:
    """A tensor that an autograd graph keeps, as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("reduction", ["mean", "none"])
@over(VARIED)
def test_what_is_kept_for_backward_is_linear_in_the_batch(case: Case, reduction: str) -> None:
    """The inputs or their gradients, a number per row, and nothing a pair."""
    data = large(case, n=512)
    # Weakly: what a tile's own small graph keeps goes with the tile.
    kept: WeakSet[Kept] = WeakSet()

    def save(saved: Tensor) -> Kept:
        kept.add(entry := Kept(saved))
        return entry

    with torch.autograd.graph.saved_tensors_hooks(save, lambda entry: entry.tensor):
        loss = case.run(data, reduction)
    assert loss.requires_grad
    storages = (entry.tensor.untyped_storage() for entry in kept)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert 0 < sum(sizes.values()) <= 2 * size_of(*data.rows.values()) + 8 * 512


@pytest.mark.parametrize(
    ("name", "c"),
    [("proxy_softmax", 1_000_000), ("proxy_nca", 200_000), ("proxy_anchor", 200_000)],
)
def test_a_million_classes_need_no_matrix(name: str, c: int) -> None:
    """32 rows and a million proxies: nothing larger than the proxies themselves, 32 MB."""
    function: Callable[..., Tensor] = getattr(nearfar, f"{name}_loss")
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=chance).requires_grad_()
    proxies = torch.randn(c, 8, generator=chance).requires_grad_()
    labels = torch.arange(32) * (c // 32)
    with Allocations(x, proxies) as allocations:
        loss = function(x, proxies, labels, scale=8.0)
        loss.backward()
    assert loss.isfinite()
    assert proxies.grad is not None
    assert proxies.grad[labels].abs().sum(1).min() > 0
    assert allocations.largest <= proxies.nbytes
    assert allocations.peak <= 6 * proxies.nbytes + 128 * 2**20


@pytest.mark.parametrize("budget", [2**16, 2**18, 2**22])
def test_the_budget_is_kept(budget: int) -> None:
    """At any budget the tiles fit; what must be there whatever the tile comes on top."""
    x = torch.randn(512, 4).requires_grad_()
    labels = torch.arange(512) % 99
    for loss in (nearfar.batch_contrastive_loss, nearfar.sup_con_loss, nearfar.nt_xent_loss):
        with memory_budget(budget), Allocations(x, labels) as allocations:
            loss(x, labels).backward()
        assert allocations.peak <= budget + 8 * x.nbytes + 40 * 8 * len(x)


@pytest.mark.parametrize("budget", [0, -1, 2**16 - 1, float("nan"), inf, "2**20"])
def test_a_budget_too_small_to_keep_is_refused(budget: Any) -> None:
    with (
        pytest.raises(
            ValueError, match=rf"number of bytes, at least 65536, got {re.escape(repr(budget))}"
        ),
        memory_budget(budget),
    ):
        pass


def test_the_budget_ends_with_its_block() -> None:
    x = torch.randn(1024, 4)

    def largest() -> int:
        with Allocations(x) as allocations:
            nearfar.clip_loss(x, x, scale=3.0)
        return allocations.largest

    before = largest()
    with memory_budget(np.int64(2**16)):  # type: ignore[arg-type]
        small = largest()
        with memory_budget(2**20):
            assert largest() > small
        assert largest() == small
    assert largest() == before > small
    with pytest.raises(RuntimeError, match="left"), memory_budget(2**16):
        raise RuntimeError("left")
    assert largest() == before


def test_the_measure_itself() -> None:
    """It sees what lives inside an autograd step, forward and backward, and what is freed."""
    x = torch.ones(1000, requires_grad=True)
    with Allocations(x) as allocations:
        for _ in range(5):
            x.detach() * 2
    assert allocations.peak == 4000
    with Allocations() as allocations:
        first, second = torch.ones(1000), torch.ones(500)
        del first
        third = torch.ones(1200)  # beside the second
        del second, third
        kept = torch.ones(1600)
    assert allocations.made == [4000, 2000, 4800, 6400]
    assert allocations.peak == 6800
    assert [size for _, size in allocations.living()] == [kept.nbytes]
    with Allocations(x) as allocations:
        (x[:, None] * x).sum().backward()
    assert allocations.largest == 4_000_000
    assert 8_000_000 <= allocations.peak <= 13_000_000


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: nearfar.clip_loss(x, y, scale=10.0),
        lambda x, y: nearfar.info_nce_loss(x, y),
        lambda x, y: nearfar.siglip_loss(x, y, scale=10.0, bias=-10.0),
    ],
    ids=["clip", "info_nce", "siglip"],
)
def test_the_rows_of_two_towers_make_room_for_their_gradient(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The forward pass holds both towers at unit length and the gradient of one, no fourth copy."""
    x, y = (torch.randn(2048, 128).requires_grad_() for _ in range(2))
    with memory_budget(2**18), Allocations(x, y) as allocations:
        loss(x, y)
    assert 3 * x.nbytes <= allocations.peak <= 3.75 * x.nbytes


def test_a_strip_is_computed_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tile by tile elsewhere: the allocator would keep gaps of up to half the memory taken."""
    monkeypatch.setattr(products, "_FEWEST", inf)  # oneDNN takes no place to put them
    x, y = (torch.randn(1024, 4).requires_grad_() for _ in range(2))
    with tile_shape(64, 256), Allocations(x, y) as allocations:
        nearfar.info_nce_loss(x, y).backward()
    assert allocations.largest == 64 * 1024 * 4
    assert sum(size >= 64 * 256 * 4 for size in allocations.made) == 1


def test_what_a_strip_was_made_of_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that was computed elsewhere is dropped when its terms lie in the strip."""
    monkeypatch.setattr(log_sums.Walk, "tile", without_place(log_sums.Walk.tile))
    x, y = (torch.randn(1024, 4).requires_grad_() for _ in range(2))
    with tile_shape(64, 256), Allocations(x, y) as allocations:
        nearfar.info_nce_loss(x, y).backward()
    strip, tile = 64 * 1024 * 4, 64 * 256 * 4
    assert allocations.peak < strip + 3 * tile


def without_place(usual: Callable[..., Any]) -> Callable[..., Any]:
    """A walk that puts no closeness where it may, as with oneDNN."""
    return lambda walk, place, bound=None, out=None: usual(walk, place, bound)


def test_a_block_is_free_while_its_picks_are_used() -> None:
    x, labels = torch.randn(2048, 64).requires_grad_(), torch.arange(2048) // 8
    block = 512 * 2048 * 4
    with tile_shape(512, 512), Allocations(x, labels) as allocations:
        nearfar.batch_triplet_loss(x, labels, select="hard").backward()
    assert allocations.peak < 2 * block


def test_what_a_sum_was_made_of_is_not_kept() -> None:
    """At 256 rows the relation holds a mask of them all."""
    x = torch.randn(256, D, requires_grad=True)
    known = [x, labels := torch.arange(256) // 4]
    with Allocations(*known) as allocations:
        loss = nearfar.sup_con_loss(x, labels)
        kept = sum(size for live, size in allocations.living() if size >= 256)
    assert loss.grad_fn is not None
    assert kept <= 2 * x.nbytes


@pytest.mark.parametrize("n_classes", [1, 2])
@over(
    [c for c in PLAIN if c.kind == "batch" and not c.reference and c.function is not OF_POSITIVES]
)
def test_the_budget_is_kept_where_most_pairs_are_positive(case: Case, n_classes: int) -> None:
    data = large(case)
    data.others["labels"] = torch.arange(N) % n_classes
    with memory_budget(2**23), Allocations(*data.rows.values(), *data.others.values()) as found:
        case.run(data, "mean").backward()
    assert found.peak <= 2**23 + 8 * size_of(*data.rows.values()) + 40 * 8 * N


def test_memory_of_similar_pairs_with_the_sums_of_both_ends() -> None:
    """Linear in the batch where classes are of one size, and at most so many bytes a pair."""
    peaks = []
    for n in (1024, 2048):
        x = torch.randn(n, D, requires_grad=True)
        labels = torch.arange(n) % (n // 128)
        with memory_budget(BUDGET), Allocations(x) as found:
            nearfar.lifted_pair_loss(x, labels).backward()
        assert found.peak <= BUDGET + 8 * x.nbytes + 128 * n * 127
        peaks.append(found.peak)
    assert peaks[1] <= 2.3 * peaks[0]
