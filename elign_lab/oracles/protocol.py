"""What every oracle has in common: the checks, the statuses, the counters, the shape of the answer.

An oracle gives the energy and the forces of molecules. Units: eV and eV/Angstrom, positions in Angstrom.
A molecule that cannot be evaluated never raises and never gets a made-up number: its energy and its forces are NaN,
`ok` is False, and `status` says why.
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from ase.data import ground_state_magnetic_moments
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from elign_lab.molecules import MAX_ATOMIC_NUMBER, MoleculeBatch, atomic_number, symbol
from elign_lab.oracles._evaluation import OK, Evaluation, Molecule
from elign_lab.shapes import Shapes

__all__ = ["AtomEnergies", "Evaluation", "Molecule", "Oracle", "OracleResult", "clip_forces", "f_rms"]


@dataclass(frozen=True, repr=False)
class OracleResult(Shapes):
    """Energies and forces of a batch.

    energy (B,) in eV; forces (B, N, 3) in eV/Angstrom, zero on padding; ok (B,) bool; status: "ok" or a short reason
    per molecule; uncertainty (B,) in eV, or None. Energy, forces and uncertainty are NaN where ok is False.
    """

    energy: Tensor
    forces: Tensor
    ok: Tensor
    status: tuple[str, ...]
    uncertainty: Tensor | None = None


def f_rms(forces: Tensor, mask: Tensor) -> Tensor:
    """Force RMS sqrt((1/N) sum_i |f_i|^2) per molecule (paper section 3.1), in the unit of the forces.

    forces (..., N, 3), mask (..., N) -> (...). The norm is per atom, not per component. NaN forces give NaN.
    """
    squares = torch.where(mask, forces.square().sum(-1), 0.0)
    return (squares.sum(-1) / mask.sum(-1).clamp(min=1)).sqrt()


def clip_forces(forces: Tensor, threshold: float) -> Tensor:
    """Rescale each atom's force vector to a length of at most `threshold` (same unit); the direction is kept.

    forces (..., 3) -> (..., 3). Raises ValueError unless threshold > 0.
    """
    if not threshold > 0:
        raise ValueError(f"force threshold must be positive (eV/Angstrom), got {threshold}")
    norm = forces.norm(dim=-1, keepdim=True)
    return torch.where(norm > threshold, forces * (threshold / norm), forces)


def unpaired_electrons(number: int) -> int:
    """Unpaired electrons of the isolated atom in its ground state (H 1, C 2, N 3, O 2, F 1), from ASE's table."""
    return round(float(ground_state_magnetic_moments[number]))


class AtomEnergies(dict[int, float]):
    """Isolated-atom energies in eV by atomic number, each computed when it is first asked for."""

    def __init__(self, compute: Callable[[int], float]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, number: int) -> float:
        self[number] = self._compute(number)
        return self[number]


