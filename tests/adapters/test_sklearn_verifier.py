# ruff: noqa: N803
"""PairVerifier: which pairs it trains on, where its threshold lies, how scikit-learn takes it."""

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn")

import sklearn
from guides import check_code
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import estimator_checks

from nearfar.adapters.sklearn import PairVerifier, SiameseEmbedding


class Seen(TransformerMixin, BaseEstimator):
    """Embeds items as they are, and remembers what it was fitted on."""

    def fit(self, X, y):
        self.X_, self.y_ = X, y
        return self

    def fit_pairs(self, X, y):
        self.pairs_, self.similar_ = X, y
        return self

    def transform(self, X):
        return X


def people(n_people=30, n_items=8, n_pairs=1200, seed=0):
    """Pairs, half of them similar, whether they are, and their identities."""
    random = np.random.default_rng(seed)
    items = random.normal(size=(n_people, 1, 6)) + 0.4 * random.normal(size=(n_people, n_items, 6))
    who = random.integers(n_people, size=(n_pairs, 2))
    who[: n_pairs // 2, 1] = who[: n_pairs // 2, 0]
    which = random.integers(n_items, size=(n_pairs, 2))
    return items[who, which], who[:, 0] == who[:, 1], who


def apart(n_pairs=300, seed=0):
    """Pairs of which no two share an item."""
    random = np.random.default_rng(seed)
    similar = np.arange(n_pairs) % 2 == 0
    first, other = random.normal(size=(2, n_pairs, 6))
    second = np.where(similar[:, None], first, other) + 0.4 * random.normal(size=(n_pairs, 6))
    return np.stack([first, second], 1), similar


def rows(pairs):
    return {row.tobytes() for row in pairs.reshape(-1, pairs.shape[-1])}


def quick(**parameters):
    return SiameseEmbedding(embedding_dim=4, epochs=3, random_state=0, **parameters)


@pytest.mark.parametrize("far", [0.3, 0.05, 0.0])
def test_the_threshold_is_the_loosest_at_the_rate(far):
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=far, random_state=0).fit(pairs, similar, identities=who)
    chosen = verifier.calibration_pairs_
    distance = np.linalg.norm(pairs[chosen, 0] - pairs[chosen, 1], axis=1)
    wrong = np.sort(distance[~similar[chosen]])
    allowed = int(far * len(wrong))
    assert wrong[:allowed].max(initial=0) <= verifier.threshold_ < wrong[allowed]
    accepted = verifier.predict(pairs)
    assert accepted.dtype == bool
    assert accepted[chosen][~similar[chosen]].sum() == allowed
    np.testing.assert_array_equal(accepted, verifier.pair_distance(pairs) <= verifier.threshold_)
    verifier.threshold_ = distance[0]
    assert verifier.decision_function(pairs[chosen])[0] == 0
    assert verifier.predict(pairs[chosen])[0]


def test_identities_are_trained_on_or_calibrated_with_and_never_both():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar, identities=who)
    out = set(who[verifier.calibration_pairs_].ravel())
    assert len(out) == 9  # 0.3 of 30
    items = {
        row.tobytes(): identity
        for row, identity in zip(pairs.reshape(-1, 6), who.ravel(), strict=True)
    }
    trained = [items[row.tobytes()] for row in verifier.embedding_.X_]
    assert set(trained) == set(range(30)) - out
    assert (verifier.embedding_.y_ == trained).all()
    assert len(rows(verifier.embedding_.X_)) == len(verifier.embedding_.X_)  # each item once
    inside = np.flatnonzero(np.isin(who, list(out)).all(1))
    np.testing.assert_array_equal(verifier.calibration_pairs_, inside)


def test_without_identities_no_item_is_on_both_sides_nor_two_that_similar_pairs_join():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar)
    chosen, trained = verifier.calibration_pairs_, verifier.embedding_
    assert not rows(pairs[chosen]) & rows(trained.pairs_)
    sides = set(who[chosen][similar[chosen]].ravel())
    where = {pair.tobytes(): identity[0] for pair, identity in zip(pairs, who, strict=True)}
    of_trained = {where[pair.tobytes()] for pair in trained.pairs_[trained.similar_]}
    assert len(sides & of_trained) <= 2  # few have items that no chain of similar pairs joins


def test_pairs_that_share_no_item_are_all_used():
    pairs, similar = apart()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar)
    assert len(verifier.calibration_pairs_) == 90
    assert len(verifier.embedding_.pairs_) == 210
    other = PairVerifier(Seen(), far=0.1, random_state=1).fit(pairs, similar)
    assert set(other.calibration_pairs_) != set(verifier.calibration_pairs_)


