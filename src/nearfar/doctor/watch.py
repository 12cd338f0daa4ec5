"""The doctor during training: each finding once, when it is first seen."""

from dataclasses import replace

from nearfar.doctor.evidence import Evidence
from nearfar.doctor.finding import Diagnosis, Finding, grouped
from nearfar.doctor.rules import ask


class Watch:
    """Passes evidence to the rules as it arrives, and keeps their findings.

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
        self._missing: dict[str, str] | None = None  # rules that could not be checked so far

    def see(self, evidence: Evidence, *, step: int | None = None) -> tuple[Finding, ...]:
        """The new findings.

        Args:
            evidence: what is known now; its `progress` is the share of training that is done.
            step: the training step, stored in new findings.
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
        """All findings so far, oldest first, and the rules that could never be checked."""
        return Diagnosis(tuple(self._found.values()), grouped((self._missing or {}).items()))
