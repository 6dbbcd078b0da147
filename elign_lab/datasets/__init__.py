"""Data sets of molecules: the bundled GFN2-xTB set, QM9 and GEOM-Drugs; splits, size histograms, batches for training.

data = load_dataset("bundled", split="train")
sampler = BatchSampler(data.sizes, batch_size=64, seed=0)
for indices in sampler.epoch(0):
    batch = data.batch(indices)
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from elign_lab.datasets.batching import BatchSampler
from elign_lab.datasets.bundled import load_bundled
from elign_lab.datasets.geom import load_geom
from elign_lab.datasets.molecule_dataset import SPLITS, MoleculeDataset
from elign_lab.datasets.qm9 import load_qm9, qm9_size_histogram

__all__ = ["SPLITS", "BatchSampler", "MoleculeDataset", "load_dataset", "qm9_size_histogram"]

_LOADERS: dict[str, Callable[..., MoleculeDataset]] = {"bundled": load_bundled, "qm9": load_qm9, "geom": load_geom}


def load_dataset(
    name: str = "bundled", *, split: str = "train", root: str | Path | None = None, **options: Any
) -> MoleculeDataset:
    """Load a data set of molecules.

    name: "bundled" (29,840 QM9 molecules at GFN2-xTB, in the package), "qm9" (B3LYP) or "geom" (GEOM-Drugs).
    split: "train", "validation", "test" or "all".
    root: folder with the files; needed for "qm9" and "geom".
    options: "bundled" takes geometry="xtb" | "mmff94"; "qm9" takes download=True; "geom" takes max_conformers, seed
    and edm_permutation.
    Raises ValueError for an unknown name, split or option, and for a file that is damaged; FileNotFoundError for a
    missing file. The docstrings of the modules `bundled`, `qm9` and `geom` give units, splits and sources.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(map(repr, _LOADERS))}")
    loader = _LOADERS[name]
    allowed = signature(loader).parameters.keys() - {"split", "root"}
    if unknown := options.keys() - allowed:
        raise ValueError(
            f"data set {name!r} has no option {', '.join(sorted(unknown))}: it has {', '.join(sorted(allowed))}"
        )
    return loader(split=split, root=root, **options)
