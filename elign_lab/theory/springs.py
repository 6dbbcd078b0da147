"""A pair potential in closed form, for statements that need exact energies, forces and Hessians."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elign_lab.oracles.protocol import Evaluation, Molecule, Oracle


def spring_energy(positions: Tensor, stiffness: float = 1.0, length: float = 1.5) -> Tensor:
    """E = (stiffness / 2) sum_{i<j} (|x_i - x_j| - length)^2 in eV, of positions (..., N, 3) -> (...)."""
    i, j = torch.triu_indices(positions.shape[-2], positions.shape[-2], offset=1)
    distance = (positions[..., i, :] - positions[..., j, :]).norm(dim=-1)
    return 0.5 * stiffness * (distance - length).square().sum(-1)


class PairSprings(Oracle):
    """Springs between all pairs of atoms, blind to the elements; isolated atoms have energy 0."""

    name = "springs"
    elements = frozenset(range(1, 119))

    def __init__(self, stiffness: float = 1.0, length: float = 1.5) -> None:
        super().__init__(min_distance=1e-6, atom_energies=dict.fromkeys(range(1, 119), 0.0))
        if not stiffness > 0 or not length > 0:
            raise ValueError(f"stiffness and length must be positive, got {stiffness} and {length}")
        self.stiffness, self.length = stiffness, length

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        return [self._single_point(x) for _, x in molecules]

    def _single_point(self, positions: np.ndarray) -> Evaluation:
        x = torch.from_numpy(positions).requires_grad_()
        with torch.enable_grad():
            energy = spring_energy(x, self.stiffness, self.length)
            (gradient,) = torch.autograd.grad(energy, x)
        return Evaluation(float(energy), -gradient.numpy())
