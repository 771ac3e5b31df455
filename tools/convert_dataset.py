#!/usr/bin/env python
"""`iou-balanced-d2 convert`: see iou_balanced_d2/commands/convert_dataset.py."""

from iou_balanced_d2.commands import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("convert"))
