"""Items that are left out of the data: what `--drop` names, before anything is decoded."""

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nearfar.app.data.items import Items
from nearfar.app.errors import InputError
from nearfar.app.tables import is_blank, read_table
from nearfar.app.text import printable

NOTHING: Set[str] = frozenset()
_SHOWN = 3  # names in a message


def read_drop(path: Path) -> Set[str]:
    """The names in a table: its column `name`; of rows where `drop` is true, if it has that column.

    Raises:
        InputError: the table cannot be read, has no such column, or a cell that is no name.
    """
    table = read_table(path, may_be_empty=True)
    names = table.column("name")
    chosen = table.numbers("drop") if "drop" in table.columns else np.ones(len(table), bool)
    if len(table) and chosen.dtype != bool:
        raise InputError(f"{path}: drop must be true or false in every row.")
    rows = np.flatnonzero(chosen).tolist()
    for row in rows:
        if is_blank(names[row]):
            raise InputError(f"{table.where(row)}: name is empty. Name an item, or delete it.")
    return {str(names[row]) for row in rows}


def rows_left(names: Sequence[str], drop: Set[str], source: object) -> list[int]:
    """The rows that are not dropped.

    Args:
        names: those of all items.
        drop: the names to leave out.
        source: the data, for messages.

    Raises:
        InputError: no item has one of the names, or none is left.
    """
    shown = [printable(name) for name in names]
    unknown = sorted(drop - set(shown))
    if unknown:
        few = ", ".join(map(repr, unknown[:_SHOWN])) + ", ..." * (len(unknown) > _SHOWN)
        raise InputError(
            f"--drop names {len(unknown):,} of {len(drop):,} items that {source} does not hold: "
            f"{few}. Write the names as `nearfar audit` and `nearfar embed` do."
        )
    rows = [row for row, name in enumerate(shown) if name not in drop]
    if not rows:
        raise InputError(f"--drop names every item of {source}: nothing is left.")
    return rows


def without_empty(items: Items, n_dropped: int) -> Items:
    """The items, without identities of which nothing is left; a note says how many.

    Args:
        items: what is left.
        n_dropped: how many items were dropped.
    """
    left = items.identity.unique()  # type: ignore[no-untyped-call]
    note = f"{n_dropped:,} items are dropped, as --drop says"
    known = bool((items.identity >= 0).all())
    if not known or len(left) == len(items.identities):
        return replace(items, notes=[*items.notes, note])
    gone = sorted(set(range(len(items.identities))) - set(left.tolist()))
    few = ", ".join(items.identities[i] for i in gone[:_SHOWN]) + ", ..." * (len(gone) > _SHOWN)
    groups = items.split_groups
    return replace(
        items,
        identity=torch.searchsorted(left, items.identity),
        identities=[items.identities[i] for i in left.tolist()],
        split_groups=None if groups is None else [groups[i] for i in left.tolist()],
        notes=[*items.notes, f"{note}, and with them all of {len(gone):,} identities: {few}"],
    )
