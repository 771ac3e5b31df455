"""Print every config key of the project and of its projects, with its default and meaning."""

import argparse
import signal

from .description import config_help, format_help

argparse.ArgumentParser(prog="python -m iou_balanced_d2.config", description=__doc__).parse_args()
# A reader that has seen enough, such as `head`, ends this quietly, as it does other commands.
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
print(format_help(config_help()))
