"""Rewards: terminal energy and force (paper Eq. 2), potential-based shaping (Eq. 3, 4), and further terminal channels.

Energies are formation energies per atom of the oracle, E_f = (E - sum_i E_ref(type_i)) / N in eV per atom, so that
molecules of different composition compare; Phi = -E_f of the clean estimate with its own types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elign_lab.alignment.mdp import Rollouts
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Oracle, clip_forces, f_rms
from elign_lab.shapes import Shapes


@dataclass(frozen=True)
class TerminalChannel:
    """A further terminal reward, normalised in its group on its own: `reward(molecules) -> (B,)`, NaN where it failed.

    Property channel of conditional generation: paper Eq. 8. Channels that are reported metrics (stability, validity)
    optimise what they report; they are off by default and named in every report.
    """

    name: str
    weight: float
    reward: Callable[[MoleculeBatch], Tensor]


@dataclass(frozen=True, repr=False)
class Rewards(Shapes):
    """Rewards of G K rollouts. ok (G K,): the oracle could judge the result; where it could not, values are NaN.

    energy, force (G K,): r_E = -E_f and r_F = -f_RMS. return_to_go (G K, S): G_t at each trained step. channels:
    further terminal rewards by name. evaluated: the trained steps at which the potential was computed.
    """

    energy: Tensor
    force: Tensor
    return_to_go: Tensor
    ok: Tensor
    channels: dict[str, Tensor]
    evaluated: tuple[int, ...]


def terminal_rewards(
    molecules: MoleculeBatch, oracle: Oracle, *, force_clip: float | None = None, energy_clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """r_E = -E_f (eV/atom), r_F = -f_RMS (eV/Angstrom) and ok, each (B,) (paper Eq. 2).

    force_clip rescales each atom's force to at most this length (eV/Angstrom) before the RMS; energy_clip bounds |E_f|.
    """
    result = oracle(molecules)
    energy = oracle.formation_energy_per_atom(result.energy, molecules.numbers, molecules.mask)
    if energy_clip is not None:
        energy = energy.clamp(-energy_clip, energy_clip)
    forces = result.forces if force_clip is None else clip_forces(result.forces, force_clip)
    return -energy, -f_rms(forces, molecules.mask), result.ok


def potential_schedule(steps: int, stride: int) -> tuple[int, ...]:
    """Trained steps (0 = first after the prefix) at which the potential is computed: every stride-th, and the last."""
    if stride < 1:
        raise ValueError(f"the stride of the potential must be at least 1, got {stride}")
    return tuple(sorted({*range(0, steps, stride), steps - 1}))


def potentials(
    rollouts: Rollouts, model: Denoiser, oracle: Oracle, schedule: Sequence[int], energy_clip: float | None = None
) -> Tensor:
    """Phi(s_t) = -E_f(x0_hat(z_t)) at every trained step, (G K, S).

    Steps that are not in the schedule hold the value of the last one that is; so does a step whose clean estimate the
    oracle could not judge, and before the first judged one its value stands. NaN for a rollout none of whose estimates
    could be judged. All scheduled estimates go to the oracle in one call.
    """
    frames = MoleculeBatch.cat([rollouts.clean(model, k) for k in schedule])
    energy = oracle.formation_energy_per_atom(oracle(frames).energy, frames.numbers, frames.mask)
    if energy_clip is not None:
        energy = energy.clamp(-energy_clip, energy_clip)
    values = (-energy).view(len(schedule), -1)
    out = torch.full((rollouts.steps, values.shape[1]), float("nan"), dtype=values.dtype, device=values.device)
    out[list(schedule)] = values
    for k in range(1, rollouts.steps):
        out[k] = torch.where(out[k].isfinite(), out[k], out[k - 1])
    for k in range(rollouts.steps - 2, -1, -1):
        out[k] = torch.where(out[k].isfinite(), out[k], out[k + 1])
    return out.t()


def shaping_rewards(potential: Tensor, terminal: Tensor, gamma: float = 1.0) -> Tensor:
    """r~_t = gamma Phi(s_{t-1}) - Phi(s_t) (paper Eq. 3). potential (B, S), terminal Phi(s_0) (B,) -> (B, S)."""
    return gamma * reached_potential(potential, terminal) - potential


def return_to_go(potential: Tensor, terminal: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = gamma^t Phi(s_0) - Phi(s_t), t = number of transitions left (paper Eq. 4). Shapes as shaping_rewards."""
    steps = potential.shape[1]
    left = torch.arange(steps, 0, -1, device=potential.device, dtype=potential.dtype)
    return gamma**left * terminal.unsqueeze(1) - potential


def reached_potential(potential: Tensor, terminal: Tensor) -> Tensor:
    """Phi(s_{t-1}), the potential of the state that each transition leads to: the paper's ablation without Eq. 3.

    potential (B, S), terminal Phi(s_0) (B,) -> (B, S). Phi(s_t) itself would be known before the transition, and an
    advantage made of it has no expected gradient.
    """
    return torch.cat([potential[:, 1:], terminal.unsqueeze(1)], 1)


def property_channel(
    predict: Callable[[MoleculeBatch], Tensor], target: float | Tensor, weight: float, name: str = "property"
) -> TerminalChannel:
    """Conditional generation: r_c = -|c_hat(x_0) - c*| (paper Eq. 8), for a predictor (B,) and a target."""
    return TerminalChannel(name, weight, lambda molecules: -(predict(molecules) - target).abs())


def stability_channel(weight: float) -> TerminalChannel:
    """+1 for a molecule that EDM's table calls stable, -1 otherwise: optimises a reported metric (not in the paper)."""
    from elign_lab.evaluation import stability

    return TerminalChannel("stability", weight, lambda molecules: 2.0 * stability(molecules).molecule.float() - 1)


def validity_channel(weight: float) -> TerminalChannel:
    """0 for a molecule that RDKit accepts, -1 otherwise: optimises a reported metric (not in the paper)."""
    from elign_lab.evaluation import smiles

    return TerminalChannel(
        "validity", weight, lambda molecules: torch.tensor([0.0 if s else -1.0 for s in smiles(molecules)])
    )


def duplicate_channel(weight: float) -> TerminalChannel:
    """-(copies - 1) / copies for a molecule whose SMILES occurs `copies` times in the batch (not in the paper)."""
    from elign_lab.evaluation import smiles

    def reward(molecules: MoleculeBatch) -> Tensor:
        found = smiles(molecules)
        copies = torch.tensor([found.count(s) if s else 1 for s in found], dtype=torch.float32)
        return -(copies - 1) / copies

    return TerminalChannel("duplicate", weight, reward)


def novelty_channel(weight: float, reference: Iterable[str | None]) -> TerminalChannel:
    """-1 for a molecule whose SMILES is in the reference set, 0 otherwise (not in the paper).

    The reference must be written as `elign_lab.evaluation.novelty` says; the reward raises ValueError where it is not.
    """
    from elign_lab.evaluation import smiles
    from elign_lab.evaluation.validity import check_reference

    known = {s for s in reference if s is not None}

    def reward(molecules: MoleculeBatch) -> Tensor:
        found = smiles(molecules)
        check_reference(found, known)
        return torch.tensor([-1.0 if s in known else 0.0 for s in found])

    return TerminalChannel("novelty", weight, reward)
