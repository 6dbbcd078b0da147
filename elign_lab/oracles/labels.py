"""Labelled geometries for the learned oracle: what it must know is what a generator asks it about, good and bad.

`make_labels` makes them from a split of the bundled set and from diffusion models, and asks an oracle; a LabelSet keeps
the answers in one NumPy archive. Kinds of geometry:

| kind | what |
|---|---|
| minimum | the relaxed geometry itself |
| thermal | Gaussian noise of 0.01 to 0.1 Angstrom on the minimum |
| strained | noise of 0.1 to 0.3 Angstrom, and a common scale factor of 0.85 to 1.2 |
| stretched | one bond 0.6 to 2.2 times as long, the rest of the molecule moving with it, and noise up to 0.1 Angstrom |
| mmff94 | the force-field geometry, half of them with noise up to 0.05 Angstrom |
| edited | one to three atoms deleted, added or of another element, and noise up to 0.1 Angstrom |
| contact | an atom pushed, or a new one put, to 0.45 to 0.95 of the covalent distance from another atom |
| fragment | one side of a bond, closed with hydrogen, with noise up to 0.1 Angstrom: small molecules |
| diatomic | two atoms at 0.35 to 5 Angstrom |
| sample | final samples of a diffusion model |
| clean | its clean estimates x0_hat at t <= 0.35 T, with the types of the estimate |
| varied | samples with noise of 0.01 to 0.1 Angstrom, or edited as above |
| descent | points on the way downhill of a force field that is to be improved, from the generated and the edited ones |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from elign_lab.archives import read_archive
from elign_lab.datasets import load_dataset
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles._evaluation import Molecule
from elign_lab.oracles.geometries import PERTURBATIONS, descend, edited, generate, perturb, thermal
from elign_lab.oracles.protocol import Oracle

CLASHES = ("contact", "diatomic")  # kinds that are labelled up to max_force_broken
_CHUNK = 512
_ROUNDING = ("device", "gpu", "torch", "tblite", "pyscf", "fairchem")  # keys of Oracle.identity


# ---------------------------------------------------------------------- the file
@dataclass(frozen=True)
class LabelSet:
    """Geometries with energies and forces, atoms of all molecules one after the other.

    numbers (A,), positions (A, 3) in Angstrom, forces (A, 3) in eV/Angstrom; per molecule (M,): sizes, energy in eV,
    kind (a string of the table above).
    """

    numbers: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    sizes: np.ndarray
    energy: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def starts(self) -> np.ndarray:
        """First atom of each molecule, (M,)."""
        return np.cumsum(self.sizes) - self.sizes

    def subset(self, indices: np.ndarray) -> LabelSet:
        """The molecules of `indices` (integers or a mask)."""
        chosen = np.arange(len(self))[indices]
        sizes, starts = self.sizes[chosen], self.starts[chosen]
        atoms = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        atom_fields = (self.numbers[atoms], self.positions[atoms], self.forces[atoms])
        return LabelSet(*atom_fields, sizes, self.energy[chosen], self.kind[chosen])

    def molecules(self, indices: np.ndarray) -> list[Molecule]:
        """Atomic numbers and positions (float64) of the molecules of `indices` (integers)."""
        atoms = [slice(int(self.starts[i]), int(self.starts[i] + self.sizes[i])) for i in indices]
        return [(self.numbers[a].astype(np.int64), self.positions[a].astype(np.float64)) for a in atoms]

    def batch(self, indices: np.ndarray | torch.Tensor) -> tuple[MoleculeBatch, torch.Tensor, torch.Tensor]:
        """Padded molecules (float32), energies (B,) float64 and forces (B, N, 3) float32 of `indices` (integers)."""
        chosen = np.asarray(indices)
        sizes = self.sizes[chosen].astype(np.int64)
        column = np.arange(sizes.max(initial=0))
        mask = column < sizes[:, None]
        atom = np.where(mask, self.starts[chosen][:, None] + column, 0)
        batch = MoleculeBatch(
            torch.from_numpy(self.numbers[atom].astype(np.int64)),
            torch.from_numpy(self.positions[atom].astype(np.float32)),
            torch.from_numpy(mask),
            check=False,
        )
        forces = torch.from_numpy(np.where(mask[..., None], self.forces[atom], 0).astype(np.float32))
        return batch, torch.from_numpy(self.energy[chosen].astype(np.float64)), forces

    def counts(self) -> dict[str, int]:
        """Number of molecules of each kind."""
        kinds, counts = np.unique(self.kind, return_counts=True)
        return dict(zip(kinds.tolist(), counts.tolist(), strict=True))

    def save(self, path: str | Path) -> Path:
        """Write one compressed NumPy archive, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp.npz")
        np.savez_compressed(temporary, **{f.name: getattr(self, f.name) for f in fields(self)})
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read an archive that `save` wrote. Raises FileNotFoundError, or ValueError for a foreign file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no label file {path}: make it first, see elign_lab.oracles.labels.make_labels")
        return cls(**read_archive(path, [f.name for f in fields(cls)], "not a label file"))

    @classmethod
    def cat(cls, sets: Iterable[LabelSet]) -> LabelSet:
        """All molecules of several sets."""
        sets = list(sets)
        return cls(**{f.name: np.concatenate([getattr(s, f.name) for s in sets]) for f in fields(cls)})


