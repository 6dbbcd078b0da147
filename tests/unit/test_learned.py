"""The learned oracle, its labels and its training, on small untrained or briefly trained networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ase.data import covalent_radii
from scipy.spatial.distance import pdist

from elign_lab.datasets import load_dataset
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle, geometries, learned, load_oracle
from elign_lab.oracles._evaluation import Evaluation
from elign_lab.oracles.fit import FitConfig, errors, fit_oracle
from elign_lab.oracles.geometries import PERTURBATIONS, perturb
from elign_lab.oracles.labels import LabelPlan, LabelSet, label, make_labels
from elign_lab.oracles.learned import EnergyConfig, EnergyModel, LearnedOracle, load_energy_model, save_energy_model
from elign_lab.painn import PaiNNConfig
from elign_lab.testing import assert_batch_equals_single, assert_forces_match_energy
from elign_lab.training import read_json_lines

NETWORK = PaiNNConfig(features=16, vectors=8, channels=8, layers=2, basis=8)
ATOM_ENERGIES = (-13.6, -1000.0, -1500.0, -2000.0, -2700.0)


@pytest.fixture(scope="module")
def model() -> EnergyModel:
    torch.manual_seed(0)
    config = EnergyConfig(atom_energies=ATOM_ENERGIES, shifts=(-3.0, -8.0, -7.0, -6.0, -4.0), network=NETWORK)
    return EnergyModel(config)


@pytest.fixture(scope="module")
def oracle(model) -> LearnedOracle:
    return LearnedOracle(model, dtype=torch.float64)


@pytest.fixture(scope="module")
def batch() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(["CCO", "NC(F)=O", "c1ccccc1", "O"])


class Pairs(Oracle):
    """Labels with a known answer: E = 10 sum_{i<j} exp(-r_ij^2 / 2) + sum_i z_i, in eV and Angstrom."""

    name = "pairs"
    elements = frozenset((1, 6, 7, 8, 9))

    def _compute(self, molecules):
        answers = []
        for numbers, positions in molecules:
            r = positions[:, None] - positions[None]
            pair = 10 * np.exp(-0.5 * np.square(r).sum(-1)) * (1 - np.eye(len(numbers)))
            answers.append(Evaluation(pair.sum() / 2 + float(numbers.sum()), (pair[..., None] * r).sum(1)))
        return answers


@pytest.fixture(scope="module")
def pair_labels() -> LabelSet:
    data = load_dataset("bundled", split="train").subset(slice(0, 300))
    rng = np.random.default_rng(0)
    molecules = perturb(data, 300, PERTURBATIONS["thermal"], rng)
    return label(Pairs(), {"thermal": molecules}, progress=False)


# ---------------------------------------------------------------------- energy and forces
def test_forces_are_the_gradient_of_the_energy(oracle, batch):
    assert_forces_match_energy(oracle, batch, step=1e-4, tolerance=1e-5)


def test_batch_equals_single(oracle, batch):
    assert_batch_equals_single(oracle, batch.to(dtype=torch.float64), tolerance=1e-9)


def test_result_does_not_depend_on_the_batch_size(model, batch):
    many = MoleculeBatch.cat([batch, batch[[3, 0]]])
    one, all_at_once = LearnedOracle(model, batch_size=1)(many), LearnedOracle(model, batch_size=64)(many)
    torch.testing.assert_close(one.energy, all_at_once.energy, rtol=0, atol=1e-3)
    torch.testing.assert_close(one.forces, all_at_once.forces, rtol=0, atol=1e-4)


def test_float32_and_float64_agree(model, oracle, batch):
    single, double = LearnedOracle(model)(batch), oracle(batch.to(dtype=torch.float64))
    assert double.energy.dtype == torch.float64
    torch.testing.assert_close(single.energy.double(), double.energy, rtol=0, atol=1e-3)
    torch.testing.assert_close(single.forces.double(), double.forces, rtol=0, atol=1e-4)


def test_separated_atoms_have_the_offset_energies(model):
    # 100 Angstrom apart, only the constant of each element is left
    positions = torch.tensor([[[0.0, 0, 0], [100.0, 0, 0]]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    oracle = LearnedOracle(model, dtype=torch.float64)
    pair = oracle.energy(torch.tensor([[6, 1]]), positions, mask)
    alone = sum(oracle.energy(torch.tensor([[z]]), positions[:, :1], mask[:, :1]) for z in (6, 1))
    torch.testing.assert_close(pair, alone, rtol=0, atol=1e-9)


def test_formation_energy_uses_the_stored_atoms(oracle, model, batch):
    result = oracle(batch.to(dtype=torch.float64))
    table = dict(zip(model.config.elements, ATOM_ENERGIES, strict=True))
    formation = oracle.formation_energy_per_atom(result.energy, batch.numbers, batch.mask)
    water = (float(result.energy[3]) - table[8] - 2 * table[1]) / 3
    assert float(formation[3]) == pytest.approx(water, abs=1e-9)


def test_soft_types_at_the_corners_are_the_elements(oracle, batch):
    batch = batch.to(dtype=torch.float64)
    weights = oracle.model.type_weights(batch.numbers)
    soft = oracle.energy_soft(weights, batch.positions, batch.mask)
    torch.testing.assert_close(soft, oracle.energy(batch.numbers, batch.positions, batch.mask), rtol=0, atol=1e-9)


def test_alchemical_force_is_the_gradient_in_the_types(oracle, batch):
    batch = batch.to(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(*batch.mask.shape, 5, generator=generator, dtype=torch.float64).softmax(-1)
    direction = torch.randn(weights.shape, generator=generator, dtype=torch.float64) * batch.mask.unsqueeze(-1)
    weights.requires_grad_(True)
    energy = oracle.energy_soft(weights, batch.positions, batch.mask)
    (gradient,) = torch.autograd.grad(energy.sum(), weights)
    with torch.no_grad():
        up, down = (oracle.energy_soft(weights + h * direction, batch.positions, batch.mask) for h in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum((1, 2)), (up - down) / 2e-5, rtol=1e-5, atol=1e-4)


def test_soft_types_of_a_wrong_shape_are_refused(oracle, batch):
    with pytest.raises(ValueError, match=r"type_weights has shape .* expected \(4, "):
        oracle.energy_soft(torch.ones(4, 3, 5), batch.positions, batch.mask)


# ---------------------------------------------------------------------- short range
@pytest.mark.parametrize("pair", [(1, 1), (1, 6), (6, 6), (7, 8), (9, 9)])
def test_repulsion_is_positive_below_contact_and_zero_above(pair):
    numbers = torch.tensor([pair], dtype=torch.float64)
    radii = torch.from_numpy(covalent_radii[list(pair)])[None]
    contact, mask = float(radii.sum()), torch.ones(1, 2, dtype=torch.bool)

    def repulsion(distance: float) -> tuple[float, float]:
        x = torch.tensor([[[0.0, 0, 0], [distance, 0, 0]]], dtype=torch.float64, requires_grad=True)
        energy = learned.nuclear_repulsion(numbers, radii, x, mask)
        return float(energy.detach()), -float(torch.autograd.grad(energy.sum(), x)[0][0, 1, 0])

    assert repulsion(contact + 1e-3) == (0.0, 0.0)
    previous = 0.0
    for distance in np.arange(0.98 * contact, 0.1, -0.02):
        energy, force = repulsion(distance)
        assert energy > previous, f"not monotonic at {distance:.2f} Angstrom"
        assert force > 0
        previous = energy


def test_repulsion_is_the_published_screened_coulomb_law():
    # two carbon atoms at 0.2 Angstrom: a = 0.46850 / (2 * 6^0.23), x = r / a (ZBL 1985), by hand
    a = 0.46850 / (2 * 6**0.23)
    phi = sum(
        w * np.exp(-k * 0.2 / a)
        for w, k in ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
    )
    x = 0.2 / (2 * covalent_radii[6])
    expected = 14.399645 * 36 / 0.2 * phi * (1 - 10 * x**3 + 15 * x**4 - 6 * x**5)
    positions = torch.tensor([[[0.0, 0, 0], [0.2, 0, 0]]], dtype=torch.float64)
    radii = torch.full((1, 2), covalent_radii[6], dtype=torch.float64)
    found = learned.nuclear_repulsion(torch.full((1, 2), 6.0).double(), radii, positions, torch.ones(1, 2).bool())
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_coincident_atoms_are_finite_and_the_oracle_refuses_them(oracle):
    numbers, mask = torch.tensor([[6, 6, 1]]), torch.ones(1, 3, dtype=torch.bool)
    positions = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    energy = oracle.energy(numbers, positions, mask)
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    assert torch.isfinite(energy).all()
    assert torch.isfinite(gradient).all()
    result = oracle(MoleculeBatch(numbers, positions.detach(), mask))
    assert not bool(result.ok[0])
    assert "apart" in result.status[0]


# ---------------------------------------------------------------------- bad input
def test_unknown_elements_are_a_status_and_an_error(oracle):
    batch = MoleculeBatch.from_smiles(["CS", "CO"])
    result = oracle(batch)
    assert result.ok.tolist() == [False, True]
    assert result.status[0] == "unsupported element S"
    with pytest.raises(ValueError, match=r"molecule 0, atom 1 has number 16, outside the elements H, C, N, O, F"):
        oracle.energy(batch.numbers, batch.positions, batch.mask)


def test_non_finite_positions_are_a_status(oracle, batch):
    positions = batch.positions.clone()
    positions[1, 2, 0] = float("nan")
    result = oracle(batch.with_positions(positions))
    assert result.ok.tolist() == [True, False, True, True]
    assert torch.isfinite(result.forces[[0, 2, 3]]).all()


def test_bad_options_are_refused(model):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        LearnedOracle(model, batch_size=0)
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.float64"):
        LearnedOracle(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="one of each per element"):
        EnergyConfig(elements=(1, 6))


# ---------------------------------------------------------------------- files
def test_a_saved_model_gives_the_same_numbers(model, oracle, batch, tmp_path):
    path = save_energy_model(model, tmp_path / "model.safetensors")
    loaded = LearnedOracle(path, dtype=torch.float64)
    assert loaded.model.config == model.config
    torch.testing.assert_close(loaded(batch).energy, oracle(batch).energy, rtol=0, atol=0)
    assert dict(loaded.atom_energies) == dict(zip(model.config.elements, ATOM_ENERGIES, strict=True))


def test_making_an_oracle_leaves_the_model_trainable(model):
    LearnedOracle(model)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_damaged_and_foreign_files_are_refused(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no energy model 'nothing'"):
        load_energy_model("nothing")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_energy_model(tmp_path / "text.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata={"format": "other/1"})
    with pytest.raises(ValueError, match="not an energy model: format 'other/1'"):
        load_energy_model(tmp_path / "foreign.safetensors")


def test_a_changed_bundled_file_is_refused(tmp_path, monkeypatch):
    for suffix in (".safetensors", ".json"):
        shutil.copy(learned.ASSETS / f"{learned.BUNDLED}{suffix}", tmp_path)
    path = tmp_path / f"{learned.BUNDLED}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(learned, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match="does not match its passport"):
        LearnedOracle()


# ---------------------------------------------------------------------- labels
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_perturbations_are_reproducible_and_keep_the_source(kind):
    data = load_dataset("bundled", split="validation").subset(slice(0, 20))
    before = data.positions.copy()
    first, again = (perturb(data, 20, PERTURBATIONS[kind], np.random.default_rng(5)) for _ in range(2))
    for (z, x), (z_again, x_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(z, z_again)
        np.testing.assert_array_equal(x, x_again)
        assert x.shape == (len(z), 3)
    np.testing.assert_array_equal(data.positions, before)


def test_stretched_changes_distances_across_one_bond_only(monkeypatch):
    monkeypatch.setattr(geometries, "_noisy", lambda molecule, sigma, rng: molecule)
    ethanol = MoleculeBatch.from_smiles("CCO").arrays()[0]
    original = pdist(ethanol[1])
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers, positions = geometries.stretched(ethanol, rng)
        moved = np.flatnonzero(np.abs(positions - ethanol[1]).max(1) > 1e-12)
        assert 0 < len(moved) <= len(numbers) / 2
        np.testing.assert_allclose(pdist(positions[moved]), pdist(ethanol[1][moved]), atol=1e-5)
        assert not np.allclose(pdist(positions), original)


def test_fragments_are_closed_small_molecules(monkeypatch):
    monkeypatch.setattr(geometries, "_noisy", lambda molecule, sigma, rng: molecule)
    ethanol = MoleculeBatch.from_smiles("CCO").arrays()[0]
    found = MoleculeBatch.from_arrays(geometries.fragment(ethanol, np.random.default_rng(k)) for k in range(20))
    assert {found.formula(i) for i in range(20)} == {"CH4", "H2O"}
    lengths = {"CH4": covalent_radii[6] + covalent_radii[1], "H2O": covalent_radii[8] + covalent_radii[1]}
    for i, (numbers, positions) in enumerate(found.arrays()):
        heavy = positions[numbers > 1][0]
        # the cap is the last atom
        assert np.linalg.norm(positions[-1] - heavy) == pytest.approx(lengths[found.formula(i)], abs=1e-5)


def test_contact_puts_two_atoms_below_their_covalent_distance():
    ethanol = MoleculeBatch.from_smiles("CCO").arrays()[0]
    sizes = set()
    for k in range(20):
        numbers, positions = geometries.contact(ethanol, np.random.default_rng(k))
        distance = np.linalg.norm(positions[:, None] - positions, axis=-1) + 9 * np.eye(len(numbers))
        relative = distance / (covalent_radii[numbers][:, None] + covalent_radii[numbers])
        assert relative.min() < 0.96
        sizes.add(len(numbers))
    assert sizes == {9, 10}


def test_edited_changes_the_composition_and_adds_no_clash():
    data = load_dataset("bundled", split="validation").subset(slice(0, 40))
    molecules = perturb(data, 40, geometries.edited, np.random.default_rng(0))
    originals = [data.numbers[s : s + n].tolist() for s, n in zip(data.starts, data.sizes, strict=True)]
    assert any(len(z) not in data.sizes for z, _ in molecules) or len({len(z) for z, _ in molecules}) > 5
    compositions = [sorted(z.tolist()) for z, _ in molecules]
    assert sum(sorted(o) not in compositions for o in originals) > 20
    assert any(sum(z) % 2 for z, _ in molecules)  # radicals are wanted


def test_label_set_round_trip_subset_and_batch(pair_labels, tmp_path):
    path = pair_labels.save(tmp_path / "labels.npz")
    loaded = LabelSet.load(path)
    assert loaded.counts() == {"thermal": 300}
    chosen = loaded.subset(np.array([7, 3]))
    batch, energy, forces = chosen.batch(torch.tensor([1, 0]))
    direct = Pairs()(batch.to(dtype=torch.float64))
    torch.testing.assert_close(energy, direct.energy, rtol=0, atol=1e-4)
    torch.testing.assert_close(forces.double(), direct.forces, rtol=0, atol=1e-4)
    assert batch.sizes.tolist() == [int(loaded.sizes[3]), int(loaded.sizes[7])]
    with pytest.raises(FileNotFoundError, match="no label file"):
        LabelSet.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    with pytest.raises(ValueError, match="has no energy"):
        LabelSet.load(tmp_path / "other.npz")


def test_labels_above_the_force_limit_are_left_out(batch):
    molecules = batch.arrays()
    everything = label(Pairs(), {"a": molecules}, progress=False)
    largest = [np.linalg.norm(f, axis=1).max() for f in np.split(everything.forces, everything.starts[1:])]
    limit = float(np.median(largest))
    some = label(Pairs(), {"a": molecules}, max_force=limit, progress=False)
    assert len(some) == sum(f <= limit for f in largest) < len(everything)
    with pytest.raises(ValueError, match="none of 4 geometries could be labelled by the pairs oracle"):
        label(Pairs(), {"a": molecules}, max_force=1e-9, progress=False)


def test_make_labels_keeps_finished_parts(tmp_path):
    plan = LabelPlan(
        minimum=4,
        thermal=6,
        strained=0,
        stretched=3,
        mmff94=3,
        edited=3,
        contact=2,
        fragment=2,
        diatomic=2,
        descents=4,
        max_force=1e6,
        max_force_broken=1e6,
    )
    oracle = Pairs()
    first = make_labels(oracle, tmp_path, plan=plan, progress=False)
    expected = {"minimum": 4, "thermal": 6, "stretched": 3, "mmff94": 3, "edited": 3, "diatomic": 2}
    assert first.counts() == {**expected, "contact": 2, "fragment": 2}
    calls = oracle.calls
    second = make_labels(oracle, tmp_path, plan=plan, improve=Pairs(), progress=False)
    assert oracle.calls == calls + 1  # only the new part
    assert second.counts()["descent"] == 3  # there are no more edited geometries to start from
    np.testing.assert_array_equal(second.subset(second.kind != "descent").energy, first.energy)
    with pytest.raises(ValueError, match="another oracle, split or plan"):
        make_labels(oracle, tmp_path, plan=replace(plan, seed=1), progress=False)


EMPTY = LabelPlan(**dict.fromkeys((*PERTURBATIONS, "variations", "descents"), 0))


def test_labels_of_another_method_are_not_taken_for_these(tmp_path):
    plan = replace(EMPTY, minimum=2)
    first = make_labels(load_oracle("xtb", workers=0), tmp_path / "a", plan=plan, progress=False)
    # neither another number of workers nor a cache is another method
    cached = load_oracle("xtb", workers=1, cache=tmp_path / "cache.sqlite")
    again = make_labels(cached, tmp_path / "a", plan=plan, progress=False)
    np.testing.assert_array_equal(first.energy, again.energy)
    with pytest.raises(ValueError, match="another oracle, split or plan"):
        make_labels(load_oracle("xtb", workers=0, method="GFN1-xTB"), tmp_path / "a", plan=plan, progress=False)
    network = EnergyModel(EnergyConfig(network=NETWORK))
    make_labels(LearnedOracle(network), tmp_path / "b", plan=plan, progress=False)
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="another oracle, split or plan"):
        make_labels(LearnedOracle(network), tmp_path / "b", plan=plan, progress=False)


def test_a_kind_that_is_not_planned_is_left_out(tmp_path):
    plan = replace(EMPTY, edited=3, samples=2, clean_per_sample=1, generation_steps=10, max_force_broken=1e9)
    model = GaussianDenoiser(DenoiserConfig(features=8, layers=1, timesteps=50, size_histogram=((3, 1), (5, 2))))
    labels = make_labels(Pairs(), tmp_path, plan=plan, models=[model], improve=Pairs(), progress=False)
    assert set(labels.counts()) == {"edited", "sample", "clean"}


class GaussianDenoiser(Denoiser):
    """The exact denoiser of data that are standard normal: eps = sigma_t z_t."""

    def eps(self, z, t, mask, *, context=None, layout=None):
        return self.schedule.alpha_sigma(t)[1].to(z.dtype).view(-1, 1, 1) * z


def test_samples_and_clean_estimates_of_a_model_are_labelled(tmp_path):
    model = GaussianDenoiser(DenoiserConfig(features=8, layers=1, timesteps=50, size_histogram=((3, 1), (5, 2))))
    zero = dict.fromkeys((*PERTURBATIONS, "descents"), 0)
    plan = LabelPlan(**zero, samples=6, clean_per_sample=3, variations=4, generation_steps=10, max_force_broken=1e6)
    oracle = Pairs(min_distance=1e-3)
    labels = make_labels(oracle, tmp_path, plan=plan, models=[model], progress=False)
    assert labels.counts() == {"sample": 6, "clean": 18, "varied": 4}
    assert set(labels.subset(labels.kind == "sample").sizes.tolist()) <= {3, 5}


def test_descent_goes_downhill_and_labels_a_point_on_the_way():
    data = load_dataset("bundled", split="train").subset(slice(0, 10))
    starts = perturb(data, 10, PERTURBATIONS["thermal"], np.random.default_rng(0))
    oracle = Pairs()
    found = geometries.descend(oracle, starts, np.random.default_rng(1))
    before, after = (oracle(MoleculeBatch.from_arrays(m)).energy for m in (starts, found))
    assert (after < before).all()


# ---------------------------------------------------------------------- training
CONFIG = FitConfig(
    network=NETWORK, steps=100, batch_size=16, learning_rate=1e-2, warmup=10, log_every=10, validate_every=50
)
CHARGE = {z: float(z) for z in (1, 6, 7, 8, 9)}  # the pairs' own atom energies


def test_fit_learns_forces_and_energies(pair_labels, tmp_path):
    train, held_out = pair_labels.subset(slice(0, 260)), pair_labels.subset(slice(260, 300))
    short = fit_oracle(replace(CONFIG, steps=1), train, tmp_path / "a", atom_energies=CHARGE, progress=False)
    model = fit_oracle(CONFIG, train, tmp_path / "b", atom_energies=CHARGE, validation=held_out, progress=False)
    before, after = errors(short, held_out)["thermal"], errors(model, held_out)["thermal"]
    assert after["force_mae"] < 0.5 * before["force_mae"]
    assert after["energy_mae"] < 0.5 * before["energy_mae"]
    rows = read_json_lines(tmp_path / "b" / "log.jsonl")
    assert [r["step"] for r in rows] == list(range(9, 100, 10))
    assert rows[-1]["validation"]["thermal"] == pytest.approx(after)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


def test_errors_are_those_of_the_oracle(pair_labels, model):
    few = pair_labels.subset(slice(0, 12))
    found = errors(model, few, batch_size=5)["thermal"]
    oracle = LearnedOracle(model, dtype=torch.float64)
    batch, energy, forces = few.batch(np.arange(12))
    result = oracle(batch.to(dtype=torch.float64))
    assert found["force_mae"] == pytest.approx(float((result.forces - forces)[batch.mask].abs().mean()), rel=1e-4)
    assert found["energy_mae"] == pytest.approx(float(((result.energy - energy).abs() / batch.sizes).mean()), rel=1e-4)
    assert found["molecules"] == 12


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_stopped_run_resumes_to_the_same_numbers(pair_labels, tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer, steps=16, checkpoint_every=8, log_every=4)
    whole = fit_oracle(config, pair_labels, tmp_path / "whole", atom_energies=CHARGE, progress=False)
    # stops after one step, as no time is left
    fit_oracle(config, pair_labels, tmp_path / "cut", atom_energies=CHARGE, max_seconds=0, progress=False)
    assert len(torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]) > 0
    resumed = fit_oracle(config, pair_labels, tmp_path / "cut", atom_energies=CHARGE, progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    fewer = pair_labels.subset(slice(0, 200))
    with pytest.raises(ValueError, match=r"other settings \(labels\)"):
        fit_oracle(config, fewer, tmp_path / "cut", atom_energies=CHARGE, progress=False)
    changed = replace(config, learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate\)"):
        fit_oracle(changed, pair_labels, tmp_path / "cut", atom_energies=CHARGE, progress=False)


def test_a_run_of_before_there_was_a_choice_of_optimizers_goes_on(pair_labels, tmp_path):
    config = replace(CONFIG, steps=2)
    fit_oracle(config, pair_labels, tmp_path, atom_energies=CHARGE, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["config"]["optimizer"]
    torch.save(state, tmp_path / "checkpoint.pt")
    fit_oracle(config, pair_labels, tmp_path, atom_energies=CHARGE, progress=False)
    with pytest.raises(ValueError, match=r"other settings \(optimizer\)"):
        fit_oracle(replace(config, optimizer="muon"), pair_labels, tmp_path, atom_energies=CHARGE, progress=False)


def test_a_fit_can_start_from_a_model(pair_labels, model, tmp_path):
    config = replace(CONFIG, steps=1, learning_rate=1e-12)
    same = fit_oracle(config, pair_labels, tmp_path / "a", atom_energies=CHARGE, start=model, progress=False)
    assert same.config == replace(model.config, contact=config.contact)
    for a, b in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    other = replace(config, network=replace(NETWORK, layers=3))
    with pytest.raises(ValueError, match="another network"):
        fit_oracle(other, pair_labels, tmp_path / "b", atom_energies=CHARGE, start=model, progress=False)


def test_labels_with_foreign_elements_are_refused(pair_labels, tmp_path):
    with pytest.raises(ValueError, match=r"the labels hold .*O.* not in elements"):
        fit_oracle(replace(CONFIG, elements=(1, 6, 7)), pair_labels, tmp_path, atom_energies=CHARGE, progress=False)


def test_shares_of_two_processes_add_up_to_the_whole_batch(pair_labels, model):
    """The mean of the two halves' gradients is the gradient of the batch, as average_gradients assumes."""
    from elign_lab.oracles import fit

    indices = torch.arange(15)

    def gradients(index: int, processes: int) -> list[torch.Tensor]:
        copy = EnergyModel(model.config)
        copy.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.0)
        accelerator = Accelerator(cpu=True)
        share = _Share(index, processes, accelerator)
        config = replace(CONFIG, max_grad_norm=1e9)
        fit._train_step(copy, pair_labels, indices, config, share, optimizer, list(copy.parameters()))
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in copy.parameters()]

    whole, halves = gradients(0, 1), (gradients(0, 2), gradients(1, 2))
    for w, a, b in zip(whole, *halves, strict=True):
        torch.testing.assert_close((a + b) / 2, w, rtol=1e-3, atol=1e-5)


class _Share:
    """One of several processes, without the others: the gradients are not averaged."""

    def __init__(self, process_index: int, num_processes: int, accelerator: Accelerator) -> None:
        self.process_index, self.num_processes, self.device = process_index, num_processes, accelerator.device

    def reduce(self, flat: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return flat


def test_bundled_passport_names_its_making():
    passport = json.loads((learned.ASSETS / f"{learned.BUNDLED}.json").read_text())
    assert passport["file"] == f"{learned.BUNDLED}.safetensors"
    assert {"sha256", "labels", "errors", "command", "licence"} <= passport.keys()
