"""How good the structures of a pseudo-force field are, against the number of network evaluations, for all samplers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rdkit import rdBase
from rdkit.Chem import Atom, Conformer, GetMolFrags, MolToSmiles, RWMol, SanitizeMol
from rdkit.Chem.rdDetermineBonds import DetermineBondOrders, DetermineConnectivity

from elign_lab.evaluation import evaluate
from elign_lab.evaluation.report import align_columns
from elign_lab.gpff.compositions import draw_compositions
from elign_lab.gpff.generate import SAMPLERS, generate
from elign_lab.gpff.model import PseudoForceField
from elign_lab.molecules import MoleculeBatch

if TYPE_CHECKING:
    from elign_lab.oracles import Oracle

_MAX_ITERATIONS = 1000  # of the search for bond orders, so that a wrong structure cannot hang it
BUDGETS = (4, 6, 8, 16, 32, 64, 128, 256)

# name -> sampler and its options
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ancestral": ("ancestral", {"level": "grid"}),
    "ancestral, sigma_hat": ("ancestral", {"level": "force"}),
    "heun": ("heun", {"level": "grid"}),
    "heun, sigma_hat": ("heun", {"level": "force"}),
    "adaptive ancestral": ("adaptive_ancestral", {}),
    "adaptive heun": ("adaptive_heun", {}),
    "direct": ("direct", {"strength": 1.0}),
    "relaxation": ("direct", {"strength": 0.0}),
}


@dataclass(frozen=True)
class Quality:
    """Figures of n structures that one sampler made with at most `evaluations` network calls each.

    Fractions from 0 to 1. validity: see `valid_smiles`; edm_validity and stability: connected and sanitised, and all
    atoms stable, with EDM's bonds from distance tables, which an error of 0.02 Angstrom breaks in one molecule of
    seven; uniqueness: distinct SMILES over valid ones. f_rms: median by the oracle in eV/Angstrom, NaN without one;
    failures: molecules that the oracle could not evaluate. seconds: computing time per structure.
    """

    sampler: str
    evaluations: int
    n: int
    validity: float
    edm_validity: float
    stability: float
    uniqueness: float
    f_rms: float
    failures: int | None
    seconds: float


def judge(batch: MoleculeBatch, oracle: Oracle | None = None) -> dict[str, Any]:
    """validity, edm_validity, stability, uniqueness, f_rms and failures of structures; see Quality."""
    result = evaluate(batch, oracle, connected=True, n_boot=1)
    found = [text for text in valid_smiles(batch) if text is not None]
    return {
        "validity": len(found) / len(batch),
        "edm_validity": result.validity.value,
        "stability": result.molecule_stability.value,
        "uniqueness": len(set(found)) / len(found) if found else 0.0,
        "f_rms": result.f_rms_median.value,
        "failures": result.oracle_failures,
    }


def valid_smiles(batch: MoleculeBatch) -> list[str | None]:
    """SMILES of each structure that is one neutral molecule of just its atoms, None of the others.

    Bonds from distances and bond orders from valences by RDKit (rdDetermineBonds, after Kim and Kim, Bull. Korean Chem.
    Soc. 2015, 36, 1769). Valid: all positions finite, one fragment, bond orders found without charges or radicals,
    sanitised. No hydrogen is added, so the composition is that of the structure. Stereochemistry is left out.
    """
    with rdBase.BlockLogs():
        return [_smiles(z, x) for z, x in batch.arrays()]


def _smiles(numbers: np.ndarray, positions: np.ndarray) -> str | None:
    if not np.isfinite(positions).all():
        return None
    mol, conformer = RWMol(), Conformer(len(numbers))
    conformer.Set3D(True)
    conformer.SetPositions(positions.astype(np.float64))
    for z in numbers.tolist():
        mol.AddAtom(Atom(z))
    mol.AddConformer(conformer)
    try:
        DetermineConnectivity(mol)
        if len(GetMolFrags(mol)) > 1:
            return None
        DetermineBondOrders(mol, charge=0, embedChiral=False, maxIterations=_MAX_ITERATIONS)
        SanitizeMol(mol)
    except ValueError:
        return None
    if any(atom.GetFormalCharge() or atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        return None
    return MolToSmiles(mol)


def quality_table(
    model: PseudoForceField,
    n: int = 128,
    *,
    budgets: Iterable[int] = BUDGETS,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = VARIANTS,
    oracle: Oracle | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Quality]:
    """Quality of n structures for each sampler and budget of network calls; the same compositions and seeds for all.

    Compositions are drawn from the model's training set.
    """
    compositions = draw_compositions(model.config.compositions, n, torch.Generator().manual_seed(seed))
    rows = []
    for name, (sampler, options) in variants.items():
        if sampler not in SAMPLERS:
            raise ValueError(f"variant {name!r} uses the unknown sampler {sampler!r}")
        for budget in budgets:
            started = time.process_time()
            batch = generate(
                model,
                compositions=compositions,
                sampler=sampler,
                evaluations=budget,
                seed=seed,
                batch_size=batch_size,
                **options,
            )
            seconds = (time.process_time() - started) / n
            rows.append(Quality(name, budget, n, **judge(batch, oracle), seconds=seconds))
    return rows


def quality_text(rows: Sequence[Quality]) -> str:
    """A plain-text table of the rows."""
    head = ["sampler", "NFE", "valid %", "EDM valid %", "stable %", "unique %", "f_RMS", "ms"]
    return align_columns([head, *(_cells(row) for row in rows)])


def quality_json(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """The rows for JSON: what is not known is None."""
    return [
        {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(row).items()} for row in rows
    ]


def _cells(row: Quality) -> list[str]:
    fractions = (row.validity, row.edm_validity, row.stability, row.uniqueness)
    force = "-" if math.isnan(row.f_rms) else f"{row.f_rms:.2f}"
    return [
        row.sampler, str(row.evaluations), *(f"{100 * v:.1f}" for v in fractions), force, f"{1000 * row.seconds:.0f}",
    ]  # fmt: skip
