"""Retrieval, exact search and approximate search against sorting, scikit-learn and torchmetrics."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from allocations import Allocations
from conftest import near_duplicates
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_oracle import distances, figures, ranked, ranked_without
from sklearn.metrics import ndcg_score
from torchmetrics.retrieval import (
    RetrievalHitRate,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalRPrecision,
)

from nearfar import Reference, memory_budget
from nearfar.engine.budget import tile_shape
from nearfar.evaluate import approximate_nearest, nearest, retrieval, retrieval_of
from nearfar.mine import Found

K = (1, 3, 7)


def draw(n=40, m=None, seed=0, classes=6, whole=False, multi=False):
    """Rows and labels; whole numbers give many ties that are exact in any arithmetic."""
    random = np.random.default_rng(seed)

    def rows(size):
        x = random.integers(-2, 3, (size, 3)) if whole else random.normal(size=(size, 3))
        labels = random.integers(0, classes, size)
        return x.astype(np.float64), random.random((size, classes)) < 0.2 if multi else labels

    return rows(n) if m is None else (*rows(n), *rows(m))


def similar(labels, others):
    return (
        (labels[:, None] & others[None]).any(2) if labels.ndim == 2 else labels[:, None] == others
    )


def agree(found, expected, k=K):
    whole = ("r_precision", "map_at_r", "mrr")
    for name in whole:
        assert getattr(found.overall, name) == pytest.approx(expected[name], rel=1e-12)
    for name in ("hit_rate", "recall", "precision", "ndcg"):
        at_k = getattr(found.overall, name)
        assert at_k == pytest.approx({size: expected[name, size] for size in k}, rel=1e-12)


DISTANCES = ["euclidean", "sqeuclidean", "cosine", "snr", "manhattan", 3, np.inf]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("tile", [(512, 1024), (7, 5), (3, 64)])
def test_figures_within_a_set_equal_sorting_everything(distance, multi, tile):
    x, labels = draw(multi=multi)
    with tile_shape(*tile):
        found = retrieval(x, labels, k=K, distance=distance)
    order = ranked(distances(x, x, distance), range(len(x)))
    agree(found, figures(similar(labels, labels), order, K))


@pytest.mark.parametrize("tile", [(512, 1024), (4, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_lower_index_at_any_tile(tile, seed):
    x, labels, reference, others = draw(25, 60, seed=seed, whole=True)
    with tile_shape(*tile):
        found = retrieval(
            x, labels, reference=Reference(reference, others), k=K, distance="euclidean"
        )
        near = nearest(x, k=60, distance="euclidean", reference=reference).indices
    order = ranked(distances(x, reference, "euclidean"), [-1] * len(x))
    assert near.tolist() == order
    agree(found, figures(similar(labels, others), order, K))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 14), st.integers(0, 10**6), st.integers(1, 5))
def test_a_row_itself_is_left_out_only_where_it_is_declared(n, m, seed, width):
    x, labels, reference, others = draw(n, m, seed=seed, classes=3, whole=True)
    own = np.random.default_rng(seed).integers(-1, m, n)
    positive = similar(labels, others)
    positive[np.arange(n)[own >= 0], own[own >= 0]] = False
    against = Reference(reference, others, own)
    if not positive.any():
        with pytest.raises(ValueError, match="nothing to find"):
            retrieval(x, labels, reference=against)
        return
    with tile_shape(3, width):
        found = retrieval(x, labels, reference=against, k=K, distance="sqeuclidean")
    agree(found, figures(positive, ranked(distances(x, reference, "sqeuclidean"), own), K))
    assert found.n_queries + found.n_left_out == n


@pytest.mark.parametrize("apart", [1e-4, 1e-6])
def test_the_nearest_by_cosine_of_near_duplicates(apart):
    for seed in range(50):
        x = near_duplicates(seed, apart)
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        true = (unit[:, None] - unit).square().sum(2).fill_diagonal_(torch.inf)
        found = nearest(x, k=1, distance="cosine").indices
        assert torch.equal(true.gather(1, found)[:7], true.amin(1, keepdim=True)[:7]), seed


@pytest.mark.parametrize("search", [nearest, approximate_nearest])
def test_a_row_without_direction_is_at_cosine_distance_1(search):
    x = torch.tensor([[1.0, 0], [0, 0], [0.6, 0.8], [0, 0], [-1, 0]])
    found = search(x, k=4, distance="cosine")
    assert found.indices[0].tolist()[0] == 2
    assert found.indices[0].tolist()[3] == 4  # opposite: farther than who has no direction
    torch.testing.assert_close(found.distances[1], torch.ones(4))
    against = search(x[:2], k=3, distance="cosine", reference=x[1:4])
    torch.testing.assert_close(against.distances[1], torch.ones(3))
    torch.testing.assert_close(against.distances[0], torch.tensor([0.4, 1, 1]))


def test_equal_values_are_not_assumed_to_be_the_same_item():
    x, labels = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    with pytest.warns(UserWarning, match="find themselves"):
        found = retrieval(x, labels, reference=Reference(x, labels), k=(1,), distance="euclidean")
    assert found.overall.hit_rate == {1: 0.5}  # all tied: row 0 is nearest to all
    # Who names himself is not warned: the others are at distance 0 too.
    retrieval(x, labels, reference=Reference(x, labels, own=np.arange(4)), k=(1,))
    found = retrieval(x, labels, k=(1,), distance="euclidean")
    assert found.overall.hit_rate == {1: 0.25}  # row 0 finds row 1, the others find row 0
    assert found.n_references == 3


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "snr", 3])
@pytest.mark.parametrize("whole", [False, True])
def test_queries_that_find_themselves_give_a_warning(distance, whole):
    """300 random rows of 30 classes: each row is its own nearest neighbour."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 32, generator=generator), torch.arange(300) % 30
    queries = slice(None) if whole else slice(0, 40)
    for reference in (x, x.clone(), x.double(), 3 * x if distance == "cosine" else x.numpy()):
        search = partial(retrieval, x[queries], labels[queries], k=(1,), distance=distance)
        with pytest.warns(UserWarning, match=r"labels, own\), torch\.arange\(len\(x\)\)"):
            found = search(reference=Reference(reference, labels))
        assert found.overall.hit_rate == {1: 1.0}
        own = torch.arange(300)[queries]
        true = search(reference=Reference(reference, labels, own))
        assert true.overall.hit_rate[1] < 0.2
        near = nearest(x[queries], k=3, reference=reference, distance=distance)
        if reference is x:
            with pytest.warns(UserWarning, match="reference_self="):
                retrieval_of(near, labels[queries], reference_labels=labels, k=(1,))


