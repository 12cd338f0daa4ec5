"""Identities with a single item: kept as dissimilar examples, left out, or refused."""

import json

import numpy as np
import pytest
import torch
from conftest import make_images, make_vectors, write_csv
from PIL import Image

import nearfar as nf
from nearfar.app.data.items import read_data
from nearfar.app.errors import InputError
from nearfar.app.train import batches, objectives
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import read_config, to_toml
from nearfar.app.train.run import read_results
from nearfar.app.train.split import singles, split_items

SHARES = {"calibration": 0.2, "test": 0.2}
SIDES = ("train", "calibration", "test")
SMALL = ("--identities", "16", "--items", "4", "--embedding-dim", "16", "--no-report")


def lonely(path, n_several=24, n_single=60, **more):
    """Vectors of which most identities have one item; identities come in a random order."""
    x, y = make_vectors(n_several + n_single, 6)
    number = np.random.default_rng(0).permutation(n_several + n_single)
    kept = (y < n_several) | (np.arange(len(y)) % 6 == 0)
    np.savez(path, x=x[kept], y=number[y[kept]], **more)
    return str(path)


def test_singles_are_refused_with_what_can_be_done(nearfar, tmp_path):
    data = lonely(tmp_path / "v.npz")
    for options in ((), ("--single", "refuse")):
        done = nearfar("train", data, "--out", tmp_path / "run", "--steps", 2, *options)
        assert done.status == 2
        for words in (
            "single item",
            "(60 of 84 identities)",
            "--single keep",
            "--single leave-out",
        ):
            assert words in done.err
    done = nearfar("train", data, "--out", tmp_path / "run", "--single", "drop")
    assert "single must be one of keep, leave-out, refuse; got 'drop'" in done.err
    table = write_csv(tmp_path / "p.csv", ("a", "b", "label"), [("1 2", "3 4", "true")])
    done = nearfar("train", table, "--out", tmp_path / "run", "--single", "keep")
    assert "--single is for data with identities" in done.err


def test_each_side_has_its_share_of_singles(tmp_path):
    items = read_data(lonely(tmp_path / "v.npz"))
    alone = singles(items)
    assert int(alone.sum()) == 60
    for seed in range(10):
        kept = split_items(items, **SHARES, seed=seed, single="keep")
        sides = [getattr(kept, side) for side in SIDES]
        assert torch.cat(sides).sort().values.tolist() == list(range(84))
        assert [int(alone[side].sum()) for side in sides] == [36, 12, 12]
        assert [int((~alone[side]).sum()) for side in sides] == [14, 5, 5]
        without = split_items(items, **SHARES, seed=seed, single="leave-out")
        for side, other in zip(SIDES, sides, strict=True):
            assert getattr(without, side).tolist() == other[~alone[other]].tolist()


def test_a_side_of_singles_only_is_refused(tmp_path):
    items = read_data(lonely(tmp_path / "v.npz", n_several=2))
    with pytest.raises(InputError, match="no identity with two items"):
        split_items(items, **SHARES, seed=0, single="keep")
    with pytest.raises(InputError, match="2 identities are too few"):
        split_items(items, **SHARES, seed=0, single="leave-out")
    three = read_data(lonely(tmp_path / "v.npz", n_several=3))
    for seed in range(10):
        split = split_items(three, **SHARES, seed=seed, single="keep")
        assert [int((~singles(three)[getattr(split, side)]).sum()) for side in SIDES] == [1, 1, 1]


def test_singles_bound_to_others_go_with_them(tmp_path):
    group = np.array([f"site {i % 5}" for i in range(84)])
    data = lonely(tmp_path / "v.npz")
    y = np.load(data)["y"]
    items = read_data(lonely(tmp_path / "v.npz", split_groups=group[y]))
    for single in ("keep", "leave-out"):
        split = split_items(items, **SHARES, seed=0, single=single)
        sites = [{int(i) % 5 for i in getattr(split, side)} for side in SIDES]
        assert sum(map(len, sites)) == 5


def batch_rows(n_several, n_single, *, n_identities, n_items, rounds=200):
    identity = torch.cat([torch.arange(n_several).repeat_interleave(3), n_several
                          + torch.arange(n_single)])  # fmt: skip
    drawn = batches.balanced_items(
        identity,
        torch.arange(n_several + n_single),
        n_identities=n_identities,
        n_items=n_items,
        generator=torch.Generator().manual_seed(0),
    )
    return identity, [next(drawn) for _ in range(rounds)]


def test_a_batch_holds_a_single_item_once_and_as_often_as_others():
    identity, rows = batch_rows(30, 60, n_identities=8, n_items=4)
    shown = torch.zeros(90)
    for batch in rows:
        counts = torch.bincount(identity[batch], minlength=90)
        assert (counts[:30] > 0).sum() == 8
        assert set(counts[:30].tolist()) <= {0, 4}
        assert counts[30:].max() <= 1
        assert counts[30:].sum() <= 8
        shown += counts > 0
    assert shown[30:].sum() > 0.9 * 8 * len(rows)  # there are two for each that has several
    identity, rows = batch_rows(40, 10, n_identities=8, n_items=4, rounds=1000)
    shown = sum(torch.bincount(identity[batch], minlength=50) > 0 for batch in rows)
    assert float(shown[40:].float().mean() / shown[:40].float().mean()) == pytest.approx(1, abs=0.1)


