"""Read the data that DATA names into tensors: items with identities, or pairs of items."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.data.arrays import Unreadable, load
from nearfar.app.data.content import Arrays, Content
from nearfar.app.data.groups import group_ids, merged_groups
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import GLYPHS
from nearfar.app.tables import SUFFIXES as TABLES
from nearfar.app.text import printable

_OF_ITEMS = ("x", "y", "names", "groups", "split_groups")  # arrays of a file with a row per item


@dataclass(frozen=True, eq=False)
class Items:
    """Items, each of which shows an identity.

    Attributes:
        content: what the items hold.
        identity: (n,) int64, the identity of each item; -1 throughout if they are unknown.
        names: n names of the items, for messages.
        identities: the name of each identity.
        groups: (n,) int64; items of one group, such as one camera or session, are never compared
            with each other in a measurement. None if all pairs of items may be compared.
        split_groups: for each identity, the name of its group, which stays on one side of a split;
            empty if it has none. None if there are no such groups.
        notes: notes for the user about how the data were read.
    """

    content: Content
    identity: Tensor
    names: Sequence[str]
    identities: Sequence[str]
    groups: Tensor | None = None
    split_groups: Sequence[str] | None = None
    notes: Sequence[str] = ()

    def comparable(self, a: Tensor, b: Tensor) -> Tensor:
        """(p,) bool: whether the items of rows a and b, (p,) each, may be measured as a pair."""
        if self.groups is None:
            return torch.ones(len(a), dtype=torch.bool)
        return self.groups[a] != self.groups[b]

    def can_be_similar(self) -> Tensor:
        """(i,) bool: whether each identity has two items that may be measured as a pair."""
        counted = self.groups if self.groups is not None else torch.arange(len(self.identity))
        distinct = torch.stack([self.identity, counted], 1).unique(dim=0)  # type: ignore[no-untyped-call]
        return torch.bincount(distinct[:, 0], minlength=len(self.identities)) > 1

    def digest(self) -> str:
        """A hash of the data, by which a change is noticed."""
        digest = self.content.hash()
        digest.update(self.identity.numpy().tobytes())
        if self.groups is not None:
            digest.update(self.groups.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of items that are labelled similar or dissimilar.

    Attributes:
        items: each distinct item once; items connected by similar pairs form one identity.
        a: (p,) int64, row of `items` of the first item of each pair.
        b: (p,) int64, the second.
        similar: (p,) bool, or (p,) float32 degrees of similarity.
        where: p places, for messages.
    """

    items: Items
    a: Tensor
    b: Tensor
    similar: Tensor
    where: Sequence[str]

    def is_similar(self) -> Tensor:
        """(p,) bool; a degree of similarity above one half counts as similar."""
        return self.similar if self.similar.dtype is torch.bool else self.similar > 0.5

    def digest(self) -> str:
        digest = hashlib.sha256(self.items.digest().encode())
        for column in (self.a, self.b, self.similar):
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()


def read_data(
    source: str,
    reads: Reads | None = None,
    *,
    similar_label: int | None = None,
    labelled: bool = True,
    identity_depth: int | None = None,
    drop: Set[str] = frozenset(),
) -> Items | Pairs:
    """Read DATA: "glyphs", a folder, an .npz, or a .csv or .parquet table of pairs or texts.

    Args:
        source: the data to read.
        reads: what the encoder reads; None: whatever there is.
        similar_label: for pairs with numeric labels, which of 0 and 1 means similar.
        labelled: whether the identities of the items must be known.
        identity_depth: for a folder, the depth of the subfolders that are identities; see
            `read_folder`.
        drop: names of items that are left out; an identity of which nothing is left vanishes.

    Raises:
        InputError: the data cannot be read, or an option does not apply to this kind of data.
    """
    reads = reads or Reads()
    data = _read(source, reads, similar_label, labelled, identity_depth, drop)
    if drop:
        from nearfar.app.data.drop import without_empty

        data = without_empty(items_of(data), len(drop))
    if isinstance(data, Pairs):
        data = replace(data, items=_printable(data.items))
    else:
        data = _printable(data)
    found = items_of(data).content.shape
    if reads.shape is not None and found != reads.shape:
        raise InputError(
            f"{source} holds items of shape {found}, but the network takes shape {reads.shape}."
        )
    return data


