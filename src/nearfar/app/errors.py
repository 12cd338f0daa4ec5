"""The one error of the tool that is the user's to fix."""


class InputError(ValueError):
    """Something that was given cannot be used.

    The message is one line that names the file, row or argument and says what to do about it; the
    command line prints it and ends with exit status 2.
    """
