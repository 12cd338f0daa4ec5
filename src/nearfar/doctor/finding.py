"""What the doctor says: a finding, and all of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        step: of a training, when it was first seen; None where no step belongs to it.
    """

    name: str
    seen: str
    means: str
    advice: str
    step: int | None = None

    @property
    def text(self) -> str:
        """All but the name, in one paragraph."""
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
        """The way back from `as_dict`."""
        return cls(**{name: found[name] for name in ("name", "seen", "means", "advice", "step")})


@dataclass(frozen=True)
class Diagnosis:
    """What all rules have to say; prints, and goes to JSON.

    Attributes:
        findings: in order of importance; empty where all is well.
    """

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"healthy": self.healthy, "findings": [found.as_dict() for found in self.findings]}

    def __str__(self) -> str:
        return "\n".join(f"! {finding}" for finding in self.findings) or _NOTHING

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        said = [Text.assemble((f"! {f.name}: ", "bold yellow"), f.text) for f in self.findings]
        return Group(*said or [Text(_NOTHING, "green")])


_NOTHING = "healthy: no rule found anything wrong in what there was to look at"
