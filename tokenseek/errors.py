"""The one exception that TokenSeek raises for something its user can put right."""

USAGE_ERROR = 2  # the exit status of a command that met one


class UserError(ValueError):
    """Bad input: the message says what was given, what is accepted and how to fix it."""
