"""Theorem 5: a shaping reward acts on a reverse step like a force.

For the base kernel N(mu, sigma^2 P) the maximiser of E_pi[gamma Phi(z')] - KL(pi || pi_0) / beta is the tilt
pi* ~ pi_0 exp(beta gamma Phi), and Stein's identity gives its mean exactly,

    E_pi*[z'] = mu + beta gamma sigma^2 P E_pi*[grad Phi(z')],

so that the mean is mu + beta gamma sigma^2 P grad Phi(mu) + remainder. The theorem states O(sigma^3), which is what a
Lipschitz gradient allows; where Phi has a third derivative, the first-order terms cancel and the remainder is
O(sigma^4). With Phi = -E the x block is the force on the atoms, the h block an 'alchemical' force on relaxed types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elign_lab.molecules import MoleculeBatch, zero_com_noise
from elign_lab.oracles import Oracle, load_oracle
from elign_lab.oracles.learned import LearnedOracle
from elign_lab.theory.check import Check

FloatArray = NDArray[np.floating]

WATER = MoleculeBatch.from_arrays([([8, 1, 1], np.array([[0.0, 0.0, 0.0], [1.05, 0.0, 0.0], [-0.35, 0.88, 0.0]]))])
"""Water with one stretched bond: a geometry with a force on every atom (Angstrom)."""


# ---------------------------------------------------------------------- quadratic potential, in closed form
def quadratic_tilt_mean(mu: FloatArray, hessian: FloatArray, sigma: float, beta: float) -> FloatArray:
    """Mean of N(mu, sigma^2) exp(-beta z^T H z / 2), normalised: (1 + beta sigma^2 H)^{-1} mu."""
    return np.linalg.solve(np.eye(len(mu)) + beta * sigma**2 * hessian, mu)


def force_step(mu: FloatArray, gradient: FloatArray, sigma: float, beta: float, gamma: float = 1.0) -> FloatArray:
    """Theorem 5's mean without the remainder, mu + beta gamma sigma^2 grad Phi(mu)."""
    return mu + beta * gamma * sigma**2 * gradient


# ---------------------------------------------------------------------- any potential in one dimension, by quadrature
def tilt_mean_1d(potential: Callable[[FloatArray], FloatArray], mu: float, sigma: float, beta: float) -> float:
    """Mean of N(mu, sigma^2) exp(beta Phi) by quadrature on 4001 points over mu +- 10 sigma."""
    xi = np.linspace(-10, 10, 4001)
    logs = -0.5 * xi**2 + beta * potential(mu + sigma * xi)
    weight = np.exp(logs - logs.max())
    return float(mu + sigma * (weight @ xi) / weight.sum())


def remainder_order(
    potential: Callable[[FloatArray], FloatArray],
    slope: float,
    mu: float,
    sigmas: Sequence[float],
    beta: float,
    power: float = 2.0,
) -> tuple[float, FloatArray]:
    """Fit |mean - mu - beta sigma^power Phi'(mu)| ~ sigma^p: the order p and the remainders (one per sigma).

    slope is Phi'(mu). power 2 is the theorem's.
    """
    means = np.array([tilt_mean_1d(potential, mu, s, beta) for s in sigmas])
    remainder = np.abs(means - mu - beta * np.asarray(sigmas) ** power * slope)
    return float(np.polyfit(np.log(sigmas), np.log(remainder), 1)[0]), remainder


def smooth_potential(x: FloatArray) -> FloatArray:
    """Phi = -(x^2 - 1)^2, with all derivatives."""
    return -((x**2 - 1) ** 2)


def kinked_potential(x: FloatArray, at: float = 0.5) -> FloatArray:
    """Phi = x - u^2 / 2 - u |u| with u = x - at: its gradient is Lipschitz but has no derivative at `at`."""
    return x - 0.5 * (x - at) ** 2 - (x - at) * np.abs(x - at)


