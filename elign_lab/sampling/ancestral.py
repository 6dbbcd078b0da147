"""Ancestral sampling: the reverse kernel of the diffusion model, step by step (EDM; SPEC section 1).

z_s = z_t / alpha_ts - (sigma_ts^2 / (alpha_ts sigma_t)) eps_theta(z_t, t) + sigma_{t->s} xi, xi of zero centre of mass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elign_lab.denoiser import Denoiser, Layout
from elign_lab.molecules import zero_com
from elign_lab.sampling.record import StepRecord


def ancestral(
    model: Denoiser,
    mask: Tensor,
    *,
    steps: int | None = None,
    grid: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    z: Tensor | None = None,
    noise: Iterator[Tensor] | None = None,
    context: Tensor | None = None,
    decode: bool = True,
) -> Iterator[StepRecord]:
    """Yield one StepRecord a step, from pure noise (or from the state `z` at grid[0]) down to the decoding.

    mask (B, N); steps: T, or fewer on the same grid; grid: explicit descending times, then `steps` is not used. noise
    replaces the generator: an iterator of states (B, N, 3 + F), first z_T (when z is None), then one a step. Without
    `decode` it stops at z_{grid[-1]}. Network calls: len(grid) - 1, and one for the decoding. The loop never waits for
    the device.
    """
    times = list(grid) if grid is not None else model.schedule.grid(steps)
    layout = Layout(mask)
    draw = noise_stream(model, mask, generator) if noise is None else noise
    z = next(draw) if z is None else z
    evaluations = 0
    for t, s in itertools.pairwise(times):
        evaluations += 1
        with torch.no_grad():
            record = _step(model, z, t, s, mask, next(draw), context, layout, evaluations)
        yield record
        z = record.z_s
    if decode:
        yield decoding_step(model, z, times[-1], mask, next(draw), context, layout, evaluations + 1)


def noise_stream(
    model: Denoiser, mask: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
) -> Iterator[Tensor]:
    """Random states (B, N, 3 + F) without end: z_T, then one a step, these multiplied by `temperature`.

    Under 1 the chain ends nearer to the modes of the model's law, over 1 it spreads; only 1 samples the model itself.
    """
    yield model.noise(mask, generator)
    while True:
        yield temperature * model.noise(mask, generator)


def _step(
    model: Denoiser,
    z: Tensor,
    t: int,
    s: int,
    mask: Tensor,
    noise: Tensor,
    context: Tensor | None,
    layout: Layout,
    evaluations: int,
) -> StepRecord:
    eps = model.eps(z, torch.full((len(z),), t, device=z.device), mask, context=context, layout=layout)
    step = model.schedule.transition(t, s)
    mean = model.posterior_mean(z, eps, step)
    z_s = mean + step.sigma * noise
    # both terms have zero centre of mass; projecting again keeps rounding from adding up
    z_s = torch.cat([zero_com(z_s[..., :3], mask), z_s[..., 3:]], -1)
    return StepRecord(t, s, z, eps, model.clean(z, t, eps), mean, step.sigma, noise, z_s, mask, evaluations)


@torch.no_grad()
def decoding_step(
    model: Denoiser,
    z: Tensor,
    t: int,
    mask: Tensor,
    noise: Tensor,
    context: Tensor | None,
    layout: Layout,
    evaluations: int,
) -> StepRecord:
    """The last step of every sampler: x ~ N(x0_hat(z_0), (sigma_0 / alpha_0)^2 P); z must be at t = 0."""
    if t != 0:
        raise ValueError(f"decoding needs a grid that ends at t = 0, got {t}")
    eps = model.eps(z, torch.zeros(len(z), dtype=torch.long, device=z.device), mask, context=context, layout=layout)
    clean = model.clean(z, 0, eps)
    alpha, sigma = model.schedule.alpha_sigma(0)
    z_s = clean + sigma / alpha * noise
    return StepRecord(0, -1, z, eps, clean, clean, sigma / alpha, noise, z_s, mask, evaluations)
