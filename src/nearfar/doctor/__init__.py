"""What can go wrong in contrastive training, each fault a rule with a name.

`examine` looks at embeddings, a batch and its loss; `examine_split` at the sides of a split;
`Watch` listens to a training. All of them gather `Evidence`, which `diagnose` shows to every rule,
and return findings: what was seen, in numbers, what it usually means, and what to try. A rule is a
function from evidence to a `Finding` or None, and raises `Missing` where it has nothing to look at.
`docs/doctor.md` describes them one by one.
"""

from nearfar.doctor.evidence import (
    Apart,
    Commonest,
    Evidence,
    Figure,
    Fitted,
    Matches,
    Side,
    Spectrum,
)
from nearfar.doctor.examine import examine, examine_split
from nearfar.doctor.finding import Diagnosis, Finding, Missing
from nearfar.doctor.rules import RULES, diagnose
from nearfar.doctor.watch import Watch

__all__ = [
    "RULES",
    "Apart",
    "Commonest",
    "Diagnosis",
    "Evidence",
    "Figure",
    "Finding",
    "Fitted",
    "Matches",
    "Missing",
    "Side",
    "Spectrum",
    "Watch",
    "diagnose",
    "examine",
    "examine_split",
]
