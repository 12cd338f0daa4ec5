"""Libraries that only a part of nearfar needs, and the extra that installs each."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around an import: an error says which extra to install.

    The library is missing, or a module of it, which an older version does not have.

    >>> with needs("pml"):
    ...     import a_library_that_is_missing
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: a_library_that_is_missing is not installed: pip install 'nearfar[pml]'
    >>> with needs("pml"):
    ...     import numpy.a_module_that_is_new
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: numpy is too old: pip install -U 'nearfar[pml]'
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        library, _, part = (missing.name or "a library").partition(".")
        what, how = ("too old", "install -U") if part else ("not installed", "install")
        raise ModuleNotFoundError(
            f"{library} is {what}: pip {how} 'nearfar[{extra}]'", name=missing.name
        ) from None
