"""A diffusion model of points in R^F (F = 1, 2 or 3), small enough to know every law, run by the package's own code.

A molecule of one atom has no position in the zero-centre-of-mass subspace: its state is its F invariant channels. So a
point in R^F is a one-atom molecule, and the samplers, rollouts and the FED-GRPO trainer work on it unchanged. The base
policy is the exact noise prediction of a Gaussian mixture; what alignment learns is a correction by
a radial-basis network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elign_lab.alignment import AlignConfig, Rewards, Rollouts, Trainer, kl_divergence
from elign_lab.denoiser import Denoiser, DenoiserConfig, Layout
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Evaluation, Molecule, Oracle
from elign_lab.sampling import ancestral
from elign_lab.theory.check import Check, mean_check
from elign_lab.theory.mixture import GaussianMixture
from elign_lab.theory.tilt import tilted

Energy = Callable[[Tensor], Tensor]
"""Energy (n,) of points (n, F), differentiable."""

TIMESTEPS = 16
PRECISION = 0.01  # sigma_0 = 0.1: the law of z_0 is smooth, so that a grid can follow it
FLOOR = 100.0  # above any spread of the rewards here: advantages are then raw differences divided by this number


class RadialNetwork(nn.Module):
    """Gaussian radial basis functions on a grid of centres in R^F, with linear output weights for each time step.

    Linear in its weights, which start at zero: a KL-regularised objective then has no poor local optima to report as
    an effect of the theory.
    """

    centres: Tensor

    def __init__(self, dimension: int, timesteps: int, *, reach: float = 2.8, spacing: float | None = None) -> None:
        super().__init__()
        spacing = 0.35 * dimension**0.5 if spacing is None else spacing
        axis = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
        self.register_buffer("centres", torch.cartesian_prod(*[axis] * dimension).view(-1, dimension))
        self.spacing = spacing
        self.weight = nn.Parameter(torch.zeros(timesteps + 1, len(self.centres), dimension, dtype=torch.float64))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """h (B, F), t (B,) integer steps -> (B, F)."""
        basis = torch.exp(-0.5 * (torch.cdist(h, self.centres) / self.spacing).square())
        out = h.new_zeros(h.shape)
        for step in t.unique().tolist():
            rows = t == step
            out[rows] = basis[rows] @ self.weight[step]
        return out


class PointDenoiser(Denoiser):
    """Noise prediction eps = -sigma_t score_t(z) + sigma_t network(z, t), exact for the mixture when network = 0.

    The network starts at zero. z is (B, 1, 3 + F) with zero positions; `decode` puts z_0 itself into the positions.
    """

    def __init__(self, mixture: GaussianMixture, *, timesteps: int = TIMESTEPS) -> None:
        if not 1 <= mixture.dimension <= 3:
            raise ValueError(f"points have 1 to 3 dimensions, this mixture has {mixture.dimension}")
        super().__init__(
            DenoiserConfig(
                elements=tuple(range(1, mixture.dimension + 1)),
                include_charges=False,
                features=1,
                layers=1,
                timesteps=timesteps,
                precision=PRECISION,
                scale=(1.0, 1.0, 1.0),
                size_histogram=((1, 1),),
            )
        )
        self.mixture = mixture
        self.network = RadialNetwork(mixture.dimension, timesteps)

    def eps(
        self, z: Tensor, t: Tensor, mask: Tensor, *, context: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Predicted noise (B, 1, 3 + F); see Denoiser.eps."""
        self._check_inputs(z, t, mask, context)
        h = z[:, 0, 3:]
        alpha, sigma = (v.to(z.dtype).unsqueeze(1) for v in self.schedule.alpha_sigma(t))
        out = sigma * (self.network(h, t) - self._score(h, alpha, sigma))
        return torch.nn.functional.pad(out, (3, 0)).unsqueeze(1)

    def decode(self, z_0: Tensor, positions: Tensor, mask: Tensor) -> MoleculeBatch:
        """The points as one-atom 'molecules': coordinates are those of z_0, filled up with zeros."""
        f = self.mixture.dimension
        at = torch.nn.functional.pad(z_0[..., 3:], (0, 3 - f))
        return MoleculeBatch(torch.ones(z_0.shape[:2], dtype=torch.long), at, mask, check=False)

    def terminal(self, n: int, seed: int = 0) -> Tensor:
        """n samples of z_0 by the package's ancestral sampler, (n, F)."""
        mask = torch.ones(n, 1, dtype=torch.bool)
        *_, last = ancestral(self, mask, generator=torch.Generator().manual_seed(seed), decode=False)
        return last.z_s[:, 0, 3:]

    def _score(self, h: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Score of the noised mixture with a different noise level for each row."""
        m = self.mixture
        variance = alpha**2 * m.widths**2 + sigma**2
        away = alpha.unsqueeze(2) * m.means - h.unsqueeze(1)
        logs = torch.log(m.weights) - 0.5 * m.dimension * torch.log(variance) - 0.5 * away.square().sum(2) / variance
        return (torch.softmax(logs, 1).unsqueeze(2) * away / variance.unsqueeze(2)).sum(1)


class PointOracle(Oracle):
    """Energy and forces of points, from a differentiable function of their F coordinates."""

    name = "points"
    elements = frozenset({1})

    def __init__(self, energy: Energy, dimension: int) -> None:
        super().__init__(atom_energies={1: 0.0})
        self.energy, self.dimension = energy, dimension

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        x = torch.from_numpy(np.concatenate([x for _, x in molecules])).requires_grad_()
        with torch.enable_grad():
            energy = self.energy(x[:, : self.dimension])
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        forces = -gradient.numpy()[:, None]
        return [Evaluation(e, force) for e, force in zip(energy.tolist(), forces, strict=True)]


class PathKLTrainer(Trainer):
    """FED-GRPO with the KL of the later steps in the return: the gradient of E[R] - lambda KL(path || base path).

    FED-GRPO's own penalty (SPEC section 4) is a mean over visited states, whose dependence on the policy it does not
    differentiate. Only with this term is the objective the one of theorem 1.
    """

    def judge(self, rollouts: Rollouts) -> Rewards:
        """Rewards with -(kl_weight / energy_weight) energy_floor sum_{later steps} KL added to the return-to-go."""
        rewards = super().judge(rollouts)
        later = path_kl(self.reference, rollouts).flip(1).cumsum(1).flip(1)
        later = torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], 1)
        cost = self.config.kl_weight * self.config.energy_floor / self.config.energy_weight
        return replace(rewards, return_to_go=rewards.return_to_go - cost * later)


@torch.no_grad()
def path_kl(reference: Denoiser, rollouts: Rollouts) -> Tensor:
    """KL of the rollout policy to the reference at each visited state, (G K, S)."""
    rows = rollouts.states.shape[1]
    times = torch.tensor(rollouts.times)
    t, s = (x.repeat_interleave(rows) for x in (times[:-1], times[1:]))
    mask = rollouts.mask.repeat(rollouts.steps, 1)
    eps_ref = reference.eps(rollouts.states.flatten(0, 1), t, mask)
    scale = reference.schedule.transition(t, s).ratio_scale.to(eps_ref.dtype)
    return kl_divergence(rollouts.eps.flatten(0, 1), eps_ref, scale).view(-1, rows).t()


def effective_beta(config: AlignConfig, spread: float) -> float:
    """Inverse temperature of theorem 1 that a FED-GRPO configuration stands for, per unit of the energy reward.

    An energy advantage is w_E (R - mean) / max(std, floor). A group of K rollouts with standard deviation `spread`
    therefore has its own temperature, beta = w_E (K - 1) / (K lambda max(spread, floor)); (K - 1) / K, because a member
    is part of the mean that is its baseline. One beta for all groups needs a floor above every spread.
    """
    divisor = max(spread, config.energy_floor)
    return config.energy_weight * (config.members - 1) / (config.members * config.kl_weight * divisor)


def point_config(beta: float, *, iterations: int, members: int = 512, floor: float = FLOOR) -> AlignConfig:
    """FED-GRPO settings whose effective_beta is beta, with one group and so one baseline.

    The default floor is above every spread here: advantages are raw. A smaller `floor` (1e-3, say) keeps the weights
    of raw rewards and divides by the spread all the same: the mistake of broken_alignment.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    updates = 4
    return AlignConfig(
        groups=1,
        members=members,
        skip_prefix=0,
        shared_prefix=False,
        energy_signal="terminal",
        force_weight=0.0,
        energy_weight=max(floor, 1.0) * members / (members - 1),
        kl_weight=1 / beta,
        force_clip=None,
        energy_clip=None,
        adv_clip=None,
        energy_floor=floor,
        clip_range=0.2,
        iterations=iterations,
        updates=updates,
        pairs_per_call=1_000_000,
        learning_rate=0.2,
        weight_decay=0.0,
        warmup=5,
        total_updates=iterations * updates,
        min_lr_ratio=0.02,
        evaluate_every=iterations + 1,
        max_grad_norm=10.0,
    )


def align_points(
    mixture: GaussianMixture,
    energy: Energy,
    beta: float,
    *,
    iterations: int = 60,
    path: bool = True,
    floor: float = FLOOR,
    skip_prefix: int = 0,
) -> PointDenoiser:
    """Align a point diffusion with an energy at inverse temperature beta by FED-GRPO.

    path: PathKLTrainer, whose optimum is theorem 1's tilt; otherwise the plain Trainer. floor: see point_config.
    skip_prefix: number of reverse steps that are not trained.
    """
    trainer_class = PathKLTrainer if path else Trainer
    config = replace(point_config(beta, iterations=iterations, floor=floor), skip_prefix=skip_prefix)
    policy = PointDenoiser(mixture)
    trainer_class(policy, PointOracle(energy, mixture.dimension), config).run(progress=False)
    return policy.eval()


# ---------------------------------------------------------------------- exact laws on a grid, F = 1
@dataclass(frozen=True)
class GridLaws:
    """Probabilities of grid cells (n,) at positions x (n,), for one energy and one beta.

    base: law of z_0 without control. tilt: theorem 1's q* for that base. path_kl: terminal law of the policy, among
    Gaussian kernels of the given variances, that is best for E[R] - KL(path || base path) / beta. state_kl: of the
    Gaussian policy at which FED-GRPO's own gradient vanishes.
    """

    x: NDArray[np.floating]
    base: NDArray[np.floating]
    tilt: NDArray[np.floating]
    path_kl: NDArray[np.floating]
    state_kl: NDArray[np.floating]


def grid_laws(
    model: PointDenoiser,
    energy: Energy,
    beta: float,
    *,
    skip_prefix: int = 0,
    half_width: float = 4.5,
    points: int = 700,
) -> GridLaws:
    """Follow the reverse process of a one-dimensional model on a grid, without and with control by the reward -E.

    Backward over the steps, each state z chooses the mean m of its kernel that maximises beta E_m[V] - KL, with
    KL = (m - mu(z))^2 / (2 sigma^2). V of the state is that maximum for path_kl (later KL counts), and beta E_m[V]
    alone for state_kl (it does not). Then forward over the steps with these kernels. The first skip_prefix reverse
    steps keep the base kernel, as in the paper's shared prefix.
    """
    if model.mixture.dimension != 1:
        raise ValueError(f"a grid is for one dimension, this model has {model.mixture.dimension}")
    x = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    start = torch.softmax(-0.5 * x**2, 0)
    reward = -energy(x.unsqueeze(1))
    kernels = [_mean_and_smoothing(model, x, t) for t in range(1, model.config.timesteps + 1)]
    uncontrolled = [_gaussian(x, mean, sigma) for mean, sigma in kernels]
    trained = model.config.timesteps - skip_prefix
    base = _propagate(start, uncontrolled)
    laws = []
    for later_kl in (True, False):
        value, controlled = beta * reward, []
        for mean, sigma in kernels[:trained]:
            smooth = _gaussian(x, x, sigma)
            expected = smooth @ value
            best = (expected - 0.5 * ((x - mean.unsqueeze(1)) / sigma) ** 2).max(1)
            controlled.append(smooth[best.indices])
            value = best.values if later_kl else expected[best.indices]
        laws.append(_propagate(start, controlled + uncontrolled[trained:]).numpy())
    return GridLaws(x.numpy(), base.numpy(), tilted(base.numpy(), -reward.numpy(), beta), *laws)


@torch.no_grad()
def _mean_and_smoothing(model: PointDenoiser, x: Tensor, t: int) -> tuple[Tensor, float]:
    """Mean (n,) and standard deviation of the kernel from t to t - 1 at every grid point."""
    n = len(x)
    z = torch.nn.functional.pad(x.view(n, 1, 1), (3, 0))
    step = model.schedule.transition(t, t - 1)
    eps = model.eps(z, torch.full((n,), t), torch.ones(n, 1, dtype=torch.bool))
    return model.posterior_mean(z, eps, step)[:, 0, 3], step.sigma


def _gaussian(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Transition matrix (n, n) of N(mean_i, sigma^2) on the grid x; rows sum to one."""
    return torch.softmax(-0.5 * ((x - mean.unsqueeze(1)) / sigma) ** 2, 1)


def _propagate(start: Tensor, kernels: list[Tensor]) -> Tensor:
    law = start
    for kernel in reversed(kernels):
        law = law @ kernel
    return law


# ---------------------------------------------------------------------- statements
WELLS = GaussianMixture.of((0.3, (-1.0,), 0.5), (0.7, (1.0,), 0.5))


def well_energy(x: Tensor) -> Tensor:
    """(x^2 - 1)^2 + x / 2 of points (n, 1): the base law WELLS prefers the well with the higher energy."""
    return (x[:, 0] ** 2 - 1) ** 2 + 0.5 * x[:, 0]


@cache
def aligned_wells(
    beta: float, *, path: bool = True, floor: float = FLOOR, skip_prefix: int = 0, iterations: int = 60
) -> PointDenoiser:
    """The model of WELLS aligned with well_energy (trained once per setting and process)."""
    return align_points(
        WELLS, well_energy, beta, path=path, floor=floor, skip_prefix=skip_prefix, iterations=iterations
    )


def check_alignment(beta: float = 1.0, n: int = 4000, seed: int = 1, floor: float = FLOOR) -> Check:
    """Mean energy of the aligned model's samples against the grid's best Gaussian policy for E[R] - KL(path) / beta.

    FED-GRPO with the KL of later steps in the return (PathKLTrainer), 60 iterations of 512 rollouts.
    """
    energy = well_energy(aligned_wells(beta, floor=floor).terminal(n, seed)).numpy()
    laws = grid_laws(PointDenoiser(WELLS), well_energy, beta)
    return mean_check(energy, float(laws.path_kl @ well_energy(torch.from_numpy(laws.x).unsqueeze(1)).numpy()))


def broken_alignment() -> Check:
    """Advantages divided by the group's standard deviation: beta is no longer w_E / lambda."""
    return check_alignment(floor=1e-3)


def check_fixed_point(beta: float = 1.0, n: int = 4000, seed: int = 1, law: str = "state_kl") -> Check:
    """Plain FED-GRPO (KL penalty on visited states) against its own fixed point; mean energies, as check_alignment."""
    energy = well_energy(aligned_wells(beta, path=False).terminal(n, seed)).numpy()
    laws = grid_laws(PointDenoiser(WELLS), well_energy, beta)
    expected = getattr(laws, law) @ well_energy(torch.from_numpy(laws.x).unsqueeze(1)).numpy()
    return mean_check(energy, float(expected))


def broken_fixed_point() -> Check:
    """Plain FED-GRPO taken to converge to theorem 1's tilt exactly."""
    return check_fixed_point(law="tilt")


def check_prefix(beta: float = 1.0, n: int = 4000, seed: int = 1, skip_prefix: int = 12, law: str = "path_kl") -> Check:
    """With an untrained prefix, alignment reaches the best policy over the last steps alone; mean energies.

    What the prefix has decided, here mostly the well, stays as the base law has it.
    """
    energy = well_energy(aligned_wells(beta, skip_prefix=skip_prefix, iterations=160).terminal(n, seed)).numpy()
    laws = grid_laws(PointDenoiser(WELLS), well_energy, beta, skip_prefix=skip_prefix)
    expected = getattr(laws, law) @ well_energy(torch.from_numpy(laws.x).unsqueeze(1)).numpy()
    return mean_check(energy, float(expected))


def broken_prefix() -> Check:
    """Theorem 1's tilt expected although the first 12 of 16 steps are not trained."""
    return check_prefix(law="tilt")
