"""The commands of `nearfar`, their options, and the function that each one calls.

Heavy modules are imported inside the commands, so that --help and usage errors appear at once.
"""

from nearfar.app.commands import (  # noqa: F401 - which declare them
    galleries,
    runs,
    serving,
    tables,
    take_away,
    training,
)
from nearfar.app.commands.declare import OPTIONS, app

# The order in which the help lists them.
_ORDER = (
    "train",
    "evaluate",
    "verify",
    "serve",
    "embed",
    "export",
    "enroll",
    "search",
    "gallery",
    "mine",
    "doctor",
    "report",
    "compare",
    "sweep",
    "explain",
)
app.registered_commands.sort(key=lambda one: _ORDER.index(getattr(one.callback, "__name__", "")))

__all__ = ["OPTIONS", "app"]
