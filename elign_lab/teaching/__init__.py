"""Helpers of the notebooks that would not fit into a cell."""

from elign_lab.teaching.figure import Figure
from elign_lab.teaching.start import shipped

__all__ = ["Figure", "shipped"]
