"""Every statement of the theory holds within 3 standard errors, and every broken variant fails by more than 5."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from elign_lab.alignment import AlignConfig, Trainer, log_density, rollout
from elign_lab.checkpoints import load_model
from elign_lab.datasets import load_dataset
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.sampling import ancestral
from elign_lab.teaching.explore import explore
from elign_lab.theory import (
    STATEMENTS,
    Check,
    conformers,
    error_bound,
    figures,
    force,
    points,
    shaping,
    statement,
    symmetry,
    tilt,
)
from elign_lab.theory.alchemical import AlchemicalCosines, alchemical_cosines, mean_by_time, trained_time
from elign_lab.theory.check import mean_check
from elign_lab.theory.mixture import GaussianMixture
from elign_lab.theory.springs import PairSprings
from elign_lab.theory.symmetry import perturbed, small_denoiser, subspace_basis

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ANI_WEIGHTS = Path(__file__).parents[2].parent / "shared" / "data" / "ani-2x" / "ani-2x_8x"
needs_ani = pytest.mark.skipif(not ANI_WEIGHTS.is_dir(), reason="the ANI-2x weights are not part of the repository")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small matrices: threads that wait for each other cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- the registry
@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_holds(name):
    check = STATEMENTS[name].check()
    assert check.holds, f"{name}: {check}"


@pytest.mark.parametrize("name", STATEMENTS)
def test_broken_variant_fails(name):
    check = STATEMENTS[name].broken()
    assert check.fails, f"{name}, {STATEMENTS[name].mistake}: {check}"


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_is_shown_in_its_notebook(name):
    entry = STATEMENTS[name]
    cells = nbformat.read(NOTEBOOKS / entry.notebook, as_version=4).cells
    tagged = [c for c in cells if entry.cell in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{entry.notebook} has {len(tagged)} cells with the tag {entry.cell!r}"
    assert name in tagged[0].source
    assert tagged[0].outputs, f"the cell {entry.cell!r} has no output"


def test_statements_are_documented():
    for name, entry in STATEMENTS.items():
        assert all((entry.text, entry.source, entry.mistake)), name
    assert len({s.cell for s in STATEMENTS.values()}) == len(STATEMENTS)
    with pytest.raises(ValueError, match="unknown statement 'nonsense'"):
        statement("nonsense")


# ---------------------------------------------------------------------- Check
def test_check_margin_and_verdicts():
    assert Check(1.2, 1.0, 0.1).margin == pytest.approx(2)
    assert Check(1.2, 1.0, 0.1).holds
    assert Check(1.6, 1.0, 0.1).fails
    between = Check(1.4, 1.0, 0.1)
    assert not between.holds
    assert not between.fails
    assert Check(0.0, 1.0, 0.01, "<=").holds
    assert Check(2.0, 1.0, 0.01, "<=").fails
    assert not Check(math.nan, 1.0, 0.1).holds
    with pytest.raises(ValueError, match="must be positive"):
        Check(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="two samples"):
        mean_check(np.ones(1), 1.0)


# ---------------------------------------------------------------------- symmetry
def test_the_law_of_the_bundled_aligned_model_is_invariant():
    """Rotated noise gives the rotated molecule after a real alignment too, and its types; 12 steps, float64."""
    model, rotation = load_model("edm-mini-aligned").double(), symmetry.random_rotation(3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    noise = [model.noise(mask, generator) for _ in range(14)]

    def last(draws):
        *_, record = ancestral(model, mask, grid=model.schedule.grid(12), noise=iter(draws), decode=False)
        return record.z_s

    plain, turned = last(noise), last([symmetry.rotated(xi, rotation) for xi in noise])
    assert float((turned - symmetry.rotated(plain, rotation)).abs().max() / plain.abs().max()) < 1e-8
    assert float((turned - plain).abs().max() / plain.abs().max()) > 0.1


# ---------------------------------------------------------------------- theorem 1
def test_tilt_refuses_what_is_no_distribution():
    with pytest.raises(ValueError, match="sum to 1"):
        tilt.tilted(np.array([0.5, 0.6]), np.zeros(2), 1.0)
    with pytest.raises(ValueError, match="energy has shape"):
        tilt.tilted(np.array([0.5, 0.5]), np.zeros(3), 1.0)


def test_tilt_keeps_the_support_of_the_base():
    q = tilt.tilted(np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, -100.0]), 5.0)
    assert q[2] == 0
    assert tilt.objective(np.array([0.4, 0.4, 0.2]), np.array([0.5, 0.5, 0.0]), np.zeros(3), 1.0) == -math.inf


def test_no_law_beats_the_tilt():
    rng = np.random.default_rng(0)
    q0, energy = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    best = tilt.optimum(q0, energy, 2.0)
    values = [tilt.objective(rng.dirichlet(np.ones(6)), q0, energy, 2.0) for _ in range(500)]
    assert max(values) < best


def test_point_denoiser_is_exact_before_training():
    """The base policy's noise prediction is the mixture's score, in two dimensions too."""
    mixture = GaussianMixture.of((0.4, (-1.0, 0.5), 0.3), (0.6, (1.0, 0.0), 0.5))
    model = points.PointDenoiser(mixture)
    h = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    z = torch.nn.functional.pad(h, (3, 0)).unsqueeze(1)
    for t in (1, 8, 16):
        alpha, sigma = model.schedule.alpha_sigma(t)
        (score,) = torch.autograd.grad(mixture.noised(alpha, sigma).log_prob(h).sum(), h, retain_graph=True)
        eps = model.eps(z, torch.full((50,), t), torch.ones(50, 1, dtype=torch.bool))
        assert torch.allclose(eps[:, 0, 3:], -sigma * score)
        assert torch.all(eps[..., :3] == 0)


def test_alignment_in_the_plane_reaches_the_tilt():
    """Mean energy after FED-GRPO against the weighted base sample, within 3 standard errors, and against half the beta.

    Fewer iterations than these have not converged.
    """
    three = GaussianMixture.of((0.4, (-1.0, -0.6), 0.4), (0.4, (1.0, -0.6), 0.4), (0.2, (0.0, 1.1), 0.4))
    energy = lambda x: 2 * (x.norm(dim=1) - 1.1) ** 2 - 0.8 * x[:, 1]  # noqa: E731
    before = energy(points.PointDenoiser(three).terminal(6000))
    after = energy(points.align_points(three, energy, 1.0, iterations=40).terminal(6000))

    def difference(beta):
        weights = torch.softmax(-beta * before, 0)
        tilt = float(weights @ before)
        error = float((weights * (before - tilt)).square().sum().sqrt())
        return Check(float(after.mean()), tilt, math.hypot(error, float(after.std()) / len(after) ** 0.5))

    assert difference(1.0).holds, difference(1.0)
    assert difference(0.5).fails, difference(0.5)


def test_aligned_mass_follows_beta():
    """The mass of the lower well grows with beta, as the grid's best policy says (three values of beta)."""
    model = points.PointDenoiser(points.WELLS)
    for beta in (0.5, 1.0, 2.0):
        laws = points.grid_laws(model, points.well_energy, beta)
        z = points.aligned_wells(beta).terminal(4000, seed=2)[:, 0]
        expected = float(laws.path_kl[laws.x < 0].sum())
        check = mean_check((z < 0).double().numpy(), expected)
        assert abs(check.left - expected) < 0.03, f"beta {beta}: {check}"