def test_a_reference_that_holds_some_queries_gives_no_warning():
    x, labels, reference, others = draw(20, 30)
    reference[:19] = x[:19]  # `filterwarnings = error` would tell
    retrieval(x, labels, reference=Reference(reference, others), k=(1,))
    with pytest.raises(ValueError, match="nothing to find"):
        retrieval(x, labels, reference=Reference(reference[:0], others[:0]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 12),
    st.sampled_from([None, 1, 5, 14]),
    st.integers(0, 4),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_what_is_excluded_is_neither_found_nor_relevant(n, m, e, seed, multi, declared):
    random = np.random.default_rng(seed)
    x, labels, *others = draw(n, m, seed=seed, classes=3, whole=True, multi=multi)
    reference, columns = others or (x, labels)
    exclude = random.integers(-1, len(reference), (n, e))  # some of them twice
    own, against = np.arange(n) if m is None else np.full(n, -1), {}
    if m is not None:
        own = random.integers(-1, m, n) if declared else np.full(n, -1)
        against = {"reference": Reference(reference, columns, own)}
    hidden = [{int(mine), *row} for mine, row in zip(own, exclude.tolist(), strict=True)]
    positive = similar(labels, columns)
    for i, row in enumerate(hidden):
        positive[i, [j for j in row if j >= 0]] = False
    search = {"distance": "euclidean", "exclude": exclude}
    if not positive.any():
        with pytest.raises(ValueError, match=r"nothing to find.*exclude"):
            retrieval(x, labels, **search, **against)
        return
    with tile_shape(3, 2):
        found = retrieval(x, labels, k=K, **search, **against)
        sides = {"reference": reference, "reference_self": own} if against else {}
        near = nearest(x, k=len(reference), **search, **sides)
    order = ranked_without(distances(x, reference, "euclidean"), hidden)
    agree(found, figures(positive, order, K))
    assert [[j for j in row if j >= 0] for row in near.indices.tolist()] == order
    sides = {"reference_labels": columns, "reference_self": own} if against else {}
    k = tuple(size for size in K if size <= len(reference))
    of = retrieval_of(near, labels, k=k, exclude=exclude, **sides)
    agree(of, figures(positive, order, k), k)


def test_images_of_one_camera_are_excluded():
    """The nearest is one person by one camera; the match that counts is by the other one."""
    x = [[0.0], [0.1], [0.3], [5.0], [5.1], [5.4]]
    person, camera = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 0, 0, 1])
    assert retrieval(x, person, k=(1,), distance="euclidean").overall.hit_rate[1] == 4 / 6
    junk = (person[:, None] == person) & (camera[:, None] == camera)
    exclude = torch.nn.utils.rnn.pad_sequence(
        [row.nonzero()[:, 0] for row in junk], batch_first=True, padding_value=-1
    )
    found = retrieval(x, person, k=(1,), distance="euclidean", exclude=exclude)
    assert found.overall.hit_rate[1] == 0.0
    # Neighbours found by a search that does not know of it: an excluded one is not relevant.
    unaware = nearest(x, k=3, distance="euclidean")
    assert retrieval_of(unaware, person, k=(1,)).overall.hit_rate[1] == 4 / 6
    assert retrieval_of(unaware, person, k=(1,), exclude=exclude).overall.hit_rate[1] == 0.0


