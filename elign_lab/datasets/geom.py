"""GEOM-Drugs: conformers of drug-like molecules from CREST, with GFN2-xTB energies.

S. Axelrod, R. Gomez-Bombarelli, Scientific Data 9, 185 (2022), https://doi.org/10.7910/DVN/JNGTDF, CC0.
The file is drugs_crude.msgpack (in drugs_crude.msgpack.tar.gz, 43 GB, file 4360331 of Harvard Dataverse): a stream of
MessagePack maps {SMILES: {"conformers": [{"xyz": [[Z, x, y, z], ...], "totalenergy": Hartree, ...}, ...], ...}}.

The first call reads the stream once, one molecule in memory at a time, keeps the conformers of lowest energy (as EDM:
30 a molecule) and writes flat binary files, which are memory-mapped from then on. The release as pickled RDKit
molecules is not read: unpickling can execute what the file says, and RDKit's binary reader is not made for untrusted
input.

EDM's split is a stored permutation of the conformers, so that conformers of one molecule are on both sides. The default
here is a seeded permutation of the molecules, with all conformers of a molecule on one side; both are 80/10/10.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase.units import Hartree
from tqdm import tqdm

from elign_lab.datasets.molecule_dataset import SPLITS, MoleculeDataset, check_split, starts_of
from elign_lab.molecules import MAX_ATOMIC_NUMBER

SOURCE = "drugs_crude.msgpack"
ARCHIVE_URL = "https://dataverse.harvard.edu/api/access/datafile/4360331"
UNITS = {"energy": "eV", "molecule": "number of the molecule in the file, from 0"}

_TYPES = {"numbers": np.uint8, "positions": np.float32, "sizes": np.uint16, "energy": np.float64, "molecule": np.uint32}
_SHARE = 0.1  # of validation and of test


def load_geom(
    split: str = "train",
    root: str | Path | None = None,
    max_conformers: int = 30,
    seed: int = 0,
    edm_permutation: str | Path | None = None,
) -> MoleculeDataset:
    """GEOM-Drugs: one entry a conformer, positions in Angstrom, `energy` (GFN2-xTB, eV), `molecule`, `smiles`.

    root holds drugs_crude.msgpack. seed: of the split by molecule. edm_permutation: EDM's geom_permutation.npy, for its
    split by conformer (needs max_conformers=30 and the full file). Raises FileNotFoundError for a missing file,
    ValueError that says what is wrong for a damaged one, ImportError without the package msgpack.
    """
    check_split(split)
    if root is None:
        raise ValueError(f"GEOM-Drugs is not in the package: pass root=, a folder that holds {SOURCE} ({ARCHIVE_URL})")
    if max_conformers < 1:
        raise ValueError(f"max_conformers must be 1 or more, got {max_conformers}")
    folder = Path(root) / f"geom_drugs_{max_conformers}"
    source = Path(root) / SOURCE
    if not folder.is_dir():
        convert(source, folder, max_conformers)
    data = _open(folder)
    if source.is_file() and source.stat().st_size != data.passport["source_bytes"]:
        raise ValueError(f"{folder} was made from another {source}: delete the folder, it is made again")
    if split == "all":
        return data
    if edm_permutation is not None:
        return data.subset(_edm_split(Path(edm_permutation), len(data), split))
    molecule = data.properties["molecule"]
    side = _sides(int(molecule.max()) + 1, np.random.default_rng(seed))
    return data.subset(side[molecule] == SPLITS.index(split))


def convert(source: str | Path, folder: str | Path, max_conformers: int = 30) -> Path:
    """Read the MessagePack stream once and write the flat files to `folder`; returns it.

    Memory: one molecule with its conformers, and the SMILES. Raises as load_geom.
    """
    source, folder = Path(source), Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)  # of a run that was stopped
    molecules = read_molecules(source)
    temporary.mkdir(parents=True)
    counts = {"molecules": 0, "conformers": 0, "atoms": 0, "molecules_without_conformer": 0}
    with ExitStack() as stack:
        files = {key: stack.enter_context((temporary / f"{key}.bin").open("wb")) for key in _TYPES}
        names = stack.enter_context((temporary / "smiles.txt").open("w"))
        for smiles, entry in molecules:
            lowest = sorted(_conformers(smiles, entry, source), key=lambda item: item[0])[:max_conformers]
            if not lowest:
                counts["molecules_without_conformer"] += 1
                continue
            for energy, xyz in lowest:
                _append(files, energy, xyz, counts["molecules"])
                counts["atoms"] += len(xyz)
            names.write(smiles + "\n")
            counts["molecules"] += 1
            counts["conformers"] += len(lowest)
    if not counts["molecules"]:
        raise ValueError(f"{source} holds no molecule: extract it again from {ARCHIVE_URL}")
    passport = {
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "max_conformers": max_conformers,
        **counts,
    }
    (temporary / "passport.json").write_text(json.dumps(passport, indent=2) + "\n")
    temporary.rename(folder)
    return folder


def read_molecules(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (SMILES, entry) pairs of the file, one at a time: a map of 1,000 molecules is never unpacked as a whole."""
    try:
        import msgpack
    except ImportError:
        raise ImportError("reading GEOM-Drugs needs the package msgpack: pip install msgpack") from None
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}; it is in the archive {ARCHIVE_URL} (43 GB)")
    return _stream(source, msgpack)


