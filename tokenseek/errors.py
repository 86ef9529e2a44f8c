"""The one exception that TokenSeek raises for something its user can put right, and how it quotes others."""

USAGE_ERROR = 2  # the exit status of a command that met one


class UserError(ValueError):
    """Bad input: the message says what was given, what is accepted and how to fix it."""


def first_line(error: BaseException) -> str:
    """What another exception says, for a message that has room for a line; its type where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
