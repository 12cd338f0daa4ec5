"""Read a folder of images; docs/data.md states which files and subfolders count."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nearfar.app.data.drop import NOTHING, rows_left
from nearfar.app.data.files import unique_files
from nearfar.app.data.fit import Fit
from nearfar.app.data.image_files import read_files
from nearfar.app.data.images import is_readable
from nearfar.app.data.items import Items
from nearfar.app.data.unreadable import FORMATS
from nearfar.app.errors import InputError

# Files and folders that operating systems create, besides names that begin with a dot.
_HIDDEN = {
    "$recycle.bin",
    "#recycle",
    "@eadir",
    "@recycle",
    "__macosx",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
_SHOWN = 3  # names in a message

LeftOut = Counter[tuple[str, str]]  # the number of files left out, by (what, why)


@dataclass(frozen=True)
class FoundFolder:
    """A folder, and the resolved paths of it and of the folders through which it was reached."""

    path: Path
    ancestors: frozenset[Path]


@dataclass(frozen=True, eq=False)
class FoundImages:
    """The images of a folder, none of which has been opened.

    Attributes:
        files: their paths, each file once.
        names: the same, relative to the folder.
        identity: the index of the identity of each.
        identities: the names of the identities, or none if the images lie in the folder itself.
        notes: notes for the user about what was left out.
    """

    files: Sequence[Path]
    names: Sequence[str]
    identity: Sequence[int]
    identities: Sequence[str]
    notes: Sequence[str]

    def left(self, drop: Set[str], folder: Path) -> "FoundImages":
        """Without the images that are dropped."""
        rows = rows_left(self.names, drop, folder)
        files, names, identity = (
            [held[row] for row in rows] for held in (self.files, self.names, self.identity)
        )
        return replace(self, files=files, names=names, identity=identity)  # type: ignore[arg-type]


def read_folder(
    folder: Path,
    fit: Fit,
    *,
    labelled: bool = True,
    identity_depth: int | None = None,
    drop: Set[str] = NOTHING,
) -> Items:
    """A folder with one subfolder of images per identity.

    Args:
        folder: the folder to read.
        fit: the size and channels of the images.
        labelled: whether identities must be known; if not, the images may lie in `folder` itself.
        identity_depth: 1 if each subfolder is an identity, 2 if each subfolder of those is; None
            for 1, unless the subfolders hold only folders, which is ambiguous.
        drop: names of images that are not read.

    Raises:
        InputError: there are no subfolders, the subfolders are not identities or have no images,
            one file is under two identities, or an image cannot be read.
    """
    found = find_images(folder, labelled=labelled, identity_depth=identity_depth)
    if drop:
        found = found.left(drop, folder)
    content, notes = read_files(found.files, fit)
    return Items(
        content=content,
        identity=torch.tensor(found.identity),
        names=found.names,
        identities=found.identities or ["unknown"],
        notes=[*found.notes, *notes],
    )


def find_images(
    folder: Path, *, labelled: bool = True, identity_depth: int | None = None
) -> FoundImages:
    """The images of a folder; arguments and errors as in `read_folder`."""
    left_out: LeftOut = Counter()
    top = FoundFolder(folder, frozenset({folder.resolve()}))
    identities = _identities(top, identity_depth or 1, left_out)
    if not identities:
        return _loose(top, labelled=labelled)
    images, identity = [], []
    for index, place in enumerate(identities):
        passed: LeftOut = Counter()
        found = sorted(_images(place, passed))
        if not found:
            has = f" ({_in_words(passed)})" if passed else ""
            raise InputError(
                f"{place.path} holds no images{has}. Put some there, or remove the folder."
            )
        images += found
        identity += [index] * len(found)
        left_out += passed
    paths = [place.path for place in identities]
    _refuse_sides(folder, paths, identity_depth)
    if identity_depth is None:
        _refuse_folders_of_folders(folder, paths, images)
    kept = unique_files(images, [paths[index].name for index in identity])
    if len(kept) < len(images):
        left_out["second path", "to a file that is already read"] += len(images) - len(kept)
    return FoundImages(
        files=[images[row] for row in kept],
        names=[str(images[row].relative_to(folder)) for row in kept],
        identity=[identity[row] for row in kept],
        identities=[str(path.relative_to(folder)) for path in paths],
        notes=[f"left out of {folder}: {_in_words(left_out)}"] if left_out else [],
    )


def _loose(top: FoundFolder, *, labelled: bool) -> FoundImages:
    """Images that lie in the folder itself, whose identities are unknown."""
    left_out: LeftOut = Counter()
    _, images = _scan(top, left_out)
    if not images or labelled:
        has = "is empty"
        if images or left_out:
            has = "has images but no subfolders" if images else "has no images and no subfolders"
            has += f" ({_in_words(left_out)})" if left_out else ""
        raise InputError(
            f"{top.path} {has}. Make one subfolder per identity and put its images there."
        )
    return FoundImages(
        files=sorted(images),
        names=[path.name for path in sorted(images)],
        identity=[-1] * len(images),
        identities=[],
        notes=[f"left out of {top.path}: {_in_words(left_out)}"] if left_out else [],
    )


def _identities(place: FoundFolder, depth: int, left_out: LeftOut) -> list[FoundFolder]:
    """The folders at this depth below a folder, in order of their names."""
    folders, images = _scan(place, left_out)
    if images:
        left_out["loose image", "in no identity's folder"] += len(images)
    if depth == 1:
        return folders
    return [below for folder in folders for below in _identities(folder, depth - 1, left_out)]


def _images(place: FoundFolder, left_out: LeftOut) -> Iterator[Path]:
    """The images in a folder and in all folders below it."""
    folders, images = _scan(place, left_out)
    yield from images
    for folder in folders:
        yield from _images(folder, left_out)


def _scan(place: FoundFolder, left_out: LeftOut) -> tuple[list[FoundFolder], list[Path]]:
    """The folders and images in a folder; links are followed."""
    folders, images = [], []
    for entry in sorted(place.path.iterdir()):
        if entry.name.startswith(".") or entry.name.lower() in _HIDDEN:
            left_out["hidden file", ""] += 1
        elif entry.is_dir():
            resolved = entry.resolve()
            if resolved in place.ancestors:
                left_out["link", "to a folder it lies in"] += 1
            else:
                folders.append(FoundFolder(entry, place.ancestors | {resolved}))
        elif not entry.is_file():
            left_out["link", "to nothing"] += 1
        elif is_readable(entry):
            images.append(entry)
        else:
            ending = entry.suffix.lower()
            what = f"{ending} file" if ending else "file without an ending"
            left_out[what, FORMATS.get(ending, "not an image")] += 1
    return folders, images


def _refuse_folders_of_folders(
    folder: Path, identities: Sequence[Path], images: Sequence[Path]
) -> None:
    """Refuse subfolders that hold only folders: the depth of the identities is then unknown."""
    if {path.parent for path in images} & set(identities):
        return
    if len(identities) == 1:
        raise InputError(
            f"{folder} holds a single folder, {identities[0]}, and no images. Pass that as DATA."
        )
    below = {path.relative_to(folder).parts[:2] for path in images}
    raise InputError(
        f"the {len(identities):,} subfolders of {folder} ({_few(identities)}) hold only folders, "
        f"{len(below):,} in all. If each of those is an identity, add --identity-depth 2; if they "
        "are parts of an identity, such as sessions, --identity-depth 1."
    )


def _refuse_sides(folder: Path, identities: Sequence[Path], depth: int | None) -> None:
    """Refuse train and test folders: they are not identities, but sides of a split."""
    sides = {path.relative_to(folder).parts[0] for path in identities}
    if len(sides) < 2 or not {side.lower() for side in sides} <= _SPLITS:
        return
    named = Counter(path.name for path in identities)
    (twice, n), *_ = named.most_common(1)
    if depth is None:
        raise InputError(
            f"{folder} holds {_few(sorted(map(Path, sides)))}, which are sides of a split, not "
            f"identities. The tool splits identities itself: pass one side as DATA, such as "
            f"{identities[0]}; or add --identity-depth 2 to read all sides."
        )
    if n > 1:
        both = _few([path for path in identities if path.name == twice])
        raise InputError(
            f"{both}: the same name on two sides of a split. Put the images of an identity into "
            f"one folder, or pass one side as DATA, such as {folder / min(sides)}."
        )


def _few(paths: Sequence[Path]) -> str:
    shown = ", ".join(map(str, paths[:_SHOWN]))
    return f"{shown}, ..." if len(paths) > _SHOWN else shown


def _in_words(left_out: LeftOut) -> str:
    """For instance "2 hidden files, 1 link (to nothing)"."""
    return ", ".join(
        f"{n:,} {_plural(what, n)}" + (f" ({why})" if why else "")
        for (what, why), n in sorted(left_out.items())
    )


def _plural(what: str, n: int) -> str:
    noun, *more = what.split(" without")
    return " without".join([noun if n == 1 else f"{noun}s", *more])
