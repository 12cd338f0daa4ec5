"""The error that the tool raises for mistakes the user can fix."""


class InputError(ValueError):
    """An input cannot be used.

    The message is one line that names the file, row or argument and says how to fix it. The command
    line prints it and exits with status 2.
    """
