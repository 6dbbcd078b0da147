"""QM9: 133,885 molecules of up to nine C, N, O, F atoms at B3LYP/6-31G(2df,p).

R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld, Scientific Data 1, 140022 (2014), CC0,
https://doi.org/10.6084/m9.figshare.c.978904. The 3,054 molecules of uncharacterized.txt are left out: 130,831 remain.

The split is that of EDM (and Cormorant, EGNN): a NumPy permutation with seed 0 of the 130,831 molecules in the order of
their gdb ids; 100,000 train, 17,748 validation, 13,083 test.
"""

from __future__ import annotations

import bz2
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase.units import Hartree
from tqdm import tqdm

from elign_lab.datasets.download import RemoteFile, fetch
from elign_lab.datasets.molecule_dataset import MoleculeDataset, centred, check_split, starts_of
from elign_lab.molecules import atomic_number

_FIGSHARE = "https://ndownloader.figshare.com/files"
# Sizes and MD5 sums as figshare's API states them.
TARBALL = RemoteFile("dsgdb9nsd.xyz.tar.bz2", f"{_FIGSHARE}/3195389", 86_144_227, "ad1ebd51ee7f5b3a6e32e974e5d54012")
UNCHARACTERIZED = RemoteFile("uncharacterized.txt", f"{_FIGSHARE}/3195404", 486_752, "a361887bacb427b8a0ce7903d92a53b4")
SDF, CSV = "gdb9.sdf", "gdb9.sdf.csv"
CACHE = "qm9_elign_lab.npz"

N_UNCHARACTERIZED = 3_054
SPLIT_SIZES = {"train": 100_000, "validation": 17_748, "test": 13_083}
N_CHARACTERIZED = sum(SPLIT_SIZES.values())

# In the order of the second line of an xyz file.
UNITS = {
    "A": "GHz",
    "B": "GHz",
    "C": "GHz",
    "mu": "Debye",
    "alpha": "Bohr^3",
    "homo": "eV",
    "lumo": "eV",
    "gap": "eV",
    "r2": "Bohr^2",
    "zpve": "eV",
    "U0": "eV",
    "U": "eV",
    "H": "eV",
    "G": "eV",
    "Cv": "cal/(mol K)",
}
_CSV_NAMES = {"U0": "u0", "U": "u298", "H": "h298", "G": "g298", "Cv": "cv"}
_TO_UNIT = np.array([Hartree if unit == "eV" else 1.0 for unit in UNITS.values()])

_ADVICE = "download it again, for example with load_dataset('qm9', root=..., download=True)"

# Sizes in the 100,000 training molecules, as in EDM's dataset configuration.
_TRAIN_SIZES = {
    3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060, 14: 5136, 15: 7796, 16: 10644,
    17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970, 22: 3393, 23: 4848, 24: 539, 25: 1506, 26: 48, 27: 266, 29: 25,
}  # fmt: skip


class _Record(NamedTuple):
    gdb_id: int
    numbers: list[int]
    positions: np.ndarray
    properties: list[float]
    smiles: str


def load_qm9(split: str = "train", root: str | Path | None = None, download: bool = False) -> MoleculeDataset:
    """QM9 with positions in Angstrom and the properties of UNITS (energies in eV), and gdb_id.

    root holds dsgdb9nsd.xyz.tar.bz2, or gdb9.sdf with gdb9.sdf.csv (DeepChem's form, which has no SMILES: `smiles` is
    then None), and uncharacterized.txt; download=True gets the tarball (86 MB) and the text from figshare. `smiles` are
    those of GDB-17. The first call writes what it has read to qm9_elign_lab.npz, which later calls use.
    A part of QM9 can be read with split="all" only. Raises FileNotFoundError for a missing file, ValueError that says
    what is wrong for a damaged one, ConnectionError when the download fails.
    """
    check_split(split)
    if root is None:
        raise ValueError(
            "QM9 is not in the package: pass root=, a folder for its files; in Python "
            "load_dataset('qm9', root=..., download=True) gets them"
        )
    root = Path(root)
    if download and not (root / CACHE).is_file():
        _download(root)
    data = _load(root)
    if download and len(data) != N_CHARACTERIZED:  # the cache is of a part
        _download(root)
        data = _load(root)
    if split == "all":
        return data
    if len(data) != N_CHARACTERIZED:
        raise ValueError(
            f"the split {split!r} is defined on the {N_CHARACTERIZED} characterised molecules of QM9, {root} has "
            f"{len(data)}: get the full set (download=True), or use split='all'"
        )
    return data.subset(edm_split(split))


