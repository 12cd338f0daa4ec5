"""Negatives from a corpus against a sort of all its rows, their laws, memory, and errors."""

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from math import inf, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import Allocations
from conftest import near_duplicates
from guides import check_code
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_oracle import distances as all_distances

from nearfar import memory_budget
from nearfar.engine.budget import tile_shape
from nearfar.mine import CorpusNegatives, corpus_negatives


def draw(n: int = 7, m: int = 60, d: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)), random.normal(size=(m, d))


class Expected:
    """What is left out and what is found, by a sort of every row of each query."""

    def __init__(
        self,
        d: np.ndarray,
        positives: list[list[int]],
        k: int,
        *,
        cosine: bool,
        margin: float | None = None,
        relative_margin: float | None = None,
        score_range: tuple[float, float] = (-inf, inf),
        skip: int = 0,
        ids: Any = None,
    ) -> None:
        n = len(d)
        self.indices, self.distances = np.full((n, k), -1), np.full((n, k), inf)
        self.left_out = {"positives": 0, "same_item": 0, "too_near": 0, "skipped": 0}
        self.too_near: list[int] = []
        scores = 1 - d if cosine else -d
        for i, (row, s) in enumerate(zip(d, scores, strict=True)):
            own = set(positives[i])
            items = {ids[j] for j in own if ids[j] >= 0} if ids is not None else set()
            related = {j for j in range(len(row)) if ids is not None and ids[j] in items} - own
            most = score_range[1]
            if own:
                lowest = min(s[j] for j in own)
                most = min(most, inf if margin is None else lowest - margin)
                if relative_margin is not None:
                    most = min(most, lowest - relative_margin * abs(lowest))
            order = [j for j in np.argsort(row, kind="stable") if j not in own | related]
            near = [j for j in order if s[j] > most]
            rest = [j for j in order if s[j] <= most and s[j] >= score_range[0]]
            self.too_near.append(near[0] if near else -1)
            self.left_out["positives"] += len(own)
            self.left_out["same_item"] += len(related)
            self.left_out["too_near"] += len(near)
            self.left_out["skipped"] += len(rest[:skip])
            for slot, j in enumerate(rest[skip : skip + k]):
                self.indices[i, slot], self.distances[i, slot] = j, row[j]

    def check(self, found: CorpusNegatives) -> None:
        assert found.indices.dtype == torch.int64
        np.testing.assert_array_equal(found.indices, self.indices)
        np.testing.assert_allclose(found.distances, self.distances, rtol=1e-12)
        assert vars(found.left_out) == self.left_out
        assert found.too_near.indices[:, 0].tolist() == self.too_near


def same(a: CorpusNegatives, b: CorpusNegatives) -> None:
    """The same to the last bit."""
    for x, y in (
        (a.indices, b.indices),
        (a.distances, b.distances),
        (a.too_near.indices, b.too_near.indices),
        (a.too_near.distances, b.too_near.distances),
    ):
        assert torch.equal(x, y)
    assert (a.left_out, a.n_corpus) == (b.left_out, b.n_corpus)
    torch.testing.assert_close(
        a.positive_distances, b.positive_distances, rtol=0, atol=0, equal_nan=True
    )


GUARDS: list[dict[str, Any]] = [
    {},
    {"margin": 0.1},
    {"margin": -0.2},
    {"relative_margin": 0.1},
    {"margin": 0.1, "relative_margin": 0.3, "score_range": (-2.5, 0.4)},
    {"skip": 2},
    {"margin": 0.0, "skip": 1},
]


@pytest.mark.parametrize("tile", [(1024, 1024), (3, 7)])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "sqeuclidean", "snr", "manhattan", 3])
@pytest.mark.parametrize("guards", GUARDS, ids=str)
def test_against_a_sort_of_all_rows(
    guards: dict[str, Any], distance: Any, tile: tuple[int, int]
) -> None:
    queries, corpus = draw()
    positives = [[0], [], [5, 59], [3], [17, 2, 40], [59], [8]]
    ids = np.arange(60) // 3
    ids[:3] = -1
    d = all_distances(queries, corpus, distance)
    for known in (None, ids):
        expected = Expected(d, positives, 4, cosine=distance == "cosine", ids=known, **guards)
        with tile_shape(*tile):
            found = corpus_negatives(
                queries, corpus, positives, 4, distance=distance, ids=known, **guards
            )
        expected.check(found)
        for i, own in enumerate(positives):
            farthest = found.positive_distances[i].item()
            assert isnan(farthest) if not own else farthest == pytest.approx(max(d[i, own]))


