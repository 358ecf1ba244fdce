"""The one exception that the command line turns into a line of text."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in the input of a command; the message is one line that names the input, its value and what
    is allowed.
    """
