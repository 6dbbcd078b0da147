"""Kohn-Sham DFT by PySCF for a list of molecules. No torch here: worker processes import this module."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from ase.data import chemical_symbols, ground_state_magnetic_moments
from pyscf import dft, gto

from elign_lab.oracles._evaluation import BOHR_IN_ANGSTROM, HARTREE_IN_EV, OK, Evaluation, Molecule


@dataclass(frozen=True)
class Settings:
    """What defines the calculation; see DFTOracle."""

    xc: str
    basis: str
    grid_level: int
    conv_tol: float
    max_cycle: int
    density_fit: bool
    gpu: bool


def evaluate(molecules: list[Molecule], *, settings: Settings, unpaired: int | None = None) -> list[Evaluation]:
    """Neutral molecules in their lowest spin by electron parity, or with `unpaired` electrons when it is given."""
    return [_single_point(z, x, settings, unpaired) for z, x in molecules]


@cache
def atom_energy(number: int, settings: Settings) -> float:
    """Energy in eV of the isolated atom in its ground-state spin. Raises ValueError when the SCF fails."""
    unpaired = round(float(ground_state_magnetic_moments[number]))
    (answer,) = evaluate([(np.array([number]), np.zeros((1, 3)))], settings=settings, unpaired=unpaired)
    if answer.status != OK:
        element = chemical_symbols[number]
        raise ValueError(f"{settings.xc}/{settings.basis} failed for the isolated {element} atom: {answer.status}")
    return answer.energy


def _single_point(numbers: np.ndarray, positions: np.ndarray, settings: Settings, unpaired: int | None) -> Evaluation:
    spin = int(numbers.sum()) % 2 if unpaired is None else unpaired
    elements = {chemical_symbols[z] for z in numbers.tolist()}
    molecule = gto.M(
        atom=[(int(z), tuple(x)) for z, x in zip(numbers, positions / BOHR_IN_ANGSTROM, strict=True)],
        unit="Bohr",
        basis=settings.basis,
        ecp={e: settings.basis for e in elements if _has_core_potential(settings.basis, e)},
        charge=0,
        spin=spin,
        verbose=0,
    )
    try:
        method = _converged(molecule, settings)
        if not method.converged:
            return Evaluation.failure(f"PySCF: SCF not converged in {settings.max_cycle} cycles, nor by second order")
        # a single atom has no force; its gradient would cost as much as the energy
        gradient = method.nuc_grad_method().kernel() if len(numbers) > 1 else np.zeros((1, 3))
    except (RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        return Evaluation.failure(f"PySCF: {type(error).__name__}: {error}")
    forces = -np.asarray(gradient) * (HARTREE_IN_EV / BOHR_IN_ANGSTROM)
    return Evaluation(float(method.e_tot) * HARTREE_IN_EV, forces)


@cache
def _has_core_potential(basis: str, element: str) -> bool:
    """Whether the basis set is of valence orbitals, for an effective core potential of its name.

    PySCF takes such a set without its potential too, and then gives energies and forces that mean nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to install another package of basis sets
        try:
            return bool(gto.basis.load_ecp(basis, element))
        except (RuntimeError, KeyError):  # no potentials of this name
            return False


def _converged(molecule: gto.Mole, settings: Settings) -> dft.rks.RKS | dft.uks.UKS:
    """A mean field after its SCF: first DIIS, then second order from where DIIS stopped."""
    method = dft.RKS(molecule) if molecule.spin == 0 else dft.UKS(molecule)
    method.xc = settings.xc
    method.grids.level = settings.grid_level
    method.conv_tol = settings.conv_tol
    method.max_cycle = settings.max_cycle
    if settings.density_fit:
        method = method.density_fit()
    if settings.gpu:
        method = method.to_gpu()
    method.kernel()
    if not method.converged:
        method = method.newton()
        method.kernel(method.mo_coeff, method.mo_occ)
    return method
