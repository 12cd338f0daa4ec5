"""Files of NumPy arrays that are damaged, or hold something else."""

import warnings
import zipfile
from io import BytesIO

import numpy as np
import pytest
from conftest import make_vectors
from damage_arrays import encrypted, header, npy, of_method, zipped

from nearfar.app.data.arrays import Unreadable, load

X = npy(np.ones((4, 2)))


def flipped_while_packed() -> bytes:
    """Its zip is sound, and what is packed in it is not."""
    packed = BytesIO()
    np.savez_compressed(packed, x=make_vectors()[0])
    whole = bytearray(packed.getvalue())
    whole[200] ^= 255
    return bytes(whole)


DAMAGED = {
    "a packed array": flipped_while_packed,
    "a password": encrypted,
    "an unknown way of packing": lambda: of_method(77),
    "a header that is not closed": lambda: zipped(
        {"x.npy": header("{'descr': '<f4', 'shape': (4")}
    ),
    "a header with zeros": lambda: zipped({"x.npy": header("\0" * 40)}),
    "brackets in brackets": lambda: zipped({"x.npy": header("(" * 9000)}),
    "a zip that is cut off": lambda: zipped({"x.npy": X})[:-40],
    "nothing": bytes,
    "text": lambda: b"hello",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_unreadable(tmp_path, name):
    (tmp_path / "v.npz").write_bytes(DAMAGED[name]())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(Unreadable, match="npz"):
            load(tmp_path / "v.npz")
    assert not said  # no file left open, no word about Python 2


def test_members_that_are_no_arrays_are_passed_over(nearfar, vector_run, tmp_path):
    (tmp_path / "v.npz").write_bytes(zipped({"x.npy": X, "readme.txt": b"hello", "y": b"0 1"}))
    assert list(load(tmp_path / "v.npz")) == ["x"]
    (tmp_path / "w.npz").write_bytes(zipped({"x": b"0 1"}, zipfile.ZIP_DEFLATED))
    for command in (("doctor",), ("embed", vector_run)):
        out = () if len(command) == 1 else ("--out", tmp_path / "e.npz")
        done = nearfar(*command, tmp_path / "w.npz", *out)
        assert done.error == f"nearfar: error: {tmp_path}/w.npz has no array 'x'; it has: none."


def test_numbers_beyond_the_network_are_named_where_they_are_embedded(
    nearfar, vector_run, tmp_path
):
    x, y = make_vectors(8, 2)
    x[7, 3] = 3e38
    np.savez(tmp_path / "v.npz", x=x, y=y)
    for command in (("embed", "--out", tmp_path / "e.npz"), ("evaluate",)):
        done = nearfar(command[0], vector_run, tmp_path / "v.npz", *command[1:])
        assert "returns NaN or infinity for v.npz:7 (1 of 16 items)" in done.error
    assert not (tmp_path / "e.npz").exists()


def test_embeddings_beyond_float32_are_a_finding(nearfar, tmp_path):
    np.savez(tmp_path / "v.npz", x=np.array([[1e300, 1.0], [1.0, 2.0]]))
    done = nearfar("doctor", tmp_path / "v.npz")
    assert (done.status, done.err) == (1, "")


def test_names_without_a_text_are_refused(nearfar, vector_run, tmp_path):
    x, _ = make_vectors(8, 2)
    np.savez(tmp_path / "v.npz", x=x, names=np.zeros(16, [("a", "<f4"), ("b", "<i4")]))
    done = nearfar("embed", vector_run, tmp_path / "v.npz", "--out", tmp_path / "e.npz")
    assert "names of dtype [('a', '<f4'), ('b', '<i4')]" in done.error


def test_a_long_vector_is_no_file_name(nearfar, tmp_path):
    """Whose length the system would refuse."""
    x, y = make_vectors(n_identities=12, n_items=4, dim=64)
    np.savez(tmp_path / "v.npz", x=x, y=y)
    run = tmp_path / "run"
    assert (
        nearfar("train", tmp_path / "v.npz", "--out", run, "--steps", 3, "--no-report").status == 0
    )
    long = " ".join(["-0.5123"] * 64)
    done = nearfar("verify", run, long, long)
    assert done.status == 0, done.err
    assert done.out.startswith("same: ")
