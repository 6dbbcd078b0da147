"""The clipped FED-GRPO objective with a KL penalty towards the pretrained policy (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elign_lab.alignment.mdp import kl_divergence, log_ratio


class ObjectiveTerms(NamedTuple):
    """Per-pair values (B,): clipped surrogate (to be maximised), KL to the reference, log ratio, who is clipped."""

    surrogate: Tensor
    kl: Tensor
    log_ratio: Tensor
    clipped: Tensor


def clipped_surrogate(log_ratios: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A), and where the clip removes the gradient. All (B,)."""
    # beyond e^30 the exponential overflows in the branch that the minimum leaves out, and its gradient is NaN
    ratio = torch.exp(log_ratios.clamp(max=30.0))
    plain = ratio * advantage
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    return torch.minimum(plain, bounded), bounded < plain


def fed_grpo_terms(
    noise: Tensor,
    eps_new: Tensor,
    eps_old: Tensor,
    eps_ref: Tensor,
    ratio_scale: Tensor,
    advantage: Tensor,
    clip_range: float,
    dims: Tensor | None = None,
) -> ObjectiveTerms:
    """Terms of the objective for a batch of (rollout, step) pairs.

    noise, eps_* (B, N, 3 + F); ratio_scale c_t, advantage (B,). dims (B,): divide the log ratio by these degrees of
    freedom (not in the paper, which sums: then the clip range means less for larger molecules).
    """
    ratios = log_ratio(noise, eps_new, eps_old, ratio_scale)
    if dims is not None:
        ratios = ratios / dims
    surrogate, clipped = clipped_surrogate(ratios, advantage, clip_range)
    return ObjectiveTerms(surrogate, kl_divergence(eps_new, eps_ref, ratio_scale), ratios, clipped)
