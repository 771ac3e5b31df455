#!/usr/bin/env python
"""`iou-balanced-d2 visualize`: see iou_balanced_d2/commands/visualize_results.py."""

from iou_balanced_d2.commands import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("visualize"))