@pytest.mark.parametrize("k", [1, 30, 58, 59, 60, 200])
def test_fewer_rows_than_k(k: int) -> None:
    queries, corpus = draw(n=3)
    d = all_distances(queries, corpus, "cosine")
    expected = Expected(d, [[1], [2], [3]], k, cosine=True)
    with tile_shape(2, 7):
        found = corpus_negatives(queries, corpus, [1, 2, 3], k)
    expected.check(found)
    assert found.n_short == (3 if k > 59 else 0)


class Blocks:
    """A corpus that begins anew each time it is read."""

    def __init__(self, corpus: Any, ends: list[int]) -> None:
        self.corpus, self.ends = corpus, sorted(ends)

    def __iter__(self) -> Iterator[Any]:
        for start, stop in zip([0, *self.ends], [*self.ends, len(self.corpus)], strict=True):
            yield self.corpus[start:stop]


# Small whole numbers: every sum is exact, and many rows are equally far.
numbers = st.integers(-2, 2)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_and_tiles_change_nothing(data: st.DataObject) -> None:
    """Not even which of equally far rows is found."""
    m = data.draw(st.integers(1, 25))
    rows = st.lists(numbers, min_size=2, max_size=2)
    corpus = np.array(data.draw(st.lists(rows, min_size=m, max_size=m)), float)
    queries = np.array(data.draw(st.lists(rows, min_size=3, max_size=3)), float)
    positives = data.draw(
        st.lists(st.lists(st.integers(0, m - 1), max_size=3), min_size=3, max_size=3)
    )
    ids = data.draw(st.none() | st.lists(st.integers(-1, 4), min_size=m, max_size=m))
    guards = data.draw(st.sampled_from(GUARDS))
    how = {"k": 3, "distance": "sqeuclidean", "ids": ids, **guards}
    whole = corpus_negatives(queries, corpus, positives, **how)
    d = all_distances(queries, corpus, "sqeuclidean")
    listed = [sorted(set(own)) for own in positives]
    Expected(d, listed, 3, cosine=False, ids=ids, **guards).check(whole)
    ends = data.draw(st.lists(st.integers(0, m), max_size=4))
    tile = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    with tile_shape(*tile):
        same(corpus_negatives(queries, Blocks(corpus, ends), positives, **how), whole)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(GUARDS))
def test_the_order_of_the_corpus_changes_nothing(seed: int, guards: dict[str, Any]) -> None:
    queries, corpus = draw(seed=seed)
    positives = np.random.default_rng(seed).integers(0, 60, size=(7, 2))
    ids = np.random.default_rng(seed).integers(0, 20, size=60)
    order = np.random.default_rng(seed + 1).permutation(60)
    found = corpus_negatives(queries, corpus, positives, 5, ids=ids, **guards)
    place = np.argsort(order)  # where each row went
    other = corpus_negatives(queries, corpus[order], place[positives], 5, ids=ids[order], **guards)
    assert torch.equal(
        found.indices, torch.cat([torch.from_numpy(order), -torch.ones(1).long()])[other.indices]
    )
    torch.testing.assert_close(other.distances, found.distances)
    assert other.left_out == found.left_out


@pytest.mark.parametrize("guards", GUARDS, ids=str)
def test_more_negatives_begin_with_the_fewer(guards: dict[str, Any]) -> None:
    queries, corpus = draw()
    five = corpus_negatives(queries, corpus, np.arange(7), 5, **guards)
    nine = corpus_negatives(queries, corpus, np.arange(7), 9, **guards)
    assert torch.equal(nine.indices[:, :5], five.indices)
    assert torch.equal(nine.distances[:, :5], five.distances)


