"""Helpers of the notebooks that would not fit into a cell."""

from elign_lab.teaching.figure import Figure

__all__ = ["Figure"]