def test_grid_base_law_is_that_of_the_sampler():
    model = points.PointDenoiser(points.WELLS)
    laws = points.grid_laws(model, points.well_energy, 1.0)
    for law in (laws.base, laws.tilt, laws.path_kl, laws.state_kl):
        assert law.sum() == pytest.approx(1)
    z = model.terminal(8000, seed=3)[:, 0].numpy()
    assert mean_check(np.cos(1.5 * z), float(laws.base @ np.cos(1.5 * laws.x))).holds


def test_effective_beta_depends_on_the_spread_of_a_group_above_the_floor():
    config = points.point_config(2.0, iterations=10, members=64)
    assert points.effective_beta(config, spread=1.0) == pytest.approx(2.0)
    paper = AlignConfig()
    assert points.effective_beta(paper, 0.2) == pytest.approx(points.effective_beta(paper, 0.1) / 2)
    assert points.effective_beta(paper, 0.0) == pytest.approx(0.05 * 5 / 6 / (0.08 * 1e-3))
    with pytest.raises(ValueError, match="beta must be positive"):
        points.point_config(0.0, iterations=1)


def test_path_kl_is_zero_for_the_reference_and_positive_after_a_change():
    model = points.PointDenoiser(points.WELLS)
    rollouts = rollout(model, [1], 16, seed=0, shared_prefix=False)
    assert float(points.path_kl(model, rollouts).abs().max()) == 0
    other = points.PointDenoiser(points.WELLS)
    torch.nn.init.constant_(other.network.weight, 0.3)
    assert float(points.path_kl(other, rollouts).min()) > 0


