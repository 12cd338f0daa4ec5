"""A kernel's form of a rule, written with operators alone, computes what plain torch does."""

import inspect
from typing import Any

import pytest
import torch
from batch_cases import CASES, Case, over

import nearfar as nf
from nearfar.engine import log_sums, pair_sums
from nearfar.engine.log_sum_rule import Exponent, LogSumRule
from nearfar.engine.pair_sums import PairSum
from nearfar.losses import own

Rules = list[LogSumRule | PairSum]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    """The rules that executors were made of."""
    seen: Rules = []

    def watch(module: Any, name: str, usual: Any) -> None:
        def watched(rule: Any, *arguments: Any, **more: Any) -> Any:
            seen.append(rule)
            return usual(rule, *arguments, **more)

        monkeypatch.setattr(module, name, watched)

    for case in {case.module: case for case in CASES}.values():
        for name, usual in (
            ("log_sum_loss", log_sums.log_sum_loss),
            ("pair_loss", pair_sums.pair_loss),
        ):
            if hasattr(case.module, name):
                watch(case.module, name, usual)
    watch(own, "pair_loss", pair_sums.pair_loss)
    return seen


def assert_same_exponent(exponent: Exponent, z: torch.Tensor) -> None:
    value, slope = exponent.kernel(z, exponent.numbers)
    expected = exponent.slope(z) if callable(exponent.slope) else exponent.slope
    torch.testing.assert_close(value, exponent.of(z.clone()))
    torch.testing.assert_close(torch.as_tensor(slope) + 0 * z, expected + 0 * z)


@over([case for case in CASES if not case.hard])
def test_both_forms_are_the_same(case: Case, rules: Rules) -> None:
    case.run(case.draw(12))
    z = torch.linspace(-3, 12, 301)
    d = z.clamp(min=0)
    assert rules
    for rule in rules:
        if isinstance(rule, LogSumRule):
            for exponent in (rule.far, rule.near):
                if exponent is not None:
                    assert_same_exponent(exponent, z)
            assert rule.term is None or rule.per_positive
            continue
        assert rule.kernel is not None
        for kernel, term in (
            (rule.kernel.positive, rule.positive),
            (rule.kernel.negative, rule.negative),
        ):
            if callable(kernel):  # the others have tests in Triton's interpreter
                for found, expected in zip(kernel(d, rule.kernel.numbers), term(d), strict=True):
                    torch.testing.assert_close(found, expected)


N = 3


def near(d: Any, numbers: Any) -> Any:
    return d, 0 * d + 1


def test_what_no_kernel_can_be_made_of() -> None:
    with pytest.raises(TypeError, match=r"positive must be a function.*list"):
        nf.PairKernel([], near)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"positive.*def.*lambda"):
        nf.PairKernel(lambda d, numbers: (d, d), near)
    two = 2

    def closure(d: Any, numbers: Any) -> Any:
        return two * d, two

    with pytest.raises(TypeError, match=r"negative.*two.*numbers"):
        nf.PairKernel(near, closure)

    def power(d: Any, numbers: Any) -> Any:
        return d**2, 2 * d

    with pytest.raises(TypeError, match=r"negative uses \*\*.*d \* d"):
        nf.PairKernel(near, power)

    def branch(d: Any, numbers: Any) -> Any:
        return (d, 1) if numbers[0] else (0 * d, 0)

    with pytest.raises(TypeError, match=r"positive uses a branch"):
        nf.PairKernel(branch, near)

    def constant(d: Any, numbers: Any) -> Any:
        return N * abs(d), N

    with pytest.raises(TypeError, match=r"positive uses N, abs"):
        nf.PairKernel(constant, near)
    rule = nf.PairRule(torch.square, torch.square, kernel=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kernel.*PairKernel.*got int"):
        nf.batch_loss(rule, torch.eye(3), [0, 0, 1], distance="euclidean")
    with pytest.raises(TypeError, match="numbers"):
        nf.PairKernel(near, near, numbers="3")  # type: ignore[arg-type]
    assert not inspect.signature(nf.PairKernel).parameters["numbers"].default
