"""A file is written completely or not at all."""

import pytest

from nearfar.app.errors import InputError
from nearfar.app.output import whole_file


def interrupted(out):
    with whole_file(out) as file:
        file.write(b"second")
        raise RuntimeError


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    out = tmp_path / "new" / "page.html"
    with whole_file(out) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError):
        interrupted(out)
    assert out.read_bytes() == b"first"
    assert list(out.parent.iterdir()) == [out]


def test_where_no_file_can_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    below_a_file = tmp_path / "file" / "page.html"
    with (
        pytest.raises(InputError, match=r"^--out .*page\.html cannot be written: \w"),
        whole_file(below_a_file),
    ):
        pass
