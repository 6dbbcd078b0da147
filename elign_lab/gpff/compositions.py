"""Compositions: what the atoms of a molecule are, from a formula or from the distribution of the training set."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from elign_lab.molecules import atomic_number, symbol

if TYPE_CHECKING:
    from elign_lab.datasets import MoleculeDataset

_TERM = re.compile(r"([A-Z][a-z]?)((?:[1-9]\d*)?)")
# heavy atoms first, as in the data sets; the order has no meaning for the model
_LAST = 1
# electron pairs that an atom shares; a formal charge of +1 here and -1 there leaves the sum as it is
_VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}


def parse_formula(formula: str) -> tuple[int, ...]:
    """Atomic numbers of a formula such as 'C2H6O', heavy atoms first.

    Raises ValueError when the text is not a formula, names an unknown element, is a single atom, or has no molecule
    (see check_closed_shell).
    """
    text = formula.strip()
    if not text or _TERM.sub("", text):
        raise ValueError(
            f"{formula!r} is not a formula: expected element symbols with counts of 1 or more, such as 'C2H6O'"
        )
    counts: Counter[int] = Counter()
    for element, count in _TERM.findall(text):
        counts[atomic_number(element)] += int(count or 1)
    numbers = tuple(z for z in sorted(counts, key=lambda z: (z == _LAST, z)) for _ in range(counts[z]))
    if len(numbers) < 2:
        raise ValueError(f"{formula!r} has {len(numbers)} atoms: a structure needs 2 or more")
    check_closed_shell(numbers, repr(formula))
    return numbers


def read_composition(composition: str | Sequence[int]) -> tuple[int, ...]:
    """Atomic numbers of a formula or of a list of them. Raises ValueError for anything else, such as 6.5 or 'C'."""
    if isinstance(composition, str):
        return parse_formula(composition)
    try:
        return tuple(operator.index(z) for z in composition)
    except TypeError:
        raise ValueError(
            f"the composition {composition!r}: expected a formula, such as 'CH4', or a list of whole atomic numbers, "
            "such as [6, 1, 1, 1, 1]"
        ) from None


def check_closed_shell(numbers: Sequence[int], what: str) -> None:
    """Raise ValueError when no neutral molecule in one piece has these atoms; `what` names them in the message.

    That is with an odd number of electrons, and with too few bonds to hold all atoms together (H, C, N, O and F only).
    """
    if sum(numbers) % 2:
        raise ValueError(
            f"{what} has {sum(numbers)} electrons, an odd number, so no neutral closed-shell molecule has it: "
            "add or remove one hydrogen"
        )
    valences, needed = sum(_VALENCES.get(z, 2 * len(numbers)) for z in numbers), 2 * (len(numbers) - 1)
    if valences < needed:
        raise ValueError(
            f"{what} has {len(numbers)} atoms with {valences // 2} bonds among them at most, and one molecule needs "
            f"{needed // 2}: take out hydrogen or fluorine"
        )


def check_elements(numbers: Iterable[int], elements: Sequence[int], max_atoms: int) -> None:
    """Raise ValueError for an element that the model does not know, or for too many atoms."""
    numbers = list(numbers)
    foreign = sorted(set(numbers) - set(elements))
    if foreign:
        names, known = (", ".join(symbol(z) for z in group) for group in (foreign, elements))
        raise ValueError(f"the composition has {names}, which the model was not trained on: it knows {known}")
    if len(numbers) > max_atoms:
        raise ValueError(f"the composition has {len(numbers)} atoms, over the model's limit of {max_atoms}")


def formula_of(numbers: Iterable[int]) -> str:
    """Formula of atomic numbers in Hill order, such as 'C2H6O'."""
    counts = Counter(chemical_symbols[z] for z in numbers)
    order = [s for s in ("C", "H") if s in counts] if "C" in counts else []
    order += sorted(s for s in counts if s not in order)
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)


def composition_counts(data: MoleculeDataset) -> tuple[tuple[str, int], ...]:
    """Formulas of a data set and how often each occurs, the most frequent first."""
    counts: Counter[str] = Counter()
    for start, size in zip(data.starts.tolist(), data.sizes.tolist(), strict=True):
        counts[formula_of(np.sort(data.numbers[start : start + size]).tolist())] += 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def draw_compositions(
    counts: Sequence[tuple[str, int]], n: int, generator: torch.Generator | None = None
) -> list[tuple[int, ...]]:
    """n compositions (atomic numbers) from formulas with counts. Raises ValueError when there are none."""
    if not counts:
        raise ValueError("the model has no compositions to draw from: give them, for example ['C2H6O']")
    share = torch.tensor([float(count) for _, count in counts])
    chosen = torch.multinomial(share, n, replacement=True, generator=generator).tolist()
    return [parse_formula(counts[k][0]) for k in chosen]


def pad_compositions(compositions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Atomic numbers of molecules -> numbers (B, N) int64 and mask (B, N), padded."""
    longest = max(map(len, compositions))
    numbers = torch.zeros(len(compositions), longest, dtype=torch.long)
    for row, atoms in zip(numbers, compositions, strict=True):
        row[: len(atoms)] = torch.tensor(list(atoms))
    return numbers, numbers > 0
