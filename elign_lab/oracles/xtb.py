"""GFN-xTB energies and forces by tblite, in worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from elign_lab.molecules import symbol
from elign_lab.oracles._evaluation import OK, Evaluation, Molecule
from elign_lab.oracles.pool import WorkerPool
from elign_lab.oracles.protocol import AtomEnergies, Oracle, unpaired_electrons

METHODS = ("GFN2-xTB", "GFN1-xTB")


class XTBOracle(Oracle):
    """GFN2-xTB (doi:10.1021/acs.jctc.8b01176) or GFN1-xTB (doi:10.1021/acs.jctc.7b00118), elements H to Rn.

    Molecules are neutral; an odd number of electrons gets one unpaired electron. An SCF that does not converge is a
    status. The isolated-atom energies are xTB's own, with the spins of the ground states.

    method: "GFN2-xTB" or "GFN1-xTB".
    accuracy: tblite's factor on the convergence thresholds; smaller is tighter.
    max_iterations: of the SCF.
    workers, executor, timeout, chunk_size: see WorkerPool. timeout is in seconds per molecule.
    Other options: see Oracle. Raises ValueError for a method or a value that is not valid.
    """

    name = "xtb"
    packages = {"tblite": "pip install tblite"}  # noqa: RUF012
    elements = frozenset(range(1, 87))

    def __init__(
        self,
        method: str = "GFN2-xTB",
        *,
        accuracy: float = 1.0,
        max_iterations: int = 250,
        workers: int | None = None,
        executor: Executor | None = None,
        timeout: float | None = 60.0,
        chunk_size: int = 4,
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
        if method not in METHODS:
            raise ValueError(f"unknown xTB method {method!r}: expected one of {', '.join(METHODS)}")
        if not accuracy > 0 or max_iterations < 1:
            raise ValueError(
                f"accuracy must be positive and max_iterations at least 1, got {accuracy} and {max_iterations}"
            )
        from elign_lab.oracles import _xtb_worker  # loads tblite, only when an oracle is made

        self.method = method
        self._evaluate = partial(_xtb_worker.evaluate, method=method, accuracy=accuracy, max_iterations=max_iterations)
        self._pool = WorkerPool(
            self._evaluate, workers=workers, executor=executor, timeout=timeout, chunk_size=chunk_size
        )
        if atom_energies is None:
            self.atom_energies = AtomEnergies(self._compute_atom_energy)

    def close(self) -> None:
        """Stop the worker processes; the next call starts new ones."""
        self._pool.close()

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity."""
        return {**self._evaluate.keywords, "tblite": metadata.version("tblite")}

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        return self._pool.map(molecules)

    def _compute_atom_energy(self, number: int) -> float:
        if number not in self.elements:
            raise ValueError(f"{self.method} has no parameters for {symbol(number)}: it supports H to Rn")
        atom = (np.array([number]), np.zeros((1, 3)))
        (answer,) = self._evaluate([atom], unpaired=unpaired_electrons(number))
        if answer.status != OK:
            raise ValueError(f"{self.method} failed for the isolated {symbol(number)} atom: {answer.status}")
        return answer.energy
