"""nearfar.keras inside compile and fit: labels, precision, XLA, and saved models."""

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from keras import ops  # noqa: E402
from keras_gradients import BACKEND  # noqa: E402

import nearfar.keras as nk  # noqa: E402

pytestmark = [
    # Keras converts torch's tensors in a way that NumPy is about to drop.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    *([pytest.mark.slow] if BACKEND == "tensorflow" else []),
]
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 6)).astype("float32")
LABELS = np.arange(40) // 4
BATCH = {
    "SupConLoss": nk.SupConLoss(chunk_size=7),
    "NTXentLoss": nk.NTXentLoss(),
    "BatchTripletLoss": nk.BatchTripletLoss(select="hard", normalize=True),
}
TOWERS = {
    "InfoNCELoss": nk.InfoNCELoss(symmetric=True),
    "CLIPLoss": nk.CLIPLoss(scale=10.0),
    "SigLIPLoss": nk.SigLIPLoss(scale=10.0, bias=-10.0),
}
TUPLES = {
    "ContrastiveLoss": (0, nk.ContrastiveLoss(0.8, similar_label=1)),
    "CosineLoss": (2, nk.CosineLoss(similar_label=0)),
    "TripletLoss": (3, nk.TripletLoss(swap=True)),
    "QuadrupletLoss": (4, nk.QuadrupletLoss(5.0, 4.0)),
}


@pytest.fixture(autouse=True)
def _policy():
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def encoder():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])


def several(places, loss):
    """A model of several inputs, whose rows belong together; 0: of two, which ends in distances."""
    tower = encoder()
    inputs = [keras.Input((6,)) for _ in range(places or 2)]
    rows = [tower(each) for each in inputs]
    end = ops.stack(rows, axis=1) if places else nk.Distance()(rows)
    model = keras.Model(inputs, end)
    model.compile(keras.optimizers.Adam(0.05), loss=loss, jit_compile=BACKEND != "torch")
    data = [X, X + 0.1, X[::-1], X[::-1] - 1][: places or 2]
    return model, data


def improves(model, *data, **settings):
    history = model.fit(*data, batch_size=16, epochs=6, shuffle=False, verbose=0, **settings)
    losses = history.history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_fit_by_labels_in_any_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = encoder()
    model.compile(
        keras.optimizers.Adam(0.05), loss=BATCH["SupConLoss"], jit_compile=BACKEND != "torch"
    )
    improves(model, X, LABELS)
    z = model.predict(X, verbose=0)
    value = model.evaluate(X, LABELS, batch_size=40, verbose=0)
    # In one program, XLA may keep more digits of an embedding than its dtype has.
    rel = 1e-5 if policy == "float32" else 1e-3
    assert value == pytest.approx(float(nk.sup_con_loss(z, LABELS)), rel=rel)


@pytest.mark.parametrize("name", ["NTXentLoss", "BatchTripletLoss"])
def test_fit_by_labels(name):
    model = encoder()
    model.compile(keras.optimizers.Adam(0.05), loss=BATCH[name], jit_compile=BACKEND != "torch")
    improves(model, X, LABELS, sample_weight=np.linspace(0, 1, 40))


@pytest.mark.parametrize("name", TOWERS)
def test_fit_two_towers_without_labels(name):
    model, data = several(2, TOWERS[name])
    improves(model, data)


@pytest.mark.parametrize("name", TUPLES)
def test_fit_pairs_triplets_and_quadruplets(name):
    places, loss = TUPLES[name]
    model, data = several(places, loss)
    labels = [np.arange(40) % 2] if places in (0, 2) else []
    improves(model, data, *labels)