def test_dissimilar_pairs_within_a_cluster_stay_with_it():
    """As the forged signatures of a writer: each cluster has pairs of both kinds."""
    random = np.random.default_rng(0)
    pairs = random.normal(size=(40, 3, 6))[:, [[0, 1], [0, 2]]].reshape(80, 2, 6)
    similar = np.tile([True, False], 40)
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar)
    chosen = verifier.calibration_pairs_
    assert len(chosen) == 24
    assert len(verifier.embedding_.pairs_) == 56
    assert (chosen.reshape(-1, 2) // 2 == chosen[::2, None] // 2).all()


def test_identities_are_drawn_singly_where_clusters_keep_too_few_pairs_aside():
    """Nine tenths of the pairs are in one cluster, which no share of 0.3 has room for."""
    random = np.random.default_rng(0)
    crowd = random.integers(40, size=(900, 2))
    crowd[::2, 1] = crowd[::2, 0]
    couple = 40 + np.arange(100)[:, None] // 10 * 2
    apart = couple + np.tile([[0, 0], [0, 1]], (50, 1))
    who = np.concatenate([crowd, apart])
    pairs = random.normal(size=(1000, 2, 6))
    verifier = PairVerifier(Seen(), far=0.1, random_state=0)
    verifier.fit(pairs, who[:, 0] == who[:, 1], identities=who)
    assert (verifier.calibration_pairs_ < 900).any()


def test_a_fitted_embedding_is_not_trained_and_all_pairs_fit_the_threshold():
    pairs, _, who = people()
    new, new_similar, _ = people(seed=1)
    fitted = quick().fit(pairs[:, 0], who[:, 0])
    before = fitted.transform(new[:, 0])
    verifier = PairVerifier(FrozenEstimator(fitted), far=0.1).fit(new, new_similar)
    assert verifier.calibration_pairs_.tolist() == list(range(len(new)))
    np.testing.assert_array_equal(fitted.transform(new[:, 0]), before)
    np.testing.assert_array_equal(
        clone(verifier).fit(new, new_similar).threshold_, verifier.threshold_
    )


@pytest.mark.parametrize("known", [True, False])
def test_an_embedding_is_trained_and_verifies_people_never_seen(known):
    """Of the features, only a few tell people apart."""
    pairs, similar, who = people(n_people=120, n_pairs=4000)
    noise = np.random.default_rng(1).normal(size=(4000, 2, 12)) * 2
    pairs = np.concatenate([pairs, noise], axis=2)
    old, new = (who < 80).all(1), (who >= 80).all(1)
    loss = "sup_con" if known else "batch_contrastive"
    embedding = SiameseEmbedding(loss, random_state=0)
    verifier = PairVerifier(embedding, far=0.1, random_state=0)
    verifier.fit(pairs[old], similar[old], identities=who[old] if known else None)
    raw = PairVerifier(FrozenEstimator(FunctionTransformer().fit(pairs[:, 0])), far=0.1)
    assert verifier.score(pairs[new], similar[new]) > 0.85
    assert raw.fit(pairs[old], similar[old]).score(pairs[new], similar[new]) < 0.75
    assert verifier.predict(pairs[new][~similar[new]]).mean() < 0.2


def test_scores_are_scikit_learns():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar, identities=who)
    assert verifier.score(pairs, similar) == pytest.approx(
        roc_auc_score(similar, verifier.decision_function(pairs))
    )
    for label, y in ((None, similar), (1, similar * 1)):
        scored = clone(verifier).set_params(similar_label=label)
        area, theirs, accuracy = (
            cross_val_score(scored, pairs, y, scoring=scoring)
            for scoring in (None, "roc_auc", "accuracy")
        )
        np.testing.assert_allclose(area, theirs)
        assert accuracy.min() > 0.7


@pytest.mark.parametrize("distance", ["cosine", "manhattan", 3])
def test_distances_are_those_asked_for(distance):
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, distance=distance, random_state=0)
    verifier.fit(pairs, similar, identities=who)
    a, b = pairs[:, 0], pairs[:, 1]
    if distance == "cosine":
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        expected = 1 - (a * b).sum(1) / lengths
    else:
        expected = np.linalg.norm(a - b, axis=1, ord=1 if distance == "manhattan" else 3)
    np.testing.assert_allclose(verifier.pair_distance(pairs), expected, atol=1e-12)


