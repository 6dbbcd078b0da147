"""The bundled evidence: the same molecules judged by several oracles, DFT among them (paper Figure 4).

DFT takes minutes a molecule, so that a class reads these tables and recomputes some of them. EVIDENCE has samples of
the base and the aligned model, GPFF_EVIDENCE structures of the pseudo-force field beside molecules of the data.
`scripts/make_evidence.py` makes both; the passport beside a file says with which seeds, methods and versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elign_lab.archives import read_archive
from elign_lab.checkpoints import ASSETS, verify_asset
from elign_lab.evaluation.physics import physics
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle
from elign_lab.shapes import Shapes

EVIDENCE = ASSETS / "evidence.npz"
GPFF_EVIDENCE = ASSETS / "evidence-gpff.npz"

# Eight times faster than the oracle's defaults, for 0.3 meV an atom and 0.002 eV/Angstrom of f_RMS (docs/runs.md).
DFT_SETTINGS = {"density_fit": True, "grid_level": 1, "conv_tol": 1e-8}

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Evidence(Shapes):
    """Sets of molecules and what oracles say of them; molecules i of all sets belong together (noise, or composition).

    models (K names of the sets), oracles (J names); per set a batch of M molecules; energy_per_atom (K, J, M) formation
    energies in eV and f_rms (K, J, M) in eV/Angstrom, NaN where status (K, J, M) is not "ok".
    """

    models: tuple[str, ...]
    oracles: tuple[str, ...]
    molecules: tuple[MoleculeBatch, ...]
    energy_per_atom: FloatArray
    f_rms: FloatArray
    status: NDArray[np.str_]

    def of(self, model: str, oracle: str) -> tuple[FloatArray, FloatArray]:
        """Formation energy per atom (M,) and force RMS (M,) of one model's samples by one oracle."""
        k, j = _index(self.models, model, "model"), _index(self.oracles, oracle, "oracle")
        return self.energy_per_atom[k, j], self.f_rms[k, j]

    def failures(self, model: str, oracle: str) -> int:
        """Number of molecules that the oracle could not evaluate."""
        status = self.status[_index(self.models, model, "model"), _index(self.oracles, oracle, "oracle")]
        return int((status != "ok").sum())

    def save(self, path: str | Path) -> Path:
        """Write one compressed NumPy archive; positions are kept in float32."""
        width = max(batch.mask.shape[1] for batch in self.molecules)
        shape = (len(self.models), len(self.molecules[0]), width)
        numbers, positions = np.zeros(shape, np.uint8), np.zeros((*shape, 3), np.float32)
        for k, batch in enumerate(self.molecules):
            n = batch.mask.shape[1]
            numbers[k, :, :n], positions[k, :, :n] = batch.numbers.numpy(), batch.positions.numpy()
        np.savez_compressed(
            path,
            models=np.array(self.models),
            oracles=np.array(self.oracles),
            numbers=numbers,
            positions=positions,
            energy_per_atom=self.energy_per_atom,
            f_rms=self.f_rms,
            status=self.status,
        )
        return Path(path)

    @classmethod
    def load(cls, path: str | Path = EVIDENCE) -> Evidence:
        """Read an archive that `save` wrote, a bundled one after a check of its hash.

        Raises FileNotFoundError, or ValueError for a foreign or damaged file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no evidence file {path}: make it with scripts/make_evidence.py")
        if path.parent == ASSETS:
            verify_asset(path)
        names = ("models", "oracles", "numbers", "positions", "energy_per_atom", "f_rms", "status")
        arrays = read_archive(path, names, "not an evidence file")
        numbers = torch.from_numpy(arrays["numbers"].astype(np.int64))
        positions = torch.from_numpy(arrays["positions"])
        return cls(
            tuple(arrays["models"].tolist()),
            tuple(arrays["oracles"].tolist()),
            # unchecked: what a model generates may be non-finite
            tuple(MoleculeBatch(z, x, z > 0, check=False) for z, x in zip(numbers, positions, strict=True)),
            arrays["energy_per_atom"],
            arrays["f_rms"],
            arrays["status"],
        )


def judge(samples: Mapping[str, MoleculeBatch], oracles: Mapping[str, Oracle]) -> Evidence:
    """Ask every oracle about every set of molecules.

    What an oracle cannot evaluate is NaN, with its status. Raises ValueError for no samples, for sets of different
    size, and for no oracle.
    """
    if len({len(batch) for batch in samples.values()}) > 1:
        raise ValueError(f"sets of {', '.join(str(len(b)) for b in samples.values())} molecules: expected one size")
    if not samples or not oracles:
        raise ValueError(f"evidence needs molecules and oracles: got {len(samples)} sets and {len(oracles)} oracles")
    answers = [
        [physics(batch.to(dtype=torch.float64), oracle) for oracle in oracles.values()] for batch in samples.values()
    ]
    return Evidence(
        tuple(samples),
        tuple(oracles),
        tuple(batch.to("cpu", torch.float32) for batch in samples.values()),
        np.stack([[answer.energy_per_atom.numpy() for answer in row] for row in answers]),
        np.stack([[answer.f_rms.numpy() for answer in row] for row in answers]),
        np.array([[answer.status for answer in row] for row in answers]),
    )


def _index(names: Sequence[str], name: str, what: str) -> int:
    if name not in names:
        raise ValueError(f"no {what} {name!r} in the evidence: expected one of {', '.join(names)}")
    return names.index(name)
