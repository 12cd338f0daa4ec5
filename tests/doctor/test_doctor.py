"""Each rule fires on evidence of its fault, says so in numbers, and is silent where all is well."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfar as nf
from nearfar.doctor import (
    RULES,
    Apart,
    Claim,
    Commonest,
    Diagnosis,
    Evidence,
    Figure,
    Finding,
    Fitted,
    Side,
    Spectrum,
    Watch,
    diagnose,
    examine,
    examine_split,
)
from nearfar.doctor.examine import ROWS, fingerprints, of_embeddings
from nearfar.doctor.rules import name_of
from nearfar.spectrum import effective_rank

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"
OF_TEXTS = ("copied-texts", "cut-off-texts", "telling-scripts")  # do not apply to other data
NAMES = (
    "not-a-number",
    "dead-batch",
    "flipped-labels",
    "identity-leak",
    "duplicates-across-splits",
    *OF_TEXTS,
    "unreachable-margin",
    "idle-margin",
    "collapsed-embedding",
    "unpaired-towers",
    "dimensional-collapse",
    "one-kind-only",
    "few-positives",
    "temperature-too-low",
    "exploding-norms",
    "stale-memory",
    "no-better-than-chance",
    "no-better-than-raw-input",
    "few-identities",
    "overfit-threshold",
    "strict-threshold",
    "coarse-threshold",
    "overconfident-probability",
    "imbalance",
)


def names(diagnosis: Diagnosis) -> list[str]:
    return [finding.name for finding in diagnosis.findings]


def clusters(n_classes=16, n_items=4, d=16, noise=0.3, seed=0) -> tuple[Tensor, Tensor]:
    """Items around centres in all directions: what a trained encoder gives."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, 1, d, generator=generator)
    x = centres + noise * torch.randn(n_classes, n_items, d, generator=generator)
    return x.flatten(0, 1), torch.arange(n_classes).repeat_interleave(n_items)


HEALTHY = [
    (nf.sup_con_loss, {"temperature": 0.1}),
    (nf.nt_xent_loss, {"temperature": 0.2}),
    (nf.batch_contrastive_loss, {"margin": 4.0}),
    (nf.batch_triplet_loss, {"margin": 4.0}),
    (nf.batch_cosine_loss, {"margin": 0.1}),
    (nf.multi_similarity_loss, {}),
    (nf.circle_loss, {}),
    (nf.lifted_structure_loss, {"margin": 4.0}),
]


@pytest.mark.parametrize(("loss", "settings"), HEALTHY)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5])
def test_healthy_batches_have_no_findings(loss, settings, noise):
    x, labels = clusters(noise=noise)
    assert examine(x, labels, loss=loss, **settings).healthy
    assert examine(x, labels).healthy
    assert examine(x).healthy


# In two dimensions one of a few negatives can take nearly all of the push, which is a finding.
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 8), st.sampled_from([8, 64]))
def test_untrained_embeddings_have_no_findings(seed, n_classes, n_items, d):
    x, labels = clusters(n_classes, n_items, d, noise=100.0, seed=seed)
    assert examine(x, labels, loss=nf.sup_con_loss, temperature=0.1).healthy


def test_a_module_is_examined_like_its_function():
    x, labels = clusters()
    module = nf.BatchContrastiveLoss(margin=3.0, distance="cosine")
    by_hand = examine(x, labels, loss=nf.batch_contrastive_loss, margin=3.0, distance="cosine")
    assert examine(x, labels, loss=module) == by_hand
    assert names(by_hand) == ["unreachable-margin"]


def test_without_evidence_there_are_no_findings():
    assert diagnose(Evidence()).healthy
    assert examine(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).healthy
    assert examine(torch.zeros(1, 4), [0]).healthy


# -- the faults -----------------------------------------------------------------------------------


def test_not_a_number_names_the_rows():
    x, labels = clusters()
    x[5, 2], x[9, 0] = torch.nan, torch.inf
    (found,) = examine(x, labels).findings
    assert found.name == "not-a-number"
    assert found.seen.startswith("2 of 64 rows")
    assert "(row 5, 9)" in found.seen
    assert names(examine(x, labels, loss=nf.sup_con_loss, temperature=0.1)) == ["not-a-number"]


def test_a_dead_batch():
    x, labels = clusters(noise=0.001)
    assert names(examine(x, labels, loss=nf.batch_triplet_loss, margin=0.01)) == ["dead-batch"]
    assert examine(x, labels, loss=nf.batch_triplet_loss, margin=9.0).healthy


