"""Ancestral sampling of the variance-exploding diffusion on a fixed grid of noise levels (Karras et al. spacing).

    x_s = x0_hat + (sigma_s^2 / sigma_t^2) (x_t - x0_hat) + sigma_s sqrt(1 - sigma_s^2 / sigma_t^2) xi

One network call a step. The level sigma_t of the current structure is that of the grid (`level="grid"`: the network
used with an explicit sigma), or what the force shows (`level="force"`): then a structure that is cleaner than planned
is not shrunk again by the plan's ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elign_lab.gpff.levels import karras_levels
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask

LEVELS = ("grid", "force")


def ancestral(
    task: SamplingTask, x: Tensor, *, evaluations: int, sigma: float, sigma_min: float, level: str = "grid"
) -> Iterator[ForceRecord]:
    """Yield one ForceRecord a step, from x (B, N, 3) at noise level sigma (Angstrom); `evaluations` steps."""
    grid = karras_levels(evaluations, sigma, sigma_min)
    everything = torch.ones(len(task), dtype=torch.bool, device=x.device)
    for k in range(evaluations):
        clean, sigma_hat = task.estimate(x)
        now = current_level(level, grid[k], sigma_hat)
        target = torch.full_like(now, grid[k + 1]).minimum(now)
        mean, amplitude = ancestral_update(x, clean, now, target)
        noise = amplitude * task.noise()
        after = task.project(mean + noise)
        t = evaluations - 1 - k
        yield ForceRecord(
            t, t - 1, x, (x - clean) / now, clean, mean, 1.0, noise, after, task.mask, task.evaluations,
            task.numbers, amplitude.view(-1), sigma_hat, everything, task.spent.clone(),
        )  # fmt: skip
        x = after


def ancestral_update(x: Tensor, clean: Tensor, now: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, N, 3) and noise amplitude (B, 1, 1) of the step from level `now` to `target`, both (B, 1, 1)."""
    ratio = (target / now).square()
    return clean + ratio * (x - clean), target * (1 - ratio).clamp(min=0).sqrt()


def current_level(level: str, planned: float, sigma_hat: Tensor) -> Tensor:
    """The level (B, 1, 1) that a step on a grid takes the structures to have."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: expected 'grid' (explicit sigma) or 'force' (sigma_hat)")
    shown = sigma_hat.view(-1, 1, 1)
    # 1e-6: a structure that does not move at all
    return torch.full_like(shown, planned) if level == "grid" else shown.clamp(min=1e-6)
