"""Make the bundled set: SMILES of QM9 -> RDKit ETKDG -> MMFF94 -> GFN2-xTB minimum -> filters -> one compressed file.

    python scripts/build_bundled_set.py compute --smiles qm9_smiles.txt --out runs/qm9_xtb --workers 2 --limit 36000
    python scripts/build_bundled_set.py pack --out runs/qm9_xtb --folder elign_lab/assets

A larger set goes on where the bundled one ends:

    python scripts/build_bundled_set.py compute --smiles qm9_smiles.txt --out runs/more --start 36000 --limit 60000
    python scripts/build_bundled_set.py pack --out runs/more --after elign_lab/assets --folder runs/qm9_xtb_large

`compute` takes the unique SMILES of the file (one a line) in an order fixed by the seed, in chunks. A finished chunk is
on disk, so a run that was stopped goes on where it was. Rejected molecules are in chunk_*.failures.jsonl, each with the
reason.
A molecule takes about 0.15 s of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import covalent_radii
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem
from scipy.constants import physical_constants
from scipy.optimize import minimize
from tblite.interface import Calculator
from tqdm import tqdm

from elign_lab.datasets.bundled import ASSETS, load_bundled, save_bundled

HARTREE = physical_constants["Hartree energy in eV"][0]
BOHR = physical_constants["Bohr radius"][0] * 1e10  # Angstrom
DEBYE = 2.541746473  # Debye per e Bohr
GRADIENT_TOLERANCE = 4e-4  # Hartree/Bohr, the largest component: 0.02 eV/Angstrom
MAX_F_RMS = 0.05  # eV/Angstrom
BOND_SCALE = 1.3  # two atoms are bonded when closer than this times the sum of their covalent radii
PER_MOLECULE = ("energy", "homo", "lumo", "dipole", "f_rms")


@dataclass(frozen=True)
class Relaxed:
    """One molecule: numbers (n,), both geometries (n, 3) in Angstrom.

    energy, homo and lumo in eV, dipole in Debye, f_rms in eV/Angstrom, all of the GFN2-xTB geometry.
    """

    smiles: str
    numbers: np.ndarray
    mmff94: np.ndarray
    xtb: np.ndarray
    energy: float
    homo: float
    lumo: float
    dipole: float
    f_rms: float


class Rejected(Exception):  # noqa: N818 - the normal outcome for one molecule in six, not an error
    """The molecule does not belong in the set; the message is the reason."""


def embed(smiles: str) -> Chem.Mol:
    """The molecule with hydrogens and an MMFF94 geometry; raises Rejected."""
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise Rejected("invalid SMILES")
    if len(Chem.GetMolFrags(mol)) != 1:
        raise Rejected("several fragments")
    if Chem.GetFormalCharge(mol) != 0:
        raise Rejected("charged")
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        raise Rejected("radical")
    mol = Chem.AddHs(mol)
    if AllChem.EmbedMolecule(mol, randomSeed=1) != 0:
        raise Rejected("ETKDG found no geometry")
    if not AllChem.MMFFHasAllMoleculeParams(mol):
        raise Rejected("no MMFF94 parameters")
    AllChem.MMFFOptimizeMolecule(mol, maxIters=2000)
    return mol


def relax(smiles: str) -> Relaxed:
    """Embed a molecule and relax it with GFN2-xTB (L-BFGS-B); raises Rejected."""
    mol = embed(smiles)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    start = mol.GetConformer().GetPositions()
    calculator = Calculator("GFN2-xTB", numbers, start / BOHR)
    calculator.set("verbosity", 0)
    result = None

    def energy_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal result
        calculator.update(x.reshape(-1, 3))
        result = calculator.singlepoint(result)  # starts from the last wave function
        return float(result.get("energy")), result.get("gradient").ravel()

    try:
        found = minimize(
            energy_and_gradient,
            (start / BOHR).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"gtol": GRADIENT_TOLERANCE, "maxiter": 200, "maxcor": 30},
        )
        # The last evaluation may be a rejected trial step of the line search.
        energy, gradient = energy_and_gradient(found.x)
    except RuntimeError as error:
        raise Rejected(f"GFN2-xTB failed: {error}") from None

    relaxed = found.x.reshape(-1, 3) * BOHR
    f_rms = float(np.sqrt((gradient.reshape(-1, 3) ** 2).sum(1).mean())) * HARTREE / BOHR
    if f_rms > MAX_F_RMS:
        raise Rejected(f"not converged: f_RMS {f_rms:.3f} eV/Angstrom")
    if not np.array_equal(bonds_of(numbers, relaxed), Chem.GetAdjacencyMatrix(mol).astype(bool)):
        raise Rejected("the bonds of the geometry are not those of the SMILES")
    levels = result.get("orbital-energies") * HARTREE
    homo = int(np.flatnonzero(result.get("orbital-occupations") > 0.5).max())
    return Relaxed(
        smiles=smiles,
        numbers=numbers,
        mmff94=start,
        xtb=relaxed,
        energy=energy * HARTREE,
        homo=float(levels[homo]),
        lumo=float(levels[homo + 1]),
        dipole=float(np.linalg.norm(result.get("dipole"))) * DEBYE,
        f_rms=f_rms,
    )


def bonds_of(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Adjacency (n, n) by distance: closer than BOND_SCALE times the sum of the covalent radii."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    return (distance < BOND_SCALE * (radii[:, None] + radii)) & ~np.eye(len(numbers), dtype=bool)


def outcome(smiles: str) -> Relaxed | dict[str, str]:
    """The relaxed molecule, or a line for the failure log."""
    RDLogger.DisableLog("rdApp.*")
    try:
        return relax(smiles)
    except Rejected as reason:
        return {"smiles": smiles, "reason": str(reason)}
    except Exception as error:  # one molecule must not stop a run of hours; the log says which and why
        return {"smiles": smiles, "reason": f"{type(error).__name__}: {error}"}


def settings_of(source: Path, seed: int, chunk_size: int) -> dict[str, Any]:
    """What decides the content of a chunk; a run is resumed only under the same settings."""
    return {
        "smiles_file": source.name,
        "smiles_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "seed": seed,
        "chunk_size": chunk_size,
        "method": "RDKit ETKDG (randomSeed 1), MMFF94, GFN2-xTB L-BFGS-B to 4e-4 Hartree/Bohr",
        "filters": "one closed-shell neutral fragment; f_RMS < 0.05 eV/Angstrom; bonds (1.3 covalent radii) kept",
        "versions": {name: version(name) for name in ("rdkit", "tblite", "scipy")},
    }


def compute(
    source: Path, out: Path, *, workers: int, limit: int | None, seed: int, chunk_size: int, start: int = 0
) -> None:
    """Relax the SMILES from number `start` to number `limit`, chunk by chunk; finished chunks are skipped."""
    if start < 0 or start % chunk_size:
        raise SystemExit(f"--start {start} is not where a chunk begins: expected a multiple of {chunk_size}")
    if not source.is_file():
        raise SystemExit(f"no such file: {source}; expected a text file with one SMILES a line")
    settings = settings_of(source, seed, chunk_size)
    smiles = sorted(set(source.read_text().split()))
    random.Random(seed).shuffle(smiles)
    smiles = smiles[:limit]
    if not smiles:
        raise SystemExit(f"{source} holds no SMILES")

    out.mkdir(parents=True, exist_ok=True)
    record = out / "settings.json"
    if record.is_file() and json.loads(record.read_text()) != settings:
        raise SystemExit(
            f"{record} is of another run (file, seed, chunk size or versions differ): choose another --out"
        )
    record.write_text(json.dumps(settings, indent=2) + "\n")

    os.environ["OMP_NUM_THREADS"] = "1"  # one core a worker; inherited because the workers are spawned
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=len(smiles), unit="molecule") as bar:
        bar.update(min(start, len(smiles)))
        for first in range(start, len(smiles), chunk_size):
            chunk, path = smiles[first : first + chunk_size], out / f"chunk_{first // chunk_size:05d}.npz"
            if not is_done(path, len(chunk)):
                save_chunk(path, list(advance(bar, pool.map(outcome, chunk, chunksize=4))))
            else:
                bar.update(len(chunk))


def advance(bar: tqdm, items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items, one step of the bar each."""
    for item in items:
        bar.update()
        yield item


