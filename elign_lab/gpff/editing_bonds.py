"""Edits of a molecule with bonds: delete, replace an atom, add or swap a group; hydrogens follow the valences.

Molecules are RDKit molecules in which every hydrogen is an atom, with one conformer, neutral and without radicals. An
edit gives a new molecule and leaves the old one as it was. The places of new atoms are a first guess for the
pseudo-force field: bond lengths and directions from templates, nothing relaxed. Atoms that stay are not moved at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase
from rdkit.Chem import (
    AddHs,
    Atom,
    Bond,
    BondType,
    CombineMols,
    Conformer,
    GetMolFrags,
    GetPeriodicTable,
    Kekulize,
    Mol,
    MolFromSmiles,
    RWMol,
    SanitizeMol,
)
from rdkit.Chem.rdDetermineBonds import DetermineBondOrders, DetermineConnectivity
from rdkit.Chem.rdDistGeom import EmbedMolecule
from rdkit.Chem.rdMolDescriptors import CalcMolFormula
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from elign_lab.molecules import atomic_number, symbol

GROUPS: dict[str, str] = {
    "methyl": "*C",
    "hydroxyl": "*O",
    "amino": "*N",
    "fluoro": "*F",
    "cyano": "*C#N",
    "formyl": "*C=O",
    "carboxyl": "*C(=O)O",
    "methoxy": "*OC",
    "vinyl": "*C=C",
    "cyclopropyl": "*C1CC1",
    "phenyl": "*c1ccccc1",
}
"""Groups by name, as SMILES with one attachment point `*`."""

_MAX_ITERATIONS = 1000  # of the search for bond orders, so that a wrong structure cannot hang it
_TORSIONS = 12  # tried about the bond to a new group
_WAS = "_was"  # index of an atom before the edit; new and replaced atoms have none
_ORDERS = (BondType.SINGLE, BondType.DOUBLE, BondType.TRIPLE)


# ---------------------------------------------------------------------- from geometry
def perceive(numbers: NDArray[np.int64], positions: NDArray[np.floating]) -> Mol | None:
    """The molecule of atomic numbers (n,) and positions (n, 3) in Angstrom, or None where there is none.

    Bonds from distances and bond orders from valences by RDKit (rdDetermineBonds, after Kim and Kim, Bull. Korean
    Chem. Soc. 2015, 36, 1769). None: a position is not finite, more than one fragment, or no bond orders without
    charges and radicals. The atoms keep their order; no hydrogen is added.
    """
    if not np.isfinite(positions).all():
        return None
    mol = RWMol()
    for z in numbers.tolist():
        mol.AddAtom(Atom(z))
    place(mol, positions)
    with rdBase.BlockLogs():
        try:
            DetermineConnectivity(mol)
            if len(GetMolFrags(mol)) > 1:
                return None
            DetermineBondOrders(mol, charge=0, embedChiral=False, maxIterations=_MAX_ITERATIONS)
            SanitizeMol(mol)
        except ValueError:
            return None
    return mol.GetMol() if _is_neutral(mol) else None


def place(mol: Mol, positions: NDArray[np.floating]) -> None:
    """Give a molecule these positions (n, 3) in Angstrom, in place of any conformers that it has."""
    conformer = Conformer(len(positions))
    conformer.Set3D(True)
    conformer.SetPositions(np.asarray(positions, dtype=np.float64))
    mol.RemoveAllConformers()
    mol.AddConformer(conformer, assignId=True)


def origins(edited: Mol) -> list[int | None]:
    """For each atom of an edited molecule its index before the edit, or None for a new or replaced one."""
    return [atom.GetIntProp(_WAS) if atom.HasProp(_WAS) else None for atom in edited.GetAtoms()]


# ---------------------------------------------------------------------- edits
def delete_atoms(mol: Mol, atoms: Iterable[int]) -> Mol:
    """The molecule without these atoms and their hydrogens.

    Where a bond to a heavier atom is cut, hydrogens take its place. Deleting a hydrogen leaves a valence open: two of
    them on bonded atoms become a bond of higher order. Raises ValueError when nothing would be left, when the rest
    would fall into pieces, or when a valence stays open.
    """
    edited = _editable(mol)
    picked = _checked_indices(mol, atoms, "delete")
    gone = picked | {h for i in picked for h in _hydrogens(edited, i)}
    if len(gone) == mol.GetNumAtoms():
        raise ValueError(f"deleting these {len(picked)} atoms would leave no molecule: keep at least two atoms")
    caps: Counter[int] = Counter()
    open_valences: Counter[int] = Counter()
    for bond in edited.GetBonds():
        for kept, lost in (_ends(bond), _ends(bond)[::-1]):
            if kept not in gone and lost in gone:
                (open_valences if _is_hydrogen(edited, lost) else caps)[kept] += _order(bond)
    _raise_orders(edited, open_valences)
    for i, count in caps.items():
        edited.GetAtomWithIdx(i).SetNumExplicitHs(count)
    return _finished(edited, gone)


def set_element(mol: Mol, atom: int, element: str | int) -> Mol:
    """The molecule with another element at one atom; hydrogens are added or taken to fill its usual valence.

    Raises ValueError when the atom has more bonds to other atoms than the element can have.
    """
    (atom,) = _checked_indices(mol, [atom], "replace")
    number = atomic_number(element)
    edited = _editable(mol)
    site = edited.GetAtomWithIdx(atom)
    if site.GetAtomicNum() == number:
        raise ValueError(f"atom {atom} is {symbol(number)} already: choose another element")
    hydrogens = _hydrogens(edited, atom)
    taken = sum(_order(bond) for bond in site.GetBonds()) - len(hydrogens)
    valence = GetPeriodicTable().GetDefaultValence(number)
    if taken > valence:
        raise ValueError(
            f"atom {atom} has bonds of total order {taken} to other atoms than hydrogen, and {symbol(number)} can have "
            f"{max(valence, 0)}: delete a neighbour first, or choose an element with more bonds"
        )
    wanted = valence - taken
    site.SetAtomicNum(number)
    site.SetNumExplicitHs(max(0, wanted - len(hydrogens)))
    site.ClearProp(_WAS)
    neighbours = [n.GetIdx() for n in site.GetNeighbors() if n.GetIdx() not in hydrogens]
    if len(neighbours) == 1 and not hydrogens[:wanted]:  # an end of the molecule
        _stretch(edited, neighbours[0], atom)
    return _finished(edited, set(hydrogens[wanted:]))


def add_group(mol: Mol, atom: int, group: str) -> Mol:
    """The molecule with a group (a name of GROUPS, or SMILES with one `*`) in place of a hydrogen of this atom.

    A hydrogen may be named itself. Raises ValueError for an atom without a hydrogen to replace.
    """
    (atom,) = _checked_indices(mol, [atom], "grow")
    new = _group(GROUPS.get(group, group))
    edited = _editable(mol)
    if _is_hydrogen(edited, atom):
        hydrogen = atom
    else:
        hydrogens = _hydrogens(edited, atom)
        if not hydrogens:
            name = edited.GetAtomWithIdx(atom).GetSymbol()
            raise ValueError(f"atom {atom} ({name}) has no hydrogen to replace: all its bonds are taken")
        hydrogen = hydrogens[0]
    (anchor,) = (n.GetIdx() for n in edited.GetAtomWithIdx(hydrogen).GetNeighbors())
    n = edited.GetNumAtoms()
    old = edited.GetConformer().GetPositions()
    rest = np.delete(old, [hydrogen, anchor], axis=0)
    placed = _group_positions(new, edited.GetAtomWithIdx(anchor), old[anchor], old[hydrogen] - old[anchor], rest)
    edited = RWMol(CombineMols(edited, new.mol))
    place(edited, np.concatenate([old, placed]))
    edited.AddBond(anchor, n + new.first, BondType.SINGLE)
    return _finished(edited, {hydrogen, n + new.mark})


def swap_group(mol: Mol, atoms: Iterable[int], group: str) -> Mol:
    """The molecule with a group in place of these atoms and their hydrogens, which hang on the rest by one single bond.

    Raises ValueError when they hang on it by more, or are the whole molecule.
    """
    picked = _checked_indices(mol, atoms, "swap")
    gone = picked | {h for i in picked for h in _hydrogens(mol, i)}
    cut = [bond for bond in _editable(mol).GetBonds() if len(gone.intersection(_ends(bond))) == 1]
    if len(gone) == mol.GetNumAtoms():
        raise ValueError("the whole molecule is picked: open another one instead, or pick a group of it")
    if len(cut) != 1 or _order(cut[0]) != 1:
        total = sum(_order(bond) for bond in cut)
        raise ValueError(
            f"the picked atoms hang on the rest by bonds of total order {total}: a group has one single bond, so pick "
            "atoms that hang by one, or delete them"
        )
    first, second = _ends(cut[0])
    if len(gone) == 1 and _is_hydrogen(mol, *gone):
        return add_group(mol, min(gone), group)
    bare = delete_atoms(mol, picked)
    kept = origins(bare)
    cap = next(h for h in _hydrogens(bare, kept.index(second if first in gone else first)) if kept[h] is None)
    swapped = add_group(bare, cap, group)
    for atom in swapped.GetAtoms():  # two edits in one: origins are those before the first
        if atom.HasProp(_WAS):
            atom.SetIntProp(_WAS, kept[atom.GetIntProp(_WAS)])
    return swapped


# ---------------------------------------------------------------------- groups
@dataclass(frozen=True)
class _Group:
    """A group with a hydrogen (`mark`) where the rest of the molecule goes; `first` is bonded to it."""

    mol: Mol
    first: int
    mark: int


@lru_cache(maxsize=64)
def _group(smiles: str) -> _Group:
    with rdBase.BlockLogs():
        mol = MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"{smiles!r} is neither a group ({', '.join(GROUPS)}) nor valid SMILES")
    points = [atom for atom in mol.GetAtoms() if atom.GetAtomicNum() == 0]
    if len(points) != 1 or points[0].GetDegree() != 1 or points[0].GetBonds()[0].GetBondType() != BondType.SINGLE:
        raise ValueError(f"group {smiles!r} has {len(points)} attachment points: expected one '*' with a single bond")
    mark = points[0].GetIdx()
    first = points[0].GetNeighbors()[0].GetIdx()
    points[0].SetAtomicNum(1)
    mol = AddHs(mol)
    if EmbedMolecule(mol, randomSeed=1) != 0:
        raise ValueError(f"RDKit could not embed the group {smiles!r}")
    Kekulize(mol, clearAromaticFlags=True)
    return _Group(mol, first, mark)


def _group_positions(
    group: _Group, anchor: Atom, origin: NDArray, direction: NDArray, rest: NDArray
) -> NDArray[np.float64]:
    """Positions of the group's atoms, its first at a bond length from the anchor and turned away from the rest."""
    x = group.mol.GetConformer().GetPositions()
    axis = direction / np.linalg.norm(direction)
    length = _bond_length(anchor, group.mol.GetAtomWithIdx(group.first))
    x = x - x[group.first]
    turn, _ = Rotation.align_vectors([-axis], [x[group.mark]])
    x = turn.apply(x)
    turned = [Rotation.from_rotvec(2 * np.pi * k / _TORSIONS * axis).apply(x) for k in range(_TORSIONS)]
    placed = [y + origin + length * axis for y in turned]
    if not len(rest):
        return placed[0]
    body = np.arange(len(x)) != group.mark
    return max(placed, key=lambda y: cdist(y[body], rest).min())


