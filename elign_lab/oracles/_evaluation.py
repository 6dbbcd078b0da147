"""What a backend returns for one molecule. NumPy only: worker processes import this and must start fast."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

OK = "ok"

# CODATA 2022
HARTREE_IN_EV = 27.211386245981
BOHR_IN_ANGSTROM = 0.529177210544

Molecule = tuple[np.ndarray, np.ndarray]
"""Atomic numbers (n,) int64 and positions (n, 3) float64 in Angstrom."""


class Evaluation(NamedTuple):
    """Energy (eV), forces (n, 3) (eV/Angstrom) and status of one molecule; uncertainty in eV where there is one."""

    energy: float
    forces: np.ndarray | None
    status: str = OK
    uncertainty: float | None = None

    @classmethod
    def failure(cls, status: str) -> Evaluation:
        """A failed molecule: no numbers, and the reason."""
        return cls(math.nan, None, status)
