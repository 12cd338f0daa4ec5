"""What each of several processes computes and holds."""

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from processes import run

import nearfar as nf
from nearfar.distributed import over
from nearfar.engine.budget import tile_shape
from nearfar.engine.walk import Walk

pytestmark = pytest.mark.slow  # on several processes

SIZES = {2: (7, 6), 3: (9, 0, 4)}


def visited(name: str) -> list[tuple[slice, slice]]:
    """The tiles that this process takes of a batch with itself."""
    world, rank = dist.get_world_size(), dist.get_rank()
    n, places = SIZES[world][rank], []
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(rank))
    usual = Walk.tile

    def watched(walk, place, *rest):
        places.append(place[:2])
        return usual(walk, place, *rest)

    Walk.tile = watched
    try:
        with torch.no_grad(), tile_shape(2, 2):
            getattr(nf, name)(x, torch.arange(n) % 3, group="world")
    finally:
        Walk.tile = usual
    return places


LOSSES = ["sup_con_loss", "nt_xent_loss", "multi_similarity_loss", "batch_contrastive_loss"]


@pytest.mark.parametrize("world", SIZES)
def test_each_pair_of_rows_of_a_batch_with_itself_is_visited_once(world: int) -> None:
    for name in LOSSES:
        n = sum(SIZES[world])
        found = run(world, visited, name)
        times = torch.zeros(n, n, dtype=torch.int64)
        for rows, columns in (place for of_one in found for place in of_one):
            times[rows, columns] += 1
        both = times + times.T
        both.diagonal().fill_(1)
        square = times == times.T  # a tile on the diagonal holds both orders of its pairs
        assert (both == torch.where(square & (times == 1), 2, 1))[~torch.eye(n, dtype=bool)].all()
        share = [sum(len(range(n)[r]) * len(range(n)[c]) for r, c in of_one) for of_one in found]
        assert max(share) <= 1.5 * sum(share) / world, share


def rounded(precision: str) -> tuple[float, torch.Tensor]:
    rank = dist.get_rank()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))[4 * rank :][:4]
    x.requires_grad_()
    loss = nf.sup_con_loss(
        x, torch.arange(8)[4 * rank :][:4] % 3, precision=precision, group="world"
    )
    loss.backward()
    return loss.item(), x.grad / 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rows_are_rounded_as_on_one_process(precision: str) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = nf.sup_con_loss(x, torch.arange(8) % 3, precision=precision)
    loss.backward()
    exact = nf.sup_con_loss(x.detach(), torch.arange(8) % 3)
    assert abs(loss.item() - exact.item()) > 1e-5  # so that the tolerance below means something
    values, gradients = zip(*run(2, rounded, precision), strict=True)
    torch.testing.assert_close(torch.tensor(values), loss.detach().expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(gradients), x.grad, rtol=1e-5, atol=1e-7)


def memory(name: str, n: int, d: int, ring: bool) -> tuple[float, float, torch.Tensor]:
    """The most memory, in copies of this process's rows, and the loss and gradient."""
    chance = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(n, d, generator=chance).requires_grad_() for _ in range(2))
    labels = torch.arange(n) // 2 + n * dist.get_rank()
    given = (x, y) if name == "clip_loss" else (x, labels)
    how = {"scale": 10.0} if name == "clip_loss" else {}
    # Tiles so small that they hardly count.
    with nf.memory_budget(2**20), Allocations(x, y) as seen:
        loss = getattr(nf, name)(*given, group=over(ring=ring), **how)
        loss.backward()
    assert x.grad is not None
    return seen.peak / x.nbytes, loss.item(), x.grad


# What is the process's own: its rows, these times the scale, and their gradient, a part and the
# whole of it. Where tiles are dealt out, all rows are times the scale, and have the gradient.
OWN, OWN_DEALT = 4, 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_loss", "sup_con_loss"])
def test_a_ring_holds_at_most_half_of_what_is_gathered(name: str) -> None:
    own = OWN if name == "clip_loss" else OWN_DEALT
    gathered, ring = (run(4, memory, name, 4096, 256, way, timeout=250) for way in (False, True))
    for (most, loss, gradient), (less, same, like) in zip(gathered, ring, strict=True):
        assert less - OWN <= (most - own) / 2, (less, most)
        torch.testing.assert_close(same, loss)
        torch.testing.assert_close(like, gradient, rtol=1e-4, atol=1e-9)
