"""The kernels over several processes find what one process finds in plain torch."""

from typing import Any

import pytest
import torch
from batch_cases import near
from interpreted import interpreted, kernels
from processes import run
from split_cases import EVERY, derived, drawn, joined, with_group

from nearfar.distributed import over
from nearfar.engine import gpu

SHORT = [
    "sup_con-default",
    "sup_con-learned",
    "sup_con-weighted",
    "sup_con-multi-labels",
    "sup_con-reference-self",
    "nt_xent-decoupled-weighted",
    "nca-learned",
    "circle-weighted",
    "lifted_structure-default",
    "lifted_pair-weighted",
    "batch_contrastive-default",
    "batch_contrastive-1.2-cosine",
    "rule-pairs",
    "siglip-learned",
    "clip-learned",
    "clip-decoupled-weighted",
    "info_nce-hard-symmetric",
    "proxy_softmax-both-learned",
    "proxy_anchor-weighted",
    "triplet-weighted",
    "triplet-hard",
    "quadruplet",
]
WIDE = ["clip-learned", "clip-weighted", "sup_con-learned", "nt_xent-default", "siglip-learned"]


def by_kernels(names: list[str], d: int) -> tuple[Any, list[bool]]:
    """What this process finds, and whether kernels ran each comparison."""
    seen: list[bool] = []
    usual = gpu.takes

    def watched(*arguments: Any) -> bool:
        seen.append(usual(*arguments))
        return seen[-1]

    gpu.takes = watched
    try:
        with interpreted():
            return with_group(names, ["mean", "active"], torch.float32, over(), d), seen
    finally:
        gpu.takes = usual


@pytest.mark.parametrize(("names", "d"), [(SHORT, 4), (WIDE, 300)], ids=["short", "wide"])
@pytest.mark.parametrize("world", [2, 3])
def test_kernels_over_processes(world: int, names: list[str], d: int, kernels: None) -> None:
    results = run(world, by_kernels, names, d, timeout=250)
    found, seen = zip(*results, strict=True)
    assert all(any(each) for each in seen)
    for name in names:
        case = EVERY[name]
        data = drawn(case, torch.float32, d)
        for reduction in ("mean", "active"):
            true = derived(case, data.to(torch.float64), reduction)
            ours = joined(case, data, [one[name, reduction] for one in found], reduction)
            both = (ours.value, ours.gradients), (true.value, true.gradients)
            near(*both, rtol=3e-5, floor=1e-6)
