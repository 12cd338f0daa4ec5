"""Libraries that only a part of nearfar needs, and the extra that installs each."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around an import: where the library is missing, the error says which extra to install.

    >>> with needs("pml"):
    ...     import a_library_that_is_missing
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: a_library_that_is_missing is not installed: pip install 'nearfar[pml]'
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        library = (missing.name or "a library").partition(".")[0]
        raise ModuleNotFoundError(
            f"{library} is not installed: pip install 'nearfar[{extra}]'", name=missing.name
        ) from None
