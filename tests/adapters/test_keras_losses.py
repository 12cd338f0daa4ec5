"""The losses of nearfar.keras beside those of torch, on the backend that KERAS_BACKEND names."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import torch  # noqa: E402
from allocations import Allocations  # noqa: E402
from keras import ops  # noqa: E402
from keras_gradients import BACKEND, by_torch, derived  # noqa: E402

import nearfar as nf  # noqa: E402
import nearfar.keras as nk  # noqa: E402

pytestmark = [pytest.mark.slow] if BACKEND == "tensorflow" else []
LARGEST = np.iinfo(np.int32 if BACKEND == "jax" else np.int64).max


def data(n=50, d=7, seed=0):
    """Two matrices of embeddings that correspond, and labels; two rows are of no one's class."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d)).astype("float32")
    y = (x + random.normal(size=(n, d))).astype("float32")
    labels = random.integers(0, max(n // 4, 1), n)
    labels[:2] = -5, 10**6
    return x, y, labels


X, Y, LABELS = data()
WEIGHT = np.random.default_rng(1).random(len(X)).astype("float32")
MULTI = np.random.default_rng(2).random((len(X), 9)) < 0.2
NUMBER = partial(np.asarray, dtype="float32")


def labelled(name, labels=LABELS, **settings):
    """A loss by Keras and by torch, as functions of embeddings and of what is learned."""

    def here(x, **more):
        return getattr(nk, name)(x, labels, **settings, **more)

    def there(x, **more):
        more.pop("chunk_size", None)
        more = {k: torch.as_tensor(v) if k == "weight" else v for k, v in more.items()}
        return getattr(nf, name)(x, torch.from_numpy(labels), **settings, **more)

    return here, there


def towers(name, **settings):
    def here(x, y, **more):
        return getattr(nk, name)(x, y, **settings, **more)

    def there(x, y, **more):
        more.pop("chunk_size", None)
        more = {k: torch.as_tensor(v) if k == "weight" else v for k, v in more.items()}
        return getattr(nf, name)(x, y, **settings, **more)

    return here, there


# The loss, the data, and what is learned with its value.
CASES = {
    "sup_con": (labelled("sup_con_loss"), (X,), {"temperature": 0.2}),
    "sup_con multi-labels": (labelled("sup_con_loss", MULTI), (X,), {}),
    "sup_con inner products": (
        labelled("sup_con_loss", normalize=False, temperature=1.0),
        (X,),
        {},
    ),
    "nt_xent": (labelled("nt_xent_loss"), (X,), {"temperature": 0.2}),
    "nt_xent multi-labels": (labelled("nt_xent_loss", MULTI), (X,), {}),
    "hard": (labelled("batch_triplet_loss", select="hard"), (X,), {}),
    "hard of unit rows": (
        labelled("batch_triplet_loss", select="hard", normalize=True, margin=0.2),
        (X,),
        {},
    ),
    "hard squared": (
        labelled("batch_triplet_loss", select="hard", distance="sqeuclidean"),
        (X,),
        {},
    ),
    "easy_positive": (
        labelled("batch_triplet_loss", select="easy_positive", distance="cosine", smooth=True),
        (X,),
        {},
    ),
    "info_nce": (towers("info_nce_loss"), (X, Y), {"temperature": 0.2}),
    "info_nce symmetric": (towers("info_nce_loss", symmetric=True), (X, Y), {}),
    "clip": (towers("clip_loss"), (X, Y), {"scale": 14.0}),
    "siglip": (towers("siglip_loss"), (X, Y), {"scale": 10.0, "bias": -5.0}),
}
each_case = pytest.mark.parametrize("case", CASES)
ONE_OF_EACH = ["sup_con", "nt_xent", "hard", "info_nce symmetric", "clip", "siglip"]
each_loss = pytest.mark.parametrize("case", ONE_OF_EACH)


def compare(case, given=None, *, compiled=False, rtol=1e-5, **settings):
    """Values and gradients, those of learned numbers too."""
    (here, there), default, learned = CASES[case]
    given = default if given is None else given
    learned = {k: v for k, v in learned.items() if k not in settings}

    def of(f):
        def run(*leaves):
            rows, numbers = leaves[: len(given)], leaves[len(given) :]
            return f(*rows, **settings, **dict(zip(learned, numbers, strict=True)))

        return run

    leaves = (*given, *map(NUMBER, learned.values()))
    value, gradients = derived(of(here), *leaves, compiled=compiled)
    expected, wanted = by_torch(of(there), *leaves)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-5 * max(1.0, np.abs(want).max()))
    return value, gradients


@each_case
def test_values_and_gradients_are_those_of_torch_when_compiled(case):
    value, gradients = compare(case, compiled=True, chunk_size=16)  # which does not divide 50
    assert value > 0
    assert all(np.abs(each).max() > 0 for each in gradients)


@each_loss
@pytest.mark.parametrize("chunk_size", [25, 1000])
def test_values_and_gradients_are_those_of_torch_when_not_compiled(case, chunk_size):
    compare(case, chunk_size=chunk_size)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_and_reductions_are_those_of_torch(case, reduction):
    compare(case, compiled=True, weight=WEIGHT, reduction=reduction, chunk_size=20)


def weigh(case):
    """Settings at which a softmax of few digits overflows."""
    names = CASES[case][2]
    extreme = {"temperature": 0.001, "scale": 1000.0}
    return {name: extreme[name] for name in names if name in extreme} or {"temperature": 0.001}


@pytest.mark.parametrize("case", ["sup_con", "nt_xent", "info_nce", "clip", "siglip"])
def test_a_temperature_of_a_thousandth_is_exact(case):
    # Rounding of a cosine is multiplied by 1000 in the exponent.
    compare(case, compiled=True, rtol=1e-3, **weigh(case))


@pytest.mark.parametrize("length", [1e-22, 1e19, 1e37])
@pytest.mark.parametrize("select", ["hard", "easy_positive"])
def test_triplets_are_ranked_though_the_squares_of_rows_are_no_numbers(select, length):
    x = np.float32(length) * X
    here, there = labelled("batch_triplet_loss", select=select, margin=0.0, reduction="none")
    value, (gradient,) = derived(here, x, compiled=True)
    expected, (wanted,) = by_torch(there, x.astype("float64"))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * expected.max())
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)


