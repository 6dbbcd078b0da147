"""The in-memory (or memory-mapped) form of every data set: flat arrays with one start and one size per molecule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elign_lab.molecules import MoleculeBatch

SPLITS = ("train", "validation", "test")

# Molecules scanned at a time by `elements`: bounds the memory when the atoms are a memory map.
_SCAN = 65536


@dataclass(frozen=True, eq=False)
class MoleculeDataset:
    """Molecules of different sizes in flat arrays; a subset shares the arrays of its parent.

    numbers (A,) atomic numbers and positions (A, 3) in Angstrom hold the atoms of all molecules; molecule i is the
    `sizes[i]` atoms from `starts[i]` on. `properties` maps a name to an array with one row per molecule, in the unit
    `units[name]`. `smiles` (M,) is an array of strings, or None. `passport` says where the data come from.
    Positions are centred (unweighted) per molecule by every loader.
    """

    name: str
    numbers: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    properties: Mapping[str, np.ndarray] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    smiles: np.ndarray | None = None
    passport: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.positions.shape != (len(self.numbers), 3):
            raise ValueError(
                f"data set {self.name!r}: positions have shape {self.positions.shape}, "
                f"expected ({len(self.numbers)}, 3) as there are {len(self.numbers)} atomic numbers"
            )
        columns = {"starts": self.starts, **self.properties}
        if self.smiles is not None:
            columns["smiles"] = self.smiles
        for key, column in columns.items():
            if len(column) != len(self.sizes):
                raise ValueError(
                    f"data set {self.name!r}: {key} has {len(column)} rows, expected {len(self.sizes)} (molecules)"
                )
        if set(self.units) != set(self.properties):
            raise ValueError(f"data set {self.name!r}: units {set(self.units)} are not those of {set(self.properties)}")

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        sizes = f"{self.sizes.min()} to {self.sizes.max()} atoms" if len(self) else "empty"
        properties = f", properties {', '.join(self.properties)}" if self.properties else ""
        return f"MoleculeDataset({self.name!r}, {len(self)} molecules, {sizes}{properties})"

    def batch(self, indices: int | slice | Sequence[int] | np.ndarray | Tensor) -> MoleculeBatch:
        """The molecules of `indices` (an int, a slice, integers or a mask over the molecules) as a padded batch.

        float32 positions, padded to the largest molecule of the batch. Raises IndexError when an index is out of range.
        """
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        chosen = np.atleast_1d(np.arange(len(self))[indices])
        sizes = self.sizes[chosen].astype(np.int64)
        column = np.arange(sizes.max(initial=0))
        mask = column < sizes[:, None]
        atom = np.where(mask, self.starts[chosen].astype(np.int64)[:, None] + column, 0)
        return MoleculeBatch(
            torch.from_numpy(self.numbers[atom].astype(np.int64)),
            torch.from_numpy(self.positions[atom].astype(np.float32)),
            torch.from_numpy(mask),
            check=False,  # the loaders have checked the content
        )

    def subset(self, indices: slice | Sequence[int] | np.ndarray | Tensor) -> MoleculeDataset:
        """The molecules of `indices` (a slice, integers or a mask) as a data set; the atoms are not copied."""
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        chosen = np.arange(len(self))[indices]
        return MoleculeDataset(
            name=self.name,
            numbers=self.numbers,
            positions=self.positions,
            starts=self.starts[chosen],
            sizes=self.sizes[chosen],
            properties={key: value[chosen] for key, value in self.properties.items()},
            units=self.units,
            smiles=None if self.smiles is None else self.smiles[chosen],
            passport=self.passport,
        )

    def size_histogram(self) -> dict[int, int]:
        """Number of molecules of each size, {atoms: count}, in increasing order of size."""
        sizes, counts = np.unique(self.sizes, return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers that occur, in increasing order."""
        seen = np.zeros(256, dtype=bool)
        for first in range(0, len(self), _SCAN):
            sizes = self.sizes[first : first + _SCAN].astype(np.int64)
            ends = np.cumsum(sizes)
            atom = np.arange(ends[-1]) + np.repeat(self.starts[first : first + _SCAN] - (ends - sizes), sizes)
            seen[np.unique(self.numbers[atom])] = True
        return tuple(np.flatnonzero(seen).tolist())


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """First atom of each molecule, (M,) int64, when molecules of `sizes` (M,) lie one after the other."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def centred(positions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Subtract the unweighted centre of mass of each molecule. positions (A, 3), sizes (M,) -> (A, 3)."""
    mean = np.add.reduceat(positions, starts_of(sizes), axis=0, dtype=np.float64) / sizes[:, None]
    return (positions - np.repeat(mean, sizes, axis=0)).astype(positions.dtype)


def check_split(split: str) -> None:
    """Raise ValueError when `split` is not one of the names."""
    if split not in (*SPLITS, "all"):
        raise ValueError(f"unknown split {split!r}: expected 'train', 'validation', 'test' or 'all'")
