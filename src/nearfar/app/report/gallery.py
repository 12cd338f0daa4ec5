"""The hardest test pairs, as images, texts or numbers for the page."""

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from nearfar.app.report.study import Study
from nearfar.app.train.record import Array

NUMBERS = 6  # shown of a vector


@dataclass(frozen=True)
class Item:
    """An item of a pair: its name, and its image as a data URL, its text or some of its numbers."""

    name: str
    identity: str
    image: str | None
    text: str | None
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class HardPair:
    """A pair that is hard to decide, and its distance."""

    distance: float
    a: Item
    b: Item


def hardest_pairs(study: Study) -> tuple[list[HardPair], list[HardPair]]:
    """The closest different pairs, and the farthest same pairs."""
    outcome = study.outcome
    items = {int(item): row for row, item in enumerate(outcome.shown)}

    def item(index: int) -> Item:
        x = outcome.inputs[items[index]]
        named = str(outcome.names[index]), str(outcome.identities[outcome.identity[index]])
        if x.ndim == 0:
            return Item(*named, None, str(x), ())
        if x.ndim == 1:
            numbers = (*(f"{value:7.3g}" for value in x[:NUMBERS]), *["…"][: len(x) - NUMBERS])
            return Item(*named, None, None, numbers)
        return Item(*named, _data_url(x), None, ())

    pairs = [
        HardPair(float(distance), item(int(a)), item(int(b)))
        for (a, b), distance in zip(outcome.hardest, outcome.hardest_distance, strict=True)
    ]
    same = outcome.hardest_similar
    return (
        [pair for pair, similar in zip(pairs, same, strict=True) if not similar],
        [pair for pair, similar in zip(pairs, same, strict=True) if similar],
    )


def _data_url(x: Array) -> str:
    """A (c, h, w) uint8 image as a data URL."""
    pixels = x[0] if len(x) == 1 else x.transpose(1, 2, 0)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
