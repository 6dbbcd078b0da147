"""Samplers, one file each; every one yields StepRecords. `sample` is the one call that a user needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling.ancestral import ancestral, noise_stream
from elign_lab.sampling.dpm_solver import dpm_solver
from elign_lab.sampling.record import StepRecord, Trajectory, decode_record

Sampler = Callable[..., Iterator[StepRecord]]

SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "dpm_solver": dpm_solver}
DETERMINISTIC = ("dpm_solver",)

__all__ = [
    "SAMPLERS",
    "StepRecord",
    "Trajectory",
    "ancestral",
    "check_temperature",
    "decode_record",
    "dpm_solver",
    "draw_sizes",
    "get_sampler",
    "mask_of_sizes",
    "noise_stream",
    "require_all",
    "sample",
]


def sample(
    model: Denoiser,
    n: int,
    *,
    sizes: Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    spacing: float = 1.0,
    seed: int = 0,
    sampler: str = "ancestral",
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: bool = False,
) -> MoleculeBatch:
    """Sample n molecules.

    sizes: number of atoms of each (default: drawn from the model's training histogram); steps, spacing: all T steps, or
    fewer on the same grid, see `NoiseSchedule.grid`; seed: the same seed, n, sizes and batch_size give the same
    molecules on the same machine, and the same noise for another model. temperature: factor on the noise of the steps,
    see `noise_stream`; for a sampler that has noise. Molecules of near-equal size are sampled together. When
    interrupted (Ctrl-C) it returns the molecules of the finished batches with a warning, and raises only if there are
    none.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    run = get_sampler(sampler)
    check_temperature(temperature, sampler)
    sizes = draw_sizes(model, n, seed) if sizes is None else torch.as_tensor(sizes, dtype=torch.long)
    _check_sizes(model, sizes, n)
    order = torch.argsort(sizes, stable=True)
    generator = torch.Generator(model.device).manual_seed(seed)
    grid = model.schedule.grid(steps, spacing)
    calls = len(grid) * -(-n // batch_size)
    done: list[MoleculeBatch] = []
    with tqdm(total=calls, desc="sampling", unit="step", disable=not progress) as bar:
        try:
            for chunk in order.split(batch_size):
                mask = mask_of_sizes(sizes[chunk]).to(model.device)
                noise = noise_stream(model, mask, generator, temperature)
                for last in run(model, mask, grid=grid, noise=noise):  # noqa: B007 (used below)
                    bar.update()
                done.append(decode_record(model, last).to("cpu"))
        except KeyboardInterrupt:
            if not done:
                raise
            warnings.warn(f"interrupted: returning {sum(map(len, done))} of {n} molecules", stacklevel=2)
            return MoleculeBatch.cat(done)
    return MoleculeBatch.cat(done)[torch.argsort(order)]


def require_all(molecules: MoleculeBatch, n: int) -> MoleculeBatch:
    """The n molecules that were asked for; raises KeyboardInterrupt for the fewer ones of an interrupted sampler."""
    if len(molecules) < n:
        raise KeyboardInterrupt
    return molecules


def draw_sizes(model: Denoiser, n: int, seed: int) -> Tensor:
    """Sizes of n molecules from the model's training histogram, (n,); independent of the noise of the same seed."""
    (own,) = np.random.SeedSequence([seed, 1]).generate_state(1)
    return model.sample_sizes(n, torch.Generator().manual_seed(int(own)))


def get_sampler(name: str) -> Sampler:
    """A sampler by name; ValueError lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def check_temperature(temperature: float, sampler: str) -> None:
    """Raise ValueError for a temperature under 0, and for one other than 1 with a sampler that has no noise."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more; 1 samples the model")
    if temperature != 1 and sampler in DETERMINISTIC:
        raise ValueError(f"{sampler} has no noise for a temperature of {temperature} to scale: use 'ancestral', or 1")


def mask_of_sizes(sizes: Tensor | Sequence[int]) -> Tensor:
    """Sizes (B,) -> mask (B, max size) with the real atoms first."""
    sizes = torch.as_tensor(sizes, dtype=torch.long)
    return torch.arange(int(sizes.max())) < sizes.unsqueeze(1)


def _check_sizes(model: Denoiser, sizes: Tensor, n: int) -> None:
    if tuple(sizes.shape) != (n,):
        raise ValueError(
            f"sizes has shape {tuple(sizes.shape)}, expected ({n},): one number of atoms for each molecule"
        )
    if int(sizes.min()) < 1:
        raise ValueError(f"sizes[{int(sizes.argmin())}] = {int(sizes.min())}: a molecule needs at least one atom")
    limit = model.config.max_atoms
    if limit is not None and int(sizes.max()) > limit:
        raise ValueError(
            f"sizes[{int(sizes.argmax())}] = {int(sizes.max())} is over the model's limit of {limit} atoms"
        )
