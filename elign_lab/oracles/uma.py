"""UMA, the paper's preference model, by fairchem-core; and any eSCN-MD or eSEN checkpoint with the task omol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elign_lab.checkpoints import sha256
from elign_lab.molecules import atomic_number, symbol
from elign_lab.oracles import _fairchem
from elign_lab.oracles._evaluation import Evaluation, Molecule
from elign_lab.oracles._fairchem import UMAUnavailableError
from elign_lab.oracles.protocol import AtomEnergies, Oracle, precision_of, unpaired_electrons

__all__ = ["UMAOracle", "UMAUnavailableError"]

OMOL_ELEMENTS = range(1, 84)  # OMol25 has H to Bi (arXiv:2505.08762)
_MIRROR = np.array([-1.0, 1.0, 1.0])


class UMAOracle(Oracle):
    """UMA (arXiv:2506.23971), task omol: energies and forces at the level of OMol25, wB97M-V/def2-TZVPD.

    Molecules are neutral, with spin multiplicity 1 for an even number of electrons and 2 for an odd one; the network is
    always given both. Molecules that cannot be evaluated get a status, and never spoil the others of their batch.

    UMA's network is equivariant under rotations, but not under reflections. A molecule and its mirror image get other
    energies: from the bundled model by 1.1 meV an atom on average (test molecules with 0.05 Angstrom of noise), and by
    7 meV for L- and D-alanine, where nature has 0. Elign's theory wants the full group E(3): the base law q0 is
    E(3)-invariant, and the aligned law q0 exp(-beta E) / Z is so only if E is. With another E the aligned model should
    prefer one hand, without a reason in physics, and its E(3)-equivariant network could not represent that law.
    `mirror_average` repairs it exactly: E is the mean over the molecule and its mirror image, the forces are minus its
    gradient; it costs twice the time.

    UMA's weights are gated: ask for access at https://huggingface.co/facebook/UMA and log in (`hf auth login`). The
    model "escn-mini" needs no access: it is a small network of the same architecture, trained by this project on
    GFN2-xTB labels (H, C, N, O, F), to test and to teach with. It is not UMA, and not a substitute for it: near minima
    its forces are off by 0.1 to 0.2 eV/Angstrom (see its passport), it knows little of strongly strained molecules, and
    nothing keeps it from attracting clashes.

    model: a name that fairchem-core lists, such as "uma-m-1p1" (the paper's) or "uma-s-1p2"; "escn-mini"; or a file:
        .safetensors of this package, or a fairchem checkpoint.
    allow_pickle: load a fairchem checkpoint from a file. It is a pickle, which can run any code: only if you trust it.
    mirror_average: average over the molecule and its mirror image (above).
    device: "cpu" or "cuda". dtype: torch.float32 or torch.float64, for the network; offsets are added in double.
    batch_atoms: atoms that are evaluated at once.
    elements: what to accept, as numbers or symbols; None for the elements that the checkpoint has reference energies
        for. fairchem itself accepts any element, also such that the network has not been trained on.
    Other options: see Oracle. Isolated-atom energies come with the named models; for another checkpoint they are
    computed, in the spins of the ground states, if it was made for single atoms. Raises UMAUnavailableError (a
    ValueError with a `reason`) when fairchem-core or the weights cannot be had, ValueError for a wrong option.
    """

    name = "uma"

    def __init__(
        self,
        model: str | Path = "uma-m-1p1",
        *,
        allow_pickle: bool = False,
        mirror_average: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_atoms: int = 1024,
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
        if str(device) not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda' (fairchem chooses which one), got {str(device)!r}")
        if str(device) == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but torch sees no GPU here: use device='cpu'")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if batch_atoms < 1:
            raise ValueError(f"batch_atoms must be at least 1, got {batch_atoms}")
        self.weights = _fairchem.find_weights(model, allow_pickle=allow_pickle)
        self._unit = _fairchem.load_unit(self.weights, str(device), dtype)
        self._lone_atoms = bool(self._unit.model.module.supports_single_atoms)
        self.mirror_average = mirror_average
        self.device, self.dtype, self.batch_atoms = torch.device(device), dtype, batch_atoms
        self.elements = self._trained_elements() if elements is None else frozenset(map(atomic_number, elements))
        self._table = dict(self.weights.atom_energies)
        if atom_energies is None:
            computed = self._lone_atoms and not self._table
            self.atom_energies = AtomEnergies(self._compute_atom_energy) if computed else self._table

    @classmethod
    def available(cls) -> tuple[bool, str]:
        """Whether fairchem-core is installed; the second item also says that UMA's weights are gated."""
        try:
            _fairchem.require_fairchem()
        except UMAUnavailableError as error:
            return False, str(error)
        return True, f"UMA's weights are gated, ask at {_fairchem.REQUEST}; model='escn-mini' needs no access"

    def _trained_elements(self) -> frozenset[int]:
        """Elements with a reference energy in the checkpoint; those of OMol25 where it has no such table."""
        tasks = self._unit.dataset_to_tasks[_fairchem.TASK]
        references = next((t.element_references for t in tasks if t.property == "energy"), None)
        if references is None:
            return frozenset(OMOL_ELEMENTS)
        return frozenset(references.element_references.nonzero().flatten().tolist()) - {0}

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity."""
        return {
            "weights": sha256(self.weights.path),
            "mirror_average": self.mirror_average,
            "fairchem": metadata.version("fairchem-core"),
            **precision_of(self.dtype, self.device),
        }

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        answers = {i: self._lone_atom(m[0]) for i, m in enumerate(molecules) if self._needs_table(m)}
        todo = [i for i in range(len(molecules)) if i not in answers]
        for chosen in _batches(todo, [len(numbers) for numbers, _ in molecules], self.batch_atoms):
            answers.update(zip(chosen, self._evaluate([molecules[i] for i in chosen]), strict=True))
        return [answers[i] for i in range(len(molecules))]

    def _needs_table(self, molecule: Molecule) -> bool:
        return len(molecule[0]) == 1 and not self._lone_atoms

    def _lone_atom(self, numbers: np.ndarray) -> Evaluation:
        """fairchem takes a single atom from a table, and only in a batch of its own; so does this, without a batch."""
        energy = self._table.get(int(numbers[0]))
        if energy is None:
            return Evaluation.failure(f"this model does not do single atoms, and has no energy of {symbol(numbers[0])}")
        return Evaluation(energy, np.zeros((1, 3)))

    def _evaluate(self, molecules: Sequence[Molecule]) -> list[Evaluation]:
        """One batch; when fairchem refuses it, each molecule alone, so that the others do not suffer."""
        try:
            return self._predict(molecules, [_fairchem.multiplicity(numbers) for numbers, _ in molecules])
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            if len(molecules) == 1:
                return [Evaluation.failure(f"fairchem: {type(error).__name__}: {error}")]
        return [answer for molecule in molecules for answer in self._evaluate([molecule])]

    def _predict(self, molecules: Sequence[Molecule], multiplicities: Sequence[int]) -> list[Evaluation]:
        energies, forces = _fairchem.predict(self._unit, molecules, multiplicities, self.dtype)
        if self.mirror_average:
            mirrored = [(numbers, positions * _MIRROR) for numbers, positions in molecules]
            other_energies, other_forces = _fairchem.predict(self._unit, mirrored, multiplicities, self.dtype)
            energies, forces = (energies + other_energies) / 2, (forces + other_forces * _MIRROR) / 2
        ends = np.cumsum([len(numbers) for numbers, _ in molecules])
        parts = np.split(forces, ends[:-1])
        return [Evaluation(float(energy), part) for energy, part in zip(energies, parts, strict=True)]

    def _compute_atom_energy(self, number: int) -> float:
        if number not in self.elements:
            known = ", ".join(symbol(z) for z in sorted(self.elements))
            raise ValueError(f"the model does not know {symbol(number)}: it knows {known}")
        atom = (np.array([number]), np.zeros((1, 3)))
        return self._predict([atom], [unpaired_electrons(number) + 1])[0].energy


def _batches(indices: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in groups of at most `limit` atoms (a larger molecule is alone)."""
    groups: list[list[int]] = []
    atoms = 0
    for i in indices:
        if not groups or atoms + sizes[i] > limit:
            groups.append([])
            atoms = 0
        groups[-1].append(i)
        atoms += sizes[i]
    return groups
