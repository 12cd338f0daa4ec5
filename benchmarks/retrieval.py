"""How long does exact search among many references take, and how much memory?

The other contender is `util.semantic_search` of sentence-transformers, which finds the ten nearest
references and computes no figures from them.

    pip install nearfar sentence-transformers
    python benchmarks/retrieval.py [--large] [--json retrieval.json]

1,000 queries of 128 numbers against 100,000 references; with `--large` also against 1,000,000.
Memory is the extra peak of the first call in this process, nearfar before the other.
"""

from collections.abc import Callable
from typing import Any

import passive  # noqa: F401
import torch
from measure import arguments, contenders, contenders_table, header, installed, save
from torch import Tensor

from nearfar import Reference
from nearfar.evaluate import retrieval

QUERIES, D, PER_CLASS = 1_000, 128, 10
PEER = "sentence-transformers"


def searches(x: Tensor, reference: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    own = labels[: len(x)]

    def ours() -> object:
        return retrieval(x, own, reference=Reference(reference, labels))

    if installed(PEER) is None:
        print(f"\n(without {PEER}: it needs `pip install {PEER}`)")
        return {"nearfar": ours}
    from sentence_transformers.util import semantic_search

    return {"nearfar": ours, PEER: lambda: semantic_search(x, reference, top_k=10)}


def measured(references: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    labels = torch.arange(references) // PER_CLASS
    reference = torch.randn(references, D)
    x = reference[:QUERIES] + torch.randn(QUERIES, D)
    calls = searches(x, reference, labels)
    return {
        "queries": len(x),
        "references": references,
        "d": D,
        "contenders": contenders(calls, repeats),
    }


def shown(result: dict[str, Any]) -> str:
    title = f"\n{QUERIES} queries, {result['references']} references"
    return f"{title}\n{contenders_table(result['contenders'])}"


def main() -> None:
    asked = arguments(__doc__, "large", "shrink", "threads", repeats=3).parse_args()
    torch.set_num_threads(asked.threads)
    header("Exact search")
    results = []
    for references in (100_000, 1_000_000) if asked.large else (100_000,):
        results.append(measured(references // asked.shrink, asked.repeats))
        print(shown(results[-1]), flush=True)
    save(asked.json, results)


if __name__ == "__main__":
    main()
