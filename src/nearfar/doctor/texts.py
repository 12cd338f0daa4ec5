"""What can be seen of texts before an encoder reads them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

LETTERS = ("Lu", "Ll", "Lt", "Lo")  # categories of Unicode; marks and modifiers follow a letter
DROPPED = ("P", "Z", "C")  # first letters of those of punctuation, spaces and controls
KANA = ("HIRAGANA", "KATAKANA")  # written among Chinese characters


@dataclass(frozen=True)
class Copies:
    """Texts that are the same but for case, spaces and punctuation, where they should differ.

    Attributes:
        n: how many there are.
        total: of how many.
        what: what is counted, and what is wrong: "texts are also under another identity".
        example: two such texts; empty if there are none.
    """

    n: int
    total: int
    what: str
    example: Sequence[str] = ()


@dataclass(frozen=True)
class CutOff:
    """Texts of which an encoder reads only the beginning.

    Attributes:
        n: how many there are.
        total: of how many.
        limit: the most tokens that the encoder reads.
        longest: the longest of them.
        tokens: how many tokens the longest has.
    """

    n: int
    total: int
    limit: int
    longest: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Crossing:
    """Pairs of texts that are written in two scripts.

    Attributes:
        similar: how many similar pairs are.
        n_similar: of how many.
        dissimilar: how many dissimilar pairs are.
        n_dissimilar: of how many.
        scripts: the most frequent scripts.
    """

    similar: int
    n_similar: int
    dissimilar: int
    n_dissimilar: int
    scripts: Sequence[str] = ()


@dataclass(frozen=True)
class TextFacts:
    """What is known of texts.

    Attributes:
        copies: texts that are nearly the same.
        crossing: pairs across scripts.
        cut: texts that are cut off; None without an encoder.
    """

    copies: Sequence[Copies]
    crossing: Crossing
    cut: CutOff | None = None


def normalised(text: str) -> str:
    """A text without what a reader hardly sees: case, width, spaces, punctuation.

    >>> normalised("Saint-Martin ") == normalised("ＳＡＩＮＴ MARTIN")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (" " if unicodedata.category(c)[0] in DROPPED else c for c in folded)
    return " ".join("".join(kept).split())


def script(text: str) -> str:
    """The script in which most letters of a text are written; empty without letters.

    >>> script("Deutschland"), script("ドイツ語"), script("1 + 1")
    ('Latin', 'CJK', '')
    """
    found = Counter(filter(None, map(_script_of, unicodedata.normalize("NFKC", text))))
    return found.most_common(1)[0][0] if found else ""


@cache
def _script_of(character: str) -> str:
    """The script of a letter, the first word of its name; empty for what is no letter."""
    if unicodedata.category(character) not in LETTERS:
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return "CJK" if word in KANA or word == "CJK" else word.capitalize()


def crossing_of_pairs(a: Sequence[str], b: Sequence[str], similar: Sequence[bool]) -> Crossing:
    """Crossing of listed pairs.

    Args:
        a: (p,) the script of the first text of each pair, empty if it has none.
        b: that of the second.
        similar: (p,) whether the pair is.
    """
    told = [
        (one, other, same) for one, other, same in zip(a, b, similar, strict=True) if one and other
    ]
    counts = Counter((same, one != other) for one, other, same in told)
    return Crossing(
        counts[True, True],
        counts[True, True] + counts[True, False],
        counts[False, True],
        counts[False, True] + counts[False, False],
        _commonest([*a, *b]),
    )


def crossing_of_classes(scripts: Sequence[str], labels: Tensor) -> Crossing:
    """Crossing of every two texts, which are similar if their labels, (n,), are equal."""
    told = [
        (label, script) for label, script in zip(labels.tolist(), scripts, strict=True) if script
    ]
    n = _pairs([len(told)])
    of_class = _pairs(Counter(label for label, _ in told).values())
    of_script = _pairs(Counter(script for _, script in told).values())
    of_both = _pairs(Counter(told).values())
    return Crossing(
        of_class - of_both,
        of_class,
        n - of_class - (of_script - of_both),
        n - of_class,
        _commonest(scripts),
    )


def _pairs(sizes: Iterable[int]) -> int:
    """How many pairs groups of these sizes hold."""
    return sum(size * (size - 1) // 2 for size in sizes)


def _commonest(scripts: Sequence[str]) -> list[str]:
    return [script for script, _ in Counter(filter(None, scripts)).most_common(3)]
