"""The hardest test pairs, as images or rows that a page can hold."""

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from nearfar.app.report.study import Study
from nearfar.app.train.record import Array

NUMBERS = 6  # of a vector


@dataclass(frozen=True)
class Item:
    """One side of a pair: its name, and an image as a data address or some numbers."""

    name: str
    identity: str
    image: str | None
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class HardPair:
    """A pair that is hard to decide, and how far apart it is."""

    distance: float
    a: Item
    b: Item


def hardest_pairs(study: Study) -> tuple[list[HardPair], list[HardPair]]:
    """The closest different pairs, and the same pairs that are farthest apart."""
    outcome = study.outcome
    items = {int(item): row for row, item in enumerate(outcome.shown)}

    def item(index: int) -> Item:
        x = outcome.inputs[items[index]]
        identity = str(outcome.identities[outcome.identity[index]])
        if x.ndim == 1:
            numbers = (*(f"{value:7.3g}" for value in x[:NUMBERS]), *["…"][: len(x) - NUMBERS])
            return Item(str(outcome.names[index]), identity, None, numbers)
        return Item(str(outcome.names[index]), identity, _data_address(x), ())

    pairs = [
        HardPair(float(distance), item(int(a)), item(int(b)))
        for (a, b), distance in zip(outcome.hardest, outcome.hardest_distance, strict=True)
    ]
    same = outcome.hardest_similar
    return (
        [pair for pair, similar in zip(pairs, same, strict=True) if not similar],
        [pair for pair, similar in zip(pairs, same, strict=True) if similar],
    )


def _data_address(x: Array) -> str:
    """(c, h, w) uint8 as a PNG inside an address."""
    pixels = x[0] if len(x) == 1 else x.transpose(1, 2, 0)
    held = BytesIO()
    Image.fromarray(pixels).save(held, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(held.getvalue()).decode()