def test_probabilities_are_there_where_a_prior_is_and_shift_with_it():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar, identities=who)
    assert not hasattr(verifier, "predict_proba")
    found = {}
    for prior in (0.5, 0.01):
        verifier.set_params(prior=prior).fit(pairs, similar, identities=who)
        found[prior] = verifier.predict_proba(pairs)
        np.testing.assert_allclose(found[prior].sum(1), 1)
    odds = {prior: p[:, 1] / p[:, 0] for prior, p in found.items()}
    np.testing.assert_allclose(odds[0.5] / odds[0.01], 99)
    nearest_first = np.argsort(verifier.pair_distance(pairs), kind="stable")
    assert (np.diff(found[0.5][nearest_first, 1]) <= 0).all()


def test_a_prior_may_be_set_or_changed_after_the_fit():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0)
    expected = {
        prior: clone(verifier)
        .set_params(prior=prior)
        .fit(pairs, similar, identities=who)
        .predict_proba(pairs)
        for prior in (0.1, 0.9)
    }
    verifier.fit(pairs, similar, identities=who)
    for prior in (0.1, 0.9):
        verifier.set_params(prior=prior)
        again = pickle.loads(pickle.dumps(verifier))
        for one in (verifier, again):
            np.testing.assert_allclose(one.predict_proba(pairs), expected[prior])
    for other in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="prior must be a number"):
            verifier.set_params(prior=other).predict_proba(pairs)


def test_a_threshold_is_fitted_where_no_probability_can_be():
    pairs, similar, who = people()
    pairs[~similar, 1] = pairs[~similar, 0]  # nearer than similar ones
    verifier = PairVerifier(Seen(), far=0.0, random_state=0).fit(pairs, similar, identities=who)
    assert not verifier.predict(pairs).any()
    with pytest.raises(ValueError, match="Similar pairs are farther apart"):
        verifier.set_params(prior=0.5).fit(pairs, similar, identities=who)


def test_it_searches_a_grid_over_the_embedding():
    pairs, similar, who = people()
    grid = {"embedding__temperature": [0.05, 0.5]}
    verifier = PairVerifier(quick(), far=0.1, random_state=0)
    found = GridSearchCV(verifier, grid, cv=2, error_score="raise").fit(pairs, similar)
    assert (
        found.best_estimator_.embedding_.temperature == found.best_params_["embedding__temperature"]
    )
    with_classes = GridSearchCV(verifier, grid, cv=2, error_score="raise")
    with_classes.fit(pairs, similar, identities=who)
    assert with_classes.best_score_ > 0.8
    assert not np.allclose(
        found.cv_results_["mean_test_score"], with_classes.cv_results_["mean_test_score"]
    )
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.predict(pairs), found.predict(pairs))


def test_it_searches_a_grid_by_folds_of_identities():
    """What the guide shows."""
    pairs, similar, who = people()
    fold = np.random.default_rng(0).integers(2, size=30)[who]
    folds = [
        (np.flatnonzero((fold != k).all(1)), np.flatnonzero((fold == k).all(1))) for k in (0, 1)
    ]
    verifier = PairVerifier(Seen(), far=0.3, random_state=0)
    found = GridSearchCV(verifier, {"distance": ["cosine", "euclidean"]}, cv=folds)
    assert found.fit(pairs, similar, identities=who).best_score_ > 0.8


def test_identities_can_be_routed():
    pairs, similar, who = people()
    with sklearn.config_context(enable_metadata_routing=True):
        verifier = PairVerifier(Seen(), far=0.1, random_state=0).set_fit_request(identities=True)
        scores = cross_val_score(verifier, pairs, similar, cv=2, params={"identities": who})
    assert scores.min() > 0.8


def test_the_embedding_may_be_a_pipeline_that_learns_from_classes():
    pairs, similar, who = people()
    pipeline = make_pipeline(StandardScaler(), quick())
    verifier = PairVerifier(pipeline, far=0.1, random_state=0)
    names = np.array([f"person {i}" for i in range(30)])[who]
    with sklearn.config_context(transform_output="pandas"):
        verifier.fit(pairs, similar, identities=names)
        assert verifier.score(pairs, similar) > 0.8
    with pytest.raises(TypeError, match="Pipeline learns from classes only: pass identities"):
        verifier.fit(pairs, similar)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_mixin_order,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    ],
)
def test_scikit_learns_checks_that_need_no_data(check):
    check("PairVerifier", PairVerifier(SiameseEmbedding()))


