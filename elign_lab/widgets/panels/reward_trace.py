"""One FED-GRPO group taken apart: every number between a clean estimate and the objective, with its formula.

`trace_group` runs one iteration of the Trainer on one group and keeps what it computed on the way; `explain` writes the
numbers of one (rollout, step) pair as formula, numbers put in, and result. Nothing here needs a browser.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elign_lab.alignment.advantages import group_normalize
from elign_lab.alignment.config import AlignConfig
from elign_lab.alignment.mdp import Rollouts, degrees_of_freedom
from elign_lab.alignment.objective import ObjectiveTerms, fed_grpo_terms
from elign_lab.alignment.rewards import potentials, shaping_rewards
from elign_lab.alignment.trainer import Trainer
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Oracle, f_rms
from elign_lab.widgets.panels.base import number


@dataclass(frozen=True)
class RewardTrace:
    """One group of K rollouts over S trained steps, and one update of the policy on it.

    clean: the clean estimate of every step, S batches of K. energy_per_atom (K, S) E_f in eV, total_energy and
    atom_energy (K, S) in eV, forces: S tensors (K, N, 3) in eV/Angstrom, status: S tuples of K, all of the clean
    estimates. potential, shaping, return_to_go (K, S) in eV/atom; evaluated: the steps at which the potential was
    computed. energy_reward, force_reward, ok (K,) of the results. energy_advantage, advantage (K, S),
    force_advantage (K,). objective: terms (K, S) after the update; noise_delta = xi.delta and delta_squared (K, S) are
    the two parts of the log ratio.
    """

    config: AlignConfig
    rollouts: Rollouts
    clean: tuple[MoleculeBatch, ...]
    total_energy: Tensor
    atom_energy: Tensor
    energy_per_atom: Tensor
    forces: tuple[Tensor, ...]
    status: tuple[tuple[str, ...], ...]
    evaluated: tuple[int, ...]
    potential: Tensor
    shaping: Tensor
    return_to_go: Tensor
    energy_reward: Tensor
    force_reward: Tensor
    ok: Tensor
    energy_advantage: Tensor
    force_advantage: Tensor
    advantage: Tensor
    objective: ObjectiveTerms
    noise_delta: Tensor
    delta_squared: Tensor

    @property
    def members(self) -> int:
        """K, the number of rollouts."""
        return self.rollouts.members

    @property
    def steps(self) -> int:
        """S, the number of trained steps."""
        return self.rollouts.steps

    def judged_step(self, member: int, step: int) -> int:
        """The step whose potential stands at `step`: the last computed one that the oracle could judge, or the next."""
        judged = [k for k in self.evaluated if bool(self.energy_per_atom[member, k].isfinite())]
        before = [k for k in judged if k <= step]
        return before[-1] if before else (judged[0] if judged else step)


def trace_group(
    model: Denoiser, oracle: Oracle, config: AlignConfig, *, size: int | None = None, seed: int | None = None
) -> RewardTrace:
    """Roll out one group, judge it, update a copy of the policy on it, and keep every number.

    size: atoms of the molecules (default: drawn from the model's histogram); seed: instead of the configuration's. The
    model itself is not changed. Raises ValueError for a size that the model cannot have, and for a configuration that
    does not follow Eq. 4 and Eq. 7 (energy_signal other than "pbrs", or disentangle=False).
    """
    if config.energy_signal != "pbrs" or not config.disentangle or config.energy_weight == 0:
        raise ValueError(
            "the inspector explains Eq. 4 and Eq. 7: use a configuration with energy_signal='pbrs', disentangle=True "
            f"and an energy_weight, got {config.energy_signal!r}, {config.disentangle} and {config.energy_weight}"
        )
    limit = model.config.max_atoms
    if size is not None and not 2 <= size <= (limit or size):
        raise ValueError(f"size is {size}, expected 2 to {limit or 'any number of'} atoms, the limit of the model")
    policy = copy.deepcopy(model)
    if size is not None:
        policy.with_size_histogram({size: 1})
    config = replace(config, groups=1, evaluate_every=10**9, seed=config.seed if seed is None else seed)
    trainer = Trainer(policy, oracle, config)
    done = trainer.step()
    rollouts, rewards = done.rollouts, done.rewards
    # with the same stored noise predictions and the same oracle: the potential that the rewards were made of
    potential = potentials(rollouts, trainer.policy, oracle, rewards.evaluated, config.energy_clip)
    potential = torch.where(potential.isfinite(), potential, rewards.energy.unsqueeze(1))
    objective, noise_delta, delta_squared = _objective(trainer, rollouts, done.advantages[0])
    to_go, ok = rewards.return_to_go, rewards.ok
    return RewardTrace(
        config=config,
        rollouts=rollouts,
        **_judge_clean(trainer.policy, oracle, rollouts),
        evaluated=rewards.evaluated,
        potential=potential,
        shaping=shaping_rewards(potential, rewards.energy, config.gamma),
        return_to_go=to_go,
        energy_reward=rewards.energy,
        force_reward=rewards.force,
        ok=ok,
        energy_advantage=group_normalize(to_go.unsqueeze(0), ok.unsqueeze(0), config.energy_floor)[0],
        force_advantage=group_normalize(rewards.force.unsqueeze(0), ok.unsqueeze(0), config.force_floor)[0],
        advantage=done.advantages[0],
        objective=objective,
        noise_delta=noise_delta,
        delta_squared=delta_squared,
    )


def _judge_clean(model: Denoiser, oracle: Oracle, rollouts: Rollouts) -> dict[str, Any]:
    """Energy and forces of the clean estimate at every step, also of those that the trainer does not pay for."""
    clean = [rollouts.clean(model, k) for k in range(rollouts.steps)]
    frames = MoleculeBatch.cat(clean)
    result = oracle(frames)
    per_atom = oracle.formation_energy_per_atom(result.energy, frames.numbers, frames.mask)
    shape = (rollouts.steps, rollouts.members)
    k = rollouts.members
    return {
        "clean": tuple(clean),
        "total_energy": result.energy.view(shape).t(),
        "atom_energy": (result.energy - per_atom * frames.sizes).view(shape).t(),
        "energy_per_atom": per_atom.view(shape).t(),
        "forces": result.forces.split(k),
        "status": tuple(result.status[i : i + k] for i in range(0, len(result.status), k)),
    }


@torch.no_grad()
def _objective(trainer: Trainer, rollouts: Rollouts, advantage: Tensor) -> tuple[ObjectiveTerms, Tensor, Tensor]:
    """Terms of the objective of the updated policy for all pairs, (K, S), and the two parts of the log ratio."""
    c, policy = trainer.config, trainer.policy
    s, k = rollouts.steps, rollouts.members
    z, noise, eps_old = (x.flatten(0, 1) for x in (rollouts.states, rollouts.noise, rollouts.eps))
    mask = rollouts.mask.repeat(s, 1)
    times = torch.tensor(rollouts.times, device=z.device)
    t, following = times[:-1].repeat_interleave(k), times[1:].repeat_interleave(k)
    scale = policy.schedule.transition(t, following).ratio_scale.to(z.dtype)
    eps_new, eps_ref = policy.eps(z, t, mask), trainer.reference.eps(z, t, mask)
    dims = degrees_of_freedom(mask, policy.config.channels) if c.ratio_per_dof else None
    terms = fed_grpo_terms(noise, eps_new, eps_old, eps_ref, scale, advantage.t().flatten(), c.clip_range, dims)
    delta = scale.view(-1, 1, 1) * (eps_new - eps_old)
    parts = (noise * delta).sum((-2, -1)), delta.square().sum((-2, -1))
    by_member = [x.view(s, k).t() for x in (*terms, *parts)]
    return ObjectiveTerms(*by_member[:4]), by_member[4], by_member[5]


# ---------------------------------------------------------------------- in words and numbers
UNJUDGED = "the oracle could not judge it"


@dataclass(frozen=True)
class Line:
    """One quantity: `numbers` is the formula with the numbers put in, written so that it can be computed by hand."""

    section: str
    name: str
    formula: str
    numbers: str
    value: float
    unit: str = ""
    source: str = ""


def explain(trace: RewardTrace, member: int, step: int) -> list[Line]:
    """Every number of one (rollout, step) pair, from the clean estimate to the objective.

    formula is HTML, in the symbols of the paper; a rollout that the oracle could not judge has NaN values. Raises
    ValueError for a member or a step outside the group.
    """
    if not (0 <= member < trace.members and 0 <= step < trace.steps):
        raise ValueError(f"member {member}, step {step}: expected 0 to {trace.members - 1} and 0 to {trace.steps - 1}")
    lines = [
        *_clean_lines(trace, member, step),
        *_reward_lines(trace, member, step),
        *_advantage_lines(trace, member, step),
        *_objective_lines(trace, member, step),
    ]
    return [replace(line, numbers=UNJUDGED) if math.isnan(line.value) else line for line in lines]


def _term(value: float, digits: int = 4) -> str:
    """A number as it stands after an operator: in brackets when it is negative."""
    return number(value, digits) if value >= 0 else f"({number(value, digits)})"


def _clean_lines(trace: RewardTrace, i: int, k: int) -> list[Line]:
    section = "clean estimate, the molecule that the model expects"
    n = int(trace.clean[k].sizes[i])
    squares = trace.forces[k][i].square().sum()
    total, atoms = number(float(trace.total_energy[i, k]), 7), _term(float(trace.atom_energy[i, k]), 7)
    return [
        Line(
            section,
            "formation energy per atom",
            "<i>E</i><sub>f</sub> = (<i>E</i> − Σ<sub>i</sub> <i>E</i><sub>atom</sub>) / <i>N</i>",
            f"({total} − {atoms}) / {n}",
            float(trace.energy_per_atom[i, k]),
            "eV/atom",
        ),
        Line(
            section,
            "force RMS",
            "<i>f</i><sub>RMS</sub> = √(Σ<sub>i</sub> |<i>f</i><sub>i</sub>|² / <i>N</i>)",
            f"√({number(float(squares))} / {n})",
            float(f_rms(trace.forces[k], trace.clean[k].mask)[i]),
            "eV/Å",
            "section 3.1",
        ),
    ]


def _reward_lines(trace: RewardTrace, i: int, k: int) -> list[Line]:
    section = "reward, shaped by the potential"
    c, left = trace.config, trace.steps - k
    here = float(trace.potential[i, k])
    last = k == trace.steps - 1
    following = float(trace.energy_reward[i] if last else trace.potential[i, k + 1])
    gamma, end = number(c.gamma), _term(float(trace.energy_reward[i]), 6)
    judged = trace.judged_step(i, k)
    energy = float(trace.energy_per_atom[i, judged])
    bound = c.energy_clip
    inside = _term(energy)
    if bound is not None and abs(energy) > bound:
        inside = f"clip({number(energy)}, {number(-bound)}, {number(bound)})"
    name = "potential" if judged == k else f"potential, taken from step {judged}"
    if math.isnan(energy):
        name, inside = "potential; no estimate could be judged, r_E stands in", _term(-here)
    return [
        Line(
            section,
            name,
            "Φ(<i>s</i><sub>t</sub>) = −<i>E</i><sub>f</sub>(x̂<sub>0</sub>(<i>z</i><sub>t</sub>))",
            f"−{inside}",
            here,
            "eV/atom",
            "section 3.1",
        ),
        Line(
            section,
            "shaping reward",
            "r̃<sub>t</sub> = <i>γ</i> Φ(<i>s</i><sub>t−1</sub>) − Φ(<i>s</i><sub>t</sub>)",
            f"{gamma} × {_term(following, 6)} − {_term(here, 6)}",
            float(trace.shaping[i, k]),
            "eV/atom",
            "Eq. 3",
        ),
        Line(
            section,
            "return-to-go",
            "<i>G</i><sub>t</sub> = <i>γ</i><sup>t</sup> Φ(<i>s</i><sub>0</sub>) − Φ(<i>s</i><sub>t</sub>)",
            f"{gamma}^{left} × {end} − {_term(here, 6)}",
            float(trace.return_to_go[i, k]),
            "eV/atom",
            "Eq. 4",
        ),
    ]


def _advantage_lines(trace: RewardTrace, i: int, k: int) -> list[Line]:
    section = f"advantage, among the {trace.members} rollouts of the group"
    c = trace.config
    energy, force = float(trace.energy_advantage[i, k]), float(trace.force_advantage[i])
    total = f"{number(c.energy_weight)} × {_term(energy)} + {number(c.force_weight)} × {_term(force)}"
    if c.adv_clip is not None:
        total = f"clip({total}, {number(-c.adv_clip)}, {number(c.adv_clip)})"
    mean = "mean<sub>j</sub>"
    return [
        Line(
            section,
            "energy advantage, at this step",
            f"<i>A</i><sup>E</sup> = (<i>G</i><sub>i,t</sub> − {mean} <i>G</i>) / max(std<sub>j</sub> <i>G</i>, floor)",
            _standardised(trace.return_to_go[:, k], trace.ok, i, c.energy_floor),
            energy,
            source="section 3.3",
        ),
        Line(
            section,
            "force advantage, of the whole rollout",
            f"<i>A</i><sup>F</sup> = (<i>r</i><sub>F,i</sub> − {mean} <i>r</i><sub>F</sub>) / "
            "max(std<sub>j</sub> <i>r</i><sub>F</sub>, floor)",
            _standardised(trace.force_reward, trace.ok, i, c.force_floor),
            force,
            source="section 3.3",
        ),
        Line(
            section,
            "total advantage",
            "<i>A</i> = <i>w</i><sub>E</sub> <i>A</i><sup>E</sup> + <i>w</i><sub>F</sub> <i>A</i><sup>F</sup>",
            total,
            float(trace.advantage[i, k]),
            source="Eq. 7",
        ),
    ]


def _standardised(values: Tensor, ok: Tensor, i: int, floor: float) -> str:
    if not bool(ok[i]) or int(ok.sum()) < 2:
        return "0"  # a rollout that could not be judged teaches nothing
    kept = values[ok]
    mean, std = float(kept.mean()), float(kept.std(correction=0))
    return f"({number(float(values[i]), 6)} − {_term(mean, 6)}) / max({number(std)}, {number(floor)})"


def _objective_lines(trace: RewardTrace, i: int, k: int) -> list[Line]:
    section = "objective, after the update"
    terms, c = trace.objective, trace.config
    log_ratio, advantage = float(terms.log_ratio[i, k]), float(trace.advantage[i, k])
    ratio = float(terms.log_ratio[i, k].exp())
    low, high = number(1 - c.clip_range), number(1 + c.clip_range)
    dot, squared = _term(float(trace.noise_delta[i, k]), 5), number(float(trace.delta_squared[i, k]), 5)
    numbers = f"−{dot} − {squared} / 2"
    if c.ratio_per_dof:
        channels = trace.rollouts.states.shape[-1] - 3
        numbers = f"({numbers}) / {int(degrees_of_freedom(trace.rollouts.mask[i : i + 1], channels))}"
    a = _term(advantage, 5)
    return [
        Line(
            section,
            "log-ratio, from the stored noise",
            "log <i>ρ</i> = −<i>ξ</i>·<i>δ</i> − |<i>δ</i>|² / 2" + (", per degree of freedom" * c.ratio_per_dof),
            numbers,
            log_ratio,
            source="section 3.3",
        ),
        Line(section, "ratio", "<i>ρ</i> = exp(log <i>ρ</i>)", f"exp({number(log_ratio, 5)})", ratio),
        Line(
            section,
            "clipped term",
            "min(<i>ρA</i>, clip(<i>ρ</i>, 1 − <i>ε</i>, 1 + <i>ε</i>) <i>A</i>)",
            f"min({number(ratio, 5)} × {a}, clip({number(ratio, 5)}, {low}, {high}) × {a})",
            float(terms.surrogate[i, k]),
            source="section 3.3",
        ),
        Line(
            section,
            "KL to the base model",
            "KL = |<i>δ</i><sub>ref</sub>|² / 2",
            f"{squared} / 2",
            float(terms.kl[i, k]),
            "nat",
            "section 3.3",
        ),
    ]
