"""Theorem 1 on a torsion of a real molecule: conformers of distance geometry as base law, energies of any oracle.

The angle is measured from the anti conformation and scaled, x = (phi - 180 deg) / 60 deg in [-3, 3]: anti at 0, gauche
at about +-2, the syn barrier at the ends.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import AllChem, rdForceFieldHelpers, rdMolTransforms
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


def torsion_samples(smiles: str, atoms: tuple[int, int, int, int], n: int, seed: int = 1) -> FloatArray:
    """x of n conformers embedded by RDKit's plain distance geometry, (n,).

    Without ETKDG's knowledge of preferred torsions and without relaxation: a cheap generator with a bias to correct.
    """
    mol = _molecule(smiles, atoms)
    settings = AllChem.ETKDGv3()
    settings.useExpTorsionAnglePrefs = settings.useBasicKnowledge = False
    settings.randomSeed = seed
    ids = AllChem.EmbedMultipleConfs(mol, n, settings)
    angles = [rdMolTransforms.GetDihedralDeg(mol.GetConformer(i), *atoms) for i in ids]
    if len(angles) < n:
        raise ValueError(f"RDKit embedded {len(angles)} of {n} conformers of {smiles!r}")
    return to_x(np.array(angles))


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
        return sum(c * torch.cos(k * phi) for k, c in enumerate(self.coefficients))

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
    if AllChem.EmbedMolecule(mol, randomSeed=seed) != 0:
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


def _molecule(smiles: str, atoms: tuple[int, int, int, int]) -> Chem.Mol:
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"{smiles!r} is not a valid SMILES string")
    mol = Chem.AddHs(mol)
    if len(set(atoms)) != 4 or not all(mol.GetBondBetweenAtoms(a, b) for a, b in itertools.pairwise(atoms)):
        raise ValueError(f"atoms {atoms} of {smiles!r} are no torsion: expected four different atoms bonded in a chain")
    return mol