def test_numbers_say_which_label_is_similar():
    pairs, similar, who = people()
    expected = PairVerifier(Seen(), far=0.1, random_state=0).fit(pairs, similar, identities=who)
    y = similar.astype(int)
    verifier = PairVerifier(Seen(), far=0.1, random_state=0, similar_label=1)
    for given in (y, y.astype(float), y.tolist()):
        assert verifier.fit(pairs, given, identities=who).threshold_ == expected.threshold_
    assert verifier.score(pairs, y) == expected.score(pairs, similar)
    with pytest.raises(ValueError, match="read every label the other way round"):
        PairVerifier(Seen(), similar_label=0).fit(pairs, 1 - y)
    with pytest.raises(TypeError, match="the literature reads 0 and 1 both ways"):
        PairVerifier(Seen()).fit(pairs, y)
    with pytest.raises(ValueError, match="for -1 and 1 pass y > 0"):
        PairVerifier(Seen(), similar_label=1).fit(pairs, np.where(similar, 1, -1))


def test_what_no_threshold_can_be_fitted_to_is_refused():
    pairs, similar, who = people()
    verifier = PairVerifier(Seen(), far=0.1, random_state=0)
    with pytest.raises(ValueError, match=r"X must have shape \(n, 2, n_features\)"):
        verifier.fit(pairs[:, [0, 1, 1]], similar)
    with pytest.raises(
        ValueError, match=r"\(1200, 6\). Pass np.stack\(\[first, second\], axis=1\)"
    ):
        verifier.fit(pairs[:, 0], similar)
    with pytest.raises(ValueError, match=r"\(2, 6\). For a single pair pass X\[None\]"):
        verifier.fit(pairs[0], similar)
    with pytest.raises(ValueError, match="NaN"):
        verifier.fit(np.full_like(pairs, np.nan), similar)
    with pytest.raises(ValueError, match="similar and dissimilar pairs"):
        verifier.fit(pairs, np.ones(len(pairs), dtype=bool))
    with pytest.raises(ValueError, match="got degrees between"):
        PairVerifier(Seen(), similar_label=1).fit(pairs, np.linspace(0, 1, len(pairs)))
    with pytest.raises(ValueError, match=r"identities must have shape \(1200, 2\)"):
        verifier.fit(pairs, similar, identities=who[:, 0])
    with pytest.raises(ValueError, match=r"pair 0 is similar and of .* \(1200 of 1200 are wrong\)"):
        verifier.fit(pairs, similar, identities=np.where(similar[:, None], [0, 1], [2, 2]))
    mixed = who.astype(object)
    mixed[who == 0] = "nobody"
    with pytest.raises(TypeError, match="identities must be all numbers or all text, got int, str"):
        verifier.fit(pairs, similar, identities=mixed)
    untrained = BaseEstimator()  # refused before anything is trained, which it could not be
    with pytest.raises(ValueError, match="far must be a rate"):
        PairVerifier(untrained, far=1.0).fit(pairs, similar, identities=who)
    with pytest.raises(ValueError, match="distance must be one of"):
        PairVerifier(untrained, distance="cosin").fit(pairs, similar, identities=who)
    for share in (0, 1, "half"):
        with pytest.raises(
            ValueError, match="calibration_share must be a number above 0 and below"
        ):
            clone(verifier).set_params(calibration_share=share).fit(pairs, similar, identities=who)
    with pytest.raises(ValueError, match="too few to fit a threshold"):
        verifier.fit(pairs[[0, -1]], similar[[0, -1]])


def test_few_identities_are_drawn_again_until_both_sides_have_both_kinds():
    pairs, similar, who = people(n_people=4, n_pairs=200)
    chain = np.abs(who[:, 0] - who[:, 1]) < 2  # only 0 and 1 on one side leaves both with pairs
    for seed in range(8):
        verifier = PairVerifier(Seen(), far=0.3, random_state=seed)
        verifier.fit(pairs[chain], similar[chain], identities=who[chain])
        assert sorted(set(verifier.embedding_.y_)) in ([0, 1], [2, 3])


def test_items_of_another_width_are_refused():
    pairs, similar, who = people()
    verifier = PairVerifier(quick(), far=0.1, random_state=0).fit(pairs, similar, identities=who)
    with pytest.raises(ValueError, match="X has 5 features, but SiameseEmbedding is expecting 6"):
        verifier.predict(pairs[:, :, :5])


def test_a_rate_below_one_pair_is_told():
    pairs, similar, who = people()
    with pytest.warns(UserWarning, match="less than one of the 53 dissimilar pairs"):
        PairVerifier(Seen(), far=0.001, random_state=0).fit(pairs, similar, identities=who)


def test_the_guide_runs_and_prints_what_it_shows(capsys):
    check_code("docs/adapters/scikit-learn.md", capsys)
