"""The exceptions that a user's mistake raises, and a disk that does not take a file."""


class UserError(ValueError):
    """A mistake in the input, told in one line that names the mend.

    The command line prints the message and exits with code 2; notebooks see an ordinary exception.
    """


class WriteError(UserError, OSError):
    """A file or folder that cannot be written, as on a full disk; what was there before is unchanged."""
