"""The one exception that TokenSeek raises for something its user can put right."""


class UserError(ValueError):
    """Bad input: the message says what was given, what is accepted and how to fix it."""
