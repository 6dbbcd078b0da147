"""The noise schedule: alpha_t, sigma_t and gamma_t = -log SNR(t) on the integer grid t = 0..T (paper section 2).

Everything is looked up from one table of gamma. The table is rounded to float32, because public EDM checkpoints store
it so; what follows from it is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

FIRST_STEP = 4.0  # of a coarse grid: the largest 1 / alpha_ts; 2 and 8 do as well (docs/runs.md)


@dataclass(frozen=True)
class Transition(Generic[Number]):
    """The Gaussian reverse kernel from t to s < t: z_s = z_t / alpha_ts - eps_coefficient * eps + sigma * xi.

    Fields are floats (for integer t and s) or tensors of their shape. `ratio_scale` is c_t of the likelihood ratio:
    the mean moves by -sigma * c_t * (eps_new - eps_old), with c_t^2 = expm1(gamma_t - gamma_s).
    """

    alpha_ts: Number
    sigma2_ts: Number
    eps_coefficient: Number
    sigma: Number
    ratio_scale: Number


class NoiseSchedule:
    """Variance-preserving schedule with T steps: 'polynomial_<power>' (EDM: polynomial_2) or 'cosine'.

    `gamma` replaces the computed table (a public checkpoint brings its own), shape (T+1,).
    """

    def __init__(self, name: str, timesteps: int, precision: float = 1e-5, gamma: Tensor | None = None) -> None:
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        self.name, self.timesteps, self.precision = name, timesteps, precision
        if gamma is None:
            alpha2 = alpha_squared(name, timesteps, precision)
            gamma = torch.from_numpy(np.log1p(-alpha2) - np.log(alpha2))
        if tuple(gamma.shape) != (timesteps + 1,):
            raise ValueError(f"gamma table has shape {tuple(gamma.shape)}, expected ({timesteps + 1},)")
        self.gamma = gamma.detach().cpu().float().double()
        self._on_device: dict[torch.device, Tensor] = {}

    def lookup(self, t: Tensor) -> Tensor:
        """gamma at integer steps t (any shape), float64, on the device of t."""
        if t.is_floating_point():
            raise ValueError(f"t must hold integer steps 0..{self.timesteps}, got dtype {t.dtype}")
        if t.device not in self._on_device:
            self._on_device[t.device] = self.gamma.to(t.device)
        return self._on_device[t.device][t]

    @overload
    def alpha_sigma(self, t: int) -> tuple[float, float]: ...
    @overload
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def alpha_sigma(self, t: int | Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """alpha_t and sigma_t; floats for an integer t, float64 tensors for a tensor."""
        g = self._gamma_of(t)
        alpha, sigma = torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()
        return (float(alpha), float(sigma)) if isinstance(t, int) else (alpha, sigma)

    @overload
    def transition(self, t: int, s: int) -> Transition[float]: ...
    @overload
    def transition(self, t: Tensor, s: Tensor) -> Transition[Tensor]: ...
    def transition(self, t: int | Tensor, s: int | Tensor) -> Transition[float] | Transition[Tensor]:
        """The reverse kernel from t to s (SPEC section 1), for s < t."""
        gt, gs = self._gamma_of(t), self._gamma_of(s)
        sigma2_ts = -torch.expm1(torch.nn.functional.softplus(gs) - torch.nn.functional.softplus(gt))
        alpha_ts = torch.exp(0.5 * (torch.nn.functional.logsigmoid(-gt) - torch.nn.functional.logsigmoid(-gs)))
        sigma_t, sigma_s = torch.sigmoid(gt).sqrt(), torch.sigmoid(gs).sqrt()
        values = (
            alpha_ts,
            sigma2_ts,
            sigma2_ts / (alpha_ts * sigma_t),
            sigma2_ts.sqrt() * sigma_s / sigma_t,
            torch.expm1(gt - gs).sqrt(),
        )
        if isinstance(t, int) and isinstance(s, int):
            self.check_step(t, s)
            return Transition(*(float(v) for v in values))
        return Transition(*values)

    def check_step(self, t: int, s: int) -> None:
        """Raise ValueError when there is no reverse step from t to s."""
        if not 0 <= s < t <= self.timesteps:
            raise ValueError(f"a reverse step needs 0 <= s < t <= {self.timesteps}, got t={t}, s={s}")

    def grid(self, steps: int | None = None, spacing: float = 1.0) -> list[int]:
        """Descending times to 0: all T steps, or `steps` of them on the same grid.

        spacing: step k of S is at first * (k / S)^spacing: 1 is even, 2 has most steps where t is small, and the
        positions get their last digits; neighbours are one step apart at least, so with all T it changes nothing.
        Where steps are few the first time is a little under T (for EDM's schedule 984 of 1000 with 20 steps, 997 with
        100): the last one whose step multiplies an error of the network by at most FIRST_STEP (1 / alpha_ts). A long
        step from T itself, where alpha_T is nearly 0, multiplies it by 30 or more, and small molecules fly apart.
        """
        steps = self.timesteps if steps is None else steps
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be between 1 and {self.timesteps}, got {steps}")
        if not 1 <= spacing < math.inf:
            raise ValueError(f"spacing is {spacing}, expected 1 (even) or more")
        first = self._first_time(steps, spacing)
        times = [0]
        for k in range(1, steps + 1):
            times.append(max(times[-1] + 1, _spaced(first, k, steps, spacing)))
        return times[::-1]

    def _first_time(self, steps: int, spacing: float) -> int:
        if steps == self.timesteps:
            return self.timesteps
        alpha = torch.sigmoid(-self.gamma).sqrt().tolist()
        times = range(self.timesteps, steps, -1)
        return next((t for t in times if alpha[_spaced(t, steps - 1, steps, spacing)] <= FIRST_STEP * alpha[t]), steps)

    def _gamma_of(self, t: int | Tensor) -> Tensor:
        return self.gamma[t] if isinstance(t, int) else self.lookup(t)


def _spaced(first: int, k: int, steps: int, spacing: float) -> int:
    # k / steps is rounded, and where the time is near a half that would move some of the even grid
    return round(first * k / steps) if spacing == 1 else round(first * (k / steps) ** spacing)


def alpha_squared(name: str, timesteps: int, precision: float) -> np.ndarray:
    """alpha_t^2 for t = 0..T, float64 (EDM: ratios of neighbours clipped to at least 0.001, then kept off 0 and 1)."""
    family, _, power = name.partition("_")
    if family == "polynomial" and power:
        t = np.arange(timesteps + 1) / timesteps
        alpha2 = (1 - t ** float(power)) ** 2
        ratio = np.clip(alpha2 / np.concatenate([[1.0], alpha2[:-1]]), 0.001, 1.0)
        return (1 - 2 * precision) * np.cumprod(ratio) + precision
    if name == "cosine":
        # Nichol and Dhariwal 2021, with s = 0.008
        t = np.linspace(0, 1, timesteps + 2)
        curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.clip(1 - curve[1:] / curve[:-1], 0, 0.999)
        return np.cumprod(1 - beta)
    raise ValueError(
        f"unknown noise schedule {name!r}: expected 'polynomial_<power>' (EDM uses polynomial_2) or 'cosine'"
    )
