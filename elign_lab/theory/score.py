"""Where the score comes from: the Ornstein-Uhlenbeck forward process and its reversal (paper section 2).

Forward, with a constant noise rate: dX = -X/2 dt + dW, so that X_t = e^{-t/2} X_0 + sqrt(1 - e^{-t}) xi. Nelson's
relation between the drifts of a process and of its reversal, b + b_reverse = g^2 grad log p_t (here g = 1), gives the
reverse equation dY = (Y/2 + grad log p_{T-s}(Y)) ds + dW. On a Gaussian mixture all of it has a closed form.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from elign_lab.denoiser import NoiseSchedule
from elign_lab.theory.check import Check, mean_check
from elign_lab.theory.mixture import GaussianMixture

TWO_WELLS = GaussianMixture.of((0.3, (-1.2,), 0.4), (0.7, (1.0,), 0.3))


def marginal(mixture: GaussianMixture, time: float) -> GaussianMixture:
    """Exact law of the Ornstein-Uhlenbeck process at `time`, started from the mixture."""
    return mixture.noised(math.exp(-time / 2), math.sqrt(-math.expm1(-time)))


def forward(mixture: GaussianMixture, time: float, steps: int, n: int, seed: int = 0, pull: float = 0.5) -> Tensor:
    """Euler-Maruyama paths of dX = -pull X dt + dW from samples of the mixture: (steps + 1, n, F)."""
    generator = torch.Generator().manual_seed(seed)
    x, dt = mixture.sample(n, generator), time / steps
    path = [x]
    for _ in range(steps):
        x = x - pull * x * dt + dt**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        path.append(x)
    return torch.stack(path)


def reverse(
    mixture: GaussianMixture, time: float, steps: int, n: int, seed: int = 0, score_weight: float = 1.0
) -> Tensor:
    """Euler-Maruyama paths of the reverse equation with the exact score, from p_time back to p_0: (steps + 1, n, F).

    score_weight 1 is Nelson's; the time steps shrink towards 0, where the score is steep.
    """
    generator = torch.Generator().manual_seed(seed)
    x = marginal(mixture, time).sample(n, generator)
    times = (time * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2).tolist()
    path = [x]
    for start, end in itertools.pairwise(times):
        drift = 0.5 * x + score_weight * marginal(mixture, start).score(x)
        dt = start - end
        x = x + drift * dt + dt**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        path.append(x)
    return torch.stack(path)


def ancestral_samples(
    mixture: GaussianMixture, schedule: NoiseSchedule, n: int, seed: int = 0, noise_scale: float = 1.0
) -> Tensor:
    """z_0 of the reverse kernel of SPEC section 1 with the exact noise prediction eps = -sigma_t score, (n, F).

    noise_scale multiplies the kernel's standard deviation (1 is right).
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, mixture.dimension, generator=generator, dtype=torch.float64)
    for t in range(schedule.timesteps, 0, -1):
        alpha, sigma = schedule.alpha_sigma(t)
        step = schedule.transition(t, t - 1)
        eps = -sigma * mixture.noised(alpha, sigma).score(z)
        xi = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        z = z / step.alpha_ts - step.eps_coefficient * eps + noise_scale * step.sigma * xi
    return z


# ---------------------------------------------------------------------- statements
def check_forward(time: float = 1.0, k: float = 1.5, n: int = 20_000, seed: int = 0, pull: float = 0.5) -> Check:
    """E cos(k X_t): simulated forward process against the exact marginal."""
    end = forward(TWO_WELLS, time, 100, n, seed, pull)[-1, :, 0]
    return mean_check(torch.cos(k * end).numpy(), marginal(TWO_WELLS, time).characteristic(k))


def broken_forward() -> Check:
    """Twice the drift with the same noise: the stationary law is no longer N(0, 1)."""
    return check_forward(pull=1.0)


def check_reversal(time: float = 4.0, k: float = 1.5, n: int = 5_000, seed: int = 0, weight: float = 1.0) -> Check:
    """E cos(k Y) at the end of the simulated reversal against the mixture itself."""
    end = reverse(TWO_WELLS, time, 300, n, seed, weight)[-1, :, 0]
    return mean_check(torch.cos(k * end).numpy(), TWO_WELLS.characteristic(k))


def broken_reversal() -> Check:
    """Half the score: right for the deterministic probability flow, wrong with the noise of the reverse equation."""
    return check_reversal(weight=0.5)


def check_denoising_score(time: float = 0.5, n: int = 50_000, seed: int = 0, at: float | None = None) -> Check:
    """Denoising score matching: E[(-xi / sigma) g(X_t)] = E[score(X_t) g(X_t)] for the test function g = sin(2 x).

    The network regresses -xi / sigma; its best answer is the exact score. `at` evaluates the score at another time.
    """
    generator = torch.Generator().manual_seed(seed)
    alpha, sigma = math.exp(-time / 2), math.sqrt(-math.expm1(-time))
    xi = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = alpha * TWO_WELLS.sample(n, generator) + sigma * xi
    exact = marginal(TWO_WELLS, time if at is None else at).score(x)
    return mean_check((((-xi / sigma) - exact) * torch.sin(2 * x))[:, 0].numpy(), 0.0)


def broken_denoising_score() -> Check:
    """The score of another noise level: a network that is not told the time."""
    return check_denoising_score(at=0.2)


def check_ancestral(k: float = 1.5, n: int = 5_000, seed: int = 0, noise_scale: float = 1.0) -> Check:
    """E cos(k z_0): ancestral sampler of the package's schedule (300 steps) against the exact law of z_0."""
    schedule = NoiseSchedule("polynomial_2", 300)
    end = ancestral_samples(TWO_WELLS, schedule, n, seed, noise_scale)[:, 0]
    return mean_check(torch.cos(k * end).numpy(), TWO_WELLS.noised(*schedule.alpha_sigma(0)).characteristic(k))


def broken_ancestral() -> Check:
    """The mean of each kernel without its noise."""
    return check_ancestral(noise_scale=0.0)
