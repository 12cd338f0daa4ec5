"""A page and a JSON door on loopback, to show a run to colleagues: `nearfar serve`."""

from nearfar.app.serve.answers import Answers
from nearfar.app.serve.door import Door, open_door

__all__ = ["Answers", "Door", "open_door"]