# ---------------------------------------------------------------------- parts of an edit
def _editable(mol: Mol) -> RWMol:
    """A copy without aromatic bonds, in which no hydrogen is implied, and every atom knows its index."""
    edited = RWMol(mol)
    Kekulize(edited, clearAromaticFlags=True)
    for atom in edited.GetAtoms():
        atom.SetNoImplicit(True)
        atom.SetIntProp(_WAS, atom.GetIdx())
    return edited


def _finished(edited: RWMol, gone: set[int]) -> Mol:
    """Take atoms out, add the hydrogens that were asked for, and check that the result is one neutral molecule."""
    edited.BeginBatchEdit()
    for i in gone:
        edited.RemoveAtom(i)
    edited.CommitBatchEdit()
    edited.UpdatePropertyCache(strict=False)
    mol = AddHs(edited.GetMol(), explicitOnly=True, addCoords=True)
    for atom in mol.GetAtoms():
        atom.SetNoImplicit(True)
    pieces = GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    if len(pieces) > 1:
        formulas = " and ".join(CalcMolFormula(piece) for piece in pieces)
        raise ValueError(f"the molecule would fall into {len(pieces)} pieces, {formulas}: pick one side as a whole")
    with rdBase.BlockLogs():
        try:
            SanitizeMol(mol)
        except ValueError as error:
            raise ValueError(f"the result is not a molecule that can be: {error}") from None
    if not _is_neutral(mol):
        raise ValueError("the result would have a charge or an open valence: expected a neutral closed-shell molecule")
    return mol


