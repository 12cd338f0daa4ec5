"""Read tables of pairs, with columns a, b, label and, optionally, groups of the items."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar.app.data.content import Arrays, Content
from nearfar.app.data.files import file_key, find_file
from nearfar.app.data.fit import Fit
from nearfar.app.data.groups import connected
from nearfar.app.data.image_files import read_files
from nearfar.app.data.images import is_image
from nearfar.app.data.items import Items, Pairs, with_groups
from nearfar.app.data.reads import Reads
from nearfar.app.data.text_tables import TEXT_ENCODER
from nearfar.app.data.texts import Texts, checked_text
from nearfar.app.errors import InputError
from nearfar.app.tables import (
    TableFile,
    is_blank,
    known_length,
    looks_like_vector,
    read_table,
    refuse_bad_labels,
    vector,
)
from nearfar.labels import pair_labels

Cell = Path | tuple[float, ...]


def read_pairs(
    path: Path,
    reads: Reads,
    *,
    similar_label: int | None,
    labelled: bool = True,
) -> Pairs:
    """Read a table whose columns a and b hold texts, vectors, or paths relative to the table.

    Args:
        path: the table.
        reads: what the encoder reads: whether cells are texts, and the size of images.
        similar_label: which of 0 and 1 means similar, for numeric labels.
        labelled: whether labels are read; without them, no identity is known.

    Raises:
        InputError: a column is missing, the labels are ambiguous, or a cell holds no such item; the
            message names its line or row.
    """
    table = read_table(path)
    first, second = table.column("a"), table.column("b")
    if labelled:
        table.column("label")
    similar = _labels(table, similar_label) if labelled else torch.zeros(len(table)).bool()
    cells = [*first, *second]
    where = [table.where(row) for row in range(len(table))]
    at = [f"{place}: {side}" for side in "ab" for place in where]
    content, names, index, notes = _content(cells, at, path, reads)
    n = len(content)
    a, b = torch.tensor(index).view(2, -1)
    if not labelled:
        unknown = torch.full((n,), -1)
        return Pairs(Items(content, unknown, names, ["unknown"], notes=notes), a, b, similar, where)
    joined = similar > 0.5 if similar.is_floating_point() else similar
    _refuse_self_dissimilar(table, a, b, joined)
    _refuse_contradictions(path, a, b, joined, where)
    identity = connected(n, a, b, joined)
    identities = [f"identity {i}" for i in range(int(identity.max()) + 1)]
    items = Items(content, identity, names, identities, notes=notes)
    items = with_groups(items, _groups(table, index, n))
    return Pairs(items, a, b, similar, where)


def _content(
    cells: Sequence[Any], at: Sequence[str], path: Path, reads: Reads
) -> tuple[Content, list[str], list[int], Sequence[str]]:
    """The distinct items of the cells, their names, the item of each cell, and notes."""
    if reads.texts:
        texts = [checked_text(cell, place) for cell, place in zip(cells, at, strict=True)]
        first: dict[str, int] = {}
        for row, text in enumerate(texts):
            first.setdefault(text, row)
        number = {text: i for i, text in enumerate(first)}
        names = [at[row] for row in first.values()]
        return Texts(list(first)), names, [number[text] for text in texts], ()
    if reads.image_size is not None and not names_image(cells[0]):
        raise InputError(f"--image-size is for images; {path} holds vectors.")
    distinct, index = _distinct(_parsed(cells, at, path.parent))
    places = [at[row] for _, row in distinct]
    content, notes = _read_items([cell for cell, _ in distinct], places, reads.fit)
    return content, _names(cells, distinct, at), index, notes


def _names(
    cells: Sequence[Any], distinct: Sequence[tuple[Cell, int]], at: Sequence[str]
) -> list[str]:
    """The name of each item: the path of an image, or the position of a vector."""
    return [str(cells[row]) if isinstance(cell, Path) else at[row] for cell, row in distinct]


def _groups(table: TableFile, index: Sequence[int], n: int) -> Mapping[str, list[str]]:
    """The `groups` and `split_groups` of n items, if there are such columns; empty for no group.

    Each is one column for both items of a pair, or two: `groups_a` and `groups_b`.

    Raises:
        InputError: one of two columns is missing, or an item is in two groups.
    """
    found: dict[str, list[str]] = {}
    for name in ("groups", "split_groups"):
        both = [f"{name}_{side}" for side in "ab"]
        if not table.columns.keys() & {name, *both}:
            continue
        columns = [name, name] if name in table.columns else both
        if columns != both and table.columns.keys() & {*both}:
            raise InputError(f"{table.path} has {name!r} and {both[0]!r} or {both[1]!r}. Drop one.")
        cells = [cell for column in columns for cell in table.column(column)]
        found[name] = [""] * n
        first: dict[int, int] = {}  # the row of the cell that gives the group of an item
        for row, (cell, item) in enumerate(zip(cells, index, strict=True)):
            if is_blank(cell):
                continue
            group = str(cell).strip()
            if found[name][item] not in ("", group):
                places = [table.where(r % len(table)) for r in (first[item], row)]
                raise InputError(
                    f"{places[0]} and {places[1]}: an item is in two {name}, {found[name][item]!r} "
                    f"and {group!r}. Name one group for each item"
                    + ("." if columns == both else f", in two columns, {' and '.join(both)}.")
                )
            found[name][item] = group
            first.setdefault(item, row)
    return found


def doubtful(pairs: Pairs) -> str:
    """A note on dissimilar pairs whose items similar pairs connect; empty if there are none."""
    identity = pairs.items.identity
    rows = (~pairs.is_similar() & (identity[pairs.a] == identity[pairs.b])).nonzero()[:, 0]
    if not len(rows):
        return ""
    return (
        f"{len(rows):,} of {len(pairs.a):,} pairs are labelled dissimilar, but other pairs connect "
        f"their items as similar (the first: {pairs.where[int(rows[0])]}). They stay dissimilar; "
        "check these labels."
    )


def _refuse_self_dissimilar(table: TableFile, a: Tensor, b: Tensor, similar: Tensor) -> None:
    """Refuse an item that is labelled dissimilar to itself, even under two names."""
    itself = ((a == b) & ~similar).nonzero()[:, 0]
    if not len(itself):
        return
    row = int(itself[0])
    names = [str(table.columns[side][row]).strip() for side in "ab"]
    if names[0] == names[1] or looks_like_vector(names[0]):
        what = "an item is labelled dissimilar to itself"
    else:
        what = f"{names[0]} and {names[1]} are the same file, but labelled dissimilar"
    raise InputError(
        f"{table.where(row)}: {what} ({len(itself):,} of {len(a):,} pairs of {table.path} are). "
        "Remove them, or check --similar-label."
    )


def _refuse_contradictions(
    path: Path, a: Tensor, b: Tensor, similar: Tensor, where: Sequence[str]
) -> None:
    """Refuse a pair that is labelled both similar and dissimilar, in either order."""
    first: dict[tuple[int, int, bool], int] = {}  # row of each pair under each label
    columns = zip(a.tolist(), b.tolist(), similar.tolist(), strict=True)
    for row, (one, other, same) in enumerate(columns):
        first.setdefault((min(one, other), max(one, other), same), row)
    both = [
        (row, first[one, other, False])
        for (one, other, same), row in first.items()
        if same and (one, other, False) in first
    ]
    if both:
        lines = " and ".join(where[row] for row in sorted(both[0]))
        raise InputError(
            f"{lines}: the same pair is labelled similar and dissimilar ({len(both):,} "
            f"pairs of {path} are). Keep one label for each."
        )


def _labels(table: TableFile, similar_label: int | None) -> Tensor:
    """(p,) bool, or float32 degrees if some lie strictly between 0 and 1."""
    y = table.numbers("label")
    refuse_bad_labels(y, "label", table.where, table.path, similar_label)
    try:
        similar = pair_labels(y, like=torch.empty(len(y)), similar_label=similar_label)  # type: ignore[arg-type]
    except ValueError:
        raise InputError(
            f"{table.path}: label is true or false, and true means similar; "
            "drop --similar-label 0, or invert the labels."
        ) from None
    binary = similar if similar.dtype is torch.bool else similar == similar.round()
    if similar.dtype is torch.bool:
        return similar
    return similar > 0.5 if bool(binary.all()) else similar.float()


def _parsed(cells: Sequence[Any], at: Sequence[str], folder: Path) -> list[Cell]:
    """Each cell as the path of an image or as a vector; all cells must be of one kind."""
    parsed: list[Cell] = []
    n = known_length(cells)
    for cell, place in zip(cells, at, strict=True):
        if names_image(cell):
            try:
                parsed.append(find_file(folder, cell.strip()))
            except InputError as error:
                raise InputError(f"{place}: {error} (paths start at the table)") from None
        elif looks_like_vector(cell):
            numbers = vector(cell, place, n)
            if numbers.ndim != 1:
                raise InputError(f"{place} holds {len(numbers)} vectors; it must hold one.")
            parsed.append(tuple(numbers.tolist()))
        else:
            raise InputError(
                f"{place} is {'empty' if is_blank(cell) else repr(cell)}; it must be the path "
                'of an image, relative to the table, or a vector such as "0.1 0.2 0.3". For texts, '
                f"add {TEXT_ENCODER}"
            )
        if type(parsed[-1]) is not type(parsed[0]):
            kinds = ["an image" if isinstance(p, Path) else "a vector" for p in parsed]
            raise InputError(f"{place} is {kinds[-1]}, but {at[0]} is {kinds[0]}. Use one kind.")
    return parsed


def names_image(cell: Any) -> bool:
    """Whether a cell names an image, with slashes or backslashes."""
    return isinstance(cell, str) and is_image(cell.strip().replace("\\", "/"))


def _distinct(parsed: Sequence[Cell]) -> tuple[list[tuple[Cell, int]], list[int]]:
    """The distinct items, each with its first row; and for each row, the index of its item.

    Different paths of one file are one item.
    """
    path_keys = {item: file_key(item) for item in set(parsed) if isinstance(item, Path)}
    keys = [path_keys[item] if isinstance(item, Path) else item for item in parsed]
    number: dict[Hashable, int] = {}
    distinct: list[tuple[Cell, int]] = []
    for row, (item, key) in enumerate(zip(parsed, keys, strict=True)):
        if key not in number:
            number[key] = len(number)
            distinct.append((item, row))
    return distinct, [number[key] for key in keys]


def _read_items(
    items: Sequence[Cell], at: Sequence[str], fit: Fit
) -> tuple[Content, Sequence[str]]:
    """Images or (n, d) float32 vectors; and notes about them."""
    files = [item for item in items if isinstance(item, Path)]
    if files:
        return read_files(files, fit)
    vectors = [item for item in items if not isinstance(item, Path)]
    for item, place in zip(vectors, at, strict=True):
        if len(item) != len(vectors[0]):
            raise InputError(
                f"{place} has {len(item)} numbers and {at[0]} has {len(vectors[0])}; "
                "all vectors must have the same length."
            )
    x = torch.tensor(vectors, dtype=torch.float32)
    bad = (~x.isfinite()).any(1)
    if bad.any():
        raise InputError(f"{at[int(bad.int().argmax())]} holds a number beyond float32. Repair it.")
    return Arrays(x), ()
