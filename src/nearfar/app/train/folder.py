"""What counts as data in a folder of images: one rule, which docs/data.md states."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nearfar.app.errors import InputError
from nearfar.app.train.data import Items
from nearfar.app.train.files import once_each
from nearfar.app.train.images import Fit, is_readable, read_images
from nearfar.app.train.unreadable import FORMATS

# What systems put beside the files of their users, besides names that begin with a dot.
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

LeftOut = Counter[tuple[str, str]]  # of (what, why), how many


@dataclass(frozen=True)
class Place:
    """A folder, and the true paths of it and of all that it was reached through."""

    path: Path
    way: frozenset[Path]


def read_folder(
    folder: Path, fit: Fit, *, labelled: bool = True, identity_depth: int | None = None
) -> Items:
    """A folder with one subfolder of images per identity.

    Args:
        folder: what to read.
        fit: what images are made into.
        labelled: whether identities must be known; if not, a folder of loose images will do.
        identity_depth: 1 if each subfolder is an identity, 2 if each subfolder of those is; None:
            1, unless the subfolders hold nothing but folders, which may be either.

    Raises:
        InputError: no subfolders, subfolders that are no identities or have no images, one file
            under two identities, an image that cannot be read.
    """
    left_out: LeftOut = Counter()
    top = Place(folder, frozenset({folder.resolve()}))
    identities = _identities(top, identity_depth or 1, left_out)
    if not identities:
        return _loose(top, fit, labelled=labelled)
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
    kept = once_each(images, [paths[index].name for index in identity])
    if len(kept) < len(images):
        left_out["second path", "to a file that is there already"] += len(images) - len(kept)
    x, notes = read_images([images[row] for row in kept], fit)
    return Items(
        x=x,
        identity=torch.tensor([identity[row] for row in kept]),
        names=[str(images[row].relative_to(folder)) for row in kept],
        identities=[str(path.relative_to(folder)) for path in paths],
        notes=[*([f"left out of {folder}: {_in_words(left_out)}"] if left_out else []), *notes],
    )


def _loose(top: Place, fit: Fit, *, labelled: bool) -> Items:
    """Images in no subfolder, whose identities are not known."""
    left_out: LeftOut = Counter()
    _, images = _look(top, left_out)
    if not images or labelled:
        has = "is empty"
        if images or left_out:
            has = "has images but no subfolders" if images else "has no images and no subfolders"
            has += f" ({_in_words(left_out)})" if left_out else ""
        raise InputError(
            f"{top.path} {has}. Make one subfolder per identity and put its images there."
        )
    x, notes = read_images(sorted(images), fit)
    return Items(
        x,
        torch.full((len(images),), -1),
        [path.name for path in sorted(images)],
        ["unknown"],
        notes=[*([f"left out of {top.path}: {_in_words(left_out)}"] if left_out else []), *notes],
    )


def _identities(place: Place, depth: int, left_out: LeftOut) -> list[Place]:
    """The folders at this depth below a folder, in the order of their names."""
    folders, images = _look(place, left_out)
    if images:
        left_out["loose image", "in no identity's folder"] += len(images)
    if depth == 1:
        return folders
    return [below for folder in folders for below in _identities(folder, depth - 1, left_out)]


def _images(place: Place, left_out: LeftOut) -> Iterator[Path]:
    """The images of a folder and of all folders in it."""
    folders, images = _look(place, left_out)
    yield from images
    for folder in folders:
        yield from _images(folder, left_out)


def _look(place: Place, left_out: LeftOut) -> tuple[list[Place], list[Path]]:
    """The folders and the images in a folder, links taken for what they lead to."""
    folders, images = [], []
    for entry in sorted(place.path.iterdir()):
        if entry.name.startswith(".") or entry.name.lower() in _HIDDEN:
            left_out["hidden file", ""] += 1
        elif entry.is_dir():
            true = entry.resolve()
            if true in place.way:
                left_out["link", "to a folder it lies in"] += 1
            else:
                folders.append(Place(entry, place.way | {true}))
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
    """Where no subfolder holds an image itself, nothing says at which depth identities are."""
    if {path.parent for path in images} & set(identities):
        return
    if len(identities) == 1:
        raise InputError(
            f"{folder} holds a single folder, {identities[0]}, and no images. Name that as DATA."
        )
    below = {path.relative_to(folder).parts[:2] for path in images}
    raise InputError(
        f"the {len(identities):,} subfolders of {folder} ({_some(identities)}) hold only folders, "
        f"{len(below):,} in all. If each of those is an identity, add --identity-depth 2; if they "
        "are parts of an identity, such as sessions, --identity-depth 1."
    )


def _refuse_sides(folder: Path, identities: Sequence[Path], depth: int | None) -> None:
    """The sides of a split are no identities, and an identity may be on several."""
    sides = {path.relative_to(folder).parts[0] for path in identities}
    if len(sides) < 2 or not {side.lower() for side in sides} <= _SPLITS:
        return
    named = Counter(path.name for path in identities)
    (twice, n), *_ = named.most_common(1)
    if depth is None:
        raise InputError(
            f"{folder} holds {_some(sorted(map(Path, sides)))}, which are sides of a split, not "
            f"identities. The tool splits identities itself: name one side as DATA, such as "
            f"{identities[0]}; or add --identity-depth 2 to take those of all sides."
        )
    if n > 1:
        both = _some([path for path in identities if path.name == twice])
        raise InputError(
            f"{both}: one name on two sides of a split. Put the images of an identity into one "
            f"folder, or name one side as DATA, such as {folder / min(sides)}."
        )


def _some(paths: Sequence[Path]) -> str:
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
