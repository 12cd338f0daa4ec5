"""SiameseEmbedding: scikit-learn's own checks, and trainings written out by hand."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import nearfar
from nearfar.adapters.sklearn import SiameseEmbedding
from nearfar.registry import LOSSES

NAMES = [loss.name for loss in LOSSES if loss.takes("batch") or loss.takes("proxies")]
ON_LISTED_PAIRS = [
    "batch_contrastive", "batch_cosine", "sup_con", "nt_xent", "nca", "multi_similarity", "circle",
    "lifted_structure", "lifted_pair",
]  # fmt: skip


def blobs(n_classes=5, n_items=6, n_features=4, seed=0):
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(n_classes), n_items)
    x = random.normal(size=(n_classes, n_features))[y]
    return x + 0.5 * random.normal(size=x.shape), y


def linear(n_features, dim, seed=0):
    """A linear encoder with weights of its own, whose gradient is easily written out."""
    weight = np.random.default_rng(seed).normal(size=(dim, n_features))
    encoder = nn.Linear(n_features, dim, bias=False, dtype=torch.float64)
    with torch.no_grad():
        encoder.weight.copy_(torch.from_numpy(weight))
    return encoder


def sup_con(x, y, temperature):
    """The mean over anchors of the mean over positives of -log softmax, pair by pair."""
    u = x / x.norm(dim=1, keepdim=True)
    s = u @ u.T / temperature
    total = x.new_zeros(())
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        positives = [j for j in others if y[j] == y[i]]
        log_sum = torch.logsumexp(s[i, others], 0)
        total = total + sum(log_sum - s[i, j] for j in positives) / len(positives)
    return total / len(x)


def by_hand(weight, loss_of, *, steps, learning_rate, weight_decay):
    """AdamW with a learning rate that falls as a cosine, on full batches; weights and losses."""
    w = weight.clone().requires_grad_()
    first, second, losses = torch.zeros_like(w), torch.zeros_like(w), []
    for t in range(steps):
        loss = loss_of(w)
        (gradient,) = torch.autograd.grad(loss, w)
        rate = learning_rate * (1 + np.cos(np.pi * t / steps)) / 2
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        with torch.no_grad():
            w *= 1 - rate * weight_decay
            root = (second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
            w -= rate * first / (1 - 0.9 ** (t + 1)) / root
        losses.append(loss.item())
    return w.detach(), losses


@parametrize_with_checks(
    [
        SiameseEmbedding(),
        SiameseEmbedding("proxy_softmax", scale=16.0, normalize=False, epochs=2),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_scikit_learns_checks_with_none_left_out():
    """One of them runs only where SciPy is told before it is loaded."""
    code = (
        "from sklearn.utils.estimator_checks import check_estimator\n"
        "from nearfar.adapters.sklearn import SiameseEmbedding\n"
        "found = check_estimator(SiameseEmbedding())\n"
        "print(len(found), {one['status'] for one in found})"
    )
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    n, statuses = ran.stdout.split(maxsplit=1)
    assert int(n) > 40, ran.stderr
    assert statuses.strip() == "{'passed'}"


def test_training_is_that_written_out_by_hand():
    x, y = blobs()
    encoder, settings = linear(4, 3), {"learning_rate": 0.05, "weight_decay": 0.1}
    embedding = SiameseEmbedding(
        encoder=encoder, temperature=0.3, items_per_class=6, epochs=4, random_state=0, **settings
    ).fit(x, y)
    rows, before = torch.from_numpy(x), encoder.weight.detach()
    weight, losses = by_hand(before, lambda w: sup_con(rows @ w.T, y, 0.3), steps=4, **settings)
    np.testing.assert_allclose(embedding.loss_curve_, losses, rtol=1e-9)
    expected = x @ weight.numpy().T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding.transform(x), expected, rtol=1e-7)


def test_training_on_pairs_is_that_written_out_by_hand():
    """The contrastive loss of the listed pairs: a mean over similar, and one over dissimilar."""
    x, y = blobs()
    index = np.array([[0, 1], [6, 7], [0, 7], [1, 12], [13, 24], [0, 29]])
    similar = y[index[:, 0]] == y[index[:, 1]]
    encoder, settings = linear(4, 3), {"learning_rate": 0.05, "weight_decay": 0.1}
    embedding = SiameseEmbedding(
        "batch_contrastive", margin=1.5, encoder=encoder, epochs=4, random_state=0, **settings
    ).fit_pairs(x[index], similar)

    def contrastive(w):
        z = torch.from_numpy(x) @ w.T
        z = z / z.norm(dim=1, keepdim=True)
        d = (z[index[:, 0]] - z[index[:, 1]]).norm(dim=1)
        return d[similar].square().mean() + (1.5 - d[~similar]).clamp(min=0).square().mean()

    weight, losses = by_hand(encoder.weight.detach(), contrastive, steps=4, **settings)
    np.testing.assert_allclose(embedding.loss_curve_, losses, rtol=1e-9)
    expected = x @ weight.numpy().T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding.transform(x), expected, rtol=1e-7)


def test_batches_of_pairs_hold_each_pair_once_and_those_of_an_item_together():
    from nearfar.adapters.sklearn.training import OfPairs

    index = np.stack(np.triu_indices(12, 1), 1)
    similar = index[:, 0] // 3 == index[:, 1] // 3
    batches = OfPairs(index, similar, size=11, seed=0)
    seen = []
    for rows, labels, listed in batches.epoch(0):
        assert labels is None
        near, far = (rows[pairs].numpy() for pairs in listed["pairs"])
        assert (near[:, 0] // 3 == near[:, 1] // 3).all()
        assert (far[:, 0] // 3 != far[:, 1] // 3).all()
        both_ways = np.concatenate([near, far])
        seen += both_ways[both_ways[:, 0] < both_ways[:, 1]].tolist()
        if len(seen) == 11:  # the 11 pairs of one item
            assert len(set.intersection(*map(set, seen))) == 1
    assert sorted(seen) == index.tolist()
    again = [rows.tolist() for rows, _, _ in batches.epoch(1)]
    assert again != [rows.tolist() for rows, _, _ in batches.epoch(0)]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_of_a_batch_or_of_proxies_can_be_named(name):
    x, y = blobs()
    embedding = SiameseEmbedding(name, embedding_dim=3, epochs=2, random_state=0)
    z = embedding.fit_transform(x, y)
    assert z.shape == (30, 3)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1)


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_take_listed_pairs_train_on_pairs(name):
    x, y = blobs()
    index = np.random.default_rng(0).integers(30, size=(200, 2))
    pairs, similar = x[index], y[index[:, 0]] == y[index[:, 1]]
    embedding = SiameseEmbedding(name, embedding_dim=3, epochs=2, random_state=0)
    if name in ON_LISTED_PAIRS:
        assert embedding.fit_pairs(pairs, similar).transform(x).shape == (30, 3)
    else:
        with pytest.raises(ValueError, match=r"listed pairs|pairs have no classes"):
            embedding.fit_pairs(pairs, similar)


def test_embeddings_of_digits_tell_them_apart():
    x, y = load_digits(return_X_y=True)
    embedding = SiameseEmbedding(embedding_dim=8, random_state=0)
    model = make_pipeline(StandardScaler(), embedding, KNeighborsClassifier())
    assert model.fit(x[::2], y[::2].astype(str)).score(x[1::2], y[1::2].astype(str)) > 0.94


def test_classes_never_seen_are_told_apart():
    """The features that tell the classes apart are drowned by others that do not."""
    random = np.random.default_rng(0)
    who = np.repeat(np.arange(200), 8)
    signal = random.normal(size=(200, 8))[who] + 0.2 * random.normal(size=(1600, 8))
    x = np.hstack([signal, 3 * random.normal(size=(1600, 12))])
    new = who >= 100
    embedding = SiameseEmbedding(random_state=0).fit(x[~new], who[~new])
    auc = nearfar.evaluate.every_pair(embedding.transform(x[new]), who[new]).verification().auc
    assert nearfar.evaluate.every_pair(x[new], who[new]).verification().auc < 0.7
    assert auc > 0.9


def test_a_seed_decides_the_fit_and_the_callers_randomness_is_left_alone():
    x, y = blobs()
    dropping = nn.Sequential(linear(4, 16), nn.Dropout(0.5), linear(16, 3))
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for encoder in (None, dropping):
        embedding = SiameseEmbedding("proxy_nca", encoder=encoder, epochs=3, random_state=3)
        first, second = embedding.fit_transform(x, y), clone(embedding).fit_transform(x, y)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(embedding.transform(x), first)
        other = clone(embedding).set_params(random_state=4).fit_transform(x, y)
        assert not np.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_have_the_dtype_of_the_fit(dtype):
    x, y = blobs()
    embedding = SiameseEmbedding(epochs=2, random_state=0).fit(x.astype(dtype), y)
    assert embedding.transform(x).dtype == dtype
    wide = SiameseEmbedding(epochs=2, random_state=0).fit_transform(x, y)
    np.testing.assert_allclose(embedding.transform(x.astype(dtype)), wide, atol=1e-5)


def test_a_pickle_holds_the_network_on_the_cpu_and_embeds_alike():
    x, y = blobs()
    embedding = SiameseEmbedding("proxy_anchor", epochs=2, random_state=0).fit(x, y)
    again = pickle.loads(pickle.dumps(embedding))
    np.testing.assert_array_equal(again.transform(x), embedding.transform(x))
    assert {p.device.type for p in again.encoder_.parameters()} == {"cpu"}
    np.testing.assert_array_equal(again.fit(x, y).transform(x), embedding.transform(x))


def test_a_module_of_the_user_is_not_trained_but_a_copy_of_it():
    x, y = blobs()
    encoder, loss = linear(4, 3), nearfar.ProxySoftmaxLoss(5, 3, scale=8.0)
    before = [p.clone() for p in (*encoder.parameters(), *loss.parameters())]
    embedding = SiameseEmbedding(loss, encoder=encoder, epochs=2, random_state=0).fit(x, y)
    assert all(map(torch.equal, before, (*encoder.parameters(), *loss.parameters())))
    assert not torch.equal(embedding.encoder_[0].weight, encoder.weight)
    assert embedding.get_feature_names_out().tolist() == [f"siameseembedding{i}" for i in range(3)]
    assert clone(embedding).fit(x, y).loss_curve_ == embedding.loss_curve_


def test_a_loss_may_be_any_module_of_embeddings_and_class_ids():
    class Spread(nn.Module):
        def forward(self, x, labels):
            assert labels.unique().tolist() == [0, 1, 2, 3, 4]
            return x.square().sum()

    x, y = blobs()
    names = np.array(["a", "b", "c", "d", "e"])[y]
    embedding = SiameseEmbedding(Spread(), normalize=False, epochs=30, random_state=0)
    embedding.fit(x, names)
    assert embedding.loss_curve_[-1] < embedding.loss_curve_[0]
    assert not np.allclose(np.linalg.norm(embedding.transform(x), axis=1), 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_needs_no_gradient_mode_of_the_caller(mode):
    x, y = blobs()
    with mode():
        embedding = SiameseEmbedding(epochs=2, random_state=0).fit(x, y)
    np.testing.assert_array_equal(
        embedding.transform(x), SiameseEmbedding(epochs=2, random_state=0).fit_transform(x, y)
    )


def test_a_large_table_is_embedded_in_parts(monkeypatch):
    from nearfar.adapters.sklearn import embedding as module

    x, y = blobs()
    embedding = SiameseEmbedding(epochs=1, random_state=0).fit(x, y)
    whole, sizes = embedding.transform(x), []
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    embedding.encoder_.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    np.testing.assert_allclose(embedding.transform(x), whole)
    assert sizes == [7, 7, 7, 7, 2]


REFUSED = {
    "unknown loss": ({"loss": "contrast"}, ValueError, "loss must be a module or one of .*sup_con"),
    "loss of rows": ({"loss": "triplet"}, ValueError, "loss must be a module or one of"),
    "loss of towers": ({"loss": "clip"}, ValueError, "loss must be a module or one of"),
    "not its setting": ({"margin": 1.0}, TypeError, "SupConLoss takes temperature.*got margin"),
    "beside a module": (
        {"loss": nearfar.SupConLoss(), "temperature": 0.1}, ValueError, "leave temperature at None"
    ),
    "one class a batch": ({"classes_per_batch": 1}, ValueError, "classes_per_batch must be at"),
    "no items": ({"items_per_class": 0}, ValueError, "items_per_class must be an integer of at"),
    "one item": ({"items_per_class": 1}, ValueError, "items_per_class must be at least 2"),
    "no epochs": ({"epochs": 0}, ValueError, "epochs must be"),
    "no rate": ({"learning_rate": 0.0}, ValueError, "learning_rate must be"),
    "no width": ({"hidden": (0,)}, ValueError, "hidden must be"),
    "a width alone": ({"hidden": 128}, TypeError, "hidden must be a sequence of widths"),
    "no weights": ({"encoder": nn.Identity()}, ValueError, "encoder must have parameters to train"),
    "no weights to learn": (
        {"encoder": linear(4, 2).requires_grad_(False), "loss": "proxy_softmax", "scale": 8.0},
        ValueError,
        "Linear has none that require a gradient",
    ),
    "a loss of each row": (
        {"loss": nearfar.SupConLoss(reduction="none")},
        ValueError,
        r"loss must give one number .* got shape \(20,\)",
    ),
    "no dimension": ({"embedding_dim": 0}, ValueError, "embedding_dim must be"),
    "wrong encoder": (
        {"encoder": nn.Sequential(linear(4, 2), nn.Flatten(0))},
        ValueError,
        r"encoder must turn \(2, 4\) into",
    ),
    "divergence": (
        {"learning_rate": 1e200, "normalize": False, "loss": "batch_contrastive"},
        ValueError,
        "training diverged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(case):
    parameters, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        SiameseEmbedding(**parameters).fit(*blobs())


def test_labels_that_teach_nothing_are_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match="at least 2 classes"):
        SiameseEmbedding().fit(x, np.zeros(30))
    with pytest.raises(ValueError, match="a class with at least 2 items"):
        SiameseEmbedding().fit(x, np.arange(30))
    SiameseEmbedding("proxy_softmax", epochs=1).fit(x, np.arange(30))
    SiameseEmbedding("proxy_softmax", epochs=1, items_per_class=1).fit(x, np.arange(30) % 5)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        SiameseEmbedding().fit(x, x[:, 0])
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        SiameseEmbedding().fit(csr_array(x), y)


def test_pairs_that_teach_nothing_are_refused():
    x, _ = blobs()
    apart = x[np.arange(20).reshape(10, 2)]
    similar = np.arange(10) < 5
    with pytest.raises(ValueError, match=r"no item has both\. Use loss='batch_contrastive'"):
        SiameseEmbedding().fit_pairs(apart, similar)
    with pytest.raises(ValueError, match="no item has both"):
        SiameseEmbedding(nearfar.CircleLoss()).fit_pairs(apart, similar)
    SiameseEmbedding("batch_cosine", epochs=1).fit_pairs(apart, similar)
    shared = np.concatenate([apart, [[x[0], x[12]]]])  # an item with a pair of each kind
    with pytest.warns(UserWarning, match="only 2 of 11 pairs have an item with both") as found:
        SiameseEmbedding(epochs=1).fit_pairs(shared, [*similar, False])
    assert found[0].filename == __file__
    star = np.stack([np.broadcast_to(x[0], (10, 4)), x[1:11]], axis=1)
    SiameseEmbedding(epochs=1).fit_pairs(star, similar)  # each pair has the item with both
    with pytest.raises(ValueError, match="a batch would have one pair"):
        SiameseEmbedding(classes_per_batch=1, items_per_class=3).fit_pairs(star, similar)
    with pytest.raises(ValueError, match="all are of equal rows"):
        SiameseEmbedding().fit_pairs(apart[:, [0, 0]], similar)
    with pytest.raises(TypeError, match="similar_label"):
        SiameseEmbedding().fit_pairs(apart, similar.astype(int))