def test_approximate_search_finds_nothing_excluded():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    exclude = nearest(x, k=6).indices
    found = approximate_nearest(x, k=5, exclude=exclude)
    assert not (found.indices[:, :, None] == exclude[:, None, :]).any()
    exact = nearest(x, k=5, exclude=exclude).indices
    assert (found.indices[:, :, None] == exact[:, None, :]).any(2).float().mean() > 0.9


def test_figures_equal_torchmetrics_and_scikit_learn():
    x, labels, reference, others = draw(30, 50)
    found = retrieval(x, labels, reference=Reference(reference, others), k=K).overall
    closeness = torch.from_numpy(1 - distances(x, reference, "cosine"))
    assert (closeness < 0).any()  # negative similarities are ordinary values
    target = torch.from_numpy(similar(labels, others))
    index = torch.arange(30)[:, None].expand(30, 50)

    def theirs(metric):
        # torchmetrics wants scores it can rank; a shift keeps their order.
        return float(metric(closeness.flatten(), target.flatten(), indexes=index.flatten()))

    some = {"empty_target_action": "skip"}
    for k in K:
        assert found.hit_rate[k] == pytest.approx(theirs(RetrievalHitRate(top_k=k, **some)))
        assert found.recall[k] == pytest.approx(theirs(RetrievalRecall(top_k=k, **some)))
        assert found.precision[k] == pytest.approx(theirs(RetrievalPrecision(top_k=k, **some)))
        assert found.ndcg[k] == pytest.approx(theirs(RetrievalNormalizedDCG(top_k=k, **some)))
        used = target.any(1).numpy()
        assert found.ndcg[k] == pytest.approx(ndcg_score(target[used], closeness[used], k=k))
    assert found.r_precision == pytest.approx(theirs(RetrievalRPrecision(**some)))
    assert found.mrr == pytest.approx(theirs(RetrievalMRR(**some)))


def test_figures_by_hand():
    # The only positive of row 0 is third; those of row 1 are first and third.
    reference, others = [[1.0], [2.0], [3.0], [9.0]], [1, 1, 0, 2]
    found = retrieval(
        [[0.0], [0.0]],
        [0, 1],
        reference=Reference(reference, [1, 2, 0, 1]),
        k=(1, 3),
        distance="euclidean",
    )
    first, second = found.per_class[0], found.per_class[1]
    assert (first.mrr, first.map_at_r, first.ndcg[3]) == (1 / 3, 0.0, 0.5)
    assert (second.mrr, second.r_precision, second.map_at_r) == (1.0, 0.5, 0.5)
    assert (second.precision[3], second.recall[3]) == (pytest.approx(1 / 3), 0.5)
    assert found.overall.mrr == pytest.approx(2 / 3)
    assert len(others) == found.n_references


def test_the_first_relevant_reference_counts_however_far_down():
    m = 500
    own_class = torch.where(torch.arange(m) == 431, 7, 1)
    found = retrieval(
        [[0.0]],
        [7],
        reference=Reference(1 + torch.arange(m)[:, None].float(), own_class),
        k=(1,),
        distance="euclidean",
    )
    assert found.overall.mrr == pytest.approx(1 / 432)


def test_class_ids_are_never_floats():
    big = 2**60
    found = retrieval(
        [[0.0], [0.1]],
        [big, big + 1],
        reference=Reference([[0.01], [0.11]], [big + 1, big]),
        k=(1,),
        distance="euclidean",
    )
    assert found.overall.hit_rate == {1: 0.0}
    assert set(found.per_class) == {big, big + 1}


def test_classes_add_up_to_the_whole_and_go_to_json():
    x, labels = draw(60)
    found = retrieval(x, labels, k=K)
    sizes = np.array([f.n for f in found.per_class.values()])
    assert sizes.sum() == found.n_queries
    maps = np.array([f.map_at_r for f in found.per_class.values()])
    assert found.overall.map_at_r == pytest.approx((sizes * maps).sum() / sizes.sum())
    assert "NaN" not in json.dumps(found.as_dict(), allow_nan=False)
    assert "MAP@R" in str(found)
    assert len(found.worst_classes(3).rows) == 3


