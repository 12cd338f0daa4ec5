"""What the doctor returns: a finding, and a diagnosis of all findings."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Finding:
    """Something wrong: what was seen, in numbers, what it usually means, and what to try.

    Attributes:
        name: of the rule that found it; `docs/doctor.md` has a section of this name.
        seen: the evidence.
        means: what it usually means.
        advice: what to try.
        step: the training step at which it was first seen; None outside of training.
    """

    name: str
    seen: str
    means: str
    advice: str
    step: int | None = None

    @property
    def text(self) -> str:
        """Everything but the name, in one paragraph."""
        when = "" if self.step is None else f"Step {self.step}: "
        return f"{when}{self.seen} {self.means} {self.advice}"

    def in_short(self) -> str:
        """The name and what was seen."""
        when = "" if self.step is None else f"step {self.step}, "
        return f"{when}{self.name}: {self.seen}"

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Finding":
        """The inverse of `as_dict`."""
        said = {name: found[name] for name in ("name", "seen", "means", "advice")}
        return cls(**said, step=found.get("step"))


class Missing(Exception):  # noqa: N818 - not an error: other rules can still be checked
    """Raised by a rule that lacks the data it needs.

    Args:
        what: what the rule lacks, worded to follow "without".
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all rules; prints, and goes to JSON.

    Attributes:
        findings: in order of importance; empty if no rule found anything.
        not_asked: what was missing -> the names of the rules that need it. These rules were not
            checked, so their silence is no sign of health.
    """

    findings: tuple[Finding, ...]
    not_asked: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def healthy(self) -> bool:
        """Whether none of the rules that could be checked found anything."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "healthy": self.healthy,
            "findings": [found.as_dict() for found in self.findings],
            "not_asked": {what: list(names) for what, names in self.not_asked.items()},
        }

    def __str__(self) -> str:
        found = [f"! {finding}" for finding in self.findings] or [_NOTHING]
        return "\n".join([*found, *self._unchecked_lines()])

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        said = [Text.assemble((f"! {f.name}: ", "bold yellow"), f.text) for f in self.findings]
        silent = [Text(line, "dim") for line in self._unchecked_lines()]
        return Group(*said or [Text(_NOTHING, "green")], *silent)

    def _unchecked_lines(self) -> list[str]:
        return [
            f"not checked, without {what}: {', '.join(names)}"
            for what, names in self.not_asked.items()
        ]


def grouped(missing: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """What is missing -> the rules that need it, from (rule, what is missing).

    >>> grouped([("imbalance", "labels"), ("dead-batch", "a loss"), ("flipped-labels", "labels")])
    {'labels': ('imbalance', 'flipped-labels'), 'a loss': ('dead-batch',)}
    """
    groups: dict[str, tuple[str, ...]] = {}
    for name, what in missing:
        groups[what] = (*groups.get(what, ()), name)
    return groups


_NOTHING = "healthy: no rule that could be checked found anything wrong"