def _download(root: Path) -> None:
    fetch(UNCHARACTERIZED, root)
    fetch(TARBALL, root)


def edm_split(split: str) -> np.ndarray:
    """Positions of a split's molecules among the 130,831 characterised ones in the order of their gdb ids, sorted."""
    # RandomState(0) is the stream of EDM's np.random.seed(0).
    order = np.random.RandomState(0).permutation(N_CHARACTERIZED)
    ends = np.cumsum(list(SPLIT_SIZES.values()))
    return np.sort(np.split(order, ends[:-1])[list(SPLIT_SIZES).index(split)])


def qm9_size_histogram() -> dict[int, int]:
    """Number of molecules of each size, {atoms: count}, in EDM's QM9 training split (100,000); needs no data set.

    Source: the `n_nodes` table of EDM's QM9 configuration (Hoogeboom et al. 2022).
    """
    return dict(_TRAIN_SIZES)


def _load(root: Path) -> MoleculeDataset:
    """From the cache when it is of the files that are there (or they are gone), else from the files."""
    cache = root / CACHE
    sources = _sources(root)
    if cache.is_file():
        data, of = _read_cache(cache)
        if not sources or of == _fingerprint(sources):
            return data
    if not sources:
        raise FileNotFoundError(
            f"no QM9 in {root}: expected {TARBALL.name}, or {SDF} with {CSV}; pass download=True to get the first"
        )
    excluded = _read_uncharacterized(root / UNCHARACTERIZED.name)
    records = _read_tarball(sources[0]) if sources[0].name == TARBALL.name else _read_sdf(*sources)
    kept = sorted((record for record in records if record.gdb_id not in excluded), key=lambda record: record.gdb_id)
    if not kept:
        raise ValueError(f"{sources[0]} holds no characterised molecule of QM9: {_ADVICE}")
    data = _from_records(kept, sources[0])
    _write_cache(cache, data, _fingerprint(sources))
    return data


def _sources(root: Path) -> list[Path]:
    if (root / TARBALL.name).is_file():
        return [root / TARBALL.name]
    if (root / SDF).is_file() and (root / CSV).is_file():
        return [root / SDF, root / CSV]
    return []


def _fingerprint(sources: list[Path]) -> list[list[str | int]]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]


def _from_records(records: list[_Record], source: Path) -> MoleculeDataset:
    gdb_id = np.array([record.gdb_id for record in records])
    repeated = gdb_id[1:][np.diff(gdb_id) == 0]
    if len(repeated):
        raise ValueError(f"{source} holds molecule gdb {repeated[0]} twice: {_ADVICE}")
    sizes = np.array([len(record.numbers) for record in records])
    values = np.array([record.properties for record in records]) * _TO_UNIT
    smiles = [record.smiles for record in records]
    return MoleculeDataset(
        name="qm9",
        numbers=np.concatenate([np.array(record.numbers, dtype=np.uint8) for record in records]),
        positions=centred(np.concatenate([record.positions for record in records]), sizes).astype(np.float32),
        starts=starts_of(sizes),
        sizes=sizes,
        properties={"gdb_id": gdb_id, **{key: values[:, k] for k, key in enumerate(UNITS)}},
        units={"gdb_id": "1 to 133885", **UNITS},
        smiles=np.array(smiles) if all(smiles) else None,
        passport={"source": source.name, "licence": "CC0-1.0", "doi": "10.1038/sdata.2014.22"},
    )