def test_plain_and_path_trainer_differ_only_in_the_return():
    config = points.point_config(1.0, iterations=2, members=32)
    oracle = points.PointOracle(points.well_energy, 1)
    path = points.PathKLTrainer(points.PointDenoiser(points.WELLS), oracle, config)
    rollouts = path.roll_out(0)
    # at the first iteration policy and reference agree, so that the KL of the later steps is zero
    assert torch.equal(path.judge(rollouts).return_to_go, Trainer.judge(path, rollouts).return_to_go)
    assert isinstance(path.config, AlignConfig)


# ---------------------------------------------------------------------- conformers
def test_butane_torsion_energy_is_that_of_the_oracle():
    with load_oracle("xtb", workers=0) as oracle:
        energy = conformers.torsion_energy(*conformers.BUTANE, oracle, points=13)
    at = lambda degrees: float(energy(torch.tensor([[(degrees - 180) / 60]], dtype=torch.float64)))  # noqa: E731
    assert energy.fit_error < 5e-3
    # anti is the minimum, gauche about 0.03 eV above it, syn the highest (GFN2-xTB)
    assert at(180) < at(65) < at(120) < at(0)
    assert 0.01 < at(65) - at(180) < 0.06


def test_torsion_input_is_checked():
    with pytest.raises(ValueError, match="no torsion"):
        conformers.torsion_samples("CCCC", (0, 2, 1, 3), 4)
    with pytest.raises(ValueError, match="temperature"):
        conformers.inverse_temperature(0)
    assert conformers.inverse_temperature(300) == pytest.approx(38.68, abs=0.01)


def test_weight_share_is_one_for_equal_energies_and_one_sample_for_a_deep_well():
    assert conformers.weight_share(np.zeros(10), 40.0) == pytest.approx(1)
    assert conformers.weight_share(np.array([-5.0] + [0.0] * 9), 40.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="got 2, of which 1 are not"):
        conformers.weight_share(np.array([1.0, np.nan]), 40.0)


def test_whole_conformers_lose_more_weight_at_a_lower_temperature():
    energies = conformers.conformer_energies("CCCC", 40, load_oracle("learned"))
    shares = [conformers.weight_share(energies, conformers.inverse_temperature(t)) for t in (300, 3000)]
    assert energies.shape == (40,)
    assert shares[0] < 0.5 < shares[1]


# ---------------------------------------------------------------------- theorem 2
def test_bounds_and_their_inverse():
    assert error_bound.paper_bound(2.0, 0.1) == pytest.approx(math.tanh(0.2))
    assert error_bound.paper_bound(error_bound.beta_for(0.3, 0.05), 0.05) == pytest.approx(0.3)
    assert error_bound.half_spread(np.array([5.0, 5.4])) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="finite energy"):
        error_bound.half_spread(np.array([1.0, np.nan]))


def test_no_error_of_the_energy_exceeds_the_sharp_bound():
    rng = np.random.default_rng(1)
    for _ in range(300):
        q0, beta, eps = rng.dirichlet(np.full(4, 0.5)), rng.uniform(0.1, 4), rng.uniform(0.01, 1)
        wrong = eps * rng.choice([-1.0, 1.0], size=4)
        tv = error_bound.total_variation(q0, tilt.tilted(q0, wrong, beta))
        assert tv <= error_bound.sharp_bound(beta, eps) + 1e-12


def test_real_energy_errors_of_two_xtb_methods():
    molecules = MoleculeBatch.from_smiles(["CCO", "CC=O", "C1CC1", "CN"])
    with load_oracle("xtb", workers=0) as second, load_oracle("xtb", method="GFN1-xTB", workers=0) as first:
        difference = error_bound.energy_difference(first, second, molecules)
    assert difference.shape == (4,)
    assert 0 < error_bound.half_spread(difference) < 0.5


