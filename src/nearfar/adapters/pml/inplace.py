"""What losses and miners share: each is a class of theirs, of which nearfar does the computing.

A class keeps the constructor, the attributes and the `forward` of theirs. Settings are read from
the attributes in each step, as theirs do.
"""

from typing import Any

from nearfar.adapters.pml.measures import Measure


class InPlaceOfTheirs:
    """Comes before a class of theirs; what nearfar cannot say is an error of the constructor."""

    distance: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings()

    def settings(self) -> dict[str, Any]:
        """What the function of nearfar takes besides its data.

        Raises:
            TypeError: nearfar does not have the distance.
        """
        raise NotImplementedError

    @property
    def measure(self) -> Measure:
        return Measure.read(self.distance)
