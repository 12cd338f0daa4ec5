"""What counts as data in a folder of photos, and what is said of the rest."""

import os

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

from nearfar.app.data.items import read_data
from nearfar.app.errors import InputError

FEW = ("--steps", "2", "--identities", "6", *SMALL)
RANDOM = np.random.default_rng(0)


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def album(tmp_path):
    """Eight identities of two photos."""
    for identity in range(8):
        for item in range(2):
            photo(tmp_path / "photos" / f"id{identity}" / f"{item}.png")
    return tmp_path / "photos"


CLEAN = [f"id{identity}/{item}.png" for identity in range(8) for item in range(2)]


def note(items) -> str:
    (only,) = items.notes
    return only


def test_nothing_is_said_of_a_folder_of_which_nothing_is_left_out(album):
    items = read_data(str(album))
    assert items.names == CLEAN
    assert items.notes == []


@pytest.mark.parametrize(
    "hidden",
    [
        "id0/.ipynb_checkpoints/0-checkpoint.png",
        "id0/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg",
        "id0/._0.png",
        "__MACOSX/id0/0.png",
        ".thumbnails/0.png",
        "id0/__MACOSX/0.png",
        "$RECYCLE.BIN/0.png",
    ],
)
def test_hidden_folders_and_files_never_count(album, hidden):
    photo(album / hidden)
    items = read_data(str(album))
    assert items.names == CLEAN
    assert note(items) == f"left out of {album}: 1 hidden file"


def test_what_is_left_out_is_counted_with_its_reason(album):
    for name in ("id0/Thumbs.db", "id1/.DS_Store", "desktop.ini"):
        (album / name).write_bytes(b"x")
    for name in ("id0/a.HEIC", "id3/b.heic", "id3/raw.CR2", "notes.txt", "id0/README"):
        (album / name).write_bytes(b"x")
    photo(album / "loose.png")
    (album / "id0" / "gone.png").symlink_to(album / "nowhere.png")
    os.mkfifo(album / "id0" / "pipe.png")  # would wait for ever
    items = read_data(str(album))
    assert items.names == CLEAN
    assert note(items) == (
        f"left out of {album}: 1 .cr2 file (a camera's raw format: export as JPEG or TIFF), "
        "2 .heic files (HEIC, which needs pillow-heif: install it, or convert to JPEG), "
        "1 .txt file (not an image), 1 file without an ending (not an image), 3 hidden files, "
        "2 links (to nothing), 1 loose image (in no identity's folder)"
    )


