"""The bundled evidence: the same samples of two models judged by several oracles, DFT among them (paper Figure 4).

DFT takes minutes a molecule, so that a class reads this table and recomputes some of it. `scripts/make_evidence.py`
makes it; the passport beside the file says with which models, seeds, methods and versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elign_lab.checkpoints import ASSETS
from elign_lab.molecules import MoleculeBatch

EVIDENCE = ASSETS / "evidence.npz"

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """Samples of models and what oracles say of them; molecule i of every model grew from the same noise.

    models (K names), oracles (J names); per model a batch of M molecules; energy_per_atom (K, J, M) formation energies
    in eV and f_rms (K, J, M) in eV/Angstrom, NaN where status (K, J, M) is not "ok".
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
        """Read an archive that `save` wrote. Raises FileNotFoundError, or ValueError for a foreign file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no evidence file {path}: make it with scripts/make_evidence.py")
        with np.load(path, allow_pickle=False) as archive:
            fields = {"models", "oracles", "numbers", "positions", "energy_per_atom", "f_rms", "status"}
            if missing := fields - set(archive.files):
                raise ValueError(f"{path} is not an evidence file: it has no {', '.join(sorted(missing))}")
            numbers = torch.from_numpy(archive["numbers"].astype(np.int64))
            positions = torch.from_numpy(archive["positions"])
            return cls(
                tuple(archive["models"].tolist()),
                tuple(archive["oracles"].tolist()),
                tuple(MoleculeBatch(z, x, z > 0) for z, x in zip(numbers, positions, strict=True)),
                archive["energy_per_atom"],
                archive["f_rms"],
                archive["status"],
            )


def _index(names: Sequence[str], name: str, what: str) -> int:
    if name not in names:
        raise ValueError(f"no {what} {name!r} in the evidence: expected one of {', '.join(names)}")
    return names.index(name)
