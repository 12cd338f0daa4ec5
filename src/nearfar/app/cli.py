"""The command `nearfar`: runs one of `commands.py` and turns what goes wrong into one line."""

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
from nearfar.app.text import printable
from nearfar.app.train.names import SWEPT

INTERRUPTED = 130
LISTS = tuple(f"--{name}" for name in SWEPT)
APP = (
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
    """Run the command line and return its exit status: 2 for whatever the user can put right.

    Args:
        arguments: what follows `nearfar`; None: those of this process.
    """
    # Threads that wait for others spin by default, which takes the cores from whatever else runs.
    # OpenMP reads this once, when torch is loaded, which only the commands do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["sweep"], ["verify"]):
        given = _one_option_a_value(given) if given[0] == "sweep" else _items_after_options(given)
    _write_any_text()
    try:
        with _ended_like_ctrl_c():
            return _run(given)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in APP:
            raise
        return _fail(f"the command line tool needs {missing.name}: pip install 'nearfar[app]'")
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing unfinished is left", INTERRUPTED)
    except OSError as error:  # no right to read, a full disk
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:  # 1 would say "different", or "something was found"
        if _memory_ran_out(error):
            return _fail(
                "memory ran out. Smaller --identities and --items take less for a batch, a smaller "
                "--image-size for the data, a smaller --embedding-dim for the network."
            )
        traceback.print_exc()
        return _fail("this is a mistake in nearfar, not in what you typed: please report it")


def _run(arguments: list[str]) -> int:
    import typer

    from nearfar.app.commands import app

    try:
        status = app(arguments, prog_name="nearfar", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's word for a wrong use of the command line
            raise
        message = error.format_message().rstrip(".")
        return _fail(f"{message}. {_help(error)}") if message else 2  # without one, it showed help
    if status == INTERRUPTED:  # how newer typers report Ctrl-C; older ones raise Abort
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _one_option_a_value(given: list[str]) -> list[str]:
    """`--margin 0.5 1` as `--margin 0.5 --margin 1`, which is how typer takes lists.

    >>> _one_option_a_value(["sweep", "DATA", "--loss", "a", "b", "--json", "--out=x"])
    ['sweep', 'DATA', '--loss', 'a', '--loss', 'b', '--json', '--out=x']
    """
    spread: list[str] = []
    option, values = "", 0
    for word in given:
        if word.startswith("--"):
            option, values = word, 0
        elif option in LISTS:
            values += 1
            if values > 1:
                spread.append(option)
        spread.append(word)
    return spread


def _items_after_options(given: list[str]) -> list[str]:
    """A vector may begin with a minus, which typer takes for an option.

    >>> _items_after_options(["verify", "RUN", "-1 2", "0 2", "--json"])
    ['verify', '--json', '--', 'RUN', '-1 2', '0 2']
    """
    command, *words = given
    if "--" in words:
        return given
    options = [word for word in words if word.startswith("--")]
    items = [word for word in words if not word.startswith("--")]
    return [command, *options, "--", *items]


def _fail(message: str, status: int = 2) -> int:
    print("nearfar: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return status


def _write_any_text() -> None:
    """A path that is no UTF-8, or a letter that the terminal lacks, ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _memory_ran_out(error: Exception) -> bool:
    """Torch has a class for a GPU's, asked by name to load no torch here, and none for a CPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"See {context.command_path if context else 'nearfar'} --help."


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A request to end the process clears unfinished files away, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.signal(end, _interrupt) for end in ends]
    try:
        yield
    finally:
        for end, handler in zip(ends, before, strict=True):
            signal.signal(end, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
