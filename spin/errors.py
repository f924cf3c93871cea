"""The one exception that `run.py` prints as a single line."""


class UserError(ValueError):
    """Something that a user can put right: the message says what is wrong and what to do, in one line."""