@pytest.mark.parametrize(
    ("losses", "dead"),
    [
        ([0.0] * 10, True),
        ([0.0] * 9, False),
        ([0.0, 1.0] * 25, True),
        ([0.0, 1.0, 1.0] * 20, False),
    ],
)
def test_dead_steps_of_a_training_run(losses, dead):
    history = [{"loss": loss, "active_share": float(loss > 0)} for loss in losses]
    assert names(diagnose(Evidence(history=history))) == ["dead-batch"] * dead
    # A loss below 0 has no tuple that "costs", and learns all the same.
    below = [{"loss": -1.0, "active_share": 0.0}] * 50
    assert diagnose(Evidence(history=below)).healthy
    # A training by another tool may not tell how many tuples were active.
    assert diagnose(Evidence(history=[{"loss": 0.0}] * 50)).healthy


def test_flipped_labels():
    x, labels = clusters()
    other = torch.arange(len(labels)) % 4  # items of a new class come from sixteen old ones
    assert names(examine(x, labels)) == []
    generator = torch.Generator().manual_seed(0)
    near, far = torch.rand(2, 200, generator=generator)
    apart = Apart(near + 0.5, far)
    (found,) = diagnose(Evidence(apart=apart)).findings
    assert found.name == "flipped-labels"
    assert diagnose(Evidence(apart=Apart(near, far + 0.5))).healthy
    assert diagnose(Evidence(apart=apart, progress=0.1)).healthy  # an untrained network
    # 200 pairs of 6 rows are no 200 observations.
    assert diagnose(Evidence(apart=replace(apart, n_rows=6))).healthy
    assert "flipped-labels" not in names(examine(x, other))


@pytest.mark.parametrize(("distance", "margin"), [("euclidean", 2.1), ("sqeuclidean", 4.1)])
def test_a_margin_out_of_reach_of_unit_rows(distance, margin):
    x, labels = clusters()
    check = {"loss": nf.batch_contrastive_loss, "distance": distance, "margin": margin}
    unit = torch.nn.functional.normalize(x)
    (found,) = examine(unit, labels, **check).findings
    assert found.name == "unreachable-margin"
    assert f"The margin is {margin:g}" in found.seen
    assert examine(unit, labels, **check | {"margin": margin - 0.2}).healthy
    assert examine(x, labels, **check).healthy  # rows of other lengths can get there
    (found,) = examine(x, labels, **check, normalize=True).findings
    assert found.name == "unreachable-margin"


@pytest.mark.parametrize("distance", ["snr", "manhattan", 3.0, "sqeuclidean", 2])
def test_other_distances_are_examined_as_far_as_they_can_be(distance):
    """A p-norm depends on the dimensions: unit rows have no largest, a collapse no size."""
    x, labels = clusters()
    check = {"loss": nf.batch_contrastive_loss, "distance": distance}
    euclidean = distance in ("sqeuclidean", 2)
    for rows, more in ((x, {}), (x, {"normalize": True}), (x.half(), {"margin": 0.5})):
        assert "flipped-labels" not in names(examine(rows, labels, **check, **more))
    far = examine(x, labels, **check, normalize=True, margin=20.0)
    assert ("unreachable-margin" in names(far)) == euclidean
    point = torch.randn(16, generator=torch.Generator().manual_seed(5))
    found = examine(10 * point + 1e-3 * x, labels, **check)
    without = {name: what for what, rules in found.not_asked.items() for name in rules}
    if euclidean or distance == "snr":
        assert "collapsed-embedding" in names(found)
    else:
        assert without["collapsed-embedding"] == "Euclidean distances"
    assert names(examine(x, distance=distance)) == []


def test_distances_are_measured_between_rows_of_length_1_where_the_loss_does():
    x, labels = clusters()
    long = x * torch.logspace(-2, 2, len(x))[:, None]
    found = of_embeddings(long, labels, {"distance": "manhattan", "normalize": True})
    assert found.apart is not None
    d = found.apart.dissimilar
    unit = torch.nn.functional.normalize(long)
    true = torch.cdist(unit, unit, p=1)[labels[:, None] != labels]
    torch.testing.assert_close(d.sort().values, true.sort().values)


def test_a_margin_that_pushes_nothing():
    x, labels = clusters()
    assert "idle-margin" in names(examine(x, labels, loss=nf.batch_cosine_loss, margin=1.0))
    assert "idle-margin" in names(examine(x, labels, loss=nf.batch_contrastive_loss, margin=0.0))
    x, labels = clusters(noise=1.5)
    assert examine(x, labels, loss=nf.batch_triplet_loss, margin=0.0).healthy


