"""Checks that other projects and the notebooks can use: equivariance, forces against energies, batch against single.

Tolerances have names: Tolerance.FLOAT32 and Tolerance.FLOAT64, relative to the largest entry.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np
import torch
from scipy.stats import ortho_group
from torch import Tensor

from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Evaluation, Molecule, Oracle, OracleResult


class Tolerance(float, Enum):
    """Largest deviation allowed, relative to the largest entry of what is compared."""

    FLOAT32 = 2e-5
    FLOAT64 = 1e-11


class SpringOracle(Oracle):
    """Springs between all pairs of atoms, E = sum_{i<j} (r_ij - rest)^2 / 2: exact, instant, without chemistry.

    For tests of code that needs an oracle. rest in Angstrom, stiffness 1 eV/Angstrom^2. `fail(numbers)` may refuse a
    molecule, to see what the caller does with it.
    """

    name = "spring"
    elements = frozenset(range(1, 119))
    max_extent = float("inf")

    def __init__(self, rest: float = 1.5, fail: Callable[[np.ndarray], bool] | None = None) -> None:
        super().__init__(min_distance=1e-6, atom_energies=dict.fromkeys(self.elements, 0.0))
        self.rest, self.fail = rest, fail

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        return [self._springs(numbers, x) for numbers, x in molecules]

    def _springs(self, numbers: np.ndarray, x: np.ndarray) -> Evaluation:
        if self.fail is not None and self.fail(numbers):
            return Evaluation.failure("refused by SpringOracle(fail=...)")
        difference = x[:, None] - x[None]
        other = 1 - np.eye(len(x))
        r = np.sqrt((difference**2).sum(-1) + np.eye(len(x)))
        stretch = (r - self.rest) * other
        return Evaluation(float(0.25 * (stretch**2).sum()), -((stretch / r)[..., None] * difference).sum(1))


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """The named tolerance of a dtype."""
    return Tolerance.FLOAT64 if dtype == torch.float64 else Tolerance.FLOAT32


def random_orthogonal(generator: torch.Generator, *, reflection: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Haar-random orthogonal 3 x 3 matrix of determinant -1 (reflection) or +1 (rotation)."""
    seed = int(torch.randint(2**31, (), generator=generator))
    q = torch.from_numpy(ortho_group.rvs(3, random_state=np.random.default_rng(seed)))
    wanted = -1.0 if reflection else 1.0
    if torch.linalg.det(q) * wanted < 0:
        q = -q
    return q.to(dtype)


def equivariance_errors(
    function: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    mask: Tensor,
    generator: torch.Generator,
) -> dict[str, float]:
    """How far `function(z, mask)` is from commuting with each symmetry, relative to its largest output.

    z (B, N, 3 + F): positions in the first three channels. Keys: rotation, reflection, permutation; and translation,
    for which the output must not change at all.
    """
    out = function(z, mask)
    scale = float(out.abs().max())

    def turn(state: Tensor, q: Tensor) -> Tensor:
        return torch.cat([state[..., :3] @ q.t(), state[..., 3:]], -1)

    errors = {}
    for name, reflection in (("rotation", False), ("reflection", True)):
        q = random_orthogonal(generator, reflection=reflection, dtype=z.dtype).to(z.device)
        errors[name] = float((function(turn(z, q), mask) - turn(out, q)).abs().max()) / scale
    shift = torch.randn(len(z), 1, 3, generator=generator, dtype=z.dtype).to(z.device) * mask.unsqueeze(-1)
    moved = torch.cat([z[..., :3] + shift, z[..., 3:]], -1)
    errors["translation"] = float((function(moved, mask) - out).abs().max()) / scale
    order = torch.stack([_permutation(m, generator) for m in mask.cpu()]).to(z.device)
    index = order.unsqueeze(-1).expand_as(z)
    errors["permutation"] = float((function(z.gather(1, index), mask) - out.gather(1, index)).abs().max()) / scale
    return errors


def assert_equivariant(
    model: Denoiser, z: Tensor, t: Tensor, mask: Tensor, *, seed: int = 0, tolerance: float | None = None
) -> None:
    """eps_theta commutes with rotations, reflections and permutations, and ignores translations of the positions."""
    limit = tolerance_of(z.dtype) if tolerance is None else tolerance
    with torch.no_grad():
        errors = equivariance_errors(
            lambda state, m: model.eps(state, t, m), z, mask, torch.Generator().manual_seed(seed)
        )
    broken = {name: error for name, error in errors.items() if not error <= limit}
    assert not broken, f"not equivariant within {float(limit):g}: {broken}"


def assert_forces_match_energy(
    oracle: Oracle,
    batch: MoleculeBatch,
    *,
    step: float = 1e-3,
    tolerance: float = 1e-2,
    coordinates: int = 6,
    seed: int = 0,
) -> None:
    """Forces equal minus the central difference of the energy along random unit directions.

    step in Angstrom, tolerance in eV/Angstrom, for each molecule of the batch along `coordinates` directions.
    """
    batch = batch.to(dtype=torch.float64)
    result = oracle(batch)
    assert bool(result.ok.all()), f"the oracle failed: {result.status}"
    generator = torch.Generator().manual_seed(seed)
    for _ in range(coordinates):
        direction = torch.randn(*batch.positions.shape, generator=generator, dtype=torch.float64)
        direction = direction * batch.mask.unsqueeze(-1)
        direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1)
        up = oracle(batch.with_positions(batch.positions + step * direction)).energy
        down = oracle(batch.with_positions(batch.positions - step * direction)).energy
        slope = -(up - down) / (2 * step)
        worst = float((slope - (result.forces * direction).sum((1, 2))).abs().max())
        assert worst <= tolerance, f"force and energy differ by {worst:.2e} eV/Angstrom, allowed {tolerance:.2e}"


def assert_batch_equals_single(oracle: Oracle, batch: MoleculeBatch, *, tolerance: float = 1e-5) -> None:
    """An oracle gives a molecule the same energy (eV) and forces (eV/Angstrom) in a batch and alone."""
    together = oracle(batch)
    for i, molecule in enumerate(batch):
        alone = oracle(molecule)
        n = int(molecule.sizes[0])
        energy = float((together.energy[i] - alone.energy[0]).abs())
        force = float((together.forces[i, :n] - alone.forces[0]).abs().max())
        assert max(energy, force) <= tolerance, f"molecule {i}: energy off by {energy:.2e}, forces by {force:.2e}"


def assert_failed(result: OracleResult, i: int, n_atoms: int, reason: str) -> None:
    """Molecule i, of n_atoms atoms, has no numbers, and its status contains `reason`; the padding has zero forces."""
    assert not result.ok[i]
    assert reason in result.status[i]
    assert torch.isnan(result.energy[i])
    assert torch.isnan(result.forces[i, :n_atoms]).all()
    assert (result.forces[i, n_atoms:] == 0).all()


def _permutation(mask: Tensor, generator: torch.Generator) -> Tensor:
    n = int(mask.sum())
    return torch.cat([torch.randperm(n, generator=generator), torch.arange(n, len(mask))])
