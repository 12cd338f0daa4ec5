"""Files of arrays, .npz and .npy: damaged ones, and sound ones of odd kinds."""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_vectors
from damage import EITHER, LINE, READ, SAME, Arguments, Input, Shelf, damages, using

N_IDENTITIES, N_ITEMS = 12, 4
TAKERS = ("embed", "evaluate", "doctor", "train", "embed", "evaluate", "doctor", "sweep")


def inputs() -> Iterator[Input]:
    for packed in (False, True):
        how = "packed" if packed else "stored"
        for i, damage in enumerate(damages(f"{how}.npz", 18, cut=LINE)):

            def write(folder: Path, shelf: Shelf, i=i, damage=damage, packed=packed) -> Arguments:
                (folder / "data.npz").write_bytes(damage.done(npz(packed=packed, **usual())))
                return using(i, shelf, folder / "data.npz", TAKERS)

            yield Input("npz, damaged", f"{how}: {damage.name}", write, damage.answer, "data.npz")
    for damage in damages("vector.npy", 5, cut=LINE):

        def write_npy(folder: Path, shelf: Shelf, damage=damage) -> Arguments:
            whole = io.BytesIO()
            np.save(whole, usual()["x"][0])
            (folder / "vector.npy").write_bytes(damage.done(whole.getvalue()))
            return "verify", shelf.vector_run, folder / "vector.npy", "1 2 3 4 5 6 7 8"

        yield Input("npz, damaged", f"npy: {damage.name}", write_npy, damage.answer, "vector.npy")
    for turn, (name, content) in enumerate(ZIPS.items()):
        command = ("embed", "doctor")[turn % 2]

        def write_zip(folder: Path, shelf: Shelf, content=content, command=command) -> Arguments:
            (folder / "data.npz").write_bytes(content())
            return using(0, shelf, folder / "data.npz", (command,))

        yield Input("npz, odd", f"{name}, to {command}", write_zip, LINE, "data.npz")
    for name, (command, arrays, answer) in ODD.items():

        def write_odd(
            folder: Path, shelf: Shelf, command=command, arrays=arrays, answer=answer
        ) -> Arguments:
            (folder / "odd.npz").write_bytes(npz(**arrays()))
            if answer == SAME:
                (folder / "plain.npz").write_bytes(npz(**usual()))
            return using(0, shelf, folder / "odd.npz", (command,))

        yield Input(
            "npz, odd",
            f"{name}, to {command}",
            write_odd,
            answer,
            "odd.npz" if answer == LINE else "",
        )


def usual(**others: Any) -> dict[str, Any]:
    x, y = make_vectors(N_IDENTITIES, N_ITEMS)
    arrays = {"x": np.float32(np.float16(x)), "y": y, **others}
    return {name: array for name, array in arrays.items() if array is not None}


def npz(*, packed: bool = False, **arrays: Any) -> bytes:
    whole = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(whole, **arrays)
    return whole.getvalue()


def npy(array: Any) -> bytes:
    whole = io.BytesIO()
    np.save(whole, array)
    return whole.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return whole.getvalue()


def header(text: str, data: bytes = bytes(64)) -> bytes:
    """An .npy with a header of one's own."""
    line = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + data


def of_header(text: str) -> Callable[[], bytes]:
    return lambda: zipped({"x.npy": header(text), "y.npy": npy(np.arange(4))})


def encrypted() -> bytes:
    """Its members claim to have a password."""
    whole = bytearray(npz(**usual()))
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = whole.find(mark)
        while place >= 0:
            whole[place + flags] |= 1
            place = whole.find(mark, place + 1)
    return bytes(whole)


def of_method(method: int) -> bytes:
    """Its members claim to be packed in another way."""
    whole = bytearray(npz(**usual()))
    for mark, place_of in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = whole.find(mark)
        while place >= 0:
            whole[place + place_of] = method
            place = whole.find(mark, place + 1)
    return bytes(whole)


