"""The state of the molecular editor and what can be done to it: plain functions from one state to the next.

A state is never changed. An edit that cannot be raises ValueError with the reason, and the caller still has the old
state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from rdkit.Chem import Mol, MolToMolBlock, MolToSmiles, RemoveHs

from elign_lab.gpff import editing_bonds as bonds
from elign_lab.gpff.compositions import check_elements
from elign_lab.gpff.constraints import Constraints, Sphere
from elign_lab.gpff.model import GPFFConfig
from elign_lab.molecules import MoleculeBatch, atomic_number, symbol


@dataclass(frozen=True, eq=False)
class Structure:
    """One molecule in the editor: atoms, places and bonds as an RDKit molecule, frozen and picked atoms.

    label: what made it, for example "add hydroxyl"; forbidden: regions that no free atom may enter when it is made
    anew, in the frame of its positions.
    """

    mol: Mol
    frozen: frozenset[int] = frozenset()
    picked: frozenset[int] = frozenset()
    label: str = ""
    forbidden: tuple[Sphere, ...] = ()

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return int(self.mol.GetNumAtoms())

    @property
    def molecule(self) -> MoleculeBatch:
        """The atoms as a batch of one, float32, Angstrom."""
        return MoleculeBatch.from_rdkit(self.mol).to(dtype=torch.float32)

    @property
    def smiles(self) -> str:
        """SMILES of the bonds, hydrogens implied, without stereochemistry."""
        return str(MolToSmiles(RemoveHs(self.mol), isomericSmiles=False))


@dataclass(frozen=True, eq=False)
class EditorState:
    """What the editor holds: the present structure, those before and after it, and the limits of the model."""

    structure: Structure
    elements: tuple[int, ...]
    max_atoms: int
    past: tuple[Structure, ...] = ()
    future: tuple[Structure, ...] = ()


def constraints_of(structure: Structure) -> Constraints | None:
    """What the frozen atoms and the forbidden regions mean for a run; None without any.

    Raises ValueError where they contradict each other.
    """
    if not structure.frozen and not structure.forbidden:
        return None
    frozen = tuple(sorted(structure.frozen))
    return Constraints(structure.molecule.positions[0], frozen=frozen, forbidden=structure.forbidden)


def open_molecule(molecule: MoleculeBatch | str, config: GPFFConfig) -> EditorState:
    """A new state from SMILES or from the first molecule of a batch, within the limits of a model's configuration.

    Raises ValueError for a molecule that the model cannot have, and for a geometry that has no neutral bonds.
    """
    batch = MoleculeBatch.from_smiles(molecule) if isinstance(molecule, str) else molecule[:1]
    if len(batch) == 0:
        raise ValueError("the batch is empty: expected at least one molecule")
    numbers, x = batch.to("cpu", torch.float32).arrays()[0]
    check_elements(numbers.tolist(), config.elements, config.max_atoms)
    mol = bonds.perceive(numbers, x)
    if mol is None:
        raise ValueError(
            f"{batch.formula(0)} is not one neutral molecule by its distances: expected a connected structure near "
            "equilibrium, without radicals and without formal charges, which nitro groups and azides have; if it is "
            "only distorted, relax it first"
        )
    return EditorState(Structure(mol, label="open"), config.elements, config.max_atoms)


# ---------------------------------------------------------------------- picking
def pick(state: EditorState, atom: int | None) -> EditorState:
    """Pick an atom, or put it back if it is picked; None puts all back. Not part of the history."""
    if atom is None:
        return pick_only(state, ())
    return pick_only(state, state.structure.picked ^ {atom})


def pick_only(state: EditorState, atoms: Iterable[int]) -> EditorState:
    """Pick exactly these atoms. Raises ValueError for an index out of range."""
    atoms = frozenset(atoms)
    for i in sorted(atoms):
        if not 0 <= i < state.structure.n_atoms:
            raise ValueError(f"no atom {i} to pick: the molecule has atoms 0 to {state.structure.n_atoms - 1}")
    return replace(state, structure=replace(state.structure, picked=atoms))


# ---------------------------------------------------------------------- edits of the picked atoms
def delete(state: EditorState) -> EditorState:
    """Delete the picked atoms and their hydrogens; see `editing_bonds.delete_atoms`."""
    return _edited(state, bonds.delete_atoms(state.structure.mol, state.structure.picked), "delete")


def replace_element(state: EditorState, element: str | int) -> EditorState:
    """Put another element in the place of the picked atom; see `editing_bonds.set_element`."""
    number = atomic_number(element)
    check_elements([number], state.elements, state.max_atoms)
    atom = _the_picked_atom(state, "replace")
    return _edited(state, bonds.set_element(state.structure.mol, atom, number), f"replace by {symbol(number)}")


def add_group(state: EditorState, group: str) -> EditorState:
    """Grow a group in place of a hydrogen of the picked atom; see `editing_bonds.add_group`."""
    atom = _the_picked_atom(state, "grow")
    return _edited(state, bonds.add_group(state.structure.mol, atom, group), f"add {group}")


def swap_group(state: EditorState, group: str) -> EditorState:
    """Put a group in the place of the picked atoms and their hydrogens; see `editing_bonds.swap_group`."""
    return _edited(state, bonds.swap_group(state.structure.mol, state.structure.picked, group), f"swap for {group}")


# ---------------------------------------------------------------------- frozen atoms
def freeze(state: EditorState) -> EditorState:
    """Freeze the picked atoms: they stay where they are. Raises ValueError when no atom would be free."""
    _check_picked(state, "freeze")
    return _frozen(state, state.structure.frozen | state.structure.picked, "freeze")


def free(state: EditorState) -> EditorState:
    """Free the picked atoms, or all of them where none is picked."""
    s = state.structure
    return _frozen(state, s.frozen - s.picked if s.picked else frozenset(), "free")


def freeze_rest(state: EditorState) -> EditorState:
    """Freeze all atoms but the picked ones, which become free."""
    _check_picked(state, "keep free")
    return _frozen(state, frozenset(range(state.structure.n_atoms)) - state.structure.picked, "freeze the rest")


# ---------------------------------------------------------------------- forbidden regions
def forbid(state: EditorState, radius: float, centre: Sequence[float] | None = None) -> EditorState:
    """Forbid a sphere (Angstrom) to the free atoms: at `centre`, or one around the place of each picked atom.

    The region stays where it is when its atom moves; free atoms inside leave it when they are made anew. Raises
    ValueError for what Sphere refuses, a region that is forbidden already, a frozen atom inside, and regions that leave
    an atom no way out.
    """
    if centre is None:
        if not state.structure.picked:
            raise ValueError("no atom is picked: pick the atoms whose places to forbid, or give a centre x, y, z")
        x = state.structure.molecule.positions[0]
        centres = [x[i].tolist() for i in sorted(state.structure.picked)]
    else:
        centres = [list(map(float, centre))]
    new = tuple(Sphere(tuple(place), float(radius)) for place in centres)
    for sphere in new:
        if sphere in state.structure.forbidden:
            raise ValueError(f"the {sphere} is forbidden already")
    return _with_regions(state, state.structure.forbidden + new, f"forbid {len(new)} region{'s' * (len(new) > 1)}")


def allow(state: EditorState, region: int | None = None) -> EditorState:
    """Allow a forbidden region again, by its index in `structure.forbidden`; None: all. Raises ValueError for none."""
    regions = state.structure.forbidden
    if not regions:
        raise ValueError("no region is forbidden: nothing to allow")
    if region is None:
        return _with_regions(state, (), "allow all regions")
    if not 0 <= region < len(regions):
        raise ValueError(f"no region {region} to allow: there are regions 0 to {len(regions) - 1}")
    return _with_regions(state, regions[:region] + regions[region + 1 :], "allow 1 region")


# ---------------------------------------------------------------------- history
def commit(state: EditorState, structure: Structure) -> EditorState:
    """The state with a new structure; the present one becomes the last of the past."""
    return replace(state, structure=structure, past=(*state.past, state.structure), future=())


def undo(state: EditorState) -> EditorState:
    """One step back. Raises ValueError at the beginning."""
    if not state.past:
        raise ValueError("nothing to undo: this is where the editor began")
    *past, last = state.past
    return replace(state, structure=last, past=tuple(past), future=(state.structure, *state.future))


def redo(state: EditorState) -> EditorState:
    """One step forward again. Raises ValueError when nothing was undone since the last edit."""
    if not state.future:
        raise ValueError("nothing to redo: no edit was undone since the last one")
    following, *future = state.future
    return replace(state, structure=following, past=(*state.past, state.structure), future=tuple(future))


def to_sdf(state: EditorState) -> str:
    """SDF text of the present structure with the editor's bonds (V2000, one molecule)."""
    mol = Mol(state.structure.mol)
    mol.SetProp("_Name", state.structure.smiles)
    return f"{MolToMolBlock(mol)}$$$$\n"


