"""Pretraining: it learns, resumes to the same numbers, and refuses to mix runs."""

import signal
from dataclasses import replace

import pytest
import torch

from elign_lab.checkpoints import load_model
from elign_lab.denoiser import DenoiserConfig
from elign_lab.denoiser.pretrain import PretrainConfig, _draw_times, pretrain, validation_loss
from elign_lab.training import read_json_lines

CONFIG = PretrainConfig(
    model=DenoiserConfig(features=16, layers=2),
    steps=30,
    batch_size=16,
    warmup=5,
    decay=10,
    ema_decay=0.9,
    log_every=5,
    validate_every=30,
    checkpoint_every=7,
)


def weights(path):
    return torch.cat([p.detach().reshape(-1) for p in load_model(path).parameters()])


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "early_share": 0.7}], ids=["adamw", "muon"])
def test_interrupted_run_continues_to_the_same_numbers(tmp_path, monkeypatch, settings):
    config = replace(CONFIG, **settings)
    pretrain(config, tmp_path / "quiet", progress=False)
    import elign_lab.denoiser.pretrain as module

    original = module._train_step
    for stop in (3, 11, 24):

        def interrupted(model, batch, step, *args, stop=stop):
            if step == stop:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of a step
            return original(model, batch, step, *args)

        monkeypatch.setattr(module, "_train_step", interrupted)
        pretrain(config, tmp_path / "rough", progress=False)
        assert torch.load(tmp_path / "rough" / "checkpoint.pt", weights_only=True)["step"] == stop + 1
    monkeypatch.setattr(module, "_train_step", original)
    model = pretrain(config, tmp_path / "rough", progress=False)
    for name in ("quiet", "rough"):
        assert (tmp_path / name / "model.safetensors").exists()
    assert torch.equal(
        weights(tmp_path / "quiet" / "model.safetensors"), weights(tmp_path / "rough" / "model.safetensors")
    )
    logs = [read_json_lines(tmp_path / name / "log.jsonl") for name in ("quiet", "rough")]
    assert logs[0][-1]["validation_loss"] == logs[1][-1]["validation_loss"]
    assert logs[0][-1]["validation_loss"] < 0.5  # predicting zero noise gives 0.5
    assert model.config.size_histogram


def test_time_limit(tmp_path):
    pretrain(replace(CONFIG, steps=10_000), tmp_path, max_seconds=0.0, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < 100


def test_another_configuration_is_refused(tmp_path):
    pretrain(replace(CONFIG, steps=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match="learning_rate"):
        pretrain(replace(CONFIG, steps=4, learning_rate=1.0), tmp_path, progress=False)


def test_validation_loss_is_fixed(tmp_path):
    from elign_lab.datasets import load_dataset

    model = pretrain(replace(CONFIG, steps=1), tmp_path, progress=False)
    data = load_dataset("bundled", split="validation")
    assert validation_loss(model, data, 32) == validation_loss(model, data, 32)


def test_early_times():
    config = replace(CONFIG, early_share=0.7)
    times = _draw_times(20_000, config, torch.Generator().manual_seed(0))
    early = (times <= 300).double().mean()
    assert abs(early - (0.7 + 0.3 * 301 / 1001)) < 0.015  # five standard errors
    assert times.max() == 1000
    assert times.min() == 0
    uniform = _draw_times(64, CONFIG, torch.Generator().manual_seed(1))
    assert torch.equal(uniform, torch.randint(0, 1001, (64,), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("field", [{"optimizer": "sgd"}, {"early_share": 1.5}])
def test_unknown_settings_are_refused(field):
    (name,) = field
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **field)


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_run_that_blows_up_ends_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, factor):
    import elign_lab.denoiser.pretrain as module

    original = module._train_step

    def blows_up(model, batch, step, *args):
        loss, norm = original(model, batch, step, *args)
        return (loss * factor if step > 11 else loss), norm

    monkeypatch.setattr(module, "_train_step", blows_up)
    with pytest.raises(
        FloatingPointError, match=r"after 15 steps.*checkpoint.pt is from before.*Lower the learning rate"
    ):
        pretrain(replace(CONFIG, checkpoint_every=5), tmp_path, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 10
    assert [row["step"] for row in read_json_lines(tmp_path / "log.jsonl")] == [4, 9]
