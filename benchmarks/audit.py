"""How many of the changed labels does `nearfar audit` find, beside plain nearest neighbours?

5 % of the labels of the built-in letters are changed: at random, or each to the identity of the
item's nearest other letter, by pixels. Counted is the share of the changed labels among the first
candidates: 1.1 and 2 times as many as were changed. The neighbours on pixels rank items by how much
nearer the nearest item of another identity is than the nearest of their own. With the labels as
they are, every label that is doubted counts as a false alarm, though a few may be right.

    pip install 'nearfar[app]'
    python benchmarks/audit.py [--seeds 3] [--json audit.json]
"""

import time
from statistics import median
from typing import Any

import passive  # noqa: F401
import torch
from measure import arguments, header, save, table
from torch import Tensor

from nearfar.app.audit import DOUBTED, DROPPED
from nearfar.app.audit.judge import judge
from nearfar.app.audit.spaces import given, learned
from nearfar.app.data.items import Items, as_input, read_glyphs
from nearfar.distance import unit

SHARE = 0.05
KINDS = ("random", "nearest", "unchanged")


def changed(items: Items, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """The identities with some changed, and which rows were."""
    generator = torch.Generator().manual_seed(seed)
    n, identity = len(items.x), items.identity.clone()
    if kind == "unchanged":
        return identity, torch.empty(0, dtype=torch.int64)
    rows = torch.randperm(n, generator=generator)[: round(SHARE * n)]
    if kind == "random":
        new = torch.randint(len(items.identities) - 1, rows.shape, generator=generator)
        identity[rows] = new + (new >= items.identity[rows])
        return identity, rows
    pixels = as_input(items.x).flatten(1)
    for some in rows.split(512):
        distance = torch.cdist(pixels[some], pixels)
        distance[items.identity[some][:, None] == items.identity] = torch.inf
        identity[some] = items.identity[distance.argmin(1)]
    return identity, rows


def neighbours(items: Items, identity: Tensor) -> Tensor:
    """How much nearer the nearest item of another identity is, on pixels."""
    x, margins = unit(as_input(items.x).flatten(1)), []
    for rows in torch.arange(len(x)).split(512):
        cosine = x[rows] @ x.T
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        own = identity[rows][:, None] == identity
        other = cosine.masked_fill(own, -torch.inf).amax(1)
        margins.append(other - cosine.masked_fill(~own, -torch.inf).amax(1))
    return torch.cat(margins)


def found(margin: Tensor, rows: Tensor, times: float) -> float:
    """The share of the changed rows among the first candidates."""
    first = margin.topk(round(times * len(rows))).indices
    return float(torch.isin(rows, first).double().mean())


def measured(items: Items, kind: str, seed: int) -> dict[str, Any]:
    identity, rows = changed(items, kind, seed)
    noisy = Items(items.x, identity, items.names, items.identities)
    start = time.perf_counter()
    plain = judge(given(noisy), identity)
    judged = learned(noisy, print)
    seconds = time.perf_counter() - start
    assert judged is not None
    confidence = judged.margin.sigmoid()
    result: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "seconds": seconds,
        "agreement": {"as they are": plain.agreement(), "networks": judged.agreement()},
    }
    for name, least in (("doubted", DOUBTED), ("dropped", DROPPED)):
        listed = (confidence >= least).nonzero()[:, 0]
        right = torch.isin(listed, rows).double().mean()
        result[name] = {"share": len(listed) / len(identity), "changed": float(right)}
    if len(rows):
        both = {"audit": judged.margin, "neighbours": neighbours(items, identity)}
        result["found"] = {
            name: {str(times): found(margin, rows, times) for times in (1.1, 2.0)}
            for name, margin in both.items()
        }
    return result


def shown(results: list[dict[str, Any]]) -> str:
    lines = []
    for kind in KINDS:
        some = [r for r in results if r["kind"] == kind]
        for name in ("audit", "neighbours") if kind != "unchanged" else ():
            cells = (
                f"{median(r['found'][name][times] for r in some):.3f}" for times in ("1.1", "2.0")
            )
            lines.append((f"{kind}, {name}", *cells))
    listed = [
        (
            kind,
            *(
                f"{median(r[name][part] for r in results if r['kind'] == kind):.3f}"
                for name in ("doubted", "dropped")
                for part in ("share", "changed")
            ),
        )
        for kind in KINDS
    ]
    columns = ("labels", "doubted", "of these changed", "dropped", "of these changed")
    return (
        "\nShare of the changed labels that are found, medians\n"
        + table(("", "in 1.1 x", "in 2 x"), lines)
        + "\n\nWhat is listed, as shares of all items\n"
        + table(columns, listed)
    )


def main() -> None:
    parser = arguments(__doc__, "threads")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Changed labels of the built-in letters")
    items, results = read_glyphs(), []
    for seed in range(asked.seeds):
        for kind in KINDS:
            results.append(measured(items, kind, seed))
            print(results[-1], flush=True)
    print(shown(results))
    save(asked.json, results)


if __name__ == "__main__":
    main()