# ---------------------------------------------------------------------- parts
def _edited(state: EditorState, mol: Mol, label: str) -> EditorState:
    """Accept an edited molecule: within the limits, frozen atoms by their new indices, new atoms picked."""
    check_elements([atom.GetAtomicNum() for atom in mol.GetAtoms()], state.elements, state.max_atoms)
    was = bonds.origins(mol)
    frozen = frozenset(k for k, i in enumerate(was) if i in state.structure.frozen)
    new = frozenset(k for k, i in enumerate(was) if i is None)
    return commit(state, replace(state.structure, mol=mol, frozen=frozen, picked=new, label=label))


def _frozen(state: EditorState, frozen: frozenset[int], label: str) -> EditorState:
    if len(frozen) == state.structure.n_atoms:
        raise ValueError(f"all {len(frozen)} atoms would be frozen, and nothing left to generate: keep one free")
    return _constrained(state, replace(state.structure, frozen=frozen, label=label))


def _with_regions(state: EditorState, forbidden: tuple[Sphere, ...], label: str) -> EditorState:
    return _constrained(state, replace(state.structure, forbidden=forbidden, label=label))


def _constrained(state: EditorState, structure: Structure) -> EditorState:
    """Accept a structure if its constraints do not contradict each other."""
    constraints_of(structure)
    return commit(state, structure)


def _check_picked(state: EditorState, verb: str) -> None:
    if not state.structure.picked:
        raise ValueError(f"no atom is picked: pick what to {verb}")


def _the_picked_atom(state: EditorState, verb: str) -> int:
    picked = state.structure.picked
    if len(picked) != 1:
        raise ValueError(f"{len(picked)} atoms are picked: pick the one to {verb}")
    return next(iter(picked))
