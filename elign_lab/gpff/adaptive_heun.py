"""Heun's method without a grid: each molecule steps down from the noise level that its own force shows.

As `adaptive_ancestral`, with two network calls a step; the slopes are divided by sigma_hat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elign_lab.gpff.heun import heun_update
from elign_lab.gpff.levels import karras_decrement, next_level
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask


def adaptive_heun(
    task: SamplingTask, x: Tensor, *, evaluations: int, sigma_min: float, sigma: float | None = None
) -> Iterator[ForceRecord]:
    """Yield one ForceRecord a step, from x (B, N, 3) at any noise level; at most `evaluations` calls.

    sigma is the level of the start, if known; it is not used.
    """
    steps = (evaluations + 1) // 2
    decrement = karras_decrement(steps, task.model.config.sigma_max, sigma_min)
    active = torch.ones(len(task), dtype=torch.bool, device=x.device)
    for k in range(steps):
        clean, sigma_hat = task.estimate(x, active)
        now = sigma_hat.clamp(min=1e-6).view(-1, 1, 1)
        target = next_level(now, decrement, sigma_min)
        if k == steps - 1:
            target = torch.zeros_like(target)
        going = active & (target.view(-1) > 0)
        after = clean
        if bool(going.any()):
            corrected = heun_update(task, x, clean, now, target, "force", going)
            after = torch.where(going.view(-1, 1, 1), corrected, clean)
        after = torch.where(active.view(-1, 1, 1), task.project(after), x)
        moved, active = active, going
        t = steps - 1 - k if bool(active.any()) else 0
        yield ForceRecord(
            t, t - 1, x, (x - clean) / now, clean, after, 1.0, torch.zeros_like(x), after, task.mask,
            task.evaluations, task.numbers, torch.zeros_like(sigma_hat), sigma_hat, moved, task.spent.clone(),
        )  # fmt: skip
        if t == 0:
            return
        x = after
