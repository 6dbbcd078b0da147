"""Stochastic sampling of a pseudo-force field as a Markov decision process: rollouts in groups.

State x_k, action x_{k+1}, policy N(x_k - b_k eps(x_k), a_k^2 P) with eps(x) = x - x0_hat(x) = -F(x) / 2 in Angstrom, on
the positions of zero centre of mass. The atoms are given, and are not actions. Both samplers have this form:

    direct        b_k = 1,                          a_k = strength (1 - k / n)
    ancestral     b_k = 1 - (sigma_s / sigma_t)^2,  a_k = sigma_s sqrt(b_k)      on a fixed grid of levels

so that the scale of the likelihood ratio (elign_lab.alignment.mdp.log_ratio) is c_k = b_k / a_k, in 1/Angstrom. The
last update has no noise; it is no step of the policy, as the decoding of a denoiser is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elign_lab.alignment import Rollouts
from elign_lab.gpff.ancestral import ancestral, ancestral_update
from elign_lab.gpff.compositions import pad_compositions
from elign_lab.gpff.direct import direct
from elign_lab.gpff.generate import SAMPLERS, SIGMA_MIN, start_positions
from elign_lab.gpff.levels import karras_levels
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask
from elign_lab.molecules import MoleculeBatch
from elign_lab.training import step_generator

STOCHASTIC = ("direct", "ancestral")


@dataclass(frozen=True, repr=False)
class ForceRollouts(Rollouts):
    """Rollouts of given atoms: states, noise and eps are (S, G K, N, 3), states and eps in Angstrom.

    times (S + 1): the updates that are left after each step; numbers (G K, N); scale (S,): c_k in 1/Angstrom.
    """

    numbers: Tensor
    scale: Tensor

    def clean(self, model: object, step: int) -> MoleculeBatch:
        """The clean estimates x0_hat(x_k) at trained step `step`; the model is not asked again."""
        return MoleculeBatch(self.numbers, self.states[step] - self.eps[step], self.mask, check=False)


@dataclass(frozen=True)
class StochasticSampler:
    """A sampler that is a policy, its network calls, and the strength of the noise of 'direct' in Angstrom.

    Raises ValueError for a deterministic sampler and for one whose noise depends on the weights.
    """

    sampler: str = "direct"
    evaluations: int = 32
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in STOCHASTIC:
            expected = " or ".join(map(repr, STOCHASTIC))
            if self.sampler not in SAMPLERS:
                raise ValueError(f"unknown sampler {self.sampler!r}: expected {expected}")
            why = (
                "its noise follows the level read off the force, and so changes with the weights"
                if self.sampler == "adaptive_ancestral"
                else "it is deterministic: it has no likelihood"
            )
            raise ValueError(f"sampler {self.sampler!r} is no policy, because {why}; use {expected}")
        if self.sampler == "direct" and not self.strength > 0:
            raise ValueError(
                f"direct denoising with strength = {self.strength} is deterministic and has no likelihood, so it is no "
                "policy: give a strength over 0 (Angstrom)"
            )
        if self.evaluations < 2:
            raise ValueError(
                f"{self.evaluations} network evaluations leave no step with noise, as the last one has none: use 2 or "
                "more"
            )

    def options(self) -> dict[str, Any]:
        """The sampler's own options, for `generate`."""
        return {"strength": self.strength} if self.sampler == "direct" else {}

    def steps_from(self, first: int, sigma_max: float) -> Callable[..., Iterator[ForceRecord]]:
        """The sampler from update `first` (0-based) to the end: a schedule's rest is a shorter schedule of its kind."""
        left = self.evaluations - first
        if self.sampler == "direct":
            return partial(
                direct, evaluations=left, sigma_min=SIGMA_MIN, strength=self.strength * left / self.evaluations
            )
        level = karras_levels(self.evaluations, sigma_max, SIGMA_MIN)[first]
        return partial(ancestral, evaluations=left, sigma=level, sigma_min=SIGMA_MIN)

    def ratio_scale(self, first: int, sigma_max: float) -> Tensor:
        """c_k (S,) in 1/Angstrom of the updates with noise, from update `first` on; float64."""
        if self.sampler == "direct":
            k = torch.arange(first + 1, self.evaluations, dtype=torch.float64)
            return 1 / (self.strength * (1 - k / self.evaluations))
        levels = torch.tensor(karras_levels(self.evaluations, sigma_max, SIGMA_MIN)[first:-1], dtype=torch.float64)
        # from x0_hat = 0 and x = 1 the mean is the share of x that is kept
        kept, amplitude = ancestral_update(torch.ones(()), torch.zeros(()), levels[:-1], levels[1:])
        return (1 - kept) / amplitude


