"""Does the score know how good the box is: measured, drawn, and written as a report."""

from .analysis import Alignment, analyze
from .report import dataset_files, write_alignment_report

__all__ = ["Alignment", "analyze", "dataset_files", "write_alignment_report"]
