"""Training of the learned oracle by energy and force matching (paper Eq. 1) on labels of any other oracle.

    xtb = load_oracle("xtb")
    labels = make_labels(xtb, "runs/oracle/labels", models=[load_model("edm-mini")])
    model = fit_oracle(FitConfig(), labels, "runs/oracle", atom_energies=xtb.atom_energies)

Loss of a molecule with N atoms (hats are predictions), the L1 form of Eq. 1:

    w ( lambda_E |E^ - E| / N  +  lambda_F (1/N) sum_i |f^_i - f_i| ),     w = 1 / (1 + (f_RMS / f_0)^2)^(1/2)

The weight w (not in the paper) lets the error grow with the force above f_0: broken molecules have forces of tens of
eV/Angstrom, and would otherwise be all that is learned.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from elign_lab.datasets import BatchSampler
from elign_lab.molecules import MoleculeBatch, symbol
from elign_lab.oracles.labels import LabelSet
from elign_lab.oracles.learned import EnergyConfig, EnergyModel, save_energy_model
from elign_lab.oracles.protocol import f_rms
from elign_lab.painn import PaiNNConfig
from elign_lab.training import (
    ExponentialMovingAverage,
    JsonLines,
    LossWatch,
    Optimizer,
    StopRequest,
    any_process,
    average_gradients,
    check_optimizer,
    clip_gradients,
    load_state,
    make_accelerator,
    make_optimizer,
    restore_run,
    save_run,
    warmup_cosine,
    with_defaults,
)

NEAR_MINIMUM = ("minimum", "thermal", "mmff94")


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit; scripts/fit_bundled_oracle.py has the two stages of the bundled oracle."""

    elements: tuple[int, ...] = (1, 6, 7, 8, 9)
    network: PaiNNConfig = field(default_factory=PaiNNConfig)
    contact: float = 1.3  # where the repulsion ends, in sums of covalent radii; at 1 two H atoms at 0.6 A would attract
    steps: int = 6_000
    batch_size: int = 64  # molecules, over all processes
    optimizer: str = "adam"  # a name in training.OPTIMIZERS
    learning_rate: float = 2e-3
    minimum_rate: float = 0.01  # last learning rate as a share of the first
    warmup: int = 200
    energy_weight: float = 5.0  # lambda_E, per eV/atom
    force_weight: float = 1.0  # lambda_F, per eV/Angstrom
    force_scale: float = 4.0  # f_0 in eV/Angstrom
    max_grad_norm: float = 10.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1_000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)


def fit_oracle(
    config: FitConfig,
    labels: LabelSet,
    out: str | Path,
    *,
    atom_energies: Mapping[int, float],
    validation: LabelSet | None = None,
    start: EnergyModel | None = None,
    max_seconds: float | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> EnergyModel:
    """Train an energy model, or continue the run in folder `out`; returns the averaged (EMA) model.

    labels: what to learn. atom_energies: isolated atoms (eV) by the labelling oracle. validation: labels whose errors
    are logged. start: a trained model to begin from; its offsets and scale are kept. Writes out/checkpoint.pt,
    out/log.jsonl and out/model.safetensors. Stops after max_seconds or on Ctrl-C with a checkpoint, and resumes to the
    same numbers. Raises ValueError for labels with other elements, for another network than that of `start`, and when
    the run in `out` has other settings or labels.
    """
    out = Path(out)
    accelerator = accelerator or make_accelerator()
    model = _initial_model(config, labels, atom_energies, start).to(accelerator.device)
    parameters = list(model.parameters())
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate)
    ema = ExponentialMovingAverage(parameters, config.ema_decay)
    step, seconds = 0, 0.0
    if (out / "checkpoint.pt").exists():
        step, seconds = _resume(out / "checkpoint.pt", config, labels, model, optimizer, ema)
    log = JsonLines(out / "log.jsonl", "step", step) if accelerator.is_main_process else None
    batches = BatchSampler(labels.sizes, config.batch_size, config.seed).stream(step)

    def checkpoint() -> None:
        if not accelerator.is_main_process:
            return
        path = out / "checkpoint.pt"
        save_run(path, config, step, seconds, model, optimizer, ema, labels=_fingerprint(labels))
        ema.swap(parameters)
        save_energy_model(model, out / "model.safetensors")
        ema.swap(parameters)

    hidden = not (progress and accelerator.is_main_process)
    bar = tqdm(total=config.steps, initial=step, desc="fitting", unit="step", disable=hidden)
    started, before, sums, since = time.monotonic(), seconds, np.zeros(3), 0
    watch = LossWatch(out / "checkpoint.pt")
    with bar, StopRequest() as stop:
        while step < config.steps:
            factor = warmup_cosine(step, config.warmup, config.steps, config.minimum_rate)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            sums += _train_step(model, labels, next(batches), config, accelerator, optimizer, parameters)
            ema.update(parameters)
            step, since = step + 1, since + 1
            seconds = before + time.monotonic() - started
            bar.update()
            if step % config.log_every == 0 and log is not None:
                loss, energy, force = (sums / since).tolist()
                watch.check(step, loss)
                row = {"step": step - 1, "loss": loss, "energy_mae": energy, "force_mae": force}
                if validation is not None and step % config.validate_every == 0:
                    ema.swap(parameters)
                    row["validation"] = errors(model, validation)
                    ema.swap(parameters)
                log.write({**row, "lr_factor": factor, "seconds": round(seconds, 1)})
                bar.set_postfix(loss=f"{loss:.3f}", force=f"{force:.3f}")
                sums, since = np.zeros(3), 0
            if step % config.checkpoint_every == 0:
                checkpoint()
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            if any_process(accelerator, late or stop.requested):
                bar.write(f"stopped at step {step}: run the same command again to continue")
                break
    checkpoint()
    ema.swap(parameters)
    return model.eval()