@pytest.mark.parametrize("guards", GUARDS, ids=str)
def test_queries_can_be_passed_some_at_a_time(guards: dict[str, Any]) -> None:
    queries, corpus = draw()
    whole = corpus_negatives(queries, corpus, np.arange(7), 5, **guards)
    for at in (slice(0, 3), slice(3, 7)):
        part = corpus_negatives(queries[at], corpus, np.arange(7)[at], 5, **guards)
        assert torch.equal(part.indices, whole.indices[at])
        torch.testing.assert_close(part.distances, whole.distances[at])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_memory_mapped_corpus(tmp_path: Path, dtype: Any) -> None:
    queries, corpus = draw(m=500)
    np.save(tmp_path / "corpus.npy", corpus.astype(dtype))
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    found = corpus_negatives(queries, mapped, np.arange(7), 5, margin=0.05)
    d = all_distances(queries, mapped, "cosine")
    Expected(d, [[i] for i in range(7)], 5, cosine=True, margin=0.05).check(found)


class Sliced:
    """What h5py and zarr give: a shape, and slices as arrays."""

    def __init__(self, corpus: np.ndarray) -> None:
        self.corpus, self.shape, self.read = corpus, corpus.shape, 0

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, at: slice) -> np.ndarray:
        self.read = max(self.read, at.stop - at.start)
        return self.corpus[at]


@pytest.mark.parametrize(
    "form",
    [
        torch.from_numpy,
        np.ndarray.tolist,
        Sliced,
        lambda corpus: [corpus[:9], torch.from_numpy(corpus[9:])],
        lambda corpus: Blocks(corpus, [9, 9, 30]),
    ],
    ids=["tensor", "list", "sliced", "blocks in a list", "blocks read anew"],
)
def test_forms_of_a_corpus(form: Any) -> None:
    queries, corpus = draw()
    whole = corpus_negatives(queries, corpus, np.arange(7), 5)
    found = corpus_negatives(queries, form(corpus), np.arange(7), 5)
    assert torch.equal(found.indices, whole.indices)
    torch.testing.assert_close(found.distances, whole.distances)


def test_only_blocks_of_a_corpus_are_read() -> None:
    queries, corpus = draw(m=5000, d=64)
    sliced = Sliced(corpus)
    with memory_budget(2**19):
        corpus_negatives(queries, sliced, np.arange(7))
    assert sliced.read <= 2**19 / (64 * 8)


@pytest.mark.parametrize(
    "positives",
    [
        np.array([3, 1, 4], np.int32),
        torch.tensor([[3, -1], [1, -1], [-1, 4]]),
        [[3], [1], [4, 4]],
        [np.array([3]), (1,), [4]],
        [3, 1, 4],
    ],
    ids=["ids", "padded", "lists", "mixed", "a list"],
)
def test_forms_of_positives(positives: Any) -> None:
    queries, corpus = draw(n=3)
    found = corpus_negatives(queries, corpus, positives, 3, margin=0.1)
    same(found, corpus_negatives(queries, corpus, np.array([3, 1, 4]), 3, margin=0.1))


def test_float16_is_compared_in_float32_with_float64_queries_in_float64() -> None:
    queries, corpus = draw()
    half = corpus_negatives(queries.astype(np.float16), corpus.astype(np.float16), np.arange(7))
    assert half.distances.dtype == torch.float32
    mixed = corpus_negatives(
        queries.astype(np.float32), [corpus[:5].astype(np.float16), corpus[5:]], np.arange(7)
    )
    assert mixed.distances.dtype == torch.float64


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_nearest_of_near_duplicates(apart: float) -> None:
    """By cosines in float32, that is mostly chance."""
    for seed in range(30):
        x = near_duplicates(seed, apart)
        with tile_shape(5, 4):
            found = corpus_negatives(x, x, torch.arange(12))
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        true = ((unit[:, None] - unit).square().sum(2) / 2).fill_diagonal_(inf)
        nearest = true.amin(1, keepdim=True)
        assert torch.equal(true.gather(1, found.indices)[:7], nearest[:7]), seed
        torch.testing.assert_close(found.distances.double(), nearest, rtol=1e-5, atol=0)


