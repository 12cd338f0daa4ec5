"""Which devices run the GPU kernels."""

import pytest
import torch

from nearfar.engine import where

CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "triton", "torch_version", "hip", "runs"),
    [
        ((9, 0), "3.6.0", "2.11.0+cu128", None, True),
        ((8, 0), "3.9.0", "2.10.1", None, True),
        ((12, 0), "3.6.0", "2.11.0", None, True),
        ((7, 5), "3.9.0", "2.13.0", None, False),  # before Ampere
        ((9, 0), "3.5.1", "2.13.0", None, False),
        ((10, 0), "3.6.0", "2.13.0", None, False),
        ((10, 0), "3.7.0", "2.13.0", None, True),
        ((9, 0), "3.9.0", "2.9.1", None, False),
        ((9, 0), None, "2.13.0", None, False),  # no Triton
        ((9, 4), "3.9.0", "2.13.0", "6.2", False),  # ROCm
    ],
)
def test_devices(
    capability: tuple[int, int],
    triton: str | None,
    torch_version: str,
    hip: str | None,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if triton is None:
            raise where.PackageNotFoundError(name)
        return triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(where, "version", version)
    monkeypatch.setattr(where, "_triton_works", lambda: True)
    where._has_kernels.cache_clear()
    try:
        assert where.kernels_run_on(CARD) is runs
    finally:
        where._has_kernels.cache_clear()


def test_other_devices_run_none() -> None:
    for name in ("cpu", "mps", "meta"):
        assert not where.kernels_run_on(torch.device(name))
    with where.running_kernels(everywhere=True):
        assert where.kernels_run_on(torch.device("cpu"))
    assert not where.kernels_run_on(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it works")
def test_a_triton_that_does_not_work_is_told() -> None:
    """It is missing here, or finds no driver: either way, plain torch is there."""
    with pytest.warns(RuntimeWarning, match="without its GPU kernels"):
        assert not where._triton_works()
