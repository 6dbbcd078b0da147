"""Potential-based reward shaping: what it leaves unchanged, and what it does to the variance of the policy gradient.

Ng, Harada and Russell 1999: for a fixed potential, r + gamma Phi(s') - Phi(s) has the optimal policies of r. Paper
section 3.1: the shaped return-to-go telescopes to gamma^t Phi(s_0) - Phi(s_t). With gamma = 1 the shaped energy channel
is the terminal reward Phi(s_0) with the baseline Phi(s_t), which depends on the state alone: the expected policy
gradient is the same, its variance is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elign_lab.alignment import Rollouts, log_ratio, potentials, return_to_go, rollout, shaping_rewards
from elign_lab.alignment.advantages import group_normalize
from elign_lab.alignment.rewards import potential_schedule, terminal_rewards
from elign_lab.denoiser import Denoiser
from elign_lab.oracles import Oracle
from elign_lab.sampling import ancestral, decode_record
from elign_lab.theory.check import Check, mean_check
from elign_lab.theory.points import FLOOR, WELLS, PointDenoiser, PointOracle, well_energy
from elign_lab.theory.springs import PairSprings
from elign_lab.theory.symmetry import small_denoiser
from elign_lab.training import step_generator

FloatArray = NDArray[np.floating]


# ---------------------------------------------------------------------- tabular
@dataclass(frozen=True)
class TabularMDP:
    """A discounted MDP: transitions (S, A, S) that sum to 1 over the last axis, rewards (S, A, S), discount gamma."""

    transitions: FloatArray
    rewards: FloatArray
    gamma: float

    @classmethod
    def random(cls, states: int = 8, actions: int = 3, gamma: float = 0.9, seed: int = 0) -> TabularMDP:
        """A random MDP; each action leads to about three states."""
        rng = np.random.default_rng(seed)
        transitions = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
        return cls(transitions, rng.normal(size=transitions.shape), gamma)

    def shaped(self, potential: FloatArray, gamma: float | None = None) -> TabularMDP:
        """The same MDP with rewards r + gamma Phi(s') - Phi(s); `gamma` other than the discount is a mistake."""
        factor = self.gamma if gamma is None else gamma
        bonus = factor * potential[None, None, :] - potential[:, None, None]
        return TabularMDP(self.transitions, self.rewards + bonus, self.gamma)

    def optimal_values(self, tolerance: float = 1e-12) -> FloatArray:
        """Q*(s, a) by value iteration, (S, A)."""
        q = np.zeros(self.transitions.shape[:2])
        while True:
            target = self.rewards + self.gamma * q.max(1)
            new = (self.transitions * target).sum(-1)
            if np.abs(new - q).max() < tolerance:
                return new
            q = new

    def optimal_policy(self) -> NDArray[np.integer]:
        """Greedy action in each state, (S,)."""
        return self.optimal_values().argmax(1)

    def policy_values(self, policy: NDArray[np.integer]) -> FloatArray:
        """V of a deterministic policy, (S,): the solution of its linear equations."""
        rows = np.arange(len(policy))
        step = self.transitions[rows, policy]
        reward = (step * self.rewards[rows, policy]).sum(1)
        return np.linalg.solve(np.eye(len(policy)) - self.gamma * step, reward)


def regret(mdp: TabularMDP, policy: NDArray[np.integer]) -> float:
    """Mean over the states of V*(s) - V^policy(s) in the original MDP; 0 for an optimal policy."""
    return float((mdp.optimal_values().max(1) - mdp.policy_values(policy)).mean())


def best_by_shaped_return(mdp: TabularMDP, plug_in: bool, weight: float = 1.0, seed: int = 0) -> NDArray[np.integer]:
    """Of all deterministic policies, the one with the largest mean shaped return V(s) - Phi(s) over the start states.

    A fixed Phi shifts every policy by the same amount. plug_in: Phi is made anew from each policy, here `weight` times
    the policy's own value plus a fixed error, as the energy of its own clean estimate is in the paper. The return then
    pays a policy for expecting little of itself, and with weight > 1 the ranking is reversed. One gradient step holds
    Phi fixed and is not affected; a comparison of policies by their shaped returns is.
    """
    s, a = mdp.transitions.shape[:2]
    if a**s > 20_000:
        raise ValueError(f"{a}^{s} policies are too many to enumerate: use a smaller MDP")
    fixed = np.random.default_rng(seed).normal(size=s)
    best, best_return = np.zeros(s, dtype=int), -np.inf
    for code in range(a**s):
        policy = np.array([code // a**k % a for k in range(s)])
        value = mdp.policy_values(policy)
        potential = weight * (value + fixed) if plug_in else fixed
        if (shaped := float((value - potential).mean())) > best_return:
            best, best_return = policy, shaped
    return best


# ---------------------------------------------------------------------- rollouts
def per_step_normalized(rewards: Tensor) -> Tensor:
    """Shaped rewards (B, S) standardised over the rollouts at each step: what must not be done before summing."""
    return (rewards - rewards.mean(0)) / rewards.std(0)


def telescoping_gap(
    model: Denoiser, oracle: Oracle, rollouts: Rollouts, gamma: float, normalize: bool = False
) -> float:
    """Largest |sum_k gamma^(t-k) r~_k - G_t| over rollouts and steps t, relative to the largest |G_t|.

    G_t = gamma^t Phi(s_0) - Phi(s_t), with t the number of steps left.
    """
    potential, terminal = rollout_potentials(model, oracle, rollouts)
    rewards = shaping_rewards(potential, terminal, gamma)
    if normalize:
        rewards = per_step_normalized(rewards)
    total, summed = torch.zeros_like(terminal), []
    for step in reversed(range(rollouts.steps)):
        total = rewards[:, step] + gamma * total
        summed.append(total)
    telescoped = return_to_go(potential, terminal, gamma)
    return float((torch.stack(summed[::-1], 1) - telescoped).abs().max() / telescoped.abs().max())


def rollout_potentials(model: Denoiser, oracle: Oracle, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Phi(s_t) at every trained step (B, S) and Phi(s_0) (B,) of the rollouts the oracle could judge throughout."""
    potential = potentials(rollouts, model, oracle, range(rollouts.steps))
    terminal, _, ok = terminal_rewards(rollouts.molecules, oracle)
    ok = ok & potential.isfinite().all(1)
    if not bool(ok.any()):
        raise ValueError(f"the {oracle.name} oracle could judge none of the {len(ok)} rollouts at every step")
    return potential[ok], terminal[ok]


# ---------------------------------------------------------------------- gradients
@dataclass(frozen=True)
class GradientSamples:
    """Policy-gradient estimates (n, P), one row a rollout or a group, for three kinds of return-to-go.

    terminal: Phi(s_0). shaped: Phi(s_0) - Phi(s_t). next_state: Phi(s_0) - Phi(s_{t-1}), a baseline that sees the
    action. All have the mean of their group subtracted, none is divided by a spread: they estimate the gradient of
    E[Phi(s_0)], the last one with a bias. oracle_calls: per rollout, (terminal only, shaped).
    """

    terminal: FloatArray
    shaped: FloatArray
    next_state: FloatArray
    oracle_calls: tuple[int, int]

    def variance_ratio(self) -> tuple[float, float]:
        """Total variance of the shaped estimate over that of the terminal one, and its jackknife standard error."""
        n = len(self.terminal)
        ratios = []
        for left_out in (None, *range(n)):
            rows = np.arange(n) != left_out if left_out is not None else slice(None)
            ratios.append(float(self.shaped[rows].var(0).sum() / self.terminal[rows].var(0).sum()))
        spread = np.square(np.array(ratios[1:]) - np.mean(ratios[1:])).sum()
        return ratios[0], float(np.sqrt((n - 1) / n * spread))

    def variance_ratio_per_call(self) -> float:
        """The same for estimates that spend one oracle call each."""
        return self.variance_ratio()[0] * self.oracle_calls[1] / self.oracle_calls[0]


def centred_signals(
    potential: Tensor, terminal: Tensor, ok: Tensor, members: int, gamma: float = 1.0
) -> dict[str, Tensor]:
    """The three returns-to-go of GradientSamples less their group's mean at each step, (B, S) each.

    FED-GRPO's group baseline without its division by the spread: that makes a scale of its own for each signal, and
    variances would not compare. potential (B, S), terminal (B,), ok (B,); 0 for rollouts that are not ok.
    """
    following = torch.cat([potential[:, 1:], terminal.unsqueeze(1)], 1)
    signals = {
        "terminal": terminal.unsqueeze(1).expand_as(potential),
        "shaped": return_to_go(potential, terminal, gamma),
        "next_state": terminal.unsqueeze(1) - following,
    }
    grouped = ok.view(-1, members)
    return {
        name: FLOOR * group_normalize(value.reshape(*grouped.shape, -1), grouped, FLOOR).view_as(value)
        for name, value in signals.items()
    }


@cache
def gradient_samples(
    n: int = 2000, seed: int = 0, stride: int = 1, skip_prefix: int = 0, gamma: float = 1.0
) -> GradientSamples:
    """Per-rollout gradients sum_t A_t grad log pi(z_s | z_t) for the point diffusion of WELLS and its energy.

    The parameters are P = 2 shifts of the mean of every kernel, to the right for z < 0 and for z > 0. The n rollouts
    are one group.
    """
    model, oracle = PointDenoiser(WELLS), PointOracle(well_energy, 1)
    rollouts = rollout(model, [1], n, skip_prefix=skip_prefix, shared_prefix=False, seed=seed)
    schedule = range(0, rollouts.steps, stride)
    potential = potentials(rollouts, model, oracle, schedule)
    terminal, _, ok = terminal_rewards(rollouts.molecules, oracle)
    score = _shift_scores(model, rollouts)
    grads = {
        name: torch.einsum("bs,bsp->bp", a, score).numpy()
        for name, a in centred_signals(potential, terminal, ok, n, gamma).items()
    }
    return GradientSamples(**grads, oracle_calls=(1, 1 + len(schedule)))


def model_gradient_samples(
    model: Denoiser,
    oracle: Oracle,
    sizes: Sequence[int],
    members: int = 4,
    *,
    steps: int | None = None,
    skip_prefix: int = 0,
    stride: int = 1,
    seed: int = 0,
) -> GradientSamples:
    """The gradient of a molecular model in all its P parameters, one estimate for each group (one group per size).

    A row is the mean over the group's rollouts of sum_t A_t grad log pi, as in an iteration of FED-GRPO with one
    group, without the division by the spread. potential_schedule(steps, stride) says where the oracle is asked.
    """
    rollouts = rollout(model, sizes, members, steps=steps, skip_prefix=skip_prefix, seed=seed)
    schedule = potential_schedule(rollouts.steps, stride)
    potential = potentials(rollouts, model, oracle, schedule)
    terminal, _, ok = terminal_rewards(rollouts.molecules, oracle)
    signals = centred_signals(potential, terminal, ok & potential.isfinite().all(1), members)
    rows: dict[str, list[FloatArray]] = {name: [] for name in signals}
    parameters = [p for p in model.parameters() if p.requires_grad]
    for group in range(rollouts.groups):
        chosen = slice(group * members, (group + 1) * members)
        log_pi = _log_policy(model, rollouts, chosen)
        for name, signal in signals.items():
            objective = (signal[chosen].t().to(log_pi) * log_pi).sum() / members
            grads = torch.autograd.grad(objective, parameters, retain_graph=True)
            rows[name].append(torch.cat([g.flatten() for g in grads]).cpu().numpy())
    return GradientSamples(**{k: np.stack(v) for k, v in rows.items()}, oracle_calls=(1, 1 + len(schedule)))


def _log_policy(model: Denoiser, rollouts: Rollouts, chosen: slice) -> Tensor:
    """log pi of the stored actions up to a constant, (S, K), with the graph to the model's parameters."""
    members = chosen.stop - chosen.start
    times = torch.tensor(rollouts.times, device=model.device).repeat_interleave(members)
    t, s = times[:-members], times[members:]
    states, noise, old = (x[:, chosen].flatten(0, 1) for x in (rollouts.states, rollouts.noise, rollouts.eps))
    new = model.eps(states, t, rollouts.mask[chosen].repeat(rollouts.steps, 1))
    scale = model.schedule.transition(t, s).ratio_scale.to(new.dtype)
    return log_ratio(noise, new, old, scale).view(rollouts.steps, members)


# ---------------------------------------------------------------------- the plug-in potential
@dataclass(frozen=True)
class PlugInGain:
    """What a second policy gains over a first one from the same start states, (G,) means over the groups, eV/atom.

    terminal: in the terminal reward Phi(s_0). drift: how much its own potential of the start state is above the first
    policy's. With one fixed potential the shaped return gains `terminal`, exactly; with each policy's own potential it
    gains terminal - drift.
    """

    terminal: FloatArray
    drift: FloatArray

    @property
    def plug_in(self) -> FloatArray:
        """Gain in the shaped return when each policy is judged with its own potential, (G,)."""
        return self.terminal - self.drift


@torch.no_grad()
def plug_in_gain(
    first: Denoiser,
    second: Denoiser,
    oracle: Oracle,
    sizes: Sequence[int],
    members: int,
    *,
    steps: int | None = None,
    skip_prefix: int = 0,
    seed: int = 0,
) -> PlugInGain:
    """Roll both policies out from the start states of `first`'s groups with the same noise (gamma = 1).

    Groups in which the oracle could not judge a start state, or any result of one policy, are left out. Raises
    ValueError when none is left.
    """
    rollouts = rollout(first, sizes, members, steps=steps, skip_prefix=skip_prefix, seed=seed)
    start, mask = rollouts.states[0], rollouts.mask
    t = torch.full((len(start),), rollouts.times[0], device=first.device)
    noise = [*rollouts.noise, first.noise(mask, step_generator(seed, 2, device=first.device))]
    phi, ends = [], []
    for model in (first, second):
        clean = model.clean(start, t, model.eps(start, t, mask))
        phi.append(terminal_rewards(model.decode(clean, clean[..., :3], mask), oracle)[0])
        *_, last = ancestral(model, mask, grid=rollouts.times, z=start, noise=iter(noise))
        ends.append(terminal_rewards(decode_record(model, last), oracle)[0])
    gain, drift = (_group_means(b - a, members) for a, b in (ends, phi))
    kept = np.isfinite(gain) & np.isfinite(drift)
    if not kept.any():
        raise ValueError(
            f"the {oracle.name} oracle could judge none of the {len(kept)} groups: start later, or use more"
        )
    return PlugInGain(gain[kept], drift[kept])


def _group_means(values: Tensor, members: int) -> FloatArray:
    """Mean over the finite values of each group, (G,); NaN for a group without one."""
    return values.double().view(-1, members).nanmean(1).cpu().numpy()


def _shift_scores(model: Denoiser, rollouts: Rollouts) -> Tensor:
    """Gradient of log pi with respect to the two shifts, (B, S, 2), by automatic differentiation of log_ratio."""
    out = []
    for k, (t, s) in enumerate(zip(rollouts.times[:-1], rollouts.times[1:], strict=True)):
        z, xi = rollouts.states[k], rollouts.noise[k]
        side = torch.stack([(z[:, 0, 3] < 0), (z[:, 0, 3] >= 0)], 1).to(z)
        shifts = torch.zeros(len(z), 2, dtype=z.dtype, requires_grad=True)
        change = torch.nn.functional.pad((shifts * side).sum(1).view(-1, 1, 1), (3, 0))
        scale = torch.full((len(z),), model.schedule.transition(t, s).ratio_scale, dtype=z.dtype)
        logs = log_ratio(xi, change, torch.zeros_like(change), scale)
        out.append(torch.autograd.grad(logs.sum(), shifts)[0])
    return torch.stack(out, 1)


# ---------------------------------------------------------------------- statements
def check_invariance(seeds: int = 20, gamma: float | None = None) -> Check:
    """Regret of the optimal policies of shaped random MDPs in the unshaped ones (mean over MDPs), against 0."""
    regrets = []
    for seed in range(seeds):
        mdp = TabularMDP.random(seed=seed)
        potential = np.random.default_rng(seed + 1000).normal(scale=3, size=len(mdp.rewards))
        regrets.append(regret(mdp, mdp.shaped(potential, gamma).optimal_policy()))
    return Check(float(np.mean(regrets)), 0.0, 1e-8)


def broken_invariance() -> Check:
    """Phi(s') - Phi(s) without the discount factor, in a discounted MDP."""
    return check_invariance(gamma=1.0)


def check_telescoping(gamma: float = 0.97, normalize: bool = False) -> Check:
    """The return-to-go telescopes on rollouts of a denoiser (6 molecules of 5 atoms, 10 steps, a pair potential)."""
    model = small_denoiser()
    rollouts = rollout(model, [5, 5], 3, seed=0)
    return Check(telescoping_gap(model, PairSprings(), rollouts, gamma, normalize), 0.0, 1e-9)


def broken_telescoping() -> Check:
    """Shaped rewards normalised at each step before they are summed."""
    return check_telescoping(normalize=True)


def check_unbiased(n: int = 1500, seed: int = 0, kind: str = "shaped") -> Check:
    """Shaping does not change the expected policy gradient: mean of (shaped - terminal), summed over the parameters.

    The fixed potential of this policy depends on the state only: it is a baseline.
    """
    samples = gradient_samples(n, seed)
    return mean_check((getattr(samples, kind) - samples.terminal).sum(1), 0.0)


def broken_unbiased() -> Check:
    """A baseline that sees the action, Phi(s_{t-1}) in place of Phi(s_t)."""
    return check_unbiased(kind="next_state")


def check_ranking(plug_in: bool = False) -> Check:
    """A fixed potential ranks policies as the original return does: regret of the best one by shaped return, 0."""
    mdp = TabularMDP.random(states=6, seed=3)
    return Check(regret(mdp, best_by_shaped_return(mdp, plug_in, weight=1.5)), 0.0, 1e-8)


def broken_ranking() -> Check:
    """A plug-in potential, computed with the policy that is being judged, as the paper's is."""
    return check_ranking(plug_in=True)
