"""How the noise level read off the force compares with the true one, and its spread by the size of the molecule.

sigma_hat = |F / 2| / sqrt(3 (N - 1)) is the length of E[x_ref | x] - x, which is shorter than that of x_ref - x: the
square of what is missing is the posterior variance. Where a structure still fits several molecules, sigma_hat is
therefore too small; `Calibration.sigma_of` undoes that on average.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elign_lab.datasets import MoleculeDataset
from elign_lab.gpff.levels import noise_level
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.pseudo_forces import perturb
from elign_lab.training import step_generator

SIZE_BINS = (2, 13, 17, 21, 200)


@dataclass(frozen=True)
class Calibration:
    """Predicted against true noise levels, in Angstrom.

    sigma (L,): true levels; sigma_hat (L,): mean of the predicted ones; deviation (L,): standard deviation of the
    predicted ones over molecules; by_size: the bin's sizes ('13-16') to (mean, standard deviation) of sigma_hat / sigma
    at each level, for the bins with molecules.
    """

    sigma: tuple[float, ...]
    sigma_hat: tuple[float, ...]
    deviation: tuple[float, ...]
    by_size: dict[str, tuple[tuple[float, float], ...]]

    def sigma_of(self, sigma_hat: Tensor) -> Tensor:
        """True level for a predicted one (Angstrom), by interpolation between logarithms; constant ratio outside."""
        known = np.maximum.accumulate(np.log(self.sigma_hat))
        ratio = np.log(self.sigma) - np.log(self.sigma_hat)
        logs = sigma_hat.detach().cpu().double().clamp(min=1e-12).log().numpy()
        shift = np.interp(logs, known, ratio)
        return torch.from_numpy(np.exp(logs + shift)).to(sigma_hat)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def calibrate(
    model: PseudoForceField,
    data: MoleculeDataset,
    n: int = 256,
    *,
    levels: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Calibration:
    """Measure the calibration on the first n molecules of a data set; levels in Angstrom (default: 13, log-spaced)."""
    config = model.config
    grid = np.geomspace(config.sigma_min, config.sigma_max, 13) if levels is None else np.asarray(levels, dtype=float)
    if len(grid) < 2 or not (np.diff(grid) > 0).all() or grid[0] <= 0:
        raise ValueError(f"levels must be two or more increasing positive numbers (Angstrom), got {grid.tolist()}")
    chosen = np.argsort(data.sizes[:n], kind="stable")
    if len(chosen) == 0:
        raise ValueError("no molecules to calibrate on: expected n >= 1 and a data set that is not empty")
    found = np.zeros((len(grid), len(chosen)))
    for k, level in enumerate(grid.tolist()):
        generator = step_generator(seed, 3, k)
        for part in np.array_split(np.arange(len(chosen)), -(-len(chosen) // batch_size)):
            batch = data.batch(chosen[part])
            x = perturb(batch, torch.full((len(batch),), level), generator)
            force = model(*(v.to(model.device) for v in (batch.numbers, x, batch.mask)))
            found[k, part] = noise_level(0.5 * force.cpu(), 3 * (batch.sizes - 1)).numpy()
    sizes = data.sizes[chosen]
    by_size = {}
    for first, end in itertools.pairwise(SIZE_BINS):
        ratio = found[:, (sizes >= first) & (sizes < end)] / grid[:, None]
        if ratio.shape[1]:
            by_size[f"{first}-{end - 1}"] = tuple(zip(ratio.mean(1).tolist(), ratio.std(1).tolist(), strict=True))
    return Calibration(tuple(grid.tolist()), tuple(found.mean(1).tolist()), tuple(found.std(1).tolist()), by_size)
