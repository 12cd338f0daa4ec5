"""How long do figures over every pair take, with their intervals, and how much memory?

The other contender puts every distance into one array and calls scikit-learn's `roc_curve`, which
weighs all pairs alike and gives no intervals.

    pip install nearfar scikit-learn
    python benchmarks/verification.py [--json verification.json]

5,180 items of 370 identities, 128 numbers each: 33,670 similar and 13.4 million dissimilar pairs.
Memory is the extra peak of the first call in this process, nearfar before the other.
"""

from typing import Any

import numpy as np
import passive  # noqa: F401
import torch
from measure import arguments, contenders, contenders_table, header, installed, save
from torch import Tensor

from nearfar.evaluate import every_pair

IDENTITIES, ITEMS, D = 370, 14, 128
PEER = "scikit-learn"


def ours(x: Tensor, labels: Tensor) -> object:
    pairs = every_pair(x, labels)
    found = pairs.verification()
    return found, pairs.at_threshold(pairs.fit_threshold(far=0.01))


def theirs(x: Tensor, labels: Tensor) -> object:
    from sklearn.metrics import auc, roc_curve

    unit = torch.nn.functional.normalize(x)
    a, b = torch.triu_indices(len(x), len(x), 1)
    far, tar, _ = roc_curve((labels[a] == labels[b]).numpy(), (unit @ unit.T)[a, b].numpy())
    return auc(far, tar), float(far[np.argmin(np.abs(far - (1 - tar)))])


def measured(identities: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    labels = torch.arange(identities).repeat_interleave(ITEMS)
    x = torch.randn(identities, D)[labels] + 1.2 * torch.randn(len(labels), D)
    calls = {"nearfar": lambda: ours(x, labels)}
    if installed(PEER) is None:
        print(f"\n(without {PEER}: it needs `pip install {PEER}`)")
    else:
        calls[PEER] = lambda: theirs(x, labels)
    return {
        "items": len(x),
        "identities": identities,
        "d": D,
        "contenders": contenders(calls, repeats),
    }


def shown(result: dict[str, Any]) -> str:
    title = f"\n{result['items']} items of {result['identities']} identities"
    return f"{title}\n{contenders_table(result['contenders'])}"


def main() -> None:
    asked = arguments(__doc__, "shrink", "threads", repeats=3).parse_args()
    torch.set_num_threads(asked.threads)
    header("Figures over every pair")
    result = measured(IDENTITIES // asked.shrink, asked.repeats)
    print(shown(result))
    save(asked.json, [result])


if __name__ == "__main__":
    main()
