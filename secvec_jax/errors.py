"""The exceptions that a user's mistake raises, and a disk that does not take a file."""

from secvec_jax.printable import one_line


class UserError(ValueError):
    """A mistake in the input, reported in one line that says how to fix it.

    The message often quotes what others wrote (rows, files, servers): it becomes one printable line of limited length.
    The command line prints it and exits with code 2; notebooks see an ordinary exception.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(str(message)))


class WriteError(UserError, OSError):
    """A file or folder that cannot be written, as on a full disk; what was there before is unchanged."""
