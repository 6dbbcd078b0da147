"""Theorem 1 on a torsion of a real molecule: conformers of distance geometry as base law, energies of any oracle.

The angle is measured from the anti conformation and scaled, x = (phi - 180 deg) / 60 deg in [-3, 3]: anti at 0, gauche
at about +-2, the syn barrier at the ends.

One coordinate is treated, not the molecule: the base law is the torsion's marginal, smoothed; the energy is that of
the geometry relaxed at each angle, not a free energy; the policy that is aligned diffuses the angle alone. So the end
point is q0(phi) exp(-beta E(phi)) / Z, and no thermal average over the other coordinates is in it. `weight_share` says
why: the tilt of whole conformers puts nearly all its weight on a few of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolTransforms
from scipy.special import softmax
from torch import Tensor

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle
from elign_lab.theory.mixture import GaussianMixture

FloatArray = NDArray[np.floating]
BOLTZMANN = 8.617333262e-5  # eV/K, CODATA 2022
BUTANE = ("CCCC", (0, 1, 2, 3))
_SCALE = 60.0


def inverse_temperature(kelvin: float) -> float:
    """1 / (k T) in 1/eV."""
    if not kelvin > 0:
        raise ValueError(f"the temperature must be positive (K), got {kelvin}")
    return 1 / (BOLTZMANN * kelvin)


def embedded(smiles: str, n: int, seed: int = 1) -> Chem.Mol:
    """A molecule with n conformers embedded by RDKit's plain distance geometry.

    Without ETKDG's knowledge of preferred torsions and without relaxation: a cheap generator with a bias to correct.
    """
    mol = _parsed(smiles)
    settings: Any = rdDistGeom.ETKDGv3()
    settings.useExpTorsionAnglePrefs = settings.useBasicKnowledge = False
    settings.randomSeed = seed
    found = len(rdDistGeom.EmbedMultipleConfs(mol, n, settings))
    if found < n:
        raise ValueError(f"RDKit embedded {found} of {n} conformers of {smiles!r}")
    return mol


def torsion_samples(smiles: str, atoms: tuple[int, int, int, int], n: int, seed: int = 1) -> FloatArray:
    """x of n conformers from `embedded`, (n,)."""
    _molecule(smiles, atoms)
    conformers = embedded(smiles, n, seed).GetConformers()
    return to_x(np.array([rdMolTransforms.GetDihedralDeg(c, *atoms) for c in conformers]))


def conformer_energies(smiles: str, n: int, oracle: Oracle, seed: int = 1) -> FloatArray:
    """Energies in eV of the conformers from `embedded` as they are, in all their coordinates, (n,); NaN: not judged."""
    mol = embedded(smiles, n, seed)
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    batch = MoleculeBatch.from_arrays([(numbers, c.GetPositions()) for c in mol.GetConformers()])
    return oracle(batch).energy.double().numpy()


def weight_share(energies: FloatArray, beta: float) -> float:
    """Effective share of samples weighted by exp(-beta E), 1 / (n sum w^2), between 1 / n and 1 (Kish 1965).

    energies (n,) in eV, beta in 1/eV. Raises ValueError for energies that are not finite.
    """
    energies = np.asarray(energies, dtype=float)
    if energies.size == 0 or not np.isfinite(energies).all():
        missing = int((~np.isfinite(energies)).sum())
        raise ValueError(f"expected finite energies, got {energies.size}, of which {missing} are not: leave those out")
    weights = softmax(-beta * energies)
    return float(1 / (len(weights) * np.square(weights).sum()))


def to_x(degrees: FloatArray) -> FloatArray:
    """Torsion angles in degrees -> x in [-3, 3]."""
    return (np.mod(degrees, 360) - 180) / _SCALE


@dataclass(frozen=True)
class TorsionEnergy:
    """Energy (eV, least value of the scan 0) as a cosine series in the torsion; call it with points (n, 1)."""

    coefficients: tuple[float, ...]
    angles: FloatArray
    energies: FloatArray

    def __call__(self, x: Tensor) -> Tensor:
        """Energy (n,) in eV at x (n, 1)."""
        phi = x[:, 0] * (_SCALE * np.pi / 180)
        return torch.stack([c * torch.cos(k * phi) for k, c in enumerate(self.coefficients)]).sum(0)

    @property
    def fit_error(self) -> float:
        """Largest deviation of the series from the scan, eV."""
        at = torch.from_numpy(to_x(self.angles)).unsqueeze(1)
        return float(np.abs(self(at).numpy() - self.energies).max())


def torsion_energy(
    smiles: str, atoms: tuple[int, int, int, int], oracle: Oracle, *, points: int = 19, terms: int = 7, seed: int = 1
) -> TorsionEnergy:
    """Energies of the oracle on a scan of the torsion from 0 to 180 degrees, the rest relaxed by MMFF94.

    For a torsion that is symmetric about 180 degrees. Raises ValueError when the oracle fails on a geometry.
    """
    mol = _molecule(smiles, atoms)
    if rdDistGeom.EmbedMolecule(mol, randomSeed=seed) != 0:
        raise ValueError(f"RDKit could not embed {smiles!r}")
    angles = np.linspace(0, 180, points)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol)
    if properties is None:
        raise ValueError(f"MMFF94 has no parameters for {smiles!r}: choose another molecule")
    geometries = []
    for angle in angles:
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, properties)
        field.MMFFAddTorsionConstraint(*atoms, False, float(angle), float(angle), 100.0)
        field.Minimize(maxIts=2000)
        geometries.append(MoleculeBatch.from_rdkit(mol))
    result = oracle(MoleculeBatch.cat(geometries))
    if not bool(result.ok.all()):
        bad = int((~result.ok).nonzero()[0])
        raise ValueError(f"the {oracle.name} oracle failed at {angles[bad]:.0f} degrees: {result.status[bad]}")
    energies = (result.energy - result.energy.min()).double().numpy()
    series = np.cos(np.arange(terms) * np.deg2rad(angles - 180)[:, None])
    coefficients = np.linalg.lstsq(series, energies, rcond=None)[0]
    return TorsionEnergy(tuple(coefficients.tolist()), angles, energies)


def binned_mixture(x: FloatArray, bins: int = 12) -> GaussianMixture:
    """A smooth law for samples x in [-3, 3]: one Gaussian for each occupied bin, as wide as the bin."""
    shares, edges = np.histogram(x, bins=bins, range=(-3, 3))
    if shares.sum() < 10 * bins:
        raise ValueError(f"{shares.sum()} samples are too few for {bins} bins: draw more conformers")
    centres, width = (edges[:-1] + edges[1:]) / 2, float(edges[1] - edges[0])
    total = float(shares.sum())
    parts = [(n / total, (float(c),), width) for n, c in zip(shares, centres, strict=True) if n > 0]
    return GaussianMixture.of(*parts)


def _parsed(smiles: str) -> Chem.Mol:
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"{smiles!r} is not a valid SMILES string")
    return Chem.AddHs(mol)


def _molecule(smiles: str, atoms: tuple[int, int, int, int]) -> Chem.Mol:
    mol = _parsed(smiles)
    if len(set(atoms)) != 4 or not all(mol.GetBondBetweenAtoms(a, b) for a, b in itertools.pairwise(atoms)):
        raise ValueError(f"atoms {atoms} of {smiles!r} are no torsion: expected four different atoms bonded in a chain")
    return mol
