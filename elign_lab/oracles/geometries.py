"""Geometries that a force field for generators must know: perturbed, broken and generated molecules.

A perturbation takes a molecule and a NumPy generator and returns a new molecule; `labels` has the table of the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from ase.data import covalent_radii
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from elign_lab.datasets import MoleculeDataset
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles._evaluation import Molecule
from elign_lab.oracles.protocol import Oracle, clip_forces
from elign_lab.sampling import ancestral, decode_record, draw_sizes, mask_of_sizes

ELEMENTS = (1, 6, 7, 8, 9)  # what an edit may put in
BOND_LENGTH = 1.85  # Angstrom; pairs below are bonds that can be stretched or cut
CLEAN_FRACTION = 0.35  # latest part of the diffusion time whose clean estimates are taken


# ---------------------------------------------------------------------- perturbations of a molecule
def minimum(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """The geometry as it is."""
    return molecule


def thermal(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """Gaussian noise of 0.01 to 0.1 Angstrom, uniform in the logarithm."""
    return _noisy(molecule, np.exp(rng.uniform(np.log(0.01), np.log(0.1))), rng)


def strained(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """Noise of 0.1 to 0.3 Angstrom and a common scale of 0.85 to 1.2, or (half of them) the one or the other."""
    numbers, positions = molecule
    how = rng.integers(4)
    scale = rng.uniform(0.85, 1.2) if how < 2 else 1.0
    sigma = rng.uniform(0.1, 0.3) if how > 0 else rng.uniform(0.0, 0.1)
    return _noisy((numbers, positions * scale), sigma, rng)


def stretched(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """One bond 0.6 to 2.2 times as long; the smaller side moves as a whole, in a ring only the atom."""
    numbers, positions = molecule
    bonded = _bonded(positions)
    pairs = np.argwhere(np.triu(bonded))
    if len(pairs) == 0:
        return thermal(molecule, rng)
    i, j = pairs[rng.integers(len(pairs))]
    side = _sides(bonded, i, j)
    moves = side == side[j] if side[i] != side[j] else np.arange(len(numbers)) == j
    if moves.sum() > len(numbers) / 2:
        moves = ~moves
        i, j = j, i
    shifted = positions.copy()
    shifted[moves] += (rng.uniform(0.6, 2.2) - 1) * (positions[j] - positions[i])
    return _noisy((numbers, shifted), rng.uniform(0.0, 0.1), rng)


def fragment(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """The smaller side of a bond between heavy atoms, closed with hydrogen: water, methane, methanol and the like.

    The molecule itself when no such bond splits it.
    """
    numbers, positions = molecule
    bonded = _bonded(positions)
    for i, j in rng.permutation(np.argwhere(np.triu(bonded & (numbers > 1) & (numbers > 1)[:, None]))):
        side = _sides(bonded, i, j)
        if side[i] == side[j]:
            continue
        if (side == side[j]).sum() > len(numbers) / 2:
            i, j = j, i
        keep, bond = side == side[j], positions[i] - positions[j]
        length = covalent_radii[1] + covalent_radii[numbers[j]]
        cap = positions[j] + length * bond / np.linalg.norm(bond)
        molecule = np.append(numbers[keep], 1), np.concatenate([positions[keep], cap[None]])
        break
    return _noisy(molecule, rng.uniform(0.0, 0.1), rng)


def _bonded(positions: np.ndarray) -> np.ndarray:
    return (cdist(positions, positions) < BOND_LENGTH) & ~np.eye(len(positions), dtype=bool)


def _sides(bonded: np.ndarray, i: int, j: int) -> np.ndarray:
    """Component of each atom when the bond i-j is cut."""
    without = bonded.copy()
    without[i, j] = without[j, i] = False
    return connected_components(without)[1]


def contact(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """A clash: an atom is pushed, or a new one put, to 0.45 to 0.95 of the covalent distance from another atom."""
    numbers, positions = molecule
    if len(numbers) == 1 or rng.integers(2):
        numbers = np.append(numbers, rng.choice(ELEMENTS))
        positions = np.concatenate([positions, positions[:1] + rng.normal(size=(1, 3))])
        moved, target = len(numbers) - 1, int(rng.integers(len(numbers) - 1))
        direction = rng.normal(size=3)
    else:
        moved, target = (int(i) for i in rng.choice(len(numbers), size=2, replace=False))
        positions = positions.copy()
        direction = positions[moved] - positions[target]
    distance = rng.uniform(0.45, 0.95) * covalent_radii[numbers[[moved, target]]].sum()
    positions[moved] = positions[target] + distance * direction / np.linalg.norm(direction)
    return numbers, positions


def edited(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """One to three atoms deleted, added at random at 0.9 to 1.6 Angstrom from another, or of another element."""
    numbers, positions = molecule[0].copy(), molecule[1].copy()
    for _ in range(rng.integers(1, 4)):
        action = rng.integers(3)
        if action == 0 and len(numbers) > 2:
            keep = np.arange(len(numbers)) != rng.integers(len(numbers))
            numbers, positions = numbers[keep], positions[keep]
        elif action == 1:
            direction = rng.normal(size=3)
            at = positions[rng.integers(len(numbers))]
            new = at + rng.uniform(0.9, 1.6) * direction / np.linalg.norm(direction)
            if cdist(new[None], positions).min() > 0.8:
                numbers = np.append(numbers, rng.choice([1, 1, 6, 7, 8, 9]))
                positions = np.concatenate([positions, new[None]])
        else:
            numbers[rng.integers(len(numbers))] = rng.choice(ELEMENTS)
    return _noisy((numbers, positions), rng.uniform(0.0, 0.1), rng)


def diatomic(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """Two atoms of random elements, 0.35 to 5 Angstrom apart (uniform in the logarithm), whatever the molecule is."""
    numbers = rng.choice(ELEMENTS, size=2)
    distance = np.exp(rng.uniform(np.log(0.35), np.log(5.0)))
    return numbers, np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])


def mmff94(molecule: Molecule, rng: np.random.Generator) -> Molecule:
    """A force-field geometry, as it is or (half of them) with noise up to 0.05 Angstrom."""
    return _noisy(molecule, max(0.0, rng.uniform(-0.05, 0.05)), rng)


PERTURBATIONS: dict[str, Callable[[Molecule, np.random.Generator], Molecule]] = {
    f.__name__: f for f in (minimum, thermal, strained, stretched, mmff94, edited, contact, fragment, diatomic)
}


def perturb(
    data: MoleculeDataset,
    n: int,
    perturbation: Callable[[Molecule, np.random.Generator], Molecule],
    rng: np.random.Generator,
) -> list[Molecule]:
    """n perturbed molecules of a data set, each drawn once before any is drawn again."""
    order = np.concatenate([rng.permutation(len(data)) for _ in range(-(-n // len(data)))])[:n]
    atoms = (slice(int(data.starts[i]), int(data.starts[i]) + int(data.sizes[i])) for i in order)
    molecules = ((data.numbers[a].astype(np.int64), data.positions[a].astype(np.float64)) for a in atoms)
    return [perturbation(molecule, rng) for molecule in molecules]


def _noisy(molecule: Molecule, sigma: float, rng: np.random.Generator) -> Molecule:
    numbers, positions = molecule
    return numbers, positions + sigma * rng.normal(size=positions.shape)


# ---------------------------------------------------------------------- from models
def generate(
    model: Denoiser,
    n: int,
    clean_per_sample: int,
    *,
    steps: int,
    spacing: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, list[Molecule]]:
    """n samples of a diffusion model ("sample"), and `clean_per_sample` late clean estimates of each ("clean").

    Those at t <= 0.35 T, with their own types. steps, spacing: see NoiseSchedule.grid. What is not finite is left out.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator(model.device).manual_seed(seed)
    sizes, grid = draw_sizes(model, n, seed), model.schedule.grid(steps, spacing)
    found: dict[str, list[Molecule]] = {"sample": [], "clean": []}
    for chunk in tqdm(torch.argsort(sizes).split(batch_size), desc="generating", unit="batch", disable=not progress):
        mask = mask_of_sizes(sizes[chunk]).to(model.device)
        late = []
        for record in ancestral(model, mask, grid=grid, generator=generator):
            if record.s >= 0 and record.t <= CLEAN_FRACTION * model.config.timesteps:
                late.append(record)
        found["sample"] += decode_record(model, record).arrays()
        frames = [model.decode(r.clean, r.clean[..., :3], mask).arrays() for r in late]
        for i in range(len(chunk)):
            picks = rng.choice(len(frames), size=min(clean_per_sample, len(frames)), replace=False)
            found["clean"] += [frames[k][i] for k in picks]
    return {kind: [m for m in molecules if np.isfinite(m[1]).all()] for kind, molecules in found.items()}


def descend(
    oracle: Oracle,
    molecules: Sequence[Molecule],
    rng: np.random.Generator,
    *,
    steps: int = 60,
    rate: float = 0.01,
    longest: float = 0.05,
) -> list[Molecule]:
    """One random point for each molecule on the way downhill along the oracle's forces (not the start).

    rate in Angstrom^2/eV, at most `longest` Angstrom an atom and step. Where a force field is wrong downhill, its own
    descent finds the place: active learning labels it.
    """
    stops = rng.integers(1, steps + 1, size=len(molecules))
    found = list(molecules)
    for step in range(1, steps + 1):
        moving = np.flatnonzero(stops >= step)
        batch = MoleculeBatch.from_arrays([found[i] for i in moving], check=False)
        move = clip_forces(rate * oracle(batch).forces.nan_to_num(0.0), longest)
        for i, molecule in zip(moving, batch.with_positions(batch.positions + move).arrays(), strict=True):
            found[i] = molecule
    return found
