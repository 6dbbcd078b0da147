"""The demo on a tiny model: deterministic, resumable, and honest about its outcome."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from elign_lab import MoleculeBatch, demo
from elign_lab.alignment import Trainer, cpu_mini
from elign_lab.checkpoints import save_model
from elign_lab.demo import DemoConfig, describe, run_demo
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.evaluation import Interval
from elign_lab.sampling import sample


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DemoConfig:
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(features=16, layers=2, timesteps=50, size_histogram=((3, 5), (5, 3), (8, 1))))
    path = save_model(model, tmp_path_factory.mktemp("model") / "tiny.safetensors")
    settings = replace(cpu_mini(), groups=2, members=2, steps=10, skip_prefix=7, iterations=2, max_failure_share=1.0)
    # the learned oracle judges here, because starting xTB's worker processes takes seconds
    return DemoConfig(model=str(path), judge="learned", n=6, steps=10, align=settings)


def test_demo_writes_the_same_report_twice(config, tmp_path):
    config = replace(config, judge="xtb")
    first, second = (run_demo(tmp_path / name, config) for name in "ab")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert results[0] == results[1]
    assert results[0]["base"]["n"] == results[0]["aligned"]["n"] == 6
    assert first.verdict == second.verdict == results[0]["verdict"]
    assert first.verdict in first.text()
    html = first.report.read_text()
    assert f"<title>{first.verdict}" in html
    assert "<script src=" not in html
    assert "2 iterations of 2 x 2 rollouts" in html
    assert "elign-lab demo --model" in html
    sizes = [MoleculeBatch.from_xyz(tmp_path / "a" / f"{name}.xyz").sizes for name in ("base", "aligned")]
    assert torch.equal(*sizes)


def test_interrupted_alignment_is_continued(config, tmp_path, monkeypatch):
    whole = run_demo(tmp_path / "whole", config)
    step = Trainer.step

    def interrupted(self):
        if self.iteration == 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "parts", config)
    assert not (tmp_path / "parts" / "report.html").exists()
    monkeypatch.undo()
    parts = run_demo(tmp_path / "parts", config)
    assert parts.comparison.differences == whole.comparison.differences


def test_interrupted_sampling_stops_the_demo(config, tmp_path, monkeypatch):
    """`sample` returns the finished batches when it is interrupted: not what the demo needs."""
    monkeypatch.setattr(demo, "sample", lambda *arguments, **options: sample(*arguments, **options)[:3])
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_other_settings_start_another_alignment(config, tmp_path):
    run_demo(tmp_path, config)
    run_demo(tmp_path, replace(config, align=replace(config.align, seed=5)))
    assert len(list(tmp_path.glob("alignment-*"))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Interval(-0.5, -0.9, -0.1), "is lower"),
        (Interval(0.5, 0.1, 0.9), "is HIGHER"),
        (Interval(-0.1, -0.4, 0.2), "does not differ beyond chance"),
    ],
)
def test_the_verdict_says_what_the_interval_says(change, words):
    comparison = SimpleNamespace(differences={"f_rms_median": change, "energy_per_atom_median": Interval(0, -1, 1)})
    assert f"median force RMS {words} ({change.value:+.2f} eV/Å" in describe(comparison)


def test_the_verdict_claims_nothing_where_the_oracle_failed():
    unknown = Interval(math.nan, math.nan, math.nan)
    text = describe(SimpleNamespace(differences={"f_rms_median": unknown, "energy_per_atom_median": unknown}))
    assert text.count("is unknown") == 2
    assert "chance" not in text
