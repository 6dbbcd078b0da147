"""RDKit molecules and SMILES from geometry, and what is counted with them: validity, uniqueness, novelty.

The route is EDM's (Hoogeboom et al., ICML 2022, section 5.1), so that the numbers compare with the literature. It is
lenient in two ways that a reader should know: atoms have no charge and missing hydrogens are taken as implicit, so an
atom with too few bonds is still valid; and a molecule in several fragments is valid and counts as its largest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase
from rdkit.Chem import Atom, BondType, Conformer, GetMolFrags, Mol, MolToSmiles, RWMol, SanitizeMol

from elign_lab.evaluation.stability import bond_orders, finite
from elign_lab.molecules import MoleculeBatch

_BOND_TYPES = {1: BondType.SINGLE, 2: BondType.DOUBLE, 3: BondType.TRIPLE}


def rdkit_mols(batch: MoleculeBatch, *, single_bonds: bool = False) -> list[Mol]:
    """RDKit molecules with the bonds of EDM's distance tables and a conformer (Angstrom), not sanitised.

    single_bonds: every bond is single, as EDM does for GEOM-Drugs. Raises ValueError for an element outside EDM's
    tables. Non-finite positions are kept as they are; such atoms have no bonds.
    """
    mols = []
    for mol, (_, x) in zip(_bonded(batch, single_bonds), batch.arrays(), strict=True):
        conformer = Conformer(len(x))
        conformer.Set3D(True)
        conformer.SetPositions(x.astype(np.float64))
        mol.AddConformer(conformer, assignId=True)
        mols.append(mol.GetMol())
    return mols


def smiles(batch: MoleculeBatch, *, connected: bool = False, single_bonds: bool = False) -> list[str | None]:
    """SMILES of the largest fragment of each molecule, or None where RDKit cannot sanitise the molecule.

    Hydrogens are explicit, stereochemistry is left out. A molecule with a non-finite position, or without atoms, gives
    None. connected: a molecule in more than one fragment gives None too (stricter than EDM). single_bonds: as in
    `rdkit_mols`. Raises ValueError for an element outside EDM's tables.
    """
    usable = (finite(batch) & batch.mask.any(1)).tolist()
    with rdBase.BlockLogs():
        return [
            _smiles(mol, connected) if ok else None
            for mol, ok in zip(_bonded(batch, single_bonds), usable, strict=True)
        ]


def validity(smiles: Sequence[str | None]) -> float:
    """Fraction of the molecules that have a SMILES. Raises ValueError for an empty list."""
    return len(_valid(smiles)) / len(smiles)


def uniqueness(smiles: Sequence[str | None]) -> float:
    """Number of distinct SMILES over the number of valid molecules; 0 when none is valid, as EDM."""
    valid = _valid(smiles)
    return len(set(valid)) / len(valid) if valid else 0.0


def valid_and_unique(smiles: Sequence[str | None]) -> float:
    """Validity times uniqueness: the number of distinct SMILES over the number of molecules."""
    return len(set(_valid(smiles))) / len(smiles)


def novelty(smiles: Sequence[str | None], reference: Iterable[str | None]) -> float:
    """Fraction of the distinct SMILES that are not in the reference; 0 when no molecule is valid, as EDM.

    The reference must be written in the same way: make it with `elign_lab.evaluation.smiles(batch)`. Raises ValueError
    for an empty reference, or one without the explicit hydrogens that the generated SMILES have.
    """
    if isinstance(reference, str):
        raise ValueError(f"reference must be a collection of SMILES, got one string: {reference!r}")
    unique, known = set(_valid(smiles)), {s for s in reference if s is not None}
    check_reference(unique, known)
    return len(unique - known) / len(unique) if unique else 0.0


def check_reference(found: Iterable[str | None], known: set[str]) -> None:
    """Raise ValueError when `known` cannot be the reference of the novelty of `found`: see `novelty`."""
    if not known:
        raise ValueError("the reference for novelty has no SMILES: pass those of the training set")
    if any("[H]" in s for s in found if s is not None) and not any("[H]" in s for s in known):
        raise ValueError(
            "no reference SMILES has explicit hydrogens, so every molecule would count as novel: "
            "make the reference with elign_lab.evaluation.smiles(batch)"
        )


def _valid(smiles: Sequence[str | None]) -> list[str]:
    if isinstance(smiles, str):
        raise ValueError(f"expected a list of SMILES, got one string: {smiles!r}")
    if not smiles:
        raise ValueError("no molecules: expected a list with one SMILES or None per molecule")
    return [s for s in smiles if s is not None]


def _bonded(batch: MoleculeBatch, single_bonds: bool) -> Iterable[RWMol]:
    orders = bond_orders(batch).tril().cpu().numpy()  # each bond once
    if single_bonds:
        orders = np.minimum(orders, 1)
    numbers, sizes = batch.numbers.cpu().numpy(), batch.sizes.tolist()
    templates = {z: Atom(z) for z in np.unique(numbers[numbers > 0]).tolist()}
    for z, order, n in zip(numbers, orders, sizes, strict=True):
        yield _bonded_molecule(z[:n], order[:n, :n], templates)


def _bonded_molecule(numbers: NDArray[np.int64], orders: NDArray[np.int8], templates: dict[int, Atom]) -> RWMol:
    mol = RWMol()
    for number in numbers.tolist():
        mol.AddAtom(templates[number])
    first, second = np.nonzero(orders)
    for i, j, order in zip(first.tolist(), second.tolist(), orders[first, second].tolist(), strict=True):
        mol.AddBond(i, j, _BOND_TYPES[order])
    return mol


def _smiles(mol: Mol, connected: bool) -> str | None:
    try:
        SanitizeMol(mol)
        if len(GetMolFrags(mol)) > 1:
            if connected:
                return None
            mol = max(GetMolFrags(mol, asMols=True), key=Mol.GetNumAtoms)
    except ValueError:
        return None
    return MolToSmiles(mol)
