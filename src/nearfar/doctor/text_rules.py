"""Rules about texts, which do not apply to other data."""

from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Finding, Missing

FEWEST_PAIRS = 20
ENCODER = "an encoder"


def copied_texts(evidence: Evidence) -> Finding | None:
    """One in a thousand texts has a copy where there should be none, but for case and punctuation.

    Such copies are labelled dissimilar, have two identities, or lie on two sides of a split.
    Compared are texts after NFKC and case folding, without punctuation and spaces at the ends
    (Unicode Standard Annex 15; Lee et al., "Deduplicating training data makes language models
    better", ACL 2022). Fewer cannot move a rate by more than a tenth of a percentage point.
    """
    if evidence.texts is None:
        return None
    for copies in evidence.texts.copies:
        if copies.n and copies.n >= copies.total / 1000:
            shown = " and ".join(f"{text!r:.80}" for text in copies.example)
            return Finding(
                "copied-texts",
                f"{copies.n:,} of {copies.total:,} {copies.what}, but for case, spaces and "
                f"punctuation ({shown}).",
                "What the labels call different, no encoder can tell apart; or an item was "
                "collected twice under two identities.",
                "Give copies one identity, or remove them, and split again.",
            )
    return None


def cut_off_texts(evidence: Evidence) -> Finding | None:
    """The encoder reads only the beginning of at least one text in a hundred."""
    if evidence.texts is None:
        return None
    if (cut := evidence.texts.cut) is None:
        raise Missing(ENCODER)
    if not cut.n or cut.n < cut.total / 100:
        return None
    return Finding(
        "cut-off-texts",
        f"{cut.n:,} of {cut.total:,} texts have more than {cut.limit} tokens, which is all that "
        f"the encoder reads. The longest has {cut.tokens:,}: {cut.longest!r:.80}",
        "Texts that differ only after that are the same to it.",
        "Put first what tells texts apart, cut them into parts, or take an encoder that reads more "
        "(max_seq_length).",
    )


def telling_scripts(evidence: Evidence) -> Finding | None:
    """At most 1 % of similar pairs, but half of the dissimilar ones, are across two scripts.

    Then the script alone tells most dissimilar pairs apart, a shortcut (Geirhos et al., "Shortcut
    learning in deep neural networks", 2020). Needs 20 pairs of each kind.
    """
    if evidence.texts is None:
        return None
    found = evidence.texts.crossing
    if min(found.n_similar, found.n_dissimilar) < FEWEST_PAIRS:
        raise Missing(f"{FEWEST_PAIRS} similar and {FEWEST_PAIRS} dissimilar pairs of texts")
    similar, dissimilar = found.similar / found.n_similar, found.dissimilar / found.n_dissimilar
    if similar > 0.01 or dissimilar < 0.5:
        return None
    return Finding(
        "telling-scripts",
        f"{dissimilar:.0%} of dissimilar pairs are written in two scripts, but {similar:.1%} of "
        f"similar ones ({', '.join(found.scripts)}).",
        "The script alone tells most dissimilar pairs apart, so the encoder need not learn more, "
        "and the figures flatter it.",
        "Add dissimilar pairs within a script, and similar ones across scripts; or make a table of "
        "one script and measure on it (nearfar evaluate RUN DATA).",
    )
