"""The FED-GRPO trainer: resume after kills, several processes, failures, and a problem whose answer is known."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import elign_lab.alignment.trainer
from elign_lab.alignment import (
    AlignConfig,
    OracleFailureError,
    TerminalChannel,
    Trainer,
    align,
    fed_grpo_terms,
    group_normalize,
)
from elign_lab.checkpoints import load_model
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.sampling import sample
from elign_lab.testing import SpringOracle
from elign_lab.training import read_json_lines, warmup_cosine, warmup_hold_decay

CONFIG = AlignConfig(
    groups=2,
    members=3,
    steps=8,
    skip_prefix=4,
    potential_stride=2,
    iterations=10,
    learning_rate=1e-3,
    warmup=2,
    total_updates=30,
    updates=2,
    evaluate_every=4,
    evaluate_n=3,
    # the results of an untrained network are far apart, so that clipping would make all rewards equal
    force_clip=None,
    energy_clip=None,
)


def make() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(features=12, layers=2, size_histogram=((3, 1), (5, 2))))


def run_to_the_end(out: str) -> None:
    torch.set_num_threads(1)
    Trainer(make(), SpringOracle(), CONFIG, out=out).run(progress=False)


def weights(path: Path) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in load_model(path).parameters()])


def test_killed_at_twenty_random_moments(tmp_path):
    """SIGKILL, again and again, wherever it happens to be: the final weights and the log are those of a quiet run."""
    context = multiprocessing.get_context("fork")
    quiet, rough = tmp_path / "quiet", tmp_path / "rough"
    start = time.monotonic()
    child = context.Process(target=run_to_the_end, args=(str(quiet),))
    child.start()
    child.join(120)
    duration = time.monotonic() - start
    assert child.exitcode == 0
    moments = random.Random(0)
    killed = 0
    while killed < 20:
        child = context.Process(target=run_to_the_end, args=(str(rough),))
        child.start()
        child.join(moments.uniform(0, duration / 5))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.join()
        if child.exitcode == 0:
            # it got to the end early: start over, so that all 20 kills hit a running training
            assert torch.equal(weights(rough / "model.safetensors"), weights(quiet / "model.safetensors"))
            for file in rough.iterdir():
                file.unlink()
    child = context.Process(target=run_to_the_end, args=(str(rough),))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    for name in ("model.safetensors", "best.safetensors"):
        assert torch.equal(weights(rough / name), weights(quiet / name))
    logs = [read_json_lines(folder / "log.jsonl") for folder in (quiet, rough)]
    assert len(logs[0]) == CONFIG.iterations
    for a, b in zip(*logs, strict=True):
        timeless = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in (a, b)]
        assert timeless[0] == timeless[1]


@pytest.mark.slow
@pytest.mark.parametrize("skip_prefix", [4, CONFIG.steps - 1])
def test_two_processes_equal_one(tmp_path, skip_prefix):
    """The same groups on two gloo processes: the same weights after two iterations, up to rounding.

    With one trained step a group each of the two updates has the pairs of one group: the other process has none.
    """
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_trainer import *\n"
        "torch.set_num_threads(1)\n"
        f"c = replace(CONFIG, iterations=2, evaluate_every=1, skip_prefix={skip_prefix})\n"
        "import atexit, os\n"
        "left = lambda: 'no' if torch.distributed.is_initialized() else 'yes'\n"
        "atexit.register(lambda: Path(sys.argv[2], 'left' + os.environ['RANK']).write_text(left()))\n"
        "Trainer(make(), SpringOracle(), c, out=sys.argv[2]).run(progress=False)\n"
    )
    here = str(Path(__file__).parent)
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command += [str(script), here, str(tmp_path / str(processes))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    # a process that ends as a member of its group may be aborted by the group's threads
    assert [(tmp_path / "2" / f"left{rank}").read_text() for rank in (0, 1)] == ["yes", "yes"]
    one, two = (weights(tmp_path / str(k) / "model.safetensors") for k in (1, 2))
    moved = float((one - torch.cat([p.detach().reshape(-1) for p in make().parameters()])).norm())
    assert float((one - two).norm()) < 1e-3 * moved
    rows = [read_json_lines(tmp_path / str(k) / "log.jsonl") for k in (1, 2)]
    for key in ("reward_energy", "reward_force", "kl", "grad_norm", "eval_force", "oracle_molecules"):
        assert rows[0][0][key] == pytest.approx(rows[1][0][key], rel=1e-3), key


def test_known_optimum_of_a_gaussian_policy():
    """Reward linear in the action, group-normalised advantages: the mean of the policy moves to E[s_K] / lambda.

    For z = u + xi (unit variance, reference u = 0) and reward a z, A_i = (xi_i - mean) / s, so that the gradient of the
    surrogate in u is E[A_i xi_i] = E[s_K], s_K the population standard deviation of K standard normal numbers, and that
    of the penalty is lambda u. The slope a drops out.
    """
    k, groups, weight, slope = 6, 4000, 0.5, 37.0
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(1, 1, 1, requires_grad=True)
    ratio_scale = torch.ones(groups * k)
    optimizer = torch.optim.SGD([mean], lr=0.5)
    path = []
    for _ in range(40):
        noise = torch.randn(groups * k, 1, 1, generator=generator)
        old = -mean.detach().expand_as(noise)  # the mean is -c sigma eps, with c = sigma = 1
        action = -old + noise
        advantage = group_normalize(slope * action.view(groups, k), torch.ones(groups, k, dtype=torch.bool), 1e-3)
        new = -mean.expand_as(noise)
        terms = fed_grpo_terms(noise, new, old, torch.zeros_like(noise), ratio_scale, advantage.view(-1), 0.2)
        loss = (-terms.surrogate + weight * terms.kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(float(mean))
    expected = math.sqrt(2 / k) * math.gamma(k / 2) / math.gamma((k - 1) / 2) / weight
    found = sum(path[20:]) / len(path[20:])
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_training_improves_the_reward():
    """Forces of fresh samples with the same seeds fall when the bundled base model is aligned with springs."""
    config = replace(
        CONFIG,
        groups=4,
        members=8,
        iterations=8,
        steps=30,
        skip_prefix=18,
        learning_rate=1e-4,
        warmup=1,
        clip_range=0.2,
        kl_weight=0.0,
        energy_weight=0.0,
        evaluate_every=100,
        evaluate_n=48,
    )
    trainer = Trainer(load_model("edm-mini").with_size_histogram({14: 1}), SpringOracle(), config)
    before = trainer.evaluate()["eval_force"]
    trainer.run(progress=False)
    after = trainer.evaluate()["eval_force"]
    assert after > 0.95 * before, (before, after)  # rewards are negative: at least 5 % better


def test_failed_molecules_are_dropped_and_counted(tmp_path):
    heavy = SpringOracle(fail=lambda numbers: 9 in numbers)
    rows = Trainer(make(), heavy, replace(CONFIG, iterations=3, max_failure_share=1.0), out=tmp_path).run(
        progress=False
    )
    assert sum(row["failed"] for row in rows) > 0
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    with pytest.raises(OracleFailureError, match="failed on 6 of 6 rollouts"):
        Trainer(make(), SpringOracle(fail=lambda numbers: True), CONFIG).run(progress=False)


def test_a_rollout_without_finite_numbers_is_left_out_of_the_update(monkeypatch):
    """Its NaN must not undo the gradient of the others: the numbers are those of the same rollout without its pairs."""
    genuine = elign_lab.alignment.trainer.rollout
    nan = float("nan")

    def broken(*arguments, **options):
        found = genuine(*arguments, **options)
        states, eps, positions = found.states.clone(), found.eps.clone(), found.molecules.positions.clone()
        states[1:, 0], eps[:, 0], positions[0] = nan, nan, nan
        return replace(found, states=states, eps=eps, molecules=found.molecules.with_positions(positions))

    monkeypatch.setattr(elign_lab.alignment.trainer, "rollout", broken)
    trainer = Trainer(make(), SpringOracle(), replace(CONFIG, weight_decay=0.0))
    step = trainer.step()
    assert step.metrics["failed"] == 1
    assert step.rollouts.finite.tolist() == [False] + 5 * [True]
    assert all(math.isfinite(step.metrics[key]) for key in ("surrogate", "kl", "log_ratio_rms"))
    assert step.metrics["grad_norm"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(trainer.parameters, make().parameters(), strict=True)]
    assert all(moved)


def test_counters_and_calls():
    trainer = Trainer(make(), SpringOracle(), CONFIG)
    step = trainer.step()
    assert step.metrics["network_calls"] == CONFIG.steps + 1
    # terminal, and the potential at trained steps 0, 2 and 3
    assert step.metrics["oracle_molecules"] == 6 * (1 + 3)
    assert step.rewards.evaluated == (0, 2, 3)
    assert step.advantages.shape == (2, 3, 4)
    assert step.metrics["iteration"] == 0


def test_the_policy_that_made_the_rollouts_has_ratio_one():
    """The update computes eps again, in other batches than the rollout: the same numbers, up to rounding."""
    for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        still = Trainer(make().to(dtype), SpringOracle(), replace(CONFIG, learning_rate=0.0, weight_decay=0.0)).step()
        assert still.metrics["log_ratio_rms"] < rounding
    assert Trainer(make(), SpringOracle(), CONFIG).step().metrics["log_ratio_rms"] > 1e-3


@pytest.mark.parametrize("signal_name", ["terminal", "naive"])
def test_ablations_of_the_energy_signal(signal_name):
    step = Trainer(make(), SpringOracle(), replace(CONFIG, energy_signal=signal_name)).step()
    to_go = step.rewards.return_to_go
    if signal_name == "terminal":
        assert torch.equal(to_go, step.rewards.energy.unsqueeze(1).expand_as(to_go))
        assert step.metrics["oracle_molecules"] == 6
    else:  # each step is paid with the potential of the state that it leads to, the last with the result's
        assert not torch.equal(to_go[:, 0], to_go[:, -1])
        assert torch.equal(to_go[:, -1], step.rewards.energy)
        pbrs = Trainer(make(), SpringOracle(), CONFIG).step().rewards
        potential = pbrs.energy.unsqueeze(1) - pbrs.return_to_go
        torch.testing.assert_close(to_go[:, :-1], potential[:, 1:])


def test_spacing_is_that_of_rollouts_and_of_the_evaluation_set():
    trainer = Trainer(make(), SpringOracle(), replace(CONFIG, spacing=2.0))
    grid = trainer.policy.schedule.grid(CONFIG.steps, 2.0)
    assert trainer.roll_out(0).times == tuple(grid[CONFIG.skip_prefix :])
    expected = sample(make(), CONFIG.evaluate_n, steps=CONFIG.steps, spacing=2.0, seed=CONFIG.seed)
    torch.testing.assert_close(trainer.evaluation_set().positions, expected.positions)
    with pytest.raises(ValueError, match=r"AlignConfig.spacing = 0.5"):
        replace(CONFIG, spacing=0.5)


def test_subset_of_the_pairs_holds_whole_groups():
    trainer = Trainer(make(), SpringOracle(), replace(CONFIG, pairs_per_iteration=12))
    units = trainer._choose_units(4, 0)
    assert len(units) == 4
    assert len(set(units.tolist())) == 4
    assert not torch.equal(units.sort().values, trainer._choose_units(4, 1).sort().values)


def test_extra_channels_enter_the_advantage_and_the_log():
    channel = TerminalChannel("small", 2.0, lambda molecules: -molecules.positions[:, 0].norm(dim=1))
    plain, extra = (Trainer(make(), SpringOracle(), CONFIG, channels=c).step() for c in ((), (channel,)))
    assert extra.metrics["reward_small"] < 0
    assert not torch.equal(plain.advantages, extra.advantages)
    assert "reward_small" not in plain.metrics


def test_channels_have_names_of_their_own():
    def channel(name):
        return TerminalChannel(name, 1.0, lambda molecules: molecules.sizes.float())

    for names in (("property", "property"), ("force",)):
        with pytest.raises(ValueError, match="name of its own"):
            Trainer(make(), SpringOracle(), CONFIG, channels=[channel(name) for name in names])


def test_mean_of_a_channel_is_over_what_it_could_judge():
    def half(molecules):
        return torch.where(torch.arange(len(molecules)) % 2 == 0, -1.0, float("nan"))

    metrics = Trainer(make(), SpringOracle(), CONFIG, channels=[TerminalChannel("half", 1.0, half)]).step().metrics
    assert metrics["reward_half"] == -1
    nothing = SpringOracle(fail=lambda numbers: True)
    metrics = Trainer(make(), nothing, replace(CONFIG, max_failure_share=1.0)).step().metrics
    assert math.isnan(metrics["reward_force"])  # 0 would be the best of all
    assert metrics["failed"] == 6


def test_more_updates_than_pairs_are_refused():
    with pytest.raises(ValueError, match="updates = 3, but an iteration has 2"):
        Trainer(make(), SpringOracle(), replace(CONFIG, skip_prefix=CONFIG.steps - 1, updates=3)).step()


def test_an_interrupted_evaluation_is_no_evaluation(monkeypatch):
    """`sample` returns the finished molecules when it is interrupted; they are not the evaluation set."""
    trainer = Trainer(make(), SpringOracle(), CONFIG)
    monkeypatch.setattr(trainer, "evaluation_set", lambda: Trainer.evaluation_set(trainer)[:2])
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert trainer.best == float("-inf")


def test_killed_between_the_files_of_a_checkpoint(tmp_path, monkeypatch):
    """The last save of a run writes one of its two files; the run that goes on still ends with the latest model."""
    config = replace(CONFIG, iterations=2, evaluate_every=100)
    module = elign_lab.alignment.trainer
    for name in ("save_state", "save_model"):
        out = tmp_path / name
        Trainer(make(), SpringOracle(), config, out=out).run(1, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
            with pytest.raises(RuntimeError, match="killed"):
                Trainer(make(), SpringOracle(), config, out=out).run(progress=False)
        again = Trainer(make(), SpringOracle(), config, out=out)
        again.run(progress=False)
        for saved, value in zip(
            load_model(out / "model.safetensors").parameters(), again.policy.parameters(), strict=True
        ):
            assert torch.equal(saved, value)


def test_resume_refuses_another_weight_of_a_channel(tmp_path):
    def trainer(weight):
        channel = TerminalChannel("size", weight, lambda molecules: molecules.sizes.float())
        return Trainer(make(), SpringOracle(), CONFIG, out=tmp_path, channels=[channel])

    trainer(1.0).run(1, progress=False)
    assert trainer(1.0).iteration == 1
    with pytest.raises(ValueError, match="use another folder"):
        trainer(2.0)


def test_resume_refuses_another_model(tmp_path):
    Trainer(make(), SpringOracle(), CONFIG, out=tmp_path).run(1, progress=False)
    other = make()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another model than the one given"):
        Trainer(other, SpringOracle(), CONFIG, out=tmp_path)


def test_resume_refuses_another_configuration(tmp_path):
    Trainer(make(), SpringOracle(), replace(CONFIG, iterations=1), out=tmp_path).run(progress=False)
    with pytest.raises(ValueError, match="kl_weight"):
        Trainer(make(), SpringOracle(), replace(CONFIG, kl_weight=0.5), out=tmp_path)
    longer = Trainer(make(), SpringOracle(), replace(CONFIG, iterations=2), out=tmp_path)
    assert longer.iteration == 1
    assert len(longer.run(progress=False)) == 1


def test_ctrl_c_finishes_the_iteration(tmp_path):
    """One SIGINT: the iteration in progress is finished and kept; a second one stops at once."""

    class Interrupting(SpringOracle):
        signals = 1

        def _compute(self, molecules):
            while self.signals:
                self.signals -= 1
                signal.raise_signal(signal.SIGINT)
            return super()._compute(molecules)

    before = signal.getsignal(signal.SIGINT)
    trainer = Trainer(make(), Interrupting(), replace(CONFIG, checkpoint_every=100), out=tmp_path)
    assert len(trainer.run(progress=False)) == 1
    assert Trainer(make(), SpringOracle(), replace(CONFIG, checkpoint_every=100), out=tmp_path).iteration == 1
    impatient = Interrupting()
    impatient.signals = 2
    with pytest.raises(KeyboardInterrupt):
        Trainer(make(), impatient, CONFIG).run(progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_align_leaves_the_base_model_alone():
    base = make()
    before = [p.clone() for p in base.parameters()]
    aligned, history = align(base, SpringOracle(), replace(CONFIG, iterations=1), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(aligned.parameters(), before, strict=True))
    assert json.dumps(history)


def test_learning_rate_schedules():
    factors = [warmup_cosine(k, 4, 20, 0.3) for k in range(40)]
    assert factors[0] == 0.25  # not 0: the first step counts
    assert factors[4] == 1.0
    assert factors[20] == pytest.approx(0.3)
    assert factors[39] == pytest.approx(0.3)  # it does not climb again
    hold = [warmup_hold_decay(k, 2, 10, 4) for k in range(11)]
    assert hold[:2] == [0.5, 1.0]
    assert hold[5] == 1.0
    assert hold[8] == 0.5
    assert hold[10] == 0.0
