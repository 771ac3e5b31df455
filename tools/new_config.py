#!/usr/bin/env python
"""`iou-balanced-d2 new-config`: see iou_balanced_d2/commands/new_config.py."""

from iou_balanced_d2.commands import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("new-config"))
