"""FED-GRPO for pseudo-force fields: likelihoods of the samplers, groups, resume, and a problem with a known answer."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from elign_lab.alignment import OracleFailureError, log_density, log_ratio
from elign_lab.cli import main
from elign_lab.gpff import GPFFConfig, PseudoForceField, get_sampler, load_force_field, parse_formula, save_force_field
from elign_lab.gpff.alignment import ForceAlignConfig, ForceFieldTrainer, align_force_field
from elign_lab.gpff.alignment_rollouts import ForceRollouts, GroupTask, StochasticSampler, roll_out
from elign_lab.gpff.generate import SIGMA_MIN
from elign_lab.gpff.levels import karras_levels
from elign_lab.molecules import zero_com
from elign_lab.painn import PaiNNConfig
from elign_lab.testing import SpringOracle
from elign_lab.training import read_json_lines, step_generator

SMALL = PaiNNConfig(features=8, vectors=4, channels=4, layers=1, basis=8, shortest=0.1, reach=12.0, cutoff=False)
ATOMS = [parse_formula("CH4"), parse_formula("C2H6O")]
CONFIG = ForceAlignConfig(
    groups=2,
    members=3,
    steps=8,
    skip_prefix=4,
    potential_stride=2,
    iterations=4,
    learning_rate=1e-3,
    warmup=2,
    total_updates=12,
    updates=2,
    evaluate_every=2,
    evaluate_n=3,
    force_clip=None,
    energy_clip=None,
)


@pytest.fixture
def model() -> PseudoForceField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PseudoForceField(GPFFConfig(network=SMALL, compositions=(("C2H6O", 2), ("CH4", 1)))).eval()


def moved(model: PseudoForceField, by: float) -> PseudoForceField:
    """A copy with slightly different weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def clean(model: PseudoForceField, rollouts: ForceRollouts, step: int) -> Tensor:
    x = rollouts.states[step]
    return x + 0.5 * model(rollouts.numbers, x, rollouts.mask).detach()


# ---------------------------------------------------------------------- likelihoods
@pytest.mark.parametrize("sampler", ["direct", "ancestral"])
def test_ratio_is_that_of_the_two_densities(model, sampler):
    """-xi.delta - |delta|^2 / 2 against log N(x'; mean_new, a^2 P) - log N(x'; mean_old, a^2 P) from the formulas."""
    model = model.double()
    new, n = moved(model, 0.02), 6
    policy = StochasticSampler(sampler, n, 0.7)
    rollouts = roll_out(model, ATOMS, 2, policy, seed=3)
    levels = karras_levels(n, model.config.sigma_max, SIGMA_MIN)
    for k in range(n - 2):  # the state after the last trained step is not kept
        x = rollouts.states[k]
        if sampler == "direct":
            kept, amplitude = 0.0, 0.7 * (1 - (k + 1) / n)
        else:
            kept = (levels[k + 1] / levels[k]) ** 2
            amplitude = levels[k + 1] * (1 - kept) ** 0.5
        mean_old, mean_new = (c + kept * (x - c) for c in (clean(m, rollouts, k) for m in (model, new)))
        mean_old, mean_new = (zero_com(mean, rollouts.mask) for mean in (mean_old, mean_new))
        expected = log_density(rollouts.states[k + 1], mean_new, amplitude, rollouts.mask)
        expected = expected - log_density(rollouts.states[k + 1], mean_old, amplitude, rollouts.mask)
        eps_new = x - clean(new, rollouts, k)
        scale = rollouts.scale[k].expand(len(x))
        found = log_ratio(rollouts.noise[k], eps_new, rollouts.eps[k], scale)
        assert float(expected.abs().min()) > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sampler", ["direct", "ancestral"])
