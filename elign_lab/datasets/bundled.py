"""The bundled set: QM9 molecules relaxed with MMFF94 and GFN2-xTB, as `assets/qm9_xtb.npz` with its passport.

`scripts/build_bundled_set.py` makes it. The file is a plain NumPy archive (no pickle):

| key | type | meaning |
|---|---|---|
| smiles | uint8 | the SMILES that were embedded, UTF-8, joined by newlines |
| sizes | (M,) uint8 | atoms of each molecule |
| numbers | (A,) uint8 | atomic numbers, molecules one after the other |
| positions | (A, 3) int16 | GFN2-xTB geometry, centred, in steps of 2.5e-4 Angstrom |
| mmff94_shift | (A, 3) int16 | MMFF94 geometry less the (stored) GFN2-xTB one, in steps of 1e-3 Angstrom |
| energy | (M,) float64 | GFN2-xTB total energy, eV |
| homo, lumo | (M,) float32 | GFN2-xTB orbital energies, eV |
| dipole | (M,) float32 | GFN2-xTB dipole moment, Debye |
| f_rms | (M,) float32 | residual f_RMS before rounding, eV/Angstrom |
| split | (M,) uint8 | 0 train, 1 validation, 2 test |

Rounding the positions adds at most 0.007 eV/Angstrom to f_RMS (200 molecules; mean 0.0118 before, 0.0134 after).
The split is 80/10/10 by a hash of the SMILES without stereochemistry: stereoisomers stay on one side, and a molecule
keeps its side when the set grows.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elign_lab.datasets.molecule_dataset import SPLITS, MoleculeDataset, centred, check_split, starts_of

ASSETS = Path(__file__).parents[1] / "assets"
STEM = "qm9_xtb"
GEOMETRIES = ("xtb", "mmff94")
UNITS = {"energy": "eV", "homo": "eV", "lumo": "eV", "dipole": "Debye", "f_rms": "eV/Angstrom"}

_XTB_STEP = 2.5e-4
_MMFF94_STEP = 1e-3
_SPLIT_SHARES = (8, 1, 1)  # of ten hash buckets


def load_bundled(split: str = "train", root: str | Path | None = None, geometry: str = "xtb") -> MoleculeDataset:
    """The bundled set, geometry "xtb" (minima of GFN2-xTB) or "mmff94" (the force-field geometries they came from).

    The properties are those of the GFN2-xTB geometry in both cases. root: another folder that holds qm9_xtb.npz and
    qm9_xtb.json. Raises FileNotFoundError for a missing file, ValueError when the file is not the passport's.
    """
    check_split(split)
    if geometry not in GEOMETRIES:
        raise ValueError(f"unknown geometry {geometry!r}: expected 'xtb' or 'mmff94'")
    passport, arrays = _read(ASSETS if root is None else Path(root))
    sizes = arrays["sizes"].astype(np.int64)
    positions = arrays["positions"] * np.float32(_XTB_STEP)
    if geometry == "mmff94":
        positions += arrays["mmff94_shift"] * np.float32(_MMFF94_STEP)
    data = MoleculeDataset(
        name="bundled",
        numbers=arrays["numbers"],
        positions=centred(positions, sizes),
        starts=starts_of(sizes),
        sizes=sizes,
        properties={key: arrays[key] for key in UNITS},
        units=UNITS,
        smiles=np.array(arrays["smiles"].tobytes().decode().split("\n")),
        passport=passport,
    )
    return data if split == "all" else data.subset(arrays["split"] == SPLITS.index(split))


def save_bundled(
    folder: str | Path,
    *,
    smiles: Sequence[str],
    sizes: np.ndarray,
    numbers: np.ndarray,
    xtb_positions: np.ndarray,
    mmff94_positions: np.ndarray,
    properties: Mapping[str, np.ndarray],
    made_by: Mapping[str, Any],
) -> Path:
    """Write qm9_xtb.npz and its passport qm9_xtb.json to `folder`; returns the path of the npz.

    Positions (A, 3) in Angstrom of molecules one after the other; properties with the keys and units of UNITS;
    made_by goes into the passport. Raises ValueError when a position does not fit the 16-bit steps.
    """
    sizes = np.asarray(sizes)
    xtb = _quantised(centred(np.asarray(xtb_positions, dtype=np.float64), sizes), _XTB_STEP)
    mmff94 = centred(np.asarray(mmff94_positions, dtype=np.float64), sizes)
    split = np.array([split_of(text) for text in smiles], dtype=np.uint8)
    content = io.BytesIO()
    np.savez_compressed(
        content,
        smiles=np.frombuffer("\n".join(smiles).encode(), dtype=np.uint8),
        sizes=sizes.astype(np.uint8),
        numbers=numbers.astype(np.uint8),
        positions=xtb,
        mmff94_shift=_quantised(mmff94 - xtb * _XTB_STEP, _MMFF94_STEP),
        split=split,
        **{key: np.asarray(properties[key], dtype=np.float64 if key == "energy" else np.float32) for key in UNITS},  # type: ignore[arg-type]
    )
    passport = {
        "file": f"{STEM}.npz",
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "bytes": content.getbuffer().nbytes,
        "molecules": len(sizes),
        "atoms": int(sizes.sum()),
        "split": {name: int((split == k).sum()) for k, name in enumerate(SPLITS)},
        "units": {"positions": "Angstrom", **UNITS},
        "position_steps": {"xtb": _XTB_STEP, "mmff94": _MMFF94_STEP},
        **made_by,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{STEM}.npz"
    path.write_bytes(content.getvalue())
    path.with_suffix(".json").write_text(json.dumps(passport, indent=2) + "\n")
    return path


def split_of(smiles: str) -> int:
    """Side of a molecule: 0 train, 1 validation, 2 test, from the SHA-256 of its SMILES without stereochemistry."""
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"{smiles!r} is not a valid SMILES string")
    digest = hashlib.sha256(Chem.MolToSmiles(mol, isomericSmiles=False).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % sum(_SPLIT_SHARES)
    return int(np.searchsorted(np.cumsum(_SPLIT_SHARES), bucket, side="right"))


def _quantised(values: np.ndarray, step: float) -> np.ndarray:
    steps = np.rint(values / step)
    limit = np.iinfo(np.int16).max
    if np.abs(steps).max(initial=0) > limit:
        raise ValueError(f"a coordinate of {np.abs(values).max():.2f} A is over the limit of {limit * step:.2f} A")
    return steps.astype(np.int16)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The passport and the arrays, after the check of the SHA-256."""
    path = folder / f"{STEM}.npz"
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(f"no such file: {needed}; reinstall elign_lab or run scripts/build_bundled_set.py")
    passport = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != passport["sha256"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {digest[:16]}..., {path.with_suffix('.json').name} says "
            f"{passport['sha256'][:16]}...; reinstall elign_lab or run scripts/build_bundled_set.py pack again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return passport, dict(archive)
