"""An image that came as bytes, not as a file."""

from dataclasses import dataclass
from io import BytesIO
from typing import Literal


@dataclass(frozen=True, eq=False)
class Upload:
    """Bytes that are read like a file, and never written to one.

    Attributes:
        name: what messages call it.
        content: the bytes.
    """

    name: str
    content: bytes

    def open(self, mode: Literal["rb"] = "rb") -> BytesIO:
        """As `Path.open`."""
        return BytesIO(self.content)

    def __str__(self) -> str:
        return self.name
