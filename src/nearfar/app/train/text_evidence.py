"""What the doctor is told of the texts of some data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.data.texts import Texts
from nearfar.app.train.split import SIDES, Split
from nearfar.doctor.texts import (
    Copies,
    CutOff,
    TextFacts,
    crossing_of_classes,
    crossing_of_pairs,
    normalised,
    script,
)

COUNTED = 10_000  # the most texts whose tokens are counted


def text_facts(data: Items | Pairs, split: Split | None) -> TextFacts | None:
    """What is known of the texts of some data; None if it holds other items.

    Args:
        data: the data, whose identities are known.
        split: their split, if there is one.
    """
    items = items_of(data)
    if not isinstance(items.content, Texts):
        return None
    texts = items.content.texts
    scripts = [script(text) for text in texts]
    if isinstance(data, Pairs):
        a, b, similar = data.a.tolist(), data.b.tolist(), data.is_similar()
        crossing = crossing_of_pairs(
            [scripts[row] for row in a], [scripts[row] for row in b], similar.tolist()
        )
        copies = [_labelled_dissimilar(data, texts)]
        if split is not None:
            copies.append(_on_two_sides(texts, _side_of(items, split)))
    else:
        crossing = crossing_of_classes(scripts, items.identity)
        copies = [_apart(texts, items.identity.tolist(), "texts are also under another identity")]
    return TextFacts(copies, crossing)


def cut_off(texts: Sequence[str], tokens: Any) -> CutOff:
    """The texts that an encoder cuts off, among at most 10,000 of them.

    Args:
        texts: the texts.
        tokens: of the encoder; see `encoders.texts.Tokens`.
    """
    if tokens.limit is None:  # it reads all
        return CutOff(0, len(texts), 0)
    some = texts[:: -(-len(texts) // COUNTED)]
    # No token is shorter than a byte, apart from a few that begin and end a text.
    room = tokens.limit - 8 - len(tokens.prompt.encode())
    long = [text for text in some if len(text.encode()) > room]
    lengths = tokens.lengths(long)
    over = [(n, text) for n, text in zip(lengths, long, strict=True) if n > tokens.limit]
    n, text = max(over, default=(0, ""))
    return CutOff(len(over), len(some), tokens.limit, text, n)


def _labelled_dissimilar(data: Pairs, texts: Sequence[str]) -> Copies:
    known = [normalised(text) for text in texts]
    rows = (~data.is_similar()).nonzero()[:, 0]
    pairs = zip(data.a[rows].tolist(), data.b[rows].tolist(), strict=True)
    same = [(a, b) for a, b in pairs if known[a] and known[a] == known[b]]
    example = [texts[row] for row in same[0]] if same else []
    return Copies(len(same), len(rows), "dissimilar pairs are of one text", example)


def _on_two_sides(texts: Sequence[str], side: Sequence[int]) -> Copies:
    there = [row for row, of in enumerate(side) if of >= 0]
    of = [side[row] for row in there]
    return _apart([texts[row] for row in there], of, "texts are also on another side of the split")


def _apart(texts: Sequence[str], of: Sequence[int], what: str) -> Copies:
    """Texts of which a copy belongs elsewhere."""
    first: dict[str, dict[int, list[int]]] = {}
    for row, (text, place) in enumerate(zip(texts, of, strict=True)):
        first.setdefault(normalised(text), {}).setdefault(place, []).append(row)
    apart = [list(places.values()) for key, places in first.items() if key and len(places) > 1]
    n = sum(len(rows) for places in apart for rows in places)
    example = [texts[rows[0]] for rows in apart[0][:2]] if apart else []
    return Copies(n, len(texts), what, example)


def _side_of(items: Items, split: Split) -> list[int]:
    """For each item the number of its side, -1 if it is on none."""
    side = torch.full((len(items.identities),), -1)
    for number, name in enumerate(SIDES):
        side[getattr(split, name)] = number
    of: Tensor = side[items.identity]
    found: list[int] = of.tolist()
    return found
