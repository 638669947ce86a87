"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the input, reported in one line that says how to fix it.

    The command line prints the message and exits with code 2; notebooks see an ordinary exception.
    """
