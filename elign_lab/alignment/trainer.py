"""FED-GRPO (paper Algorithms 1 and 2): roll out, reward, update; resumable, in one process or several.

One iteration: draw G sizes; roll out K members each with a shared prefix; judge the results (energy and forces) and the
clean estimates on the way (energies) with the oracle; advantages per group; then `updates` optimiser steps over
shuffled (group, step) units, each of K (rollout, step) pairs, so that an optimiser step holds whole groups.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from elign_lab.alignment.advantages import total_advantage
from elign_lab.alignment.config import AlignConfig
from elign_lab.alignment.mdp import Rollouts, degrees_of_freedom, rollout
from elign_lab.alignment.objective import fed_grpo_terms
from elign_lab.alignment.rewards import (
    Rewards,
    TerminalChannel,
    potential_schedule,
    potentials,
    reached_potential,
    return_to_go,
    terminal_rewards,
)
from elign_lab.checkpoints import save_model
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Oracle
from elign_lab.sampling import require_all, sample
from elign_lab.shapes import Shapes
from elign_lab.training import (
    JsonLines,
    StopRequest,
    any_process,
    average_gradients,
    clip_gradients,
    load_state,
    make_accelerator,
    require_same_run,
    save_state,
    step_generator,
    warmup_cosine,
)

# streams of random numbers, so that none is used twice
DRAWN, ROLLOUT, _UNITS = 1, 2, 3


class OracleFailureError(RuntimeError):
    """The oracle failed on so many rollouts that training on the rest would be misleading."""


@dataclass(frozen=True, repr=False)
class Iteration(Shapes):
    """What one iteration did: for the log, the dashboard and the notebooks."""

    index: int
    metrics: dict[str, float]
    rollouts: Rollouts
    rewards: Rewards
    advantages: Tensor


class PolicyTrainer(ABC):
    """Aligns a policy with an oracle; the subclass says what the policy is, and how it acts.

    policy is trained in place; its copy at the start is the reference of the KL term. `out`, when given, holds
    checkpoint.pt, log.jsonl, model.safetensors (latest) and best.safetensors, and is continued when it exists.
    channels: further terminal rewards (none in the paper's main runs).

    A step of any policy here is z_s ~ N(mean, sigma^2 P) with a mean that is -c sigma eps(z_t) plus what does not
    depend on the weights. Its `prediction` is eps, its `ratio_scale` c: they are all that ratios and KL need.
    """

    policy: Any  # a torch module; each subclass declares which
    reference: Any

    def __init__(
        self,
        policy: nn.Module,
        oracle: Oracle,
        config: AlignConfig,
        *,
        out: str | Path | None = None,
        channels: Sequence[TerminalChannel] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator()
        self.policy = policy.to(self.accelerator.device)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.oracle, self.config, self.channels = oracle, config, tuple(channels)
        names = [ch.name for ch in self.channels]
        if len({*names, "energy", "force"}) < len(names) + 2:
            raise ValueError(f"channels {names}: each needs a name of its own, other than 'energy' and 'force'")
        if config.groups % self.accelerator.num_processes:
            raise ValueError(
                f"groups = {config.groups} cannot be shared by {self.accelerator.num_processes} processes: "
                "use a multiple of the number of processes"
            )
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )
        self.iteration = 0
        self.updates_done = 0
        self.best = float("-inf")
        self.out = Path(out) if out is not None else None
        if self.out is not None and (self.out / "checkpoint.pt").exists():
            self._resume(self.out / "checkpoint.pt")
        self.log: JsonLines | None = None
        if self.out is not None and self.accelerator.is_main_process:
            self.log = JsonLines(self.out / "log.jsonl", "iteration", self.iteration)

    # ------------------------------------------------------------------ the loop
    def run(self, iterations: int | None = None, *, progress: bool = True) -> list[dict[str, float]]:
        """Run until `iterations` (default: the configuration's) are done; returns the metrics of each new one.

        Ctrl-C stops after the iteration, with a checkpoint; running again continues with the same numbers.
        """
        rows = []
        total = self.config.iterations if iterations is None else iterations
        show = progress and self.accelerator.is_main_process
        bar = tqdm(total=total, initial=self.iteration, desc="aligning", unit="it", disable=not show)
        with bar, StopRequest() as stop:
            for step in self.steps(total):
                rows.append(step.metrics)
                bar.update()
                bar.set_postfix(force=f"{step.metrics['reward_force']:.3f}", kl=f"{step.metrics['kl']:.3f}")
                if any_process(self.accelerator, stop.requested):
                    bar.write(f"stopped after iteration {self.iteration}: run again to continue")
                    break
        if self.iteration % self.config.checkpoint_every:
            self.save()
        return rows

    def steps(self, total: int) -> Iterator[Iteration]:
        """Yield each Iteration as it is done (the live dashboard and the notebooks use this)."""
        while self.iteration < total:
            yield self.step()

    def step(self) -> Iteration:
        """One iteration: rollouts, rewards, advantages, updates, and every so often the evaluation set."""
        c, index = self.config, self.iteration
        clock = time.perf_counter()
        before = self.oracle.molecules
        rollouts = self.roll_out(index)
        rolled = time.perf_counter()
        rewards = self.judge(rollouts)
        judged = time.perf_counter()
        asked = torch.tensor(self.oracle.molecules - before, device=self.accelerator.device)
        advantages = self.advantages(rollouts, rewards)
        metrics = self._reward_metrics(rewards)
        self._check_failures(index, metrics["failed"], c.groups * c.members)
        metrics |= self._update(rollouts, advantages, index)
        metrics |= {
            "network_calls": rollouts.network_calls,
            "oracle_molecules": int(self.accelerator.reduce(asked, "sum")),
            "seconds_rollout": round(rolled - clock, 3),
            "seconds_oracle": round(judged - rolled, 3),
            "seconds_update": round(time.perf_counter() - judged, 3),
        }
        self.iteration += 1
        if self.iteration % c.evaluate_every == 0:
            metrics |= self.evaluate()
        metrics = {"iteration": index, **metrics}
        if self.log is not None:
            self.log.write(metrics)
        if self.iteration % c.checkpoint_every == 0:
            self.save()
        return Iteration(index, metrics, rollouts, rewards, advantages)

    # ------------------------------------------------------------------ what the policy is
    @abstractmethod
    def roll_out(self, index: int) -> Rollouts:
        """The rollouts of iteration `index`; with several processes, this process's groups."""

    @abstractmethod
    def evaluation_set(self) -> MoleculeBatch:
        """The molecules that the policy makes now from the sizes and the noise of the fixed evaluation set."""

    @abstractmethod
    def prediction(self, model: Any, rollouts: Rollouts, step: Tensor, row: Tensor) -> Tensor:
        """eps (B, N, channels of the state) of a model, policy or reference, at the states of pairs (step, row)."""

    @abstractmethod
    def ratio_scale(self, rollouts: Rollouts) -> Tensor:
        """c (S,) of each trained step."""

    @abstractmethod
    def save_policy(self, path: Path) -> None:
        """Write the policy's model file."""

    def describe(self, molecules: MoleculeBatch) -> dict[str, float]:
        """Further metrics of the evaluation set, by their names in the log."""
        return {}

    # ------------------------------------------------------------------ its parts
    def groups_here(self) -> range:
        """The groups of this process."""
        share = self.config.groups // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        return range(first, first + share)

    def judge(self, rollouts: Rollouts) -> Rewards:
        """Rewards of the rollouts by the oracle."""
        c = self.config
        energy, force, ok = terminal_rewards(
            rollouts.molecules, self.oracle, force_clip=c.force_clip, energy_clip=c.energy_clip
        )
        if c.energy_signal == "terminal" or c.energy_weight == 0:
            evaluated: tuple[int, ...] = ()
            to_go = energy.unsqueeze(1).expand(-1, rollouts.steps)
        else:
            evaluated = potential_schedule(rollouts.steps, c.potential_stride)
            potential = potentials(rollouts, self.policy, self.oracle, evaluated, c.energy_clip)
            # no estimate on the way could be judged: no shaping signal, and the terminal rewards still count
            potential = torch.where(potential.isfinite(), potential, energy.unsqueeze(1))
            naive = c.energy_signal == "naive"
            to_go = reached_potential(potential, energy) if naive else return_to_go(potential, energy, c.gamma)
        channels = {ch.name: ch.reward(rollouts.molecules).to(energy) for ch in self.channels}
        return Rewards(energy, force, to_go, ok, channels, evaluated)

    def advantages(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        """Total advantages (G, K, S) (paper Eq. 7)."""
        c, shape = self.config, (rollouts.groups, rollouts.members)
        weights = {ch.name: ch.weight for ch in self.channels}
        return total_advantage(
            rewards.return_to_go.reshape(*shape, rollouts.steps),
            rewards.force.view(shape),
            rewards.ok.view(shape),
            energy_weight=c.energy_weight,
            force_weight=c.force_weight,
            clip=c.adv_clip,
            energy_floor=c.energy_floor,
            force_floor=c.force_floor,
            channels={name: (weights[name], value.view(shape)) for name, value in rewards.channels.items()},
            disentangle=c.disentangle,
        ).to(self.policy.dtype)

    def evaluate(self) -> dict[str, float]:
        """Rewards on the fixed evaluation set (same sizes and noise each time); keeps the best model by their sum."""
        c = self.config
        described = {}
        if self.accelerator.is_main_process:
            molecules = require_all(self.evaluation_set(), c.evaluate_n)
            described = self.describe(molecules)
            energy, force, ok = terminal_rewards(
                molecules, self.oracle, force_clip=c.force_clip, energy_clip=c.energy_clip
            )
            # a molecule that the oracle cannot judge counts as the worst one seen
            score = [_mean_with_worst(energy, ok), _mean_with_worst(force, ok)]
        else:
            score = [0.0, 0.0]
        found = self.accelerator.reduce(torch.tensor(score, device=self.accelerator.device), "sum").tolist()
        total = c.energy_weight * found[0] + c.force_weight * found[1]
        if total > self.best:
            self.best = total
            if self.out is not None and self.accelerator.is_main_process:
                self.save_policy(self.out / "best.safetensors")
        return {"eval_energy": found[0], "eval_force": found[1], "eval_best": self.best, **described}

    # ------------------------------------------------------------------ update
    def _update(self, rollouts: Rollouts, advantages: Tensor, index: int) -> dict[str, float]:
        c, processes = self.config, self.accelerator.num_processes
        share, rank = rollouts.groups, self.accelerator.process_index
        sums = torch.zeros(6, dtype=torch.float64, device=self.accelerator.device)
        chosen = self._choose_units(rollouts.steps, index)
        for epoch in range(c.epochs):
            order = torch.randperm(len(chosen), generator=step_generator(c.seed, _UNITS, index, epoch + 1))
            for part in chosen[order].tensor_split(c.updates):
                pairs = len(part) * rollouts.members
                group = part // rollouts.steps
                mine = part[(group >= rank * share) & (group < (rank + 1) * share)]
                self._optimizer_step(rollouts, advantages, mine - rank * share * rollouts.steps, pairs, processes, sums)
        sums = self.accelerator.reduce(sums, "sum")
        count = float(sums[0].clamp(min=1))
        return {
            "surrogate": float(sums[1]) / count,
            "kl": float(sums[2]) / count,
            "clip_fraction": float(sums[3]) / count,
            "log_ratio_rms": (float(sums[4]) / count) ** 0.5,
            "grad_norm": float(sums[5]) / (processes * c.updates * c.epochs),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _choose_units(self, steps: int, index: int) -> Tensor:
        """Indices group * S + step of the (group, step) units to train on, over the groups of all processes."""
        units = self.config.groups * steps
        if units < self.config.updates:
            raise ValueError(
                f"updates = {self.config.updates}, but an iteration has {units} (group, step) pairs for them: "
                "use fewer updates, more groups or a shorter prefix"
            )
        wanted = self.config.pairs_per_iteration
        if wanted is None or wanted >= units * self.config.members:
            return torch.arange(units)
        generator = step_generator(self.config.seed, _UNITS, index, 0)
        return torch.randperm(units, generator=generator)[: max(wanted // self.config.members, self.config.updates)]

    def _optimizer_step(
        self, rollouts: Rollouts, advantages: Tensor, units: Tensor, pairs: int, processes: int, sums: Tensor
    ) -> None:
        """One optimiser step on these local units; `pairs` counts the pairs of all processes."""
        c = self.config
        factor = warmup_cosine(self.updates_done, c.warmup, c.total_updates, c.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * factor
        self.set_gradients(rollouts, advantages, units, processes / pairs, sums)
        average_gradients(self.accelerator, self.parameters)
        sums[5] += clip_gradients(self.parameters, c.max_grad_norm).double()
        self.optimizer.step()
        self.updates_done += 1

    def set_gradients(
        self, rollouts: Rollouts, advantages: Tensor, units: Tensor, scale: float, sums: Tensor | None = None
    ) -> None:
        """Set the gradients of the policy to those of `scale` times the summed loss of the pairs of these units.

        units: indices group * S + step of this process's rollouts; sums (6,), if given, gets the terms of the metrics.
        """
        sums = torch.zeros(6, dtype=torch.float64, device=self.accelerator.device) if sums is None else sums
        for p in self.parameters:  # zeros and not None: a process may have no pair in this step
            p.grad = torch.zeros_like(p)
        for chunk in units.split(max(self.config.pairs_per_call // rollouts.members, 1)):
            self._accumulate(rollouts, advantages, chunk, scale, sums)

    def _accumulate(self, rollouts: Rollouts, advantages: Tensor, units: Tensor, scale: float, sums: Tensor) -> None:
        """Add the gradient of `scale` times the summed loss of the pairs of these units."""
        c, k, device = self.config, rollouts.members, rollouts.mask.device
        group = (units // rollouts.steps).repeat_interleave(k)
        step = (units % rollouts.steps).repeat_interleave(k)
        member = torch.arange(k).repeat(len(units))
        row = group * k + member
        # a rollout that has left the finite numbers was dropped; its NaN would undo the gradient of all the others
        kept = rollouts.finite[row]
        row, step = row[kept].to(device), step[kept].to(device)
        if len(row) == 0:
            return
        noise, eps_old = rollouts.noise[step, row], rollouts.eps[step, row]
        scale_t = self.ratio_scale(rollouts)[step].to(noise.dtype)
        with torch.no_grad():
            eps_ref = self.prediction(self.reference, rollouts, step, row)
        eps_new = self.prediction(self.policy, rollouts, step, row)
        dims = degrees_of_freedom(rollouts.mask[row], noise.shape[-1] - 3) if c.ratio_per_dof else None
        advantage = advantages.reshape(-1, rollouts.steps)[row, step]
        terms = fed_grpo_terms(noise, eps_new, eps_old, eps_ref, scale_t, advantage, c.clip_range, dims)
        loss = -terms.surrogate + c.kl_weight * terms.kl
        (loss.sum() * scale).backward()
        with torch.no_grad():
            new = [
                torch.tensor(float(len(row)), device=device),
                terms.surrogate.sum(),
                terms.kl.sum(),
                terms.clipped.sum(),
                terms.log_ratio.square().sum(),
            ]
            sums[:5] += torch.stack([x.double() for x in new])

    # ------------------------------------------------------------------ bookkeeping
    def _reward_metrics(self, rewards: Rewards) -> dict[str, float]:
        """Means over the rollouts of all processes that could be judged, NaN when none could; number of failed ones."""
        ok = rewards.ok
        named = {"energy": rewards.energy, "force": rewards.force, **rewards.channels}
        good = [v[ok & v.isfinite()].double() for v in named.values()]
        sums = [(~ok).sum().double(), *(v.sum() for v in good)]
        counts = [torch.tensor(float(len(v)), dtype=torch.float64, device=ok.device) for v in good]
        found = self.accelerator.reduce(torch.stack([*sums, *counts]).to(self.accelerator.device), "sum").tolist()
        failed, totals, judged = found[0], found[1 : 1 + len(named)], found[1 + len(named) :]
        means = [total / n if n else float("nan") for total, n in zip(totals, judged, strict=True)]
        return {**{f"reward_{name}": mean for name, mean in zip(named, means, strict=True)}, "failed": failed}

    def _check_failures(self, index: int, failed: float, total: int) -> None:
        if failed > self.config.max_failure_share * total:
            raise OracleFailureError(
                f"iteration {index}: the oracle failed on {failed:.0f} of {total} rollouts, more than the share of "
                f"{self.config.max_failure_share} that AlignConfig.max_failure_share allows; look at "
                "oracle(molecules).status for the reasons"
            )

    def save(self) -> None:
        """Write checkpoint.pt and model.safetensors, atomically."""
        if self.out is None or not self.accelerator.is_main_process:
            return
        state = {
            "config": asdict(self.config),
            "channels": self._channel_settings(),
            "iteration": self.iteration,
            "updates_done": self.updates_done,
            "best": self.best,
            "policy": self.policy.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # the model first: a run that is killed in between does the iteration again, and never ends with an older model
        self.save_policy(self.out / "model.safetensors")
        save_state(self.out / "checkpoint.pt", state)

    def _resume(self, path: Path) -> None:
        state: dict[str, Any] = load_state(path)
        free = {"iterations", "evaluate_every", "checkpoint_every", "max_failure_share", "pairs_per_call"}
        require_same_run(path, state["config"], self.config, free)
        if state["channels"] != self._channel_settings():
            raise ValueError(
                f"{path} was made with the channels {state['channels']}, not {self._channel_settings()}: "
                "use another folder"
            )
        saved, given = state["reference"], self.reference.state_dict()
        if saved.keys() != given.keys() or any(not torch.equal(v, given[key].cpu()) for key, v in saved.items()):
            raise ValueError(f"{path} was made from another model than the one given now: use another folder")
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.updates_done, self.best = state["iteration"], state["updates_done"], state["best"]

    def _channel_settings(self) -> list[list[Any]]:
        return [[ch.name, ch.weight] for ch in self.channels]


class Trainer(PolicyTrainer):
    """Aligns a denoiser, whose policy is ancestral sampling; see PolicyTrainer."""

    policy: Denoiser
    reference: Denoiser

    def roll_out(self, index: int) -> Rollouts:
        """The rollouts of iteration `index`; with several processes, this process's groups."""
        c, groups = self.config, self.groups_here()
        sizes = self.policy.sample_sizes(c.groups, step_generator(c.seed, DRAWN, index))
        return rollout(
            self.policy,
            sizes[groups.start : groups.stop].tolist(),
            c.members,
            steps=c.steps,
            spacing=c.spacing,
            skip_prefix=c.skip_prefix,
            shared_prefix=c.shared_prefix,
            seed=(c.seed, ROLLOUT, index),
            first_group=groups.start,
        )

    def evaluation_set(self) -> MoleculeBatch:
        """Samples of the policy with the seed of the configuration."""
        c = self.config
        return sample(self.policy, c.evaluate_n, steps=c.steps, spacing=c.spacing, seed=c.seed)

    def prediction(self, model: Denoiser, rollouts: Rollouts, step: Tensor, row: Tensor) -> Tensor:
        """The predicted noise (B, N, 3 + F) at the states of pairs (step, row)."""
        t = torch.tensor(rollouts.times, device=row.device)[step]
        return model.eps(rollouts.states[step, row], t, rollouts.mask[row])

    def ratio_scale(self, rollouts: Rollouts) -> Tensor:
        """c (S,) of each trained step (`Transition.ratio_scale`)."""
        times = torch.tensor(rollouts.times, device=rollouts.mask.device)
        return self.policy.schedule.transition(times[:-1], times[1:]).ratio_scale

    def save_policy(self, path: Path) -> None:
        """Write the denoiser with its configuration."""
        save_model(self.policy, path)


def align(
    model: Denoiser,
    oracle: Oracle,
    config: AlignConfig | None = None,
    *,
    out: str | Path | None = None,
    channels: Sequence[TerminalChannel] = (),
    progress: bool = True,
) -> tuple[Denoiser, list[dict[str, float]]]:
    """Align a copy of `model` with `oracle`; returns the aligned model and the metrics of each iteration."""
    trainer = Trainer(copy.deepcopy(model), oracle, config or AlignConfig(), out=out, channels=channels)
    history = trainer.run(progress=progress)
    return trainer.policy.eval(), history


def _mean_with_worst(values: Tensor, ok: Tensor) -> float:
    good = values[ok]
    if len(good) == 0:
        return float("-inf")
    return float(torch.where(ok, values, good.min()).mean())