def _read(
    source: str,
    reads: Reads,
    similar_label: int | None,
    labelled: bool,
    identity_depth: int | None,
    drop: Set[str],
) -> Items | Pairs:
    from nearfar.app.data.folder import read_folder
    from nearfar.app.data.pairs import read_pairs
    from nearfar.app.data.text_tables import TEXT_ENCODER, read_labelled_texts

    path = Path(source)
    is_folder = source != GLYPHS and path.is_dir()
    if reads.texts and path.suffix.lower() not in TABLES:
        raise InputError(
            f"the encoder reads texts, and {source} is no table of texts: it must be a .csv or "
            ".parquet with columns a, b and label, or text and identity."
        )
    if identity_depth is not None and not is_folder:
        raise InputError(f"--identity-depth is for folders of images; {source} is not a folder.")
    if drop and holds_pairs(source):
        raise InputError(f"--drop is for data with identities; delete the rows of {source}.")
    if holds_pairs(source):
        return read_pairs(path, reads, similar_label=similar_label, labelled=labelled)
    if similar_label is not None:
        raise InputError(f"--similar-label is for tables of pairs; {source} has identities.")
    if path.suffix.lower() in TABLES:
        if not reads.texts:
            raise InputError(f"{source} holds texts, which take {TEXT_ENCODER}")
        return read_labelled_texts(path, labelled=labelled)
    if is_folder:
        return read_folder(
            path, reads.fit, labelled=labelled, identity_depth=identity_depth, drop=drop
        )
    if reads.image_size is not None:
        raise InputError(
            f"--image-size is for image files; the arrays of {source} keep their size."
        )
    if source == GLYPHS:
        return read_glyphs(drop)
    if path.suffix.lower() == ".npz":
        return read_npz(path, labelled=labelled, drop=drop)
    if path.exists():
        known = "a folder of images, .npz, .csv or .parquet"
        raise InputError(f"{source} is not a known kind of data: it must be {known}.")
    raise InputError(f"no such file or folder: {source} (the built-in letters are called {GLYPHS})")


def _printable(items: Items) -> Items:
    """The items with names that are safe to print in reports, files and terminals."""
    return replace(
        items,
        names=[printable(name) for name in items.names],
        identities=[printable(name) for name in items.identities],
        notes=[printable(note) for note in items.notes],
    )


def holds_pairs(source: str) -> bool:
    """Whether DATA is a table of pairs, judging by its file name and its columns."""
    from nearfar.app.data.text_tables import holds_identities

    path = Path(source)
    return path.suffix.lower() in TABLES and not holds_identities(path)


def items_of(data: Items | Pairs) -> Items:
    return data.items if isinstance(data, Pairs) else data


def read_glyphs(drop: Set[str] = frozenset()) -> Items:
    """The built-in letters; each writing system stays on one side of a split."""
    asset = resources.files("nearfar.app") / "assets" / "glyphs.npz"
    if not asset.is_file():
        raise InputError("glyphs.npz is missing from this installation: reinstall nearfar.")
    with resources.as_file(asset) as path:
        arrays = read_arrays(path)
    characters, typefaces = arrays["characters"].tolist(), arrays["typefaces"].tolist()
    arrays["names"] = np.array(
        [
            f"{characters[y]} in {typefaces[t]}"
            for y, t in zip(arrays["y"], arrays["typeface"], strict=True)
        ]
    )
    if drop:
        arrays = _left(arrays, GLYPHS, drop)
    return Items(
        content=Arrays(torch.from_numpy(arrays["x"])[:, None]),
        identity=torch.from_numpy(arrays["y"].astype(np.int64)),
        names=arrays["names"].tolist(),
        identities=characters,
        split_groups=arrays["systems"].tolist(),
    )


