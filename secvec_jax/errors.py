"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the input, told in one line that names the mend.

    The command line prints the message and exits with code 2; notebooks see an ordinary exception.
    """
