"""The schedule of a training that must end at a given time, on a clock and a training that only count."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from elign_lab.training import JsonLines, save_state, warmup_hold_decay

SCRIPT = Path(__file__).parents[2] / "gpu" / "session.py"
SPEED = 10.0  # steps a second


@pytest.fixture
def session(monkeypatch):
    spec = spec_from_file_location("gpu_session", SCRIPT)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Config:
    """What the schedule reads and writes of a training's settings."""

    steps: int = 0
    decay: int = 1
    warmup: int = 10
    log_every: int = 20
    checkpoint_every: int = 1


class FakeTraining:
    """Counts steps at SPEED and writes the log that a training writes; the loss blows up in the given pieces."""

    def __init__(self, blows_up: tuple[int, ...] = ()) -> None:
        self.now, self.step, self.pieces, self.factors, self.blows_up = 0.0, 0, 0, [], blows_up

    def time(self) -> float:
        return self.now

    def __call__(self, config: Config, out: Path, *, max_seconds: float, progress: bool) -> None:
        self.pieces += 1
        end, kept = self.now + max_seconds, self.step
        log = JsonLines(out / "log.jsonl", "step", self.step)
        while self.now < end and self.step < config.steps:
            factor = warmup_hold_decay(self.step, config.warmup, config.steps, config.decay)
            self.factors.append(factor)
            self.step, self.now = self.step + 1, self.now + 1 / SPEED
            if self.step % config.log_every == 0:
                log.write({"step": self.step - 1, "seconds": self.now, "lr_factor": factor})
        if self.pieces in self.blows_up:
            self.step = kept
            raise FloatingPointError("the loss is 1e9")
        save_state(out / "checkpoint.pt", {"step": self.step})


def test_the_decay_ends_with_the_time(session, monkeypatch, tmp_path):
    training = FakeTraining()
    monkeypatch.setattr(session.time, "time", training.time)
    budget = session.Budget(end=1000.0, check=False, root=None)
    session.train_until(training, Config(), tmp_path / "run", budget, share=0.9)
    assert 0.95 * 900 <= training.now <= 900 + 1
    assert training.factors[-1] < 0.01
    held = sum(f == 1 for f in training.factors) / len(training.factors)
    assert held == pytest.approx(0.4, abs=0.02)
    steps = [a - b for a, b in zip(training.factors[20:], training.factors[21:], strict=False)]
    assert max(steps) < 2 / (0.5 * 900 * SPEED)  # one line downhill, although it is planned anew on the way
    assert min(steps) > -1e-3


def test_a_loss_that_blows_up_brakes(session, monkeypatch, tmp_path):
    training = FakeTraining(blows_up=(2,))
    monkeypatch.setattr(session.time, "time", training.time)
    budget = session.Budget(end=1000.0, check=False, root=None)
    session.train_until(training, Config(), tmp_path / "run", budget)
    assert 0.9 * 1000 <= training.now <= 1000 + 1  # it went on
    again = training.factors[int(400 * SPEED) :]
    assert again[0] == pytest.approx(0.5, abs=0.01)
    assert again[-1] < 0.01
