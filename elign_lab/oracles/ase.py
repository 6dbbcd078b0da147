"""Any ASE calculator as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from elign_lab.molecules import MAX_ATOMIC_NUMBER, atomic_number
from elign_lab.oracles._evaluation import Evaluation, Molecule
from elign_lab.oracles.protocol import Oracle


class ASEOracle(Oracle):
    """Energies and forces of an ASE calculator, one molecule after the other in this process.

    calculator: an ASE calculator, or a function without arguments that makes one.
    elements: what the calculator supports, as numbers or symbols; None for no check before it is called.
    atom_energies: isolated-atom energies (eV) by number or symbol; needed only for formation energies.
    Other options: see Oracle. An exception of the calculator is the molecule's status. Raises ValueError for anything
    that is not a calculator.
    """

    name = "ase"
    packages = {"ase": "pip install ase"}  # noqa: RUF012

    def __init__(
        self,
        calculator: BaseCalculator | Callable[[], BaseCalculator],
        *,
        elements: Iterable[int | str] | None = None,
        min_distance: float = 0.3,
        max_atoms: int | None = None,
        closed_shell_only: bool = False,
        atom_energies: Mapping[int | str, float] | None = None,
    ) -> None:
        super().__init__(
            min_distance=min_distance,
            max_atoms=max_atoms,
            closed_shell_only=closed_shell_only,
            atom_energies=atom_energies,
        )
        self.calculator = _made(calculator)
        known = range(1, MAX_ATOMIC_NUMBER + 1) if elements is None else (atomic_number(z) for z in elements)
        self.elements = frozenset(known)

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        return [self._single_point(Atoms(numbers=z, positions=x)) for z, x in molecules]

    def _single_point(self, atoms: Atoms) -> Evaluation:
        atoms.calc = self.calculator
        try:
            return Evaluation(float(atoms.get_potential_energy()), atoms.get_forces())
        except Exception as error:  # calculators raise what they like; the type and the text go into the status
            return Evaluation.failure(f"CalculatorError: {type(error).__name__}: {error}")


def _made(source: BaseCalculator | Callable[[], BaseCalculator]) -> BaseCalculator:
    # a calculator may be callable too, and a class has the methods of its objects
    made = callable(source) and (isinstance(source, type) or not _is_calculator(source))
    calculator: Any = source() if made else source  # type: ignore[operator]
    if not _is_calculator(calculator):
        raise ValueError(
            f"expected an ASE calculator or a function that makes one, got {type(source).__name__}; "
            "for example calculator=EMT() with `from ase.calculators.emt import EMT`"
        )
    return calculator


def _is_calculator(thing: object) -> bool:
    return hasattr(thing, "get_potential_energy") and hasattr(thing, "get_forces")
