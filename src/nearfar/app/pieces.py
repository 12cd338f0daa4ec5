"""A Parquet file that is written piece by piece, and goes on where it was stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.app.errors import InputError
from nearfar.app.output import whole_file

_SETTINGS = "settings.json"
_KEY = b"nearfar"  # of what is said about a piece


@dataclass(frozen=True, eq=False)
class Pieces:
    """The finished pieces of a file, in a folder beside it.

    Attributes:
        out: the file.
        settings: plain values; all that decides what the pieces hold.
        folder: where the pieces are until all are there.
    """

    out: Path
    settings: Mapping[str, Any]
    folder: Path

    @classmethod
    def begin(cls, out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> "Pieces":
        """Go on with the pieces that there are, if they were made with these settings.

        Args:
            out: the file to write.
            settings: as above.
            overwrite: whether `out`, and pieces made with other settings, are replaced.

        Raises:
            InputError: `out` exists, or its pieces were made with other settings.
        """
        pieces = cls(out, settings, out.with_name(f"{out.name}.parts"))
        if out.is_dir() or (out.exists() and not overwrite):
            raise InputError(
                f"{out} exists. Choose another --out, or add --overwrite to replace it."
            )
        if pieces._is_empty():
            pieces.remove()
        if not pieces.folder.exists():
            return pieces
        held = pieces._held()
        other = [name for name in {**settings, **held} if held.get(name) != settings.get(name)]
        if other and pieces._finished() and not overwrite:
            raise InputError(
                f"{pieces.folder} holds pieces made with {other[0]} {held.get(other[0])!r}, not "
                f"{settings.get(other[0])!r}. Repeat the first command to go on, or add "
                "--overwrite to begin anew."
            )
        if other:
            pieces.remove()
        return pieces

    def has(self, number: int) -> bool:
        """Whether a piece is finished, and can still be read."""
        import pyarrow
        from pyarrow.parquet import read_metadata

        try:
            read_metadata(self._path(number))
        except (pyarrow.ArrowException, OSError):
            return False
        return True

    def write(self, number: int, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write a piece, completely or not at all.

        Args:
            number: which.
            columns: its columns, NumPy arrays of numbers or lists of text.
            about: plain values that are said about it.
        """
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.string()  # of an empty list, the type would not be known
        cells = {
            name: pyarrow.array(held, text) if isinstance(held, list) else pyarrow.array(held)
            for name, held in columns.items()
        }
        table = pyarrow.table(cells).replace_schema_metadata({_KEY: json.dumps(about).encode()})
        if not (self.folder / _SETTINGS).exists():
            with whole_file(self.folder / _SETTINGS) as file:
                file.write(json.dumps(self.settings, indent=2).encode())
        with whole_file(self._path(number)) as file:
            pyarrow.parquet.write_table(table, file)

    def join(self, n: int) -> tuple[int, list[dict[str, Any]]]:
        """Put all n pieces into the file, and remove them.

        Returns:
            The number of rows, and what was said about each piece.
        """
        from pyarrow.parquet import ParquetWriter

        settings = {_KEY: json.dumps(self.settings).encode()}
        schema = self._read(0).schema.with_metadata(settings)
        rows, about = 0, []
        with whole_file(self.out) as file, ParquetWriter(file, schema) as writer:
            for number in range(n):
                table = self._read(number)
                about.append(json.loads(table.schema.metadata[_KEY]))
                writer.write_table(table.replace_schema_metadata(settings))
                rows += table.num_rows
        self.remove()
        return rows, about

    def _read(self, number: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        path = self._path(number)
        try:
            return pyarrow.parquet.ParquetFile(path).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}. Delete it and try again.") from None

    def remove(self) -> None:
        """Delete the pieces, and the folder unless it holds anything else."""
        for path in (*self._finished(), *self._unfinished(), self.folder / _SETTINGS):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def _finished(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def _unfinished(self) -> list[Path]:
        """What `whole_file` left when the process was killed."""
        patterns = (".[0-9]*.parquet.*", f".{_SETTINGS}.*")
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    def _is_empty(self) -> bool:
        """Whether there is a folder in which nothing was finished."""
        return self.folder.is_dir() and set(self.folder.iterdir()) <= set(self._unfinished())

    def _held(self) -> dict[str, Any]:
        try:
            held = json.loads((self.folder / _SETTINGS).read_bytes())
        except (OSError, ValueError):
            held = None
        if not isinstance(held, dict):
            raise InputError(
                f"{self.folder} exists and holds no pieces of {self.out.name}. Move it elsewhere, "
                "or choose another --out."
            )
        return held