def _raise_orders(edited: RWMol, open_valences: Counter[int]) -> None:
    """Turn open valences of bonded atoms into bonds of higher order."""
    for bond in edited.GetBonds():
        i, j = _ends(bond)
        gain = min(open_valences[i], open_valences[j], len(_ORDERS) - _order(bond))
        if gain > 0:
            bond.SetBondType(_ORDERS[_order(bond) + gain - 1])
            open_valences[i] -= gain
            open_valences[j] -= gain
    left = [f"{edited.GetAtomWithIdx(i).GetSymbol()} {i}" for i, count in sorted(open_valences.items()) if count > 0]
    if left:
        raise ValueError(
            f"without the hydrogen {', '.join(left)} has an open valence: replace the hydrogen by a group, delete the "
            "heavier atom, or delete one hydrogen on each of two bonded atoms for a double bond"
        )


def _checked_indices(mol: Mol, atoms: Iterable[int], verb: str) -> set[int]:
    picked = set(atoms)
    if not picked:
        raise ValueError(f"no atom is picked: pick what to {verb}")
    for i in sorted(picked):
        if not 0 <= i < mol.GetNumAtoms():
            raise ValueError(f"no atom {i} to {verb}: the molecule has atoms 0 to {mol.GetNumAtoms() - 1}")
    return picked