class GroupTask(SamplingTask):
    """`members` copies of each composition; a group draws its own noise, whatever groups are sampled beside it."""

    def __init__(
        self,
        model: PseudoForceField,
        compositions: Sequence[Sequence[int]],
        members: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        numbers, mask = pad_compositions(compositions)
        super().__init__(model, numbers.repeat_interleave(members, 0), mask.repeat_interleave(members, 0))
        alone = [torch.tensor(atoms).expand(members, -1) for atoms in compositions]
        self.groups = [SamplingTask(model, z, z > 0, generator=g) for z, g in zip(alone, generators, strict=True)]

    def noise(self) -> Tensor:
        """As of SamplingTask, group by group."""
        width = self.mask.shape[1]
        parts = [group.noise() for group in self.groups]
        return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in parts])


def roll_out(
    model: PseudoForceField,
    compositions: Sequence[Sequence[int]],
    members: int,
    sampler: StochasticSampler,
    *,
    skip_prefix: int = 0,
    shared_prefix: bool = True,
    seed: int | Sequence[int] = 0,
    first_group: int = 0,
) -> ForceRollouts:
    """Roll out one group of `members` structures for each composition (atomic numbers), from Gaussian clouds.

    As `elign_lab.alignment.rollout`: the prefix of skip_prefix updates runs once a group, then the branches run
    together; `sampler.evaluations` network calls in all. Group g draws from generators made from (seed,
    first_group + g). Raises ValueError for a prefix that leaves no step with noise, and without groups or members.
    """
    last = sampler.evaluations - 2
    if not 0 <= skip_prefix <= last:
        raise ValueError(f"skip_prefix must be between 0 and {last} (evaluations - 2), got {skip_prefix}")
    if members < 1 or len(compositions) < 1:
        raise ValueError(f"a rollout needs at least one group and one member, got {len(compositions)} and {members}")
    key = [seed] if isinstance(seed, int) else list(seed)
    sigma_max = model.config.sigma_max

    def task(copies: int, stream: int) -> GroupTask:
        numbers = range(first_group, first_group + len(compositions))
        generators = [step_generator(*key, stream, g, device=model.device) for g in numbers]
        return GroupTask(model, compositions, copies, generators)

    prefix = task(1 if shared_prefix else members, 0)
    x = start_positions(prefix, sigma_max)
    for record in itertools.islice(sampler.steps_from(0, sigma_max)(prefix, x), skip_prefix):
        x = record.z_s
    if shared_prefix:
        x = x.repeat_interleave(members, 0)
    branches = task(members, 1)
    records = list(sampler.steps_from(skip_prefix, sigma_max)(branches, x))
    trained = records[:-1]
    return ForceRollouts(
        groups=len(compositions),
        members=members,
        times=tuple(record.t for record in records),
        mask=branches.mask,
        states=torch.stack([r.z_t for r in trained]),
        noise=torch.stack([r.noise / r.amplitude.view(-1, 1, 1) for r in trained]),
        eps=torch.stack([r.z_t - r.clean for r in trained]),
        molecules=records[-1].molecules(),
        network_calls=prefix.evaluations + branches.evaluations,
        numbers=branches.numbers,
        scale=sampler.ratio_scale(skip_prefix, sigma_max).to(x),
    )
