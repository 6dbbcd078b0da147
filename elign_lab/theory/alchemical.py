"""F.1: the force that alignment adds to the score, and its direction against the oracle's force (paper Eq. 9, 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from elign_lab.alignment import PRESETS, AlignConfig
from elign_lab.checkpoints import load_model
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import zero_com_noise
from elign_lab.oracles import Oracle, load_oracle
from elign_lab.sampling import ancestral, draw_sizes, mask_of_sizes
from elign_lab.theory.check import Check, mean_check
from elign_lab.theory.springs import PairSprings
from elign_lab.theory.symmetry import small_denoiser

BUNDLED_PRESET = PRESETS["cpu_mini"]()
"""Settings of the first of the stages that made edm-mini-aligned of edm-mini (its passport has them all).

The later ones, with cpu_mini_fine, train a part of the times of this one.
"""


class NoisePredictor(Protocol):
    """What F.1 needs of the aligned model: its noise prediction."""

    def eps(self, z: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """Predicted noise; see Denoiser.eps."""
        ...


@dataclass(frozen=True)
class AlchemicalCosines:
    """Cosines between the alchemical force and the oracle's force at the clean estimate.

    times (S,): t of each analysed state. cosine (S, B), over the 3 N components of a molecule; control (S, B): a random
    direction of the subspace against the same force. NaN where the oracle could not judge the clean estimate.
    """

    times: Tensor
    cosine: Tensor
    control: Tensor

    @property
    def judged(self) -> Tensor:
        """Share of the states at each time that the oracle could judge, (S,)."""
        return self.cosine.isfinite().double().mean(1)

    def mean_by_time(self) -> tuple[Tensor, Tensor]:
        """Mean cosine at each time and its standard error over the molecules, (S,) each; see `mean_by_time`."""
        return mean_by_time(self.cosine)

    def until(self, time: int) -> AlchemicalCosines:
        """The states with t <= time: those that alignment trained, when it starts after a prefix."""
        keep = self.times <= time
        if not bool(keep.any()):
            raise ValueError(f"no analysed state has t <= {time}: the times are {self.times.tolist()}")
        return AlchemicalCosines(self.times[keep], self.cosine[keep], self.control[keep])


def mean_by_time(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the finite entries of each row of (S, B), (S,) each.

    The mean is NaN where there is none, the error where there are fewer than two: one entry shows no spread.
    """
    count = values.isfinite().sum(1)
    mean = values.nanmean(1)
    spread = (values - mean.unsqueeze(1)).square().nanmean(1).sqrt()
    return mean, torch.where(count > 1, spread / (count - 1).clamp(min=1).sqrt(), torch.nan)


def alchemical_force(base: Denoiser, aligned: NoisePredictor, z_t: Tensor, t: int, mask: Tensor) -> Tensor:
    """f_alch = s^x_post(z_t, t) - s^x_pre(z_t, t) on the positions (B, N, 3), with s = -eps / sigma_t (paper Eq. 9)."""
    steps = torch.full((len(z_t),), t, device=z_t.device)
    sigma = base.schedule.alpha_sigma(t)[1]
    with torch.no_grad():
        return -(aligned.eps(z_t, steps, mask) - base.eps(z_t, steps, mask))[..., :3] / sigma


def alchemical_cosines(
    base: Denoiser,
    aligned: NoisePredictor,
    oracle: Oracle,
    sizes: Sequence[int],
    *,
    steps: int | None = None,
    spacing: float = 1.0,
    skip: int = 0,
    stride: int = 1,
    seed: int = 0,
) -> AlchemicalCosines:
    """Cosines along trajectories of the base model, one molecule for each entry of sizes.

    steps, spacing: of the sampler's grid; the first `skip` are not analysed, then every stride-th is. The oracle sees
    the base model's clean estimate with its own types; the force is that of Eq. 10, f(x0_hat).
    """
    if skip < 0 or stride < 1:
        raise ValueError(f"skip must be at least 0 and stride at least 1, got {skip} and {stride}")
    mask = mask_of_sizes(sizes).to(base.device)
    generator = torch.Generator(base.device).manual_seed(seed)
    directions = torch.Generator(base.device).manual_seed(seed + 1)
    times, cosines, controls = [], [], []
    grid = base.schedule.grid(steps, spacing)
    records = ancestral(base, mask, grid=grid, generator=generator, decode=False)
    for k, record in enumerate(records):
        if k < skip or (k - skip) % stride:
            continue
        force = oracle(base.decode(record.clean, record.clean, mask)).forces
        random = zero_com_noise(mask, directions, force.dtype)
        times.append(record.t)
        cosines.append(_cosine(alchemical_force(base, aligned, record.z_t, record.t, mask), force))
        controls.append(_cosine(random, force))
    if not times:
        raise ValueError(f"no step is left to analyse after skip={skip}: the sampler makes fewer steps")
    return AlchemicalCosines(torch.tensor(times), torch.stack(cosines), torch.stack(controls))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)