def is_done(path: Path, tried: int) -> bool:
    """Whether the chunk is on disk with all its SMILES tried (a smaller --limit may have cut it)."""
    if not path.is_file():
        return False
    with np.load(path, allow_pickle=False) as chunk:
        return int(chunk["tried"]) == tried


def save_chunk(path: Path, outcomes: list[Relaxed | dict[str, str]]) -> None:
    """Write the failure log, then the molecules in one step: a chunk is there in full or not at all."""
    kept = [item for item in outcomes if isinstance(item, Relaxed)]
    rejected = [item for item in outcomes if not isinstance(item, Relaxed)]
    path.with_suffix(".failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rejected))
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            tried=len(outcomes),
            smiles=np.array([item.smiles for item in kept], dtype=str),
            sizes=np.array([len(item.numbers) for item in kept], dtype=np.int64),
            numbers=np.concatenate([np.empty(0, dtype=np.uint8), *(item.numbers.astype(np.uint8) for item in kept)]),
            mmff94=np.concatenate([np.empty((0, 3)), *(item.mmff94 for item in kept)]),
            xtb=np.concatenate([np.empty((0, 3)), *(item.xtb for item in kept)]),
            **{key: np.array([getattr(item, key) for item in kept], dtype=np.float64) for key in PER_MOLECULE},
        )
    temporary.replace(path)


