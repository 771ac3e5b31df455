"""Errors that a user can cause and correct."""


class UserError(Exception):
    """A wrong argument, config value or file; the message names it and says what to do.

    ``train_net.py`` and the tools print it as one line and exit with code 2.
    """


def one_line(error: BaseException) -> str:
    """The message of a UserError, without the traceback that a data worker puts before it."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix("iou_balanced_d2.errors.UserError: ")