ROWS = {
    "zeros": np.zeros((6, 4), "float32"),
    "identical": np.ones((6, 4), "float32"),
    "large": 1e9 * data(6, 4)[0],
    "small": 1e-9 * data(6, 4)[0],
    "one": np.ones((1, 4), "float32"),
    "two": data(2, 4)[0],
    "a zero among others": np.concatenate([np.zeros((1, 4), "float32"), data(5, 4)[0]]),
}
NAMES = {"sup_con": {}, "nt_xent": {}, "batch_triplet": {"select": "hard"}}
LABELLED = pytest.mark.parametrize("name", NAMES)
PAIRED = {"info_nce": {}, "clip": {"scale": 10.0}, "siglip": {"scale": 10.0, "bias": -5.0}}


@LABELLED
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["one class", "no positive", "two classes"])
def test_the_edges_of_labelled_losses(name, rows, kind):
    x = ROWS[rows]
    labels = {"one class": np.zeros, "no positive": np.arange, "two classes": np.arange}[kind](
        len(x), dtype=np.int64
    ) // (3 if kind == "two classes" else 1)
    here, there = labelled(f"{name}_loss", labels, **NAMES[name])
    (value, (gradient,)), (expected, (wanted,)) = derived(here, x), by_torch(there, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(gradient).all()
    if rows not in ("identical", "zeros"):  # where which of equal rows is nearest is a choice
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    if kind == "no positive":
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("rows", ROWS)
def test_the_edges_of_two_towers(name, rows):
    here, there = towers(f"{name}_loss", **PAIRED[name])
    given = ROWS[rows], ROWS[rows][::-1].copy()
    (value, gradients), (expected, wanted) = derived(here, *given), by_torch(there, *given)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@each_loss
def test_no_rows_have_no_loss(case):
    x = np.zeros((0, 7), "float32")
    (here, _), given, learned = CASES[case]
    if len(given) == 1:
        here = labelled(here_name(case), LABELS[:0], **NAMES[here_name(case)[:-5]])[0]
    value, gradients = derived(lambda *rows: here(*rows, **learned), *[x] * len(given))
    assert value == 0
    assert gradients[0].shape == (0, 7)


def here_name(case):
    return {"sup_con": "sup_con_loss", "nt_xent": "nt_xent_loss", "hard": "batch_triplet_loss"}[
        case
    ]


@each_loss
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_makes_every_loss_nan(case, bad):
    (here, _), given, learned = CASES[case]
    spoilt = given[-1].copy()
    spoilt[0, 0] = bad  # no anchor has it as a positive, and anchor 1 has none at all

    def losses(*rows):
        return here(*rows, **learned, reduction="none")

    value, _ = derived(losses, *given[:-1], spoilt, compiled=True)
    assert np.isnan(value).all()


@each_loss
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_computed_in_float32(case, dtype):
    (here, _), given, learned = CASES[case]
    low = [ops.cast(ops.convert_to_tensor(x), dtype) for x in given]
    value = here(*low, **learned)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    exact = here(*[ops.cast(x, "float32") for x in low], **learned)
    assert float(value) == float(exact)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 unless it is told to")
@each_loss
def test_float64_stays_float64(case):
    (here, there), given, learned = CASES[case]
    wide = [x.astype("float64") for x in given]
    value, gradients = derived(partial(here, **learned), *wide)
    expected, wanted = by_torch(partial(there, **learned), *wide)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


# Pairs, triplets, quadruplets.
SIMILAR = np.arange(len(X)) % 3 == 0
STACKS = np.random.default_rng(3).normal(size=(40, 4, 5)).astype("float32")
STACKS[0] = 0  # equal rows, without a direction
STACKS[1, 1] = STACKS[1, 0]


@pytest.mark.parametrize(
    "labels", [SIMILAR, SIMILAR.astype(int), WEIGHT], ids=["bool", "0/1", "degree"]
)
@pytest.mark.parametrize("similar_label", [0, 1])
def test_contrastive_loss_of_distances(labels, similar_label):
    how = {} if labels.dtype == bool else {"similar_label": similar_label}
    distance = np.abs(X[:, 0])
    distance[0] = 0
    value, (gradient,) = derived(lambda d: nk.contrastive_loss(labels, d, 0.7, **how), distance)
    expected, (wanted,) = by_torch(
        lambda d: nf.contrastive_loss_from_distance(
            d, torch.from_numpy(labels), margin=0.7, reduction="none", **how
        ),
        distance,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_contrastive_loss_of_columns_does_not_compare_all_with_all():
    column = nk.contrastive_loss(SIMILAR[:, None], np.abs(X[:, :1]))
    assert tuple(column.shape) == (len(X),)
    np.testing.assert_array_equal(column, nk.contrastive_loss(SIMILAR, np.abs(X[:, 0])))


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "manhattan"])
@pytest.mark.parametrize("compiled", [False, True])
def test_triplets_and_quadruplets(distance, compiled):
    for places, here, there in [
        (3, partial(nk.triplet_loss, None), nf.triplet_loss),
        (3, partial(nk.triplet_loss, None, smooth=True), partial(nf.triplet_loss, smooth=True)),
        (
            3,
            partial(nk.triplet_loss, None, normalize=True),
            partial(nf.triplet_loss, normalize=True),
        ),
        (3, partial(nk.triplet_loss, None, swap=True), partial(nf.triplet_loss, swap=True)),
        (4, partial(nk.quadruplet_loss, None), nf.quadruplet_loss),
    ]:
        given = STACKS[:, :places]
        value, (gradient,) = derived(partial(here, distance=distance), given, compiled=compiled)

        def aligned(rows, there=there):
            return there(*rows.unbind(1), distance=distance, reduction="none")

        expected, (wanted,) = by_torch(aligned, given)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        ties = slice(2, None)  # the first two have equal distances, of which either is the smaller
        np.testing.assert_allclose(gradient[ties], wanted[ties], rtol=1e-4, atol=1e-5)
        assert np.isfinite(gradient).all()