class ForceDrift:
    """A model 'aligned' by hand: the base with its score moved along the oracle's force, turned by a known angle.

    eps = eps_base - strength sigma_t (cos(angle) u + sin(angle) v), u the unit force at the clean estimate, v a unit
    vector of the subspace orthogonal to it. F.1 must find cos(angle).
    """

    def __init__(self, base: Denoiser, oracle: Oracle, angle: float, strength: float = 0.1, seed: int = 0) -> None:
        self.base, self.oracle, self.angle, self.strength = base, oracle, angle, strength
        self.generator = torch.Generator(base.device).manual_seed(seed)

    @torch.no_grad()
    def eps(self, z: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """Predicted noise; see Denoiser.eps."""
        eps = self.base.eps(z, t, mask)
        clean = self.base.clean(z, t, eps)
        along = _unit(self.oracle(self.base.decode(clean, clean, mask)).forces.to(z.dtype))
        random = zero_com_noise(mask, self.generator, z.dtype)
        across = _unit(random - (random * along).sum((1, 2), keepdim=True) * along)
        drift = math.cos(self.angle) * along + math.sin(self.angle) * across
        sigma = self.base.schedule.alpha_sigma(t)[1].to(z.dtype).view(-1, 1, 1)
        moved = eps[..., :3] - self.strength * sigma * drift
        return torch.cat([moved, eps[..., 3:]], -1)


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum((1, 2), keepdim=True).sqrt()


def trained_time(base: Denoiser, config: AlignConfig) -> int:
    """Largest t at which FED-GRPO with these settings trains the model: where its shared prefix ends."""
    return base.schedule.grid(config.steps, config.spacing)[config.skip_prefix]


@cache
def bundled_cosines(molecules: int = 128, stride: int = 4, seed: int = 0) -> AlchemicalCosines:
    """Cosines between edm-mini and edm-mini-aligned, judged by the learned oracle.

    Its present version gave the rewards of the last stage, an older one those before. The steps are those of
    BUNDLED_PRESET, every stride-th analysed; sizes are drawn from the model's histogram. It is computed once per
    setting.
    """
    base, aligned, oracle = load_model("edm-mini"), load_model("edm-mini-aligned"), load_oracle("learned")
    sizes = draw_sizes(base, molecules, seed).tolist()
    c = BUNDLED_PRESET
    return alchemical_cosines(base, aligned, oracle, sizes, steps=c.steps, spacing=c.spacing, stride=stride, seed=seed)


# ---------------------------------------------------------------------- statements
def check_recovered_angle(angle: float = 0.8, molecules: int = 12, use_clean: bool = True) -> Check:
    """F.1 finds the cosine of a drift that was put in by hand (mean over molecules and steps), against cos(angle).

    use_clean=False compares with a random direction instead of the force: the control.
    """
    base, oracle = small_denoiser(), PairSprings()
    found = alchemical_cosines(base, ForceDrift(base, oracle, angle), oracle, [7] * molecules)
    values = (found.cosine if use_clean else found.control).mean(0)
    check = mean_check(values.numpy(), math.cos(angle))
    # with an exact drift nothing scatters but rounding
    return Check(check.left, check.right, max(check.standard_error, 1e-9))


def broken_recovered_angle() -> Check:
    """The random-direction control read as the result."""
    return check_recovered_angle(use_clean=False)


def check_control(molecules: int = 40, angle: float = 0.8, use_control: bool = True) -> Check:
    """The random-direction control has mean cosine 0."""
    base, oracle = small_denoiser(), PairSprings()
    found = alchemical_cosines(base, ForceDrift(base, oracle, angle), oracle, [7] * molecules, stride=4)
    values = found.control if use_control else found.cosine
    return Check(float(values.mean()), 0.0, float(found.control.std()) / found.control.numel() ** 0.5)


def broken_control() -> Check:
    """A control that is not random: the drift itself."""
    return check_control(use_control=False)


def check_bundled_pair(sign: float = 1.0) -> Check:
    """Mean cosine of the bundled pair over the steps that were trained, one value a molecule, is above 0.

    sign = -1 subtracts the aligned score from the base score.
    """
    trained = trained_time(load_model("edm-mini"), BUNDLED_PRESET)
    values = bundled_cosines().until(trained).cosine.nanmean(0)
    found = mean_check(sign * values[values.isfinite()].numpy(), 0.0)
    return Check(0.0, found.left, found.standard_error, "<=")


def broken_bundled_pair() -> Check:
    """The difference taken the wrong way round, base minus aligned."""
    return check_bundled_pair(sign=-1.0)