def _stream(source: Path, msgpack: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    size = source.stat().st_size
    with source.open("rb") as file, tqdm(total=size, desc=source.name, unit="B", unit_scale=True) as bar:
        unpacker = msgpack.Unpacker(file, read_size=1 << 16, max_buffer_size=2**31 - 1)
        try:
            while unpacker.tell() < size:
                for _ in range(unpacker.read_map_header()):
                    yield unpacker.unpack(), unpacker.unpack()
                    bar.update(unpacker.tell() - bar.n)
        except msgpack.OutOfData:
            raise ValueError(f"{source} is truncated at byte {size}: extract it again from {ARCHIVE_URL}") from None
        except (msgpack.UnpackException, ValueError) as error:
            where = f"{source}, byte {unpacker.tell()}"
            raise ValueError(f"{where}: not a map of GEOM ({error}): extract it again from {ARCHIVE_URL}") from None


def _conformers(smiles: Any, entry: Any, source: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(energy in eV, rows (n, 4) of Z, x, y, z) of each conformer."""
    try:
        for conformer in entry["conformers"]:
            xyz = np.array(conformer["xyz"], dtype=np.float64).reshape(-1, 4)
            energy = float(conformer["totalenergy"]) * Hartree
            numbers = xyz[:, 0]
            if not (np.isfinite(xyz).all() and np.isfinite(energy) and len(xyz)):
                raise ValueError("a conformer is empty or has a number that is not finite")
            if not ((numbers == np.rint(numbers)) & (numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)).all():
                raise ValueError("an atomic number is not one of 1 to 118")
            yield energy, xyz
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: molecule {smiles!r} is not an entry of GEOM ({error!r})") from None


def _append(files: Mapping[str, BinaryIO], energy: float, xyz: np.ndarray, molecule: int) -> None:
    positions = xyz[:, 1:] - xyz[:, 1:].mean(0)
    row = {"numbers": xyz[:, 0], "positions": positions, "sizes": len(xyz), "energy": energy, "molecule": molecule}
    for key, dtype in _TYPES.items():
        files[key].write(np.asarray(row[key]).astype(dtype).tobytes())


def _open(folder: Path) -> MoleculeDataset:
    passport = json.loads((folder / "passport.json").read_text())
    atoms, conformers = passport["atoms"], passport["conformers"]
    rows = {"numbers": atoms, "positions": 3 * atoms, "sizes": conformers, "energy": conformers, "molecule": conformers}
    for key, dtype in _TYPES.items():
        path = folder / f"{key}.bin"
        expected = rows[key] * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise ValueError(f"{path} is missing or not of {expected} bytes: delete {folder}, it is made again")
    sizes = np.fromfile(folder / "sizes.bin", dtype=_TYPES["sizes"]).astype(np.int64)
    molecule = np.fromfile(folder / "molecule.bin", dtype=_TYPES["molecule"])
    # objects: the conformers of a molecule share one string
    smiles = np.array((folder / "smiles.txt").read_text().splitlines(), dtype=object)[molecule]
    return MoleculeDataset(
        name="geom",
        numbers=np.memmap(folder / "numbers.bin", dtype=_TYPES["numbers"], mode="r"),
        positions=np.memmap(folder / "positions.bin", dtype=_TYPES["positions"], mode="r", shape=(atoms, 3)),
        starts=starts_of(sizes),
        sizes=sizes,
        properties={"energy": np.fromfile(folder / "energy.bin", dtype=_TYPES["energy"]), "molecule": molecule},
        units=UNITS,
        smiles=smiles,
        passport=passport,
    )


def _sides(n: int, generator: np.random.Generator) -> np.ndarray:
    """Side of each of n molecules: 0 train, 1 validation, 2 test."""
    tenth = int(n * _SHARE)
    side = np.zeros(n, dtype=np.uint8)
    order = generator.permutation(n)
    side[order[:tenth]] = 1
    side[order[tenth : 2 * tenth]] = 2
    return side


def _edm_split(path: Path, n: int, split: str) -> np.ndarray:
    """EDM's order: the first tenth of the permutation is validation, the second test, the rest train."""
    order = np.load(path, allow_pickle=False)
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"{path} is not a permutation of the {n} conformers of this data set (shape {order.shape})")
    tenth = int(n * _SHARE)
    parts = {"validation": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return np.sort(parts[split])
