"""Theorem 1: the maximiser of J(q) = E_q[-E] - KL(q || q0) / beta is q*(x) = q0(x) exp(-beta E(x)) / Z.

On a finite space (arrays of states) and in one dimension by quadrature on a grid. Energies and 1 / beta have one unit.
beta is the energy weight divided by the KL weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, rel_entr

from elign_lab.theory.check import Check

FloatArray = NDArray[np.floating]


def tilted(q0: FloatArray, energy: FloatArray, beta: float) -> FloatArray:
    """q* = q0 exp(-beta E) / Z over states (n,), computed in logarithms; sums to one."""
    q0, energy = _distribution(q0), np.asarray(energy, dtype=float)
    if energy.shape != q0.shape:
        raise ValueError(f"energy has shape {energy.shape}, expected that of q0, {q0.shape}")
    with np.errstate(divide="ignore"):
        log_q = np.log(q0) - beta * energy
    return np.exp(log_q - logsumexp(log_q))


def objective(q: FloatArray, q0: FloatArray, energy: FloatArray, beta: float) -> float:
    """J(q) = E_q[-E] - KL(q || q0) / beta; -inf where q puts mass that q0 does not have."""
    return float(-(q @ energy) - rel_entr(q, q0).sum() / beta)


def optimum(q0: FloatArray, energy: FloatArray, beta: float) -> float:
    """J(q*) = log(Z) / beta with Z = E_q0[exp(-beta E)]."""
    return float(logsumexp(-beta * np.asarray(energy), b=_distribution(q0)) / beta)


def maximise(q0: FloatArray, energy: FloatArray, beta: float, start: FloatArray, kl: str = "q||q0") -> FloatArray:
    """Maximise J by BFGS over the logits of q, from the logits `start` (n,); it knows nothing of the formula for q*.

    kl: "q||q0" as in the theorem, or "q0||q" (the divergence the wrong way round).
    """
    if kl not in ("q||q0", "q0||q"):
        raise ValueError(f"kl must be 'q||q0' or 'q0||q', got {kl!r}")
    log_q0 = np.log(_distribution(q0))

    def loss(logits: FloatArray) -> tuple[float, FloatArray]:
        log_q = log_softmax(logits)
        q = np.exp(log_q)
        if kl == "q||q0":
            slope = energy + (log_q - log_q0) / beta
            return float(q @ slope), q * (slope - q @ slope)
        value = q @ energy + np.exp(log_q0) @ (log_q0 - log_q) / beta
        return float(value), q * (energy - q @ energy) + (q - np.exp(log_q0)) / beta

    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    return np.exp(log_softmax(found.x))


# ---------------------------------------------------------------------- statements
def check_maximiser(
    states: int = 12, beta: float = 1.5, starts: int = 5, seed: int = 0, kl: str = "q||q0", tolerance: float = 1e-6
) -> Check:
    """Total variation between q* and the maxima found from several random starts (the largest), against 0."""
    rng = np.random.default_rng(seed)
    q0, energy = rng.dirichlet(np.ones(states)), rng.normal(size=states)
    target = tilted(q0, energy, beta)
    found = [maximise(q0, energy, beta, rng.normal(scale=2, size=states), kl) for _ in range(starts)]
    return Check(max(0.5 * np.abs(q - target).sum() for q in found), 0.0, tolerance)


def broken_maximiser() -> Check:
    """KL(q0 || q) instead of KL(q || q0): another maximiser."""
    return check_maximiser(kl="q0||q")


def check_concavity(states: int = 12, beta: float = 1.5, seed: int = 0, with_kl: bool = True) -> Check:
    """Strict concavity: J((p + q) / 2) exceeds the mean of J(p), J(q) by the Jensen-Shannon divergence / beta, > 0.

    Left: the excess; right: JS(p, q) / beta, for two random laws. Without the KL term J is linear and the excess is 0.
    """
    rng = np.random.default_rng(seed)
    q0, p, q = rng.dirichlet(np.ones(states), size=3)
    energy, middle = rng.normal(size=states), (p + q) / 2

    def value(law: FloatArray) -> float:
        return objective(law, q0, energy, beta) if with_kl else float(-(law @ energy))

    divergence = 0.5 * (rel_entr(p, middle).sum() + rel_entr(q, middle).sum())
    return Check(value(middle) - 0.5 * (value(p) + value(q)), float(divergence) / beta, 1e-10)


def broken_concavity() -> Check:
    """No KL term: J is linear, its maximum is at a corner and need not be unique."""
    return check_concavity(with_kl=False)


@dataclass(frozen=True)
class DoubleWell:
    """E(x) = barrier (x^2 - 1)^2 + slope x on a grid, with a base law of two Gaussians at -1 and 1.

    right_weight: mass of the base law at the right well, which has the higher energy when slope > 0.
    """

    barrier: float = 1.0
    slope: float = 0.5
    right_weight: float = 0.7
    width: float = 0.45
    points: int = 2001

    @property
    def grid(self) -> FloatArray:
        """Positions (points,) from -4 to 4."""
        return np.linspace(-4, 4, self.points)

    def energy(self, x: FloatArray) -> FloatArray:
        """E(x)."""
        return self.barrier * (x**2 - 1) ** 2 + self.slope * x

    def base(self) -> FloatArray:
        """Probability of each grid cell (points,) under the base law."""
        x = self.grid
        density = (1 - self.right_weight) * np.exp(-0.5 * ((x + 1) / self.width) ** 2)
        density = density + self.right_weight * np.exp(-0.5 * ((x - 1) / self.width) ** 2)
        return density / density.sum()

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """n samples of the base law."""
        return rng.normal(np.where(rng.random(n) < self.right_weight, 1.0, -1.0), self.width)

    def aligned(self, beta: float) -> FloatArray:
        """Probability of each grid cell under q*."""
        return tilted(self.base(), self.energy(self.grid), beta)


def check_reweighting(beta: float = 1.5, n: int = 40_000, seed: int = 0, sign: float = -1.0) -> Check:
    """Mass of the left well under q*: by reweighting samples of q0, and by quadrature.

    Left: sum_i w_i [x_i < 0] / sum_i w_i with w = exp(sign beta E), sign = -1, x ~ q0, with its delta-method error.
    """
    well = DoubleWell()
    x = well.draw(n, np.random.default_rng(seed))
    log_weight = sign * beta * well.energy(x)
    weight = np.exp(log_weight - log_weight.max())
    left = float(weight @ (x < 0) / weight.sum())
    error = float(np.sqrt(weight**2 @ ((x < 0) - left) ** 2) / weight.sum())
    return Check(left, float(well.aligned(beta)[well.grid < 0].sum()), error)


def broken_reweighting() -> Check:
    """The sign of the energy forgotten: high energies are favoured."""
    return check_reweighting(sign=1.0)


def check_optimum(beta: float = 1.5, factor: float = 1.0) -> Check:
    """J at q* by quadrature against log(Z) / beta; `factor` multiplies the KL weight in J but not in q*."""
    well = DoubleWell()
    q0, energy = well.base(), well.energy(well.grid)
    left = objective(tilted(q0, energy, beta), q0, energy, beta / factor)
    return Check(left, optimum(q0, energy, beta), 1e-9)


def broken_optimum() -> Check:
    """beta read as (energy weight) x (KL weight) with a KL weight of 2, instead of their ratio."""
    return check_optimum(factor=4.0)


def _distribution(q: FloatArray) -> FloatArray:
    q = np.asarray(q, dtype=float)
    if q.ndim != 1 or (q < 0).any() or not np.isclose(q.sum(), 1):
        raise ValueError(f"expected probabilities (n,) that sum to 1, got shape {q.shape} with sum {q.sum():.6g}")
    return q