def _hydrogens(mol: Mol, atom: int) -> list[int]:
    """Indices of the hydrogens of an atom; a hydrogen has none."""
    if _is_hydrogen(mol, atom):
        return []
    return [n.GetIdx() for n in mol.GetAtomWithIdx(atom).GetNeighbors() if n.GetAtomicNum() == 1]


def _is_hydrogen(mol: Mol, atom: int) -> bool:
    return mol.GetAtomWithIdx(atom).GetAtomicNum() == 1


def _stretch(edited: RWMol, fixed: int, end: int) -> None:
    """Move the atom `end` along its bond to the usual length of that bond."""
    x = edited.GetConformer().GetPositions()
    direction = x[end] - x[fixed]
    length = _bond_length(edited.GetAtomWithIdx(fixed), edited.GetAtomWithIdx(end))
    x[end] = x[fixed] + length * direction / np.linalg.norm(direction)
    place(edited, x)


def _bond_length(a: Atom, b: Atom) -> float:
    """Sum of the covalent radii in Angstrom."""
    table = GetPeriodicTable()
    return float(table.GetRcovalent(a.GetAtomicNum()) + table.GetRcovalent(b.GetAtomicNum()))


def _is_neutral(mol: Mol) -> bool:
    return not any(atom.GetFormalCharge() or atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())


def _ends(bond: Bond) -> tuple[int, int]:
    return bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()


def _order(bond: Bond) -> int:
    """Order of a bond of a molecule without aromatic bonds."""
    return round(bond.GetBondTypeAsDouble())
