"""Make the bundled force field: labels by GFN2-xTB, two fits with a round of active learning between, and the passport.

    python scripts/fit_bundled_oracle.py labels --out runs/oracle --model edm-mini --model edm-mini-aligned
    torchrun --nproc-per-node 2 scripts/fit_bundled_oracle.py first --out runs/oracle
    python scripts/fit_bundled_oracle.py improve --out runs/oracle
    torchrun --nproc-per-node 2 scripts/fit_bundled_oracle.py final --out runs/oracle
    python scripts/fit_bundled_oracle.py test --out runs/oracle --model edm-mini --model edm-mini-aligned
    python scripts/fit_bundled_oracle.py pack --out runs/oracle

Each command goes on where it was stopped. `--model` may be given several times (names, files, or folders in the public
EDM format). Labels take about 15 ms of one core each, a training step of 64 molecules 0.2 s of one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import machine, provenance
from tqdm import tqdm

from elign_lab.checkpoints import ASSETS, load_model, read_passport, write_passport
from elign_lab.datasets import load_dataset
from elign_lab.evaluation.intervals import ratio_of_sums
from elign_lab.oracles import load_oracle
from elign_lab.oracles.fit import FitConfig, errors, fit_oracle
from elign_lab.oracles.geometries import PERTURBATIONS, generate, perturb
from elign_lab.oracles.labels import LabelPlan, LabelSet, label, make_labels
from elign_lab.oracles.learned import BUNDLED, LearnedOracle, load_energy_model
from elign_lab.training import load_state

SAMPLE_REPEATS = 3  # samples of diffusion models are few, and what the oracle is for
HELD_OUT = 800  # labels of the training molecules that only the log sees
TEST_NOISE = (0.0, 0.02, 0.05, 0.1, 0.2)  # Angstrom
TEST_MOLECULES, TEST_SAMPLES, TEST_SEED = 300, 128, 1000
FIRST = FitConfig(steps=1_500, optimizer="muon", learning_rate=8e-3)
FINAL = FitConfig(steps=4_000, optimizer="muon", learning_rate=3e-3, seed=1)


def training_parts(labels: LabelSet) -> tuple[LabelSet, LabelSet]:
    """Labels to fit, with the samples repeated, and a random share for the log."""
    order = np.random.default_rng(0).permutation(len(labels))
    train = order[HELD_OUT:]
    samples = train[labels.kind[train] == "sample"]
    repeated = np.concatenate([train, *[samples] * (SAMPLE_REPEATS - 1)])
    return labels.subset(repeated), labels.subset(order[:HELD_OUT])


def all_labels(folder: Path) -> LabelSet:
    return LabelSet.cat(LabelSet.load(path) for path in sorted((folder / "labels").glob("*.npz")))


def fit(folder: Path, name: str) -> None:
    train, validation = training_parts(all_labels(folder))
    start = load_energy_model(folder / "first" / "model.safetensors") if name == "final" else None
    with load_oracle("xtb") as xtb:
        atom_energies = {z: xtb.atom_energies[z] for z in FINAL.elements}
    config = FINAL if name == "final" else FIRST
    fit_oracle(config, train, folder / name, atom_energies=atom_energies, validation=validation, start=start)


def make_test_labels(folder: Path, models: list[str]) -> None:
    """Molecules of the test split with noise, and samples of the models from seeds that training did not use."""
    data, rng = load_dataset("bundled", split="test"), np.random.default_rng(TEST_SEED)
    chosen = perturb(data, TEST_MOLECULES, PERTURBATIONS["minimum"], rng)
    geometries = {
        f"noise {sigma:g}": [(z, x + sigma * rng.normal(size=x.shape)) for z, x in chosen] for sigma in TEST_NOISE
    }
    for i, path in enumerate(models):
        for kind, molecules in generate(
            load_model(path), TEST_SAMPLES, 2, steps=100, spacing=2.0, seed=TEST_SEED + i
        ).items():
            geometries[f"{kind} {i}"] = molecules
    with load_oracle("xtb") as xtb:
        label(xtb, geometries, max_force=LabelPlan().max_force_broken).save(folder / "test.npz")


def intervals(path: Path, labels: LabelSet) -> dict[str, dict[str, dict[str, float | None]]]:
    """95 % bootstrap intervals over molecules of the mean errors of a model, by kind: energy_mae and force_mae."""
    found = {}
    for kind in np.unique(labels.kind):
        batch, energy, forces = labels.batch(np.flatnonzero(labels.kind == kind))
        with LearnedOracle(path) as oracle:
            result = oracle(batch.to(dtype=torch.float64))
        n = batch.sizes.numpy()
        energy_error = (result.energy - energy).abs().numpy() / n
        force_error = (result.forces - forces).abs().sum((1, 2)).numpy() / 3
        found[str(kind)] = {
            "energy_mae": ratio_of_sums(energy_error, np.ones_like(energy_error), seed=0, n_boot=1000).to_dict(),
            "force_mae": ratio_of_sums(force_error, n, seed=0, n_boot=1000).to_dict(),  # every component counts once
        }
    return found


def with_intervals(found: dict[str, dict[str, Any]], path: Path, labels: LabelSet) -> dict[str, dict[str, Any]]:
    """The errors of a model by kind, with the intervals of the two means beside them."""
    limits = intervals(path, labels)
    return {
        kind: {**row, **{f"{name}_interval": interval for name, interval in limits[kind].items()}}
        for kind, row in found.items()
    }


def pack(folder: Path, note: str) -> None:
    path = ASSETS / f"{BUNDLED}.safetensors"
    shutil.copyfile(folder / "final" / "model.safetensors", path)
    model = load_energy_model(path)
    test = LabelSet.load(folder / "test.npz")
    found = with_intervals(errors(model, test), path, test)
    data = read_passport(ASSETS / "qm9_xtb.npz")
    seconds = sum(load_state(folder / name / "checkpoint.pt")["seconds"] for name in ("first", "final"))
    write_passport(
        path,
        kind="energy model",
        elements=["H", "C", "N", "O", "F"],
        description="PaiNN force field fitted to GFN2-xTB labels: the preference model of the notebooks",
        method="GFN2-xTB by tblite",
        parameters=sum(p.numel() for p in model.parameters()),
        labels=all_labels(folder).counts(),
        errors=found,
        error_units={"energy_mae": "eV/atom", "force_mae": "eV/Angstrom per component", "f_rms_mae": "eV/Angstrom"},
        test_set="test split of the bundled set with Gaussian noise (Angstrom); samples and clean estimates of models",
        command="scripts/fit_bundled_oracle.py: labels, first, improve, final, test, pack",
        data={"file": data["file"], "sha256": data["sha256"]},
        seed=FINAL.seed,
        seeds={"labels": LabelPlan().seed, "first": FIRST.seed, "final": FINAL.seed, "test": TEST_SEED},
        hours=round(seconds / 3600, 2),
        hours_note="of the two fits; the labels are not timed",
        machine=machine(torch.get_num_threads()),
        **provenance(("torch", "tblite", "rdkit")),
        note=note,
    )
    tqdm.write(json.dumps(found, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("labels", "first", "improve", "final", "test", "pack"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--model", action="append", default=[], help="a diffusion model that generates geometries")
    parser.add_argument("--note", default="", help="for the passport")
    options = parser.parse_args()
    folder: Path = options.out
    if options.command in ("first", "final"):
        fit(folder, options.command)
    elif options.command == "test":
        make_test_labels(folder, options.model)
    elif options.command == "pack":
        pack(folder, options.note)
    else:
        improve = options.command == "improve"
        first = LearnedOracle(folder / "first" / "model.safetensors") if improve else None
        models = [load_model(path) for path in options.model]
        with load_oracle("xtb") as xtb:
            make_labels(xtb, folder / "labels", models=models, improve=first)


if __name__ == "__main__":
    main()