def test_a_common_offset_of_all_rows_costs_no_digits() -> None:
    """Blocks are centred together, by what both passes see."""
    queries, corpus = (torch.from_numpy(part).float() for part in draw())
    queries, corpus = ((part * 64).round() / 64 for part in (queries, corpus))
    with tile_shape(3, 7):
        near = corpus_negatives(queries, corpus, torch.arange(7), 5, distance="euclidean")
        far = corpus_negatives(
            queries + 1024, corpus + 1024, torch.arange(7), 5, distance="euclidean"
        )
    assert torch.equal(near.indices, far.indices)
    torch.testing.assert_close(near.distances, far.distances, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_copies_in_different_blocks_are_equally_near(distance: Any) -> None:
    """All blocks are shifted by one centre, else float32 would round their rows differently."""
    chance = torch.Generator().manual_seed(0)
    x = 8 + torch.rand(40, 5, generator=chance)
    corpus = torch.cat([x, x[torch.randperm(40, generator=chance)]])
    queries = 8 + torch.rand(6, 5, generator=chance)
    with tile_shape(4, 4):
        found = corpus_negatives(queries, corpus, [[]] * 6, 80, distance=distance)
    one, other = found.distances[:, ::2], found.distances[:, 1::2]
    assert torch.equal(one, other)
    assert (found.indices[:, ::2] < 40).all()


def test_a_row_of_zeros_is_at_distance_1_from_all() -> None:
    queries, corpus = draw()
    queries[2], corpus[[4, 9]] = 0, 0
    found = corpus_negatives(queries, corpus, np.arange(7), 59)
    torch.testing.assert_close(found.distances[2], torch.ones(59).double())
    of_zeros = (found.indices == 4) | (found.indices == 9)
    torch.testing.assert_close(found.distances[of_zeros], torch.ones(2 * 7 - 1).double())


def test_memory_does_not_grow_with_the_corpus() -> None:
    """Nor do items, but for one number of each row."""
    queries = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    peaks = []
    for m in (3000, 30000):
        corpus = torch.randn(m, 16, generator=torch.Generator().manual_seed(1)).half()
        ids = torch.arange(m) // 3
        positives = torch.arange(200)
        with memory_budget(2**19), Allocations(queries, corpus, ids, positives) as allocations:
            corpus_negatives(queries, corpus, positives, 5, margin=0.1)
            plain = allocations.peak
            corpus_negatives(queries, corpus, positives, 5, margin=0.1, ids=ids)
        peaks.append(plain)
        assert allocations.peak - plain < 6 * 8 * m
    assert peaks[1] <= 1.01 * peaks[0] < 2 * 2**19


def test_results_carry_no_gradient() -> None:
    queries, corpus = (torch.from_numpy(part).requires_grad_() for part in draw())
    found = corpus_negatives(queries, corpus, torch.arange(7), 2)
    assert not found.distances.requires_grad
    assert not found.positive_distances.requires_grad


def test_nothing_to_find() -> None:
    queries, corpus = draw()
    none = corpus_negatives(queries, corpus[:0], [[]] * 7, 3, ids=[])
    assert (none.indices == -1).all()
    assert "3 negatives each, fewer for 7" in str(none)
    empty = corpus_negatives(queries[:0], corpus, [], 3)
    assert empty.indices.shape == (0, 3)
    assert str(empty).startswith("0 queries against 60 rows")
    assert len(empty.examples().rows) == 0
    assert none.as_dict()["mean_nearest_negative"] is None


def test_examples_show_the_likeliest_positives_first() -> None:
    queries = torch.eye(2)
    corpus = torch.tensor([[0.8, 0.6], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, -1.0]])
    found = corpus_negatives(queries, corpus, [0, 2], 1, margin=0.05)
    rows = found.examples().rows
    assert [row[:2] for row in rows] == [("0", "1"), ("1", "3")]
    assert len(found.examples(1).rows) == 1
    named = found.examples(queries=["a\nb", "c"], corpus=["x" * 80, "y" * 80, "", "", ""])
    assert named.rows[0][0] == "a b"
    assert named.rows[0][1] == "y" * 57 + "..."
    figures = found.as_dict()
    assert (figures["n_queries"], figures["k"], figures["left_out"]["too_near"]) == (2, 1, 2)