@torch.no_grad()
def errors(model: EnergyModel, labels: LabelSet, batch_size: int = 128) -> dict[str, dict[str, float | None]]:
    """Errors of a model on labels, by kind.

    Of each kind: molecules; energy_mae (eV per atom); force_mae (eV/Angstrom, per component); f_rms_mae (eV/Angstrom);
    f_rms_spearman (rank correlation of f_RMS over the molecules; None for fewer than three).
    """
    device = next(model.parameters()).device
    found = []
    for chunk in np.array_split(np.argsort(labels.sizes, kind="stable"), -(-len(labels) // batch_size)):
        batch, energy, forces = labels.batch(chunk)
        batch, energy, forces = batch.to(device), energy.to(device), forces.to(device)
        predicted_energy, predicted = _predict(model, batch, training=False)
        n = batch.sizes
        # reference() is in float64: a difference of total energies keeps its digits
        energy_error = (predicted_energy - (energy - _reference(model, batch))).abs() / n
        force_error = (predicted - forces).abs().sum((1, 2)) / (3 * n)
        rms = f_rms(forces, batch.mask), f_rms(predicted, batch.mask)
        found.append(np.stack([chunk, *(x.double().cpu().numpy() for x in (n, energy_error, force_error, *rms))]))
    index, n, energy, force, rms, predicted_rms = np.concatenate(found, 1)
    kinds, out = labels.kind[index.astype(int)], {}
    for kind in np.unique(kinds):
        k = kinds == kind
        out[str(kind)] = {
            "molecules": int(k.sum()),
            "energy_mae": float(energy[k].mean()),
            "force_mae": float((force[k] * n[k]).sum() / n[k].sum()),
            "f_rms_mae": float(np.abs(rms[k] - predicted_rms[k]).mean()),
            "f_rms_spearman": _rank_correlation(rms[k], predicted_rms[k]),
        }
    return out


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(spearmanr(a, b).statistic) if len(a) > 2 else None


def _reference(model: EnergyModel, batch: MoleculeBatch) -> Tensor:
    return model.reference(model.type_weights(batch.numbers), batch.mask)


def _predict(model: EnergyModel, batch: MoleculeBatch, training: bool) -> tuple[Tensor, Tensor]:
    """Energy above the atoms' offsets (B,) and forces (B, N, 3); in training with a graph for their gradient."""
    with torch.enable_grad():
        positions = batch.positions.detach().requires_grad_(True)
        energy = model.interaction(model.type_weights(batch.numbers), positions, batch.mask)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=training)
    return energy, -gradient


def _train_step(
    model: EnergyModel,
    labels: LabelSet,
    indices: Tensor,
    config: FitConfig,
    accelerator: Accelerator,
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
) -> np.ndarray:
    """One step; returns loss, energy MAE (eV/atom) and force MAE (eV/Angstrom, per component) of this process."""
    share = indices[accelerator.process_index :: accelerator.num_processes]
    batch, energy, forces = labels.batch(share)
    device = accelerator.device
    batch, energy, forces = batch.to(device), energy.to(device), forces.to(device)
    predicted_energy, predicted = _predict(model, batch, training=True)
    n = batch.sizes
    energy_error = (predicted_energy - (energy - _reference(model, batch)).to(predicted_energy.dtype)).abs() / n
    difference = predicted - forces
    # the norm at zero, on padding, has no gradient
    force_error = (difference.square().sum(-1) + 1e-12).sqrt().masked_fill(~batch.mask, 0.0).sum(-1) / n
    weight = (1 + (f_rms(forces, batch.mask) / config.force_scale).square()).rsqrt()
    # divided by the intended share, so that uneven shares average to the mean over the batch
    expected = len(indices) / accelerator.num_processes
    loss = (weight * (config.energy_weight * energy_error + config.force_weight * force_error)).sum() / expected
    optimizer.zero_grad()
    loss.backward()
    average_gradients(accelerator, parameters)
    clip_gradients(parameters, config.max_grad_norm)
    optimizer.step()
    mae = difference.detach().abs().sum() / (3 * n.sum())
    return np.array([loss.item(), energy_error.mean().item(), mae.item()])


def _initial_model(
    config: FitConfig, labels: LabelSet, atom_energies: Mapping[int, float], start: EnergyModel | None
) -> EnergyModel:
    foreign = sorted(set(np.unique(labels.numbers).tolist()) - set(config.elements))
    if foreign:
        names = ", ".join(symbol(z) for z in foreign)
        raise ValueError(f"the labels hold {names}, which is not in elements={config.elements}: add it, or drop them")
    if start is not None:
        if start.config.network != config.network or start.config.elements != config.elements:
            raise ValueError("the model to start from has another network or other elements than the configuration")
        model = EnergyModel(replace(start.config, contact=config.contact))
        model.load_state_dict(start.state_dict())
        return model
    atoms = np.array([atom_energies[z] for z in config.elements])
    shifts, scale = _offsets(config, labels, atoms)
    energy = EnergyConfig(config.elements, tuple(atoms.tolist()), shifts, scale, config.contact, config.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # PyTorch's initialisers take no generator
        return EnergyModel(energy)


def _offsets(config: FitConfig, labels: LabelSet, atoms: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Least-squares shift of each element near minima, and the weighted RMS force as the unit of the network."""
    near = np.isin(labels.kind, NEAR_MINIMUM)
    chosen = np.flatnonzero(near) if near.any() else np.arange(len(labels))
    molecule = np.repeat(np.arange(len(labels)), labels.sizes)
    counts = np.stack([np.bincount(molecule[labels.numbers == z], minlength=len(labels)) for z in config.elements], 1)
    residual = labels.energy - counts @ atoms
    shifts = np.linalg.lstsq(counts[chosen].astype(float), residual[chosen], rcond=None)[0]
    square = np.minimum(np.square(labels.forces).sum(1), config.force_scale**2)
    return tuple(shifts.tolist()), float(np.sqrt(square.mean() / 3))


def _fingerprint(labels: LabelSet) -> int:
    return zlib.crc32(labels.energy.tobytes())


def _resume(
    path: Path,
    config: FitConfig,
    labels: LabelSet,
    model: EnergyModel,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage,
) -> tuple[int, float]:
    state = load_state(path)
    before = with_defaults(state["config"], asdict(FitConfig()))
    changed = [k for k, v in asdict(config).items() if before[k] != v and not k.endswith("_every")]
    if state["labels"] != _fingerprint(labels):
        changed.append("labels")
    if changed:
        raise ValueError(f"{path} was made with other settings ({', '.join(changed)}): use another folder, or the same")
    return restore_run(state, model, optimizer, ema)
