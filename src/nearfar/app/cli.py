"""The command `nearfar`: runs one of `commands` and reports any error in one line."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType

from nearfar.app.errors import InputError
from nearfar.app.names import SWEPT
from nearfar.app.text import printable

INTERRUPTED = 130
VALUED = {  # commands whose items may begin with a minus, and their options with a value
    "verify": ("--prior",),
    "search": ("--prior", "--k", "--far"),
}
LIST_OPTIONS = tuple(f"--{name}" for name in SWEPT)
APP_LIBRARIES = (
    "altair",
    "jinja2",
    "lightning_fabric",
    "PIL",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tomli_w",
    "typer",
    "vl_convert",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for an error that the user can fix.

    Args:
        arguments: the arguments after `nearfar`; None for those of this process.
    """
    # Waiting OpenMP threads spin by default, which takes cores away from other processes. OpenMP
    # reads this variable once, when torch is loaded; only the commands load it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["sweep"]:
        given = _repeat_options(given)
    elif given[:1] and given[0] in VALUED:
        given = _items_after_options(given)
    _escape_unprintable_output()
    try:
        with _termination_as_interrupt():
            return _run(given)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in APP_LIBRARIES:
            raise
        return _fail(f"the command line tool needs {missing.name}: pip install 'nearfar[app]'")
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing unfinished is left", INTERRUPTED)
    except OSError as error:  # missing permission, a full disk
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:  # exit status 1 would mean "different" or "something was found"
        if _is_out_of_memory(error):
            return _fail(
                "memory ran out. Lower --identities and --items for smaller batches, --image-size "
                "for smaller data, or --embedding-dim for a smaller network."
            )
        traceback.print_exc()
        return _fail("this is a bug in nearfar, not in what you typed: please report it")


def _run(arguments: list[str]) -> int:
    import typer

    from nearfar.app.commands import app

    try:
        status = app(arguments, prog_name="nearfar", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # which typer's usage errors have
            raise
        message = error.format_message().rstrip(".")
        return _fail(f"{message}. {_help(error)}") if message else 2  # an empty one: help was shown
    if status == INTERRUPTED:  # how newer versions of typer report Ctrl-C; older ones raise Abort
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _repeat_options(given: list[str]) -> list[str]:
    """Turn `--margin 0.5 1` into `--margin 0.5 --margin 1`, the way typer takes lists.

    >>> _repeat_options(["sweep", "DATA", "--loss", "a", "b", "--json", "--out=x"])
    ['sweep', 'DATA', '--loss', 'a', '--loss', 'b', '--json', '--out=x']
    """
    repeated: list[str] = []
    option, values = "", 0
    for word in given:
        if word.startswith("--"):
            option, values = word, 0
        elif option in LIST_OPTIONS:
            values += 1
            if values > 1:
                repeated.append(option)
        repeated.append(word)
    return repeated


def _items_after_options(given: list[str]) -> list[str]:
    """Put the items after `--`: a vector may begin with a minus, which looks like an option.

    >>> _items_after_options(["verify", "RUN", "-1 2", "0 2", "--json"])
    ['verify', '--json', '--', 'RUN', '-1 2', '0 2']
    >>> _items_after_options(["verify", "RUN", "--prior", "0.1", "-1 2", "0 2"])
    ['verify', '--prior', '0.1', '--', 'RUN', '-1 2', '0 2']
    """
    command, *words = given
    if "--" in words:
        return given
    options: list[str] = []
    items: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        of_option = word.startswith("--") or before in VALUED[command]
        (options if of_option else items).append(word)
    return [command, *options, "--", *items]


def _fail(message: str, status: int = 2) -> int:
    print("nearfar: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return status


def _escape_unprintable_output() -> None:
    """Let no command fail over a path that is not UTF-8 or a letter the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a CPU or GPU ran out of memory; compares names, so that torch need not be loaded."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"See {context.command_path if context else 'nearfar'} --help."


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Handle termination signals like Ctrl-C, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.signal(number, _interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
