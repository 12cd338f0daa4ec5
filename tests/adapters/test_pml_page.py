"""The page from-pytorch-metric-learning names all that their library has, with its defaults."""

import inspect
import re
from typing import Any

import pytest
from guides import ROOT, check_code

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.miners import BatchHardMiner

from nearfar.adapters import pml

PAGE = (ROOT / "docs/from-pytorch-metric-learning.md").read_text(encoding="utf-8")
THEIRS: dict[str, Any] = {
    "losses": losses,
    "miners": miners,
    "distances": distances,
    "reducers": reducers,
}
# Of no loss: for losses of one's own, and wrappers.
HELPERS = ("Mixin", "Wrapper", "Function", "GenericPairLoss", "Memory", "MultipleLosses", "SelfSup")


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check_code("docs/from-pytorch-metric-learning.md", capsys)


@pytest.mark.parametrize("module", THEIRS)
def test_every_name_is_on_the_page(module: str) -> None:
    names = [name for name, value in vars(THEIRS[module]).items() if isinstance(value, type)]
    assert [name for name in names if not re.search(rf"\b{name}\b", PAGE)] == []


def rows() -> dict[str, list[str]]:
    """The cells of the first row of each name that a first cell begins with."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    found = [(re.match(r"`(\w+)\(", first), [first, *rest]) for first, *rest in cells]
    return {match[1]: line for match, line in reversed(found) if match}


def defaults(kind: type) -> list[str]:
    """Each default as the page writes it, of the constructor itself."""
    if kind is BatchHardMiner:
        return []
    parameters = inspect.signature(kind.__init__).parameters.values()
    return [
        f"{p.name}={p.default!r}".replace("'", '"')
        for p in parameters
        if p.default is not p.empty and not p.name.startswith(("embedding_reg", "weight_reg"))
    ]


MAPPED = [
    (module, name)
    for module in ("losses", "miners")
    for name in getattr(pml, module).__all__
    if not any(word in name for word in HELPERS) and name != "BaseMiner"
]


@pytest.mark.parametrize(("module", "name"), MAPPED)
def test_every_default_is_in_its_row(module: str, name: str) -> None:
    first, *rest = rows()[name]
    kind = getattr(THEIRS[module], name)
    assert [value for value in defaults(kind) if value not in first] == []
    sizes = {"num_classes": 3, "embedding_size": 2}
    made = kind(**(sizes if hasattr(kind, "get_logits") else {}))
    if name != "EmbeddingsAlreadyPackagedAsTriplets":
        assert f"`{type(made.distance).__name__}" in rest[0]
        assert ("power=2" in rest[0]) == (made.distance.power == 2)
    if module == "losses" and name != "ThresholdConsistentMarginLoss":
        of_one = made.reducer
        of_one = getattr(of_one, "reducers", {"": of_one})
        (reducer,) = {type(part).__name__ for part in of_one.values()}
        assert rest[1] == f"`{reducer}`"
