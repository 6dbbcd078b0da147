"""Reverse diffusion as a Markov decision process (paper section 3): rollouts, log-densities, likelihood ratios.

State (z_t, t), action z_s, policy N(mean_theta(z_t), sigma^2 P). A group is K rollouts that share the prefix
z_T .. z_{T_p} of one molecule size and then branch with fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling import StepRecord, ancestral, decode_record, mask_of_sizes
from elign_lab.shapes import Shapes
from elign_lab.training import step_generator


@dataclass(frozen=True, repr=False)
class Rollouts(Shapes):
    """G groups of K rollouts, group-major: rollout i belongs to group i // K.

    times (S + 1): the trained part of the grid, from T_p down to 0. states, noise and eps (S, G K, N, 3 + F): z_t, the
    stored xi and the policy's noise prediction of each trained step. molecules: the G K results.
    """

    groups: int
    members: int
    times: tuple[int, ...]
    mask: Tensor
    states: Tensor
    noise: Tensor
    eps: Tensor
    molecules: MoleculeBatch
    network_calls: int

    @property
    def steps(self) -> int:
        """S, the number of trained transitions of each rollout."""
        return len(self.times) - 1

    @cached_property
    def finite(self) -> Tensor:
        """Rollouts in which every state and prediction is finite, (G K,) bool on the CPU."""
        return (self.states.isfinite() & self.eps.isfinite()).flatten(2).all(-1).all(0).cpu()

    def clean(self, model: Denoiser, step: int) -> MoleculeBatch:
        """The clean estimates x0_hat(z_t) at trained step `step` as molecules, with the estimate's own types."""
        state = model.clean(self.states[step], self.times[step], self.eps[step])
        return model.decode(state, state[..., :3], self.mask)


def rollout(
    model: Denoiser,
    sizes: Sequence[int],
    members: int,
    *,
    steps: int | None = None,
    spacing: float = 1.0,
    skip_prefix: int = 0,
    shared_prefix: bool = True,
    seed: int | Sequence[int] = 0,
    first_group: int = 0,
) -> Rollouts:
    """Roll out one group of `members` molecules for each size.

    steps, spacing: of the grid, see `NoiseSchedule.grid`. skip_prefix: number of reverse steps of the prefix, which
    runs once a group (batch G); the branches then run together (batch G K): steps + 1 network calls in all. Without
    shared_prefix every member runs its own prefix. Group g draws from generators made from (seed, first_group + g):
    the same group in another process is the same.
    """
    grid = model.schedule.grid(steps, spacing)
    if not 0 <= skip_prefix < len(grid) - 1:
        raise ValueError(f"skip_prefix must be between 0 and {len(grid) - 2} (steps - 1), got {skip_prefix}")
    if members < 1 or len(sizes) < 1:
        raise ValueError(f"a rollout needs at least one group and one member, got {len(sizes)} and {members}")
    key = [seed] if isinstance(seed, int) else list(seed)
    prefix_members = 1 if shared_prefix else members
    prefix_mask = mask_of_sizes(torch.as_tensor(sizes).repeat_interleave(prefix_members)).to(model.device)
    z = _last_state(
        model, prefix_mask, grid[: skip_prefix + 1], _noise(model, sizes, prefix_members, [*key, 0], first_group)
    )
    if shared_prefix:
        z = z.repeat_interleave(members, 0)
    mask = mask_of_sizes(torch.as_tensor(sizes).repeat_interleave(members)).to(model.device)
    suffix = grid[skip_prefix:]
    draws = _noise(model, sizes, members, [*key, 1], first_group)
    records = list(ancestral(model, mask, grid=suffix, z=z, noise=draws))
    trained = records[:-1]
    return Rollouts(
        groups=len(sizes),
        members=members,
        times=tuple(suffix),
        mask=mask,
        states=torch.stack([r.z_t for r in trained]),
        noise=torch.stack([r.noise for r in trained]),
        eps=torch.stack([r.eps for r in trained]),
        molecules=decode_record(model, records[-1]),
        network_calls=skip_prefix + records[-1].evaluations,
    )


def _last_state(model: Denoiser, mask: Tensor, grid: Sequence[int], noise: Iterator[Tensor]) -> Tensor:
    if len(grid) == 1:
        return next(noise)
    last: StepRecord | None = None
    for last in ancestral(model, mask, grid=grid, noise=noise, decode=False):  # noqa: B007 (used below)
        pass
    assert last is not None  # the grid has a step
    return last.z_s


def _noise(
    model: Denoiser, sizes: Sequence[int], members: int, key: Sequence[int], first_group: int
) -> Iterator[Tensor]:
    """Endless noise states (G members, N, 3 + F), each group from its own generator."""
    generators = [step_generator(*key, first_group + g, device=model.device) for g in range(len(sizes))]
    n = max(int(size) for size in sizes)
    full = mask_of_sizes(torch.as_tensor(sizes)).to(model.device)
    while True:
        parts = []
        for g, generator in enumerate(generators):
            size = int(sizes[g])
            own = model.noise(full[g : g + 1, :size].expand(members, size), generator)
            parts.append(torch.nn.functional.pad(own, (0, 0, 0, n - size)))
        yield torch.cat(parts)


# ---------------------------------------------------------------------- densities
def degrees_of_freedom(mask: Tensor, channels: int) -> Tensor:
    """D = 3 (N - 1) + N F: dimension of the state space of each molecule, (B,) (SPEC section 2)."""
    atoms = mask.sum(-1)
    return 3 * (atoms - 1) + atoms * channels


def log_density(z_s: Tensor, mean: Tensor, sigma: float | Tensor, mask: Tensor) -> Tensor:
    """log pi(z_s | z_t) of the reverse kernel in the zero-centre-of-mass subspace (SPEC section 2).

    z_s, mean (B, N, 3 + F) with zero centre of mass and zero padding; sigma a number or (B,) -> (B,).
    """
    dims = degrees_of_freedom(mask, z_s.shape[-1] - 3).to(z_s.dtype)
    sigma = torch.as_tensor(sigma, dtype=z_s.dtype, device=z_s.device)
    squared = (z_s - mean).square().sum((-2, -1)) / sigma.square()
    return -0.5 * squared - dims * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))


def log_ratio(noise: Tensor, eps_new: Tensor, eps_old: Tensor, ratio_scale: Tensor) -> Tensor:
    """log pi_new(z_s | z_t) - log pi_old(z_s | z_t) from the stored noise xi: -xi.delta - |delta|^2 / 2.

    noise, eps_new, eps_old (B, N, 3 + F), ratio_scale c_t (B,); delta = c_t (eps_new - eps_old) -> (B,). It equals the
    difference of two log_density calls, and keeps the digits that their difference loses in float32.
    """
    delta = ratio_scale.view(-1, 1, 1) * (eps_new - eps_old)
    return -(noise * delta).sum((-2, -1)) - 0.5 * delta.square().sum((-2, -1))


def kl_divergence(eps_new: Tensor, eps_ref: Tensor, ratio_scale: Tensor) -> Tensor:
    """KL(pi_new(.|z_t) || pi_ref(.|z_t)) = c_t^2 |eps_new - eps_ref|^2 / 2 per state, (B,) (SPEC section 4)."""
    return 0.5 * ratio_scale.square() * (eps_new - eps_ref).square().sum((-2, -1))
