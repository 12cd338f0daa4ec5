"""What an audit finds: one row per finding, printed and written as a table."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nearfar.app.output import whole_file
from nearfar.tabulate import Table

KINDS = {  # what one is, and what several are
    "broken": ("file or row that cannot be used", "files or rows that cannot be used"),
    "label": ("label that is likely wrong", "labels that are likely wrong"),
    "duplicate": ("copy within an identity", "copies within an identity"),
    "shared": ("copy, or nearly, in two identities", "copies, or nearly, in two identities"),
    "merge": ("pair of identities that is likely one", "pairs of identities that are likely one"),
    "split": ("identity that is likely two", "identities that are likely two"),
}


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        what: a key of `KINDS`.
        name: the item; for "merge" and "split", one of the identity.
        identity: the identity that it is given.
        suggested: the identity that it is likely of; for "merge", the other one; else empty.
        confidence: from 0 to 1; None where there is nothing to weigh.
        other: the item that shows it best.
        detail: more, in words.
        drop: whether `train --drop` leaves the item out.
    """

    what: str
    name: str
    identity: str
    suggested: str = ""
    confidence: float | None = None
    other: str = ""
    detail: str = ""
    drop: bool = False


COLUMNS = tuple(field.name for field in fields(Finding))


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        data: as typed.
        n_items: how many items there are, with the broken ones.
        n_identities: how many identities have items that can be used.
        findings: those of one kind together, surest first.
        notes: what was not looked for, and why.
        top: how many of each kind are printed.
    """

    data: str
    n_items: int
    n_identities: int
    findings: Sequence[Finding]
    notes: Sequence[str] = ()
    top: int = 10

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "data": self.data,
            "n_items": self.n_items,
            "n_identities": self.n_identities,
            "counts": {kind: self._counts()[kind] for kind in KINDS},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def render(self) -> Iterator[str | Table]:
        """For a terminal."""
        counts = self._counts()
        if not self.findings:
            yield f"nothing found in {self.n_items:,} items of {self.n_identities:,} identities"
        for kind, (one, several) in KINDS.items():
            if not counts[kind]:
                continue
            found = [finding for finding in self.findings if finding.what == kind]
            rows = [_shown(finding) for finding in found[: self.top]]
            first = f", the first {self.top}" * (counts[kind] > self.top)
            yield f"\n{counts[kind]:,} {one if counts[kind] == 1 else several}{first}:"
            kept = [i for i in range(len(_SHOWN)) if any(row[i] for row in rows)]
            yield Table(
                tuple(_SHOWN[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]
            )
        yield from (f"\n{note}" for note in self.notes)

    def write(self, out: Path) -> None:
        """All findings as .csv or .parquet.

        Raises:
            InputError: the file cannot be written.
        """
        with whole_file(out) as file:
            if out.suffix.lower() == ".parquet":
                self._write_parquet(file)
                return
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(map(_cells, self.findings))
            # With its mark, spreadsheets know that it is UTF-8.
            file.write(text.getvalue().encode("utf-8-sig"))

    def _write_parquet(self, file: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"confidence": pa.float64(), "drop": pa.bool_()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        pq.write_table(pa.Table.from_pylist([asdict(f) for f in self.findings], schema), file)

    def _counts(self) -> Counter[str]:
        return Counter(finding.what for finding in self.findings)


_SHOWN = ("item", "identity", "suggested", "confidence", "other item", "detail")


def _confidence(finding: Finding) -> str:
    return "" if finding.confidence is None else f"{finding.confidence:.3f}"


def _shown(finding: Finding) -> tuple[str, ...]:
    return (
        finding.name,
        finding.identity,
        finding.suggested,
        _confidence(finding),
        finding.other,
        finding.detail,
    )


def _cells(finding: Finding) -> list[str]:
    held = {**asdict(finding), "confidence": _confidence(finding)}
    return [str(held[name]).lower() if name == "drop" else held[name] for name in COLUMNS]
