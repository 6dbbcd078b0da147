"""FED-GRPO for a pseudo-force field: the loop, the rewards and the objective of elign_lab.alignment with its samplers.

What is different from a denoiser: the atoms are given, so that a group is K structures of one composition and its
energies compare isomers; and the steps are few, because a sampler here needs tens of network evaluations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from elign_lab.alignment import AlignConfig, Rollouts, TerminalChannel
from elign_lab.alignment.trainer import DRAWN, ROLLOUT, PolicyTrainer
from elign_lab.gpff.alignment_rollouts import ForceRollouts, StochasticSampler, roll_out
from elign_lab.gpff.compositions import draw_compositions
from elign_lab.gpff.generate import generate
from elign_lab.gpff.model import PseudoForceField, save_force_field
from elign_lab.gpff.quality import valid_smiles
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Oracle
from elign_lab.training import step_generator


@dataclass(frozen=True)
class ForceAlignConfig(AlignConfig):
    """FED-GRPO settings for a pseudo-force field; the fields of AlignConfig with the defaults of two CPU cores.

    sampler: 'direct' or 'ancestral'; steps: network evaluations of a structure; strength: of the noise of 'direct', in
    Angstrom; skip_prefix: updates before the branches.
    """

    sampler: str = "direct"
    strength: float = 0.3
    # few calls: there the field has most to gain, and the gradient of the rewards can be told from noise (docs/runs.md)
    steps: int = 8
    # the last three steps with noise, 0.11 to 0.04 Angstrom: few actions share the credit, and rollouts are cheap
    skip_prefix: int = 4
    groups: int = 16
    members: int = 16
    potential_stride: int = 1
    force_clip: float | None = 10.0
    clip_range: float = 0.1
    kl_weight: float = 0.01
    updates: int = 2
    learning_rate: float = 4e-5
    iterations: int = 120
    warmup: int = 6
    total_updates: int = 240
    evaluate_every: int = 10
    evaluate_n: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing != 1:
            raise ValueError(f"spacing = {self.spacing} is of a denoiser's grid: leave it at 1 for a force field")
        _ = self.stochastic_sampler  # refuses what is no policy

    @property
    def stochastic_sampler(self) -> StochasticSampler:
        """The sampler with its evaluations and noise; ValueError for one that is no policy."""
        return StochasticSampler(self.sampler, self.steps, self.strength)


def gpff_cpu_mini() -> ForceAlignConfig:
    """For gpff-mini on two cores, as gpff-mini-aligned was made; the defaults of ForceAlignConfig."""
    return ForceAlignConfig()


PRESETS: dict[str, Callable[[], ForceAlignConfig]] = {"gpff_cpu_mini": gpff_cpu_mini}


class ForceFieldTrainer(PolicyTrainer):
    """Aligns a pseudo-force field, whose policy is a stochastic sampler with given atoms; see PolicyTrainer."""

    policy: PseudoForceField
    reference: PseudoForceField
    config: ForceAlignConfig

    def roll_out(self, index: int) -> ForceRollouts:
        """The rollouts of iteration `index`: a group for each composition drawn from the model's training set."""
        c, groups = self.config, self.groups_here()
        drawn = draw_compositions(self.policy.config.compositions, c.groups, step_generator(c.seed, DRAWN, index))
        return roll_out(
            self.policy,
            drawn[groups.start : groups.stop],
            c.members,
            c.stochastic_sampler,
            skip_prefix=c.skip_prefix,
            shared_prefix=c.shared_prefix,
            seed=(c.seed, ROLLOUT, index),
            first_group=groups.start,
        )

    def evaluation_set(self) -> MoleculeBatch:
        """Structures of the policy with the seed of the configuration."""
        c = self.config
        return generate(
            self.policy,
            c.evaluate_n,
            sampler=c.sampler,
            evaluations=c.steps,
            seed=c.seed,
            **c.stochastic_sampler.options(),
        )

    def prediction(self, model: PseudoForceField, rollouts: Rollouts, step: Tensor, row: Tensor) -> Tensor:
        """eps = -F / 2 (B, N, 3) in Angstrom at the states of pairs (step, row)."""
        assert isinstance(rollouts, ForceRollouts)
        return -0.5 * model(rollouts.numbers[row], rollouts.states[step, row], rollouts.mask[row])

    def ratio_scale(self, rollouts: Rollouts) -> Tensor:
        """c (S,) of each trained step, in 1/Angstrom."""
        assert isinstance(rollouts, ForceRollouts)
        return rollouts.scale

    def save_policy(self, path: Path) -> None:
        """Write the pseudo-force field with its configuration."""
        save_force_field(self.policy, path)

    def describe(self, molecules: MoleculeBatch) -> dict[str, float]:
        """eval_valid: the fraction of valid structures (`valid_smiles`), which the rewards do not contain."""
        found = valid_smiles(molecules)
        return {"eval_valid": sum(text is not None for text in found) / len(found)}


def align_force_field(
    model: PseudoForceField,
    oracle: Oracle,
    config: ForceAlignConfig | None = None,
    *,
    out: str | Path | None = None,
    channels: Sequence[TerminalChannel] = (),
    progress: bool = True,
) -> tuple[PseudoForceField, list[dict[str, float]]]:
    """Align a copy of `model` with `oracle`; returns the aligned model and the metrics of each iteration."""
    trainer = ForceFieldTrainer(copy.deepcopy(model), oracle, config or gpff_cpu_mini(), out=out, channels=channels)
    history = trainer.run(progress=progress)
    return trainer.policy.eval(), history