def label(
    oracle: Oracle, geometries: Mapping[str, Sequence[Molecule]], *, max_force: float = 50.0, progress: bool = True
) -> LabelSet:
    """Energies and forces of `geometries` (kind -> molecules) from `oracle`.

    Molecules that the oracle cannot evaluate, and those with a force above max_force (eV/Angstrom) on an atom, are left
    out. Raises ValueError when nothing is left.
    """
    todo = [(kind, molecule) for kind, molecules in geometries.items() for molecule in molecules]
    kept: list[tuple[str, Molecule, float, np.ndarray]] = []
    with tqdm(total=len(todo), desc="labels", unit="molecule", disable=not progress) as bar:
        for first in range(0, len(todo), _CHUNK):
            part = todo[first : first + _CHUNK]
            result = oracle(MoleculeBatch.from_arrays([m for _, m in part], check=False).to(dtype=torch.float64))
            largest = result.forces.norm(dim=-1).amax(-1)
            good = (result.ok & (largest <= max_force)).tolist()
            kept += [
                (kind, molecule, float(result.energy[i]), result.forces[i, : len(molecule[0])].numpy())
                for i, (kind, molecule) in enumerate(part)
                if good[i]
            ]
            bar.update(len(part))
    if not kept:
        raise ValueError(f"none of {len(todo)} geometries could be labelled by the {oracle.name} oracle")
    return LabelSet(
        numbers=np.concatenate([m[0] for _, m, _, _ in kept]).astype(np.uint8),
        positions=np.concatenate([m[1] for _, m, _, _ in kept]).astype(np.float32),
        forces=np.concatenate([f for _, _, _, f in kept]).astype(np.float32),
        sizes=np.array([len(m[0]) for _, m, _, _ in kept]),
        energy=np.array([e for _, _, e, _ in kept]),
        kind=np.array([k for k, _, _, _ in kept]),
    )


# ---------------------------------------------------------------------- making one
@dataclass(frozen=True)
class LabelPlan:
    """Number of geometries of each kind (see the module's table); the defaults are those of the bundled oracle."""

    minimum: int = 3_000
    thermal: int = 14_000
    strained: int = 9_000
    stretched: int = 5_000
    mmff94: int = 4_000
    edited: int = 7_000
    contact: int = 2_500
    fragment: int = 2_500
    diatomic: int = 1_000
    samples: int = 1_280  # of each diffusion model
    clean_per_sample: int = 5
    variations: int = 4_000  # of the samples
    descents: int = 1_500
    generation_steps: int = 50
    generation_spacing: float = 2.0  # as the rollouts of alignment that ask the oracle, see NoiseSchedule.grid
    # eV/Angstrom; molecules with a larger force on an atom are left out. Clashes and generated ones may have more: the
    # potential of FED-GRPO is asked about exactly those, and two in five clean estimates have a force above 50
    max_force: float = 50.0
    max_force_broken: float = 200.0
    seed: int = 0


