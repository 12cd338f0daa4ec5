"""`nearfar audit`: what is wrong with labelled data, before anything is trained on it."""

from collections.abc import Callable
from math import floor
from pathlib import Path

import torch
from torch import Tensor

from nearfar.app.audit.alike import duplicates, merged, two_in_one
from nearfar.app.audit.broken import broken
from nearfar.app.audit.findings import Audit, Finding
from nearfar.app.audit.judge import Judged, judge
from nearfar.app.audit.spaces import given, learned
from nearfar.app.data.items import Items, holds_pairs, items_of, read_data
from nearfar.app.data.reads import Reads
from nearfar.app.data.text_tables import holds_identities
from nearfar.app.errors import InputError
from nearfar.app.tables import SUFFIXES as TABLES
from nearfar.app.train.measure import embed_items
from nearfar.app.train.run import read_run

# A label is doubted if another identity is e times as alike as its own, and dropped from e^3 on,
# which is a confidence of 0.95.
DOUBTED, DROPPED = 0.73, 0.95
# Identities are looked at for two in one if so large a share of the items is likest its own, apart
# from errors that were found. On the built-in letters, pixels reach 0.78 (0.86 without what they
# take for errors), and would call one identity in 28 two.
TELL_APART = 0.9

Say = Callable[[str], None]


def audit(
    source: str, *, run: Path | None = None, identity_depth: int | None = None, say: Say
) -> Audit:
    """Look for broken files, wrong labels, duplicates, and identities that are two or are one.

    Args:
        source: DATA, with identities.
        run: a run whose network tells the items apart. None: networks are trained here, each on
            half of the items, and judge the other half.
        identity_depth: for a folder, the depth of the subfolders that are identities.
        say: called with a line of text about what is done.

    Raises:
        InputError: the data cannot be read, or have no identities that can be compared.
    """
    if holds_pairs(source):
        raise InputError(
            f"{source} is a table of pairs. Audit data with identities: a folder, or an .npz with "
            "x and y."
        )
    say(f"reading {source}")
    found = broken(source, identity_depth)
    network = None if run is None else read_run(run).embedder
    reads = _reads(source) if network is None else network.reads
    drop = {one.name for one in found}
    data = read_data(source, reads, identity_depth=identity_depth, drop=drop)
    items = items_of(data)
    if len(items.identities) < 2:
        raise InputError(f"{source} has a single identity: there is no other to compare it with.")
    say(f"  {len(items.names):,} items, {len(items.identities):,} identities")
    raw = given(items)
    say("comparing items as they are")
    judged = judge(raw, items.identity)
    same = duplicates(items, raw, judged)
    if network is not None:
        say(f"comparing items by the network of {run}")
        raw = embed_items(network, items, torch.arange(len(items.names)))
        judged = judge(raw, items.identity)
    unlearned = judged
    better = None if network is not None else learned(items, say)
    if better is not None and better.agreement() > judged.agreement():
        judged = better
        say("  the networks agree with more labels than the items as they are: they judge")
    one = merged(items, judged)
    labels = doubted(items, judged, one)
    found += [*labels, *same, *one]
    kept = _kept(items, labels)
    told = unlearned.agreement(kept & ~_in_merge(items, one))
    if told >= TELL_APART:
        found += two_in_one(items, raw, kept)
    n = len(items.names) + len(drop)
    return Audit(source, n, len(items.identities), tuple(found), _unchecked(told, run))


def _unchecked(told: float, run: Path | None) -> tuple[str, ...]:
    """What is said if too few items are likest their own identity."""
    if told >= TELL_APART:
        return ()
    by, way = ("as they are", ", or add --run RUN") if run is None else (f"by {run}", "")
    return (
        f"not checked for identities that are two: {by}, only {floor(100 * told)} % of the items "
        f"are likest their own ({100 * TELL_APART:.0f} % are needed). Correct what was found and "
        f"audit again{way}.",
    )


def _kept(items: Items, labels: list[Finding]) -> Tensor:
    """(n,) bool: items whose label is not so doubtful that they are dropped."""
    dropped = {finding.name for finding in labels if finding.drop}
    return torch.tensor([name not in dropped for name in items.names])


def _in_merge(items: Items, one: list[Finding]) -> Tensor:
    """(n,) bool: items of identities that are likely one, and so as like the other as their own."""
    mixed = {name for finding in one for name in (finding.identity, finding.suggested)}
    return torch.tensor([name in mixed for name in items.identities])[items.identity]


def _reads(source: str) -> Reads:
    """What is read if no network says so: texts, if the columns of a table say so."""
    path = Path(source)
    return Reads(texts=path.suffix.lower() in TABLES and holds_identities(path))


def doubted(items: Items, judged: Judged, one: list[Finding]) -> list[Finding]:
    """Items that another identity is likely to own, surest first.

    Args:
        items: the items.
        judged: what their likeness says.
        one: identities that are likely one; between them, no label is doubted.
    """
    known = {frozenset((finding.identity, finding.suggested)) for finding in one}
    found = []
    for row in judged.margin.argsort(descending=True, stable=True).tolist():
        confidence = float(judged.margin[row].sigmoid())
        if confidence < DOUBTED:
            break
        own = items.identities[int(items.identity[row])]
        suggested = items.identities[int(judged.suggested[row])]
        if frozenset((own, suggested)) not in known:
            other = items.names[int(judged.other[row])]
            found.append(
                Finding(
                    "label",
                    items.names[row],
                    own,
                    suggested,
                    confidence,
                    other,
                    drop=confidence >= DROPPED,
                )
            )
    return found
