"""Train the bundled eSCN-MD model, escn-mini: UMA's architecture, small, on GFN2-xTB labels, in a plain loop.

    python scripts/train_small_escn.py fit  --labels runs/oracle/labels --out runs/escn
    python scripts/train_small_escn.py pack --test runs/oracle/test.npz --out runs/escn

The labels are those of the learned oracle: `scripts/fit_bundled_oracle.py labels` and `test` make them. `fit` goes on
where it was stopped. It needs the extra `uma` (fairchem-core), and one core for about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from provenance import machine, provenance
from scipy.stats import spearmanr
from tqdm import tqdm

from elign_lab.checkpoints import ASSETS, read_passport, write_passport
from elign_lab.datasets import BatchSampler
from elign_lab.evaluation.intervals import ratio_of_sums
from elign_lab.oracles import f_rms, load_oracle
from elign_lab.oracles._fairchem import atomic_data, multiplicity
from elign_lab.oracles.escn import BUNDLED, TASK, EscnCheckpoint, EscnConfig, build_escn
from elign_lab.oracles.labels import LabelSet
from elign_lab.training import (
    ExponentialMovingAverage,
    JsonLines,
    StopRequest,
    load_state,
    require_same_run,
    save_state,
    warmup_cosine,
)

ELEMENTS = (1, 6, 7, 8, 9)
# what is near molecules, and what closes the way to clashes and lets bonds break; samples of models are left out
KINDS = ("minimum", "thermal", "mmff94", "stretched", "fragment", "diatomic", "contact")
NEAR_MINIMUM = ("minimum", "thermal", "mmff94")


@dataclass(frozen=True)
class EscnFitConfig:
    """Settings of the fit; the loss is that of elign_lab.oracles.fit."""

    network: EscnConfig = field(default_factory=EscnConfig)
    steps: int = 1_500
    batch_size: int = 16
    learning_rate: float = 4e-3
    minimum_rate: float = 0.01
    warmup: int = 100
    weight_decay: float = 1e-4
    energy_weight: float = 5.0  # per eV/atom
    force_weight: float = 1.0  # per eV/Angstrom
    force_scale: float = 4.0  # eV/Angstrom; molecules with larger forces count less
    max_grad_norm: float = 10.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 250


def fit(config: EscnFitConfig, labels: LabelSet, atom_energies: Mapping[int, float], out: Path) -> None:
    """Train, or continue the run in `out`; writes checkpoint.pt, log.jsonl and model.safetensors there."""
    references, scale = units(labels, atom_energies, config.force_scale)
    model = build_escn(config.network, config.seed).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    ema, step, before = ExponentialMovingAverage(parameters, config.ema_decay), 0, 0.0
    if (out / "checkpoint.pt").exists():
        state = load_state(out / "checkpoint.pt")
        require_same_run(out / "checkpoint.pt", state["config"], config, ("steps", "log_every", "checkpoint_every"))
        for part, name in ((model, "model"), (optimizer, "optimizer"), (ema, "ema")):
            part.load_state_dict(state[name])
        step, before = state["step"], state.get("seconds", 0.0)
    started = time.monotonic()

    def checkpoint() -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        seconds = before + time.monotonic() - started
        save_state(out / "checkpoint.pt", {"config": asdict(config), "step": step, "seconds": seconds, **parts})
        ema.swap(parameters)
        state = model.state_dict()
        EscnCheckpoint(config.network, state, scale, references, atom_energies).save(out / "model.safetensors")
        ema.swap(parameters)

    log, sums = JsonLines(out / "log.jsonl", "step", step), []
    batches = BatchSampler(labels.sizes, config.batch_size, config.seed).stream(step)
    with tqdm(total=config.steps, initial=step, desc="fitting", unit="step") as bar, StopRequest() as stop:
        while step < config.steps and not stop.requested:
            rate = warmup_cosine(step, config.warmup, config.steps, config.minimum_rate)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            loss, *errors = losses(model, labels, next(batches).numpy(), references, scale, config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            ema.update(parameters)
            sums.append([loss.item(), *errors])
            step += 1
            bar.update()
            if step % config.log_every == 0:
                row = dict(zip(("loss", "energy_mae", "force_mae"), np.mean(sums, 0).round(5).tolist(), strict=True))
                log.write({"step": step - 1, **row})
                bar.set_postfix(row)
                sums = []
            if step % config.checkpoint_every == 0:
                checkpoint()
    checkpoint()


def losses(
    model: torch.nn.Module,
    labels: LabelSet,
    chosen: np.ndarray,
    references: Mapping[int, float],
    scale: float,
    config: EscnFitConfig,
) -> tuple[torch.Tensor, float, float]:
    """Loss, energy MAE (eV/atom) and force MAE (eV/Angstrom, per component) of a batch."""
    batch, energy, forces = labels.batch(chosen)
    molecules = labels.molecules(chosen)
    offsets = torch.tensor([sum(references[z] for z in numbers.tolist()) for numbers, _ in molecules])
    answer = model(atomic_data(molecules, [multiplicity(numbers) for numbers, _ in molecules], torch.float32))
    n = batch.sizes
    energy_error = (scale * answer[f"{TASK}_energy"]["energy"].flatten() - (energy - offsets).float()).abs() / n
    difference = scale * answer[f"{TASK}_forces"]["forces"] - forces[batch.mask]
    molecule = torch.repeat_interleave(torch.arange(len(n)), n)
    norms = (difference.square().sum(-1) + 1e-12).sqrt()
    force_error = torch.zeros(len(n)).index_add(0, molecule, norms) / n
    weight = (1 + (f_rms(forces, batch.mask) / config.force_scale).square()).rsqrt()
    loss = (weight * (config.energy_weight * energy_error + config.force_weight * force_error)).mean()
    return loss, energy_error.mean().item(), difference.detach().abs().mean().item()


def units(labels: LabelSet, atom_energies: Mapping[int, float], force_scale: float) -> tuple[dict[int, float], float]:
    """Least-squares energy of each element near minima (eV), and the RMS force component, cut at force_scale."""
    near = labels.subset(np.isin(labels.kind, NEAR_MINIMUM))
    molecule = np.repeat(np.arange(len(near)), near.sizes)
    counts = np.stack([np.bincount(molecule[near.numbers == z], minlength=len(near)) for z in ELEMENTS], 1)
    atoms = np.array([atom_energies[z] for z in ELEMENTS])
    shifts = np.linalg.lstsq(counts.astype(float), near.energy - counts @ atoms, rcond=None)[0]
    squares = np.minimum(np.square(labels.forces).sum(1), force_scale**2)
    return dict(zip(ELEMENTS, (atoms + shifts).tolist(), strict=True)), float(np.sqrt(squares.mean() / 3))


def test_errors(path: Path, labels: LabelSet) -> dict[str, dict[str, object]]:
    """Errors by kind of a model, through fairchem's own inference; the mirror error is that of a reflected molecule."""
    oracle = load_oracle("uma", model=path)
    found = {}
    for kind in np.unique(labels.kind):
        batch, energy, forces = labels.batch(np.flatnonzero(labels.kind == kind))
        batch = batch.to(dtype=torch.float64)
        result = oracle(batch)
        mirror = oracle(batch.with_positions(batch.positions * torch.tensor([-1.0, 1.0, 1.0])))
        n, ok = batch.sizes, result.ok
        rms = [f_rms(f, batch.mask)[ok].numpy() for f in (forces.double(), result.forces)]
        found[str(kind)] = {
            "molecules": int(ok.sum()),
            "energy_mae": float(((result.energy - energy).abs() / n)[ok].mean()),
            "force_mae": float((result.forces - forces)[batch.mask & ok[:, None]].abs().mean()),
            "force_mae_interval": ratio_of_sums(
                (result.forces - forces).abs().sum((1, 2))[ok].numpy(), 3 * n[ok].numpy(), seed=0, n_boot=1000
            ).to_dict(),
            "f_rms_spearman": float(spearmanr(*rms).statistic),
            "mirror_energy_mae": float(((result.energy - mirror.energy).abs() / n)[ok].mean()),
        }
    return found


