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
    Commonest,
    Diagnosis,
    Evidence,
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
from nearfar.spectrum import effective_rank

DOCS = Path(__file__).parent.parent / "docs" / "doctor.md"
NAMES = (
    "not-a-number",
    "dead-batch",
    "flipped-labels",
    "identity-leak",
    "duplicates-across-splits",
    "unreachable-margin",
    "idle-margin",
    "collapsed-embedding",
    "dimensional-collapse",
    "one-kind-only",
    "few-positives",
    "temperature-too-low",
    "exploding-norms",
    "no-better-than-chance",
    "overfit-threshold",
    "coarse-threshold",
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
def test_healthy_batches_are_left_in_peace(loss, settings, noise):
    x, labels = clusters(noise=noise)
    assert examine(x, labels, loss=loss, **settings).healthy
    assert examine(x, labels).healthy
    assert examine(x).healthy


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 8), st.sampled_from([2, 8, 64]))
def test_embeddings_that_know_nothing_are_no_fault(seed, n_classes, n_items, d):
    x, labels = clusters(n_classes, n_items, d, noise=100.0, seed=seed)
    assert examine(x, labels, loss=nf.sup_con_loss, temperature=0.1).healthy


def test_a_module_and_its_function_are_one():
    x, labels = clusters()
    module = nf.BatchContrastiveLoss(margin=3.0, distance="cosine")
    by_hand = examine(x, labels, loss=nf.batch_contrastive_loss, margin=3.0, distance="cosine")
    assert examine(x, labels, loss=module) == by_hand
    assert names(by_hand) == ["unreachable-margin"]


def test_nothing_known_is_nothing_found():
    assert diagnose(Evidence()) == Diagnosis(())
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
def test_dead_steps_of_a_training(losses, dead):
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


def test_what_training_should_have_achieved_is_not_asked_at_its_beginning():
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


def test_a_loss_that_stands_where_identical_embeddings_put_it():
    x, labels = clusters()
    near = torch.nn.functional.normalize(10 * x[:1] + 0.1 * x)  # some 5 % of the length apart
    check = {"loss": nf.batch_contrastive_loss, "margin": 1.0}
    stuck = examine(near, labels, **check | {"margin": 100.0})
    assert "as for identical embeddings" in stuck.findings[-1].seen
    # As near, but where so small a margin makes a difference, they are on their way.
    assert "collapsed-embedding" not in names(examine(near, labels, **check | {"margin": 0.1}))


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
    ("auc", "fires"), [(None, False), (0.3, False), (0.5, True), (0.54, True), (0.56, False)]
)
def test_a_verifier_that_is_a_coin(auc, fires):
    found = names(diagnose(Evidence(fitted=replace(FITTED, test_auc=auc))))
    assert found == ["no-better-than-chance"] * fires


def test_chance_does_not_overfit_a_threshold():
    """Each identity has an error rate of its own, so that its pairs depend on each other."""
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


def test_too_few_pairs_for_a_rate():
    assert diagnose(Evidence(fitted=FITTED)).healthy
    (found,) = diagnose(Evidence(fitted=replace(FITTED, n_pairs=299))).findings
    assert found.name == "coarse-threshold"
    assert "at least 300 dissimilar pairs" in found.advice
    assert diagnose(Evidence(fitted=replace(FITTED, n_pairs=300))).healthy
    assert diagnose(Evidence(fitted=replace(FITTED, far=0.0, n_pairs=10))).healthy


def test_imbalance():
    x, labels = clusters(n_classes=20)
    assert examine(x, labels).healthy
    (found,) = examine(x, torch.where(torch.arange(80) < 74, 7, labels)).findings
    assert found.name == "imbalance"
    assert "74 of 80 labels are 'class 7'" in found.seen
    assert diagnose(Evidence(commonest=Commonest("dissimilar", 89, 100))).healthy
    assert not diagnose(Evidence(commonest=Commonest("dissimilar", 90, 100))).healthy


def test_leaks_and_duplicates_across_splits():
    x, labels = clusters()
    train, test = (x[:32], labels[:32]), (x[32:], labels[32:])
    assert examine_split(train=train, test=test).healthy
    assert names(examine_split(train=train, test=(x[32:], labels[31:63]))) == ["identity-leak"]
    copied = x[32:].clone()
    copied[3] = x[4]
    (found,) = examine_split(train=train, test=(copied, labels[32:])).findings
    assert found.name == "duplicates-across-splits"
    assert "1 of 32 items of test are also in train" in found.seen


def test_a_few_duplicates_in_thousands_are_no_finding():
    items = [bytes([i // 256, i % 256]) for i in range(4000)]
    sides = {"train": Side(["a"], items[:2000]), "test": Side(["b"], items[1999:])}
    assert diagnose(Evidence(sides=sides)).healthy
    sides["test"] = Side(["b"], items[1990:])
    assert names(diagnose(Evidence(sides=sides))) == ["duplicates-across-splits"]


def test_fingerprints_are_those_of_the_bits():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    images[7] = images[2]
    prints = fingerprints(images)
    assert prints[7] == prints[2]
    assert len(set(prints)) == len(images.unique(dim=0))


# -- what all of it looks like --------------------------------------------------------------------


def test_many_rows_are_looked_at_by_whole_classes():
    """Rows drawn one by one from so many classes would hold hardly a similar pair."""
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
    assert str(found).startswith("! collapsed-embedding: Half of the dissimilar rows")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [Finding.of(item) for item in plain["findings"]] == list(found.findings)
    assert str(Diagnosis(())).startswith("healthy")
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as shown:
        console.print(found)
        console.print(Diagnosis(()))
    assert "! collapsed-embedding: Half" in shown.get()
    assert "healthy" in shown.get()


def test_errors_teach():
    x, labels = clusters()
    with pytest.raises(TypeError, match="margin belong to a loss: pass loss="):
        examine(x, labels, margin=1.0)
    with pytest.raises(TypeError, match="labels must be given with loss"):
        examine(x, loss=nf.sup_con_loss)
    with pytest.raises(TypeError, match="nearfar's losses"):
        examine(x, labels, loss=torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match="got 3 labels for 64 rows"):
        examine(x, [0, 1, 2])
    with pytest.raises(TypeError, match=r"train must be a pair \(x, identities\), got Tensor"):
        examine_split(train=x)


def test_a_watch_says_everything_once():
    watch = Watch()
    dead = Evidence(active=torch.zeros(4, dtype=torch.bool))
    assert [(f.name, f.step) for f in watch.see(dead, step=3)] == [("dead-batch", 3)]
    assert watch.see(dead, step=4) == ()
    assert watch.diagnosis().findings[0].in_short().startswith("step 3, dead-batch: No force")


def test_looking_changes_nothing():
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