def make_labels(
    oracle: Oracle,
    out: str | Path,
    *,
    plan: LabelPlan | None = None,
    models: Sequence[Denoiser] = (),
    improve: Oracle | None = None,
    split: str = "train",
    progress: bool = True,
) -> LabelSet:
    """Label geometries of a split of the bundled set, and of diffusion models, with `oracle`.

    models: their samples and clean estimates are added. improve: an oracle that was fitted before; points on its way
    downhill from the edited and the generated geometries are added (a round of active learning).
    Every part is kept in the folder `out`, so that a run that was stopped goes on, and a later call with more models or
    with `improve` computes only what is new (variations are those of the first models). Raises ValueError when the
    folder was made with another plan, split or oracle (its settings or weights too).
    """
    out, plan = Path(out), plan or LabelPlan()
    about = {"oracle": oracle.name, "method": _method(oracle), "split": split, "plan": asdict(plan)}
    _check_made_by(out / "made_by.json", about)

    def part(
        name: str, geometries: Callable[[], Mapping[str, Sequence[Molecule]]], max_force: float = plan.max_force
    ) -> LabelSet:
        path = out / f"{name}.npz"
        if not path.is_file():
            label(oracle, geometries(), max_force=max_force, progress=progress).save(path)
        return LabelSet.load(path)

    data = {g: load_dataset("bundled", split=split, geometry=g) for g in ("xtb", "mmff94")}

    def perturbed(kind: str, index: int) -> Mapping[str, Sequence[Molecule]]:
        source = data["mmff94" if kind == "mmff94" else "xtb"]
        rng = np.random.default_rng([plan.seed, index])
        return {kind: perturb(source, getattr(plan, kind), PERTURBATIONS[kind], rng)}

    def generated(index: int) -> Mapping[str, Sequence[Molecule]]:
        return generate(
            models[index],
            plan.samples,
            plan.clean_per_sample,
            steps=plan.generation_steps,
            spacing=plan.generation_spacing,
            seed=plan.seed + index,
            progress=progress,
        )

    wanted = [(k, kind) for k, kind in enumerate(PERTURBATIONS) if getattr(plan, kind)]
    parts = [
        part(kind, partial(perturbed, kind, k), plan.max_force_broken if kind in CLASHES else plan.max_force)
        for k, kind in wanted
    ]
    parts += [part(f"generated-{i}", partial(generated, i), plan.max_force_broken) for i in range(len(models))]
    samples = LabelSet.cat(parts)
    samples = samples.subset(samples.kind == "sample")
    if len(samples) and plan.variations:
        rng = np.random.default_rng([plan.seed, len(PERTURBATIONS)])
        chosen = samples.molecules(rng.integers(len(samples), size=plan.variations))
        varied = [(thermal, edited)[i % 2](molecule, rng) for i, molecule in enumerate(chosen)]
        parts.append(part("varied", lambda: {"varied": varied}, plan.max_force_broken))
    if improve is not None and plan.descents:
        pool = LabelSet.cat(p.subset(np.isin(p.kind, ("edited", "sample", "clean"))) for p in parts)
        rng = np.random.default_rng([plan.seed, len(PERTURBATIONS) + 1])
        starts = pool.molecules(rng.permutation(len(pool))[: plan.descents])
        points = partial(descend, improve, starts, rng)
        parts.append(part("descent", lambda: {"descent": points()}, plan.max_force_broken))
    return LabelSet.cat(parts)


def _method(oracle: Oracle) -> dict[str, Any] | None:
    """What defines an oracle's numbers; another device or version may go on with a folder. None where it cannot say."""
    try:
        identity = oracle.identity()
    except ValueError:
        return None
    return {key: value for key, value in identity.items() if key not in _ROUNDING}


def _check_made_by(path: Path, made_by: dict[str, Any]) -> None:
    """Write down how the parts of a folder are made, or compare it with what is written there."""
    made_by = json.loads(json.dumps(made_by))  # as it is read: without tuples
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made_by, indent=2) + "\n")
    elif json.loads(path.read_text()) != made_by:
        raise ValueError(f"{path} names another oracle, split or plan: use another folder for these labels")
