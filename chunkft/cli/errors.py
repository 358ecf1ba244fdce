"""The exceptions that the command line turns into a line of text."""

__all__ = ["PeerError", "UserError"]


class UserError(ValueError):
    """A mistake in the input of a command; the message is one line that names the input, its value and what
    is allowed.
    """


class PeerError(Exception):
    """Another process of the run failed, and this one ends with it.

    Attributes:
        silent: the other one says all there is to say.
        usage: it was wrong input.
    """

    def __init__(self, message: str, *, silent: bool = False, usage: bool = False) -> None:
        super().__init__(message)
        self.silent = silent
        self.usage = usage