def test_what_is_documented() -> None:
    doc = inspect.getdoc(corpus_negatives) or ""
    for name in inspect.signature(corpus_negatives).parameters:
        assert f"\n    {name}: " in doc
    for part in ("Args:", "Returns:", "Raises:", ">>> ", "Sources: "):
        assert part in doc


def test_the_guide(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes a corpus
    check_code("docs/mining.md", capsys, without="" if find_spec("datasets") else "datasets")


X = np.ones((4, 3))
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k must be an integer of at least 1"),
    ({"skip": -1}, "skip must be an integer of at least 0, got -1"),
    ({"skip": 1.0}, "skip must be an integer"),
    ({"margin": inf}, "margin must be a finite number"),
    ({"relative_margin": -0.1}, "relative_margin must be a number at least 0"),
    ({"score_range": (1, 0)}, "low <= high"),
    ({"distance": "dot"}, "distance must be one of"),
    ({"corpus": X[:, :2]}, "corpus must have rows of length 3"),
    ({"corpus": [X, X[:, :2]]}, "corpus must have rows of length 3"),
    ({"corpus": [X, X[0]]}, "corpus must be a tensor or an array of numbers"),
    ({"corpus": iter([X])}, "corpus is read twice, and a list_iterator only once"),
    ({"corpus": 3}, "corpus must be an array of shape .* got int"),
    ({"corpus": Blocks([X[0], X], [1])}, r"corpus must have shape \(n, d\)"),
    ({"corpus": np.where(np.arange(4)[:, None] == 2, np.nan, X)}, r"corpus\[2\] is not finite"),
    ({"queries": X * inf}, r"queries\[0\] is not finite"),
    ({"queries": X[0]}, r"queries must have shape \(n, d\)"),
    ({"positives": [0.5] * 4}, "positives must be integers, -1 for none; got torch.float"),
    ({"positives": [0, 1]}, r"positives must have shape \(4,\).*got \(2,\)"),
    ({"positives": [[0], [1]]}, r"positives must have shape \(4,\)"),
    ({"positives": [0, 1, 2, 4]}, r"positives must be rows of the corpus, 0 to 3, or -1"),
    ({"positives": [0, 1, 2, -2]}, r"positives\[3\] is \[-2\]"),
    ({"positives": [0, 1, 2, 9], "corpus": [X]}, r"rows of the corpus, 0 to 3"),
    ({"ids": [0, 1]}, r"ids must have shape \(4,\), the item of each row"),
    ({"ids": [0.0] * 4}, "ids must be integers, -1 for none"),
    ({"ids": [0, 1, 2, -2]}, "ids must be 0 or more, or -1 for none"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=["-".join(wrong) for wrong, _ in ERRORS])
def test_errors_teach(wrong: dict[str, Any], message: str) -> None:
    given = {"queries": X, "corpus": X, "positives": [0, 1, 2, 3], **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        corpus_negatives(**given)


def test_a_corpus_that_changes_is_noticed() -> None:
    class Growing:
        def __init__(self) -> None:
            self.left = [X, X[:2]]

        def __iter__(self) -> Iterator[Any]:
            return iter([self.left.pop()])

    with pytest.raises(ValueError, match="corpus had 2 rows when read first, and 4 the second"):
        corpus_negatives(X, Growing(), [0, 1, 0, 1])


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "sqeuclidean", "snr", "manhattan", 3])
@pytest.mark.parametrize("d", [16, 768])
def test_copies_of_positives_are_left_out_by_a_margin_above_rounding(distance: Any, d: int) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(100, d)).astype(np.float32)
    queries = (rows + 0.5 * random.normal(size=rows.shape)).astype(np.float32)
    margin = {"margin": 1e-5} if distance == "cosine" else {"relative_margin": 1e-4}
    corpus = np.concatenate([rows, rows])
    found = corpus_negatives(queries, corpus, np.arange(100), distance=distance, **margin)
    assert not (found.indices[:, 0].numpy() % 100 == np.arange(100)).any()
