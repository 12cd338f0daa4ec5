"""How large are the rounding errors in float32, beside those of the textbook formula?

Both are compared with the formula in float64.

    pip install nearfar
    python benchmarks/accuracy.py [--large] [--d 512] [--only clip] [--json accuracy.json]

Errors are relative: of the loss, of the gradients of the embeddings (the largest error divided by
the largest entry, for whichever tower is worse) and of the gradient of the scale or temperature.
They are averaged over --repeats draws. In easy batches, matches are close to each other, so that
losses are near 0; in hard batches they are as far apart as any two rows. nearfar's error should be
at most twice the formula's. An error of at most one part in ten million, the last digit of a
float32, is accepted whatever the ratio.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any
from unittest.mock import patch

import passive  # noqa: F401
import torch
import torch.nn.functional as F  # noqa: N812
from cases import WHOLE_BATCH, Case, Data, textbook
from measure import arguments, header, save, table, verdict
from torch import Tensor

N, D, LARGE = 512, 128, 2048
AT_MOST = 2.0
LAST_DIGIT = 1.2e-7
SEEDS = 5
NOISE = {"easy": 0.2, "hard": 1e3}
SHARPNESS: Mapping[str, tuple[float, ...]] = {
    "scale": (1.0, 20.0, 100.0),
    "temperature": (1.0, 0.05, 0.01),
}
Errors = dict[str, float]


def settings(only: str) -> Iterator[tuple[Case, str]]:
    """All losses; those with a learnable scale or temperature at several values of it."""
    for case in (case for case in WHOLE_BATCH if only in case.name):
        name = sharpness(case)
        if name is None:
            yield case, "as in cases.py"
            continue
        for value in SHARPNESS[name]:
            learned = tuple({*case.learned, name})
            yield (
                replace(case, hyper={**case.hyper, name: value}, learned=learned),
                f"{name} {value:g}",
            )


def sharpness(case: Case) -> str | None:
    """The scale or temperature that a loss can learn; None for a loss with a margin."""
    takes = inspect.signature(case.ours).parameters
    learnable = [
        name for name in SHARPNESS if name in takes and takes[name].annotation == float | Tensor
    ]
    return learnable[0] if learnable and case.name == case.ours.__name__ else None


def measured(case: Case, setting: str, kind: str, n: int, d: int, draws: int) -> dict[str, Any]:
    sums: dict[str, Errors] = {"nearfar": {}, "textbook": {}}
    for seed in range(draws):
        data = case.data(n, d, seed=seed, noise=NOISE[kind])
        truth = exact(case.textbook, data)
        for name, function in (("nearfar", case.ours), ("textbook", case.textbook)):
            for of, error in _errors(_outcome(function, data.to(torch.float32)), truth).items():
                sums[name][of] = sums[name].get(of, 0.0) + error / draws
    return {
        "case": case.name, "setting": setting, "batch": kind, "n": n, "d": d,
        **sums, "reached": all(_enough(sums, of) for of in sums["nearfar"]),
    }  # fmt: skip


def _outcome(function: Callable[..., Tensor], data: Data) -> dict[str, tuple[Tensor, ...]]:
    loss = function(*data.embeddings, *data.labels, **data.hyper)
    loss.backward()
    gradients = tuple(_gradient(leaf).double() for leaf in data.leaves)
    k = len(data.embeddings)
    outcome = {"loss": (loss.detach().double(),), "embeddings": gradients[:k]}
    return {**outcome, "scale": gradients[k:]} if gradients[k:] else outcome


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _errors(got: dict[str, tuple[Tensor, ...]], truth: dict[str, tuple[Tensor, ...]]) -> Errors:
    return {of: max(map(_relative, got[of], truth[of])) for of in truth}


def _relative(got: Tensor, truth: Tensor) -> float:
    error, size = (got - truth).abs().max().item(), truth.abs().max().item()
    return error / size if size else (inf if error else 0.0)


def _enough(sums: dict[str, Errors], of: str) -> bool:
    return sums["nearfar"][of] <= max(AT_MOST * sums["textbook"][of], LAST_DIGIT)


def shown(results: list[dict[str, Any]]) -> str:
    parts = ("loss", "embeddings", "scale")
    columns = ["", "batch", "setting"]
    for part in parts:
        columns += [part, "textbook", "ratio"]
    lines = [
        (
            result["case"],
            result["batch"],
            result["setting"],
            *(cell for part in parts for cell in _cells(result, part)),
            verdict(result["reached"]),
        )
        for result in results
    ]
    return "\n" + table((*columns, f"at most {AT_MOST:g}"), lines)


def _cells(result: dict[str, Any], part: str) -> tuple[str, str, str]:
    if part not in result["nearfar"]:
        return "", "", ""
    ours, textbook = result["nearfar"][part], result["textbook"][part]
    ratio = f"{ours / textbook:.2f}" if textbook else "-"
    return f"{ours:.1e}", f"{textbook:.1e}", ratio


# If the loss is near 0, the textbook formula loses its digits even in float64. These leave the
# positive out of the sum.


def _cross_entropy(z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    positive = z.gather(1, target[:, None])[:, 0]
    others = z.scatter(1, target[:, None], -inf).logsumexp(1)
    per_row = _excess(positive, others)
    return per_row.mean() if reduction == "mean" else per_row


def _excess(z: Tensor, others: Tensor) -> Tensor:
    return F.softplus(others - z, threshold=50)


def exact(formula: Callable[..., Tensor], data: Data) -> dict[str, tuple[Tensor, ...]]:
    """The outcome of a formula in float64."""
    with patch.multiple(textbook, cross_entropy=_cross_entropy, excess=_excess):
        return _outcome(formula, data.to(torch.float64))


def main() -> None:
    parser = arguments(__doc__, "large", "only", "shrink", "threads", repeats=SEEDS)
    parser.add_argument("--d", type=int, default=D, help="numbers in a row")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Error against float64")
    n = (LARGE if asked.large else N) // asked.shrink
    results = [
        measured(case, setting, kind, n, asked.d, asked.repeats)
        for case, setting in settings(asked.only)
        for kind in NOISE
    ]
    print(shown(results))
    save(asked.json, results)


if __name__ == "__main__":
    main()