def pack(out: Path, test: LabelSet, trained_on: dict[str, int], note: str) -> None:
    """Copy the model into the package, with a passport of its errors."""
    path = ASSETS / f"{BUNDLED}.safetensors"
    shutil.copyfile(out / "model.safetensors", path)
    found = test_errors(out / "model.safetensors", test)
    checkpoint = EscnCheckpoint.load(out / "model.safetensors")
    state, data = load_state(out / "checkpoint.pt"), read_passport(ASSETS / "qm9_xtb.npz")
    write_passport(
        path,
        kind="eSCN-MD model",
        elements=["H", "C", "N", "O", "F"],
        method="GFN2-xTB by tblite",
        description="UMA's architecture, small, to test and to teach with; it is not UMA",
        network=asdict(checkpoint.config),
        labels=trained_on,
        errors=found,
        error_units={
            "energy_mae, mirror_energy_mae": "eV/atom",
            "force_mae": "eV/Angstrom per component",
        },
        test_set="test split of the bundled set with Gaussian noise (Angstrom); samples and clean estimates of models",
        command="scripts/train_small_escn.py: fit, pack",
        data={"file": data["file"], "sha256": data["sha256"]},
        seed=state["config"]["seed"],
        hours=round(state["seconds"] / 3600, 2) if "seconds" in state else None,
        hours_note="of the fit; null where a run of an older script did not note it",
        machine=machine(torch.get_num_threads()),
        **provenance(("torch", "fairchem-core", "tblite")),
        note=note,
    )
    tqdm.write(json.dumps(found, indent=2))


def training_labels(folder: Path) -> LabelSet:
    labels = LabelSet.cat(LabelSet.load(path) for path in sorted(folder.glob("*.npz")))
    return labels.subset(np.isin(labels.kind, KINDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "pack"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--labels", type=Path, default=Path("runs/oracle/labels"), help="default: %(default)s")
    parser.add_argument("--test", type=Path, default=Path("runs/oracle/test.npz"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=EscnFitConfig.steps, help="default: %(default)s")
    parser.add_argument("--note", default="", help="for the passport")
    options = parser.parse_args()
    labels = training_labels(options.labels)
    if options.command == "pack":
        pack(options.out, LabelSet.load(options.test), labels.counts(), options.note)
        return
    with load_oracle("xtb") as xtb:
        atom_energies = {z: xtb.atom_energies[z] for z in ELEMENTS}
    fit(EscnFitConfig(steps=options.steps), labels, atom_energies, options.out)


if __name__ == "__main__":
    main()
