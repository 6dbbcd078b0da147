"""Regenerate what is free in the editor's structure, step by step; judge it; measure how long a new one takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from rdkit.Chem import MolToSmiles, RemoveHs

from elign_lab.denoiser.threads import one_thread
from elign_lab.gpff.editing_bonds import perceive, place
from elign_lab.gpff.editing_state import EditorState, Structure, commit, constraints_of, open_molecule
from elign_lab.gpff.generate import ON_A_GRID, SIGMA_MIN, get_sampler, start_positions
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask
from elign_lab.molecules import MoleculeBatch

if TYPE_CHECKING:
    from elign_lab.oracles import Oracle


@dataclass(frozen=True)
class RunSettings:
    """How new structures are made: sampler, network evaluations (NFE), noise on the free atoms in Angstrom, seed."""

    sampler: str = "ancestral"
    evaluations: int = 16
    sigma: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        get_sampler(self.sampler)
        if self.evaluations < 1:
            raise ValueError(f"evaluations must be at least 1, got {self.evaluations}")
        if not self.sigma >= 0:
            raise ValueError(f"sigma must be 0 or more (Angstrom), got {self.sigma}")
        if self.sampler in ON_A_GRID and self.sigma <= SIGMA_MIN:
            raise ValueError(
                f"sampler {self.sampler!r} runs on a grid from sigma down, so sigma must be over {SIGMA_MIN} Angstrom, "
                f"got {self.sigma}; an adaptive sampler reads the level off the force"
            )


def regenerate(model: PseudoForceField, structure: Structure, settings: RunSettings) -> Iterator[ForceRecord]:
    """Records of a run that keeps the frozen atoms and makes the others anew, from where they are plus noise.

    Free atoms stay out of the forbidden regions. Each step is computed on one thread of torch. Raises ValueError when
    all atoms are frozen, when the model cannot have the molecule, or for a sigma over its range.
    """
    start = model.check(structure.molecule)
    if settings.sigma > model.config.sigma_max:
        raise ValueError(f"sigma is {settings.sigma} Angstrom, over the model's range of {model.config.sigma_max}")
    constraints = constraints_of(structure)
    noise = torch.Generator(model.device).manual_seed(settings.seed)
    task = SamplingTask(model, start.numbers, start.mask, constraints=constraints, generator=noise)
    x = start_positions(task, settings.sigma, start.positions)
    run = get_sampler(settings.sampler)
    return _step_by_step(run(task, x, evaluations=settings.evaluations, sigma=settings.sigma, sigma_min=SIGMA_MIN))


def _step_by_step(records: Iterator[ForceRecord]) -> Iterator[ForceRecord]:
    """The records, each made on one thread; whoever gets one has as many threads as before."""
    while True:
        with one_thread():
            record = next(records, None)
        if record is None:
            return
        yield record


def accept(state: EditorState, result: MoleculeBatch, label: str = "regenerate") -> EditorState:
    """The state with the result of a run in place of its structure; frozen and picked atoms and regions stay.

    Bonds are those of the new geometry; where it has none (it is not valid), those of before. Raises ValueError for
    other atoms, and for a position that is not finite.
    """
    numbers, x = result.to("cpu", torch.float32).arrays()[0]
    if numbers.tolist() != [atom.GetAtomicNum() for atom in state.structure.mol.GetAtoms()]:
        raise ValueError(f"the result, {result.formula(0)}, has other atoms than the editor's structure")
    if not bool(torch.isfinite(result.positions).all()):
        raise ValueError("the run diverged: a position is not finite; take less noise or more network evaluations")
    mol = perceive(numbers, x)
    if mol is None:
        mol = type(state.structure.mol)(state.structure.mol)
        place(mol, x)
    return commit(state, replace(state.structure, mol=mol, label=label))


# ---------------------------------------------------------------------- measures
@dataclass(frozen=True)
class Measures:
    """What is known of a structure: energies and forces by an oracle, the level that the pseudo-force shows, bonds.

    energy: formation energy per atom (eV); f_rms (eV/Angstrom); both NaN with the reason in `status` where the oracle
    has no answer. sigma_hat in Angstrom. smiles: of the geometry, None where it is not one neutral molecule.
    """

    energy: float
    f_rms: float
    status: str
    sigma_hat: float
    smiles: str | None


def measure(model: PseudoForceField, oracle: Oracle, molecule: MoleculeBatch) -> Measures:
    """Measure the first molecule of a batch, on one thread: one call of the oracle and one of the network."""
    from elign_lab.oracles import f_rms

    one = molecule[:1]
    with one_thread():
        answer = oracle(one)
        x = one.positions.to(model.device, model.dtype)
        level = SamplingTask(model, one.numbers, one.mask).estimate(x).sigma_hat
    energy = oracle.formation_energy_per_atom(answer.energy, one.numbers, one.mask)
    forces = f_rms(answer.forces, one.mask)
    mol = perceive(*one.to("cpu").arrays()[0])
    smiles = None if mol is None else str(MolToSmiles(RemoveHs(mol), isomericSmiles=False))
    return Measures(float(energy[0]), float(forces[0]), answer.status[0], float(level[0]), smiles)


def latency(
    model: PseudoForceField,
    molecule: MoleculeBatch | str = "CCCCCC",
    *,
    evaluations: Sequence[int] = (8, 16),
    sampler: str = "ancestral",
    repeats: int = 5,
) -> dict[int, float]:
    """Seconds of computing for one new structure, by number of network evaluations; the median of some runs.

    molecule: which structure (default hexane, 20 atoms). From the start to the last positions, on one thread; nothing
    is drawn or judged. The sampler should be one that spends all evaluations.
    """
    structure = open_molecule(molecule, model.config).structure
    found = {}
    for n in evaluations:
        seconds = []
        for seed in range(repeats + 1):
            started = time.perf_counter()
            for _ in regenerate(model, structure, RunSettings(sampler, n, model.config.sigma_max, seed)):
                pass
            seconds.append(time.perf_counter() - started)
        found[n] = statistics.median(seconds[1:])  # the first run warms up
    return found