def test_rollouts_are_runs_of_the_sampler(model, sampler):
    """From the same start with the same generators; and the rest of a schedule is that schedule's end."""
    policy = StochasticSampler(sampler, 7, 0.5)
    rollouts = roll_out(model, ATOMS, 2, policy, seed=3)
    task = GroupTask(model, ATOMS, 2, [step_generator(3, 1, g) for g in range(2)])
    run = get_sampler(sampler)
    level = model.config.sigma_max
    records = list(run(task, rollouts.states[0], evaluations=7, sigma=level, sigma_min=SIGMA_MIN, **policy.options()))
    assert torch.equal(records[-1].molecules().positions, rollouts.molecules.positions)
    assert rollouts.network_calls == task.evaluations == 7
    assert rollouts.times == tuple(range(6, -1, -1))
    assert float(records[-1].amplitude.max()) == 0
    short = list(policy.steps_from(4, level)(task, records[4].z_t))
    assert [float(r.amplitude[0]) for r in short] == pytest.approx([float(r.amplitude[0]) for r in records[4:]])
    torch.testing.assert_close(policy.ratio_scale(4, level), policy.ratio_scale(0, level)[4:])


def test_on_policy_the_ratio_is_one(model):
    step = ForceFieldTrainer(model.double(), SpringOracle(), replace(CONFIG, updates=1)).step()
    assert step.metrics["log_ratio_rms"] < 1e-9
    assert step.metrics["kl"] < 1e-18
    assert step.metrics["clip_fraction"] == 0
    assert step.metrics["surrogate"] == pytest.approx(float(step.advantages.mean()), abs=1e-9)
    assert step.metrics["grad_norm"] > 0


# ---------------------------------------------------------------------- groups
def test_groups_share_their_prefix_and_do_not_depend_on_each_other(model):
    policy = StochasticSampler("direct", 6)
    both = roll_out(model, ATOMS, 3, policy, skip_prefix=2, seed=5)
    assert both.steps == 3
    assert both.network_calls == 6
    for group in both.states[0].split(3):
        assert torch.equal(group, group[:1].expand_as(group))
    assert not torch.equal(both.states[1][3], both.states[1][4])
    alone = roll_out(model, ATOMS[:1], 3, policy, skip_prefix=2, seed=5)
    torch.testing.assert_close(both.molecules.positions[:3, :5], alone.molecules.positions, rtol=1e-4, atol=1e-4)
    second = roll_out(model, ATOMS[1:], 3, policy, skip_prefix=2, seed=5, first_group=1)
    torch.testing.assert_close(both.noise[:, 3:], second.noise, rtol=1e-4, atol=1e-5)
    apart = roll_out(model, ATOMS, 3, policy, skip_prefix=2, seed=5, shared_prefix=False)
    assert not torch.equal(apart.states[0][0], apart.states[0][1])


def test_padding_stays_zero_and_the_centre_of_mass_too(model):
    trainer = ForceFieldTrainer(model, SpringOracle(), CONFIG)
    rollouts = roll_out(model, ATOMS, 3, CONFIG.stochastic_sampler, seed=5)
    padding = ~rollouts.mask
    assert int(padding.sum()) == 3 * 4  # methane beside ethanol
    trainer.step()
    for step in range(rollouts.steps):
        pair = torch.full((6,), step)
        eps = trainer.prediction(trainer.policy, rollouts, pair, torch.arange(6)).detach()
        for values in (rollouts.states[step], rollouts.noise[step], rollouts.eps[step], eps):
            assert bool((values[padding] == 0).all())
            assert float(values.sum(1).abs().max()) < 1e-3
        estimate = rollouts.clean(None, step)
        assert torch.equal(estimate.numbers, rollouts.molecules.numbers)
        torch.testing.assert_close(estimate.positions, rollouts.states[step] - rollouts.eps[step], rtol=0, atol=1e-6)
    assert bool((rollouts.molecules.positions[padding] == 0).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "heun"}, "deterministic: it has no likelihood; use 'direct' or 'ancestral'"),
        ({"sampler": "adaptive_heun"}, "deterministic"),
        ({"sampler": "adaptive_ancestral"}, "changes with the weights"),
        ({"sampler": "other"}, "unknown sampler 'other'"),
        ({"strength": 0.0}, "strength = 0.0 is deterministic"),
        ({"strength": float("nan")}, "deterministic"),
        ({"steps": 1, "skip_prefix": 0}, "leave no step with noise"),
        ({"members": 1}, "members"),
    ],
)
def test_what_is_no_policy_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


def test_rollouts_refuse_what_cannot_be(model):
    with pytest.raises(ValueError, match="between 0 and 2"):
        roll_out(model, ATOMS, 2, StochasticSampler(evaluations=4), skip_prefix=3)
    with pytest.raises(ValueError, match="at least one group"):
        roll_out(model, [], 2, StochasticSampler())


