"""Density functional theory by PySCF, in worker processes: the paper's reference for the evaluation."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from functools import partial
from importlib import metadata
from typing import Any

from elign_lab.molecules import MAX_ATOMIC_NUMBER, symbol
from elign_lab.oracles._evaluation import Evaluation, Molecule
from elign_lab.oracles.pool import WorkerPool
from elign_lab.oracles.protocol import AtomEnergies, Oracle


class DFTOracle(Oracle):
    """Kohn-Sham DFT energies and nuclear gradients, B3LYP/6-31G(d) unless told otherwise (paper section 4).

    Molecules are neutral; RKS for an even number of electrons, UKS with one unpaired electron for an odd one. An SCF
    that does not converge is repeated with the second-order solver; if that fails too, it is a status. The
    isolated-atom energies are UKS in the ground-state spins. Cost: 6 s of one core for ethanol (9 atoms).

    xc: functional. "b3lyp" is PySCF's (2.3 and later): libxc's HYB_GGA_XC_B3LYP with VWN-RPA, the variant of Gaussian;
        "b3lyp5" has VWN5. The paper says B3LYP by PySCF and names no variant.
    basis: basis set, by PySCF's name, with spherical functions (Gaussian's 6-31G(d) has Cartesian d functions, so
        its total energies differ). A set with effective core potentials, such as def2-svp for iodine, brings them. The
        gradient leaves out the response of the grid. Both are PySCF's defaults.
    grid_level: PySCF's integration grid, 0 to 9.
    conv_tol: of the energy, Hartree. max_cycle: of the SCF.
    density_fit: fit the Coulomb and exchange integrals; changes total energies by some meV (3 for ethanol).
    gpu: run on gpu4pyscf, which must be installed; use workers=0 or 1. Not covered by the tests.
    workers, executor, timeout: see WorkerPool. timeout is in seconds per molecule.
    Other options: see Oracle. Raises ValueError for a functional, a basis or a value that is not valid.
    """

    name = "dft"
    packages = {"pyscf": "pip install pyscf"}  # noqa: RUF012

    def __init__(
        self,
        xc: str = "b3lyp",
        basis: str = "6-31g(d)",
        *,
        grid_level: int = 3,
        conv_tol: float = 1e-9,
        max_cycle: int = 200,
        density_fit: bool = False,
        gpu: bool = False,
        workers: int | None = None,
        executor: Executor | None = None,
        timeout: float | None = 1800.0,
        min_distance: float = 0.3,
        max_atoms: int | None = 60,
        closed_shell_only: bool = False,
        atom_energies: Mapping[int | str, float] | None = None,
    ) -> None:
        super().__init__(
            min_distance=min_distance,
            max_atoms=max_atoms,
            closed_shell_only=closed_shell_only,
            atom_energies=atom_energies,
        )
        if grid_level not in range(10) or not conv_tol > 0 or max_cycle < 1:
            raise ValueError(
                "expected grid_level 0 to 9, conv_tol > 0 and max_cycle >= 1, "
                f"got {grid_level}, {conv_tol} and {max_cycle}"
            )
        if gpu and importlib.util.find_spec("gpu4pyscf") is None:
            raise ValueError("gpu=True needs gpu4pyscf: run `pip install gpu4pyscf-cuda12x`, or use gpu=False")
        _check_functional(xc)
        from elign_lab.oracles import _dft_worker  # loads PySCF, only when an oracle is made

        self.elements = _elements(basis)
        self.settings = _dft_worker.Settings(xc, basis, grid_level, conv_tol, max_cycle, density_fit, gpu)
        self._pool = WorkerPool(
            partial(_dft_worker.evaluate, settings=self.settings), workers=workers, executor=executor, timeout=timeout
        )
        if atom_energies is None:
            self.atom_energies = AtomEnergies(self._compute_atom_energy)

    def close(self) -> None:
        """Stop the worker processes; the next call starts new ones."""
        self._pool.close()

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity."""
        return {**asdict(self.settings), "pyscf": metadata.version("pyscf")}

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        return self._pool.map(molecules)

    def _compute_atom_energy(self, number: int) -> float:
        from elign_lab.oracles import _dft_worker

        if number not in self.elements:
            raise ValueError(f"the basis {self.settings.basis} has no functions for {symbol(number)}")
        return _dft_worker.atom_energy(number, self.settings)


def _check_functional(xc: str) -> None:
    from pyscf.dft import libxc

    try:
        libxc.parse_xc(xc)
    except (KeyError, ValueError) as error:
        raise ValueError(f"unknown functional {xc!r}: expected a name of PySCF or libxc, such as 'b3lyp'") from error


def _elements(basis: str) -> frozenset[int]:
    """Atomic numbers for which PySCF has the basis set."""
    from pyscf import gto
    from pyscf.lib.exceptions import BasisNotFoundError

    def has(number: int) -> bool:
        try:
            gto.basis.load(basis, symbol(number))
        except (BasisNotFoundError, KeyError):
            return False
        return True

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Basis may be available")
        found = frozenset(z for z in range(1, MAX_ATOMIC_NUMBER + 1) if has(z))
    if not found:
        raise ValueError(f"unknown basis set {basis!r}: expected a name of PySCF, such as '6-31g(d)'")
    return found
