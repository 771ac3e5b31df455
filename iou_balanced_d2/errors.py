"""Errors that a user can cause and mend."""


class UserError(Exception):
    """A wrong argument, config value or file; the message names it and says what to do.

    ``train_net.py`` and the tools print it as one line and exit with code 2.
    """
