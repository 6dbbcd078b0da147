"""Direct denoising: relaxation on the pseudo-potential, with shrinking shaking.

    x <- x0_hat + momentum (x0_hat - x0_hat of the call before) + strength (1 - k / n) xi,    k = 1 ... n

One network call a step, and no noise level anywhere: the step goes all the way to the minimum that the force points to.
strength 0 is plain relaxation; the noise (in Angstrom) lets a structure leave a wrong minimum. The default is the best
of 0, 0.3 and 1 for gpff-mini at most numbers of calls (the table in its passport). x0_hat is a mean over all molecules
that still fit, and moves the same way for several calls: with few of them, momentum (Polyak's heavy ball) saves some.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask


def direct(
    task: SamplingTask,
    x: Tensor,
    *,
    evaluations: int,
    sigma_min: float,
    sigma: float | None = None,
    strength: float = 0.3,
    momentum: float = 0.0,
) -> Iterator[ForceRecord]:
    """Yield one ForceRecord a step, from x (B, N, 3) at any noise level; at most `evaluations` calls.

    Without noise it stops when every force shows a level under sigma_min. sigma, the level of the start, is not used.
    """
    if strength < 0:
        raise ValueError(f"strength of the noise must be 0 or more (Angstrom), got {strength}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
    before = None
    everything = torch.ones(len(task), dtype=torch.bool, device=x.device)
    for k in range(1, evaluations + 1):
        clean, sigma_hat = task.estimate(x)
        mean = clean if before is None else clean + momentum * (clean - before)
        amplitude = strength * (1 - k / evaluations)
        noise = amplitude * task.noise()
        after = task.project(mean + noise)
        done = strength == 0 and bool((sigma_hat < sigma_min).all())
        t = 0 if done else evaluations - k
        eps = (x - clean) / sigma_hat.clamp(min=1e-6).view(-1, 1, 1)
        yield ForceRecord(
            t, t - 1, x, eps, clean, mean, 1.0, noise, after, task.mask, task.evaluations,
            task.numbers, torch.full_like(sigma_hat, amplitude), sigma_hat, everything, task.spent.clone(),
        )  # fmt: skip
        if t == 0:
            return
        x, before = after, clean