# ---------------------------------------------------------------------- a molecule and an oracle, by Monte Carlo
@dataclass(frozen=True)
class TiltedStep:
    """Tilted kernels of one molecule for several sigma (K,), by self-normalised importance sampling.

    measured (K,): mean displacement of the tilt along the force f(mu), over theorem 5's beta gamma sigma^2 |f(mu)|.
    by_stein (K,): the same from Stein's identity, the mean force under the tilt along f(mu) divided by |f(mu)|; less
    noise. Both are 1 + O(sigma^2). Standard errors (K,) over antithetic pairs. forces (N, C): f(mu).
    """

    sigmas: FloatArray
    measured: FloatArray
    measured_error: FloatArray
    by_stein: FloatArray
    by_stein_error: FloatArray
    forces: Tensor
    oracle_calls: int


Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Displacements (n, N, C) of one molecule's state -> energies (n,) in eV and their forces -dE/dstate (n, N, C)."""


def tilted_step(
    evaluate: Evaluate, xi: Tensor, sigmas: Sequence[float], *, beta: float, gamma: float = 1.0, sign: float = -1.0
) -> TiltedStep:
    """Tilt N(mu, sigma^2 P) by exp(sign beta gamma E), sign = -1, and measure its mean.

    xi (pairs, N, C): noise of the base kernel; each draw is used with both signs and for every sigma. beta in 1/eV.
    See position_step and type_step for what to evaluate. 2 pairs oracle calls for each sigma, and one.
    """
    both = torch.cat([xi, -xi])
    force = evaluate(torch.zeros_like(xi[:1]))[1][0]
    length = force.norm()
    rows = []
    for sigma in sigmas:
        energy, forces = evaluate(sigma * both)
        weight = torch.softmax(sign * beta * gamma * energy, 0)
        shift = (both * force).sum((1, 2)) / (beta * gamma * sigma * length**2)
        along = (forces * force).sum((1, 2)) / length**2
        rows.append((*_weighted_mean(weight, shift), *_weighted_mean(weight, along)))
    measured, measured_error, by_stein, by_stein_error = np.array(rows).T
    calls = 1 + len(both) * len(sigmas)
    levels = np.asarray(sigmas, dtype=float)
    return TiltedStep(levels, measured, measured_error, by_stein, by_stein_error, force, calls)


def position_step(
    molecule: MoleculeBatch,
    oracle: Oracle,
    sigmas: Sequence[float],
    *,
    beta: float,
    pairs: int = 200,
    seed: int = 0,
    sign: float = -1.0,
) -> TiltedStep:
    """The x block: tilt the positions of one molecule (sigmas in Angstrom) by the energy of any oracle.

    An energy that is invariant under translations has forces without a mean: P grad Phi is then grad Phi itself.
    Raises ValueError when the oracle fails on a geometry.
    """
    _check_single(molecule)
    generator = torch.Generator().manual_seed(seed)
    xi = zero_com_noise(molecule.mask.expand(pairs, -1), generator, torch.float64)

    def evaluate(moved: Tensor) -> tuple[Tensor, Tensor]:
        n = len(moved)
        positions = molecule.positions.double() + moved
        batch = MoleculeBatch(molecule.numbers.expand(n, -1), positions, molecule.mask.expand(n, -1), check=False)
        result = oracle(batch)
        if not bool(result.ok.all()):
            reason = result.status[int((~result.ok).nonzero()[0])]
            raise ValueError(f"the {oracle.name} oracle failed on a displaced geometry: {reason}; use a smaller sigma")
        return result.energy.double(), result.forces.double()

    return tilted_step(evaluate, xi, sigmas, beta=beta, sign=sign)


