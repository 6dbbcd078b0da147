"""GFN-xTB by tblite for a list of molecules. No torch here: worker processes import this module."""

from __future__ import annotations

import numpy as np
from tblite.exceptions import TBLiteRuntimeError
from tblite.interface import Calculator

from elign_lab.oracles._evaluation import BOHR_IN_ANGSTROM, HARTREE_IN_EV, Evaluation, Molecule


def evaluate(
    molecules: list[Molecule], *, method: str, accuracy: float, max_iterations: int, unpaired: int | None = None
) -> list[Evaluation]:
    """Neutral molecules in their lowest spin by electron parity, or with `unpaired` electrons when it is given."""
    return [_single_point(z, x, method, accuracy, max_iterations, unpaired) for z, x in molecules]


def _single_point(
    numbers: np.ndarray,
    positions: np.ndarray,
    method: str,
    accuracy: float,
    max_iterations: int,
    unpaired: int | None,
) -> Evaluation:
    uhf = int(numbers.sum()) % 2 if unpaired is None else unpaired
    try:
        calculator = Calculator(method, numbers, positions / BOHR_IN_ANGSTROM, charge=0.0, uhf=uhf)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", accuracy)
        calculator.set("max-iter", max_iterations)
        result = calculator.singlepoint()
    except TBLiteRuntimeError as error:
        return Evaluation.failure(f"tblite: {str(error).strip()}")
    energy = float(result.get("energy")) * HARTREE_IN_EV
    return Evaluation(energy, -np.asarray(result.get("gradient")) * (HARTREE_IN_EV / BOHR_IN_ANGSTROM))