def test_ids_stay_whole_in_fit():
    """Under a policy in which, as floats, all of them were one class."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = encoder()
    model.compile("sgd", loss=nk.SupConLoss(), jit_compile=BACKEND != "torch")
    close = 2**24 + np.arange(40)
    assert model.evaluate(X, close, batch_size=40, verbose=0) == 0
    assert model.evaluate(X, 2**24 + LABELS, batch_size=40, verbose=0) > 0


def test_float_ids_are_refused_in_fit():
    model = encoder()
    model.compile("sgd", loss=nk.SupConLoss())
    with pytest.raises(TypeError, match="labels must be class ids of an integer dtype"):
        model.fit(X, LABELS.astype("float32"), verbose=0)


def test_bool_labels_do_not_contradict_similar_label_in_fit():
    model, data = several(0, nk.ContrastiveLoss(similar_label=0))
    with pytest.raises(ValueError, match="y_true is bool, where True always means similar"):
        model.fit(data, LABELS > 3, verbose=0)


def test_bool_labels_in_fit_mean_what_numbers_mean():
    model, data = several(0, nk.ContrastiveLoss(similar_label=1))
    similar = LABELS > 3
    as_bool = model.evaluate(data, similar, verbose=0)
    assert as_bool == model.evaluate(data, similar.astype("float32"), verbose=0)
    assert as_bool != model.evaluate(data, ~similar, verbose=0)


def test_sample_weight_is_the_weight_of_an_anchor():
    weight = RANDOM.random(40).astype("float32")
    value = nk.SupConLoss()(LABELS, X, sample_weight=weight)
    assert float(value) == float(nk.sup_con_loss(X, LABELS, weight=weight))


ALL = {**BATCH, **TOWERS, **{name: loss for name, (_, loss) in TUPLES.items()}}


@pytest.mark.parametrize("name", ALL)
def test_losses_are_serialised(name):
    loss = ALL[name]
    saved = keras.losses.serialize(loss)
    assert saved["registered_name"] == f"nearfar>{name}"
    again = keras.losses.deserialize(saved)
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()


@pytest.mark.parametrize("places", [0, 3])
def test_a_model_is_saved_with_its_loss(places, tmp_path):
    name = {0: "ContrastiveLoss", 3: "TripletLoss"}[places]
    model, data = several(places, ALL[name])
    labels = [np.arange(40) % 2] if not places else []
    model.fit(data, *labels, verbose=0)
    before = model.evaluate(data, *labels, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.loss.get_config() == ALL[name].get_config()
    assert again.evaluate(data, *labels, verbose=0) == before


def test_what_a_layer_learns_is_saved_and_moves(tmp_path):
    image, text = keras.Input((6,)), keras.Input((6,))
    layer = nk.LossLayer("siglip", scale=10.0, bias=-10.0, learned=("scale", "bias"))
    model = keras.Model([image, text], layer([encoder()(image), encoder()(text)]))
    model.compile(keras.optimizers.Adam(0.05), jit_compile=BACKEND != "torch")
    improves(model, [X, X])
    log_scale, bias = (float(ops.stop_gradient(weight.value)) for weight in layer.weights)
    assert log_scale != pytest.approx(np.log(10), abs=0.01)
    assert bias != pytest.approx(-10, abs=0.01)
    rows = model.predict([X, X], verbose=0)
    expected = nk.siglip_loss(*rows, scale=np.exp(log_scale), bias=bias)
    value = model.evaluate([X, X], batch_size=40, verbose=0)
    assert value == pytest.approx(float(expected), rel=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate([X, X], batch_size=40, verbose=0) == value


def test_a_layer_takes_embeddings_and_labels():
    keras.config.set_dtype_policy("mixed_bfloat16")
    image, label = keras.Input((6,)), keras.Input((), dtype="int32")
    layer = nk.LossLayer("sup_con", temperature=0.2, learned=("temperature",))
    model = keras.Model([image, label], layer([encoder()(image), label]))
    model.compile(keras.optimizers.Adam(0.05), jit_compile=BACKEND != "torch")
    improves(model, [X, LABELS.astype("int32")])
    close = (2**24 + np.arange(40)).astype("int32")
    assert model.evaluate([X, close], batch_size=40, verbose=0) == 0


def test_the_scale_of_a_layer_stays_within_100():
    layer = nk.LossLayer("clip", scale=10.0, learned=("scale",))
    layer([X, X])
    (weight,) = layer.weights
    assert float(ops.exp(weight.constraint(ops.convert_to_tensor(9.0)))) == pytest.approx(100)


def test_a_layer_that_cannot_learn_is_refused():
    with pytest.raises(ValueError, match="scale is learned: pass scale=, where it begins"):
        nk.LossLayer("clip", learned=("scale",))
    with pytest.raises(ValueError, match="loss must be one of"):
        nk.LossLayer("contrastive")
    with pytest.raises(ValueError, match="learned must be one of"):
        nk.LossLayer("clip", scale=1.0, learned=("margin",))
    with pytest.raises(TypeError, match=r"learned must be a tuple of names, .* got 'scale'"):
        nk.LossLayer("clip", scale=1.0, learned="scale")


@pytest.mark.parametrize(
    ("name", "start"),
    [("scale", 1000.0), ("scale", -1.0), ("temperature", 0.001), ("temperature", "0.1")],
)
def test_a_learned_number_does_not_begin_where_it_may_not_go(name, start):
    loss = {"scale": "clip", "temperature": "sup_con"}[name]
    with pytest.raises(ValueError, match=f"a learned {name} must be a number, from 0.01 to 100"):
        nk.LossLayer(loss, learned=(name,), **{name: start})


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_a_learned_number_may_begin_at_its_limits(start):
    layer = nk.LossLayer("clip", scale=start, learned=("scale",))
    layer([X, X])
    (weight,) = layer.weights
    kept = weight.constraint(ops.stop_gradient(weight.value))
    assert float(ops.exp(kept)) == pytest.approx(start)


def test_a_layer_refuses_settings_that_its_loss_does_not_take():
    with pytest.raises(TypeError, match="clip: got an unexpected keyword argument 'scal'"):
        nk.LossLayer("clip", scale=1.0, scal=3.0)
    with pytest.raises(TypeError, match=r"clip: missing a required .*'scale'"):
        nk.LossLayer("clip")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ContrastiveLoss", {"margin": -1, "similar_label": 1}, "margin must be"),
        ("CosineLoss", {"margin": 2, "similar_label": 1}, "margin must be"),
        ("TripletLoss", {"margin": -1}, "margin must be"),
        ("TripletLoss", {"distance": "l2"}, "distance must be one of"),
        ("QuadrupletLoss", {"margin": -1}, "margin must be"),
        ("QuadrupletLoss", {"margin2": -1}, "margin2 must be"),
        ("QuadrupletLoss", {"distance": "l2"}, "distance must be one of"),
        ("SupConLoss", {"temperature": -1}, "temperature must be"),
        ("SupConLoss", {"chunk_size": 0}, "chunk_size must be"),
        ("NTXentLoss", {"temperature": 0}, "temperature must be"),
        ("BatchTripletLoss", {"select": "semihard"}, "select must be one of"),
        ("BatchTripletLoss", {"select": "hard", "margin": -1}, "margin must be"),
        ("BatchTripletLoss", {"select": "hard", "distance": "manhattan"}, "distance must be one"),
        ("InfoNCELoss", {"temperature": -1}, "temperature must be"),
        ("CLIPLoss", {"scale": 0}, "scale must be"),
        ("SigLIPLoss", {"scale": 0, "bias": 0}, "scale must be"),
    ],
)
def test_settings_are_refused_before_the_first_batch(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(nk, name)(**settings)
