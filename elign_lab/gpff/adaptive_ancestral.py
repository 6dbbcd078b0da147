"""Ancestral sampling without a grid: each molecule steps down from the noise level that its own force shows.

From sigma_hat the next level is one decrement lower in sigma^(1/rho), the decrement being that of the grid of
`evaluations` steps over the model's range. A molecule stops when its level is at sigma_min; it then takes the clean
estimate. A start that is nearly right, a structural prior, therefore costs few steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elign_lab.gpff.ancestral import ancestral_update
from elign_lab.gpff.levels import karras_decrement, next_level
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask


def adaptive_ancestral(
    task: SamplingTask, x: Tensor, *, evaluations: int, sigma_min: float, sigma: float | None = None
) -> Iterator[ForceRecord]:
    """Yield one ForceRecord a step, from x (B, N, 3) at any noise level; at most `evaluations` calls.

    sigma is the level of the start, if known; it is not used.
    """
    decrement = karras_decrement(evaluations, task.model.config.sigma_max, sigma_min)
    active = torch.ones(len(task), dtype=torch.bool, device=x.device)
    for k in range(evaluations):
        clean, sigma_hat = task.estimate(x, active)
        now = sigma_hat.clamp(min=1e-6).view(-1, 1, 1)
        target = next_level(now, decrement, sigma_min)
        if k == evaluations - 1:
            target = torch.zeros_like(target)
        mean, amplitude = ancestral_update(x, clean, now, target)
        noise = amplitude * task.noise()
        after = torch.where(active.view(-1, 1, 1), task.project(mean + noise), x)
        moved, active = active, active & (target.view(-1) > 0)
        t = evaluations - 1 - k if bool(active.any()) else 0
        yield ForceRecord(
            t, t - 1, x, (x - clean) / now, clean, mean, 1.0, noise, after, task.mask, task.evaluations,
            task.numbers, amplitude.view(-1), sigma_hat, moved, task.spent.clone(),
        )  # fmt: skip
        if t == 0:
            return
        x = after
