"""Theorem 2 and lemma 1: what an error of the energy does to the aligned law.

With |E - E_hat| <= eps everywhere, the tilts q* and q^* of one q0 satisfy TV(q*, q^*) <= tanh(beta eps) (paper Eq. 6).
The constant is not the best one: both densities are normalised, so that dq^*/dq* = r / E[r] with r between
exp(-beta eps) and exp(beta eps), and the same extremal problem as in lemma 1 then gives TV <= tanh(beta eps / 2),
which a law of two points attains. An error that is the same everywhere costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elign_lab.checkpoints import ASSETS, verify_asset
from elign_lab.evaluation import physics
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle
from elign_lab.theory.check import Check
from elign_lab.theory.tilt import DoubleWell, tilted

FloatArray = NDArray[np.floating]


def total_variation(p: FloatArray, q: FloatArray) -> float:
    """TV(p, q) = sum |p - q| / 2 for probabilities (n,)."""
    return float(0.5 * np.abs(p - q).sum())


def paper_bound(beta: float, eps: float) -> float:
    """Right-hand side of theorem 2, (e^{2 beta eps} - 1) / (e^{2 beta eps} + 1) = tanh(beta eps)."""
    return float(np.tanh(beta * eps))


def sharp_bound(beta: float, eps: float) -> float:
    """tanh(beta eps / 2): the largest total variation that an error of at most eps can cause."""
    return float(np.tanh(beta * eps / 2))


def beta_for(total: float, eps: float) -> float:
    """Largest beta (1 / unit of eps) for which theorem 2 keeps the total variation below `total`, in (0, 1)."""
    if not 0 < total < 1 or not eps > 0:
        raise ValueError(f"expected a total variation between 0 and 1 and eps > 0, got {total} and {eps}")
    return float(np.arctanh(total) / eps)


def worst_case(beta: float, eps: float) -> tuple[FloatArray, FloatArray]:
    """Two-point laws (q*, q^*) that attain sharp_bound: E = 0, E_hat = -eps on the first point and eps on the other."""
    first = 1 / (1 + np.exp(beta * eps))
    exact = np.array([first, 1 - first])
    return exact, tilted(exact, np.array([-eps, eps]), beta)


def half_spread(difference: FloatArray) -> float:
    """Uniform error of an energy up to a constant, (max - min) / 2: the constant cancels in the normalisation."""
    difference = np.asarray(difference, dtype=float)
    if difference.size == 0 or not np.isfinite(difference).all():
        raise ValueError(f"expected finite energy differences, got {difference.size} with non-finite ones among them")
    return float((difference.max() - difference.min()) / 2)


@dataclass(frozen=True)
class EnergyError:
    """The eps of theorem 2 for one oracle against another, measured on n molecules, in eV/atom.

    uniform: half the spread of the differences, a lower bound of the true one: an unseen molecule may be worse.
    ninety, half: quantiles of the difference from its median; for them the theorem is not a theorem.
    """

    n: int
    uniform: float
    ninety: float
    half: float

    @classmethod
    def of(cls, difference: FloatArray) -> EnergyError:
        """From energy differences (n,) in eV/atom, see energy_difference."""
        size = np.abs(difference - np.median(difference))
        ninety, half = np.quantile(size, [0.9, 0.5])
        return cls(len(difference), half_spread(difference), float(ninety), float(half))

    def betas(self, total: float) -> dict[str, float]:
        """Largest beta (per eV/atom) for which theorem 2 keeps the total variation below `total`, for each eps."""
        return {name: beta_for(total, getattr(self, name)) for name in ("uniform", "ninety", "half")}


def bundled_ani_energies() -> FloatArray:
    """Formation energies per atom by ANI-2x (eV/atom) of the bundled test split's MMFF94 geometries, in its order.

    NaN where ANI-2x gave no answer. scripts/make_ani_energies.py computed them. Raises ValueError for a damaged file.
    """
    path = ASSETS / "ani-2x-energies.npz"
    verify_asset(path)
    with np.load(path) as archive:
        return archive["formation_energy_per_atom"]


def energy_difference(
    first: Oracle, second: Oracle | FloatArray, molecules: MoleculeBatch, *, fit_references: bool = False
) -> FloatArray:
    """Formation energy per atom of `first` less that of `second` (eV/atom), for the molecules that both can judge.

    second: an oracle, or its formation energies per atom (B,), with NaN where it had no answer. fit_references:
    subtract the best constant for each element, by least squares. Two levels of theory differ most in their energies of
    isolated atoms; the rest is what they disagree on between molecules of one composition. Raises ValueError for
    another number of energies, and when there is no molecule that both could judge.
    """
    energies = [
        physics(molecules, e).energy_per_atom.numpy() if isinstance(e, Oracle) else np.asarray(e)
        for e in (first, second)
    ]
    if energies[1].shape != (len(molecules),):
        raise ValueError(f"expected {len(molecules)} energies, one a molecule, got shape {energies[1].shape}")
    difference = energies[0] - energies[1]
    ok = np.isfinite(difference)
    if not ok.any():
        raise ValueError("there is no molecule that both could evaluate")
    difference = difference[ok]
    if not fit_references:
        return difference
    numbers, mask = molecules.numbers.numpy()[ok], molecules.mask.numpy()[ok]
    shares = np.stack([((numbers == z) & mask).sum(1) for z in np.unique(numbers[mask])], 1) / mask.sum(1)[:, None]
    return difference - shares @ np.linalg.lstsq(shares, difference, rcond=None)[0]


# ---------------------------------------------------------------------- statements
def check_theorem(
    beta: float = 2.0, eps: float = 0.3, states: int = 6, draws: int = 400, seed: int = 0, error: str = "uniform"
) -> Check:
    """Largest TV over random finite spaces, energies and errors, against tanh(beta eps).

    error: "uniform" draws |E - E_hat| <= eps; "mean" draws errors whose mean size under q0 is eps, one state bad.
    """
    rng = np.random.default_rng(seed)
    largest = 0.0
    for _ in range(draws):
        q0, energy = rng.dirichlet(np.full(states, 0.3)), rng.normal(size=states)
        wrong = rng.uniform(-eps, eps, states)
        if error == "mean":
            wrong = np.zeros(states)
            bad = int(rng.integers(states))
            wrong[bad] = -eps / max(q0[bad], 1e-3)
        largest = max(largest, total_variation(tilted(q0, energy, beta), tilted(q0, energy + wrong, beta)))
    return Check(largest, paper_bound(beta, eps), 1e-9, "<=")


def broken_theorem() -> Check:
    """eps taken as the mean error under q0 instead of the largest one: a rare state with a large error breaks it."""
    return check_theorem(error="mean")


def check_double_well(beta: float = 2.0, eps: float = 0.3, wave: float = 1.5, size: float = 1.0) -> Check:
    """The bound on a double well with E_hat = E - size eps sin(wave x), by quadrature; size <= 1 for the theorem."""
    well = DoubleWell()
    x, q0 = well.grid, well.base()
    exact = well.aligned(beta)
    approximate = tilted(q0, well.energy(x) - size * eps * np.sin(wave * x), beta)
    return Check(total_variation(exact, approximate), paper_bound(beta, eps), 1e-6, "<=")


def broken_double_well() -> Check:
    """An error four times as large as the eps that the bound is told."""
    return check_double_well(size=4.0)


def check_sharp(beta: float = 2.0, eps: float = 0.3, told: float = 1.0) -> Check:
    """The best constant: the two-point law has TV = tanh(beta eps / 2); `told` scales the bound."""
    return Check(total_variation(*worst_case(beta, eps)), sharp_bound(beta, told * eps), 1e-9)


def broken_sharp() -> Check:
    """Theorem 2 read as an equality: its right-hand side is tanh(beta eps), and no pair of tilts reaches it."""
    return check_sharp(told=2.0)


def check_lemma(c: float = 1.2) -> Check:
    """Lemma 1 is attained: P and Q on two points with dP/dQ = exp(c) and exp(-c) have TV = tanh(c / 2)."""
    p = np.exp([c / 2, -c / 2]) / (2 * np.cosh(c / 2))
    return Check(total_variation(p, p[::-1]), float(np.tanh(c / 2)), 1e-12)


def broken_lemma(c: float = 1.2) -> Check:
    """Only dP/dQ <= exp(c): P lives on one point, Q puts exp(-c) there, and TV = 1 - exp(-c) > tanh(c / 2)."""
    p, q = np.array([1.0, 0.0]), np.array([np.exp(-c), 1 - np.exp(-c)])
    return Check(total_variation(p, q), float(np.tanh(c / 2)), 1e-12)
