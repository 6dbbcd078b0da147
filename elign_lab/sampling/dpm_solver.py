"""DPM-Solver++ (2M): a second-order multistep solver of the probability-flow ODE (Lu et al. 2022, Algorithm 2).

With lambda_t = log(alpha_t / sigma_t) = -gamma_t / 2, h = lambda_s - lambda_t, r = h_previous / h:
    D   = (1 + 1/(2r)) x0_hat(z_t) - 1/(2r) x0_hat(z_previous)        (the first step uses x0_hat alone)
    z_s = (sigma_s / sigma_t) z_t - alpha_s (exp(-h) - 1) D
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elign_lab.denoiser import Denoiser, Layout
from elign_lab.molecules import zero_com
from elign_lab.sampling.ancestral import decoding_step, noise_stream
from elign_lab.sampling.record import StepRecord


def dpm_solver(
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
    """Yield one StepRecord a step; arguments as for `ancestral`.

    Deterministic after z_T: sigma and noise of a record are zero, its mean is z_s. One random state is drawn for the
    decoding. The likelihood ratios of FED-GRPO need a stochastic sampler: this one is for fast sampling only.
    """
    times = list(grid) if grid is not None else model.schedule.grid(steps)
    layout = Layout(mask)
    draw = noise_stream(model, mask, generator) if noise is None else noise
    z = next(draw) if z is None else z
    quiet = torch.zeros_like(z)
    previous: tuple[Tensor, float] | None = None
    evaluations = 0
    for t, s in itertools.pairwise(times):
        model.schedule.check_step(t, s)
        evaluations += 1
        with torch.no_grad():
            eps = model.eps(z, torch.full((len(z),), t, device=z.device), mask, context=context, layout=layout)
            clean = model.clean(z, t, eps)
            h = float(model.schedule.gamma[t] - model.schedule.gamma[s]) / 2
            estimate = clean if previous is None else _extrapolate(clean, *previous, h)
            (_, sigma_t), (alpha_s, sigma_s) = model.schedule.alpha_sigma(t), model.schedule.alpha_sigma(s)
            z_s = sigma_s / sigma_t * z - alpha_s * math.expm1(-h) * estimate
            z_s = torch.cat([zero_com(z_s[..., :3], mask), z_s[..., 3:]], -1)
        yield StepRecord(t, s, z, eps, clean, z_s, 0.0, quiet, z_s, mask, evaluations)
        z, previous = z_s, (clean, h)
    if decode:
        yield decoding_step(model, z, times[-1], mask, next(draw), context, layout, evaluations + 1)


def _extrapolate(clean: Tensor, clean_before: Tensor, h_before: float, h: float) -> Tensor:
    weight = h / (2 * h_before)
    return (1 + weight) * clean - weight * clean_before