def pack(out: Path, folder: Path, after: Path | None) -> Path:
    """Join the chunks of `out`, after the packed set in folder `after` if any, into the asset and its passport."""
    paths = sorted(out.glob("chunk_*.npz"))
    if not paths:
        raise SystemExit(f"no chunk_*.npz in {out}: run compute first")
    chunks = [dict(np.load(path, allow_pickle=False)) for path in paths]
    settings = json.loads((out / "settings.json").read_text())
    begins = int(paths[0].stem.removeprefix("chunk_")) * settings["chunk_size"]
    if after is not None:
        chunks.insert(0, packed_chunk(after, settings))
    if begins != (int(chunks[0]["tried"]) if after is not None else 0):
        raise SystemExit(f"{out} begins with SMILES {begins}: expected --after, a packed set of just those before it")
    tried = sum(int(chunk["tried"]) for chunk in chunks)
    joined = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0] if key != "tried"}
    script = "python scripts/build_bundled_set.py"
    return save_bundled(
        folder,
        smiles=joined["smiles"].tolist(),
        sizes=joined["sizes"],
        numbers=joined["numbers"],
        xtb_positions=joined["xtb"],
        mmff94_positions=joined["mmff94"],
        properties={key: joined[key] for key in PER_MOLECULE},
        made_by={
            "smiles_tried": tried,
            "smiles_source": "QM9 (Ramakrishnan et al., Scientific Data 1, 140022, 2014), CC0",
            "licence": "CC0-1.0",
            "commands": [
                f"{script} compute --smiles {settings['smiles_file']} --out OUT --limit {tried} "
                f"--seed {settings['seed']} --chunk-size {settings['chunk_size']}",
                f"{script} pack --out OUT",
            ],
            **settings,
        },
    )


def packed_chunk(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A packed set in the form of a chunk, if it was made with these settings."""
    data, mmff94 = (load_bundled("all", folder, geometry) for geometry in ("xtb", "mmff94"))
    for name in ("smiles_sha256", "seed", "chunk_size"):
        if data.passport[name] != settings[name]:
            raise SystemExit(f"--after {folder}: its {name} is {data.passport[name]}, here it is {settings[name]}")
    return {
        "tried": data.passport["smiles_tried"],
        "smiles": data.smiles,
        "sizes": data.sizes,
        "numbers": data.numbers,
        "xtb": data.positions,
        "mmff94": mmff94.positions,
        **data.properties,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("compute", help="relax the molecules")
    run.add_argument("--smiles", type=Path, required=True, help="text file with one SMILES a line")
    run.add_argument("--out", type=Path, required=True, help="folder of the chunks")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the number of cores)")
    run.add_argument("--limit", type=int, help="number of SMILES to try (default: all)")
    run.add_argument("--start", type=int, default=0, help="number of SMILES to leave out, computed elsewhere")
    run.add_argument("--seed", type=int, default=0, help="order of the SMILES (default 0)")
    run.add_argument("--chunk-size", type=int, default=1000, help="SMILES a file (default 1000)")
    join = commands.add_parser("pack", help="write the asset")
    join.add_argument("--out", type=Path, required=True, help="folder of the chunks")
    join.add_argument("--folder", type=Path, default=ASSETS)
    join.add_argument("--after", type=Path, help="folder of a packed set that ends where --start of this one began")
    arguments = vars(parser.parse_args())
    if arguments.pop("command") == "compute":
        compute(arguments.pop("smiles"), arguments.pop("out"), **arguments)
    else:
        print(pack(**arguments))


if __name__ == "__main__":
    main()
