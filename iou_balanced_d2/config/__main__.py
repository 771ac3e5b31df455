"""Print every config key of the project and of its projects, with its default and meaning."""

import argparse
import signal

from .description import config_help, format_help

argparse.ArgumentParser(prog="python -m iou_balanced_d2.config", description=__doc__).parse_args()
# End quietly when the reader of a pipe, such as `head`, closes it.
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
print(format_help(config_help()))
