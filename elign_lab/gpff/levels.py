"""Noise levels: the grid of a sampler, and the level that a pseudo-force shows."""

from __future__ import annotations

import torch
from torch import Tensor

RHO = 7.0  # Karras et al., arXiv:2206.00364, section 3


def karras_levels(steps: int, sigma_max: float, sigma_min: float, rho: float = RHO) -> list[float]:
    """steps + 1 levels in Angstrom, from sigma_max down to sigma_min and then 0; equal distances in sigma^(1/rho).

    Karras et al. (arXiv:2206.00364), equation 5. One step goes from sigma_max to 0.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max (Angstrom), got {sigma_min} and {sigma_max}")
    if steps == 1:
        return [sigma_max, 0.0]
    last, first = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(first + k / (steps - 1) * (last - first)) ** rho for k in range(steps)] + [0.0]


def karras_decrement(steps: int, sigma_max: float, sigma_min: float, rho: float = RHO) -> float:
    """Distance of neighbouring levels of `karras_levels` in sigma^(1/rho); infinite for one step."""
    return (sigma_max ** (1 / rho) - sigma_min ** (1 / rho)) / (steps - 1) if steps > 1 else torch.inf


def next_level(sigma: Tensor, decrement: float, sigma_min: float, rho: float = RHO) -> Tensor:
    """The level one decrement below sigma, or 0 where that is under sigma_min."""
    below = (sigma.pow(1 / rho) - decrement).clamp(min=0).pow(rho)
    # the last level of the grid itself must not fall to rounding
    return torch.where(below < sigma_min * (1 - 1e-4), torch.zeros_like(below), below)


def noise_level(displacement: Tensor, degrees: Tensor) -> Tensor:
    """sigma_hat (B,) = |x0_hat - x| / sqrt(degrees), with x0_hat - x = F / 2 (B, N, 3) in Angstrom.

    degrees (B,): degrees of freedom that carry noise, 3 (N - 1) for a free molecule.
    """
    return (displacement.square().sum((1, 2)) / degrees).sqrt()
