"""The bundled oracle against the method that made its labels, on molecules that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from elign_lab.datasets import load_dataset
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import f_rms, load_oracle
from elign_lab.oracles.geometries import PERTURBATIONS, perturb
from elign_lab.oracles.labels import LabelSet, label
from elign_lab.oracles.learned import LearnedOracle
from elign_lab.testing import assert_batch_equals_single, assert_forces_match_energy

ELEMENTS = (1, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def learned() -> LearnedOracle:
    return load_oracle("learned")


@pytest.fixture(scope="module")
def xtb():
    with load_oracle("xtb") as oracle:
        yield oracle


@pytest.fixture(scope="module")
def reference(xtb) -> LabelSet:
    """Molecules of the test split, at the geometries that a generator could ask about."""
    data = load_dataset("bundled", split="test")
    rng = np.random.default_rng(123)
    geometries = {
        "noise": [
            (z, x + 0.05 * rng.normal(size=x.shape)) for z, x in perturb(data, 60, PERTURBATIONS["minimum"], rng)
        ],
        "minimum": perturb(data, 30, PERTURBATIONS["minimum"], rng),
        "edited": perturb(data, 60, PERTURBATIONS["edited"], rng),
        "strained": perturb(data, 60, PERTURBATIONS["strained"], rng),
    }
    return label(xtb, geometries, progress=False)


def evaluate(oracle: LearnedOracle, labels: LabelSet) -> dict[str, np.ndarray]:
    batch, energy, forces = labels.batch(np.arange(len(labels)))
    result = oracle(batch)
    assert result.ok.all()
    return {
        "energy_error": ((result.energy.double() - energy) / batch.sizes).abs().numpy(),
        "force_error": [(result.forces - forces)[i][m].abs().mean().item() for i, m in enumerate(batch.mask)],
        "f_rms": f_rms(result.forces, batch.mask).numpy(),
        "reference_f_rms": f_rms(forces, batch.mask).numpy(),
    }


def test_accuracy_on_held_out_molecules_with_noise(learned, reference):
    found = evaluate(learned, reference.subset(reference.kind == "noise"))
    assert np.mean(found["force_error"]) < 0.15  # eV/Angstrom
    assert np.mean(found["energy_error"]) < 0.015  # eV per atom


def test_minima_have_small_forces(learned, reference):
    found = evaluate(learned, reference.subset(reference.kind == "minimum"))
    assert np.median(found["f_rms"]) < 0.25  # eV/Angstrom; GFN2-xTB has 0.01


def test_ranks_bad_geometries_as_gfn2_xtb_does(learned, reference):
    found = evaluate(learned, reference)
    assert spearmanr(found["f_rms"], found["reference_f_rms"]).statistic > 0.95


def test_formation_energies_compare_with_those_of_gfn2_xtb(learned, xtb):
    batch = MoleculeBatch.from_smiles(["C", "O", "N", "CCO", "c1ccccc1", "CC#N", "FC(F)F", "NC=O"])
    ours, theirs = (o.formation_energy_per_atom(o(batch).energy, batch.numbers, batch.mask) for o in (learned, xtb))
    assert theirs.max() < -3.0  # bound by several eV per atom
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)
    assert dict(learned.atom_energies) == pytest.approx({z: xtb.atom_energies[z] for z in ELEMENTS}, abs=1e-6)


@pytest.mark.parametrize("pair", [(a, b) for a in ELEMENTS for b in ELEMENTS if a <= b])
def test_a_clash_is_never_attractive(learned, pair):
    """A second atom is pushed into the first atom of a methane-like neighbourhood: the force on it points outwards."""
    base = MoleculeBatch.from_smiles("C").arrays()[0]
    direction = -base[1][1:3].sum(0)
    direction /= np.linalg.norm(direction)
    molecules = [
        (np.array([pair[0], 1, 1, pair[1]]), np.concatenate([base[1][:3] - base[1][0], [d * direction]]))
        for d in np.arange(0.31, 0.56, 0.02)
    ]
    batch = MoleculeBatch.from_arrays(molecules)
    result = learned(batch)
    assert result.ok.all()
    outward = (result.forces[:, 3] @ torch.from_numpy(direction).to(result.forces.dtype)).numpy()
    assert (outward > 0).all(), f"attractive at {np.arange(0.31, 0.56, 0.02)[outward <= 0]} Angstrom"
    assert (np.diff(result.energy.numpy()) < 0).all()


def test_strained_and_broken_molecules_cost_energy(learned):
    data = load_dataset("bundled", split="test")
    rng = np.random.default_rng(5)
    relaxed = perturb(data, 40, PERTURBATIONS["minimum"], rng)
    rms = [
        f_rms(r.forces, b.mask).median()
        for b in (
            MoleculeBatch.from_arrays([(z, x + s * rng.normal(size=x.shape)) for z, x in relaxed])
            for s in (0.0, 0.05, 0.2)
        )
        for r in (learned(b),)
    ]
    assert rms[0] < rms[1] < rms[2]


def test_bundled_forces_are_the_gradient_and_batches_do_not_matter():
    oracle = LearnedOracle(dtype=torch.float64)
    batch = MoleculeBatch.from_smiles(["CCO", "NC(F)=O", "c1ccccc1"]).to(dtype=torch.float64)
    assert_forces_match_energy(oracle, batch, step=1e-4, tolerance=1e-4)
    assert_batch_equals_single(oracle, batch, tolerance=1e-9)


def test_energy_does_not_jump_at_the_cutoff():
    oracle = LearnedOracle(dtype=torch.float64)
    z, x = MoleculeBatch.from_smiles("CCO").arrays()[0]
    x = x.astype(float)
    far = x[:, 0].max() + oracle.model.config.network.reach
    shifts = np.arange(-0.02, 0.02, 0.001)
    batch = MoleculeBatch.from_arrays(
        [
            (np.append(z, 8), np.concatenate([x, [[far + s, x[x[:, 0].argmax(), 1], x[x[:, 0].argmax(), 2]]]]))
            for s in shifts
        ]
    )
    result = oracle(batch)
    assert np.abs(np.diff(result.energy.numpy())).max() < 1e-4
    assert np.abs(np.diff(result.forces.numpy(), axis=0)).max() < 1e-3