def test_neighbours_found_elsewhere_give_the_same_figures_as_far_as_they_go():
    x, labels = draw(50)
    exact = retrieval(x, labels, k=K)
    figures = retrieval_of(nearest(x, k=49), labels, k=K)
    assert figures.as_dict() == exact.as_dict()
    few = retrieval_of(nearest(x, k=7), labels, k=K)
    assert few.overall.ndcg == exact.overall.ndcg
    assert few.overall.map_at_r is None
    assert few.overall.mrr <= exact.overall.mrr


def test_a_row_found_by_itself_elsewhere_is_not_relevant():
    found = Found(torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 2))
    assert retrieval_of(found, [5, 5], k=(1, 2)).overall.hit_rate == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_approximate_search_finds_nearly_all_and_never_itself(distance):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    exact = nearest(x, k=5, distance=distance)
    found = approximate_nearest(x, k=5, distance=distance)
    shared = (exact.indices[:, :, None] == found.indices[:, None, :]).any(2).float().mean()
    assert shared > 0.9
    assert (found.indices != torch.arange(2000)[:, None]).all()
    same = exact.indices == found.indices
    torch.testing.assert_close(found.distances[same], exact.distances[same], rtol=1e-3, atol=1e-5)
    few = approximate_nearest(x[:3], k=5, distance=distance)
    assert (few.indices[:, 2:] == -1).all()
    assert few.distances[:, 2:].isinf().all()


@pytest.mark.parametrize("distance", ["snr", "manhattan", 3])
def test_by_other_distances_the_search_is_exact_or_refused(distance):
    x, labels, reference, others = draw(25, 30)
    with tile_shape(4, 7):
        near = nearest(x, k=30, distance=distance, reference=reference)
    d = distances(x, reference, distance)
    order = ranked(d, [-1] * len(x))
    assert near.indices.tolist() == order
    np.testing.assert_allclose(near.distances.numpy(), np.sort(d, axis=1), rtol=1e-10)
    found = retrieval(x, labels, reference=Reference(reference, others), k=K, distance=distance)
    agree(found, figures(similar(labels, others), order, K))
    with pytest.raises(ValueError, match=r"one of 'euclidean', 'sqeuclidean', 'cosine', by which"):
        approximate_nearest(x, k=1, distance=distance)


def test_memory_does_not_grow_with_queries_times_references():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    others = torch.arange(20_000) % 1000
    with memory_budget(2**20), Allocations() as seen:
        retrieval(x, others[:500], reference=Reference(reference, others))
    assert seen.largest <= reference.numel() * 4 + 2**20  # the whole matrix would be 40 MB


def test_errors_teach():
    x, labels = draw(6)
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        retrieval(x, labels, k=(0,))
    with pytest.raises(ValueError, match="k must be a sequence"):
        retrieval(x, labels, k=5)
    with pytest.raises(TypeError, match="exclude must hold row indices of an integer dtype"):
        nearest(x, k=1, exclude=np.zeros((6, 1)))
    with pytest.raises(ValueError, match=r"exclude must have shape \(6, e\)"):
        retrieval(x, labels, exclude=[0, 1])
    with pytest.raises(ValueError, match="exclude must hold rows from 0 to 5, or -1 for none"):
        retrieval(x, labels, exclude=np.full((6, 1), 6))
    with pytest.raises(TypeError, match=r"pass reference=nearfar\.Reference\(x, labels\)"):
        retrieval(x, labels, reference=x)
    with pytest.raises(TypeError, match=r"reference\.labels must have a label for each row"):
        retrieval(x, labels, reference=Reference(x, None))
    with pytest.raises(ValueError, match=r"reference\.own must be a row of the reference, 0 to 5"):
        retrieval(x, labels, reference=Reference(x, labels, own=np.full(6, 6)))
    with pytest.raises(ValueError, match=r"reference_self must have one entry per row"):
        retrieval_of(nearest(x, k=2), labels, reference_labels=labels, reference_self=[0], k=(1,))
    with pytest.raises(TypeError, match="reference_self describes reference: pass it too"):
        nearest(x, k=1, reference_self=np.arange(6))
    with pytest.raises(ValueError, match="nothing to find"):
        retrieval(x, np.arange(6))
    with pytest.raises(ValueError, match=r"x\[2\] is not finite"):
        nearest([[0.0], [1.0], [float("nan")]], k=1)
    with pytest.raises(ValueError, match="must not exceed the 2 neighbours"):
        retrieval_of(nearest(x, k=2), labels, k=(3,))