def test_cosine_loss():
    given, similar = STACKS[:, :2], np.arange(40) % 2 == 0
    value, (gradient,) = derived(lambda rows: nk.cosine_loss(similar, rows, 0.1), given)
    expected, (wanted,) = by_torch(
        lambda rows: nf.cosine_loss(
            *rows.unbind(1), torch.from_numpy(similar), margin=0.1, reduction="none"
        ),
        given,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


# Labels.
def refusal(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return type(caught.value), str(caught.value).replace("torch.", "")


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        ([0, 1], {}),
        ([0.0, 1.0], {}),
        ([0, 1], {"similar_label": 2}),
        ([True, False], {"similar_label": 0}),
        (["same", "other"], {"similar_label": 1}),
    ],
    ids=["integers", "floats", "neither", "bool", "text"],
)
def test_labels_are_refused_in_the_words_of_torch(labels, how):
    labels = np.asarray(labels)
    kind, said = refusal(lambda: nk.contrastive_loss(labels, [0.5, 0.5], **how))
    expected, words = refusal(lambda: nf.contrastive_loss_from_distance([0.5, 0.5], labels, **how))
    assert kind is expected
    assert said == re.sub(r"\by\b", "y_true", words)


def test_labels_beyond_0_and_1_are_refused():
    with pytest.raises(ValueError, match=r"y_true\[1\] is -1 \(for -1 and 1 pass y_true > 0\)"):
        nk.contrastive_loss(np.array([1, -1]), np.array([0.5, 0.5]), similar_label=1)


def test_similarities_in_place_of_distances_are_refused():
    with pytest.raises(ValueError, match="y_pred must hold distances, 0 or more"):
        nk.contrastive_loss(np.array([True, False]), np.array([0.5, -0.5]))


