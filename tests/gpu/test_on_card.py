"""The program that checks a card notices what is wrong, here in Triton's interpreter."""

import on_card
import pytest
from interpreted import kernels, taken

pytestmark = pytest.mark.usefixtures("kernels")


def test_what_is_right(taken: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    names = ("clip-20", "hard triplets", "batch_contrastive-2.5-snr")
    assert on_card.main("cpu", 16, (12,), names) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert any(taken)


def test_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_card, "BOUNDS", {"float32": 1e-9})
    assert on_card.main("cpu", 16, (12,), ("clip-20",)) == 1