def _read_uncharacterized(path: Path) -> set[int]:
    """The gdb ids that QM9's authors could not characterise: the lines that start with an integer."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; it is {UNCHARACTERIZED.url}, or pass download=True")
    words = (line.split(maxsplit=1) for line in path.read_text(errors="replace").splitlines())
    ids = {int(word[0]) for word in words if word and word[0].isdigit()}
    if len(ids) != N_UNCHARACTERIZED:
        raise ValueError(f"{path} lists {len(ids)} molecules, expected {N_UNCHARACTERIZED}: {_ADVICE}")
    return ids


def _read_tarball(path: Path) -> Iterator[_Record]:
    try:
        # tarfile alone takes the end of a truncated bzip2 stream for the end of the archive
        with bz2.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in tqdm(archive, desc=path.name, unit="molecule", total=N_CHARACTERIZED + N_UNCHARACTERIZED):
                if member.isfile() and member.name.endswith(".xyz"):
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has content
                    text = content.read().decode(errors="replace")
                    yield _parse_xyz(text, f"{member.name} in {path}")
    except (EOFError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {_ADVICE}") from None


def _parse_xyz(text: str, where: str) -> _Record:
    """One file of the tarball: size; 'gdb' id and 15 properties; atoms; frequencies; SMILES; InChI."""
    lines = text.splitlines()
    try:
        n = int(lines[0])
        tag, gdb_id, *properties = lines[1].split()
        atoms = [line.replace("*^", "e").split() for line in lines[2 : 2 + n]]  # exponents are written as 1.2*^-6
        smiles = lines[n + 3].split()[0]  # the first is GDB-17's, the second that of the relaxed geometry
        record = _Record(
            int(gdb_id),
            [atomic_number(atom[0]) for atom in atoms],
            np.array([[float(x) for x in atom[1:4]] for atom in atoms]).reshape(n, 3),
            [float(x) for x in properties],
            smiles,
        )
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where} is not a QM9 xyz file ({error}): {_ADVICE}") from None
    if tag != "gdb" or len(properties) != len(UNITS):
        raise ValueError(f"{where} is not a QM9 xyz file (second line {lines[1]!r}): {_ADVICE}")
    if not (np.isfinite(record.positions).all() and np.isfinite(record.properties).all()):
        raise ValueError(f"{where} is not a QM9 xyz file (a number is not finite): {_ADVICE}")
    return record


def _read_sdf(sdf: Path, table: Path) -> Iterator[_Record]:
    from rdkit import Chem, rdBase

    rows = _read_csv(table)
    rdBase.DisableLog("rdApp.*")  # RDKit prints the records that it cannot read; here they raise
    try:
        with sdf.open("rb") as stream:
            supplier = Chem.ForwardSDMolSupplier(stream, sanitize=False, removeHs=False)
            for k, mol in enumerate(tqdm(supplier, desc=sdf.name, unit="molecule", total=len(rows))):
                if mol is None:
                    raise ValueError(f"{sdf}: record {k + 1} is truncated or damaged: {_ADVICE}")
                name = mol.GetProp("_Name")
                if name not in rows:
                    raise ValueError(f"{sdf}: record {k + 1}, {name!r}, has no row in {table}: {_ADVICE}")
                yield _Record(
                    _gdb_id(name, sdf),
                    [atom.GetAtomicNum() for atom in mol.GetAtoms()],
                    mol.GetConformer().GetPositions(),
                    rows.pop(name),
                    "",
                )
    finally:
        rdBase.EnableLog("rdApp.*")
    if rows:
        raise ValueError(f"{sdf} is truncated: {len(rows)} molecules of {table} are not in it: {_ADVICE}")


def _read_csv(path: Path) -> dict[str, list[float]]:
    """The properties by molecule name."""
    import csv

    names = ["mol_id", *(_CSV_NAMES.get(key, key) for key in UNITS)]
    rows = {}
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        missing = set(names) - set(table.fieldnames or [])
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: {_ADVICE}")
        for row in table:
            try:
                rows[row["mol_id"]] = [float(row[name]) for name in names[1:]]
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {table.line_num} is truncated or damaged: {_ADVICE}") from None
    return rows


def _gdb_id(name: str, path: Path) -> int:
    match = re.fullmatch(r"gdb_(\d+)", name)
    if match is None:
        raise ValueError(f"{path}: molecule name {name!r}, expected gdb_ and a number: {_ADVICE}")
    return int(match[1])


def _write_cache(path: Path, data: MoleculeDataset, fingerprint: list[list[str | int]]) -> None:
    temporary = path.with_suffix(".tmp")
    arrays: dict[str, Any] = {
        "numbers": data.numbers,
        "positions": data.positions,
        "sizes": data.sizes,
        **data.properties,
    }
    if data.smiles is not None:
        arrays["smiles"] = data.smiles
    with temporary.open("wb") as file:
        np.savez(file, info=np.array(json.dumps({"passport": data.passport, "of": fingerprint})), **arrays)
    temporary.replace(path)


def _read_cache(path: Path) -> tuple[MoleculeDataset, list[list[str | int]]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        info = json.loads(str(arrays["info"]))
        data = MoleculeDataset(
            name="qm9",
            numbers=arrays["numbers"],
            positions=arrays["positions"],
            starts=starts_of(arrays["sizes"]),
            sizes=arrays["sizes"],
            properties={key: arrays[key] for key in ("gdb_id", *UNITS)},
            units={"gdb_id": "1 to 133885", **UNITS},
            smiles=arrays.get("smiles"),
            passport=info["passport"],
        )
    except Exception as error:  # a damaged zip raises any of a dozen types
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again from QM9's files") from None
    return data, info["of"]
