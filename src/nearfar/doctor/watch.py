"""The doctor while a training runs: every finding once, when it is first seen."""

from dataclasses import replace

from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Diagnosis, Finding, grouped
from nearfar.doctor.rules import ask


class Watch:
    """Shows evidence to the rules as it comes, and keeps what they found.

    >>> import torch
    >>> watch = Watch()
    >>> for step in range(3):
    ...     active = torch.tensor([step == 0])
    ...     for finding in watch.see(Evidence(active=active), step=step):
    ...         print(finding.step, finding.name)
    1 dead-batch
    """

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}
        self._missing: dict[str, str] | None = None  # of the rules that were never asked yet

    def see(self, evidence: Evidence, *, step: int | None = None) -> tuple[Finding, ...]:
        """The findings that are new.

        Args:
            evidence: what is known now; its `progress` says how much of the training is done.
            step: of the training, kept with what is found.
        """
        found, missing = ask(evidence)
        new = tuple(
            replace(finding, step=step) for finding in found if finding.name not in self._found
        )
        self._found |= {finding.name: finding for finding in new}
        never = missing.keys() if self._missing is None else missing.keys() & self._missing.keys()
        self._missing = {name: what for name, what in missing.items() if name in never}
        return new

    def diagnosis(self) -> Diagnosis:
        """All that was found so far, in the order in which it was, and who was never asked."""
        return Diagnosis(tuple(self._found.values()), grouped((self._missing or {}).items()))
