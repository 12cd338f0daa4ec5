"""`nearfar audit`: what is wrong with labelled data, before anything is trained on it."""

from collections.abc import Callable
from pathlib import Path

import torch

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
# Identities are looked at for two in one if so large a share of the items is likest its own. Pixels
# reach 0.7 on the built-in letters, where one identity in eight would be called two.
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
    found += [*doubted(items, judged, one), *same, *one]
    if unlearned.agreement() >= TELL_APART:
        found += two_in_one(items, raw)
    else:
        say("  as they are, items are too seldom likest their own identity to show two in one")
    return Audit(source, len(items.names) + len(drop), len(items.identities), tuple(found))


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
