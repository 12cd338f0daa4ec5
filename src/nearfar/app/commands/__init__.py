"""The commands of `nearfar`, their options, and the function that each one calls.

Heavy modules are imported inside the commands, so that --help and usage errors appear at once.
"""

from nearfar.app.commands import (  # noqa: F401 - which declare them
    audit,
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
    *("train", "evaluate", "verify", "embed", "serve", "export"),
    *("enroll", "search", "gallery"),
    *("audit", "doctor", "report", "compare", "sweep", "mine", "explain"),
)
app.registered_commands.sort(key=lambda one: _ORDER.index(getattr(one.callback, "__name__", "")))

__all__ = ["OPTIONS", "app"]