@pytest.mark.parametrize("first", [2**24, LARGEST - 1, -LARGEST])
def test_ids_that_floats_would_merge_stay_apart(first):
    ids = first + np.arange(2)
    x = X[:4]
    loss = partial(nk.sup_con_loss, x)
    assert float(loss(np.repeat(ids, 2))) == float(loss(np.array([0, 0, 1, 1])))
    assert float(loss(np.append(ids, [5, 6]))) == 0  # no two are equal


@pytest.mark.skipif(BACKEND != "jax", reason="int64 holds them")
def test_ids_that_jax_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="labels holds ids beyond int32"):
        nk.sup_con_loss(X[:2], np.array([0, 2**32]))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "int64"])
def test_ids_of_any_integer_dtype(dtype):
    labels = np.array([1, 2, 1, 100], dtype)
    expected = nk.sup_con_loss(X[:4], labels.tolist())
    assert float(nk.sup_con_loss(X[:4], labels)) == float(expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1.0]), "labels must be class ids of an integer dtype, got float64"),
        (np.array([True, False]), "or bool multi-labels of shape"),
        (np.array([0, 1, 2]), "labels must have one entry per row: got 3 labels for 2 rows"),
        (None, "labels must be class ids, one per row; got None"),
        (np.zeros((2, 3), int), r"labels must have shape \(n,\) or \(n, 1\), got \(2, 3\)"),
    ],
    ids=["floats", "bool", "too many", "none", "matrix"],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nk.sup_con_loss(X[:2], labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nk.sup_con_loss(X[0], [1]), r"x must have shape \(n, d\)"),
        (lambda: nk.sup_con_loss(X.astype(int), LABELS), "x must hold floating point numbers"),
        (lambda: nk.sup_con_loss(X, LABELS, temperature=0), "temperature must be a number above 0"),
        (lambda: nk.sup_con_loss(X, LABELS, chunk_size=0), "chunk_size must be an integer above 0"),
        (lambda: nk.sup_con_loss(X, LABELS, reduction="all"), "reduction must be one of 'mean'"),
        (lambda: nk.clip_loss(X, Y[:3], scale=1.0), "y must have the shape of x"),
        (lambda: nk.batch_triplet_loss(X, LABELS, select="all"), "select must be one of 'hard'"),
        (lambda: nk.batch_triplet_loss(X, LABELS, select="hard", margin=-1), "margin must be"),
        (lambda: nk.triplet_loss(None, X), r"y_pred must have shape \(n, 3, d\)"),
        (lambda: nk.ContrastiveLoss(similar_label=True), "similar_label must be 0 or 1"),
    ],
    ids=range(10),
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# Memory.
MEMORY = {
    "sup_con": lambda x, labels: nk.sup_con_loss(x, labels),
    "nt_xent": lambda x, labels: nk.nt_xent_loss(x, labels),
    "hard": lambda x, labels: nk.batch_triplet_loss(x, labels, select="hard"),
    "clip": lambda x, labels: nk.clip_loss(x, 2 * x, scale=10.0),
    "siglip": lambda x, labels: nk.siglip_loss(x, 2 * x, scale=10.0, bias=-10.0),
}


def peak(loss, n):
    """The most bytes that live at once, for a loss and its gradient."""
    x = np.random.default_rng(0).normal(size=(n, 8)).astype("float32")
    labels = np.arange(n, dtype="int32") // 4
    if BACKEND == "jax":
        import jax

        compiled = jax.jit(jax.grad(loss)).lower(x, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    if BACKEND == "torch":
        leaf, ids = torch.tensor(x, requires_grad=True), torch.from_numpy(labels)
        with Allocations() as seen:
            loss(leaf, ids).backward()
        return seen.peak
    return largest_tensor(loss, x, labels)


def largest_tensor(loss, x, labels):
    """The bytes of the largest tensor in TensorFlow's graph of a loss and its gradient."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x, labels)
        return tape.gradient(value, x)

    graph = gradient.get_concrete_function(tf.constant(x)).graph
    graphs = [graph, *(f.graph for f in functions_of(graph))]
    tensors = [out for each in graphs for op in each.get_operations() for out in op.outputs]
    shapes = [out.shape.as_list() for out in tensors if out.shape.rank is not None]
    # A dimension that is not known is that of a chunk.
    return 4 * max(int(np.prod([side or 256 for side in shape])) for shape in shapes)


def functions_of(graph):
    return [graph._get_function(name) for name in graph._functions]


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_linear_in_the_batch(name):
    n = 4096
    half, whole = peak(MEMORY[name], n // 2), peak(MEMORY[name], n)
    assert 0 < whole < 2.2 * half
    assert whole < n * n * 4 / 2  # half of one matrix of all pairs


def test_jax_and_tensorflow_need_no_torch():
    """On the torch backend it is Keras that imports it."""
    code = "import sys, nearfar.keras; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == str(BACKEND == "torch")