def test_batches_without_singles_are_what_they_were():
    identity = torch.arange(5).repeat_interleave(4)
    drawn = batches.balanced_items(
        identity,
        torch.arange(5),
        n_identities=3,
        n_items=4,
        generator=torch.Generator().manual_seed(3),
    )
    generator = torch.Generator().manual_seed(3)
    picked = torch.randperm(5, generator=generator)[:3]
    rows = [4 * i + torch.randperm(4, generator=generator) for i in picked]
    assert torch.equal(next(drawn), torch.cat(rows))


def test_a_single_item_is_a_negative_of_every_query():
    """Against the formula of InfoNCE, with the single items beside the other positives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator).double())
    identity = torch.tensor([5, 5, 7, 3, 3, 9, 0, 0, 4])
    batch = objectives.Batch(x, identity, generator)
    chosen = objectives.objective("info_nce")
    loss, _ = chosen.from_batch(lambda *data, **more: nf.info_nce_loss(*data, **more), batch)
    query, positive, alone = x[[6, 3, 0]], x[[7, 4, 1]], x[[2, 5, 8]]
    logits = query @ torch.cat([positive, alone]).T / 0.07
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_takes_batches_with_singles(name):
    chosen = objectives.objective(name)
    settings = objectives.resolve(name, {})
    generator = torch.Generator().manual_seed(0)
    x = (0.3 * torch.randn(15, 6, generator=generator)).requires_grad_()  # within every margin
    identity = torch.cat([torch.arange(3).repeat_interleave(4), torch.arange(3, 6)])
    batch = objectives.Batch(x, identity, generator, torch.randn(6, 6, generator=generator))
    loss, active = chosen.from_batch(lambda *a, **k: chosen.loss(*a, **settings, **k), batch)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert 0 <= float(active) <= 1
    pushed = bool(x.grad[12:].any())
    assert pushed == (name not in ("clip", "siglip"))  # which compare matched rows only


@pytest.mark.parametrize("name", ["sup_con", "clip", "proxy_softmax"])
def test_kept_singles_train_and_are_measured(nearfar, tmp_path, name):
    data = lonely(tmp_path / "v.npz")
    options = ("--single", "keep", "--loss", name, "--steps", "40", *SMALL)
    done = nearfar("train", data, "--out", tmp_path / "run", *options)
    assert done.status == 0, done.err
    assert "60 with a single item serve as dissimilar examples" in done.out
    assert "14 identities x 4 items and up to 16 single items" in done.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [len(summary["split"][side]) for side in SIDES] == [50, 17, 17]
    assert summary["test"]["learned"]["auc"] > 0.9
    again = nearfar("evaluate", tmp_path / "run", "--json")
    assert json.loads(again.out)["learned"]["auc"] == summary["test"]["learned"]["auc"]
    assert nearfar("report", tmp_path / "run").status == 0
    assert nearfar("doctor", tmp_path / "run").status in (0, 1)


def test_singles_left_out_are_on_no_side(nearfar, tmp_path):
    data = lonely(tmp_path / "v.npz")
    options = ("--single", "leave-out", "--steps", "3", *SMALL)
    done = nearfar("train", data, "--out", tmp_path / "run", *options)
    assert done.status == 0, done.err
    assert "60 with a single item are left out" in done.out
    split = read_results(tmp_path / "run").summary["split"]
    assert sum(len(split[side]) for side in SIDES) == 24
    assert nearfar("evaluate", tmp_path / "run").status == 0
    again = nearfar(
        "train", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again"
    )
    assert again.status == 0, again.err


def test_singles_in_a_folder_and_in_a_sweep(nearfar, tmp_path):
    for i, pixels in enumerate(make_images(n_identities=18, n_items=2)):
        path = tmp_path / "photos" / f"id{i // 2}" / f"{i % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i // 2 < 10 or i % 2 == 0:
            Image.fromarray(pixels).save(path)
    command = ("sweep", tmp_path / "photos", "--loss", "triplet", "--steps", "2")
    assert nearfar(*command, "--out", tmp_path / "s").status == 2
    done = nearfar(*command, "--out", tmp_path / "s", "--single", "keep")
    assert done.status == 0, done.err
    split = read_results(tmp_path / "s" / "triplet").summary["split"]
    assert sum(len(split[side]) for side in SIDES) == 18


def test_configs_say_what_becomes_of_singles_and_older_ones_need_not(tmp_path):
    config = TrainConfig("glyphs", "triplet", single="keep")
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "c.toml") == config
    (tmp_path / "c.toml").write_text("format = 1\ndata = 'glyphs'\nloss = 'triplet'\n")
    assert read_config(tmp_path / "c.toml").single is None
    assert "single" not in to_toml(read_config(tmp_path / "c.toml"))
    (tmp_path / "c.toml").write_text("format = 1\ndata = 'x'\nloss = 'triplet'\nsingle = 'most'\n")
    with pytest.raises(InputError, match="single must be one of keep"):
        read_config(tmp_path / "c.toml")
