"""FED-GRPO: densities and ratios, rewards, advantages, objective, rollouts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from elign_lab.alignment import (
    AlignConfig,
    clipped_surrogate,
    degrees_of_freedom,
    fed_grpo_terms,
    group_normalize,
    kl_divergence,
    log_density,
    log_ratio,
    novelty_channel,
    potential_schedule,
    potentials,
    property_channel,
    return_to_go,
    rollout,
    shaping_rewards,
    terminal_rewards,
    total_advantage,
)
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.evaluation import smiles
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling import ancestral, decode_record, mask_of_sizes
from elign_lab.testing import SpringOracle


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Denoiser:
    torch.manual_seed(seed)
    config = DenoiserConfig(features=16, layers=2, size_histogram=((4, 3), (6, 2)))
    model = Denoiser(config).to(dtype)
    with torch.no_grad():
        for block in model.network.blocks:
            block.coordinates.out.weight.mul_(100)
    return model


@pytest.fixture(scope="module")
def rollouts():
    return rollout(make(), [4, 6, 4], 5, steps=12, skip_prefix=7, seed=3)


# ---------------------------------------------------------------------- densities
def transition(dtype, t=37, seed=0):
    model = make(dtype=dtype)
    other = make(seed=1, dtype=dtype)
    mask = mask_of_sizes([4, 6, 3])
    generator = torch.Generator().manual_seed(seed)
    z, noise = model.noise(mask, generator), model.noise(mask, generator)
    steps = torch.full((3,), t)
    step = model.schedule.transition(t, t - 1)
    eps = [m.eps(z, steps, mask).detach() for m in (model, other)]
    means = [model.posterior_mean(z, e, step) for e in eps]
    return mask, noise, eps, means, step


@pytest.mark.parametrize("t", [1, 2, 37, 999])
def test_xi_form_equals_the_two_densities_in_float64(t):
    mask, noise, (old, new), (mean_old, mean_new), step = transition(torch.float64, t)
    z_s = mean_old + step.sigma * noise
    two = log_density(z_s, mean_new, step.sigma, mask) - log_density(z_s, mean_old, step.sigma, mask)
    xi = log_ratio(noise, new, old, torch.full((3,), step.ratio_scale, dtype=torch.float64))
    torch.testing.assert_close(xi, two, rtol=1e-9, atol=1e-9)
    kl = (mean_new - mean_old).square().sum((1, 2)) / (2 * step.sigma**2)
    torch.testing.assert_close(
        kl_divergence(new, old, torch.full((3,), step.ratio_scale, dtype=torch.float64)), kl, rtol=1e-9, atol=0
    )


def test_xi_form_keeps_digits_that_the_densities_lose():
    """At t = 1 in float32, for policies that differ by 1e-4 of eps: error against float64, both forms."""
    mask, noise, (old, other), _, step = transition(torch.float64, 1)
    new = old + 1e-4 * (other - old)
    model = make(dtype=torch.float64)
    z = model.noise(mask, torch.Generator().manual_seed(5))
    scale = torch.full((3,), step.ratio_scale, dtype=torch.float64)
    exact = log_ratio(noise, new, old, scale)
    low = [x.float() for x in (noise, new, old, scale)]
    mean = [model.posterior_mean(z.float(), e, step) for e in (low[2], low[1])]
    z_s = mean[0] + step.sigma * low[0]
    two = log_density(z_s, mean[1], step.sigma, mask) - log_density(z_s, mean[0], step.sigma, mask)
    error_xi = float((log_ratio(*low).double() - exact).abs().max())
    error_two = float((two.double() - exact).abs().max())
    assert error_xi < 1e-6
    assert error_two > 20 * error_xi


def test_log_density_is_normalised_in_the_subspace():
    """Importance sampling of 1 = integral of the density, over the 3 (N - 1) + N F dimensions."""
    mask = mask_of_sizes([2]).expand(200_000, 2)
    generator = torch.Generator().manual_seed(0)
    noise = make(dtype=torch.float64).noise(mask, generator)
    wide, narrow = 1.3, 1.0
    z = wide * noise
    zero = torch.zeros_like(z)
    weight = torch.exp(log_density(z, zero, narrow, mask) - log_density(z, zero, wide, mask))
    standard_error = float(weight.std()) / len(weight) ** 0.5
    assert abs(float(weight.mean()) - 1) < 4 * standard_error
    assert degrees_of_freedom(mask[:1], 6).tolist() == [3 * 1 + 2 * 6]


def test_ratio_is_exactly_one_on_policy(rollouts):
    eps = rollouts.eps[0]
    ratio = torch.exp(log_ratio(rollouts.noise[0], eps, eps, torch.full((15,), 0.3)))
    assert torch.equal(ratio, torch.ones(15))


# ---------------------------------------------------------------------- rollouts
def test_shared_prefix_equals_separate_rollouts_with_the_same_noise():
    """The tree (prefix once, branches together) against K full chains that reuse the prefix noise."""
    model, k, skip, steps = make(), 3, 5, 9
    sizes = [4, 6]
    tree = rollout(model, sizes, k, steps=steps, skip_prefix=skip, seed=11)
    from elign_lab.alignment.mdp import _noise

    prefix = _noise(model, sizes, 1, [11, 0], 0)
    prefix_noise = [next(prefix) for _ in range(skip + 1)]
    branch = _noise(model, sizes, k, [11, 1], 0)
    branch_noise = [next(branch) for _ in range(steps - skip + 1)]
    for g, size in enumerate(sizes):
        for i in range(k):
            noise = [x[g : g + 1, :size] for x in prefix_noise] + [x[g * k + i, :size][None] for x in branch_noise]
            records = list(ancestral(model, mask_of_sizes([size]), steps=steps, noise=iter(noise)))
            row = g * k + i
            for own, shared in zip(records[skip:-1], tree.states[:, row, :size], strict=True):
                torch.testing.assert_close(own.z_t[0], shared, atol=2e-5, rtol=1e-4)
            final = decode_record(model, records[-1])
            torch.testing.assert_close(final.positions[0], tree.molecules.positions[row, :size], atol=1e-4, rtol=1e-4)
    assert tree.network_calls == steps + 1


def test_members_share_the_branching_state_and_then_differ(rollouts):
    states = rollouts.states.view(rollouts.steps, 3, 5, *rollouts.states.shape[2:])
    assert torch.equal(states[0], states[0][:, :1].expand_as(states[0]))
    assert float((states[1][:, 0] - states[1][:, 1]).abs().max()) > 0
    free = rollout(make(), [4], 3, steps=12, skip_prefix=7, shared_prefix=False, seed=3)
    assert float((free.states[0][0] - free.states[0][1]).abs().max()) > 0.1


def test_a_group_does_not_depend_on_its_neighbours(rollouts):
    alone = rollout(make(), [6], 5, steps=12, skip_prefix=7, seed=3, first_group=1)
    torch.testing.assert_close(alone.states, rollouts.states[:, 5:10], atol=2e-5, rtol=1e-4)


def test_rollout_bad_requests():
    for options in ({"sizes": [4], "members": 0}, {"sizes": [], "members": 2}):
        with pytest.raises(ValueError, match="at least one"):
            rollout(make(), **options, steps=5)
    with pytest.raises(ValueError, match="skip_prefix must be between 0 and 4"):
        rollout(make(), [4], 2, steps=5, skip_prefix=5)


# ---------------------------------------------------------------------- rewards
def test_terminal_rewards_by_hand():
    batch = MoleculeBatch.from_arrays([([6, 8], [[0.0, 0, 0], [0, 0, 2.5]])])
    energy, force, ok = terminal_rewards(batch, SpringOracle())
    assert float(energy) == pytest.approx(-0.5 * 1.0 / 2)  # E = (2.5 - 1.5)^2 / 2 = 0.5 eV over 2 atoms
    assert float(force) == pytest.approx(-1.0)  # |f| = 1 eV/A on both atoms
    assert bool(ok)
    _, clipped, _ = terminal_rewards(batch, SpringOracle(), force_clip=0.25)
    assert float(clipped) == pytest.approx(-0.25)
    bounded, _, _ = terminal_rewards(batch, SpringOracle(), energy_clip=0.1)
    assert float(bounded) == pytest.approx(-0.1)


def test_potential_is_that_of_the_clean_estimate_with_its_own_types(rollouts):
    model, oracle = make(), SpringOracle()
    schedule = potential_schedule(rollouts.steps, 2)
    assert schedule == (0, 2, 4)
    values = potentials(rollouts, model, oracle, schedule)
    assert values.shape == (15, 5)
    for k in schedule:
        estimate = rollouts.clean(model, k)
        result = oracle(estimate)
        want = -oracle.formation_energy_per_atom(result.energy, estimate.numbers, estimate.mask)
        torch.testing.assert_close(values[:, k], want)
    assert torch.equal(values[:, 1], values[:, 0])  # unscheduled steps hold the last value
    # one call for each schedule entry's molecules, all together
    assert oracle.molecules == 2 * 3 * 15
    with pytest.raises(ValueError, match="stride"):
        potential_schedule(5, 0)


def test_potential_holds_the_last_value_where_the_oracle_fails(rollouts):
    model = make()
    counts = {"n": 0}

    def second_frame(numbers):
        counts["n"] += 1
        return 15 < counts["n"] <= 30

    values = potentials(rollouts, model, SpringOracle(fail=second_frame), (0, 1, 2))
    assert torch.equal(values[:, 1], values[:, 0])
    assert not torch.equal(values[:, 2], values[:, 0])
    counts["n"] = 15
    late = potentials(rollouts, model, SpringOracle(fail=second_frame), (0, 2))
    assert torch.equal(late[:, 0], late[:, 2])  # before the first judged estimate, its value stands
    assert torch.isnan(potentials(rollouts, model, SpringOracle(fail=lambda n: True), (0,))).all()


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_telescoping(gamma):
    """Discounted sum of the shaping rewards = return-to-go, at every step (Eq. 4)."""
    generator = torch.Generator().manual_seed(0)
    potential = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    terminal = torch.randn(7, generator=generator, dtype=torch.float64)
    shaped = shaping_rewards(potential, terminal, gamma)
    to_go = return_to_go(potential, terminal, gamma)
    for k in range(30):
        discount = gamma ** torch.arange(30 - k, dtype=torch.float64)
        torch.testing.assert_close((shaped[:, k:] * discount).sum(1), to_go[:, k], rtol=1e-12, atol=1e-12)


def test_property_channel():
    batch = MoleculeBatch.from_smiles(["O", "CCO"])
    channel = property_channel(lambda m: m.sizes.float(), target=5.0, weight=0.3)
    assert channel.reward(batch).tolist() == [-2.0, -4.0]


def test_novelty_channel_knows_its_reference():
    batch = MoleculeBatch.from_smiles(["C", "CC"])
    apart = batch.with_positions(batch.positions.new_full(batch.positions.shape, float("nan")))
    channel = novelty_channel(1.0, [*smiles(batch[:1]), None])
    assert channel.reward(batch).tolist() == [-1.0, 0.0]
    assert channel.reward(apart).tolist() == [0.0, 0.0]  # what is not valid is not in the reference
    with pytest.raises(ValueError, match="explicit hydrogens"):
        novelty_channel(1.0, ["C", "CC"]).reward(batch)


# ---------------------------------------------------------------------- advantages
def test_group_statistics_against_an_explicit_loop():
    generator = torch.Generator().manual_seed(0)
    to_go = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    force = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    extra = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    ok = torch.rand(3, 5, generator=generator) > 0.3
    got = total_advantage(
        to_go, force, ok, energy_weight=0.05, force_weight=1.0, clip=1.2, energy_floor=0.5, force_floor=0.01,
        channels={"extra": (0.3, extra)},
    )  # fmt: skip
    for g in range(3):
        good = [i for i in range(5) if ok[g, i]]
        for i in range(5):
            for t in range(4):
                want = 0.0
                if i in good and len(good) > 1:
                    for weight, values, floor in (
                        (0.05, [float(to_go[g, j, t]) for j in good], 0.5),
                        (1.0, [float(force[g, j]) for j in good], 0.01),
                        (0.3, [float(extra[g, j]) for j in good], 0.01),
                    ):
                        mean = sum(values) / len(values)
                        std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
                        want += weight * (values[good.index(i)] - mean) / (max(std, floor) + 1e-8)
                    want = min(max(want, -1.2), 1.2)
                assert float(got[g, i, t]) == pytest.approx(want, abs=1e-9)


def test_equal_rewards_teach_nothing():
    noise = 1e-6 * torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    ok = torch.ones(1, 6, dtype=torch.bool)
    assert float(group_normalize(-1.0 + noise, ok, floor=0.01).abs().max()) < 1e-3
    # without the floor the same noise becomes unit variance
    assert float(group_normalize(-1.0 + noise, ok, floor=0.0, delta=0.0).std(correction=0)) == pytest.approx(
        1, abs=0.01
    )


def test_nan_of_failed_members_does_not_spread():
    values = torch.tensor([[1.0, float("nan"), 3.0], [float("nan"), float("nan"), 2.0]])
    ok = torch.isfinite(values)
    out = group_normalize(values, ok, 1e-3)
    assert torch.isfinite(out).all()
    assert out[0].tolist() == pytest.approx([-1, 0, 1])
    assert out[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("disentangle", [True, False])
def test_a_missing_value_of_one_signal_spares_the_other_members(disentangle):
    to_go, force = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1.0, 2.0, 4.0]])
    ok = torch.ones(1, 3, dtype=torch.bool)
    weights = {"energy_weight": 1.0, "force_weight": 1.0, "clip": 5.0, "energy_floor": 1e-3, "force_floor": 1e-3}
    missing = torch.tensor([[1.0, 2.0, float("nan")]])
    for lacks in (
        {"return_to_go": missing.unsqueeze(-1), "force": force},
        {"return_to_go": to_go, "force": force, "channels": {"property": (1.0, missing)}},
    ):
        advantage = total_advantage(ok=ok, disentangle=disentangle, **weights, **lacks)[..., 0]
        assert advantage.isfinite().all()
        assert float(advantage[0, 1] - advantage[0, 0]) > 0
        # the energy or the property says nothing of the last member; entangled, its sum is unknown
        assert float(advantage[0, 2]) == 0 if not disentangle else float(advantage[0, 2]) > 0


def test_entangled_ablation_normalises_the_sum():
    generator = torch.Generator().manual_seed(1)
    to_go, force = torch.randn(2, 4, 3, generator=generator), torch.randn(2, 4, generator=generator)
    ok = torch.ones(2, 4, dtype=torch.bool)
    options = {"energy_weight": 0.5, "force_weight": 2.0, "clip": None, "energy_floor": 1e-6, "force_floor": 1e-6}
    got = total_advantage(to_go, force, ok, disentangle=False, **options)
    raw = 0.5 * to_go + 2.0 * force.unsqueeze(-1)
    want = (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True, correction=0) + 1e-8)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------- objective
def test_a_ratio_beyond_floating_point_has_a_finite_surrogate_and_gradient():
    ratios = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
    value, clipped = clipped_surrogate(ratios, torch.tensor([1.0, 0.0, 1.0]), 0.1)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1.1, 0.0, 0.0])
    assert ratios.grad.tolist() == [0.0, 0.0, 0.0]
    assert clipped.tolist() == [True, False, False]


def test_clipped_surrogate_against_its_definition():
    ratios = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5]).repeat(2)
    advantage = torch.tensor([1.0] * 5 + [-2.0] * 5)
    value, clipped = clipped_surrogate(ratios, advantage, 0.1)
    for x, a, v, c in zip(ratios.tolist(), advantage.tolist(), value.tolist(), clipped.tolist(), strict=True):
        rho = np.exp(x)
        assert v == pytest.approx(min(rho * a, np.clip(rho, 0.9, 1.1) * a), rel=1e-6)
        # the gradient is gone where the ratio has already moved further than allowed in the direction of the advantage
        assert c == ((a > 0 and rho > 1.1) or (a < 0 and rho < 0.9))


def test_objective_gradient_on_policy_is_the_policy_gradient():
    """At eps_new = eps_old: d surrogate = A d log pi = -A c xi . d eps, whatever the clip range."""
    generator = torch.Generator().manual_seed(0)
    noise, old, ref = (torch.randn(4, 5, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    new = old.clone().requires_grad_()
    scale = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1, 2, -0.5], dtype=torch.float64)
    terms = fed_grpo_terms(noise, new, old, ref, scale, advantage, 2e-3)
    (gradient,) = torch.autograd.grad(terms.surrogate.sum(), new, retain_graph=True)
    torch.testing.assert_close(gradient, -(advantage * scale).view(-1, 1, 1) * noise)
    (kl,) = torch.autograd.grad(terms.kl.sum(), new)
    torch.testing.assert_close(kl, scale.square().view(-1, 1, 1) * (old - ref))
    per_dof = fed_grpo_terms(noise, new, old, ref, scale, advantage, 2e-3, dims=torch.full((4,), 10.0))
    (shared,) = torch.autograd.grad(per_dof.surrogate.sum(), new)
    torch.testing.assert_close(shared, gradient / 10)


def test_config_refuses_nonsense():
    changes = [{"members": 1}, {"clip_range": 0.0}, {"energy_signal": "dense"}, {"gamma": 1.5}]
    # what would stop a run at its first evaluation, or turn the objective round
    changes += [{"evaluate_every": 0}, {"checkpoint_every": 0}, {"evaluate_n": 0}, {"seed": -1}, {"kl_weight": -0.1}]
    changes += [{name: -1.0} for name in ("adv_clip", "force_clip", "energy_clip", "max_grad_norm")]
    # what was taken for another value without a word
    changes += [{name: 0} for name in ("pairs_per_iteration", "pairs_per_call", "total_updates")]
    changes += [{name: -1.0} for name in ("energy_floor", "force_floor", "warmup", "min_lr_ratio", "weight_decay")]
    changes += [{name: math.nan} for name in ("force_weight", "energy_weight", "learning_rate")]
    for change in changes:
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(AlignConfig(), **change)