ZIPS: dict[str, Callable[[], bytes]] = {
    "no members": lambda: zipped({}),
    "members that are no arrays": lambda: zipped({"x": b"1 2 3", "y": b"0"}),
    "x is text": lambda: zipped({"x.npy": b"1 2 3", "y.npy": npy(np.arange(3))}),
    "x is empty": lambda: zipped({"x.npy": b"", "y.npy": npy(np.arange(3))}),
    "x is a zip": lambda: zipped({"x.npy": npz(**usual())}),
    "a password": encrypted,
    "packed as deflate that it is not": lambda: of_method(8),
    "packed as bzip2 that it is not": lambda: of_method(12),
    "packed as lzma that it is not": lambda: of_method(14),
    "packed in a way that nobody knows": lambda: of_method(77),
    "a header that is no dictionary": of_header("['<f4', False, (4, 4)]"),
    "a header that is no Python": of_header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4"
    ),
    "a header that calls something": of_header(
        "{'descr': print(1), 'fortran_order': False, 'shape': (4,)}"
    ),
    "a header with brackets in brackets": of_header("(" * 9000),
    "a header of zero bytes": lambda: zipped({"x.npy": header("\0" * 40)}),
    "a shape of -1": of_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}"),
    "a shape of text": of_header("{'descr': '<f4', 'fortran_order': False, 'shape': ('4', 4)}"),
    "a shape of 10^18": of_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**18,)}"),
    "a shape that overflows": of_header(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, {2**62})}}"
    ),
    "a shape of 4 TB": of_header(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40},)}}"
    ),
    "an unknown dtype": of_header("{'descr': '<q9', 'fortran_order': False, 'shape': (4, 4)}"),
    "a dtype of Python objects": of_header(
        "{'descr': '|O', 'fortran_order': False, 'shape': (4, 4)}"
    ),
    "a version of 9": lambda: zipped({"x.npy": b"\x93NUMPY\x09\x00" + bytes(100)}),
    "30 MB of zeros in 30 KB, cut off": lambda: zipped(
        {
            "x.npy": header(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (9000000, 1)}", bytes(30_000_000)
            )
        },
        zipfile.ZIP_DEFLATED,
    ),
    "30 MB of a shape that does not fit": lambda: zipped(
        {"x.npy": npy(np.zeros((7_500_000, 1), np.float32)), "y.npy": npy(np.zeros(4))},
        zipfile.ZIP_DEFLATED,
    ),
}

structured = np.zeros(48, [("a", "<f4"), ("b", "<i4")])


