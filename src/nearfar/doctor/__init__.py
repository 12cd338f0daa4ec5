"""What can go wrong in contrastive training: one named rule per fault.

`examine` checks embeddings, or at a batch and its loss; `examine_split` at the sides of a split;
`Watch` follows a training run. Each gathers `Evidence`, which `diagnose` passes to every rule, and
returns findings: what was seen, in numbers, what it usually means, and what to try. A rule is a
function from evidence to a `Finding` or None; it raises `Missing` if it lacks the data it needs.
`docs/doctor.md` describes the rules one by one.
"""

from nearfar.doctor.evidence import (
    Apart,
    Claim,
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
from nearfar.doctor.texts import Copies, Crossing, CutOff, TextFacts
from nearfar.doctor.watch import Watch

__all__ = [
    "RULES",
    "Apart",
    "Claim",
    "Commonest",
    "Copies",
    "Crossing",
    "CutOff",
    "Diagnosis",
    "Evidence",
    "Figure",
    "Finding",
    "Fitted",
    "Matches",
    "Missing",
    "Side",
    "Spectrum",
    "TextFacts",
    "Watch",
    "diagnose",
    "examine",
    "examine_split",
]
