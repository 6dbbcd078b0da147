"""FED-GRPO: align the denoiser with an oracle. Read mdp, rewards, advantages, objective, trainer, in this order."""

from elign_lab.alignment.advantages import group_normalize, total_advantage
from elign_lab.alignment.config import PRESETS, AlignConfig, cpu_mini, cpu_mini_fine, geom_paper, qm9_paper
from elign_lab.alignment.mdp import Rollouts, degrees_of_freedom, kl_divergence, log_density, log_ratio, rollout
from elign_lab.alignment.objective import clipped_surrogate, fed_grpo_terms
from elign_lab.alignment.rewards import (
    Rewards,
    TerminalChannel,
    duplicate_channel,
    novelty_channel,
    potential_schedule,
    potentials,
    property_channel,
    return_to_go,
    shaping_rewards,
    stability_channel,
    terminal_rewards,
    validity_channel,
)
from elign_lab.alignment.trainer import Iteration, OracleFailureError, Trainer, align

__all__ = [
    "PRESETS",
    "AlignConfig",
    "Iteration",
    "OracleFailureError",
    "Rewards",
    "Rollouts",
    "TerminalChannel",
    "Trainer",
    "align",
    "clipped_surrogate",
    "cpu_mini",
    "cpu_mini_fine",
    "degrees_of_freedom",
    "duplicate_channel",
    "fed_grpo_terms",
    "geom_paper",
    "group_normalize",
    "kl_divergence",
    "log_density",
    "log_ratio",
    "novelty_channel",
    "potential_schedule",
    "potentials",
    "property_channel",
    "qm9_paper",
    "return_to_go",
    "rollout",
    "shaping_rewards",
    "stability_channel",
    "terminal_rewards",
    "total_advantage",
    "validity_channel",
]