@pytest.mark.parametrize(("loss", "settings"), HEALTHY)
def test_a_collapsed_embedding(loss, settings):
    x, labels = clusters()
    point = torch.randn(16, generator=torch.Generator().manual_seed(5))
    found = examine(10 * point + 1e-3 * x, labels, loss=loss, **settings)
    assert "collapsed-embedding" in names(found)
    assert "collapsed-embedding" in names(examine(10 * point + 1e-3 * x, labels))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(100, 16),
        torch.ones(100, 16),
        1 + 1e-3 * torch.randn(100, 16, generator=torch.Generator().manual_seed(0)),
        torch.ones(100, 16) + 1e-4 * torch.arange(100)[:, None],
    ],
)
@pytest.mark.parametrize("labels", [None, torch.arange(100) // 10])
def test_a_collapsed_embedding_with_and_without_labels(x, labels):
    assert names(examine(x, labels))[0] == "collapsed-embedding"
    assert names(examine(x, labels, distance="euclidean"))[0] == "collapsed-embedding"
    assert names(examine(x[:2], None if labels is None else [0, 1])) == [
        "collapsed-embedding",
        *["one-kind-only"] * (labels is not None),
    ]


def test_classes_that_are_points_are_not_a_collapse_without_labels():
    """With two classes of equal size nearly half of the pairs are similar; with ten, a tenth."""
    for n_classes in (2, 10):
        x, _ = clusters(n_classes, 200 // n_classes, d=10, noise=1e-5)
        assert examine(x).healthy
    one_astray = torch.ones(100, 10)
    one_astray[:3] = torch.eye(10)[:3]
    assert names(examine(one_astray)) == ["collapsed-embedding"]


def test_rules_about_success_wait_until_training_has_settled():
    apart = Apart(torch.full((9,), 1e-6), torch.full((9,), 1e-5))
    spectrum = Spectrum(torch.eye(100)[0], 1000, 100)
    early = Evidence(apart=apart, lengths=torch.ones(9), spectrum=spectrum, progress=0.2)
    early = replace(early, held=torch.ones(20), settings={"temperature": 0.1})
    assert diagnose(early).healthy
    assert names(diagnose(replace(early, progress=0.25))) == [
        "collapsed-embedding",
        "dimensional-collapse",
        "temperature-too-low",
    ]


def test_a_loss_that_is_stuck_at_its_value_for_identical_embeddings():
    x, labels = clusters()
    near = torch.nn.functional.normalize(10 * x[:1] + 0.1 * x)  # some 5 % of the length apart
    check = {"loss": nf.batch_contrastive_loss, "margin": 1.0}
    stuck = examine(near, labels, **check | {"margin": 100.0})
    assert "as for identical embeddings" in stuck.findings[-1].seen
    # As near, but where so small a margin makes a difference, they are on their way.
    assert "collapsed-embedding" not in names(examine(near, labels, **check | {"margin": 0.1}))


TOWERS = [
    (nf.clip_loss, {"scale": 14}),
    (nf.CLIPLoss(scale=14.0), {}),
    (nf.siglip_loss, {"scale": 10.0, "bias": -10.0}),
    (nf.info_nce_loss, {"temperature": 0.07}),
    (nf.info_nce_loss, {"temperature": 0.07, "symmetric": True}),
    (nf.info_nce_loss, {"temperature": 0.07, "hard_negatives": torch.eye(5, 32)}),
]


def two_towers(noise=0.5, n=64, d=32, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, n, d, generator=generator)
    return x, x + noise * other


def explained(*towers, loss, **settings) -> list[str]:
    return [finding.name for finding in nf.explain(loss, *towers, **settings).findings]


@pytest.mark.parametrize(("loss", "settings"), TOWERS)
def test_paired_towers_have_no_findings(loss, settings):
    for noise in (0.1, 0.5, 2.0):
        assert examine(*two_towers(noise), loss=loss, **settings).healthy
    if "symmetric" not in settings:
        assert explained(*two_towers(), loss=loss, **settings) == []


@pytest.mark.parametrize(("loss", "settings"), TOWERS)
def test_shuffled_towers(loss, settings):
    x, y = two_towers()
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    (found,) = examine(x, shuffled, loss=loss, **settings).findings
    assert found.name == "unpaired-towers"
    assert "have a mutual nearest neighbour that is not their match" in found.seen
    assert "in different orders" in found.means
    (found,) = examine(x, two_towers(seed=9)[1], loss=loss, **settings).findings
    assert found.name == "unpaired-towers"
    assert "mutual nearest neighbour" not in found.seen
    assert "or nothing was learned yet" in found.means
    if "symmetric" not in settings:
        assert explained(x, shuffled, loss=loss, **settings) == ["unpaired-towers"]


@pytest.mark.parametrize(("loss", "settings"), TOWERS)
def test_towers_that_collapsed(loss, settings):
    """Both to one point, each to a different one, or only one of them."""
    x, y = two_towers()
    points = 10 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    for a, b, which in (
        (points[0] + 1e-3 * x, points[0] + 1e-3 * y, "{} and of {}"),
        (points[0] + 1e-3 * x, points[1] + 1e-3 * y, "{} and of {}"),
        (points[0] + 1e-3 * x, y, "{}"),
        (x, points[1] + 1e-3 * y, "{1}"),
    ):
        (found,) = examine(a, b, loss=loss, **settings).findings
        assert found.name == "collapsed-embedding"
        known_as = ("query", "positive") if loss is nf.info_nce_loss else ("x", "y")
        assert f"pairs of rows of {which.format(*known_as)} are at most " in found.seen
        if "symmetric" not in settings:
            assert explained(a, b, loss=loss, **settings) == ["collapsed-embedding"]


def test_a_two_tower_loss_that_is_stuck_at_log_n():
    x, y = two_towers(noise=0.0)
    near = [torch.nn.functional.normalize(20 * x[:1] + tower) for tower in (x, y)]  # 5 % apart
    (found,) = examine(*near, loss=nf.clip_loss, scale=0.1).findings
    assert found.name == "collapsed-embedding"
    assert "The loss is 4.159, as for identical embeddings." in found.seen  # log 64
    # As near, but beside a tower that spreads the loss is not there: this one is on its way.
    wide = two_towers(seed=9)[0]
    assert "collapsed-embedding" not in names(examine(near[0], wide, loss=nf.clip_loss, scale=14))
    apart = torch.zeros(2, 64, 64)  # each tower spreads where the other is flat
    apart[0, :, :32], apart[1, :, 32:] = x, y
    (found,) = examine(*apart, loss=nf.clip_loss, scale=14.0).findings
    assert found.name == "unpaired-towers"
    assert "in 50% of comparisons" in found.seen
    assert "The loss is 4.159, as if all were the same." in found.seen


def test_one_flat_tower_of_two():
    x, y = two_towers(n=256)
    y = torch.cat([y[:, :1], 1e-3 * y[:, 1:]], 1)
    (found,) = examine(x, y, loss=nf.clip_loss, scale=14).findings
    assert found.name == "dimensional-collapse"
    assert "256 rows of 32 numbers in y have effective rank" in found.seen


def test_rows_of_two_towers_that_are_not_finite():
    x, y = two_towers()
    x[5, 0], y[9, 0] = torch.nan, torch.inf
    assert names(examine(x, y, loss=nf.clip_loss, scale=14)) == ["not-a-number"]
    few = examine(x[:4], y[:4], loss=nf.clip_loss, scale=10)
    assert few.healthy
    assert few.not_asked["16 matches"] == ("unpaired-towers",)


def test_dimensional_collapse():
    x, labels = clusters(n_classes=64, d=32)
    direction = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    flat = 0.01 * x + torch.randn(256, 1, generator=torch.Generator().manual_seed(2)) @ direction
    (found,) = examine(flat, labels).findings
    assert found.name == "dimensional-collapse"
    assert "256 rows of 32 numbers" in found.seen
    assert "1 direction holds 99 %" in found.seen
    assert examine(x, labels).healthy
    # Two classes leave one direction, and few numbers no room: neither is a fault.
    assert examine(flat, torch.arange(256) % 2).healthy
    assert examine(flat[:, :8], labels).healthy


def test_effective_rank_counts_even_directions():
    for k in (1, 3, 10):
        values = torch.cat([torch.full((k,), 2.5), torch.zeros(20)])
        assert effective_rank(values) == pytest.approx(k, rel=1e-5)
        spectrum = Spectrum(values, 1000, 200)
        assert names(diagnose(Evidence(spectrum=spectrum))) == ["dimensional-collapse"]
        assert diagnose(Evidence(spectrum=replace(spectrum, d=9 * k))).healthy


def test_one_kind_only():
    x, _ = clusters()
    assert names(examine(x, torch.zeros(64, dtype=torch.long))) == ["one-kind-only"]
    assert names(examine(x, torch.arange(64))) == ["one-kind-only"]


def test_few_positives():
    x, labels = clusters()
    alone = torch.arange(64)
    for n_alone, expected in ((48, []), (50, ["few-positives"])):
        mixed = torch.where(alone < n_alone, 1000 + alone, labels)
        assert names(examine(x, mixed)) == expected
    assert "50 of 64 anchors" in str(examine(x, mixed))


def test_a_temperature_at_which_one_negative_holds_all_the_push():
    x, labels = clusters(noise=1.0)
    for temperature, expected in ((1e-3, ["temperature-too-low"]), (0.1, [])):
        check = {"loss": nf.sup_con_loss, "temperature": temperature}
        assert names(examine(x, labels, **check)) == expected
    # Where every anchor has won against its negatives, there is no push to share.
    assert examine(*clusters(noise=0.01), loss=nf.sup_con_loss, temperature=1e-3).healthy


def test_exploding_norms():
    def trained(growth):
        return [{"loss": 1.0, "active_share": 1.0, "embedding_norm": growth**k} for k in range(50)]

    (found,) = diagnose(Evidence(history=trained(1.1))).findings
    assert found.name == "exploding-norms"
    assert diagnose(Evidence(history=trained(1.03))).healthy
    assert diagnose(Evidence(history=trained(2.0)[:15])).healthy  # too early to say


FITTED = Fitted(0.01, 1000, 100, test_far=0.01, test_pairs=1000, test_identities=100)


@pytest.mark.parametrize(
    ("test_far", "n_identities", "fires"),
    [
        (0.02, 10**4, False),
        (0.03, 10**4, True),
        (0.18, 100, False),
        (0.2, 100, True),
        (1, 4, False),
    ],
)
def test_a_threshold_that_does_not_hold(test_far, n_identities, fires):
    far = {"test_far": test_far, "n_identities": n_identities, "test_identities": n_identities}
    fitted = replace(FITTED, **far, n_pairs=10**6, test_pairs=10**6)
    assert names(diagnose(Evidence(fitted=fitted))) == ["overfit-threshold"] * fires


@pytest.mark.parametrize(
    ("auc", "fires"), [(None, False), (0.3, True), (0.5, True), (0.54, True), (0.56, False)]
)
def test_a_verifier_at_chance(auc, fires):
    fitted = replace(FITTED, test_auc=auc)
    assert names(diagnose(Evidence(fitted=fitted))) == ["no-better-than-chance"] * fires


def test_a_verifier_below_chance_has_one_finding():
    """Flipped labels if that is certain, no better than chance otherwise."""
    near, far = torch.rand(2, 200, generator=torch.Generator().manual_seed(0))
    evidence = Evidence(fitted=replace(FITTED, test_auc=0.3), apart=Apart(near + 0.5, far))
    assert names(diagnose(evidence)) == ["flipped-labels"]
    unsure = replace(evidence, apart=Apart(near + 0.5, far, n_rows=6))
    assert names(diagnose(unsure)) == ["no-better-than-chance"]


def test_chance_does_not_overfit_a_threshold():
    """Each identity has its own error rate, so its pairs are not independent."""
    generator = torch.Generator().manual_seed(0)
    fired = 0
    for _ in range(300):
        rates = []
        for _ in range(2):
            odds = 0.1 * torch.rand(40, generator=generator) ** 4
            pairs = torch.bernoulli((odds[:, None] + odds) / 2, generator=generator)
            rates.append(float(pairs.triu(1).sum()) / 780)
        fitted = Fitted(rates[0], 780, 40, rates[1], 780, 40)
        fired += "overfit-threshold" in names(diagnose(Evidence(fitted=fitted)))
    assert fired == 0


@pytest.mark.parametrize(
    ("n", "largest"), [(1, "0.95"), (2, "0.78"), (10, "0.26"), (100, "0.03"), (298, "0.01")]
)
def test_too_few_pairs_for_a_rate(n, largest):
    """If none of n is accepted, the rate may be `largest` with a probability of 5 %."""
    (found,) = diagnose(Evidence(fitted=replace(FITTED, n_pairs=n))).findings
    assert found.name == "coarse-threshold"
    assert found.means.endswith(f"the rate may be {largest}.")
    assert (1 - float(largest)) ** n == pytest.approx(0.05, abs=0.01)
    assert "at least 299 pairs of identities" in found.advice


def test_pairs_that_are_enough_for_a_rate():
    assert diagnose(Evidence(fitted=FITTED)).healthy
    assert diagnose(Evidence(fitted=replace(FITTED, n_pairs=299))).healthy
    assert diagnose(Evidence(fitted=replace(FITTED, far=0.5, test_far=0.5, n_pairs=5))).healthy
    asked_for_none = replace(FITTED, far=0.0, test_far=0.0, n_pairs=10**6)
    (found,) = diagnose(Evidence(fitted=asked_for_none)).findings
    assert "No number of pairs shows a rate of 0" in found.advice


@pytest.mark.parametrize(
    ("learned", "raw", "fires"),
    [
        (Figure(0.80), Figure(0.82), True),
        (Figure(0.82), Figure(0.82), True),
        (Figure(0.80, 0.75, 0.84), Figure(0.82, 0.78, 0.86), True),
        (Figure(0.85, 0.80, 0.89), Figure(0.82, 0.78, 0.86), True),  # 0.03, sure to 0.064
        (Figure(0.93, 0.90, 0.95), Figure(0.89, 0.85, 0.91), False),  # 0.04, sure to 0.036
        (Figure(0.99, 0.985, 0.995), Figure(0.82, 0.78, 0.86), False),
    ],
)
def test_a_verifier_that_is_no_better_than_the_raw_input(learned, raw, fires):
    found = diagnose(Evidence(learned_auc=learned, raw_auc=raw))
    assert names(found) == ["no-better-than-raw-input"] * fires
    if fires:
        chance = "which chance can explain" in found.findings[0].seen
        assert chance == (learned.value > raw.value)


def test_better_than_the_raw_input_without_an_interval_is_not_judged():
    found = diagnose(Evidence(learned_auc=Figure(0.9), raw_auc=Figure(0.8)))
    assert found.healthy
    reason = "enough identities to tell from chance"
    assert "no-better-than-raw-input" in found.not_asked[reason]


STRICT = {"test_far": 0.003, "test_far_high": 0.006, "test_tar": 0.88, "test_tar_at_far": 0.95}


@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({}, True),
        ({"test_far": 0.0, "test_far_high": 0.004}, True),
        ({"test_tar_at_far": None}, True),  # what it costs is not known
        ({"test_tar_at_far": 0.885}, False),  # costs next to nothing
        ({"test_far_high": 0.011}, False),  # chance can explain it
        ({"test_far": 0.0055}, False),  # not so far below
    ],
)
def test_a_threshold_that_is_far_too_strict(change, fires):
    found = diagnose(Evidence(fitted=replace(FITTED, **STRICT | change)))
    assert names(found) == ["strict-threshold"] * fires
    if not change:
        assert "accepts 0.003 of those of 100 test identities" in found.findings[0].seen
        assert "88.0% of the similar ones" in found.findings[0].seen
        assert "would accept 95.0%" in found.findings[0].seen


def test_too_few_identities_to_judge_a_threshold_are_reported():
    """With 4 per side even a rate of 1 could be chance, and there is no interval."""
    few = replace(FITTED, n_identities=4, test_identities=4, test_far=0.001)
    asked = diagnose(Evidence(fitted=few))
    reason = "enough identities to tell from chance"
    assert asked.not_asked[reason] == ("overfit-threshold", "strict-threshold")
    more = diagnose(Evidence(fitted=replace(few, n_identities=100, test_identities=100)))
    assert more.not_asked[reason] == ("strict-threshold",)


@pytest.mark.parametrize(
    ("claimed", "low", "high", "fires"),
    [
        (0.99, 0.8, 0.96, True),  # 99 times, at most 24
        (0.99, 0.8, 0.98, False),  # 99 times, at most 49
        (0.99, 0.999, 1.0, False),  # claims too little
        (0.01, 0.04, 0.2, True),
        (0.01, 0.02, 0.2, False),
        (0.01, 0.0, 0.001, False),
        (0.6, 0.1, 0.3, True),  # on the other side
        (0.5, 0.4, 0.6, False),
    ],
)
def test_a_probability_that_claims_too_much(claimed, low, high, fires):
    fine = Claim(0.5, Figure(0.5, 0.45, 0.55))
    few = Claim(0.999, Figure(0.1))  # without an interval
    claims = [fine, Claim(claimed, Figure((low + high) / 2, low, high)), few]
    assert names(diagnose(Evidence(claims=claims))) == ["overconfident-probability"] * fires


def test_a_claim_is_told_in_times():
    found = diagnose(Evidence(claims=[Claim(0.99, Figure(0.9, 0.8, 0.95))])).findings[0]
    assert "said to be 99 times as likely for same pairs as for different ones" in found.seen
    assert found.seen.endswith("are 9 times as likely on test identities.")
    found = diagnose(Evidence(claims=[Claim(0.01, Figure(0.1, 0.05, 0.2))])).findings[0]
    assert "said to be 99 times as likely for different pairs as for same ones" in found.seen
    assert found.seen.endswith("are 9 times as likely on test identities.")


def test_claims_at_the_ends_are_judged_without_an_error():
    ends = [Claim(0.0, Figure(0.0, 0.0, 0.1)), Claim(1.0, Figure(1.0, 0.9, 1.0))]
    assert diagnose(Evidence(claims=ends)).healthy


STALE = nf.Drift(mean=0.3, apart=0.5, n=200, age=64.0)


def test_a_stale_memory():
    (found,) = diagnose(Evidence(drift=STALE)).findings
    assert found.name == "stale-memory"
    assert found.seen.startswith("Stored rows, 64 additions old on average, are at cosine distance")
    assert "0.3 from the present embeddings of their items; those of other items" in found.seen
    assert diagnose(Evidence(drift=replace(STALE, mean=0.25))).healthy
    assert diagnose(Evidence(drift=replace(STALE, mean=0.0, apart=0.0))).healthy


def test_the_memory_of_another_network_is_stale():
    x, _ = clusters()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    bank, items = nf.MemoryBank(100, 16, labels=None), torch.arange(64)
    bank.add(x, ids=items)
    assert diagnose(Evidence(drift=bank.drift(x + 0.2 * x.roll(1, 0), items))).healthy
    assert names(diagnose(Evidence(drift=bank.drift(x @ turn, items)))) == ["stale-memory"]


def test_imbalance():
    x, labels = clusters(n_classes=20)
    assert examine(x, labels).healthy
    (found,) = examine(x, torch.where(torch.arange(80) < 74, 7, labels)).findings
    assert found.name == "imbalance"
    assert "74 of 80 labels are 'class 7'" in found.seen
    assert diagnose(Evidence(commonest=Commonest("dissimilar", 89, 100))).healthy
    assert not diagnose(Evidence(commonest=Commonest("dissimilar", 90, 100))).healthy


def test_leaks_and_duplicates_across_splits():
    x, labels = clusters(n_classes=28)
    train, test = (x[:80], labels[:80]), (x[80:], labels[80:])
    assert examine_split(train=train, test=test) == Diagnosis(())
    assert names(examine_split(train=train, test=(x[80:], labels[79:111]))) == ["identity-leak"]
    copied = x[80:].clone()
    copied[3] = x[4]
    (found,) = examine_split(train=train, test=(copied, labels[80:])).findings
    assert found.name == "duplicates-across-splits"
    assert "1 of 32 items of test are also in train" in found.seen


def test_few_identities_to_learn_from():
    x, labels = clusters(n_classes=40)
    for n, fires in ((19, True), (20, False)):
        seen, new = labels < n, labels >= n
        split = {"train": (x[seen], labels[seen]), "test": (x[new], labels[new])}
        assert names(examine_split(**split)) == ["few-identities"] * fires
    split["learned"] = split.pop("train")  # no side is named "train"
    assert examine_split(**split).not_asked == {'a side named "train"': ("few-identities",)}


def test_a_few_duplicates_in_thousands_are_ignored():
    items = [bytes([i // 256, i % 256]) for i in range(4000)]
    sides = {"one": Side(["a"], items[:2000]), "test": Side(["b"], items[1999:])}
    assert diagnose(Evidence(sides=sides)).healthy
    sides["test"] = Side(["b"], items[1990:])
    assert names(diagnose(Evidence(sides=sides))) == ["duplicates-across-splits"]


def test_fingerprints_are_those_of_the_bits():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    images[7] = images[2]
    prints = fingerprints(images)
    assert prints[7] == prints[2]
    assert len(set(prints)) == len(images.unique(dim=0))


# -- rules that cannot be asked --------------------------------------------------------------------


def silent(diagnosis: Diagnosis) -> set[str]:
    return {name for names in diagnosis.not_asked.values() for name in names}


def test_a_rule_without_evidence_says_so():
    everything = diagnose(Evidence())
    # No towers and no memory were given.
    assert silent(everything) == set(NAMES) - {"unpaired-towers", "stale-memory", *OF_TEXTS}
    x, labels = clusters()
    assert examine(x).not_asked["labels"] == (
        "flipped-labels",
        "one-kind-only",
        "few-positives",
        "imbalance",
    )
    assert "labels" not in examine(x, labels).not_asked
    assert examine(x, labels).not_asked["a loss"] == (
        "dead-batch",
        "unreachable-margin",
        "idle-margin",
        "temperature-too-low",
    )
    with_loss = examine(x, labels, loss=nf.sup_con_loss, temperature=0.1)
    assert silent(with_loss) == {
        "identity-leak",
        "duplicates-across-splits",
        "few-identities",
        "exploding-norms",
        *NAMES[NAMES.index("no-better-than-chance") : -1],
    }


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        (examine(torch.eye(4), [0, 1, 2, 3]), "flipped-labels", "two similar and"),
        (examine(torch.eye(4), [0, 1, 2, 2]), "few-positives", "8 anchors"),
        (examine(torch.eye(8), torch.arange(8) // 2), "imbalance", "20 labels"),
        (examine(torch.eye(9), torch.eye(9).bool()), "imbalance", "class ids"),
        (examine(torch.eye(11)), "dimensional-collapse", "more than 10 dimensions"),
        (examine(torch.eye(1)), "collapsed-embedding", "two finite rows"),
        (examine(torch.eye(4), [0] * 4), "collapsed-embedding", "two dissimilar pairs"),
        (diagnose(Evidence(history=[{"loss": 1.0}])), "exploding-norms", "20 steps with"),
        (diagnose(Evidence(drift=nf.Drift(1.0, 1.0, 15, 3.0))), "stale-memory", "16 items that"),
        (diagnose(Evidence(drift=STALE, progress=0.2)), "stale-memory", "a quarter of the"),
        (diagnose(Evidence(sides={"a": Side("x"), "b": Side("y")})), "duplicates-", "the items"),
        (diagnose(Evidence(fitted=replace(FITTED, n_pairs=None))), "coarse-threshold", "the numb"),
        (diagnose(Evidence(claims=[])), "overconfident-probability", "enough identities"),
        (
            diagnose(Evidence(claims=[Claim(0.9, Figure(0.1))])),
            "overconfident-probability",
            "enough identities",
        ),
        (diagnose(Evidence()), "overconfident-probability", 'a probability of "same"'),
        (
            examine(*clusters(2, 3), loss=nf.sup_con_loss, temperature=0.1),
            "temperature-too-low",
            "anchors with 8 negatives",
        ),
    ],
)
def test_too_little_evidence_differs_from_none(found, name, reason):
    why = [what for what, names in found.not_asked.items() if any(name in n for n in names)]
    assert len(why) == 1
    assert why[0].startswith(reason)


def test_every_finding_has_the_name_of_its_rule():
    assert [name_of(rule) for rule in RULES] == list(NAMES)


def test_a_watch_lists_the_rules_that_were_never_checked():
    watch = Watch()
    watch.see(Evidence(active=torch.ones(4, dtype=torch.bool)), step=1)
    assert "dead-batch" not in silent(watch.diagnosis())
    watch.see(Evidence(positives=torch.ones(9), progress=0.1), step=2)
    assert {"dead-batch", "few-positives"}.isdisjoint(silent(watch.diagnosis()))
    assert "flipped-labels" in silent(watch.diagnosis())


# -- what all of it looks like --------------------------------------------------------------------


def test_many_rows_are_sampled_by_whole_classes():
    """Rows drawn one by one from that many classes would hold hardly any similar pair."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4000, (20_000,), generator=generator)
    centres = torch.randn(4000, 16, generator=generator)
    noise = torch.randn(20_000, 16, generator=generator)
    assert examine(centres[labels] + 0.3 * noise, labels).healthy
    assert "collapsed-embedding" in names(examine(1e4 + noise, labels))
    pairs = of_embeddings(noise, labels, {}).apart
    assert len(pairs.similar) > ROWS  # of rows one by one, some hundred
    assert len(pairs.similar) < len(pairs.dissimilar)
    lopsided = torch.where(torch.arange(20_000) < 19_000, 0, labels + 1)
    assert names(examine(noise, lopsided)) == ["imbalance"]
    assert ROWS < 20_000


def test_multi_labels():
    x, labels = clusters()
    assert examine(x, torch.nn.functional.one_hot(labels).bool()).healthy


def test_a_diagnosis_prints_and_goes_to_json_and_back():
    found = examine(torch.zeros(4, 2), [0, 1, 2, 3])
    assert not found.healthy
    assert str(found).startswith("! collapsed-embedding: Half of the dissimilar pairs")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [Finding.of(item) for item in plain["findings"]] == list(found.findings)
    assert plain["not_asked"] == {what: list(names) for what, names in found.not_asked.items()}
    assert "\nnot checked, without a loss: dead-batch, unreachable-margin, " in str(found)
    assert str(Diagnosis(())).startswith("healthy")
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as shown:
        console.print(found)
        console.print(Diagnosis(()))
    assert "! collapsed-embedding: Half" in shown.get()
    assert "healthy" in shown.get()
    assert "not checked, without a split: identity-leak" in shown.get()


def test_errors_teach():
    x, labels = clusters()
    with pytest.raises(TypeError, match=r"loss must be given with its hyperparameters \(margin\)"):
        examine(x, labels, margin=1.0)
    with pytest.raises(TypeError, match="labels must be given with loss"):
        examine(x, loss=nf.sup_con_loss)
    with pytest.raises(TypeError, match="nearfar's losses"):
        examine(x, labels, loss=torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match="got 3 labels for 64 rows"):
        examine(x, [0, 1, 2])
    with pytest.raises(TypeError, match=r"train must be a pair \(x, identities\), got Tensor"):
        examine_split(train=x, test=(x, labels))
    with pytest.raises(ValueError, match="give at least two"):
        examine_split(train=(x, labels))
    with pytest.raises(TypeError, match=r"For contrastive_loss over \(x1, x2, y\) use"):
        examine(x, x, loss=nf.contrastive_loss)
    with pytest.raises(TypeError, match="info_nce_loss over"):
        examine(x, x, loss=nf.info_nce_loss, negatives=x)
    with pytest.raises(TypeError, match="the second tower must be given with loss"):
        examine(x, loss=nf.clip_loss, scale=10)
    with pytest.raises(ValueError, match="progress must be a number from 0 to 1, the share"):
        Evidence(progress=50)
    with pytest.raises(ValueError, match="far must be a number from 0 to 1, got 5"):
        replace(FITTED, far=5)


def test_a_watch_says_everything_once():
    watch = Watch()
    dead = Evidence(active=torch.zeros(4, dtype=torch.bool))
    assert [(f.name, f.step) for f in watch.see(dead, step=3)] == [("dead-batch", 3)]
    assert watch.see(dead, step=4) == ()
    assert watch.diagnosis().findings[0].in_short().startswith("step 3, dead-batch: No force")


def test_examining_changes_nothing():
    x, labels = clusters()
    x.requires_grad_()
    before = torch.get_rng_state()
    examine(x, labels, loss=nf.sup_con_loss, temperature=0.1)
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_every_rule_is_documented_with_its_own_section():
    sections = [line[3:] for line in DOCS.read_text().splitlines() if line.startswith("## ")]
    assert [section for section in sections if section in NAMES] == list(NAMES)
    for rule in RULES:
        assert rule.__doc__
    assert {field.name for field in fields(Finding)} == {"name", "seen", "means", "advice", "step"}
