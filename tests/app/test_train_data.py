"""What DATA is read into."""

import numpy as np
import pytest
import torch
from conftest import make_images, write_csv
from PIL import Image

from nearfar.app.data.content import as_input
from nearfar.app.data.items import Pairs, read_data, read_glyphs
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.tables import read_table


def save_images(root, images):
    for i, image in enumerate(images):
        (root / f"id{i // 2}").mkdir(parents=True, exist_ok=True)
        image.save(root / f"id{i // 2}" / f"{i}.png")
    return str(root)


def test_glyphs_are_letters_of_many_writing_systems():
    items = read_glyphs()
    assert items.content.x.dtype is torch.uint8
    assert items.content.x.shape[1:] == (1, 32, 32)
    assert len(items.content.x) == len(items.identity) == len(items.names)
    counts = items.identity.bincount()
    assert len(counts) == len(items.identities) == len(items.split_groups) >= 800
    assert 2 <= counts.min() <= counts.max() <= 20
    assert len(set(items.split_groups)) >= 10


def test_grey_images_stay_grey_and_one_of_colour_makes_rgb(tmp_path):
    grey = [Image.fromarray(pixels) for pixels in make_images(3, 2)]
    assert read_data(save_images(tmp_path / "g", grey)).content.x.shape == (6, 1, 32, 32)
    colour = [*grey[:-1], Image.new("RGB", (5, 9), (255, 0, 0))]
    items = read_data(save_images(tmp_path / "c", colour), Reads(image_size=16))
    assert items.content.x.shape == (6, 3, 16, 16)
    assert items.content.x[5, :, 0, 0].tolist() == [255, 0, 0]
    assert torch.equal(items.content.x[0, 0], items.content.x[0, 2])
    assert items.names[5] == "id2/5.png"
    assert items.identities == ["id0", "id1", "id2"]


@pytest.mark.parametrize(
    ("image", "channels", "value"),
    [
        (Image.new("1", (8, 8), 1), 1, 255),
        (Image.new("LA", (8, 8), (40, 255)), 1, 40),
        (Image.new("LA", (8, 8), (40, 0)), 1, 255),  # transparent: the white behind it
        (Image.new("RGBA", (8, 8), (10, 10, 10, 0)), 3, 255),
        (Image.new("P", (8, 8), 0), 3, 0),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), 3, 255),
    ],
    ids=["1", "LA", "LA clear", "RGBA clear", "P", "CMYK"],
)
def test_every_mode_is_read(tmp_path, image, channels, value):
    root = tmp_path / "modes"
    for identity in ("a", "b"):
        (root / identity).mkdir(parents=True)
        image.save(root / identity / "0.tiff")
    items = read_data(str(root), Reads(image_size=8))
    assert items.content.x.shape == (2, channels, 8, 8)
    assert abs(int(items.content.x[0, 0, 4, 4]) - value) <= 1


def test_photos_are_turned_upright(tmp_path):
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255  # white above
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 3  # taken upside down
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png", exif=exif)
    x = read_data(str(tmp_path), Reads(image_size=16)).content.x
    assert x[0, 0, 0, 0] == 0
    assert x[0, 0, 15, 0] == 255


@pytest.mark.parametrize(
    ("x", "shape", "dtype"),
    [
        (np.zeros((6, 5), np.float64), (6, 5), torch.float32),
        (np.zeros((6, 5), np.uint8), (6, 5), torch.float32),
        (np.zeros((6, 8, 9), np.uint8), (6, 1, 8, 9), torch.uint8),
        (np.zeros((6, 3, 8, 9), np.float16), (6, 3, 8, 9), torch.float32),
        (np.zeros((6, 8, 8), bool), (6, 1, 8, 8), torch.float32),
    ],
)
@pytest.mark.parametrize("y", [[3, 3, 9, 9, -1, -1], ["c", "c", "d", "d", "a", "a"]])
def test_npz(tmp_path, x, shape, dtype, y):
    np.savez(tmp_path / "v.npz", x=x, y=np.array(y))
    items = read_data(str(tmp_path / "v.npz"))
    assert items.content.x.shape == shape
    assert items.content.x.dtype is dtype
    assert items.identity.tolist() == [1, 1, 2, 2, 0, 0]
    assert list(items.identities) == sorted(map(str, set(y)))


def test_images_of_bytes_become_fractions():
    assert as_input(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    assert as_input(torch.tensor([0.0, 255])).tolist() == [0, 255]


def test_pairs_share_items_and_similar_ones_share_an_identity(tmp_path):
    rows = [
        ("1 2", "[3, 4]", "true"),
        ("3 4", "5,6", "TRUE"),
        ("7 8", "1 2", "false"),
        ("7 8", "9 9", "True"),
    ]
    pairs = read_data(str(write_csv(tmp_path / "p.csv", ("a", "b", "label"), rows)))
    assert isinstance(pairs, Pairs)
    assert pairs.similar.tolist() == [True, True, False, True]
    assert torch.equal(
        pairs.items.content.x[pairs.a], torch.tensor([[1.0, 2], [3, 4], [7, 8], [7, 8]])
    )
    identity = pairs.items.identity
    assert identity[pairs.a].tolist() == [0, 0, 1, 1]
    assert identity[pairs.b].tolist() == [0, 0, 0, 1]
    assert pairs.where[2] == f"{tmp_path / 'p.csv'}, line 4"


@pytest.mark.parametrize(
    ("labels", "option", "similar"),
    [
        ([1, 0, 1], 1, [True, False, True]),
        ([1, 0, 1], 0, [False, True, False]),
        ([1.0, 0.0, 1.0], 0, [False, True, False]),
        (["true", "false", "true"], 1, [True, False, True]),
        ([1, 0.25, 0], 1, [1.0, 0.25, 0.0]),
        ([1, 0.25, 0], 0, [0.0, 0.75, 1.0]),
    ],
)
def test_labels_of_pairs(tmp_path, labels, option, similar):
    rows = [(f"{i} 1", f"{i} 2", label) for i, label in enumerate(labels)]
    table = write_csv(tmp_path / "p.csv", ("a", "b", "label"), rows)
    assert read_data(str(table), similar_label=option).similar.tolist() == similar


def test_true_never_means_different(tmp_path):
    table = write_csv(tmp_path / "p.csv", ("a", "b", "label"), [("1 2", "3 4", "true")])
    with pytest.raises(InputError, match="true means similar"):
        read_data(str(table), similar_label=0)


def test_a_table_keeps_its_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeffa,label\n"1\n2",true\n\n3 4,x\n', encoding="utf-8")
    table = read_table(path)
    assert list(table.columns) == ["a", "label"]
    assert table.vectors("a").tolist() == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match="line 5: label is 'x'"):
        table.numbers("label")
    path.write_text("a,a\n1,2\n")
    with pytest.raises(InputError, match="two columns called 'a'"):
        read_table(path)
    path.write_bytes(b"a,b\n\xff\xfe,2\n")
    with pytest.raises(InputError, match="Save it as UTF-8"):
        read_table(path)
