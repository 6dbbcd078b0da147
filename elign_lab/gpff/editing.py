"""Grow or replace a group: a start in which the rest of a molecule is kept and new atoms are where the group was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from ase.data import covalent_radii

from elign_lab.gpff.compositions import check_closed_shell
from elign_lab.gpff.constraints import Constraints
from elign_lab.molecules import MoleculeBatch, atomic_number


@dataclass(frozen=True)
class Edit:
    """For `generate(model, start=edit.start, constraints=edit.constraints, sigma=...)`.

    start: one molecule, the kept atoms first and in their old order, then the new ones. Noise of about 1 Angstrom lets
    a new group find its shape.
    """

    start: MoleculeBatch
    constraints: Constraints


def replace_group(
    molecule: MoleculeBatch,
    atoms: Iterable[int],
    group: Sequence[str | int],
    *,
    release: Iterable[int] = (),
) -> Edit:
    """Take `atoms` out of a molecule and put the atoms of `group` (symbols or atomic numbers) in their place.

    To grow, replace a hydrogen. All other atoms are frozen where they are, but for those in `release` (old indices).
    Raises ValueError for more than one molecule, indices out of range, a result without a free or without a kept atom,
    or one with an odd number of electrons.
    """
    if len(molecule) != 1:
        raise ValueError(f"expected one molecule to edit, got a batch of {len(molecule)}")
    n = int(molecule.sizes[0])
    out, free = set(atoms), set(release)
    for index in sorted(out | free):
        if not 0 <= index < n:
            raise ValueError(f"atom {index} is to be edited, but the molecule has atoms 0 to {n - 1}")
    kept = [i for i in range(n) if i not in out]
    if not out or not kept:
        raise ValueError(f"{len(out)} of {n} atoms are to be replaced: expected at least one, and not all")
    new = [atomic_number(element) for element in group]
    numbers, positions = molecule.numbers[0, :n], molecule.positions[0, :n]
    both = torch.cat([numbers[kept], torch.tensor(new, dtype=torch.long)])
    check_closed_shell(both.tolist(), "the edited molecule")
    place = _place(numbers, positions, sorted(out), kept, len(new))
    start = torch.cat([positions[kept], place.expand(len(new), 3)])
    frozen = tuple(k for k, i in enumerate(kept) if i not in free)
    batch = MoleculeBatch(both.unsqueeze(0), start.unsqueeze(0), torch.ones(1, len(both), dtype=torch.bool))
    return Edit(batch, Constraints(start, frozen=frozen))


def _place(numbers: torch.Tensor, positions: torch.Tensor, out: list[int], kept: list[int], new: int) -> torch.Tensor:
    """Centre of the new group (3,): in line with the old one, farther from the attachment the more atoms it has."""
    radii = torch.from_numpy(covalent_radii)[numbers].to(positions)
    gaps = torch.cdist(positions[out], positions[kept]) / (radii[out].unsqueeze(1) + radii[kept])
    first, anchor = divmod(int(gaps.argmin()), len(kept))
    root = positions[kept[anchor]]
    direction = positions[out[first]] - root
    length = direction.norm().clamp(min=1e-6)
    return root + direction / length * (length + 0.8 * (max(new, 1) ** (1 / 3) - 1))
