"""The pieces of training: splits, batches, how a loss's arguments are formed, the encoders."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vectors

import nearfar as nf
from nearfar.app.data.content import Arrays
from nearfar.app.data.groups import connected
from nearfar.app.data.items import Items, Pairs, read_glyphs
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.train import batches, objectives
from nearfar.app.train.compare import Comparison, Thresholds, compare, dashes, table
from nearfar.app.train.config import Hyperparameters, TrainConfig, options_of
from nearfar.app.train.config_file import read_config, to_toml
from nearfar.app.train.encoders import Embedder, build
from nearfar.app.train.measure import GivenPairs, MeasuredPairs, Sample
from nearfar.app.train.split import rows_within, split_items, split_pairs
from nearfar.doctor import Evidence, Fitted
from nearfar.doctor.threshold_rules import coarse_threshold

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SHARES = {"calibration": 0.2, "test": 0.2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def items_of(identity, **groups):
    identity = torch.as_tensor(identity)
    names = [str(i) for i in range(int(identity.max()) + 1)]
    return Items(
        Arrays(torch.zeros(len(identity), 2)), identity, [""] * len(identity), names, **groups
    )


def pairs_of(rows, n):
    a, b, similar = (torch.tensor(column) for column in zip(*rows, strict=True))
    identity = connected(n, a, b, similar)
    return Pairs(items_of(identity), a, b, similar, [""] * len(a))


def test_the_page_says_when_pairs_are_too_few():
    def finding(n_pairs):
        return coarse_threshold(Evidence(fitted=Fitted(0.01, n_pairs, 100, 0.01, 1000, 100)))

    page = DATA_PAGE.read_text(encoding="utf-8")
    assert "about 3 / f pairs of calibration identities: 299 for 0.01\n(25 identities)" in page
    assert finding(300) is None  # of 25 identities
    assert finding(298).name == "coarse-threshold"


def test_the_page_names_the_defaults_of_every_loss():
    rows = [
        f"| {name} | {', '.join(f'{k} {json.dumps(v)}' for k, v in o.hyperparameters.items())} "
        f"| {'yes' if o.from_pairs else 'no'} |".replace('"', "")
        for name, o in objectives.OBJECTIVES.items()
    ]
    _, found = DATA_PAGE.read_text(encoding="utf-8").split(
        "| trains on given pairs |\n|---|---|---|\n"
    )
    assert found.split("\n\n")[0].splitlines() == rows
    for option in ("margin", "temperature", "scale"):
        assert "docs/data.md" in options_of(Hyperparameters)[option][1].help


@pytest.mark.parametrize("n", [6, 7, 10, 61])
def test_sides_share_no_identity_and_leave_none_out(n):
    items = items_of(torch.arange(n).repeat(2))
    for seed in range(5):
        split = split_items(items, **SHARES, seed=seed)
        sides = [split.train, split.calibration, split.test]
        assert torch.cat(sides).sort().values.tolist() == list(range(n))
        assert min(map(len, sides)) >= 2
        assert len(split.test) == pytest.approx(max(0.2 * n, 2), abs=0.5)
    assert torch.equal(split.test, split_items(items, **SHARES, seed=4).test)


def test_writing_systems_stay_whole():
    items = read_glyphs()
    for seed in range(3):
        split = split_items(items, **SHARES, seed=seed)
        systems = [
            {items.split_groups[int(i)] for i in side}
            for side in (split.train, split.calibration, split.test)
        ]
        assert sum(map(len, systems)) == len(set.union(*systems))
        assert min(map(len, systems)) >= 2
        assert len(split.test) > 0.15 * len(items.identities)


def test_pairs_are_split_by_what_similar_pairs_connect():
    """Chains of three items, and dissimilar pairs between any two chains."""
    random = np.random.default_rng(0)
    near = [(3 * i + j, 3 * i + j + 1, True) for i in range(30) for j in range(2)]
    far = [(a, b, False) for a, b in random.integers(0, 90, (600, 2)).tolist() if a // 3 != b // 3]
    pairs = pairs_of(near + far, 90)
    split = split_pairs(pairs, **SHARES, seed=0)
    rows = [rows_within(pairs, side) for side in (split.train, split.calibration, split.test)]
    used = [set(pairs.a[r].tolist()) | set(pairs.b[r].tolist()) for r in rows]
    assert not used[0] & used[1] | used[0] & used[2] | used[1] & used[2]
    kept = torch.cat(rows)
    assert pairs.similar[kept].sum() == len(near)  # only dissimilar pairs are lost
    assert len(kept) < len(pairs.a)


def test_pairs_in_small_clusters_lose_nothing():
    rows = [(4 * i + a, 4 * i + b, s) for i in range(30) for a, b, s in
            [(0, 1, True), (2, 3, True), (1, 2, False)]]  # fmt: skip
    pairs = pairs_of(rows, 120)
    split = split_pairs(pairs, **SHARES, seed=0)
    sides = (split.train, split.calibration, split.test)
    assert sum(len(rows_within(pairs, side)) for side in sides) == len(rows)


def test_batches_are_balanced():
    identity = torch.tensor([0] * 9 + [1] * 2 + [2] * 5 + [3] * 4 + [4] * 4)
    chosen = torch.tensor([0, 1, 2, 4])
    drawn = batches.balanced_items(
        identity, chosen, n_identities=3, n_items=4, generator=generator()
    )
    for _ in range(20):
        rows = next(drawn)
        shown = identity[rows].view(3, 4)
        assert (shown == shown[:, :1]).all()
        assert len(set(shown[:, 0].tolist())) == 3
        assert 3 not in shown
        for i, four in zip(shown[:, 0].tolist(), rows.view(3, 4), strict=True):
            assert len(four.unique()) == min(4, int((identity == i).sum()))


def test_batches_of_pairs():
    near = [(2 * i, 2 * i + 1, True) for i in range(20)]
    far = [(2 * i, (2 * i + 2) % 40, False) for i in range(20)]
    pairs = pairs_of(near + far, 40)
    chosen = torch.arange(10)
    drawn = batches.balanced_pairs(pairs, chosen, n_pairs=8, generator=generator())
    rows = next(drawn)
    assert pairs.similar[rows].tolist() == [True] * 4 + [False] * 4
    assert pairs.items.identity[pairs.a[rows]].max() < 10
    drawn = batches.similar_pairs(pairs, chosen, n_pairs=8, generator=generator())
    rows = next(drawn)
    assert pairs.similar[rows].all()
    assert len(pairs.items.identity[pairs.a[rows]].unique()) == 8  # no false negative in a batch


def test_distortion_is_small_and_follows_the_seed():
    x = torch.zeros(50, 1, 32, 32)
    x[:, :, 12:20, 12:20] = 1
    moved = batches.distort(x, generator())
    assert torch.equal(moved, batches.distort(x, generator()))
    assert not torch.equal(moved, x)
    assert (moved.sum((1, 2, 3)) - 64).abs().max() < 20
    assert (moved[:, 0, 15:17, 15:17] > 0.5).all()
    assert torch.allclose(batches.distort(torch.ones(9, 3, 8, 9), generator()), torch.ones(1))


def recorded(calls):
    """A loss that keeps its arguments."""

    def loss(*data, reduction):
        assert reduction == "none"
        calls.append(data)
        return data[0].sum(1)

    return loss


IDENTITY = torch.arange(5).repeat_interleave(4)
ROWS = torch.arange(20.0)[:, None]  # each embedding says which row it is


def batch_of(x, identity=IDENTITY):
    return objectives.Batch(x, identity, generator())


def rows_of(data):
    return [column[:, 0].long() for column in data if column.ndim == 2]


def test_every_pair_weighs_similar_and_dissimilar_alike():
    x = torch.nn.functional.normalize(torch.randn(20, 3, generator=generator()))
    loss, active = objectives.every_pair(nf.contrastive_loss, batch_of(x))
    d = torch.cdist(x, x)
    same = IDENTITY[:, None] == IDENTITY
    upper = torch.ones(20, 20).triu(1).bool()
    expected = (d[same & upper] ** 2).mean() + ((1 - d[~same & upper]).clamp(min=0) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert 0 < active < 1


def test_triplets_and_quadruplets_are_what_they_say():
    calls = []
    objectives.triplets(recorded(calls), batch_of(ROWS))
    objectives.quadruplets(recorded(calls), batch_of(ROWS))
    for data in calls:
        anchor, positive, *negatives = rows_of(data)
        assert len(anchor) == 20 * 3 * objectives.NEGATIVES
        pairs = {(int(a), int(p)) for a, p in zip(anchor, positive, strict=True)}
        assert len(pairs) == 60
        assert (anchor != positive).all()
        assert (IDENTITY[anchor] == IDENTITY[positive]).all()
        identities = [IDENTITY[rows] for rows in (anchor, *negatives)]
        for i, first in enumerate(identities):
            for second in identities[i + 1 :]:
                assert (first != second).all()
        for negative in negatives:
            assert len(negative.unique()) == 20


@pytest.mark.parametrize(("n_items", "n_calls"), [(4, 2), (3, 1), (2, 1)])
def test_queries_meet_no_false_negative(n_items, n_calls):
    identity = torch.tensor([7, 2, 5]).repeat_interleave(n_items)
    calls = []
    rows = torch.arange(3.0 * n_items)[:, None]
    objectives.item_against_item(recorded(calls), batch_of(rows, identity))
    assert len(calls) == n_calls
    for data in calls:
        query, positive = rows_of(data)
        assert (query != positive).all()
        assert (identity[query] == identity[positive]).all()
        assert len(identity[query].unique()) == 3


def test_class_scores_are_cosines():
    calls = []
    x, proxies = torch.randn(20, 3), torch.randn(5, 3)
    batch = objectives.Batch(x, IDENTITY, generator(), proxies)
    objectives.item_against_classes(recorded(calls), batch)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], proxies, dim=2)
    torch.testing.assert_close(calls[0][0], cosines)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objectives_hold_together(name):
    chosen = objectives.objective(name)
    settings = objectives.resolve(name, {})
    assert settings == dict(chosen.hyperparameters)
    assert objectives.verifier_distance(name, settings) in ("euclidean", "sqeuclidean", "cosine")
    x = torch.randn(20, 6, generator=generator(), requires_grad=True)
    batch = objectives.Batch(x, IDENTITY, generator(), torch.randn(5, 6, generator=generator()))
    loss, active = chosen.from_batch(partial(chosen.loss, **settings), batch)
    loss.backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert 0 <= float(active) <= 1
    with pytest.raises(InputError, match="has no 'margni'"):
        objectives.resolve(name, {"margni": 1.0})


def test_configs_go_to_toml_and_back(tmp_path):
    config = TrainConfig(
        "glyphs", "triplet", similar_label=0, hyperparameters={"margin": 1, "swap": True}
    )
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "c.toml") == config


def test_a_config_is_written_as_it_always_was():
    """Byte by byte, so that runs of one setting are the same files; None is left out."""
    config = TrainConfig("a b.npz", "triplet", hyperparameters={"margin": 0.5, "swap": False})
    assert to_toml(config) == (
        'format = 1\ndata = "a b.npz"\nloss = "triplet"\nencoder = "auto"\nembedding_dim = 128\n'
        "augment = true\nsteps = 450\nidentities = 64\nitems = 4\nlearning_rate = 0.003\n"
        "weight_decay = 0.0001\ncalibration_share = 0.2\ntest_share = 0.2\nfar = 0.01\nseed = 0\n"
        'accelerator = "auto"\n\n[hyperparameters]\nmargin = 0.5\nswap = false\n'
    )


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4), (1, 28, 28), (3, 32, 32), (2, 9, 40)])
def test_encoders_give_embeddings_of_length_one(shape):
    embedder = build(TrainConfig("", "sup_con", embedding_dim=7), Reads(shape)).eval()
    x = torch.randn(3, *shape)
    torch.testing.assert_close(embedder(x).norm(dim=1), torch.ones(3))
    assert embedder(x).shape == (3, 7)


def test_the_letters_network_has_the_promised_size():
    size = sum(
        p.numel() for p in build(TrainConfig("", "sup_con"), Reads((1, 32, 32))).parameters()
    )
    assert 200_000 < size < 400_000


def test_input_is_standardised_and_constant_columns_are_left():
    x = torch.from_numpy(make_vectors()[0]) * 1000 + 5
    x[:, 3] = 12345.678
    embedder = Embedder(torch.nn.Identity(), Reads((8,)), 8)
    embedder.standardise(*Arrays(x).moments(torch.arange(len(x))))
    z = (x - embedder.mean) / embedder.deviation
    assert z.mean(0).abs().max() < 1e-2
    spread = z.std(0, correction=0)
    assert spread[3] < 1e-2
    torch.testing.assert_close(spread[[0, 1, 2, 4, 5, 6, 7]], torch.ones(7), rtol=1e-3, atol=0)


def test_dashes_are_explained_where_there_are_any():
    def found(n_identities: int) -> Comparison:
        generator = torch.Generator().manual_seed(0)
        similar = torch.arange(1500) < 600
        first = torch.randint(n_identities, (1500,), generator=generator)
        second = torch.where(similar, first, (first + 1) % n_identities)
        apart = torch.rand(1500, generator=generator) + ~similar
        identities, nothing = torch.stack([first, second], 1), torch.zeros(0)
        pairs = GivenPairs(identities, identities, similar, apart)
        sample = Sample(nothing, nothing, nothing, nothing)
        test = MeasuredPairs(
            pairs, pairs, None, "cosine", n_identities, 0, nothing, nothing, sample
        )
        return compare(test, Thresholds(0.9, 0.9, 0.01, "cosine"), None)

    def without_rare_rates(of: Comparison) -> Comparison:
        told = {far: tar for far, tar in of.learned.tar_at_far.items() if tar is not None}
        return replace(of, learned=replace(of.learned, tar_at_far=told))

    few, many = found(20), found(60)  # of 900 dissimilar pairs, too few for the rarest rates
    dashed = [(few, True), (many, True), (without_rare_rates(few), True)]
    for shown, any_dash in [*dashed, (without_rare_rates(many), False)]:
        assert any("-" in row for row in table(shown).rows) == any_dash
        assert (dashes(shown) != "") == any_dash


def test_a_users_encoder(nearfar, tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(
        "import torch\ndef make(shape, d):\n    return torch.nn.Linear(shape[0], d)\n"
    )
    x, y = make_vectors(n_identities=10, n_items=4)
    np.savez(tmp_path / "v.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)  # a module beside the data is found
    done = nearfar("train", "v.npz", "--out", "run", "--encoder", "my_own:make", "--steps", 2)
    assert done.status == 0, done.err
    assert nearfar("verify", "run", "v.npz:0", "v.npz:0").status == 0
