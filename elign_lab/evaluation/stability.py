"""Bonds from distances, and the stability of atoms and molecules, as EDM defines them.

A pair of atoms has a bond when it is nearer than the typical length of that bond plus a margin (Hoogeboom et al.,
"Equivariant Diffusion for Molecule Generation in 3D", ICML 2022, appendix D). An atom is stable when its bond orders
add up to an allowed valence of the neutral atom; a molecule is stable when all its atoms are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from elign_lab.molecules import MoleculeBatch
from elign_lab.shapes import Shapes

# Typical bond lengths in picometres, of the public EDM repository (its QM9 and GEOM-Drugs tables), which names as its
# sources www.wiredchemist.com/chemistry/data/bond_energies_lengths.html and chemistry-reference.com.
_SINGLE = """
HH 74 HB 119 HC 109 HN 101 HO 96 HF 92 HSi 148 HP 144 HS 134 HCl 127 HAs 152 HBr 141 HI 161
BCl 175
CC 154 CN 147 CO 143 CF 135 CSi 185 CP 184 CS 182 CCl 177 CBr 194 CI 214
NN 145 NO 140 NF 136 NP 177 NS 168 NCl 175 NBr 214 NI 222
OO 148 OF 142 OSi 163 OP 163 OS 151 OCl 164 OBr 172 OI 194
FF 142 FSi 160 FP 156 FS 158 FCl 166 FBr 178 FI 187
SiSi 233 SiS 200 SiCl 202 SiBr 215 SiI 243
PP 221 PS 210 PCl 203 PBr 222
SS 204 SCl 207 SBr 225 SI 234
ClCl 199 ClBr 214 BrBr 228 II 266
"""
_DOUBLE = "CC 134 CN 129 CO 120 CS 160 NN 125 NO 121 OO 121 OP 150 PS 186"
_TRIPLE = "CC 120 CN 116 CO 113 NN 110"
_MARGINS = (10.0, 5.0, 3.0)  # picometres, for single, double and triple bonds
_VALENCES = {
    "H": (1,),
    "B": (3,),
    "C": (4,),
    "N": (3,),
    "O": (2,),
    "F": (1,),
    "Al": (3,),
    "Si": (4,),
    "P": (3, 5),
    "S": (4,),
    "Cl": (1,),
    "As": (3,),
    "Br": (1,),
    "I": (1,),
    "Hg": (1, 2),
    "Bi": (3, 5),
}
_MAX_VALENCE = 5
_NUMBERS = [atomic_numbers[s] for s in _VALENCES]
_PAIRS_AT_A_TIME = 1 << 20  # bounds the memory: about 100 MB of intermediate results


@dataclass(frozen=True, repr=False)
class StabilityResult(Shapes):
    """Which atoms and molecules are stable: atoms (B, N) bool, False on padding; molecule (B,) bool."""

    atoms: Tensor
    molecule: Tensor


def bond_orders(batch: MoleculeBatch) -> Tensor:
    """Bond order of every pair of atoms from EDM's distance tables: (B, N, N) int8, symmetric, 0 to 3.

    Distances are taken in float64. Pairs without a typical bond length have no bond, nor has an atom with a non-finite
    position. Raises ValueError for an element outside EDM's tables.
    """
    index = _element_index(batch)
    thresholds = _THRESHOLDS.to(batch.positions.device)
    b, n = batch.numbers.shape
    orders = torch.zeros(b, n, n, dtype=torch.int8, device=batch.positions.device)
    rows = max(1, _PAIRS_AT_A_TIME // max(1, n * n))
    for start in range(0, b, rows):
        part = slice(start, start + rows)
        distance = _distances(batch.positions[part])
        pair = index[part].unsqueeze(2) * len(_NUMBERS) + index[part].unsqueeze(1)
        real = batch.mask[part].unsqueeze(2) & batch.mask[part].unsqueeze(1)
        real &= ~torch.eye(n, dtype=torch.bool, device=real.device)
        # a shorter bond order has a smaller threshold, so the order is the number of thresholds that are passed
        for threshold in thresholds:
            orders[part] += (distance < threshold[pair]) & real
    return orders


def stability(batch: MoleculeBatch) -> StabilityResult:
    """Stable atoms and molecules by EDM's bond orders and allowed valences (neutral atoms only).

    In a molecule with a non-finite position no atom is stable. Raises ValueError for an element outside EDM's tables.
    """
    valence = bond_orders(batch).sum(-1, dtype=torch.long)
    allowed = _ALLOWED.to(valence.device)[_element_index(batch), valence.clamp(max=_MAX_VALENCE + 1)]
    atoms = allowed & batch.mask & finite(batch).unsqueeze(1)
    return StabilityResult(atoms, (atoms | ~batch.mask).all(1) & batch.mask.any(1))


def finite(batch: MoleculeBatch) -> Tensor:
    """Whether all positions of a molecule are finite: (B,) bool."""
    return torch.isfinite(batch.positions).all(-1).all(-1)


def _distances(positions: Tensor) -> Tensor:
    """Distances in picometres: (B, N, 3) in Angstrom -> (B, N, N) float64.

    Differences, not torch.cdist: its matrix-product form loses digits, and the thresholds are sharp.
    """
    x = positions.detach().double() * 100
    squares = torch.zeros(*x.shape[:2], x.shape[1], dtype=x.dtype, device=x.device)
    for axis in x.unbind(-1):
        squares += (axis.unsqueeze(2) - axis.unsqueeze(1)).square_()
    return squares.sqrt_()


def _element_index(batch: MoleculeBatch) -> Tensor:
    """Row of each atom in the tables (B, N); 0 on padding."""
    known = _INDEX.to(batch.numbers.device)
    index = known[batch.numbers.clamp(0, len(known) - 1)]
    unknown = (index < 0) & batch.mask
    if bool(unknown.any()):
        i, a = (int(k) for k in unknown.nonzero()[0])
        raise ValueError(
            f"molecule {i}, atom {a} is {chemical_symbols[int(batch.numbers[i, a])]}: EDM's bond tables have no such "
            f"element (they have {', '.join(_VALENCES)}); leave the molecule out of stability and validity"
        )
    return index.clamp(min=0)


def _parse(table: str) -> dict[frozenset[str], float]:
    """Lengths by pair of symbols, from 'CCl 177' entries: a symbol is a capital and perhaps a small letter."""
    words = table.split()
    lengths = {}
    for pair, length in zip(words[::2], words[1::2], strict=True):
        cut = next(k for k in range(1, len(pair)) if pair[k].isupper())
        lengths[frozenset((pair[:cut], pair[cut:]))] = float(length)
    return lengths


def _thresholds() -> Tensor:
    """(3, elements, elements) in picometres: the distance under which a bond is at least single, double, triple."""
    symbols = list(_VALENCES)
    thresholds = torch.zeros(3, len(symbols), len(symbols), dtype=torch.float64)
    for order, (table, margin) in enumerate(zip((_SINGLE, _DOUBLE, _TRIPLE), _MARGINS, strict=True)):
        lengths = _parse(table)
        for i, first in enumerate(symbols):
            for j, second in enumerate(symbols):
                if (pair := frozenset((first, second))) in lengths:
                    thresholds[order, i, j] = lengths[pair] + margin
    return thresholds.flatten(1)


def _allowed() -> Tensor:
    """(elements, valence) bool; the last column is for every valence over the largest allowed one."""
    allowed = torch.zeros(len(_VALENCES), _MAX_VALENCE + 2, dtype=torch.bool)
    for i, valences in enumerate(_VALENCES.values()):
        allowed[i, list(valences)] = True
    return allowed


def _index() -> Tensor:
    index = torch.full((len(chemical_symbols),), -1)
    index[_NUMBERS] = torch.arange(len(_NUMBERS))
    return index


_THRESHOLDS = _thresholds()
_ALLOWED = _allowed()
_INDEX = _index()