def test_links_are_what_they_lead_to(album, tmp_path):
    photo(tmp_path / "big" / "more" / "9.png")
    photo(tmp_path / "elsewhere" / "0.png")
    (album / "id0" / "more").symlink_to(tmp_path / "big" / "more")
    (album / "id8").symlink_to(tmp_path / "elsewhere")
    (album / "id1" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    with pytest.raises(InputError, match=r"id1/2.png and .*id8/0.png are the same file"):
        read_data(str(album))
    (album / "id1" / "2.png").unlink()
    items = read_data(str(album))
    assert set(items.names) == {*CLEAN, "id0/more/9.png", "id8/0.png"}
    assert items.notes == []


def test_circles_of_links_are_found(album):
    (album / "id0" / "up").symlink_to(album)
    (album / "id1" / "self").symlink_to(album / "id1")
    (album / "all").symlink_to(album)
    (album / "id2" / "loop").symlink_to(album / "id2" / "loop")
    items = read_data(str(album))
    assert items.names == CLEAN
    assert note(items).endswith("3 links (to a folder it lies in), 1 link (to nothing)")


def test_one_file_counts_once(album):
    (album / "id0" / "again.png").symlink_to(album / "id0" / "0.png")
    items = read_data(str(album))
    assert items.names == CLEAN
    assert note(items).endswith("1 second path (to a file that is already read)")


def test_one_file_under_two_identities_is_refused_with_both_paths(album):
    (album / "id3" / "other").symlink_to(album / "id1")
    with pytest.raises(InputError, match=r"id1/0.png and .*id3/other/0.png are the same file"):
        read_data(str(album))


def test_subfolders_of_an_identity_are_part_of_it(album):
    photo(album / "id0" / "2019" / "5.png")
    items = read_data(str(album))
    assert items.names == sorted([*CLEAN, "id0/2019/5.png"])
    assert len(items.identities) == 8


def test_a_folder_of_folders_is_answered_with_the_option(nearfar, tmp_path):
    root = tmp_path / "p"
    for place in range(4):
        for identity in range(3):
            for item in range(2):
                photo(root / f"place{place}" / f"{identity}" / f"{item}.png")
    said = nearfar("train", root, "--out", tmp_path / "run", *FEW).error
    assert "4 subfolders" in said
    assert "hold only folders, 12 in all" in said
    assert "--identity-depth 2" in said
    assert "--identity-depth 1" in said
    assert not (tmp_path / "run").exists()
    one, two = (read_data(str(root), identity_depth=depth) for depth in (1, 2))
    assert one.identities == [f"place{place}" for place in range(4)]
    assert two.identities[:4] == ["place0/0", "place0/1", "place0/2", "place1/0"]
    assert len(two.identities) == 12
    assert one.names == two.names

    run = tmp_path / "run"
    done = nearfar("train", root, "--out", run, "--identity-depth", 2, *FEW)
    assert done.status == 0, done.err
    assert "12 identities" in done.out
    assert nearfar("evaluate", run).status == 0  # the run knows its depth
    assert "--identity-depth 2" in nearfar("evaluate", run, root).error
    assert nearfar("evaluate", run, root, "--identity-depth", 2).status == 0
    assert "--identity-depth" in nearfar("embed", run, root, "--out", tmp_path / "e.npz").error
    embed = ("embed", run, root, "--out", tmp_path / "e.npz", "--identity-depth", 2)
    assert nearfar(*embed).status == 0
    assert len(set(np.load(tmp_path / "e.npz")["y"])) == 12


def test_a_folder_in_a_folder_is_named(album):
    with pytest.raises(InputError, match=r"holds a single folder, .*photos, .*Pass that as DATA"):
        read_data(str(album.parent))


def test_the_sides_of_a_split_are_no_identities(tmp_path):
    for side in ("train", "Val", "test"):
        for identity in ("ann", "bob"):
            photo(tmp_path / "p" / side / identity / "0.png")
    with pytest.raises(InputError, match=r"sides of a split, not identities.*such as .*p/Val;"):
        read_data(str(tmp_path / "p"))
    with pytest.raises(InputError, match=r"Val/ann, .*test/ann, .*: the same name on two sides"):
        read_data(str(tmp_path / "p"), identity_depth=2)
    (tmp_path / "p" / "train").rename(tmp_path / "p" / "other")
    assert len(read_data(str(tmp_path / "p"), identity_depth=2).identities) == 6


def test_sides_that_share_no_identity_can_be_taken_together(tmp_path):
    for side in ("train", "test"):
        photo(tmp_path / "p" / side / f"of {side}" / "0.png")
    items = read_data(str(tmp_path / "p"), identity_depth=2)
    assert items.identities == ["test/of test", "train/of train"]


def test_an_identity_of_unread_files_is_told_why(album):
    (album / "id9").mkdir()
    (album / "id9" / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"id9 holds no images \(1 .heic file \(HEIC.*JPEG\)\)"):
        read_data(str(album))


def test_a_folder_of_loose_files(album, tmp_path):
    photo(tmp_path / "flat" / "a.png")
    (tmp_path / "flat" / "b.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="has images but no subfolders"):
        read_data(str(tmp_path / "flat"))
    items = read_data(str(tmp_path / "flat"), labelled=False)
    assert items.names == ["a.png"]
    assert "1 .heic file" in note(items)
    (tmp_path / "flat" / "a.png").unlink()
    with pytest.raises(InputError, match=r"has no images and no subfolders \(1 .heic file"):
        read_data(str(tmp_path / "flat"), labelled=False)


def test_the_option_is_for_folders(vectors):
    with pytest.raises(InputError, match="--identity-depth is for folders of images"):
        read_data(str(vectors), identity_depth=2)


def test_notes_are_shown_by_every_command(nearfar, album, tmp_path):
    photo(album / ".cache" / "0.png")
    run = tmp_path / "run"
    done = nearfar("train", album, "--out", run, *FEW)
    assert f"note: left out of {album}: 1 hidden file" in done.out.replace("\n", " ")
    said = nearfar("evaluate", run, album).err
    assert "1 hidden file" in said
    assert "1 hidden file" in nearfar("embed", run, album, "--out", tmp_path / "e.npz").err
