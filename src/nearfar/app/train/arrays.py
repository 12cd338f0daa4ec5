"""Reading files that NumPy has saved, whatever has become of them since."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Unreadable(Exception):  # noqa: N818 - it is the file that is not right
    """A file holds no arrays, or none that are loaded; the message continues "FILE ..."."""


def load(path: Path) -> Array | dict[str, Array]:
    """The array of an .npy, or those of an .npz by name; pickled objects are refused, never loaded.

    Raises:
        Unreadable: it is damaged, or holds something else.
        MemoryError: it says that it is larger than the memory.
        OSError: it is not there, or may not be read.
    """
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about headers that Python 2 could have written
                found = np.load(file, allow_pickle=False)
                if isinstance(found, np.ndarray):
                    return found
                with found:
                    members = {name: found[name] for name in found.files}
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file NumPy and zipfile raise nearly every kind
            if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
                raise Unreadable(
                    "holds Python objects (dtype object), which are never loaded. Save arrays of "
                    "numbers or text; a ragged list is no array."
                ) from None
            raise Unreadable("cannot be read as .npz. Save it with numpy.savez.") from None
    # A member that is no array comes as bytes.
    return {name: array for name, array in members.items() if isinstance(array, np.ndarray)}