def x_of(change: Callable[[np.ndarray], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: usual(x=change(usual()["x"]))


def y_of(change: Callable[[np.ndarray], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: usual(y=change(usual()["y"]))


def with_value(value: float, dtype: str = "f4") -> Callable[[], dict[str, Any]]:
    def put(x: np.ndarray) -> np.ndarray:
        changed = x.astype(dtype)
        changed[7, 3] = value
        return changed

    return x_of(put)


def surrogate(y: np.ndarray) -> np.ndarray:
    """Text with half a character, as of a file name that is no UTF-8."""
    return np.array([f"\udce9{name}" for name in y])


def padded(x: np.ndarray) -> np.ndarray:
    """Rows that stand apart in memory."""
    wide = np.zeros((len(x), 12), x.dtype)
    wide[:, 2:10] = x
    return wide[:, 2:10]


SAME_X: dict[str, Callable[[np.ndarray], Any]] = {
    "float16": np.float16,
    "float64": np.float64,
    "long double": np.longdouble,
    "big endian": lambda x: x.astype(">f4"),
    "big-endian float16": lambda x: x.astype(">f2"),
    "Fortran order": np.asfortranarray,
    "rows apart in memory": padded,
    "backwards in memory": lambda x: np.ascontiguousarray(x[::-1])[::-1],
}
REFUSED_X: dict[str, Callable[[np.ndarray], Any]] = {
    "complex": np.complex64,
    "text": lambda x: x.astype(str),
    "structured": lambda x: structured,
    "times": lambda x: x.astype("datetime64[s]"),
    "durations": lambda x: x.astype("timedelta64[s]"),
    "bytes without a kind": lambda x: x.view("V4"),
    "0-d": lambda x: x[0, 0],
    "1-d": lambda x: x[:, 0],
    "5-d": lambda x: x.reshape(48, 1, 2, 2, 2),
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[:, :0],
    "another width": lambda x: x[:, :5],
    "64 dimensions": lambda x: x.reshape(48, 8, *[1] * 30),
}
REFUSED_Y: dict[str, Callable[[np.ndarray], Any]] = {
    "complex y": np.complex64,
    "y of floats": np.float32,
    "y of bools": lambda y: y > 3,
    "y of times": lambda y: y.astype("datetime64[D]"),
    "y structured": lambda y: structured,
    "y 0-d": lambda y: y[0],
    "y 2-d": lambda y: y[:, None],
    "y one too short": lambda y: y[:-1],
    "y empty": lambda y: y[:0],
    "y of bytes that are no UTF-8": lambda y: np.array([b"\xff%d" % i for i in y]),
}
READ_Y: dict[str, Callable[[np.ndarray], Any]] = {
    "y of bytes": lambda y: np.array([b"a%d" % i for i in y]),
    "y of text in other alphabets": lambda y: np.array([f"жé{i}\u202e" for i in y]),
    "y of text with controls": lambda y: np.array([f"\x1b[31m\n<b>{i}" for i in y]),
    "y of half characters": surrogate,
    "y of uint64": lambda y: y.astype(np.uint64) + np.uint64(2**63),
    "y of big-endian int16": lambda y: y.astype(">i2"),
    "y of negative numbers": lambda y: -1 - y,
    "y of very long text": lambda y: np.array([f"{i}" * 500 for i in y]),
}

Odd = tuple[str, Callable[[], dict[str, Any]], str]  # command, arrays, answer
ODD: dict[str, Odd] = {}
for name, change in SAME_X.items():
    ODD[name] = ("embed", x_of(change), SAME)
for number, (name, change) in enumerate(REFUSED_X.items()):
    ODD[name] = (("embed", "train", "evaluate")[number % 3], x_of(change), LINE)
    if name not in ("another width",):
        ODD[f"{name}, embeddings"] = ("doctor", x_of(change), LINE)
for number, (name, change) in enumerate(REFUSED_Y.items()):
    ODD[name] = (("evaluate", "train")[number % 2], y_of(change), LINE)
    ODD[f"{name}, of embeddings"] = ("doctor", y_of(change), EITHER if "UTF-8" in name else LINE)
for number, (name, change) in enumerate(READ_Y.items()):
    ODD[name] = (("evaluate", "train")[number % 2], y_of(change), READ)
    ODD[f"{name}, of embeddings"] = ("doctor", y_of(change), READ)
ODD |= {
    "NaN": ("train", with_value(np.nan), LINE),
    "infinity": ("evaluate", with_value(np.inf), LINE),
    "a number beyond float32": ("embed", with_value(1e300, "f8"), LINE),
    "a long double beyond float64": ("embed", with_value(np.longdouble("1e400"), "g"), LINE),
    "the largest float32": ("embed", with_value(3e38), EITHER),
    "the largest float32, to measure": ("evaluate", with_value(3e38), EITHER),
    "huge numbers, to measure": ("evaluate", x_of(lambda x: x * np.float32(1e36)), EITHER),
    "NaN among embeddings": ("doctor", with_value(np.nan), READ),
    "infinity among embeddings": ("doctor", with_value(-np.inf), READ),
    "1e300 among embeddings": ("doctor", with_value(1e300, "f8"), READ),
    "one embedding": ("doctor", lambda: usual(x=np.ones((1, 8)), y=None), READ),
    "one embedding of one identity": ("doctor", lambda: usual(x=np.ones((1, 8)), y=[0]), READ),
    "two equal rows": ("doctor", lambda: usual(x=np.ones((2, 8)), y=[0, 1]), READ),
    "a column": ("doctor", x_of(lambda x: x[:, :1]), READ),
    "zeros": ("train", x_of(np.zeros_like), READ),
    "tiny numbers": ("train", x_of(lambda x: x * np.float32(1e-40)), READ),
    "huge numbers": ("train", x_of(lambda x: x * np.float32(1e36)), EITHER),
    "bools": ("train", x_of(lambda x: x > 0), READ),
    "no y": ("embed", lambda: usual(y=None), READ),
    "no x": ("embed", lambda: usual(x=None), LINE),
    "X for x": ("train", lambda: usual(x=None, X=np.ones((48, 8))), LINE),
    "an array that is not asked for": ("embed", lambda: usual(z=structured), SAME),
    "Python objects that are not asked for": ("embed", lambda: usual(z=np.array([{}])), EITHER),
    "names of numbers": ("embed", lambda: usual(names=np.arange(48.0)), SAME),
    "names of markup": ("train", lambda: usual(names=[f"<script>{i}" for i in range(48)]), READ),
    "names 2-d": ("embed", lambda: usual(names=np.arange(96).reshape(48, 2)), LINE),
    "names structured": ("embed", lambda: usual(names=structured), EITHER),
    "names of bytes, no UTF-8": ("embed", lambda: usual(names=np.array([b"\xff"] * 48)), LINE),
    "groups of floats": ("evaluate", lambda: usual(groups=np.arange(48.0)), LINE),
    "groups too short": ("evaluate", lambda: usual(groups=np.arange(3)), LINE),
    "one group": ("evaluate", lambda: usual(groups=np.zeros(48, int)), LINE),
    "groups of spaces": ("evaluate", lambda: usual(groups=np.array([" "] * 48)), READ),
    "split_groups of bytes, no UTF-8": (
        "train",
        lambda: usual(split_groups=np.array([b"\xff"] * 48)),
        LINE,
    ),
    "two split_groups": ("train", lambda: usual(split_groups=np.arange(48) // 24), EITHER),
    "images where vectors were learned": ("embed", lambda: usual(x=np.zeros((48, 4, 4))), LINE),
    "images of 200 channels": ("train", lambda: usual(x=np.zeros((48, 200, 2, 8))), EITHER),
    "images of one pixel": ("train", lambda: usual(x=np.arange(48.0).reshape(48, 1, 1)), EITHER),
    "images of 1 x 300": ("train", lambda: usual(x=np.zeros((48, 1, 300), np.uint8)), EITHER),
}