# ---------------------------------------------------------------------- training
def test_resume_gives_the_same_weights_and_log(model, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    config = replace(CONFIG, evaluate_every=1)
    first = copy.deepcopy(model)
    ForceFieldTrainer(copy.deepcopy(model), SpringOracle(), config, out=straight).run(progress=False)
    ForceFieldTrainer(first, SpringOracle(), config, out=broken).run(2, progress=False)
    with pytest.raises(ValueError, match="another model than the one given"):
        ForceFieldTrainer(moved(model, 1.0), SpringOracle(), config, out=broken)
    trainer = ForceFieldTrainer(copy.deepcopy(model), SpringOracle(), config, out=broken)
    assert trainer.iteration == 2
    trainer.run(progress=False)
    for name in ("model.safetensors", "best.safetensors"):
        assert torch.equal(*(weights(load_force_field(folder / name)) for folder in (straight, broken)))
    assert not torch.equal(weights(model), weights(load_force_field(straight / "model.safetensors")))
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in read_json_lines(folder / "log.jsonl")]
        for folder in (straight, broken)
    ]
    assert rows[0] == rows[1]
    assert 0 <= rows[0][0]["eval_valid"] <= 1
    with pytest.raises(ValueError, match="strength"):
        ForceFieldTrainer(model, SpringOracle(), replace(config, strength=0.5), out=straight)
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert set(read_json_lines(straight / "log.jsonl")[0]) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_a_judge_that_always_fails_stops_the_run(model):
    with pytest.raises(OracleFailureError, match="failed on 6 of 6"):
        align_force_field(model, SpringOracle(fail=lambda numbers: True), CONFIG, progress=False)


class Dumbbell(nn.Module):
    """Pseudo-forces of H2 that take half of what is wrong with its length away; the length is the only weight."""

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.tensor(length, dtype=torch.float64))
        self.config = GPFFConfig(compositions=(("H2", 1),))
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.check = PseudoForceField.check.__get__(self)

    def forward(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = zero_com(positions.double(), mask)
        distance = 2 * x[:, :1].norm(dim=-1, keepdim=True)
        return x * (self.length / distance - 1)


@pytest.mark.parametrize(("sampler", "start"), [("direct", 1.2), ("direct", 1.8), ("ancestral", 1.8)])
def test_the_only_weight_moves_to_what_the_oracle_wants(sampler, start):
    """The spring's force vanishes at 1.5 Angstrom: from both sides the length goes there, and the force falls.

    Ancestral sampling ends before half steps have brought the cloud in: its best length is shorter.
    """
    config = ForceAlignConfig(
        sampler=sampler,
        strength=0.2,
        steps=10,
        skip_prefix=5,
        groups=4,
        members=16,
        energy_signal="terminal",
        kl_weight=0.0,
        learning_rate=0.02,
        warmup=1,
        total_updates=1000,
        weight_decay=0.0,
        iterations=20,
        evaluate_every=20,
    )
    trainer = ForceFieldTrainer(Dumbbell(start), SpringOracle(rest=1.5), config)
    before = trainer.evaluate()["eval_force"]
    rows = trainer.run(progress=False)
    assert rows[-1]["eval_force"] > 0.5 * before  # rewards are negative
    if sampler == "direct":
        assert float(trainer.policy.length.detach()) == pytest.approx(1.5, abs=0.08)


def test_command(model, tmp_path, capsys):
    path = save_force_field(model, tmp_path / "base.safetensors")
    fields = ["steps=4", "skip_prefix=1", "groups=2", "members=2", "evaluate_n=2", "max_failure_share=1.0"]
    command = ["gpff", "align", "--model", str(path), "--oracle", "learned", "--out", str(tmp_path / "run")]
    settings = [part for field in fields for part in ("--set", field)]
    assert main([*command, *settings, "--iterations", "1"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert load_force_field(tmp_path / "run" / "model.safetensors").config == model.config
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == 1
    for field, message in (
        ("sampler=heun", "no policy, because it is deterministic"),
        ("steps=5", "skip_prefix must"),
        ("spacing=2", "of a denoiser's grid"),
    ):
        assert main([*command[:-1], str(tmp_path / "other"), "--set", field]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--preset", "other"]) == 2
    assert "gpff_cpu_mini" in capsys.readouterr().err
