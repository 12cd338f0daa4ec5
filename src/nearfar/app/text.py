"""Text that comes from outside, such as the name of a file, made fit to be written anywhere."""

import unicodedata

# Controls, halves of a character that no encoding takes, ends of lines and of paragraphs.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
# They turn the text that follows them round, so that a name could hide what a line says.
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    r"""The text with an escape in place of what a page, a terminal or a file cannot take.

    In a file name that is no UTF-8, Python has a surrogate for each odd byte; that byte is shown.

    >>> print(printable("Zoë\n\x1b[31m"), printable("caf\udce9.png"))
    Zoë\n\x1b[31m caf\xe9.png
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character not in _TURNING and unicodedata.category(character) not in _UNPRINTABLE:
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
