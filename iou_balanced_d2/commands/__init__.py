"""The commands. The ``run`` of each gets what :mod:`~iou_balanced_d2.arguments` parses."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import register
from ..arguments import COMMANDS, parse
from ..errors import UserError, one_line

PROGRAM = "iou-balanced-d2"


def main(words: Sequence[str] | None = None) -> int:
    """``iou-balanced-d2 COMMAND ...``; without a command, what there is.

    Args:
        words: the command and its flags, those of the process by default.

    Returns:
        the exit code.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [--help] ...\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<12}{command.description}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"{PROGRAM}: error: no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:], prog=f"{PROGRAM} {words[0]}")


def run_command(name: str, words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2.

    Args:
        name: in :data:`COMMANDS`.
        words: its flags, those of the process by default.
        prog: what errors begin with; the script's name by default.

    Returns:
        the exit code.
    """
    prog = prog or f"{COMMANDS[name].module}.py"
    try:
        args = parse(name, sys.argv[1:] if words is None else words, prog)
        file = getattr(args, "config_file", None)
        if file and not Path(file).is_file():
            raise UserError(f"config file {file!r} not found")
        register()  # only now, as this loads detectron2
        module = importlib.import_module(f"{__name__}.{COMMANDS[name].module}")
        return module.run(args) or 0
    except UserError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
