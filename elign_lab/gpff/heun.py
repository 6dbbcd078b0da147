"""Heun's method on the probability-flow ODE, on a fixed grid of noise levels (Karras et al., algorithm 1, no churn).

    d = (x - x0_hat(x)) / sigma,   x' = x + (sigma_s - sigma) d,   x_s = x + (sigma_s - sigma) (d + d') / 2

Two network calls a step, one in the last: an odd number in all. `level` is as in `ancestral`: with "force" both slopes
are divided by the level that the force shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elign_lab.gpff.ancestral import current_level
from elign_lab.gpff.levels import karras_levels
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask


def heun(
    task: SamplingTask, x: Tensor, *, evaluations: int, sigma: float, sigma_min: float, level: str = "grid"
) -> Iterator[ForceRecord]:
    """Yield one ForceRecord a step, from x (B, N, 3) at noise level sigma (Angstrom); at most `evaluations` calls."""
    steps = (evaluations + 1) // 2
    grid = karras_levels(steps, sigma, sigma_min)
    everything = torch.ones(len(task), dtype=torch.bool, device=x.device)
    for k in range(steps):
        clean, sigma_hat = task.estimate(x)
        now = current_level(level, grid[k], sigma_hat)
        target = torch.full_like(now, grid[k + 1]).minimum(now)
        after = clean if grid[k + 1] == 0 else heun_update(task, x, clean, now, target, level)
        after = task.project(after)
        t = steps - 1 - k
        yield ForceRecord(
            t, t - 1, x, (x - clean) / now, clean, after, 1.0, torch.zeros_like(x), after, task.mask,
            task.evaluations, task.numbers, torch.zeros_like(sigma_hat), sigma_hat, everything, task.spent.clone(),
        )  # fmt: skip
        x = after


def heun_update(
    task: SamplingTask,
    x: Tensor,
    clean: Tensor,
    now: Tensor,
    target: Tensor,
    level: str,
    active: Tensor | None = None,
) -> Tensor:
    """The corrected step (B, N, 3) from level `now` to `target` > 0, both (B, 1, 1); one network call."""
    slope = (x - clean) / now
    guess = task.project(x + (target - now) * slope)
    there = task.estimate(guess, active)
    level_there = target if level == "grid" else there.sigma_hat.view(-1, 1, 1).clamp(min=1e-6)
    slope_there = (guess - there.clean) / level_there
    return x + (target - now) * 0.5 * (slope + slope_there)