class Oracle(ABC):
    """Energy and forces of molecules: `oracle(batch)` -> OracleResult.

    A subclass sets `name` and `elements`, and implements `_compute`. Options that all oracles have:

    min_distance: molecules with two atoms closer than this (Angstrom) are not sent to the backend.
    max_atoms: molecules with more atoms are not sent to the backend; None for no limit.
    closed_shell_only: molecules with an odd number of electrons are not sent to the backend.
    atom_energies: isolated-atom energies (eV) by atomic number or symbol, for formation energies.

    Counters: `calls`, `molecules`, `failures` and `seconds` add up over the life of the oracle.
    """

    name: str
    packages: ClassVar[Mapping[str, str]] = {}
    """Packages that the oracle imports, each with the command that installs it."""
    has_uncertainty: bool = False
    max_extent: float = 500.0
    """Largest width in Angstrom. Untrained models fling atoms about, and tblite does not return for such structures."""
    elements: frozenset[int]
    """Atomic numbers that the oracle supports."""
    atom_energies: Mapping[int, float]
    """Isolated-atom energies in eV by atomic number; oracles that compute them fill the table as it is used."""

    def __init__(
        self,
        *,
        min_distance: float = 0.3,
        max_atoms: int | None = None,
        closed_shell_only: bool = False,
        atom_energies: Mapping[int | str, float] | None = None,
    ) -> None:
        if not min_distance > 0:
            raise ValueError(f"min_distance must be positive (Angstrom), got {min_distance}")
        if max_atoms is not None and max_atoms < 1:
            raise ValueError(f"max_atoms must be at least 1, or None for no limit, got {max_atoms}")
        self.min_distance = min_distance
        self.max_atoms = max_atoms
        self.closed_shell_only = closed_shell_only
        self.atom_energies = {atomic_number(z): float(e) for z, e in (atom_energies or {}).items()}
        self.calls = 0
        self.molecules = 0
        self.failures = 0
        self.seconds = 0.0

    @abstractmethod
    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        """Evaluate molecules that passed the checks: one Evaluation each, in the same order."""

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on (method, settings, weights, versions), as JSON values: the key of a cache.

        Raises ValueError for an oracle that does not say.
        """
        raise ValueError(
            f"what defines the numbers of a {type(self).__name__} is not known: pass identity= to CachedOracle, a "
            "dictionary of its method, its settings and its version"
        )

    @classmethod
    def available(cls) -> tuple[bool, str]:
        """Whether the oracle can run here; if not, the reason and the remedy."""
        missing = [p for p in cls.packages if importlib.util.find_spec(p) is None]
        if missing:
            remedy = " && ".join(cls.packages[p] for p in missing)
            return False, f"{', '.join(missing)} not installed: run `{remedy}`"
        return True, ""

    @torch.no_grad()
    def __call__(self, batch: MoleculeBatch) -> OracleResult:
        """Evaluate a batch; the result is on its device and in its dtype (float32 at least).

        Raises TypeError for anything but a MoleculeBatch. A molecule that fails is reported in the result.
        """
        if not isinstance(batch, MoleculeBatch):
            raise TypeError(
                f"expected a MoleculeBatch, got {type(batch).__name__}: build one with MoleculeBatch.from_arrays, "
                "from_ase, from_rdkit, from_smiles or from_xyz"
            )
        start = time.perf_counter()
        molecules = batch.to("cpu", torch.float64).arrays()
        answers = [Evaluation.failure(self._refusal(*m)) for m in molecules]
        good = [i for i, answer in enumerate(answers) if answer.status == OK]
        if good:
            computed = self._compute([molecules[i] for i in good])
            for i, answer in zip(good, computed, strict=True):
                answers[i] = _checked(answer, len(molecules[i][0]))
        result = self._result(answers, batch)
        self.calls += 1
        self.molecules += len(batch)
        self.failures += sum(status != OK for status in result.status)
        self.seconds += time.perf_counter() - start
        return result

    def formation_energy_per_atom(self, energy: Tensor, numbers: Tensor, mask: Tensor) -> Tensor:
        """(E - sum_i E_ref(type_i)) / N in eV per atom, with this oracle's own isolated-atom energies.

        energy (B,) in eV, numbers (B, N), mask (B, N) -> (B,). NaN energies (failed molecules) stay NaN. Raises
        ValueError when a molecule that has an energy has an element without an isolated-atom energy.
        """
        present = mask & torch.isfinite(energy).unsqueeze(-1)
        reference = torch.zeros(numbers.shape, dtype=torch.float64, device=energy.device)
        for number in numbers[present].unique().tolist():
            reference[present & (numbers == number)] = self._atom_energy(number)
        return ((energy.double() - reference.sum(-1)) / mask.sum(-1).clamp(min=1)).to(energy.dtype)

    def reset_counters(self) -> None:
        """Set `calls`, `molecules`, `failures` and `seconds` to zero."""
        self.calls = self.molecules = self.failures = 0
        self.seconds = 0.0

    def close(self) -> None:  # noqa: B027 most oracles hold nothing
        """Release worker processes, if there are any; the oracle can be used again and starts new ones."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.molecules} molecules in {self.calls} calls, {self.failures} failed)"

    def _atom_energy(self, number: int) -> float:
        try:
            return self.atom_energies[number]
        except KeyError:
            known = ", ".join(symbol(z) for z in sorted(self.atom_energies)) or "none"
            raise ValueError(
                f"the {self.name} oracle has no isolated-atom energy for {symbol(number)} (it has: {known}); "
                f"pass atom_energies={{'{symbol(number)}': <eV>, ...}} when you make the oracle"
            ) from None

    def _refusal(self, numbers: np.ndarray, positions: np.ndarray) -> str:
        """ "ok", or the reason why the molecule is not sent to the backend."""
        if len(numbers) == 0:
            return "no atoms"
        if not self.elements.issuperset(numbers.tolist()):
            return f"unsupported element {_element_names(set(numbers.tolist()) - self.elements)}"
        if self.max_atoms is not None and len(numbers) > self.max_atoms:
            return f"{len(numbers)} atoms, over the limit of {self.max_atoms} (max_atoms)"
        finite = np.isfinite(positions).all(1)
        if not finite.all():
            return f"non-finite position of atom {int(np.argmin(finite))}"
        if self.closed_shell_only and int(numbers.sum()) % 2:
            return f"odd number of electrons ({int(numbers.sum())}), closed shells only"
        extent = float(np.ptp(positions, axis=0).max())
        if extent > self.max_extent:
            return f"{extent:.0f} Angstrom wide, over the limit of {self.max_extent:g}"
        return self._too_close(positions)

    def _too_close(self, positions: np.ndarray) -> str:
        if len(positions) < 2:
            return OK
        distances = pdist(positions)
        if distances.min() >= self.min_distance:
            return OK
        full = squareform(distances) + np.diag(np.full(len(positions), np.inf))
        i, j = (int(k) for k in np.unravel_index(full.argmin(), full.shape))
        return f"atoms {i} and {j} are {distances.min():.3f} Angstrom apart, under the limit of {self.min_distance:g}"

    def _result(self, answers: list[Evaluation], batch: MoleculeBatch) -> OracleResult:
        sizes = batch.sizes.tolist()
        rows = [np.full((n, 3), np.nan) if a.forces is None else a.forces for n, a in zip(sizes, answers, strict=True)]
        forces = torch.zeros(*batch.numbers.shape, 3, dtype=torch.float64)
        forces[batch.mask.cpu()] = torch.from_numpy(np.concatenate([np.zeros((0, 3)), *rows]))
        # float32 at least: half precision cannot hold a total energy
        device, dtype = batch.positions.device, torch.promote_types(batch.positions.dtype, torch.float32)
        uncertainty = None
        if self.has_uncertainty:
            deviations = [np.nan if a.uncertainty is None else a.uncertainty for a in answers]
            uncertainty = torch.tensor(deviations, dtype=torch.float64).to(device, dtype)
        return OracleResult(
            energy=torch.tensor([a.energy for a in answers], dtype=torch.float64).to(device, dtype),
            forces=forces.to(device, dtype),
            ok=torch.tensor([a.status == OK for a in answers], dtype=torch.bool, device=device),
            status=tuple(a.status for a in answers),
            uncertainty=uncertainty,
        )


def precision_of(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What the rounding of a network's numbers depends on, for `Oracle.identity`."""
    return {"dtype": str(dtype), "device": device.type, "torch": torch.__version__}


def _checked(answer: Evaluation, n: int) -> Evaluation:
    """The answer itself, or a failure where a backend claims success without finite numbers."""
    if answer.status != OK:
        return Evaluation.failure(answer.status)
    shape = () if answer.forces is None else answer.forces.shape
    if answer.forces is None or shape != (n, 3):
        return Evaluation.failure(f"the backend gave forces of shape {shape}, expected {(n, 3)}")
    if not (np.isfinite(answer.energy) and np.isfinite(answer.forces).all()):
        return Evaluation.failure("the backend gave a non-finite energy or force")
    return answer


def _element_names(numbers: Iterable[int]) -> str:
    return ", ".join(symbol(z) if 1 <= z <= MAX_ATOMIC_NUMBER else f"number {z}" for z in sorted(numbers))
