"""Make text from outside, such as file names, safe to print anywhere."""

import unicodedata

# Unicode categories: control characters, lone surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
# They change the direction of the text that follows, so a name could disguise the line it is in.
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    r"""Escape the characters that a page, a terminal or a file cannot take.

    Python decodes each invalid byte of a file name that is not UTF-8 to a lone surrogate; it is
    printed as that byte.

    >>> print(printable("Zoë\n\x1b[31m"), printable("caf\udce9.png"))
    Zoë\n\x1b[31m caf\xe9.png
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character not in _BIDI_CONTROLS and unicodedata.category(character) not in _UNPRINTABLE:
        return character
    if "\udc80" <= character <= "\udcff":  # an invalid byte of a file name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
