"""Read tables of texts with their identities, with columns `text` and `identity`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.app.data.items import Items, with_groups
from nearfar.app.data.texts import Texts, checked_text
from nearfar.app.errors import InputError
from nearfar.app.names import SENTENCE_TRANSFORMERS
from nearfar.app.tables import TableFile, columns_of, is_blank, read_table

TEXT, IDENTITY = "text", "identity"
TEXT_ENCODER = f"--encoder {SENTENCE_TRANSFORMERS}:NAME"


def holds_identities(path: Path) -> bool:
    """Whether a table holds texts with identities, not pairs, judging by its columns."""
    columns = columns_of(path)
    return TEXT in columns and "a" not in columns


def read_labelled_texts(path: Path, *, labelled: bool) -> Items:
    """Read a table of texts.

    Besides `text` and `identity`, columns may be `names`, a name for each text, and `groups` and
    `split_groups`, a group for each, empty for none.

    Args:
        path: the table.
        labelled: whether identities must be known. If so, a text counts once.

    Raises:
        InputError: a column is missing, a cell is empty or no text, or a text has two identities or
            groups; the message names the line or row.
    """
    table = read_table(path)
    texts = [
        checked_text(cell, f"{table.where(row)}: {TEXT}")
        for row, cell in enumerate(table.column(TEXT))
    ]
    of = _identities(table, labelled)
    named = {
        name: [_group(cell, f"{table.where(row)}: {name}") for row, cell in enumerate(cells)]
        for name in ("groups", "split_groups")
        if (cells := table.columns.get(name)) is not None
    }
    kept = list(range(len(texts)))
    if labelled and of is not None:
        kept = _once(table, texts, {"identity": of, **named})
    names = [_name(table, row) for row in kept]
    content, repeated = Texts([texts[row] for row in kept]), len(texts) - len(kept)
    notes = [f"{repeated:,} of {len(texts):,} rows of {path} repeat a text, which counts once."]
    notes = notes if repeated else []
    if of is None:
        return Items(content, torch.full((len(kept),), -1), names, ["unknown"], notes=notes)
    identities, identity = np.unique([of[row] for row in kept], return_inverse=True)
    items = Items(
        content,
        torch.from_numpy(identity.astype(np.int64)),
        names,
        identities.tolist(),
        notes=notes,
    )
    return with_groups(items, {name: [of[row] for row in kept] for name, of in named.items()})


def _identities(table: TableFile, labelled: bool) -> list[str] | None:
    """The identity of each text; None if there is no such column and none is needed."""
    if IDENTITY not in table.columns:
        if not labelled:
            return None
        if "label" in table.columns:
            raise InputError(
                f"{table.path} has no column {IDENTITY!r}. A column 'label' says which pairs are "
                f"similar; if it names what each text is about, rename it to {IDENTITY!r}."
            )
    cells = table.column(IDENTITY)
    return [_identity(cell, f"{table.where(row)}: {IDENTITY}") for row, cell in enumerate(cells)]


def _identity(cell: Any, place: str) -> str:
    if is_blank(cell):
        raise InputError(f"{place} is empty; it must be the identity of the text.")
    return _group(cell, place)


def _group(cell: Any, place: str) -> str:
    if is_blank(cell):
        return ""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        raise InputError(f"{place} is {cell!r:.60}; it must be text or a whole number.")
    return str(cell).strip()


def _once(table: TableFile, texts: Sequence[str], named: dict[str, list[str]]) -> list[int]:
    """The first row of each text, whose identity and groups must be the same in all of its rows."""
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        one = first.setdefault(text, row)
        for name, of in named.items():
            if of[one] != of[row]:
                raise InputError(
                    f"{table.where(one)} and {table.where(row)}: the same text has two {name} "
                    f"entries, {of[one]!r} and {of[row]!r} ({text!r:.60}). Keep one."
                )
    return list(first.values())


def _name(table: TableFile, row: int) -> str:
    """The name of a text: that of its column `names`, or its place."""
    cells = table.columns.get("names")
    if cells is None or is_blank(cells[row]):
        return table.where(row)
    return str(cells[row]).strip()
