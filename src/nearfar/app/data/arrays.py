"""Read files saved by NumPy, which may be damaged or hold something else."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Unreadable(Exception):  # noqa: N818 - it describes the file
    """A file holds no arrays that can be loaded; the message continues "FILE ..."."""


def load(path: Path) -> Array | dict[str, Array]:
    """The array of an .npy, or the arrays of an .npz by name; pickled objects are never loaded.

    Raises:
        Unreadable: the file is damaged or holds something else.
        MemoryError: the file claims to be larger than the memory.
        OSError: the file is missing or may not be read.
    """
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about headers written by Python 2
                found = np.load(file, allow_pickle=False)
                if isinstance(found, np.ndarray):
                    return found
                with found:
                    members = {name: found[name] for name in found.files}
        except MemoryError:
            raise
        except Exception as error:  # NumPy and zipfile raise almost any kind for a damaged file
            if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
                raise Unreadable(
                    "holds Python objects (dtype object), which are never loaded. Save arrays of "
                    "numbers or text; a ragged list is not an array."
                ) from None
            raise Unreadable("cannot be read as .npz. Save it with numpy.savez.") from None
    # A member that is not an array is read as bytes.
    return {name: array for name, array in members.items() if isinstance(array, np.ndarray)}
