"""All rules, in order of importance."""

from collections.abc import Callable

from nearfar.doctor.embedding_rules import (
    collapsed_embedding,
    dimensional_collapse,
    exploding_norms,
    not_a_number,
    stale_memory,
    unpaired_towers,
)
from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Diagnosis, Finding, Missing, grouped
from nearfar.doctor.label_rules import (
    duplicates_across_splits,
    few_identities,
    few_positives,
    flipped_labels,
    identity_leak,
    imbalance,
    one_kind_only,
)
from nearfar.doctor.loss_rules import (
    dead_batch,
    idle_margin,
    temperature_too_low,
    unreachable_margin,
)
from nearfar.doctor.text_rules import copied_texts, cut_off_texts, telling_scripts
from nearfar.doctor.threshold_rules import (
    coarse_threshold,
    no_better_than_chance,
    no_better_than_raw_input,
    overconfident_probability,
    overfit_threshold,
    strict_threshold,
)

RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_a_number,
    dead_batch,
    flipped_labels,
    identity_leak,
    duplicates_across_splits,
    copied_texts,
    cut_off_texts,
    telling_scripts,
    unreachable_margin,
    idle_margin,
    collapsed_embedding,
    unpaired_towers,
    dimensional_collapse,
    one_kind_only,
    few_positives,
    temperature_too_low,
    exploding_norms,
    stale_memory,
    no_better_than_chance,
    no_better_than_raw_input,
    few_identities,
    overfit_threshold,
    strict_threshold,
    coarse_threshold,
    overconfident_probability,
    imbalance,
)


def diagnose(evidence: Evidence) -> Diagnosis:
    """Check every rule. Rules that lack data are listed in `not_asked`, with what they lack."""
    found, missing = ask(evidence)
    return Diagnosis(tuple(found), grouped(missing.items()))


def ask(evidence: Evidence) -> tuple[list[Finding], dict[str, str]]:
    """The findings; and the names of the rules that cannot be checked, with what they lack."""
    found, missing = [], {}
    for rule in RULES:
        try:
            if (finding := rule(evidence)) is not None:
                found.append(finding)
        except Missing as why:
            missing[name_of(rule)] = why.what
    return found, missing


def name_of(rule: Callable[[Evidence], Finding | None]) -> str:
    """The name of a rule's findings."""
    return rule.__name__.replace("_", "-")