def type_step(
    molecule: MoleculeBatch,
    oracle: LearnedOracle,
    sigmas: Sequence[float],
    *,
    beta: float,
    pairs: int = 100,
    seed: int = 0,
    hard: bool = False,
) -> TiltedStep:
    """The h block: tilt the type weights (N, elements) of one molecule by its soft formation energy per atom.

    That energy is the learned oracle's soft-type energy less the isolated-atom energies of the weights, over N: without
    the latter the elements' own energies, thousands of eV apart, would be all there is. The force is the alchemical
    force -dE/d(type weights) in eV per atom. hard=True decodes the types by argmax before the
    energy, as at the end of sampling: then the measured displacement has no direction.
    """
    _check_single(molecule)
    weights, positions = oracle.model.type_weights(molecule.numbers), molecule.positions.to(oracle.dtype)
    atoms = weights.new_tensor([oracle.atom_energies[z] for z in oracle.model.config.elements])
    generator = torch.Generator().manual_seed(seed)
    xi = torch.randn(pairs, *weights.shape[1:], generator=generator, dtype=weights.dtype)

    def energy(types: Tensor) -> Tensor:
        n = len(types)
        total = oracle.energy_soft(types, positions.expand(n, -1, -1), molecule.mask.expand(n, -1))
        return (total - (types @ atoms).sum(1)) / weights.shape[1]

    def evaluate(moved: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            soft = (weights + moved).requires_grad_()
            value = energy(soft)
            (gradient,) = torch.autograd.grad(value.sum(), soft)
        if hard:
            with torch.no_grad():
                value = energy(torch.nn.functional.one_hot(soft.argmax(-1), weights.shape[-1]).to(weights))
        return value.detach().double(), -gradient.double()

    return tilted_step(evaluate, xi, sigmas, beta=beta)


def _check_single(molecule: MoleculeBatch) -> None:
    if len(molecule) != 1:
        raise ValueError(f"expected one molecule, got {len(molecule)}")


def extrapolated(step: TiltedStep) -> tuple[float, float]:
    """by_stein at sigma = 0 by a straight line in sigma^2 through its first and last point, with its standard error.

    The points share their noise, so that the error is bounded by the sum of the two parts.
    """
    first, last = step.sigmas[0] ** 2, step.sigmas[-1] ** 2
    weights = np.array([last, -first]) / (last - first)
    value = weights @ step.by_stein[[0, -1]]
    return float(value), float(np.abs(weights) @ step.by_stein_error[[0, -1]])


def step_order(step: TiltedStep) -> tuple[float, float]:
    """Order p of theorem 5's remainder, sigma^2 |by_stein - 1| ~ sigma^p, with its standard error; 4 if smooth.

    A straight line through the logarithms, weighted with the errors, which are those of points that share their noise.
    Raises ValueError for fewer than two sigmas.
    """
    if len(step.sigmas) < 2:
        raise ValueError(f"an order needs two sigmas or more, got {len(step.sigmas)}")
    gap = np.abs(step.by_stein - 1)
    x, weights = np.log(step.sigmas), np.square(gap / step.by_stein_error)
    x = x - weights @ x / weights.sum()
    shares = weights * x / (weights @ x**2)
    return float(2 + shares @ np.log(gap)), float(np.abs(shares) @ (step.by_stein_error / gap))


def _weighted_mean(weight: Tensor, values: Tensor) -> tuple[float, float]:
    """Weighted mean over antithetic pairs and its standard error; the weights sum to 1."""
    mean = weight @ values
    first, second = (weight * (values - mean)).chunk(2)
    return float(mean), float((first + second).square().sum().sqrt())


# ---------------------------------------------------------------------- statements
_SIGMAS = tuple(np.geomspace(0.02, 0.1, 7).tolist())


def check_quadratic(beta: float = 1.5, dims: int = 4, seed: int = 0, power: float = 2.0) -> Check:
    """Order of the remainder in sigma for Phi = -z^T H z / 2, in closed form: 4. power: of sigma in the force term."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dims, dims))
    hessian, mu = root @ root.T, rng.normal(size=dims)
    remainders = []
    for sigma in _SIGMAS:
        approximate = force_step(mu, -hessian @ mu, sigma ** (power / 2), beta)
        remainders.append(np.linalg.norm(quadratic_tilt_mean(mu, hessian, sigma, beta) - approximate))
    order = np.polyfit(np.log(_SIGMAS[:3]), np.log(remainders[:3]), 1)[0]
    return Check(float(order), 4.0, 0.05)


def broken_quadratic() -> Check:
    """The force term with sigma instead of sigma^2."""
    return check_quadratic(power=1.0)


def check_smooth_order(mu: float = 0.7, beta: float = 1.5, slope_factor: float = 1.0) -> Check:
    """Order of the remainder for a smooth double well, by quadrature: 4, better than the theorem's 3."""
    slope = -4 * mu * (mu**2 - 1) * slope_factor
    return Check(remainder_order(smooth_potential, slope, mu, _SIGMAS, beta)[0], 4.0, 0.05)


def broken_smooth_order() -> Check:
    """No force term: the displacement itself is of order 2."""
    return check_smooth_order(slope_factor=0.0)


def check_kinked_order(at: float = 0.5, beta: float = 0.2, mu: float | None = None) -> Check:
    """Order of the remainder where the gradient is only Lipschitz (kink of Phi' at mu): 3, the theorem's bound."""
    return Check(remainder_order(kinked_potential, 1.0, at if mu is None else mu, _SIGMAS, beta)[0], 3.0, 0.05)


def broken_kinked_order() -> Check:
    """The gradient taken at the kink while the kernel's mean is beside it: the leading term itself is wrong."""
    return check_kinked_order(mu=1.5)


def check_stein(sigma: float = 0.04, beta: float = 4.0, pairs: int = 250, sign: float = -1.0) -> Check:
    """Mean displacement of water's tilted kernel along its GFN2-xTB force, measured and by Stein's identity.

    In units of beta gamma sigma^2 |f(mu)|.
    """
    step = position_step(WATER, load_oracle("xtb", workers=0), [sigma], beta=beta, pairs=pairs, sign=sign)
    error = float(np.hypot(step.measured_error[0], step.by_stein_error[0]))
    return Check(float(step.measured[0]), float(step.by_stein[0]), error)


def broken_stein() -> Check:
    """Phi = +E: the tilt moves the atoms up the hill."""
    return check_stein(sign=1.0)


def check_molecule(
    sigmas: Sequence[float] = (0.015, 0.03), beta: float = 4.0, pairs: int = 150, extrapolate: bool = True
) -> Check:
    """Theorem 5 for water and GFN2-xTB: the displacement over beta gamma sigma^2 |f(mu)|, extrapolated to sigma = 0.

    extrapolate=False takes the value at the largest sigma.
    """
    step = position_step(WATER, load_oracle("xtb", workers=0), sigmas, beta=beta, pairs=pairs)
    if not extrapolate:
        return Check(float(step.by_stein[-1]), 1.0, float(step.by_stein_error[-1]))
    value, error = extrapolated(step)
    return Check(value, 1.0, error)


def broken_molecule() -> Check:
    """The small-step expansion read at sigma = 0.06 Angstrom, where the force changes within the kernel."""
    return check_molecule(sigmas=(0.03, 0.06), extrapolate=False)


def check_types(sigma: float = 0.02, beta: float = 5.0, pairs: int = 150, hard: bool = False) -> Check:
    """Relaxed types of methanol: mean displacement along the alchemical force, measured and by Stein's identity."""
    molecule, oracle = MoleculeBatch.from_smiles("CO"), LearnedOracle(dtype=torch.float64)
    step = type_step(molecule, oracle, [sigma], beta=beta, pairs=pairs, hard=hard)
    expected = type_step(molecule, oracle, [sigma], beta=beta, pairs=pairs) if hard else step
    error = float(np.hypot(step.measured_error[0], expected.by_stein_error[0]))
    return Check(float(step.measured[0]), float(expected.by_stein[0]), error)


def broken_types() -> Check:
    """Types decoded by argmax before the energy: no gradient reaches them."""
    return check_types(hard=True)
