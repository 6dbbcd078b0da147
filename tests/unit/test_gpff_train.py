"""Training of pseudo-force fields: it learns every decade, resumes to the same numbers, and refuses to mix runs."""

from __future__ import annotations

import itertools
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from elign_lab.cli import main
from elign_lab.datasets import load_dataset
from elign_lab.gpff import GPFFConfig, PseudoForceField, load_force_field
from elign_lab.gpff.pseudo_forces import nearest_image, perturb
from elign_lab.gpff.train import PerturbedBatches, TrainConfig, decades, errors, loss_per_molecule, train, weight
from elign_lab.painn import PaiNNConfig
from elign_lab.training import read_json_lines

NETWORK = PaiNNConfig(features=8, vectors=4, channels=4, layers=2, basis=6, shortest=0.4, reach=12.0, cutoff=False)
CONFIG = TrainConfig(
    model=GPFFConfig(network=NETWORK),
    steps=24,
    batch_size=8,
    warmup=4,
    decay=8,
    ema_decay=0.9,
    log_every=4,
    validate_every=24,
    checkpoint_every=7,
)


def weights(path):
    return torch.cat([p.detach().reshape(-1) for p in load_force_field(path).parameters()])


def test_interrupted_run_continues_to_the_same_numbers(tmp_path, monkeypatch):
    train(CONFIG, tmp_path / "quiet", progress=False)
    import elign_lab.gpff.train as module

    original = module._train_step
    for stop in (3, 11, 18):

        def interrupted(model, perturbed, *args, stop=stop):
            if perturbed.step == stop:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of a step
            return original(model, perturbed, *args)

        monkeypatch.setattr(module, "_train_step", interrupted)
        train(CONFIG, tmp_path / "rough", progress=False)
        assert torch.load(tmp_path / "rough" / "checkpoint.pt", weights_only=True)["step"] == stop + 1
    monkeypatch.setattr(module, "_train_step", original)
    model = train(CONFIG, tmp_path / "rough", progress=False)
    assert torch.equal(
        weights(tmp_path / "quiet" / "model.safetensors"), weights(tmp_path / "rough" / "model.safetensors")
    )
    logs = [read_json_lines(tmp_path / name / "log.jsonl") for name in ("quiet", "rough")]
    assert logs[0][-1]["validation"] == logs[1][-1]["validation"]
    assert list(logs[0][0]["decades"]) == ["0.01-0.1", "0.1-1", "1-10"]
    assert sum(count for _, count in model.config.compositions) == len(load_dataset("bundled", split="train"))


def test_the_two_variants_learn(tmp_path):
    data = load_dataset("bundled", split="validation")
    for variant in ("direct", "conservative"):
        model = GPFFConfig(variant=variant, network=replace(NETWORK, features=16, vectors=8))
        config = replace(CONFIG, model=model, steps=100, batch_size=16, warmup=5, decay=60, learning_rate=5e-3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            before = errors(PseudoForceField(model), data, 32, levels=(0.1, 1.0))["rmse"]
        after = errors(train(config, tmp_path / variant, progress=False), data, 32, levels=(0.1, 1.0))["rmse"]
        assert after[0] < before[0]
        assert after[1] < 0.93 * before[1]


def test_a_run_with_other_settings_is_refused(tmp_path):
    train(replace(CONFIG, steps=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match="floor"):
        train(replace(CONFIG, steps=4, floor=0.1), tmp_path, progress=False)


def test_time_limit_and_command_line(tmp_path, capsys):
    sets = [f"model.network.{name}={value}" for name, value in (("features", 8), ("vectors", 4), ("layers", 1))]
    arguments = ["gpff", "train", "--out", str(tmp_path), "--max-minutes", "0", "--batch-size", "4"]
    assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    assert main([*arguments, "--preset", "other"]) == 2


def test_weight_makes_all_levels_alike():
    """Before anything is known but the spread, the loss is 1 at every level over the floor: see the module."""
    sigma = torch.logspace(-1, 1, 9, dtype=torch.float64)
    best = sigma.square() * 1.42**2 / (sigma.square() + 1.42**2)
    torch.testing.assert_close(weight(sigma, 1.42, 0.0) * best, torch.ones(9, dtype=torch.float64))
    assert float(weight(torch.tensor(0.0), 1.42, 0.05)) == pytest.approx(400, rel=0.01)
    data = load_dataset("bundled", split="validation").batch(range(64))
    levels = torch.full((64,), 0.5)
    x = perturb(data, levels, torch.Generator().manual_seed(0))
    exact = _Exact(nearest_image(data, x))
    assert float(loss_per_molecule(exact, data, x, exact.image, levels, 0.05).max()) < 1e-10
    exact.image = x  # the force is 0: the error is the noise that the nearest image leaves
    loss = loss_per_molecule(exact, data, x, nearest_image(data, x), levels, 0.05)
    assert 0.7 < float(loss.mean()) < 1.15


class _Exact:
    config = GPFFConfig()

    def __init__(self, image):
        self.image = image

    def __call__(self, numbers, x, mask):
        return 2 * (self.image - x)


def test_batches_do_not_depend_on_the_workers():
    batches = PerturbedBatches(load_dataset("bundled", split="validation"), CONFIG, 3, slice(None))
    alone = list(itertools.islice(batches, 5))
    dealt = itertools.islice(DataLoader(batches, batch_size=None, num_workers=2), 5)
    for one, other in zip(alone, dealt, strict=True):
        assert one.step == other.step
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    assert [one.step for one in alone] == [3, 4, 5, 6, 7]


def test_decades_and_errors(tmp_path):
    assert decades(GPFFConfig(sigma_min=0.02, sigma_max=10.0)) == ["0.01-0.1", "0.1-1", "1-10"]
    data = load_dataset("bundled", split="validation")
    model = train(replace(CONFIG, steps=1), tmp_path, progress=False)
    found = errors(model, data, 16)
    assert found == errors(model, data, 16)
    assert found["sigma"][-1] == 10.0
    # read off the force of a huge cloud, the level is right before any training: the size of the cloud shows it
    assert found["sigma_hat"][-1] == pytest.approx(10, rel=0.08)
