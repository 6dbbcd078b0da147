"""Group-relative advantages in separate channels (paper section 3.3, Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_normalize(values: Tensor, ok: Tensor, floor: float, delta: float = 1e-8) -> Tensor:
    """(value - mean) / (max(std, floor) + delta) over the ok members of each group with a finite value; 0 for others.

    values (G, K, ...), ok (G, K) bool -> same shape as values. Mean and population standard deviation are taken over K,
    separately for every trailing index (a time step). The floor is in the units of the values: a group whose rewards
    are equal up to noise below it teaches (almost) nothing instead of being blown up to unit variance. A group with
    fewer than two such members gets 0.
    """
    shape = (*ok.shape, *([1] * (values.dim() - 2)))
    keep = ok.view(shape) & values.isfinite()
    count = keep.sum(1, keepdim=True).clamp(min=1)
    filled = torch.where(keep, values, 0.0)
    mean = filled.sum(1, keepdim=True) / count
    centered = torch.where(keep, values - mean, 0.0)
    std = (centered.square().sum(1, keepdim=True) / count).sqrt()
    advantage = centered / (std.clamp(min=floor) + delta)
    return torch.where(keep.sum(1, keepdim=True) > 1, advantage, 0.0)


def total_advantage(
    return_to_go: Tensor,
    force: Tensor,
    ok: Tensor,
    *,
    energy_weight: float,
    force_weight: float,
    clip: float | None,
    energy_floor: float,
    force_floor: float,
    channels: dict[str, tuple[float, Tensor]] | None = None,
    disentangle: bool = True,
) -> Tensor:
    """A_{i,t} = w_E A^E_{i,t} + w_F A^F_i (+ w_c A^c_i), clipped to +-clip; (G, K, S) (paper Eq. 7).

    return_to_go (G, K, S): energy, normalised per step. force (G, K) and channels name -> (weight, (G, K)): normalised
    per rollout and broadcast over the steps. A value that is not finite teaches nothing. disentangle=False adds the raw
    rewards first and normalises their sum per step (the ablation of table 10).
    """
    if not disentangle:
        raw = energy_weight * return_to_go + force_weight * force.unsqueeze(-1)
        for weight, reward in (channels or {}).values():
            raw = raw + weight * reward.unsqueeze(-1)
        total = group_normalize(raw, ok, min(energy_floor, force_floor))
    else:
        total = energy_weight * group_normalize(return_to_go, ok, energy_floor)
        total = total + force_weight * group_normalize(force, ok, force_floor).unsqueeze(-1)
        for weight, reward in (channels or {}).values():
            total = total + weight * group_normalize(reward, ok, force_floor).unsqueeze(-1)
    return total if clip is None else total.clamp(-clip, clip)
