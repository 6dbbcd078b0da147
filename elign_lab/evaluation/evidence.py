"""The bundled evidence: the same samples of two models judged by several oracles, DFT among them (paper Figure 4).

DFT takes minutes a molecule, so that a class reads this table and recomputes some of it. `scripts/make_evidence.py`
makes it; the passport beside the file says with which models, seeds, methods and versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elign_lab.checkpoints import ASSETS, load_model
from elign_lab.denoiser import Denoiser
from elign_lab.evaluation.physics import physics
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle, load_oracle
from elign_lab.sampling import sample

EVIDENCE = ASSETS / "evidence.npz"

# Eight times faster than the oracle's defaults, for 0.3 meV an atom and 0.002 eV/Angstrom of f_RMS (docs/runs.md).
DFT_SETTINGS = {"density_fit": True, "grid_level": 1, "conv_tol": 1e-8}

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
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
        except Exception as error:  # a damaged zip raises any of a dozen types
            raise ValueError(f"{path} is not an evidence file, or damaged: {error}") from None
        fields = {"models", "oracles", "numbers", "positions", "energy_per_atom", "f_rms", "status"}
        if missing := fields - arrays.keys():
            raise ValueError(f"{path} is not an evidence file: it has no {', '.join(sorted(missing))}")
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


def collect(
    models: Mapping[str, Denoiser],
    oracles: Mapping[str, Oracle],
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """Sample n molecules of each model from the same sizes and the same noise, and ask every oracle about them.

    steps: reverse steps of a sample (default: all). Errors: as `judge`, and what `sample` refuses.
    """
    _check_given(models, oracles)
    made = {
        name: sample(model, n, steps=steps, seed=seed, batch_size=n, progress=progress)
        for name, model in models.items()
    }
    return judge(made, oracles)


def judge(samples: Mapping[str, MoleculeBatch], oracles: Mapping[str, Oracle]) -> Evidence:
    """Ask every oracle about the samples of every model.

    What an oracle cannot evaluate is NaN, with its status. Raises ValueError for no samples and for no oracle.
    """
    _check_given(samples, oracles)
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


def _check_given(models: Mapping[str, object], oracles: Mapping[str, Oracle]) -> None:
    if not models or not oracles:
        raise ValueError(f"evidence needs models and oracles: got {len(models)} and {len(oracles)}")


def load_or_collect(
    models: Sequence[str],
    oracles: Sequence[str],
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    path: str | Path = EVIDENCE,
) -> tuple[Evidence, str]:
    """The evidence file, or, where there is none, a small evidence that is computed now; and one line that says which.

    models and oracles are names for `load_model` and `load_oracle`, n is the number of molecules of each model; they
    count for what is computed only. Errors: as `Evidence.load` for a foreign file, and as `collect`.
    """
    path = Path(path)
    if path.is_file():
        evidence, source = Evidence.load(path), f"read from {path.name}"
    else:
        with ExitStack() as stack:
            asked = {name: stack.enter_context(load_oracle(name)) for name in oracles}
            evidence = collect({name: load_model(name) for name in models}, asked, n, steps=steps, seed=seed)
        source = f"computed now, there is no {path.name} (scripts/make_evidence.py makes it, DFT included)"
    count = len(evidence.molecules[0])
    judges = ", ".join(evidence.oracles)
    return evidence, f"{source}: {count} molecules of each of {', '.join(evidence.models)}, judged by {judges}"


def _index(names: Sequence[str], name: str, what: str) -> int:
    if name not in names:
        raise ValueError(f"no {what} {name!r} in the evidence: expected one of {', '.join(names)}")
    return names.index(name)
