"""All rules, in order of importance."""

from collections.abc import Callable

from nearfar.doctor.embedding_rules import (
    collapsed_embedding,
    dimensional_collapse,
    exploding_norms,
    not_a_number,
)
from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Diagnosis, Finding
from nearfar.doctor.label_rules import (
    duplicates_across_splits,
    few_positives,
    flipped_labels,
    identity_leak,
    imbalance,
    one_kind_only,
)
from nearfar.doctor.loss_rules import (
    dead_batch,
    dead_batches,
    idle_margin,
    temperature_too_low,
    unreachable_margin,
)
from nearfar.doctor.threshold_rules import (
    coarse_threshold,
    no_better_than_chance,
    overfit_threshold,
)

RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_a_number,
    dead_batch,
    dead_batches,
    flipped_labels,
    identity_leak,
    duplicates_across_splits,
    unreachable_margin,
    idle_margin,
    collapsed_embedding,
    dimensional_collapse,
    one_kind_only,
    few_positives,
    temperature_too_low,
    exploding_norms,
    no_better_than_chance,
    overfit_threshold,
    coarse_threshold,
    imbalance,
)


def diagnose(evidence: Evidence) -> Diagnosis:
    """Ask every rule; one whose evidence is missing stays silent."""
    return Diagnosis(tuple(found for rule in RULES if (found := rule(evidence)) is not None))
