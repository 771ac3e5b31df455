"""Does one side of runs beat another: AP, differences with their uncertainty, and a report."""

from .compare import Comparison, compare_sides
from .report import write_comparison

__all__ = ["Comparison", "compare_sides", "write_comparison"]