def _left(
    arrays: dict[str, npt.NDArray[Any]], source: object, drop: Set[str]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays without the rows of items that are dropped."""
    from nearfar.app.data.drop import rows_left

    names = [str(name) for name in _text(arrays["names"], source).tolist()]
    rows = rows_left(names, drop, source)
    return {**arrays, **{name: arrays[name][rows] for name in _OF_ITEMS if name in arrays}}


def read_npz(path: Path, *, labelled: bool = True, drop: Set[str] = frozenset()) -> Items:
    """An .npz with `x` and `y`: (n, d) vectors, or (n, h, w) or (n, c, h, w) images.

    `y` holds the identities as integers or text. Optional arrays are `names`, a name for each item,
    and `groups` and `split_groups`, a group for each item as integers or text, empty for none.
    """
    arrays = read_arrays(path)
    if "x" not in arrays:
        raise InputError(f"{path} has no array 'x'; it has: {', '.join(arrays) or 'none'}.")
    if not arrays["x"].ndim:
        raise InputError(f"{path}: x is a single number; it must have one row per item.")
    names = np.array([f"{path.name}:{row}" for row in range(len(arrays["x"]))])
    arrays = {"names": names, **arrays}
    identities = ["unknown"]
    if "y" in arrays:
        identities, arrays["y"] = _identities(arrays["y"], path)
    if drop and all(len(arrays[name]) == len(arrays["x"]) for name in arrays.keys() & {*_OF_ITEMS}):
        arrays = _left(arrays, path, drop)  # other lengths are refused below
    x = _readable(arrays["x"], path)
    if "y" not in arrays and labelled:
        raise InputError(f"{path} has no array 'y', which says which identity each item shows.")
    identity = arrays.get("y", np.full(len(x), -1))
    if len(identity) != len(x):
        raise InputError(
            f"{path}: x has {len(x)} items and y {len(identity)} identities. Give one y per item."
        )
    names = arrays["names"]
    if names.shape != (len(x),):
        raise InputError(f"{path}: names has shape {names.shape}; give one per item, ({len(x)},).")
    items = Items(Arrays(x), torch.from_numpy(identity), _text(names, path).tolist(), identities)
    return _grouped(items, arrays, path) if "y" in arrays else items


def _grouped(items: Items, arrays: dict[str, npt.NDArray[Any]], path: Path) -> Items:
    """The items with the groups given in an .npz."""
    named: dict[str, list[str]] = {}
    for name in ("groups", "split_groups"):
        if name not in arrays:
            continue
        array = arrays[name]
        if array.shape != (len(items.names),) or array.dtype.kind not in "iuUS":
            raise InputError(
                f"{path}: {name} has shape {array.shape} and dtype {array.dtype}; it must be "
                f"({len(items.names)},) integers or text, the group of each item."
            )
        named[name] = [group.strip() for group in _text(array, path).tolist()]
    return with_groups(items, named)


def with_groups(items: Items, named: Mapping[str, Sequence[str]]) -> Items:
    """The items with `groups`, `split_groups` or both; `named` holds one group name per item."""
    groups, split_groups = named.get("groups"), named.get("split_groups")
    return replace(
        items,
        groups=None if groups is None else group_ids(groups),
        split_groups=None
        if split_groups is None
        else merged_groups(items.identity, split_groups, len(items.identities)),
    )


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz; pickled objects are never loaded."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        found = load(path)
    except MemoryError:
        raise InputError(f"{path} does not fit into memory, or is damaged.") from None
    except Unreadable as error:
        raise InputError(f"{path} {error}") from None
    if isinstance(found, np.ndarray):
        raise InputError(f"{path} is a single array. Save it with numpy.savez(x=, y=).")
    return found


def _readable(x: npt.NDArray[Any], path: Path) -> Tensor:
    """The array `x` of an .npz as (n, d) float32, or (n, c, h, w) uint8 or float32."""
    if x.dtype.kind not in "fiub":
        raise InputError(f"{path}: x has dtype {x.dtype}; it must hold numbers.")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim and not len(x):
        raise InputError(f"{path}: x has no rows.")
    if x.ndim not in (2, 4) or 0 in x.shape:
        raise InputError(
            f"{path}: x has shape {x.shape}; it must be (n, d) vectors, or (n, h, w) or "
            "(n, c, h, w) images."
        )
    if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] <= 4:
        raise InputError(
            f"{path}: x has shape {x.shape}, channels last. Save x.transpose(0, 3, 1, 2)."
        )
    if x.ndim == 4 and x.dtype == np.uint8:
        return torch.from_numpy(x)
    with np.errstate(
        over="ignore"
    ):  # a number beyond float32 becomes infinite and is refused below
        wide = x.astype(np.float32)
    bad = (~np.isfinite(wide.reshape(len(wide), -1))).sum(1) > 0
    if bad.any():
        row = int(bad.argmax())
        value = wide[row][~np.isfinite(wide[row])][0]
        raise InputError(
            f"{path}, row {row}: x holds {value} ({bad.sum()} of {len(bad)} rows do). "
            "Remove these rows or repair them."
        )
    return torch.from_numpy(wide)


def _identities(y: npt.NDArray[Any], path: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    if y.ndim != 1 or y.dtype.kind not in "iuUS":
        raise InputError(
            f"{path}: y has shape {y.shape} and dtype {y.dtype}; it must be (n,) integers or text, "
            "the identity of each item."
        )
    known = y if y.dtype.kind in "iu" else _text(y, path)
    names, identity = np.unique(known, return_inverse=True)
    return [str(name) for name in names], identity.astype(np.int64)


def _text(array: npt.NDArray[Any], path: object) -> npt.NDArray[Any]:
    """The array as text; bytes are decoded as UTF-8."""
    if array.dtype.kind not in "biufSUmM":
        raise InputError(f"{path} holds names of dtype {array.dtype}. Save text.")
    try:
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(str)
    except UnicodeDecodeError:
        raise InputError(f"{path} holds bytes that are not UTF-8. Save text.") from None