def test_energy_error_orders_its_quantiles_and_allows_more_beta_for_the_smaller():
    found = error_bound.EnergyError.of(np.array([0.0, 0.01, 0.02, 0.03, 1.0]))
    assert found.uniform == pytest.approx(0.5)
    assert found.half < found.ninety
    betas = found.betas(0.1)
    assert betas["half"] > betas["ninety"]
    assert math.tanh(betas["uniform"] * found.uniform) == pytest.approx(0.1)


def test_an_energy_error_needs_one_energy_for_each_molecule():
    molecules, learned = MoleculeBatch.from_smiles(["CCO", "CC=O", "CN"]), load_oracle("learned")
    own = learned.formation_energy_per_atom(learned(molecules).energy, molecules.numbers, molecules.mask).numpy()
    given = np.where([True, False, True], own - 0.25, np.nan)
    assert error_bound.energy_difference(learned, given, molecules) == pytest.approx([0.25, 0.25], abs=1e-6)
    with pytest.raises(ValueError, match="expected 3 energies"):
        error_bound.energy_difference(learned, given[:2], molecules)
    with pytest.raises(ValueError, match="no molecule that both"):
        error_bound.energy_difference(learned, np.full(3, np.nan), molecules)


def test_bundled_ani_energies_are_energies_of_the_test_split():
    """Right order and units: with each element's own energy taken out, ANI-2x agrees with the bundled force field."""
    test = load_dataset("bundled", split="test", geometry="mmff94")
    energies, chosen = error_bound.bundled_ani_energies(), np.arange(0, len(test), len(test) // 60)
    assert energies.shape == (len(test),)
    molecules, learned = test.batch(chosen), load_oracle("learned")
    found = error_bound.energy_difference(learned, energies[chosen], molecules, fit_references=True)
    shuffled = error_bound.energy_difference(learned, energies[chosen][::-1], molecules, fit_references=True)
    assert error_bound.EnergyError.of(found).half < 0.03 < error_bound.EnergyError.of(shuffled).half


@needs_ani
def test_bundled_ani_energies_can_be_computed_again():
    test = load_dataset("bundled", split="test", geometry="mmff94")
    chosen, ani = np.arange(0, len(test), len(test) // 10), load_oracle("ani", weights=ANI_WEIGHTS)
    molecules = test.batch(chosen)
    energy = ani.formation_energy_per_atom(ani(molecules).energy, molecules.numbers, molecules.mask)
    assert energy.numpy() == pytest.approx(error_bound.bundled_ani_energies()[chosen], abs=1e-5)


@needs_ani
def test_learned_oracle_is_closer_to_its_teacher_than_to_another_level_of_theory():
    """The real eps of theorem 2: against GFN2-xTB, which labelled the training data, and against ANI-2x."""
    test = load_dataset("bundled", split="test", geometry="mmff94")
    molecules, learned = test.batch(np.arange(0, len(test), len(test) // 30)[:30]), load_oracle("learned")
    with load_oracle("xtb", workers=0) as xtb:
        teacher = error_bound.EnergyError.of(error_bound.energy_difference(learned, xtb, molecules))
    ani = load_oracle("ani", weights=ANI_WEIGHTS)
    raw, fitted = (
        error_bound.EnergyError.of(error_bound.energy_difference(learned, ani, molecules, fit_references=fit))
        for fit in (False, True)
    )
    assert teacher.uniform < 0.05 < raw.uniform
    # what is left when the elements' own energies are taken out is a property of bonds, and much smaller
    assert fitted.uniform < raw.uniform / 3
    assert teacher.half < fitted.half


# ---------------------------------------------------------------------- PBRS
def test_shaped_values_are_shifted_by_the_potential():
    """Ng et al.: Q*_shaped(s, a) = Q*(s, a) - Phi(s)."""
    mdp = shaping.TabularMDP.random(seed=5)
    potential = np.linspace(-2, 2, len(mdp.rewards))
    assert np.allclose(mdp.shaped(potential).optimal_values(), mdp.optimal_values() - potential[:, None], atol=1e-9)


def test_telescoping_on_rollouts_of_the_bundled_model_judged_by_xtb():
    try:
        model = load_model("edm-mini")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with load_oracle("xtb", workers=0) as oracle:
        rollouts = rollout(model.double(), [9], 4, steps=40, skip_prefix=34, seed=0)
        assert shaping.telescoping_gap(model, oracle, rollouts, gamma=0.9) < 1e-8


def test_shaping_lowers_the_variance_of_the_gradient_per_rollout():
    samples = shaping.gradient_samples(1500, 0)
    ratio, error = samples.variance_ratio()
    assert ratio + 3 * error < 1
    assert samples.oracle_calls == (1, 1 + points.TIMESTEPS)
    assert samples.variance_ratio_per_call() == pytest.approx(ratio * samples.oracle_calls[1])


def test_jackknife_error_of_a_variance_ratio_agrees_with_the_normal_theory():
    """For independent normal samples the ratio of two variances has the relative error sqrt(4 / n)."""
    rng = np.random.default_rng(0)
    n = 400
    shaped, terminal = rng.normal(size=(n, 1)), rng.normal(scale=2, size=(n, 1))
    ratio, error = shaping.GradientSamples(terminal, shaped, shaped, (1, 5)).variance_ratio()
    assert ratio == pytest.approx(0.25, abs=3 * error)
    assert error / ratio == pytest.approx((4 / n) ** 0.5, rel=0.3)


def test_centred_signals_have_no_mean_in_any_group_and_leave_failures_out():
    generator = torch.Generator().manual_seed(0)
    potential = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    terminal = torch.randn(6, generator=generator, dtype=torch.float64)
    ok = torch.tensor([True] * 5 + [False])
    terminal[5] = math.nan
    signals = shaping.centred_signals(potential, terminal, ok, members=3)
    for values in signals.values():
        assert values.view(2, 3, 4).sum(1).abs().max() < 1e-9
        assert not values[5].any()
    expected = terminal[:3].unsqueeze(1) - potential[:3]
    assert torch.allclose(signals["shaped"][:3], expected - expected.mean(0))


def test_model_gradient_is_that_of_the_log_density():
    """The gradient of a group equals sum_t A_t grad log pi, with log pi by mdp.log_density, by finite differences."""
    model, oracle = small_denoiser(), PairSprings()
    found = shaping.model_gradient_samples(model, oracle, [5], 3, skip_prefix=6, seed=1)
    rollouts = rollout(model, [5], 3, skip_prefix=6, seed=1)
    potential, terminal = shaping.rollout_potentials(model, oracle, rollouts)
    signal = shaping.centred_signals(potential, terminal, torch.ones(3, dtype=torch.bool), 3)["shaped"]
    weight = next(p for p in model.parameters() if p.requires_grad)

    def objective(change):
        with torch.no_grad():
            weight.view(-1)[0] += change
            total = 0.0
            for k, (t, s) in enumerate(itertools.pairwise(rollouts.times)):
                step = model.schedule.transition(t, s)
                old = model.posterior_mean(rollouts.states[k], rollouts.eps[k], step)
                z_s = old + step.sigma * rollouts.noise[k]
                eps = model.eps(rollouts.states[k], torch.full((3,), t), rollouts.mask)
                new = model.posterior_mean(rollouts.states[k], eps, step)
                total += float((signal[:, k] * log_density(z_s, new, step.sigma, rollouts.mask)).sum()) / 3
            weight.view(-1)[0] -= change
        return total

    slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
    assert abs(slope) > 1e-6
    assert float(found.shaped[0, 0]) == pytest.approx(slope, rel=1e-4)
    assert found.oracle_calls == (1, 1 + rollouts.steps)


def test_plug_in_gain_of_a_model_over_itself_is_zero_and_the_drift_is_subtracted():
    model, oracle = small_denoiser(), PairSprings()
    same = shaping.plug_in_gain(model, model, oracle, [5, 6], 3, skip_prefix=5)
    assert np.abs(same.terminal).max() < 1e-9
    assert np.abs(same.drift).max() < 1e-9
    other = shaping.plug_in_gain(model, perturbed(model, 0.05), oracle, [5, 6], 3, skip_prefix=5)
    assert np.abs(other.drift).min() > 1e-6
    assert np.allclose(other.plug_in, other.terminal - other.drift)


# ---------------------------------------------------------------------- theorem 5 and F.1
def test_position_step_reports_a_failed_geometry():
    with pytest.raises(ValueError, match=r"under the limit of .*; use a smaller sigma"):
        force.position_step(force.WATER, load_oracle("xtb", workers=0, min_distance=1.2), [0.01], beta=1.0)
    two = MoleculeBatch.from_smiles(["C", "O"])
    with pytest.raises(ValueError, match="one molecule"):
        force.position_step(two, PairSprings(), [0.01], beta=1.0)


@pytest.mark.parametrize("order", [3, 4])
def test_order_of_the_remainder_is_read_off_a_step(order):
    sigmas = np.array([0.01, 0.02, 0.04])
    ratio, error = 1 - 5 * sigmas ** (order - 2), np.array([0.001, 0.02, 0.3])
    step = force.TiltedStep(sigmas, ratio, error, ratio, error, torch.zeros(3, 3), 1)
    found, spread = force.step_order(step)
    assert found == pytest.approx(order)
    assert spread > 0
    alone = force.TiltedStep(*(values[:1] for values in (sigmas, ratio, error, ratio, error)), torch.zeros(3, 3), 1)
    with pytest.raises(ValueError, match="two sigmas or more, got 1"):
        force.step_order(alone)


def test_remainder_of_a_molecule_and_a_real_energy_is_of_the_theorems_order_or_better():
    """Water and GFN2-xTB, at sigmas small enough for the leading order: near 4, and not the 2 of no force."""
    with load_oracle("xtb", workers=0) as oracle:
        step = force.position_step(force.WATER, oracle, [0.01, 0.02, 0.03], beta=4.0, pairs=80)
    order, error = force.step_order(step)
    assert error < 0.5
    assert order > 3 - error
    assert order == pytest.approx(4, abs=3 * error)


def test_springs_forces_are_minus_the_gradient():
    oracle, h = PairSprings(stiffness=2.0), 1e-5
    batch = MoleculeBatch.from_smiles("CO").to(dtype=torch.float64)
    moved = [batch.positions.clone(), batch.positions.clone()]
    moved[0][0, 1, 2] += h
    moved[1][0, 1, 2] -= h
    up, down = (oracle(batch.with_positions(x)).energy for x in moved)
    assert float(oracle(batch).forces[0, 1, 2]) == pytest.approx(float((down - up) / (2 * h)), rel=1e-6)


def test_alchemical_cosines_are_given_for_every_analysed_step_and_molecule():
    base = small_denoiser()
    found = alchemical_cosines(base, perturbed(base, 0.02), PairSprings(), [6] * 30, skip=2, stride=4)
    assert found.cosine.shape == found.control.shape == (len(found.times), 30)
    mean, error = found.mean_by_time()
    assert torch.isfinite(mean).all()
    assert bool((error > 0).all())
    assert float(found.judged.min()) == 1
    with pytest.raises(ValueError, match="no step is left"):
        alchemical_cosines(base, base, PairSprings(), [4], skip=1000)


def test_cosines_until_a_time_are_those_of_the_later_steps():
    base = small_denoiser()
    found = alchemical_cosines(base, perturbed(base, 0.02), PairSprings(), [5] * 3)
    late = found.until(4)
    assert late.times.tolist() == [t for t in found.times.tolist() if t <= 4]
    assert torch.equal(late.cosine, found.cosine[-len(late.times) :])
    with pytest.raises(ValueError, match="no analysed state has t <= -1"):
        found.until(-1)


def test_one_judged_molecule_has_a_mean_and_no_error():
    nan = float("nan")
    values = torch.tensor([[0.1, 0.3, 0.2], [0.08, nan, nan], [nan, nan, nan]])
    mean, error = mean_by_time(values)
    assert mean[:2].tolist() == pytest.approx([0.2, 0.08])
    assert float(error[0]) == pytest.approx(0.1 / 3**0.5)
    assert mean.isnan().tolist() == [False, False, True]
    assert error.isnan().tolist() == [False, True, True]
    times = torch.tensor([30, 20, 10])
    figure = figures.cosine_by_time_figure(AlchemicalCosines(times, values, values))
    assert [list(trace.x) for trace in figure.data] == [[30], [30]]


def test_trained_time_is_where_the_shared_prefix_ends():
    base = small_denoiser()
    config = AlignConfig(steps=None, skip_prefix=7)
    assert trained_time(base, config) == rollout(base, [4], 2, skip_prefix=7).times[0]


def test_subspace_basis_is_orthonormal_and_centred():
    basis = subspace_basis(5)
    assert basis.shape == (15, 12)
    assert torch.allclose(basis.t() @ basis, torch.eye(12, dtype=torch.float64))
    assert float(basis.view(5, 3, 12).sum(0).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="at least 2 atoms"):
        subspace_basis(1)


# ---------------------------------------------------------------------- figures
def test_every_figure_has_axis_titles_and_alternative_text():
    base = small_denoiser()
    found = alchemical_cosines(base, perturbed(base, 0.02), PairSprings(), [5] * 4, stride=5)
    step = force.TiltedStep(*(np.array([0.1, 0.2]) for _ in range(5)), torch.zeros(3, 3), 1)
    laws = points.grid_laws(points.PointDenoiser(points.WELLS), points.well_energy, 1.0, points=300)
    cloud = np.random.default_rng(0).normal(size=(50, 2))
    drawn = [
        figures.tilt_figure(1.0),
        figures.bound_figure(0.1),
        figures.laws_figure(laws, cloud[:, 0]),
        figures.densities_2d({"a": cloud, "b": (cloud, np.ones(50))}),
        figures.diffusion_figure(0.5),
        figures.return_figure(-np.ones((2, 4)), np.zeros(2), 0.9),
        figures.tilted_kernel_figure(0.2, 1.0, 1.0),
        figures.order_figure([0.1, 0.2, 0.3], {"a": np.array([1e-3, 8e-3, 27e-3])}),
        figures.step_figure(step, "sigma"),
        figures.cosine_figure(found),
        figures.cosine_by_time_figure(found, trained=4),
        figures.noise_norm_figure(3, n=100),
    ]
    for figure in drawn:
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
        assert figure.layout.meta["alt"]
    assert "slope 3.00" in drawn[7].data[0].name


@pytest.mark.parametrize(
    ("figure", "quantity"),
    [
        (figures.tilt_figure(1.0), "energy"),
        (figures.diffusion_figure(0.5), "score"),
        (figures.tilted_kernel_figure(0.2, 1.0, 1.0), "energy"),
    ],
)
def test_what_is_no_density_has_an_axis_of_its_own_with_the_same_zero(figure, quantity):
    assert figure.layout.yaxis.title.text.startswith("density")
    assert figure.layout.yaxis2.title.text.startswith(quantity)
    assert [trace.yaxis == "y2" for trace in figure.data] == [trace.name.startswith(quantity) for trace in figure.data]
    left, right = figure.layout.yaxis.range, figure.layout.yaxis2.range
    assert left[0] * right[1] == pytest.approx(left[1] * right[0])


def test_returns_have_the_colour_of_their_group():
    potential, terminal = np.arange(8.0).reshape(4, 2), np.zeros(4)
    figure = figures.return_figure(potential, terminal, 1.0, groups=[5, 5, 7, 7])
    assert [trace.name for trace in figure.data] == ["group 5", "group 5", "group 7", "group 7"]
    assert len({trace.line.color for trace in figure.data[:2]}) == len({t.line.color for t in figure.data[2:]}) == 1
    assert figure.data[0].line.color != figure.data[2].line.color
    assert [trace.showlegend for trace in figure.data] == [True, False, True, False]
    assert figure.layout.showlegend
    assert "4 rollouts in 2 groups" in figure.layout.meta["alt"]
    assert not figures.return_figure(potential, terminal, 1.0).layout.showlegend


def test_sliders_redraw_the_figure():
    panel = explore(figures.tilt_figure, beta=(1.0, 0.0, 6.0, 0.25), slope=(0.5, -1.0, 1.0, 0.1))
    beta, slope, chart, *_ = panel.children  # and its words, and an error when there is one
    assert "beta = 1:" in chart.figure.layout.title.text
    beta.value = 2.0
    assert "beta = 2:" in chart.figure.layout.title.text
    assert slope.value == 0.5
    with pytest.raises(ValueError, match="first value, least, largest"):
        explore(figures.tilt_figure, beta=(9.0, 0.0, 6.0, 0.25))
